"""train_batch_size auto: the largest micro-batch that divides the images of a step and fits."""

from types import SimpleNamespace

import pytest
import torch
from conftest import launch, losses

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config, same_batch
from latent_ddpm.errors import UserError
from latent_ddpm.planning.batch import fitting_images
from latent_ddpm.planning.counting import GIB, count_unet, count_unet_alone
from latent_ddpm.training import launch as launching
from latent_ddpm.training.launch import fit_to_processes, largest_divisor

AUTO = {"dataset_name": "embedded:mnist", "resolution": 32, "train_batch_size": "auto", "images_per_step": 240}
UNET = {"unet_block_out_channels": [32, 64], "unet_attention_levels": [1]}


class Processes:
    """What fit_to_processes needs of an accelerator, on a GPU that does not exist."""

    mixed_precision, is_main_process = "bf16", True

    def __init__(self, count=1, kind="cuda"):
        self.num_processes = count
        self.device = torch.device(kind)
        self.gradient_accumulation_steps = 1

    def gather(self, tensor):
        return tensor


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 24 GiB free."""
    cuda = SimpleNamespace(mem_get_info=lambda device: (24 * GIB, 80 * GIB))
    monkeypatch.setattr(launching, "torch", SimpleNamespace(cuda=cuda, tensor=lambda x, device: torch.tensor(x)))


@pytest.mark.parametrize(("number", "limit", "size"), [(240, 64, 60), (240, 1, 1), (7, 6, 1), (7, 99, 7)])
def test_largest_divisor(number, limit, size):
    assert largest_divisor(number, limit) == size


@pytest.mark.parametrize(("count", "fits", "size", "accumulation"), [(1, 100, 80, 3), (2, 100, 60, 2), (4, 500, 60, 1)])
def test_micro_batches_make_the_step(gpu, count, fits, size, accumulation):
    asked = []

    def fitting(config, free, processes):
        asked.append((config.mixed_precision, free, processes))
        return fits

    config = fit_to_processes(UNetConfig(**AUTO, **UNET), None, Processes(count), fitting)
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (size, accumulation)
    assert asked == [("bf16", 24 * GIB, count)]


@pytest.mark.parametrize(("images", "better"), [(67, 64), (134, 128), (240, None), (127, 128)])
def test_images_without_a_large_divisor_are_named(gpu, caplog, images, better):
    config = UNetConfig(**{**AUTO, "images_per_step": images}, **UNET)
    fit_to_processes(config, None, Processes(), lambda *_: 64)
    warned = f"{images} images a step have no larger divisor that fits. A new run is faster with {better}."
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [warned] * (
        better is not None
    )


def test_a_resumed_run_keeps_its_micro_batches_where_they_fit(gpu):
    state = {"images_per_step": 240, "train_batch_size": 24}
    config = UNetConfig(**AUTO, **UNET)
    assert fit_to_processes(config, state, Processes(), lambda *_: 100).train_batch_size == 24
    assert fit_to_processes(config, state, Processes(), lambda *_: 23).train_batch_size == 20


def test_more_memory_fits_more_images():
    config = UNetConfig(**AUTO, unet_block_out_channels=[128, 256], unet_attention_levels=[1])
    found = [fitting_images(config, (4, 32), int(gib * GIB)) for gib in (8, 24, 80)]
    assert 0 < found[0] < found[1] < found[2]
    counted = count_unet_alone(config, 4, 32)
    assert found[1] * counted["bytes_per_image"] + counted["fixed_bytes"] < 0.9 * 24 * GIB
    assert (found[1] + 1) * counted["bytes_per_image"] + counted["fixed_bytes"] > 0.9 * 24 * GIB
    assert fitting_images(config, (4, 32), 8 * GIB, shards=4) > found[0]


def test_captions_checkpointing_and_float32_count():
    config = UNetConfig(**AUTO, **UNET)
    plain = count_unet_alone(config, 4, 8)["bytes_per_image"]

    def counted(**keys):
        return count_unet_alone(UNetConfig(**AUTO, **UNET, **keys), 4, 8)["bytes_per_image"]

    assert counted(conditions=["text"], text_encoder="x") > plain
    assert counted(gradient_checkpointing=True) < plain < counted(mixed_precision="no")


def test_the_frozen_autoencoder_is_counted_where_it_is_known():
    autoencoder = AutoencoderConfig(dataset_name="embedded:mnist", resolution=32, block_out_channels=[16, 32])
    config = UNetConfig(**AUTO, **UNET)
    alone = count_unet_alone(config, autoencoder.latent_channels, 16)
    both = count_unet(config, autoencoder, checkpointing=False)
    assert alone["bytes_per_image"] == both["bytes_per_image"] and alone["fixed_bytes"] < both["fixed_bytes"]


def test_what_does_not_fit_says_so():
    config = AutoencoderConfig(**AUTO)
    with pytest.raises(UserError, match=r"one image needs about .* GiB, and 0.0 GiB .* gradient_checkpointing true"):
        fitting_images(config, None, GIB // 100)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_batch_size": "auto"}, "auto needs images_per_step"),
        ({"images_per_step": 64, "gradient_accumulation_steps": 2}, "leave one of them out"),
        ({"images_per_step": 0}, "images_per_step is 0"),
    ],
)
def test_keys_that_do_not_go_together(keys, message):
    with pytest.raises(UserError, match=message):
        UNetConfig(dataset_name="embedded:mnist", **keys).validate()


def test_images_per_step_sets_the_accumulation():
    config = UNetConfig(dataset_name="embedded:mnist", train_batch_size=16, images_per_step=96)
    assert same_batch(config, None, 2).gradient_accumulation_steps == 3
    with pytest.raises(UserError, match="asks for 96 images, which is no multiple .* 16 times 4 processes = 64"):
        same_batch(config, None, 4)
    with pytest.raises(UserError, match="of 64 images, and images_per_step is 96"):
        same_batch(config, 64, 1)


def test_the_processes_must_divide_the_step(gpu):
    with pytest.raises(UserError, match="240 is no multiple of the 7 processes"):
        fit_to_processes(UNetConfig(**AUTO, **UNET), None, Processes(7), lambda *_: 9)


def test_auto_is_a_word_of_the_command_line(photos, tmp_path):
    assert parse_config(UNetConfig, ["--dataset_name", "x", "--train_batch_size", "32"]).train_batch_size == 32
    flags = {"train_data_dir": photos, "resolution": 16, "train_batch_size": "auto", "images_per_step": 96}
    text = launch("train_autoencoder.py", tmp_path, **flags, max_train_steps=2)
    assert "train_batch_size auto: 48 images at a time, 2 times a step" in text and "2 steps of 96 images" in text
    launch("train_autoencoder.py", tmp_path / "by_hand", **{**flags, "train_batch_size": 48}, max_train_steps=2)
    assert losses(tmp_path, "autoencoder") == losses(tmp_path / "by_hand", "autoencoder")
