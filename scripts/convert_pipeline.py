"""Convert a pipeline folder: to another pipeline class, or to another decoder.

    python scripts/convert_pipeline.py outputs/mnist/pipeline                  to LatentDDPMPipeline
    python scripts/convert_pipeline.py outputs/mnist/pipeline --to ldm         back to LDMPipeline
    python scripts/convert_pipeline.py outputs/mnist/pipeline --decoder outputs/decoder/autoencoder

`--decoder` takes the result of train_autoencoder.py with `--init_from` and `--freeze_encoder`: its latents are those of
the pipeline, so the U-Net stays valid.

The classes are for folders that were exported or published as LDMPipeline, should diffusers drop that class. Weights
and configs stay. A repository of the Hub is converted in a local copy: `hf download USER/NAME --local-dir COPY`, this
script on COPY, then `hf upload USER/NAME COPY`.
"""

import argparse
from pathlib import Path

from latent_ddpm.publishing.export import convert_pipeline, replace_decoder
from latent_ddpm.training.launch import run


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with a model_index.json")
    parser.add_argument("--to", choices=("latent_ddpm", "ldm"), default="latent_ddpm")
    parser.add_argument("--decoder", type=Path, metavar="AUTOENCODER", help="a folder of an autoencoder")
    options = parser.parse_args(argv)
    if options.decoder is not None:
        replace_decoder(options.folder, options.decoder)
        print(f"{options.folder} has the new decoder.")
        return 0
    changed = convert_pipeline(options.folder, options.to == "latent_ddpm")
    name = "LatentDDPMPipeline" if options.to == "latent_ddpm" else "LDMPipeline"
    print(f"{options.folder} {'is now' if changed else 'already is'} a {name}.")
    if options.to == "latent_ddpm":
        print(
            f"It loads with DiffusionPipeline.from_pretrained({str(options.folder)!r}, "
            f"custom_pipeline={str(options.folder)!r}, trust_remote_code=True)."
        )
    return 0


if __name__ == "__main__":
    run(main)
