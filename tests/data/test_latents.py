"""latent_ddpm.data.latents: encoded once, reused when nothing changed and never when something did."""

import json
import os
import resource
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import open_image_dataset
from latent_ddpm.data.images import to_float
from latent_ddpm.data.latents import build_cache, cache_key, open_files_limit, read_ahead
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.errors import UserError
from latent_ddpm.pretrained import hash_folder


def settings(**changes):
    base = {"resolution": 16, "image_channels": 3, "center_crop": True, "random_flip": True, "image_cache_gib": 1.0}
    base |= {"image_resize": None, "dataloader_num_workers": 0, "seed": 0}
    return SimpleNamespace(**{**base, **changes})


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(23):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


def dataset_of(images, tmp_path, **changes):
    bad = BadImages(tmp_path / "bad.jsonl", 23, 0.5)
    return open_image_dataset(
        FolderSource(images), settings(**changes), tmp_path / "cache", bad, train=False, is_main=True, wait=lambda: None
    )


def encode(batch):
    """Four numbers per image that tell it from all others and from its mirror image."""
    return torch.nn.functional.avg_pool2d(batch, 8) * 3 + 1


def build(dataset, tmp_path, key=None, encoder=encode, batch_size=4):
    key = key or {"flip": True, "name": "a"}
    device = torch.device("cpu")
    return build_cache(encoder, dataset, tmp_path / "latents", key, batch_size, device, lambda: None)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("latent_ddpm.data.latents.SHARD_IMAGES", 10)


def test_batches_are_normalized_encodings(images, tmp_path):
    dataset = dataset_of(images, tmp_path)
    cache = build(dataset, tmp_path)
    assert len(cache) == 23 and cache.shape == (3, 2, 2) and cache.flips
    assert [rows for rows, _ in cache.shards] == [10, 10, 3]
    rows = np.array([22, 0, 10, 9, 9])
    flipped = np.array([False, True, False, False, True])
    got = cache.batch(rows, flipped)
    pixels = to_float(torch.stack([dataset.get(int(index)) for index in cache.records(rows)["index"]]))
    expected = torch.stack([encode((p.flip(-1) if f else p)[None])[0] for p, f in zip(pixels, flipped, strict=True)])
    assert torch.allclose(got, (expected - cache.mean.view(3, 1, 1)) / cache.std, atol=5e-3)
    both = torch.cat([cache.batch(np.arange(23), np.full(23, f)) for f in (False, True)])
    assert both.mean((0, 2, 3)).abs().max() < 1e-3
    assert both.var((0, 2, 3), correction=0).mean() == pytest.approx(1, abs=1e-3)


def test_reused_when_finished_and_completed_when_not(images, tmp_path):
    dataset = dataset_of(images, tmp_path)
    calls = []

    def counting(batch):
        calls.append(len(batch))
        return encode(batch)

    first = build(dataset, tmp_path, encoder=counting)
    assert sum(calls) == 46
    calls.clear()
    again = build(dataset, tmp_path, encoder=counting)
    assert calls == [] and again.folder == first.folder
    (first.folder / "meta.json").unlink()
    (first.folder / "latents-00001.npy").unlink()  # as after a kill in the middle
    completed = build(dataset, tmp_path, encoder=counting)
    assert sum(calls) == 20
    rows = np.arange(23)
    assert torch.equal(completed.batch(rows), first.batch(rows)) and completed.std == first.std


def write_damaged(path, damage):
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        os.truncate(path, len(content) // 2)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "longer":
        path.write_bytes(content + b"0")
    else:
        content[-60] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["missing", "cut short", "emptied", "longer", "one bit"])
@pytest.mark.parametrize("finished", [True, False])
def test_damaged_shards_are_noticed_and_encoded_anew(images, tmp_path, damage, finished, caplog):
    dataset = dataset_of(images, tmp_path)
    first = build(dataset, tmp_path)
    wanted = first.batch(np.arange(23))
    path = first.folder / "latents-00001.npy"
    content, meta = path.read_bytes(), (first.folder / "meta.json").read_text()
    write_damaged(path, damage)
    if not finished:
        (first.folder / "meta.json").unlink()
    elif damage == "one bit":  # of the same length: noticed when it is read
        cache = build(dataset, tmp_path)
        cache.batch(np.array([0, 10, 22]))
        with pytest.raises(UserError, match=r"latents-00001.npy has changed since it was written \(row 9\)"):
            cache.batch(np.arange(23))
        assert not path.exists()
    again = build(dataset, tmp_path)
    assert path.read_bytes() == content and (first.folder / "meta.json").read_text() == meta
    assert torch.equal(again.batch(np.arange(23)), wanted)
    assert "latents-00001.npy" in caplog.text or (damage == "missing" and not finished)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"std": 1'])
