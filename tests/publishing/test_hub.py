"""Publishing, with the real client and real processes, against a Hub on loopback that fails on order."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_tensors,
    checkpoint_tensors,
    command,
    environment,
    finished_script,
    launch,
    losses,
    run_script,
)
from hub_server import TOKEN, USER, Drop, HubServer, Slow, Status
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from latent_ddpm.errors import UserError
from latent_ddpm.publishing import hub as hub_module
from latent_ddpm.publishing.hub import check_license, refusal_of
from latent_ddpm.training.metrics import is_best

NAME = f"{USER}/tiny"
STEPS = {"max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 6}

SAMPLE = """
import sys, numpy, torch, diffusers
name, path, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
pipeline = diffusers.DiffusionPipeline.from_pretrained(name, **options)
assert not any(module.startswith("latent_ddpm") for module in sys.modules)
images = pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np")
numpy.save(path, images.images)
print(type(pipeline).__name__)
"""

AGAIN = """
import re, sys, torch
from pathlib import Path
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
name, other = sys.argv[1:]
card = ModelCard.load(name)
card.validate()
exec(re.search(r"```python\\n(.*?)```", card.text, re.DOTALL)[1])
pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
pipeline.save_pretrained(Path("again"), push_to_hub=True, repo_id=other)
images = []
for words in ({}, {"custom_pipeline": other, "trust_remote_code": True}):
    again = DiffusionPipeline.from_pretrained(other, **words)
    print(type(pipeline).__name__ if not images else "", type(again).__name__)
    images.append(again(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images)
assert abs(images[0] - images[1]).max() < 1e-5
assert not [module for module in sys.modules if module.startswith(("latent_ddpm", "pipeline_latent_ddpm"))]
"""


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "server") as server:
        yield server


@pytest.fixture(scope="module")
def stage_1(photos, tmp_path_factory):
    """An autoencoder, and the same run's U-Net, trained without a Hub."""
    home = tmp_path_factory.mktemp("home")  # a folder whose path nobody shall see
    output_dir = home / "runs" / "tiny"
    flags = {"train_data_dir": photos, "resolution": 16}
    launch("train_autoencoder.py", output_dir, **STEPS, **flags)
    launch("train_unet.py", home / "quiet", autoencoder=output_dir / "autoencoder", **STEPS, **flags)
    return home, output_dir, flags


def with_hub(hub, home, words, expect=0, **settings):
    done = finished_script(words, {**environment(), **hub.environment(home / "cache"), **settings})
    assert done.returncode == expect, done.stderr[-4000:]
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout + done.stderr


def publish(hub, home, run, *words, **options):
    return with_hub(hub, home, [sys.executable, "scripts/push_to_hub.py", str(run), *map(str, words)], **options)


def sample(hub, tmp_path, name, code=0, **options):
    """What a stranger's process with empty caches and nothing but diffusers draws; returns images and class."""
    path = tmp_path / f"images-{len(list(tmp_path.glob('images-*')))}.npy"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "0"}
    env |= hub.environment(path.with_suffix(".cache"), token=None) if hub else {}
    words = [sys.executable, "-P", "-c", SAMPLE, str(name), str(path), repr(options)]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert (done.returncode != 0) == bool(code), done.stderr[-3000:]
    return (None, done.stderr) if code else (np.load(path), done.stdout.strip())


@pytest.fixture(scope="module")
def published(stage_1, tmp_path_factory):
    """Stage 2 trained with --push_to_hub, every checkpoint of it pushed while the Hub misbehaves."""
    home, stage_1_dir, flags = stage_1
    output_dir = home / "runs" / "faulty"
    with HubServer(tmp_path_factory.mktemp("server")) as hub:
        hub.fail("POST /api/repos/create", Status(500), Status(429, {"Retry-After": "1"}))
        hub.fail("PUT /lfs/", Drop(4000), Status(500), Status(503))
        hub.fail("POST /api/models/.*/commit/", Drop(100), Slow(2))
        hub.fail("POST .*/preupload/", Status(502))
        words = command("train_unet.py", output_dir, push_to_hub="true", hub_model_id=NAME, hub_license="apache-2.0",
                        hub_strategy="checkpoint", hub_token=TOKEN, report_to="tensorboard",
                        autoencoder=stage_1_dir / "autoencoder", **STEPS, **flags)  # fmt: skip
        text = with_hub(hub, home, words, HF_TOKEN="")
        yield hub, home, output_dir, text


