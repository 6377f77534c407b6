"""Batches of images, compared with PIL and with each other; unreadable files; and the cache."""

import hashlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import LIMIT, ROOT
from PIL import Image, ImageOps
from trees import pets, tiny_imagenet, write_image

import data
from engine import images
from engine.images import (
    ORIENTATION,
    Crops,
    Kept,
    Split,
    Whole,
    keep,
    mark_bad,
    random_box,
    resize,
    resize_crop,
    senders,
)

PLAIN = {"image_size": 28, "mean": [0.0] * 3, "std": [1.0] * 3, "crop": 1.0}
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GENERATOR = torch.Generator().manual_seed(0)


def split_of(*paths):
    return Split(np.zeros(len(paths), np.int64), [str(path) for path in paths])


def all_of(split, preprocessing=PLAIN, **settings):
    """All images and labels of one epoch; without worker processes unless settings say so."""
    parts = list(data.batches(split, 6, preprocessing, **{"workers": 0, **settings}))
    split.idle.clear()  # worker processes end now, and not when the garbage is collected
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def resized_by_pil(image, size, interpolation):
    """The resized image, int32 (size, size, 3). PIL resizes the rows, then the columns, as we do; Pillow 13
    may begin with the columns. For bicubic this matters, because values are clamped after each step."""
    rows = image.resize((size, image.height), FILTERS[interpolation])
    return torch.from_numpy(np.array(rows.resize((size, size), FILTERS[interpolation]))).int()


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [12, 30, 100])  # shrinks, both, enlarges
@pytest.mark.parametrize("flip", [False, True])
def test_resized_crops_equal_pil_s(size, flip, interpolation):
    """Up to rounding. PIL rounds to whole values after the rows, and again after the columns.

    Both filters' weights add up to 1; without their signs, bicubic ones add up to at most 1.25, by which the
    columns multiply an error of the rows. So without rounding we differ by at most 1.25 / 2 + 1 / 2.
    F.interpolate may round a value between two the other way: 1 in the rows makes 1.25 + 1, so 2 in the end.
    """
    images = random_pixels(6, 40, 52, 3)
    draws = torch.rand(6, 5, generator=GENERATOR).tolist()
    boxes = [random_box(d, 40, 52, 0.08) for d in draws]
    one_by_one = torch.stack(
        [
            resize_crop(x, box, flip, size, interpolation)
            for x, box in zip(images, boxes, strict=True)
        ]
    )
    together = resize(
        torch.from_numpy(images).permute(0, 3, 1, 2).float(),
        torch.tensor(boxes).T,
        torch.tensor([flip] * 6),
        size,
        interpolation,
    ).permute(0, 2, 3, 1)
    most, rounded = {"bilinear": (1.01, 1), "bicubic": (1.25 / 2 + 0.5 + 0.01, 2)}[interpolation]
    for image, box, a, b in zip(images, boxes, one_by_one, together, strict=True):
        left, top, wide, high = box
        crop = Image.fromarray(image).crop((left, top, left + wide, top + high))
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
        crops = {name: resized_by_pil(crop, size, name) for name in FILTERS}
        expected = crops.pop(interpolation)
        (other,) = crops.values()
        wrong = (a.int() - expected).abs()
        assert a.dtype == torch.uint8 and wrong.max() <= rounded
        assert (wrong > 0).float().mean() < 0.2
        assert (b - expected).abs().max() <= most
        assert (b - expected.flip(1)).abs().max() > 20
        assert (b - other).abs().max() > 5 and (a.int() - other).abs().max() > 5


