"""The settings of a run: Config and its command line, the recipes, and which values are refused.

Only data: nothing here opens a file.
"""

import argparse
import math
import operator
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from engine.adapt import ADAPT, METHODS

# Data sets and trunks by name, as in data.SOURCES and vit.MODELS.
DATASETS = (
    "demo tiny-imagenet tiny-imagenet-official food101 cifar100 imagenet folder csv fashion-mnist"
).split()
MODELS = "vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14 vit_mini".split()


def option(default, help: str, choices=None):
    """A field of Config. It is None until __post_init__ takes the recipe's value or the default."""
    return field(default=None, metadata={"default": default, "help": help, "choices": choices})


@dataclass
class Config:
    """Everything that a run depends on. A field that is not given has the recipe's value, or the default.

    Every field is a flag of train.py. Raises ValueError for an unknown recipe or a value of the wrong type.
    """

    recipe: str = field(default="demo", metadata={"help": "the settings to start from"})
    dataset: str = option("demo", "data set", DATASETS)
    data_dir: str | None = option(None, "folder of the data set (default: search known places)")
    limit: int | None = option(None, "use at most this many images of each split")
    classes: str | None = option(None, "train on these classes only: names, separated by commas")
    download: bool = option(False, "download the data set if it is missing (food101, cifar100)")
    holdout: float = option(
        0.0, "fraction of the training images to validate on, instead of the validation split"
    )
    folds: int | None = option(
        None, "split the training images into this many parts, of which one validates"
    )
    fold: int = option(0, "the part that validates: 0 is the first")
    labels: str | None = option(
        None, "csv: the table of labels (default: train.csv, labels.csv, ... below --data-dir)"
    )
    image_column: str | None = option(
        None, "csv: the table's column of images (default: by its name)"
    )
    label_column: str | None = option(
        None, "csv: its column of labels (default: by its name), or columns of 0 and 1: a,b,c"
    )
    min_crop: float = option(0.08, "smallest random crop, as a fraction of the area; 1: no crops")
    flip: bool = option(True, "mirror training images at random")
    weights: str = option(
        "imagenet1k",
        "any plain ViT: OWNER/NAME on Hugging Face, a file, a folder, or one of imagenet1k, swag, in21k, "
        "embedded, none",
    )
    model: str | None = option(
        None, "the ViT of --weights imagenet1k, swag and none (default: vit_b_16)", MODELS
    )
    heads: int | None = option(
        None, "attention heads, where the weights and the files beside them do not say it"
    )
    image_size: int | None = option(None, "side of the images in pixels (default: the trunk's)")
    adapter: str = option("lora", "what trains", METHODS)
    rank: int = option(4, "inner dimension of the adapters")
    alpha: float = option(32.0, "the update is scaled by alpha / rank")
    targets: str = option("all", "all, or the ends of layer names, separated by commas")
    factor: int = option(
        -1, "LoKr: wanted rows and columns of W1; -1: near the square root of the layer's"
    )
    decompose_both: bool = option(
        False, "LoKr: W1 is a product of two factors too, if rank is small enough"
    )
    bias: str = option("none", "biases that train as well", ("none", "all", "adapter"))
    head_dropout: float = option(0.0, "dropout before the head")
    adapter_dropout: float = option(0.0, "dropout of each adapter's input")
    module_dropout: float = option(0.0, "probability that a forward leaves out an adapter")
    init_adapter: str | None = option(
        None, "adapter file or PEFT folder to start from; sets trunk and adapter too"
    )
    epochs: int = option(5, "passes through the training split")
    batch_size: int = option(64, "images in a forward pass, over all GPUs and processes")
    grad_accum: int = option(1, "batches per optimizer step")
    lr: float = option(1e-3, "the highest learning rate; it falls linearly to zero")
    warmup: float = option(0.0, "fraction of all steps in which the rate rises linearly to --lr")
    weight_decay: float = option(0.01, "AdamW's weight decay")
    clip_norm: float = option(0.0, "largest norm of a step's gradients; 0: they are not clipped")
    label_smoothing: float = option(
        0.0, "share of each training label that is spread evenly over all classes"
    )
    class_weights: str = option(
        "none", "weights of the classes in the training loss", ("none", "balanced")
    )
    best_by: str = option(
        "accuracy",
        "figure of the validation by which the best epoch is kept",
        ("accuracy", "balanced", "loss"),
    )
    recompute: bool = option(
        False, "run each block again in backward, and keep less for it: slower, less memory"
    )
    amp: str = option("auto", "mixed precision", ("auto", "bf16", "fp16", "off"))
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int | None = option(None, "processes that decode images (default: one per core)")
    cache: bool = option(False, "decode large images only once and keep them on disk")
    cache_dir: str | None = option(None, "folder for decoded images (default: cache/ beside --out)")
    seed: int = option(0, "seed of everything random")
    test: bool = option(False, "evaluate the best epoch on the test split too")
    out: str | None = option(
        None, "the run's folder (default: runs/<recipe>-<adapter>-<seed>-<time>)"
    )
    resume: bool = option(False, "resume the run in --out; start it if there is none")
    save_minutes: float = option(10.0, "minutes between two saves of last.pt within an epoch")
    max_hours: float | None = option(
        None, "hours after which the run saves and ends, with status 0; --resume continues it"
    )

    def __post_init__(self):
        fill(self, RECIPES)
        if "model" in self.filled and self.weights != "none":
            self.model = None  # a recipe names it for random weights alone


