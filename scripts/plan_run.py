"""Plan a run: how long it takes, how much memory, disk and money it needs, and which batch size fits.

    python scripts/plan_run.py --config configs/mnist.yaml
    python scripts/plan_run.py --config configs/NAME.yaml --hours 10 --price 2.5
    python scripts/plan_run.py --config configs/NAME.yaml --device "RTX 4090" --images 30000

Without --device, or with `cpu` or `cuda`, it measures here: both training scripts run with your config and your data,
make some steps of each phase, validate, write checkpoints and export, in a temporary folder that is removed at the end
(beside output_dir, because disks differ). That takes about --seconds (60). With a card's name it computes from FLOPs
and bytes, and says what it assumes.

--hours says what fits that many hours, --price (of a GPU and hour) what it costs. For a card, --images N is the number
of images where the data is not here, and --gpus N the number of cards. --json FILE writes the plan. Takes the keys of
both training scripts. The run is one from the start; scripts/evaluate.py is not part of it. output_dir, the Hub and
trackers stay untouched.
"""

import argparse
import dataclasses
import importlib
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from latent_ddpm.config import (
    AutoencoderConfig,
    RunConfig,
    UNetConfig,
    in_steps,
    keys_to_size,
    parse_config,
    same_batch,
)
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.planning import measuring
from latent_ddpm.planning.measuring import NAMES, duration, folder_beside
from latent_ddpm.training.launch import of_stage, run

ROOT = Path(__file__).resolve().parent.parent
LEAST_SHARE = 0.9  # of the memory, that a plan may fill
GIB = 2**30


# -------------------------------------------------------------------------------------------------- command line


def configs_of(words: Sequence[str], processes: int = 1) -> dict[str, RunConfig]:
    """The configs of the stages that the run has, in steps; a given autoencoder leaves stage 2 alone.

    A train_batch_size of auto stays, and so do the lengths of its stage.

    Raises:
        UserError: as `parse_config`.
    """
    unet = parse_config(UNetConfig, of_stage(words, "unet"))
    if unet.streaming:
        raise UserError(
            "streaming reads the whole dataset before the first step, so there is nothing to measure in a minute. Plan "
            "with --streaming false and a part of the data, or with a card's name for --device and --images."
        )
    configs: dict[str, RunConfig] = {}
    if unet.autoencoder is None:
        configs["autoencoder"] = parse_config(AutoencoderConfig, of_stage(words, "autoencoder"))
    configs["unet"] = unet
    if any(keys_to_size(config) for config in configs.values()):
        raise UserError(
            "With auto_sizes, a run chooses its networks when it starts, and takes train_minutes. Start it: then the "
            "configs that it saves in output_dir can be planned with."
        )
    for name, config in configs.items():
        if config.train_batch_size != "auto":
            configs[name] = in_steps(same_batch(config, None, processes), processes)
    return configs


# ----------------------------------------------------------------------------------------------------- measuring


def measure(
    stage: str, config: RunConfig, words: Sequence[str], folder: Path, seconds: float, decode: dict, device: str | None
) -> dict[str, Any]:
    """`measuring.measure` for a command line of both stages."""
    return measuring.measure(stage, config, of_stage(words, stage), folder, seconds, decode, device)


def rehearse_here(words: list[str]) -> int:
    """The other process: `--rehearse ABOUT` and the command line of the training script."""
    from latent_ddpm.planning.rehearsal import rehearse  # not needed for a card

    about = json.loads(words[0])
    threading.Thread(target=end_with, args=(about["parent"], Path(about["result"]).parent), daemon=True).start()
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(f"train_{about['stage']}")
    return rehearse(script, about["stage"], words[1:], about["seconds"], about["decode"], Path(about["result"]))


def end_with(parent: int, folder: Path) -> None:
    """End this process and remove its temporary folder when the process that measures has been killed."""
    while psutil.pid_exists(parent):
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def busy_seconds() -> float:
    """Seconds that the processors of this machine have worked since it started."""
    times = psutil.cpu_times()
    return times.user + times.system