def test_faults_change_nothing_that_is_trained_and_all_is_published(published):
    hub, home, output_dir, text = published
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 6), checkpoint_tensors(home / "quiet", "unet", 6))
    assert hub.faults == []
    assert "failed (" in text and "Published 'U-Net after 6 steps' as tester/tiny" in text
    assert "NOT PUBLISHED" not in text
    files = hub.repos[NAME].files
    expected = "model_index.json pipeline.py README.md samples.png film_strip.png curves.png metrics.jsonl run.json "
    expected += "data.json train_unet.yaml unet/diffusion_pytorch_model.safetensors vqvae/config.json"
    assert set(expected.split()) <= set(files)
    for path in ("unet", "vqvae"):
        name = f"{path}/diffusion_pytorch_model.safetensors"
        assert hub.content(NAME, name) == (output_dir / "pipeline" / name).read_bytes()
    assert not (output_dir / "hub").exists()


@pytest.fixture(scope="module")
def drawn(published, tmp_path_factory):
    """What the folder draws that was published."""
    images, kind = sample(None, tmp_path_factory.mktemp("drawn"), published[2] / "pipeline")
    assert kind == "LDMPipeline"
    return images


def test_the_name_alone_loads_it_in_stock_diffusers_and_draws_the_same(published, drawn, tmp_path):
    hub, _, _, _ = published
    images, kind = sample(hub, tmp_path, NAME)
    assert kind == "LDMPipeline" and np.array_equal(images, drawn)
    _, error = sample(hub, tmp_path, NAME, code=1, custom_pipeline=NAME)
    assert "trust_remote_code" in error


