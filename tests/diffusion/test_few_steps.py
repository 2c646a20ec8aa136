"""Few steps: the sampler against diffusers' scheduler, the gradient in closed form, a toy that learns the data."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from small_pipeline import save_pipeline

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.few_steps import (
    CLEAN,
    FewStepTraining,
    clean_latents,
    comparison_batch,
    few_step_config,
    few_step_origin,
    few_step_scheduler,
    levels_of,
    matching_loss,
    next_latents,
    path_target,
    position_at,
)
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import add_noise, target
from latent_ddpm.diffusion.self_guidance import Guide, draw_latents

# not cosine betas, with which all steps of a sampler turn by the same angle, wherever it believes to be
LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
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


def test_every_later_step_of_every_count_is_trained():
    config = config_of(few_step_counts=[1, 2, 4])
    seen = {position_at(config, step) for step in range(400)}
    assert seen == {(count, place) for count in (2, 4) for place in range(1, count)}
    assert position_at(config, 5) == position_at(config, 5)
    assert position_at(config_of(few_step_counts=[1]), 5) is None
    seen = {position_at(config_of(few_step_counts=[2, 4]), step) for step in range(400)}
    assert seen == {(count, place) for count in (2, 4) for place in range(count)}


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("position", range(1, 4))
def test_a_step_with_the_target_ends_where_the_teacher_ends(prediction_type, position):
    config = config_of(prediction_type)
    now, then = [*levels_of(config, 4), CLEAN][position : position + 2]
    noisy, reached = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    learned = path_target(noisy, reached, now, then, prediction_type)
    clean = clean_latents(noisy, learned, now.alpha, now.sigma, prediction_type)
    assert torch.allclose(next_latents(noisy, clean, now, then), reached, atol=2e-3)


class ExactUNet:
    """Predicts v exactly for clean latents from a normal distribution."""

    def __init__(self, config, mean, deviation):
        self.table, self.mean, self.deviation = noise_table(config), mean, deviation

    def __call__(self, noisy, timesteps):
        alpha, sigma = self.table[timesteps].sqrt(), (1 - self.table[timesteps]).sqrt()
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        clean = best_guess(noisy, alpha, sigma, self.mean, self.deviation)
        return SimpleNamespace(sample=(alpha * noisy - clean) / sigma)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc", "ddim"])
@pytest.mark.parametrize("position", range(4))
def test_the_teacher_goes_from_one_level_to_the_next(scheduler, position):
    """Along the flow of normal data, (x - alpha mean) / (alpha^2 deviation^2 + sigma^2)^(1/2) is constant."""
    config, (mean, deviation) = config_of(inference_scheduler=scheduler, **LINEAR), (0.7, 0.4)
    constant = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    now, then = [*levels_of(config, 4), CLEAN][position : position + 2]
    begun, wanted = (
        level.alpha * mean + (level.alpha**2 * deviation**2 + level.sigma**2) ** 0.5 * constant for level in (now, then)
    )
    part = slice(50 * position, 50 * (position + 1))
    ended = draw_latents(Guide(ExactUNet(config, mean, deviation)), begun, {}, config, 200, part)
    assert (ended - wanted).abs().max() < 0.05
    assert (begun - wanted).abs().max() > 0.1


@pytest.mark.parametrize("position", range(4))
def test_what_is_learned_on_the_path_leads_where_the_teacher_leads(position):
    """From noised training data of any distribution: here all are of one value, which the teacher does not know."""
    config, (mean, deviation) = config_of(**LINEAR), (0.7, 0.4)
    levels = [*levels_of(config, 4), CLEAN]
    teacher = Guide(ExactUNet(config, mean, deviation))
    training = SimpleNamespace(config=config, levels={4: levels}, teacher=teacher)
    clean, numbers, (now, then) = torch.full((64, 1, 4, 4), 0.5), torch.arange(64), levels[position : position + 2]
    noisy, learned = FewStepTraining.on_path(training, clean, numbers, 4, position, {})
    if position == 0:
        assert torch.equal(noisy, FewStepTraining.on_path(training, clean + 9, numbers, 4, position, {})[0])
    noise = (noisy - now.alpha * clean) / now.sigma if position else noisy  # the first step starts from noise alone
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    spread = [(level.alpha**2 * deviation**2 + level.sigma**2) ** 0.5 for level in (now, then)]
    wanted = then.alpha * mean + spread[1] / spread[0] * (noisy - now.alpha * mean)
    found = clean_latents(noisy, learned, now.alpha, now.sigma, config.prediction_type)
    assert (next_latents(noisy, found, now, then) - wanted).abs().mean() < 0.06  # what 5 small steps allow


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
