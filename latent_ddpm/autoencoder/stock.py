"""Our autoencoder as a stock diffusers VQModel or AutoencoderKL, and one interface to both classes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError

StockAutoencoder = VQModel | AutoencoderKL


def _shape(config: AutoencoderConfig) -> dict[str, Any]:
    """The arguments that VQModel and AutoencoderKL share."""
    levels = len(config.block_out_channels)
    return {
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "sample_size": config.resolution,
        "norm_num_groups": config.norm_num_groups,
    }


def new_vqmodel(config: AutoencoderConfig, **options: Any) -> VQModel:
    """A stock VQModel of the config's shape with random weights; `options` are VQModel's other arguments."""
    return VQModel(**_shape(config), num_vq_embeddings=config.num_vq_embeddings, **options)


def to_stock(model: Autoencoder, config: AutoencoderConfig) -> StockAutoencoder:
    """The stock VQModel, or for `quantizer: kl` AutoencoderKL, with the same weights: same latents, same images."""
    options = {"mid_block_add_attention": config.mid_block_add_attention, "scaling_factor": 1.0}
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("quantizer.")}
    if config.quantizer == "kl":
        stock = AutoencoderKL(**_shape(config), **options)
    else:
        stock = new_vqmodel(config, **options)
        weights["quantize.embedding.weight"] = model.quantizer.table().detach()
    stock.load_state_dict(weights)
    return stock.eval().requires_grad_(False)


def load_autoencoder(folder: Path) -> StockAutoencoder:
    """Stage 1's result, or any stock VQModel or AutoencoderKL folder.

    Raises:
        UserError: the folder is missing or is neither.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no autoencoder in {folder}. Run train_autoencoder.py with the same --output_dir first, "
            f"or name the folder of another run's autoencoder with --autoencoder."
        )
    classes = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}
    try:
        name = VQModel.load_config(folder).get("_class_name")
        if name not in classes:
            raise ValueError(f"its config.json names the class {name}, not {' or '.join(classes)}.")
        return classes[name].from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder} is not an autoencoder that can be loaded: {error}") from error


def check_autoencoder_fits(autoencoder: StockAutoencoder, config: UNetConfig) -> int:
    """The side of the latents of images of `config.resolution`.

    Raises:
        UserError: the autoencoder is for other channels, or does not divide the resolution.
    """
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if autoencoder.config.in_channels != config.image_channels:
        raise UserError(
            f"The autoencoder in {config.autoencoder_dir} is for images of {autoencoder.config.in_channels} channels, "
            f"image_channels is {config.image_channels}."
        )
    if config.resolution % factor:
        raise UserError(
            f"resolution {config.resolution} is not divisible by {factor}, the downsampling of the autoencoder in "
            f"{config.autoencoder_dir}."
        )
    return config.resolution // factor


def latents_of(autoencoder: StockAutoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, R, R) in [-1, 1] -> latents (B, D, h, w), not scaled.

    Of a VQModel before quantization, of an AutoencoderKL the posterior's means.
    """
    encoded = autoencoder.encode(images)
    return encoded.latents if isinstance(autoencoder, VQModel) else encoded.latent_dist.mode()


def code_count(autoencoder: StockAutoencoder) -> int:
    """Codes in a VQModel's table; 0 of an AutoencoderKL."""
    return autoencoder.config.num_vq_embeddings if isinstance(autoencoder, VQModel) else 0


def quantize_indices(vqvae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Indices of the codes of `encode(x).latents` (B, D, h, w): int64 (B, h, w)."""
    _, _, (_, _, indices) = vqvae.quantize(latents)
    return indices.view(latents.shape[0], *latents.shape[2:])