def measured_plan(
    configs: dict[str, RunConfig], words: Sequence[str], seconds: float, device: str | None
) -> tuple[dict[str, Any], Callable[[str, RunConfig], float]]:
    """Rehearse the stages here; returns the plan, and the seconds of a stage with another config."""
    from latent_ddpm.planning.forecast import forecast_disk, forecast_seconds, forecast_stage

    found: dict[str, dict[str, Any]] = {}
    decode: dict[str, int] = {}
    begun, busy_before = time.monotonic(), busy_seconds()
    with folder_beside(Path(configs["unet"].output_dir)) as folder:
        for number, (stage, config) in enumerate(list(configs.items())):
            print(f"{NAMES[stage]}: measuring ...", file=sys.stderr, flush=True)
            left = (seconds - (time.monotonic() - begun)) / (len(configs) - number)
            budget = max(left, 0.25 * seconds)
            found[stage] = measure(stage, config, words, folder, budget, decode, device)
            decode = found[stage]["decode"]
            sizes = {key: found[stage][key] for key in ("train_batch_size", "gradient_accumulation_steps")}
            configs[stage] = in_steps(dataclasses.replace(config, **sizes), 1)  # which may have been auto
        disk = forecast_disk(folder / "run", configs, found)
    taken, busy = time.monotonic() - begun, busy_seconds() - busy_before
    own = sum(stage["process"]["processor_seconds"] for stage in found.values())
    plan = {
        "device": found["unet"]["device"],
        "measured": True,
        "measuring_seconds": taken,
        "cores_of_others": max(0.0, busy - own) / taken,
        "threads": found["unet"]["threads"],
        "waited": found["unet"]["device_peak_bytes"] is None and busy - own > 0.1 * taken * (os.cpu_count() or 1),
        "stages": {stage: forecast_stage(config, found[stage]) for stage, config in configs.items()},
        "disk_bytes": disk,
    }
    return plan, lambda stage, config: sum(forecast_seconds(config, found[stage]).values())


# ----------------------------------------------------------------------------------------------------- computing


def number_of_images(config: RunConfig, given: int | None) -> tuple[int, int]:
    """Training and held-out images.

    Raises:
        UserError: the data is not here, and no number is given.
    """
    from latent_ddpm.data.sources.splits import open_sources

    if given is not None:
        held_out = min(config.max_validation_images, max(1, round(config.validation_fraction * given)))
        return given - held_out, held_out
    try:
        with tempfile.TemporaryDirectory() as name:
            train, held_out = open_sources(dataclasses.replace(config, output_dir=name))
            return len(train), len(held_out)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')}. If the data is not here, give --images N.") from error


def fitted(stage: str, config: RunConfig, figures: dict[str, Any], card: Any, gpus: int) -> RunConfig:
    """The config with the largest train_batch_size that fits, in the place of auto.

    Raises:
        UserError: none fits, or the images of a step cannot be shared out.
    """
    from latent_ddpm.planning.cards import fitting_batch

    share, rest = divmod(config.images_per_step, gpus)
    fits = fitting_batch(dataclasses.replace(config, train_batch_size=max(1, share)), figures, card.memory_gib)
    if rest or fits is None:
        why = f"images_per_step {config.images_per_step} is no multiple of {gpus}" if rest else "not one image fits"
        raise UserError(f"{NAMES[stage]}: {why}.")
    return dataclasses.replace(config, train_batch_size=fits[0], gradient_accumulation_steps=fits[1])


