"""Draw images from a pipeline: a folder that training exported, or a repository on the Hub.

    python scripts/sample.py outputs/mnist/pipeline --num_images 64 --output_dir samples/mnist
    python scripts/sample.py you/mnist-ldm --scheduler dpmsolver++ --num_inference_steps 15 --seed 1
    python scripts/sample.py you/mnist-ldm --num_images 4 --interpolate 8 --film_strip
    python scripts/sample.py you/mnist-ldm --num_images 9 --image digit.png --strength 0.6
    python scripts/sample.py you/mnist-ldm --num_images 9 --image digit.png --mask hole.png
    python scripts/sample.py you/mnist-class --num_images 20 --class_labels 3 7 --guidance_scale 2
    python scripts/sample.py you/mnist-text --num_images 8 --prompt "a seven" "a handwritten two"
    accelerate launch --num_processes 8 scripts/sample.py you/mnist-ldm --num_images 50000

Writes `grid.png` (the first 64 images), `00000.png`, `00001.png`, ... and `samples.json`, which records every setting.
Images of an earlier call in the same folder are removed. Image number i depends on (seed, i) alone, so the files are
the same on any number of processes and with any --num_images. Another --batch_size changes at most the last bits.

--interpolate N writes `interpolation.png`, one row of N images for each pair of neighbours 0-1, 1-2, ..., and
`interpolation.webp`, an animation of all rows. All images of a row but the last use the conditions of the first one,
and its noise where the scheduler draws noise. --film_strip writes `film_strip.png`, one row for each of the first 8
images with the prediction after each step, and `film_strip.webp`.

--image is cropped to a square at its centre and resized, as in training. It is the first image of the grid. With
--mask, only what is white in the mask is drawn anew; the other pixels stay.

With a conditional model, the images use the --class_labels (numbers or names), the --prompt texts and the
--conditioning_image files in turn. --guidance_scale 2, or conditioning_image=1.5 class_labels=3, strengthens them;
--guidance_interval limits guidance to a range of noise levels (arXiv 2404.07724). --guidance_pipeline guides away from
a weaker model, such as an earlier or smaller one (arXiv 2406.02507; scripts/reconstruct_ema.py makes one). This also
works without conditions.

On a CPU each process uses one thread, because the number of threads changes the last bits. Start one process per core.
"""

import argparse
import contextlib
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from PIL import Image

from latent_ddpm.data.images import as_seen, decode, resize_and_crop
from latent_ddpm.diffusion.guidance import add_guidance_arguments, guidance_of
from latent_ddpm.diffusion.sampling import (
    SCHEDULERS,
    draw_film,
    draw_images,
    find_scheduler,
    image_shape,
    latent_shape,
    load_pipeline,
    one_line,
    one_thread,
    own_blocks,
    slerp,
    with_scheduler,
)
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_animation, save_png, write_whole
from latent_ddpm.random import Stream, normal
from latent_ddpm.training.launch import run
from pipeline_latent_ddpm import CONDITIONS, DEFAULT_STEPS, LatentDDPMPipeline

GRID_LIMIT = 64
FILM_ROWS = 8
ANIMATION_SIDE = 128  # pixels; smaller images are enlarged to about that


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def scale_of(text: str) -> float | dict[str, float]:
    """A number, or the condition it is for and a number."""
    name, equals, value = text.rpartition("=")
    if equals and name not in CONDITIONS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(CONDITIONS)}")
    try:
        return {name: float(value)} if equals else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value} is not a number") from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder with a model_index.json, or a Hub id such as you/name")
    parser.add_argument("--num_images", type=positive, default=64)
    parser.add_argument("--batch_size", type=positive, default=64, help="images at a time; changes speed only")
    parser.add_argument(
        "--num_inference_steps", type=positive, help=f"default: what the pipeline is made for, or {DEFAULT_STEPS}"
    )
    parser.add_argument("--scheduler", help="instead of the pipeline's own: " + ", ".join(SCHEDULERS))
    parser.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 is deterministic, 1 is like DDPM")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image", type=Path, help="start from this image with noise added")
    parser.add_argument(
        "--strength",
        type=float,
        help="how much to change --image, above 0 and at most 1; default 0.8, or 1 with --mask",
    )
    parser.add_argument("--mask", type=Path, help="draw anew only what is white in this image")
    parser.add_argument("--class_labels", nargs="+", metavar="CLASS", help="for a model with classes")
    parser.add_argument("--prompt", nargs="+", metavar="TEXT", help="for a model with text")
    parser.add_argument(
        "--conditioning_image", nargs="+", type=Path, metavar="FILE", help="for a model with conditioning images"
    )
    parser.add_argument("--guidance_scale", nargs="+", type=scale_of, metavar="SCALE",
                        help="strength of conditions, default 1; or one each: class_labels=3 prompt=2")  # fmt: skip
    add_guidance_arguments(parser)
    parser.add_argument("--interpolate", type=int, metavar="N", help="N images from each image to the next")
    parser.add_argument("--film_strip", action="store_true", help="show the prediction after each step")
    parser.add_argument("--animation", choices=("webp", "gif"), default="webp")
    parser.add_argument("--output_dir", type=Path, default=Path("samples"))
    parser.add_argument("--no-individual", action="store_true", help="write the grid only, not one file per image")
    parser.add_argument("--device", help="such as cpu, cuda, cuda:1, mps; by default the fastest available")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    if args.guidance_scale is not None:
        scales = args.guidance_scale
        if len(scales) > 1 and not all(isinstance(scale, dict) for scale in scales):
            parser.error("--guidance_scale: one number, or NAME=NUMBER of each condition")
        args.guidance_scale = {k: v for scale in scales for k, v in scale.items()} if len(scales) > 1 else scales[0]
    return args


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the fastest available one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--device {name} can not be used here: {one_line(error)}") from error


