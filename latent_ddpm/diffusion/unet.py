"""Stage 2's network: a stock diffusers UNet2DModel, or UNet2DConditionModel for text, built from the config."""

from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from latent_ddpm.config import UNetConfig
from latent_ddpm.errors import UserError

StockUNet = UNet2DModel | UNet2DConditionModel


def check_latents_fit(config: UNetConfig, latent_size: int) -> None:
    """Raise UserError if `latent_size` is not divisible by the U-Net's downsampling factor."""
    widths, levels = config.unet_block_out_channels, len(config.unet_block_out_channels)
    factor = 2 ** (levels - 1)
    if latent_size % factor:
        raise UserError(
            f"The autoencoder's latents of {latent_size}x{latent_size} do not fit the U-Net: its {levels} levels "
            f"(unet_block_out_channels {widths}) need a multiple of {factor}. Use fewer levels or another resolution."
        )


def make_unet(
    config: UNetConfig,
    latent_channels: int,
    latent_size: int,
    zero_branches: bool = True,
    num_class_embeds: int | None = None,
    conditioning_channels: int = 0,
    cross_attention_dim: int | None = None,
) -> StockUNet:
    """A new U-Net for latents (B, latent_channels, latent_size, latent_size).

    The weights are random, except the layers zeroed by `zero_residual_branches` (if `zero_branches`). Conditions
    (latent_ddpm/diffusion/conditions.py) add a class embedding of `num_class_embeds` classes, or
    `conditioning_channels` input channels after the latents. Text embeddings of width `cross_attention_dim` need a
    UNet2DConditionModel; otherwise the result is a UNet2DModel.

    Raises:
        UserError: the size of the latents is not divisible by the U-Net's downsampling factor.
    """
    check_latents_fit(config, latent_size)
    widths, levels = config.unet_block_out_channels, len(config.unet_block_out_channels)
    attention = [level in config.unet_attention_levels for level in range(levels)]
    shared = {
        "sample_size": latent_size,
        "in_channels": latent_channels + conditioning_channels,
        "out_channels": latent_channels,
        "block_out_channels": widths,
        "layers_per_block": config.unet_layers_per_block,
        "norm_num_groups": config.unet_norm_num_groups,
        "dropout": config.unet_dropout,
        "resnet_time_scale_shift": config.unet_time_scale_shift,
        "num_class_embeds": num_class_embeds,
    }
    if cross_attention_dim is None:
        unet = UNet2DModel(
            **shared,
            down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
            up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
            attention_head_dim=config.unet_attention_head_dim,
            add_attention=any(attention),
            attn_norm_num_groups=config.unet_norm_num_groups,  # otherwise scale_shift drops the middle block's norm
        )
    else:
        unet = UNet2DConditionModel(
            **shared,
            down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
            up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
            cross_attention_dim=cross_attention_dim,
            # here diffusers uses this name for the number of heads (its issue 2011)
            attention_head_dim=[max(1, width // config.unet_attention_head_dim) for width in widths],
        )
    if zero_branches:
        zero_residual_branches(unet)
    return unet


def zero_residual_branches(unet: StockUNet) -> None:
    """Set the last layer of every residual branch and of the network to zero, in place.

    Every block then starts as its skip connection, and the U-Net predicts 0, the best constant for each prediction_type
    on normalized latents. diffusers initializes these layers randomly. The code of Ho et al. (arXiv 2006.11239) and of
    Dhariwal and Nichol (arXiv 2105.05233) initializes them with zeros, after Goyal et al. (arXiv 1706.02677, 5.1).
    """
    last_layers, inside = [unet.conv_out], set()
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last_layers.append(module.conv2)
        elif isinstance(module, Transformer2DModel):  # its attention layers are branches inside a branch
            last_layers.append(module.proj_out)
            inside.update(module.modules())
        elif isinstance(module, Attention) and module not in inside:
            last_layers.append(module.to_out[0])
    for layer in last_layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
