"""Publishing: a run's folder as a repository of the Hub, filled in the background, whatever the Hub does meanwhile.

What is to be published is first laid out in a folder of its own (`lay_out`), so that training can go on and change
everything else. A thread uploads it. A Hub that is slow, answers 5xx or 429 or goes away is tried again, a newer state
takes the place of one that still waits, and no failure reaches the training.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from latent_ddpm.card import make_card, merge_cards, read_facts
from latent_ddpm.curves import draw_curves
from latent_ddpm.errors import UserError
from latent_ddpm.private import Scrubber

logger = logging.getLogger(__name__)

WAITS = (2, 5, 15, 30, 60)  # seconds between attempts; the last for all that follow
LAST_ATTEMPTS = 4  # of what is still waiting when training has ended
REFUSALS = (400, 401, 402, 403)  # trying again does not help against these

# what of a run is published beside the pipeline; the last of several by name
PICTURES = {
    "samples.png": ("samples/final/grid.png", "samples/unet-*.png"),
    "reconstructions.png": ("samples/autoencoder-*.png",),
    "film_strip.webp": ("samples/final/film_strip.webp",),
    "film_strip.png": ("samples/final/film_strip.png",),
    "neighbours.png": ("evaluation-pipeline-neighbours.png",),
}
TEXTS = ("train_autoencoder.yaml", "train_unet.yaml", "metrics.jsonl", "run.json")
TEXTS += ("evaluation-autoencoder.json", "evaluation-pipeline.json", "evaluation-digits.json")


def check_can_publish(repo_id: str | None) -> None:
    """Refuse, before anything is trained, what could never be published.

    Raises:
        UserError: the name is not one of a repository, or there is no token at all.
    """
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(f"hub_model_id {repo_id!r} cannot be a repository: {error}") from error
    if not get_token():
        raise UserError(
            "push_to_hub needs a token that may write: run `hf auth login` once, or set HF_TOKEN. Train without "
            "push_to_hub, and publish afterwards with scripts/push_to_hub.py, if you have none yet."
        )


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy where the disk has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def lay_out(output_dir: Path, folder: Path, scrubber: Scrubber) -> None:
    """Fill `folder` with all that is published of a run, but for the card, which needs the repository's name.

    Args:
        output_dir: the run. Its pipeline is published if it has one, else its autoencoder, as `vqvae/`.
        folder: an empty one.
        scrubber: takes private paths out of texts.

    Raises:
        UserError: the run has neither.
    """
    pipeline, autoencoder = output_dir / "pipeline", output_dir / "autoencoder"
    if (pipeline / "model_index.json").exists():
        source, prefix = pipeline, Path()
    elif (autoencoder / "config.json").exists():
        source, prefix = autoencoder, Path("vqvae")
    else:
        raise UserError(f"{output_dir} holds neither a pipeline nor an autoencoder to publish.")
    for path in sorted(source.rglob("*")):
        name = prefix / path.relative_to(source)
        if path.is_dir() or name == Path("README.md"):
            continue
        if path.suffix == ".json":
            scrubber.copy(path, folder / name)
        else:
            _link(path, folder / name)
    for name, patterns in PICTURES.items():
        found = [path for pattern in patterns for path in sorted(output_dir.glob(pattern))[-1:]]
        if found:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found[0], folder / name)
    for name in TEXTS:
        if (output_dir / name).exists():
            scrubber.copy(output_dir / name, folder / name)


def write_card(folder: Path, repo_id: str, license: str | None, theirs: str | None = None) -> None:
    """Add curves and card to what was laid out; `theirs` is the card that stands in the repository."""
    if (folder / "metrics.jsonl").exists():
        draw_curves({"": folder / "metrics.jsonl"}, folder / "curves.png")
    (folder / "README.md").write_text(merge_cards(make_card(read_facts(folder), repo_id, license), theirs))


# what hub_strategy "best" goes by, and whether more of it is better
BEST_BY = {"autoencoder": ("validation_psnr", 1), "unet": ("validation_loss", -1)}


def is_best(output_dir: Path, stage: str) -> bool:
    """Whether the newest validation in metrics.jsonl is better than all before it."""
    key, sign = BEST_BY[stage]
    records = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    values = [sign * record[key] for record in records if record["stage"] == stage and key in record]
    return bool(values) and all(value < values[-1] for value in values[:-1])


def _response(error: BaseException | None) -> Any:
    """The Hub's answer behind an error, or behind the one that caused it; None where none came."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _status(error: Exception) -> int | None:
    return getattr(_response(error), "status_code", None)


