"""The chapters of stage 2 as users run them: guidance in the weights, then few steps; killed, resumed, changed."""

import json
import signal

import pytest
import torch
from conftest import assert_same_tensors, checkpoint_tensors, launch, launch_and_stop, launch_cut, losses
from diffusers import DiffusionPipeline

STEPS = {"max_train_steps": 8, "self_guidance_steps": 6, "few_step_training_steps": 6}
CHAPTERS = {"unet": 8, "self_guidance": 6, "few_steps": 6}
FLAGS = {"resolution": 16, "random_flip": "true", "self_guidance_scale": 2.0, "ema_snapshots": 4, **STEPS}
FLAGS |= {"few_step_counts": "[1,4]", "checkpointing_steps": 2, "validation_steps": 6}
WEIGHTS = [f"{folder}/unet/diffusion_pytorch_model.safetensors" for folder in ("pipeline", "pipeline-few-steps")]


@pytest.fixture(scope="module")
def chapters(photos, tmp_path_factory):
    """All chapters, once, uninterrupted: the run that the others are compared with."""
    output_dir = tmp_path_factory.mktemp("chapters") / "out"
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true"}
    launch("train_autoencoder.py", output_dir, max_train_steps=4, checkpointing_steps=4, validation_steps=4, **flags)
    options = {**FLAGS, "train_data_dir": photos, "autoencoder": output_dir / "autoencoder"}
    return output_dir, options, launch("train_unet.py", output_dir, **options)


def noted(output_dir):
    return json.loads((output_dir / "run.json").read_text())


def test_the_chapters_leave_two_stock_pipelines(chapters):
    output_dir, _, text = chapters
    assert "scale 2 away from the average after 2 steps" in text
    for stage, steps in CHAPTERS.items():
        assert sorted(losses(output_dir, stage)) == list(range(1, steps + 1))
        assert noted(output_dir)[stage]["finished_at"] == steps
        assert (output_dir / "samples" / f"{stage}-{6:08d}.png").exists()
    assert noted(output_dir)["self_guidance"]["scale"] == 2.0 and noted(output_dir)["few_steps"]["counts"] == [1, 4]
    images = []
    for folder, steps in (("pipeline", 3), ("pipeline-few-steps", 1), ("pipeline-few-steps", 4)):
        stock = DiffusionPipeline.from_pretrained(output_dir / folder)
        assert type(stock).__name__ == "LDMPipeline"
        stock.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(stock(generator=generator, num_inference_steps=steps, output_type="np").images)
    assert all(image.shape == (1, 16, 16, 3) for image in images)
    first, second = ((output_dir / weights).read_bytes() for weights in WEIGHTS)
    assert first != second


