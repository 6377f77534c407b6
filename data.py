"""Data sets in, batches of images on the device out.

load(name, ...) finds a data set and returns its classes and its splits; batches(split, ...) yields
(images, labels) on the device: float32 (batch, 3, size, size), normalised, and int64 (batch,).

There are two paths. Small images of one size are decoded once, kept as uint8 and, batch by batch,
cropped, flipped and resized on the device. Other images are files: worker processes decode each at
the smallest scale that its crop needs, crop and flip it, and the device normalises. In both, every
image of a batch has a crop and a flip of its own, drawn in the main process: the same seed gives the
same batches for any number of workers.

A new data set is a function that returns (splits, classes), and its line in SOURCES.
"""

import gzip
import hashlib
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

ASSETS = Path(__file__).parent / "assets"
SMALL = 96  # pixels: up to this size a data set is decoded once and kept


@dataclass
class Split:
    """The images of one split, as pixels or as files, and their labels."""

    labels: np.ndarray  # (N,) int64
    files: list[str] | None = None
    pixels: np.ndarray | None = None  # (N, H, W) or (N, H, W, 3) uint8

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: np.ndarray) -> "Split":
        """The split of these rows alone."""
        return Split(
            self.labels[rows],
            None if self.files is None else [self.files[row] for row in rows],
            None if self.pixels is None else self.pixels[rows],
        )


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
) -> Dataset:
    """Find a data set: its classes, and the files or pixels of its splits. Nothing is decoded yet.

    name: one of SOURCES.
    data_dir: where it lies (or a folder above it); None searches ./data and /kaggle/input.
    limit: at most this many images of each split, of every class as many or one fewer.
    classes: keep the images of these classes only; the list of classes stays whole.

    Raises FileNotFoundError if it is not there, ValueError for what is wrong with it or the arguments.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1 image of each split")
    splits, names = SOURCES[name](data_dir)
    wanted = classes.split(",") if isinstance(classes, str) else classes or []
    wanted = [name.strip() for name in wanted]
    for unknown in sorted(set(wanted) - set(names)):
        near = get_close_matches(unknown, names, n=3) or names[:3]
        raise ValueError(f"classes: {name} has no {unknown!r}; did you mean {', '.join(near)}?")
    for key, split in splits.items():
        if wanted:
            split = split.rows(
                np.flatnonzero(np.isin(split.labels, [names.index(c) for c in wanted]))
            )
        if limit:
            split = split.rows(even_rows(split.labels, limit))
        if not len(split):
            raise ValueError(f"{name}: no image is left in its {key} split; check --classes")
        splits[key] = split
    return Dataset(names, **splits)


def keep_small(split: Split, workers: int | None = None) -> None:
    """Decode a split once and for all, if its images are of one size and small.

    workers: processes that decode; None for one per usable core.
    Raises ValueError for a file that is no image.
    """
    if split.pixels is None and is_small(split.files):
        split.pixels = decode_all(split.files, usable(workers))


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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images, labels) on the device, once through the split.

    preprocessing: vit.build's dict of image_size, mean, std and crop.
    train: shuffle and augment, as seed and epoch say. Otherwise: in order, the centre of each image.
    min_crop: the smallest random crop, as a fraction of the image's area; 1 for the centre, as in evaluation.
    flip: mirror left to right, each image with probability one half.
    """
    size = preprocessing["image_size"]
    order, draws = torch.arange(len(split)), None
    if train:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(split), generator=generator)
        draws = torch.rand(len(split), 5, generator=generator)
    crops = Crops(split, draws, size, preprocessing["crop"], min_crop, flip)
    chunks = order.split(batch_size)
    pinned = torch.device(device).type == "cuda"
    if split.pixels is None:
        loader = DataLoader(
            crops,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=usable(workers),
            collate_fn=stack,
            pin_memory=pinned,
            generator=torch.Generator(),  # it draws a number for each worker: not from the run's own
        )
    else:
        loader = (crops.pixels(chunk, device, pinned) for chunk in chunks)
    mean, std = (
        255 * torch.tensor(preprocessing[key], device=device).view(3, 1, 1)
        for key in ("mean", "std")
    )
    for chunk, images in zip(chunks, loader, strict=True):
        labels = torch.from_numpy(split.labels[chunk.numpy()])
        images = unless_error(images).to(device, non_blocking=True)
        yield (images - mean) / std, labels.to(device, non_blocking=True)


