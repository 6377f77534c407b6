"""Crops of images, and a cache of decoded images.

    keep(split, "runs/cache", cache=True)                # decode the files of a split into one file
    Crops(split, preprocessing, 0.08, True)[row, draws]  # a random crop, uint8 (size, size, 3)

keep decodes small images (sides of at most 96 pixels) always, larger ones with cache=True. Crops cuts kept
pixels, or a file decoded at the smallest scale that the crop needs. An image that cannot be read is replaced
by the next readable one of its split, with a warning.
"""

import hashlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import warnings
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

from engine.files import atomic, checksum, remove_temporaries

SMALL = 96  # pixels: images with sides up to this are always kept
ORIENTATION = 0x0112  # the EXIF tag
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass
class Split:
    """The images of one split, as files or pixels, and their labels."""

    labels: np.ndarray  # (N,) int64
    files: list[str] | None = None
    pixels: np.ndarray | None = None  # (N, H, W, 3) uint8; or Kept, for images of many sizes
    bad: dict[int, str] = field(default_factory=dict)  # unreadable row: reason
    # Loaders whose worker processes wait for the next epoch; see data.batches.
    idle: dict = field(default_factory=dict)

    def __post_init__(self):
        self.labels = np.asarray(self.labels, np.int64)  # NumPy 1's default on Windows has 32 bits

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: np.ndarray) -> "Split":
        """The split with only these rows."""
        return Split(
            self.labels[rows],
            None if self.files is None else [self.files[row] for row in rows],
            None if self.pixels is None else self.pixels[rows],
            {i: self.bad[row] for i, row in enumerate(rows.tolist()) if row in self.bad},
        )


