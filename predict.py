"""Name the class of each image, with an adapter file from train.py or export.py.

    python predict.py runs/x/adapter.safetensors photo.jpg             # the class and the top 5
    python predict.py runs/x/adapter.safetensors photos/ more.png      # one line for each image
    python predict.py runs/x/adapter.safetensors photos/ --json        # one JSON object for each image
    python predict.py runs/x/adapter.safetensors photos/ --figure sheet.png
    python predict.py peft-folder/ photos/                             # also what PEFT trained
    python predict.py fold0/ fold1/ fold2/ photos/ --flip              # mean of runs, and of mirror images
    python predict.py runs/x/ photos/ --csv answers.csv                # file, class, probability
    python predict.py runs/x/ test/ --submission sample_submission.csv # writes submission.csv, as Kaggle asks

Images are prepared as in train.py's evaluation. An image that cannot be read is named on stderr and left
out. Exit status: 0; 1 if an image was left out; 2 for a mistake of the user.
"""

import csv
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
from engine import pictures
from engine.checkpoint import ADAPTER_FILE
from engine.config import Parser
from engine.devices import keep_freed_memory, out_of_memory, pick_device
from engine.files import atomic
from engine.images import Crops, Split, senders
from engine.peft_folder import CONFIG
from engine.pictures import shorten
from engine.start import load
from engine.submission import submission

SHEET = 48  # most images on a contact sheet
TEXT = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names may be any bytes


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
    loader = DataLoader(
        crops, batch_sampler=requests, num_workers=senders(workers), collate_fn=crops.collate
    )
    for chunk, (images, errors) in zip(chunks, loader, strict=True):
        bad += [reason for _, _, reason in errors.values()]
        kept = [i for i in range(len(chunk)) if i not in errors]
        if kept:
            yield [files[chunk[i]] for i in kept], crops.normalise(images[kept])


class Mean(nn.Module):
    """The log of the mean probability (B, classes) of models and, with flip, of images and their mirrors."""

    def __init__(self, models: list[nn.Module], flip: bool):
        super().__init__()
        self.models, self.flip = nn.ModuleList(models), flip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        views = [images, images.flip(-1)] if self.flip else [images]
        parts = [model(view).float().softmax(-1) for model in self.models for view in views]
        return torch.stack(parts).mean(0).log()


def load_all(
    paths: list[str], weights: str | None, device: torch.device, flip: bool
) -> tuple[nn.Module, dict]:
    """(model, info of the first adapter). ValueError if two adapters do not answer the same question."""
    models, infos = zip(*(load(path, weights, device) for path in paths), strict=True)
    for path, info in zip(paths, infos, strict=True):
        for key in ("classes", "preprocessing"):
            if info[key] != infos[0][key]:
                raise ValueError(
                    f"{path}: {key}: expected those of {paths[0]}, found {shorten(str(info[key]), 80)}"
                )
    alone = len(models) == 1 and not flip
    return models[0] if alone else Mean(models, flip), infos[0]


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


def draw(path: Path, shown: list, info: dict, title: str) -> None:
    """Draw the contact sheet: images with their predicted classes."""
    images = torch.stack([pixels for _, pixels, _ in shown])
    logits = torch.stack([logits for _, _, logits in shown])
    notes = [Path(file).name for file, _, _ in shown]
    colours = pictures.colours(images, info["preprocessing"])
    pictures.plot_predictions(colours, logits, None, info["classes"], path, title, notes)


def write_csv(path: str, rows: list[list]) -> None:
    with atomic(Path(path)) as temporary, open(temporary, "w", newline="", **TEXT) as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def table(found: dict[str, torch.Tensor], classes: list[str], every: bool) -> list[list]:
    """The rows of --csv: file, class, probability; with every, then the probability of each class."""
    rows = [["file", "class", "probability", *(classes if every else [])]]
    for file, p in found.items():
        best = p.argmax()
        rows.append([file, classes[best], f"{p[best]:.6f}", *(f"{x:.6f}" for x in p if every)])
    return rows


def is_adapter(path: str) -> bool:
    """True for what can only be an adapter: a file of tensors, a run's folder, a PEFT folder."""
    names = (ADAPTER_FILE, CONFIG)
    return path.endswith(".safetensors") or any((Path(path) / name).is_file() for name in names)


def run(argv: list[str] | None) -> int:
    parser = Parser(description="Name the class of each image.")
    add = parser.add_argument
    add(
        "adapter", help="adapter file, run's folder or PEFT folder; several: their mean probability"
    )
    add("images", nargs="+", help="image files and folders of images")
    add(
        "--top",
        type=int,
        default=5,
        help="classes to print for one image, or with --json (default: 5)",
    )
    add("--json", action="store_true", help="print one JSON object per line for each image")
    add("--csv", metavar="FILE", help="write file, class and probability of each image")
    add(
        "--probabilities",
        action="store_true",
        help="in --csv, a column for each class; in --submission, probabilities",
    )
    add(
        "--submission",
        metavar="SAMPLE",
        help="write --csv (default: submission.csv) like this file",
    )
    add("--flip", action="store_true", help="mean probability of each image and its mirror image")
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
    if given.probabilities and not (given.csv or given.submission):
        parser.error("--probabilities: only with --csv or --submission")
    adapters = [given.adapter]
    while given.images and is_adapter(given.images[0]):
        adapters.append(given.images.pop(0))
    if not given.images:
        raise ValueError(f"{adapters[-1]}: expected images after the adapters; see --help")
    target = given.csv or ("submission.csv" if given.submission else None)
    if target and not Path(target).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--csv {target}: {Path(target).parent} is not a folder; make it first"
        )
    if given.figure:
        pictures.check_figure(Path(given.figure), "--figure")
    device, files = pick_device(given.device), list_images(given.images)
    keep_freed_memory(device)
    model, info = load_all(adapters, given.weights, device, given.flip)
    single = len(files) == 1 and not os.path.isdir(given.images[0])
    form = "json" if given.json else "long" if single else "line"
    # A worker process takes a second to start, longer than few images take to decode.
    workers = 0 if given.workers is None and len(files) < 100 else given.workers
    bad, shown, found = [], [], {}
    batches = readable(files, info["preprocessing"], given.batch_size, bad, workers)
    for file, pixels, logits in predict(model, batches):
        found[file] = logits.softmax(-1)
        if not target or given.json:
            print(describe(file, logits, info["classes"], given.top, form))
        if given.figure and len(shown) < SHEET:
            shown.append((file, pixels, logits))
    if given.submission:
        rows, left = submission(given.submission, found, info["classes"], given.probabilities)
        bad += [f"{given.submission}: {name}: no image, its row stays as it is" for name in left]
        write_csv(target, rows)
    elif target:
        write_csv(target, table(found, info["classes"], given.probabilities))
    if target:
        print(f"{target}: {len(found)} images")
    for line in bad:
        print(f"predict.py: {line}", file=sys.stderr)
    if shown:
        count = len(found)
        prefix = f"the first {len(shown)} of {count} images, " if count > len(shown) else ""
        draw(Path(given.figure), shown, info, prefix + ", ".join(adapters))
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
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "predict.py: out of memory; try a smaller --batch-size, or --device cpu",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
