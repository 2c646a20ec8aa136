"""Count memory and FLOPs of both stages from their configs, without a GPU and without computing anything.

    python benchmarks/count_memory.py --configs configs/cifar10_gpu.yaml --json docs/results/scale/memory.json

Writes the figures that latent_ddpm/planning/counting.py describes, for each config and stage.
"""

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.files import write_json
from latent_ddpm.planning.counting import GIB, count_autoencoder, count_unet
from latent_ddpm.training.launch import run


def count(path: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """The figures of both stages of a config file, with further keys of both stages."""
    argv = ["--config", str(path), *words]
    autoencoder, unet = parse_config(AutoencoderConfig, argv), parse_config(UNetConfig, argv)
    return {
        "autoencoder": count_autoencoder(autoencoder),
        "unet": count_unet(unet, autoencoder, checkpointing=False),
        "unet_gradient_checkpointing": count_unet(unet, autoencoder, checkpointing=True),
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", required=True, type=Path)
    parser.add_argument("--json", required=True, type=Path)
    options = parser.parse_args(argv)
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)
    found = {path.stem: count(path) for path in options.configs}
    for name, stages in found.items():
        for stage, figures in stages.items():
            batches = ", ".join(f"{batch} on {card}" for card, batch in figures["largest_batch"].items())
            print(
                f"{name} {stage}: {figures['parameters'] / 1e6:.1f} million parameters, "
                f"{figures['fixed_bytes'] / GIB:.2f} GiB and {figures['bytes_per_image'] / 2**20:.1f} MiB an image, "
                f"{figures['flops_per_image'] / 1e9:.0f} GFLOP an image; at most {batches}"
            )
    command = shlex.join(["python", "benchmarks/count_memory.py", *argv])
    write_json(options.json, {"command": command, "torch": torch.__version__, "configs": found})
    return 0


if __name__ == "__main__":
    run(main)
