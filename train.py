"""Adapt a pretrained Vision Transformer to a data set with LoRA, LoHa or LoKr.

    python train.py                                   # the embedded demo, about a minute on two cores
    python train.py --adapter lokr --rank 8           # any field of Config is a flag
    python train.py --recipe tiny-imagenet-lora       # ViT-B/16 and Tiny-ImageNet, best on a GPU
    python train.py --init-adapter runs/x/adapter.safetensors      # on from an adapter, or a PEFT folder
    python train.py --out runs/x --resume             # on where runs/x was stopped, bit for bit
    torchrun --nproc_per_node=2 train.py              # two processes share each batch

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
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import IO, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import data
import export
import pictures
import vit

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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


# What another machine or a later session may change in a run that goes on.
FREE = "recipe data_dir download device workers cache_dir test out resume save_minutes".split()


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
    lock: IO  # while it is open, no other process may train in the folder
    unwritten: set[str] = field(default_factory=set)  # files that could not be: see attempt


def train(config: Config) -> dict:
    """Train as config says; return val_accuracy (0..1, the best epoch's), run_dir, trainable, total, ...

    Raises ValueError or OSError, before anything is written, for a config or data that cannot work.
    """
    try:
        result = fit(prepare(config))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(smaller(config, error)) from None
    if world() > 1:
        dist.destroy_process_group()
    return result


def prepare(config: Config) -> Run:
    """Check the config, load data and trunk, adapt the trunk and make the run's folder."""
    check(config)
    device = pick_device(join(config.device))
    dtype = pick_dtype(config.amp, device)
    checkpoint.seed_generators(config.seed)
    c = config
    cache_dir = c.cache_dir or (Path(c.out).parent if c.out else Path("runs")) / "cache"
    with in_turn():
        dataset = data.load(c.dataset, c.data_dir, c.limit, c.classes, c.download, c.holdout)
        check_sizes(config, dataset)
        model, preprocessing = vit.build(
            c.model, c.weights, len(dataset.classes), c.image_size, c.head_dropout, c.seed
        )
        arguments = {key: getattr(config, key) for key in checkpoint.ADAPT}
        trainable, total = checkpoint.adapt(
            model, dropout=config.adapter_dropout, module_dropout=config.module_dropout, **arguments
        )
        check_rank(config, model)
        if c.init_adapter:
            preprocessing |= export.start_preprocessing(c.init_adapter)
            print(export.start(model, c.init_adapter, dataset.classes))
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
    made = make_folder(config)
    return Run(config, dataset, model, info, trainable, total, device, dtype, *made)


def fit(run: Run) -> dict:
    """Train for the epochs of the config, evaluate after each, keep the best, draw the pictures."""
    config = run.config
    model = run.model.to(run.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    with run.lock, Signals() as signals:
        at = Progress(run, optimizer, scaler)
        forward = spread(Autocast(model, run.device, run.dtype), run.device)
        if at.result and (not config.test or "test_loss" in at.result):
            print(f"{run.folder}: finished already, nothing is left to train")
            print(f"Validation Accuracy: {at.best['val_accuracy']:.2%}")
            return at.result | {"run_dir": str(run.folder)}
        try:
            while at.epoch < config.epochs:
                train_epoch(run, forward, at, signals)
        except FloatingPointError as error:
            raise ValueError(at.diverged(error)) from None
        return finish(run, forward, at, signals)


def train_epoch(run: Run, forward: nn.Module, at: "Progress", signals: "Signals") -> None:
    """What is left of the epoch that the run is in: its steps, its evaluation, the best epoch kept."""
    config, split, steps = run.config, run.dataset.train, at.steps
    per_step = config.batch_size * config.grad_accum
    first = at.done - at.epoch * steps
    run.model.train()
    batches = load_batches(run, split, train=True, epoch=at.epoch, start=first * per_step)
    bar = {"desc": f"epoch {at.epoch + 1}/{config.epochs}", "initial": first, "total": steps}
    for step in data.progress(range(first, steps), **bar):
        lr = config.lr * (1 - at.done / (config.epochs * steps))
        at.optimizer.param_groups[0]["lr"] = lr
        images = min(per_step, len(split) - step * per_step)  # the last step may be smaller
        loss = train_step(run, forward, batches, images, at.optimizer, at.scaler)
        at.done += 1
        at.log.step(at.done, loss, lr, images)
        if at.due():
            at.save()
        signals.obey(at)
    batches = signals.watch(load_batches(run, run.dataset.val), at)
    val_loss, val_accuracy = evaluate(forward, batches)
    at.epoch += 1
    at.log.epoch(at.epoch, val_loss, val_accuracy)
    better = val_accuracy > at.best["val_accuracy"]
    if better:
        at.best = {"val_loss": val_loss, "val_accuracy": val_accuracy, "best_epoch": at.epoch}
        at.best_tensors = checkpoint.trained(run.model)
    at.save()  # first, so that where there is an adapter file, there is a run to go on with
    if better or at.ADAPTER in run.unwritten:
        at.save_adapter()


def finish(run: Run, forward: nn.Module, at: "Progress", signals: "Signals") -> dict:
    """Put the best epoch back, test it if that was asked for, draw it, and return the result."""
    config, best = run.config, at.best
    checkpoint.put(run.model, at.best_tensors)
    run.model.eval()  # a run that goes on after its last epoch has not been evaluated
    if config.test:
        batches = signals.watch(load_batches(run, run.dataset.test), at)
        test_loss, test_accuracy = evaluate(forward, batches)
        best = best | {"test_loss": test_loss, "test_accuracy": test_accuracy}
        print(f"Test Accuracy: {test_accuracy:.2%}")
    at.log.close(best)
    attempt(run, "pictures", lambda: draw(run, best["val_accuracy"]))
    if at.ADAPTER in run.unwritten and not at.save_adapter():
        raise ValueError(
            f"{run.folder / at.ADAPTER}: cannot be written; make room and {at.go_on()}"
        )
    counts = {"trainable": run.trainable, "total": run.total}
    at.result = {**best, **counts, "images_per_second": at.log.images_per_second}
    at.save()
    print(f"run folder: {run.folder}")
    print(f"Validation Accuracy: {best['val_accuracy']:.2%}")
    return {**at.result, "run_dir": str(run.folder)}


class Progress:
    """How far a run has come, in memory and, from time to time, in last.pt."""

    ADAPTER = checkpoint.ADAPTER_FILE

    def __init__(self, run: Run, optimizer, scaler):
        self.run, self.optimizer, self.scaler = run, optimizer, scaler
        per_step = run.config.batch_size * run.config.grad_accum
        self.steps = -(-len(run.dataset.train) // per_step)  # of an epoch
        self.done = self.epoch = 0  # steps of the optimizer; epochs that are evaluated
        self.best, self.best_tensors, self.result = {"val_accuracy": -1.0}, {}, None
        self.saved = None  # the step that last.pt stands at
        self.clock = time.monotonic()
        self.log = Log(run, self.steps)
        self.file = run.folder / "last.pt"
        if run.config.resume:
            self.load()
            meet_at(self.done, run.device)

    def due(self) -> bool:
        return time.monotonic() - self.clock >= 60 * self.run.config.save_minutes

    def save(self) -> None:
        """Write last.pt, if it can be. FloatingPointError if the run has gone astray."""
        splits = (self.run.dataset.train, self.run.dataset.val)
        rest = {
            **{key: getattr(self, key) for key in self.KEPT},
            "log": self.log.state(),
            "bad": [split.bad for split in splits],
            "identity": identity(self.run),
            "config": asdict(self.run.config),
        }
        model = self.run.model
        write = partial(checkpoint.save_resume, self.file, model, self.optimizer, self.scaler, rest)
        if attempt(self.run, "last.pt", write):
            self.saved = self.done
        self.clock = time.monotonic()

    KEPT = ("done", "epoch", "best", "best_tensors", "result")

    def load(self) -> None:
        """Go on where last.pt stands. Raises ValueError if it is of another run."""
        if not self.file.exists():
            print(f"--resume: no last.pt in {self.run.folder}; the run starts from the beginning")
            return
        content = checkpoint.read_resume(self.file)
        refuse_changes(self.run.config, content["config"])
        for key, now in identity(self.run).items():
            if (then := content["identity"][key]) != now:
                raise ValueError(f"--resume: {self.file}: {key} was {then}, is now {now}")
        checkpoint.restore_resume(content, self.run.model, self.optimizer, self.scaler)
        for key in self.KEPT:
            setattr(self, key, content[key])
        for split, bad in zip(
            (self.run.dataset.train, self.run.dataset.val), content["bad"], strict=True
        ):
            split.bad.update(bad)
        self.log.restore(content["log"])
        self.saved = self.done
        if self.result:
            return
        total = self.steps * self.run.config.epochs
        print(f"{self.run.folder} goes on after step {self.done} of {total}", flush=True)
        if self.best_tensors:  # a run may end between the two files
            self.save_adapter()

    def save_adapter(self) -> bool:
        """Write the best epoch so far, if it can be."""
        file = self.run.folder / self.ADAPTER
        write = partial(checkpoint.write_adapter, file, self.best_tensors, self.run.info)
        return attempt(self.run, self.ADAPTER, write)

    def go_on(self) -> str:
        return f"go on with the same command and --out {self.run.folder} --resume"

    def diverged(self, what: object) -> str:
        """What to say of a run whose loss or tensors are not finite any more."""
        lr = self.optimizer.param_groups[0]["lr"]
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        kept = f"; last.pt stays at step {self.saved}" if self.saved is not None else ""
        return (
            f"{what} at step {self.done} (learning rate {lr:.3g}{scale}); the best epoch so far is in "
            f"{self.run.folder}{kept}; try a smaller --lr or --alpha, or --amp off"
        )


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end, and it has."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.status = 128 + number


class Signals:
    """SIGINT (ctrl-C) and SIGTERM, noted, and obeyed once the step is done and saved."""

    def __init__(self):
        self.asked, self.before = None, {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.note) or signal.SIG_DFL
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if error and self.asked and rank() > 0:  # it broke off because the first process has gone
            raise Stopped(self.asked, "stopped with the first process") from None

    def note(self, number: int, frame) -> None:
        if self.asked and world() == 1:  # torchrun passes on what ctrl-C has told already
            raise KeyboardInterrupt  # asked twice: at once
        self.asked = number

    def obey(self, at: Progress) -> None:
        """Save and raise Stopped if a signal has come; of several processes the first one does."""
        if not self.asked or rank() > 0:
            return
        at.save()
        kept = f"last.pt stands at step {at.saved}" if at.saved is not None else "nothing is saved"
        name = signal.Signals(self.asked).name
        message = f"stopped by {name} after step {at.done}; {kept}; {at.go_on()}"
        raise Stopped(self.asked, message)

    def watch(self, batches: Iterator, at: Progress) -> Iterator:
        """The batches of an evaluation, which changes nothing and can be left at any of them."""
        for batch in batches:
            self.obey(at)
            yield batch


def attempt(run: Run, name: str, write: Callable[[], None]) -> bool:
    """Write a file of the run: True. Where that fails, as on a full disk, warn, once, and go on.

    Of several processes only the first one writes.
    """
    if rank() > 0:
        return True
    try:
        write()
    except OSError as error:
        if name not in run.unwritten:
            tell = f"{run.folder}: {name} cannot be written ({error}); training goes on, and tries again"
            tqdm.write(f"train.py: {tell}", file=sys.stderr)
        run.unwritten.add(name)
        return False
    run.unwritten.discard(name)
    return True


def identity(run: Run) -> dict:
    """What has to be the same in a run that goes on, beside its flags."""
    images = [len(run.dataset.train), len(run.dataset.val)]
    return {"images": images, "classes": run.dataset.classes, "trunk": run.info["trunk"]}


def refuse_changes(config: Config, then: dict) -> None:
    """Raise ValueError that names the flags in which a run's config differs from the one it began with."""
    now = asdict(config)
    changed = [key for key in now if key not in FREE and key in then and then[key] != now[key]]
    if changed:
        list_them = "; ".join(f"{flag(key)} was {then[key]}, is now {now[key]}" for key in changed)
        raise ValueError(f"--resume: {config.out}: {list_them}; give what was, or another --out")


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

    Each batch weighs as much as it has images: the gradient is that of all of them in one batch, however
    many processes share it. Those exchange gradients in the last backward, and DDP takes the mean of them.
    """
    mean_loss = torch.zeros((), device=run.device)
    for left in reversed(range(-(-images // run.config.batch_size))):
        pixels, labels = next(batches)
        with model.no_sync() if left and world() > 1 else nullcontext():
            loss = F.cross_entropy(model(pixels).float(), labels, reduction="sum") / images
            scaler.scale(loss * world()).backward()
        mean_loss += loss.detach()
    if world() > 1:
        dist.all_reduce(mean_loss)
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
        total += (labels >= 0).sum().item()
    if world() > 1:
        sums = torch.tensor([loss, correct, total], dtype=torch.float64, device=labels.device)
        dist.all_reduce(sums)
        loss, correct, total = sums.tolist()
    return loss / total, correct / total


def load_batches(run: Run, split: data.Split, train: bool = False, epoch: int = 0, start: int = 0):
    """The batches of a split as the run's config wants them."""
    c, preprocessing = run.config, run.info["preprocessing"]
    augment = {"train": train, "min_crop": c.min_crop, "flip": c.flip}
    random = {"seed": c.seed, "epoch": epoch, "start": start, "part": (rank(), world())}
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
        self.rows, self.writer = [], None
        self.start_epoch()
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
                raise FloatingPointError(f"the loss is {train_loss}")
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
            text = "\n".join(bad) + "\n"
            file = self.run.folder / "unreadable.txt"
            attempt(self.run, file.name, lambda: file.write_text(text))

    def write(self, step: int, **values):
        epoch = f"{step / self.steps:.6g}"
        self.rows.append({"epoch": epoch, "step": step, **values, "time": time.time()})
        self.save()

    def save(self):
        """Bring the files up to all rows, with those that a full disk refused or a kill cut off."""
        attempt(self.run, "metrics.csv", self.save_metrics)
        attempt(self.run, "TensorBoard's events", self.save_events)

    def save_metrics(self):
        with (
            checkpoint.atomic(self.run.folder / "metrics.csv") as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, self.COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def save_events(self):
        if not self.writer:  # from the first row on, in place of what other files here have
            self.shown, self.writer = 0, SummaryWriter(self.run.folder, purge_step=0)
        try:
            for row in self.rows[self.shown :]:
                for key in set(row) - {"epoch", "step", "time"}:  # train_loss is train/loss here
                    tag = key.replace("_", "/") if key.startswith(("train", "val")) else key
                    self.writer.add_scalar(tag, row[key], row["step"], walltime=row["time"])
            self.writer.flush()
            self.shown = len(self.rows)
        except OSError:
            with suppress(OSError):
                self.writer.close()
            self.writer = None  # it can't be used again
            raise

    def state(self) -> dict:
        """What restore needs to go on as if nothing had been."""
        return {
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0),
            "images": self.images,
            "seconds": self.seconds + time.perf_counter() - self.clock,
            "images_per_second": self.images_per_second,
            "rows": self.rows,
        }

    def restore(self, state: dict):
        self.losses = list(state["losses"].to(self.run.device))
        self.images, self.seconds, self.rows = state["images"], state["seconds"], state["rows"]
        self.images_per_second = state["images_per_second"]

    def close(self, best: dict):
        settings = {k: v for k, v in asdict(self.run.config).items() if v is not None}
        settings = {k: str(v) if isinstance(v, list | tuple) else v for k, v in settings.items()}
        best = {f"best/{k}": v for k, v in best.items()}
        self.save()

        def write():
            self.save_events()
            self.writer.add_hparams(settings, best, run_name=".")
            self.writer.close()

        attempt(self.run, "TensorBoard's events", write)


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
    elif config.out and (Path(config.out) / "config.json").exists():
        raise ValueError(taken(config.out))


def check_resume(config: Config) -> None:
    """Refuse to go on with another run than the one in --out, before minutes are spent on its data."""
    if not config.out:
        raise ValueError("--resume: expected --out as well, the folder of the run to go on with")
    folder = Path(config.out)
    if (folder / "last.pt").exists():
        refuse_changes(config, checkpoint.read_resume(folder / "last.pt")["config"])
    elif (folder / Progress.ADAPTER).exists():  # it would be overwritten
        raise ValueError(
            f"--resume: {folder} holds an adapter but no last.pt to go on from; name another folder"
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


def pick_device(name: str) -> torch.device:
    """The device that a name means; auto is a GPU if there is one. ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        name = "mps" if name == "cpu" and torch.backends.mps.is_available() else name
    try:
        device = torch.device(name)
        if device.type == "cuda" and torch.cuda.is_available():
            check_architecture(device)
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


def check_architecture(device: torch.device) -> None:
    """Name a GPU that this torch has no kernels for, as Kaggle's P100; torch itself fails in the first."""
    built = torch.cuda.get_arch_list()
    alone = device.index is not None
    for index in [device.index] if alone else range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not torch.version.hip and not runs_on((major, minor), built):
            raise ValueError(
                f"--device {device}: {torch.cuda.get_device_name(index)} is sm_{major}{minor}, and "
                f"torch {torch.__version__} is built for {', '.join(built)} alone; on Kaggle choose "
                "the accelerator GPU T4 x2; elsewhere an older torch, or --device cpu"
            )


def runs_on(capability: tuple[int, int], built: list[str]) -> bool:
    """Whether one of a build's architectures runs on a GPU: machine code (sm_) within its major version,
    and what the driver compiles (compute_) on all later ones."""
    for name in built:
        if found := re.match(r"(sm|compute)_(\d+)(\d)", name):
            version = int(found[2]), int(found[3])
            if version <= capability and (found[1] == "compute" or version[0] == capability[0]):
                return True
    return False


def out_of_memory(error: Exception) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA's; the CPU's
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def smaller(config: Config, error: Exception) -> str:
    """What to say where the memory does not suffice."""
    half, twice = -(-config.batch_size // 2), config.grad_accum * 2
    amp = "" if config.amp in ("bf16", "fp16") else "; or --amp bf16, on older GPUs --amp fp16"
    return (
        f"out of memory with --batch-size {config.batch_size} ({str(error).splitlines()[0][:200]}); try "
        f"--batch-size {half} --grad-accum {twice}, which learns the same{amp}"
    )


def rank() -> int:
    """Which of torchrun's processes this is; without torchrun 0."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world() -> int:
    """How many processes torchrun has started, on all machines; without torchrun 1."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join(device: str) -> str:
    """Under torchrun: meet the other processes, take a GPU of one's own. Returns the device to use."""
    if world() == 1:
        return device
    device = "cuda" if device == "auto" and torch.cuda.is_available() else device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


@contextmanager
def in_turn() -> Iterator[None]:
    """Under torchrun: the first process of each machine goes first, the others find what it fetched."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if world() > 1 and not first:
        dist.barrier()
    yield
    if world() > 1 and first:
        dist.barrier()


def meet_at(step: int, device: torch.device) -> None:
    """Raise ValueError if torchrun's processes did not all read the same last.pt."""
    if world() > 1:
        ends = torch.tensor([step, -step], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise ValueError("--resume: --out must be a folder that all machines share")


def spread(forward: nn.Module, device: torch.device) -> nn.Module:
    """The model on all that there is: torchrun's processes, or else the GPUs of this one."""
    if world() > 1:
        own = [device] if device.type == "cuda" else None
        return DistributedDataParallel(forward, device_ids=own)
    return nn.DataParallel(forward) if many_gpus(device) else forward


def many_gpus(device: torch.device) -> bool:
    return device.type == "cuda" and device.index is None and torch.cuda.device_count() > 1


def named(weights: str) -> str:
    """A name of weights as it is; a file with its whole path, so that it is found from anywhere."""
    return weights if weights in vit.NAMES else str(Path(weights).absolute())


def make_folder(config: Config) -> tuple[Path, IO]:
    """Make the run's folder and write config.json, with the versions that it runs on, into it: (folder,
    the open file, which is locked). Of several processes the first one does."""
    if rank() > 0:
        return Path(config.out or "runs"), nullcontext()
    name = f"{config.recipe}-{config.adapter}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps({**asdict(config), "versions": versions}, indent=2)
    for folder in [Path(config.out)] if config.out else (Path("runs") / name for name in names):
        path = folder / "config.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mode = "r+" if config.resume and path.exists() else "x"  # of two at once, one gets it
            file = open(path, mode)
            if not lock(file):
                file.close()
                raise ValueError(f"--out {folder}: another process trains there; wait for its end")
            file.write(text + "\n")
            file.truncate()
            file.flush()
            checkpoint.remove_temporaries(folder)
            return folder, file
        except FileExistsError:
            continue  # runs that start in one second have names of their own
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    raise ValueError(taken(config.out))


def lock(file: IO) -> bool:
    """Lock an open file until it is closed or this process ends, in whatever way; False if another has it.

    Windows has no fcntl: there nothing keeps two processes with --resume apart.
    """
    try:
        if fcntl:  # lockf, not flock: forked workers don't share it, and outlive a kill by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system that knows no locks
        pass
    return True


def taken(folder: str | Path) -> str:
    return (
        f"--out {folder}: holds a run already, or is a file; go on with it (--resume), name another "
        "folder or remove it"
    )


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
    """Train as the command line says; 0, or after one line on stderr 2 for what cannot work, and 128 + its
    number for a signal."""
    who = f"train.py, process {rank()}" if rank() > 0 else "train.py"
    try:
        train(parse(argv))
    except Stopped as stopped:
        print(f"{who}: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"{who}: stopped at once; what was saved before is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"{who}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
