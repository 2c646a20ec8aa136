"""From what a rehearsal measured to the whole run: seconds, bytes of memory and bytes on the disk."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig
from latent_ddpm.diffusion.few_steps import passes_of_few_steps, with_matching
from latent_ddpm.diffusion.self_guidance import SWEEP_IMAGES, SWEEP_SCALES, SWEEP_STEPS
from latent_ddpm.planning.rehearsal import images_per_step, phases_of


def times_due(config: RunConfig, every: int) -> int:
    """How often a run does what is due every so many steps, and at the last one."""
    return math.ceil(config.max_train_steps / every)


def units_of_run(config: RunConfig, images: dict[str, int]) -> dict[str, float]:
    """How many units of each part the whole run has, by the names in latent_ddpm/planning/rehearsal.py.

    Args:
        config: of the stage, in steps.
        images: numbers of images, from the rehearsal.
    """
    validations, train, held_out = times_due(config, config.validation_steps), images["train"], images["validation"]
    units = {
        "trial": 0,
        "decode": images["decoded"],
        "checkpoint": times_due(config, config.checkpointing_steps),
        "export": 1,
    }
    if isinstance(config, AutoencoderConfig):
        units |= {"evaluation": (validations - 1) * held_out, "last evaluation": held_out, "grid": validations}
        batch = config.train_batch_size
        return units | {"normalization": min(train, batch * math.ceil(images["normalization"] / batch))}
    assert isinstance(config, UNetConfig)
    snapshots = config.ema_snapshots and times_due(config, math.ceil(config.max_train_steps / config.ema_snapshots))
    return units | {
        "encode": images["versions"] * train + held_out,
        "conditions": train + held_out,
        "evaluation": validations * held_out,
        "grid": validations * config.num_validation_samples,
        "validation": validations,
        "snapshot": snapshots,
    }


def chapter_steps(config: RunConfig) -> dict[str, float]:
    """How many steps of the first chapter of stage 2 take as long as each of its other chapters, by passes of a U-Net.

    A step of the first chapter is three passes over its images: forward, and backward for activations and weights.

    Args:
        config: of the stage, in steps.
    """
    if not isinstance(config, UNetConfig):
        return {}
    guided = 1 if config.conditions and config.guidance_scale != 1 else 0
    teachers = 1 + guided + (config.self_guidance_scale != 1)
    tried = 0.0
    if config.self_guidance_steps and config.self_guidance_scale == "auto":
        per_scale = [1 + guided + (scale != 1) for scale in SWEEP_SCALES]
        tried = SWEEP_IMAGES * (SWEEP_STEPS * sum(per_scale) + len(SWEEP_SCALES) + 1) / 3 / images_per_step(config)
    found = {"self-guidance": config.self_guidance_steps * (3 + teachers) / 3 + tried}
    again = 0 if config.self_guidance_steps else guided
    found["few steps"] = config.few_step_training_steps * passes_of_few_steps(config, 1 + again) / 3
    return {name: steps for name, steps in found.items() if steps}


def seconds_per_unit(samples: list[dict[str, float]], clock: str = "seconds") -> float:
    """Of a part, from its samples; the first one is left out where it is not the only one, because it is slower."""
    later = samples[1:] or samples
    units = sum(sample["units"] for sample in later)
    return sum(sample[clock] for sample in later) / units if units else 0.0


def forecast_seconds(config: RunConfig, found: dict[str, Any], clock: str = "seconds") -> dict[str, float]:
    """Seconds of each part of a stage.

    Args:
        config: of the stage, in steps.
        found: what the rehearsal wrote, and both times of the whole process as `process`.
        clock: "seconds", or "processor_seconds", which leave out the waiting for a processor or a disk.

    Returns:
        "start and end" (imports, opening the data, networks, and what is slower the first time), "steps", and each part
        of `units_of_run`.
    """
    units = units_of_run(config, found["images"])
    parts, accounted = {}, 0.0
    for name, samples in found["events"].items():
        each = seconds_per_unit(samples, clock)
        accounted += each * sum(sample["units"] for sample in samples) if units.get(name, 1) else 0.0
        accounted += 0.0 if units.get(name, 1) else sum(sample[clock] for sample in samples)
        parts[name] = each * units[name]
    steps, rates = 0.0, {name: phase[clock] for name, phase in found["phases"].items()}
    for name, numbers in phases_of(config).items():
        # a phase that a rehearsal of fewer steps has not reached has the time of the last one
        rate = rates.get(name, list(rates.values())[-1])
        steps += rate * len(numbers)
    accounted += sum(phase[clock] * phase["rehearsed"] for phase in found["phases"].values())
    for name, equivalent in chapter_steps(config).items():
        parts[name] = equivalent * list(rates.values())[-1]
    accounted += found["stops"] * list(rates.values())[-1]
    once = max(0.0, found["process"][clock] - accounted)
    return {"start and end": once, "steps": steps} | {name: value for name, value in parts.items() if value}


def forecast_stage(config: RunConfig, found: dict[str, Any]) -> dict[str, Any]:
    """The forecast of a stage without its disk: time, speed, epochs and memory.

    Returns:
        seconds of the stage, of its parts, of a step and of an epoch; images per second; epochs; bytes of memory.
    """
    seconds = forecast_seconds(config, found)
    batch, train = images_per_step(config), found["images"]["train"]
    per_step = seconds["steps"] / config.max_train_steps
    resident = found["peak_bytes"] + max(0, found["mapped_bytes_of_run"] - found["mapped_bytes"])
    return {
        "steps": config.max_train_steps,
        "images_per_step": batch,
        "training_images": train,
        "validation_images": found["images"]["validation"],
        "epochs": config.max_train_steps * batch / train,
        "images_per_second": batch / per_step,
        "seconds_per_step": per_step,
        "seconds_per_epoch": train / batch * per_step,
        "seconds": sum(seconds.values()),
        "parts": seconds,
        "memory_bytes": resident,
        "device_memory_bytes": found["device_peak_bytes"],
        "device_bytes": found["device_bytes"],
        "processor_seconds": sum(forecast_seconds(config, found, "processor_seconds").values()),
    }


def fitting_share(seconds: Callable[[float], float], limit: float) -> float:
    """The largest share of a run's steps whose time is within a limit.

    Args:
        seconds: of the run with that share of its steps; rises with it.
        limit: seconds.

    Returns:
        0 where even a run of hardly any steps takes longer.
    """
    low, high = 0.0, 1.0
    if seconds(1e-6) > limit:
        return 0.0
    while seconds(high) <= limit and high < 1e6:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if seconds(middle) <= limit else (low, middle)
    return low


# ------------------------------------------------------------------------------------------------------- the disk


def bytes_in(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def checkpoints_of_chapters(config: UNetConfig, weights: int) -> tuple[dict[str, int], int]:
    """Bytes of the checkpoints of the chapters after the first one, by kind, and of the largest one.

    Args:
        config: of stage 2, in steps.
        weights: bytes of the U-Net's weights.
    """
    trained = 1 + with_matching(config)
    kinds, largest = {}, 0
    for name, steps, networks in (
        ("self-guidance", config.self_guidance_steps, 1),
        ("few steps", config.few_step_training_steps, trained),
    ):
        kept = min(config.checkpoints_total_limit, math.ceil(steps / config.checkpointing_steps))
        size = (3 * networks + 1) * weights  # each network with two moments, and one average
        kinds[f"checkpoints, {name}"] = kept * size
        largest = max(largest, size if steps else 0)
    return kinds, largest


def forecast_disk(folder: Path, configs: dict[str, RunConfig], found: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Bytes of a run's folder at its end, by kind.

    Args:
        folder: of the rehearsal.
        configs: of the rehearsed stages, by "autoencoder" and "unet".
        found: what the rehearsals wrote.

    Returns:
        Bytes by kind; "while a checkpoint is written" is what is needed for a moment beside the others.
    """
    disk = {"decoded images": _decoded_bytes(folder / "cache", found), "checkpoints": 0, "samples": 0}
    largest, metrics = 0, folder / "metrics.jsonl"
    lines = [json.loads(line) | {"bytes": len(line) + 1} for line in metrics.read_text(encoding="utf-8").splitlines()]
    disk["metrics"] = 0
    for stage, config in configs.items():
        kept = min(config.checkpoints_total_limit, times_due(config, config.checkpointing_steps))
        size = max(map(bytes_in, (folder / "checkpoints").glob(f"{stage}-*")))
        disk["checkpoints"] += kept * size
        largest = max(largest, size)
        pictures = sorted((folder / "samples").glob(f"{stage}-*.png"))
        validations = times_due(config, config.validation_steps)
        disk["samples"] += int(validations * statistics.mean(map(bytes_in, pictures)))
        own = [line for line in lines if line["stage"] == stage]
        of_loss = [line["bytes"] for line in own if "loss" in line]
        others = sum(line["bytes"] for line in own if "loss" not in line) / max(1, len(pictures))
        logged = statistics.mean(of_loss) * times_due(config, config.logging_steps)
        disk["metrics"] += int(logged + others * validations)
    if "unet" in configs:
        unet, images = configs["unet"], found["unet"]["images"]
        disk["samples"] += bytes_in(folder / "samples" / "film_strip.png")
        units = units_of_run(unet, images)
        encoded = sum(sample["units"] for sample in found["unet"]["events"]["encode"])
        disk["latents"] = int(bytes_in(folder / "latents") * units["encode"] / encoded)
        files = list((folder / "ema").glob("*.safetensors"))
        if files:
            of_one_time = statistics.mean(map(bytes_in, files)) * len(unet.ema_sigma_rels)
            disk["snapshots of averages"] = int(units["snapshot"] * of_one_time)
        weights = bytes_in(folder / "pipeline" / "unet")
        of_chapters, size = checkpoints_of_chapters(unet, weights)
        disk |= of_chapters
        largest = max(largest, size)
        if unet.few_step_training_steps:
            disk["pipeline-few-steps"] = bytes_in(folder / "pipeline")
    for name in ("autoencoder", "pipeline"):
        if (folder / name).exists():
            disk[name] = bytes_in(folder / name)
    disk["while a checkpoint is written"] = largest
    return {name: size for name, size in disk.items() if size}


def _decoded_bytes(cache: Path, found: dict[str, dict[str, Any]]) -> int:
    """Bytes of the decoded images of the run, from those of the rehearsal."""
    here = sum(sample["units"] for stage in found.values() for sample in stage["events"].get("decode", ()))
    in_run = sum(stage["images"]["decoded"] for stage in found.values())
    folders = [path for path in cache.glob("images-*") if path.is_dir()] if cache.exists() else []
    return int(sum(map(bytes_in, folders)) * in_run / here) if here else 0
