"""What --recompute costs and saves: time and memory of a training step with it and without it.

    python bench/recompute.py                          # writes bench/recompute.md
    python bench/recompute.py --device cuda --models vit_l_16 vit_h_14 --batch 32

The trunk has random weights and an adapter in every linear layer. A step is forward and backward pass and
AdamW. Steps with and without take turns, in random order, on the same model; the ratio is the median over
pairs. The memory is the highest in three steps, with weights and gradients but without Python and its
libraries: on a GPU what torch has allocated, on a CPU the memory of a fresh process (Linux). On a CPU, the
process keeps freed memory, as in train.py (devices.keep_freed_memory).
"""

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import vit  # noqa: E402
from engine.adapt import ADAPTERS, adapt  # noqa: E402
from engine.devices import keep_freed_memory  # noqa: E402
from engine.report import commit  # noqa: E402

CLASSES = 100


class Steps:
    """Training steps of one model on the same random images."""

    def __init__(self, name: str, options):
        model, preprocessing = vit.build(name, "none", CLASSES)
        adapt(model, options.adapter, rank=options.rank, alpha=options.rank, targets="all")
        self.model, self.device = model.to(options.device).train(), options.device
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(own)
        side = preprocessing["image_size"]
        self.images = torch.randn(options.batch, 3, side, side, device=self.device)
        self.labels = torch.arange(options.batch, device=self.device) % CLASSES

    def __call__(self, recompute: bool) -> float:
        """The seconds of a step."""
        self.model.encoder.layers.recompute = recompute
        self.wait()
        start = time.perf_counter()
        F.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS are there now, VmHWM at the highest.

    Not resource's ru_maxrss, which a child process starts with its parent's.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def peak(name: str, recompute: bool, options) -> int:
    """Bytes at the highest point of three steps."""
    on_gpu = options.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    steps = Steps(name, options)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        steps(recompute)
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def peak_of_a_process(name: str, recompute: bool) -> int:
    """peak, in a process that has done nothing before."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, str(int(recompute))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def row(name: str, options) -> str:
    kept = [peak_of_a_process(name, recompute) for recompute in (False, True)]
    steps, times, rng = Steps(name, options), {False: [], True: []}, random.Random(0)
    for turn in range(-1, options.rounds):
        for recompute in rng.sample([False, True], 2):  # the step before affects caches
            duration = steps(recompute)
            if turn >= 0:  # the first warms up
                times[recompute].append(duration)
    without, with_it = (statistics.median(times[recompute]) for recompute in (False, True))
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    megabytes = [f"{size / 1e6:,.0f}" for size in kept]
    cells = [name, f"{without:.3g}", f"{with_it:.3g}", f"{ratio:.2f}"]
    cells += [*megabytes, f"{kept[1] / kept[0]:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vit_b_16", "vit_l_16"])
    parser.add_argument("--adapter", choices=list(ADAPTERS), default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "recompute.md")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)  # for peak_of_a_process
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory(options.device)
    if options.only:
        print(peak(options.only[0], options.only[1] == "1", options))
        return
    lines = ["| | s a step | with --recompute | ratio | MB | with --recompute | ratio |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in options.models:
        lines.append(row(name, options))
        print(lines[-1], flush=True)
    device = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    conditions = (
        f"{options.adapter} of rank {options.rank} in all linear layers, batch {options.batch}, float32, "
        f"medians of {options.rounds} paired rounds, {device}, {options.threads} threads, "
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {version('torch')}, torchvision {version('torchvision')}{commit()}."
    )
    text = ["# Time and memory of a step with --recompute", "", *lines, "", conditions, ""]
    options.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
