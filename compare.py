"""Linear probe, LoRA, LoHa, LoKr and full fine-tuning on the same images: one table, one picture.

    python compare.py                                           # the demo; runs/comparison/comparison.md
    python compare.py --ranks 4,8 --seeds 1 --dropouts ""       # less of it
    python compare.py --recipe tiny-imagenet-lora --jobs 2      # any other flag is train.py's

Each method at each rank gets the same budget of learning rates (NEAR, next_lr), tried at seed 0 and judged by
validation accuracy; their centre is --lr, or the recipe's. Once all are chosen, all seeds are trained, and the
adapters with each dropout too, and the test split is looked at, once for each of these final runs.

Every run is train.py's, with --resume, in a folder of its own in --out: stopped, in whatever way, the same
command goes on. --jobs trains so many at once: on a CPU they share the threads (which changes the last bits),
on GPUs each has one of them. Of every run there is a row in comparison.csv.
"""

import csv
import os
import platform
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import checkpoint
import data
import pictures
import vit
from config import Config, Parser, check, check_rank, check_sizes, parse, refuse_changes
from devices import Autocast, out_of_memory, pick_device, pick_dtype
from record import Stopped

HERE = Path(__file__).parent
# Where the search for a learning rate begins, in units of --lr: a head alone takes larger steps than
# adapters do, the whole trunk smaller ones.
NEAR = {"head": 20, "lora": 1, "loha": 1, "lokr": 1, "full": 0.4}
STEP, TRIALS = 2.5, 5  # between two learning rates; at most so many of them
LOAD = "dataset data_dir limit classes download holdout".split()  # the arguments of data.load
OWN = "adapter rank seed resume test init_adapter".split()  # what is set here, run by run
COLUMNS = """run method rank dropout lr seed trial final val_accuracy val_loss best_epoch test_accuracy
    test_loss trainable total adapter_bytes images_per_second kept_bytes""".split()


@dataclass(frozen=True)
class Variant:
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
            row = self.run(variant, lr, seed=0, trial=1)
            scores[lr] = (row["val_accuracy"], -row["val_loss"]) if "val_loss" in row else (-1, 0)
        if max(scores.values())[0] < 0:
            raise ValueError(f"{variant}: diverged at every learning rate; give a smaller --lr")
        return best_lr(scores)

    def run(self, variant: Variant, lr: float, seed: int, **part: int) -> dict:
        """Train with train.py, unless that is done; return the row of comparison.csv.

        part: trial=1 or final=1. A final run is tested; a trial may diverge, and has no accuracy then.
        Raises ValueError with the last line that the run said if it fails.
        """
        name = f"{variant} lr {lr:g} seed {seed}"
        folder = self.out / re.sub(" (?=[0-9])", "", name).replace(" ", "-")
        flags = [*self.passed, *variant.flags(), "--lr", str(lr), "--seed", str(seed)]
        flags += ["--out", str(folder), "--resume"]
        flags += ["--test"] if "final" in part and self.dataset.test else []
        config, clock, said = parse(flags), time.monotonic(), ""
        result = self.result(config)
        took = "finished already" if result else None
        if not result:
            log = folder.with_name(folder.name + ".log")
            status = self.launch(flags, log)
            said = (log.read_text(errors="replace").strip().splitlines() or ["says nothing"])[-1]
            diverged = status == 2 and "try a smaller --lr" in said  # Progress.diverged's
            if status and not (diverged and "trial" in part):
                raise ValueError(f"{name}: {said} (exit status {status}; more in {log})")
            result = {} if diverged else self.result(config)
            took = f"{time.monotonic() - clock:.0f} s"
        with self.lock:
            row = self.rows.setdefault(folder.name, {"run": folder.name, **vars(variant)})
            row |= {"lr": lr, "seed": seed, **part, **result}
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
        content = checkpoint.read_resume(last)
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
            futures = [pool.submit(task, *each) for each in arguments]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                with self.lock:
                    self.stopping = True
                    for process in self.processes:
                        process.terminate()
                raise
        return [future.result() for future in futures]


