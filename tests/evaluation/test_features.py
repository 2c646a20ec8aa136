"""latent_ddpm.evaluation.features: distances are those of the features they say, and measures those of the papers."""

import socket
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_ddpm.errors import UserError
from latent_ddpm.evaluation import features
from latent_ddpm.evaluation.features import (
    _register_efficientnet,
    cached_features,
    check_installed,
    compare_features,
    density_and_coverage,
    extract_features,
    frechet_distance,
    load_extractor,
    nearest,
)


def photos(count, seed, shift=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 200, (count, 3, 4, 4), generator=generator).float()
    return (torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear") + shift).to(torch.uint8)


def test_distance_is_zero_to_itself_and_grows_with_damage():
    images = photos(40, 0)
    assert abs(frechet_distance(images, images, "efficientnet-lite0")) < 1e-2
    near, far = (frechet_distance(images, photos(40, 1, shift), "efficientnet-lite0") for shift in (0, 55))
    assert 0 < near < far


def test_the_cache_changes_nothing_and_is_that_of_the_images(tmp_path):
    sets = photos(20, 0), photos(20, 1)
    plain = frechet_distance(*sets, "efficientnet-lite0")
    cached = [frechet_distance(*sets, "efficientnet-lite0", first_cache=tmp_path) for _ in range(2)]
    assert cached == [plain, plain] and any(tmp_path.iterdir())
    other = frechet_distance(photos(20, 2), sets[1], "efficientnet-lite0", first_cache=tmp_path)
    assert other == frechet_distance(photos(20, 2), sets[1], "efficientnet-lite0") != plain


def test_distance_is_the_formula_on_efficientnets_features():
    from scipy.linalg import sqrtm
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    _register_efficientnet()
    network = FEATURE_EXTRACTORS_REGISTRY["efficientnet-lite0"]("efficientnet-lite0", ["pooled"])
    sets = photos(12, 0), photos(12, 5, 40)
    ours = frechet_distance(*sets, "efficientnet-lite0")
    a, b = (network(images)[0].double().numpy() for images in sets)
    assert a.shape == (12, 1280)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T) + 1e-9 * np.eye(1280)).real
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_efficientnet_knows_what_it_sees():
    """The weights belong to the network and to its input range: a photograph of a cat is some cat."""
    from skimage.data import chelsea

    _register_efficientnet()
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    extractor = FEATURE_EXTRACTORS_REGISTRY["efficientnet-lite0"]("efficientnet-lite0", ["pooled"])
    cat = np.asarray(Image.fromarray(chelsea()).crop((60, 0, 360, 300)))
    pooled = extractor(torch.from_numpy(cat.copy()).permute(2, 0, 1)[None])[0]
    best = extractor.network._fc(pooled).softmax(1)[0].topk(3).indices.tolist()
    assert set(best) <= set(range(281, 288)), best  # ImageNet's cats


def test_grayscale_is_gray_in_three_channels():
    gray = photos(10, 0)[:, :1]
    assert frechet_distance(gray, gray.expand(-1, 3, -1, -1), "efficientnet-lite0") == pytest.approx(0, abs=1e-2)


def test_missing_packages_and_weights_get_one_sentence(monkeypatch, tmp_path):
    images = photos(4, 0)

    def refuse(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="inception could not be downloaded.*efficientnet-lite0 needs no download"):
        frechet_distance(images, images, "inception")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=f"efficientnet_lite_pytorch: {features.INSTALL.split()[0]} install"):
        frechet_distance(images, images, "efficientnet-lite0")


# ---------------------------------------------------------------------------------- features, once


def test_features_give_the_frechet_distance_of_the_images():
    sets = photos(12, 0), photos(12, 5, 40)[:, :1]
    network = load_extractor("efficientnet-lite0")
    a, b = (extract_features(network, images.split(5), "cpu") for images in sets)
    assert a.shape == b.shape == (12, 1280) and a.dtype == torch.float32
    assert compare_features(a, b)["fd"] == pytest.approx(frechet_distance(*sets, "efficientnet-lite0"), rel=1e-4)


def batches_of(images, standing_in):
    """As eval_batches yields: batches of 3, image `standing_in` being the one after it."""
    for example in torch.arange(len(images)).split(3):
        index = torch.where(example == standing_in, example + 1, example)
        yield {"image": images[index], "index": index, "example": example}


class Mean(torch.nn.Module):
    def forward(self, images):
        assert images.shape[1] == 3 and images.dtype == torch.uint8
        return (images.float().mean((2, 3)),)


def test_features_of_a_dataset_are_kept_without_stand_ins(tmp_path):
    images, path = photos(8, 0), tmp_path / "new" / "f.safetensors"
    rows, indices = cached_features(Mean(), batches_of(images, 4), "cpu", path)
    assert indices.tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert torch.allclose(rows, images[indices].float().mean((2, 3)))
    again = cached_features(Mean(), iter(()), "cpu", path)
    assert torch.equal(again[0], rows) and torch.equal(again[1], indices)
    assert [p.name for p in path.parent.iterdir()] == ["f.safetensors"]


