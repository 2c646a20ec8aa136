"""Write a pipeline folder that stock diffusers loads: LDMPipeline, or LatentDDPMPipeline with conditions."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from diffusers import LDMPipeline, SchedulerMixin, UNet2DModel

import pipeline_latent_ddpm
from latent_ddpm.autoencoder.stock import StockAutoencoder, code_count
from latent_ddpm.files import replace_folder

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