def kept(config: Config, classes: int) -> int | None:
    """Bytes that autograd keeps for the backward of one batch, parameters left out; None if the memory does
    not suffice. Counted, not estimated: the storages of all tensors that are saved."""
    c, device = config, pick_device(config.device)
    model, preprocessing = vit.build(c.model, c.weights, classes, c.image_size, c.head_dropout)
    arguments = {key: getattr(c, key) for key in checkpoint.ADAPT}
    dropout = {"dropout": c.adapter_dropout, "module_dropout": 0.0}  # no adapter is to sit it out
    checkpoint.adapt(model, **dropout, **arguments)
    model = Autocast(model.to(device).train(), device, pick_dtype(c.amp, device))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(c.batch_size, 3, *[preprocessing["image_size"]] * 2, device=device)
    labels = torch.zeros(c.batch_size, dtype=torch.int64, device=device)
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = F.cross_entropy(model(images).float(), labels)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return None
    del loss  # until here no storage could take another's place
    return sum(storages.values())


def compare(argv: list[str] | None) -> None:
    """Read the command line, refuse what cannot work, train what is not trained yet, and write it all up."""
    options, config, passed = read(argv)
    dataset = ready(config, options.methods, options.ranks)
    at = Comparison(config, dataset, passed, options.jobs)
    main, dropped = [], []
    for method in options.methods:
        adapter = method in checkpoint.ADAPTERS
        own = {"dropout": config.adapter_dropout} if adapter else {}
        main += [Variant(method, rank, **own) for rank in (options.ranks if adapter else [None])]
        rank = 4 if 4 in options.ranks else options.ranks[0]
        if adapter and options.dropouts:
            dropped += [Variant(method, rank, d) for d in sorted({0.0, *options.dropouts})]
    finals = list(dict.fromkeys(main + dropped))
    at.planned = 3 * len(main) + options.seeds * len(finals)
    chosen = dict(zip(main, at.at_once(at.tune, [(v,) for v in main]), strict=True))
    lrs = {v: chosen.get(v) or chosen[replace(v, dropout=config.adapter_dropout)] for v in finals}

    def final(variant: Variant, seed: int) -> dict:
        return at.run(variant, lrs[variant], seed, final=1)

    at.at_once(final, [(variant, seed) for seed in range(options.seeds) for variant in finals])
    memory = {v: kept(parse([*passed, *v.flags()]), len(dataset.classes)) for v in finals}
    rows = [row | {"kept_bytes": memory[variant_of(row)]} for row in at.rows.values()]
    rows.sort(key=lambda row: (finals.index(variant_of(row)), row["lr"], row["seed"]))
    write(at, options, rows, main, dropped)


def read(argv: list[str] | None) -> tuple:
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
    argv = sys.argv[1:] if argv is None else argv
    options, passed = parser.parse_known_args(argv)
    options.argv = argv
    for name in OWN:
        name = "--" + name.replace("_", "-")
        if any(word.split("=")[0] == name for word in passed):
            raise ValueError(f"{name}: compare.py sets it itself, run by run; see --help")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)}: expected >= 1")
    options.ranks = listed("ranks", options, int, ">= 1", lambda rank: rank >= 1)
    options.dropouts = listed("dropouts", options, float, "in [0, 1)", lambda d: 0 <= d < 1)
    among = f"of {', '.join(NEAR)}"
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
            raise ValueError(f"--{name} {text}: {part!r}: expected {kind.__name__} {expected}")
    return list(dict.fromkeys(values))


