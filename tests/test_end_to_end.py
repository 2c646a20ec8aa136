"""The two scripts as users run them: real processes, real files, real signals."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import (
    assert_same_tensors,
    checkpoint_tensors,
    command,
    launch,
    launch_and_stop,
    losses,
    read_metrics,
    run_script,
)
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DModel, VQModel
from PIL import Image
from preloaded import Script

from latent_ddpm.publishing.card import read_facts
from latent_ddpm.resizing import PYTORCH_RESIZES
from latent_ddpm.training.checkpoint import CheckpointFolder

GAN = {"disc_weight": 0.5, "disc_start": 4, "disc_adaptive_steps": 2, "disc_channels": 8, "disc_layers": 1}
OTHER_GAN = {**GAN, "disc_loss": "non_saturating", "disc_norm": "actnorm", "disc_ramp_steps": 8, "disc_r1_weight": 1.0,
             "disc_lecam_weight": 0.1, "optimizer": "muon"}  # fmt: skip


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Both stages, once, uninterrupted: the run that the others are compared with."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true"}
    text = launch("train_autoencoder.py", output_dir, max_train_steps=12, checkpointing_steps=4, validation_steps=6,
                  report_to="tensorboard", **flags, **GAN)  # fmt: skip
    text += launch("train_unet.py", output_dir, max_train_steps=12, checkpointing_steps=4, validation_steps=6, **flags)
    return output_dir, flags, text


def test_both_stages_leave_what_they_promise(trained, photos):
    output_dir, _, text = trained
    assert "46 training and 2 validation images" in text
    for stage in ("autoencoder", "unet"):
        assert (output_dir / f"train_{stage}.yaml").exists()
        assert sorted(losses(output_dir, stage)) == list(range(1, 13))
        for step in (6, 12):
            assert Image.open(output_dir / "samples" / f"{stage}-{step:08d}.png").size[0] > 16
        assert len(list((output_dir / "checkpoints").glob(f"{stage}-*"))) == 3
    last = [r for r in read_metrics(output_dir / "metrics.jsonl") if r["stage"] == "autoencoder"]
    seen = set().union(*last)
    assert {"reconstruction_loss", "commitment_loss", "codebook_usage", "perplexity", "validation_psnr",
            "generator_loss", "discriminator_loss", "adaptive_weight", "images_per_second"} <= seen  # fmt: skip
    held_out = losses(output_dir, "unet", "validation_loss")
    assert sorted(held_out) == [6, 12] and held_out[12] < held_out[6]
    assert any((output_dir / "logs").rglob("*tfevents*"))
    vqvae = VQModel.from_pretrained(output_dir / "autoencoder")
    assert vqvae.config.scaling_factor != 0.18215
    pipeline = DiffusionPipeline.from_pretrained(output_dir / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()


def test_latents_of_the_exported_autoencoder_are_normalized(trained, photos):
    output_dir, flags, _ = trained
    (meta_path,) = (output_dir / "latents").glob("*/meta.json")
    meta = json.loads(meta_path.read_text())
    scaling = VQModel.from_pretrained(output_dir / "autoencoder").config.scaling_factor
    assert meta["std"] * scaling == pytest.approx(1, abs=0.05)
    assert np.abs(np.array(meta["mean"]) * scaling).max() < 0.2  # stage 1 saw no mirrored versions
    assert meta["key"]["flip"] is True


def test_losses_fall(photos, tmp_path):
    flags = {"train_data_dir": photos, "resolution": 16, "learning_rate": 3e-3}
    launch("train_autoencoder.py", tmp_path, max_train_steps=60, **flags)
    launch("train_unet.py", tmp_path, max_train_steps=60, **flags)
    for stage, ratio in (("autoencoder", 0.75), ("unet", 0.65)):
        curve = list(losses(tmp_path, stage).values())
        assert np.mean(curve[-10:]) < ratio * np.mean(curve[:5]), stage
    # an epoch is six steps, so the last six lines hold the usage over a whole one
    assert max(list(losses(tmp_path, "autoencoder", "codebook_usage").values())[-6:]) > 0.85


@pytest.mark.parametrize("step", [3, 6])
def test_stage_1_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(trained, photos, tmp_path, step):
    output_dir, flags, _ = trained
    options = {"max_train_steps": 12, "checkpointing_steps": 4, "validation_steps": 6, **flags, **GAN}
    launch_and_stop("train_autoencoder.py", tmp_path, step, **options)
    launch("train_autoencoder.py", tmp_path, resume_from_checkpoint="latest", **options)
    assert_same_tensors(
        checkpoint_tensors(output_dir, "autoencoder", 12), checkpoint_tensors(tmp_path, "autoencoder", 12)
    )
    assert losses(output_dir, "autoencoder") == losses(tmp_path, "autoencoder")
    weights = "autoencoder/diffusion_pytorch_model.safetensors"
    assert (output_dir / weights).read_bytes() == (tmp_path / weights).read_bytes()


@pytest.mark.skipif(not PYTORCH_RESIZES, reason="PyTorch before 2.12 has no Lanczos filter")
def test_a_run_begun_before_pytorch_resized_goes_on_bit_for_bit(tmp_path):
    (tmp_path / "noise").mkdir()
    for i in range(48):
        pixels = np.random.default_rng(i).integers(0, 256, (27, 38, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "noise" / f"{i}.png")
    flags = {"train_data_dir": tmp_path / "noise", "resolution": 16, "max_train_steps": 6, "checkpointing_steps": 3}
    launch("train_autoencoder.py", tmp_path / "new", **flags)
    launch("train_autoencoder.py", tmp_path / "whole", image_resize="pillow", **flags)
    launch("train_autoencoder.py", tmp_path / "old", image_resize="pillow", **flags | {"max_train_steps": 3})
    saved = tmp_path / "old" / "train_autoencoder.yaml"
    saved.write_text(saved.read_text().replace("  image_resize: pillow\n", ""))  # as it was written before the key was
    launch("train_autoencoder.py", tmp_path / "old", **flags)
    assert "image_resize: pillow" in saved.read_text()
    whole, old = (checkpoint_tensors(tmp_path / name, "autoencoder", 6) for name in ("whole", "old"))
    assert_same_tensors(whole, old)
    assert losses(tmp_path / "whole", "autoencoder") == losses(tmp_path / "old", "autoencoder")
    assert losses(tmp_path / "whole", "autoencoder") != losses(tmp_path / "new", "autoencoder")
    assert "image_resize: pytorch" in (tmp_path / "new" / "train_autoencoder.yaml").read_text()


@pytest.mark.parametrize(
    "quantizer",
    [
        {"quantizer": "simvq", "gradient_estimator": "rotation", "optimizer": "muon"},
        {"quantizer": "fsq", "fsq_levels": "[8,5,5]", "num_vq_embeddings": 200},
        {"quantizer": "ema", "codebook_start": 4, "latent_channels": 3},  # where the killed run goes on
        {"quantizer": "simvq", "codebook_start": 3},
    ],
)
def test_other_quantizers_train_resume_and_export(photos, tmp_path, quantizer):
    flags = {"train_data_dir": photos, "resolution": 16, "checkpointing_steps": 2, **quantizer}
    launch("train_autoencoder.py", tmp_path / "whole", max_train_steps=8, **flags)
    launch_and_stop("train_autoencoder.py", tmp_path / "killed", 5, max_train_steps=8, **flags)
    launch("train_autoencoder.py", tmp_path / "killed", max_train_steps=8, resume_from_checkpoint="latest", **flags)
    whole, killed = (checkpoint_tensors(tmp_path / name, "autoencoder", 8) for name in ("whole", "killed"))
    assert_same_tensors(whole, killed)
    table = VQModel.from_pretrained(tmp_path / "whole" / "autoencoder").quantize.embedding.weight
    assert table.shape == (quantizer.get("num_vq_embeddings", 32), 3) and table.isfinite().all()


@pytest.fixture(scope="module")
def trained_kl(photos, tmp_path_factory):
    """Both stages with a KL-VAE, uninterrupted, the discriminator in play and accumulation on."""
    output_dir = tmp_path_factory.mktemp("kl") / "out"
    flags = {"train_data_dir": photos, "resolution": 16, "gradient_accumulation_steps": 2, "train_batch_size": 4}
    kl = {"quantizer": "kl", "max_train_steps": 8, "checkpointing_steps": 2, "validation_steps": 4, **flags, **GAN}
    launch("train_autoencoder.py", output_dir, **kl)
    launch("train_unet.py", output_dir, max_train_steps=3, **flags)
    return output_dir, flags, kl


def test_kl_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(trained_kl, tmp_path):
    output_dir, _, kl = trained_kl
    launch_and_stop("train_autoencoder.py", tmp_path, 5, **kl)
    launch("train_autoencoder.py", tmp_path, resume_from_checkpoint="latest", **kl)
    whole, killed = (checkpoint_tensors(folder, "autoencoder", 8) for folder in (output_dir, tmp_path))
    assert_same_tensors(whole, killed)
    for key in ("loss", "kl_loss", "posterior_std"):
        assert losses(output_dir, "autoencoder", key) == losses(tmp_path, "autoencoder", key)
    weights = "autoencoder/diffusion_pytorch_model.safetensors"
    assert (output_dir / weights).read_bytes() == (tmp_path / weights).read_bytes()


NUMBERS = """
import json, sys
import train_autoencoder
from latent_ddpm.autoencoder import posterior
seen, normal = [], posterior.normal
def noting(seed, stream, numbers, shape):
    seen.extend(numbers.tolist())
    return normal(seed, stream, numbers, shape)
