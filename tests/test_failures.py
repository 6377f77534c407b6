"""What the world does to a run: a disk that fills, memory that ends, a loss that explodes, an old GPU."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from conftest import LIMIT, ROOT
from test_resume import assert_clean, assert_same, contents

import train
from engine import checkpoint, devices
from engine.config import parse
from engine.devices import out_of_memory, pick_device


@pytest.fixture
def resource():
    return pytest.importorskip("resource", reason="Windows has no limits to set")


# A process in which the system refuses files over so many bytes, from one step on and up to another.
LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
room, first, last = map(int, sys.argv[2:5])
import train
whole, steps = train.train_step, []
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]  # of a user who is limited already
def step(*arguments):
    steps.append(1)
    if len(steps) == first:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    if len(steps) == last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return whole(*arguments)
train.train_step = step
sys.exit(train.main(sys.argv[5:]))
"""
FLAGS = "--limit 48 --epochs 2 --batch-size 8 --image-size 14 --workers 0 --save-minutes 0".split()


def limited(folder, room, first, last, *flags):
    """Train in steps first to last without room; the process."""
    numbers = map(str, (room, first, last))
    command = [sys.executable, "-c", LIMITED, str(ROOT), *numbers, *FLAGS, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, cwd=folder, timeout=LIMIT, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "room", [0, 100_000]
)  # bytes: for no file; for all but last.pt and adapters
@pytest.mark.usefixtures("resource")
def test_a_full_disk_has_a_warning_and_the_run_goes_on(room, tmp_path):
    train.train(parse([*FLAGS, "--out", str(tmp_path / "unbroken")]))
    process = limited(tmp_path, room, 3, 9, "--out", "run")
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("last.pt cannot be written ([Errno 27] File too large") == 1
    assert process.stderr.count("adapter.safetensors cannot be written") == 1
    assert process.stderr.count("metrics.csv cannot be written") == (room == 0)
    assert "training continues and tries again" in process.stderr
    assert "Traceback" not in process.stderr
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))
    assert_clean(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("resource")
def test_a_disk_that_stays_full_keeps_the_last_good_file(tmp_path):
    process = limited(tmp_path, 0, 3, 99, "--out", "run")
    assert process.returncode == 2
    end = "adapter.safetensors: cannot be written; free disk space and resume with the same command"
    assert end in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert checkpoint.read_resume(tmp_path / "run" / "last.pt")["step"] == 2
    process = limited(tmp_path, 0, 99, 99, "--out", "run", "--resume")
    assert process.returncode == 0 and "run: resumes after step 2 of 12" in process.stdout
    train.train(parse([*FLAGS, "--out", str(tmp_path / "unbroken")]))
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))


def test_a_disk_that_is_full_at_the_start_bars_no_later_try(resource, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        assert train.main([*FLAGS, "--out", str(tmp_path / "run"), "--cache-dir", "kept"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.endswith("cannot be made (File too large); name another\n")
    assert train.main([*FLAGS, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0


def in_step(monkeypatch, n, action):
    """Call action before the n-th step of a run."""
    whole, steps = train.train_step, []

    def step(*arguments):
        steps.append(1)
        if len(steps) == n:
            action()
        return whole(*arguments)

    monkeypatch.setattr(train, "train_step", step)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_run_that_explodes_keeps_the_last_good_state(amp, tmp_path, monkeypatch, capsys):
    def explode():
        with torch.no_grad():
            at["run"].model.heads.head.bias.fill_(torch.inf)

    at, prepare = {}, train.prepare
    monkeypatch.setattr(devices, "computes_float16", lambda: True)
    monkeypatch.setattr(train, "prepare", lambda config: at.setdefault("run", prepare(config)))
    in_step(monkeypatch, 4, explode)
    assert train.main([*FLAGS, "--amp", amp, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    scale = r", loss scale \d+" if amp == "fp16" else ""
    assert re.search(rf"the loss is nan at step 4 \(learning rate 0.00375{scale}\)", error)
    assert "last.pt stays at step 3; try a smaller --lr" in error and error.count("\n") == 1
    assert "best epoch" not in error, "none has ended"
    last = checkpoint.read_resume(tmp_path / "run" / "last.pt")
    assert last["step"] == 3 and all(t.isfinite().all() for t in last["tensors"].values())


def test_tensors_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """A step whose loss is finite, and what it leaves behind is not."""
    step = train.train_step

    def overflow(run, *arguments):
        loss = step(run, *arguments)
        with torch.no_grad():
            run.model.heads.head.bias[1] = torch.inf
        return loss

    monkeypatch.setattr(train, "train_step", overflow)
    assert train.main([*FLAGS, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "heads.head.bias is not finite at step 1 (learning rate 0.005)" in error
    assert "best epoch" not in error
    assert not (tmp_path / "run" / "last.pt").exists()
    assert_clean(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the others do not say how much is used")
def test_memory_that_does_not_suffice_is_one_line(resource, tmp_path, monkeypatch, capsys):
    before = resource.getrlimit(resource.RLIMIT_AS)

    def little():
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
        if used > 8e9:
            pytest.skip("earlier tests have left this process more memory than the step needs")
        resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, before[1]))

    in_step(monkeypatch, 1, little)
    flags = "--limit 2000 --batch-size 2000 --workers 0 --out".split()
    try:
        assert train.main([*flags, str(tmp_path / "run")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    error = capsys.readouterr().err
    assert error.startswith("train.py: out of memory with --batch-size 2000 (")
    assert "try --batch-size 1000 --grad-accum 2, which learns the same; or --amp bf16" in error
    assert error.count("\n") == 1


def test_what_gpus_say_of_memory_is_understood():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


KAGGLE = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((6, 0), KAGGLE, False),
        ((7, 5), KAGGLE, True),
        ((8, 9), KAGGLE, True),  # within 8.x
        ((7, 0), ["sm_75", "sm_80"], False),
        ((10, 0), KAGGLE, True),
        ((11, 0), KAGGLE, False),
        ((12, 1), KAGGLE, True),
        ((13, 0), KAGGLE, True),  # compiled by the driver
        ((9, 0), ["sm_90a"], True),
    ],
)
def test_which_gpus_a_build_runs_on(capability, built, runs):
    assert devices.runs_on(capability, built) == runs


def test_kaggle_s_p100_is_named_before_the_first_step(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: KAGGLE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla P100-PCIE-16GB")
    with pytest.raises(ValueError, match=r"Tesla P100-PCIE-16GB is sm_60, and torch .* T4 x2"):
        pick_device("auto")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other allocators have settings of their own"
)
def test_freed_memory_serves_the_next_step():
    script = """if True:
        import ctypes, resource, torch
        from engine.devices import keep_freed_memory
        keep_freed_memory(torch.device("cpu"))
        model = torch.nn.Sequential(*[torch.nn.GELU() for _ in range(4)])
        def faults(steps):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(steps):
                x = torch.ones(64, 3, 224, 224, requires_grad=True)  # 38.5 MB, 9408 pages
                model(x).sum().backward()
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        faults(10)  # it settles
        assert faults(10) < 5 * 9408, "without, ten steps are a hundred such tensors"

        libc = ctypes.CDLL(None)
        libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
        blocks = [libc.malloc(ctypes.c_size_t(300 << 20)) for _ in range(9)]  # nothing is written to them
        end = libc.sbrk(0)
        for block in blocks:
            libc.free(ctypes.c_void_p(block))
        assert libc.sbrk(0) == end, "the heap has shrunk"
    """
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
