"""The noise schedule of training and the schedulers of sampling.

Notation: z = alpha x + sigma eps, where x are clean latents of unit variance and eps is standard normal noise. A *time*
in (0, 1) increases with the noise. Diffusion has alpha^2 + sigma^2 = 1 and a table of noise levels (arXiv 2006.11239).
Flow has alpha + sigma = 1 and continuous levels (rectified flow, arXiv 2209.03003).
"""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler

from latent_ddpm.config import UNetConfig

MAX_SNR = 1e8  # and 1 / MAX_SNR is the minimum: divisions stay finite at both ends


# ------------------------------------------------------------------------------------------------ noise levels


def shift_snr(alphas_cumprod: torch.Tensor, shift: float) -> torch.Tensor:
    """The table alpha^2 (T,) with its signal-to-noise ratio divided by shift^2.

    Averaging neighbouring pixels reduces noise, so larger latents need more noise for the same difficulty (arXiv
    2301.11093, section 2.3, where shift is the ratio of the resolutions).
    """
    noise = (1 - alphas_cumprod) * shift**2
    return alphas_cumprod / (alphas_cumprod + noise)


def betas_of(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The betas (T,) of a table alpha^2 (arXiv 2006.11239, section 2)."""
    before = torch.cat((alphas_cumprod.new_ones(1), alphas_cumprod[:-1]))
    return 1 - alphas_cumprod / before


def make_noise_scheduler(config: UNetConfig) -> DDPMScheduler:
    """The diffusion's noise table as a stock diffusers scheduler, from which other schedulers can be created."""
    scheduler = DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        clip_sample=False,  # latents of unit variance exceed [-1, 1]
    )
    if config.noise_shift == 1:
        return scheduler
    betas = betas_of(shift_snr(scheduler.alphas_cumprod.double(), config.noise_shift))
    return DDPMScheduler.from_config(scheduler.config, trained_betas=betas.tolist())


def flow_sigma(times: torch.Tensor, shift: float) -> torch.Tensor:
    """The flow's sigma at a time: sigma / (1 - sigma) = shift * time / (1 - time) (arXiv 2403.03206, eq. 23)."""
    return shift * times / (1 + (shift - 1) * times)


def noise_table(config: UNetConfig) -> torch.Tensor | None:
    """The diffusion's alpha^2 (T,); None for a flow."""
    return None if config.prediction_type == "flow_prediction" else make_noise_scheduler(config).alphas_cumprod


def noise_levels(
    times: torch.Tensor, config: UNetConfig, alphas_cumprod: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The U-Net's timesteps and the noise levels of examples.

    Args:
        times: float64 (B,) in [0, 1).
        config: config of the run (prediction_type, noise_shift, num_train_timesteps).
        alphas_cumprod: (T,), the diffusion's table; None for a flow.

    Returns:
        timesteps (B,), int64 in [0, T), or float32 in [0, T) for a flow; alpha and sigma, float32 (B,).
    """
    if config.prediction_type == "flow_prediction":
        sigma = flow_sigma(times, config.noise_shift)
        return (sigma * config.num_train_timesteps).float(), (1 - sigma).float(), sigma.float()
    timesteps = (times * config.num_train_timesteps).long()
    alpha_squared = alphas_cumprod.to(times.device)[timesteps]
    return timesteps, alpha_squared.sqrt(), (1 - alpha_squared).sqrt()


def sampling_scheduler(config: UNetConfig) -> SchedulerMixin:
    """The stock scheduler of the exported pipeline, named by `inference_scheduler`.

    A flow is sampled by DPM-Solver++ or UniPC with flow sigmas: `FlowMatchEulerDiscreteScheduler` lacks the
    `init_noise_sigma` that a stock LDMPipeline needs.
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
