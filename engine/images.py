"""Batches of images on the device, out of a data set that sources.py found.

    dataset = load("tiny-imagenet")
    keep(dataset.train, "runs/cache")
    for images, labels in batches(dataset.train, 64, preprocessing, "cuda", train=True):
        ...                            # float32 (64, 3, size, size), normalised, and int64 (64,)

There are two paths. Small images (all of one size, at most 96 pixels) are decoded once by keep and lie as
uint8 in one file; a GPU is given those of a batch as they are, and crops, flips, resizes and normalises
them. Other images are read one by one, in worker processes: decoded at the smallest scale that the crop
needs, or, kept with cache=True, cut out of one file; the device normalises. Small images for a CPU go that
way too, as there is no device to spare. In both, each image has a crop and a flip of its own, drawn in the
main process: the same seed gives the same batches for any number of workers.

A file that cannot be decoded is replaced by the next one of its split that can, with a warning.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from engine.files import atomic, remove_temporaries

SMALL = 96  # pixels: up to this side a data set is decoded once and kept
ORIENTATION = 0x0112  # the EXIF tag


def ignore_interrupts(worker: int) -> None:
    """In a worker process: ctrl-C reaches it too, but the run wants its last batches before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class Split:
    """The images of one split, as files or as pixels, and their labels."""

    labels: np.ndarray  # (N,) int64
    files: list[str] | None = None
    pixels: np.ndarray | None = None  # (N, H, W, 3) uint8; or images.Kept, for images of many sizes
    bad: dict[int, str] = field(default_factory=dict)  # rows that cannot be read, and why

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int64)  # NumPy 1's default on Windows has 32 bits

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: np.ndarray) -> "Split":
        """The split of these rows alone."""
        return Split(
            self.labels[rows],
            None if self.files is None else [self.files[row] for row in rows],
            None if self.pixels is None else self.pixels[rows],
            {i: self.bad[row] for i, row in enumerate(rows.tolist()) if row in self.bad},
        )


