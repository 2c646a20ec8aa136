"""Datasets of square images, the order of training examples, and batches.

    open_image_dataset(...)           a source -> tensors; decoded once into a memory-mapped file if they fit
    ExampleOrder(length, seed)        example number -> index of an image
    train_batches(...)                the micro-batches of a range of steps on this process
    eval_batches(...)                 every image once, shared by the processes

The image, crop and mirroring of example number n depend on (seed, n) alone, so nothing here has state that a
checkpoint would have to store.
"""

import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.images import CENTRE, TRANSFORM_VERSIONS, square
from latent_ddpm.data.indexing import digest, digest_of_many
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.errors import UserError
from latent_ddpm.progress import progress_bar
from latent_ddpm.random import Stream, permutation, scattered, uniform
from latent_ddpm.resizing import resizer
from latent_ddpm.system import fsync_path

logger = logging.getLogger(__name__)


class ImageDataset(Dataset):
    """Square 8-bit images of one size; made by `open_image_dataset`.

    `dataset[i]` is image i, cropped at its centre. `dataset[n, i]` is image i as training example number n sees
    it: crop (unless `center_crop`) and mirroring (if `random_flip`) are drawn from (seed, n); a dataset for
    evaluation does not augment. Either is a dict of

        image    uint8 (C, H, W)
        index    the index of that image
        label    its class, or -1
        example  n, or i where no n was given

    A memory-mapped dataset has decodable images only. Otherwise, an undecodable image is added to the list of bad
    images and the next decodable one replaces it; `index` and `label` are those of the replacement.

    Attributes:
        labels: int8, int16 or int32 (N,), the class of each image, -1 where unknown; or None.
        class_names: list of the name of each class, or None.
        fingerprint: identifies the images, their order, size and channels.
        cached: whether the images are already decoded.
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
        # usually all of them: then nothing has to be stored
        self.kept = None if kept is None or len(kept) == len(source) else np.asarray(kept, dtype=np.int64)
        self.class_names, self.labels = source.class_names, source.labels
        self.resized_by = resizer(cfg.image_resize)
        self.fingerprint = _cache_key(source, cfg)
        if self.kept is not None:
            self.labels = None if self.labels is None else self.labels[self.kept]
            self.fingerprint = digest_of_many(self.fingerprint, rows=self.kept)

    @property
    def cached(self) -> bool:
        return self.images is not None

    def __len__(self) -> int:
        return len(self.source) if self.kept is None else len(self.kept)

    def source_index(self, i: int) -> int:
        """The index in the source of image i."""
        return int(i) if self.kept is None else int(self.kept[i])

    def name(self, i: int) -> str:
        """The name that the source gives image i."""
        return self.source.name(self.source_index(i))

    def get(self, i: int, crop: tuple[float, float] = CENTRE, flip: bool = False) -> torch.Tensor:
        """Image i, or its replacement: uint8 (C, H, W). `crop`: see `resize_and_crop`; `flip` mirrors it then."""
        return self._get(i, crop, flip)[0]

    def _get(self, i: int, crop: tuple[float, float], flip: bool) -> tuple[torch.Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        if self.images is not None and crop == CENTRE:
            pixels, used = np.asarray(self.images[i]), i
        else:
            pixels, used = self._decode_from(i, crop)
        # Mirroring costs nothing in this copy, but four times as much in one whose channels stay innermost.
        planes = pixels.transpose(2, 0, 1)  # (C, H, W)
        return torch.from_numpy((planes[:, :, ::-1] if flip else planes).copy()), used

    def _decode_from(self, i: int, crop: tuple[float, float]) -> tuple[np.ndarray, int]:
        for candidate in range(i, i + len(self)):
            candidate %= len(self)
            k = self.source_index(candidate)
            pixels = decode_square(self.source, k, self.resolution, self.channels, crop, self.resized_by)
            if not isinstance(pixels, str):
                return pixels, candidate
            self.bad_images.add(self.name(candidate), pixels)
            self.bad_images.check()  # otherwise a folder of a million bad images would be read completely
        raise UserError(f"none of the {len(self)} images can be decoded; see {self.bad_images.path}")

    def __getitem__(self, request: int | tuple[int, int]) -> dict[str, Any]:
        return self.__getitems__([request])[0]

    def __getitems__(self, requests: Sequence[int | tuple[int, int]]) -> list[dict[str, Any]]:
        """The items of a batch, for `DataLoader`: one random draw for all is much cheaper than one each."""
        pairs = [request if isinstance(request, tuple) else (None, request) for request in requests]
        numbers = torch.tensor([0 if n is None else n for n, _ in pairs])
        crops = uniform(self.seed, Stream.CROP, numbers, (2,)).tolist() if self.random_crop else [CENTRE] * len(pairs)
        flips = self._flips(numbers).tolist()
        items = []
        for (n, i), crop, flip in zip(pairs, crops, flips, strict=True):
            image, used = self._get(i, CENTRE, False) if n is None else self._get(i, tuple(crop), flip)
            label = -1 if self.labels is None else int(self.labels[used])
            items.append({"image": image, "index": used, "label": label, "example": i if n is None else n})
        return items

    def _flips(self, numbers: torch.Tensor) -> torch.Tensor:
        """Whether each of the examples (B,) is mirrored: bool (B,)."""
        if not self.random_flip:
            return torch.zeros(len(numbers), dtype=torch.bool)
        return uniform(self.seed, Stream.FLIP, numbers) < 0.5

    def gather(self, numbers: np.ndarray | None, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The stack of `self[n, i]` (of `self[i]` without numbers), computed at once; for decoded images.

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
        # (B, C, H, W). A grey batch is not copied: convolutions round by its strides, and runs keep their bits.
        pixels = np.ascontiguousarray(np.asarray(self.images[indices]).transpose(0, 3, 1, 2))
        if numbers is not None and self.random_flip:
            flips = self._flips(example).numpy()
            pixels[flips] = pixels[flips, :, :, ::-1]
        return {
            "image": torch.from_numpy(pixels),
            "index": index,
            "label": torch.full_like(index, -1)
            if self.labels is None
            else torch.from_numpy(self.labels[indices]).long(),
            "example": example,
        }


def decode_square(
    source: ImageSource,
    k: int,
    resolution: int,
    channels: int,
    crop: tuple[float, float] = CENTRE,
    library: str = "pillow",
) -> np.ndarray | str:
    """Image k of the source as uint8 (H, W, C), or the reason why it cannot be decoded."""
    # Twice the resolution leaves enough detail for antialiasing after the JPEG decoder has reduced the size.
    return square(lambda: source.load(k, at_least=2 * resolution), resolution, channels, crop, library)


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
        cfg: has `resolution`, `image_channels` (1 or 3), `image_resize`, `center_crop`, `random_flip`,
            `image_cache_gib`, `dataloader_num_workers`, `seed`.
        cache_dir: folder for decoded images, on a disk that all processes see.
        bad_images: list to which undecodable images are added.
        train: whether `dataset[n, i]` augments.
        is_main: whether this process decodes; true in exactly one.
        wait: a barrier of all processes; called once in each, or in none if nothing is decoded ahead.

    Raises:
        UserError: too many images, or all of them, are bad; or the cache cannot be written or read.
    """
    decoded = source.squares()
    if decoded is not None:
        return ImageDataset(source, cfg, bad_images, train, decoded)
    size = len(source) * cfg.resolution**2 * cfg.image_channels  # bytes
    if size > cfg.image_cache_gib * 2**30 or not (cfg.center_crop or not train):
        return ImageDataset(source, cfg, bad_images, train)
    folder = Path(cache_dir) / f"images-{_cache_key(source, cfg)}"
    if is_main and not folder.is_dir():
        _write_cache(folder, source, cfg, bad_images, size)
    wait()
    try:
        sidecar = json.loads((folder / "images.json").read_text(encoding="utf-8"))
        images = np.load(folder / "images.npy", mmap_mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{folder} does not exist: cache_dir must be on a disk that all processes share") from error
    except ValueError as error:
        raise UserError(f"{folder} is damaged ({error}); delete it and start again") from error
    if len(images) != len(sidecar["kept"]):
        raise UserError(f"{folder} is damaged (images.npy and images.json disagree); delete it and start again")
    if is_main and sidecar["bad"]:
        logger.warning("undecodable images left out of %s: %d", folder, len(sidecar["bad"]))
        for entry in sidecar["bad"]:  # another run may have written the cache, and this run has its own list
            bad_images.add(entry["name"], entry["error"])
        bad_images.check()
    return ImageDataset(source, cfg, bad_images, train, images, sidecar["kept"])


def _cache_key(source: ImageSource, cfg: Any) -> str:
    version = TRANSFORM_VERSIONS[resizer(cfg.image_resize)]
    return digest(source.fingerprint, cfg.resolution, cfg.image_channels, version)


class _Squares(Dataset):
    """k, and image k at the centre crop or the reason why there is none; for the workers that fill a cache."""

    def __init__(self, source: ImageSource, cfg: Any) -> None:
        self.source, self.resolution, self.channels = source, cfg.resolution, cfg.image_channels
        self.resized_by = resizer(cfg.image_resize)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, k: int) -> tuple[int, np.ndarray | str]:
        return k, decode_square(self.source, k, self.resolution, self.channels, CENTRE, self.resized_by)


