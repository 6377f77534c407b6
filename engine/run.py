"""What a run leaves in its folder, and how it goes on from there: metrics.csv and TensorBoard's events,
last.pt and the adapter file, pictures; and signals, which ask it to stop."""

import csv
import itertools
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torchvision
from matplotlib.image import imread
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import data
from engine import checkpoint, pictures
from engine.adapt import ADAPTERS, relative_norms
from engine.config import Config, begun, taken
from engine.devices import gather, meet_at, rank, world
from engine.files import atomic, remove_temporaries

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def muted(show: Callable) -> Callable:
    """threading's excepthook without TensorBoard's thread, whose errors come again where save_events meets
    them, and are one line there."""

    def hook(args) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            show(args)

    return hook


threading.excepthook = muted(threading.excepthook)


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
        mode = "r+" if config.resume and path.exists() else "x"  # of two at once, one gets it
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, mode)
            if not lock(file):
                file.close()
                raise ValueError(f"--out {folder}: another process trains there; wait for its end")
            file.write(text + "\n")
            file.truncate()
            file.flush()
            remove_temporaries(folder)
            return folder, file
        except FileExistsError:
            continue  # runs that start in one second have names of their own
        except OSError as error:
            reason = error.strerror
            if mode == "x" and path.exists():  # empty, on a full disk; it would bar the next try
                path.unlink()
            raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    busy = f"--out {config.out}: another process trains there; wait for its end"
    raise ValueError(busy if config.resume else taken(config.out))


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


def attempt(run: Run, name: str, write: Callable[[], None]) -> bool:
    """Write a file of the run: True. Where that fails, as on a full disk, warn, once, and go on.

    Of several processes only the first one writes.
    """
    if rank() > 0:
        return True
    try:
        write()
    except (OSError, UnicodeError) as error:
        if name not in run.unwritten:
            tell = f"{run.folder}: {name} cannot be written ({error}); training goes on, and tries again"
            tqdm.write(f"train.py: {tell}", file=sys.stderr)
        run.unwritten.add(name)
        return False
    run.unwritten.discard(name)
    return True


NORMS = "delta_w/relative_norm"  # in the row of an epoch: a number for each adapted layer


class Log:
    """What a run says of itself: TensorBoard events, metrics.csv and one printed line an epoch."""

    COLUMNS = "epoch step lr train_loss images_per_second val_loss val_accuracy".split()
    EVENTS = ".train"  # ends the names of its files of events

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
        row = {"val_loss": val_loss, "val_accuracy": val_accuracy}
        norms = relative_norms(self.run.model).values()
        if norms := [norm for norm in norms if math.isfinite(norm)]:  # at.save refuses the others
            row[NORMS] = norms
        self.write(epoch * self.steps, **row)
        print(
            f"epoch {epoch}/{self.run.config.epochs}: train loss {self.mean(self.steps):.4f}, "
            f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}, "
            f"{self.images_per_second:,.0f} images/s",
            flush=True,
        )
        self.start_epoch()
        self.list_bad()

    def list_bad(self):
        """unreadable.txt: the files that were replaced, in all processes."""
        splits = (self.run.dataset.train, self.run.dataset.val, self.run.dataset.test)
        if bad := gather([reason for split in splits if split for reason in split.bad.values()]):
            text = "".join(f"{reason}\n" for reason in bad)
            file = self.run.folder / "unreadable.txt"  # names need not be UTF-8
            how = {"encoding": "utf-8", "errors": "surrogateescape"}
            attempt(self.run, file.name, lambda: file.write_text(text, **how))

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
            atomic(self.run.folder / "metrics.csv") as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, self.COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)

    def save_events(self):
        if not self.writer:  # a file that has all rows, from the first one on
            self.earlier = list(self.run.folder.glob(f"events.out.tfevents.*{self.EVENTS}"))
            self.shown = 0
            self.writer = SummaryWriter(self.run.folder, purge_step=0, filename_suffix=self.EVENTS)
        try:
            for row in self.rows[self.shown :]:
                for key in set(row) - {"epoch", "step", "time"}:  # train_loss is train/loss here
                    tag = key.replace("_", "/") if key.startswith(("train", "val")) else key
                    add = self.writer.add_histogram if key == NORMS else self.writer.add_scalar
                    add(tag, np.array(row[key]), row["step"], walltime=row["time"])
            self.writer.flush()
            self.shown = len(self.rows)
            # TensorBoard reads files in the order of their names, which is not always that of their age.
            for file in self.earlier:
                with suppress(OSError):  # one that a reader holds open on Windows
                    file.unlink()
            self.earlier = []
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

    def release(self):
        """Close the file of events, so that a run that goes on can take its place."""
        if self.writer:
            with suppress(OSError):  # the disk may still be full
                self.writer.close()
            self.writer = None

    def close(self, best: dict):
        settings = {k: v for k, v in asdict(self.run.config).items() if v is not None}
        settings = {k: str(v) if isinstance(v, list | tuple) else v for k, v in settings.items()}
        best = {f"best/{k}": v for k, v in best.items()}
        self.save()

        def write():
            self.save_events()
            for name in ("predictions", "confusion"):
                file = self.run.folder / f"{name}.png"
                if file.exists() and "pictures" not in self.run.unwritten:
                    pixels, step = imread(file), self.rows[-1]["step"]
                    self.writer.add_image(name, pixels, step, dataformats="HWC")
            for summary in hparams(settings, best):  # add_hparams would open a file of its own
                self.writer.file_writer.add_summary(summary)
            for tag, value in best.items():
                self.writer.add_scalar(tag, value)
            self.writer.close()

        attempt(self.run, "TensorBoard's events", write)


