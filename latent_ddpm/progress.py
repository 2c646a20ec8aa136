"""Progress bars: tqdm's in a terminal or notebook, and a line a minute where the output goes to a file."""

import io
import sys
import time
from typing import Any

import tqdm.auto
import tqdm.std

SECONDS_PER_LINE = 60.0


class LineBar(tqdm.std.tqdm):
    """A progress bar for log files: prints a line every SECONDS_PER_LINE, and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._said_at, self._closing = time.monotonic(), False
        super().__init__(*args, **options, file=io.StringIO())  # where the carriage returns of tqdm end

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the bar as a line, if it is time to."""
        now = time.monotonic()
        if msg == "" or not (self._closing or now - self._said_at >= SECONDS_PER_LINE):
            return
        self._said_at = now
        print(msg or str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Print the last line, unless the bar was made with leave=False."""
        self._closing = True
        super().close()


def progress_bar(*args: Any, **options: Any) -> tqdm.std.tqdm:
    """`tqdm(...)` as wide as the terminal; a `LineBar` where stderr is neither a terminal nor a notebook."""
    if sys.stderr is not None and (sys.stderr.isatty() or _in_notebook()):
        return tqdm.auto.tqdm(*args, dynamic_ncols=True, **options)
    return LineBar(*args, **options)


def _in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def close_bars() -> None:
    """Close all open bars, so that what is printed next is the last thing to read."""
    for bar in list(getattr(tqdm.std.tqdm, "_instances", ())):
        bar.close()
