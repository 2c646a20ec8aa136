"""One look at each image of a run, in a table that is cached block by block, so that a stopped inspection goes on.

An image is decoded by the code that decodes it for training: what is undecodable here is undecodable there.
"""

import hashlib
import io
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from latent_ddpm.data.colours import colour_profile
from latent_ddpm.data.images import CENTRE, as_seen, decode, resize_and_crop
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.files import remove_leftovers, write_whole
from latent_ddpm.progress import progress_bar
from latent_ddpm.resizing import resizer

BLOCK = 256  # images per cached file: a killed inspection loses at most this many for each process
SMALL, THUMB = 32, 16  # sides of the picture that is hashed, and of the one that candidates are compared by
GRAY_SPREAD = 8  # a picture whose channels differ by no more is gray: JPEG rounds its channels differently
FLAT_SPREAD = 2  # an image whose values differ by no more is of one colour
DARK = 16  # a deep image whose values, as 8 bits, are all below this is black to the eye

# What is true of an image; the bits of the column `flags`.
FLAGS = ("bad", "transparent", "rotated", "frames", "float", "colour", "flat", "dark", "stored")
BIT = {name: 1 << k for k, name in enumerate(FLAGS)}
WORDS = ("format", "mode", "depth", "profile")  # columns that are numbers of words
# name, type and shape of a row's other columns
NUMBERS = (
    ("flags", np.uint16, ()),
    ("width", np.int32, ()),  # of the file, upright
    ("height", np.int32, ()),
    ("content", np.uint64, (2,)),  # digest of the bytes, 0 where there are none
    ("pixels", np.uint64, (2,)),  # digest of the square that training sees
    ("hash", np.uint64, ()),  # perceptual hash of the square
    ("mirrored", np.uint64, ()),  # and of its mirror image
    ("contrast", np.float32, ()),  # standard deviation of the thumbnail
    ("thumb", np.uint8, (THUMB, THUMB, 3)),
)


class Table:
    """What was seen of each image, by column.

    Attributes:
        numbers: the columns NUMBERS, arrays of N rows.
        words: the columns WORDS as arrays of N indices into `vocabulary`.
        vocabulary: of each such column, its words.
        errors: why an image cannot be decoded, by its index.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.numbers = {name: np.zeros((len(rows), *shape), dtype) for name, dtype, shape in NUMBERS}
        for name, column in self.numbers.items():
            for k, row in enumerate(rows):
                if name in row:
                    column[k] = row[name]
        self.vocabulary: dict[str, list[str]] = {}
        self.words: dict[str, np.ndarray] = {}
        for name in WORDS:
            number: dict[str, int] = {}
            found = [number.setdefault(row.get(name) or "", len(number)) for row in rows]
            self.words[name], self.vocabulary[name] = np.array(found, dtype=np.int32), list(number)
        self.errors = {k: row["error"] for k, row in enumerate(rows) if "error" in row}

    def __len__(self) -> int:
        return len(self.numbers["flags"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.numbers[name]

    def has(self, flag: str) -> np.ndarray:
        """Whether a flag is set: bool (N,)."""
        return (self["flags"] & BIT[flag]) > 0

    def count(self, name: str, among: np.ndarray) -> dict[str, int]:
        """How many of the images `among`, bool (N,), have each word of a column; the most frequent first."""
        counts = np.bincount(self.words[name][among], minlength=len(self.vocabulary[name])).tolist()
        found = {word: count for word, count in zip(self.vocabulary[name], counts, strict=True) if count and word}
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def to_bytes(self) -> bytes:
        """The table as an .npz file without pickle."""
        about = json.dumps({"vocabulary": self.vocabulary, "errors": self.errors})
        buffer = io.BytesIO()
        np.savez(buffer, about=np.frombuffer(about.encode(), np.uint8), **self.numbers, **self.words)
        return buffer.getvalue()

    @classmethod
    def from_file(cls, path: Path | io.BytesIO) -> "Table":
        """Reads `to_bytes`, from a file or from memory.

        Raises:
            OSError, ValueError, KeyError: there is no such file, or it is damaged.
        """
        table = cls()
        with np.load(path) as found:
            about = json.loads(found["about"].tobytes())
            table.numbers = {name: found[name] for name, _, _ in NUMBERS}
            table.words = {name: found[name] for name in WORDS}
        table.vocabulary = about["vocabulary"]
        table.errors = {int(k): error for k, error in about["errors"].items()}
        return table

    @classmethod
    def joined(cls, parts: Sequence["Table"]) -> "Table":
        """The rows of several tables, one after the other."""
        table = cls()
        starts = list(itertools.accumulate((len(part) for part in parts), initial=0))
        table.numbers = {name: np.concatenate([part.numbers[name] for part in parts]) for name, _, _ in NUMBERS}
        for name in WORDS:
            number = {word: k for k, word in enumerate(dict.fromkeys(w for p in parts for w in p.vocabulary[name]))}
            maps = [np.array([number[word] for word in part.vocabulary[name]], dtype=np.int32) for part in parts]
            table.words[name] = np.concatenate([m[part.words[name]] for m, part in zip(maps, parts, strict=True)])
            table.vocabulary[name] = list(number)
        table.errors = {
            start + k: why for start, part in zip(starts, parts, strict=False) for k, why in part.errors.items()
        }
        return table


# ----------------------------------------------------------------------------------------------------- one image


def header_of(data: bytes) -> dict[str, Any]:
    """What the header of an image file says, without decoding it.

    Returns:
        format, mode, depth and profile (words), width and height (as stored), and flags; {} where it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoding warns, or fails, where it matters
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # the decoder says why
            return {}
        return _header(image)


