"""A browser demo of a trained pipeline: a local folder, or a repository of the Hub.

    python scripts/demo.py outputs/mnist/pipeline          (pip install gradio first)
    python scripts/demo.py USER/NAME --port 7861
    python scripts/demo.py USER/NAME --push_to_hub USER/NAME-demo      publishes it as a Space instead

It shows a grid for a seed, other schedulers and numbers of steps, interpolation between two seeds, the prediction after
each step, and reconstructions of your own images. A Space consists of this file and pipeline_latent_ddpm.py, so it runs
no code from a model's repository.
"""

import argparse
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # in a Space the pipeline is beside this file

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

try:
    import gradio as gr
except ImportError:
    sys.exit("error: the demo needs gradio: pip install gradio")

from pipeline_latent_ddpm import DEFAULT_STEPS, LatentDDPMPipeline, downsampling_of, image_channels_of

MAX_IMAGES, MAX_STEPS, FILM_FRAMES, BETWEEN = 64, 250, 12, 9
SCHEDULERS = {
    "as published": None,
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "DPM-Solver++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
FLOW_SCHEDULERS = ("as published", "DPM-Solver++ 2M", "UniPC")  # the others do not support flow prediction


def normal(pipeline: LatentDDPMPipeline, seed: int, count: int) -> torch.Tensor:
    """Starting noise (count, C, h, w) of a seed; image k has the same noise in every grid of the seed."""
    config = pipeline.unet.config
    shape = (config.out_channels, config.sample_size, config.sample_size)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + k)) for k in range(count)]
    return torch.stack(rows).to(pipeline.device)


