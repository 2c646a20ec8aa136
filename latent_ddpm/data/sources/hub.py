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

from latent_ddpm.data.formats import readable_extensions
from latent_ddpm.data.images import decode
from latent_ddpm.data.indexing import PART, digest, give_memory_back, narrow
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.classes import ClassValues, labels_of
from latent_ddpm.data.sources.folder import LABEL_COLUMNS
from latent_ddpm.data.sources.layout import split_named
from latent_ddpm.errors import UserError

logger = logging.getLogger(__name__)

VALIDATION_SPLITS = ("validation", "valid", "val", "test")
TABLES = {".parquet", ".arrow", ".tar", ".zip", ".gz", ".tgz", ".lance"}  # files that `datasets` takes for the dataset
SAVED_DATASET = ("dataset_dict.json", "state.json", "dataset_info.json")  # of save_to_disk
SPLIT_WORDS = "train|training|validation|valid|val|dev|test|testing|eval|evaluation"  # as in `datasets`
ARCHIVES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")


class HubSource(ImageSource):
    """One split of a dataset of the `datasets` library.

    Args:
        dataset: the split.
        split: its name, for messages.
        image_column: a column of `datasets.Image`, of structs {bytes, path}, or of raw bytes.
        root: folder to which stored paths are shown relative.
        reopen: opens the dataset again after `release`; without it, nothing is released.
        class_column: column of the classes; None takes one of LABEL_COLUMNS if it holds classes.
        class_values: the value of each class, where the training split has determined them.

    Attributes:
        class_values_found: the value of each class; None for class labels, whose names the dataset gives.

    Raises:
        UserError: there is no such column, or it does not hold images or classes.
    """

    def __init__(
        self,
        dataset: "datasets.Dataset",
        split: str,
        image_column: str,
        root: str | os.PathLike | None = None,
        reopen: "Callable[[], datasets.Dataset] | None" = None,
        class_column: str | None = None,
        class_values: Sequence[Any] | None = None,
    ) -> None:
        features = dataset.features
        check_image_column(features, image_column)
        self.split, self.image_column, self.root = split, image_column, root
        label = label_column(features, class_column)
        used = [name for name, kind in features.items() if name == label or _holds_images(kind) or _holds_text(kind)]
        self._reopen, self._used, self._length = reopen, used, len(dataset)
        self._features, self._of_dataset = features, dataset._fingerprint
        self._opened = self._as_arrow(dataset)
        self.fingerprint = digest("datasets", split, image_column, self._of_dataset)
        self._texts: dict[str, tuple[int, list]] = {}  # by column: the part read last
        self.class_values_found: Sequence[Any] | None = None
        if label is not None:
            self._read_classes(label, class_column is not None, class_values)

    def _read_classes(self, label: str, named: bool, class_values: Sequence[Any] | None) -> None:
        names = getattr(self._features[label], "names", None)
        if names is not None:
            numbers = (
                rows.column(label).cast("int64", safe=False).fill_null(-1).to_numpy() for rows in self._parts(label)
            )
            self.labels, self.class_names = labels_in_range(narrow(numbers, len(self))), list(names)
            return
        values = ClassValues()
        codes = narrow((_codes(rows.column(label), values) for rows in self._parts(label)), len(self))
        if class_values is None:
            if not named and not values.look_like_classes(len(self)):
                logger.warning(
                    "the column %s has %d different values, which do not look like classes; it is ignored. "
                    "--class_column %s makes them classes", label, len(values.number), label,
                )  # fmt: skip
                return
            class_values = values.ordered()
        if class_values:
            self.class_values_found, self.class_names = class_values, [str(value) for value in class_values]
            parts = (codes[start : start + PART] for start in range(0, len(codes), PART))
            self.labels = labels_of(parts, len(codes), values, class_values)

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
        return decode(self.data(i), at_least)

    def data(self, i: int) -> bytes:
        return image_bytes(self._cell(i, self.image_column))

    def caption_columns(self) -> list[str]:
        return [name for name, feature in self._features.items() if _holds_text(feature)]

    def captions(self, i: int, column: str) -> Any:
        start = i - i % PART
        if self._texts.get(column, (None, []))[0] != start:
            self._texts[column] = start, self._part(start, column).column(column).to_pylist()
        return self._texts[column][1][i - start]

    def class_columns(self) -> list[str]:
        return [name for name, feature in self._features.items() if _holds_classes(feature)]

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
            path = Path(os.path.relpath(path, self.root)).as_posix() if inside else os.path.basename(path)
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


def label_column(features: "datasets.Features", named: str | None = None) -> str | None:
    """The column that holds each image's class; None without one.

    Args:
        features: of the dataset.
        named: the column that the config names; None takes the first of LABEL_COLUMNS that can hold classes.

    Raises:
        UserError: the named column does not exist or cannot hold classes.
    """
    if named is None:
        column = next((name for name in LABEL_COLUMNS if name in features), None)
        return column if _holds_classes(features.get(column)) else None
    if not _holds_classes(features.get(named)):
        what = "no classes in column" if named in features else "no column"
        raise UserError(
            f"class_column: the dataset has {what} {named!r}. Columns that can hold classes: "
            f"{', '.join(name for name, kind in features.items() if _holds_classes(kind)) or 'none'}."
        )
    return named


