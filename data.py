"""Data sets: where each lies, how its files are laid out, and how it is split.

    dataset = load("food101", "data", limit=1000)
    dataset.classes, dataset.train, dataset.val          # files or pixels, nothing decoded yet

A new data set is a function that takes the folder it was told (or None), returns (splits, classes), and
has its line in SOURCES.
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
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import ViT_B_16_Weights

from engine.images import Crops, Split, ignore_interrupts, stand_in, usable

ASSETS = Path(__file__).parent / "assets"
PICTURES = (".heic", ".heif", ".avif", ".gif", ".jfif", ".jp2", ".svg")  # that are not read


@dataclass
class Dataset:
    """The splits of a data set; label i is classes[i]."""

    classes: list[str]
    train: Split
    val: Split
    test: Split | None = None


def load(
    name: str,
    data_dir: str | None = None,
    limit: int | None = None,
    classes: str | list[str] | None = None,
    download: bool = False,
    holdout: float = 0.0,
) -> Dataset:
    """Find a data set: its classes, and the files or pixels of its splits. Nothing is decoded yet.

    name: one of SOURCES.
    data_dir: where it lies (or a folder above it); None searches ./data and /kaggle/input.
    limit: at most this many images of each split, of every class as many or one fewer.
    classes: keep the images of these classes only; the list of classes stays whole.
    download: fetch it into data_dir (or ./data) if it is not there; food101 and cifar100 can be.
    holdout: fraction of the training images, after classes and limit, that validates instead of what
        the data set has for that; which becomes the test split, where there is none.

    Raises FileNotFoundError if it is not there, ValueError for what is wrong with it or the arguments.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1 image of each split")
    if download and name not in DOWNLOADS:
        raise ValueError(f"--download: {name} cannot be; expected one of {', '.join(DOWNLOADS)}")
    try:
        splits, names = SOURCES[name](data_dir)
    except FileNotFoundError:
        if not download:
            raise
        fetch(name, data_dir or "data")
        splits, names = SOURCES[name](data_dir or "data")
    wanted = classes.split(",") if isinstance(classes, str) else classes or []
    wanted = [name.strip() for name in wanted if name.strip()]
    for unknown in sorted(set(wanted) - set(names)):
        near = get_close_matches(unknown, names, n=3) or names[:3]
        raise ValueError(f"classes: {name} has no {unknown!r}; did you mean {', '.join(near)}?")
    chosen = np.isin(names, wanted or names)
    every, taken = splits["train"], {}  # every training image; the rows of each split that stay
    for key, split in splits.items():
        rows = np.flatnonzero(chosen[split.labels])
        taken[key] = rows[even_rows(split.labels[rows], limit)] if limit else rows
        splits[key] = split.rows(taken[key])
    if holdout:
        # The keys of the whole split: an image is held out or not whatever --classes says.
        keys = relative(every.files) if every.files else [*map(str, range(len(every)))]
        train = splits["train"]
        kept, held = stratified([keys[row] for row in taken["train"]], train.labels, [1 - holdout])
        splits.setdefault("test", splits["val"])
        splits |= {"train": train.rows(kept), "val": train.rows(held)}
    for key, split in splits.items():
        if not len(split):
            why = "check --classes" if wanted else "to be split, a class needs two images or more"
            raise ValueError(f"{name}: its {key} split has no image; {why}")
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

    preprocessing: vit.build's dict of image_size, mean, std and crop.
    train: shuffle and augment, as seed and epoch say. Otherwise: in order, the centre of each image.
    min_crop: the smallest random crop, as a fraction of the image's area; 1 for the centre, as in evaluation.
    flip: mirror left to right, each image with probability one half.
    workers: processes that read images; 0 reads them in this process. None for one per usable core, or
        for 0 where images are kept and the device is a CPU. Small images that are kept need none.
    start: how many images of this epoch to leave out, as a run that goes on has seen them.
    part: (i, n) for the i-th of n processes, which share the images of each batch. One for which a batch
        has none gets its first, with the label -100, which cross_entropy takes for nothing.

    Raises ValueError if ten or more files, and over 1 % of them, cannot be read.
    """
    device = torch.device(device)
    order, draws = torch.arange(len(split)), None
    if train:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), 5, generator=generator)
    shared, (i, n) = order[start:].split(batch_size), part
    chunks = [chunk[i::n] if i < len(chunk) else chunk[:1] for chunk in shared]
    crops = Crops(split, preprocessing, min_crop, flip)
    asked = (
        [(stand_in(split, row), None if draws is None else draws[row].tolist()) for row in chunk]
        for chunk in map(torch.Tensor.tolist, chunks)
    )
    cpu, pinned = device.type == "cpu", device.type == "cuda"
    small, kept = isinstance(split.pixels, np.ndarray), split.pixels is not None
    if small and not cpu:
        loader = (crops.on_device(wanted, device) for wanted in asked)
    elif cpu and (workers == 0 or small or (kept and workers is None)):
        loader = (crops.on_cpu(map(crops.readable, wanted), len(wanted)) for wanted in asked)
    else:
        loader = DataLoader(
            crops,
            batch_sampler=asked,
            num_workers=usable(workers),
            collate_fn=crops.collate,
            pin_memory=pinned,
            generator=torch.Generator(),  # it draws a number for each worker: not from the run's own
            worker_init_fn=ignore_interrupts,
        )
        loader = (crops.mend(*batch) for batch in loader)
        if cpu:
            loader = (crops.on_cpu(images, len(images)) for images in loader)
        else:
            loader = (crops.normalise(images.to(device, non_blocking=pinned)) for images in loader)
    for whole, chunk, images in zip(shared, chunks, loader, strict=True):
        rows = [stand_in(split, row) for row in chunk.tolist()]
        labels = torch.from_numpy(split.labels[rows])
        if i >= len(whole):
            labels.fill_(-100)
        yield images, labels.to(device)


def class_ranks(labels: np.ndarray) -> np.ndarray:
    """For each row, how many rows of its class stand before it."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return ranks


