"""Test exports with another release of diffusers: the newest one, or the oldest allowed one.

    python benchmarks/check_newest_diffusers.py --json docs/results/publishing/newest-diffusers.json
    python benchmarks/check_newest_diffusers.py --version 0.36.0 --json docs/results/publishing/oldest-diffusers.json

Creates a temporary environment that sees the installed packages behind its own diffusers (pip decides what else must
change), and runs the tests of export and pipeline there. The installed environment does not change. It needs a package
index, so it is not part of `make test`. Run it when diffusers has a new release.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/publishing/test_export.py", "tests/test_pipeline.py", "tests/test_pipeline_calls.py")
TESTS += ("tests/diffusion/test_objective.py",)
PACKAGES = ("diffusers", "huggingface_hub", "transformers", "accelerate", "torch")
VERSIONS = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES!r}}}))"


def command(words: list[str | Path]) -> subprocess.CompletedProcess:
    """Run a command at the repository's root; returns it with what it printed."""
    return subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True, check=False)


def make_environment(folder: Path, version: str | None) -> Path:
    """An environment that sees the installed packages behind its own diffusers; returns its Python.

    Raises:
        UserError: pip cannot install that version.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed = next(path for path in sys.path if path.endswith("site-packages"))
    own = command([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
    Path(own, "installed.pth").write_text(f"{installed}\n", encoding="utf-8")
    wanted = f"diffusers=={version}" if version else "diffusers"
    done = command([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", wanted])
    if done.returncode:
        raise UserError(f"pip could not install {wanted}: {done.stderr.strip().splitlines()[-1]}")
    return python


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", help="of diffusers; by default the newest release")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder), options.version)
        versions = json.loads(command([python, "-c", VERSIONS]).stdout)
        print(f"testing with {versions}", flush=True)
        done = command([python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *TESTS])
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    result = {
        "command": "python benchmarks/check_newest_diffusers.py " + shlex.join(argv),
        "versions": versions,
        "tests": list(TESTS),
        **counts,
        "failures": [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))],
    }
    write_json(options.json, result)
    print(last)
    return 0 if done.returncode == 0 else 1


if __name__ == "__main__":
    run(main)
