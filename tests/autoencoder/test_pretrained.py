"""Stage 2 on every class of autoencoder in diffusers, from folders and from a Hub on loopback."""

import json
import re
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from conftest import command, environment, finished_script, launch, losses
from hub_server import USER, HubServer, Repo, Status
from safetensors.torch import save_file
from small_autoencoders import FOLDS, SMALL, small_autoencoder

from latent_ddpm.autoencoder.scaling import fold_normalization, overall_std
from latent_ddpm.autoencoder.stock import (
    check_autoencoder_fits,
    code_count,
    kept_normalization,
    latents_of,
    load_autoencoder,
)
from latent_ddpm.config import UNetConfig
from latent_ddpm.data.latents import encoder_of
from latent_ddpm.errors import UserError
from latent_ddpm.planning.counting import count_pretrained, count_unet, count_unet_alone, latents_of_pretrained
from latent_ddpm.pretrained import find_model
from pipeline_latent_ddpm import (
    AUTOENCODERS,
    LatentDDPMPipeline,
    decode_latents,
    downsampling_of,
    image_channels_of,
    latent_channels_of,
)

STEPS = {"max_train_steps": 20, "checkpointing_steps": 10, "validation_steps": 20}


def saved(name, folder):
    small_autoencoder(name).save_pretrained(folder)
    return folder


def upload(server, repo, files, private=False):
    server.repos[repo] = Repo(private)
    for path, content in files.items():
        server.write(repo, path, content)


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.rand(6, 3, 16, 16) * 2 - 1


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_latents_have_the_shape_that_the_config_says(name, images, tmp_path):
    autoencoder = load_autoencoder(saved(name, tmp_path))
    side = 16 // downsampling_of(autoencoder)
    latents = latents_of(autoencoder, images)
    assert tuple(latents.shape) == (6, latent_channels_of(autoencoder), side, side)
    assert torch.equal(latents, latents_of(autoencoder, images))
    assert decode_latents(autoencoder, latents).shape == images.shape
    assert image_channels_of(autoencoder) == 3
    assert check_autoencoder_fits(autoencoder, UNetConfig(dataset_name="x", resolution=16)) == side


