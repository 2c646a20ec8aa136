"""Decode thousands of damaged images: each must give an image or an error with a message.

    python benchmarks/fuzz_images.py --files 10000 --json docs/results/NAME.json

Real photographs (from --images FOLDER, else those in scikit-image) are written in every format, mode and odd size, with
and without a colour profile, then damaged: flipped bits, overwritten bytes, truncation, parts of other files, huge
lengths in headers, repeated, removed or zeroed pieces. A separate process decodes each file as training does. The
result counts the outcomes: an image of the right size, an error with a message, a crash, or a process that hangs or
uses too much memory.
"""

import argparse
import io
import json
import multiprocessing
import random
import shlex
import struct
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from latent_ddpm.data.colours import matrix_profile
from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.images import CENTRE, decode
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.files import write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.resizing import resizer
from latent_ddpm.training.launch import run

PATIENCE = 30  # seconds that a file may take
MEMORY = 8 * 2**30  # bytes that a process may take
RESOLUTION = 64
PRIMARIES = ((0.7, 0.3), (0.2, 0.75), (0.13, 0.05), (0.31, 0.33))  # x and y of red, green, blue and white


class BytesSource(ImageSource):
    """A single file that is no file yet."""

    fingerprint = "bytes"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __len__(self) -> int:
        return 1

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode(self.content, at_least)

    def name(self, i: int) -> str:
        return "bytes"


def photographs(folder: Path | None) -> list[Image.Image]:
    """What is damaged."""
    if folder is not None:
        source = FolderSource(folder)
        return [source.load(i).convert("RGB") for i in range(min(8, len(source)))]
    pictures = (skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket())
    return [Image.fromarray(picture).resize((160, 120)) for picture in pictures]


def whole_files(folder: Path | None) -> list[tuple[str, bytes]]:
    """Images in every format and mode, by name."""
    files = []
    options = {"JPEG": [{}, {"progressive": True}, {"quality": 5, "exif": Image.Exif().tobytes()}]}
    compressions = ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")
    options |= {"TIFF": [{"compression": compression} for compression in compressions]}
    options |= {"PNG": [{}, {"optimize": True}], "WEBP": [{}, {"lossless": True}], "GIF": [{}, {"interlace": 1}]}
    options |= {name: [{}] for name in ("BMP", "PPM", "TGA", "JPEG2000", "AVIF", "QOI")}
    for name in ("JPEG", "TIFF", "PNG", "WEBP"):
        options[name].append({"icc_profile": matrix_profile("fuzz", PRIMARIES, 1.8)})
    for number, photograph in enumerate(photographs(folder)):
        for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1", "I;16", "F", "LA", "YCbCr"):
            image = photograph.convert("L" if mode in ("I;16", "F") else mode)
            if mode == "I;16":
                image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            if mode == "F":
                values = np.asarray(image, dtype=np.float32) / 255
                values[::7] = np.nan
                image = Image.fromarray(values)
            for format, variants in options.items():
                for k, variant in enumerate(variants):
                    if variant.get("compression") == "jpeg" and mode not in ("RGB", "L", "YCbCr"):
                        continue  # libtiff itself crashes when it writes some
                    content = io.BytesIO()
                    try:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            image.save(content, format, **variant)
                    except (OSError, ValueError, KeyError):  # the format has no such mode
                        continue
                    files.append((f"{format}-{mode}-{k}-{number}", content.getvalue()))
    for size in ((1, 1), (1, 5000), (5000, 1), (3, 2)):
        for format in ("PNG", "JPEG", "GIF"):
            content = io.BytesIO()
            Image.new("RGB", size, "red").save(content, format)
            files.append((f"{format}-{size[0]}x{size[1]}", content.getvalue()))
    for side in (12_000, 20_000):  # decompression bombs: some 100 kB
        content = io.BytesIO()
        Image.new("1", (side, side)).save(content, "PNG")
        files.append((f"PNG-{side}x{side}", content.getvalue()))
    return files


def damaged(content: bytes, other: bytes, dice: random.Random) -> bytes:
    """One to four injuries."""
    data = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        if not data:
            return b""
        place, length = dice.randrange(len(data)), dice.randint(1, max(1, len(data) // 8))
        kind = dice.randrange(9)
        if kind == 0:
            data[place] ^= 1 << dice.randrange(8)
        elif kind == 1:
            data[place : place + 4] = dice.randbytes(4)
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            data[place:] = other[dice.randrange(max(1, len(other))) :]
        elif kind == 4:  # a length or a size, most of which stand in the first bytes
            place = dice.randrange(min(64, len(data)))
            value = dice.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
            data[place : place + 4] = struct.pack(dice.choice("<>") + "I", value)
        elif kind == 5:
            data[place:place] = data[place : place + length]
        elif kind == 6:
            del data[place : place + length]
        elif kind == 7:
            data[place : place + length] = bytes(min(length, len(data) - place))
        else:
            for _ in range(20):
                data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def serve(pipe: Connection) -> None:
    """In a process of its own: decode what comes, answer with what came of it."""
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while (content := pipe.recv_bytes()) != b"end":
        square = decode_square(BytesSource(content), 0, RESOLUTION, 3, CENTRE, resizer(None))
        if isinstance(square, str):
            pipe.send(square)
        else:
            pipe.send("image" if square.shape == (RESOLUTION, RESOLUTION, 3) else f"wrong shape {square.shape}")


class Decoder:
    """A process that decodes, and is replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.process = None

    def __call__(self, content: bytes) -> str:
        if self.process is None:
            self.pipe, other = multiprocessing.Pipe()
            self.process = multiprocessing.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.pipe.send_bytes(content or b"\0")
        try:
            if self.pipe.poll(PATIENCE):
                return self.pipe.recv()
            outcome = "hang"
        except EOFError:
            outcome = "crash"
        self.process.kill()
        self.process.join()
        outcome = f"{outcome} ({self.process.exitcode})"
        self.process = None
        return outcome


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for files that crash or hang")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    whole, dice, decoder = whole_files(options.images), random.Random(options.seed), Decoder()
    outcomes, errors, failures, slowest = Counter(), Counter(), [], (0.0, "")
    undamaged = {name: decoder(content) for name, content in whole}
    for number in progress_bar(range(options.files), unit="file"):
        name, content = whole[number % len(whole)]
        content = damaged(content, dice.choice(whole)[1], dice)
        begun = time.monotonic()
        outcome = decoder(content)
        slowest = max(slowest, (time.monotonic() - begun, f"{number}: {name}"))
        if outcome == "image" or not outcome.startswith(("crash", "hang", "wrong")):
            outcomes["image" if outcome == "image" else "error with a message"] += 1
            if outcome != "image":
                errors[outcome.split(":")[0]] += 1
        else:
            outcomes[outcome] += 1
            failures.append(f"{number}, {name}: {outcome}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{number}-{name}").write_bytes(content)
    result = {
        "command": "python benchmarks/fuzz_images.py " + shlex.join(argv),
        "files": options.files,
        "kinds": len(whole),
        "outcomes": outcomes,
        "errors": dict(errors.most_common(12)),
        "slowest": {"seconds": slowest[0], "file": slowest[1]},
        "failures": failures,
        "undamaged_refused": {name: outcome for name, outcome in undamaged.items() if outcome != "image"},
    }
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    run(main)
