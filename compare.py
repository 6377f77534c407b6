"""Linear probe, LoRA, LoHa, LoKr and full fine-tuning on the same images: one table, one picture.

    python compare.py                                           # the demo; runs/comparison/comparison.md
    python compare.py --ranks 4,8 --seeds 1 --dropouts ""       # less of it
    python compare.py --recipe tiny-imagenet-lora --jobs 2      # any other flag is train.py's

Each method at each rank gets the same budget of learning rates (NEAR, next_lr), tried with seed 0 and
judged by validation accuracy; their centre is --lr, or the recipe's. Once all are chosen, the final runs
are trained, of every seed, and the adapters with each dropout as well. Each of these is tested, once.

Every run is train.py's, with --resume, in a folder of its own in --out: after a stop the same command goes
on. (If this process is killed outright, the run under way trains on to its end first.) --jobs trains so
many at once: on a CPU they share the threads (which changes the last bits), on GPUs each has one of them. Of
every run there is a row in comparison.csv.
"""

import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import data
import vit
from engine import checkpoint, images, pictures, report
from engine.adapt import ADAPTERS, adapt
from engine.config import (
    Config,
    Parser,
    check,
    check_rank,
    check_sizes,
    flag,
    parse,
    refuse_changes,
)
from engine.run import Stopped

HERE = Path(__file__).parent
# Where the search for a learning rate begins, in units of --lr: a head alone takes larger steps than
# adapters do, the whole trunk smaller ones.
NEAR = {"head": 20, "lora": 1, "loha": 1, "lokr": 1, "full": 0.4}
STEP, TRIALS = 2.5, 5  # between two learning rates; at most so many of them
# What stops a comparison: ctrl-C, a kill, and, where there is such a signal, a terminal that closes.
STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
LOAD = "dataset data_dir limit classes download holdout".split()  # the arguments of data.load
OWN = "adapter rank seed resume test init_adapter".split()  # what is set here, run by run


DIVERGED = "try a smaller --lr"  # in what train.py says of a loss that is not finite


class Variant(NamedTuple):
    """What is compared: a method, for the adapters at a rank and with a dropout."""

    method: str
    rank: int | None = None
    dropout: float = 0.0

    def __str__(self) -> str:
        rank = f" rank {self.rank}" if self.rank else ""
        return self.method + rank + (f" dropout {self.dropout:g}" if self.dropout else "")

    def flags(self) -> list[str]:
        if self.rank is None:
            return ["--adapter", self.method]
        rest = ["--rank", str(self.rank), "--adapter-dropout", str(self.dropout)]
        return ["--adapter", self.method, *rest]


def next_lr(scores: dict[float, tuple], centre: float) -> float | None:
    """The learning rate to try next, None once there are enough: the centre and its two neighbours, then
    outwards as long as the best is at an edge. scores: of those tried, more is better."""
    for lr in (centre / STEP, centre, centre * STEP):
        if (lr := float(f"{lr:.6g}")) not in scores:
            return lr
    best = best_lr(scores)
    if len(scores) == TRIALS or min(scores) < best < max(scores):
        return None
    return float(f"{best / STEP if best == min(scores) else best * STEP:.6g}")


def best_lr(scores: dict[float, tuple]) -> float:
    return max(sorted(scores), key=scores.get)


