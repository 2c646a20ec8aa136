"""Philox4x32-10 (Salmon et al., SC 2011) as one GPU kernel: the bits of `random.philox4x32` in one launch, not 140."""

import torch
import triton
import triton.language as tl

_LANES = 256  # counters per program


@triton.jit
def _philox(numbers, words, counters, blocks, stream, k0, k1, LANES: tl.constexpr):  # noqa: ANN001, ANN202
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = lane < counters
    number = tl.load(numbers + lane // blocks, mask=inside, other=0)
    c0 = (lane % blocks).to(tl.uint32)
    c1 = (number & 0xFFFFFFFF).to(tl.uint32)
    c2 = ((number >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = tl.full((LANES,), stream, tl.uint32)
    key0 = tl.full((LANES,), k0, tl.uint32)
    key1 = tl.full((LANES,), k1, tl.uint32)
    m0 = tl.full((LANES,), 0xD2511F53, tl.uint32)
    m1 = tl.full((LANES,), 0xCD9E8D57, tl.uint32)
    w0 = tl.full((LANES,), 0x9E3779B9, tl.uint32)
    w1 = tl.full((LANES,), 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        low0, low1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = key0 + w0, key1 + w1
    tl.store(words + 4 * lane, c0.to(tl.int64), mask=inside)
    tl.store(words + 4 * lane + 1, c1.to(tl.int64), mask=inside)
    tl.store(words + 4 * lane + 2, c2.to(tl.int64), mask=inside)
    tl.store(words + 4 * lane + 3, c3.to(tl.int64), mask=inside)


def philox_words(seed: int, stream: int, numbers: torch.Tensor, blocks: int) -> torch.Tensor:
    """The words of counters (block, number, stream) for every block below `blocks`.

    Args:
        seed: below 2**64.
        stream: of the draw.
        numbers: int64 (B,), on a GPU.
        blocks: counters per number.

    Returns:
        int64 (B, 4 * blocks), each value uniform in [0, 2**32).
    """
    numbers = numbers.to(torch.int64).contiguous()
    words = torch.empty((len(numbers), 4 * blocks), dtype=torch.int64, device=numbers.device)
    counters = len(numbers) * blocks
    grid = (triton.cdiv(counters, _LANES),)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    _philox[grid](numbers, words, counters, blocks, int(stream), low, high, LANES=_LANES)
    return words
