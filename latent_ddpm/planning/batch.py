"""train_batch_size auto: as many images at a time as fit a GPU's memory, by the counted bytes of a step."""

from typing import Any

from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.planning.counting import FREE_SHARE, GIB, count_autoencoder, count_unet_alone


def fitting_images(config: RunConfig, latent_shape: tuple[int, int] | None, gpu_bytes: int, shards: int = 1) -> int:
    """Images per micro-batch that fit. A compiled network needs about half of what is counted here, for an eager one.

    Args:
        config: of the stage.
        latent_shape: channels and height of the latents of stage 2; None for stage 1.
        gpu_bytes: memory of the GPU that is free for this run.
        shards: processes that weights, moments and averages are sharded over.

    Raises:
        UserError: not even one image fits.
    """
    counted = _count(config, latent_shape)
    room = (1 - FREE_SHARE) * gpu_bytes - counted["fixed_bytes"] / shards
    fitting = int(room // counted["bytes_per_image"])
    if fitting < 1 or room < counted["optimizer_step_bytes"]:
        needed = counted["fixed_bytes"] / shards + max(counted["bytes_per_image"], counted["optimizer_step_bytes"])
        way_out = "Use a smaller network, or a GPU with more memory."
        if not config.gradient_checkpointing:
            way_out = "Set gradient_checkpointing true, or use a smaller network."
        raise UserError(
            f"A step with one image needs about {needed / GIB:.1f} GiB, and {(1 - FREE_SHARE) * gpu_bytes / GIB:.1f} "
            f"GiB of the GPU can be used. {way_out}"
        )
    return fitting


def _count(config: RunConfig, latent_shape: tuple[int, int] | None) -> dict[str, Any]:
    if isinstance(config, AutoencoderConfig):
        return count_autoencoder(config)
    assert isinstance(config, UNetConfig) and latent_shape is not None
    return count_unet_alone(config, *latent_shape)