def even_rows(labels: np.ndarray, limit: int) -> np.ndarray:
    """Rows of at most limit images: the first of every class, then the second of every class, ..."""
    return np.sort(np.lexsort((labels, class_ranks(labels)))[:limit])


def stratified(names: list[str], labels: np.ndarray, shares: list[float]) -> list[np.ndarray]:
    """Split rows so that each class is split in these shares; what is left makes one part more. The
    first part has an image of every class, also of one too small to be split.

    Within a class the order is that of a hash of each name: it does not depend on where the data lies
    (see relative), on the order of listing, or on a version of a random generator.
    """
    hashes = [hashlib.sha256(name.encode("utf-8", "surrogateescape")) for name in names]
    by_hash = np.argsort([digest.hexdigest() for digest in hashes])
    ranks, sizes = np.empty(len(labels), np.int64), np.bincount(labels)
    ranks[by_hash] = class_ranks(labels[by_hash])
    ends = [np.floor(sizes * share + 1e-9).clip(1)[labels] for share in np.cumsum(shares)]
    part = sum((ranks >= end).astype(int) for end in ends)
    return [np.flatnonzero(part == k) for k in range(len(shares) + 1)]


def relative(files: list[str]) -> list[str]:
    """The paths from the folder that holds them all, with / between their parts, and accents as all
    systems but macOS write them."""
    root = os.path.commonpath([os.path.dirname(file) for file in files])
    paths = (file[len(root) :].replace(os.sep, "/").lstrip("/") for file in files)
    return [unicodedata.normalize("NFC", path) for path in paths]


