"""Look at the images of a run before it: what it would train on, what it leaves out, and what is wrong with them.

    python scripts/inspect_data.py --config configs/image_folder_64.yaml --train_data_dir PHOTOS
    python scripts/inspect_data.py --config configs/NAME.yaml --resolution 128 --folder REPORT

Decodes every image as training does, and writes to <output_dir>/inspection/ (or --folder):

    report.html, report.json    formats, modes, depths, profiles, sizes, classes, captions, splits, copies
    sheet.png                   images as training sees them
    left_out.jsonl              every file that is not trained on, and why
    duplicates.jsonl            groups of equal, nearly equal and mirrored images
    noted.jsonl                 images of one colour, too small, transparent, animated and the like

It prints a line for each thing that you may want to change, the most important first. Takes the keys of both training
scripts. --workers N sets the number of processes (as many as there are cores). A stopped inspection goes on with the
same command, and a finished one is kept in <output_dir>/cache/, so that a second call takes seconds.
"""

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from latent_ddpm.config import AutoencoderConfig, RunConfig, UNetConfig, parse_config
from latent_ddpm.data.inspection.inspect import inspect, inspect_captions
from latent_ddpm.data.inspection.known import keep_refusal, save_known
from latent_ddpm.data.inspection.lines import Line, lines_of
from latent_ddpm.data.inspection.report import summary, write_report
from latent_ddpm.data.sources.splits import open_sources
from latent_ddpm.data.sources.streaming import stream_folder
from latent_ddpm.diffusion.conditions import check_conditioning_images, check_source
from latent_ddpm.errors import UserError
from latent_ddpm.system import usable_cores
from latent_ddpm.training.launch import of_stage, run

OF_DATA = ("train_data_dir", "dataset_name", "dataset_config_name", "image_column", "streaming", "validation_fraction")
OF_DATA += ("class_column", "class_names", "conditioning_image_dir")
OF_DATA += ("max_validation_images", "resolution", "image_channels", "image_resize", "output_dir")


def configs_of(words: Sequence[str]) -> list[RunConfig]:
    """The configs of the stages that the run has; a given autoencoder leaves stage 2 alone.

    Raises:
        UserError: as `parse_config`, or the stages train on different images.
    """
    unet = parse_config(UNetConfig, of_stage(words, "unet"))
    if unet.autoencoder is not None:
        return [unet]
    autoencoder = parse_config(AutoencoderConfig, of_stage(words, "autoencoder"))
    for key in OF_DATA:
        if getattr(autoencoder, key) != getattr(unet, key):
            raise UserError(
                f"{key} differs between the stages: {getattr(autoencoder, key)} and {getattr(unet, key)}. Inspect one "
                f"at a time: give --{key}."
            )
    return [autoencoder, unet]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=usable_cores())
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    try:
        options, rest = parser.parse_known_args(argv)
    except SystemExit as error:
        raise UserError("see the message above") from error
    if options.workers < 0:
        raise UserError(f"--workers is {options.workers}; it must be 0 or more.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    configs = configs_of(rest)
    config, unet = configs[0], configs[-1]
    if config.streaming and not (stream_folder(config) / "stream.json").exists():
        raise UserError(
            "streaming: the data was not read yet. train_autoencoder.py reads it once, before its first step; inspect "
            "it after that, or inspect a part of it with --streaming false."
        )
    sources = open_sources(config)
    output_dir = Path(config.output_dir)
    inspection = inspect(sources, config, output_dir / "cache", options.workers)
    refusal, captions = [], None
    try:
        check_source(sources[0], unet)
        if "image" in unet.conditions:
            check_conditioning_images(sources[0], unet)
        if "text" in unet.conditions and not unet.caption_templates:
            captions = inspect_captions(sources, unet, inspection.folder)
    except UserError as error:
        refusal = [Line(99, f"Stage 2 stops at its start: {error}")]
    keep_refusal(inspection.folder, refusal)
    lines = refusal + lines_of(inspection.facts, configs, captions)
    folder = options.folder or output_dir / "inspection"
    command = shlex.join(["python", "scripts/inspect_data.py", *argv])
    write_report(folder, inspection, sources, config, lines, captions, command)
    save_known(output_dir, sources, config, inspection.facts, command, in_training=False)
    print(summary(inspection.facts, lines, folder))
    return 0


if __name__ == "__main__":
    run(main)
