"""PatchGAN discriminator (Isola et al., arXiv 1611.07004, appendix 6.1.2).

There is no batch norm, because the result must not depend on the number of processes that share a batch. Spectral norm
(arXiv 1802.05957) or activation norm (arXiv 1807.03039, section 3.1; used by VQGAN's code) replaces it.
"""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from latent_ddpm.training.distributed import all_reduce_sum, process_count

LOGIT_MEAN_DECAY = 0.99  # per step, for the running means in LeCam regularization


class ActNorm(nn.Module):
    """A learned scale and shift per channel, initialized so that the first batch has mean 0 and variance 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x: torch.Tensor) -> None:
        """Initialize from (B, C, H, W), the part of the joint batch on this process."""
        sums = torch.stack((x.double().mean((0, 2, 3)), x.double().pow(2).mean((0, 2, 3))))
        mean, square = (all_reduce_sum(sums) / process_count()).view(2, 1, -1, 1, 1)
        self.shift.copy_(-mean)
        self.scale.copy_((square - mean**2).clamp_min(1e-6).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.shift) * self.scale


class PatchDiscriminator(nn.Module):
    """One logit per overlapping patch: images (B, C, R, R) in [-1, 1] -> (B, 1, H, W).

    Args:
        in_channels: channels of the images.
        channels: channels of the first layer; each later layer doubles them, up to a factor of 8.
        layers: number of stride-2 convolutions.
        norm: "spectral", "actnorm" or "none".
    """

    def __init__(self, in_channels: int, channels: int = 64, layers: int = 3, norm: str = "spectral") -> None:
        super().__init__()
        bounded = spectral_norm if norm == "spectral" else nn.Identity()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks.append(bounded(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1)))
            blocks += [ActNorm(widths[i])] if norm == "actnorm" else []
            blocks.append(nn.LeakyReLU(0.2))
        blocks.append(bounded(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        self.blocks = nn.Sequential(*blocks)
        self.register_buffer("logit_means", torch.zeros(2))  # means for real and fake images
        self.register_buffer("tracked", torch.zeros(()))  # number of steps averaged in logit_means

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images)

    @torch.no_grad()
    def initialize(self, images: torch.Tensor) -> None:
        """Initialize the activation norms from real images (B, C, R, R). Every process calls this with its part."""
        x = images
        for block in self.blocks:
            if isinstance(block, ActNorm):
                block.initialize(x)
            x = block(x)

    @torch.no_grad()
    def track(self, real_mean: torch.Tensor, fake_mean: torch.Tensor, kept: torch.Tensor) -> None:
        """Update `logit_means` with the mean logits of a step, averaged over processes; no update if `kept` is false.

        The first steps have equal weights, so that the means are not biased towards 0. `kept` is a bool scalar.
        """
        means = all_reduce_sum(torch.stack((real_mean, fake_mean)).to(self.logit_means)) / process_count()
        share = (1 / (self.tracked + 1)).clamp_min(1 - LOGIT_MEAN_DECAY)
        self.logit_means.copy_(torch.where(kept, self.logit_means.lerp(means, share), self.logit_means))
        self.tracked += kept
