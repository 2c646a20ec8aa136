"""Conditioning: U-Net inputs, dropout, guidance; runs resume and exports load with it."""

import itertools
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    assert_same_tensors,
    checkpoint_tensors,
    environment,
    launch,
    launch_and_stop,
    losses,
    run_script,
)
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latent_ddpm.config import UNetConfig
from latent_ddpm.data.images import nearest_square
from latent_ddpm.data.latents import record_type
from latent_ddpm.diffusion.conditions import ClassCondition, Conditions, unet_inputs
from latent_ddpm.errors import UserError
from pipeline_latent_ddpm import LatentDDPMPipeline, class_shares, guidance_weights, image_channels

CLASSES, MAP_CLASSES = 3, 2


def tiny_unet(classes=CLASSES, channels=MAP_CLASSES, seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8, in_channels=3 + channels, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, num_class_embeds=classes + 1 if classes else None,
    ).eval().requires_grad_(False)  # fmt: skip


def tiny_pipeline(classes=CLASSES, channels=MAP_CLASSES, conditioning_classes=MAP_CLASSES, **changes):
    torch.manual_seed(1)
    vqvae = VQModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=16, mid_block_add_attention=False, scaling_factor=1.0,
    ).eval().requires_grad_(False)  # fmt: skip
    words = {"class_names": ["cat", "dog", "frog"]} if classes else {}
    if channels:
        words["conditioning_classes"] = conditioning_classes
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    pipe = LatentDDPMPipeline(vqvae, tiny_unet(classes, channels), scheduler, **{**words, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def draw(pipe, count=2, steps=3, **words):
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipe(batch_size=count, num_inference_steps=steps, latents=noise, output_type="latent", **words).images


def a_map(value=1, side=16):
    pixels = np.zeros((side, side), dtype=np.uint8)
    pixels[: side // 2] = value
    return pixels


def asked(pipe, **words):
    """The U-Net's inputs while two images are drawn: batch and labels of each call."""
    calls = []

    def note(module, arguments, keywords):
        calls.append((arguments[0], keywords.get("class_labels")))

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        draw(pipe, **words)
    finally:
        hook.remove()
    return calls


# ------------------------------------------------------------------------------------------------- guidance


@settings(deadline=None)
@given(scales=st.lists(st.floats(-3, 9), min_size=0, max_size=3))
def test_guidance_weights_are_those_of_the_sum_of_steps(scales):
    values = np.random.default_rng(0).normal(size=len(scales) + 1)
    steps = values[0] + sum(s * (values[k + 1] - values[k]) for k, s in enumerate(scales))
    assert np.isclose(np.dot(guidance_weights(scales), values), steps)
    assert np.isclose(sum(guidance_weights(scales)), 1)


@pytest.mark.parametrize(
    ("scale", "calls"),
    [(1.0, 1), (0.0, 1), (3.0, 2), ({"class_labels": 2.0}, 2), ({"class_labels": 2.0, "conditioning_image": 4.0}, 3)],
)
def test_guidance_is_the_formula_with_no_prediction_more_than_it_needs(pipe, scale, calls):
    words = {"class_labels": ["dog", "frog"], "conditioning_image": [Image.fromarray(a_map())] * 2}
    seen = asked(pipe, guidance_scale=scale, steps=1, **words)
    assert len(seen) == 1 and len(seen[0][0]) == 2 * calls
    t, noisy = torch.tensor(500), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    labels, nobody = torch.tensor([1, 2]), torch.full((2,), CLASSES)
    image = class_shares(torch.from_numpy(a_map())[None].expand(2, 16, 16), MAP_CLASSES, (8, 8))

    def predict(labels, image):
        return pipe.unet(torch.cat((noisy, image), 1), t, class_labels=labels).sample

    of_class, of_image = (scale, scale) if isinstance(scale, float) else (
        scale.get("class_labels", 1.0), scale.get("conditioning_image", 1.0))  # fmt: skip
    none, first, both = predict(nobody, 0 * image), predict(nobody, image), predict(labels, image)
    expected = none + of_image * (first - none) + of_class * (both - first)
    given = {"class_labels": labels, "conditioning_image": image}
    found = pipe._predict(noisy, t, given, pipe._read_guidance(scale, None), None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_scale_0_is_no_condition_and_labels_matter(pipe):
    plain = draw(pipe)
    torch.testing.assert_close(draw(pipe, class_labels=[1, 2], guidance_scale=0.0), plain)
    torch.testing.assert_close(draw(pipe, class_labels=-1), plain)
    assert not torch.allclose(draw(pipe, class_labels=[1, 2]), plain, atol=1e-3)
    assert not torch.allclose(draw(pipe, class_labels=[1, 2]), draw(pipe, class_labels=[2, 1]), atol=1e-3)


def test_guidance_within_an_interval_of_noise(pipe):
    words = {"class_labels": [0, 1], "guidance_scale": 3.0}
    guided, plain = draw(pipe, **words), draw(pipe, class_labels=[0, 1])
    assert torch.equal(draw(pipe, guidance_interval=(0.0, 1e9), **words), guided)
    assert torch.equal(draw(pipe, guidance_interval=(1e8, 1e9), **words), plain)
    sizes = [len(call[0]) for call in asked(pipe, steps=8, guidance_interval=(0.3, 3.0), **words)]
    assert set(sizes) == {2, 4} and sizes == sorted(sizes[:4]) + sorted(sizes[4:], reverse=True)  # only in the middle


def test_autoguidance(pipe):
    labels = {"class_labels": [0, 1]}
    plain, weak = draw(pipe, **labels), tiny_unet(seed=9)
    torch.testing.assert_close(draw(pipe, guidance_unet=pipe.unet, guidance_scale=3.0, **labels), plain)
    torch.testing.assert_close(draw(pipe, guidance_unet=weak, guidance_scale=1.0, **labels), plain)
    other = tiny_pipeline()
    other.unet = weak
    torch.testing.assert_close(draw(pipe, guidance_unet=weak, guidance_scale=0.0, **labels), draw(other, **labels))
    unconditional = tiny_pipeline(classes=0, channels=0)  # autoguidance is its only guidance
    stronger = draw(unconditional, guidance_unet=tiny_unet(0, 0, seed=9), guidance_scale=2.0)
    assert not torch.allclose(stronger, draw(unconditional), atol=1e-3)


# ---------------------------------------------------------------------------------------- arguments of __call__


def test_class_labels_in_every_form(pipe):
    wanted = draw(pipe, class_labels=[2, 1])
    for form in (["frog", "dog"], ["frog", 1], torch.tensor([2, 1]), (2, "dog")):
        assert torch.equal(draw(pipe, class_labels=form), wanted)
    assert torch.equal(draw(pipe, class_labels="frog"), draw(pipe, class_labels=[2, 2]))
    assert len(pipe(class_labels=["cat", "dog", "frog"], num_inference_steps=1).images) == 3


def test_conditioning_images_in_every_form(pipe):
    maps = torch.from_numpy(np.stack([a_map(), np.ascontiguousarray(a_map().T)])).long()
    wanted = draw(pipe, conditioning_image=maps)
    images = [Image.fromarray(m.numpy().astype(np.uint8)) for m in maps]
    palette = [image.convert("P") for image in images]
    for image, original in zip(palette, images, strict=True):
        image.putdata(list(original.tobytes()))
    larger = [image.resize((64, 64), Image.Resampling.NEAREST) for image in images]
    channels = class_shares(maps, MAP_CLASSES, (8, 8))
    for form in (images, palette, larger, maps.to(torch.uint8), channels):
        assert torch.equal(draw(pipe, conditioning_image=form), wanted)
    assert torch.equal(draw(pipe, conditioning_image=images[0])[0], draw(pipe, conditioning_image=images[:1] * 2)[0])
    assert not torch.allclose(wanted, draw(pipe), atol=1e-3)


def test_conditioning_images_that_are_images():
    pipe = tiny_pipeline(classes=0, channels=4, conditioning_classes=None)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted = draw(pipe, conditioning_image=image)
    torch.testing.assert_close(draw(pipe, conditioning_image=image_channels(image * 2 - 1, (8, 8))), wanted)
    black = draw(pipe, conditioning_image=torch.zeros(2, 3, 16, 16))
    assert not torch.allclose(black, draw(pipe), atol=1e-3)  # black is not the null condition


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"class_labels": "drog"}, "there is no class 'drog'; did you mean '(dog|frog)'"),
        ({"class_labels": [0, 3]}, "from 0 to 2, or -1 for no class, got 3"),
        ({"class_labels": [0, 1, 2]}, "class_labels: got 3 for 2 images"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"conditioning_image": Image.new("RGB", (16, 16))}, "a semantic map has one channel"),
        ({"conditioning_image": Image.fromarray(a_map(5))}, "classes 0 to 1, got 0 to 5"),
        ({"conditioning_image": torch.zeros(16, 16)}, "semantic maps are integers"),
        ({"guidance_scale": {"klass": 2.0}}, "a dict of conditioning_image, class_labels, prompt; got klass"),
    ],
)
def test_what_the_call_refuses(pipe, words, message):
    with pytest.raises(ValueError, match=message):
        draw(pipe, **words)


