"""Forecasts: closed forms of what a rehearsal measured, and of what is counted for a card."""

import dataclasses

import pytest

from latent_ddpm.config import AutoencoderConfig, UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.planning import cards
from latent_ddpm.planning.forecast import chapter_steps, fitting_share, forecast_seconds, forecast_stage, units_of_run
from latent_ddpm.planning.rehearsal import First, phases_of

SMALL = {"dataset_name": "embedded:mnist", "resolution": 32}
AUTOENCODER = AutoencoderConfig(
    **SMALL, block_out_channels=[16, 32], max_train_steps=100, validation_steps=40, checkpointing_steps=50,
    disc_weight=0.5, disc_start=60, disc_adaptive_steps=10, codebook_start=20, train_batch_size=8,
)  # fmt: skip
UNET = UNetConfig(
    **SMALL, unet_block_out_channels=[32], unet_layers_per_block=1, unet_attention_levels=[], max_train_steps=1000,
    train_batch_size=4, num_validation_samples=6, validation_steps=300, ema_snapshots=8,
)  # fmt: skip
IMAGES = {"train": 400, "validation": 20, "decoded": 420, "normalization": 10_000, "versions": 2}


def test_phases_cover_the_steps():
    phases = phases_of(AUTOENCODER)
    assert {name: (steps.start, steps.stop) for name, steps in phases.items()} == {
        "plain": (0, 20), "codes": (20, 60), "discriminator alone": (60, 70), "discriminator": (70, 100),
    }  # fmt: skip
    short = dataclasses.replace(AUTOENCODER, max_train_steps=50)
    assert list(phases_of(short)) == ["plain", "codes"]
    plain = AutoencoderConfig(**SMALL, disc_weight=0.5, disc_adaptive_steps=None, max_train_steps=10)
    assert phases_of(plain) == {"discriminator": range(10)}
    assert [len(steps) for steps in phases_of(UNET).values()] == [256, 744]


def test_units_of_a_run():
    units = units_of_run(AUTOENCODER, IMAGES)
    # validations after 40, 80 and 100 steps, of which the last one measures SSIM
    assert (units["evaluation"], units["last evaluation"], units["grid"], units["checkpoint"]) == (40, 20, 3, 2)
    assert (units["decode"], units["normalization"], units["export"]) == (420, 400, 1)
    units = units_of_run(UNET, IMAGES)
    assert (units["encode"], units["evaluation"], units["grid"], units["snapshot"]) == (820, 80, 24, 8)
    assert units_of_run(dataclasses.replace(UNET, ema_snapshots=0), IMAGES)["snapshot"] == 0


def rehearsed(config, seconds_of_phases, **events):
    phases = {
        name: {"rehearsed": 5, "seconds": seconds, "processor_seconds": seconds / 2}
        for name, seconds in zip(phases_of(config), seconds_of_phases, strict=True)
    }
    samples = {
        name: [{"units": u, "seconds": s, "processor_seconds": s / 2} for u, s in values]
        for name, values in events.items()
    }
    found = {"phases": phases, "events": samples, "images": IMAGES, "stops": 2}
    found["process"] = {"seconds": 100.0, "processor_seconds": 50.0}
    sizes = {"peak_bytes": 1000, "mapped_bytes": 100, "mapped_bytes_of_run": 400, "device_bytes": 10_000}
    return found | sizes | {"device_peak_bytes": None}


def test_each_phase_and_part_counts_in_proportion():
    events = {"decode": [(42, 2.0)], "evaluation": [(10, 9.0), (10, 1.0)], "trial": [(1, 3.0)]}
    events |= {"checkpoint": [(1, 0.5)]}
    found = rehearsed(AUTOENCODER, (1.0, 2.0, 3.0, 4.0), **events)
    seconds = forecast_seconds(AUTOENCODER, found)
    assert seconds["steps"] == 20 * 1 + 40 * 2 + 10 * 3 + 30 * 4
    assert seconds["decode"] == pytest.approx(20) and seconds["checkpoint"] == 1
    assert seconds["evaluation"] == pytest.approx(4)  # 0.1 s an image: the first one is slower
    # the rest of the process: steps of 5 x (1 + 2 + 3 + 4) s, 2 at 4 s, and the parts; 8 s of a slow first evaluation
    assert seconds["start and end"] == pytest.approx(100 - 50 - 8 - 2 - 2 - 3 - 0.5)
    stage = forecast_stage(AUTOENCODER, found)
    assert stage["seconds"] == pytest.approx(sum(seconds.values()))
    assert stage["processor_seconds"] == pytest.approx(stage["seconds"] / 2)
    assert stage["epochs"] == 2 and stage["images_per_second"] == pytest.approx(8 * 100 / 250)
    assert stage["memory_bytes"] == 1300  # the decoded images of the whole data are mapped


