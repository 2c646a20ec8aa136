"""The scaling factor: mean and standard deviation of the latents, folded into a stock autoencoder."""

import torch
from diffusers import AutoencoderKL, VQModel

from latent_ddpm.autoencoder.stock import StockAutoencoder
from latent_ddpm.training.distributed import all_reduce_sum


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


def _complete_convolutions(vae: AutoencoderKL) -> None:
    """Add identity 1x1 convolutions to a VAE without quant_conv or post_quant_conv (as those of SD3 and FLUX)."""
    width = vae.config.latent_channels
    for name, channels in (("quant_conv", 2 * width), ("post_quant_conv", width)):
        if getattr(vae, name) is None:
            conv = torch.nn.Conv2d(channels, channels, 1).to(vae.device, vae.dtype).requires_grad_(False)
            torch.nn.init.dirac_(conv.weight)
            torch.nn.init.zeros_(conv.bias)
            setattr(vae, name, conv)
            vae.register_to_config(**{f"use_{name}": True})


@torch.no_grad()
def fold_normalization(autoencoder: StockAutoencoder, mean: torch.Tensor, std: float) -> StockAutoencoder:
    """Shift and scale the latent space of a stock autoencoder, in place. Its reconstructions stay the same.

    Afterwards `latents_of(x) * config.scaling_factor` has zero mean per channel and unit variance over all channels.
    The mean is folded into the biases of the two 1x1 convolutions and into a VQModel's codes. The standard deviation
    becomes `scaling_factor`; one number for all channels preserves which code is nearest.

    Args:
        autoencoder: a stock VQModel or AutoencoderKL.
        mean: (D,), mean of `latents_of` over the training set.
        std: standard deviation of `latents_of` over all channels, around the channels' means.

    Returns:
        `autoencoder`.
    """
    if isinstance(autoencoder, VQModel):
        autoencoder.quantize.embedding.weight -= mean.to(autoencoder.quantize.embedding.weight)
    else:
        _complete_convolutions(autoencoder)
        autoencoder.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)  # other conventions
    mean = mean.to(autoencoder.quant_conv.bias)
    autoencoder.quant_conv.bias[: len(mean)] -= mean  # a KL-VAE's log variances follow its means
    autoencoder.post_quant_conv.bias += autoencoder.post_quant_conv.weight[:, :, 0, 0] @ mean
    autoencoder.register_to_config(scaling_factor=1.0 / std)
    return autoencoder