class Crops(TorchDataset):
    """A crop of an image for each (row, draws): five numbers in 0..1 for its area, ratio, horizontal
    and vertical place and flip, or None for the centre. Runs in worker processes."""

    def __init__(
        self, split: Split, preprocessing: dict, min_crop: float = 1.0, flip: bool = False
    ):
        self.split, self.min_crop, self.flip = split, min_crop, flip
        self.size, self.centre = preprocessing["image_size"], preprocessing["crop"]
        mean, std = (255 * torch.tensor(preprocessing[key]) for key in ("mean", "std"))
        self.scale, self.shift = 1 / std, -mean / std

    def box(self, draws: list[float] | None, height: int, width: int) -> tuple[tuple, bool]:
        """(left, top, width, height) in pixels, and whether to flip."""
        if draws is None:
            return centre_box(height, width, self.centre), False
        flip = self.flip and draws[4] < 0.5
        if self.min_crop < 1:
            return random_box(draws, height, width, self.min_crop), flip
        return centre_box(height, width, self.centre), flip

    def __getitem__(self, wanted: tuple) -> torch.Tensor | tuple:
        """uint8 (size, size, 3); or (row, draws, what is wrong with the file)."""
        row, draws = wanted
        if self.split.pixels is not None:
            pixels = self.split.pixels[row]
            box, flip = self.box(draws, *pixels.shape[:2])
            return resize_crop(pixels, box, flip, self.size)
        try:
            with opened(self.split.files[row]) as image:
                if image.format == "JPEG":
                    # On its side, its width is its height.
                    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
                    width, height = image.size[::-1] if turned else image.size
                    box, flip = self.box(draws, height, width)
                    # It decodes at 1/2, 1/4 or 1/8 for less: the smallest at which the crop has size.
                    sides = zip((width, height), box[2:], strict=True)
                    need = [math.ceil(self.size * side / part) for side, part in sides]
                    image.draft("RGB", need[::-1] if turned else need)
                    image = upright_rgb(image)
                else:
                    image = upright_rgb(image)
                    width, height = image.size
                    box, flip = self.box(draws, height, width)
        except ValueError as error:
            return row, draws, str(error)
        if image.width != width:  # a box of whole pixels would be too coarse at a smaller scale
            share = image.width / width
            left, top, wide, high = (side * share for side in box)
            right, bottom = min(left + wide, image.width), min(top + high, image.height)
            target = self.size, self.size
            image = image.resize(target, Image.Resampling.BILINEAR, box=(left, top, right, bottom))
            box = 0, 0, *target
        left, top, wide, high = box
        pixels = np.array(image.crop((left, top, left + wide, top + high)))
        return resize_crop(pixels, (0, 0, wide, high), flip, self.size)

    def readable(self, wanted: tuple) -> torch.Tensor:
        """As __getitem__, with the next image that can be read in the place of one that cannot."""
        item = self[wanted]
        while isinstance(item, tuple):
            row, draws, reason = item
            mark_bad(self.split, row, reason)
            item = self[stand_in(self.split, row), draws]
        return item

    def collate(self, items: list) -> tuple[torch.Tensor, dict]:
        """The batch, uint8 (B, size, size, 3), and by their places in it those that cannot be read."""
        errors = {i: item for i, item in enumerate(items) if isinstance(item, tuple)}
        blank = torch.zeros(self.size, self.size, 3, dtype=torch.uint8)
        return torch.stack([blank if i in errors else x for i, x in enumerate(items)]), errors

    def mend(self, images: torch.Tensor, errors: dict) -> torch.Tensor:
        """What collate returned, with other images in the places of those that cannot be read."""
        for i, (row, draws, reason) in errors.items():
            mark_bad(self.split, row, reason)
            images[i] = self.readable((stand_in(self.split, row), draws))
        return images

    def on_device(self, wanted: list, device: torch.device) -> torch.Tensor:
        """The same crops as __getitem__'s, of small images, resized and normalised on the device."""
        rows, draws = zip(*wanted, strict=True)
        images = torch.from_numpy(self.split.pixels[list(rows)])  # (B, H, W, 3)
        boxes, flips = zip(*(self.box(d, *images.shape[1:3]) for d in draws), strict=True)
        boxes, flips = torch.tensor(boxes).T, torch.tensor(flips)
        if device.type == "cuda":
            images = images.pin_memory()
        images = self.normalise(images.to(device, non_blocking=device.type == "cuda"))
        return resize(images, boxes.to(device), flips.to(device), self.size)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), of mean 0 and deviation 1, channels last in memory."""
        scale, shift = (values.to(images.device) for values in (self.scale, self.shift))
        return (images * scale + shift).permute(0, 3, 1, 2)

    def on_cpu(self, images: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        """The same, each image at once while it is in the processor's cache, in rows of pixels and channels
        together, and in one thread: for so little, more of them only wait for each other."""
        scale, shift = (values.repeat(self.size) for values in (self.scale, self.shift))
        batch = torch.empty(count, self.size, self.size * 3)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for rows, image in zip(batch, images, strict=True):
                rows.copy_(image.flatten(1)).mul_(scale).add_(shift)
        finally:
            torch.set_num_threads(threads)
        return batch.view(count, self.size, self.size, 3).permute(0, 3, 1, 2)


def random_box(draws: list[float], height: int, width: int, min_crop: float) -> tuple:
    """A random-resized-crop box: left, top, width, height in pixels.

    The area is uniform in min_crop..1 of the image and width / height log-uniform in 3/4..4/3, as in
    torchvision's RandomResizedCrop; a box that would stick out shrinks, where torchvision draws anew.
    """
    area = height * width * (min_crop + (1 - min_crop) * draws[0])
    ratio = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
    wide = min(math.sqrt(area * ratio), ratio * height, width)
    high = wide / ratio
    return fit_box(
        [draws[2] * (width - wide), draws[3] * (height - high), wide, high], width, height
    )


def centre_box(height: int, width: int, share: float) -> tuple:
    """The centred square whose side is this share of the shorter side: see random_box."""
    side = share * min(height, width)
    return fit_box([(width - side) / 2, (height - side) / 2, side, side], width, height)


def fit_box(box: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The box in whole pixels, at least one wide and high, inside the image."""
    wide, high = (
        min(max(round(side), 1), most) for side, most in zip(box[2:], (width, height), strict=True)
    )
    return min(round(box[0]), width - wide), min(round(box[1]), height - high), wide, high


