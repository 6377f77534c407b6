"""Data sets in, batches of images on the device out.

    dataset = load("food101", "data", limit=1000)  # class names and lists of files; nothing is decoded
    for images, labels in batches(dataset.train, 64, preprocessing, "cuda", train=True):
        ...                                        # float32 (64, 3, size, size), normalised; int64 (64,)

A split of small images, all of one size, that engine.images.keep has decoded is cropped, flipped, resized and
normalised on the GPU. Other images are cropped one by one, usually in worker processes, and normalised on the
device. Crops are drawn in the main process: a seed gives the same batches for any number of workers.

To add a data set, write a function that takes data_dir and returns (splits, class names), and list it in
SOURCES and in engine.config.DATASETS.
"""

import csv
import gzip
import hashlib
import json
import os
import pickle
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import ViT_B_16_Weights

from engine.files import printable
from engine.images import Crops, Requests, Split, ignore_interrupts, senders, stand_in, usable
from engine.tables import SAMPLES, TABLES, choose, labelled

ASSETS = Path(__file__).parent / "assets"


@dataclass
class Dataset:
    """A data set: its class names and its splits. Label i stands for classes[i]."""

    classes: list[str]
    train: Split
    val: Split
    test: Split | None = None

    def close(self) -> None:
        """End the worker processes that wait for the next epoch. The garbage collector would wait for each of
        them for seconds."""
        for split in (self.train, self.val, self.test):
            if split:
                split.idle.clear()


