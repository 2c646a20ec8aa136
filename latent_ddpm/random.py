"""Counter-based random numbers: every draw is a function of (seed, stream, example number).

The generator has no state, so a run resumes at any step without replaying earlier draws, and any number of
processes draws the same numbers for the same examples. It is Philox4x32-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), written in int64 tensor operations
so that a whole batch is drawn at once on its device. On a GPU with Triton, one kernel computes the same bits.
"""

import enum
import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # Philox4x32 multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl constants that bump the key each round
_MASK = 0xFFFFFFFF
_MURMUR = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], dtype=np.uint64)  # multipliers of its 64-bit finalizer
_ROUNDS = 8
Word = TypeVar("Word", torch.Tensor, int)


class Stream(enum.IntEnum):
    """The purpose of a draw. Two streams never share a counter, so their draws are independent."""

    CROP = 1
    FLIP = 2
    NOISE = 3
    TIMESTEP = 4
    CODEBOOK = 5
    SAMPLE = 6
    ORDER = 7
    STEP = 8
    POSTERIOR = 9
    EQUIVARIANCE = 10
    LATENT_NOISE = 11
    DROP_CLASS = 12
    DROP_IMAGE = 13
    DROP_TEXT = 14
    CAPTION = 15
    FEW_STEP_NOISE = 16
    FEW_STEP_POSITION = 17
    FEW_STEP_TIME = 18
    FEW_STEP_COMPARISON = 19
    SWEEP = 20
    FEW_STEP_PATH = 21


def philox4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 of shape (..., 4), each value in [0, 2**32).
        key: two integers in [0, 2**32).

    Returns:
        int64 of shape (..., 4), each value uniform in [0, 2**32).
    """
    return torch.stack(_rounds(*counter.unbind(-1), *key), dim=-1)


def _rounds(c0: Word, c1: Word, c2: Word, c3: Word, k0: int, k1: int) -> tuple[Word, Word, Word, Word]:
    """The rounds on a counter's words: tensors, or Python integers, which are much faster for a single counter."""
    for _ in range(10):
        # int64 products wrap modulo 2**64; the mask removes the sign bits of the arithmetic shift.
        p0, p1 = c0 * _M0, c2 * _M1
        hi0, lo0 = (p0 >> 32) & _MASK, p0 & _MASK
        hi1, lo1 = (p1 >> 32) & _MASK, p1 & _MASK
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


@functools.cache
def has_triton() -> bool:
    """Whether GPU kernels can be compiled and run here; torch's packages for Windows have no Triton."""
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


def _words(seed: int, stream: Stream, numbers: torch.Tensor, count: int) -> torch.Tensor:
    """`count` words for each of the example `numbers` (B,): int64 (B, count) in [0, 2**32)."""
    blocks = -(-count // 4)
    if numbers.is_cuda and has_triton():
        from latent_ddpm.philox_kernel import philox_words

        return philox_words(seed, int(stream), numbers, blocks)[:, :count]
    n = numbers.to(torch.int64)
    counter = torch.empty((len(n), blocks, 4), dtype=torch.int64, device=n.device)
    counter[..., 0] = torch.arange(blocks, device=n.device)
    counter[..., 1] = (n & _MASK)[:, None]
    counter[..., 2] = ((n >> 32) & _MASK)[:, None]
    counter[..., 3] = int(stream)
    return philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)).flatten(1)[:, :count]


def first_words(seed: int, stream: Stream, number: int) -> tuple[int, int, int, int]:
    """The first four words of one example number, in [0, 2**32), as the tensors of `uniform` are made of."""
    counter = (0, number & _MASK, (number >> 32) & _MASK, int(stream))
    return _rounds(*counter, seed & _MASK, (seed >> 32) & _MASK)


def uniform(seed: int, stream: Stream, numbers: torch.Tensor, shape: Sequence[int] = ()) -> torch.Tensor:
    """Uniform draws in [0, 1).

    Args:
        seed: the run's seed, any non-negative integer below 2**64.
        stream: what the draw is for.
        numbers: int64 (B,), the example numbers.
        shape: the shape of one example's draw.

    Returns:
        float32 (B, *shape) on the device of `numbers`. Row i depends on (seed, stream, numbers[i]) only.
    """
    words = _words(seed, stream, numbers, math.prod(shape))
    return ((words >> 8).to(torch.float32) * 2.0**-24).view(len(numbers), *shape)  # 24 bits: exact in float32


def normal(seed: int, stream: Stream, numbers: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal draws by Box and Muller (1958); arguments and result as for `uniform`."""
    count = math.prod(shape)
    half = -(-count // 2)
    words = _words(seed, stream, numbers, 2 * half)
    u1 = (words[:, :half] + 1).to(torch.float64) * 2.0**-32  # (0, 1]: its logarithm is finite
    u2 = words[:, half:].to(torch.float64) * 2.0**-32
    radius, angle = (-2.0 * u1.log()).sqrt().float(), (2.0 * math.pi * u2).float()
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count].reshape(len(numbers), *shape)


def integers(seed: int, stream: Stream, numbers: torch.Tensor, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
    """Uniform integers in [0, high), int64 (B, *shape). The bias is below high / 2**32."""
    words = _words(seed, stream, numbers, math.prod(shape))
    return ((words * high) >> 32).view(len(numbers), *shape)  # high < 2**31 keeps the product below 2**63


def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `length` examples: int64 (length,)."""
    key = np.array([seed & (2**64 - 1), (int(Stream.ORDER) << 32) | epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(length)


def scattered(seed: int, epoch: int, length: int, positions: np.ndarray) -> np.ndarray:
    """As `permutation(seed, epoch, length)[positions]`, another order, without a table of it.

    A Feistel network (Luby and Rackoff, SIAM J. Comput. 17, 1988) over the next even number of bits, walked until it
    falls below `length` (Black and Rogaway, CT-RSA 2002). Its rounds mix as MurmurHash3 ends.

    Args:
        positions: int64 (B,) in [0, length).

    Returns:
        int64 (B,) in [0, length).
    """
    half = max(1, -(-(length - 1).bit_length() // 2))
    philox = np.random.Philox(key=np.array([seed & (2**64 - 1), (int(Stream.ORDER) << 32) | epoch], dtype=np.uint64))
    keys = philox.random_raw(_ROUNDS).astype(np.uint64)
    mask, shift = np.uint64(2**half - 1), np.uint64(half)
    out = np.asarray(positions).astype(np.uint64)
    outside = np.ones(len(out), dtype=bool)
    while outside.any():
        left, right = out[outside] >> shift, out[outside] & mask
        for key in keys:
            mixed = right ^ key
            for multiplier in _MURMUR:
                mixed = (mixed ^ (mixed >> np.uint64(33))) * multiplier
            left, right = right, left ^ ((mixed >> np.uint64(33)) & mask)
        out[outside] = (left << shift) | right
        outside = out >= length
    return out.astype(np.int64)


def seed_for_step(seed: int, step: int, process_index: int) -> int:
    """A 63-bit seed for torch's own generators at one step (dropout), from (seed, step, process) alone."""
    number = (process_index << 40) | step
    word, next_word, *_ = first_words(seed, Stream.STEP, number)
    return (word << 31) | (next_word >> 1)