def test_a_longer_run_has_more_of_everything_that_repeats():
    found = rehearsed(AUTOENCODER, (1.0, 2.0, 3.0, 4.0), checkpoint=[(1, 1.0)], decode=[(42, 2.0)])
    long = dataclasses.replace(AUTOENCODER, max_train_steps=1000)
    now, then = forecast_seconds(AUTOENCODER, found), forecast_seconds(long, found)
    assert then["steps"] == now["steps"] + 900 * 4 and then["checkpoint"] == 10 * now["checkpoint"]
    assert then["decode"] == now["decode"] and then["start and end"] == now["start and end"]


def test_fitting_share():
    assert fitting_share(lambda share: 10 + 100 * share, 60) == pytest.approx(0.5)
    assert fitting_share(lambda share: 10 + 100 * share, 2010) == pytest.approx(20)
    assert fitting_share(lambda share: 10 + 100 * share, 9) == 0


def test_first_of_a_dataset():
    class Data:
        images = "x"

        def __len__(self):
            return 5

        def __getitems__(self, numbers):
            return numbers

    few = First(Data(), 3)
    assert len(few) == 3 and few.images == "x" and few.__getitems__([2]) == [2] and len(First(Data(), 9)) == 5


# ------------------------------------------------------------------------------------------------------- cards
@pytest.fixture(scope="module")
def on_card():
    counted = {}

    def forecast(config, card="H100", **counts):
        free = {"train_batch_size": 1, "max_train_steps": 1000, "disc_start": 1}
        key = str(dataclasses.replace(config, **{k: v for k, v in free.items() if hasattr(config, k)}))
        figures = counted[key] = counted.get(key) or cards.count_stage(config, AUTOENCODER)
        return cards.forecast_on_card(cards.card_of(card), config, figures, IMAGES | counts, 1e6), figures

    return forecast


def test_averages_and_checkpointing_and_muon_count(on_card):
    base, figures = on_card(UNET)
    one, _ = on_card(dataclasses.replace(UNET, ema_sigma_rels=[0.1]))
    assert base["device_memory_bytes"] - one["device_memory_bytes"] == 4 * figures["parameters"]
    large = dataclasses.replace(UNET, train_batch_size=4096)
    saving = dataclasses.replace(large, gradient_checkpointing=True)
    (full, _), (saved, _) = on_card(large, "T4"), on_card(saving, "T4")
    assert saved["device_memory_bytes"] < 0.8 * full["device_memory_bytes"]
    assert saved["flops"] > 1.3 * full["flops"] and saved["seconds"] > full["seconds"]
    muon, _ = on_card(dataclasses.replace(UNET, optimizer="muon"))
    assert muon["flops"] > base["flops"]


def test_discriminator_counts_from_its_start_on(on_card):
    flops = [on_card(dataclasses.replace(AUTOENCODER, disc_start=start))[0]["flops"] for start in (1, 50, 99)]
    without = on_card(dataclasses.replace(AUTOENCODER, disc_weight=0.0))[0]["flops"]
    assert flops[0] > flops[1] > flops[2] > without
    assert flops[0] - flops[1] == pytest.approx(flops[1] - flops[2], rel=1e-6)


def test_time_follows_the_peak_until_kernels_have_to_start(on_card):
    large = dataclasses.replace(UNET, train_batch_size=65536)
    slow, fast = (on_card(large, card)[0]["parts"]["steps"] for card in ("A100-80", "H100"))
    assert slow / fast == pytest.approx(989.5 / 312)
    small, figures = on_card(UNET)
    assert small["seconds_per_step"] == pytest.approx(figures["parameter_tensors"] * cards.START_WITH_SLOW_CORES[False])
    assert small["seconds_with_fast_cores"] < small["seconds"] and small["waits_for_kernels_to_start"]
    assert not on_card(large)[0]["waits_for_kernels_to_start"]


