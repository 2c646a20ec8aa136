"""Start and end of a script: config checks, accelerator, CPU processes, and one sentence for an error."""

import argparse
import contextlib
import ctypes
import dataclasses
import errno
import logging
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_yaml_config_file
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors import SafetensorError

from latent_ddpm.config import SECTION_OF, Config, RunConfig, check_same_run, in_steps, keys_of, same_batch
from latent_ddpm.errors import UserError
from latent_ddpm.files import remove_leftovers
from latent_ddpm.places import no_folder
from latent_ddpm.progress import close_bars
from latent_ddpm.resizing import resizer
from latent_ddpm.system import usable_cores
from latent_ddpm.training.acceleration import check_compiler, set_arithmetic, take_compile_request
from latent_ddpm.training.distributed import Heartbeat, joining
from latent_ddpm.training.sharding import Sharding
from latent_ddpm.training.tracking import check_tracker

Fitting = Callable[[RunConfig, int, int], int]  # config, free bytes of the GPU, processes -> images that fit
PROBE = 2**20  # bytes that a run's folder must have room for before anything is loaded
IMAGES_ON_A_CPU = 64  # of train_batch_size auto, at most: a CPU is no faster with more

# Errors of a disk that is full, broken or not writable.
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
logger = logging.getLogger(__name__)

_claims: list[IO] = []  # lock files; the system releases them when the process ends, however it ends


