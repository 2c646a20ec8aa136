"""`train_minutes`: measure how fast this machine is, then set the steps of a stage so that they fit the time."""

import dataclasses
import math
import os
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latent_ddpm.config import PLANNED_KEYS, AutoencoderConfig, RunConfig, UNetConfig, read_yaml, save_config
from latent_ddpm.errors import UserError
from latent_ddpm.planning.forecast import fitting_share, forecast_seconds
from latent_ddpm.planning.measuring import duration, folder_beside, measure
from latent_ddpm.planning.rehearsal import phases_of
from latent_ddpm.training.plan import Plan
from latent_ddpm.training.tracking import noted_of

LEAST_SECONDS, MOST_SECONDS, SECONDS_SHARE = 15.0, 60.0, 0.06  # of the rehearsal, and as a share of the stage's time
SECONDS_BETWEEN_CHECKPOINTS = 900.0  # what a killed run loses at most
WARMUP_SHARE = 0.1  # of the steps, at most
RECURRING = ("evaluation", "validation", "grid", "checkpoint", "snapshot")  # parts of a forecast
AFTER_THE_STEPS = ("last evaluation", "normalization", "export", "self-guidance", "few steps")
TRIED = 1e-6  # share of the config's steps for "hardly any steps"


def scaled_run(config: RunConfig, share: float) -> RunConfig:
    """The config of a stage with that share of its steps, and what goes with them in proportion.

    The codebook enters after as many steps as in the config, or in proportion where the run is shorter. So it is with
    the steps for which the discriminator trains alone, and with the warm-up.

    Args:
        config: of the stage, in steps.
        share: above 0.
    """
    steps = max(1, round(share * config.max_train_steps))

    def part(value: int) -> int:
        return max(1, round(share * value))

    changes: dict[str, Any] = {key: None for key in PLANNED_KEYS if key.endswith("_images") and hasattr(config, key)}
    changes |= {key: part(getattr(config, key)) for key in ("validation_steps", "checkpointing_steps")}
    changes |= {"max_train_steps": steps, "lr_warmup_steps": min(config.lr_warmup_steps, int(WARMUP_SHARE * steps))}
    if config.lr_decay_steps:
        changes["lr_decay_steps"] = part(config.lr_decay_steps)
    if isinstance(config, AutoencoderConfig):
        start, alone = config.codebook_start, config.disc_adaptive_steps
        changes["codebook_start"] = min(start, int(share * start))
        if config.disc_weight > 0:
            changes["disc_start"] = int(share * config.disc_start)
            changes["disc_ramp_steps"] = int(share * config.disc_ramp_steps)
            changes["disc_adaptive_steps"] = alone if alone is None else min(alone, part(alone))
    else:
        for key in ("self_guidance_steps", "few_step_training_steps"):
            changes[key] = part(getattr(config, key)) if getattr(config, key) else 0
    return dataclasses.replace(config, **changes)


def seconds_of_stage(config: RunConfig, stage: str) -> float:
    """Seconds that a stage may take, from its start to its end.

    Stage 2 gets what stage 1 has left of the time, or where that is not known its own share.
    """
    whole, share = 60.0 * config.minutes, config.autoencoder_time_share
    if stage == "autoencoder":
        return share * whole
    if config.autoencoder is not None:
        return whole
    folder = Path(config.output_dir)
    before = folder / "train_autoencoder.yaml"
    if before.exists():
        saved = read_yaml(before, AutoencoderConfig)
        minutes = saved.get("train_minutes") or 60 * (saved.get("train_hours") or 0)
        taken = noted_of(folder, "autoencoder").get("seconds")
        if taken and math.isclose(minutes, config.minutes):
            return whole - taken
    return (1 - share) * whole


def of_these_processes(found: dict[str, Any], processes: int, on_cpu: bool) -> dict[str, Any]:
    """What a rehearsal of one process measured, for several on one machine.

    On a CPU they share the cores, so a step of as many images in each takes that many times as long. GPUs share out
    what is done once for each image.
    """
    if processes == 1:
        return found
    shared = ("encode", "evaluation", "last evaluation", "normalization")

    def times(values: dict[str, float], factor: float) -> dict[str, float]:
        return values | {key: factor * values[key] for key in ("seconds", "processor_seconds")}

    phases = {name: times(phase, processes if on_cpu else 1) for name, phase in found["phases"].items()}
    events = {
        name: [times(sample, 1 / processes if name in shared and not on_cpu else 1) for sample in samples]
        for name, samples in found["events"].items()
    }
    return found | {"phases": phases, "events": events}


def plan(config: RunConfig, stage: str, accelerator: Accelerator, used: float = 0.0) -> Plan:
    """Rehearse a stage and choose its lengths; call it in the main process alone.

    Args:
        config: of the stage, in steps and with its batch size; its train_minutes or train_hours are set.
        stage: "autoencoder" or "unet".
        accelerator: of the run.
        used: seconds of the stage's time that are spent already.

    Raises:
        UserError: the time is too short for any step, or the rehearsal failed.
    """
    begun = time.monotonic()
    limit = seconds_of_stage(config, stage)
    seconds = min(MOST_SECONDS, max(LEAST_SECONDS, SECONDS_SHARE * limit))
    on_cpu = accelerator.device.type == "cpu"
    with folder_beside(Path(config.output_dir)) as folder:
        precision = accelerator.mixed_precision
        rehearsed = dataclasses.replace(config, train_minutes=None, train_hours=None, mixed_precision=precision)
        rehearsed = dataclasses.replace(rehearsed, images_per_step=None, auto_sizes=False)
        if isinstance(rehearsed, UNetConfig):
            rehearsed.autoencoder = config.autoencoder or str(config.autoencoder_dir)
        save_config(scaled_run(rehearsed, 1.0), folder / "config.yaml")
        words = ["--config", str(folder / "config.yaml")]
        device = "cpu" if on_cpu else "cuda"
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ
        found = measure(stage, rehearsed, words, folder, seconds, {}, device, launched)
    found = of_these_processes(found, accelerator.num_processes, on_cpu)

    def needed(share: float) -> float:
        return sum(forecast_seconds(scaled_run(config, share), found).values())

    left = limit - used - (time.monotonic() - begun)
    share = fitting_share(needed, left)
    if share == 0:
        has, of_first = duration(max(limit, 0)), config.autoencoder_time_share
        of_stage = of_first if stage == "autoencoder" else 1 - of_first
        missing = needed(TRIED) - left
        raise UserError(
            f"{config.minutes:g} minutes are too short: this stage has {has} of them, and starting, "
            f"measuring, decoding, validating and exporting take {duration(limit + missing)}. Set train_minutes above "
            f"{config.minutes + missing / 60 / of_stage:.1f}."
        )
    chosen = scaled_run(config, share)
    parts = forecast_seconds(chosen, found)
    per_step = parts["steps"] / chosen.max_train_steps
    chosen.checkpointing_steps = min(chosen.checkpointing_steps, math.ceil(SECONDS_BETWEEN_CHECKPOINTS / per_step))
    keys = {key: getattr(chosen, key) for key in PLANNED_KEYS if hasattr(chosen, key)}
    recurring = sum(parts.get(name, 0.0) for name in RECURRING) / chosen.max_train_steps
    rates = {name: phase["seconds"] for name, phase in found["phases"].items()}
    last = list(rates.values())[-1]
    phases = [(steps.start, rates.get(name, last) + recurring) for name, steps in phases_of(chosen).items()]
    return Plan(keys, limit, sum(parts.get(name, 0.0) for name in AFTER_THE_STEPS), phases)
