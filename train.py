"""Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr.

    python train.py                                   # the embedded demo, about a minute on two cores
    python train.py --adapter lokr --rank 8           # any field of Config is a flag
    python train.py --recipe tiny-imagenet-lora       # ViT-B/16 and Tiny-ImageNet, best on a GPU
    python train.py --init-adapter runs/x/adapter.safetensors      # on from an adapter, or a PEFT folder

or, in a notebook, the same with

    import train
    result = train.train(train.Config(adapter="lokr", rank=8))
"""

import argparse
import csv
import itertools
import json
import math
import operator
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import data
import export
import pictures
import vit


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
    adapter: str = option("lora", "what trains", checkpoint.METHODS)
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
    batch_size: int = option(64, "images to a forward and backward")
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

    def __post_init__(self):
        if self.recipe not in RECIPES:
            raise ValueError(f"--recipe {self.recipe}: expected one of {', '.join(RECIPES)}")
        settings = dict(RECIPES[self.recipe])
        if self.init_adapter:
            settings |= export.start_settings(self.init_adapter)
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None:
                value = settings.get(f.name, f.metadata.get("default"))
            elif isinstance(value, Path):
                value = str(value)
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


@dataclass
class Run:
    """What prepare made ready and fit trains."""

    config: Config
    dataset: data.Dataset
    model: nn.Module
    info: dict  # the adapter file's
    trainable: int
    total: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 is off
    folder: Path


def train(config: Config) -> dict:
    """Train as config says; return val_accuracy (0..1, the best epoch's), run_dir, trainable, total, ...

    Raises ValueError or OSError, before anything is written, for a config or data that cannot work.
    """
    return fit(prepare(config))


def prepare(config: Config) -> Run:
    """Check the config, load data and trunk, adapt the trunk and make the run's folder."""
    check(config)
    device = pick_device(config.device)
    dtype = pick_dtype(config.amp, device)
    torch.manual_seed(config.seed)
    c = config
    dataset = data.load(c.dataset, c.data_dir, c.limit, c.classes, c.download, c.holdout)
    if c.test and dataset.test is None:
        raise ValueError(f"--test: {c.dataset} has no test split, only train and validation")
    model, preprocessing = vit.build(
        c.model, c.weights, len(dataset.classes), c.image_size, c.head_dropout, c.seed
    )
    arguments = {key: getattr(config, key) for key in checkpoint.ADAPT}
    trainable, total = checkpoint.adapt(
        model, dropout=config.adapter_dropout, module_dropout=config.module_dropout, **arguments
    )
    check_rank(config, model)
    if c.init_adapter:
        print(export.start(model, c.init_adapter, dataset.classes))
    cache_dir = c.cache_dir or (Path(c.out).parent if c.out else Path("runs")) / "cache"
    for split in (dataset.train, dataset.val, *([dataset.test] if c.test else [])):
        data.keep(split, cache_dir, preprocessing["image_size"], c.cache, c.workers)
    info = {
        **arguments,
        "model": config.model,
        "weights": named(config.weights),
        "seed": config.seed,
        "trunk": checkpoint.fingerprint(model),
        "eps": model.encoder.ln.eps,
        "classes": dataset.classes,
        "preprocessing": preprocessing,
    }
    return Run(config, dataset, model, info, trainable, total, device, dtype, make_folder(config))


def fit(run: Run) -> dict:
    """Train for the epochs of the config, evaluate after each, keep the best, draw the pictures."""
    config, dataset = run.config, run.dataset
    model = run.model.to(run.device)
    forward = Autocast(model, run.device, run.dtype)
    if many_gpus(run.device):
        forward = nn.DataParallel(forward)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    per_step = config.batch_size * config.grad_accum
    steps = -(-len(dataset.train) // per_step)  # of an epoch; the last one may be smaller
    log = Log(run, steps)
    best, file = {"val_accuracy": -1.0}, run.folder / "adapter.safetensors"

    for epoch in range(config.epochs):
        model.train()
        batches = load_batches(run, dataset.train, train=True, epoch=epoch)
        progress = f"epoch {epoch + 1}/{config.epochs}"
        for step in data.progress(range(steps), desc=progress):
            done = epoch * steps + step
            lr = config.lr * (1 - done / (config.epochs * steps))
            optimizer.param_groups[0]["lr"] = lr
            images = min(per_step, len(dataset.train) - step * per_step)
            loss = train_step(run, forward, batches, images, optimizer, scaler)
            log.step(done + 1, loss, lr, images)
        val_loss, val_accuracy = evaluate(forward, load_batches(run, dataset.val))
        log.epoch(epoch + 1, val_loss, val_accuracy)
        if val_accuracy > best["val_accuracy"]:
            best = {"val_loss": val_loss, "val_accuracy": val_accuracy, "best_epoch": epoch + 1}
            checkpoint.save_adapter(file, model, run.info)

    checkpoint.restore(model, file)
    if config.test:
        test_loss, test_accuracy = evaluate(forward, load_batches(run, dataset.test))
        best |= {"test_loss": test_loss, "test_accuracy": test_accuracy}
        print(f"Test Accuracy: {test_accuracy:.2%}")
    log.close(best)
    try:
        draw(run, best["val_accuracy"])
    except OSError as error:  # a full disk: the adapter is written, and its accuracy worth printing
        print(f"train.py: no pictures: {error}", file=sys.stderr)
    print(f"run folder: {run.folder}")
    print(f"Validation Accuracy: {best['val_accuracy']:.2%}")
    counts = {"trainable": run.trainable, "total": run.total}
    speed = {"images_per_second": log.images_per_second}
    return {**best, **counts, **speed, "run_dir": str(run.folder)}


class Autocast(nn.Module):
    """The model in mixed precision. A module, so that it reaches the threads of DataParallel, which
    know nothing of an autocast around them."""

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.model, self.device_type, self.dtype = model, device.type, dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device_type, self.dtype, self.dtype != torch.float32):
            return self.model(images)


