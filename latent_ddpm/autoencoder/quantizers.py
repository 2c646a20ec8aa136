"""Vector quantization: latents -> quantized latents, indices and losses; each update returns the code counts.

Three quantizers share one interface (`Quantizer`). EMACodebook moves each code to a moving average of the encoder
outputs assigned to it. SimVQ learns one affine map of a frozen table. FSQ's table is a fixed grid. An output is always
assigned to the nearest row of `table()`, so the export to a stock VQModel only needs that table. All statistics are
summed over the processes: every process holds the table that a single process with the joint batch would hold.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.random import Stream, integers, normal, uniform
from latent_ddpm.training.acceleration import in_any_order, reads_are_free
from latent_ddpm.training.distributed import all_gather_rows, all_reduce_sum, process_count, process_index

VECTORS_PER_CODE = 16  # for k-means, when the codebook enters a trained network
_FIXED_POINT = 2.0**32  # units per 1
_MAX_DISTANCES = 2**25  # elements per block of the distance matrix: 128 MiB


class Quantized(NamedTuple):
    """The output of a quantizer.

    latents: (B, D, H, W) float32, the codes, with an estimated gradient to the encoder.
    indices: (B, H, W) int64; None from `unquantized`.
    commitment_loss: scalar, see `commitment_loss` (arXiv 1711.00937, eq. 3, third term).
    codebook_loss: scalar, the loss of the table. SimVQ: the same distance, with a gradient to the codes (eq. 3, second
        term). FSQ: `balance_loss`, weighted. EMACodebook: 0.
    """

    latents: torch.Tensor
    indices: torch.Tensor | None
    commitment_loss: torch.Tensor
    codebook_loss: torch.Tensor

    def loss(self, config: AutoencoderConfig) -> torch.Tensor:
        """The weighted loss; scalar."""
        return config.commitment_weight * self.commitment_loss + self.codebook_loss

    def figures(self) -> dict[str, torch.Tensor]:
        """The metrics to log; scalars."""
        return {"commitment_loss": self.commitment_loss}


def nearest_code(vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code in Euclidean distance.

    Args:
        vectors: (N, D) float.
        codebook: (K, D) float.

    Returns:
        int64 (N,).
    """
    half_norm = codebook.pow(2).sum(1).mul(0.5)  # argmin |z - e|^2 = argmin |e|^2 / 2 - z.e
    blocks = vectors.split(max(1, _MAX_DISTANCES // len(codebook)))
    return torch.cat([torch.addmm(half_norm, block, codebook.t(), alpha=-1).argmin(1) for block in blocks])


def sum_by_code(nearest: torch.Tensor, values: torch.Tensor, codes: int) -> torch.Tensor:
    """Sums of the rows that belong to each code; the same bits in every run.

    A GPU adds in an order that changes from run to run; its sums with a fixed order took 5 % of a step. So it adds
    integers, in units of 2**-32, whose sum does not depend on the order. They cannot overflow while fewer than a
    million rows are below 2000.

    Args:
        nearest: int64 (N,), the code of each row.
        values: (N, D), float or int64.
        codes: K.

    Returns:
        float32 (K, D).
    """
    if reads_are_free(values):  # a CPU adds in order
        return torch.zeros(codes, values.shape[1]).index_add_(0, nearest, values.float())
    is_float = values.is_floating_point()
    whole = (values.double() * _FIXED_POINT).round().long() if is_float else values
    sums = torch.zeros(codes, values.shape[1], dtype=torch.int64, device=values.device)
    with in_any_order():
        sums.index_add_(0, nearest, whole)
    return (sums.double() / _FIXED_POINT).float() if is_float else sums.float()


def kmeans(vectors: torch.Tensor, clusters: int, seed: int, iterations: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm, initialized from random rows; an empty cluster restarts at a random row.

    Args:
        vectors: (N, D) float. If N < K, the rows are repeated with a little jitter.
        clusters: K.
        seed: random seed of the initialization and the restarts.
        iterations: number of Lloyd iterations.

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


def joint_moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Statistics of the vectors in latents (B, D, H, W) of all processes.

    Returns:
        Mean (D,) and Cholesky factor (D, D) of the covariance, both float64, and the number of vectors.
    """
    vectors = all_gather_rows(latents.double().permute(0, 2, 3, 1).flatten(0, 2))
    mean = vectors.mean(0)
    covariance = (vectors - mean).T @ (vectors - mean) / len(vectors)
    floor = 1e-6 * covariance.diagonal().mean() + 1e-8
    return mean, torch.linalg.cholesky(covariance + floor * torch.eye(len(mean)).to(mean)), len(vectors)


def decoder_metric(
    encode: Callable[[torch.Tensor], torch.Tensor], decode: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map of latents after which steps of equal length change the image equally, in every direction.

    A step dz at one position changes the squared error of the image by dz^T G dz. Here G is the mean of J^T J over
    positions, and J is the decoder's Jacobian, computed by finite differences. The map is G^(1/2) around the mean,
    scaled so that the latents have unit variance on average over the channels.

    Args:
        encode: images (B, C, R, R) -> latents (B, D, h, w).
        decode: the (approximate) inverse of `encode`.
        images: images of this process; the result covers the images of all processes.

    Returns:
        A matrix (D, D) and a vector (D,), float64: latents map to matrix @ latents + vector.
    """
    latents = encode(images).float()
    width, side = latents.shape[1], latents.shape[2]
    mean, factor, _ = joint_moments(latents)
    step = 0.3 * float((factor @ factor.T).diagonal().mean().sqrt())
    here = torch.zeros_like(latents[:1, :1])  # every 4th position, so that their effects on the image hardly overlap
    here[..., min(1, side - 1) :: 4, min(1, side - 1) :: 4] = step
    gram, positions = latents.new_zeros(width, width, dtype=torch.float64), int((here > 0).sum()) * len(images)
    for part in latents.split(32):
        base = decode(part)
        moved = []
        for channel in range(width):
            offset = torch.zeros_like(part)
            offset[:, channel : channel + 1] = here
            moved.append((decode(part + offset) - base).flatten().double() / step)
        gram += torch.stack(moved) @ torch.stack(moved).T
    joint = all_reduce_sum(torch.cat((gram.flatten(), gram.new_tensor([positions]))))
    values, vectors = torch.linalg.eigh(joint[:-1].view(width, width) / joint[-1])
    matrix = vectors @ (values.clamp_min(1e-6 * values.max()).sqrt()[:, None] * vectors.T)
    matrix = matrix / (matrix @ factor).pow(2).sum(1).mean().sqrt()
    return matrix, -matrix @ mean


def unquantized(latents: torch.Tensor, quantizer: nn.Module) -> Quantized:
    """Encoder outputs (B, D, H, W) that bypass the quantizer. The quantizer's parameters get zero gradients."""
    nothing = sum((p.sum() * 0 for p in quantizer.parameters()), latents.new_zeros(()))
    return Quantized(latents.float(), None, nothing.detach(), nothing)


def commitment_loss(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Commitment loss (van den Oord et al., arXiv 1711.00937, eq. 3, third term, without its weight beta).

    The mean squared difference of encoder outputs and their codes. Its gradient reaches the encoder only.

    Args:
        vectors: encoder outputs (N, D), float.
        codes: the code of each, (N, D), float.

    Returns:
        scalar.
    """
    return (vectors - codes.detach()).pow(2).mean()


def straight_through(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes; their gradient is copied to the vectors (arXiv 1711.00937, section 3.2). All are (N, D)."""
    return vectors + (codes - vectors).detach()


def rotation_trick(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes as a rotation and scaling of the vectors, both constant in the backward pass (arXiv 2410.06424, 4.2).

    The gradient is rotated with the code: it keeps its direction relative to the vector. All are (N, D).
    """
    codes = codes.detach()
    with torch.no_grad():
        fixed = vectors.detach()
        length, code_length = (x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in (fixed, codes))
        unit, code_unit = fixed / length, codes / code_length
        # The reflection is undefined if a code is opposite to its vector. Any direction works there, as near the
        # origin: normalize keeps the sum small instead of dividing by zero.
        middle = F.normalize(unit + code_unit, dim=1, eps=1e-6)
        scale = code_length / length
    rotated = (
        vectors
        - 2 * (vectors * middle).sum(1, keepdim=True) * middle
        + 2 * (vectors * unit).sum(1, keepdim=True) * code_unit
    )
    result = scale * rotated
    return result + (codes - result).detach()  # exactly the code, despite rounding


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation_trick}


class Quantizer(nn.Module, ABC):
    """Base class of the quantizers: nearest row of a table, gradient estimator, and code counts.

    `forward` only assigns and collects statistics. `update`, called once per optimizer step, changes the table.

    Args:
        num_embeddings: K, number of codes.
        embedding_dim: D, dimension of a code.
        estimator: gradient estimator, a key of ESTIMATORS.

    Attributes:
        is_fixed: if true, `update` leaves the table as it is.
    """

    is_fixed = False

    def __init__(self, num_embeddings: int, embedding_dim: int, estimator: str = "straight_through") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.estimator = ESTIMATORS[estimator]
        self.register_buffer("new_count", torch.zeros(num_embeddings), persistent=False)
        self._recent: torch.Tensor | None = None  # (N, D), the latest encoder outputs, candidates for revival

    @abstractmethod
    def table(self) -> torch.Tensor:
        """The codes, float32 (K, D)."""

    def forward(self, latents: torch.Tensor, numbers: torch.Tensor | None = None) -> Quantized:
        """Quantize encoder outputs (B, D, H, W); in training mode also collect statistics for `update`.

        The example numbers (B,) are unused; KLPosterior, which shares the signature, needs them.
        """
        with torch.autocast(latents.device.type, enabled=False):  # bf16 distances would select wrong codes
            batch, _, height, width = latents.shape
            vectors = latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim)  # (N, D)
            table = self.table()
            nearest = nearest_code(vectors.detach(), table.detach())
            codes = table[nearest]
            if self.training:
                self.new_count += sum_by_code(nearest, torch.ones_like(nearest)[:, None], self.num_embeddings)[:, 0]
                self._recent = vectors.detach()
                self._collect(self._recent, nearest)
            commitment = commitment_loss(vectors, codes)
            codebook = self._codebook_loss(vectors, codes)
            passed = self.estimator(vectors, codes.detach()).view(batch, height, width, -1).permute(0, 3, 1, 2)
        return Quantized(passed, nearest.view(batch, height, width), commitment, codebook)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Fit the table to encoder outputs (B, D, H, W) of all processes, before the first step.

        Returns:
            None, or for a fixed table the affine map to apply to the outputs instead: a matrix (D, D) and a vector (D,)
            to add after it.
        """

    @torch.no_grad()
    def update(self, step: int, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Update the table with the statistics that `forward` collected since the last call, in all processes.

        Args:
            step: optimizer step, from 0; with the seed it determines which encoder outputs revive codes.
            kept: a bool scalar; if false, the statistics are discarded and the table stays unchanged.

        Returns:
            float (K,): uses of each code since the last call, summed over the processes.
        """
        counts = all_reduce_sum(self.new_count.clone())
        self.new_count.zero_()
        if kept is None:
            kept = torch.ones((), dtype=torch.bool, device=counts.device)
        counts = torch.where(kept, counts, 0.0)
        if not self.is_fixed:
            self._move(counts, step, kept)
        return counts

    def _codebook_loss(self, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=vectors.device)

    def _collect(self, vectors: torch.Tensor, nearest: torch.Tensor) -> None:
        pass

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        pass


class RevivingQuantizer(Quantizer):
    """A quantizer that detects unused codes and selects encoder outputs to replace them.

    Args:
        num_embeddings, embedding_dim, estimator: see Quantizer.
        decay: decay of the moving averages, per step.
        revive_below: a code whose use falls below this share of the mean use moves to an encoder output; 0 disables it.
        seed: random seed of the initialization and of the outputs that revive codes.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        decay: float = 0.99,
        revive_below: float = 0.05,
        seed: int = 0,
        estimator: str = "straight_through",
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, estimator)
        self.decay, self.revive_below, self.seed = decay, revive_below, seed
        self.register_buffer("mean_count", torch.ones(num_embeddings))  # moving average of uses per step

    def _revived(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Update the moving average with a step's counts and find the dead codes.

        The outputs come from the joint batch: each process fills in its own rows, and the sum completes them.

        Returns:
            Which codes are dead, bool (K,), whose use is reset to the mean, and an encoder output (K, D) for each code.
            None if there are no outputs. On the CPU also if no code is dead: on a GPU, looking would synchronize.
        """
        self.mean_count.lerp_(counts, (1 - self.decay) * kept)
        mean = self.mean_count.mean()
        dead = kept & (self.mean_count < self.revive_below * mean)
        if self._recent is None or (reads_are_free(dead) and not dead.any()):
            return None
        self.mean_count.copy_(torch.where(dead, mean, self.mean_count))
        mine = len(self._recent)
        codes = torch.arange(self.num_embeddings, device=dead.device)
        picks = integers(self.seed, Stream.CODEBOOK, codes + self.num_embeddings * (step + 1), mine * process_count())
        local = picks - mine * process_index()
        here = (local >= 0) & (local < mine)
        return dead, all_reduce_sum(torch.where(here[:, None], self._recent[local.clamp(0, mine - 1)], 0.0))


class EMACodebook(RevivingQuantizer):
    """A codebook learned by moving averages, with k-means initialization and revival of dead codes.

    van den Oord et al., arXiv 1711.00937, appendix A.1, and Razavi et al., arXiv 1906.00446.

    Arguments as for RevivingQuantizer.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *options: Any, **named: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *options, **named)
        self.register_buffer("codebook", torch.randn(num_embeddings, embedding_dim))
        self.register_buffer("mean_sum", self.codebook.clone())  # moving average of summed encoder outputs
        self.register_buffer("new_sum", torch.zeros(num_embeddings, embedding_dim), persistent=False)

    def table(self) -> torch.Tensor:
        return self.codebook

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> None:
        """Initialize the codebook by k-means on encoder outputs (B, D, H, W) of all processes."""
        vectors = all_gather_rows(latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim))
        centres, counts = kmeans(vectors, self.num_embeddings, self.seed)
        # A code with few vectors in one batch is not dead yet: it starts with at least half the mean use.
        self.mean_count.copy_(counts.clamp_min(0.5 * len(vectors) / self.num_embeddings))
        self.codebook.copy_(centres)
        self.mean_sum.copy_(centres * self.mean_count[:, None])

    @torch.no_grad()
    def set_table(self, codes: torch.Tensor) -> None:
        """Take codes (K, D) as they are; `count_uses` then says how much each is used."""
        self.codebook.copy_(codes)
        self.mean_sum.copy_(codes * self.mean_count[:, None])

    @torch.no_grad()
    def count_uses(self, latents: torch.Tensor) -> None:
        """Set the averages by the uses of the present codes in encoder outputs (B, D, H, W) of all processes.

        A code that they do not use starts with half the mean use, so it has time to be used.
        """
        vectors = latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim)
        nearest = nearest_code(vectors, self.codebook)
        ones = torch.ones_like(nearest)[:, None]
        counts = all_reduce_sum(sum_by_code(nearest, ones, self.num_embeddings)[:, 0].to(self.mean_count))
        self.mean_count.copy_(counts.clamp_min(0.5 * counts.sum() / self.num_embeddings))
        self.mean_sum.copy_(self.codebook * self.mean_count[:, None])

    def _collect(self, vectors: torch.Tensor, nearest: torch.Tensor) -> None:
        self.new_sum += sum_by_code(nearest, vectors, self.num_embeddings)

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        sums = torch.where(kept, all_reduce_sum(self.new_sum.clone()), 0.0)
        self.mean_sum.lerp_(sums, (1 - self.decay) * kept)
        self.new_sum.zero_()
        if (revived := self._revived(counts, step, kept)) is not None:
            dead, outputs = revived
            self.mean_sum.copy_(torch.where(dead[:, None], outputs * self.mean_count[:, None], self.mean_sum))
        self.codebook.copy_(self.mean_sum / self.mean_count.clamp_min(1e-8)[:, None])


class SimVQ(RevivingQuantizer):
    """One learned affine map of a frozen table: all codes move together (Zhu et al., arXiv 2411.02038).

    The paper's map is linear. With the 3 or 4 channels of image latents, an affine image of a Gaussian table does not
    match the distribution of the encoder outputs, and codes outside it stay unused. So the map is initialized with the
    first batch's mean and covariance. A dead code moves to an encoder output, as in EMACodebook, by a change of its row
    in the otherwise frozen table.

    Arguments as for RevivingQuantizer.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *options: Any, **named: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, *options, **named)
        rows = torch.arange(num_embeddings)
        self.register_buffer("basis", normal(self.seed, Stream.CODEBOOK, rows, (embedding_dim,)))
        self.map = nn.Linear(embedding_dim, embedding_dim)

    def table(self) -> torch.Tensor:
        return self.map(self.basis)

    def _codebook_loss(self, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return (vectors.detach() - codes).pow(2).mean()

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> None:
        """Match the table's mean and covariance to encoder outputs (B, D, H, W) of all processes."""
        mean, factor, count = joint_moments(latents)
        self.map.weight.copy_(factor)
        self.map.bias.copy_(mean)
        self.mean_count.fill_(count / self.num_embeddings)

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        if (revived := self._revived(counts, step, kept)) is not None:
            dead, outputs = revived
            inverse = torch.linalg.inv_ex(self.map.weight.double()).inverse.to(outputs)  # inv would synchronize
            moved = (outputs - self.map.bias) @ inverse.T
            self.basis.copy_(torch.where(dead[:, None] & moved.isfinite(), moved, self.basis))


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a fixed grid, the product of scalar grids.

    The paper squashes an encoder output with tanh and rounds it. This grid makes the same choice without tanh: the
    midpoints between neighbouring values are exactly the outputs at which the paper's rounding changes. So the nearest
    row of the grid is FSQ's code, and a stock VQModel can hold the grid as its table. The index of a code is a
    mixed-radix number of its levels, the first level fastest, as in the paper's code.

    The grid cannot move to the outputs. A loss of our own, `balance_loss`, moves outputs to unused codes.

    Args:
        levels: values per channel; their number is the dimension of a code, their product the number of codes.
        estimator: see Quantizer.
        balance: weight of `balance_loss`.
        decay: decay of the moving average of use, per step.
    """

    def __init__(
        self, levels: Sequence[int], estimator: str = "straight_through", balance: float = 0.0, decay: float = 0.99
    ) -> None:
        super().__init__(math.prod(levels), len(levels), estimator)
        self.levels, self.balance, self.decay = tuple(levels), balance, decay
        self.register_buffer("mean_count", torch.ones(self.num_embeddings))  # moving average of uses per step
        grids = torch.meshgrid(*[fsq_values(count) for count in reversed(self.levels)], indexing="ij")
        self.register_buffer("grid", torch.stack([grid.flatten() for grid in reversed(grids)], dim=1))
        self.register_buffer("values", torch.cat([fsq_values(count) for count in self.levels]), persistent=False)

    def table(self) -> torch.Tensor:
        return self.grid

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The affine map of encoder outputs (B, D, H, W) of all processes to the mean and covariance of the grid.

        Not in the paper. With random weights, the outputs are so small that they only reach a few inner points of the
        grid, and the straight-through gradient hardly spreads them.
        """
        mean, factor, count = joint_moments(latents)
        spread = self.grid.double().std(0, correction=0)
        matrix = spread[:, None] * torch.linalg.inv(factor)
        self.mean_count.fill_(count / self.num_embeddings)
        return matrix.to(self.grid), (self.grid.double().mean(0) - matrix @ mean).to(self.grid)

    def balance_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        """Mean of log(use / mean use) over the codes around encoder outputs (N, D); scalar.

        Each output is shared among the codes around it by Gaussian weights, with a standard deviation of half the
        channel's spacing. The logarithm is constant in the backward pass: the gradient moves outputs from frequently to
        rarely used codes, like the gradient of the entropy of the average code distribution. use / mean use is clamped
        to at least 0.01.
        """
        use = self.mean_count / self.mean_count.mean()
        value = use.clamp_min(0.01).log()[None]  # (N or 1, codes of the remaining channels)
        per_channel = zip(self.levels, self.values.split(self.levels), strict=True)
        for channel, (levels, values) in enumerate(per_channel):  # the first varies fastest
            deviation = 0.5 * (values[-1] - values[0]) / (levels - 1)
            shares = (-0.5 * ((vectors[:, channel, None] - values) / deviation).pow(2)).softmax(1)  # (N, levels)
            value = torch.einsum("nkl,nl->nk", value.view(len(value), -1, levels).expand(len(shares), -1, -1), shares)
        return value.mean()

    def _codebook_loss(self, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return self.balance * self.balance_loss(vectors) if self.balance else super()._codebook_loss(vectors, codes)

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        self.mean_count.lerp_(counts, (1 - self.decay) * kept)


def fsq_values(levels: int) -> torch.Tensor:
    """The values of one channel of FSQ's table, ascending, float32 (levels,).

    The paper's code rounds half * tanh(z + shift) - offset, where half = 1.001 (levels - 1) / 2. For even levels,
    offset is 1/2 and shift is atanh(offset / half); for odd levels both are 0. The rounded value changes at
    z_j = atanh((j - levels / 2 + 1) / half) - shift, j = 0 .. levels - 2. Here these are the midpoints of neighbouring
    values: t_j + t_(j+1) = 2 z_j, symmetric about -shift. One choice remains, the innermost value of even levels.
    """
    half = 1.001 * (levels - 1) / 2
    even = levels % 2 == 0
    shift = math.atanh(0.5 / half) if even else 0.0
    tips = [math.atanh((j + 1 - levels / 2) / half) for j in range(levels // 2, levels - 1)]  # above the middle
    positive = [0.0 if not even else (tips[0] / 2 if tips else 0.5)]
    for tip in tips:
        positive.append(2 * tip - positive[-1])
    negative = [-value for value in reversed(positive if even else positive[1:])]
    return torch.tensor(negative + positive) - shift


def images_for_codes(config: AutoencoderConfig) -> int:
    """Number of images that give VECTORS_PER_CODE latent vectors per code."""
    positions = (config.resolution // 2 ** (len(config.block_out_channels) - 1)) ** 2
    return -(-VECTORS_PER_CODE * config.num_vq_embeddings // positions)


def make_quantizer(config: AutoencoderConfig) -> Quantizer:
    """The quantizer that `config.quantizer` names."""
    if config.quantizer == "fsq":
        return FSQ(config.fsq_levels, config.gradient_estimator, config.fsq_balance_weight, config.codebook_decay)
    kind = {"ema": EMACodebook, "simvq": SimVQ}[config.quantizer]
    return kind(
        config.num_vq_embeddings,
        config.latent_channels,
        config.codebook_decay,
        config.codebook_revive_below,
        config.seed,
        config.gradient_estimator,
    )


def perplexity(counts: torch.Tensor) -> float:
    """exp of the entropy of the code distribution: K if all codes are used equally, 1 if only one is used.

    Args:
        counts: (K,), uses of each code.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp())