class Comparison:
    """The runs of a comparison: those that are done, in rows, and those under way."""

    def __init__(self, config: Config, dataset: data.Dataset, passed: list[str], jobs: int):
        self.config, self.dataset, self.passed, self.jobs = config, dataset, passed, jobs
        self.out, self.rows = Path(config.out), {}
        self.done = self.planned = 0
        self.lock, self.processes, self.stopping = threading.Lock(), set(), False
        self.slots = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def tune(self, variant: Variant) -> float:
        """The learning rate for a variant, of those that next_lr proposes."""
        scores, centre = {}, NEAR[variant.method] * self.config.lr
        while (lr := next_lr(scores, centre)) is not None:
            with self.lock:
                self.planned += len(scores) >= 3  # no more than the grid was foreseen
            row = self.run(variant, lr, 0, "trial")
            sound = math.isfinite(row.get("val_loss", math.nan))
            scores[lr] = (row["val_accuracy"], -row["val_loss"]) if sound else (-1, 0)
        if max(scores.values())[0] < 0:
            raise ValueError(f"{variant}: diverged at every learning rate; give a smaller --lr")
        return best_lr(scores)

    def run(self, variant: Variant, lr: float, seed: int, part: str) -> dict:
        """Train with train.py, unless that is done; return the row of comparison.csv.

        part: "trial" or "final". A final run is tested; a trial may diverge, and has no accuracy then.
        Raises ValueError with the last line that the run said if it fails.
        """
        name = f"{variant} lr {lr:g} seed {seed}"
        folder = self.out / re.sub(" (?=[0-9])", "", name).replace(" ", "-")
        flags = [*self.passed, *variant.flags(), "--lr", str(lr), "--seed", str(seed)]
        flags += ["--out", str(folder), "--resume"]
        flags += ["--test"] if part == "final" and self.dataset.test else []
        config, clock = parse(flags), time.monotonic()
        result, log = self.result(config), folder.with_name(folder.name + ".log")
        took = "finished already"
        if not result and part == "trial" and DIVERGED in last_line(log):
            result = {}
        elif not result:
            status = self.launch(flags, log)
            said = last_line(log)
            diverged = status == 2 and part == "trial" and DIVERGED in said
            result = {} if diverged else None if status else self.result(config)
            if result is None:
                raise ValueError(f"{name}: {said} (exit status {status}; more in {log})")
            took = f"{time.monotonic() - clock:.0f} s"
        with self.lock:
            row = self.rows.setdefault(folder.name, {"run": folder.name, **variant._asdict()})
            row |= {"lr": lr, "seed": seed, part: 1, **result}
            if result:
                row["adapter_bytes"] = (folder / checkpoint.ADAPTER_FILE).stat().st_size
            self.done += 1
            splits = {"validation": "val_accuracy", "test": "test_accuracy"}
            figures = [f"{k} {row[v]:.1%}" for k, v in splits.items() if v in result]
            figures = ", ".join(figures or ["diverged"]).replace("%", " %")
            print(f"[{self.done}/{self.planned}] {name}: {figures}, {took}", flush=True)
        return row

    def result(self, config: Config) -> dict | None:
        """What a run that has ended came to; None if train.py has something left to do, or to refuse."""
        last = Path(config.out) / "last.pt"
        if not last.exists():
            return None
        content = checkpoint.read_resume(last, mmap=True)
        refuse_changes(config, content["config"])
        images = [len(self.dataset.train), len(self.dataset.val)]
        result = content["result"] if content["identity"]["images"] == images else None
        return result if not config.test or "test_accuracy" in (result or {}) else None

    def launch(self, flags: list[str], log: Path) -> int:
        """Run train.py with these flags, what it says added to the log; return its exit status."""
        slot = self.slots.get()
        try:
            with self.lock, open(log, "a") as file:
                if self.stopping:
                    raise CancelledError
                process = subprocess.Popen(
                    [sys.executable, str(HERE / "train.py"), *flags],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self.share(slot),
                    start_new_session=True,  # ctrl-C comes to this process alone, which passes it on
                )
                self.processes.add(process)
            return process.wait()
        finally:
            self.slots.put(slot)

    def share(self, slot: int) -> dict[str, str]:
        """The variables that give one of several runs its part of the machine."""
        if self.jobs == 1:
            return {}
        if self.config.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        cards = cards if cards[0] else [str(i) for i in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": cards[slot % len(cards)]}

    def at_once(self, task: Callable, arguments: Iterable[tuple]) -> list:
        """The task with each of the arguments, so many at once as there are jobs. If one fails, or a signal
        comes, the runs under way save and end as well."""
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(task, *each) for each in arguments]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping = True  # first: what is queued ends at once
                for number in STOPS:  # a second signal would break off what follows
                    signal.signal(number, signal.SIG_IGN)
                with self.lock:
                    for process in self.processes:
                        process.terminate()
                raise
        return [future.result() for future in futures]


