"""scripts/show_latents.py: the colours against known components, the picture's size, and how it refuses."""

import importlib.util

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import AutoencoderKL
from PIL import Image

spec = importlib.util.spec_from_file_location("show_latents_script", ROOT / "scripts" / "show_latents.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


def test_colours_are_the_principal_components():
    torch.manual_seed(0)
    known = torch.randn(64, 4, 4, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5]).view(1, 4, 1, 1)
    rotation = torch.linalg.qr(torch.randn(4, 4)).Q
    rgb, shares = script.latents_as_rgb(torch.einsum("ij,njhw->nihw", rotation, known) + 7.0, shown=5)
    assert rgb.shape == (5, 3, 4, 4) and rgb.abs().max() <= 1
    assert shares.tolist() == pytest.approx([16 / 21.25, 4 / 21.25, 1 / 21.25, 0.25 / 21.25], abs=0.03)
    assert (rgb.std(dim=(0, 2, 3)).diff() < 0).all()  # one scale for all
    for component in range(3):
        pair = torch.stack((rgb[:, component].flatten(), known[:5, component].flatten()))
        assert pair.corrcoef()[0, 1].abs() > 0.9  # clamped at two deviations


def test_dead_and_missing_components_are_grey():
    latents = torch.randn(8, 2, 2, 2)
    latents[:, 1] = 3.0
    rgb, shares = script.latents_as_rgb(latents, shown=8)
    assert rgb[:, 0].std() > 0 and not rgb[:, 1:].any()
    assert shares.tolist() == pytest.approx([1, 0])
    rgb, shares = script.latents_as_rgb(torch.ones(2, 3, 2, 2), shown=2)
    assert not rgb.any() and not shares.any()


@pytest.fixture
def autoencoder(tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = AutoencoderKL(1, 1, **blocks, block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3)
    model.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def test_picture_of_the_digits(autoencoder, tmp_path):
    words = ["--config", "configs/mnist.yaml", "--output_dir", str(tmp_path / "run")]
    done = run_script("show_latents.py", *words, "--autoencoder", str(autoencoder), "--num_images", "3")
    assert "images of 1x32x32, latents of 3x16x16" in done.stdout
    with Image.open(tmp_path / "run" / "latents.png") as picture:
        assert picture.mode == "RGB" and picture.size == (3 * (96 + 2) + 2, 3 * (96 + 2) + 2)


def test_wrong_folders_are_refused(autoencoder, tmp_path):
    words = ["--config", "configs/mnist.yaml", "--output_dir", str(tmp_path / "run")]
    assert "There is no autoencoder in" in run_script("show_latents.py", *words, expect=2).stderr
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    done = run_script("show_latents.py", *words, "--autoencoder", str(tmp_path / "other"), expect=2)
    assert "is not an autoencoder" in done.stderr
    folder = ["--dataset_name", "null", "--train_data_dir", str(tmp_path / "nowhere"), "--autoencoder"]
    assert "nowhere" in run_script("show_latents.py", *words, *folder, str(autoencoder), expect=2).stderr