class Crops(TorchDataset):
    """One crop of each image of a split: random ones where there are draws, else the centre.

    draws: (N, 5) numbers in 0..1 for each row's area, ratio, horizontal and vertical place, and flip.
    """

    def __init__(self, split, draws, size, centre, min_crop, flip):
        self.split, self.draws, self.size = split, draws, size
        self.centre, self.min_crop, self.flip = centre, min_crop, flip

    def boxes(self, rows: torch.Tensor, height: int, width: int):
        """Left, top, width, height (each (rows,), in pixels) and whether to flip."""
        if self.draws is None:
            return centre_boxes(len(rows), height, width, self.centre), torch.zeros(len(rows)) > 0
        draws = self.draws[rows]
        if self.min_crop < 1:
            boxes = random_boxes(draws, height, width, self.min_crop)
        else:
            boxes = centre_boxes(len(rows), height, width, self.centre)
        return boxes, (draws[:, 4] < 0.5) & self.flip

    def __getitem__(self, row: int) -> torch.Tensor | ValueError:
        """From a file: uint8 (3, size, size), or what is wrong with it. Runs in a worker process."""
        try:
            return self.crop(row)
        except ValueError as error:
            return error

    def crop(self, row: int) -> torch.Tensor:
        with opened(self.split.files[row]) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5  # on its side: width is height
            width, height = image.size[::-1] if turned else image.size
            boxes, flips = self.boxes(torch.tensor([row]), height, width)
            left, top, wide, high = (float(side) for side in boxes)
            # A JPEG decodes at 1/2, 1/4 or 1/8 for less: the smallest at which the crop still has size.
            need = math.ceil(self.size * width / wide), math.ceil(self.size * height / high)
            image.draft("RGB", need[::-1] if turned else need)
            image = to_rgb(image)
        across, down = image.width / width, image.height / height
        right = min((left + wide) * across, image.width)  # rounding could put it a hair outside
        bottom = min((top + high) * down, image.height)
        box = (left * across, top * down, right, bottom)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if flips[0]:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def pixels(self, rows: torch.Tensor, device, pinned: bool) -> torch.Tensor:
        """From kept pixels: float32 (rows, 3, size, size) in 0..255, resized on the device."""
        images = torch.from_numpy(self.split.pixels[rows.numpy()])  # (B, H, W) or (B, H, W, 3)
        boxes, flips = self.boxes(rows, *images.shape[1:3])
        if pinned:
            images = images.pin_memory()
        images = images.to(device, non_blocking=True).to(boxes.dtype)
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
        images = resize(images, boxes.to(device), flips.to(device), self.size)
        return images.expand(-1, 3, -1, -1)  # grey: the same three times


def random_boxes(draws: torch.Tensor, height: int, width: int, min_crop: float) -> torch.Tensor:
    """Random-resized-crop boxes, (4, B): left, top, width, height in pixels, not rounded.

    The area is uniform in min_crop..1 of the image and width / height log-uniform in 3/4..4/3, as in
    torchvision's RandomResizedCrop; a box that would stick out shrinks, where torchvision draws anew.
    """
    area = height * width * (min_crop + (1 - min_crop) * draws[:, 0])
    ratio = torch.exp((2 * draws[:, 1] - 1) * math.log(4 / 3))
    wide = torch.minimum((area * ratio).sqrt(), (ratio * height).clamp(max=width))
    high = (wide / ratio).clamp(max=height)  # rounding could leave it a hair too high
    return torch.stack([draws[:, 2] * (width - wide), draws[:, 3] * (height - high), wide, high])


def centre_boxes(n: int, height: int, width: int, share: float) -> torch.Tensor:
    """The centred square whose side is this share of the shorter side, (4, n): see random_boxes."""
    side = share * min(height, width)
    box = torch.tensor([(width - side) / 2, (height - side) / 2, side, side])
    return box[:, None].expand(4, n)


def resize(images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int):
    """Resize a box of its own in each image, (B, C, H, W) -> (B, C, size, size).

    A resize is linear: rows and columns are each multiplied by a matrix of weights, and to flip is to
    reverse one of them. The weights are those of PIL's bilinear filter, which averages as it shrinks.
    """
    left, top, wide, high = boxes
    down = resize_matrix(top, high, images.shape[-2], size)  # (B, size, H)
    across = resize_matrix(left, wide, images.shape[-1], size)  # (B, size, W)
    across = torch.where(flips[:, None, None], across.flip(1), across)
    return down[:, None] @ images @ across[:, None].mT