def test_a_missing_package_of_the_figures_is_named(monkeypatch):
    check_installed("efficientnet-lite0", "matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="the package matplotlib: pip install"):
        check_installed("efficientnet-lite0", "matplotlib")


# ---------------------------------------------------------------------------------- measures of features


def line(*points):
    return torch.tensor(points, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    ("samples", "k", "density", "coverage"),
    [
        # reals at 0, 1, 2, 10: with one neighbour the balls reach 1, 1, 1 and 8 far; with two 2, 1, 2 and 9
        ((0.5, 30.0), 1, 2 / 2, 2 / 4),
        ((0.5, 2.5, 30.0), 1, 4 / 3, 4 / 4),
        ((0.5, 30.0), 2, 3 / (2 * 2), 3 / 4),
        ((3.0,), 1, 1 / 1, 1 / 4),  # on the edge of the ball around 2, so outside
        ((-9.0, 40.0), 2, 0, 0),
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_density_and_coverage_by_hand(samples, k, density, coverage, chunk):
    ours = density_and_coverage(line(*samples), line(0, 1, 2, 10), k, chunk)
    assert ours == pytest.approx((density, coverage))


def test_density_and_coverage_of_a_set_with_itself_are_one():
    points = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    assert density_and_coverage(points, points) == (1, 1)


def test_density_and_coverage_of_one_distribution_are_what_the_paper_expects():
    generator = torch.Generator().manual_seed(0)
    samples, reals = (torch.randn(2000, 3, generator=generator) for _ in range(2))
    density, coverage = density_and_coverage(samples, reals)
    assert density == pytest.approx(1, abs=0.03) and coverage == pytest.approx(1 - 2**-5, abs=0.01)


# whole numbers, so that the oracle and matrix products agree to the last bit, and there are ties
POINTS = st.integers(1, 3).flatmap(
    lambda width: st.tuples(
        *[st.lists(st.lists(st.integers(-9, 9), min_size=width, max_size=width), min_size=6, max_size=40)] * 2
    )
)


def distances_between(a, b):
    return np.sqrt(((np.asarray(a, float)[:, None] - np.asarray(b, float)[None]) ** 2).sum(-1))


@given(points=POINTS, k=st.integers(1, 5), chunk=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_density_and_coverage_are_the_formulas(points, k, chunk):
    samples, reals = points
    radii = np.sort(distances_between(reals, reals), axis=1)[:, k]
    holds = distances_between(reals, samples) < radii[:, None]
    ours = density_and_coverage(torch.tensor(samples).double(), torch.tensor(reals).double(), k, chunk)
    assert ours == pytest.approx((holds.sum() / (k * len(samples)), holds.any(1).mean()))


@given(points=POINTS, k=st.integers(1, 6), chunk=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_nearest_is_brute_force(points, k, chunk):
    queries, references = points
    between = distances_between(queries, references)
    distances, indices = nearest(torch.tensor(queries).float(), torch.tensor(references).float(), k, chunk)
    assert distances.shape == indices.shape == (len(queries), k)
    np.testing.assert_allclose(distances.numpy(), np.sort(between, axis=1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(distances.numpy(), np.take_along_axis(between, indices.numpy(), 1), atol=1e-5)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_a_copy_is_at_distance_zero_however_large_the_features():
    references = 100 * torch.randn(60, 500, generator=torch.Generator().manual_seed(0))
    distances, indices = nearest(references[20:50], references, 2)
    assert (distances[:, 0] == 0).all() and indices[:, 0].tolist() == list(range(20, 50))
    assert (distances[:, 1] > 1000).all()


def test_compare_features_is_each_measure_and_tells_damage():
    from scipy.linalg import sqrtm
    from sklearn.metrics.pairwise import polynomial_kernel

    generator = torch.Generator().manual_seed(0)
    reals, samples = (torch.randn(60, 4, generator=generator) for _ in range(2))
    samples = samples * 1.5 + 0.5
    ours = compare_features(samples, reals)
    a, b = samples.double().numpy(), reals.double().numpy()
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    assert ours["fd"] == pytest.approx(
        ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root), rel=1e-4
    )
    aa, ab, bb = (polynomial_kernel(x, y, degree=3, coef0=1) for x, y in ((a, a), (a, b), (b, b)))
    off = ~np.eye(60, dtype=bool)
    assert ours["kid"] == pytest.approx(aa[off].mean() + bb[off].mean() - 2 * ab.mean(), rel=1e-3)
    assert (ours["kid_subset_size"], ours["kid_std"]) == (60, 0)
    for key, x, y in (("precision", a, b), ("recall", b, a)):  # of x, what lies in the balls around y
        radii = np.sort(distances_between(y, y), axis=1)[:, 3]
        assert ours[key] == pytest.approx((distances_between(x, y) <= radii).any(1).mean(), abs=1e-6)
    assert 0.2 < ours["precision"] < ours["recall"]  # samples are spread too wide
    assert (ours["density"], ours["coverage"]) == density_and_coverage(samples, reals)


def test_compare_features_of_unlike_numbers_and_of_too_few():
    generator = torch.Generator().manual_seed(0)
    few, many = torch.randn(30, 4, generator=generator), torch.randn(80, 4, generator=generator)
    figures = compare_features(few, many)
    assert figures["kid_subset_size"] == 30 and figures["kid_std"] > 0
    with pytest.raises(ValueError, match="5 samples and 80 reals: at least 6"):
        compare_features(few[:5], many)
