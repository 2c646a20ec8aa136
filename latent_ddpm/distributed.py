"""The few collective operations that the library needs; each is a no-op in a single process."""

import signal
import threading

import torch
import torch.distributed as dist


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
    gathered = [torch.empty_like(tensor) for _ in range(process_count())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a wish to stop that all processes learn at the same step.

    The first signal asks for a clean stop, a second one is obeyed at once. The agreement travels over a CPU
    group and is read one step after it was sent, so a GPU never waits for it.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._group = dist.new_group(backend="gloo") if process_count() > 1 else None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, self._note)

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
        """What a shell expects of a process that a signal ended."""
        return 128 + (self.signum or signal.SIGTERM)
