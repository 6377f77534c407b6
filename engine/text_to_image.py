"""Pictures with captions: the folder, aspect buckets, crops, flips, and the batches of an epoch.

    folder/metadata.jsonl    {"file_name": "a.jpg", "text": "a red bird"} in each line
    folder/metadata.csv      the columns file_name and text
    folder/a.txt             without either: the caption of a.jpg, .png ...

Each picture is resized and cropped to the bucket whose shape is nearest to its own. Buckets of one size have
about the same area, so memory and time do not depend on a picture's shape. SDXL is told what the crop left
out (time ids): without that it learns to cut off heads.
Podell et al., SDXL, 2023, arXiv 2307.01952, sections 2.2 and 2.3.
"""

import csv
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engine.images import opened, upright_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "metadata.csv")
TURNED = (5, 6, 7, 8)  # EXIF's orientations that swap width and height


@dataclass
class Picture:
    """A picture with its caption, and what becomes of it. Sizes are (height, width) in pixels."""

    source: str | np.ndarray  # a file, or pixels (height, width, 3), uint8
    caption: str
    size: tuple[int, int]  # upright, before it is resized
    resized: tuple[int, int] = (0, 0)  # covers the bucket; the rest is cropped on both sides
    bucket: tuple[int, int] = (0, 0)

    def left(self, flipped: bool) -> int:
        """The crop's left edge, in the resized picture as it is seen: mirrored or not."""
        left = (self.resized[1] - self.bucket[1]) // 2
        return self.resized[1] - self.bucket[1] - left if flipped else left

    def time_ids(self, flipped: bool) -> list[int]:
        """SDXL's six numbers: original height and width, the crop's top and left, target height and width."""
        top = (self.resized[0] - self.bucket[0]) // 2
        return [*self.size, top, self.left(flipped), *self.bucket]

    def pixels(self, flipped: bool) -> torch.Tensor:
        """(3, height, width) of the bucket, in -1..1. Raises ValueError if the file cannot be decoded."""
        if isinstance(self.source, str):
            with opened(self.source) as image:
                image = upright_rgb(image)
        else:
            image = Image.fromarray(self.source)
        image = image.resize(self.resized[::-1], Image.Resampling.BILINEAR)
        _, _, top, _, height, width = self.time_ids(flipped)
        left = self.left(False)
        pixels = np.asarray(image)[top : top + height, left : left + width]
        pixels = torch.from_numpy(pixels[:, ::-1].copy() if flipped else pixels.copy())
        return pixels.permute(2, 0, 1) / 127.5 - 1


def read_folder(folder: str | Path, limit: int | None = None) -> list[Picture]:
    """The pictures of a folder that have a caption. A line on the screen names those that are left out.

    Raises OSError or ValueError if there is none, or if the metadata is wrong.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--data-dir {folder}: no such folder")
    metadata = next((root / name for name in METADATA if (root / name).is_file()), None)
    captions = listed(metadata) if metadata else beside(root)
    empty = [name for name, caption in captions if not caption]
    if metadata:
        rows = {str(Path(name)) for name, _ in captions}
        empty += [name for name in map(str, picture_files(root)) if name not in rows]
    names = [name for name, caption in captions if caption][:limit]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(size_or_reason, [str(root / name) for name in names]))
    bad = [reason for reason in sizes if isinstance(reason, str)]
    for found, what in ((empty, "no caption"), (bad, "no readable picture")):
        if found:
            print(f"{folder}: {len(found)} left out, {what}: {few(found)}")
    texts = [caption for _, caption in captions if caption][:limit]
    pictures = [
        Picture(str(root / name), caption, size)
        for name, caption, size in zip(names, texts, sizes, strict=True)
        if not isinstance(size, str)
    ]
    if not pictures:
        raise ValueError(
            f"--data-dir {folder}: expected pictures with captions, found none; put {METADATA[0]} (file_name "
            "and text in each line) into it, or a .txt with the caption beside each picture"
        )
    return pictures


def listed(metadata: Path) -> list[tuple[str, str]]:
    """(file name, caption) of each row of metadata.jsonl or metadata.csv."""
    text = read_text(metadata)
    if metadata.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), strict=True)  # an open quote would swallow rows
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{metadata}: {error}; is a quote open?") from None
    else:
        rows = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    pairs = []
    for n, row in rows:
        where = f"{metadata}, line {n}"
        if isinstance(row, str):
            try:
                row = json.loads(row)
            except ValueError as error:
                raise ValueError(f"{where}: expected JSON ({error})") from None
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("file_name"), str)
            or "text" not in row
        ):
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else row
            raise ValueError(f"{where}: expected file_name and text, found {keys}")
        if not (metadata.parent / row["file_name"]).is_file():
            raise ValueError(f"{where}: {row['file_name']}: no such file in {metadata.parent}")
        pairs.append((row["file_name"], str(row["text"] or "").strip()))
    return pairs


def beside(root: Path) -> list[tuple[str, str]]:
    """(file name, caption) of each picture below a folder: the caption is in a .txt of the same name."""
    pairs = []
    for name in picture_files(root):
        text = (root / name).with_suffix(".txt")
        pairs.append((str(name), read_text(text).strip() if text.is_file() else ""))
    return pairs


def picture_files(root: Path) -> list[Path]:
    """The pictures below a folder, relative to it."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    return [file.relative_to(root) for file in files if file.is_file()]


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected UTF-8 ({error}); save it anew with that encoding"
        ) from None


