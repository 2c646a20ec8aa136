"""One command that starts, resumes or is finished; any number of processes; processes that die or hang."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import (
    COMMON,
    PATIENCE,
    STAGE_2,
    assert_same_tensors,
    checkpoint_tensors,
    command,
    environment,
    launch,
    launch_and_stop,
    losses,
    read_metrics,
)
from preloaded import ROOT, Script, free_port

from latent_ddpm.config import UNetConfig, same_batch
from latent_ddpm.errors import UserError
from latent_ddpm.training.checkpoint import FORMAT, CheckpointFolder
from latent_ddpm.training.distributed import joining

STEPS = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 6, "unet_dropout": 0}


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """Stage 1 and an undisturbed stage 2 of 12 images a step."""
    output_dir = tmp_path_factory.mktemp("run") / "out"
    flags = {"train_data_dir": photos, "resolution": 16, "random_flip": "true"}
    launch("train_autoencoder.py", output_dir, max_train_steps=4, **flags)
    launch("train_unet.py", output_dir, train_batch_size=12, **STEPS, **flags)
    return output_dir, {**flags, **STEPS, "autoencoder": output_dir / "autoencoder"}


def test_the_same_command_starts_goes_on_and_is_finished(trained, tmp_path):
    output_dir, flags = trained
    flags = {**flags, "train_batch_size": 12}
    assert launch_and_stop("train_unet.py", tmp_path, 4, signal.SIGUSR1, **flags) == 128 + signal.SIGUSR1
    assert "resumed from step" in launch("train_unet.py", tmp_path, **flags)
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 6), checkpoint_tensors(tmp_path, "unet", 6))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert "all 6 steps are done; the pipeline is in" in launch("train_unet.py", tmp_path, **flags)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    text = launch("train_unet.py", tmp_path, expect=2, **{**flags, "max_train_steps": 4})
    assert "6 steps are done, and max_train_steps is 4." in text
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    # not finished: an export that is older than the steps, or gone
    text = launch("train_unet.py", tmp_path, **{**flags, "max_train_steps": 8})
    assert "resumed from step 6" in text
    assert json.loads((tmp_path / "run.json").read_text())["unet"]["finished_at"] == 8
    (tmp_path / "pipeline" / "model_index.json").unlink()
    os.rename(tmp_path / "pipeline", tmp_path / "elsewhere")
    launch("train_unet.py", tmp_path, **{**flags, "max_train_steps": 8})
    assert (tmp_path / "pipeline" / "model_index.json").exists()


@pytest.mark.parametrize(("last", "batch"), [(2, 3), pytest.param(3, 2, marks=pytest.mark.long)])
def test_two_processes_then_one_then_several_are_one_run(trained, tmp_path, last, batch):
    output_dir, flags = trained
    two = {**flags, "train_batch_size": 6, "max_train_steps": 2}
    launch("train_unet.py", tmp_path, processes=2, launcher=True, **two)
    launch("train_unet.py", tmp_path, **{**flags, "train_batch_size": 4, "max_train_steps": 4})  # accumulates 3
    launch("train_unet.py", tmp_path, processes=last, **{**flags, "train_batch_size": batch})  # accumulates 2
    for key in ("loss", "grad_norm"):
        one, many = (losses(folder, "unet", key) for folder in (output_dir, tmp_path))
        assert list(many) == list(range(1, 7)) and max(abs(one[s] - many[s]) / one[s] for s in one) < 1e-4
    assert [r["images"] for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r] == list(range(12, 73, 12))
    text = launch("train_unet.py", tmp_path, expect=2, **{**flags, "train_batch_size": 5})
    assert "steps are of 12 images, which is no multiple of train_batch_size 5 times 1 processes = 5" in text
    assert "set train_batch_size 4" in text


def test_another_autoencoder_is_no_reason_to_be_finished_nor_to_go_on(trained, tmp_path):
    """The U-Net knows one autoencoder's latents: with another it would draw rubbish."""
    output_dir, flags = trained
    run_dir = tmp_path / "out"
    shutil.copytree(output_dir, run_dir)
    weights = run_dir / "autoencoder" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    flags = {**flags, "train_batch_size": 12, "autoencoder": run_dir / "autoencoder"}
    text = launch("train_unet.py", run_dir, expect=2, **flags)
    assert "were trained with a different autoencoder than" in text and "a new --output_dir" in text
    flags["autoencoder"] = output_dir / "autoencoder"  # where it lies does not matter
    assert "all 6 steps are done" in launch("train_unet.py", run_dir, **flags)


