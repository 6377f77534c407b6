"""Say what is on images, with an adapter file that train.py wrote or export.py brought in.

    python predict.py runs/x/adapter.safetensors photo.jpg             # the class and the top 5
    python predict.py runs/x/adapter.safetensors photos/ more.png      # one line for each image
    python predict.py runs/x/adapter.safetensors photos/ --json        # one JSON object for each image
    python predict.py runs/x/adapter.safetensors photos/ --figure sheet.png

Images are prepared as in the evaluation of training. Exit status 0; 1 if images could not be read, which are
named on stderr and left out; 2 for a mistake.
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

from data import images_below
from engine import checkpoint, pictures
from engine.config import Parser
from engine.devices import keep_freed_memory, pick_device
from engine.images import Crops, Split, usable

SHEET = 48  # images on a contact sheet, at most


def list_images(paths: list[str]) -> list[str]:
    """The files among the paths, and the images below the folders among them, sorted.

    Raises FileNotFoundError for a path that is not there, ValueError for a folder without images.
    """
    files = []
    for path in paths:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such file or folder")
        found = images_below(path)[0] if os.path.isdir(path) else [path]
        if not found:
            raise ValueError(f"{path}: expected images ({', '.join(IMG_EXTENSIONS)}), found none")
        files += found
    return files


def readable(
    files: list[str], preprocessing: dict, batch_size: int, bad: list[str], workers: int | None
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield batches of files and their images, float32 (B, 3, size, size), as evaluation prepares them.

    A file that is no image is left out; what is wrong with it goes to bad.
    """
    crops = Crops(Split(np.zeros(len(files), np.int64), files), preprocessing)
    chunks = torch.arange(len(files)).split(batch_size)
    asked = ([(row, None) for row in chunk.tolist()] for chunk in chunks)
    workers = usable(workers)
    loader = DataLoader(crops, batch_sampler=asked, num_workers=workers, collate_fn=crops.collate)
    for chunk, (images, errors) in zip(chunks, loader, strict=True):
        bad += [reason for _, _, reason in errors.values()]
        kept = [i for i in range(len(chunk)) if i not in errors]
        if kept:
            yield [files[chunk[i]] for i in kept], crops.normalise(images[kept])


@torch.inference_mode()
def predict(model: nn.Module, batches) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """For each image of readable's batches its file, its pixels (3, size, size), its logits (classes,)."""
    for files, images in batches:
        device = next(model.parameters()).device
        yield from zip(files, images, model(images.to(device)).float().cpu(), strict=True)


def describe(file: str, logits: torch.Tensor, classes: list[str], top: int, form: str) -> str:
    """What is printed of an image. form: "json", "line" or "long"."""
    best = logits.softmax(-1).topk(min(top, len(classes)))
    found = [
        (classes[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    if form == "json":
        guesses = [{"class": name, "probability": p} for name, p in found]
        return json.dumps({"file": file, "predictions": guesses}, ensure_ascii=False)
    if form == "line":
        return f"{file}: {found[0][0]} {found[0][1]:.2%}"
    lines = [f"{p:8.2%}  {name}" for name, p in found]
    return "\n".join([f"Predicted class: {found[0][0]}", *lines])


def draw(path: str, shown: list, info: dict, title: str) -> None:
    """The contact sheet: images, and what the model says of them."""
    images = torch.stack([pixels for _, pixels, _ in shown])
    logits = torch.stack([logits for _, _, logits in shown])
    notes = [Path(file).name for file, _, _ in shown]
    colours = pictures.colours(images, info["preprocessing"])
    pictures.plot_predictions(colours, logits, None, info["classes"], path, title, notes)


def run(argv: list[str] | None) -> int:
    parser = Parser(description="Say what is on images.")
    add = parser.add_argument
    add("adapter", help="the adapter file, or the folder of its run")
    add("images", nargs="+", help="image files, and folders of them")
    add("--top", type=int, default=5, help="classes to name of each image (default: 5)")
    add("--json", action="store_true", help="print a JSON object on a line for each image")
    add("--figure", metavar="FILE", help=f"draw the first {SHEET} images and their classes")
    add("--batch-size", type=int, default=64, help="images to a forward (default: 64)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--workers", type=int, help="processes that decode images (default: one a core)")
    add("--weights", help="the trunk: a name or a file (default: where it was in training)")
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
    model, info = checkpoint.load_adapter(given.adapter, given.weights, device)
    alone = len(files) == 1 and not os.path.isdir(given.images[0])
    form = "json" if given.json else "long" if alone else "line"
    # a process that decodes takes a second to start
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
        read = len(files) - len(bad)
        some = f"the first {len(shown)} of {read} images, " if read > len(shown) else ""
        draw(given.figure, shown, info, some + given.adapter)
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    """Predict as the command line says; 0, 1 if images are left out or nobody reads on, or 2 after
    one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has none
        sys.stdout.reconfigure(errors="surrogateescape")  # a file's name comes out as it went in
    try:
        status = run(argv)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What reads this has had enough, as | head has. Python would try once more, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
