"""The benchmark scripts run, measure what they say, and go on where they were stopped."""

import importlib.util
import json
import os
import shutil

import datasets
import pytest
import yaml
from conftest import ROOT, launch, run_script
from odd_images import picture
from PIL import Image
from preloaded import Script

from latent_ddpm.autoencoder.stock import load_autoencoder
from latent_ddpm.errors import UserError
from latent_ddpm.resizing import PYTORCH_RESIZES

TINY = ["--resolution", "16", "--block_out_channels", "[8,16]", "--norm_num_groups", "4", "--num_vq_embeddings", "32"]
TINY += ["--train_batch_size", "8", "--lr_warmup_steps", "2", "--dataloader_num_workers", "0"]


def script(name, *words, expect=0):
    done = run_script(name, *words, expect=expect, folder="benchmarks")
    return done.stdout + done.stderr


def test_benchmark_autoencoder(photos, tmp_path):
    recipes = ["stock", "ema --equivariance_share 0.5", "simvq", "fsq", "fsq --fsq_levels [4,4,2]"]
    recipes.append("kl --kl_weight 1e-4 --block_out_channels [4,8]")
    script("benchmark_autoencoder.py", "--minutes", 0.04, "--turn", 0.6, "--json", tmp_path / "r.json", "--recipes",
           *recipes, "--frechet_images", 20, "--train_data_dir", photos, "--save_dir", tmp_path, *TINY)  # fmt: skip
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["results"]) == recipes and "--recipes stock 'ema --equi" in result["command"]
    for name, figures in result["results"].items():
        assert figures["psnr"] > 5 and figures["rfd"] > 0 and figures["rfd_images"] == 2
        assert 0.03 < figures["trained_minutes"] < 0.1 and figures["trained_images"] > 8
        assert ("codebook_usage" in figures) == (not name.startswith("kl"))
        assert figures["time_per_image_over_stock_median"] > 0
    parameters = [figures["parameters"] for figures in result["results"].values()]
    assert parameters[5] < 0.5 * parameters[1]
    assert Image.open(tmp_path / "r.png").size[0] > 100
    assert Image.open(tmp_path / "r-reconstructions.png").size[1] >= 6 * 2 * 16
    for name in ("stock", "fsq", "kl-kl_weight-1e-4-block_out_channels-4-8"):
        scale = load_autoencoder(tmp_path / name).config.scaling_factor
        assert (scale == 0.18215) == (name == "stock")


def test_benchmark_autoencoder_knows_its_recipes(photos, tmp_path):
    words = ["--json", tmp_path / "r.json", "--recipes", "vq", "--train_data_dir", photos, *TINY]
    assert "There is no recipe vq" in script("benchmark_autoencoder.py", *words, expect=2)
    words[3] = "ema --lpips_weight 1"
    assert "set lpips_weight 0" in script("benchmark_autoencoder.py", *words, expect=2)


