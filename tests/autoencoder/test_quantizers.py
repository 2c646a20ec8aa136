"""latent_ddpm.autoencoder.quantizers: against brute force and an oracle package; revival of dead codes."""

import pytest
import torch
from conftest import run_in_one_and_two_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import FSQ as OracleFSQ
from vector_quantize_pytorch import SimVQ as OracleSimVQ
from vector_quantize_pytorch import VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from latent_ddpm.autoencoder.quantizers import (
    FSQ,
    EMACodebook,
    SimVQ,
    commitment_loss,
    decoder_metric,
    fsq_values,
    images_for_codes,
    kmeans,
    nearest_code,
    perplexity,
    rotation_trick,
)
from latent_ddpm.autoencoder.stock import latents_of, to_stock
from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig

QUANTIZERS = {
    "ema": lambda **options: EMACodebook(60, 3, **options),
    "simvq": lambda **options: SimVQ(60, 3, **options),
    "fsq": lambda **options: FSQ([5, 4, 3], **options),
}
every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 30), d=st.integers(1, 5), seed=st.integers(0, 99))
def test_nearest_code_is_brute_force(n, k, d, seed):
    torch.manual_seed(seed)
    vectors, codebook = torch.randn(n, d), torch.randn(k, d)
    distances = torch.cdist(vectors.double(), codebook.double())
    chosen = distances[torch.arange(n), nearest_code(vectors, codebook)]
    assert torch.allclose(chosen, distances.min(1).values, atol=1e-5)


def test_nearest_code_in_blocks(monkeypatch):
    vectors, codebook = torch.randn(1000, 3), torch.randn(50, 3)
    whole = nearest_code(vectors, codebook)
    monkeypatch.setattr("latent_ddpm.autoencoder.quantizers._MAX_DISTANCES", 64)
    assert torch.equal(nearest_code(vectors, codebook), whole)


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    truth = torch.randn(8, 3) * 20
    vectors = truth[torch.arange(4000) % 8] + 0.1 * torch.randn(4000, 3)
    centres, counts = kmeans(vectors, 32, seed=0)
    # with more centres than clusters of data, every cluster has a centre and every centre is in a cluster
    assert torch.cdist(truth, centres).min(1).values.max() < 0.2
    assert torch.cdist(centres, truth).min(1).values.max() < 0.5
    assert counts.sum() == 4000


@pytest.mark.parametrize("rows", [1, 5])
def test_kmeans_with_fewer_vectors_than_clusters(rows):
    centres, _ = kmeans(torch.ones(rows, 3), 16, seed=0)
    assert centres.shape == (16, 3) and centres.isfinite().all()
    assert (centres - 1).abs().max() < 0.01


def test_straight_through_gradient_and_commitment():
    quantizer = EMACodebook(8, 3)
    latents = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = quantizer(latents)
    assert out.indices.shape == (2, 4, 4)
    codes = quantizer.codebook[out.indices].permute(0, 3, 1, 2)
    assert torch.allclose(out.latents, codes, atol=1e-6)
    assert torch.allclose(out.commitment_loss, (latents - codes).pow(2).mean())
    weight = torch.randn_like(latents)
    (gradient,) = torch.autograd.grad((out.latents * weight).sum(), latents)
    assert torch.equal(gradient, weight)


@every_quantizer
@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_every_quantizer_gives_the_nearest_row_of_its_table(name, estimator):
    torch.manual_seed(0)
    quantizer = QUANTIZERS[name](estimator=estimator)
    latents = torch.randn(2, 3, 4, 6) * 2 + 0.3
    quantizer.initialize(latents)
    out = quantizer(latents.requires_grad_())
    table = quantizer.table()
    assert table.shape == (60, 3) and out.indices.shape == (2, 4, 6)
    vectors = latents.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    assert torch.equal(out.indices.flatten(), torch.cdist(vectors, table.detach()).argmin(1))
    assert torch.allclose(out.latents.permute(0, 2, 3, 1).reshape(-1, 3), table[out.indices.flatten()], atol=1e-6)
    assert torch.allclose(out.commitment_loss, (latents - out.latents).pow(2).mean(), atol=1e-5)
    (out.latents.sum() + out.commitment_loss + out.codebook_loss).backward()
    assert latents.grad.isfinite().all() and latents.grad.abs().sum() > 0
    counts = quantizer.update(0)
    assert torch.equal(counts, torch.bincount(out.indices.flatten(), minlength=60).float())
    assert quantizer.new_count.sum() == 0