def load(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    classes: str | list[str] | None = None,
    download: bool = False,
    holdout: float = 0.0,
    folds: int | None = None,
    fold: int = 0,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Dataset:
    """Find a data set: its class names, and the files or pixels of its splits. Nothing is decoded yet.

    name: one of SOURCES.
    data_dir: its folder, or one above it; None searches ./data and /kaggle/input.
    limit: at most this many images of each split, spread evenly over the classes.
    classes: use only the images of these classes; the list of class names stays whole.
    download: download missing data into data_dir (or ./data); only for food101 and cifar100.
    holdout: fraction of the training images, after classes and limit, to validate on. The data set's own
        validation images then become its test split, unless it has one.
    folds, fold: as holdout, but with part number `fold`, from 0 on, of `folds` parts.
    labels, image_column, label_column: the table of csv, and its columns, where their names are not usual.

    Raises FileNotFoundError if the data is missing, ValueError if the data or an argument is wrong.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1 image of each split")
    if download and name not in DOWNLOADS:
        raise ValueError(
            f"--download: not possible for {name}; expected one of {', '.join(DOWNLOADS)}"
        )
    if (folds is not None and folds < 2) or not 0 <= fold < (folds or 1):
        raise ValueError(f"--fold {fold} --folds {folds}: expected folds >= 2, fold in 0..folds-1")
    if folds and holdout:
        raise ValueError(f"--folds {folds} and --holdout {holdout}: expected only one of them")
    table = {"labels": labels, "image_column": image_column, "label_column": label_column}
    table = {key: value for key, value in table.items() if value is not None}
    if table and name != "csv":
        key = next(iter(table))
        raise ValueError(
            f"--{key.replace('_', '-')} {table[key]}: only for --dataset csv, not {name}"
        )
    try:
        splits, names = SOURCES[name](data_dir, **table)
    except FileNotFoundError:
        if not download:
            raise
        fetch(name, data_dir or "data")
        splits, names = SOURCES[name](data_dir or "data")
    split_here = bool(holdout or folds) or "val" not in splits  # train and val are parts of one
    if "val" not in splits and not (holdout or folds):
        everything = splits["train"]
        parts = stratified(relative(everything.files), everything.labels, [0.8])
        splits |= zip(("train", "val"), map(everything.rows, parts), strict=True)
    wanted = classes.split(",") if isinstance(classes, str) else classes or []
    wanted = [name.strip() for name in wanted if name.strip()]
    for unknown in sorted(set(wanted) - set(names)):
        near = get_close_matches(unknown, names, n=3) or names[:3]
        raise ValueError(f"classes: {name} has no {unknown!r}; did you mean {', '.join(near)}?")
    chosen = np.isin(names, wanted or names)
    whole, rows_of = splits["train"], {}  # all training images; the rows that stay in each split
    for key, split in splits.items():
        rows = np.flatnonzero(chosen[split.labels])
        rows_of[key] = rows[even_rows(split.labels[rows], limit)] if limit else rows
        splits[key] = split.rows(rows_of[key])
    if holdout or folds:
        # Keys of the whole split: --classes must not change which images are held out.
        keys = relative(whole.files) if whole.files else [*map(str, range(len(whole)))]
        train, keys = splits["train"], [keys[row] for row in rows_of["train"]]
        if folds:
            ranks = hash_ranks(keys, train.labels)
            alone = np.bincount(train.labels)[train.labels] == 1  # a class's only image trains
            # By class, so that small classes do not all fill the first parts.
            held_out = ((ranks + train.labels) % folds == fold) & ~alone
            train_rows, val_rows = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        else:
            train_rows, val_rows = stratified(keys, train.labels, [1 - holdout])
        if "val" in splits:
            splits.setdefault("test", splits["val"])
        splits |= {"train": train.rows(train_rows), "val": train.rows(val_rows)}
    for key, split in splits.items():
        if not len(split):
            part = split_here and key != "test"
            hint = "a class needs two images to be split" if part else "is the data set complete?"
            hint = "check --classes" if wanted else "use fewer --folds" if folds else hint
            raise ValueError(f"{name}: the {key} split has no images; {hint}")
    return Dataset(names, **splits)


def batches(
    split: Split,
    batch_size: int,
    preprocessing: dict,
    device: torch.device | str = "cpu",
    train: bool = False,
    min_crop: float = 0.08,
    flip: bool = True,
    seed: int = 0,
    epoch: int = 0,
    workers: int | None = None,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images, labels) on the device, once through the split.

    preprocessing: vit.build's dict of image_size, mean, std, crop and interpolation.
    train: shuffle and augment, by seed and epoch. Otherwise: in order, the centre of each image.
    min_crop: the smallest random crop, as a fraction of the image's area; 1 takes the centre.
    flip: mirror each image left to right with probability one half.
    workers: processes that read images; None means one per usable core, or 0 if the images are kept and
        the device is a CPU. Kept small images of one size use none.
    start: images of this epoch to skip, which a resumed run has seen.
    part: (i, n) for process i of n, which share the images of each batch. A process left without an image
        gets the batch's first one, labelled -100, which cross_entropy ignores.

    Raises ValueError if ten or more files, and over 1 % of them, cannot be read.
    """
    device = torch.device(device)
    order, draws, reader = torch.arange(len(split)), None, None
    if train:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), 5, generator=generator)
    chunks, (i, n) = order[start:].split(batch_size), part
    shares = [chunk[i::n] if i < len(chunk) else chunk[:1] for chunk in chunks]
    crops = Crops(split, preprocessing, min_crop, flip)
    requests = (
        [(stand_in(split, row), None if draws is None else draws[row].tolist()) for row in share]
        for share in map(torch.Tensor.tolist, shares)
    )
    cpu, pinned = device.type == "cpu", device.type == "cuda"
    small, kept = isinstance(split.pixels, np.ndarray), split.pixels is not None
    if small and not cpu:
        loader = (crops.on_device(request, device) for request in requests)
    elif cpu and (workers == 0 or small or (kept and workers is None)):
        loader = (crops.on_cpu(map(crops.readable, pairs), len(pairs)) for pairs in requests)
    else:
        # A worker process takes a second to start: those of the last epoch go on.
        kind = str((usable(workers), train, min_crop, flip, preprocessing))
        reader = split.idle.pop(kind, None)
        if reader is None:
            reading = Crops(replace(split, idle={}), preprocessing, min_crop, flip)
            reader = DataLoader(
                reading,
                batch_sampler=Requests(),
                num_workers=senders(workers),
                persistent_workers=usable(workers) > 0,
                collate_fn=reading.collate,
                pin_memory=pinned,
                generator=torch.Generator(),  # for its workers' seeds: leaves the run's alone
                worker_init_fn=ignore_interrupts,
            )
        reader.batch_sampler.batches = requests
        loader = (crops.mend(*batch) for batch in reader)
        if cpu:
            loader = (crops.on_cpu(images, len(images)) for images in loader)
        else:
            loader = (crops.normalise(images.to(device, non_blocking=pinned)) for images in loader)
    for chunk, share, images in zip(chunks, shares, loader, strict=True):
        if reader is not None and share is shares[-1]:
            split.idle[kind] = reader
        rows = [stand_in(split, row) for row in share.tolist()]
        labels = torch.from_numpy(split.labels[rows])
        if i >= len(chunk):
            labels.fill_(-100)
        yield images, labels.to(device)


