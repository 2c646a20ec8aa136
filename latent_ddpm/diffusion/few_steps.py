"""A U-Net that samples in few steps, by distillation.

The generator starts as a copy of the teacher and learns to draw in `few_step_counts` steps of a deterministic sampler
(first-order DPM-Solver++, which is DDIM; arXiv 2211.01095, 2010.02502), so an image follows from its initial noise
alone. It learns its steps in two ways, at once where it needs both:

- The first step, from noise alone to a sample, by distribution matching, if 1 is among the counts. The samples are
  noised again and compared there by two U-Nets: the frozen teacher knows the scores of the data, and the critic learns
  those of the generator's samples. The difference of the two is the gradient that moves the samples towards the data
  (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).
- Each other step, from one noise level to the next, by regression: from noised latents of the training set it leads
  where the teacher's sampler leads in several small steps (progressive distillation, arXiv 2202.00512; PeRFlow, arXiv
  2405.07510).
"""

import dataclasses
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
from latent_ddpm.diffusion.self_guidance import Guide, draw_latents
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
TEACHER_STEPS = 20  # of the teacher's sampler, rounded up to a multiple of the number of steps that is learned
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


CLEAN = Level(0, 1.0, 0.0)


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


def with_matching(config: UNetConfig) -> bool:
    """Whether the first step learns by distribution matching: one step alone cannot follow the teacher's path."""
    return 1 in config.few_step_counts


def position_at(config: UNetConfig, step: int) -> tuple[int, int] | None:
    """Which step of the sampler the generator learns by regression in an optimizer step.

    Returns:
        The number of sampling steps, and the place among them from 0, or from 1 if the first one learns by matching.
        None if the generator draws in one step only.
    """
    several = [count for count in config.few_step_counts if count > 1]
    if not several:
        return None
    words, first = first_words(config.seed, Stream.FEW_STEP_POSITION, step), int(with_matching(config))
    count = several[words[0] % len(several)]
    return count, first + words[1] % (count - first)


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


# ------------------------------------------------------------------------------------------------ the teacher's path


