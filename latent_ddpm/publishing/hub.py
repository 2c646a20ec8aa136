"""Upload a run to a repository of the Hub, in the background.

`lay_out` first copies everything that is published into a separate folder, so training can continue and change the
rest. A thread uploads that folder. It tries again when the Hub is slow, answers 5xx or 429, or cannot be reached. A
newer upload replaces one that is still waiting. No failure reaches the training.
"""

import contextlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id
from safetensors.torch import load_file, save_file

from latent_ddpm.config import RunConfig
from latent_ddpm.errors import UserError
from latent_ddpm.publishing.card import FEW_STEP_ENDING, make_card, merge_cards, read_facts
from latent_ddpm.publishing.curves import draw_curves
from latent_ddpm.publishing.private import Scrubber, is_place
from latent_ddpm.training.tracking import noted_of

logger = logging.getLogger(__name__)

WAITS = (2, 5, 15, 30, 60)  # seconds between attempts; the last one for all further attempts
LAST_ATTEMPTS = 4  # attempts after training has ended
LAST_SECONDS = 3600  # after training, an unfinished upload then counts as failed
ASKED = 20.0  # seconds for the Hub's answers before training
SILENCE = 120.0  # seconds without an answer until a request fails
REFUSALS = (400, 401, 402, 403)  # another attempt does not help
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}

FEW_STEPS = "few_steps"  # the chapter of stage 2 whose pipeline has a repository of its own
FEW_STEP_HUB = "hub-few-steps"  # where that is laid out, in the run's folder
TEXTS = ("train_autoencoder.yaml", "train_unet.yaml", "metrics.jsonl", "run.json", "data.json")


# what was measured, and its name in the repository; left out where the weights that it is about are newer
MEASURED = {
    "evaluation-autoencoder.json": "evaluation-autoencoder.json",
    "evaluation-pipeline.json": "evaluation-pipeline.json",
    "evaluation-pipeline-neighbours.png": "neighbours.png",
    "evaluation-digits.json": "evaluation-digits.json",
}
FEW_STEP_MEASURED = {
    "evaluation-autoencoder.json": "evaluation-autoencoder.json",
    "evaluation-few-steps.json": "evaluation-pipeline.json",
    "evaluation-few-steps-neighbours.png": "neighbours.png",
    "evaluation-few-steps-digits.json": "evaluation-digits.json",
}


def repo_id_of(output_dir: Path, repo_id: str | None) -> str:
    """The repository of a run: `repo_id`, or one named after the run's folder."""
    return repo_id or re.sub(r"[^A-Za-z0-9_-]+", "-", output_dir.resolve().name).strip("-")[:96]


def few_step_repo_id(output_dir: Path, repo_id: str | None) -> str:
    """The repository of a run's few-step pipeline."""
    return repo_id_of(output_dir, repo_id) + FEW_STEP_ENDING


def check_repo_id(output_dir: Path, repo_id: str | None) -> None:
    """Raises `UserError` if the name is not a valid repository name."""
    try:
        validate_repo_id(repo_id_of(output_dir, repo_id))
    except HFValidationError as error:
        shown = repr(repo_id) if repo_id else f"(unset, so that it is the name of {output_dir})"
        raise UserError(f"hub_model_id {shown} cannot be a repository: {error}") from error


def check_license(license: str | None) -> None:
    """Raises `UserError` if a license is not spelt like an identifier of the Hub's list."""
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        meant = re.sub(r"[^a-z0-9.]+", "-", license.lower()).strip("-")
        raise UserError(
            f"hub_license {license!r} is no identifier of the Hub's list, "
            f"huggingface.co/docs/hub/repositories-licenses" + (f"; did you mean {meant}?" if meant else ".")
        )


def refusal_of(account: dict[str, Any], repo_id: str) -> str | None:
    """Why a token may not write to a repository; None where nothing speaks against it.

    Args:
        account: answer of the Hub's whoami.
        repo_id: "owner/name".
    """
    token, user = account.get("auth", {}).get("accessToken") or {}, account.get("name", "")
    role, owner = token.get("role"), repo_id.partition("/")[0]
    if role == "read":
        return "the token may only read"
    if role == "fineGrained":
        scoped = token.get("fineGrained", {}).get("scoped") or []
        named = [scope for scope in scoped if scope.get("entity", {}).get("name") in (owner, repo_id)]
        allowed = {permission for scope in named for permission in scope.get("permissions", ())}
        return None if "repo.write" in allowed else f"the token has no permission to write to repositories of {owner}"
    if role == "write":
        roles = {org.get("name", "").lower(): org.get("roleInOrg") for org in account.get("orgs") or ()}
        if owner.lower() not in {user.lower(), *roles}:
            return f"the token is that of {user}, who is no member of {owner}"
        if roles.get(owner.lower()) == "read":
            return f"{user} may only read in {owner}"
    return None


