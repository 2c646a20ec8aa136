"""The files of an inspection: report.json and .html, sheet.png, left_out.jsonl, duplicates.jsonl, noted.jsonl."""

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.inspection.inspect import SPLITS, Inspection, Sources
from latent_ddpm.data.inspection.lines import Line, number, percent
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.files import save_png, write_json, write_whole
from latent_ddpm.resizing import resizer

SHEET_WIDTH, MOST_ROWS = 1536, 10  # pixels; rows of images
LEAST_TILE, LABEL = 64, 14  # pixels: smaller images are enlarged by a whole number; height of a label
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:100rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.15rem 1rem .15rem 0;text-align:left}
td+td,th+th{text-align:right}img{max-width:100%}.grave{color:#a00}section{display:inline-block;vertical-align:top;
margin-right:3rem}h2{font-size:1.1rem;margin-bottom:0}"""


def write_report(
    folder: Path,
    inspection: Inspection,
    sources: Sources,
    config: Any,
    lines: Sequence[Line],
    captions: dict[str, Any] | None,
    command: str,
) -> None:
    """Write all files of the report into `folder`, which is created.

    Args:
        folder: should be inside output_dir, which is never trained on.
        inspection: of the sources.
        sources: the training and the validation images.
        config: a RunConfig.
        lines: what is worth knowing.
        captions: from `inspect_captions`, or None.
        command: that made the report.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(sources[0], config, {i for i, _ in inspection.bad})
    if sheet is not None:
        save_png(sheet, folder / "sheet.png")
    write_whole(folder / "left_out.jsonl", _lines(left_out(inspection, sources)))
    write_whole(folder / "duplicates.jsonl", _lines(duplicates(inspection, sources)))
    write_whole(folder / "noted.jsonl", _lines(noted(inspection, sources)))
    facts = inspection.facts | ({"captions": captions} if captions else {})
    said = [{"importance": line.importance, "text": line.text} for line in lines]
    write_json(folder / "report.json", {"command": command, "lines": said, **facts})
    write_whole(folder / "report.html", page(facts, lines, sheet, command))


