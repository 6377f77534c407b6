"""Processes of torchrun that are stopped, or of which one fails."""

import re
import sys
import textwrap

import pytest
import torch
from conftest import ROOT
from test_torchrun import FLAGS, curves

from engine import checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")


def in_step(folder, who, n, action):
    """train.py, but that before its n-th step one of the processes does something; the script."""
    script = folder / "in_step.py"
    script.write_text(
        f"""
import os, signal, sys, time

sys.path.insert(0, {str(ROOT)!r})
import train
from engine import devices

whole, steps = train.train_step, []


def step(*arguments):
    steps.append(1)
    if devices.process() == {who} and len(steps) == {n}:
{textwrap.indent(textwrap.dedent(action), 8 * " ")}
    return whole(*arguments)


train.train_step = step
sys.exit(train.main(sys.argv[1:]))
"""
    )
    return script


# To torchrun, which passes it on; and a process that goes on only once it has it stops after this step.
STOP = """
os.kill(os.getppid(), signal.SIGTERM)
signals, end = signal.getsignal(signal.SIGTERM).__self__, time.monotonic() + 60
while not signals.received:
    assert time.monotonic() < end
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_processes_that_are_stopped_go_on_bit_for_bit(tmp_path, torchrun):
    """Three: in which order two numbers are added does not matter."""
    flags = [*FLAGS, "--epochs", "4", "--adapter-dropout", "0.1", "--head-dropout", "0.1"]
    stops = in_step(tmp_path, 0, 6, STOP)
    status, _, error = torchrun(*flags, "--out", "run", processes=3, script=stops)
    assert status != 0
    assert "train.py: stopped by SIGTERM after step 6; last.pt is at step 6;" in error
    for name, resume in (("run", ["--resume"]), ("unbroken", [])):
        status, said, error = torchrun(*flags, "--out", name, *resume, processes=3)
        assert status == 0, error
        assert ("resumes after step 6 of 16" in said) == bool(resume)
    assert curves(tmp_path / "run") == curves(tmp_path / "unbroken")
    a, b = (checkpoint.read_resume(tmp_path / n / "last.pt") for n in ("run", "unbroken"))
    assert all(torch.equal(a["tensors"][key], b["tensors"][key]) for key in b["tensors"])


@pytest.mark.slow
def test_the_clock_of_any_process_stops_all_with_status_0(tmp_path, torchrun):
    flags = [*FLAGS, "--out", "run", "--max-hours", "1"]
    script = in_step(tmp_path, 1, 3, "arguments[0].started -= 3600")
    status, said, error = torchrun(*flags, script=script)
    assert status == 0, error
    assert "stopped by --max-hours 1 after step 3; last.pt is at step 3; resume with" in said
    status, said, error = torchrun(*flags, "--resume")
    assert status == 0, error
    assert "resumes after step 3 of 8" in said and "Test Accuracy" in said


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_ends_both_with_its_message(who, error, tmp_path, torchrun):
    script = in_step(tmp_path, who, 3, f'raise {error}("the reason of it")')
    status, _, said = torchrun(*FLAGS, "--out", "run", script=script)
    assert status != 0
    assert "the reason of it" in said


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_said(tmp_path, torchrun):
    """By the process that comes to it first: torchrun ends the others, which may be about to."""
    status, _, said = torchrun(*FLAGS, "--rank", "0")
    assert status != 0
    assert re.search(r"^train\.py(, process 1)?: --rank 0: expected >= 1\n", said, re.MULTILINE)
    assert not list(tmp_path.iterdir())
