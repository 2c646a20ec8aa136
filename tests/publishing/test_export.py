"""The export: what is published equals what was trained, with and without diffusers' LDMPipeline."""

import io
import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import fill_zeros, run_script
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from small_pipeline import CONFIG, save_pipeline
from small_pipeline import make as make_pipeline

from latent_ddpm.autoencoder.scaling import Moments, fold_normalization, overall_std
from latent_ddpm.autoencoder.stock import (
    check_autoencoder_fits,
    latents_of,
    load_autoencoder,
    quantize_indices,
    to_stock,
)
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.diffusion.noise_schedule import sampling_scheduler
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.files import replace_folder
from latent_ddpm.publishing.export import convert_pipeline, export_pipeline, stock_pipeline
from pipeline_latent_ddpm import RECORDED_STEPS, LatentDDPMPipeline


def make(channels=3, attention=False, levels=(8, 16, 16), **quantizer):
    config = AutoencoderConfig(
        dataset_name="x",
        resolution=16,
        image_channels=channels,
        block_out_channels=list(levels),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=32,
        mid_block_add_attention=attention,
        **quantizer,
    )
    torch.manual_seed(0)
    model = fill_zeros(Autoencoder(config)).eval()
    images = torch.rand(4, channels, 16, 16) * 2 - 1
    model.initialize(images)
    return config, model, images


@pytest.mark.parametrize(
    ("channels", "attention", "levels"), [(1, False, (8, 16, 16)), (3, True, (8, 16)), (3, False, (8,))]
)
@torch.no_grad()
def test_stock_vqmodel_equals_the_trained_one(channels, attention, levels, tmp_path):
    config, model, images = make(channels, attention, levels)
    ours = model(images)
    to_stock(model, config).save_pretrained(tmp_path)
    stock = load_autoencoder(tmp_path)
    latents = stock.encode(images).latents
    assert torch.allclose(latents, model.encode(images), atol=1e-5)
    assert torch.equal(quantize_indices(stock, latents), ours.quantized.indices)
    assert torch.allclose(stock.decode(latents).sample, ours.reconstruction, atol=1e-5)


@pytest.mark.parametrize("quantizer", [{}, {"quantizer": "simvq"}, {"quantizer": "fsq", "fsq_levels": [4, 4, 2]}])
@torch.no_grad()
def test_stock_vqmodel_equals_the_trained_one_with_every_quantizer(quantizer):
    config, model, images = make(**quantizer)
    ours = model(images)
    stock = to_stock(model, config)
    latents = stock.encode(images).latents
    assert torch.equal(quantize_indices(stock, latents), ours.quantized.indices)
    assert torch.allclose(stock.decode(latents).sample, ours.reconstruction, atol=1e-5)


@pytest.mark.parametrize(("channels", "attention", "levels"), [(1, False, (8, 16, 16)), (3, True, (8, 16))])
@torch.no_grad()
def test_stock_autoencoder_kl_equals_the_trained_one(channels, attention, levels, tmp_path):
    config, model, images = make(channels, attention, levels, quantizer="kl")
    ours = model(images)
    to_stock(model, config).save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors"))
    stock = load_autoencoder(tmp_path)
    assert isinstance(stock, AutoencoderKL)
    posterior = stock.encode(images).latent_dist
    assert torch.allclose(latents_of(stock, images), model.encode(images), atol=1e-5)
    assert torch.allclose(posterior.std.mean(), ours.quantized.std, atol=1e-5)
    per_value = posterior.kl().mean() / images[0].numel()
    assert torch.allclose(per_value, ours.quantized.kl_loss, rtol=1e-4)
    assert torch.allclose(stock.decode(posterior.mode()).sample, ours.reconstruction, atol=1e-5)


def assert_folding_changes_no_image(stock, images):
    """Normalized latents, the same pictures, and a posterior as wide as before."""
    direct = latents_of(stock, images)
    before, spread = stock.decode(direct).sample, stock.encode(images).latent_dist.std
    mean, variance = direct.mean((0, 2, 3)), direct.var((0, 2, 3), correction=0)
    fold_normalization(stock, mean, overall_std(variance))
    latents = latents_of(stock, images)
    model_space = latents * stock.config.scaling_factor
    assert model_space.mean((0, 2, 3)).abs().max() < 1e-4
    assert model_space.var((0, 2, 3), correction=0).mean() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(stock.decode(latents).sample, before, atol=1e-5)
    assert torch.allclose(stock.encode(images).latent_dist.std, spread, atol=1e-6)


