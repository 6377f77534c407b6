"""predict.py's tables: --csv, --submission, several adapters, mirror images."""

import csv
import json

import numpy as np
import pytest
import torch
from adapters import write_adapter
from trees import write_image

import data
import predict
import vit
from engine.images import Split

NAMES, CLASSES = ["0007", "a.b", "x"], ["cat", "cow", "dog"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three images, one of them in a subfolder, beside adapters of three folds and one of other classes."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(NAMES):
        write_image(tmp_path / "test" / ("sub" if i == 2 else "") / f"{name}.jpg", i, i, (60, 60))
    for i, case in enumerate(("lora", "loha", "lokr")):
        write_adapter(f"{i}.safetensors", case, classes=CLASSES)
    write_adapter("two.safetensors", "lora", classes=["0", "1"])
    return ["test/0007.jpg", "test/a.b.jpg", "test/sub/x.jpg"]


def probabilities(files, adapter="0.safetensors", flip=False):
    model, info = vit.load_adapter(adapter)
    split = Split(np.zeros(len(files), np.int64), files)
    images, _ = next(data.batches(split, len(files), info["preprocessing"], workers=0))
    with torch.no_grad():
        return model(images.flip(-1) if flip else images).softmax(-1)


def rows_of(path):
    with open(path, newline="") as file:
        return [*csv.reader(file)]


def sample(text):
    with open("sample.csv", "w") as file:
        file.write(text)


def test_csv_has_file_class_and_probabilities(photos, capsys):
    assert predict.main(["0.safetensors", "test", "--csv", "a.csv"]) == 0
    assert capsys.readouterr().out == "a.csv: 3 images\n"
    wanted = probabilities(photos)
    head, *rows = rows_of("a.csv")
    assert head == ["file", "class", "probability"]
    for row, file, p in zip(rows, photos, wanted, strict=True):
        assert row[:2] == [file, CLASSES[p.argmax()]]
        assert float(row[2]) == pytest.approx(p.max().item(), abs=2e-6)
    assert predict.main(["0.safetensors", "test", "--csv", "b.csv", "--probabilities"]) == 0
    head, *rows = rows_of("b.csv")
    assert head[3:] == CLASSES
    found = torch.tensor([[float(x) for x in row[3:]] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_several_adapters_and_mirrors_average_their_probabilities(photos, capsys):
    paths = [f"{i}.safetensors" for i in range(3)]
    assert predict.main([*paths, "test", "--flip", "--json"]) == 0
    parts = [probabilities(photos, path, flip) for path in paths for flip in (False, True)]
    wanted = torch.stack(parts).mean(0)
    for line, p in zip(capsys.readouterr().out.splitlines(), wanted, strict=True):
        guesses = {g["class"]: g["probability"] for g in json.loads(line)["predictions"]}
        assert [guesses[name] for name in CLASSES] == pytest.approx(p.tolist(), abs=1e-5)
    assert (parts[0] - wanted).abs().max() > 1e-3, "the control: one alone says something else"


@pytest.mark.parametrize(
    ("adapter", "text", "cells"),
    [
        ("0", "id,label\nx,cat\n0007,cat\na.b,cat\n", "class"),
        ("0", "id,label\nx.jpg,0\n0007.jpg,0\na.b.jpg,0\n", "class"),
        ("0", "id,{1},{0},{2}\nsub/x,0,0,0\n0007,0,0,0\na.b,0,0,0\n", "matrix"),
        ("0", "id,label\nx,a b\n0007,a b\na.b,a b\n", "two"),
        ("two", "id,is_ship\nx,0.5\n0007,0.5\na.b,0.5\n", "probability"),
        ("two", "id,target\nx,0\n0007,0\na.b,0\n", "class"),
        ("two", "id,target\nx,0\n0007,0\na.b,0\n", "forced"),
        ("two", "id,target\nx,a\n0007,a\na.b,a\n", "forced"),
        ("0", "id,label\nx,\n0007,\na.b,\n", "class"),
    ],
)
def test_a_submission_is_like_its_sample(adapter, text, cells, photos, capsys):
    sample("\ufeff" + text.format(*CLASSES))
    flags = ["--probabilities"] if cells == "forced" else []
    command = [f"{adapter}.safetensors", "test", "--submission", "sample.csv", *flags]
    assert predict.main(command) == 0, capsys.readouterr().err
    (head, *rows), (sample_head, *samples) = (
        rows_of("submission.csv"),
        text.format(*CLASSES).split(),
    )
    assert ",".join(head) == sample_head
    assert [row[0] for row in rows] == [row.split(",")[0] for row in samples if "," in row]
    wanted = probabilities([photos[2], photos[0], photos[1]], f"{adapter}.safetensors")
    names = CLASSES if adapter == "0" else ["0", "1"]
    for row, p in zip(rows, wanted, strict=True):
        if cells == "class":
            assert row[1:] == [names[p.argmax()]]
        elif cells == "two":
            assert row[1:] == [" ".join(names[i] for i in p.argsort(descending=True)[:2])]
        elif cells == "matrix":
            assert [float(x) for x in row[1:]] == pytest.approx(p[[1, 0, 2]].tolist(), abs=2e-6)
        else:
            assert float(row[1]) == pytest.approx(p[1].item(), abs=2e-6)


def test_an_image_that_is_missing_is_named_and_its_row_stays(photos, capsys):
    sample("id,label\nx,cat\nlost,cat\n")
    assert predict.main("0.safetensors test --submission sample.csv --csv out.csv".split()) == 1
    assert "sample.csv: lost: no image, its row stays as it is" in capsys.readouterr().err
    assert [row[0] for row in rows_of("out.csv")] == ["id", "x", "lost"]
    assert rows_of("out.csv")[2] == ["lost", "cat"]


@pytest.mark.parametrize(
    ("text", "command", "message"),
    [
        (
            "id,label\nq,0\n",
            "0.safetensors test --submission sample.csv",
            "expected ids of the images",
        ),
        (
            "id\nx\n",
            "0.safetensors test --submission sample.csv",
            "expected rows of ids and of answers",
        ),
        (
            "id,a,b\nx,0,0\n",
            "0.safetensors test --submission sample.csv",
            "a column for each class",
        ),
        ("id,p\nx,0.5\n", "0.safetensors test --submission sample.csv", "asks for one probability"),
        ("", "0.safetensors two.safetensors test", "two.safetensors: classes: expected those of 0"),
        ("", "0.safetensors 1.safetensors", "expected images after the adapters"),
        ("", "0.safetensors test --csv no/a.csv", "--csv no/a.csv: no is not a folder"),
        (
            "id,label\nx,0\n",
            "0.safetensors test copy --submission sample.csv",
            "x: expected one image",
        ),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    text, command, message, photos, tmp_path, capsys
):
    sample(text)
    if "copy" in command:
        write_image(tmp_path / "copy" / "x.png", 1, 1, (60, 60))
    assert predict.main(command.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not [*tmp_path.glob("*submission.csv"), *tmp_path.glob("a.csv")]