def demo(data_dir: str | None):
    """10,000 digits of MNIST. Of each class, 400 train, 200 validate and the rest test."""
    if data_dir:
        raise ValueError(
            f"--data-dir {data_dir}: the demo's digits lie in assets/; did you mean --dataset folder?"
        )
    pixels, labels = (
        read_idx(ASSETS, f"digits-{part}-ubyte") for part in ("images-idx3", "labels-idx1")
    )
    ranks = class_ranks(labels)
    splits = {"train": ranks < 400, "val": (ranks >= 400) & (ranks < 600), "test": ranks >= 600}
    classes = "zero one two three four five six seven eight nine".split()
    return {
        key: Split(labels[chosen], pixels=pixels[chosen]) for key, chosen in splits.items()
    }, classes


def fashion_mnist(data_dir: str | None):
    """70,000 images of clothes, 28 x 28: 60,000 train, 10,000 validate."""
    names = {
        (split, part): f"{prefix}-{part}-ubyte"
        for split, prefix in (("train", "train"), ("val", "t10k"))
        for part in ("images-idx3", "labels-idx1")
    }
    root = find(
        "Fashion-MNIST",
        data_dir,
        lambda folder: all(idx_file(folder, name) for name in names.values()),
        f"a folder with {', '.join(names.values())}, gzipped or not; download them from "
        "https://github.com/zalandoresearch/fashion-mnist",
    )
    arrays = {key: read_idx(root, name) for key, name in names.items()}
    splits = {
        key: Split(arrays[key, "labels-idx1"], pixels=arrays[key, "images-idx3"])
        for key in ("train", "val")
    }
    clothes = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return splits, clothes.split(",")


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read an idx file, gzipped or not: grey images as uint8 (N, H, W, 3), or int64 labels (N,)."""
    path = idx_file(folder, name)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        ndim = content[3]  # followed by the size of each dimension, a big-endian int32
        shape = np.frombuffer(content, ">i4", ndim, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise ValueError(f"{path}: broken idx file ({error}); download it again") from None
    return values[..., None].repeat(3, -1) if ndim > 1 else values.astype(np.int64)


def idx_file(folder: Path, name: str) -> Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.is_file()), None)


def tiny_imagenet(data_dir: str | None, official: bool = False):
    """The 100,000 labelled images of Tiny-ImageNet: of each class 400 train, 50 validate and 50 test.

    official: test on the data set's own val/ folder instead, as published results do.
    """
    root = find(
        "Tiny-ImageNet",
        data_dir,
        lambda folder: (folder / "wnids.txt").is_file() and (folder / "train").is_dir(),
        "a folder with wnids.txt and train/; download http://cs231n.stanford.edu/tiny-imagenet-200.zip, "
        "unzip it in ./data or name its folder with --data-dir (on Kaggle: Add Input, Tiny ImageNet)",
    )
    ids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    everything = list_classes(root / "train", ids)
    parts = stratified(relative(everything.files), everything.labels, [0.8, 0.1])
    splits = dict(zip(("train", "val", "test"), map(everything.rows, parts), strict=True))
    if official:
        lines = (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split("\t")[:2] for line in lines]
        splits["test"] = Split(
            np.array([ids.index(wnid) for _, wnid in pairs]),
            [str(root / "val" / "images" / file) for file, _ in pairs],
        )
    return splits, readable_names(ids, root / "words.txt", "\t")


def tiny_imagenet_official(data_dir: str | None):
    return tiny_imagenet(data_dir, official=True)


def readable_names(ids: list[str], words: Path, separator: str) -> list[str]:
    """For each WordNet id the first of its words in the file, or the id if there is none."""
    if not words.is_file():
        return ids
    lines = words.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(separator, 1) for line in lines if separator in line)
    word = {key: names.split(",")[0].strip() for key, names in pairs}
    return distinct([word.get(key, key) for key in ids], ids)


def distinct(names: list[str], ids: list[str]) -> list[str]:
    """The names, with the id after a name that several classes share."""
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [f"{n} {key}" if n in shared else n for n, key in zip(names, ids, strict=True)]


def food101(data_dir: str | None):
    """Food-101: 75,750 photographs train, 25,250 validate; torchvision's layout, or Kaggle's food41."""

    def lists(root: Path) -> Path | None:
        """The folder with train.json and test.json."""
        places = (root / "meta", root / "meta" / "meta")  # the second is Kaggle's
        return next((place for place in places if (place / "train.json").is_file()), None)

    root = find(
        "Food-101",
        data_dir,
        lambda folder: lists(folder) is not None and (folder / "images").is_dir(),
        "a folder with images/ and meta/train.json; add --download (5 GB), or name its "
        "folder with --data-dir (on Kaggle: Add Input, Food 101 or food41)",
    )
    listed = {
        key: json.loads((lists(root) / f"{part}.json").read_text(encoding="utf-8"))
        for key, part in (("train", "train"), ("val", "test"))
    }
    classes = sorted(listed["train"])
    if missing := [name for name in classes if not (root / "images" / name).is_dir()]:
        raise ValueError(
            f"{root / 'images'}: {len(missing)} classes are missing, the first is {missing[0]}; remove the "
            "data set and download it again"
        )
    splits = {
        key: Split(
            np.repeat(np.arange(len(classes)), [len(names[name]) for name in classes]),
            [str(root / "images" / f"{image}.jpg") for name in classes for image in names[name]],
        )
        for key, names in listed.items()
    }
    return splits, classes


def cifar100(data_dir: str | None):
    """CIFAR-100: of its training file 45,000 images train and 5,000 validate; 10,000 test."""
    root = find(
        "CIFAR-100",
        data_dir,
        lambda folder: all((folder / name).is_file() for name in ("train", "test", "meta")),
        "a folder cifar-100-python with train, test and meta; add --download to get it (170 MB)",
    )
    train, test, meta = (read_pickle(root / name) for name in ("train", "test", "meta"))

    def split(part: dict) -> Split:
        pixels = np.asarray(part["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return Split(np.array(part["fine_labels"], np.int64), pixels=np.ascontiguousarray(pixels))

    whole = split(train)
    parts = map(whole.rows, stratified(train["filenames"], whole.labels, [0.9]))
    splits = dict(zip(("train", "val"), parts, strict=True))
    return splits | {"test": split(test)}, list(meta["fine_label_names"])


class ArraysOnly(pickle.Unpickler):
    """Reads the arrays in CIFAR's files, and refuses anything that could run code."""

    ALLOWED = re.compile(r"numpy(\._?core\.(multiarray|numeric))?:(_reconstruct|ndarray|dtype)")

    def find_class(self, module, name):
        if not self.ALLOWED.fullmatch(f"{module}:{name}"):
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no image needs")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # wrong bytes make an unpickler raise errors of any type
        raise ValueError(f"{path}: not one of CIFAR's files ({error}); download it again") from None