def ready(config: Config, methods: list[str], ranks: list[int]) -> data.Dataset:
    """The data set, found, decoded where train.py would do that, and checked with all else that a run
    could refuse: rather now than after an hour of others."""
    check(config)
    dataset = data.load(*(getattr(config, key) for key in LOAD))
    check_sizes(config, dataset)
    c, classes = config, len(dataset.classes)
    model, preprocessing = vit.build(c.model, c.weights, classes, c.image_size, c.head_dropout)
    if set(methods) & set(checkpoint.ADAPTERS):
        checkpoint.adapt(model, "lora", max(ranks), targets=c.targets)
        check_rank(replace(c, rank=max(ranks)), model)
    for split in filter(None, (dataset.train, dataset.val, dataset.test)):
        folder = c.cache_dir or Path(c.out) / "cache"
        data.keep(split, folder, preprocessing["image_size"], c.cache, c.workers)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    return dataset


def variant_of(row: dict) -> Variant:
    return Variant(row["method"], row["rank"], row["dropout"])


def mean_std(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which one value does not have."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def summary(variant: Variant, rows: list[dict]) -> dict:
    """What the final runs of a variant came to, over their seeds."""
    of = [row for row in rows if variant_of(row) == variant]
    final, tried = [row for row in of if "final" in row], [r["lr"] for r in of if "trial" in r]
    found = {
        **vars(variant),
        **{k: final[0][k] for k in ("lr", "trainable", "adapter_bytes", "kept_bytes")},
    }
    found["edge"] = bool(tried) and found["lr"] in (min(tried), max(tried))
    found["speed"] = statistics.mean(row["images_per_second"] for row in final)
    for split in ("val", "test"):
        values = [row[f"{split}_accuracy"] for row in final if f"{split}_accuracy" in row]
        found[split] = mean_std(values) if values else None
    return found


def write(at: Comparison, options, rows: list[dict], main: list, dropped: list) -> None:
    """comparison.csv, comparison.md and comparison.png, each in one piece."""
    with checkpoint.atomic(at.out / "comparison.csv") as temporary:
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="")
            writer.writeheader()
            writer.writerows(rows)
    table, beside = ([summary(v, rows) for v in variants] for variants in (main, dropped))
    text = "\n\n".join([*conditions(at, options, rows, table), *tables(rows, table, beside)])
    with checkpoint.atomic(at.out / "comparison.md") as temporary:
        temporary.write_text(text + "\n")
    split = "test" if at.dataset.test else "val"
    title = f"{at.config.dataset}: {len(at.dataset.train):,} training images, {at.config.model}"
    with checkpoint.atomic(at.out / "comparison.png") as temporary:
        pictures.plot_comparison(table, beside, split, temporary, title)
    print(f"{at.out / 'comparison.md'}: done; comparison.csv and comparison.png lie beside it")


def tables(rows: list[dict], table: list[dict], beside: list[dict]) -> list[str]:
    """The table, the effect of dropout, and the learning rates that were tried, as Markdown."""

    def percent(pair: tuple | None) -> str:
        if pair is None:
            return ""
        return f"{100 * pair[0]:.1f}" + ("" if pair[1] is None else f" ± {100 * pair[1]:.1f}")

    def markdown(titles: str, lines: Iterable[tuple]) -> str:
        rule = "|---" * (titles.count("|") + 1) + "|"
        return "\n".join([f"| {titles} |", rule, *("| " + " | ".join(ln) + " |" for ln in lines)])

    def named(row: dict) -> tuple[str, str]:
        return pictures.NAMES[row["method"]], str(row["rank"] or "")

    first = [
        (
            *named(s),
            f"{s['trainable']:,}",
            f"{s['adapter_bytes'] / 1024:,.0f}",
            f"{s['lr']:g}" + "\\*" * s["edge"],
            percent(s["val"]),
            percent(s["test"]),
            f"{s['speed']:,.0f}",
            "" if s["kept_bytes"] is None else f"{s['kept_bytes'] / 2**20:,.1f}",
        )
        for s in table
    ]
    titles = (
        "what trains | rank | parameters | adapter file, KiB | learning rate | validation, % | "
    )
    parts = [markdown(titles + "test, % | images/s | kept, MiB", first)]
    if any(s["edge"] for s in table):
        parts.append("\\* The best of those tried, but at their edge: a better one may lie beyond.")
    if beside:
        lines = [
            (*named(s), f"{s['dropout']:g}", percent(s["val"]), percent(s["test"])) for s in beside
        ]
        titles = "what trains | rank | dropout | validation, % | test, %"
        parts += ["## Dropout of the adapters", markdown(titles, lines)]
    lines = [
        (
            *named(row),
            f"{row['lr']:g}",
            f"{100 * row['val_accuracy']:.1f}",
            f"{row['val_loss']:.4f}",
        )
        if "val_loss" in row
        else (*named(row), f"{row['lr']:g}", "diverged", "")
        for row in rows
        if "trial" in row
    ]
    titles = "what trains | rank | learning rate | validation, % | validation loss"
    return [*parts, "## The learning rates that were tried, at seed 0", markdown(titles, lines)]


