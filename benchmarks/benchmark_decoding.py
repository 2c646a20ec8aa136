"""Measure how many JPEG photographs a core decodes, crops and resizes in a second, over what Pillow's plain path does.

    python benchmarks/benchmark_decoding.py --json docs/results/scale/decoding.json

The plain path is what one writes without thinking of speed: open, convert to RGB, resize the shorter side to 256
pixels, crop the centre, mirror half of the images, convert to floats in [-1, 1]. It is measured with Pillow's Lanczos,
bicubic and bilinear filters. Ours is `ImageDataset.get`: Lanczos, 8 bits (floats are made on the device), resized by
PyTorch or by Pillow; and once more with floats.

All paths take turns in one process with one thread, each over all photographs of a size, in another order every round.
Times are processor times, so other programs disturb little. A ratio is that of one round; its median and quartiles are
over the rounds. The photographs are those inside scikit-learn and scikit-image, cut to 500x400, or side by side on a
larger canvas, with JPEG's usual 4:2:0 subsampling.
"""

import argparse
import io
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps

from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ImageDataset
from latent_ddpm.data.images import CENTRE, as_seen, decode, resize_and_crop, to_float
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.files import write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.launch import run

RESOLUTION = 256
FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("lanczos", "bicubic", "bilinear")}


def photographs() -> list[Image.Image]:
    """Photographs inside scikit-learn and scikit-image, of 451x300 to 1411x1411 pixels."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    of_sklearn = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    of_skimage = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket", "retina")]
    return [Image.fromarray(pixels) for pixels in (*of_sklearn, *of_skimage)]


def jpegs(size: tuple[int, int], quality: int) -> list[bytes]:
    """JPEG files of a size: a photograph each where it is large enough, else photographs side by side."""
    photos, files = photographs(), []
    for first, photo in enumerate(photos):
        if size[0] <= 500:
            canvas = ImageOps.fit(photo, size, Image.Resampling.LANCZOS)
        else:  # enlarged photographs would be smooth, and quicker to decode than real ones
            canvas, x, y, number = Image.new("RGB", size), 0, 0, first
            while y < size[1]:
                tile = ImageOps.fit(photos[number % len(photos)], (640, 427), Image.Resampling.LANCZOS)
                canvas.paste(tile, (x, y))
                x, number = x + 640, number + 1
                if x >= size[0]:
                    x, y = 0, y + 427
        buffer = io.BytesIO()
        canvas.save(buffer, "jpeg", quality=quality, subsampling="4:2:0")
        files.append(buffer.getvalue())
    return files


class Files(ImageSource):
    """Image files in memory."""

    fingerprint = "files"

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode(self.files[i], at_least)

    def name(self, i: int) -> str:
        return str(i)


def dataset(files: list[bytes], library: str) -> ImageDataset:
    """Our path over these files."""
    cfg = {"resolution": RESOLUTION, "image_channels": 3, "image_resize": library, "seed": 0}
    bad_images = BadImages("no/such/folder/bad_images.jsonl", len(files), 0.0)
    return ImageDataset(Files(files), SimpleNamespace(**cfg), bad_images, train=False)


def plain(file: bytes, resampling: Image.Resampling, flip: bool) -> torch.Tensor:
    """What one writes with Pillow, as torchvision's Resize, CenterCrop, ToTensor and Normalize: float32 (3, R, R)."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = RESOLUTION / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resampling)
    left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
    image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, R, R)
    return pixels.to(torch.float32).div(255).sub_(0.5).div_(0.5)


def paths(files: list[bytes]) -> dict[str, Callable[[int, bool], torch.Tensor]]:
    """The functions that are compared: number of a file and whether to mirror -> (3, R, R)."""
    by_pytorch, by_pillow = dataset(files, "pytorch"), dataset(files, "pillow")
    found: dict[str, Callable[[int, bool], torch.Tensor]] = {
        f"plain {name}": lambda i, flip, resampling=resampling: plain(files[i], resampling, flip)
        for name, resampling in FILTERS.items()
    }
    found["ours"] = lambda i, flip: by_pytorch.get(i, CENTRE, flip)
    found["ours with floats"] = lambda i, flip: to_float(by_pytorch.get(i, CENTRE, flip))
    found["ours by Pillow"] = lambda i, flip: by_pillow.get(i, CENTRE, flip)
    return found


