"""Measure whether publishing slows training: stage 2 with and without a push at every checkpoint, alternating.

    python benchmarks/benchmark_hub.py --json docs/results/NAME.json --config configs/mnist.yaml \\
        --autoencoder outputs/mnist/autoencoder --max_train_steps 300 --checkpointing_steps 50

Takes the keys of train_unet.py. It pushes to the tests' Hub on loopback. That server uses the same cores, so the result
is a lower bound. It compares the time from the first to the last line of metrics.jsonl, which includes exports and the
preparation of uploads. Both variants write the same checkpoints.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from latent_ddpm.files import write_json
from latent_ddpm.publishing.curves import overall_speed
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from hub_server import USER, HubServer  # noqa: E402, it is no part of the package

PUSHING = ["--push_to_hub", "true", "--hub_model_id", f"{USER}/speed", "--hub_strategy", "checkpoint"]


def images_per_second(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    """Train in a process of its own; images over the time from the first logged step to the last."""
    words = [sys.executable, "train_unet.py", *words, "--output_dir", str(folder)]
    subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, check=True, capture_output=True)
    return overall_speed(folder / "metrics.jsonl")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    rates: dict[str, list[float]] = {"quiet": [], "pushing": []}
    with tempfile.TemporaryDirectory() as name, HubServer(Path(name) / "server") as hub:
        folder = Path(name)
        environment = hub.environment(folder / "home")
        words = [*rest, "--latents_dir", str(folder / "latents")]
        images_per_second([*words, "--max_train_steps", "2", "--logging_steps", "1"], folder / "first", environment)
        for number in range(options.rounds):
            # the order turns round, so that neither is always first
            for kind in ("quiet", "pushing") if number % 2 == 0 else ("pushing", "quiet"):
                more = PUSHING if kind == "pushing" else []
                rates[kind].append(images_per_second([*words, *more], folder / f"{kind}-{number}", environment))
                print(f"{kind}: {rates[kind][-1]:.1f} images/s", file=sys.stderr)
        pushes = len(hub.repos[f"{USER}/speed"].messages)
    ratios = [pushing / quiet for quiet, pushing in zip(rates["quiet"], rates["pushing"], strict=True)]
    result = {
        "command": "python benchmarks/benchmark_hub.py " + shlex.join(argv),
        "images_per_second": rates,
        "pushes": pushes,
        "pushing_over_quiet_median": statistics.median(ratios),
        "pushing_over_quiet_range": [min(ratios), max(ratios)],
    }
    write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
