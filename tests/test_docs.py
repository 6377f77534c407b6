"""README and docs/: each command and each block of Python runs; each figure, name and link is true."""

import json
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from families import FAMILIES
from sdxl import toy_sdxl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_compare import launch
from test_tables import write_competition
from torch import nn
from trees import fashion_mnist, food101, pets, tiny_imagenet, write_image

import compare
import data
import export
import lora
import minimal
import predict
import spectra
import train
import vit
from engine import checkpoint, config_sdxl, pictures, report, weights
from engine.adapt import ADAPT, ADAPTERS, adapt
from engine.config import FREE, RECIPES, Config, flag, parse

PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXTS = {name: path.read_text("utf-8") for name, path in PAGES.items()}
README = TEXTS["README.md"]
ALL = "\n".join(TEXTS.values())
CODE = {name: re.findall(r"```python\n(.*?)```", text, re.S) for name, text in TEXTS.items()}
PYTHON = [block for blocks in CODE.values() for block in blocks]
SHELL = [
    line
    for block in re.findall(r"```sh\n(.*?)```", ALL, re.S)
    for line in block.replace("\\\n", "").splitlines()
]


SMALL = "--limit 4 --epochs 1 --batch-size 1 --workers 0".split()


def arguments(line):
    """What follows the script's name in a line."""
    words = shlex.split(line, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def execute(page, changes=()):
    """Run a page's blocks of Python one after another; return the names that they define."""
    code, names = "\n".join(CODE[page]), {}
    for old, new in changes:
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, names)
    return names


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run, photos and a competition, as the pages' commands name them."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            write_image(tmp_path / "photos" / name / f"{i}.jpg", label, i, (160, 120))
    write_image(tmp_path / "photo.jpg", 0, 1)
    write_competition(tmp_path / "cassava", "cassava")
    train.train(Config(limit=20, epochs=1, out="runs/x"))
    return tmp_path / "runs"


def test_each_command_has_its_test():
    """pip's lines: .ci/run takes the second, and test_train runs what the first does. test_notebooks has
    engine.notebooks, test_bench vit_s14.py."""
    scripts = "train train_sdxl predict export spectra compare minimal".split()
    tested = ("pip ", "torchrun", "tensorboard", "python -m engine.notebooks")
    tested += (
        "python bench/vit_s14.py",
        'python -c "import torchvision; torchvision.datasets.FashionMNIST(',
    )
    tested += (*(f"python {name}.py" for name in scripts),)
    for line in SHELL:
        assert line.startswith(tested), line
    assert README.count("\npip install -r requirements.txt && python train.py\n") == 1
    assert len(re.findall(r"(?m)^pip install .* && python -m pytest$", README)) == 1


def test_each_block_of_code_is_of_a_kind_that_is_run():
    """sh and Python run; a block without a name is an equation or what a program prints."""
    for name, text in TEXTS.items():
        fences = re.findall(r"(?m)^```(.*)$", text)
        assert set(fences[::2]) <= {"sh", "python", ""} and set(fences[1::2]) <= {""}, name
        assert "`sh" not in text.replace("\n```sh\n", ""), name
    pages = {name for name, blocks in CODE.items() if blocks}
    pages -= {"other-tools.md", "text-to-image.md"}  # of test_kohya.py and test_sdxl.py
    assert pages == {
        "README.md",
        "data.md",
        "training.md",
        "weights-and-export.md",
        "any-model.md",
    }


def test_commands_that_predict_and_export_and_draw(runs, capsys):
    """And the Python that opens the exported folder: it says the class that predict.py says."""
    scripts = {f"python {module.__name__}.py": module for module in (predict, export, spectra)}
    lines = [line for line in SHELL if line.startswith(tuple(scripts))]
    assert len(lines) == 7
    for name in ("0", "1", "lora", "loha", "lokr"):
        shutil.copytree(runs / "x", runs / name)
    for line in lines:
        script = next(script for start, script in scripts.items() if line.startswith(start))
        assert script.main(arguments(line)) == 0, line
    said = capsys.readouterr().out
    assert said.count("Predicted class: ") == 1 and said.count("photos/") == 20
    for name in (
        "sheet.png",
        "folder/adapter_config.json",
        "mine.safetensors",
        "vit.pth",
        "delta.png",
        "norms.png",
        "submission.csv",
    ):
        assert (runs.parent / name).is_file()
    execute("weights-and-export.md")
    (line,) = re.findall("Predicted class: .*", capsys.readouterr().out)
    assert line in said.splitlines()


