"""train.py --init-adapter: from our file or a folder that PEFT trained, with the old head or a new one."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapters import CLASSES, write_adapter
from hf import hf_vit
from test_export import peft_trained
from trees import write_image

import export
import train
import vit
from engine import checkpoint
from engine.adapt import ADAPT
from engine.config import RECIPES, parse
from engine.start import begin, read_source

QUICK = "--dataset folder --data-dir pets --epochs 1 --batch-size 4 --workers 0 --lr 1e-30".split()


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """Two images of each class in pets/; the same and one more class in other/."""
    monkeypatch.chdir(tmp_path)
    for root, names in (("pets", CLASSES), ("other", [*CLASSES, "more"])):
        for label, name in enumerate(sorted(names)):
            for i in range(2):
                write_image(tmp_path / root / name / f"{i}.jpg", label, i, (40, 40))
    return tmp_path


def tensors(path):
    return checkpoint.read_adapter(path)[0]


def test_a_random_trunk_is_drawn_again_from_its_seed_or_refused(pets, capsys):
    random = "--model vit_mini --weights none --image-size 28".split()
    assert train.main([*QUICK, *random, "--seed", "3", "--out", "a"]) == 0
    start = [*QUICK, "--init-adapter", "a"]
    capsys.readouterr()
    for other in ([], ["--seed", "3", "--weights", "embedded"]):
        assert train.main([*start, *other, "--out", "b"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "a: its trunk is random: expected --weights none --seed 3, found" in line
    assert train.main([*start, "--seed", "3", "--out", "b"]) == 0
    for key, tensor in tensors("a/adapter.safetensors").items():
        torch.testing.assert_close(tensors("b/adapter.safetensors")[key], tensor, msg=key)


@pytest.mark.parametrize("case", ["lora", "loha", "lokr-both", "head", "full"])
def test_a_run_starts_from_the_adapter_s_tensors_and_settings(case, pets, capsys):
    """With a learning rate of almost 0, the run ends with the adapter it started from, head included."""
    write_adapter("a.safetensors", case, classes=sorted(CLASSES))
    assert train.main([*QUICK, "--init-adapter", "a.safetensors", "--out", "run"]) == 0
    assert "start: a.safetensors, its head too" in capsys.readouterr().out
    start, end = tensors("a.safetensors"), tensors("run/adapter.safetensors")
    assert start.keys() == end.keys()
    for key in start:
        torch.testing.assert_close(end[key], start[key], rtol=1e-6, atol=1e-9, msg=key)
    (_, start_info), (_, end_info) = (
        checkpoint.read_adapter(p) for p in ("a.safetensors", "run/adapter.safetensors")
    )
    for key in (*ADAPT, "shape", "classes", "preprocessing"):
        assert end_info[key] == start_info[key], key
    # the control: without --init-adapter, the run starts from another head
    settings = ["--adapter", case.split("-")[0], "--rank", str(start_info["rank"])]
    assert train.main([*QUICK, *settings, "--out", "fresh"]) == 0
    assert not torch.equal(
        tensors("fresh/adapter.safetensors")["heads.head.weight"], start["heads.head.weight"]
    )


def test_images_are_prepared_as_for_the_adapter(pets, capsys):
    """The adapter's preprocessing wins over that of the pretrained weights: its head was trained with it."""
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop": 0.875}
    write_adapter("a.safetensors", "lora", classes=sorted(CLASSES), **preprocessing)
    export.to_peft("a.safetensors", "folder")
    export.from_peft("folder", "back.safetensors")
    for start in ("a.safetensors", "folder", "back.safetensors"):
        run = train.prepare(parse([*QUICK, "--init-adapter", start]))
        found = run.info["preprocessing"]
        assert {key: pytest.approx(found[key]) for key in preprocessing} == preprocessing, start
        run.lock.close()


def test_a_run_s_folder_stands_for_its_adapter(pets, capsys):
    (pets / "run").mkdir()
    write_adapter("run/adapter.safetensors", "lora", classes=sorted(CLASSES))
    assert train.main([*QUICK, "--init-adapter", "run", "--out", "next"]) == 0
    assert "start: run, its head too" in capsys.readouterr().out
    assert vit.load_adapter("run")[1]["classes"] == sorted(CLASSES)


def test_other_classes_get_a_fresh_head(pets, capsys):
    write_adapter("a.safetensors", "lora", classes=sorted(CLASSES))
    flags = [*QUICK, "--data-dir", "other", "--init-adapter", "a.safetensors", "--out", "run"]
    assert train.main(flags) == 0
    assert "start: a.safetensors, a new head: other classes" in capsys.readouterr().out
    start, end = tensors("a.safetensors"), tensors("run/adapter.safetensors")
    assert end["heads.head.weight"].shape == (4, 128) and start["heads.head.weight"].shape == (
        3,
        128,
    )
    adapters = [key for key in start if "lora_" in key]
    assert adapters and all(torch.equal(start[key], end[key]) for key in adapters)
    # the same number of classes, but other names: the head's rows would mean other classes
    write_adapter("b.safetensors", "lora", classes=["x", "y", "z"])
    assert train.main([*QUICK, "--init-adapter", "b.safetensors", "--out", "named"]) == 0
    assert "a new head" in capsys.readouterr().out
    export.to_peft("b.safetensors", "folder")  # a PEFT folder with class names
    assert train.main([*QUICK, "--init-adapter", "folder", "--out", "foreign"]) == 0
    assert "a new head" in capsys.readouterr().out
    assert not torch.equal(
        tensors("named/adapter.safetensors")["heads.head.weight"],
        tensors("b.safetensors")["heads.head.weight"],
    )


