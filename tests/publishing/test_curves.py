"""Curves: what is drawn of which lines."""

import json

import pytest
from conftest import run_script
from PIL import Image

from latent_ddpm.publishing.curves import POINTS, draw_curves, smoothed
from latent_ddpm.training.metrics import read_metrics


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(count, stage="unet"):
    return [{"stage": stage, "images": 8 * k, "loss": 1 / k, "grad_norm": 0.0} for k in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 3, POINTS, POINTS + 1, 7 * POINTS + 3])
def test_smoothing_keeps_the_mean_of_every_group(count):
    values = list(range(count))
    made = smoothed(values)
    width = -(-count // POINTS)
    assert len(made) == -(-count // width) <= POINTS and made[0] == sum(values[:width]) / width


def test_a_picture_of_one_run_and_of_two(tmp_path):
    a = write(tmp_path / "a" / "metrics.jsonl", [*records(30), *records(5, "autoencoder")])
    b = write(tmp_path / "b" / "metrics.jsonl", records(2000))
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    assert draw_curves({"": a}, one) == one and draw_curves({"a": a, "b": b}, both) == both
    assert Image.open(one).width > 500
    assert draw_curves({"": write(tmp_path / "c.jsonl", [])}, tmp_path / "none.png") is None


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = write(tmp_path / "metrics.jsonl", records(2))
    path.write_text(path.read_text() + '{"stage": "un')
    assert len(read_metrics(path)) == 2


def test_the_command(tmp_path):
    write(tmp_path / "a" / "metrics.jsonl", records(3))
    run_script("plot_run.py", tmp_path / "a")
    assert Image.open(tmp_path / "a" / "curves.png").width > 300
    done = run_script("plot_run.py", tmp_path / "b", expect=2)
    assert "no metrics.jsonl" in done.stderr
