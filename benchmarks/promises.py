"""Check every figure that README and docs promise.

    python benchmarks/promises.py --check              compare promises.yaml with the committed JSON and the pages
    python benchmarks/promises.py --list               list what can be measured, and how long it takes
    python benchmarks/promises.py --minutes 20         measure what fits into 20 minutes, the shortest first
    python benchmarks/promises.py --only fuzz-images   measure these, however long it takes

benchmarks/promises.yaml lists the figures by the JSON file that holds them: the path in the file, the bound that the
figure must keep, and the text by which pages state it. Each file is measured by its own command, which writes a fresh
JSON to `--work_dir`; the committed files do not change. If data or the result of an earlier command is missing, the
file is skipped with the reason. The exit status is 1 if a promise is broken.
"""

import argparse
import dataclasses
import json
import operator
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from latent_ddpm.errors import UserError
from latent_ddpm.files import write_json
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent
PROMISES = ROOT / "benchmarks" / "promises.yaml"
COMPARE = {">=": operator.ge, "<=": operator.le, "==": operator.eq}
# how a page writes a value
FORMS = {
    "number": lambda value: value,
    "percent": lambda value: 100 * value,
    "change": lambda value: 100 * (value - 1),  # a ratio as a change in percent
    "loss": lambda value: -value,  # a loss of quality as a negative number
}
OUTPUT_FLAGS = ("--json", "--work_dir", "--save_dir", "--output_dir")


@dataclasses.dataclass
class Figure:
    """A promised figure.

    Attributes:
        path: keys and indices that lead to it in the JSON file; a key may be cut to its unique beginning.
        stated: the text that stands for it, by page.
        form: a key of FORMS.
        bound: such as ">= 31.0"; None where it is only a comparison, such as the stock recipe's.
        over: the figure is a ratio: this path leads to what it is divided by. Its first step may be another file.
    """

    path: list[str | int]
    stated: dict[str, str]
    form: str = "number"
    bound: str | None = None
    over: list[str | int] | None = None

    def value(self, content: Any) -> float:
        """The figure in the content of a JSON file.

        Raises:
            KeyError: there is no such figure.
        """
        value = _find(content, self.path)
        if self.over is None:
            return value
        if str(self.over[0]).endswith(".json"):
            return value / _find(json.loads((ROOT / self.over[0]).read_text(encoding="utf-8")), self.over[1:])
        return value / _find(content, self.over)

    def holds(self, value: float) -> bool:
        """Whether a value keeps the bound."""
        if self.bound is None:
            return True
        sign, _, limit = self.bound.partition(" ")
        return COMPARE[sign](value, float(limit))

    def is_stated(self, value: float, text: str) -> bool:
        """Whether a page's text, such as "84.4 %", is the value, rounded as it stands there."""
        number = text.split()[0].rstrip("%").replace(",", "")
        places = len(number.partition(".")[2].partition("e")[0])
        unit = 0.5 * 10.0**-places * (10.0 ** int(number.partition("e")[2]) if "e" in number else 1.0)
        return abs(FORMS[self.form](value) - float(number)) <= 1.001 * unit

    @property
    def name(self) -> str:
        """The path as one word."""
        return "/".join(map(str, self.path)) + (" (ratio)" if self.over else "")


@dataclasses.dataclass
class Promise:
    """The figures of one JSON file.

    Attributes:
        file: below the repository's root.
        about: what is measured, in a sentence.
        minutes: that the command takes on two cores.
        figures: the promised ones.
        gpu: whether it needs a GPU. Such a figure is not measured here, but by scripts/benchmark_gpu.py.
    """

    file: str
    about: str
    minutes: float
    figures: list[Figure]
    gpu: bool = False

    @property
    def name(self) -> str:
        return Path(self.file).stem

    def content(self) -> Any:
        """The committed JSON."""
        return json.loads((ROOT / self.file).read_text(encoding="utf-8"))

    def command(self, result: Path) -> list[str]:
        """The words that measure it anew and write `result`."""
        words = shlex.split(self.content()["command"])
        if self.gpu:
            return words
        at = words.index("--json") if "--json" in words else len(words)
        words[at : at + 2] = ["--json", str(result)]
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    def lacks(self) -> str | None:
        """What the command needs and this machine does not have, or None."""
        if self.gpu:
            return "it needs a GPU: run scripts/benchmark_gpu.py"
        words = shlex.split(self.content()["command"])
        parts = [(before, part) for before, word in zip(["", *words], words, strict=False) for part in word.split()]
        for before, part in parts:
            is_input = part.startswith(("outputs/", "../")) and before not in OUTPUT_FLAGS
            if is_input and not (ROOT / part).exists():
                return f"{part} is not there"
        return None


def _find(content: Any, path: list[str | int]) -> float:
    for step in path:
        if isinstance(content, dict) and step not in content:
            found = [key for key in content if key.startswith(str(step))]
            if len(found) != 1:
                raise KeyError(f"{step!r} is the beginning of {len(found)} keys")
            (step,) = found
        content = content[step]
    return float(content)


