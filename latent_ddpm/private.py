"""Keeping private things out of what is published: tokens, home folders, the places of other people's images."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

# keys of a config whose value is a place on this machine, and what is published in its stead
PLACES = {
    "train_data_dir": "IMAGES",
    "output_dir": "RUN",
    "autoencoder": "AUTOENCODER",
    "latents_dir": "LATENTS",
    "lpips_weights": "LPIPS_WEIGHTS",
    "resume_from_checkpoint": "CHECKPOINT",
}
# keys of diffusers' configs that name where something was loaded from
ORIGINS = ("_name_or_path",)


def is_place(value: str) -> bool:
    """Whether a dataset_name is something on this disk, and not of the Hub or embedded."""
    return not value.startswith("embedded:") and (value.startswith(("/", ".", "~")) or Path(value).exists())


class Scrubber:
    """Replaces private strings.

    Args:
        output_dir: the run, whose saved configs name the places.
        secrets: strings that are replaced by "***".
    """

    def __init__(self, output_dir: Path, secrets: Iterable[str] = ()) -> None:
        self.places: dict[str, str] = {}  # as typed, in configs and command lines
        for path in sorted(output_dir.glob("train_*.yaml")):
            for section in (yaml.safe_load(path.read_text()) or {}).values():
                self._learn(section)
        whole = {secret: "***" for secret in secrets if secret}
        for place, shown in self.places.items():
            if shown != "RUN":
                whole[os.path.abspath(place)] = shown
        for place, shown in ((output_dir, "RUN"), (Path.cwd(), "."), (Path.home(), "~")):
            for form in (os.path.abspath(place), os.path.realpath(place)):
                whole.setdefault(form, shown)
        whole.pop("/", None)
        # the longest first, so that a folder's path is not cut by that of the folder around it
        self.whole = sorted(whole.items(), key=lambda pair: -len(pair[0]))

    def _learn(self, section: dict[str, Any]) -> None:
        for key, shown in PLACES.items():
            if section.get(key) and section[key] != "latest":
                self.places[section[key]] = shown
        if section.get("dataset_name") and is_place(section["dataset_name"]):
            self.places[section["dataset_name"]] = "DATASET"

    def text(self, text: str) -> str:
        """A text without secrets and without the places of this machine."""
        for private, shown in self.whole:
            text = text.replace(private, shown)
        return text

    def word(self, word: str) -> str:
        """A word of a command line, or a value of a config, that may be a place or something in it."""
        for place, shown in self.places.items():
            if word == place or word.startswith(place.rstrip("/") + "/"):
                return shown + word[len(place.rstrip("/")) :].rstrip("/")
        return self.text(word)

    def value(self, value: Any, key: str = "") -> Any:
        """What JSON or YAML holds, without the keys that only say where something was loaded from."""
        if isinstance(value, dict):
            return {name: self.value(item, name) for name, item in value.items() if name not in ORIGINS}
        if isinstance(value, list):
            return [self.value(item, key) for item in value]
        if not isinstance(value, str):
            return value
        return " ".join(map(self.word, value.split(" "))) if key == "command" else self.word(value)

    def copy(self, source: Path, target: Path) -> None:
        """A copy of a JSON, YAML or text file without what is private."""
        text = source.read_text()
        if source.suffix == ".json":
            text = json.dumps(self.value(json.loads(text)), indent=2) + "\n"
        elif source.suffix == ".yaml":
            text = yaml.safe_dump(self.value(yaml.safe_load(text)), sort_keys=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(text))
