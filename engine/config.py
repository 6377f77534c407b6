"""What a run is told: Config, from which the command line is made, the recipes, and what is refused."""

import argparse
import json
import math
import operator
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from torch import nn

import data
import export
import vit
from engine import checkpoint
from engine.adapt import METHODS


def option(default, help: str, choices=None):
    """A field of Config. It holds None until __post_init__ takes the recipe's value or the default."""
    return field(default=None, metadata={"default": default, "help": help, "choices": choices})


@dataclass
class Config:
    """Everything that a run depends on. What is not given comes from the recipe, then the default."""

    recipe: str = field(default="demo", metadata={"help": "which settings to start from"})
    dataset: str = option("demo", "data set", tuple(data.SOURCES))
    data_dir: str | None = option(None, "where the data set lies (default: the known places)")
    limit: int | None = option(None, "at most this many images of each split")
    classes: str | None = option(None, "train on these classes only, names with commas")
    download: bool = option(False, "fetch the data set if it is not there (food101, cifar100)")
    holdout: float = option(0.0, "validate on this fraction of the training images instead")
    min_crop: float = option(0.08, "smallest random crop, as a fraction of the area; 1: none")
    flip: bool = option(True, "mirror training images at random")
    model: str = option("vit_b_16", "trunk", tuple(vit.MODELS))
    weights: str = option(
        "imagenet1k", "imagenet1k, swag, in21k, embedded, none, a file or a folder"
    )
    image_size: int | None = option(None, "pixels of a side (default: the trunk's own)")
    adapter: str = option("lora", "what trains", METHODS)
    rank: int = option(4, "inner dimension of the adapters")
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    targets: str = option("all", "all linear layers, or last parts of names with commas")
    factor: int = option(-1, "LoKr: rows and columns of W1; -1: near the square root")
    decompose_both: bool = option(False, "LoKr: W1 is a product of two factors too")
    bias: str = option("none", "which biases train as well", ("none", "all", "adapter"))
    head_dropout: float = option(0.0, "dropout before the head")
    adapter_dropout: float = option(0.0, "dropout of each adapter's input")
    module_dropout: float = option(0.0, "probability that an adapter does nothing in a forward")
    init_adapter: str | None = option(
        None, "adapter file or PEFT folder to start from; settles trunk and adapter unless given"
    )
    epochs: int = option(5, "passes through the training split")
    batch_size: int = option(64, "images to a forward and backward, of all processes")
    grad_accum: int = option(1, "batches to a step of the optimizer")
    lr: float = option(1e-3, "learning rate of the first step; falls linearly to zero")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    amp: str = option("auto", "mixed precision", ("auto", "bf16", "fp16", "off"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = option(None, "processes that decode images (default: one a core)")
    cache: bool = option(False, "decode large images once too, and keep them on disk")
    cache_dir: str | None = option(
        None, "where decoded images are kept (default: cache/ beside --out)"
    )
    seed: int = option(0, "of everything that is random")
    test: bool = option(False, "evaluate the best epoch on the test split too")
    out: str | None = option(
        None, "the run's folder (default: runs/<recipe>-<adapter>-<seed>-<time>)"
    )
    resume: bool = option(False, "go on where the run in --out stopped; start it if there is none")
    save_minutes: float = option(10.0, "within an epoch, what --resume needs is saved this often")

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe {self.recipe}: expected one of {', '.join(RECIPES)}")
        settings = dict(RECIPES[self.recipe])
        last = begun(self)
        then = last["config"] if last else {}
        # A run that goes on does not read --init-adapter's file again, which may be gone: last.pt holds the
        # settings that came from it.
        if then.get("init_adapter"):
            self.init_adapter = then["init_adapter"]
            settings |= {key: then[key] for key in export.SETTLED}
        elif self.init_adapter:
            settings |= export.start_settings(self.init_adapter)
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                value = settings.get(f.name, f.metadata.get("default"))
            elif isinstance(value, Path):
                value = str(value)
            elif kind_of(f) is bool and not isinstance(value, bool):
                raise ValueError(f"{flag(f.name)} {value!r}: expected True or False")
            elif kind_of(f) in (int, float):  # NumPy's numbers too, which JSON does not take
                try:
                    value = operator.index(value) if kind_of(f) is int else float(value)
                except (TypeError, ValueError):
                    wanted = kind_of(f).__name__
                    raise ValueError(f"{flag(f.name)} {value!r}: expected {wanted}") from None
            setattr(self, f.name, value)


FOOD101 = {  # what its three recipes share
    "dataset": "food101",
    "model": "vit_b_16",
    "weights": "in21k",
    "rank": 16,
    "alpha": 16.0,
    "targets": "query,value",
    "epochs": 5,
    "batch_size": 128,
    "grad_accum": 4,
    "lr": 5e-3,
    "amp": "fp16",
}
RECIPES = {
    "demo": {
        "dataset": "demo",
        "model": "vit_mini",
        "weights": "embedded",
        "min_crop": 0.7,
        "flip": False,  # a mirrored digit is no digit
        "adapter": "lora",
        "rank": 4,
        "alpha": 16.0,
        "epochs": 6,
        "batch_size": 64,
        "lr": 5e-3,
    },
    "tiny-imagenet-lora": {
        "dataset": "tiny-imagenet",
        "model": "vit_b_16",
        "weights": "imagenet1k",
        "adapter": "lora",
        "rank": 4,
        "alpha": 32.0,
        "targets": "all",
        "head_dropout": 0.1,
        "epochs": 5,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_decay": 0.03,
    },
    "food101-lora": {
        **FOOD101,
        # The guide trains on train[:5000] of Hugging Face's order: these seven classes of the 101.
        "classes": "beignets,bruschetta,chicken_wings,hamburger,pork_chop,prime_rib,ramen",
        "limit": 5000,
        "holdout": 0.1,
        "adapter": "lora",
        "adapter_dropout": 0.1,
    },
    "food101-loha": {**FOOD101, "adapter": "loha", "module_dropout": 0.1},
    "food101-lokr": {**FOOD101, "adapter": "lokr", "module_dropout": 0.1},
}

# What another machine or a later session may change in a run that goes on. Its trunk, wherever the weights
# lie, is compared by itself.
FREE = (
    "recipe data_dir weights download device workers cache_dir test out resume save_minutes".split()
)


def check(config: Config) -> None:
    """Raise ValueError in one line, with flag, value and what is allowed, for a config that can't work."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{flag(f.name)} {value}: expected one of {', '.join(choices)}")
    limits = {
        "rank >= 1": config.rank >= 1,
        "alpha > 0": 0 < config.alpha < math.inf,
        "factor -1 or >= 1": config.factor == -1 or config.factor >= 1,
        "image_size >= 1": config.image_size is None or config.image_size >= 1,
        "epochs >= 1": config.epochs >= 1,
        "batch_size >= 1": config.batch_size >= 1,
        "grad_accum >= 1": config.grad_accum >= 1,
        "lr in (0, 1000]": 0 < config.lr <= 1000,
        "weight_decay >= 0": 0 <= config.weight_decay < math.inf,
        "min_crop in (0, 1]": 0 < config.min_crop <= 1,
        "holdout in [0, 1)": 0 <= config.holdout < 1,
        "head_dropout in [0, 1)": 0 <= config.head_dropout < 1,
        "adapter_dropout in [0, 1)": 0 <= config.adapter_dropout < 1,
        "module_dropout in [0, 1)": 0 <= config.module_dropout < 1,
        f"workers in 0..{4 * (os.cpu_count() or 1)}": config.workers is None
        or 0 <= config.workers <= 4 * (os.cpu_count() or 1),
        "targets (names of layers, or all)": bool(config.targets),
        "limit >= 1": config.limit is None or config.limit >= 1,
        "seed in 0..4294967295": 0 <= config.seed < 2**32,
        "save_minutes >= 0": config.save_minutes >= 0,
    }
    for rule, holds in limits.items():
        if not holds:
            name, allowed = rule.split(" ", 1)
            raise ValueError(f"{flag(name)} {getattr(config, name)}: expected {allowed}")
    if config.weights not in vit.NAMES and not Path(config.weights).exists():
        raise ValueError(
            f"--weights {config.weights}: no such file, and no such name; expected "
            f"{', '.join(vit.NAMES)} or a file"
        )
    if config.resume:
        check_resume(config)
    elif config.out and any(
        (Path(config.out) / name).exists()
        for name in ("config.json", "last.pt", checkpoint.ADAPTER_FILE)
    ):
        raise ValueError(taken(config.out))
    path = Path(config.out or "runs").absolute()
    above = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"--out {config.out or 'runs'}: cannot be made, {above} is no folder that can be written; "
            "name another"
        )


def check_sizes(config: Config, dataset: data.Dataset) -> None:
    """As check, for what depends on the data set."""
    batches = -(-len(dataset.train) // config.batch_size)
    if config.grad_accum > batches:
        raise ValueError(
            f"--grad-accum {config.grad_accum}: expected at most {batches}, the batches of an epoch "
            f"({len(dataset.train)} images, --batch-size {config.batch_size})"
        )
    if config.test and dataset.test is None:
        raise ValueError(f"--test: {config.dataset} has no test split, only train and validation")


def check_rank(config: Config, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "delta_weight") and config.rank > min(module.linear.weight.shape):
            raise ValueError(
                f"--rank {config.rank}: {name} is {tuple(module.linear.weight.shape)}; "
                f"expected at most {min(module.linear.weight.shape)}"
            )


def begun(config: Config) -> dict | None:
    """The content of the last.pt that --resume goes on from, its tensors left on the disk; None without."""
    file = Path(config.out or "") / "last.pt"
    going_on = config.resume and config.out and file.exists()
    return checkpoint.read_resume(file, mmap=True) if going_on else None


def check_resume(config: Config) -> None:
    """Refuse to go on with another run than the one in --out, before minutes are spent on its data."""
    if not config.out:
        raise ValueError("--resume: expected --out as well, the folder of the run to go on with")
    folder = Path(config.out)
    if then := begun(config):
        refuse_changes(config, then["config"])
    elif (folder / checkpoint.ADAPTER_FILE).exists():  # it would be overwritten
        raise ValueError(
            f"--resume: {folder} holds an adapter but no last.pt to go on from; name another folder"
        )
    elif (folder / "config.json").exists() and not is_ours(folder / "config.json"):  # likewise
        raise ValueError(
            f"--resume: {folder / 'config.json'} is of no run of train.py; name another folder"
        )


def is_ours(file: Path) -> bool:
    """Whether a config.json is a run's; also an empty one, which a kill at the start has left."""
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return not text or {"recipe", "adapter"} <= set(json.loads(text))
    except (ValueError, TypeError):
        return False


def refuse_changes(config: Config, then: dict) -> None:
    """Raise ValueError that names the flags in which a run's config differs from the one it began with."""
    now = asdict(config)
    changed = [key for key in now if key not in FREE and key in then and then[key] != now[key]]
    if changed:
        list_them = "; ".join(f"{flag(key)} was {then[key]}, is now {now[key]}" for key in changed)
        raise ValueError(f"--resume: {config.out}: {list_them}; give what was, or another --out")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(option) -> type:
    """The type of a field of Config: of int | None it is int."""
    return (get_args(option.type) or (option.type,))[0]


def named(weights: str) -> str:
    """A name of weights as it is; a file with its whole path, so that it is found from anywhere."""
    return weights if weights in vit.NAMES else str(Path(weights).absolute())


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse's own prints the usage, 40 lines of it, and exits
        raise ValueError(f"{message}; see --help")


def parse(argv: list[str] | None = None) -> Config:
    """The command line: a flag for each field of Config. Raises ValueError for one that is not."""
    parser = Parser(
        description="Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr."
    )
    for f in fields(Config):
        kind = kind_of(f)
        text = f.metadata["help"].replace("%", "%%")
        if f.metadata.get("default") is not None:
            text += f" (default: {f.metadata['default']})"
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(flag(f.name), default=f.default, help=text, **how)
    return Config(**vars(parser.parse_args(argv)))


def taken(folder: str | Path) -> str:
    return f"--out {folder}: holds a run already; go on with it (--resume), name another folder or remove it"
