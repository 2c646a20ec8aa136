"""Streams: a dataset that is read once, by any number of processes, however often it is killed."""

import http.server
import io
import json
import random
import sys
import tarfile
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import checkpoint_tensors, environment, finished_script, launch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sources import png
from PIL import Image

from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import open_image_dataset
from latent_ddpm.data.sources import hub, streaming
from latent_ddpm.data.sources.hub import load_splits
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import Squares, read_stream, stream_folder, undecodable
from latent_ddpm.errors import UserError

IMAGES = (9, 4, 6)  # of the tar files
BROKEN = 11  # in the second file


def write_tars(folder, images=IMAGES, broken=(BROKEN,)):
    """WebDataset shards of flat images, numbered through by their colours, with classes; returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(images):
        with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
            for _ in range(count):
                content = b"no image" if number in broken else png(number, (20, 16))
                for extension, data in (("png", content), ("cls", str(number % 3).encode())):
                    entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
                number += 1
    return str(folder / f"train-{{00..{len(images) - 1:02d}}}.tar")


def config(output_dir, dataset_name, **changes):
    common = {"resolution": 8, "image_column": "png", "streaming": True, "max_bad_image_share": 0.1}
    made = AutoencoderConfig(output_dir=str(output_dir), dataset_name=dataset_name, **{**common, **changes})
    made.validate()
    return made


def read(cfg, processes=1):
    """As if by so many processes, one after the other; the first, which sums up, comes last."""
    for rank in reversed(range(processes)):
        read_stream(cfg, rank, processes, lambda: None)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(streaming, "PART_IMAGES", 4)
    monkeypatch.setattr(streaming, "PAUSE", 0.01)


def test_every_image_is_there_once_and_a_bad_one_is_named(tmp_path):
    cfg = config(tmp_path / "out", write_tars(tmp_path / "data"))
    read(cfg)
    train, validation = open_sources(cfg)
    assert undecodable(cfg) == 1 and len(train) + len(validation) == sum(IMAGES) - 1
    assert train.class_names == ["0", "1", "2"]
    bad = json.loads((tmp_path / "out" / "bad_images.jsonl").read_text())
    assert bad["name"] == f"train[1:{BROKEN - IMAGES[0]}]" and "not an image" in bad["error"]
    seen = []
    for source in (train, validation):
        images = open_image_dataset(source, cfg, tmp_path / "none", BadImages(tmp_path / "bad", 1, 1), True, True, None)
        assert images.cached and not (tmp_path / "none").exists()  # they are on the disk once, not twice
        batch = images.gather(None, np.arange(len(source)))
        numbers = batch["image"][:, 0, 4, 4].tolist()
        assert batch["image"].shape[1:] == (3, 8, 8) and batch["label"].tolist() == [n % 3 for n in numbers]
        assert [source.load(i).getpixel((0, 0))[0] for i in range(len(source))] == numbers
        seen += numbers
        names = [source.name(i) for i in range(len(source))]
        assert len(set(names)) == len(source) and list(source.all_names()) == names
    assert sorted(seen) == sorted(set(range(sum(IMAGES))) - {BROKEN})


def test_parts_of_large_images_have_fewer_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PART_BYTES", 3 * 8 * 8 * 3 + 5)  # three squares of 8 pixels
    cfg = config(tmp_path / "out", write_tars(tmp_path / "data"))
    read(cfg)
    files = sorted(stream_folder(cfg).glob("train-00000-*.npy"))
    assert [len(np.load(path)) for path in files] == [3, 3, 3, 0]
    train, held_out = open_sources(cfg)
    assert len(train) + len(held_out) == sum(IMAGES) - 1
    whole = train.source
    names = [whole.name(i) for i in range(len(whole))]
    assert names[3] == "train[0:3]" and len(set(names)) == len(whole) and list(whole.all_names()) == names


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_any_number_of_processes_reads_the_same(tmp_path, processes):
    pattern = write_tars(tmp_path / "data")
    one, many = (config(tmp_path / name, pattern) for name in ("one", "many"))
    read(one)
    read(many, processes)
    assert contents(stream_folder(one)) == contents(stream_folder(many))


@pytest.mark.parametrize("survivors", range(7))
def test_a_reading_that_was_killed_goes_on_where_it_was(tmp_path, monkeypatch, survivors):
    pattern = write_tars(tmp_path / "data")
    whole, killed = (config(tmp_path / name, pattern) for name in ("whole", "killed"))
    read(whole)
    written, decoded = [], []
    write_part, decode = streaming._write_part, streaming._decode

    def write(*arguments):
        if len(written) == survivors:
            raise KeyboardInterrupt
        written.append(arguments[0].name)
        write_part(*arguments)

    monkeypatch.setattr(streaming, "_write_part", write)
    parts = len(list(stream_folder(whole).glob("*.npy")))
    assert parts == 3 + 2 + 2
    with pytest.raises(KeyboardInterrupt):
        read(killed)
    (stream_folder(killed) / "train-00001-00000.npy").touch()  # killed between a part and its sidecar
    monkeypatch.setattr(streaming, "_write_part", write_part)
    monkeypatch.setattr(streaming, "_decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    read(killed, 2)
    assert contents(stream_folder(whole)) == contents(stream_folder(killed))
    kept = sum(json.loads((stream_folder(killed) / name).with_suffix(".json").read_text())["read"] for name in written)
    assert len(decoded) == sum(IMAGES) - kept
    before = contents(stream_folder(killed))
    monkeypatch.setattr(streaming, "load_splits", None)  # what has been read is not asked for again
    read(killed)
    assert contents(stream_folder(killed)) == before


@pytest.mark.parametrize("size", [1400, 2048, 700])
def test_a_tar_file_that_is_cut_short_is_not_taken_for_a_short_one(tmp_path, size):
    pattern = write_tars(tmp_path / "data")
    path = tmp_path / "data" / "train-01.tar"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="train-01.tar is truncated"):
        read(config(tmp_path / "out", pattern))


def test_a_stream_that_breaks_off_is_gone_on_with(tmp_path, monkeypatch):
    cfg = config(tmp_path / "out", write_tars(tmp_path / "data", broken=()))
    path = tmp_path / "data" / "train-01.tar"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with (
        monkeypatch.context() as patched,
        pytest.raises(UserError, match="broke off 5 times .*What was read is kept; start"),
    ):
        patched.setattr(hub, "_check_tar_ends", lambda path: None)  # as if it were on a server
        read(cfg)
    with pytest.raises(UserError, match="not been read to its end"):
        open_sources(cfg)
    path.write_bytes(content)
    read(cfg)
    assert sum(map(len, open_sources(cfg))) == sum(IMAGES)


def test_a_stream_that_breaks_at_many_places_is_read_to_its_end(monkeypatch):
    """TRIES is for one place: as long as something comes of each try, a file is not given up."""
    failures, begun = 3 * streaming.TRIES, []

    def read_file(*_):
        begun.append(1)
        yield from range(1, len(begun) + 1)
        if len(begun) <= failures:
            raise streaming.BrokenStream("again")

    monkeypatch.setattr(streaming, "_read_file", read_file)
    monkeypatch.setattr(streaming, "PAUSE", 0.0)
    config = AutoencoderConfig(dataset_name="x")
    found = list(streaming._read_patiently(None, "train", 0, 1, None, Path(), config))
    assert len(begun) == found[-1] == failures + 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_column": "image"}, "those that hold images: png"),
        ({"max_bad_image_share": 0.01}, "1 of 19 images cannot be decoded"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        read(config(tmp_path / "out", write_tars(tmp_path / "data"), **flags))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_data_dir": "x"}, "streaming is for a dataset_name"),
        ({"dataset_name": "embedded:mnist"}, "streaming is for a dataset_name"),
        ({"dataset_name": "x.tar", "center_crop": False}, "center_crop cannot be false"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        AutoencoderConfig(streaming=True, **values).validate()


def test_a_dataset_saved_on_this_disk_is_not_streamed(tmp_path):
    datasets.Dataset.from_dict({"label": [0]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="streaming: .* is a local dataset saved by save_to_disk"):
        load_splits(str(tmp_path / "saved"), None, streaming=True)


def test_a_validation_split_of_its_own(tmp_path):
    for split, first, count in (("train", 0, 7), ("test", 100, 5)):
        rows = {"image": [{"bytes": png(first + k), "path": None} for k in range(count)], "label": [0, 1] * 9}
        rows["label"] = rows["label"][:count]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / f"{split}-00000.parquet")
    cfg = config(tmp_path / "out", str(tmp_path / "*.parquet"), image_column="image", max_validation_images=3)
    read(cfg, 2)
    train, validation = open_sources(cfg)
    assert (len(train), len(validation)) == (7, 3) and train.class_names == ["even", "odd"]
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert all(validation.load(i).getpixel((0, 0))[0] >= 100 for i in range(3))


class Server(http.server.SimpleHTTPRequestHandler):
    """Files by HTTP, with byte ranges. Now and then a request fails, or an answer breaks off in the middle."""

    chance, failed, broken = random.Random(1), 0, 0

    def do_GET(self):
        chance = self.chance.random()
        if chance < 0.15:
            type(self).failed += 1
            self.send_error(503)
            return
        breaks = chance < 0.3
        type(self).broken += breaks
        content = Path(self.translate_path(self.path)).read_bytes()
        begin, end = 0, len(content)
        if "Range" in self.headers:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        self.wfile.write(content[begin : (begin + end) // 2 if breaks else end])

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(Path(self.translate_path(self.path)).stat().st_size))
        self.end_headers()

    def log_message(self, *arguments):
        pass


FROM_A_SERVER = """
import sys
import datasets
from latent_ddpm.data.sources import streaming
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.errors import UserError
datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01
streaming.PART_IMAGES, streaming.PAUSE = 4, 0.01
cfg = AutoencoderConfig(output_dir=sys.argv[1], dataset_name=sys.argv[2], resolution=8, image_column="png",
                        streaming=True, max_bad_image_share=0.1)
