"""Stage 2's network: a stock diffusers UNet2DModel, shaped by the config."""

from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from latent_ddpm.config import UNetConfig
from latent_ddpm.errors import UserError

StockUNet = UNet2DModel | UNet2DConditionModel


def check_latents_fit(config: UNetConfig, latent_size: int) -> None:
    """Raises `UserError` when latents of that side are not divisible by the U-Net's downsampling."""
    widths, levels = config.unet_block_out_channels, len(config.unet_block_out_channels)
    factor = 2 ** (levels - 1)
    if latent_size % factor:
        raise UserError(
            f"The autoencoder's latents of {latent_size}x{latent_size} do not fit the U-Net: its {levels} levels "
            f"(unet_block_out_channels {widths}) need a multiple of {factor}."
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
    """A UNet2DModel with initial weights for latents (B, latent_channels, latent_size, latent_size).

    Random, but for the layers that `zero_residual_branches` clears unless `zero_branches` is false. With conditions
    (latent_ddpm/diffusion/conditions.py) it has a class embedding of `num_class_embeds`, and input channels for
    `conditioning_channels` behind the latents'. With text of `cross_attention_dim` it is a UNet2DConditionModel.

    Raises:
        UserError: the latents are not divisible by the U-Net's downsampling.
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
            attn_norm_num_groups=config.unet_norm_num_groups,  # which the middle loses with scale_shift otherwise
        )
    else:
        unet = UNet2DConditionModel(
            **shared,
            down_block_types=["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
            up_block_types=["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
            cross_attention_dim=cross_attention_dim,
            # by that name diffusers means the number of heads here (its issue 2011)
            attention_head_dim=[max(1, width // config.unet_attention_head_dim) for width in widths],
        )
    if zero_branches:
        zero_residual_branches(unet)
    return unet


def zero_residual_branches(unet: StockUNet) -> None:
    """Set the last layer of every residual branch and of the network to zero, in place.

    Every block then starts as its skip and the U-Net as the prediction 0, the best constant for each
    prediction_type on normalized latents. diffusers leaves these layers random; Ho et al. (arXiv 2006.11239) and
    Dhariwal and Nichol (arXiv 2105.05233) start from zero in their code, after Goyal et al. (arXiv 1706.02677, 5.1).
    """
    last_layers, inside = [unet.conv_out], set()
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            last_layers.append(module.conv2)
        elif isinstance(module, Transformer2DModel):  # its attention layers are branches inside of a branch
            last_layers.append(module.proj_out)
            inside.update(module.modules())
        elif isinstance(module, Attention) and module not in inside:
            last_layers.append(module.to_out[0])
    for layer in last_layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
