"""Reconstruction metrics of an autoencoder: PSNR, SSIM, codebook usage, perplexity."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from skimage.metrics import structural_similarity

from latent_ddpm.autoencoder.quantizers import perplexity
from latent_ddpm.data.images import to_float
from latent_ddpm.training.distributed import all_reduce_sum


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each image: (B, C, H, W) in [-1, 1], clamped -> (B,).

    An exact copy counts as 100 dB, so the mean stays finite.
    """
    error = ((reconstruction.clamp(-1, 1) - images) / 2).pow(2).flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of each image, by scikit-image: (B, C, H, W) in [-1, 1] -> (B,)."""
    pairs = zip(reconstruction.clamp(-1, 1).cpu().numpy(), images.cpu().numpy(), strict=True)
    window = min(7, images.shape[-1] - (images.shape[-1] + 1) % 2)
    return np.array([structural_similarity(a, b, data_range=2.0, channel_axis=0, win_size=window) for a, b in pairs])


@torch.no_grad()
def evaluate_autoencoder(
    reconstruct: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    batches: Iterable[dict[str, torch.Tensor]],
    num_codes: int,
    device: torch.device,
    with_ssim: bool = False,
) -> dict[str, float]:
    """Measure an autoencoder on this process's share of a dataset; the result covers all processes.

    Args:
        reconstruct: images (B, C, R, R) in [-1, 1] -> reconstruction (same shape) and indices (B, h, w),
            or None where there are no codes.
        batches: dicts with "image", uint8 (B, C, R, R).
        num_codes: size of the codebook; 0 where there is none.
        device: of `reconstruct`.
        with_ssim: also measure SSIM, on the CPU.

    Returns:
        psnr (dB, mean over images), explained_variance (1 - squared error / variance of all pixel values; 0 where those
        are all the same), images, ssim if asked for, and where there is a codebook codebook_usage (share of codes used
        at least once) and perplexity.
    """
    sums = torch.zeros(7, dtype=torch.float64, device=device)
    counts = torch.zeros(num_codes, dtype=torch.float64, device=device)
    for batch in batches:
        images = to_float(batch["image"].to(device))
        reconstruction, indices = reconstruct(images)
        structure = ssim(reconstruction, images).sum() if with_ssim else 0.0
        pixels, error = images.double(), (reconstruction - images).double()
        sums += torch.cat(
            [
                torch.tensor([len(images), images.numel(), structure]).to(sums),
                torch.stack([psnr(reconstruction, images).double().sum(), error.pow(2).sum()]),
                torch.stack([pixels.sum(), pixels.pow(2).sum()]),
            ]
        )
        if num_codes:
            counts += torch.bincount(indices.flatten(), minlength=num_codes)
    all_reduce_sum(sums)
    all_reduce_sum(counts)
    number, pixels, total_ssim, total_psnr, squared_error, total, squares = sums.tolist()
    variance = squares - total**2 / pixels
    result = {
        "psnr": total_psnr / number,
        "explained_variance": 1 - squared_error / variance if variance > 1e-9 * squares else 0.0,
        "images": int(number),
    }
    if num_codes:
        result |= {"codebook_usage": float((counts > 0).double().mean()), "perplexity": perplexity(counts)}
    return result | ({"ssim": total_ssim / number} if with_ssim else {})
