"""Stage 2's network: a stock diffusers UNet2DModel, shaped by the config."""

from diffusers import UNet2DModel

from latent_ddpm.config import UNetConfig
from latent_ddpm.errors import UserError


def make_unet(config: UNetConfig, latent_channels: int, latent_size: int) -> UNet2DModel:
    """A UNet2DModel with random weights for latents (B, latent_channels, latent_size, latent_size).

    Raises:
        UserError: the latents are not divisible by the U-Net's downsampling.
    """
    widths, levels = config.unet_block_out_channels, len(config.unet_block_out_channels)
    factor = 2 ** (levels - 1)
    if latent_size % factor:
        raise UserError(
            f"The autoencoder's latents of {latent_size}x{latent_size} do not fit the U-Net: its {levels} levels "
            f"(unet_block_out_channels {widths}) need a multiple of {factor}."
        )
    attention = [level in config.unet_attention_levels for level in range(levels)]
    return UNet2DModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths,
        layers_per_block=config.unet_layers_per_block,
        down_block_types=["AttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        up_block_types=["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)],
        attention_head_dim=config.unet_attention_head_dim,
        norm_num_groups=config.unet_norm_num_groups,
        dropout=config.unet_dropout,
        add_attention=any(attention),
    )
