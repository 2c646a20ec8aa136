"""Check scripts/inspect_data.py on CIFAR-10: which planted copies it finds, and how long it takes beyond decoding.

    python benchmarks/check_inspection.py --data FOLDER --json docs/results/inspection/cifar10.json

FOLDER holds train.parquet and test.parquet. In a copy of them, --planted images of each kind (500) take the place of
others, each a copy of an image elsewhere in the 60,000:

    same file     the same bytes
    same pixels   saved again as PNG
    jpeg 80       decoded and saved as JPEG of quality 80
    larger        resized to 64 pixels, as PNG
    smaller       resized to 24 pixels, as PNG
    mirrored      mirrored, as PNG

A copy is found if the report puts it into a group with its original. Beside the JSON it writes a sheet of the pairs
that were not planted, to be judged by eye: CIFAR-10 holds some copies of its own. Times are of the whole script, less
that of decoding the same images in as many processes. Processor seconds leave out the waiting for cores that others
use. `digits` counts what it takes for copies among the digits of MNIST, which hold none. `search` is the search among
random hashes alone.
"""

import argparse
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.inspection.duplicates import similar_hashes
from latent_ddpm.data.sources.base import ImageSource
from latent_ddpm.data.sources.hub import open_hub
from latent_ddpm.errors import UserError
from latent_ddpm.files import save_png, write_json
from latent_ddpm.resizing import resizer
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
SPLITS = ("train", "test")
SIDE, SHOWN, COLUMNS = 32, 60, 10  # pixels of an image; pairs on the sheet, and in a row of it


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def resized(side: int) -> Callable[[Image.Image], bytes]:
    """A function from an image to a PNG of another size."""
    return lambda image: saved(image.resize((side, side), Image.Resampling.LANCZOS), "PNG")


COPIES: dict[str, Callable[[Image.Image], bytes] | None] = {
    "same file": None,
    "same pixels": lambda image: saved(image, "PNG"),
    "jpeg 80": lambda image: saved(image, "JPEG", quality=80),
    "larger": resized(64),
    "smaller": resized(24),
    "mirrored": lambda image: saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), "PNG"),
}


