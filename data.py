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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import datasets
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
    workers: int | None = None,
) -> Dataset:
    """Find a data set and decode it if its images are small.

    name: one of SOURCES.
    data_dir: where it lies (or a folder above it); None searches ./data and /kaggle/input.
    limit: at most this many images of each split, as even over the classes as they go.
    classes: keep the images of these classes only; the list of classes stays whole.
    workers: processes that decode; None for one per usable core.

    Raises FileNotFoundError if it is not there, ValueError for what is wrong with it or the arguments.
    """
    if name not in SOURCES:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(SOURCES)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit}: expected at least 1 image of each split")
    splits, names = SOURCES[name](data_dir)
    wanted = classes.split(",") if isinstance(classes, str) else classes
    for unknown in set(wanted or []) - set(names):
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
        if split.pixels is None and is_small(split.files):
            split = Split(split.labels, pixels=decode_all(split.files, usable(workers), key))
        splits[key] = split
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
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (images, labels) on the device, once through the split.

    preprocessing: vit.build's dict of image_size, mean, std and crop.
    train: shuffle and augment, as seed and epoch say. Otherwise: in order, the centre of each image.
    min_crop: the smallest random crop, as a part of the image's area; 1 for the centre, as evaluation.
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
        images = images.to(device, non_blocking=True)
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

    def __getitem__(self, row: int) -> torch.Tensor:
        """From a file: uint8 (3, size, size). Runs in a worker process."""
        with open_image(self.split.files[row]) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5  # on its side: width is height
            width, height = image.size[::-1] if turned else image.size
            boxes, flips = self.boxes(torch.tensor([row]), height, width)
            left, top, wide, high = (float(side) for side in boxes)
            # A JPEG decodes at 1/2, 1/4 or 1/8 for less: the smallest at which the crop still has size.
            need = math.ceil(self.size * width / wide), math.ceil(self.size * height / high)
            image.draft("RGB", need[::-1] if turned else need)
            image = to_rgb(image, self.split.files[row])
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


def centre_boxes(n: int, height: int, width: int, part: float) -> torch.Tensor:
    """The centred square whose side is this part of the shorter side, (4, n): see random_boxes."""
    side = part * min(height, width)
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


def open_image(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error}); remove it") from None


def to_rgb(image: Image.Image, path: str) -> Image.Image:
    """Decode an opened image, upright, as RGB."""
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image that can be read ({error}); remove it") from None


