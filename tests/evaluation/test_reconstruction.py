"""PSNR, SSIM, codebook usage and explained variance."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

from latent_ddpm.evaluation.reconstruction import evaluate_autoencoder, psnr, ssim


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(0.01, 1.0), channels=st.sampled_from([1, 3]))
def test_psnr_is_scikit_images(noise, channels):
    images = torch.rand(3, channels, 16, 16) * 2 - 1
    other = (images + noise * torch.randn_like(images)).clamp(-1, 1)
    oracle = [peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(images.numpy(), other.numpy(), strict=True)]
    assert np.allclose(psnr(other, images).numpy(), oracle, atol=1e-3)
    assert psnr(images, images).tolist() == [100.0] * 3
    assert np.allclose(ssim(images, images), 1.0)
    assert (ssim(other, images) < 1).all()


def test_evaluate_autoencoder_counts_codes():
    batches = [{"image": torch.full((2, 1, 8, 8), value, dtype=torch.uint8)} for value in (0, 100, 200)]

    def reconstruct(images):
        return images, (images[:, 0] > 0).long()

    result = evaluate_autoencoder(reconstruct, batches, 4, torch.device("cpu"), with_ssim=True)
    assert result["images"] == 6 and result["psnr"] == 100 and result["ssim"] == pytest.approx(1)
    assert result["codebook_usage"] == 0.5  # codes 0 and 1 of 4
    assert result["perplexity"] == pytest.approx(np.exp(-(1 / 3) * np.log(1 / 3) - (2 / 3) * np.log(2 / 3)))
    json.dumps(result)
    result = evaluate_autoencoder(lambda images: (images, None), batches, 0, torch.device("cpu"))
    # no codebook, no figures of one
    assert result == {"psnr": 100, "explained_variance": 1.0, "images": 6}


def test_explained_variance():
    images = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, -1, 8, 8)

    def measured(reconstruct, images=images):
        shares = [{"image": part} for part in images.split(3)]
        return evaluate_autoencoder(reconstruct, shares, 0, torch.device("cpu"))["explained_variance"]

    values = images.double() / 127.5 - 1
    assert measured(lambda x: (torch.full_like(x, values.mean()), None)) == pytest.approx(0, abs=1e-6)
    assert measured(lambda x: (x + 0.1, None)) == pytest.approx(1 - 0.01 / float(values.var(correction=0)), rel=1e-4)
    assert measured(lambda x: (-x, None)) < 0
    assert measured(lambda x: (x * 0, None), images[:1]) == 0  # nothing varies