class Progress:
    """How far a run has come, in memory and, from time to time, in last.pt."""

    KEPT = ("done", "epoch", "best", "best_tensors", "best_counts", "result")

    def __init__(self, run: Run, optimizer, scaler):
        self.run, self.optimizer, self.scaler = run, optimizer, scaler
        per_step = run.config.batch_size * run.config.grad_accum
        self.steps = -(-len(run.dataset.train) // per_step)  # of an epoch
        self.done = self.epoch = 0  # steps of the optimizer; epochs that are evaluated
        self.best, self.best_tensors, self.result = {"val_accuracy": -1.0}, {}, None
        self.best_counts = None  # (classes, classes): how often a label had a prediction
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
        """Write last.pt, if it can be; of several processes the first one does. FloatingPointError if the
        run has gone astray."""
        self.clock = time.monotonic()
        if rank() > 0:
            return
        splits = (self.run.dataset.train, self.run.dataset.val)
        rest = {
            **{key: getattr(self, key) for key in self.KEPT},
            "log": self.log.state(),
            "bad": [split.bad for split in splits],
            "identity": identity(self.run.dataset, self.run.info),
            "config": asdict(self.run.config),
        }
        model = self.run.model
        write = partial(checkpoint.save_resume, self.file, model, self.optimizer, self.scaler, rest)
        if attempt(self.run, "last.pt", write):
            self.saved = self.done

    def load(self) -> None:
        """Go on where last.pt stands."""
        if not self.file.exists():
            print(f"--resume: no last.pt in {self.run.folder}; the run starts from the beginning")
            return
        content = checkpoint.read_resume(self.file)
        checkpoint.restore_resume(content, self.run.model, self.optimizer, self.scaler)
        for key in self.KEPT:
            setattr(self, key, content.get(key))
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
        file = self.run.folder / checkpoint.ADAPTER_FILE
        write = partial(checkpoint.write_adapter, file, self.best_tensors, self.run.info)
        return attempt(self.run, checkpoint.ADAPTER_FILE, write)

    def go_on(self) -> str:
        return f"go on with the same command and --out {self.run.folder} --resume"

    def diverged(self, what: object) -> str:
        """What to say of a run whose loss or tensors are not finite any more."""
        lr = self.optimizer.param_groups[0]["lr"]
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        there = (self.run.folder / checkpoint.ADAPTER_FILE).exists()
        best = f"; the best epoch so far is in {self.run.folder}" if there else ""
        kept = f"; last.pt stays at step {self.saved}" if self.saved is not None else ""
        return (
            f"{what} at step {self.done} (learning rate {lr:.3g}{scale}){best}{kept}; "
            "try a smaller --lr or --alpha, or --amp off"
        )


def identity(dataset: data.Dataset, info: dict) -> dict:
    """What has to be the same in a run that goes on, beside its flags."""
    images = [len(dataset.train), len(dataset.val)]
    keys = ("classes", "trunk", "preprocessing")
    return {"images": images, **{key: info[key] for key in keys}}


def refuse_others(config: Config, dataset: data.Dataset, info: dict) -> None:
    """With --resume, raise ValueError if last.pt is of other data or another trunk: see refuse_changes."""
    if last := begun(config):
        for key, now in identity(dataset, info).items():
            then = last["identity"].get(key, now)
            if then != now:
                raise ValueError(
                    f"--resume: {config.out}/last.pt: {key} was {then!s:.90}, is now {now!s:.90}"
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


def draw(run: Run, accuracy: float, counts: torch.Tensor | None) -> None:
    """curves.png, and of the best epoch confusion.png, which classes it takes for which, and
    predictions.png, what it says of 24 validation images."""
    config = run.config
    what = pictures.NAMES[config.adapter]
    what += f" rank {config.rank}" if config.adapter in ADAPTERS else ""
    pictures.plot_curves(
        run.folder / "metrics.csv",
        run.folder / "curves.png",
        f"{config.dataset}, {what}: {run.trainable:,} trainable parameters",
    )
    title = f"{config.dataset}, {what}: validation accuracy {accuracy:.1%}"
    if counts is not None and counts.any():  # a last.pt of old has none
        pictures.plot_confusion(counts, run.dataset.classes, run.folder / "confusion.png", title)
    preprocessing = run.info["preprocessing"]
    few = run.dataset.val.rows(data.even_rows(run.dataset.val.labels, 24))
    images, labels = next(iter(data.batches(few, 24, preprocessing, run.device, workers=0)))
    with torch.inference_mode():
        logits = run.model(images).float().cpu()
    pictures.plot_predictions(
        pictures.colours(images.cpu(), preprocessing),
        logits,
        labels.cpu(),
        run.dataset.classes,
        run.folder / "predictions.png",
        title,
    )