def check_settings(args: argparse.Namespace) -> None:
    """Check the options before anything is loaded.

    Raises:
        UserError: settings that are out of range, or that need another.
    """
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed {args.seed} must be at least 0 and below 2**64")
    if args.scheduler is not None:
        find_scheduler(args.scheduler)
    if args.strength is not None and not 0 < args.strength <= 1:
        raise UserError(f"--strength {args.strength} must be above 0 and at most 1")
    if args.image is None and (args.strength is not None or args.mask is not None):
        raise UserError("--strength and --mask are about an image: name it with --image FILE")
    if args.interpolate is not None and args.interpolate < 2:
        raise UserError(f"--interpolate {args.interpolate} must be at least 2: both ends count")
    if args.interpolate is not None and args.num_images < 2:
        raise UserError(f"--interpolate needs --num_images of at least 2, not {args.num_images}")


def read_image(flag: str, path: Path, channels: int, side: int) -> torch.Tensor:
    """An image file as float32 (1, channels, side, side) in [0, 1].

    Raises:
        UserError: there is no such file, or it is not an image.
    """
    try:
        pixels = resize_and_crop(as_seen(decode(path.read_bytes()), channels), side)  # uint8 (side, side, channels)
    except Exception as error:  # Pillow's decoders raise all kinds on damaged files
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise UserError(f"{flag} {path} can not be read: {reason}") from error
    return torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255


class Told:
    """The conditions of each image.

    Args:
        pipe: the pipeline.
        args: the command line.

    Raises:
        UserError: the model does not take it, there is no such class, or a file cannot be read.
    """

    def __init__(self, pipe: LatentDDPMPipeline, args: argparse.Namespace) -> None:
        self.values: dict[str, list | torch.Tensor] = {}
        self.shared: dict[str, Any] = {}
        names, takes_image = pipe.class_names, pipe.conditioning_channels > 0
        for flag, has in (("class_labels", names), ("prompt", pipe.takes_text), ("conditioning_image", takes_image)):
            if getattr(args, flag) and not has:
                raise UserError(f"--{flag}: this model has no such condition")
        if args.guidance_scale is not None:
            if not (args.class_labels or args.prompt or args.conditioning_image or args.guidance_pipeline):
                raise UserError("--guidance_scale needs --class_labels, --prompt or --conditioning_image")
            if isinstance(args.guidance_scale, dict):
                if args.guidance_pipeline:
                    raise UserError("with --guidance_pipeline, --guidance_scale is one number for all conditions")
                if absent := [name for name in args.guidance_scale if not getattr(args, name)]:
                    raise UserError(f"--guidance_scale is for {absent[0]}, but there is no --{absent[0]}")
            self.shared["guidance_scale"] = args.guidance_scale
        elif args.guidance_pipeline or args.guidance_interval:
            raise UserError("--guidance_interval and --guidance_pipeline need a --guidance_scale above 1")
        self.shared |= guidance_of(args, pipe)
        if args.class_labels:
            self.values["class_labels"] = [self._label(word, names) for word in args.class_labels]
        if args.prompt:
            embeds, mask = pipe.encode_prompt(args.prompt)
            self.values |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if args.conditioning_image:
            self.values["conditioning_image"] = [self._image(path) for path in args.conditioning_image]

    @staticmethod
    def _label(word: str, names: list[str]) -> int:
        if word in names:
            return names.index(word)
        if word.isdigit() and int(word) < len(names):
            return int(word)
        nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.0)[0]
        raise UserError(f"--class_labels: there is no class {word}; did you mean {nearest}?")

    @staticmethod
    def _image(path: Path) -> Image.Image:
        try:
            return decode(path.read_bytes())
        except Exception as error:  # as in read_image
            reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
            raise UserError(f"--conditioning_image {path} can not be read: {reason}") from error

    def of(self, numbers: torch.Tensor) -> dict:
        """What `LatentDDPMPipeline` takes for the images of these numbers."""
        told: dict = dict(self.shared)
        for name, values in self.values.items():
            places = [int(n) % len(values) for n in numbers]
            told[name] = values[places] if isinstance(values, torch.Tensor) else [values[place] for place in places]
        return told


