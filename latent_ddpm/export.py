"""From what we train to what stock diffusers loads: VQModel, UNet2DModel, LDMPipeline."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, LDMPipeline, SchedulerMixin, UNet2DModel, VQModel

import pipeline_latent_ddpm
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.models.vqvae import VQVAE


def new_vqmodel(config: AutoencoderConfig, **options: Any) -> VQModel:
    """A stock VQModel of the config's shape with random weights; `options` are VQModel's other arguments."""
    levels = len(config.block_out_channels)
    return VQModel(
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        sample_size=config.resolution,
        num_vq_embeddings=config.num_vq_embeddings,
        norm_num_groups=config.norm_num_groups,
        **options,
    )


def to_vqmodel(model: VQVAE, config: AutoencoderConfig) -> VQModel:
    """The stock VQModel with the same weights: same latents, same codes, same images."""
    stock = new_vqmodel(config, mid_block_add_attention=config.mid_block_add_attention, scaling_factor=1.0)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("quantizer.")}
    weights["quantize.embedding.weight"] = model.quantizer.table().detach()
    stock.load_state_dict(weights)
    return stock.eval().requires_grad_(False)


@torch.no_grad()
def fold_normalization(vqvae: VQModel, mean: torch.Tensor, std: float) -> VQModel:
    """Shift and scale a VQModel's latent space, in place, without changing one image.

    Afterwards `encode(x).latents * config.scaling_factor` has zero mean per channel and unit variance over all.
    The mean goes into the biases of the two 1x1 convolutions and the table of codes; the standard deviation is
    one number for all channels, so that nearest codes stay nearest, and becomes `scaling_factor`.

    Args:
        vqvae: a stock VQModel.
        mean: (D,) of `encode(x).latents` over the training set.
        std: its standard deviation over all channels, around the channels' means.
    """
    mean = mean.to(vqvae.quant_conv.bias)
    vqvae.quant_conv.bias -= mean
    vqvae.quantize.embedding.weight -= mean
    vqvae.post_quant_conv.bias += vqvae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vqvae.register_to_config(scaling_factor=1.0 / std)
    return vqvae


def load_vqmodel(folder: Path) -> VQModel:
    """Stage 1's result, or any stock VQModel folder.

    Raises:
        UserError: the folder is missing or is not a VQModel.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no autoencoder in {folder}. Run train_autoencoder.py with the same --output_dir first, "
            f"or name the folder of another run's autoencoder with --autoencoder."
        )
    try:
        return VQModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"{folder} is not an autoencoder that can be loaded: {error}") from error


def check_autoencoder_fits(vqvae: VQModel, config: UNetConfig) -> int:
    """The side of the latents of images of `config.resolution`.

    Raises:
        UserError: the autoencoder is for other channels, or does not divide the resolution.
    """
    factor = 2 ** (len(vqvae.config.block_out_channels) - 1)
    if vqvae.config.in_channels != config.image_channels:
        raise UserError(
            f"The autoencoder in {config.autoencoder_dir} is for images of {vqvae.config.in_channels} channels, "
            f"image_channels is {config.image_channels}."
        )
    if config.resolution % factor:
        raise UserError(
            f"resolution {config.resolution} is not divisible by {factor}, the downsampling of the autoencoder in "
            f"{config.autoencoder_dir}."
        )
    return config.resolution // factor


def quantize_indices(vqvae: VQModel, latents: torch.Tensor) -> torch.Tensor:
    """Indices of the codes of `encode(x).latents` (B, D, h, w): int64 (B, h, w)."""
    _, _, (_, _, indices) = vqvae.quantize(latents)
    return indices.view(latents.shape[0], *latents.shape[2:])


def sampling_scheduler(training: DDPMScheduler) -> SchedulerMixin:
    """The scheduler of the export, made from the training schedule."""
    return DDIMScheduler.from_config(training.config, timestep_spacing="trailing", clip_sample=False)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder aside, then put it in the place of `folder`."""
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- latent-diffusion
- unconditional-image-generation
---

# {name}

A latent diffusion model trained from scratch with latent-ddpm: a VQ-VAE with {codes} codes (latents
{channels}x{size}x{size}) and a UNet2DModel of {parameters:.1f} million parameters, {prediction}.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
pipeline(batch_size=16, num_inference_steps={steps}).images[0].save("sample.png")
```

`pipeline.py` is a richer pipeline (given latents, every scheduler, callbacks, all output types):
`DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True)`.
"""


def export_pipeline(
    folder: Path, vqvae: VQModel, unet: UNet2DModel, scheduler: SchedulerMixin, num_inference_steps: int
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` of an untouched diffusers loads.

    Args:
        folder: replaced as a whole.
        vqvae: with the normalization folded in.
        unet: in model space.
        scheduler: that the pipeline samples with.
        num_inference_steps: stands in the card's example.
    """

    def write(aside: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            LDMPipeline(vqvae=vqvae, unet=unet, scheduler=scheduler).save_pretrained(aside, safe_serialization=True)
        shutil.copyfile(pipeline_latent_ddpm.__file__, aside / "pipeline.py")
        card = CARD.format(
            name=folder.resolve().parent.name,
            codes=vqvae.config.num_vq_embeddings,
            channels=unet.config.in_channels,
            size=unet.config.sample_size,
            parameters=unet.num_parameters() / 1e6,
            prediction=scheduler.config.prediction_type.replace("_", "-"),
            steps=num_inference_steps,
        )
        (aside / "README.md").write_text(card)

    replace_folder(folder, write)
