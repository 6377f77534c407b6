"""Small data sets in the layouts of the real ones, with images that a model can learn."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, label: int, i: int, size=(64, 64), orientation: int = 1, grey=False):
    """Write a JPEG whose colours and stripes show its class; its noise depends on i."""
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


def pets(root: Path, parts=("",), classes=("cat", "dög 2"), images=10, size=(120, 90)) -> Path:
    """A user's own class folders, with a space and an umlaut in their names."""
    for part in parts:
        for label, name in enumerate(classes):
            for i in range(images):
                write_image(root / part / name / f"{i} ü.jpg", label, i, size)
    return root


def tiny_imagenet(root: Path, classes: int = 200, images: int = 10) -> Path:
    """Tiny-ImageNet's layout: train/<wnid>/images, val/images with annotations, test/images, and lists."""
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


def food101(
    root: Path, classes=("cheesecake", "beignets", "cheese_plate"), kaggle=False, train=6, test=2
) -> Path:
    """torchvision's layout, or Kaggle's food41 with meta/meta/. train, test: images of each class."""
    meta = root / "meta" / "meta" if kaggle else root / "meta"
    meta.mkdir(parents=True)
    lists = {"train": {}, "test": {}}
    for label, name in enumerate(classes):
        ids = [f"{name}/{1000 * label + i}" for i in range(train + test)]
        lists["train"][name], lists["test"][name] = ids[:train], ids[train:]
        for i, image in enumerate(ids):
            write_image(root / "images" / f"{image}.jpg", label, i, (128, 96))
    for part, listed in lists.items():
        (meta / f"{part}.json").write_text(json.dumps(listed))
        lines = "".join(f"{image}\n" for images in listed.values() for image in images)
        (meta / f"{part}.txt").write_text(lines)
    (meta / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return root


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 and its NumPy did: str and bytes both as byte strings."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, text):
        content = text if isinstance(text, bytes) else text.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(text)

    dispatch[bytes] = dispatch[str] = save_string

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or value.__name__}\n".encode())
        self.memoize(value)

    dispatch[type] = save_global


def write_pickle(path: Path, content: dict) -> None:
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)


def cifar100(root: Path, train: int = 200, test: int = 50) -> Path:
    """cifar-100-python/ with its three files, pickled as by Python 2."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("test", test)):
        fine = [i % 100 for i in range(count)]
        part = {
            "filenames": [f"{name}_{i:05d}.png" for i in range(count)],
            "batch_label": f"{name} batch 1 of 1",
            "fine_labels": fine,
            "coarse_labels": [label // 5 for label in fine],
            "data": rng.integers(0, 256, (count, 3072), np.uint8),
        }
        write_pickle(folder / name, part)
    names = {
        "fine_label_names": [f"thing_{i:02d}" for i in range(100)],
        "coarse_label_names": [f"kind_{i:02d}" for i in range(20)],
    }
    write_pickle(folder / "meta", names)
    return folder


IMAGENET_IDS = {
    "n01440764": "tench, Tinca tinca",
    "n02012849": "crane",
    "n03126707": "crane, derrick",
}


def fashion_mnist(root: Path, counts=(20, 10), gzipped=True) -> dict[str, tuple]:
    """FashionMNIST/raw with its four idx files; by the names' beginning, the images and labels in them."""
    rng, written = np.random.default_rng(0), {}
    for prefix, count in zip(("train", "t10k"), counts, strict=True):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        written[prefix] = images, np.arange(count, dtype=np.uint8) % 10
        for name, values in zip(("images-idx3", "labels-idx1"), written[prefix], strict=True):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            path = root / "FashionMNIST" / "raw" / f"{prefix}-{name}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = head + values.tobytes()
            if gzipped:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
    return written


def imagenet(root: Path, kaggle: bool) -> Path:
    """ImageNet-1k with three classes: class folders in val/, or Kaggle's flat val/ with its lists."""
    folder = root / "ILSVRC" / "Data" / "CLS-LOC" if kaggle else root
    solution = ["ImageId,PredictionString"]
    for label, wnid in enumerate(IMAGENET_IDS):
        for i in range(4):
            write_image(folder / "train" / wnid / f"{wnid}_{i}.JPEG", label, i, (120, 100))
        for i in range(2):
            image = f"ILSVRC2012_val_{2 * label + i + 1:08d}"
            place = folder / "val" / ("" if kaggle else wnid) / f"{image}.JPEG"
            write_image(place, label, 100 + i, (120, 100))
            solution.append(f"{image},{wnid} 85 1 499 272 {wnid} 3 4 5 6 ")
    write_image(folder / "test" / "ILSVRC2012_test_00000001.JPEG", 0, 999, (120, 100))
    if kaggle:
        head, *rows = solution  # Kaggle's rows are not sorted
        (root / "LOC_val_solution.csv").write_text("\n".join([head, *reversed(rows), ""]))
        text = "".join(f"{wnid} {words}\n" for wnid, words in IMAGENET_IDS.items())
        (root / "LOC_synset_mapping.txt").write_text(text)
    return folder
