"""What a training script says of its images at its start, and what of it goes on the model card.

A finished inspection of the same images is used where there is one. Otherwise a sample is looked at, for seconds.
Nothing here may change a run, or end it.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latent_ddpm.config import RunConfig, UNetConfig
from latent_ddpm.data.captions import cleaned
from latent_ddpm.data.inspection.inspect import Sources, cache_folder, facts_of_rows, known_facts, outside
from latent_ddpm.data.inspection.lines import Line, lines_of
from latent_ddpm.data.inspection.table import BIT, finish, look_at
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.files import write_json

logger = logging.getLogger(__name__)

MOST_SAMPLED = 256  # images
SECONDS = 1.5  # for the sample
MOST_LINES = 5


def say_of_data(config: RunConfig, sources: Sources, stage: str, log: logging.Logger) -> None:
    """Log the most important lines on the images of a run, and keep what is known in <output_dir>/data.json.

    Call it in the main process, before the images are decoded. Never raises.

    Args:
        config: of the stage.
        sources: the training and the validation images.
        stage: "autoencoder" or "unet".
        log: of the script.
    """
    try:
        facts, lines = quick_lines(config, sources)
        # the run logs the notes itself, whatever else there is
        for line in [line for line in lines if line.text not in sources[0].findings.notes][:MOST_LINES]:
            log.info("%s", line.text)
        if lines and not facts["complete"]:
            log.info("scripts/inspect_data.py with the same flags looks at every image, finds copies, and names them.")
        command = f"python train_{stage}.py --config train_{stage}.yaml"
        save_known(Path(config.output_dir), sources, config, facts, command, in_training=True)
    except Exception as error:  # whatever it is, the run can do without
        logger.debug("the images were not inspected: %s", error, exc_info=True)


def quick_lines(config: RunConfig, sources: Sources) -> tuple[dict[str, Any], list[Line]]:
    """Facts and lines: of a finished inspection of the same images, else of a sample, noted at an earlier start."""
    cache = Path(config.output_dir) / "cache"
    facts = known_facts(sources, config, cache)
    if facts is None:
        noted = _read(Path(config.output_dir))
        same = noted.get("key") == _key(sources, config)
        facts = noted["facts"] | outside(sources, config) if same else sample_facts(sources, config)
    captions = None
    if isinstance(config, UNetConfig) and "text" in config.conditions and not config.caption_templates:
        captions = _captions_of_sample(sources[0], config.caption_column)
    # stage 2 itself stops there
    refusal = [] if isinstance(config, UNetConfig) else _refusal(cache_folder(sources, config, cache))
    return facts, refusal + lines_of(facts, [config], captions)


def keep_refusal(folder: Path, refusal: Sequence[Line]) -> None:
    """Keep what would stop stage 2, beside the result of an inspection, so that stage 1 says it too."""
    write_json(folder / "refusal.json", [dataclasses.asdict(line) for line in refusal])


def _refusal(folder: Path) -> list[Line]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        found = json.loads((folder / "refusal.json").read_text(encoding="utf-8"))
        return [Line(line["importance"], f"The last inspection found: {line['text']}") for line in found]
    return []


def sample_facts(sources: Sources, config: Any, seconds: float = SECONDS) -> dict[str, Any]:
    """The facts of at most MOST_SAMPLED training images, evenly spaced, that can be looked at in `seconds`."""
    rows, deadline = [], time.monotonic() + seconds
    for i in evenly_spaced(len(sources[0]), MOST_SAMPLED):
        row = look_at(sources[0], i, config.resolution, config.image_channels, "pillow", hashed=False)
        if not row["flags"] & BIT["bad"]:
            rows.append(row)
        if time.monotonic() > deadline:
            break
    finish(rows)
    facts = facts_of_rows(rows, sources, config) | outside(sources, config)
    # the sample does not tell how many are undecodable
    return facts | {"training": len(sources[0]), "validation": len(sources[1]), "complete": False}


def evenly_spaced(length: int, most: int) -> Iterator[int]:
    """At most `most` indices below `length`, spread over it; so is every beginning of them."""
    count = min(length, most)
    bits = max(1, (count - 1).bit_length())
    for k in range(2**bits):
        place = int(f"{k:0{bits}b}"[::-1], 2)  # van der Corput's order
        if place < count:
            yield place * length // count


def _captions_of_sample(source: ImageSource, column: str) -> dict[str, Any]:
    found = [cleaned(source.captions(i, column)) for i in sorted(evenly_spaced(len(source), MOST_SAMPLED))]
    missing = sum(not captions for captions in found)
    return {"images": len(found), "missing": missing, "captions": sum(map(len, found)), "cut": 0}


def _key(sources: Sources, config: Any) -> str:
    return cache_folder(sources, config, Path()).name


def _read(output_dir: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        noted = json.loads((output_dir / "data.json").read_text(encoding="utf-8"))
        if isinstance(noted, dict):
            return noted
    return {}


def save_known(
    output_dir: Path, sources: Sources, config: Any, facts: dict[str, Any], command: str, in_training: bool
) -> None:
    """Keep the facts in <output_dir>/data.json for the model card, beside which it is published.

    The command that found the same facts first stays. What a run has trained on is not replaced by what a later
    inspection with other keys would see.
    """
    noted = _read(output_dir)
    content = {"key": _key(sources, config), "command": command, "facts": json.loads(json.dumps(public(facts)))}
    if content["key"] == noted.get("key"):
        if content["facts"] == noted.get("facts"):
            return
    elif noted and not in_training and (output_dir / "run.json").exists():
        return
    write_json(output_dir / "data.json", content)


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts without what may be private: names of folders, which classes and splits have, and of profiles."""
    kept = {key: value for key, value in facts.items() if key not in ("notes", "splits", "classes", "profiles")}
    broken, all_of_them = facts["profiles"].get("broken", 0), sum(facts["profiles"].values())
    kept["profiles"] = {"broken": broken, "others": all_of_them - broken}
    if classes := facts["classes"]:
        counts = list(classes["counts"].values())
        kept["classes"] = {"number": len(counts), "empty": len(classes["empty"]), "unknown": classes["unknown"]}
        kept["classes"] |= {"smallest": min(counts, default=0), "largest": max(counts, default=0)}
    return kept
