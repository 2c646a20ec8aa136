"""What operating systems and file systems do not share: cores, flushing, reading in place, ending processes."""

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import psutil

# What a disk that fails or is full says. Other errors of a flush mean that the file system has none.
_OF_THE_DISK = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_position = threading.Lock()


def usable_cores() -> int:
    """The number of cores that this process may use; where the system does not say, of all cores."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk, where that is possible.

    Windows opens no folders, and some network file systems flush none.

    Raises:
        OSError: the disk fails or is full.
    """
    try:
        # Windows flushes only what is open for writing
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Up to `size` bytes of an open file from `offset` on; threads may share the file.

    Without `pread` (Windows), it moves the file's position. Processes never share one there, since none is forked.
    """
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


def peak_resident_bytes(pid: int | None = None) -> int:
    """The largest resident memory that a process has had so far, in bytes; by default this one.

    Outside Linux and Windows, `pid` is ignored. There and on Linux, `ru_maxrss` can be that of the process which
    started this one: it outlives an exec.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1])
    if sys.platform == "win32":
        return psutil.Process(pid).memory_info().peak_wset
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def kill_with_children(process: subprocess.Popen) -> None:
    """End a process, which may have ended, and all that it started; it was begun with `start_new_session=True`."""
    if hasattr(os, "killpg"):
        import signal

        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return
    with contextlib.suppress(psutil.NoSuchProcess):  # Windows has no sessions
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
