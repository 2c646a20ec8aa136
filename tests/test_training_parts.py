"""ema, optim, diffusion, evaluate: small parts, each against an oracle or a closed form."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import run_in_one_and_two_processes
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel, compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio

from latent_ddpm.checkpoint import join_state, split_state
from latent_ddpm.config import AutoencoderConfig, UNetConfig, in_steps
from latent_ddpm.diffusion import (
    add_noise,
    loss_weight,
    make_noise_scheduler,
    noise_levels,
    sampling_scheduler,
    target,
)
from latent_ddpm.ema import (
    EMA,
    PowerEMA,
    _read_snapshots,
    gamma_of,
    profile_products,
    reconstruct,
    reconstruction_error,
)
from latent_ddpm.errors import UserError
from latent_ddpm.evaluate import evaluate_autoencoder, psnr, ssim
from latent_ddpm.models.unet import make_unet
from latent_ddpm.models.vqvae import ResnetBlock, Upsample
from latent_ddpm.optim import (
    Muon,
    _iterate,
    _iterate_on_gram,
    _owners,
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    orthogonalize,
)

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]


def test_ema_is_diffusers_ema():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    ours = EMA(model, 0.95)
    theirs = EMAModel(model.parameters(), decay=0.95)
    theirs.optimization_step = (
        1  # its first warm-up value is (1 + 1) / (10 + 1) at its second step; ours starts at 1/10
    )
    for step in range(1, 40):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(8, 3))
        ours.update(model, step)
        theirs.step(model.parameters())
    for mine, shadow in zip(ours.model.parameters(), theirs.shadow_params, strict=True):
        assert torch.allclose(mine, shadow, atol=1e-5)
    assert torch.equal(ours.model[1].running_mean, model[1].running_mean)
    assert ours.decay_at(0) == 0.1 and ours.decay_at(10**6) == 0.95
    assert not any(p.requires_grad for p in ours.model.parameters())


@settings(max_examples=50, deadline=None)
@given(sigma_rel=st.floats(0.01, 0.288))
def test_gamma_gives_the_relative_width(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5) == pytest.approx(sigma_rel, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(a=st.tuples(st.floats(0, 20), st.integers(1, 300)), b=st.tuples(st.floats(0, 20), st.integers(1, 300)))
def test_products_of_profiles_are_their_integrals(a, b):
    times, width = np.linspace(0, min(a[1], b[1]), 200_001, retstep=True)
    profiles = [(gamma + 1) * (times / t) ** gamma / t for gamma, t in (a, b)]
    integral = np.trapezoid(profiles[0] * profiles[1], dx=width)
    assert profile_products([a], [b])[0, 0] == pytest.approx(integral, rel=1e-4)


def _walk(steps, seed=0):
    """A model whose weights wander, and what they were after each step."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(40, 40)
    passed = []
    for step in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight) / (1 + step) ** 0.5)
        passed.append(model.weight.detach().clone())
        yield step, model, passed


@pytest.mark.parametrize("steps", [60, 300])
def test_power_averages_weigh_as_the_power_function(steps):
    for step, model, passed in _walk(steps):  # noqa: B007
        if step == 0:
            ema = PowerEMA(model, [0.1, 0.05])
        ema.update(model, step)
    seen = [t for t in range(1, steps + 1) if t <= 256 or t % 4 == 0]  # every fourth step, once there are many
    assert seen[-1] == steps
    for gamma, averaged in zip(ema.gammas, ema.models, strict=True):
        edges = (torch.tensor([0, *seen]) / steps) ** (gamma + 1)
        expected = sum(weight * passed[t - 1] for weight, t in zip(edges.diff(), seen, strict=True))
        assert torch.allclose(averaged.weight, expected, atol=1e-5)


