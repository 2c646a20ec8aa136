"""scripts/sample.py: what it writes, that images do not depend on the batch, and how it refuses."""

import importlib.util
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from small_pipeline import save_pipeline

from latent_ddpm.diffusion.sampling import slerp
from latent_ddpm.random import Stream, normal
from pipeline_latent_ddpm import RECORDED_STEPS, LatentDDPMPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SCRIPT = ROOT / "scripts" / "sample.py"
spec = importlib.util.spec_from_file_location("sample_script", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("run") / "pipeline")


def run(pipeline, output_dir, *arguments):
    common = ["--num_inference_steps", "3", "--device", "cpu", "--output_dir", str(output_dir)]
    return script.main([str(pipeline), *common, *map(str, arguments)])


def refusal(capsys, *arguments):
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


# ---------------------------------------------------------------------------------- what it writes


def test_files_grid_and_record(pipeline, tmp_path):
    out = tmp_path / "new" / "samples"
    arguments = ("--num_images", 5, "--batch_size", 2, "--seed", 4, "--scheduler", "dpmsolver++-sde")
    assert run(pipeline, out, *arguments) == 0
    names = [f"{i:05d}.png" for i in range(5)]
    assert sorted(p.name for p in out.iterdir()) == [*names, "grid.png", "samples.json"]
    images = pixels(out)
    assert images.shape == (5, 16, 16) and images.std() > 1
    grid = Image.open(out / "grid.png")
    assert grid.mode == "L" and grid.size == (3 * 18 + 2, 2 * 18 + 2)
    np.testing.assert_array_equal(np.asarray(grid)[20:36, 2:18], images[3])
    record = json.loads((out / "samples.json").read_text())
    config = record.pop("scheduler_config")
    assert config["algorithm_type"] == "sde-dpmsolver++" and config["prediction_type"] == "v_prediction"
    assert config["beta_end"] == 0.012
    assert record == {
        "pipeline": str(pipeline),
        **dict.fromkeys(("class_labels", "prompt", "conditioning_image")),
        **dict.fromkeys(("guidance_scale", "guidance_interval", "guidance_pipeline")),
        "num_images": 5,
        "batch_size": 2,
        "num_inference_steps": 3,
        "scheduler": "DPMSolverMultistepScheduler",
        "eta": 0.0,
        "seed": 4,
        "image": None,
        "strength": None,
        "mask": None,
        "interpolate": None,
        "film_strip": False,
        "animation": "webp",
        "device": "cpu",
        "dtype": "float32",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "files": names,
    }


@pytest.mark.parametrize("recorded", [None, 2])
def test_the_number_of_steps_is_the_one_of_the_pipeline(recorded, tmp_path):
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    scheduler.register_to_config(**{RECORDED_STEPS: recorded} if recorded else {})
    folder = save_pipeline(tmp_path / "pipeline", scheduler)
    words = [str(folder), "--num_images", "1", "--device", "cpu", "--scheduler", "dpmsolver++"]
    assert script.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert record["num_inference_steps"] == (recorded or 20)


def test_images_of_an_earlier_call_are_removed(pipeline, tmp_path):
    (tmp_path / "00007.png").write_bytes(b"not of this program")
    assert run(pipeline, tmp_path, "--num_images", 3) == 0
    assert run(pipeline, tmp_path, "--num_images", 2) == 0
    assert sorted(path.name for path in tmp_path.glob("0*.png")) == ["00000.png", "00001.png", "00007.png"]
    (tmp_path / "samples.json").write_text("{")
    assert run(pipeline, tmp_path, "--num_images", 1) == 0


def test_no_individual_leaves_the_grid_alone(pipeline, tmp_path):
    assert run(pipeline, tmp_path, "--num_images", 2, "--no-individual") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "samples.json"]
    assert json.loads((tmp_path / "samples.json").read_text())["files"] == []