@pytest.mark.parametrize("name", ["class_labels", "conditioning_image"])
def test_an_unconditional_model_takes_no_conditions(name):
    with pytest.raises(ValueError, match=f"{name}: this model"):
        draw(tiny_pipeline(classes=0, channels=0), **{name: [0, 1]})


# ------------------------------------------------------------------------------------------ conditions in training


def test_classes_are_left_out_as_often_as_asked_and_by_number_alone():
    labels = np.arange(4000) % 4 - 1  # -1: unknown
    conditions = Conditions([ClassCondition(["a", "b", "c"], 0.25)], seed=3)
    records, numbers = np.zeros(4000, dtype=record_type((1, 1, 1, 1))), torch.arange(4000)
    records["label"] = labels
    found = conditions.given(records, None, numbers)["class_labels"].numpy()
    assert set(found[labels == -1]) == {3}
    known = labels >= 0
    left_out = found[known] == 3
    assert abs(left_out.mean() - 0.25) < 0.03 and np.array_equal(found[known][~left_out], labels[known][~left_out])
    part = conditions.given(records[100:110], None, numbers[100:110])["class_labels"].numpy()
    assert np.array_equal(part, found[100:110])
    assert np.array_equal(conditions.given(records)["class_labels"].numpy()[known], labels[known])


