"""Processes of torchrun, which share each batch, against one that has it alone."""

import csv
import re
import sys
import textwrap

import pytest
import torch
from conftest import LIMIT, ROOT

import checkpoint
import data
import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")

# 50 images in batches of 7: the last batch of an epoch has one image, and one process has none of it.
FLAGS = "--limit 50 --epochs 2 --batch-size 7 --grad-accum 2 --image-size 14 --workers 0"
FLAGS = [*FLAGS.split(), "--module-dropout", "0.2", "--test"]


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


def in_step(folder, who, n, action):
    """train.py, but that before its n-th step one of the processes does something; the script."""
    script = folder / "in_step.py"
    script.write_text(
        f"""
import os, signal, sys, time

sys.path.insert(0, {str(ROOT)!r})
import train

whole, steps = train.train_step, []


def step(*arguments):
    steps.append(1)
    if train.rank() == {who} and len(steps) == {n}:
{textwrap.indent(textwrap.dedent(action), 8 * " ")}
    return whole(*arguments)


train.train_step = step
sys.exit(train.main(sys.argv[1:]))
"""
    )
    return script


def curves(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("step", "lr", "train_loss", "val_loss", "val_accuracy")
    return [{key: float(row[key]) for key in keys if row[key]} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", checkpoint.ADAPTERS)
def test_two_processes_learn_what_one_does(adapter, tmp_path, torchrun):
    """Their sums are rounded otherwise: an image that is on the edge of two classes may be in the other."""
    flags = [*FLAGS, "--adapter", adapter]
    train.train(train.parse([*flags, "--out", str(tmp_path / "one")]))
    status, said, error = torchrun(*flags, "--out", "two")
    assert status == 0, error
    assert said.count(f"{adapter}: ") == 1, "one process prints"
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert len(one) == len(two) == 10  # 4 steps and a validation in each epoch
    for x, y in zip(one, two, strict=True):
        accuracies = [row.pop("val_accuracy", 0) for row in (x, y)]
        assert y == pytest.approx(x, abs=1e-5)
        assert accuracies[1] == pytest.approx(accuracies[0], abs=1.01 / 50)
    lasts = [checkpoint.read_resume(tmp_path / n / "last.pt") for n in ("one", "two")]
    assert [last["best_counts"].sum() for last in lasts] == [50, 50], "none twice, and no padding"
    one, two = (last["result"] for last in lasts)
    assert f"Test Accuracy: {two['test_accuracy']:.2%}" in said
    if one["best_epoch"] == two["best_epoch"]:
        assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-5)
        assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=1.01 / 50)
    names = [{p.name.split(".")[0] for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert names[0] == names[1]


# To torchrun, which passes it on; and a process that goes on only once it has it stops after this step.
STOP = """
os.kill(os.getppid(), signal.SIGTERM)
signals, end = signal.getsignal(signal.SIGTERM).__self__, time.monotonic() + 60
while not signals.asked:
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
    assert "train.py: stopped by SIGTERM after step 6; last.pt stands at step 6;" in error
    for name, resume in (("run", ["--resume"]), ("unbroken", [])):
        status, said, error = torchrun(*flags, "--out", name, *resume, processes=3)
        assert status == 0, error
        assert ("goes on after step 6 of 16" in said) == bool(resume)
    assert curves(tmp_path / "run") == curves(tmp_path / "unbroken")
    a, b = (checkpoint.read_resume(tmp_path / n / "last.pt") for n in ("run", "unbroken"))
    assert all(torch.equal(a["tensors"][key], b["tensors"][key]) for key in b["tensors"])


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


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("n", [2, 3])
def test_processes_share_each_batch_and_every_image_is_seen_once(n, workers):
    split = data.load("demo", limit=22).train
    preprocessing = {"image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
    settings = {"train": True, "seed": 1, "epoch": 2, "workers": workers, "start": 5}
    whole = list(data.batches(split, 4, preprocessing, **settings))
    parts = [list(data.batches(split, 4, preprocessing, part=(i, n), **settings)) for i in range(n)]
    assert len(whole) == 5  # 17 images are left
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        seen = [
            (image, label)
            for share in shares
            for image, label in zip(*share, strict=True)
            if label != -100
        ]
        assert len(seen) == len(labels)
        assert all(len(share[1]) for share in shares), "none is without an image"
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            found = [k for k, (other, _) in enumerate(seen) if torch.equal(image, other)]
            assert len(found) == 1 and seen[found[0]][1] == label, i
