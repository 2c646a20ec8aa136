"""Compare full fine-tuning of a U-Net with LoRA (arXiv 2106.09685) on few images. Needs `pip install peft`.

    python benchmarks/benchmark_lora.py --task outputs/transfer/cifar10 --json docs/results/pretrained/lora.json \\
        --images 50 500 --methods full:3e-4 lora-8:1e-3 lora-32:1e-3 --seeds 0 1 2

`--task` is a folder of benchmark_transfer.py: the U-Net of its source trains on the first images of its target for
`--steps` steps. A method is `full` or `lora-RANK`, and its learning rate. LoRA adds to all linear and convolutional
layers, and is merged at the end, so all results are stock pipelines. scripts/evaluate.py compares their samples with
other images of the kind, which no run has seen. A second call goes on where the first one stopped.
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from benchmark_recipes import as_words, distance
from benchmark_transfer import SOURCES
from torch import nn

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.diffusion.noise_schedule import noise_table
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.files import write_json
from latent_ddpm.training.ema import EMA
from latent_ddpm.training.launch import run
from pipeline_latent_ddpm import LatentDDPMPipeline

BATCH, EMA_DECAY, WARMUP = 64, 0.99, 20


def latents_of_target(pipeline: LatentDDPMPipeline, folder: Path, count: int, flip: bool) -> torch.Tensor:
    """Latents of the first images (N, D, h, w), and of their mirror images, in model space."""
    pictures = datasets.Dataset.from_parquet(str(folder / "train.parquet"))["image"][:count]
    pixels = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
    images = torch.from_numpy(pixels).movedim(-1, 1).float() / 127.5 - 1
    return pipeline.encode(torch.cat([images, images.flip(-1)]) if flip else images)


def with_lora(unet: nn.Module, rank: int) -> None:
    """Freeze a U-Net, and add low-rank updates to its linear and convolutional layers, in place."""
    import peft

    layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("lora_" in name)


def merged(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a U-Net with LoRA, as those of one without."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in unet.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    weights = {name: value for name, value in unet.state_dict().items() if "lora_" not in name}
    return {name.replace(".base_layer", ""): value for name, value in weights.items()}


def fine_tune(
    pipeline: LatentDDPMPipeline, latents: torch.Tensor, config: UNetConfig, method: str, rate: float, steps: int
) -> LatentDDPMPipeline:
    """A pipeline whose U-Net was trained on the latents."""
    unet, kind = copy.deepcopy(pipeline.unet).train(), method.partition("-")[2]
    torch.manual_seed(config.seed)
    if kind:
        with_lora(unet, int(kind))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer, table = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), noise_table(config)
    average = EMA(unet, EMA_DECAY)
    order = torch.Generator().manual_seed(config.seed)
    for step in range(steps):
        factor = min(1, (step + 1) / WARMUP) * 0.5 * (1 + np.cos(np.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * factor
        chosen = latents[torch.randint(len(latents), (BATCH,), generator=order)]
        batch = training_batch(chosen, step * BATCH + torch.arange(BATCH), config, table)
        batch.loss(unet(batch.noisy, batch.timesteps).sample).backward()
        nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update(unet, step)
    made = copy.deepcopy(pipeline.unet)
    made.load_state_dict(merged(average.model) if kind else average.model.state_dict())
    return LatentDDPMPipeline(pipeline.vqvae, made, pipeline.scheduler)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--task", type=Path)
    parser.add_argument("--images", nargs="+", type=int, default=[50, 500])
    parser.add_argument("--methods", nargs="+", default=["full:3e-4", "lora-8:1e-3", "lora-32:1e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options = parser.parse_args(argv)
    keys = SOURCES[options.task.name]
    others = as_words({**keys, "dataset_name": str(options.task / "sets" / "others")})
    pipeline = LatentDDPMPipeline.from_pretrained(str(options.task / "source" / "pipeline"))
    found: dict[str, dict[str, dict[str, dict]]] = {}
    for count in options.images:
        latents = latents_of_target(pipeline, options.task / "sets" / "target", count, keys["random_flip"])
        for method in options.methods:
            for seed in options.seeds:
                words = ["--config", str(options.task / "source" / "train_unet.yaml"), "--seed", str(seed)]
                config = parse_config(UNetConfig, words)
                name = f"{method.replace(':', '-')}-{count}-{seed}"
                folder = options.task / "lora"
                if not (folder / name / "model_index.json").exists():
                    kind, _, rate = method.partition(":")
                    made = fine_tune(pipeline, latents, config, kind, float(rate), options.steps)
                    made.save_pretrained(str(folder / name))
                result = distance(name, folder, others, folder / name, config.num_inference_steps, options.num_images)
                found.setdefault(str(count), {}).setdefault(method, {})[str(seed)] = result
                print(count, method, seed, json.dumps(result), flush=True)
        means = {
            count: {method: float(np.mean([one["fd"] for one in of.values()])) for method, of in methods.items()}
            for count, methods in found.items()
        }
        command = "python benchmarks/benchmark_lora.py " + shlex.join(argv)
        write_json(options.json, {"command": command, "torch": torch.__version__, "mean_fd": means, "results": found})
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