def train_step(run, model, batches, images: int, optimizer, scaler) -> torch.Tensor:
    """One step of the optimizer on the next so many images; the mean loss of them, on the device.

    Each batch weighs as much as it has images: the gradient is that of all of them in one batch.
    """
    mean_loss = torch.zeros((), device=run.device)
    for _ in range(-(-images // run.config.batch_size)):
        pixels, labels = next(batches)
        loss = F.cross_entropy(model(pixels).float(), labels, reduction="sum") / images
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return mean_loss


@torch.inference_mode()
def evaluate(model: nn.Module, batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) of the model over all batches, in eval mode."""
    model.eval()
    loss = correct = total = 0
    for images, labels in batches:
        logits = model(images)
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        correct += (logits.argmax(-1) == labels).sum().item()
        total += len(labels)
    return loss / total, correct / total


def load_batches(run: Run, split: data.Split, train: bool = False, epoch: int = 0):
    """The batches of a split as the run's config wants them."""
    c, preprocessing = run.config, run.info["preprocessing"]
    augment = {"train": train, "min_crop": c.min_crop, "flip": c.flip}
    random = {"seed": c.seed, "epoch": epoch}
    batches = data.batches(
        split, c.batch_size, preprocessing, run.device, workers=c.workers, **augment, **random
    )
    if train:
        return batches  # the bar of an epoch counts steps
    return data.progress(batches, desc="evaluate", total=-(-len(split) // c.batch_size))


class Log:
    """What a run says of itself: TensorBoard events, metrics.csv and one printed line an epoch."""

    COLUMNS = "epoch step lr train_loss images_per_second val_loss val_accuracy".split()

    def __init__(self, run: Run, steps: int):
        self.run, self.steps = run, steps
        self.every = max(1, steps // 20)  # steps to a point: to read a loss is to wait for the GPU
        self.images_per_second = 0.0
        self.writer = SummaryWriter(run.folder)
        self.start_epoch()
        with open(run.folder / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerow(self.COLUMNS)
        share = run.trainable / run.total
        print(
            f"{run.config.adapter}: {run.trainable:,} of {run.total:,} parameters train ({share:.2%}), "
            f"on {len(run.dataset.train):,} images, {run.device}, {str(run.dtype)[6:]}",
            flush=True,
        )

    def start_epoch(self):
        self.losses, self.images = [], []  # of each step since the epoch's start
        self.seconds, self.clock = 0.0, time.perf_counter()

    def step(self, done: int, loss: torch.Tensor, lr: float, images: int):
        self.losses.append(loss)
        self.images.append(images)
        if len(self.losses) % self.every == 0 or len(self.losses) == self.steps:
            train_loss = self.mean(self.every)
            self.seconds += time.perf_counter() - self.clock
            self.clock = time.perf_counter()
            self.images_per_second = sum(self.images) / self.seconds
            if not math.isfinite(train_loss):
                raise ValueError(
                    f"the loss is {train_loss} at step {done} (learning rate {lr:.3g}); the best epoch so "
                    f"far is in {self.run.folder}; try a smaller --lr or --alpha, or --amp off"
                )
            row = {"lr": lr, "train_loss": train_loss, "images_per_second": self.images_per_second}
            self.write(done, **row)

    def mean(self, steps: int) -> float:
        """The loss of an image over the last steps of this epoch."""
        images = torch.tensor(self.images[-steps:], dtype=torch.float64)
        losses = torch.stack(self.losses[-steps:]).cpu().double()
        return (losses @ images / images.sum()).item()

    def epoch(self, epoch: int, val_loss: float, val_accuracy: float):
        self.write(epoch * self.steps, val_loss=val_loss, val_accuracy=val_accuracy)
        print(
            f"epoch {epoch}/{self.run.config.epochs}: train loss {self.mean(self.steps):.4f}, "
            f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}, "
            f"{self.images_per_second:,.0f} images/s",
            flush=True,
        )
        self.start_epoch()
        splits = (self.run.dataset.train, self.run.dataset.val, self.run.dataset.test)
        if bad := [reason for split in splits if split for reason in split.bad.values()]:
            (self.run.folder / "unreadable.txt").write_text("\n".join(bad) + "\n")

    def write(self, step: int, **values):
        for key, value in values.items():  # train_loss is train/loss in TensorBoard
            tag = key.replace("_", "/") if key.startswith(("train", "val")) else key
            self.writer.add_scalar(tag, value, step)
        row = {"epoch": f"{step / self.steps:.6g}", "step": step, **values}
        with open(self.run.folder / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS, restval="").writerow(row)

    def close(self, best: dict):
        settings = {k: v for k, v in asdict(self.run.config).items() if v is not None}
        settings = {k: str(v) if isinstance(v, list | tuple) else v for k, v in settings.items()}
        self.writer.add_hparams(settings, {f"best/{k}": v for k, v in best.items()}, run_name=".")
        self.writer.close()


def draw(run: Run, accuracy: float) -> None:
    """curves.png and predictions.png: 24 validation images and what the best epoch says of them."""
    config = run.config
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "head": "linear probe", "full": "full"}
    what = names[config.adapter]
    what += f" rank {config.rank}" if config.adapter in checkpoint.ADAPTERS else ""
    pictures.plot_curves(
        run.folder / "metrics.csv",
        run.folder / "curves.png",
        f"{config.dataset}, {what}: {run.trainable:,} trainable parameters",
    )
    preprocessing = run.info["preprocessing"]
    few = run.dataset.val.rows(data.even_rows(run.dataset.val.labels, 24))
    images, labels = next(iter(data.batches(few, 24, preprocessing, run.device, workers=0)))
    with torch.inference_mode():
        logits = run.model(images).float().cpu()
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    pictures.plot_predictions(
        images.cpu() * std + mean,
        logits,
        labels.cpu(),
        run.dataset.classes,
        run.folder / "predictions.png",
        f"{config.dataset}, {what}: validation accuracy {accuracy:.1%}",
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
        "lr > 0": 0 < config.lr < math.inf,
        "weight_decay >= 0": 0 <= config.weight_decay < math.inf,
        "min_crop in (0, 1]": 0 < config.min_crop <= 1,
        "holdout in [0, 1)": 0 <= config.holdout < 1,
        "head_dropout in [0, 1)": 0 <= config.head_dropout < 1,
        "adapter_dropout in [0, 1)": 0 <= config.adapter_dropout < 1,
        "module_dropout in [0, 1)": 0 <= config.module_dropout < 1,
        "workers >= 0": config.workers is None or config.workers >= 0,
        "limit >= 1": config.limit is None or config.limit >= 1,
        "seed in 0..4294967295": 0 <= config.seed < 2**32,
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
    if config.out and (Path(config.out) / "config.json").exists():
        raise ValueError(taken(config.out))


def check_rank(config: Config, model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "delta_weight") and config.rank > min(module.linear.weight.shape):
            raise ValueError(
                f"--rank {config.rank}: {name} is {tuple(module.linear.weight.shape)}; "
                f"expected at most {min(module.linear.weight.shape)}"
            )


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is a GPU if there is one. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); try --device cpu") from None
    return device


def pick_dtype(amp: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where a GPU has it natively, float16 on older ones, else float32."""
    if amp == "auto":
        if device.type != "cuda":
            return torch.float32
        native = torch.cuda.is_bf16_supported(including_emulation=False)  # a T4 only emulates it
        return torch.bfloat16 if native else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]


def many_gpus(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1


def named(weights: str) -> str:
    """A name of weights as it is; a file with its whole path, so that it is found from anywhere."""
    return weights if weights in vit.NAMES else str(Path(weights).absolute())


def make_folder(config: Config) -> Path:
    """Make the run's folder and write config.json, with the versions that it runs on, into it."""
    name = f"{config.recipe}-{config.adapter}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps({**asdict(config), "versions": versions}, indent=2)
    for folder in [Path(config.out)] if config.out else (Path("runs") / name for name in names):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "config.json", "x") as file:  # of two runs at once, one gets it
                file.write(text + "\n")
            return folder
        except FileExistsError:
            continue  # runs that start in one second have names of their own
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    raise ValueError(taken(config.out))


def taken(folder: str | Path) -> str:
    return f"--out {folder}: holds a run already, or is a file; name another folder or remove it"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kind_of(option) -> type:
    """The type of a field of Config: of int | None it is int."""
    return (get_args(option.type) or (option.type,))[0]


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


def main(argv: list[str] | None = None) -> int:
    """Train as the command line says; 0, or 2 after one line on stderr for what cannot work."""
    try:
        train(parse(argv))
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
