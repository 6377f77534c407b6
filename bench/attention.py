"""Attention in bfloat16: attend of attention.py against torch's scaled_dot_product_attention, in one run.

    python bench/attention.py    # writes bench/attention.md

A round has a forward and a backward pass of each, in turn. The ratio is torch's time over attend's in the
same round: median and quartiles. The error is that of the output, relative to its norm, against float64 on
the same bfloat16 numbers; the keys share a vector of SHARED times their own size, as in a DINOv2 trunk.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from attention import attend
from engine.report import commit

SHAPES = {  # batch, heads, tokens, width of a head
    "ViT-S/14, 112 pixels": (20, 6, 65, 64),
    "ViT-B/16, 224 pixels": (8, 12, 197, 64),
    "ViT-S/14, 224 pixels": (8, 6, 257, 64),
    "ViT-B/16, 384 pixels": (4, 12, 577, 64),
}
SHARED = 10


def inputs(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """q, k, v and a gradient, (B, heads, T, dim / heads), as three linear layers give them."""
    batch, heads, tokens, width = shape
    q, k, v, g = torch.randn(4, batch, tokens, heads * width)
    k = k + SHARED * torch.randn(heads * width)
    return [t.bfloat16().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v, g)]


def seconds(attention, q, k, v, g) -> float:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    start = time.perf_counter()
    torch.autograd.grad(attention(q, k, v), (q, k, v), g)
    return time.perf_counter() - start


def row(name: str, shape: tuple[int, ...], rounds: int) -> str:
    tensors = inputs(shape)
    contenders = {"attend": attend, "torch": F.scaled_dot_product_attention}
    times = {key: [] for key in contenders}
    for turn in range(-2, rounds):
        for key, attention in contenders.items():
            duration = seconds(attention, *tensors)
            if turn >= 0:  # the first two rounds warm up
                times[key].append(duration)
    q, k, v, _ = tensors
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    errors = [((f(q, k, v) - exact).norm() / exact.norm()).item() for f in contenders.values()]
    ratios = [b / a for a, b in zip(times["attend"], times["torch"], strict=True)]
    low, middle, high = statistics.quantiles(ratios)
    ours, theirs = (1e3 * statistics.median(times[key]) for key in contenders)
    return (
        f"| {name} | {' x '.join(map(str, shape))} | {ours:.1f} | {theirs:.1f} "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {errors[0]:.4f} | {errors[1]:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [row(name, shape, options.rounds) for name, shape in SHAPES.items()]
    titles = "trunk, batch x heads x tokens x width, attend (ms), torch (ms), torch / attend, error, torch's"
    lines = [
        "# Attention in bfloat16, forward and backward",
        "",
        f"| {' | '.join(titles.split(', '))} |",
        "|---" * 7 + "|",
        *rows,
        "",
        f"{options.rounds} rounds, seed 0. CPU, {torch.get_num_threads()} threads, {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}{commit()}.",
        "",
    ]
    print("\n".join(lines))
    options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
