"""Measure whether index, latent cache and example order stay small and fast as the dataset grows.

    python benchmarks/benchmark_latents.py --images 10000 10000000 --json docs/results/NAME.json
    python benchmarks/benchmark_latents.py --images 10000 10000000 --only_folder --json docs/results/NAME.json

Writes caches of synthetic latents (4x8x8, as for 32-pixel images) to a temporary folder, about 5.3 GB for ten million,
and datasets with as many rows (an image name, one byte of content, a label). Then, alternating and each in its own
process:

- opens a cache and draws shuffled batches of 128, as train_unet.py does: time to the first batch, resident memory at
  the end, images per second;
- opens the dataset and splits it, twice (the second time as a later start of the same run): time, memory while it is
  open, and memory after its release. Anonymous memory excludes mapped file pages, resident memory includes them.

The operating system's file cache is left as it is; the smaller dataset always fits into it. With --only_folder the
dataset is a folder with a thousand images per subfolder, and there are no latents.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ExampleOrder, open_image_dataset
from latent_ddpm.data.latents import SHARD_IMAGES, finish_cache, open_cache, shard_path, write_shard
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.files import write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.launch import run

SHAPE = (1, 4, 8, 8)  # versions, channels, height, width
BATCH = 128


def write_cache(place: Path, images: int) -> None:
    """A finished cache of random latents."""
    place.mkdir()
    numbers = np.random.default_rng(0)
    shards = -(-images // SHARD_IMAGES)
    for shard in progress_bar(range(shards), f"writing {images} latents", unit="shard", leave=False):
        index = np.arange(shard * SHARD_IMAGES, min((shard + 1) * SHARD_IMAGES, images))
        latents = numbers.standard_normal((len(index), *SHAPE), dtype=np.float32).astype(np.float16)
        write_shard(shard_path(place, shard), latents, index, np.full(len(index), -1))
    finish_cache(place, shards, {"mean": [0.0] * SHAPE[1], "std": 1.0})


def write_dataset(path: Path, images: int) -> None:
    """A parquet file of rows with the name of an image, a byte in the place of its content, and a label."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)}
    schema = datasets.Features(kinds).arrow_schema
    with parquet.ParquetWriter(path, schema) as file:
        for start in range(0, images, 100_000):
            numbers = range(start, min(start + 100_000, images))
            rows = [{"bytes": b"x", "path": f"photos/{i % 1000:03d}/{i:08d}.jpg"} for i in numbers]
            table = {"image": rows, "label": [i % 1000 for i in numbers]}
            file.write_table(pyarrow.Table.from_pydict(table, schema=schema))


def write_folder(folder: Path, images: int) -> None:
    """Folders of a thousand names each, of one image."""
    for start in progress_bar(range(0, images, 1000), "writing folders", unit="folder", leave=False):
        inside = folder / f"{start // 1000:06d}"
        inside.mkdir(parents=True)
        first = inside / f"{start:08d}.png"
        Image.new("RGB", (32, 32), (start // 1000 % 256, 0, 0)).save(first)
        for number in range(start + 1, min(start + 1000, images)):
            os.link(first, inside / f"{number:08d}.png")  # a file of its own for each would fill the disk


def memory(state: str) -> dict:
    """What this process holds in memory."""
    of_process = psutil.Process().memory_info()
    # what is no page of a file, so cannot be dropped and read again
    return {
        f"resident_{state}_gib": of_process.rss / 2**30,
        f"anonymous_{state}_gib": (of_process.rss - of_process.shared) / 2**30,
    }


def index(path: Path, output_dir: Path) -> dict:
    """What one process measures of opening the images of a dataset."""
    of = {"train_data_dir" if path.is_dir() else "dataset_name": str(path)}
    config = UNetConfig(**of, image_cache_gib=0, resolution=32, output_dir=str(output_dir))
    if not path.is_dir():
        import datasets  # noqa: F401, its import is no part of what is measured

    begun = time.monotonic()
    bad_images = BadImages(path.with_suffix(".jsonl"), 10, 0.0)
    opened = [open_image_dataset(source, config, path.parent, bad_images, False, True, lambda: None)
              for source in open_sources(config)]  # fmt: skip
    seconds = time.monotonic() - begun
    found = {"seconds_to_open_dataset": seconds, "images": sum(map(len, opened)), **memory("open")}
    for images in opened:
        images.source.release()
    return {**found, **memory("released")}


def draw(place: Path, batches: int) -> dict:
    """What one process measures over so many batches."""
    begun = time.monotonic()
    cache = open_cache(place)
    order = ExampleOrder(len(cache), 0)
    first = cache.batch(order.indices(np.arange(BATCH)))
    to_first_batch = time.monotonic() - begun
    if not torch.isfinite(first).all():
        raise RuntimeError("the latents are not finite")
    begun = time.monotonic()
    for number in range(1, batches + 1):
        cache.batch(order.indices(np.arange(number * BATCH, (number + 1) * BATCH)))
    return {
        "seconds_to_first_batch": to_first_batch,
        "images_per_second": BATCH * batches / (time.monotonic() - begun),
        "resident_gib": psutil.Process().memory_info().rss / 2**30,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 10_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--only_folder", action="store_true", help="index a folder of images, without latents")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--index", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.draw:
        print(json.dumps(draw(options.draw, options.batches)))
        return 0
    if options.index:
        print(json.dumps(index(*options.index)))
        return 0
    results: dict[str, list[dict]] = {str(images): [] for images in options.images}
    with tempfile.TemporaryDirectory() as folder:
        for images in options.images:
            if options.only_folder:
                write_folder(Path(folder) / f"{images}-images", images)
            else:
                write_cache(Path(folder) / str(images), images)
                write_dataset(Path(folder) / f"{images}.parquet", images)
        environment = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}

        def measured(*words: object) -> dict:
            words = [sys.executable, __file__, *map(str, words)]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            return json.loads(done.stdout.splitlines()[-1])

        def opened(images: str, run: int) -> dict:
            dataset = f"{images}-images" if options.only_folder else f"{images}.parquet"
            return measured("--index", Path(folder) / dataset, Path(folder) / f"run-{images}-{run}")

        for images in results:  # for the first time, when `datasets` makes its own files
            opened(images, 0)
        for number in range(1, options.rounds + 1):
            for images, of_size in results.items():
                drawn = ["--draw", Path(folder) / images, "--batches", options.batches]
                found = {} if options.only_folder else measured(*drawn)
                first = {f"first_{key}": value for key, value in opened(images, number).items()}
                of_size.append(found | first | opened(images, number))
    medians = {
        images: {key: statistics.median(result[key] for result in of_size) for key in of_size[0]}
        for images, of_size in results.items()
    }
    first, last = (medians[str(images)] for images in (options.images[0], options.images[-1]))
    result = {
        "command": "python benchmarks/benchmark_latents.py " + shlex.join(argv),
        "medians": medians,
        "last_over_first": {key: last[key] / first[key] for key in first},
        "rounds": results,
    }
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
