"""auto_sizes: what it chooses fits the images and the time, and stays after a resume."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import Script

from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig, keys_to_size, parse_config
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.planning import sizes
from latent_ddpm.planning.sizes import AUTOENCODERS, UNETS, autoencoder_keys, climb, unet_keys
from train_unet import images_of

DATA = {"dataset_name": "embedded:mnist", "auto_sizes": True, "train_minutes": 10.0}
LADDER = AUTOENCODERS[:1] + tuple(
    dataclasses.replace(AUTOENCODERS[1], width=w, least_images=n) for w, n in [(32, 100), (64, 1000)]
)


# ------------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize(("seconds", "width"), [(0.5, 16), (9, 16), (10, 32), (199, 32), (200, 64), (1e6, 64)])
def test_the_highest_rung_that_sees_enough_images(seconds, width):
    rates = {32: 10.0, 64: 5.0}
    assert climb(LADDER, lambda rung: rates[rung.width], seconds, lambda: 10**9).width == width


@pytest.mark.parametrize(("images", "width"), [(1, 64), (0.9, 32), (0.05, 16)])
def test_few_images_keep_the_network_small(images, width):
    assert climb(LADDER, lambda rung: 1e9, 1e9, lambda: images).width == width


def test_nothing_above_a_rung_that_is_too_slow_is_timed():
    timed = []
    climb(LADDER, lambda rung: timed.append(rung.width) or 1.0, 50, lambda: pytest.fail("counted without need"))
    assert timed == [32]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(AUTOENCODERS[:2]), st.integers(4, 96), st.sampled_from([1, 3]))
def test_an_autoencoder_fits_any_resolution(rung, resolution, channels):
    keys = autoencoder_keys(rung, resolution)
    config = AutoencoderConfig(**DATA, resolution=resolution, image_channels=channels, quantizer="kl", **keys)
    config.validate()
    latents = Autoencoder(config).encode(torch.zeros(1, channels, resolution, resolution))
    assert latents.shape[1] == keys["latent_channels"] and resolution / latents.shape[-1] in (1, 2, 4, 8)
    assert latents.numel() < channels * resolution**2 or resolution % 4


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(UNETS[:2]), st.integers(2, 24))
def test_a_unet_fits_any_latents(rung, side):
    config = UNetConfig(**DATA, **unet_keys(rung, side))
    config.validate()
    assert max(config.unet_attention_levels) == len(config.unet_block_out_channels) - 1
    latents = torch.zeros(1, 4, side, side)
    assert make_unet(config, 4, side)(latents, torch.zeros(1)).sample.shape == latents.shape


def test_the_rungs_are_those_of_the_recipes():
    """The first ones are what docs/results/recipes/ was measured with."""
    assert autoencoder_keys(AUTOENCODERS[0], 32)["block_out_channels"] == [16, 32, 64]
    assert autoencoder_keys(AUTOENCODERS[0], 64)["block_out_channels"] == [16, 32, 64, 64]
    assert [autoencoder_keys(AUTOENCODERS[0], side)["latent_channels"] for side in (32, 64)] == [8, 16]
    unet = unet_keys(UNETS[0], 8)
    assert (unet["unet_block_out_channels"], unet["learning_rate"]) == ([64, 128], 1.4e-3)
    levels = {2: 2, 3: 1, 4: 2, 8: 2, 12: 3, 16: 3, 32: 4, 64: 4}
    assert {side: len(unet_keys(UNETS[0], side)["unet_block_out_channels"]) for side in levels} == levels
    for rungs in (AUTOENCODERS, UNETS):
        assert [rung.width for rung in rungs] == sorted(rung.width for rung in rungs)
        assert [rung.least_images for rung in rungs] == sorted(rung.least_images for rung in rungs)


# ---------------------------------------------------------------------------------------------------- the choice


def chosen(config, monkeypatch, seconds_of_a_step, processes=1, latents=None):
    monkeypatch.setattr(sizes, "seconds_of_step", lambda step, device: step() or seconds_of_a_step)
    accelerator = Accelerator(cpu=True)
    several = SimpleNamespace(
        device=accelerator.device, num_processes=processes, autocast=accelerator.autocast, gather=accelerator.gather
    )
    return sizes.choose_sizes(config, several, latents, lambda: 10**6)


@pytest.mark.parametrize(("seconds", "width"), [(10.0, 16), (0.05, 32)])
def test_the_autoencoder_follows_the_speed(seconds, width, monkeypatch):
    config = AutoencoderConfig(**DATA, resolution=8, image_channels=1, quantizer="kl")
    before = torch.random.get_rng_state()
    keys = chosen(config, monkeypatch, seconds)
    assert keys["block_out_channels"][0] == width and set(keys) == set(keys_to_size(config))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_given_keys_stay_and_processes_share_the_batch(monkeypatch):
    words = [word for key, value in DATA.items() for word in (f"--{key}", str(value).lower())]
    config = parse_config(UNetConfig, [*words, "--unet_layers_per_block", "3", "--learning_rate", "1e-5"])
    keys = chosen(config, monkeypatch, 10.0, processes=4, latents=(4, 8))
    assert not {"unet_layers_per_block", "learning_rate"} & set(keys)
    assert (keys["train_batch_size"], keys["unet_block_out_channels"]) == (16, [64, 128])


def test_given_keys_that_do_not_fit(monkeypatch):
    words = [word for key, value in DATA.items() for word in (f"--{key}", str(value).lower())]
    config = parse_config(UNetConfig, [*words, "--unet_norm_num_groups", "128"])
    with pytest.raises(UserError, match="auto_sizes: unet_norm_num_groups 128 does not divide"):
        chosen(config, monkeypatch, 10.0, latents=(4, 8))


def test_images_are_those_that_stage_1_has_noted_or_are_counted(photos, tmp_path):
    config = UNetConfig(train_data_dir=str(photos), output_dir=str(tmp_path))
    counted = images_of(config)
    assert 1 < counted < len(list(photos.rglob("*")))
    (tmp_path / "run.json").write_text(json.dumps({"autoencoder": {"training_images": 7}}), encoding="utf-8")
    assert images_of(config) == 7 and images_of(dataclasses.replace(config, autoencoder="other")) == counted


def test_any_resolution_is_accepted_where_the_levels_are_chosen():
    words = [word for key, value in DATA.items() for word in (f"--{key}", str(value).lower())]
    assert parse_config(AutoencoderConfig, [*words, "--resolution", "31"]).resolution == 31
    with pytest.raises(UserError, match="resolution 31 is not divisible by 4"):
        parse_config(AutoencoderConfig, [*words, "--resolution", "31", "--block_out_channels", "[8, 8, 8]"])


def test_it_needs_a_time():
    with pytest.raises(UserError, match="set train_minutes or train_hours"):
        parse_config(UNetConfig, ["--dataset_name", "embedded:mnist", "--auto_sizes", "true"])


# ---------------------------------------------------------------------------------------------------- a real run

STAGES = """import sys
sys.path.insert(0, {root!r})
import train_autoencoder, train_unet
from latent_ddpm.planning import sizes
from latent_ddpm.training.launch import run
from latent_ddpm.training.plan import Plan
keys = {{"max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 4, "self_guidance_steps": 0}}
stage = sys.argv.pop(1)
own = {{key: value for key, value in keys.items() if stage == "unet" or not key.startswith("self")}}
script = {{"autoencoder": train_autoencoder, "unet": train_unet}}[stage]
script.plan = lambda config, stage, accelerator, used: Plan(own, 1e4, 0.0, [(0, 0.1)])
for ladder in ("AUTOENCODERS", "UNETS"):
    setattr(sizes, ladder, getattr(sizes, ladder)[:1])
run(script.main)
"""


def test_both_stages_save_what_was_chosen_and_resume_with_it(photos, tmp_path):
    (tmp_path / "stages.py").write_text(STAGES.format(root=str(ROOT)), encoding="utf-8")
    common = {"train_data_dir": str(photos), "resolution": 12, "dataloader_num_workers": 0, "auto_sizes": True}
    common |= {"train_minutes": 7, "output_dir": str(tmp_path / "run")}
    sections = {"train_autoencoder": {"quantizer": "kl"}}
    sections["train_unet"] = {"ema_snapshots": 0, "num_validation_samples": 2, "num_inference_steps": 2}
    (tmp_path / "auto.yaml").write_text(yaml.safe_dump(common | sections), encoding="utf-8")
    for stage in ("autoencoder", "unet"):
        words = [tmp_path / "stages.py", stage, "--config", tmp_path / "auto.yaml"]
        done = Script(words).finish()
        assert done.returncode == 0, done.stderr[-2000:]
        assert "auto_sizes: " in done.stderr
        path = tmp_path / "run" / f"train_{stage}.yaml"
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))[f"train_{stage}"]
        rung = autoencoder_keys(AUTOENCODERS[0], 12) if stage == "autoencoder" else unet_keys(UNETS[0], 3)
        assert {key: saved[key] for key in rung} == rung and saved["max_train_steps"] == 4
    again = Script(words).finish()
    assert again.returncode == 0 and "all 4 steps are done" in again.stderr
    cached = Script(["scripts/cache_latents.py", "--config", tmp_path / "auto.yaml"]).finish()
    assert cached.returncode == 0 and "latents of" in cached.stderr, cached.stderr[-2000:]
    other = Script([*words, "--learning_rate", "0.5"]).finish()
    assert other.returncode == 2 and "learning_rate was" in other.stderr
    longer = ["--train_minutes", "null", "--max_train_steps", "5"]
    done = Script(["train_unet.py", "--config", path, *longer]).finish()
    assert done.returncode == 0 and "resumed from step 4" in done.stderr, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["unet"]["finished_at"] == 5
