"""Measure an autoencoder, a pipeline, or a pipeline of digits.

    python scripts/evaluate.py autoencoder --config configs/mnist.yaml
    python scripts/evaluate.py pipeline --config configs/mnist.yaml --num_images 5000 \\
        --schedulers ddim dpmsolver++ --steps 10 20 50
    python scripts/evaluate.py digits outputs/mnist/pipeline --num_images 1000 --num_inference_steps 20

Each prints its figures and writes them as JSON: to --json FILE, or to evaluation-<what>.json in the run's folder. Those
of a few-step pipeline are evaluation-few-steps.json and evaluation-few-steps-digits.json.

autoencoder
    Measures <output_dir>/autoencoder, or --autoencoder DIR, on the whole validation split. It takes the keys of
    train_unet.py.
    - PSNR, SSIM, images/s, peak memory. LPIPS with --lpips_net.
    - rFD: the Frechet distance between reconstructions and originals, with --feature_extractor efficientnet-lite0,
      inception or dinov2.
    - For a VQModel also codebook usage, perplexity, bits per pixel, and the standard deviations of the codes along the
      principal directions of their table. A direction near 0 carries nothing.
    Writes a figure beside the JSON.

pipeline
    Compares samples of <output_dir>/pipeline, or of --pipeline DIR [DIR ...], with as many training images (with all of
    them if there are fewer). It takes the keys of train_unet.py, and --num_images, --seed, --batch_size.
    - Frechet distance, KID, precision, recall, density and coverage in the features of --feature_extractor (by default
      efficientnet-lite0), and images/s.
    - The median distance from a sample to its nearest training image, and the same for held-out images. If a model has
      memorized its training set, its samples are much nearer than held-out images are.
    - --schedulers and --steps: every scheduler is measured with every number of steps. The default is the pipeline's
      own scheduler with num_inference_steps, or for a few-step pipeline with the number that it is made for.
    - --reconstructions also measures reconstructions of the training images. If samples come close to that figure, the
      autoencoder is the limit.
    - --max_real_images N uses N training images instead of all. On a CPU, all of them can take an hour. Their features
      are cached in --feature_cache, by default <output_dir>/cache/features. Mirrored training images are not used,
      because their features hardly differ.
    - With several pipelines, the default of --json is evaluation-pipelines.json. All draw from the same noise.
    Writes beside the JSON: -samples.png (a row per setting; a column shares its noise; conditioning images on top),
    -neighbours.png (samples of the best setting and their nearest training images) and, for several settings, a figure
    of their Frechet distances.
    With `accelerate launch` instead of `python`, the processes share the work and draw the same samples. On a CPU each
    process uses one thread, so start one process per core.

    A conditional pipeline gets the conditions of the training images that it is compared with.
    - class_agreement: how often a linear classifier, trained on features of the training images, sees the class that
      was asked for. held_out_class_agreement is the same for held-out images.
    - --guidance_scales measures several scales. --guidance_interval LOW HIGH and --guidance_pipeline DIR are those of
      scripts/sample.py. --caption_templates '["picture of a {}"]' replaces the wordings of training.
    - conditioning_psnr, for super-resolution: PSNR in dB between the small input and the sample, downscaled again (the
      consistency of arXiv 2104.07636); also for reconstructions.

digits
    Draws digits and judges them with a small classifier trained on the embedded digits.
    - A model with classes is asked for all of them in turn. class_agreement: how often the classifier sees that class.
    - A model with silhouettes gets those of digits that the classifier was not trained on. iou: mean intersection over
      union of silhouette and sample.
    - A model with text gets the --prompts in turn; {} stands for the name of the digit.
    - --guidance_scale sets the guidance.
    Writes -samples.png beside the JSON: the first samples, under their silhouettes.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.nn.utils.rnn import pad_sequence

from latent_ddpm.autoencoder.losses import TRUNKS, load_lpips
from latent_ddpm.autoencoder.stock import (
    autoencoder_folder,
    check_autoencoder_fits,
    code_count,
    latents_of,
    load_autoencoder,
    quantize_indices,
)
from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.captions import read_captions
from latent_ddpm.data.dataset import ImageDataset, eval_batches, open_image_dataset
from latent_ddpm.data.images import to_float, to_uint8
from latent_ddpm.data.latents import images_for_run
from latent_ddpm.data.sources.base import SubsetSource
from latent_ddpm.data.sources.embedded import NUMBER_WORDS
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.diffusion.conditions import ConditioningImages
from latent_ddpm.diffusion.guidance import add_guidance_arguments, guidance_of
from latent_ddpm.diffusion.sampling import (
    draw_shared,
    find_scheduler,
    image_shape,
    load_pipeline,
    with_scheduler,
)
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.digits import (
    digit_probabilities,
    digit_tensors,
    intersection_over_union,
    judge,
    silhouettes,
    train_digit_classifier,
)
from latent_ddpm.evaluation.features import (
    EXTRACTORS,
    MIN_IMAGES,
    cached_features,
    check_installed,
    compare_features,
    extract_features,
    frechet_distance,
    load_extractor,
    nearest,
)
from latent_ddpm.evaluation.grids import make_grid, reconstruction_grid
from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder, psnr
from latent_ddpm.files import save_png, write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.random import permutation
from latent_ddpm.system import peak_resident_bytes
from latent_ddpm.training.launch import make_accelerator, run
from pipeline_latent_ddpm import DEFAULT_STEPS, LatentDDPMPipeline, decode_latents


def show_json(path: Path, result: dict) -> None:
    write_json(path, result)
    print(json.dumps(result, indent=1))
    print(f"written to {path}", file=sys.stderr)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def images_per_second(function: Callable[[], object], images: int, device: torch.device) -> float:
    """Median over 5 calls, after a warm-up call."""
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return images / statistics.median(seconds[1:])


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU since the process started, or else the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return peak_resident_bytes() / 2**30


def draw_autoencoder(
    path: Path, counts: torch.Tensor, errors: torch.Tensor, originals: torch.Tensor, made: torch.Tensor
) -> None:
    """A figure: sorted uses of the codes (K,), if any; the best and worst reconstructions under the originals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = 3 if len(counts) else 2
    figure, axes = plt.subplots(1, panels, figsize=(13 / 3 * panels, 3.6), constrained_layout=True)
    if len(counts):
        share = counts.sort(descending=True).values / counts.sum()
        axes[0].bar(range(len(share)), share.numpy(), width=1.0)
        axes[0].axhline(1 / len(share), color="black", linewidth=0.8)
        axes[0].set_xlabel("codes, most used first (line: all alike)")
        axes[0].set_ylabel("share of positions")
    order = errors.argsort(descending=True)
    for axis, chosen, title in ((axes[-2], order[:16], "best"), (axes[-1], order[-16:].flip(0), "worst")):
        grid = reconstruction_grid(to_float(originals[chosen]), to_float(made[chosen]))
        axis.imshow(grid, cmap="gray", interpolation="nearest")
        axis.set_title(f"{title}: {errors[chosen].min():.1f} to {errors[chosen].max():.1f} dB")
        axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure_autoencoder(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--feature_extractor", choices=EXTRACTORS)
    parser.add_argument("--feature_cache", type=Path)
    parser.add_argument("--lpips_net", choices=sorted(TRUNKS))
    parser.add_argument("--lpips_weights")
    options, rest = parser.parse_known_args(argv)
    if options.feature_extractor:
        check_installed(options.feature_extractor)
    config = parse_config(UNetConfig, rest)
    output_dir = Path(config.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    autoencoder = load_autoencoder(autoencoder_folder(config), config.autoencoder).to(device)
    size = check_autoencoder_fits(autoencoder, config)
    lpips = load_lpips(options.lpips_net, options.lpips_weights).to(device) if options.lpips_net else None
    _, source = open_sources(config)
    bad_images = BadImages(output_dir / "bad_images.jsonl", len(source), config.max_bad_image_share)
    images = open_image_dataset(
        source, config, output_dir / "cache", bad_images, train=False, is_main=True, wait=lambda: None
    )
    codes = code_count(autoencoder)
    counts, distances, errors, seen, made = torch.zeros(codes), [], [], [], []

    def reconstruct(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        latents = latents_of(autoencoder, batch)
        reconstruction, indices = decode_latents(autoencoder, latents), None
        if codes:
            indices = quantize_indices(autoencoder, latents)
            counts.add_(torch.bincount(indices.flatten().cpu(), minlength=codes))
        errors.append(psnr(reconstruction, batch).cpu())
        seen.append(to_uint8(batch))
        made.append(to_uint8(reconstruction))
        if lpips is not None:
            distances.append(lpips(reconstruction.clamp(-1, 1), batch).flatten().cpu())
        return reconstruction, indices

    result = evaluate_autoencoder(reconstruct, eval_batches(images, 64, 0, 1), codes, device, with_ssim=True)
    originals, reconstructions = torch.cat(seen), torch.cat(made)
    if codes:
        result["bits_per_pixel"] = math.log2(codes) * size**2 / config.resolution**2
        table = autoencoder.quantize.embedding.weight.double().cpu() * autoencoder.config.scaling_factor
        deviations = torch.linalg.eigvalsh(table.T.cov()).clamp_min(0).sqrt().flip(0)
        result["table_deviations"] = [round(value, 4) for value in deviations.tolist()]
    if lpips is not None:
        result |= {"lpips": float(torch.cat(distances).mean()), "lpips_net": options.lpips_net}
    if options.feature_extractor and len(originals) > 1:
        distance = frechet_distance(
            originals, reconstructions, options.feature_extractor, device, first_cache=options.feature_cache
        )
        result |= {"rfd": distance, "rfd_feature_extractor": options.feature_extractor}
    batch = to_float(originals[:64].to(device))
    with torch.no_grad():
        latents = latents_of(autoencoder, batch)
        result["encode_images_per_second"] = images_per_second(
            lambda: latents_of(autoencoder, batch), len(batch), device
        )
        result["decode_images_per_second"] = images_per_second(
            lambda: decode_latents(autoencoder, latents), len(batch), device
        )
    result["peak_memory_gib"] = peak_memory(device)
    result["device"] = name_of(device)
    path = options.json or output_dir / "evaluation-autoencoder.json"
    command = "python scripts/evaluate.py autoencoder " + shlex.join(argv)
    show_json(path, {"command": command.strip(), **result})
    draw_autoencoder(path.with_suffix(".png"), counts, torch.cat(errors), originals, reconstructions)
    print(f"figure: {path.with_suffix('.png')}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------
# A pipeline against its dataset
# ---------------------------------------------------------------------------------------------------------------

SHOWN_NEIGHBOURS = 6  # of each of twice as many samples


@dataclasses.dataclass
class Reals:
    """Features of the real images.

    Attributes:
        images: the training images.
        train: float32 (T, D).
        indices: int64 (T,), which image each row is.
        rows: int64 (n,), those that samples are compared with.
        held_out_distance: median distance of held-out images to their nearest training image.
        held_out: how many those are.
        held_out_features: float32 (held_out, D).
        held_out_labels: integers (held_out,), the classes of those; -1 without.
    """

    images: ImageDataset
    train: torch.Tensor
    indices: torch.Tensor
    rows: torch.Tensor
    held_out_distance: float
    held_out: int
    held_out_features: torch.Tensor
    held_out_labels: np.ndarray


def read_reals(
    config: UNetConfig,
    count: int,
    most: int | None,
    extractor: str,
    network: torch.nn.Module,
    device: torch.device,
    cache: Path,
) -> Reals:
    """Features of the training images, at most `most` of them, and of the held-out ones; `count` of them to compare.

    Each image as the latent cache sees it.
    """
    output_dir = Path(config.output_dir)
    train_source, validation_source = open_sources(config)
    if most is not None and most < len(train_source):
        train_source = SubsetSource(train_source, sorted(permutation(0, 0, len(train_source))[:most]))
    sources = (train_source, validation_source)
    bad_images = BadImages(output_dir / "bad_images.jsonl", sum(map(len, sources)), config.max_bad_image_share)
    features, indices, datasets = [], [], []
    for source, name in zip(sources, ("training", "held-out"), strict=True):
        images = open_image_dataset(
            source, config, output_dir / "cache", bad_images, train=False, is_main=True, wait=lambda: None
        )
        if name == "training" and len(images) < MIN_IMAGES:
            raise UserError(f"There are only {len(images)} training images; at least {MIN_IMAGES} are needed.")
        batches = eval_batches(images, 64, num_workers=config.dataloader_num_workers)
        shown = progress_bar(batches, f"features of {name} images", math.ceil(len(images) / 64), leave=False)
        path = cache / f"{extractor}-{images.fingerprint}.safetensors"
        for kept, new in zip((features, indices), cached_features(network, shown, device, path), strict=True):
            kept.append(new)
        datasets.append(images)
    (train, held_out), (train_indices, held_out_indices) = features, indices
    known = datasets[1].labels
    held_out_labels = np.full(len(held_out), -1) if known is None else known[held_out_indices.numpy()]
    # always the same ones, whatever the seed of the samples; not the first ones, which may be of one class
    rows = torch.from_numpy(permutation(0, 0, len(train))[:count])
    distance = float(nearest(held_out, train, 1)[0].median())
    return Reals(datasets[0], train, train_indices, rows, distance, len(held_out), held_out, held_out_labels)


@torch.no_grad()
def measure_reconstructions(
    pipe: LatentDDPMPipeline, reals: Reals, network: torch.nn.Module, device: torch.device, enlarges: bool
) -> dict[str, float]:
    """Measure reconstructions of the compared training images: a limit for the samples.

    Args:
        enlarges: whether the pipeline is one that is given small images.
    """
    features, agreement = [], []
    for rows in progress_bar(reals.rows.split(64), "features of reconstructions", leave=False):
        images = torch.stack([reals.images.get(int(reals.indices[row])) for row in rows])
        latents = pipe.encode(to_float(images.to(device)))
        made = to_uint8(pipe.decode(latents))
        features.append(extract_features(network, [made], device))
        agreement.append(psnr_when_small(to_float(made.cpu()), to_float(images), tuple(latents.shape[2:])))
    figures = compare_features(torch.cat(features), reals.train[reals.rows])
    return figures | ({"conditioning_psnr": float(torch.cat(agreement).mean())} if enlarges else {})


def psnr_when_small(samples: torch.Tensor, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """PSNR in dB between samples (N, C, H, W) in [-1, 1] and images, both downscaled to `size`: (N,)."""
    return psnr(adaptive_avg_pool2d(samples, size), adaptive_avg_pool2d(images, size))


def neighbour_figures(distances: torch.Tensor, reals: Reals) -> dict[str, float | None]:
    """From the samples' distances (N,) to the nearest training image: the median, and its ratio to held-out images."""
    median, reference = float(distances.median()), reals.held_out_distance
    return {
        "neighbour_distance": median,
        # null where half of the held-out images are in the training set as well
        "neighbour_distance_over_held_out": median / reference if reference else None,
    }


def draw_neighbours(
    path: Path, title: str, samples: torch.Tensor, distances: torch.Tensor, found: torch.Tensor, reals: Reals
) -> None:
    """The samples closest to a training image, and the first samples: each beside its nearest training images.

    Args:
        samples: uint8 (N, C, H, W).
        distances, found: (N, SHOWN_NEIGHBOURS), of and to the nearest training images, as rows of `reals.train`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (("closest to a training image", distances[:, 0].argsort()[:SHOWN_NEIGHBOURS]),)
    panels += (("the first by number", torch.arange(SHOWN_NEIGHBOURS)),)
    scale = max(1, 64 // samples.shape[-1])
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), constrained_layout=True)
    for axis, (name, chosen) in zip(axes, panels, strict=True):
        rows = [torch.stack([samples[i], *(reals.images.get(int(reals.indices[j])) for j in found[i])]) for i in chosen]
        axis.imshow(make_grid(to_float(torch.cat(rows)), len(rows[0]), scale), cmap="gray", interpolation="nearest")
        axis.axvline(scale * samples.shape[-1] + 2.5, color="red", linewidth=2)
        near, far = distances[chosen, 0].min(), distances[chosen, 0].max()
        axis.set_title(f"{name}: nearest at {near:.2f} to {far:.2f}")
        axis.axis("off")
    reference = f"held-out images: nearest at {reals.held_out_distance:.2f} (median)"
    figure.suptitle(f"{title}: samples | their nearest training images; {reference}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def name_of_setting(setting: dict, settings: list[dict]) -> str:
    """What tells a setting from others, besides its steps."""
    schedulers = {other["scheduler"] for other in settings if other.get("pipeline") == setting.get("pipeline")}
    parts = [setting["pipeline"]] if "pipeline" in setting else []
    parts += [setting["scheduler"]] if len(schedulers) > 1 or not parts else []
    parts += [f"guidance {setting['guidance_scale']:g}"] if "guidance_scale" in setting else []
    return ", ".join(parts)


def draw_sweep(path: Path, settings: list[dict]) -> None:
    """A figure: Frechet distances over steps, one line per pipeline, scheduler and guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2), constrained_layout=True)
    lines: dict[str, list[tuple[int, float]]] = {}
    for setting in settings:
        lines.setdefault(name_of_setting(setting, settings), []).append((setting["steps"], setting["fd"]))
    for label, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xscale("log")
    steps = sorted({setting["steps"] for setting in settings})
    axis.set_xticks(steps, [str(number) for number in steps])
    axis.minorticks_off()
    axis.set_xlabel("sampling steps")
    axis.set_ylabel(f"Frechet distance ({settings[0]['feature_extractor']}, {settings[0]['samples']:,} samples)")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def print_table(settings: list[dict]) -> None:
    columns = ("pipeline",) if "pipeline" in settings[0] else ()
    columns += ("scheduler", "steps", "fd", "kid", "precision", "recall", "density", "coverage")
    columns += tuple(key for key in ("guidance_scale", "class_agreement", "conditioning_psnr") if key in settings[0])
    columns += ("neighbour_distance_over_held_out", "images_per_second")
    rows = [[f"{s[key]:.4g}" if isinstance(s[key], float) else str(s[key]) for key in columns] for s in settings]
    heads = [*columns[:-2], "near/held-out", "images/s"]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def pipeline_options(argv: list[str]) -> tuple[argparse.Namespace, UNetConfig]:
    """The options of `pipeline`, checked as far as possible without loading anything."""
    parser = argparse.ArgumentParser(prog="evaluate.py pipeline", add_help=False, allow_abbrev=False)
    parser.add_argument("--pipeline", nargs="+", dest="pipelines")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--feature_extractor", choices=EXTRACTORS, default="efficientnet-lite0")
    parser.add_argument("--schedulers", nargs="+", default=[])
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--feature_cache", type=Path)
    parser.add_argument("--max_real_images", type=int)
    parser.add_argument("--reconstructions", action="store_true")
    parser.add_argument("--guidance_scales", type=float, nargs="+")
    add_guidance_arguments(parser)
    options, rest = parser.parse_known_args(argv)
    check_installed(options.feature_extractor, "matplotlib")
    config = parse_config(UNetConfig, rest)
    for key, least in (("num_images", MIN_IMAGES), ("batch_size", 1), ("seed", 0)):
        if getattr(options, key) < least:
            raise UserError(f"--{key} is {getattr(options, key)}; it must be at least {least}.")
    if options.max_real_images is not None and options.max_real_images < MIN_IMAGES:
        raise UserError(f"--max_real_images is {options.max_real_images}; it must be at least {MIN_IMAGES}.")
    if options.steps and min(options.steps) < 1:
        raise UserError(f"--steps is {min(options.steps)}; it must be at least 1.")
    for name in options.schedulers:
        find_scheduler(name)
    default = Path(config.output_dir) / "pipeline"
    if options.pipelines is None and not (default / "model_index.json").exists():
        raise UserError(f"There is no pipeline in {default}. Run train_unet.py first, or name one with --pipeline.")
    options.pipelines = list(dict.fromkeys(options.pipelines or [str(default)]))
    return options, config


def load_for(options: argparse.Namespace, config: UNetConfig, folder: str) -> tuple[LatentDDPMPipeline, list[tuple]]:
    """The pipeline in a folder, and all (name, scheduler, steps, guidance scale) to measure it with.

    Raises:
        UserError: they do not fit together.
    """
    diffusers.utils.logging.disable_progress_bar()  # of loading
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    wanted = (config.image_channels, config.resolution, config.resolution)
    if image_shape(pipe) != wanted:
        makes, says = ("x".join(map(str, shape)) for shape in (image_shape(pipe), wanted))
        raise UserError(f"{folder} draws images of {makes}, but the config has {says}.")
    steps_tried = options.steps or [pipe.recorded_steps or config.num_inference_steps]
    known = pipe.scheduler.config.num_train_timesteps
    if max(steps_tried) > known:
        raise UserError(f"--steps {max(steps_tried)} is more than the {known} that the model was trained with.")
    schedulers = {name: with_scheduler(pipe.scheduler, name) for name in options.schedulers}
    schedulers = schedulers or {type(pipe.scheduler).__name__: pipe.scheduler}
    guided = has_conditions(pipe) or options.guidance_pipeline is not None
    if (options.guidance_scales or options.guidance_interval) and not guided:
        raise UserError(
            "--guidance_scales and --guidance_interval are for pipelines with conditions or a --guidance_pipeline."
        )
    if options.guidance_pipeline and not options.guidance_scales:
        raise UserError("--guidance_pipeline needs --guidance_scales, the strength of the guidance away from it.")
    own = 1.0 if pipe.recorded_steps else config.sampling_guidance_scale
    scales = dict.fromkeys(options.guidance_scales or [own]) if guided else [None]
    settings = [(*scheduler, steps) for scheduler in schedulers.items() for steps in dict.fromkeys(steps_tried)]
    return pipe, [(*setting, scale) for setting in settings for scale in scales]


def has_conditions(pipe: LatentDDPMPipeline) -> bool:
    return bool(pipe.class_names or pipe.conditioning_channels or pipe.takes_text)


def conditions_of(
    config: UNetConfig, pipe: LatentDDPMPipeline, count: int, most: int | None, accelerator: Accelerator
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, bool]:
    """The conditions of `count` samples: those of the training images that they are compared with.

    Returns:
        What the pipeline is given; where that says them (as classes or in words), the images' labels (count,); and
        whether the conditioning images are the images themselves.
    """
    if not has_conditions(pipe):
        return {}, None, False
    images, _ = images_for_run(config, accelerator.is_main_process, accelerator.wait_for_everyone)
    rows = np.arange(len(images))
    if most is not None and most < len(rows):
        rows = np.sort(permutation(0, 0, len(rows))[:most])  # as read_reals chooses
    chosen = rows[permutation(0, 0, len(rows))[:count]]
    chosen = chosen[np.arange(count) % len(chosen)]
    given, enlarges = {}, False
    labels = None if images.labels is None else torch.from_numpy(images.labels[chosen]).long()
    if pipe.class_names:
        if labels is None:
            raise UserError("The pipeline has classes, but the dataset has none.")
        given["class_labels"] = labels
    if pipe.takes_text:
        captions = read_captions(images, config)
        given |= embedded(
            pipe, [captions[i][n % len(captions[i])] if captions[i] else "" for n, i in enumerate(chosen)]
        )
    if pipe.conditioning_channels:
        if not (config.conditioning_image_column or config.conditioning_image_dir):
            raise UserError(
                "The pipeline takes conditioning images: say where they are, with the keys of the config that it was "
                "trained with (--config <output_dir>/train_unet.yaml)."
            )
        maps = ConditioningImages(images, config)
        given["conditioning_image"] = torch.stack([maps.get(int(i)) for i in chosen])
        if config.conditioning_image_classes is not None:
            given["conditioning_image"] = given["conditioning_image"][:, 0]
        else:
            given["conditioning_image"] = given["conditioning_image"].float() / 255
            enlarges = all(torch.equal(maps.get(int(i)), images.get(int(i))) for i in chosen)
    return given, labels if pipe.class_names or pipe.takes_text else None, enlarges


def asked_images(given: torch.Tensor, config: UNetConfig, size: tuple[int, int]) -> torch.Tensor:
    """Conditioning images of `conditions_of` as the U-Net sees them: (N, C, R, R) in [-1, 1]; classes become grays."""
    if config.conditioning_image_classes is None:
        seen = adaptive_avg_pool2d(given * 2 - 1, size)
        return interpolate(seen, scale_factor=config.resolution // size[0])
    grays = given[:, None].float() / max(1, config.conditioning_image_classes - 1) * 2 - 1
    return grays.expand(-1, config.image_channels, -1, -1)


def linear_classifier(reals: Reals) -> tuple[Callable[[torch.Tensor], torch.Tensor], float] | None:
    """A linear classifier of features (N, D) -> labels (N,), and its accuracy on held-out images.

    Multinomial logistic regression on standardized features (scikit-learn). None where there are no two classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if reals.images.labels is None:
        return None
    labels = reals.images.labels[reals.indices.numpy()]
    known, known_held_out = labels >= 0, reals.held_out_labels >= 0  # -1: an image without a label
    if len(np.unique(labels[known])) < 2:
        return None
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
    model.fit(reals.train.numpy()[known], labels[known])
    agrees = model.predict(reals.held_out_features.numpy()) == reals.held_out_labels
    accuracy = float(agrees[known_held_out].mean())
    return lambda features: torch.from_numpy(model.predict(features.numpy())), accuracy


def command_of(argv: list[str], accelerator: Accelerator) -> str:
    """The command that measures the same again."""
    launcher = "python"
    if accelerator.num_processes > 1:
        cpu = "--cpu " if accelerator.device.type == "cpu" else ""
        launcher = f"accelerate launch {cpu}--num_processes {accelerator.num_processes}"
    return f"{launcher} scripts/evaluate.py pipeline {shlex.join(argv)}".strip()


def measure_pipeline(argv: list[str]) -> None:
    options, config = pipeline_options(argv)
    loaded = {folder: load_for(options, config, folder) for folder in options.pipelines}
    several = len(loaded) > 1
    if len({(*pipe.class_names, pipe.conditioning_channels, pipe.takes_text) for pipe, _ in loaded.values()}) > 1:
        raise UserError("The pipelines have different conditions. Measure them one by one.")
    accelerator = make_accelerator(dataclasses.replace(config, mixed_precision="no", report_to="none"))
    device, is_main = accelerator.device, accelerator.is_main_process
    first = loaded[options.pipelines[0]][0]
    what = "pipelines" if several else "few-steps" if first.recorded_steps else "pipeline"
    path = options.json or Path(config.output_dir) / f"evaluation-{what}.json"
    extractor = options.feature_extractor
    result = {
        "command": command_of(argv, accelerator),
        **({} if several else {"pipeline": options.pipelines[0]}),
        "seed": options.seed,
        "batch_size": options.batch_size,
        **({"guidance_interval": options.guidance_interval} if options.guidance_interval else {}),
        **({"guidance_pipeline": options.guidance_pipeline} if options.guidance_pipeline else {}),
        "device": name_of(device),
        "processes": accelerator.num_processes,
    }
    given, labels, enlarges = conditions_of(config, first, options.num_images, options.max_real_images, accelerator)
    if is_main:
        network = load_extractor(extractor, device)
        cache = options.feature_cache or Path(config.output_dir) / "cache" / "features"
        most = options.max_real_images
        reals = read_reals(config, options.num_images, most, extractor, network, device, cache)
        known = f"{len(reals.train)}{'' if most is None else ' randomly chosen'} training images"
        result["compared_with"] = f"{len(reals.rows)} of {known}, a fixed random choice"
        result["neighbours_searched"] = known
        if options.reconstructions:
            result["reconstructions"] = measure_reconstructions(first.to(device), reals, network, device, enlarges)
        result |= {"held_out_images": reals.held_out, "held_out_neighbour_distance": reals.held_out_distance}

    classifier = linear_classifier(reals) if is_main and labels is not None else None
    if classifier is not None:
        result["held_out_class_agreement"] = classifier[1]
    settings: list[dict] = []
    size = (first.unet.config.sample_size,) * 2
    sheet = [asked_images(given["conditioning_image"][:16], config, size)] if "conditioning_image" in given else []
    sweep = []
    for folder, (pipe, drawn) in loaded.items():
        guiding = guidance_of(options, pipe.to(device))
        sweep += [(folder, pipe, guiding, *setting) for setting in drawn]
    shown = 16 if len(sweep) > 1 or sheet else 64
    for folder, pipe, guiding, name, scheduler, steps, scale in sweep:
        pipe.scheduler = scheduler
        accelerator.wait_for_everyone()  # otherwise waiting for rank 0 would count as drawing
        begun = time.perf_counter()
        guidance = {} if scale is None else {"guidance_scale": scale}
        samples = draw_shared(
            pipe,
            options.seed,
            options.num_images,
            options.batch_size,
            steps,
            given,
            **guidance,
            **guiding,
        )
        seconds = time.perf_counter() - begun
        if not is_main:
            continue
        batches = progress_bar(samples.split(64), "features of samples", leave=False)
        features = extract_features(network, batches, device)
        distances, found = nearest(features, reals.train, SHOWN_NEIGHBOURS)
        settings.append(
            {
                **({"pipeline": folder} if several else {}),
                "scheduler": name,
                "steps": steps,
                "feature_extractor": extractor,
                "samples": len(samples),
                "reals": len(reals.rows),
                **compare_features(features, reals.train[reals.rows]),
                **neighbour_figures(distances[:, 0], reals),
                **guidance,
                "images_per_second": len(samples) / seconds,
                "samples_sha256": hashlib.sha256(samples.numpy().tobytes()).hexdigest(),
            }
        )
        if classifier is not None:
            agrees = classifier[0](features) == labels
            settings[-1]["class_agreement"] = float(agrees[labels >= 0].double().mean())
        if enlarges:
            agreement = psnr_when_small(to_float(samples), given["conditioning_image"] * 2 - 1, size)
            settings[-1]["conditioning_psnr"] = float(agreement.mean())
        # written again and again: a long sweep that is stopped leaves what it has
        sheet.append(to_float(samples[:shown]))
        save_png(make_grid(torch.cat(sheet), columns=16), path.with_name(f"{path.stem}-samples.png"))
        if settings[-1] is min(settings, key=lambda setting: setting["fd"]):
            result["neighbours_shown"] = f"{name_of_setting(settings[-1], settings)}, {steps} steps"
            picture = path.with_name(f"{path.stem}-neighbours.png")
            draw_neighbours(picture, result["neighbours_shown"], samples, distances, found, reals)
        write_json(path, {**result, "settings": settings})
    if is_main:
        if len(settings) > 1:
            draw_sweep(path.with_suffix(".png"), settings)
        print_table(settings)
        if options.reconstructions:
            print(f"Frechet distance of reconstructions: {result['reconstructions']['fd']:.4g}")
        print(f"written to {path}, pictures beside it", file=sys.stderr)
    accelerator.wait_for_everyone()


def embedded(pipe: LatentDDPMPipeline, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Prompts as embeddings for `LatentDDPMPipeline`; each distinct prompt is encoded once."""
    rows = {prompt: row for row, prompt in enumerate(sorted(set(prompts)))}
    different = list(rows)
    parts = [pipe.encode_prompt(different[start : start + 64]) for start in range(0, len(different), 64)]
    embeds, mask = (  # of any length each
        pad_sequence([value.cpu() for part in parts for value in part[k]], batch_first=True) for k in (0, 1)
    )
    chosen = torch.tensor([rows[prompt] for prompt in prompts])
    return {"prompt_embeds": embeds[chosen], "prompt_attention_mask": mask[chosen]}


def measure_digits(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.py digits")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--prompts", nargs="+", default=["a {}"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    pipeline = load_pipeline(str(options.pipeline))
    pipeline.set_progress_bar_config(disable=True)
    digits, labels = digit_tensors()
    held_out = torch.arange(len(digits)) % 10 == 0
    chosen = held_out.nonzero()[:, 0]
    chosen = chosen[torch.from_numpy(permutation(0, 0, len(chosen)))]
    chosen = chosen[torch.arange(options.num_images) % len(chosen)]
    given, inputs = {}, {}
    if pipeline.class_names:
        given["class_labels"] = labels[chosen]
    if pipeline.conditioning_channels:
        given["conditioning_image"] = silhouettes(digits[chosen]).long()
    if pipeline.takes_text:
        asked = [options.prompts[n % len(options.prompts)] for n in range(options.num_images)]
        words = [prompt.replace("{}", NUMBER_WORDS[labels[i]]) for prompt, i in zip(asked, chosen, strict=True)]
        given |= embedded(pipeline, words)
    if given:
        inputs["guidance_scale"] = options.guidance_scale
    steps = options.num_inference_steps or pipeline.recorded_steps or DEFAULT_STEPS
    drawn = draw_shared(pipeline, options.seed, options.num_images, 250, steps, given, **inputs)
    known = digit_probabilities(train_digit_classifier(digits[~held_out], labels[~held_out]), digits[held_out])
    probabilities = digit_probabilities(train_digit_classifier(digits, labels), to_float(drawn))
    judged = judge(probabilities)
    if "class_labels" in given or pipeline.takes_text:
        judged["class_agreement"] = float((probabilities.argmax(1) == labels[chosen]).double().mean())
    if "conditioning_image" in given:
        asked = given["conditioning_image"].bool()
        judged["iou"] = float(intersection_over_union(asked, silhouettes(to_float(drawn))).mean())
    what = "few-steps-digits" if pipeline.recorded_steps else "digits"
    path = options.json or options.pipeline.parent / f"evaluation-{what}.json"
    shown = to_float(drawn[:32])
    if "conditioning_image" in given:
        picture = reconstruction_grid(asked[:32, None].float().mul(2).sub(1), shown, columns=16)
    else:
        picture = make_grid(shown, columns=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(picture, path.with_name(f"{path.stem}-samples.png"))
    show_json(
        path,
        {
            "command": "python scripts/evaluate.py digits " + shlex.join(argv),
            "images": options.num_images,
            "steps": steps,
            "scheduler": type(pipeline.scheduler).__name__,
            **inputs,
            **({"prompts": options.prompts} if pipeline.takes_text else {}),
            **judged,
            # what the same classifier, trained without them, says of real digits
            "real_held_out_accuracy": float((known.argmax(1) == labels[held_out]).double().mean()),
            "real_held_out_confident": judge(known)["confident"],
        },
    )


def main(argv: list[str]) -> int:
    commands = {"autoencoder": measure_autoencoder, "pipeline": measure_pipeline, "digits": measure_digits}
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in commands:
        raise UserError(f"Say what to measure: {' or '.join(commands)} (--help shows how).")
    commands[argv[0]](argv[1:])
    return 0


if __name__ == "__main__":
    run(main)
