"""PatchGAN discriminator (Isola et al., arXiv 1611.07004, appendix 6.1.2).

No batch norm: the result must not depend on how many processes share a batch. In its place spectral norm
(arXiv 1802.05957) or activation norm (arXiv 1807.03039, section 3.1; the choice of VQGAN's code).
"""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from latent_ddpm.training.distributed import all_reduce_sum, process_count

LOGIT_MEAN_DECAY = 0.99  # per step, of the running means that LeCam regularization compares with


class ActNorm(nn.Module):
    """One learned scale and shift per channel, started so that the first batch comes out with mean 0 and variance 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x: torch.Tensor) -> None:
        """Start on (B, C, H, W), the share of this process in the joint batch."""
        sums = torch.stack((x.double().mean((0, 2, 3)), x.double().pow(2).mean((0, 2, 3))))
        mean, square = (all_reduce_sum(sums) / process_count()).view(2, 1, -1, 1, 1)
        self.shift.copy_(-mean)
        self.scale.copy_((square - mean**2).clamp_min(1e-6).rsqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.shift) * self.scale


class PatchDiscriminator(nn.Module):
    """A logit for each overlapping patch: images (B, C, R, R) in [-1, 1] -> (B, 1, H, W).

    Args:
        in_channels: of the images.
        channels: of the first layer; doubled by each later one, up to 8 times.
        layers: convolutions of stride 2.
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
        self.register_buffer("logit_means", torch.zeros(2))  # of real and fake images
        self.register_buffer("tracked", torch.zeros(()))  # steps that are in them

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images)

    @torch.no_grad()
    def initialize(self, images: torch.Tensor) -> None:
        """Start the activation norms on real images (B, C, R, R); call it in every process, with its share."""
        x = images
        for block in self.blocks:
            if isinstance(block, ActNorm):
                block.initialize(x)
            x = block(x)

    @torch.no_grad()
    def track(self, real_mean: torch.Tensor, fake_mean: torch.Tensor, kept: torch.Tensor) -> None:
        """Take a step's mean logits into `logit_means`, unless `kept` (a bool scalar) is false; joint over processes.

        The first steps are averaged evenly, so that the means do not start from 0.
        """
        means = all_reduce_sum(torch.stack((real_mean, fake_mean)).to(self.logit_means)) / process_count()
        share = (1 / (self.tracked + 1)).clamp_min(1 - LOGIT_MEAN_DECAY)
        self.logit_means.copy_(torch.where(kept, self.logit_means.lerp(means, share), self.logit_means))
        self.tracked += kept
