"""minimal.py: the command, the paste into a notebook, its folders of images, and what it counts."""

import ast
import gzip
import re
import runpy
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import LIMIT, ROOT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torchvision import models
from trees import pets, tiny_imagenet

import minimal
import vit
from lora import LoRALinear

SCRIPT = ROOT / "minimal.py"
CLASSES = ["cat", "dög 2"]  # of trees.pets
# A small stand-in for ViT-B/16 with its pixels and its classes.
STAND_IN = "VisionTransformer(224, 56, 1, 2, 16, 32)"
KERNEL = """
import sys
from pathlib import Path

from torchvision import models

try:
    import lora
    sys.exit("lora can be imported: this is no notebook's empty folder")
except ModuleNotFoundError:
    pass
models.vit_b_16 = lambda weights: models.{model}
sys.argv = ["ipykernel_launcher.py", "-f", "kernel.json"]  # what a notebook has there
cells = {{"__name__": "__main__"}}
for text in {texts!r}:
    exec(compile(text, "cell", "exec"), cells)
"""


def scalars(folder):
    """{tag: [(step, value), ...]} of the TensorBoard events in a folder."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture
def small(tmp_path, monkeypatch):
    """An empty folder, few digits, few epochs, and a small model in ViT-B/16's place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minimal, "digits", partial(minimal.digits, train=80, val=40))
    monkeypatch.setattr(minimal, "EPOCHS", 2)
    monkeypatch.setattr(minimal, "BATCH", 32)
    monkeypatch.setattr(models, "vit_b_16", lambda weights: eval(f"models.{STAND_IN}"))
    return tmp_path


@pytest.fixture
def seen(monkeypatch):
    """The arguments of each call of minimal.train, which still trains."""
    calls, whole = [], minimal.train

    def train(model, epochs, val, writer, lr):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        calls.append({"model": model, "epochs": epochs, "val": val, "lr": lr, "before": before})
        return whole(model, epochs, val, writer, lr)

    monkeypatch.setattr(minimal, "train", train)
    return calls


def test_it_is_short_and_needs_nothing_of_the_project_but_two_files():
    text = SCRIPT.read_text("utf-8")
    assert len(text.splitlines()) <= 110
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    names = {node.module.split(".")[0] for node in imports}
    plain = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)]
    names |= {alias.name.split(".")[0] for node in plain for alias in node.names}
    others = names - set(sys.stdlib_module_names)
    assert others == {"lora", "attention", "torch", "torchvision", "safetensors"}