def test_grid_stops_at_its_limit(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "GRID_LIMIT", 4)
    assert run(pipeline, tmp_path, "--num_images", 7, "--batch_size", 3) == 0
    assert Image.open(tmp_path / "grid.png").size == (2 * 18 + 2, 2 * 18 + 2)
    assert len(pixels(tmp_path)) == 7


def test_noise_is_the_function_of_seed_and_number(pipeline, tmp_path):
    assert run(pipeline, tmp_path, "--num_images", 3, "--batch_size", 2, "--seed", 9) == 0
    pipe = LatentDDPMPipeline.from_pretrained(pipeline)
    noise = normal(9, Stream.SAMPLE, torch.arange(3), (3, 8, 8))
    expected = pipe(batch_size=3, num_inference_steps=3, latents=noise).images
    assert np.abs(pixels(tmp_path) - np.stack([np.asarray(image).astype(int) for image in expected])).max() <= 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("--eta", 1.0), ("--scheduler", "ddpm"), ("--scheduler", "dpmsolver++-sde"), ("--scheduler", "euler-a")],
)
def test_images_do_not_depend_on_the_batch(pipeline, tmp_path, arguments):
    for batch_size in (3, 8):
        assert run(pipeline, tmp_path / str(batch_size), "--num_images", 8, "--batch_size", batch_size, *arguments) == 0
    three, eight = pixels(tmp_path / "3"), pixels(tmp_path / "8")
    assert np.abs(three - eight).max() <= 1
    assert len(np.unique(eight.reshape(8, -1), axis=0)) == 8


def test_seed_and_eta_change_the_images(pipeline, tmp_path):
    for name, arguments in {"a": (), "b": ("--seed", 1), "c": ("--eta", 1.0)}.items():
        assert run(pipeline, tmp_path / name, "--num_images", 2, *arguments) == 0
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert np.abs(a - b).max() > 3 and np.abs(a - c).max() > 3


# ---------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("name", [n for n in script.SCHEDULERS if not n.startswith(("flow", "FlowMatch"))])
def test_scheduler_keeps_the_noise_table_of_the_model(name):
    # Loaded from defaults, whose values differ from one scheduler class to the next.
    own = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    changed = script.with_scheduler(own, name)
    assert type(changed).__name__ == script.SCHEDULERS[name][0]
    assert torch.allclose(changed.alphas_cumprod.float(), own.alphas_cumprod, rtol=1e-4)
    assert changed.config.prediction_type == "v_prediction"
    assert changed.config.get("clip_sample") is False


@pytest.mark.parametrize("name", [n for n in script.SCHEDULERS if n.islower() and not n.startswith("flow")])
def test_scheduler_runs_with_few_steps(pipeline, tmp_path, name):
    for steps in (1, 2):
        arguments = ("--num_images", 1, "--scheduler", name, "--num_inference_steps", steps)
        assert run(pipeline, tmp_path, *arguments) == 0


def test_clipping_is_for_pixels_only():
    from_solver = diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction")
    assert script.with_scheduler(from_solver, "ddpm").config.clip_sample is False


def test_flow_matching_pipeline(tmp_path, capsys):
    pipeline = save_pipeline(tmp_path / "flow", FlowMatchEulerDiscreteScheduler())
    for name in ("flow-euler", "flow-heun"):
        assert run(pipeline, tmp_path / name, "--num_images", 2, "--scheduler", name, "--film_strip") == 0
        assert pixels(tmp_path / name).std() > 1
    assert np.abs(pixels(tmp_path / "flow-euler") - pixels(tmp_path / "flow-heun")).max() > 3
    assert "flow matching" in refusal(capsys, pipeline, tmp_path / "out", "--scheduler", "heun")


# ---------------------------------------------------------------------------------- between images, and on the way


