"""README's own lines: what it tells a reader to run, runs."""

import re
import shlex

from conftest import ROOT
from sdxl import toy_sdxl
from trees import food101, tiny_imagenet, write_image

import train

README = (ROOT / "README.md").read_text()
SHELL = [
    line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_every_training_command_gets_as_far_as_the_first_step(tmp_path, monkeypatch):
    """All but the weights, which cannot be had without network, and the size of the run."""
    tiny_imagenet(tmp_path / "path/to/tiny-imagenet-200", classes=4)
    food101(tmp_path / "path/to/food-101")
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            write_image(tmp_path / "photos" / name / f"{i}.jpg", label, i, (160, 120))
    monkeypatch.chdir(tmp_path)
    commands = [line.split("python train.py")[1] for line in SHELL if "python train.py" in line]
    assert len(commands) >= 3
    for command in commands:
        arguments = shlex.split(command.replace("/path/to", "path/to"))
        config = train.parse(arguments)
        if config.model == "vit_b_16":
            arguments += ["--weights", "none", "--image-size", "32"]
            arguments += ["--amp", "off"]
        small = ["--limit", "4", "--epochs", "1", "--batch-size", "1", "--workers", "0"]
        assert train.main([*arguments, *small]) == 0, command


def test_python_snippets_run_one_after_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy_sdxl(tmp_path / "stabilityai" / "stable-diffusion-xl-base-1.0")
    names = {}
    for snippet in PYTHON:
        snippet = snippet.replace("rank=8)", "rank=8, limit=20, epochs=1)")
        snippet = snippet.replace('weights="IMAGENET1K_V1"', "weights=None")
        exec(snippet, names)
    assert names["info"]["classes"][0] == "zero"
    assert (tmp_path / "style" / "text_encoder_one" / "adapter_config.json").is_file()
    assert type(names["unet"]).__name__ == "PeftModel"
    assert names["trainable"] == 12 * 2 * 8 * (768 + 768) + 768 * 1000 + 1000
    assert type(names["model"].encoder.layers[0].self_attention).__name__ == "MultiheadAttention"


def test_every_file_and_link_that_readme_names_is_there():
    named = set(re.findall(r"`([a-z_]+\.py)`", README))
    named |= {link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")}
    assert len(named) > 8
    for path in named:
        assert (ROOT / path).exists(), path