def _wait(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: what the Hub asks for, at most five minutes, or ever longer."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return min(300.0, float(_response(error).headers.get("Retry-After")))
    return WAITS[min(attempt, len(WAITS)) - 1]


class Publisher:
    """Uploads states of a run to a repository, in a thread, the newest first; its methods never raise.

    Args:
        output_dir: the run's folder.
        repo_id: "user/name" or "name"; unset takes the name of the run's folder.
        private: whether a repository that is made here is private; None leaves that to the account's settings.
        license: stands in the card's head; None leaves that line out.
        say: shows a sentence to the user.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.output_dir, self.private, self.license = Path(output_dir), private, license
        self.repo_id = repo_id or re.sub(r"[^\w.-]+", "-", self.output_dir.resolve().name).strip("-.")
        self.token = get_token()
        self.scrubber = Scrubber(self.output_dir, secrets=[self.token] if self.token else [])
        self.say = lambda sentence: say(sentence.replace(self.token, "***") if self.token else sentence)
        self.api = HfApi(token=self.token)
        self.made = False
        self.waiting: tuple[Path, str] | None = None
        self.unpublished: str | None = None  # the message of the newest state that is not on the Hub
        self.ending = False
        self.changed = threading.Condition()
        self.folder = self.output_dir / "hub"
        shutil.rmtree(self.folder, ignore_errors=True)  # what a killed run left
        self.count = 0
        disable_progress_bars()
        self.thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self.thread.start()

    def push(self, message: str) -> None:
        """Publish the run's folder as it is now; returns when that is laid out, long before it is uploaded."""
        self.count += 1
        folder = self.folder / str(self.count)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            lay_out(self.output_dir, folder, self.scrubber)
        except (OSError, UserError) as error:
            self.say(f"Nothing was laid out to be published: {error}")
            self.unpublished = message
            return
        with self.changed:
            overtaken, self.waiting, self.unpublished = self.waiting, (folder, message), message
            self.changed.notify_all()
        if overtaken:
            shutil.rmtree(overtaken[0], ignore_errors=True)

    def finish(self) -> bool:
        """Wait until all is published or has failed for good; returns whether it is, and says what is not."""
        with self.changed:
            self.ending = True
            self.changed.notify_all()
        self.thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.unpublished is None:
            return True
        name = f" --hub_model_id {self.repo_id}"
        self.say(
            f"NOT PUBLISHED: {self.unpublished!r}. Nothing is lost; publish it with\n\n"
            f"    python scripts/push_to_hub.py {self.output_dir}{name}\n"
        )
        return False

    # ------------------------------------------------------------------------------------- in the thread
    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.ending)
                if self.waiting is None:
                    return
                (folder, message), self.waiting = self.waiting, None
            self._publish(folder, message)
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path, message: str) -> None:
        """Attempt until it is there, is refused, is overtaken, or training has ended and it still fails."""
        attempt = attempts_after_end = 0
        while True:
            begun = time.monotonic()
            try:
                self._upload(folder, message)
            except Exception as error:  # whatever it is, training goes on
                self.made = False
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if _status(error) in REFUSALS or isinstance(error, (UserError, HFValidationError)):
                    self.say(f"The Hub refuses {message!r}: {reason}")
                    return
                attempt, attempts_after_end = attempt + 1, attempts_after_end + self.ending
                if attempts_after_end == LAST_ATTEMPTS:
                    self.say(f"The Hub cannot be reached for {message!r}: {reason}")
                    return
                wait = _wait(error, attempts_after_end or attempt)
                self.say(f"Publishing {message!r} failed ({reason}); once more in {wait:.0f} s.")
                with self.changed:
                    ending = self.ending
                    self.changed.wait_for(lambda: self.waiting or self.ending != ending, timeout=wait)  # noqa: B023
                    if self.waiting:
                        return
            else:
                with self.changed:
                    if self.unpublished == message and self.waiting is None:
                        self.unpublished = None
                self.say(f"Published {message!r} as {self.repo_id} in {time.monotonic() - begun:.0f} s.")
                return

    def _upload(self, folder: Path, message: str) -> None:
        if not self.made:
            url = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self.repo_id, self.made = url.repo_id, True
        write_card(folder, self.repo_id, self.license, self._their_card())
        self.api.upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message)

    def _their_card(self) -> str | None:
        """The card as it stands in the repository, which its owner may have edited; None where there is none."""
        try:
            path = self.api.hf_hub_download(
                self.repo_id, "README.md", local_dir=self.folder / "card", force_download=True
            )
        except HfHubHTTPError as error:
            if _status(error) == 404:
                return None
            raise
        return Path(path).read_text()
