"""The code of the README, the pages of docs/, the model card and an export's README runs as pasted.

Every Python block runs by itself, in a folder where the names that it uses are there: USER/NAME, outputs/NAME,
photo.png and so on, with tiny untrained networks. Every command is parsed by its own parser; those of `RUN` run.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import re
import shutil
import sys
import warnings
from pathlib import Path
from unittest.mock import MagicMock

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from small_pipeline import make, small_autoencoder, small_text
from test_docs import FOLDERS, PAGES, STAGES, commands, parts, refusal

from latent_ddpm.config import UNetConfig, parse_config
from latent_ddpm.publishing.export import export_pipeline
from latent_ddpm.publishing.hub import lay_out, write_card
from latent_ddpm.publishing.private import Scrubber

# Scripts that run here, with the arguments of the page.
RUN = ("scripts/convert_pipeline.py", "scripts/plot_run.py", "scripts/sample.py")
# Why a command is parsed but does not run here. The first pattern that fits the script, or the command's first word.
NOT_RUN = {
    r"train_\w+\.py": "trains; tests/test_end_to_end.py runs both stages",
    r"scripts/(cache\w+|evaluate|inspect\w+|reconstruct_ema|show\w+)\.py": "needs a run and its images; see tests/",
    r"scripts/plan_run\.py": "measures training steps; tests/scripts/test_plan_run.py runs it",
    r"scripts/push_to_hub\.py": "uploads; tests/publishing/test_hub.py runs it against a Hub on loopback",
    r"scripts/demo\.py": "opens a page, or uploads; tests/scripts/test_demo.py runs it",
    r"scripts/benchmark_gpu\.py": "needs a GPU",
    r"tests/\w+\.py": "a test",
    r"benchmarks/\w+\.py": "measures for minutes to hours",
    r"scripts/slurm/.*": "needs Slurm",
    "make": "installs; the Makefile's targets are checked by tests/test_docs.py",
    "pip|source|git|cd|rm": "changes the environment",
    "hf": "talks to the Hub",
}
# Python blocks that cannot run here, by their first line, with the reason.
PYTHON_NOT_RUN: dict[str, str] = {}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    diffusers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


def export(pipe, folder):
    conditions = dict(pipe.parameters)
    if pipe.text_encoder is not None:
        conditions |= {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    conditions = {key: value for key, value in conditions.items() if value is not None}
    export_pipeline(folder, pipe.vqvae, pipe.unet, pipe.scheduler, 2, **conditions)


def publish(run, folder, variants=()):
    """What of a run would be on the Hub, as a folder of the repository's name."""
    shutil.rmtree(folder, ignore_errors=True)
    lay_out(run, folder, Scrubber(run), variants=variants)
    write_card(folder, "USER/NAME", None)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders to paste code in, by what the models there are conditioned on."""
    text = small_text(tmp_path_factory.mktemp("words"))
    names = ["frog", "ship", *"23456789"]
    made = {"": make(""), "kl": make("", kl=True), "class map text": make("class map text", text, class_names=names)}
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    places = {}
    for kind, pipe in made.items():
        place = places[kind] = tmp_path_factory.mktemp("place")
        run = place / "outputs" / "NAME"
        export(pipe, run / "pipeline")
        pipe.vqvae.save_pretrained(run / "autoencoder")
        for copied in ("ema/pipeline-0.2-step-1000", "pipeline-few-steps"):
            shutil.copytree(run / "pipeline", run / copied)
        (run / "metrics.jsonl").write_text('{"stage": "unet", "step": 1, "images": 8, "time": 1, "loss": 1.0}\n')
        for name in ("mnist", "mnist_class", "image_folder_64", "auto", "decoder", "a", "b"):
            (place / "outputs" / name).symlink_to(run)
        publish(run, place / "USER" / "NAME", ["fp16", "bf16"])
        shutil.copytree(place / "USER" / "NAME", place / "COPY")
        for name in ("photo.png", "digit.png", "hole.png"):
            Image.fromarray(pixels).save(place / name)
        for name in ("map.png", "a.png"):
            Image.fromarray(pixels[..., 0] % 2).save(place / name)
    return places


def run_python(blocks, place, monkeypatch):
    """Run each block by itself in a folder; the names that the last one leaves."""
    monkeypatch.chdir(place)
    left = {}
    for block in blocks:
        if block.splitlines()[0] not in PYTHON_NOT_RUN:
            left = {"__name__": "pasted"}
            exec(compile(block, "the pasted block", "exec"), left)
    return left


def python_of(text):
    return [block.text for block in parts(text)[1] if block.language == "python"]


def place_of(page):
    return "class map text" if page.name == "conditioning.md" else ""


# ------------------------------------------------------------------------------------------------ Python


@pytest.mark.parametrize(
    "page", [page for page in PAGES if python_of(page.read_text())], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_python_of_a_page(page, places, monkeypatch):
    run_python(python_of(page.read_text()), places[place_of(page)], monkeypatch)


@pytest.mark.parametrize("kind", ["", "kl", "class map text"])
def test_python_of_the_model_card(kind, places, monkeypatch):
    place = places[kind]
    blocks = python_of((place / "USER" / "NAME" / "README.md").read_text())
    assert len(blocks) == (3 if kind == "class map text" else 4)
    (place / "sample.png").unlink(missing_ok=True)
    run_python(blocks[:1], place, monkeypatch)
    assert Image.open(place / "sample.png").size == (16, 16)
    words = {"class_labels": ["frog"], "prompt": "a fish"} if kind == "class map text" else {}
    for block in blocks[1:]:
        pipe = run_python([block], place, monkeypatch)["pipeline"]
        assert type(pipe).__name__ == "LatentDDPMPipeline"
        pipe(num_inference_steps=2, **words)
        wanted = re.search(r"torch\.(b?float16)", block)
        assert pipe.unet.dtype == getattr(torch, wanted[1] if wanted else "float32")
        assert ("variant=" in block) == bool(wanted)


@pytest.mark.parametrize("kl", [False, True])
def test_python_of_the_card_of_an_autoencoder(kl, tmp_path, monkeypatch):
    small_autoencoder(kl).save_pretrained(tmp_path / "run" / "autoencoder")
    publish(tmp_path / "run", tmp_path / "USER" / "NAME")
    (block,) = python_of((tmp_path / "USER" / "NAME" / "README.md").read_text())
    autoencoder = run_python([block], tmp_path, monkeypatch)["autoencoder"]
    assert type(autoencoder).__name__ == ("AutoencoderKL" if kl else "VQModel")


@pytest.mark.parametrize("kind", ["", "kl", "class map text"])
def test_python_of_the_readme_of_an_export(kind, places, monkeypatch):
    folder = places[kind] / "outputs" / "NAME" / "pipeline"
    shutil.copy(places[kind] / "map.png", folder)
    blocks = python_of((folder / "README.md").read_text())
    run_python(blocks, folder, monkeypatch)
    assert len(blocks) == 1 and (folder / "sample.png").exists()


# ------------------------------------------------------------------------------------------------ commands


class Parsed(Exception):
    """Raised by the parsers in place of what the script would do with their result."""


@functools.cache
def module_of(script):
    sys.path.insert(0, str((ROOT / script).parent))
    optional = {name: MagicMock() for name in ("gradio",) if not importlib.util.find_spec(name)}
    sys.modules.update(optional)
    try:
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
        for name in optional:
            del sys.modules[name]
    return module


def call(script, words, monkeypatch):
    """The script's main, with these words."""
    main = module_of(script).main
    monkeypatch.setattr(sys, "argv", [script, *words])
    return main(words) if inspect.signature(main).parameters else main()


