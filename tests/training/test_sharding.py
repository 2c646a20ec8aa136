"""Sharding: a run with sharded weights gives the same result as one without."""

import re

import pytest
import torch
from conftest import (
    ROOT,
    checkpoint_tensors,
    launch,
    launch_cut,
    losses,
    run_in_one_and_two_processes,
)
from safetensors.torch import load_file

from latent_ddpm.errors import UserError
from latent_ddpm.training.sharding import Sharding, gather, part_of, whole_tensor, whole_unet

STEPS = {"max_train_steps": 6, "checkpointing_steps": 3, "validation_steps": 3, "unet_dropout": 0, "ema_snapshots": 2}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Stage 1, and stage 2 of 12 images a step in one process, by optimizer."""
    output_dir = tmp_path_factory.mktemp("run")
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true", **STEPS}
    launch("train_autoencoder.py", output_dir, **{**flags, "max_train_steps": 4, "unet_dropout": None,
                                                  "ema_snapshots": None})  # fmt: skip
    flags["autoencoder"] = output_dir / "autoencoder"
    for name in ("adamw", "muon"):
        launch("train_unet.py", output_dir / name, optimizer=name, **{**flags, "train_batch_size": 12})
    return output_dir, flags


def assert_close(one, other, atol):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value.float(), other[name].float(), rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize(
    ("kind", "optimizer"), [("fsdp2", "muon"), pytest.param("zero2", "adamw", marks=pytest.mark.long)]
)
def test_a_run_whose_weights_are_cut_is_the_same_run(trained, tmp_path, monkeypatch, kind, optimizer):
    """Begun by two processes with cut weights, gone on with in one without, ended cut again.

    With FSDP2, it ends compiled (graphs only, which is faster), accumulates gradients and recomputes activations.
    """
    monkeypatch.setenv("LATENT_DDPM_COMPILE_BACKEND", "aot_eager")
    output_dir, flags = trained
    alone, flags = output_dir / optimizer, {**flags, "optimizer": optimizer}
    two = {**flags, "train_batch_size": 6}
    assert "parameters, sharded over 2 processes" in launch_cut(
        kind, tmp_path, launcher=True, **{**two, "max_train_steps": 3}
    )
    assert_close(checkpoint_tensors(alone, "unet", 3), checkpoint_tensors(tmp_path, "unet", 3), 2e-5)
    launch("train_unet.py", tmp_path, **{**flags, "train_batch_size": 12, "max_train_steps": 4})
    if kind == "fsdp2":
        two |= {"torch_compile": "default", "gradient_checkpointing": "true", "train_batch_size": 3}
    text = launch_cut(kind, tmp_path, **two)
    assert "resumed from step 4" in text
    one, cut = losses(alone, "unet"), losses(tmp_path, "unet")
    assert list(cut) == list(range(1, 7)) and max(abs(one[s] - cut[s]) / one[s] for s in one) < 1e-4
    assert_close(checkpoint_tensors(alone, "unet", 6), checkpoint_tensors(tmp_path, "unet", 6), 1e-4)
    assert_close(*(load_file(f / "pipeline/unet/diffusion_pytorch_model.safetensors") for f in (alone, tmp_path)), 1e-4)
    names = [sorted(path.name for path in (folder / "ema").iterdir()) for folder in (alone, tmp_path)]
    assert set(names[0]) <= set(names[1])
    for name in names[0]:
        assert_close(load_file(alone / "ema" / name), load_file(tmp_path / "ema" / name), 1e-3)


SCRIPT = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
from pathlib import Path
from diffusers import UNet2DModel
from latent_ddpm.training.sharding import Sharding, gather, part_of, whole_tensor, whole_unet
count, folder = int(sys.argv[1]), Path(sys.argv[2])
if count > 1:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=4, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1)
    before = {{name: value.clone() for name, value in unet.state_dict().items()}}
    Sharding(True).cut(unet)
    first = dist.get_rank() == 0
    held = sum(p.to_local().numel() for p in unet.parameters())
    assert held < 0.6 * sum(p.numel() for p in unet.parameters())
    after = gather({{"of": [unet.state_dict(), 7]}}, keep=first)["of"]
    assert after[1] == 7
    whole = whole_unet(unet, keep=first)
    for name, value in before.items():
        assert after[0][name] is None if not first else torch.equal(after[0][name], value), name
        cut = unet.state_dict()[name]  # of 3 rows, 8, 32 and of one: uneven cuts too
        again = part_of(value, cut)
        assert torch.equal(again.to_local(), cut.to_local()) and torch.equal(whole_tensor(again), value), name
    assert (whole is None) != first
    if first:
        assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
        (folder / "passed").touch()
"""


def test_what_is_cut_and_gathered_is_what_it_was(tmp_path):
    run_in_one_and_two_processes(SCRIPT.format(root=str(ROOT)), tmp_path)
    assert (tmp_path / "passed").exists()


def test_what_is_whole_is_left_alone():
    tensor = torch.arange(6.0).view(3, 2)
    assert whole_tensor(tensor) is tensor and part_of(tensor, torch.empty(3, 2)) is tensor
    assert gather({"a": [tensor, None]}, keep=False) == {"a": [tensor, None]}
    network = torch.nn.Linear(2, 2)
    assert whole_unet(network, keep=False) is network


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "zero2.yaml"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version must be 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_other_ways_of_cutting_are_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(message)):
        Sharding.take_request()


@pytest.mark.parametrize(("said", "reshard"), [("true", True), ("false", False)])
def test_what_the_launcher_asks_for(monkeypatch, said, reshard):
    assert Sharding.take_request() is None
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": said}.items():
        monkeypatch.setenv(name, value)
    assert Sharding.take_request() == Sharding(reshard)
    assert Sharding.take_request() is None  # and accelerate will not see it