def cells(path, side=16, padding=2):
    """The images of a grid, (rows, columns, side, side)."""
    grid = np.asarray(Image.open(path)).astype(int)
    rows, columns = ((length - padding) // (side + padding) for length in grid.shape)
    blocks = grid[padding:, padding:].reshape(rows, side + padding, columns, side + padding)
    return blocks.transpose(0, 2, 1, 3)[:, :, :side, :side]


def frames(path, mode="L"):
    animation = Image.open(path)
    shown = []
    for i in range(animation.n_frames):
        animation.seek(i)
        shown.append(np.asarray(animation.convert(mode)).astype(int))
        assert animation.info["duration"] == 100  # equal neighbours would have been merged into a longer one
    return np.stack(shown)


def test_slerp_keeps_the_variance_and_the_ends():
    a, b = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ends = [slerp(a, b, torch.full((3,), f)) for f in (0.0, 1.0)]
    assert torch.equal(ends[0], a) and torch.equal(ends[1], b)
    middle = slerp(a, b, torch.tensor([0.2, 0.5, 0.7]))
    assert middle.var(dim=(1, 2, 3)) == pytest.approx(torch.ones(3), abs=0.1)  # (a + b) / 2 has 0.5
    turned = slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([1 / 3]))
    assert turned[0].tolist() == pytest.approx([0.75**0.5, 2 * 0.5])  # a third of the way of 90 degrees


@pytest.mark.parametrize("arguments", [(), ("--scheduler", "euler-a")])
def test_interpolation_goes_from_number_to_number(pipeline, tmp_path, arguments):
    assert run(pipeline, tmp_path, "--num_images", 4, "--batch_size", 3, "--interpolate", 5, *arguments) == 0
    images, rows = pixels(tmp_path), cells(tmp_path / "interpolation.png")
    assert rows.shape == (3, 5, 16, 16)
    np.testing.assert_array_equal(rows[:, 0], images[:-1])
    np.testing.assert_array_equal(rows[:, -1], images[1:])
    pipe = LatentDDPMPipeline.from_pretrained(pipeline)
    if not arguments:
        noise = normal(0, Stream.SAMPLE, torch.arange(1, 3), (3, 8, 8))
        between = slerp(noise[:1], noise[1:], torch.tensor([0.25]))
        expected = pipe(num_inference_steps=3, latents=between).images[0]
        assert np.abs(rows[1, 1] - np.asarray(expected).astype(int)).max() <= 1
    shown = frames(tmp_path / "interpolation.webp")
    assert shown.shape == (3 * 4 + 1, 128, 128)
    walk = np.concatenate((rows[:, :-1].reshape(12, 16, 16), images[-1:]))
    np.testing.assert_array_equal(shown[:, ::8, ::8], walk)


def test_interpolation_of_two_frames_is_the_ends(pipeline, tmp_path):
    assert run(pipeline, tmp_path, "--num_images", 2, "--interpolate", 2, "--animation", "gif") == 0
    np.testing.assert_array_equal(cells(tmp_path / "interpolation.png")[0], pixels(tmp_path))
    assert frames(tmp_path / "interpolation.gif").shape == (2, 128, 128)


def test_film_strip_shows_what_is_predicted_after_each_step(pipeline, tmp_path):
    # The last step of DDIM leaves the prediction itself. Ten images, in three blocks, of which eight are shown.
    assert run(pipeline, tmp_path, "--num_images", 10, "--batch_size", 4, "--film_strip", "--animation", "gif") == 0
    rows = cells(tmp_path / "film_strip.png")
    assert rows.shape == (8, 3, 16, 16)
    assert np.abs(rows[:, -1] - pixels(tmp_path)[:8]).max() <= 1
    assert np.abs(rows[:, 0] - rows[:, -1]).max() > 3
    shown = frames(tmp_path / "film_strip.gif")
    assert shown.shape == (3, 3 * (8 * 16 + 2) + 2, 3 * (8 * 16 + 2) + 2)
    assert np.abs(shown[1, 2:130:8, 2:130:8] - rows[0, 1]).max() <= 1
    plain = tmp_path / "plain"
    assert run(pipeline, plain, "--num_images", 10, "--batch_size", 4) == 0
    np.testing.assert_array_equal(pixels(plain), pixels(tmp_path))  # to watch changes nothing


