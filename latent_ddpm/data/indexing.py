"""Compact indices of millions of images: names, numbers and digests in little memory.

CompactStrings(folder)       names, in a file when there are many
AllBut(length, without)      the numbers 0 .. length - 1 without a few, indexed like an array
narrow(parts, length)        integers in the smallest type that holds them
digest(...), RunningDigest   a hash of a collection, computed in parts
"""

import array
import contextlib
import ctypes
import errno
import gc
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from latent_ddpm.system import read_at

PART = 10_000  # rows that are Python objects at the same time


def in_parts(rows: Iterable) -> Iterator[list]:
    """Lists of `PART` rows, the last one shorter."""
    rows = iter(rows)
    while part := list(itertools.islice(rows, PART)):
        yield part


# ---------------------------------------------------------------------------------------------------------------
# Digests
# ---------------------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """A hash of a JSON-able value: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


class RunningDigest:
    """`digest(*parts, rows)` with the rows given in lists."""

    def __init__(self, *parts: Any) -> None:
        self._found = hashlib.sha256(f"{json.dumps(parts)[:-1]}, [".encode())
        self._between = ""

    def update(self, rows: list) -> None:
        """Takes the next rows, JSON-able."""
        if rows:
            self._found.update((self._between + json.dumps(rows)[1:-1]).encode())
            self._between = ", "

    def result(self) -> str:
        """The digest of the rows so far."""
        found = self._found.copy()
        found.update(b"]]")
        return found.hexdigest()[:32]


def digest_of_many(*parts: Any, rows: Any) -> str:
    """`digest(*parts, rows)` for rows that slice to arrays, without making all numbers Python objects."""
    found = RunningDigest(*parts)
    for start in range(0, len(rows), PART):
        found.update(rows[start : start + PART].tolist())
    return found.result()


# ---------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------


class AllBut(Sequence):
    """The numbers 0 .. length - 1, ascending, without some of them.

    Indexed by a number, a slice, or an int64 array of numbers in [0, len), like an int64 array. It stores only what is
    left out.

    Args:
        length: int.
        without: int64 (K,), ascending, of 0 .. length - 1.
    """

    def __init__(self, length: int, without: np.ndarray) -> None:
        self._length = length - len(without)
        # In front of without[k] there are without[k] - k numbers: whatever stands there or behind is k + 1 higher.
        self._before = np.asarray(without, dtype=np.int64) - np.arange(len(without))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, wanted: int | slice | np.ndarray) -> Any:
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(self._length))
        elif np.ndim(wanted) == 0:
            wanted = range(self._length)[wanted]  # raises IndexError out of range
        return wanted + np.searchsorted(self._before, wanted, side="right")


def narrow(parts: Iterable[np.ndarray], length: int) -> np.ndarray:
    """Integers (N,), given in parts, as an array (length,) of the smallest type of int8, int16, int32 and int64.

    Args:
        parts: arrays of integers that int64 holds, N = `length` in all.
    """
    found, filled = np.empty(length, dtype=np.int8), 0
    for part in parts:
        if not len(part):
            continue
        low, high = int(part.min()), int(part.max())
        while not np.iinfo(found.dtype).min <= low <= high <= np.iinfo(found.dtype).max:
            found = found.astype(f"i{2 * found.itemsize}")
        found[filled : filled + len(part)] = part
        filled += len(part)
    return found


# ---------------------------------------------------------------------------------------------------------------
# Strings
# ---------------------------------------------------------------------------------------------------------------


class CompactStrings(Sequence):
    """Strings without NUL, such as file names, which on Linux are bytes and not always UTF-8.

    Ten million Python strings would take gigabytes. Here they are concatenated: in memory while there are few, else in
    an unnamed temporary file that disappears with the process. If it cannot be written, the rest stays in memory.

    Args:
        folder: for that file; created if missing. The fallback is the system's temporary folder.
    """

    IN_MEMORY = 4 * 2**20  # bytes
    BLOCK = 64  # strings per stored offset, which are read together

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self._folder, self._length, self._written = folder, 0, 0
        self._starts, self._recent = array.array("q"), bytearray()
        self._file, self._cannot_be_written = None, False

    def extend(self, strings: Iterable[str]) -> None:
        """Adds strings at the end."""
        for string in strings:
            if self._length % self.BLOCK == 0:
                self._starts.append(self._written + len(self._recent))
            self._recent += string.encode("utf-8", "surrogateescape")
            self._recent.append(0)
            self._length += 1
            if len(self._recent) > self.IN_MEMORY:
                self._write()

    def _write(self) -> None:
        while self._recent and not self._cannot_be_written:
            try:
                if self._file is None:
                    self._file = _file_without_name(self._folder)
                written = self._file.write(self._recent)  # may be incomplete
                self._written += written
                del self._recent[:written]
            except OSError:
                self._cannot_be_written = True

    def _read(self, first: int, last: int) -> bytes:
        """The strings of the blocks first .. last - 1, each followed by a NUL."""
        ends = itertools.chain(self._starts[last : last + 1], [self._written + len(self._recent)])
        start, end = self._starts[first], next(ends)
        found = b""
        while start + len(found) < min(end, self._written):  # a read may be short
            # not from the file's position, which processes and threads share
            more = read_at(self._file.fileno(), min(end, self._written) - start - len(found), start + len(found))
            if not more:
                raise OSError(errno.EIO, "the file of names ended early")
            found += more
        return found + bytes(self._recent[max(0, start - self._written) : max(0, end - self._written)])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> str:
        block, place = divmod(range(self._length)[i], self.BLOCK)
        return self._read(block, block + 1).split(b"\0", place + 1)[place].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        many = PART // self.BLOCK
        for block in range(0, len(self._starts), many):
            for found in self._read(block, block + many).split(b"\0")[:-1]:
                yield found.decode("utf-8", "surrogateescape")

    def __getstate__(self) -> dict:
        everything = self._read(0, len(self._starts)) if self._length else b""
        return {"folder": self._folder, "length": self._length, "starts": self._starts, "strings": everything}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["folder"])
        self._length, self._starts, self._recent = state["length"], state["starts"], bytearray(state["strings"])
        if len(self._recent) > self.IN_MEMORY:
            self._write()


def _file_without_name(folder: str | os.PathLike | None) -> IO[bytes]:
    with contextlib.suppress(OSError):
        if folder is not None:
            os.makedirs(folder, exist_ok=True)
            return tempfile.TemporaryFile(dir=folder, buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def give_memory_back() -> None:
    """Return freed memory to the system: glibc keeps many small freed blocks until it is asked."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
