"""What both training loops share: a run is opened, resumed, counted, logged, saved, stopped, published and finished.

run = TrainingRun(parse_config(...), "unet")      # checks the config, reads the newest checkpoint
config = run.start_processes(fitting, plan)       # accelerate; everything in steps
if run.is_finished(...): return 0
tracker = run.start_tracking(...)                 # progress bar, metrics.jsonl, trackers
for step in run.steps():
    ...                                           # one optimizer step
    run.advance()
    if run.is_due(config.validation_steps): ...   # what each stage does differently
    if run.should_stop(): return run.stop(state)
return run.finish(...)
"""

import copy
import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from latent_ddpm.config import (
    RunConfig,
    another_run,
    changed,
    check_plan,
    keys_to_size,
    planned_keys,
    save_config,
    with_saved_plan,
)
from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.checkpoint import CheckpointFolder
from latent_ddpm.training.distributed import StopSignal
from latent_ddpm.training.launch import Fitting, check_before_loading, claim, fit_to_processes, make_accelerator
from latent_ddpm.training.metrics import is_best
from latent_ddpm.training.plan import Plan
from latent_ddpm.training.tracking import Tracker, is_finished, noted_of

# in commit messages of the Hub
NAMES = {"autoencoder": "Autoencoder", "unet": "U-Net", "few_steps": "U-Net for few steps"}
ENDLESS = 10**12  # steps
WORTH_SAYING = 0.02  # of the steps, that a correction changes
PLANNED_STEPS = "planned_steps"  # in checkpoints of a run with train_minutes: as first planned, and as corrected
ORIGIN = "origin"  # in checkpoints of a chapter and in run.json


class Publishes(Protocol):
    """What a run needs of a publisher; `latent_ddpm.publishing.hub.Publisher` is one."""

    def push(self, message: str) -> None:
        """Publish the run's folder in the background."""

    def finish(self, wait: bool = True) -> bool:
        """Wait for the uploads; returns whether everything is published."""


Planning = Callable[[RunConfig, str, Accelerator, float], Plan]
Sizing = Callable[[RunConfig, Accelerator], dict[str, Any]]


