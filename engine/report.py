"""The results of a comparison: comparison.csv with a row for each run, comparison.md and two pictures.

A row is a dict with the keys COLUMNS. A variant is a method with its rank and dropout; its runs differ in
learning rate or seed. Accuracies are fractions, 0..1; comparison.md has percent.
"""

import csv
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import data
import vit
from engine import pictures
from engine.adapt import ADAPT, adapt
from engine.config import Config
from engine.devices import Autocast, out_of_memory, pick_device, pick_dtype
from engine.files import atomic
from engine.weights import TORCHVISION

COLUMNS = """run method rank dropout lr seed trial final val_accuracy val_loss best_epoch test_accuracy
    test_loss trainable total adapter_bytes images_per_second kept_bytes dtype""".split()


def kept(config: Config, classes: int) -> int | None:
    """Bytes that autograd keeps for the backward pass of one batch; None if the memory is too small."""
    c, device = config, pick_device(config.device)
    model, preprocessing = vit.build(
        c.model, c.weights, classes, c.image_size, c.head_dropout, heads=c.heads
    )
    # The frozen blocks of a linear probe keep nothing, but checkpoint's first pass would be counted.
    model.encoder.layers.recompute = c.recompute and c.adapter != "head"
    arguments = {key: getattr(c, key) for key in ADAPT}
    # No module_dropout: every adapter takes part in this batch.
    adapt(model, dropout=c.adapter_dropout, **arguments)
    model = Autocast(model.to(device).train(), device, pick_dtype(c, device, model.hidden_dim))
    images = torch.randn(c.batch_size, 3, *[preprocessing["image_size"]] * 2, device=device)
    labels = torch.zeros(c.batch_size, dtype=torch.int64, device=device)
    try:
        return saved_bytes(model, lambda: F.cross_entropy(model(images).float(), labels))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves in a forward pass, without the model's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    del y  # until here, every storage is alive and has its own address
    return sum(storages.values())


def variant(row: dict) -> tuple:
    """(method, rank, dropout) of a row."""
    return row["method"], row["rank"], row["dropout"]


def read(table: Path) -> list[dict]:
    """The rows of a comparison.csv, with numbers for rank, dropout, lr, seed; ValueError for another file."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            row["rank"], row["dropout"] = int(row["rank"] or 0) or None, float(row["dropout"])
            row["seed"], row["lr"] = int(row["seed"]), float(row["lr"])
            if not {"trial", "val_accuracy"} <= row.keys():
                raise KeyError
        return rows
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{table}: not a table of compare.py; choose another --out") from None


def write(
    out: Path,
    rows: list[dict],
    main: list,
    dropouts: list,
    config: Config,
    dataset: data.Dataset,
    budget: str,
) -> None:
    """Write the four files; each is replaced only when its successor is complete.

    main, dropouts: the variants in the main table, and those in the table of dropout.
    budget: sentences that say how the learning rates were chosen, and the command.
    """
    with atomic(out / "comparison.csv") as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    main, dropouts = ([summary(v, rows) for v in variants] for variants in (main, dropouts))
    parts = ["# Comparison", conditions(rows, config, dataset, budget), main_table(main)]
    if dropouts:
        parts += ["## Dropout of the adapters", dropout_table(dropouts)]
    parts += ["## The learning rates that were tried, with seed 0", lr_table(rows)]
    with atomic(out / "comparison.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    split = "test" if dataset.test else "val"
    title = f"{config.dataset}: {len(dataset.train):,} training images, {trunk(config)}"
    pictures.plot_comparison(main, dropouts, split, out / "comparison.png", title)
    rates = {f"{title}, alpha {config.alpha:g}": trials(rows)}
    pictures.plot_rates(rates, out / "rates.png")


def summary(which: tuple, rows: list[dict]) -> dict:
    """The results of a variant's final runs, over their seeds."""
    rows = [row for row in rows if variant(row) == which]
    final = [row for row in rows if "final" in row]
    tried = [row["lr"] for row in rows if "trial" in row]
    shared = "method rank dropout lr trainable adapter_bytes kept_bytes".split()
    result = {key: final[0][key] for key in shared}
    result["edge"] = bool(tried) and result["lr"] in (min(tried), max(tried))
    result["speed"] = statistics.mean(row["images_per_second"] for row in final)
    for split in ("val", "test"):
        values = [row[f"{split}_accuracy"] for row in final if f"{split}_accuracy" in row]
        result[split] = mean_std(values) if values else None
    return result


def trunk(config: Config) -> str:
    """The name of its weights; after that of the model, for weights that have a name of their own."""
    weights = config.weights
    if weights not in (*TORCHVISION, "none", "embedded", "in21k"):
        return Path(weights).name
    return f"{config.model or ('vit_mini' if weights == 'embedded' else 'vit_b_16')}, weights {weights}"