def paste(folder, **constants):
    """Run lora.py, attention.py and minimal.py as three cells in an empty folder; the process."""
    texts = [(ROOT / name).read_text("utf-8") for name in ("lora.py", "attention.py", "minimal.py")]
    for name, value in constants.items():
        texts[2], count = re.subn(rf"(?m)^{name} = \S+", f"{name} = {value!r}", texts[2])
        assert count == 1
    (folder / "empty").mkdir()
    return subprocess.run(
        [sys.executable, "-I", "-c", KERNEL.format(model=STAND_IN, texts=texts)],
        cwd=folder / "empty",
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_pasted_below_the_two_files_it_trains(tmp_path):
    process = paste(tmp_path, DATA=str(pets(tmp_path / "pets", ("train", "val"))))
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    trainable = 4 * 4 * (16 + 16) + 2 * 4 * (16 + 32) + 2 * 17  # rank 4, one block, the head
    assert lines[0].startswith(f"{trainable} of ")
    assert re.fullmatch(r"Validation Accuracy: \d+\.\d\d%", lines[-1])
    (run,) = (tmp_path / "empty" / "runs").iterdir()
    assert len(scalars(run)["val/accuracy"]) == 5


def test_pasted_without_images_it_says_in_one_line_what_it_needs(tmp_path):
    process = paste(tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert str(tmp_path / "empty" / "assets") in line
    assert line.endswith("set DATA to a folder with train/<class>/")


@pytest.mark.slow
def test_the_command_learns_the_digits(run_script, tmp_path):
    process = run_script("minimal.py")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    # 6 layers, rank 4: q, k, v, out 4 x 1,024, the mlp 2 x 2,560; the head 10 x 129
    assert lines[0].startswith(f"{6 * (4 * 1024 + 2 * 2560) + 1290:,} of 1,")
    accuracy = float(re.fullmatch(r"Validation Accuracy: (\d+\.\d\d)%", lines[-1])[1])
    assert accuracy > 80
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    run, digits = sorted((tmp_path / "runs").iterdir())
    assert digits.name == "digits" and [path.name[:7] for path in run.iterdir()] == ["events."]
    assert len(list(digits.glob("train/?/*.png"))) == 4000
    assert len(list(digits.glob("val/?/*.png"))) == 2000
    shown = scalars(run)
    assert {tag: len(values) for tag, values in shown.items()} == {
        "train/loss": 315,  # 63 batches of 64 in each of five epochs
        "lr": 315,
        "val/accuracy": 5,
    }
    assert f"{shown['val/accuracy'][-1][1]:.2%}" == f"{accuracy:.2f}%"


def test_a_run_on_few_digits(small, seen, capsys):
    minimal.main()
    last = capsys.readouterr().out.splitlines()[-1]
    (run,) = small.glob("runs/*/events*")
    assert {path.name for path in small.iterdir()} == {"runs"}
    shown = scalars(run.parent)
    assert set(shown) == {"train/loss", "lr", "val/accuracy"}
    assert [step for step, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6]  # 32, 32 and 16 digits
    rates = [5e-3 * (6 - step) / 6 for step in range(6)]
    assert [rate for _, rate in shown["lr"]] == pytest.approx(rates, rel=1e-6)
    assert [step for step, _ in shown["val/accuracy"]] == [3, 6]
    assert last == f"Validation Accuracy: {shown['val/accuracy'][-1][1]:.2%}"
    (call,) = seen
    orders = [torch.cat([labels for _, labels in call["epochs"][0]]) for _ in range(2)]
    assert not torch.equal(*orders) and torch.equal(*(order.sort()[0] for order in orders))
    # The trunk is the one of vit.py, and stays as it is; adapters and head train.
    assert sum(isinstance(m, LoRALinear) for m in call["model"].modules()) == 36
    trunk = dict(vit.build("vit_mini", "embedded", 10)[0].named_parameters())
    for name, p in call["model"].named_parameters():
        assert p.requires_grad == (".lora_" in name or name.startswith("heads.head")), name
        assert torch.equal(p, call["before"][name]) != p.requires_grad, name
        if not p.requires_grad:
            assert torch.equal(p, trunk[name.replace(".linear.", ".")]), name


def test_few_digits_are_enough_to_learn_something(small, monkeypatch):
    monkeypatch.setattr(minimal, "digits", partial(minimal.digits.func, train=320, val=100))
    monkeypatch.setattr(minimal, "EPOCHS", 4)
    minimal.main()
    (run,) = small.glob("runs/*/events*")
    assert scalars(run.parent)["val/accuracy"][-1][1] > 0.3  # by chance 0.1


def test_the_digits_are_those_of_assets(small):
    folder = minimal.digits()
    pixels, labels = (
        np.frombuffer(
            gzip.decompress((ROOT / "assets" / f"{name}-ubyte.gz").read_bytes()), np.uint8
        )
        for name in ("digits-images-idx3", "digits-labels-idx1")
    )
    pixels, labels = pixels[16:].reshape(-1, 28, 28), labels[8:]
    for part, rows in (("train", range(80)), ("val", range(80, 120))):
        written = {(path.parent.name, path.name) for path in folder.glob(f"{part}/*/*")}
        assert written == {(str(labels[i]), f"{i}.png") for i in rows}
        for digit, name in written:
            with Image.open(folder / part / digit / name) as image:
                assert np.array_equal(np.asarray(image), pixels[int(name[:-4])])


def test_digits_are_shown_as_the_small_trunk_was_trained(small, seen):
    minimal.main()
    for dataset in (seen[0]["epochs"][0].dataset, seen[0]["val"].dataset):  # no augmentation
        image, label = dataset[3]
        path, expected = dataset.samples[3]
        with Image.open(path) as file:
            half = (np.asarray(file, np.float32) / 255 - 0.5) / 0.5
        assert label == expected
        np.testing.assert_allclose(image, np.broadcast_to(half, (3, 28, 28)), atol=1e-6)


@pytest.mark.slow
def test_photos_train_vit_b_16_from_its_pretrained_weights(small, seen, monkeypatch, capsys):
    """At full size, on four images: only the weights are random, as nothing is downloaded."""
    monkeypatch.undo()
    state, whole = models.vit_b_16().state_dict(), minimal.train
    monkeypatch.chdir(small)
    monkeypatch.setattr(minimal, "EPOCHS", 1)
    calls = []
    monkeypatch.setattr(minimal, "train", lambda *given: calls.append(given) or whole(*given))
    monkeypatch.setattr(models.ViT_B_16_Weights, "get_state_dict", lambda *_, **__: state)
    minimal.main(str(pets(small / "pets", ("train", "val"), images=2)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{12 * (4 * 6_144 + 2 * 15_360) + 2 * 769:,} of 86,")
    assert re.fullmatch(r"Validation Accuracy: \d+\.\d\d%", lines[-1])
    ((model, epochs, val, _, lr),) = calls
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert len(adapters) == 72 and {m.scale for m in adapters} == {8.0} and lr == 1e-3
    block = "encoder.layers.encoder_layer_7"
    value = model.get_submodule(f"{block}.self_attention.value").linear
    joined = state[f"{block}.self_attention.in_proj_weight"]
    assert torch.equal(value.weight, joined[2 * 768 :])
    # Validation sees the weights' own transforms, training a random crop of each image.
    prepare = models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    with Image.open(val.dataset.samples[1][0]) as file:
        assert torch.equal(val.dataset[1][0], prepare(file.convert("RGB")))
    crops = [epochs[0].dataset[1][0] for _ in range(2)]
    assert crops[0].shape == (3, 224, 224) and not torch.equal(*crops)


MARKED = (lambda image: "augmented", lambda image: "prepared")


def files(dataset):
    """The files of an ImageFolder or of a Subset of one, in its order."""
    if isinstance(dataset, torch.utils.data.Subset):
        return [dataset.dataset.samples[i][0] for i in dataset.indices]
    return [path for path, _ in dataset.samples]


def test_val_validates_and_is_not_augmented(tmp_path, capsys):
    folder = pets(tmp_path, ("train",), images=4)
    pets(tmp_path, ("val",), images=3)
    train, val, classes = minimal.load(folder, *MARKED)
    assert classes == CLASSES and capsys.readouterr().out == ""
    assert {change for change, _ in train} == {"augmented"} and len(train) == 8
    assert [(change, label) for change, label in val] == [("prepared", i // 3) for i in range(6)]
    assert all("/val/" in path for path in files(val))


@pytest.mark.parametrize("flat", [False, True])
def test_without_classes_in_val_every_tenth_training_image_validates(flat, tmp_path, capsys):
    folder = tiny_imagenet(tmp_path, 3, 20)
    if not flat:
        (folder / "val").rename(folder / "elsewhere")
    train, val, classes = minimal.load(str(folder), *MARKED)
    assert classes == ["n00000000", "n00000001", "n00000002"]
    assert "every tenth training image validates" in capsys.readouterr().out
    assert [label for _, label in val] == [0, 0, 1, 1, 2, 2] and len(train) == 54
    everything = sorted(map(str, folder.glob("train/*/images/*.JPEG")))
    assert sorted(files(train) + files(val)) == everything, "each image once"
    assert {change for change, _ in train} == {"augmented"}
    assert {change for change, _ in val} == {"prepared"}


def without_cat(folder, *parts):
    for part in parts:
        (folder / part / "cat").rename(folder / f"{part} cat")


SAME = "pets: train/ and val/ need the same two or more classes"
WRONG = {  # what is done to a good folder, and what the line says
    "no folder": (lambda folder: folder.rename(folder.with_name("moved")), "'pets/train'"),
    "no train": (lambda folder: (folder / "train").rename(folder / "training"), "'pets/train'"),
    "one class": (lambda folder: without_cat(folder, "train", "val"), SAME),
    "val has one class": (lambda folder: without_cat(folder, "val"), SAME),
    "train has one class": (lambda folder: without_cat(folder, "train"), SAME),
    "val has one more": (lambda folder: (folder / "val" / "cow").mkdir(), SAME),
    "an empty class": (lambda folder: (folder / "train" / "cow").mkdir(), "classes cow."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_one_line_and_status_2(case, small, monkeypatch, capsys):
    folder = pets(small / "pets", ("train", "val"), images=1)
    change, expected = WRONG[case]
    change(folder)
    monkeypatch.setattr(models, "vit_b_16", lambda weights: pytest.fail("downloads 330 MB first"))
    monkeypatch.setattr(sys, "argv", ["minimal.py", "pets"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("minimal.py: ") and expected in line
    assert not (small / "runs").exists()


def test_a_flag_that_it_does_not_have_is_one_line_too(small, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minimal.py", "pets", "--epochs", "3"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "pets --epochs 3" in line


class Spy(nn.Module):
    """A model that notes each forward: training or not, inference mode or not, images."""

    def __init__(self, model):
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, images):
        self.calls.append((self.training, torch.is_inference_mode_enabled(), len(images)))
        return self.model(images)


class Log:
    """What a SummaryWriter would be told."""

    def __init__(self):
        self.lines = []

    def add_scalar(self, tag, value, step):
        self.lines.append((tag, value, step))


def batches(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 6, dtype=torch.float64, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for size in sizes
    ]


def test_train_is_adamw_with_a_linear_schedule():
    """Against torch's own scheduler, on epochs of different batches, with a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.0), nn.Linear(5, 3)).double()
    model[0].weight.requires_grad_(False)
    oracle = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.0), nn.Linear(5, 3)).double()
    oracle.load_state_dict(model.state_dict())
    oracle[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    epochs, val = [batches([4, 4, 2], 1), batches([3, 3], 2)], batches([5], 3)

    trained = [oracle[0].bias, oracle[2].weight, oracle[2].bias]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=5)
    losses = []
    for images, labels in [*epochs[0], *epochs[1]]:
        loss = nn.functional.cross_entropy(oracle(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())

    spy, log = Spy(model), Log()
    accuracy = minimal.train(spy, epochs, val, log, lr=0.1, weight_decay=0.2)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert torch.equal(model[0].weight, frozen)
    told = {tag: [line[1] for line in log.lines if line[0] == tag] for tag, _, _ in log.lines}
    assert told["train/loss"] == pytest.approx(losses, rel=1e-10)
    assert told["lr"] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    assert len(told["val/accuracy"]) == 2 and told["val/accuracy"][1] == accuracy
    assert [step for tag, _, step in log.lines if tag == "val/accuracy"] == [3, 5]
    training, validating = (True, False), (False, True)
    modes = [training] * 3 + [validating] + [training] * 2 + [validating]
    assert [call[:2] for call in spy.calls] == modes


def test_evaluate_counts_every_image_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 3)).double()
    given = batches([10, 10, 3], 4)  # the last batch is smaller, and counts for less
    spy = Spy(model)
    accuracy = minimal.evaluate(spy, given)
    right = count = 0
    for images, labels in given:
        for image, label in zip(images.tolist(), labels.tolist(), strict=True):
            W, b = model[1].weight.tolist(), model[1].bias.tolist()
            logits = [
                sum(w * x for w, x in zip(row, image, strict=True)) + c
                for row, c in zip(W, b, strict=True)
            ]
            right += logits.index(max(logits)) == label
            count += 1
    assert (count, accuracy) == (23, right / 23)
    means = [(model[1](x).argmax(1) == y).double().mean().item() for x, y in given]
    assert accuracy != pytest.approx(sum(means) / 3), "control: a mean of batches would differ"
    assert spy.calls == [(False, True, 10), (False, True, 10), (False, True, 3)]


def test_with_gpus_every_batch_goes_through_data_parallel(small, monkeypatch):
    """No GPU is needed: what stands for DataParallel notes the batches."""
    spies = []

    def parallel(model):
        spies.append(Spy(model))
        return spies[-1]

    with pytest.MonkeyPatch.context() as gpu:

        def cuda(model):
            gpu.undo()  # the optimizer would look for the GPU too
            return model

        gpu.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(nn.Module, "cuda", cuda)
        monkeypatch.setattr(nn, "DataParallel", parallel)
        minimal.main()
    (spy,) = spies
    training = [(True, False, n) for n in (32, 32, 16)]
    validation = [(False, True, n) for n in (32, 8)]
    assert spy.calls == (training + validation) * 2


def test_the_seed_decides_the_result(small, monkeypatch):
    def losses():
        folders = set(small.glob("runs/*/events*"))
        minimal.main()
        (new,) = set(small.glob("runs/*/events*")) - folders
        values = scalars(new.parent)["train/loss"]
        new.unlink()
        return values

    first, second = losses(), losses()
    monkeypatch.setattr(minimal, "SEED", 1)
    assert first == second and first != losses()
