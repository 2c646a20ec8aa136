"""The benchmark scripts run, measure what they say, and go on where they were stopped."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import PATIENCE, ROOT, environment
from PIL import Image

TINY = ["--resolution", "16", "--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--num_vq_embeddings", "32"]
TINY += ["--train_batch_size", "8", "--lr_warmup_steps", "2", "--dataloader_num_workers", "0"]


def script(name, *words, expect=0):
    command = [sys.executable, f"scripts/{name}", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_benchmark_autoencoder(photos, tmp_path):
    recipes = ["stock", "ema --equivariance_share 0.5", "simvq", "fsq", "fsq --fsq_levels [4,4,2]"]
    recipes.append("kl --kl_weight 1e-4 --block_out_channels [4,8]")
    script("benchmark_autoencoder.py", "--minutes", 0.04, "--turn", 0.6, "--json", tmp_path / "r.json", "--recipes",
           *recipes, "--frechet_images", 20, "--train_data_dir", photos, *TINY)  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["results"]) == recipes and "--recipes stock 'ema --equi" in result["command"]
    for name, figures in result["results"].items():
        assert figures["psnr"] > 5 and figures["rfd"] > 0 and figures["rfd_images"] == 2
        assert 0.03 < figures["trained_minutes"] < 0.1 and figures["trained_images"] > 8
        assert ("codebook_usage" in figures) == (not name.startswith("kl"))
        assert figures["time_per_image_over_stock_median"] > 0
    parameters = [figures["parameters"] for figures in result["results"].values()]
    assert parameters[5] < 0.5 * parameters[1]
    assert Image.open(tmp_path / "r.png").size[0] > 100
    assert Image.open(tmp_path / "r-reconstructions.png").size[1] >= 6 * 2 * 16


def test_benchmark_autoencoder_knows_its_recipes(photos, tmp_path):
    words = ["--json", tmp_path / "r.json", "--recipes", "vq", "--train_data_dir", photos, *TINY]
    assert "There is no recipe vq" in script("benchmark_autoencoder.py", *words, expect=2)
    words[3] = "ema --lpips_weight 1"
    assert "set lpips_weight 0" in script("benchmark_autoencoder.py", *words, expect=2)


def test_benchmark_discriminator_and_that_it_goes_on_where_it_was_killed(photos, tmp_path):
    words = ["--seeds", 1, "--work_dir", tmp_path / "work", "--json", tmp_path / "r.json", "--train_data_dir",
             photos, *TINY, "--max_train_steps", 8, "--disc_start", 4, "--checkpointing_steps", 2, "--disc_weight", 0.5,
             "--disc_adaptive_steps", 1, "--disc_channels", 8, "--disc_layers", 1, "--validation_fraction", 0.2,
             "--recipes", "", "--disc_norm actnorm"]  # fmt: skip
    script("benchmark_discriminator.py", *words)
    whole = json.loads((tmp_path / "r.json").read_text())
    with_it = tmp_path / "work" / "seed-1" / "with"  # as a kill in the middle of this run would leave it
    for path in [*with_it.glob("autoencoder/*"), *with_it.glob("evaluation-*.json"), tmp_path / "r.json"]:
        path.unlink()
    (with_it / "autoencoder").rmdir()
    shutil.rmtree(with_it / "checkpoints" / "autoencoder-00000008")
    script("benchmark_discriminator.py", *words)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [r["seed"] for r in result["results"]] == [1]
    first = result["results"][0]
    assert first["with"]["psnr"] != first["without"]["psnr"]
    assert list(result["recipes"]) == ["with", "with --disc_norm actnorm"]
    for name, figures in result["recipes"].items():
        assert figures["psnr_lost"][0] == first["without"]["psnr"] - first[name]["psnr"]
        assert figures["rfd_over_without"][0] == first[name]["rfd"] / first["without"]["rfd"]
    assert first["with"]["psnr"] != first["with --disc_norm actnorm"]["psnr"]
    assert Image.open(tmp_path / "r.png").size[0] > 100
    assert result["recipes"] == whole["recipes"]
    words += ["--lr_warmup_steps", 3]
    assert "holds a run with other options" in script("benchmark_discriminator.py", *words, expect=2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("--disc_weight", 0, "disc_weight above 0"), ("--disc_start", 3, "multiple of checkpointing_steps")],
)
def test_benchmark_discriminator_refuses_what_it_cannot_compare(photos, tmp_path, key, value, words):
    base = ["--work_dir", tmp_path / "work", "--json", tmp_path / "r.json", "--train_data_dir", photos, *TINY,
            "--max_train_steps", 8, "--disc_start", 4, "--checkpointing_steps", 2, "--disc_weight", 0.5,
            "--disc_layers", 1]  # fmt: skip
    assert words in script("benchmark_discriminator.py", *base, key, value, expect=2)


def test_profile_autoencoder(photos, tmp_path):
    words = ["--json", tmp_path / "p.json", "--resolutions", 16, 32, "--variants", "channels_last", "--repeats", 2]
    text = script("profile_autoencoder.py", *words, "--pixels", 1024, "--train_data_dir", photos, *TINY)
    result = json.loads((tmp_path / "p.json").read_text())
    assert list(result["resolutions"]) == ["16", "32"] and "32 pixels, batches of 1" in text
    for side, figures in result["resolutions"].items():
        assert figures["variants"]["plain"]["time_over_plain_median"] == 1
        assert sum(figures["shares"].values()) == pytest.approx(1)
        assert all(-0.05 < share < 1 for share in figures["shares"].values())
        assert {f"encoder {side}px", f"decoder {side}px", "encoder middle", "quantizer"} <= figures["shares"].keys()
    bad = [*words, "--variants", "plain+faster", "--train_data_dir", photos, *TINY]
    assert "There is no variant plain+faster" in script("profile_autoencoder.py", *bad, expect=2)
