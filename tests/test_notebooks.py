"""The notebooks: what notebooks.py writes, run from start to finish in an empty folder, without network."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from PIL import Image
from trees import food101, pets, tiny_imagenet

from engine import notebooks

CHOICE = "config, _, _ = begin(Config(**settings))"  # in the cell that decides what trains
TRAINING = "Config(**settings, out=run"  # in the cell that does
AFTERWARDS = """
import json
import time
import urllib.request

from tensorboard import manager

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
late, runs = time.monotonic() + 200, []
while not {"demo-lora", "demo-lokr"} <= set(runs) and time.monotonic() < late:  # it may still read
    time.sleep(1)
    for server in manager.get_all():  # it ends with the kernel
        runs = json.load(opener.open(f"http://127.0.0.1:{server.port}/data/runs", timeout=100))
print(json.dumps([n, [module.__file__ for module in (train, vit, predict)], runs]))
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
    coded = [d["image/png"] for d in data if "image/png" in d]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in coded]


@pytest.mark.parametrize("name", ["kaggle", "paste"])
def test_notebooks_py_writes_what_is_committed(name, tmp_path):
    notebooks.main(tmp_path)
    written, committed = tmp_path / f"{name}.ipynb", ROOT / f"{name}.ipynb"
    same = written.read_bytes() == committed.read_bytes()  # no diff of a megabyte, please
    assert same, f"{name}.ipynb is not of these modules: run python -m engine.notebooks"
    assert committed.stat().st_size <= notebooks.LARGEST
    notebook = nbformat.read(committed, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_kaggle_runs_from_start_to_finish_with_nothing_attached(execute):
    """All of it, torchrun with two processes and TensorBoard's server included."""
    folder, cells = execute("kaggle", more=AFTERWARDS)
    code = folder / "vit-adapters"
    assert {path.name for path in folder.iterdir()} == {code.name}
    for name in (*notebooks.MODULES, *notebooks.PACKED):
        assert (code / f"{name}.py").read_bytes() == (ROOT / f"{name}.py").read_bytes()
    processes, modules, runs = json.loads(said(cells[-1:]))
    assert processes == 2
    assert modules == [str(code / f"{name}.py") for name in ("train", "vit", "predict")]
    assert {"demo-lora", "demo-lokr"} <= set(runs), "TensorBoard's server knows the runs"
    text = said(cells)
    assert "400 images train, 200 validate\n10 classes: eight, five" in text
    assert "lora: 56,586 of 1,267,722 parameters train (4.46%)\n" in text
    for adapter, least, most in (("lora: 56,586", 60, 96), ("lokr: 9,738", 68, 92)):
        found = re.search(rf"{adapter} trained, validation accuracy (\S+)%", text)
        assert least < float(found[1]) < most
    guesses = re.findall(r"digits/val/(\w+)/\d+\.png: (\w+) [\d.]+%\n", text)
    assert len(guesses) == 8 and sum(true == guess for true, guess in guesses) >= 5
    assert [picture.width > 500 for picture in pictures(cells)] == [True] * 3
    parallel = next(cell for cell in cells if "torch.distributed.run" in cell.source)
    assert "epoch 1/1" in said([parallel]) and "Validation Accuracy" in said([parallel])


@pytest.mark.slow
def test_kaggle_takes_tiny_imagenet_and_goes_on_with_an_earlier_run(execute, tmp_path):
    tiny_imagenet(tmp_path / "input" / "tinyimagenet" / "tiny-imagenet-200", classes=4)
    small = {"weights": "none", "image_size": 32, "limit": 8, "batch_size": 4, "epochs": 1}
    change = {
        'INPUT = "/kaggle/input"': f"INPUT = {str(tmp_path / 'input')!r}",
        "SETTINGS = {}": f"SETTINGS = {small | {'workers': 0, 'amp': 'off'}}",
    }
    folder, cells = execute("kaggle", up_to=TRAINING, change=change)
    text = said(cells)
    assert "8 images train, 4 validate\n4 classes: thing 0" in text
    lora = 12 * (4 * 4 * (768 + 768) + 2 * 4 * (768 + 3072)) + 768 * 4 + 4
    assert text.count(f"lora: {lora:,} of ") == 2, "told before the run, and by it"
    named = "tiny-imagenet-lora-lora-image_size-32-limit-8-batch_size-4-epochs-1-amp-off"
    config = json.loads((folder / "vit-adapters" / "runs" / named / "config.json").read_text())
    assert config["dataset"] == "tiny-imagenet" and config["head_dropout"] == 0.1
    folder.rename(tmp_path / "input" / "an earlier session")
    folder, cells = execute("kaggle", up_to=TRAINING, change=change, folder="later")
    assert "finished already" in said(cells[-1:])


@pytest.mark.parametrize("case", ["food41", "weights", "own"])
def test_kaggle_takes_what_is_attached_or_set(case, execute, tmp_path):
    """Food-101; Tiny-ImageNet, with torchvision's weights beside it; or images that SETTINGS names."""
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
        expected = {"recipe": "tiny-imagenet-lora", "dataset": "folder"}
        expected["data_dir"] = str(pets(tmp_path / "pets"))
        change["SETTINGS = {}"] = f"SETTINGS = {expected}"
    _, cells = execute("kaggle", up_to=CHOICE, change=change)
    expected["cache_dir"] = str(tmp_path / "TMPDIR" / "cache")
    assert said(cells[-1:]).splitlines()[-1] == str(expected)
