"""Compare how many images a second pipelines draw, in turns.

    python benchmarks/benchmark_sampling.py outputs/mnist/pipeline:20 outputs/mnist/pipeline-few-steps:4 \\
        outputs/mnist/pipeline-few-steps:1 --json docs/results/guidance/sampling.json

Each argument is FOLDER:STEPS. All pipelines are loaded as stock diffusers loads them and draw `--batch_size` images
each round, one after the other in one process, in another order every round. A ratio is that of one round to the first
pipeline's time in the same round; its median and quartiles are over the rounds.
"""

import argparse
import random
import shlex
import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.launch import run


def folder_and_steps(word: str) -> tuple[str, int]:
    folder, _, steps = word.rpartition(":")
    if not folder or not steps.isdigit() or int(steps) < 1:
        raise argparse.ArgumentTypeError(f"{word} is not FOLDER:STEPS")
    return folder, int(steps)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipelines", nargs="+", type=folder_and_steps, metavar="FOLDER:STEPS")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    diffusers.utils.logging.disable_progress_bar()  # of loading
    loaded = {}
    for folder, _ in options.pipelines:
        if not (Path(folder) / "model_index.json").exists():
            raise UserError(f"{folder} is not a pipeline folder.")
        loaded[folder] = DiffusionPipeline.from_pretrained(folder)
        loaded[folder].set_progress_bar_config(disable=True)
    seconds: dict[tuple[str, int], list[float]] = {pipeline: [] for pipeline in options.pipelines}
    for number in progress_bar(range(options.rounds + 1), desc="rounds"):
        for folder, steps in random.Random(number).sample(options.pipelines, len(options.pipelines)):
            generator = torch.Generator().manual_seed(number)
            begun = time.perf_counter()
            loaded[folder](
                batch_size=options.batch_size, generator=generator, num_inference_steps=steps, output_type="np"
            )
            if number:  # the first round warms up
                seconds[folder, steps].append(time.perf_counter() - begun)
    first = seconds[options.pipelines[0]]
    results = []
    for (folder, steps), taken in seconds.items():
        ratios = [theirs / own for theirs, own in zip(first, taken, strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        results.append(
            {
                "pipeline": Path(folder).name,
                "steps": steps,
                "images_per_second_median": options.batch_size / statistics.median(taken),
                "over_first_median": statistics.median(ratios),
                "over_first_quartiles": [quartiles[0], quartiles[2]],
            }
        )
        print(
            f"{folder}, {steps} steps: {results[-1]['images_per_second_median']:.1f} images/s, "
            f"{results[-1]['over_first_median']:.2f} times the first ({quartiles[0]:.2f} to {quartiles[2]:.2f})"
        )
    if options.json:
        command = "python benchmarks/benchmark_sampling.py " + shlex.join(argv)
        write_json(
            options.json, {"command": command, "device": f"cpu, {torch.get_num_threads()} threads", "results": results}
        )
        print(f"written to {options.json}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
