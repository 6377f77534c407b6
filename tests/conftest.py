import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).parent.parent
LIMIT = 600  # seconds for what takes a few: more is no slow machine, but something that hangs
# Small matrices: more threads only wait for each other. And what is compared to the bit must have as many
# in this process as in those that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def no_notebook(monkeypatch):
    """A test of notebooks may import ipykernel, which train.py takes for a sign that it runs in one."""
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)


@pytest.fixture
def run_script(tmp_path):
    """Run a script of the repository in an empty folder, as a user does; returns the process."""

    def run(*arguments, timeout=LIMIT):
        command = [sys.executable, str(ROOT / arguments[0]), *map(str, arguments[1:])]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )

    return run


@pytest.fixture
def start():
    """Start a process, with its output in pipes, as text. What still runs after the test is ended."""
    processes = []

    def start(command, **settings):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen([*map(str, command)], **pipes | settings))
        return processes[-1]

    yield start
    left = [process for process in processes if process.poll() is None]
    for process in left:
        process.terminate()  # not killed: torchrun and compare.py end the processes they have started
    for process in left:
        try:
            process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def torchrun(start, tmp_path):
    """Run some processes of a script on this machine; (the status, what they say, their errors)."""

    def run(*arguments, processes=2, script=ROOT / "train.py"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", script, *arguments]
        process = start(command, cwd=tmp_path)
        said, error = process.communicate(timeout=LIMIT)
        return process.returncode, said, error

    return run


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n, signal): the process gets the signal in its n-th step from now on."""

    def stop(n, number=signal.SIGTERM):
        def step(*arguments):
            step.n += 1
            if step.n == n:
                signal.raise_signal(number)
            return whole(*arguments)

        step.n = 0
        monkeypatch.setattr(train, "train_step", step)

    whole = train.train_step
    return stop


def wait_until(happened, alive=lambda: True, pause=0.1):
    """Wait for happened() to be true. Fail if alive() is no longer, or it takes too long."""
    end = time.monotonic() + LIMIT
    while not happened():
        assert alive(), "it ended before"
        assert time.monotonic() < end, f"not within {LIMIT} s"
        time.sleep(pause)
