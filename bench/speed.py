"""What an adapter costs: the time and memory of a training step, ours and other libraries' in one run.

    pip install peft lycoris-lora
    python bench/speed.py                              # writes bench/speed.md and bench/speed.png
    python bench/speed.py --blocks 1 --ranks 4 8 16 32 --targets all query,value --batches 1 8 32 \
        --rounds 25 7 3 --out bench/grid               # bench/grid.md
    python bench/speed.py --trunk vit_s_14 --blocks 12 --batches 10 --ranks 2 4 8 16 --amp bf16 \
        --out bench/speed_vit_s14                      # the trunk of docs/comparison.md
    python bench/speed.py --device cuda --amp bf16 --batches 64

The trunk is the encoder blocks of a Vision Transformer (TRUNKS) with random weights, after split_attention:
the same matrices for all. A step is a forward pass and a backward pass, to the input and to all that trains.
The floor is a step without adapters. A round has one step of each model, in random order. "time / floor" is a
step's time divided by the floor's time in the same round: the median over rounds. "kept / floor" compares the
memory that autograd keeps for the backward pass: bytes of distinct storages, without parameters. The last
table has other libraries' time divided by ours in the same round: median and quartiles.

On a CPU, the process keeps freed memory, as in train.py (devices.keep_freed_memory), for all models.
"""

import argparse
import gc
import itertools
import os
import platform
import random
import statistics
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import lycoris.modules
import matplotlib
import numpy as np
import peft
import torch
from torch import nn
from torchvision.models import VisionTransformer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from attention import split_attention  # noqa: E402
from engine.devices import keep_freed_memory  # noqa: E402
from engine.report import commit, saved_bytes  # noqa: E402
from loha import LoHaLinear  # noqa: E402
from lokr import LoKrLinear  # noqa: E402
from lora import LoRALinear, mark_trainable, replace_linear  # noqa: E402

EVERY = ["query", "key", "value", "out", "mlp.0", "mlp.3"]
OURS = {"LoRA": LoRALinear, "LoHa": LoHaLinear, "LoKr": LoKrLinear}
PEFT = {
    "LoRA": lambda r: {"config": peft.LoraConfig, "lora_alpha": r},
    "LoHa": lambda r: {"config": peft.LoHaConfig, "alpha": r},
    "LoKr": lambda r: {"config": peft.LoKrConfig, "alpha": r},
}
LYCORIS = {
    "LoRA": lycoris.modules.LoConModule,
    "LoHa": lycoris.modules.LohaModule,
    "LoKr": lycoris.modules.LokrModule,
}
TRUNKS = {  # side of the images, patch, heads, width, width of the MLP
    "vit_b_16": (224, 16, 12, 768, 3072),
    "vit_s_14": (112, 14, 6, 384, 1536),
}
COLOURS = {"ours": "#0072B2", "PEFT": "#E69F00", "LyCORIS": "#009E73"}  # Okabe and Ito's


def trunk(options) -> nn.Sequential:
    torch.manual_seed(0)
    side, patch, heads, width, mlp = TRUNKS[options.trunk]
    with torch.no_grad():
        model = VisionTransformer(side, patch, options.blocks, heads, width, mlp)
    return split_attention(model).encoder.layers.requires_grad_(False)


