"""The latent cache: the training set, encoded once, in sharded files.

`<latents_dir>/<key>/` holds `latents-00000.npy`, arrays of records (`record_type`): the latents of an image (F, D, h,
w) float16 with F = 2 (plain, mirrored) where flipping is on, its dataset index and label, and a checksum of these. The
files are read record by record and not memory-mapped, so memory does not grow with the dataset. `meta.json` is written
last: without it the cache is unfinished, and missing or damaged shards are encoded. The key is a hash of all that
determines the content: the autoencoder's files, the dataset's fingerprint and the transform.
"""

import copy
import dataclasses
import hashlib
import io
import json
import logging
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch

from latent_ddpm.autoencoder.scaling import Moments, overall_std
from latent_ddpm.autoencoder.stock import (
    StockAutoencoder,
    autoencoder_folder,
    autoencoder_hash,
    kept_normalization,
    latents_of,
    normalization_of,
)
from latent_ddpm.config import UNetConfig, encoding_batch_size
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ImageDataset, open_image_dataset, range_batches
from latent_ddpm.data.images import to_float
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import read_stream, undecodable
from latent_ddpm.errors import UserError
from latent_ddpm.files import remove_leftovers, write_json, write_whole
from latent_ddpm.progress import progress_bar
from latent_ddpm.system import read_at
from latent_ddpm.training.distributed import all_reduce_max, process_count, process_index

logger = logging.getLogger(__name__)

SHARD_IMAGES = 1024
OPEN_SHARDS = 16384  # if the system allows a process that many open files
_VERSION = 2
T = TypeVar("T")


def cache_key(autoencoder: str, dataset: ImageDataset, resolution: int, channels: int, flip: bool) -> dict:
    """Everything that determines the content of the cache, as JSON values; `autoencoder` is its `autoencoder_hash`."""
    return {
        "version": _VERSION,
        "autoencoder": autoencoder,
        "dataset": dataset.fingerprint,
        "images": len(dataset),
        "resolution": resolution,
        "channels": channels,
        "crop": "center",
        "flip": flip,
    }


def record_type(shape: tuple[int, ...]) -> np.dtype:
    """The dtype of a record: one image whose latents have `shape` (F, D, h, w)."""
    return np.dtype([("latents", "<f2", tuple(shape)), ("index", "<i8"), ("label", "<i8"), ("crc32", "<u4")])


def checksums(records: np.ndarray) -> np.ndarray:
    """CRC-32 of each record without its checksum field: records (N,) -> uint32 (N,)."""
    end = records.dtype.fields["crc32"][1]
    return np.fromiter((zlib.crc32(row[:end]) for row in _bytes_of(records)), np.uint32, len(records))


def _bytes_of(records: np.ndarray) -> np.ndarray:
    """A view of contiguous records (N,) as uint8 (N, bytes per record)."""
    return records.view(np.uint8).reshape(len(records), records.dtype.itemsize)