def between(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Noise on the great circle from `first` to `last` (both (1, C, h, w)), `share` in [0, 1] of the way."""
    cosine = torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0).clamp(-0.9999, 0.9999)
    angle = torch.arccos(cosine)
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * last) / torch.sin(angle)


def enlarged(image: Image.Image, side: int = 256) -> Image.Image:
    """Enlarge a small picture so that its pixels are visible."""
    factor = max(1, side // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def sheet(images: list[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    page = Image.new(images[0].mode, (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for number, image in enumerate(images):
        page.paste(image, (number % columns * (width + 2), number // columns * (height + 2)))
    return page


class Demo:
    """What the page's buttons do.

    Args:
        name: a folder or a repository.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pipeline = LatentDDPMPipeline.from_pretrained(name)
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.published = self.pipeline.scheduler
        self.turn = threading.Lock()  # one at a time: the schedulers count steps
        is_flow = self.published.config.get("prediction_type") == "flow_prediction"
        self.schedulers = [label for label in SCHEDULERS if not is_flow or label in FLOW_SCHEDULERS]

    def draw(self, noise: torch.Tensor, scheduler: str, steps: int, **options: object) -> list[Image.Image]:
        """Images from noise (B, C, h, w)."""
        generators = [torch.Generator(self.pipeline.device).manual_seed(k) for k in range(len(noise))]
        with self.turn:
            if SCHEDULERS[scheduler] is None:
                self.pipeline.scheduler = self.published
            else:
                class_name, changes = SCHEDULERS[scheduler]
                scheduler_class = getattr(diffusers, class_name)
                self.pipeline.scheduler = scheduler_class.from_config(self.published.config, **changes)
            return self.pipeline(len(noise), int(steps), latents=noise, generator=generators, **options).images

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Pictures of latents (B, C, h, w)."""
        pixels = (self.pipeline.decode(latents) / 2 + 0.5).float().cpu()
        return self.pipeline.numpy_to_pil(pixels.permute(0, 2, 3, 1).numpy())

    def told(self, guidance: float, name: str | None, text: str | None, image: Image.Image | None) -> dict:
        """What the pipeline is told of the conditions that the page has."""
        words: dict[str, object] = {}
        if name:
            words["class_labels"] = name
        if text:
            words["prompt"] = text
        if image is not None:
            if self.pipeline.config.get("conditioning_classes") and len(image.getbands()) > 1:
                image = image.convert("L")
            words["conditioning_image"] = image
        return {**words, "guidance_scale": guidance} if words else {}

    def grid(
        self,
        seed: float,
        count: float,
        scheduler: str,
        steps: float,
        guidance: float = 1.0,
        name: str | None = None,
        text: str | None = None,
        image: Image.Image | None = None,
    ) -> Image.Image:
        """New images of a seed, of what is asked for."""
        noise, told = normal(self.pipeline, int(seed), int(count)), self.told(guidance, name, text, image)
        try:
            images = self.draw(noise, scheduler, int(steps), **told)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        columns = max(1, round(len(images) ** 0.5))
        return enlarged(sheet(images, columns), 640)

    def interpolate(
        self, seed: float, other: float, share: float, scheduler: str, steps: float
    ) -> tuple[Image.Image, Image.Image]:
        """The image at `share` of the way from one seed's to another's, and a strip of the whole way."""
        ends = [normal(self.pipeline, int(number), 1) for number in (seed, other)]
        shares = [share, *(k / (BETWEEN - 1) for k in range(BETWEEN))]
        noise = torch.cat([between(*ends, share) for share in shares])
        images = self.draw(noise, scheduler, int(steps))
        return enlarged(images[0]), enlarged(sheet(images[1:], BETWEEN), 900)

    def film(self, seed: float, scheduler: str, steps: float) -> Image.Image:
        """What the model predicts of four images after each step, at most FILM_FRAMES of them, and the images."""
        frames: list[torch.Tensor] = []
        noise = normal(self.pipeline, int(seed), 4)
        shown = {round(k * (int(steps) - 1) / max(1, FILM_FRAMES - 1)) for k in range(FILM_FRAMES)}

        def keep(pipeline: LatentDDPMPipeline, step: int, t: torch.Tensor, tensors: dict) -> dict:
            if step in shown:
                frames.append(tensors["pred_original_sample"])
            return {}

        options = {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["pred_original_sample"]}
        images = self.draw(noise, scheduler, int(steps), **options)
        decoded = [self.decode(frame) for frame in frames]
        rows = [[column[row] for column in [*decoded, images]] for row in range(len(images))]
        return enlarged(sheet([image for row in rows for image in row], len(frames) + 1), 1000)

    def reconstruct(self, image: Image.Image) -> Image.Image:
        """An image, cut square, beside what the autoencoder makes of it."""
        vqvae = self.pipeline.vqvae
        side = self.pipeline.unet.config.sample_size * downsampling_of(vqvae)
        mode = "L" if image_channels_of(vqvae) == 1 else "RGB"
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.convert(mode).crop((left, top, left + short, top + short)).resize((side, side))
        pixels = VaeImageProcessor(vae_scale_factor=1).preprocess(square)  # (1, C, side, side) in -1 to 1
        return enlarged(sheet([square, *self.decode(self.pipeline.encode(pixels))], 2), 512)

    def page(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title=f"{self.name} - latent-ddpm") as page:
            gr.Markdown(f"# {Path(self.name).name if Path(self.name).exists() else self.name}")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
                few = self.pipeline.recorded_steps  # of a model that draws in few steps, without guidance
                steps = gr.Slider(1, MAX_STEPS, few or DEFAULT_STEPS, step=1, label="Steps")
                scheduler = gr.Dropdown(self.schedulers, value="as published", label="Scheduler")
            with gr.Tab("New images"):
                count = gr.Slider(1, MAX_IMAGES, 16, step=1, label="Images")
                names, has_map = self.pipeline.class_names, self.pipeline.conditioning_channels > 0
                has_text = self.pipeline.takes_text
                with gr.Row(visible=bool(names) or has_map or has_text):
                    name = gr.Dropdown(
                        [("any", ""), *names], value="", label="Class", visible=bool(names), elem_id="class"
                    )
                    text = gr.Textbox(label="Text", visible=has_text, elem_id="text")
                    image = gr.Image(label="Map or image", type="pil", image_mode=None, visible=has_map)
                    guidance = gr.Slider(0, 8, 1 if few else 2, step=0.25, label="Guidance")
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                grid = gr.Image(label="New images", elem_id="grid", format="png", interactive=False)
                inputs = [seed, count, scheduler, steps, guidance, name, text, image]
                button.click(self.grid, inputs, grid, api_name="draw")
            with gr.Tab("Between two"):
                other = gr.Number(1, label="Other seed", precision=0, minimum=0)
                share = gr.Slider(0, 1, 0.5, step=0.05, label="Position between the two seeds")
                go = gr.Button("Draw", elem_id="between")
                with gr.Row():
                    single = gr.Image(label="Image at this position", format="png", interactive=False)
                    strip = gr.Image(label="All positions", format="png", interactive=False)
                inputs = [seed, other, share, scheduler, steps]
                go.click(self.interpolate, inputs, [single, strip], api_name="interpolate")
                share.release(self.interpolate, inputs, [single, strip], api_visibility="private")
            with gr.Tab("Film"):
                roll = gr.Button("Draw", elem_id="roll")
                film = gr.Image(label="Predicted image after each step", format="png", interactive=False)
                roll.click(self.film, [seed, scheduler, steps], film, api_name="film")
            with gr.Tab("Your image"):
                given = gr.Image(label="Image", type="pil")
                both = gr.Image(label="Image and reconstruction", format="png", interactive=False)
                given.upload(self.reconstruct, given, both, api_name="reconstruct")
        return page


SPACE_HEAD = """---
title: {title}
sdk: gradio
sdk_version: {version}
app_file: app.py
models:
- {model}
---
A demo of [{model}](https://huggingface.co/{model}), made with latent-ddpm.
"""


def push(model: str, space: str) -> str:
    """Publish this page as a Space that shows a published model; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    url = api.create_repo(space, repo_type="space", space_sdk="gradio", exist_ok=True)
    here = Path(__file__).resolve()
    head = SPACE_HEAD.format(title=space.rpartition("/")[2], version=gr.__version__, model=model)
    packages = f"torch\ndiffusers=={diffusers.__version__}\ntransformers\n"
    pipeline = sys.modules[LatentDDPMPipeline.__module__].__file__
    files = {"app.py": here, "pipeline_latent_ddpm.py": Path(pipeline), "README.md": head.encode()}
    files |= {"requirements.txt": packages.encode(), "model_id.txt": model.encode()}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(url.repo_id, operations, commit_message=f"A demo of {model}", repo_type="space")
    return str(url)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a pipeline's folder, or a repository of the Hub")
    parser.add_argument("--port", type=int, default=None)
    parser.add_argument("--push_to_hub", metavar="USER/SPACE")
    options = parser.parse_args()
    beside = Path(__file__).resolve().parent / "model_id.txt"
    model = (
        options.model
        or os.environ.get("MODEL_ID")
        or (beside.read_text(encoding="utf-8").strip() if beside.exists() else None)
    )
    if model is None:
        parser.error("which model? Name a pipeline's folder, or a repository of the Hub.")
    if options.push_to_hub:
        if Path(model).exists():
            parser.error(f"a Space cannot reach {model}: publish it first, and name its repository")
        print(push(model, options.push_to_hub))
        return
    Demo(model).page().launch(server_port=options.port, show_error=True)


if __name__ == "__main__":
    main()
