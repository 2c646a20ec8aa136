"""Whether a GPU computes what a CPU does, and whether both stages train, stop and resume there.

    python benchmarks/gpu_correctness.py --json DIR/correctness.json

Mathematics: random numbers, training batches, networks, optimizer and sampling on the GPU against the CPU. Runs: both
stages in float32, bf16 and fp16, compiled, with NCCL, and sharded. Resuming: a run that SIGKILL ends after a checkpoint
and that is started again must leave the bits of an uninterrupted one, with `deterministic`; without, the difference is
reported. The runs go side by side, as many at a time as there are cores for. `--rehearse` does it on a CPU, with fewer
runs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from latent_ddpm.autoencoder.vqvae import Autoencoder
from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config
from latent_ddpm.diffusion.noise_schedule import noise_table, sampling_scheduler
from latent_ddpm.diffusion.objective import training_batch
from latent_ddpm.diffusion.unet import make_unet
from latent_ddpm.files import write_json
from latent_ddpm.random import Stream, integers, normal, uniform
from latent_ddpm.training.optim import orthogonalize

ROOT = Path(__file__).resolve().parent.parent
MNIST = ["--config", str(ROOT / "configs" / "mnist.yaml")]
TOY = ["--max_validation_images", "16"]  # of a rehearsal
TOY_STAGE = {
    "autoencoder": ["--block_out_channels", "[8,8,8]", "--norm_num_groups", "4", "--num_vq_embeddings", "32"],
    "unet": ["--unet_block_out_channels", "[32]", "--unet_attention_levels", "[]", "--train_batch_size", "16"],
}


# ------------------------------------------------------------------------------------------------------ mathematics


def random_numbers(device: torch.device) -> dict:
    """Uniform draws and integers have the same bits; normal ones go through the device's logarithm and cosine."""
    numbers = torch.tensor([0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**40 + 3, 2**61])
    shape, found = (3, 17, 16), {}
    for name, draw in {
        "uniform": lambda n: uniform(7, Stream.NOISE, n, shape),
        "uniform, seed of 64 bits": lambda n: uniform(2**63 + 12345, Stream.CROP, n, shape),
        "integers": lambda n: integers(7, Stream.CODEBOOK, n, 1000, shape),
        "normal": lambda n: normal(7, Stream.NOISE, n, shape),
    }.items():
        found[name] = compared(draw(numbers), draw(numbers.to(device)).cpu())
    return found


def objective(device: torch.device) -> dict:
    """Noise, times, targets and weights of every prediction type."""
    found = {}
    for kind in ("epsilon", "v_prediction", "sample", "flow_prediction"):
        config = parse_config(UNetConfig, [*MNIST, "--prediction_type", kind])
        clean, numbers = torch.randn(32, 4, 8, 8), torch.arange(32)
        table = noise_table(config)
        on_cpu = training_batch(clean, numbers, config, table)
        table = None if table is None else table.to(device)
        on_device = training_batch(clean.to(device), numbers.to(device), config, table)
        found |= {
            f"{kind}: {field.name}": compared(getattr(on_cpu, field.name), getattr(on_device, field.name).cpu())
            for field in dataclasses.fields(on_cpu)
        }
    return found


