"""latent_ddpm.losses and the discriminator: gradients against plain autograd."""

import urllib.error

import pytest
import torch

from latent_ddpm.errors import UserError
from latent_ddpm.losses import (
    adaptive_weight,
    generator_loss,
    hinge_discriminator_loss,
    input_gradient,
    load_lpips,
    reconstruction_loss,
)
from latent_ddpm.models.discriminator import PatchDiscriminator


def test_reconstruction_losses():
    a, b = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    assert reconstruction_loss(a, b, "l1") == 0.5
    assert reconstruction_loss(a, b, "l2") == 0.25


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * (0.5 + 0.75))
    assert generator_loss(fake) == pytest.approx(1.25)


def test_adaptive_weight_and_one_backward_equal_the_papers_two():
    """Our route (gradients at the pixels, one pass down) against VQGAN's (autograd through the last layer)."""
    torch.manual_seed(0)
    body, last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
    discriminator = PatchDiscriminator(3, 8, 2).eval()  # eval: spectral norm's vectors stand still
    images, inputs = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)

    features = torch.tanh(body(inputs))
    output = last(features)
    rec, gan = reconstruction_loss(output, images, "l2"), generator_loss(discriminator(output))
    (rec_grad,) = torch.autograd.grad(rec, last.weight, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(gan, last.weight, retain_graph=True)
    paper_weight = rec_grad.norm() / (gan_grad.norm() + 1e-6)
    (rec + paper_weight.detach() * gan).backward()
    paper = [p.grad.clone() for p in (*body.parameters(), *last.parameters())]

    for module in (body, last):
        module.zero_grad()
    features = torch.tanh(body(inputs))
    output = last(features)
    pixels = output.detach().requires_grad_()
    g_rec = input_gradient(reconstruction_loss(pixels, images, "l2"), pixels)
    g_gan = input_gradient(generator_loss(discriminator(pixels)), pixels)
    weight = adaptive_weight(features, last, g_rec, g_gan)
    (output * (g_rec + weight * g_gan)).sum().backward()
    assert weight == pytest.approx(float(paper_weight), rel=1e-4)
    for ours, theirs in zip((*body.parameters(), *last.parameters()), paper, strict=True):
        assert torch.allclose(ours.grad, theirs, atol=1e-6, rtol=1e-4)


def test_adaptive_weight_is_bounded():
    last = torch.nn.Conv2d(4, 1, 3, padding=1)
    features, g = torch.rand(1, 4, 8, 8), torch.rand(1, 1, 8, 8)
    assert adaptive_weight(features, last, g, torch.zeros_like(g)) <= 1e4
    assert adaptive_weight(features, last, torch.zeros_like(g), g) == 0


@pytest.mark.parametrize(("resolution", "layers"), [(32, 3), (16, 2), (64, 3)])
def test_discriminator_gives_patches_and_learns(resolution, layers):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, 8, layers)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    real = torch.rand(8, 1, resolution, resolution)
    fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    for _ in range(100):
        logits = discriminator(torch.cat((real, fake)))
        assert logits.shape[2] >= 1 and logits.shape[2] < resolution
        loss = hinge_discriminator_loss(*logits.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7


def test_lpips_without_its_trunk_names_the_two_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(UserError, match=r"vgg16-397923af.pth.*Put that file at .*checkpoints.*--lpips_weight 0"):
        load_lpips("vgg")


def test_lpips_on_a_local_trunk(tmp_path, monkeypatch):
    """With weights in torch's cache (here: seeded random ones) the distance is built, frozen, and differentiable."""
    import torchvision

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    distance = load_lpips("alex")
    assert not any(p.requires_grad for p in distance.parameters())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert distance(images, images).abs().max() < 1e-6
    noisy = (images + 0.3 * torch.randn_like(images)).requires_grad_()
    loss = distance(noisy, images).mean()
    assert loss > 0
    assert input_gradient(loss, noisy).abs().sum() > 0
    assert distance(images[:, :1], images[:, :1]).shape == (2, 1, 1, 1)  # grayscale is broadcast
