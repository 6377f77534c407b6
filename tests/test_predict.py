"""predict.py as a user runs it, compared with the evaluation of training."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import CLASSES, write_adapter
from conftest import LIMIT, ROOT
from PIL import Image
from safetensors.torch import save_file
from test_export import peft_trained
from trees import write_image

import data
import export
import predict
import vit
from engine.images import Split


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The sorted names of seven images of different kinds, beside an adapter file."""
    monkeypatch.chdir(tmp_path)
    write_adapter("a.safetensors", "lokr")
    for i in range(4):
        write_image(tmp_path / "photos" / f"{i}.jpg", i, i, (90 + 20 * i, 120))
    write_image(tmp_path / "photos" / "sub" / "turned.JPG", 2, 9, (120, 80), orientation=6)
    write_image(tmp_path / "photos" / "grey.jpeg", 4, 2, (50, 50), grey=True)
    clear = Image.linear_gradient("L").resize((60, 40)).convert("RGBA")
    clear.save(tmp_path / "photos" / "clear.png")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    names = [*(f"{i}.jpg" for i in range(4)), "clear.png", "grey.jpeg", "sub/turned.JPG"]
    return [f"photos/{name}" for name in names]


def probabilities(files):
    """The probabilities that training's evaluation gives the files: (files, classes)."""
    model, info = vit.load_adapter("a.safetensors")
    split = Split(np.zeros(len(files), np.int64), files)
    images, _ = next(data.batches(split, len(files), info["preprocessing"], workers=0))
    with torch.no_grad():
        return model(images).softmax(-1)


def test_one_image_prints_its_class_and_the_top(photos, run_script):
    process = run_script("predict.py", "a.safetensors", photos[4])
    assert process.returncode == 0, process.stderr
    (wanted,) = probabilities([photos[4]])
    order = wanted.argsort(descending=True)
    assert process.stdout.splitlines() == [
        f"Predicted class: {CLASSES[order[0]]}",
        *(f"{wanted[i].item():8.2%}  {CLASSES[i]}" for i in order),
    ]
    assert process.stderr == ""


def test_a_peft_folder_is_as_good_as_the_adapter_file(photos, capsys):
    """Its own folder, and one that PEFT trained: the class that PEFT's model says."""
    said = {}
    export.to_peft("a.safetensors", "written")
    for path in ("a.safetensors", "written"):
        assert predict.main([path, "photos", "--json"]) == 0
        said[path] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(said["written"]) == 7 and said["written"] == said["a.safetensors"]
    theirs = peft_trained("loha", Path())
    assert predict.main(["folder", photos[0]]) == 0
    lines = capsys.readouterr().out.splitlines()
    images = {"image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
    split = Split(np.zeros(1, np.int64), photos[:1])
    pixels, _ = next(data.batches(split, 1, images, workers=0))
    with torch.no_grad():
        wanted = theirs(pixels).logits.softmax(-1)[0]
    for i, p in enumerate(wanted.tolist()):
        assert f"{p:8.2%}  LABEL_{i}" in lines
    (Path("folder") / "adapter_config.json").write_text("{}")
    assert predict.main(["folder", photos[0]]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid.lora_up.weight", "a file for image generators, see docs/other-tools.md"),
        ("base_model.model.q.lora_A.weight", "name the folder, with its adapter_config.json"),
    ],
)
def test_a_file_of_another_tool_is_named(key, message, photos, capsys):
    save_file({key: torch.zeros(1)}, "other.safetensors", {"format": "pt"})
    assert predict.main(["other.safetensors", "photos"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_class_names_that_are_damaged_are_refused(photos, capsys):
    export.to_peft("a.safetensors", "folder")
    file = Path("folder", "id2label.json")
    file.write_text(file.read_text().replace('"1"', '"3"'))
    assert predict.main(["folder", "photos"]) == 2
    assert "id2label: expected names for 0 to 2" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["", "--batch-size 3", "--batch-size 2 --workers 2"])
def test_a_folder_is_predicted_as_in_evaluation_for_any_batch_size(flags, photos, capsys):
    assert predict.main(["a.safetensors", "photos", "--json", *flags.split()]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == photos
    wanted = probabilities(photos)
    assert len({tuple(p.tolist()) for p in wanted}) == 7, (
        "equal images would not show a wrong order"
    )
    for row, p in zip(rows, wanted, strict=True):
        guesses = {guess["class"]: guess["probability"] for guess in row["predictions"]}
        assert [guesses[name] for name in CLASSES] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["predictions"][0]["class"] == CLASSES[p.argmax()]


def test_several_images_print_one_line_each(photos, capsys):
    assert predict.main(["a.safetensors", *photos[:2], "--top", "1"]) == 0
    wanted = probabilities(photos[:2])
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: {CLASSES[p.argmax()]} {p.max().item():.2%}"
        for file, p in zip(photos, wanted, strict=False)
    ]


@pytest.mark.parametrize("flags", ["", "--batch-size 2", "--batch-size 1 --workers 1"])
def test_unreadable_images_are_named_and_left_out(flags, photos, tmp_path, capsys):
    broken = tmp_path / photos[1]
    broken.write_bytes(broken.read_bytes()[:700])
    (tmp_path / "photos" / "text.png").write_text("no image")
    assert predict.main(["a.safetensors", "photos", *flags.split()]) == 1
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.out.splitlines()] == [photos[0], *photos[2:]]
    first, second = shown.err.splitlines()
    assert first.startswith(f"predict.py: {photos[1]}: cannot be read")
    assert second == "predict.py: photos/text.png: cannot be read (not an image)"
    assert predict.main(["a.safetensors", photos[1]]) == 1


