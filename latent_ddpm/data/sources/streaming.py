"""Datasets that are read once, from start to end, and never downloaded as a whole: `streaming: true`.

A stream has no random access. Its usual substitutes (a shuffle buffer, skipped batches on resuming, workers that read
the same file) would break exact resuming. So training does not read the stream. It is read once, and the square that
training needs is kept for every image, in parts of PART_IMAGES. After that it is a source like any other. The processes
share the files of the dataset. Each part is written atomically, with the position in the stream, so an interrupted
reading continues, with any number of processes.

    <output_dir>/cache/stream-<key>/train-00002-00001.npy    uint8 (N, R, R, C): the 2nd part of the 3rd file
                                    train-00002-00001.json   names, labels, undecodable images, position
                                    stream.json              written last
"""

import functools
import hashlib
import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_ddpm.config import RunConfig
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.images import CENTRE, TRANSFORM_VERSIONS, decode, square
from latent_ddpm.data.indexing import AllBut, digest, digest_of_many, narrow
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.classes import ClassValues, labels_of
from latent_ddpm.data.sources.hub import (
    check_image_column,
    choose_splits,
    image_bytes,
    label_column,
    labels_in_range,
    load_splits,
)
from latent_ddpm.errors import UserError
from latent_ddpm.files import remove_leftovers, write_json, write_whole
from latent_ddpm.progress import progress_bar
from latent_ddpm.resizing import resizer

logger = logging.getLogger(__name__)

PART_IMAGES, PART_BYTES = 4096, 2**27  # a part holds as many images as both limits allow
TRIES = 5  # attempts to read a file without progress
PAUSE = 20.0  # seconds before the next attempt; it grows with each one


class BrokenStream(Exception):
    """The server or the file system failed, or returned something wrong."""


def stream_folder(config: RunConfig) -> Path:
    """The folder of a run's stream."""
    named = (config.dataset_name, config.dataset_config_name, config.image_column)
    if config.class_column is not None:  # its values are kept with the pixels
        named = (*named, config.class_column)
    version = TRANSFORM_VERSIONS[resizer(config.image_resize)]
    key = digest("stream", *named, config.resolution, config.image_channels, version)
    return Path(config.output_dir) / "cache" / f"stream-{key}"


def _part(folder: Path, split: str, file: int, part: int) -> Path:
    return folder / f"{split}-{file:05d}-{part:05d}.npy"


def _read_sidecar(path: Path) -> dict | None:
    """The JSON beside a part, or None if there is no such part."""
    try:
        return json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path.with_suffix('.json')} is damaged ({error}); delete it and start again") from error


def read_stream(config: RunConfig, process_index: int, num_processes: int, wait: Callable[[], None]) -> None:
    """Read the rest of a run's stream; call it in all processes, and each reads its share of the files.

    Args:
        config: dataset, image size and output_dir.
        process_index, num_processes: determine this process's files.
        wait: a barrier of the processes.

    Raises:
        UserError: the dataset does not exist, too many images are undecodable, or the stream keeps failing.
    """
    folder = stream_folder(config)
    if (folder / "stream.json").exists():
        return
    splits = load_splits(config.dataset_name, config.dataset_config_name, streaming=True)
    names = [name for name in choose_splits(splits, config.dataset_name) if name is not None]
    folder.mkdir(parents=True, exist_ok=True)
    wait()
    if process_index == 0:
        remove_leftovers(folder)
    summary: dict[str, Any] = {"splits": {}}
    for split in names:
        stream = splits[split]
        if stream.features is None:
            stream = stream._resolve_features()
        check_image_column(stream.features, config.image_column)
        labels = label_column(stream.features, config.class_column)
        files = stream.num_shards
        if process_index == 0 and files < num_processes:
            logger.info("%s is in %d files, so %d of the processes wait", split, files, num_processes - files)
        known = (stream.info.splits or {}).get(split)
        bar = progress_bar(
            total=known.num_examples if known is not None else None, desc=f"reading {split}", unit="image",
            disable=process_index > 0,
        )  # fmt: skip
        for file in range(process_index, files, num_processes):
            seen = 0
            for images in _read_patiently(stream, split, file, files, labels, folder, config):
                # the others' files are about as long
                bar.update((images - seen) * min(num_processes, files))
                seen = images
        bar.close()
        wait()
        class_names = list(stream.features[labels].names) if hasattr(stream.features.get(labels), "names") else None
        summary["splits"][split] = {"files": files, "class_names": class_names}
    if process_index == 0:
        for split, about in summary["splits"].items():
            parts = [_part(folder, split, *number) for number in _finished_parts(folder, split, about["files"])]
            sidecars = [_read_sidecar(part) for part in parts]
            bad_images = BadImages(
                Path(config.output_dir) / "bad_images.jsonl",
                sum(s["read"] for s in sidecars),
                config.max_bad_image_share,
            )
            for sidecar in sidecars:
                for number, error in sidecar["bad"]:
                    bad_images.add(_name(split, sidecar["file"], number), error)
            bad_images.check()
            about["parts"] = [[part.name, s["read"] - len(s["bad"])] for part, s in zip(parts, sidecars, strict=True)]
            about["undecodable"] = sum(len(s["bad"]) for s in sidecars)
        write_json(folder / "stream.json", summary)
    wait()


