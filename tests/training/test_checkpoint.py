"""latent_ddpm.training.checkpoint: whole or not at all, found by itself, damage reported and survived."""

import json
import logging
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from latent_ddpm.errors import UserError
from latent_ddpm.training.checkpoint import CheckpointFolder, DamagedCheckpoint, join_state, split_state

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.integers(1, 3).map(lambda n: torch.arange(n, dtype=torch.float64)),
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text("abc", max_size=3), st.integers(0, 9)), inner)
    ),
    max_leaves=8,
)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b and type(a) is type(b)


@settings(max_examples=60, deadline=None)
@given(state=st.dictionaries(st.text("abc", min_size=1, max_size=3), states, max_size=4))
def test_any_state_survives_parting_and_joining(state):
    tensors, skeleton = split_state(state)
    assert equal(state, join_state(tensors, json.loads(json.dumps(skeleton))))


def make_state(step):
    torch.manual_seed(step)
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    return {"step": step, "model": layer.state_dict(), "optimizer": optimizer.state_dict(), "scaler": {}, "none": None}


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "run" / "checkpoints", "unet", total_limit=2)


def test_optimizer_state_loads_back(folder):
    state = make_state(3)
    folder.save(3, state)
    loaded = folder.resume("latest")
    assert loaded["step"] == 3 and loaded["scaler"] == {} and loaded["none"] is None
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5)
    layer.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    moments = optimizer.state_dict()["state"]
    for key, values in state["optimizer"]["state"].items():
        assert all(torch.equal(values[name], moments[key][name]) for name in values)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_limit_order_and_other_stages(folder):
    for step in (5, 90, 100):
        folder.save(step, make_state(step))
    other = CheckpointFolder(folder.folder, "autoencoder", 2)
    other.save(7, make_state(7))
    assert [path.name for path in folder.all()] == ["unet-00000090", "unet-00000100"]
    assert folder.resume("latest")["step"] == 100
    assert folder.resume("unet-00000090")["step"] == 90
    assert folder.resume(str(folder.folder / "unet-00000090"))["step"] == 90
    assert other.resume("latest")["step"] == 7


def test_a_run_that_began_from_anothers_checkpoint_goes_on_from_its_own(folder, tmp_path):
    theirs = folder.save(5, make_state(5))
    mine = CheckpointFolder(tmp_path / "other" / "checkpoints", "unet", 2)
    assert mine.resume(str(theirs))["step"] == 5
    for step in (6, 7):
        mine.save(step, make_state(step))
    assert mine.resume(str(theirs))["step"] == 7
    assert mine.resume(str(mine.folder / "unet-00000006"))["step"] == 6


def test_no_pickle(folder):
    path = folder.save(1, make_state(1))
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest", "empty-manifest"])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(folder, damage, caplog):
    folder.save(1, make_state(1))
    newest = folder.save(2, make_state(2))
    weights = newest / "state.safetensors"
    if damage == "truncate":
        os.truncate(weights, weights.stat().st_size // 2)
    elif damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        (newest / "state.json").unlink()
    elif damage == "manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("")
    with caplog.at_level(logging.WARNING):
        assert folder.resume("latest")["step"] == 1
    assert "unet-00000002 is damaged" in caplog.text
    with pytest.raises(UserError, match="damaged"):
        folder.resume("unet-00000002")
    with pytest.raises(DamagedCheckpoint):
        folder.load(newest)


def test_all_damaged(folder):
    path = folder.save(1, make_state(1))
    (path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="All 1 checkpoints"):
        folder.resume("latest")


def test_a_failed_write_leaves_the_old_ones(folder, monkeypatch):
    folder.save(1, make_state(1))

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("latent_ddpm.training.checkpoint.save_file", full_disk)
    with pytest.raises(UserError, match="No space left on device.*Earlier checkpoints are untouched"):
        folder.save(2, make_state(2))
    assert [path.name for path in folder.folder.iterdir()] == ["unet-00000001"]
    assert folder.resume("latest")["step"] == 1


def test_leftovers_of_a_crash_are_ignored_and_removed(folder):
    leftover = folder.folder / ".unet-00000002.99999.tmp"
    leftover.mkdir(parents=True)
    assert folder.resume("latest") is None
    folder.save(1, make_state(1))
    assert not leftover.exists()


def test_starting_afresh_over_checkpoints_is_refused(folder):
    assert folder.resume(None) is None
    folder.save(1, make_state(1))
    with pytest.raises(UserError, match="--resume_from_checkpoint latest"):
        folder.resume(None)
    with pytest.raises(UserError, match="no checkpoint unet-7"):
        folder.resume("unet-7")
