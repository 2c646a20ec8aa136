"""The distance of sampled latents to those of a dataset, in the features of the run's own U-Net.

It serves to choose between settings of one run, without another network. scripts/evaluate.py measures models.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.conditions import Given, unet_inputs
from latent_ddpm.diffusion.noise_schedule import noise_levels, noise_table
from latent_ddpm.diffusion.objective import add_noise
from latent_ddpm.diffusion.unet import StockUNet
from latent_ddpm.progress import progress_bar
from latent_ddpm.random import Stream, normal
from latent_ddpm.training.acceleration import uncompiled
from latent_ddpm.training.distributed import all_gather_rows, process_count, process_index

FEATURE_TIME = 0.1  # of the noise at which features are taken
SWEEP_IMAGES, SWEEP_BATCH = 512, 64

Draw = Callable[[torch.Tensor, Given], torch.Tensor]  # from standard normal noise (B, D, h, w) to latents
Setting = TypeVar("Setting")


def gaussian_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Frechet distance of two sets of features, as normal distributions (arXiv 1706.08500, equation 6).

    Args:
        first, second: (N, C) and (M, C).
    """
    first, second = first.double(), second.double()
    of_first, of_second = torch.cov(first.T), torch.cov(second.T)
    # the trace of (A B)^(1/2) is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2)
    values, vectors = torch.linalg.eigh(of_first)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ of_second @ root).clamp_min(0).sqrt().sum()
    means = (first.mean(0) - second.mean(0)).square().sum()
    return float(means + of_first.trace() + of_second.trace() - 2 * cross)


@torch.no_grad()
def latent_features(
    unet: StockUNet,
    clean: torch.Tensor,
    numbers: torch.Tensor,
    given: Given,
    config: UNetConfig,
    alphas_cumprod: torch.Tensor | None,
) -> torch.Tensor:
    """Features of latents: the output of the U-Net's middle block, averaged over the positions.

    A little noise is added first, the same for the same number, because the U-Net knows noisy latents only. The
    features of diffusion models at low noise tell kinds of images apart (arXiv 2112.03126).

    Args:
        unet: the U-Net.
        clean: latents (B, D, h, w), on its device.
        numbers: int64 (B,), of the noise, on its device.
        given: their conditioning, on its device.
        config: config of the run.
        alphas_cumprod: (T,), the diffusion's table; None for a flow.

    Returns:
        float32 (B, C) on the CPU.
    """
    kept: list[torch.Tensor] = []
    hook = unet.mid_block.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        times = torch.full((len(clean),), FEATURE_TIME, dtype=torch.float64, device=clean.device)
        timesteps, alpha, sigma = noise_levels(times, config, alphas_cumprod)
        noise = normal(config.seed, Stream.SAMPLE, numbers, clean.shape[1:])
        inputs, words = unet_inputs(add_noise(clean, noise, alpha, sigma), given)
        unet(inputs, timesteps, **words)
    finally:
        hook.remove()
    return kept[0].float().mean((2, 3)).cpu()


@torch.no_grad()
def compare_draws(
    draws: dict[Setting, Draw],
    unet: StockUNet,
    reals: Callable[[torch.Tensor], tuple[torch.Tensor, Given]],
    config: UNetConfig,
    device: torch.device,
) -> dict[Setting, float]:
    """How far samples are from real latents with each of several settings; call it in every process.

    The same initial noise is used with every setting. The processes share the work.

    Args:
        draws: how samples are drawn, by setting.
        unet: the U-Net whose features are compared.
        reals: real latents (B, D, h, w) and their conditioning, on the device, for int64 numbers (B,) from 0 on.
        config: config of the run.
        device: of the networks.

    Returns:
        The distance by setting, the same in every process.
    """
    table = noise_table(config)
    table = table if table is None else table.to(device)
    per_round = SWEEP_BATCH * process_count()
    of_reals, found = [], {setting: [] for setting in draws}
    with uncompiled():
        starts = range(0, SWEEP_IMAGES, per_round)
        for start in progress_bar(starts, "comparing", unit="round", disable=process_index() > 0, leave=False):
            numbers = start + SWEEP_BATCH * process_index() + torch.arange(SWEEP_BATCH)
            clean, given = reals(numbers)
            numbers = numbers.to(device)
            noise = normal(config.seed, Stream.SWEEP, numbers, clean.shape[1:])
            drawn = [(found[setting], draw(noise, given)) for setting, draw in draws.items()]
            for kept, latents in ((of_reals, clean), *drawn):
                features = latent_features(unet, latents, numbers, given, config, table)
                kept.append(all_gather_rows(features.to(device)).cpu())
    real = torch.cat(of_reals)
    return {setting: gaussian_distance(torch.cat(features), real) for setting, features in found.items()}
