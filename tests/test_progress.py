"""Progress bars in files: a line a minute, and no carriage returns."""

import io
import sys
import time
from types import SimpleNamespace

import tqdm

from latent_ddpm import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_file_gets_a_line_a_minute(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    bar = progress.progress_bar(total=600, desc="unet", unit="step", mininterval=0.1)
    for _ in range(600):
        clock[0] += 1.0  # a step takes a second, so the run takes ten minutes
        bar.set_postfix(loss="0.5", refresh=False)
        bar.update(1)
        bar.write("a sentence", file=io.StringIO())  # does not repeat the bar
    bar.close()
    written = capsys.readouterr().err
    lines = written.splitlines()
    assert 9 <= len(lines) <= 12 and "\r" not in written
    assert lines[-1].startswith("unet: 100%") and "600/600" in lines[-1] and "loss=0.5" in lines[-1]


def test_a_short_bar_prints_only_its_end(capsys):
    for _ in progress.progress_bar(range(50), desc="decode"):
        pass
    written = capsys.readouterr().err
    assert len(written.splitlines()) == 1 and "50/50" in written
    for _ in progress.progress_bar(range(50), desc="shown for a while", leave=False):
        pass
    progress.progress_bar(range(3), disable=True).close()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_tqdm(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.progress_bar(total=3, file=io.StringIO())
    assert not isinstance(bar, progress.LineBar)
    bar.close()


def test_a_notebook_gets_tqdm(monkeypatch):
    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=1))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    assert progress._in_notebook()
    ipython.get_ipython = lambda: None  # imported, and not a kernel
    assert not progress._in_notebook()


def test_open_bars_are_closed_before_an_error(capsys):
    bar = progress.progress_bar(total=9, desc="unet")
    bar.update(5)
    progress.close_bars()
    print("error: the last line", file=sys.stderr)
    del bar
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "5/9" in lines[0] and lines[1] == "error: the last line"