def _write_cache(folder: Path, source: ImageSource, cfg: Any, bad_images: BadImages, size: int) -> None:
    """Decodes all images into `folder`, which is written atomically."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise UserError(
            f"the decoded images take {size / 2**30:.2g} GiB and {folder.parent} has {free / 2**30:.2g} GiB left; "
            "free some space, or set image_cache_gib to 0 to decode the images in every epoch"
        )
    logger.info("decoding images to %s: %d", folder, len(source))
    squares = DataLoader(
        _Squares(source, cfg),
        batch_size=64,
        collate_fn=list,
        num_workers=cfg.dataloader_num_workers,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )
    kept, bad = [], []
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=f".{os.getpid()}.tmp", dir=folder.parent))
    try:
        with open(aside / "images.npy", "wb") as file, progress_bar(total=len(source), desc="decode") as bar:
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
        with open(aside / "images.json", "w", encoding="utf-8") as file:
            json.dump({"kept": kept, "bad": bad, "source": source.fingerprint, "total": len(source)}, file)
            _sync(file)
        aside.chmod(0o755)  # mkdtemp makes it private, but other users may share the cache
        try:
            aside.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run was faster, and its images are the same
                raise
        fsync_path(folder.parent)
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


ORDER_TABLE = 2**20  # up to this many images, an epoch's order is a table; beyond, it is computed in parts
ORDER_PART = 2**14  # positions per part: NumPy takes as long for a few as for thousands


class ExampleOrder:
    """The image of each training example: every epoch of `length` examples is a shuffle of all images."""

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError("an order needs at least one image")
        self.length, self.seed = length, seed
        self._size = length if length <= ORDER_TABLE else ORDER_PART
        # A batch touches at most two parts, unless it is larger than a part.
        self._part = functools.lru_cache(maxsize=2)(functools.partial(_part_of_order, seed, length, self._size))

    def __reduce__(self) -> tuple:
        return ExampleOrder, (self.length, self.seed)

    def order(self, n: int) -> int:
        """The index of the image that is example number n."""
        return int(self.indices(np.array([n]))[0])

    def indices(self, numbers: np.ndarray) -> np.ndarray:
        """The same for int64 (B,) example numbers: int64 (B,)."""
        epochs, positions = np.divmod(np.asarray(numbers, dtype=np.int64), self.length)
        parts, places = np.divmod(positions, self._size)
        result = np.empty_like(positions)
        for epoch, part in np.unique(np.stack((epochs, parts)), axis=1).T.tolist():
            here = (epochs == epoch) & (parts == part)
            result[here] = self._part(epoch, part)[places[here]]
        return result


def _part_of_order(seed: int, length: int, size: int, epoch: int, part: int) -> np.ndarray:
    if size == length:
        return permutation(seed, epoch, length)
    return scattered(seed, epoch, length, np.arange(part * size, min((part + 1) * size, length)))


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
        first_step: first step; any value gives the batches of an uninterrupted run.
        last_step: where to stop, exclusive.
        batch_size: examples per micro-batch; may exceed the dataset.
        process_index: this process, in [0, num_processes).
        num_processes: processes that share a step.
        accumulation: micro-batches per step.
        num_workers: processes that decode; unused if the images are already decoded.

    Yields:
        image: uint8 (B, C, H, W); index, label (-1 where unknown), example: int64 (B,).

    Raises:
        UserError: too many images are bad.
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
        `index` differs from `example` where another image replaces an undecodable one.
    """
    starts = range(process_index * batch_size, len(dataset), num_processes * batch_size)
    indices = (np.arange(start, min(start + batch_size, len(dataset))) for start in starts)
    return _batches(dataset, ((None, i) for i in indices), num_workers)


def next_images(
    dataset: ImageDataset, order: "ExampleOrder", start: int, count: int, process_index: int, num_processes: int
) -> torch.Tensor:
    """This process's share of the `count` examples from number `start` on, augmented: uint8 (B, C, H, W)."""
    share = -(-count // num_processes)
    numbers = np.arange(start + process_index * share, start + (process_index + 1) * share)
    pairs = list(zip(numbers.tolist(), order.indices(numbers).tolist(), strict=True))
    return torch.stack([item["image"] for item in dataset.__getitems__(pairs)])


def range_batches(
    dataset: ImageDataset, indices: range, batch_size: int, num_workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """The images of `indices`, in order and without augmentation; yields as `eval_batches`."""
    chunks = (np.asarray(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size))
    return _batches(dataset, ((None, i) for i in chunks), num_workers)


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
        pin_memory=torch.cuda.is_available(),  # by a thread, ahead of the copy to the GPU
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )
    try:
        yield from loader
    except UserError as error:
        error.__traceback__ = None  # it references the loader, whose workers would end only after a timeout
        dataset.bad_images.check()  # a worker's message contains its traceback: report the check's message instead
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
