"""Make weight averages (EMA) of any width after training, and find the one that samples best.

    python scripts/reconstruct_ema.py --config configs/mnist.yaml --sigma_rels 0.05 0.1 0.15 0.2 --num_images 1000

Takes the snapshots of <output_dir>/ema (`ema_snapshots` of train_unet.py) and leaves a pipeline for each width in
<output_dir>/ema/pipeline-<width>, as <output_dir>/pipeline but for the weights (arXiv 2312.02696, section 3.2). A width
is relative to the training time; --step N makes the averages as they would have been after N steps, in
pipeline-<width>-step-<N>. With --num_images each is measured as `scripts/evaluate.py pipeline` does (whose other
options go in --evaluation_words "..."), and JSON and a figure of the Frechet distance over the width are written
(--json FILE, by default <output_dir>/ema/ema.json).
--check WIDTH says how far a width that was tracked is from what the others' snapshots make of it, and writes that to
--json FILE, unless samples are measured. Takes the keys of train_unet.py.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel

from latent_ddpm.config import MAX_SIGMA_REL, UNetConfig, parse_config
from latent_ddpm.errors import UserError
from latent_ddpm.evaluation.features import EXTRACTORS, check_installed
from latent_ddpm.files import replace_folder, write_json
from latent_ddpm.training.ema import reconstruct, reconstruction_error
from latent_ddpm.training.launch import run

ROOT = Path(__file__).resolve().parent.parent


def export(config: UNetConfig, sigma_rel: float, asked: int | None) -> tuple[Path, int]:
    """Write the pipeline of one average; returns its folder, and the step at which the average is taken.

    `asked` is that step, or None for the last.
    """
    output_dir = Path(config.output_dir)
    weights, step = reconstruct(output_dir / "ema", sigma_rel, asked)
    unet = UNet2DModel.from_pretrained(output_dir / "pipeline" / "unet", use_safetensors=True)
    if {name: p.shape for name, p in unet.named_parameters()} != {name: p.shape for name, p in weights.items()}:
        raise UserError(
            f"The averages in {output_dir / 'ema'} belong to another network than {output_dir / 'pipeline'}."
        )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(weights[name])

    def write(aside: Path) -> None:
        shutil.copytree(output_dir / "pipeline", aside, dirs_exist_ok=True)
        unet.save_pretrained(aside / "unet", safe_serialization=True)

    folder = output_dir / "ema" / (f"pipeline-{sigma_rel:g}" + ("" if asked is None else f"-step-{step}"))
    replace_folder(folder, write)
    return folder, step


def draw(path: Path, results: dict[str, dict], exported: float) -> None:
    """The Frechet distance over the width; the exported width as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6), constrained_layout=True)
    widths = sorted(float(width) for width in results)
    axis.plot(widths, [results[f"{width:g}"]["fd"] for width in widths], marker="o")
    axis.axvline(exported, color="black", linewidth=0.8, label="as trained")
    axis.set_xlabel("width of the average, relative to the training time")
    first = next(iter(results.values()))
    axis.set_ylabel(f"Frechet distance ({first['feature_extractor']}, {first['samples']:,} samples)")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--sigma_rels", type=float, nargs="+", default=[])
    parser.add_argument("--check", type=float)
    parser.add_argument("--step", type=int)
    parser.add_argument("--num_images", type=int, default=0)
    parser.add_argument("--feature_extractor", choices=EXTRACTORS, default="efficientnet-lite0")
    parser.add_argument("--evaluation_words", type=shlex.split, default=[])
    parser.add_argument("--json", type=Path)
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    if options.num_images:
        check_installed(options.feature_extractor, "matplotlib")
    config = parse_config(UNetConfig, rest)
    for width in options.sigma_rels:
        if not 0 < width <= MAX_SIGMA_REL:
            raise UserError(f"--sigma_rels has {width:g}; a width must be above 0 and at most {MAX_SIGMA_REL}.")
    if options.check is not None:
        error = reconstruction_error(Path(config.output_dir) / "ema", options.check)
        print(f"width {options.check:g}: relative error of the reconstruction {error:.2e}")
        if options.json is not None and not options.num_images:
            command = "python scripts/reconstruct_ema.py " + shlex.join(argv)
            write_json(options.json, {"command": command, "width": options.check, "relative_error": error})
    elif not options.sigma_rels:
        raise UserError("Say which averages to make: --sigma_rels 0.05 0.1 (--help shows more).")
    if not (Path(config.output_dir) / "pipeline" / "model_index.json").exists():
        raise UserError(f"There is no pipeline in {config.output_dir}. Run train_unet.py first.")
    diffusers.utils.logging.disable_progress_bar()  # of loading
    results: dict[str, dict] = {}
    path = options.json or Path(config.output_dir) / "ema" / "ema.json"
    for width in options.sigma_rels:
        folder, step = export(config, width, options.step)
        print(f"width {width:g} at step {step}: {folder}", flush=True)
        if options.num_images:
            measured = folder.with_suffix(".json")
            words = ["pipeline", *rest, "--pipeline", folder, "--num_images", options.num_images, "--json", measured]
            words += ["--feature_extractor", options.feature_extractor, *options.evaluation_words]
            command = [sys.executable, ROOT / "scripts" / "evaluate.py", *words]
            if subprocess.run([str(word) for word in command]).returncode:
                raise UserError(f"{folder} could not be measured.")
            results[f"{width:g}"] = {"step": step, **json.loads(measured.read_text(encoding="utf-8"))["settings"][0]}
    if results:
        command = "python scripts/reconstruct_ema.py " + shlex.join(argv)
        write_json(path, {"command": command, "results": results})
        draw(path.with_suffix(".png"), results, config.ema_sigma_rels[0])
        for width, figures in results.items():
            print(f"width {width}: Frechet distance {figures['fd']:.4g} ({figures['feature_extractor']})")
        print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
