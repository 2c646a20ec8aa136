"""The inspection of images: what it counts, which copies it finds, that it goes on, and that it harms no run."""

import json
import logging
from types import SimpleNamespace

import imagehash
import numpy as np
import pytest
import torch
from image_sources import Flat, config
from odd_images import BAD, odd_folder, picture, plain_folder
from PIL import Image

from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.data.dataset import decode_square
from latent_ddpm.data.inspection import duplicates, known, table
from latent_ddpm.data.inspection import inspect as inspection
from latent_ddpm.data.inspection.lines import lines_of, percent
from latent_ddpm.data.sources.base import SubsetSource
from latent_ddpm.data.sources.folder import FolderSource
from latent_ddpm.resizing import resizer

SETTINGS = {"resolution": 32, "max_bad_image_share": 0.5}


def halves(root, validation=("dogs/01.png",)):
    """Sources of all images of a folder but the validation ones, and of those."""
    source = FolderSource(root)
    held_out = np.array([name in validation for name in source.all_names()])
    return tuple(SubsetSource(source, np.flatnonzero(mask)) for mask in (~held_out, held_out))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return odd_folder(tmp_path_factory.mktemp("odd") / "images")


@pytest.fixture(scope="module")
def of_odd(odd, tmp_path_factory):
    """The inspection of the odd folder, where the near and the mirrored copy are for validation."""
    sources = halves(odd, ("dogs/near.jpg", "dogs/mirrored.png", "dogs/void.png", "dogs/05.png"))
    cache = tmp_path_factory.mktemp("cache")
    return sources, inspection.inspect(sources, config(**SETTINGS), cache, workers=0), cache


def texts(lines):
    return "\n".join(line.text for line in lines)


# ---------------------------------------------------------------------------------------------------- one look


def test_facts_of_odd_images(of_odd):
    facts = of_odd[1].facts
    assert (facts["training"], facts["validation"]) == (36, 3)
    assert facts["undecodable"] == {"training": 1, "validation": 1} and facts["looked_at"] == 39
    assert facts["formats"] == {"PNG": 33, "JPEG": 3, "BMP": 1, "TIFF": 1, "GIF": 1}
    assert facts["depths"] == {"8": 37, "16": 1, "32 (float)": 1}
    assert facts["profiles"] == {"sRGB built-in": 1, "broken": 1}
    assert facts["sizes"]["40x60"] == 1 and "60x40" not in facts["sizes"]  # upright
    for flag in ("transparent", "rotated", "frames", "float", "flat", "dark", "upscaled", "elongated"):
        assert facts[flag] == 1, flag
    assert facts["gray"] == 3 and facts["colour"] == 36
    assert facts["shorter_side"]["smallest"] == 10 and facts["shorter_side"]["median"] == 40
    lost = 1 - (36 + 40 / 60 + 40 / 300 + 1) / 39
    assert facts["cropped_away"] == pytest.approx(lost)
    assert facts["classes"]["counts"] == {"cats": 22, "dogs": 15}  # undecodable ones too
    names = {of_odd[0][0].name(i) for i in of_odd[1].noted["smaller than the resolution"]}
    assert names == {"dogs/small.png"} and of_odd[1].noted.keys() >= {"of one colour", "nearly black", "gray"}


@pytest.mark.parametrize("channels", [1, 3])
def test_what_cannot_be_decoded_is_what_training_cannot_decode(odd, channels):
    source, library = FolderSource(odd), resizer(None)
    for i, name in enumerate(source.all_names()):
        row = table.look_at(source, i, 32, channels, library)
        square = decode_square(source, i, 32, channels, library=library)
        assert (row["flags"] & table.BIT["bad"] > 0) == isinstance(square, str) == (name in BAD)
        if isinstance(square, str):
            assert row["error"] == square


def test_colour_pictures_in_a_gray_run(odd, tmp_path):
    settings = config(**SETTINGS, image_channels=1)
    facts = inspection.inspect(halves(odd), settings, tmp_path, workers=0).facts
    assert facts["colour"] == 36
    (line, *_) = lines_of(facts, [settings_of(image_channels=1)])
    assert "in colour, but image_channels is 1" in line.text and "--image_channels 3" in line.text


def test_a_source_without_files_is_inspected(tmp_path):
    facts = inspection.inspect((Flat(5, bad=(2,)), Flat(2)), config(resolution=8), tmp_path, workers=0).facts
    assert facts["training"] == 4 and facts["stored"] == 6 and facts["flat"] == 6 and facts["formats"] == {}
    assert facts["duplicates"]["same_pixels"] == 2  # the second source repeats the first two of the first


def settings_of(stage=AutoencoderConfig, **changes):
    values = {"train_data_dir": "x", "resolution": 32, "max_train_steps": 100, "train_batch_size": 8}
    values |= {"max_bad_image_share": 0.5}
    return stage(**(values | changes))