def trials(rows: list[dict]) -> dict[tuple, list[tuple[float, float]]]:
    """By (method, rank), the learning rates that were tried and their validation accuracy, in 0..1, sorted;
    0 for a run that diverged."""
    found = {}
    for row in rows:
        if row.get("trial"):
            point = float(row["lr"]), float(row.get("val_accuracy") or 0)
            found.setdefault((row["method"], row["rank"]), set()).add(point)
    return {key: sorted(points) for key, points in found.items()}


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None instead of the latter for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def main_table(summaries: list[dict]) -> str:
    titles = (
        "what trains, rank, parameters, adapter file (KiB), learning rate, validation (%), test (%)"
    )
    lines = [
        (
            *named(s),
            f"{s['trainable']:,}",
            f"{s['adapter_bytes'] / 1024:,.0f}",
            f"{s['lr']:g}" + "\\*" * s["edge"],
            percent(s["val"]),
            percent(s["test"]),
            f"{s['speed']:,.0f}",
            "" if s["kept_bytes"] is None else f"{s['kept_bytes'] / 2**20:,.2f}",
        )
        for s in summaries
    ]
    table = markdown(f"{titles}, images/s, kept (MiB)", lines)
    if any(s["edge"] for s in summaries):
        table += (
            "\n\n\\* The smallest or largest rate tried was the best: a better one may lie beyond."
        )
    return table


def dropout_table(summaries: list[dict]) -> str:
    lines = [
        (*named(s), f"{s['dropout']:g}", percent(s["val"]), percent(s["test"])) for s in summaries
    ]
    return markdown("what trains, rank, dropout, validation (%), test (%)", lines)


def lr_table(rows: list[dict]) -> str:
    lines = []
    for row in (row for row in rows if "trial" in row):
        figures = ("diverged", "")
        if "val_loss" in row:
            figures = (percent((row["val_accuracy"], None)), f"{row['val_loss']:.4f}")
        lines.append((*named(row), f"{row['lr']:g}", *figures))
    return markdown("what trains, rank, learning rate, validation (%), validation loss", lines)


def named(row: dict) -> tuple[str, str]:
    return pictures.NAMES[row["method"]], str(row["rank"] or "")


def percent(pair: tuple | None) -> str:
    if pair is None:
        return ""
    return f"{100 * pair[0]:.1f}" + ("" if pair[1] is None else f" ± {100 * pair[1]:.1f}")


def markdown(titles: str, lines: Iterable[tuple]) -> str:
    titles = titles.split(", ")
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def conditions(rows: list[dict], config: Config, dataset: data.Dataset, budget: str) -> str:
    """Sentences that say how the figures were measured."""
    c = config
    splits = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items() if split)
    forwards = f" x {c.grad_accum}" if c.grad_accum > 1 else ""
    tried = {}
    for row in rows:
        tried[row["method"]] = tried.get(row["method"], 0) + row.get("trial", 0)
    tried = ", ".join(f"{pictures.NAMES[method]} {count}" for method, count in tried.items())
    seeds = sorted({row["seed"] for row in rows if "final" in row})
    dtypes = sorted({row["dtype"] for row in rows if row.get("dtype")})
    spread = ", mean ± sample standard deviation" if len(seeds) > 1 else ""
    tested = (
        "The test split was evaluated once for each final run, after all learning rates were chosen."
        if dataset.test
        else "There is no test split: the learning rates were chosen on the validation images."
    )
    best = "balanced accuracy" if c.best_by == "balanced" else c.best_by
    return (
        f"{c.dataset}: {counts} images of {len(dataset.classes)} classes. Trunk: "
        f"{trunk(c)}; epochs: {c.epochs}, batch {c.batch_size}{forwards}, alpha {c.alpha:g} at "
        f"every rank, dropout of the adapters {c.adapter_dropout:g}; everything else as in the recipe "
        f"`{c.recipe}` and the command. Each run counts with its best epoch by validation {best}. {budget} "
        f"Learning rates tried: {tried}. {tested} Seeds {', '.join(map(str, seeds))}{spread}. "
        "images/s was measured in the last epoch of training; kept is the memory that autograd keeps for the "
        f"backward pass of one batch, without parameters. {machine(c, dtypes)} One trunk, one data set and "
        f"one recipe{', all of them small' if c.dataset == 'demo' else ''}: the table shows what the methods "
        "do here; it does not rank them."
    )


def machine(config: Config, dtypes: list[str]) -> str:
    """One sentence with the hardware, the types that it computed in, and the versions."""
    device, name = pick_device(config.device), platform.processor() or platform.machine()
    with suppress(OSError):  # only Linux has this file
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = match[1].strip() if match else name
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads shared by parallel runs, "
        f"{', '.join([str(device), *dtypes])}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchvision {torchvision.__version__}{commit()}."
    )


def commit() -> str:
    """The text ", commit X", with git's name for the present files; empty outside of a clone."""
    with suppress(OSError):  # git is not installed
        command = ["git", "describe", "--always", "--dirty"]
        process = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        return f", commit {process.stdout.strip()}" if process.returncode == 0 else ""
    return ""
