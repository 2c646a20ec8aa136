"""The training objective: sampled times, noisy latents, prediction targets (epsilon, x0, v, flow), SNR weights."""

import dataclasses

import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.noise_schedule import MAX_SNR, noise_levels
from latent_ddpm.random import Stream, first_words, normal, uniform

# ---------------------------------------------------------------------------------------- noise, target, weight


def _like(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return values.to(images.device, images.dtype).view(-1, *[1] * (images.ndim - 1))


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Noisy latents z = alpha x + sigma eps (arXiv 2006.11239, eq. 4; arXiv 2209.03003, eq. 1).

    Args:
        clean: latents (B, D, H, W) of unit variance.
        noise: standard normal, of the same shape.
        alpha, sigma: (B,), from `noise_levels`.
    """
    return _like(alpha, clean) * clean + _like(sigma, clean) * noise


def target(
    clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """The prediction target of the U-Net; arguments as in `add_noise`.

    epsilon: the noise. sample: the clean latents. v_prediction: alpha eps - sigma x (arXiv 2202.00512, app. D).
    flow_prediction: the velocity eps - x (arXiv 2209.03003, eq. 1, towards the noise).

    Raises:
        ValueError: another prediction_type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean
    if prediction_type == "v_prediction":
        return _like(alpha, clean) * noise - _like(sigma, clean) * clean
    if prediction_type == "flow_prediction":
        return noise - clean
    raise ValueError(f"unknown prediction_type {prediction_type!r}")


def loss_weight(
    alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str, weighting: str, snr_gamma: float = 5.0
) -> torch.Tensor:
    """Weight (B,) of each example's squared error.

    A weighting is defined on the error of the clean latents. The error of the prediction target is a multiple of it.

    Args:
        alpha, sigma: (B,), from `noise_levels`.
        prediction_type: as in `target`.
        weighting: "uniform": 1 on the prediction target. "min_snr": min(SNR, snr_gamma) on the clean latents (arXiv
            2303.09556, section 3.4). "edm": SNR + 1 on the clean latents, which is 1 on the output of EDM's
            preconditioned network (arXiv 2206.00364, eq. 8, with data of unit variance).
        snr_gamma: maximum SNR of "min_snr".
    """
    if weighting == "uniform":
        return torch.ones_like(alpha)
    snr = (alpha / sigma.clamp_min(1e-8)).square().clamp(1 / MAX_SNR, MAX_SNR)
    on_clean = {"min_snr": snr.clamp_max(snr_gamma), "edm": snr + 1}[weighting]
    scale = {
        "epsilon": 1 / snr,
        "sample": torch.ones_like(snr),
        "v_prediction": 1 / (snr + 1),
        "flow_prediction": sigma.square(),
    }[prediction_type]
    return on_clean * scale


# ------------------------------------------------------------------------------------------------------- times


def sample_times(seed: int, numbers: torch.Tensor, config: UNetConfig) -> torch.Tensor:
    """A time for each example number: float64 (B,) in [0, 1), distributed by timestep_sampling.

    `uniform` draws them independently. `stratified` is a Weyl sequence with the golden ratio's fraction: consecutive
    example numbers, and so every batch of every process, cover (0, 1) evenly. It has the purpose of the low-discrepancy
    sampler of arXiv 2107.00630, appendix I.1, but no draw shared by the batch. `logit_normal` applies to that sequence
    the quantile function of the logistic of a normal variable (arXiv 2403.03206, section 3.1).
    """
    if config.timestep_sampling == "uniform":
        return uniform(seed, Stream.TIMESTEP, numbers).double()
    start = (first_words(seed, Stream.TIMESTEP, 0)[0] * (2**31 - 1)) >> 32
    fraction = ((numbers * 0x9E3779B9 + 2 * start) & 0xFFFFFFFF).double() * 2.0**-32
    if config.timestep_sampling == "stratified":
        return fraction
    quantile = torch.special.ndtri(fraction + 2.0**-33)
    return torch.sigmoid(config.logit_mean + config.logit_std * quantile).clamp(max=1 - 2.0**-40)


# ----------------------------------------------------------------------------------------------- a batch to train on


@dataclasses.dataclass
class TrainingBatch:
    """The inputs, targets and loss weights of a training step of stage 2.

    Attributes:
        noisy: (B, D, H, W), noisy latents.
        timesteps: (B,), timesteps of the U-Net.
        wanted: (B, D, H, W), prediction targets.
        weight: (B,), weights of the squared errors.
        level: (B,), noise levels sigma / alpha.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    wanted: torch.Tensor
    weight: torch.Tensor
    level: torch.Tensor

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        """Weighted mean squared error of a prediction (B, D, H, W) of any float dtype; scalar."""
        error = (prediction.float() - self.wanted).square().flatten(1).mean(1)  # (B,)
        return (self.weight * error).mean()


def training_batch(
    clean: torch.Tensor, numbers: torch.Tensor, config: UNetConfig, alphas_cumprod: torch.Tensor | None
) -> TrainingBatch:
    """Add noise to latents. Time and noise of an example follow from the seed and its number.

    Args:
        clean: latents (B, D, H, W) of unit variance.
        numbers: int64 (B,), the example numbers, on the same device.
        config: config of the run.
        alphas_cumprod: (T,), the diffusion's table; None for a flow.
    """
    noise = normal(config.seed, Stream.NOISE, numbers, clean.shape[1:])
    timesteps, alpha, sigma = noise_levels(sample_times(config.seed, numbers, config), config, alphas_cumprod)
    return TrainingBatch(
        add_noise(clean, noise, alpha, sigma),
        timesteps,
        target(clean, noise, alpha, sigma, config.prediction_type),
        loss_weight(alpha, sigma, config.prediction_type, config.loss_weighting, config.snr_gamma),
        sigma / alpha,
    )
