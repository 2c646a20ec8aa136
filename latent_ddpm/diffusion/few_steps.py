"""A U-Net that samples in few steps, by distribution matching distillation.

The generator starts as a copy of the teacher and learns to draw in `few_step_counts` steps of a deterministic sampler
(first-order DPM-Solver++, which is DDIM; arXiv 2211.01095, 2010.02502), so an image follows from its initial noise
alone. Its samples are noised again and compared there by two U-Nets: the frozen teacher knows the scores of the data,
and the critic learns those of the generator's samples. The difference of the two is the gradient that moves the samples
towards the data (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).
"""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import DPMSolverMultistepScheduler

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.indexing import digest
from latent_ddpm.diffusion.conditions import Given, unet_inputs
from latent_ddpm.diffusion.noise_schedule import make_noise_scheduler, noise_levels, noise_table
from latent_ddpm.diffusion.objective import TrainingBatch, add_noise, target
from latent_ddpm.diffusion.self_guidance import Guide
from latent_ddpm.diffusion.unet import StockUNet
from latent_ddpm.random import Stream, first_words, normal, uniform
from latent_ddpm.training.acceleration import align_state, strict
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.optim import clip_gradients, make_optimizer, set_learning_rate
from latent_ddpm.training.sharding import load_optimizer, prepare
from latent_ddpm.training.skipped import SkippedSteps

FEW_STEPS = "few_steps"  # the chapter's name in metrics.jsonl, run.json and the names of checkpoints
FEW_STEP_KEYS = ("few_step_training_steps", "few_step_counts", "few_step_learning_rate")
CRITIC_RATE = 2.5  # the critic's learning rate over the generator's: it has to follow the generator
BETAS = (0.5, 0.95)  # of Adam: the gradients change with the other network
CRITIC_TIMES = (0.02, 0.98)  # of the noise at which samples are compared (DMD, section 4.2)
SIGMA_REL = 0.1  # width of the chapter's weight average


# ------------------------------------------------------------------------------------------------- the sampler


def few_step_scheduler(config: UNetConfig) -> DPMSolverMultistepScheduler:
    """The stock scheduler of the few-step pipeline: deterministic, each step from the latest prediction alone."""
    own = {"solver_order": 1, "prediction_type": config.prediction_type}
    if config.prediction_type == "flow_prediction":
        flow = {"use_flow_sigmas": True, "flow_shift": config.noise_shift}
        return DPMSolverMultistepScheduler(num_train_timesteps=config.num_train_timesteps, **own, **flow)
    diffusion = make_noise_scheduler(config).config
    return DPMSolverMultistepScheduler.from_config(diffusion, timestep_spacing="trailing", **own)


@dataclass
class Level:
    """A noise level of a sampler.

    Attributes:
        timestep: the U-Net's.
        alpha, sigma: of signal and noise.
    """

    timestep: int
    alpha: float
    sigma: float


def levels_of(config: UNetConfig, count: int) -> list[Level]:
    """The noise levels at which the pipeline evaluates the U-Net when it draws in `count` steps."""
    scheduler = few_step_scheduler(config)
    scheduler.set_timesteps(count)
    flow, levels = config.prediction_type == "flow_prediction", []
    for timestep, value in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        alpha, sigma = (1 - value, value) if flow else ((1 + value**2) ** -0.5, value * (1 + value**2) ** -0.5)
        levels.append(Level(int(timestep), alpha, sigma))
    return levels


def clean_latents(
    noisy: torch.Tensor,
    prediction: torch.Tensor,
    alpha: torch.Tensor | float,
    sigma: torch.Tensor | float,
    prediction_type: str,
) -> torch.Tensor:
    """The clean latents that a prediction implies, the inverse of `objective.target`.

    Args:
        noisy: (B, D, h, w).
        prediction: (B, D, h, w), of the U-Net.
        alpha, sigma: (B, 1, 1, 1), or numbers.
        prediction_type: as in `objective.target`.

    Returns:
        float32 (B, D, h, w).
    """
    prediction = prediction.float()
    if prediction_type == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if prediction_type == "sample":
        return prediction
    if prediction_type == "v_prediction":
        return alpha * noisy - sigma * prediction
    return noisy - sigma * prediction


def next_latents(noisy: torch.Tensor, clean: torch.Tensor, now: Level, then: Level) -> torch.Tensor:
    """A step of DDIM (arXiv 2010.02502, equation 12 without noise) from one level to the next."""
    noise = (noisy - now.alpha * clean) / now.sigma
    return then.alpha * clean + then.sigma * noise