def computed_plan(
    configs: dict[str, RunConfig], words: Sequence[str], device: str, images: int | None, gpus: int
) -> tuple[dict[str, Any], Callable[[str, RunConfig], float]]:
    """Count the stages for a card; returns the plan, and the seconds of a stage with another config."""
    from latent_ddpm.autoencoder.stock import autoencoder_folder  # slow to import
    from latent_ddpm.planning import cards

    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    card = cards.card_of(device)
    train, held_out = number_of_images(configs["unet"], images)
    other_precision = {config.mixed_precision for config in configs.values()} != {card.precision}
    for stage, config in configs.items():
        configs[stage] = dataclasses.replace(config, mixed_precision=card.precision)
    unet = configs["unet"]
    autoencoder = configs.get("autoencoder") or autoencoder_folder(unet)
    figures = {stage: cards.count_stage(config, autoencoder) for stage, config in configs.items()}
    if isinstance(autoencoder, AutoencoderConfig):
        encoder, shape = figures["autoencoder"], cards.latent_shape(autoencoder)
        encoder = {"encoder_flops": encoder["forward_flops_per_image"] / 2, **encoder}
    else:
        encoder, shape = cards.count_pretrained(autoencoder, unet), cards.latents_of_pretrained(autoencoder, unet)
    for stage, config in configs.items():
        if config.train_batch_size == "auto":
            configs[stage] = in_steps(fitted(stage, config, figures[stage], card, gpus), gpus)
    counts: dict[str, Any] = {"train": train, "validation": held_out}
    counts |= {"versions": 2 if configs["unet"].random_flip else 1, "latent_shape": shape}

    def stage_plan(stage: str, config: RunConfig) -> dict[str, Any]:
        return cards.forecast_on_card(card, config, figures[stage], counts, encoder["encoder_flops"], gpus)

    plan = {
        "device": card.name,
        "gpus": gpus,
        "measured": False,
        "tflops": card.tflops,
        "precision": card.precision,
        "other_precision": other_precision,
        "compiled": {stage: config.torch_compile != "off" for stage, config in configs.items()},
        "shares_of_peak": {stage: cards.share_of(config) for stage, config in configs.items()},
        "stages": {stage: stage_plan(stage, config) for stage, config in configs.items()},
        "disk_bytes": cards.disk_on_card(configs, figures | {"autoencoder": encoder}, counts),
    }
    for stage, config in configs.items():
        fits = cards.fitting_batch(config, figures[stage], card.memory_gib)  # the images of a step on each GPU
        plan["stages"][stage]["fitting_batch"] = fits
    return plan, lambda stage, config: stage_plan(stage, config)["seconds"]


# ------------------------------------------------------------------------------------------------------- proposal


def scaled(config: RunConfig, share: float) -> RunConfig:
    """The config with that share of its steps, at least one."""
    return dataclasses.replace(config, max_train_steps=max(1, round(share * config.max_train_steps)))


def proposal(
    configs: dict[str, RunConfig], seconds: Callable[[str, RunConfig], float], hours: float
) -> dict[str, Any] | None:
    """The steps of each stage that fit the hours, with the ratio of the config; None if nothing fits."""
    from latent_ddpm.planning.forecast import fitting_share

    def whole(share: float) -> float:
        return sum(seconds(stage, scaled(config, share)) for stage, config in configs.items())

    share = fitting_share(whole, 3600 * hours)
    if share == 0:
        return None
    chosen = {stage: scaled(config, share) for stage, config in configs.items()}
    late = {}
    autoencoder = chosen.get("autoencoder")
    if isinstance(autoencoder, AutoencoderConfig):
        begins = {"codebook_start": autoencoder.codebook_start}
        begins |= {"disc_start": autoencoder.disc_start} if autoencoder.disc_weight > 0 else {}
        late = {key: round(share * step) for key, step in begins.items() if step and share < 1}
    return {
        "hours": hours,
        "share_of_config": share,
        "max_train_steps": {stage: config.max_train_steps for stage, config in chosen.items()},
        "seconds": {stage: seconds(stage, config) for stage, config in chosen.items()},
        "in_proportion": late,
    }


# --------------------------------------------------------------------------------------------------------- report