@torch.no_grad()
def test_folded_normalization_changes_no_image_of_autoencoder_kl():
    config, model, images = make(quantizer="kl")
    assert_folding_changes_no_image(to_stock(model, config), images)


@torch.no_grad()
def test_folding_into_a_vae_without_the_two_convolutions(tmp_path):
    """As those of SD3 and FLUX are, with a shift of their own."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 5, "shift_factor": 0.3}
    shape |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    stock = AutoencoderKL(use_quant_conv=False, use_post_quant_conv=False, **shape).eval().requires_grad_(False)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert_folding_changes_no_image(stock, images)
    assert stock.config.shift_factor is None
    stock.save_pretrained(tmp_path)
    again = load_autoencoder(tmp_path)
    assert torch.equal(latents_of(again, images), latents_of(stock, images))


@torch.no_grad()
def test_folded_normalization_changes_no_image():
    config, model, images = make()
    stock = to_stock(model, config)
    moments = Moments(3)
    for half in images.split(2):
        moments.add(stock.encode(half).latents)
    mean, variance = moments.result()
    direct = stock.encode(images).latents
    assert torch.allclose(mean.float(), direct.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(variance.float(), direct.var((0, 2, 3), correction=0), rtol=1e-4)
    before = stock.decode(direct).sample
    indices = quantize_indices(stock, direct)
    fold_normalization(stock, mean, overall_std(variance))
    latents = stock.encode(images).latents
    model_space = latents * stock.config.scaling_factor
    assert model_space.mean((0, 2, 3)).abs().max() < 1e-4
    assert model_space.var((0, 2, 3), correction=0).mean() == pytest.approx(1, abs=1e-4)
    assert torch.equal(quantize_indices(stock, latents), indices)
    assert torch.allclose(stock.decode(latents).sample, before, atol=1e-5)


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="There is no autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not an autoencoder"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match="names the class UNet2DModel, which is none of AutoencoderKL, VQModel"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{not JSON")
    with pytest.raises(UserError, match="not an autoencoder"):
        load_autoencoder(tmp_path)
    config, model, _ = make()
    stock = to_stock(model, config)
    assert check_autoencoder_fits(stock, UNetConfig(dataset_name="x", resolution=32)) == 8
    with pytest.raises(UserError, match="images of 3 channels, image_channels is 1"):
        check_autoencoder_fits(stock, UNetConfig(dataset_name="x", resolution=32, image_channels=1))
    with pytest.raises(UserError, match="resolution 30 is not divisible by 4"):
        check_autoencoder_fits(stock, UNetConfig(dataset_name="x", resolution=30))
    with pytest.raises(UserError, match="latents of 6x6 do not fit"):
        make_unet(UNetConfig(dataset_name="x"), 3, 6)


def test_replace_folder_keeps_the_old_one_when_writing_fails(tmp_path):
    folder = tmp_path / "out"
    replace_folder(folder, lambda aside: (aside / "a").write_text("1"))

    def fail(aside):
        (aside / "b").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(folder, fail)
    replace_folder(folder, lambda aside: (aside / "c").write_text("3"))
    assert [path.name for path in folder.iterdir()] == ["c"]


STRANGER = """
import sys, warnings
warnings.simplefilter("error", FutureWarning)
from diffusers import DiffusionPipeline
import torch, numpy
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
numpy.save(sys.argv[2], pipeline(batch_size=2, num_inference_steps=5, generator=generator, output_type="np").images)
print(type(pipeline).__name__, type(pipeline.vqvae).__module__.split(".")[0],
      sorted(m for m in sys.modules if m.startswith(("latent_ddpm", "pipeline_latent_ddpm"))))
