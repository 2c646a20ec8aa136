"""Exponential moving average of a model's weights: the model that is validated, sampled and exported."""

import copy

import torch
from torch import nn


class EMA:
    """A second model whose parameters follow the trained one's; buffers are copied.

    Every process updates its own copy from identical weights, so the copies stay identical without traffic.

    Args:
        model: the trained model, not wrapped for distribution.
        decay: the largest decay per step; early on it is min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """The decay used by the update after optimizer step `step`, counted from 0."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """ema <- decay * ema + (1 - decay) * model."""
        averaged, current = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay_at(step))
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
