"""Vector quantization: latents -> quantized latents, indices, loss.

The codebook is learned by exponential moving averages (van den Oord et al., arXiv 1711.00937, appendix A.1;
Razavi et al., arXiv 1906.00446), started by k-means on encoder outputs, and a code that falls out of use is
put back on an encoder output. All statistics are summed over the processes, so that every process holds the
same codebook, and the same as a single process with the joint batch would.
"""

from typing import NamedTuple

import torch
from torch import nn

from latent_ddpm.distributed import all_gather_rows, all_reduce_sum, process_count, process_index
from latent_ddpm.random import Stream, integers, uniform

_MAX_DISTANCES = 2**25  # elements of one block of the distance matrix: 128 MiB


class Quantized(NamedTuple):
    """What a quantizer returns.

    latents: (B, D, H, W) float32, the codes, with the straight-through gradient to the encoder.
    indices: (B, H, W) int64.
    commitment_loss: scalar, mean squared distance of encoder outputs to their codes (arXiv 1711.00937, eq. 3).
    """

    latents: torch.Tensor
    indices: torch.Tensor
    commitment_loss: torch.Tensor


def nearest_code(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code, by Euclidean distance.

    Args:
        vectors: (N, D) float.
        codebook: (K, D) float.

    Returns:
        int64 (N,).
    """
    half_norm = codebook.pow(2).sum(1).mul(0.5)  # argmin |z - e|^2 = argmin |e|^2 / 2 - z.e
    blocks = vectors.split(max(1, _MAX_DISTANCES // len(codebook)))
    return torch.cat([torch.addmm(half_norm, block, codebook.t(), alpha=-1).argmin(1) for block in blocks])


def kmeans(vectors: torch.Tensor, clusters: int, seed: int, iterations: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from random rows; an empty cluster restarts on a random row.

    Args:
        vectors: (N, D) float. Fewer rows than clusters are repeated with a little jitter.
        clusters: K.
        seed: determines the start.

    Returns:
        Centres (K, D) and counts (K,), both float.
    """
    count = torch.arange(len(vectors), device=vectors.device)
    if len(vectors) < clusters:
        rows = torch.arange(clusters, device=vectors.device)
        spread = vectors.std(0, correction=0).clamp_min(1e-4) * 1e-2
        jitter = uniform(seed, Stream.CODEBOOK, rows, vectors.shape[1:]) - 0.5
        vectors, count = vectors[rows % len(vectors)] + jitter * spread, rows
    order = uniform(seed, Stream.CODEBOOK, count).argsort()
    centres = vectors[order[:clusters]].clone()
    counts = torch.zeros(clusters, device=vectors.device)
    for iteration in range(iterations):
        nearest = nearest_code(vectors, centres)
        counts = torch.bincount(nearest, minlength=clusters).to(vectors.dtype)
        sums = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        empty = counts == 0
        restart = integers(seed, Stream.CODEBOOK, torch.arange(clusters, device=vectors.device) + clusters * iteration,
                           len(vectors))  # fmt: skip
        centres = torch.where(empty[:, None], vectors[restart], sums / counts.clamp_min(1)[:, None])
    return centres, counts


class EMACodebook(nn.Module):
    """A codebook learned by moving averages, with k-means start and revival of dead codes.

    `forward` only assigns and collects statistics; `update`, called once per optimizer step, moves the codebook.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the width of a code.
        decay: of the moving averages, per step.
        revive_below: a code whose use falls below this share of the mean use is put on an encoder output.
        seed: determines the k-means start and which encoder outputs revive codes.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, decay: float = 0.99, revive_below: float = 0.05, seed: int = 0
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.decay, self.revive_below, self.seed = decay, revive_below, seed
        self.register_buffer("codebook", torch.randn(num_embeddings, embedding_dim))
        self.register_buffer("mean_count", torch.ones(num_embeddings))  # moving average of uses per step
        self.register_buffer("mean_sum", self.codebook.clone())  # moving average of summed encoder outputs
        self.register_buffer("new_count", torch.zeros(num_embeddings), persistent=False)
        self.register_buffer("new_sum", torch.zeros(num_embeddings, embedding_dim), persistent=False)
        self._recent: torch.Tensor | None = None  # (N, D), the last encoder outputs: candidates for revival

    def forward(self, latents: torch.Tensor) -> Quantized:
        """Quantize encoder outputs (B, D, H, W); in training mode also collect statistics for `update`."""
        with torch.autocast(latents.device.type, enabled=False):  # bf16 distances would pick wrong codes
            latents = latents.float()
            vectors = latents.detach().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim)  # (N, D)
            nearest = nearest_code(vectors, self.codebook)
            batch, _, height, width = latents.shape
            codes = self.codebook[nearest].view(batch, height, width, -1).permute(0, 3, 1, 2)
            if self.training:
                self.new_count += torch.bincount(nearest, minlength=self.num_embeddings)
                self.new_sum.index_add_(0, nearest, vectors)
                self._recent = vectors
            commitment = (latents - codes).pow(2).mean()
            straight_through = latents + (codes - latents).detach()
        return Quantized(straight_through, nearest.view(batch, height, width), commitment)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> None:
        """Start the codebook by k-means on encoder outputs (B, D, H, W) of all processes."""
        vectors = all_gather_rows(latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim))
        centres, counts = kmeans(vectors, self.num_embeddings, self.seed)
        # A code that holds few vectors of one batch is not dead yet: it starts at half the mean use or more.
        self.mean_count.copy_(counts.clamp_min(0.5 * len(vectors) / self.num_embeddings))
        self.codebook.copy_(centres)
        self.mean_sum.copy_(centres * self.mean_count[:, None])

    @torch.no_grad()
    def update(self, step: int) -> torch.Tensor:
        """Move the codebook by what `forward` collected since the last call, in all processes.

        Returns:
            float (K,): how often each code was used since the last call, summed over the processes.
        """
        statistics = all_reduce_sum(torch.cat((self.new_count[:, None], self.new_sum), dim=1))
        counts, sums = statistics[:, 0].clone(), statistics[:, 1:]
        self.mean_count.lerp_(counts, 1 - self.decay)
        self.mean_sum.lerp_(sums, 1 - self.decay)
        self._revive(step)
        self.codebook.copy_(self.mean_sum / self.mean_count.clamp_min(1e-8)[:, None])
        self.new_count.zero_()
        self.new_sum.zero_()
        return counts

    def _revive(self, step: int) -> None:
        mean = self.mean_count.mean()
        dead = (self.mean_count < self.revive_below * mean).nonzero()[:, 0]
        if len(dead) == 0 or self._recent is None:
            return
        # Rows are picked from the joint batch of all processes; each fills in its own and the sum completes them.
        mine = len(self._recent)
        picks = integers(self.seed, Stream.CODEBOOK, dead + self.num_embeddings * (step + 1), mine * process_count())
        local = picks - mine * process_index()
        here = (local >= 0) & (local < mine)
        vectors = torch.where(here[:, None], self._recent[local.clamp(0, mine - 1)], 0.0)
        all_reduce_sum(vectors)
        self.mean_count[dead] = mean
        self.mean_sum[dead] = vectors * mean


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the code distribution: K when all codes are used alike, 1 when one is.

    Args:
        counts: (K,), how often each code was used.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp())
