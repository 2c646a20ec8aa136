"""Problems of stage 1 are detected, reported and survived."""

import numpy as np
import pytest
import torch
from conftest import launch, losses
from PIL import Image
from safetensors.torch import load_file

from latent_ddpm.autoencoder.health import PATIENCE, Watch, check_images
from latent_ddpm.autoencoder.quantizers import EMACodebook, SimVQ
from latent_ddpm.config import AutoencoderConfig
from latent_ddpm.errors import UserError
from latent_ddpm.training.optim import clip_gradients, make_optimizer
from latent_ddpm.training.skipped import SKIPPED_IN_A_ROW, SkippedSteps

WELL = {"loss": 1.0, "discriminator_loss": 0.9, "adaptive_weight": 1.0, "logits_real": 0.1, "logits_fake": -0.1}


def watch(said, validation_positions=64_000, **options):
    config = AutoencoderConfig(dataset_name="x", **{"num_vq_embeddings": 512, **options})
    return Watch(said.append, validation_positions, config)


@pytest.mark.parametrize(
    ("ill", "words"),
    [
        ({"discriminator_loss": 0.001}, "tells every patch apart"),
        ({"logits_fake": -500.0}, "it diverges"),
        ({"logits_real": float("nan")}, "it diverges"),
        ({"adaptive_weight": 1e4}, "passes no gradient"),
        ({"logits_real": -0.22, "logits_fake": -0.23}, "cannot tell reconstructions from images"),
    ],
)
def test_an_ailment_that_stays_is_said_once_and_again_after_recovery(ill, words):
    said = []
    doctor = watch(said)
    for _ in range(PATIENCE):
        doctor.training(WELL)
    for _ in range(PATIENCE - 1):
        doctor.training(WELL | ill)
    doctor.training(WELL)
    assert said == []
    for round_ in range(2):
        for _ in range(4 * PATIENCE):
            doctor.training(WELL | ill)
        assert sum(words in sentence for sentence in said) == round_ + 1
        for _ in range(3 * PATIENCE):
            doctor.training(WELL)
    assert all(words in sentence for sentence in said)


def test_a_run_without_discriminator_is_watched_too():
    said = []
    doctor = watch(said)
    for loss in [1.0] * 20 + [0.2] * 20 + [0.5] * 40:
        doctor.training({"loss": loss})
    assert len(said) == 1 and "lengthen lr_warmup_steps" in said[0]


def test_validation_sees_grey_pictures_and_sleeping_codes():
    said = []
    bad = {"psnr": 12.0, "explained_variance": 0.05, "codebook_usage": 0.1}
    watch(said).validation(bad, progress=0.1)  # too early to tell
    assert said == []
    watch(said).validation(bad, progress=0.5)
    assert "5% of the variance" in said[0] and "Only 10% of the 512 codes" in said[1]
    said.clear()
    watch(said, quantizer="fsq").validation(bad | {"explained_variance": 0.9}, progress=0.5)
    assert "Raise fsq_balance_weight" in said[0] and "revive" not in said[0]
    said.clear()
    watch(said, validation_positions=512).validation(bad | {"explained_variance": 0.9}, progress=0.5)
    watch(said).validation({"psnr": 45.0, "explained_variance": 0.0}, progress=0.5)  # constant images, no codebook
    assert said == []