@pytest.mark.parametrize("wanted", [0.03, 0.07, 0.15, 0.25])
def test_an_average_made_afterwards_is_the_one_tracked(tmp_path, wanted):
    for step, model, _ in _walk(2000):
        if step == 0:
            ema, direct = PowerEMA(model, [0.1, 0.05]), PowerEMA(model, [wanted])
        ema.update(model, step)
        direct.update(model, step)
        if (step + 1) % 125 == 0:
            ema.save_snapshots(tmp_path, step + 1)
    made, at = reconstruct(tmp_path, wanted)
    weight = direct.model.weight
    assert at == 2000 and set(made) == {"weight", "bias"}
    # beyond what was tracked is extrapolation
    assert float((made["weight"] - weight).norm() / weight.norm()) < (0.01 if wanted in (0.07, 0.15) else 0.025)
    # the average itself is further away: otherwise this would show nothing
    assert float((ema.model.weight - weight).norm() / weight.norm()) > 0.02
    # and one that was taken earlier, between two snapshots
    for step, model, _ in _walk(1060):
        if step == 0:
            direct = PowerEMA(model, [wanted])
        direct.update(model, step)
    made, at = reconstruct(tmp_path, wanted, step=1060)
    weight = direct.model.weight
    bound = 0.02 if wanted in (0.07, 0.15) else 0.08
    assert at == 1060 and float((made["weight"] - weight).norm() / weight.norm()) < bound
    with pytest.raises(UserError, match="end at step 2000; there is none at 2001"):
        reconstruct(tmp_path, wanted, step=2001)


def test_the_error_of_a_reconstruction_leaves_the_tracked_average_out(tmp_path):
    for step, model, _ in _walk(400):
        if step == 0:
            ema = PowerEMA(model, [0.1, 0.05, 0.08])
        ema.update(model, step)
        if (step + 1) % 50 == 0:
            ema.save_snapshots(tmp_path, step + 1)
    error = reconstruction_error(tmp_path, 0.08)
    made, truth = reconstruct(tmp_path, 0.08, without=0.08)[0]["weight"], ema.models[2].weight
    assert error == pytest.approx(float((made - truth).norm() / truth.norm()), rel=0.05)
    with_itself = reconstruct(tmp_path, 0.08)[0]["weight"]
    assert float((with_itself - truth).norm()) < 0.4 * float((made - truth).norm())
    with pytest.raises(UserError, match="was not tracked"):
        reconstruction_error(tmp_path, 0.2)


def test_a_snapshot_knows_when_its_average_was_last_updated(tmp_path):
    for step, model, _ in _walk(303):
        if step == 0:
            ema = PowerEMA(model, [0.1])
        ema.update(model, step)
        if step + 1 in (9, 303):
            ema.save_snapshots(tmp_path, step + 1)
    steps = [about["step"] for _, about in _read_snapshots(tmp_path)]
    assert steps == [9, 300]
    made, at = reconstruct(tmp_path, 0.1)
    assert at == 300 and torch.allclose(made["weight"], ema.model.weight, atol=1e-2)


def test_snapshots_that_cannot_be_written_or_read_get_a_sentence(tmp_path):
    ema = PowerEMA(torch.nn.Linear(40, 40), [0.1, 0.05])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write the average .*start again with the same command"):
        ema.save_snapshots(tmp_path / "file", 4)
    ema.save_snapshots(tmp_path, 4)
    path = tmp_path / "ema-00000004-0.05.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"ema-00000004-0.05.safetensors is damaged .* Remove it"):
        reconstruct(tmp_path, 0.1)
    path.unlink()
    assert reconstruct(tmp_path, 0.1)[1] == 4


def test_averages_of_other_widths_are_refused():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"widths 0.1, 0.05; ema_sigma_rels asks for \[0.1, 0.2\]"):
        PowerEMA(model, [0.1, 0.2]).load_state_dict(PowerEMA(model, [0.1, 0.05]).state_dict())


