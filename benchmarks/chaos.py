"""Attack training, run the same command again, and compare the result with that of an undisturbed run.

    python benchmarks/chaos.py --fault kill --kills 200 --json docs/results/NAME.json
    python benchmarks/chaos.py --fault full_disk --json docs/results/NAME.json

It trains tiny networks on generated images: stage 1, the encoding of the latents, stage 2 and the exports. After an
attack, everything must equal the undisturbed run: the last checkpoints, the latents and the weights of pipeline and
snapshots bit for bit, and metrics.jsonl except for its clock times.

kill: each command gets SIGKILL after a random time, and again, until it ends by itself. Checkpoints are written at
every second step, so many kills hit the writing of a checkpoint, a shard or an export. The JSON says where each kill
came. With --processes 2, two processes train together and one or both are killed; the other must end by itself.

full_disk: from the n-th call on that writes, creates or renames something in the run's folder, the disk is full, for
every n (or every --stride-th). The run must end with one sentence, every checkpoint must be undamaged, and
the same command must finish once there is space. Needs Linux and a C compiler.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latent_ddpm.files import write_json
from latent_ddpm.progress import progress_bar
from latent_ddpm.training.checkpoint import CheckpointFolder, DamagedCheckpoint
from latent_ddpm.training.launch import run
from latent_ddpm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from preloaded import Script  # noqa: E402, it is no part of the package

IMAGES = 1100  # more than a shard of latents
COMMON = "--resolution 16 --seed 0 --dataloader_num_workers 0 --logging_steps 1 "
COMMON += "--checkpointing_steps 2 --checkpoints_total_limit 2 --validation_steps 6 --max_train_steps 12 "
COMMON += "--lr_warmup_steps 2 --max_validation_images 16 --heartbeat_timeout 10"
STAGES = {
    "train_autoencoder.py": "--block_out_channels [8,16] --norm_num_groups 4 --num_vq_embeddings 32 --disc_weight 0.5 "
    "--disc_start 4 --disc_channels 8 --disc_layers 1",
    "train_unet.py": "--unet_block_out_channels [16,32] --unet_norm_num_groups 8 --unet_attention_levels [1] "
    "--unet_attention_head_dim 8 --unet_layers_per_block 1 --unet_dropout 0.1 --num_validation_samples 4 "
    "--num_inference_steps 3 --random_flip true --ema_snapshots 3",
}
CLOCKS = ("time", "images_per_second")


def write_images(folder: Path) -> None:
    """Colour images of 16 pixels, each of four coarse patches."""
    numbers = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(IMAGES):
        coarse = numbers.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{number:04d}.png")


class Together:
    """A command by several processes at once, as torchrun starts them but without its launcher, which ends the others
    when one dies: here those have to notice by themselves.

    Args:
        words: as for `Script`.
        processes: how many.
    """

    def __init__(self, words: list[str], processes: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "GLOO_SOCKET_IFNAME": "lo"}
        self.scripts = [
            Script(words, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)
        ]

    def poll(self) -> int | None:
        """The first exit status that is not 0; None while one is at work."""
        found = [script.poll() for script in self.scripts]
        return None if None in found else next((status for status in found if status), 0)

    def kill(self, dice: random.Random) -> bool:
        """All of them, or one; returns whether the others then ended by themselves.

        They do not where that one died before they met: torchrun ends them then.

        Raises:
            RuntimeError: they had met.
        """
        for script in self.scripts if dice.random() < 0.5 else [dice.choice(self.scripts)]:
            script.kill()
        deadline = time.monotonic() + 40  # the heartbeat's time, and a busy machine's
        while alive := [rank for rank, script in enumerate(self.scripts) if script.poll() is None]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if not alive:
            return True
        # the first process holds the store, and without it nobody gets further
        met = 0 in alive and self._store().check([f"heartbeat/life/{rank}" for rank in range(len(self.scripts))])
        for script in self.scripts:
            script.kill()
        if met:
            raise RuntimeError(f"{self.scripts[0].words[0]}: process {alive} did not notice that another died")
        return False

    def _store(self) -> torch.distributed.Store:
        return torch.distributed.TCPStore("127.0.0.1", self.port, is_master=False)

    def wait(self) -> None:
        for script in self.scripts:
            script.wait()


def start(script: str, images: Path, output_dir: Path, processes: int) -> Script | Together:
    batch = str(8 // processes)
    words = [script, *COMMON.split(), *STAGES[script].split(), "--train_data_dir", str(images)]
    words += ["--output_dir", str(output_dir), "--train_batch_size", batch]
    return Script(words) if processes == 1 else Together(words, processes)


def end(process: Script | Together, dice: random.Random) -> bool:
    """Kill it; returns False where one of several processes was killed and another had to be ended too."""
    if isinstance(process, Together):
        by_themselves = process.kill(dice)
    else:
        process.kill()
        by_themselves = True
    process.wait()
    return by_themselves


def place_of(output_dir: Path, script: str) -> str:
    """What was going on when everything stopped, from what lies half-done in the folder."""
    for pattern, name in (
        ("checkpoints/.*.tmp", "in a checkpoint"),
        ("latents/**/.*.tmp", "in a shard of latents"),
        (".pipeline.*.new", "in the export"),
        (".autoencoder.*.new", "in the export"),
        ("ema/.*.tmp", "in a snapshot"),
        ("samples/.*.tmp", "in a picture"),
        ("cache/*.tmp", "in the decoding of images"),
    ):
        if any(output_dir.glob(pattern)):
            return name
    stage = "autoencoder" if script == "train_autoencoder.py" else "unet"
    steps = (
        [record["step"] for record in read_metrics(output_dir / "metrics.jsonl") if record["stage"] == stage]
        if (output_dir / "metrics.jsonl").exists()
        else []
    )
    if not steps:
        return "before the first step"
    return "after the last step" if max(steps) == 12 else "between"


def left_by(output_dir: Path) -> Iterator[tuple[str, object]]:
    """What a run leaves, by name: the bytes of its files, and the lines of metrics.jsonl without clocks."""
    patterns = ("checkpoints/*-00000012/state.*", "latents/**/*.npy", "latents/**/meta.json", "ema/**/*.safetensors")
    for pattern in (*patterns, "pipeline/**/*.safetensors", "autoencoder/*.safetensors", "samples/*.png"):
        for path in sorted(output_dir.glob(pattern)):
            yield str(path.relative_to(output_dir)), path.read_bytes()
    for path in output_dir.rglob("*"):
        if path.suffix in (".tmp", ".new", ".old"):
            yield f"left over: {path.name}", None
    for record in read_metrics(output_dir / "metrics.jsonl"):
        kept = {key: value for key, value in record.items() if key not in CLOCKS}
        yield f"{record['stage']} {record['step']} {sorted(kept)}", kept


class Comparison:
    """What an undisturbed run leaves, held against what attacked ones left.

    Args:
        wanted: of the undisturbed run.
    """

    def __init__(self, wanted: Path) -> None:
        self.wanted = dict(left_by(wanted))
        self.differing: list[str] = []

    def same(self, output_dir: Path, name: str) -> bool:
        """Whether a folder holds the same; what differs is noted under `name`."""
        left = dict(left_by(output_dir))
        wrong = sorted(key for key in self.wanted.keys() | left.keys() if self.wanted.get(key) != left.get(key))
        self.differing += [f"{name}: {key}" for key in wrong]
        return not wrong


def run_quietly(script: str, images: Path, output_dir: Path, processes: int) -> float:
    """Run a stage to its end; returns the seconds."""
    begun = time.monotonic()
    process = start(script, images, output_dir, processes)
    process.wait()
    if process.poll():
        raise RuntimeError(f"{script} fails even without being attacked")
    return time.monotonic() - begun


def kill_at_random(folder: Path, options: argparse.Namespace) -> dict:
    """The attack by SIGKILL; returns the figures."""
    run_quietly(next(iter(STAGES)), folder / "images", folder / "warm", options.processes)  # starts the scripts' server
    durations = {
        script: run_quietly(script, folder / "images", folder / "quiet", options.processes) for script in STAGES
    }
    comparison, trials, waited = Comparison(folder / "quiet"), [], 0
    with progress_bar(total=options.kills, unit="kill") as bar:
        while bar.n < options.kills:
            seed = options.seed + len(trials)
            dice, output_dir, places = random.Random(seed), folder / f"trial-{seed}", []
            for script in STAGES:
                while True:
                    process = start(script, folder / "images", output_dir, options.processes)
                    deadline = time.monotonic() + dice.uniform(0, durations[script])
                    while process.poll() is None and time.monotonic() < deadline:
                        time.sleep(0.002)
                    if process.poll() is not None:
                        if process.poll():
                            raise RuntimeError(f"trial {seed}: {script} ended with {process.poll()} by itself")
                        break
                    waited += not end(process, dice)
                    places.append(f"{script}: {place_of(output_dir, script)}")
                    bar.update()
            same = comparison.same(output_dir, f"trial {seed}")
            trials.append({"seed": seed, "kills": len(places), "identical": same, "places": Counter(places)})
            shutil.rmtree(output_dir)
    return {
        "processes": options.processes,
        "waited_for_one_that_died_before_they_met": waited,
        "kills": sum(trial["kills"] for trial in trials),
        "kills_in_trials_with_an_identical_result": sum(trial["kills"] for trial in trials if trial["identical"]),
        "places": sum((trial["places"] for trial in trials), Counter()),
        "differing": comparison.differing,
        "trials": trials,
    }


def fill_the_disk(folder: Path, options: argparse.Namespace) -> dict:
    """The attack by a full disk; returns the figures."""
    library, orders = folder / "full_disk.so", folder / "orders"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "full_disk.c", "-ldl"], check=True)
    # read by the server that the scripts are forked from, which starts with the first of them
    os.environ |= {"LD_PRELOAD": str(library), "FULL_DISK": str(orders)}
    outcomes, wrong, calls = Counter(), [], {}
    before = folder / "before"  # what a stage finds
    before.mkdir()
    for script in STAGES:
        output_dir = folder / "run"

        def attempt(at: int, script: str = script, output_dir: Path = output_dir) -> subprocess.CompletedProcess:
            orders.write_text(f"{at} {output_dir}", encoding="utf-8")
            return start(script, folder / "images", output_dir, 1).finish()

        def afresh(output_dir: Path = output_dir) -> None:
            shutil.rmtree(output_dir, ignore_errors=True)
            shutil.copytree(before, output_dir)

        afresh()
        if attempt(0).returncode:
            raise RuntimeError(f"{script} fails even without being attacked")
        calls[script] = int((folder / "orders.count").read_text(encoding="utf-8"))
        shutil.copytree(output_dir, folder / f"quiet-{script}")
        comparison = Comparison(output_dir)
        for at in progress_bar(range(1, calls[script] + 1, options.stride), script, unit="call"):
            afresh()
            done, name = attempt(at), f"{script}, call {at}"
            sentence = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            clean = done.returncode == 2 and len(sentence) == 1 and "Traceback" not in done.stderr
            outcomes["a sentence" if clean else f"exit status {done.returncode}"] += 1
            if not clean and done.returncode:
                wrong.append(f"{name}: {done.stderr[-300:]}")
            for stage in ("autoencoder", "unet"):
                checkpoints = CheckpointFolder(output_dir / "checkpoints", stage, 2)
                for path in checkpoints.all():
                    try:
                        checkpoints.load(path)
                    except DamagedCheckpoint as error:
                        wrong.append(f"{name}: {path.name} is damaged: {error}")
            if attempt(0).returncode:
                wrong.append(f"{name}: it did not go on")
            comparison.same(output_dir, name)
        wrong += comparison.differing
        shutil.rmtree(before)
        shutil.copytree(folder / f"quiet-{script}", before)
    return {"calls": calls, "stride": options.stride, "outcomes": outcomes, "differing": wrong}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=["kill", "full_disk"], default="kill")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        write_images(Path(name) / "images")
        figures = (kill_at_random if options.fault == "kill" else fill_the_disk)(Path(name), options)
    result = {"command": "python benchmarks/chaos.py " + shlex.join(argv), **figures}
    write_json(options.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "trials"}, indent=1))
    return 1 if result["differing"] else 0


if __name__ == "__main__":
    run(main)
