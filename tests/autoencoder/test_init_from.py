"""Stage 1 from pretrained weights: all of them, or the decoder alone."""

import dataclasses
import json
import shutil

import diffusers
import pytest
import torch
from conftest import (
    assert_same_tensors,
    checkpoint_tensors,
    fill_zeros,
    launch,
    launch_and_stop,
    read_metrics,
    run_script,
)
from small_autoencoders import TWO, small_autoencoder

from latent_ddpm.autoencoder.start import load_start, take_weights, with_architecture
from latent_ddpm.autoencoder.stock import latents_of, load_autoencoder, to_stock
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.errors import UserError
from pipeline_latent_ddpm import LatentDDPMPipeline

VQ = {**TWO, "num_vq_embeddings": 16, "latent_channels": 3}
STEPS = {"max_train_steps": 8, "checkpointing_steps": 4, "validation_steps": 8}
SIZES = {"block_out_channels": None, "norm_num_groups": None, "num_vq_embeddings": None}  # they come with the weights


def make(kind, folder, **more):
    torch.manual_seed(3)
    stock = fill_zeros(getattr(diffusers, kind)(**(VQ if kind == "VQModel" else TWO), **more))
    if kind == "VQModel":
        torch.nn.init.normal_(stock.quantize.embedding.weight)
    stock.save_pretrained(folder)
    return load_autoencoder(folder)


def started(folder, **keys):
    config = AutoencoderConfig(dataset_name="x", resolution=16, init_from=str(folder), **keys)
    start = load_start(config)
    config = with_architecture(config, start)
    model = Autoencoder(config).eval()
    take_weights(model, start, config.freeze_encoder)
    return config, start, model


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(4, 3, 16, 16) * 2 - 1


@pytest.mark.parametrize("more", [{}, {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
                                  {"mid_block_add_attention": False}, {"layers_per_block": 2}])  # fmt: skip
@torch.no_grad()
def test_a_kl_vae_starts_as_the_pretrained_one(more, images, tmp_path):
    stock = make("AutoencoderKL", tmp_path, **more)
    config, _, model = started(tmp_path, quantizer="fsq", block_out_channels=[4, 4], norm_num_groups=2)
    assert config.quantizer == "kl" and config.block_out_channels == [8, 16]
    assert torch.allclose(model.encode(images), latents_of(stock, images), atol=1e-5)
    assert torch.allclose(model(images).reconstruction, stock(images).sample, atol=1e-5)
    again = to_stock(model, config)
    assert torch.allclose(again(images).sample, stock(images).sample, atol=1e-5)


@torch.no_grad()
def test_a_vqmodel_starts_as_the_pretrained_one(images, tmp_path):
    stock = make("VQModel", tmp_path)
    config, _, model = started(tmp_path, num_vq_embeddings=4)
    assert config.quantizer == "ema" and config.num_vq_embeddings == 16
    assert torch.allclose(model(images).reconstruction, stock(images).sample, atol=1e-5)
    model.quantizer.count_uses(model.encode(images))
    assert torch.allclose(model.quantizer.mean_sum / model.quantizer.mean_count[:, None], model.quantizer.table())
    used = torch.bincount(model(images).quantized.indices.flatten(), minlength=16)
    assert torch.equal(model.quantizer.mean_count[used > 8], used[used > 8].float())  # 4 * 64 / 16 / 2
    assert (model.quantizer.mean_count >= 8).all()


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 6])
@torch.no_grad()
def test_other_image_channels(wanted, images, tmp_path):
    stock = make("AutoencoderKL", tmp_path)
    config, start, _ = started(tmp_path)
    model = Autoencoder(dataclasses.replace(config, image_channels=wanted)).eval()
    take_weights(model, start, freeze=False)
    gray = images.mean(1, keepdim=True)
    made = model(gray.expand(-1, wanted, -1, -1)).reconstruction
    assert made.shape[1] == wanted
    if wanted < 3:  # gray images look alike
        same = stock(gray.expand(-1, 3, -1, -1)).sample.mean(1, keepdim=True)
        assert torch.allclose(made, same.expand_as(made), atol=1e-4)
    else:  # the first three as before, whatever the others hold
        extra = torch.rand(4, wanted - 3, 16, 16)
        made = model(torch.cat((images, extra), 1)).reconstruction
        assert torch.allclose(made[:, :3], stock(images).sample, atol=1e-5)