@pytest.mark.parametrize("interpolation", FILTERS)
def test_crops_of_a_batch_on_the_gpu_equal_crops_of_single_images(interpolation):
    """Up to rounding: single images are rounded to whole pixel values, twice."""
    split = Split(np.arange(9), pixels=random_pixels(9, 64, 64, 3))
    preprocessing = {**PLAIN, "image_size": 40, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    crops = Crops(split, {**preprocessing, "interpolation": interpolation}, 0.3, True)
    # One level of the channel with the smallest deviation. Rounding is explained above; F.interpolate's
    # weights of 16 bits add a little.
    most = {"bilinear": 1.01, "bicubic": 1.2}[interpolation] / 255 / 0.5
    for draws in (torch.rand(9, 5, generator=GENERATOR).tolist(), [None] * 9):
        requests = list(zip(range(9), draws, strict=True))
        together = crops.on_device(requests, torch.device("cpu"))
        one_by_one = crops.on_cpu((crops[request] for request in requests), 9)
        assert together.shape == (9, 3, 40, 40)
        assert (together - one_by_one).abs().max() < most
        assert (together - one_by_one.flip(0)).abs().max() > 1


@pytest.mark.parametrize("size", [40, 150])
def test_bicubic_edges_are_no_darker_than_black_and_no_lighter_than_white(size):
    """Bicubic weights may be negative. PIL clamps the rows, then the columns; so do both of our paths."""
    y, x = np.mgrid[:64, :64]
    blocks = np.where((x // 8 + y // 8) % 2, 255, 0).astype(np.uint8)
    dots = np.where(random_pixels(64, 64) < 128, 0, 255).astype(np.uint8)
    pixels = np.stack([blocks, dots])[..., None].repeat(3, -1)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    preprocessing = {"image_size": size, "mean": mean, "std": std, "crop": 1.0}
    crops = Crops(Split(np.arange(2), pixels=pixels), {**preprocessing, "interpolation": "bicubic"})
    expected = [resized_by_pil(Image.fromarray(image), size, "bicubic") for image in pixels]
    requests = [(0, None), (1, None)]
    together = crops.on_device(requests, torch.device("cpu"))
    one_by_one = crops.on_cpu((crops[request] for request in requests), 2)
    mean, std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    for crops in (together, one_by_one):
        levels = (crops * std + mean) * 255
        assert levels.min() > -1e-3 and levels.max() < 255 + 1e-3
        for image, exact in zip(levels.permute(0, 2, 3, 1), expected, strict=True):
            assert (image - exact).abs().max() < 2.01


@pytest.mark.parametrize("source", ["device", "pixels", "png", "jpg"])
def test_preprocessing_without_a_filter_means_bilinear(source, tmp_path):
    """Adapter files of older versions name none."""
    pixels = random_pixels(1, 64, 64, 3)
    if source in ("device", "pixels"):
        split = Split(np.zeros(1, np.int64), pixels=pixels)
    else:
        Image.fromarray(pixels[0]).resize((500, 400)).save(tmp_path / f"1.{source}")
        split = split_of(tmp_path / f"1.{source}")

    def crop(**filters):
        crops = Crops(split, {**PLAIN, **filters}, 0.3)
        draws = [0.9, 0.4, 0.3, 0.7, 0.6]
        device = source == "device"
        return crops.on_device([(0, draws)], torch.device("cpu")) if device else crops[0, draws]

    assert torch.equal(crop(), crop(interpolation="bilinear"))
    assert not torch.equal(crop(), crop(interpolation="bicubic"))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
@pytest.mark.parametrize("large", [True, False])
def test_files_are_resized_with_the_filter_of_the_weights(large, name, interpolation, tmp_path):
    path, size = tmp_path / name, (600, 400) if large else (90, 60)
    Image.fromarray(random_pixels(30, 45, 3)).resize(size, Image.Resampling.NEAREST).save(path)
    preprocessing = {**PLAIN, "image_size": 112, "crop": 0.9, "interpolation": interpolation}
    found = Crops(split_of(path), preprocessing)[0, None]
    with Image.open(path) as image:
        reduced = large and name == "1.jpg"  # decoded at 1/2, then resized by PIL itself
        if reduced:
            image.draft("RGB", (300, 200))
        side = 0.9 * image.height
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = left, top, left + side, top + side
        crop = image.crop(box)  # pixels outside of it do not count, unless PIL itself cuts it
        expected = {
            key: torch.from_numpy(np.array(image.resize((112, 112), FILTERS[key], box))).int()
            if reduced
            else resized_by_pil(crop, 112, key)
            for key in FILTERS
        }
    right = expected.pop(interpolation)
    (other,) = expected.values()
    assert (found.int() - right).abs().max() <= (0 if reduced else 2)
    assert (found.int() - other).abs().max() > 10


def test_random_boxes_are_inside_the_image_with_the_right_areas_and_ratios():
    draws = torch.rand(4000, 5, generator=GENERATOR).tolist()
    for height, width in [(512, 512), (20, 10_000), (1, 1), (384, 512)]:
        boxes = np.array([random_box(d, height, width, 0.08) for d in draws])
        left, top, wide, high = boxes.T
        assert left.min() >= 0 and (left + wide).max() <= width and wide.min() >= 1
        assert top.min() >= 0 and (top + high).max() <= height and high.min() >= 1
        if min(height, width) > 100:
            ratio, share = wide / high, wide * high / (width * height)
            assert 0.74 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= 1.35
            assert 0.078 <= share.min() < 0.1 and 0.4 < share.mean() < 0.54
            assert left.std() > 0.1 * width and top.std() > 0.1 * height


@pytest.mark.parametrize("kept", [True, False])
def test_each_image_has_its_own_crop_and_flip(kept, tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8)[:, None] * 4, (64, 1, 3))  # brighter to the right
    if kept:
        split = Split(np.arange(32), pixels=np.stack([ramp] * 32))
    else:
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        split = Split(np.arange(32), [str(tmp_path / "ramp.png")] * 32)
    images, labels = all_of(split, {**PLAIN, "image_size": 32}, train=True)
    assert sorted(labels.tolist()) == list(range(32)) != labels.tolist()
    rising = images[:, 0, 16, -1] > images[:, 0, 16, 0]
    assert 6 < rising.sum() < 26, "about half are mirrored"
    steepness = (images[:, 0, 16, -1] - images[:, 0, 16, 0]).abs()
    assert len(steepness.unique()) > 16, "the crops differ"
    assert torch.equal(images[:, 0], images[:, 2])
    never, _ = all_of(split, PLAIN, train=True, flip=False)
    assert (never[:, 0, 16, -1] > never[:, 0, 16, 0]).all()


def test_evaluation_takes_the_centres_in_order_and_is_never_random():
    pixels = random_pixels(8, 64, 64, 3)
    split = Split(np.arange(8), pixels=pixels)
    preprocessing = {**PLAIN, "image_size": 32, "crop": 0.5}
    preprocessing |= {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    images, labels = all_of(split, preprocessing)
    centre = torch.from_numpy(pixels[:, 16:48, 16:48]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(images, (centre - mean) / std, rtol=0, atol=1e-5)
    assert labels.tolist() == list(range(8))
    again, _ = all_of(split, preprocessing, seed=1, epoch=3)
    assert torch.equal(images, again)


@pytest.mark.parametrize("source", ["pixels", "files", "cached"])
def test_batches_depend_on_seed_and_epoch_but_not_on_workers(source, tmp_path):
    if source == "pixels":
        split = data.load("demo", limit=20).train
    else:
        split = data.load("folder", str(pets(tmp_path))).train
        keep(split, tmp_path / "cache", 28, cache=source == "cached")
        assert isinstance(split.pixels, Kept) == (source == "cached")
    reference = all_of(split, train=True)
    for workers in (1, 2):
        other = all_of(split, train=True, workers=workers)
        assert all(torch.equal(a, b) for a, b in zip(reference, other, strict=True))
    seeded, later = all_of(split, train=True, seed=1), all_of(split, train=True, epoch=1)
    assert not torch.equal(seeded[0], later[0])
    for other in (seeded, later):
        assert not torch.equal(reference[0], other[0])
        assert not torch.equal(reference[1], other[1])
        assert torch.equal(reference[1].sort()[0], other[1].sort()[0])


@pytest.mark.parametrize("orientation", [1, 6, 8])
@pytest.mark.parametrize("cache", [False, True])
def test_large_images_are_upright_and_close_to_the_exact_crop(tmp_path, orientation, cache):
    """Decoding a JPEG at a smaller scale gives the same crop as decoding it at full size."""
    path = tmp_path / "a.jpg"
    y, x = np.mgrid[:384, :512]
    # At an eighth of the size these blocks would be blurred.
    blocks = 20 + 90 * ((x // 12 + y // 12) % 2) + x // 5 + y // 10
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(blocks.astype(np.uint8)).convert("RGB").save(path, quality=95, exif=exif)
    split = split_of(path)
    keep(split, tmp_path / "cache", 64, cache)
    image = all_of(split, {**PLAIN, "image_size": 64, "crop": 0.8})[0][0]
    with Image.open(path) as full:
        turn = {1: None, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
        full = full.convert("RGB")
        full = full if turn is None else full.transpose(turn)
        width, height = full.size
        side = 0.8 * 384
        box = [(width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2]
        exact = np.array(full.resize((64, 64), Image.Resampling.BILINEAR, box=box))
    exact = torch.from_numpy(exact).permute(2, 0, 1) / 255
    # The crop of a cached image has whole pixels of a smaller image: it may be half a pixel off.
    assert (image - exact).abs().mean() < (0.1 if cache else 0.03)
    assert (image - exact.flip(-1, -2)).abs().mean() > 0.15


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "I;16"])
def test_every_pixel_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / f"1.{'jpg' if mode == 'CMYK' else 'png'}"
    if mode == "I;16":
        Image.fromarray(np.full((100, 120), 124 * 256 + 3, np.uint16)).save(path)
    else:
        Image.new("RGB", (120, 100), (200, 100, 50)).convert(mode).save(path)
    image = all_of(split_of(path))[0][0]
    colour = image.mean((1, 2)) * 255
    if mode in ("CMYK", "P", "RGBA"):
        assert (colour - torch.tensor([200.0, 100, 50])).abs().max() < 12
    elif mode != "1":
        assert (colour - 124).abs().max() < 1  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_every_format_is_turned_upright(suffix, mode, tmp_path):
    if mode == "I;16" and suffix != "png":
        pytest.skip(
            "JPEG and WebP have no 16 bits, and Pillow itself garbles such a TIFF when it turns it"
        )
    y, x = np.mgrid[:90, :150]
    pixels = (x + y).astype(np.uint8)  # darkest at the top left
    image = Image.fromarray(pixels.astype(np.uint16) << 8 if mode == "I;16" else pixels)
    image = image if mode == "I;16" else image.convert("RGB")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image.save(tmp_path / f"1.{suffix}", exif=exif)
    image, _ = all_of(split_of(tmp_path / f"1.{suffix}"))
    upright = torch.from_numpy(np.rot90(pixels, -1).copy())  # 150 high, 90 wide
    expected = upright[30:120].unfold(0, 3, 3).unfold(1, 3, 3).float().mean((-1, -2)) / 255
    found = image[0, 0, 1:-1, 1:-1]
    expected = torch.nn.functional.interpolate(expected[None, None], (28, 28), mode="bilinear")
    assert (found - expected[0, 0, 1:-1, 1:-1]).abs().max() < 0.03
    assert (found - expected[0, 0, 1:-1, 1:-1].T).abs().mean() > 0.1
    assert all_of(split_of(tmp_path / f"1.{suffix}"), train=True)[0].shape == (1, 3, 28, 28)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    Image.fromarray(np.full((90, 90), 0.8, np.float32)).save(tmp_path / "1.tif")
    with pytest.raises(ValueError, match="pixels of mode F; save it with 8 or 16 bits"):
        all_of(split_of(tmp_path / "1.tif"))


def test_a_broken_exif_block_breaks_one_image_but_not_the_run(tmp_path, capfd):
    files = sorted(pets(tmp_path).rglob("*.jpg"))
    content = files[3].read_bytes()
    start = content.index(b"Exif")
    for i in range(start + 6, start + 30):
        files[3].write_bytes(content[:i] + b"\xff\x00\x7f" + content[i + 3 :])
        assert len(all_of(split_of(*files))[0]) == 20


def test_a_jpeg_is_decoded_only_as_large_as_its_crop_needs(tmp_path, monkeypatch):
    write_image(tmp_path / "1.jpg", 0, 0, (1024, 768))
    decoded, upright_rgb = [], images.upright_rgb
    monkeypatch.setattr(
        images, "upright_rgb", lambda i: decoded.append(upright_rgb(i)) or decoded[-1]
    )
    all_of(split_of(tmp_path / "1.jpg"), {**PLAIN, "image_size": 96})
    keep(split_of(tmp_path / "1.jpg"), tmp_path / "cache", 84, cache=True)
    assert [image.size for image in decoded] == [(128, 96), (128, 96)]


@pytest.mark.parametrize("size", [(1, 1), (10_000, 20), (20, 10_000)])
@pytest.mark.parametrize("cache", [False, True])
def test_images_of_odd_sizes_are_read(size, cache, tmp_path):
    Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "odd.png")
    write_image(tmp_path / "plain.jpg", 0, 0, (120, 90))
    split = split_of(tmp_path / "plain.jpg", tmp_path / "odd.png")
    keep(split, tmp_path / "cache", 28, cache)
    for train in (False, True):
        images, _ = all_of(split, train=train)
        colours = (images.mean((2, 3)) * 255 - torch.tensor([200.0, 100, 50])).abs().amax(1)
        assert images.shape == (2, 3, 28, 28) and colours.min() < 1


def broken(folder):
    """Images of pets, three of them broken in different ways: empty, cut off, not an image."""
    pets(folder)
    whole = (folder / "cat" / "3 ü.jpg").read_bytes()
    for name, content in (("2", b""), ("3", whole[:700]), ("6", b"no image")):
        (folder / "cat" / f"{name} ü.jpg").write_bytes(content)
    return folder


@pytest.mark.parametrize("cache", [False, True])
def test_a_broken_file_is_replaced_by_the_next_one_and_named_once(cache, tmp_path, capfd):
    folder = broken(tmp_path / "pets")
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]

    def split():
        return Split(np.repeat([0, 1], 10), files)

    reference = split()
    keep(reference, tmp_path / "cache", 28, cache)
    epochs = [all_of(reference, train=True, epoch=epoch) for epoch in (0, 0)]
    assert all(torch.equal(a, b) for a, b in zip(*epochs, strict=True))
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 3 and all("cannot be read" in line for line in warnings)
    assert sorted(reference.bad) == [2, 3, 6]
    evaluated, labels = all_of(reference)
    assert torch.equal(evaluated[2], evaluated[4]) and torch.equal(evaluated[3], evaluated[4])
    assert torch.equal(evaluated[6], evaluated[7]) and not torch.equal(evaluated[7], evaluated[8])
    assert labels.tolist() == [0] * 10 + [1] * 10
    subset, _ = all_of(reference.rows(np.array([4, 6, 7])))
    assert torch.equal(subset[0], evaluated[4]) and torch.equal(subset[1], subset[2])
    for workers in (1, 2):
        other = split()
        keep(other, tmp_path / "cache", 28, cache)
        capfd.readouterr()
        images = all_of(other, train=True, workers=workers)
        assert cache or capfd.readouterr().err.count("cannot be read") == 3
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], images, strict=True))
    mark_bad(reference, 2, "a second time")
    assert not capfd.readouterr().err


def test_a_replaced_image_has_the_label_of_its_replacement(tmp_path):
    folder = pets(tmp_path, images=3)
    (folder / "cat" / "2 ü.jpg").write_bytes(b"no image")  # the next one that can be read is a dog
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    split = Split(np.repeat([0, 1], 3), files)
    images, labels = all_of(split)
    assert labels.tolist() == [0, 0, 1, 1, 1, 1] and torch.equal(images[2], images[3])


@pytest.mark.parametrize("cache", [False, True])
def test_too_many_broken_files_are_an_error_that_names_them(cache, tmp_path):
    folder = pets(tmp_path / "pets", images=30)
    files = [str(path) for path in sorted(folder.rglob("*.jpg"))]
    for file in files[5:15]:
        Path(file).write_bytes(b"no image")
    split = Split(np.repeat([0, 1], 30), files)
    with pytest.raises(ValueError, match="10 of 60 images cannot be read") as error:
        keep(split, tmp_path / "cache", 28, cache)
        all_of(split)
    assert all(file in str(error.value) for file in files[5:15]) and "\n" not in str(error.value)
    nine = Split(split.labels, [*files[:5], files[0], *files[6:]])
    assert len(all_of(nine)[0]) == 60, "nine are not too many"
    many = Split(np.zeros(2000, np.int64), (files[:5] + files[15:]) * 40)
    many.files[:10] = files[5:15]
    assert len(all_of(many)[0]) == 2000, "neither are ten of 2,000"


def test_no_readable_image_is_an_error(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        all_of(split_of(*sorted(tmp_path.iterdir())))
    with pytest.raises(ValueError, match="none of the 3 images can be read"):
        keep(split_of(*sorted(tmp_path.iterdir())), tmp_path / "cache")


def small(tmp_path, images=12):
    """A split of 64-pixel images, all readable."""
    root = tiny_imagenet(tmp_path / "tiny", classes=2, images=images)
    return split_of(*sorted((root / "train").rglob("*.JPEG")))


def test_small_images_are_decoded_once(tmp_path, monkeypatch, capsys):
    split = small(tmp_path)
    keep(split, tmp_path / "cache")
    assert split.pixels.shape == (24, 64, 64, 3)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".pixels"]
    for row in (0, 7, 23):
        with Image.open(split.files[row]) as image:
            assert np.array_equal(np.array(image.convert("RGB")), split.pixels[row])
    assert "24 images are decoded" in capsys.readouterr().out
    again = split_of(*split.files)
    with monkeypatch.context() as patch:
        patch.setattr(Whole, "__getitem__", lambda *_: pytest.fail("decoded a second time"))
        keep(again, tmp_path / "cache")
    assert np.array_equal(again.pixels, split.pixels) and not capsys.readouterr().out


@pytest.mark.parametrize("change", ["content", "time", "pixels", "index"])
def test_kept_pixels_that_do_not_match_are_written_again(change, tmp_path, capsys):
    split = small(tmp_path)
    keep(split, tmp_path / "cache")
    capsys.readouterr()
    kept, index = (next((tmp_path / "cache").glob(f"*.{end}")) for end in ("pixels", "json"))
    if change == "content":
        Image.new("RGB", (64, 64), (1, 2, 3)).save(split.files[5])
    elif change == "time":
        Path(split.files[5]).touch()
    else:
        damaged = {"pixels": kept, "index": index}[change]
        damaged.write_bytes(damaged.read_bytes()[:-1000])
    again = split_of(*split.files)
    keep(again, tmp_path / "cache")
    assert "24 images are decoded" in capsys.readouterr().out
    for row in (4, 5):
        with Image.open(split.files[row]) as image:
            assert np.array_equal(np.array(image.convert("RGB")), again.pixels[row])
    assert len(list((tmp_path / "cache").iterdir())) == 2, "the old file is replaced"


def test_small_images_of_many_sizes_and_a_large_one(tmp_path):
    for i, size in enumerate([(64, 64), (50, 90), (96, 96)]):
        write_image(tmp_path / f"{i}.png", i, i, size)
    split = split_of(*sorted(tmp_path.glob("*.png")))
    keep(split, tmp_path / "cache")
    assert [image.shape[:2] for image in map(split.pixels.__getitem__, range(3))] == [
        (64, 64),
        (90, 50),
        (96, 96),
    ]
    loaded = pickle.loads(pickle.dumps(split.pixels))  # as a spawned worker process receives it
    assert np.array_equal(loaded[1], split.pixels[1])
    subset = split.rows(np.array([2, 0]))
    assert np.array_equal(subset.pixels[0], split.pixels[2]) and len(subset) == 2
    write_image(tmp_path / "3.png", 3, 3, (300, 200))
    mixed = split_of(*sorted(tmp_path.glob("*.png")))
    for workers in (0, 2):
        keep(mixed, tmp_path / "cache", workers=workers)
        assert mixed.pixels is None, "large images are decoded in each epoch"
    assert len(all_of(mixed)[0]) == 4
    keep(mixed, tmp_path / "cache", 112, cache=True)
    assert mixed.pixels[3].shape == (128, 192, 3) and mixed.pixels[0].shape == (64, 64, 3)
    assert not [file for file in (tmp_path / "cache").iterdir() if "tmp" in file.name]


@pytest.mark.parametrize("orientation", [1, 6])
def test_small_images_of_one_size_that_are_not_square(orientation, tmp_path):
    """As one array, which a GPU can crop; upright, though a turned file's header says width and height."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for i in range(3):
        Image.fromarray(random_pixels(72, 96, 3)).save(tmp_path / f"{i}.png", exif=exif)
    split = split_of(*sorted(tmp_path.glob("*.png")))
    keep(split, tmp_path / "cache")
    assert split.pixels.shape == ((3, 72, 96, 3) if orientation == 1 else (3, 96, 72, 3))
    for file, pixels in zip(split.files, split.pixels, strict=True):
        with Image.open(file) as image:
            assert np.array_equal(np.array(ImageOps.exif_transpose(image)), pixels)


def test_a_photograph_among_icons_where_nothing_can_be_kept(tmp_path, capsys):
    write_image(tmp_path / "0.png", 0, 0, (64, 64))
    write_image(tmp_path / "1.png", 1, 1, (300, 200))
    split = split_of(*sorted(tmp_path.glob("*.png")))
    (tmp_path / "cache").write_text("a file, not a folder")
    keep(split, tmp_path / "cache")
    assert split.pixels is None and "cannot be kept there" in capsys.readouterr().err


def test_a_file_that_could_not_be_read_is_tried_again(tmp_path, capfd):
    split = small(tmp_path)
    path, stat = Path(split.files[5]), os.stat(split.files[5])
    content = path.read_bytes()
    path.write_bytes(b"x" * len(content))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keep(split, tmp_path / "cache")
    assert list(split.bad) == [5]
    path.write_bytes(content)  # same size and time, as after a network failure
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = split_of(*split.files)
    keep(again, tmp_path / "cache")
    assert not again.bad and again.pixels[5].any()


def test_cached_images_have_the_size_that_evaluation_needs(tmp_path):
    for i, size in enumerate([(512, 384), (300, 900), (100, 90)]):
        write_image(tmp_path / f"{i}.jpg", i, i, size)
    split = split_of(*sorted(tmp_path.glob("*.jpg")))
    keep(split, tmp_path / "cache", 224, cache=True)
    shapes = [split.pixels[row].shape[:2] for row in range(3)]
    assert shapes == [(256, 341), (768, 256), (90, 100)]


@pytest.mark.parametrize("among", [False, True])
def test_each_filter_has_its_own_cached_images(among, tmp_path):
    """among: the large image is found only after a small one, among which keep does not expect it."""
    if among:
        write_image(tmp_path / "0.png", 0, 0, (64, 64))
    Image.fromarray(random_pixels(400, 600, 3)).save(tmp_path / "1.png")
    files = sorted(tmp_path.glob("*.png"))
    with Image.open(files[-1]) as image:
        expected = {name: np.array(image.resize((192, 128), FILTERS[name])) for name in FILTERS}
    assert not np.array_equal(*expected.values())
    for name in ("bilinear", "bicubic", "bilinear"):
        split = split_of(*files)
        keep(split, tmp_path / "cache", 112, cache=True, interpolation=name)
        assert np.array_equal(split.pixels[len(files) - 1], expected[name])
    split = split_of(*files)
    keep(split, tmp_path / "cache", 112, cache=True)
    assert np.array_equal(split.pixels[len(files) - 1], expected["bilinear"])
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == 2


def test_the_names_of_cached_files(tmp_path):
    """A file that an older version wrote is found again. Small images are not resized: one file is enough."""
    files = [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    for side in (None, 256):
        names = [Whole(files, side, (1, 1), name).name() for name in FILTERS]
        text = "\n".join([str(side), *files])
        assert names[0] == hashlib.sha256(text.encode()).hexdigest()[:16]
        assert (names[0] == names[1]) == (side is None)
        assert Whole(files, side, (1, 1)).name() == names[0]


def test_on_a_full_disk_small_images_are_kept_in_memory(tmp_path, monkeypatch, capfd):
    split, reference = small(tmp_path), small(tmp_path)
    keep(reference, tmp_path / "cache")
    free = type("usage", (), {"free": 1000})
    monkeypatch.setattr(images.shutil, "disk_usage", lambda folder: free)
    keep(split, tmp_path / "other")
    assert "0.0 GB are free" in capfd.readouterr().err
    assert np.array_equal(split.pixels, reference.pixels)
    assert not list((tmp_path / "other").iterdir())
    write_image(tmp_path / "large.jpg", 0, 0, (300, 200))
    large = split_of(tmp_path / "large.jpg")
    keep(large, tmp_path / "other", cache=True)
    assert large.pixels is None and "decoded in each epoch" in capfd.readouterr().err


LIMITED = """
import resource, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_data, pathlib
from engine.images import keep
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = pathlib.Path(sys.argv[3])
split = test_data.split_of(*sorted((folder / "tiny" / "train").rglob("*.JPEG")))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
keep(split, folder / "cache")
assert split.pixels.shape == (24, 64, 64, 3) and split.pixels.any()
"""


@pytest.mark.slow
def test_a_disk_that_fills_while_images_are_written(tmp_path):
    """The system itself stops writing after 100,000 bytes."""
    small(tmp_path)
    command = [sys.executable, "-c", LIMITED, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    assert "they are kept in memory" in process.stderr
    assert not list((tmp_path / "cache").iterdir()), "no half-written file is left"


def test_a_cache_folder_that_cannot_be_written(tmp_path, capfd):
    split = small(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    keep(split, tmp_path / "file" / "cache")
    assert split.pixels.shape == (24, 64, 64, 3)
    assert "they are kept in memory" in capfd.readouterr().err


BUILD = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_data, pathlib
from engine.images import keep
folder = pathlib.Path(sys.argv[3])
split = test_data.split_of(*sorted((folder / "tiny" / "train").rglob("*.JPEG")))
keep(split, folder / "cache")
print(int(split.pixels.sum(dtype="int64")))
"""


@pytest.mark.slow
def test_several_runs_may_keep_the_same_images_at_once(tmp_path, start):
    split = small(tmp_path, images=100)
    command = [sys.executable, "-c", BUILD, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
    runs = [start(command) for _ in range(3)]
    sums = {run.communicate(timeout=LIMIT)[0].splitlines()[-1] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    keep(split, tmp_path / "alone")
    assert sums == {str(int(split.pixels.sum(dtype="int64")))}
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_old_temporary_files_of_a_killed_run_are_removed(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("old", "fresh"):
        (folder / f".{name}.pixels.0123abcd.tmp").write_bytes(b"half")
    os.utime(folder / ".old.pixels.0123abcd.tmp", (1, 1))
    keep(small(tmp_path), folder)
    assert [path.name for path in folder.glob(".*")] == [".fresh.pixels.0123abcd.tmp"]


def test_a_picture_of_an_augmented_batch(tmp_path):
    """For human eyes: upright, natural colours, different crops and flips."""
    split = data.load("folder", str(pets(tmp_path, images=12, size=(512, 384)))).train
    preprocessing = {"image_size": 96, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 0.875}
    images, _ = all_of(split, preprocessing, train=True)
    assert 0.5 < images.abs().max() <= 1.001 and images.std() > 0.1
    torchvision.utils.save_image(images[:16] * 0.5 + 0.5, tmp_path / "batch.png", nrow=8)
    assert Image.open(tmp_path / "batch.png").size[0] > 700


def test_worker_processes_go_on_in_the_next_epoch_and_end_with_the_split(tmp_path):
    files = sorted(pets(tmp_path / "pets", images=12).rglob("*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:700])
    labels = np.arange(len(files)) % 2
    settings = {"train": True, "seed": 1, "workers": 2}

    def epochs(split, **changed):
        for epoch in range(3):
            yield [*data.batches(split, 5, PLAIN, **settings | changed, epoch=epoch)]
            yield [*data.batches(split, 5, PLAIN, workers=changed.get("workers", 2))]

    split, alone = (Split(labels, [*map(str, files)]) for _ in range(2))
    seen, before = [], set(multiprocessing.active_children())
    expected = epochs(alone, workers=0)
    for found, wanted in zip(epochs(split), expected, strict=True):
        for (x, a), (y, b) in zip(found, wanted, strict=True):
            assert torch.equal(x, y) and torch.equal(a, b)
        seen.append({process.pid for process in set(multiprocessing.active_children()) - before})
    assert [len(pids) for pids in seen] == [2, 4, 4, 4, 4, 4], "two to train and two to validate"
    assert seen[1] == seen[-1], "the same ones"
    left = next(iterator := data.batches(split, 5, PLAIN, **settings))  # two at once have their own
    assert len([*data.batches(split, 5, PLAIN, **settings, epoch=1)]) == 5 and len(left[1]) == 5
    del iterator, split
    assert not set(multiprocessing.active_children()) - before, "no garbage collection is needed"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_laid_on_white_without_a_warning(mode, tmp_path, recwarn):
    """A black square whose left half is transparent."""
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 20, 40))
    file = tmp_path / f"x.{'gif' if mode == 'P' else 'png'}"
    if mode == "P":
        palette = Image.new("P", (40, 40), 1)
        palette.putpalette([255, 0, 0, 0, 0, 0])
        palette.paste(0, (0, 0, 20, 40))
        palette.save(file, transparency=0)
    else:
        image.convert("LA").save(file) if mode != "RGBA" else image.save(file)
    split = Split(np.zeros(1, np.int64), [str(file)])
    (pixels,), _ = all_of(split, {**PLAIN, "image_size": 40})
    assert pixels[:, :, :18].min() > 0.99 and pixels[:, :, 22:].max() < 0.01
    assert not recwarn.list


@pytest.mark.skipif(sys.platform == "win32", reason="no such sockets")
def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_named(tmp_path, monkeypatch):
    """Worker processes would wait forever."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + 70 * "t")
    with pytest.raises(ValueError, match=r"TMPDIR /t+: expected at most 70 bytes, .*--workers 0"):
        senders(1)
    assert senders(0) == 0
    monkeypatch.setattr(tempfile, "tempdir", "/" + 69 * "t")
    assert senders(1) == 1

    def refuse(workers):
        raise ValueError(f"asked for {workers}")

    monkeypatch.setattr(data, "senders", refuse)
    with pytest.raises(ValueError, match="asked for 1"):
        all_of(small(tmp_path, images=6), workers=1)