class Crops(TorchDataset):
    """The crop of an image for each (row, draws). Runs in worker processes.

    draws: five numbers in 0..1, for the crop's area, ratio, horizontal and vertical place and flip; None
        for the centre.
    """

    def __init__(
        self, split: Split, preprocessing: dict, min_crop: float = 1.0, flip: bool = False
    ):
        self.split, self.min_crop, self.flip = split, min_crop, flip
        self.size, self.centre = preprocessing["image_size"], preprocessing["crop"]
        # Adapter files of older versions do not name their filter, which was bilinear.
        self.interpolation = preprocessing.get("interpolation", "bilinear")
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

    def __getitem__(self, request: tuple) -> torch.Tensor | tuple:
        """uint8 (size, size, 3); or (row, draws, reason) if the file cannot be read."""
        row, draws = request
        if self.split.pixels is not None:
            pixels = self.split.pixels[row]
            box, flip = self.box(draws, *pixels.shape[:2])
            return resize_crop(pixels, box, flip, self.size, self.interpolation)
        try:
            with opened(self.split.files[row]) as image:
                if image.format == "JPEG":
                    # The header has the width and height before a turn.
                    turned = image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
                    width, height = image.size[::-1] if turned else image.size
                    box, flip = self.box(draws, height, width)
                    # A JPEG decodes faster at 1/2, 1/4 or 1/8: the smallest that leaves the crop its size.
                    sides = zip((width, height), box[2:], strict=True)
                    least = [math.ceil(self.size * side / part) for side, part in sides]
                    image.draft("RGB", least[::-1] if turned else least)
                    image = upright_rgb(image)
                else:
                    image = upright_rgb(image)
                    width, height = image.size
                    box, flip = self.box(draws, height, width)
        except ValueError as error:
            return row, draws, str(error)
        if image.width != width:  # at a smaller scale, a box of whole pixels is too coarse
            share = image.width / width
            left, top, wide, high = (side * share for side in box)
            right, bottom = min(left + wide, image.width), min(top + high, image.height)
            target, pil_filter = (self.size, self.size), FILTERS[self.interpolation]
            image = image.resize(target, pil_filter, box=(left, top, right, bottom))
            box = 0, 0, *target
        left, top, wide, high = box
        pixels = np.array(image.crop((left, top, left + wide, top + high)))
        return resize_crop(pixels, (0, 0, wide, high), flip, self.size, self.interpolation)

    def readable(self, request: tuple) -> torch.Tensor:
        """The crop, of the next readable image if this one cannot be read."""
        item = self[request]
        while isinstance(item, tuple):
            row, draws, reason = item
            mark_bad(self.split, row, reason)
            item = self[stand_in(self.split, row), draws]
        return item

    def collate(self, items: list) -> tuple[torch.Tensor, dict]:
        """The batch, uint8 (B, size, size, 3), and its unreadable images: {place: (row, draws, reason)}."""
        errors = {i: item for i, item in enumerate(items) if isinstance(item, tuple)}
        blank = torch.zeros(self.size, self.size, 3, dtype=torch.uint8)
        return torch.stack([blank if i in errors else x for i, x in enumerate(items)]), errors

    def mend(self, images: torch.Tensor, errors: dict) -> torch.Tensor:
        """The batch, in which other images replace the unreadable ones. Arguments: what collate returns."""
        for i, (row, draws, reason) in errors.items():
            mark_bad(self.split, row, reason)
            images[i] = self.readable((stand_in(self.split, row), draws))
        return images

    def on_device(self, requests: list, device: torch.device) -> torch.Tensor:
        """The crops of a batch of small images, float32 (B, 3, size, size), computed on the device."""
        rows, draws = zip(*requests, strict=True)
        images = torch.from_numpy(self.split.pixels[list(rows)])  # (B, H, W, 3)
        boxes, flips = zip(*(self.box(d, *images.shape[1:3]) for d in draws), strict=True)
        boxes, flips = torch.tensor(boxes).T, torch.tensor(flips)
        if device.type == "cuda":
            images = images.pin_memory()
        images = self.normalise(images.to(device, non_blocking=device.type == "cuda"))
        limits = torch.stack([self.shift, 255 * self.scale + self.shift])  # what 0 and 255 become
        black, white = limits.view(2, 3, 1, 1).to(device)
        boxes, flips = boxes.to(device), flips.to(device)
        return resize(images, boxes, flips, self.size, self.interpolation, black, white)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 (B, H, W, 3) -> float32 (B, 3, H, W), of mean 0 and deviation 1; memory: channels last."""
        scale, shift = (values.to(images.device) for values in (self.scale, self.shift))
        return (images * scale + shift).permute(0, 3, 1, 2)

    def on_cpu(self, images: Iterable[torch.Tensor], count: int) -> torch.Tensor:
        """As normalise, for count images on the CPU: each while it is in the processor's cache, and by one
        thread, as more threads would only wait for each other."""
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
    """The box of a random crop: left, top, width, height in pixels.

    As in torchvision's RandomResizedCrop, the area is uniform in min_crop..1 of the image and width / height
    is log-uniform in 3/4..4/3. A box larger than the image shrinks, where torchvision draws again.
    """
    area = height * width * (min_crop + (1 - min_crop) * draws[0])
    ratio = math.exp((2 * draws[1] - 1) * math.log(4 / 3))
    wide = min(math.sqrt(area * ratio), ratio * height, width)
    high = wide / ratio
    return fit_box(
        [draws[2] * (width - wide), draws[3] * (height - high), wide, high], width, height
    )


def centre_box(height: int, width: int, share: float) -> tuple:
    """The box of the centred square whose side is this share of the image's shorter side."""
    side = share * min(height, width)
    return fit_box([(width - side) / 2, (height - side) / 2, side, side], width, height)


def fit_box(box: list[float], width: int, height: int) -> tuple[int, int, int, int]:
    """The box in whole pixels, inside the image, at least one pixel wide and high."""
    wide, high = (
        min(max(round(side), 1), most) for side, most in zip(box[2:], (width, height), strict=True)
    )
    return min(round(box[0]), width - wide), min(round(box[1]), height - high), wide, high


def resize_crop(
    pixels: np.ndarray, box: tuple, flip: bool, size: int, interpolation: str = "bilinear"
) -> torch.Tensor:
    """A resized crop of one image, uint8 (H, W, 3) -> (size, size, 3), with PIL's filter of this name."""
    left, top, wide, high = box
    crop = torch.from_numpy(pixels[top : top + high, left : left + wide])[None]
    crop = (crop.flip(2) if flip else crop).permute(0, 3, 1, 2)  # channels last: twice as fast
    crop = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)
    return crop[0].permute(1, 2, 0)