def test_contact_sheets_are_drawn(photos, tmp_path, capsys):
    for name, images in (("all.png", ["photos"]), ("one.png", photos[:1])):
        assert predict.main(["a.safetensors", *images, "--figure", name]) == 0
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("a.safetensors nowhere.jpg", "nowhere.jpg: no such file or folder"),
        ("a.safetensors empty", "empty: expected images (.jpg"),
        ("nothing.safetensors photos", "nothing.safetensors: no such adapter file"),
        ("photos/0.jpg photos", "photos/0.jpg: not a file of tensors"),
        ("a.safetensors photos --device cuda:99", "--device cuda:99: cannot be used"),
        ("a.safetensors photos --top 0", "--top 0: expected >= 1"),
        ("a.safetensors photos --batch-size 0", "--batch-size 0: expected >= 1"),
        (
            "a.safetensors photos --figure no/x.png",
            "--figure no/x.png: no is not a folder; make it first",
        ),
        (
            "a.safetensors photos --figure x.foo",
            "--figure x.foo: expected a name that ends in .",
        ),
        ("a.safetensors", "the following arguments are required: images; see --help"),
        (
            "a.safetensors photos --probabilities",
            "--probabilities: only with --csv or --submission",
        ),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(flags, message, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict.main(flags.split()) == 2
    shown = capsys.readouterr()
    error = shown.err.strip()
    assert error.startswith("predict.py: ") and message in error and "\n" not in error
    assert not shown.out, "the mistake is found before anything is predicted"


def test_what_only_a_busy_machine_shows_gives_one_line_too(photos, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", "/" + 70 * "t")  # worker processes would wait forever
    assert predict.main(["a.safetensors", "photos", "--workers", "1"]) == 2
    assert re.fullmatch(r"predict.py: TMPDIR /t+: .* --workers 0\n", capsys.readouterr().err)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predict, "readable", full)
    assert predict.main(["a.safetensors", "photos"]) == 2
    error = capsys.readouterr().err
    assert error == "predict.py: out of memory; try a smaller --batch-size, or --device cpu\n"


def test_a_closed_pipe_is_not_a_mistake(photos, start):
    """As in predict.py ... | head -n 1."""
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}  # the pipe is written only at the end
    process = start([sys.executable, ROOT / "predict.py", "a.safetensors", "photos"], env=buffered)
    process.stdout.close()
    assert process.wait(LIMIT) == 1
    assert not process.stderr.read()


def test_a_file_name_that_is_not_utf_8_is_printed_unchanged(photos, start):
    name = os.fsdecode(b"caf\xe9.jpg")
    os.rename("photos/0.jpg", name)
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, ROOT / "predict.py", "a.safetensors", "photos", name]
    process = start([*command, "--figure", "x.png"], env=strict, text=False)
    output, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error
    assert b"caf\xe9.jpg" in output and os.path.getsize("x.png") > 5000
