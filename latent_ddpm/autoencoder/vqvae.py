"""The autoencoder: convolutional encoder and decoder around a quantizer (VQ-VAE) or a posterior (KL-VAE).

The parameters have the names of diffusers' VQModel and AutoencoderKL, so the export copies tensors
(latent_ddpm/autoencoder/stock.py). The architecture is VQGAN's (arXiv 2012.09841, table 7), without attention by
default.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from latent_ddpm.autoencoder.equivariance import Transform, with_noise
from latent_ddpm.autoencoder.posterior import KLPosterior, Posterior
from latent_ddpm.autoencoder.quantizers import Quantized, decoder_metric, make_quantizer, unquantized
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.training.acceleration import double_pixels

SUMMED_TAPS_DEVICES = {"cpu"}  # where the fewer multiplications of `Upsample` take less time
_EPS = 1e-6  # epsilon of the group norms, as in VQModel


class ResnetBlock(nn.Module):
    """Two group-normed 3x3 convolutions with a skip connection: (B, C_in, H, W) -> (B, C_out, H, W).

    The second convolution starts at zero, so every block starts as its skip connection (arXiv 1901.09321).
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Attention(nn.Module):
    """Single-head self-attention over all positions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, as in VQModel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        h = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](h).transpose(1, 2).view_as(x)


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with optional attention between them."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Stride-2 convolution: (B, C, H, W) -> (B, C, H/2, W/2). Pads only right and below, as VQModel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution: (B, C, H, W) -> (B, C, 2H, 2W).

    On a CPU, computed as one transposed convolution of stride 2 (arXiv 1609.07009). Doubled pixels have equal values,
    so the kernel taps that multiply them are summed first: 16 instead of 36 multiplications per input pixel and channel
    pair.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type not in SUMMED_TAPS_DEVICES:
            compiling = torch.compiler.is_compiling()
            return self.conv(double_pixels(x) if compiling else F.interpolate(x, scale_factor=2.0, mode="nearest"))
        padded = F.pad(self.conv.weight.flip(2, 3), (1, 1, 1, 1))
        taps = 4 * F.avg_pool2d(padded, 2, stride=1)  # (C_out, C_in, 4, 4), sums of neighbouring taps
        return F.conv_transpose2d(x, taps.transpose(0, 1), self.conv.bias, stride=2, padding=1)


class Level(nn.Module):
    """The residual blocks of one resolution and the sampler to the next. `samplers` is VQModel's name for its list.

    With `recompute`, a block's activations are computed again in the backward pass (arXiv 1604.06174).
    """

    def __init__(
        self, in_channels: int, out_channels: int, layers: int, groups: int, samplers: str, sampler: nn.Module | None
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * layers
        self.resnets = nn.ModuleList([ResnetBlock(a, b, groups) for a, b in pairwise(widths)])
        self._samplers, self.recompute = samplers, False
        self.add_module(samplers, nn.ModuleList([sampler] if sampler is not None else []))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for resnet in self.resnets:
            if self.recompute and self.training:
                x = checkpoint(resnet, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = resnet(x)
        for sampler in getattr(self, self._samplers):
            x = sampler(x)
        return x


class Encoder(nn.Module):
    """(B, image_channels, R, R) -> (B, out_channels, R/f, R/f) with f = 2 ** (levels - 1)."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(channels):
            down = Downsample(width) if i < len(channels) - 1 else None
            self.down_blocks.append(Level(channels[max(i - 1, 0)], width, layers, groups, "downsamplers", down))
        self.mid_block = MidBlock(channels[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """(B, latent_channels, R/f, R/f) -> (B, image_channels, R, R), and the input of the last layer."""

    def __init__(
        self, in_channels: int, out_channels: int, channels: Sequence[int], layers: int, groups: int, attention: bool
    ) -> None:
        super().__init__()
        widths = list(reversed(channels))
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            up = Upsample(width) if i < len(widths) - 1 else None
            self.up_blocks.append(Level(widths[max(i - 1, 0)], width, layers + 1, groups, "upsamplers", up))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The input of conv_out: (B, channels[0], R, R)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return F.silu(self.conv_norm_out(x))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The image (B, image_channels, R, R), and the input of the last layer, (B, channels[0], R, R)."""
        features = self.features(x)
        return self.conv_out(features), features


class AutoencoderOutput(NamedTuple):
    """reconstruction (B, C, R, R) in about [-1, 1]; quantized; features, the input of the decoder's last layer."""

    reconstruction: torch.Tensor
    quantized: Quantized | Posterior
    features: torch.Tensor


class Autoencoder(nn.Module):
    """The custom autoencoder of stage 1: a VQ-VAE, or with `quantizer: kl` a KL-VAE.

    Args:
        config: see AutoencoderConfig for the keys that shape it.

    Attributes:
        plain: if true, encoder outputs bypass the quantizer.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, width = config.block_out_channels, config.latent_channels
        shape = (widths, config.layers_per_block, config.norm_num_groups, config.mid_block_add_attention)
        is_kl = config.quantizer == "kl"
        outputs = 2 * width if is_kl else width  # mean and log variance of each latent
        self.latent_channels, self.seed, self.latent_noise = width, config.seed, config.latent_noise
        self.plain = False
        self.encoder = Encoder(config.image_channels, outputs, *shape)
        self.quant_conv = nn.Conv2d(outputs, outputs, 1)
        values_per_position = config.image_channels * 4 ** (len(widths) - 1)
        self.quantizer = KLPosterior(values_per_position, config.seed) if is_kl else make_quantizer(config)
        self.post_quant_conv = nn.Conv2d(width, width, 1)
        self.decoder = Decoder(width, config.image_channels, *shape)

    @torch.no_grad()
    def initialize(self, images: torch.Tensor, learned: bool = False) -> None:
        """Fit quantizer and encoder to each other on images (B, C, R, R); every process calls this.

        `learned` means that encoder and decoder are already trained. Their latents are then first mapped to units of
        their effect on the image (`decoder_metric`), so that the nearest code has the smallest error in pixels. The
        decoder inverts this map and the quantizer's.
        """
        with torch.autocast(images.device.type, enabled=False):
            if learned:
                self._change_basis(*decoder_metric(self.encode, self.decode, images), undo=True)
            affine = self.quantizer.initialize(self.encode(images).float())
            if affine is not None:
                self._change_basis(*affine, undo=learned)

    def _change_basis(self, matrix: torch.Tensor, shift: torch.Tensor, undo: bool) -> None:
        """Multiply latents by a matrix (D, D) and add a vector (D,); with `undo`, the decoder inverts it."""
        weight, bias = self.quant_conv.weight, self.quant_conv.bias
        matrix, shift = matrix.to(weight), shift.to(weight)
        weight.copy_((matrix @ weight.flatten(1)).view_as(weight))
        bias.copy_(matrix @ bias + shift)
        if undo:
            weight, bias = self.post_quant_conv.weight, self.post_quant_conv.bias
            inverse = torch.linalg.inv(matrix)
            bias.sub_(weight.flatten(1) @ (inverse @ shift))
            weight.copy_((weight.flatten(1) @ inverse).view_as(weight))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, R, R) in [-1, 1] -> latents (B, D, R/f, R/f).

        These are the encoder outputs before quantization, or the posterior means of a KL-VAE.
        """
        return self.quant_conv(self.encoder(images))[:, : self.latent_channels]

    def decode(self, quantized: torch.Tensor) -> torch.Tensor:
        """Codes, or the latents of a KL-VAE, (B, D, R/f, R/f) -> images (B, C, R, R) in about [-1, 1]."""
        return self.decoder(self.post_quant_conv(quantized))[0]

    def forward(
        self, images: torch.Tensor, numbers: torch.Tensor | None = None, transform: Transform | None = None
    ) -> AutoencoderOutput:
        """Images (B, C, R, R) in [-1, 1] through encoder, quantizer and decoder.

        The example numbers, int64 (B,), determine a KL-VAE's noise and `latent_noise`; both need them in training mode.
        Transform and noise apply to the encoder outputs before quantization, because decoding also quantizes the
        latents that a U-Net draws. In a KL-VAE they apply after its own noise.
        """
        noisy = self.training and self.latent_noise > 0
        encoded = self.quant_conv(self.encoder(images))
        is_kl = isinstance(self.quantizer, KLPosterior)
        if transform is not None and not is_kl:
            encoded = transform.apply(encoded)
        if noisy and not is_kl:
            encoded = with_noise(encoded, numbers, self.seed, self.latent_noise)
        quantized = unquantized(encoded, self.quantizer) if self.plain else self.quantizer(encoded, numbers)
        if transform is not None and is_kl:
            quantized = quantized._replace(latents=transform.apply(quantized.latents))
        if noisy and is_kl:
            noised = with_noise(quantized.latents, numbers, self.seed, self.latent_noise)
            quantized = quantized._replace(latents=noised)
        reconstruction, features = self.decoder(self.post_quant_conv(quantized.latents))
        return AutoencoderOutput(reconstruction.float(), quantized, features)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the residual blocks' activations in the backward pass instead of storing them."""
        for module in self.modules():
            if isinstance(module, Level):
                module.recompute = True
