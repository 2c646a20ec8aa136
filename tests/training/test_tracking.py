"""Trackers: the same names for the same curves, and a resumed run continues its tracker's run."""

import json
import os
import sqlite3

import pytest
from conftest import command, environment, finished, read_metrics

STEPS = {"checkpointing_steps": 2, "validation_steps": 2, "resolution": 16}


def train(photos, output_dir, steps, report_to, **settings):
    words = command("train_autoencoder.py", output_dir, train_data_dir=photos, max_train_steps=steps,
                    report_to=report_to, resume_from_checkpoint="latest", **STEPS)  # fmt: skip
    done = finished(words, env={**environment(), **settings})
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
