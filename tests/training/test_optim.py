"""Learning rates, clipping and Muon: against torch and closed forms."""

import copy

import numpy as np
import pytest
import torch
from conftest import run_in_one_and_two_processes
from hypothesis import given
from hypothesis import strategies as st

from latent_ddpm.config import AutoencoderConfig, in_steps
from latent_ddpm.training.checkpoint import join_state, split_state
from latent_ddpm.training.optim import (
    Muon,
    _iterate,
    _iterate_on_gram,
    _owners,
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    orthogonalize,
)


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
from latent_ddpm.training import optim
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