# -------------------------------------------------------------------------------------------------------- copies


def test_copies_of_each_kind(of_odd):
    sources, found, _ = of_odd
    names = [*sources[0].all_names(), *sources[1].all_names()]
    groups = {kind: {names[i] for i in group} for kind, group in found.copies}
    assert len(found.copies) == 4 and groups == {
        "same file": {"cats/00.png", "cats/same-file.png"},
        "same pixels": {"cats/02.png", "dogs/same-pixels.bmp"},
        "near": {"dogs/03.png", "dogs/near.jpg"},
        "mirrored": {"cats/04.png", "dogs/mirrored.png"},
    }
    counts = {"same_file": 1, "same_pixels": 1, "near": 1, "mirrored": 1, "in_both_splits": 2}
    assert found.facts["duplicates"] == counts


def test_a_copy_of_what_resembles_a_training_image_leaks_too(tmp_path):
    root = plain_folder(tmp_path / "images")
    for k in (1, 2):
        picture(3).resize((80, 80), Image.Resampling.LANCZOS).save(root / "dogs" / f"near-{k}.png")
    sources = halves(root, ("dogs/near-1.png", "dogs/near-2.png"))
    counts = inspection.inspect(sources, config(**SETTINGS), tmp_path / "cache", workers=0).facts["duplicates"]
    assert counts == {"same_file": 1, "same_pixels": 0, "near": 1, "mirrored": 0, "in_both_splits": 2}


def test_hashes_that_differ_in_few_bits_are_found():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 4000, dtype=np.uint64)
    different = {}  # of a hash and the next one
    for k in range(0, 3000, 3):
        bits = rng.choice(64, k % 10, replace=False).tolist()
        hashes[k + 1], different[k] = hashes[k] ^ np.uint64(sum(1 << bit for bit in bits)), len(bits)
    pairs = [np.stack(found[1:], axis=1) for found in duplicates.similar_hashes(hashes, hashes)]
    found = {(i, j) for i, j in np.concatenate(pairs).tolist()}
    assert {(k, k + 1) for k, bits in different.items() if bits <= 7} <= found
    assert all(i < j and int(hashes[i] ^ hashes[j]).bit_count() <= duplicates.BITS for i, j in found)


def test_bits_are_counted_without_numpy_2(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**63, (3, 50), dtype=np.uint64)
    expected = [[bin(int(value)).count("1") for value in row] for row in values]
    assert duplicates.count_bits(values).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert duplicates.count_bits(values).tolist() == expected


def test_the_hash_is_that_of_the_library():
    small = picture(1, (32, 32))
    assert f"{table.perceptual_hash(small):016x}" == str(imagehash.phash(small))


def test_alike_is_not_enough():
    """Pictures with the same hash, as simple ones have, are compared by their thumbnails."""
    rows = []
    for colours in ((40, 200), (60, 180), (40, 198)):
        pixels = np.full((32, 32, 3), colours[0], np.uint8)
        pixels[:, 16:] = colours[1]
        rows.append(table._seen(pixels, Image.fromarray(pixels), 0, "8", True))
    table.finish(rows)
    of_three = table.Table(rows)
    assert len(set(of_three["hash"].tolist())) == 1
    assert duplicates.near_pairs(of_three, np.arange(3), mirrored=False).tolist() == [[0, 2]]


# --------------------------------------------------------------------------------------------- cache and processes


def test_a_stopped_inspection_goes_on(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 8)
    looked, real = [], table.look_at

    def stopping(source, i, *settings):
        looked.append(i)
        if len(looked) == 20:
            raise KeyboardInterrupt
        return real(source, i, *settings)

    monkeypatch.setattr(table, "look_at", stopping)
    sources = halves(odd)
    with pytest.raises(KeyboardInterrupt):
        inspection.inspect(sources, config(**SETTINGS), tmp_path / "a", workers=0)
    blocks = sorted((tmp_path / "a").rglob("block-*.npz"))
    assert len(blocks) == 2
    blocks[0].write_bytes(blocks[0].read_bytes()[:-9])  # damaged
    monkeypatch.setattr(table, "look_at", lambda source, i, *s: looked.append(i) or real(source, i, *s))
    looked.clear()
    found = inspection.inspect(sources, config(**SETTINGS), tmp_path / "a", workers=0)
    assert len(looked) == len(sources[0]) + len(sources[1]) - 8
    assert [path.name for path in (tmp_path / "a").rglob("*") if path.is_file()] == ["result.json"]
    whole = inspection.inspect(sources, config(**SETTINGS), tmp_path / "b", workers=0)
    assert (found.facts, found.bad, found.copies, found.noted) == (whole.facts, whole.bad, whole.copies, whole.noted)
    looked.clear()
    again = inspection.inspect(sources, config(**SETTINGS), tmp_path / "a", workers=0)
    assert looked == [] and (again.facts, again.bad, again.noted) == (found.facts, found.bad, found.noted)
    assert [(kind, group) for kind, group in again.copies] == found.copies
    other = inspection.inspect(sources, config(**SETTINGS | {"resolution": 16}), tmp_path / "a", workers=0)
    assert looked and other.folder != again.folder