def test_no_conditions_ask_for_nothing():
    conditions = Conditions([], seed=0)
    noisy = torch.randn(2, 3, 4, 4)
    assert not conditions and conditions.given(None) == {} and conditions.shown(None, 4, 1.0) == {}
    sample, words = unet_inputs(noisy, {})
    assert sample is noisy and words == {}


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(2, 5), factor=st.integers(1, 4), seed=st.integers(0, 99))
def test_class_shares(classes, factor, seed):
    maps = torch.randint(classes, (2, 4 * factor, 4 * factor), generator=torch.Generator().manual_seed(seed))
    shares = class_shares(maps, classes, (4, 4))
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 4, 4))
    corner = maps[0, :factor, :factor]
    expected = torch.stack([(corner == k).float().mean() for k in range(classes)])
    torch.testing.assert_close(shares[0, :, 0, 0], expected)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "1"])
def test_maps_keep_their_values_at_any_size(mode):
    values = np.zeros((30, 50), dtype=np.uint8)
    values[:, 25:] = 1
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.new("P", (50, 30))
        image.putdata(values.flatten().tolist())
    elif mode == "1":
        image = Image.fromarray(values.astype(bool))
    elif mode != "L":
        image = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    square = nearest_square(image, 8)
    assert square.shape == (8, 8) and square[:, :4].max() == 0 and square[:, 4:].min() == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conditions": ["class", "class"]}, "names each kind once"),
        ({"guidance_scale": 2.0}, "guidance_scale is for conditions"),
        ({"conditions": ["image"]}, "set one of conditioning_image_column and conditioning_image_dir"),
        ({"conditioning_image_column": "x"}, "conditioning_image_column is for conditions that have image"),
        ({"conditioning_image_classes": 3}, "conditioning_image_classes is for conditions that have image"),
        ({"conditions": ["image"], "conditioning_image_dir": "x"}, "conditioning_image_dir needs a train_data_dir"),
        ({"conditions": ["image"], "conditioning_image_column": "x", "conditioning_image_classes": 1}, "from 2 to 256"),
        ({"conditions": ["class"], "class_dropout": 1.0}, "class_dropout"),
        ({"conditions": ["image"], "conditioning_image_column": "x", "streaming": True}, "streamed keeps labels"),
    ],
)
def test_impossible_configs(values, message):
    with pytest.raises(UserError, match=message):
        UNetConfig(dataset_name="somebody/images", **values).validate()


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 images in two folders, bright in the upper or lower half and some at the right; maps, twice as large."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(40):
        name, upper = ("bird" if i % 2 else "fish") + f"/{i:02d}", rng.random() < 0.5
        where = np.zeros((16, 16), dtype=np.uint8)
        where[:8] = upper
        where[8:] = not upper
        where[:, 12:] = i % 3 == 0
        pixels = rng.integers(0, 80, (16, 16, 3)) + 150 * where[..., None]
        for folder, content, suffix in (("images", pixels.astype(np.uint8), "png"), ("maps", where, "bmp")):
            path = root / folder / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(content)
            image.resize((32, 32), Image.Resampling.NEAREST).save(path) if folder == "maps" else image.save(path)
    return root


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run") / "out"
    flags = {"train_data_dir": data / "images", "resolution": 16, "random_flip": "true", "max_train_steps": 4}
    launch("train_autoencoder.py", output_dir, **flags)
    flags |= {"conditions": "[class,image]", "conditioning_image_dir": data / "maps", "conditioning_image_classes": 2}
    flags |= {"unet_dropout": 0, "guidance_scale": 2.0, "validation_steps": 4, "checkpointing_steps": 2}
    flags |= {"autoencoder": output_dir / "autoencoder"}
    launch("train_unet.py", output_dir, **flags)
    return output_dir, flags


