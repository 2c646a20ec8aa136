"""Training curves of a run, or of several over one another, from their metrics.jsonl.

    python scripts/plot_run.py outputs/mnist                            leaves outputs/mnist/curves.png
    python scripts/plot_run.py outputs/a outputs/b --output both.png

Over images seen, so that runs with other batches can be compared. Loss and validation loss share axes.
"""

import argparse
from pathlib import Path

from latent_ddpm.errors import UserError
from latent_ddpm.publishing.curves import draw_curves
from latent_ddpm.training.launch import run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="a .png, .svg or .pdf; by default curves.png in the first run")
    options = parser.parse_args(argv)
    runs = {}
    for folder in options.run_folders:
        if not (folder / "metrics.jsonl").exists():
            raise UserError(f"There is no metrics.jsonl in {folder}.")
        name = folder.resolve().name if len(options.run_folders) > 1 else ""
        runs[name if name not in runs else str(folder)] = folder / "metrics.jsonl"
    picture = draw_curves(runs, options.output or options.run_folders[0] / "curves.png")
    if picture is None:
        raise UserError(f"Nothing was logged in {', '.join(map(str, options.run_folders))} yet.")
    print(picture)
    return 0


if __name__ == "__main__":
    run(main)
