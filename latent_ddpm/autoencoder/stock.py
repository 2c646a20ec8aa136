"""Autoencoders of diffusers: the export to a VQModel or AutoencoderKL, and one interface to every class."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel

from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.pretrained import FILES, commit_of, find_model, hash_folder, load_whole, only_pickles, pickles_in
from pipeline_latent_ddpm import (
    AUTOENCODERS,
    downsampling_of,
    encode_images,
    image_channels_of,
    latent_channels_of,
)

StockAutoencoder = ModelMixin  # of a class in AUTOENCODERS
PARTS = ("vae", "vqvae", "vqgan", "movq", "autoencoder", "pipeline/vqvae")  # in pipelines, and in a run of ours
SIGNED = "_image_range"  # key of the config of an AutoencoderRAE that takes images in [-1, 1]


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


def autoencoder_folder(config: UNetConfig) -> Path:
    """The folder of a run's autoencoder, downloaded if it is on the Hub.

    Raises:
        UserError: as `find_model`.
    """
    if config.autoencoder is None:
        return config.autoencoder_dir
    return find_model(
        config.autoencoder, "autoencoder", PARTS, config.autoencoder_subfolder, config.autoencoder_revision
    )


def autoencoder_hash(folder: Path) -> str:
    """What identifies the autoencoder in a folder.

    In the Hub's cache other programs may add files to the folder, so there only those count that are read.
    """
    return hash_folder(folder, FILES if commit_of(folder) else ("*",))


def normalization_of(config: UNetConfig, autoencoder: StockAutoencoder) -> str:
    """How the latents of a new run are normalized: "overall", "channel" or "keep".

    Raises:
        UserError: the config asks for channels, and the autoencoder has codes.
    """
    codes, asked = code_count(autoencoder), config.latent_normalization
    if codes and asked == "channel":
        raise UserError("latent_normalization channel would change which code is nearest: set overall.")
    return asked or ("overall" if codes or is_of_a_run(config) else "channel")


def kept_normalization(autoencoder: StockAutoencoder, folder: Path) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Mean (D,) and standard deviation, one or (D,), that the latents of a published pipeline were trained with.

    Args:
        autoencoder: as it was loaded.
        folder: of the autoencoder; its pipeline may be around it.
    """
    channels = latent_channels_of(autoencoder)
    try:
        index = json.loads((folder.parent / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = {}
    if index.get("latents_std"):
        return torch.tensor(index["latents_mean"]), torch.tensor(index["latents_std"])
    mean = torch.full((channels,), float(autoencoder.config.get("shift_factor") or 0.0))
    return mean, 1 / (autoencoder.config.get("scaling_factor") or 1.0)


def is_of_a_run(config: UNetConfig) -> bool:
    """Whether the autoencoder is that of this run, or lies in the folder of another one."""
    return config.autoencoder is None or (autoencoder_folder(config).parent / "train_autoencoder.yaml").exists()


def load_autoencoder(folder: Path, name: str | None = None) -> StockAutoencoder:
    """The stage 1 result, or any other folder of an autoencoder in AUTOENCODERS, in float32.

    Its images are in [-1, 1], also those of an AutoencoderRAE.

    Args:
        folder: of config.json and safetensors.
        name: what the user calls it, for messages.

    Raises:
        UserError: the folder is missing, holds something else, or has its weights only as a pickle.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no autoencoder in {folder}. Run train_autoencoder.py with the same --output_dir first, "
            f"or give another autoencoder with --autoencoder FOLDER or --autoencoder OWNER/NAME."
        )
    if not list(folder.glob("*.safetensors")) and (found := pickles_in([path.name for path in folder.iterdir()])):
        raise UserError(f"{name or folder} {only_pickles(found)}")
    try:
        kind = _class_in(folder)
        autoencoder = load_whole(kind, folder)
    except Exception as error:  # diffusers, safetensors and the class itself raise unrelated ones
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"{name or folder} is not an autoencoder that can be loaded: {reason}") from error
    autoencoder = autoencoder.float().eval().requires_grad_(False)
    return _signed(autoencoder) if kind.__name__ == "AutoencoderRAE" else autoencoder


def _class_in(folder: Path) -> type[ModelMixin]:
    """The class that a config.json names.

    Raises:
        ValueError: it is not one of an autoencoder that can be used.
    """
    kind = VQModel.load_config(folder).get("_class_name")
    if kind not in AUTOENCODERS:
        raise ValueError(f"its config.json names the class {kind}, which is none of {', '.join(AUTOENCODERS)}.")
    if not hasattr(diffusers, kind):
        raise ValueError(f"diffusers {diffusers.__version__} does not have {kind}; a newer one does.")
    return getattr(diffusers, kind)


def new_like(folder: Path) -> StockAutoencoder:
    """An autoencoder of the class and sizes of that in a folder, with random weights.

    Raises:
        UserError: the folder does not hold an autoencoder.
    """
    try:
        kind = _class_in(folder)
        return kind.from_config(kind.load_config(folder)).eval()
    except Exception as error:  # whatever the class raises
        raise UserError(f"{folder} is not an autoencoder: {' '.join(str(error).split())[:400]}") from error


@torch.no_grad()
def _signed(autoencoder: StockAutoencoder) -> StockAutoencoder:
    """Make an AutoencoderRAE take and give images in [-1, 1] instead of [0, 1], in place.

    Its normalization of pixels, (x - mean) / std, becomes that of 2 x - 1.
    """
    if autoencoder.config.get(SIGNED) is None:
        mean, std = 2 * autoencoder.encoder_mean - 1, 2 * autoencoder.encoder_std
        autoencoder.encoder_mean.copy_(mean)
        autoencoder.encoder_std.copy_(std)
        norms = {"encoder_norm_mean": mean.flatten().tolist(), "encoder_norm_std": std.flatten().tolist()}
        autoencoder.register_to_config(**norms, **{SIGNED: [-1, 1]})
    return autoencoder


def check_autoencoder_fits(autoencoder: StockAutoencoder, config: UNetConfig) -> int:
    """The height and width of the latents for images of `config.resolution`.

    Raises:
        UserError: the autoencoder has other image channels, or makes no images of this resolution.
    """
    factor, channels = downsampling_of(autoencoder), image_channels_of(autoencoder)
    name = config.autoencoder or config.autoencoder_dir
    if channels != config.image_channels:
        raise UserError(
            f"The autoencoder in {name} is for images of {channels} channels, image_channels is "
            f"{config.image_channels}. Change image_channels or --autoencoder."
        )
    fixed = getattr(autoencoder, "decoder_image_size", config.resolution)
    if config.resolution != fixed:
        raise UserError(f"The autoencoder in {name} makes images of {fixed} pixels only: set resolution {fixed}.")
    if config.resolution % factor:
        raise UserError(
            f"resolution {config.resolution} is not divisible by {factor}, the downsampling of the autoencoder in "
            f"{name}."
        )
    return config.resolution // factor


def latents_of(autoencoder: StockAutoencoder, images: torch.Tensor) -> torch.Tensor:
    """Images (B, C, R, R) in [-1, 1] -> latents (B, D, h, w), without `scaling_factor`.

    A VQModel's latents before quantization, or the mode of a posterior.
    """
    return encode_images(autoencoder, images)


def code_count(autoencoder: StockAutoencoder) -> int:
    """Number of codes of a VQModel; 0 for other classes."""
    return autoencoder.config.num_vq_embeddings if isinstance(autoencoder, VQModel) else 0


def quantize_indices(vqvae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Code indices, int64 (B, h, w), of latents `encode(x).latents` (B, D, h, w)."""
    _, _, (_, _, indices) = vqvae.quantize(latents)
    return indices.view(latents.shape[0], *latents.shape[2:])
