"""Name the class of each image, with an adapter file from train.py or export.py.

    python predict.py runs/x/adapter.safetensors photo.jpg             # the class and the top 5
    python predict.py runs/x/adapter.safetensors photos/ more.png      # one line for each image
    python predict.py runs/x/adapter.safetensors photos/ --json        # one JSON object for each image
    python predict.py runs/x/adapter.safetensors photos/ --figure sheet.png

Images are prepared as in train.py's evaluation. An image that cannot be read is named on stderr and left
out. Exit status: 0; 1 if an image was left out; 2 for a mistake of the user.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS

import vit
from data import images_below
from engine import pictures
from engine.config import Parser
from engine.devices import keep_freed_memory, pick_device
from engine.images import Crops, Split, usable

SHEET = 48  # most images on a contact sheet


def list_images(paths: list[str]) -> list[str]:
    """The files among the paths, and for each folder among them all images below it, sorted.

    Raises FileNotFoundError for a missing path, ValueError for a folder without images.
    """
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        images = images_below(path)[0] if os.path.isdir(path) else [path]
        if not images:
            raise ValueError(f"{path}: expected images ({', '.join(IMG_EXTENSIONS)}), found none")
        files += images
    return files


def readable(
    files: list[str], preprocessing: dict, batch_size: int, bad: list[str], workers: int | None
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield (files, images) in batches; images are float32 (B, 3, size, size), prepared as in evaluation.

    A file that cannot be read is left out, and the reason is appended to bad.
    """
    crops = Crops(Split(np.zeros(len(files), np.int64), files), preprocessing)
    chunks = torch.arange(len(files)).split(batch_size)
    requests = ([(row, None) for row in chunk.tolist()] for chunk in chunks)
    workers = usable(workers)
    loader = DataLoader(
        crops, batch_sampler=requests, num_workers=workers, collate_fn=crops.collate
    )
    for chunk, (images, errors) in zip(chunks, loader, strict=True):
        bad += [reason for _, _, reason in errors.values()]
        kept = [i for i in range(len(chunk)) if i not in errors]
        if kept:
            yield [files[chunk[i]] for i in kept], crops.normalise(images[kept])


@torch.inference_mode()
def predict(model: nn.Module, batches) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield (file, pixels (3, size, size), logits (classes,)) for each image in readable's batches."""
    for files, images in batches:
        device = next(model.parameters()).device
        yield from zip(files, images, model(images.to(device)).float().cpu(), strict=True)


def describe(file: str, logits: torch.Tensor, classes: list[str], top: int, form: str) -> str:
    """The text to print for an image. form: "json", "line" or "long"."""
    best = logits.softmax(-1).topk(min(top, len(classes)))
    guesses = [
        (classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    if form == "json":
        predictions = [{"class": name, "probability": p} for name, p in guesses]
        return json.dumps({"file": file, "predictions": predictions}, ensure_ascii=False)
    if form == "line":
        return f"{file}: {guesses[0][0]} {guesses[0][1]:.2%}"
    lines = [f"{p:8.2%}  {name}" for name, p in guesses]
    return "\n".join([f"Predicted class: {guesses[0][0]}", *lines])


def draw(path: str, shown: list, info: dict, title: str) -> None:
    """Draw the contact sheet: images with their predicted classes."""
    images = torch.stack([pixels for _, pixels, _ in shown])
    logits = torch.stack([logits for _, _, logits in shown])
    notes = [Path(file).name for file, _, _ in shown]
    colours = pictures.colours(images, info["preprocessing"])
    pictures.plot_predictions(colours, logits, None, info["classes"], path, title, notes)


def run(argv: list[str] | None) -> int:
    parser = Parser(description="Name the class of each image.")
    add = parser.add_argument
    add("adapter", help="adapter file, or the folder of its run")
    add("images", nargs="+", help="image files and folders of images")
    add("--top", type=int, default=5, help="classes to print for each image (default: 5)")
    add("--json", action="store_true", help="print one JSON object per line for each image")
    add("--figure", metavar="FILE", help=f"draw the first {SHEET} images and their classes")
    add("--batch-size", type=int, default=64, help="images in a forward pass (default: 64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, help="processes that decode images (default: one per core)")
    add("--weights", help="pretrained weights: a name or a file (default: as in training)")
    given = parser.parse_args(argv)
    for flag, value, least in (
        ("--top", given.top, 1),
        ("--batch-size", given.batch_size, 1),
        ("--workers", given.workers, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value}: expected >= {least}")
    if given.figure:
        pictures.check_figure(Path(given.figure), "--figure")
    device, files = pick_device(given.device), list_images(given.images)
    keep_freed_memory(device)
    model, info = vit.load_adapter(given.adapter, given.weights, device)
    single = len(files) == 1 and not os.path.isdir(given.images[0])
    form = "json" if given.json else "long" if single else "line"
    # A worker process takes a second to start, longer than few images take to decode.
    workers = 0 if given.workers is None and len(files) < 100 else given.workers
    bad, shown = [], []
    batches = readable(files, info["preprocessing"], given.batch_size, bad, workers)
    for file, pixels, logits in predict(model, batches):
        print(describe(file, logits, info["classes"], given.top, form))
        if given.figure and len(shown) < SHEET:
            shown.append((file, pixels, logits))
    for line in bad:
        print(f"predict.py: {line}", file=sys.stderr)
    if shown:
        count = len(files) - len(bad)
        prefix = f"the first {len(shown)} of {count} images, " if count > len(shown) else ""
        draw(given.figure, shown, info, prefix + given.adapter)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, 1 (an image was left out, or the reader of a pipe has closed it) or
    2 (a mistake, after one line on stderr)."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stdout lacks it
        sys.stdout.reconfigure(errors="surrogateescape")  # prints any file name byte for byte
    try:
        status = run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has closed the pipe, as | head does. At exit Python would try to write once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