def resize_matrix(start: torch.Tensor, length: torch.Tensor, pixels: int, size: int):
    """Weights (B, size, pixels) with which each of size outputs averages the input pixels."""
    step = length / size  # (B,) input pixels to an output
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step[:, None]
    distance = torch.arange(pixels, device=start.device) + 0.5 - centre[..., None]
    weights = (1 - distance.abs() / step.clamp(min=1)[:, None, None]).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


ORIENTATION = 0x0112  # the EXIF tag


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, open. Whatever goes wrong with it comes as a ValueError that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: cannot be read ({reason}); mend or remove it") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, upright, as RGB."""
    return ImageOps.exif_transpose(image).convert("RGB")


class Whole(TorchDataset):
    """Whole images of one size, uint8 (H, W, 3). Runs in worker processes."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor | ValueError:
        try:
            with opened(self.files[row]) as image:
                return torch.from_numpy(np.array(to_rgb(image)))
        except ValueError as error:
            return error


def stack(images: list) -> torch.Tensor | ValueError:
    """A batch, or its first error: an error that a worker raises would come as a page of traceback."""
    return next((i for i in images if isinstance(i, ValueError)), None) or torch.stack(images)


def unless_error(batch: torch.Tensor | ValueError) -> torch.Tensor:
    if isinstance(batch, ValueError):
        raise batch
    return batch


def is_small(files: list[str]) -> bool:
    """Whether all images are of one size, and it is small."""
    first = None
    for path in files:
        with opened(path) as image:  # reads the header alone
            first = first or image.size
            if max(first) > SMALL or image.size != first:
                return False
    return True


def decode_all(files: list[str], workers: int) -> np.ndarray:
    """All of the files as one array, uint8 (N, H, W, 3)."""
    workers = workers if len(files) > 1000 else 0  # few files are read before a process has started
    loader = DataLoader(Whole(files), batch_size=250, num_workers=workers, collate_fn=stack)
    pixels = [unless_error(images).numpy() for images in progress(loader, desc="decode")]
    return np.concatenate(pixels)


def progress(iterable=None, **how) -> tqdm:
    """A bar for somebody who watches, in a terminal or a notebook; a log file gets none."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    return tqdm(iterable, leave=False, disable=not watched, **how)


def usable(workers: int | None) -> int:
    """The number of worker processes: as asked, else one per core that this process may use."""
    if workers is not None:
        return workers
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: knows of taskset and containers
    return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)