def measure(files: list[bytes], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds for each image by path, one value a round; half of the images are mirrored."""
    compared = paths(files)
    names, times = list(compared), {name: [] for name in compared}
    for number in progress_bar(range(-1, rounds), "measuring", unit="round", leave=False):  # the first one warms up
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begun = time.process_time()
            for k in range(repeats * len(files)):
                compared[name](k % len(files), (k + k // len(files)) % 2 == 0)
            if number >= 0:
                times[name].append(1000 * (time.process_time() - begun) / (repeats * len(files)))
    return times


def difference(ours: torch.Tensor, others: torch.Tensor) -> dict[str, float | None]:
    """How far 8-bit images (N, 3, R, R) are apart, in levels of 255, and the lowest PSNR in dB (None if equal)."""
    distance = (ours.to(torch.float64) - others.to(torch.float64)).abs()
    worst = float(distance.square().flatten(1).mean(dim=1).max())
    psnr = 10 * math.log10(255**2 / worst) if worst > 0 else None
    return {"mean": float(distance.mean()), "max": float(distance.max()), "lowest_psnr": psnr}


def differences(files: list[bytes]) -> dict[str, dict[str, float | None]]:
    """How far the pixels that PyTorch resizes, or a JPEG that is decoded at reduced size, are from those without."""
    compared = paths(files)
    by_pytorch = torch.stack([compared["ours"](i, False) for i in range(len(files))])
    by_pillow = torch.stack([compared["ours by Pillow"](i, False) for i in range(len(files))])
    squares = [resize_and_crop(as_seen(decode(file), 3), RESOLUTION) for file in files]
    of_all_pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)  # the JPEG decoder has reduced nothing
    border = 4  # where the filter reaches beyond the window
    inner = (..., slice(border, -border), slice(border, -border))
    return {
        "pytorch_to_pillow": difference(by_pytorch, by_pillow),
        "pytorch_to_pillow_4_pixels_from_the_border": difference(by_pytorch[inner], by_pillow[inner]),
        "reduced_to_all_pixels": difference(by_pillow, of_all_pixels),
    }


def spread(values: list[float]) -> dict[str, float | list[float]]:
    """Median, quartiles and range."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high], "range": [min(values), max(values)]}


def summary(times: dict[str, list[float]]) -> dict[str, dict]:
    """Milliseconds for each image by path, and how many times as many images ours make as plain paths in a round."""
    plains, ours = ([name for name in times if name.startswith(word)] for word in ("plain", "ours"))
    ratios = {
        name: {other: spread([a / b for a, b in zip(times[name], times[other], strict=True)]) for other in ours}
        for name in plains
    }
    return {"ms": {name: spread(of_path) for name, of_path in times.items()}, "times_as_many_as": ratios}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["500x400", "1024x768", "3000x2000"])
    parser.add_argument("--quality", type=int, default=93, help="of the JPEG files")
    parser.add_argument("--rounds", type=int, default=18)
    parser.add_argument("--seconds", type=float, default=0.25, help="that a path's turn takes, about")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result: dict = {
        "command": "python benchmarks/benchmark_decoding.py " + shlex.join(argv),
        "versions": {"pillow": PIL.__version__, "torch": torch.__version__},
        "load_at_start": os.getloadavg()[0],
        "sizes": {},
    }
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        files = jpegs((width, height), options.quality)
        begun = time.process_time()
        for file in files:
            plain(file, FILTERS["lanczos"], False)
        repeats = max(1, round(options.seconds / (time.process_time() - begun)))
        result["sizes"][size] = {
            "kilobytes": statistics.mean(map(len, files)) / 1000,
            **summary(measure(files, options.rounds, repeats)),
            "differences": differences(files),
        }
        print(size, json.dumps(result["sizes"][size], indent=1), file=sys.stderr)
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
