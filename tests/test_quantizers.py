"""latent_ddpm.models.quantizers: against brute force, an oracle package, and the death of codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vector_quantize_pytorch import VectorQuantize

from latent_ddpm.models.quantizers import EMACodebook, kmeans, nearest_code, perplexity


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
    monkeypatch.setattr("latent_ddpm.models.quantizers._MAX_DISTANCES", 64)
    assert torch.equal(nearest_code(vectors, codebook), whole)


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    truth = torch.randn(8, 3) * 20
    vectors = truth[torch.arange(4000) % 8] + 0.1 * torch.randn(4000, 3)
    centres, counts = kmeans(vectors, 32, seed=0)
    # with more clusters than lumps every lump has one, and each cluster sits in a lump
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


def test_a_codebook_that_starts_dead_fills():
    """All codes but one out of reach: plain EMA never uses them, revival brings them back."""

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
