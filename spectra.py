"""Draw what adapters have learnt for a layer: delta W of each, and their singular values in one panel.

    python spectra.py runs/lora runs/loha runs/lokr --out delta.png
    python spectra.py a.safetensors b.safetensors --layer encoder.layers.encoder_layer_0.self_attention.query

The numbers behind the picture are printed, a line for each adapter. Exit status 0; 2 for a mistake.
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
from engine.pictures import BLUE, NAMES, ORANGE, check_figure, entitle, shorten

# Okabe and Ito's, told apart without colour vision; the marks do so without any colour.
MARKS = [(BLUE, "o"), (ORANGE, "s"), ("#000000", "^"), ("#009E73", "D"), ("#CC79A7", "v")]
SIDE = 192  # rows and columns of delta W in an image, at most: of a larger one every second, third, ...
WHITE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


@dataclass
class Delta:
    """What one adapter adds to the layer."""

    label: str
    numbers: int  # trained, of this layer's adapter
    delta: torch.Tensor  # (out, in), float64
    moved: float  # ||delta W|| / ||W||
    blocks: tuple[int, int]  # rows and columns of LoKr's W1, 1 x 1 for the others
    values: torch.Tensor  # singular values, the largest first

    @property
    def rank(self) -> int:
        """The numerical rank: singular values above what rounding leaves, as torch's matrix_rank has it."""
        least = max(self.delta.shape) * torch.finfo(torch.float64).eps * self.values[0]
        return int((self.values > least).sum())


def read(path: str, weights: str | None) -> tuple[nn.Module, dict]:
    """As load_adapter, for files that hold an adapter. ValueError for the others."""
    _, info = checkpoint.read_adapter(path)
    if info["adapter"] not in ADAPTERS:
        expected = ", ".join(ADAPTERS)
        raise ValueError(
            f"{path}: adapter: expected one of {expected}, found {info['adapter']!r}, which has no delta W"
        )
    return checkpoint.load_adapter(path, weights)


def pick(path: str, model: nn.Module, layer: str | None) -> str:
    """The layer, or the one that its adapter has moved the most. ValueError if it is not adapted."""
    norms = relative_norms(model)
    if layer and layer not in norms:
        there = ", ".join(norms)
        raise ValueError(f"--layer {layer}: not adapted in {path}; there are: {there}")
    return layer or max(norms, key=norms.get)


@torch.no_grad()
def measure(module: nn.Module, info: dict) -> Delta:
    """All that is drawn of one adapter. In float64, so that rounding is far below what was trained."""
    numbers = sum(p.numel() for p in module.parameters(recurse=False))
    module = module.double()
    delta = module.delta_weight()
    label, blocks = f"{NAMES[info['adapter']]} rank {info['rank']}", (1, 1)
    if info["adapter"] == "lokr":
        blocks = tuple(lokr.factorization(size, info["factor"])[0] for size in delta.shape)
        label += f", {blocks[0]} x {blocks[1]} blocks"
    moved = (delta.norm() / module.linear.weight.norm()).item()
    return Delta(label, numbers, delta, moved, blocks, torch.linalg.svdvals(delta))


def draw(shown: list[Delta], title: str, path: Path) -> None:
    """Above, each delta W as an image; below, the singular values of all."""
    figure = Figure(figsize=(max(2.75 * len(shown), 5.5), 5.4), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1.4, 1))
    above = [figure.add_subplot(grid[0, i]) for i in range(len(shown))]
    for axes, one in zip(above, shown, strict=True):
        image = draw_delta(axes, one)
    bar = figure.colorbar(image, ax=above, shrink=0.7, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["−", "0", "+"])
    bar.set_label("delta W, each in its own range", fontsize=8)
    draw_spectra(figure.add_subplot(grid[1, :]), shown)
    entitle(figure, title)
    figure.savefig(path, dpi=150)


