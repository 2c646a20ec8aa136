"""Mean and standard deviation of the latents: measured, and folded into a stock autoencoder."""

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.models.attention_processor import SpatialNorm

from latent_ddpm.autoencoder.stock import StockAutoencoder
from latent_ddpm.training.distributed import all_reduce_sum
from pipeline_latent_ddpm import kind_of


class Moments:
    """Running per-channel mean and variance of latents (N, D, h, w), in float64, over all processes."""

    def __init__(self, channels: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(2, channels, dtype=torch.float64)
        self.images = 0

    def add(self, latents: torch.Tensor) -> None:
        """Add a batch (N, D, h, w)."""
        # double before squaring: float16 latents of a badly scaled autoencoder would overflow
        values = latents.detach().cpu().double().transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.images += len(latents)
        self.sums += torch.stack((values.sum(1), values.pow(2).sum(1)))

    def result(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (D,) and variance (D,) over all processes, float64; `device` is used for the all-reduce."""
        joint = torch.cat((self.count.view(1), self.sums.flatten())).to(device)
        joint = all_reduce_sum(joint).cpu()
        mean, square = (joint[1:] / joint[0]).view(2, -1)
        return mean, (square - mean**2).clamp_min(0)


def overall_std(variance: torch.Tensor) -> float:
    """One standard deviation for all channels. A common scale preserves the order of code distances."""
    return float(variance.mean().sqrt())


def complete_convolutions(vae: AutoencoderKL, width: int) -> None:
    """Add identity 1x1 convolutions to a VAE without quant_conv or post_quant_conv (as those of SD3 and FLUX)."""
    for name, channels in (("quant_conv", 2 * width), ("post_quant_conv", width)):
        if getattr(vae, name) is None:
            conv = torch.nn.Conv2d(channels, channels, 1).to(vae.device, vae.dtype).requires_grad_(False)
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
            setattr(vae, name, conv)
            vae.register_to_config(**{f"use_{name}": True})


@torch.no_grad()
def fold_normalization(
    autoencoder: StockAutoencoder, mean: torch.Tensor, std: float | torch.Tensor
) -> dict[str, list[float]]:
    """Shift and scale the latent space of a stock autoencoder, in place. Its reconstructions stay the same.

    Afterwards `latents_of(x) * config.scaling_factor` has zero mean per channel, and unit variance over all channels
    (in each channel, if `std` is given by channel). Classes that cannot hold a normalization stay as they are.

    With one standard deviation for all channels, it becomes `scaling_factor`. That preserves which code is nearest.

    Args:
        autoencoder: of a class in AUTOENCODERS.
        mean: (D,), mean of `latents_of` over the training set.
        std: standard deviation of `latents_of` around the channels' means, over all channels or of each (D,). A VQModel
            needs one number.

    Returns:
        Arguments of LatentDDPMPipeline with the normalization of a class that cannot hold it: `latents_mean` and
        `latents_std`, D numbers each. Otherwise nothing.
    """
    if not kind_of(autoencoder).folds:
        return {"latents_mean": mean.tolist(), "latents_std": _by_channel(std, mean).tolist()}
    if type(autoencoder).__name__ == "AutoencoderRAE":
        _fold_into_rae(autoencoder, mean, _by_channel(std, mean))
        return {}
    if isinstance(autoencoder, VQModel):
        autoencoder.quantize.embedding.weight -= mean.to(autoencoder.quantize.embedding.weight)
        for norm in autoencoder.decoder.modules():  # they see the latents, too
            if isinstance(norm, SpatialNorm):
                for conv in (norm.conv_y, norm.conv_b):
                    conv.bias += conv.weight[:, :, 0, 0] @ mean.to(conv.bias)
    else:
        complete_convolutions(autoencoder, len(mean))
        others = {"shift_factor": None, "latents_mean": None, "latents_std": None}  # other conventions
        autoencoder.register_to_config(**{key: value for key, value in others.items() if key in autoencoder.config})
    encoding, decoding = autoencoder.quant_conv, autoencoder.post_quant_conv
    mean = mean.to(encoding.bias)
    encoding.bias[: len(mean)] -= mean  # a KL-VAE's log variances follow its means
    decoding.bias += decoding.weight[:, :, 0, 0] @ mean
    if isinstance(std, torch.Tensor):
        std = std.to(encoding.bias)
        encoding.weight[: len(std)] /= std[:, None, None, None]
        encoding.bias[: len(std)] /= std
        encoding.bias[len(std) :] -= 2 * std.log()
        decoding.weight *= std[None, :, None, None]
        std = 1.0
    autoencoder.register_to_config(scaling_factor=1.0 / std)
    return {}


def _by_channel(std: float | torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """The standard deviation of each channel (D,), float64."""
    return torch.as_tensor(std, dtype=torch.float64).expand(len(mean))


def _fold_into_rae(rae: StockAutoencoder, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a normalization into that which an AutoencoderRAE has: (z - its mean) / (its std + 1e-5), times its factor.

    Args:
        rae: an AutoencoderRAE.
        mean, std: (D,), of its latents as it gives them now.
    """
    factor, tiny = rae.config.scaling_factor, 1e-5
    before = rae._latents_std.double() + tiny
    mean, std = (value.double().to(before.device)[:, None, None] / factor for value in (mean, std))
    new_mean, new_std = rae._latents_mean.double() + before * mean, before * std - tiny
    rae._latents_mean, rae._latents_std = new_mean.float(), new_std.float()
    rae.register_to_config(latents_mean=new_mean.tolist(), latents_std=new_std.tolist(), scaling_factor=1.0)
