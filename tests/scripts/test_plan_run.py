"""scripts/plan_run.py: what it measures is the real run, and nothing of it stays."""

import importlib.util
import json
import signal
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, STAGE_1, STAGE_2
from preloaded import PATIENCE, Script

from latent_ddpm.errors import UserError
from latent_ddpm.planning import measuring
from latent_ddpm.planning.forecast import bytes_in

spec = importlib.util.spec_from_file_location("plan_run_script", ROOT / "scripts" / "plan_run.py")
plan_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan_run)

COMMON = {"resolution": 16, "dataloader_num_workers": 0, "logging_steps": 2, "random_flip": True}
OF_1 = {"max_train_steps": 12, "validation_steps": 5, "checkpointing_steps": 4, "codebook_start": 3}
OF_1 |= {"disc_weight": 0.5, "disc_start": 6, "disc_adaptive_steps": 2, "disc_channels": 8, "disc_layers": 1}
OF_2 = {"max_train_steps": 14, "validation_steps": 6, "checkpointing_steps": 5, "ema_snapshots": 3}


def numbers(section):
    return {key: yaml.safe_load(str(value)) for key, value in section.items()}


@pytest.fixture(scope="module")
def config(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    sections = {"train_autoencoder": numbers(STAGE_1) | OF_1, "train_unet": numbers(STAGE_2) | OF_2}
    path.write_text(yaml.safe_dump({"train_data_dir": str(photos), **COMMON, **sections}))
    return path


class Preloaded(Script):
    """In the place of subprocess.Popen: without the launcher, and with the libraries loaded."""

    def __init__(self, words, stdout, **settings):
        super().__init__(words[words.index(str(ROOT / "scripts" / "plan_run.py")) :])
        self.log = stdout

    def wait(self, timeout=PATIENCE):
        status = super().wait(timeout)
        for number in ("1", "2"):
            self.log.write((Path(self.folder.name) / number).read_text())
        self.log.flush()
        return status


@pytest.fixture
def preloaded(monkeypatch):
    monkeypatch.setattr(measuring.subprocess, "Popen", Preloaded)


def test_plan_agrees_with_the_run_and_leaves_nothing(config, tmp_path, preloaded, capsys, monkeypatch):
    measured, real = {}, plan_run.measure
    monkeypatch.setattr(plan_run, "measure", lambda stage, *args: measured.setdefault(stage, real(stage, *args)))
    output_dir, result = tmp_path / "run", tmp_path / "plan.json"
    words = ["--config", str(config), "--output_dir", str(output_dir), "--json", str(result), "--seconds", "4"]
    assert plan_run.main([*words, "--hours", "2", "--price", "3"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]
    plan, said = json.loads(result.read_text()), capsys.readouterr().out
    first, second = plan["stages"]["autoencoder"], plan["stages"]["unet"]
    assert (first["training_images"], first["validation_images"]) == (46, 2)
    assert first["epochs"] == pytest.approx(12 * 8 / 46) and second["images_per_step"] == 8
    assert {"start and end", "steps", "decode", "evaluation", "last evaluation", "grid", "checkpoint", "export"} <= set(
        first["parts"]
    )
    assert {"steps", "encode", "evaluation", "grid", "checkpoint", "snapshot", "export"} <= set(second["parts"])
    assert plan["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert plan["cost"] == pytest.approx(plan["seconds"] / 3600 * 3) and "which costs" in said
    steps = plan["proposal"]["max_train_steps"]
    assert steps["autoencoder"] / steps["unet"] == pytest.approx(12 / 14, rel=0.01)
    assert sum(plan["proposal"]["seconds"].values()) <= 7200 and f"--max_train_steps {steps['unet']}" in said
    assert "Stage 1, the autoencoder: " in said and "Disk: " in said and "fits." in said

    # the rehearsed steps are those of the phases, and all times are within that of the process
    assert list(measured["autoencoder"]["phases"]) == ["plain", "codes", "discriminator alone", "discriminator"]
    assert list(measured["unet"]["phases"]) == ["averages updated every step"]
    for found in measured.values():
        steps = sum(phase["rehearsed"] * phase["seconds"] for phase in found["phases"].values())
        parts = sum(sample["seconds"] for samples in found["events"].values() for sample in samples)
        assert steps + parts < found["process"]["seconds"] and found["peak_bytes"] > 2**27

    for script in ("train_autoencoder.py", "train_unet.py"):
        of_run = ["--config", str(config), "--output_dir", str(output_dir)]
        done = Script([script, *of_run]).finish()
        assert done.returncode == 0, done.stderr[-2000:]
    # every checkpoint has weights, averages and moments, so one that lacks an average would be seen here
    disk = plan["disk_bytes"]
    for kind, folder in (("checkpoints", "checkpoints"), ("snapshots of averages", "ema"), ("latents", "latents")):
        assert disk[kind] == pytest.approx(bytes_in(output_dir / folder), rel=0.02), kind
    assert disk["decoded images"] == pytest.approx(bytes_in(output_dir / "cache"), rel=0.05)
    at_end = sum(value for kind, value in disk.items() if kind != "while a checkpoint is written")
    assert at_end == pytest.approx(bytes_in(output_dir), rel=0.05)


def test_errors_are_one_sentence(config, tmp_path, preloaded, monkeypatch):
    with pytest.raises(UserError, match="is not a folder"):
        plan_run.main(["--config", str(config), "--train_data_dir", str(tmp_path / "none"), "--seconds", "3"])
    for words, sentence in (
        (["--hours", "0"], "--hours is 0"),
        (["--hours", "nan"], "--hours is nan"),
        (["--device", "cuda"], "There is no GPU here"),
        (["--device", "L4", "--images", "1"], "at least 2"),
        (["--sead", "1"], "Did you mean 'seed'"),
        (["--images", "5"], "for a card's name"),
        (["--device", "H1000"], "Did you mean H100"),
        (["--streaming", "true", "--train_data_dir", "null", "--dataset_name", "a/b"], "nothing to measure"),
        (["--train_data_dir", str(tmp_path / "none"), "--device", "T4"], "give --images N"),
    ):
        with pytest.raises(UserError, match=sentence):
            plan_run.main(["--config", str(config), *words])


def test_a_card_without_the_data(config, tmp_path, capsys):
    words = ["--config", str(config), "--train_data_dir", "nowhere", "--device", "RTX 4090", "--images", "1000"]
    assert plan_run.main([*words, "--gpus", "2", "--price", "1", "--json", str(tmp_path / "plan.json")]) == 0
    plan, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert not plan["measured"] and "Assumed" in said and "mixed_precision bf16" in said
    stage = plan["stages"]["unet"]
    assert stage["images_per_step"] == 16 and stage["training_images"] + stage["validation_images"] == 1000
    assert plan["cost"] == pytest.approx(2 * plan["seconds"] / 3600)


def test_keys_go_to_the_stage_that_has_them():
    words = ["--seed", "3", "--quantizer", "kl", "--unet-dropout=0.1", "--fsq_levels", "null", "--max_train_steps", "5"]
    assert plan_run.of_stage(words, "autoencoder") == [*words[:4], *words[5:]]
    assert plan_run.of_stage(words, "unet") == [*words[:2], words[4], *words[7:]]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(config, tmp_path, signum):
    words = ["scripts/plan_run.py", "--config", str(config), "--output_dir", str(tmp_path / "run"), "--seconds", "60"]
    script = Script(words)
    while not list(tmp_path.glob(".plan-*/*.log")) and script.poll() is None:
        time.sleep(0.02)
    script.send_signal(signum)
    assert script.finish().returncode == 130
    assert list(tmp_path.iterdir()) == []
