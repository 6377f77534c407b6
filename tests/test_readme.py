"""README's own lines: what it tells a reader to run, runs."""

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import ROOT
from sdxl import toy_sdxl
from test_compare import launch
from trees import food101, tiny_imagenet, write_image

import compare
import export
import predict
import spectra
import train
from engine import checkpoint
from engine.config import Config, parse

README = (ROOT / "README.md").read_text("utf-8")
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


SMALL = "--limit 4 --epochs 1 --batch-size 1 --workers 0".split()


def arguments(line):
    """What follows the script's name in a line."""
    words = shlex.split(line, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(".py")) + 1 :]


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder with a run and photos, as README's commands name them."""
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            write_image(tmp_path / "photos" / name / f"{i}.jpg", label, i, (160, 120))
    write_image(tmp_path / "photo.jpg", 0, 1)
    train.train(Config(limit=20, epochs=1, out="runs/x"))
    return tmp_path / "runs"


def test_each_command_has_its_test():
    """pip's lines: .ci/run takes the second, and test_train runs what the first does. test_notebooks has
    notebooks.py."""
    scripts = "train predict export spectra compare notebooks".split()
    tested = ("pip install", "torchrun", "tensorboard", *(f"python {name}.py" for name in scripts))
    for line in SHELL:
        assert line.startswith(tested), line


def test_commands_that_predict_and_export_and_draw(runs, capsys):
    scripts = {f"python {module.__name__}.py": module for module in (predict, export, spectra)}
    lines = [line for line in SHELL if line.startswith(tuple(scripts))]
    assert len(lines) == 6
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
    ):
        assert (runs.parent / name).is_file()


def test_commands_of_compare(tmp_path, monkeypatch, capsys):
    """As far as the last picture, but for one method, one seed and few images; in this process."""
    monkeypatch.setattr(compare.Comparison, "launch", launch)
    tiny_imagenet(tmp_path / "path/to/tiny-imagenet-200", classes=4)
    monkeypatch.chdir(tmp_path)
    lines = [line for line in SHELL if line.startswith("python compare.py")]
    assert len(lines) == 3
    for i, line in enumerate(lines):
        flags = arguments(line.replace("/path/to", "path/to"))
        compare.read(flags)  # what README says is taken as it is
        flags += "--methods head --seeds 1 --limit 4 --epochs 1 --batch-size 2 --workers 0".split()
        if "tiny-imagenet-lora" in flags:
            flags += "--weights none --image-size 32 --amp off".split()
        assert compare.main([*flags, "--out", f"runs/{i}"]) == 0, capsys.readouterr().err
        assert (tmp_path / "runs" / str(i) / "comparison.png").is_file()


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
    assert done["done"] == 2 and done["config"]["batch_size"] == 4


def test_every_training_command_gets_as_far_as_the_first_step(runs):
    """All but the weights, which cannot be had without network, and the size of the run."""
    tiny_imagenet(runs.parent / "path/to/tiny-imagenet-200", classes=4)
    food101(runs.parent / "path/to/food-101")
    lines = [line for line in SHELL if line.startswith("python train.py")]
    assert len(lines) >= 3
    for line in lines:
        flags = arguments(line.replace("/path/to", "path/to"))
        if parse(flags).model == "vit_b_16":
            flags += "--weights none --image-size 32 --amp off".split()
        assert train.main([*flags, *SMALL]) == 0, line


