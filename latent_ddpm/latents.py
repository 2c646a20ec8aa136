"""The latent cache: the training set, encoded once, in sharded memory-mapped files.

`<latents_dir>/<key>/` holds `latents-00000.npy` (rows, F, D, h, w) float16 with F = 2 (plain, mirrored) where
flipping is on, `rows-00000.npy` (rows, 2) int64 with each row's dataset index and label, and `meta.json`, which
is written last: without it the cache is unfinished and what is there is completed. The key is a hash of all that
determines the content: the autoencoder's files, the dataset's fingerprint and the transform.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from latent_ddpm.checkpoint import fsync_path
from latent_ddpm.config import UNetConfig
from latent_ddpm.data import BadImages, ImageDataset, open_image_dataset, range_batches, to_float
from latent_ddpm.distributed import all_reduce_sum, process_count, process_index
from latent_ddpm.errors import UserError
from latent_ddpm.export import StockAutoencoder, latents_of
from latent_ddpm.sources import ImageSource, open_sources

SHARD_IMAGES = 1024
_VERSION = 1


def hash_folder(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's JSON and safetensors files."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def cache_key(autoencoder_dir: Path, dataset: ImageDataset, resolution: int, channels: int, flip: bool) -> dict:
    """Everything that determines the cache's content, as JSON values."""
    return {
        "version": _VERSION,
        "autoencoder": hash_folder(autoencoder_dir),
        "dataset": dataset.fingerprint,
        "images": len(dataset),
        "resolution": resolution,
        "channels": channels,
        "crop": "center",
        "flip": flip,
    }


