"""scripts/benchmark_gpu.py: its rehearsal runs every part, so that nothing in it runs for the first time on a GPU."""

import json
import sys

import pytest
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))
from gpu_correctness import cause, waits


def rehearse(out, *parts):
    run_script("benchmark_gpu.py", "--out", out, "--rehearse", "--parts", *parts)
    return out


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return rehearse(tmp_path_factory.mktemp("gpu"), "quality", "sampling")


@pytest.mark.long
def test_correctness(tmp_path):
    found = json.loads((rehearse(tmp_path, "correctness") / "correctness.json").read_text())
    assert not any("error" in part for part in (*found["mathematics"].values(), *found["runs"].values()))
    for name in ("uniform", "integers"):
        assert found["mathematics"]["random_numbers"][name]["equal"]
    assert found["mathematics"]["networks"]["unet"]["gradient_relative"] < 1e-5
    assert found["mathematics"]["sampling"]["10 steps"]["relative"] < 1e-4
    for stage in ("autoencoder", "unet"):
        assert found["resumed"]["float32"][stage]["equal"]
        assert found["runs"]["float32-killed"][stage]["attempts"][0]["killed"]
        assert found["runs"]["float32"][stage]["waits_per_step"] == {}


@pytest.mark.long
def test_throughput(tmp_path):
    found = json.loads((rehearse(tmp_path, "throughput") / "throughput.json").read_text())
    assert set(found["cases"]) == {"unet", "autoencoder"}
    for case in found["cases"].values():
        assert case["flops_per_step"] > 0
        for variant in case["variants"].values():
            assert variant["images_per_s"] > 0 and variant["over_stock"] > 0 and variant["kernels"]["count"] > 0
    assert (tmp_path / "gpu.png").stat().st_size > 5000


@pytest.mark.long
def test_quality_and_sampling(rehearsed):
    quality, sampling = (json.loads((rehearsed / f"{name}.json").read_text()) for name in ("quality", "sampling"))
    assert quality["autoencoder"]["metrics"]["validation_psnr"] > 0 and quality["unet"]["metrics"]["loss"] > 0
    assert quality["sampling"]["images"] == 4 and (rehearsed / "quality-samples.png").exists()
    assert "error" not in json.dumps(sampling)


def test_what_a_failed_run_says():
    launched = (
        "log\nTraceback (most recent call last):\n  first\nValueError: why\nTraceback (most recent call last):\n  x"
    )
    assert cause(launched).startswith("Traceback (most recent call last):\n  first\nValueError: why")
    assert cause("one sentence") == "one sentence"
    assert cause(f"{ROOT}/train_unet.py FAILED") == "train_unet.py FAILED"


def test_lines_that_wait_in_every_step():
    each = "/a/optim.py:7: UserWarning: called a synchronizing CUDA operation (Triggered internally at x.cpp:1.)\n"
    once = each.replace("optim.py:7", "loop.py:9")
    assert waits(each * 20 + once, 20) == {"optim.py:7": 1.0}