def resize_crop(pixels: np.ndarray, box: tuple, flip: bool, size: int) -> torch.Tensor:
    """A crop of one image, uint8 (H, W, 3) -> (size, size, 3), with PIL's bilinear filter."""
    left, top, wide, high = box
    crop = torch.from_numpy(pixels[top : top + high, left : left + wide])[None]
    crop = (crop.flip(2) if flip else crop).permute(0, 3, 1, 2)  # channels last: twice as fast
    crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
    return crop[0].permute(1, 2, 0)


def resize(images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int):
    """Resize a box of its own in each image of a batch, (B, C, H, W) -> (B, C, size, size).

    A resize is linear: rows and columns are each multiplied by a matrix of weights, and to flip is to
    reverse one of them. The weights are those of PIL's bilinear filter, which averages as it shrinks.
    boxes: (4, B), left, top, width, height in pixels.
    """
    left, top, wide, high = boxes.to(images.dtype)
    down = resize_matrix(top, high, images.shape[-2], size)  # (B, size, H)
    across = resize_matrix(left, wide, images.shape[-1], size)  # (B, size, W)
    across = torch.where(flips[:, None, None], across.flip(1), across)
    return down[:, None] @ images @ across[:, None].mT


def resize_matrix(start: torch.Tensor, length: torch.Tensor, pixels: int, size: int):
    """Weights (B, size, pixels) with which each of size outputs averages the pixels of its box."""
    step = (length / size)[:, None]  # (B, 1) input pixels to an output
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step
    place = torch.arange(pixels, device=start.device) + 0.5
    weights = 1 - (place - centre[..., None]).abs() / step.clamp(min=1)[..., None]
    inside = (place > start[:, None]) & (
        place < (start + length)[:, None]
    )  # a crop ends at its edge
    weights = weights.clamp(min=0) * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image file, open. Whatever goes wrong with it comes as a ValueError that names it."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # PIL meets broken files with errors of any type
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode an opened image, turned as its EXIF tag says, as RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 0..65535, which convert would cut off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # of no known range
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 or 16 bits a channel")
    return image if image.mode == "RGB" else image.convert("RGB")


def stand_in(split: Split, row: int) -> int:
    """The row itself, or the next one after it that can be read."""
    if len(split.bad) == len(split):
        raise ValueError(
            f"none of the {len(split)} images can be read: {next(iter(split.bad.values()))}"
        )
    while row in split.bad:
        row = (row + 1) % len(split)
    return row


def mark_bad(split: Split, row: int, reason: str) -> None:
    """Note that a row cannot be read and warn of it, once; ValueError if there are too many."""
    if row in split.bad:
        return
    split.bad[row] = reason
    tqdm.write(f"{reason}; another image takes its place", file=sys.stderr)
    if len(split.bad) >= 10 and len(split.bad) > len(split) / 100:
        files = ", ".join(split.files[row] for row in sorted(split.bad))
        raise ValueError(
            f"{len(split.bad)} of {len(split)} images cannot be read, which is over 1 %; mend or remove "
            f"them: {files}"
        )


