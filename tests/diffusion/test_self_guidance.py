"""Guidance in the weights: the guided predictions, the early average, and when the chapter starts anew."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.conditions import ClassCondition, Conditions
from latent_ddpm.diffusion.self_guidance import Guide, self_guidance_config, self_guidance_origin, weak_step
from latent_ddpm.errors import UserError
from latent_ddpm.training.ema import PowerEMA, nearest_snapshot


class Toy(torch.nn.Module):
    """A stand-in for a U-Net: a multiple of its input, plus the class."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, sample, timesteps, class_labels=None):
        self.calls += 1
        shift = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1).float()
        return SimpleNamespace(sample=self.factor * sample + shift)


Z, T = torch.ones(3, 2, 4, 4), torch.tensor([10, 500, 900])
LEVEL = torch.tensor([0.1, 1.0, 30.0])


def test_autoguidance_extrapolates_from_the_weak_model():
    guided = Guide(Toy(3.0), Toy(2.0), scale=2.5)(Z, T, LEVEL, {})
    assert torch.equal(guided, torch.full_like(Z, 3 + 1.5 * (3 - 2)))


def test_only_the_interval_is_guided():
    guided = Guide(Toy(3.0), Toy(2.0), scale=2.0, interval=(0.1, 2.0))(Z, T, LEVEL, {})
    assert guided[:, 0, 0, 0].tolist() == [4.0, 4.0, 3.0]


def test_a_scale_of_1_costs_no_evaluation():
    strong, weak = Toy(3.0), Toy(2.0)
    guide = Guide(strong, weak, scale=1.0, guidance_scale=1.0, nothing=lambda given: given)
    assert torch.equal(guide(Z, T, LEVEL, {}), 3 * Z) and (strong.calls, weak.calls) == (1, 0)


def test_both_guidances_add_up_and_dropped_conditions_are_not_guided():
    conditions = Conditions([ClassCondition(["a", "b", "c", "d"], 0.1)], seed=0)
    given = {"class_labels": torch.tensor([1, 2, 4])}  # 4 is no class
    guide = Guide(Toy(3.0), Toy(2.0), 2.0, None, 3.0, conditions.nothing)
    guided = guide(Z, T, LEVEL, given)[:, 0, 0, 0].tolist()
    # v + (v - w) + 2 (v - u), with v = 3 + c, w = 2 + c, u = 3 + 4
    assert guided == [3 + c + 1 + 2 * (c - 4) for c in (1, 2, 4)]


def test_the_early_average_is_the_nearest_snapshot(tmp_path):
    network = torch.nn.Linear(2, 2)
    ema = PowerEMA(network, [0.1, 0.05])
    for step in (10, 20, 30):
        with torch.no_grad():
            ema.model.weight.fill_(step)
        ema.save_snapshots(tmp_path, step)
    config = UNetConfig(dataset_name="x", max_train_steps=100, self_guidance_weak=0.16)
    assert weak_step(config) == 16
    weights, step = nearest_snapshot(tmp_path, 0.1, weak_step(config))
    assert step == 20 and weights["weight"].unique().tolist() == [20.0] and weights["weight"].dtype == torch.float32
    assert nearest_snapshot(tmp_path, 0.1, 15)[1] == 10  # the earlier one of two
    with pytest.raises(UserError, match="no averages of width 0.2"):
        nearest_snapshot(tmp_path, 0.2, 10)


def test_what_begins_the_chapter_anew():
    config = UNetConfig(dataset_name="x", max_train_steps=100, self_guidance_steps=10)
    origin = self_guidance_origin(config)
    for key, value in {
        "max_train_steps": 200,
        "self_guidance_steps": 20,
        "self_guidance_scale": 3.0,
        "self_guidance_weak": 0.2,
        "self_guidance_interval": [0.3, 5.0],
        "self_guidance_learning_rate": 1e-4,
        "guidance_scale": 2.0,
    }.items():
        assert self_guidance_origin(dataclasses.replace(config, **{key: value})) != origin, key
    assert self_guidance_origin(dataclasses.replace(config, validation_steps=7)) == origin


def test_the_chapter_has_its_own_length_and_rate_and_keeps_the_noise():
    config = UNetConfig(dataset_name="x", max_train_steps=100, self_guidance_steps=10, beta_schedule="scaled_linear")
    chapter = self_guidance_config(config)
    assert (chapter.max_train_steps, chapter.learning_rate, chapter.guidance_scale) == (10, 3e-4, 1.0)
    assert chapter.beta_schedule == "scaled_linear" and chapter.seed == config.seed


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"self_guidance_scale": 0.5}, "self_guidance_scale is 0.5; it must be at least 1"),
        ({"self_guidance_weak": 1.0}, "self_guidance_weak is 1.0"),
        ({"self_guidance_interval": [2.0, 1.0]}, "self_guidance_interval"),
        ({"self_guidance_steps": 10, "ema_snapshots": 1}, "needs an early average"),
        (
            {"few_step_training_images": 10, "prediction_type": "epsilon", "few_step_counts": [1, 4]},
            "epsilon cannot learn to draw in one step",
        ),
        ({"few_step_counts": [4, 2000]}, "rising, from 1 to 1000"),
        ({"few_step_counts": [4, 1]}, "few_step_counts"),
        ({"few_step_counts": []}, "few_step_counts"),
        ({"few_step_counts": [0, 1]}, "few_step_counts"),
        ({"few_step_learning_rate": 0.0}, "few_step_learning_rate"),
    ],
)
def test_impossible_keys_are_named(keys, message):
    with pytest.raises(UserError, match=message):
        UNetConfig(dataset_name="x", **keys).validate()


def test_models_that_predict_the_noise_learn_several_steps():
    UNetConfig(dataset_name="x", few_step_training_steps=10, prediction_type="epsilon").validate()


def test_guided_weights_are_sampled_without_guidance():
    config = UNetConfig(dataset_name="x", conditions=["class"], guidance_scale=2.0)
    assert config.sampling_guidance_scale == 2.0
    assert dataclasses.replace(config, self_guidance_steps=5).sampling_guidance_scale == 1.0
    assert dataclasses.replace(config, self_guidance_images=5).sampling_guidance_scale == 1.0