@pytest.mark.long
def test_benchmark_discriminator_and_that_it_goes_on_where_it_was_killed(photos, tmp_path):
    words = ["--seeds", 1, "--work_dir", tmp_path / "work", "--json", tmp_path / "r.json", "--train_data_dir",
             photos, *TINY, "--max_train_steps", 8, "--disc_start", 4, "--checkpointing_steps", 2, "--disc_weight", 0.5,
             "--disc_adaptive_steps", 1, "--disc_channels", 8, "--disc_layers", 1, "--validation_fraction", 0.2,
             "--recipes", "--disc_norm actnorm"]  # fmt: skip
    script("benchmark_discriminator.py", *words)
    whole = json.loads((tmp_path / "r.json").read_text())
    name = "with --disc_norm actnorm"
    with_it = (
        tmp_path / "work" / "seed-1" / "with-disc_norm-actnorm"
    )  # as a kill in the middle of this run would leave it
    for path in [*with_it.glob("autoencoder/*"), *with_it.glob("evaluation-*.json"), tmp_path / "r.json"]:
        path.unlink()
    (with_it / "autoencoder").rmdir()
    shutil.rmtree(with_it / "checkpoints" / "autoencoder-00000008")
    script("benchmark_discriminator.py", *words)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [r["seed"] for r in result["results"]] == [1]
    first, figures = result["results"][0], result["recipes"][name]
    assert list(result["recipes"]) == [name] and first[name]["psnr"] != first["without"]["psnr"]
    assert figures["psnr_lost"][0] == first["without"]["psnr"] - first[name]["psnr"]
    assert figures["rfd_over_without"][0] == first[name]["rfd"] / first["without"]["rfd"]
    assert Image.open(tmp_path / "r.png").size[0] > 100
    assert result["recipes"] == whole["recipes"]
    words += ["--lr_warmup_steps", 3]
    assert "holds a run with other options" in script("benchmark_discriminator.py", *words, expect=2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("--disc_weight", 0, "disc_weight above 0"), ("--disc_start", 3, "multiple of checkpointing_steps")],
)
def test_benchmark_discriminator_refuses_what_it_cannot_compare(photos, tmp_path, key, value, words):
    base = ["--work_dir", tmp_path / "work", "--json", tmp_path / "r.json", "--train_data_dir", photos, *TINY,
            "--max_train_steps", 8, "--disc_start", 4, "--checkpointing_steps", 2, "--disc_weight", 0.5,
            "--disc_layers", 1]  # fmt: skip
    assert words in script("benchmark_discriminator.py", *base, key, value, expect=2)


def test_profile_autoencoder(photos, tmp_path):
    words = ["--json", tmp_path / "p.json", "--resolutions", 16, 32, "--variants", "channels_last", "--repeats", 2]
    text = script("profile_autoencoder.py", *words, "--pixels", 1024, "--train_data_dir", photos, *TINY)
    result = json.loads((tmp_path / "p.json").read_text())
    assert list(result["resolutions"]) == ["16", "32"] and "32 pixels, batches of 1" in text
    for side, figures in result["resolutions"].items():
        assert figures["variants"]["plain"]["time_over_plain_median"] == 1
        assert sum(figures["shares"].values()) == pytest.approx(1)
        assert all(-0.05 < share < 1 for share in figures["shares"].values())
        assert {f"encoder {side}px", f"decoder {side}px", "encoder middle", "quantizer"} <= figures["shares"].keys()
    bad = [*words, "--variants", "plain+faster", "--train_data_dir", photos, *TINY]
    assert "There is no variant plain+faster" in script("profile_autoencoder.py", *bad, expect=2)


@pytest.fixture(scope="module")
def small_autoencoder(photos, tmp_path_factory):
    """A stage 1 of two steps."""
    folder = tmp_path_factory.mktemp("stage-1")
    launch("train_autoencoder.py", folder, train_data_dir=photos, resolution=16, max_train_steps=2)
    return folder / "autoencoder"


SMALL_UNET = ["--unet_block_out_channels", "[16,32]", "--unet_norm_num_groups", "8", "--unet_attention_levels", "[]"]
SMALL_UNET += ["--unet_layers_per_block", "1", "--train_batch_size", "8", "--dataloader_num_workers", "0"]
SMALL_UNET += ["--resolution", "16", "--num_inference_steps", "2", "--lr_warmup_steps", "2"]


