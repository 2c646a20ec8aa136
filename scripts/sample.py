"""Draws images from a pipeline: a folder that training exported, or a repository on the Hub.

    python scripts/sample.py runs/mnist/pipeline --num_images 64 --output_dir samples/mnist
    python scripts/sample.py you/mnist-ldm --scheduler dpmsolver++ --num_inference_steps 15 --seed 1

Writes `grid.png` (of the first 64 images), `00000.png`, `00001.png`, ... and `samples.json`, which records
every setting. Image number i follows from (seed, i) alone, so neither --batch_size nor --num_images changes it.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import diffusers
import torch

from latent_ddpm.errors import UserError
from latent_ddpm.grids import make_grid, save_png
from latent_ddpm.sampling import SCHEDULERS, draw_images, find_scheduler, load_pipeline, one_line, with_scheduler

GRID_LIMIT = 64


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder with a model_index.json, or a Hub id such as you/name")
    parser.add_argument("--num_images", type=positive, default=64)
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time; changes speed only")
    parser.add_argument("--num_inference_steps", type=positive, default=25)
    parser.add_argument("--scheduler", help="in place of the pipeline's own: " + ", ".join(SCHEDULERS))
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 is deterministic, 1 is like DDPM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("samples"))
    parser.add_argument("--no-individual", action="store_true", help="write the grid only, not one file per image")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, mps; by default the fastest there is")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    return parser.parse_args(argv)


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the fastest there is."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name} can not be used here: {one_line(error)}") from error


def sample(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: the arguments name something that is not there or does not fit the model.
    """
    # ---------------------------------------------------------------------------------- set-up

    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**64")
    if args.scheduler is not None:
        find_scheduler(args.scheduler)  # a slip of the finger is told before anything is loaded
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} can not be made: {error.strerror}") from error
    device = pick_device(args.device)
    pipe = load_pipeline(args.pipeline).to(device, getattr(torch, args.dtype))
    if args.scheduler is not None:
        pipe.scheduler = with_scheduler(pipe.scheduler, args.scheduler)
    if args.num_inference_steps > pipe.scheduler.config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {args.num_inference_steps} is more than the "
            f"{pipe.scheduler.config.num_train_timesteps} steps the model was trained with"
        )
    pipe.set_progress_bar_config(leave=False)

    # ---------------------------------------------------------------------------------- sampling

    for_grid, files = [], []
    for start in range(0, args.num_images, args.batch_size):
        numbers = torch.arange(start, min(start + args.batch_size, args.num_images))
        images = draw_images(pipe, args.seed, numbers, args.num_inference_steps, args.eta)
        images = images.cpu() * 2 - 1  # (B, C, H, W) in [-1, 1]
        for_grid.append(images[: max(0, GRID_LIMIT - start)])
        if not args.no_individual:
            for number, image in zip(numbers.tolist(), images, strict=True):
                files.append(f"{number:05d}.png")
                save_png(make_grid(image[None], padding=0), args.output_dir / files[-1])

    # ---------------------------------------------------------------------------------- what is written last

    save_png(make_grid(torch.cat(for_grid)), args.output_dir / "grid.png")
    record = {
        "pipeline": args.pipeline,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        "eta": args.eta,
        "seed": args.seed,
        "device": str(device),
        "dtype": args.dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "files": files,
    }
    aside = args.output_dir / f".samples.json.{os.getpid()}.tmp"
    aside.write_text(json.dumps(record, indent=2, default=str) + "\n")
    os.replace(aside, args.output_dir / "samples.json")
    print(f"{args.num_images} images in {args.output_dir}")


def main(argv: list[str] | None = None) -> int:
    diffusers.utils.logging.disable_progress_bar()  # of loading; sampling keeps its own
    try:
        sample(parse_args(argv))
    except UserError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