def resize(
    images: torch.Tensor,
    boxes: torch.Tensor,
    flips: torch.Tensor,
    size: int,
    interpolation: str = "bilinear",
    black: torch.Tensor | float = 0.0,
    white: torch.Tensor | float = 255.0,
) -> torch.Tensor:
    """Resized crops of a batch, each image with its own box: (B, C, H, W) -> (B, C, size, size).

    Resizing is linear: one matrix of weights multiplies the rows and one the columns, and reversing the
    second one flips. The weights are those of PIL's filters, which average where they shrink.
    boxes: (4, B), left, top, width, height in pixels.
    black, white: the values of black and white pixels; tensors (C, 1, 1) if channels differ. Bicubic weights
        may be negative, so an edge can come out darker than black or lighter than white; it is clamped.
    """
    left, top, wide, high = boxes.to(images.dtype)
    down = resize_matrix(top, high, images.shape[-2], size, interpolation)  # (B, size, H)
    across = resize_matrix(left, wide, images.shape[-1], size, interpolation)  # (B, size, W)
    across = torch.where(flips[:, None, None], across.flip(1), across)
    if interpolation == "bilinear":
        return down[:, None] @ images @ across[:, None].mT
    # PIL stores the rows that it resized as 0..255 before it resizes the columns: it clamps twice.
    rows = (images @ across[:, None].mT).clamp_(black, white)  # (B, C, H, size)
    return (down[:, None] @ rows).clamp_(black, white)


