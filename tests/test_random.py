"""latent_ddpm.random: the published known answers, the distributions, and that nothing has a history."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_ddpm.config import UNetConfig
from latent_ddpm.diffusion.objective import sample_times
from latent_ddpm.random import (
    Stream,
    first_words,
    integers,
    normal,
    permutation,
    philox4x32,
    scattered,
    seed_for_step,
    uniform,
)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the three known answers that Random123 publishes for philox4x32-10
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert philox4x32(torch.tensor(counter), key).tolist() == answer


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    numbers=st.lists(st.integers(0, 2**50), min_size=1, max_size=6),
    size=st.integers(1, 9),
)
def test_a_draw_depends_on_its_own_number_only(seed, numbers, size):
    together = normal(seed, Stream.NOISE, torch.tensor(numbers), (size,))
    alone = torch.cat([normal(seed, Stream.NOISE, torch.tensor([n]), (size,)) for n in numbers])
    assert torch.equal(together, alone)
    assert together.isfinite().all()


def test_distributions():
    numbers = torch.arange(20_000)
    z = normal(7, Stream.NOISE, numbers, (11,)).double().flatten()
    moments = [z.mean(), z.var() - 1, (z**3).mean(), (z**4).mean() - 3]
    for moment, tolerance in zip(moments, (0.01, 0.02, 0.03, 0.1), strict=True):
        assert abs(moment) < tolerance
    u = uniform(7, Stream.CROP, numbers, (2,))
    assert u.min() >= 0 and u.max() < 1
    assert np.histogram(u.numpy(), bins=10, range=(0, 1))[0].min() > 3700
    k = integers(7, Stream.CODEBOOK, numbers, 5)
    assert torch.bincount(k, minlength=5).min() > 3800 and k.max() == 4


def test_streams_seeds_and_numbers_are_independent():
    numbers = torch.arange(5000)
    first = normal(1, Stream.NOISE, numbers, (4,)).flatten()
    others = [
        normal(1, Stream.SAMPLE, numbers, (4,)),
        normal(2, Stream.NOISE, numbers, (4,)),
        normal(1, Stream.NOISE, numbers + 1, (4,)),
        normal(1 << 32, Stream.NOISE, numbers, (4,)),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((first, other.flatten())))[0, 1]) < 0.03


def test_permutation_and_step_seed():
    assert sorted(permutation(3, 0, 100)) == list(range(100))
    assert not np.array_equal(permutation(3, 0, 100), permutation(3, 1, 100))
    assert not np.array_equal(permutation(3, 0, 100), permutation(4, 0, 100))
    seeds = {seed_for_step(0, step, process) for step in range(50) for process in range(4)}
    assert len(seeds) == 200 and all(0 <= s < 2**63 for s in seeds)


@given(seed=st.integers(0, 2**64 - 1), number=st.integers(0, 2**62), stream=st.sampled_from(Stream))
def test_words_of_one_number_are_those_of_the_tensors(seed, number, stream):
    words = first_words(seed, stream, number)
    assert uniform(seed, stream, torch.tensor([number]), (4,))[0].tolist() == [(word >> 8) * 2.0**-24 for word in words]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), start=st.integers(0, 2**40), batch=st.integers(8, 200))
def test_stratified_times_cover_every_stretch_evenly(seed, start, batch):
    t = sample_times(seed, torch.arange(start, start + batch), UNetConfig(dataset_name="x"))
    assert t.min() >= 0 and t.max() < 1
    gaps = torch.cat((t.sort().values, t.min().view(1) + 1)).diff()
    # three-distance theorem: a golden-ratio sequence leaves no gap above 2.62 / batch; independent draws do
    assert gaps.max() <= 2.62 / batch + 1e-3


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_times_have_their_distribution(kind):
    config = UNetConfig(dataset_name="x", timestep_sampling=kind, logit_mean=0.5, logit_std=0.7)
    t = sample_times(5, torch.arange(10**6, 10**6 + 20_000), config)
    assert t.dtype == torch.float64 and t.min() >= 0 and t.max() < 1
    places = torch.arange(1, 100).double() / 100
    expected = torch.special.ndtr((torch.logit(places) - 0.5) / 0.7) if kind == "logit_normal" else places
    found = (t[:, None] < places).double().mean(0)
    # evenly spread, so far closer than 20,000 independent draws, for which 1.95 / sqrt(n) is the bound at 0.1 %
    assert (found - expected).abs().max() < (1e-3 if kind == "logit_normal" else 0.014)
    if kind == "uniform":  # independent: what Kolmogorov's bound allows is also used
        assert (found - expected).abs().max() > 1e-3


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**31))
def test_scattered_visits_every_position_once(length, seed, epoch):
    order = scattered(seed, epoch, length, np.arange(length))
    assert np.array_equal(np.sort(order), np.arange(length))
    some = np.arange(length)[:: max(1, length // 7)]
    assert np.array_equal(scattered(seed, epoch, length, some), order[some])


def test_scattered_looks_like_chance():
    length = 30_011
    orders = [scattered(seed, epoch, length, np.arange(length)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (2, 7))]
    for order in orders:
        # neighbours, positions and other orders tell nothing: correlations within 5 standard deviations
        for other in (np.roll(order, 1), np.arange(length), *(o for o in orders if o is not order)):
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / length**0.5
        # the first tenth of an epoch fills 100 equal parts of the dataset evenly (chi square of 99 degrees)
        counts = np.bincount(order[: length // 10] * 100 // length, minlength=100)
        assert 50 < ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 160
        fixed = (order == np.arange(length)).sum()  # of Poisson with mean 1
        assert fixed < 8