def test_the_cards_code_runs_as_pasted_and_its_pipeline_is_published_again(published, tmp_path):
    """In a process that knows diffusers only."""
    hub, _, _, _ = published
    words = [sys.executable, "-P", "-c", AGAIN, NAME, f"{USER}/again"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= hub.environment(tmp_path / "again.cache")
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["LatentDDPMPipeline", "LDMPipeline", "LatentDDPMPipeline"]
    assert hub.content(f"{USER}/again", "pipeline.py") == (ROOT / "pipeline_latent_ddpm.py").read_bytes()
    assert (tmp_path / "sample.png").exists() and "POST /api/validate-yaml" in hub.requests


def test_nothing_private_and_no_pickle_is_published_or_kept(published, photos):
    hub, home, output_dir, _ = published
    private = [TOKEN, str(home), str(photos), str(ROOT)]
    for path in hub.repos[NAME].files:
        content = hub.content(NAME, path)
        assert not [word for word in private if word.encode() in content], path
        assert not path.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    for path in output_dir.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def test_without_an_evaluation_the_card_has_the_figures_of_training(published):
    """What scripts/evaluate.py has not measured, the last validation has."""
    hub, _, output_dir, _ = published
    card = ModelCard(hub.content(NAME, "README.md").decode())
    (result,) = card.data.eval_results
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert result.metric_value == [line["validation_loss"] for line in lines if "validation_loss" in line][-1]
    held_out = json.loads((output_dir / "run.json").read_text())["unet"]["validation_images"]
    assert f"{held_out} held-out images, measured in training" in result.metric_name
    assert result.dataset_split == "held-out" and held_out > 0


def test_the_owners_edits_survive_and_the_run_is_published_again(published, tmp_path):
    hub, home, output_dir, _ = published
    card = hub.content(NAME, "README.md").decode()
    assert "license: apache-2.0" in card and f'from_pretrained("{NAME}")' in card
    edited = card.replace("license: apache-2.0", "license: mit").replace("## Use", "I am proud of this.\n\n## Use")
    hub.write(NAME, "README.md", edited.replace("# tiny", "# Tiny\n\nMy own words.", 1).encode())
    hub.write(NAME, "mine.txt", b"untouched")
    text = publish(hub, home, output_dir, "--hub_model_id", NAME, "--hub_license", "apache-2.0")
    assert "Published" in text
    again = hub.content(NAME, "README.md").decode()
    assert "My own words." in again and "I am proud of this." in again and "license: mit" in again
    assert hub.content(NAME, "mine.txt") == b"untouched"


def test_a_hub_that_is_gone_costs_nothing_but_a_command(hub, stage_1, tmp_path, monkeypatch):
    home, stage_1_dir, flags = stage_1
    hub.gone = True
    output_dir = home / "runs" / "alone"
    words = command("train_unet.py", output_dir, push_to_hub="true", hub_model_id=NAME, hub_private_repo="true",
                    hub_license="mit", autoencoder=stage_1_dir / "autoencoder", **STEPS, **flags)  # fmt: skip
    text = with_hub(hub, home, words)
    assert_same_tensors(checkpoint_tensors(output_dir, "unet", 6), checkpoint_tensors(home / "quiet", "unet", 6))
    assert "NOT PUBLISHED" in text and "The Hub cannot be asked now whether tester/tiny can be published" in text
    (said,) = re.findall(r"python scripts/push_to_hub\.py .*", text)
    assert "--laid_out" in said and "--hub_private_repo --hub_license mit" in said
    hub.gone = False
    with_hub(hub, home, [sys.executable, *said.split()[1:]])
    assert hub.repos[NAME].private and not (output_dir / "hub").exists()
    assert {"model_index.json", "unet/config.json", "README.md"} <= set(hub.repos[NAME].files)


def test_a_token_that_is_refused_later_is_said_and_training_goes_on(hub, stage_1):
    home, stage_1_dir, flags = stage_1
    output_dir = home / "runs" / "refused"
    hub.fail("POST /api/repos/create", *[Status(401)] * 9)
    words = command("train_unet.py", output_dir, push_to_hub="true", hub_strategy="checkpoint",
                    autoencoder=stage_1_dir / "autoencoder", **STEPS, **flags)  # fmt: skip
    text = with_hub(hub, home, words)
    assert "The Hub refuses" in text and "401" in text and "NOT PUBLISHED" in text
    assert (output_dir / "pipeline" / "model_index.json").exists()


def test_a_public_repository_is_not_filled_with_what_shall_be_private(hub, stage_1):
    home, stage_1_dir, _ = stage_1
    publish(hub, home, stage_1_dir)
    before = dict(hub.repos[NAME].files)
    text = publish(hub, home, stage_1_dir, "--hub_private_repo", expect=2)
    assert "exists already and is public" in text and hub.repos[NAME].files == before


def test_a_card_that_cannot_be_read_stays_as_it_is(hub, stage_1):
    home, stage_1_dir, _ = stage_1
    publish(hub, home, stage_1_dir)
    hub.write(NAME, "README.md", b"---\nlicense: [mit\n---\nMine.")
    assert "stays as it is" in publish(hub, home, stage_1_dir, "--hub_variants", "fp16")
    assert hub.content(NAME, "README.md").endswith(b"Mine.")
    assert "vqvae/diffusion_pytorch_model.fp16.safetensors" in hub.repos[NAME].files
    publish(hub, home, stage_1_dir)
    assert "vqvae/diffusion_pytorch_model.fp16.safetensors" not in hub.repos[NAME].files


def test_stage_1_alone(hub, stage_1, tmp_path):
    home, stage_1_dir, _ = stage_1
    publish(hub, home, stage_1_dir, "--hub_private_repo")
    repo = hub.repos[NAME]
    assert repo.private and "vqvae/config.json" in repo.files and "model_index.json" not in repo.files
    card = hub.content(NAME, "README.md").decode()
    assert 'VQModel.from_pretrained("tester/tiny", subfolder="vqvae")' in card
    kinds = {result.metric_type for result in ModelCard(card).data.eval_results}
    assert kinds == {"psnr", "ssim", "codebook_usage", "perplexity"}
    config = hub.content(NAME, "train_autoencoder.yaml").decode()
    assert "train_data_dir: IMAGES" in config and "output_dir: RUN" in config


def test_best_publishes_what_was_never_better(hub, stage_1):
    home, _, flags = stage_1
    output_dir = home / "runs" / "best"
    words = command("train_autoencoder.py", output_dir, push_to_hub="true", hub_model_id=NAME, hub_strategy="best",
                    **STEPS | {"max_train_steps": 8, "validation_steps": 1}, **flags)  # fmt: skip
    with_hub(hub, home, words)
    psnr = losses(output_dir, "autoencoder", "validation_psnr")
    best = max(psnr, key=psnr.get)
    records = [step for step in psnr if all(psnr[step] > psnr[before] for before in psnr if before < step)]
    messages = hub.repos[NAME].messages
    assert messages[-1] == f"Autoencoder after {best} steps"
    assert {int(message.split()[2]) for message in messages} <= set(records) != set(psnr) or best == 8


def test_what_could_never_be_published_is_refused_before_training(stage_1, tmp_path):
    home, stage_1_dir, flags = stage_1
    options = {"autoencoder": stage_1_dir / "autoencoder", "push_to_hub": "true", **STEPS, **flags}
    words = command("train_unet.py", tmp_path / "out", hub_model_id="a/b/c", **options)
    env = {**environment(), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = finished_script(words, env)
    assert done.returncode == 2 and "cannot be a repository" in done.stderr
    words = command("train_unet.py", tmp_path / "out", **options)
    done = finished_script(words, env | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and "HF_HUB_OFFLINE" in done.stderr
    done = finished_script(words, env | {"HF_TOKEN": ""})
    assert done.returncode == 2 and "hf auth login" in done.stderr
    config = tmp_path / "config.yaml"
    config.write_text(f"dataset_name: embedded:mnist\nhub_token: {TOKEN}\n")
    done = finished_script([sys.executable, "train_unet.py", "--config", str(config)])
    assert done.returncode == 2 and "holds a hub_token" in done.stderr and TOKEN not in done.stderr


def test_what_the_hub_will_refuse_is_said_before_images_are_opened(hub, tmp_path):
    words = command("train_unet.py", tmp_path / "out", push_to_hub="true", train_data_dir=ROOT, hub_license="mit-0")
    text = with_hub(hub, tmp_path, words, expect=2, HF_TOKEN="hf_anotherOne")
    assert "error: push_to_hub: the Hub does not accept the token" in text and "hf_anotherOne" not in text
    assert "error: hub_license mit-0: the Hub refuses it" in with_hub(hub, tmp_path, words, expect=2)
    assert hub.repos == {}


WRITE = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "club", "roleInOrg": "read"}],
         "auth": {"accessToken": {"role": "write"}}}  # fmt: skip
