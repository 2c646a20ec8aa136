"""Training curves of one run or several, from their metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from latent_ddpm.training.metrics import read_metrics

# per stage, the logged figures to plot, each in its own axes: (keys, label, logarithmic)
PANELS = {
    "autoencoder": (
        (("reconstruction_loss",), "reconstruction loss", True),
        (("validation_psnr",), "validation PSNR / dB", False),
        (("codebook_usage", "validation_codebook_usage"), "codes in use", False),
        (("discriminator_loss",), "discriminator loss", False),
        (("grad_norm",), "gradient norm", True),
    ),
    "unet": (
        (("loss", "validation_loss"), "loss", True),
        (("grad_norm",), "gradient norm", True),
        (("images_per_second",), "images/s", False),
    ),
    "self_guidance": ((("loss",), "loss", True),),
    "few_steps": ((("loss",), "loss", True),),
}
STAGES = {"autoencoder": "autoencoder", "unet": "U-Net", "self_guidance": "self-guidance", "few_steps": "few steps"}
POINTS = 400  # maximum number of points per curve; neighbours are averaged


def overall_speed(path: Path) -> float:
    """Images per second of wall-clock, from the first logged step of a stage's metrics.jsonl to the last."""
    lines = [line for line in read_metrics(path) if "loss" in line]
    return (lines[-1]["images"] - lines[0]["images"]) / (lines[-1]["time"] - lines[0]["time"])


def smoothed(values: Sequence[float], points: int = POINTS) -> list[float]:
    """Means of neighbouring values, at most `points` of them."""
    width = -(-len(values) // points)
    groups = [values[start : start + width] for start in range(0, len(values), width)]
    return [sum(group) / len(group) for group in groups]


def draw_curves(runs: dict[str, Path], picture: Path) -> Path | None:
    """Draw the curves of one or more runs in the same axes.

    Args:
        runs: by the name that stands in the legend ("" for a single one), the metrics.jsonl.
        picture: a .png, .svg or .pdf to be written.

    Returns:
        `picture`, or None where nothing was logged.
    """
    records = {name: read_metrics(path) for name, path in runs.items()}
    panels = []
    for stage, rows in PANELS.items():
        for keys, label, logarithmic in rows:
            lines = []
            for number, (name, lines_of_run) in enumerate(records.items()):
                for key, style in zip(keys, ("-", "--"), strict=False):
                    found = [(r["images"], r[key]) for r in lines_of_run if r["stage"] == stage and key in r]
                    if found:
                        images, values = (smoothed(column) for column in zip(*found, strict=True))
                        held_out = key.startswith("validation_") and len(keys) > 1
                        label_of_line = f"{name}, held out" if held_out else name
                        lines.append((images, values, f"C{number % 10}", style, label_of_line.strip(", ")))
            if lines:
                panels.append((f"{STAGES[stage]}: {label}", logarithmic, lines))
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (title, logarithmic, lines) in zip(grid[: len(panels)], panels, strict=True):
        for images, values, colour, style, label in lines:
            marker = "o" if len(values) < 12 else None
            axes.plot(images, values, style, color=colour, label=label, marker=marker, markersize=3, linewidth=1.2)
        if logarithmic and all(value > 0 for line in lines for value in line[1]):
            axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("images")
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
    return picture


def draw_scales(distances: dict[str, float], picture: Path) -> None:
    """Draw the distance of samples over the guidance scale; a dot marks the best one.

    Args:
        distances: by scale.
        picture: a .png, .svg or .pdf to be written.
    """
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes, best = figure.add_subplot(), min(distances, key=distances.get)
    axes.plot([float(scale) for scale in distances], list(distances.values()), marker=".")
    axes.plot([float(best)], [distances[best]], marker="o")
    axes.set_xlabel("guidance scale (1 is none)")
    axes.set_ylabel("distance of samples to real latents")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
