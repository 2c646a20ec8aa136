"""What is taken out of published texts, and what is left in them."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from latent_ddpm.publishing.private import Scrubber, is_place


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-project") / "runs" / "tiny"
    folder.mkdir(parents=True)
    config = {"train_data_dir": "patients/2024", "output_dir": str(folder), "dataset_name": None}
    config |= {"lpips_weights": "/data/vgg.pth", "image_column": "patients", "resume_from_checkpoint": "latest"}
    (folder / "train_autoencoder.yaml").write_text(yaml.safe_dump({"train_autoencoder": config}))
    return folder


def test_configs_keep_all_but_places(run, tmp_path):
    Scrubber(run).copy(run / "train_autoencoder.yaml", tmp_path / "out.yaml")
    made = yaml.safe_load((tmp_path / "out.yaml").read_text())["train_autoencoder"]
    assert made == {"train_data_dir": "IMAGES", "output_dir": "RUN", "dataset_name": None, "image_column": "patients",
                    "lpips_weights": "LPIPS_WEIGHTS", "resume_from_checkpoint": "latest"}  # fmt: skip


def test_places_of_conditions(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    own = {"conditioning_image_dir": "/clinic/maps", "text_encoder": "/clinic/encoder", "dataset_name": "user/images"}
    hub = {**own, "text_encoder": "openai/clip-vit-large-patch14"}
    for config, shown in ((own, "TEXT_ENCODER"), (hub, hub["text_encoder"])):
        (folder / "train_unet.yaml").write_text(yaml.safe_dump({"train_unet": config}))
        Scrubber(folder).copy(folder / "train_unet.yaml", tmp_path / "out.yaml")
        made = yaml.safe_load((tmp_path / "out.yaml").read_text())["train_unet"]
        assert made == {"conditioning_image_dir": "CONDITIONING_IMAGES", "text_encoder": shown,
                        "dataset_name": "user/images"}  # fmt: skip


def test_json_and_its_commands(run, tmp_path):
    content = {
        "command": f"python scripts/evaluate.py pipeline --config {run}/train.yaml --train_data_dir patients/2024/",
        "nested": [{"pipeline": f"{run}/pipeline", "fd": 1.5}],
    }
    (tmp_path / "in.json").write_text(json.dumps(content))
    Scrubber(run).copy(tmp_path / "in.json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "command": "python scripts/evaluate.py pipeline --config RUN/train.yaml --train_data_dir IMAGES",
        "nested": [{"pipeline": "RUN/pipeline", "fd": 1.5}],
    }


@pytest.mark.parametrize("typed", ["--train_data_dir=patients/2024", "./patients/2024/", "'patients/2024'"])
def test_places_in_commands_however_they_are_typed(run, typed):
    made = Scrubber(run).command(f"python x.py {typed} --json /mnt/y/z.json --block_out_channels '[32,64]' --n 1")
    assert "patients" not in made and "/mnt" not in made
    assert made.endswith("--json z.json --block_out_channels [32,64] --n 1")


def test_names_that_happen_to_be_those_of_places_stay(tmp_path):
    (tmp_path / "train_unet.yaml").write_text("train_unet:\n  output_dir: v_prediction\n  train_data_dir: image\n")
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "_name_or_path": "image"}
    (tmp_path / "in.json").write_text(json.dumps(scheduler))
    Scrubber(tmp_path).copy_model_config(tmp_path / "in.json", tmp_path / "out.json")
    made = json.loads((tmp_path / "out.json").read_text())
    assert made == {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


def test_a_folder_named_data_is_no_part_of_a_longer_name(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(data)
    assert Scrubber(tmp_path / "run").text(f"me{data}-faces {data}/x") == f"me{data}-faces ./x"


@given(
    before=st.sampled_from(["", " ", '"', "=", "(", "file://", "\n"]), after=st.sampled_from(["", "/x", " ", '"', ":"])
)
def test_nothing_of_this_machine_is_left_in_a_text(run, before, after):
    private = [str(run), str(Path.home()), str(Path.cwd()), str(Path.cwd() / "patients" / "2024"), "hf_secret"]
    scrubber = Scrubber(run, secrets=["hf_secret", ""])
    for word in private:
        made = scrubber.text(f"{before}{word}{after}")
        assert word not in made or word in ("/",)


def test_names_of_the_hub_are_no_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_place("uoft-cs/cifar10") and not is_place("embedded:mnist")
    (tmp_path / "images").mkdir()
    assert is_place("data/x/*.parquet") and is_place("data/x.parquet") and is_place("a/b/c")
    assert is_place("images") and is_place("/images") and is_place("~/images") and is_place("./images")
