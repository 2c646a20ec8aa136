"""Vector quantization: latents -> quantized latents, indices, losses; and the counts of use at every update.

Three ways to a table of codes, one interface (`Quantizer`). EMACodebook moves each code by averages of the encoder
outputs that chose it, SimVQ learns one affine map of a frozen table, FSQ's table is a fixed grid. An output always
goes to the nearest row of `table()`, which is all that the export to a stock VQModel needs. All statistics are summed
over the processes, so that every process holds the same table, and the same as a single process with the joint
batch would.
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
from latent_ddpm.training.distributed import all_gather_rows, all_reduce_sum, process_count, process_index

VECTORS_PER_CODE = 16  # that k-means starts from when the codes enter a network that has learned
_MAX_DISTANCES = 2**25  # elements of one block of the distance matrix: 128 MiB


class Quantized(NamedTuple):
    """What a quantizer returns.

    latents: (B, D, H, W) float32, the codes, with an estimated gradient to the encoder.
    indices: (B, H, W) int64; None of `unquantized`.
    commitment_loss: scalar, mean squared distance of encoder outputs to their codes, which pulls the outputs
        (arXiv 1711.00937, eq. 3, third term).
    codebook_loss: what else the table asks for: of SimVQ the same distance, but pulling the codes (second term); of
        FSQ the pull towards codes that are used too little.
    """

    latents: torch.Tensor
    indices: torch.Tensor | None
    commitment_loss: torch.Tensor
    codebook_loss: torch.Tensor

    def loss(self, config: AutoencoderConfig) -> torch.Tensor:
        """What is minimized of it; scalar."""
        return config.commitment_weight * self.commitment_loss + self.codebook_loss

    def figures(self) -> dict[str, torch.Tensor]:
        """What the log shows of it; scalars."""
        return {"commitment_loss": self.commitment_loss}


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


def joint_moments(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean (D,), Cholesky factor (D, D) of the covariance, both float64, and number of the vectors in latents
    (B, D, H, W) of all processes."""
    vectors = all_gather_rows(latents.double().permute(0, 2, 3, 1).flatten(0, 2))
    mean = vectors.mean(0)
    covariance = (vectors - mean).T @ (vectors - mean) / len(vectors)
    floor = 1e-6 * covariance.diagonal().mean() + 1e-8
    return mean, torch.linalg.cholesky(covariance + floor * torch.eye(len(mean)).to(mean)), len(vectors)


