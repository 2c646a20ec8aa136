"""A folder of images, nested in any way, with captions beside the images or in metadata files."""

import contextlib
import csv
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latent_ddpm.data.images import decode
from latent_ddpm.data.indexing import CompactStrings, RunningDigest, give_memory_back, in_parts, narrow
from latent_ddpm.data.sources.base import MANY, ImageSource
from latent_ddpm.errors import UserError

# Raster formats people keep training images in. Pillow opens more (PDF-like, icons, scientific containers).
EXTENSIONS = (
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pfm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp"),
)


class FolderSource(ImageSource):
    """All images below a folder, sorted by relative path; hidden files and folders are skipped.

    The first folder below the root is the class, if every image is in one and there are two or more. A file is an image
    if its extension says so; whether it can be decoded is known when it is loaded.

    Args:
        root: the folder.
        scratch: folder for the names if there are many; see `CompactStrings`.

    Raises:
        UserError: the folder does not exist or holds no image.
    """

    def __init__(self, root: str | os.PathLike, scratch: str | os.PathLike | None = None) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"train_data_dir: there is no folder {str(self.root)!r}")
        others: set[str] = set()
        self.names, running, number = CompactStrings(scratch), RunningDigest("folder"), {}
        numbers: list[np.ndarray] = []  # of each image's folder
        for part in in_parts(self._scan(str(self.root), "", (), others)):
            running.update(part)
            names = [name for name, _, _ in part]
            self.names.extend(names)
            folders = (name.split("/", 1)[0] if "/" in name else None for name in names)
            # numbered in order of appearance
            of_part = np.fromiter((number.setdefault(folder, len(number)) for folder in folders), np.int32, len(part))
            numbers.append(narrow([of_part], len(part)))
        if not self.names:
            seen = f"; it has files ending in {', '.join(sorted(others)[:8])}" if others else ""
            raise UserError(
                f"train_data_dir: no image in {str(self.root)!r} or below it{seen}. "
                f"Looked for {', '.join(EXTENSIONS)}, in lower or upper case"
            )
        self.fingerprint = running.result()
        if len(self.names) >= MANY:
            give_memory_back()
        if None not in number and len(number) >= 2:
            self.class_names = sorted(number)
            place = {name: k for k, name in enumerate(self.class_names)}
            places = np.array([place[name] for name in number])
            self.labels = narrow((places[of_part] for of_part in numbers), len(self.names))

    def _scan(self, folder: str, prefix: str, above: tuple, others: set[str]) -> Iterator[tuple[str, int, int]]:
        """Path, size and time of each image in or below a folder, ordered by path, one folder at a time."""
        try:
            here = os.stat(folder)
            if (here.st_dev, here.st_ino) in above:  # a link to a folder that contains it
                return
            found = _images_and_folders(folder, others)
        except FileNotFoundError:  # removed after it was listed
            return
        except OSError as error:
            raise UserError(f"train_data_dir: {folder} cannot be read: {error.strerror}") from error
        for name in found:
            if name.endswith("/"):
                above_it = (*above, (here.st_dev, here.st_ino))
                yield from self._scan(f"{folder}/{name[:-1]}", prefix + name, above_it, others)
                continue
            try:
                stat = os.stat(f"{folder}/{name}")
                yield prefix + name, stat.st_size, stat.st_mtime_ns
            except OSError:  # a dangling link: becomes a bad image when it is loaded
                yield prefix + name, -1, -1

    def __len__(self) -> int:
        return len(self.names)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return decode(self.data(i), at_least)

    def data(self, i: int) -> bytes:
        return (self.root / self.names[i]).read_bytes()

    @functools.cached_property
    def _metadata(self) -> dict[str, dict]:
        """The rows of all metadata.jsonl and metadata.csv files by image path, read as `datasets.imagefolder` does.

        Raises:
            UserError: a file is damaged, or a row has no file_name.
        """
        found: dict[str, dict] = {}
        for path in sorted([*self.root.rglob("metadata.jsonl"), *self.root.rglob("metadata.csv")]):
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(
                        csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
                    )
                here = path.parent.relative_to(self.root)
                found |= {(here / row["file_name"]).as_posix(): row for row in rows}
            except (ValueError, KeyError, TypeError, csv.Error) as error:
                hint = "" if isinstance(error, UnicodeDecodeError) else "; each row has a file_name"
                raise UserError(f"{path} cannot be read: {type(error).__name__} {error}{hint}") from error
        return found

    def caption_columns(self) -> list[str]:
        return self._caption_columns

    @functools.cached_property
    def _caption_columns(self) -> list[str]:  # cached: it may have to look beside every image
        columns = dict.fromkeys(key for row in self._metadata.values() for key in row if key != "file_name")
        if "text" not in columns and any((self.root / name).with_suffix(".txt").exists() for name in self.names):
            columns["text"] = None
        beside = next((path for name in self.names if (path := (self.root / name).with_suffix(".json")).exists()), None)
        return [*columns, *([] if beside is None else _json_object(beside))]

    def captions(self, i: int, column: str) -> Any:
        name = self.names[i]
        if column in self._metadata.get(name, {}):
            return self._metadata[name][column]
        beside = (self.root / name).with_suffix(".json")
        if beside.exists():
            return _json_object(beside).get(column)
        text = (self.root / name).with_suffix(".txt")
        if column != "text" or not text.exists():
            return None
        try:
            return text.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{text} cannot be read: {error}") from error

    def name(self, i: int) -> str:
        return self.names[i]

    def all_names(self) -> Iterator[str]:
        return iter(self.names)


def _images_and_folders(folder: str, others: set[str]) -> list[str]:
    """Names of images and folders (with a trailing slash) in a folder, in the order of the paths below it.

    The extensions of other files are added to `others`.
    """
    found, known = [], frozenset(EXTENSIONS)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            dot = entry.name.rfind(".")
            extension = entry.name[dot:].lower() if dot > 0 else ""
            is_folder = False
            with contextlib.suppress(OSError):  # a link to itself counts as dangling
                is_folder = entry.is_dir()
            if is_folder:
                found.append(f"{entry.name}/")
            elif extension in known:
                found.append(entry.name)
            elif extension:
                others.add(extension)
    return sorted(found)


def _json_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