for _ in range(30):
    try:
        for rank in (1, 0):
            streaming.read_stream(cfg, rank, 2, lambda: None)
        break
    except UserError as error:
        print("UserError:", error)
"""


def test_shards_come_from_a_server_that_sometimes_fails(tmp_path):
    pattern = write_tars(tmp_path / "data")
    local = config(tmp_path / "local", pattern)
    read(local)
    handler = type("Handler", (Server,), {"chance": random.Random(1), "failed": 0, "broken": 0})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: handler(*arguments, directory=str(tmp_path / "data"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{Path(pattern).name}"
        # another process: this one is told to stay offline
        online = {key: value for key, value in environment().items() if not key.startswith("HF_")}
        words = [sys.executable, "-c", FROM_A_SERVER, str(tmp_path / "remote"), address]
        done = finished_script(words, online | {"HF_HOME": str(tmp_path / "home")})
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert handler.failed > 0 and handler.broken > 0
    found = next((tmp_path / "remote").glob("cache/stream-*"), None)
    assert found is not None, done.stdout + done.stderr
    assert (found / "stream.json").exists(), done.stdout + done.stderr
    arrays = [{name: data for name, data in contents(folder).items() if name.endswith(".npy")}
              for folder in (found, stream_folder(local))]  # fmt: skip
    assert arrays[0] == arrays[1]


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_files_of_squares_are_one_array(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("squares")
    generator = np.random.default_rng(seed)
    arrays = [generator.integers(0, 256, (count, 2, 2, 1), dtype=np.uint8) for count in rows]
    paths = [folder / f"{k}.npy" for k in range(len(rows))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    squares, joint = Squares(paths, rows), np.concatenate(arrays)
    assert len(squares) == len(joint)
    if len(joint):
        wanted = generator.integers(0, len(joint), 7)
        assert np.array_equal(squares[wanted], joint[wanted]) and np.array_equal(
            squares[int(wanted[0])], joint[wanted[0]]
        )


def test_a_part_that_was_changed_is_refused(tmp_path):
    cfg = config(tmp_path / "out", write_tars(tmp_path / "data"))
    read(cfg)
    path = stream_folder(cfg) / "train-00000-00000.npy"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="is damaged"):
        for source in open_sources(cfg):
            for i in range(len(source)):
                source.load(i)


def test_both_stages_with_two_processes_and_a_kill(photos, tmp_path):
    """Read by two, killed while they train, gone on with by one: as if one had done it all."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "data" / f"{shard}.tar", "w") as tar:
            for number in range(60):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "png")
                entry = tarfile.TarInfo(f"{shard}{number:04d}.png")
                entry.size = buffer.tell()
                tar.addfile(entry, io.BytesIO(buffer.getvalue()))
    flags = {"dataset_name": tmp_path / "data" / "{0..1}.tar", "streaming": "true", "image_column": "png"}
    flags |= {"resolution": 16, "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 4}
    launch("train_autoencoder.py", tmp_path / "one", **flags)
    launch("train_unet.py", tmp_path / "one", **flags)
    text = launch(
        "train_autoencoder.py", tmp_path / "two", processes=2, **{**flags, "train_batch_size": 4, "max_train_steps": 2}
    )
    assert "114 training and 6 validation images" in text
    launch("train_autoencoder.py", tmp_path / "two", **flags)
    launch("train_unet.py", tmp_path / "two", **flags)
    for stage in ("autoencoder", "unet"):
        one, two = (checkpoint_tensors(tmp_path / name, stage, 4) for name in ("one", "two"))
        assert one.keys() == two.keys()
    one, two = (contents(next((tmp_path / name / "cache").glob("stream-*"))) for name in ("one", "two"))
    assert one == two
