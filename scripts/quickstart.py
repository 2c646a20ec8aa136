"""The main job from end to end: train both stages on handwritten digits and draw new ones.

    make quickstart          (installs first), or: python scripts/quickstart.py

It prints the commands that it runs; you can type them too. Run it again after an interruption and it resumes; when all
is done, it draws again. Remove outputs/mnist to start from scratch.
"""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from latent_ddpm.config import UNetConfig, parse_config

CONFIG = "configs/mnist.yaml"


def run(*words: object) -> None:
    """Print a command and run it; exit with its status if it fails."""
    print(f"\n$ {shlex.join(map(str, words))}", flush=True)
    words = (str(Path(sys.executable).parent / "accelerate"), *words[1:]) if words[0] == "accelerate" else words
    words = (sys.executable, *words[1:]) if words[0] == "python" else words
    process = subprocess.Popen(list(map(str, words)))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the script gets the Ctrl-C too, saves and ends
    status = process.wait()
    signal.signal(signal.SIGINT, before)
    if status:
        print("\nStopped. `make quickstart` again resumes from the newest checkpoint.", file=sys.stderr)
        raise SystemExit(status)


def main() -> None:
    if len(sys.argv) > 1:
        raise SystemExit(__doc__ + "\nIt takes no arguments.")
    begun = time.monotonic()
    print("Two stages: about 15 minutes on two fast CPU cores, longer on slow or busy ones.", flush=True)
    # One process with all cores: on two cores, two processes with one thread each are no faster.
    topology = [
        "--quiet",
        "--num_processes",
        1,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    for script in ("train_autoencoder.py", "train_unet.py"):
        run("accelerate", "launch", *topology, script, "--config", CONFIG)
    folder = Path(parse_config(UNetConfig, ["--config", CONFIG]).output_dir)
    final = folder / "samples" / "final"
    run("python", "scripts/sample.py", folder / "pipeline", "--num_images", 64, "--output_dir", final)
    print(
        f"""
Done in {(time.monotonic() - begun) / 60:.1f} minutes.

New digits:     {final}/grid.png, and one file for each beside it
During training: {folder}/samples/*.png and {folder}/metrics.jsonl
The pipeline:   {folder}/pipeline. It needs only diffusers:

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained("{folder}/pipeline")
    pipeline(batch_size=1, num_inference_steps=20).images[0].save("digit.png")
"""
    )


if __name__ == "__main__":
    main()
