"""The pictures of a run of train_sdxl.py: samples of its prompts as the training goes on, and its curves."""

import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave

from engine.files import atomic
from engine.pictures import BLUE, NAMES, ORANGE, entitle, save, shorten

SIDE = 512  # pixels of a sample in its file, at most
ROWS = 8  # of samples.png


def draw_run(run) -> None:
    """curves.png and samples.png of a run of train_sdxl.py."""
    config, folder = run.config, run.folder
    what = f"{NAMES[config.adapter]} rank {config.rank}: {run.trainable:,} trainable parameters"
    plot_losses(folder / "metrics.csv", folder / "curves.png", what)
    files = {int(file.stem): file for file in sorted((folder / "samples").glob("*.png"))}
    strips = {f"epoch {n / run.steps:g}" if n else "before": file for n, file in files.items()}
    plot_samples(strips, run.dataset.prompts, folder / "samples.png", what)


def save_strip(pictures: torch.Tensor, file: Path) -> None:
    """Write pictures (N, 3, height, width) in 0..1 side by side into a PNG file."""
    if (scale := SIDE / max(pictures.shape[2:])) < 1:
        pictures = F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=True)
    strip = torch.cat(list(pictures), -1).clamp(0, 1).permute(1, 2, 0)
    file.parent.mkdir(exist_ok=True)
    with atomic(file) as temporary:
        imsave(temporary, strip.numpy(), format="png")


def plot_samples(strips: dict[str, Path], prompts: list[str], path: Path, title: str) -> None:
    """Draw strips of the same prompts and noise one below another.

    strips: by what stands beside each. Of more than ROWS, the first, the last and some between are drawn.
    """
    names = list(strips)
    if len(names) > ROWS:
        names = [names[round(i * (len(names) - 1) / (ROWS - 1))] for i in range(ROWS)]
    width = max(4, 1.6 * len(prompts) + 0.6)  # inches
    figure = Figure(figsize=(width, 1.7 * len(names) + 0.6), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, squeeze=False).flat, names, strict=True):
        strip = imread(strips[name])
        axes.imshow(strip, interpolation="nearest" if len(strip) < 128 else None)
        axes.set_ylabel(name, fontsize=9)
        side = strip.shape[1] / len(prompts)
        axes.set_xticks([side * (i + 0.5) for i in range(len(prompts))])
        axes.set_xticklabels([])
        axes.set_yticks([])
        axes.tick_params(length=0)
    axes.set_xticklabels([shorten(prompt, 24) for prompt in prompts], fontsize=8, parse_math=False)
    entitle(figure, title)
    save(figure, path, dpi=130)


def plot_losses(metrics: Path, path: Path, title: str) -> None:
    """Draw training and held-out loss against epochs, from a run's metrics.csv."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for key, colour, marker, label in (
        ("train_loss", ORANGE, None, "training"),
        ("val_loss", BLUE, "o", "held out (fixed noise and timesteps)"),
    ):
        points = [(float(row["epoch"]), float(row[key])) for row in rows if row[key]]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label)
    axes.set(xlabel="epoch", ylabel="mean squared error")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    entitle(figure, title, 12)
    save(figure, path)