def _ask_hub(repo_id: str, private: bool | None, license: str | None) -> None:
    """Raise UserError for what the Hub would refuse; other errors say that it cannot be asked."""
    api = HfApi(token=get_token())
    try:
        account = api.whoami()
    except HfHubHTTPError as error:
        if _status(error) not in (401, 403):
            raise
        raise UserError(
            "push_to_hub: the Hub does not accept the token. Make one that may write, and run `hf auth login` again."
        ) from error
    repo_id = repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"
    if refusal := refusal_of(account, repo_id):
        raise UserError(
            f"push_to_hub: {repo_id} cannot be written, because {refusal}. Use a token that may write there, or "
            f"another hub_model_id."
        )
    if private:
        try:
            if not api.model_info(repo_id).private:
                raise UserError(f"{repo_id} exists already and is public, and hub_private_repo asks for private.")
        except HfHubHTTPError as error:
            if _status(error) not in (401, 404):  # it is made later
                raise
    if license:
        try:
            ModelCard(f"---\nlicense: {license}\n---\n").validate()
        except ValueError as error:
            raise UserError(f"hub_license {license}: the Hub refuses it: {' '.join(str(error).split())}") from error


def check_hub(repo_id: str, private: bool | None, license: str | None) -> None:
    """Ask the Hub, for `ASKED` seconds, whether it will take the repository. Without an answer, training goes on.

    Raises:
        UserError: the token, the repository or the license will be refused.
    """
    answers: list[Exception | None] = []

    def ask() -> None:
        try:
            _ask_hub(repo_id, private, license)
            answers.append(None)
        except Exception as error:  # is raised or reported below
            answers.append(error)

    thread = threading.Thread(target=ask, name="ask the Hub", daemon=True)  # whose client may wait for ever
    thread.start()
    thread.join(ASKED)
    answer = answers[0] if answers else TimeoutError(f"no answer in {ASKED:.0f} s")
    if isinstance(answer, UserError):
        raise answer
    if answer is not None:
        logger.warning(
            "The Hub cannot be asked now whether %s can be published (%s). It will be tried later.",
            repo_id, _reason(answer),
        )  # fmt: skip


def check_can_publish(
    output_dir: Path, repo_id: str | None, private: bool | None = None, license: str | None = None
) -> None:
    """Check before training that the run can be published.

    Args:
        output_dir: the run's folder.
        repo_id: as for `Publisher`.
        private: as for `Publisher`.
        license: as for `Publisher`.

    Raises:
        UserError: the name is not one of a repository, the license is none, there is no token or it may not write
            there, a repository is public that shall be private, or the Hub is switched off.
    """
    check_repo_id(output_dir, repo_id)
    check_license(license)
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub cannot work with HF_HUB_OFFLINE set.")
    if not get_token():
        raise UserError(
            "push_to_hub needs a token that may write: run `hf auth login` once, or set HF_TOKEN. Train without "
            "push_to_hub, and publish afterwards with scripts/push_to_hub.py, if you have none yet."
        )
    if not int(os.environ.get("RANK", "0")):  # of several processes the first one publishes
        check_hub(repo_id_of(output_dir, repo_id), private, license)


def check_others_have_encoder(encoder: str) -> None:
    """Check that a text encoder that the pipeline only names is available to others.

    Raises:
        UserError: it is a local folder.
    """
    if is_place(encoder):
        raise UserError(
            f"export_text_encoder is false, but nobody else has the text_encoder {encoder}: a published pipeline "
            f"could not find it. Set export_text_encoder true, or name one of the Hub."
        )


