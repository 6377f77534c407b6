"""Draw what adapters have learnt for one layer: each delta W, and their singular values in one panel.

    python spectra.py runs/lora runs/loha runs/lokr --out delta.png
    python spectra.py runs/lora runs/loha runs/lokr --norms norms.png    # and how far each layer has moved
    python spectra.py a.safetensors b.safetensors --layer encoder.layers.encoder_layer_0.self_attention.query

The numbers in the picture are also printed, one line for each adapter. Exit status: 0; 2 for a mistake of
the user.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import lokr
from engine import checkpoint
from engine.adapt import ADAPTERS, relative_norms
from engine.config import Parser
from engine.pictures import BLUE, NAMES, ORANGE, check_figure, entitle, save, shorten
from engine.start import load

# Okabe and Ito's colours differ without colour vision too; the marks differ without any colour.
MARKS = [(BLUE, "o"), (ORANGE, "s"), ("#000000", "^"), ("#009E73", "D")]
MARKS += [("#CC79A7", "v"), ("#56B4E9", "P")]
# The end of a layer's name: what it is called in norms.png.
KINDS = {kind: kind for kind in ("query", "key", "value", "out")}
KINDS |= {"mlp.0": "MLP, first", "mlp.3": "MLP, second"}
SIDE = 192  # most rows or columns in an image; of a larger delta W every second, third ... is shown
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


@dataclass
class Delta:
    """What one adapter adds to a layer."""

    label: str
    numbers: int  # trained parameters of this layer's adapter
    delta: torch.Tensor  # (out, in), float64
    relative_norm: float  # ||delta W|| / ||W||
    blocks: tuple[int, int]  # rows and columns of LoKr's W1; (1, 1) for the other adapters
    values: torch.Tensor  # singular values, largest first

    @property
    def rank(self) -> int:
        """The numerical rank: the number of singular values above rounding errors, as in matrix_rank."""
        least = max(self.delta.shape) * torch.finfo(torch.float64).eps * self.values[0]
        return int((self.values > least).sum())


def read(path: str, weights: str | None) -> tuple[nn.Module, dict]:
    """(model, info) as load_adapter returns them. ValueError if the file holds no adapter."""
    model, info = load(path, weights)
    if info["adapter"] not in ADAPTERS:
        expected = ", ".join(ADAPTERS)
        raise ValueError(
            f"{path}: adapter: expected one of {expected}, found {info['adapter']!r}, which has no delta W"
        )
    return model, info


def pick(path: str, norms: dict[str, float], layer: str | None) -> str:
    """layer, or without one the layer that its adapter changed most. ValueError if layer is not adapted."""
    if layer and layer not in norms:
        adapted = ", ".join(norms)
        raise ValueError(f"--layer {layer}: not adapted in {path}; expected one of: {adapted}")
    return layer or max(norms, key=norms.get)


@torch.no_grad()
def measure(module: nn.Module, info: dict) -> Delta:
    """The Delta of one adapter. In float64, so that rounding errors are far smaller than the weights."""
    numbers = sum(p.numel() for p in module.parameters(recurse=False))
    module = module.double()
    delta = module.delta_weight()
    label, blocks = f"{NAMES[info['adapter']]} rank {info['rank']}", (1, 1)
    if info["adapter"] == "lokr":
        blocks = tuple(lokr.factorization(size, info["factor"])[0] for size in delta.shape)
        label += f", {blocks[0]} x {blocks[1]} blocks"
    relative_norm = (delta.norm() / module.linear.weight.norm()).item()
    return Delta(label, numbers, delta, relative_norm, blocks, torch.linalg.svdvals(delta))


def draw(shown: list[Delta], title: str, path: Path) -> None:
    """Draw each delta W as an image, and below them the singular values of all."""
    figure = Figure(figsize=(max(2.75 * len(shown), 5.5), 5.4), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1.4, 1))
    above = [figure.add_subplot(grid[0, i]) for i in range(len(shown))]
    for axes, adapter in zip(above, shown, strict=True):
        image = draw_delta(axes, adapter)
    bar = figure.colorbar(image, ax=above, shrink=0.7, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["−", "0", "+"])
    bar.set_label("delta W, each in its own range", fontsize=8)
    draw_spectra(figure.add_subplot(grid[1, :]), shown)
    entitle(figure, title)
    save(figure, path)


def draw_delta(axes, adapter: Delta):
    """Draw delta W as an image. LoKr's blocks are framed, and a few of them get a number: the block as a
    multiple of the strongest one, of W2."""
    n_out, n_in = adapter.delta.shape
    steps = [-(-size // SIDE) for size in (n_out, n_in)]
    part = adapter.delta[:: steps[0], :: steps[1]].numpy()
    limit = np.quantile(np.abs(part), 0.995)  # a few large numbers would make all others pale
    place = {"extent": (0, n_in, n_out, 0), "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(part / (limit or 1), cmap="PuOr", vmin=-1, vmax=1, **place)
    axes.set_title(
        f"{adapter.label}\n{adapter.numbers:,} numbers, rank of delta W {adapter.rank}", fontsize=8
    )
    for name, step, n, set_label in (
        ("outputs", steps[0], n_out, axes.set_ylabel),
        ("inputs", steps[1], n_in, axes.set_xlabel),
    ):
        set_label(f"{n} {name}" + (f", one in {step} shown" if step > 1 else ""), fontsize=8)
    axes.set(xticks=[], yticks=[], box_aspect=1)
    rows, columns = adapter.blocks
    line = {"color": "black", "linewidth": min(0.8, 6 / max(rows, columns))}
    for i in range(1, rows):
        axes.axhline(i * n_out / rows, **line)
    for j in range(1, columns):
        axes.axvline(j * n_in / columns, **line)
    if 1 < max(rows, columns) <= 4:  # more numbers would be too small to read
        for i, row in enumerate(multiples(adapter.delta, adapter.blocks).tolist()):
            for j, multiple in enumerate(row):
                middle = ((j + 0.5) * n_in / columns, (i + 0.5) * n_out / rows)
                text = f"{multiple:+.2f}{' W2' if columns <= 2 else ''}".replace("-", "−")
                axes.text(*middle, text, ha="center", va="center", fontsize=8, bbox=WHITE)
    return image


def multiples(delta: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    """(rows, columns) numbers: each block of a Kronecker product as a multiple of its strongest block."""
    parts = delta.reshape(blocks[0], -1, blocks[1], delta.shape[1] // blocks[1])
    parts = parts.transpose(1, 2).flatten(2)  # (rows, columns, numbers of a block)
    strongest = parts.flatten(0, 1)[parts.norm(dim=2).argmax()]
    return parts @ strongest / (strongest @ strongest)


def draw_spectra(axes, shown: list[Delta]) -> None:
    """Draw the singular values up to the rank, divided by the largest."""
    lowest = 0.1
    for adapter, (colour, mark) in zip(shown, itertools.cycle(MARKS)):
        values = (adapter.values / adapter.values[0])[: adapter.rank].tolist()
        style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1}
        label = f"{adapter.label}: ||delta W|| = {adapter.relative_norm:.2f} ||W||"
        marked = [*range(0, adapter.rank - 1, max(1, adapter.rank // 32)), adapter.rank - 1]
        axes.plot(range(1, adapter.rank + 1), values, label=label, markevery=marked, **style)
        if values:
            text, end = f"rank {adapter.rank}", (adapter.rank, values[-1])
            note = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "bbox": WHITE}
            axes.annotate(text, end, fontsize=8, color=colour, **note)
            lowest = min(lowest, values[-1])
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.5, 1.3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(f"index of the singular value, 1 to {len(shown[0].values)}", fontsize=8)
    axes.set_ylabel("singular value / the largest", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def draw_norms(shown: list[tuple[str, dict[str, float]]], path: Path) -> None:
    """Draw ||delta W|| / ||W|| of every layer, a panel for each adapter: a line is a kind of layer.

    shown: (label, norms by the layer's name).
    """
    figure = Figure(figsize=(max(2.9 * len(shown), 5.5), 3.9), layout="constrained")
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (label, norms) in zip(grid, shown, strict=True):
        for (end, kind), (colour, mark) in zip(KINDS.items(), MARKS, strict=True):
            points = [
                (int(name.split("encoder_layer_")[1].split(".")[0]) + 1, norm)
                for name, norm in norms.items()
                if name.endswith(f".{end}")
            ]
            if points:
                style = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1}
                axes.plot(*zip(*points, strict=True), label=kind, **style)
        axes.set_title(label, fontsize=8)
        axes.set_xlabel("block", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    grid[0].set_ylim(0, None)
    grid[0].set_ylabel("||delta W|| / ||W||", fontsize=8)
    lines = {t: h for axes in grid for h, t in zip(*axes.get_legend_handles_labels(), strict=True)}
    place = {"loc": "outside lower center", "ncols": 6, "frameon": False, "fontsize": 8}
    figure.legend(lines.values(), lines.keys(), **place)
    save(figure, path)


def run(argv: list[str] | None) -> None:
    parser = Parser(description="Draw what adapters have learnt for one layer.")
    add = parser.add_argument
    add("adapters", nargs="+", help="adapter files, folders of runs, or PEFT folders")
    add(
        "--layer",
        help="its name in the model (default: the layer that the first adapter changed most)",
    )
    add("--out", default="delta.png", metavar="FILE", help="the picture (default: delta.png)")
    add("--norms", metavar="FILE", help="draw ||delta W|| / ||W|| of every layer there")
    add("--weights", help="pretrained weights: a name or a file (default: as in training)")
    given = parser.parse_args(argv)
    check_figure(Path(given.out), "--out")
    if given.norms:
        check_figure(Path(given.norms), "--norms")
        if Path(given.norms).absolute() == Path(given.out).absolute():
            raise ValueError(f"--norms {given.norms}: --out is the same file; choose another name")
    shown, norms, layer = [], [], given.layer
    for path in given.adapters:
        model, info = read(path, given.weights)
        norms.append(relative_norms(model))
        layer = pick(path, norms[-1], layer)
        adapter = measure(model.get_submodule(layer), info)
        shown.append(adapter)
        print(
            f"{path}: {adapter.label}, {layer}: {adapter.numbers:,} numbers, rank of delta W {adapter.rank}, "
            f"||delta W|| / ||W|| {adapter.relative_norm:.3f}"
        )
    labels = {adapter.label for adapter in shown}
    if len(labels) < len(shown):  # file names make equal labels different
        for path, adapter in zip(map(Path, given.adapters), shown, strict=True):
            path = path.resolve()
            place = path.parent if path.name == checkpoint.ADAPTER_FILE else path
            # Not a folder's stem: those of compare.py's runs have a point in their names ("lr0.005").
            name = place.name if place.is_dir() else place.stem
            adapter.label = f"{shorten(name, 30)}: {adapter.label}"
    draw(shown, f"delta W of {layer}", Path(given.out))
    if given.norms:
        labels = [adapter.label.split(",")[0] for adapter in shown]  # blocks are those of one layer
        draw_norms(list(zip(labels, norms, strict=True)), Path(given.norms))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr."""
    try:
        run(argv)
    except (ValueError, OSError) as error:
        print(f"spectra.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
