"""Bad images, datasets, and the order of batches."""

import io
import json
import multiprocessing
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import CACHED, LAZY, Flat, both_ways, colour, fill, opened, shown
from PIL import Image, ImageOps

from latent_ddpm.data import dataset
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ExampleOrder, eval_batches, train_batches
from latent_ddpm.data.images import resize_and_crop, to_float, to_uint8
from latent_ddpm.data.indexing import digest
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.errors import UserError
from latent_ddpm.random import Stream, permutation, scattered, uniform
from latent_ddpm.resizing import PYTORCH_RESIZES

needs_pytorch = pytest.mark.skipif(not PYTORCH_RESIZES, reason="PyTorch before 2.12 has no Lanczos filter")

# ---------------------------------------------------------------------------------------------------------------
# Bad images
# ---------------------------------------------------------------------------------------------------------------


def messy_folder(root: Path) -> Path:
    """Six images, of which three cannot be decoded."""
    fill(root, ["1.png", "3.png", "5.png"])
    (root / "2.png").write_text("this is not an image")
    (root / "4.jpg").write_bytes(b"")
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 90).save(buffer, "jpeg")
    (root / "6.jpg").write_bytes(buffer.getvalue()[:-2000])
    return root


def _add_many(path: Path, first: int) -> None:
    bad = BadImages(path, 1000, 1.0)
    for k in range(first, first + 200):
        bad.add(f"image {k}", "x" * 300)


def test_bad_images_of_several_processes_do_not_mix(tmp_path):
    path = tmp_path / "new" / "bad.jsonl"
    workers = [multiprocessing.Process(target=_add_many, args=(path, first)) for first in (0, 100)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(line) == {"name", "error"} for line in lines)
    assert BadImages(path, 1000, 1.0).names() == {f"image {k}" for k in range(300)}


def test_bad_images_are_entered_once(tmp_path):
    bad = BadImages(tmp_path / "bad.jsonl", 10, 1.0)
    bad.check()
    assert bad.names() == set()
    bad.add("a", "e")
    bad.add("a", "e")
    BadImages(tmp_path / "bad.jsonl", 10, 1.0).add("a", "e")  # a resumed run
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1
    bad.add("\udcff\n", "e")  # a file name that is not UTF-8
    assert bad.names() == {"a", "\udcff\n"}
    with open(bad.path, "a") as file:
        file.write('{"name": "cut sho')
    assert bad.names() == {"a", "\udcff\n"}


def test_too_many_bad_images(tmp_path):
    bad = BadImages(tmp_path / "bad.jsonl", 10, 0.2)
    bad.add("one.png", "empty")
    bad.add("two.png", "empty")
    bad.check()
    for name in ("three.png", "four.png"):
        bad.add(name, "empty")
    with pytest.raises(UserError) as caught:
        bad.check()
    for part in ("4 of 10", "0.2", "max_bad_image_share", "one.png", "three.png", str(bad.path)):
        assert part in str(caught.value)
    assert "four.png" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_leaves_bad_images_out(tmp_path, workers):
    source = FolderSource(messy_folder(tmp_path / "images"))
    bad = BadImages(tmp_path / "bad.jsonl", len(source), 0.5)
    dataset = opened(source, tmp_path, bad, dataloader_num_workers=workers)
    assert dataset.cached and len(dataset) == 3
    assert [dataset.name(i) for i in range(3)] == ["1.png", "3.png", "5.png"]
    assert [dataset.source_index(i) for i in range(3)] == [0, 2, 4]
    assert bad.names() == {"2.png", "4.jpg", "6.jpg"}
    errors = {e["name"]: e["error"] for e in map(json.loads, bad.path.read_text().splitlines())}
    assert "not an image" in errors["2.png"] and "empty" in errors["4.jpg"] and "truncated" in errors["6.jpg"]
    assert shown(next(eval_batches(dataset, 8))) == [0, 1, 2]
    # A second run finds the images in the cache and still lists the bad ones, in its own folder.
    again = BadImages(tmp_path / "second" / "bad.jsonl", len(source), 0.5)
    assert len(opened(source, tmp_path, again)) == 3
    assert again.names() == bad.names()
    with pytest.raises(UserError, match="3 of 6"):
        opened(source, tmp_path, BadImages(tmp_path / "third.jsonl", len(source), 0.4))


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_dataset_substitutes_the_next_image(tmp_path, workers):
    source = FolderSource(messy_folder(tmp_path / "images"))
    bad = BadImages(tmp_path / "bad.jsonl", len(source), 0.5)
    dataset = opened(source, tmp_path, bad, **LAZY)
    assert not dataset.cached and len(dataset) == 6
    (batch,) = eval_batches(dataset, 8, num_workers=workers)
    assert batch["index"].tolist() == [0, 2, 2, 4, 4, 0]
    assert batch["example"].tolist() == [0, 1, 2, 3, 4, 5]
    assert shown(batch) == [0, 1, 1, 2, 2, 0]
    assert bad.names() == {"2.png", "4.jpg", "6.jpg"}


