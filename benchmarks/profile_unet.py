"""Measure where the time of a training step of stage 2 goes, inside train_unet.py.

    python benchmarks/profile_unet.py --json docs/results/NAME.json --config configs/mnist.yaml --max_train_steps 300

Takes the keys of train_unet.py, runs it with timers around the functions that it calls, and reports the shares of a
step: forward (with the loss), backward, optimizer step, and the rest (waiting for latents, noise, clipping, averages,
logging). The first tenth of the steps is warm-up. Grids, checkpoints and snapshots are excluded. On a GPU each part is
synchronized, which itself takes some time.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import UNet2DModel

import train_unet
from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.data.latents import read_ahead
from latent_ddpm.diffusion.objective import TrainingBatch
from latent_ddpm.files import write_json
from latent_ddpm.training.ema import PowerEMA
from latent_ddpm.training.launch import run
from latent_ddpm.training.tracking import Tracker

# what is timed: (owner, name, part)
PARTS = (
    (UNet2DModel, "forward", "forward"),
    (TrainingBatch, "loss", "forward"),
    (Accelerator, "backward", "backward"),
    (AcceleratedOptimizer, "step", "optimizer"),
    (AcceleratedOptimizer, "zero_grad", "optimizer"),
    (train_unet, "training_batch", "noise"),
    (train_unet, "clip_gradients", "clipping"),
    (PowerEMA, "update", "averages"),
    (Tracker, "log", "logging"),
    (Tracker, "advance", "logging"),
)
CORE = ("forward", "backward", "optimizer")


def now() -> float:
    """Seconds, when everything asked of the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds per part of each step; a step begins where the learning rate is set."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.begun = 0.0

    def begin_step(self) -> None:
        if self.steps:
            self.steps[-1]["whole"] = now() - self.begun
        self.begun = now()
        self.steps.append(defaultdict(float))

    def timed(self, function: Callable, part: str) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            begun = now()
            try:
                return function(*args, **kwargs)
            finally:
                if self.steps:
                    self.steps[-1][part] += now() - begun

        return wrapper

    def timed_batches(self, *args: object) -> Iterator[object]:
        """`read_ahead`, of which is timed what the loop waits for."""
        batches = read_ahead(*args)
        following = self.timed(lambda: next(batches, None), "latents")
        while (batch := following()) is not None:
            yield batch

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While this holds, the parts are timed."""
        set_rate = train_unet.set_learning_rate

        def set_and_begin(*args: object) -> None:
            self.begin_step()
            set_rate(*args)

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(train_unet, "set_learning_rate", set_and_begin))
            stack.enter_context(mock.patch.object(train_unet, "read_ahead", self.timed_batches))
            for owner, name, part in PARTS:
                stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name), part)))
            yield


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", type=Path, required=True)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    options, rest = parser.parse_known_args(argv)
    config = parse_config(UNetConfig, rest)
    latents_dir = config.latents_dir or Path(config.output_dir) / "latents"
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        never = str(10**9)
        words = ["--output_dir", folder, "--validation_steps", never, "--checkpointing_steps", never]
        words += ["--autoencoder", config.autoencoder or str(config.autoencoder_dir), "--latents_dir", str(latents_dir)]
        with clock.running():
            train_unet.main(
                [*rest, *words, "--ema_snapshots", "0", "--self_guidance_steps", "0", "--num_validation_samples", "1"]
            )
    steps = clock.steps[len(clock.steps) // 10 : -1]  # the last one holds the end of the run
    parts = dict.fromkeys(["latents", *(part for *_, part in PARTS)])
    shares = {part: [step[part] / step["whole"] for step in steps] for part in parts}
    rest_of = [1 - sum(step[part] for part in CORE) / step["whole"] for step in steps]
    total = sum(step["whole"] for step in steps)
    result = {
        "command": "python benchmarks/profile_unet.py " + shlex.join(argv),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "steps": len(steps),
        "milliseconds_per_step_median": 1000 * statistics.median(step["whole"] for step in steps),
        "shares_median": {part: statistics.median(values) for part, values in shares.items()},
        "share_neither_forward_backward_nor_optimizer_median": statistics.median(rest_of),
        "share_neither_forward_backward_nor_optimizer_overall": 1
        - sum(step[part] for step in steps for part in CORE) / total,
    }
    write_json(options.json, result)
    print(json.dumps(result, indent=1))
    print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
