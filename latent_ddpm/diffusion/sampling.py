"""Sampling from a trained pipeline: loading, schedulers, initial noise, several processes.

    load_pipeline(name)             a folder or a Hub repository -> LatentDDPMPipeline
    with_scheduler(scheduler, name) another scheduler for the same model
    draw_images(...)                the images of given numbers
    draw_film(...)                  the same, with the predicted images after each step
    draw_shared(...)                images 0 .. count - 1, distributed over the processes
    own_blocks(count, batch_size)   the numbers that this process draws
    guidance_of(args, pipe)         the guidance options of the command line, except guidance_scale
    slerp(a, b, fraction)           interpolation of two noises

Image number n follows from (seed, n) alone: its initial noise is `normal(seed, Stream.SAMPLE, n)`, and a scheduler that
draws noise itself uses a generator of this image.
"""

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
from pipeline_latent_ddpm import LatentDDPMPipeline, downsampling_of, image_channels_of

# name: (diffusers class, changes to its config)
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": (
        "PNDMScheduler",
        {"skip_prk_steps": True},
    ),  # as in latent diffusion; otherwise it needs 4 steps or more
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


# raised by diffusers' schedulers for a known setting that they do not support
UNSUPPORTED = (NotImplementedError, ValueError)


def one_line(error: Exception) -> str:
    """An exception's message without its line breaks."""
    return " ".join(str(error).split())


def load_pipeline(name: str) -> LatentDDPMPipeline:
    """Load a pipeline from a folder or a Hub repository as `LatentDDPMPipeline`.

    Raises:
        UserError: the folder or repository does not exist or holds something else.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        inside = folder / "pipeline"
        hint = f"; did you mean {inside}?" if (inside / "model_index.json").is_file() else ""
        raise UserError(f"{name} is not a pipeline folder: it has no model_index.json{hint}")
    # A Hub id is `name` or `user/name`; anything else must be a folder.
    if not folder.is_dir() and (name.count("/") > 1 or name.startswith((".", "/", "~"))):
        raise UserError(f"there is no folder {name}")
    try:
        index = LatentDDPMPipeline.load_config(name)
        missing = {"vqvae", "unet", "scheduler"} - index.keys()
        if missing:
            raise UserError(
                f"{name} holds a {index.get('_class_name')}, which is not a pipeline of latent-ddpm: "
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
    """The diffusers class and config changes for a scheduler name, in upper or lower case."""
    by_lower = {known.lower(): known for known in SCHEDULERS}
    if name.lower() not in by_lower:
        nearest = by_lower[difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.0)[0]]
        raise UserError(f"--scheduler {name} is unknown; did you mean {nearest}?")
    return SCHEDULERS[by_lower[name.lower()]]


def with_scheduler(scheduler: diffusers.SchedulerMixin, name: str) -> diffusers.SchedulerMixin:
    """The scheduler `name`, with the noise table and prediction type of the pipeline's scheduler.

    Raises:
        UserError: the name is unknown, or the scheduler does not support this model.
    """
    class_name, overrides = find_scheduler(name)
    scheduler_class = getattr(diffusers, class_name)
    own, config = type(scheduler).__name__, scheduler.config
    if own.startswith("FlowMatch") != class_name.startswith("FlowMatch"):
        raise UserError(f"--scheduler {name}: the model is trained for {own}; only one of the two is flow matching")
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    parameters = inspect.signature(scheduler_class).parameters
    # Otherwise its noise table would silently differ from the one in training, and the images would be wrong.
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in parameters:
        raise UserError(
            f"--scheduler {name}: {class_name} lacks rescale_betas_zero_snr, which this model was trained with"
        )
    if "clip_sample" in parameters:  # the default, True, is for pixels; latents exceed [-1, 1]
        config.setdefault("clip_sample", False)
    try:
        return scheduler_class.from_config(config, **overrides)
    except (ImportError, *UNSUPPORTED) as error:
        raise UserError(f"--scheduler {name}: {one_line(error)}") from error


def latent_shape(pipe: LatentDDPMPipeline) -> tuple[int, int, int]:
    """(D, h, w), the shape of the pipeline's latents."""
    size = pipe.unet.config.sample_size
    return (pipe.unet.config.out_channels, *((size, size) if isinstance(size, int) else size))


def image_shape(pipe: LatentDDPMPipeline) -> tuple[int, int, int]:
    """(C, H, W), the shape of the pipeline's images."""
    factor = downsampling_of(pipe.vqvae)
    return (image_channels_of(pipe.vqvae), *(factor * side for side in latent_shape(pipe)[1:]))


def slerp(a: torch.Tensor, b: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation from `a` to `b` (Shoemake, "Animating Rotation with Quaternion Curves", 1985).

    The result of standard normal noises is standard normal: in many dimensions they are nearly orthogonal, so the
    squares of the two weights sum to about 1. Linear interpolation would reduce the variance to 1/2 in the middle, and
    the model has never started from such noise.

    Args:
        a: (B, ...), not zero.
        b: (B, ...), not zero and not collinear with `a`.
        fraction: (B,), in [0, 1]; 0 gives exactly `a`, 1 gives exactly `b`.

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
    """Draw the images of the given numbers.

    Args:
        pipe: the pipeline, with its scheduler and on its device.
        seed: random seed, an integer from 0 to 2**64 - 1.
        numbers: int64 (B,), image numbers.
        num_inference_steps: denoising steps.
        eta: noise of DDIM, see `LatentDDPMPipeline`.
        noise: (B, D, h, w), initial noise instead of that of the numbers.
        inputs: further arguments of `LatentDDPMPipeline`: `image`, `strength`, `mask_image`, conditions, a callback.

    Returns:
        float32 (B, C, H, W) in [0, 1] on the pipeline's device.

    Raises:
        UserError: the scheduler does not support this prediction type or an image as the start, or a condition is
            invalid.
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
    """Draw the images of the given numbers, and decode the predicted x0 of the first `rows` after each step.

    Returns:
        The result of `draw_images`, and float32 (rows, S, C, H, W) in [0, 1] on the CPU, where S is the number of U-Net
        evaluations.

    Raises:
        UserError: see `draw_images`.
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
    """The blocks of numbers that this process draws. Block k starts at k * batch_size; numbers are below `count`.

    Process k % P of P draws block k. The other images of a batch can change the last bits of an image, so the blocks do
    not depend on P.
    """
    for start in range(process_index() * batch_size, count, process_count() * batch_size):
        yield torch.arange(start, min(start + batch_size, count))


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU: the order of a sum must not depend on the number of threads."""
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
    """Draw images 0 .. count - 1, bit for bit equal on any number of processes. Every process calls this.

    Process k % P of P draws batch k, which starts at number k * batch_size. The other images of a batch can change the
    last bits of an image, so the batches do not depend on P. On a CPU, each process uses one thread.

    Args:
        pipe: the same pipeline in every process, on its device.
        seed: see `draw_images`.
        count: number of images, at least 1.
        batch_size: images per batch in one process.
        num_inference_steps: denoising steps.
        given: conditions of all images, (count, ...) each, by their names in `LatentDDPMPipeline`.
        inputs: further arguments of `LatentDDPMPipeline`, the same for all images.

    Returns:
        uint8 (count, C, H, W) on the CPU, ordered by number, in the first process; None in the others.

    Raises:
        UserError: see `draw_images`.
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
            joint = all_gather_rows(part)  # (P * batch_size, C, H, W), ordered by rank, so by number; padded at the end
            if first == 0:
                kept.append(joint.cpu())
    return torch.cat(kept)[:count] if first == 0 else None
