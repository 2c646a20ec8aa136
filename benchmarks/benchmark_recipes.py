"""Compare a config with the recipe from stock parts on several sets, each on its own autoencoder, in the same time.

    python benchmarks/small_sets.py --out outputs/sets --icons PACKAGE.tgz --cifar10 FOLDER
    python benchmarks/benchmark_recipes.py --work_dir outputs/recipes --json docs/results/recipes/NAME.json \\
        --config configs/auto.yaml --minutes 10 15 --sets digits icons

For each set, `stock` trains diffusers' VQModel for the first and its U-Net for the second number of minutes
(benchmark_autoencoder.py and benchmark_diffusion.py), with the widths of ours. Ours runs both training scripts with
`train_minutes` of both together, and shares them out as its config says. Its time holds the measuring, the decoding,
the encoding, the validations and the guidance in the weights, which stock's does not. scripts/evaluate.py then compares
samples of both with the training images. A second call goes on where the first one stopped. Writes JSON with each set's
distances, their ratio, and the geometric mean of the ratios.

`--keys` gives further keys of ours, in quotes: `--keys "--quantizer kl"`. `--seed` is the seed of both.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import of_stage, run

ROOT = Path(__file__).resolve().parent.parent
SETS = {  # the keys that describe the data
    "digits": {"dataset_name": "embedded:mnist", "resolution": 32, "image_channels": 1, "random_flip": False},
    "cifar10": {"dataset_name": "cifar10", "resolution": 32, "image_channels": 3, "random_flip": True},
    "gray": {"dataset_name": "gray", "resolution": 32, "image_channels": 1, "random_flip": True},
    "automobiles": {"dataset_name": "automobiles", "resolution": 32, "image_channels": 3, "random_flip": True},
    "icons": {"dataset_name": "icons", "resolution": 64, "image_channels": 3, "random_flip": False},
    "patches": {"dataset_name": "patches", "resolution": 64, "image_channels": 3, "random_flip": True},
}
SHARED = ("block_out_channels", "layers_per_block", "norm_num_groups", "num_vq_embeddings", "train_batch_size")
UNET = ("unet_block_out_channels", "unet_layers_per_block", "unet_attention_levels", "unet_attention_head_dim")
REAL_IMAGES = 5000  # of the training images, that samples are compared with; the features of all would take an hour
STOCK_CHANNELS = 3  # diffusers' default of latent_channels


def as_words(keys: dict[str, object]) -> list[str]:
    """Keys as a command line."""
    return [
        word
        for key, value in keys.items()
        for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def call(script: str, words: list[object], product: Path, log: Path) -> float | None:
    """Run a script unless its product exists; returns the seconds, or None where it was there.

    Raises:
        UserError: the script failed.
    """
    if product.exists():
        return None
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, str(ROOT / script), *map(str, words)]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    if status:
        raise UserError(f"{script} failed with status {status}: see {log}.")
    return time.monotonic() - begun


def distance(name: str, folder: Path, data: list[str], pipeline: Path, steps: int, images: int) -> dict:
    """What scripts/evaluate.py says of a pipeline's samples."""
    path = folder / f"{name}-evaluation.json"
    words = [*data, "--output_dir", folder / "data", "--pipeline", pipeline, "--steps", steps]
    words += ["--num_images", images, "--json", path, *reals_in(folder)]
    call("scripts/evaluate.py", ["pipeline", *words], path, folder / f"{name}-evaluation.log")
    setting = json.loads(path.read_text(encoding="utf-8"))["settings"][0]
    return {key: setting[key] for key in ("fd", "precision", "recall", "coverage") if key in setting}


def reals_in(folder: Path) -> list[str]:
    """With how many training images scripts/evaluate.py compares, and where it keeps their features."""
    return ["--max_real_images", str(REAL_IMAGES), "--feature_cache", str(folder / "features")]


def last_metrics(path: Path, stage: str) -> dict:
    """The last validation of a stage in metrics.jsonl."""
    found: dict = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["stage"] == stage:
            found |= {key: value for key, value in record.items() if key.startswith("validation_")}
    return found


