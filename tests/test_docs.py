"""The README and the pages of docs/ agree with the repository: links, files, code, configs and command lines.

Each check is a function from a page's text to a list of problems, so that it is itself tested on small texts.
"""

import ast
import fnmatch
import functools
import importlib.util
import itertools
import re
import shlex
import tomllib
from typing import NamedTuple

import pytest
import yaml
from conftest import ROOT

from latent_ddpm.config import SECTIONS, AutoencoderConfig, RunConfig, UNetConfig, keys_of, parse_config
from latent_ddpm.errors import UserError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = {"RunConfig": RunConfig, "AutoencoderConfig": AutoencoderConfig, "UNetConfig": UNetConfig}
STAGES = {"train_autoencoder.py": AutoencoderConfig, "train_unet.py": UNetConfig}
FOLDERS = "scripts|benchmarks|configs|latent_ddpm|tests|docs|notebooks"
# diffusers' examples, with which the README compares, and the name of the exported pipeline_latent_ddpm.py
OF_OTHERS = {"train_unconditional.py", "--use_ema", "pipeline.py"}
OF_LAUNCHERS = {"num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "multi_gpu"}
OF_LAUNCHERS |= {"config_file", "quiet", "cpu", "nproc_per_node", "dynamo_backend", "requeue", "kill-on-bad-exit"}


# ------------------------------------------------------------------------------------------ the parts of a page
class Block(NamedTuple):
    language: str  # python, yaml, shell, or "" where it is none of them
    text: str


def parts(text):
    """A page's prose, without code blocks, and its code blocks, fenced or indented."""
    prose, blocks, block, fence, named = [], [], [], None, ""

    def close():
        if block:
            content = "\n".join(block).rstrip("\n")
            blocks.append(Block(_language(named, content.splitlines()), content))
            block.clear()

    for line in text.splitlines():
        opens = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        of_list = re.match(r"\s*([-*+]|\d+\.) |  ", next((above for above in reversed(prose) if above), ""))
        if fence and line.strip() == fence:
            close()
            fence, named = None, ""
        elif fence:
            block.append(line)
        elif opens:
            close()
            fence, named = opens[1], opens[2]
        elif line.startswith("    ") and (block or not (prose and prose[-1])) and not of_list:
            block.append(line[4:])
        elif block and not line.strip():
            block.append("")
        else:
            close()
            prose.append(line.rstrip())
            continue
        prose.append("")
    close()
    return "\n".join(prose), blocks


def _language(named, lines):
    named = {"py": "python", "yml": "yaml", "sh": "shell", "bash": "shell", "console": "shell"}.get(named, named)
    if named:
        return named
    command = re.compile(r"\s*(\$ )?(\w+=\S+ )*(python|accelerate|torchrun|make|pip|hf|source|git|sbatch) ")
    return "shell" if any(command.match(line) for line in lines) else ""


def code_spans(prose):
    return [" ".join(match[2].split()) for match in re.finditer(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)\1", prose, re.S)]


def commands(shell):
    """The words of each command of a shell text."""
    for line in re.sub(r"\\\n\s*", " ", shell).splitlines():
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # a quotation that goes on: no command of ours
            continue
        for is_end, group in itertools.groupby(words, key=lambda word: word in ("&&", "||", "|", ";", "&")):
            if not is_end:
                yield list(group)


def is_placeholder(path):
    """Whether a path stands for another one: configs/NAME.yaml, outputs/<name>."""
    return "<" in path or "..." in path or any(re.fullmatch(r"[A-Z_]{3,}(\.\w+)?", part) for part in path.split("/"))


# --------------------------------------------------------------------------------------------------- the checks
def anchors(text):
    """The fragments by which GitHub links to the headings of a page."""
    seen = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", parts(text)[0], re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{seen[slug]}" if seen[slug] else slug


def broken_links(text, page):
    prose = re.sub(r"(`+)(?:.+?)\1", "", parts(text)[0])
    for target in re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        if path and not file.exists():
            yield f"link to {target}: there is no such file"
        elif fragment and file.suffix == ".md" and fragment not in anchors(file.read_text() if path else text):
            yield f"link to {target}: there is no such heading"


def expanded(pattern):
    """a{b,c}d -> abd, acd."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [
        name
        for choice in found[1].split(",")
        for name in expanded(pattern[: found.start()] + choice + pattern[found.end() :])
    ]


@functools.cache
def repository_files():
    """Paths of the repository's files and folders (the latter with / at the end), below FOLDERS and at the top."""
    found = {path.name for path in ROOT.iterdir() if path.is_file()}
    for folder in FOLDERS.split("|"):
        if (ROOT / folder).exists():
            found |= {folder + "/"}
            for path in (ROOT / folder).rglob("*"):
                found.add(path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else ""))
    return found


def missing_files(text, page):
    """Files of the repository that code spans or code blocks name, and that are not there."""
    prose, blocks = parts(text)
    of_repository = re.compile(rf"(?<![\w/.<>-])(?:(?:{FOLDERS})/[\w./*{{}},+-]*|[\w-]+\.py\b)")
    names = {path.rsplit("/", 1)[-1] for path in repository_files()}
    for code in [*code_spans(prose), *(block.text for block in blocks)]:
        for match in of_repository.finditer(code):
            name = match[0].rstrip(".,")
            after = code[match.end() : match.end() + 1]
            if name in OF_OTHERS or ("/" not in name and name in names):
                continue  # without its folder, as in a list of a folder's files
            if is_placeholder(name) or after in ("<", "$"):
                continue
            for path in expanded(name):
                known = {path, path + "/"} & repository_files()
                pattern = path + "*" if path.endswith("-") else path  # the beginning of several names
                if not known and not fnmatch.filter(repository_files(), pattern):
                    yield f"{path}: there is no such file"
        for path in re.findall(r"^\.\./[\w./-]+\.md$", code):
            if not (page.parent / path).exists():
                yield f"{path}: there is no such file"


def module_names(module):
    """The names at the top of a module or package of ours, without importing it; None if there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not file.exists():
        return None
    names = {path.stem for path in base.iterdir()} if base.is_dir() else set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


def wrong_python(source):
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        yield f"Python that does not compile: {error}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if module.split(".")[0] not in ("latent_ddpm", "pipeline_latent_ddpm"):
                continue
            names = module_names(module)
            if names is None:
                yield f"import of {module}: there is no such module"
            elif name is not None and name not in names:
                yield f"import of {name}: {module} has no such name"


def wrong_yaml(source):
    try:
        content = yaml.safe_load(source)
    except yaml.YAMLError as error:
        yield f"YAML that does not parse: {' '.join(str(error).split())}"
        return
    known = {key for config in CONFIGS.values() for key in keys_of(config)}
    if not isinstance(content, dict) or not {*known, *SECTIONS} & content.keys():
        return  # another file than one of configs/
    for section, allowed in (("train_autoencoder", AutoencoderConfig), ("train_unet", UNetConfig)):
        for key in (content.get(section) or {}).keys() - set(keys_of(allowed)):
            yield f"YAML with the unknown key {key} in {section}"
    for key in content.keys() - known - set(SECTIONS):
        yield f"YAML with the unknown key {key}"


def _added_flags(tree):
    """The flags of every `add_argument` call in a syntax tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from (word.value for word in node.args if isinstance(word, ast.Constant) and word.value[:1] == "-")


@functools.cache
def flags_of(script):
    """The flags that one of our scripts knows, read from its source."""
    if script in STAGES:
        return {"--config", "--help", *(f"--{key}" for key in keys_of(STAGES[script]))}
    tree = ast.parse((ROOT / script).read_text())
    flags = {"-h", "--help", *_added_flags(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latent_ddpm"):
            shared = {alias.name for alias in node.names if re.fullmatch(r"add_\w+_arguments", alias.name)}
            if shared:
                module = ast.parse((ROOT / (node.module.replace(".", "/") + ".py")).read_text())
                for function in module.body:
                    if getattr(function, "name", "") in shared:
                        flags |= set(_added_flags(function))
        # parse_config(UNetConfig, rest): the script takes the keys of a stage as well
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_config":
            config, words = node.args
            if getattr(config, "id", "") not in CONFIGS:  # a variable: the benchmark chooses its own words
                continue
            if not isinstance(words, ast.List) or any(isinstance(word, ast.Starred) for word in words.elts):
                flags |= {"--config", *(f"--{key}" for key in keys_of(CONFIGS[config.id]))}
    return flags


def wrong_command(words):
    """Problems of one command: flags that the script does not know, values that a training script refuses."""
    if words[:1] == ["make"]:
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        yield from (f"make {word}: no such target" for word in words[1:] if word[0] != "-" and word not in targets)
    for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        yield from (f"[{extra}]: no such extra in pyproject.toml" for extra in extras.split(",") if extra not in known)
    position = next((i for i, word in enumerate(words) if re.fullmatch(rf"(({FOLDERS})/)?[\w-]+\.py", word)), None)
    if position is None:
        return
    script, given = words[position], words[position + 1 :]
    if not (ROOT / script).exists():
        yield f"{script}: there is no such script"
        return
    known = flags_of(script)
    flags = [word.partition("=")[0] for word in given if word.startswith("--") and " " not in word]
    if script in STAGES:  # which read --num-images as --num_images
        flags = [f"--{flag[2:].replace('-', '_')}" for flag in flags]
    unknown = [flag for flag in flags if flag not in known]
    yield from (f"{script}: it knows no {flag}" for flag in unknown)
    config = next((given[i + 1] for i, word in enumerate(given[:-1]) if word == "--config"), None)
    if script in STAGES and not unknown and config and (ROOT / config).exists() and "..." not in given:
        problem = refusal(script, tuple(given))
        if problem:
            yield f"{script}: {problem}"


@functools.cache
def refusal(script, words):
    """What a training script's config says against a command line; None if nothing."""
    words = [str(ROOT / word) if before == "--config" else word for before, word in zip(("", *words), words)]  # noqa: B905
    try:
        parse_config(STAGES[script], words)
    except UserError as error:
        return str(error)
    except SystemExit:  # --help
        return None


def wrong_code(text, page):
    prose, blocks = parts(text)
    for block in blocks:
        if block.language == "python":
            yield from wrong_python(block.text)
        elif block.language == "yaml":
            yield from wrong_yaml(block.text)
        elif block.language == "shell":
            for words in commands(block.text):
                yield from wrong_command(words)
    spans = code_spans(prose)
    for span in spans:
        if re.match(r"(python|accelerate launch|torchrun|make|pip install) ", span):
            for words in commands(span):
                yield from wrong_command(words)
        elif re.match(r"--\w", span):
            flags = re.findall(r"(?:^|\s)(--[\w-]+)", span)
            yield from (f"{flag}: no script knows it" for flag in flags if flag not in every_flag() | OF_OTHERS)


@functools.cache
def every_flag():
    scripts = [path for folder in ("scripts", "benchmarks", "docs") for path in (ROOT / folder).glob("*.py")]
    known = set().union(*(flags_of(path.relative_to(ROOT).as_posix()) for path in scripts), *map(flags_of, STAGES))
    return known | {f"--{flag}" for flag in OF_LAUNCHERS}


CHECKS = {check.__name__: check for check in (broken_links, missing_files, wrong_code)}


# ---------------------------------------------------------------------------------------------------- the pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.parametrize("check", CHECKS)
def test_page(page, check):
    assert sorted(set(CHECKS[check](page.read_text(), page))) == []


def test_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = script.make_page()
    assert (ROOT / "docs" / "reference.md").read_text() == page, "run python docs/make_reference.py"
    for config in CONFIGS.values():
        lines = [line for key in keys_of(config) for line in page.splitlines() if line.startswith(f"| `{key}` |")]
        assert len(lines) == len(keys_of(config))
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 and "|  |" not in line[:-5] for line in lines)


# --------------------------------------------------------------------------------------------------- each check
def problems_of(check, text):
    return list(CHECKS[check](text, ROOT / "docs" / "page.md"))


def test_parts_of_a_page():
    text = "# A\n\nWords `a\nb`:\n\n    python x.py --a \\\n        --b\n\n    make test\n\n"
    text += "```python\nx = 1\n\n# y\n```\n- a list\n\n    of `two` paragraphs\n"
    prose, blocks = parts(text)
    assert blocks == [("shell", "python x.py --a \\\n    --b\n\nmake test"), ("python", "x = 1\n\n# y")]
    assert code_spans(prose) == ["a b", "two"] and "python x.py" not in prose
    assert list(commands(blocks[0].text)) == [["python", "x.py", "--a", "--b"], ["make", "test"]]
    assert list(commands("$ make a && python b.py 'c d' # e")) == [["make", "a"], ["python", "b.py", "c d"]]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](../README.md) ![b](results/quickstart/demo.png) [c](https://example.org/x) [d](#e)\n\n# E", None),
        ("[a](nowhere.md)", "nowhere.md"),
        ("![a](results/quickstart/none.png)", "none.png"),
        ("[a](#none)\n\n# Other", "#none"),
        ("[a](../README.md#none)", "#none"),
        ("`[a](nowhere.md)`", None),
    ],
)
def test_links(text, problem):
    found = problems_of("broken_links", text)
    assert (len(found) == 1 and problem in found[0]) if problem else found == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("`latent_ddpm/config.py` `configs/NAME.yaml` `configs/accelerate/` `scripts/sample.py` `ema.py`", None),
        ("`docs/results/quickstart/mnist-*.json`, `docs/results/quickstart/mnist-{samples,reconstructions}.png`", None),
        ("`docs/results/quickstart/mnist-{samples,none}.png`", "mnist-none.png"),
        ("`docs/results/quickstart/none-*.json`", "none-*.json"),
        ("`docs/results/quickstart/mnist-` and `docs/results/quickstart/none-`", "none-"),
        ("`latent_ddpm/models/vqvae.py`", "latent_ddpm/models/vqvae.py"),
        ("`tests/test_none.py`", "tests/test_none.py"),
        ("    python scripts/none.py outputs/x", "scripts/none.py"),
        ("```sh\ntorchrun train_none.py\n```", "train_none.py"),
        ("`../nowhere.md`", "../nowhere.md"),
        ("`none.py`", "none.py"),
        ("scripts/none.py", None),
    ],
)
def test_files(text, problem):
    found = problems_of("missing_files", text)
    assert (len(found) == 1 and problem in found[0]) if problem else found == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```python\nfrom latent_ddpm.config import UNetConfig\nfrom latent_ddpm.autoencoder import vqvae\n```", None),
        ("```python\nfrom pipeline_latent_ddpm import LatentDDPMPipeline\nimport torch.none\n```", None),
        ("```python\nfor\n```", "does not compile"),
        ("```python\nfrom latent_ddpm.config import VNetConfig\n```", "VNetConfig"),
        ("```py\nimport latent_ddpm.none\n```", "latent_ddpm.none"),
        ("```yaml\nresolution: 64\ntrain_unet:\n  conditions: [class]\n```", None),
        ("```yaml\nnum_processes: 8\n```", None),
        ("```yaml\na: [\n```", "does not parse"),
        ("```yaml\ntrain_unet:\n  quantizer: kl\n```", "quantizer"),
        ("```yaml\nresolution: 64\nresolutoin: 32\n```", "resolutoin"),
        ("    python train_unet.py --config configs/NAME.yaml --learning_rate 2e-4", None),
        ("    python train_unet.py --config configs/NAME.yaml --learning-rte 2e-4", "--learning_rte"),
        ("    accelerate launch --num_processes 2 train_unet.py --quantizer kl", "--quantizer"),
        ("    python train_unet.py --config configs/mnist.yaml --seed none", "seed"),
        (
            "    python train_unet.py --config configs/mnist.yaml --train_data_dir PHOTOS --dataset_name a/b",
            "both are set",
        ),
        ("    python train_unet.py --config configs/mnist.yaml --train_data_dir PHOTOS", None),
        ("    python train_unet.py --config configs/mnist.yaml --train_data_dir PHOTOS --dataset_name null", None),
        ("    python scripts/sample.py a/pipeline --guidance_interval 0.2 3 --num_images=4", None),
        ("    make quickstart && python scripts/sample.py a/pipeline \\\n        --num_imges 4", "--num_imges"),
        ("    python scripts/evaluate.py pipeline --config configs/NAME.yaml --steps 5 --unet_dropout 0", None),
        ("    python scripts/plot_run.py outputs/a --learning_rate 1", "--learning_rate"),
        ("    make nothing", "nothing"),
        ("    pip install -e '.[evaluation,none]'", "[none]"),
        ("`--push_to_hub true` and `accelerate launch --quiet`", None),
        ("`--push_to_hug true`", "--push_to_hug"),
        ("`--seed 1 --push_to_hug true`", "--push_to_hug"),
        ("`python train_unet.py --hepl`", "--hepl"),
    ],
)
def test_code(text, problem):
    found = problems_of("wrong_code", text)
    assert (len(found) == 1 and problem in found[0]) if problem else found == []