def test_nothing_to_make_an_average_of(tmp_path):
    with pytest.raises(UserError, match="no averages"):
        reconstruct(tmp_path, 0.1)


@pytest.mark.parametrize("scheduler", ["constant", "cosine", "linear"])
def test_learning_rate(scheduler):
    config = AutoencoderConfig(lr_scheduler=scheduler, lr_warmup_steps=10, max_train_steps=110)
    factors = [learning_rate_factor(step, config) for step in range(111)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert factors[60] == pytest.approx(1.0 if scheduler == "constant" else 0.5)
    assert factors[110] == pytest.approx(1.0 if scheduler == "constant" else 0.0)
    no_warmup = AutoencoderConfig(lr_scheduler=scheduler, lr_warmup_steps=0, max_train_steps=5)
    assert learning_rate_factor(0, no_warmup) == 1.0


@pytest.mark.parametrize("max_norm", [0.5, 500.0])
def test_clipping_is_torchs(max_norm):
    networks = [_two_layers() for _ in range(2)]
    for network in networks:
        _gradients(network, 1)
        network[0].bias.grad = None
    optimizer = make_optimizer(networks[0].parameters(), AutoencoderConfig(), 1e-3)
    norm, kept = clip_gradients(optimizer, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(networks[1].parameters(), max_norm)
    assert norm == expected and kept and 0.5 < norm < 500
    for ours, theirs in zip(*(network.parameters() for network in networks), strict=True):
        assert ours.grad is theirs.grad is None or torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_learning_rate_that_is_constant_and_then_decays(decay_steps):
    config = AutoencoderConfig(
        lr_scheduler="warmup_stable_decay", lr_warmup_steps=10, max_train_steps=100, lr_decay_steps=decay_steps
    )
    factors = np.array([learning_rate_factor(step, config) for step in range(101)])
    begins = 100 - (decay_steps or 30)
    assert factors[0] == 0.1 and (factors[9 : begins + 1] == 1).all()
    assert np.allclose(factors[begins:], np.linspace(1, 0, 101 - begins))


def test_a_run_in_images_has_the_same_images_on_any_number_of_processes():
    config = AutoencoderConfig(
        max_train_images=64_000,
        lr_warmup_images=6_400,
        lr_decay_images=12_800,
        lr_scheduler="warmup_stable_decay",
        train_batch_size=16,
        gradient_accumulation_steps=2,
        lr_warmup_steps=7,
    )
    for processes in (1, 4):
        steps = in_steps(config, processes)
        scale = 32 * processes
        lengths = [steps.max_train_steps, steps.lr_warmup_steps, steps.lr_decay_steps]
        assert [length * scale for length in lengths] == [64_000, 6_400, 12_800]
    assert in_steps(AutoencoderConfig(), 3) == AutoencoderConfig()


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 32, 32)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    made = orthogonalize(matrices)
    values = torch.linalg.svdvals(made)
    assert made.shape == shape and values.min() > 0.4 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    assert torch.cosine_similarity(made.flatten(1), nearest.flatten(1)).min() > 0.95
    assert torch.allclose(orthogonalize(1e4 * matrices), made, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 24, 216), (1, 16, 2000)])
def test_orthogonalizing_by_the_gram_matrix_is_the_plain_iteration(shape):
    torch.manual_seed(0)
    # singular values from 1 down to 1e-3: what Muon meets
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = u * torch.logspace(0, -3, shape[1]) @ v
    normalized = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    made = _iterate_on_gram(normalized, 5)
    assert torch.allclose(made, _iterate(normalized, 5), atol=2e-3)
    assert torch.equal(orthogonalize(matrices), made)


def _two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.GroupNorm(2, 16), torch.nn.Conv2d(16, 3, 1))


