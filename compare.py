"""Linear probe, LoRA, LoHa, LoKr and full fine-tuning on the same images: one table, two pictures.

    python compare.py                                           # the demo; runs/comparison/comparison.md
    python compare.py --ranks 4,8 --seeds 1 --dropouts ""       # fewer runs
    python compare.py --recipe tiny-imagenet-lora --jobs 2      # all other flags are train.py's

Each method at each rank gets the same budget of learning rates (NEAR, next_lr) around --lr. They are tried
with seed 0, and validation accuracy chooses one. Then the final runs are trained with every seed, adapters
also with every dropout. Each final run is tested once.

train.py does every run, with --resume, in a folder inside --out, so that the same command resumes a stopped
comparison. (After SIGKILL, runs that are training continue, and until they end the command is refused.)
--jobs trains several runs at once: on a CPU they share the threads, which changes the last bits of the
results; on GPUs each run has one.
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
from pathlib import Path
from typing import NamedTuple

import torch

import data
import vit
from engine import checkpoint, images, pictures, report, weights
from engine.adapt import ADAPTERS, adapt, check_rank
from engine.config import (
    FREE,
    Config,
    Parser,
    check,
    check_sizes,
    flag,
    parse,
    refuse_changes,
)
from engine.devices import pick_device
from engine.files import read_json
from engine.run import Stopped, check_folder
from engine.start import data_identity, load_data

HERE = Path(__file__).parent
# Where the search for a learning rate begins, in units of --lr, from the best rates of the demo and of a
# pretrained ViT-S/14 (docs/comparison.md). The adapters' ratios are about the same for both. The probe's (50
# and 8) and full fine-tuning's (0.4 and 0.016) are not: their search begins between the two.
NEAR = {"head": 20, "lora": 1, "loha": 2.5, "lokr": 6.25, "full": 0.1}
STEP, TRIALS = 2.5, 7  # ratio of neighbouring learning rates; most rates to try
# A comparison is stopped by ctrl-C, by kill, and by a closing terminal if the system has that signal.
STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
OWN = (
    "adapter rank seed resume test init_adapter".split()
)  # flags that compare.py sets for each run
DIVERGED = "try a smaller --lr"  # part of train.py's message about a loss that is not finite


class Variant(NamedTuple):
    """What is compared: a method; for adapters, with a rank and a dropout."""

    method: str
    rank: int | None = None
    dropout: float = 0.0

    def __str__(self) -> str:
        rank = f" rank {self.rank}" if self.rank else ""
        return self.method + rank + (f" dropout {self.dropout:g}" if self.dropout else "")

    def flags(self) -> list[str]:
        if self.rank is None:
            return ["--adapter", self.method]
        settings = ["--rank", str(self.rank), "--adapter-dropout", str(self.dropout)]
        return ["--adapter", self.method, *settings]


def next_lr(scores: dict[float, tuple], centre: float) -> float | None:
    """The learning rate to try next, or None after enough of them.

    First come the centre and its two neighbours, then rates further out as long as the best one is at an
    edge. scores: the score of each rate that was tried; higher is better.
    """
    for lr in (centre / STEP, centre, centre * STEP):
        if (lr := float(f"{lr:.6g}")) not in scores:
            return lr
    best = best_lr(scores)
    if len(scores) == TRIALS or min(scores) < best < max(scores):
        return None
    return float(f"{best / STEP if best == min(scores) else best * STEP:.6g}")


def best_lr(scores: dict[float, tuple]) -> float:
    return max(sorted(scores), key=scores.get)


def score(row: dict) -> tuple[float, float]:
    """What decides between learning rates: accuracy, then loss. A run that diverged has neither."""
    if row.get("val_loss") in (None, "") or not math.isfinite(float(row["val_loss"])):
        return -1, 0
    return float(row["val_accuracy"]), -float(row["val_loss"])


class Comparison:
    """The runs of a comparison: finished ones (rows) and running ones (processes)."""

    def __init__(
        self, config: Config, dataset: data.Dataset, trunks: dict, passed: list[str], jobs: int
    ):
        self.config, self.dataset, self.passed, self.jobs = config, dataset, passed, jobs
        self.trunks = trunks
        self.out, self.rows = Path(config.out), {}
        self.done = self.planned = 0
        self.lock, self.processes, self.stopping = threading.Lock(), set(), False
        self.slots = queue.SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)

    def tune(self, variant: Variant) -> float:
        """The best learning rate for a variant, of those that next_lr proposes."""
        scores, centre = {}, NEAR[variant.method] * self.config.lr
        while (lr := next_lr(scores, centre)) is not None:
            with self.lock:
                self.planned += len(scores) >= 3  # the first three are planned already
            scores[lr] = score(self.run(variant, lr, 0, "trial"))
        if max(scores.values())[0] < 0:
            raise ValueError(f"{variant}: diverged at every learning rate; try a smaller --lr")
        return best_lr(scores)

    def run(self, variant: Variant, lr: float, seed: int, part: str) -> dict:
        """The row of comparison.csv for a run, which train.py trains unless it has finished already.

        part: "trial" or "final". A final run is tested. A trial may diverge; its row then has no accuracy.
        Raises ValueError with the last line of the run's output if it fails.
        """
        name = f"{variant} lr {lr:g} seed {seed}"
        folder = self.out / re.sub(" (?=[0-9])", "", name).replace(" ", "-")
        flags = [*self.passed, *variant.flags(), "--lr", str(lr), "--seed", str(seed)]
        flags += ["--out", str(folder), "--resume"]
        flags += ["--test"] if part == "final" and self.dataset.test else []
        config, clock = parse(flags), time.monotonic()
        log = folder.with_name(folder.name + ".log")
        result, duration = self.result(config, log, part), "finished already"
        if result is None:
            status = self.launch(flags, log)
            message = last_line(log)
            diverged = status == 2 and part == "trial" and DIVERGED in message
            result = {} if diverged else None if status else self.result(config, log, part)
            if result is None:
                raise ValueError(f"{name}: {message} (exit status {status}; more in {log})")
            duration = f"{time.monotonic() - clock:.0f} s"
        with self.lock:
            row = self.rows.setdefault(folder.name, {"run": folder.name, **variant._asdict()})
            row |= {"lr": lr, "seed": seed, part: 1, **result}
            if result:
                row["adapter_bytes"] = (folder / checkpoint.ADAPTER_FILE).stat().st_size
            self.done += 1
            splits = {"validation": "val_accuracy", "test": "test_accuracy"}
            figures = [f"{k} {row[v]:.1%}" for k, v in splits.items() if v in result]
            figures = ", ".join(figures or ["diverged"]).replace("%", " %")
            print(f"[{self.done}/{self.planned}] {name}: {figures}, {duration}", flush=True)
        return row

    def result(self, config: Config, log: Path, part: str) -> dict | None:
        """The result of a finished run; {} for a trial that diverged; None if train.py must run."""
        last, settings = (Path(config.out) / name for name in ("last.pt", "config.json"))
        # Full fine-tuning freezes nothing, so no hash says which trunk it began with.
        free = set(FREE) - {"weights", "model"}
        if last.exists():
            saved = checkpoint.read_resume(last, mmap=True)
            previous, result = saved["config"], saved["result"]
            trunk = self.trunks.get(config.adapter)
            identity = data_identity(config, self.dataset) | ({"trunk": trunk} if trunk else {})
            same = identity.items() <= saved["identity"].items()
        else:
            # A kill at the start leaves config.json empty.
            written = settings.exists() and settings.stat().st_size
            previous, result = read_json(settings) if written else {}, None
            same = "data_dir" in previous and previous["data_dir"] == config.data_dir
        refuse_changes(config, previous, free)
        if same and not result and part == "trial" and DIVERGED in last_line(log):
            return {}
        tested = not config.test or "test_accuracy" in (result or {})
        return result if same and tested else None

    def launch(self, flags: list[str], log: Path) -> int:
        """Run train.py with these flags, append its output to the log, and return its exit status."""
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
                    start_new_session=True,  # only this process gets ctrl-C, and passes it on
                )
                self.processes.add(process)
            return process.wait()
        finally:
            self.slots.put(slot)

    def share(self, slot: int) -> dict[str, str]:
        """Environment variables that give one of several parallel runs its part of the machine."""
        if self.jobs == 1:
            return {}
        if self.config.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // self.jobs))}
        cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        cards = cards if cards[0] else [str(i) for i in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": cards[slot % len(cards)]}

    def at_once(self, task: Callable, arguments: Iterable[tuple]) -> list:
        """The results of task(*each) for each of the arguments, as many at once as there are jobs.

        If one fails, or a signal arrives, all running processes save and end.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(task, *each) for each in arguments]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping = True  # first, so that no queued run starts
                for number in STOPS:  # a second signal would interrupt the lines below
                    signal.signal(number, signal.SIG_IGN)
                with self.lock:
                    for process in self.processes:
                        process.terminate()
                raise
        return [future.result() for future in futures]