def test_label_is_that_of_the_image_shown(tmp_path):
    dataset = opened(Flat(5, bad=(1,)), tmp_path, **LAZY)
    assert dataset[1] | {"image": None} == {"image": None, "index": 2, "label": 2, "example": 1}
    assert opened(Flat(5, bad=(1,)), tmp_path).labels.tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_lazy_dataset_of_bad_images_ends_cleanly(tmp_path, workers):
    dataset = opened(Flat(5, bad=(0, 1, 2, 3, 4)), tmp_path, BadImages(tmp_path / "bad.jsonl", 5, 0.5), **LAZY)
    with pytest.raises(UserError) as caught:
        list(train_batches(dataset, ExampleOrder(5, 0), 0, 1, 4, num_workers=workers))
    assert "max_bad_image_share" in str(caught.value) and "Traceback" not in str(caught.value)


def test_a_large_folder_of_bad_images_is_not_read_to_its_end(tmp_path):
    source = Flat(1000, bad=tuple(range(1000)))
    dataset = opened(source, tmp_path, BadImages(tmp_path / "bad.jsonl", 1000, 0.01), **LAZY)
    with pytest.raises(UserError, match="11 of 1000"):
        dataset[500]
    assert source.loads == 11


@both_ways
def test_nothing_but_bad_images(tmp_path, way):
    with pytest.raises(UserError, match="none of the 3 images"):
        opened(Flat(3, bad=(0, 1, 2)), tmp_path, **way)[0]
    assert not list((tmp_path / "cache").glob("*"))


# ---------------------------------------------------------------------------------------------------------------
# The cache of decoded images
# ---------------------------------------------------------------------------------------------------------------


def test_cache_is_written_once_and_shared(tmp_path):
    source = Flat(150)  # more than one batch of the loader that fills the cache
    first = opened(source, tmp_path)
    assert source.loads == 150
    assert isinstance(first.images, np.memmap) and first.images.shape == (150, 8, 8, 3)
    second = opened(source, tmp_path, train=False, random_flip=True, center_crop=False)
    assert source.loads == 150
    assert shown(second.gather(None, np.arange(150))) == list(range(150))
    assert first.fingerprint == second.fingerprint
    assert [first.source_index(i) for i in range(150)] == list(range(150))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_late_in_a_large_cache(tmp_path, workers):
    dataset = opened(Flat(200, bad=(3, 70, 150)), tmp_path, dataloader_num_workers=workers)
    good = [k for k in range(200) if k not in (3, 70, 150)]
    assert [dataset.source_index(i) for i in range(197)] == good
    assert dataset.labels.tolist() == [k % 3 for k in good]
    assert shown(dataset.gather(None, np.arange(197))) == good
    assert dataset.bad_images.names() == {"flat3", "flat70", "flat150"}


