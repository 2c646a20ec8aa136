"""Weight averages: against diffusers, closed forms and the power function."""

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_ddpm.errors import UserError
from latent_ddpm.training.ema import (
    EMA,
    PowerEMA,
    _read_snapshots,
    gamma_of,
    profile_products,
    reconstruct,
    reconstruction_error,
)


def test_ema_is_diffusers_ema():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ours = EMA(model, 0.95)
    theirs = EMAModel(model.parameters(), decay=0.95)
    theirs.optimization_step = (
        1  # its first warm-up value is (1 + 1) / (10 + 1) at its second step; ours starts at 1/10
    )
    for step in range(1, 40):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))
        ours.update(model, step)
        theirs.step(model.parameters())
    for mine, shadow in zip(ours.model.parameters(), theirs.shadow_params, strict=True):
        assert torch.allclose(mine, shadow, atol=1e-5)
    assert torch.equal(ours.model[1].running_mean, model[1].running_mean)
    assert ours.decay_at(0) == 0.1 and ours.decay_at(10**6) == 0.95
    assert not any(p.requires_grad for p in ours.model.parameters())


@settings(max_examples=50, deadline=None)
@given(sigma_rel=st.floats(0.01, 0.288))
def test_gamma_gives_the_relative_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(sigma_rel, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(a=st.tuples(st.floats(0, 20), st.integers(1, 300)), b=st.tuples(st.floats(0, 20), st.integers(1, 300)))
def test_products_of_profiles_are_their_integrals(a, b):
    times, width = np.linspace(0, min(a[1], b[1]), 200_001, retstep=True)
    profiles = [(gamma + 1) * (times / t) ** gamma / t for gamma, t in (a, b)]
    integral = np.trapezoid(profiles[0] * profiles[1], dx=width)
    assert profile_products([a], [b])[0, 0] == pytest.approx(integral, rel=1e-4)


def _walk(steps, seed=0):
    """A model whose weights do a random walk, and the weights after each step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(40, 40)
    passed = []
    for step in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) / (1 + step) ** 0.5)
        passed.append(model.weight.detach().clone())
        yield step, model, passed


@pytest.mark.parametrize("steps", [60, 300])
def test_power_averages_weigh_as_the_power_function(steps):
    for step, model, passed in _walk(steps):  # noqa: B007
        if step == 0:
            ema = PowerEMA(model, [0.1, 0.05])
        ema.update(model, step)
    seen = [t for t in range(1, steps + 1) if t <= 256 or t % 4 == 0]  # every fourth step, later in training
    assert seen[-1] == steps
    for gamma, averaged in zip(ema.gammas, ema.models, strict=True):
        edges = (torch.tensor([0, *seen]) / steps) ** (gamma + 1)
        expected = sum(weight * passed[t - 1] for weight, t in zip(edges.diff(), seen, strict=True))
        assert torch.allclose(averaged.weight, expected, atol=1e-5)


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.15, 0.25])
def test_an_average_made_afterwards_is_the_one_tracked(tmp_path, wanted):
    for step, model, _ in _walk(2000):
        if step == 0:
            ema, direct = PowerEMA(model, [0.1, 0.05]), PowerEMA(model, [wanted])
        ema.update(model, step)
        direct.update(model, step)
        if (step + 1) % 125 == 0:
            ema.save_snapshots(tmp_path, step + 1)
    made, at = reconstruct(tmp_path, wanted)
    weight = direct.model.weight
    assert at == 2000 and set(made) == {"weight", "bias"}
    # widths outside of the tracked range are extrapolated
    assert float((made["weight"] - weight).norm() / weight.norm()) < (0.01 if wanted in (0.07, 0.15) else 0.025)
    # the tracked average is further away; otherwise the test would show nothing
    assert float((ema.model.weight - weight).norm() / weight.norm()) > 0.02
    # and an earlier average, between two snapshots
    for step, model, _ in _walk(1060):
        if step == 0:
            direct = PowerEMA(model, [wanted])
        direct.update(model, step)
    made, at = reconstruct(tmp_path, wanted, step=1060)
    weight = direct.model.weight
    bound = 0.02 if wanted in (0.07, 0.15) else 0.08
    assert at == 1060 and float((made["weight"] - weight).norm() / weight.norm()) < bound
    with pytest.raises(UserError, match="end at step 2000; there is none at 2001"):
        reconstruct(tmp_path, wanted, step=2001)


def test_the_error_of_a_reconstruction_leaves_the_tracked_average_out(tmp_path):
    for step, model, _ in _walk(400):
        if step == 0:
            ema = PowerEMA(model, [0.1, 0.05, 0.08])
        ema.update(model, step)
        if (step + 1) % 50 == 0:
            ema.save_snapshots(tmp_path, step + 1)
    error = reconstruction_error(tmp_path, 0.08)
    made, truth = reconstruct(tmp_path, 0.08, without=0.08)[0]["weight"], ema.models[2].weight
    assert error == pytest.approx(float((made - truth).norm() / truth.norm()), rel=0.05)
    with_itself = reconstruct(tmp_path, 0.08)[0]["weight"]
    assert float((with_itself - truth).norm()) < 0.4 * float((made - truth).norm())
    with pytest.raises(UserError, match="was not tracked"):
        reconstruction_error(tmp_path, 0.2)


def test_a_snapshot_knows_when_its_average_was_last_updated(tmp_path):
    for step, model, _ in _walk(303):
        if step == 0:
            ema = PowerEMA(model, [0.1])
        ema.update(model, step)
        if step + 1 in (9, 303):
            ema.save_snapshots(tmp_path, step + 1)
    steps = [about["step"] for _, about in _read_snapshots(tmp_path)]
    assert steps == [9, 300]
    made, at = reconstruct(tmp_path, 0.1)
    assert at == 300 and torch.allclose(made["weight"], ema.model.weight, atol=1e-2)


def test_snapshots_that_cannot_be_written_or_read_get_a_sentence(tmp_path):
    ema = PowerEMA(torch.nn.Linear(40, 40), [0.1, 0.05])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write the average .*run the same command again"):
        ema.save_snapshots(tmp_path / "file", 4)
    ema.save_snapshots(tmp_path, 4)
    path = tmp_path / "ema-00000004-0.05.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"ema-00000004-0.05.safetensors is damaged .* Remove it"):
        reconstruct(tmp_path, 0.1)
    path.unlink()
    assert reconstruct(tmp_path, 0.1)[1] == 4


def test_averages_of_other_widths_are_refused():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"widths 0.1, 0.05; ema_sigma_rels asks for \[0.1, 0.2\]"):
        PowerEMA(model, [0.1, 0.2]).load_state_dict(PowerEMA(model, [0.1, 0.05]).state_dict())


def test_nothing_to_make_an_average_of(tmp_path):
    with pytest.raises(UserError, match="no averages"):
        reconstruct(tmp_path, 0.1)
