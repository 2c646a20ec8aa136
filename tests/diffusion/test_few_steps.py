"""Few steps: the sampler against diffusers' scheduler, the gradient in closed form, a toy that learns the data."""

import dataclasses

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import save_pipeline

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.few_steps import (
    clean_latents,
    comparison_batch,
    few_step_config,
    few_step_origin,
    few_step_scheduler,
    levels_of,
    matching_loss,
    next_latents,
    position_at,
)
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import add_noise, target

TYPES = ["epsilon", "sample", "v_prediction", "flow_prediction"]


def config_of(prediction_type="v_prediction", **keys):
    return UNetConfig(dataset_name="x", prediction_type=prediction_type, **keys)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(TYPES), st.floats(0.05, 0.95))
def test_clean_latents_invert_the_target(prediction_type, share):
    alpha, sigma = (1 - share, share) if prediction_type == "flow_prediction" else ((1 - share**2) ** 0.5, share)
    alpha, sigma = torch.tensor([alpha]), torch.tensor([sigma])
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy, wanted = (
        make(clean, noise, alpha, sigma, *more) for make, more in ((add_noise, ()), (target, (prediction_type,)))
    )
    found = clean_latents(noisy, wanted, alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1), prediction_type)
    assert torch.allclose(found, clean, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES[1:])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_the_training_s_sampler_is_the_pipeline_s(prediction_type, shift, count):
    config = config_of(prediction_type, noise_shift=shift)
    levels, scheduler = levels_of(config, count), few_step_scheduler(config)
    scheduler.set_timesteps(count)
    assert [level.timestep for level in levels] == scheduler.timesteps.tolist() and len(levels) == count
    generator = torch.Generator().manual_seed(0)
    ours = theirs = torch.randn(2, 3, 4, 4, generator=generator)
    for i, t in enumerate(scheduler.timesteps):
        prediction, level = torch.randn(2, 3, 4, 4, generator=generator), levels[i]
        clean = clean_latents(ours, prediction, level.alpha, level.sigma, config.prediction_type)
        ours = clean if i == count - 1 else next_latents(ours, clean, level, levels[i + 1])
        theirs = scheduler.step(prediction, t, theirs).prev_sample
        assert torch.allclose(ours, theirs, atol=2e-4), i


def test_sampling_starts_from_the_noisiest_level_and_flow_levels_are_shifted():
    assert [levels_of(config_of(), count)[0].timestep for count in (1, 2, 4)] == [999, 999, 999]
    sigmas = [level.sigma for level in levels_of(config_of("flow_prediction", noise_shift=2.0), 4)]
    assert sigmas[0] == pytest.approx(1.0, abs=1e-3) and sigmas == sorted(sigmas, reverse=True)
    plain = [level.sigma for level in levels_of(config_of("flow_prediction"), 4)]
    assert sigmas == pytest.approx([2 * sigma / (1 + sigma) for sigma in plain], rel=1e-3)  # arXiv 2403.03206, eq. 23


def test_the_gradient_is_the_difference_of_the_predictions():
    samples = torch.randn(2, 3, 4, 4, requires_grad=True)
    of_teacher, of_critic = torch.randn(2, 2, 3, 4, 4)
    matching_loss(samples, of_teacher, of_critic).backward()
    distance = (samples - of_teacher).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    assert torch.allclose(samples.grad, ((of_critic - of_teacher) / distance / samples.numel()).detach(), atol=1e-6)


def best_guess(noisy, alpha, sigma, mean, deviation):
    """E[x | z] for x normal with that mean and deviation, and z = alpha x + sigma noise."""
    gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
    return mean + gain * (noisy - alpha * mean)


def test_a_generator_of_normal_samples_takes_on_the_data_s_mean_and_deviation():
    """Teacher and critic are exact here: the best guesses for the data and for what the generator draws."""
    config, (mean, deviation) = config_of(), (0.7, 0.4)
    table = noise_table(config)
    shift, scale = torch.nn.Parameter(torch.tensor(-0.5)), torch.nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.Adam([shift, scale], lr=0.02)
    for step in range(300):
        numbers = torch.arange(64) + 64 * step
        noise = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        samples = shift + scale * noise
        batch, alpha, sigma = comparison_batch(samples.detach(), numbers, config, table)
        of_teacher = best_guess(batch.noisy, alpha, sigma, mean, deviation)
        of_critic = best_guess(batch.noisy, alpha, sigma, shift.detach(), scale.detach())
        optimizer.zero_grad()
        matching_loss(samples, of_teacher, of_critic).backward()
        optimizer.step()
    assert abs(shift.item() - mean) < 0.05 and abs(scale.item() - deviation) < 0.05


def test_noise_and_times_of_the_comparison_follow_from_the_numbers():
    config, clean = config_of(), torch.randn(4, 3, 4, 4)
    table, numbers = noise_table(config), torch.arange(4)
    whole = comparison_batch(clean, numbers, config, table)[0]
    part = comparison_batch(clean[2:], numbers[2:], config, table)[0]
    assert torch.equal(whole.noisy[2:], part.noisy) and torch.equal(whole.timesteps[2:], part.timesteps)
    assert torch.allclose(
        whole.wanted, target(clean, *_noise_of(whole, clean, table), config.prediction_type), atol=1e-4
    )


def _noise_of(batch, clean, table):
    alpha, sigma = table[batch.timesteps].sqrt(), (1 - table[batch.timesteps]).sqrt()
    return (batch.noisy - alpha.view(-1, 1, 1, 1) * clean) / sigma.view(-1, 1, 1, 1), alpha, sigma


def test_every_step_of_every_count_is_trained():
    config = config_of(few_step_counts=[1, 2, 4])
    seen = {position_at(config, step) for step in range(400)}
    assert seen == {(count, place) for count in (1, 2, 4) for place in range(count)}
    assert position_at(config, 5) == position_at(config, 5)


def test_the_chapter_begins_anew_when_its_keys_or_its_start_change():
    config = config_of(few_step_training_steps=8)
    origin = few_step_origin(config, "a")
    assert few_step_origin(config, "b") != origin
    for key, value in {"few_step_training_steps": 9, "few_step_counts": [1], "few_step_learning_rate": 1e-4}.items():
        assert few_step_origin(dataclasses.replace(config, **{key: value}), "a") != origin
    few_step_config(config).validate()


def test_an_image_follows_from_its_generator_in_stock_diffusers(tmp_path):
    stock = DiffusionPipeline.from_pretrained(save_pipeline(tmp_path / "pipeline", few_step_scheduler(config_of())))
    stock.set_progress_bar_config(disable=True)
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        own = [torch.Generator().manual_seed(7) for _ in range(3)]
        words = [{"generator": one, "num_inference_steps": n} for one, n in zip(own, (1, 2, 4), strict=True)]
        drawn.append([stock(output_type="np", **each).images for each in words])
    assert all((a == b).all() for a, b in zip(*drawn, strict=True))
    assert (drawn[0][0] != drawn[0][2]).any()
