"""latent_ddpm/planning/counting.py: the counts agree with real tensors, with closed forms, and with each other."""

import json

import pytest
import torch
from conftest import run_script
from torch import nn

from latent_ddpm.autoencoder import vqvae
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.planning import counting
from latent_ddpm.planning.counting import (
    GIB,
    PeakBytes,
    bytes_of,
    count_autoencoder,
    count_unet,
    fake_cuda,
    largest_batch,
)

SMALL = {"dataset_name": "embedded:mnist", "resolution": 32}
AUTOENCODER = {"block_out_channels": [16, 32], "latent_channels": 4, **SMALL}
UNET = {"unet_block_out_channels": [32, 64], "unet_attention_levels": [1], **SMALL}


def test_fake_tensors_save_what_real_ones_save(monkeypatch):
    monkeypatch.setattr(vqvae, "SUMMED_TAPS_DEVICES", set())  # a CPU doubles images in another way
    config, found = AutoencoderConfig(**AUTOENCODER, quantizer="kl"), []

    def saved_by_two_images():
        network, images = Autoencoder(config), torch.zeros(2, 3, 32, 32)
        weights = counting.parameters_of(network)
        tensors, flops = counting.saved_for_backward(lambda: network(images, torch.arange(2)), weights)
        found.append((bytes_of(tensors), flops))

    saved_by_two_images()
    with fake_cuda():
        saved_by_two_images()
    assert found[0] == found[1]
    assert found[0][0] > 2**20


def test_bf16_convolution_saves_its_input_and_a_copy_of_its_weights():
    with fake_cuda(), counting.autocast(UNetConfig()):
        layer, images = nn.Conv2d(16, 32, 3, padding=1), torch.empty(2, 16, 8, 8)
        saved, flops = counting.saved_for_backward(lambda: layer(images), [*layer.parameters()])
    assert bytes_of(saved) == 2 * (2 * 16 * 8 * 8 + 32 * 16 * 9)
    assert flops == 2 * 2 * 32 * 16 * 9 * 8 * 8


def test_shared_storages_count_once():
    x = torch.zeros(10)
    assert bytes_of([x, x[:5], x.view(2, 5)]) == 40


def test_peak_bytes_are_of_tensors_alive_at_once():
    with PeakBytes() as counter:
        a = torch.zeros(100)
        b = a + 1  # 800 bytes
        del a
        c = b + 1
        del b
        d = c[:5] + 1  # 420 bytes
    assert counter.peak == 800 and len(d) == 5


def test_largest_batch_leaves_a_tenth_free():
    assert largest_batch(fixed=2 * GIB, per_image=GIB, transient=0, card_gib=10) == 7
    assert largest_batch(fixed=2 * GIB, per_image=GIB, transient=8 * GIB, card_gib=10) == 0
    assert largest_batch(fixed=20 * GIB, per_image=GIB, transient=0, card_gib=10) == 0


def test_stage_1_counts_its_losses_and_the_discriminator():
    plain = count_autoencoder(AutoencoderConfig(**AUTOENCODER))
    full = count_autoencoder(AutoencoderConfig(**AUTOENCODER, lpips_weight=1, disc_weight=1))
    parameters = plain["parameters"]
    assert parameters == sum(p.numel() for p in Autoencoder(AutoencoderConfig(**AUTOENCODER)).parameters())
    weights_gradients_moments_average = 4 * (1 + 1 + 2 + 1) * parameters
    assert weights_gradients_moments_average < plain["fixed_bytes"] < 1.2 * weights_gradients_moments_average
    assert plain["flops_per_image"] == 3 * plain["forward_flops_per_image"]
    assert full["forward_flops_per_image"] == plain["forward_flops_per_image"]
    assert full["flops_per_image"] > 2 * plain["flops_per_image"]
    assert full["fixed_bytes"] > plain["fixed_bytes"] + 4 * 14_000_000  # LPIPS alone
    assert full["bytes_per_image"] > plain["bytes_per_image"]


def test_stage_2_with_and_without_checkpointing_and_with_muon():
    autoencoder, config = AutoencoderConfig(**AUTOENCODER), UNetConfig(**UNET)
    plain, saving = (count_unet(config, autoencoder, checkpointing) for checkpointing in (False, True))
    muon = count_unet(UNetConfig(**UNET, optimizer="muon"), autoencoder, checkpointing=False)
    assert saving["bytes_per_image"] < 0.8 * plain["bytes_per_image"]
    assert 3 * saving["flops_per_image"] == 4 * plain["flops_per_image"]
    assert plain["parameters"] * 4 * 6 < plain["fixed_bytes"]  # weights, gradients, two moments, two averages
    assert 0.75 * plain["fixed_bytes"] < muon["fixed_bytes"] < plain["fixed_bytes"]  # one moment
    assert plain["flops_per_optimizer_step"] == 0 < muon["flops_per_optimizer_step"]
    assert muon["bytes_per_image"] == plain["bytes_per_image"]


def test_stage_1_with_checkpointing():
    plain, saving = (
        count_autoencoder(AutoencoderConfig(**AUTOENCODER, layers_per_block=3, gradient_checkpointing=value))
        for value in (False, True)
    )
    assert saving["bytes_per_image"] < 0.8 * plain["bytes_per_image"]
    assert 3 * saving["flops_per_image"] == 4 * plain["flops_per_image"]
    assert saving["forward_flops_per_image"] == plain["forward_flops_per_image"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_are_linear_in_the_batch(checkpointing, monkeypatch):
    seen = {}
    monkeypatch.setattr(counting, "_figures", lambda *args: seen.update(args[2]) or {})
    count_unet(UNetConfig(**UNET), AutoencoderConfig(**AUTOENCODER), checkpointing)
    config, two = AutoencoderConfig(**AUTOENCODER), {}
    with fake_cuda():
        network = Autoencoder(config)
        network.plain = True
        two = {n: counting._autoencoder_step(config, network, None, None, n)[0] for n in (1, 2, 4)}
    assert two[4] - two[2] == 2 * (two[2] - two[1])
    assert seen[2] > seen[1] > 0


def test_benchmark_count_memory(tmp_path):
    path, result = tmp_path / "tiny.yaml", tmp_path / "memory.json"
    path.write_text(
        "dataset_name: embedded:mnist\nresolution: 16\n"
        "train_autoencoder: {block_out_channels: [16, 16]}\n"
        "train_unet: {unet_block_out_channels: [32, 32], unet_attention_levels: []}\n"
    )
    run_script("count_memory.py", "--configs", path, "--json", result, folder="benchmarks")
    found = json.loads(result.read_text())
    assert set(found["configs"]["tiny"]) == {"autoencoder", "unet", "unet_gradient_checkpointing"}
    assert found["command"].startswith("python benchmarks/count_memory.py --configs")
    assert found["configs"]["tiny"]["unet"]["largest_batch"]["24 GiB"] > 1000
