"""scripts/inspect_data.py: it sees what training sees, to the image; training and the card say what it found."""

import importlib.util
import json
import re

import pytest
import yaml
from conftest import ROOT, STAGE_1, STAGE_2, assert_same_tensors, checkpoint_tensors, launch
from odd_images import BAD, odd_folder, plain_folder
from PIL import Image

from latent_ddpm.data.inspection import table
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.errors import UserError
from latent_ddpm.publishing.card import read_facts

spec = importlib.util.spec_from_file_location("inspect_data_script", ROOT / "scripts" / "inspect_data.py")
inspect_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inspect_data)

COMMON = {"resolution": 32, "max_bad_image_share": 0.5, "validation_fraction": 0.2, "lpips_weight": 0}
OF_STAGE_1 = {"max_train_steps": 2, "validation_steps": 2, "checkpointing_steps": 2}


def config_of(folder, images, **changes):
    """A config file of both stages for a folder of images."""
    stages = [{k: yaml.safe_load(str(v)) for k, v in stage.items()} for stage in (STAGE_1, STAGE_2)]
    common = {key: value for key, value in COMMON.items() if key != "lpips_weight"}
    path = folder / "config.yaml"
    first, second = stages[0] | {"lpips_weight": 0}, stages[1] | changes
    content = {"train_data_dir": str(images), **common, "train_autoencoder": first, "train_unet": second}
    path.write_text(yaml.safe_dump(content))
    return path


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Odd images, trained on and then inspected; the log of the training."""
    folder = tmp_path_factory.mktemp("run")
    images = odd_folder(folder / "images")
    output_dir = folder / "out"
    log = launch("train_autoencoder.py", output_dir, train_data_dir=images, **COMMON, **OF_STAGE_1)
    words = ["--config", str(config_of(folder, images)), "--output_dir", str(output_dir), "--workers", "0"]
    assert inspect_data.main(words) == 0
    return images, output_dir, log


def test_it_agrees_with_training_to_the_image(run):
    images, output_dir, log = run
    report = json.loads((output_dir / "inspection" / "report.json").read_text())
    noted = json.loads((output_dir / "run.json").read_text())["autoencoder"]
    assert (report["training"], report["validation"]) == (noted["training_images"], noted["validation_images"])
    left_out = jsonl(output_dir / "inspection" / "left_out.jsonl")
    bad = {entry["name"]: entry["reason"].removeprefix("cannot be decoded: ") for entry in left_out if "split" in entry}
    assert bad == {entry["name"]: entry["error"] for entry in jsonl(output_dir / "bad_images.jsonl")}
    assert set(bad) == set(BAD) and report["undecodable"] == {"training": 1, "validation": 1}
    said = re.search(r"(\d+) training and (\d+) validation images, (\d+) undecodable", log)
    assert said and list(map(int, said.groups())) == [report["training"], report["validation"], 2]
    everything = report["training"] + report["validation"] + len(left_out)
    assert everything == sum(path.is_file() for path in images.rglob("*"))


def test_its_files(run):
    folder = run[1] / "inspection"
    report = json.loads((folder / "report.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "report.html", "report.json", "sheet.png", "left_out.jsonl", "duplicates.jsonl", "noted.jsonl",
    }  # fmt: skip
    assert report["command"].startswith("python scripts/inspect_data.py --config ")
    assert report["lines"] and set(report["lines"][0]) == {"importance", "text"}
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and report["lines"][0]["text"] in page and "http" not in page
    with Image.open(folder / "sheet.png") as sheet:
        # tiles of 64 pixels with a label, 24 in a row
        assert sheet.size == (24 * 64, 2 * (64 + 14)) and len(set(sheet.resize((60, 8)).getdata())) > 50
    kinds = sorted(entry["kind"] for entry in jsonl(folder / "duplicates.jsonl"))
    assert kinds == ["mirrored", "near", "same file", "same pixels"]
    noted = {entry["name"]: entry["what"] for entry in jsonl(folder / "noted.jsonl")}
    assert noted["cats/flat.png"] == ["of one colour"] and noted["cats/transparent.png"] == ["transparent"]


def test_training_says_the_most_important_lines(run):
    lines = [line for line in run[2].splitlines() if "of a sample of" in line]
    assert 1 <= len(lines) <= 5 and "of one colour" in lines[0]
    assert run[2].index(lines[0]) < run[2].index("decoding")


def test_the_card_has_the_result_and_no_names(run):
    _, output_dir, _ = run
    known = read_facts(output_dir).data
    assert known["command"].startswith("python scripts/inspect_data.py") and known["facts"]["complete"]
    text = json.dumps(known["facts"])
    assert "duplicates" in text and not any(name in text for name in ("cats", "dogs", ".png", "sRGB"))


def test_a_second_call_looks_at_nothing(run, monkeypatch, capsys):
    images, output_dir, _ = run
    monkeypatch.setattr(table, "look_at", None)
    words = ["--config", str(output_dir.parent / "config.yaml"), "--output_dir", str(output_dir), "--workers", "0"]
    assert inspect_data.main([*words, "--folder", str(output_dir.parent / "again")]) == 0
    again = json.loads((output_dir.parent / "again" / "report.json").read_text())
    assert again | {"command": ""} == json.loads((output_dir / "inspection" / "report.json").read_text()) | {
        "command": ""
    }
    assert "32 training and 7 validation images, 2 undecodable." in capsys.readouterr().out


def test_a_run_has_the_same_bits_with_and_without_an_inspection(run, tmp_path):
    images, output_dir, _ = run
    words = ["--config", str(config_of(tmp_path, images)), "--output_dir", str(tmp_path / "out"), "--workers", "0"]
    inspect_data.main(words)
    log = launch("train_autoencoder.py", tmp_path / "out", train_data_dir=images, **COMMON, **OF_STAGE_1)
    assert "exact copies of others" in log  # of the inspection
    same = [checkpoint_tensors(folder, "autoencoder", 2) for folder in (output_dir, tmp_path / "out")]
    assert_same_tensors(*same)


def test_stage_2_says_them_too_and_what_would_stop_it_is_said_before(run, tmp_path, capsys):
    images, output_dir, _ = run
    log = launch("train_unet.py", output_dir, train_data_dir=images, resolution=32, max_bad_image_share=0.5,
                 validation_fraction=0.2, max_train_steps=1, validation_steps=1, checkpointing_steps=1)  # fmt: skip
    assert "exact copies of others" in log and log.index("exact copies of others") < log.index("images as latents")
    text = {"conditions": ["text"], "text_encoder": "embedded:minilm", "unet_cross_attention_dim": 384}
    path = config_of(tmp_path, images, **{k: v for k, v in text.items() if k != "unet_cross_attention_dim"})
    assert inspect_data.main(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "- Stage 2 stops at its start: caption_column" in capsys.readouterr().out


def test_captions_are_counted(tmp_path, capsys):
    images = plain_folder(tmp_path / "images")
    for path in list(images.rglob("*.png"))[1:]:
        path.with_suffix(".txt").write_text("a picture\n")
    path = config_of(tmp_path, images, conditions=["text"], text_encoder="embedded:minilm")
    assert inspect_data.main(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert "1 of 24 images (4 %) have no caption" in capsys.readouterr().out
    captions = json.loads((tmp_path / "out" / "inspection" / "report.json").read_text())["captions"]
    assert captions["captions"] == 23 and captions["counted_by"] == "tokens"


def test_a_report_among_the_images_is_not_trained_on(tmp_path):
    """An output_dir inside train_data_dir is left out by the source."""
    images = plain_folder(tmp_path / "images")
    words = ["--config", str(config_of(tmp_path, images)), "--output_dir", str(images / "out"), "--workers", "0"]
    inspect_data.main(words)
    assert (images / "out" / "inspection" / "sheet.png").exists()
    sources = open_sources(inspect_data.configs_of(words[:-2])[0])
    assert sum(map(len, sources)) == 24


def test_errors_are_one_sentence(tmp_path):
    path = str(config_of(tmp_path, plain_folder(tmp_path / "images")))
    for words, sentence in (
        (["--sead", "1"], "Did you mean 'seed'"),
        (["--workers", "-1"], "--workers is -1"),
        (["--train_data_dir", str(tmp_path / "none")], "none"),
        (["--streaming", "true", "--train_data_dir", "null", "--dataset_name", "a/b"], "was not read yet"),
    ):
        with pytest.raises(UserError, match=sentence):
            inspect_data.main(["--config", path, "--output_dir", str(tmp_path / "out"), *words])
    content = yaml.safe_load((tmp_path / "config.yaml").read_text())
    content["train_unet"]["resolution"] = 16
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="resolution differs between the stages: 32 and 16"):
        inspect_data.main(["--config", str(tmp_path / "other.yaml")])
