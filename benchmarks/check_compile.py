"""Whether torch_compile changes what is learned: both stages compiled against eager, as real runs on this machine.

    python benchmarks/check_compile.py --json docs/results/gpu/compile.json --config configs/mnist.yaml

For each stage: the same run eager and compiled, with a validation and a checkpoint in the middle; then each one's
checkpoint goes on in the other mode, and the compiled one also compiled again. A control, eager with two micro-batches
of half the size, shows how fast other rounding errors alone grow: with discrete codes, training is chaotic. Reports the
largest relative difference of the losses, whether the compiled run resumed with the same bits, and how many graphs were
compiled after the first validation, which should be none. Further words are keys of both stages.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("autoencoder", "unet")
WATCHED = """
import runpy, sys
from torch._dynamo.utils import counters
from latent_ddpm.training.loop import TrainingRun

def advance(self, advance=TrainingRun.advance):
    advance(self)
    print("graphs at step", self.step, counters["stats"]["unique_graphs"], flush=True)

TrainingRun.advance = advance
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(stage: str, folder: Path, words: list[str], mode: str) -> dict:
    """Run a stage; returns its losses and the number of graphs compiled, by step, and its seconds."""
    command = [sys.executable, "-c", WATCHED, f"train_{stage}.py", *words, "--torch_compile", mode]
    begun = time.monotonic()
    done = subprocess.run([*command, "--output_dir", str(folder)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train_{stage}.py ended with {done.returncode}: {done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    graphs = re.findall(r"graphs at step (\d+) (\d+)", done.stdout)
    return {
        "losses": {line["step"]: line["loss"] for line in lines if line["stage"] == stage and "loss" in line},
        "graphs": {int(step): int(count) for step, count in graphs},
        "seconds": round(time.monotonic() - begun, 1),
    }


def difference(one: dict, other: dict, first: int = 1, last: int = 10**9) -> float:
    """The largest relative difference of two runs' losses from step `first` to step `last`."""
    pairs = [(loss, other["losses"][step]) for step, loss in one["losses"].items() if first <= step <= last]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def check(stage: str, root: Path, words: list[str], steps: int) -> dict:
    """The runs of a stage, and how far apart they are."""
    middle, runs = steps // 2, {}
    for mode in ("off", "default"):
        runs[mode] = train(stage, root / mode, words, mode)
    for mode, other in (("off", "default"), ("default", "off"), ("default", "default")):
        folder = root / f"{mode}-then-{other}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / mode, folder)
        for late in (folder / "checkpoints").glob(f"{stage}-*{steps}"):
            shutil.rmtree(late)
        runs[folder.name] = train(stage, folder, words, other)
    config = parse_config(AutoencoderConfig, words) if stage == "autoencoder" else parse_config(UNetConfig, words)
    half = str(config.train_batch_size // 2)
    halves = [*words, "--train_batch_size", half, "--gradient_accumulation_steps", "2"]
    runs["control"] = train(stage, root / "control", halves, "off")
    graphs = runs["default"]["graphs"]
    last = [
        next((root / name / "checkpoints").glob(f"{stage}-*{steps}")) for name in ("default", "default-then-default")
    ]
    one, other = (load_file(path / "state.safetensors") for path in last)
    equal = sum(torch.equal(value, other[name]) for name, value in one.items())
    return {
        "losses_relative": difference(runs["off"], runs["default"]),
        "losses_relative_first_8": difference(runs["off"], runs["default"], last=8),
        "control_relative": difference(runs["off"], runs["control"]),
        "control_relative_first_8": difference(runs["off"], runs["control"], last=8),
        "eager_then_compiled_relative": difference(runs["off"], runs["off-then-default"], middle + 1),
        "compiled_then_eager_relative": difference(runs["off"], runs["default-then-off"], middle + 1),
        "resumed_compiled_tensors_equal": [equal, len(one)],
        "graphs_compiled": graphs[steps],
        "graphs_compiled_after_first_validation": graphs[steps] - graphs[middle],
        "seconds": {name: made["seconds"] for name, made in runs.items()},
        "last_loss": runs["off"]["losses"][steps],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options, words = parser.parse_known_args(argv)
    half = str(options.steps // 2)
    words += ["--max_train_steps", str(options.steps), "--logging_steps", "1", "--checkpoints_total_limit", "9"]
    words += ["--validation_steps", half, "--checkpointing_steps", half]
    command = "python benchmarks/check_compile.py " + " ".join(argv)
    result = {"command": command, "torch": torch.__version__, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for stage in options.stages:
            of_unet = ["--autoencoder", str(root / "off" / "autoencoder"), "--self_guidance_steps", "0"]
            of_stage = [*words, *(of_unet if stage == "unet" else [])]
            result["stages"][stage] = check(stage, root, of_stage, options.steps)
            print(json.dumps({stage: result["stages"][stage]}), flush=True)
            write_json(options.json, result)
    return 0


if __name__ == "__main__":
    run(main)
