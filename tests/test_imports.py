"""Imports within latent_ddpm go one way: the table says what each package may import. Circles are refused."""

import ast
import graphlib

import pytest
from conftest import ROOT

PACKAGE = ROOT / "latent_ddpm"
# The modules at the top of latent_ddpm.
GROUND = {
    "config",
    "errors",
    "files",
    "philox_kernel",
    "places",
    "pretrained",
    "progress",
    "random",
    "resizing",
    "system",
    "text_files",
}
MAY_IMPORT = {
    "errors": set(),
    "system": set(),
    "files": {"system"},
    "progress": set(),
    "philox_kernel": set(),
    "random": {"philox_kernel"},
    "resizing": {"errors"},
    "places": {"errors"},
    "pretrained": {"errors"},
    "text_files": {"errors"},
    "config": {"errors", "files", "places", "text_files"},
    "training": GROUND,
    "autoencoder": GROUND | {"training"},
    "data": GROUND | {"training", "autoencoder"},
    "diffusion": GROUND | {"training", "data"},
    "evaluation": GROUND | {"training", "autoencoder", "data"},
    "publishing": GROUND | {"training", "autoencoder"},
    "planning": GROUND | {"training", "autoencoder", "data", "diffusion"},
}
# may import pipeline_latent_ddpm, which imports nothing of ours
PIPELINE_USERS = {"autoencoder", "data", "diffusion", "planning", "publishing"}
NOT_A_DEPENDENCY = {"train_autoencoder", "train_unet", "scripts", "benchmarks", "tests"}


def modules():
    """Every module of latent_ddpm by its dotted name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path.read_text()


def imported(source):
    """The dotted names that a module's text imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name):
    """The package, or top-level module, of a dotted name of latent_ddpm; None for latent_ddpm itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else None


def forbidden(module, source):
    """The imports of a module that the table does not allow."""
    own = package_of(module)
    allowed = {None, own, *MAY_IMPORT.get(own, ())}
    for name in imported(source):
        first = name.split(".")[0]
        above = first in NOT_A_DEPENDENCY or (first == "pipeline_latent_ddpm" and own not in PIPELINE_USERS)
        if above or (first == "latent_ddpm" and package_of(name) not in allowed):
            yield name


@pytest.mark.parametrize(("module", "source"), [pytest.param(*pair, id=pair[0]) for pair in modules()])
def test_a_module_imports_what_its_package_may(module, source):
    assert module == "latent_ddpm" or package_of(module), f"{module} is in no package of the table"
    assert list(forbidden(module, source)) == []


def test_there_are_no_circles():
    names = dict(modules())

    def module_of(name):
        return next((prefix for prefix in (name, name.rpartition(".")[0]) if prefix in names), None)

    graph = {name: {module_of(found) for found in imported(source)} - {None, name} for name, source in names.items()}
    graphlib.TopologicalSorter({name: found - {"latent_ddpm"} for name, found in graph.items()}).prepare()


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("latent_ddpm.training.launch", "from latent_ddpm.publishing.hub import Publisher"),
        ("latent_ddpm.data.dataset", "def f():\n    from latent_ddpm.diffusion import unet"),
        ("latent_ddpm.random", "import latent_ddpm.config"),
        ("latent_ddpm.evaluation.grids", "from latent_ddpm.publishing import card"),
        ("latent_ddpm.training.optim", "import pipeline_latent_ddpm"),
        ("latent_ddpm.publishing.hub", "from train_unet import main"),
    ],
)
def test_a_forbidden_import_is_found(module, line):
    assert len(list(forbidden(module, line))) == 1
