"""The notebook runs from top to bottom, shows its pictures, and is committed with small, clean outputs.

    OMP_NUM_THREADS=2 python tests/test_notebook.py

runs it in full, and writes its outputs into it and the last picture into docs/results/notebook/.
"""

import base64
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from latent_ddpm.config import AutoencoderConfig, UNetConfig, parse_config

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "latent_diffusion_step_by_step.ipynb"
SAMPLES = ROOT / "docs" / "results" / "notebook" / "samples.png"
MAX_BYTES = 1_500_000
CHANGED = {  # keys whose values differ from configs/mnist.yaml on purpose
    *("output_dir", "max_train_steps", "quantizer", "num_vq_embeddings"),
    *("beta_schedule", "beta_start", "beta_end"),
    *("disc_weight", "disc_start", "disc_adaptive_steps", "disc_channels", "disc_layers", "ema_sigma_rels"),
    *("validation_steps", "checkpointing_steps"),  # the notebook has neither
    *("self_guidance_steps", "self_guidance_scale", "self_guidance_interval"),  # nor this chapter
}


def execute(notebook, folder, **variables):
    """Run a notebook in `folder` with this repository's library; returns it with its outputs.

    Raises:
        CellExecutionError: a cell failed.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}
    env.pop("MPLBACKEND", None)  # the kernel's own shows the figures
    client = NotebookClient(
        notebook, timeout=3600, kernel_name="python3", record_timing=False, resources={"metadata": {"path": folder}}
    )
    client.execute(env=env)
    return notebook


def tidy(notebook):
    """Keep of the outputs only texts and PNG files, and of the metadata only what does not change from run to run."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        outputs = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and outputs and outputs[-1].output_type == "stream":
                outputs[-1].text += output.text
                continue
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": output.data["image/png"]}
                output.metadata = {}
            outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    return nbformat.writes(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def shows_picture(cell):
    """Whether a cell's source ends in a figure or a grid of images."""
    return re.search(r"^(plt\.show\(\)|make_grid\(.*|reconstruction_grid\(.*|sheet)\Z", cell.source, re.M) is not None


def pictures(cell):
    return [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook).values():
        cell.outputs, cell.execution_count = [], None
    words = "import dataclasses, json\nprint(json.dumps([dataclasses.asdict(c) for c in (config_1, config_2)]))"
    notebook.cells.append(new_code_cell(words, id="configs"))
    folder = str(tmp_path_factory.mktemp("notebook"))
    return execute(notebook, folder, NOTEBOOK_STEPS_1="20", NOTEBOOK_STEPS_2="12", OMP_NUM_THREADS="1")


def test_every_cell_runs_and_every_picture_is_there(executed):
    cells = code_cells(executed)
    for name, cell in cells.items():
        assert cell.execution_count is not None, name
        assert [o for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"] == [], name
        assert bool(pictures(cell)) == shows_picture(cell), name
    assert sum(map(shows_picture, cells.values())) >= 14


def test_the_settings_are_those_of_the_quickstart(executed):
    printed = json.loads(code_cells(executed)["configs"].outputs[0].text)
    for values, config_class in zip(printed, (AutoencoderConfig, UNetConfig), strict=True):
        quickstart = vars(parse_config(config_class, ["--config", str(ROOT / "configs" / "mnist.yaml")]))
        assert {key for key in values if values[key] != quickstart[key]} <= CHANGED


def test_the_committed_outputs_are_complete_and_small(committed):
    text = NOTEBOOK.read_text()
    assert len(text) < MAX_BYTES
    assert text == tidy(committed)
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert bool(pictures(cell)) == shows_picture(cell), name
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", name
            said = output.get("text", "") + "".join(map(str, output.get("data", {}).values()))
            places = ("/home/", "/tmp/", f"{ROOT}/", f"{Path.home()}/", "it/s", "s/it")  # and no progress bars
            assert "image" in said or not any(place in said for place in places), name
    assert base64.b64decode(pictures(cells["export"])[-1])[:4] == b"\x89PNG"


def test_a_cell_that_fails_fails_the_run(tmp_path):
    notebook = new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("raise ValueError('as it should')")])
    with pytest.raises(CellExecutionError, match="as it should"):
        execute(notebook, str(tmp_path))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(nbformat.read(NOTEBOOK, as_version=4), folder)
        SAMPLES.parent.mkdir(parents=True, exist_ok=True)
        SAMPLES.write_bytes((Path(folder) / "outputs" / "notebook" / "samples.png").read_bytes())
    NOTEBOOK.write_text(tidy(notebook))
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1e3:.0f} kB", file=sys.stderr)
