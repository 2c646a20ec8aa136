"""Remove private data from published texts: tokens, home folders and local paths."""

import json
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

# config keys with a local path, and the word that is published instead
PLACES = {
    "train_data_dir": "IMAGES",
    "output_dir": "RUN",
    "latents_dir": "LATENTS",
    "lpips_weights": "LPIPS_WEIGHTS",
    "conditioning_image_dir": "CONDITIONING_IMAGES",
    "resume_from_checkpoint": "CHECKPOINT",
}
NAMES = {  # which may be names of the Hub as well
    "dataset_name": "DATASET",
    "text_encoder": "TEXT_ENCODER",
    "autoencoder": "AUTOENCODER",
    "init_from": "PRETRAINED",
    "init_unet": "PRETRAINED_UNET",
}
EMBEDDED = "embedded:"
ON_THE_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_place(value: str) -> bool:
    """Whether a value of NAMES is a local path, and not a Hub id or embedded."""
    if value.startswith(EMBEDDED):
        return False
    return not ON_THE_HUB.fullmatch(value) or value.endswith((".parquet", ".arrow")) or Path(value).exists()


class Scrubber:
    """Replaces private strings.

    Args:
        output_dir: the run, whose saved configs name the places.
        secrets: strings that are replaced by "***".
    """

    def __init__(self, output_dir: Path, secrets: Iterable[str] = ()) -> None:
        self.secrets = [secret for secret in secrets if secret]
        self.places: dict[str, str] = {}  # normalized, as typed: in configs and command lines
        for path in sorted(output_dir.glob("train_*.yaml")):
            for section in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).values():
                self._learn(section)
        whole = {}
        for place, shown in self.places.items():
            if shown != "RUN":
                whole[os.path.abspath(place)] = shown
        for place, shown in ((output_dir, "RUN"), (Path.cwd(), "."), (Path.home(), "~")):
            for form in (os.path.abspath(place), os.path.realpath(place)):
                whole.setdefault(form, shown)
        whole.pop("/", None)
        # the longest first, so that a folder's path is not cut by that of the folder around it; not as a part of a name
        longest_first = sorted(whole.items(), key=lambda pair: -len(pair[0]))
        self.whole = [(re.compile(rf"(?<![\w.-]){re.escape(place)}(?![\w-])"), shown) for place, shown in longest_first]

    def _learn(self, section: dict[str, Any]) -> None:
        for key, shown in PLACES.items():
            if section.get(key) and section[key] != "latest":
                self.places[os.path.normpath(section[key])] = shown
        for key, shown in NAMES.items():
            if section.get(key) and is_place(section[key]):
                self.places[os.path.normpath(section[key])] = shown

    def text(self, text: str) -> str:
        """The text without secrets and local paths."""
        for place, shown in self.whole:
            text = place.sub(shown, text)
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def place(self, word: str) -> str:
        """A word without the local path in it; another absolute path is shortened to its last part."""
        normal = os.path.normpath(word)
        for place, shown in self.places.items():
            if normal == place or normal.startswith(place + "/"):
                return shown + normal[len(place) :]
        made = self.text(word)
        return Path(made).name if made.startswith("/") else made

    def command(self, command: str) -> str:
        """A command line without local paths, also in `--flag=value`."""
        try:
            words = shlex.split(command)
        except ValueError:
            words = command.split()
        made = []
        for word in words:
            flag, equals, value = word.partition("=")
            made.append(f"{flag}={self.place(value)}" if word.startswith("--") and equals else self.place(word))
        return " ".join(word if re.fullmatch(r"[\w@%+=:,./\[\]~-]+", word) else shlex.quote(word) for word in made)

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """A saved config (its sections by name) without local paths."""
        return {
            name: {
                key: self.place(value) if value and (key in PLACES or key in NAMES) else value
                for key, value in section.items()
            }
            for name, section in values.items()
        }

    def _measured(self, value: Any, key: str = "") -> Any:
        """The JSON of scripts/evaluate.py without local paths."""
        if isinstance(value, dict):
            return {name: self._measured(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._measured(item, key) for item in value]
        if key == "command" and isinstance(value, str):
            return self.command(value)
        return self.place(value) if key == "pipeline" and isinstance(value, str) else value

    def copy(self, source: Path, target: Path) -> None:
        """Copy a saved config (.yaml), figures (.json) or another text without private data."""
        text = source.read_text(encoding="utf-8")
        if source.suffix == ".json":
            text = json.dumps(self._measured(json.loads(text)), indent=2) + "\n"
        elif source.suffix == ".yaml":
            text = yaml.safe_dump(self.config(yaml.safe_load(text)), sort_keys=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(text), encoding="utf-8")

    def copy_model_config(self, source: Path, target: Path) -> None:
        """Copy a config.json of diffusers without the path it was loaded from."""
        config = json.loads(source.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.text(json.dumps(config, indent=2, sort_keys=True)) + "\n", encoding="utf-8")
