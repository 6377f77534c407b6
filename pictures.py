"""The pictures that a run leaves, its learning curves and predictions on validation images, and that of a
comparison of many."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import (
    Figure,  # no pyplot: it would pick a display and keep every figure open
)
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

BLUE, ORANGE = "#0072B2", "#D55E00"  # told apart without colour vision too (Okabe and Ito)
NAMES = {
    "head": "linear probe",
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full fine-tuning",
}
LINES = {"lora": (BLUE, "o"), "loha": (ORANGE, "s"), "lokr": ("#009E73", "^")}


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


def plot_comparison(
    rows: list[dict], beside: list[dict], split: str, path: Path, title: str
) -> None:
    """Accuracy against trainable parameters; if there are rows beside, against the adapters' dropout too.

    rows: dicts of method, rank, dropout, trainable and, under split, (mean, std) of the accuracy, 0..1;
        std is None where there is one run only.
    split: "test" or "val".
    """
    figure = Figure(figsize=(9.6 if beside else 7, 4.4), layout="constrained")
    ratios = {"width_ratios": [1.7, 1]} if beside else {}
    left, *right = figure.subplots(1, 1 + bool(beside), squeeze=False, **ratios)[0]
    for method in LINES:
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["trainable"])
        plot_means(left, method, points, [r["trainable"] for r in points], split)
        side = (
            1 if method == "lora" else -1
        )  # of its line: above it, or where a rising one leaves room
        for row in points:
            left.annotate(
                row["rank"],
                (row["trainable"], 100 * row[split][0]),
                xytext=(-5 * side, 4 * side),
                textcoords="offset points",
                ha="right" if side > 0 else "left",
                va="bottom" if side > 0 else "top",
                color=LINES[method][0],
                fontsize=8,
                path_effects=[withStroke(linewidth=2, foreground="white")],  # over lines and bands
            )
    bands = sorted((r for r in rows if r["method"] not in LINES), key=lambda r: r[split][0])
    for row, style, at in zip(bands, (":", "--"), ("top", "bottom"), strict=False):
        mean, std = (100 * (part or 0) for part in row[split])
        left.axhspan(mean - std, mean + std, color="black", alpha=0.12, linewidth=0)
        left.axhline(mean, color="black", linestyle=style, linewidth=1)
        place = {"xycoords": left.get_yaxis_transform(), "va": at, "fontsize": 8}
        left.annotate(NAMES[row["method"]], (1.01, mean), annotation_clip=False, **place)
    left.set(xscale="log", xlabel="trainable parameters (at the points: rank)")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.xaxis.set_minor_formatter(NullFormatter())
    for axes in right:
        values = sorted({row["dropout"] for row in beside})
        for i, method in enumerate(LINES):
            points = [row for row in beside if row["method"] == method]
            apart = 0.012 * (i - 1) * (values[-1] - values[0])  # error bars side by side
            plot_means(axes, method, points, [row["dropout"] + apart for row in points], split)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xlabel(f"dropout of the adapters, rank {beside[0]['rank']}")
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.set_ylabel(f"{'validation' if split == 'val' else split} accuracy (%)")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=150, format="png")


def plot_means(axes, method: str, rows: list[dict], places: list[float], split: str) -> None:
    """The line of a method, with error bars where there is a standard deviation."""
    if rows:
        means, stds = zip(*(row[split] for row in rows), strict=True)
        stds = None if None in stds else [100 * std for std in stds]
        means = [100 * mean for mean in means]
        style = {"marker": LINES[method][1], "color": LINES[method][0], "capsize": 3}
        axes.errorbar(places, means, stds, label=NAMES[method], **style)
