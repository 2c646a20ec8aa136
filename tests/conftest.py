"""Shared by the tests: the repository's root, and running the real scripts as real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from preloaded import PATIENCE, ROOT, Script, run_processes
from safetensors.torch import load_file

# what the tests' own process, those it starts and the server of scripts see, whatever the shell has
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# tiny networks, so that a training run is seconds
COMMON = {"seed": 0, "dataloader_num_workers": 0, "logging_steps": 1, "checkpoints_total_limit": 10}
STAGE_1 = {
    "block_out_channels": "[8,16]",
    "norm_num_groups": 4,
    "num_vq_embeddings": 32,
    "train_batch_size": 8,
    "lr_warmup_steps": 2,
    "max_validation_images": 16,
}
STAGE_2 = {
    "unet_block_out_channels": "[16,32]",
    "unet_norm_num_groups": 8,
    "unet_attention_levels": "[1]",
    "unet_attention_head_dim": 8,
    "unet_layers_per_block": 1,
    "unet_dropout": 0.1,
    "train_batch_size": 8,
    "lr_warmup_steps": 2,
    "num_validation_samples": 4,
    "num_inference_steps": 3,
    "max_validation_images": 16,
}


# These files take minutes each. They start first, so that the two workers of `make test` end at about the same time.
LONG = (
    "test_benchmark_gpu.py",
    "test_reliability.py",
    "test_end_to_end.py",
    "test_chapters.py",
    "test_hub.py",
    "test_benchmarks.py",
    "test_conditions.py",
)
LONG += ("test_sharding.py", "test_captions.py", "test_evaluate_pipeline.py", "test_export.py", "test_streaming.py")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def command(script, output_dir, processes=None, dynamo="no", **flags):
    """The words that run a training script: plainly, or by accelerate when `processes` is given."""
    stage = STAGE_1 if script == "train_autoencoder.py" else STAGE_2
    words = [sys.executable, script]
    if processes:
        words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
        words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", dynamo]
        words += ["--main_process_port", "0", script]
    for key, value in {**COMMON, **stage, "output_dir": output_dir, **flags}.items():
        if value is not None:
            words += [f"--{key}", str(value)]
    return words


def fill_zeros(model):
    """Random numbers in weights that start at zero, so that what they multiply is seen."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def environment(threads=1):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def launch(script, output_dir, expect=0, processes=None, launcher=False, **flags):
    """Run a training script to its end; returns stdout and stderr together.

    Several processes begin as `accelerate launch` starts them; with `launcher` it does start them, which takes longer.
    """
    words = command(script, output_dir, processes if launcher else None, **flags)
    if launcher:
        return _text_of(finished(words), expect)
    if processes:
        return _text_of(run_processes(words[1:], processes, ACCELERATE_USE_CPU="True"), expect)
    return _text_of(Script(words[1:]).finish(), expect)


def launch_cut(kind, output_dir, launcher=False, **flags):
    """Stage 2 as two processes on the CPU, by configs/accelerate/KIND.yaml; `launcher` as for `launch`."""
    words = command("train_unet.py", output_dir, **flags)[1:]
    if launcher:
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{kind}.yaml"]
        start += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
        return _text_of(finished([*start, *words]))
    variables = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    variables["FSDP_RESHARD_AFTER_FORWARD"] = "true" if kind == "fsdp2" else "false"
    return _text_of(run_processes(words, 2, **variables))


def _text_of(done, expect=0):
    text = done.stdout + done.stderr
    assert done.returncode == expect, text[-4000:]
    return text


def run_script(name, *words, expect=0, folder="scripts"):
    """Run one of scripts/ to its end; returns it with what it wrote."""
    done = Script([f"{folder}/{name}", *words]).finish()
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def finished(words, env=None):
    """A command's end, from Python's start on, with nothing loaded."""
    env = environment() if env is None else env
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE, env=env)


def finished_script(words, env=None):
    """As `finished`, for Python with a script or "-c"; most libraries are loaded, those that read `env` are not."""
    return Script(words[1:], environment() if env is None else env, alone=True).finish()


def launch_and_stop(script, output_dir, step, signum=signal.SIGKILL, processes=None, group=False, stage=None, **flags):
    """Start a training script and send it a signal once it has logged `step`; returns its exit status.

    `stage` is the chapter of stage 2 whose step is meant. With `group`, the whole process group gets the signal, as
    from a terminal's Ctrl-C.
    """
    metrics = Path(output_dir) / "metrics.jsonl"
    words = command(script, output_dir, processes, **flags)
    if processes:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, cwd=ROOT, env=environment(), start_new_session=True, **quiet)
    else:
        process = Script(words[1:])
    deadline = time.monotonic() + PATIENCE
    stage = stage or ("autoencoder" if script == "train_autoencoder.py" else "unet")
    while time.monotonic() < deadline and process.poll() is None:
        if any(r["stage"] == stage and r["step"] >= step for r in read_metrics(metrics)):
            os.killpg(process.pid, signum) if group else process.send_signal(signum)
            return process.wait(timeout=PATIENCE)
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"{script} did not reach step {step}; it ended with {process.poll()}")


# a process that finds the other one gone aborts
LEAVE_TOGETHER = """
import torch.distributed
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def run_in_one_and_two_processes(source, folder):
    """Run a script's text with the words COUNT and FOLDER: in one process, then in two that meet over gloo."""
    script = folder / "script.py"
    script.write_text(source + LEAVE_TOGETHER)
    for count in (1, 2):
        words = [str(script), str(count), str(folder)]
        done = run_processes(words, count) if count > 1 else Script(words).finish()
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def read_metrics(path):
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # being written
            break
    return records


def losses(output_dir, stage, key="loss"):
    records = read_metrics(Path(output_dir) / "metrics.jsonl")
    return {r["step"]: r[key] for r in records if r["stage"] == stage and key in r}


def checkpoint_tensors(output_dir, stage, step):
    return load_file(Path(output_dir) / "checkpoints" / f"{stage}-{step:08d}" / "state.safetensors")


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    differing = [key for key in a if not torch.equal(a[key], b[key])]
    assert differing == []


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """48 small colour images in two nested folders."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        folder = root / ("cats" if i % 2 else "dogs/puppies")
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:02d}.png")
    return root