@pytest.mark.slow
def test_commands_of_compare(tmp_path, monkeypatch, capsys):
    """As far as the last picture, but for one method, one seed and few images; in this process."""
    monkeypatch.setattr(compare.Comparison, "launch", launch)
    tiny_imagenet(tmp_path / "path/to/tiny-imagenet-200", classes=4)
    pets(tmp_path / "photos", classes=("cat", "dog"))
    fashion_mnist(tmp_path)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in SHELL if line.startswith("python compare.py")]
    assert len(lines) == 5
    for i, line in enumerate(lines):
        flags = arguments(line.replace("/path/to", "path/to"))
        _, config, _ = compare.read(flags)  # what the page says is taken as it is
        assert (config.data_dir == "photos") == (config.dataset == "folder") == (i == 3)
        flags += "--methods head --seeds 1 --limit 4 --epochs 1 --batch-size 2 --workers 0".split()
        if "tiny-imagenet-lora" in flags:
            flags += "--weights none --image-size 32 --amp off".split()
        if "vit_s14" in flags:  # 88 MB
            flags += "--weights embedded --image-size 28 --limit 20".split()
        assert compare.main([*flags, "--out", f"runs/{i}"]) == 0, capsys.readouterr().err
        assert (tmp_path / "runs" / str(i) / "comparison.png").is_file()
        classes = (tmp_path / "runs" / str(i) / "comparison.md").read_text("utf-8")
        assert f"images of {[10, 10, 4, 2, 10][i]} classes" in classes


def test_the_command_of_minimal(tmp_path, monkeypatch, capsys):
    """With a few of its digits."""
    monkeypatch.chdir(tmp_path)
    assert "`python minimal.py` learns the" in README  # its folders of photos have tests of theirs
    assert "about a hundred lines" in README
    assert 80 <= len((ROOT / "minimal.py").read_text("utf-8").splitlines()) <= 120
    whole, few = minimal.digits, {"train": 200, "val": 100}
    monkeypatch.setattr(minimal, "digits", lambda *folder: whole(*folder, **few))
    monkeypatch.setattr(sys, "argv", ["minimal.py"])
    minimal.main()
    assert re.search(r"Validation Accuracy: \d+\.\d\d%\n$", capsys.readouterr().out)
    assert list(tmp_path.glob("runs/*/events*"))


@pytest.mark.slow
def test_the_command_of_tensorboard_shows_the_run(runs):
    (line,) = (line for line in SHELL if line.startswith("tensorboard"))
    port = str(free_port())
    # -m: the script of that name need not be on the path of whoever runs the tests
    command = [sys.executable, "-m", "tensorboard.main", *shlex.split(line)[1:], "--port", port]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found, late = [], time.monotonic() + 300
    try:
        while not found and server.poll() is None and time.monotonic() < late:
            time.sleep(0.5)
            try:
                found = json.load(opener.open(f"http://localhost:{port}/data/runs", timeout=10))
            except OSError:
                pass  # it does not listen yet
    finally:
        server.kill()
        server.wait()
    assert found == ["x"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_commands_of_torchrun(tmp_path):
    """The second one twice, for two machines; without GPUs, full-size weights and Tiny-ImageNet."""
    tiny_imagenet(tmp_path / "data" / "tiny-imagenet-200", classes=4)
    lines = [line for line in SHELL if line.startswith("torchrun")]
    assert [line.count("HOST") for line in lines] == [0, 1]
    lines = [line.replace("HOST:29500", f"localhost:{free_port()}") for line in lines]
    small = "--epochs 1 --workers 0 --limit 8 --batch-size 4 --device cpu"
    for line, machines in zip(lines, (1, 2), strict=True):
        command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
        script = command.index("train.py")
        command[script] = str(ROOT / "train.py")
        if "tiny-imagenet" in line:
            command += "--weights none --image-size 32".split()
        else:
            assert command[script + 1 :] == ["--out", "runs/mine"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [
            subprocess.Popen([*command, *small.split()], cwd=tmp_path, **pipes)
            for _ in range(machines)
        ]
        try:
            ends = [process.communicate(timeout=400) for process in started]
        finally:
            for process in started:
                process.terminate()  # torchrun ends what it has started
        assert all(process.returncode == 0 for process in started), ends
        assert sum(said.count("Validation Accuracy: ") for said, _ in ends) == 1
    done = checkpoint.read_resume(tmp_path / "runs" / "mine" / "last.pt")
    assert done["step"] == 2 and done["config"]["batch_size"] == 4


@pytest.mark.slow
def test_every_training_command_gets_as_far_as_the_first_step(runs):
    """All but the weights, which cannot be had without network, and the size of the run."""
    tiny_imagenet(runs.parent / "path/to/tiny-imagenet-200", classes=4)
    food101(runs.parent / "path/to/food-101")
    FAMILIES["DINOv2"](Path("dinov2-small"), 56)  # where a name of Hugging Face is looked for
    lines = [line for line in SHELL if line.startswith("python train.py")]
    assert len(lines) >= 3
    for line in lines:
        flags = arguments(line.replace("/path/to", "path/to"))
        if parse(flags).weights in ("imagenet1k", "in21k"):
            flags += "--weights none --image-size 32 --amp off".split()
        enough = ["--limit", "10"] if "--folds" in flags else []  # two of each class
        assert train.main([*flags, *SMALL, *enough]) == 0, line


def test_python_to_paste():
    names = execute("README.md", [('weights="IMAGENET1K_V1"', "weights=None")])
    assert names["trainable"] == 12 * 2 * 8 * (768 + 768) + 768 * 5 + 5
    assert names["model"].heads.head.out_features == 5
    assert type(names["model"].encoder.layers[0].self_attention).__name__ == "MultiheadAttention"


def test_python_that_trains_and_predicts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "photo.jpg", 0, 1)
    old = 'adapter="lokr", rank=8)'
    names = execute("training.md", [(old, f"{old[:-1]}, limit=20, epochs=1)")])
    assert names["file"] == "photo.jpg" and not names["bad"]
    assert names["info"]["classes"][0] == "zero"


def test_python_that_makes_a_table_of_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("cat", "dog")):
        for i in range(2):
            write_image(tmp_path / "photos" / "train" / f"{name}.{i}.jpg", label, i)
    execute("data.md")
    dataset = data.load("csv", "photos")
    assert dataset.classes == ["cat", "dog"] and len(dataset.train) == 2