def networks(device: torch.device) -> dict:
    """Forward and backward passes in float32 without TF32: only the order of sums differs."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(parse_config(AutoencoderConfig, [*MNIST, "--quantizer", "kl"])).eval()
    unet = make_unet(parse_config(UNetConfig, MNIST), 4, 8, zero_branches=False).eval()
    images, latents, times = torch.randn(4, 1, 32, 32).clamp(-1, 1), torch.randn(4, 4, 8, 8), torch.arange(4) * 200
    found = {}
    for name, network, run in (
        ("autoencoder", autoencoder, lambda net, on: net(images.to(on)).reconstruction),
        ("unet", unet, lambda net, on: net(latents.to(on), times.to(on)).sample),
    ):
        outputs, gradients = [], []
        for on in ("cpu", device):
            network.to(on).zero_grad()
            output = run(network, on)
            output.square().mean().backward()
            outputs.append(output.detach().cpu())
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in network.parameters() if p.grad is not None]))
        found[name] = compared(*outputs) | {"gradient_relative": relative(*gradients)}
    matrices = torch.randn(2, 48, 432)
    singular = torch.linalg.svdvals(orthogonalize(matrices.to(device)).cpu().double())
    found["Muon's orthogonalization"] = {"singular_values": [float(singular.min()), float(singular.max())]}
    return found


def sampling(device: torch.device) -> dict:
    """The same noise gives the same latents."""
    torch.manual_seed(0)
    config = parse_config(UNetConfig, MNIST)
    unet = make_unet(config, 4, 8, zero_branches=False).eval()
    drawn = []
    for on in ("cpu", device):
        scheduler = sampling_scheduler(config)
        scheduler.set_timesteps(10)
        x = normal(0, Stream.SAMPLE, torch.arange(2), (4, 8, 8)).to(on)
        unet.to(on)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(unet(x, t.to(on)).sample, t, x).prev_sample
        drawn.append(x.cpu())
    return {"10 steps": compared(*drawn)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30))


def compared(a: torch.Tensor, b: torch.Tensor) -> dict:
    """Whether two tensors have the same bits, and how far apart they are."""
    return {"equal": bool(torch.equal(a, b)), "relative": relative(a, b)}


# ------------------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass
class Run:
    """Both stages of a small run.

    Attributes:
        name: of its folder.
        words: keys of both stages.
        killed: whether SIGKILL ends each stage once, after its first checkpoint.
        launcher: words before the script; None is this Python.
        stages: which stages it has.
    """

    name: str
    words: list[str]
    killed: bool = False
    launcher: list[str] | None = None
    stages: tuple[str, ...] = ("autoencoder", "unet")


# A launcher: CUDA warns at each call that waits for the GPU, with the line of Python that makes it.
WATCHED = """
import runpy, sys, warnings, torch
warnings.simplefilter("always")
if torch.cuda.is_available():
    torch.cuda.set_sync_debug_mode("warn")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WAITS = re.compile(r"(\S+\.py):(\d+): UserWarning: called a synchronizing CUDA operation")


