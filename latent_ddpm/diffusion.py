"""The mathematics of stage 2 as pure functions: what the U-Net sees, what it has to say, how errors weigh.

Throughout z = alpha x + sigma eps, where x are clean latents of unit variance and eps is standard normal. A *time* in
(0, 1) rises with the noise. Diffusion has alpha^2 + sigma^2 = 1 and a table of levels (arXiv 2006.11239); the flow has
alpha + sigma = 1 and any level (rectified flow, arXiv 2209.03003).
"""

import dataclasses

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from latent_ddpm.config import UNetConfig
from latent_ddpm.random import Stream, first_words, normal, uniform

_MAX_SNR = 1e8  # also the inverse of the smallest one: keeps divisions finite at either end


# ------------------------------------------------------------------------------------------------ noise levels


def shift_snr(alphas_cumprod: torch.Tensor, shift: float) -> torch.Tensor:
    """A table alpha^2 (T,) whose signal-to-noise ratio is divided by shift^2.

    Averaging neighbouring pixels takes noise away, so larger latents need more of it for the same difficulty (arXiv
    2301.11093, section 2.3, where shift is the ratio of the sides).
    """
    noise = (1 - alphas_cumprod) * shift**2
    return alphas_cumprod / (alphas_cumprod + noise)


def betas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The betas (T,) whose table alpha^2 this is (arXiv 2006.11239, section 2)."""
    before = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
    return 1 - alphas_cumprod / before


def make_noise_scheduler(config: UNetConfig) -> DDPMScheduler:
    """The table of a diffusion's noise levels as a stock diffusers scheduler, from which others can be made."""
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,  # latents of unit variance leave [-1, 1]
    )
    if config.noise_shift == 1:
        return scheduler
    betas = betas_of(shift_snr(scheduler.alphas_cumprod.double(), config.noise_shift))
    return DDPMScheduler.from_config(scheduler.config, trained_betas=betas.tolist())


def flow_sigma(times: torch.Tensor, shift: float) -> torch.Tensor:
    """The flow's noise level at a time: sigma / (1 - sigma) is `shift` times time / (1 - time) (arXiv
    2403.03206, eq. 23)."""
    return shift * times / (1 + (shift - 1) * times)


def noise_table(config: UNetConfig) -> torch.Tensor | None:
    """The diffusion's alpha^2 (T,); None of a flow."""
    return None if config.prediction_type == "flow_prediction" else make_noise_scheduler(config).alphas_cumprod