def class_ranks(labels: np.ndarray) -> np.ndarray:
    """For each row, how many rows of its class stand before it."""
    order = np.argsort(labels, kind="stable")
    ranks = np.empty(len(labels), np.int64)
    ranks[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    return ranks


def even_rows(labels: np.ndarray, limit: int) -> np.ndarray:
    """Rows of at most limit images: the first of every class, then the second of every class, ..."""
    return np.sort(np.lexsort((labels, class_ranks(labels)))[:limit])


def stratified(names: list[str], labels: np.ndarray, parts: list[float]) -> list[np.ndarray]:
    """Split rows so that each class is split in these parts; the rest is one part more. The first part
    has an image of every class, also of one too small to be split.

    The order is that of a hash of each name (a path relative to the data set): it does not depend on
    where the data lies, on the order of listing, or on a version of a random generator.
    """
    by_hash = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    ranks, sizes = np.empty(len(labels), np.int64), np.bincount(labels)
    ranks[by_hash] = class_ranks(labels[by_hash])
    ends = [np.floor(sizes * share + 1e-9).clip(1)[labels] for share in np.cumsum(parts)]
    part = sum((ranks >= end).astype(int) for end in ends)
    return [np.flatnonzero(part == k) for k in range(len(parts) + 1)]


def find(title: str, data_dir: str | None, fits: Callable[[Path], bool], needs: str) -> Path:
    """The first folder that fits, in data_dir or else in the known places, at most five levels down."""
    roots = [Path(data_dir)] if data_dir else [Path("data"), Path("/kaggle/input")]
    level = [root for root in roots if root.is_dir()]
    for _ in range(6):
        for folder in level:
            if fits(folder):
                print(f"{title}: {folder}")
                return folder
        level = [child for folder in level for child in subfolders(folder)]
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
    """An idx file of bytes, gzipped or not: uint8 images (N, H, W), or labels (N,) as int64."""
    path = idx_file(folder, name)
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        sides = content[3]  # how many dimensions; then each as a big-endian int32
        shape = np.frombuffer(content, ">i4", sides, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * sides).reshape(shape)
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a whole idx file ({error}); get it again") from None
    return values if sides > 1 else values.astype(np.int64)


def tiny_imagenet(data_dir: str | None):
    """The labelled 100,000 of Tiny-ImageNet as 80,000 train, 10,000 val, 10,000 test: 400/50/50 a class."""
    root = find(
        "Tiny-ImageNet",
        data_dir,
        lambda folder: (folder / "wnids.txt").is_file() and (folder / "train").is_dir(),
        "a folder with wnids.txt and train/; get http://cs231n.stanford.edu/tiny-imagenet-200.zip, "
        "unzip it in ./data or name its folder with --data-dir (on Kaggle: Add Input, Tiny ImageNet)",
    )
    ids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    files, labels = list_classes(root / "train", ids)
    relative = [Path(file).relative_to(root).as_posix() for file in files]
    parts = stratified(relative, labels, [0.8, 0.1])
    everything = Split(labels, files)
    splits = dict(zip(("train", "val", "test"), map(everything.rows, parts), strict=True))
    return splits, readable_names(ids, root / "words.txt")


def readable_names(ids: list[str], words: Path) -> list[str]:
    """The first word that WordNet has for each id; the id too where two share it."""
    if not words.is_file():
        return ids
    lines = (
        line.split("\t") for line in words.read_text(encoding="utf-8").splitlines() if "\t" in line
    )
    word = {key: names.split(",")[0] for key, names in lines}
    names = [word.get(key, key) for key in ids]
    return [f"{n} {key}" if names.count(n) > 1 else n for n, key in zip(names, ids, strict=True)]


def folder(data_dir: str | None):
    """Class folders of one's own: DIR/train/cat/*.jpg and DIR/val/cat/*.jpg (or valid, or validation),
    or DIR/cat/*.jpg, of which one image in five validates."""
    root = Path(data_dir or "data")
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root.absolute()} not found: --dataset folder needs --data-dir with a folder for each class"
        )
    inside = {path.name: path for path in subfolders(root)}
    split = "train" in inside and subfolders(inside["train"])  # else it is a class of trains
    top, val = (inside["train"], None) if split else (root, None)
    if split:
        val = next(
            (inside[name] for name in ("val", "valid", "validation") if name in inside), None
        )
    classes = [path.name for path in subfolders(top)]
    if len(classes) < 2:
        found = f"{classes[0]} alone; is it --data-dir {top / classes[0]}?" if classes else "none"
        raise ValueError(
            f"{top}: expected a folder of images for each of the classes, found {found}"
        )
    files, labels = list_classes(top, classes)
    everything = Split(labels, files)
    if not val:
        relative = [Path(file).relative_to(root).as_posix() for file in files]
        rows = stratified(relative, labels, [0.8])
        return dict(zip(("train", "val"), map(everything.rows, rows), strict=True)), classes
    unknown = [path for path in subfolders(val) if path.name not in classes]
    if unknown:
        raise ValueError(f"{unknown[0]}: a class that {top} does not have; add it or remove it")
    val_files, val_labels = list_classes(val, classes, may_lack=True)
    return {"train": everything, "val": Split(val_labels, val_files)}, classes


def list_classes(root: Path, classes: list[str], may_lack: bool = False):
    """The image files below root/<class>/ of each class, sorted, and their labels."""
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            os.path.join(path, file)
            for path, _, there in os.walk(root / name)
            for file in there
            if file.lower().endswith(IMG_EXTENSIONS) and not file.startswith(".")
        )
        if not found and not may_lack:
            raise ValueError(f"{root / name}: no images; put some in or remove the folder")
        files += found
        labels += [label] * len(found)
    return files, np.array(labels, np.int64)


SOURCES = {
    "demo": demo,
    "tiny-imagenet": tiny_imagenet,
    "folder": folder,
    "fashion-mnist": fashion_mnist,
}