"""


@pytest.mark.parametrize("quantizer", ["ema", "kl"])
@torch.no_grad()
def test_a_stranger_with_only_diffusers_gets_the_training_time_model(tmp_path, quantizer):
    config, model, images = make(channels=1, quantizer=quantizer)
    mean, variance = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 0.4, 0.6])
    std = overall_std(variance)
    unet_config = UNetConfig(
        dataset_name="x", unet_block_out_channels=[32, 32], unet_attention_levels=[1], unet_norm_num_groups=8
    )
    unet = make_unet(unet_config, 3, 4).eval()
    for parameter in unet.parameters():  # a new one predicts 0
        parameter.normal_(std=0.1)
    scheduler = sampling_scheduler(unet_config)
    stock = to_stock(model, config)
    fold_normalization(stock, mean, std)
    export_pipeline(tmp_path / "pipeline", stock, unet, scheduler, 5)
    assert {"model_index.json", "pipeline.py", "README.md"} <= {p.name for p in (tmp_path / "pipeline").iterdir()}
    assert not list((tmp_path / "pipeline").rglob("*.bin"))

    words = [sys.executable, "-c", STRANGER, str(tmp_path / "pipeline"), str(tmp_path / "images.npy")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["LDMPipeline", "diffusers", "[]"]
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert ("a VQ-VAE with 32 codes" in card) == (quantizer == "ema")
    # the one line that the card of a KL-VAE's pipeline announces; should diffusers drop it, the note can go
    announced = "logs that `vqvae` is an AutoencoderKL" in card
    assert announced == ("Expected types for vqvae" in done.stderr) == (quantizer == "kl")
    theirs = np.load(tmp_path / "images.npy")

    # the training-time model: our own decoder and quantizer, on latents denormalized by hand
    latents = torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        latents = scheduler.step(unet(latents, t).sample, t, latents).prev_sample
    codes = latents * std + mean.view(-1, 1, 1)
    if quantizer != "kl":
        codes = model.quantizer(codes).latents
    ours = (model.decode(codes) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() < 1e-5

    custom = DiffusionPipeline.from_pretrained(
        tmp_path / "pipeline", custom_pipeline=str(tmp_path / "pipeline"), trust_remote_code=True
    )
    custom.set_progress_bar_config(disable=True)
    assert type(custom).__name__ == "LatentDDPMPipeline"
    richer = custom(
        batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    assert np.abs(richer - theirs).max() < 1e-5


@pytest.mark.parametrize("kinds", ["none", "class"])
def test_the_number_of_steps_outlives_every_way_to_save_and_load(kinds, tmp_path):
    """And stock diffusers says nothing about it."""
    pipe, folder = make_pipeline(kinds), tmp_path / "pipeline"
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    export_pipeline(folder, pipe.vqvae, pipe.unet, scheduler, 3, record_steps=True, **CONFIG.get(kinds, {}))
    assert "num_inference_steps=3" in (folder / "README.md").read_text()
    assert RECORDED_STEPS not in scheduler.config  # the caller's is as it was
    words = {"custom_pipeline": str(folder), "trust_remote_code": True}
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("diffusers").addHandler(handler)
    stock = [] if kinds == "class" else [DiffusionPipeline.from_pretrained(folder)]
    loaded = [*stock, LatentDDPMPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder, **words)]
    for number, one in enumerate(loaded):
        one.save_pretrained(tmp_path / str(number))
        again = LatentDDPMPipeline.from_pretrained(tmp_path / str(number))
        again.scheduler = DDIMScheduler.from_config(again.scheduler.config, clip_sample=False)
        again.save_pretrained(tmp_path / str(number))
        again = LatentDDPMPipeline.from_pretrained(tmp_path / str(number))
        again.set_progress_bar_config(disable=True)
        assert again.recorded_steps == 3
        for words, steps in (({}, 3), ({"num_inference_steps": 2}, 2)):
            again(output_type="latent", **words)
            assert again.num_timesteps == steps
    logging.getLogger("diffusers").removeHandler(handler)
    assert said.getvalue() == ""


def test_without_a_recorded_number_there_are_twenty_steps(tmp_path):
    pipe = make_pipeline("none")
    export_pipeline(tmp_path / "pipeline", pipe.vqvae, pipe.unet, pipe.scheduler, 3)
    pipe = LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    pipe(output_type="latent")
    assert pipe.recorded_steps is None and pipe.num_timesteps == 20


# ------------------------------------------------------------------------------------------- without LDMPipeline

# What a diffusers without the class does: its lazy module does not know the name.
WITHOUT = """
import sys
import diffusers
diffusers._class_to_module.pop("LDMPipeline")
diffusers.pipelines._class_to_module.pop("LDMPipeline", None)
import torch, numpy
"""
DRAW = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
numpy.save(sys.argv[2], pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images)
print(type(pipeline).__name__)
"""
EXPORT = """
from pathlib import Path
from diffusers import DiffusionPipeline, VQModel, UNet2DModel, DDIMScheduler
from latent_ddpm.publishing.export import export_pipeline, stock_pipeline
assert stock_pipeline() is None
old = Path(sys.argv[1])
parts = [kind.from_pretrained(old / name) for kind, name in
         ((VQModel, "vqvae"), (UNet2DModel, "unet"), (DDIMScheduler, "scheduler"))]
export_pipeline(Path(sys.argv[2]), *parts, 2)
"""


