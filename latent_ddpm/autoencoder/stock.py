"""Export to a stock diffusers VQModel or AutoencoderKL, and one interface to both classes."""

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
    """A stock VQModel with random weights and the config's architecture; `options` are further arguments of VQModel."""
    return VQModel(**_shape(config), num_vq_embeddings=config.num_vq_embeddings, **options)


def to_stock(model: Autoencoder, config: AutoencoderConfig) -> StockAutoencoder:
    """The stock VQModel (AutoencoderKL for `quantizer: kl`) with the same weights, latents and images."""
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
    """The stage 1 result, or any other folder of a stock VQModel or AutoencoderKL.

    Raises:
        UserError: the folder is missing or holds neither.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no autoencoder in {folder}. Run train_autoencoder.py with the same --output_dir first, "
            f"or give the autoencoder of another run with --autoencoder FOLDER."
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
    """The height and width of the latents for images of `config.resolution`.

    Raises:
        UserError: the autoencoder has other image channels, or its downsampling does not divide the resolution.
    """
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    if autoencoder.config.in_channels != config.image_channels:
        raise UserError(
            f"The autoencoder in {config.autoencoder_dir} is for images of {autoencoder.config.in_channels} channels, "
            f"image_channels is {config.image_channels}. Change image_channels or --autoencoder."
        )
    if config.resolution % factor:
        raise UserError(
            f"resolution {config.resolution} is not divisible by {factor}, the downsampling of the autoencoder in "
            f"{config.autoencoder_dir}."
        )
    return config.resolution // factor


def latents_of(autoencoder: StockAutoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, R, R) in [-1, 1] -> latents (B, D, h, w), without `scaling_factor`.

    A VQModel's latents before quantization, or the posterior means of an AutoencoderKL.
    """
    encoded = autoencoder.encode(images)
    return encoded.latents if isinstance(autoencoder, VQModel) else encoded.latent_dist.mode()


def code_count(autoencoder: StockAutoencoder) -> int:
    """Number of codes of a VQModel; 0 for an AutoencoderKL."""
    return autoencoder.config.num_vq_embeddings if isinstance(autoencoder, VQModel) else 0


def quantize_indices(vqvae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Code indices, int64 (B, h, w), of latents `encode(x).latents` (B, D, h, w)."""
    _, _, (_, _, indices) = vqvae.quantize(latents)
    return indices.view(latents.shape[0], *latents.shape[2:])