@pytest.mark.parametrize(
    ("stage", "signum"),
    [
        ("self_guidance", signal.SIGKILL),
        ("few_steps", signal.SIGKILL),
        pytest.param("few_steps", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_chapter_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_one(chapters, tmp_path, stage, signum):
    output_dir, options, _ = chapters
    status = launch_and_stop("train_unet.py", tmp_path, 3, signum, stage=stage, **options)
    assert status == (-signum if signum == signal.SIGKILL else 128 + signum)
    text = launch("train_unet.py", tmp_path, **options)
    assert "resumed from step 8" in text and "all 8 steps are done" not in text
    for name, steps in CHAPTERS.items():
        assert_same_tensors(checkpoint_tensors(output_dir, name, steps), checkpoint_tensors(tmp_path, name, steps))
        assert losses(output_dir, name) == losses(tmp_path, name)
    for weights in WEIGHTS:
        assert (output_dir / weights).read_bytes() == (tmp_path / weights).read_bytes()
    assert "all 8 steps are done" in launch("train_unet.py", tmp_path, **options)


def test_four_steps_without_a_single_one_killed_and_resumed_are_the_uninterrupted_ones(chapters, tmp_path):
    options = {**chapters[1], "few_step_counts": "[4]", "self_guidance_steps": 0, "max_train_steps": 4}
    launch("train_unet.py", tmp_path / "whole", **options)
    launch_and_stop("train_unet.py", tmp_path / "killed", 3, stage="few_steps", **options)
    launch("train_unet.py", tmp_path / "killed", **options)
    whole, killed = (checkpoint_tensors(tmp_path / name, "few_steps", 6) for name in ("whole", "killed"))
    assert_same_tensors(whole, killed)
    assert not any(name.startswith("critic") for name in whole)
    assert losses(tmp_path / "whole", "few_steps") == losses(tmp_path / "killed", "few_steps")


def test_two_processes_learn_what_one_learns(chapters, tmp_path):
    output_dir, options, _ = chapters
    options = {
        **options,
        "unet_dropout": 0,
        "few_step_training_steps": 4,
        "max_train_steps": 4,
        "self_guidance_steps": 4,
    }
    for name, processes, batch in (("one", None, 8), ("two", 2, 4)):
        launch("train_unet.py", tmp_path / name, processes=processes, **{**options, "train_batch_size": batch})
    for stage in CHAPTERS:
        one, two = (losses(tmp_path / name, stage) for name in ("one", "two"))
        assert len(one) == 4 and one == pytest.approx(two, rel=1e-3, abs=1e-5)


@pytest.fixture(scope="module")
def short(chapters, tmp_path_factory):
    """A run of all chapters with 12 images a step, and its options."""
    options = {**chapters[1], "unet_dropout": 0, **dict.fromkeys(STEPS, 4), "train_batch_size": 12}
    output_dir = tmp_path_factory.mktemp("short")
    launch("train_unet.py", output_dir, **options)
    return output_dir, options


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        {"train_batch_size": 6, "gradient_accumulation_steps": 2},
        {"mixed_precision": "bf16"},
        {"torch_compile": "default"},
        {"gradient_checkpointing": "true"},
        {"sharded": True, "train_batch_size": 6},
        {"sharded": True, "train_batch_size": 3, "gradient_accumulation_steps": 2, "torch_compile": "default"},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_the_chapters_learn_the_same_however_they_are_trained(short, tmp_path, monkeypatch, flags):
    monkeypatch.setenv("LATENT_DDPM_COMPILE_BACKEND", "aot_eager")
    sharded, flags = flags.get("sharded"), {key: value for key, value in flags.items() if key != "sharded"}
    options = {**short[1], **flags}
    launch_cut("fsdp2", tmp_path, **options) if sharded else launch("train_unet.py", tmp_path, **options)
    for stage in CHAPTERS:
        one, other = (losses(output_dir, stage) for output_dir in (short[0], tmp_path))
        assert len(one) == 4 and one == pytest.approx(other, rel=0.02 if "mixed_precision" in flags else 1e-3, abs=1e-5)


def test_a_changed_chapter_starts_anew_and_one_that_is_not_asked_for_is_forgotten(chapters, tmp_path):
    _, options, _ = chapters
    launch("train_unet.py", tmp_path, **options)
    guided, few = ((tmp_path / weights).read_bytes() for weights in WEIGHTS)
    text = launch("train_unet.py", tmp_path, **{**options, "few_step_counts": "[4]"})
    assert "few_steps starts from scratch" in text and "self_guidance starts from scratch" not in text
    assert (tmp_path / WEIGHTS[1]).read_bytes() != few
    assert losses(tmp_path, "few_steps") and not losses(tmp_path, "few_steps", "critic_loss")
    text = launch("train_unet.py", tmp_path, **{**options, "self_guidance_scale": 3.0})
    assert "self_guidance starts from scratch" in text and "few_steps starts from scratch" in text
    assert noted(tmp_path)["self_guidance"]["scale"] == 3.0
    assert (tmp_path / WEIGHTS[0]).read_bytes() != guided and (tmp_path / WEIGHTS[1]).read_bytes() != few
    without = {**options, "self_guidance_steps": 0, "few_step_training_steps": 0}
    launch("train_unet.py", tmp_path, **without)
    assert "all 8 steps are done" in launch("train_unet.py", tmp_path, **without)
    plain = (tmp_path / WEIGHTS[0]).read_bytes()
    assert plain != guided and not noted(tmp_path).keys() & {"self_guidance", "few_steps"}
    launch("train_unet.py", tmp_path, **options)
    assert (tmp_path / WEIGHTS[0]).read_bytes() == guided and (tmp_path / WEIGHTS[1]).read_bytes() == few
