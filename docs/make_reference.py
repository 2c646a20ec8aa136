"""Make docs/reference.md, the list of all config keys, from the config classes and their help.

    python docs/make_reference.py            writes docs/reference.md
    python docs/make_reference.py --check    exit status 1 if the page is not what this would write

Run it after a change to latent_ddpm/config.py; a test compares the page with what this prints.
"""

import argparse
import dataclasses
import sys
import types
import typing
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs where the package is not installed

from latent_ddpm.config import FREE_KEYS, AutoencoderConfig, RunConfig, UNetConfig, _parser  # noqa: E402

PAGE = Path(__file__).resolve().parent / "reference.md"
INTRODUCTION = """\
# Reference: every key of a config

This page is made by `python docs/make_reference.py` from `latent_ddpm/config.py`. Do not edit it by hand.

A config is a YAML file. Keys at the top level hold for both stages. The sections `train_autoencoder:` and
`train_unet:` hold the keys of one stage, and may override a common key for it:

```yaml
output_dir: outputs/photos
train_data_dir: photos
resolution: 64
train_autoencoder:
  train_batch_size: 32
train_unet:
  train_batch_size: 64
```

Every key is also a flag of the training script: `--train_batch_size 16`, `--block_out_channels "[64,128]"`,
`--disc_adaptive_steps null`. A flag wins over the file. `python train_autoencoder.py --help` and
`python train_unet.py --help` print these texts. An unknown key is an error that names the nearest known one.

**Resume** says whether a run may be resumed with another value. A run whose other keys differ is rejected; give it
another `output_dir`.
"""
SECTIONS = (
    (RunConfig, "Both stages", "At the top level of the file, or in a section."),
    (AutoencoderConfig, "Stage 1: `train_autoencoder:`", "Of `train_autoencoder.py`. [autoencoder.md](autoencoder.md)"),
    (UNetConfig, "Stage 2: `train_unet:`", "Of `train_unet.py`. [diffusion.md](diffusion.md), "
     "[conditioning.md](conditioning.md)"),
)  # fmt: skip


def type_in_words(kind: object) -> str:
    """A key's type as a reader of YAML names it: `int | None` -> "int or null"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is type(None):
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if origin is list:
        return f"list of {type_in_words(parts[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_in_words(part) for part in parts)
    return kind.__name__


def default_in_yaml(field: dataclasses.Field) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def help_texts(config_class: type[RunConfig]) -> dict[str, str]:
    """What `--help` says of each key, without what jsonargparse adds (type and default)."""
    return {action.dest: " ".join((action.help or "").split()) for action in _parser(config_class)._actions}


def make_page() -> str:
    """The whole page as Markdown text."""
    lines, listed = [INTRODUCTION], set()
    for config_class, title, words in SECTIONS:
        texts, hints = help_texts(config_class), typing.get_type_hints(config_class)
        lines += [f"## {title}", "", words, "", "| key | type | default | what it does | resume |"]
        lines += ["|---|---|---|---|---|"]
        for field in dataclasses.fields(config_class):
            if field.name in listed:
                continue
            listed.add(field.name)
            cells = [f"`{field.name}`", type_in_words(hints[field.name]), f"`{default_in_yaml(field)}`"]
            cells += [texts[field.name], "yes" if field.name in FREE_KEYS else ""]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    page = make_page()
    if not options.check:
        PAGE.write_text(page, encoding="utf-8")
        print(PAGE)
        return 0
    if PAGE.read_text(encoding="utf-8") != page:
        print("docs/reference.md is out of date: run python docs/make_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
