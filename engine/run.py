"""A training run: its folder, its log, how far it has come, and how it stops and resumes.

It does not know what is trained. A training script brings the model, and the tags of its figures; with

    with run.training(optimizer, scaler, steps_per_epoch, columns):
        ...                      # run.step += 1, run.after_step(), run.log.write(...), run.save()

the folder is locked, signals are obeyed between two steps, and the run resumes where last.pt stands.
"""

import csv
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torchvision
from matplotlib.image import imread
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from engine import checkpoint
from engine.devices import add_up, check_same_step, process, processes
from engine.files import atomic, remove_temporaries

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class Run:
    """What a training script has prepared, and how far the training has come.

    After a resume, step, epoch, best, best_tensors and result are those of last.pt. So is extra, except for
    what the script had put there before.
    """

    config: Any  # with recipe, adapter, seed, epochs, out, resume, save_minutes
    dataset: Any
    model: nn.Module
    info: dict  # the metadata of the adapter file
    identity: dict  # what must be the same when the run resumes, besides the config
    trainable: int  # numbers of parameters
    total: int
    device: torch.device
    dtype: torch.dtype  # of autocast; float32 is off
    folder: Path
    lock: IO  # while it is open, no other process trains in the folder
    last: dict | None = None  # the content of last.pt
    step: int = 0  # steps of the optimizer
    epoch: int = 0  # epochs that are evaluated
    best: dict = field(default_factory=dict)  # figures of the best epoch
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    extra: dict = field(default_factory=dict)  # what the script keeps in last.pt
    result: dict | None = None  # of a finished run
    unwritten: set[str] = field(default_factory=set)  # files that could not be written
    saved: int | None = None  # the step of last.pt
    started: float = field(default_factory=time.monotonic)  # from then on --max-hours count

    KEPT = ("step", "epoch", "best", "best_tensors", "result")

    @contextmanager
    def training(self, optimizer, scaler, steps: int, columns: dict[str, str]) -> Iterator[None]:
        """Lock the folder, obey signals, and resume.

        steps: of an epoch. columns: the column of metrics.csv for each of TensorBoard's tags.
        Raises ValueError for a loss or a tensor that is not finite, Stopped after a signal or --max-hours.
        """
        self.optimizer, self.scaler, self.steps = optimizer, scaler, steps
        self.meter = Meter(every=max(1, steps // 20), steps=steps)
        self.log = Log(self, columns)
        self.clock = time.monotonic()
        with self.lock, Signals() as self.signals:
            self.resume()
            try:
                yield
            except FloatingPointError as error:
                raise ValueError(self.diverged(error)) from None
            finally:
                self.log.release()

    def after_step(self) -> None:
        """Save last.pt if it is time to, and stop if a signal or --max-hours asks for it."""
        if time.monotonic() - self.clock >= 60 * self.config.save_minutes:
            self.save()
        self.obey()

    def watch(self, batches: Iterator) -> Iterator:
        """The batches of an evaluation, which changes nothing: the run may stop before any of them."""
        for batch in batches:
            self.obey()
            yield batch

    def obey(self) -> None:
        """Save and raise Stopped if a signal has come or --max-hours have passed.

        Of several processes, the first one obeys a signal, and all of them obey the clock.
        """
        number = self.signals.received if process() == 0 else None
        if not number and not self.late():
            return
        self.save()
        kept = f"last.pt is at step {self.saved}" if self.saved is not None else "nothing is saved"
        name = signal.Signals(number).name if number else f"--max-hours {self.config.max_hours:g}"
        message = f"stopped by {name} after step {self.step}; {kept}; {self.how_to_resume()}"
        raise Stopped(number, message)

    def late(self) -> bool:
        """True if --max-hours have passed. Under torchrun all agree, by one all-reduce in each step."""
        if self.config.max_hours is None:
            return False
        passed = time.monotonic() - self.started >= 3600 * self.config.max_hours
        if processes() > 1:
            passed = bool(add_up(torch.tensor(int(passed), device=self.device)))
        return passed

    def save(self) -> bool:
        """Write last.pt, if it can be written. Of several processes, the first one does.

        Raises FloatingPointError if a trained tensor is not finite.
        """
        self.clock = time.monotonic()
        if process() > 0:
            return True
        rest = {
            **{key: getattr(self, key) for key in self.KEPT},
            "extra": self.extra,
            "log": {"rows": self.log.rows, **self.meter.state()},
            "identity": self.identity,
            "config": asdict(self.config),
        }
        file, parts = self.folder / "last.pt", (self.model, self.optimizer, self.scaler, rest)
        if written := self.attempt("last.pt", partial(checkpoint.save_resume, file, *parts)):
            self.saved = self.step
        return written

    def resume(self) -> None:
        """Continue where last.pt stands."""
        last, self.last = self.last, None  # its tensors need not stay in memory
        if last:
            checkpoint.restore_resume(last, self.model, self.optimizer, self.scaler)
            for key in self.KEPT:
                setattr(self, key, last[key])
            self.extra = last["extra"] | self.extra
            self.log.rows = last["log"]["rows"]
            self.meter.restore(last["log"], self.device)
            self.saved = self.step
            if not self.result:
                total = self.steps * self.config.epochs
                print(f"{self.folder}: resumes after step {self.step} of {total}", flush=True)
                if self.best_tensors:  # a kill may have come between the two files
                    self.save_adapter()
        elif self.config.resume:
            print(f"--resume: no last.pt in {self.folder}; the run starts from the beginning")
        if self.config.resume:
            check_same_step(self.step, self.device)

    def save_adapter(self) -> bool:
        """Write the adapter file of the best epoch so far, if it can be written."""
        file = self.folder / checkpoint.ADAPTER_FILE
        write = partial(checkpoint.write_adapter, file, self.best_tensors, self.info)
        return self.attempt(checkpoint.ADAPTER_FILE, write)

    def attempt(self, name: str, write: Callable[[], None]) -> bool:
        """Write a file of the run: True. If that fails, as on a full disk, warn once and return False.

        Of several processes, only the first one writes.
        """
        if process() > 0:
            return True
        try:
            write()
        except (OSError, UnicodeError) as error:
            if name not in self.unwritten:
                message = f"{name} cannot be written ({error}); training continues and tries again"
                tqdm.write(f"{self.folder}: {message}", file=sys.stderr)
            self.unwritten.add(name)
            return False
        self.unwritten.discard(name)
        return True

    def how_to_resume(self) -> str:
        return f"resume with the same command and --out {self.folder} --resume"

    def diverged(self, error: FloatingPointError) -> str:
        """The message of a run whose loss or tensors are no longer finite."""
        lr = self.optimizer.param_groups[0]["lr"]
        scale = f", loss scale {self.scaler.get_scale():g}" if self.scaler.is_enabled() else ""
        exists = (self.folder / checkpoint.ADAPTER_FILE).exists()
        best = f"; the best epoch so far is in {self.folder}" if exists else ""
        kept = f"; last.pt stays at step {self.saved}" if self.saved is not None else ""
        return (
            f"{error} at step {self.step} (learning rate {lr:.3g}{scale}){best}{kept}; "
            "try a smaller --lr or --alpha, or --amp off"
        )


def check_folder(config) -> None:
    """Raise ValueError if the run's folder holds another run, or cannot be made."""
    names = ("config.json", "last.pt", checkpoint.ADAPTER_FILE)
    if config.out and not config.resume:
        if any((Path(config.out) / name).exists() for name in names):
            raise ValueError(taken(config.out))
    path = Path(config.out or "runs").absolute()
    above = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(
            f"--out {config.out or 'runs'}: cannot be made, {above} is not a folder to write to; "
            "name another"
        )


def taken(folder: str | Path) -> str:
    return f"--out {folder}: holds a run already; add --resume, name another folder, or remove it"


def read_last(config) -> dict | None:
    """The content of the last.pt that --resume continues; None if there is nothing to resume.

    Raises ValueError if --out is missing, or is not the folder of a run.
    """
    if not config.resume:
        return None
    if not config.out:
        raise ValueError("--resume: expected --out as well, the folder of the run")
    folder = Path(config.out)
    # The time before the content: a file that is replaced while it is read gets another time.
    if written := written_at(folder):
        return checkpoint.read_resume(folder / "last.pt") | {"written": written}
    if (folder / checkpoint.ADAPTER_FILE).exists():  # it would be overwritten
        raise ValueError(
            f"--resume: {folder} holds an adapter but no last.pt to resume from; name another folder"
        )
    if (folder / "config.json").exists() and not is_ours(folder / "config.json"):  # likewise
        raise ValueError(
            f"--resume: {folder / 'config.json'} is not the file of a run; name another folder"
        )
    return None


def written_at(folder: Path) -> int | None:
    """When last.pt was written, in nanoseconds; None if there is none."""
    file = folder / "last.pt"
    return file.stat().st_mtime_ns if file.exists() else None


def is_ours(file: Path) -> bool:
    """True if a config.json is a run's, or empty, as a kill at the start leaves it."""
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    try:
        return not text or {"recipe", "adapter"} <= set(json.loads(text))
    except (ValueError, TypeError):
        return False


def refuse_others(config, identity: dict, last: dict | None) -> None:
    """Raise ValueError if last.pt belongs to other data or another trunk than identity says."""
    previous_identity = last["identity"] if last else identity
    for key in {**identity, **previous_identity}:
        previous, now = (part.get(key) for part in (previous_identity, identity))
        if previous != now:
            raise ValueError(
                f"--resume: {config.out}/last.pt: {key} was {previous!s:.90}, is now {now!s:.90}; give the "
                "old data and weights, or another --out for a new run"
            )


def make_folder(config, last: dict | None) -> tuple[Path, IO]:
    """Make the run's folder and write config.json into it, with the versions in use.

    Returns the folder, and the open file, which is locked. Of several processes, the first one makes it.
    last: what read_last has returned.
    """
    if process() > 0:
        return Path(config.out or "runs"), nullcontext()
    name = f"{config.recipe}-{config.adapter}-{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps({**asdict(config), "versions": versions}, indent=2)
    busy = f"--out {config.out}: another process trains there; wait for its end"
    for folder in [Path(config.out)] if config.out else (Path("runs") / name for name in names):
        path = folder / "config.json"
        mode = "r+" if config.resume and path.exists() else "x"  # of two at once, one gets it
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, mode)
            # If last.pt has changed since it was read, another process was training until just now. Look
            # only with the lock: before, that process may still write.
            ours = lock(file) and (mode == "x" or written_at(folder) == (last or {}).get("written"))
            if not ours:
                file.close()
                raise ValueError(busy)
            file.write(text + "\n")
            file.truncate()
            file.flush()
            remove_temporaries(folder)
            return folder, file
        except FileExistsError:
            continue  # runs that start in the same second have names of their own
        except OSError as error:
            reason = error.strerror
            if mode == "x" and path.exists():  # empty, on a full disk; it would bar the next try
                path.unlink()
            raise ValueError(f"--out {folder}: cannot be made ({reason}); name another") from None
    raise ValueError(busy if config.resume else taken(config.out))


def lock(file: IO) -> bool:
    """Lock an open file until it is closed or this process ends; False if another process has locked it.

    Windows has no fcntl: there nothing keeps two processes with --resume apart.
    """
    try:
        if (
            fcntl
        ):  # lockf, not flock: forked workers, which outlive a kill by seconds, do not share it
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


class Meter:
    """The mean loss of an epoch or of its last steps, and its images per second."""

    def __init__(self, every: int, steps: int):
        self.every, self.steps = every, steps  # steps between two points; steps of an epoch
        self.images_per_second = 0.0
        self.start()

    def start(self) -> None:
        """Begin an epoch."""
        self.losses, self.images = [], []  # of each step
        self.seconds, self.clock = 0.0, time.perf_counter()

    def add(self, loss: torch.Tensor, images: int) -> bool:
        """Count a step; True if the curves get a point. Not at each step: reading a loss waits for the GPU.

        Raises FloatingPointError if the loss of that point is not finite.
        """
        self.losses.append(loss)
        self.images.append(images)
        if len(self.losses) % self.every and len(self.losses) != self.steps:
            return False
        self.loss = self.mean(self.every)
        self.seconds += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        self.images_per_second = sum(self.images) / self.seconds
        if not math.isfinite(self.loss):
            raise FloatingPointError(f"the loss is {self.loss}")
        return True

    def mean(self, steps: int) -> float:
        """The mean loss of an image over the last steps of this epoch."""
        images = torch.tensor(self.images[-steps:], dtype=torch.float64)
        losses = torch.stack(self.losses[-steps:]).cpu().double()
        return (losses @ images / images.sum()).item()

    def state(self) -> dict:
        return {
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0),
            "images": self.images,
            "seconds": self.seconds + time.perf_counter() - self.clock,
            "images_per_second": self.images_per_second,
        }

    def restore(self, state: dict, device: torch.device) -> None:
        self.losses, self.images = list(state["losses"].to(device)), state["images"]
        self.seconds, self.images_per_second = state["seconds"], state["images_per_second"]