def _lines(entries: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def left_out(inspection: Inspection, sources: Sources) -> Iterator[dict[str, Any]]:
    """{"name", "reason"} of each file that is not trained on; `split` too where it was one of the images."""
    for i, error in inspection.bad:
        split, name = name_of(i, sources)
        yield {"name": name, "reason": f"cannot be decoded: {error}", "split": split}
    for reason, name in sources[0].findings.all_left_out():
        yield {"name": name, "reason": reason}


def duplicates(inspection: Inspection, sources: Sources) -> Iterator[dict[str, Any]]:
    """{"kind", "images", "splits"} of each group of copies; kind is "same file", "same pixels", "near", "mirrored"."""
    for kind, group in inspection.copies:
        splits, names = zip(*(name_of(i, sources) for i in group), strict=True)
        yield {"kind": kind, "images": names, "splits": splits}


def noted(inspection: Inspection, sources: Sources) -> Iterator[dict[str, Any]]:
    """{"name", "split", "what"} of each image that a line is about; `what` is a list."""
    of_image: dict[int, list[str]] = {}
    for what, numbers in inspection.noted.items():
        for i in numbers:
            of_image.setdefault(i, []).append(what)
    for i in sorted(of_image):
        split, name = name_of(i, sources)
        yield {"name": name, "split": split, "what": of_image[i]}


def name_of(i: int, sources: Sources) -> tuple[str, str]:
    """The split of image number i of an inspection, and its name there."""
    training = len(sources[0])
    return (SPLITS[0], sources[0].name(i)) if i < training else (SPLITS[1], sources[1].name(i - training))


# --------------------------------------------------------------------------------------------------------- sheet


def contact_sheet(source: ImageSource, config: Any, bad: set[int]) -> Image.Image | None:
    """Training images as the run sees them, spread over the source and its classes; None if none can be decoded.

    Args:
        source: the training images.
        config: has `resolution`, `image_channels`, `image_resize`.
        bad: the numbers of images that are known to be undecodable.
    """
    tile = config.resolution * max(1, LEAST_TILE // config.resolution)
    label = LABEL if source.class_names is not None else 0
    columns = max(1, SHEET_WIDTH // tile)
    count = min(len(source), columns * max(1, min(MOST_ROWS, SHEET_WIDTH // (tile + label))))
    places = np.linspace(0, len(source) - 1, count).astype(np.int64)
    # by class, and evenly over each
    chosen = places if source.labels is None else np.argsort(source.labels, kind="stable")[places]
    shown = [
        (int(i), square) for i in chosen if i not in bad and (square := _square(source, int(i), config)) is not None
    ]
    if not shown:
        return None
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (min(columns, len(shown)) * tile, rows * (tile + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (i, picture) in enumerate(shown):
        left, top = k % columns * tile, k // columns * (tile + label)
        sheet.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), (left, top))
        if label and source.labels is not None and source.labels[i] >= 0:
            # the built-in font has no other letters everywhere
            name = source.class_names[source.labels[i]].encode("latin-1", "replace").decode("latin-1")
            draw.text((left + 1, top + tile), name[: tile // 7], fill="black")
    return sheet


def _square(source: ImageSource, i: int, config: Any) -> Image.Image | None:
    pixels = decode_square(
        source, i, config.resolution, config.image_channels, library=resizer(config.image_resize)
    )  # (R, R, C)
    if isinstance(pixels, str):
        return None
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)).convert("RGB")


# ---------------------------------------------------------------------------------------------------------- page


def page(facts: dict[str, Any], lines: Sequence[Line], sheet: Image.Image | None, command: str) -> str:
    """The report as one HTML file, with the sheet inside."""
    said = "".join(
        f"<li{' class=grave' if line.importance >= 80 else ''}>{html.escape(line.text)}</li>\n" for line in lines
    )
    picture = ""
    if sheet is not None:
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        picture = f'<h2>What training sees</h2>\n<img alt="training images" src="data:image/png;base64,{encoded}">\n'
    tables = "\n".join(_table(title, rows) for title, rows in tables_of(facts) if rows)
    return f"""<!doctype html>
<meta charset="utf-8">
<title>What the run trains on</title>
<style>{STYLE}</style>
<h1>What the run trains on</h1>
<ul>
{said or "<li>Nothing stands out.</li>"}
</ul>
{picture}{tables}
<p><code>{html.escape(command)}</code></p>
"""


def _table(title: str, rows: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(_cell(value))}</td></tr>\n"
        for name, value in rows.items()
    )
    return f"<section><h2>{html.escape(title)}</h2>\n<table>\n{cells}</table></section>"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def tables_of(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tables of a report: title, and values by name."""
    bad = sum(facts["undecodable"].values()) + facts["undecodable_in_stream"]
    yield (
        "Images",
        {
            "for training": facts["training"],
            "for validation": facts["validation"],
            "cannot be decoded": bad,
            "files left out": sum(facts["left_out"].values()),
        },
    )
    copies = facts["duplicates"]
    yield (
        "Copies of earlier images",
        {
            "same file": copies["same_file"],
            "same pixels": copies["same_pixels"],
            "nearly equal": copies["near"],
            "mirrored": copies["mirrored"],
            "validation images with a copy in training": copies["in_both_splits"],
        },
    )
    yield "Left out", facts["left_out"]
    yield "Splits", {name: f"{count:,}, {use}" for name, (count, use) in facts["splits"].items()}
    for title, key in (("Format", "formats"), ("Mode", "modes"), ("Bits per channel", "depths")):
        yield title, facts[key]
    without = facts["looked_at"] - sum(facts["profiles"].values())
    yield "Colour profile", (facts["profiles"] | {"none": without}) if facts["profiles"] else {}
    yield "Size", facts["sizes"]
    sides = facts["shorter_side"]
    if sides:
        spread = {name: sides[name] for name in ("smallest", "median", "largest")}
        bins = {f"{low} to {high}" if high < 2**30 else f"from {low}": n for low, high, n in sides["histogram"]}
        yield "Shorter side", spread | bins
    yield (
        f"At resolution {facts['resolution']}",
        {
            "enlarged": facts["upscaled"],
            "very long or wide": facts["elongated"],
            "pixels cropped away": percent(facts["cropped_away"]),
        },
    )
    yield (
        "Pixels",
        {
            "in colour": facts["colour"],
            "gray": facts["gray"],
            "of one colour": facts["flat"],
            "with transparency": facts["transparent"],
            "rotated by EXIF": facts["rotated"],
            "animated, or of several pages": facts["frames"],
            "floating-point": facts["float"],
        },
    )
    if classes := facts["classes"]:
        counts = classes["counts"] | dict.fromkeys(classes["empty"], 0)
        yield "Class", counts | ({"(none)": classes["unknown"]} if classes["unknown"] else {})
    if captions := facts.get("captions"):
        yield (
            "Captions",
            {
                "captions": captions["captions"],
                "images without": captions["missing"],
                f"longer than {captions['most']} {captions['counted_by']}": captions["cut"],
            },
        )


def summary(facts: dict[str, Any], lines: Sequence[Line], folder: Path) -> str:
    """What the script prints."""
    bad = sum(facts["undecodable"].values()) + facts["undecodable_in_stream"]
    left = sum(facts["left_out"].values())
    head = f"{facts['training']:,} training and {number(facts['validation'], 'validation images')}"
    head += f", {bad:,} undecodable" if bad else ""
    head += f", {number(left, 'files')} left out" if left else ""
    said = [f"- {line.text}" for line in lines] or ["Nothing stands out."]
    return "\n".join([f"{head}.", *said, str(folder / "report.html")])