def test_a_run_that_is_killed_and_gone_on_with_ends_in_the_same_bits(trained, tmp_path):
    output_dir, flags = trained
    launch_and_stop("train_unet.py", tmp_path, 3, signal.SIGKILL, **flags)
    launch("train_unet.py", tmp_path, **flags)
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 4), checkpoint_tensors(tmp_path, "unet", 4))
    assert losses(output_dir, "unet") == losses(tmp_path, "unet")


def test_two_processes_see_the_same_conditions(trained, tmp_path):
    output_dir, flags = trained
    launch("train_unet.py", tmp_path, processes=2, **{**flags, "train_batch_size": 4})
    one, two = losses(output_dir, "unet"), losses(tmp_path, "unet")
    assert one.keys() == two.keys() and max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4


def test_mirrored_images_have_mirrored_maps(trained):
    from latent_ddpm.data.latents import images_for_run
    from latent_ddpm.diffusion.conditions import make_conditions

    output_dir, flags = trained
    config = UNetConfig(output_dir=str(output_dir), train_data_dir=str(flags["train_data_dir"]), resolution=16,
                        random_flip=True, conditions=["image"], conditioning_image_classes=2,
                        conditioning_image_dir=str(flags["conditioning_image_dir"]),
                        max_validation_images=16)  # fmt: skip
    both = images_for_run(config, True, lambda: None)
    images, (made, _) = both[0], make_conditions(config, both, 8, True, torch.device("cpu"), lambda: None)
    records = np.zeros(len(images), dtype=record_type((1, 1, 1, 1)))
    records["index"] = np.arange(len(images))
    plain, mirrored = (
        made.all[0].values(records, np.full(len(images), flip))["conditioning_image"] for flip in (False, True)
    )
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
    assert plain.shape == (len(images), 2, 8, 8)
    for i in range(len(images)):  # and they belong to the image: bright pixels are of class 1
        bright = images.get(i).float().mean(0) > 115
        assert torch.equal(plain[i, 1] > 0.5, bright.view(8, 2, 8, 2).float().mean((1, 3)) > 0.5)


