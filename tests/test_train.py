"""train.py as a user runs it, and its loop against minimal.py's."""

import csv
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LIMIT, ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from trees import food101, pets, tiny_imagenet

import compare
import data
import minimal
import train
import vit
from engine import checkpoint, config_sdxl, devices
from engine.adapt import ADAPTERS, METHODS, adapt
from engine.config import RECIPES, Config, check, parse
from engine.devices import Autocast
from engine.files import remove_temporaries
from engine.run import make_folder

QUICK = {"limit": 48, "epochs": 2, "batch_size": 16, "workers": 0}


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The README's command in an empty folder, with nothing given."""
    folder = tmp_path_factory.mktemp("default")
    command = [sys.executable, str(ROOT / "train.py")]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    (run_dir,) = (folder / "runs").iterdir()
    return process, run_dir


@pytest.mark.slow
def test_default_run_learns_and_says_so(default_run):
    process, run_dir = default_run
    lines = process.stdout.strip().splitlines()
    accuracy = float(re.fullmatch(r"Validation Accuracy: (\d+\.\d\d)%", lines[-1])[1])
    assert accuracy > 80
    assert re.match(r"lora: [\d,]+ of [\d,]+ parameters train \(\d+\.\d\d%\)", lines[0])
    assert sum(line.startswith("epoch ") for line in lines) == RECIPES["demo"]["epochs"]
    assert re.fullmatch(r"demo-lora-0-\d{8}-\d{6}", run_dir.name)