def test_a_damaged_meta_file_is_made_anew(images, tmp_path, content):
    dataset = dataset_of(images, tmp_path)
    first = build(dataset, tmp_path)
    meta = (first.folder / "meta.json").read_text()
    (first.folder / "meta.json").write_text(content)
    build(dataset, tmp_path, encoder=lambda batch: pytest.fail("it was encoded again"))
    assert (first.folder / "meta.json").read_text() == meta


def test_what_a_model_was_normalized_with_stays_when_a_shard_is_encoded_anew(images, tmp_path):
    dataset = dataset_of(images, tmp_path)
    first = build(dataset, tmp_path)
    (first.folder / "latents-00001.npy").unlink()
    again = build(dataset, tmp_path, encoder=lambda batch: encode(batch) * 1.001)  # another device's arithmetic
    assert again.std == first.std and torch.equal(again.mean, first.mean)


def test_a_shard_that_vanishes_while_it_is_in_use(images, tmp_path):
    cache = build(dataset_of(images, tmp_path), tmp_path)
    (cache.folder / "latents-00002.npy").unlink()
    with pytest.raises(UserError, match="latents-00002.npy.*Run the same command again"):
        cache.batch(np.arange(23))


def test_few_files_are_open_at_once(images, tmp_path, monkeypatch):
    monkeypatch.setattr("latent_ddpm.data.latents.OPEN_SHARDS", 1)
    cache = build(dataset_of(images, tmp_path), tmp_path)
    rows = np.array([0, 22, 1, 10, 0, 22])
    assert torch.equal(cache.batch(rows), torch.cat([cache.batch(np.array([row])) for row in rows]))
    assert len(cache._open.files) == 1


def test_as_many_files_may_be_open_as_the_system_allows():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        assert open_files_limit(50) == 50
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 400  # enough as it was
        assert open_files_limit(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 800  # the rest is for other caches
        assert 100 <= open_files_limit(10**9) <= max(100, before[1] // 8)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_key_follows_weights_data_and_transform(images, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.safetensors").write_bytes(b"1")
    dataset = dataset_of(images, tmp_path)
    of_model = hash_folder(model)
    base = cache_key(of_model, dataset, 16, 3, True)
    json.dumps(base)
    assert cache_key(of_model, dataset_of(images, tmp_path), 16, 3, True) == base
    assert cache_key(of_model, dataset, 16, 3, False) != base
    assert cache_key(of_model, dataset, 32, 3, True) != base
    before = hash_folder(model)
    (model / "weights.safetensors").write_bytes(b"2")
    assert hash_folder(model) != before
    Image.new("RGB", (16, 16)).save(images / "00.png")
    assert cache_key(of_model, dataset_of(images, tmp_path), 16, 3, True)["dataset"] != base["dataset"]


def test_undecodable_images_are_left_out(images, tmp_path):
    (images / "05.png").write_bytes(b"not an image")
    for gib in (1.0, 0.0):  # decoded once and kept, or decoded as needed
        dataset = dataset_of(images, tmp_path, image_cache_gib=gib)
        cache = build(dataset, tmp_path, key={"flip": False, "gib": gib})
        assert len(cache) == 22
        assert [rows for rows, _ in cache.shards] == ([10, 10, 2] if gib else [9, 10, 3])
        names = {dataset.name(int(i)) for i in cache.records(np.arange(22))["index"]}
        assert "05.png" not in names and len(names) == 22
    assert "05.png" in (tmp_path / "bad.jsonl").read_text()


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_useless_latents_are_refused(images, tmp_path, value):
    with pytest.raises(UserError, match="cannot be used"):
        build(dataset_of(images, tmp_path), tmp_path, encoder=lambda batch: torch.full((len(batch), 3, 2, 2), value))


def test_read_ahead_reads_one_ahead_in_order():
    asked, threads = [], set()

    def read(number):
        asked.append(number)
        threads.add(threading.get_ident())
        return number * 10

    batches = read_ahead(read, 3, 7)
    assert next(batches) == 30
    deadline = time.monotonic() + 10
    while len(asked) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asked == [3, 4]  # the next one is read without having been asked for, and none after it
    assert list(batches) == [40, 50, 60]
    assert asked == [3, 4, 5, 6] and len(threads) == 1 and threads != {threading.get_ident()}
    assert list(read_ahead(read, 7, 7)) == []


def test_read_ahead_raises_where_the_batch_is_due():
    def read(number):
        if number == 2:
            raise UserError("row 2 is damaged")
        return number

    batches = read_ahead(read, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(UserError, match="row 2"):
        next(batches)