def test_python_for_any_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_sdxl(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0")
    *before, loads = CODE["any-model.md"]
    first, second = small_adapted(seed=0), small_adapted(seed=1)
    names = {"model": first}
    for block in before:
        exec(block, names)
    assert (tmp_path / "style" / "text_encoder_one" / "adapter_config.json").is_file()
    assert type(names["unet"]).__name__ == "PeftModel"
    trained = {"inner.lora_A", "inner.lora_B", "heads.head.weight", "heads.head.bias"}
    assert torch.load("trained.pt").keys() == trained
    x = torch.randn(3, 6)
    assert not torch.equal(first(x), second(x))
    exec(loads, names := {"model": second, "torch": torch})
    assert torch.equal(first(x), second(x))
    assert set(names["missing"]) == {"inner.linear.weight", "inner.linear.bias"}
    assert names["unexpected"] == []


def small_adapted(seed):
    """A model with LoRA and a head: the same frozen weights for every seed, other trained ones."""
    torch.manual_seed(0)
    head = nn.Sequential(OrderedDict(head=nn.Linear(5, 2)))
    model = nn.Sequential(OrderedDict(inner=nn.Linear(6, 5), heads=head))
    lora.replace_linear(model, partial(lora.LoRALinear, rank=2))
    lora.mark_trainable(model)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


def slugs(text):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    headings = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    """Files, relative to the page that links them; headings of pages; lines of files."""
    seen = set()
    for name, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (PAGES[name].parent / path).resolve() if path else PAGES[name]
            assert target.is_relative_to(ROOT) and target.exists(), f"{name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in slugs(target.read_text("utf-8")), f"{name}: {link}"
            elif anchor:
                assert re.fullmatch(r"L\d+", anchor), f"{name}: {link}"
            seen.add(target)
    assert {*PAGES.values()} <= seen, "a page that no other page links to"


def test_every_file_and_name_in_the_code_is_there():
    files = set(re.findall(r"(?<![\w./])((?:\w+/)*\w+\.(?:py|ipynb))\b", ALL))
    assert len(files) > 8
    for path in files:
        assert (ROOT / path).is_file(), path
    in_sight = {path.name for path in ROOT.glob("*.py")}
    listed = re.findall(r"`(\w+\.py)`", README.split("| file | what it is |")[1])
    assert set(listed) == in_sight, "README's table of files"
    folders = (ROOT, ROOT / "engine", ROOT / "tests")
    sources = "".join(p.read_text("utf-8") for f in folders for p in sorted(f.glob("*.py")))
    names = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?:\(\))?`", ALL))
    assert len(names) > 8
    for name in names:
        assert re.search(rf"\b{name}\b", sources.replace(Path(__file__).read_text("utf-8"), "")), (
            name
        )


def test_every_flag_that_a_page_names_is_taken():
    known = {flag(name) for name in Config.__dataclass_fields__}
    for path in (*ROOT.glob("*.py"), *(ROOT / "bench").glob("*.py")):
        known |= set(
            re.findall(r"""add(?:_argument)?\(\s*"(--[a-z-]+)\"""", path.read_text("utf-8"))
        )
    known |= {flag(name) for name in config_sdxl.Config.__dataclass_fields__}
    known |= {
        "--help",
        "--logdir",
        "--no-cache",
        "--no-flip",
        "--no-deps",
    }  # argparse's and others'
    known |= {f"--{name}" for name in "nproc_per_node nnodes rdzv_backend rdzv_endpoint".split()}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+", ALL))
    assert len(named) > 30 and named <= known, named - known


def test_pages_are_short_and_name_no_path_of_a_machine():
    assert len(README.splitlines()) <= 220
    for name, text in TEXTS.items():
        for line in text.splitlines():
            assert len(line) <= 110 or line.startswith("|"), f"{name}: {line}"
        absolute = set(re.findall(r"(?<![\w.:/>])/(\w+)(?![\w.])", text))
        assert absolute <= {"kaggle", "path"}, f"{name}: {absolute}"
        assert str(ROOT) not in text and "\\Users" not in text, name


def test_the_equations_are_the_lines_of_code_that_readme_links():
    """A block has an equation and then code, whose first line is the one that is linked."""
    pattern = r"\*\* \(\[(\w+\.py), line (\d+)\]\((\S+)#L(\d+)\)\) [^`]*:\n\n```\n(.*?)\n```"
    found = re.findall(pattern, README, re.S)
    assert [file for file, *_ in found] == ["lora.py", "loha.py", "lokr.py"]
    for file, line, linked, number, block in found:
        assert (file, line) == (linked, number)
        lines = (ROOT / file).read_text("utf-8").splitlines()
        equation, *shown = block.splitlines()
        code = lines[int(number) - 1 :][: len(shown)]
        assert [text.split("  #")[0].strip() for text in code] == shown, file
        assert [text.startswith("return ") for text in shown] == [False] * (len(shown) - 1) + [True]
        equation = re.split(r"\s{3,}", equation)[0]
        assert equation in re.sub(r"\s+", " ", "\n".join(lines)), equation  # the file's docstring
        forward = max(i for i, text in enumerate(lines[: int(number)]) if "def " in text)
        assert lines[forward].strip().startswith("def forward")


