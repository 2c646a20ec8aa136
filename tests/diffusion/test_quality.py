"""The distance that chooses a guidance scale: its closed form and oracle, the samples it measures, and the sweep."""

import torch
from small_pipeline import save_pipeline

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion import self_guidance
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.quality import gaussian_distance, latent_features
from latent_ddpm.diffusion.self_guidance import Guide, draw_latents, sweep_scales
from latent_ddpm.publishing.curves import draw_scales
from latent_ddpm.random import Stream, normal
from pipeline_latent_ddpm import LatentDDPMPipeline

CONFIG = UNetConfig(dataset_name="x", seed=3)


def unets(tmp_path):
    """A U-Net, and one that differs a little."""
    pipe = LatentDDPMPipeline.from_pretrained(save_pipeline(tmp_path / "pipeline"))
    pipe.set_progress_bar_config(disable=True)
    weaker = LatentDDPMPipeline.from_pretrained(tmp_path / "pipeline").unet
    torch.manual_seed(1)
    with torch.no_grad():
        for p in weaker.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return pipe, weaker


def whitened(x):
    """Moved and mixed so that the mean is 0 and the covariance 1."""
    return (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_the_distance_of_normal_distributions_in_closed_form_and_by_torch_fidelity():
    torch.manual_seed(0)
    first, second = torch.randn(4000, 3), torch.randn(4000, 3)
    first, second = (
        (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T for x in (first, second)
    )
    moved = second * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([0.0, 1.0, 2.0])
    # |difference of means|^2 + sum (1 - deviation)^2
    assert abs(gaussian_distance(first, moved) - (1 + 4 + 1 + 4)) < 1e-3
    assert abs(gaussian_distance(first, first)) < 1e-6
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    mixed = moved @ torch.randn(3, 3)
    statistics = (fid_features_to_statistics(features) for features in (first, mixed))
    oracle = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert abs(gaussian_distance(first, mixed) - oracle) < 1e-3 * oracle


def test_guided_latents_are_those_of_the_pipeline(tmp_path):
    pipe, weaker = unets(tmp_path)
    pipe.scheduler = sampling_scheduler(CONFIG)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for interval in (None, (0.3, 5.0)):
        with torch.no_grad():
            ours = draw_latents(Guide(pipe.unet, weaker, 2.5, interval), noise, {}, CONFIG, 4)
        words = {"guidance_unet": weaker, "guidance_scale": 2.5, "guidance_interval": interval, "output_type": "latent"}
        theirs = pipe(batch_size=2, latents=noise, num_inference_steps=4, **words).images
        assert torch.allclose(ours, theirs, atol=1e-4)
        plain = pipe(batch_size=2, latents=noise, num_inference_steps=4, output_type="latent").images
        assert not torch.allclose(ours, plain, atol=1e-2)


def test_features_are_those_of_the_middle_block_and_leave_no_hook(tmp_path):
    pipe, _ = unets(tmp_path)
    clean, numbers = torch.randn(3, 3, 8, 8), torch.arange(3)
    whole = latent_features(pipe.unet, clean, numbers, {}, CONFIG, noise_table(CONFIG))
    part = latent_features(pipe.unet, clean[1:], numbers[1:], {}, CONFIG, noise_table(CONFIG))
    assert whole.shape == (3, 16) and torch.allclose(whole[1:], part, atol=1e-5)
    assert not pipe.unet.mid_block._forward_hooks


def test_the_sweep_finds_the_scale_that_the_reals_were_drawn_with(tmp_path, monkeypatch):
    pipe, weaker = unets(tmp_path)
    monkeypatch.setattr(self_guidance, "SWEEP_IMAGES", 64)
    monkeypatch.setattr(self_guidance, "SWEEP_BATCH", 32)
    monkeypatch.setattr(self_guidance, "SWEEP_STEPS", 3)

    def reals(numbers):
        noise = normal(CONFIG.seed, Stream.SWEEP, numbers, (3, 8, 8))
        return draw_latents(Guide(pipe.unet, weaker, 2.0), noise, {}, CONFIG, 3), {}

    distances = sweep_scales(
        lambda scale: Guide(pipe.unet, weaker, scale), pipe.unet, reals, CONFIG, torch.device("cpu")
    )
    assert list(distances) == [1.0, 1.5, 2.0, 2.5, 3.0] and min(distances, key=distances.get) == 2.0
    draw_scales({f"{scale:g}": value for scale, value in distances.items()}, tmp_path / "new" / "scales.png")
    assert (tmp_path / "new" / "scales.png").stat().st_size > 5000