def compare(name: str, options: argparse.Namespace, config_words: list[str]) -> dict:
    """Train and measure stock and ours on a set."""
    folder = options.work_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    keys = dict(SETS[name])
    if name != "digits":
        keys["dataset_name"] = str((options.sets_dir / str(keys["dataset_name"])).resolve())
    data = [*as_words(keys), "--seed", str(options.seed)]
    first, second = options.minutes
    run_dir = folder / folder_of(options.keys)
    asked = [*config_words, *data, "--output_dir", str(run_dir), "--train_minutes", str(first + second)]
    for stage, product in (("autoencoder", "autoencoder/config.json"), ("unet", "pipeline/model_index.json")):
        words = of_stage(asked, stage)
        call(f"train_{stage}.py", words, run_dir / product, folder / f"{run_dir.name}-{stage}.log")
    # what auto_sizes has chosen is in the saved configs
    ours = parse_config(AutoencoderConfig, ["--config", str(run_dir / "train_autoencoder.yaml")])
    unet = parse_config(UNetConfig, ["--config", str(run_dir / "train_unet.yaml")])

    stock = [*data, "--latent_channels", str(STOCK_CHANNELS), *as_words({key: getattr(ours, key) for key in SHARED})]
    result = folder / "stock-autoencoder.json"
    words = ["--recipes", "stock", "--minutes", first, "--json", result, "--save_dir", folder / "autoencoders"]
    call("benchmarks/benchmark_autoencoder.py", [*words, *stock], result, folder / "stock-autoencoder.log")
    autoencoder = json.loads(result.read_text(encoding="utf-8"))["results"]["stock"]
    result = folder / "stock-unet.json"
    words = ["--recipes", "stock", "--minutes", second, "--json", result, "--work_dir", folder / "unet"]
    words += ["--autoencoder", folder / "autoencoders" / "stock", "--num_images", options.num_images, *data]
    words += ["--evaluation_words", shlex.join(reals_in(folder))]
    of_unet = as_words({key: getattr(unet, key) for key in (*UNET, "train_batch_size")})
    call("benchmarks/benchmark_diffusion.py", [*words, *of_unet], result, folder / "stock-unet.log")
    of_stock = json.loads(result.read_text(encoding="utf-8"))["results"]["stock"]

    noted = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    measured = last_metrics(run_dir / "metrics.jsonl", "autoencoder")
    steps = unet.num_inference_steps
    of_ours = distance(run_dir.name, folder, data, run_dir / "pipeline", steps, options.num_images)
    return {
        "stock": {"psnr": autoencoder["psnr"], "rfd": autoencoder.get("rfd"), "fd": of_stock["fd"]},
        "ours": {
            **of_ours,
            **{key.removeprefix("validation_"): value for key, value in measured.items()},
            "seconds": {stage: noted[stage].get("seconds") for stage in ("autoencoder", "unet")},
            "steps": {stage: noted[stage]["finished_at"] for stage in ("autoencoder", "unet")},
        },
        "fd_over_stock": of_ours["fd"] / of_stock["fd"],
    }


def folder_of(keys: list[str]) -> str:
    """The name of a folder for these further keys."""
    kept = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in " ".join(keys))
    return "ours" + (f"-{kept.strip('-')}" if kept else "")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--keys", type=shlex.split, default=[])
    parser.add_argument("--minutes", type=float, nargs=2, default=[10, 15])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--sets_dir", type=Path, default=Path("outputs/sets"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options = parser.parse_args(argv)
    results: dict[str, dict] = {}
    for name in options.sets:
        results[name] = compare(name, options, ["--config", options.config, *options.keys])
        print(name, json.dumps(results[name]), flush=True)
        ratios = [figures["fd_over_stock"] for figures in results.values()]
        result = {
            "command": "python benchmarks/benchmark_recipes.py " + shlex.join(argv),
            "device": f"cpu, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "results": results,
            "geometric_mean_of_fd_over_stock": float(np.exp(np.mean(np.log(ratios)))),
        }
        write_json(options.json, result)
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