def find(title: str, data_dir: str | None, fits: Callable[[Path], bool], needs: str) -> Path:
    """The first folder that fits, in data_dir or else in the known places, at most five levels down."""
    roots = [Path(data_dir)] if data_dir else [Path("data"), Path("/kaggle/input")]
    level = [root for root in roots if root.is_dir()]
    for _ in range(6):
        for folder in level:
            if fits(folder):
                print(f"{title}: {folder}")
                return folder
        below = [subfolders(folder) for folder in level]
        # Where there are very many, they are the classes of some data set: no use to look inside.
        level = [child for children in below if len(children) <= 100 for child in children]
    looked = " and ".join(str(root.absolute()) for root in roots)
    raise FileNotFoundError(f"{title} not found: looked in and below {looked} for {needs}")


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; none of a folder that may not be read."""
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        return []
    names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__MACOSX"))]
    return [folder / name for name in sorted(names)]


def images_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """The image files in a folder and the folders below, sorted, and the other files; no hidden ones."""
    there = sorted(
        os.path.join(path, file)
        for path, _, files in os.walk(folder)
        for file in files
        if not file.startswith(".")
    )
    images = [file for file in there if file.lower().endswith(IMG_EXTENSIONS)]
    return images, [file for file in there if not file.lower().endswith(IMG_EXTENSIONS)]


def list_classes(root: Path, classes: list[str], may_lack: bool = False):
    """The image files below root/<class>/ of each class, sorted, and their labels."""
    files, labels, other = [], [], Counter()
    for label, name in enumerate(classes):
        found, rest = images_below(root / name)
        other.update(os.path.splitext(file)[1].lower() for file in rest)
        if not found and not may_lack:
            known = ", ".join(IMG_EXTENSIONS)
            raise ValueError(
                f"{root / name}: no images ({known}); put some in or remove the folder"
            )
        files += found
        labels += [label] * len(found)
    if left := {ending: other[ending] for ending in PICTURES if other[ending]}:
        print(f"{root}: left out {left}; save such pictures as .jpg or .png")
    return files, np.array(labels, np.int64)


def demo(data_dir: str | None):
    """10,000 digits of MNIST: for each class 400 to train, 200 to validate, the rest to test."""
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
    """60,000 and 10,000 clothes, 28 x 28, which the embedded trunk was pretrained on."""
    names = {
        (split, part): f"{prefix}-{part}-ubyte"
        for split, prefix in (("train", "train"), ("val", "t10k"))
        for part in ("images-idx3", "labels-idx1")
    }
    root = find(
        "Fashion-MNIST",
        data_dir,
        lambda folder: all(idx_file(folder, name) for name in names.values()),
        f"a folder with {', '.join(names.values())}, gzipped or not; get them from "
        "https://github.com/zalandoresearch/fashion-mnist",
    )
    found = {key: read_idx(root, name) for key, name in names.items()}
    splits = {
        key: Split(found[key, "labels-idx1"], pixels=found[key, "images-idx3"])
        for key in ("train", "val")
    }
    clothes = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
    return splits, clothes.split(",")


def idx_file(folder: Path, name: str) -> Path | None:
    there = (folder / name, folder / f"{name}.gz")
    return next((path for path in there if path.is_file()), None)


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, gzipped or not: grey images as uint8 (N, H, W, 3), or int64 labels (N,)."""
    path = idx_file(folder, name)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        sides = content[3]  # how many dimensions; then each as a big-endian int32
        shape = np.frombuffer(content, ">i4", sides, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * sides).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a whole idx file ({error}); get it again") from None
    return values[..., None].repeat(3, -1) if sides > 1 else values.astype(np.int64)


def tiny_imagenet(data_dir: str | None, official: bool = False):
    """The labelled 100,000 of Tiny-ImageNet as 80,000 train, 10,000 val, 10,000 test: 400/50/50 a class.

    official: test is the data set's own validation folder, which published figures are of.
    """
    root = find(
        "Tiny-ImageNet",
        data_dir,
        lambda folder: (folder / "wnids.txt").is_file() and (folder / "train").is_dir(),
        "a folder with wnids.txt and train/; get http://cs231n.stanford.edu/tiny-imagenet-200.zip, "
        "unzip it in ./data or name its folder with --data-dir (on Kaggle: Add Input, Tiny ImageNet)",
    )
    ids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    files, labels = list_classes(root / "train", ids)
    parts = stratified(relative(files), labels, [0.8, 0.1])
    everything = Split(labels, files)
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


