"""Files that exist whole or not at all: written aside, under a name with the writer's process number, then renamed."""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

_ASIDE = re.compile(r".*\.(\d+)\.(tmp|new|old)")


def aside_name(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def fsync_path(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash, of the machine too, leaves the old one or the new one.

    Raises:
        OSError: it could not be written; the old one, if any, is untouched.
    """
    aside = aside_name(path)
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as `write_whole` does; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are no more left half-written in a folder (not below it)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _ASIDE.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG that exists whole or not at all: aside first, then renamed. Missing parents are made.

    Args:
        image: any PIL image of a mode that PNG holds.
        path: the file to write, replaced when it exists.

    Raises:
        OSError: the folder can not be made or written; no partial file is left behind.
    """
    _save_whole(image, Path(path), format="PNG")


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, milliseconds: int = 100) -> None:
    """Writes frames that repeat for ever, as `save_png` writes: lossless WebP, or GIF (256 colours a frame).

    Args:
        frames: at least one, of one size, of mode L or RGB. Equal neighbours may be stored as one longer frame.
        path: ends in .webp or .gif.
        milliseconds: how long each frame stands.

    Raises:
        ValueError: another ending.
        OSError: as `save_png`.
    """
    path = Path(path)
    options = {".webp": {"format": "WEBP", "lossless": True}, ".gif": {"format": "GIF"}}.get(path.suffix.lower())
    if options is None:
        raise ValueError(f"an animation's name ends in .webp or .gif, got {path.name}")
    _save_whole(frames[0], path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)


def _save_whole(image: Image.Image, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_name(path)
    try:
        image.save(aside, **options)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def folder_name(recipe: str) -> str:
    """A folder's name for a recipe of a benchmark and its keys: "ours --optimizer muon" -> "ours-optimizer-muon"."""
    return re.sub(r"[^\w.=-]+", "-", recipe.replace("--", "")).strip("-")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder aside, then put it in the place of `folder`."""
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        for path in (*aside.rglob("*"), aside):
            fsync_path(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
