"""The mathematics of stage 2 as pure functions: what the U-Net sees, what it has to say, how errors weigh.

Notation of arXiv 2202.00512: z_t = alpha_t x + sigma_t eps with alpha_t^2 + sigma_t^2 = 1.
"""

import torch
from diffusers import DDPMScheduler

from latent_ddpm.config import UNetConfig
from latent_ddpm.random import Stream, integers


def make_noise_scheduler(config: UNetConfig) -> DDPMScheduler:
    """The training schedule as a stock diffusers scheduler, from which all others can be made."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        clip_sample=False,  # latents of unit variance leave [-1, 1]
    )


def _like(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return values.to(images.device, images.dtype).view(-1, *[1] * (images.ndim - 1))


def add_noise(
    clean: torch.Tensor, noise: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """z_t = alpha_t x + sigma_t eps (arXiv 2006.11239, eq. 4).

    Args:
        clean: latents (B, D, H, W) of unit variance.
        noise: standard normal, same shape.
        alphas_cumprod: (T,), alpha_t^2.
        timesteps: int64 (B,) in [0, T).
    """
    alpha_squared = alphas_cumprod[timesteps.to(alphas_cumprod.device)]
    return _like(alpha_squared.sqrt(), clean) * clean + _like((1 - alpha_squared).sqrt(), clean) * noise


def target(
    clean: torch.Tensor,
    noise: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """What the U-Net is to predict; arguments as for `add_noise`.

    epsilon: the noise. sample: the clean latents. v_prediction: alpha_t eps - sigma_t x (arXiv 2202.00512, app. D).
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "v_prediction":
        alpha_squared = alphas_cumprod[timesteps.to(alphas_cumprod.device)]
        return _like(alpha_squared.sqrt(), clean) * noise - _like((1 - alpha_squared).sqrt(), clean) * clean
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def loss_weight(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, prediction_type: str, snr_gamma: float | None
) -> torch.Tensor:
    """Weight (B,) of each example's squared error.

    With snr_gamma: min-SNR (arXiv 2303.09556, section 3.4), which is min(SNR, gamma) on the error of the clean
    latents, hence min(SNR, gamma) / SNR on epsilon's and / (SNR + 1) on v's. Without: 1.
    """
    if snr_gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    alpha_squared = alphas_cumprod.to(timesteps.device)[timesteps].clamp(1e-8, 1 - 1e-8)
    snr = alpha_squared / (1 - alpha_squared)
    scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    return snr.clamp_max(snr_gamma) / scale


def sample_timesteps(seed: int, numbers: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    """A timestep for each example number: int64 (B,) in [0, num_train_timesteps), spread as timestep_sampling says.

    A Weyl sequence with the golden ratio's fraction: any stretch of consecutive example numbers, so every batch of
    every process, covers (0, 1) evenly. (The aim of the low-discrepancy sampler of arXiv 2107.00630, appendix
    I.1, without a draw that the batch shares.) The quantile function of the distribution then takes it to times:
    for logit_normal a standard normal variable through the logistic function (arXiv 2403.03206, section 3.1).
    """
    start = int(integers(seed, Stream.TIMESTEP, torch.zeros(1, dtype=torch.int64), 2**31 - 1)[0])
    fraction = (numbers * 0x9E3779B9 + 2 * start) & 0xFFFFFFFF  # of 2**32
    if config.timestep_sampling == "uniform":
        return (fraction * config.num_train_timesteps) >> 32
    quantile = torch.special.ndtri((fraction.double() + 0.5) / 2**32)
    time = torch.sigmoid(quantile)
    return (time * config.num_train_timesteps).long().clamp(max=config.num_train_timesteps - 1)
