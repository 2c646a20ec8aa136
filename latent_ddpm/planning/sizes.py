"""`auto_sizes`: choose networks, batch size and learning rate by the images, the time and the speed of the machine.

Networks form a ladder. A larger one is better than a smaller one only after a number of training images, its
`least_images`, because it sees fewer of them in the same time. So the choice climbs the ladder: it times some training
steps of the next network, and takes it if that many images fit the time. docs/which-recipe.md is the rule in words and
docs/results/recipes/ what it was measured on.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from latent_ddpm.autoencoder.losses import reconstruction_loss
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig, changed, keys_to_size
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.errors import UserError
from latent_ddpm.planning.minutes import seconds_of_stage
from latent_ddpm.training.acceleration import set_layout
from latent_ddpm.training.optim import clip_gradients, make_optimizer

logger = logging.getLogger(__name__)

TRAINING_SHARE = 0.75  # of a stage's time that goes into the steps; the rest decodes, validates, encodes and exports
TIMED_STEPS, LEAST_TIMED = 3, 0.5  # steps and seconds that a network is timed for, after a first step
MOST_EPOCHS = 1000  # a network that needs more is likely to memorize the images
TRIED_IMAGES, HOPELESS = 4, 0.1  # a network that sees less than that share of its least_images is not timed further
GROUPS = 32  # most groups of a group norm


@dataclasses.dataclass(frozen=True)
class Rung:
    """A network of a ladder.

    Attributes:
        width: channels of its first level.
        least_images: training images that it needs to be better than the rung below it.
        batch: images of an optimizer step.
        layers: residual blocks per level.
    """

    width: int
    least_images: int
    batch: int
    layers: int = 1


AUTOENCODERS = (Rung(16, 0, 16), Rung(32, 50_000, 32), Rung(64, 250_000, 64), Rung(128, 2_000_000, 64))
UNETS = (Rung(64, 0, 64), Rung(128, 400_000, 64, 2), Rung(192, 2_000_000, 128, 2), Rung(256, 8_000_000, 256, 2))
AUTOENCODER_RATE, AUTOENCODER_BATCH, AUTOENCODER_WIDTH = 2e-3, 16, 16  # learning rate for this batch and width
UNET_RATE, UNET_BATCH, UNET_WIDTH = 1.4e-3, 64, 64


def downsampling_of(resolution: int) -> int:
    """The factor between the sides of images and latents: 4 to 32 pixels, then 8; less where it does not divide."""
    most = 4 if resolution <= 32 else 8
    return math.gcd(most, resolution)


def rate_of(rate: float, batch: int, width: int, at_batch: int, at_width: int) -> float:
    """A learning rate for another batch and width: times the root of the batch, over the root of the width."""
    return float(f"{rate * math.sqrt(batch / at_batch) / math.sqrt(width / at_width):.2g}")


def autoencoder_keys(rung: Rung, resolution: int) -> dict[str, Any]:
    """The keys of stage 1 for a rung of AUTOENCODERS.

    Args:
        rung: of the ladder.
        resolution: pixels per side.
    """
    factor = downsampling_of(resolution)
    widths = [rung.width * min(2**level, 4) for level in range(factor.bit_length())]
    return {
        "block_out_channels": widths,
        "norm_num_groups": min(GROUPS, rung.width // 2),
        "latent_channels": max(4, 2 * factor),
        "train_batch_size": rung.batch,
        "learning_rate": rate_of(AUTOENCODER_RATE, rung.batch, rung.width, AUTOENCODER_BATCH, AUTOENCODER_WIDTH),
    }


def unet_keys(rung: Rung, latent_size: int) -> dict[str, Any]:
    """The keys of stage 2 for a rung of UNETS.

    Args:
        rung: of the ladder.
        latent_size: side of the latents.

    Returns:
        Two to four levels, down to 4x4 latents or an odd side; attention from 8x8 down in networks with two blocks per
        level, else from 4x4 down, and in the last level.
    """
    sides = [latent_size]
    while (len(sides) < 2 or (len(sides) < 4 and sides[-1] > 4)) and sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    widths = [rung.width * min(level + 1, 3) for level in range(len(sides))]
    if len(sides) == 2:
        widths = [rung.width, 2 * rung.width]
    attended = [level for level, side in enumerate(sides) if side <= (4 if rung.layers == 1 else 8)]
    return {
        "unet_block_out_channels": widths,
        "unet_layers_per_block": rung.layers,
        "unet_attention_levels": attended or [len(sides) - 1],
        "unet_attention_head_dim": 32,
        "unet_norm_num_groups": 32,
        "train_batch_size": rung.batch,
        "learning_rate": rate_of(UNET_RATE, rung.batch, rung.width, UNET_BATCH, UNET_WIDTH),
    }


# ------------------------------------------------------------------------------------------------------- measuring


def seconds_of_step(step: Callable[[], None], device: torch.device) -> float:
    """Seconds of a training step: the fastest of some, after one that allocates the memory."""

    def timed() -> float:
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    timed()
    times = [timed()]
    while len(times) < TIMED_STEPS or sum(times) < LEAST_TIMED:
        times.append(timed())
    return min(times)


def autoencoder_step(config: AutoencoderConfig, accelerator: Accelerator) -> Callable[[], None]:
    """A step of stage 1 on random pixels, without the perceptual and adversarial losses."""
    device = accelerator.device
    autoencoder = Autoencoder(config).to(device)
    autoencoder.plain = config.quantizer != "kl"  # without codes, which cost little
    set_layout(autoencoder, config, device)
    optimizer = make_optimizer(autoencoder.parameters(), config, config.learning_rate, config.optimizer)
    shape = (config.train_batch_size, config.image_channels, config.resolution, config.resolution)
    images, numbers = torch.rand(shape, device=device) * 2 - 1, torch.arange(shape[0], device=device)

    def step() -> None:
        with accelerator.autocast():
            output = autoencoder(images, numbers)
            loss = reconstruction_loss(output.reconstruction.float(), images, config.reconstruction_loss)
        _train(loss + output.quantized.loss(config), optimizer, config)

    return step


def unet_step(config: UNetConfig, latent_shape: tuple[int, int], accelerator: Accelerator) -> Callable[[], None]:
    """A step of stage 2 on random latents, without conditions."""
    device, (channels, side) = accelerator.device, latent_shape
    unet = make_unet(config, channels, side).to(device)
    set_layout(unet, config, device)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    latents = torch.randn(config.train_batch_size, channels, side, side, device=device)
    numbers, table = torch.arange(config.train_batch_size, device=device), noise_table(config)
    table = table if table is None else table.to(device)

    def step() -> None:
        batch = training_batch(latents, numbers, config, table)
        with accelerator.autocast():
            predicted = unet(batch.noisy, batch.timesteps).sample
        _train(batch.loss(predicted.float()), optimizer, config)

    return step


def _train(loss: torch.Tensor, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
    optimizer.zero_grad()
    loss.backward()
    clip_gradients(optimizer, config.max_grad_norm)
    optimizer.step()


def climb(
    rungs: Sequence[Rung],
    images_per_second: Callable[[Rung], float],
    seconds: float,
    training_images: Callable[[], int],
) -> Rung:
    """The highest rung whose `least_images` fit the time and the data; it stops at the first one that does not.

    Args:
        rungs: from the smallest network on; the first one is taken in any case.
        images_per_second: training images that a rung sees in a second; called once for each rung but the first, up
            to the first that does not fit.
        seconds: for training steps.
        training_images: of the dataset; called only if the time allows more than the first rung.
    """
    taken = rungs[0]
    for rung in rungs[1:]:
        seen, needed = images_per_second(rung) * seconds, f"{rung.least_images:,}"
        if seen < rung.least_images:
            logger.info("auto_sizes: width %d would see %s images, and needs %s", rung.width, f"{int(seen):,}", needed)
            break
        if rung.least_images > MOST_EPOCHS * training_images():
            logger.info(
                "auto_sizes: width %d needs %s images, more than %d passes over %d images",
                rung.width, needed, MOST_EPOCHS, training_images(),
            )  # fmt: skip
            break
        taken = rung
    return taken


# -------------------------------------------------------------------------------------------------------- choosing


def choose_sizes(
    config: RunConfig,
    accelerator: Accelerator,
    latent_shape: tuple[int, int] | None,
    training_images: Callable[[], int],
) -> dict[str, Any]:
    """The keys that auto_sizes sets; call it in all processes, which are timed together.

    Args:
        config: of a stage, with its time and the keys that were given.
        accelerator: of the run.
        latent_shape: channels and side of the latents of stage 2; None for stage 1.
        training_images: counts the images of the dataset.

    Returns:
        Values for the keys of `keys_to_size`.

    Raises:
        UserError: what was given does not fit the rest.
    """
    processes, device = accelerator.num_processes, accelerator.device

    def in_all(value: float) -> torch.Tensor:
        """The value of each process."""
        return accelerator.gather(torch.tensor([value], dtype=torch.float32, device=device))

    def keys_for(rung: Rung) -> dict[str, Any]:
        if isinstance(config, AutoencoderConfig):
            keys = autoencoder_keys(rung, config.resolution)
        else:
            keys = unet_keys(rung, latent_shape[1])
        keys["train_batch_size"] = max(1, rung.batch // (processes * config.gradient_accumulation_steps))
        return {key: keys[key] for key in keys_to_size(config)}

    def images_per_second(rung: Rung) -> float:
        sized = changed(config, **keys_for(rung))
        sized.validate()
        batch = max(1, rung.batch // processes) if sized.train_batch_size == "auto" else sized.train_batch_size
        rate = 0.0
        first = [min(TRIED_IMAGES, batch)] if device.type == "cpu" else []
        for count in (*first, batch):  # on a CPU, few images tell whether the network is far too slow
            sized.train_batch_size = count
            rate = processes * count / slowest(sized)
            if rate * seconds < HOPELESS * rung.least_images:
                break
        return rate

    def slowest(sized: RunConfig) -> float:
        """Seconds of a step in the slowest process."""
        cuda = device.type == "cuda"
        with torch.random.fork_rng(devices=[device] if cuda else []):
            try:
                if isinstance(sized, AutoencoderConfig):
                    taken = seconds_of_step(autoencoder_step(sized, accelerator), device)
                else:
                    taken = seconds_of_step(unet_step(sized, latent_shape, accelerator), device)
            except torch.OutOfMemoryError:
                taken = math.inf
        if cuda:
            torch.cuda.empty_cache()
        return float(in_all(taken).max())

    stage, rungs = ("autoencoder", AUTOENCODERS) if latent_shape is None else ("unet", UNETS)
    # the same in all processes, also on a machine that does not see the run's folder
    seconds = TRAINING_SHARE * float(in_all(seconds_of_stage(config, stage)).min())
    rung = climb(rungs, images_per_second, seconds, training_images)
    keys = keys_for(rung)
    try:
        changed(config, **keys).validate()
    except UserError as error:
        raise UserError(f"auto_sizes: {error}") from error
    return keys