@every_quantizer
def test_every_quantizer_survives_constant_zero_latents(name):
    """A dead encoder: all outputs are equal and at the origin, where a rotation has no angle."""
    quantizer = QUANTIZERS[name](estimator="rotation")
    latents = torch.zeros(2, 3, 2, 2, requires_grad=True)
    quantizer.initialize(latents.detach())
    for step in range(3):
        out = quantizer(latents)
        (out.latents.sum() + out.commitment_loss + out.codebook_loss).backward()
        quantizer.update(step)
        assert latents.grad.isfinite().all() and quantizer.table().isfinite().all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 6), seed=st.integers(0, 999))
def test_rotation_trick_is_the_oracles(n, d, seed):
    torch.manual_seed(seed)
    vectors, codes, weight = torch.randn(n, d, requires_grad=True), torch.randn(n, d), torch.randn(n, d)
    if d == 1:
        codes = (
            codes.abs() * vectors.detach().sign()
        )  # in one dimension, opposite signs cannot be rotated into each other
    mine, theirs = rotation_trick(vectors, codes), rotate_to(vectors, codes)
    assert torch.equal(mine, codes)
    assert torch.allclose(theirs, codes, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad((x * weight).sum(), vectors)[0] for x in (mine, theirs)]
    # the gradient is only rotated and scaled by the ratio of the lengths
    lengths = codes.norm(dim=1) / vectors.detach().norm(dim=1)
    assert torch.allclose(gradients[0].norm(dim=1), weight.norm(dim=1) * lengths, rtol=1e-2, atol=1e-3)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-2, atol=1e-2 * float(lengths.max()))


@pytest.mark.parametrize("estimator", ["straight_through", "rotation"])
def test_simvq_training_is_the_oracles(estimator):
    torch.manual_seed(0)
    ours = SimVQ(32, 4, revive_below=0.0, estimator=estimator)
    oracle = OracleSimVQ(
        4, 32, codebook_transform=torch.nn.Linear(4, 4), channel_first=True, rotation_trick=estimator == "rotation"
    )
    oracle.frozen_codebook.copy_(ours.basis)
    oracle.code_transform.load_state_dict(ours.map.state_dict())
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.3) for network in (ours, oracle)]
    for step in range(10):
        latents = torch.randn(3, 4, 5, 5) * 1.5 + 0.5
        inputs = [latents.clone().requires_grad_() for _ in range(2)]
        weight = torch.randn_like(latents)
        out = ours(inputs[0])
        codes, indices, loss = oracle(inputs[1])
        assert torch.equal(out.indices, indices)
        assert torch.allclose(out.latents, codes, atol=1e-5)
        assert torch.allclose(out.codebook_loss + 0.25 * out.commitment_loss, loss, atol=1e-5)
        for optimizer, total in zip(
            optimizers,
            ((out.latents * weight).sum() + out.codebook_loss + 0.25 * out.commitment_loss,
             (codes * weight).sum() + loss),
            strict=True,
        ):  # fmt: skip
            optimizer.zero_grad()
            total.backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4)
        if (
            estimator == "rotation"
        ):  # here the oracle's table gets a gradient from the decoder's loss; in the paper it does not
            oracle.code_transform.weight.grad.copy_(ours.map.weight.grad)
            oracle.code_transform.bias.grad.copy_(ours.map.bias.grad)
        for optimizer in optimizers:
            optimizer.step()
        ours.update(step)
        assert torch.allclose(ours.table(), oracle.codebook, atol=1e-5)


