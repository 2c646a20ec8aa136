"""Forecasts for a GPU that is not here: from counted FLOPs and bytes, and shares of the peak that we assume.

What we assume is what we measured on one H100 with the networks of `configs/celebahq_256.yaml` (docs/results/gpu/),
compiled by torch.compile and not. A step takes the time of its kernels, or that of starting them if it is longer. Other
cards are assumed to reach the same share of their peak while kernels run.
"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig
from latent_ddpm.data.latents import record_type
from latent_ddpm.errors import UserError
from latent_ddpm.planning.counting import (
    GIB,
    count_autoencoder,
    count_unet,
    largest_batch,
)
from latent_ddpm.planning.forecast import chapter_steps, checkpoints_of_chapters, times_due, units_of_run
from latent_ddpm.planning.rehearsal import images_per_step, phases_of

NORMALIZATION_IMAGES = 10_000  # as in train_autoencoder.py
PNG_BYTES = 2  # of a pixel in a grid, about
# Of the peak, while kernels run, for each stage; keyed by whether torch_compile is on: third-throughput.json, and the
# kernels of the stock recipe there.
SHARES = {True: {"autoencoder": 0.35, "unet": 0.30}, False: {"autoencoder": 0.16, "unet": 0.16}}
# Seconds of a step for each parameter tensor, below which no network gets, because its kernels have to be started. With
# the slow cores of our machine, compiled: 0.129 s for the U-Net of configs/celebahq_256.yaml (0.126 s measured),
# 0.096 s for that of configs/image_folder_64.yaml (as measured). Not compiled: 0.172 s for the first.
START_WITH_SLOW_CORES = {True: 0.3e-3, False: 0.4e-3}
FAST_CORES = 1 / 3  # of that time, assumed
START_SECONDS = 30.0  # of a stage: imports, opening the data, the first kernels
COMPILE_SECONDS = 100.0  # of a stage with torch_compile: 60 to 140 s were measured


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as people say it.
        memory_gib: GiB, as on the data sheet.
        tflops: dense peak of the matrix units in 1e12 operations per second, with 16-bit inputs and float32 sums.
        precision: the value of mixed_precision that has this peak.
    """

    name: str
    memory_gib: int
    tflops: float
    precision: str = "bf16"


CARDS = {
    card.name: card
    for card in (
        # NVIDIA, Ampere GA102 GPU architecture (white paper), RTX 3090: 71 for BF16 and FP16 with FP32 sums
        Card("RTX 3090", 24, 71),
        # NVIDIA, Ada GPU architecture (white paper), RTX 4090: 165.2 for BF16
        Card("RTX 4090", 24, 165.2),
        # NVIDIA, L4 Tensor Core GPU data sheet: 242 with sparsity, half of it without
        Card("L4", 24, 121),
        # NVIDIA, T4 data sheet: 65 mixed precision (FP16/FP32); Turing has no BF16
        Card("T4", 16, 65, "fp16"),
        # NVIDIA, A10 data sheet: 125 for BF16, 250 with sparsity
        Card("A10", 24, 125),
        # NVIDIA, V100 data sheet: 125 for the SXM2 module; Volta has no BF16
        Card("V100-16", 16, 125, "fp16"),
        Card("V100-32", 32, 125, "fp16"),
        # NVIDIA, A100 data sheet: 312 for BF16, 624 with sparsity
        Card("A100-40", 40, 312),
        Card("A100-80", 80, 312),
        # NVIDIA, L40S data sheet: 362.05 for BF16, 733 with sparsity
        Card("L40S", 48, 362.05),
        # NVIDIA, H100 data sheet, SXM: 1,979 with sparsity, half of it without
        Card("H100", 80, 989.5),
        # NVIDIA, H200 data sheet, SXM: as the H100, with 141 GB
        Card("H200", 141, 989.5),
        # NVIDIA, HGX B200 data sheet: 36 PFLOP/s of 8 GPUs with sparsity, so 4.5 each, and half of it without
        Card("B200", 180, 2250),
    )
}


