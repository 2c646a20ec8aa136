"""Exact copies, and near ones: candidates by a perceptual hash, then compared by their thumbnails.

Hashes of 64 bits that differ in few bits nearly agree in one of four bands of 16 bits: of d differing bits, some band
has at most d / 4 (the pigeonhole principle). So each hash is compared with those only that differ in at most one bit of
a band, which is one pair in a thousand. All pairs of up to 7 differing bits are found, and most of those with 8.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from latent_ddpm.data.inspection.table import Table
from latent_ddpm.progress import progress_bar

BITS = 8  # a pair is a candidate when its hashes differ in at most this many bits
BANDS = 4
MOST_ALIKE = 1024  # images with equal bits in a band that one image is compared with
# Candidates are near copies when their thumbnails differ by at most this share of their contrast (root mean square over
# standard deviation), or by 2 levels: JPEG's noise does not fall with the contrast. The same picture in JPEG quality 80
# or other sizes differs by 0.02 to 0.15 on CIFAR-10, two digits 1 of MNIST by 0.12 and more.
MOST_OF_CONTRAST, LEAST_LEVELS = 0.16, 2.0
LEAST_CONTRAST = 4.0  # levels: a nearly empty picture looks like every other one
MOST_PAIRS = 2_000_000  # that are kept: a film's frames all resemble each other
COMPARED = 20_000  # pairs whose thumbnails are compared at once
AT_ONCE = 2**22  # pairs whose hashes are compared at once


def count_bits(values: np.ndarray) -> np.ndarray:
    """The number of ones in each uint64: uint8, of the same shape."""
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(values)
    return _ONES[values.reshape(*values.shape, 1).view(np.uint16)].sum(axis=-1, dtype=np.uint8)


_ONES = np.array([bin(k).count("1") for k in range(2**16)], dtype=np.uint8)


def equal_rows(digests: np.ndarray, among: np.ndarray) -> list[np.ndarray]:
    """Groups of at least two equal digests.

    Args:
        digests: uint64 (N, 2).
        among: bool (N,), the rows that take part.

    Returns:
        int64 (K,) for each group, ascending; the groups in the order of their first rows.
    """
    rows = np.flatnonzero(among)
    order = rows[np.lexsort((rows, digests[rows, 1], digests[rows, 0]))]
    if len(order) < 2:
        return []
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    starts = np.concatenate(([0], np.flatnonzero(~same) + 1, [len(order)]))
    groups = [order[a:b] for a, b in itertools.pairwise(starts.tolist()) if b - a > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def near_pairs(table: Table, among: np.ndarray, mirrored: bool) -> np.ndarray:
    """Pairs of images that look alike: int64 (P, 2), each with the smaller index first, sorted.

    Args:
        table: of all images.
        among: int64 (M,), ascending: the images to compare.
        mirrored: whether one image of a pair is mirrored.
    """
    among = among[table["contrast"][among] >= LEAST_CONTRAST]
    hashes = table["hash"][among]
    others = table["mirrored"][among] if mirrored else hashes
    found, kept = [np.empty((0, 2), dtype=np.int64)], 0
    with progress_bar(total=len(among), desc="near copies", unit="image", leave=False) as bar:
        for done, first, second in similar_hashes(others, hashes):
            pairs = np.stack((among[first], among[second]), axis=1)
            for start in range(0, len(pairs), COMPARED):
                some = pairs[start : start + COMPARED]
                found.append(some[look_alike(table, some, mirrored)])
                kept += len(found[-1])
            bar.update(done - bar.n)
            if kept > MOST_PAIRS:
                break
    pairs = np.concatenate(found)
    return np.unique(pairs, axis=0)


def look_alike(table: Table, pairs: np.ndarray, mirrored: bool) -> np.ndarray:
    """Whether the thumbnails of each pair, int64 (P, 2), are nearly equal: bool (P,)."""
    first, second = (table["thumb"][pairs[:, k]].astype(np.int16) for k in (0, 1))  # (P, T, T, 3)
    if mirrored:
        first = first[:, :, ::-1]
    difference = np.sqrt(np.square(first - second, dtype=np.int32).mean(axis=(1, 2, 3)))
    contrast = table["contrast"][pairs].min(axis=1)
    return difference <= np.maximum(MOST_OF_CONTRAST * contrast, LEAST_LEVELS)


def similar_hashes(others: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Pairs i < j where others[i] and hashes[j] differ in at most BITS bits, some of them twice.

    Args:
        others, hashes: uint64 (N,).

    Yields:
        The number of images that were compared so far, on average; i and j, int64 (P,).
    """
    count, per_band = len(hashes), 64 // BANDS
    own, of_others = _bands(hashes), _bands(others)
    flips = [0, *(1 << bit for bit in range(per_band))]
    for band in range(BANDS):
        order = np.argsort(own[:, band], kind="stable")
        starts = np.searchsorted(own[order, band], np.arange(2**per_band + 1))
        for number, flip in enumerate(flips):
            done = count * (band * len(flips) + number + 1) // (BANDS * len(flips))
            key = of_others[:, band] ^ flip
            lengths = np.minimum(starts[key + 1] - starts[key], MOST_ALIKE)
            for part in np.array_split(np.arange(count), 1 + int(lengths.sum()) // AT_ONCE):
                first = np.repeat(part, lengths[part])
                inside = np.arange(len(first)) - np.repeat(np.cumsum(lengths[part]) - lengths[part], lengths[part])
                second = order[starts[key[first]] + inside]
                keep = (second > first) & (count_bits(others[first] ^ hashes[second]) <= BITS)
                yield done, first[keep], second[keep]


def _bands(hashes: np.ndarray) -> np.ndarray:
    """int64 (N, BANDS) in [0, 2**16): bit k goes to band k % BANDS, because neighbouring bits are alike."""
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    parts = np.ascontiguousarray(bits.reshape(len(hashes), -1, BANDS).transpose(0, 2, 1))
    return np.packbits(parts, axis=-1).view(">u2").reshape(len(hashes), BANDS).astype(np.int64)