def resize_matrix(
    start: torch.Tensor, length: torch.Tensor, pixels: int, size: int, interpolation: str
) -> torch.Tensor:
    """Weights (B, size, pixels): each of the size outputs is a weighted mean of the box's pixels."""
    step = (length / size)[:, None]  # (B, 1) input pixels for one output
    centre = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * step
    place = torch.arange(pixels, device=start.device) + 0.5
    distance = (place - centre[..., None]).abs() / step.clamp(min=1)[..., None]
    weights = bicubic(distance) if interpolation == "bicubic" else (1 - distance).clamp(min=0)
    end = (start + length)[:, None]
    inside = (place > start[:, None]) & (place < end)  # pixels outside of the crop do not count
    weights = weights * inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def bicubic(distance: torch.Tensor) -> torch.Tensor:
    """The weight of a pixel at this distance (>= 0) from the output: Keys' cubic with a = -0.5, as in PIL."""
    distance = distance.clamp(max=2)  # where the weight is 0
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = -0.5 * (distance - 1) * (distance - 2) ** 2
    return torch.where(distance < 1, near, far)


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An open image file. Any error while it is read becomes a ValueError with its name.

    PIL's warnings (of many pixels, odd EXIF data) do not appear: they do not name the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except Exception as error:  # broken files make PIL raise errors of any type
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """The decoded image as RGB, turned as its EXIF tag says, what is transparent laid on white."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 0..65535; convert would make all values above 255 white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # the range of their values is unknown
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 or 16 bits per channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def stand_in(split: Split, row: int) -> int:
    """The row itself if it can be read, else the next row that can."""
    if len(split.bad) == len(split):
        raise ValueError(
            f"none of the {len(split)} images can be read: {next(iter(split.bad.values()))}"
        )
    while row in split.bad:
        row = (row + 1) % len(split)
    return row


def mark_bad(split: Split, row: int, reason: str) -> None:
    """Record that a row cannot be read, and print a warning, once. ValueError if there are too many."""
    if row in split.bad:
        return
    split.bad[row] = reason
    tqdm.write(f"{reason}; another image takes its place", file=sys.stderr)
    if len(split.bad) >= 10 and len(split.bad) > len(split) / 100:
        files = ", ".join(split.files[row] for row in sorted(split.bad))
        raise ValueError(
            f"{len(split.bad)} of {len(split)} images cannot be read, which is over 1 %; repair or remove "
            f"them: {files}"
        )


class Kept:
    """Decoded images of many sizes, stored one after the other. kept[row] is one image, uint8 (H, W, 3);
    kept[rows], with an array of rows, is another Kept."""

    def __init__(
        self, source: Path | np.ndarray, sizes: np.ndarray, starts: np.ndarray | None = None
    ):
        self.source, self.sizes, self.bytes = source, sizes, None  # (N, 2): height, width
        lengths = sizes.prod(1) * 3
        self.starts = np.cumsum(lengths) - lengths if starts is None else starts

    def __getitem__(self, row):
        if isinstance(row, np.ndarray):
            return Kept(self.source, self.sizes[row], self.starts[row])
        if self.bytes is None:  # each process opens the file for itself
            self.bytes = opened_bytes(self.source)
        start, (high, wide) = self.starts[row], self.sizes[row]
        return self.bytes[start : start + 3 * high * wide].reshape(high, wide, 3)

    def __getstate__(self) -> dict:
        return {**vars(self), "bytes": None}


def opened_bytes(source: Path | np.ndarray) -> np.ndarray:
    # Mode c: torch needs writable arrays, and what is written must not reach the file.
    # asarray: slices of a plain array are faster than those of a memmap.
    return np.asarray(np.memmap(source, np.uint8, "c")) if isinstance(source, Path) else source


def keep(
    split: Split,
    folder: str | Path,
    size: int = 224,
    cache: bool = False,
    workers: int | None = None,
    small: bool | None = None,
    interpolation: str = "bilinear",
) -> None:
    """Decode a split into one file in the folder, or reuse that file, and set split.pixels.

    Small images are always kept, larger ones only with cache, and resized as far as evaluation allows. The
    file belongs to the paths in the split; it is written again if the size or time of an image has changed.
    If it cannot be written, small images are kept in memory, larger ones are not, and a warning says so.

    size: side of the model's images in pixels; the shorter side of kept larger images is 256 / 224 of it.
    workers: processes that decode; None means one per usable core.
    small: whether the images are small; None judges by the first one.
    interpolation: the filter that resizes larger images, bilinear or bicubic: that of the pretrained weights.

    Raises ValueError if ten or more files, and over 1 % of them, cannot be read.
    """
    if split.pixels is not None:
        return
    first = first_size(split.files)
    small = max(first) <= SMALL if small is None else small
    if not small and not cache:
        return
    side = None if small else round(size * 256 / 224)
    whole = Whole(split.files, side, blank=first if small else (1, 1), interpolation=interpolation)
    source = Path(folder) / f"{whole.name()}.pixels"
    try:
        try:
            index = read_index(source, whole) or write_pixels(source, whole, workers)
        except OSError as error:
            fallback = "they are kept in memory" if small else "they are decoded in each epoch"
            tqdm.write(
                f"{source}: the images cannot be kept there ({error}); {fallback}", file=sys.stderr
            )
            if not small:
                return
            parts = []
            index = whole.decode(workers, parts.append)
            source = np.concatenate(parts)
    except TooLarge:  # for example a photograph among icons
        if cache:
            keep(split, folder, size, True, workers, small=False, interpolation=interpolation)
        return
    for row, reason in index["bad"].items():
        mark_bad(split, int(row), reason)
    sizes = np.array(index["sizes"], np.int64)
    if small and (sizes == sizes[0]).all():
        split.pixels = opened_bytes(source).reshape(len(split), *sizes[0], 3)
    else:
        split.pixels = Kept(source, sizes)


class TooLarge(Exception):
    """One of the images that should be small is not."""


class Whole(TorchDataset):
    """The whole image of each file, its shorter side at most side pixels. Runs in worker processes.

    side: None leaves images as they are, and raises TooLarge if one is not small.
    blank: width and height of the black image that replaces an unreadable one.
    interpolation: the filter that resizes, bilinear or bicubic.
    """

    def __init__(
        self,
        files: list[str],
        side: int | None,
        blank: tuple[int, int],
        interpolation: str = "bilinear",
    ):
        self.files, self.side, self.blank = files, side, blank
        self.interpolation = interpolation

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> np.ndarray | str:
        """uint8 (H, W, 3), or the reason if the file cannot be read."""
        try:
            with opened(self.files[row]) as image:
                large = self.side is None and max(image.size) > SMALL
                if self.side:
                    image.draft("RGB", (self.side, self.side))  # no smaller than side
                image = image if large else upright_rgb(image)
        except ValueError as error:
            return str(error)
        if large:
            raise TooLarge
        if self.side and min(image.size) > self.side:
            share = self.side / min(image.size)
            wide, high = (max(self.side, round(length * share)) for length in image.size)
            image = image.resize((wide, high), FILTERS[self.interpolation])
        return np.array(image)

    def collate(self, images: list) -> tuple[np.ndarray, list, list]:
        """The bytes of all images, the (H, W) of each, and the reason for each unreadable one (or None)."""
        errors = [image if isinstance(image, str) else None for image in images]
        blank = np.zeros((*self.blank[::-1], 3), np.uint8)
        images = [blank if error else image for image, error in zip(images, errors, strict=True)]
        flat = np.concatenate([image.ravel() for image in images])
        return torch.from_numpy(flat), [image.shape[:2] for image in images], errors

    def decode(self, workers: int | None, write) -> dict:
        """Decode all images, pass their bytes to write, and return {"sizes": (H, W) of each image, "bad":
        {unreadable row: reason}}."""
        few = len(self) < 1000  # decoded before a worker process would have started
        loader = DataLoader(
            self,
            batch_size=64,
            num_workers=0 if few else senders(workers),
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
        """The name of the file for these paths, this side and, where images are resized, this filter."""
        side = str(self.side)
        if self.side and self.interpolation != "bilinear":  # whose files are named as before
            side += f" {self.interpolation}"
        text = "\n".join([side, *map(os.path.abspath, self.files)])
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def identity(self) -> str:
        """A hash of the files' sizes and times: it changes with their content."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                stat = os.stat(file)
                digest.update(b"%d %d," % (stat.st_size, stat.st_mtime_ns))
            except OSError:
                digest.update(b"missing,")
        return digest.hexdigest()


