"""Images/s of whole training runs: train.py against transformers' Trainer with peft, in one run.

    pip install peft transformers accelerate
    python bench/end_to_end.py                         # writes bench/end_to_end.md

Both train the same adapter in every linear layer of a ViT-B/16 with random weights, on the same generated
JPEGs, with AdamW, the same batch size, number of steps and number of workers. Each reads images in its usual
way: train.py decodes at the scale that a crop needs, the Trainer uses torchvision's ImageFolder with
RandomResizedCrop, flip and Normalize. Evaluation, loading and saving are not measured. Rounds alternate; a
figure is the median of its rounds. On a CPU, the process keeps freed memory (devices.keep_freed_memory), for
both. --amp auto leaves the precision to each: train.py takes bfloat16 where the processor computes it, the
Trainer float32.
"""

import argparse
import contextlib
import io
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from torchvision import datasets, transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from engine.config import Config  # noqa: E402
from engine.devices import keep_freed_memory  # noqa: E402
from engine.report import commit  # noqa: E402

CONFIGS = {
    "lora": lambda r: peft.LoraConfig(r=r, lora_alpha=r, target_modules="all-linear"),
    "loha": lambda r: peft.LoHaConfig(r=r, alpha=r, target_modules="all-linear"),
    "lokr": lambda r: peft.LoKrConfig(r=r, alpha=r, target_modules="all-linear"),
}


def write_images(root: Path, count: int) -> None:
    """Write two classes of 512 x 384 JPEGs of smooth noise, count in train/ and two in val/."""
    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("val", 2)):
        for i in range(n):
            path = root / split / f"class{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cells = rng.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(cells).resize((512, 384), Image.Resampling.BICUBIC).save(path)


def with_train(kind: str, root: Path, out: Path, options) -> float:
    config = Config(
        recipe="tiny-imagenet-lora",
        dataset="folder",
        data_dir=str(root),
        weights="none",
        adapter=kind,
        rank=options.rank,
        alpha=options.rank,
        epochs=1,
        batch_size=options.batch,
        workers=options.workers,
        device=options.device,
        amp=options.amp,
        out=str(out),
        cache_dir=str(out / "cache"),
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train.train(config)["images_per_second"]


def with_trainer(kind: str, root: Path, out: Path, options) -> float:
    trunk = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=2))
    model = peft.get_peft_model(trunk, CONFIGS[kind](options.rank))
    for parameter in model.base_model.model.classifier.parameters():
        parameter.requires_grad_(True)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=options.device == "cpu",
        bf16=options.amp == "bf16",
        fp16=options.amp == "fp16",
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=datasets.ImageFolder(root / "train", transform),
        data_collator=lambda pairs: {
            "pixel_values": torch.stack([image for image, _ in pairs]),
            "labels": torch.tensor([label for _, label in pairs]),
        },
    )
    with contextlib.redirect_stdout(io.StringIO()):
        return trainer.train().metrics["train_samples_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16", "auto"), default="off")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "end_to_end.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory(torch.device(options.device))
    transformers.logging.set_verbosity_error()
    lines = ["| | Trainer and peft, images/s | train.py, images/s | ratio |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_images(root, options.steps * options.batch)
        for kind in options.kinds:
            rates = []
            for turn in range(options.rounds):
                out = Path(folder) / f"{kind}{turn}"
                ours = with_train(kind, root, out / "ours", options)
                rates.append((with_trainer(kind, root, out / "theirs", options), ours))
            theirs, ours = (statistics.median(column) for column in zip(*rates, strict=True))
            ratio = statistics.median(b / a for a, b in rates)
            lines.append(f"| {kind} | {theirs:.2f} | {ours:.2f} | {ratio:.2f} |")
            print(lines[-1], flush=True)
    packages = ("torch", "torchvision", "peft", "transformers")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    conditions = (
        f"ViT-B/16, all linear layers, rank {options.rank}, batch {options.batch}, {options.steps} steps, "
        f"medians of {options.rounds} paired rounds, {options.device}, amp {options.amp}, "
        f"{options.threads} threads, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, "
        f"Python {platform.python_version()}, {versions}{commit()}."
    )
    text = ["# Images/s of a training run", "", *lines, "", conditions, ""]
    options.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
