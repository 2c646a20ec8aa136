"""scripts/demo.py: its functions, and the page itself in a headless browser where there is one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from diffusers import UniPCMultistepScheduler
from hub_server import TOKEN, USER, HubServer
from PIL import Image
from small_pipeline import save_pipeline

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("demo_script", ROOT / "scripts" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("demo") / "pipeline")


@pytest.fixture(scope="module")
def demo(script, pipeline_folder):
    return script.Demo(str(pipeline_folder))


def test_the_grid_follows_from_the_seed_and_the_scheduler_is_put_back(script, demo):
    first, other = demo.grid(0, 4, "as published", 2), demo.grid(1, 4, "as published", 2)
    assert first.size == other.size and first != other
    for name in demo.schedulers[1:]:
        assert demo.grid(0, 4, name, 2).size == first.size
    assert demo.grid(0, 4, "as published", 2) == first
    # the first image is the same in a grid of another size
    a, b = (np.asarray(demo.draw(script.normal(demo.pipeline, 0, count), "as published", 2)[0]) for count in (1, 4))
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_between_two_seeds_lie_both_ends(script, demo):
    first, last = script.normal(demo.pipeline, 3, 1), script.normal(demo.pipeline, 4, 1)
    assert torch.allclose(script.between(first, last, 0.0), first, atol=1e-5)
    assert torch.allclose(script.between(first, last, 1.0), last, atol=1e-5)
    middle = script.between(first, last, 0.5)
    assert 0.8 < float(middle.std() / first.std()) < 1.2
    single, strip = demo.interpolate(3, 4, 0.5, "as published", 2)
    assert strip.width > single.width


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_the_film_ends_with_the_images(script, demo, steps):
    frames = min(steps, script.FILM_FRAMES)
    assert demo.film(0, "as published", steps).width >= (frames + 1) * 16


def test_an_image_of_ones_own_in_any_mode(demo):
    for mode in ("RGB", "L", "RGBA", "P", "1"):
        made = demo.reconstruct(Image.new(mode, (40, 25)))
        assert made.width > made.height


def test_a_flow_offers_what_can_sample_it(script, tmp_path):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    demo = script.Demo(str(save_pipeline(tmp_path / "flow", scheduler)))
    assert "DDIM" not in demo.schedulers
    for name in demo.schedulers:
        assert demo.grid(0, 1, name, 2).size[0] > 8


def test_it_is_published_as_a_space(tmp_path, pipeline_folder):
    with HubServer(tmp_path / "server") as hub:
        words = [sys.executable, "scripts/demo.py", f"{USER}/digits", "--push_to_hub", f"{USER}/digits-demo"]
        env = {**environment(), **hub.environment(tmp_path / "home")}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        space = f"{USER}/digits-demo"
        assert hub.content(space, "app.py") == (ROOT / "scripts" / "demo.py").read_bytes()
        assert b"sdk: gradio" in hub.content(space, "README.md")
        assert hub.content(space, "model_id.txt").decode() == f"{USER}/digits"
        assert TOKEN not in done.stdout + done.stderr
        # it starts as a Space does: these files alone, app.py without arguments
        folder = tmp_path / "space"
        folder.mkdir()
        for path in hub.repos[space].files:
            (folder / path).write_bytes(hub.content(space, path))
    (folder / "model_id.txt").write_text(str(pipeline_folder))
    with page_of([sys.executable, "app.py"], folder, {"PYTHONPATH": ""}) as url:
        assert url.startswith("http://127.0.0.1")


class page_of:
    """The address of a demo in a process of its own, while the block lasts."""

    def __init__(self, words, folder, settings):
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            words, cwd=folder, env=env | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self):
        said, deadline = "", time.monotonic() + 300
        while time.monotonic() < deadline and (line := self.process.stdout.readline()):
            said += line
            if match := re.search(r"http://[\w.]+:\d+", line):
                return match[0]
        self.process.kill()
        raise AssertionError(said)

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium")
def test_a_click_draws_another_grid(pipeline_folder, tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync"]
    words = [sys.executable, "scripts/demo.py", os.environ.get("DEMO_PIPELINE", str(pipeline_folder))]
    with page_of(words, ROOT, {}) as url, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.goto(url)
        sources = []
        for seed in ("0", "7"):
            page.fill("#seed input", seed)
            page.click("#draw")
            page.wait_for_function(
                "known => { const i = document.querySelector('#grid img');"
                " return i && i.complete && i.naturalWidth > 8 && !known.includes(i.src); }",
                arg=sources, timeout=120_000,
            )  # fmt: skip
            sources.append(page.get_attribute("#grid img", "src"))
        assert len(set(sources)) == 2
        page.wait_for_timeout(2000)  # what is new fades in
        page.screenshot(path=os.environ.get("DEMO_SCREENSHOT", str(tmp_path / "page.png")))
        browser.close()
