"""Data sets in their true layouts, written here, and the batches that come of them."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import tiny_imagenet, write_image

import data

PLAIN = {"image_size": 28, "mean": [0.0] * 3, "std": [1.0] * 3, "crop": 1.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_imagenet(
        tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200", classes=6, images=20
    )


def paths(root, part):
    """The relative paths of a split."""
    split = getattr(data.load("tiny-imagenet", str(root)), part)
    return [Path(file).relative_to(root).as_posix() for file in split.files]


def test_demo_is_ten_thousand_digits_in_fixed_stratified_splits():
    demo = data.load("demo")
    assert demo.classes[:3] == ["zero", "one", "two"] and len(demo.classes) == 10
    assert np.bincount(demo.train.labels).tolist() == [400] * 10
    assert np.bincount(demo.val.labels).tolist() == [200] * 10
    assert len(demo.test) == 4000 and np.bincount(demo.test.labels).min() > 250
    images = [image.tobytes() for s in (demo.train, demo.val, demo.test) for image in s.pixels]
    assert len(images) == len(set(images)) == 10_000, "no image stands in two splits"


def test_tiny_imagenet_split_is_stratified_disjoint_and_complete(tiny):
    parts = {part: paths(tiny, part) for part in ("train", "val", "test")}
    assert {part: len(files) for part, files in parts.items()} == {
        "train": 96,
        "val": 12,
        "test": 12,
    }
    assert len(set().union(*parts.values())) == 120
    for part, share in (("train", 16), ("val", 2), ("test", 2)):
        wnids = [file.split("/")[1] for file in parts[part]]
        assert {wnids.count(wnid) for wnid in set(wnids)} == {share}
    # the mission's numbers, at full size
    names = [f"train/n{c:08d}/images/{i}.JPEG" for c in range(200) for i in range(500)]
    labels = np.repeat(np.arange(200), 500)
    rows = data.stratified(names, labels, [0.8, 0.1])
    assert [set(np.bincount(labels[r])) for r in rows] == [{400}, {50}, {50}]
    assert [len(r) for r in rows] == [80_000, 10_000, 10_000]
    assert sum(rows[1][:50] < 500) == 50 and rows[1][:5].tolist() != list(range(400, 405))


def test_tiny_imagenet_split_does_not_depend_on_the_mount(tiny, tmp_path):
    moved = tmp_path / "elsewhere" / "tiny-imagenet-200"
    shutil.copytree(tiny, moved)
    for part in ("train", "val", "test"):
        assert paths(tiny, part) == paths(moved, part)


def test_tiny_imagenet_labels_and_pixels_belong_together(tiny):
    loaded = data.load("tiny-imagenet", str(tiny))
    assert loaded.classes[:2] == ["thing 0", "thing 1"]
    for part in ("train", "val", "test"):
        split = getattr(loaded, part)
        files = split.files
        data.keep_small(split)
        assert split.pixels.shape == (len(files), 64, 64, 3) and split.pixels.dtype == np.uint8
        for row in (0, len(files) // 2, -1):
            with Image.open(files[row]) as image:
                assert np.array_equal(np.array(image.convert("RGB")), split.pixels[row])
            assert f"n{split.labels[row]:08d}" in files[row]


def test_names_of_two_classes_that_are_alike_keep_their_id(tmp_path):
    (tmp_path / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tgoldfish, fish\n")
    names = data.readable_names(["n01", "n02", "n03", "n04"], tmp_path / "words.txt")
    assert names == ["crane n01", "crane n02", "goldfish", "n04"]


@pytest.mark.parametrize("below", [".", "kaggle/datasets/someone/tiny-imagenet"])
def test_data_is_found_below_the_folder_that_is_named(tiny, tmp_path, below, capsys):
    place = tmp_path / below / "tiny-imagenet-200"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tiny)
    assert len(data.load("tiny-imagenet", str(tmp_path)).classes) == 6
    assert str(place) in capsys.readouterr().out


def test_data_is_found_in_the_working_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny-imagenet-200").symlink_to(tiny)
    assert len(data.load("tiny-imagenet").classes) == 6


def test_missing_data_says_what_where_and_how(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        data.load("tiny-imagenet")
    message = str(error.value)
    for part in (
        "Tiny-ImageNet",
        str(tmp_path / "data"),
        "/kaggle/input",
        "wnids.txt",
        "http",
        "--data-dir",
    ):
        assert part in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        data.load("tiny-imagenet", str(tmp_path / "nowhere"))


def test_limit_is_stratified_and_classes_keep_the_whole_list(tiny):
    limited = data.load("tiny-imagenet", str(tiny), limit=13)
    assert np.bincount(limited.train.labels).tolist() == [3, 2, 2, 2, 2, 2]
    assert len(limited.val) == 12
    some = data.load("tiny-imagenet", str(tiny), classes="thing 4,thing 1")
    assert set(some.train.labels) == {1, 4} and len(some.classes) == 6
    with pytest.raises(ValueError, match=r"'thing 9'.*did you mean thing"):
        data.load("tiny-imagenet", str(tiny), classes="thing 9")
    spaced = data.load("tiny-imagenet", str(tiny), classes=" thing 4, thing 1 ")
    assert np.array_equal(spaced.train.labels, some.train.labels)
    with pytest.raises(ValueError, match="did you mean --dataset folder"):
        data.load("demo", str(tiny))
    with pytest.raises(ValueError, match="limit 0"):
        data.load("demo", limit=0)
    with pytest.raises(ValueError, match="tiny-imagenet"):
        data.load("mnist")


def pets(root, parts=("",), classes=("cat", "dög 2"), images=10, size=(120, 90)):
    for part in parts:
        for label, name in enumerate(classes):
            for i in range(images):
                write_image(root / part / name / f"{i} ü.jpg", label, i, size)
    return root


def test_a_folder_of_one_s_own_is_split_by_class(tmp_path):
    splits, classes = data.folder(str(pets(tmp_path)))
    assert classes == ["cat", "dög 2"]
    for part, count in (("train", 8), ("val", 2)):
        assert np.bincount(splits[part].labels).tolist() == [count] * 2
    assert not set(splits["train"].files) & set(splits["val"].files)


def test_a_folder_with_train_and_val_is_taken_as_it_is(tmp_path):
    splits, _ = data.folder(str(pets(tmp_path, ("train", "val"))))
    assert all("/train/" in file for file in splits["train"].files) and len(splits["train"]) == 20
    assert all("/val/" in file for file in splits["val"].files) and len(splits["val"]) == 20


def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        data.load("folder", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="each of the classes, found none"):
        data.load("folder", str(tmp_path))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"found photos alone; is it --data-dir .*photos"):
        data.load("folder", str(tmp_path))
    shutil.rmtree(tmp_path / "photos")
    pets(tmp_path, ("train", "val"))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no images"):
        data.load("folder", str(tmp_path))
    (tmp_path / "train" / "empty").rmdir()
    write_image(tmp_path / "val" / "horse" / "1.jpg", 0, 0, (120, 90))
    with pytest.raises(ValueError, match="horse: a class that"):
        data.load("folder", str(tmp_path))


def test_a_file_that_is_no_image_is_named(tmp_path):
    pets(tmp_path)
    (tmp_path / "cat" / "3 ü.jpg").write_bytes(b"no image")
    split = data.load("folder", str(tmp_path)).train
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"3 ü\.jpg: cannot be read \(not an image\)") as error:
            list(data.batches(split, 4, PLAIN, workers=workers))
        assert "\n" not in str(error.value)


def test_what_is_no_class_is_not_taken_for_one(tmp_path):
    pets(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        write_image(tmp_path / name / "0.jpg", 0, 0)
    (tmp_path / "cat" / "._1 ü.jpg").write_bytes(b"what macOS leaves")
    dataset = data.load("folder", str(tmp_path))
    assert dataset.classes == ["cat", "dög 2"]
    assert len(dataset.train) + len(dataset.val) == 20


def test_train_alone_is_split_and_valid_is_val(tmp_path):
    pets(tmp_path / "a", ("train",))
    dataset = data.load("folder", str(tmp_path / "a"))
    assert dataset.classes == ["cat", "dög 2"] and len(dataset.val) == 4
    pets(tmp_path / "b", ("train", "valid"))
    assert len(data.load("folder", str(tmp_path / "b")).val) == 20
    pets(tmp_path / "c", classes=("train", "bus"))  # vehicles
    assert data.load("folder", str(tmp_path / "c")).classes == ["bus", "train"]


def test_a_class_of_one_image_is_trained_on(tmp_path):
    pets(tmp_path)
    write_image(tmp_path / "newt" / "1.jpg", 2, 0, (120, 90))
    dataset = data.load("folder", str(tmp_path))
    assert np.bincount(dataset.train.labels).tolist() == [8, 8, 1]


@pytest.mark.parametrize("gzipped", [False, True])
def test_fashion_mnist_is_read_from_its_idx_files(gzipped, tmp_path):
    rng = np.random.default_rng(0)
    written = {}
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        written[prefix] = images, np.arange(count, dtype=np.uint8) % 10
        for name, values in zip(("images-idx3", "labels-idx1"), written[prefix], strict=True):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            path = tmp_path / "FashionMNIST" / "raw" / f"{prefix}-{name}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            if gzipped:
                path.with_name(f"{path.name}.gz").write_bytes(
                    gzip.compress(head + values.tobytes())
                )
            else:
                path.write_bytes(head + values.tobytes())
    dataset = data.load("fashion-mnist", str(tmp_path))
    for split, prefix in ((dataset.train, "train"), (dataset.val, "t10k")):
        assert np.array_equal(split.pixels, written[prefix][0])
        assert np.array_equal(split.labels, written[prefix][1])
    if gzipped:
        path.with_name(f"{path.name}.gz").write_bytes(b"half")
    else:
        path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1.*not a whole idx file"):
        data.load("fashion-mnist", str(tmp_path))


def test_folders_that_may_not_be_read_are_passed_over(tiny, tmp_path, monkeypatch):
    (tmp_path / "tiny-imagenet-200").symlink_to(tiny)
    (tmp_path / "private").mkdir()
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "private":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(data.load("tiny-imagenet", str(tmp_path)).classes) == 6


@pytest.mark.parametrize("size", [12, 30, 100])
def test_resize_is_pil_s_for_every_box_and_flip(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 40, 52), generator=generator)
    boxes = data.random_boxes(torch.rand(6, 5, generator=generator), 40, 52, 0.08)
    flips = torch.tensor([False, True] * 3)
    out = data.resize(images.float(), boxes, flips, size)
    for image, (left, top, wide, high), flip, ours in zip(images, boxes.T, flips, out, strict=True):
        box = [float(v) for v in (left, top, left + wide, top + high)]
        pil = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
        pil = pil.resize((size, size), Image.Resampling.BILINEAR, box=box)
        expected = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
        expected = expected.flip(-1) if flip else expected
        assert (ours - expected).abs().max() <= 1.01  # PIL rounds after rows and after columns
        assert (ours - expected.flip(-1)).abs().max() > 20


def test_random_boxes_are_inside_and_of_the_wanted_areas_and_ratios():
    draws = torch.rand(20_000, 5, generator=torch.Generator().manual_seed(0))
    for height, width in [(64, 64), (20, 10_000), (1, 1), (384, 512)]:
        left, top, wide, high = data.random_boxes(draws, height, width, 0.08)
        assert left.min() >= 0 and (left + wide).max() <= width * (1 + 1e-5)
        assert top.min() >= 0 and (top + high).max() <= height * (1 + 1e-5)
        ratio = wide / high
        assert 0.7499 <= ratio.min() and ratio.max() <= 1.3335
        if width == height:
            share = wide * high / (width * height)
            assert share.min() >= 0.0799 and 0.4 < share.mean() < 0.54
            assert left.std() > 0.1 * width


def test_small_images_are_cropped_and_flipped_each_on_its_own():
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 64, 1))  # brighter to the right
    split = data.Split(np.arange(32), pixels=ramp)
    (images, labels), *rest = data.batches(split, 32, {**PLAIN, "image_size": 32}, train=True)
    assert not rest and sorted(labels.tolist()) == list(range(32)) != labels.tolist()
    rising = images[:, 0, 16, -1] > images[:, 0, 16, 0]
    assert 6 < rising.sum() < 26, "about half are mirrored"
    steepness = (images[:, 0, 16, -1] - images[:, 0, 16, 0]).abs()
    assert len(steepness.unique()) > 24, "the crops differ, but for those that are the whole width"
    assert torch.allclose(images[:, 0], images[:, 2], atol=1e-5)


def test_evaluation_is_the_centre_in_order():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    split = data.Split(np.arange(5), pixels=pixels)
    how = {**PLAIN, "image_size": 32, "crop": 0.5}
    images = torch.cat([images for images, _ in data.batches(split, 2, how)])
    centre = torch.from_numpy(pixels[:, 16:48, 16:48]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images, centre, rtol=0, atol=1e-5)
    how = {**how, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    images = torch.cat([images for images, _ in data.batches(split, 2, how)])
    mean, std = (torch.tensor(how[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(images, (centre - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["pixels", "files"])
def test_batches_depend_on_seed_and_epoch_and_not_on_workers(source, tmp_path):
    if source == "files":
        split = data.load("folder", str(pets(tmp_path))).train
        assert split.pixels is None
    else:
        split = data.load("demo", limit=20).train

    def epoch(seed, epoch, workers):
        parts = data.batches(split, 6, PLAIN, train=True, seed=seed, epoch=epoch, workers=workers)
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return images, labels

    reference = epoch(0, 0, 0)
    for workers in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(reference, epoch(0, 0, workers), strict=True))
    for other in (epoch(1, 0, 0), epoch(0, 1, 0)):
        assert not torch.equal(reference[0], other[0])
        assert not torch.equal(reference[1], other[1])
        assert torch.equal(reference[1].sort()[0], other[1].sort()[0])


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_large_images_are_decoded_upright_and_near_the_exact_crop(tmp_path, orientation):
    """Decoding a JPEG at a smaller scale must give the crop that full decoding gives."""
    path = tmp_path / "cat" / "a.jpg"
    write_image(path, 3, 1, (512, 384), orientation=orientation)
    split = data.Split(np.zeros(1, np.int64), [str(path)])
    how = {**PLAIN, "image_size": 64, "crop": 0.8}
    ((image, _),) = data.batches(split, 1, how, workers=0)
    with Image.open(path) as full:
        turn = {1: None, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
        full = full.convert("RGB")
        full = full if turn is None else full.transpose(turn)
        width, height = full.size
        side = 0.8 * 384
        box = [(width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2]
        exact = np.array(full.resize((64, 64), Image.Resampling.BILINEAR, box=box))
    exact = torch.from_numpy(exact).permute(2, 0, 1) / 255
    assert (image[0] - exact).abs().mean() < 0.02
    assert (image[0] - exact.flip(-1, -2)).abs().mean() > 0.04


def test_grey_and_cmyk_and_palette_files_become_rgb(tmp_path):
    for mode in ("L", "CMYK", "P", "RGBA", "LA"):
        suffix = "jpg" if mode in ("L", "CMYK") else "png"
        path = tmp_path / mode / f"1.{suffix}"
        path.parent.mkdir()
        Image.new("RGB", (120, 100), (200, 100, 50)).convert(mode).save(path)
        split = data.Split(np.zeros(1, np.int64), [str(path)])
        ((image, _),) = data.batches(split, 1, PLAIN, workers=0)
        assert image.shape == (1, 3, 28, 28)
        if mode not in ("L", "LA"):
            colour = image.mean((0, 2, 3)) * 255
            assert (colour - torch.tensor([200.0, 100, 50])).abs().max() < 12, mode