def size(count: float) -> str:
    """Bytes as "3.2 GiB", "14 MiB" or "3 KiB"."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1024:.0f} KiB"


def money(seconds: float, price: float | None) -> str:
    """ ", which costs 12.40", or nothing without a price per hour."""
    return "" if price is None else f", which costs {seconds / 3600 * price:.2f}"


def report_stage(stage: str, config: RunConfig, figures: dict[str, Any], price: float | None) -> list[str]:
    """The sentences about a stage."""
    low = figures.get("seconds_with_fast_cores")
    faster = low and low < 0.99 * figures["seconds"]
    between = f" ({duration(low)} with cores that start kernels three times as fast)" if faster else ""
    steps = figures["steps"]
    shown = [(name, value) for name, value in figures["parts"].items() if value >= 0.001 * figures["seconds"]]
    lines = [
        f"{NAMES[stage]}: {duration(figures['seconds'])}{money(figures['seconds'], price)}{between}.",
        f"  {steps} steps of {figures['images_per_step']} images, {figures['epochs']:.1f} epochs of "
        f"{figures['training_images']} images.",
        f"  {figures['images_per_second']:.4g} images/s, {figures['seconds_per_step']:.3g} s a step, "
        f"{duration(figures['seconds_per_epoch'])} an epoch.",
        "  Time: " + ", ".join(f"{name} {duration(value)}" for name, value in shown) + ".",
    ]
    if figures.get("waits_for_kernels_to_start"):
        lines.append("  Starting the kernels takes longer than running them: a faster card would not help.")
    device, resident = figures["device_memory_bytes"], figures.get("memory_bytes")
    total = figures["device_bytes"]
    needed = device or resident
    where = "of the GPU" if device else "of this machine"
    fits = "fits" if needed <= LEAST_SHARE * total else "does not fit"
    batch = config.train_batch_size
    memory = f"  Memory: {size(needed)} {where}'s {size(total)}, with train_batch_size {batch}: {fits}."
    if device and resident:
        memory += f" The process takes {size(resident)} beside it."
    lines.append(memory)
    if "fitting_batch" in figures:
        lines.append("  " + batch_sentence(config, figures["fitting_batch"]))
    elif fits == "does not fit":
        lines.append("  Halve train_batch_size and double gradient_accumulation_steps.")
    return lines


def batch_sentence(config: RunConfig, fitting: tuple[int, int] | None) -> str:
    """Which train_batch_size fits, with the images per step of the config."""
    if fitting is None:
        saving = "" if config.gradient_checkpointing else " Try gradient_checkpointing true, or a smaller network."
        return f"Not even one image at a time fits.{saving}"
    batch, accumulation = fitting
    if (batch, accumulation) == (config.train_batch_size, config.gradient_accumulation_steps):
        return "The config's train_batch_size is the largest that keeps the images of a step."
    return (
        f"Largest that fits with as many images in a step: --train_batch_size {batch} "
        f"--gradient_accumulation_steps {accumulation}."
    )


def report(plan: dict[str, Any], configs: dict[str, RunConfig], price: float | None) -> str:
    """The plan in sentences."""
    lines = []
    if plan["measured"]:
        lines.append(f"Measured here ({plan['device']}) in {duration(plan['measuring_seconds'])}.")
        if plan["waited"]:
            lines.append(
                f"Meanwhile other programs used {plan['cores_of_others']:.1f} of {os.cpu_count()} cores; the times are "
                "those of a machine that stays as busy."
            )
    else:
        percent = ", ".join(f"{stage} {100 * share:.0f} %" for stage, share in plan["shares_of_peak"].items())
        count = f"{plan['gpus']} times" if plan["gpus"] > 1 else "one"
        peak = f"{plan['tflops']:g} TFLOP/s, dense {plan['precision']}"
        compiled = {True: "compiled", False: "not compiled"}
        lines += [
            f"Computed for {count} {plan['device']} ({peak}), not measured.",
            f"Assumed share of the peak while kernels run: {percent}.",
            "It was measured on one H100 with the networks of configs/celebahq_256.yaml, "
            + ", ".join(f"{stage} {compiled[value]}" for stage, value in plan["compiled"].items())
            + ".",
            "A step takes at least the time in which slow cores start its kernels.",
            "Decoding of images, disks and the exchange of gradients are assumed to keep up.",
        ]
        if plan["other_precision"]:
            lines.append(
                f"That needs --mixed_precision {plan['precision']}, which the config does not have."
                + (" Stage 1 cannot accumulate gradients in fp16." if plan["precision"] == "fp16" else "")
            )
    for stage, config in configs.items():
        lines += ["", *report_stage(stage, config, plan["stages"][stage], price)]
    disk = dict(plan["disk_bytes"])
    beside = disk.pop("while a checkpoint is written")
    lines += [
        "",
        f"Disk: {size(sum(disk.values()))} at the end, and {size(beside)} more while a checkpoint is written.",
        "  " + ", ".join(f"{name} {size(value)}" for name, value in disk.items()) + ".",
        f"Together: {duration(plan['seconds'])}{money(plan['seconds'], price)}.",
    ]
    work = sum(figures.get("processor_seconds", 0) for figures in plan["stages"].values())
    if plan.get("waited"):
        threads = plan["threads"]
        lines.append(f"Without the waiting for other programs: about {duration(work / threads)}.")
    if "proposal" in plan:
        lines += ["", *report_proposal(plan, price)]
    return "\n".join(lines)


def report_proposal(plan: dict[str, Any], price: float | None) -> list[str]:
    """The sentences about what fits the hours."""
    found, hours = plan["proposal"], plan["hours"]
    if found is None:
        return [f"Nothing fits {hours:g} hours: starting, preparing the data and the last validation take longer."]
    steps = found["max_train_steps"]
    total = sum(found["seconds"].values())
    lines = [
        f"What fits {hours:g} hours, with the config's ratio of both stages ({found['share_of_config']:.3g} times its "
        f"steps, {duration(total)}{money(total, price)}):",
        *(f"  train_{stage}: --max_train_steps {count}" for stage, count in steps.items()),
    ]
    if found["in_proportion"]:
        keys = " ".join(f"--{key} {value}" for key, value in found["in_proportion"].items())
        lines.append(f"  To keep the proportions of stage 1, also {keys}.")
    return lines


def main(argv: list[str]) -> int:
    if argv[:1] == ["--rehearse"]:
        return rehearse_here(argv[1:])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hours", type=float)
    parser.add_argument("--device")
    parser.add_argument("--price", type=float)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--images", type=int)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--json", type=Path)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options, rest = parser.parse_known_args(argv)
    except SystemExit as error:
        raise UserError("see the message above") from error
    for name in ("hours", "price", "seconds", "images", "gpus"):
        value = getattr(options, name)
        if value is not None and not value > 0:  # NaN is not, either
            raise UserError(f"--{name} is {value:g}; it must be greater than 0.")
    if options.images == 1:
        raise UserError("--images is 1; it must be at least 2, because one image is held out.")
    configs = configs_of(rest, options.gpus)
    if options.device in (None, "cpu", "cuda"):
        if options.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "There is no GPU here. Give a card's name for --device, or leave it out to measure the CPU."
            )
        if options.images is not None or options.gpus > 1:
            raise UserError("--images and --gpus are for a card's name; here one process is measured on your images.")
        plan, seconds = measured_plan(configs, rest, options.seconds, options.device)
    else:
        plan, seconds = computed_plan(configs, rest, options.device, options.images, options.gpus)
    plan["seconds"] = sum(figures["seconds"] for figures in plan["stages"].values())
    if options.price is not None:
        plan["price"] = options.price
        options.price *= options.gpus
        plan["cost"] = plan["seconds"] / 3600 * options.price
    if options.hours is not None:
        plan["hours"] = options.hours
        plan["proposal"] = proposal(configs, seconds, options.hours)
    print(report(plan, configs, options.price))
    if options.json is not None:
        command = shlex.join(["python", "scripts/plan_run.py", *argv])
        write_json(options.json, {"command": command} | plan)
    return 0


if __name__ == "__main__":
    run(main)