def _gradients(network, step):
    torch.manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn_like(p)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    config = AutoencoderConfig(adam_weight_decay=0.1)
    ours, theirs, plain = (_two_layers() for _ in range(3))
    matrix = torch.nn.Parameter(theirs[0].weight.detach().flatten(1).clone())
    start = matrix.detach().clone()
    muon = make_optimizer(ours.parameters(), config, 0.01, "muon")
    oracle = torch.optim.Muon([matrix], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = make_optimizer(plain.parameters(), config, 0.01)
    for step in range(5):
        for network in (ours, plain):
            _gradients(network, step)
        matrix.grad = ours[0].weight.grad.flatten(1).clone()
        for optimizer in (muon, oracle, adamw):
            optimizer.step()
    moved = ours[0].weight.flatten(1) - start
    assert (moved - (matrix - start)).norm() < 0.02 * moved.norm()  # theirs iterates in bfloat16
    for a, b in zip(list(ours.parameters())[1:], list(plain.parameters())[1:], strict=True):
        assert torch.equal(a, b)


SHARED_MUON = """
import sys
import torch
from latent_ddpm import optim
from latent_ddpm.config import AutoencoderConfig

count, folder = int(sys.argv[1]), sys.argv[2]
if count > 1:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
shapes = [(32, 16, 3, 3), (16, 32), (32, 16, 3, 3), (48, 16, 1, 1), (20,), (32, 16, 3, 3), (3, 16)]
parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
worked_at, orthogonalize = [], optim.orthogonalize
optim.orthogonalize = lambda matrices: worked_at.extend(matrices) or orthogonalize(matrices)
optimizer = optim.make_optimizer(parameters, AutoencoderConfig(), 0.01, "muon")
for step in range(3):
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
rank = torch.distributed.get_rank() if count > 1 else 0
torch.save([p.detach() for p in parameters], f"{folder}/{count}-{rank}.pt")
torch.save([list(matrix.shape) for matrix in worked_at[: len(worked_at) // 3]], f"{folder}/shapes-{count}-{rank}.pt")
if count > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_processes_share_the_work_of_muon(tmp_path):
    run_in_one_and_two_processes(SHARED_MUON, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for a, b, c in zip(alone, first, second, strict=True):
        assert torch.equal(b, c)  # or the processes would drift apart
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    all_shapes, *shares = (torch.load(tmp_path / f"shapes-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert len(all_shapes) == 5 and all(shares)
    assert sorted(all_shapes) == sorted(shares[0] + shares[1])


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), max_size=30), st.integers(1, 9))
def test_nobody_works_more_at_muon_than_a_fair_share_and_one_matrix(shapes, count):
    owners = _owners(shapes, count)
    costs = [min(shape) ** 2 * (max(shape) + 8 * min(shape)) for shape in shapes]
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == p) for p in range(count)]
    assert sum(loads) == sum(costs) and len(owners) == len(shapes)
    assert max(loads) <= sum(costs) / count + max(costs, default=0)


def test_muon_goes_on_from_its_saved_state():
    config = AutoencoderConfig()
    network = _two_layers()
    optimizer = make_optimizer(network.parameters(), config, 0.01, "muon")
    for step in range(6):
        if step == 3:
            other = _two_layers()
            other.load_state_dict(network.state_dict())
            resumed = make_optimizer(other.parameters(), config, 0.01, "muon")
            resumed.load_state_dict(copy.deepcopy(join_state(*split_state(optimizer.state_dict()))))
        _gradients(network, step)
        optimizer.step()
    for step in range(3, 6):
        _gradients(other, step)
        resumed.step()
    assert isinstance(resumed, Muon)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def _levels(config, timesteps):
    """Noise levels of exactly these timesteps of a table of 1,000."""
    return noise_levels((timesteps.double() + 0.5) / 1000, config, make_noise_scheduler(config).alphas_cumprod)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_noising_targets_and_weights_are_diffusers(schedule, prediction_type):
    config = UNetConfig(dataset_name="x", beta_schedule=schedule, prediction_type=prediction_type)
    scheduler = make_noise_scheduler(config)
    clean, noise = torch.randn(2, 8, 3, 4, 4)
    t = torch.tensor([0, 1, 250, 500, 750, 900, 998, 999])
    timesteps, alpha, sigma = _levels(config, t)
    assert torch.equal(timesteps, t)
    noisy = add_noise(clean, noise, alpha, sigma)
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, t), atol=1e-6)
    wanted = target(clean, noise, alpha, sigma, prediction_type)
    oracle = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}
    assert torch.allclose(wanted, oracle[prediction_type], atol=1e-6)
    # the formula of diffusers' text-to-image example
    snr = compute_snr(scheduler, t)
    base = torch.minimum(snr, torch.full_like(snr, 5.0))
    expected = {"epsilon": base / snr, "v_prediction": base / (snr + 1), "sample": base}[prediction_type]
    assert torch.allclose(loss_weight(alpha, sigma, prediction_type, "min_snr", 5.0), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(loss_weight(alpha, sigma, prediction_type, "uniform"), torch.ones(8))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_a_weighting_weighs_the_error_of_the_clean_latents(prediction_type, weighting):
    """The same wrong guess of the clean latents costs the same, whatever the network predicts."""
    alpha, sigma = {True: (torch.tensor([0.8, 0.3]), torch.tensor([0.2, 0.7]))}.get(
        prediction_type == "flow_prediction", (torch.tensor([0.96, 0.28]), torch.tensor([0.28, 0.96]))
    )
    clean, noise = torch.randn(2, 2, 3, 4, 4)
    guess = clean + 0.1 * torch.randn_like(clean)
    a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    guessed_noise = (add_noise(clean, noise, alpha, sigma) - a * guess) / s  # the noise that goes with that guess
    truth, said = (target(x, n, alpha, sigma, prediction_type) for x, n in ((clean, noise), (guess, guessed_noise)))
    weight = loss_weight(alpha, sigma, prediction_type, weighting, 5.0)
    cost = weight * (said - truth).square().flatten(1).mean(1)
    snr = (alpha / sigma) ** 2
    on_clean = {"min_snr": snr.clamp_max(5.0), "edm": snr + 1}[weighting]
    assert torch.allclose(cost, on_clean * (guess - clean).square().flatten(1).mean(1), rtol=1e-3)


def test_edm_is_its_own_weighting_of_its_own_network():
    """EDM's lambda(sigma) c_out^2 is 1 (arXiv 2206.00364, table 1), and its network's output is v but for the sign."""
    sigma = torch.tensor([0.01, 0.5, 1.0, 20.0])  # EDM's own: noise added to unchanged data
    alpha = (1 + sigma**2).rsqrt()
    assert torch.allclose(loss_weight(alpha, sigma * alpha, "v_prediction", "edm"), torch.ones(4), rtol=1e-4)
    clean, noise = torch.randn(2, 4, 1, 2, 2).double()
    s = sigma.double().view(-1, 1, 1, 1)
    c_skip, c_out = 1 / (s**2 + 1), s / (s**2 + 1).sqrt()
    network = (clean - c_skip * (clean + s * noise)) / c_out
    v = target(clean, noise, alpha.double(), (sigma * alpha).double(), "v_prediction")
    assert torch.allclose(network, -v, atol=1e-6)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample", "flow_prediction"])
@pytest.mark.parametrize("shift", [1.0, 2.5])
@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "unipc"])
def test_the_exported_scheduler_samples_what_was_trained(kind, shift, scheduler):
    """With a network that is right about a set of one image, every scheduler of the export draws that image."""
    if kind == "flow_prediction" and scheduler == "ddim":
        pytest.skip("refused by the config")
    config = UNetConfig(dataset_name="x", prediction_type=kind, noise_shift=shift, inference_scheduler=scheduler)
    config.validate()
    table = None if kind == "flow_prediction" else make_noise_scheduler(config).alphas_cumprod
    torch.manual_seed(0)
    image, z = torch.randn(2, 1, 3, 4, 4)
    sampler = sampling_scheduler(config)
    if table is None:
        assert sampler.config.flow_shift == shift and sampler.config.use_flow_sigmas
    else:
        assert torch.allclose(sampler.alphas_cumprod, table, atol=1e-6)
    sampler.set_timesteps(12)
    for t in sampler.timesteps:
        if table is None:
            sigma = (t.double() / 1000).view(1).float()
            alpha = 1 - sigma
        else:
            _, alpha, sigma = noise_levels((t.double().view(1) + 0.5) / 1000, config, table)
        noise = (z - alpha * image) / sigma
        z = sampler.step(target(image, noise, alpha, sigma, kind), t, z).prev_sample
    assert torch.allclose(z, image, atol=0.06)


def test_the_flow_is_that_of_diffusers():
    config = UNetConfig(
        dataset_name="x", prediction_type="flow_prediction", noise_shift=3.0, inference_scheduler="dpmsolver++"
    )
    oracle = FlowMatchEulerDiscreteScheduler(shift=3.0)  # its sigmas are those of times 1, 0.999, ...
    timesteps, alpha, sigma = noise_levels(1 - torch.arange(1000).double() / 1000, config, None)
    assert torch.allclose(sigma, oracle.sigmas, atol=1e-6) and torch.allclose(alpha + sigma, torch.ones(1000))
    assert torch.allclose(timesteps, oracle.timesteps, atol=1e-3)
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    wanted = oracle.scale_noise(clean, oracle.timesteps[300:301], noise)
    assert torch.allclose(add_noise(clean, noise, alpha[300:301], sigma[300:301]), wanted, atol=1e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_shift_divides_signal_by_noise_at_every_level(zero_snr):
    plain, shifted = (
        make_noise_scheduler(UNetConfig(dataset_name="x", noise_shift=shift, rescale_betas_zero_snr=zero_snr))
        for shift in (1.0, 2.0)
    )
    a, b = plain.alphas_cumprod[:-1].double(), shifted.alphas_cumprod[:-1].double()
    assert torch.allclose(b / (1 - b), a / (1 - a) / 4, rtol=1e-3)
    assert (float(plain.alphas_cumprod[-1]) == 0) == zero_snr
    assert float(shifted.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-6) if zero_snr else True
    if zero_snr:
        oracle = DDIMScheduler(beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True).alphas_cumprod
        assert torch.allclose(plain.alphas_cumprod, oracle)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="flow"):
        target(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), "flow")


@settings(max_examples=20, deadline=None)
@given(noise=st.floats(0.01, 1.0), channels=st.sampled_from([1, 3]))
def test_psnr_is_scikit_images(noise, channels):
    images = torch.rand(3, channels, 16, 16) * 2 - 1
    other = (images + noise * torch.randn_like(images)).clamp(-1, 1)
    oracle = [peak_signal_noise_ratio(a, b, data_range=2.0) for a, b in zip(images.numpy(), other.numpy(), strict=True)]
    assert np.allclose(psnr(other, images).numpy(), oracle, atol=1e-3)
    assert psnr(images, images).tolist() == [100.0] * 3
    assert np.allclose(ssim(images, images), 1.0)
    assert (ssim(other, images) < 1).all()


def test_evaluate_autoencoder_counts_codes():
    batches = [{"image": torch.full((2, 1, 8, 8), value, dtype=torch.uint8)} for value in (0, 100, 200)]

    def reconstruct(images):
        return images, (images[:, 0] > 0).long()

    result = evaluate_autoencoder(reconstruct, batches, 4, torch.device("cpu"), with_ssim=True)
    assert result["images"] == 6 and result["psnr"] == 100 and result["ssim"] == pytest.approx(1)
    assert result["codebook_usage"] == 0.5  # codes 0 and 1 of 4
    assert result["perplexity"] == pytest.approx(np.exp(-(1 / 3) * np.log(1 / 3) - (2 / 3) * np.log(2 / 3)))
    json.dumps(result)
    result = evaluate_autoencoder(lambda images: (images, None), batches, 0, torch.device("cpu"))
    # no codebook, no figures of one
    assert result == {"psnr": 100, "explained_variance": 1.0, "images": 6}


def test_explained_variance():
    images = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(-1, -1, 8, 8)

    def measured(reconstruct, images=images):
        shares = [{"image": part} for part in images.split(3)]
        return evaluate_autoencoder(reconstruct, shares, 0, torch.device("cpu"))["explained_variance"]

    values = images.double() / 127.5 - 1
    assert measured(lambda x: (torch.full_like(x, values.mean()), None)) == pytest.approx(0, abs=1e-6)
    assert measured(lambda x: (x + 0.1, None)) == pytest.approx(1 - 0.01 / float(values.var(correction=0)), rel=1e-4)
    assert measured(lambda x: (-x, None)) < 0
    assert measured(lambda x: (x * 0, None), images[:1]) == 0  # nothing varies


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@torch.no_grad()
def test_a_new_unet_is_its_skips(kind):
    config = UNetConfig(
        dataset_name="x",
        unet_block_out_channels=[16, 32],
        unet_attention_levels=[0, 1],
        unet_norm_num_groups=8,
        unet_attention_head_dim=8,
        unet_time_scale_shift=kind,
    )
    unet = make_unet(config, 3, 4)
    noisy = torch.randn(2, 3, 4, 4)
    assert not unet(noisy, torch.tensor([3, 700])).sample.any()
    blocks = [module for module in unet.modules() if isinstance(module, ResnetBlock2D | Attention)]
    assert len(blocks) == 12 + 11
    assert all(block.group_norm is not None for block in blocks if isinstance(block, Attention))
    for block in blocks:
        if isinstance(block, Attention):
            x = torch.randn(2, block.to_q.in_features, 4, 4)
            assert torch.equal(block(x), x)
        else:
            x = torch.randn(2, block.in_channels, 4, 4)
            skip = x if block.conv_shortcut is None else block.conv_shortcut(x)
            assert torch.equal(block(x, torch.randn(2, 64)), skip)
            assert block.time_embedding_norm == kind


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_a_new_unet_learns_in_every_layer(kind):
    torch.manual_seed(0)
    config = UNetConfig(
        dataset_name="x",
        unet_block_out_channels=[16, 32],
        unet_attention_levels=[1],
        unet_norm_num_groups=8,
        unet_time_scale_shift=kind,
    )
    unet = make_unet(config, 3, 4)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    for _ in range(4):  # what was zero lets gradients pass only after a step
        loss = (unet(torch.randn(4, 3, 4, 4), torch.randint(1000, (4,))).sample - torch.randn(4, 3, 4, 4)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = [name for name, value in unet.state_dict().items() if torch.equal(value, before[name])]
    # a key's bias shifts all logits of a query alike, so softmax is blind to it
    assert all(name.endswith("to_k.bias") for name in still), still


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
def test_upsampling_is_a_convolution_of_doubled_pixels(batch, channels, height, width):
    torch.manual_seed(0)
    upsample, x = Upsample(channels).double(), torch.randn(batch, channels, height, width).double()
    doubled = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected, made = upsample.conv(doubled), upsample(x)
    assert torch.allclose(made, expected, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [
        torch.autograd.grad((y * weights).sum(), upsample.parameters(), retain_graph=True) for y in (made, expected)
    ]
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_a_residual_block_starts_as_its_skip():
    block, x = ResnetBlock(8, 8, 2), torch.randn(2, 8, 4, 4)
    assert torch.allclose(block(x) - x, block.conv2.bias.view(-1, 1, 1).expand_as(x), atol=1e-6)