def plant(data: Path, folder: Path, count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Write the dataset with `count` copies of each kind; returns kind, original and copy, as `train[7]`."""
    tables = [pyarrow.parquet.read_table(data / f"{split}.parquet") for split in SPLITS]
    cells = [cell for table in tables for cell in table.column("image").to_pylist()]
    places = [f"{split}[{i}]" for split, table in zip(SPLITS, tables, strict=True) for i in range(len(table))]
    chosen = np.random.default_rng(seed).choice(len(cells), 2 * count * len(COPIES), replace=False)
    planted = []
    for k, (original, copy) in enumerate(chosen.reshape(-1, 2).tolist()):
        kind = list(COPIES)[k % len(COPIES)]
        make, content = COPIES[kind], cells[original]["bytes"]
        if make is not None:
            content = make(Image.open(io.BytesIO(content)).convert("RGB"))
        cells[copy] = {"bytes": content, "path": None}
        planted.append((kind, places[original], places[copy]))
    start = 0
    for split, table in zip(SPLITS, tables, strict=True):
        field = table.schema.field("image")
        column = pyarrow.array(cells[start : start + len(table)], type=field.type)
        table = table.set_column(table.schema.get_field_index("image"), field, column)
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet", row_group_size=1000)
        start += len(table)
    return planted


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and seconds of the processor in this process and those that ended in it."""
    begun, before = time.monotonic(), os.times()
    work()
    after = os.times()
    used = sum(after[:4]) - sum(before[:4])
    return {"seconds": time.monotonic() - begun, "processor_seconds": used}


class Squares(Dataset):
    """The images of a source, decoded as training decodes them."""

    def __init__(self, source: ImageSource) -> None:
        self.source, self.resized_by = source, resizer(None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> int:
        square = decode_square(self.source, i, SIDE, 3, library=self.resized_by)
        if isinstance(square, str):
            raise ValueError(square)
        return square.shape[0]


def decode_all(sources: tuple[ImageSource, ImageSource], workers: int) -> None:
    """Decode every image once, in `workers` processes."""
    for source in sources:
        for _ in DataLoader(Squares(source), batch_size=256, num_workers=workers):
            pass


def groups_of(path: Path) -> list[tuple[str, list[str]]]:
    """The groups of duplicates.jsonl: their kind, and the places of their images."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(entry["kind"], [re.match(r"\w+\[\d+\]", name)[0] for name in entry["images"]]) for entry in entries]


def judged(groups: list[tuple[str, list[str]]], planted: list[tuple[str, str, str]]) -> dict[str, Any]:
    """The share of each kind that was found, and the groups without a planted image by kind."""
    together = {frozenset((a, b)) for _, names in groups for a in names for b in names if a != b}
    found: dict[str, list[bool]] = {}
    for kind, original, copy in planted:
        found.setdefault(kind, []).append(frozenset((original, copy)) in together)
    copies = {copy for _, _, copy in planted}
    others = [(kind, names) for kind, names in groups if not copies & set(names)]
    return {
        "found": {kind: sum(hits) / len(hits) for kind, hits in found.items()},
        "not_planted": {kind: sum(k == kind for k, _ in others) for kind in dict.fromkeys(k for k, _ in others)},
        "not_planted_groups": others,
    }


def sheet_of(groups: list[tuple[str, list[str]]], sources: tuple[ImageSource, ImageSource]) -> Image.Image:
    """The first two images of each group side by side."""
    chosen = groups[:SHOWN]
    tile = 2 * SIDE
    rows = -(-len(chosen) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (2 * tile + 6), max(1, rows) * (tile + 6)), "white")
    for k, (_, names) in enumerate(chosen):
        for n, name in enumerate(names[:2]):
            split, i = re.match(r"(\w+)\[(\d+)\]", name).groups()
            image = sources[SPLITS.index(split)].load(int(i)).convert("RGB").resize((tile, tile))
            sheet.paste(image, (k % COLUMNS * (2 * tile + 6) + n * tile, k // COLUMNS * (tile + 6)))
    return sheet


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "cifar10")
    parser.add_argument("--planted", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--digits", default="configs/mnist.yaml", help="config of the images that hold no copies")
    parser.add_argument("--hashes", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not (options.data / "train.parquet").exists():
        raise UserError(f"--data: there is no train.parquet in {options.data}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, output_dir = Path(name) / "data", Path(name) / "run"
        folder.mkdir()
        planted = plant(options.data, folder, options.planted)
        words = ["scripts/inspect_data.py", "--config", "configs/cifar10.yaml", "--dataset_name", str(folder)]
        words += ["--image_column", "image", "--max_validation_images", "100000", "--output_dir", str(output_dir)]
        words += ["--workers", str(options.workers)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(Path(name) / "arrow")}

        def inspect(words: list[str]) -> None:
            subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=True)

        whole = timed(lambda: inspect(words))
        again = timed(lambda: inspect(words))
        of_digits = ["--config", options.digits, "--output_dir", str(Path(name) / "digits")]
        inspect([words[0], *of_digits, "--workers", str(options.workers)])
        digits = json.loads((Path(name) / "digits" / "inspection" / "report.json").read_text(encoding="utf-8"))
        sources = open_hub(str(folder), None, "image")
        decoding = timed(lambda: decode_all(sources, options.workers))
        report = json.loads((output_dir / "inspection" / "report.json").read_text(encoding="utf-8"))
        result = judged(groups_of(output_dir / "inspection" / "duplicates.jsonl"), planted)
        sheet = sheet_of(result.pop("not_planted_groups"), sources)
    hashes = np.random.default_rng(0).integers(0, 2**63, options.hashes, dtype=np.uint64)
    search = timed(lambda: sum(len(first) for _, first, _ in similar_hashes(hashes, hashes)))
    beyond = {key: whole[key] - decoding[key] for key in whole}
    beyond["processor_seconds_a_core"] = beyond["processor_seconds"] / options.workers
    kept = [kind for kind in ("jpeg 80", "larger", "smaller") if kind in result["found"]]
    content = {
        "command": shlex.join(["python", "benchmarks/check_inspection.py", *_public(argv)]),
        "images": report["training"] + report["validation"],
        "planted_of_each_kind": options.planted,
        "workers": options.workers,
        **result,
        "found_near": sum(result["found"][kind] for kind in kept) / len(kept),
        "duplicates": report["duplicates"],
        "digits": {"images": digits["looked_at"], **digits["duplicates"]},
        "script": whole,
        "second_call": again,
        "decoding": decoding,
        "beyond_decoding": beyond,
        "search": {"hashes": options.hashes, **search},
    }
    print(json.dumps(content, indent=1))
    if options.json is not None:
        write_json(options.json, content)
        save_png(sheet, options.json.with_name(f"{options.json.stem}-not-planted.png"))
    return 0


def _public(argv: list[str]) -> list[str]:
    """The command line with DATA for the folder of the images, which lies elsewhere on each machine."""
    return ["DATA" if before == "--data" else word for before, word in zip(["", *argv], argv, strict=False)]


if __name__ == "__main__":
    run(main)