def claim(output_dir: Path, stage: str) -> None:
    """Lock a run's folder against other runs of the same stage until this process ends; call it in the main process.

    Removes half-written files that a killed run left.

    Raises:
        UserError: another process holds the lock.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        _remove_all_leftovers(output_dir)
        return
    file = (output_dir / f".{stage}.lock").open("a+", encoding="utf-8")
    try:
        # not flock: DataLoader workers would inherit the lock, and they outlive a killed run by seconds
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise UserError(
            f"{output_dir} is in use: {file.read().strip() or 'another process'} trains the {stage} there. Wait until "
            f"it ends, or give another --output_dir."
        ) from error
    except OSError:  # a file system without locks
        file.close()
        return
    _remove_all_leftovers(output_dir)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    _claims.append(file)


def _remove_all_leftovers(output_dir: Path) -> None:
    for folder in (output_dir, *(output_dir / name for name in ("samples", "ema", "cache"))):
        remove_leftovers(folder)


def check_writable(output_dir: Path) -> None:
    """Check that files can be written to a run's folder, or that it can be made. Nothing is left.

    Raises:
        UserError: it is a file or below one, or its disk is full or cannot be written.
    """
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"output_dir {output_dir}: {there} is a file.")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"output_dir {output_dir} cannot be written ({error.strerror or error}): make room or change its "
            f"permissions, or give another --output_dir."
        ) from error


def check_before_loading(config: RunConfig, stage: str) -> tuple[Path, str]:
    """Check what needs neither data nor models.

    Returns:
        The path of the run's saved config, and how the places of the data differ from the saved ones, or "".

    Raises:
        UserError: the run cannot work.
    """
    if config.hub_token:
        os.environ["HF_TOKEN"] = config.hub_token  # where the Hub's client looks; it is never saved
        sys.argv = [word.replace(config.hub_token, "***") for word in sys.argv]  # trackers record the command line
        config.hub_token = None
    check_tracker(config.report_to, config.tracker_project_name)
    config.image_resize = resizer(config.image_resize)  # is saved with the run, which keeps it
    saved = Path(config.output_dir) / f"train_{stage}.yaml"
    check_writable(Path(config.output_dir))
    moved = check_same_run(config, saved)
    if config.train_data_dir is not None and not Path(config.train_data_dir).is_dir():
        raise UserError(no_folder("train_data_dir", config.train_data_dir))
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed_precision fp16 needs a GPU; on a CPU use no.")
    return saved, moved


def make_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of a run, with its arithmetic."""
    for noise in ("`broadcast_buffers` is deprecated", "Grad strides do not match bucket view"):
        warnings.filterwarnings("ignore", message=noise)  # DDP's warnings, which a user cannot act on
    set_arithmetic(config.deterministic)
    take_compile_request(config)
    check_compiler(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault(
            "ACCELERATE_USE_CPU", "true"
        )  # else it treats each of torchrun's processes as a run of its own
    if config.heartbeat_timeout and "RANK" in os.environ:
        Heartbeat.start(config.heartbeat_timeout)
    whole = Sharding.take_request() is not None  # stage 2 takes the request before
    with joining():
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=str(Path(config.output_dir) / "logs"),
            kwargs_handlers=[
                # encoding a large dataset can take longer than the default of half an hour
                InitProcessGroupKwargs(timeout=timedelta(hours=12)),
                # the codebook is the same in all processes by construction
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
    _use_all_cores(accelerator)
    if config.heartbeat_timeout:
        Heartbeat.start(config.heartbeat_timeout)  # where only accelerate knows of the other processes, as with MPI
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        level=logging.INFO if accelerator.is_main_process else logging.ERROR,
    )
    if whole:
        logger.info("FSDP shards the U-Net of stage 2 only; the autoencoder stays whole in every process")
    for noisy in ("httpx", "httpx2", "filelock", "fsspec", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return accelerator


def fit_to_processes(config: Config, state: dict | None, accelerator: Accelerator, fitting: Fitting) -> Config:
    """The config for these processes: lengths in steps, and as many images per step as the checkpoint has.

    Args:
        config: as it was asked for.
        state: the checkpoint, or None.
        accelerator: of the run.
        fitting: for train_batch_size auto.

    Raises:
        UserError: these processes cannot make steps of that many images, or not one image fits a GPU.
    """
    if config.train_batch_size == "auto":
        config = _fit_to_memory(config, state or {}, accelerator, fitting)
    config = same_batch(config, (state or {}).get("images_per_step"), accelerator.num_processes)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
    return in_steps(config, accelerator.num_processes)


def _fit_to_memory(config: Config, state: dict, accelerator: Accelerator, fitting: Fitting) -> Config:
    """The config with a number for train_batch_size auto, the same in all processes."""
    count, device = accelerator.num_processes, accelerator.device
    share, rest = divmod(config.images_per_step, count)
    if rest:
        raise UserError(f"images_per_step {config.images_per_step} is no multiple of the {count} processes.")
    most = IMAGES_ON_A_CPU
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        most = fitting(dataclasses.replace(config, mixed_precision=accelerator.mixed_precision), free, count)
        most = int(accelerator.gather(torch.tensor([most], device=device)).min())
    size, before = largest_divisor(share, most), state.get("train_batch_size", 0)
    if 0 < before <= most and share % before == 0:
        size = before  # a resumed run repeats its bits only with the same micro-batches
    logger.info("train_batch_size auto: %d images at a time, %d times a step (%d fit)", size, share // size, most)
    if not before and 2 * size <= min(most, share) and accelerator.is_main_process:
        better = count * round(share / min(most, share)) * min(most, share)
        logger.warning("%d images a step have no larger divisor that fits. A new run is faster with %d.",
                       config.images_per_step, better)  # fmt: skip
    return dataclasses.replace(config, train_batch_size=size)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`; both are at least 1."""
    return next(size for size in range(min(number, limit), 0, -1) if number % size == 0)


def _use_all_cores(accelerator: Accelerator) -> None:
    """Divide the cores among this machine's processes: `accelerate launch` gives a CPU process one thread."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and launched:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, usable_cores() // here))


TOPOLOGY = {"num_processes": 1, "num_machines": 1, "machine_rank": 0}
TOPOLOGY |= {"main_process_ip": "127.0.0.1", "main_process_port": 29500}  # accelerate's defaults


def _topology_asked_for(launcher: list[str]) -> dict:
    """The keys of TOPOLOGY on an `accelerate launch` command line, or in the config file that it names."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config_file", "--config-file")
    for key, default in TOPOLOGY.items():
        flags.add_argument(f"--{key}", f"--{key.replace('_', '-')}", type=type(default))
    found = vars(flags.parse_known_args(launcher)[0])
    path = found.pop("config_file") or default_yaml_config_file  # what `accelerate config` wrote
    saved = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}) if path and Path(path).exists() else {}
    named = {key: saved[key] for key in TOPOLOGY if saved.get(key) is not None}
    return {**TOPOLOGY, **named, **{key: value for key, value in found.items() if value is not None}}


def _hear_the_launcher_end() -> None:
    """Get a SIGTERM when `accelerate launch` ends: the launcher does not pass it on."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _start_cpu_processes() -> None:
    """Start this machine's share of the processes of `accelerate launch --cpu --num_processes N`.

    Without an MPI host file, accelerate silently starts a single process (its simple_launcher). torchrun, which it
    uses for GPUs, can start N processes on the CPU, so it replaces this process.
    """
    alone = not any(key in os.environ for key in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true" or not alone:
        return
    try:
        launcher = psutil.Process().parent().cmdline()
        asked = _topology_asked_for(launcher[: launcher.index(sys.argv[0])])
    except (psutil.Error, AttributeError, ValueError):  # no parent, a hidden one, or not a launcher
        return
    here = asked["num_processes"] // asked["num_machines"]
    if asked["num_processes"] > 1:
        here_only = asked["num_machines"] == 1 or asked["main_process_ip"].startswith("127.")
        if here_only and os.name == "posix":  # Windows names its interfaces otherwise
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        meeting = ["--standalone"]
        if asked["num_machines"] > 1:
            meeting = ["--nnodes", str(asked["num_machines"]), "--node_rank", str(asked["machine_rank"])]
            meeting += ["--master_addr", asked["main_process_ip"], "--master_port", str(asked["main_process_port"])]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc_per_node", str(here)]
        if os.name == "nt":  # there, execv lets the launcher go on while the new process runs
            sys.exit(subprocess.call([*torchrun, *sys.argv]))
        os.execv(sys.executable, [*torchrun, *sys.argv])


def _is_of_storage(error: OSError | SafetensorError) -> bool:
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    return number in STORAGE_ERRORS


def _launcher_note() -> str:
    """What to say about the traceback that `accelerate launch` prints when its script fails.

    It comes from the launcher's own process, which raises CalledProcessError for any exit status but 0
    (accelerate/commands/launch.py, simple_launcher), so a script cannot prevent it.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "RANK" in os.environ:
        return ""
    with contextlib.suppress(psutil.Error, AttributeError):
        if {"--quiet", "-q"} & set(psutil.Process().parent().cmdline()):
            return ""
    return "\n(The traceback below is accelerate's own; `accelerate launch --quiet` omits it.)"


def _say_last(sentence: str) -> None:
    close_bars()
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # the launcher ends all processes when one fails: rank 0 reports first what all would report
        time.sleep(2)
    with contextlib.suppress(OSError):
        of_process = f" (process {rank})" if rank else ""
        print(f"\nerror: {sentence}{of_process}{_launcher_note()}", file=sys.stderr, flush=True)


def of_stage(words: Sequence[str], stage: str) -> list[str]:
    """The words of a command line that are for a stage: without the keys of the other stage.

    Args:
        words: after the name of a script that takes the keys of both stages.
        stage: "autoencoder" or "unet".
    """
    stages = {section.removeprefix("train_"): kind for kind, section in SECTION_OF.items()}
    other = next(kind for name, kind in stages.items() if name != stage)
    foreign = set(keys_of(other)) - set(keys_of(stages[stage]))
    chosen, skipping = [], False
    for word in words:
        if word.startswith("--"):
            skipping = word[2:].partition("=")[0].replace("-", "_") in foreign
        if not skipping:
            chosen.append(word)
    return chosen


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a script's main with the command line; a UserError or a full disk becomes one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a name or a sign that the terminal's encoding lacks ends no run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    _hear_the_launcher_end()
    _start_cpu_processes()
    status: int | None = 0
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        status = 2
        _say_last(str(error))
    except KeyboardInterrupt:
        status = 130
        _say_last("stopped by Ctrl-C")
    except (OSError, SafetensorError) as error:
        if not _is_of_storage(error):
            raise
        status = 2
        _say_last(f"{error}. Files written before are intact: fix this and run the same command again.")
    finally:
        Heartbeat.end(failed=status in (1, 2, 130) or sys.exc_info()[0] is not None)
        if torch.distributed.is_available() and torch.distributed.is_initialized() and not status:
            torch.distributed.destroy_process_group()
    sys.stdout.flush()
    if status:
        os._exit(status) if torch.distributed.is_available() and torch.distributed.is_initialized() else sys.exit(
            status
        )