class Kept:
    """Decoded images of many sizes, one behind the other in one file: kept[row] is uint8 (H, W, 3), and
    kept[rows] those images alone."""

    def __init__(
        self, source: Path | np.ndarray, sizes: np.ndarray, starts: np.ndarray | None = None
    ):
        self.source, self.sizes, self.bytes = source, sizes, None  # (N, 2): height, width
        lengths = sizes.prod(1) * 3
        self.starts = np.cumsum(lengths) - lengths if starts is None else starts

    def __getitem__(self, row):
        if isinstance(row, np.ndarray):
            return Kept(self.source, self.sizes[row], self.starts[row])
        if self.bytes is None:  # each process opens the file itself
            self.bytes = opened_bytes(self.source)
        start, (high, wide) = self.starts[row], self.sizes[row]
        return self.bytes[start : start + 3 * high * wide].reshape(high, wide, 3)

    def __getstate__(self) -> dict:
        return {**vars(self), "bytes": None}


def opened_bytes(source: Path | np.ndarray) -> np.ndarray:
    # Mode c: torch wants arrays that may be written, and nothing that is written reaches the file.
    # asarray: a slice of a plain array is quicker than one of a memmap.
    return np.asarray(np.memmap(source, np.uint8, "c")) if isinstance(source, Path) else source


def keep(
    split: Split,
    folder: str | Path,
    size: int = 224,
    cache: bool = False,
    workers: int | None = None,
    small: bool | None = None,
) -> None:
    """Decode a split once and for all into a file in the folder, or find it there: small images always,
    others if cache says so, resized so that evaluation's centre crop needs no more.

    The file is known by the paths in the split, and made anew if the size or time of one has changed. If
    it cannot be written, small images are kept in memory and others are decoded each time, with a warning.

    size: pixels of a side that the model wants; images are kept with a shorter side of 256 / 224 of it.
    workers: processes that decode; None for one per usable core.
    small: whether to take the images for small ones; None for what the first of them is.
    Raises ValueError if ten or more files, and over 1 % of them, cannot be read.
    """
    if split.pixels is not None:
        return
    first = first_size(split.files)
    small = max(first) <= SMALL if small is None else small
    if not small and not cache:
        return
    side = None if small else round(size * 256 / 224)
    whole = Whole(split.files, side, blank=first if small else (1, 1))
    source = Path(folder) / f"{whole.name()}.pixels"
    try:
        index = read_index(source, whole) or write_pixels(source, whole, workers)
    except TooLarge:  # a photograph among icons
        if cache:
            keep(split, folder, size, True, workers, small=False)
        return
    except OSError as error:
        instead = "they are kept in memory" if small else "they are decoded in each epoch"
        tqdm.write(
            f"{source}: the images cannot be kept there ({error}); {instead}", file=sys.stderr
        )
        if not small:
            return
        parts = []
        index = whole.decode(workers, parts.append)
        source = np.concatenate(parts)
    for row, reason in index["bad"].items():
        mark_bad(split, int(row), reason)
    sizes = np.array(index["sizes"], np.int64)
    if small and (sizes == first).all():
        split.pixels = opened_bytes(source).reshape(len(split), *first[::-1], 3)
    else:
        split.pixels = Kept(source, sizes)


class TooLarge(Exception):
    """An image among small ones is not small."""