def test_cache_is_keyed_by_what_decides_its_pixels(tmp_path):
    made = [
        opened(Flat(4), tmp_path),
        opened(Flat(4), tmp_path, resolution=4),
        opened(Flat(4), tmp_path, image_channels=1),
        opened(Flat(5), tmp_path),
    ]
    assert len({dataset.fingerprint for dataset in made}) == 4
    assert len(list((tmp_path / "cache").iterdir())) == 4
    assert made[2][3]["image"].shape == (1, 8, 8)


def test_fingerprint_tells_whether_images_were_left_out(tmp_path):
    source = Flat(4, bad=(1,))
    assert opened(source, tmp_path).fingerprint != opened(source, tmp_path, **LAZY).fingerprint
    assert opened(Flat(4), tmp_path).fingerprint == opened(Flat(4), tmp_path, **LAZY).fingerprint


@pytest.mark.parametrize(
    ("changes", "train", "cached"),
    [
        ({}, True, True),
        ({"center_crop": False}, True, False),
        ({"center_crop": False}, False, True),
        ({"image_cache_gib": 4 * 8 * 8 * 3 / 2**30}, True, True),
        ({"image_cache_gib": (4 * 8 * 8 * 3 - 1) / 2**30}, True, False),
    ],
)
def test_when_images_are_held_decoded(tmp_path, changes, train, cached):
    assert opened(Flat(4), tmp_path, train=train, **changes).cached == cached


def test_a_killed_writer_leaves_no_cache(tmp_path):
    class Killed(Flat):
        def name(self, i):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(Killed(4, bad=(3,)), tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_run_wins(tmp_path):
    class Overtaken(Flat):
        def load(self, i, at_least=None):
            if i == 3:
                opened(Flat(4), tmp_path)
            return super().load(i)

    assert shown(opened(Overtaken(4), tmp_path).gather(None, np.arange(4))) == [0, 1, 2, 3]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_processes_wait_for_the_main_one(tmp_path):
    source, barrier, results = Flat(4), threading.Barrier(2, timeout=20), []

    def other():
        results.append(opened(source, tmp_path, is_main=False, wait=barrier.wait))

    thread = threading.Thread(target=other)
    thread.start()
    main = opened(source, tmp_path, wait=barrier.wait)
    thread.join()
    assert source.loads == 4
    np.testing.assert_array_equal(main.images, results[0].images)


def test_cache_on_a_disk_of_its_own_is_explained(tmp_path):
    with pytest.raises(UserError, match="share"):
        opened(Flat(4), tmp_path, is_main=False)


def test_damaged_cache_is_named(tmp_path):
    opened(Flat(4), tmp_path)
    (file,) = (tmp_path / "cache").glob("*/images.npy")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"damaged.*delete"):
        opened(Flat(4), tmp_path)


def test_full_disk_is_told_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="image_cache_gib"):
        opened(Flat(4), tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Images as tensors
# ---------------------------------------------------------------------------------------------------------------


def test_float_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    floats = to_float(values)
    assert floats.dtype == torch.float32
    assert floats[[0, 255]].tolist() == [-1, 1] and floats[51] == pytest.approx(-0.6)
    assert torch.equal(to_uint8(floats), values)
    assert torch.equal(to_uint8(floats.to(torch.float64)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.001, 0.006])).tolist() == [0, 255, 128, 128]


@both_ways
def test_plain_item(tmp_path, way):
    dataset = opened(Flat(5), tmp_path, random_flip=True, **way)
    item = dataset[4]
    assert item["image"].shape == (3, 8, 8) and item["image"].dtype == torch.uint8
    assert item["image"].is_contiguous()
    assert item["image"][:, 0, 0].tolist() == list(colour(4))
    assert (item["index"], item["label"], item["example"]) == (4, 1, 4)
    with pytest.raises(IndexError):
        dataset[5]
    item["image"].fill_(0)  # writable, and its own
    assert dataset[4]["image"][2, 0, 0] == 200


@pytest.mark.parametrize(("channels", "strides"), [(1, (64, 1, 8, 1)), (3, (192, 64, 8, 1))])
def test_strides_of_a_batch_do_not_change(tmp_path, channels, strides):
    """Convolutions round by them, so a resumed run's bits depend on them."""
    dataset = opened(Flat(5), tmp_path, image_channels=channels, random_flip=True)
    batch = dataset.gather(np.arange(4), np.arange(4))["image"]
    assert batch.shape == (4, channels, 8, 8) and batch.stride() == strides