def check_before_training(config: RunConfig) -> None:
    """Check before anything is loaded that a run with `push_to_hub` can publish its result.

    Raises:
        UserError: see `check_can_publish` and `check_others_have_encoder`.
    """
    if not config.push_to_hub:
        return
    private, output_dir = True if config.hub_private_repo else None, Path(config.output_dir)
    check_can_publish(output_dir, config.hub_model_id, private, config.hub_license)
    if getattr(config, "few_step_training_steps", 0) or getattr(config, "few_step_training_images", None):
        few = few_step_repo_id(output_dir, config.hub_model_id)
        check_can_publish(output_dir, few, private, config.hub_license)
    encoder = getattr(config, "text_encoder", None)
    if encoder is not None and not config.export_text_encoder:
        check_others_have_encoder(encoder)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, which is never changed in place; copy it where the disk does not support links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_variants(folder: Path, variants: Sequence[str]) -> None:
    """Write the weights in 16 bits beside the float32 files of a folder, with the names of diffusers' variants.

    A variant that cannot hold a weight is left out for all parts, with a warning.
    """
    for variant in variants:
        made: list[Path] = []
        for weights in sorted(folder.rglob(WEIGHTS)):
            whole = load_file(weights)
            tensors = {k: v.to(VARIANTS[variant]) if v.is_floating_point() else v for k, v in whole.items()}
            overflown = [name for name, tensor in tensors.items() if tensor.isinf().any()]
            if overflown:
                logger.warning(
                    "There will be no variant %s: the %s has weights too large for it (%s).",
                    variant, weights.parent.name, overflown[0],
                )  # fmt: skip
                for path in made:
                    path.unlink()
                break
            made.append(weights.with_name(f"{weights.stem}.{variant}.safetensors"))
            save_file(tensors, made[-1], {"format": "pt"})


def pictures_of(output_dir: Path, stage: str | None) -> dict[str, tuple[str, ...]]:
    """What of a run is published beside the pipeline: by name the first pattern that fits, and its last file."""
    reconstructions = {"reconstructions.png": ("samples/autoencoder-*.png",)}
    if stage == FEW_STEPS:
        return {"samples.png": ("samples/few_steps-[0-9]*.png",), **reconstructions}
    chapter = "self_guidance" if noted_of(output_dir, "self_guidance") else "unet"
    return {
        "samples.png": ("samples/final/grid.png", f"samples/{chapter}-[0-9]*.png"),
        **reconstructions,
        "film_strip.png": ("samples/final/film_strip.png", "samples/film_strip.png"),
    }


def lay_out(
    output_dir: Path,
    folder: Path,
    scrubber: Scrubber,
    stage: str | None = None,
    variants: Sequence[str] = (),
    checkpoints: bool = False,
) -> None:
    """Fill `folder` with everything that is published of a run except the card, which needs the repository's name.

    Args:
        output_dir: the run.
        folder: an empty one.
        scrubber: takes private paths out of texts.
        stage: "unet" publishes the pipeline, "few_steps" the few-step pipeline, "autoencoder" stage 1's result as
            `vqvae/`; None what is there, the pipeline first.
        variants: "fp16", "bf16": weights added in these.
        checkpoints: whether to add what another machine needs to resume: the newest checkpoint of each stage and
            chapter, the autoencoder of stage 1, and the snapshots of the averages.

    Raises:
        UserError: it is not there, or names a text encoder of this disk.
    """
    few = stage == FEW_STEPS
    pipeline, autoencoder = output_dir / ("pipeline-few-steps" if few else "pipeline"), output_dir / "autoencoder"
    if stage != "autoencoder" and (pipeline / "model_index.json").exists():
        source, prefix = pipeline, Path()
        named = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8")).get("text_encoder_id")
        if named is not None:
            check_others_have_encoder(named)
    elif stage not in ("unet", FEW_STEPS) and (autoencoder / "config.json").exists():
        source, prefix = autoencoder, Path("vqvae")
    else:
        raise UserError(f"{output_dir} holds neither a pipeline nor an autoencoder to publish.")
    for path in sorted(source.rglob("*")):
        name = prefix / path.relative_to(source)
        if path.is_dir() or name == Path("README.md"):
            continue
        if path.suffix == ".json":
            scrubber.copy_model_config(path, folder / name)
        else:
            _link(path, folder / name)
    _write_variants(folder, variants)
    if checkpoints:
        newest = {path.name.rpartition("-")[0]: path for path in sorted((output_dir / "checkpoints").glob("[a-z]*-*"))}
        if stage == "unet":  # which needs the result of stage 1, and not its checkpoint
            newest.pop("autoencoder", None)
        for part in (*newest.values(), output_dir / "autoencoder", output_dir / "ema"):
            for path in part.glob("*"):
                _link(path, folder / path.relative_to(output_dir))
    made = {part: max((p.stat().st_mtime for p in part.rglob(WEIGHTS)), default=0.0)
            for part in (pipeline, autoencoder)}  # fmt: skip
    for name, patterns in pictures_of(output_dir, stage).items():
        found = [path for pattern in patterns for path in sorted(output_dir.glob(pattern))[-1:]]
        # samples drawn by hand from earlier weights are of another model
        found = [path for path in found if "final" not in path.parts or path.stat().st_mtime >= made[pipeline]]
        if found:
            shutil.copyfile(found[0], folder / name)
    for name in TEXTS:
        if (output_dir / name).exists():
            scrubber.copy(output_dir / name, folder / name)
    for name, published in (FEW_STEP_MEASURED if few else MEASURED).items():
        path, part = output_dir / name, autoencoder if "autoencoder" in name else pipeline
        if not path.exists() or (prefix != Path() and part == pipeline):
            continue
        if path.stat().st_mtime < made[part]:
            logger.warning("%s was measured before the %s was last written; it is not published.", path, part.name)
        elif path.suffix == ".png":
            shutil.copyfile(path, folder / published)
        else:
            scrubber.copy(path, folder / published)


