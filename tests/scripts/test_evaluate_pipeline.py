"""scripts/evaluate.py pipeline: real processes on a training set that the pipeline knows by heart."""

import functools
import hashlib
import importlib.util
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, finished, run_script
from diffusers import DPMSolverMultistepScheduler
from PIL import Image
from small_pipeline import make, save_pipeline

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.diffusion.sampling import draw_shared, load_pipeline, with_scheduler
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.digits import train_digit_classifier
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png
from pipeline_latent_ddpm import RECORDED_STEPS

spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts" / "evaluate.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

COUNT, BATCH, SEED = 18, 4, 5  # five batches, the last one short: on two processes one of them has nothing in the end
SETTINGS = ["--num_images", COUNT, "--batch_size", BATCH, "--seed", SEED]
SETTINGS += ["--schedulers", "ddim", "dpmsolver++-sde", "--steps", 2]
LAUNCHER = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def evaluate(launcher, *words):
    if not launcher:
        return run_script("evaluate.py", "pipeline", *words).stdout
    done = finished([sys.executable, *launcher, "scripts/evaluate.py", "pipeline", *map(str, words)])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a pipeline, and as its training set what that draws with dpmsolver++-sde and 2 steps."""
    folder = tmp_path_factory.mktemp("run")
    pipe = load_pipeline(str(save_pipeline(folder / "pipeline")))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = with_scheduler(pipe.scheduler, "dpmsolver++-sde")
    drawn = draw_shared(pipe, SEED, COUNT, BATCH, 2)
    for i, image in enumerate(drawn):
        save_png(Image.fromarray(image[0].numpy()), folder / "images" / f"{i:02d}.png")
    return folder, drawn


@pytest.fixture(scope="module")
def config(run):
    words = ["--train_data_dir", run[0] / "images", "--output_dir", run[0], "--resolution", 16, "--image_channels", 1]
    return [str(word) for word in [*words, "--validation_fraction", 0.1, "--dataloader_num_workers", 0]]


@pytest.fixture(scope="module")
def measured(run, config):
    return evaluate([], *config, *SETTINGS, "--reconstructions", "--json", run[0] / "new" / "one.json")


def read(run, name):
    return json.loads((run[0] / "new" / f"{name}.json").read_text())


def test_every_setting_is_measured_and_memorising_is_seen(run, measured):
    result = read(run, "one")
    assert [(s["scheduler"], s["steps"]) for s in result["settings"]] == [("ddim", 2), ("dpmsolver++-sde", 2)]
    for figures in result["settings"]:
        assert figures["feature_extractor"] == "efficientnet-lite0" and figures["images_per_second"] > 0
        assert (figures["samples"], figures["reals"], figures["kid_subset_size"]) == (18, 16, 16)
        copied = figures is result["settings"][1]
        assert (figures["neighbour_distance_over_held_out"] < 1e-3) == copied
        assert (figures["precision"] > 0.9 and figures["coverage"] == 1) or not copied
        assert figures["fd"] > 3 * result["settings"][1]["fd"] or copied
        assert figures["neighbour_distance"] == pytest.approx(
            figures["neighbour_distance_over_held_out"] * result["held_out_neighbour_distance"]
        )
    # the training set was drawn by this autoencoder's decoder; its random encoder loses some of it
    assert result["reconstructions"]["fd"] > 0 and "Frechet distance of reconstructions: " in measured
    assert result["compared_with"] == "16 of 16 training images, a fixed random choice"
    assert result["held_out_images"] == 2 and result["held_out_neighbour_distance"] > 1
    assert result["neighbours_shown"] == "dpmsolver++-sde, 2 steps"
    assert (result["seed"], result["batch_size"], result["processes"]) == (SEED, BATCH, 1)
    assert result["command"].startswith("python scripts/evaluate.py pipeline --train_data_dir ")
    table = [line.split() for line in measured.splitlines()]
    assert table[0][:4] == ["scheduler", "steps", "fd", "kid"] and len(table) == 4
    assert table[1][:2] == ["ddim", "2"] and table[1][2] == f"{result['settings'][0]['fd']:.4g}"


def test_pictures_and_features_lie_where_they_should(run, measured):
    folder, drawn = run
    for name in ("one.png", "one-neighbours.png"):
        assert Image.open(folder / "new" / name).size[0] > 500
    sheet = np.asarray(Image.open(folder / "new" / "one-samples.png"))
    wanted = np.asarray(make_grid(drawn[:16].float() / 127.5 - 1, columns=16))
    np.testing.assert_array_equal(sheet[18:38], wanted)  # the second setting's row
    assert len(list((folder / "cache" / "features").glob("efficientnet-lite0-*.safetensors"))) == 2


def test_two_processes_draw_and_measure_what_one_does(run, config, measured):
    evaluate(LAUNCHER, *config, *SETTINGS, "--json", run[0] / "new" / "two.json")
    one, two = (read(run, name) for name in ("one", "two"))
    assert two["processes"] == 2 and two["command"].startswith("accelerate launch --cpu --num_processes 2 scripts/")
    for a, b in zip(one["settings"], two["settings"], strict=True):
        assert a["samples_sha256"] == b["samples_sha256"]
        assert a["fd"] == pytest.approx(b["fd"], rel=1e-3)
    files = [(run[0] / "new" / f"{name}-samples.png").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert len({figures["samples_sha256"] for figures in one["settings"]}) == 2


def test_defaults_are_the_pipelines_own_and_a_sweep_is_the_cross_product(run, config):
    options, parsed = script.pipeline_options([*config, "--num_inference_steps", "7"])
    assert options.pipelines == [str(run[0] / "pipeline")] and options.num_images == 5000
    pipe, sweep = script.load_for(options, parsed, *options.pipelines)
    assert sweep == [("DDIMScheduler", pipe.scheduler, 7, None)]
    options, parsed = script.pipeline_options([*config, "--schedulers", "heun", "ddim", "--steps", "9", "3"])
    _, sweep = script.load_for(options, parsed, *options.pipelines)
    assert [(name, steps) for name, _, steps, _ in sweep] == [("heun", 9), ("heun", 3), ("ddim", 9), ("ddim", 3)]
    assert type(sweep[0][1]).__name__ == "HeunDiscreteScheduler"


def few_step_scheduler(steps):
    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_end=0.012, solver_order=1)
    scheduler.register_to_config(**{RECORDED_STEPS: steps})
    return scheduler


def test_a_few_step_pipeline_is_measured_as_it_draws(config, tmp_path):
    folder = str(save_pipeline(tmp_path / "pipeline-few-steps", few_step_scheduler(4)))
    options, parsed = script.pipeline_options([*config, "--pipeline", folder])
    pipe, sweep = script.load_for(options, parsed, *options.pipelines)
    assert sweep == [("DPMSolverMultistepScheduler", pipe.scheduler, 4, None)]
    words = ["--pipeline", folder, "--steps", "1", "2"]
    options, parsed = script.pipeline_options([*config, *words])
    _, sweep = script.load_for(options, parsed, *options.pipelines)
    assert [steps for _, _, steps, _ in sweep] == [1, 2]


def test_several_pipelines_draw_from_the_same_noise(run, config, tmp_path):
    folders = [str(run[0] / "pipeline"), str(save_pipeline(tmp_path / "pipeline-few-steps", few_step_scheduler(4)))]
    path = tmp_path / "both.json"
    words = ["--num_images", 6, "--pipeline", *folders, "--num_inference_steps", 3, "--json", path]
    table = [line.split() for line in evaluate([], *config, *words).splitlines()]
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [(s["pipeline"], s["steps"]) for s in result["settings"]] == [(folders[0], 3), (folders[1], 4)]
    assert "pipeline" not in result and {row[0] for row in table[1:]} == set(folders)
    for setting in result["settings"]:
        pipe = load_pipeline(setting["pipeline"])
        drawn = draw_shared(pipe, 0, 6, 100, setting["steps"])
        assert setting["samples_sha256"] == hashlib.sha256(drawn.numpy().tobytes()).hexdigest()
    assert [script.name_of_setting(s, result["settings"]) for s in result["settings"]] == folders
    assert path.with_suffix(".png").exists()


def test_pipelines_with_different_conditions_are_refused(config, tmp_path):
    folders = [tmp_path / "cats-first", tmp_path / "dogs-first"]
    for folder, names in zip(folders, (["cat", "dog"], ["dog", "cat"]), strict=True):
        make("class", class_names=names).save_pretrained(folder)
    words = [*config[:-6], "--conditions", "[class]", "--pipeline", *map(str, folders)]
    with pytest.raises(UserError, match="different conditions"):
        script.measure_pipeline(words)


@pytest.mark.parametrize(("words", "steps", "scale"), [
    (["--guidance_scale", "3"], None, 3.0),
    (["--guidance_scale", "3", "--self_guidance_steps", "5"], None, 1.0),  # guided by its weights
    (["--guidance_scale", "3"], 4, 1.0),
])  # fmt: skip
def test_nothing_is_guided_twice(config, words, steps, scale, tmp_path):
    pipe = make("class")
    pipe.scheduler = few_step_scheduler(steps)
    pipe.save_pretrained(tmp_path)
    words = [*config[:-6], "--conditions", "[class]", *words, "--pipeline", str(tmp_path)]
    options, parsed = script.pipeline_options(words)
    _, sweep = script.load_for(options, parsed, *options.pipelines)
    assert [setting[-1] for setting in sweep] == [scale]


def test_a_part_of_the_training_images_is_a_fixed_random_choice(run, config, tmp_path):
    _, parsed = script.pipeline_options(config)
    network = torch.nn.Flatten()  # pixels as features
    wrapped = lambda images: (network(images.float()),)  # noqa: E731
    part, whole = (
        script.read_reals(parsed, 6, most, "pixels", wrapped, torch.device("cpu"), tmp_path) for most in (8, None)
    )
    assert len(part.train) == 8 and len(whole.train) == 16 and part.held_out == whole.held_out == 2
    rows = {tuple(row) for row in whole.train.int().tolist()}
    assert {tuple(row) for row in part.train.int().tolist()} < rows
    for row, index in zip(part.train[:3], part.indices[:3], strict=True):
        pixels = part.images.get(int(index)).expand(3, -1, -1).flatten().float()
        assert torch.equal(row, pixels)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedulers", "ddim", "eulr"], "eulr is unknown; did you mean euler"),
        (["--num_images", "5"], "--num_images is 5; it must be at least 6"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--steps", "10", "0"], "--steps is 0"),
        (["--steps", "1001"], "more than the 1000 that the model was trained with"),
        (["--resolution", "32"], "draws images of 1x16x16, but the config has 1x32x32"),
        (["--pipeline", "./nowhere"], "there is no folder ./nowhere"),
        (["--output_dir", "elsewhere"], "There is no pipeline in elsewhere/pipeline. Run train_unet.py first"),
        (["--sede", "1"], "Unknown option --sede"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(config, words, message, monkeypatch):
    monkeypatch.setattr(script, "make_accelerator", lambda _: pytest.fail("it was not refused"))
    with pytest.raises(UserError, match=message):
        script.measure_pipeline([*config, *words])


def test_missing_packages_are_named_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="the package torch_fidelity: pip install"):
        script.measure_pipeline(["--config", "absent.yaml"])


def test_too_few_images_to_compare_with(run, tmp_path):
    for i in range(5):
        save_png(Image.fromarray(np.full((16, 16), 40 * i, np.uint8)), tmp_path / "few" / f"{i}.png")
    words = ["--train_data_dir", tmp_path / "few", "--output_dir", tmp_path, "--resolution", 16]
    config = parse_config(UNetConfig, [str(word) for word in words])
    with pytest.raises(UserError, match="only 4 training images; at least 6"):
        script.read_reals(config, 6, None, "efficientnet-lite0", torch.nn.Identity(), torch.device("cpu"), tmp_path)


@pytest.mark.parametrize(("shift", "classes"), [(0, True), (8, False)])
def test_digits_are_judged_by_their_class_and_their_silhouette(tmp_path, monkeypatch, shift, classes):
    """A pipeline that draws just what it is asked for, or that beside its place."""

    def drawn(pipe, seed, count, batch_size, steps, given, **inputs):
        asked.update(given)
        return (given["conditioning_image"][:, None].roll(shift, 3) * 255).to(torch.uint8)

    asked = {}
    pipe = SimpleNamespace(
        class_names=[str(digit) for digit in range(10)] if classes else None,
        conditioning_channels=2,
        takes_text=False,
        recorded_steps=None,
        scheduler="one",
        set_progress_bar_config=lambda disable: None,
    )
    monkeypatch.setattr(script, "load_pipeline", lambda name: pipe)
    monkeypatch.setattr(script, "draw_shared", drawn)
    monkeypatch.setattr(script, "train_digit_classifier", functools.partial(train_digit_classifier, epochs=1))
    script.measure_digits([str(tmp_path), "--num_images", "100"])
    result = json.loads((tmp_path.parent / "evaluation-digits.json").read_text())
    assert result["images"] == 100 and ("class_agreement" in result) == classes == ("class_labels" in asked)
    assert result["iou"] == 1 if shift == 0 else result["iou"] < 0.5
    if classes and not shift:
        assert result["class_agreement"] > 0.7  # silhouettes are nearly digits
    with Image.open(tmp_path.parent / "evaluation-digits-samples.png") as picture:
        rows = np.asarray(picture.convert("L"))
    assert rows.shape == (4 * 34 + 2, 16 * 34 + 2)
    assert np.array_equal(rows[2:34], rows[36:68]) == (shift == 0) and rows[2:34].max() == 255


def test_a_pipeline_that_enlarges_is_known_by_its_conditioning_images(run, config, tmp_path):
    """Whose PSNR is that of samples made small again: what is lost within a latent's pixels does not count."""
    pipe = SimpleNamespace(class_names=None, conditioning_channels=2, takes_text=False)
    alone = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
    (tmp_path / "other").mkdir()
    for path in (run[0] / "images").iterdir():
        Image.eval(Image.open(path), lambda value: 255 - value).save(tmp_path / "other" / path.name)

    def asked(folder):
        _, parsed = script.pipeline_options([*config, "--conditions", "[image]", "--conditioning_image_dir", folder])
        return script.conditions_of(parsed, pipe, 20, None, alone), parsed

    (given, labels, enlarges), parsed = asked(str(run[0] / "images"))
    (others, _, enlarges_others), _ = asked(str(tmp_path / "other"))
    assert enlarges and not enlarges_others and labels is None
    images = given["conditioning_image"]
    assert images.shape == (20, 1, 16, 16)
    torch.testing.assert_close(others["conditioning_image"], 1 - images)

    flat = script.asked_images(images, parsed, (4, 4))
    blocks = images.view(20, 1, 4, 4, 4, 4).mean((3, 5)) * 2 - 1
    torch.testing.assert_close(flat[:, :, ::4, ::4], blocks)
    torch.testing.assert_close(flat[:, :, 3::4, 3::4], blocks)
    assert (script.psnr_when_small(flat, images * 2 - 1, (4, 4)) > 90).all()
    assert (script.psnr_when_small(flat, images * 2 - 1, (16, 16)) < 60).all()
    shifted = script.psnr_when_small(flat.clamp(-1, 0.8) + 0.2, flat.clamp(-1, 0.8), (4, 4))
    torch.testing.assert_close(shifted, torch.full((20,), 20.0))  # 0.1 of the range of values: 20 dB


def test_maps_are_shown_as_grays():
    config = UNetConfig(dataset_name="x", resolution=4, image_channels=3, conditioning_image_classes=3)
    shown = script.asked_images(torch.tensor([0, 1, 2, 0]).view(1, 2, 2), config, (2, 2))
    assert shown.shape == (1, 3, 2, 2) and shown[0, 2].flatten().tolist() == [-1, 0, 1, -1]
