"""latent_ddpm.autoencoder.posterior: against diffusers' Gaussian and LDM's loss; reproducible noise."""

import math

import pytest
import torch
from conftest import run_in_one_and_two_processes
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_ddpm.autoencoder.posterior import KLPosterior, kl_to_standard_normal
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.random import Stream, normal


@settings(max_examples=25, deadline=None)
@given(spread=st.floats(0.1, 20), seed=st.integers(0, 99))
def test_divergence_is_torchs(spread, seed):
    torch.manual_seed(seed)
    mean, logvar = torch.randn(2, 50).double() * spread
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    assert torch.allclose(kl_to_standard_normal(mean, logvar), theirs)
    assert kl_to_standard_normal(torch.zeros(1), torch.zeros(1)) == 0


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 4), channels=st.sampled_from([1, 3]), spread=st.floats(0.1, 40), seed=st.integers(0, 99))
def test_loss_and_gradient_are_ldms_over_the_values_of_an_image(width, channels, spread, seed):
    """Up to the common factor of the mean reconstruction loss; includes clamped log variances."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(quantizer="kl", kl_weight=1e-6)
    images, decoded = torch.rand(2, 3, channels, 8, 12) * 2 - 1  # downsampled by 4
    moments = (torch.randn(3, 2 * width, 2, 3) * spread).requires_grad_()
    posterior = KLPosterior(channels * 16).eval()(moments)
    ours = (decoded - images).abs().mean() + posterior.loss(config)
    (gradient,) = torch.autograd.grad(ours, moments)
    oracle = DiagonalGaussianDistribution(moments)
    # LPIPSWithDiscriminator of CompVis/latent-diffusion before the discriminator starts, its logvar 0
    ldm = (decoded - images).abs().sum() / 3 + 1e-6 * oracle.kl().sum() / 3
    (theirs,) = torch.autograd.grad(ldm, moments)
    values = channels * 8 * 12
    assert torch.allclose(ours * values, ldm, rtol=1e-4)
    assert torch.allclose(gradient * values, theirs, rtol=1e-4, atol=1e-12)
    assert torch.equal(posterior.latents, oracle.mode())
    assert torch.allclose(posterior.std, oracle.std.mean())


def test_noise_follows_from_seed_and_example_number_alone():
    posterior = KLPosterior(16, seed=3)
    moments = torch.randn(5, 6, 4, 4).requires_grad_()
    numbers = torch.tensor([7, 2**40, 0, 8, 9])
    drawn = posterior(moments, numbers).latents
    mean, logvar = moments.chunk(2, dim=1)
    noise = (drawn - mean) / (0.5 * logvar).exp()
    assert torch.allclose(noise, normal(3, Stream.POSTERIOR, numbers, (3, 4, 4)), atol=1e-4)
    # the same in another batch, at another position, in a later call
    order = torch.tensor([3, 1])
    assert torch.equal(posterior(moments[order], numbers[order]).latents, drawn[order])
    assert torch.equal(posterior(moments, numbers).latents, drawn)
    # another number or seed gives other noise
    assert (posterior(moments, numbers + 1).latents - drawn).abs().flatten(1).min(1).values.min() > 0
    assert not torch.isclose(KLPosterior(16, seed=4)(moments, numbers).latents, drawn).any(0).all()
    # reparameterized: the gradient of a sample reaches mean and logvar
    (gradient,) = torch.autograd.grad(drawn.sum(), moments)
    assert torch.equal(gradient[:, :3], torch.ones(5, 3, 4, 4))
    assert torch.allclose(gradient[:, 3:], 0.5 * (drawn - mean), atol=1e-5)


def test_draws_are_standard_normal_around_the_mean():
    moments = torch.cat((torch.full((500, 2, 4, 4), 3.0), torch.full((500, 2, 4, 4), -2.0)), dim=1)
    drawn = KLPosterior(16)(moments, torch.arange(500)).latents
    assert float(drawn.mean()) == pytest.approx(3, abs=0.02)
    assert float(drawn.var()) == pytest.approx(math.exp(-2), rel=0.05)
    assert drawn.flatten(1).unique(dim=0).shape[0] == 500


def test_training_without_numbers_is_refused_and_evaluation_has_no_noise():
    posterior = KLPosterior(16)
    with pytest.raises(ValueError, match="numbers of the examples"):
        posterior(torch.zeros(2, 6, 4, 4))
    moments = torch.randn(2, 6, 4, 4)
    assert torch.equal(posterior.eval()(moments, torch.arange(2)).latents, moments[:, :3])


def test_the_model_trains_its_variances_and_encodes_to_means():
    config = AutoencoderConfig(
        dataset_name="x", resolution=16, block_out_channels=[8, 16], norm_num_groups=4, quantizer="kl"
    )
    torch.manual_seed(0)
    model = Autoencoder(config)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    output = model(images, torch.arange(4))
    assert output.quantized.latents.shape == model.encode(images).shape == (4, 3, 8, 8)
    assert output.quantized.indices is None and model.quantizer.update(0) is None
    # 192 latents behind 768 image values
    kl = DiagonalGaussianDistribution(model.quant_conv(model.encoder(images))).kl().mean()
    assert torch.allclose(output.quantized.kl_loss * 768, kl, rtol=1e-4)
    output.reconstruction.pow(2).mean().backward()
    assert model.quant_conv.weight.grad.abs().sum((1, 2, 3)).min() > 0
    model.eval()
    assert torch.equal(model(images).quantized.latents, model.encode(images))
    assert not [key for key in model.state_dict() if key.startswith("quantizer")]


TWO_PROCESSES = """
import sys
import torch
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.training.distributed import process_count, process_index
from latent_ddpm.autoencoder.vqvae import Autoencoder

count, folder = int(sys.argv[1]), sys.argv[2]
if count > 1:
    torch.distributed.init_process_group("gloo")
config = AutoencoderConfig(dataset_name="x", resolution=16, block_out_channels=[8, 16], norm_num_groups=4,
                           quantizer="kl", kl_weight=1e-2, seed=5)
torch.manual_seed(0)
model = Autoencoder(config)
wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if count > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(1)
share = 8 // count
kl = []
for step in range(6):
    joint = torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1
    mine = slice(process_index() * share, (process_index() + 1) * share)
    output = wrapped(joint[mine], torch.arange(8 * step, 8 * (step + 1))[mine])
    loss = (output.reconstruction - joint[mine]).pow(2).mean() + output.quantized.loss(config)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    kl.append(output.quantized.kl_loss.detach())
kl = torch.stack(kl)
if count > 1:
    torch.distributed.all_reduce(kl)
if process_index() == count - 1:
    torch.save({"model": model.state_dict(), "kl": kl / count}, f"{folder}/{count}.pt")
if count > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_what_one_with_the_joint_batch_trains(tmp_path):
    run_in_one_and_two_processes(TWO_PROCESSES, tmp_path)
    alone, joint = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    assert torch.allclose(alone["kl"], joint["kl"], rtol=1e-4)
    for name, value in alone["model"].items():
        assert torch.allclose(value, joint["model"][name], atol=1e-5), name
