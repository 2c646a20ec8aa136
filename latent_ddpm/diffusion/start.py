"""Start stage 2 from the U-Net of a published pipeline or of a run (`init_unet`)."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from latent_ddpm.config import UNetConfig, changed
from latent_ddpm.diffusion.unet import StockUNet
from latent_ddpm.errors import UserError
from latent_ddpm.pretrained import commit_of, find_model, load_whole

logger = logging.getLogger(__name__)

PARTS = ("unet", "pipeline/unet")  # in a pipeline, and in a run of ours
CLASSES = ("UNet2DModel", "UNet2DConditionModel")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")
CLASS_EMBEDDING = "class_embedding.weight"


@dataclasses.dataclass
class UNetStart:
    """A pretrained U-Net that stage 2 starts from.

    Attributes:
        name: as the user calls it.
        unet: a UNet2DModel or UNet2DConditionModel.
        class_names: of its class embeddings; None if they have no names.
        schedule: keys of the config with the noise schedule and the prediction type that it was trained with.
        folder: of its pipeline; the autoencoder may be there, too.
    """

    name: str
    unet: StockUNet
    class_names: list[str] | None
    schedule: dict[str, Any]
    folder: Path


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def load_unet_start(config: UNetConfig) -> UNetStart | None:
    """The U-Net of `init_unet`; None if that is unset.

    Raises:
        UserError: it cannot be found or loaded, or was trained with a noise schedule that ours does not have.
    """
    if config.init_unet is None:
        return None
    name = config.init_unet
    folder = find_model(name, "init_unet", PARTS, config.init_unet_subfolder, config.init_unet_revision)
    kind = _read(folder / "config.json").get("_class_name")
    if kind not in CLASSES:
        found = f"holds the class {kind}" if kind else "holds no config.json of a model"
        raise UserError(f"init_unet {name}: {folder} {found}; a {' or '.join(CLASSES)} is needed.")
    try:
        unet = load_whole(getattr(diffusers, kind), folder).float()
    except Exception as error:  # diffusers, safetensors and the class itself raise unrelated ones
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"init_unet {name} cannot be loaded: {reason}") from error
    index = _read(folder.parent / "model_index.json")
    schedule = _schedule(_read(folder.parent / "scheduler" / "scheduler_config.json"), name)
    return UNetStart(name, unet, index.get("class_names"), schedule, folder.parent)


def _schedule(saved: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys of the config that a scheduler's config stands for; {} if there is none.

    Raises:
        UserError: the config has no such schedule.
    """
    if not saved:
        return {}
    if saved.get("use_flow_sigmas") or saved.get("prediction_type") == "flow_prediction":
        shift = saved.get("flow_shift") or 1.0
        timesteps = saved.get("num_train_timesteps", 1000)
        return {"prediction_type": "flow_prediction", "noise_shift": shift, "num_train_timesteps": timesteps}
    if saved.get("beta_schedule", "linear") not in BETAS:
        raise UserError(f"init_unet {name} has the beta_schedule {saved['beta_schedule']}, not {', '.join(BETAS)}.")
    keys = {key: saved[key] for key in SCHEDULE if saved.get(key) is not None}
    keys["prediction_type"] = saved.get("prediction_type", "epsilon")
    keys["noise_shift"] = 1.0
    if saved.get("trained_betas") is not None:
        plain = DDPMScheduler(**{key: value for key, value in keys.items() if key in SCHEDULE}).alphas_cumprod.double()
        shifted = DDPMScheduler(trained_betas=saved["trained_betas"]).alphas_cumprod.double()
        middle = slice(len(plain) // 4, 3 * len(plain) // 4)  # away from the ends, where divisions lose digits
        shifts = ((1 - shifted) / shifted * plain / (1 - plain)).sqrt()[middle]
        if shifts.std() > 1e-2 * shifts.mean():
            raise UserError(f"init_unet {name} has trained_betas, which no beta_schedule with a noise_shift gives.")
        keys["noise_shift"] = round(float(shifts.median()), 3)
    return keys


def with_unet_of(config: UNetConfig, start: UNetStart) -> UNetConfig:
    """The config with the sizes and the noise schedule of the pretrained U-Net.

    Without an autoencoder of its own, the run takes that of the U-Net's pipeline. Latents then keep its normalization;
    those of a given autoencoder are normalized by the training set.
    """
    shape = start.unet.config
    levels = range(len(shape.block_out_channels))
    head = shape.attention_head_dim
    keys = {
        "unet_block_out_channels": list(shape.block_out_channels),
        "unet_layers_per_block": shape.layers_per_block,
        "unet_attention_levels": [level for level in levels if "Attn" in shape.down_block_types[level]],
        "unet_attention_head_dim": head if isinstance(head, int) else config.unet_attention_head_dim,
        "unet_norm_num_groups": shape.norm_num_groups,
        "unet_time_scale_shift": shape.resnet_time_scale_shift,
        **start.schedule,
    }
    if config.autoencoder is None and not (config.autoencoder_dir / "config.json").exists():
        local = commit_of(start.folder) is None
        keys["autoencoder"] = str(start.folder) if local else config.init_unet
        keys["autoencoder_revision"] = None if local else config.init_unet_revision
        # the scale of another autoencoder says nothing about the latents that this U-Net was trained on
        if config.latent_normalization is None:
            keys["latent_normalization"] = "keep"
    made = changed(config, **keys)
    made.given_keys = made.given_keys | frozenset(keys)
    try:
        made.validate()
    except UserError as error:
        raise UserError(f"init_unet {start.name}: {error}") from error
    return made


def new_unet_like(start: UNetStart, latent_channels: int, latent_size: int, conditions: dict[str, Any]) -> StockUNet:
    """A U-Net of the same architecture for these latents and conditions, with random weights.

    Args:
        start: the pretrained one.
        latent_channels, latent_size: of the latents.
        conditions: `Conditions.unet_arguments`.

    Raises:
        UserError: it is for other latents, or cannot have these conditions.
    """
    shape = start.unet.config
    if shape.out_channels != latent_channels:
        raise UserError(
            f"init_unet {start.name} is for latents of {shape.out_channels} channels, and the autoencoder has "
            f"{latent_channels}. Give the autoencoder that it was trained with (--autoencoder)."
        )
    factor = 2 ** (len(shape.block_out_channels) - 1)
    if latent_size % factor:
        raise UserError(
            f"init_unet {start.name} needs latents whose sides are a multiple of {factor}; they have {latent_size}."
        )
    width = conditions.get("cross_attention_dim")
    if width != (shape.get("cross_attention_dim") if type(start.unet).__name__ == CLASSES[1] else None):
        has = "is conditioned on text" if type(start.unet).__name__ == CLASSES[1] else "has no layers for text"
        raise UserError(
            f"init_unet {start.name} {has}, of another kind than conditions ask for. Text cannot be added or left out."
        )
    arguments = {
        **shape,
        "sample_size": latent_size,
        "in_channels": latent_channels + conditions.get("conditioning_channels", 0),
        "num_class_embeds": conditions.get("num_class_embeds"),
    }
    return type(start.unet).from_config({key: value for key, value in arguments.items() if key[0] != "_"})


@torch.no_grad()
def weights_for(unet: StockUNet, start: UNetStart, class_names: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """The weights that training starts with, and a line of the log on what is new.

    Input channels of added conditions start at zero, so that the U-Net first predicts as before. Classes of the same
    names keep their embeddings; a new one starts as that of no class.

    Args:
        unet: from `new_unet_like`.
        start: the pretrained one.
        class_names: of the conditions; None without classes.
    """
    taken, own, new = start.unet.state_dict(), unet.state_dict(), []
    latents = start.unet.config.out_channels
    made = {name: value for name, value in taken.items() if name in own and own[name].shape == value.shape}
    if "conv_in.weight" not in made:
        kernel = torch.zeros_like(own["conv_in.weight"])
        kernel[:, :latents] = taken["conv_in.weight"][:, :latents]
        made["conv_in.weight"] = kernel
        if kernel.shape[1] > latents:
            new.append(f"{kernel.shape[1] - latents} input channels of the conditioning image")
    if CLASS_EMBEDDING in own:
        before = taken.get(CLASS_EMBEDDING)
        nothing = torch.zeros_like(own[CLASS_EMBEDDING][0]) if before is None else before[-1]
        known = {} if before is None else dict(zip(start.class_names or (), before, strict=False))
        table = nothing.expand_as(own[CLASS_EMBEDDING]).clone()
        for row, name in enumerate(class_names or ()):
            if name in known:
                table[row] = known[name]
        made[CLASS_EMBEDDING] = table
        missing = [name for name in class_names or () if name not in known]
        if missing:
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            new.append(f"{len(missing)} of {len(class_names)} classes ({shown})")
    lost = sorted(set(own) - set(made))
    if lost:
        raise UserError(
            f"init_unet {start.name} lacks {lost[0]} and {len(lost) - 1} more of the weights that it needs."
        )
    logger.info("init_unet %s: %d weights are taken; new: %s", start.name, len(taken), "; ".join(new) or "nothing")
    return made