def python(code, *words):
    return subprocess.run([sys.executable, "-c", WITHOUT + code, *map(str, words)], capture_output=True, text=True,
                          check=False)  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder that names LDMPipeline, and what it draws."""
    folder = tmp_path_factory.mktemp("ldm") / "pipeline"
    save_pipeline(folder)
    (folder / "README.md").write_text('DiffusionPipeline.from_pretrained("me/digits")\n')
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return folder, pipeline(batch_size=2, num_inference_steps=2, generator=generator, output_type="np").images


def test_a_published_folder_outlives_ldmpipeline(drawn, tmp_path):
    folder, images = drawn
    shutil.copytree(folder, tmp_path / "pipeline")
    folder = tmp_path / "pipeline"
    before = json.loads((folder / "model_index.json").read_text())
    assert "is now a LatentDDPMPipeline" in run_script("convert_pipeline.py", folder).stdout
    done = python(DRAW, folder, tmp_path / "images.npy")
    assert done.stdout.strip() == "LatentDDPMPipeline", done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "images.npy") - images).max() < 1e-5
    readme = (folder / "README.md").read_text()
    assert readme == (
        'DiffusionPipeline.from_pretrained("me/digits", custom_pipeline="me/digits", trust_remote_code=True)\n'
    )
    assert "already is" in run_script("convert_pipeline.py", folder).stdout
    assert (folder / "README.md").read_text() == readme
    run_script("convert_pipeline.py", folder, "--to", "ldm")
    assert json.loads((folder / "model_index.json").read_text()) == before


def test_an_export_without_ldmpipeline(drawn, tmp_path):
    folder, images = drawn
    done = python(EXPORT, folder, tmp_path / "pipeline")
    assert done.returncode == 0, done.stderr[-2000:]
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LatentDDPMPipeline"]
    assert 'from_pretrained(".", custom_pipeline=".", trust' in (tmp_path / "pipeline" / "README.md").read_text()
    done = python(DRAW, tmp_path / "pipeline", tmp_path / "images.npy")
    assert done.stdout.strip() == "LatentDDPMPipeline", done.stderr[-2000:]
    assert np.abs(np.load(tmp_path / "images.npy") - images).max() < 1e-5


def test_what_cannot_be_converted_is_refused(drawn, tmp_path):
    assert stock_pipeline() is not None  # the installed diffusers has it; when this fails, read docs/publishing.md
    with pytest.raises(UserError, match="holds no latent diffusion pipeline"):
        convert_pipeline(tmp_path)
    shutil.copytree(drawn[0], tmp_path / "pipeline")
    index, unet = (tmp_path / "pipeline" / name for name in ("model_index.json", "unet/config.json"))
    whole = json.loads(index.read_text())
    index.write_text(json.dumps(whole | {"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="only LDMPipeline and LatentDDPMPipeline can be converted"):
        convert_pipeline(tmp_path / "pipeline")
    index.write_text(json.dumps(whole | {"_class_name": ["pipeline", "LatentDDPMPipeline"]}))
    unet.write_text(json.dumps(json.loads(unet.read_text()) | {"num_class_embeds": 11}))
    with pytest.raises(UserError, match="which LDMPipeline does not support"):
        convert_pipeline(tmp_path / "pipeline", to_own=False)