def readable_names(ids: list[str], words: Path, between: str) -> list[str]:
    """The first word that a list of WordNet's ids and words has for each id; the id too where two
    share it."""
    if not words.is_file():
        return ids
    lines = words.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(between, 1) for line in lines if between in line)
    word = {key: names.split(",")[0].strip() for key, names in pairs}
    return told_apart([word.get(key, key) for key in ids], ids)


def told_apart(names: list[str], ids: list[str]) -> list[str]:
    """The names, with the id behind each that is not the only one of its name."""
    shared = {name for name, count in Counter(names).items() if count > 1}
    return [f"{n} {key}" if n in shared else n for n, key in zip(names, ids, strict=True)]


def food101(data_dir: str | None):
    """75,750 photographs to train and 25,250 to validate: torchvision's layout, or Kaggle's food41."""

    def lists(root: Path) -> Path | None:
        """The folder with train.json and test.json."""
        places = (root / "meta", root / "meta" / "meta")  # the second is Kaggle's
        return next((place for place in places if (place / "train.json").is_file()), None)

    root = find(
        "Food-101",
        data_dir,
        lambda folder: lists(folder) is not None and (folder / "images").is_dir(),
        "a folder with images/ and meta/train.json; add --download to fetch it (5 GB), or name its "
        "folder with --data-dir (on Kaggle: Add Input, Food 101 or food41)",
    )
    listed = {
        key: json.loads((lists(root) / f"{part}.json").read_text(encoding="utf-8"))
        for key, part in (("train", "train"), ("val", "test"))
    }
    classes = sorted(listed["train"])
    if lacking := [name for name in classes if not (root / "images" / name).is_dir()]:
        raise ValueError(
            f"{root / 'images'}: {len(lacking)} classes are not there, the first {lacking[0]}; the data set "
            "is not whole: remove it and get it again"
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
    """The 50,000 of CIFAR-100's training file as 45,000 train and 5,000 val; its 10,000 test."""
    root = find(
        "CIFAR-100",
        data_dir,
        lambda folder: all((folder / name).is_file() for name in ("train", "test", "meta")),
        "a folder cifar-100-python with train, test and meta; add --download to fetch it (170 MB)",
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
    """Reads what CIFAR's files hold, and nothing that could run code."""

    ALLOWED = re.compile(r"numpy(\._?core\.(multiarray|numeric))?:(_reconstruct|ndarray|dtype)")

    def find_class(self, module, name):
        if not self.ALLOWED.fullmatch(f"{module}:{name}"):
            raise pickle.UnpicklingError(f"it calls {module}.{name}, which no image needs")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # an unpickler meets wrong bytes with errors of any type
        raise ValueError(f"{path}: not one of CIFAR's files ({error}); get it again") from None


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
        "a folder with train/n01440764/... and val/; get it from https://image-net.org and name its "
        "folder with --data-dir (on Kaggle: Add Input, ImageNet Object Localization Challenge)",
    )
    ids = [path.name for path in subfolders(root / "train")]
    files, labels = list_classes(root / "train", ids)
    if subfolders(root / "val"):
        val_files, val_labels = list_classes(root / "val", ids, may_lack=True)
    else:
        solution = beside(root, "LOC_val_solution.csv")
        with open(solution, newline="") as file:
            rows = [
                (row["ImageId"], row["PredictionString"].split()[0]) for row in csv.DictReader(file)
            ]
        val_files = [str(root / "val" / f"{image}.JPEG") for image, _ in rows]
        number = {wnid: label for label, wnid in enumerate(ids)}
        val_labels = np.array([number[wnid] for _, wnid in rows])
    names = imagenet_names(root, ids)
    return {"train": Split(labels, files), "val": Split(val_labels, val_files)}, names


def beside(root: Path, name: str) -> Path:
    """A file of Kaggle's, which lies up to three folders above Data/CLS-LOC's content."""
    for folder in [root, *root.absolute().parents[:3]]:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{root / 'val'} is one flat folder, and {name}, which labels it, is neither in {root} nor in "
        "the three folders above; put it there, or sort the images into a folder for each class"
    )


