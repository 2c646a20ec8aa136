"""latent_ddpm.autoencoder.losses and the discriminator: gradients against plain autograd."""

import urllib.error

import pytest
import torch

from latent_ddpm.autoencoder.discriminator import ActNorm, PatchDiscriminator
from latent_ddpm.autoencoder.losses import (
    MAX_ADAPTIVE_WEIGHT,
    TRUNKS,
    HeldWeight,
    adaptive_weight,
    adversarial_ramp,
    discriminator_loss,
    generator_loss,
    input_gradient,
    lecam_penalty,
    load_lpips,
    r1_penalty,
    reconstruction_loss,
)
from latent_ddpm.errors import UserError


def test_reconstruction_losses():
    a, b = torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)
    assert reconstruction_loss(a, b, "l1") == 0.5
    assert reconstruction_loss(a, b, "l2") == 0.25


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 0.5])
    assert discriminator_loss(real, fake, "hinge") == pytest.approx(0.5 * (0.5 + 0.75))
    assert generator_loss(fake, "hinge") == pytest.approx(1.25)


def test_non_saturating_losses_are_binary_cross_entropies():
    real, fake = torch.randn(40), torch.randn(40)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    theirs = 0.5 * (entropy(real, torch.ones(40)) + entropy(fake, torch.zeros(40)))
    assert discriminator_loss(real, fake, "non_saturating") == pytest.approx(float(theirs))
    assert generator_loss(fake, "non_saturating") == pytest.approx(float(entropy(fake, torch.ones(40))))


def test_r1_penalty_of_a_linear_discriminator():
    """D(x) = w.x at every patch: the gradient is w for any number of patches."""
    weight = torch.randn(1, 3 * 64)
    weight.requires_grad_()
    images = torch.randn(5, 3, 8, 8, requires_grad=True)
    logits = (images.flatten(1) @ weight.T)[:, :, None, None].expand(-1, 1, 4, 4)
    penalty = r1_penalty(logits, images)
    assert penalty.detach() == pytest.approx(0.5 * float(weight.pow(2).sum()), rel=1e-5)
    penalty.backward()
    assert torch.allclose(weight.grad, weight.detach(), rtol=1e-4)  # it trains the discriminator


def test_lecam_penalty():
    real, fake, means = torch.tensor([1.0, -3.0]), torch.tensor([0.5, -2.0]), torch.tensor([0.25, -1.0])
    assert lecam_penalty(real, fake, means) == pytest.approx((2.0**2 + 0) / 2 + (0 + 2.25**2) / 2)


def test_adversarial_ramp():
    assert [adversarial_ramp(step, 10, 4) for step in (0, 9, 10, 11, 13, 14, 99)] == [0, 0, 0.25, 0.5, 1, 1, 1]
    assert [adversarial_ramp(step, 10, 0) for step in (9, 10, 11)] == [0, 1, 1]


def test_adaptive_weight_and_one_backward_equal_the_papers_two():
    """Our route (gradients at the pixels, one pass down) against VQGAN's (autograd through the last layer)."""
    torch.manual_seed(0)
    body, last = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
    discriminator = PatchDiscriminator(3, 8, 2).eval()  # eval: spectral norm's vectors stand still
    images, inputs = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)

    features = torch.tanh(body(inputs))
    output = last(features)
    rec, gan = reconstruction_loss(output, images, "l2"), generator_loss(discriminator(output), "hinge")
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
    g_gan = input_gradient(generator_loss(discriminator(pixels), "hinge"), pixels)
    weight = adaptive_weight(features, last, g_rec, g_gan)
    (output * (g_rec + weight * g_gan)).sum().backward()
    assert weight == pytest.approx(float(paper_weight), rel=1e-4)
    for ours, theirs in zip((*body.parameters(), *last.parameters()), paper, strict=True):
        assert torch.allclose(ours.grad, theirs, atol=1e-6, rtol=1e-4)


def test_adaptive_weight_is_bounded():
    last = torch.nn.Conv2d(4, 1, 3, padding=1)
    features, g = torch.rand(1, 4, 8, 8), torch.rand(1, 1, 8, 8)
    assert adaptive_weight(features, last, g, torch.zeros_like(g)) <= MAX_ADAPTIVE_WEIGHT
    assert adaptive_weight(features, last, torch.zeros_like(g), g) == 0
    for broken in (float("nan"), float("inf")):
        assert adaptive_weight(features, last, g, torch.full_like(g, broken)) == 0


