"""Folders as people have them: what is trained on, what is left out and why, and what their names mean."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_sources import colour, config, fill, own_datasets_cache, png  # noqa: F401, the fixture

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.captions import read_captions
from latent_ddpm.data.dataset import open_image_dataset
from latent_ddpm.data.inspection.inspect import inspect
from latent_ddpm.data.sources import folder, metadata
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.data.sources.layout import read_layout, split_named
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.diffusion.conditions import ConditioningSource
from latent_ddpm.errors import UserError


def names(source) -> list[str]:
    return list(source.all_names())


def classes_by_name(source) -> dict[str, str | None]:
    """The class of each image by its name."""
    found = zip(source.all_names(), source.labels.tolist(), strict=True)
    return {name: source.class_names[label] if label >= 0 else None for name, label in found}


# ------------------------------------------------------------------------------------------------ what is left out


def test_thumbnails_trash_and_hidden_files_are_left_out_and_counted(tmp_path):
    fill(tmp_path, ["a.png", "b/c.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.png", "b/#recycle/x.png", "__MACOSX/._a.png"])
    fill(tmp_path, ["b/._c.png", ".thumbnails/a.png", "$RECYCLE.BIN/x.png"])
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "b/c.png"]
    assert {why: sorted(found) for why, found in source.findings.left_out.items()} == {
        "thumbnails, trash and snapshots of a system": ["$RECYCLE.BIN/", "@eaDir/", "__MACOSX/", "b/#recycle/"],
        "hidden files": ["b/._c.png"],
        "hidden folders": [".thumbnails/"],
    }
    assert source.findings.counts()["hidden files"] == 1


def test_the_output_of_runs_is_left_out(tmp_path):
    fill(tmp_path, ["a.png", "b.png", "run/samples/unet-00000002.png", "old/samples/unet-00000002.png"])
    (tmp_path / "old" / "train_unet.yaml").write_text("")
    train, validation = open_sources(
        config(train_data_dir=str(tmp_path), output_dir=str(tmp_path / "x" / ".." / "run"))
    )
    assert sorted(names(train) + names(validation)) == ["a.png", "b.png"]
    assert train.findings.left_out == {
        "of another run (an output_dir)": ["old/"],
        "the output_dir of this run": ["run/"],
    }
    with pytest.raises(UserError, match="is the output_dir of this run, so it cannot hold the images"):
        open_sources(config(train_data_dir=str(tmp_path), output_dir=str(tmp_path)))


def test_formats_that_nobody_reads_are_counted(tmp_path):
    fill(tmp_path, ["a.png", "photo", "b.jpg_large", "c.png.part"])
    (tmp_path / "raw.CR2").write_bytes(b"II*\0")
    (tmp_path / "notes").write_text("no image")
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "photo"]  # without an extension, the content counts
    reasons = {name: why for why, name in source.findings.all_left_out()}
    assert reasons["b.jpg_large"] == "PNG images with the unknown extension .jpg_large: rename them"
    assert reasons["c.png.part"] == "unfinished downloads" and "raw.CR2" in reasons and len(reasons) == 3


def test_a_named_pipe_does_not_stop_the_scan(tmp_path):
    fill(tmp_path, ["a.png"])
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c")
    assert FolderSource(tmp_path).findings.left_out == {"not regular files": ["b.png"]}


def test_conditioning_images_among_the_images_are_not_trained_on(tmp_path):
    fill(tmp_path, ["a.png", "b.png", "masks/a.png", "masks/b.png"])
    cfg = config(train_data_dir=str(tmp_path), conditioning_image_dir=str(tmp_path / "masks"))
    train, validation = open_sources(cfg)
    assert sorted(names(train) + names(validation)) == ["a.png", "b.png"]
    rows = "file_name,mask_file_name\na.png,masks/a.png\nb.png,masks\\b.png\n"
    (tmp_path / "metadata.csv").write_text(rows)
    source = FolderSource(tmp_path)
    assert names(source) == ["a.png", "b.png"] and source.image_columns() == ["mask"]
    assert source.load_column(1, "mask").getpixel((0, 0)) == (3, 0, 200)
    fill(tmp_path.parent, ["outside.png"])
    (tmp_path / "metadata.csv").write_text("file_name,mask_file_name\na.png,../outside.png\n")
    with pytest.raises(OSError, match="is outside of"):
        FolderSource(tmp_path).load_column(0, "mask")


def test_what_is_no_image_is_no_conditioning_image(tmp_path):
    fill(tmp_path, ["a.png", "a.jpg", "b.jpg", ".b.png"])
    for name in ("a.txt", "b.txt", "b.json"):
        (tmp_path / name).write_text("{}")
    cfg = UNetConfig(train_data_dir=str(tmp_path), conditions=["image"], conditioning_image_dir=str(tmp_path))
    source = ConditioningSource(FolderSource(tmp_path), cfg)
    assert [source.name(i) for i in range(3)] == ["a.jpg", "a.png", "b.jpg"]
    assert [source.load(i).getpixel((0, 0)) for i in range(3)] == [colour(1), colour(0), colour(2)]
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.webp").write_bytes(png(5))
    (tmp_path / "a.jpg").rename(tmp_path / "a.bmp")
    cfg.conditioning_image_dir = str(tmp_path)
    with pytest.raises(OSError, match="it could be a.bmp or a.webp"):
        fill(tmp_path / "other", ["a.png"])
        ConditioningSource(FolderSource(tmp_path / "other"), cfg).load(0)


# --------------------------------------------------------------------------------------------- splits and classes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("Training", "train"), ("train2017", "train"), ("train_images", "train"),
        ("trainA", "train"),
        ("valid", "validation"), ("val-set", "validation"), ("dev", "validation"), ("test", "test"),
        ("trainee", None), ("car", None), ("tests", None), ("value", None), ("", None),
    ],
)  # fmt: skip
def test_names_of_splits(name, split):
    assert split_named(name) == split


def test_folders_that_are_splits(tmp_path):
    fill(tmp_path, [f"{split}/{kind}/{k}.png" for split in ("train", "test") for kind in ("cat", "dog") for k in "123"])
    train, validation = open_sources(config(train_data_dir=str(tmp_path)))
    assert names(train) == [f"train/{kind}/{k}.png" for kind in ("cat", "dog") for k in "123"]
    assert names(validation) == [f"test/{kind}/{k}.png" for kind in ("cat", "dog") for k in "123"]
    assert train.class_names == validation.class_names == ["cat", "dog"]
    assert train.labels.tolist() == validation.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.findings.splits == {"train": (6, "training"), "test": (6, "validation")}
    assert "train is trained on (6), test" not in train.findings.notes[0]  # sorted by name
    assert "test is used for validation (6), train is trained on (6)" in train.findings.notes[0]


def test_validation_before_test_and_what_lies_outside(tmp_path):
    fill(tmp_path / "all", ["train2017/1.png", "val2017/2.png", "test2017/3.png", "test2017/4.png", "cover.png"])
    train, validation = open_sources(config(train_data_dir=str(tmp_path)))  # with a folder around everything
    assert (names(train), names(validation)) == (["all/train2017/1.png"], ["all/val2017/2.png"])
    assert train.findings.splits["test2017"] == (2, "not used")
    assert train.findings.left_out == {"outside of the folders of the splits": ["all/cover.png"]}


def test_classes_that_are_called_like_splits_stay_classes(tmp_path):
    fill(tmp_path, [f"{kind}/{k}.png" for kind in ("car", "ship", "train") for k in "12"])
    for cfg in (config(train_data_dir=str(tmp_path)), config(dataset_name=str(tmp_path))):
        train, validation = open_sources(cfg)
        assert len(train) + len(validation) == 6 and train.class_names == ["car", "ship", "train"]
        assert "Folders called train are taken for classes" in train.findings.notes[0]
    cfg = config(dataset_name=str(tmp_path), streaming=True, output_dir=str(tmp_path.parent / "run"))
    from latent_ddpm.data.sources.streaming import read_stream

    cfg.max_bad_image_share = 0
    read_stream(cfg, 0, 1, lambda: None)
    assert sum(map(len, open_sources(cfg))) == 6


def test_an_image_beside_the_folders_of_classes(tmp_path):
    fill(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png", "cover.png"])
    (tmp_path / "emu").mkdir()
    source = FolderSource(tmp_path)
    assert source.class_names == ["cat", "dog"] and classes_by_name(source)["cover.png"] is None
    assert source.findings.notes == ["1 image is in no folder of a class, and trains without one: cover.png."]
    assert source.findings.empty_classes == ["emu"]


def test_a_folder_around_everything_means_nothing(tmp_path):
    fill(tmp_path, ["set/cat/1.png", "set/dog/sub/1.png"])
    assert classes_by_name(FolderSource(tmp_path)) == {"set/cat/1.png": "cat", "set/dog/sub/1.png": "dog"}


@given(st.lists(st.lists(st.sampled_from(["train", "test", "val", "cat", "dog"]), max_size=3).map(tuple), min_size=1))
def test_every_layout_has_a_meaning(folders):
    layout = read_layout(folders)
    assert len(layout.roles) == len(layout.tops) == len(layout.classes) == len(folders)
    if layout.has_splits:
        assert "training" in layout.roles and None not in layout.roles
    else:
        assert all(role in (None, "training") for role in layout.roles)


def test_class_names_choose_and_order(tmp_path):
    fill(tmp_path, [f"{kind}/{k}.png" for kind in ("ape", "bee", "cow") for k in range(6)])
    train, validation = open_sources(config(train_data_dir=str(tmp_path), class_names=["cow", "ape"]))
    assert train.class_names == validation.class_names == ["cow", "ape"] and len(train) + len(validation) == 12
    assert all(classes_by_name(train)[name] == name.split("/")[0] for name in names(train))
    (left_out,) = train.findings.left_out.values()
    assert sorted(left_out) == [f"bee/{k}.png" for k in range(6)]
    with pytest.raises(UserError, match="class_names: the dataset has no class 'caw'. Did you mean 'cow'"):
        open_sources(config(train_data_dir=str(tmp_path), class_names=["caw"]))


def test_the_classes_of_a_folder_from_its_metadata(tmp_path):
    fill(tmp_path, [f"{k}.png" for k in range(4)])
    rows = [{"file_name": f"{k}.png", "kind": ["b", "a", None, "b"][k]} for k in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation = open_sources(config(train_data_dir=str(tmp_path), class_column="kind"))
    found = classes_by_name(train) | classes_by_name(validation)
    assert {k: v for k, v in found.items() if k in names(train)}.items() <= {
        "0.png": "b", "1.png": "a", "2.png": None, "3.png": "b"
    }.items()  # fmt: skip
    with pytest.raises(UserError, match="class_column: the dataset has no column 'species'.*: kind"):
        open_sources(config(train_data_dir=str(tmp_path), class_column="species"))


def test_labels_of_metadata_are_classes_where_folders_are_none(tmp_path):
    fill(tmp_path, [f"{k}.png" for k in range(6)])
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{k}.png,{'ab'[k % 2]}\n" for k in range(6)))
    train, validation = open_sources(config(train_data_dir=str(tmp_path)))
    found = classes_by_name(train) | classes_by_name(validation)
    assert found == {f"{k}.png": "ab"[k % 2] for k in range(6)}
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{k}.png,{k * 100}\n" for k in range(6)))
    assert open_sources(config(train_data_dir=str(tmp_path)))[0].class_names is None  # identifiers
    (tmp_path / "metadata.csv").unlink()
    for value in ("[1, 2]", "NaN"):  # no classes, and no reason to stop
        (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "label": {value}}}')
        assert open_sources(config(train_data_dir=str(tmp_path)))[0].class_names is None


def test_masks_among_the_images_are_told(tmp_path):
    fill(tmp_path, ["a.png", "a_mask.png", "b.jpg", "b-seg.png", "c_mask.png"])
    (note,) = FolderSource(tmp_path).findings.notes
    assert note.startswith("2 of the images look like masks of others (a_mask of a) and are trained on.")
    fill(tmp_path / "x", ["images/a.png", "masks/a.png"])
    assert "Images of the folder masks are trained on" in FolderSource(tmp_path / "x").findings.notes[0]


# --------------------------------------------------------------------------------------------------- text beside


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"a.txt": "a cat", "a.json": '{"url": "x"}'}, ["a cat"]),  # as img2dataset writes them
        ({"a.txt": "a cat", "a.json": '{"text": null}'}, ["a cat"]),
        ({"a.txt": "a cat", "a.json": '{"text": "a dog"}'}, "a dog"),
        ({"a.json": '{"caption": "a cat"}'}, "a cat"),
        ({"a.caption": "a cat"}, ["a cat"]),
        ({"a.png.txt": "a cat"}, ["a cat"]),
        ({"a.png.json": '{"text": "a cat"}'}, "a cat"),
        ({"metadata.csv": "file_name,text\n./a.png,a cat\n"}, "a cat"),
        ({"metadata.csv": "file_name;text\na.png;a cat, on a mat\n"}, "a cat, on a mat"),
        ({"metadata.csv": 'file_name, text\na.png, "a cat, on a mat"\n'}, "a cat, on a mat"),
        ({"metadata.csv": "file_name,text\na.png,\n", "a.txt": "a cat"}, ["a cat"]),
        ({"metadata.csv": "file_name,text\na.png,a cat\na.png,a pet\n"}, ["a cat", "a pet"]),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": "a cat"}\r\n\r\n'}, "a cat"),
        ({"a.txt": ""}, None),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_beside_the_images(tmp_path, files, caption, encoding):
    fill(tmp_path, ["a.png", "b.png"])
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    source = FolderSource(tmp_path)
    assert source.captions(0, "text") == caption and source.captions(1, "text") is None
    assert ("text" in source.caption_columns()) or caption is None


def test_names_that_are_composed_in_another_way(tmp_path):
    fill(tmp_path, ["cafe\u0301.png"])  # as macOS writes it
    (tmp_path / "metadata.csv").write_text("file_name,text\ncaf\u00e9.png,coffee\n", encoding="utf-8")
    assert FolderSource(tmp_path).captions(0, "text") == "coffee"


def test_parquet_metadata(tmp_path):
    import datasets

    fill(tmp_path, ["a.png"])
    datasets.Dataset.from_dict({"file_name": ["a.png"], "text": ["a cat"]}).to_parquet(tmp_path / "metadata.parquet")
    assert FolderSource(tmp_path).captions(0, "text") == "a cat"
    assert len(FolderSource(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.csv", b"file_name,text\na.png,a cat, on a mat\n", "line 2 has 3 values for 2 columns"),
        ("metadata.csv", b"image,text\na.png,a cat\n", "row 1 has no file_name. Its columns are image, text"),
        ("metadata.csv", b'file_name,text\na.png,"a cat\n', "metadata.csv cannot be read"),
        ("metadata.csv", b"file_name,text,text\na.png,a cat,b\n", "two columns are called 'text'"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "is not text in UTF-8 .byte 24.: save it as UTF-8"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\nnothing\n', "line 2 is no JSON"),
        ("metadata.jsonl", b"[]\n", "line 1 is no JSON object"),
        ("metadata.parquet", b"PAR1", "metadata.parquet cannot be read"),
        ("a.json", b"[1]", "a.json cannot be read: it holds no JSON object"),
        ("a.txt", "a cat".encode("utf-16-le"), "zero bytes, as UTF-16 has"),
    ],
)
def test_text_that_cannot_be_read_is_one_sentence(tmp_path, name, content, message):
    fill(tmp_path, ["a.png"])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        source = FolderSource(tmp_path)
        source.captions(0, "text")


def test_a_run_without_conditions_does_not_read_the_metadata(tmp_path, monkeypatch):
    """A million captions would take a minute and a gigabyte in each process."""
    fill(tmp_path, ["a.png", "b.png"])
    monkeypatch.setattr(metadata, "HEAD_BYTES", 60)
    monkeypatch.setattr(folder, "join_rows", lambda files: pytest.fail("they are read"))
    for encoding in ("utf-8", "utf-16"):  # whose last character may be cut in two
        text = "file_name,text\n" + "a.png,\u00e9\n" * 99
        (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
        assert metadata.column_names(tmp_path / "metadata.csv") == ["file_name", "text"]
        assert len(open_sources(config(train_data_dir=str(tmp_path)))[0]) == 1


def test_metadata_that_name_no_image_are_told(tmp_path, caplog):
    fill(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.PNG,a cat\n")
    FolderSource(tmp_path).captions(0, "text")
    assert "1 of 1 rows of the metadata name no image that is trained on, for example a.PNG" in caplog.text


# -------------------------------------------------------------------------------------------------- the same data


def test_the_same_data_at_another_place_or_with_other_times(tmp_path):
    def identity(folder):
        return FolderSource(folder).identity()

    fill(tmp_path / "a", ["x.png", "y/z.png"])
    fill(tmp_path / "b" / "c", ["x.png", "y/z.png"])
    first = identity(tmp_path / "a")
    assert identity(f"{tmp_path}/a/") == identity(tmp_path / "b" / "c") == first
    os.utime(tmp_path / "a" / "x.png", ns=(1, 1))
    assert identity(tmp_path / "a") == first
    (tmp_path / "a" / "x.png").write_bytes(png(7))
    assert identity(tmp_path / "a") != first
    (tmp_path / "b" / "c" / "x.png").rename(tmp_path / "b" / "c" / "w.png")
    assert identity(tmp_path / "b" / "c") != first


# ------------------------------------------------------------------------------------------------- any folder

WORDS = ["train", "test", "val", "cat", "dog", "images", "@eaDir", ".git", "a b", "[x]", "é", "100%", "#1"]
CONTENTS = {
    "image": png(1),
    "cut": png(1)[:40],
    "empty": b"",
    "text": b"a cat, on a mat",
    "latin": "é".encode("latin-1"),
    "utf-16": "a cat".encode("utf-16"),
    "json": b'{"text": "a cat"}',
    "list": b"[1]",
    "rows": b"file_name,text\n00.png,a cat\n",
    "wrong rows": b"file_name,text\n00.png,a cat, on a mat\n",
}
file_names = st.one_of(
    st.tuples(
        st.sampled_from(["00", "01", "é", ".a", "x y", "b.c"]),
        st.sampled_from([".png", ".PNG", ".jpg", ".heic", ".jxl", ".nef", ".txt", ".json", "", ".jpg_large", ".part"]),
    ).map("".join),
    st.sampled_from(["metadata.csv", "metadata.jsonl", "Thumbs.db", "train_unet.yaml"]),
)
trees = st.dictionaries(
    st.tuples(st.lists(st.sampled_from(WORDS), max_size=3), file_names).map(lambda pair: "/".join([*pair[0], pair[1]])),
    st.sampled_from(list(CONTENTS)),
    min_size=1,
    max_size=14,
)


def write_tree(root: Path, tree: dict[str, str]) -> None:
    for name, kind in tree.items():
        path = root / name
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(CONTENTS[kind])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees)
def test_each_image_of_any_folder_is_trained_on_or_counted(tree):
    with tempfile.TemporaryDirectory() as place:
        root, output = Path(place) / "photos", Path(place) / "run"
        root.mkdir()
        write_tree(root, tree)
        cfg = UNetConfig(train_data_dir=str(root), output_dir=str(output), resolution=4, dataloader_num_workers=0)
        try:
            sources = open_sources(cfg)
            bad = BadImages(output / "bad_images.jsonl", sum(map(len, sources)), 1.0)
            train, held_out = (
                open_image_dataset(source, cfg, output / "cache", bad, train=False, is_main=True, wait=lambda: None)
                for source in sources
            )
        except UserError as error:
            assert len(str(error).splitlines()) == 1
            return
        used = {images.name(i) for images in (train, held_out) for i in range(len(images))}
        left_out = {name for _, name in sources[0].findings.all_left_out()}
        unused = {top for top, (_, use) in sources[0].findings.splits.items() if use == "not used"}
        for path in root.rglob("*"):
            name = path.relative_to(root).as_posix()
            above = {f"{parent.as_posix()}/" for parent in Path(name).parents}
            if path.is_file() and path.read_bytes() == CONTENTS["image"] and path.name != "Thumbs.db":
                known = name in used or name in left_out or above & left_out or set(name.split("/")) & unused
                assert known or path.suffix in (".txt", ".json", ".csv", ".jsonl", ".yaml"), name
        assert not used & left_out and used.isdisjoint(bad.names())
        seen = inspect(sources, cfg, output / "cache", workers=0)  # of inspect_data: the same, to the image
        assert (seen.facts["training"], seen.facts["validation"]) == (len(train), len(held_out))
        assert sum(seen.facts["undecodable"].values()) == len(seen.bad) == len(bad.names())
        assert sum(seen.facts["left_out"].values()) == len(list(sources[0].findings.all_left_out()))
        try:
            read_captions(train, dataclasses.replace(cfg, conditions=["text"], text_encoder="x"))
        except UserError as error:
            assert len(str(error).splitlines()) == 1