def fill(config, recipes: dict[str, dict]) -> None:
    """Give each field that is None the value of the config's recipe, or its default."""
    if config.recipe not in recipes:
        raise ValueError(f"--recipe {config.recipe}: expected one of {', '.join(recipes)}")
    settings = recipes[config.recipe]
    config.filled = {}  # what was not given; for dataclasses.replace, everything is given
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None:
            value = settings.get(f.name, f.metadata.get("default"))
            value = config.filled[f.name] = for_adapter(value, config.adapter)
        setattr(config, f.name, converted(f, value))


def for_adapter(value, adapter: str):
    """A value of a recipe, which may have one for each adapter. check refuses an adapter that is none."""
    return value.get(str(adapter), value["lora"]) if isinstance(value, dict) else value


def converted(f, value):
    """A given value in the type of its field: NumPy's numbers too, which JSON refuses."""
    kind = kind_of(f)
    if value is None:
        return None
    if isinstance(value, Path):
        return str(value)
    if kind is bool and not isinstance(value, bool):
        raise ValueError(f"{flag(f.name)} {value!r}: expected True or False")
    if kind in (int, float):
        try:
            return operator.index(value) if kind is int else float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{flag(f.name)} {value!r}: expected {kind.__name__}") from None
    return value


FOOD101 = {  # shared by its three recipes
    "dataset": "food101",
    "weights": "in21k",
    "rank": 16,
    "alpha": 16.0,
    "targets": "query,value",
    "epochs": 5,
    "batch_size": 128,
    "grad_accum": 4,
    "lr": 5e-3,
    "weight_decay": 0.0,  # this and the next are the defaults of transformers' Trainer
    "clip_norm": 1.0,
    "amp": "fp16",
}
RECIPES = {
    "demo": {
        "dataset": "demo",
        "model": "vit_mini",
        "weights": "embedded",
        "min_crop": 0.7,
        "flip": False,  # a mirrored digit is not a digit
        "adapter": "lora",
        "rank": 4,
        "alpha": 16.0,
        "epochs": 6,
        "batch_size": 64,
        "lr": {"head": 0.25, "lora": 5e-3, "loha": 0.0125, "lokr": 0.03125, "full": 2e-3},
    },
    "tiny-imagenet-lora": {
        "dataset": "tiny-imagenet",
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
        # The guide trains on train[:5000] in Hugging Face's order: these seven of the 101 classes.
        "classes": "beignets,bruschetta,chicken_wings,hamburger,pork_chop,prime_rib,ramen",
        "limit": 5000,
        "holdout": 0.1,
        "adapter": "lora",
        "adapter_dropout": 0.1,
    },
    "food101-loha": {**FOOD101, "adapter": "loha", "module_dropout": 0.1},
    "food101-lokr": {**FOOD101, "adapter": "lokr", "module_dropout": 0.1},
}

LOAD = (  # the arguments of data.load, but for the first one
    "data_dir limit classes download holdout folds fold labels image_column label_column"
).split()

# What a resumed run may change: it does not change what is learnt, or it is compared elsewhere (the trunk).
FREE = (
    "recipe data_dir weights model download recompute device workers cache_dir test out resume "
    "save_minutes max_hours"
).split()