def test_simvq_starts_on_mean_and_covariance():
    torch.manual_seed(0)
    quantizer = SimVQ(4096, 3)
    latents = (torch.randn(64, 8, 8, 3) @ torch.randn(3, 3) + torch.tensor([5.0, -2.0, 0.0])).permute(0, 3, 1, 2)
    quantizer.initialize(latents)
    vectors, table = latents.permute(0, 2, 3, 1).reshape(-1, 3), quantizer.table().detach()
    assert torch.allclose(table.mean(0), vectors.mean(0), atol=0.15)
    assert torch.allclose(table.T.cov(), vectors.T.cov(), rtol=0.15, atol=0.15)


@pytest.mark.parametrize("levels", range(2, 17))
def test_fsq_values_meet_halfway_where_the_papers_rounding_tips_over(levels):
    values = fsq_values(levels).double()
    assert len(values) == levels and (values.diff() > 0).all()
    # the oracle's rounding on both sides of every midpoint
    middles = (values[1:] + values[:-1]) / 2
    if levels == 2:
        return  # not supported by the oracle's default rounding
    oracle = OracleFSQ([levels])
    below, above = (oracle.bound((middles + shift)[:, None]) * (levels // 2) for shift in (-1e-4, 1e-4))
    first = -((levels - 1) / 2) if levels % 2 else -levels / 2
    assert torch.allclose(below[:, 0], first + torch.arange(levels - 1).double(), atol=1e-6)
    assert torch.allclose(above - below, torch.ones_like(below), atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_fsq_chooses_what_the_oracle_chooses(levels, seed):
    torch.manual_seed(seed)
    latents = torch.randn(2, len(levels), 5, 5) * 2
    ours, oracle = FSQ(levels), OracleFSQ(levels, channel_first=True)
    _, indices = oracle(latents)
    mine = ours(latents).indices
    differ = mine != indices
    # only where float rounding decides, at equal distances to two codes
    distances = torch.cdist(latents.permute(0, 2, 3, 1)[differ].view(-1, len(levels)), ours.grid).sort(1).values
    assert (distances[:, 1] - distances[:, 0] < 1e-4).all()
    assert differ.float().mean() < 0.05


def test_ema_update_is_the_oracles():
    torch.manual_seed(0)
    ours = EMACodebook(16, 4, decay=0.9, revive_below=0.0)
    oracle = VectorQuantize(dim=4, codebook_size=16, decay=0.9, eps=0.0, commitment_weight=1.0, kmeans_init=False)
    oracle.train()
    oracle._codebook.embed.data.copy_(ours.codebook[None])
    oracle._codebook.embed_avg.data.copy_(ours.codebook[None])
    oracle._codebook.cluster_size.data.fill_(1.0)
    for step in range(5):
        latents = torch.randn(3, 4, 5, 5) * 1.5
        mine = ours(latents)
        ours.update(step)
        theirs, indices, loss = oracle(latents.permute(0, 2, 3, 1).reshape(3, 25, 4))
        assert torch.equal(mine.indices.view(3, 25), indices)
        assert torch.allclose(mine.commitment_loss, loss.squeeze(), atol=1e-5)
        assert torch.allclose(mine.latents.permute(0, 2, 3, 1).reshape(3, 25, 4), theirs, atol=1e-5)
        assert torch.allclose(ours.codebook, oracle._codebook.embed[0], atol=1e-4)


def test_evaluation_changes_nothing():
    quantizer = EMACodebook(8, 3).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(torch.randn(4, 3, 4, 4))
    assert quantizer.new_count.sum() == 0
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


def test_simvq_that_starts_dead_fills():
    def usage(revive_below: float) -> float:
        torch.manual_seed(0)
        quantizer = SimVQ(64, 3, decay=0.9, revive_below=revive_below)
        with torch.no_grad():
            quantizer.map.weight.copy_(torch.eye(3) * 50)  # codes far apart, around one small cluster
        for step in range(60):
            quantizer(torch.randn(8, 3, 8, 8))
            quantizer.update(step)
        return len(quantizer(torch.randn(64, 3, 8, 8)).indices.unique()) / 64

    assert usage(0.0) < 0.3
    assert usage(0.05) > 0.98


def test_a_codebook_that_starts_dead_fills():
    """All codes except one are out of reach: plain EMA never uses them, revival does."""

    def usage(revive_below: float) -> float:
        torch.manual_seed(0)
        quantizer = EMACodebook(64, 3, decay=0.9, revive_below=revive_below)
        quantizer.codebook.add_(100.0)
        quantizer.mean_sum.copy_(quantizer.codebook)
        quantizer.codebook[0] = 0
        quantizer.mean_sum[0] = 0
        for step in range(60):
            quantizer(torch.randn(8, 3, 8, 8))
            quantizer.update(step)
        return len(quantizer(torch.randn(64, 3, 8, 8)).indices.unique()) / 64

    assert usage(0.0) < 0.1
    assert usage(0.05) > 0.98


def test_initialize_spreads_over_the_data():
    torch.manual_seed(0)
    quantizer = EMACodebook(32, 3)
    latents = torch.randn(16, 3, 8, 8) * 5 + 40
    quantizer.initialize(latents)
    out = quantizer(latents)
    assert len(out.indices.unique()) == 32
    assert out.commitment_loss < 0.2 * latents.var()


def test_fsq_brings_small_correlated_outputs_to_its_grid():
    torch.manual_seed(0)
    quantizer = FSQ([8, 4, 4])
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [-0.5, 0.3, 0.1]]) * 0.1
    latents = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(32, 3, 8, 8)) + 0.3
    assert len(quantizer(latents).indices.unique()) < 10
    matrix, shift = quantizer.initialize(latents)
    brought = torch.einsum("ij,bjhw->bihw", matrix, latents) + shift.view(1, 3, 1, 1)
    vectors, grid = brought.permute(0, 2, 3, 1).flatten(0, 2), quantizer.table()
    assert torch.allclose(vectors.mean(0), grid.mean(0), atol=1e-3)
    assert torch.allclose(vectors.T.cov(correction=0), grid.T.cov(correction=0), atol=1e-2)
    assert len(quantizer(brought).indices.unique()) == 128