class Whole(TorchDataset):
    """The whole image of each file: its shorter side at most so many pixels, or, with side None, as it is
    if it is small. Runs in worker processes."""

    def __init__(self, files: list[str], side: int | None, blank: tuple[int, int]):
        self.files, self.side, self.blank = files, side, blank  # width, height where one is bad

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray | str:
        """uint8 (H, W, 3), or what is wrong with the file."""
        try:
            with opened(self.files[row]) as image:
                large = self.side is None and max(image.size) > SMALL
                if self.side:
                    image.draft("RGB", (self.side, self.side))  # not below it
                image = image if large else upright_rgb(image)
        except ValueError as error:
            return str(error)
        if large:
            raise TooLarge
        if self.side and min(image.size) > self.side:
            share = self.side / min(image.size)
            wide, high = (max(self.side, round(length * share)) for length in image.size)
            image = image.resize((wide, high), Image.Resampling.BILINEAR)
        return np.array(image)

    def collate(self, images: list) -> tuple[np.ndarray, list, list]:
        """All bytes in a row, the (H, W) of each image, and what is wrong with each (or None)."""
        errors = [image if isinstance(image, str) else None for image in images]
        blank = np.zeros((*self.blank[::-1], 3), np.uint8)
        images = [blank if error else image for image, error in zip(images, errors, strict=True)]
        flat = np.concatenate([image.ravel() for image in images])
        return torch.from_numpy(flat), [image.shape[:2] for image in images], errors

    def decode(self, workers: int | None, write) -> dict:
        """Decode all, write the bytes, and return the index: sizes, and bad, the reason for each row."""
        few = len(self) < 1000  # read before a process has started
        loader = DataLoader(
            self,
            batch_size=64,
            num_workers=0 if few else usable(workers),
            collate_fn=self.collate,
            generator=torch.Generator(),
        )
        sizes, errors = [], []
        for flat, some_sizes, some_errors in progress(loader, desc="decode", unit=" batches"):
            write(flat.numpy())
            sizes += some_sizes
            errors += some_errors
        return {"sizes": sizes, "bad": {str(row): e for row, e in enumerate(errors) if e}}

    def name(self) -> str:
        """Of the file for these paths and this side."""
        text = "\n".join([str(self.side), *map(os.path.abspath, self.files)])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def identity(self) -> str:
        """Of what lies at the paths now: the size and time of each file."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                stat = os.stat(file)
                digest.update(b"%d %d," % (stat.st_size, stat.st_mtime_ns))
            except OSError:
                digest.update(b"missing,")
        return digest.hexdigest()


def read_index(path: Path, whole: Whole) -> dict | None:
    """The index of a file of pixels, if it is there, whole, and of the images as they are now."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        fits = path.stat().st_size == sum(3 * high * wide for high, wide in index["sizes"])
        healed = any(not isinstance(whole[int(row)], str) for row in index["bad"])
        return index if fits and index["identity"] == whole.identity() and not healed else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_pixels(path: Path, whole: Whole, workers: int | None) -> dict:
    """Decode the images into a file with its index beside it, each in one piece; return the index.

    Raises OSError, with nothing left behind, if they have no room or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, idle=3600)
    identity, needed = whole.identity(), expected_bytes(whole)
    print(f"{len(whole):,} images are decoded into {path}: {needed / 1e9:.2f} GB", flush=True)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{needed / 1e9:.1f} GB wanted, {free / 1e9:.1f} GB are free")
    with atomic(path) as temporary, open(temporary, "wb") as file:
        index = {"identity": identity, **whole.decode(workers, file.write)}
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(index))
    return index


def expected_bytes(whole: Whole) -> int:
    """What the decoded images will take, by the headers of a hundred of them."""
    total, rows = 0, range(0, len(whole), -(-len(whole) // 100))
    for row in rows:
        try:
            wide, high = first_size(whole.files[row : row + 1])
        except ValueError:
            wide, high = whole.blank
        share = min(1, (whole.side or SMALL) / min(wide, high))
        total += 3 * round(wide * share) * round(high * share)
    return total * len(whole) // len(rows)


def first_size(files: list[str]) -> tuple[int, int]:
    """Width and height of the first of the files that can be opened."""
    for file in files:
        try:
            with opened(file) as image:
                return image.size
        except ValueError as error:
            reason = error
    raise ValueError(f"none of the {len(files)} images can be read: {reason}")


def progress(iterable=None, **how) -> tqdm:
    """A bar for somebody who watches, in a terminal or a notebook; a log file gets none."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    watched = watched and os.environ.get("RANK", "0") == "0"  # one of torchrun's processes
    return tqdm(iterable, leave=False, disable=not watched, **how)


def usable(workers: int | None) -> int:
    """The number of worker processes: as asked, else one per core that this process may use."""
    if workers is not None:
        return workers
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: knows of taskset and containers
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    return min(8, max(1, cores // sharing))