SCOPES = [{"entity": {"name": "me"}, "permissions": ["repo.content.read"]},
          {"entity": {"name": "lab"}, "permissions": ["repo.write", "repo.content.read"]},
          {"entity": {"name": "me/one"}, "permissions": ["repo.write"]}]  # fmt: skip


@pytest.mark.parametrize(
    ("token", "repo_id", "refusal"),
    [
        ({"role": "write"}, "me/x", None),
        ({"role": "write"}, "Me/x", None),
        ({"role": "write"}, "lab/x", None),
        ({"role": "write"}, "club/x", "me may only read in club"),
        ({"role": "write"}, "you/x", "that of me, who is no member of you"),
        ({"role": "read"}, "me/x", "may only read"),
        ({"role": "fineGrained", "fineGrained": {"scoped": SCOPES}}, "me/x", "no permission to write to .* of me"),
        ({"role": "fineGrained", "fineGrained": {"scoped": SCOPES}}, "me/one", None),
        ({"role": "fineGrained", "fineGrained": {"scoped": SCOPES}}, "lab/x", None),
        ({"role": "fineGrained"}, "lab/x", "no permission"),
        (None, "you/x", None),  # not the token of a user, so nothing is known
    ],
)
def test_what_a_token_may_write(token, repo_id, refusal):
    found = refusal_of(WRITE | {"auth": {"accessToken": token}}, repo_id)
    assert (found is None) if refusal is None else re.search(refusal, found)


