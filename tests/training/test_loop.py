"""TrainingRun: what is due after a step, what is published, how a run ends."""

import json
from types import SimpleNamespace

import pytest

from latent_ddpm.config import UNetConfig, save_config
from latent_ddpm.errors import UserError
from latent_ddpm.training.loop import TrainingRun


class Recorder:
    """Notes its method calls, as a publisher and a tracker."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *words, **named: self.calls.append((name, *words, *named.values()))


@pytest.fixture
def run(tmp_path):
    keys = {"push_to_hub": False, "hub_strategy": "checkpoint", "max_train_steps": 10}
    made = TrainingRun(UNetConfig(dataset_name="embedded:mnist", output_dir=str(tmp_path), **keys), "unet")
    made.config.push_to_hub = True
    made.tracker, made.publisher = Recorder(), Recorder()
    made.images_per_step = 4
    made.accelerator = SimpleNamespace(is_main_process=True, scaler=None, wait_for_everyone=lambda: None)
    return made


def advance_to(run, step):
    while run.step < step:
        run.advance()


def test_what_is_due(run):
    due = []
    for _ in range(10):
        run.advance()
        due.append(run.is_due(4))
    assert [step for step, now in enumerate(due, 1) if now] == [4, 8, 10] and run.is_last
    assert run.tracker.calls == [("advance",)] * 10


def test_checkpoints_are_published_but_for_the_last(run):
    assert [step for step in range(1, 11) if (advance_to(run, step), run.publishes_checkpoint(after=2))[1]] == list(
        range(3, 10)
    )
    run.config.hub_strategy = "end"
    run.step = 5
    assert not run.publishes_checkpoint() and not run.publishes_best()


def test_the_best_validation_is_published(run):
    run.config.hub_strategy = "best"
    lines = [(2, 0.5), (4, 0.4), (6, 0.45)]
    path = run.output_dir / "metrics.jsonl"
    best = []
    for step, loss in lines:
        advance_to(run, step)
        with path.open("a") as file:
            file.write(json.dumps({"stage": "unet", "step": step, "validation_loss": loss}) + "\n")
        best.append(run.publishes_best())
    assert best == [True, True, False]
    assert not run.publishes_checkpoint()


def test_a_run_that_is_stopped_saves_and_does_not_wait_for_the_hub(run):
    for step in run.steps():
        run.advance()
        if step == 2:
            run._signal.signum = 15
        if run.should_stop():
            break
    assert run.stop({"weights": 3}) == 128 + 15
    state = run.checkpoints.resume("latest")
    assert state == {"step": 3, "images_per_step": 4, "train_batch_size": 64, "weights": 3, "scaler": {}}
    assert run.publisher.calls == [("finish", False)] and run.tracker.calls[-1] == ("close",)


def test_a_signal_in_the_last_step_does_not_stop_the_run(run):
    for _ in run.steps():
        run.advance()
        run._signal.signum = 15
        assert run.should_stop() == (run.step < 10)


def test_the_end_is_published(run):
    advance_to(run, 10)
    assert run.finish("pipeline") == 0
    assert run.publisher.calls == [("push", "U-Net after 10 steps"), ("finish",)]
    run.publisher, run.config.hub_strategy = Recorder(), "best"
    run.finish("pipeline")
    assert run.publisher.calls == [("finish",)]


def test_a_run_is_recognised_by_its_data(tmp_path, caplog):
    def begun(place, step=0):
        (tmp_path / place).mkdir(exist_ok=True)
        made = TrainingRun(UNetConfig(train_data_dir=str(tmp_path / place), output_dir=str(tmp_path / "run")), "unet")
        made.first_step = step
        return made

    first = begun("a")
    first.check_data("digest of a", ["train is trained on"])
    assert first.data_changed is None
    save_config(first.config, tmp_path / "run" / "train_unet.yaml")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"unet": {"data": "digest of a"}}))
    begun("b").check_data("digest of a")  # the data have moved
    with pytest.raises(UserError, match="holds another run .train_data_dir was '.*a', is '.*b'"):
        begun("b").check_data("digest of b")
    changed = begun("a", step=3)
    changed.check_data("digest of a with one more image")
    assert changed.data_changed and "Training continues on the new ones" in caplog.text
    (tmp_path / "run" / "run.json").write_text("{}")  # of a version that did not note it
    begun("a").check_data("anything")
    with pytest.raises(UserError, match="holds another run"):
        begun("b").check_data("anything")
