"""Measure what a run has made.

    python scripts/evaluate.py autoencoder --config configs/mnist.yaml
        <output_dir>/autoencoder on the whole validation split: PSNR, SSIM, rFD (Frechet distance of reconstructions
        to originals, with --feature_extractor efficientnet-lite0, inception or dinov2), LPIPS (with --lpips_net),
        images/s, peak memory; of a VQModel also codebook usage, perplexity, bits per pixel; and a figure beside the
        JSON file.
        Takes the keys of train_unet.py; --autoencoder DIR measures another one.

    python scripts/evaluate.py digits outputs/mnist/pipeline --num_images 1000 --num_inference_steps 25
        Samples of a pipeline of digits, judged by a small classifier trained on the embedded digits.

Prints the figures and writes them as JSON (--json FILE; by default evaluation-<what>.json in the run's folder).
"""

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data import BadImages, eval_batches, open_image_dataset, to_float, to_uint8
from latent_ddpm.digits import digit_probabilities, digit_tensors, judge, train_digit_classifier
from latent_ddpm.errors import UserError
from latent_ddpm.evaluate import evaluate_autoencoder, psnr
from latent_ddpm.export import check_autoencoder_fits, code_count, latents_of, load_autoencoder, quantize_indices
from latent_ddpm.features import EXTRACTORS, check_installed, frechet_distance
from latent_ddpm.grids import reconstruction_grid
from latent_ddpm.launch import run
from latent_ddpm.losses import TRUNKS, load_lpips
from latent_ddpm.random import Stream, normal
from latent_ddpm.sources import open_sources
from pipeline_latent_ddpm import LatentDDPMPipeline


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {path}", file=sys.stderr)


def images_per_second(function: Callable[[], object], images: int, device: torch.device) -> float:
    """Median over 5 calls, after one that warms up."""
    seconds = []
    for _ in range(6):
        begun = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return images / statistics.median(seconds[1:])


def peak_memory(device: torch.device) -> float:
    """GiB: of the card since the process began, or else the largest resident size of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def draw_autoencoder(
    path: Path, counts: torch.Tensor, errors: torch.Tensor, originals: torch.Tensor, made: torch.Tensor
) -> None:
    """Usage of the codes (K,), if any, most used first; the best and worst reconstructions under their originals."""
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
    autoencoder = load_autoencoder(config.autoencoder_dir).to(device)
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
        reconstruction, indices = autoencoder.decode(latents).sample, None
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
        result["encode_images_per_second"] = images_per_second(lambda: autoencoder.encode(batch), len(batch), device)
        result["decode_images_per_second"] = images_per_second(lambda: autoencoder.decode(latents), len(batch), device)
    result["peak_memory_gib"] = peak_memory(device)
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    path = options.json or output_dir / "evaluation-autoencoder.json"
    command = "python scripts/evaluate.py autoencoder " + shlex.join(argv)
    write_json(path, {"command": command.strip(), **result})
    draw_autoencoder(path.with_suffix(".png"), counts, torch.cat(errors), originals, reconstructions)
    print(f"figure: {path.with_suffix('.png')}", file=sys.stderr)


def measure_digits(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="evaluate.py digits")
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    if not (options.pipeline / "model_index.json").exists():
        raise UserError(f"{options.pipeline} is not a pipeline's folder.")
    pipeline = LatentDDPMPipeline.from_pretrained(options.pipeline, use_safetensors=True)
    shape = (pipeline.unet.config.in_channels, pipeline.unet.config.sample_size, pipeline.unet.config.sample_size)
    pipeline.set_progress_bar_config(desc="sampling")
    images = torch.cat(
        [
            pipeline(
                latents=normal(options.seed, Stream.SAMPLE, numbers, shape),
                batch_size=len(numbers),
                num_inference_steps=options.num_inference_steps,
                output_type="pt",
            ).images
            for numbers in torch.arange(options.num_images).split(250)
        ]
    )
    digits, labels = digit_tensors()
    held_out = torch.arange(len(digits)) % 10 == 0
    known = digit_probabilities(train_digit_classifier(digits[~held_out], labels[~held_out]), digits[held_out])
    judged = judge(digit_probabilities(train_digit_classifier(digits, labels), images * 2 - 1))
    write_json(
        options.json or options.pipeline.parent / "evaluation-digits.json",
        {
            "command": "python scripts/evaluate.py digits " + shlex.join(argv),
            "images": options.num_images,
            "steps": options.num_inference_steps,
            "scheduler": type(pipeline.scheduler).__name__,
            **judged,
            # what the same classifier, trained without them, says of real digits
            "real_held_out_accuracy": float((known.argmax(1) == labels[held_out]).double().mean()),
            "real_held_out_confident": judge(known)["confident"],
        },
    )


def main(argv: list[str]) -> int:
    commands = {"autoencoder": measure_autoencoder, "digits": measure_digits}
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if not argv or argv[0] not in commands:
        raise UserError(f"Say what to measure: {' or '.join(commands)} (--help shows how).")
    commands[argv[0]](argv[1:])
    return 0


if __name__ == "__main__":
    run(main)
