"""Stage 2 from the U-Net of a pipeline: the same images, other resolutions, classes and conditions."""

import json

import numpy as np
import pytest
import torch
from conftest import fill_zeros, launch, losses
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from latent_ddpm.autoencoder.stock import load_autoencoder
from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.start import _schedule, load_unet_start, new_unet_like, weights_for, with_unet_of
from latent_ddpm.errors import UserError
from pipeline_latent_ddpm import LatentDDPMPipeline

STEPS = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 6}
KEYS = ("block_out_channels", "norm_num_groups", "attention_levels", "attention_head_dim", "layers_per_block")
SIZES = {f"unet_{key}": None for key in KEYS}


@pytest.fixture(scope="module")
def published(photos, tmp_path_factory):
    """A run of both stages with classes; its folder."""
    folder = tmp_path_factory.mktemp("published")
    data = {"train_data_dir": photos, "resolution": 16}
    launch("train_autoencoder.py", folder, quantizer="kl", **data, **STEPS)
    launch("train_unet.py", folder, conditions="[class]", noise_shift=1.5, beta_schedule="linear", **data, **STEPS)
    return folder


def config_for(folder, tmp_path, **keys):
    config = UNetConfig(dataset_name="x", resolution=16, init_unet=str(folder), output_dir=str(tmp_path), **keys)
    start = load_unet_start(config)
    return with_unet_of(config, start), start


@torch.no_grad()
def test_sizes_schedule_and_autoencoder_come_with_it(published, tmp_path):
    config, start = config_for(published, tmp_path)
    assert config.unet_block_out_channels == [16, 32] and config.unet_attention_levels == [1]
    assert config.beta_schedule == "linear" and config.noise_shift == pytest.approx(1.5, abs=2e-3)
    assert config.latent_normalization == "keep" and config.autoencoder == str(published / "pipeline")
    given, _ = config_for(published, tmp_path, autoencoder="vae")  # whose scale is of other latents
    assert given.latent_normalization is None and given.autoencoder == "vae"
    assert sorted(start.class_names) == ["cats", "dogs"]
    saved = DDPMScheduler.from_pretrained(published / "pipeline", subfolder="scheduler")
    assert torch.allclose(noise_table(config), saved.alphas_cumprod, atol=2e-3)


@pytest.mark.parametrize("keys", [{}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}, {"noise_shift": 2.0},
                                  {"prediction_type": "flow_prediction", "noise_shift": 3.0},
                                  {"prediction_type": "epsilon", "num_train_timesteps": 500},
                                  {"rescale_betas_zero_snr": True}])  # fmt: skip
def test_a_schedule_is_read_back(keys):
    config = UNetConfig(dataset_name="x", **keys)
    read = _schedule(json.loads(sampling_scheduler(config).to_json_string()), "x")
    again = UNetConfig(dataset_name="x", **read)
    assert again.prediction_type == config.prediction_type
    assert again.noise_shift == pytest.approx(config.noise_shift, abs=2e-3)
    if noise_table(config) is not None:
        assert torch.allclose(noise_table(again), noise_table(config), atol=1e-3)


def test_schedules_that_ours_does_not_have():
    with pytest.raises(UserError, match="beta_schedule sigmoid, not linear"):
        _schedule({"beta_schedule": "sigmoid"}, "x")
    betas = np.linspace(1e-3, 0.3, 1000).tolist()
    with pytest.raises(UserError, match="trained_betas, which no beta_schedule"):
        _schedule({**DDIMScheduler().config, "trained_betas": betas}, "x")
    assert _schedule({}, "x") == {}