def _header(image: Image.Image) -> dict[str, Any]:
    flags = 0
    deep = any(";16" in str(getattr(tile, "args", tile[-1])) for tile in getattr(image, "tile", None) or ())
    depth = {"1": "1", "F": "32 (float)", "I": "32"}.get(image.mode, "16" if ";16" in image.mode or deep else "8")
    flags |= BIT["float"] if image.mode == "F" else 0
    flags |= BIT["transparent"] if image.has_transparency_data else 0
    try:
        flags |= BIT["rotated"] if image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1) else 0
        # the other pictures of an MPO are a camera's previews, which nobody would miss
        flags |= BIT["frames"] if getattr(image, "is_animated", False) and image.format != "MPO" else 0
    except Exception:  # a damaged EXIF block, or a second frame that is cut off
        pass
    return {
        "format": image.format or "", "mode": image.mode, "depth": depth, "flags": flags,
        "profile": colour_profile(image), "width": image.width, "height": image.height,
    }  # fmt: skip


def look_at(
    source: ImageSource, i: int, resolution: int, channels: int, resized_by: str, hashed: bool = True
) -> dict[str, Any]:
    """A row of the table, which `finish` completes: image i as training sees it, and the file it comes from.

    Args:
        source: the images.
        i: index of one of them.
        resolution: of the run, in pixels.
        channels: 1 or 3.
        resized_by: the library, from `resizing.resizer`.
        hashed: whether to compute what copies are found by.
    """
    row: dict[str, Any] = {"flags": 0}
    try:
        data = source.data(i)
        if data is not None:
            row |= header_of(data)
            row["content"] = _digest(data) if hashed else 0
        image = decode(data, 2 * resolution) if data is not None else source.load(i, at_least=2 * resolution)
        if "mode" not in row:
            row |= _header(image)
            row["flags"] |= BIT["stored"] if data is None else 0
        seen = as_seen(image, channels)
        square = resize_and_crop(seen, resolution, CENTRE, resized_by)
    except Exception as error:  # as in images.square
        return {"flags": row["flags"] | BIT["bad"], "error": f"{type(error).__name__}: {error}"[:500],
                "format": row.get("format")}  # fmt: skip
    if (seen.width - seen.height) * (row["width"] - row["height"]) < 0:  # rotated by its EXIF orientation
        row["width"], row["height"] = row["height"], row["width"]
    return row | _seen(square, seen if channels == 3 else image, row["flags"], row["depth"], hashed)


def _seen(square: np.ndarray, of_colour: Image.Image, flags: int, depth: str, hashed: bool) -> dict[str, Any]:
    """The columns that come from the pixels; `square` is uint8 (R, R, C).

    Also `small`, uint8 (S, S, 3), and, if the run is gray and the image is not, `colours`, from which `finish` makes
    the other columns of many images at once.
    """
    gray = square.shape[-1] == 1
    picture = Image.fromarray(np.ascontiguousarray(square[..., 0] if gray else square))
    small = _shrunk(picture, SMALL)
    extrema = picture.getextrema()  # of each channel; of the only one, without a list around it
    lows, highs = zip(*([extrema] if gray else extrema), strict=True)
    flags |= BIT["flat"] if max(high - low for low, high in zip(lows, highs, strict=True)) <= FLAT_SPREAD else 0
    flags |= BIT["dark"] if depth not in ("1", "8") and max(highs) < DARK else 0
    row = {"flags": flags, "small": np.asarray(small.convert("RGB"))}
    if hashed:
        mirrored = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        row |= {"hash": perceptual_hash(small), "mirrored": perceptual_hash(mirrored)}
        row["pixels"] = _digest(square.tobytes())
    if gray and _may_be_colour(of_colour):
        row["colours"] = np.asarray(_shrunk(as_seen(of_colour, 3), SMALL))
    return row


