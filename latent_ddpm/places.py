"""Paths as people write them: `~`, `$VARIABLES`, a slash at the end, another spelling of the same place."""

import difflib
import os
import re
from pathlib import Path

from latent_ddpm.errors import UserError

DATA_KEYS = ("train_data_dir", "dataset_name", "conditioning_image_dir")  # may have names that are not UTF-8


def expand(value: str, key: str) -> str:
    """A path without `~`, environment variables and slashes at its end.

    Args:
        value: as it was written.
        key: of the config, for the message.

    Raises:
        UserError: there is no such environment variable or user, or safetensors could not open the path.
    """
    if key not in DATA_KEYS and value != value.encode("utf-8", "replace").decode("utf-8"):
        shown = value.encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{key} {shown} is not a name in UTF-8, which safetensors needs: use another name.")
    path = os.path.expanduser(value)
    if path.startswith("~") and not os.path.exists(path):
        raise UserError(f"{key} {value}: there is no user {path.split('/')[0]!r}, whose home that would be.")
    path = os.path.expandvars(path)
    unknown = re.search(r"\$(\w+|\{[^}]*\})", path)
    if unknown and not os.path.exists(path):
        raise UserError(f"{key} {value}: the environment variable {unknown[1].strip('{}')} is not set.")
    separators = "/" + (os.sep if os.sep != "/" else "")
    return path.rstrip(separators) or path


def same_place(one: str, other: str) -> bool:
    """Whether two paths lead to the same file or folder, or are equal where they lead nowhere."""
    return one == other or os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def no_folder(key: str, value: str) -> str:
    """Why `value` is not a folder of images, and what may have been meant: one sentence for a UserError."""
    path = Path(value)
    if "://" in value:
        return f"{key} {value} is an address. --dataset_name reads parquet and WebDataset files from addresses."
    if path.is_file():
        if path.suffix.lower() in (".parquet", ".tar"):
            return f"{key} {value} is a file. Parquet and WebDataset files are given with --dataset_name."
        unpack = " Unpack it first." if path.suffix.lower() in (".zip", ".gz", ".tgz", ".7z", ".rar", ".xz") else ""
        return f"{key} {value} is a file, not a folder.{unpack}"
    guesses = [value.strip().strip("\"'"), value.replace("\\", "/")]
    meant = next((guess for guess in guesses if guess != value and os.path.isdir(guess)), None)
    parent = path.parent
    if meant is None and parent.is_dir():
        try:
            siblings = [entry.name for entry in os.scandir(parent) if entry.is_dir()]
        except OSError:
            siblings = []
        meant = next((str(parent / near) for near in difflib.get_close_matches(path.name, siblings, n=1)), None)
    hint = f" Did you mean {meant}?" if meant else ""
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    if meant is None:
        above = next((str(folder) for folder in path.parents if folder.is_dir()), None)
        if above not in (None, ".", path.anchor, str(parent)):
            hint = f" {above} exists, but not what comes after it."
    return f"{key} {value} is not a folder{where}.{hint}"