class Whole(TorchDataset):
    """Whole images of one size, uint8 (H, W, 3). Runs in worker processes."""

    def __init__(self, files: list[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray:
        with open_image(self.files[row]) as image:
            return np.array(to_rgb(image, self.files[row]))


def is_small(files: list[str]) -> bool:
    """Whether all images are of one size, and it is small."""
    first = None
    for path in files:
        with open_image(path) as image:  # reads the header alone
            first = first or image.size
            if max(first) > SMALL or image.size != first:
                return False
    return True


def decode_all(files: list[str], workers: int, name: str) -> np.ndarray:
    """All of the files as one array, uint8 (N, H, W, 3)."""
    workers = workers if len(files) > 1000 else 0  # few files are read before a process has started
    loader = DataLoader(
        Whole(files), batch_size=250, num_workers=workers, collate_fn=np.stack, shuffle=False
    )
    out = None
    with tqdm(total=len(files), desc=f"decode {name}", unit=" images", leave=False) as progress:
        for images in loader:
            if out is None:
                out = np.empty((len(files), *images.shape[1:]), np.uint8)
            out[progress.n : progress.n + len(images)] = images
            progress.update(len(images))
    return out


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
    """Split rows so that each class is split in these parts; the rest is one part more.

    The order is that of a hash of each name (a path relative to the data set): it does not depend on
    where the data lies, on the order of listing, or on a version of a random generator.
    """
    by_hash = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    ranks, sizes = np.empty(len(labels), np.int64), np.bincount(labels)
    ranks[by_hash] = class_ranks(labels[by_hash])
    ends = [np.floor(sizes * share + 1e-9)[labels] for share in np.cumsum(parts)]
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
        level = [Path(entry) for folder in level for entry in os.scandir(folder) if entry.is_dir()]
        level.sort()
    looked = " and ".join(str(root.absolute()) for root in roots)
    raise FileNotFoundError(f"{title} not found: looked in and below {looked} for {needs}")


def demo(data_dir: str | None):
    """10,000 digits of MNIST: for each class 400 to train, 200 to validate, the rest to test."""
    pixels, labels = (
        read_idx(ASSETS / f"digits-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1")
    )
    ranks = class_ranks(labels)
    splits = {"train": ranks < 400, "val": (ranks >= 400) & (ranks < 600), "test": ranks >= 600}
    classes = "zero one two three four five six seven eight nine".split()
    return {
        key: Split(labels[chosen], pixels=pixels[chosen]) for key, chosen in splits.items()
    }, classes


def read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes: uint8 images (N, H, W), or labels (N,) as int64."""
    content = gzip.decompress(path.read_bytes())
    sides = content[
        3
    ]  # the fourth byte is the number of dimensions, then each as a big-endian int32
    shape = np.frombuffer(content, ">i4", sides, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * sides).reshape(shape)
    return values if sides > 1 else values.astype(np.int64)


def fashion_mnist(data_dir: str | None):
    """60,000 and 10,000 clothes, 28 x 28, which the embedded trunk was pretrained on."""
    root = find(
        "Fashion-MNIST",
        data_dir,
        lambda folder: (folder / "FashionMNIST" / "raw").is_dir(),
        "FashionMNIST/raw/ with its four idx files; torchvision.datasets.FashionMNIST(root, "
        "download=True) gets them",
    )
    parts = {"train": True, "val": False}
    found = {key: datasets.FashionMNIST(root, train=train) for key, train in parts.items()}
    splits = {
        key: Split(part.targets.numpy(), pixels=part.data.numpy()) for key, part in found.items()
    }
    return splits, found["train"].classes


def tiny_imagenet(data_dir: str | None):
    """The labelled 100,000 of Tiny-ImageNet as 80,000 train, 10,000 val, 10,000 test: 400/50/50 a class."""
    root = find(
        "Tiny-ImageNet",
        data_dir,
        lambda folder: (folder / "wnids.txt").is_file() and (folder / "train").is_dir(),
        "a folder with wnids.txt and train/; get http://cs231n.stanford.edu/tiny-imagenet-200.zip, "
        "unzip it in ./data or name its folder with --data-dir (on Kaggle: Add Input, Tiny ImageNet)",
    )
    ids = sorted((root / "wnids.txt").read_text().split())
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
    lines = (line.split("\t") for line in words.read_text().splitlines() if "\t" in line)
    word = {key: names.split(",")[0] for key, names in lines}
    names = [word.get(key, key) for key in ids]
    return [f"{n} {key}" if names.count(n) > 1 else n for n, key in zip(names, ids, strict=True)]


def folder(data_dir: str | None):
    """Class folders of one's own: DIR/train/cat/*.jpg and DIR/val/cat/*.jpg, or DIR/cat/*.jpg, of
    which every fifth image validates."""
    root = Path(data_dir or "data")
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root.absolute()} not found: --dataset folder needs --data-dir with a folder for each class"
        )
    train, val = root / "train", root / "val"
    top = train if train.is_dir() else root
    classes = sorted(entry.name for entry in os.scandir(top) if entry.is_dir())
    if not classes:
        raise ValueError(f"{top}: no class folders; expected a folder of images for each class")
    files, labels = list_classes(top, classes)
    everything = Split(labels, files)
    if not val.is_dir():
        relative = [Path(file).relative_to(root).as_posix() for file in files]
        rows = stratified(relative, labels, [0.8])
        return dict(zip(("train", "val"), map(everything.rows, rows), strict=True)), classes
    names = {entry.name for entry in os.scandir(val) if entry.is_dir()}
    if unknown := sorted(names - set(classes)):
        raise ValueError(
            f"{val / unknown[0]}: a class that {train} does not have; add it or remove it"
        )
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
            if file.lower().endswith(IMG_EXTENSIONS)
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