# ---------------------------------------------------------------------------------- an image to begin with


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A colour image of another shape than the model's, and a mask of its middle."""
    folder = tmp_path_factory.mktemp("photo")
    levels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(levels).save(folder / "photo.png")
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[4:12, 8:16] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def test_variations_of_an_image(pipeline, photo, tmp_path):
    begin = np.asarray(Image.open(photo / "photo.png").convert("L").crop((4, 0, 20, 16))).astype(int)
    arguments = ("--num_images", 3, "--image", photo / "photo.png", "--num_inference_steps", 10)
    for strength in (0.1, 1.0):
        assert run(pipeline, tmp_path / str(strength), *arguments, "--strength", strength) == 0
    near, far = pixels(tmp_path / "0.1"), pixels(tmp_path / "1.0")
    assert len(np.unique(near.reshape(3, -1), axis=0)) == 3
    grid = cells(tmp_path / "0.1" / "grid.png").reshape(4, 16, 16)
    np.testing.assert_array_equal(grid, np.concatenate((begin[None], near)))
    assert run(pipeline, tmp_path / "none", "--num_images", 3, "--num_inference_steps", 10) == 0
    np.testing.assert_array_equal(far, pixels(tmp_path / "none"))
    assert np.abs(near - far).max() > 3
    record = json.loads((tmp_path / "0.1" / "samples.json").read_text())
    assert (record["image"], record["strength"], record["mask"]) == (str(photo / "photo.png"), 0.1, None)


def test_a_masked_image_keeps_its_other_pixels(pipeline, photo, tmp_path):
    begin = np.asarray(Image.open(photo / "photo.png").convert("L").crop((4, 0, 20, 16))).astype(int)
    arguments = ("--image", photo / "photo.png", "--mask", photo / "mask.png", "--film_strip", "--interpolate", 3)
    assert run(pipeline, tmp_path, "--num_images", 3, *arguments) == 0
    inside = np.zeros((16, 16), dtype=bool)
    inside[4:12, 4:12] = True
    for images in (pixels(tmp_path), cells(tmp_path / "interpolation.png").reshape(6, 16, 16)):
        assert (images[:, ~inside] == begin[~inside]).all()
        assert (np.abs(images[:, inside] - begin[inside]).mean(axis=1) > 3).all()


# ---------------------------------------------------------------------------------- several processes


@pytest.mark.long
def test_two_processes_write_the_files_of_one(pipeline, photo, tmp_path):
    words = [str(pipeline), "--num_images", "7", "--batch_size", "2", "--num_inference_steps", "3", "--film_strip"]
    words += ["--scheduler", "dpmsolver++-sde", "--interpolate", "4", "--image", str(photo / "photo.png")]
    torch.set_num_threads(2)  # neither this nor the launcher's one thread per process may show
    assert script.main([*words, "--output_dir", str(tmp_path / "one")]) == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launcher, "scripts/sample.py", *words, "--output_dir", str(tmp_path / "two")],
        cwd=ROOT,
        env={key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"7 images in {tmp_path / 'two'}\n"
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 7 + 1 + 2 + 2 + 1  # images, grid, interpolation, film strip, record
    assert one == two


def test_on_a_cpu_one_thread_computes(pipeline, tmp_path, monkeypatch):
    threads = []
    watched = lambda *arguments, **settings: threads.append(torch.get_num_threads()) or draw(*arguments, **settings)  # noqa: E731
    draw = script.draw_images
    monkeypatch.setattr(script, "draw_images", watched)
    torch.set_num_threads(2)
    assert run(pipeline, tmp_path, "--num_images", 2, "--interpolate", 3) == 0
    torch.set_num_threads(1)
    assert threads == [1, 1]


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "nearest"), [("dpmsolver", "dpmsolver++"), ("eulr", "euler"), ("DDIMSchedular", "DDIMScheduler")]
)
def test_unknown_scheduler(pipeline, tmp_path, capsys, name, nearest):
    message = refusal(capsys, pipeline, tmp_path, "--scheduler", name)
    assert message == f"sample.py: --scheduler {name} is unknown; did you mean {nearest}?\n"