# ------------------------------------------------------------------------------------------------ distribution matching


def position_at(config: UNetConfig, step: int) -> tuple[int, int]:
    """What the generator learns in an optimizer step: the number of sampling steps, and which of them (from 0)."""
    words = first_words(config.seed, Stream.FEW_STEP_POSITION, step)
    count = config.few_step_counts[words[0] % len(config.few_step_counts)]
    return count, words[1] % count


def comparison_batch(
    clean: torch.Tensor, numbers: torch.Tensor, config: UNetConfig, alphas_cumprod: torch.Tensor | None
) -> tuple[TrainingBatch, torch.Tensor, torch.Tensor]:
    """The generator's samples with noise, at which teacher and critic are compared and the critic is trained.

    Args:
        clean: samples (B, D, h, w).
        numbers: int64 (B,), the example numbers, on the same device.
        config: config of the run.
        alphas_cumprod: (T,), the diffusion's table; None for a flow.

    Returns:
        The batch, with the critic's targets; alpha and sigma, (B, 1, 1, 1).
    """
    low, high = CRITIC_TIMES
    times = low + (high - low) * uniform(config.seed, Stream.FEW_STEP_TIME, numbers).double()
    noise = normal(config.seed, Stream.FEW_STEP_COMPARISON, numbers, clean.shape[1:])
    timesteps, alpha, sigma = noise_levels(times, config, alphas_cumprod)
    noisy, wanted = add_noise(clean, noise, alpha, sigma), target(clean, noise, alpha, sigma, config.prediction_type)
    batch = TrainingBatch(noisy, timesteps, wanted, torch.ones_like(alpha), sigma / alpha)
    return batch, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