@torch.no_grad()
def test_classes_by_name_and_an_added_image(published, tmp_path):
    config, start = config_for(published, tmp_path)
    fill_zeros(start.unet)
    channels = start.unet.config.out_channels
    classes = {"num_class_embeds": 4, "conditioning_channels": 2}
    unet = new_unet_like(start, channels, 8, classes).eval()
    unet.load_state_dict(weights_for(unet, start, ["birds", "cats", "dogs"]))
    noisy, t, start.unet = torch.randn(3, channels, 8, 8), torch.tensor([5, 50, 500]), start.unet.eval()
    extra = torch.randn(3, 2, 8, 8)
    old = {name: place for place, name in enumerate([*start.class_names, ""])}
    made = unet(torch.cat((noisy, extra), 1), t, torch.tensor([1, 2, 3])).sample
    wanted = start.unet(noisy, t, torch.tensor([old["cats"], old["dogs"], old[""]])).sample
    assert torch.allclose(made, wanted, atol=1e-5)
    new = unet(torch.cat((noisy, extra), 1), t, torch.tensor([0, 0, 0])).sample
    assert torch.allclose(new, start.unet(noisy, t, torch.tensor([2, 2, 2])).sample, atol=1e-5)
    plain = new_unet_like(start, channels, 16, {}).eval()  # classes left out, larger latents
    plain.load_state_dict(weights_for(plain, start, None))
    assert plain(torch.randn(1, channels, 16, 16), t[:1]).sample.shape[-1] == 16


@torch.no_grad()
def test_classes_added_to_a_model_without(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), **blocks)
    fill_zeros(unet)
    unet.save_pretrained(tmp_path / "unet")
    config, start = config_for(tmp_path, tmp_path / "out")
    assert config.prediction_type == "v_prediction"  # nothing is known of its schedule
    with_classes = new_unet_like(start, 4, 8, {"num_class_embeds": 3}).eval()
    with_classes.load_state_dict(weights_for(with_classes, start, ["a", "b"]))
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([5, 500])
    assert torch.allclose(with_classes(noisy, t, torch.tensor([0, 2])).sample, unet.eval()(noisy, t).sample, atol=1e-5)


def test_refusals(published, tmp_path):
    _, start = config_for(published, tmp_path)
    with pytest.raises(UserError, match="is for latents of 3 channels, and the autoencoder has 4"):
        new_unet_like(start, 4, 8, {})
    with pytest.raises(UserError, match="needs latents whose sides are a multiple of 2; they have 5"):
        new_unet_like(start, 3, 5, {})
    with pytest.raises(UserError, match="has no layers for text"):
        new_unet_like(start, 3, 8, {"cross_attention_dim": 8})
    with pytest.raises(UserError, match="holds no config.json of a model"):
        config_for(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="init_unet_revision is for a U-Net that is given"):
        UNetConfig(dataset_name="x", init_unet_revision="main").validate()
    load_autoencoder(published / "autoencoder").save_pretrained(tmp_path / "unet")
    with pytest.raises(UserError, match="holds the class AutoencoderKL; a UNet2DModel"):
        config_for(tmp_path, tmp_path / "out")
    UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(32,), cross_attention_dim=8,
                         down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
                         ).save_pretrained(tmp_path / "text" / "unet")  # fmt: skip
    _, text = config_for(tmp_path / "text", tmp_path / "out")
    with pytest.raises(UserError, match="is conditioned on text"):
        new_unet_like(text, 3, 8, {})


def test_a_run_goes_on_from_a_pipeline(published, photos, tmp_path):
    """With its autoencoder: before the first step it draws what the pipeline draws. It resumes, and exports."""
    data = {"train_data_dir": photos, "resolution": 16, "init_unet": published / "pipeline", "conditions": "[class]"}
    flags = {**data, **SIZES, **STEPS}
    text = launch("train_unet.py", tmp_path / "a", learning_rate=1e-9, **flags)
    assert "weights are taken; new: nothing" in text
    old, new = (LatentDDPMPipeline.from_pretrained(str(p / "pipeline")) for p in (published, tmp_path / "a"))
    made = [pipe(class_labels=["cats", "dogs"], num_inference_steps=3, output_type="np",
                 generator=torch.Generator().manual_seed(0)).images for pipe in (old, new)]  # fmt: skip
    assert np.abs(made[0] - made[1]).max() < 1e-3
    same = (old.vqvae.quant_conv.bias, new.vqvae.quant_conv.bias)  # normalized as before, and not by these images
    assert torch.equal(*same)
    launch("train_unet.py", tmp_path / "a", **{**flags, "max_train_steps": 8}, learning_rate=1e-9)
    assert sorted(losses(tmp_path / "a", "unet")) == [1, 2, 3, 4, 5, 6, 7, 8]
    larger = launch("train_unet.py", tmp_path / "b", **{**flags, "resolution": 32, "conditions": "[]"})
    assert "weights are taken" in larger
    index = json.loads((tmp_path / "b" / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline"