class Log:
    """A run's metrics.csv and TensorBoard events. Both hold all rows, also after a resume or a full disk."""

    EVENTS = ".train"  # the end of the names of its event files

    def __init__(self, run: Run, columns: dict[str, str]):
        self.run, self.columns, self.rows, self.writer = run, columns, [], None

    def write(self, values: dict[str, float | list[float] | str]) -> None:
        """Add a point at the run's step for each of TensorBoard's tags.

        A list becomes a histogram, and a text names a picture file in the run's folder.
        """
        self.rows.append({"step": self.run.step, "time": time.time(), **values})
        self.save()

    def save(self) -> None:
        """Bring both files up to date, also with rows that a full disk refused or a kill cut off."""
        self.run.attempt("metrics.csv", self.save_metrics)
        self.run.attempt("TensorBoard's events", self.save_events)

    def save_metrics(self) -> None:
        columns = self.columns
        with (
            atomic(self.run.folder / "metrics.csv") as temporary,
            open(temporary, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, ("epoch", "step", *columns.values()), restval="")
            writer.writeheader()
            for row in self.rows:
                if values := {columns[tag]: row[tag] for tag in columns if tag in row}:
                    epoch = f"{row['step'] / self.run.steps:.6g}"
                    writer.writerow({"epoch": epoch, "step": row["step"], **values})

    def save_events(self) -> None:
        if not self.writer:  # a new file that has all rows, from the first one on
            self.earlier = list(self.run.folder.glob(f"events.out.tfevents.*{self.EVENTS}"))
            self.shown = 0
            self.writer = SummaryWriter(self.run.folder, purge_step=0, filename_suffix=self.EVENTS)
        try:
            for row in self.rows[self.shown :]:
                for tag in row.keys() - {"step", "time"}:
                    value, where = row[tag], {"global_step": row["step"], "walltime": row["time"]}
                    if isinstance(value, str):
                        if (file := self.run.folder / value).exists():  # a user may remove it
                            self.writer.add_image(tag, imread(file), dataformats="HWC", **where)
                        continue
                    many = isinstance(value, list)
                    add = self.writer.add_histogram if many else self.writer.add_scalar
                    add(tag, np.array(value), **where)
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

    def release(self) -> None:
        """Close the event file, so that a resumed run can replace it."""
        if self.writer:
            with suppress(OSError):  # the disk may still be full
                self.writer.close()
            self.writer = None

    def close(self, settings: dict, metrics: dict[str, float], pictures: dict[str, Path]) -> None:
        """End the events with the hyperparameters, and by their tags the metrics and the picture files."""
        settings = {k: str(v) if isinstance(v, list | tuple) else v for k, v in settings.items()}

        def write():
            self.save_events()
            for tag, file in pictures.items():
                self.writer.add_image(tag, imread(file), self.run.step, dataformats="HWC")
            for summary in hparams(settings, metrics):  # add_hparams would open another file
                self.writer.file_writer.add_summary(summary)
            curves = {tag for row in self.rows for tag in row}
            for tag in metrics.keys() - curves:
                self.writer.add_scalar(tag, metrics[tag], self.run.step)
            self.writer.close()

        self.save()
        self.run.attempt("TensorBoard's events", write)


class Stopped(KeyboardInterrupt):
    """A signal (number), or --max-hours (None), asked the run to stop, and it has saved and stopped."""

    def __init__(self, number: int | None, message: str):
        super().__init__(message)
        self.status = 128 + number if number else 0


def exit_status(name: str, work: Callable[[], object]) -> int:
    """Do the work of the script of this name. The status is 0, after --max-hours too, or 2 for an error (one
    line on stderr), or 128 + a signal's number."""
    who = f"{name}, process {process()}" if process() > 0 else name
    try:
        work()
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


class Signals:
    """SIGINT (ctrl-C) and SIGTERM are noted in `received`, and obeyed once the step is done: see Run.obey."""

    def __init__(self):
        self.received, self.handlers = None, {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # no other thread may
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note) or signal.SIG_DFL
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if (
            error and self.received and process() > 0
        ):  # it failed because the first process has gone
            raise Stopped(self.received, "stopped with the first process") from None

    def note(self, number: int, frame) -> None:
        if (
            self.received and processes() == 1
        ):  # torchrun repeats a signal that ctrl-C has sent to all
            raise KeyboardInterrupt  # asked twice: at once
        self.received = number


def without_tensorboard(show: Callable) -> Callable:
    """threading.excepthook without TensorBoard's writer thread. Its errors appear again in save_events, where
    they are one line."""

    def hook(args) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            show(args)

    return hook


threading.excepthook = without_tensorboard(threading.excepthook)
