"""Two processes of torchrun, which share each batch, against one that has it alone."""

import csv
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import checkpoint
import data
import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")

# 50 images in batches of 7: the last batch of an epoch has one image, and one process has none of it.
FLAGS = "--limit 50 --epochs 2 --batch-size 7 --grad-accum 2 --image-size 14 --workers 0"
FLAGS = [*FLAGS.split(), "--module-dropout", "0.2", "--test"]


def torchrun(folder, *arguments, script=ROOT / "train.py"):
    """Start two processes of a script on this machine, in a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **pipes)


def curves(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("step", "lr", "train_loss", "val_loss", "val_accuracy")
    return [[float(row[key]) for key in keys if row[key]] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", checkpoint.ADAPTERS)
def test_two_processes_learn_what_one_does(adapter, tmp_path):
    flags = [*FLAGS, "--adapter", adapter]
    alone = train.train(train.parse([*flags, "--out", str(tmp_path / "one")]))
    process = torchrun(tmp_path, *flags, "--out", "two")
    said, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert said.count(f"{adapter}: ") == 1, "one process prints"
    one, two = curves(tmp_path / "one"), curves(tmp_path / "two")
    assert len(one) == len(two) == 10  # 4 steps and a validation in each epoch
    for x, y in zip(one, two, strict=True):
        assert y == pytest.approx(x, abs=1e-5)
    assert f"Test Accuracy: {alone['test_accuracy']:.2%}" in said
    counts = [
        checkpoint.read_resume(tmp_path / n / "last.pt")["best_counts"] for n in ("one", "two")
    ]
    assert torch.equal(*counts) and counts[0].sum() == 50, "no image twice, and no padding"
    names = [{p.name.split(".")[0] for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_processes_that_are_stopped_go_on_bit_for_bit(tmp_path):
    flags = [*FLAGS, "--epochs", "12", "--adapter-dropout", "0.1", "--head-dropout", "0.1"]
    process = torchrun(tmp_path, *flags, "--out", "run")
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=400)
    assert process.returncode != 0
    assert "train.py: stopped by SIGTERM after step" in error
    done = checkpoint.read_resume(tmp_path / "run" / "last.pt")["done"]
    assert 8 <= done < 48
    for name, resume in (("run", ["--resume"]), ("unbroken", [])):
        process = torchrun(tmp_path, *flags, "--out", name, *resume)
        said, error = process.communicate(timeout=400)
        assert process.returncode == 0, error
        assert (f"goes on after step {done} of 48" in said) == bool(resume)
    assert curves(tmp_path / "run") == curves(tmp_path / "unbroken")
    a, b = (checkpoint.read_resume(tmp_path / n / "last.pt") for n in ("run", "unbroken"))
    assert all(torch.equal(a["tensors"][key], b["tensors"][key]) for key in b["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("error", ["ValueError", "KeyError"])
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_in_one_process_ends_both_with_its_message(who, error, tmp_path):
    script = tmp_path / "breaks.py"
    script.write_text(
        f"""
import sys

sys.path.insert(0, {str(ROOT)!r})
import train

whole, steps = train.train_step, []


def step(*arguments):
    steps.append(1)
    if train.rank() == {who} and len(steps) == 3:
        raise {error}("the reason of it")
    return whole(*arguments)


train.train_step = step
sys.exit(train.main(sys.argv[1:]))
"""
    )
    process = torchrun(tmp_path, *FLAGS, "--out", "run", script=script)
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "the reason of it" in said


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_said(tmp_path):
    process = torchrun(tmp_path, *FLAGS, "--rank", "0")
    _, said = process.communicate(timeout=100)
    assert process.returncode != 0 and "train.py: --rank 0: expected >= 1\n" in said
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
