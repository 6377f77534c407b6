"""The pictures that a run leaves, learning curves, predictions on validation images and confused classes;
and that of a comparison of many."""

import csv
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
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
MATRIX = 12  # classes: up to so many, their confusion is a matrix that can be read
PAIRS = 15  # shown of more classes


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
    entitle(figure, title, 12)
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
    entitle(figure, title)
    figure.savefig(path, dpi=150)


def plot_confusion(counts: torch.Tensor, classes: list[str], path: Path, title: str) -> None:
    """Which classes are taken for which; counts[i, j]: how many images of class i are said to be j.

    The whole matrix of up to MATRIX classes, the PAIRS most confused pairs of more. Classes that no image
    has and none is said to be are left out.
    """
    met = (counts.sum(0) + counts.sum(1)).nonzero().flatten()
    counts, names = counts[met][:, met], [classes[i] for i in met]
    figure = plot_matrix(counts, names) if len(names) <= MATRIX else plot_pairs(counts, names)
    entitle(figure, title)
    figure.savefig(path, dpi=150)


def plot_matrix(counts: torch.Tensor, names: list[str]) -> Figure:
    """Each row a true class, in shares of its images; a row without images is blank."""
    shares = 100 * counts / counts.sum(1, keepdim=True)
    size = 0.5 * len(names)
    figure = Figure(figsize=(max(size + 2.2, 4), max(size + 1.4, 3)), layout="constrained")
    axes = figure.subplots()
    # The few percent that are the news would all be dark on a linear scale.
    shown = axes.imshow(shares.numpy(), cmap="cividis", norm=PowerNorm(0.4, 0, 100))
    for i, row in enumerate(shares.tolist()):
        for j, share in enumerate(row):
            if share > 0:
                text = f"{share:.{0 if share >= 9.95 else 1}f}" if share >= 0.05 else "<.1"
                colour = "black" if shown.norm(share) > 0.5 else "white"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=8)
    labels, places = [shorten(name) for name in names], range(len(names))
    axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, labels)
    for text in axes.get_xticklabels() + axes.get_yticklabels():
        text.set(fontsize=8, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    bar = figure.colorbar(shown, shrink=0.8, ticks=[0, 1, 5, 20, 50, 100])
    bar.set_label("% of the images of the true class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    axes.tick_params(length=0)
    for side in (axes, bar.ax):
        side.spines[:].set_visible(False)
    return figure


def plot_pairs(counts: torch.Tensor, names: list[str]) -> Figure:
    """The most confused pairs as bars, as many as images are taken for the other class."""
    of, wrong = counts.sum(1).tolist(), counts.clone().fill_diagonal_(0)
    pairs = [(wrong[i, j].item(), i, j) for i, j in wrong.nonzero().tolist()]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], of[pair[1]]))[:PAIRS]
    figure = Figure(figsize=(8, 0.27 * max(len(pairs), 3) + 1.2), layout="constrained")
    axes = figure.subplots()
    labels = [f"{shorten(names[i], 24)} → {shorten(names[j], 24)}" for _, i, j in pairs]
    bars = axes.barh(range(len(pairs)), [n for n, _, _ in pairs], color=ORANGE)
    notes = [f"{n} of {of[i]}, {100 * n / of[i]:.0f} %" for n, i, _ in pairs]
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    for text in axes.get_yticklabels():
        text.set(parse_math=False)
    axes.set_ylim(max(len(pairs), 3) - 0.5, -0.5)
    axes.margins(x=0.3)  # for the notes
    axes.set_xticks([])
    axes.set_title(
        "true → predicted" if pairs else "all images are said to be what they are", size=9
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def entitle(figure: Figure, title: str, size: float = 10) -> None:
    """The figure's title, in letters that are small enough to fit in."""
    text = figure.suptitle(printable(title), fontsize=size, parse_math=False)
    text.set_fontsize(size * min(1, 0.95 * figure.bbox.width / text.get_window_extent().width))


def check_figure(path: Path, flag: str) -> None:
    """Raise ValueError for a picture that could not be written, before the work is done."""
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ValueError(
            f"{flag} {path}: expected a name that ends in .{', .'.join(sorted(known))}"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.parent} is no folder; make it first")


def shorten(name: str, length: int = 13) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def printable(text: str) -> str:
    """With ? for what a file's name may have, bytes that are no UTF-8: matplotlib fails at them."""
    return text.encode("utf-8", "replace").decode()


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
    figure.suptitle(printable(title), parse_math=False)
    figure.savefig(path, dpi=150, format="png")


def plot_means(axes, method: str, rows: list[dict], places: list[float], split: str) -> None:
    """The line of a method, with error bars where there is a standard deviation."""
    if rows:
        means, stds = zip(*(row[split] for row in rows), strict=True)
        stds = None if None in stds else [100 * std for std in stds]
        means = [100 * mean for mean in means]
        style = {"marker": LINES[method][1], "color": LINES[method][0], "capsize": 3}
        axes.errorbar(places, means, stds, label=NAMES[method], **style)