posterior.normal = noting
train_autoencoder.main(sys.argv[1:])
print(json.dumps(seen))
"""


def test_every_example_of_kl_has_noise_of_its_own(trained_kl, tmp_path):
    """Also over the end of an epoch, where the images come again."""
    _, _, kl = trained_kl
    words = command("train_autoencoder.py", tmp_path, **kl)[2:]
    done = Script(["-c", NUMBERS, *words]).finish()
    assert json.loads(done.stdout.splitlines()[-1]) == list(range(64))  # 8 steps of 2 micro-batches of 4; 46 images


@pytest.mark.long
def test_two_processes_train_the_kl_vae_of_one(trained_kl, tmp_path):
    output_dir, _, kl = trained_kl
    launch("train_autoencoder.py", tmp_path, processes=2, **{**kl, "train_batch_size": 2})
    for key in ("loss", "kl_loss", "posterior_std"):
        one, two = (losses(folder, "autoencoder", key) for folder in (output_dir, tmp_path))
        assert len(one) == 8 and max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4


def test_kl_leaves_what_it_promises(trained_kl, tmp_path):
    output_dir, _, _ = trained_kl
    seen = set().union(*(r for r in read_metrics(output_dir / "metrics.jsonl") if r["stage"] == "autoencoder"))
    assert {"kl_loss", "posterior_std", "validation_psnr"} <= seen
    assert not [key for key in seen if any(word in key for word in ("codebook", "perplexity", "commitment"))]
    vae = AutoencoderKL.from_pretrained(output_dir / "autoencoder")
    (meta,) = (output_dir / "latents").glob("*/meta.json")
    assert json.loads(meta.read_text())["std"] * vae.config.scaling_factor == pytest.approx(1, abs=0.05)
    pipeline = DiffusionPipeline.from_pretrained(output_dir / "pipeline")
    assert type(pipeline).__name__ == "LDMPipeline" and isinstance(pipeline.vqvae, AutoencoderKL)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
    config = ["--config", output_dir / "train_unet.yaml"]
    assert "46 latents of 3x8x8" in run_script("cache_latents.py", *config).stderr
    run_script("evaluate.py", "autoencoder", *config, "--json", tmp_path / "e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["psnr"] > 3 and "ssim" in result
    assert not {"codebook_usage", "perplexity", "bits_per_pixel"} & set(result)
    assert Image.open(tmp_path / "e.png").size[0] > 500
    words = ["--num_images", 2, "--num_inference_steps", 2, "--output_dir", tmp_path]
    run_script("sample.py", output_dir / "pipeline", *words)
    assert (tmp_path / "grid.png").exists()


def test_stage_2_on_somebodys_stock_autoencoder_kl(photos, tmp_path):
    """The shape of sd-vae-ft-mse, in small, with its scaling_factor."""
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
    ).save_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    flags = {"train_data_dir": photos, "resolution": 16, "max_train_steps": 2, "autoencoder": tmp_path / "vae"}
    launch("train_unet.py", tmp_path / "out", latent_normalization="overall", **flags)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    (meta,) = (tmp_path / "out" / "latents").glob("*/meta.json")
    assert pipeline.vqvae.config.scaling_factor == pytest.approx(1 / json.loads(meta.read_text())["std"])
    assert pipeline.unet.config.in_channels == 4
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stage_2_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(trained, tmp_path, signum):
    output_dir, flags, _ = trained
    options = {"max_train_steps": 12, "checkpointing_steps": 4, "validation_steps": 6, **flags}
    options["autoencoder"] = output_dir / "autoencoder"
    status = launch_and_stop("train_unet.py", tmp_path, 6, signum, **options)
    saved = sorted(int(p.name[-8:]) for p in (tmp_path / "checkpoints").glob("unet-*"))
    if signum == signal.SIGKILL:
        assert status == -signum and saved == [4]
    else:  # saved where it was, and said so to the shell
        assert status == 128 + signum and saved[-1] >= 6
    launch("train_unet.py", tmp_path, resume_from_checkpoint="latest", **options)
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 12), checkpoint_tensors(tmp_path, "unet", 12))
    assert losses(output_dir, "unet") == losses(tmp_path, "unet")
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (output_dir / weights).read_bytes() == (tmp_path / weights).read_bytes()
    snapshots = sorted(path.name for path in (output_dir / "ema").glob("*.safetensors"))
    assert len(snapshots) == 2 * 12 and snapshots[0] == "ema-00000001-0.05.safetensors"
    for name in snapshots:
        assert (output_dir / "ema" / name).read_bytes() == (tmp_path / "ema" / name).read_bytes()


@pytest.mark.parametrize(
    ("processes", "signum", "group"),
    [(2, signal.SIGINT, True), pytest.param(1, signal.SIGTERM, False, marks=pytest.mark.long)],
    ids=["Ctrl-C on two processes", "SIGTERM to the launcher alone"],
)
def test_accelerates_processes_save_and_leave(trained, tmp_path, processes, signum, group):
    output_dir, flags, _ = trained
    options = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": 100_000, **flags}
    options["autoencoder"] = output_dir / "autoencoder"
    assert launch_and_stop("train_unet.py", tmp_path, 5, signum, processes, group, **options) != 0
    deadline = time.monotonic() + 60
    while not (saved := list((tmp_path / "checkpoints").glob("unet-*"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    (checkpoint,) = saved
    step = int(checkpoint.name[-8:])
    options["max_train_steps"] = step + 2
    launch("train_unet.py", tmp_path, processes=processes, resume_from_checkpoint="latest", **options)
    assert sorted(losses(tmp_path, "unet")) == list(range(1, step + 3))


def test_a_checkpoint_whose_adversarial_weight_was_never_held_goes_on_without_holding_it(photos, tmp_path):
    flags = {"train_data_dir": photos, "resolution": 16, "checkpointing_steps": 8, **GAN}
    launch("train_autoencoder.py", tmp_path, max_train_steps=8, **flags)
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", "autoencoder", 2)
    state = checkpoints.resume("latest")
    del state["held_weight"]
    checkpoints.save(8, state)
    launch("train_autoencoder.py", tmp_path, max_train_steps=12, resume_from_checkpoint="latest", **flags)
    weights = losses(tmp_path, "autoencoder", "adaptive_weight")
    held, measured = ({weights[step] for step in steps} for steps in (range(7, 9), range(9, 13)))
    assert len(held) == 1 and len(measured) == 4 and min(measured) > 0


@pytest.mark.long
def test_codes_enter_two_processes_as_they_enter_one(photos, tmp_path):
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true", "max_train_steps": 8}
    flags |= {"codebook_start": 4, "validation_steps": 4}
    for name, processes, batch in (("one", None, 8), ("two", 2, 4)):
        text = launch("train_autoencoder.py", tmp_path / name, processes=processes, train_batch_size=batch, **flags)
        assert text.count("The codebook starts now") == 1
    one, two = (losses(tmp_path / name, "autoencoder") for name in ("one", "two"))
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-3
    records = read_metrics(tmp_path / "one" / "metrics.jsonl")
    text = launch("train_autoencoder.py", tmp_path / "late", expect=2, **{**flags, "codebook_start": 8})
    assert "codebook_start 8 must be below max_train_steps 8" in text
    usage = {r["step"] for r in records if "validation_codebook_usage" in r}
    assert usage == {8} and {r["step"] for r in records if "validation_psnr" in r} == {4, 8}


def test_the_discriminators_optimizer_has_moments_of_its_own(trained, photos, tmp_path):
    output_dir, flags, _ = trained
    others = {**GAN, "disc_adam_beta1": 0.5, "disc_adam_beta2": 0.9}
    launch("train_autoencoder.py", tmp_path, max_train_steps=8, **flags, **others)
    for folder, expected in ((output_dir, (0.0, 0.99)), (tmp_path, (0.5, 0.9))):
        state = CheckpointFolder(folder / "checkpoints", "autoencoder", 9).resume("latest")
        assert tuple(state["disc_optimizer"]["param_groups"][0]["betas"]) == expected
        assert tuple(state["optimizer"]["param_groups"][0]["betas"]) == (0.9, 0.99)


@pytest.mark.parametrize(
    "gan",
    [
        pytest.param(GAN, id="hinge, spectral"),
        pytest.param(OTHER_GAN, id="non-saturating, actnorm, R1, LeCam", marks=pytest.mark.long),
    ],
)
def test_two_processes_see_what_one_with_the_joint_batch_sees(photos, tmp_path, gan):
    """Same codebook, same curves, with the discriminator in play and accumulation on."""
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true", "max_train_steps": 20}
    for name, processes, batch in (("one", None, 8), ("two", 2, 4)):
        launch("train_autoencoder.py", tmp_path / name, processes=processes, train_batch_size=batch, **flags, **gan)
    one, two = (losses(tmp_path / name, "autoencoder") for name in ("one", "two"))
    assert len(one) == 20
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4
    a, b = (checkpoint_tensors(tmp_path / name, "autoencoder", 20) for name in ("one", "two"))
    assert torch.allclose(a["model/quantizer.codebook"], b["model/quantizer.codebook"], atol=1e-3)
    autoencoder = tmp_path / "one" / "autoencoder"
    for name, processes, batch in (("one", None, 8), ("two", 2, 4)):
        launch("train_unet.py", tmp_path / name, processes=processes, train_batch_size=batch, autoencoder=autoencoder,
               gradient_accumulation_steps=2, unet_dropout=0, **flags)  # fmt: skip
    one, two = (losses(tmp_path / name, "unet") for name in ("one", "two"))
    assert len(one) == 20
    assert max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4


def test_a_folder_of_ones_own_with_three_bad_files(photos, tmp_path):
    folder = tmp_path / "mine"
    (folder / "a" / "deep").mkdir(parents=True)
    (folder / "b").mkdir()
    rng = np.random.default_rng(0)
    for i, mode in enumerate(["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"] * 4):
        size = (int(rng.integers(12, 40)), int(rng.integers(12, 40)))
        image = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).convert(mode)
        image.save(folder / ("a/deep" if i % 2 else "b") / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    Image.fromarray(rng.integers(0, 65535, (20, 20), dtype=np.uint16)).save(folder / "a" / "deep.png")
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "b" / "cut.jpg")
    os.truncate(folder / "b" / "cut.jpg", (folder / "b" / "cut.jpg").stat().st_size // 2)
    (folder / "a" / "text.png").write_text("this is not a picture")
    (folder / "a" / "deep" / "empty.jpg").write_bytes(b"")
    flags = {"train_data_dir": folder, "resolution": 16, "max_train_steps": 3, "dataloader_num_workers": 2}
    for gib in (4, 0):  # decoded once and kept; decoded by workers
        out = tmp_path / f"out{gib}"
        flags["image_cache_gib"] = gib
        launch("train_autoencoder.py", out, max_bad_image_share=0.2, **flags)
        launch("train_unet.py", out, max_bad_image_share=0.2, **flags)
        listed = {json.loads(line)["name"] for line in (out / "bad_images.jsonl").read_text().splitlines()}
        assert listed == {"b/cut.jpg", "a/text.png", "a/deep/empty.jpg"}
    text = launch("train_autoencoder.py", tmp_path / "strict", expect=2, max_bad_image_share=0.05, **flags)
    assert "max_bad_image_share" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_data_dir": "absent_folder"}, "train_data_dir absent_folder is not a folder"),
        ({"train_data_dir": "configs"}, "configs"),
        ({"dataset_name": "embedded:mnist", "resolution": 33}, "resolution 33 is not divisible by 2"),
        ({"dataset_name": "embedded:mnist", "norm_num_groups": 3}, "norm_num_groups 3 does not divide"),
        ({"dataset_name": "embedded:mnist", "lerning_rate": 1}, "Did you mean 'learning_rate'"),
        ({"dataset_name": "embedded:mnist", "mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"dataset_name": "nobody/nothing"}, "nobody/nothing"),
    ],
)
def test_bad_input_gets_one_sentence(flags, message, tmp_path):
    if flags.get("mixed_precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("fp16 is possible here")
    text = launch("train_autoencoder.py", tmp_path / "out", expect=2, max_train_steps=1, **flags)
    (sentence,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert message in sentence
    assert "Traceback" not in text
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_folder_that_holds_another_run_is_refused(trained):
    output_dir, flags, _ = trained
    text = launch("train_unet.py", output_dir, expect=2, max_train_steps=12, learning_rate=0.5, **flags)
    assert "holds another run (learning_rate was 0.0002, is 0.5)" in text
    text = launch("train_unet.py", output_dir, expect=2, max_train_steps=12, resume_from_checkpoint="null", **flags)
    assert "--resume_from_checkpoint latest" in text
    text = launch("train_unet.py", output_dir.parent / "other", expect=2, **flags)
    assert "Run train_autoencoder.py" in text
    other = {"autoencoder": output_dir / "autoencoder", **flags}
    for stage, more, reason in (
        ("unet", {"unet_block_out_channels": "[16,48]"}, "size mismatch for "),
        ("unet", {"optimizer": "muon"}, "different number of parameter groups"),
        ("autoencoder", {}, "is of another network or optimizer"),
    ):
        checkpoint = output_dir / "checkpoints" / f"{stage}-00000012"
        text = launch("train_unet.py", output_dir.parent / "other", expect=2, resume_from_checkpoint=checkpoint,
                      **other, **more)  # fmt: skip
        assert reason in text and f"{checkpoint} is of another network" in text and "Traceback" not in text
    text = launch("train_unet.py", output_dir.parent / "other", expect=2, autoencoder=output_dir / "autoencoder",
                  unet_block_out_channels="[8,8,8,8,8]", unet_attention_levels="[]", **flags)  # fmt: skip
    assert "latents of 8x8 do not fit the U-Net" in text


@pytest.mark.parametrize("stage", ["autoencoder", "unet"])
@pytest.mark.long
def test_compiled_and_checkpointed_it_is_the_same_run(trained, photos, tmp_path, stage):
    """Through torch.compile (its eager backend: no compiler needed), and with activations computed twice."""
    output_dir, flags, _ = trained
    options = {"max_train_steps": 6, "checkpointing_steps": 6, "validation_steps": 6, **flags}
    more = {**GAN, "report_to": "tensorboard"} if stage == "autoencoder" else {"gradient_checkpointing": "true"}
    if stage == "unet":
        options["autoencoder"] = output_dir / "autoencoder"
    launch(f"train_{stage}.py", tmp_path, processes=1, launcher=True, dynamo="eager", **options, **more)
    plain = losses(output_dir, stage)
    for step, loss in losses(tmp_path, stage).items():
        assert loss == pytest.approx(plain[step], rel=1e-4)
    names = set(checkpoint_tensors(tmp_path, stage, 6))
    assert names == set(checkpoint_tensors(output_dir, stage, 8))  # so a plain run can go on from it


def test_the_other_commands(trained, tmp_path):
    output_dir, flags, _ = trained
    config = ["--config", str(output_dir / "train_unet.yaml")]
    (meta,) = (output_dir / "latents").glob("*/meta.json")
    written = meta.stat().st_mtime_ns
    assert "46 latents of 3x8x8" in run_script("cache_latents.py", *config).stderr
    assert meta.stat().st_mtime_ns == written
    run_script("evaluate.py", "autoencoder", *config, "--feature_extractor", "efficientnet-lite0",
           "--json", tmp_path / "e.json")  # fmt: skip
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["images"] == 2 and result["psnr"] > 5 and 0 < result["codebook_usage"] <= 1 and "ssim" in result
    deviations = result["table_deviations"]
    assert deviations == sorted(deviations, reverse=True) and deviations[0] > 0.1
    assert result["bits_per_pixel"] == pytest.approx(5 * 64 / 256) and result["peak_memory_gib"] > 0.1  # 32 codes
    assert result["rfd"] > 0 and result["rfd_feature_extractor"] == "efficientnet-lite0"
    assert Image.open(tmp_path / "e.png").size[0] > 500
    run_script(
        "sample.py", output_dir / "pipeline", "--num_images", 4, "--num_inference_steps", 2, "--output_dir", tmp_path
    )
    assert (tmp_path / "grid.png").exists() and len(list(tmp_path.glob("0000*.png"))) == 4

    # the last step is one of an average's snapshot too
    assert all(speed > 0 for speed in losses(output_dir, "unet", "images_per_second").values())
    assert read_facts(output_dir).training["unet"]["hours"] < 1

    # an average of another width, made afterwards, and one that was tracked: that is the pipeline's own
    assert "width 0.1 at step" in run_script("reconstruct_ema.py", *config, "--sigma_rels", 0.1).stdout
    text = run_script("reconstruct_ema.py", *config, "--sigma_rels", 0.2, "--num_images", 6,
                  "--evaluation_words", "--steps 2 --schedulers ddim").stdout  # fmt: skip
    assert "width 0.2 at step" in text and "width 0.2: Frechet distance" in text
    measured = json.loads((output_dir / "ema" / "ema.json").read_text())["results"]
    assert list(measured) == ["0.2"] and measured["0.2"]["samples"] == 6
    assert Image.open(output_dir / "ema" / "ema.png").size[0] > 300
    unets = [
        UNet2DModel.from_pretrained(folder / "unet").state_dict()
        for folder in (output_dir / "pipeline", *(output_dir / "ema" / f"pipeline-{width}" for width in (0.1, 0.2)))
    ]
    distances = [
        sum(float((a - b).square().sum()) for a, b in zip(unets[0].values(), unet.values(), strict=True)) ** 0.5
        for unet in unets[1:]
    ]
    assert distances[0] < 0.1 * distances[1]
    words = [*config, "--check", 0.05, "--json", tmp_path / "check.json"]
    assert "width 0.05: relative error" in run_script("reconstruct_ema.py", *words).stdout
    assert 0 < json.loads((tmp_path / "check.json").read_text())["relative_error"] < 1
    assert "a width must be above 0" in run_script("reconstruct_ema.py", *config, "--sigma_rels", 0.3, expect=2).stderr
