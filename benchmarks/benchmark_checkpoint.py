"""Measure how long a checkpoint takes to write, and to verify at every start.

    python benchmarks/benchmark_checkpoint.py --config configs/celebahq_256.yaml --json docs/results/NAME.json

Takes the keys of train_unet.py. Creates the networks and the optimizer's moments of stage 2, writes checkpoints as a
run does, and reads one back.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.files import write_json
from latent_ddpm.training.checkpoint import CheckpointFolder
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.launch import run
from latent_ddpm.training.optim import make_optimizer


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latents", type=int, nargs=2, default=[3, 64], help="channels and side")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    config = parse_config(UNetConfig, rest)
    unet = make_unet(config, *options.latents)
    optimizer = make_optimizer(unet.parameters(), config, config.learning_rate, config.optimizer)
    for parameter in unet.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    ema = PowerEMA(unet, config.ema_sigma_rels)
    seconds = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checkpoints = CheckpointFolder(Path(folder), "unet", 1)
        for step in range(options.rounds):
            state = {"step": step, "model": unet.state_dict(), "ema": ema.state_dict()}
            begun = time.monotonic()
            path = checkpoints.save(step, {**state, "optimizer": optimizer.state_dict()})
            seconds.append(time.monotonic() - begun)
            print(f"{seconds[-1]:.1f} s", file=sys.stderr)
        size = sum(file.stat().st_size for file in path.iterdir())
        begun = time.monotonic()
        checkpoints.resume("latest")
        loading = time.monotonic() - begun
    result = {
        "command": "python benchmarks/benchmark_checkpoint.py " + shlex.join(argv),
        "million_parameters": unet.num_parameters() / 1e6,
        "gib": size / 2**30,
        "seconds": seconds,
        "share_of_an_hour": statistics.median(seconds) / 3600,
        "seconds_to_verify_and_load": loading,
    }
    if options.json:
        write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
