"""The KL-VAE's bottleneck: a Gaussian posterior per latent instead of a quantizer, and its KL divergence."""

from typing import NamedTuple

import torch
from torch import nn

from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.random import Stream, normal


def kl_to_standard_normal(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, 1), elementwise, in nats (arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar)


class Posterior(NamedTuple):
    """The output of KLPosterior; the counterpart of Quantized.

    latents: (B, D, H, W) float32; a sample in training mode, otherwise the mean.
    kl_loss: scalar, nats per image value; see KLPosterior.
    std: scalar, the posterior's standard deviation, averaged over all latents. 0: the latents carry no noise. 1, with
        means near 0: they carry only noise.
    """

    latents: torch.Tensor
    kl_loss: torch.Tensor
    std: torch.Tensor
    indices = None  # there are no codes; a class attribute, not a field

    def loss(self, config: AutoencoderConfig) -> torch.Tensor:
        """The weighted loss; scalar."""
        return config.kl_weight * self.kl_loss

    def figures(self) -> dict[str, torch.Tensor]:
        """The metrics to log; scalars."""
        return {"kl_loss": self.kl_loss, "posterior_std": self.std}


class KLPosterior(nn.Module):
    """A diagonal Gaussian, sampled in training (Kingma and Welling, arXiv 1312.6114, eq. 10; LDM, arXiv 2112.10752, G).

    It has the methods of a Quantizer, but no table and no state to save. The noise of an example follows from (seed,
    example number) alone.

    LDM's code sums reconstruction loss and divergence over an image's elements and divides both by the batch size.
    Here both are also divided by the number of values of an image (its channels times its pixels). The reconstruction
    loss then is a mean, and kl_loss is the divergence per image value, summed over the latent channels. Both terms
    shrink by the same factor, so kl_weight means the same as in LDM's code with reconstruction_loss l1 and
    lpips_weight 1.

    Args:
        values_per_position: image values per latent position: image channels times the downsampling factor squared.
        seed: random seed of the noise.
    """

    num_embeddings = 0

    def __init__(self, values_per_position: int, seed: int = 0) -> None:
        super().__init__()
        self.values_per_position, self.seed = values_per_position, seed

    def forward(self, moments: torch.Tensor, numbers: torch.Tensor | None = None) -> Posterior:
        """The posterior of a batch.

        Args:
            moments: (B, 2 D, H, W), means and log variances; the log variances are clamped to [-30, 20], as in
                diffusers.
            numbers: int64 (B,), the example numbers; required in training mode.

        Raises:
            ValueError: training mode without numbers.
        """
        with torch.autocast(moments.device.type, enabled=False):
            mean, logvar = moments.float().chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            std = (0.5 * logvar).exp()
            kl_loss = kl_to_standard_normal(mean, logvar).sum(1).mean() / self.values_per_position
            latents = mean
            if self.training:
                if numbers is None:
                    raise ValueError("KLPosterior draws noise in training mode: pass the numbers of the examples")
                latents = mean + std * normal(self.seed, Stream.POSTERIOR, numbers, mean.shape[1:])
        return Posterior(latents, kl_loss, std.mean())

    def initialize(self, latents: torch.Tensor) -> None:
        """Does nothing: there is no table to fit."""

    def update(self, step: int, kept: torch.Tensor | None = None) -> None:
        """Does nothing: there is no table to update and there are no codes to count."""