@pytest.mark.parametrize(
    ("resolution", "layers", "norm"), [(32, 3, "spectral"), (16, 2, "actnorm"), (64, 3, "none"), (32, 3, "actnorm")]
)
def test_discriminator_gives_patches_and_learns(resolution, layers, norm):
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, 8, layers, norm)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3)
    real = torch.rand(8, 1, resolution, resolution)
    discriminator.initialize(real)
    fake = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    for _ in range(100):
        logits = discriminator(torch.cat((real, fake)))
        assert logits.shape[2] >= 1 and logits.shape[2] < resolution
        loss = discriminator_loss(*logits.chunk(2), "hinge")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7


def test_spectral_norm_bounds_each_layer_but_the_first():
    discriminator = PatchDiscriminator(3, 8, 2)
    discriminator.train()
    for _ in range(50):
        discriminator(torch.rand(1, 3, 32, 32))  # each pass is a power iteration
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), 2) for m in discriminator.blocks if hasattr(m, "weight")]
    assert [float(n) for n in norms[1:]] == pytest.approx([1.0, 1.0, 1.0], abs=0.02)


def test_actnorm_starts_with_mean_0_and_variance_1():
    torch.manual_seed(0)
    norm = ActNorm(3)
    x = torch.randn(16, 3, 5, 5) * torch.tensor([0.1, 3.0, 7.0]).view(1, 3, 1, 1) + 4
    norm.initialize(x)
    out = norm(x)
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(out.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3)
    before = [p.clone() for p in norm.parameters()]
    norm(x * 5)
    assert all(torch.equal(a, b) for a, b in zip(before, norm.parameters(), strict=True))


def test_logit_means_follow_only_kept_steps():
    discriminator = PatchDiscriminator(3, 8, 1)
    yes, no, nan = torch.tensor(True), torch.tensor(False), torch.tensor(float("nan"))
    discriminator.track(nan, nan, no)
    for value in (2.0, 4.0):
        discriminator.track(torch.tensor(value), torch.tensor(-1.0), yes)
    assert discriminator.logit_means.tolist() == pytest.approx([3.0, -1.0])  # not biased towards 0 at the start
    discriminator.track(nan, torch.tensor(0.0), no)
    assert discriminator.logit_means.tolist() == pytest.approx([3.0, -1.0])
    for _ in range(1000):
        discriminator.track(torch.tensor(7.0), torch.tensor(-1.0), yes)
    assert discriminator.logit_means.tolist() == pytest.approx([7.0, -1.0], abs=1e-3)


def test_lpips_without_its_trunk_names_the_two_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    with pytest.raises(
        UserError, match=r"vgg16-397923af.pth.*Put that file at .*checkpoints.*--lpips_weights FILE.*--lpips_weight 0"
    ):
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


@pytest.mark.parametrize("net", ["vgg", "alex", "squeeze"])
def test_lpips_weights_by_path_are_those_of_the_cache(net, tmp_path, monkeypatch):
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    maker = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    features = getattr(torchvision.models, maker)().features.state_dict()
    tensors = {f"features.{name}": tensor for name, tensor in features.items()}
    if net == "alex":  # from torch's cache `lpips` reads the whole network
        whole = torchvision.models.alexnet().state_dict() | tensors
        torch.save(whole, tmp_path / "checkpoints" / TRUNKS[net])
    torch.save(tensors, tmp_path / "trunk.pth")
    save_file(tensors, tmp_path / "trunk.safetensors")
    images = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    distances = [load_lpips(net, str(tmp_path / f"trunk.{kind}"))(*images) for kind in ("pth", "safetensors")]
    if net == "alex":
        distances.append(load_lpips(net)(*images))
    assert all(torch.equal(distances[0], other) for other in distances[1:]) and (distances[0] > 0).all()


def test_lpips_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match=r"lpips_weights: cannot read .*nowhere.pth \(No such file"):
        load_lpips("vgg", str(tmp_path / "nowhere.pth"))
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "noise.pth").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name in ("other.safetensors", "noise.pth", "empty.pth", "list.pth"):
        with pytest.raises(UserError, match=f"lpips_weights: .*{name} does not hold torchvision's vgg16"):
            load_lpips("vgg", str(tmp_path / name))


def test_the_adaptive_weight_is_measured_then_held_at_its_mean_also_after_a_resume():
    weights = [torch.tensor(w) for w in (100.0, 100.0, 1.0, 0.0, 3.0)]  # 0 marks a gradient that was not finite
    held = HeldWeight(5, None, torch.device("cpu"))
    for step, weight in enumerate(weights):
        if step == 4:
            held = HeldWeight(5, held.sums.clone(), torch.device("cpu"))
        assert held.held(step) is None
        held.add(step, weight)
    assert held.held(5) == held.held(1000) == 2.0
    assert HeldWeight(5, None, torch.device("cpu")).held(5) == 0  # no adversarial step yet
    never = HeldWeight(None, None, torch.device("cpu"))
    never.add(0, weights[0])
    assert never.held(10**6) is None and not never.sums.any()