def noise_levels(
    times: torch.Tensor, config: UNetConfig, alphas_cumprod: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the U-Net is told about each example, and how its latents are noised.

    Args:
        times: float64 (B,) in [0, 1).
        config: says whether it is a flow, and its `noise_shift`.
        alphas_cumprod: (T,), the diffusion's table; the flow has none.

    Returns:
        timesteps (B,), int64 in [0, T) or, of the flow, float32 in [0, T); alpha and sigma, float32 (B,).
    """
    if config.prediction_type == "flow_prediction":
        sigma = flow_sigma(times, config.noise_shift)
        return (sigma * config.num_train_timesteps).float(), (1 - sigma).float(), sigma.float()
    timesteps = (times * config.num_train_timesteps).long()
    alpha_squared = alphas_cumprod.to(times.device)[timesteps]
    return timesteps, alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def sampling_scheduler(config: UNetConfig) -> SchedulerMixin:
    """The stock scheduler that the export samples with, as `inference_scheduler` says.

    A flow is sampled by DPM-Solver++ or UniPC with flow sigmas: `FlowMatchEulerDiscreteScheduler` lacks the
    `init_noise_sigma` that a stock LDMPipeline asks for.
    """
    name = {
        "ddim": DDIMScheduler,
        "dpmsolver++": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    }[config.inference_scheduler]
    if config.prediction_type == "flow_prediction":
        return name(
            num_train_timesteps=config.num_train_timesteps,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.noise_shift,
        )
    return name.from_config(make_noise_scheduler(config).config, timestep_spacing="trailing")


# ---------------------------------------------------------------------------------------- noise, target, weight


def _like(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return values.to(images.device, images.dtype).view(-1, *[1] * (images.ndim - 1))


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """z = alpha x + sigma eps (arXiv 2006.11239, eq. 4; arXiv 2209.03003, eq. 1).

    Args:
        clean: latents (B, D, H, W) of unit variance.
        noise: standard normal, same shape.
        alpha, sigma: (B,), from `noise_levels`.
    """
    return _like(alpha, clean) * clean + _like(sigma, clean) * noise


def target(
    clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """What the U-Net is to predict; arguments as for `add_noise`.

    epsilon: the noise. sample: the clean latents. v_prediction: alpha eps - sigma x (arXiv 2202.00512, app. D).
    flow_prediction: the velocity eps - x (arXiv 2209.03003, eq. 1, in the direction of the noise).
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

    A weighting is defined on the error of the clean latents; what the U-Net predicts has a multiple of that error.

    Args:
        alpha, sigma: (B,), from `noise_levels`.
        prediction_type: as for `target`.
        weighting: "uniform": 1 on whatever is predicted. "min_snr": min(SNR, snr_gamma) on the clean latents (arXiv
            2303.09556, section 3.4). "edm": SNR + 1 on the clean latents, which EDM's preconditioning makes 1 on its
            network's output (arXiv 2206.00364, eq. 8, with data of unit variance).
    """
    if weighting == "uniform":
        return torch.ones_like(alpha)
    snr = (alpha / sigma.clamp_min(1e-8)).square().clamp(1 / _MAX_SNR, _MAX_SNR)
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
    """A time for each example number: float64 (B,) in [0, 1), spread as timestep_sampling says.

    `uniform` draws each by itself. `stratified` is a Weyl sequence with the golden ratio's fraction: any stretch of
    consecutive example numbers, so every batch of every process, covers (0, 1) evenly. (The aim of the
    low-discrepancy sampler of arXiv 2107.00630, appendix I.1, without a draw that the batch shares.) `logit_normal`
    takes that sequence through the quantile function of the logistic of a normal variable (arXiv 2403.03206, section
    3.1).
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
    """What a step of stage 2 needs.

    Attributes:
        noisy: (B, D, H, W), what the U-Net sees.
        timesteps: (B,), what it is told.
        wanted: (B, D, H, W), what it is to predict.
        weight: (B,), of the squared errors.
    """

    noisy: torch.Tensor
    timesteps: torch.Tensor
    wanted: torch.Tensor
    weight: torch.Tensor

    def loss(self, prediction: torch.Tensor) -> torch.Tensor:
        """Weighted mean squared error of a prediction (B, D, H, W) of any float dtype; scalar."""
        error = (prediction.float() - self.wanted).square().flatten(1).mean(1)  # (B,)
        return (self.weight * error).mean()


def training_batch(
    clean: torch.Tensor, numbers: torch.Tensor, config: UNetConfig, alphas_cumprod: torch.Tensor | None
) -> TrainingBatch:
    """Noise latents; time and noise of an example follow from the seed and its number.

    Args:
        clean: latents (B, D, H, W) of unit variance.
        numbers: int64 (B,), the example numbers, on the same device.
        config: of the run.
        alphas_cumprod: (T,), the diffusion's table; the flow has none.
    """
    noise = normal(config.seed, Stream.NOISE, numbers, clean.shape[1:])
    timesteps, alpha, sigma = noise_levels(sample_times(config.seed, numbers, config), config, alphas_cumprod)
    return TrainingBatch(
        add_noise(clean, noise, alpha, sigma),
        timesteps,
        target(clean, noise, alpha, sigma, config.prediction_type),
        loss_weight(alpha, sigma, config.prediction_type, config.loss_weighting, config.snr_gamma),
    )