@pytest.mark.parametrize("case", ["lora", "loha", "lokr"])
def test_a_run_starts_from_a_folder_that_peft_trained(case, pets, capsys):
    theirs = peft_trained(case, pets)
    assert train.main([*QUICK, "--init-adapter", "folder", "--out", "run"]) == 0
    assert "start: folder, its head too" in capsys.readouterr().out
    model, info = vit.load_adapter("run/adapter.safetensors")
    assert info["weights"] == str(pets / "trunk") and info["preprocessing"]["mean"] == [0.5] * 3
    images = torch.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28).sin()
    with torch.no_grad():
        logits = theirs(images).logits
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)


def test_flags_win_over_the_adapter_and_must_fit_it(pets, capsys):
    write_adapter("a.safetensors", "lora")
    hf_vit().save_pretrained("trunk")
    start = ["--init-adapter", "a.safetensors"]
    config, _, _ = begin(parse([*QUICK, *start, "--alpha", "9"]))
    assert (config.alpha, config.rank, config.targets) == (9, 3, "query,value")
    write_adapter("b.safetensors", "lokr")
    config, _, _ = begin(parse(["--init-adapter", "b.safetensors"]))
    assert config.lr == RECIPES["demo"]["lr"]["lokr"]  # the rate follows the adapter
    config, _, _ = begin(parse([*QUICK, "--init-adapter", "b.safetensors"]))
    assert config.lr == 1e-30
    config = parse(["--init-adapter", "b.safetensors"])
    config.lr = 0.125  # from Python
    assert begin(config)[0].lr == 0.125
    for flags, message in [
        ("--rank 5", "expected shape (5, 128), found (3, 128)"),
        ("--adapter loha", "hada_w1_a: expected shape (128, 3), found no such tensor"),
        ("--weights trunk", "trunk: expected"),
        ("--init-adapter nowhere", "nowhere: no such adapter file"),
        ("--init-adapter pets", "pets: expected adapter_config.json"),
    ]:
        capsys.readouterr()
        assert train.main([*QUICK, *start, *flags.split()]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error
    assert not (pets / "runs").exists()


def test_missing_pretrained_weights_are_named_unless_given(pets, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    peft_trained("lora", pets)
    file = pets / "folder" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "x/y"}))
    assert train.main([*QUICK, "--init-adapter", "folder"]) == 2
    assert "--weights x/y: not in " in capsys.readouterr().err
    flags = ["--init-adapter", "folder", "--weights", "trunk", "--out", "run"]
    assert train.main([*QUICK, *flags]) == 0
    export.to_peft("run/adapter.safetensors", "again", base=str(pets / "trunk"))
    assert read_source("again").settings["weights"] == str(pets / "trunk")


@pytest.mark.slow
def test_a_run_resumes_without_the_adapter_it_started_from(pets, stop_after):
    """last.pt holds everything needed, also the preprocessing."""
    preprocessing = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "crop": 0.875}
    write_adapter("a.safetensors", "loha", classes=sorted(CLASSES), **preprocessing)
    flags = [*QUICK, "--lr", "0.01", "--epochs", "3", "--batch-size", "1"]
    from_a = ["--init-adapter", "a.safetensors"]
    assert train.main([*flags, *from_a, "--out", "unbroken"]) == 0
    for out in ("same", "moved", "omitted"):
        stop_after(2)
        assert train.main([*flags, *from_a, "--out", out]) == 143
    Path("a.safetensors").rename("b.safetensors")
    for out, start in (
        ("same", from_a),
        ("moved", ["--init-adapter", "b.safetensors"]),
        ("omitted", []),
    ):
        assert train.main([*flags, *start, "--out", out, "--resume"]) == 0
        found, expected = (checkpoint.read_adapter(name) for name in (out, "unbroken"))
        assert found[1] == expected[1]
        assert all(torch.equal(found[0][key], expected[0][key]) for key in expected[0])
    # a run that started without an adapter cannot resume with one
    assert train.main([*flags, "--out", "without"]) == 0
    assert (
        train.main([*flags, "--init-adapter", "b.safetensors", "--out", "without", "--resume"]) == 2
    )


def test_a_run_starts_from_lokr_s_sides_as_peft_splits_them(pets, capsys):
    """decompose_factor 16 makes W1 of 128 features 16 wide, where our rule, which sorts, makes it 8."""
    hf_vit(CLASSES).save_pretrained(pets / "trunk")
    base = transformers.AutoModelForImageClassification.from_pretrained(pets / "trunk")
    config = peft.LoKrConfig(r=2, alpha=5, target_modules=["q_proj"], decompose_factor=16)
    config.modules_to_save = ["classifier"]
    peft.get_peft_model(base, config).save_pretrained(pets / "folder")
    assert train.main([*QUICK, "--init-adapter", "folder", "--out", "run"]) == 0
    _, info = checkpoint.read_adapter("run/adapter.safetensors")
    found = tensors("run/adapter.safetensors")
    sides = {t.shape for key, t in found.items() if key.endswith("lokr_w1")}
    assert info["factor"] < -1 and sides == {(16, 16)}