def test_fitting_batch_keeps_the_images_of_a_step():
    figures = {"fixed_bytes": 2 * 2**30, "bytes_per_image": 2**30, "optimizer_step_bytes": 0}
    config = dataclasses.replace(UNET, train_batch_size=16, gradient_accumulation_steps=2)
    assert cards.fitting_batch(config, figures, 10) == (4, 8)  # 7 fit, and 4 divides 32
    assert cards.fitting_batch(config, figures, 80) == (32, 1)
    assert cards.fitting_batch(config, figures, 3) is None


def test_disk_of_a_run(on_card):
    configs = {"autoencoder": AUTOENCODER, "unet": UNET}
    figures = {stage: on_card(config)[1] for stage, config in configs.items()}
    disk = cards.disk_on_card(configs, figures, IMAGES | {"latent_shape": cards.latent_shape(AUTOENCODER)})
    unet, first = 4 * figures["unet"]["parameters"], 4 * figures["autoencoder"]["parameters"]
    judge = figures["autoencoder"]["discriminator_bytes"]
    # two checkpoints of stage 1; of the U-Net, whose checkpointing_steps is 500, two
    assert disk["checkpoints"] == 2 * (4 * first + 3 * judge) + 2 * (5 * unet)
    assert disk["latents"] == 400 * (2 * 3 * 16 * 16 * 2 + 20) + 20 * (3 * 16 * 16 * 2 + 20)
    assert disk["snapshots of averages"] == 8 * 2 * unet // 2 and disk["decoded images"] == 420 * 32 * 32 * 3


def test_the_other_chapters_on_a_card_take_as_long_as_their_steps_and_keep_checkpoints(on_card):
    config = dataclasses.replace(UNET, self_guidance_steps=300, few_step_training_steps=600)
    plan, figures = on_card(config)
    for name, equivalent in chapter_steps(config).items():
        assert plan["parts"][name] == pytest.approx(equivalent * plan["seconds_per_step"])
    of_autoencoder, shape = on_card(AUTOENCODER)[1], cards.latent_shape(AUTOENCODER)
    disks = [
        cards.disk_on_card(
            {"unet": each}, {"unet": figures, "autoencoder": of_autoencoder}, IMAGES | {"latent_shape": shape}
        )
        for each in (UNET, config, dataclasses.replace(config, few_step_counts=[1, 4]))
    ]
    weights = 4 * figures["parameters"]
    assert "checkpoints, few steps" not in disks[0]
    assert disks[1]["checkpoints, self-guidance"] == 4 * weights
    assert (
        disks[1]["checkpoints, few steps"] == 2 * 4 * weights and disks[1]["pipeline-few-steps"] == disks[1]["pipeline"]
    )
    assert disks[2]["checkpoints, few steps"] == 2 * 7 * weights


def test_names_of_cards():
    assert cards.card_of("rtx4090").name == "RTX 4090" and cards.card_of("NVIDIA A100 80GB").name == "A100-80"
    assert cards.card_of("A100").memory_gib == 80
    with pytest.raises(UserError, match=r"--device H1000 is neither .* Did you mean H100\?"):
        cards.card_of("H1000")


def test_the_other_chapters_take_the_time_of_their_passes():
    config = UNetConfig(dataset_name="x", train_batch_size=32, self_guidance_steps=30, few_step_training_steps=60)
    fixed = dataclasses.replace(config, self_guidance_scale=2.0, few_step_counts=[1])
    # self-guidance: strong, weak, and 3 passes of the student; few steps: teacher, 3 of the critic, 3 of the generator
    assert chapter_steps(fixed) == {"self-guidance": pytest.approx(50), "few steps": pytest.approx(140)}
    # with 4 steps as well: 3 of the generator, 5 of the teacher
    assert chapter_steps(dataclasses.replace(fixed, few_step_counts=[1, 4]))["few steps"] == pytest.approx(300)
    tried = dataclasses.replace(config, self_guidance_scale="auto")
    assert chapter_steps(tried)["self-guidance"] > 50  # with scales to try
    guided = dataclasses.replace(fixed, conditions=["class"], guidance_scale=2.0)
    assert chapter_steps(guided)["self-guidance"] == pytest.approx(60)
    assert chapter_steps(dataclasses.replace(config, self_guidance_steps=0, few_step_training_steps=0)) == {}