@torch.no_grad()
def test_an_rae_takes_and_gives_signed_images(images, tmp_path):
    plain = small_autoencoder("rae")
    plain.save_pretrained(tmp_path / "a")
    signed = load_autoencoder(tmp_path / "a")
    assert torch.allclose(latents_of(signed, images), plain.encode((images + 1) / 2).latent, atol=1e-5)
    latents = latents_of(signed, images)
    assert torch.allclose(decode_latents(signed, latents), 2 * plain.decode(latents).sample - 1, atol=1e-5)
    signed.save_pretrained(tmp_path / "b")
    again = load_autoencoder(tmp_path / "b")  # which is not converted twice
    assert torch.equal(latents_of(again, images), latents)


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_normalization_changes_no_image(name, by_channel, images, tmp_path):
    autoencoder = load_autoencoder(saved(name, tmp_path / "a"))
    if by_channel and code_count(autoencoder):
        pytest.skip("codes need one number")
    direct = latents_of(autoencoder, images)
    before = decode_latents(autoencoder, direct)
    mean, variance = direct.mean((0, 2, 3)), direct.double().var((0, 2, 3), correction=0)
    std = variance.sqrt().float() if by_channel else overall_std(variance)
    encoded = autoencoder.encode(images) if name.startswith("kl") else None
    spread = encoded.latent_dist.std if encoded is not None else None
    outside = fold_normalization(autoencoder, mean, std)
    assert (outside == {}) == (name in FOLDS)
    if spread is not None:  # the posterior gets wider or narrower with the latents
        scale = torch.as_tensor(std if by_channel else 1.0).reshape(-1, 1, 1)
        assert torch.allclose(autoencoder.encode(images).latent_dist.std, spread / scale, rtol=1e-4)
    autoencoder.save_pretrained(tmp_path / "b")
    again = load_autoencoder(tmp_path / "b")
    unet = diffusers.UNet2DModel(sample_size=4, in_channels=4, out_channels=4, block_out_channels=(32,),
                                 down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    pipeline = LatentDDPMPipeline(again, unet, diffusers.DDIMScheduler(), **outside)
    latents = pipeline.encode(images)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    variances = latents.double().var((0, 2, 3), correction=0)
    assert torch.allclose(variances if by_channel else variances.mean(), torch.ones(()).double(), atol=1e-2)
    if name in FOLDS:  # as LDMPipeline decodes
        assert torch.allclose(again.decode(latents / again.config.scaling_factor).sample, before, atol=1e-4)
    assert torch.allclose(pipeline.decode(latents), before.clamp(-1, 1), atol=1e-4)
    kept_mean, kept_std = kept_normalization(again, tmp_path / "b")
    if not outside:  # a published pipeline's own normalization changes nothing
        assert fold_normalization(again, kept_mean, kept_std) == {}
        assert torch.allclose(pipeline.encode(images), latents, atol=1e-6)


# ------------------------------------------------------------------------------------- trained, exported, loaded


# one process each, but the libraries are imported once; each writes a file, and the exit statuses are printed
EACH = """
import json, os, runpy, sys
import train_unet
for number, words in enumerate(json.load(open(sys.argv[1]))):
    if not os.fork():
        file = os.open(f"{sys.argv[1]}.{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv, status = words, 0
        try:
            runpy.run_path("train_unet.py", run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
STRANGER = """
import sys, json, numpy, torch
from diffusers import DiffusionPipeline
for folder, options in json.load(open(sys.argv[1])):
    pipeline = DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    numpy.save(folder + "/drawn.npy", images)
    print(type(pipeline).__name__)
assert not any(module.startswith("latent_ddpm") for module in sys.modules)
"""


def run_each(hub, home, runs):
    """Exit status and output of train_unet.py with each of these words, without a token."""
    home.mkdir(exist_ok=True)
    (home / "words.json").write_text(json.dumps([words[1:] for words in runs]))
    env = {**environment(), **hub.environment(home / "cache", token=None)}
    done = finished_script([sys.executable, "-c", EACH, str(home / "words.json")], env)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    texts = [(home / f"words.json.{number}").read_text() for number in range(len(runs))]
    return list(zip(map(int, done.stdout.split()), texts, strict=True))


def slug(name):
    return name.replace(" ", "-")


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Stage 2 on every class, each saved by diffusers and served by a Hub; the exports drawn with by a stranger."""
    home = tmp_path_factory.mktemp("trained")
    with HubServer(home / "server") as hub:
        words = []
        for name in SMALL:
            folder = saved(name, home / "models" / slug(name))
            upload(hub, f"{USER}/{slug(name)}", {path.name: path.read_bytes() for path in folder.iterdir()})
            flags = {"train_data_dir": photos, "resolution": 16, "autoencoder": f"{USER}/{slug(name)}", **STEPS}
            words.append(command("train_unet.py", home / slug(name), **flags))
        done = run_each(hub, home, words)
    assert [status for status, _ in done] == [0] * len(SMALL), [text[-2000:] for status, text in done if status]
    exports = [str(home / slug(name) / "pipeline") for name in SMALL]
    trust = [{} if name in FOLDS else {"custom_pipeline": path, "trust_remote_code": True}
             for name, path in zip(SMALL, exports, strict=True)]  # fmt: skip
    (home / "exports.json").write_text(json.dumps(list(zip(exports, trust, strict=True))))
    env = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    words = [sys.executable, "-P", "-c", STRANGER, str(home / "exports.json")]
    loaded = subprocess.run(words, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    return home, "".join(text for _, text in done), dict(zip(SMALL, loaded.stdout.split(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_stage_2_on_a_pretrained_autoencoder_loads_elsewhere(name, trained):
    home, text, classes = trained
    folder, out = home / "models" / slug(name), home / slug(name)
    said = rf"{USER}/{slug(name)} reconstructs \d+ of the images with PSNR -?[\d.]+ dB, SSIM -?[\d.]+"
    assert re.search(said, text)
    assert (out / "samples" / "autoencoder-pretrained.png").exists()
    noted = json.loads((out / "run.json").read_text())["unet"]["autoencoder"]
    assert noted["class"] == SMALL[name][0] and noted["images"] > 0 and len(noted["revision"]) == 40
    assert classes[name] == ("LDMPipeline" if name in FOLDS else "LatentDDPMPipeline")
    pipeline = LatentDDPMPipeline.from_pretrained(str(out / "pipeline"))
    pipeline.set_progress_bar_config(disable=True)
    check_moments(out, folder, pipeline)
    ours = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
    assert np.abs(np.load(out / "pipeline" / "drawn.npy") - ours.images).max() < 1e-4
    card = (out / "pipeline" / "README.md").read_text()
    assert ("cannot hold the normalization" in card) == (name not in FOLDS)


def check_moments(out, folder, pipeline):
    """The pipeline's latents of any images are the autoencoder's own, with the moments of the training set taken out.

    So those of the training set have mean 0 and deviation 1, in each channel where there are no codes.
    """
    records = [np.load(path)["latents"] for path in sorted((out / "latents").glob("*/latents-*.npy"))]
    values = torch.from_numpy(np.concatenate(records)).double()  # (N, F, D, h, w)
    mean, variance = values.mean((0, 1, 3, 4)), values.var((0, 1, 3, 4), correction=0)
    original = load_autoencoder(folder)
    std = variance.mean().sqrt().expand_as(mean) if code_count(original) else variance.sqrt()
    torch.manual_seed(2)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    wanted = (latents_of(original, images).double() - mean[:, None, None]) / std[:, None, None]
    assert (pipeline.encode(images) - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_run_keeps_its_normalization(photos, tmp_path):
    folder, out = saved("kl", tmp_path / "vae"), tmp_path / "out"
    flags = {"train_data_dir": photos, "resolution": 16, "autoencoder": folder}
    launch("train_unet.py", out, **flags, **{**STEPS, "max_train_steps": 2})
    text = launch("train_unet.py", out, expect=2, latent_normalization="overall", **flags, **STEPS)
    assert "trained with latent_normalization channel" in text
    text = launch("train_unet.py", tmp_path / "b", expect=2, latent_normalization="channel",
                  **{**flags, "autoencoder": saved("vq", tmp_path / "vq")}, **STEPS)  # fmt: skip
    assert "latent_normalization channel would change which code is nearest" in text


# ------------------------------------------------------------------------------------------------- on the Hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with a VAE at the top of a repository, one inside a pipeline, and repositories that cannot be used."""
    place = tmp_path_factory.mktemp("models")
    saved("kl", place / "vae")
    small_autoencoder("kl", seed=7).save_pretrained(place / "other")
    with HubServer(tmp_path_factory.mktemp("server")) as server:
        weights = (place / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
        config = (place / "vae" / "config.json").read_bytes()
        model = {"config.json": config, "diffusion_pytorch_model.safetensors": weights}
        upload(server, f"{USER}/vae", {**model, "README.md": b"a card", "huge.safetensors": b"not for us"})
        upload(server, f"{USER}/pipeline", {"model_index.json": b'{"_class_name": "X"}',
                                    **{f"vae/{name}": content for name, content in model.items()}})  # fmt: skip
        upload(server, f"{USER}/private", model, private=True)
        upload(server, f"{USER}/pickle", {"config.json": config, "diffusion_pytorch_model.bin": b"\x80\x04."})
        upload(server, f"{USER}/truncated", {**model, "diffusion_pytorch_model.safetensors": weights[:2000]})
        upload(server, f"{USER}/wrong", {**model, "config.json": b'{"_class_name": "UNet2DModel"}'})
        upload(server, f"{USER}/nothing", {"README.md": b"a card"})
        server.models = place
        yield server


def ask(hub, home, name, *more, token=None, expect=2, photos=None, steps=None, **settings):
    flags = {"train_data_dir": photos or "/", "resolution": 16, "autoencoder": name, **(steps or STEPS)}
    words = [*command("train_unet.py", home / "out", **flags), *more]
    done = finished_script(words, {**environment(), **hub.environment(home / "cache", token), **settings})
    assert done.returncode == expect, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_an_autoencoder_of_the_hub_by_name(hub, photos, tmp_path):
    once = {**STEPS, "max_train_steps": 4, "checkpointing_steps": 2}
    text = ask(hub, tmp_path, f"{USER}/vae", photos=photos, steps=once, expect=0)
    commit = hub.repos[f"{USER}/vae"].commits[-1]
    assert f"{USER}/vae reconstructs" in text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["unet"]["autoencoder"]["revision"] == commit
    assert not any("huge" in request or "README" in request for request in hub.requests if "/resolve/" in request)
    # without the Hub, from its cache
    again = {**once, "max_train_steps": 6}
    text = ask(hub, tmp_path, f"{USER}/vae", photos=photos, steps=again, expect=0, HF_HUB_OFFLINE="1")
    assert "reconstructs" not in text and sorted(losses(tmp_path / "out", "unet")) == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["unet"]["autoencoder"]["revision"] == commit
    text = ask(hub, tmp_path / "empty", f"{USER}/vae", HF_HUB_OFFLINE="1")
    assert "the Hub cannot be reached, and its files are not in the Hub's cache" in text
    # the repository has changed: the run says which revision it was
    new = (hub.models / "other" / "diffusion_pytorch_model.safetensors").read_bytes()
    old = hub.content(f"{USER}/vae", "diffusion_pytorch_model.safetensors")
    hub.write(f"{USER}/vae", "diffusion_pytorch_model.safetensors", new)
    text = ask(hub, tmp_path, f"{USER}/vae", photos=photos, steps={**once, "max_train_steps": 8})
    assert f"--autoencoder_revision {commit}" in text
    hub.write(f"{USER}/vae", "diffusion_pytorch_model.safetensors", old)


def test_an_autoencoder_inside_a_pipeline(hub, photos, tmp_path):
    few = {**STEPS, "max_train_steps": 2}
    assert "reconstructs" in ask(hub, tmp_path, f"{USER}/pipeline", photos=photos, steps=few, expect=0)
    text = ask(
        hub, tmp_path / "b", f"{USER}/pipeline", "--autoencoder_subfolder", "vae", photos=photos, steps=few, expect=0
    )
    assert "reconstructs" in text


def test_refusals_are_one_sentence(hub, tmp_path):
    wanted = {
        (f"{USER}/pickle",): "has its weights only as a pickle (diffusion_pytorch_model.bin), which can run code",
        (f"{USER}/truncated",): f"{USER}/truncated is not an autoencoder that can be loaded",
        (f"{USER}/wrong",): "names the class UNet2DModel, which is none of AutoencoderKL",
        (f"{USER}/nothing",): "holds no config.json, also not in vae, vqvae",
        (f"{USER}/missing",): "neither a folder here nor a repository that you can read on the Hub",
        (f"{USER}/private",): "neither a folder here nor a repository that you can read on the Hub",
        (f"{USER}/gated",): f"it is gated. Accept its conditions at huggingface.co/{USER}/gated",
        (f"{USER}/vae", "--autoencoder_revision", "nowhere"): "it has no revision nowhere",
        (f"{USER}/pipeline", "--autoencoder_subfolder", "vea"): "holds no config.json in its folder vea",
    }
    hub.fail(f"GET /api/models/{USER}/gated", Status(403, {"X-Error-Code": "GatedRepo"}))
    flags = {"train_data_dir": "/", "resolution": 16, **STEPS}
    runs = [[*command("train_unet.py", tmp_path / "out", autoencoder=name, **flags), *more] for name, *more in wanted]
    for what, (status, text) in zip(wanted.values(), run_each(hub, tmp_path / "home", runs), strict=True):
        said = [line for line in text.strip().splitlines() if line and not line.startswith(("Fetching", "No files"))]
        assert what in text and len(said) == 1 and status == 2, text
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- refusals, dtypes


def test_folders(tmp_path):
    saved("kl", tmp_path / "run" / "pipeline" / "vqvae")
    saved("vq", tmp_path / "run" / "autoencoder")
    parts = ("vae", "vqvae", "autoencoder")
    assert find_model(str(tmp_path / "run"), "autoencoder", parts) == tmp_path / "run" / "autoencoder"
    assert find_model(str(tmp_path / "run" / "pipeline"), "autoencoder", parts).name == "vqvae"
    assert find_model(str(tmp_path / "run"), "autoencoder", parts, subfolder="pipeline/vqvae").name == "vqvae"
    with pytest.raises(UserError, match="autoencoder /absent/folder is neither a folder here nor an id of the Hub"):
        find_model("/absent/folder", "autoencoder", parts)
    with pytest.raises(UserError, match="has no folder vea"):
        find_model(str(tmp_path / "run"), "autoencoder", parts, subfolder="vea")
    file = tmp_path / "run" / "autoencoder" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is a file. Give the folder that holds it"):
        find_model(str(file), "autoencoder", parts)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"only as a pickle \(diffusion_pytorch_model.bin\)"):
        load_autoencoder(tmp_path / "run" / "autoencoder")


def test_weights_and_config_belong_together(tmp_path):
    autoencoder = small_autoencoder("kl")
    autoencoder.save_pretrained(tmp_path)
    path, weights = tmp_path / "diffusion_pytorch_model.safetensors", autoencoder.state_dict()
    save_file({name: value for name, value in weights.items() if "mid_block" not in name}, path, {"format": "pt"})
    with pytest.raises(UserError, match="lack 52 of those that config.json asks for, such as decoder.mid_block"):
        load_autoencoder(tmp_path)
    save_file({**weights, "decoder.more": torch.ones(1)}, path, {"format": "pt"})
    with pytest.raises(UserError, match="1 weights that config.json does not ask for, such as decoder.more"):
        load_autoencoder(tmp_path)


def test_an_rae_has_one_resolution(tmp_path):
    autoencoder = load_autoencoder(saved("rae", tmp_path))
    with pytest.raises(UserError, match="makes images of 16 pixels only: set resolution 16"):
        check_autoencoder_fits(autoencoder, UNetConfig(dataset_name="x", resolution=32))


@torch.no_grad()
def test_half_precision_and_tiles(images, tmp_path):
    autoencoder = load_autoencoder(saved("kl", tmp_path))
    exact = latents_of(autoencoder, images)
    config = UNetConfig(dataset_name="x", resolution=16, autoencoder_dtype="bfloat16")
    half = encoder_of(autoencoder, config)(images)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.1
    assert autoencoder.dtype == torch.float32
    tiled = encoder_of(autoencoder, UNetConfig(dataset_name="x", resolution=16, autoencoder_tiling=True))
    assert tiled(images).shape == exact.shape
    assert not autoencoder.use_tiling
    rae = load_autoencoder(saved("rae", tmp_path / "rae"))
    with pytest.raises(UserError, match="autoencoder_tiling: AutoencoderRAE has none"):
        encoder_of(rae, UNetConfig(dataset_name="x", resolution=16, autoencoder_tiling=True))


def test_latents_beyond_float16_stop_the_run(photos, tmp_path):
    autoencoder = small_autoencoder("kl")
    autoencoder.quant_conv.weight.mul_(1e7)
    autoencoder.save_pretrained(tmp_path / "vae")
    flags = {"train_data_dir": photos, "resolution": 16, "autoencoder": tmp_path / "vae", **STEPS}
    text = launch("train_unet.py", tmp_path / "out", expect=2, **flags)
    assert "latents that are not finite, or above 65504" in text and "Traceback" not in text


def test_the_table_names_classes_of_diffusers():
    assert all(hasattr(diffusers, name) for name in AUTOENCODERS)
    assert {kind for kind, _ in SMALL.values()} == set(AUTOENCODERS)


FOUR = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
FOUR |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
BOTH = ("encoder", "decoder")
SANA = {
    **{f"{part}_block_out_channels": (128, 256, 512, 512, 1024, 1024) for part in BOTH},
    **{f"{part}_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3 for part in BOTH},
    **{f"{part}_qkv_multiscales": ((), (), (), (5,), (5,), (5,)) for part in BOTH},
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
}


@pytest.mark.parametrize(
    ("kind", "arguments", "resolution", "latents", "millions"),
    [
        ("AutoencoderKL", FOUR, 256, (4, 32, 32), 83.65),
        ("AutoencoderKL", {**FOUR, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 512,
         (16, 64, 64), 83.82),
        ("AutoencoderDC", SANA, 1024, (32, 32, 32), 312.25),
    ],
    ids=["Stable Diffusion", "FLUX", "DC-AE"],
)  # fmt: skip
def test_full_sizes_without_their_weights(kind, arguments, resolution, latents, millions, tmp_path):
    """Shapes, memory and the path through encoder, U-Net and decoder, of autoencoders as they are on the Hub."""
    with torch.device("meta"), torch.no_grad():
        autoencoder = getattr(diffusers, kind)(**arguments)
        images = torch.empty(2, 3, resolution, resolution)
        made = latents_of(autoencoder, images)
        assert tuple(made.shape[1:]) == latents
        assert decode_latents(autoencoder, made).shape == images.shape
    autoencoder.save_config(tmp_path)
    config = UNetConfig(dataset_name="x", resolution=resolution, autoencoder=str(tmp_path))
    assert latents_of_pretrained(tmp_path, config) == latents
    counted = count_pretrained(tmp_path, config)
    assert counted["parameters"] / 1e6 == pytest.approx(millions, abs=0.01)
    assert counted["encoder_flops"] > 1e11
    figures, alone = count_unet(config, tmp_path, False), count_unet_alone(config, *latents[:2])
    assert figures["fixed_bytes"] - alone["fixed_bytes"] == pytest.approx(4e6 * millions, rel=1e-3)
    decoded = 4 * 3 * resolution**2 * config.num_validation_samples  # at least the pixels of the grid
    assert figures["drawing_bytes"] > decoded