def last_line(log: Path) -> str:
    """The last line of a file; "says nothing" if it has none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return (text.strip().splitlines() or ["says nothing"])[-1]


def compare(argv: list[str]) -> None:
    """Refuse what cannot work, train what is not trained yet, and write it all up."""
    options, config, passed = read(argv)
    main, beside = variants(config, options)
    finals = list(dict.fromkeys(main + beside))
    refuse_to_lose(Path(options.out) / "comparison.csv", finals, options.seeds)
    dataset = ready(config, options)
    at = Comparison(config, dataset, passed, options.jobs)
    at.planned = 3 * len(main) + options.seeds * len(finals)
    print(f"{at.planned} runs or more; what each says is in {at.out / '*.log'}", flush=True)
    lrs = dict(zip(main, at.at_once(at.tune, [(v,) for v in main]), strict=True))
    for v in beside:
        lrs[v] = lrs[v._replace(dropout=config.adapter_dropout)]
    runs = [(v, lrs[v], seed, "final") for seed in range(options.seeds) for v in finals]
    at.at_once(at.run, runs)
    memory = {v: report.kept(parse([*passed, *v.flags()]), len(dataset.classes)) for v in finals}
    rows = [row | {"kept_bytes": memory[report.variant(row)]} for row in at.rows.values()]
    rows.sort(key=lambda row: (finals.index(report.variant(row)), row["lr"], row["seed"]))
    report.write(at.out, rows, main, beside, config, dataset, budget(config, options, argv))
    print(f"{at.out / 'comparison.md'}: done; comparison.csv and comparison.png lie beside it")


def refuse_to_lose(table: Path, finals: list[Variant], seeds: int) -> None:
    """Raise ValueError if a comparison lies there that has lines which this one would leave out."""
    for row in report.read(table) if table.exists() else []:
        there = Variant(*report.variant(row))
        if there not in finals or row["seed"] >= seeds:
            raise ValueError(
                f"{table}: has {there} seed {row['seed']}, which this comparison would leave out; name "
                "another --out, or ask for all of it: what is trained already is not trained again"
            )


def variants(config: Config, options) -> tuple[list[Variant], list[Variant]]:
    """(those of the table, those that show the effect of dropout)"""
    main, beside = [], []
    rank = 4 if 4 in options.ranks else min(options.ranks)
    for method in options.methods:
        if method not in ADAPTERS:
            main.append(Variant(method))
            continue
        main += [Variant(method, r, config.adapter_dropout) for r in options.ranks]
        dropouts = sorted({0.0, *options.dropouts}) if options.dropouts else []
        beside += [Variant(method, rank, dropout) for dropout in dropouts]
    return main, beside


def budget(config: Config, options, argv: list[str]) -> str:
    """How the learning rates are chosen, in words, and the command."""
    names = pictures.NAMES
    near = ", ".join(f"{names[method]} {NEAR[method] * config.lr:g}" for method in options.methods)
    return (
        "For each line of the table the learning rate is the best by validation accuracy, then by "
        f"validation loss, of a centre ({near}), {STEP:g} times less, {STEP:g} times more, and a step "
        f"further out as long as the best is at the edge, {TRIALS} at most, with seed 0; dropout is tried "
        f"at the same. Command: `{shlex.join(['python', 'compare.py', *argv])}`; runs at "
        f"once: {options.jobs}."
    )


def read(argv: list[str]) -> tuple:
    """The command line: (its own options, the config that all runs share, train.py's flags)."""
    parser = Parser(
        description="Compare linear probe, LoRA, LoHa, LoKr and full fine-tuning.",
        epilog="Any other flag is passed on to train.py, for each run: --recipe, --dataset, --epochs ...",
        allow_abbrev=False,  # --seed is not --seeds
    )
    methods = ",".join(NEAR)
    parser.add_argument("--ranks", default="2,4,8,16", help="of the adapters (default: 2,4,8,16)")
    parser.add_argument("--seeds", type=int, default=3, help="so many, from 0 on (default: 3)")
    parser.add_argument("--dropouts", default="0.1,0.3", help="of the adapters (default: 0.1,0.3)")
    parser.add_argument("--methods", default=methods, help=f"some of them (default: {methods})")
    parser.add_argument(
        "--out", default="runs/comparison", help="folder (default: runs/comparison)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    options, passed = parser.parse_known_args(argv)
    for name in OWN:
        name = flag(name)
        if any(re.match("--.", word) and name.startswith(word.split("=")[0]) for word in passed):
            raise ValueError(f"{name}: compare.py sets it itself, run by run; see --help")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected >= 1")
    options.ranks = listed("ranks", options, int, "whole numbers >= 1", lambda rank: rank >= 1)
    options.dropouts = listed("dropouts", options, float, "numbers in [0, 1)", lambda d: 0 <= d < 1)
    among = f"some of {', '.join(NEAR)}"
    options.methods = listed("methods", options, str, among, lambda method: method in NEAR)
    if not options.ranks or not options.methods:
        raise ValueError("--ranks, --methods: expected one at least")
    return options, parse([*passed, "--out", options.out]), passed


def listed(name: str, options, kind: type, expected: str, allowed: Callable) -> list:
    """The values of a flag that takes several with commas, each once."""
    text, values = getattr(options, name), []
    for part in text.split(",") if text else []:
        try:
            values.append(kind(part.strip()))
        except ValueError:
            values.append(None)
        if values[-1] is None or not allowed(values[-1]):
            raise ValueError(f"--{name} {text}: expected {expected}, with commas")
    return list(dict.fromkeys(values))


def ready(config: Config, options) -> data.Dataset:
    """The data set, found, decoded where train.py would do that, and checked with all else that a run
    could refuse: rather now than after an hour of others."""
    check(config)
    dataset = data.load(*(getattr(config, key) for key in LOAD))
    check_sizes(config, dataset)
    c, classes = config, len(dataset.classes)
    model, preprocessing = vit.build(c.model, c.weights, classes, c.image_size, c.head_dropout)
    if set(options.methods) & set(ADAPTERS):
        adapt(model, "lora", max(options.ranks), targets=c.targets)
        check_rank(replace(c, rank=max(options.ranks)), model)
    for split in filter(None, (dataset.train, dataset.val, dataset.test)):
        folder = c.cache_dir or Path(c.out) / "cache"
        images.keep(split, folder, preprocessing["image_size"], c.cache, c.workers)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    return dataset


def stop(number: int, frame) -> None:
    name = signal.Signals(number).name
    raise Stopped(
        number, f"stopped by {name}; what was trained is kept: go on with the same command"
    )


def main(argv: list[str] | None = None) -> int:
    """Compare as the command line says; 0, or after one line on stderr 2 for what cannot work, and 128 +
    its number for a signal."""
    before = {number: signal.signal(number, stop) or signal.SIG_DFL for number in STOPS}
    try:
        compare(sys.argv[1:] if argv is None else argv)
    except Stopped as stopped:
        print(f"compare.py: {stopped}", file=sys.stderr)
        return stopped.status
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