def read_promises(path: Path = PROMISES) -> list[Promise]:
    """The promises of a YAML file.

    Raises:
        UserError: it is damaged.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        return [Promise(**{**entry, "figures": [Figure(**figure) for figure in entry["figures"]]}) for entry in entries]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def check(promises: list[Promise]) -> list[str]:
    """What is wrong with the committed JSON and the pages: a sentence for each figure that is not as promised."""
    wrong, pages = [], {}
    for promise in promises:
        for figure in promise.figures:
            name = f"{promise.file}: {figure.name}"
            try:
                value = figure.value(promise.content())
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                wrong.append(f"{name} cannot be read: {error}")
                continue
            if not figure.holds(value):
                wrong.append(f"{name} is {value:g}, promised {figure.bound}")
            for page, text in figure.stated.items():
                pages.setdefault(page, (ROOT / page).read_text(encoding="utf-8"))
                if text not in pages[page]:
                    wrong.append(f"{page} does not say {text!r} ({name})")
                if not figure.is_stated(value, text):
                    wrong.append(f"{page} says {text!r}, and {name} is {value:g}")
    return wrong


def measure(promise: Promise, work_dir: Path, limit: float | None) -> tuple[Any, str]:
    """Run a promise's command; returns the content of its JSON, None where there is none, and what happened."""
    result = (work_dir / f"{promise.name}.json").resolve()
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    try:
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                promise.command(result), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False
            )
    except subprocess.TimeoutExpired:
        return None, "took longer than the minutes allow"
    if done.returncode or not result.exists():
        return None, f"the command failed with exit status {done.returncode}; see {log}"
    return json.loads(result.read_text(encoding="utf-8")), "measured"


def rows_of(promise: Promise, content: Any) -> list[dict[str, Any]]:
    """A row per figure: its name, bound, committed and new value, and whether the new one holds."""
    rows = []
    for figure in promise.figures:
        now = None
        try:
            now = figure.value(content)
            verdict = "holds" if figure.holds(now) else "BROKEN"
        except (KeyError, IndexError, TypeError):
            verdict = "BROKEN: not measured"
        row = {"promise": promise.name, "figure": figure.name, "bound": figure.bound}
        rows.append(row | {"last": figure.value(promise.content()), "now": now, "verdict": verdict})
    return rows


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, help="write the table there too")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/promises"))
    parser.add_argument("--promises", type=Path, default=PROMISES)
    options = parser.parse_args(argv)
    promises = sorted(read_promises(options.promises), key=lambda promise: promise.minutes)
    if unknown := set(options.only) - {promise.name for promise in promises}:
        raise UserError(f"--only: there is no promise {', '.join(sorted(unknown))}; --list names them all.")
    if options.check:
        wrong = check(promises)
        print("\n".join(wrong) or f"{sum(len(p.figures) for p in promises)} figures are as promised.")
        return 1 if wrong else 0
    if options.list:
        for promise in promises:
            lacks = promise.lacks()
            print(f"{promise.name}: {len(promise.figures)} figures, {promise.minutes:g} minutes"
                  + (f"; cannot be measured here: {lacks}" if lacks else ""))  # fmt: skip
        return 0
    end, rows, skipped = time.monotonic() + 60 * options.minutes, [], []
    try:
        for promise in promises:
            if options.only and promise.name not in options.only:
                continue
            left = None if options.only else end - time.monotonic()
            reason = promise.lacks()
            if reason is None and left is not None and 60 * promise.minutes > left:
                reason = f"takes {promise.minutes:g} minutes"
            if reason is None:
                print(f"{promise.name}, about {promise.minutes:g} minutes: {promise.about}", flush=True)
                content, reason = measure(promise, options.work_dir, left)
                if content is not None:
                    rows += rows_of(promise, content)
                    continue
            skipped.append((promise.name, reason))
    except KeyboardInterrupt:
        print("stopped; what was measured until then:")
    return report(rows, skipped, options.json)


def report(rows: list[dict[str, Any]], skipped: list[tuple[str, str]], path: Path | None) -> int:
    """Print the table, write it to `path` if there is one; returns 1 if a promise is broken."""
    for row in rows:
        bound, now = row["bound"] or "-", "-" if row["now"] is None else f"{row['now']:.5g}"
        print(f"{row['promise']:40.40}  {row['figure'][-44:]:44}  {bound:>10}  {row['last']:10.5g}  {now:>10}"
              f"  {row['verdict']}")  # fmt: skip
    for name, reason in skipped:
        print(f"skipped {name}: {reason}")
    broken = [row for row in rows if row["verdict"] != "holds"]
    failed = [(name, reason) for name, reason in skipped if reason.startswith("the command failed")]
    print(f"{len(rows)} figures measured, {len(broken)} fall short, {len(skipped)} files skipped.")
    if path is not None:
        write_json(path, {"rows": rows, "skipped": skipped})
    return 1 if broken or failed else 0


if __name__ == "__main__":
    run(main)
