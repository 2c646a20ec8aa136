"""Sampling speed on a GPU: images/s of a pipeline at 20, 4 and 1 steps, as it is and compiled.

    python benchmarks/gpu_sampling.py --json DIR/sampling.json --minutes 1

The pipeline has random weights, which cost what trained ones cost. `--rehearse` runs on a CPU at toy size.
"""

import argparse
import statistics
import sys
import time
import traceback
from pathlib import Path

import torch

from latent_ddpm.autoencoder.stock import new_vqmodel
from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.diffusion.noise_schedule import sampling_scheduler
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.files import write_json
from latent_ddpm.training.acceleration import prepare_for_compiler
from pipeline_latent_ddpm import LatentDDPMPipeline

ROOT = Path(__file__).resolve().parent.parent
STEPS = (20, 4, 1)


def make_pipeline(name: str, small: list[str]) -> LatentDDPMPipeline:
    """A pipeline of the config's shape with random weights."""
    words = ["--config", str(ROOT / "configs" / f"{name}.yaml")]
    words += [] if small else ["--train_data_dir", "null", "--dataset_name", "none"]
    of_autoencoder = parse_config(AutoencoderConfig, words)
    config = parse_config(UNetConfig, [*words, *small])
    side = of_autoencoder.resolution // 2 ** (len(of_autoencoder.block_out_channels) - 1)
    unet = make_unet(config, of_autoencoder.latent_channels, side, zero_branches=False)
    autoencoder = new_vqmodel(of_autoencoder, mid_block_add_attention=of_autoencoder.mid_block_add_attention)
    pipeline = LatentDDPMPipeline(autoencoder, unet, sampling_scheduler(config))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rate(pipeline: LatentDDPMPipeline, batch: int, steps: int, repeats: int, device: torch.device) -> list[float]:
    """Images/s of each of `repeats` calls."""
    rates = []
    for _ in range(repeats):
        begun = time.perf_counter()
        pipeline(batch_size=batch, num_inference_steps=steps, output_type="pt")
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(batch / (time.perf_counter() - begun))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    torch.set_float32_matmul_precision("high")
    result = {
        "command": "python benchmarks/gpu_sampling.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": [],
    }
    small = ["--unet_block_out_channels", "[32]", "--unet_attention_levels", "[]"]
    for name, batch in {"mnist": 2}.items() if options.rehearse else {"cifar10": 256, "celebahq_256": 32}.items():
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        pipeline = make_pipeline(name, small if options.rehearse else []).to(device, dtype)
        for compiled in (False, True):
            if compiled:
                for network in (pipeline.unet, pipeline.vqvae.decoder):
                    prepare_for_compiler(network.to(memory_format=torch.channels_last))
                    network.compile(backend="aot_eager" if options.rehearse else "inductor", dynamic=False)
            for steps in STEPS:
                if time.monotonic() > ends:
                    result.setdefault("left_out", []).append([name, compiled, steps])
                    continue
                setting = {"config": name, "batch": batch, "steps": steps, "compiled": compiled}
                try:
                    begun = time.perf_counter()
                    rate(pipeline, batch, steps, 1, device)
                    setting["first_call_s"] = time.perf_counter() - begun
                    rates = rate(pipeline, batch, steps, 1 if options.rehearse else 5, device)
                    setting |= {"images_per_s": statistics.median(rates), "range": [min(rates), max(rates)]}
                except Exception:
                    setting["error"] = traceback.format_exc()[-1500:]
                result["settings"].append(setting)
                print(setting)
                write_json(options.json, result)
    write_json(options.json, result)


if __name__ == "__main__":
    main()
