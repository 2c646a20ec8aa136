"""One step of stage 1 alone: its gradients against one backward pass through everything, its losses, its state."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import assert_same_tensors

from latent_ddpm.autoencoder.losses import discriminator_loss, generator_loss
from latent_ddpm.autoencoder.training_step import AutoencoderStep
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.training.checkpoint import join_state, split_state


def make(accumulation=1, state=None, first_step=0, **keys):
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    tiny = {"block_out_channels": [8, 16], "norm_num_groups": 4, "num_vq_embeddings": 32, "resolution": 16}
    tiny |= {"disc_channels": 8, "disc_layers": 2, "gradient_accumulation_steps": accumulation}
    config = AutoencoderConfig(dataset_name="embedded:mnist", **{**tiny, **keys})
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    return AutoencoderStep(config, accelerator, None, state, first_step), config


def batch(first=0, count=4):
    examples = torch.arange(first, first + count)
    generator = torch.Generator().manual_seed(first)
    return torch.rand(count, 3, 16, 16, generator=generator) * 2 - 1, examples


@pytest.mark.parametrize("quantizer", ["ema", "kl"])
def test_the_gradient_is_that_of_the_weighted_sum_of_losses(quantizer):
    step, config = make(
        accumulation=2, quantizer=quantizer, disc_weight=0.7, disc_adaptive_steps=None, disc_norm="none"
    )
    images, examples = batch()
    step.start_codes(images)
    with step.accelerator.accumulate(step._model, step._disc_model):  # the first of two: no optimizer step yet
        losses, reconstruction = step.generator_step(images, examples, since_entry=3)
    assert reconstruction.shape == images.shape
    found = {name: p.grad.clone() for name, p in step.autoencoder.named_parameters() if p.grad is not None}

    output = step.autoencoder(images, examples)
    loss = (output.reconstruction - images).abs().mean() + output.quantized.loss(config)
    fooled = generator_loss(step.discriminator(output.reconstruction), config.disc_loss)
    total = loss + config.disc_weight * losses["adaptive_weight"] * fooled
    step.autoencoder.zero_grad()
    (total / 2).backward()  # the mean over two micro-batches
    expected = {name: p.grad for name, p in step.autoencoder.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(losses["loss"], loss.detach())
    torch.testing.assert_close(losses["generator_loss"], fooled.detach())


def test_the_discriminator_learns_and_the_autoencoder_does_not():
    step, config = make(disc_weight=0.7)
    images, _ = batch()
    before = {name: value.clone() for name, value in step.autoencoder.state_dict().items()}
    fake = images.flip(-1) * 0.5
    with step.accelerator.accumulate(step._disc_model):
        losses = step.discriminator_step(images, fake)
    assert_same_tensors(before, dict(step.autoencoder.state_dict()))
    real_logits, fake_logits = step.discriminator(torch.cat((images, fake))).chunk(2)
    after = discriminator_loss(real_logits, fake_logits, config.disc_loss).detach()
    assert after < losses["discriminator_loss"]
    assert set(losses) == {"discriminator_loss", "logits_real", "logits_fake"}
    assert not any(value.requires_grad for value in losses.values())


def test_losses_are_means_over_the_micro_batches():
    images, examples = batch(count=8)
    keys = {"quantizer": "kl", "disc_weight": 0.7, "disc_lecam_weight": 0.1, "disc_r1_weight": 0.1}
    whole, _ = make(**keys)
    one = whole.step(0, [(images, examples)], rate=1.0)
    halves, _ = make(accumulation=2, **keys)
    two = halves.step(0, [(images[:4], examples[:4]), (images[4:], examples[4:])], rate=1.0)
    assert one.keys() == two.keys() >= {"loss", "kl_loss", "generator_loss", "discriminator_loss", "r1_penalty"}
    for name in ("loss", "reconstruction_loss", "generator_loss", "grad_norm"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


def test_the_discriminator_enters_at_its_step():
    step, _ = make(disc_weight=0.7, disc_start=1, quantizer="kl")
    assert "discriminator_loss" not in step.step(0, [batch()], rate=1.0)
    assert step.state_dict(1)["discriminator"] is None
    assert "discriminator_loss" in step.step(1, [batch(4)], rate=1.0)
    assert step.state_dict(2)["discriminator"] is not None


def test_a_restored_step_does_what_the_saved_one_does():
    keys = {"disc_weight": 0.7, "disc_adaptive_steps": 2, "optimizer": "muon"}
    step, _ = make(**keys)
    step.start_codes(batch()[0])
    for number in range(2):
        step.step(number, [batch(4 * number)], rate=0.5)
    tensors = {name: value.clone() for name, value in split_state(step.state_dict(2))[0].items()}
    state = join_state(tensors, split_state(step.state_dict(2))[1])
    step.step(2, [batch(8)], rate=0.5)
    again, _ = make(state=state, first_step=2, **keys)
    again.step(2, [batch(8)], rate=0.5)
    assert_same_tensors(split_state(step.state_dict(3))[0], split_state(again.state_dict(3))[0])