def tokens(options) -> int:
    side, patch, *_ = TRUNKS[options.trunk]
    return (side // patch) ** 2 + 1


def ours(kind: str, rank: int, targets: list[str], options) -> nn.Module:
    model = trunk(options)
    replace_linear(model, partial(OURS[kind], rank=rank, alpha=rank), targets)
    mark_trainable(model)
    return model


def of_peft(kind: str, rank: int, targets: list[str], options) -> nn.Module:
    settings = PEFT[kind](rank)
    config = settings.pop("config")(r=rank, target_modules=targets, **settings)
    return peft.get_peft_model(trunk(options), config)


def of_lycoris(kind: str, rank: int, targets: list[str], options) -> nn.Module:
    model, adapters = trunk(options), nn.ModuleList()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f".{name}".endswith(tuple(f".{t}" for t in targets)):
            adapter = LYCORIS[kind](name.replace(".", "_"), layer, 1.0, rank, rank)
            adapter.apply_to()  # replaces layer.forward
            adapters.append(adapter)
    model.adapters = adapters.requires_grad_(True)
    model.forward = lambda x: nn.Sequential.forward(
        model[:-1], x
    )  # the last child, adapters, is not a block
    return model


def contenders(rank: int, targets: list[str], options) -> dict[str, nn.Module]:
    models = {"floor": trunk(options), "full": trunk(options).requires_grad_(True)}
    makers = {"ours": ours, "PEFT": of_peft, "LyCORIS": of_lycoris}
    for kind, (library, make) in itertools.product(OURS, makers.items()):
        models[f"{kind} {library}"] = model = make(kind, rank, targets, options)
        for parameter in model.parameters():
            if parameter.requires_grad:  # a factor of zeros could make products cheap
                nn.init.normal_(parameter, std=0.02)
    return {name: model.to(options.device).train() for name, model in models.items()}


def forward(model: nn.Module, x: torch.Tensor, options) -> torch.Tensor:
    with torch.autocast(options.device.type, options.dtype, options.dtype != torch.float32):
        return model(x)


def step(model: nn.Module, x: torch.Tensor, options) -> float:
    """Milliseconds of a forward and backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    if options.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        y = forward(model, x, options)
        y.backward(torch.ones_like(y))
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    y = forward(model, x, options)
    y.backward(torch.ones_like(y))
    return 1e3 * (time.perf_counter() - start)


def kept(model: nn.Module, x: torch.Tensor, options) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters."""
    return saved_bytes(model, lambda: forward(model, x.detach().requires_grad_(), options))


def peak(model: nn.Module, x: torch.Tensor, options) -> int:
    """Bytes on the GPU at the highest point of a step, minus those allocated before it."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model, x, options)
    return torch.cuda.max_memory_allocated() - before


def paired(times: dict[str, list[float]], a: str, b: str) -> list[float]:
    """a's time divided by b's, for each round."""
    return [x / y for x, y in zip(times[a], times[b], strict=True)]


def measure(rank: int, targets: list[str], batch: int, rounds: int, options) -> tuple[dict, dict]:
    """(time and memory of each model relative to the floor, quartiles of other libraries' time over ours)"""
    models = contenders(rank, targets, options)
    x = torch.randn(batch, tokens(options), TRUNKS[options.trunk][3], device=options.device)
    times = {name: [] for name in models}
    order, rng = list(models), random.Random(0)
    for turn in range(-2, rounds):
        rng.shuffle(order)  # the previous step affects caches and memory
        for name in order:
            duration = step(models[name], x, options)
            if turn >= 0:  # the first two rounds warm up
                times[name].append(duration)
    memory = {name: kept(model, x, options) for name, model in models.items()}
    if options.device.type == "cuda":
        peaks = {name: peak(model, x, options) for name, model in models.items()}
    results = {}
    for name in models:
        results[name] = {
            "ms": statistics.median(times[name]),
            "ratio": statistics.median(paired(times, name, "floor")),
            "kept": memory[name] / memory["floor"],
        }
        if options.device.type == "cuda":
            results[name]["peak"] = peaks[name] / peaks["floor"]
    del models
    gc.collect()
    others = {}
    for kind, library in itertools.product(OURS, ("PEFT", "LyCORIS")):
        ratios = paired(times, f"{kind} {library}", f"{kind} ours")
        others[f"{kind} {library}"] = np.quantile(ratios, [0.25, 0.5, 0.75])
    return results, others


def table(results: dict[str, dict[str, float]]) -> list[str]:
    columns = list(results["floor"])
    titles = {"ms": "ms per step", "ratio": "time / floor", "kept": "kept / floor"}
    titles["peak"] = "peak memory / floor"
    lines = [
        "| | " + " | ".join(titles[c] for c in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, values in results.items():
        cells = [f"{values[c]:,.0f}" if c == "ms" else f"{values[c]:.2f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def other_libraries(rows: dict[str, dict[str, np.ndarray]]) -> list[str]:
    """A table of other libraries' time over ours, with a row for each setting."""
    names = list(next(iter(rows.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for setting, others in rows.items():
        cells = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in others.values()]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return lines


def draw(results: dict[int, dict], title: str, path: Path) -> None:
    """Draw a panel for each rank: time over the floor's, for each adapter and library."""
    figure, axes = plt.subplots(
        1, len(results), figsize=(4.6 * len(results), 4.2), sharey=True, squeeze=False, dpi=150
    )
    for axis, (rank, values) in zip(axes[0], results.items(), strict=True):
        for i, (library, colour) in enumerate(COLOURS.items()):
            heights = [values[f"{kind} {library}"]["ratio"] for kind in OURS]
            places = [j + 0.28 * (i - 1) for j in range(len(OURS))]
            bars = axis.bar(places, heights, 0.26, color=colour, label=library)
            labels = axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
            for label in labels:  # readable on top of the lines
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.axhline(1, color="black", linewidth=1, zorder=0, label="floor: frozen trunk")
        full = values["full"]["ratio"]
        axis.axhline(full, color="black", linestyle=":", zorder=0, label="full fine-tuning")
        axis.set_xticks(range(len(OURS)), list(OURS))
        axis.set_title(f"rank {rank}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time of a training step / floor")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=11)
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)


def machine(options) -> str:
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    packages = ("torch", "torchvision", "peft", "lycoris-lora")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    blocks = f"{options.blocks} block{'s' * (options.blocks > 1)}"
    rounds = " or ".join(map(str, options.rounds))
    return (
        f"{blocks} of {options.trunk}, {tokens(options)} tokens, {str(options.dtype)[6:]}, "
        f"medians of {rounds} paired rounds. {name}, {torch.get_num_threads()} threads, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python "
        f"{platform.python_version()}, {versions}{commit()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off")
    parser.add_argument("--trunk", choices=TRUNKS, default="vit_b_16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument(
        "--targets", nargs="+", default=["all"], help="all, or names separated by commas"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument(
        "--rounds", type=int, nargs="+", default=[9], help="one number, or one for each batch size"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "speed")
    options = parser.parse_args()
    options.dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        options.amp
    ]
    torch.set_num_threads(options.threads)
    keep_freed_memory(options.device)
    if len(options.rounds) not in (1, len(options.batches)):
        parser.error(
            f"--rounds has {len(options.rounds)} numbers for {len(options.batches)} batches"
        )
    rounds = dict(zip(options.batches, itertools.cycle(options.rounds), strict=False))
    results, rows, lines = (
        {},
        {},
        ["# What a training step costs, relative to the frozen trunk", ""],
    )
    for targets, batch, rank in itertools.product(options.targets, options.batches, options.ranks):
        names = EVERY if targets == "all" else targets.split(",")
        values, others = measure(rank, names, batch, rounds[batch], options)
        results.setdefault((targets, batch), {})[rank] = values
        rows[setting := f"{targets}, batch {batch}, rank {rank}"] = others
        part = [f"## {setting}", "", *table(values), ""]
        print("\n".join(part), flush=True)
        lines += part
    part = [
        "## Other libraries' time over ours, median (quartiles)",
        "",
        *other_libraries(rows),
        "",
    ]
    print("\n".join(part))
    lines += [*part, machine(options), ""]
    options.out.with_suffix(".md").write_text("\n".join(lines))
    (targets, batch), by_rank = next(iter(results.items()))
    layers = "all linear layers" if targets == "all" else targets
    device = options.device.type.upper()
    title = f"{options.blocks} blocks of {options.trunk}, {layers}, batch {batch} x {tokens(options)} tokens"
    title += f", {device}"
    draw(by_rank, title, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