@pytest.mark.parametrize(
    ("license", "meant"), [("MIT", "mit"), ("Apache 2.0", "apache-2.0"), ("cc by/4.0", "cc-by-4.0"), ("", "")]
)
def test_how_a_license_is_spelt(license, meant):
    check_license(None)
    check_license("apache-2.0")
    with pytest.raises(UserError, match=f"is no identifier of the Hub's list.*{meant}"):
        check_license(license)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr(hub_module, "ASKED", 0.1)
    monkeypatch.setattr(hub_module, "_ask_hub", lambda *_: time.sleep(5))
    begun = time.monotonic()
    hub_module.check_hub("me/x", None, None)
    assert time.monotonic() - begun < 4 and "The Hub cannot be asked now whether me/x" in caplog.text


def test_a_variant_that_cannot_hold_the_weights_is_left_out(tmp_path, caplog):
    for part, largest in (("unet", 1.0), ("vqvae", 1e5)):
        (tmp_path / part).mkdir()
        save_file({"w": torch.tensor([largest])}, tmp_path / part / hub_module.WEIGHTS)
    hub_module._write_variants(tmp_path, ["fp16", "bf16"])
    found = {path.parent.name for path in tmp_path.rglob("*.bf16.safetensors")}
    assert found == {"unet", "vqvae"} and not list(tmp_path.rglob("*.fp16.safetensors"))
    assert "no variant fp16: the vqvae has weights too large for it (w)" in caplog.text


def test_half_the_size(published, drawn, tmp_path):
    hub, home, output_dir, _ = published
    publish(hub, home, output_dir, "--hub_model_id", f"{USER}/half", "--hub_variants", "fp16", "bf16")
    name = f"{USER}/half"
    whole, half = (
        len(hub.content(name, f"unet/diffusion_pytorch_model{variant}.safetensors")) for variant in ("", ".fp16")
    )
    assert half < 0.6 * whole
    images, kind = sample(hub, tmp_path, name, variant="fp16")
    assert kind == "LDMPipeline" and 0 < np.abs(images - drawn).mean() < 0.05
    card = hub.content(name, "README.md").decode()
    assert 'variant="bf16", torch_dtype=torch.bfloat16' in card and 'variant="fp16"' in card


def test_a_dry_run_refuses_what_is_no_name_of_a_repository(tmp_path):
    words = [tmp_path, "--dry_run", tmp_path / "there", "--hub_model_id", "me/o 1/x"]
    done = run_script("push_to_hub.py", *words, expect=2)
    assert "'me/o 1/x' cannot be a repository" in done.stderr