class Ramp(ImageSource):
    """Images whose red is the column and green the row."""

    fingerprint = "ramp"

    def __len__(self):
        return 4

    def load(self, i, at_least=None):
        y, x = np.mgrid[:8, :40]
        return Image.fromarray(np.stack((x, y, 0 * x + i), -1).astype(np.uint8))

    def name(self, i):
        return f"ramp{i}"


def test_augmentation_follows_from_the_example_number(tmp_path):
    dataset = opened(Ramp(), tmp_path, center_crop=False, random_flip=True)
    numbers = torch.arange(1000, 1064)
    crops = uniform(3, Stream.CROP, numbers, (2,))
    flips = uniform(3, Stream.FLIP, numbers) < 0.5
    assert 16 < flips.sum() < 48
    for n, crop, flip in zip(numbers.tolist(), crops.tolist(), flips.tolist(), strict=True):
        red = dataset[n, 2]["image"][0, 0]
        left = round(32 * crop[0])
        columns = list(range(left, left + 8))
        assert red.tolist() == (columns[::-1] if flip else columns)
        assert torch.equal(dataset.get(2, tuple(crop), flip), dataset[n, 2]["image"])
        assert dataset[n, 2]["example"] == n
    assert dataset[2]["image"][0, 0, 0] == 16  # without a number: centre, as it is


def test_a_dataset_not_for_training_augments_nothing(tmp_path):
    dataset = opened(Ramp(), tmp_path, train=False, center_crop=False, random_flip=True)
    for n in range(20):
        assert torch.equal(dataset[n, 1]["image"], dataset[1]["image"])


def test_get_from_a_cached_dataset_honours_crop_and_flip(tmp_path):
    cached, lazy = opened(Ramp(), tmp_path), opened(Ramp(), tmp_path, **LAZY)
    for crop in ((0.5, 0.5), (0.0, 0.5), (1.0, 0.5)):
        for flip in (False, True):
            assert torch.equal(cached.get(1, crop, flip), lazy.get(1, crop, flip))


