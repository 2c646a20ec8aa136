"""Training must work without what only Linux has, and text must be read and written as UTF-8 everywhere."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, command, environment, finished

from latent_ddpm import system
from latent_ddpm.data.indexing import CompactStrings
from latent_ddpm.files import replace_folder, write_whole
from latent_ddpm.system import fsync_path, kill_with_children, peak_resident_bytes, read_at, usable_cores
from latent_ddpm.training import launch

# As Windows and macOS are: nothing of this exists, folders cannot be opened, worker processes are spawned.
ELSEWHERE = """
import builtins, multiprocessing, os, shutil, signal
for name in ("sched_getaffinity", "sched_setaffinity", "pread", "killpg", "execv"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGHUP"):
    delattr(signal, name)
imported = builtins.__import__
def without_modules(name, globals=None, *rest, **more):
    if name in ("fcntl", "resource") and str((globals or {}).get("__name__")).startswith(("latent_ddpm", "__main__")):
        raise ImportError(name)  # psutil and others know which system this is
    return imported(name, globals, *rest, **more)
builtins.__import__ = without_modules
opened = os.open
def without_folders(path, flags, *rest, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, flags, *rest, **more)
os.open = without_folders
shutil._use_fd_functions = False
multiprocessing.set_start_method("spawn")
"""


def test_both_stages_train_as_on_another_system(photos, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(ELSEWHERE)
    flags = {"train_data_dir": photos, "resolution": 16, "max_train_steps": 2, "checkpointing_steps": 1}
    flags |= {"dataloader_num_workers": 1, "image_cache_gib": 0}  # so that workers decode in each step
    settings = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), str(ROOT)))}
    settings |= {"ACCELERATE_MIXED_PRECISION": "no"}  # as `accelerate launch`, with which a run counts its cores
    settings |= {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "default::EncodingWarning"}
    for script in ("train_autoencoder.py", "train_unet.py"):
        done = finished(command(script, tmp_path / "run", **flags), env={**environment(), **settings})
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and str(ROOT) in line]
        assert [line for line in lines if ".venv" not in line] == []
    assert (tmp_path / "run" / "pipeline" / "model_index.json").exists()


# ---------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------


NOT_TEXT = ("Image", "PIL.Image", "os", "tarfile")  # modules whose `open` takes no encoding


def calls_without_encoding(source):
    """(line, text) of each call that opens text in the encoding of the machine."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
            continue
        name, of = getattr(node.func, "id", None), ""
        if isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value)
        given = [*node.args, *(word.value for word in node.keywords if word.arg == "mode")]
        texts = [word.value for word in given if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        binary = any("b" in text and set(text) <= set("rwabx+") for text in texts)
        opens = name == "FileHandler" or (name == "open" and of not in NOT_TEXT and not binary)
        if opens or (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) < 2):
            yield node.lineno, ast.unparse(node)


def test_text_has_an_encoding():
    """Windows would take cp1252."""
    folders = ("latent_ddpm", "scripts", "benchmarks", "docs")
    files = [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    names = {path.relative_to(ROOT).as_posix(): path for path in files}
    found = {name: list(calls_without_encoding(path.read_text(encoding="utf-8"))) for name, path in names.items()}
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text(text)", 1),
        ("open(path)", 1),
        ("path.open('w')", 1),
        ("open(path, mode='a')", 1),
        ("logging.FileHandler(path)", 1),
        ("path.read_text(encoding='utf-8'); open(path, 'rb'); path.open('wb'); Image.open(path); os.open(path, 0)", 0),
    ],
)
def test_text_without_an_encoding_is_found(line, count):
    assert len(list(calls_without_encoding(line))) == count


def test_output_that_a_terminal_cannot_show_ends_no_run(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from latent_ddpm.training.launch import run\nrun(lambda words: print('\\u2192 \\udce9'))\n")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, env={**environment(), "PYTHONIOENCODING": "cp1252"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == b"\\u2192 \\udce9"


# ---------------------------------------------------------------------------------------------------------------
# Files and processes
# ---------------------------------------------------------------------------------------------------------------


def test_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert usable_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1


def refuse(number):
    def fsync(descriptor):
        raise OSError(number, os.strerror(number))

    return fsync


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES])
def test_a_file_system_that_flushes_no_folders(number, tmp_path, monkeypatch):
    monkeypatch.setattr(system.os, "fsync", refuse(number))
    fsync_path(tmp_path)
    replace_folder(tmp_path / "new", lambda folder: (folder / "a").write_bytes(b"1"))
    assert (tmp_path / "new" / "a").read_bytes() == b"1"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_is_an_error(number, tmp_path, monkeypatch):
    monkeypatch.setattr(system.os, "fsync", refuse(number))
    with pytest.raises(OSError):
        fsync_path(tmp_path)


def test_folders_that_cannot_be_opened(tmp_path, monkeypatch):
    def opened(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(system.os, "open", opened)
    write_whole(tmp_path / "a", "b")
    assert (tmp_path / "a").read_text() == "b"


def test_reading_without_pread(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    with open(tmp_path / "a", "rb", buffering=0) as file:
        expected = read_at(file.fileno(), 5, 40)
        monkeypatch.delattr(os, "pread")
        assert read_at(file.fileno(), 5, 40) == expected == bytes(range(40, 45))
        assert read_at(file.fileno(), 50, 90) == bytes(range(90, 100))
    strings = CompactStrings(tmp_path)
    monkeypatch.setattr(CompactStrings, "IN_MEMORY", 100)
    strings.extend(f"image {k}" for k in range(1000))
    assert strings[777] == "image 777" and list(strings)[-1] == "image 999"


@pytest.mark.parametrize("groups", [True, False])
def test_a_process_ends_with_those_that_it_started(groups, tmp_path, monkeypatch):
    if not groups:
        monkeypatch.delattr(os, "killpg")
    inner = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    words = [sys.executable, "-c", f"import os, time\nif os.fork() == 0:\n    {inner}\ntime.sleep(600)"]
    process = subprocess.Popen(words, start_new_session=True)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
    kill_with_children(process)
    process.wait(20)
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    for _ in range(200):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        system.threading.Event().wait(0.05)
    else:
        pytest.fail("the inner process is alive")
    kill_with_children(process)  # has ended


def test_memory_without_proc(monkeypatch):
    block = np.ones(30 * 2**20, np.uint8)
    expected = peak_resident_bytes()
    assert expected > block.nbytes
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert peak_resident_bytes() == pytest.approx(expected, rel=0.5)


def test_no_lock_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    leftover = tmp_path / "run" / f".a.{2**22 + 1}.tmp"
    leftover.parent.mkdir()
    leftover.touch()
    launch.claim(tmp_path / "run", "unet")
    assert not leftover.exists()
