"""Check the forecasts of scripts/plan_run.py against real runs.

    python benchmarks/check_plan.py --case digits --json docs/results/scale/plan-digits.json

Plans a run of minutes on this machine, runs both training scripts, and plans again. Compares time, memory and disk:
the forecast, what was measured, and forecast over measured. Everything is confined to one core, so that other programs
disturb it less. The second forecast shows how much they do. `processor_seconds` compares the times without the waiting
for the core: each time is multiplied by the share of the core that the process had. Cases:

    digits    `configs/mnist.yaml`, fewer steps
    cifar10   `configs/cifar10.yaml`, narrower, on a part of CIFAR-10 (--data, a parquet file)
    folder    `configs/image_folder_64.yaml`, narrower and without LPIPS, on a folder of JPEG files made from --data
    crops     the same with other networks: fsq, AdamW, gradient checkpointing, random crops of larger files
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
import yaml
from PIL import Image

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.planning.forecast import bytes_in
from latent_ddpm.planning.rehearsal import peak_resident_bytes
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "unet")
LAUNCHER = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCHER += ["--dynamo_backend", "no", "--mixed_precision", "no"]
EVERY = {"mixed_precision": "no", "dataloader_num_workers": 0}
# the changes of each case to its config, by section; "" holds the common keys
CASES: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "digits": (
        "mnist",
        {
            "train_autoencoder": {"max_train_steps": 300, "validation_steps": 75, "checkpointing_steps": 75},
            "train_unet": {"max_train_steps": 400, "validation_steps": 100, "checkpointing_steps": 100},
        },
    ),
    "cifar10": (
        "cifar10",
        {
            "": {"image_column": "image", **EVERY},
            "train_autoencoder": {
                "block_out_channels": [16, 32, 32], "norm_num_groups": 8, "train_batch_size": 32, "codebook_start": 60,
                "max_train_steps": 240, "validation_steps": 80, "checkpointing_steps": 80,
            },
            "train_unet": {
                "unet_block_out_channels": [32, 64], "train_batch_size": 64, "max_train_steps": 400,
                "validation_steps": 200, "checkpointing_steps": 200,
            },
        },
    ),
    "folder": (
        "image_folder_64",
        {
            "": EVERY,
            "train_autoencoder": {
                "block_out_channels": [16, 32, 32], "norm_num_groups": 8, "quantizer": "kl", "codebook_start": 0,
                "lpips_weight": 0, "disc_start": 60, "disc_adaptive_steps": 30, "disc_ramp_steps": 20,
                "disc_channels": 16, "train_batch_size": 16, "max_train_steps": 180, "validation_steps": 90,
                "checkpointing_steps": 60,
            },
            "train_unet": {
                "unet_block_out_channels": [32, 64, 64], "unet_attention_head_dim": 32, "train_batch_size": 32,
                "max_train_steps": 300, "validation_steps": 150, "checkpointing_steps": 150,
            },
        },
    ),
    "crops": (
        "image_folder_64",
        {
            "": {**EVERY, "center_crop": False, "random_flip": False},
            "train_autoencoder": {
                "block_out_channels": [24, 32, 48], "norm_num_groups": 8, "quantizer": "fsq", "latent_channels": 4,
                "fsq_levels": [8, 8, 8, 4], "codebook_start": 40, "lpips_weight": 0, "disc_weight": 0,
                "optimizer": "adamw", "learning_rate": 5e-4, "train_batch_size": 16, "max_train_steps": 160,
                "validation_steps": 50, "checkpointing_steps": 100,
            },
            "train_unet": {
                "unet_block_out_channels": [32, 64, 96], "unet_attention_head_dim": 32, "optimizer": "adamw",
                "learning_rate": 4e-4, "gradient_checkpointing": True, "train_batch_size": 16,
                "gradient_accumulation_steps": 2, "max_train_steps": 240, "validation_steps": 100,
                "checkpointing_steps": 60, "ema_sigma_rels": [0.1],
            },
        },
    ),
}  # fmt: skip
ROWS = {"cifar10": 4000, "folder": 1600, "crops": 1000}
SIDES = {"folder": 80, "crops": 160}


def write_config(case: str, folder: Path, data: Path) -> Path:
    """Write a case's config, with its data beside it; returns its path."""
    name, changes = CASES[case]
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    content |= changes.get("", {})
    for section in ("train_autoencoder", "train_unet"):
        content[section] = {**content[section], "lr_warmup_steps": 10, **changes[section]}
    if case in ROWS:
        table = datasets.Dataset.from_parquet(str(data), cache_dir=str(folder / "hub")).select(range(ROWS[case]))
    if case == "cifar10":
        table.to_parquet(folder / "part.parquet")
        content["dataset_name"] = str(folder / "part.parquet")
    elif case in SIDES:
        content["train_data_dir"] = str(folder / "photos")
        for number, row in enumerate(table):
            path = folder / "photos" / f"class-{row['label']}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = row["image"].resize((SIDES[case], SIDES[case]), Image.Resampling.BICUBIC)
            image.save(path, quality=92)
    path = folder / f"{case}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def train(stage: str, config: Path, output_dir: Path) -> dict[str, float]:
    """Run a training script as `accelerate launch` does; returns its time, memory and share of the cores.

    Returns:
        seconds; memory_bytes, the largest resident memory; cores, seconds of the processor per second.
    """
    words = [*LAUNCHER, f"train_{stage}.py", "--config", str(config), "--output_dir", str(output_dir)]
    begun = time.monotonic()
    with (output_dir.parent / f"{stage}.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        peak, ended = 0, 0
        while not ended:
            for running in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(OSError, TypeError, psutil.Error):  # it has just ended
                    peak = max(peak, peak_resident_bytes(running.pid))
            time.sleep(0.1)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
    seconds = time.monotonic() - begun
    if status:
        raise UserError(f"train_{stage}.py failed: {Path(log.name).read_text()[-2000:]}")
    return {"seconds": seconds, "memory_bytes": peak, "cores": (used.ru_utime + used.ru_stime) / seconds}


def plan(config: Path, output_dir: Path, seconds: float) -> dict[str, Any]:
    """The plan of scripts/plan_run.py, and how long making it took."""
    result = output_dir.parent / "plan.json"
    words = ["scripts/plan_run.py", "--config", str(config), "--output_dir", str(output_dir), "--json", str(result)]
    begun, load = time.monotonic(), os.getloadavg()[0]
    subprocess.run([sys.executable, *words, "--seconds", str(seconds)], cwd=ROOT, check=True)
    return json.loads(result.read_text()) | {"took": time.monotonic() - begun, "load_before": load}


def compare(forecast: float, measured: float) -> dict[str, float]:
    """Forecast, measured, and their ratio."""
    return {"forecast": forecast, "measured": measured, "ratio": forecast / measured}


def check(case: str, data: Path, seconds: float) -> dict[str, Any]:
    """Plan, run and plan again; returns the comparison."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, output_dir = write_config(case, folder, data), folder / "runs" / "run"
        output_dir.parent.mkdir()
        first = plan(config, output_dir, seconds)
        if output_dir.exists():
            raise UserError("planning has made the output folder")
        real = {stage: train(stage, config, output_dir) for stage in STAGES}
        kinds = {
            "checkpoints": bytes_in(output_dir / "checkpoints"),
            "latents": bytes_in(output_dir / "latents"),
            "decoded images": bytes_in(output_dir / "cache"),
            "snapshots of averages": bytes_in(output_dir / "ema"),
            "samples": bytes_in(output_dir / "samples"),
        }
        disk = bytes_in(output_dir)
        again = plan(config, folder / "runs" / "other", seconds)
    forecast_disk = {k: v for k, v in first["disk_bytes"].items() if k != "while a checkpoint is written"}
    times = {stage: compare(first["stages"][stage]["seconds"], real[stage]["seconds"]) for stage in STAGES}
    times["total"] = compare(first["seconds"], sum(figures["seconds"] for figures in real.values()))
    after = {stage: again["stages"][stage]["seconds"] / real[stage]["seconds"] for stage in STAGES}
    after["total"] = again["seconds"] / sum(figures["seconds"] for figures in real.values())
    work = {
        stage: compare(
            first["stages"][stage]["seconds"] * first["stages"][stage]["cores"],
            real[stage]["seconds"] * real[stage]["cores"],
        )
        for stage in STAGES
    }
    work["total"] = compare(*(sum(work[stage][key] for stage in STAGES) for key in ("forecast", "measured")))
    memory = {stage: compare(first["stages"][stage]["memory_bytes"], real[stage]["memory_bytes"]) for stage in STAGES}
    return {
        "time_seconds": times,
        "time_ratio_of_second_forecast": after,
        "processor_seconds": work,
        "memory_bytes": memory,
        "disk_bytes": compare(sum(forecast_disk.values()), disk),
        "disk_bytes_by_kind": {kind: compare(forecast_disk.get(kind, 0), of_run) for kind, of_run in kinds.items()
                               if of_run},
        "planning_seconds": [first["took"], again["took"]],
        "cores_of_forecast": {stage: first["stages"][stage]["cores"] for stage in STAGES},
        "cores_of_run": {stage: real[stage]["cores"] for stage in STAGES},
        "cores_of_others": [first["cores_of_others"], again["cores_of_others"]],
        "load_before": [first["load_before"], again["load_before"]],
        "parts_of_forecast": {stage: first["stages"][stage]["parts"] for stage in STAGES},
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10/train.parquet"))
    parser.add_argument("--seconds", type=float, default=60.0, help="for a plan")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # which the processes inherit
    found = check(options.case, options.data, options.seconds)
    command = shlex.join(["python", "benchmarks/check_plan.py", *argv])
    write_json(options.json, {"command": command, "case": options.case, "cpus": os.cpu_count()} | found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
