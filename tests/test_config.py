"""latent_ddpm.config: files and options become a validated config, and errors name the key."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from latent_ddpm.config import (
    AutoencoderConfig,
    UNetConfig,
    _parser,
    check_same_run,
    keys_of,
    parse_config,
    read_yaml,
    save_config,
)
from latent_ddpm.errors import UserError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
DATA = ["--dataset_name", "embedded:mnist"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "dataset_name: embedded:mnist\nresolution: 32\nlearning_rate: 5e-4\n"
        "train_autoencoder:\n  block_out_channels: [16, 32]\n  seed: 3\n"
        "train_unet:\n  learning_rate: 1e-4\n"
    )
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", [AutoencoderConfig, UNetConfig])
def test_shipped_configs_are_valid(path, stage):
    config = parse_config(stage, ["--config", str(path)])
    assert config.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize("stage", [AutoencoderConfig, UNetConfig])
def test_every_key_is_documented(stage):
    described = {action.dest for action in _parser(stage)._actions if action.help}
    assert [key for key in keys_of(stage) if key not in described] == []


def test_sections_override_common_keys_and_flags_override_both(config_file):
    stage1 = parse_config(AutoencoderConfig, ["--config", str(config_file)])
    stage2 = parse_config(UNetConfig, ["--config", str(config_file)])
    assert (stage1.learning_rate, stage1.seed, stage1.block_out_channels) == (5e-4, 3, [16, 32])
    assert (stage2.learning_rate, stage2.seed) == (1e-4, 0)
    stage2 = parse_config(UNetConfig, [f"--config={config_file}", "--learning-rate=2e-4", "--random_flip", "true"])
    assert stage2.learning_rate == 2e-4 and stage2.random_flip is True
    stage1 = parse_config(AutoencoderConfig, ["--block_out_channels", "[8, 8]", "--norm_num_groups", "8", *DATA])
    assert stage1.block_out_channels == [8, 8]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lerning_rate", "1"], "lerning_rate.*Did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "learning_rate must be float, not 'fast'"),
        (["--seed", "1.5"], "seed must be int"),
        (["--mixed_precision", "fp8"], "^mixed_precision must be one of 'no', 'bf16', 'fp16', not 'fp8'"),
        (["--train_batch_size", "many"], "^train_batch_size must be int or 'auto', not 'many'"),
        (["--lr_scheduler", "cosin"], "lr_scheduler must be one of 'constant', 'cosine', .*, not 'cosin'"),
        (["--learning_rate"], "learning_rate"),
        (["stray"], "stray"),
        (["--learning_rate", "0"], "learning_rate is 0.*greater than 0"),
        (["--resolution", "30"], "resolution 30 is not divisible by 4"),
        (["--norm_num_groups", "24"], "norm_num_groups 24 does not divide the 64 channels"),
        (["--train_data_dir", "x"], "exactly one of train_data_dir and dataset_name"),
        (["--image_channels", "4"], "image_channels is 4"),
        (["--ema_decay", "1"], "ema_decay is 1"),
        (["--disc_weight", "1", "--resolution", "16"], "disc_layers 3 leaves no patch"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--quantizer", "lfq"], "quantizer must be .*simvq"),
        (["--quantizer", "fsq"], "fsq_levels is None; it must be 3 numbers above 1"),
        (["--quantizer", "fsq", "--fsq_levels", "[8,8]"], "fsq_levels is .*3 numbers"),
        (["--quantizer", "fsq", "--fsq_levels", "[8,8,8]"], "fsq_levels is .*whose product is 1024"),
        (["--quantizer", "fsq", "--fsq_levels", "[1,32,32]"], "fsq_levels is .*above 1"),
        (["--fsq_levels", "[8,8,16]"], "fsq_levels is .*unset unless quantizer is fsq"),
        (["--quantizer", "kl", "--fsq_levels", "[8,8,16]"], "fsq_levels is .*unset unless quantizer is fsq"),
        (["--quantizer", "kl", "--gradient_estimator", "rotation"], "gradient_estimator is rotation.*quantizer is kl"),
        (["--quantizer", "kl", "--kl_weight=-0.5"], "kl_weight is -0.5; it must be 0 or more"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(AutoencoderConfig, DATA + words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unet_norm_num_groups", "48"], "unet_norm_num_groups 48 does not divide the 128"),
        (["--unet_attention_levels", "[3]"], "unet_attention_levels is 3"),
        (["--unet_attention_head_dim", "24"], "unet_attention_head_dim 24 does not divide"),
        (
            ["--prediction_type", "flow_prediction", "--inference_scheduler", "ddim"],
            "inference_scheduler ddim cannot sample",
        ),
        (
            [
                "--prediction_type",
                "flow_prediction",
                "--inference_scheduler",
                "unipc",
                "--rescale_betas_zero_snr",
                "true",
            ],
            "rescale_betas_zero_snr is for a table of betas",
        ),
        (
            ["--prediction_type", "epsilon", "--rescale_betas_zero_snr", "true"],
            "prediction_type epsilon says nothing about the image",
        ),
        (["--noise_shift", "0"], "noise_shift is 0"),
        (["--max_train_images", "0"], "max_train_images is 0"),
        (["--lr_decay_steps", "10"], "are for lr_scheduler warmup_stable_decay"),
        (["--ema_sigma_rels", "[0.1, 0.3]"], "ema_sigma_rels is .*0.28"),
        (["--ema_sigma_rels", "[]"], "ema_sigma_rels is"),
        (["--ema_decay", "0.999"], "Unknown option --ema_decay"),
        (["--loss_weighting", "min-snr"], "loss_weighting must be .*min_snr"),
        (["--timestep_sampling", "lognormal"], "timestep_sampling must be .*logit_normal"),
        (["--num_inference_steps", "2000"], "num_inference_steps 2000 is more than"),
        (["--block_out_channels", "[8]"], "Unknown option --block_out_channels"),
    ],
)
def test_mistakes_of_stage_2(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(UNetConfig, DATA + words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolutoin: 3", "unknown key 'resolutoin' at the top level. Did you mean 'resolution'"),
        ("train_unet:\n  unet_droput: 0", "unknown key 'unet_droput' in train_unet. Did you mean 'unet_dropout'"),
        ("num_vq_embeddings: 3", "belongs in the section train_autoencoder"),
        ("train_unet: 3", "section train_unet must be a mapping"),
        ("- a", "must be a mapping"),
        ("a: [", "not valid YAML"),
        ("dataset_name: embedded:mnist\nresolution: big", "run.yaml: resolution must be int, not 'big'"),
    ],
)
def test_mistakes_in_files_name_the_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        parse_config(AutoencoderConfig, ["--config", str(path)])
    assert str(path) in str(caught.value)


def test_saved_config_reads_back_and_guards_its_folder(tmp_path):
    config = parse_config(AutoencoderConfig, [*DATA, "--learning_rate", "3e-4", "--resolution", "32"])
    path = tmp_path / "train_autoencoder.yaml"
    save_config(config, path)
    assert set(read_yaml(path, AutoencoderConfig)) == set(keys_of(AutoencoderConfig))
    assert parse_config(AutoencoderConfig, ["--config", str(path)]) == config
    assert yaml.safe_load(path.read_text())["train_autoencoder"]["learning_rate"] == 3e-4
    check_same_run(config, path)
    check_same_run(dataclasses.replace(config, max_train_steps=7, report_to="tensorboard"), path)
    with pytest.raises(UserError, match="holds another run .seed was 0, is 1"):
        check_same_run(dataclasses.replace(config, seed=1), path)


def test_help_describes_the_keys(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(UNetConfig, ["--help"])
    assert stopped.value.code == 0
    assert "make the last noise level pure noise" in capsys.readouterr().out


def test_a_run_keeps_the_library_that_resizes_its_images(tmp_path):
    def words(folder, *more):
        return [*DATA, "--output_dir", str(tmp_path / folder), *more]

    def library(kind, *arguments):
        return parse_config(kind, words(*arguments)).image_resize

    def save(folder, stage, **keys):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{stage}.yaml").write_text(yaml.safe_dump({stage: {"seed": 0, **keys}}))

    for kind in (AutoencoderConfig, UNetConfig):
        assert library(kind, "new") is None  # the library of new runs
        assert library(kind, "new", "--image_resize", "pillow") == "pillow"
    save("before", "train_autoencoder")  # it began before the key was
    save("after", "train_autoencoder", image_resize="pytorch")
    save("mixed", "train_autoencoder")
    save("mixed", "train_unet", image_resize="pytorch")  # stage 2 has been told to
    for kind in (AutoencoderConfig, UNetConfig):
        assert library(kind, "before") == "pillow"
        assert library(kind, "after") == "pytorch"
        checkpoint = tmp_path / "before" / "checkpoints" / "autoencoder-00000010"
        assert library(kind, "new", "--resume_from_checkpoint", str(checkpoint)) == "pillow"
        assert library(kind, "after", "--resume_from_checkpoint", str(checkpoint)) == "pytorch"
    assert (library(AutoencoderConfig, "mixed"), library(UNetConfig, "mixed")) == ("pillow", "pytorch")


def test_a_run_cannot_change_the_library_that_resizes_its_images(tmp_path):
    config = parse_config(UNetConfig, [*DATA, "--output_dir", str(tmp_path), "--image_resize", "pytorch"])
    save_config(config, tmp_path / "train_unet.yaml")
    check_same_run(parse_config(UNetConfig, [*DATA, "--output_dir", str(tmp_path)]), tmp_path / "train_unet.yaml")
    other = parse_config(UNetConfig, [*DATA, "--output_dir", str(tmp_path), "--image_resize", "pillow"])
    with pytest.raises(UserError, match="image_resize was 'pytorch', is 'pillow'"):
        check_same_run(other, tmp_path / "train_unet.yaml")


def parsed(*words, stage=UNetConfig):
    return parse_config(stage, list(map(str, words)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_a_config_file_from_any_editor(tmp_path, encoding):
    text = "\ufeff" * (encoding == "utf-16-le") + "train_data_dir: caf\u00e9\r\nseed: 3\r\n"
    (tmp_path / "a.yaml").write_bytes(text.encode(encoding))
    config = parsed("--config", tmp_path / "a.yaml")
    assert (config.train_data_dir, config.seed) == ("caf\u00e9", 3)
    (tmp_path / "a.yaml").write_bytes("train_data_dir: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="a.yaml is not text in UTF-8 .byte 19.: save it as UTF-8"):
        parsed("--config", tmp_path / "a.yaml")


def test_a_source_on_the_command_line_replaces_that_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("dataset_name: you/set\ndataset_config_name: x\nstreaming: true\nimage_column: img\nseed: 3\n")
    config = parsed("--config", file, "--train_data_dir", "photos")
    assert (config.train_data_dir, config.dataset_name, config.dataset_config_name) == ("photos", None, None)
    assert (config.streaming, config.image_column, config.seed) == (False, "image", 3)
    assert config.source_note.startswith("train_data_dir photos of the command line replaces the config's dataset_name")
    assert parsed("--config", file, "--dataset_name", "you/other").dataset_config_name == "x"
    assert parsed("--config", file, "--dataset_name", "you/other").source_note == ""
    file.write_text("train_data_dir: photos\n")
    config = parsed("--config", file, "--dataset_name", "you/set", "--image_column", "img")
    assert (config.train_data_dir, config.dataset_name, config.image_column) == (None, "you/set", "img")
    with pytest.raises(UserError, match="both are set"):
        parsed("--config", file, "--dataset_name", "you/set", "--train_data_dir", "photos")


def test_places_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/you")
    monkeypatch.setenv("SCRATCH", "/scratch")
    config = parsed("--train_data_dir", "~/photos/", "--output_dir", "$SCRATCH/run", "--autoencoder", "${SCRATCH}/a//")
    assert (config.train_data_dir, config.output_dir) == ("/home/you/photos", "/scratch/run")
    assert config.autoencoder == "/scratch/a" and parsed("--train_data_dir", "/").train_data_dir == "/"
    with pytest.raises(UserError, match="output_dir .NOWHERE/run: the environment variable NOWHERE is not set"):
        parsed("--train_data_dir", "a", "--output_dir", "$NOWHERE/run")
    with pytest.raises(UserError, match=r"output_dir caf.udce9 is not a name in UTF-8, which safetensors needs"):
        parsed("--train_data_dir", "caf\udce9", "--output_dir", "caf\udce9")
    with pytest.raises(UserError, match="there is no user '~nobody-here'"):
        parsed("--train_data_dir", "~nobody-here/a")


def test_what_yaml_makes_of_no(tmp_path):
    (tmp_path / "a.yaml").write_text("train_data_dir: a\nmixed_precision: no\ntorch_compile: off\n")
    config = parsed("--config", tmp_path / "a.yaml", "--class_names", "[7, one]")
    assert (config.mixed_precision, config.torch_compile, config.class_names) == ("no", "off", ["7", "one"])
    (tmp_path / "a.yaml").write_text("train_data_dir: a\ntrain_unet:\n  seed: 1\n  seed: 2\n")
    (tmp_path / "b.yaml").write_text("1: 2\n")
    with pytest.raises(UserError, match="unknown key '1' at the top level"):
        parsed("--config", tmp_path / "b.yaml")
    with pytest.raises(UserError, match="the key seed is given twice"):
        parsed("--config", tmp_path / "a.yaml")


def test_the_same_place_in_another_spelling_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    saved = tmp_path / "run" / "train_unet.yaml"
    save_config(UNetConfig(train_data_dir="photos"), saved)
    for same in ("photos", "photos/", "./photos", "../" + tmp_path.name + "/photos", str(tmp_path / "photos")):
        assert check_same_run(UNetConfig(train_data_dir=same), saved) == ""
    moved = check_same_run(UNetConfig(train_data_dir="elsewhere"), saved)  # then the data decide
    assert moved == "train_data_dir was 'photos', is 'elsewhere'"
    with pytest.raises(
        UserError, match="holds another run .seed was 0, is 1, train_data_dir was .photos., is .elsewhere."
    ):
        check_same_run(UNetConfig(train_data_dir="elsewhere", seed=1), saved)


def test_stage_1_knows_the_folder_of_conditioning_images(tmp_path):
    (tmp_path / "a.yaml").write_text("train_data_dir: a\ntrain_unet:\n  conditioning_image_dir: a/masks\n")
    assert parsed("--config", tmp_path / "a.yaml", stage=AutoencoderConfig).conditioning_image_dir == "a/masks"