def write_card(folder: Path, repo_id: str, license: str | None, theirs: str | None = None) -> None:
    """Add curves and card to the folder; `theirs` is the present card of the repository."""
    if (folder / "metrics.jsonl").exists():
        draw_curves({"": folder / "metrics.jsonl"}, folder / "curves.png")
    (folder / "README.md").write_text(
        merge_cards(make_card(read_facts(folder), repo_id, license), theirs), encoding="utf-8"
    )


def _response(error: BaseException | None) -> Any:
    """The Hub's response of an error or of its cause; None without one."""
    while error is not None:
        if getattr(error, "response", None) is not None:
            return error.response
        error = error.__cause__
    return None


def _status(error: Exception) -> int | None:
    return getattr(_response(error), "status_code", None)


def _reason(error: BaseException) -> str:
    """An error and its causes in one line."""
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"{said} <- {_reason(error.__cause__)}" if error.__cause__ is not None else said


def _wait(error: Exception, attempt: int) -> float:
    """Seconds until the next attempt: the Hub's Retry-After, at most five minutes, or a growing pause."""
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        return min(300.0, float(_response(error).headers.get("Retry-After")))
    return WAITS[min(attempt, len(WAITS)) - 1]


class Publisher:
    """Uploads the results of a run in a thread; a newer result replaces a waiting one. Its methods never raise.

    Args:
        output_dir: the run's folder.
        repo_id: "user/name" or "name", of the run; unset takes the name of the run's folder. With stage "few_steps" the
            repository has this name with "-few-steps".
        private: whether a repository that is made here is private; None leaves that to the account's settings.
        license: stands in the card's head; None leaves that line out.
        variants: of the weights, besides float32: "fp16", "bf16".
        stage: as for `lay_out`.
        say: shows a sentence to the user.
        checkpoints: as for `lay_out`.
    """

    def __init__(
        self,
        output_dir: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        variants: Sequence[str] = (),
        stage: str | None = None,
        say: Callable[[str], None] = logger.info,
        checkpoints: bool = False,
    ) -> None:
        self.checkpoints = checkpoints
        self.output_dir, self.private, self.license = Path(output_dir), private, license
        self.variants, self.stage = variants, stage
        self.run_repo_id = repo_id_of(self.output_dir, repo_id)
        few = stage == FEW_STEPS
        self.repo_id = few_step_repo_id(self.output_dir, repo_id) if few else self.run_repo_id
        self.token = get_token()
        self.scrubber = Scrubber(self.output_dir, secrets=[self.token] if self.token else [])
        self.say = lambda sentence: say(sentence.replace(self.token, "***") if self.token else sentence)
        self.api = HfApi(token=self.token)
        self.made = False
        self.waiting: tuple[Path, str] | None = None
        self.unpublished: tuple[Path, str] | None = None  # the newest state that is not on the Hub
        self.ending = False
        self.changed = threading.Condition()
        self.folder = self.output_dir / (FEW_STEP_HUB if few else "hub") / str(os.getpid())
        self.count = 0
        disable_progress_bars()
        self.thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        self.thread.start()

    def push(self, message: str, laid_out: Path | None = None) -> None:
        """Publish the present results; returns when they are copied, before the upload.

        Args:
            message: of the commit.
            laid_out: a folder that an earlier push laid out and could not publish.
        """
        self.count += 1
        folder = self.folder / str(self.count)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            if laid_out is None:
                lay_out(self.output_dir, folder, self.scrubber, self.stage, self.variants, self.checkpoints)
            else:
                shutil.copytree(laid_out, folder)
        except Exception as error:  # a full disk, weights that fit no variant: training goes on
            self.say(f"{message!r} could not be laid out to be published: {_reason(error)}")
            with self.changed:
                self.unpublished = (folder, message)
            return
        with self.changed:
            overtaken, self.waiting = self.waiting, (folder, message)
            self.unpublished = self.waiting
            self.changed.notify_all()
        if overtaken:
            shutil.rmtree(overtaken[0], ignore_errors=True)

    def finish(self, wait: bool = True) -> bool:
        """Wait until everything is published or has finally failed; reports failures and returns whether all succeeded.

        Args:
            wait: False only says it: for a run that was told to stop. So does a Ctrl-C meanwhile.
        """
        if wait:
            if threading.current_thread() is threading.main_thread():  # training no longer waits for a good moment
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with self.changed:
                self.ending = True
                self.changed.notify_all()
            with contextlib.suppress(KeyboardInterrupt):
                self.thread.join(LAST_SECONDS)
        with self.changed:
            left = self.unpublished
        if left is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            for older in self.folder.parent.glob("*"):  # of a run that was killed, or could not publish
                if not (older.name.isdigit() and psutil.pid_exists(int(older.name))):
                    shutil.rmtree(older, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()
            return True
        folder, message = left
        words = ["python", "scripts/push_to_hub.py", self.output_dir, "--hub_model_id", self.run_repo_id]
        words += ["--hub_private_repo"] if self.private else []
        words += ["--hub_license", self.license] if self.license else []
        words += ["--hub_variants", *self.variants] if self.variants else []
        words += ["--push_checkpoints"] if self.checkpoints else []
        words += ["--laid_out", folder] if folder.is_dir() else []
        self.say(f"NOT PUBLISHED: {message!r}. Nothing is lost; publish it with\n\n    {shlex.join(map(str, words))}\n")
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
            with self.changed:
                keep = self.unpublished is not None and self.unpublished[0] == folder
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, folder: Path, message: str) -> None:
        """Try until the upload succeeds, is refused or replaced, or fails after training has ended."""
        attempt = attempts_after_end = 0
        while True:
            begun = time.monotonic()
            try:
                self._upload(folder, message)
            except Exception as error:  # whatever it is, training goes on
                self.made = False
                if _status(error) in REFUSALS or isinstance(error, (UserError, HFValidationError)):
                    self.say(f"The Hub refuses {message!r}: {_reason(error)}")
                    return
                attempt, attempts_after_end = attempt + 1, attempts_after_end + self.ending
                if attempts_after_end == LAST_ATTEMPTS:
                    self.say(f"The Hub cannot be reached for {message!r}: {_reason(error)}")
                    return
                wait = _wait(error, attempts_after_end or attempt)
                self.say(f"Publishing {message!r} failed ({_reason(error)}); once more in {wait:.0f} s.")
                with self.changed:
                    ending = self.ending
                    self.changed.wait_for(lambda: self.waiting or self.ending != ending, timeout=wait)  # noqa: B023
                    if self.waiting:
                        return
            else:
                with self.changed:
                    if self.unpublished is not None and self.unpublished[0] == folder:
                        self.unpublished = None
                self.say(f"Published {message!r} as {self.repo_id} in {time.monotonic() - begun:.0f} s.")
                return

    def _upload(self, folder: Path, message: str) -> None:
        get_session().timeout = SILENCE  # the client's own waits for ever
        if not self.made:
            self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.private and not self.api.model_info(self.repo_id).private:
                raise UserError(f"{self.repo_id} exists already and is public, and hub_private_repo asks for private.")
            self.made = True
        try:
            write_card(folder, self.repo_id, self.license, self._their_card())
        except (HfHubHTTPError, OSError):
            raise
        except Exception as error:  # a card that its owner has made unreadable for us is left as it is
            self.say(f"The card of {self.repo_id} stays as it is: {_reason(error)}")
            (folder / "README.md").unlink(missing_ok=True)
        stale = [f"*.{variant}.safetensors" for variant in VARIANTS]  # variants that this upload does not have
        stale += ["checkpoints/*"] if self.checkpoints else []
        self.api.upload_folder(repo_id=self.repo_id, folder_path=folder, commit_message=message, delete_patterns=stale)

    def _their_card(self) -> str | None:
        """The card in the repository, which its owner may have edited; None without one."""
        place = self.folder / "card"
        try:
            path = self.api.hf_hub_download(self.repo_id, "README.md", local_dir=place, force_download=True)
        except HfHubHTTPError as error:
            if _status(error) == 404:
                return None
            raise
        return Path(path).read_text(encoding="utf-8")


def make_publisher(
    config: RunConfig, accelerator: Accelerator, stage: str, say: Callable[[str], None]
) -> Publisher | None:
    """The publisher of a run with push_to_hub, in its main process; None otherwise."""
    if not (config.push_to_hub and accelerator.is_main_process):
        return None
    private = True if config.hub_private_repo else None
    output_dir, variants = Path(config.output_dir), config.hub_variants
    checkpoints = config.push_checkpoints and stage != FEW_STEPS
    return Publisher(output_dir, config.hub_model_id, private, config.hub_license, variants, stage, say, checkpoints)
