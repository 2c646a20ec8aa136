"""Facts to sentences: one for each thing that the owner of the images wants to know, with what to do about it."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from latent_ddpm.config import RunConfig, UNetConfig

FEW_OF_A_CLASS = 20  # images; a class with fewer is drawn as copies of them
MANY_EPOCHS = 1000  # the longest run that the project measures sees each image 256 times
NOTABLE = 0.01  # shares below are not worth a line where nothing is wrong with single images
MUCH_CROPPED = 0.35  # photographs of 3:2 lose a third
LISTED = "left_out.jsonl names them"
COPIES = "duplicates.jsonl names them"
NOTED = "noted.jsonl"
NAMES = {True: "Stage 2", False: "Stage 1"}


@dataclasses.dataclass(frozen=True)
class Line:
    """A sentence or two, and how much it matters: from 100, the run stops, to 0."""

    importance: int
    text: str


def number(count: int, what: str) -> str:
    """`1,200 images`, and `1 image`."""
    return f"{count:,} {what if count != 1 else what.removesuffix('s')}"


def percent(share: float) -> str:
    """A share in [0, 1] in percent, with a decimal below 1 %."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def lines_of(facts: dict[str, Any], configs: Sequence[RunConfig], captions: dict[str, Any] | None = None) -> list[Line]:
    """The lines, the most important first.

    Args:
        facts: see `inspect.facts_of`; those of a sample lack what it cannot tell.
        configs: of the stages.
        captions: from `inspect.inspect_captions`.
    """
    unet = next((config for config in configs if isinstance(config, UNetConfig)), None)
    found = [
        *_of_files(facts, configs[0]),
        *_of_copies(facts),
        *_of_pixels(facts),
        *_of_sizes(facts),
        *_of_classes(facts, unet),
        *_of_captions(captions),
        *_of_length(facts, configs),
    ]
    if not facts["complete"]:  # no files name the images
        found = [Line(line.importance, re.sub(r" \(\w+\.jsonl( names them)?\)", "", line.text)) for line in found]
    return sorted(found, key=lambda line: -line.importance)


def _are(count: int, facts: dict[str, Any], verb: str = "are") -> str:
    """`412 of 8,000 images (5 %) are`; `verb` is of more than one."""
    total = facts["looked_at"]
    sample = "" if facts["complete"] else "a sample of "
    verb = {"are": "is", "have": "has"}[verb] if count == 1 else verb
    return f"{count:,} of {sample}{total:,} images ({percent(count / max(1, total))}) {verb}"


def _of_files(facts: dict[str, Any], config: RunConfig) -> Iterator[Line]:
    bad = sum(facts["undecodable"].values()) + facts["undecodable_in_stream"] if "undecodable" in facts else 0
    total = facts["looked_at"] + bad
    if bad > config.max_bad_image_share * total:
        yield Line(100, f"{bad:,} of {total:,} images ({percent(bad / total)}) cannot be decoded, so the run stops: "
                        f"repair or remove them ({LISTED}), or raise max_bad_image_share.")  # fmt: skip
    elif bad:
        yield Line(86, f"{bad:,} of {total:,} images ({percent(bad / total)}) cannot be decoded and "
                       f"{'is' if bad == 1 else 'are'} skipped: repair or remove them ({LISTED}).")  # fmt: skip
    for reason, count in facts["left_out"].items():
        # a reason that says what to do is a loss that can be mended
        importance = 84 if "pip install" in reason else 45
        what = "folders" if reason in facts.get("folders_left_out", ()) else "files"
        yield Line(importance, f"{number(count, what)} {'is' if count == 1 else 'are'} not trained on ({reason}).")
    for name, (count, use) in facts["splits"].items():
        if use == "not used":
            yield Line(70, f"The split {name!r} with {number(count, 'images')} is not used.")
    for note in facts["notes"]:
        yield Line(60, note)


def _of_copies(facts: dict[str, Any]) -> Iterator[Line]:
    copies = facts.get("duplicates")
    if copies is None:
        return
    exact = copies["same_file"] + copies["same_pixels"]
    if leaked := copies["in_both_splits"]:
        share = leaked / max(1, facts["validation"])
        of_all = f"{leaked:,} of {number(facts['validation'], 'validation images')} ({percent(share)})"
        text = f"{of_all} {'has' if leaked == 1 else 'have'} a copy among the training images, so the validation looks "
        yield Line(80 if share >= NOTABLE else 52, f"{text}better than it is: remove one of each ({COPIES}).")
    if exact:
        what = "an exact copy of another" if exact == 1 else "exact copies of others"
        yield Line(75, f"{_are(exact, facts)} {what}: remove {_them(exact)} ({COPIES}).")
    near, mirrored = copies["near"], copies["mirrored"]
    importance = 55 if near + mirrored >= NOTABLE * facts["looked_at"] else 25
    if near:
        text = (
            f"{_are(near, facts)} nearly equal to {'another' if near == 1 else 'others'}, such as the same picture in "
        )
        yield Line(importance, f"{text}another size or quality: keep the best of each ({COPIES}).")
    if mirrored:
        what = "a mirrored copy of another" if mirrored == 1 else "mirrored copies of others"
        yield Line(importance - 1, f"{_are(mirrored, facts)} {what} ({COPIES}); random_flip mirrors images by itself.")


def _them(count: int) -> str:
    return "it" if count == 1 else "them"