def imagenet(data_dir: str | None):
    """ImageNet-1k: train/<id>/ and val/<id>/, or Kaggle's ILSVRC/Data/CLS-LOC with its flat val/."""

    def fits(folder: Path) -> bool:
        tiny = (folder / "wnids.txt").exists()
        if tiny or not all((folder / part).is_dir() for part in ("train", "val")):
            return False
        first = subfolders(folder / "train")[:1]
        return bool(first) and re.fullmatch(r"n\d{8}", first[0].name) is not None

    root = find(
        "ImageNet",
        data_dir,
        fits,
        "a folder with train/n01440764/... and val/; download it from https://image-net.org and name its "
        "folder with --data-dir (on Kaggle: Add Input, ImageNet Object Localization Challenge)",
    )
    ids = [path.name for path in subfolders(root / "train")]
    splits = {"train": list_classes(root / "train", ids)}
    if subfolders(root / "val"):
        splits["val"] = list_classes(root / "val", ids, may_lack=True)
    else:
        solution = kaggle_list(root, "LOC_val_solution.csv")
        with open(solution, newline="") as file:
            rows = [
                (row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file)
            ]
        number = {wnid: label for label, wnid in enumerate(ids)}
        rows = [(image, wnid) for image, wnid in rows if wnid in number]
        files = [str(root / "val" / f"{image}.JPEG") for image, _ in rows]
        splits["val"] = Split(np.array([number[wnid] for _, wnid in rows]), files)
    return splits, imagenet_names(root, ids)