class Moments:
    """Running per-channel mean and variance of latents (N, D, h, w), in float64, joint over processes."""

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.images = 0

    def add(self, latents: torch.Tensor) -> None:
        """Take in a batch (N, D, h, w)."""
        # double before squaring: float16 values of a badly scaled autoencoder would overflow
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.images += len(latents)
        self.sums += torch.stack((values.sum(1), values.pow(2).sum(1)))

    def result(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and variance (D,) over all processes, float64; `device` is where the processes can meet."""
        joint = torch.cat((self.count.view(1), self.sums.flatten())).to(device)
        joint = all_reduce_sum(joint).cpu()
        mean, square = (joint[1:] / joint[0]).view(2, -1)
        return mean, (square - mean**2).clamp_min(0)


def overall_std(variance: torch.Tensor) -> float:
    """One standard deviation for all channels: a scale that leaves the order of code distances as it is."""
    return float(variance.mean().sqrt())


@dataclasses.dataclass
class LatentCache:
    """Normalized latents by row.

    Attributes:
        shards: memory maps (rows, F, D, h, w) float16, one a shard.
        indices: int64 (N,), the dataset index of each row.
        labels: int64 (N,), -1 where there is none.
        mean: (D,) float32, of the stored latents.
        std: the standard deviation over all channels around their means.
        folder: where it lies.
    """

    shards: list[np.ndarray]
    indices: np.ndarray
    labels: np.ndarray
    mean: torch.Tensor
    std: float
    folder: Path

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one latent."""
        return self.shards[0].shape[2:]

    @property
    def flips(self) -> bool:
        """Whether mirrored versions are there."""
        return self.shards[0].shape[1] == 2

    def batch(self, rows: np.ndarray, flipped: np.ndarray | None = None) -> torch.Tensor:
        """Latents of zero mean and unit variance.

        Args:
            rows: int64 (B,) in [0, len(self)).
            flipped: bool (B,), which of them to take mirrored; only where `flips`.

        Returns:
            float32 (B, D, h, w).
        """
        out = np.empty((len(rows), *self.shape), dtype=np.float16)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        version = np.zeros(len(rows), dtype=np.int64) if flipped is None else flipped.astype(np.int64)
        for k, (shard, row) in enumerate(zip(shard_of, rows - self._starts[shard_of], strict=True)):
            out[k] = self.shards[shard][row, version[k]]
        return (torch.from_numpy(out).float() - self.mean.view(-1, 1, 1)) / self.std


def _write_whole(path: Path, content: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    fsync_path(path.parent)


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


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
        good = batch["index"] == batch["example"]  # an undecodable image was replaced by its neighbour: drop it
        latents.append(stack.cpu().to(torch.float16).numpy()[good.numpy()])
        rows.append(torch.stack((batch["index"], batch["label"]), dim=1).numpy()[good.numpy()])
    return np.concatenate(latents), np.concatenate(rows)


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
    finished = (place / "meta.json").exists()
    wait()  # before anyone can finish it: all processes have to take the same way
    if finished:
        return open_cache(place)
    place.mkdir(parents=True, exist_ok=True)
    shards = -(-len(dataset) // SHARD_IMAGES)
    mine = range(process_index(), shards, process_count())
    moments: Moments | None = None
    for shard in tqdm(mine, desc="encoding latents", unit="shard", disable=process_index() > 0, dynamic_ncols=True):
        path = place / f"latents-{shard:05d}.npy"
        if not path.exists():
            chosen = range(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, len(dataset)))
            batches = range_batches(dataset, chosen, batch_size, num_workers)
            latents, rows = _encode_shard(encode, batches, key["flip"], device)
            _write_whole(place / f"rows-{shard:05d}.npy", _npy_bytes(rows))
            _write_whole(path, _npy_bytes(latents))
        latents = np.load(path, mmap_mode="r", allow_pickle=False)
        moments = moments or Moments(latents.shape[2])
        moments.add(torch.from_numpy(np.array(latents)).flatten(0, 1))
    channels = torch.tensor([len(moments.sums[0]) if moments else 0], device=device)
    channels = int(all_reduce_max(channels))
    mean, variance = (moments or Moments(channels)).result(device)
    std = overall_std(variance)
    if must_vary and not (np.isfinite(std) and std > 1e-4 and bool(mean.isfinite().all())):
        raise UserError(f"The autoencoder gives latents of standard deviation {std:.3g}; it cannot be used.")
    if process_index() == 0:
        meta = {
            "key": key,
            "shards": shards,
            "mean": mean.tolist(),
            "std": std,
            "channel_std": variance.sqrt().tolist(),
        }
        _write_whole(place / "meta.json", json.dumps(meta, indent=1).encode())
    wait()
    return open_cache(place)


def latents_for_run(
    config: UNetConfig,
    autoencoder: StockAutoencoder,
    device: torch.device,
    is_main: bool,
    wait: Callable[[], None],
) -> tuple[LatentCache, LatentCache]:
    """The latents of a run's training set and of its held-out images, made if they are missing; call in every process.

    Both are normalized by the training set's mean and standard deviation.

    Args:
        config: names the data, the transform and the folders.
        autoencoder: that of `config.autoencoder_dir`, on `device`, without a normalization folded in.
        device: where it works.
        is_main: whether this process prepares what only one may.
        wait: a barrier over the processes.

    Raises:
        UserError: no data, too many undecodable images, or an unusable autoencoder.
    """
    output_dir = Path(config.output_dir)
    sources = open_sources(config)
    bad_images = BadImages(output_dir / "bad_images.jsonl", sum(map(len, sources)), config.max_bad_image_share)
    folder = Path(config.latents_dir) if config.latents_dir else output_dir / "latents"

    def cache_of(source: ImageSource, folder: Path, flip: bool, must_vary: bool) -> LatentCache:
        # train=False: the cache holds centre crops, whatever stage 1 was shown
        images = open_image_dataset(
            source, config, output_dir / "cache", bad_images, train=False, is_main=is_main, wait=wait
        )
        key = cache_key(config.autoencoder_dir, images, config.resolution, config.image_channels, flip)
        workers = config.dataloader_num_workers
        batch_size = config.train_batch_size
        return build_cache(
            lambda batch: latents_of(autoencoder, batch),
            images, folder, key, batch_size, device, wait, workers, must_vary,
        )  # fmt: skip

    train = cache_of(sources[0], folder, config.random_flip, True)
    held_out = cache_of(sources[1], folder / "held_out", False, False)
    bad_images.check()
    return train, dataclasses.replace(held_out, mean=train.mean, std=train.std)


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """The largest of the processes' values."""
    if process_count() > 1:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value


def open_cache(place: Path) -> LatentCache:
    """Open a finished cache."""
    meta = json.loads((place / "meta.json").read_text())
    shards = [np.load(place / f"latents-{i:05d}.npy", mmap_mode="r", allow_pickle=False) for i in range(meta["shards"])]
    rows = np.concatenate([np.load(place / f"rows-{i:05d}.npy", allow_pickle=False) for i in range(meta["shards"])])
    mean = torch.tensor(meta["mean"], dtype=torch.float32)
    return LatentCache(shards, rows[:, 0], rows[:, 1], mean, meta["std"], place)
