"""latent_ddpm.training.launch: how many processes were asked for, on how many machines; storage errors."""

import errno
import io
import tempfile
from types import SimpleNamespace

import pytest
from conftest import ROOT
from safetensors import SafetensorError

from latent_ddpm.config import UNetConfig
from latent_ddpm.errors import UserError
from latent_ddpm.training import launch
from latent_ddpm.training.launch import TOPOLOGY, _is_of_storage, _topology_asked_for

CONFIGS = ROOT / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("accelerate launch --cpu --num_processes 2", {"num_processes": 2}),
        ("python -m accelerate.commands.launch --num-processes=3 --cpu", {"num_processes": 3}),
        ("accelerate launch", {}),
        (f"accelerate launch --config_file {CONFIGS}/two_cpu_processes.yaml", {"num_processes": 2}),
        (f"accelerate launch --config_file {CONFIGS}/one_process.yaml", {}),
        ("accelerate launch --config_file absent.yaml", {}),
        ("bash", {}),
        (
            f"accelerate launch --config_file {CONFIGS}/two_machines.yaml --machine_rank 1 --main_process_ip node7",
            {"num_processes": 16, "num_machines": 2, "machine_rank": 1, "main_process_ip": "node7"},
        ),
    ],
)
def test_topology_asked_for(words, asked, monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "default_yaml_config_file", str(tmp_path / "absent.yaml"))
    assert _topology_asked_for(words.split()) == {**TOPOLOGY, **asked}


def test_what_accelerate_config_wrote_counts(monkeypatch, tmp_path):
    path = tmp_path / "default_config.yaml"
    path.write_text("num_processes: 4\nmain_process_ip: null\n")
    monkeypatch.setattr(launch, "default_yaml_config_file", str(path))
    assert _topology_asked_for(["accelerate", "launch"]) == {**TOPOLOGY, "num_processes": 4}
    assert _topology_asked_for(["accelerate", "launch", "--num_processes", "2"])["num_processes"] == 2


@pytest.mark.parametrize(
    ("error", "storage"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (PermissionError(errno.EACCES, "Permission denied"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (SafetensorError("Error while deserializing: invalid header"), False),
    ],
)
def test_errors_of_storage_become_a_sentence_and_others_do_not(error, storage, capsys, monkeypatch):
    assert _is_of_storage(error) is storage

    def fail(argv):
        raise error

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit if storage else type(error)):
        launch.run(fail)
    assert ("run the same command again" in capsys.readouterr().err) is storage


def test_ctrl_c_ends_a_script_with_a_sentence(capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as ended:
        launch.run(interrupted)
    assert ended.value.code == 130 and "error: stopped by Ctrl-C" in capsys.readouterr().err


def test_a_second_process_is_kept_out_and_leftovers_are_removed(tmp_path, monkeypatch):
    (tmp_path / "samples").mkdir()
    dead, alive = tmp_path / "samples" / ".a.png.999999999.tmp", tmp_path / ".pipeline.1.new"
    dead.write_text("half")
    alive.mkdir()
    launch.claim(tmp_path, "unet")
    assert not dead.exists() and alive.exists()

    def held(*_):
        raise BlockingIOError

    monkeypatch.setattr("fcntl.lockf", held)
    with pytest.raises(UserError, match="is in use: process .* trains the unet there"):
        launch.claim(tmp_path, "unet")


def test_processes_meet_before_the_group_is_made(monkeypatch):
    """Whose making would wait for one that died for as long as encoding may take."""

    def nobody_came(timeout):
        raise UserError("nobody came")

    monkeypatch.setattr(launch.Heartbeat, "start", nobody_came)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: pytest.fail("the group was made"))
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("ACCELERATE_USE_CPU", "true")):
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match="nobody came"):
        launch.make_accelerator(UNetConfig(dataset_name="x"))


@pytest.mark.parametrize(
    ("words", "rank", "explained"),
    [(["accelerate", "launch"], None, True), (["accelerate", "launch", "--quiet"], None, False), (["x"], "0", False)],
)
def test_the_traceback_of_accelerate_is_explained(monkeypatch, capsys, words, rank, explained):
    parent = SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    launch._say_last("no images.")
    written = capsys.readouterr().err
    assert written.startswith("\nerror: no images.") and ("accelerate's own" in written) == explained


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    launch.check_writable(tmp_path / "new" / "run")
    launch.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"output_dir .*: .*/file is a file\."):
            launch.check_writable(folder)

    class Full(io.BytesIO):
        def fileno(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    with pytest.raises(UserError, match=r"output_dir .*new cannot be written \(No space left on device\)"):
        launch.check_writable(tmp_path / "new")

    def read_only(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    config = UNetConfig(dataset_name="x", output_dir=str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        launch.check_before_loading(config, "unet")