def test_readme_s_numbers_of_a_layer_are_the_layers():
    text = README.split("For a layer of 768 x 768")[1]
    rows = {cells(line)[0]: cells(line)[1:] for line in text.splitlines()[1:9] if "|" in line}
    torch.manual_seed(0)
    linear = nn.Linear(768, 768)
    assert f"{linear.weight.numel():,} weights" in text.splitlines()[0]
    for i, adapter in enumerate(ADAPTERS.values()):
        layer = adapter(linear, rank=8).double()
        factors = [*layer.parameters(recurse=False)]
        assert rows["parameters"][i] == f"{sum(p.numel() for p in factors):,}"
        for parameter in factors:
            nn.init.normal_(parameter)
        with torch.no_grad():
            rank = torch.linalg.matrix_rank(layer.delta_weight()).item()
        assert rows["rank of delta W, at most"][i] == str(rank)
    assert "W1 is 24 x 24 and W2 is 32 x 32 of rank 8" in " ".join(text.split())
    assert layer.lokr_w1.shape == (24, 24) and layer.lokr_w2_a.shape == (32, 8)
    assert "from r = max(out_k, in_n) / 2 on, here 16, W2 is one matrix" in " ".join(text.split())
    shapes = {r: [*dict(adapter(linear, rank=r).named_parameters(recurse=False))] for r in (15, 16)}
    assert shapes == {15: ["lokr_w1", "lokr_w2_a", "lokr_w2_b"], 16: ["lokr_w1", "lokr_w2"]}


def test_the_table_of_recipes_is_the_recipes():
    lines = [
        line
        for line in TEXTS["training.md"].splitlines()
        if re.match(r"\| `[\w-]+`.* x|\| `[\w-]+`.*\| all \|", line)
    ]
    assert [re.match(r"\| `(.*?)`", line)[1] for line in lines] == [*RECIPES]
    classes = {"demo": 10, "tiny-imagenet": 200, "food101": 101}
    for recipe, line in zip(RECIPES, lines, strict=True):
        c = Config(recipe=recipe)
        with torch.device("meta"):  # shapes without numbers: enough to count
            name = Config(recipe=recipe, weights="none").model
            model, _ = vit.build(name, "none", classes[c.dataset])
        trainable, _ = adapt(model, **{key: getattr(c, key) for key in ADAPT})
        batch = f"{c.batch_size} x {c.grad_accum}" if c.grad_accum > 1 else str(c.batch_size)
        settings = [c.adapter, c.rank, f"{c.alpha:g}", c.targets, c.epochs, batch, f"{c.lr:g}"]
        assert cells(line)[1:] == [*map(str, settings), f"{trainable:,}"]
    documents = re.findall(r"\| `([\w-]+)` \| `train.py` trains it \|", README)
    assert {*documents, "demo"} == {*RECIPES}