def draw_delta(axes, one: Delta):
    """delta W as an image; LoKr's with lines around its blocks, and each as a multiple of the strongest."""
    n_out, n_in = one.delta.shape
    steps = [-(-size // SIDE) for size in (n_out, n_in)]
    part = one.delta[:: steps[0], :: steps[1]].numpy()
    limit = np.quantile(np.abs(part), 0.995)  # a few large numbers would leave all others pale
    place = {"extent": (0, n_in, n_out, 0), "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(part / (limit or 1), cmap="PuOr", vmin=-1, vmax=1, **place)
    axes.set_title(f"{one.label}\n{one.numbers:,} numbers, rank of delta W {one.rank}", fontsize=8)
    for name, step, n, tell in (
        ("outputs", steps[0], n_out, axes.set_ylabel),
        ("inputs", steps[1], n_in, axes.set_xlabel),
    ):
        tell(f"{n} {name}" + (f", one in {step} shown" if step > 1 else ""), fontsize=8)
    axes.set(xticks=[], yticks=[], box_aspect=1)
    rows, columns = one.blocks
    line = {"color": "black", "linewidth": min(0.8, 6 / max(rows, columns))}
    for i in range(1, rows):
        axes.axhline(i * n_out / rows, **line)
    for j in range(1, columns):
        axes.axvline(j * n_in / columns, **line)
    if 1 < max(rows, columns) <= 4:  # more would not be readable
        for i, row in enumerate(multiples(one.delta, one.blocks).tolist()):
            for j, multiple in enumerate(row):
                middle = ((j + 0.5) * n_in / columns, (i + 0.5) * n_out / rows)
                text = f"{multiple:+.2f} W2".replace("-", "−")
                axes.text(*middle, text, ha="center", va="center", fontsize=8, bbox=WHITE)
    return image


def multiples(delta: torch.Tensor, blocks: tuple[int, int]) -> torch.Tensor:
    """What number times its strongest block each block of a Kronecker product is."""
    parts = delta.reshape(blocks[0], -1, blocks[1], delta.shape[1] // blocks[1])
    parts = parts.transpose(1, 2).flatten(2)  # (rows, columns, numbers of a block)
    strongest = parts.flatten(0, 1)[parts.norm(dim=2).argmax()]
    return parts @ strongest / (strongest @ strongest)


def draw_spectra(axes, shown: list[Delta]) -> None:
    """Singular values over the largest, as far as the rank goes."""
    lowest = 0.1
    for one, (colour, mark) in zip(shown, itertools.cycle(MARKS)):
        values = (one.values / one.values[0])[: one.rank].tolist()
        look = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1}
        label = f"{one.label}: ||delta W|| = {one.moved:.2f} ||W||"
        every = [*range(0, one.rank - 1, max(1, one.rank // 32)), one.rank - 1]
        axes.plot(range(1, one.rank + 1), values, label=label, markevery=every, **look)
        if values:
            text, end = f"rank {one.rank}", (one.rank, values[-1])
            note = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "bbox": WHITE}
            axes.annotate(text, end, fontsize=8, color=colour, **note)
            lowest = min(lowest, values[-1])
    axes.set_yscale("log")
    axes.set_ylim(lowest / 1.5, 1.3)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel(f"which of the {len(shown[0].values)} singular values", fontsize=8)
    axes.set_ylabel("singular value / the largest", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def run(argv: list[str] | None) -> None:
    parser = Parser(description="Draw what adapters have learnt for a layer.")
    add = parser.add_argument
    add("adapters", nargs="+", help="adapter files, or folders of runs")
    add(
        "--layer", help="its name in the model (default: the one that the first adapter moved most)"
    )
    add("--out", default="delta.png", metavar="FILE", help="the picture (default: delta.png)")
    add("--weights", help="the trunk: a name or a file (default: where it was in training)")
    given = parser.parse_args(argv)
    check_figure(Path(given.out), "--out")
    shown, layer = [], given.layer
    for path in given.adapters:
        model, info = read(path, given.weights)
        layer = pick(path, model, layer)
        one = measure(model.get_submodule(layer), info)
        shown.append(one)
        print(
            f"{path}: {one.label}, {layer}: {one.numbers:,} numbers, rank of delta W {one.rank}, "
            f"||delta W|| / ||W|| {one.moved:.3f}"
        )
    if len({one.label for one in shown}) < len(shown):  # told apart by their names then
        for path, one in zip(map(Path, given.adapters), shown, strict=True):
            name = path.parent.name if path.name == checkpoint.ADAPTER_FILE else path.stem
            one.label = f"{shorten(name, 30)}: {one.label}"
    draw(shown, f"delta W of {layer}", Path(given.out))


def main(argv: list[str] | None = None) -> int:
    """Draw as the command line says; 0, or 2 after one line on stderr."""
    try:
        run(argv)
    except (ValueError, OSError) as error:
        print(f"spectra.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
