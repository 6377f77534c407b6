"""Classes of uneven size: weights, balanced accuracy and the best epoch, against scikit-learn and torch."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from trees import write_image

import train
from engine import checkpoint
from engine.config import Config

COUNTS = {"cat": 20, "cow": 3, "dog": 7}
QUICK = {
    "dataset": "folder",
    "model": "vit_mini",
    "weights": "embedded",
    "batch_size": 8,
    "workers": 0,
}


@pytest.fixture
def uneven(tmp_path):
    for label, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            write_image(tmp_path / "pets" / "train" / name / f"{i}.jpg", label, i, (40, 40))
        for i in range(count // 2):
            write_image(tmp_path / "pets" / "val" / name / f"{i}.jpg", label, 100 + i, (40, 40))
    return {**QUICK, "data_dir": tmp_path / "pets", "out": tmp_path / "run"}


def test_balanced_weights_are_scikit_learn_s(uneven, capsys):
    run = train.prepare(Config(class_weights="balanced", **uneven))
    labels = run.dataset.train.labels
    assert np.bincount(labels).tolist() == [*COUNTS.values()]
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert train.class_weights(run).tolist() == pytest.approx(wanted.tolist())
    run.config.class_weights = "none"
    assert train.class_weights(run) is None
    train.advise(run)
    assert "2 of 3 classes have fewer than 10 training images: cow (3), dog (7);" in (
        capsys.readouterr().out
    )
    run.lock.close()


def test_the_loss_is_torch_s_with_weights_and_smoothing(uneven, monkeypatch):
    """One step over all images: the gradient of their weighted mean, whatever the accumulation."""
    updates = []
    for batch_size, grad_accum in ((30, 1), (7, 5)):
        settings = {
            "batch_size": batch_size,
            "grad_accum": grad_accum,
            "min_crop": 1,
            "flip": False,
        }
        settings |= {"class_weights": "balanced", "label_smoothing": 0.1, "adapter": "head"}
        settings["out"] = uneven["out"].with_name(f"run{batch_size}")
        run = train.prepare(Config(**uneven | settings))
        seen = []

        def load_batches(*arguments, usual=train.load_batches, seen=seen, **how):
            for batch in usual(*arguments, **how):
                seen.append(batch)
                yield batch

        class Noted(torch.optim.SGD):
            def step(self, *_):
                updates.append([p.grad.clone() for p in self.param_groups[0]["params"]])
                raise InterruptedError

        monkeypatch.setattr(train, "load_batches", load_batches)
        monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, weight_decay: Noted(p, lr))
        with pytest.raises(InterruptedError):
            train.fit(run)
        monkeypatch.undo()
        images, labels = (torch.cat(part) for part in zip(*seen, strict=True))
        weight = torch.tensor(
            compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
        )
        logits = run.model(images)
        losses = F.cross_entropy(
            logits, labels, weight.float(), reduction="none", label_smoothing=0.1
        )
        wanted = torch.autograd.grad(losses.mean(), [*run.model.heads.parameters()])
        for found, expected in zip(updates[-1], wanted, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        plain = torch.autograd.grad(
            F.cross_entropy(run.model(images), labels), [*run.model.heads.parameters()]
        )
        assert (plain[0] - wanted[0]).abs().max() > 1e-3, (
            "the control: neither weights nor smoothing"
        )
    for one, other in zip(*updates, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_balanced_accuracy_is_scikit_learn_s(uneven):
    result = train.train(Config(epochs=2, lr=1e-4, **uneven))
    last = checkpoint.read_resume(uneven["out"] / "last.pt")
    confusion = last["extra"]["confusion"]
    pairs = [(i, j) for i in range(3) for j in range(3) for _ in range(confusion[i, j])]
    labels, answers = zip(*pairs, strict=True)
    wanted = balanced_accuracy_score(labels, answers)
    assert result["val_balanced_accuracy"] == pytest.approx(wanted)
    assert result["val_balanced_accuracy"] != pytest.approx(result["val_accuracy"])
    with open(uneven["out"] / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_accuracy"]]
    assert float(rows[result["best_epoch"] - 1]["val_balanced_accuracy"]) == pytest.approx(wanted)
    empty = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 2]])  # a class without images does not count
    assert train.balanced_accuracy(empty) == pytest.approx((3 / 4 + 1) / 2)


@pytest.mark.parametrize(("best_by", "epoch"), [("accuracy", 1), ("balanced", 2), ("loss", 3)])
def test_the_best_epoch_is_chosen_by_what_was_asked_for(best_by, epoch, uneven, monkeypatch):
    epochs = iter(
        [
            (0.9, 0.8, [[10, 0, 0], [1, 0, 0], [1, 0, 2]]),
            (0.8, 0.7, [[6, 4, 0], [0, 1, 0], [0, 0, 3]]),
            (0.2, 0.6, [[4, 6, 0], [0, 1, 0], [0, 3, 0]]),
        ]
    )

    def judged(model, batches, confusion):
        loss, accuracy, counts = next(epochs)
        confusion += torch.tensor(counts)
        return loss, accuracy

    monkeypatch.setattr(train, "evaluate", judged)
    result = train.train(Config(epochs=3, best_by=best_by, **uneven))
    assert result["best_epoch"] == epoch
    config = json.loads((uneven["out"] / "config.json").read_text())
    assert config["best_by"] == best_by
