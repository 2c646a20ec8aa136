"""CIFAR-10 trained on a GPU in minutes: reconstruction, samples, Frechet distance.

    python benchmarks/gpu_quality.py --json DIR/quality.json --minutes 5 --data FOLDER_OF_PARQUET_FILES

Both stages run as a user would run them, with configs/cifar10_gpu.yaml. --minutes scales the number of steps: the
config is for four minutes of training. Then the pipeline draws --num_images from fixed seeds. They are kept beside the
JSON, as `-samples.npz` (uint8, N x 32 x 32 x 3) and a grid as PNG. Their Frechet distance to the training images is
measured where the feature extractor is installed. `--measure FILE` measures it later, from the npz, on any machine.
`--rehearse` runs on a CPU, on digits, at toy size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from latent_ddpm.diffusion.sampling import draw_shared, load_pipeline
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.features import check_installed, frechet_distance
from latent_ddpm.evaluation.grids import make_grid
from latent_ddpm.files import save_png, write_json

ROOT = Path(__file__).resolve().parent.parent
MINUTES = 4.0  # of training, which the config is for
EXTRACTOR = "efficientnet-lite0"


def last_metrics(folder: Path, stage: str) -> dict[str, float]:
    """The last value of every metric of a stage."""
    found: dict[str, float] = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["stage"] == stage:
            found |= record
    return found


def train(stage: str, words: list[str], folder: Path) -> dict:
    """Run a stage; returns its seconds and last metrics."""
    begun = time.monotonic()
    command = [sys.executable, str(ROOT / f"train_{stage}.py"), *words, "--output_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {"status": done.returncode, "seconds": round(time.monotonic() - begun, 1)}
    if done.returncode:
        return found | {"output": (done.stdout + done.stderr)[-3000:]}
    return found | {"metrics": last_metrics(folder, stage)}


def distance(samples: np.ndarray, data: str, device: torch.device) -> dict:
    """Frechet distance of samples (N, H, W, 3) to the training images of `data`."""
    from datasets import load_dataset

    originals = load_dataset(data, split="train")
    pixels = np.stack([np.asarray(example["image"].convert("RGB")) for example in originals])
    pair = [torch.from_numpy(images).permute(0, 3, 1, 2) for images in (pixels, samples)]
    with tempfile.TemporaryDirectory() as scratch:
        value = frechet_distance(*pair, EXTRACTOR, device, 256, Path(scratch))
    return {"fd": value, "fd_samples": len(samples), "fd_originals": len(pixels), "feature_extractor": EXTRACTOR}


def lengths(config: str, minutes: float) -> dict[str, list[str]]:
    """The keys of both stages for so many minutes instead of MINUTES."""
    import yaml

    sections, words = yaml.safe_load(Path(config).read_text(encoding="utf-8")), {}
    for stage in ("autoencoder", "unet"):
        steps = max(2, round(sections[f"train_{stage}"]["max_train_steps"] * minutes / MINUTES))
        words[stage] = ["--max_train_steps", str(steps), "--validation_steps", str(steps)]
        words[stage] += ["--checkpointing_steps", str(steps)]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--data", help="folder of CIFAR-10's parquet files")
    parser.add_argument("--num_images", type=int, default=5000)
    parser.add_argument("--measure", type=Path, help="an npz of an earlier call: measure it, and add to --json")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    if options.measure:
        result = json.loads(options.json.read_text(encoding="utf-8")) | distance(
            np.load(options.measure)["samples"], options.data, device
        )
        write_json(options.json, result)
        print(json.dumps({key: result[key] for key in ("fd", "fd_samples", "fd_originals")}))
        return
    result = {
        "command": "python benchmarks/gpu_quality.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    count = 4 if options.rehearse else options.num_images
    if options.rehearse:
        words = ["--config", str(ROOT / "configs/mnist.yaml"), "--max_train_steps", "2", "--max_validation_images", "8"]
        own = {"autoencoder": ["--block_out_channels", "[8,8,8]", "--norm_num_groups", "4"]}
        own["unet"] = ["--unet_block_out_channels", "[32]", "--unet_attention_levels", "[]"]
        own["unet"] += ["--num_validation_samples", "4", "--num_inference_steps", "2"]
        own["unet"] += ["--ema_snapshots", "0", "--self_guidance_steps", "0"]
    else:
        config = str(ROOT / "configs/cifar10_gpu.yaml")
        words = ["--config", config, "--dataset_name", str(options.data), "--image_column", "image"]
        own = lengths(config, max(0.1, options.minutes - 1))  # a minute for start-up, export and samples
    with tempfile.TemporaryDirectory() as folder:
        for stage in ("autoencoder", "unet"):
            result[stage] = train(stage, [*words, *own[stage]], Path(folder) / "run")
            write_json(options.json, result)
            if result[stage]["status"]:
                print(result[stage]["output"])
                sys.exit(1)
        pipe = load_pipeline(str(Path(folder) / "run" / "pipeline")).to(device)
        pipe.set_progress_bar_config(disable=True)
        begun = time.monotonic()
        drawn = draw_shared(pipe, 0, count, min(count, 500), 2 if options.rehearse else 20)
        result["sampling"] = {"images": count, "seconds": time.monotonic() - begun}
    samples = drawn.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    stem = options.json.with_suffix("")
    np.savez_compressed(f"{stem}-samples.npz", samples=samples)
    save_png(make_grid(drawn[:64].float() / 127.5 - 1, scale=2), Path(f"{stem}-samples.png"))
    write_json(options.json, result)
    try:
        check_installed(EXTRACTOR)
        if not options.rehearse:
            write_json(options.json, result | distance(samples, options.data, device))
    except UserError as error:
        print(f"no Frechet distance: {error}")
    print(json.dumps({stage: result[stage].get("metrics") for stage in ("autoencoder", "unet")}))


if __name__ == "__main__":
    main()
