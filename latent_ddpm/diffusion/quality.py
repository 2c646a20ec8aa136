"""The distance of sampled latents to those of a dataset, in the features of the run's own U-Net.

It serves to choose between settings of one run, without another network. scripts/evaluate.py measures models.
"""

import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.conditions import Given, unet_inputs
from latent_ddpm.diffusion.noise_schedule import noise_levels
from latent_ddpm.diffusion.objective import add_noise
from latent_ddpm.diffusion.unet import StockUNet
from latent_ddpm.random import Stream, normal

FEATURE_TIME = 0.1  # of the noise at which features are taken


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