def check(config: Config) -> None:
    """Raise ValueError in one line, with flag, value and what is allowed, for a value that cannot work."""
    limits = {
        "rank >= 1": config.rank >= 1,
        "alpha > 0": 0 < config.alpha < math.inf,
        "factor any whole number but 0": config.factor != 0,
        "image_size >= 1": config.image_size is None or config.image_size >= 1,
        "heads >= 1": config.heads is None or config.heads >= 1,
        "epochs >= 1": config.epochs >= 1,
        "batch_size >= 1": config.batch_size >= 1,
        "grad_accum >= 1": config.grad_accum >= 1,
        "lr in (0, 1000]": 0 < config.lr <= 1000,
        "warmup in [0, 1)": 0 <= config.warmup < 1,
        "weight_decay >= 0": 0 <= config.weight_decay < math.inf,
        "clip_norm >= 0": 0 <= config.clip_norm < math.inf,
        "label_smoothing in [0, 1)": 0 <= config.label_smoothing < 1,
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
        "max_hours > 0": config.max_hours is None or config.max_hours > 0,
    }
    check_values(config, limits)


def check_values(config, limits: dict[str, bool]) -> None:
    """Raise ValueError for a value that is none of its field's choices, or breaks a limit.

    limits: whether "FIELD what is allowed" holds.
    """
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        if choices and value not in (*choices, f.metadata["default"]):
            raise ValueError(f"{flag(f.name)} {value}: expected one of {', '.join(choices)}")
    for rule, holds in limits.items():
        if not holds:
            name, allowed = rule.split(" ", 1)
            raise ValueError(f"{flag(name)} {getattr(config, name)}: expected {allowed}")


def check_sizes(config: Config, images: int, has_test: bool) -> None:
    """As check, for what depends on the data set: its training images, and whether it has a test split."""
    batches = -(-images // config.batch_size)
    if config.grad_accum > batches:
        raise ValueError(
            f"--grad-accum {config.grad_accum}: expected at most {batches}, the batches of an epoch "
            f"({images} images, --batch-size {config.batch_size})"
        )
    if config.test and not has_test:
        raise ValueError(f"--test: {config.dataset} has no test split, only train and validation")


def hyperparameters(config: Config) -> dict:
    """The settings of the recipe, the flags and --init-adapter that change what is learnt."""
    given = {f.name for f in fields(config)} - config.filled.keys()
    keys = {*RECIPES[config.recipe], *given, *(ADAPT if config.init_adapter else ())} - {*FREE}
    settings = {key: getattr(config, key) for key in sorted(keys | {"weights"})}
    return {key: value for key, value in settings.items() if value is not None}


def refuse_changes(config, previous: dict, free=FREE) -> None:
    """Raise ValueError if a flag that changes what is learnt differs from the config that the run had."""
    now = asdict(config)
    changed = [
        key for key in now if key not in free and key in previous and previous[key] != now[key]
    ]
    if changed:
        listed = "; ".join(f"{flag(key)} was {previous[key]}, is now {now[key]}" for key in changed)
        raise ValueError(
            f"--resume: {config.out}: {listed}; give the old value, or another --out for a new run"
        )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(f) -> type:
    """The type of a field of Config; of int | None it is int."""
    return (get_args(f.type) or (f.type,))[0]


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse itself would print the usage, 40 lines, and exit
        raise ValueError(f"{message}; see --help")


def parse(
    argv: list[str] | None = None,
    kind=Config,
    recipes=RECIPES,
    what="Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr.",
):
    """The command line as a Config, or as another such dataclass with its recipes.

    Raises ValueError for an unknown flag or a wrong value.
    """
    parser = Parser(
        description=what,
        epilog="A recipe (default: demo) overrides these defaults, and a flag overrides the recipe.",
    )
    for f in fields(kind):
        text = f.metadata["help"].replace("%", "%%")
        if choices := recipes if f.name == "recipe" else f.metadata.get("choices"):
            text += f": {', '.join(choices)}"
        if f.metadata.get("default") is not None:
            text += f" (default: {f.metadata['default']})"
        how = {"type": kind_of(f)}
        how = {"action": argparse.BooleanOptionalAction} if how["type"] is bool else how
        parser.add_argument(flag(f.name), default=f.default, help=text, **how)
    return kind(**vars(parser.parse_args(argv)))
