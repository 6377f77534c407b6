"""The pictures that a run leaves: its learning curves, and predictions on validation images."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import (
    Figure,  # no pyplot: it would pick a display and keep every figure open
)

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart without colour vision too (Okabe and Ito)


def plot_curves(metrics: Path, path: Path, title: str) -> None:
    """Loss and validation accuracy against epochs, out of a run's metrics.csv."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))

    def series(key):
        points = [(float(row["epoch"]), float(row[key])) for row in rows if row[key]]
        return zip(*points, strict=True) if points else ((), ())

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*series("train_loss"), color=ORANGE, label="train")
    left.plot(*series("val_loss"), color=BLUE, marker="o", label="validation")
    left.set(xlabel="epoch", ylabel="cross-entropy", ylim=(0, None))
    left.legend(frameon=False)
    epochs, accuracies = series("val_accuracy")
    accuracies = [100 * accuracy for accuracy in accuracies]
    right.plot(epochs, accuracies, color=BLUE, marker="o")
    if accuracies:
        best = int(np.argmax(accuracies))
        right.annotate(
            f"{accuracies[best]:.1f} %",
            (epochs[best], accuracies[best]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="center",
        )
    right.set(xlabel="epoch", ylabel="validation accuracy (%)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=150)


def colours(images: torch.Tensor, preprocessing: dict) -> torch.Tensor:
    """Images (N, 3, H, W) as the model has them, back in 0..1."""
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    return images * std + mean


def plot_predictions(
    images: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    classes: list[str],
    path: Path,
    title: str,
    notes: list[str] | None = None,
) -> None:
    """Images (N, 3, H, W) in 0..1 with the predicted class; where it is wrong, the true one too.

    labels: (N,) the true classes, None if nobody knows them.
    notes: a line more for each image, such as the name of its file.
    """
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    width = max(1.35 * columns, 4)  # inches; a narrower figure would cut its title off
    figure = Figure(figsize=(width, 1.6 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    probabilities = logits.softmax(-1)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, (axes, image, p) in enumerate(zip(grid.flat, images, probabilities, strict=False)):
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        guess = int(p.argmax())
        text = f"{shorten(classes[guess])} {100 * p[guess]:.0f} %"
        right = labels is None or guess == int(labels[i])
        if not right:
            text += f"\nis {shorten(classes[labels[i]])}"
        if notes:
            text += f"\n{shorten(notes[i], 18)}"
        axes.set_title(
            text,
            fontsize=8,
            color=BLUE if right else ORANGE,
            weight="normal" if right else "bold",
            parse_math=False,  # a class may be called $5
        )
    figure.suptitle(title, fontsize=10, parse_math=False)
    figure.savefig(path, dpi=150)


def shorten(name: str, length: int = 13) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