def draw_between(
    pipe: LatentDDPMPipeline, args: argparse.Namespace, told: Told, **settings: torch.Tensor | float | int
) -> list[tuple[int, torch.Tensor]]:
    """The images between neighbours that this process draws: (place, float32 (C, H, W) in [-1, 1]), pair after pair."""
    between = args.interpolate - 2
    images = []
    for places in own_blocks((args.num_images - 1) * between, args.batch_size):
        numbers, fraction = places // between, (1 + places % between) / (args.interpolate - 1)
        ends = (normal(args.seed, Stream.SAMPLE, n, latent_shape(pipe)) for n in (numbers, numbers + 1))
        noise = slerp(*ends, fraction)
        part = draw_images(pipe, args.seed, numbers, noise=noise, **settings, **told.of(numbers)).cpu() * 2 - 1
        images += zip(places.tolist(), part, strict=True)
    return images


def in_order(own: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of all processes, ordered by number."""
    return [tensor for _, tensor in sorted(gather_object(own), key=lambda pair: pair[0])]


def write_interpolation(ends: torch.Tensor, between: list[torch.Tensor], args: argparse.Namespace) -> None:
    """The grid and the animation of all pairs, from the numbered images (N, C, H, W) and those between them."""
    length = args.interpolate - 2
    rows = [[ends[p], *between[p * length : (p + 1) * length], ends[p + 1]] for p in range(len(ends) - 1)]
    grid = make_grid(torch.stack([image for row in rows for image in row]), columns=args.interpolate)
    save_png(grid, args.output_dir / "interpolation.png")
    walk = [image for row in rows for image in row[:-1]] + [ends[-1]]  # where two rows meet is one image
    write_animation([image[None] for image in walk], "interpolation", args)


def write_film(film: torch.Tensor, args: argparse.Namespace) -> None:
    """The strip and the animation of predictions (rows, steps, C, H, W)."""
    save_png(make_grid(film.flatten(0, 1), columns=film.shape[1]), args.output_dir / "film_strip.png")
    write_animation(list(film.unbind(1)), "film_strip", args)


def write_animation(frames: list[torch.Tensor], name: str, args: argparse.Namespace) -> None:
    scale = max(1, ANIMATION_SIDE // frames[0].shape[-1])
    pictures = [make_grid(frame, scale=scale, padding=2 if len(frame) > 1 else 0) for frame in frames]
    save_animation(pictures, args.output_dir / f"{name}.{args.animation}")


def sample(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: the arguments name something that is not there or does not fit the model.
    """
    # ---------------------------------------------------------------------------------- set-up

    check_settings(args)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {args.output_dir} can not be made: {error.strerror}") from error
    # Left to itself, it takes processes without a GPU for processes that do not belong together.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    device = pick_device(args.device) if state.num_processes == 1 else state.device
    if args.device is not None and args.device.split(":")[0] != device.type:
        raise UserError(f"--device {args.device}: accelerate has put its processes on {device.type}")
    pipe = load_pipeline(args.pipeline).to(device)
    if args.dtype != "float32":
        pipe.to(getattr(torch, args.dtype))
    if args.scheduler is not None:
        pipe.scheduler = with_scheduler(pipe.scheduler, args.scheduler)
    args.num_inference_steps = args.num_inference_steps or pipe.recorded_steps or DEFAULT_STEPS
    if args.num_inference_steps > pipe.scheduler.config.num_train_timesteps:
        raise UserError(
            f"--num_inference_steps {args.num_inference_steps} is more than the "
            f"{pipe.scheduler.config.num_train_timesteps} steps the model was trained with"
        )
    pipe.set_progress_bar_config(leave=False, disable=not (state.is_main_process and sys.stderr.isatty()))
    settings = {"num_inference_steps": args.num_inference_steps, "eta": args.eta}
    channels, height, _ = image_shape(pipe)
    if args.image is not None:
        settings |= {"image": read_image("--image", args.image, channels, height), "strength": args.strength}
    if args.mask is not None:
        settings["mask_image"] = read_image("--mask", args.mask, 1, height)
    told = Told(pipe, args)

    # ---------------------------------------------------------------------------------- sampling

    if state.is_main_process:
        remove_earlier(args.output_dir)
    state.wait_for_everyone()
    kept, film, between = [], [], []  # of this process: (number, float32 tensor in [-1, 1])
    keep = args.num_images if args.interpolate else GRID_LIMIT
    with one_thread(device):
        for numbers in own_blocks(args.num_images, args.batch_size):
            rows = min(len(numbers), FILM_ROWS - int(numbers[0])) if args.film_strip else 0
            if rows > 0:
                images, strips = draw_film(pipe, rows, args.seed, numbers, **settings, **told.of(numbers))
                film += zip(numbers.tolist(), strips * 2 - 1)  # noqa: B905 - fewer strips than numbers
            else:
                images = draw_images(pipe, args.seed, numbers, **settings, **told.of(numbers))
            images = images.cpu() * 2 - 1  # (B, C, H, W) in [-1, 1]
            kept += [(n, image) for n, image in zip(numbers.tolist(), images, strict=True) if n < keep]
            if not args.no_individual:
                for number, image in zip(numbers.tolist(), images, strict=True):
                    save_png(make_grid(image[None], padding=0), args.output_dir / f"{number:05d}.png")
        if args.interpolate:
            between = draw_between(pipe, args, told, **settings)
    kept, film, between = in_order(kept), in_order(film), in_order(between)

    # ---------------------------------------------------------------------------------- what is written last

    if state.is_main_process:
        first = [settings["image"][0] * 2 - 1] if args.image is not None else []
        save_png(make_grid(torch.stack(first + kept[:GRID_LIMIT])), args.output_dir / "grid.png")
        if args.interpolate:
            write_interpolation(torch.stack(kept), between, args)
        if args.film_strip:
            write_film(torch.stack(film), args)
        write_record(args, pipe, device)
        print(f"{args.num_images} images in {args.output_dir}")
    state.wait_for_everyone()


def remove_earlier(folder: Path) -> None:
    """Remove the images of an earlier call, which may come from another model, and their samples.json."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # there was none
        files = json.loads((folder / "samples.json").read_text(encoding="utf-8"))["files"]
        (folder / "samples.json").unlink()
        for name in files:
            (folder / Path(name).name).unlink(missing_ok=True)


def write_record(args: argparse.Namespace, pipe: LatentDDPMPipeline, device: torch.device) -> None:
    """`samples.json`: every setting except the number of processes, which changes nothing."""
    record = {
        "pipeline": args.pipeline,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
        "num_inference_steps": args.num_inference_steps,
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
        "eta": args.eta,
        "seed": args.seed,
        "image": args.image,
        "strength": args.strength,
        "mask": args.mask,
        "class_labels": args.class_labels,
        "prompt": args.prompt,
        "conditioning_image": args.conditioning_image,
        "guidance_scale": args.guidance_scale,
        "guidance_interval": args.guidance_interval,
        "guidance_pipeline": args.guidance_pipeline,
        "interpolate": args.interpolate,
        "film_strip": args.film_strip,
        "animation": args.animation,
        "device": device.type,
        "dtype": args.dtype,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "files": [] if args.no_individual else [f"{number:05d}.png" for number in range(args.num_images)],
    }
    write_whole(args.output_dir / "samples.json", json.dumps(record, indent=2, default=str) + "\n")


def main(argv: list[str] | None = None) -> int:
    diffusers.utils.logging.disable_progress_bar()  # of loading; sampling keeps its own
    try:
        sample(parse_args(argv))
    except UserError as error:
        if "WORLD_SIZE" in os.environ:  # of several processes only the first speaks: `run` sees to it
            raise
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run(main)