def small_steps(count: int) -> int:
    """How many steps of the teacher's sampler one of `count` steps replaces."""
    return -(-TEACHER_STEPS // count)


def implied_clean(noisy: torch.Tensor, reached: torch.Tensor, now: Level, then: Level) -> torch.Tensor:
    """The clean latents with which `next_latents` leads from `noisy` to `reached` (arXiv 2202.00512, appendix G)."""
    ratio = then.sigma / now.sigma
    return (reached - ratio * noisy) / (then.alpha - ratio * now.alpha)


def path_target(
    noisy: torch.Tensor, reached: torch.Tensor, now: Level, then: Level, prediction_type: str
) -> torch.Tensor:
    """The prediction with which one step of the sampler leads from `noisy` to `reached`.

    Args:
        noisy, reached: latents (B, D, h, w) at the levels `now` and `then`.
        prediction_type: as in `objective.target`.

    Returns:
        (B, D, h, w).
    """
    clean = implied_clean(noisy, reached, now, then)
    noise = (noisy - now.alpha * clean) / now.sigma
    alpha, sigma = (noisy.new_full((len(noisy),), value) for value in (now.alpha, now.sigma))
    return target(clean, noise, alpha, sigma, prediction_type)


class FewStepTraining:
    """The networks of the chapter and their training step.

    Args:
        config: of the chapter.
        accelerator: of the run.
        networks: "generator" and, if `with_matching`, "critic": copies of the teacher, or with the weights of `state`;
            on their device.
        teacher: predicts with guidance, where the weights do not hold it yet; its scores are those of the data.
        averaged: of the generator.
        state: a checkpoint of `state_dict`, whose optimizers are loaded here, or None.
    """

    def __init__(
        self,
        config: UNetConfig,
        accelerator: Accelerator,
        networks: dict[str, StockUNet],
        teacher: Guide,
        averaged: PowerEMA,
        state: dict[str, Any] | None,
    ) -> None:
        self.config, self.accelerator, self.teacher, self.averaged = config, accelerator, teacher, averaged
        self.networks = networks
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
        self.levels = {count: [*levels_of(config, count), CLEAN] for count in config.few_step_counts}

    def state_dict(self) -> dict[str, Any]:
        """The checkpoint; weights and moments may be sharded."""
        state: dict[str, Any] = {"ema": self.averaged.state_dict()}
        for name, network in self.networks.items():
            state |= {name: network.state_dict(), f"{name}_optimizer": self.optimizers[name].optimizer.state_dict()}
            state[f"{name}_skipped"] = self.skipped[name].counts
        return state

    @torch.no_grad()
    def on_path(
        self, clean: torch.Tensor, numbers: torch.Tensor, count: int, position: int, given: Given
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the generator learns for one of the steps by regression.

        Args:
            clean: latents of the training set (B, D, h, w).
            numbers: int64 (B,), their example numbers.
            count, position: as of `position_at`.
            given: the conditioning.

        Returns:
            Noisy latents at the level where that step begins, noise alone for the first one, and the prediction that
            leads where the teacher leads from there.
        """
        config, (now, then) = self.config, self.levels[count][position : position + 2]
        noise = normal(config.seed, Stream.FEW_STEP_PATH, numbers, clean.shape[1:])
        noisy, small = now.alpha * clean + now.sigma * noise if position else noise, small_steps(count)
        part = slice(small * position, small * (position + 1))
        reached = draw_latents(self.teacher, noisy, given, config, small * count, part)
        return noisy, path_target(noisy, reached, now, then, config.prediction_type)

    def matching(self, samples: torch.Tensor, numbers: torch.Tensor, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of distribution matching.

        Args:
            samples: of the generator (B, D, h, w), with gradient.
            numbers: int64 (B,), the example numbers.
            given: the conditioning.

        Returns:
            That of the generator, and that of the critic.
        """
        config, kind = self.config, self.config.prediction_type
        batch, alpha, sigma = comparison_batch(samples.detach(), numbers, config, self.table)
        inputs, words = unet_inputs(batch.noisy, given)
        of_critic = self.models["critic"](inputs, batch.timesteps, **words).sample
        critic_loss = batch.loss(of_critic)
        with self.accelerator.autocast():
            of_teacher = self.teacher(batch.noisy, batch.timesteps, batch.level, given)
        of_teacher, of_critic = (
            clean_latents(batch.noisy, made.detach(), alpha, sigma, kind) for made in (of_teacher, of_critic)
        )
        return matching_loss(samples, of_teacher, of_critic), critic_loss

    def losses(
        self, clean: torch.Tensor, numbers: torch.Tensor, place: tuple[int, int] | None, given: Given
    ) -> dict[str, torch.Tensor]:
        """The losses of a micro-batch, with gradient.

        Args:
            clean: latents of the training set (B, D, h, w).
            numbers: int64 (B,), their example numbers.
            place: the step that is learned by regression, as of `position_at`.
            given: the conditioning.

        Returns:
            Of `loss` and `critic_loss`, if the first step learns by matching, and `path_loss`, those that there are.
        """
        config, matched = self.config, "critic" in self.networks
        begun, levels, wanted = [], [], None
        if matched:
            begun.append(normal(config.seed, Stream.FEW_STEP_NOISE, numbers, clean.shape[1:]))
            levels.append(self.levels[config.few_step_counts[0]][0])
        if place is not None:
            with self.accelerator.autocast():
                noisy, wanted = self.on_path(clean, numbers, *place, given)
            begun.append(noisy)
            levels.append(self.levels[place[0]][place[1]])
        timesteps = [torch.full((len(clean),), level.timestep, device=clean.device) for level in levels]
        repeated = {name: torch.cat([value] * len(begun)) for name, value in given.items()}
        inputs, words = unet_inputs(torch.cat(begun), repeated)
        predictions = self.models["generator"](inputs, torch.cat(timesteps), **words).sample.float().split(len(clean))
        found = {}
        if matched:
            alpha, sigma = levels[0].alpha, levels[0].sigma
            samples = clean_latents(begun[0], predictions[0], alpha, sigma, config.prediction_type)
            found["loss"], found["critic_loss"] = self.matching(samples, numbers, given)
        if wanted is not None:
            found["path_loss"] = (predictions[-1] - wanted).square().mean()
        return found

    def step(
        self, step: int, before: int, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor, Given]], rate: float
    ) -> dict[str, torch.Tensor]:
        """One optimizer step of the networks.

        Args:
            step: of the chapter, from 0.
            before: optimizer steps of the chapters before.
            micro_batches: example numbers int64 (B,), latents (B, D, h, w) and conditioning, on the device.
            rate: the learning rate as a share of its peak.

        Returns:
            The losses of this process, as of `losses`, and the norm of the generator's gradient, scalars. `loss` is
            `path_loss` if there is no matching.
        """
        config, accelerator = self.config, self.accelerator
        place = position_at(config, before + step)
        for name, optimizer in self.optimizers.items():
            set_learning_rate(optimizer, rate * self.rates[name])
        totals: dict[str, torch.Tensor] = {}
        for numbers, clean, given in micro_batches:
            with accelerator.accumulate(*self.models.values()):
                losses = self.losses(clean, numbers, place, given)
                shown = {name: value.detach() for name, value in losses.items()}
                with strict(config):
                    if "critic_loss" in losses:
                        accelerator.backward(losses.pop("critic_loss"))
                    accelerator.backward(sum(losses.values()))
                if accelerator.sync_gradients:
                    for name, optimizer in self.optimizers.items():
                        accelerator.unscale_gradients(optimizer)
                        norm, kept = clip_gradients(optimizer.optimizer, config.max_grad_norm)
                        self.skipped[name].add(kept)
                        if name == "generator":
                            grad_norm = norm
                for optimizer in self.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            for name, value in shown.items():
                totals[name] = totals.get(name, 0) + value / config.gradient_accumulation_steps
        self.averaged.update(self.networks["generator"], step)
        if "loss" not in totals:
            totals["loss"] = totals.pop("path_loss")
        return {**totals, "grad_norm": grad_norm}


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


def passes_of_few_steps(config: UNetConfig, of_teacher: int) -> float:
    """Passes of a U-Net over the images of an optimizer step; forward and backward are three passes.

    Args:
        config: with the numbers of sampling steps.
        of_teacher: passes of the teacher's prediction.
    """
    matching = 3 + 3 + of_teacher if with_matching(config) else 0  # the generator, the critic, the teacher
    several = [count for count in config.few_step_counts if count > 1]
    if not several:
        return matching
    return matching + 3 + of_teacher * sum(map(small_steps, several)) / len(several)


def few_step_origin(config: UNetConfig, before: str) -> str:
    """Identifies what the chapter starts from, and its keys; `before` is the origin of the chapter before."""
    keys = [before, *(getattr(config, key) for key in FEW_STEP_KEYS)]
    return digest(FEW_STEPS, keys)
