"""Classes from the values of a column: integers with or without gaps, strings, or class labels."""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from latent_ddpm.data.findings import Findings
from latent_ddpm.data.indexing import narrow
from latent_ddpm.data.sources.base import ImageSource, SubsetSource
from latent_ddpm.errors import UserError

FEW = 20  # distinct strings that are classes however few images there are


class ClassValues:
    """The distinct values of a column of classes, numbered in the order of their appearance.

    None, NaN, -1 and empty strings are images without a class. Whole floats count as integers: a table with gaps in a
    column of integers stores them so.
    """

    def __init__(self) -> None:
        self.number: dict[Any, int] = {}

    def codes(self, values: Iterable[Any]) -> np.ndarray:
        """The number of each value, -1 without a class: int64 (N,).

        Raises:
            TypeError: a value is a list or a dictionary.
        """
        plain = (_plain(value) for value in values)
        found = (-1 if value is None else self.number.setdefault(value, len(self.number)) for value in plain)
        return np.fromiter(found, dtype=np.int64)

    def ordered(self) -> list[Any]:
        """The values in the order of the classes: integers ascending, or else everything by its text."""
        if all(isinstance(value, int) for value in self.number):
            return sorted(self.number)
        return sorted(self.number, key=str)

    def look_like_classes(self, images: int) -> bool:
        """Whether a column that nobody named a class column holds classes, and not identifiers or captions."""
        different = len(self.number)
        if different <= images / 2:
            return True
        if all(str(value).isdecimal() for value in self.number):  # a CSV file has numbers as text
            return max(map(int, self.number), default=0) < images
        return different <= FEW


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        raise TypeError(f"it holds {type(value).__name__}s")
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        value = None if math.isnan(value) else int(value) if value.is_integer() else str(value)
    return None if value == -1 else value


def labels_of(parts: Iterable[np.ndarray], length: int, values: ClassValues, classes: Sequence[Any]) -> np.ndarray:
    """Labels from codes: integers (N,), -1 where unknown.

    Args:
        parts: codes of `values`, int64, N = `length` in all.
        length: number of images.
        values: the values behind the codes.
        classes: the value of each class; others become -1.
    """
    place = {value: k for k, value in enumerate(classes)}
    # the last entry is what -1 indexes
    of_code = np.array([*(place.get(value, -1) for value in values.number), -1], dtype=np.int64)
    return narrow((of_code[part] for part in parts), length)


def choose_classes(
    train: ImageSource, validation: ImageSource | None, names: Sequence[str], key: str = "class_names"
) -> tuple[ImageSource, ImageSource | None]:
    """The images of some classes, which become the classes 0, 1, ... in this order.

    Args:
        train, validation: the splits; their findings count the images that are left out.
        names: of the classes.
        key: of the config, for the message.

    Raises:
        UserError: there is no such class, or it has no training image.
    """
    for name in names:
        if name not in (train.class_names or []):
            near = difflib.get_close_matches(name, train.class_names or [], n=1)
            there = ", ".join(map(repr, (train.class_names or [])[:10])) or "none"
            hint = f" Did you mean {near[0]!r}?" if near else f" The classes are {there}."
            raise UserError(f"{key}: the dataset has no class {name!r}.{hint}")
    chosen = ChosenClasses(train, names)
    for k, name in enumerate(names):
        if not (chosen.labels == k).any():
            raise UserError(f"{key}: the class {name!r} has no training image.")
    if validation is None:
        return chosen, None
    held_out = ChosenClasses(validation, names)
    return chosen, held_out if len(held_out) else None


class ChosenClasses(SubsetSource):
    """The images of some classes of a source, with `names` as its classes."""

    def __init__(self, source: ImageSource, names: Sequence[str]) -> None:
        place = {name: k for k, name in enumerate(names)}
        new = np.array([*(place.get(name, -1) for name in source.class_names or []), -1], dtype=np.int64)
        labels = source.labels if source.labels is not None else np.full(len(source), -1)
        labels = new[np.where(labels < len(new) - 1, labels, -1)]
        super().__init__(source, np.flatnonzero(labels >= 0))
        self.labels = narrow([labels[self.indices]], len(self))
        self.class_names = list(names)
        _leave_out(source.findings, source, np.flatnonzero(labels < 0))


def _leave_out(findings: Findings, source: ImageSource, indices: np.ndarray) -> None:
    for i in indices.tolist():
        findings.leave_out("of a class that class_names does not name", source.name(i))
