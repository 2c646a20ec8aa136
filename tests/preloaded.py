"""Scripts as processes of their own that begin with the libraries loaded: importing them takes longer than most tests.

The processes are forked from a server that has imported them and done nothing else; what a script does, how it
is killed and what it exits with are as if `python SCRIPT WORDS` had been typed.

There are two servers. A library that reads its environment when it is imported, as huggingface_hub does, is loaded by
the first one only. A script that needs another environment comes from the second one.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import mock

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

WITHOUT_THE_HUB = [  # what takes most of the time to import and does not read the environment
    "torch",
    "torch._dynamo.symbolic_convert",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.data",
    "matplotlib.pyplot",
    "pandas",
    "pyarrow.dataset",
    "scipy.stats",
    "sympy",
]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)
_without_the_hub = multiprocessing.forkserver.ForkServer()
_without_the_hub.set_forkserver_preload(WITHOUT_THE_HUB)


def _as_script(words: list[str], folder: str, environment: dict[str, str], alone: bool) -> None:
    """In the new process: become `python WORDS`."""
    os.setsid()
    if alone:
        assert "huggingface_hub" not in sys.modules
        os.environ.clear()
    os.environ |= environment
    if "OMP_NUM_THREADS" in environment:  # which torch, loaded before, has not seen
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for number in (1, 2):
        os.dup2(os.open(f"{folder}/{number}", os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(ROOT)
    status: object = 0
    try:
        if words[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *words[2:]], ""
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = words, str((ROOT / words[0]).parent)
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
        words: the script, or "-c" and a program, and its command line.
        environment: variables that it has beside those of the first process.
        alone: whether it has no other variables; less is loaded then.
    """

    def __init__(self, words: list[str], environment: dict[str, str] | None = None, alone: bool = False) -> None:
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()  # of stdout and stderr; goes with the object
        arguments = (self.words, self.folder.name, environment or {}, alone)
        self.process = _context.Process(target=_as_script, args=arguments)
        if alone:
            with mock.patch.object(
                multiprocessing.forkserver, "connect_to_new_process", _without_the_hub.connect_to_new_process
            ):
                self.process.start()
        else:
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


def free_port() -> int:
    """A port of loopback that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_processes(words: list[str], count: int, **variables: str) -> subprocess.CompletedProcess:
    """Run a script in `count` processes on the CPU, with the variables that `accelerate launch` and torchrun set.

    As with torchrun, a process that fails ends the others. Returns the outputs of all, one after the other, and the
    exit status of the first one that failed. `variables` are set as well.
    """
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    shared |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "OMP_NUM_THREADS": 1}
    shared |= {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo", **variables}
    scripts = []
    for rank in range(count):
        environment = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        scripts.append(Script(words, environment))
    failed, deadline = 0, time.monotonic() + PATIENCE
    while not failed and any(script.poll() is None for script in scripts):
        failed = next((script.poll() for script in scripts if script.poll()), 0)
        if time.monotonic() > deadline:
            failed = -1
        time.sleep(0.02)
    for script in scripts:
        if script.poll() is None:
            script.kill()
    ends = [script.finish() for script in scripts]
    failed = failed or next((end.returncode for end in ends if end.returncode), 0)
    texts = ("".join(end.stdout for end in ends), "".join(end.stderr for end in ends))
    return subprocess.CompletedProcess(words, failed, *texts)
