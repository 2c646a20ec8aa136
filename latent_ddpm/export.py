"""From what we train to what stock diffusers loads: VQModel or AutoencoderKL, UNet2DModel, LDMPipeline."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LDMPipeline, SchedulerMixin, UNet2DModel, VQModel

import pipeline_latent_ddpm
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.files import fsync_path
from latent_ddpm.models.vqvae import Autoencoder

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


def _complete_convolutions(vae: AutoencoderKL) -> None:
    """Put identities in the place of 1x1 convolutions that a VAE lacks (those of SD3 and FLUX have none)."""
    width = vae.config.latent_channels
    for name, channels in (("quant_conv", 2 * width), ("post_quant_conv", width)):
        if getattr(vae, name) is None:
            conv = torch.nn.Conv2d(channels, channels, 1).to(vae.device, vae.dtype).requires_grad_(False)
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
            setattr(vae, name, conv)
            vae.register_to_config(**{f"use_{name}": True})


@torch.no_grad()
def fold_normalization(autoencoder: StockAutoencoder, mean: torch.Tensor, std: float) -> StockAutoencoder:
    """Shift and scale a stock autoencoder's latent space, in place, without changing one image.

    Afterwards `latents_of(x) * config.scaling_factor` has zero mean per channel and unit variance over all.
    The mean goes into the biases of the two 1x1 convolutions and a VQModel's table of codes; the standard deviation is
    one number for all channels, so that nearest codes stay nearest, and becomes `scaling_factor`.

    Args:
        autoencoder: a stock VQModel or AutoencoderKL.
        mean: (D,) of `latents_of` over the training set.
        std: its standard deviation over all channels, around the channels' means.
    """
    if isinstance(autoencoder, VQModel):
        autoencoder.quantize.embedding.weight -= mean.to(autoencoder.quantize.embedding.weight)
    else:
        _complete_convolutions(autoencoder)
        autoencoder.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)  # of other conventions
    mean = mean.to(autoencoder.quant_conv.bias)
    autoencoder.quant_conv.bias[: len(mean)] -= mean  # a KL-VAE's logarithms of variances follow after its means
    autoencoder.post_quant_conv.bias += autoencoder.post_quant_conv.weight[:, :, 0, 0] @ mean
    autoencoder.register_to_config(scaling_factor=1.0 / std)
    return autoencoder


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


def folder_name(recipe: str) -> str:
    """A folder's name for a recipe of a benchmark and its keys: "ours --optimizer muon" -> "ours-optimizer-muon"."""
    return re.sub(r"[^\w.=-]+", "-", recipe.replace("--", "")).strip("-")


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a folder aside, then put it in the place of `folder`."""
    aside, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        for path in (*aside.rglob("*"), aside):
            fsync_path(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
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

A latent diffusion model trained from scratch with latent-ddpm: {autoencoder} (latents
{channels}x{size}x{size}) and a {kind} of {parameters:.1f} million parameters, {prediction}. From inside this folder:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".")
pipeline(batch_size=16, num_inference_steps={steps}).images[0].save("sample.png")
```

`pipeline.py` is a richer pipeline (given latents, every scheduler, callbacks, all output types):
`DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)`.
"""
CONDITIONED = """---
library_name: diffusers
tags:
- diffusers
- latent-diffusion
---

# {name}

A latent diffusion model trained from scratch with latent-ddpm: {autoencoder} (latents
{channels}x{size}x{size}) and a {kind} of {parameters:.1f} million parameters, {prediction}. From inside this folder:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(".", custom_pipeline=".", trust_remote_code=True)
pipeline({words}, num_inference_steps={steps}).images[0].save("sample.png")
```
"""
KL_NOTE = """
The first way logs that `vqvae` is an AutoencoderKL where a VQModel was expected: LDMPipeline names only that class, and
works with both.
"""


def example_words(conditions: dict[str, Any]) -> str:
    """The arguments of a pipeline's example call, as Python."""
    words = []
    if conditions.get("class_names"):
        words.append(f"class_labels={conditions['class_names'][:2]!r}")
    if "conditioning_classes" in conditions:
        words.append('conditioning_image=PIL.Image.open("map.png")')
    if "max_caption_tokens" in conditions:
        words.append('prompt="..."')
    return ", ".join(words) or "batch_size=16"


def export_pipeline(
    folder: Path,
    autoencoder: StockAutoencoder,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    **conditions: Any,
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` of an untouched diffusers loads.

    Args:
        folder: replaced as a whole.
        autoencoder: with the normalization folded in.
        unet: in model space.
        scheduler: that the pipeline samples with.
        num_inference_steps: stands in the card's example.
        conditions: what LatentDDPMPipeline is told of them. Without any the folder holds a stock LDMPipeline; else, for
            that has no word for them, it names the class in its pipeline.py.
    """

    def write(aside: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = pipeline_latent_ddpm.LatentDDPMPipeline if conditions else LDMPipeline
            pipeline = kind(vqvae=autoencoder, unet=unet, scheduler=scheduler, **conditions)
            pipeline.save_pretrained(aside, safe_serialization=True)
        if conditions:
            index = json.loads((aside / "model_index.json").read_text())
            index["_class_name"] = ["pipeline", index["_class_name"]]
            (aside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for path in aside.glob("*/config.json"):
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(pipeline_latent_ddpm.__file__, aside / "pipeline.py")
        codes = code_count(autoencoder)
        card = (CONDITIONED if conditions else CARD).format(
            kind=type(unet).__name__,
            name=folder.resolve().parent.name,
            autoencoder=f"a VQ-VAE with {codes} codes" if codes else "a KL-VAE",
            channels=unet.config.out_channels,
            size=unet.config.sample_size,
            parameters=unet.num_parameters() / 1e6,
            prediction=scheduler.config.prediction_type.replace("_", "-"),
            steps=num_inference_steps,
            words=example_words(conditions),
        )
        (aside / "README.md").write_text(card if codes or conditions else card + KL_NOTE)

    replace_folder(folder, write)
