"""The interface of an image source, and a subset of one."""

import abc
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from latent_ddpm.data.findings import Findings
from latent_ddpm.data.indexing import PART, AllBut, RunningDigest, digest_of_many, in_parts, narrow
from latent_ddpm.errors import UserError

IDENTIFYING_IMAGES = 64  # whose content is read for `identity`
MANY = 2**20  # from this number of images on, indices are cached and memory is returned


class ImageSource(abc.ABC):
    """A fixed, ordered collection of images.

    A source whose images are already decoded at the run's resolution has `squares`: uint8 (N, R, R, C), an array or
    something that a number or an array of numbers can index.

    Attributes:
        labels: int8, int16 or int32 (N,), the class of each image, -1 where unknown; None without classes.
        class_names: the name of each class, indexed by label; None exactly when `labels` is None.
        fingerprint: changes when the collection or the content of its images changes.
        findings: what else was found; a dataset's two splits share one object.
    """

    labels: np.ndarray | None = None
    class_names: list[str] | None = None
    fingerprint: str

    @functools.cached_property
    def findings(self) -> Findings:
        return Findings()

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of images, including undecodable ones."""

    @abc.abstractmethod
    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        """Image i, decoded, in its stored mode. A damaged image raises whatever its decoder raises.

        With `at_least`, a JPEG may be reduced in size as long as both sides keep that many pixels.
        """

    def data(self, i: int) -> bytes | None:
        """The bytes of image i's file, or None where the pixels are stored decoded.

        Raises whatever reading the file raises.
        """
        return None

    @abc.abstractmethod
    def name(self, i: int) -> str:
        """The name of image i in messages and in the hash of the split."""

    def all_names(self) -> Iterator[str]:
        """The names of all images, in order."""
        return map(self.name, range(len(self)))

    def release(self) -> None:  # noqa: B027, most sources hold nothing
        """Closes what is open and frees its memory; the next access opens it again."""

    def squares(self) -> Any | None:
        """The decoded images (see the class), or None."""
        return None

    def identity(self) -> str:
        """Identifies the images wherever they lie: a hash of all names, and of the content of some.

        `fingerprint` also changes with the place or the times of the files, because caches must notice any change.
        """
        found = RunningDigest("identity", len(self))
        for names in in_parts(self.all_names()):
            found.update(names)
        for i in np.linspace(0, len(self) - 1, min(IDENTIFYING_IMAGES, len(self))).astype(np.int64).tolist():
            try:
                content = self.data(i)
                content = np.ascontiguousarray(self.load(i)).tobytes() if content is None else content
            except OSError:  # a dangling link, a missing file, a damaged image
                content = b""
            found.update([hashlib.sha256(content).hexdigest()])
        return found.result()

    def caption_columns(self) -> list[str]:
        """Names of the columns that hold captions."""
        return []

    def captions(self, i: int, column: str) -> Any:
        """The caption or captions of image i in one of the `caption_columns`; None without one."""
        raise KeyError(column)

    def label_column(self) -> str | None:
        """The column that holds classes although nobody named it and `labels` are not its values; None without one."""
        return None

    def class_columns(self) -> list[str]:
        """Names of the columns that may hold classes."""
        return []

    def class_values(self, i: int, column: str) -> Any:
        """The value of image i in one of the `class_columns`; None without one."""
        raise KeyError(column)

    def image_columns(self) -> list[str]:
        """Names of the columns that hold images."""
        return []

    def check_column(self, column: str, key: str) -> None:
        """Raises `UserError` that names the config's `key` when there is no such column of images."""
        if column not in self.image_columns():
            there = ", ".join(self.image_columns()) or "none"
            raise UserError(f"{key}: the dataset has no column {column!r} that holds images. Those that do: {there}")

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        """As `load`, of one of the `image_columns`."""
        raise KeyError(column)


class SubsetSource(ImageSource):
    """A subset of a source, in the order of `indices`: int64 (M,), or `AllBut`."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray | AllBut) -> None:
        self.source = source
        self.indices = indices if isinstance(indices, AllBut) else np.asarray(indices, dtype=np.int64)
        self.class_names, self.findings = source.class_names, source.findings
        if source.labels is not None:
            parts = (source.labels[self.indices[start : start + PART]] for start in range(0, len(self), PART))
            self.labels = narrow(parts, len(self))
        self.fingerprint = digest_of_many("subset", source.fingerprint, rows=self.indices)

    def release(self) -> None:
        self.source.release()

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.load(int(self.indices[i]), at_least)

    def data(self, i: int) -> bytes | None:
        return self.source.data(int(self.indices[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    def squares(self) -> Any | None:
        squares = self.source.squares()
        return None if squares is None else _Chosen(squares, self.indices)

    def caption_columns(self) -> list[str]:
        return self.source.caption_columns()

    def captions(self, i: int, column: str) -> Any:
        return self.source.captions(int(self.indices[i]), column)

    def label_column(self) -> str | None:
        return self.source.label_column()

    def class_columns(self) -> list[str]:
        return self.source.class_columns()

    def class_values(self, i: int, column: str) -> Any:
        return self.source.class_values(int(self.indices[i]), column)

    def image_columns(self) -> list[str]:
        return self.source.image_columns()

    def load_column(self, i: int, column: str, at_least: int | None = None) -> Image.Image:
        return self.source.load_column(int(self.indices[i]), column, at_least)


class _Chosen:
    """Some of the `squares` of a source."""

    def __init__(self, squares: Any, indices: np.ndarray | AllBut) -> None:
        self.of, self.indices = squares, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, wanted: int | np.ndarray) -> np.ndarray:
        return self.of[self.indices[wanted]]