def _may_be_colour(image: Image.Image) -> bool:
    return image.mode not in ("1", "L", "LA", "La", "F") and not image.mode.startswith("I")


def finish(rows: list[dict[str, Any]]) -> None:
    """Adds the thumbnail, its contrast and the flag `colour` to the rows of decodable images."""
    seen = [row for row in rows if "small" in row]
    if not seen:
        return
    smalls = np.stack([row.pop("small") for row in seen])  # (B, S, S, 3)
    step = SMALL // THUMB
    sums = smalls.reshape(len(seen), THUMB, step, THUMB, step, 3).sum(axis=(2, 4), dtype=np.uint16)
    thumbs = ((sums + step**2 // 2) // step**2).astype(np.uint8)  # (B, T, T, 3)
    contrasts = thumbs.std(axis=(1, 2, 3), dtype=np.float32)
    colours = np.stack([row.pop("colours", small) for row, small in zip(seen, smalls, strict=True)])
    spread = (colours.max(axis=-1) - colours.min(axis=-1)).max(axis=(1, 2))
    for row, thumb, contrast, of_row in zip(seen, thumbs, contrasts, spread, strict=True):
        row |= {"thumb": thumb, "contrast": contrast}
        row["flags"] |= BIT["colour"] if of_row > GRAY_SPREAD else 0


def _shrunk(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    larger = min(image.size) >= side
    return image.resize((side, side), Image.Resampling.BOX if larger else Image.Resampling.BICUBIC)


def perceptual_hash(image: Image.Image) -> int:
    """pHash of a picture in 64 bits: the signs of its lowest frequencies against their median."""
    import imagehash  # takes PyWavelets with it, and training does without

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")


def _digest(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)


# ---------------------------------------------------------------------------------------------------- all images


class _Blocks(Dataset):
    """Tables of `BLOCK` images of several sources, one after the other; for the worker processes."""

    def __init__(self, sources: Sequence[ImageSource], config: Any) -> None:
        self.sources = sources
        self.settings = (config.resolution, config.image_channels, resizer(config.image_resize))
        self.starts = list(itertools.accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        return -(-self.starts[-1] // BLOCK)

    def _row(self, i: int) -> dict[str, Any]:
        of = int(np.searchsorted(self.starts, i, side="right")) - 1
        return look_at(self.sources[of], i - self.starts[of], *self.settings)

    def __getitem__(self, block: int) -> tuple[int, bytes]:
        numbers = range(block * BLOCK, min((block + 1) * BLOCK, self.starts[-1]))
        rows = [self._row(i) for i in numbers]
        finish(rows)
        return block, Table(rows).to_bytes()


def look_at_all(sources: Sequence[ImageSource], config: Any, folder: Path, workers: int) -> Table:
    """The table of all images of the sources, one source after the other.

    Each finished block is a file in `folder`, so the next call goes on where a killed one stopped.

    Args:
        sources: usually the training and the validation images.
        config: has `resolution`, `image_channels`, `image_resize`.
        folder: for the blocks; created if missing.
        workers: processes that decode; 0 decodes in this one.
    """
    blocks = _Blocks(sources, config)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    found: dict[int, Table] = {}
    for block in range(len(blocks)):
        try:
            found[block] = Table.from_file(_path(folder, block))
        except Exception:  # missing or damaged: looked at again
            continue
    missing = [block for block in range(len(blocks)) if block not in found]
    with progress_bar(total=blocks.starts[-1], desc="looking at images", unit="image") as bar:
        bar.update(sum(map(len, found.values())))
        for block, content in _loaded(blocks, missing, workers):
            write_whole(_path(folder, block), content)
            # not from the file, which another inspection of the same images may have removed at its end
            found[block] = Table.from_file(io.BytesIO(content))
            bar.update(len(found[block]))
    return Table.joined([found[block] for block in range(len(blocks))])


def _path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:06d}.npz"


def _loaded(blocks: _Blocks, wanted: list[int], workers: int) -> Iterator[tuple[int, bytes]]:
    if workers < 2 or len(wanted) < 2:
        yield from (blocks[block] for block in wanted)
        return
    yield from DataLoader(
        blocks, batch_size=None, sampler=wanted, num_workers=min(workers, len(wanted)), collate_fn=_as_it_is,
        generator=torch.Generator(),  # otherwise the loader would draw from the global one
    )  # fmt: skip


def _as_it_is(item: tuple[int, bytes]) -> tuple[int, bytes]:
    return item
