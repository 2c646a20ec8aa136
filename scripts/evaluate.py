"""Measure what a run has made.

    python scripts/evaluate.py autoencoder --config configs/mnist.yaml
        PSNR, SSIM, codebook usage and perplexity of <output_dir>/autoencoder on the validation split.
        Takes the keys of train_unet.py; --autoencoder DIR measures another one.

    python scripts/evaluate.py digits outputs/mnist/pipeline --num_images 1000 --num_inference_steps 25
        Samples of a pipeline of digits, judged by a small classifier trained on the embedded digits.

Prints the figures and writes them as JSON (--json FILE; by default evaluation-<what>.json in the run's folder).
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data import BadImages, eval_batches, open_image_dataset
from latent_ddpm.digits import digit_probabilities, digit_tensors, judge, train_digit_classifier
from latent_ddpm.errors import UserError
from latent_ddpm.evaluate import evaluate_autoencoder
from latent_ddpm.export import check_autoencoder_fits, load_vqmodel, quantize_indices
from latent_ddpm.launch import run
from latent_ddpm.random import Stream, normal
from latent_ddpm.sources import open_sources
from pipeline_latent_ddpm import LatentDDPMPipeline


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    print(f"written to {path}", file=sys.stderr)


def measure_autoencoder(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args(argv)
    config = parse_config(UNetConfig, rest)
    output_dir = Path(config.output_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vqvae = load_vqmodel(config.autoencoder_dir).to(device)
    check_autoencoder_fits(vqvae, config)
    _, source = open_sources(config)
    bad_images = BadImages(output_dir / "bad_images.jsonl", len(source), config.max_bad_image_share)
    images = open_image_dataset(
        source, config, output_dir / "cache", bad_images, train=False, is_main=True, wait=lambda: None
    )

    def reconstruct(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = vqvae.encode(batch).latents
        return vqvae.decode(latents).sample, quantize_indices(vqvae, latents)

    batches = eval_batches(images, 64, 0, 1)
    result = evaluate_autoencoder(reconstruct, batches, vqvae.config.num_vq_embeddings, device, with_ssim=True)
    command = "python scripts/evaluate.py autoencoder " + " ".join(argv)
    write_json(options.json or output_dir / "evaluation-autoencoder.json", {"command": command.strip(), **result})


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
            "command": "python scripts/evaluate.py digits " + " ".join(argv),
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