def test_processes_see_the_same(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 8)
    state = torch.get_rng_state()
    sources = halves(odd)
    one, two = (inspection.inspect(sources, config(**SETTINGS), tmp_path / str(n), workers=n) for n in (0, 2))
    assert (one.facts, one.bad, one.copies, one.noted) == (two.facts, two.bad, two.copies, two.noted)
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------- lines


def test_a_clean_set_has_no_lines(tmp_path):
    facts = inspection.inspect(halves(plain_folder(tmp_path / "a")), config(**SETTINGS), tmp_path, workers=0).facts
    assert lines_of(facts, [settings_of(), settings_of(UNetConfig)]) == []


def test_each_odd_thing_has_its_line(of_odd):
    lines = lines_of(of_odd[1].facts, [settings_of()])
    said = texts(lines)
    for words in (
        "2 of 41 images (5 %) cannot be decoded and are skipped", "2 of 3 validation images (67 %) have a copy",
        "2 of 39 images (5 %) are exact copies of others: remove them (duplicates.jsonl names them).",
        "1 of 39 images (3 %) is nearly equal to another", "is a mirrored copy of another", "is of one colour",
        "nearly black", "smaller than resolution 32", "a side more than three times", "floating-point", "animated",
        "3 of 39 images (8 %) are gray in a run with colours", "partly transparent", "has a broken colour profile",
    ):  # fmt: skip
        assert words in said, words
    importances = [line.importance for line in lines]
    assert importances == sorted(importances, reverse=True) and len(lines) == 14
    assert "so the run stops" in lines_of(of_odd[1].facts, [settings_of(max_bad_image_share=0.01)])[0].text


def test_lines_of_classes_length_splits_and_what_is_left_out(of_odd):
    facts = of_odd[1].facts | {
        "left_out": {"HEIC: pip install pillow-heif": 1, "thumbnails of a NAS": 1200},
        "splits": {"train": [30, "training"], "extra": [7, "not used"]},
        "notes": ["The folders train and test are splits."],
        "classes": {"counts": {"cats": 3, "dogs": 100}, "unknown": 2, "empty": ["birds"]},
    }
    unet = settings_of(UNetConfig, max_train_steps=50_000)
    said = texts(lines_of(facts, [settings_of(max_train_steps=2), unet]))
    for words in (
        "1 file is not trained on (HEIC: pip install pillow-heif).",
        "1,200 files are not trained on (thumbnails of a NAS).",
        "The split 'extra' with 7 images is not used.", "The folders train and test are splits.",
        "Stage 1 ends after 44 % of the 36 images", "Stage 2 sees each of the 36 images 11,111 times",
    ):  # fmt: skip
        assert words in said, words
    assert "birds" not in said  # a run without classes does not miss them
    said = texts(lines_of(facts, [settings_of(UNetConfig, conditions=["class"])]))
    assert "1 class has no image: birds." in said and "1 has fewer than 20 images" in said and "cats (3)" in said
    assert "2 images have no class" in said


def test_captions_that_are_missing_or_cut(tmp_path):
    root = plain_folder(tmp_path / "a", 6)
    for k in range(4):
        name = f"{'dogs' if k % 2 else 'cats'}/{k:02d}.txt"
        (root / name).write_text("a very long caption of nine words it is\n" if k == 0 else "short\n")
    unet = SimpleNamespace(caption_column="text", max_caption_tokens=5, text_encoder="no/such-encoder")
    found = inspection.inspect_captions(halves(root, ("cats/04.png",)), unet, tmp_path / "cache")
    expected = {"images": 6, "missing": 2, "captions": 4, "cut": 1, "most": 5, "counted_by": "words"}
    assert found == expected
    (root / "cats/00.txt").unlink()  # it is cached
    assert inspection.inspect_captions(halves(root, ("cats/04.png",)), unet, tmp_path / "cache") == expected
    unet.text_encoder = "embedded:minilm"
    found = inspection.inspect_captions(halves(root, ("cats/04.png",)), unet, tmp_path / "cache")
    assert found["counted_by"] == "tokens" and found["missing"] == 3 and found["cut"] == 0