def kaggle_list(root: Path, name: str) -> Path:
    """The path of one of Kaggle's lists, at most three folders above train/ and val/."""
    for folder in [root, *root.absolute().parents[:3]]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{root / 'val'} has no class folders, and {name}, which has its labels, is neither in {root} nor "
        "in the three folders above; put it there, or sort the images into class folders"
    )


def imagenet_names(root: Path, ids: list[str]) -> list[str]:
    try:
        return readable_names(ids, kaggle_list(root, "LOC_synset_mapping.txt"), " ")
    except FileNotFoundError:
        if len(ids) == 1000:  # torchvision's list is in the order of the ids
            return distinct(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"], ids)
        return ids


# The names of folders that are splits, also as a part: seg_train.
PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def folder(data_dir: str | None):
    """Your own images: DIR/cat/*.jpg; or DIR/train/cat/*.jpg and, if there are such, DIR/val/cat/*.jpg and
    DIR/test/cat/*.jpg. PARTS has other names for train, val and test."""
    root = Path(data_dir or "")
    if not data_dir or not root.is_dir():
        raise FileNotFoundError(
            f"--data-dir {data_dir}: no such folder; --dataset folder expects one with class folders"
        )
    root = unwrapped(root)
    inside = parts_in(root)
    top = unwrapped(inside["train"]) if inside else root
    classes = [path.name for path in subfolders(top)]
    named = {name for names in PARTS.values() for name in names}
    if len(classes) < 2 or (not inside and {name.lower() for name in classes} <= named):
        found = " and ".join(classes) or "none"
        raise ValueError(
            f"{top}: expected a folder of images for each class, two or more, found {found}; see "
            "docs/data.md, or say --dataset csv if a table has the labels"
        )
    if wrong := next((name for name in classes if not is_text(name)), None):
        raise ValueError(f"{top}: expected names in UTF-8, found {os.fsencode(wrong)}; rename it")
    others = [path.name for path in subfolders(root) if inside and path not in inside.values()]
    others += [name for name in os.listdir(top) if name.lower().endswith(IMG_EXTENSIONS)]
    if others:
        shown = ", ".join(others[:3]) + (" ..." if others[3:] else "")
        print(printable(f"{root}: left out, as they belong to no class: {len(others)} ({shown})"))
    splits = {"train": list_classes(top, classes)}
    for key in ("val", "test"):
        if key not in inside:
            continue
        place = unwrapped(inside[key], classes)
        names = [path.name for path in subfolders(place)]
        if key == "test" and (not names or (len(names) == 1 and names[0] not in classes)):
            print(
                f"{place}: left out, as its images have no class folders; predict.py predicts them"
            )
            continue
        if not names:
            raise ValueError(f"{place}: expected a folder for each class; sort it or remove it")
        if unknown := [name for name in names if name not in classes]:
            raise ValueError(
                f"{place / unknown[0]}: a class that {top} lacks; add it there or remove it"
            )
        splits[key] = list_classes(place, classes, may_lack=True)
    return splits, classes


def parts_in(root: Path) -> dict[str, Path]:
    """The folders in root that are splits: none if there is no train folder with folders."""
    folders, exact, part = subfolders(root), {}, {}
    for key, names in PARTS.items():
        for path in folders:
            name = path.name.lower()
            if name in names:
                exact.setdefault(key, path)
            elif {*re.split(r"[^a-z]+", name)} & {*names}:
                part.setdefault(key, path)
    found = part | exact
    # freight_train alone is a class; seg_train beside seg_test is not.
    sure = "train" in exact or len(found) > 1
    return found if sure and "train" in found and subfolders(found["train"]) else {}


def unwrapped(folder: Path, classes: list[str] | tuple = ()) -> Path:
    """Steps into a folder's only subfolder, as long as that has folders and is no class."""
    while (
        len(inside := subfolders(folder)) == 1
        and inside[0].name not in classes
        and subfolders(inside[0])
        and not any(name.lower().endswith(IMG_EXTENSIONS) for name in os.listdir(folder))
    ):
        folder = inside[0]
    return folder


def table(
    data_dir: str | None,
    labels: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
):
    """Images anywhere below DIR, and a table of their labels: train.csv, labels.csv ... or the one named."""
    root = Path(data_dir or "")
    if not data_dir or not root.is_dir():
        raise FileNotFoundError(
            f"--data-dir {data_dir}: no such folder; --dataset csv expects one with images and a table"
        )
    images, others = images_below(root)
    if not images:
        raise ValueError(f"{root}: expected images ({', '.join(IMG_EXTENSIONS)}), found none")
    tables = [file for file in others if file.lower().endswith((".csv", ".tsv"))]
    samples = [file for file in tables if os.path.basename(file).lower() in (*SAMPLES, "test.csv")]
    rest = [file for file in tables if file not in samples]
    places = [Path(labels), root / labels] if labels else []
    path = next((place for place in places if place.is_file()), None)
    if labels and path is None:
        raise FileNotFoundError(f"--labels {labels}: no such file, here or in {root}")
    path = path or choose(rest, TABLES) or (rest[0] if len(rest) == 1 else None)
    if path is None:
        found = ", ".join(rest[:5]) or "none"
        raise FileNotFoundError(
            f"{root}: expected train.csv, labels.csv or another table of labels, found {found}; name it with "
            "--labels"
        )
    within = [image.removeprefix(os.path.join(root, "")) for image in images]
    beside = [str(file) for file in Path(path).parent.glob("*.csv")]
    sample = choose([*tables, *beside], SAMPLES)
    rows, numbers, classes = labelled(path, within, sample, image_column, label_column)
    return {"train": Split(numbers, [images[row] for row in rows])}, classes


def is_text(name: str) -> bool:
    """False for a file name with bytes that are not UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


SOURCES = {
    "demo": demo,
    "tiny-imagenet": tiny_imagenet,
    "tiny-imagenet-official": tiny_imagenet_official,
    "food101": food101,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "folder": folder,
    "csv": table,
    "fashion-mnist": fashion_mnist,
}


def fetch(name: str, root: str) -> None:
    """Download a data set with torchvision. Raises OSError or ValueError if that fails."""
    print(f"{name}: downloading to {Path(root).absolute()}", flush=True)
    try:
        DOWNLOADS[name](root)
    except RuntimeError as error:
        raise ValueError(f"--download: {name} arrived incomplete ({error}); try again") from None
    except OSError as error:
        raise OSError(f"--download: {name} cannot be downloaded into {root}: {error}") from None


def fetch_cifar100(root: str) -> None:
    source = datasets.CIFAR100  # its constructor would run the pickles that it downloads
    download_and_extract_archive(source.url, root, filename=source.filename, md5=source.tgz_md5)


DOWNLOADS = {
    "food101": lambda root: datasets.Food101(root, download=True),
    "cifar100": fetch_cifar100,
}


def find(title: str, data_dir: str | None, fits: Callable[[Path], bool], needs: str) -> Path:
    """The first folder for which fits is true, at most seven levels below data_dir (or ./data and
    /kaggle/input). needs: what such a folder has and where to get it, for the error message."""
    roots = [Path(data_dir)] if data_dir else [Path("data"), Path("/kaggle/input")]
    level = [root for root in roots if root.is_dir()]
    for _ in range(8):
        for folder in level:
            if fits(folder):
                print(f"{title}: {folder}")
                return folder
        below = [subfolders(folder) for folder in level]
        # Very many folders are the classes of some data set: not worth a search.
        level = [child for children in below if len(children) <= 100 for child in children]
    places = " and ".join(str(root.absolute()) for root in roots)
    raise FileNotFoundError(f"{title} not found: looked in and below {places} for {needs}")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; none if it may not be read."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return []
    names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX"))]
    return [folder / name for name in sorted(names)]


UNREAD = (".heic", ".heif", ".avif", ".gif", ".jfif", ".jp2", ".svg")  # left out


def list_classes(root: Path, classes: list[str], may_lack: bool = False) -> Split:
    """The image files below root/<class>/, sorted. may_lack: a class may have none."""
    files, labels, endings = [], [], Counter()
    for label, name in enumerate(classes):
        images, others = images_below(root / name)
        endings.update(os.path.splitext(file)[1].lower() for file in others)
        if not images and not may_lack:
            known = ", ".join(IMG_EXTENSIONS)
            raise ValueError(f"{root / name}: no images ({known}); add some or remove the folder")
        files += images
        labels += [label] * len(images)
    if unread := {ending: endings[ending] for ending in UNREAD if endings[ending]}:
        print(f"{root}: left out {unread}; save such images as .jpg or .png")
    return Split(np.array(labels, np.int64), files)


def images_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """(image files, other files) in and below a folder, sorted, without hidden ones. Links are followed."""
    paths, seen = [], {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, followlinks=True):
        real = {name: os.path.realpath(os.path.join(path, name)) for name in folders}
        folders[:] = [n for n in folders if not n.startswith(".") and real[n] not in seen]
        seen |= {real[name] for name in folders}  # a link may lead back
        paths += [os.path.join(path, file) for file in files if not file.startswith(".")]
    images = [file for file in sorted(paths) if file.lower().endswith(IMG_EXTENSIONS)]
    return images, sorted({*paths} - {*images})


def even_rows(labels: np.ndarray, limit: int) -> np.ndarray:
    """At most limit rows: the first of every class, then the second of every class, ..."""
    return np.sort(np.lexsort((labels, class_ranks(labels)))[:limit])


def stratified(names: list[str], labels: np.ndarray, shares: list[float]) -> list[np.ndarray]:
    """Split the rows of each class in these shares; one more part gets the rest. The first part has an
    image of every class, even of a class too small to be split.

    Within a class, rows are sorted by a hash of their names: the split does not depend on where the data
    lies (see relative), on the order of the files or on a version of a random generator.
    """
    ranks, sizes = hash_ranks(names, labels), np.bincount(labels)
    ends = [np.floor(sizes * share + 1e-9).clip(1)[labels] for share in np.cumsum(shares)]
    part = sum((ranks >= end).astype(int) for end in ends)
    return [np.flatnonzero(part == k) for k in range(len(shares) + 1)]


def hash_ranks(names: list[str], labels: np.ndarray) -> np.ndarray:
    """For each row, its place within its class, by a hash of its name."""
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")) for name in names]
    by_hash = np.argsort([digest.hexdigest() for digest in hashes])
    ranks = np.empty(len(labels), np.int64)
    ranks[by_hash] = class_ranks(labels[by_hash])
    return ranks


def class_ranks(labels: np.ndarray) -> np.ndarray:
    """For each row, the number of earlier rows of the same class."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return ranks


def relative(files: list[str]) -> list[str]:
    """The paths within their common folder, alike on all systems: with / between their parts, and an
    accented letter as one character, where macOS has two."""
    files = [os.path.normpath(file) for file in files]  # as commonpath does
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    paths = (file[len(root) :].replace(os.sep, "/").lstrip("/") for file in files)
    return [unicodedata.normalize("NFC", path) for path in paths]
