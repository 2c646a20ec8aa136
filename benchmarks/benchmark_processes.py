"""Measure what more processes give: the same training and encoding with one process and with several, alternating.

    python benchmarks/benchmark_processes.py --json docs/results/NAME.json --config configs/mnist.yaml \\
        --autoencoder outputs/mnist/autoencoder --max_train_steps 60

Both stages train with one process that has all threads, and with `--processes` that divide them. The total batch is the
same, and stage 1 has its codes from the start. It compares images per second from the first to the last line of
metrics.jsonl. Then scripts/cache_latents.py encodes with one process on one core, and with several of one thread each.
The time of a call that has nothing to encode is subtracted. If less than ENCODING_SECONDS remain, no ratio is given:
use a larger dataset. Takes the keys of train_unet.py, and the keys of stage 1 that the config has. Linux only, because
processes are confined to cores.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.publishing.curves import overall_speed
from latent_ddpm.training.launch import run

LINUX = hasattr(os, "sched_setaffinity")  # elsewhere, the processes may use all cores
ROOT = Path(__file__).resolve().parent.parent
ENCODING_SECONDS = 20.0  # several times what the start of a process varies by


def launch(processes: int, threads: int, words: list[object]) -> float:
    """Run a script by `accelerate launch` on the CPU to its end; the seconds it took.

    It may use as many cores as it has threads: a single process would take all of them whatever it is told.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", processes]
    launcher += ["--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", 0]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begun = time.monotonic()
    if LINUX:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, sorted(before)[: processes * threads])  # which those that are started inherit
    try:
        done = subprocess.run(
            list(map(str, [*launcher, *words])), cwd=ROOT, env=environment, capture_output=True, text=True
        )
    finally:
        if LINUX:
            os.sched_setaffinity(0, before)
    if done.returncode:
        raise UserError(f"{shlex.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - begun


def stage_words(script: str, rest: list[str], config: AutoencoderConfig | UNetConfig, processes: int) -> list[object]:
    """A training script with a batch that makes the joint one that of the config."""
    never, often = 10**9, max(1, config.max_train_steps // 20)
    words = [script, *rest, "--train_batch_size", config.train_batch_size // processes, "--logging_steps", often]
    return [*words, "--validation_steps", never, "--checkpointing_steps", never]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    unet = parse_config(UNetConfig, rest)
    at = rest.index("--autoencoder") if "--autoencoder" in rest else len(rest)
    of_stage_1 = [*rest[:at], *rest[at + 2 :]]
    of_unet = ["--num_validation_samples", "1", "--ema_snapshots", "0", "--self_guidance_steps", "0"]
    stages = {
        "train_autoencoder.py": (parse_config(AutoencoderConfig, of_stage_1), [*of_stage_1, "--codebook_start", "0"]),
        "train_unet.py": (unet, [*rest, *of_unet]),
    }
    several = options.processes
    for config, _ in stages.values():
        if config.train_batch_size % several:
            raise UserError(f"train_batch_size {config.train_batch_size} is not a multiple of {several} processes.")
    speeds: dict[str, dict[str, list[float]]] = {script: {"one": [], "several": []} for script in stages}
    encoding: dict[str, list[float]] = {"one": [], "several": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shared = ["--output_dir", folder / "shared", "--latents_dir", folder / "latents"]
        launch(1, several, ["scripts/cache_latents.py", *rest, *shared])  # images are decoded and latents made here
        for number in range(options.rounds):
            order = [("one", 1, several), ("several", several, 1)]  # turned round, so that neither is always first
            for kind, processes, threads in order if number % 2 == 0 else reversed(order):
                for script, (config, words) in stages.items():
                    own = folder / f"{script}-{kind}-{number}"
                    own.mkdir()
                    (own / "cache").symlink_to(folder / "shared" / "cache")
                    given = ["--output_dir", own]
                    given += ["--latents_dir", folder / "latents"] if script == "train_unet.py" else []
                    launch(processes, threads, [*stage_words(script, words, config, processes), *given])
                    speeds[script][kind].append(overall_speed(own / "metrics.jsonl"))
                    print(f"{script}, {kind}: {speeds[script][kind][-1]:.1f} images/s", file=sys.stderr)
                    shutil.rmtree(own)
            for kind, processes, _ in order if number % 2 == 0 else reversed(order):
                given = ["scripts/cache_latents.py", *rest, "--output_dir", folder / "shared"]
                given += ["--latents_dir", folder / f"latents-{kind}-{number}"]
                cold, warm = (launch(processes, 1, given) for _ in range(2))
                encoding[kind].append(cold - warm)
                print(f"encoding, {kind} of one thread: {cold - warm:.1f} s", file=sys.stderr)
    ratios = {
        script: [b / a for a, b in zip(rates["one"], rates["several"], strict=True)] for script, rates in speeds.items()
    }
    if min(encoding["one"] + encoding["several"]) >= ENCODING_SECONDS:
        ratios["encoding"] = [a / b for a, b in zip(encoding["one"], encoding["several"], strict=True)]
    else:
        print("encoding: too few images to be timed", file=sys.stderr)
    result = {
        "command": "python benchmarks/benchmark_processes.py " + shlex.join(argv),
        "processes": several,
        "images_per_second": speeds,
        "encoding_seconds": encoding,
        "several_over_one_median": {kind: statistics.median(values) for kind, values in ratios.items()},
        "several_over_one_range": {kind: [min(values), max(values)] for kind, values in ratios.items()},
    }
    write_json(options.json, result)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