def decoder_metric(
    encode: Callable[[torch.Tensor], torch.Tensor], decode: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The affine map of latents after which a step of one length, in any direction, changes the image alike.

    A step dz at one position changes the squared error of the image by dz^T G dz, where G is the mean of J^T J over
    positions and J the decoder's Jacobian, taken by finite differences. The map is G^(1/2), scaled so that latents
    have unit variance on average over the channels, around their mean.

    Args:
        encode: images (B, C, R, R) -> latents (B, D, h, w).
        decode: its inverse, or nearly.
        images: of this process; the result is that of all processes' together.

    Returns:
        A matrix (D, D) and, to be added after it, a vector (D,), float64.
    """
    latents = encode(images).float()
    width, side = latents.shape[1], latents.shape[2]
    mean, factor, _ = joint_moments(latents)
    step = 0.3 * float((factor @ factor.T).diagonal().mean().sqrt())
    here = torch.zeros_like(latents[:1, :1])  # far enough apart that what they change hardly overlaps
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
    """Encoder outputs (B, D, H, W) that go past a quantizer, whose parameters then have the gradient 0."""
    nothing = sum((p.sum() * 0 for p in quantizer.parameters()), latents.new_zeros(()))
    return Quantized(latents.float(), None, nothing.detach(), nothing)


def straight_through(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes, whose gradient goes to the vectors unchanged (arXiv 1711.00937, section 3.2); (N, D) each."""
    return vectors + (codes - vectors).detach()


def rotation_trick(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The codes as a rotation and scaling of the vectors, both held constant (arXiv 2410.06424, section 4.2).

    The gradient turns with the code: directions that the loss wants of the code become the same directions as seen
    from the vector. (N, D) each.
    """
    codes = codes.detach()
    with torch.no_grad():
        fixed = vectors.detach()
        length, code_length = (x.norm(dim=1, keepdim=True).clamp_min(1e-6) for x in (fixed, codes))
        unit, code_unit = fixed / length, codes / code_length
        # The reflection is undefined where a code is opposite to its vector. Then, as near the origin, any direction
        # will do: normalize leaves the sum small instead of dividing by zero.
        middle = F.normalize(unit + code_unit, dim=1, eps=1e-6)
        scale = code_length / length
    rotated = (
        vectors
        - 2 * (vectors * middle).sum(1, keepdim=True) * middle
        + 2 * (vectors * unit).sum(1, keepdim=True) * code_unit
    )
    result = scale * rotated
    return result + (codes - result).detach()  # exactly the code, also where floats round


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation_trick}


class Quantizer(nn.Module, ABC):
    """What the quantizers share: the nearest row of a table, gradients past it, and counts of use.

    `forward` only assigns and collects statistics; `update`, called once per optimizer step, moves the table.

    Args:
        num_embeddings: K, the number of codes.
        embedding_dim: D, the width of a code.
        estimator: how the gradient passes the choice of a code, a key of ESTIMATORS.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, estimator: str = "straight_through") -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.estimator = ESTIMATORS[estimator]
        self.register_buffer("new_count", torch.zeros(num_embeddings), persistent=False)
        self._recent: torch.Tensor | None = None  # (N, D), the last encoder outputs: candidates for revival

    @abstractmethod
    def table(self) -> torch.Tensor:
        """The codes, float32 (K, D)."""

    def forward(self, latents: torch.Tensor, numbers: torch.Tensor | None = None) -> Quantized:
        """Quantize encoder outputs (B, D, H, W); in training mode also collect statistics for `update`.

        The example numbers (B,) are for KLPosterior's noise; they change nothing here.
        """
        with torch.autocast(latents.device.type, enabled=False):  # bf16 distances would pick wrong codes
            batch, _, height, width = latents.shape
            vectors = latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim)  # (N, D)
            table = self.table()
            nearest = nearest_code(vectors.detach(), table.detach())
            codes = table[nearest]
            if self.training:
                self.new_count += torch.bincount(nearest, minlength=self.num_embeddings)
                self._recent = vectors.detach()
                self._collect(self._recent, nearest)
            commitment = (vectors - codes.detach()).pow(2).mean()
            codebook = self._codebook_loss(vectors, codes)
            passed = self.estimator(vectors, codes.detach()).view(batch, height, width, -1).permute(0, 3, 1, 2)
        return Quantized(passed, nearest.view(batch, height, width), commitment, codebook)

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Fit the table to encoder outputs (B, D, H, W) of all processes, before the first step.

        Returns:
            Where the table cannot move, what the outputs have to go through instead: a matrix (D, D) and, to be added
            after it, a vector (D,).
        """

    @torch.no_grad()
    def update(self, step: int, kept: torch.Tensor | None = None) -> torch.Tensor:
        """Move the table by what `forward` collected since the last call, in all processes.

        Args:
            step: counted from 0; with the seed it determines which encoder outputs revive codes.
            kept: a bool scalar; where it is false, what was collected is dropped and nothing moves.

        Returns:
            float (K,): how often each code was used since the last call, summed over the processes.
        """
        counts = all_reduce_sum(self.new_count.clone())
        self.new_count.zero_()
        if kept is None:
            kept = torch.ones((), dtype=torch.bool, device=counts.device)
        counts = torch.where(kept, counts, 0.0)
        self._move(counts, step, kept)
        return counts

    def _codebook_loss(self, vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=vectors.device)

    def _collect(self, vectors: torch.Tensor, nearest: torch.Tensor) -> None:
        pass

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        pass


class RevivingQuantizer(Quantizer):
    """A quantizer that sees which codes fell out of use and finds encoder outputs to put them on.

    Args:
        num_embeddings, embedding_dim, estimator: see Quantizer.
        decay: of the moving averages, per step.
        revive_below: a code whose use falls below this share of the mean use is put on an encoder output; 0 never.
        seed: determines the start and which encoder outputs revive codes.
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

    def _revived(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in a step's counts; dead codes (M,), from now on of mean use, and an encoder output (M, D) for each.

        Rows are picked from the joint batch; each process fills in its own and the sum completes them.
        """
        self.mean_count.lerp_(counts, (1 - self.decay) * kept)
        mean = self.mean_count.mean()
        dead = (kept & (self.mean_count < self.revive_below * mean)).nonzero()[:, 0]
        if len(dead) == 0 or self._recent is None:
            return dead[:0], self.mean_count.new_zeros(0, self.embedding_dim)
        self.mean_count[dead] = mean
        mine = len(self._recent)
        picks = integers(self.seed, Stream.CODEBOOK, dead + self.num_embeddings * (step + 1), mine * process_count())
        local = picks - mine * process_index()
        here = (local >= 0) & (local < mine)
        return dead, all_reduce_sum(torch.where(here[:, None], self._recent[local.clamp(0, mine - 1)], 0.0))


class EMACodebook(RevivingQuantizer):
    """A codebook learned by moving averages, with k-means start and revival of dead codes.

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
        """Start the codebook by k-means on encoder outputs (B, D, H, W) of all processes."""
        vectors = all_gather_rows(latents.float().permute(0, 2, 3, 1).reshape(-1, self.embedding_dim))
        centres, counts = kmeans(vectors, self.num_embeddings, self.seed)
        # A code that holds few vectors of one batch is not dead yet: it starts at half the mean use or more.
        self.mean_count.copy_(counts.clamp_min(0.5 * len(vectors) / self.num_embeddings))
        self.codebook.copy_(centres)
        self.mean_sum.copy_(centres * self.mean_count[:, None])

    def _collect(self, vectors: torch.Tensor, nearest: torch.Tensor) -> None:
        self.new_sum.index_add_(0, nearest, vectors)

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        sums = torch.where(kept, all_reduce_sum(self.new_sum.clone()), 0.0)
        self.mean_sum.lerp_(sums, (1 - self.decay) * kept)
        self.new_sum.zero_()
        dead, outputs = self._revived(counts, step, kept)
        self.mean_sum[dead] = outputs * self.mean_count[dead, None]
        self.codebook.copy_(self.mean_sum / self.mean_count.clamp_min(1e-8)[:, None])


class SimVQ(RevivingQuantizer):
    """One learned affine map of a frozen table: all codes move together (Zhu et al., arXiv 2411.02038).

    The paper's map is linear. At the widths of image latents (3 or 4) an affine image of a
    Gaussian table does not cover what the encoder puts out, and codes outside it stay unused. So the map is started
    on the first batch's mean and covariance, and a dead code is put on an encoder output, as in EMACodebook, by
    changing its row of the otherwise frozen table.

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
        """Give the table the mean and covariance of encoder outputs (B, D, H, W) of all processes."""
        mean, factor, count = joint_moments(latents)
        self.map.weight.copy_(factor)
        self.map.bias.copy_(mean)
        self.mean_count.fill_(count / self.num_embeddings)

    def _move(self, counts: torch.Tensor, step: int, kept: torch.Tensor) -> None:
        dead, outputs = self._revived(counts, step, kept)
        if len(dead):
            inverse = torch.linalg.pinv(self.map.weight.double()).to(outputs)
            self.basis[dead] = (outputs - self.map.bias) @ inverse.T


class FSQ(Quantizer):
    """Finite scalar quantization (Mentzer et al., arXiv 2309.15505): a fixed grid, the product of scalar ones.

    The paper squashes an encoder output with tanh and rounds it. The same choice is made here without the squashing,
    by a grid whose values lie where the encoder's outputs lie and are spaced so that the midpoints between neighbours
    are exactly the outputs at which the paper's rounding tips over. The grid then is a table like any other, its
    nearest row is FSQ's choice, and a stock VQModel holds it. The index of a code is that of `levels` read as a
    mixed-radix number, the first level fastest, as in the paper's code.

    A grid cannot be moved to where the outputs are, so a loss of our own moves outputs to where codes lie idle.

    Args:
        levels: values per channel; their number is the width of a code, their product the number of codes.
        estimator: see Quantizer.
        balance: weight of the loss that evens out the use of codes, see `balance_loss`.
        decay: of the moving average of use, per step.
    """

    def __init__(
        self, levels: Sequence[int], estimator: str = "straight_through", balance: float = 0.0, decay: float = 0.99
    ) -> None:
        super().__init__(math.prod(levels), len(levels), estimator)
        self.levels, self.balance, self.decay = tuple(levels), balance, decay
        self.register_buffer("mean_count", torch.ones(self.num_embeddings))  # moving average of uses per step
        grids = torch.meshgrid(*[fsq_values(count) for count in reversed(self.levels)], indexing="ij")
        self.register_buffer("grid", torch.stack([grid.flatten() for grid in reversed(grids)], dim=1))

    def table(self) -> torch.Tensor:
        return self.grid

    @torch.no_grad()
    def initialize(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring encoder outputs (B, D, H, W) of all processes to the mean and covariance of the grid.

        Not in the paper. At random weights the outputs are so small that they meet a few inner points of the grid
        only, and the straight-through gradient has little that would spread them.
        """
        mean, factor, count = joint_moments(latents)
        spread = self.grid.double().std(0, correction=0)
        matrix = spread[:, None] * torch.linalg.inv(factor)
        self.mean_count.fill_(count / self.num_embeddings)
        return matrix.to(self.grid), (self.grid.double().mean(0) - matrix @ mean).to(self.grid)

    def balance_loss(self, vectors: torch.Tensor) -> torch.Tensor:
        """How much more than evenly used the codes around encoder outputs (N, D) are: mean of log(use / mean use).

        Each output belongs to the codes around it by shares that fall off as a Gaussian, whose deviation is half the
        channel's spacing. The logarithm is constant: the gradient moves outputs from codes in much use to codes in
        little, as that of the averaged code distribution's entropy would. It is cut off at a hundredth of the mean.
        """
        use = self.mean_count / self.mean_count.mean()
        value = use.clamp_min(0.01).log()[None]  # (N or 1, codes of the channels that are left)
        for channel, levels in enumerate(self.levels):  # the first is the fastest
            values = fsq_values(levels).to(vectors)
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

    The paper's code rounds half * tanh(z + shift) - offset with half = 1.001 (levels - 1) / 2, and with offset 1/2 and
    shift = atanh(offset / half) for even levels, 0 for odd ones. It tips over from one value to the next at
    z_j = atanh((j - levels / 2 + 1) / half) - shift, j = 0 .. levels - 2. Here neighbours meet there halfway:
    t_j + t_(j+1) = 2 z_j, symmetric about -shift, which leaves one choice, the innermost value of even levels.
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
    """How many images have VECTORS_PER_CODE latents for each code."""
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
    """exp of the entropy of the code distribution: K when all codes are used alike, 1 when one is.

    Args:
        counts: (K,), how often each code was used.
    """
    share = counts.double() / counts.sum().clamp_min(1)
    return float(torch.special.entr(share).sum().exp())