def test_benchmark_diffusion_and_that_it_measures_what_was_trained(photos, small_autoencoder, tmp_path):
    ours = "ours --prediction_type flow_prediction --inference_scheduler unipc --ema_sigma_rels [0.2]"
    words = ["--minutes", 0.05, "--turn", 1.5, "--recipes", "stock", ours, "--num_images", 12, "--work_dir", tmp_path,
             "--json", tmp_path / "r.json", "--train_data_dir", photos, "--autoencoder", small_autoencoder,
             *SMALL_UNET]  # fmt: skip
    script("benchmark_diffusion.py", *words)
    result = json.loads((tmp_path / "r.json").read_text())
    assert list(result["results"]) == ["stock", ours] and "--recipes stock 'ours --pred" in result["command"]
    for name, figures in result["results"].items():
        assert figures["fd"] > 0 and figures["samples"] == 12 and figures["trained_images"] >= 16
        assert figures["sampling_steps"] == (50 if name == "stock" else 2)
        assert ("fd_over_stock" in figures) == (name != "stock")
    fd, stock = result["results"][ours]["fd"], result["results"]["stock"]["fd"]
    assert result["results"][ours]["fd_over_stock"] == fd / stock
    own = tmp_path / "ours-prediction_type-flow_prediction-inference_scheduler-unipc-ema_sigma_rels-0.2"
    kinds = {"stock": ("DDIMScheduler", "epsilon"), own.name: ("UniPCMultistepScheduler", "flow_prediction")}
    for name, kind in kinds.items():
        saved = json.loads((tmp_path / name / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
        assert (saved["_class_name"], saved["prediction_type"]) == kind
    # stopped while measuring: what is trained is not trained again
    (own / "evaluation.json").unlink()
    script("benchmark_diffusion.py", *words)
    assert json.loads((tmp_path / "r.json").read_text())["results"][ours]["fd"] == fd
    assert "holds another run" in script("benchmark_diffusion.py", *words, "--seed", 3, expect=2)


@pytest.mark.long
def test_benchmark_diffusion_with_conditions(photos, small_autoencoder, tmp_path):
    words = ["--minutes", 0.02, "--turn", 1.2, "--recipes", "ours", "ours --conditions [class]", "--num_images", 12,
             "--guidance_scales", 1, 3, "--work_dir", tmp_path, "--json", tmp_path / "r.json",
             "--train_data_dir", photos, "--autoencoder", small_autoencoder, *SMALL_UNET]  # fmt: skip
    script("benchmark_diffusion.py", *words)
    alone, conditioned = json.loads((tmp_path / "r.json").read_text())["results"].values()
    assert "settings" not in alone and [s["guidance_scale"] for s in conditioned["settings"]] == [1, 3]
    assert conditioned["fd"] == min(s["fd"] for s in conditioned["settings"]) and "class_agreement" in conditioned
    assert conditioned["parameters"] > alone["parameters"]
    words[words.index("ours")] = "stock --conditions [class]"
    assert "The stock recipe has no conditions" in script("benchmark_diffusion.py", *words, expect=2)


def test_profile_unet_shares_out_a_step(photos, small_autoencoder, tmp_path):
    words = ["--json", tmp_path / "p.json", "--train_data_dir", photos, "--autoencoder", small_autoencoder,
             "--max_train_steps", 12, "--output_dir", tmp_path, *SMALL_UNET]  # fmt: skip
    script("profile_unet.py", *words)
    result = json.loads((tmp_path / "p.json").read_text())
    shares = result["shares_median"]
    assert result["steps"] == 10 and all(0 < share < 1 for share in shares.values())
    assert {"forward", "backward", "optimizer", "latents", "noise", "clipping", "averages", "logging"} == set(shares)
    assert 0 < sum(shares[part] for part in ("forward", "backward", "optimizer")) < 1.1  # a sum of medians
    assert 0 < result["share_neither_forward_backward_nor_optimizer_median"] < 1


@pytest.mark.long
def test_benchmark_latents(tmp_path):
    script("benchmark_latents.py", "--images", 100, 3000, "--rounds", 1, "--batches", 3, "--json", tmp_path / "l.json")
    medians = json.loads((tmp_path / "l.json").read_text())["medians"]
    assert list(medians) == ["100", "3000"] and all(value > 0 for value in medians["3000"].values())


def test_benchmark_latents_indexes_a_folder(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_latents", ROOT / "benchmarks" / "benchmark_latents.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_folder(tmp_path / "images", 1500)
    found = benchmark.index(tmp_path / "images", tmp_path / "run")
    assert found["images"] == 1500 and 0 < found["anonymous_released_gib"] < found["resident_released_gib"]


HELD_AT_THE_END = """
import sys
import train_unet
from latent_ddpm.data.sources.hub import HubSource
opened, make = [], HubSource.__init__
HubSource.__init__ = lambda self, *words: (make(self, *words), opened.append(self))[0]
status = train_unet.main(sys.argv[1:])
held = [source._opened is not None for source in opened]
print("held", status, held)
"""


def test_stage_2_gives_the_dataset_back(photos, small_autoencoder, tmp_path):
    """Training, validation and export do without the images, as benchmark_latents.py measures."""
    rows = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.rglob("*.png"))]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "photos.parquet")
    words = ["--dataset_name", tmp_path / "photos.parquet", "--output_dir", tmp_path / "run", "--autoencoder",
             small_autoencoder, "--max_train_steps", 2, "--validation_steps", 1, *SMALL_UNET]  # fmt: skip
    done = Script(["-c", HELD_AT_THE_END, *words]).finish()
    assert done.stdout.splitlines()[-1] == "held 0 [False]", done.stderr[-2000:]
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