def test_a_dry_run_writes_what_would_be_published(stage_1, tmp_path):
    home, stage_1_dir, _ = stage_1
    run_script("push_to_hub.py", stage_1_dir, "--dry_run", tmp_path / "there")
    assert (tmp_path / "there" / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    noted = json.loads((tmp_path / "there" / "run.json").read_text())
    assert noted["autoencoder"]["training_images"] == 46


def test_what_was_better_before_the_codes_entered_does_not_count(tmp_path):
    """A plain autoencoder reconstructs better than any with codes, and could not be published as one."""
    psnr = {2: 30.0, 4: 31.0, 6: 20.0, 8: 21.0, 10: 20.5}
    for step, value in psnr.items():
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": "autoencoder", "step": step, "validation_psnr": value}) + "\n")
        assert is_best(tmp_path, "autoencoder", step, after=4) == (step in (6, 8))
    assert not is_best(tmp_path, "autoencoder", 10)


# ------------------------------------------------------------------------------------ both pipelines of the chapters
FEW = f"{NAME}-few-steps"
CHAPTERS = {"self_guidance_steps": 2, "few_step_training_steps": 2, "few_step_counts": "[1,3]", "ema_snapshots": 3}


@pytest.fixture(scope="module")
def both(stage_1, tmp_path_factory):
    """A run of all chapters, published by --push_to_hub while the Hub misbehaves."""
    home, stage_1_dir, flags = stage_1
    output_dir = home / "runs" / "chapters"
    with HubServer(tmp_path_factory.mktemp("server")) as hub:
        hub.fail(f"POST /api/models/{FEW}/commit/", Drop(100), Status(500))
        words = command("train_unet.py", output_dir, push_to_hub="true", hub_model_id=NAME, hub_strategy="best",
                        autoencoder=stage_1_dir / "autoencoder", **STEPS, **CHAPTERS, **flags)  # fmt: skip
        text = with_hub(hub, home, words)
        yield hub, home, output_dir, text


def test_both_pipelines_are_published_and_load_in_stock_diffusers(both, tmp_path):
    hub, _, output_dir, text = both
    assert hub.faults == [] and "NOT PUBLISHED" not in text and set(hub.repos) == {NAME, FEW}
    assert hub.repos[NAME].messages[-1] == "U-Net after 6 steps"
    assert hub.repos[FEW].messages == ["U-Net for few steps after 2 steps"]
    weights = "unet/diffusion_pytorch_model.safetensors"
    for name, folder in ((NAME, "pipeline"), (FEW, "pipeline-few-steps")):
        assert hub.content(name, weights) == (output_dir / folder / weights).read_bytes()
        images, kind = sample(hub, tmp_path, name)
        assert kind == "LDMPipeline" and np.array_equal(images, sample(None, tmp_path, output_dir / folder)[0])
    pictures = {name: hub.content(name, "samples.png") for name in (NAME, FEW)}
    drawn = {name: (output_dir / "samples" / f"{name}-00000002.png").read_bytes()
             for name in ("self_guidance", "few_steps")}  # fmt: skip
    assert pictures == {NAME: drawn["self_guidance"], FEW: drawn["few_steps"]}
    assert not list(output_dir.glob("hub*"))


def test_their_cards_name_each_other_and_the_chapters(both):
    hub = both[0]
    of_pipeline, of_few = (hub.content(name, "README.md").decode() for name in (NAME, FEW))
    assert "The weights hold autoguidance of scale 2 away from their average after 2 steps" in of_pipeline
    assert f"[{FEW}](https://huggingface.co/{FEW}) draws in 1 or 3 steps." in of_pipeline
    assert f"distilled from [{NAME}](https://huggingface.co/{NAME})" in of_few
    assert "The first step was learned by distribution matching" in of_few and "later ones on the path" in of_few
    assert "It is made for 1 or 3 steps" in of_few and "num_inference_steps=3" in of_few
    assert f'from_pretrained("{FEW}")' in of_few and "Few steps**: 2 steps" in of_few
    assert "Guidance in the weights**: 2 steps" in of_pipeline and "Diffusion loss" not in of_pipeline + of_few


def test_a_finished_run_is_published_as_two_with_what_was_measured(both, tmp_path):
    hub, home, output_dir, _ = both
    setting = {"scheduler": "DPMSolverMultistepScheduler", "feature_extractor": "efficientnet-lite0", "samples": 50}
    result = {"command": "python x", "settings": [{**setting, "steps": 1, "fd": 2.5}, {**setting, "steps": 3, "fd": 1}]}
    (output_dir / "evaluation-few-steps.json").write_text(json.dumps(result))
    dry = [sys.executable, "scripts/push_to_hub.py", str(output_dir), "--dry_run", str(tmp_path / "there")]
    text = with_hub(hub, home, dry)
    assert f"published as USER/chapters: {tmp_path / 'there'}" in text and (tmp_path / "there-few-steps").is_dir()
    noted = json.loads((output_dir / "run.json").read_text())
    unfinished = {**noted, "few_steps": {k: v for k, v in noted["few_steps"].items() if k != "finished_at"}}
    (output_dir / "run.json").write_text(json.dumps(unfinished))
    text = with_hub(hub, home, [*dry[:-1], str(tmp_path / "other")])
    assert "pipeline-few-steps is not published: its training is not finished" in text
    assert (tmp_path / "other").is_dir() and not (tmp_path / "other-few-steps").exists()
    (output_dir / "run.json").write_text(json.dumps(noted))
    publish(hub, home, output_dir, "--hub_model_id", NAME)
    card = hub.content(FEW, "README.md").decode()
    assert "50 samples, DPMSolverMultistepScheduler, 1 step) | 2.50 |" in card and "3 steps) | 1.00 |" in card
    assert "| 2.50 |" not in hub.content(NAME, "README.md").decode()
    assert hub.repos[FEW].messages[-1] == hub.repos[NAME].messages[-1] == "Publish a run of latent-ddpm"
    text = publish(hub, home, output_dir, "--hub_model_id", NAME, HF_TOKEN="hf_anotherOne", expect=2)
    assert "does not accept the token" in text


@pytest.mark.long
def test_the_second_repository_is_checked_before_training_as_well(hub, stage_1, tmp_path):
    home, stage_1_dir, _ = stage_1
    publish(hub, home, stage_1_dir, "--hub_model_id", FEW)  # public
    words = command("train_unet.py", tmp_path / "out", push_to_hub="true", hub_model_id=NAME, hub_private_repo="true",
                    train_data_dir=ROOT, few_step_training_steps=2)  # fmt: skip
    text = with_hub(hub, home, words, expect=2)
    assert f"error: {FEW} exists already and is public" in text and set(hub.repos) == {FEW}


def test_a_few_step_pipeline_that_was_not_published_is_said_with_its_command(hub, both, tmp_path):
    _, home, output_dir, _ = both
    hub.fail(f"POST /api/models/{FEW}/commit/", Status(403))
    text = publish(hub, home, output_dir, "--hub_model_id", NAME, expect=1)
    assert "The Hub refuses" in text and f"--hub_model_id {NAME} --laid_out" in text
    words = text.partition("publish it with\n\n")[2].split()[2:]
    publish(hub, home, *words)
    assert hub.repos[FEW].messages == ["Publish a run of latent-ddpm"] == hub.repos[NAME].messages
    assert not list(output_dir.glob("hub*"))


def test_another_machine_goes_on_where_the_first_one_stopped(stage_1, hub, tmp_path):
    """Both stages, killed after a push, resume elsewhere from the repository alone, bit for bit."""
    home, stage_1_dir, flags = stage_1
    name = f"{USER}/spot"
    push = {"push_to_hub": "true", "push_checkpoints": "true", "hub_model_id": name, "hub_strategy": "checkpoint"}
    half = {**STEPS, "max_train_steps": 4}
    for script, stage, reference in (
        ("train_autoencoder.py", "autoencoder", stage_1_dir),
        ("train_unet.py", "unet", home / "quiet"),
    ):
        first, second = tmp_path / f"first-{stage}", tmp_path / f"second-{stage}"
        if stage == "unet":
            shutil.copytree(stage_1_dir / "autoencoder", first / "autoencoder")
        with_hub(hub, tmp_path, command(script, first, **push, **half, **flags))
        kept = [path for path in hub.repos[name].files if path.startswith("checkpoints/")]
        assert {path.split("/")[1] for path in kept} == {f"{stage}-00000004"}
        words = command(script, second, resume_from_checkpoint=name, **STEPS, **flags)
        text = with_hub(hub, tmp_path / "elsewhere", words)
        assert f"resuming from {stage}-00000004 of {name}" in text
        assert_same_tensors(checkpoint_tensors(second, stage, 6), checkpoint_tensors(reference, stage, 6))
        before = len(hub.requests)
        text = with_hub(hub, tmp_path / "elsewhere", words)  # it is its own run now, and finished
        assert "all 6 steps are done" in text and len(hub.requests) == before
        assert sorted(losses(second, stage)) == [1, 2, 3, 4, 5, 6]
    published = hub.content(name, "run.json").decode() + hub.content(name, "train_unet.yaml").decode()
    assert str(tmp_path) not in published and str(home) not in published


def test_what_cannot_be_resumed_from_the_hub(stage_1, hub, tmp_path):
    _, stage_1_dir, flags = stage_1
    publish(hub, tmp_path, stage_1_dir, "--hub_model_id", f"{USER}/plain", "--hub_license", "mit")
    for name, what in (
        (f"{USER}/plain", "holds no checkpoint of train_autoencoder.py"),
        (f"{USER}/nothing", "neither a folder here nor a repository"),
    ):
        words = command("train_autoencoder.py", tmp_path / "out", resume_from_checkpoint=name, **STEPS, **flags)
        text = with_hub(hub, tmp_path, words, expect=2)
        assert what in text and "Traceback" not in text
    words = command("train_autoencoder.py", tmp_path / "out", push_checkpoints="true", **STEPS, **flags)
    assert "push_checkpoints needs push_to_hub" in with_hub(hub, tmp_path, words, expect=2)
