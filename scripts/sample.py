"""Draws images from a pipeline: a folder that training exported, or a repository on the Hub.

    python scripts/sample.py runs/mnist/pipeline --num_images 64 --output_dir samples/mnist
    python scripts/sample.py you/mnist-ldm --scheduler dpmsolver++ --num_inference_steps 15 --seed 1

Writes `grid.png` (of the first 64 images), `00000.png`, `00001.png`, ... and `samples.json`, which records
every setting. Image number i follows from (seed, i) alone, so neither --batch_size nor --num_images changes it.
"""

import argparse
import difflib
import inspect
import json
import os
import sys
from pathlib import Path

import diffusers
import torch

from latent_ddpm.errors import UserError
from latent_ddpm.grids import make_grid, save_png
from latent_ddpm.random import Stream, normal, seed_for_step
from pipeline_latent_ddpm import LatentDDPMPipeline

GRID_LIMIT = 64

# name: (diffusers class, what to change in its config)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as latent diffusion did; else it needs 4 steps or more
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsolver++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
SCHEDULERS |= {class_name: (class_name, {}) for class_name, _ in list(SCHEDULERS.values())}
SCHEDULERS["PNDMScheduler"] = SCHEDULERS["pndm"]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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


def load_pipeline(name: str) -> LatentDDPMPipeline:
    """The pipeline in a folder or a Hub repository, as `LatentDDPMPipeline`.

    Raises:
        UserError: there is no such folder or repository, or it holds something else.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        inside = folder / "pipeline"
        hint = f"; did you mean {inside}?" if (inside / "model_index.json").is_file() else ""
        raise UserError(f"{name} is not a pipeline folder: it has no model_index.json{hint}")
    # A Hub id is one or two plain words; anything else can only have been meant as a folder.
    if not folder.is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"there is no folder {name}")
    try:
        index = LatentDDPMPipeline.load_config(name)
        missing = {"vqvae", "unet", "scheduler"} - index.keys()
        if missing:
            raise UserError(
                f"{name} holds a {index.get('_class_name')}, which is not a latent diffusion pipeline of ours: "
                f"it lacks {', '.join(sorted(missing))}"
            )
        return LatentDDPMPipeline.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        what = (
            "the pipeline in this folder can not be loaded"
            if folder.is_dir()
            else "neither a folder nor readable on the Hub"
        )
        raise UserError(f"{name}: {what}: {one_line(error)}") from error


def find_scheduler(name: str) -> tuple[str, dict]:
    """The diffusers class and the changes to its config that `name`, in any case, stands for."""
    by_lower = {known.lower(): known for known in SCHEDULERS}
    if name.lower() not in by_lower:
        nearest = by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]
        raise UserError(f"--scheduler {name} is unknown; did you mean {nearest}?")
    return SCHEDULERS[by_lower[name.lower()]]


def with_scheduler(scheduler: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    """The scheduler called `name`, with the noise table and prediction type of the pipeline's own.

    Raises:
        UserError: the name is unknown, or that scheduler can not sample what this model learned.
    """
    class_name, overrides = find_scheduler(name)
    scheduler_class = getattr(diffusers, class_name)
    own, config = type(scheduler).__name__, scheduler.config
    if own.startswith("FlowMatch") != class_name.startswith("FlowMatch"):
        raise UserError(f"--scheduler {name}: the model was trained for {own}, and one is flow matching, the other not")
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    parameters = inspect.signature(scheduler_class).parameters
    # Its noise table would differ from the one the model was trained on, and the images be wrong without a word.
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters:
        raise UserError(
            f"--scheduler {name}: {class_name} lacks rescale_betas_zero_snr, which this model was trained with"
        )
    if "clip_sample" in parameters:  # the default, True, is for pixels: latents are not bounded by 1
        config.setdefault("clip_sample", False)
    try:
        return scheduler_class.from_config(config, **overrides)
    except (ImportError, NotImplementedError, ValueError) as error:
        raise UserError(f"--scheduler {name}: {one_line(error)}") from error


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
    size = pipe.unet.config.sample_size
    shape = (pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))  # (C, h, w)

    # ---------------------------------------------------------------------------------- sampling

    for_grid, files = [], []
    for start in range(0, args.num_images, args.batch_size):
        numbers = torch.arange(start, min(start + args.batch_size, args.num_images))
        # Noise inside the loop, where the scheduler draws any, also belongs to one image alone.
        generators = [torch.Generator().manual_seed(seed_for_step(args.seed, int(n), 0)) for n in numbers]
        try:
            images = pipe(
                batch_size=len(numbers),
                num_inference_steps=args.num_inference_steps,
                eta=args.eta,
                generator=generators,
                latents=normal(args.seed, Stream.SAMPLE, numbers, shape),
                output_type="pt",
            ).images
        except (NotImplementedError, ValueError) as error:
            if "prediction_type" not in str(error):
                raise
            raise UserError(f"{type(pipe.scheduler).__name__} can not sample this model: {one_line(error)}") from error
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