def read_index(path: Path, whole: Whole) -> dict | None:
    """The index of a file of pixels; None if the file is missing, broken or older than the images."""
    try:
        index = json.loads(path.with_suffix(".json").read_text())
        fits = path.stat().st_size == sum(3 * high * wide for high, wide in index["sizes"])
        healed = any(not isinstance(whole[int(row)], str) for row in index["bad"])
        if not fits or index["identity"] != whole.identity() or healed:
            return None
        if "checksum" in index and index["checksum"] != checksum(opened_bytes(path)):
            print(f"{path}: damaged, it is made anew")
            return None
        return index
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_pixels(path: Path, whole: Whole, workers: int | None) -> dict:
    """Decode the images into a file, write its index beside it, and return the index.

    Raises OSError if the disk is too full or the folder cannot be written; then no file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_temporaries(path.parent, idle=3600)
    identity, needed = whole.identity(), expected_bytes(whole)
    print(f"{len(whole):,} images are decoded into {path}: {needed / 1e9:.2f} GB", flush=True)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB are free")
    with atomic(path) as temporary, open(temporary, "wb") as file:
        index = {"identity": identity, **whole.decode(workers, file.write)}
        file.flush()
        index["checksum"] = checksum(opened_bytes(temporary))
    with atomic(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(index))
    return index


def expected_bytes(whole: Whole) -> int:
    """The size of all decoded images, estimated from the headers of about a hundred."""
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
    """Width and height of the first readable file."""
    for file in files:
        try:
            with opened(file) as image:
                return image.size
        except ValueError as error:
            reason = error
    raise ValueError(f"none of the {len(files)} images can be read: {reason}")


def progress(iterable=None, **settings) -> tqdm:
    """A progress bar, shown in a terminal or a notebook but not in a log file."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    watched = watched and os.environ.get("RANK", "0") == "0"  # only torchrun's first process
    return tqdm(iterable, leave=False, disable=not watched, **settings)


class Requests:
    """A batch sampler whose batches are set anew for each epoch."""

    def __init__(self):
        self.batches = []

    def __iter__(self) -> Iterator:
        return iter(self.batches)


def usable(workers: int | None) -> int:
    """The number of worker processes; None means one per core that this process may use, at most 8."""
    if workers is not None:
        return workers
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: it respects taskset and containers
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's processes on this machine
    return min(8, max(1, cores // sharing))


def senders(workers: int | None) -> int:
    """usable(workers), for a DataLoader. Its processes send tensors through sockets in the temporary folder,
    and wait forever if a socket's path would be too long: ValueError then."""
    number, folder = usable(workers), tempfile.gettempdir()
    if number and len(os.fsencode(folder)) > 70 and sys.platform != "win32":
        raise ValueError(
            f"TMPDIR {folder}: expected at most 70 bytes, as worker processes open sockets there; set it to "
            "a shorter path, or add --workers 0"
        )
    return number


def ignore_interrupts(worker: int) -> None:
    """Make a worker process ignore ctrl-C, because the run needs a few more batches before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
