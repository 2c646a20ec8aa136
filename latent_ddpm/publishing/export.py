"""Write a pipeline folder that stock diffusers loads, and convert one between LDMPipeline and LatentDDPMPipeline.

A folder without conditioning names diffusers' LDMPipeline, so it loads without any code of ours. A folder with
conditioning, or with an autoencoder that cannot hold the normalization of its latents, names LatentDDPMPipeline, whose
code is the `pipeline.py` in the folder. Should diffusers drop LDMPipeline, which it keeps in `pipelines/deprecated`,
every folder names LatentDDPMPipeline, and `convert_pipeline` changes the folders that were published before.
"""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DModel, VQModel

import pipeline_latent_ddpm
from latent_ddpm.autoencoder.scaling import fold_normalization
from latent_ddpm.autoencoder.stock import StockAutoencoder, code_count, load_autoencoder
from latent_ddpm.errors import UserError
from latent_ddpm.files import replace_folder, write_whole
from latent_ddpm.training.acceleration import contiguous

STOCK, OWN = "LDMPipeline", ["pipeline", "LatentDDPMPipeline"]  # `_class_name` in model_index.json

INTRODUCTION = """---
library_name: diffusers
{task}tags:
- diffusers
- latent-diffusion
---

# {name}

A latent diffusion model, trained from scratch with latent-ddpm. It consists of {autoencoder} (latents
{channels}x{size}x{size}) and a {kind} with {parameters:.1f} million parameters ({prediction}). Run this inside the
folder:

```python
from diffusers import DiffusionPipeline
{needs}
pipeline = DiffusionPipeline.from_pretrained({load})
pipeline({words}, num_inference_steps={steps}).images[0].save("sample.png")
```
"""
TRUSTED = '".", custom_pipeline=".", trust_remote_code=True'
OUTSIDE = """
The pipeline normalizes the latents: {name} cannot hold the normalization in its weights, and diffusers' LDMPipeline
only divides by a scaling factor. So the folder brings its own pipeline as code, which runs only if you trust it. Its
components are those of diffusers.
"""
RICHER = f"""
`pipeline.py` has more features: given latents, every scheduler, callbacks, all output types. Load it with
`DiffusionPipeline.from_pretrained({TRUSTED})`.
"""
KL_NOTE = """
The first way logs that `vqvae` is an {name} where a VQModel is expected. LDMPipeline works with both.
"""


def stock_pipeline() -> type | None:
    """diffusers' LDMPipeline; None where the installed diffusers does not have it."""
    try:
        from diffusers import LDMPipeline
    except (ImportError, RuntimeError):  # RuntimeError: a lazy import of diffusers that fails
        return None
    return LDMPipeline


def words_for(class_name: str, codes: int | None) -> str:
    """An autoencoder in words: its kind, or the name of a class that people know by it."""
    if codes:
        return f"a VQ-VAE with {codes:,} codes"
    return "a KL-VAE" if class_name == "AutoencoderKL" else f"an {class_name}"


def example_words(conditions: dict[str, Any]) -> str:
    """The arguments of a pipeline's example call, as Python."""
    words = []
    if conditions.get("class_names"):
        words.append(f"class_labels={conditions['class_names'][:2]!r}")
    if "conditioning_classes" in conditions:
        words.append('conditioning_image=Image.open("map.png")')
    if "max_caption_tokens" in conditions:
        words.append('prompt="..."')
    return ", ".join(words) or "batch_size=16"