def _name(split: str, file: int, number: int) -> str:
    return f"{split}[{file}:{number}]"


def _kept(sidecar: dict) -> AllBut:
    """The decodable images of a part, numbered from its first image."""
    bad = sorted(number - sidecar["first"] for number, _ in sidecar["bad"])
    return AllBut(sidecar["read"], np.array(bad, dtype=np.int64))


def _finished_parts(folder: Path, split: str, files: int) -> Iterator[tuple[int, int]]:
    for file in range(files):
        for part in itertools.count():
            yield file, part
            if _read_sidecar(_part(folder, split, file, part))["ended"]:
                break


def _read_patiently(
    stream: Any, split: str, file: int, files: int, labels: str | None, folder: Path, config: RunConfig
) -> Iterator[int]:
    """As `_read_file`, but tries again after a pause when the stream fails.

    Raises:
        UserError: it failed TRIES times at one position.
    """
    reached, tries = 0, 0
    while True:
        try:
            for images in _read_file(stream, split, file, files, labels, folder, config):
                reached, tries = (images, 0) if images > reached else (reached, tries)
                yield images
            return
        except BrokenStream as error:
            tries += 1
            if tries == TRIES:
                raise UserError(
                    f"The stream of {config.dataset_name} broke off {tries} times in one place ({error}). What was "
                    f"read is kept; start again with the same command."
                ) from error
            logger.warning("the stream broke off (%s); it is tried again in %.0f s", error, tries * PAUSE)
            time.sleep(tries * PAUSE)


