"""The notebooks: what notebooks.py writes, run from start to finish in an empty folder, without network."""

import ast
import base64
import io
import json
import re
import sys
import zlib
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image
from torchvision import models
from trees import food101, pets, tiny_imagenet, write_image

from engine import notebooks
from engine.config import FREE, Config, check

CHOICE = "config, _, _ = begin(Config(**settings))"  # in the cell that decides what trains
TRAINING = "run = train(config.adapter)"  # in the cell that does
SUBMISSION = "--submission {sample}"
AFTERWARDS = """
import json
import time
import urllib.request

from tensorboard import manager

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
late, runs = time.monotonic() + 200, []
while not {"digits-lora", "digits-lokr"} <= set(runs) and time.monotonic() < late:  # it may still read
    time.sleep(1)
    for server in manager.get_all():  # it ends with the kernel
        runs = json.load(opener.open(f"http://127.0.0.1:{server.port}/data/runs", timeout=100))
print(json.dumps([[module.__file__ for module in (vit, data, pictures)], runs]))
"""


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run a notebook's cells, up to the one that holds a text, in an empty folder: (folder, cells).

    change: texts to replace. more: a cell to run after all others.
    """
    names = "TMPDIR TORCH_HOME HF_HOME IPYTHONDIR JUPYTER_RUNTIME_DIR JUPYTER_DATA_DIR"
    for name in names.split():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the same on every machine
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(name, up_to=None, change=None, more=None, folder="empty"):
        notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
        if up_to:
            last = next(i for i, cell in enumerate(notebook.cells) if up_to in cell.source)
            del notebook.cells[last + 1 :]
        for old, new in (change or {}).items():
            cell = next(cell for cell in notebook.cells if old in cell.source)
            cell.source = cell.source.replace(old, new)
        if more:
            notebook.cells.append(nbformat.v4.new_code_cell(more))
        (tmp_path / folder).mkdir()
        where = {"metadata": {"path": str(tmp_path / folder)}}
        limits = {"timeout": 600, "startup_timeout": 300}
        NotebookClient(notebook, resources=where, kernel_name="python3", **limits).execute()
        nbformat.write(notebook, tmp_path / f"{folder}.ipynb")
        return tmp_path / folder, notebook.cells

    return run


def said(cells, stream="stdout") -> str:
    """All that the cells printed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join(
        output["text"]
        for output in outputs
        if output.output_type == "stream" and output.name == stream
    )


def pictures(cells) -> list[Image.Image]:
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    coded = [d[kind] for d in data for kind in ("image/png", "image/jpeg") if kind in d]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in coded]


def kept(folder, tmp_path) -> list[str]:
    """The files that a session leaves, of which Kaggle keeps about the first 500. The executed notebook can
    be saved there, too."""
    assert (tmp_path / f"{folder.name}.ipynb").stat().st_size < 1_000_000
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert len(files) < 50
    return files


