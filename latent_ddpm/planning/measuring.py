"""Measure a stage here: rehearse it in a process of its own, in a temporary folder that is removed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from latent_ddpm.config import RunConfig
from latent_ddpm.errors import UserError
from latent_ddpm.system import kill_with_children

PROGRAM = Path(__file__).resolve().parents[2] / "scripts" / "plan_run.py"  # which the other process runs
NAMES = {"autoencoder": "Stage 1, the autoencoder", "unet": "Stage 2, the U-Net"}
LAUNCHER = ["-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCHER += ["--dynamo_backend", "no"]  # as docs/quickstart.md launches
OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE")
OF_A_LAUNCHER += ("MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "DYNAMO_")


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3.5 minutes", "2.1 hours", "4.0 days"."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} s"


@contextlib.contextmanager
def folder_beside(output_dir: Path) -> Iterator[Path]:
    """A temporary folder on the disk of output_dir; it is removed at the end, also after Ctrl-C, SIGTERM or SIGHUP."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    parent = next(path for path in output_dir.resolve().parents if path.is_dir())
    before = {name: signal.signal(name, stop) for name in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))}
    try:
        with tempfile.TemporaryDirectory(
            prefix=".plan-", dir=parent if os.access(parent, os.W_OK) else None, ignore_cleanup_errors=True
        ) as name:
            yield Path(name)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def child_seconds() -> float:
    """Seconds of the processor that the processes started here have used, of those that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def environment() -> dict[str, str]:
    """The environment of a process that is none of a launch of several."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and kept.get("OMP_NUM_THREADS") == "1":  # which the launcher has set
        del kept["OMP_NUM_THREADS"]
    return {name: value for name, value in kept.items() if name not in OF_A_LAUNCHER}


def launched(config: RunConfig, device: str | None, words: list[str], with_launcher: bool) -> list[str]:
    """The words that run PROGRAM in a process of its own, as `accelerate launch` or python runs a training script."""
    if not with_launcher:
        return [sys.executable, str(PROGRAM), *words]
    launcher = [*LAUNCHER, "--mixed_precision", config.mixed_precision or "no", *(["--cpu"] if device == "cpu" else [])]
    return [sys.executable, *launcher, str(PROGRAM), *words]


def measure(
    stage: str,
    config: RunConfig,
    words: Sequence[str],
    folder: Path,
    seconds: float,
    decode: dict,
    device: str | None,
    with_launcher: bool = True,
) -> dict[str, Any]:
    """Rehearse a stage in a process of its own; returns what it measured, and the time of the process.

    Args:
        stage: "autoencoder" or "unet".
        config: of the stage.
        words: the command line of the training script.
        folder: the temporary folder.
        seconds: that it may take.
        decode: see `Rehearsal`.
        device: "cpu", "cuda" or None.
        with_launcher: whether it runs as `accelerate launch` runs it.

    Raises:
        UserError: the script failed; with its own sentence where it has one.
    """
    result, log = folder / f"{stage}.json", folder / f"{stage}.log"
    own = [*words, "--output_dir", str(folder / "run"), "--report_to", "none"]
    own += ["--push_to_hub", "false", "--resume_from_checkpoint", "latest"]
    own += ["--train_minutes", "null", "--train_hours", "null", "--auto_sizes", "false"]  # it plans nothing
    if stage == "unet":  # the other chapters are forecast from the first one's steps
        own += ["--latents_dir", "null"]
        for key in ("self_guidance", "few_step_training"):
            own += [f"--{key}_steps", "0", f"--{key}_images", "null"]
    about = {"stage": stage, "seconds": seconds, "decode": decode, "result": str(result), "parent": os.getpid()}
    begun, worked = time.monotonic(), child_seconds()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            launched(config, device, ["--rehearse", json.dumps(about), *own], with_launcher),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,  # a Ctrl-C ends this process first, which then ends that one
        )
        try:
            status = process.wait()
        finally:
            kill_with_children(process)
            process.wait()
    taken = {"seconds": time.monotonic() - begun, "processor_seconds": child_seconds() - worked}
    said = log.read_text(encoding="utf-8", errors="replace")
    if status or not result.exists():
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        if "out of memory" in said.lower():
            raise UserError(
                f"{NAMES[stage]} does not fit into the memory of this machine. Halve train_batch_size "
                f"({config.train_batch_size}) and double gradient_accumulation_steps."
            )
        raise UserError(sentences[-1].removeprefix("error: ") if sentences else f"{stage} failed: {said[-2000:]}")
    return json.loads(result.read_text(encoding="utf-8")) | {"process": taken}