def test_lines_of_captions(of_odd):
    captions = {"images": 8, "missing": 2, "captions": 6, "cut": 3, "most": 77, "counted_by": "words"}
    said = texts(lines_of(of_odd[1].facts, [settings_of(UNetConfig)], captions))
    assert "2 of 8 images (25 %) have no caption" in said
    assert "3 of 6 captions (50 %) are longer than 77 words and cut (the tokenizer is not here" in said


def test_percent():
    assert [percent(share) for share in (0, 0.0001, 0.004, 0.05, 1)] == ["0 %", "under 0.1 %", "0.4 %", "5 %", "100 %"]


# ---------------------------------------------------------------------------------------- at the start of training


def test_a_sample_is_spread_evenly():
    for length, most in ((1, 4), (5, 8), (1000, 256), (10**9, 256)):
        chosen = list(known.evenly_spaced(length, most))
        assert len(set(chosen)) == len(chosen) == min(length, most) and 0 <= min(chosen) <= max(chosen) < length
        beginning = sorted(chosen[: len(chosen) // 2])
        assert not beginning or max(np.diff([0, *beginning, length]), default=0) <= 4 * length / len(beginning)


def test_the_sample_of_a_run(odd, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    sources, settings = halves(odd), settings_of(output_dir=str(tmp_path))
    sources[0].findings.notes.append("The folders cats and dogs are splits.")
    sources[0].findings.splits["cats"] = (3, "training")
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    known.say_of_data(settings, sources, "autoencoder", logging.getLogger("train_autoencoder"))
    said = [record.message for record in caplog.records if record.name == "train_autoencoder"]
    assert len(said) == known.MOST_LINES + 1 and "nearly black" in said[0] and "inspect_data.py" in said[-1]
    assert not any("jsonl" in line for line in said)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()
    noted = (tmp_path / "data.json").read_text()
    assert json.loads(noted)["facts"]["looked_at"] == 38 and not json.loads(noted)["facts"]["complete"]
    assert not any(word in noted for word in ("cats", "dogs", "sRGB", str(odd), "00.png"))  # it is published

    caplog.clear()
    monkeypatch.setattr(known, "sample_facts", None)  # a resumed run says the same, without another look
    known.say_of_data(settings, sources, "unet", logging.getLogger("train_autoencoder"))
    assert [record.message for record in caplog.records if record.name == "train_autoencoder"] == said
    assert (tmp_path / "data.json").read_text() == noted


def test_a_finished_inspection_is_said_at_the_start(odd, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    sources, settings = halves(odd), settings_of(output_dir=str(tmp_path))
    known.say_of_data(settings, sources, "autoencoder", logging.getLogger("a"))
    found = inspection.inspect(sources, settings, tmp_path / "cache", workers=0)
    known.save_known(tmp_path, sources, settings, found.facts, "the command", in_training=False)
    caplog.clear()
    known.say_of_data(settings, sources, "autoencoder", logging.getLogger("a"))
    assert [record.message for record in caplog.records] == [
        line.text for line in lines_of(found.facts, [settings])[: known.MOST_LINES]
    ]
    assert json.loads((tmp_path / "data.json").read_text())["command"] == "the command"
    (tmp_path / "data.json").unlink()  # as when other keys were inspected since
    said, facts = caplog.messages, json.loads(json.dumps(found.facts))
    caplog.clear()
    known.say_of_data(settings, sources, "autoencoder", logging.getLogger("a"))
    assert caplog.messages == said and json.loads((tmp_path / "data.json").read_text())["facts"] == known.public(facts)


def test_the_sample_ends_in_time(odd):
    assert known.sample_facts(halves(odd), config(**SETTINGS), seconds=0)["looked_at"] <= 1


def test_a_failure_does_not_end_the_run(odd, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(known, "sample_facts", lambda *_: 1 / 0)
    caplog.set_level(logging.DEBUG)
    known.say_of_data(settings_of(output_dir=str(tmp_path)), halves(odd), "autoencoder", logging.getLogger("a"))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]


def test_an_inspection_with_other_keys_does_not_replace_what_a_run_noted(odd, tmp_path):
    sources, settings = halves(odd), settings_of(output_dir=str(tmp_path))
    known.say_of_data(settings, sources, "autoencoder", logging.getLogger("a"))
    (tmp_path / "run.json").write_text("{}")
    noted, facts = (tmp_path / "data.json").read_text(), json.loads((tmp_path / "data.json").read_text())["facts"]
    facts |= {"classes": None}
    other = settings_of(output_dir=str(tmp_path), resolution=16)
    known.save_known(tmp_path, sources, other, facts, "x", in_training=False)
    assert (tmp_path / "data.json").read_text() == noted
    known.save_known(tmp_path, sources, other, facts, "x", in_training=True)
    assert json.loads((tmp_path / "data.json").read_text())["command"] == "x"