def _of_pixels(facts: dict[str, Any]) -> Iterator[Line]:
    looked_at, flat, dark = facts["looked_at"], facts["flat"], facts["dark"]
    if flat:
        yield Line(65, f"{_are(flat, facts)} of one colour: remove {_them(flat)} ({NOTED}).")
    if facts["image_channels"] == 1 and facts["colour"]:
        text = f"{_are(facts['colour'], facts)} in colour, but image_channels is 1, so the run is gray"
        yield Line(90, f"{text}: for colours, give --image_channels 3.")
    if facts["image_channels"] == 3 and facts["gray"] == looked_at > 0:
        yield Line(50, "All images are gray, but image_channels is 3: --image_channels 1 learns the same with less.")
    elif facts["image_channels"] == 3 and facts["gray"] >= NOTABLE * looked_at > 0:
        yield Line(
            42, f"{_are(facts['gray'], facts)} gray in a run with colours ({NOTED}): the model will draw gray too."
        )
    if dark:
        text = f"{_are(dark, facts)} nearly black, with values in a small part of the range of 16 or more bits"
        yield Line(82, f"{text}: scale {_them(dark)} to the full range ({NOTED}).")
    if facts["float"]:
        text = (
            f"{_are(facts['float'], facts)} of floating-point numbers. Values up to 1 are taken for 0 to 1, others for "
        )
        yield Line(44, f"{text}0 to 255, and what lies outside is cut ({NOTED}).")
    if facts["frames"]:
        text = f"{_are(facts['frames'], facts)} animated or of several pages, of which only the first is used"
        yield Line(43, f"{text}: save the others as files if you want them ({NOTED}).")
    if facts["transparent"]:
        text = f"{_are(facts['transparent'], facts)} partly transparent and put on white"
        yield Line(41, f"{text}: if another background suits {_them(facts['transparent'])}, paint it ({NOTED}).")
    if broken := facts["profiles"].get("broken"):
        yield Line(40, f"{_are(broken, facts, 'have')} a broken colour profile, which is ignored ({NOTED}).")


def _of_sizes(facts: dict[str, Any]) -> Iterator[Line]:
    if upscaled := facts["upscaled"]:
        text = f"{_are(upscaled, facts)} smaller than resolution {facts['resolution']} and enlarged, so "
        text += "it is blurred" if upscaled == 1 else "they are blurred"
        importance = 72 if upscaled >= 0.1 * facts["looked_at"] else 48
        yield Line(importance, f"{text}: remove {_them(upscaled)}, or lower the resolution ({NOTED}).")
    if facts["elongated"]:
        text = f"{_are(facts['elongated'], facts, 'have')} a side more than three times the other, so most of it is cut"
        yield Line(46, f"{text} off: crop what matters out of it yourself ({NOTED}).")
    if facts["cropped_away"] > MUCH_CROPPED:
        text = f"The square in the centre leaves out {percent(facts['cropped_away'])} of the pixels"
        yield Line(47, f"{text}: crop the images yourself if what matters is not in their centre.")


def _of_classes(facts: dict[str, Any], unet: UNetConfig | None) -> Iterator[Line]:
    classes = facts["classes"]
    if classes is None or unet is None or "class" not in unet.conditions:
        return
    if empty := classes["empty"]:
        have = "1 class has" if len(empty) == 1 else f"{len(empty)} classes have"
        yield Line(68, f"{have} no image: {_some(empty)}.")
    few = [f"{name} ({count})" for name, count in classes["counts"].items() if count < FEW_OF_A_CLASS]
    if few:
        have = f"Of {len(classes['counts'])} classes, {len(few)} {'has' if len(few) == 1 else 'have'}"
        what = f"fewer than {FEW_OF_A_CLASS} images, too few to draw others like them"
        yield Line(66, f"{have} {what}: {_some(few)}.")
    if classes["unknown"]:
        yield Line(64, f"{number(classes['unknown'], 'images')} have no class; they train without one.")


def _some(words: Sequence[str], most: int = 5) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _of_captions(captions: dict[str, Any] | None) -> Iterator[Line]:
    if captions is None:
        return
    if captions["missing"]:
        share = percent(captions["missing"] / captions["images"])
        yield Line(78, f"{captions['missing']:,} of {captions['images']:,} images ({share}) have no caption; they "
                       "train without one.")  # fmt: skip
    if captions["cut"]:
        share = percent(captions["cut"] / captions["captions"])
        unit = captions["counted_by"]
        guess = "" if unit == "tokens" else " (the tokenizer is not here, so more may be)"
        yield Line(58, f"{captions['cut']:,} of {captions['captions']:,} captions ({share}) are longer than "
                       f"{captions['most']} {unit} and cut{guess}: shorten them, or raise max_caption_tokens if the "
                       "text encoder reads more.")  # fmt: skip


def _of_length(facts: dict[str, Any], configs: Sequence[RunConfig]) -> Iterator[Line]:
    for config in configs:
        seen, images = images_seen(config), facts["training"]
        if not images or seen is None:
            continue
        name = NAMES[isinstance(config, UNetConfig)]
        key = "max_train_steps" if config.minutes is None else "train_minutes or train_hours"
        if seen > MANY_EPOCHS * images:
            yield Line(62, f"{name} sees each of the {images:,} images {seen // images:,} times, and may learn "
                           f"them by heart: lower {key}, or add images.")  # fmt: skip
        elif seen < images:
            yield Line(30, f"{name} ends after {percent(seen / images)} of the {number(images, 'images')}: raise "
                           f"{key} to see all.")  # fmt: skip


def images_seen(config: RunConfig) -> int | None:
    """How many training images a stage sees in one process; None where train_batch_size is to be measured."""
    if config.max_train_images is not None:
        return config.max_train_images
    if config.images_per_step is not None:
        return config.max_train_steps * config.images_per_step
    if config.train_batch_size == "auto":
        return None
    return config.max_train_steps * config.train_batch_size * config.gradient_accumulation_steps