def test_the_tables_of_a_run_s_files_and_tags_are_a_run_s(tmp_path, capsys):
    text = TEXTS["training.md"]
    train.train(Config(limit=20, epochs=1, test=True, out=tmp_path / "run"))
    listed = text.split("| file | what it holds |")[1].split("\n\n")[0]
    names = set(re.findall(r"^\| `(.*?)`", listed, re.MULTILINE))
    there = {path.name for path in (tmp_path / "run").iterdir()}
    there = {"events.out.tfevents.*" if n.startswith("events") else n for n in there}
    assert names - {"unreadable.txt"} == there  # all of the digits can be read
    listed = text.split("| tag | what it shows |")[1].split("\n\n")[0]
    events = EventAccumulator(str(tmp_path / "run")).Reload().Tags()
    tags = {tag for kind in ("scalars", "histograms", "images") for tag in events[kind]}
    named = re.findall(r"^\| (.*?) \|", listed, re.MULTILINE)
    assert {tag for row in named for tag in re.findall("`(.*?)`", row)} == tags


def test_what_the_page_of_resume_quotes_is_what_a_run_says(
    tmp_path, monkeypatch, stop_after, capsys
):
    monkeypatch.chdir(tmp_path)
    said = re.sub(r"\d+", "N", " ".join(TEXTS["resume-and-many-gpus.md"].split()))
    command = [*SMALL, "--out", "runs/mine", "--resume"]
    stop_after(2, signal.SIGINT)
    assert train.main(command) == 130
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("train.py: stopped by SIGINT after step 2")
    assert re.sub(r"\d+", "N", message) in said
    stop_after(10_000)
    assert train.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "resumes after" in line)
    assert f"`{re.sub('[0-9]+', 'N', line)}`" in said
    demo = Config()
    steps = demo.epochs * -(-4000 // demo.batch_size)
    assert f"of {steps}`" in TEXTS["resume-and-many-gpus.md"]


def test_the_flags_that_may_change_are_those_of_config():
    text = TEXTS["resume-and-many-gpus.md"].split("You may change")[1].split("\n-")[0]
    also = {"--recipe", "--out", "--resume"}  # a name of flags; what says which run it is
    assert set(re.findall(r"--[a-z-]+", text)) | also == {flag(name) for name in FREE}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def comparison_rows(folder="assets", count=14):
    """The rows of a comparison's first table, and the text after it."""
    text = (ROOT / folder / "comparison.md").read_text(encoding="utf-8")
    whole, rest = text.split("\n## ", 1)
    rows = [cells(line) for line in whole.splitlines() if re.match(r"\| .*±", line)]
    assert len(rows) == count
    return rows, rest


def test_figures_of_the_demo_are_the_comparison_s():
    rows, rest = comparison_rows()
    for row in rows:
        kept = f"{float(row[8]):.0f}"
        assert f"| {' | '.join(row[:7])} | {kept} |" in TEXTS["comparison.md"], row
    short = {"LoKr": "LoKr rank 4", "LoRA": "LoRA rank 4", "LoHa": "LoHa rank 4"}
    names = {name: method for method, name in pictures.NAMES.items()}
    for name, rank, parameters, _, lr, validation, test, *_ in rows:
        if rank in ("", "4"):
            (line,) = re.findall(rf"^\| {short.get(name, name)} \(.*$", README, re.MULTILINE)
            assert cells(line)[1:] == [parameters, validation, test]
            assert RECIPES["demo"]["lr"][names[name]] == float(lr)
            assert f"`--adapter {names[name]}`" in line or "the default" in line
    of_dropout = (
        TEXTS["comparison.md"].split("| adapter dropout, rank 4, test % |")[1].splitlines()[2:5]
    )
    wanted = [
        cells(row) for row in re.findall(r"^\| \w+ \| 4 \| [\d.]+ \| .*±.*$", rest, re.MULTILINE)
    ]
    assert [cells(line) for line in of_dropout] == [
        [wanted[i][0], *(row[4] for row in wanted[i : i + 3])] for i in (0, 3, 6)
    ]


def test_figures_of_the_vit_s_are_the_comparison_s():
    rows, _ = comparison_rows("assets/vit_s14", 5)
    said = " ".join(TEXTS["comparison.md"].split())
    for name, rank, parameters, file, lr, validation, test, _, kept in rows:
        line = [name, rank, parameters, file, lr, validation, test, f"{float(kept):.0f}"]
        assert f"| {' | '.join(line)} |" in TEXTS["comparison.md"]
        if name == "linear probe":
            assert f"A linear probe has {test} %" in README
            continue
        (found,) = re.findall(rf"^\| {name} \| [\d,]+ \| [\d,]+ \| .*$", README, re.MULTILINE)
        assert cells(found) == [name, parameters, file, f"{float(lr):f}".rstrip("0"), test]
    test = {row[0]: float(row[6].split()[0]) for row in rows}
    adapters = [test[name] for name in ("LoRA", "LoHa", "LoKr")]
    assert min(adapters) - test["linear probe"] >= 9 and min(adapters) >= test["full fine-tuning"]
    rate = {row[0]: float(row[4]) for row in rows}
    assert rate["LoHa"] / rate["LoRA"] == pytest.approx(2.5)
    assert rate["LoKr"] / rate["LoRA"] == pytest.approx(6.25)
    sizes = {row[0]: int(row[2].replace(",", "")) for row in rows}
    assert round(sizes["LoRA"] / sizes["LoKr"]) == 11 and "an eleventh of LoRA's parameters" in said
    by_seed = of_seeds("comparison")
    assert {len(seeds) for seeds in by_seed.values()} == {5}
    lora, lokr, full = (by_seed[key] for key in (("lora", 8), ("lokr", 8), ("full", None)))
    ahead = [a - b for other in (lokr, full) for a, b in zip(lora, other, strict=True)]
    assert f"by {min(ahead):.2f} to {max(ahead):.2f} points" in said


def of_seeds(name):
    """By (method, rank), the test accuracies (%) of a table's final runs, in the order of the seeds."""
    found = {}
    for row in report.read(ROOT / "assets" / "vit_s14" / f"{name}.csv"):
        if row["final"]:
            seeds = found.setdefault((row["method"], row["rank"]), {})
            seeds[row["seed"]] = 100 * float(row["test_accuracy"])
    return {key: [seeds[i] for i in range(len(seeds))] for key, seeds in found.items()}


def test_figures_of_other_ranks_layers_and_images_are_the_tables():
    head = "| | rank 2 | rank 4 | rank 8 | rank 16 | query and value | digits |"
    table = TEXTS["comparison.md"].split(head)
    columns = [("ranks", 2), ("ranks", 4), ("comparison", 8), ("ranks", 16)]
    columns += [("query_value", 8), ("digits", 8)]
    columns = [(of_seeds(name), rank) for name, rank in columns]
    methods = {name: method for method, name in pictures.NAMES.items()}
    lines = [cells(line) for line in table[1].split("\n\n")[0].splitlines()[2:]]
    assert [methods[line[0]] for line in lines] == list(methods.values())
    for line in lines:
        for (found, rank), cell in zip(columns, line[1:], strict=True):
            method = methods[line[0]]
            seeds = found.get((method, rank if method in ADAPTERS else None))
            assert bool(cell) == bool(seeds)
            if seeds:
                assert cell == f"{statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f}", line
    means = {line[0]: [float(cell.split()[0]) for cell in line[1:5] if cell] for line in lines}
    pairs = zip(means["LoHa"], means["LoRA"][1:], strict=False)  # LoHa's rank is half of LoRA's
    assert max(abs(loha - lora) for loha, lora in pairs) == pytest.approx(0.6)
    assert "differ by at most 0.6 points" in TEXTS["comparison.md"]


def test_figures_of_eight_epochs_are_the_tables():
    shown = TEXTS["comparison.md"].split("| | linear probe | LoRA | LoHa |")[1].split("\n\n")[0]
    lines = {cells(line)[0]: cells(line)[1:] for line in shown.splitlines()[2:]}
    for epochs, table in (("4 epochs", "comparison"), ("8 epochs", "epochs8")):
        found = of_seeds(table)
        for method, cell in zip(pictures.NAMES, lines[epochs], strict=True):
            values = found[method, 8 if method in ADAPTERS else None][:2]
            accuracies = [float(value) for value in cell.split(", ")]
            assert accuracies == pytest.approx(values, abs=0.0501), (method, epochs)
    rates = {row["method"]: row["lr"] for row in report.read(ROOT / "assets/vit_s14/epochs8.csv")}
    for row in report.read(ROOT / "assets" / "vit_s14" / "comparison.csv"):
        assert not row["final"] or rates[row["method"]] == row["lr"]


def test_best_rates_of_the_vit_s_are_those_of_the_tables():
    folder = ROOT / "assets" / "vit_s14"
    tables = [[*report.read(folder / f"{n}.csv")] for n in ("comparison", "ranks", "alpha")]
    found = {"alpha 8": tables[0] + tables[1], "alpha = rank": tables[2]}
    shown = (
        TEXTS["comparison.md"]
        .split("| ViT-S/14 | rank 2 | rank 4 | rank 8 | rank 16 |")[1]
        .split("\n\n")[0]
    )
    for line in shown.splitlines()[2:]:
        (name, alpha), *best = cells(line)[0].split(", "), *cells(line)[1:]
        trials = report.trials(found[alpha])
        for rank, cell in zip((2, 4, 8, 16), best, strict=True):
            points = trials.get((name.lower(), rank))
            assert bool(points) == bool(cell), line
            if points:
                accuracy = max(accuracy for _, accuracy in points)
                rates = {
                    f"{lr:g} ({100 * accuracy:.1f})" for lr, value in points if value == accuracy
                }
                assert cell in rates, line


def test_what_the_pages_say_of_the_comparison_is_in_it():
    rows, rest = comparison_rows()
    test = {(row[0], row[1]): float(row[6].split()[0]) for row in rows}
    size = {(row[0], row[1]): int(row[2].replace(",", "")) for row in rows}
    adapters = [key for key in test if key[1]]
    worst = min(test[key] for key in adapters)
    said = " ".join(TEXTS["comparison.md"].split())
    gap = worst - test["linear probe", ""]
    assert f"by {gap:.0f} points of test accuracy or more" in said
    assert test["full fine-tuning", ""] - worst <= 3.5
    assert "at most 3.5 points below full fine-tuning" in said
    of_full = [size["full fine-tuning", ""] / size[key] for key in adapters]
    assert f"{min(of_full):.0f} to {round(max(of_full), -1):.0f} times fewer parameters" in said
    conditions = (ROOT / "assets" / "comparison.md").read_text("utf-8").split("\n|")[0]
    assert "alpha is 16 at every rank" in said and "alpha 16 at every rank" in conditions
    lr = {(row[0], row[1]): float(row[4]) for row in rows if row[1]}
    times = {key: rate / lr["LoRA", key[1]] for key, rate in lr.items()}
    assert {times["LoHa", rank] for rank in ("2", "4", "8", "16")} == {times["LoKr", "2"]} == {2.5}
    assert {times["LoKr", rank] for rank in ("4", "8", "16")} == {6.25}
    said_of_rates = " ".join(TEXTS["training.md"].split())
    assert "2.5 times (LoHa) and about six times (LoKr from rank 4 on) LoRA's" in said_of_rates
    for name in ("LoHa", "LoKr"):
        assert RECIPES["demo"]["lr"][name.lower()] == lr[name, "4"]
        assert f"--adapter {name.lower()}    # --lr {lr[name, '4']:g}" in TEXTS["training.md"]
    tried = re.findall(r"\| LoRA \| (\d+) \| 0.0125 \| ([\d.]+) \|", rest)
    best = re.findall(r"\| LoRA \| (\d+) \| 0.005 \| ([\d.]+) \|", rest)
    fails, loses = re.search(
        r"\((\d+ and \d+) %, seed 0\) and loses (\d+ and \d+) points", said
    ).groups()
    (_, two), (_, four), (_, eight), (_, sixteen) = tried
    figures = [
        float(two),
        float(four),
        float(best[2][1]) - float(eight),
        float(best[3][1]) - float(sixteen),
    ]
    for figure, text in zip(figures, [*fails.split(" and "), *loses.split(" and ")], strict=True):
        assert abs(figure - int(text)) <= 0.5


def test_from_which_rank_lokr_s_w2_is_one_matrix():
    """In the demo's layers, and in those of food101-lokr."""
    said = {name: " ".join(text.split()) for name, text in TEXTS.items()}
    assert "(128 x 128, W2 16 x 16) reach this at rank 8" in said["comparison.md"]
    assert "the MLP layers (W2 32 x 16 or 16 x 32) at rank 16" in said["comparison.md"]
    assert "At rank 16, LoKr's W2 (32 x 32) is one matrix here" in said["training.md"]
    assert RECIPES["food101-lokr"]["rank"] == 16
    cases = [(128, 128, 8, (16, 16)), (128, 512, 16, (32, 16)), (512, 128, 16, (16, 32))]
    for n_in, n_out, rank, shape in [*cases, (768, 768, 16, (32, 32))]:
        linear = nn.Linear(n_in, n_out)
        assert ADAPTERS["lokr"](linear, rank=rank).lokr_w2.shape == shape
        assert not hasattr(ADAPTERS["lokr"](linear, rank=rank - 1), "lokr_w2")


def test_the_page_of_weights_says_where_they_come_from():
    said = " ".join(TEXTS["weights-and-export.md"].split())
    rows = {
        cells(line)[0]: line for line in TEXTS["weights-and-export.md"].splitlines() if "|" in line
    }
    for name in weights.TORCHVISION:
        source = weights.torchvision_source(name, "vit_b_16")
        assert source.url in rows[f"`{name}`"] and source.name in rows[f"`{name}`"]
    assert weights.IN21K in rows["`in21k`"]
    others = {"imagenet1k": ("vit_b_32", "vit_l_16", "vit_l_32"), "swag": ("vit_l_16", "vit_h_14")}
    for name, models in others.items():
        assert f"`{name}` ({', '.join(f'`{model}`' for model in models)})" in said
        exist = []
        for model in weights.TORCHVISION_MODELS[1:]:
            with suppress(ValueError):
                exist.append((model, weights.torchvision_source(name, model)))
        assert [model for model, _ in exist] == [*models]


@pytest.mark.parametrize("name", ["speed", "speed_bf16"])
def test_figures_of_speed_are_the_bench_s(name):
    text = (ROOT / "bench" / f"{name}.md").read_text(encoding="utf-8")
    parts = [part for part in text.split("\n## ") if part.startswith("all, batch 8, rank ")]
    found = []
    for part in parts:
        lines = (cells(line) for line in part.splitlines() if re.match(r"\| \w.*\d", line))
        found.append({name: (ratio, kept) for name, _, ratio, kept in lines})
    assert [part.split("\n")[0] for part in parts] == [f"all, batch 8, rank {r}" for r in (8, 16)]
    page = TEXTS["speed.md"]
    for kind in ("LoRA", "LoHa", "LoKr"):
        ratios = [rank[f"{kind} {who}"][0] for rank in found for who in ("ours", "PEFT", "LyCORIS")]
        kept = [found[0][f"{kind} {who}"][1] for who in ("ours", "PEFT")]
        assert f"| {kind} | {' | '.join(ratios + kept)} |" in page, kind
    full = [rank["full"][0] for rank in found]
    kept = found[0]["full"][1]
    assert f"| full fine-tuning | {full[0]} | | | {full[1]} | | | {kept} | |" in page
    if name == "speed":
        assert f"autograd keeps {found[0]['LoKr ours'][1]} times" in " ".join(page.split())


def test_figures_of_whole_runs_and_of_the_input_path_are_the_benches():
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}
    precisions = {"": "float32", "_bf16": "bfloat16", "_auto": "as they come"}
    for end, precision in precisions.items():
        text = (ROOT / "bench" / f"end_to_end{end}.md").read_text(encoding="utf-8")
        rows = [cells(line) for line in text.splitlines() if re.match(r"\| lo", line)]
        assert [row[0] for row in rows] == [*names]
        for kind, *figures in rows:
            assert f"| {names[kind]}, {precision} | {' | '.join(figures)} |" in TEXTS["speed.md"]
    text = (ROOT / "bench" / "recompute.md").read_text(encoding="utf-8")
    rows = [cells(line) for line in text.splitlines() if line.startswith("| vit_")]
    assert [row[0] for row in rows] == ["vit_b_16", "vit_l_16"]
    for name, *figures in rows:
        row = f"| ViT-{name[4].upper()}/16 | {' | '.join(figures)} |"
        assert row in TEXTS["speed.md"]
    table = (ROOT / "bench" / "data.md").read_text(encoding="utf-8").splitlines()
    shown = [
        line for line in TEXTS["data.md"].splitlines() if " px JPEG" in line or " JPEG, for" in line
    ]
    assert len(shown) == 3 and set(shown) <= set(table)