def _holds_classes(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and bool(
        re.fullmatch(r"u?int\d+|(large_)?string|bool|float(32|64)", feature.dtype)
    )


def _codes(column: "pyarrow.ChunkedArray", values: ClassValues) -> np.ndarray:
    """The code of each row's class: int64 (N,), -1 without one."""
    encoded = column.combine_chunks().dictionary_encode()
    if hasattr(encoded, "combine_chunks"):
        encoded = encoded.combine_chunks()
    of_entry = np.append(values.codes(encoded.dictionary.to_pylist()), -1)
    return of_entry[encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def labels_in_range(labels: np.ndarray) -> np.ndarray:
    """Labels (N,) of a dataset's class labels, where what is below 0 is unknown, -1."""
    if len(labels) and not -1 <= labels.min() <= labels.max() < 2**31:  # a copy only where it is needed
        labels = labels.astype(np.int64).clip(-1, 2**31 - 1).astype(np.int32)
    return labels


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


def open_hub(
    name: str, config_name: str | None, image_column: str, class_column: str | None = None
) -> tuple[HubSource, HubSource | None]:
    splits = load_splits(name, config_name)
    train, validation = choose_splits(splits, name)
    if validation is not None and not len(splits[validation]):
        validation = None
    if not len(splits[train]):
        raise UserError(f"dataset_name: the split {train!r} of {name!r} is empty")
    root = name if os.path.isdir(name) else None

    def source_of(split: str, class_values: Sequence[Any] | None = None) -> HubSource:
        reopen = functools.partial(_load_split, name, config_name, split)
        return HubSource(splits[split], split, image_column, root, reopen, class_column, class_values)

    trained = source_of(train)
    # a split knows only the values that it holds
    held_out = None if validation is None else source_of(validation, trained.class_values_found)
    uses = {train: "training", validation: "validation"}
    trained.findings.splits.update({split: (len(splits[split]), uses.get(split, "not used")) for split in splits})
    if held_out is not None:
        held_out.findings = trained.findings
        if trained.class_names is None:
            held_out.labels, held_out.class_names = None, None
    return trained, held_out


def _load_split(name: str, config_name: str | None, split: str) -> "datasets.Dataset":
    return load_splits(name, config_name)[split]


def is_folder_of_images(name: str) -> bool:
    """Whether a dataset's name is a local folder of image files, without files of tables or archives.

    `datasets` would read it too, but takes a class's folder called "train" for the only split.
    """
    path = os.path.expanduser(name)
    if not os.path.isdir(path):
        return False
    images = False
    for _, folders, files in os.walk(path):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        for file in files:
            extension = os.path.splitext(file)[1].lower()
            if file in SAVED_DATASET or (extension in TABLES and file != "metadata.parquet"):
                return False
            images = images or extension in readable_extensions()
    return images


def _has_split_folders(path: str) -> bool:
    """Whether all folders in a folder are called like splits."""
    with os.scandir(path) as entries:
        folders = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return bool(folders) and all(map(split_named, folders))


def choose_splits(splits: dict, name: str) -> tuple[str, str | None]:
    """The split to train on and the one to validate on, None without one, of the dataset called `name`."""
    meant = {split: split_named(split) for split in splits}
    if "train" in splits:
        train = "train"
    elif list(meant.values()).count("train") == 1:
        train = next(split for split, use in meant.items() if use == "train")
    elif len(splits) == 1:
        train = next(iter(splits))
    else:
        raise UserError(f"dataset_name: {name!r} has no split 'train'; its splits are {', '.join(splits)}")
    held_out = [split for use in ("validation", "test") for split in splits if meant[split] == use and split != train]
    return train, next((split for split in (*VALIDATION_SPLITS, *held_out) if split in held_out), None)


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
            if is_folder_of_images(path) and not _has_split_folders(path):
                # otherwise a class called "train" would be taken for the only split
                files = {"train": os.path.join(glob.escape(path), "**")}
                return dict(datasets.load_dataset("imagefolder", data_files=files, streaming=streaming))
            if glob.has_magic(path):  # `datasets` takes the folder's name for a pattern
                parquet = _data_files(os.path.join(glob.escape(path), "**", "*.parquet"))
                return dict(datasets.load_dataset("parquet", data_files=parquet, streaming=streaming))
            return dict(datasets.load_dataset(path, config_name, streaming=streaming))
        if os.path.isfile(path) and path.lower().endswith(ARCHIVES):
            raise UserError(f"dataset_name: {name!r} is an archive. Unpack it, and give the folder as train_data_dir.")
        if path.endswith((".parquet", ".arrow", ".tar")) or glob.has_magic(path) or "://" in path:
            kind = {".tar": "webdataset", ".arrow": "arrow"}.get(os.path.splitext(path)[1], "parquet")
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
    if os.path.isfile(pattern):  # brackets in the name of a file or folder are no pattern
        files = [pattern]
    elif "://" in pattern:
        files = _expand_range(pattern)
    else:
        named = _expand_range(pattern)
        files = sorted(f for name in named for f in glob.glob(name, recursive=True) if os.path.isfile(f))
    if not files:
        raise UserError(f"dataset_name: no file matches {pattern!r}")
    for file in files:
        if file.endswith(".tar") and "://" not in file:
            _check_tar_ends(file)
    splits: dict[str, list[str]] = {}
    for file in files:
        word = re.search(rf"(?<![a-z])({SPLIT_WORDS})(?![a-z])", os.path.basename(file).lower())
        file = file if "://" in file else glob.escape(file)  # `datasets` takes a path for a pattern
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
