"""The benchmark of fine-tuning: its letters, what it calls, and what it makes of the results."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from small_pipeline import make

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config, save_config
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import training_batch


def module(name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "benchmarks" / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def transfer(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield module("benchmark_transfer")
    sys.modules.pop("benchmark_recipes", None)


@pytest.mark.parametrize("method", ["full", "lora-2"])
def test_both_ways_of_fine_tuning_learn(method, transfer):
    """The loss on the few latents falls, all weights or only low-rank changes of them move, and the result is stock."""
    if method != "full":
        pytest.importorskip("peft")
    lora = module("benchmark_lora")
    pipeline = make("")
    shape = pipeline.unet.config
    torch.manual_seed(0)
    latents = torch.randn(4, shape.out_channels, shape.sample_size, shape.sample_size)
    config = UNetConfig(dataset_name="x", max_grad_norm=1.0)
    made = lora.fine_tune(pipeline, latents, config, method, 1e-2, 30)
    numbers, table = torch.arange(256), noise_table(config)
    batch = training_batch(latents.repeat(64, 1, 1, 1), numbers, config, table)
    with torch.no_grad():
        before, after = (batch.loss(p.unet(batch.noisy, batch.timesteps).sample) for p in (pipeline, made))
    assert after < 0.9 * before
    changed = made.unet.conv_out.weight - pipeline.unet.conv_out.weight
    rank = torch.linalg.matrix_rank(changed.flatten(1), rtol=1e-3)
    assert changed.any() and (method == "full" or rank <= 2)
    assert made.unet.state_dict().keys() == pipeline.unet.state_dict().keys()


def test_letters_are_drawn_whole_and_each_in_another_way(transfer):
    pictures = np.stack([np.asarray(picture) for picture in transfer.letters(96, 0)])
    assert pictures.shape == (96, 32, 32) and pictures.max(axis=(1, 2)).min() > 200
    edge = np.concatenate([pictures[:, 0], pictures[:, -1], pictures[:, :, 0], pictures[:, :, -1]], axis=1)
    assert (edge > 128).any(axis=1).mean() < 0.05
    assert len({picture.tobytes() for picture in pictures}) == 96
    again = np.stack([np.asarray(picture) for picture in transfer.letters(96, 0)])
    assert np.array_equal(pictures, again)


def test_scratch_and_fine_tuning_are_compared(transfer, tmp_path, monkeypatch):
    called = []

    def call(script, words, product, log):
        """Stands in for a training: its words must be valid, and its product appears."""
        words = list(map(str, words))
        stage = script.removeprefix("train_").removesuffix(".py")
        config = parse_config(AutoencoderConfig if stage == "autoencoder" else UNetConfig, words)
        called.append((stage, config))
        product.parent.mkdir(parents=True, exist_ok=True)
        product.write_text("{}")
        if "source" in str(product):
            save_config(config, product.parent.parent / f"train_{stage}.yaml")

    def distance(name, folder, data, pipeline, steps, images):
        return {"fd": 20.0 if name.startswith("scratch") else 10.0}

    monkeypatch.setattr(transfer, "call", call)
    monkeypatch.setattr(transfer, "distance", distance)
    monkeypatch.setattr(transfer, "OTHERS", 20)
    words = ["--work_dir", tmp_path, "--json", tmp_path / "r.json", "--tasks", "letters", "--seeds", 0, 1]
    assert transfer.main([*map(str, words), "--shares", "0.2", "--steps", "100", "--keys", "--learning_rate 3e-4"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())["results"]["letters"]
    assert result["mean_fd"] == {"scratch": 20.0, "fine-tuned, 0.2 of the steps": 10.0}
    assert result["runs"]["scratch"]["1"] == {"steps": 100, "fd": 20.0}
    (_, first), (_, second), *rest = called
    assert first.minutes == second.minutes == 15 and first.dataset_name == "embedded:mnist"
    assert [config.max_train_steps for _, config in rest] == [100, 20, 100, 20]
    assert [config.seed for _, config in rest] == [0, 0, 1, 1]
    scratch, tuned = rest[0][1], rest[1][1]
    assert scratch.autoencoder == tuned.init_unet == str(tmp_path / "letters" / "source" / "pipeline")
    assert scratch.init_unet is None and tuned.autoencoder is None and tuned.learning_rate == 3e-4
    assert scratch.minutes is None and not scratch.auto_sizes and "target" in scratch.dataset_name