@pytest.mark.skipif(not PYTORCH_RESIZES, reason="PyTorch before 2.12 has no Lanczos filter")
def test_benchmark_decoding(tmp_path):
    script(
        "benchmark_decoding.py", "--rounds", 2, "--seconds", 0.01, "--sizes", "500x400", "--json", tmp_path / "r.json"
    )
    found = json.loads((tmp_path / "r.json").read_text())["sizes"]["500x400"]
    assert found["times_as_many_as"]["plain lanczos"]["ours"]["median"] > 0
    assert found["differences"]["pytorch_to_pillow_4_pixels_from_the_border"]["max"] <= 2
    assert found["differences"]["reduced_to_all_pixels"]["max"] == 0  # 400 pixels are too few to halve


def test_benchmark_checkpoint(photos, tmp_path):
    words = ["--json", tmp_path / "c.json", "--rounds", 1, "--latents", 3, 8, "--train_data_dir", photos, *SMALL_UNET]
    script("benchmark_checkpoint.py", *words)
    result = json.loads((tmp_path / "c.json").read_text())
    # weights, two averages and AdamW's two moments
    assert result["gib"] * 2**30 == pytest.approx(5 * 4e6 * result["million_parameters"], rel=0.3)
    assert len(result["seconds"]) == 1 and result["seconds_to_verify_and_load"] > 0