LOAD = """
import sys, torch
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
image = torch.zeros(2, 16, 16, dtype=torch.long)
image[0, :8] = 1
torch.save(pipe(class_labels=["fish", "bird"], conditioning_image=image, guidance_scale=2.0, latents=noise,
                num_inference_steps=3, output_type="latent").images, out)
assert "latent_ddpm" not in sys.modules
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    print("refused:", error)
"""


def test_the_export_loads_with_diffusers_alone_and_draws_the_same(trained, tmp_path):
    output_dir, flags = trained
    folder = output_dir / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["class_names"] == ["bird", "fish"] and index["conditioning_classes"] == 2
    away = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    words = [sys.executable, "-P", "-c", LOAD, str(folder), str(tmp_path / "drawn.pt")]
    done = subprocess.run(words, cwd=tmp_path, env=away, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "refused:" in done.stdout and "trust_remote_code" in done.stdout
    ours = LatentDDPMPipeline.from_pretrained(folder)
    assert ours.class_names == ["bird", "fish"] and ours.conditioning_channels == 2
    image = torch.zeros(2, 16, 16, dtype=torch.long)
    image[0, :8] = 1
    drawn = draw(ours, class_labels=[1, 0], conditioning_image=image, guidance_scale=2.0)
    assert torch.equal(drawn, torch.load(tmp_path / "drawn.pt"))


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ("remove", {}, "conditioning image of .* cannot be used: there is no .*maps"),
        (9, {}, "has the value 9; conditioning_image_classes is 2, so values go from 0 to 1"),
        ("colour", {}, "it has 3 channels, but a map of classes has one"),
        (None, {"conditioning_image_dir": "nowhere"}, "conditioning_image_dir nowhere is not a folder"),
    ],
)
def test_maps_that_cannot_be_used_are_named_before_training(trained, data, tmp_path, change, flags, message):
    import re
    import shutil

    _, known = trained
    shutil.copytree(data / "maps", tmp_path / "maps")
    victim = tmp_path / "maps" / "bird" / "05.bmp"
    if change == "remove":
        victim.unlink()
    elif change == "colour":
        Image.new("RGB", (32, 32)).save(victim)
    elif change is not None:
        Image.fromarray(np.full((32, 32), change, dtype=np.uint8)).save(victim)
    flags = {**known, "conditioning_image_dir": tmp_path / "maps", "dataloader_num_workers": 1, **flags}
    text = launch("train_unet.py", tmp_path / "out", expect=2, **flags)
    assert re.search(message, " ".join(text.split())) and "Traceback" not in text, text[-1500:]


def test_a_damaged_conditioning_image_is_named_and_none_stands_in_for_it(trained, data, tmp_path):
    import shutil

    _, known = trained
    shutil.copytree(data / "images", tmp_path / "pictures")
    (tmp_path / "pictures" / "bird" / "05.png").write_bytes(b"no image")
    flags = {**known, "conditioning_image_dir": tmp_path / "pictures", "conditioning_image_classes": None}
    text = launch("train_unet.py", tmp_path / "out", expect=2, **flags)
    assert "The conditioning image of bird/05.png cannot be used: OSError: not an image" in text


def test_classes_need_a_dataset_that_has_them(trained, data, tmp_path):
    _, flags = trained
    flags = {**flags, "train_data_dir": data / "images" / "bird", "conditioning_image_dir": data / "maps" / "bird"}
    text = launch("train_unet.py", tmp_path / "out", expect=2, **flags)
    assert "conditions has class, but the dataset has no classes" in text
    assert "decod" not in text  # it is found before images are decoded


