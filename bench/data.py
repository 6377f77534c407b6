"""How fast images arrive: data.py against torchvision's usual pipeline, in one run on generated files.

    python bench/data.py                    # writes bench/data.md

The usual pipeline is torchvision's ImageFolder with RandomResizedCrop, RandomHorizontalFlip, ToTensor and
Normalize in a DataLoader with as many workers. Both give float32 batches of 64, augmented and normalised,
on the device. Rounds alternate, and each figure is the median of its rounds. On a CPU, the process keeps
freed memory, as in train.py (devices.keep_freed_memory), for both.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from engine.devices import keep_freed_memory  # noqa: E402
from engine.images import Split, keep, usable  # noqa: E402
from engine.report import commit  # noqa: E402

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop": 224 / 256}
BATCH = 64


def write_images(root: Path, count: int, size: tuple[int, int]) -> None:
    """Write class folders of JPEGs with as much detail as photographs: noise at every scale, about 1 / f."""
    rng = np.random.default_rng(0)
    wide, high = size
    for i in range(count):
        pixels = np.zeros((high, wide, 3))
        for octave in range(2, int(np.log2(max(size))) + 1):
            cells = rng.normal(size=(max(1, high >> octave) + 1, max(1, wide >> octave) + 1, 3))
            layers = [
                Image.fromarray(cells[..., c]).resize(size, Image.Resampling.BICUBIC)
                for c in range(3)
            ]
            pixels += 2.0**octave * np.stack([np.asarray(layer) for layer in layers], -1)
        pixels = 128 + 55 * pixels / pixels.std() + rng.normal(0, 4, pixels.shape)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SHARPEN)
        path = root / f"class{i % 10}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=85)


def usual(root: Path, size: int, device: torch.device, workers: int):
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET["mean"], IMAGENET["std"]),
        ]
    )
    folder = datasets.ImageFolder(root, transform)
    pinned = device.type == "cuda"
    loader = DataLoader(folder, BATCH, shuffle=True, num_workers=workers, pin_memory=pinned)
    for images, labels in loader:
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def seconds(batches, device: torch.device) -> float:
    """The time until the last batch has arrived."""
    start = time.perf_counter()
    for images, _ in batches:
        assert images.dtype == torch.float32
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(count: int, source: tuple[int, int], size: int, cache: bool, options) -> dict:
    """Images/s of the usual pipeline, of ours over all epochs, and of ours after the first, which decodes."""
    device, workers = options.device, options.workers
    preprocessing = {**IMAGENET, "image_size": size}
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        write_images(root, count, source)
        files = sorted(str(path) for path in root.rglob("*.jpg"))
        for turn in range(options.rounds):
            split = Split(np.zeros(count, np.int64), files)
            times = []
            for epoch in range(options.epochs):
                start = time.perf_counter()
                if epoch == 0:
                    keep(split, Path(folder) / f"cache{turn}", size, cache, workers)
                # None: kept images need no worker processes if the device is a CPU.
                processes = workers if split.pixels is None else None
                batches = data.batches(
                    split, BATCH, preprocessing, device, train=True, epoch=epoch, workers=processes
                )
                seconds(batches, device)
                times.append(time.perf_counter() - start)
                theirs.append(seconds(usual(root, size, device, workers), device))
            ours.append(times)
    usual_rate = count / statistics.median(theirs)
    all_epochs = statistics.median(count * options.epochs / sum(times) for times in ours)
    later = statistics.median(count / t for times in ours for t in times[1:])
    return {"usual": usual_rate, "all": all_epochs, "later": later}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--workers", type=int, default=usable(None))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--images", type=int, default=4000, help="number of small images; large ones: an eighth"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "data.md")
    options = parser.parse_args()
    keep_freed_memory(options.device)
    many, few = options.images, options.images // 8
    rows = [
        ("64 px JPEG, for 224 px", many, (64, 64), 224, False),
        ("64 px JPEG, for 64 px", many, (64, 64), 64, False),
        ("512 x 384 JPEG, for 224 px", few, (512, 384), 224, False),
        ("512 x 384 JPEG, for 224 px, `--cache`", few, (512, 384), 224, True),
    ]
    lines = [
        "| images | usual, images/s | ours, after the first epoch | ours, "
        f"all {options.epochs} epochs |",
        "|---|---|---|---|",
    ]
    for title, count, source, size, cache in rows:
        rates = measure(count, source, size, cache, options)
        lines.append(
            f"| {title} | {rates['usual']:,.0f} | {rates['later']:,.0f} "
            f"({rates['later'] / rates['usual']:.1f} x) | {rates['all']:,.0f} "
            f"({rates['all'] / rates['usual']:.1f} x) |"
        )
        print(lines[-1], flush=True)
    name = f" {torch.cuda.get_device_name(options.device)}" if options.device.type == "cuda" else ""
    text = "\n".join(
        [
            "# Images/s of the input path",
            "",
            *lines,
            "",
            f"Batches of {BATCH}, {options.workers} workers, medians of {options.rounds} alternating rounds "
            f"of {options.epochs} epochs, {many:,} small and {few:,} large generated images, on "
            f"{options.device}{name}, {len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python "
            f"{platform.python_version()}, torch {torch.__version__}, torchvision "
            f"{torchvision.__version__}, Pillow {PIL.__version__}{commit()}.",
            "",
        ]
    )
    options.out.write_text(text)


if __name__ == "__main__":
    main()