def test_images_that_do_not_differ_are_mentioned():
    said = []
    noise = torch.rand(4, 3, 8, 8) * 2 - 1
    check_images(noise, 1000, said.append)
    assert said == []
    check_images(noise[:1].expand(4, -1, -1, -1), 1000, said.append)
    check_images(noise[:, :, :1, :1].expand(-1, -1, 8, 8), 12, said.append)
    check_images(noise[:1], 1000, said.append)  # a batch of one image shows nothing about the others
    assert [s.split(":")[0].split(".")[0] for s in said] == [
        "The images of the first batch are all alike",
        "There are only 12 training images",
        "The images of the first batch are of one colour each",
    ]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_without_finite_gradients_does_nothing(name):
    torch.manual_seed(0)
    network = torch.nn.Linear(20, 16)
    optimizer = make_optimizer(network.parameters(), AutoencoderConfig(adam_weight_decay=0.1), 0.1, name)

    def step(gradient: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        network.weight.grad = torch.eye(16, 20) * gradient
        network.bias.grad = torch.full((16,), gradient)
        network.weight.grad[0, 0] = gradient
        norm, kept = clip_gradients(optimizer, 1.0)
        optimizer.step()
        states = [value for p in network.parameters() for value in optimizer.state[p].values()]
        return norm, kept, [x.detach().clone() for x in (*network.parameters(), *states)]

    _, _, before = step(1.0)
    for broken in (float("nan"), float("inf")):
        _, kept, after = step(broken)
        assert not kept and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    norm, kept, after = step(1.0)
    assert kept and norm == pytest.approx(32**0.5)
    assert not torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("kind", [EMACodebook, SimVQ])
def test_a_skipped_step_leaves_the_table_alone(kind):
    torch.manual_seed(0)
    quantizer = kind(8, 3, revive_below=0.5)
    quantizer.initialize(torch.randn(4, 3, 4, 4))
    quantizer(torch.randn(4, 3, 4, 4))
    quantizer.update(0)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(torch.full((4, 3, 4, 4), float("nan")))
    counts = quantizer.update(1, torch.tensor(False))
    assert counts.sum() == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantizer.state_dict().items())
    quantizer(torch.randn(4, 3, 4, 4))
    assert quantizer.update(2, torch.tensor(True)).sum() == 64


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    cpu, said = torch.device("cpu"), []
    steps, scaled = SkippedSteps("autoencoder", None, cpu), SkippedSteps("discriminator", None, cpu, scaled=True)
    for kept in [True, False, False, True] + [False] * (SKIPPED_IN_A_ROW - 1):
        for counter in (steps, scaled):
            counter.add(torch.tensor(kept))
            counter.report(said.append)
    words = [s.split(" were")[0] for s in said if "autoencoder" in s]
    assert [s.split()[2] for s in words] == ["1", "2", "4", "8", "16"]
    assert len(said) == 6 and "16 so far" in said[5] and "lower disc_learning_rate" in said[5]
    resumed = SkippedSteps("U-Net", steps.counts, cpu)
    resumed.add(torch.tensor(False))
    with pytest.raises(UserError, match=f"U-Net were not finite in the last {SKIPPED_IN_A_ROW} steps"):
        resumed.report(said.append)


# ------------------------------------------------------------------------------------------------- real processes
def picture(rng, kind):
    small = {
        "photos": rng.integers(0, 255, (4, 4, 3), dtype=np.uint8),
        "constant": np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5,
        "one colour": np.broadcast_to(rng.integers(0, 255, (1, 1, 3), dtype=np.uint8), (4, 4, 3)),
        "black": np.zeros((4, 4, 3), dtype=np.uint8),
    }[kind]
    return Image.fromarray(np.ascontiguousarray(small)).resize((16, 16), Image.Resampling.BILINEAR)


@pytest.mark.parametrize(
    ("kind", "count", "flags", "words"),
    [
        ("photos", 120, {"learning_rate": 2e-2}, "Reconstructions are little better than one grey image"),
        ("photos", 120, {"train_batch_size": 2}, "Reconstructions are little better than one grey image"),
        ("constant", 40, {}, "The images of the first batch are all alike"),
        ("one colour", 40, {}, "of one colour each"),
        ("black", 40, {"disc_norm": "actnorm", "disc_loss": "non_saturating"}, "of one colour each"),
        ("photos", 5, {"disc_r1_weight": 1.0, "disc_lecam_weight": 0.1}, "only 4 training images"),
    ],
    ids=["learning rate 10 times too high", "batch of 2", "constant", "one colour", "black", "5 images in all"],
)
def test_an_adversary_gets_a_message_and_finite_weights(tmp_path, kind, count, flags, words):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(count):
        picture(rng, kind).save(tmp_path / "images" / f"{i:03d}.png")
    options = {"learning_rate": 2e-3, "max_train_steps": 60, "validation_steps": 30, "checkpointing_steps": 60}
    options |= {"disc_weight": 0.5, "disc_start": 30, "disc_ramp_steps": 10, "disc_channels": 8, "disc_layers": 1}
    options |= {"disc_adaptive_steps": 4}
    out = tmp_path / "out"
    text = launch("train_autoencoder.py", out, train_data_dir=tmp_path / "images", resolution=16, **options | flags)
    assert words in text and "Traceback" not in text
    saved = [*out.rglob("*.safetensors")]
    assert len(saved) == 2
    for path in saved:
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path


@pytest.mark.parametrize("script", ["train_autoencoder.py", "train_unet.py"])
def test_a_run_that_cannot_go_on_says_so_and_saves_no_nan(photos, tmp_path, script):
    options = {"train_data_dir": photos, "resolution": 16}
    if script == "train_unet.py":
        launch("train_autoencoder.py", tmp_path, max_train_steps=3, **options)
    text = launch(script, tmp_path, 2, learning_rate=1e30, max_train_steps=60, checkpointing_steps=10, **options)
    assert text.count("Steps skipped: ") == 5  # 1, 2, 4, 8, 16
    assert "not finite in the last 25 steps" in text and "a lower learning_rate" in text
    assert "Traceback" not in text
    assert len(losses(tmp_path, script[len("train_") : -len(".py")])) < 5  # JSON has no NaN
    for path in tmp_path.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