def size_or_reason(file: str) -> tuple[int, int] | str:
    """The (height, width) of a picture, upright; or why it cannot be read."""
    try:
        with opened(file) as image:
            turned = image.getexif().get(0x0112) in TURNED
            return image.size if turned else image.size[::-1]
    except ValueError as error:
        return str(error)


def few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def buckets(size: int) -> list[tuple[int, int]]:
    """The (height, width) of all buckets: area at most size * size, sides in steps, shape at most 1:4."""
    step = 64 if size >= 256 else 8
    shapes = {
        (height, size * size // height // step * step) for height in range(step, 2 * size + 1, step)
    }
    shapes |= {shape[::-1] for shape in shapes}
    return sorted(shape for shape in shapes if 0 < max(shape) <= 4 * min(shape))


def fit_buckets(pictures: list[Picture], size: int) -> None:
    """Choose the bucket of each picture. A line on the screen counts those that have to be enlarged."""
    shapes, small = buckets(size), []
    for picture in pictures:
        height, width = picture.size
        aspects = [abs(math.log(h / w * width / height)) for h, w in shapes]
        picture.bucket = h, w = shapes[aspects.index(min(aspects))]
        scale = max(h / height, w / width)
        picture.resized = max(h, round(height * scale)), max(w, round(width * scale))
        if scale > 1:
            small.append(str(picture.source)[-80:])
    if small:
        print(
            f"{len(small)} of {len(pictures)} pictures are smaller than --image-size {size}: {few(small)}"
        )


def split(
    pictures: list[Picture], holdout: float, seed: int
) -> tuple[list[Picture], list[Picture]]:
    """(training pictures, held-out pictures). Pictures with the same source stay together."""
    sources = list(dict.fromkeys(key(picture) for picture in pictures))
    order = np.random.default_rng(seed).permutation(len(sources))
    count = min(math.ceil(holdout * len(sources)), len(sources) - 1)
    held = {sources[i] for i in order[:count]}
    parts = [[p for p in pictures if (key(p) in held) == out] for out in (False, True)]
    return parts[0], parts[1]


def key(picture: Picture) -> str | int:
    return picture.source if isinstance(picture.source, str) else id(picture)


def plan(
    pictures: list[Picture], batch_size: int, grad_accum: int, seed: int, epoch: int
) -> list[list[np.ndarray]]:
    """The steps of an epoch: for each, its batches, which are rows of pictures of one bucket.

    Each picture comes once. The last batch of a bucket may be smaller, and so may the last step.
    """
    random = np.random.default_rng((seed, epoch))
    rows: dict[tuple[int, int], list[int]] = {}
    for row in random.permutation(len(pictures)):
        rows.setdefault(pictures[row].bucket, []).append(row)
    batches = [
        np.array(part[start : start + batch_size])
        for part in rows.values()
        for start in range(0, len(part), batch_size)
    ]
    batches = [batches[i] for i in random.permutation(len(batches))]
    return [batches[start : start + grad_accum] for start in range(0, len(batches), grad_accum)]