def imagenet_names(root: Path, ids: list[str]) -> list[str]:
    try:
        return readable_names(ids, beside(root, "LOC_synset_mapping.txt"), " ")
    except FileNotFoundError:
        if len(ids) == 1000:  # torchvision's list is in the order of the ids
            return told_apart(ViT_B_16_Weights.IMAGENET1K_V1.meta["categories"], ids)
        return ids


VALIDATION, TESTS = ("val", "valid", "validation"), ("test", "testing")


def is_text(name: str) -> bool:
    """False for a file's name that holds bytes which are no UTF-8."""
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def folder(data_dir: str | None):
    """Class folders of one's own: DIR/train/cat/*.jpg and DIR/val/cat/*.jpg (or valid, or validation;
    DIR/test/cat/*.jpg if there is one), or DIR/cat/*.jpg, of which one image in five validates."""
    root = Path(data_dir or "")
    if not data_dir or not root.is_dir():
        raise FileNotFoundError(
            f"--data-dir {data_dir}: no such folder; --dataset folder needs one with a folder for each class"
        )
    inside = {path.name.lower(): path for path in subfolders(root)}
    split = "train" in inside and subfolders(inside["train"])  # else it is a class of trains
    top = inside["train"] if split else root
    classes = [path.name for path in subfolders(top)]
    if len(classes) < 2 or (
        not split and set(inside) <= {*VALIDATION, *TESTS, "train", "training"}
    ):
        found = " and ".join(classes) or "none"
        hint = f"is it --data-dir {top / classes[0]}?" if len(classes) == 1 else "see README"
        raise ValueError(
            f"{top}: expected a folder of images for each class, found {found}; {hint}"
        )
    if wrong := next((name for name in classes if not is_text(name)), None):
        raise ValueError(f"{top}: expected names in UTF-8, found {os.fsencode(wrong)}; rename it")
    files, labels = list_classes(top, classes)
    everything = Split(labels, files)
    splits = {"train": everything}
    for key, names in (("val", VALIDATION), ("test", TESTS)):
        if place := next((inside[name] for name in names if split and name in inside), None):
            there = subfolders(place)
            if not there and key == "test":  # unlabelled, as a competition's is
                continue
            if not there:
                raise ValueError(f"{place}: expected a folder for each class; sort it or remove it")
            if unknown := [path for path in there if path.name not in classes]:
                raise ValueError(
                    f"{unknown[0]}: a class that {top} lacks; add it there or remove it"
                )
            part_files, part_labels = list_classes(place, classes, may_lack=True)
            splits[key] = Split(part_labels, part_files)
    if "val" not in splits:
        rows = stratified(relative(files), labels, [0.8])
        splits |= zip(("train", "val"), map(everything.rows, rows), strict=True)
    return splits, classes


SOURCES = {
    "demo": demo,
    "tiny-imagenet": tiny_imagenet,
    "tiny-imagenet-official": tiny_imagenet_official,
    "food101": food101,
    "cifar100": cifar100,
    "imagenet": imagenet,
    "folder": folder,
    "fashion-mnist": fashion_mnist,
}


def fetch(name: str, root: str) -> None:
    """Download a data set with torchvision. Raises OSError or ValueError if that fails."""
    print(f"{name}: download to {Path(root).absolute()}", flush=True)
    try:
        DOWNLOADS[name](root)
    except RuntimeError as error:
        raise ValueError(f"--download: {name} did not arrive whole ({error}); try again") from None
    except OSError as error:
        raise OSError(f"--download: {name} cannot be fetched into {root}: {error}") from None


def fetch_cifar100(root: str) -> None:
    source = datasets.CIFAR100  # its constructor would unpickle what it fetched
    download_and_extract_archive(source.url, root, filename=source.filename, md5=source.tgz_md5)


DOWNLOADS = {
    "food101": lambda root: datasets.Food101(root, download=True),
    "cifar100": fetch_cifar100,
}