def test_fsqs_balance_loss_is_the_expected_log_use_of_gaussian_shares():
    torch.manual_seed(0)
    quantizer = FSQ([4, 3, 2])
    quantizer.mean_count.copy_(torch.rand(24) * 10)
    quantizer.mean_count[5] = 0
    vectors, grid = torch.randn(7, 3), quantizer.table()
    deviation = torch.stack([(grid[:, c].max() - grid[:, c].min()) / (2 * (n - 1)) for c, n in enumerate((4, 3, 2))])
    shares = (-0.5 * ((vectors[:, None] - grid) / deviation).pow(2).sum(2)).softmax(1)  # (7, 24)
    use = (quantizer.mean_count / quantizer.mean_count.mean()).clamp_min(0.01)
    assert quantizer.balance_loss(vectors) == pytest.approx(float((shares @ use.log()).mean()), rel=1e-4)


def test_fsqs_balance_wakes_idle_codes():
    """A learned map spreads a few clusters of outputs over the grid only with the balance loss."""

    def usage(balance):
        torch.manual_seed(0)
        quantizer = FSQ([5, 5], balance=balance)
        net = torch.nn.Sequential(torch.nn.Conv2d(2, 32, 1), torch.nn.Tanh(), torch.nn.Conv2d(32, 2, 1))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        clumps = torch.tensor([[0.0, 0.0], [0.2, 0.1], [-0.1, 0.3]])
        for step in range(300):
            x = (clumps[torch.randint(0, 3, (8, 4, 4))] + 0.1 * torch.randn(8, 4, 4, 2)).permute(0, 3, 1, 2)
            out = quantizer(net(x))
            (0.25 * out.commitment_loss + out.codebook_loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            quantizer.update(step)
        return float((quantizer.mean_count > 0.05 * quantizer.mean_count.mean()).float().mean())

    assert usage(0.0) < 0.5
    assert usage(0.1) > 0.9


def test_the_model_applies_what_fsq_asks_for_and_the_export_has_it():
    torch.manual_seed(0)
    config = AutoencoderConfig(dataset_name="x", resolution=16, block_out_channels=[8, 16], norm_num_groups=4,
                               quantizer="fsq", fsq_levels=[5, 4, 3], num_vq_embeddings=60)  # fmt: skip
    model, images = Autoencoder(config), torch.rand(16, 3, 16, 16) * 2 - 1
    before = model.encode(images).detach()
    model.initialize(images)
    after = model.encode(images).detach()
    grid = model.quantizer.table()
    assert before.std() < 0.5 * after.std()
    assert torch.allclose(after.mean((0, 2, 3)), grid.mean(0), atol=1e-3)
    assert torch.allclose(after.std((0, 2, 3), correction=0), grid.std(0, correction=0), rtol=0.02)
    assert torch.allclose(latents_of(to_stock(model, config), images), after, atol=1e-5)


def test_update_returns_counts_and_resets():
    quantizer = EMACodebook(8, 3)
    for _ in range(2):  # two micro-batches of one step
        quantizer(torch.randn(2, 3, 4, 4))
    assert quantizer.update(0).sum() == 64
    assert quantizer.new_count.sum() == 0 and quantizer.new_sum.abs().sum() == 0


def test_perplexity():
    assert perplexity(torch.full((10,), 3.0)) == pytest.approx(10)
    assert perplexity(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([1.0, 1.0, 0])) == pytest.approx(2)


TWO_PROCESSES = """
import sys
import torch
from latent_ddpm.training.distributed import process_count, process_index
from latent_ddpm.autoencoder.quantizers import EMACodebook, FSQ, SimVQ

count, folder = int(sys.argv[1]), sys.argv[2]
if count > 1:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
share = 8 // count
for name, quantizer in {"ema": EMACodebook(40, 3, revive_below=0.3), "simvq": SimVQ(40, 3, revive_below=0.3),
                        "fsq": FSQ([5, 4, 2])}.items():
    generator = torch.Generator().manual_seed(1)
    parameters = list(quantizer.parameters())
    joint = torch.randn(8, 3, 4, 4, generator=generator)
    mine = slice(process_index() * share, (process_index() + 1) * share)
    affine = quantizer.initialize(joint[mine])
    counts = torch.zeros(40)
    for step in range(12):
        joint = torch.randn(8, 3, 4, 4, generator=generator) * (1 + step / 4)
        out = quantizer(joint[mine])
        if parameters:
            out.codebook_loss.backward()
            with torch.no_grad():
                for parameter in parameters:
                    if count > 1:
                        torch.distributed.all_reduce(parameter.grad)
                    parameter -= 0.1 * parameter.grad / count
                    parameter.grad = None
        counts += quantizer.update(step)
    if process_index() == count - 1:
        state = {"table": quantizer.table().detach(), "counts": counts, "affine": affine}
        torch.save(state, f"{folder}/{name}-{count}.pt")
if count > 1:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def test_two_processes_hold_the_table_of_one_with_the_joint_batch(tmp_path):
    run_in_one_and_two_processes(TWO_PROCESSES, tmp_path)
    for name in QUANTIZERS:
        alone, joint = (torch.load(tmp_path / f"{name}-{count}.pt") for count in (1, 2))
        assert alone["counts"].sum() == 12 * 8 * 16
        assert torch.equal(alone["counts"], joint["counts"])
        assert torch.allclose(alone["table"], joint["table"], atol=1e-5)
        assert (alone["affine"] is None) == (name != "fsq")
        if name == "fsq":
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone["affine"], joint["affine"], strict=True))


# ------------------------------------------------------------------------- codebook_start: codes that enter late


def make_autoencoder(**changes):
    torch.manual_seed(0)
    shape = {"resolution": 16, "block_out_channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4}
    return Autoencoder(AutoencoderConfig(dataset_name="x", num_vq_embeddings=16, **shape, **changes))


def test_decoder_metric_of_a_linear_decoder_is_its_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 3, generator=generator)  # from the latents of a position to its 2x2 pixels of 3 channels
    scales = torch.tensor([3.0, 1.0, 0.1]).view(1, 3, 1, 1)
    latents = torch.randn(64, 3, 8, 8, generator=generator) * scales + 2

    def decode(z):
        return torch.nn.functional.pixel_shuffle(torch.einsum("pd,ndhw->nphw", mixing, z), 2)

    matrix, shift = decoder_metric(lambda images: latents, decode, torch.zeros(64, 3, 16, 16))
    gram = (mixing.T @ mixing).double()
    ratio = (matrix.T @ matrix) / gram
    torch.testing.assert_close(ratio, ratio[0, 0].expand(3, 3), rtol=1e-3, atol=0)
    mapped = torch.einsum("ab,nbhw->nahw", matrix, latents.double()) + shift.view(1, 3, 1, 1)
    torch.testing.assert_close(mapped.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-5, rtol=0)
    assert float(mapped.var((0, 2, 3)).mean()) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("quantizer", ["ema", "simvq", "fsq"])
def test_codes_that_enter_late_leave_the_plain_autoencoder_as_it_was(quantizer):
    levels = {"fsq_levels": [2, 2, 2, 2]} if quantizer == "fsq" else {}
    model = make_autoencoder(quantizer=quantizer, codebook_start=5, **levels)
    images = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    model.plain = True
    before = model(images)
    assert before.quantized.indices is None and before.quantized.loss(AutoencoderConfig(dataset_name="x")) == 0
    model.initialize(images, learned=True)
    torch.testing.assert_close(model(images).reconstruction, before.reconstruction, rtol=1e-3, atol=1e-3)
    if quantizer == "ema":  # which does not transform latents; they are now in the decoder's units
        matrix, _ = decoder_metric(model.encode, model.decode, images)
        torch.testing.assert_close(matrix / matrix[0, 0], torch.eye(4).double(), rtol=0, atol=0.02)
    model.plain = False
    after = model.eval()(images)
    assert after.quantized.indices.unique().numel() > 8
    error = (after.quantized.latents - model.encode(images)).var() / model.encode(images).var()
    assert error < 0.6


def test_a_plain_autoencoder_gives_the_quantizers_parameters_a_gradient_of_0():
    """Otherwise DistributedDataParallel would wait for them."""
    model = make_autoencoder(quantizer="simvq", codebook_start=5)
    model.plain = True
    output = model(torch.rand(2, 3, 16, 16))
    (output.reconstruction.mean() + output.quantized.codebook_loss).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.quantizer.parameters())


def test_how_many_images_k_means_takes():
    config = AutoencoderConfig(dataset_name="x", resolution=32, block_out_channels=[16, 32, 64], num_vq_embeddings=1024)
    assert images_for_codes(config) == 256


def test_commitment_loss_pulls_only_the_encoder_outputs():
    vectors, codes = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    loss = commitment_loss(vectors, codes)
    assert torch.allclose(loss, torch.nn.functional.mse_loss(vectors, codes))
    loss.backward()
    assert torch.allclose(vectors.grad, 2 * (vectors - codes).detach() / 18) and codes.grad is None
