"""What a source of images found besides the images that it trains on."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass
class Findings:
    """What is not trained on, and what a source concluded from names.

    Attributes:
        left_out: names of files and folders that are not trained on, by reason. A name that ends in a slash is a
            folder, whose files are not listed.
        splits: of each split that was found, its number of images and its use: "training", "validation" or "not used".
        empty_classes: names of classes without an image.
        notes: sentences on what was concluded from names, for the log.
    """

    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    splits: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    empty_classes: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def leave_out(self, reason: str, name: str) -> None:
        """Record a file, or a folder whose name ends in a slash, that is not trained on."""
        self.left_out.setdefault(reason, []).append(name)

    def counts(self) -> dict[str, int]:
        """The number of names per reason, most first."""
        return dict(sorted(((why, len(names)) for why, names in self.left_out.items()), key=lambda one: -one[1]))

    def all_left_out(self) -> Iterator[tuple[str, str]]:
        """Every (reason, name)."""
        return ((why, name) for why, names in self.left_out.items() for name in names)
