"""PatchGAN discriminator (Isola et al., arXiv 1611.07004, appendix 6.1.2) with spectral norm (arXiv 1802.05957).

Spectral norm instead of batch norm: it has no statistics over the batch, so that the result does not depend on
how many processes share the batch.
"""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """A logit for each overlapping patch: images (B, C, R, R) in [-1, 1] -> (B, 1, H, W).

    Args:
        in_channels: of the images.
        channels: of the first layer; doubled by each later one, up to 8 times.
        layers: convolutions of stride 2.
    """

    def __init__(self, in_channels: int, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks += [spectral_norm(nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1)), nn.LeakyReLU(0.2)]
        blocks.append(spectral_norm(nn.Conv2d(widths[-1], 1, 4, padding=1)))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(images)
