"""Start stage 1 from a pretrained autoencoder (`init_from`), all of it or the decoder alone."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from latent_ddpm.autoencoder.quantizers import EMACodebook
from latent_ddpm.autoencoder.scaling import complete_convolutions
from latent_ddpm.autoencoder.stock import PARTS, StockAutoencoder, autoencoder_hash, load_autoencoder
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, changed
from latent_ddpm.errors import UserError
from latent_ddpm.pretrained import find_model

logger = logging.getLogger(__name__)

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}  # those of ours
FROZEN = ("encoder.", "quant_conv.")  # what determines the latents


@dataclasses.dataclass
class Start:
    """A pretrained autoencoder that stage 1 starts from.

    Attributes:
        name: as the user calls it.
        stock: an AutoencoderKL or VQModel.
        identity: of its files.
    """

    name: str
    stock: StockAutoencoder
    identity: str


def load_start(config: AutoencoderConfig) -> Start | None:
    """The autoencoder of `init_from`; None if that is unset.

    Raises:
        UserError: it cannot be found or loaded, or has parts that ours does not have.
    """
    if config.init_from is None:
        return None
    name = config.init_from
    folder = find_model(name, "init_from", PARTS, config.init_from_subfolder, config.init_from_revision)
    if not (folder / "config.json").exists():
        raise UserError(
            f"init_from {name}: there is no autoencoder in {folder}. Give a folder that holds a config.json."
        )
    stock = load_autoencoder(folder, f"init_from {name}")
    if not isinstance(stock, (AutoencoderKL, VQModel)):
        raise UserError(
            f"init_from {name} is an {type(stock).__name__}. Stage 1 starts from AutoencoderKL and VQModel; "
            f"train_unet.py takes the other classes as they are (--autoencoder)."
        )
    if lacking := _lacking(stock):
        raise UserError(f"init_from {name}: the autoencoder of stage 1 has no {lacking}.")
    return Start(name, stock, autoencoder_hash(Path(folder)))


def _lacking(stock: StockAutoencoder) -> str | None:
    """What of a stock autoencoder ours cannot be; None if it can be all of it."""
    config = stock.config
    for key, block in BLOCKS.items():
        if others := sorted(set(config[key]) - {block}):
            return f"{', '.join(others)} ({key})"
    if config.act_fn != "silu":
        return f"{config.act_fn} (act_fn)"
    if config.get("norm_type", "group") != "group":
        return f"{config.norm_type} normalization (norm_type)"
    if config.get("vq_embed_dim") not in (None, config.latent_channels):
        return f"codes of {config.vq_embed_dim} dimensions for {config.latent_channels} latent channels (vq_embed_dim)"
    return None


def with_architecture(config: AutoencoderConfig, start: Start) -> AutoencoderConfig:
    """The config with the sizes of the pretrained autoencoder, and with its kind of latents.

    Raises:
        UserError: the config asks for codes of another kind, or freezes an encoder of other image channels.
    """
    stock, shape = start.stock, start.stock.config
    is_kl = isinstance(stock, AutoencoderKL)
    if not is_kl and "quantizer" in config.given_keys and config.quantizer not in ("ema", "kl"):
        raise UserError(
            f"init_from {start.name}: the codes of a VQModel go on with quantizer ema, not {config.quantizer}."
        )
    if config.freeze_encoder and shape.in_channels != config.image_channels:
        raise UserError(
            f"init_from {start.name} is for images of {shape.in_channels} channels, image_channels is "
            f"{config.image_channels}; with freeze_encoder they must be equal."
        )
    keys: dict[str, Any] = {
        "block_out_channels": list(shape.block_out_channels),
        "layers_per_block": shape.layers_per_block,
        "norm_num_groups": shape.norm_num_groups,
        "latent_channels": shape.latent_channels,
        "mid_block_add_attention": shape.get("mid_block_add_attention", True),
        "quantizer": "kl" if is_kl else "ema",
        "codebook_start": 0,
        "fsq_levels": None,
    }
    if is_kl:
        keys["gradient_estimator"] = "straight_through"
    else:
        keys["num_vq_embeddings"] = shape.num_vq_embeddings
    made = changed(config, **keys)
    replaced = [f"{key} {value}" for key, value in keys.items() if value != getattr(config, key)]
    note = f"init_from sets {', '.join(replaced)}" if replaced else ""
    made.source_note = "; ".join(filter(None, [config.source_note, note]))  # said when the log begins
    made.given_keys = made.given_keys | frozenset(keys)
    made.validate()
    return made


def say_of_start(config: AutoencoderConfig, start: Start) -> None:
    """Log what is taken from the pretrained autoencoder, and what is new."""
    channels, wanted = start.stock.config.in_channels, config.image_channels
    taken = "the codes, " if config.quantizer == "ema" else ""
    fixed = "; the encoder stays as it is, so the latents do, too" if config.freeze_encoder else ""
    logger.info("init_from %s: %sencoder and decoder are taken%s", start.name, taken, fixed)
    if channels != wanted:
        logger.info("init_from: first and last convolution are adapted from %d to %d image channels", channels, wanted)


@torch.no_grad()
def take_weights(model: Autoencoder, start: Start, freeze: bool) -> None:
    """Give the weights of a pretrained autoencoder to one of the same sizes, in place.

    Args:
        model: new, on the CPU.
        start: the pretrained one.
        freeze: whether encoder, quant_conv and codes stay as they are.
    """
    stock = start.stock
    if isinstance(stock, AutoencoderKL):
        complete_convolutions(stock, stock.config.latent_channels)
    weights = {name: value for name, value in stock.state_dict().items() if not name.startswith("quantize.")}
    own = model.state_dict()
    for name, adapt in (("encoder.conv_in.weight", _input_channels), ("decoder.conv_out.weight", _output_channels),
                        ("decoder.conv_out.bias", _output_channels)):  # fmt: skip
        weights[name] = adapt(weights[name], own[name])
    weights |= {name: value for name, value in own.items() if name.startswith("quantizer.")}
    model.load_state_dict(weights)
    if isinstance(model.quantizer, EMACodebook):
        model.quantizer.set_table(stock.quantize.embedding.weight)
        model.quantizer.is_fixed = freeze
    if freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(FROZEN))


def _input_channels(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The kernel (O, C, k, k) of a first convolution for as many image channels as `new` has.

    Fewer than three, before or after: the same response to gray images. Channels beyond the old ones start at zero.
    """
    have, want = old.shape[1], new.shape[1]
    if have == want:
        return old
    if min(have, want) < 3:
        return (old.sum(1, keepdim=True) / want).expand_as(new).clone()
    made = torch.zeros_like(new)
    made[:, : min(have, want)] = old[:, :want]
    return made


def _output_channels(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Kernel (C, I, k, k) or bias (C,) of a last convolution for as many image channels as `new` has.

    Channels that the old one does not have are the mean of its channels, and so are all of fewer than three.
    """
    have, want = len(old), len(new)
    if have == want:
        return old
    made = old.mean(0, keepdim=True).expand_as(new).clone()
    if min(have, want) >= 3:
        made[: min(have, want)] = old[:want]
    return made


@torch.no_grad()
def with_decoder_of(start: Start, model: Autoencoder) -> StockAutoencoder:
    """The pretrained autoencoder with the decoder of a trained one: its latents and its config stay the same.

    Args:
        start: as `take_weights` has left it.
        model: trained from it with its encoder frozen.
    """
    trained = {
        name: value for name, value in model.state_dict().items() if not name.startswith((*FROZEN, "quantizer."))
    }
    start.stock.load_state_dict({**start.stock.state_dict(), **trained})
    return start.stock