def test_python_snippets_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_sdxl(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0")
    names = {}
    write_image(tmp_path / "photo.jpg", 0, 1)
    code = "\n".join(PYTHON)
    for old, new in (
        ('adapter="lokr", rank=8)', 'adapter="lokr", rank=8, limit=20, epochs=1)'),
        ('weights="IMAGENET1K_V1"', "weights=None"),
    ):
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(code, names)
    assert names["file"] == "photo.jpg" and not names["bad"]
    assert names["info"]["classes"][0] == "zero"
    assert (tmp_path / "style" / "text_encoder_one" / "adapter_config.json").is_file()
    assert type(names["unet"]).__name__ == "PeftModel"
    assert names["trainable"] == 12 * 2 * 8 * (768 + 768) + 768 * 1000 + 1000
    assert type(names["model"].encoder.layers[0].self_attention).__name__ == "MultiheadAttention"


def test_every_file_and_link_that_readme_names_is_there():
    named = set(re.findall(r"`([a-z_]+\.py)`", README))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")}
    assert len(named) > 8
    headings = [line.strip("# ").lower() for line in README.splitlines() if line.startswith("#")]
    places = {f"#{heading.replace(' ', '-')}" for heading in headings}
    for path in named - places:
        assert (ROOT / path).exists(), path


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_readme_s_figures_of_the_demo_are_the_comparison_s():
    text = (ROOT / "assets" / "comparison.md").read_text(encoding="utf-8")
    whole, rest = text.split("\n## ", 1)
    rows = [cells(line) for line in whole.splitlines() if re.match(r"\| .*±", line)]
    assert len(rows) == 14
    for row in rows:
        assert f"| {' | '.join(row[:7])} |" in README, row
    short = {"LoKr": "LoKr rank 4", "LoRA": "LoRA rank 4", "LoHa": "LoHa rank 4"}
    for name, rank, parameters, _, lr, validation, test, *_ in rows:
        if rank in ("", "4"):
            (line,) = re.findall(rf"^\| {short.get(name, name)} \(.*$", README, re.MULTILINE)
            assert cells(line)[1:] == [parameters, validation, test]
            assert f"--lr {lr}`" in line or "the default" in line
    of_dropout = README.split("| dropout, rank 4, test % |")[1].splitlines()[2:5]
    wanted = [
        cells(row) for row in re.findall(r"^\| \w+ \| 4 \| [\d.]+ \| .*±.*$", rest, re.MULTILINE)
    ]
    assert [cells(line) for line in of_dropout] == [
        [wanted[i][0], *(row[4] for row in wanted[i : i + 3])] for i in (0, 3, 6)
    ]


def test_readme_s_figures_of_speed_are_the_bench_s():
    text = (ROOT / "bench" / "speed.md").read_text(encoding="utf-8")
    parts = [part for part in text.split("\n## ") if part.startswith("all, batch 8, rank ")]
    found = []
    for part in parts:
        lines = (cells(line) for line in part.splitlines() if re.match(r"\| \w.*\d", line))
        found.append({name: (ratio, kept) for name, _, ratio, kept in lines})
    assert [part.split("\n")[0] for part in parts] == [f"all, batch 8, rank {r}" for r in (8, 16)]
    for kind in ("LoRA", "LoHa", "LoKr"):
        ratios = [rank[f"{kind} {who}"][0] for rank in found for who in ("ours", "PEFT", "LyCORIS")]
        kept = [found[0][f"{kind} {who}"][1] for who in ("ours", "PEFT")]
        assert f"| {kind} | {' | '.join(ratios + kept)} |" in README, kind
    assert f"| full fine-tuning | {found[0]['full'][0]} | | | {found[1]['full'][0]} |" in README


def test_what_readme_says_of_the_peers_is_counted_in_the_grid():
    """Ahead: more than 1.00 in the table of the peers' time over ours."""
    text = (ROOT / "bench" / "grid.md").read_text(encoding="utf-8")
    lines = text.split("## The peers' time over ours")[1].splitlines()
    rows = [cells(line) for line in lines if re.match(r"\| \w.*batch", line)]
    assert len(rows) == 2 * 3 * 4  # targets, batches, ranks
    medians = [[float(cell.split()[0]) for cell in row[1:]] for row in rows]
    ahead = sum(min(row[i : i + 2]) > 1 for row in medians for i in (2, 4))
    sooner, later = (sum(sign * (row[0] - 1) > 0 for row in medians) for sign in (1, -1))
    said = " ".join(README.split())
    assert f"LoHa and LoKr were ahead of both peers in {ahead} of 48 cases" in said
    assert f"LoRA was ahead of PEFT's in {sooner} of 24 and behind in {later}" in said
