"""Everything that needs a GPU, measured by one command within a time limit.

    python scripts/benchmark_gpu.py --out results --minutes 8
    python scripts/benchmark_gpu.py --out results --rehearse        # every part on a CPU, at toy size

The parts, in order of worth, each a program of its own in benchmarks/:

    correctness   the GPU computes what a CPU does; both stages in float32, bf16, fp16, compiled, with NCCL and sharded;
                  killed runs resume with the same bits
    throughput    training steps against the stock recipe: images/s, share of the card's peak, memory, kernels
    quality       CIFAR-10 (--data FOLDER of parquet files) trained in minutes: PSNR, samples, Frechet distance
    sampling      images/s of a pipeline at 20, 4 and 1 steps, compiled or not

Each part writes OUT/<part>.json as it goes, so what is measured stays when a part fails or the time ends. A failing
part does not stop the next. The processes of `throughput` compile while `correctness` runs; a lock lets one at a time
measure, while nothing else runs. gpu.json sums up, gpu.png draws it. docs/gpu.md says how to run this on a machine that
has torch, but none of the other packages.
"""

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("correctness", "throughput", "quality", "sampling")
THROUGHPUT = {  # processes of the part
    "unet": ["unet_256"],
    "autoencoder": ["autoencoder_256_all", "autoencoder_256_lpips", "autoencoder_256_plain"],
    "small": ["unet_64", "unet_cifar10", "autoencoder_64_all", "autoencoder_cifar10"],
}
SHARES = {"correctness": 0.25, "throughput": 0.45, "quality": 0.6, "sampling": 0.15}  # of the time; what is left counts
CLOSING = 6  # seconds for the summary


class Part:
    """A part that runs as a process, with its output in a file."""

    def __init__(self, script: str, out: Path, words: list[str], suffix: str = "") -> None:
        self.name, self.begun = script + suffix, time.monotonic()
        path = ROOT / "benchmarks" / f"gpu_{script}.py"
        command = [sys.executable, str(path), "--json", str(out / f"{self.name}.json"), *words]
        with (out / f"{self.name}.log").open("w", encoding="utf-8") as file:
            environment = dict(os.environ)
            if "--rehearse" in words:  # capture the graphs, but compile nothing
                environment |= {"LATENT_DDPM_COMPILE_BACKEND": "aot_eager", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)

    def wait(self, seconds: float) -> dict:
        """Wait for its end, at most so long; returns what happened."""
        try:
            status = self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            status = "stopped: out of time"
        took = round(time.monotonic() - self.begun, 1)
        print(f"{self.name}: {'done' if status == 0 else status} after {took} s", flush=True)
        return {"status": status, "seconds": took}


def merge_throughput(out: Path) -> None:
    """Merge the results of the processes of `throughput` into throughput.json."""
    found = [out / f"throughput-{name}.json" for name in (*THROUGHPUT, "rehearsal")]
    results = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    if results:
        cases = {name: case for result in results for name, case in result["cases"].items()}
        merged = results[0] | {"cases": cases, "command": f"python scripts/benchmark_gpu.py {shlex.join(sys.argv[1:])}"}
        (out / "throughput.json").write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
        for path in found:
            path.unlink(missing_ok=True)


