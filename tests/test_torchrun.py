"""Processes of torchrun, which share each batch, against one that has it alone."""

import csv
import sys

import pytest
import torch

import data
import train
from engine import checkpoint
from engine.adapt import ADAPTERS
from engine.config import parse

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")

# 50 images in batches of 7: the last batch of an epoch has one image, and one process has none of it.
FLAGS = "--limit 50 --epochs 2 --batch-size 7 --grad-accum 2 --image-size 14 --workers 0"
FLAGS = [*FLAGS.split(), "--module-dropout", "0.2", "--test", "--clip-norm", "0.5"]


def curves(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("step", "lr", "train_loss", "val_loss", "val_accuracy")
    return [{key: float(row[key]) for key in keys if row[key]} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_processes_learn_what_one_does(adapter, tmp_path, torchrun):
    """Their sums are rounded otherwise: an image that is on the edge of two classes may be in the other."""
    flags = [*FLAGS, "--adapter", adapter]
    train.train(parse([*flags, "--out", str(tmp_path / "one")]))
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
    assert [last["extra"]["confusion"].sum() for last in lasts] == [50, 50], (
        "none twice, and no padding"
    )
    one, two = (last["result"] for last in lasts)
    assert f"Test Accuracy: {two['test_accuracy']:.2%}" in said
    if one["best_epoch"] == two["best_epoch"]:
        assert two["test_loss"] == pytest.approx(one["test_loss"], abs=1e-5)
        assert two["test_accuracy"] == pytest.approx(one["test_accuracy"], abs=1.01 / 50)
    names = [{p.name.split(".")[0] for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    assert names[0] == names[1]


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