@pytest.mark.parametrize(
    ("batch", "accumulation", "images", "processes", "wanted"),
    [(8, 1, None, 3, 1), (8, 1, 8, 1, 1), (8, 2, 16, 1, 2), (8, 2, 16, 2, 1), (4, 1, 48, 3, 4), (8, 1, 12, 1, None),
     (1, 1, 2, 3, None)],
)  # fmt: skip
def test_accumulation_keeps_the_images_of_a_step(batch, accumulation, images, processes, wanted):
    config = UNetConfig(train_batch_size=batch, gradient_accumulation_steps=accumulation)
    if wanted is None:
        with pytest.raises(UserError, match="no multiple"):
            same_batch(config, images, processes)
    else:
        assert same_batch(config, images, processes).gradient_accumulation_steps == wanted


def test_two_runs_in_one_folder(trained, tmp_path):
    _, flags = trained
    flags = {**flags, "max_train_steps": 100_000, "checkpointing_steps": 100_000, "validation_steps": 100_000}
    first = Script(command("train_unet.py", tmp_path, **flags)[1:])
    try:
        deadline = time.monotonic() + PATIENCE
        while not losses(tmp_path, "unet") and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        text = launch("train_unet.py", tmp_path, expect=2, **flags)
        assert f"is in use: process {first.pid} on " in text and "give another --output_dir" in text
    finally:
        first.kill()
        first.wait()
    flags["max_train_steps"] = 2  # at once after its end
    launch("train_unet.py", tmp_path, **flags)


def test_formats_of_checkpoints(tmp_path):
    folder = CheckpointFolder(tmp_path, "unet", 3)
    manifest = folder.save(1, {"step": 1}) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content.pop("format") == FORMAT
    manifest.write_text(json.dumps(content))
    assert folder.resume("latest") == {"step": 1}  # as they were written before there were formats
    manifest.write_text(json.dumps({**content, "format": FORMAT + 1}))
    with pytest.raises(UserError, match=rf"has format {FORMAT + 1}, of a later latent-ddpm"):
        folder.resume("latest")


OLD = {
    "train_autoencoder.py": {"block_out_channels": "[4,8]", "norm_num_groups": 4, "num_vq_embeddings": 8, **{
        "disc_weight": 0.5, "disc_start": 1, "disc_adaptive_steps": 1, "disc_channels": 4, "disc_layers": 1}},
    "train_unet.py": {"unet_block_out_channels": "[4,8]", "unet_norm_num_groups": 4, "unet_attention_head_dim": 4,
                      "unet_dropout": 0},
}  # fmt: skip


@pytest.mark.parametrize("version", [0, 1])
def test_checkpoints_of_earlier_versions_go_on(photos, tmp_path, version):
    """tests/fixtures/checkpoints-N holds what format N wrote after two steps of both stages with the keys of OLD."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "checkpoints-1", tmp_path / "checkpoints")
    if version == 0:  # the same without what format 1 added
        for folder in (tmp_path / "checkpoints").iterdir():
            state = json.loads((folder / "state.json").read_text())
            state["__items__"] = [item for item in state["__items__"] if item[0] != "images_per_step"]
            (folder / "state.json").write_text(json.dumps(state))
            manifest = json.loads((folder / "manifest.json").read_text())
            del manifest["format"]
            content = (folder / "state.json").read_bytes()
            manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    flags = {"train_data_dir": photos, "resolution": 16, "max_train_steps": 4, "train_batch_size": 4}
    for script, keys in OLD.items():
        assert "resumed from step 2" in launch(script, tmp_path, **flags, **keys)
    assert FORMAT == 1, "keep a checkpoint of the new format, too"


LONG = {"max_train_steps": 1_000_000, "checkpointing_steps": 1_000_000, "validation_steps": 1_000_000}


@pytest.mark.parametrize(("signum", "victim"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_a_process_that_dies_or_hangs_ends_the_others(trained, tmp_path, signum, victim):
    _, flags = trained
    flags = {**COMMON, **STAGE_2, **flags, **LONG, "train_batch_size": 6, "output_dir": tmp_path}
    flags["heartbeat_timeout"] = 5
    words = [f"--{key}={value}" for key, value in flags.items()]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_unet.py", *words]
    with (tmp_path / "output").open("w") as output:
        launcher = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not losses(tmp_path, "unet") and launcher.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        children = psutil.Process(launcher.pid).children()
        workers = {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}
        begun = time.monotonic()
        workers[victim].send_signal(signum)
        status = launcher.wait(120)
        assert time.monotonic() - begun < 60
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else ():
            process.kill()
        launcher.kill()
    text = (tmp_path / "output").read_text()
    assert status != 0, text
    if signum == signal.SIGKILL:
        assert "Signal 9 (SIGKILL)" in text
    else:
        sentence = f"error: Process {victim} has shown no sign of life for 5 seconds: it died or hangs."
        assert f"{sentence} Process {1 - victim} ends too." in text
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers.values())


MEETING = """
import os, sys
from datetime import timedelta
import torch.distributed
from latent_ddpm.training import distributed
from latent_ddpm.errors import UserError

