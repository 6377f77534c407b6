"""What a comparison comes to: comparison.csv, with a row for each run, comparison.md and comparison.png.

A row is a dict of COLUMNS; runs of one method, rank and dropout, which differ in learning rate or seed only,
belong together (variant). Accuracies are fractions, 0..1; in comparison.md they are percent.
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

COLUMNS = """run method rank dropout lr seed trial final val_accuracy val_loss best_epoch test_accuracy
    test_loss trainable total adapter_bytes images_per_second kept_bytes""".split()


def kept(config: Config, classes: int) -> int | None:
    """Bytes that autograd keeps for the backward of one batch: see saved_bytes. None if the memory does not
    suffice."""
    c, device = config, pick_device(config.device)
    model, preprocessing = vit.build(c.model, c.weights, classes, c.image_size, c.head_dropout)
    arguments = {key: getattr(c, key) for key in ADAPT}
    # without module_dropout: no adapter sits this batch out
    adapt(model, dropout=c.adapter_dropout, **arguments)
    model = Autocast(model.to(device).train(), device, pick_dtype(c.amp, device))
    images = torch.randn(c.batch_size, 3, *[preprocessing["image_size"]] * 2, device=device)
    labels = torch.zeros(c.batch_size, dtype=torch.int64, device=device)
    try:
        return saved_bytes(model, lambda: F.cross_entropy(model(images).float(), labels))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves in a forward, those of the model's parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()
    del y  # until here no storage could take another's place
    return sum(storages.values())


def variant(row: dict) -> tuple:
    return row["method"], row["rank"], row["dropout"]


def read(table: Path) -> list[dict]:
    """The rows of a comparison.csv; rank, dropout and seed as numbers. Raises ValueError for another file."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        for row in rows:
            row["rank"], row["dropout"] = int(row["rank"] or 0) or None, float(row["dropout"])
            row["seed"] = int(row["seed"])
        return rows
    except (KeyError, ValueError, TypeError):
        raise ValueError(f"{table}: is no table of compare.py's; name another --out") from None


def write(
    out: Path, rows: list[dict], main: list, beside: list, config: Config, d: data.Dataset, how: str
) -> None:
    """Write the three files, each in one piece.

    main, beside: the variants of the table, and those that show the effect of dropout.
    how: how the learning rates were chosen, and the command.
    """
    with atomic(out / "comparison.csv") as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    main, beside = ([summary(v, rows) for v in variants] for variants in (main, beside))
    parts = ["# Comparison", conditions(rows, config, d, how), main_table(main)]
    if beside:
        parts += ["## Dropout of the adapters", dropout_table(beside)]
    parts += ["## The learning rates that were tried, with seed 0", lr_table(rows)]
    with atomic(out / "comparison.md") as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    split = "test" if d.test else "val"
    title = f"{config.dataset}: {len(d.train):,} training images, {config.model}"
    with atomic(out / "comparison.png") as temporary:
        pictures.plot_comparison(main, beside, split, temporary, title)


def summary(of: tuple, rows: list[dict]) -> dict:
    """What the final runs of a variant came to, over their seeds."""
    rows = [row for row in rows if variant(row) == of]
    final = [row for row in rows if "final" in row]
    tried = [row["lr"] for row in rows if "trial" in row]
    same = "method rank dropout lr trainable adapter_bytes kept_bytes".split()
    found = {key: final[0][key] for key in same}
    found["edge"] = bool(tried) and found["lr"] in (min(tried), max(tried))
    found["speed"] = statistics.mean(row["images_per_second"] for row in final)
    for split in ("val", "test"):
        values = [row[f"{split}_accuracy"] for row in final if f"{split}_accuracy" in row]
        found[split] = mean_std(values) if values else None
    return found


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
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
        table += "\n\n\\* The best of those tried lies at their edge: a better one may lie beyond."
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


def conditions(rows: list[dict], config: Config, d: data.Dataset, how: str) -> str:
    """What the figures hold for, in words."""
    c = config
    splits = {"training": d.train, "validation": d.val, "test": d.test}
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items() if split)
    forwards = f" x {c.grad_accum}" if c.grad_accum > 1 else ""
    tried = {}
    for row in rows:
        tried[row["method"]] = tried.get(row["method"], 0) + row.get("trial", 0)
    tried = ", ".join(f"{pictures.NAMES[method]} {count}" for method, count in tried.items())
    seeds = sorted({row["seed"] for row in rows if "final" in row})
    spread = ", mean ± sample standard deviation" if len(seeds) > 1 else ""
    tested = (
        "The test split was evaluated once for each final run, after all learning rates were chosen."
        if d.test
        else "There is no test split: the learning rates were chosen on the images that the figures are of."
    )
    return (
        f"{c.dataset}: {counts} images of {len(d.classes)} classes. Trunk {c.model}, weights "
        f"{Path(c.weights).name}; epochs: {c.epochs}, batch {c.batch_size}{forwards}, alpha {c.alpha:g} at "
        f"every rank, dropout of the adapters {c.adapter_dropout:g}, all else as in the recipe `{c.recipe}` "
        f"and the command. Of a run the epoch with the best validation accuracy counts. {how} "
        f"Learning rates tried: {tried}. {tested} Seeds {', '.join(map(str, seeds))}{spread}. "
        "images/s is of the last epoch of training; kept is what autograd keeps for the backward of one "
        f"batch, parameters left out. {machine(c)} One trunk, one data set and one recipe"
        f"{', all of them small' if c.dataset == 'demo' else ''}: read it as what the methods do here, not "
        "as a ranking of them."
    )


def machine(config: Config) -> str:
    """What the runs ran on, and with which versions."""
    device, name = pick_device(config.device), platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has it
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, {name}"
    dtype = str(pick_dtype(config.amp, device))[6:]
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, which runs at once share, "
        f"{device}, {dtype}, Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}{commit()}."
    )


def commit() -> str:
    """What git calls this state of the files, with a comma before; nothing outside of a clone."""
    with suppress(OSError):  # no git
        command = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(
            command, cwd=Path(__file__).parent.parent, capture_output=True, text=True
        )
        return f", commit {said.stdout.strip()}" if said.returncode == 0 else ""
    return ""