@pytest.mark.parametrize("name", ["kaggle", "paste", "minimal"])
def test_notebooks_py_writes_what_is_committed(name, tmp_path):
    notebooks.main(tmp_path)
    written, committed = tmp_path / f"{name}.ipynb", ROOT / f"{name}.ipynb"
    same = written.read_bytes() == committed.read_bytes()  # no diff of a megabyte, please
    assert same, f"{name}.ipynb is not of these modules: run python -m engine.notebooks"
    assert committed.stat().st_size <= notebooks.LARGEST
    notebook = nbformat.read(committed, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_settings_that_the_page_and_the_notebook_show_are_flags():
    texts = [(ROOT / name).read_text("utf-8") for name in ("docs/kaggle.md", "kaggle.ipynb")]
    shown = [re.findall(r"SETTINGS = (\{.*?\})", text.replace('\\"', '"')) for text in texts]
    assert [len(found) for found in shown] == [9, 5]
    for settings in (ast.literal_eval(text) for found in shown for text in found):
        check(Config(**{"recipe": "tiny-imagenet-lora"} | settings))
        assert not {"out", "resume"} & set(settings)


def test_paste_holds_two_files_and_nothing_else_of_the_project():
    notebook = nbformat.read(ROOT / "paste.ipynb", as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    pasted = [(ROOT / name).read_text("utf-8").strip("\n") for name in ("lora.py", "attention.py")]
    assert cells[:2] == pasted
    modules = {path.stem for path in ROOT.glob("*.py")}
    for cell in cells:
        imported = re.findall(r"^\s*(?:from|import) (\w+)", cell, re.M)
        assert not modules & set(imported)
        assert not re.search(r"^[%!]", cell, re.M), "a cell runs what is not in it"


@pytest.mark.slow
def test_paste_runs_from_start_to_finish(execute):
    folder, cells = execute("paste")
    text = said(cells)
    assert "random weights" in text, "the network was reached"
    lora = 12 * (4 * 4 * (768 + 768) + 2 * 4 * (768 + 3072)) + 768 * 3 + 3
    assert re.search(rf"^72 layers adapted, .*\n{lora:,} of 86,", text, re.M)
    first, last = re.search(r"first three (\S+), of the last three (\S+)\n", text).groups()
    assert float(last) < 0.5 * float(first)
    assert "<All keys matched successfully>" in text
    logits, difference = re.search(r"logits up to (\S+), largest difference (\S+)\n", text).groups()
    assert float(difference) < 1e-4 < 0.1 < float(logits)
    assert text.endswith("24 layers adapted\n")
    warning = said(cells, "stderr")
    assert warning.count("call split_attention(model) of attention.py") == 1
    assert not list(folder.iterdir()), "nothing is left behind"


def test_minimal_is_three_files_and_where_the_images_are():
    cells = [cell.source for cell in nbformat.read(ROOT / "minimal.ipynb", as_version=4).cells]
    names = ("lora.py", "attention.py", "minimal.py")
    lora, attention, minimal = ((ROOT / name).read_text("utf-8").strip("\n") for name in names)
    assert cells[1:3] == [lora, attention] and len(cells) == 4
    pairs = zip(cells[3].splitlines(), minimal.splitlines(), strict=True)
    ((new, old),) = [pair for pair in pairs if pair[0] != pair[1]]
    assert old.startswith("DATA = None ")
    assert re.match(r'DATA = "/kaggle/input/[\w/-]+"  # a folder with train/<class>/', new)


@pytest.mark.slow
def test_minimal_trains_vit_b_16_on_class_folders(execute, tmp_path, tmp_path_factory, monkeypatch):
    """From the pretrained weights' file, though its weights are random; for two epochs."""
    images = pets(tmp_path / "pets" / "train", images=6)
    checkpoints = tmp_path / "TORCH_HOME" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(models.vit_b_16().state_dict(), checkpoints / "vit_b_16-c867db91.pth")
    change = {
        '"/kaggle/input/tiny-imagenet/tiny-imagenet-200"': repr(str(images.parent)),
        "SEED, EPOCHS, BATCH": "SEED, _, BATCH",
        "ASSETS = ": "EPOCHS = 2\nASSETS = ",
    }
    # Worker processes send tensors through a socket in TMPDIR, whose path may have 107 bytes. With a longer
    # one they wait forever.
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t")))
    folder, cells = execute("minimal", change=change)
    text = said(cells)
    assert "every tenth training image validates" in text
    assert re.search(r"of 86,\d+,\d+ parameters train", text) and "step 2 of 2: loss" in text
    assert re.search(r"\nValidation Accuracy: [\d.]+%\n$", text)
    assert [path.name for path in folder.iterdir()] == ["runs"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_kaggle_runs_from_start_to_finish_with_nothing_attached(execute, tmp_path):
    """All of it, torchrun with two processes and TensorBoard's server included."""
    folder, cells = execute("kaggle", more=AFTERWARDS)
    names = kept(folder, tmp_path)
    assert names[0] == "adapters/digits-lokr/adapter.safetensors" and len(names) == 16
    assert {name.split("/")[0] for name in names} == {"adapters"}
    code = tmp_path / "TMPDIR" / "vit-adapters"
    for name in (*notebooks.MODULES, *notebooks.PACKED):
        assert (code / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    modules, runs = json.loads(said(cells[-1:]))
    assert modules == [str(code / f"{name}.py") for name in ("vit", "data", "engine/pictures")]
    assert set(runs) == {"digits-lora", "digits-lokr"}, "TensorBoard's server knows the runs"
    text = said(cells)
    assert re.search(
        r"^Python 3\.\S+, torch \S+, torchvision \S+, \d+ CPU cores\nGPUs: none\n", text, re.M
    )
    assert "WITHOUT A GPU only the digits train in minutes." in text and "NO GPU" not in text
    assert "400 images train, 200 validate\n10 classes: eight, five" in text
    assert "lora: 28,938 of 645,258 parameters train (4.48%)\n" in text
    for adapter, least, most in (("lora", 72, 92), ("lokr", 68, 92)):
        found = re.search(rf"digits-{adapter}: finished, best validation accuracy (\S+)%", text)
        assert least < float(found[1]) < most
    guesses = re.findall(r"digits/val/(\w+)/\d+\.png: (\w+) [\d.]+%", text)
    assert len(guesses) == 8 and sum(true == guess for true, guess in guesses) >= 5
    assert [picture.width > 500 for picture in pictures(cells)] == [True] * 3
    parallel = next(cell for cell in cells if "launch(2, " in cell.source)
    assert "epoch 1/1" in said([parallel]) and "Validation Accuracy" in said([parallel])


@pytest.mark.slow
def test_kaggle_takes_tiny_imagenet_and_goes_on_with_an_earlier_run(execute, tmp_path):
    """The first session ends after a step, by HOURS; the second one, in which the weights are at another
    place, ends the run; and the third one has nothing left to do."""
    tiny_imagenet(tmp_path / "input" / "tinyimagenet" / "tiny-imagenet-200", classes=4)
    small = {"weights": "none", "image_size": 32, "limit": 8, "batch_size": 4, "epochs": 1}
    change = {
        'INPUT = "/kaggle/input"': f"INPUT = {str(tmp_path / 'input')!r}",
        "SETTINGS = {}": f"SETTINGS = {small | {'workers': 0, 'amp': 'off'}}",
    }
    hours = {"HOURS = 11.0": "HOURS = 0.0"}
    folder, cells = execute("kaggle", up_to="Other adapters", change=change | hours)
    text = said(cells)
    assert f"attached: {tmp_path / 'input' / 'tinyimagenet'}\n" in text
    assert "8 images train, 4 validate\n4 classes: thing 0" in text
    assert "NO GPU: on a CPU this takes about 0.0 hours" in text
    lora = 12 * (4 * 4 * (768 + 768) + 2 * 4 * (768 + 3072)) + 768 * 4 + 4
    assert text.count(f"lora: {lora:,} of ") == 2, "told before the run, and by it"
    assert "stopped by --max-hours 0.0001 after step 1; last.pt is at step 1; resume with" in text
    assert "predictions.png: comes at the end of training" in text
    named = "tiny-imagenet-lora-weights-none-image_size-32-limit-8-batch_size-4-epochs-1-amp-off"
    config = json.loads((folder / "adapters" / named / "config.json").read_text())
    assert config["dataset"] == "tiny-imagenet" and config["head_dropout"] == 0.1
    for session, expected in (
        ("second", "resumes after step 1 of 2"),
        ("third", "finished already"),
    ):
        folder.rename(tmp_path / "input" / f"before the {session}")
        folder, cells = execute("kaggle", up_to=TRAINING, change=change, folder=session)
        assert expected in said(cells[-1:])


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, "photos-lora"),
        ({"data_dir": "a/photos", "dataset": "folder", "workers": 2}, "photos-lora"),
        ({"recipe": "photos", "lr": 1e-3}, "photos-lora-lr-0.001"),
        ({"weights": None}, "photos-lora"),
        ({"weights": "/kaggle/input/dinov2-small"}, "photos-lora-weights-dinov2-small"),
        ({"weights": "/kaggle/input/datasets/me/dinov2"}, "photos-lora-weights-dinov2"),
        (
            {"weights": "/kaggle/input/models/google/vit/pytorch/base/1"},
            "photos-lora-weights-vit-pytorch-base-1",
        ),
        ({"recipe": "food101-lokr"}, "photos-lora-recipe-food101-lokr"),
        ({"classes": "some dish," * 40}, "photos-lora-classes(-some-dish)+-s?o?m?-?[0-9a-f]{8}"),
        ({"classes": "餃子" * 40}, "photos-lora-classes-[餃子]+-[0-9a-f]{8}"),
    ],
)
def test_a_run_of_kaggle_is_named_after_the_settings_that_make_it_another(settings, wanted):
    cells = nbformat.read(ROOT / "kaggle.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if "def folder_of" in cell.source]
    (function,) = [x for x in ast.parse(source).body if getattr(x, "name", "") == "folder_of"]
    names = {"SETTINGS": settings, "FREE": FREE, "title": "photos", "KEEP": Path("adapters")}
    names |= {"re": re, "zlib": zlib, "INPUT": "/kaggle/input", "found": lambda *_: None}
    exec(ast.unparse(function), names)
    name = names["folder_of"]("lora").name
    assert re.fullmatch(wanted, name) and len(name.encode()) <= 255


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_kaggle_takes_a_competition_and_writes_its_submission(execute, tmp_path):
    """As with two GPUs, by torchrun."""
    root = tmp_path / "input" / "competitions" / "leaves"
    labels = {f"{i}.jpg": ("good", "bad")[i % 2] for i in range(20)}
    for i, name in enumerate(labels):
        write_image(root / "train_images" / name, i % 2, i, (160, 120))
        write_image(root / "test_images" / f"t{i}.jpg", i % 2, 100 + i, (160, 120))
    rows = [f"{name},{label}" for name, label in labels.items()]
    (root / "train.csv").write_text("\n".join(["image_id,label", *rows]))
    rows = [f"t{i}.jpg,good" for i in range(20)]
    (root / "sample_submission.csv").write_text("\n".join(["image_id,label", *rows]))
    small = {"weights": "none", "image_size": 32, "batch_size": 8, "epochs": 4}
    change = {
        'INPUT = "/kaggle/input"': f"INPUT = {str(tmp_path / 'input')!r}",
        "SETTINGS = {}": f"SETTINGS = {small | {'workers': 0, 'amp': 'off'}}",
        "HOURS = 11.0": "HOURS, gpus = 11.0, 2",
    }
    folder, cells = execute("kaggle", up_to=SUBMISSION, change=change)
    names = kept(folder, tmp_path)
    assert (
        names[0].startswith("adapters/leaves-lora-weights-none-image")
        and names[-1] == "submission.csv"
    )
    assert len(names) == 9, "nothing but the run and the submission"
    training = said([cell for cell in cells if TRAINING in cell.source])
    assert "16 images" in training and training.count("epoch 4/4: train loss") == 1, (
        "two processes, one talks"
    )
    answers = (folder / "submission.csv").read_text().splitlines()
    assert answers[0] == "image_id,label" and len(answers) == 21
    right = [line.split(",")[1] == ("good", "bad")[i % 2] for i, line in enumerate(answers[1:])]
    assert sum(right) >= 15


@pytest.mark.slow
@pytest.mark.parametrize("case", ["food41", "weights", "own", "csv"])
def test_kaggle_takes_what_is_attached_or_set(case, execute, tmp_path):
    """Food-101; Tiny-ImageNet, with torchvision's weights beside it; or images that SETTINGS names, in class
    folders or with a table."""
    root = tmp_path / "input" / "datasets" / "somebody"
    change = {'INPUT = "/kaggle/input"': f"INPUT = {str(tmp_path / 'input')!r}"}
    if case == "food41":
        food101(root / "food41", kaggle=True)
        expected = {"recipe": "food101-lora", "data_dir": str(root / "food41")}
    elif case == "weights":
        tiny_imagenet(root / "tiny-imagenet-200", classes=2)
        expected = {"recipe": "tiny-imagenet-lora", "data_dir": str(root / "tiny-imagenet-200")}
        expected["weights"] = str(root / "vit_b_16-c867db91.pth")
        Path(expected["weights"]).touch()
    else:
        expected = {"dataset": "folder" if case == "own" else "csv"}
        expected["data_dir"] = str(pets(tmp_path / "pets"))
        change["SETTINGS = {}"] = f"SETTINGS = {expected}"
        expected = {"recipe": "tiny-imagenet-lora", **expected}
    _, cells = execute("kaggle", up_to=CHOICE, change=change)
    expected["cache_dir"] = str(tmp_path / "TMPDIR" / "cache")
    assert said(cells[-1:]).splitlines()[-1] == str(expected)
