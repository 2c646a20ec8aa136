"""Scripts as processes of their own that begin with the libraries loaded: importing them takes longer than most tests.

The processes are forked from a server that has imported them and done nothing else; what a script does, how it
is killed and what it exits with are as if `python SCRIPT WORDS` had been typed.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PATIENCE = 900  # seconds until a process counts as hung; a busy machine takes five times its usual time
LIBRARIES = [
    "train_autoencoder",
    "train_unet",
    "accelerate",
    "datasets",
    "latent_ddpm.evaluation.features",
    "matplotlib.pyplot",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


def _as_script(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """In the new process: become `python WORDS`."""
    os.setsid()
    os.environ |= environment
    if "OMP_NUM_THREADS" in environment:  # which torch, loaded before, has not seen
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.argv = words
    sys.path[0] = str((ROOT / words[0]).parent)
    status: object = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        atexit._run_exitfuncs()
    sys.exit(status)


class Script:
    """`python WORDS` at the repository's root, in a session of its own.

    Args:
        words: the script and its command line.
        environment: variables that it has beside those of the first process.
    """

    def __init__(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()  # of stdout and stderr; goes with the object
        self.process = _context.Process(target=_as_script, args=(self.words, self.folder.name, environment or {}))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def wait(self, timeout: float = PATIENCE) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.words, timeout)
        return self.process.exitcode

    def finish(self) -> subprocess.CompletedProcess:
        """Wait for its end; returns it with what it wrote."""
        status = self.wait()
        files = (Path(self.folder.name) / number for number in ("1", "2"))
        return subprocess.CompletedProcess(self.words, status, *(f.read_text() if f.exists() else "" for f in files))