def photos(folder: Path) -> FolderSource:
    """Five JPEG files of noise, larger than the resolution; the last one is stored on its side."""
    folder.mkdir()
    for k in range(5):
        tags = Image.Exif()
        tags[0x0112] = 6 if k == 4 else 1
        pixels = np.random.default_rng(k).integers(0, 256, (19, 27, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.jpg", quality=95, exif=tags)
    return FolderSource(folder)


@both_ways
@pytest.mark.parametrize("library", ["pillow", pytest.param("pytorch", marks=needs_pytorch)])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_is_resized_and_mirrored(tmp_path, way, library, workers):
    way = way | {"random_flip": True, "image_resize": library, "dataloader_num_workers": workers}
    dataset = opened(photos(tmp_path / "photos"), tmp_path, **way)
    (batch,) = train_batches(dataset, ExampleOrder(5, 3), 0, 1, 20, num_workers=workers)
    flips = uniform(3, Stream.FLIP, batch["example"]) < 0.5
    assert 0 < flips.sum() < 20
    for image, index, flip in zip(batch["image"], batch["index"], flips, strict=True):
        upright = ImageOps.exif_transpose(Image.open(tmp_path / "photos" / f"{index}.jpg"))
        square = resize_and_crop(upright, 8, library=library)
        assert torch.equal(image, torch.from_numpy((square[:, ::-1] if flip else square).transpose(2, 0, 1).copy()))


@needs_pytorch
def test_each_library_has_its_own_cache_and_none_from_before_colours_were_converted(tmp_path):
    source = photos(tmp_path / "photos")
    by_pillow, by_pytorch, by_default = (
        opened(source, tmp_path, image_resize=library) for library in ("pillow", "pytorch", None)
    )
    earlier = {digest(source.fingerprint, 8, 3, version) for version in (1, 2)}
    assert len(earlier | {by_pillow.fingerprint, by_pytorch.fingerprint}) == 4
    assert by_default.fingerprint == by_pytorch.fingerprint
    assert not np.array_equal(by_pillow.images, by_pytorch.images)


def test_lazy_dataset_can_be_sent_to_a_worker(tmp_path):
    source = FolderSource(fill(tmp_path / "images", ["1.png", "2.png"]))
    dataset = pickle.loads(pickle.dumps(opened(source, tmp_path, **LAZY)))
    assert dataset[1]["image"][:, 0, 0].tolist() == list(colour(1))


# ---------------------------------------------------------------------------------------------------------------
# The order of examples, and batches
# ---------------------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 50), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_epoch_visits_every_image_once(length, seed, epoch):
    order = ExampleOrder(length, seed)
    numbers = np.arange(epoch * length, (epoch + 1) * length)
    indices = order.indices(numbers)
    assert sorted(indices) == list(range(length))
    assert indices.tolist() == [order.order(int(n)) for n in numbers] == permutation(seed, epoch, length).tolist()


@given(numbers=st.lists(st.integers(0, 10**9), max_size=20), length=st.integers(1, 7))
def test_any_numbers_in_any_order(numbers, length):
    order = ExampleOrder(length, 5)
    assert order.indices(np.array(numbers, np.int64)).tolist() == [order.order(n) for n in numbers]


def test_epochs_differ_and_permutations_are_kept(monkeypatch):
    calls = []
    monkeypatch.setattr(dataset, "permutation", lambda *a: calls.append(a) or permutation(*a))
    order = ExampleOrder(20, 1)
    epochs = [order.indices(np.arange(20) + 20 * e).tolist() for e in (0, 1, 0, 1)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert calls == [(1, 0, 20), (1, 1, 20)]
    assert pickle.loads(pickle.dumps(order)).order(33) == order.order(33)
    with pytest.raises(ValueError):
        ExampleOrder(0, 1)


def test_long_orders_are_no_tables(monkeypatch):
    monkeypatch.setattr(dataset, "ORDER_TABLE", 19)
    monkeypatch.setattr(dataset, "ORDER_PART", 7)
    monkeypatch.setattr(dataset, "permutation", lambda *_: pytest.fail("a table was made"))
    order = ExampleOrder(20, 1)
    epochs = [order.indices(np.arange(20) + 20 * epoch).tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert epochs == [scattered(1, epoch, 20, np.arange(20)).tolist() for epoch in range(3)]
    assert order.indices(np.array([25, 3, 39])).tolist() == [epochs[1][5], epochs[0][3], epochs[1][19]]


def join(batches: list[dict]) -> dict:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Datasets by length, lazy and cached."""
    folder = tmp_path_factory.mktemp("pairs")
    return {
        n: [opened(Flat(n, size=(11, 8)), folder, random_flip=True, **way) for way in (LAZY, CACHED)]
        for n in (1, 2, 5, 13)
    }


@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 2, 5, 13]),
    cached=st.booleans(),
    first=st.integers(0, 4),
    steps=st.integers(1, 4),
    batch_size=st.integers(1, 6),
    processes=st.integers(1, 4),
    accumulation=st.integers(1, 3),
)
def test_processes_share_the_batches_of_one(pairs, length, cached, first, steps, batch_size, processes, accumulation):
    dataset, order = pairs[length][cached], ExampleOrder(length, 3)
    span = (first, first + steps)
    alone = list(train_batches(dataset, order, *span, batch_size * processes, accumulation=accumulation))
    shares = [
        list(train_batches(dataset, order, *span, batch_size, p, processes, accumulation)) for p in range(processes)
    ]
    assert [len(share) for share in shares] == [steps * accumulation] * processes
    for micro, batch in enumerate(alone):
        assert equal(batch, join([share[micro] for share in shares]))
    numbers = join(alone)["example"]
    per_step = batch_size * processes * accumulation
    assert numbers.tolist() == list(range(first * per_step, (first + steps) * per_step))
    # One large batch a step sees what accumulated ones see.
    assert equal(join(alone), join(list(train_batches(dataset, order, *span, per_step))))


@settings(max_examples=40, deadline=None)
@given(
    length=st.sampled_from([1, 2, 5, 13]),
    cached=st.booleans(),
    last=st.integers(1, 6),
    resume=st.integers(0, 6),
    batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 2),
)
def test_resuming_gives_the_rest(pairs, length, cached, last, resume, batch_size, accumulation):
    dataset, order = pairs[length][cached], ExampleOrder(length, 3)
    whole = list(train_batches(dataset, order, 0, last, batch_size, 1, 3, accumulation))
    rest = list(train_batches(dataset, ExampleOrder(length, 3), resume, last, batch_size, 1, 3, accumulation))
    assert len(rest) == max(0, last - resume) * accumulation
    assert all(equal(a, b) for a, b in zip(rest, whole[resume * accumulation :], strict=True))


@pytest.mark.parametrize("length", [1, 2, 5, 13])
def test_cached_and_lazy_batches_are_equal(pairs, length):
    lazy, cached = pairs[length]
    assert cached.cached and not lazy.cached
    order = ExampleOrder(length, 3)
    expected = list(train_batches(lazy, order, 2, 5, 6))
    for batch in (expected, list(train_batches(lazy, order, 2, 5, 6, num_workers=2))):
        assert all(equal(a, b) for a, b in zip(batch, train_batches(cached, order, 2, 5, 6), strict=True))
    batch = expected[0]
    assert batch["image"].shape == (6, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert all(batch[key].dtype == torch.int64 for key in ("index", "label", "example"))
    assert shown(batch) == batch["index"].tolist() == order.indices(np.arange(12, 18)).tolist()
    assert batch["label"].tolist() == [i % 3 for i in batch["index"].tolist()]


def test_lazy_and_cached_mirror_the_same_examples(tmp_path):
    order = ExampleOrder(4, 3)
    lazy, cached = (
        join(list(train_batches(opened(Ramp(), tmp_path, random_flip=True, **way), order, 0, 8, 8)))
        for way in (LAZY, CACHED)
    )
    assert equal(lazy, cached)
    mirrored = lazy["image"][:, 0, 0, 0] > lazy["image"][:, 0, 0, 7]
    assert torch.equal(mirrored, uniform(3, Stream.FLIP, torch.arange(64)) < 0.5)
    assert (lazy["label"] == -1).all()


@both_ways
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_eval_batches_deal_every_image_once(tmp_path, way, processes):
    dataset = opened(Flat(11), tmp_path, train=False, random_flip=True, center_crop=False, **way)
    shares = [list(eval_batches(dataset, 4, p, processes)) for p in range(processes)]
    for p, share in enumerate(shares):
        assert [b["index"].tolist() for b in share] == [
            list(range(4 * k, min(4 * k + 4, 11))) for k in range(3) if k % processes == p
        ]
    everything = join([batch for share in shares for batch in share])
    assert sorted(shown(everything)) == list(range(11))
    assert torch.equal(everything["example"], everything["index"])


@both_ways
def test_evaluation_of_training_images_does_not_mirror(tmp_path, way):
    (batch,) = eval_batches(opened(Ramp(), tmp_path, train=True, random_flip=True, **way), 4)
    assert batch["image"][:, 0, 0, 0].tolist() == [16] * 4


def test_a_process_without_images_gets_no_batch(tmp_path):
    assert list(eval_batches(opened(Flat(2), tmp_path), 4, 1, 2)) == []


@both_ways
def test_batches_leave_the_global_random_state_alone(tmp_path, way):
    torch.manual_seed(0)
    dataset = opened(Flat(5), tmp_path, random_flip=True, **way)
    before = torch.get_rng_state()
    list(train_batches(dataset, ExampleOrder(5, 3), 0, 3, 2))
    list(eval_batches(dataset, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_order_of_another_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="order"):
        list(train_batches(opened(Flat(5), tmp_path), ExampleOrder(6, 3), 0, 1, 2))