@pytest.mark.slow
def test_default_run_leaves_its_files(default_run):
    _, run_dir = default_run
    names = {file.name for file in run_dir.iterdir() if not file.name.startswith("events.")}
    assert names == {
        "adapter.safetensors",
        "last.pt",
        "config.json",
        "metrics.csv",
        "curves.png",
        "predictions.png",
        "confusion.png",
    }
    for name in ("curves.png", "predictions.png", "confusion.png"):
        with Image.open(run_dir / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    config = json.loads((run_dir / "config.json").read_text())
    assert config["recipe"] == "demo" and config["rank"] == RECIPES["demo"]["rank"]
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_default_run_s_tensorboard_and_metrics_agree(default_run):
    process, run_dir = default_run
    events = EventAccumulator(str(run_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {*train.COLUMNS, "val/best_accuracy"} == tags
    with open(run_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for tag, column in [
        ("val/accuracy", "val_accuracy"),
        ("train/loss", "train_loss"),
        ("train/lr", "lr"),
    ]:
        written = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in written] == [step for step, _ in shown]
        assert [v for _, v in written] == pytest.approx([v for _, v in shown], rel=1e-5)
    best = max(float(row["val_accuracy"]) for row in rows if row["val_accuracy"])
    assert f"{best:.2%}" in process.stdout.splitlines()[-1]
    assert events.Scalars("val/best_accuracy")[-1].value == pytest.approx(best)
    start = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    settings = HParamsPluginData.FromString(start).session_start_info.hparams
    assert settings["adapter"].string_value == "lora" and settings["lr"].number_value == 5e-3
    names = set(RECIPES["demo"]) - {"model"}  # embedded weights say it themselves
    assert set(settings) == names, "what was set, and not every default"


@pytest.mark.slow
def test_default_run_s_adapter_has_the_accuracy_that_was_printed(default_run):
    process, run_dir = default_run
    model, info = vit.load_adapter(run_dir / "adapter.safetensors")
    val = data.load("demo").val
    _, accuracy = train.evaluate(model, data.batches(val, 100, info["preprocessing"]))
    assert process.stdout.strip().endswith(f"Validation Accuracy: {accuracy:.2%}")


def test_the_demo_has_a_rate_for_each_adapter_and_the_documents_one_for_all():
    def rate(flags, parse=parse):
        return parse(flags.split()).lr

    demo = {method: rate(f"--adapter {method}") for method in METHODS}
    assert demo == RECIPES["demo"]["lr"]
    assert rate("") == demo["lora"] and rate("--adapter lokr --lr 0.5") == 0.5
    for adapter in ADAPTERS:
        assert demo[adapter] == pytest.approx(0.005 * compare.NEAR[adapter])
        # what the documents had
        assert rate(f"--recipe food101-{adapter}") == 0.005
        assert rate(f"--recipe tiny-imagenet-lora --adapter {adapter}") == 0.001
        drawn = rate(f"--adapter {adapter}", config_sdxl.parse)
        assert drawn == pytest.approx(0.0033 * compare.NEAR[adapter], rel=0.05)
    with pytest.raises(ValueError, match="--adapter dora: expected one of"):
        check(parse(["--adapter", "dora"]))


@pytest.mark.slow
def test_tiny_imagenet_recipe_at_full_size(run_script, tmp_path):
    """ViT-B/16 and 200 classes for two steps, on a generated tree: only the weights are random."""
    tiny_imagenet(tmp_path / "data" / "tiny-imagenet-200")
    arguments = "--recipe tiny-imagenet-lora --weights none --limit 8 --batch-size 4 --epochs 1"
    process = run_script("train.py", *arguments.split(), "--out", "run")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    # 12 blocks, rank 4: q, k, v, out 4 x 6,144, the mlp 2 x 15,360; the head 200 x 769
    trainable = 12 * (4 * 6_144 + 2 * 15_360) + 200 * 769
    assert f"lora: {trainable:,} of" in process.stdout
    assert re.fullmatch(r"Validation Accuracy: \d+\.\d\d%", lines[-1])
    model, info = vit.load_adapter(tmp_path / "run" / "adapter.safetensors")
    assert info["preprocessing"]["image_size"] == 224 and info["classes"][3] == "thing 3"
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 200)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    wanted = {"rank": 4, "alpha": 32, "lr": 1e-3, "weight_decay": 0.03, "head_dropout": 0.1}
    assert {key: config[key] for key in wanted} == wanted


SLICE = ["beignets", "bruschetta", "chicken_wings", "hamburger", "pork_chop", "prime_rib", "ramen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "trainable"), [("lora", 667_493), ("loha", 1_257_317), ("lokr", 116_069)]
)
def test_food101_recipes(adapter, trainable, tmp_path, capsys):
    """ViT-B/16 and 101 classes; only the weights are random, and the images and batches smaller."""
    others = [f"dish_{i}" for i in range(94)]
    counts = (10, 1) if adapter == "lora" else (1, 1)
    food101(tmp_path / "data", SLICE + others, train=counts[0], test=counts[1])
    flags = f"--recipe food101-{adapter} --weights none --image-size 32 --batch-size 4"
    flags += f" --epochs 1 --workers 0 --data-dir {tmp_path}/data --out {tmp_path}/run"
    flags += "" if adapter == "lora" else " --limit 16"
    assert train.main(flags.split()) == 0
    said = capsys.readouterr().out
    dtype = "bfloat16" if devices.computes_bfloat16() else "float32"
    assert f"{adapter}: {trainable:,} of" in said and f"images, cpu, {dtype}\n" in said
    assert (
        f"on {63 if adapter == 'lora' else 16} images" in said
    )  # nine of ten of the seven classes
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    wanted = {"rank": 16, "alpha": 16, "lr": 5e-3, "grad_accum": 4, "targets": "query,value"}
    assert {key: config[key] for key in wanted} == wanted
    recipe = Config(recipe=f"food101-{adapter}")
    assert (recipe.weight_decay, recipe.clip_norm, recipe.warmup) == (0, 1, 0)
    assert (recipe.weights, recipe.batch_size, recipe.epochs, recipe.amp) == (
        "in21k",
        128,
        5,
        "fp16",
    )
    assert (recipe.adapter_dropout, recipe.module_dropout) == (
        (0.1, 0) if adapter == "lora" else (0, 0.1)
    )
    _, info = checkpoint.read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert len(info["classes"]) == 101 and info["classes"][0] == "beignets"


@pytest.mark.parametrize("adapter", METHODS)
def test_train_from_python_for_every_adapter(adapter, tmp_path):
    config = Config(adapter=adapter, out=str(tmp_path / "run"), **QUICK)
    result = train.train(config)
    assert 0 <= result["val_accuracy"] <= 1 and result["run_dir"] == str(tmp_path / "run")
    assert (result["trainable"] == result["total"]) == (adapter == "full")
    model, _ = vit.load_adapter(tmp_path / "run" / "adapter.safetensors")
    start, _ = vit.build("vit_mini", "embedded", 10)
    frozen = {name.replace(".linear.", "."): p for name, p in model.named_parameters()}
    moved = {
        name
        for name, p in start.named_parameters()
        if not torch.equal(p, frozen[name]) and not name.startswith("heads.")
    }
    assert bool(moved) == (adapter == "full"), "adapters and probe leave the trunk as it was"


def plain_loop(config, epochs, folder):
    """The trained tensors that minimal.py's loop leaves after the same batches: the oracle for train.py's."""
    torch.manual_seed(config.seed)
    model, _ = vit.build("vit_mini", "embedded", 10)
    adapt(model, "lora", config.rank, config.alpha)
    with SummaryWriter(folder) as writer:
        minimal.train(model, epochs, epochs[0], writer, config.lr, config.weight_decay)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def linear_schedule(lr, steps):
    """The rate of each step by torch's own schedule."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        yield schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("batch_size", "grad_accum"), [(20, 1), (5, 4), (4, 5)])
def test_the_loop_is_adamw_with_a_linear_schedule_whatever_the_accumulation(
    batch_size, grad_accum, tmp_path, monkeypatch, request
):
    """48 images in steps of 20: the third step of an epoch has 8, and weighs them as 8."""
    # float64: AdamW's first steps go by a gradient's sign, and rounding decides that of a zero
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    config = Config(
        limit=48,
        epochs=2,
        batch_size=batch_size,
        grad_accum=grad_accum,
        lr=1e-2,
        min_crop=0.5,
        flip=True,
        out=str(tmp_path / "run"),
    )
    run = train.prepare(config)
    wide = {
        "preprocessing": run.info["preprocessing"],
        "train": True,
        "min_crop": 0.5,
        "flip": True,
    }
    oracle = plain_loop(
        config,
        [list(data.batches(run.dataset.train, 20, epoch=epoch, **wide)) for epoch in range(2)],
        tmp_path / "oracle",
    )
    # the last epoch's tensors, not the best one's
    monkeypatch.setattr(checkpoint, "put", lambda model, tensors: None)
    train.fit(run)
    for name, p in run.model.named_parameters():
        if name in oracle:
            torch.testing.assert_close(p, oracle[name], rtol=1e-7, atol=1e-9, msg=name)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    assert rates == pytest.approx([1e-2 * (6 - step) / 6 for step in range(6)])
    assert rates == pytest.approx([*linear_schedule(1e-2, 6)])


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    accuracies = iter([(1.0, 0.5), (0.5, 0.8), (0.9, 0.3)])
    states = []

    def judged(model, *_):
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        return next(accuracies)

    monkeypatch.setattr(train, "evaluate", judged)
    run = train.prepare(Config(out=str(tmp_path / "run"), **{**QUICK, "epochs": 3}))
    result = train.fit(run)
    assert (result["val_accuracy"], result["best_epoch"]) == (0.8, 2)
    assert torch.equal(run.model.heads.head.weight, states[1]["model.heads.head.weight"])
    kept, _ = vit.load_adapter(tmp_path / "run" / "adapter.safetensors")
    head = kept.heads.head.weight
    assert torch.equal(head, states[1]["model.heads.head.weight"])
    assert not torch.equal(head, states[2]["model.heads.head.weight"])


def test_evaluation_counts_every_image_once():
    model = torch.nn.Linear(4, 3)
    images, labels = torch.randn(25, 4), torch.randint(3, (25,))
    batches = DataLoader(TensorDataset(images, labels), 10)
    loss, accuracy = train.evaluate(model, batches)
    logits = model(images)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_same_seed_same_result_bit_for_bit(tmp_path):
    files = {"dataset": "folder", "data_dir": pets(tmp_path / "pets")}  # for workers to read

    def tensors(name, **changed):
        settings = {**QUICK, **files, "adapter_dropout": 0.1, **changed}
        train.train(Config(out=tmp_path / name, **settings))
        return checkpoint.read_adapter(tmp_path / name / "adapter.safetensors")[0]

    children = multiprocessing.active_children()
    a, b, c = tensors("a"), tensors("b", workers=2), tensors("c", seed=1)
    assert {*multiprocessing.active_children()} <= {*children}, "its worker processes have ended"
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    ("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("off", torch.float32)]
)
def test_mixed_precision_computes_in_it_and_trains_float32_tensors(
    amp, dtype, tmp_path, monkeypatch
):
    scaled = []

    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            scaled.append(enabled)
            super().__init__(device, init_scale=256.0, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(devices, "computes_float16", lambda: True)
    run = train.prepare(Config(amp=amp, out=str(tmp_path / "run"), **QUICK))
    logits = {True: [], False: []}
    run.model.register_forward_hook(lambda model, _, out: logits[model.training].append(out.dtype))
    result = train.fit(run)
    assert logits[True] == [dtype] * 6, "three steps of two epochs, and none of them in eval mode"
    assert logits[False][:6] == [dtype] * 6
    assert scaled == [amp == "fp16"]
    tensors, _ = checkpoint.read_adapter(tmp_path / "run" / "adapter.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert math.isfinite(result["val_loss"])
    assert any(t.any() for name, t in tensors.items() if name.endswith("lora_B")), "it has stepped"


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bf16_where_the_gpu_has_it_and_fp16_where_it_emulates_it(
    native, dtype, monkeypatch
):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.pick_dtype(Config(), torch.device("cuda")) == dtype


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_auto_is_bf16_on_a_cpu_that_has_it_where_the_trunk_is_wide(name, monkeypatch):
    cpu, recipe = torch.device("cpu"), Config(recipe="food101-lora")  # which says fp16

    def found(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        widths = (0, 128, 192, 768)
        return [{devices.pick_dtype(c, cpu, w) for c in (Config(), recipe)} for w in widths]

    narrow, wide = {torch.float32}, {torch.bfloat16}
    assert found(**{name: True}) == [narrow, narrow, wide, wide]
    assert found(**{name: False, "avx512_f": True}) == 4 * [narrow]
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch before 2.11
    assert devices.pick_dtype(Config(), cpu, 768) == torch.float32


def test_a_recipe_s_fp16_is_for_gpus_and_a_cpu_refuses_to_be_told(monkeypatch, tmp_path, capsys):
    cpu, recipe, typed = torch.device("cpu"), Config(recipe="food101-lora"), Config(amp="fp16")
    assert recipe.amp == "fp16"
    assert devices.pick_dtype(recipe, cpu) == torch.float32
    for config in (recipe, typed):
        assert devices.pick_dtype(config, torch.device("cuda")) == torch.float16
    assert train.main(["--amp", "fp16", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--amp fp16: much slower than float32 on this CPU" in error
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True}, raising=False)
    assert devices.pick_dtype(recipe, cpu) == devices.pick_dtype(typed, cpu) == torch.float16


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (
            "cuda",
            "--device cuda: this machine has 2 GPUs for 4 processes; start one for each",
        ),
        ("auto", "--device cuda: this machine has 2 GPUs for 4 processes"),
        ("cuda:1", "--device cuda:1: under torchrun expected auto, cpu or cuda"),
    ],
)
def test_a_process_of_torchrun_without_a_gpu_says_so(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    for name, value in {**torchrun, "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        devices.join(device)


def test_all_gpus_are_used_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.many_gpus(torch.device("cuda"))
    assert not devices.many_gpus(torch.device("cuda:1")) and not devices.many_gpus(
        torch.device("cpu")
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not devices.many_gpus(torch.device("cuda"))


def test_test_split_is_evaluated_on_request_with_the_best_epoch(tmp_path):
    result = train.train(Config(test=True, out=str(tmp_path / "run"), **QUICK))
    model, info = vit.load_adapter(tmp_path / "run" / "adapter.safetensors")
    test = data.load("demo", limit=QUICK["limit"]).test
    loss, accuracy = train.evaluate(model, data.batches(test, 16, info["preprocessing"]))
    assert result["test_accuracy"] == accuracy
    assert result["test_loss"] == pytest.approx(loss, rel=1e-4)


def test_config_takes_what_python_has_for_paths_names_and_numbers(tmp_path):
    config = Config(
        out=tmp_path / "run",
        targets=["query", "mlp.0"],
        classes=["two", "one"],
        rank=np.int64(2),
        lr=np.float32(0.01),
        **QUICK,
    )
    result = train.train(config)
    _, info = vit.load_adapter(Path(result["run_dir"]) / "adapter.safetensors")
    assert (info["targets"], info["rank"]) == (["query", "mlp.0"], 2)
    for wrong, message in [
        ({"rank": 2.5}, "--rank 2.5: expected int"),
        ({"lr": "x"}, "--lr 'x'"),
        ({"flip": "no"}, "--flip 'no': expected True or False"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            Config(**wrong)
    with pytest.raises(ValueError, match=r"--targets \[\]: expected"):
        train.train(Config(targets=[]))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_best_epoch(
    tmp_path, monkeypatch, capsys
):
    step = train.train_step

    def breaks(*arguments):
        breaks.steps += 1
        return step(*arguments) * (math.nan if breaks.steps == 5 else 1)

    breaks.steps = 0
    monkeypatch.setattr(train, "train_step", breaks)
    flags = "--limit 48 --batch-size 16 --epochs 3 --out".split()
    assert train.main([*flags, str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert "the loss is nan at step 5" in error and "--lr" in error and "\n" not in error
    vit.load_adapter(tmp_path / "run" / "adapter.safetensors")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_broken_images_are_replaced_and_listed_or_stop_the_run(workers, tmp_path, capsys):
    files = sorted(pets(tmp_path / "pets", images=30).rglob("*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:700])
    flags = "--dataset folder --batch-size 8 --epochs 1 --workers".split()
    flags += [workers, "--data-dir", str(tmp_path / "pets"), "--out"]
    assert train.main([*flags, str(tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert said.count("cannot be read") == 1
    (listed,) = (tmp_path / "run" / "unreadable.txt").read_text().splitlines()
    assert str(files[3]) in listed and listed in said
    for file in files:
        file.write_bytes(file.read_bytes()[:700])
    assert train.main([*flags, str(tmp_path / "other")]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("train.py: 10 of 48 images cannot be read, which is over 1 %")


@pytest.mark.skipif(sys.platform != "linux", reason="the others have no such names")
def test_broken_images_whose_names_are_no_text_are_listed(tmp_path):
    files = sorted(pets(tmp_path / "pets", images=10).rglob("*.jpg"))
    files[3].write_bytes(b"")
    name = os.fsencode(files[3])[:-5] + b"\xff.jpg"
    os.rename(files[3], name)
    flags = "--dataset folder --batch-size 8 --epochs 1 --workers 0 --data-dir".split()
    flags += [str(tmp_path / "pets"), "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert os.path.basename(name) in (tmp_path / "run" / "unreadable.txt").read_bytes()


def test_a_broken_image_of_the_test_split_is_listed(tmp_path):
    pets(tmp_path / "pets", parts=("train", "val", "test"), images=4)
    bad = sorted((tmp_path / "pets" / "test").rglob("*.jpg"))[2]
    bad.write_bytes(b"")
    flags = "--dataset folder --batch-size 8 --epochs 1 --workers 0 --test --data-dir".split()
    assert train.main([*flags, str(tmp_path / "pets"), "--out", str(tmp_path / "run")]) == 0
    assert str(bad) in (tmp_path / "run" / "unreadable.txt").read_text("utf-8")


@pytest.mark.parametrize("flags", [["--dataset", "tiny-imagenet"], ["--cache"], []])
def test_data_may_be_read_only(flags, tmp_path):
    """Nothing is written where the data lies: its files and folders stay, with their times."""
    root = tmp_path / "tiny-imagenet-200"
    if "tiny-imagenet" in flags:
        tiny_imagenet(root, classes=4)
    else:
        pets(root)

    def content():
        return {path: path.stat().st_mtime_ns for path in [root, *root.rglob("*")]}

    before = content()
    flags = ["--dataset", "folder", *flags, "--data-dir", str(root), "--out", str(tmp_path / "run")]
    flags += "--batch-size 8 --epochs 1 --image-size 28 --workers 2".split()
    assert train.main(flags) == 0
    assert content() == before


@pytest.mark.parametrize(
    ("config", "advice"),
    [
        (
            {"batch_size": 64},
            "try --batch-size 32 --grad-accum 2, which learns the same; or --amp bf16",
        ),
        ({"batch_size": 15, "grad_accum": 2}, "try --batch-size 5 --grad-accum 6, which"),
        ({"batch_size": 1}, "; try --amp bf16"),
        ({"batch_size": 1, "amp": "fp16"}, "; try a smaller --image-size"),
    ],
    ids=str,
)
def test_what_to_try_where_memory_ends_learns_the_same(config, advice):
    said = devices.memory_advice(Config(**config), MemoryError("all of it").with_traceback(None))
    assert advice.replace("; try", "(all of it); try") in said


def test_a_config_json_that_is_no_run_s_stays(tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "vit"}')
    assert train.main(["--limit", "20", "--epochs", "1", "--resume", "--out", str(tmp_path)]) == 2
    assert f"{file} is not the file of a run" in capsys.readouterr().err
    assert file.read_text() == '{"model_type": "vit"}'


@pytest.mark.parametrize("name", ["adapter.safetensors", "last.pt"])
def test_files_of_another_run_are_not_overwritten(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / ".mine.tmp").write_bytes(b"somebody's")
    assert train.main(["--limit", "20", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name, ".mine.tmp"}


def test_runs_that_start_in_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")
    folders = [make_folder(Config(), None)[0].name for _ in range(3)]
    name = "demo-lora-0-20260101-120000"
    assert folders == [name, f"{name}-2", f"{name}-3"]


def test_recipe_then_flags():
    tiny = Config(recipe="tiny-imagenet-lora")
    assert (tiny.dataset, tiny.weight_decay, tiny.rank) == ("tiny-imagenet", 0.03, 4)
    assert Config(recipe="tiny-imagenet-lora", rank=8).rank == 8
    assert parse([]) == Config()
    parsed = parse("--recipe tiny-imagenet-lora --rank 8 --no-flip --classes a,b".split())
    assert parsed == Config("tiny-imagenet-lora", rank=8, flip=False, classes="a,b")
    assert parsed.alpha == 32 and isinstance(parsed.alpha, float)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--recipe nothing", "--recipe nothing: expected one of demo"),
        ("--dataset mnist", "--dataset mnist: expected one of demo"),
        ("--dataset tiny-imagenet", "Tiny-ImageNet not found: looked in"),
        ("--dataset folder --data-dir nowhere", "--data-dir nowhere: no such folder"),
        ("--classes eleven", "'eleven'; did you mean seven"),
        ("--adapter dora", "--adapter dora: expected one of lora, loha, lokr, head, full"),
        ("--rank 0", "--rank 0: expected >= 1"),
        ("--rank 129", "expected at most 128"),
        ("--alpha 0", "--alpha 0.0: expected > 0"),
        ("--targets nothing", "matches no nn.Linear; the model has: encoder.layers"),
        ("--weights nowhere.pth", "no such file, and no such name"),
        (
            "--model vit_b_16 --weights embedded",
            "expected 16, found 7: these are another model's weights",
        ),
        ("--image-size 30", "multiple of the patch size, 7"),
        ("--epochs 0", "--epochs 0: expected >= 1"),
        ("--lr -1", "--lr -1.0: expected in (0, 1000]"),
        ("--lr nan", "--lr nan: expected in (0, 1000]"),
        ("--min-crop 0", "--min-crop 0.0: expected in (0, 1]"),
        ("--head-dropout 1", "--head-dropout 1.0: expected in [0, 1)"),
        ("--limit 0", "--limit 0: expected >= 1"),
        ("--device cuda:99", "--device cuda:99: cannot be used"),
        ("--out /dev/null/run", "--out /dev/null/run: cannot be made, /dev/null is not a folder"),
        ("--image-size 0", "--image-size 0: expected >= 1"),
        ("--factor 0", "--factor 0: expected any whole number but 0"),
        ("--lr 1e39", "--lr 1e+39: expected in (0, 1000]"),
        ("--alpha inf", "--alpha inf: expected > 0"),
        ("--seed 99999999999", "--seed 99999999999: expected in 0..4294967295"),
        ("--device meta", "--device meta: cannot be used"),
        ("--data-dir .", "did you mean --dataset folder?"),
        ("--targets query,vlaue", "target 'vlaue' matches no nn.Linear"),
        (
            "--targets query,head",
            "targets: heads.head is the head, which trains as a whole: leave it out",
        ),
        ("--workers 100000", "--workers 100000: expected in 0.."),
        ("--rank four", "argument --rank: invalid int value: 'four'; see --help"),
        ("--save-minutes -1", "--save-minutes -1.0: expected >= 0"),
        ("--save-minutes nan", "--save-minutes nan: expected >= 0"),
        ("--grad-accum 0", "--grad-accum 0: expected >= 1"),
        (
            "--limit 20 --batch-size 8 --grad-accum 4",
            "--grad-accum 4: expected at most 3, the batches",
        ),
        ("--batch-size 0", "--batch-size 0: expected >= 1"),
        ("--weight-decay -1", "--weight-decay -1.0: expected >= 0"),
        ("--workers -1", "--workers -1: expected in 0.."),
        ("--holdout 1", "--holdout 1.0: expected in [0, 1)"),
        ("--adapter-dropout -0.1", "--adapter-dropout -0.1: expected in [0, 1)"),
        ("--module-dropout 1", "--module-dropout 1.0: expected in [0, 1)"),
        ("--resume", "--resume: expected --out as well"),
        ("--ranks 4", "unrecognized arguments: --ranks 4; see --help"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(flags.split()) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors and errors.startswith("train.py: ")
    assert "\n" not in errors
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_run_is_never_overwritten(tmp_path, capsys):
    train.train(Config(out=str(tmp_path / "run"), **QUICK))
    before = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    assert train.main(["--out", str(tmp_path / "run"), "--limit", "20"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == before


def test_status_2_and_no_traceback_as_a_process(run_script):
    process = run_script("train.py", "--rank", "0")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "train.py: --rank 0: expected >= 1\n"


def test_autocast_reaches_the_threads_of_data_parallel():
    forward = Autocast(torch.nn.Linear(4, 3), torch.device("cpu"), torch.bfloat16)
    dtypes = []
    thread = threading.Thread(target=lambda: dtypes.append(forward(torch.ones(1, 4)).dtype))
    thread.start()
    thread.join()
    assert dtypes == [torch.bfloat16]