def problem_of(script, words, monkeypatch):
    """What the script's own parser says against the words; None if nothing."""
    parse, parse_known = argparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        with monkeypatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
            parse(self, args, namespace)
        raise Parsed

    def stop_with_rest(self, args=None, namespace=None):
        with monkeypatch.context() as inner:
            inner.setattr(argparse.ArgumentParser, "parse_args", parse)
            inner.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
            _, rest = self.parse_known_args(args, namespace)
            if rest:
                parse_config(UNetConfig, rest)
        raise Parsed

    def stop_with_config(config_class, rest):
        parse_config(config_class, rest)
        raise Parsed

    said, module = io.StringIO(), module_of(script)
    with monkeypatch.context() as patched, contextlib.redirect_stderr(said), pytest.raises((Parsed, SystemExit)) as end:
        if hasattr(module, "parse_config"):
            patched.setattr(module, "parse_config", stop_with_config)
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(argparse.ArgumentParser, "parse_known_args", stop_with_rest)
        call(script, words, monkeypatch)
    return None if end.type is Parsed else said.getvalue() or repr(end.value)


def launcher_problem(words):
    """What accelerate's or torchrun's own parser says against a command that begins with it; None if nothing."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser as parser
    elif words[0] == "torchrun":
        from torch.distributed.run import get_args_parser as parser
    else:
        return None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser().parse_args(words[2:] if words[0] == "accelerate" else words[1:])
    except SystemExit:
        return said.getvalue()
    return None


def commands_of(page):
    """Words of each command of a page, its placeholders filled in; of a script also its name and the words for it."""
    for block in parts(page.read_text())[1]:
        if block.language != "shell":
            continue
        for words in commands(block.text):
            while re.match(r"\w+=", words[0]):  # variables before a command
                words = words[1:]
            words = [word.replace("configs/NAME.yaml", "configs/mnist.yaml") for word in words]
            place = next((i for i, word in enumerate(words)
                          if re.fullmatch(rf"(({FOLDERS})/)?[\w/-]+\.(py|sbatch)", word)), None)  # fmt: skip
            yield words, None if place is None else words[place], words if place is None else words[place + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_a_page(page, places, monkeypatch):
    place = places[place_of(page)]
    monkeypatch.chdir(ROOT)
    problems = []
    for words, script, given in commands_of(page):
        line = " ".join(words)
        if problem := launcher_problem(words):
            problems.append(f"{line}: {problem}")
        is_ours = re.fullmatch(r"(scripts|benchmarks)/\w+\.py", script or "")
        if script in STAGES:
            if "..." not in given and "--config" in given and (problem := refusal(script, tuple(given))):
                problems.append(f"{line}: {problem}")
        elif is_ours and (problem := problem_of(script, given, monkeypatch)):
            problems.append(f"{line}: {problem}")
        if script in RUN:
            monkeypatch.chdir(place)
            assert not call(script, given, monkeypatch), line
            monkeypatch.chdir(ROOT)
        elif not any(re.fullmatch(pattern, script or words[0]) for pattern in NOT_RUN):
            problems.append(f"{line}: neither RUN nor NOT_RUN knows it")
    assert problems == []
