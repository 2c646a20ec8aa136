"""The list of images that cannot be decoded, and the share of them that a run accepts."""

import contextlib
import json
import logging
import os
from pathlib import Path

from latent_ddpm.errors import UserError

logger = logging.getLogger(__name__)


class BadImages:
    """The list of undecodable images of a run, one JSON line {"name", "error"} each.

    Any number of processes may append to it.

    Args:
        path: the file, usually `<output_dir>/bad_images.jsonl`; created with the first entry.
        total: number of images of the run.
        max_share: maximum accepted share of bad images, in [0, 1].
    """

    def __init__(self, path: str | os.PathLike, total: int, max_share: float) -> None:
        self.path, self.total, self.max_share = Path(path), total, max_share
        self._known = self.names()

    def add(self, name: str, error: str) -> None:
        """Appends an image, unless this process knows it already."""
        if name in self._known:
            return
        self._known.add(name)
        # a file name may be invalid Unicode, and a log may not accept it
        logger.warning("cannot decode %s: %s", name.encode(errors="backslashreplace").decode(), error)
        line = json.dumps({"name": name, "error": error[:500]}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write with O_APPEND, so lines of several processes do not mix.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def names(self) -> set[str]:
        """The names of the bad images that all processes have found so far."""
        return set(self._read())

    def _read(self) -> dict[str, str]:
        entries = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a full disk
                    entry = json.loads(line)
                    entries.setdefault(entry["name"], entry["error"])
        return entries

    def check(self) -> None:
        """Raises `UserError` when more than `max_share` of the images are bad."""
        bad = self._read()
        if len(bad) <= self.max_share * self.total:
            return
        first = "; ".join(f"{name} ({error})" for name, error in list(bad.items())[:3])
        raise UserError(
            f"{len(bad)} of {self.total} images cannot be decoded, more than the share of {self.max_share:g} that "
            f"max_bad_image_share allows. The first ones: {first}. All: {self.path}"
        )
