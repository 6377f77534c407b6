"""Data sets in their true layouts, small, with images that a model can learn."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, label: int, i: int, size=(64, 64), orientation: int = 1, grey=False):
    """A JPEG whose colours and stripes tell its class, with noise of its own."""
    rng = np.random.default_rng(1000 * label + i)
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    stripes = np.sin((label % 7 + 2) * 3 * x + rng.uniform(0, 0.5)) * np.cos(
        (label % 3) * 4 * y + x
    )
    colour = np.random.default_rng(label).uniform(40, 200, 3)
    pixels = colour + 55 * stripes[..., None] + 60 * x[..., None] + rng.normal(0, 6, (*x.shape, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.convert("L") if grey else image).save(path, quality=90, exif=exif)


def tiny_imagenet(root: Path, classes: int = 200, images: int = 10) -> Path:
    """Tiny-ImageNet's layout: train/<wnid>/images, val/images with annotations, test/images, lists."""
    wnids = [f"n{label:08d}" for label in range(classes)]
    for label, wnid in enumerate(wnids):
        for i in range(images):
            file = root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            write_image(file, label, i, grey=i % 50 == 7)
        boxes = "".join(f"{wnid}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(images))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(boxes)
    annotations = ""
    for i in range(classes):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", i % classes, 999)
        write_image(root / "test" / "images" / f"test_{i}.JPEG", i % classes, 998)
        annotations += f"val_{i}.JPEG\t{wnids[i % classes]}\t0\t32\t44\t62\n"
    (root / "val" / "val_annotations.txt").write_text(annotations)
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(wnids)))
    words = "".join(f"{wnid}\tthing {label}, object\n" for label, wnid in enumerate(wnids))
    (root / "words.txt").write_text(words + "n99999999\tnot in the data set\n")
    return root