def export_pipeline(
    folder: Path,
    autoencoder: StockAutoencoder,
    unet: UNet2DModel,
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    record_steps: bool = False,
    **conditions: Any,
) -> None:
    """Write a folder that `DiffusionPipeline.from_pretrained` of stock diffusers loads.

    Args:
        folder: replaced atomically.
        autoencoder: with the normalization folded in.
        unet: the averaged U-Net; it predicts in scaled latents.
        scheduler: the pipeline's scheduler.
        num_inference_steps: in the card's example.
        record_steps: whether this is the number that LatentDDPMPipeline draws in when it is not told another, as for
            a few-step model. LDMPipeline has 50.
        conditions: further arguments of LatentDDPMPipeline: its conditions, and `latents_mean` and `latents_std`.
            Without any, the folder holds a stock LDMPipeline where the installed diffusers has one.
    """
    stock = None if conditions else stock_pipeline()
    conditioned = not conditions.keys() <= {"latents_mean", "latents_std"}
    if record_steps:
        scheduler = copy.copy(scheduler)
        scheduler.register_to_config(**{pipeline_latent_ddpm.RECORDED_STEPS: num_inference_steps})

    def write(aside: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = stock or pipeline_latent_ddpm.LatentDDPMPipeline
            pipeline = kind(vqvae=autoencoder, unet=contiguous(unet), scheduler=scheduler, **conditions)
            pipeline.save_pretrained(aside, safe_serialization=True)
        if stock is None:
            _set_class(aside, OWN)
        for path in aside.glob("*/config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)  # a path of this machine
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(pipeline_latent_ddpm.__file__, aside / "pipeline.py")
        codes = code_count(autoencoder)
        card = INTRODUCTION.format(
            task="" if conditioned else "pipeline_tag: unconditional-image-generation\n",
            load='"."' if stock else TRUSTED,
            needs="from PIL import Image\n" if "conditioning_classes" in conditions else "",
            kind=type(unet).__name__,
            name=folder.resolve().parent.name,
            autoencoder=words_for(type(autoencoder).__name__, codes),
            channels=unet.config.out_channels,
            size=unet.config.sample_size,
            parameters=unet.num_parameters() / 1e6,
            prediction=scheduler.config.prediction_type.replace("_", "-"),
            steps=num_inference_steps,
            words=example_words(conditions),
        )
        if stock:
            card += RICHER if codes else RICHER + KL_NOTE.format(name=type(autoencoder).__name__)
        if "latents_std" in conditions:
            card += OUTSIDE.format(name=type(autoencoder).__name__)
        (aside / "README.md").write_text(card, encoding="utf-8")

    replace_folder(folder, write)


# ----------------------------------------------------------------------------------------------------- conversion


def _set_class(folder: Path, class_name: str | list[str]) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    write_whole(folder / "model_index.json", json.dumps(index | {"_class_name": class_name}, indent=2) + "\n")


def _needs_own(folder: Path, index: dict[str, Any]) -> bool:
    """Whether a pipeline is conditioned, or normalizes latents itself, which LDMPipeline does not support."""
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    conditioned = unet.get("num_class_embeds") or unet.get("in_channels") != unet.get("out_channels")
    return bool(conditioned) or bool({"text_encoder", "text_encoder_id", "latents_std"} & index.keys())


def convert_pipeline(folder: Path, to_own: bool = True) -> bool:
    """Change which pipeline class an exported or published folder names; weights and configs stay.

    Converting to LatentDDPMPipeline writes the `pipeline.py` of this version. In README.md the calls that load the
    folder then name `custom_pipeline`; converting back leaves README.md as it is. Every file is written atomically.

    Args:
        folder: with a model_index.json.
        to_own: to LatentDDPMPipeline; False converts back to LDMPipeline.

    Returns:
        Whether anything changed.

    Raises:
        UserError: the folder holds no pipeline of these two classes, or its conditioning needs LatentDDPMPipeline.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        now = index["_class_name"]
        conditioned = _needs_own(folder, index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no latent diffusion pipeline: {error}") from error
    if now not in (STOCK, OWN):
        raise UserError(f"{folder} holds the pipeline {now}; only {STOCK} and {OWN[1]} can be converted.")
    wanted = OWN if to_own else STOCK
    if now == wanted:
        return False
    if not to_own and conditioned:
        does = "normalizes latents itself" if "latents_std" in index else "is conditioned"
        raise UserError(f"{folder} {does}, which {STOCK} does not support: it stays a {OWN[1]}.")
    if to_own:
        write_whole(folder / "pipeline.py", Path(pipeline_latent_ddpm.__file__).read_bytes())
    _set_class(folder, wanted)
    readme = folder / "README.md"
    if to_own and readme.exists():
        load = r"DiffusionPipeline\.from_pretrained\(\"([^\"]+)\"\)"
        own = r'DiffusionPipeline.from_pretrained("\1", custom_pipeline="\1", trust_remote_code=True)'
        write_whole(readme, re.sub(load, own, readme.read_text(encoding="utf-8")))
    return True


# --------------------------------------------------------------------------------------------------- a new decoder


@torch.no_grad()
def replace_decoder(folder: Path, autoencoder: Path) -> None:
    """Give a pipeline the decoder of another autoencoder that has its encoder, as `freeze_encoder` trains one.

    The U-Net stays valid, because the latents stay the same. The autoencoder's folder is replaced atomically.

    Args:
        folder: of the pipeline.
        autoencoder: folder of the autoencoder; it may have started from the pipeline's, or from that of stage 1.

    Raises:
        UserError: one of them is missing, or the encoders differ.
    """
    if not (folder / "model_index.json").exists():
        raise UserError(f"{folder} holds no latent diffusion pipeline: it has no model_index.json.")
    old, new = load_autoencoder(folder / "vqvae"), load_autoencoder(autoencoder)
    other = UserError(f"{autoencoder} has another encoder than {folder}: its decoder does not fit the U-Net.")
    if type(old) is not type(new) or not isinstance(old, (AutoencoderKL, VQModel)):
        raise other
    theirs, encoder = new.encoder.state_dict(), old.encoder.state_dict()
    if theirs.keys() != encoder.keys() or not all(torch.equal(theirs[name], encoder[name]) for name in encoder):
        raise other
    # the normalization that was folded into the pipeline's encoder after the new one's
    width = old.config.latent_channels
    rows, wanted = (model.quant_conv.weight[:width].flatten(1).double() for model in (new, old))
    std = (rows * wanted).sum(1) / wanted.pow(2).sum(1)
    if not torch.allclose(rows, std[:, None] * wanted, rtol=1e-3, atol=1e-5):
        raise other
    mean = new.quant_conv.bias[:width].double() - std * old.quant_conv.bias[:width].double()
    scale = 1 / old.config.scaling_factor
    same = torch.allclose(std, torch.ones_like(std), rtol=1e-5)
    fold_normalization(new, mean, scale if same else std * scale)
    replace_folder(folder / "vqvae", lambda aside: new.save_pretrained(aside, safe_serialization=True))