def test_what_is_said_of_other_libraries_is_counted_in_the_grid():
    """Ahead: more than 1.00 in the table of their time over ours."""
    text = (ROOT / "bench" / "grid.md").read_text(encoding="utf-8")
    lines = text.split("## Other libraries' time over ours")[1].splitlines()
    rows = [cells(line) for line in lines if re.match(r"\| \w.*batch", line)]
    assert len(rows) == 2 * 3 * 4  # targets, batches, ranks
    medians = [[float(cell.split()[0]) for cell in row[1:]] for row in rows]
    ahead = sum(min(row[i : i + 2]) > 1 for row in medians for i in (2, 4))
    sooner, later = (sum(sign * (row[0] - 1) > 0 for row in medians) for sign in (1, -1))
    said = " ".join(TEXTS["speed.md"].split())
    assert f"LoHa and LoKr were faster than both other libraries in {ahead} of 48 cases" in said
    assert f"LoRA was faster than PEFT's in {sooner} of 24 cases and slower in {later}" in said
    # Within the noise: the upper quartile of the rounds is at least 1.
    slower = [cell for row in rows for cell in row[1:] if float(cell.split()[0]) < 1]
    assert len(slower) == later + 48 - ahead
    assert all(float(cell.split()[-1].rstrip(")")) >= 1 for cell in slower)