def matching_loss(samples: torch.Tensor, of_teacher: torch.Tensor, of_critic: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient with respect to the samples is that of distribution matching (DMD, equations 7 and 8).

    Args:
        samples: of the generator (B, D, h, w), with gradient.
        of_teacher, of_critic: the clean latents that both predict from the noised samples, without gradient.

    Returns:
        Scalar; half the mean squared length of the move, relative to the teacher's distance.
    """
    distance = (samples.detach() - of_teacher).abs().flatten(1).mean(1).clamp_min(1e-2).view(-1, 1, 1, 1)
    wanted = samples.detach() - (of_critic - of_teacher) / distance
    return 0.5 * (samples - wanted).square().mean()


class FewStepTraining:
    """The networks of the chapter and their training step.

    Args:
        config: of the chapter.
        accelerator: of the run.
        generator, critic: copies of the teacher, or with the weights of `state`; on their device.
        teacher: predicts with guidance, where the weights do not hold it yet; its scores are those of the data.
        averaged: of the generator.
        state: a checkpoint of `state_dict`, whose optimizers are loaded here, or None.
    """

    def __init__(
        self,
        config: UNetConfig,
        accelerator: Accelerator,
        generator: StockUNet,
        critic: StockUNet,
        teacher: Guide,
        averaged: PowerEMA,
        state: dict[str, Any] | None,
    ) -> None:
        self.config, self.accelerator, self.teacher, self.averaged = config, accelerator, teacher, averaged
        self.networks = {"generator": generator, "critic": critic}
        self.rates = {"generator": config.learning_rate, "critic": CRITIC_RATE * config.learning_rate}
        self.models: dict[str, torch.nn.Module] = {}
        self.optimizers: dict[str, AcceleratedOptimizer] = {}
        self.skipped: dict[str, SkippedSteps] = {}
        for name, network in self.networks.items():
            optimizer = make_optimizer(network.parameters(), config, self.rates[name], betas=BETAS)
            if state:
                load_optimizer(optimizer, state[f"{name}_optimizer"])
            align_state(optimizer)
            self.models[name], self.optimizers[name] = prepare(accelerator, network, optimizer)
            counts, scaled = state[f"{name}_skipped"] if state else None, accelerator.scaler is not None
            self.skipped[name] = SkippedSteps(name, counts, accelerator.device, scaled=scaled)
        table = noise_table(config)
        self.table = table.to(accelerator.device) if table is not None else None
        self.levels = {count: levels_of(config, count) for count in config.few_step_counts}

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint; weights and moments may be sharded."""
        state: dict[str, Any] = {"ema": self.averaged.state_dict()}
        for name, network in self.networks.items():
            state |= {name: network.state_dict(), f"{name}_optimizer": self.optimizers[name].optimizer.state_dict()}
            state[f"{name}_skipped"] = self.skipped[name].counts
        return state

    def clean(self, unet: torch.nn.Module, noisy: torch.Tensor, level: Level, given: Given) -> torch.Tensor:
        """The clean latents that the generator predicts at one level, (B, D, h, w)."""
        inputs, words = unet_inputs(noisy, given)
        timesteps = torch.full((len(noisy),), level.timestep, device=noisy.device)
        prediction = unet(inputs, timesteps, **words).sample
        return clean_latents(noisy, prediction, level.alpha, level.sigma, self.config.prediction_type)

    @torch.no_grad()
    def begin(self, noise: torch.Tensor, levels: list[Level], position: int, given: Given) -> torch.Tensor:
        """The sampler's latents before its step `position`, from the initial noise (B, D, h, w)."""
        noisy = noise
        for now, then in itertools.pairwise(levels[: position + 1]):
            noisy = next_latents(noisy, self.clean(self.networks["generator"], noisy, now, given), now, then)
        return noisy

    def step(
        self, step: int, before: int, micro_batches: Iterable[tuple[torch.Tensor, Given]], rate: float
    ) -> dict[str, torch.Tensor]:
        """One optimizer step of both networks.

        Args:
            step: of the chapter, from 0.
            before: optimizer steps of the chapters before.
            micro_batches: example numbers int64 (B,) and conditioning, on the device.
            rate: the learning rate as a share of its peak.

        Returns:
            The losses of this process, `loss` and `critic_loss`, and the norm of the generator's gradient, scalars.
        """
        config, accelerator = self.config, self.accelerator
        count, position = position_at(config, before + step)
        levels = self.levels[count]
        for name, optimizer in self.optimizers.items():
            set_learning_rate(optimizer, rate * self.rates[name])
        totals = {name: torch.zeros((), device=accelerator.device) for name in ("loss", "critic_loss", "grad_norm")}
        for numbers, given in micro_batches:
            shape = self.teacher.strong.config.out_channels, *_size(self.teacher.strong)
            noise = normal(config.seed, Stream.FEW_STEP_NOISE, numbers, shape)
            with accelerator.autocast():
                noisy = self.begin(noise, levels, position, given)
            with accelerator.accumulate(*self.models.values()):
                samples = self.clean(self.models["generator"], noisy, levels[position], given)
                batch, alpha, sigma = comparison_batch(samples.detach(), numbers, config, self.table)
                inputs, words = unet_inputs(batch.noisy, given)
                prediction = self.models["critic"](inputs, batch.timesteps, **words).sample
                critic_loss = batch.loss(prediction)
                with accelerator.autocast():
                    of_data = self.teacher(batch.noisy, batch.timesteps, batch.level, given)
                of_data, of_samples = (
                    clean_latents(batch.noisy, made.detach(), alpha, sigma, config.prediction_type)
                    for made in (of_data, prediction)
                )
                loss = matching_loss(samples, of_data, of_samples)
                with strict(config):
                    accelerator.backward(critic_loss)
                    accelerator.backward(loss)
                if accelerator.sync_gradients:
                    for name, optimizer in self.optimizers.items():
                        accelerator.unscale_gradients(optimizer)
                        norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                        self.skipped[name].add(kept)
                        if name == "generator":
                            totals["grad_norm"] = norm
                for optimizer in self.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            totals["loss"] += loss.detach() / config.gradient_accumulation_steps
            totals["critic_loss"] += critic_loss.detach() / config.gradient_accumulation_steps
        self.averaged.update(self.networks["generator"], step)
        return totals


def _size(unet: StockUNet) -> tuple[int, int]:
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


# --------------------------------------------------------------------------------------------------- the chapter


def few_step_config(config: UNetConfig) -> UNetConfig:
    """The config of the chapter; all lengths of `config` are in steps."""
    steps = config.few_step_training_steps
    return dataclasses.replace(
        config,
        max_train_steps=steps,
        learning_rate=config.few_step_learning_rate,
        optimizer="adamw",
        lr_scheduler="warmup_stable_decay",
        lr_warmup_steps=min(20, steps),
        lr_decay_steps=-(-steps // 2),
        ema_sigma_rels=[SIGMA_REL],
        ema_snapshots=0,
        unet_dropout=0.0,
        guidance_scale=1.0,
        num_inference_steps=config.few_step_counts[-1],
    )


def few_step_origin(config: UNetConfig, before: str) -> str:
    """Identifies what the chapter starts from, and its keys; `before` is the origin of the chapter before."""
    keys = [before, *(getattr(config, key) for key in FEW_STEP_KEYS)]
    return digest(FEW_STEPS, keys)
