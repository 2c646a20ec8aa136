"""The small sets, and the benchmark of recipes on them: what it calls, and what it makes of the results."""

import importlib.util
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config, save_config
from latent_ddpm.errors import UserError


def module(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


small_sets, recipes = module("small_sets"), module("benchmark_recipes")


def test_small_sets(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(12)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    labels = [1, 0, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0]
    datasets.Dataset.from_dict({"image": pictures, "label": labels}, features).to_parquet(
        str(tmp_path / "train.parquet")
    )
    with tarfile.open(tmp_path / "icons.tgz", "w:gz") as package:
        for name in ("1f600.png", "1f44b-1f3fb.png"):
            buffer = io.BytesIO()
            Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"package/img/google/64/{name}")
            member.size = buffer.tell()
            buffer.seek(0)
            package.addfile(member, buffer)
    monkeypatch.setattr(small_sets, "GRAY_IMAGES", 5)
    words = ["small_sets.py", "--out", str(tmp_path / "sets"), "--cifar10", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--icons", str(tmp_path / "icons.tgz")])
    small_sets.main()
    made = {
        path.parent.name: datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        for path in (tmp_path / "sets").glob("*/train.parquet")
    }
    found = {name: (len(dataset), dataset[0]["image"].size, dataset[0]["image"].mode) for name, dataset in made.items()}
    assert found["patches"][1:] == ((64, 64), "RGB") and found.pop("patches")[0] > 5000
    assert found == {
        "cifar10": (12, (32, 32), "RGB"), "gray": (5, (32, 32), "L"), "automobiles": (3, (32, 32), "RGB"),
        "icons": (1, (64, 64), "RGB"),
    }  # fmt: skip
    assert np.asarray(made["icons"][0]["image"]).min() == 255  # on white; the variant of skin colour is left out
    assert np.array_equal(made["automobiles"][2]["image"], pictures[7])


def test_recipes_are_compared_in_the_same_time(tmp_path, monkeypatch):
    called = []

    def call(script, words, product, log):
        """Stands in for a script: its words must be valid, and its product appears."""
        called.append((script, list(map(str, words))))
        product.parent.mkdir(parents=True, exist_ok=True)
        if script.startswith("train_"):
            stage = script.removeprefix("train_").removesuffix(".py")
            config = parse_config(AutoencoderConfig if stage == "autoencoder" else UNetConfig, list(map(str, words)))
            assert config.minutes == 25 and config.autoencoder_time_share == 0.4 and config.seed == 3
            run_dir = product.parent.parent
            save_config(config, run_dir / f"train_{stage}.yaml")
            noted = json.loads((run_dir / "run.json").read_text()) if (run_dir / "run.json").exists() else {}
            (run_dir / "run.json").write_text(json.dumps(noted | {stage: {"finished_at": 70, "seconds": 500.0}}))
            lines = [{"stage": stage, "step": step, "validation_psnr": psnr} for step, psnr in ((5, 20.0), (9, 30.0))]
            (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return
        of_set = 4.0 if product.parent.name == "digits" else 1.0
        result = {"settings": [{"steps": 20, "fd": 10.0 * of_set, "precision": 0.5}]}
        if "benchmark" in script:
            result = {"results": {"stock": {"psnr": 22.0, "fd": 100.0}}}
        product.write_text(json.dumps(result))

    monkeypatch.setattr(recipes, "call", call)
    words = ["--config", str(ROOT / "configs" / "mnist.yaml"), "--work_dir", str(tmp_path), "--seed", "3"]
    words += ["--json", str(tmp_path / "r.json"), "--sets", "digits", "icons", "--keys", "--latent_channels 8"]
    assert recipes.main(words) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [figures["fd_over_stock"] for figures in result["results"].values()] == [0.4, 0.1]
    assert result["geometric_mean_of_fd_over_stock"] == pytest.approx(0.2)
    assert result["results"]["icons"]["stock"] == {"psnr": 22.0, "rfd": None, "fd": 100.0}
    ours = result["results"]["digits"]["ours"]
    assert ours["steps"]["unet"] == 70 and ours["seconds"]["unet"] == 500

    scripts = [script for script, _ in called[:5]]
    assert scripts == [
        "train_autoencoder.py", "train_unet.py", "benchmarks/benchmark_autoencoder.py",
        "benchmarks/benchmark_diffusion.py", "scripts/evaluate.py",
    ]  # fmt: skip
    minutes = [words[words.index("--minutes") + 1] for script, words in called[2:4]]
    assert list(map(float, minutes)) == [10, 15]
    stock = called[2][1]
    assert stock[stock.index("--latent_channels") + 1] == "3" and "[16, 32, 64]" in stock
    trained = called[0][1]
    assert trained[trained.index("--latent_channels") + 1] == "8"
    assert str(tmp_path / "digits" / "ours-latent_channels-8") in trained
    assert "icons" in called[5][1][called[5][1].index("--dataset_name") + 1]


def test_a_failed_script_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"evaluate.py failed with status 2: see .*x.log"):
        recipes.call("scripts/evaluate.py", ["pipeline", "--no_such_key", "1"], tmp_path / "none", tmp_path / "x.log")
    (tmp_path / "there").write_text("")
    assert recipes.call("no_such.py", [], tmp_path / "there", tmp_path / "x.log") is None


JOBS = """
minutes: [1, 1]
autoencoders:
  late:
    {block_out_channels: [8, 8], latent_channels: 4, train_batch_size: 4, ms: 100,
     late: {from: 0.5, noise: 0.2, half: 0.5}}
  stock: {stock: true, block_out_channels: [8, 8], latent_channels: 3, train_batch_size: 4, ms: 100}
unets:
  every: &every
    {unet_block_out_channels: [32], unet_layers_per_block: 1, unet_attention_levels: [], train_batch_size: 4, ms: 100,
     noises: 3, learned_weights: true, dispersive: 0.2}
  stock: {<<: *every, stock: true}
  impossible: {<<: *every, unet_block_out_channels: [33]}
runs:
  - {sets: [digits], autoencoder: late, unets: [every, impossible]}
  - {sets: [digits, unknown], autoencoder: stock, unets: [stock]}
"""


def test_search_runs_every_recipe(tmp_path):
    (tmp_path / "jobs.yaml").write_text(JOBS)
    words = ["--jobs", tmp_path / "jobs.yaml", "--json", tmp_path / "found.json", "--steps", 6, "--num_images", 8]
    words += ["--only", "digits"]
    run_script("search_recipes.py", *words, folder="benchmarks")
    result = json.loads((tmp_path / "found.json").read_text())
    assert result["left_out"] == 0 and result["jobs"]["minutes"] == [1, 1]
    by_name = {(found["autoencoder"], found.get("unet"), "guided" in found): found for found in result["results"]}
    assert set(by_name) == {
        ("late", None, False), ("late", "every", False), ("late", "every", True), ("late", "impossible", False),
        ("stock", None, False), ("stock", "stock", False),
    }  # fmt: skip
    assert by_name["late", None, False]["rfd"] > 0 and by_name["late", "every", True]["fd"] > 0
    assert "fd" in by_name["stock", "stock", False] and "33" in by_name["late", "impossible", False]["error"]
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.size == (16 * 34 + 2, 5 * 36)
