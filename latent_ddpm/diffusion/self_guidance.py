"""Guidance in the weights: a U-Net learns the predictions that it makes with guidance.

Guidance adds to a prediction its difference to a worse one. Classifier-free guidance takes the prediction without
conditions (arXiv 2207.12598). Autoguidance takes that of a weaker model (arXiv 2406.02507), so it also improves models
without conditions. Here the weaker model is an early average of the weights. Distillation (arXiv 2210.03142) then gives
one network that predicts the guided result.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.indexing import digest
from latent_ddpm.diffusion.conditions import Given, unet_inputs
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.quality import gaussian_distance, latent_features
from latent_ddpm.diffusion.unet import StockUNet
from latent_ddpm.progress import progress_bar
from latent_ddpm.random import Stream, normal
from latent_ddpm.training.acceleration import uncompiled
from latent_ddpm.training.distributed import all_gather_rows, process_count, process_index
from pipeline_latent_ddpm import noise_level

SELF_GUIDANCE = "self_guidance"  # the chapter's name in metrics.jsonl, run.json and the names of checkpoints
SELF_GUIDANCE_KEYS = tuple(f"self_guidance_{key}" for key in ("steps", "scale", "weak", "interval", "learning_rate"))
WARMUP_STEPS = 10
SIGMA_REL = 0.1  # width of the chapter's weight average


class Guide:
    """Predictions of a frozen U-Net with guidance.

    With v the U-Net's prediction, w that of the weaker one and u that of the U-Net without conditions, the result is

        v + (scale - 1) (v - w) + (guidance_scale - 1) (v - u)

    (arXiv 2406.02507, equation 3; arXiv 2207.12598, equation 6). It has the prediction type of the U-Net.

    Args:
        strong: the U-Net.
        weak: the weaker U-Net; None for none.
        scale: of the guidance away from `weak`; 1 is none.
        interval: lowest and highest noise level sigma / alpha that is guided (arXiv 2404.07724); None guides all.
        guidance_scale: of the classifier-free guidance; 1 is none.
        nothing: the null condition in the place of a batch's conditioning; None without conditions.
    """

    def __init__(
        self,
        strong: StockUNet,
        weak: StockUNet | None = None,
        scale: float = 1.0,
        interval: tuple[float, float] | None = None,
        guidance_scale: float = 1.0,
        nothing: Callable[[Given], Given] | None = None,
    ) -> None:
        self.strong, self.scale, self.interval, self.guidance_scale = strong, scale, interval, guidance_scale
        self.weak = None if scale == 1 else weak
        self.nothing = None if guidance_scale == 1 else nothing

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, timesteps: torch.Tensor, level: torch.Tensor, given: Given) -> torch.Tensor:
        """The guided prediction.

        Args:
            noisy: noisy latents (B, D, h, w).
            timesteps: (B,), of the U-Net.
            level: (B,), noise levels sigma / alpha.
            given: the conditioning, on the same device.

        Returns:
            float32 (B, D, h, w).
        """
        prediction = self._predict(self.strong, noisy, timesteps, given)
        added = torch.zeros_like(prediction)
        if self.weak is not None:
            added += (self.scale - 1) * (prediction - self._predict(self.weak, noisy, timesteps, given))
        if self.nothing is not None:
            without = self._predict(self.strong, noisy, timesteps, self.nothing(given))
            added += (self.guidance_scale - 1) * (prediction - without)
        if self.interval is not None:
            low, high = self.interval
            added *= ((level >= low) & (level <= high)).to(added).view(-1, 1, 1, 1)
        return prediction + added

    @staticmethod
    def _predict(unet: StockUNet, noisy: torch.Tensor, timesteps: torch.Tensor, given: Given) -> torch.Tensor:
        inputs, words = unet_inputs(noisy, given)
        return unet(inputs, timesteps, **words).sample.float()


# ------------------------------------------------------------------------------------------------ the scale

SWEEP_SCALES = (1.0, 1.5, 2.0, 2.5, 3.0)
SWEEP_IMAGES, SWEEP_BATCH, SWEEP_STEPS = 512, 64, 10


@torch.no_grad()
def sweep_scales(
    guide_of: Callable[[float], Guide],
    strong: StockUNet,
    reals: Callable[[torch.Tensor], tuple[torch.Tensor, Given]],
    config: UNetConfig,
    device: torch.device,
    scales: Sequence[float] = SWEEP_SCALES,
) -> dict[float, float]:
    """How far samples are from real latents with each scale of the guidance; call it in every process.

    The same initial noise is used with every scale. The processes share the work.

    Args:
        guide_of: the guided predictions with a scale.
        strong: the U-Net whose features are compared (latent_ddpm/diffusion/quality.py).
        reals: real latents (B, D, h, w) and their conditioning, on the device, for int64 numbers (B,) from 0 on.
        config: config of the run.
        device: of the networks.
        scales: that are tried.

    Returns:
        The distance by scale, the same in every process.
    """
    table = noise_table(config)
    table = table if table is None else table.to(device)
    per_round = SWEEP_BATCH * process_count()
    found: dict[float | None, list[torch.Tensor]] = {}
    with uncompiled():
        starts = range(0, SWEEP_IMAGES, per_round)
        for start in progress_bar(starts, "trying scales", unit="round", disable=process_index() > 0, leave=False):
            numbers = start + SWEEP_BATCH * process_index() + torch.arange(SWEEP_BATCH)
            clean, given = reals(numbers)
            numbers = numbers.to(device)
            noise = normal(config.seed, Stream.SWEEP, numbers, clean.shape[1:])
            for scale in (None, *scales):
                drawn = clean if scale is None else draw_latents(guide_of(scale), noise, given, config, SWEEP_STEPS)
                features = latent_features(strong, drawn, numbers, given, config, table)
                found.setdefault(scale, []).append(all_gather_rows(features.to(device)).cpu())
    real = torch.cat(found.pop(None))
    return {scale: gaussian_distance(torch.cat(features), real) for scale, features in found.items() if scale}


def draw_latents(
    guide: Guide, noisy: torch.Tensor, given: Given, config: UNetConfig, steps: int, part: slice = slice(None)
) -> torch.Tensor:
    """Latents (B, D, h, w) drawn with guidance.

    Args:
        guide: the predictions.
        noisy: (B, D, h, w): standard normal noise, or latents at the noise level of the first step of `part`.
        given: the conditioning, on the same device.
        config: config of the run.
        steps: of the sampler.
        part: of these steps.
    """
    scheduler, latents = sampling_scheduler(config), noisy
    scheduler.set_timesteps(steps, device=noisy.device)
    if hasattr(scheduler, "set_begin_index"):  # others, such as DDIM, find their place by the timestep
        scheduler.set_begin_index(part.start or 0)
    for t in scheduler.timesteps[part]:
        keep, spread = noise_level(scheduler, t)
        level = noisy.new_full((len(noisy),), spread / keep if keep else float("inf"))
        prediction = guide(latents, t.expand(len(noisy)), level, given)
        latents = scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


# ---------------------------------------------------------------------------------------------- the chapter


def weak_step(config: UNetConfig) -> int:
    """The optimizer step of the early average that guides; the nearest snapshot serves."""
    return max(1, round(config.self_guidance_weak * config.max_train_steps))


def self_guidance_config(config: UNetConfig) -> UNetConfig:
    """The config of the chapter that trains the guidance into the weights; all lengths of `config` are in steps."""
    return dataclasses.replace(
        config,
        max_train_steps=config.self_guidance_steps,
        learning_rate=config.self_guidance_learning_rate,
        optimizer="adamw",
        lr_scheduler="linear",
        lr_warmup_steps=min(WARMUP_STEPS, config.self_guidance_steps),
        lr_decay_steps=None,
        ema_sigma_rels=[SIGMA_REL],
        ema_snapshots=0,
        loss_weighting="uniform",
        unet_dropout=0.0,
        guidance_scale=1.0,
    )


def self_guidance_origin(config: UNetConfig) -> str:
    """Identifies what the chapter starts from, and its keys; all lengths of `config` are in steps."""
    keys = [getattr(config, key) for key in ("max_train_steps", "guidance_scale", *SELF_GUIDANCE_KEYS)]
    return digest(SELF_GUIDANCE, keys)
