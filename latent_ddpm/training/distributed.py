"""Collectives, a stop that all processes agree on, and a heartbeat; all are no-ops in a single process."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist

from latent_ddpm.errors import UserError

JOIN_SECONDS = 600  # the processes of a launch wait this long for each other, as torchrun's agents do
NOTICE_SECONDS = 20  # a waiting process says so after this time


def process_count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the processes, in place; every process gets the same bits."""
    if process_count() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate (N, ...) tensors of equal shape over the processes, in rank order."""
    if process_count() == 1:
        return tensor
    gathered = tensor.new_empty(process_count() * len(tensor), *tensor.shape[1:])
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGUSR1 (pre-emption) into a stop of all processes at the same step.

    The first signal asks for a clean stop; a second Ctrl-C stops at once. The flag is reduced over a CPU group and read
    one step later, so a GPU never waits for it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._group = dist.new_group(backend="gloo") if process_count() > 1 else None
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):  # Windows lacks some
                    signal.signal(getattr(signal, name), self._note)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        if signum == signal.SIGINT:  # launchers repeat SIGTERM, people repeat Ctrl-C
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def should_stop(self) -> bool:
        """Call once a step, in every process; the answer is the same in all of them."""
        if self._group is None:
            return self.signum is not None
        answer = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            answer = bool(flag.item())
        flag = torch.tensor([float(self.signum is not None)])
        self._pending = (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        return answer

    @property
    def exit_status(self) -> int:
        """The exit status of a process that a signal ended, as a shell reports it."""
        return 128 + (self.signum or signal.SIGTERM)


def meet() -> tuple[dist.Store, int, int]:
    """Wait until all processes of a launch have started; torchrun's environment variables say how many.

    Creating the process group waits too, but with the long timeout that encoding a dataset needs.

    Returns:
        A store with "life/<rank>" for each process, the rank of this process, and the number of processes.

    Raises:
        UserError: one did not start within JOIN_SECONDS.
    """
    address = ":".join(os.environ.get(key, "?") for key in ("MASTER_ADDR", "MASTER_PORT"))
    patience, missing = timedelta(seconds=JOIN_SECONDS), "not known"
    sentence = f"waiting at {address} for all {os.environ['WORLD_SIZE']} processes, {JOIN_SECONDS} seconds at most"
    notice = threading.Timer(NOTICE_SECONDS, print, [sentence], {"file": sys.stderr, "flush": True})
    notice.daemon = True
    notice.start()
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=patience))
        store = dist.PrefixStore("heartbeat", store)
        if rank == 0:
            store.set("verdict", "")
        store.set(f"life/{rank}", "0")
        signs = [f"life/{other}" for other in range(count)]
        try:
            store.wait(["verdict", *signs], patience)
        except RuntimeError:
            missing = ", ".join(str(other) for other in range(count) if not store.check([signs[other]]))
            raise
    except RuntimeError as error:  # a process is missing, or the address is wrong or in use
        raise UserError(
            f"The {os.environ['WORLD_SIZE']} processes have not met at {address} within {JOIN_SECONDS} seconds "
            f"(missing: {missing}): a process died at its start, or cannot reach that address. "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        notice.cancel()
    return store, rank, count


@contextlib.contextmanager
def joining() -> Iterator[None]:
    """Wraps the creation of the process group, which may notice the death of rank 0 before the heartbeat does.

    Raises:
        UserError: rank 0 died, and this is another rank.
    """
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason, rank = str(error).splitlines()[0], os.environ.get("RANK", "0")
        if rank == "0":
            raise
        raise UserError(f"Process 0, or its machine, is gone ({reason}). Process {rank} ends too.") from error


class Heartbeat:
    """Ends this process when another one of the run dies, hangs or loses its machine.

    Collectives have a long timeout, because encoding a dataset takes long; this thread notices sooner. Every process
    writes a sign of life to a shared store. Rank 0 watches all others and writes its verdict there; the others watch
    rank 0.

    Args:
        store: shared by the processes.
        rank: of this process.
        count: of processes.
        timeout: a process counts as dead after this many seconds without a sign of life.
    """

    running: ClassVar["Heartbeat | None"] = None

    def __init__(self, store: dist.Store, rank: int, count: int, timeout: float) -> None:
        self.store, self.rank, self.count, self.timeout = store, rank, count, timeout
        store.set_timeout(timedelta(seconds=timeout))
        self._ended, self._last_word = threading.Event(), "ended"
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    @classmethod
    def start(cls, timeout: float) -> None:
        """Start the heartbeat when all processes have started; call it in each, before the process group is created.

        Does nothing in a process that has started it already, or is alone.

        Raises:
            UserError: a process did not start.
        """
        if cls.running is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            cls.running = cls(*meet(), timeout)

    @classmethod
    def end(cls, failed: bool = False) -> None:
        """Tell the other processes that this one is done, or has failed."""
        if cls.running is not None:
            cls.running._last_word = "failed" if failed else "ended"
            cls.running._ended.set()
            cls.running._thread.join(cls.running.timeout)
            cls.running = None

    def _beat(self) -> None:
        number = 0
        while not self._ended.wait(self.timeout / 10):
            number += 1
            try:
                self.store.set(f"life/{self.rank}", str(number))
                verdict = self.store.get("verdict").decode() or self._look()
                self._answered = time.monotonic()
            except (RuntimeError, ValueError):  # the store is gone, and so is the process that hosts it
                silent = time.monotonic() - self._answered > self.timeout
                verdict = "Process 0, or its machine, is gone." if silent else ""
            if verdict and not self._ended.is_set():
                print(f"\nerror: {verdict} Process {self.rank} ends too.", file=sys.stderr, flush=True)
                os._exit(1)
        try:
            self.store.set(f"life/{self.rank}", self._last_word)
            if self.rank == 0 and self._last_word == "failed":
                self.store.set("verdict", "Process 0 ended with an error.")
        except (RuntimeError, ValueError):
            return

    def _look(self) -> str:
        """A sentence about a dead process, or ""; rank 0 writes it to the store."""
        for rank in range(1, self.count) if self.rank == 0 else (0,):
            now, sign = time.monotonic(), self.store.get(f"life/{rank}")
            last, since = self._seen.get(rank, (b"", now))
            verdict = f"Process {rank} ended with an error." if sign == b"failed" else ""
            if sign != last:
                self._seen[rank] = (sign, now)
            elif sign != b"ended" and now - since > self.timeout:
                verdict = f"Process {rank} has shown no sign of life for {self.timeout:.0f} seconds: it died or hangs."
            if verdict:
                if self.rank == 0:
                    self.store.set("verdict", verdict)
                return verdict
        return ""


def all_reduce_max(value: torch.Tensor) -> torch.Tensor:
    """The maximum of `value` over the processes, in place."""
    if process_count() > 1:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value
