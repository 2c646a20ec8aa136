"""latent_ddpm.features: the Frechet distance is that of the features it says."""

import socket
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from latent_ddpm import features
from latent_ddpm.errors import UserError
from latent_ddpm.features import _register_efficientnet, frechet_distance


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