class TrainingRun:
    """One stage of one run.

    Args:
        config: before the processes are started.
        stage: "autoencoder" or "unet".

    Attributes:
        config: the resolved config; after `start_processes` all lengths are in steps.
        output_dir: the run's folder.
        state: the checkpoint to resume from, or None; `start_tracking` releases it.
        first_step: number of optimizer steps in that checkpoint.
        step: number of optimizer steps done.
        accelerator: from `start_processes` on.
        images_per_step: of all processes together, from `start_processes` on.
        tracker: from `start_tracking` on.
        data_changed: whether the run began with other images; None until `check_data`, or if that is not known.
        publisher: uploads the results; set by the script if push_to_hub.
        origin: of a chapter, what it starts from and its keys; "" for a stage.
        before: optimizer steps of the chapters before; example numbers go on from there.

    Raises:
        UserError: the config cannot be trained with, or the checkpoint cannot be used.
    """

    accelerator: Accelerator
    images_per_step: int
    tracker: Tracker
    data_changed: bool | None
    _signal: StopSignal | None

    def __init__(self, config: RunConfig, stage: str) -> None:
        self.stage, self.output_dir = stage, Path(config.output_dir)
        asked, saved = config, self.output_dir / f"train_{stage}.yaml"
        config, minutes = with_saved_plan(asked, saved)
        self._saved_config, self._moved = check_before_loading(config, stage)
        self._data, self.data_changed = "", None
        self.checkpoints = CheckpointFolder(self.output_dir / "checkpoints", stage, config.checkpoints_total_limit)
        self.state = self.checkpoints.resume(config.resume_from_checkpoint)
        self.first_step = self.step = self.state["step"] if self.state else 0
        if minutes is not None and self.state is None:  # it is planned anew
            config = changed(config, **{key: getattr(asked, key) for key in planned_keys(asked)})
        self.config = self._asked = config
        self._plan: Plan | None = None
        self._first_planned: int | None = None
        self._first_step_began = 0.0
        if self.state is not None and config.minutes is not None:
            check_plan(config, minutes, saved)
            self._first_planned, steps = self.state.get(PLANNED_STEPS, [config.max_train_steps] * 2)
            self._set_steps(steps)
        self.publisher: Publishes | None = None
        self.origin, self.before, self._signal = "", 0, None

    # ------------------------------------------------------------------------------------------------ beginning

    def start_processes(self, fitting: Fitting, plan: Planning, sizes: Sizing) -> Any:
        """Create the accelerator; returns the config with all lengths in steps, and the batch size as a number.

        Args:
            fitting: how many images fit a GPU, for train_batch_size auto.
            plan: chooses the lengths of a run with train_minutes, in the main process.
            sizes: chooses the networks of a run with auto_sizes, in all processes.

        Raises:
            UserError: the config does not fit these processes, or the time is too short.
        """
        self.accelerator = make_accelerator(self.config)
        if self._asked.source_note:
            self.logger.info(self._asked.source_note)
        begun = time.monotonic()
        if keys_to_size(self.config) and self.state is None:
            self._take_sizes(sizes)
        self.config = fit_to_processes(self.config, self.state, self.accelerator, fitting)
        if self.config.minutes is not None and self.state is None:
            self._take(plan, time.monotonic() - begun)
        elif self.config.minutes is not None:
            self.logger.info("the lengths stay as the run has planned them: %d steps", self.config.max_train_steps)
        batch = self.config.train_batch_size * self.accelerator.num_processes
        self.images_per_step = batch * self.config.gradient_accumulation_steps
        return self.config

    def _take_sizes(self, sizing: Sizing) -> None:
        """Let all processes time networks; they take what the main process chooses."""
        self.logger.info("auto_sizes: timing networks on this machine")
        chosen = [sizing(self.config, self.accelerator)]
        broadcast_object_list(chosen)
        self.config = self._asked = changed(self.config, **chosen[0])
        self.logger.info("auto_sizes: %s", ", ".join(f"{key} {value}" for key, value in chosen[0].items()))

    def _take(self, planning: Planning, used: float) -> None:
        """Let the main process choose the lengths of this run; all processes take them.

        Args:
            planning: see `start_processes`.
            used: seconds of the run's time that have been spent on what a rehearsal leaves out.
        """
        made: list[Any] = [None]
        problem: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                claim(self.output_dir, self.stage)
                self.logger.info("measuring the speed of this machine, to plan %g minutes", self.config.minutes)
                made = [planning(self.config, self.stage, self.accelerator, used)]
            except Exception as error:  # the other processes wait for an answer
                problem, made = error, [str(error)]
        broadcast_object_list(made)
        if problem is not None:
            raise problem
        if isinstance(made[0], str):
            raise UserError(made[0])
        self._plan, before = made[0], self.config
        self._asked = dataclasses.replace(self._asked, **self._plan.keys)
        self.config = dataclasses.replace(self.config, **self._plan.keys)
        self._first_planned = self.config.max_train_steps
        differing = [f"{key} {value}" for key, value in self._plan.keys.items() if value != getattr(before, key)]
        self.logger.info("planned: %s", ", ".join(differing) or "the steps of the config")

    def _set_steps(self, steps: int) -> None:
        """Change the length of the run; the training loop reads it from `config`."""
        self.config.max_train_steps = steps
        self._asked = dataclasses.replace(self._asked, max_train_steps=steps)

    def _correct(self) -> None:
        """Correct the length of a run with train_minutes by the time that its steps have taken."""
        now, before = time.time(), self.config.max_train_steps
        times = now - self._first_step_began, now - _process_began()
        chosen = [self._plan.corrected(self.step, before, *times)]
        broadcast_object_list(chosen)
        self._set_steps(chosen[0])
        self.tracker.set_last_step(chosen[0])
        if abs(chosen[0] - before) > WORTH_SAYING * before:
            self.tracker.say(f"{chosen[0]} steps in all will fit the time, instead of {before}.")
        if self.accelerator.is_main_process:
            save_config(self._asked, self._saved_config)

    def check_data(self, identity: str, notes: Sequence[str] = ()) -> None:
        """Compare the data with those that the run began with, by their content and not by their place.

        Args:
            identity: of the training images (`ImageSource.identity`).
            notes: sentences on what the names of files and folders mean, for the log.

        Raises:
            UserError: other data lie at another place than those of the run in output_dir.
        """
        for note in notes:
            self.logger.info(note)
        self._data = identity
        before = noted_of(self.output_dir, self.stage).get("data")
        same = before == self._data
        if self._moved and not same:
            raise another_run(self._saved_config, self._moved)
        if self._moved:
            self.logger.info("the data are those of the run, at another place (%s)", self._moved)
        self.data_changed = None if not before else not same
        if self.data_changed and self.first_step:
            self.logger.warning("The images differ from those of the checkpoint. Training continues on the new ones.")

    def is_finished(self, product: str) -> bool:
        """Whether all steps are done and the result `product`, a file in output_dir, exists; logs it if so."""
        if not is_finished(self.config, self.stage, self.first_step, product):
            return False
        folder = self.output_dir / Path(product).parent
        self.logger.info("all %d steps are done; the %s is in %s", self.first_step, folder.name, folder)
        return True

    def chapter(self, name: str, config: RunConfig, origin: str) -> "TrainingRun":
        """A further part of this run, with the same processes and data, and its own steps, checkpoints and metrics.

        Checkpoints of another origin are removed: the chapter then starts from scratch.

        Args:
            name: stands for a stage in the names of checkpoints and pictures, in metrics.jsonl and run.json.
            config: of the chapter, with all lengths in steps.
            origin: identifies what the chapter starts from, and its keys.
        """
        part = copy.copy(self)
        part.config, part.stage, part.origin = config, name, origin
        part.before = self.before + self.config.max_train_steps
        part.checkpoints = CheckpointFolder(self.checkpoints.folder, name, config.checkpoints_total_limit)
        part.state = part.checkpoints.resume("latest")
        if part.state is not None and part.state[ORIGIN] != origin:
            self.logger.info("%s starts from scratch: what it starts from has changed, or its keys have", name)
            part.state = None
        self.accelerator.wait_for_everyone()  # all have looked
        if part.state is None and self.accelerator.is_main_process:
            part.checkpoints.clear()
        part.first_step = part.step = part.state["step"] if part.state else 0
        return part

    def was_finished(self, product: str) -> bool:
        """Whether run.json says that the steps of this stage or chapter are done and `product` was exported from them.

        Args:
            product: a file in output_dir.
        """
        noted = noted_of(self.output_dir, self.stage)
        same = noted.get("finished_at") == self.config.max_train_steps and noted.get(ORIGIN, "") == self.origin
        return same and (self.output_dir / product).exists()

    def reopen(self, *chapters: str) -> None:
        """Note that chapters are not finished: this stage, which they start from, is trained or exported again."""
        path = self.output_dir / "run.json"
        if self.accelerator.is_main_process:
            for chapter in chapters:
                if noted_of(self.output_dir, chapter):
                    noted = json.loads(path.read_text(encoding="utf-8"))
                    noted[chapter].pop("finished_at", None)
                    write_json(path, noted)
        self.accelerator.wait_for_everyone()

    def forget(self, chapter: str) -> None:
        """Forget a chapter that the config no longer asks for: its checkpoints, and that results come from it."""
        path = self.output_dir / "run.json"
        if self.accelerator.is_main_process and noted_of(self.output_dir, chapter):
            noted = json.loads(path.read_text(encoding="utf-8"))
            del noted[chapter]
            noted.get(self.stage, {}).pop("finished_at", None)
            write_json(path, noted)
            CheckpointFolder(self.checkpoints.folder, chapter, 1).clear()
        self.accelerator.wait_for_everyone()

    def claim(self) -> None:
        """Keep other runs of this stage out of the folder until the process ends."""
        if self.accelerator.is_main_process:
            claim(self.output_dir, self.stage)

    def restore_scaler(self) -> None:
        """Restore fp16's loss scale from the checkpoint."""
        if self.state and self.state["scaler"]:
            self.accelerator.scaler.load_state_dict(self.state["scaler"])

    def start_tracking(self, training_images: int, validation_images: int, model: str) -> Tracker:
        """Save the config, say what is about to happen, and start the progress bar and the trackers.

        Args:
            training_images: in the training set.
            validation_images: held out.
            model: what is trained, e.g. "U-Net of 3.20 million parameters".
        """
        config = self.config
        if self.accelerator.is_main_process:
            save_config(self._asked, self._saved_config)
            epochs = config.max_train_steps * self.images_per_step / training_images
            resumed = f", resumed from step {self.first_step}" if self.first_step else ""
            self.logger.info(
                "%s, %d steps of %d images (%.1f epochs)%s",
                model, config.max_train_steps, self.images_per_step, epochs, resumed,
            )  # fmt: skip
        self.state = None  # everything has been restored; it is as large as the model and its optimizer
        self.tracker = Tracker(
            self.accelerator,
            self.output_dir,
            self.stage,
            config,
            self.first_step,
            config.max_train_steps,
            self.images_per_step,
            training_images,
            validation_images,
            self._data,
        )
        return self.tracker

    @property
    def logger(self) -> logging.Logger:
        """The script's logger."""
        return logging.getLogger(f"train_{self.stage}")

    # ------------------------------------------------------------------------------------------------- the loop

    def steps(self) -> Iterator[int]:
        """The optimizer steps that are left. From the first one on, a signal stops the run at the end of a step."""
        self._signal = self._signal or StopSignal()
        self._first_step_began = time.time()
        for step in itertools.count(self.first_step):
            if step >= self.config.max_train_steps:  # which `_correct` may change
                return
            yield step

    def advance(self) -> None:
        """Count an optimizer step that is done."""
        self.tracker.advance()
        self.step += 1

    @property
    def steps_at_most(self) -> int:
        """A bound on the number of steps, for what supplies their batches."""
        return self.config.max_train_steps if self._plan is None or self.origin else ENDLESS

    @property
    def first_planned(self) -> int:
        """The number of steps without the corrections of train_minutes; a resumed run has the same."""
        corrected = self._first_planned is not None and not self.origin
        return self._first_planned if corrected else self.config.max_train_steps

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.config.max_train_steps

    def is_due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last step."""
        return self.step % every == 0 or self.is_last

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint; call it in every process.

        A run with train_minutes first corrects its length. The checkpoint holds it, so that a resumed run has the same.
        After that, it stays: the time of the earlier steps is not known.

        Args:
            state: what the stage needs to resume, with whole tensors in the main process.
        """
        due = self.step % self.config.checkpointing_steps == 0  # and not because a signal stops the run
        if self._plan is not None and due and not self.is_last and not self.origin:
            self._correct()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            counted = {"step": self.step, "images_per_step": self.images_per_step}
            counted["train_batch_size"] = self.config.train_batch_size
            scale = {"scaler": scaler.state_dict() if scaler is not None else {}}
            scale |= {ORIGIN: self.origin} if self.origin else {}
            if self._first_planned is not None:
                scale[PLANNED_STEPS] = [self._first_planned, self.config.max_train_steps]
            self.checkpoints.save(self.step, counted | state | scale)
        self.accelerator.wait_for_everyone()

    def publishes_best(self, after: int = 0) -> bool:
        """Whether hub_strategy "best" publishes now: this validation is the best one after step `after`.

        The results of further chapters are published at their end.
        """
        by_validation = self.config.push_to_hub and self.config.hub_strategy == "best" and not self.origin
        return by_validation and is_best(self.output_dir, self.stage, self.step, after=after)

    def publishes_checkpoint(self, after: int = 0) -> bool:
        """Whether hub_strategy "checkpoint" publishes now; the last step is published by `finish`."""
        by_checkpoint = self.config.push_to_hub and self.config.hub_strategy == "checkpoint" and not self.origin
        return by_checkpoint and not self.is_last and self.step > after

    def publish(self) -> None:
        """Publish what has been exported, in the background."""
        if self.publisher is not None:
            self.publisher.push(f"{NAMES[self.stage]} after {self.step} steps")

    # --------------------------------------------------------------------------------------------------- ending

    def should_stop(self) -> bool:
        """Whether to stop for a signal; false after the last step. Call it after every step, in every process."""
        return self._signal.should_stop() and not self.is_last

    def stop(self, state: dict[str, Any]) -> int:
        """Save a checkpoint and end early; returns the exit status that belongs to the signal."""
        self.save(state)
        self.tracker.close()
        if self.publisher is not None:
            self.publisher.finish(wait=False)
        self.logger.info("stopped at step %d; run the same command again to resume", self.step)
        return self._signal.exit_status

    def note_finished(self) -> None:
        """Note in run.json that all steps are done and the result is exported."""
        facts: dict[str, Any] = {ORIGIN: self.origin} if self.origin else {}
        if not self.first_step:  # what an interrupted run took is not known
            facts["seconds"] = round(time.time() - _process_began(), 1)
        self.tracker.finish(**facts)

    def finish(self, result: str, from_chapter: bool = False) -> int:
        """Publish the exported result and end; returns exit status 0.

        Args:
            result: name of the folder in output_dir that holds the result.
            from_chapter: it comes from a further chapter, which hub_strategy "best" has not published.
        """
        if from_chapter or self.config.hub_strategy != "best":
            self.publish()
        if self.accelerator.is_main_process:
            self.logger.info("the %s is in %s", result, self.output_dir / result)
            self.note_finished()
        if self.publisher is not None:
            self.publisher.finish()
        self.accelerator.wait_for_everyone()
        return 0


def _process_began() -> float:
    """When this process was started, in seconds since the epoch."""
    return psutil.Process().create_time()
