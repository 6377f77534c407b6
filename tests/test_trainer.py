"""train.py against the program of the documents: transformers' Trainer and peft, step by step."""

import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from hf import hf_vit
from trees import write_image

import export
import train
from engine import checkpoint, devices
from engine.config import Config

CLASSES = ["cat", "cow", "dog"]
EPOCHS, STEPS, BATCH = 3, 4, 4  # a step is two batches
CONFIGS = {
    "lora": lambda **both: peft.LoraConfig(r=16, lora_alpha=16, **both),
    "loha": lambda **both: peft.LoHaConfig(r=16, alpha=16, **both),
    "lokr": lambda **both: peft.LoKrConfig(r=16, alpha=16, **both),
}


def images_and_labels():
    """(images, labels) in the order of an epoch, normalised, with a class to be seen in each image."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(len(CLASSES), (2 * STEPS * BATCH,), generator=generator)
    images = torch.randn(len(labels), 3, 28, 28, generator=generator)
    return images + labels.view(-1, 1, 1, 1), labels


class InOrder(transformers.Trainer):
    """Trainer without its shuffling."""

    def _get_train_sampler(self, dataset):
        return torch.utils.data.SequentialSampler(dataset)


def with_trainer(kind, folder):
    """Train as the guide does; (losses of the steps, trained tensors at the end, under our names)."""
    torch.manual_seed(0)
    trunk = hf_vit(CLASSES)
    trunk.save_pretrained(folder / "trunk")
    trunk.name_or_path = str(folder / "trunk")
    config = CONFIGS[kind](target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = peft.get_peft_model(trunk, config)
    model.save_pretrained(folder / "start")
    images, labels = images_and_labels()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        num_train_epochs=EPOCHS,
        learning_rate=5e-3,
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    pairs = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    trainer = InOrder(model, arguments, train_dataset=pairs)
    trainer.train()
    model.save_pretrained(folder / "end")
    history = trainer.state.log_history
    norms = [row["grad_norm"] for row in history if "grad_norm" in row]
    assert max(norms) > 2, "gradients must be large enough to be clipped"
    export.from_peft(folder / "end", folder / "end.safetensors", classes=",".join(CLASSES))
    tensors, _ = checkpoint.read_adapter(folder / "end.safetensors")
    return [row["loss"] for row in history if "loss" in row], tensors


def with_train(kind, folder, monkeypatch, **changed):
    """The same of train.py, with the recipe, the same batches and the adapter that they started from."""
    for label, name in enumerate(CLASSES):
        for i in range(
            11
        ):  # as many for training as there are in images_and_labels, one to validate
            write_image(folder / "pets" / "train" / name / f"{i}.png", label, i, (28, 28))
        write_image(folder / "pets" / "val" / name / "0.png", label, 0, (28, 28))
    images, labels = images_and_labels()
    usual, steps, step = train.load_batches, [], train.train_step

    def load_batches(run, split, train=False, start=0):
        if train:
            return zip(images.split(BATCH), labels.split(BATCH), strict=True)
        return usual(run, split)

    def train_step(run, *arguments):
        steps.append((step(run, *arguments), checkpoint.trained(run.model)))
        return steps[-1][0]

    monkeypatch.setattr(train, "load_batches", load_batches)
    monkeypatch.setattr(train, "train_step", train_step)
    settings = {"dataset": "folder", "data_dir": folder / "pets", "classes": "", "limit": 32}
    settings |= {"holdout": 0.0, "adapter_dropout": 0.0, "module_dropout": 0.0, "amp": "off"}
    settings |= {"batch_size": BATCH, "grad_accum": 2, "epochs": EPOCHS, "workers": 0}
    settings |= {"init_adapter": folder / "start", "out": folder / "run"}
    config = Config(recipe=f"food101-{kind}", **settings | changed)
    train.train(config)
    shutil.rmtree(folder / "run")
    monkeypatch.undo()
    return [loss.item() for loss, _ in steps], steps[-1][1]


def distance(theirs, ours):
    """The largest relative difference of a tensor."""
    assert theirs.keys() == ours.keys()
    return max(((ours[key] - x).norm() / x.norm()).item() for key, x in theirs.items())


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_loss_and_the_adapter_are_trainer_s(kind, tmp_path, monkeypatch):
    expected, theirs = with_trainer(kind, tmp_path)
    losses, ours = with_train(kind, tmp_path, monkeypatch)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert distance(theirs, ours) < 1e-4
    for wrong in ({"clip_norm": 0}, {"weight_decay": 0.01}):  # the controls
        _, other = with_train(kind, tmp_path, monkeypatch, **wrong)
        assert distance(theirs, other) > 2e-4, wrong


@pytest.mark.parametrize("warmup", [0, 0.1, 0.25, 0.99])
def test_the_rate_is_that_of_transformers(warmup):
    steps = 37
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    rising = transformers.TrainingArguments(warmup_steps=warmup).get_warmup_steps(steps)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, rising, steps)
    for step in range(steps):
        assert train.rate(step, steps, warmup) == pytest.approx(
            schedule.get_last_lr()[0], abs=1e-12
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_norm_is_clipped_without_the_loss_scale(dtype):
    """The update of SGD with rate 1 is the gradient."""
    model = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(model.weight, 0.5)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    config = Config(batch_size=2, grad_accum=2, clip_norm=0.25)
    run = SimpleNamespace(config=config, device=torch.device("cpu"))
    batches = iter([(torch.eye(3)[:2] * 9, torch.tensor([0, 1]))] * 2)
    forward = devices.Autocast(model, run.device, dtype)
    train.train_step(run, forward, batches, 4, optimizer, scaler)
    update = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert update.norm().item() == pytest.approx(0.25, rel=1e-3)
