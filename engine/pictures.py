"""The pictures of a run (learning curves, predictions, confused classes) and of a comparison of runs."""

import csv
import math
import textwrap
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure  # pyplot would pick a display and keep every figure open
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from engine.files import atomic, printable

BLUE, ORANGE = "#0072B2", "#D55E00"  # they differ without colour vision too (Okabe and Ito)
NAMES = {
    "head": "linear probe",
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full fine-tuning",
}
LINES = {"lora": (BLUE, "o"), "loha": (ORANGE, "s"), "lokr": ("#009E73", "^")}
MATRIX = 12  # with more classes, the matrix of confusions would be too small to read
PAIRS = 15  # of confused classes, which are shown instead
BELOW = 20  # percent below the best, where rates.png ends


def draw_run(run, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
    """curves.png of a run of train.py; confusion.png and predictions.png of its best epoch.

    images, logits, labels: of some validation images, for predictions.png.
    """
    config, classes, folder = run.config, run.dataset.classes, run.folder
    what = f"{config.dataset}, {NAMES[config.adapter]}"
    what += f" rank {config.rank}" if config.adapter in LINES else ""
    title = f"{what}: {run.trainable:,} trainable parameters"
    plot_curves(folder / "metrics.csv", folder / "curves.png", title)
    title = f"{what}: validation accuracy {run.best['val_accuracy']:.1%}"
    plot_confusion(run.extra["confusion"], classes, folder / "confusion.png", title)
    images = colours(images, run.info["preprocessing"])
    plot_predictions(images, logits, labels, classes, folder / "predictions.png", title)


def plot_curves(metrics: Path, path: Path, title: str) -> None:
    """Draw loss and validation accuracy against epochs, from a run's metrics.csv."""
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
    save(figure, path)


def colours(images: torch.Tensor, preprocessing: dict) -> torch.Tensor:
    """A model's input (N, 3, H, W) as colours in 0..1: normalisation undone."""
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
    """Draw images (N, 3, H, W) in 0..1 with the predicted class and, if that is wrong, the true one.

    labels: (N,) the true classes; None if they are not known.
    notes: one more line for each image, such as its file name.
    """
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    width = max(1.35 * columns, 4)  # inches; a narrower figure would cut off its title
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
    save(figure, path)


def plot_confusion(counts: torch.Tensor, classes: list[str], path: Path, title: str) -> None:
    """Draw which classes are confused. counts[i, j]: number of images of class i predicted as class j.

    Up to MATRIX classes give the whole matrix, more give the PAIRS most confused pairs. Classes that are
    neither true nor predicted for any image are left out.
    """
    present = (counts.sum(0) + counts.sum(1)).nonzero().flatten()
    counts, names = counts[present][:, present], [classes[i] for i in present]
    figure = plot_matrix(counts, names) if len(names) <= MATRIX else plot_pairs(counts, names)
    entitle(figure, title)
    save(figure, path)


def plot_matrix(counts: torch.Tensor, names: list[str]) -> Figure:
    """The matrix of confusions; each row has the shares of one true class, or is blank without images."""
    shares = 100 * counts / counts.sum(1, keepdim=True)
    size = 0.5 * len(names)
    figure = Figure(figsize=(max(size + 2.2, 4), max(size + 1.4, 3)), layout="constrained")
    axes = figure.subplots()
    # On a linear scale, the few percent that matter would all be dark.
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
    """The most confused pairs of classes; the length of a bar is the number of confused images."""
    totals, wrong = counts.sum(1).tolist(), counts.clone().fill_diagonal_(0)
    pairs = [(wrong[i, j].item(), i, j) for i, j in wrong.nonzero().tolist()]
    pairs = sorted(pairs, key=lambda pair: (-pair[0], totals[pair[1]]))[:PAIRS]
    figure = Figure(figsize=(8, 0.27 * max(len(pairs), 3) + 1.2), layout="constrained")
    axes = figure.subplots()
    labels = [f"{shorten(names[i], 24)} → {shorten(names[j], 24)}" for _, i, j in pairs]
    bars = axes.barh(range(len(pairs)), [n for n, _, _ in pairs], color=ORANGE)
    notes = [f"{n} of {totals[i]}, {100 * n / totals[i]:.0f} %" for n, i, _ in pairs]
    axes.bar_label(bars, notes, padding=4, fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    for text in axes.get_yticklabels():
        text.set(parse_math=False)
    axes.set_ylim(max(len(pairs), 3) - 0.5, -0.5)
    axes.margins(x=0.3)  # for the notes
    axes.set_xticks([])
    axes.set_title("true → predicted" if pairs else "no confusions", size=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def entitle(figure: Figure, title: str, size: float = 10) -> None:
    """Set the figure's title, in letters small enough to fit."""
    text = figure.suptitle(printable(title), fontsize=size, parse_math=False)
    text.set_fontsize(size * min(1, 0.95 * figure.bbox.width / text.get_window_extent().width))


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Write the figure in the format that the file's name says."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix.removeprefix("."))


def check_figure(path: Path, flag: str) -> None:
    """Raise ValueError if the picture cannot be written, before the work is done."""
    formats = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(
            f"{flag} {path}: expected a name that ends in .{', .'.join(sorted(formats))}"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.parent} is not a folder; make it first")


def shorten(name: str, length: int = 13) -> str:
    name = printable(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def plot_comparison(
    rows: list[dict], dropouts: list[dict], split: str, path: Path, title: str
) -> None:
    """Draw accuracy against trainable parameters (rows), and against dropout if there are dropouts.

    rows, dropouts: dicts with method, rank, dropout, trainable and, under split, (mean, std) of the accuracy
        in 0..1; std is None for a single run.
    split: "test" or "val".
    """
    figure = Figure(figsize=(9.6 if dropouts else 7, 4.4), layout="constrained")
    ratios = {"width_ratios": [1.7, 1]} if dropouts else {}
    left, *right = figure.subplots(1, 1 + bool(dropouts), squeeze=False, **ratios)[0]
    for method in LINES:
        points = sorted((r for r in rows if r["method"] == method), key=lambda r: r["trainable"])
        plot_means(left, method, points, [r["trainable"] for r in points], split)
        side = (
            1 if method == "lora" else -1
        )  # labels above the line and left of points, or opposite
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
    for row, style, alignment in zip(bands, (":", "--"), ("top", "bottom"), strict=False):
        mean, std = (100 * (part or 0) for part in row[split])
        left.axhspan(mean - std, mean + std, color="black", alpha=0.12, linewidth=0)
        left.axhline(mean, color="black", linestyle=style, linewidth=1)
        place = {"xycoords": left.get_yaxis_transform(), "va": alignment, "fontsize": 8}
        left.annotate(NAMES[row["method"]], (1.01, mean), annotation_clip=False, **place)
    left.set(xscale="log", xlabel="trainable parameters (at the points: rank)")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter(EngFormatter(sep=""))
    left.xaxis.set_minor_formatter(NullFormatter())
    for axes in right:
        values = sorted({row["dropout"] for row in dropouts})
        for i, method in enumerate(LINES):
            points = [row for row in dropouts if row["method"] == method]
            shift = 0.012 * (i - 1) * (values[-1] - values[0])  # error bars side by side
            plot_means(axes, method, points, [row["dropout"] + shift for row in points], split)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xlabel(f"dropout of the adapters, rank {dropouts[0]['rank']}")
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.set_ylabel(f"{'validation' if split == 'val' else split} accuracy (%)")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(printable(title), parse_math=False)
    save(figure, path)


def plot_means(axes, method: str, rows: list[dict], places: list[float], split: str) -> None:
    """Draw the line of a method, with error bars if every point has a standard deviation."""
    if rows:
        means, stds = zip(*(row[split] for row in rows), strict=True)
        stds = None if None in stds else [100 * std for std in stds]
        means = [100 * mean for mean in means]
        style = {"marker": LINES[method][1], "color": LINES[method][0], "capsize": 3}
        axes.errorbar(places, means, stds, label=NAMES[method], **style)


def plot_rates(panels: dict[str, dict], path: Path) -> None:
    """Draw validation accuracy against the learning rate: by title, a panel for each comparison.

    panels: what report.trials returns. A colour is a method, a style of line a rank. Where runs fail at high
        rates, the lines leave the picture.
    """
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 + 3.4 * columns, 1 + 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    keys = [key for curves in panels.values() for key in curves]
    ranks = sorted({rank for _, rank in keys if rank})
    styles = dict(zip(reversed(ranks), cycle(("-", "--", "-.", ":"))))
    lines = {"head": ("0.6", "."), "full": ("black", "."), **LINES}
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for (method, rank), points in curves.items():
            lrs, accuracies = zip(*points, strict=True)
            colour, marker = lines[method]
            look = {"color": colour, "marker": marker, "markersize": 4}
            axes.plot(lrs, [100 * value for value in accuracies], styles.get(rank, "-"), **look)
        values = [100 * accuracy for points in curves.values() for _, accuracy in points]
        best = max(values, default=100)
        axes.set_ylim(max(min(values, default=0) - 1, best - BELOW), best + 1)
        axes.set(xscale="log", xlabel="learning rate")
        axes.set_title(textwrap.fill(printable(title), 48), fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy (%)")
    shown = [method for method in lines if method in dict(keys)]
    handles = [Line2D([], [], color=lines[m][0], marker=lines[m][1], label=NAMES[m]) for m in shown]
    handles += [Line2D([], [], color="0.4", linestyle=styles[r], label=f"rank {r}") for r in ranks]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    save(figure, path)
