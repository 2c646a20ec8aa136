"""Atomic writes: a file or folder is written under a name with the process id, then renamed."""

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

from latent_ddpm.system import fsync_path

_ASIDE = re.compile(r".*\.(\d+)\.(tmp|new|old)")


def aside_name(path: Path) -> Path:
    """The temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file atomically: a crash, even of the machine, leaves the old or the new one.

    Raises:
        OSError: it could not be written; an old file is untouched.
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
    """Write a JSON file like `write_whole`; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, indent=1) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove half-written files of processes that no longer run from a folder (not from its subfolders)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = _ASIDE.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG atomically; missing folders are created.

    Args:
        image: any PIL image in a mode that PNG supports.
        path: the file; an existing one is replaced.

    Raises:
        OSError: the folder cannot be created or written; no partial file remains.
    """
    _save_whole(image, Path(path), format="PNG")


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike, milliseconds: int = 100) -> None:
    """Write an endless animation atomically: lossless WebP, or GIF (256 colours per frame).

    Args:
        frames: at least one, of one size, of mode L or RGB. Equal neighbours may be merged into one longer frame.
        path: ends in .webp or .gif.
        milliseconds: duration of a frame.

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
    """A folder name for a benchmark's recipe and its keys: "ours --optimizer muon" -> "ours-optimizer-muon"."""
    return re.sub(r"[^\w.=-]+", "-", recipe.replace("--", "")).strip("-")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Replace a folder atomically: `write` fills a new one, which is then renamed to `folder`."""
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