def _read_file(
    stream: Any, split: str, file: int, files: int, labels: str | None, folder: Path, config: RunConfig
) -> Iterator[int]:
    """Read one file of a split from where an earlier reading stopped; yields the images read so far after each part.

    Raises:
        BrokenStream: the file could not be read to its end.
    """
    import datasets

    column = config.image_column
    rows = stream.select_columns([column] if labels is None else [column, labels])
    if isinstance(stream.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    rows = rows.shard(num_shards=files, index=file)
    square_bytes = config.resolution**2 * config.image_channels
    most = max(1, min(PART_IMAGES, PART_BYTES // square_bytes))
    first = 0  # of the file's images in the part at hand
    for part in itertools.count():
        before = _read_sidecar(_part(folder, split, file, part))
        if before is None:
            break
        first, state = first + before["read"], before["state"]
        yield first
        if before["ended"]:
            return
    if part:
        rows.load_state_dict(state)
    examples = iter(rows)
    with ThreadPoolExecutor(max(1, config.dataloader_num_workers)) as threads:  # Pillow releases the GIL while decoding
        while True:
            try:
                some = list(itertools.islice(examples, most))
            except Exception as error:  # servers, file systems and file formats raise unrelated classes
                raise BrokenStream(f"{type(error).__name__}: {error}") from error
            decoded = threads.map(lambda example: _decode(example[column], config), some)
            classes, bad, pixels = [], [], []
            for number, (example, image) in enumerate(zip(some, decoded, strict=True), start=first):
                if isinstance(image, str):
                    bad.append([number, image[:500]])
                    continue
                pixels.append(image)
                label = None if labels is None else example[labels]
                classes.append(-1 if label is None else label)
            ended = len(some) < most
            sidecar = {"file": file, "first": first, "read": len(some), "labels": classes, "bad": bad, "ended": ended}
            shape = (0, config.resolution, config.resolution, config.image_channels)
            images = np.stack(pixels) if pixels else np.empty(shape, dtype=np.uint8)
            _write_part(_part(folder, split, file, part), images, {**sidecar, "state": rows.state_dict()})
            first, part = first + len(some), part + 1
            yield first
            if ended:
                return


def _decode(value: Any, config: RunConfig) -> np.ndarray | str:
    """The square of a row's image, uint8 (R, R, C), or the reason why it cannot be decoded."""
    return square(
        lambda: decode(image_bytes(value), at_least=2 * config.resolution),
        config.resolution, config.image_channels, CENTRE, resizer(config.image_resize),
    )  # fmt: skip


def _write_part(path: Path, images: np.ndarray, sidecar: dict) -> None:
    buffer = io.BytesIO()
    np.save(buffer, images, allow_pickle=False)
    write_whole(path, buffer.getvalue())
    write_json(path.with_suffix(".json"), sidecar)  # a part without it does not count


class Squares:
    """Decoded images in several files: `squares[i]` is one, uint8 (R, R, C), `squares[indices]` are (B, R, R, C).

    Args:
        paths: of .npy files.
        rows: how many images are in each.
    """

    def __init__(self, paths: list[Path], rows: list[int]) -> None:
        self.paths, self._starts = paths, np.cumsum([0, *rows])
        self._open: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _file(self, number: int) -> np.ndarray:
        if number not in self._open:
            path, rows = self.paths[number], self._starts[number + 1] - self._starts[number]
            try:
                images = np.load(path, mmap_mode="r")
                if len(images) != rows:
                    raise ValueError(f"{len(images)} images in place of {rows}")
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error}); delete {path.parent} and start again") from error
            self._open[number] = images
        return self._open[number]

    def __getitem__(self, indices: int | np.ndarray) -> np.ndarray:
        one = np.ndim(indices) == 0
        wanted = np.atleast_1d(np.asarray(indices, dtype=np.int64))
        files = np.searchsorted(self._starts, wanted, side="right") - 1
        rows = wanted - self._starts[files]
        found = [self._file(file)[row] for file, row in zip(files.tolist(), rows.tolist(), strict=True)]
        return found[0] if one else np.stack(found)


class StreamedSource(ImageSource):
    """One split, as `read_stream` has stored it.

    Args:
        folder: of the stream.
        split: its name.
        named: whether the config names the column of the classes.
        class_values: the value of each class, where the training split has determined them.

    Attributes:
        class_values_found: as in `HubSource`.

    Raises:
        UserError: the stream has not been read completely.
    """

    def __init__(
        self, folder: Path, split: str, named: bool = False, class_values: Sequence[Any] | None = None
    ) -> None:
        about = _summary(folder)["splits"][split]
        paths, self._rows = zip(*[(folder / name, rows) for name, rows in about["parts"]], strict=True)
        self._paths = list(paths)
        self._squares = Squares(self._paths, list(self._rows))
        self._split, self._starts = split, np.cumsum([0, *self._rows])
        self._parts: list[tuple[int, int, AllBut]] = []  # per part: its file, its first number, its decodable images
        numbers, values, names = hashlib.sha256(), ClassValues(), about["class_names"]

        def labels_of_part(path: Path) -> np.ndarray:
            sidecar = _read_sidecar(path)
            self._parts.append((sidecar["file"], sidecar["first"], _kept(sidecar)))
            numbers.update((sidecar["first"] + self._parts[-1][2][:]).astype(np.int64).tobytes())
            found = sidecar["labels"]
            return np.array(found, dtype=np.int64) if names is not None else values.codes(found)

        labels = narrow(map(labels_of_part, self._paths), len(self))
        self.fingerprint = digest_of_many("stream", folder.name, split, numbers.hexdigest(), rows=labels)
        self.class_values_found: Sequence[Any] | None = None
        if names is not None:
            self.labels, self.class_names = labels_in_range(labels), list(names)
            return
        if class_values is None and (named or values.look_like_classes(len(self))):
            class_values = values.ordered()
        if class_values:
            self.class_values_found, self.class_names = class_values, [str(value) for value in class_values]
            self.labels = labels_of([labels], len(self), values, class_values)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        pixels = self._squares[i]
        return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def name(self, i: int) -> str:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        file, first, kept = self._parts[part]
        return _name(self._split, file, first + int(kept[i - self._starts[part]]))

    def all_names(self) -> Iterator[str]:
        for file, first, kept in self._parts:
            yield from (_name(self._split, file, first + k) for k in kept[:].tolist())

    def squares(self) -> Squares:
        return self._squares


@functools.lru_cache(maxsize=4)
def _summary_of(path: Path, changed: int) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _summary(folder: Path) -> dict:
    path = folder / "stream.json"
    if not path.exists():
        raise UserError(f"{folder} has not been read to its end; a training script reads it (streaming: true).")
    return _summary_of(path, path.stat().st_mtime_ns)


def open_stream(config: RunConfig) -> tuple[StreamedSource, StreamedSource | None]:
    """The training images of a run's stream, and its validation images if the dataset has a validation split."""
    folder = stream_folder(config)
    splits = list(_summary(folder)["splits"])  # the training split first
    train = StreamedSource(folder, splits[0], config.class_column is not None)
    train.findings.splits[splits[0]] = (len(train), "training")
    if len(splits) == 1:
        return train, None
    validation = StreamedSource(folder, splits[1], config.class_column is not None, train.class_values_found)
    validation.findings = train.findings
    train.findings.splits[splits[1]] = (len(validation), "validation")
    if train.class_names is None:
        validation.labels, validation.class_names = None, None
    return train, validation


def undecodable(config: RunConfig) -> int:
    """The number of undecodable images in a run's stream, which its sources do not contain."""
    if not config.streaming:
        return 0
    return sum(about["undecodable"] for about in _summary(stream_folder(config))["splits"].values())
