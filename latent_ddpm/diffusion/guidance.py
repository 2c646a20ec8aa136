"""Guidance at sampling: its command-line options, and the weights of the U-Net's predictions.

The computation itself is `guidance_weights` and `LatentDDPMPipeline._predict` in pipeline_latent_ddpm.py, because that
file must work alone, as the pipeline.py of a published repository.
"""

import argparse
from typing import Any

from latent_ddpm.diffusion.sampling import load_pipeline
from latent_ddpm.errors import UserError
from pipeline_latent_ddpm import LatentDDPMPipeline, guidance_weights

__all__ = ["add_guidance_arguments", "guidance_of", "guidance_weights"]


def add_guidance_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `guidance_of` reads."""
    parser.add_argument("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="guide only while the noise level sigma is between LOW and HIGH")  # fmt: skip
    parser.add_argument("--guidance_pipeline", metavar="DIR",
                        help="guide away from this weaker model instead of the unconditional one")  # fmt: skip


def guidance_of(args: argparse.Namespace, pipe: LatentDDPMPipeline) -> dict[str, Any]:
    """Guidance arguments of `pipe` besides guidance_scale. The weaker U-Net gets the device and dtype of `pipe`.

    Raises:
        UserError: the interval is empty, or the weaker pipeline does not fit `pipe`.
    """
    told: dict[str, Any] = {}
    if args.guidance_interval is not None:
        low, high = args.guidance_interval
        if not 0 <= low < high:
            raise UserError(f"--guidance_interval {low:g} {high:g}: 0 <= LOW < HIGH is required.")
        told["guidance_interval"] = (low, high)
    if args.guidance_pipeline is not None:
        weaker = load_pipeline(args.guidance_pipeline)
        for what in ("in_channels", "out_channels", "sample_size", "num_class_embeds", "cross_attention_dim"):
            own, theirs = pipe.unet.config.get(what), weaker.unet.config.get(what)
            if own != theirs:
                raise UserError(
                    f"--guidance_pipeline {args.guidance_pipeline}: its U-Net has {what} {theirs}, the pipeline's "
                    f"{own}. Use an earlier or smaller model of the same kind, e.g. from scripts/reconstruct_ema.py."
                )
        if pipe.scheduler.config.get("prediction_type") != weaker.scheduler.config.get("prediction_type"):
            raise UserError(f"--guidance_pipeline {args.guidance_pipeline} has another prediction_type.")
        told["guidance_unet"] = weaker.unet.to(pipe.unet.device, pipe.unet.dtype)
    return told
