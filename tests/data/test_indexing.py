"""Names, numbers and digests of many images: the same as those of few, in little memory."""

import errno
import os
import pickle
import tempfile
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_ddpm.data import indexing
from latent_ddpm.data.indexing import AllBut, CompactStrings, digest, digest_of_many, give_memory_back, in_parts, narrow


def compact(strings: list[str], folder=None) -> CompactStrings:
    found = CompactStrings(folder)
    for some in in_parts(strings):
        found.extend(some)
    return found


names_of_files = st.binary(max_size=12).map(lambda name: name.replace(b"\0", b"/").decode("utf-8", "surrogateescape"))


@given(st.lists(names_of_files, max_size=40), st.integers(-45, 45), st.integers(0, 60), st.integers(1, 5))
def test_compact_strings_are_the_strings(strings, i, in_memory, block):
    """Names of files are bytes to Linux, so they may hold what is no UTF-8; in memory or not."""

    class Small(CompactStrings):
        IN_MEMORY, BLOCK = in_memory, block

    found = Small()
    found.extend(strings[:7])
    found.extend(strings[7:])
    assert list(found) == strings and len(found) == len(strings)
    if -len(strings) <= i < len(strings):
        assert found[i] == strings[i]
    else:
        with pytest.raises(IndexError):
            found[i]


def test_many_strings_lie_in_a_file_that_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 10_000)
    strings = [f"folder-{i % 7}/{i:06d}.jpg" for i in range(50_000)]
    tracemalloc.start()
    found = compact(strings, tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < len(strings)  # a byte each
    assert list(found) == strings and [found[i] for i in (0, 63, 64, 49_999, -1)] == [
        strings[i] for i in (0, 63, 64, 49_999, -1)
    ]
    assert os.fstat(found._file.fileno()).st_dev == os.stat(tmp_path).st_dev and not list(tmp_path.iterdir())
    assert list(pickle.loads(pickle.dumps(found))) == strings


def test_strings_lie_in_the_folder_that_is_asked_for_or_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    (tmp_path / "no folder").write_text("")
    for asked, found in [("made/for/it", "made/for/it"), ("no folder", "system"), (None, "system")]:
        strings = compact(["a", "b"], tmp_path / asked if asked else None)
        assert os.readlink(f"/proc/self/fd/{strings._file.fileno()}").startswith(str(tmp_path / found))
        assert list(strings) == ["a", "b"]


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_strings_stay_in_memory_where_nothing_can_be_written(monkeypatch, writes):
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 100)
    make, left = tempfile.TemporaryFile, [writes]

    class Full:
        def __init__(self, **words):
            if not writes:
                raise FileNotFoundError("no usable temporary directory")
            self.file = make(**words)

        def fileno(self):
            return self.file.fileno()

        def write(self, some):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "no space left on device")
            return self.file.write(some[:77])  # a write may be short

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    strings = [f"name {i}" for i in range(1000)]
    found = compact(strings)
    assert list(found) == strings and [found[i] for i in range(1000)] == strings
    assert (found._written > 0) == (writes > 0) and len(found._recent) > 8000
    assert list(pickle.loads(pickle.dumps(found))) == strings


def test_a_file_of_strings_that_was_cut_is_an_error(monkeypatch):
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 0)
    found = compact([f"{i}.png" for i in range(200)])
    os.ftruncate(found._file.fileno(), 700)
    assert found[0] == "0.png"
    with pytest.raises(OSError, match="ended early"):
        found[199]


def test_strings_are_pickled_without_being_made():
    found = compact([f"folder/{i:06d}.png" for i in range(100_000)])
    tracemalloc.start()
    stored = pickle.dumps(found)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 6 * len(stored) and pickle.loads(stored)[99_999] == "folder/099999.png"  # a Python string is 67 bytes


def test_reading_strings_does_not_move_the_position_that_processes_share(monkeypatch):
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 0)
    strings = [f"{i}.png" for i in range(2000)]
    found = compact(strings)
    before = os.lseek(found._file.fileno(), 0, os.SEEK_CUR)
    assert found[3] == strings[3]
    assert os.lseek(found._file.fileno(), 0, os.SEEK_CUR) == before


@pytest.mark.parametrize("count", [0, 1, 10_000, 10_001])
def test_a_digest_of_many_is_the_digest(count):
    rows = [(f"é{i}.jpg", i, -1) for i in range(count)]
    running = indexing.RunningDigest("folder")
    for start in range(0, count, 777):
        running.update([])
        running.update(rows[start : start + 777])
    assert running.result() == running.result() == digest("folder", rows)
    assert digest_of_many("a", "b", rows=np.arange(count)) == digest("a", "b", list(range(count)))
    assert digest_of_many("a", "b", rows=AllBut(count, np.array([]))) == digest("a", "b", list(range(count)))


@given(st.integers(0, 40), st.data())
def test_all_but_some_are_the_others(length, data):
    without = sorted(data.draw(st.sets(st.integers(0, length - 1)) if length else st.just(set())))
    numbers = AllBut(length, np.array(without, dtype=np.int64))
    expected = np.setdiff1d(np.arange(length), without)
    assert len(numbers) == len(expected) and list(numbers) == expected.tolist()
    assert numbers[:].tolist() == expected.tolist() and numbers[3:9].tolist() == expected[3:9].tolist()
    for i in (-1, length):
        if -len(expected) <= i < len(expected):
            assert numbers[i] == expected[i]
        else:
            with pytest.raises(IndexError):
                numbers[i]
    some = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1))) if len(expected) else [], dtype=np.int64)
    assert numbers[some].dtype == np.int64 and numbers[some].tolist() == expected[some].tolist()


@given(st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-200, 200), max_size=5), max_size=5))
def test_narrow_integers_are_the_integers(parts):
    together = [number for part in parts for number in part]
    found = narrow((np.array(part, dtype=np.int64) for part in parts), len(together))
    assert found.tolist() == together
    kinds = [np.int8, np.int16, np.int32, np.int64]
    fits = [all(np.iinfo(kind).min <= number <= np.iinfo(kind).max for number in together) for kind in kinds]
    assert found.dtype == kinds[fits.index(True)]


def test_freed_memory_goes_back():
    give_memory_back()  # on whatever system this is
