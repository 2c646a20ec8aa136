"""Drawing from a trained pipeline: which one, by which scheduler, from which noise, on how many processes.

    load_pipeline(name)             a folder or a Hub repository -> LatentDDPMPipeline
    with_scheduler(scheduler, name) another scheduler for the same model
    draw_images(...)                the images of given numbers
    draw_film(...)                  and what the U-Net saw in each on the way
    draw_shared(...)                images 0 .. count - 1, shared out between the processes
    own_blocks(count, batch_size)   how they are shared out
    guidance_of(args, pipe)         what guides beside guidance_scale, of the command line
    slerp(a, b, fraction)           noise between two noises

Image number n follows from (seed, n) alone: its starting noise is `normal(seed, Stream.SAMPLE, n)`, and where the
scheduler draws noise itself, that comes from a generator of this image.
"""

import argparse
import contextlib
import difflib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from latent_ddpm.data.images import to_uint8
from latent_ddpm.errors import UserError
from latent_ddpm.progress import progress_bar
from latent_ddpm.random import Stream, normal, seed_for_step
from latent_ddpm.training.distributed import all_gather_rows, process_count, process_index
from pipeline_latent_ddpm import LatentDDPMPipeline

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
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
SCHEDULERS |= {class_name: (class_name, {}) for class_name, _ in list(SCHEDULERS.values())}
SCHEDULERS["PNDMScheduler"] = SCHEDULERS["pndm"]


# what diffusers' schedulers raise for a setting that they know of and do not support
UNSUPPORTED = (NotImplementedError, ValueError)


def one_line(error: Exception) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())


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


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `guidance_of` reads."""
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide only where the noise has a standard deviation between these")  # fmt: skip
    parser.add_argument("--guidance_pipeline", metavar="DIR",
                        help="guide away from this weaker model, in place of that without conditions")  # fmt: skip


def guidance_of(args: argparse.Namespace, pipe: LatentDDPMPipeline) -> dict[str, Any]:
    """What `pipe` is told of guidance beside its scale; the weaker U-Net has its device and dtype.

    Raises:
        UserError: there is no noise in the interval, or the weaker pipeline is not of the same kind.
    """
    told: dict[str, Any] = {}
    if args.guidance_interval is not None:
        low, high = args.guidance_interval
        if not 0 <= low < high:
            raise UserError(f"--guidance_interval {low:g} {high:g}: the first has to be the smaller one, from 0 on.")
        told["guidance_interval"] = (low, high)
    if args.guidance_pipeline is not None:
        weaker = load_pipeline(args.guidance_pipeline)
        for what in ("in_channels", "out_channels", "sample_size", "num_class_embeds", "cross_attention_dim"):
            own, theirs = pipe.unet.config.get(what), weaker.unet.config.get(what)
            if own != theirs:
                raise UserError(
                    f"--guidance_pipeline {args.guidance_pipeline}: its U-Net has {what} {theirs}, the pipeline's "
                    f"{own}. Take an earlier or smaller one, such as scripts/reconstruct_ema.py makes."
                )
        if pipe.scheduler.config.get("prediction_type") != weaker.scheduler.config.get("prediction_type"):
            raise UserError(f"--guidance_pipeline {args.guidance_pipeline} predicts something else than the pipeline.")
        told["guidance_unet"] = weaker.unet.to(pipe.unet.device, pipe.unet.dtype)
    return told


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
    except (ImportError, *UNSUPPORTED) as error:
        raise UserError(f"--scheduler {name}: {one_line(error)}") from error


def latent_shape(pipe: LatentDDPMPipeline) -> tuple[int, int, int]:
    """(D, h, w) of the latents that the pipeline's U-Net denoises."""
    size = pipe.unet.config.sample_size
    return (pipe.unet.config.out_channels, *((size, size) if isinstance(size, int) else size))


def image_shape(pipe: LatentDDPMPipeline) -> tuple[int, int, int]:
    """(C, H, W) of the pipeline's images."""
    factor = 2 ** (len(pipe.vqvae.config.block_out_channels) - 1)
    return (pipe.vqvae.config.out_channels, *(factor * side for side in latent_shape(pipe)[1:]))