def open_files_limit(wanted: int) -> int:
    """The number of files a cache may keep open: `wanted`, or an eighth of the system's limit, which is raised first.

    A run has up to six caches (latents, maps and captions, each for training and held-out images), and other files.
    """
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return wanted
        if soft < 8 * wanted:
            soft = 8 * wanted if hard == resource.RLIM_INFINITY else min(8 * wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    except (ImportError, OSError, ValueError):  # no such limit, or it cannot be raised
        return min(wanted, 32)
    return max(1, min(wanted, soft // 8))


class _OpenShards:
    """Open shard files; when there are too many, the least recently used one is closed."""

    def __init__(self, place: Path, limit: int) -> None:
        self.place, self.limit = place, limit
        self.files: OrderedDict[int, BinaryIO] = OrderedDict()

    def fileno(self, shard: int) -> int:
        if shard in self.files:
            self.files.move_to_end(shard)
        else:
            if len(self.files) >= self.limit:
                self.files.popitem(last=False)[1].close()
            self.files[shard] = shard_path(self.place, shard).open("rb", buffering=0)
        return self.files[shard].fileno()

    def close(self, shard: int) -> None:
        if shard in self.files:
            self.files.pop(shard).close()


@dataclasses.dataclass
class LatentCache:
    """Normalized latents by row.

    Attributes:
        folder: of the cache.
        versions_shape: (F, D, h, w), the latents of a row.
        shards: rows and bytes of each shard.
        mean: (D,) float32, of the stored latents.
        std: the standard deviation over all channels around their means, or that of each (D,).
        channel_std: (D,) float32, that of each.
    """

    folder: Path
    versions_shape: tuple[int, int, int, int]
    shards: list[tuple[int, int]]
    mean: torch.Tensor
    std: float | torch.Tensor
    channel_std: torch.Tensor

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [rows for rows, _ in self.shards])
        self._type = record_type(self.versions_shape)
        self._open = _OpenShards(self.folder, open_files_limit(min(len(self.shards), OPEN_SHARDS)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one latent."""
        return self.versions_shape[1:]

    @property
    def flips(self) -> bool:
        """Whether the cache has mirrored versions."""
        return self.versions_shape[0] == 2

    def records(self, rows: np.ndarray) -> np.ndarray:
        """The records of rows int64 (B,) in [0, len(self)): `record_type` (B,).

        Raises:
            UserError: a record is damaged; its shard is removed and is encoded again by the next run.
        """
        size, end = self._type.itemsize, self._type.fields["crc32"][1]
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        from_ends = (
            rows - self._starts[shards + 1]
        )  # negative: offsets from the end, so the header's length does not matter
        parts, found = [], []
        for shard, row in zip(shards.tolist(), from_ends.tolist(), strict=True):
            try:
                part = read_at(self._open.fileno(shard), size, self.shards[shard][1] + row * size)
            except OSError as error:
                path = shard_path(self.folder, shard)
                raise UserError(f"{path}: {error}. Run the same command again: it encodes what is missing.") from error
            parts.append(part.ljust(size, b"\0"))
            found.append(zlib.crc32(memoryview(part)[:end]))
        records = np.frombuffer(b"".join(parts), dtype=self._type)
        damaged = np.flatnonzero(records["crc32"] != np.array(found, dtype=np.uint32))
        if len(damaged):
            shard = shards[damaged[0]]
            path, row = shard_path(self.folder, shard), rows[damaged[0]] - self._starts[shard]
            self._open.close(shard)  # Windows deletes no open file
            path.unlink(missing_ok=True)
            raise UserError(
                f"{path} has changed since it was written (row {row}), so it was removed. Run the same command again "
                f"to encode it again. If this happens more than once, the disk may be failing."
            )
        return records

    def batch(self, rows: np.ndarray, flipped: np.ndarray | None = None) -> torch.Tensor:
        """Latents of zero mean and unit variance.

        Args:
            rows: int64 (B,) in [0, len(self)).
            flipped: bool (B,), which rows to take mirrored; only if `flips`.

        Returns:
            float32 (B, D, h, w).

        Raises:
            UserError: as `records`.
        """
        return self.normalized(self.records(rows), flipped)

    def normalized(self, records: np.ndarray, flipped: np.ndarray | None = None) -> torch.Tensor:
        """As `batch`, from `records` (B,) that are already read."""
        version = np.zeros(len(records), dtype=np.int64) if flipped is None else flipped.astype(np.int64)
        chosen = records["latents"][np.arange(len(records)), version].astype(np.float32)
        # NumPy: in this thread, torch would start a second thread pool
        chosen -= self.mean.numpy().reshape(-1, 1, 1)
        chosen /= np.asarray(self.std, dtype=np.float32).reshape(-1, 1, 1)
        return torch.from_numpy(chosen)


def read_ahead(read: Callable[[int], T], first: int, last: int) -> Iterator[T]:
    """Yield read(first), ..., read(last - 1); a thread computes the next one while the current one is in use.

    An exception of `read` is raised where its result is due. One thread at a time calls it.
    """
    with ThreadPoolExecutor(1, "read_ahead") as reader:
        following = reader.submit(read, first) if first < last else None
        for number in range(first + 1, last + 1):
            made = following.result()
            following = reader.submit(read, number) if number < last else None
            yield made


def shard_path(place: Path, shard: int) -> Path:
    """The file of shard number `shard`."""
    return place / f"latents-{shard:05d}.npy"


def write_shard(path: Path, latents: np.ndarray, index: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Write a shard atomically; returns its records.

    Args:
        path: its file.
        latents: float16 (N, F, D, h, w).
        index, label: int64 (N,).
    """
    records = np.empty(len(latents), dtype=record_type(latents.shape[1:]))
    records["latents"], records["index"], records["label"] = latents, index, label
    records["crc32"] = checksums(records)
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    write_whole(path, buffer.getvalue())
    return records


def _size(path: Path) -> tuple[int, int]:
    """Bytes of a shard's header and of its records, according to the header."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        return file.tell(), shape[0] * dtype.itemsize


def read_shard(path: Path) -> np.ndarray | None:
    """The records of a shard, or None if it is missing or damaged."""
    try:
        records, whole = np.load(path, allow_pickle=False), sum(_size(path))
        if path.stat().st_size != whole:
            raise ValueError(f"it has {path.stat().st_size} bytes instead of {whole}")
        if records.dtype != record_type(records["latents"].shape[1:]):
            raise ValueError(f"it holds records of {records.dtype}")
        if not np.array_equal(checksums(records), records["crc32"]):
            raise ValueError("its checksums do not match")
        return records
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError) as error:
        logger.warning("The latents in %s are damaged (%s) and are encoded again.", path, error)
        return None


def read_meta(place: Path) -> dict | None:
    """The content of meta.json, or None if it is missing or damaged."""
    try:
        meta = json.loads((place / "meta.json").read_text(encoding="utf-8"))
        return meta if {"shards", "shape", "mean", "std"} <= meta.keys() else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s is damaged (%s) and is written again.", place / "meta.json", error)
        return None


def is_whole(place: Path, meta: dict) -> bool:
    """Whether all shards exist with their original sizes."""
    for shard, (_, size) in enumerate(meta["shards"]):
        path = shard_path(place, shard)
        found = path.stat().st_size if path.exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            logger.warning("%s %s and is encoded again.", path, state)
            return False
    return True


def _encode_shard(
    encode: Callable[[torch.Tensor], torch.Tensor],
    items: Iterator[dict[str, torch.Tensor]],
    flip: bool,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    latents, rows = [], []
    for batch in items:
        images = to_float(batch["image"].to(device))
        versions = [encode(images), encode(images.flip(-1))] if flip else [encode(images)]
        stack = torch.stack(versions, dim=1)  # (B, F, D, h, w)
        good = batch["index"] == batch["example"]  # drop an image that replaces an undecodable one
        latents.append(stack.cpu().to(torch.float16).numpy()[good.numpy()])
        if not np.isfinite(latents[-1]).all():
            raise UserError(
                "The autoencoder cannot be used: it gives latents that are not finite, or above 65504. If "
                "autoencoder_dtype is float16, use bfloat16 or float32."
            )
        rows.append(torch.stack((batch["index"], batch["label"])).numpy()[:, good.numpy()])
    return np.concatenate(latents), np.concatenate(rows, axis=1)


@torch.no_grad()
def build_cache(
    encode: Callable[[torch.Tensor], torch.Tensor],
    dataset: ImageDataset,
    folder: Path,
    key: dict,
    batch_size: int,
    device: torch.device,
    wait: Callable[[], None],
    num_workers: int = 0,
    must_vary: bool = True,
) -> LatentCache:
    """Open the cache under `folder` that belongs to `key`, after encoding what is missing of it.

    Args:
        encode: images (B, C, R, R) in [-1, 1] -> latents (B, D, h, w), on `device`.
        dataset: the training images.
        folder: the folder that holds the caches of all keys.
        key: from `cache_key`.
        batch_size: images encoded at once.
        device: where `encode` works.
        wait: a barrier over the processes, each of which encodes its share of the shards.
        num_workers: processes that decode images.
        must_vary: whether the latents' own standard deviation will be used.

    Raises:
        UserError: the latents are not finite or do not vary, so the autoencoder cannot be used.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = Path(folder) / digest
    meta = read_meta(place)
    unfinished = torch.tensor([meta is None or not is_whole(place, meta)], dtype=torch.int64, device=device)
    if not all_reduce_max(unfinished):  # all processes have to take the same way
        return open_cache(place)
    place.mkdir(parents=True, exist_ok=True)
    remove_leftovers(place)
    shards = -(-len(dataset) // SHARD_IMAGES)
    mine = range(process_index(), shards, process_count())
    moments: Moments | None = None
    for shard in progress_bar(mine, desc="encoding latents", unit="shard", disable=process_index() > 0):
        path = shard_path(place, shard)
        records = read_shard(path)
        if records is None:
            chosen = range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, len(dataset)))
            batches = range_batches(dataset, chosen, batch_size, num_workers)
            latents, (index, label) = _encode_shard(encode, batches, key["flip"], device)
            records = write_shard(path, latents, index, label)
        moments = moments or Moments(records["latents"].shape[2])
        moments.add(torch.from_numpy(records["latents"]).flatten(0, 1))
    channels = torch.tensor([len(moments.sums[0]) if moments else 0], device=device)
    channels = int(all_reduce_max(channels))
    mean, variance = (moments or Moments(channels)).result(device)
    std = overall_std(variance)
    if must_vary and not (np.isfinite(std) and std > 1e-4 and bool(mean.isfinite().all())):
        raise UserError(f"The autoencoder gives latents of standard deviation {std:.3g}; it cannot be used.")
    if process_index() == 0:
        if meta is None:  # otherwise keep them: a model may have been trained with them
            meta = {"key": key, "mean": mean.tolist(), "std": std, "channel_std": variance.sqrt().tolist()}
        finish_cache(place, shards, meta)
    wait()
    return open_cache(place)


def finish_cache(place: Path, shards: int, meta: dict) -> None:
    """Write the meta.json of a cache whose shards are complete.

    Args:
        place: the cache.
        shards: number of shards.
        meta: mean (D numbers) and std of the latents, and further entries.
    """
    sizes, record = [], np.load(shard_path(place, 0), allow_pickle=False).dtype
    for shard in range(shards):
        header, content = _size(shard_path(place, shard))
        sizes.append((content // record.itemsize, header + content))
    meta = {**meta, "shape": record["latents"].shape, "shards": sizes}
    write_json(place / "meta.json", meta)


def images_for_run(
    config: UNetConfig,
    is_main: bool,
    wait: Callable[[], None],
    check: Callable[[tuple[ImageSource, ImageSource], UNetConfig], None] | None = None,
) -> tuple[ImageDataset, ImageDataset]:
    """The training set of stage 2 and its held-out images, cropped at the centre; call in every process.

    Arguments and errors are those of `latents_for_run`. `check` is called with both sources before images are
    decoded.
    """
    output_dir = Path(config.output_dir)
    if config.streaming:
        read_stream(config, process_index(), process_count(), wait)
    sources = open_sources(config)
    if check is not None:
        check(sources, config)
    total = sum(map(len, sources)) + undecodable(config)
    bad_images = BadImages(output_dir / "bad_images.jsonl", total, config.max_bad_image_share)
    # train=False: the cache holds centre crops, whatever stage 1 used
    train, held_out = (
        open_image_dataset(source, config, output_dir / "cache", bad_images, train=False, is_main=is_main, wait=wait)
        for source in sources
    )
    return train, held_out


def latents_folder(config: UNetConfig) -> Path:
    """The folder of a run's latent caches."""
    return Path(config.latents_dir) if config.latents_dir else Path(config.output_dir) / "latents"


def latents_for_run(
    config: UNetConfig,
    autoencoder: StockAutoencoder,
    device: torch.device,
    is_main: bool,
    wait: Callable[[], None],
    images: tuple[ImageDataset, ImageDataset] | None = None,
) -> tuple[LatentCache, LatentCache]:
    """The latents of a run's training and held-out images; encodes what is missing. Call it in every process.

    Both are normalized by the training set's mean and standard deviation, or as `latent_normalization` says.

    Args:
        config: data, transform and folders.
        autoencoder: that of `config.autoencoder_dir`, on `device`, without a normalization folded in.
        device: where it works.
        is_main: true in exactly one process, which decodes the images.
        wait: a barrier over the processes.
        images: from `images_for_run`, if already opened.

    Raises:
        UserError: no data, too many undecodable images, or an unusable autoencoder.
    """
    opened = images_for_run(config, is_main, wait) if images is None else images
    folder = latents_folder(config)

    encode, identity = encoder_of(autoencoder, config), autoencoder_hash(autoencoder_folder(config))
    how = {"dtype": config.autoencoder_dtype} if config.autoencoder_dtype != "float32" else {}
    how |= {"tiling": True} if config.autoencoder_tiling else {}

    def cache_of(images: ImageDataset, folder: Path, flip: bool, must_vary: bool) -> LatentCache:
        key = cache_key(identity, images, config.resolution, config.image_channels, flip) | how
        workers = config.dataloader_num_workers
        batch_size = encoding_batch_size(config)
        return build_cache(encode, images, folder, key, batch_size, device, wait, workers, must_vary)

    train = cache_of(opened[0], folder, config.random_flip, True)
    held_out = cache_of(opened[1], folder / "held_out", False, False)
    opened[0].bad_images.check()
    mean, std, kind = train.mean, train.std, normalization_of(config, autoencoder)
    if kind == "keep":
        mean, std = kept_normalization(autoencoder, autoencoder_folder(config))
    elif kind == "channel":
        # a channel that is the same everywhere is left as it is
        std = torch.where(train.channel_std > 1e-3 * std, train.channel_std, torch.tensor(std))
    return tuple(dataclasses.replace(cache, mean=mean, std=std) for cache in (train, held_out))


def encoder_of(autoencoder: StockAutoencoder, config: UNetConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from images (B, C, R, R) in [-1, 1] to latents float32 (B, D, h, w), as the config wants it.

    Raises:
        UserError: the autoencoder has no tiling.
    """
    if config.autoencoder_dtype == "float32" and not config.autoencoder_tiling:
        return lambda images: latents_of(autoencoder, images)
    dtype = getattr(torch, config.autoencoder_dtype)
    encoder = torch.nn.Module.to(copy.deepcopy(autoencoder), dtype)  # diffusers' own method warns of nothing
    if config.autoencoder_tiling:
        try:
            encoder.enable_tiling()
        except (AttributeError, NotImplementedError) as error:  # what diffusers raises for a class without it
            raise UserError(f"autoencoder_tiling: {type(encoder).__name__} has none. Set it to false.") from error

    return lambda images: latents_of(encoder, images.to(dtype)).float()


def open_cache(place: Path) -> LatentCache:
    """Open a finished cache."""
    meta = read_meta(place)
    if meta is None:
        raise UserError(f"{place} holds no finished cache of latents.")
    mean = torch.tensor(meta["mean"], dtype=torch.float32)
    stds = torch.tensor(meta.get("channel_std", [meta["std"]] * len(mean)), dtype=torch.float32)
    shards = [tuple(shard) for shard in meta["shards"]]
    return LatentCache(place, tuple(meta["shape"]), shards, mean, meta["std"], stds)
