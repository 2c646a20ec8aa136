"""A split of a `datasets` dataset: from the Hub, a local dataset folder, parquet files or WebDataset tar files."""

import functools
import glob
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import datasets  # slow to import, and a folder of images does without
    import pyarrow

from latent_ddpm.data.images import decode
from latent_ddpm.data.indexing import PART, digest, give_memory_back, narrow
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.errors import UserError

logger = logging.getLogger(__name__)

VALIDATION_SPLITS = ("validation", "valid", "val", "test")
LABEL_COLUMNS = ("label", "labels", "cls")  # the last one as in WebDataset


class HubSource(ImageSource):
    """One split of a dataset of the `datasets` library.

    Args:
        dataset: the split.
        split: its name, for messages.
        image_column: a column of `datasets.Image`, of structs {bytes, path}, or of raw bytes.
        root: folder to which stored paths are shown relative.
        reopen: opens the dataset again after `release`; without it, nothing is released.

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
        """The used columns as Arrow tables."""
        some = dataset if len(self._used) == len(self._features) else dataset.select_columns(self._used)
        return some.with_format("arrow")

    @property
    def _rows(self) -> "datasets.Dataset":
        """The dataset as Arrow tables. We decode the images, so a damaged one is listed and does not end the run."""
        if self._opened is None:
            opened = self._reopen()
            if opened._fingerprint != self._of_dataset:
                raise UserError(f"the split {self.split} of the dataset changed while it was in use; run again")
            self._opened = self._as_arrow(opened)
        return self._opened

    def _part(self, start: int, column: str) -> "pyarrow.Table":
        # slices are free, except that rows with an index mapping are copied
        rows = self._rows if self._rows._indices is None else self._rows.select_columns([column])
        return rows[start : start + PART]

    def _parts(self, column: str) -> "Iterator[pyarrow.Table]":
        return (self._part(start, column) for start in range(0, len(self), PART))

    def _cell(self, i: int, column: str) -> Any:
        return self._rows[i].column(column)[0].as_py()

    def release(self) -> None:
        if self._reopen is not None:
            self._opened = None  # an open dataset takes 24 bytes per row
            self._texts.clear()
            give_memory_back()

    def __len__(self) -> int:
        return self._length

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.load_column(i, self.image_column, at_least)

    def data(self, i: int) -> bytes:
        return image_bytes(self._cell(i, self.image_column))

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
            # The location of the files must not decide which images are held out.
            inside = self.root is not None and Path(path).is_relative_to(Path(self.root).absolute())
            path = os.path.relpath(path, self.root) if inside else os.path.basename(path)
        return f"{self.split}[{i}] {path}"


def _paths(rows: "pyarrow.Table", column: str) -> list[str | None]:
    """The paths in an image column, without reading the image bytes."""
    import pyarrow
    import pyarrow.compute

    cells = rows.column(column)
    if not pyarrow.types.is_struct(cells.type) or cells.type.get_field_index("path") < 0:
        return [None] * len(cells)
    return pyarrow.compute.struct_field(cells, "path").to_pylist()


def image_bytes(value: Any) -> bytes:
    """The image file in a cell of an image column: its bytes, or the file at its path.

    Raises:
        OSError: the cell is empty, or the file does not exist.
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


def open_hub(name: str, config_name: str | None, image_column: str) -> tuple[HubSource, HubSource | None]:
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
        UserError: the dataset does not exist, cannot be reached or cannot be read.
    """
    import datasets

    path = os.path.expanduser(name)
    try:
        if os.path.isdir(path):
            if any(os.path.exists(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json")):
                if streaming:
                    raise UserError(
                        f"streaming: {name!r} is a local dataset saved by save_to_disk, which cannot be streamed; "
                        "set streaming false"
                    )
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
    except Exception as error:  # `datasets` raises many unrelated classes for bad files, configurations and servers
        cause = error
        while cause.__cause__ is not None:  # "An error occurred while generating the dataset" hides the reason
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"dataset_name: could not load {name!r}: {reason}") from error


def _data_files(pattern: str) -> dict[str, list[str]]:
    """Files by split. The split is the word in the file name, as in `datasets`; train without such a word.

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
    """Raises `UserError` for a truncated tar file, which readers treat as a shorter one."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - 1024))
        if size % 512 or any(file.read()):  # an archive ends with two blocks of zeros
            raise UserError(f"dataset_name: {path} is truncated; download it again")


def _expand_range(pattern: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar, a-09.tar, a-10.tar, a-11.tar, as a shell and WebDataset do."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for number in numbers for name in _expand_range(before + number + after)]
