"""What the names of folders mean: splits, classes, or nothing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_ADDED = r"(?:[-_ ]?(?:set|split|data|images|imgs|\d{2,4}|[ab]))?"  # train2017, test_set, trainA

# Folders that systems and tools leave among images: thumbnails, trash and snapshots. In lower case.
JUNK = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@sharebin", "@tmp"),
    *("$recycle.bin", "system volume information", "lost+found", "__macosx"),
    *("network trash folder", "temporary items"),
}


def split_named(folder: str) -> str | None:
    """ "train", "validation" or "test" if a folder is called like such a split, else None."""
    for split, words in _WORDS.items():
        if re.fullmatch(f"(?:{'|'.join(words)}){_ADDED}", folder.lower()):
            return split
    return None


@dataclass
class Layout:
    """What each folder means.

    Attributes:
        roles: of each folder: "training", "validation" or "not used"; None if the folder is in no split.
        tops: of each folder, the name of its split's folder, or "".
        classes: of each folder, the name of the class, or None.
        prefixes: the folders that the classes' folders are in, with a slash at the end, or "".
    """

    roles: list[str | None]
    tops: list[str]
    classes: list[str | None]
    prefixes: set[str]

    @property
    def has_splits(self) -> bool:
        """Whether the folders at the top are splits, and more than one of them."""
        return len({top for top in self.tops if top}) > 1


def read_layout(folders: Sequence[tuple[str, ...]]) -> Layout:
    """The meaning of the folders that hold images, each as the names from the root down; () is the root itself.

    A folder that contains everything, as archives often have, means nothing. If all folders at the top are called like
    splits, and one of them like a training split, they are splits; classes are then the folders in them. Validation is
    preferred to test. Otherwise, the folders at the top are the classes.
    """
    wrapper = ""
    firsts = {folder[:1] for folder in folders}
    if len(firsts) == 1 and () not in firsts and split_named(next(iter(firsts))[0]) is None:
        wrapper = f"{next(iter(firsts))[0]}/"
        folders = [folder[1:] for folder in folders]
    tops = {folder[0] for folder in folders if folder}
    splits = {top: split_named(top) for top in tops}
    at_root = any(not folder for folder in folders)
    honoured = "train" in splits.values() and None not in splits.values() and (len(tops) > 1 or not at_root)
    if not honoured:
        classes = [folder[0] if folder else None for folder in folders]
        return Layout([None] * len(folders), [""] * len(folders), classes, {wrapper})
    held_out = next((split for split in ("validation", "test") if split in splits.values()), None)
    uses = {"train": "training", held_out: "validation"}
    roles = [uses.get(splits[folder[0]], "not used") if folder else "not used" for folder in folders]
    classes = [folder[1] if len(folder) > 1 else None for folder in folders]
    return Layout(
        roles, [folder[0] if folder else "" for folder in folders], classes, {f"{wrapper}{top}/" for top in tops}
    )
