"""Check the forecasts of scripts/plan_run.py against real runs.

    python benchmarks/check_plan.py --case digits --json docs/results/scale/plan-digits.json

Plans a run of minutes on this machine and runs both training scripts, all confined to one core. Compares time, memory
and disk: the forecast, what was measured, and forecast over measured. `processor_seconds` leave out the waiting for the
core, so they agree also where other programs come and go; `cores_of_others` tells how much these used. Cases:

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
from latent_ddpm.system import peak_resident_bytes
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "unet")
LAUNCHER = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCHER += ["--dynamo_backend", "no", "--mixed_precision", "no"]
EVERY = {"mixed_precision": "no", "torch_compile": "off", "dataloader_num_workers": 0}
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
    content = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
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
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def train(stage: str, config: Path, output_dir: Path) -> dict[str, float]:
    """Run a training script as `accelerate launch` does; returns its time and memory.

    Returns:
        seconds; processor_seconds; memory_bytes, the largest resident memory; cores_of_others, that programs beside it
        used.
    """
    words = [*LAUNCHER, f"train_{stage}.py", "--config", str(config), "--output_dir", str(output_dir)]
    begun, busy = time.monotonic(), busy_seconds()
    with (output_dir.parent / f"{stage}.log").open("w", encoding="utf-8") as log:
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
        raise UserError(f"train_{stage}.py failed: {Path(log.name).read_text(encoding='utf-8')[-2000:]}")
    worked = used.ru_utime + used.ru_stime
    others = max(0.0, busy_seconds() - busy - worked) / seconds
    return {"seconds": seconds, "processor_seconds": worked, "memory_bytes": peak, "cores_of_others": others}


def plan(config: Path, output_dir: Path, seconds: float) -> dict[str, Any]:
    """The plan of scripts/plan_run.py, and how long making it took."""
    result = output_dir.parent / "plan.json"
    words = ["scripts/plan_run.py", "--config", str(config), "--output_dir", str(output_dir), "--json", str(result)]
    begun = time.monotonic()
    subprocess.run([sys.executable, *words, "--seconds", str(seconds)], cwd=ROOT, check=True)
    return json.loads(result.read_text(encoding="utf-8")) | {"took": time.monotonic() - begun}


def busy_seconds() -> float:
    """Seconds that the processors of this machine have worked since it started."""
    times = psutil.cpu_times()
    return times.user + times.system


def compare(forecast: float, measured: float) -> dict[str, float]:
    """Forecast, measured, and their ratio."""
    return {"forecast": forecast, "measured": measured, "ratio": forecast / measured}


def check(case: str, data: Path, seconds: float) -> dict[str, Any]:
    """Plan and run; returns the comparison."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, output_dir = write_config(case, folder, data), folder / "runs" / "run"
        output_dir.parent.mkdir()
        made = plan(config, output_dir, seconds)
        if list(output_dir.parent.iterdir()) != [output_dir.parent / "plan.json"]:
            raise UserError("planning has left files")
        real = {stage: train(stage, config, output_dir) for stage in STAGES}
        folders = {"latents": "latents", "decoded images": "cache", "snapshots of averages": "ema"}
        folders |= {"checkpoints": "checkpoints", "samples": "samples"}
        kinds = {kind: bytes_in(output_dir / path) for kind, path in folders.items()}
        disk = bytes_in(output_dir)
    forecast_disk = {k: v for k, v in made["disk_bytes"].items() if k != "while a checkpoint is written"}
    by_kind = {kind: compare(forecast_disk.get(kind, 0), of_run) for kind, of_run in kinds.items() if of_run}

    def stages(key: str) -> dict[str, dict[str, float]]:
        return {stage: compare(made["stages"][stage][key], real[stage][key]) for stage in STAGES}

    def with_total(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        return found | {"total": compare(*(sum(found[stage][k] for stage in STAGES) for k in ("forecast", "measured")))}

    return {
        "seconds": with_total(stages("seconds")),
        "processor_seconds": with_total(stages("processor_seconds")),
        "memory_bytes": stages("memory_bytes"),
        "disk_bytes": compare(sum(forecast_disk.values()), disk),
        "disk_bytes_by_kind": by_kind,
        "planning_seconds": made["took"],
        "cores_of_others": {"planning": made["cores_of_others"], **{s: real[s]["cores_of_others"] for s in STAGES}},
        "parts_of_forecast": {stage: made["stages"][stage]["parts"] for stage in STAGES},
    }


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