def slerp(a: torch.Tensor, b: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation from `a` to `b` (Shoemake, "Animating Rotation with Quaternion Curves", 1985).

    Between standard normal noises it stays standard normal: in many dimensions they are nearly orthogonal, so the
    squares of the two weights sum to about 1. On the straight line the variance would sink to 1/2 at the middle, noise
    that the model has never begun with.

    Args:
        a: (B, ...), not zero.
        b: likewise, and not on one line with `a`.
        fraction: (B,), in [0, 1]; 0 gives `a` and 1 gives `b`, to the last bit.

    Returns:
        (B, ...) in the dtype of `a`.
    """
    shape = (-1, *[1] * (a.ndim - 1))
    cosine = torch.nn.functional.cosine_similarity(a.flatten(1).double(), b.flatten(1).double())
    angle = cosine.clamp(-1, 1).acos()
    fraction = fraction.to(angle)
    weights = (torch.sin((1 - fraction) * angle) / angle.sin(), torch.sin(fraction * angle) / angle.sin())
    weight_a, weight_b = (weight.to(a.dtype).view(shape) for weight in weights)
    return weight_a * a + weight_b * b


def draw_images(
    pipe: LatentDDPMPipeline,
    seed: int,
    numbers: torch.Tensor,
    num_inference_steps: int,
    eta: float = 0.0,
    noise: torch.Tensor | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """The images of the given numbers.

    Args:
        pipe: draws with its own scheduler, on its own device.
        seed: any non-negative integer below 2**64.
        numbers: int64 (B,).
        num_inference_steps: denoising steps.
        eta: noise of DDIM, see `LatentDDPMPipeline`.
        noise: (B, D, h, w), to begin with in place of the numbers' own.
        inputs: what else `LatentDDPMPipeline` takes: `image`, `strength`, `mask_image`, conditions, a callback.

    Returns:
        float32 (B, C, H, W) in [0, 1] on the pipeline's device.

    Raises:
        UserError: the scheduler can not work on what this model predicts, or not begin with an image.
    """
    generators = [torch.Generator().manual_seed(seed_for_step(seed, int(n), 0)) for n in numbers]
    try:
        return pipe(
            batch_size=len(numbers),
            num_inference_steps=num_inference_steps,
            eta=eta,
            generator=generators,
            latents=normal(seed, Stream.SAMPLE, numbers, latent_shape(pipe)) if noise is None else noise,
            output_type="pt",
            **inputs,
        ).images
    except UNSUPPORTED as error:
        if str(error).startswith(("class_labels", "conditioning_image", "prompt")):
            raise UserError(one_line(error)) from error
        if not any(words in str(error) for words in ("prediction_type", "begin midway", "does not say how noisy")):
            raise
        raise UserError(f"{type(pipe.scheduler).__name__} can not sample this model: {one_line(error)}") from error


def draw_film(
    pipe: LatentDDPMPipeline, rows: int, seed: int, numbers: torch.Tensor, num_inference_steps: int, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of the given numbers, and of the first `rows` of them the predicted x0 after each step, decoded.

    Returns:
        What `draw_images` returns, and float32 (rows, S, C, H, W) in [0, 1] on the CPU, where S counts the evaluations
        of the U-Net.

    Raises:
        UserError: as `draw_images`.
    """
    film = []

    def expose(pipe: LatentDDPMPipeline, step: int, t: Any, tensors: dict[str, torch.Tensor]) -> dict:
        film.append((pipe.decode(tensors["pred_original_sample"][:rows]) / 2 + 0.5).float().cpu())
        return {}

    images = draw_images(
        pipe,
        seed,
        numbers,
        num_inference_steps,
        callback_on_step_end=expose,
        callback_on_step_end_tensor_inputs=["pred_original_sample"],
        **inputs,
    )
    return images, torch.stack(film, dim=1)


def own_blocks(count: int, batch_size: int) -> Iterator[torch.Tensor]:
    """The blocks of numbers that this process draws: block k holds k * batch_size and following, below `count`.

    Process k % P of P draws it. What stands together in a batch can change the last bits of an image; so it does not
    depend on P.
    """
    for start in range(process_index() * batch_size, count, process_count() * batch_size):
        yield torch.arange(start, min(start + batch_size, count))


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, arithmetic by one thread: the order of a sum must not depend on how the cores are shared out."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_shared(
    pipe: LatentDDPMPipeline,
    seed: int,
    count: int,
    batch_size: int,
    num_inference_steps: int,
    given: dict[str, torch.Tensor] | None = None,
    **inputs: Any,
) -> torch.Tensor | None:
    """Images number 0 .. count - 1, the same bits on any number of processes; call it in every process.

    Batch k holds the numbers k * batch_size and following, and process k % P of P draws it: what stands together in a
    batch, which can change the last bits, does not depend on P. On a CPU each process draws with one thread.

    Args:
        pipe: the same in every process, on its device.
        seed: as for `draw_images`.
        count: how many images, at least 1.
        batch_size: images at a time in one process.
        num_inference_steps: denoising steps.
        given: conditions of all images, (count, ...) each, by their name in `LatentDDPMPipeline`.
        inputs: what else that takes, the same for all images.

    Returns:
        uint8 (count, C, H, W) on the CPU, in order of number, in the first process; None in the others.

    Raises:
        UserError: as `draw_images`.
    """
    first, processes = process_index(), process_count()
    rounds = math.ceil(count / (batch_size * processes))
    kept = []
    with one_thread(pipe.device):
        for k in progress_bar(range(rounds), desc="sampling", unit="round", disable=first > 0, leave=False):
            start = min((k * processes + first) * batch_size, count)
            numbers = torch.arange(start, min(start + batch_size, count))
            part = torch.zeros(batch_size, *image_shape(pipe), dtype=torch.uint8, device=pipe.device)
            if len(numbers):
                own = {name: values[numbers] for name, values in (given or {}).items()}
                images = draw_images(pipe, seed, numbers, num_inference_steps, **own, **inputs)
                part[: len(numbers)] = to_uint8(images * 2 - 1)
            joint = all_gather_rows(part)  # (P * batch_size, C, H, W), by rank and so by number; padded at the very end
            if first == 0:
                kept.append(joint.cpu())
    return torch.cat(kept)[:count] if first == 0 else None
