"""Publish a finished run on the Hub: its pipeline, or without one its autoencoder, with card, pictures and figures.

A few-step pipeline of the run is published too, as NAME-few-steps.

    python scripts/push_to_hub.py outputs/mnist --hub_model_id USER/NAME --hub_license apache-2.0

The token is that of `hf auth login`, HF_TOKEN or --hub_token. The card says what scripts/evaluate.py has left in the
run's folder, so evaluate first. --dry_run FOLDER writes what would be published to a folder and publishes nothing.
--hub_private_repo makes a new repository private, --hub_variants fp16 adds weights in 16 bits, --push_checkpoints adds
what another machine needs to resume. Your edits to the card on the Hub stay.
"""

import argparse
import os
import sys
from pathlib import Path

from latent_ddpm.errors import UserError
from latent_ddpm.publishing.hub import (
    FEW_STEP_HUB,
    FEW_STEPS,
    Publisher,
    check_can_publish,
    check_license,
    check_repo_id,
    few_step_repo_id,
    lay_out,
    write_card,
)
from latent_ddpm.publishing.private import Scrubber
from latent_ddpm.training.launch import run
from latent_ddpm.training.tracking import noted_of


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--hub_model_id")
    parser.add_argument("--hub_token")
    parser.add_argument("--hub_license")
    parser.add_argument("--hub_variants", nargs="+", choices=("fp16", "bf16"), default=[])
    parser.add_argument("--push_checkpoints", action="store_true")
    parser.add_argument("--hub_private_repo", action="store_true", default=None)
    parser.add_argument("--commit_message", default="Publish a run of latent-ddpm")
    parser.add_argument("--laid_out", type=Path, metavar="FOLDER", help="what a run laid out and could not publish")
    parser.add_argument("--dry_run", type=Path, metavar="FOLDER")
    options = parser.parse_args(argv)
    if not options.run_folder.is_dir():
        raise UserError(f"There is no run in {options.run_folder}.")
    check_repo_id(options.run_folder, options.hub_model_id)
    check_license(options.hub_license)
    few = (options.run_folder / "pipeline-few-steps" / "model_index.json").exists()
    chapter = noted_of(options.run_folder, FEW_STEPS)  # nothing if it was taken back
    if few and chapter and "finished_at" not in chapter:
        say("pipeline-few-steps is not published: its training is not finished. Run the training again.")
    few = few and "finished_at" in chapter
    stages = [None, FEW_STEPS] if few else [None]
    if options.laid_out is not None:
        stages = [FEW_STEPS if FEW_STEP_HUB in options.laid_out.parts else None]
    if options.dry_run is not None:
        if options.dry_run.exists():
            raise UserError(f"{options.dry_run} exists already.")
        name = options.hub_model_id or f"USER/{options.run_folder.resolve().name}"
        for stage in stages:
            few = stage == FEW_STEPS
            folder = options.dry_run.with_name(f"{options.dry_run.name}-few-steps") if few else options.dry_run
            checkpoints = options.push_checkpoints and not few
            lay_out(options.run_folder, folder, Scrubber(options.run_folder), stage, options.hub_variants, checkpoints)
            repo_id = few_step_repo_id(options.run_folder, name) if few else name
            write_card(folder, repo_id, options.hub_license)
            print(f"This would be published as {repo_id}: {folder}")
        return 0
    if options.hub_token:
        os.environ["HF_TOKEN"] = options.hub_token
    names = (few_step_repo_id(options.run_folder, options.hub_model_id) if s else options.hub_model_id for s in stages)
    for name in names:
        check_can_publish(options.run_folder, name, options.hub_private_repo, options.hub_license)

    done = []
    for stage in stages:
        publisher = Publisher(
            options.run_folder,
            options.hub_model_id,
            options.hub_private_repo,
            options.hub_license,
            options.hub_variants,
            stage,
            say,
            options.push_checkpoints and stage != FEW_STEPS,
        )
        publisher.push(options.commit_message, options.laid_out)
        done.append(publisher.finish())
    return 0 if all(done) else 1


if __name__ == "__main__":
    run(main)
