"""Noise levels, targets and weights: against diffusers and EDM."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.noise_schedule import make_noise_scheduler, noise_levels, sampling_scheduler
from latent_ddpm.diffusion.objective import add_noise, loss_weight, target

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def _levels(config, timesteps):
    """Noise levels of exactly these timesteps of a table of 1,000."""
    return noise_levels((timesteps.double() + 0.5) / 1000, config, make_noise_scheduler(config).alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_noising_targets_and_weights_are_diffusers(schedule, prediction_type):
    config = UNetConfig(dataset_name="x", beta_schedule=schedule, prediction_type=prediction_type)
    scheduler = make_noise_scheduler(config)
    clean, noise = torch.randn(2, 8, 3, 4, 4)
    t = torch.tensor([0, 1, 250, 500, 750, 900, 998, 999])
    timesteps, alpha, sigma = _levels(config, t)
    assert torch.equal(timesteps, t)
    noisy = add_noise(clean, noise, alpha, sigma)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, t), atol=1e-6)
    wanted = target(clean, noise, alpha, sigma, prediction_type)
    oracle = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}
    assert torch.allclose(wanted, oracle[prediction_type], atol=1e-6)
    # the formula of diffusers' text-to-image example
    snr = compute_snr(scheduler, t)
    base = torch.minimum(snr, torch.full_like(snr, 5.0))
    expected = {"epsilon": base / snr, "v_prediction": base / (snr + 1), "sample": base}[prediction_type]
    assert torch.allclose(loss_weight(alpha, sigma, prediction_type, "min_snr", 5.0), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(loss_weight(alpha, sigma, prediction_type, "uniform"), torch.ones(8))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_a_weighting_weighs_the_error_of_the_clean_latents(prediction_type, weighting):
    """The same error of the clean latents has the same loss for every prediction type."""
    alpha, sigma = {True: (torch.tensor([0.8, 0.3]), torch.tensor([0.2, 0.7]))}.get(
        prediction_type == "flow_prediction", (torch.tensor([0.96, 0.28]), torch.tensor([0.28, 0.96]))
    )
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    guess = clean + 0.1 * torch.randn_like(clean)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    guessed_noise = (add_noise(clean, noise, alpha, sigma) - a * guess) / s  # the noise that matches that guess
    truth, said = (target(x, n, alpha, sigma, prediction_type) for x, n in ((clean, noise), (guess, guessed_noise)))
    weight = loss_weight(alpha, sigma, prediction_type, weighting, 5.0)
    cost = weight * (said - truth).square().flatten(1).mean(1)
    snr = (alpha / sigma) ** 2
    on_clean = {"min_snr": snr.clamp_max(5.0), "edm": snr + 1}[weighting]
    assert torch.allclose(cost, on_clean * (guess - clean).square().flatten(1).mean(1), rtol=1e-3)


def test_edm_is_its_own_weighting_of_its_own_network():
    """EDM's lambda(sigma) c_out^2 is 1 (arXiv 2206.00364, table 1), and its network's output is -v."""
    sigma = torch.tensor([0.01, 0.5, 1.0, 20.0])  # EDM's sigma: noise is added to unscaled data
    alpha = (1 + sigma**2).rsqrt()
    assert torch.allclose(loss_weight(alpha, sigma * alpha, "v_prediction", "edm"), torch.ones(4), rtol=1e-4)
    clean, noise = torch.randn(2, 4, 1, 2, 2).double()
    s = sigma.double().view(-1, 1, 1, 1)
    c_skip, c_out = 1 / (s**2 + 1), s / (s**2 + 1).sqrt()
    network = (clean - c_skip * (clean + s * noise)) / c_out
    v = target(clean, noise, alpha.double(), (sigma * alpha).double(), "v_prediction")
    assert torch.allclose(network, -v, atol=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample", "flow_prediction"])
@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "unipc"])
def test_the_exported_scheduler_samples_what_was_trained(kind, shift, scheduler):
    """With a perfect predictor for a dataset of one image, every exported scheduler draws that image."""
    if kind == "flow_prediction" and scheduler == "ddim":
        pytest.skip("rejected by the config")
    config = UNetConfig(dataset_name="x", prediction_type=kind, noise_shift=shift, inference_scheduler=scheduler)
    config.validate()
    table = None if kind == "flow_prediction" else make_noise_scheduler(config).alphas_cumprod
    torch.manual_seed(0)
    image, z = torch.randn(2, 1, 3, 4, 4)
    sampler = sampling_scheduler(config)
    if table is None:
        assert sampler.config.flow_shift == shift and sampler.config.use_flow_sigmas
    else:
        assert torch.allclose(sampler.alphas_cumprod, table, atol=1e-6)
    sampler.set_timesteps(12)
    for t in sampler.timesteps:
        if table is None:
            sigma = (t.double() / 1000).view(1).float()
            alpha = 1 - sigma
        else:
            _, alpha, sigma = noise_levels((t.double().view(1) + 0.5) / 1000, config, table)
        noise = (z - alpha * image) / sigma
        z = sampler.step(target(image, noise, alpha, sigma, kind), t, z).prev_sample
    assert torch.allclose(z, image, atol=0.06)


def test_the_flow_is_that_of_diffusers():
    config = UNetConfig(
        dataset_name="x", prediction_type="flow_prediction", noise_shift=3.0, inference_scheduler="dpmsolver++"
    )
    oracle = FlowMatchEulerDiscreteScheduler(shift=3.0)  # its sigmas are for the times 1, 0.999, ...
    timesteps, alpha, sigma = noise_levels(1 - torch.arange(1000).double() / 1000, config, None)
    assert torch.allclose(sigma, oracle.sigmas, atol=1e-6) and torch.allclose(alpha + sigma, torch.ones(1000))
    assert torch.allclose(timesteps, oracle.timesteps, atol=1e-3)
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    wanted = oracle.scale_noise(clean, oracle.timesteps[300:301], noise)
    assert torch.allclose(add_noise(clean, noise, alpha[300:301], sigma[300:301]), wanted, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_shift_divides_signal_by_noise_at_every_level(zero_snr):
    plain, shifted = (
        make_noise_scheduler(UNetConfig(dataset_name="x", noise_shift=shift, rescale_betas_zero_snr=zero_snr))
        for shift in (1.0, 2.0)
    )
    a, b = plain.alphas_cumprod[:-1].double(), shifted.alphas_cumprod[:-1].double()
    assert torch.allclose(b / (1 - b), a / (1 - a) / 4, rtol=1e-3)
    assert (float(plain.alphas_cumprod[-1]) == 0) == zero_snr
    assert float(shifted.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6) if zero_snr else True
    if zero_snr:
        oracle = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True).alphas_cumprod
        assert torch.allclose(plain.alphas_cumprod, oracle)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        target(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), "flow")
