"""Noise levels of training and the schedulers of sampling.

Throughout, z = alpha x + sigma eps, where x are clean latents of unit variance and eps is standard normal. A *time* in
(0, 1) rises with the noise. Diffusion has alpha^2 + sigma^2 = 1 and a table of levels (arXiv 2006.11239); the flow has
alpha + sigma = 1 and any level (rectified flow, arXiv 2209.03003).
"""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from latent_ddpm.config import UNetConfig

MAX_SNR = 1e8  # also the inverse of the smallest one: keeps divisions finite at either end


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
