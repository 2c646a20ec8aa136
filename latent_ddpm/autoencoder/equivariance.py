"""What is done to latents in training to make them easier to diffuse: they are turned, halved, or get noise.

Equivariance: latents that are turned or halved decode to the image turned or halved, EQ-VAE (Kouzelis et al., arXiv
2502.09509, eq. 6 and 7). A step either trains on plain latents or on transformed ones; the choice is the whole batch's
and follows from (seed, step). Noise: the decoder learns to bear the errors of a diffusion model, and the encoder to
keep apart what has to be told apart.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from latent_ddpm.random import Stream, integers, normal, uniform


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


def with_noise(latents: torch.Tensor, numbers: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Latents (B, D, H, W) with normal noise of `share` times each example's own standard deviation.

    Args:
        latents: float.
        numbers: int64 (B,), the example numbers, from which with the seed the noise follows.
        seed: the run's.
        share: 0 adds none.
    """
    std = latents.detach().float().flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return latents + share * std * normal(seed, Stream.LATENT_NOISE, numbers, latents.shape[1:])
