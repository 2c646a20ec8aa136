"""Measure what a late discriminator does to reconstructions: the same runs with and without one.

    python benchmarks/benchmark_discriminator.py --seeds 0 1 2 --work_dir outputs/discriminator \\
        --json docs/results/NAME.json --config configs/cifar10.yaml --max_train_steps 4000 --disc_start 2000 \\
        --disc_weight 0.5

For each seed, train_autoencoder.py trains without a discriminator, and again from its checkpoint at `--disc_start` with
one. Both see the same examples, and scripts/evaluate.py measures both. The other options are the keys of
train_autoencoder.py. `--recipes "" "--disc_norm actnorm"` compares discriminators with their own keys. Writes JSON, and
a figure beside it. A second call resumes an interrupted one.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import matplotlib
import torch

from latent_ddpm.autoencoder.stock import latents_of, load_autoencoder
from latent_ddpm.config import AutoencoderConfig, parse_config
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import open_image_dataset
from latent_ddpm.data.images import to_float
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.features import EXTRACTORS
from latent_ddpm.evaluation.grids import reconstruction_grid
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
DATA_KEYS = ("train_data_dir", "dataset_name", "dataset_config_name", "image_column", "resolution", "image_channels")
DATA_KEYS += ("center_crop", "validation_fraction", "max_validation_images")


def folder_of(work_dir: Path, seed: int, name: str) -> Path:
    """Where the run `name` of a seed is kept."""
    return work_dir / f"seed-{seed}" / "-".join(name.replace("--", "").split())


def train(folder: Path, words: list[str]) -> None:
    """Run train_autoencoder.py to its end, from where it was."""
    wanted, saved = json.dumps(words, indent=1), folder / "benchmark.json"
    if saved.exists() and saved.read_text(encoding="utf-8") != wanted:
        raise UserError(f"{folder} holds a run with other options. Give another --work_dir, or remove that folder.")
    folder.mkdir(parents=True, exist_ok=True)
    saved.write_text(wanted, encoding="utf-8")
    if (folder / "autoencoder").exists():
        return
    if (folder / "checkpoints").exists():
        at = words.index("--resume_from_checkpoint") if "--resume_from_checkpoint" in words else len(words)
        words = [*words[:at], "--resume_from_checkpoint", "latest", *words[at + 2 :]]
    command = [sys.executable, str(ROOT / "train_autoencoder.py"), *words, "--output_dir", str(folder)]
    if subprocess.run(command).returncode:
        raise UserError(f"This run did not end well: {' '.join(command)}")


def measure(folder: Path, config: AutoencoderConfig, extractor: str, work_dir: Path) -> dict:
    """The figures of scripts/evaluate.py for a finished run."""
    path = folder / f"evaluation-{extractor}.json"
    if not path.exists():
        keys = {key: getattr(config, key) for key in DATA_KEYS if getattr(config, key) is not None}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        words += ["--output_dir", str(folder), "--json", str(path), "--feature_extractor", extractor]
        words += ["--feature_cache", str(work_dir / "features")]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "evaluate.py"), "autoencoder", *words], check=True)
    return json.loads(path.read_text(encoding="utf-8"))


def draw(path: Path, results: list[dict], work_dir: Path, config: AutoencoderConfig) -> None:
    """PSNR and rFD of each seed as arrows from without to with; beside them reconstructions of the first seed."""
    names = [name for name in results[0] if name != "seed"]
    _, source = open_sources(config)
    bad = BadImages(work_dir / "bad_images.jsonl", len(source), config.max_bad_image_share)
    images = open_image_dataset(source, config, work_dir / "cache", bad, train=False, is_main=True, wait=lambda: None)
    originals = to_float(torch.stack([images.get(i) for i in range(min(16, len(images)))]))
    figure, axes = plt.subplots(1, 2, figsize=(12, 3.4), constrained_layout=True, width_ratios=(1, 2.4))
    for number, name in enumerate(names[1:]):
        color = f"C{number}"
        for result in results:
            (x0, x1), (y0, y1) = ([result[which][key] for which in ("without", name)] for key in ("psnr", "rfd"))
            axes[0].annotate("", (x1, y1), (x0, y0), arrowprops={"arrowstyle": "->", "color": color})
            axes[0].scatter((x0, x1), (y0, y1), s=12, color=color)
        axes[0].plot([], [], color=color, label=textwrap.fill(name, 40))
    axes[0].legend(fontsize=6)
    axes[0].set_xlabel("PSNR (dB)")
    axes[0].set_ylabel("rFD")
    axes[0].set_ylim(bottom=0)
    made = []
    with torch.no_grad():
        for name in names:
            autoencoder = load_autoencoder(folder_of(work_dir, results[0]["seed"], name) / "autoencoder")
            made.append(autoencoder.decode(latents_of(autoencoder, originals)).sample)
    grid = reconstruction_grid(originals.repeat(len(names), 1, 1, 1), torch.cat(made), columns=len(originals))
    axes[1].imshow(grid, cmap="gray", interpolation="nearest")
    axes[1].set_title(textwrap.fill("originals over reconstructions: " + ", ".join(names), 110), fontsize=8)
    axes[1].axis("off")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=[""])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--feature_extractor", default="efficientnet-lite0", choices=EXTRACTORS)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    config = parse_config(AutoencoderConfig, rest)
    if not (config.disc_weight > 0 and 0 < config.disc_start < config.max_train_steps):
        raise UserError("Set disc_weight above 0 and disc_start between 0 and max_train_steps.")
    if config.disc_start % config.checkpointing_steps:
        raise UserError("disc_start has to be a multiple of checkpointing_steps: both runs part at a checkpoint.")
    recipes = {f"with {words}".strip(): shlex.split(words) for words in options.recipes}
    results: list[dict] = []
    for seed in options.seeds:
        words = [*rest, "--seed", str(seed), "--checkpoints_total_limit", "1000"]
        without = folder_of(options.work_dir, seed, "without")
        train(without, [*words, "--disc_weight", "0"])
        parting = without / "checkpoints" / f"autoencoder-{config.disc_start:08d}"
        for name, own in recipes.items():
            train(folder_of(options.work_dir, seed, name), [*words, *own, "--resume_from_checkpoint", str(parting)])
        results.append({"seed": seed})
        for name in ("without", *recipes):
            folder = folder_of(options.work_dir, seed, name)
            results[-1][name] = measure(folder, config, options.feature_extractor, options.work_dir)
        summary = {
            "command": f"python benchmarks/benchmark_discriminator.py {shlex.join(argv)}",
            "feature_extractor": options.feature_extractor,
            "torch": torch.__version__,
            "recipes": {},
            "results": results,
        }
        for name in recipes:
            ratios = [result[name]["rfd"] / result["without"]["rfd"] for result in results]
            losses = [result["without"]["psnr"] - result[name]["psnr"] for result in results]
            summary["recipes"][name] = {
                "rfd_over_without": ratios,
                "rfd_over_without_median": statistics.median(ratios),
                "psnr_lost": losses,
            }
            print(f"seed {seed}, {name}: rFD {ratios[-1]:.3f} of that without, PSNR {-losses[-1]:+.2f} dB", flush=True)
        write_json(options.json, summary)
        draw(options.json.with_suffix(".png"), results, options.work_dir, config)
    return 0


if __name__ == "__main__":
    run(main)
