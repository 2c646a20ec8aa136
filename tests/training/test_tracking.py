"""Trackers: the same names for the same curves, and a resumed run continues its tracker's run."""

import importlib
import json
import os
import sqlite3
import sys
from types import SimpleNamespace

import pytest
from conftest import command, environment, finished_script, read_metrics

from latent_ddpm.errors import UserError
from latent_ddpm.training.tracking import check_tracker

STEPS = {"checkpointing_steps": 2, "validation_steps": 2, "resolution": 16}


def train(photos, output_dir, steps, report_to, **settings):
    words = command("train_autoencoder.py", output_dir, train_data_dir=photos, max_train_steps=steps,
                    report_to=report_to, resume_from_checkpoint="latest", **STEPS)  # fmt: skip
    done = finished_script(words, {**environment(), **settings})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output_dir / "run.json").read_text())["autoencoder"]["tracker_run"]


def names_in(path):
    """The curves of metrics.jsonl, and its histograms."""
    records = read_metrics(path)
    plain = {"stage", "step", "images", "time", "histograms"}
    curves = {f"autoencoder/{key}" for record in records for key in record if key not in plain}
    return curves, {f"autoencoder/{key}" for record in records for key in record.get("histograms", ())}


def test_tensorboard(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = train(photos, tmp_path / "out", 2, "tensorboard")
    assert train(photos, tmp_path / "out", 4, "tensorboard") == first
    curves, histograms = names_in(tmp_path / "out" / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "autoencoder"))
    events.Reload()
    assert curves <= set(events.Tags()["scalars"]) and histograms == set(events.Tags()["histograms"])
    assert histograms == {"autoencoder/latents", "autoencoder/uses_of_a_code"}
    assert [event.step for event in events.Scalars("autoencoder/loss")] == [1, 2, 3, 4]


def test_histograms_count_every_value(photos, tmp_path):
    train(photos, tmp_path / "out", 2, "none")
    (uses,) = [r["histograms"]["uses_of_a_code"] for r in read_metrics(tmp_path / "out" / "metrics.jsonl")
               if "uses_of_a_code" in r.get("histograms", {})]  # fmt: skip
    assert sum(uses["counts"]) == 32 and uses["low"] >= 0  # codes


def test_trackio(photos, tmp_path):
    pytest.importorskip("trackio")
    settings = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HOME": str(tmp_path / "home")}
    first = train(photos, tmp_path / "out", 2, "trackio", **settings)
    assert train(photos, tmp_path / "out", 4, "trackio", **settings) == first
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    curves, _ = names_in(tmp_path / "out" / "metrics.jsonl")
    assert curves <= {key for _, _, metrics in rows for key in json.loads(metrics)}


def test_wandb(photos, tmp_path):
    pytest.importorskip("wandb")
    settings = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": os.environ.get("HOME", str(tmp_path))}
    first = train(photos, tmp_path / "out", 2, "wandb", **settings)
    assert train(photos, tmp_path / "out", 4, "wandb", **settings) == first
    runs = list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(first) for run in runs)  # `wandb sync` joins them by that name


# ------------------------------------------------------------------------------------- before images are read


@pytest.fixture
def broken(monkeypatch):
    """Make the import of a module raise an error."""

    def install(module, error):
        real = importlib.import_module

        def fail(name, *more):
            if name == module:
                raise error
            return real(name, *more)

        monkeypatch.setattr(importlib, "import_module", fail)

    return install


@pytest.mark.parametrize(
    ("tracker", "module", "error", "said"),
    [
        ("wandb", "wandb", ModuleNotFoundError("no", name="wandb"), "needs the package wandb: pip install wandb, or"),
        ("trackio", "trackio", ModuleNotFoundError("no", name="gradio"), "its package needs gradio: install it, or"),
        (
            "tensorboard",
            "torch.utils.tensorboard",
            ImportError("of another\nprotobuf"),
            "ImportError: of another proto",
        ),
        ("tensorboard", "tensorboard", TypeError("Descriptors"), r"cannot be imported \(TypeError: Descriptors\)"),
    ],
)
def test_a_tracker_that_cannot_be_imported(tracker, module, error, said, broken):
    broken(module, error)
    check_tracker("none", "project")
    with pytest.raises(UserError, match=f"^report_to {tracker}.*{said}"):
        check_tracker(tracker, "project")


class Wandb(SimpleNamespace):
    """What of wandb is asked, with a mode and a key."""

    def __init__(self, mode="online", key=None, refused=None, old=False):
        self.api, self.refused, self.verified = SimpleNamespace(api_key=key), refused, 0

        def login(verify=False, prompt=True):
            assert verify and (key or not prompt), "it asks at the terminal"
            if refused:
                raise RuntimeError(refused)
            self.verified += bool(key)
            return bool(key)

        self.login = (lambda verify=False: login(verify)) if old else login
        self.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode))


@pytest.mark.parametrize("old", [False, True])
def test_wandb_without_a_login(old, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def check(project="digits", **about):
        fake = Wandb(**about, old=old)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        check_tracker("wandb", project)
        return fake.verified

    with pytest.raises(UserError, match="needs a login: run `wandb login` once, .* WANDB_MODE=offline"):
        check()
    assert check(key="k") == 1
    assert check(mode="offline") == check(mode="disabled") == 0
    with pytest.raises(UserError, match=r"the login fails \(401 Unauthorized\): repeat `wandb login`"):
        check(key="k", refused="401\nUnauthorized")
    for project in ("a/b", "x" * 129):
        with pytest.raises(UserError, match="tracker_project_name .* cannot be a project of wandb"):
            check(project, mode="offline")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check() == 0
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(UserError, match="needs a login"):
        check(mode="offline")
    monkeypatch.setenv("RANK", "1")  # the first process says it for all
    assert check() == 0


def test_wandb_itself_without_a_login(tmp_path):
    pytest.importorskip("wandb")
    code = "from latent_ddpm.training.tracking import check_tracker; check_tracker('wandb', 'x')"
    env = {key: value for key, value in environment().items() if not key.startswith("WANDB_")}
    done = finished_script([sys.executable, "-c", code], env | {"HOME": str(tmp_path)})
    assert "UserError: report_to wandb needs a login" in done.stderr


def test_a_space_of_trackio_needs_a_token(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace())
    check_tracker("trackio", "x")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.setattr("latent_ddpm.training.tracking.get_token", lambda: None)
    with pytest.raises(UserError, match="TRACKIO_SPACE_ID needs a token"):
        check_tracker("trackio", "x")