def test_everything_can_be_cached_before_training(trained, tmp_path):
    output_dir, _ = trained
    run_script("cache_latents.py", "--config", str(output_dir / "train_unet.yaml"), "--latents_dir", str(tmp_path))
    made, trained_on = ({f.relative_to(root) for f in root.rglob("*") if f.is_dir()}
                        for root in (tmp_path, output_dir / "latents"))  # fmt: skip
    assert made == trained_on and len(made) == 5  # latents and maps of both splits, and the folder of a split


def test_evaluation_draws_with_the_training_images_conditions(trained, tmp_path):
    """It also reports how often samples are of the requested class."""
    output_dir, flags = trained
    keys = ("train_data_dir", "resolution", "conditions", "conditioning_image_dir", "conditioning_image_classes")
    words = [str(word) for key in keys for word in (f"--{key}", flags[key])]
    path = tmp_path / "evaluation.json"
    words += ["--output_dir", str(output_dir), "--num_images", "12", "--steps", "2", "--json", str(path)]
    run_script("evaluate.py", "pipeline", *words, "--guidance_scales", "1", "3", "--guidance_interval", "1e6", "1e7")
    nowhere = json.loads(path.read_text())
    assert nowhere["guidance_interval"] == [1e6, 1e7]
    assert len({setting["samples_sha256"] for setting in nowhere["settings"]}) == 1
    run_script("evaluate.py", "pipeline", *words, "--guidance_scales", "1", "3")
    result = json.loads(path.read_text())
    assert result["settings"][0]["samples_sha256"] == nowhere["settings"][0]["samples_sha256"]
    assert [setting["guidance_scale"] for setting in result["settings"]] == [1.0, 3.0]
    assert result["settings"][0]["samples_sha256"] != result["settings"][1]["samples_sha256"]
    assert all(0 <= setting["class_agreement"] <= 1 for setting in result["settings"])
    assert 0 <= result["held_out_class_agreement"] <= 1
    words = ["--train_data_dir", str(flags["train_data_dir"]), "--resolution", "16", "--output_dir", str(output_dir)]
    done = run_script("evaluate.py", "pipeline", *words, "--num_images", "12", expect=2)
    assert "The pipeline takes conditioning images: say where they are" in done.stderr
    words += ["--guidance_pipeline", str(output_dir / "pipeline")]
    assert (
        "--guidance_pipeline needs --guidance_scales" in run_script("evaluate.py", "pipeline", *words, expect=2).stderr
    )


def test_the_sampling_script_guides_as_it_is_told(trained, data, tmp_path):
    """A scale per condition, an interval of noise levels, a weaker pipeline."""
    pipeline, drawn = trained[0] / "pipeline", {}
    weaker = LatentDDPMPipeline.from_pretrained(pipeline)
    for parameter in weaker.unet.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    weaker.save_pretrained(tmp_path / "weaker")
    words = [pipeline, "--num_images", "2", "--num_inference_steps", "3", "--class_labels", "fish"]
    words += ["--conditioning_image", data / "maps" / "bird" / "01.bmp", "--output_dir"]
    both = ["--guidance_scale", "class_labels=90", "conditioning_image=40"]
    for name, more in (
        ("plain", []),
        ("one", ["--guidance_scale", "90"]),
        ("each", both),
        ("same of each", ["--guidance_scale", "class_labels=90", "conditioning_image=90"]),
        ("never", [*both, "--guidance_interval", "1e6", "1e7"]),
        ("always", [*both, "--guidance_interval", "0", "1e7"]),
        ("at times", [*both, "--guidance_interval", "0.5", "5"]),
        ("itself", ["--guidance_scale", "90", "--guidance_pipeline", pipeline]),
        ("weaker", ["--guidance_scale", "90", "--guidance_pipeline", tmp_path / "weaker"]),
    ):
        run_script("sample.py", *map(str, [*words, tmp_path / name, *more]))
        drawn[name] = np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int)
    for one, other in (("one", "same of each"), ("plain", "never"), ("each", "always"), ("plain", "itself")):
        assert abs(drawn[one] - drawn[other]).max() <= 1, (one, other)
    different = ("plain", "one", "each", "at times", "weaker")
    for one, other in itertools.combinations(different, 2):
        assert abs(drawn[one] - drawn[other]).max() > 1, (one, other)
    record = json.loads((tmp_path / "at times" / "samples.json").read_text())
    assert record["guidance_scale"] == {"class_labels": 90, "conditioning_image": 40}
    assert record["guidance_interval"] == [0.5, 5]
    tiny_pipeline(classes=3).save_pretrained(tmp_path / "other")
    done = run_script("sample.py", *map(str, [*words, tmp_path / "no", "--guidance_scale", "2"]),
                      "--guidance_pipeline", str(tmp_path / "other"), expect=2)  # fmt: skip
    assert "other: its U-Net has" in done.stderr