def test_scheduler_without_the_noise_table_is_refused(tmp_path, capsys):
    own = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipeline = save_pipeline(tmp_path / "pipeline", own)
    assert run(pipeline, tmp_path / "out", "--num_images", 1, "--scheduler", "euler") == 0
    assert "rescale_betas_zero_snr" in refusal(capsys, pipeline, tmp_path / "out", "--scheduler", "heun")


def test_scheduler_without_the_prediction_type_is_refused(tmp_path, capsys):
    pipeline = save_pipeline(tmp_path / "pipeline", DDIMScheduler(prediction_type="sample", clip_sample=False))
    assert "PNDMScheduler can not sample this model" in refusal(capsys, pipeline, tmp_path, "--scheduler", "pndm")


def test_missing_folder(tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert refusal(capsys, missing, tmp_path / "out") == f"sample.py: there is no folder {missing}\n"


def test_not_a_pipeline_folder(pipeline, tmp_path, capsys):
    assert "it has no model_index.json\n" in refusal(capsys, tmp_path, tmp_path / "out")
    assert f"did you mean {pipeline}?" in refusal(capsys, pipeline.parent, tmp_path / "out")


def test_another_kind_of_pipeline(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}')
    message = refusal(capsys, tmp_path, tmp_path / "out")
    assert "DDPMPipeline" in message and "lacks scheduler, vqvae" in message


def test_pickled_weights_are_not_loaded(tmp_path, capsys):
    pipeline = save_pipeline(tmp_path / "pipeline")
    (pipeline / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(
        UNet2DModel.from_config(UNet2DModel.load_config(pipeline / "unet")).state_dict(),
        pipeline / "unet" / "diffusion_pytorch_model.bin",
    )
    assert "can not be loaded" in refusal(capsys, pipeline, tmp_path / "out")


def test_unreachable_hub_id(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert "neither a folder nor readable on the Hub" in refusal(capsys, "nobody/nothing", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", -1), "--seed -1"),
        (("--num_inference_steps", 1001), "more than the 1000 steps"),
        (("--device", "nonsense"), "--device nonsense"),
        (("--strength", 0.5), "name it with --image"),
        (("--mask", "mask.png"), "name it with --image"),
        (("--image", "photo.png", "--strength", 0), "--strength 0.0 must be above 0 and at most 1"),
        (("--image", "photo.png", "--strength", 1.01), "--strength 1.01 must be"),
        (("--image", "nowhere.png"), "--image nowhere.png can not be read: No such file or directory"),
        (("--image", __file__), "test_sample_script.py can not be read: not an image"),
        (("--interpolate", 1), "--interpolate 1 must be at least 2"),
        (("--interpolate", 3, "--num_images", 1), "--num_images of at least 2, not 1"),
    ],
)
def test_bad_settings(pipeline, tmp_path, capsys, arguments, message):
    assert message in refusal(capsys, pipeline, tmp_path, *arguments)


def test_output_dir_that_is_a_file(pipeline, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output_dir" in refusal(capsys, pipeline, tmp_path / "file")


@pytest.mark.parametrize("flag", ["--num_images", "--batch_size", "--num_inference_steps"])
def test_counts_are_at_least_one(pipeline, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stopped:
        run(pipeline, tmp_path, flag, 0)
    assert stopped.value.code == 2 and f"{flag}: 0 is not at least 1" in capsys.readouterr().err
