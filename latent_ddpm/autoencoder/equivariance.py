"""Rotation, downsampling and noise on the latents in training, which make them easier to diffuse.

Equivariance: rotated or downsampled latents decode to the rotated or downsampled image, EQ-VAE (Kouzelis et al., arXiv
2502.09509, eq. 6 and 7). A step trains either on plain or on transformed latents. The choice holds for the whole batch
and follows from (seed, step). Noise: the decoder learns to tolerate the errors of a diffusion model, and the encoder
separates latents that must decode differently.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from latent_ddpm.random import Stream, integers, normal, uniform


class Transform(NamedTuple):
    """quarter_turns: 0 to 3, counterclockwise. halved: whether height and width are halved."""

    quarter_turns: int
    halved: bool

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Transform images or latents (B, C, H, W); H and W must be even if `halved`."""
        if self.halved:
            x = F.avg_pool2d(x, 2)
        if self.quarter_turns:
            x = torch.rot90(x, self.quarter_turns, (2, 3)).contiguous()  # torch.compile makes code for every layout
        return x


def transform_of(seed: int, step: int, share: float) -> Transform | None:
    """The transform of a step: a rotation, a downsampling or both in a `share` of the steps, otherwise None."""
    number = torch.tensor([step])  # on the CPU, which computes a single number sooner than a GPU starts to
    if not float(uniform(seed, Stream.EQUIVARIANCE, number)) < share:
        return None
    choice = int(integers(seed, Stream.EQUIVARIANCE, number + (1 << 40), 7)) + 1  # 0 is the identity
    return Transform(choice % 4, choice >= 4)


def with_noise(latents: torch.Tensor, numbers: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Latents (B, D, H, W) plus normal noise, `share` times the standard deviation of each example's latents.

    Args:
        latents: float.
        numbers: int64 (B,), the example numbers; with the seed they determine the noise.
        seed: random seed of the run.
        share: 0 adds no noise.
    """
    std = latents.detach().float().flatten(1).std(1, correction=0).view(-1, 1, 1, 1)
    return latents + share * std * normal(seed, Stream.LATENT_NOISE, numbers, latents.shape[1:])