def card_of(name: str) -> Card:
    """The card of a name such as "H100" or "rtx4090".

    Raises:
        UserError: there is no such card.
    """
    plain = {_plain(known): card for known, card in CARDS.items()}
    plain |= {"a100": CARDS["A100-80"], "v100": CARDS["V100-16"]}
    wanted = _plain(name).removeprefix("nvidia").removesuffix("gb")
    if wanted in plain:
        return plain[wanted]
    nearest = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.4)
    hint = f" Did you mean {plain[nearest[0]].name}?" if nearest else ""
    raise UserError(f"--device {name} is neither cpu, cuda nor one of {', '.join(CARDS)}.{hint}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def share_of(config: RunConfig) -> float:
    """The share of the peak that a stage is assumed to reach while kernels run."""
    return SHARES[config.torch_compile != "off"]["unet" if isinstance(config, UNetConfig) else "autoencoder"]


def count_stage(config: RunConfig, autoencoder: AutoencoderConfig | Path) -> dict[str, Any]:
    """The counted figures of a stage; see latent_ddpm/planning/counting.py.

    Stage 1 is counted twice if its discriminator starts late: `without_discriminator` holds the FLOPs of an image
    before it.
    """
    if isinstance(config, UNetConfig):
        return count_unet(config, autoencoder, config.gradient_checkpointing)
    assert isinstance(config, AutoencoderConfig)
    figures = count_autoencoder(config)
    without = figures
    if config.disc_weight > 0 and config.disc_start > 0:
        without = count_autoencoder(dataclasses.replace(config, disc_weight=0.0, equivariance_share=0.0))
    return figures | {"without_discriminator": without["flops_per_image"]}


def stage_flops(config: RunConfig, figures: dict[str, Any], images: dict[str, int], encoder_flops: float) -> dict:
    """Floating-point operations of a stage by part, and its optimizer steps.

    Args:
        config: of the stage, in steps.
        figures: from `count_stage`.
        images: train, validation, versions.
        encoder_flops: of encoding one image.
    """
    units = units_of_run(config, images | {"decoded": 0, "normalization": NORMALIZATION_IMAGES})
    batch, forward = images_per_step(config), figures["forward_flops_per_image"]
    steps, flops = 0.0, {}
    for numbers in phases_of(config).values():
        late = isinstance(config, UNetConfig) or config.disc_weight == 0 or numbers.start >= config.disc_start
        per_image = figures["flops_per_image"] if late else figures["without_discriminator"]
        steps += len(numbers) * (batch * per_image + figures["flops_per_optimizer_step"])
    flops["steps"] = steps
    if isinstance(config, AutoencoderConfig):
        flops["evaluation"] = forward * (units["evaluation"] + units["last evaluation"] + 32 * units["grid"])
        flops["normalization"] = encoder_flops * units["normalization"]
    else:
        passes = config.num_inference_steps * (2 if config.guidance_scale != 1 else 1)
        flops["evaluation"] = forward * units["evaluation"]
        flops["grid"] = units["grid"] * (passes * forward + encoder_flops)  # a decoder is as large as its encoder
        flops["encode"] = units["encode"] * encoder_flops
        for name, equivalent in chapter_steps(config).items():
            flops[name] = equivalent * batch * figures["flops_per_image"]
    return flops


def forecast_on_card(
    card: Card, config: RunConfig, figures: dict[str, Any], images: dict[str, int], encoder_flops: float, gpus: int = 1
) -> dict[str, Any]:
    """The forecast of a stage on a card, as `forecast_stage` makes it from a rehearsal.

    Args:
        card: the card.
        config: of the stage, in steps.
        figures: from `count_stage`.
        images: train, validation, versions.
        encoder_flops: of encoding one image.
        gpus: number of cards, each with a process; the exchange of gradients takes no time.

    Returns:
        The same keys. `seconds` is the time with cores as slow as ours; `seconds_with_fast_cores` that with cores which
        start kernels three times as fast.
    """
    stage = "unet" if isinstance(config, UNetConfig) else "autoencoder"
    flops = stage_flops(config, figures, images, encoder_flops)
    starts = config.max_train_steps * config.gradient_accumulation_steps * figures["parameter_tensors"]
    starts *= 4 / 3 if config.gradient_checkpointing else 1
    times, slow = {}, START_WITH_SLOW_CORES[config.torch_compile != "off"]
    for name, start in (("seconds", slow), ("seconds_with_fast_cores", slow * FAST_CORES)):
        parts = {part: value / (card.tflops * 1e12 * share_of(config)) for part, value in flops.items()}
        for part in (
            parts.keys() - {"steps", "grid", *chapter_steps(config)} - ({"evaluation"} if stage == "unet" else set())
        ):
            parts[part] /= gpus  # the others are of each process, or of the first one alone
        parts["steps"] = max(parts["steps"], starts * start)
        for chapter, equivalent in chapter_steps(config).items():
            parts[chapter] = equivalent * parts["steps"] / config.max_train_steps
        if "grid" in parts:
            calls = times_due(config, config.validation_steps) * config.num_inference_steps
            parts["grid"] = max(parts["grid"], calls * figures["parameter_tensors"] * start / 3)
        parts["start and end"] = START_SECONDS + (COMPILE_SECONDS if config.torch_compile != "off" else 0)
        times[name] = {part: value for part, value in parts.items() if value}
    batch, train = gpus * images_per_step(config), images["train"]
    per_step = times["seconds"]["steps"] / config.max_train_steps
    starting = times["seconds"]["steps"] > 1.01 * times["seconds_with_fast_cores"]["steps"]
    memory = figures["fixed_bytes"] + max(
        config.train_batch_size * figures["bytes_per_image"], figures["optimizer_step_bytes"], figures["drawing_bytes"]
    )
    return {
        "steps": config.max_train_steps,
        "images_per_step": batch,
        "training_images": train,
        "validation_images": images["validation"],
        "epochs": config.max_train_steps * batch / train,
        "images_per_second": batch / per_step,
        "seconds_per_step": per_step,
        "seconds_per_epoch": train / batch * per_step,
        "seconds": sum(times["seconds"].values()),
        "seconds_with_fast_cores": sum(times["seconds_with_fast_cores"].values()),
        "parts": times["seconds"],
        "waits_for_kernels_to_start": starting,
        "flops": sum(flops.values()),
        "device_memory_bytes": memory,
        "device_bytes": card.memory_gib * GIB,
    }


def disk_on_card(
    configs: dict[str, RunConfig], figures: dict[str, dict[str, Any]], images: dict[str, int]
) -> dict[str, int]:
    """Bytes of a run's folder at its end, as `forecast_disk` makes them from a rehearsal."""
    disk, largest = {"checkpoints": 0}, 0
    for stage, config in configs.items():
        weights = 4 * figures[stage]["parameters"]
        averages = len(config.ema_sigma_rels) if isinstance(config, UNetConfig) else 1
        size = (1 + averages) * weights + figures[stage]["moments_bytes"]
        size += 3 * figures[stage].get("discriminator_bytes", 0)
        kept = min(config.checkpoints_total_limit, times_due(config, config.checkpointing_steps))
        disk["checkpoints"] += kept * size
        largest = max(largest, size)
        pixels = config.image_channels * config.resolution**2
        drawn = config.num_validation_samples if isinstance(config, UNetConfig) else 64
        grids = times_due(config, config.validation_steps)
        disk["samples"] = disk.get("samples", 0) + grids * drawn * pixels * PNG_BYTES // 3
        if isinstance(config, UNetConfig):
            snapshots = units_of_run(config, images | {"decoded": 0})["snapshot"]
            disk["snapshots of averages"] = snapshots * averages * weights // 2
            disk["pipeline"] = weights + 4 * figures["autoencoder"]["parameters"]
            of_chapters, size = checkpoints_of_chapters(config, weights)
            disk |= of_chapters
            largest = max(largest, size)
            if config.few_step_training_steps:
                disk["pipeline-few-steps"] = disk["pipeline"]
        else:
            disk["autoencoder"] = weights
    any_config, total = next(iter(configs.values())), images["train"] + images["validation"]
    decoded = total * any_config.resolution**2 * any_config.image_channels
    if decoded <= any_config.image_cache_gib * GIB:
        disk["decoded images"] = decoded
    if "unet" in configs:
        shape = (images["versions"], *images["latent_shape"])
        disk["latents"] = images["train"] * record_type(shape).itemsize
        disk["latents"] += images["validation"] * record_type((1, *images["latent_shape"])).itemsize
    disk["while a checkpoint is written"] = largest
    return {name: int(size) for name, size in disk.items() if size}


def fitting_batch(config: RunConfig, figures: dict[str, Any], memory_gib: float) -> tuple[int, int] | None:
    """The largest micro-batch that fits and divides the images of a step: train_batch_size and accumulation steps.

    Args:
        config: of the stage.
        figures: from `count_stage`.
        memory_gib: GiB of the card.

    Returns:
        None if not even one image fits.
    """
    counts = (figures["fixed_bytes"], figures["bytes_per_image"], figures["optimizer_step_bytes"], memory_gib)
    most, whole = largest_batch(*counts), images_per_step(config)
    fitting = [size for size in range(1, min(most, whole) + 1) if whole % size == 0]
    return (fitting[-1], whole // fitting[-1]) if fitting else None


def latent_shape(config: AutoencoderConfig) -> tuple[int, int, int]:
    """(D, h, w) of a latent."""
    side = config.resolution // 2 ** (len(config.block_out_channels) - 1)
    return config.latent_channels, side, side