def last_line(log: Path) -> str:
    """The last line of a log; "no output" if it has none."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return (text.strip().splitlines() or ["no output"])[-1]


def compare(argv: list[str]) -> None:
    """Check everything, train the runs that are missing, and write the tables and the pictures."""
    options, config, passed = read(argv)
    main, dropouts = variants(config, options)
    finals = list(dict.fromkeys(main + dropouts))
    refuse_to_lose(Path(options.out) / "comparison.csv", finals, options.seeds, config.lr)
    dataset, trunks = ready(config, options)
    runs = Comparison(config, dataset, trunks, passed, options.jobs)
    runs.planned = 3 * len(main) + options.seeds * len(finals)
    print(f"{runs.planned} runs or more; their output is in {runs.out / '*.log'}", flush=True)
    lrs = dict(zip(main, runs.at_once(runs.tune, [(v,) for v in main]), strict=True))
    for v in dropouts:
        lrs[v] = lrs[v._replace(dropout=config.adapter_dropout)]
    arguments = [(v, lrs[v], seed, "final") for seed in range(options.seeds) for v in finals]
    runs.at_once(runs.run, arguments)
    memory = {v: report.kept(parse([*passed, *v.flags()]), len(dataset.classes)) for v in finals}
    rows = [row | {"kept_bytes": memory[report.variant(row)]} for row in runs.rows.values()]
    rows.sort(key=lambda row: (finals.index(report.variant(row)), row["lr"], row["seed"]))
    report.write(runs.out, rows, main, dropouts, config, dataset, budget(config, options, argv))
    print(f"{runs.out}: comparison.md, comparison.csv, comparison.png and rates.png are written")


def refuse_to_lose(table: Path, finals: list[Variant], seeds: int, lr: float) -> None:
    """Raise ValueError if the table has runs that this comparison, around this lr, would drop from it."""
    scores = {}
    for row in report.read(table) if table.exists() else []:
        variant = Variant(*report.variant(row))
        if variant not in finals or row["seed"] >= seeds:
            advice = "include it (a run that has finished is not trained again)"
            raise ValueError(would_drop(table, variant, row["lr"], row["seed"], advice))
        if row["trial"]:
            scores.setdefault(variant, {})[row["lr"]] = score(row)
    for variant, known in scores.items():
        tried = {}  # the rates that this search will try again, from the results of the last one
        while (rate := next_lr(tried, NEAR[variant.method] * lr)) in known:
            tried[rate] = known[rate]
        for rate in known.keys() - tried.keys():
            advice = "the --lr it was made with, if this version made it"
            raise ValueError(would_drop(table, variant, rate, 0, advice))


def would_drop(table: Path, variant: Variant, lr: float, seed: int, advice: str) -> str:
    return (
        f"{table}: has {variant} lr {lr:g} seed {seed}, which this comparison would drop; choose another "
        f"--out, or {advice}"
    )


def variants(config: Config, options) -> tuple[list[Variant], list[Variant]]:
    """(variants in the main table, variants in the table of dropout)"""
    main, dropouts = [], []
    rank = 4 if 4 in options.ranks else min(options.ranks)
    for method in options.methods:
        if method not in ADAPTERS:
            main.append(Variant(method))
            continue
        main += [Variant(method, r, config.adapter_dropout) for r in options.ranks]
        values = sorted({0.0, *options.dropouts}) if options.dropouts else []
        dropouts += [Variant(method, rank, value) for value in values]
    return main, dropouts


def budget(config: Config, options, argv: list[str]) -> str:
    """Sentences that say how the learning rates are chosen, and the command."""
    names = pictures.NAMES
    centres = ", ".join(
        f"{names[method]} {NEAR[method] * config.lr:g}" for method in options.methods
    )
    return (
        "Each line of the table has the learning rate with the best validation accuracy, then validation "
        f"loss, at seed 0. Tried are a centre ({centres}), {STEP:g} times less, {STEP:g} times more, and "
        f"further steps as long as the best rate is at the edge, {TRIALS} rates at most. Dropout is tried at "
        f"the rate of the main table. Command: `{shlex.join(['python', 'compare.py', *argv])}`; parallel "
        f"runs: {options.jobs}."
    )


def read(argv: list[str]) -> tuple:
    """Parse the command line: (compare.py's options, the config that all runs share, train.py's flags)."""
    parser = Parser(
        description="Compare linear probe, LoRA, LoHa, LoKr and full fine-tuning.",
        epilog="All other flags go to train.py, for each run: --recipe, --dataset, --epochs ...",
        allow_abbrev=False,  # --seed must not mean --seeds
    )
    methods = ",".join(NEAR)
    parser.add_argument(
        "--ranks", default="2,4,8,16", help="ranks of the adapters (default: 2,4,8,16)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default: 3)"
    )
    parser.add_argument(
        "--dropouts", default="0.1,0.3", help="dropouts of the adapters (default: 0.1,0.3)"
    )
    parser.add_argument(
        "--methods", default=methods, help=f"methods to compare (default: {methods})"
    )
    parser.add_argument(
        "--out", default="runs/comparison", help="folder (default: runs/comparison)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs (default: 1)")
    options, passed = parser.parse_known_args(argv)
    for name in OWN:
        name = flag(name)
        if any(re.match("--.", word) and name.startswith(word.split("=")[0]) for word in passed):
            raise ValueError(f"{name}: compare.py sets it for each run; see --help")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected >= 1")
    options.ranks = listed("ranks", options, int, "whole numbers >= 1", lambda rank: rank >= 1)
    options.dropouts = listed("dropouts", options, float, "numbers in [0, 1)", lambda d: 0 <= d < 1)
    choices = f"some of {', '.join(NEAR)}"
    options.methods = listed("methods", options, str, choices, lambda method: method in NEAR)
    if not options.ranks or not options.methods:
        raise ValueError("--ranks, --methods: expected at least one")
    config = parse([*passed, "--out", options.out])
    if config.max_hours:
        raise ValueError(
            "--max-hours: not for compare.py; stop it when you like, the same command resumes"
        )
    return options, config, passed


def listed(name: str, options, kind: type, expected: str, allowed: Callable) -> list:
    """The values of a flag that takes a list with commas, without duplicates."""
    text, values = getattr(options, name), []
    for part in text.split(",") if text else []:
        try:
            values.append(kind(part.strip()))
        except ValueError:
            values.append(None)
        if values[-1] is None or not allowed(values[-1]):
            raise ValueError(f"--{name} {text}: expected {expected}, separated by commas")
    return list(dict.fromkeys(values))


def ready(config: Config, options) -> tuple[data.Dataset, dict[str, str]]:
    """The data set, its images decoded if train.py would keep them, and the trunk's hash for each method.

    A random trunk has none, nor has full fine-tuning, which freezes nothing. Raises ValueError for everything
    that a run would refuse, now rather than an hour later.
    """
    check(config)
    check_folder(config)
    weights.check_weights(config.weights)
    pick_device(config.device)
    dataset = load_data(config)
    check_sizes(config, len(dataset.train), dataset.test is not None)
    c, classes = config, len(dataset.classes)
    model, preprocessing = vit.build(
        c.model, c.weights, classes, c.image_size, c.head_dropout, heads=c.heads
    )
    trunks = {}
    if "head" in options.methods:
        adapt(model, "head", bias=c.bias)
        trunks["head"] = checkpoint.fingerprint(model)
    if set(options.methods) & set(ADAPTERS):
        adapt(model, "lora", max(options.ranks), targets=c.targets, bias=c.bias)
        check_rank(model, max(options.ranks))
        trunks |= dict.fromkeys(ADAPTERS, checkpoint.fingerprint(model))
    for split in filter(None, (dataset.train, dataset.val, dataset.test)):
        folder = c.cache_dir or Path(c.out) / "cache"
        how = {"interpolation": preprocessing["interpolation"]}
        images.keep(split, folder, preprocessing["image_size"], c.cache, c.workers, **how)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    return dataset, {} if c.weights == "none" else trunks


def stop(number: int, frame) -> None:
    name = signal.Signals(number).name
    raise Stopped(
        number, f"stopped by {name}; finished work is saved: resume with the same command"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0; after one line on stderr, 2 for a mistake or 128 + the signal's
    number."""
    handlers = {number: signal.signal(number, stop) or signal.SIG_DFL for number in STOPS}
    try:
        compare(sys.argv[1:] if argv is None else argv)
    except Stopped as stopped:
        print(f"compare.py: {stopped}", file=sys.stderr)
        return stopped.status
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
