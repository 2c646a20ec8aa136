"""Small images, folders and sources of them, for the tests of data."""

import io
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image
from preloaded import ROOT

from latent_ddpm.data.bad_images import BadImages
from latent_ddpm.data.dataset import ImageDataset, open_image_dataset
from latent_ddpm.data.sources.base import ImageSource

CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"
needs_cifar10 = pytest.mark.skipif(not CIFAR10.is_dir(), reason="no local copy of CIFAR-10")


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def config(**changes) -> SimpleNamespace:
    values = {
        "train_data_dir": None,
        "dataset_name": None,
        "dataset_config_name": None,
        "streaming": False,
        "image_column": "image",
        "class_column": None,
        "class_names": None,
        "output_dir": "no/such/folder",
        "validation_fraction": 0.1,
        "max_validation_images": 100,
        "seed": 3,
        "resolution": 8,
        "image_channels": 3,
        "image_resize": None,
        "center_crop": True,
        "random_flip": False,
        "image_cache_gib": 1.0,
        "dataloader_num_workers": 0,
    }
    return SimpleNamespace(**(values | changes))


def colour(k: int) -> tuple[int, int, int]:
    return (k % 256, k // 256, 200)


def png(k: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A flat image whose colour tells its number."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour(k)).save(buffer, "png")
    return buffer.getvalue()


def fill(root: Path, names: list[str]) -> Path:
    """Image files, each in the colour of its place in `names`."""
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(k))
    return root


class Flat(ImageSource):
    """`count` flat images in memory, some of them bad."""

    def __init__(self, count: int, bad: tuple[int, ...] = (), size: tuple[int, int] = (8, 8)):
        self.count, self.bad, self.size = count, bad, size
        self.labels, self.class_names = np.arange(count, dtype=np.int32) % 3, ["a", "b", "c"]
        self.fingerprint = f"flat{count}{bad}{size}"
        self.loads = 0

    def __len__(self):
        return self.count

    def load(self, i, at_least=None):
        self.loads += 1
        if i in self.bad:
            raise OSError("broken")
        return Image.new("RGB", self.size, colour(i))

    def name(self, i):
        return f"flat{i}"


def opened(source, tmp_path, bad_images=None, train=True, is_main=True, wait=lambda: None, **changes) -> ImageDataset:
    bad_images = bad_images or BadImages(tmp_path / "bad.jsonl", len(source), 1.0)
    return open_image_dataset(source, config(**changes), tmp_path / "cache", bad_images, train, is_main, wait)


LAZY, CACHED = {"image_cache_gib": 0.0}, {"image_cache_gib": 1.0}
both_ways = pytest.mark.parametrize("way", [LAZY, CACHED], ids=["lazy", "cached"])


def shown(batch: dict) -> list[int]:
    """The number that the colour of each image of a batch tells."""
    return (batch["image"][:, 0, 4, 4].long() + 256 * batch["image"][:, 1, 4, 4].long()).tolist()