def test_refusals(tmp_path):
    def refused(match, **keys):
        with pytest.raises(UserError, match=match):
            started(tmp_path, **keys)

    refused("there is no autoencoder in")
    small_autoencoder("tiny").save_pretrained(tmp_path)
    refused("is an AutoencoderTiny. Stage 1 starts from AutoencoderKL and VQModel")
    shutil.rmtree(tmp_path)
    small_autoencoder("vq with spatial normalization").save_pretrained(tmp_path)
    refused("has no AttnUpDecoderBlock2D")
    small_autoencoder("vq").save_pretrained(tmp_path)
    refused("has no codes of 3 dimensions for 4 latent channels")
    make("AutoencoderKL", tmp_path)
    refused(
        "is for images of 3 channels, image_channels is 1; with freeze_encoder", image_channels=1, freeze_encoder=True
    )
    with pytest.raises(UserError, match="freeze_encoder needs a pretrained autoencoder: set init_from"):
        AutoencoderConfig(dataset_name="x", freeze_encoder=True).validate()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_the_decoder_alone(kind, photos, tmp_path):
    """The latents stay bit for bit, the images get better, and a killed run goes on to the same end."""
    base = make(kind, tmp_path / "base")
    flags = {"train_data_dir": photos, "resolution": 16, "init_from": tmp_path / "base", "freeze_encoder": "true",
             "learning_rate": 3e-3, **SIZES, **STEPS, "max_train_steps": 40, "validation_steps": 1}  # fmt: skip
    text = launch("train_autoencoder.py", tmp_path / "a", **flags)
    assert "encoder and decoder are taken; the encoder stays as it is" in text
    tuned = load_autoencoder(tmp_path / "a" / "autoencoder")
    torch.manual_seed(1)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    assert torch.equal(latents_of(tuned, images), latents_of(base, images))
    assert tuned.config.scaling_factor == base.config.scaling_factor
    trained = checkpoint_tensors(tmp_path / "a", "autoencoder", 40)  # the decoder was trained on these latents
    frozen = {name: value for name, value in base.state_dict().items() if name.startswith(("encoder.", "quant_conv."))}
    assert frozen and all(torch.equal(trained[f"model/{name}"], value) for name, value in frozen.items())
    if kind == "VQModel":
        assert torch.equal(tuned.quantize.embedding.weight, base.quantize.embedding.weight)
        assert torch.equal(trained["model/quantizer.codebook"], base.quantize.embedding.weight)
    psnr = [
        record["validation_psnr"]
        for record in read_metrics(tmp_path / "a" / "metrics.jsonl")
        if "validation_psnr" in record
    ]
    assert psnr[-1] > psnr[0] + 1
    launch_and_stop("train_autoencoder.py", tmp_path / "b", 22, **flags)
    launch("train_autoencoder.py", tmp_path / "b", **flags)
    assert_same_tensors(*(checkpoint_tensors(tmp_path / run, "autoencoder", 40) for run in "ab"))
    # the encoder belongs to the run
    make(kind, tmp_path / "base", layers_per_block=1, in_channels=3)
    other = small_autoencoder("kl", seed=9) if kind == "AutoencoderKL" else make(kind, tmp_path / "c")
    other.save_pretrained(tmp_path / "base")
    more = {**flags, "max_train_steps": 44}
    if kind == "AutoencoderKL":
        text = launch("train_autoencoder.py", tmp_path / "b", expect=2, **more)
        assert "was trained with the encoder of other weights" in text


def test_a_whole_autoencoder_goes_on_in_one_and_two_processes(photos, tmp_path):
    make("VQModel", tmp_path / "base")
    flags = {"train_data_dir": photos, "resolution": 16, "init_from": tmp_path / "base", **SIZES, **STEPS}
    text = launch("train_autoencoder.py", tmp_path / "a", **flags, train_batch_size=8)
    assert "the codes, encoder and decoder are taken" in text
    launch("train_autoencoder.py", tmp_path / "b", processes=2, **flags, train_batch_size=4)
    one, two = (checkpoint_tensors(tmp_path / run, "autoencoder", 8) for run in "ab")
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one if key.startswith("model/"))
    saved = (tmp_path / "a" / "train_autoencoder.yaml").read_text()
    assert "init_from" in saved and "num_vq_embeddings: 16" in saved


def test_gray_images_from_a_colour_autoencoder(photos, tmp_path):
    make("AutoencoderKL", tmp_path / "base")
    flags = {"train_data_dir": photos, "resolution": 16, "image_channels": 1, "init_from": tmp_path / "base"}
    text = launch("train_autoencoder.py", tmp_path / "a", **flags, **SIZES, **STEPS)
    assert "adapted from 3 to 1 image channels" in text
    assert load_autoencoder(tmp_path / "a" / "autoencoder").config.in_channels == 1


def test_a_new_decoder_in_an_old_pipeline(photos, tmp_path):
    """Stage 1, stage 2, then the decoder again: the pipeline takes it, and its U-Net still draws."""
    data = {"train_data_dir": photos, "resolution": 16}
    launch("train_autoencoder.py", tmp_path / "a", quantizer="kl", **data, **STEPS)
    launch("train_unet.py", tmp_path / "a", **data, **STEPS)
    tune = {"freeze_encoder": "true", "learning_rate": 3e-3, **data, **SIZES, **STEPS}
    for number, source in enumerate((tmp_path / "a" / "pipeline", tmp_path / "a" / "autoencoder")):
        new = tmp_path / f"new{number}"
        launch("train_autoencoder.py", new, init_from=source, **tune)
        pipeline = tmp_path / f"pipeline{number}"
        shutil.copytree(tmp_path / "a" / "pipeline", pipeline)
        done = run_script("convert_pipeline.py", str(pipeline), "--decoder", str(new / "autoencoder"))
        assert "has the new decoder" in done.stdout
        before, after = (LatentDDPMPipeline.from_pretrained(str(p)) for p in (tmp_path / "a" / "pipeline", pipeline))
        torch.manual_seed(1)
        images = torch.rand(4, 3, 16, 16) * 2 - 1
        assert torch.allclose(after.encode(images), before.encode(images), atol=1e-5)
        latents = before.encode(images)
        trained = load_autoencoder(new / "autoencoder")
        with torch.no_grad():
            wanted = trained.decode(latents_of(trained, images)).sample.clamp(-1, 1)
        assert torch.allclose(after.decode(latents), wanted, atol=1e-4)
        assert not torch.allclose(after.decode(latents), before.decode(latents), atol=1e-3)
        assert json.loads((pipeline / "model_index.json").read_text())["_class_name"] == "LDMPipeline"
        after(batch_size=2, num_inference_steps=2, output_type="pt")
    launch("train_autoencoder.py", tmp_path / "z", quantizer="kl", seed=5, **{**data, **STEPS})
    done = run_script("convert_pipeline.py", str(pipeline), "--decoder", str(tmp_path / "z" / "autoencoder"), expect=2)
    assert "has another encoder" in done.stderr
