"""Files that exist whole or not at all: written aside, under a name with the writer's process number, then renamed."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import psutil

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