def test_the_sampling_script_takes_conditions_in_turn(trained, data, tmp_path):
    pipeline = str(trained[0] / "pipeline")
    maps = [str(data / "maps" / name) for name in ("bird/01.bmp", "bird/03.bmp")]
    words = [pipeline, "--num_images", "4", "--num_inference_steps", "2", "--class_labels", "fish", "0"]
    words += ["--conditioning_image", *maps, "--guidance_scale", "300"]
    for name, more in (
        ("all", []),
        ("again", ["--batch_size", "2"]),
        ("other", ["--seed", "0", "--class_labels", "1"]),
    ):
        run_script("sample.py", *words, *more, "--output_dir", str(tmp_path / name))
    drawn = {name: [np.asarray(Image.open(tmp_path / name / f"{n:05d}.png")).astype(int) for n in range(4)]
             for name in ("all", "again", "other")}  # fmt: skip
    for one, other in zip(drawn["all"], drawn["again"], strict=True):
        assert abs(one - other).max() <= 1
    assert np.array_equal(drawn["all"][0], drawn["other"][0])  # a fish in both
    assert not np.array_equal(drawn["all"][1], drawn["other"][1])
    record = json.loads((tmp_path / "all" / "samples.json").read_text())
    assert record["class_labels"] == ["fish", "0"] and record["guidance_scale"] == 300
    one = ["--class_labels", "fish"]
    for flags, message in (
        ([*one, "--guidance_scale", "prompt=2"], "--guidance_scale is for prompt, but there is no --prompt"),
        ([*one, "--guidance_scale", "klass=2"], "klass is none of conditioning_image, class_labels, prompt"),
        ([*one, "--guidance_scale", "2", "class_labels=2"], "one number, or NAME=NUMBER of each condition"),
        ([*one, "--guidance_scale", "much"], "much is not a number"),
        ([*one, "--guidance_interval", "0", "1"], "need a --guidance_scale above 1"),
        ([*one, "--guidance_scale", "2", "--guidance_interval", "2", "1"], "0 <= LOW < HIGH is required"),
        (
            [*one, "--guidance_scale", "class_labels=2", "--guidance_pipeline", pipeline],
            "one number for all conditions",
        ),
        ([*one, "--guidance_scale", "2", "--guidance_pipeline", str(tmp_path)], "is not a pipeline folder"),
        (["--class_labels", "fisch"], "there is no class fisch; did you mean fish"),
        (["--prompt", "a fish"], "--prompt: this model has no such condition"),
        (["--guidance_scale", "2"], "--guidance_scale needs --class_labels"),
        (["--conditioning_image", "nothing.png"], "nothing.png can not be read: No such file"),
        (["--conditioning_image", str(data / "images/bird/01.png")], "a semantic map has one channel"),
    ):
        done = run_script("sample.py", pipeline, "--num_inference_steps", "1", "--output_dir", str(tmp_path / "no"),
                          *flags, expect=2)  # fmt: skip
        assert message in done.stderr
