"""train_minutes: the lengths that it chooses, their correction on the way, and the same length after a resume."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, STAGE_1
from hypothesis import given
from hypothesis import strategies as st
from preloaded import PATIENCE, Script
from safetensors.torch import load_file

from latent_ddpm.config import PLANNED_KEYS, AutoencoderConfig, UNetConfig, parse_config, save_config
from latent_ddpm.errors import UserError
from latent_ddpm.planning import measuring, minutes
from latent_ddpm.planning.forecast import forecast_seconds

SMALL = {"dataset_name": "embedded:mnist", "resolution": 32, "train_minutes": 10.0}
AUTOENCODER = AutoencoderConfig(
    **SMALL, block_out_channels=[16, 32], max_train_steps=1000, validation_steps=100, checkpointing_steps=200,
    disc_weight=0.5, disc_start=600, disc_adaptive_steps=50, disc_ramp_steps=20, codebook_start=100, lr_warmup_steps=50,
)  # fmt: skip
UNET = UNetConfig(
    **SMALL, max_train_steps=3000, validation_steps=500, checkpointing_steps=500, self_guidance_steps=160,
    lr_scheduler="warmup_stable_decay", lr_decay_steps=900, lr_warmup_images=640, ema_snapshots=8,
)  # fmt: skip
IMAGES = {"train": 4750, "validation": 250, "decoded": 5000, "normalization": 10_000, "versions": 1}
MAIN_PROCESS = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", num_processes=1)


def rehearsed(step_seconds):
    phases = {"any": {"rehearsed": 5, "seconds": step_seconds, "processor_seconds": step_seconds}}
    events = {"export": [{"units": 1, "seconds": 2.0, "processor_seconds": 1.0}]}
    process = {"seconds": 10.0, "processor_seconds": 9.0}
    return {"phases": phases, "events": events, "images": IMAGES, "stops": 1, "process": process}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """The rehearsal is replaced; returns what sets the seconds of a step, and what was rehearsed."""
    seen = SimpleNamespace(step_seconds=0.1)

    def measure(stage, config, words, *rest):
        seen.config = parse_config(type(config), words)
        return rehearsed(seen.step_seconds)

    monkeypatch.setattr(minutes, "measure", measure)
    return seen


def test_what_goes_with_the_steps_is_scaled():
    half, double = minutes.scaled_run(AUTOENCODER, 0.5), minutes.scaled_run(AUTOENCODER, 2.0)
    assert [(c.max_train_steps, c.validation_steps, c.checkpointing_steps) for c in (half, double)] == [
        (500, 50, 100), (2000, 200, 400),
    ]  # fmt: skip
    assert [(c.codebook_start, c.lr_warmup_steps) for c in (half, double)] == [(50, 50), (100, 50)]
    assert [(c.disc_start, c.disc_ramp_steps, c.disc_adaptive_steps) for c in (half, double)] == [
        (300, 10, 25), (1200, 40, 50),
    ]  # fmt: skip
    assert minutes.scaled_run(AUTOENCODER, 0.1).lr_warmup_steps == 10
    third = minutes.scaled_run(UNET, 1 / 3)
    assert (third.max_train_steps, third.self_guidance_steps, third.few_step_training_steps) == (1000, 53, 0)
    assert third.lr_decay_steps == 300 and third.lr_warmup_images is None


@given(st.floats(1e-6, 1e3))
def test_a_scaled_config_is_valid(share):
    for config in (AUTOENCODER, UNET):
        made = minutes.scaled_run(config, share)
        made.validate()
        assert made.max_train_steps >= 1
        if isinstance(made, AutoencoderConfig):
            assert made.codebook_start < made.max_train_steps


@pytest.mark.parametrize(("config", "stage", "seconds"), [(AUTOENCODER, "autoencoder", 240), (UNET, "unet", 360)])
def test_the_planned_steps_fill_the_time(config, stage, seconds, measured, tmp_path):
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"))
    plan = minutes.plan(config, stage, MAIN_PROCESS)
    chosen = dataclasses.replace(config, **plan.keys)
    took = sum(forecast_seconds(chosen, rehearsed(0.1)).values())
    assert plan.seconds == seconds and seconds - 5 < took <= seconds
    chapter = 160 * plan.keys["max_train_steps"] / 3000 * 5 / 3 * 0.1 if stage == "unet" else 0
    assert plan.seconds_after == pytest.approx(2 + chapter, abs=0.1)
    assert plan.phases[0] == (0, pytest.approx(0.1)) and plan.expected(0, 100) == pytest.approx(10)
    assert measured.config.minutes is None and measured.config.max_train_steps == config.max_train_steps
    assert not (tmp_path / "run").exists()


def test_stage_2_gets_what_stage_1_has_left(measured, tmp_path):
    unet = dataclasses.replace(UNET, output_dir=str(tmp_path))
    save_config(dataclasses.replace(AUTOENCODER, output_dir=str(tmp_path)), tmp_path / "train_autoencoder.yaml")
    (tmp_path / "run.json").write_text(json.dumps({"autoencoder": {"seconds": 300.0}}))
    assert minutes.plan(unet, "unet", MAIN_PROCESS).seconds == 300
    assert minutes.plan(
        dataclasses.replace(unet, train_minutes=None, train_hours=1.0), "unet", MAIN_PROCESS
    ).seconds == (
        pytest.approx(0.6 * 3600)  # that was a run of another time
    )
    assert minutes.plan(dataclasses.replace(unet, autoencoder="other"), "unet", MAIN_PROCESS).seconds == 600


def test_checkpoints_are_at_most_a_quarter_of_an_hour_apart(measured, tmp_path):
    config = dataclasses.replace(AUTOENCODER, output_dir=str(tmp_path / "run"), train_minutes=None, train_hours=100.0)
    keys = minutes.plan(config, "autoencoder", MAIN_PROCESS).keys
    assert keys["checkpointing_steps"] == 9000 and keys["validation_steps"] > 100_000


def test_too_short_a_time_is_one_sentence(measured, tmp_path):
    config = dataclasses.replace(AUTOENCODER, output_dir=str(tmp_path / "run"), train_minutes=0.2)
    with pytest.raises(
        UserError, match=r"^0.2 minutes are too short: .* Set train_minutes above (\d+\.\d)\.$"
    ) as error:
        minutes.plan(config, "autoencoder", MAIN_PROCESS)
    enough = float(str(error.value).removesuffix(".").split()[-1]) + 0.1
    assert minutes.plan(dataclasses.replace(config, train_minutes=enough), "autoencoder", MAIN_PROCESS).keys


@pytest.mark.parametrize("taken", [600.0, 700.0])
def test_nothing_is_left_for_stage_2(taken, measured, tmp_path):
    save_config(dataclasses.replace(AUTOENCODER, output_dir=str(tmp_path)), tmp_path / "train_autoencoder.yaml")
    (tmp_path / "run.json").write_text(json.dumps({"autoencoder": {"seconds": taken}}))
    with pytest.raises(UserError, match=r"this stage has 0 s of them, .* Set train_minutes above 1\d\.\d\.$"):
        minutes.plan(dataclasses.replace(UNET, output_dir=str(tmp_path)), "unet", MAIN_PROCESS)


def test_processes_share_cores_but_not_gpus():
    found = rehearsed(0.1)
    found["events"]["encode"] = [{"units": 8, "seconds": 4.0, "processor_seconds": 4.0}]
    on_cpu, on_gpus = (minutes.of_these_processes(found, 4, on_cpu) for on_cpu in (True, False))
    assert on_cpu["phases"]["any"]["seconds"] == pytest.approx(0.4) and on_cpu["events"]["encode"][0]["seconds"] == 4
    assert on_gpus["phases"]["any"]["seconds"] == pytest.approx(0.1) and on_gpus["events"]["encode"][0]["seconds"] == 1
    assert on_gpus["events"]["export"][0]["seconds"] == 2 and minutes.of_these_processes(found, 1, True) is found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_minutes": 10.0, "train_hours": 1.0}, "Set one of train_minutes and train_hours"),
        ({"train_minutes": 0.0}, "train_minutes is 0.0; it must be greater than 0"),
        ({"train_hours": float("inf")}, "train_minutes is inf; it must be a number"),
        ({"autoencoder_time_share": 1.0}, "between 0 and 1"),
        ({"train_hours": 1.0, "streaming": True, "dataset_name": "a/b"}, "streaming reads the whole dataset"),
    ],
)
def test_impossible_times_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(**({"dataset_name": "embedded:mnist"} | keys)).validate()


# ------------------------------------------------------------------------------------------------------- real runs

WITH_PLAN = """import sys
sys.path.insert(0, {root!r})
import train_autoencoder
from latent_ddpm.training.launch import run
from latent_ddpm.training.plan import Plan
keys = {{"max_train_steps": 12, "checkpointing_steps": 4, "validation_steps": 6, "codebook_start": 0}}
train_autoencoder.plan = lambda config, stage, accelerator, used: Plan(keys, 0.0, 0.0, [(0, 0.1)])
run(train_autoencoder.main)
"""


@pytest.fixture
def words(photos, tmp_path):
    sections = {key: yaml.safe_load(str(value)) for key, value in STAGE_1.items()}
    common = {"train_data_dir": str(photos), "resolution": 16, "dataloader_num_workers": 0}
    keys = sections | common | {"train_minutes": 7, "max_train_steps": 99, "codebook_start": 0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"train_autoencoder": keys}))
    return ["--config", str(tmp_path / "tiny.yaml"), "--output_dir"]


def test_a_corrected_length_is_the_same_after_a_resume(words, tmp_path):
    (tmp_path / "with_plan.py").write_text(WITH_PLAN.format(root=str(ROOT)))
    first, again = tmp_path / "run", tmp_path / "again"
    done = Script([tmp_path / "with_plan.py", *words, first]).finish()
    assert done.returncode == 0, done.stderr[-2000:]
    # no time was left at the first checkpoint, so half of the other 8 steps are made
    assert json.loads((first / "run.json").read_text())["autoencoder"]["finished_at"] == 8
    saved = yaml.safe_load((first / "train_autoencoder.yaml").read_text())["train_autoencoder"]
    assert (saved["max_train_steps"], saved["checkpointing_steps"], saved["train_minutes"]) == (8, 4, 7)

    finished = Script(["train_autoencoder.py", *words, first]).finish()
    assert finished.returncode == 0 and "all 8 steps are done" in finished.stderr

    # as if it had been killed after the first checkpoint, which is what decides
    shutil.copytree(first, again)
    shutil.rmtree(again / "checkpoints" / "autoencoder-00000008")
    shutil.rmtree(again / "autoencoder")
    path = again / "train_autoencoder.yaml"
    path.write_text(path.read_text().replace("max_train_steps: 8", "max_train_steps: 12"))
    resumed = Script(["train_autoencoder.py", *words, again]).finish()
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resumed from step 4" in resumed.stderr and "measuring" not in resumed.stderr
    name = "autoencoder/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(again / name), load_file(first / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)

    other = Script(["train_autoencoder.py", *words, first, "--train_minutes", "8"]).finish()
    assert other.returncode == 2 and "holds a run of 7 minutes, not of 8" in other.stderr
    path.write_text(path.read_text().replace("train_minutes: 7.0", "train_minutes: null"))
    unplanned = Script(["train_autoencoder.py", *words, again]).finish()
    assert unplanned.returncode == 2 and "a run without train_minutes, which cannot be planned" in unplanned.stderr
    longer = ["--config", path, "--output_dir", again, "--train_minutes", "null", "--max_train_steps", "10"]
    done = Script(["train_autoencoder.py", *longer]).finish()
    assert done.returncode == 0 and "resumed from step 8" in done.stderr


class Preloaded(Script):
    """In the place of subprocess.Popen, with the libraries loaded."""

    def __init__(self, words, stdout, **settings):
        super().__init__(words[words.index(str(measuring.PROGRAM)) :])
        self.log = stdout

    def wait(self, timeout=PATIENCE):
        return super().wait(timeout)


def test_a_real_rehearsal_gives_a_plan(words, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring.subprocess, "Popen", Preloaded)
    monkeypatch.setattr(minutes, "LEAST_SECONDS", 3.0)
    config = parse_config(AutoencoderConfig, [*words, str(tmp_path / "run")])
    plan = minutes.plan(config, "autoencoder", MAIN_PROCESS)
    assert set(plan.keys) <= set(PLANNED_KEYS) and plan.keys["max_train_steps"] > 99
    assert plan.seconds == pytest.approx(0.4 * 420) and plan.seconds_after > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]
