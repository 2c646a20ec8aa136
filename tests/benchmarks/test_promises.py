"""Promises: what README and docs state is what the committed JSON holds, and the runner tells what falls short."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_script

sys.path.insert(0, str(ROOT / "benchmarks"))
import promises

from latent_ddpm.config import AutoencoderConfig, UNetConfig, keys_of
from latent_ddpm.errors import UserError

ALL = promises.read_promises()


def test_pages_state_what_the_json_holds():
    assert promises.check(ALL) == []


def test_every_figure_of_readmes_table_is_promised():
    """A figure cannot be added to README without a promise."""
    text = (ROOT / "README.md").read_text()
    table = text.split("## Measured", 1)[1].split("\n## ", 1)[0]
    stated = {figure.stated.get("README.md") for promise in ALL for figure in promise.figures}
    rows = [row.split("|") for row in re.findall(r"(?m)^\|.*\|$", table)[2:]]
    assert len(rows) >= 15
    for row in rows:
        for figure in re.findall(r"[\d.]+(?: %| dB)?", row[2]):
            assert figure in stated, f"{figure} of {row[1].strip()!r} is in no promise"


@pytest.mark.parametrize("promise", ALL, ids=lambda promise: promise.name)
def test_commands_name_scripts_and_flags_that_exist(promise):
    words = promise.command(Path("out.json"))
    script = next(Path(word) for word in words if word.endswith(".py"))
    tree = ast.parse((ROOT / script).read_text())
    own = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for other in ("scripts/evaluate.py", "latent_ddpm/diffusion/guidance.py", "benchmarks/gpu_correctness.py"):
        own |= set(re.findall(r'"(--\w+)"', (ROOT / other).read_text()))
    own |= {"--cpu", "--num_processes"} if "accelerate" in words else set()
    keys = {f"--{key}" for kind in (AutoencoderConfig, UNetConfig) for key in keys_of(kind)} | {"--config"}
    flags = {part.partition("=")[0] for word in words for part in word.split() if part.startswith("--")}
    assert flags <= own | keys


def test_a_promise_is_broken_in_every_way(tmp_path, monkeypatch):
    monkeypatch.setattr(promises, "ROOT", tmp_path)
    (tmp_path / "r.json").write_text(json.dumps({"results": {"ours (long name)": {"psnr": 26.34}, "stock": 20.0}}))
    (tmp_path / "PAGE.md").write_text("It has 26.3 dB, 1.3 times as much.")

    def wrong(**changes):
        figure = {"path": ["results", "ours", "psnr"], "stated": {"PAGE.md": "26.3 dB"}, "bound": ">= 26.0"}
        figure = promises.Figure(**{**figure, **changes})
        return " ".join(promises.check([promises.Promise("r.json", "x", 1, [figure])]))

    assert wrong() == "" and wrong(over=["results", "stock"], bound="<= 1.4", stated={"PAGE.md": "1.3"}) == ""
    assert "promised >= 26.5" in wrong(bound=">= 26.5")
    assert "does not say '27.0 dB'" in wrong(stated={"PAGE.md": "27.0 dB"})
    assert "says '1.3'" in wrong(stated={"PAGE.md": "1.3"})
    assert "cannot be read" in wrong(path=["results", "theirs"])
    assert "beginning of 2 keys" in wrong(path=["results", ""])


@pytest.mark.parametrize(
    ("form", "value", "text", "right"),
    [
        ("percent", 0.844, "84.4 %", True),
        ("percent", 0.8446, "84.4 %", False),
        ("change", 0.607, "-39.3 %", True),
        ("loss", 0.896, "-0.90 dB", True),
        ("number", 15259.8, "15,260", True),
        ("number", 2.93e-4, "2.9e-4", True),
        ("number", 3.01e-4, "2.9e-4", False),
        ("number", 0.5625, "0.56", True),
    ],
)
def test_rounded_texts(form, value, text, right):
    assert promises.Figure([], {}, form).is_stated(value, text) == right


def test_damaged_promises_are_named(tmp_path):
    (tmp_path / "p.yaml").write_text("- file: x\n  figures: 3\n")
    with pytest.raises(UserError, match=r"p\.yaml cannot be read"):
        promises.read_promises(tmp_path / "p.yaml")


MEASURED = (
    "import json, sys; json.dump({'psnr': float(sys.argv[1])}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))"
)


def test_the_runner_measures_what_fits_and_tells_what_falls_short(tmp_path):
    entries = []
    for name, value, minutes in (("met", 31.0, 0.1), ("broken", 29.0, 0.2), ("long", 31.0, 90), ("fails", "x", 0.3)):
        words = ["python", "-c", f'"{MEASURED}"', str(value), "--json", f"{name}.json"]
        (tmp_path / f"{name}.json").write_text(json.dumps({"command": " ".join(words), "psnr": 31.5}))
        figures = [{"path": ["psnr"], "bound": ">= 30.0", "stated": {}}]
        file = str(tmp_path / f"{name}.json")
        entries.append({"file": file, "about": "a toy", "minutes": minutes, "figures": figures})
    (tmp_path / "needs.json").write_text('{"command": "python x.py outputs/absent/ae --json needs.json", "psnr": 1}')
    entries.append({"file": str(tmp_path / "needs.json"), "about": "a toy", "minutes": 0.1, "figures": []})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(entries))
    words = ["--promises", tmp_path / "p.yaml", "--work_dir", tmp_path / "work", "--json", tmp_path / "table.json"]
    words += ["--minutes", "5"]
    done = run_script("promises.py", *words, expect=1, folder="benchmarks")
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["promise"]: (row["now"], row["verdict"]) for row in table["rows"]} == {
        "met": (31.0, "holds"),
        "broken": (29.0, "BROKEN"),
    }
    assert dict(table["skipped"])["long"] == "takes 90 minutes"
    assert dict(table["skipped"])["needs"] == "outputs/absent/ae is not there"
    assert dict(table["skipped"])["fails"].startswith("the command failed with exit status 1")
    assert "2 figures measured, 1 fall short, 3 files skipped." in done.stdout
    run_script("promises.py", *words, "--only", "met", folder="benchmarks")