def small(stage: str, steps: int) -> list[str]:
    words = ["--max_train_steps", str(steps), "--checkpointing_steps", str(steps // 4), "--logging_steps", "1"]
    words += ["--validation_steps", str(steps), "--lr_warmup_steps", "5"]
    if stage == "autoencoder":
        words += ["--disc_weight", "0.5", "--disc_start", str(steps // 5), "--disc_channels", "16"]
        words += ["--disc_layers", "2", "--codebook_start", str(steps // 10), "--disc_adaptive_steps", "5"]
    else:
        words += ["--num_validation_samples", "4", "--num_inference_steps", "4"]
        words += ["--ema_snapshots", "0", "--self_guidance_steps", "0"]
    return words


def wanted(rehearse: bool) -> list[Run]:
    """The runs; a name that ends in "killed" is compared with the one without."""
    watched = [sys.executable, "-c", WATCHED]
    if rehearse:
        return [
            Run("float32", TOY, launcher=watched),
            Run("float32-killed", TOY, killed=True),
        ]
    bf16, free = ["--mixed_precision", "bf16"], ["--deterministic", "false"]
    compiled = [*bf16, "--torch_compile", "default"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    fsdp = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    fsdp += [str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"), "--num_processes", "1"]
    graphs = [*bf16, "--torch_compile", "reduce-overhead", "--gradient_accumulation_steps", "2"]
    return [
        Run("bf16", bf16),
        Run("bf16-killed", bf16, killed=True),
        Run("free", [*bf16, *free]),
        Run("free-killed", [*bf16, *free], killed=True),
        Run("fp16", ["--mixed_precision", "fp16"]),
        Run("float32", ["--mixed_precision", "no"]),
        Run("compiled", compiled),
        Run("compiled-killed", compiled, killed=True),
        Run("watched", [*bf16, "--logging_steps", "1000"], launcher=watched),
        Run("nccl", bf16, launcher=torchrun),
        Run("fsdp2", bf16, launcher=fsdp),
        Run("graphs", graphs),
    ]


_children: list[int] = []  # process groups


def end_children(signum: int, frame: object) -> None:
    """End the runs with this process."""
    for group in _children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(128 + signum)


def train(run: Run, stage: str, folder: Path, steps: int, until_checkpoint: bool) -> tuple[int, str, float]:
    """Run a stage once; returns exit status, the end of its output, and seconds."""
    launcher = run.launcher or [sys.executable]
    words = [*launcher, str(ROOT / f"train_{stage}.py"), *MNIST, *small(stage, steps), *run.words]
    words += [*(TOY_STAGE[stage] if run.words is TOY else []), "--output_dir", str(folder)]
    begun, log = time.monotonic(), folder.parent / f"{run.name}-{stage}.log"
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        _children.append(process.pid)
        try:
            while process.poll() is None and time.monotonic() - begun < 300:
                if until_checkpoint and list((folder / "checkpoints").glob(f"{stage}-*")):
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, log.read_text(errors="replace", encoding="utf-8"), time.monotonic() - begun


def cause(output: str) -> str:
    """The part of a failed run's output that says why: its first traceback, as a launcher adds its own after it."""
    for folder in (f"{ROOT}/", *(f"{path}/" for path in sys.path if path.endswith("-packages"))):
        output = output.replace(folder, "")  # results are published: they name files relative to their package
    first = output.find("Traceback (most recent call last)")
    return output[first:][:8000] if first >= 0 else output[-3000:]


def waits(output: str, steps: int) -> dict[str, float]:
    """Lines at which a watched run waited for the GPU at least every second step: waits per step."""
    counts = Counter(f"{Path(path).name}:{line}" for path, line in WAITS.findall(output))
    return {line: round(count / steps, 2) for line, count in counts.items() if count >= steps / 2}


def make(run: Run, root: Path, steps: int) -> dict:
    """Do a run; returns what happened."""
    folder, found = root / run.name, {}
    for stage in run.stages:
        attempts = []
        if run.killed:
            status, _, _ = train(run, stage, folder, steps, until_checkpoint=True)
            last = newest(folder, stage)
            attempts.append({"killed": status == -signal.SIGKILL, "at_checkpoint": last.name if last else None})
        status, output, seconds = train(run, stage, folder, steps, until_checkpoint=False)
        losses = logged(folder, stage)
        found[stage] = {
            "status": status,
            "seconds": round(seconds, 1),
            "attempts": attempts,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "steps_logged": len(losses),
            "output": cause(output) if status else "",
        }
        if run.launcher and WATCHED in run.launcher:
            found[stage]["waits_per_step"] = waits(output, steps)
        if status:
            break
    return found


def logged(folder: Path, stage: str) -> list[float]:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    return [line["loss"] for line in lines if line.get("stage") == stage and "loss" in line]


def newest(folder: Path, stage: str) -> Path | None:
    return max((folder / "checkpoints").glob(f"{stage}-*"), default=None)


def difference(a: Path, b: Path, stage: str) -> dict:
    """The last checkpoints of two runs: equal bits, or how far apart the weights are."""
    from safetensors.torch import load_file

    first, second = newest(a, stage), newest(b, stage)
    if first is None or second is None:
        return {"equal": False, "missing": True}
    one, other = (load_file(path / "state.safetensors") for path in (first, second))
    differing = [name for name in one if name not in other or not torch.equal(one[name], other[name])]
    weights = [name for name in one if name.startswith("model/") and one[name].is_floating_point()]
    gap = max((relative(one[name], other[name]) for name in weights), default=0.0)
    return {"equal": not differing and set(one) == set(other), "differing": len(differing), "of": len(one),
            "weights_relative": gap}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", help="names of runs; the default is all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--at_once", type=int, help="runs side by side; the default is one for two cores")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.rehearse else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    result = {
        "command": "python benchmarks/gpu_correctness.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "mathematics": {},
        "runs": {},
        "resumed": {},
    }
    runs = [run for run in wanted(options.rehearse) if not options.runs or run.name in options.runs]
    steps = 12 if options.rehearse else options.steps
    signal.signal(signal.SIGTERM, end_children)
    os.environ["OMP_NUM_THREADS"] = "1"
    workers = options.at_once or max(2, (os.cpu_count() or 2) // 2)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        root = Path(folder)
        futures = {pool.submit(make, run, root, steps): run.name for run in runs}
        checks: tuple[Callable[[torch.device], dict], ...] = (random_numbers, objective, networks, sampling)
        for check in checks:
            try:
                result["mathematics"][check.__name__] = check(device)
            except Exception:
                result["mathematics"][check.__name__] = {"error": traceback.format_exc()[-2000:]}
            write_json(options.json, result)
        for future in as_completed(futures):
            name = futures[future]
            try:
                result["runs"][name] = future.result()
                plain = name.removesuffix("-killed")
                if {plain, f"{plain}-killed"} <= set(result["runs"]):
                    pair = (root / plain, root / f"{plain}-killed")
                    result["resumed"][plain] = {stage: difference(*pair, stage) for stage in ("autoencoder", "unet")}
            except Exception:
                result["runs"][name] = {"error": traceback.format_exc()[-2000:]}
            write_json(options.json, result)
    write_json(options.json, result)
    print(json.dumps({key: result[key] for key in ("mathematics", "resumed")}))
    print(json.dumps({name: {stage: (f.get("status"), f.get("seconds"), f.get("first_loss"), f.get("last_loss"))
                             for stage, f in run.items() if isinstance(f, dict)}
                      for name, run in result["runs"].items()}))  # fmt: skip


if __name__ == "__main__":
    main()