@pytest.mark.long
def test_benchmark_processes(photos, small_autoencoder, tmp_path, monkeypatch):
    """With scripts that are run plainly, whatever number of processes they are asked for."""
    spec = importlib.util.spec_from_file_location("benchmark_processes", ROOT / "benchmarks" / "benchmark_processes.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    launched = []

    def plainly(processes, threads, words):
        done = Script(list(map(str, words))).finish()
        assert done.returncode == 0, done.stderr[-2000:]
        launched.append((words[0], processes, threads, [str(w) for w in words]))
        return float(len(launched) % 7)

    monkeypatch.setattr(benchmark, "launch", plainly)
    sections = {
        stage: {
            word.removeprefix("--"): yaml.safe_load(value) for word, value in zip(words[::2], words[1::2], strict=True)
        }
        for stage, words in (("train_autoencoder", TINY), ("train_unet", SMALL_UNET))
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"train_data_dir": str(photos), "max_train_steps": 3, **sections}))
    words = ["--config", tmp_path / "c.yaml", "--autoencoder", small_autoencoder, "--json", tmp_path / "p.json"]
    words = list(map(str, [*words, "--rounds", 1]))
    with pytest.raises(UserError, match="train_batch_size 8 is not a multiple of 3 processes"):
        benchmark.main([*words, "--processes", "3"])
    assert not launched
    benchmark.main([*words, "--processes", "2"])
    result = json.loads((tmp_path / "p.json").read_text())
    speeds = result["images_per_second"]
    trained = [launch for launch in launched if launch[0].startswith("train")]
    assert [launch[:3] for launch in trained] == [
        (name, processes, 3 - processes) for processes in (1, 2) for name in speeds
    ]
    for _, processes, _, asked in trained:
        assert asked[len(asked) - 1 - asked[::-1].index("--train_batch_size") + 1] == str(8 // processes)
    assert ["--codebook_start" in asked for *_, asked in trained] == [True, False, True, False]
    assert all(speed > 0 for of_script in speeds.values() for kind in of_script.values() for speed in kind)
    assert set(result["several_over_one_median"]) == set(speeds)  # so few images are encoded too soon
    monkeypatch.setattr(benchmark, "ENCODING_SECONDS", -10.0)
    benchmark.main([*words, "--processes", "2"])
    assert "encoding" in json.loads((tmp_path / "p.json").read_text())["several_over_one_median"]


def test_a_process_that_is_timed_has_as_many_cores_as_threads(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_processes", ROOT / "benchmarks" / "benchmark_processes.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    (tmp_path / "cores.py").write_text("import os, sys; open(sys.argv[1], 'w').write(str(os.sched_getaffinity(0)))")
    before = os.sched_getaffinity(0)
    assert benchmark.launch(1, 1, [tmp_path / "cores.py", tmp_path / "cores"]) > 0
    assert (tmp_path / "cores").read_text() == str({min(before)}) and os.sched_getaffinity(0) == before


@pytest.mark.long
def test_fuzz_images(tmp_path):
    script("fuzz_images.py", "--files", 150, "--seed", 1, "--json", tmp_path / "f.json")
    result = json.loads((tmp_path / "f.json").read_text())
    assert sum(result["outcomes"].values()) == 150 and not result["failures"]
    assert set(result["outcomes"]) == {"image", "error with a message"}
    assert result["undamaged_refused"].pop("PNG-20000x20000").startswith("DecompressionBombError")
    # of Pillow's own files only those it writes wrongly are refused
    assert all(name.startswith("TIFF-YCbCr") for name in result["undamaged_refused"])


@pytest.mark.long
def test_chaos_by_sigkill(tmp_path):
    script("chaos.py", "--kills", 2, "--json", tmp_path / "k.json")
    result = json.loads((tmp_path / "k.json").read_text())
    assert result["kills"] == result["kills_in_trials_with_an_identical_result"] >= 2


@pytest.mark.long
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_chaos_on_a_full_disk(tmp_path):
    script("chaos.py", "--fault", "full_disk", "--stride", 150, "--json", tmp_path / "d.json")
    result = json.loads((tmp_path / "d.json").read_text())
    assert sum(result["outcomes"].values()) >= 4 and set(result["outcomes"]) == {"a sentence"}


def test_check_inspection_finds_what_it_plants(tmp_path, monkeypatch):
    """With pictures in the place of CIFAR-10, and the script run plainly."""
    spec = importlib.util.spec_from_file_location("check_inspection", ROOT / "benchmarks" / "check_inspection.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    for split, first in (("train", 0), ("test", 40)):
        cells = [{"bytes": benchmark.saved(picture(first + k, (32, 32)), "PNG"), "path": None} for k in range(40)]
        datasets.Dataset.from_dict(
            {"image": cells, "label": [k % 2 for k in range(40)]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
        ).to_parquet(tmp_path / f"{split}.parquet")

    def plainly(words, cwd, env, check):
        done = Script([*words[1:-1], "0"], environment={"HF_DATASETS_CACHE": env["HF_DATASETS_CACHE"]}).finish()
        assert done.returncode == 0, done.stderr[-2000:]

    monkeypatch.setattr(benchmark.subprocess, "run", plainly)
    monkeypatch.setattr(benchmark, "decode_all", lambda sources, workers: None)
    plain = {"dataset_name": str(tmp_path / "test.parquet"), "resolution": 32}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    words = ["--data", str(tmp_path), "--planted", "4", "--hashes", "1000", "--json", str(tmp_path / "r.json")]
    assert benchmark.main([*words, "--digits", str(tmp_path / "plain.yaml")]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["images"] == 80 and result["found_near"] == 1 and set(result["found"].values()) == {1.0}
    assert result["command"].startswith("python benchmarks/check_inspection.py --data DATA --planted 4")
    assert result["digits"]["images"] == 40 and result["digits"]["near"] == 0
    assert result["not_planted"] == {} and (tmp_path / "r-not-planted.png").exists()
    groups = [("near", ["train[1]", "test[2]"]), ("near", ["train[8]", "train[9]"])]
    judged = benchmark.judged(groups, [("jpeg 80", "train[1]", "test[2]"), ("jpeg 80", "train[3]", "test[4]")])
    assert judged["found"] == {"jpeg 80": 0.5} and judged["not_planted"] == {"near": 1}
