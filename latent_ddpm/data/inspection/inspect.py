"""The inspection of a run's images: their facts, their duplicates, and which are undecodable; cached.

inspect(sources, config, cache_dir, workers)     look at every image
known_facts(sources, config, cache_dir)          the facts of a finished inspection of the same images
inspect_captions(sources, config, folder)        how many captions there are, and how many are cut
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latent_ddpm.config import EMBEDDED_ENCODER, UNetConfig
from latent_ddpm.data.captions import cleaned, embedded_encoder
from latent_ddpm.data.images import TRANSFORM_VERSIONS
from latent_ddpm.data.indexing import PART, digest, in_parts
from latent_ddpm.data.inspection.duplicates import equal_rows, near_pairs
from latent_ddpm.data.inspection.table import Table, look_at_all
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.streaming import undecodable
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_whole
from latent_ddpm.progress import progress_bar
from latent_ddpm.resizing import resizer

VERSION = 1  # change it when a fact changes its meaning
SPLITS = ("training", "validation")
ELONGATED = 3.0  # times as long as wide, or as wide as long
MOST_LISTED = 20  # words and sizes that are counted one by one
MOST_NAMED = 100_000  # images that are named for one reason
Sources = tuple[ImageSource, ImageSource]


@dataclasses.dataclass
class Inspection:
    """What is known of the images of a run.

    Images are numbered through: first those for training, then those for validation.

    Attributes:
        facts: numbers and words, JSON-able, without names of files; see `facts_of`.
        bad: of each undecodable image its number, and why.
        copies: groups of images: what they have in common, and their numbers.
        noted: of each thing worth knowing of single images, such as "of one colour", the numbers of the images.
        folder: of the cache.
    """

    facts: dict[str, Any]
    bad: list[tuple[int, str]]
    copies: list[tuple[str, list[int]]]
    noted: dict[str, list[int]]
    folder: Path


def cache_folder(sources: Sources, config: Any, cache_dir: Path) -> Path:
    """The folder for an inspection: its name depends on the images and on how training sees them."""
    version = TRANSFORM_VERSIONS[resizer(config.image_resize)]
    of_data = [source.fingerprint for source in sources]
    seen = (config.resolution, config.image_channels, version)
    return Path(cache_dir) / f"inspection-{digest('inspection', VERSION, of_data, seen)}"


def inspect(sources: Sources, config: Any, cache_dir: Path, workers: int) -> Inspection:
    """Look at every image, or read the result of an earlier call.

    Args:
        sources: the training and the validation images.
        config: a RunConfig.
        cache_dir: the run's folder of caches. A stopped inspection goes on.
        workers: processes that decode.
    """
    folder = cache_folder(sources, config, cache_dir)
    path = folder / "result.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        facts = found["facts"] | outside(sources, config)
        bad, copies = ([tuple(pair) for pair in found[name]] for name in ("bad", "copies"))
        return Inspection(facts, bad, copies, found["noted"], folder)
    table = look_at_all(sources, config, folder, workers)
    copies, duplicates = find_copies(table, len(sources[0]))
    facts = facts_of(table, sources, config) | {"duplicates": duplicates, "complete": True}
    bad, noted = sorted(table.errors.items()), note(table, config)
    write_whole(path, json.dumps({"facts": facts, "bad": bad, "copies": copies, "noted": noted}))
    for block in folder.glob("block-*.npz"):
        block.unlink(missing_ok=True)  # another inspection of the same images may be faster
    return Inspection(facts | outside(sources, config), bad, copies, noted, folder)


def known_facts(sources: Sources, config: Any, cache_dir: Path) -> dict[str, Any] | None:
    """The facts of a finished inspection of the same images; None without one."""
    try:
        found = json.loads((cache_folder(sources, config, cache_dir) / "result.json").read_text(encoding="utf-8"))
        return found["facts"] | outside(sources, config)
    except (OSError, ValueError, KeyError):
        return None


# --------------------------------------------------------------------------------------------------------- facts


def facts_of_rows(rows: list[dict[str, Any]], sources: Sources, config: Any) -> dict[str, Any]:
    """As `facts_of`, of some training images that can be decoded; rows of `table.look_at`."""
    facts = facts_of(Table(rows), sources, config)
    del facts["undecodable"]
    return facts


def facts_of(table: Table, sources: Sources, config: Any) -> dict[str, Any]:
    """What the table says of the images.

    Returns:
        looked_at: number of decodable images, to which all counts refer.
        training, validation: numbers of decodable images. undecodable: of the others, by split.
        formats, modes, depths, profiles, sizes: number of images by word, the most frequent first.
        shorter_side: smallest, median and largest, and a histogram as [from, to, images].
        The others are numbers of images, or shares.
    """
    good = ~table.has("bad")
    train = np.arange(len(table)) < len(sources[0])
    facts: dict[str, Any] = {
        "looked_at": int(good.sum()),
        "training": int((good & train).sum()),
        "validation": int((good & ~train).sum()),
        "undecodable": {
            "training": int((~good & train).sum()),
            "validation": int((~good & ~train).sum()),
        },
        "resolution": config.resolution,
        "image_channels": config.image_channels,
        "stored": int((table.has("stored") & good).sum()),
    }
    for plural, name in (("formats", "format"), ("modes", "mode"), ("depths", "depth"), ("profiles", "profile")):
        facts[plural] = _first(table.count(name, good))
    for flag in ("transparent", "rotated", "frames", "float", "colour", "flat", "dark"):
        facts[flag] = int((table.has(flag) & good).sum())
    facts["gray"] = facts["looked_at"] - facts["colour"]
    return facts | sizes_of(table["width"][good], table["height"][good], config.resolution)


def note(table: Table, config: Any) -> dict[str, list[int]]:
    """The numbers of the images of which something is worth knowing, by what it is; at most MOST_NAMED for each."""
    good = ~table.has("bad")
    width, height = table["width"], table["height"]
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    broken = np.isin(table.words["profile"], [k for k, w in enumerate(table.vocabulary["profile"]) if w == "broken"])
    colour = table.has("colour")
    found = {
        "of one colour": table.has("flat"),
        "nearly black": table.has("dark"),
        "floating-point": table.has("float"),
        "only the first frame or page is used": table.has("frames"),
        "transparent": table.has("transparent"),
        "broken colour profile": broken,
        "smaller than the resolution": shorter < config.resolution,
        "very long or wide": longer > ELONGATED * shorter,
    }
    found |= {"in colour": colour} if config.image_channels == 1 else {"gray": ~colour}
    rows = {what: np.flatnonzero(good & mask)[:MOST_NAMED].tolist() for what, mask in found.items()}
    return {what: numbers for what, numbers in rows.items() if numbers}


def sizes_of(widths: np.ndarray, heights: np.ndarray, resolution: int) -> dict[str, Any]:
    """What the sizes of images, int32 (N,), mean at a resolution: `sizes`, `shorter_side`, `upscaled`, `elongated`
    and `cropped_away`, the share of the pixels outside the square."""
    if not len(widths):
        return {"sizes": {}, "shorter_side": None, "upscaled": 0, "elongated": 0, "cropped_away": 0.0}
    shorter, longer = np.minimum(widths, heights), np.maximum(widths, heights)
    pairs, counts = np.unique(np.stack((widths, heights), axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[: MOST_LISTED + 1]
    edges = [0, *(2**k for k in range(3, 15)), 2**31 - 1]
    bins = np.histogram(shorter, edges)[0].tolist()
    return {
        "sizes": _first({f"{pairs[k][0]}x{pairs[k][1]}": int(counts[k]) for k in order}, len(pairs)),
        "shorter_side": {
            "smallest": int(shorter.min()),
            "median": int(np.median(shorter)),
            "largest": int(shorter.max()),
            "histogram": [[edges[k], edges[k + 1] - 1, count] for k, count in enumerate(bins) if count],
        },
        "upscaled": int((shorter < resolution).sum()),
        "elongated": int((longer > ELONGATED * shorter).sum()),
        "cropped_away": float(1 - (shorter / longer).mean()),
    }


def classes_of(sources: Sequence[ImageSource]) -> dict[str, Any] | None:
    """The number of training images of each class, and of those without one; None without classes.

    `empty` are the classes without a training image.
    """
    if sources[0].class_names is None:
        return None
    names = sources[0].class_names
    counts, unknown = np.zeros(len(names), dtype=np.int64), 0
    for start in range(0, len(sources[0]), PART):
        part = sources[0].labels[start : start + PART]
        known = part[(part >= 0) & (part < len(names))]
        counts += np.bincount(known, minlength=len(names))
        unknown += len(part) - len(known)
    pairs = list(zip(names, counts.tolist(), strict=True))
    empty = [name for name, count in pairs if not count]
    return {
        "counts": {name: count for name, count in pairs if count},
        "unknown": unknown,
        "empty": list(dict.fromkeys([*empty, *sources[0].findings.empty_classes])),
    }


def outside(sources: Sources, config: Any) -> dict[str, Any]:
    """What depends on the source and not on the pixels: classes, splits, and what it left out."""
    findings = sources[0].findings
    return {
        "classes": classes_of(sources),
        "left_out": findings.counts(),
        "folders_left_out": [why for why, names in findings.left_out.items() if all(n.endswith("/") for n in names)],
        "splits": {name: list(split) for name, split in findings.splits.items()},
        "notes": list(findings.notes),
        "undecodable_in_stream": undecodable(config) if getattr(config, "streaming", False) else 0,
    }


def _first(counts: dict[str, int], different: int | None = None) -> dict[str, int]:
    """The most frequent words, and how many others there are."""
    if len(counts) <= MOST_LISTED:
        return counts
    kept = dict(list(counts.items())[:MOST_LISTED])
    return kept | {"others": (different or len(counts)) - MOST_LISTED}


# ---------------------------------------------------------------------------------------------------- duplicates


def find_copies(table: Table, training: int) -> tuple[list[tuple[str, list[int]]], dict[str, int]]:
    """Groups of equal and similar images, and how many images are copies.

    Args:
        table: of all images.
        training: number of training images, which come first.

    Returns:
        The groups, as in `Inspection`; and the numbers of images that equal an earlier one (`same_file`,
        `same_pixels`), resemble an earlier one (`near`, `mirrored`), or are for validation and have any such copy
        among the training images (`in_both_splits`).
    """
    good = ~table.has("bad")
    with_file = good & (table["content"] != 0).any(axis=1)
    same_files = equal_rows(table["content"], with_file)
    same_pixels = equal_rows(table["pixels"], good)
    groups: list[tuple[str, list[int]]] = []
    later = np.zeros(len(table), dtype=bool)  # images that equal an earlier one
    leaked = np.zeros(len(table), dtype=bool)
    for group in same_pixels:
        digests = table["content"][group]
        kind = "same file" if with_file[group].all() and (digests == digests[0]).all() else "same pixels"
        groups.append((kind, group.tolist()))
        later[group[1:]] = True
        if group[0] < training:
            leaked[group] = True
    first_of = np.arange(len(table))
    for group in same_pixels:
        first_of[group] = group[0]
    different = np.flatnonzero(good & ~later)
    counts = {"same_file": sum(len(group) - 1 for group in same_files)}
    counts["same_pixels"] = int(later.sum()) - counts["same_file"]
    known = np.empty((0, 2), dtype=np.int64)
    for kind, mirrored in (("near", False), ("mirrored", True)):
        pairs = near_pairs(table, different, mirrored)
        pairs = pairs[~np.isin(_keys(pairs), _keys(known))]
        known = np.concatenate((known, pairs))
        counts[kind] = len(np.unique(pairs[:, 1]))
        groups += [(kind, group) for group in _components(pairs)]
        # a copy of either image leaks with it
        for a, b in pairs.tolist():
            leaked[b] |= a < training
    leaked[:training] = False
    leaked |= leaked[first_of] & good
    counts["in_both_splits"] = int(leaked[training:].sum())
    return groups, counts


def _keys(pairs: np.ndarray) -> np.ndarray:
    return pairs[:, 0] << 32 | pairs[:, 1]


def _components(pairs: np.ndarray) -> list[list[int]]:
    """The groups that the pairs, int64 (P, 2), connect; each ascending, in the order of their first images."""
    root: dict[int, int] = {}

    def of(i: int) -> int:
        while root.setdefault(i, i) != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for a, b in pairs.tolist():
        a, b = sorted((of(a), of(b)))
        root[b] = a
    groups: dict[int, list[int]] = {}
    for i in sorted(root):
        groups.setdefault(of(i), []).append(i)
    return sorted(groups.values())


# ------------------------------------------------------------------------------------------------------ captions


def inspect_captions(sources: Sources, config: UNetConfig, folder: Path) -> dict[str, Any]:
    """What the captions of a run with the condition text are like; cached in `folder`.

    Returns:
        images, missing (images without a caption), captions, cut (longer than `most` tokens), and counted_by: "tokens"
        where the tokenizer of the text encoder is at hand, else "words".
    """
    settings = (config.caption_column, config.max_caption_tokens, config.text_encoder)
    path = folder / f"captions-{digest(*settings)}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    limit, count = _counter(config)
    found = {"images": 0, "missing": 0, "captions": 0, "cut": 0, "most": limit}
    found["counted_by"] = "words" if count is _words else "tokens"
    total = sum(map(len, sources))
    with progress_bar(total=total, desc="captions", unit="image", leave=False) as bar:
        for part in in_parts(_captions(sources, config.caption_column)):
            all_of_part = [caption for captions in part for caption in captions]
            found["images"] += len(part)
            found["missing"] += sum(not captions for captions in part)
            found["captions"] += len(all_of_part)
            found["cut"] += sum(length > limit for length in count(all_of_part))
            bar.update(len(part))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found))
    return found


def _captions(sources: Iterable[ImageSource], column: str) -> Iterator[list[str]]:
    for source in sources:
        for i in range(len(source)):
            yield cleaned(source.captions(i, column))


def _words(captions: Sequence[str]) -> list[int]:
    return [len(caption.split()) for caption in captions]


def _counter(config: UNetConfig) -> tuple[int, Any]:
    """The most tokens of a caption, and a function from captions to their lengths; nothing is downloaded for it."""
    name = config.text_encoder
    try:
        import transformers
        from huggingface_hub import snapshot_download

        if name == EMBEDDED_ENCODER:
            name = str(embedded_encoder())
        folder = name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (Exception, UserError):  # not here, or of a kind that this version of transformers does not know
        return config.max_caption_tokens, _words

    def tokens(captions: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer(list(captions), verbose=False)["input_ids"]] if captions else []

    return min(config.max_caption_tokens, tokenizer.model_max_length), tokens
