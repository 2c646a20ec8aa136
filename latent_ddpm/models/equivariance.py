"""Equivariance regularization: latents that are turned or halved decode to the image turned or halved.

EQ-VAE (Kouzelis et al., arXiv 2502.09509, eq. 6 and 7), which makes latents easier to diffuse. A step either trains on
plain latents or on transformed ones; the choice is the whole batch's and follows from (seed, step).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from latent_ddpm.random import Stream, integers, uniform


class Transform(NamedTuple):
    """quarter_turns: 0 to 3, counterclockwise. halved: whether the sides are halved."""

    quarter_turns: int
    halved: bool

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Images or latents (B, C, H, W), of even sides if halved."""
        if self.halved:
            x = F.avg_pool2d(x, 2)
        return torch.rot90(x, self.quarter_turns, (2, 3)) if self.quarter_turns else x


def transform_of(seed: int, step: int, share: float) -> Transform | None:
    """What step `step` does to its latents: nothing, or in a `share` of the steps a turn or halving (or both)."""
    number = torch.tensor([step])
    if not float(uniform(seed, Stream.EQUIVARIANCE, number)) < share:
        return None
    choice = int(integers(seed, Stream.EQUIVARIANCE, number + (1 << 40), 7)) + 1  # 0 would be the identity
    return Transform(choice % 4, choice >= 4)