def conditions(at: Comparison, options, rows: list[dict], table: list[dict]) -> list[str]:
    """What the figures hold for, in words."""
    c, d = at.config, at.dataset
    counts = [f"{len(d.train):,} training", f"{len(d.val):,} validation"]
    counts += [f"{len(d.test):,} test"] if d.test else []
    tested = (
        "The test split was evaluated once for each final run, after every learning rate was chosen."
        if d.test
        else "There is no test split: the learning rate was chosen on the images that the figures are "
        "of, which flatters."
    )
    tried = {name: 0 for name in options.methods}
    for row in rows:
        tried[row["method"]] += row.get("trial", 0)
    tried = ", ".join(f"{pictures.NAMES[name]} {count}" for name, count in tried.items())
    near = ", ".join(f"{pictures.NAMES[m]} {NEAR[m] * c.lr:g}" for m in options.methods)
    accumulated = f" x {c.grad_accum}" if c.grad_accum > 1 else ""
    return [
        "# Comparison",
        f"**Data and training.** {c.dataset}: {', '.join(counts)} images, {len(d.classes)} classes. Trunk "
        f"{c.model}, weights {Path(c.weights).name}. {c.epochs} epochs, batch {c.batch_size}{accumulated}, "
        f"alpha {c.alpha:g} at every rank, all else as in the recipe `{c.recipe}` and in the command, "
        f"`{shlex.join(['python', 'compare.py', *options.argv])}`. Of each run the epoch with the best "
        "validation accuracy counts.",
        f"**Learning rates.** For each line of the table: a centre ({near}), {STEP:g} times less, {STEP:g} "
        f"times more, and one step further out as long as the best is at the edge, {TRIALS} at most, at "
        f"seed 0; the best by validation accuracy, then validation loss, is kept. Trained for that: {tried}. "
        + tested,
        f"**Figures.** {'Mean ± sample standard deviation over seeds' if options.seeds > 1 else 'Seed'} "
        f"{', '.join(map(str, range(options.seeds)))}. images/s: of the last epoch of training, "
        f"{options.jobs} at once. kept: what autograd keeps for the backward of one batch, "
        f"parameters left out. {machine(c)}",
        "One trunk, one data set and one recipe"
        + (", all of them small" if c.dataset == "demo" else "")
        + ": read it as what the methods do here, not as a ranking of them.",
    ]


def machine(config: Config) -> str:
    """What the runs ran on, and with which versions."""
    device, name = pick_device(config.device), platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has it
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    commit = ""
    with suppress(OSError):  # no git
        command = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
        commit = f", commit {said.stdout.strip()}" if said.returncode == 0 else ""
    dtype = str(pick_dtype(config.amp, device))[6:]
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}, {dtype}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
        f"{commit}."
    )


def stop(number: int, frame) -> None:
    name = signal.Signals(number).name
    raise Stopped(
        number, f"stopped by {name}; what was trained is kept: go on with the same command"
    )


def main(argv: list[str] | None = None) -> int:
    """Compare as the command line says; 0, or after one line on stderr 2 for what cannot work, and 128 +
    its number for a signal."""
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        compare(argv)
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