def draw(out: Path) -> None:
    """A figure of the throughput: images/s over the stock recipe, and the share of the card's peak."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result = json.loads((out / "throughput.json").read_text(encoding="utf-8"))
    rows = [
        (f"{case}\n{variant}", figures["over_stock"], figures.get("share_of_peak"))
        for case, found in result["cases"].items()
        for variant, figures in found.get("variants", {}).items()
        if "over_stock" in figures
    ]
    if not rows:
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 + 0.42 * len(rows)), constrained_layout=True, sharey=True)
    names = [name for name, _, _ in rows]
    axes[0].barh(names, [ratio for _, ratio, _ in rows])
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].set_xlabel("images/s over the stock recipe")
    axes[1].barh(names, [100 * (share or 0) for _, _, share in rows])
    axes[1].set_xlabel("% of the card's bf16 peak")
    axes[0].invert_yaxis()
    axes[0].tick_params(axis="y", labelsize=7)
    figure.suptitle(f"{result['device']}, torch {result['torch']}")
    figure.savefig(out / "gpu.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8, help="time limit of all parts together; default: 8")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--data", help="folder of CIFAR-10's parquet files, for quality")
    parser.add_argument("--correctness", type=shlex.split, default=[], help="further words for that part, in quotes")
    parser.add_argument("--throughput", type=shlex.split, default=[], help="likewise")
    parser.add_argument("--rehearse", action="store_true", help="every part at toy size, on a CPU")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error("--minutes must be greater than 0")
    if options.data and not Path(options.data).is_dir():
        parser.error(f"--data {options.data} is not a folder")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file")
    out, begun = options.out, time.monotonic()
    ends = begun + 60 * options.minutes - CLOSING
    out.mkdir(parents=True, exist_ok=True)
    parts = list(options.parts)
    summary: dict[str, dict] = {}

    def left() -> float:
        return ends - time.monotonic()

    def minutes(name: str) -> list[str]:
        later = sum(SHARES[part] for part in parts[parts.index(name) + 1 :])
        return ["--minutes", f"{left() / 60 * SHARES[name] / (SHARES[name] + later):.2f}"]

    if options.rehearse:
        failed = rehearse(out, parts)
        print(f"written to {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
        return 1 if failed else 0
    with (out / "lock").open("w", encoding="utf-8") as lock:
        with contextlib.suppress(ImportError):  # Windows: the parts disturb each other
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_SH)
        running = [Part("correctness", out, options.correctness)] if "correctness" in parts else []
        if "throughput" in parts:
            words = [*minutes("throughput"), "--lock", str(out / "lock"), *options.throughput]
            for name, cases in THROUGHPUT.items():
                running.append(Part("throughput", out, [*words, "--cases", *cases], f"-{name}"))
        if running and running[0].name == "correctness":
            summary["correctness"] = running.pop(0).wait(0.5 * left())
    for part in running:  # the lock is free now
        summary[part.name] = part.wait(left())
    for name in ("quality", "sampling"):
        if name == "quality" and name in parts and not options.data:
            print("quality: left out, because it needs --data")
        elif name in parts and left() <= 10:
            summary[name] = {"status": "skipped: out of time", "seconds": 0}
            print(f"{name}: skipped, no time is left")
        elif name in parts:
            data = ["--data", options.data] if name == "quality" and options.data else []
            summary[name] = Part(name, out, [*minutes(name), *data]).wait(left())
    merge_throughput(out)
    (out / "lock").unlink()
    if (out / "throughput.json").exists():
        try:
            draw(out)
        except Exception as error:
            print(f"no figure: {error}")
    (out / "gpu.json").write_text(
        json.dumps({"seconds": time.monotonic() - begun, "parts": summary}, indent=1) + "\n", encoding="utf-8"
    )
    failed = [name for name, happened in summary.items() if happened["status"] != 0]
    logs = ", ".join(f"{name}.log" for name in failed)
    print(f"written to {out}" + (f"; not complete: {', '.join(failed)} ({logs} say why)" if failed else ""))
    return 1 if failed else 0


def rehearse(out: Path, parts: list[str]) -> list[str]:
    """Run the parts side by side at toy size, on a CPU; returns those that failed."""
    running = []
    for name in parts:
        words = ["--rehearse", *(["--minutes", "9"] if name != "correctness" else [])]
        running.append(Part(name, out, words, "-rehearsal" if name == "throughput" else ""))
    failed = [part.name for part in running if part.wait(900)["status"] != 0]
    merge_throughput(out)
    if "throughput" in parts:
        draw(out)
    return failed


if __name__ == "__main__":
    sys.exit(main())