distributed.JOIN_SECONDS, distributed.NOTICE_SECONDS = 5, 1
try:
    distributed.Heartbeat.start(2)
except UserError as error:
    sys.exit(str(error))
if os.environ["RANK"] == sys.argv[1]:
    os._exit(9)
try:
    with distributed.joining():
        torch.distributed.init_process_group("gloo", timeout=timedelta(hours=12))
except UserError as error:
    sys.exit(str(error))
"""


def at_meeting(folder, ranks, victim):
    """What processes of two print that meet without a launcher, and of which one may die once they have met."""
    (folder / "meeting.py").write_text(MEETING)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    scripts = [Script([folder / "meeting.py", victim], {**shared, "RANK": str(rank)}) for rank in ranks]
    return {rank: script.finish() for rank, script in zip(ranks, scripts, strict=True)}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_came_is_not_waited_for_all_day(tmp_path, rank):
    done = at_meeting(tmp_path, [rank], "none")[rank]
    assert done.returncode == 1 and "The 2 processes have not met at 127.0.0.1:" in done.stderr
    assert "a process died at its start, or cannot reach that address" in done.stderr
    assert "for all 2 processes, 5 seconds at most" in done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_before_there_is_a_group_ends_the_others(tmp_path, victim):
    done = at_meeting(tmp_path, [0, 1], victim)
    assert (done[victim].returncode, done[1 - victim].returncode) == (9, 1)
    assert f"Process {1 - victim} ends too." in done[1 - victim].stderr


def test_the_first_process_is_gone_in_the_middle_of_making_the_group(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match=r"is gone \(reset by peer\). Process 3 ends too"), joining():
        raise torch.distributed.DistNetworkError("reset by peer\nException raised from ...")
    monkeypatch.setenv("RANK", "0")  # whose own trouble is another one
    with pytest.raises(torch.distributed.DistNetworkError, match="address in use"), joining():
        raise torch.distributed.DistNetworkError("address in use")


def test_two_machines_are_one_run(trained, tmp_path):
    """Two launchers that meet on loopback, one process each."""
    output_dir, flags = trained
    words = command("train_unet.py", tmp_path, processes=2, **{**flags, "train_batch_size": 6})
    port = str(free_port())
    for flag, value in (("--num_machines", "2"), ("--main_process_port", port)):
        words[words.index(flag) + 1] = value
    at = words.index("--num_machines")
    machines = [
        subprocess.Popen(
            [*words[:at], "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", *words[at:]],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    texts = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], texts
    one, two = (losses(folder, "unet") for folder in (output_dir, tmp_path))
    assert list(two) == list(range(1, 7)) and max(abs(one[s] - two[s]) / one[s] for s in one) < 1e-4


STAND_INS = {
    "scontrol": """case "$1" in show) echo 127.0.0.1 ;; *) echo "$@" >> "$STAND_INS/requeued" ;; esac""",
    "srun": """while [ "${1#-}" != "$1" ]; do case "$1" in *=*|--overlap) shift ;; *) shift 2 ;; esac; done; exec "$@"
""",
}


@pytest.mark.skipif(shutil.which("pkill") is None, reason="there is no pkill")
def test_a_slurm_job_saves_when_its_time_is_up_and_queues_again(trained, tmp_path):
    """The batch script itself, with stand-ins for Slurm's commands."""
    _, flags = trained
    output_dir, tools = tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    for name, text in STAND_INS.items():
        (tools / name).write_text("#!/bin/bash\n" + text + "\n")
        (tools / name).chmod(0o755)
    words = command("train_unet.py", output_dir, **{**flags, **LONG})[2:]
    words = ["scripts/slurm/train.sbatch", "train_unet.py", *words]
    slurm = {"SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "77"}
    slurm |= {"SLURM_GPUS_ON_NODE": "1", "LAUNCH_FLAGS": "--cpu --mixed_precision no", "STAND_INS": str(tools)}
    path = f"{tools}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    # other tests train too: the real one would signal them
    real = shutil.which("pkill")
    (tools / "pkill").write_text(f"#!/bin/bash\nexec {real} -USR1 -f 'train_unet.py.*{output_dir}'\n")
    (tools / "pkill").chmod(0o755)
    job = subprocess.Popen(["bash", *words], cwd=ROOT, env={**environment(), **slurm, "PATH": path},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not losses(output_dir, "unet") and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=PATIENCE)[0]
    assert job.returncode != 0, text
    assert len(list((output_dir / "checkpoints").glob("unet-*"))) == 1, text
    assert (tools / "requeued").read_text() == "requeue 77\n"
