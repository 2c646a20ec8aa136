"""Optimizer and learning rate."""

import math
from collections.abc import Iterable

import torch

from latent_ddpm.config import RunConfig


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: RunConfig, learning_rate: float
) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) with the config's moments and decay."""
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def clip_gradients(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradients to a joint norm; have the optimizer's next step do nothing if that norm is not finite.

    A fused AdamW reads the flag on its own device, so that no GPU waits for the answer.

    Returns:
        The norm before clipping, and whether the step counts (bool), both scalars.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    kept = norm.isfinite()
    optimizer.found_inf = (~kept).float()
    return norm, kept


def learning_rate_factor(step: int, config: RunConfig) -> float:
    """The share of the peak learning rate at a step: a rise over lr_warmup_steps, then what lr_scheduler says.

    A function of the step alone, so there is no scheduler state to save. `cosine` and `linear` reach 0 at
    max_train_steps.
    """
    if step < config.lr_warmup_steps:
        return (step + 1) / config.lr_warmup_steps
    progress = (step - config.lr_warmup_steps) / max(1, config.max_train_steps - config.lr_warmup_steps)
    progress = min(1.0, progress)
    return {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
    }[config.lr_scheduler]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
