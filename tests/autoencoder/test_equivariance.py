"""Equivariance: transforms commute with the encoder and decoder, and follow from (seed, step)."""

import pytest
import torch
from conftest import assert_same_tensors, checkpoint_tensors, fill_zeros, launch, launch_and_stop, losses

from latent_ddpm.autoencoder.equivariance import Transform, transform_of, with_noise
from latent_ddpm.autoencoder.stock import to_stock
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.errors import UserError

ALL = [Transform(turns, halved) for turns in range(4) for halved in (False, True)]


@pytest.mark.parametrize("transform", ALL)
def test_it_commutes_with_averaging_over_patches(transform):
    """The mean colours of patches, the simplest latents, are equivariant, so an encoder can be."""
    images = torch.randn(2, 3, 16, 16)
    encode = torch.nn.AvgPool2d(4)
    assert torch.allclose(transform.apply(encode(images)), encode(transform.apply(images)), atol=1e-6)


def test_turns_are_counterclockwise_and_four_are_none():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert Transform(1, False).apply(x).flatten().tolist() == [1, 3, 0, 2]
    assert torch.equal(Transform(3, False).apply(Transform(1, False).apply(x)), x)


def test_the_choice_follows_from_seed_and_step_and_has_the_share_asked_for():
    chosen = [transform_of(3, step, 0.4) for step in range(3000)]
    assert chosen == [transform_of(3, step, 0.4) for step in range(3000)]
    assert chosen[:100] != [transform_of(4, step, 0.4) for step in range(100)]
    kinds = [t for t in chosen if t is not None]
    assert 0.36 < len(kinds) / 3000 < 0.44
    assert set(kinds) == set(ALL) - {Transform(0, False)}  # the identity is no transform
    assert min(kinds.count(kind) for kind in set(kinds)) > 0.7 * len(kinds) / 7
    assert all(transform_of(0, step, 0.0) is None for step in range(100))


def test_the_model_decodes_transformed_latents():
    torch.manual_seed(0)
    config = AutoencoderConfig(dataset_name="x", resolution=16, block_out_channels=[8, 16], norm_num_groups=4)
    model = fill_zeros(Autoencoder(config)).eval()
    images = torch.rand(2, 3, 16, 16)
    output = model(images, transform=Transform(1, True))
    latents = torch.rot90(torch.nn.functional.avg_pool2d(model.encode(images), 2), 1, (2, 3))
    assert output.reconstruction.shape == (2, 3, 8, 8)
    assert torch.allclose(output.reconstruction, model.decode(model.quantizer(latents).latents), atol=1e-6)
    # and the export decodes them equally
    assert torch.allclose(to_stock(model, config).decode(latents).sample, output.reconstruction, atol=1e-5)


def test_a_kl_vaes_noise_comes_before_the_transform():
    torch.manual_seed(0)
    config = AutoencoderConfig(dataset_name="x", resolution=16, block_out_channels=[8, 16], norm_num_groups=4,
                               quantizer="kl")  # fmt: skip
    model, images, numbers = fill_zeros(Autoencoder(config)), torch.rand(2, 3, 16, 16), torch.arange(2)
    output = model(images, numbers, Transform(3, False))
    drawn = model.quantizer(model.quant_conv(model.encoder(images)), numbers).latents
    assert torch.allclose(output.reconstruction, model.decode(torch.rot90(drawn, 3, (2, 3))), atol=1e-6)


def test_odd_latents_are_refused():
    config = AutoencoderConfig(dataset_name="x", resolution=12, block_out_channels=[16, 16, 16], equivariance_share=0.5)
    with pytest.raises(UserError, match="equivariance_share needs latents of even sides; .*12-pixel images have 3"):
        config.validate()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"disc_weight": 0.5, "equivariance_share": 1.0}, "equivariance_share .* below 1 with a discriminator"),
        ({"lpips_weight": 1.0, "equivariance_share": 0.5, "lpips_net": "alex"}, "lpips_net alex needs images of 31"),
        ({"lpips_weight": 1.0, "resolution": 16, "lpips_net": "squeeze"}, "lpips_net squeeze needs images of 17"),
        ({"disc_learning_rate": 0.0}, "disc_learning_rate is 0.0; it must be greater than 0"),
    ],
)
def test_combinations_that_cannot_work_are_refused(options, words):
    config = AutoencoderConfig(**{"dataset_name": "x", "resolution": 32, **options})
    with pytest.raises(UserError, match=words):
        config.validate()


def test_training_with_it_learns_and_resumes_bit_for_bit(photos, tmp_path):
    flags = {"train_data_dir": photos, "resolution": 16, "equivariance_share": 0.5, "learning_rate": 3e-3,
             "max_train_steps": 40, "checkpointing_steps": 5, "disc_weight": 0.5, "disc_start": 10, "disc_channels": 8,
             "disc_adaptive_steps": 4, "disc_layers": 1, "disc_norm": "actnorm", "disc_adam_beta1": 0.9}  # fmt: skip
    launch("train_autoencoder.py", tmp_path / "whole", **flags)
    launch_and_stop("train_autoencoder.py", tmp_path / "killed", 23, **flags)
    launch("train_autoencoder.py", tmp_path / "killed", resume_from_checkpoint="latest", **flags)
    assert_same_tensors(*(checkpoint_tensors(tmp_path / name, "autoencoder", 40) for name in ("whole", "killed")))
    assert losses(tmp_path / "whole", "autoencoder") == losses(tmp_path / "killed", "autoencoder")
    curve = list(losses(tmp_path / "whole", "autoencoder").values())
    assert sum(curve[-10:]) < 0.9 * sum(curve[:10])
    adversarial = losses(tmp_path / "whole", "autoencoder", "discriminator_loss")
    assert 5 < len(adversarial) < 25 and min(adversarial) > 10  # only in steps without transform


@pytest.mark.parametrize("quantizer", ["ema", "kl"])
def test_latent_noise_is_of_training_and_follows_from_the_example(quantizer):
    torch.manual_seed(0)
    keys = {"dataset_name": "x", "resolution": 16, "block_out_channels": [8, 16], "norm_num_groups": 4}
    plain, noisy = (
        fill_zeros(Autoencoder(AutoencoderConfig(**keys, quantizer=quantizer, latent_noise=noise))) for noise in (0, 2)
    )
    noisy.load_state_dict(plain.state_dict())
    images, numbers = torch.rand(4, 3, 16, 16), torch.tensor([5, 6, 7, 5])
    images[3] = images[0]
    assert torch.equal(noisy.eval()(images).reconstruction, plain.eval()(images).reconstruction)
    outputs = [model.train()(images, numbers).reconstruction for model in (noisy, plain)]
    assert not torch.allclose(*outputs) and torch.allclose(outputs[0][0], outputs[0][3])
    alone = noisy(images[1:2], numbers[1:2]).reconstruction
    assert torch.allclose(alone, outputs[0][1:2], atol=1e-5)


def test_latent_noise_has_the_share_asked_for():
    latents = torch.randn(64, 4, 8, 8) * torch.rand(64, 1, 1, 1) * 10
    noise = with_noise(latents, torch.arange(64), 0, 0.3) - latents
    shares = noise.flatten(1).std(1) / latents.flatten(1).std(1)
    assert shares.mean() == pytest.approx(0.3, rel=0.02) and shares.std() < 0.02
    blank = torch.full((1, 4, 8, 8), 3.0)
    assert torch.equal(with_noise(blank, torch.arange(1), 0, 0.3), blank)
