"""Data sets in the layouts of the real ones: how they are found, split and, if broken, refused."""

import hashlib
import http.server
import os
import pickle
import shutil
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torchvision
import trees
from PIL import Image
from torchvision import datasets
from trees import fashion_mnist, pets, tiny_imagenet, write_image

import data
from engine.images import keep


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_imagenet(
        tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200", classes=6, images=20
    )


def paths(root, part):
    """The paths of a split, relative to root."""
    split = getattr(data.load("tiny-imagenet", str(root)), part)
    return [Path(file).relative_to(root).as_posix() for file in split.files]


def test_demo_is_ten_thousand_digits_in_fixed_stratified_splits():
    demo = data.load("demo")
    assert demo.classes[:3] == ["zero", "one", "two"] and len(demo.classes) == 10
    assert np.bincount(demo.train.labels).tolist() == [400] * 10
    assert np.bincount(demo.val.labels).tolist() == [200] * 10
    assert len(demo.test) == 4000 and np.bincount(demo.test.labels).min() > 250
    images = [image.tobytes() for s in (demo.train, demo.val, demo.test) for image in s.pixels]
    assert len(images) == len(set(images)) == 10_000, "no image is in two splits"


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
    # The counts of the full data set.
    names = [f"train/n{c:08d}/images/{i}.JPEG" for c in range(200) for i in range(500)]
    labels = np.repeat(np.arange(200), 500)
    rows = data.stratified(names, labels, [0.8, 0.1])
    assert [set(np.bincount(labels[r])) for r in rows] == [{400}, {50}, {50}]
    assert [len(r) for r in rows] == [80_000, 10_000, 10_000]
    assert sum(rows[1][:50] < 500) == 50 and rows[1][:5].tolist() != list(range(400, 405))


def test_tiny_imagenet_split_does_not_depend_on_the_folder(tiny, tmp_path):
    moved = tmp_path / "elsewhere" / "tiny-imagenet-200"
    shutil.copytree(tiny, moved)
    for part in ("train", "val", "test"):
        assert paths(tiny, part) == paths(moved, part)


def test_tiny_imagenet_labels_match_their_pixels(tiny, tmp_path):
    loaded = data.load("tiny-imagenet", str(tiny))
    assert loaded.classes[:2] == ["thing 0", "thing 1"]
    for part in ("train", "val", "test"):
        split = getattr(loaded, part)
        files = split.files
        keep(split, tmp_path)
        assert split.pixels.shape == (len(files), 64, 64, 3) and split.pixels.dtype == np.uint8
        for row in (0, len(files) // 2, -1):
            with Image.open(files[row]) as image:
                assert np.array_equal(np.array(image.convert("RGB")), split.pixels[row])
            assert f"n{split.labels[row]:08d}" in files[row]


def test_equal_names_of_two_classes_keep_their_ids(tmp_path):
    (tmp_path / "words.txt").write_text("n01\tcrane, bird\nn02\tcrane\nn03\tgoldfish, fish\n")
    names = data.readable_names(["n01", "n02", "n03", "n04"], tmp_path / "words.txt", "\t")
    assert names == ["crane n01", "crane n02", "goldfish", "n04"]


@pytest.mark.parametrize("below", [".", "input/datasets/someone/tiny-imagenet/1/2"])
def test_data_is_found_below_the_given_folder(tiny, tmp_path, below, capsys):
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


def test_the_error_for_missing_data_says_what_where_and_how(tmp_path, monkeypatch):
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


def test_limit_is_stratified_and_the_list_of_classes_stays_whole(tiny):
    limited = data.load("tiny-imagenet", str(tiny), limit=13)
    assert np.bincount(limited.train.labels).tolist() == [3, 2, 2, 2, 2, 2]
    assert len(limited.val) == 12
    subset = data.load("tiny-imagenet", str(tiny), classes="thing 4,thing 1")
    assert set(subset.train.labels) == {1, 4} and len(subset.classes) == 6
    with pytest.raises(ValueError, match=r"'thing 9'.*did you mean thing"):
        data.load("tiny-imagenet", str(tiny), classes="thing 9")
    spaced = data.load("tiny-imagenet", str(tiny), classes=" thing 4, thing 1 ")
    assert np.array_equal(spaced.train.labels, subset.train.labels)
    with pytest.raises(ValueError, match="did you mean --dataset folder"):
        data.load("demo", str(tiny))
    with pytest.raises(ValueError, match="limit 0"):
        data.load("demo", limit=0)
    with pytest.raises(ValueError, match="tiny-imagenet"):
        data.load("mnist")


def test_a_user_s_own_folder_is_split_within_each_class(tmp_path):
    dataset = data.load("folder", str(pets(tmp_path)))
    assert dataset.classes == ["cat", "dög 2"]
    for split, count in ((dataset.train, 8), (dataset.val, 2)):
        assert np.bincount(split.labels).tolist() == [count] * 2
    assert not set(dataset.train.files) & set(dataset.val.files)


def test_a_folder_with_train_and_val_is_not_split_again(tmp_path):
    splits, _ = data.folder(str(pets(tmp_path, ("train", "val"))))
    assert all("/train/" in file for file in splits["train"].files) and len(splits["train"]) == 20
    assert all("/val/" in file for file in splits["val"].files) and len(splits["val"]) == 20


def test_unusable_folders_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-dir"):
        data.load("folder", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="for each class, two or more, found none"):
        data.load("folder", str(tmp_path))
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"photos: expected a folder .* found cat; see docs/data"):
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


def test_hidden_folders_and_files_are_ignored(tmp_path):
    pets(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        write_image(tmp_path / name / "0.jpg", 0, 0)
    (tmp_path / "cat" / "._1 ü.jpg").write_bytes(b"a file of macOS")
    dataset = data.load("folder", str(tmp_path))
    assert dataset.classes == ["cat", "dög 2"]
    assert len(dataset.train) + len(dataset.val) == 20


def test_a_train_folder_alone_is_split_and_valid_means_val(tmp_path):
    pets(tmp_path / "a", ("train",))
    dataset = data.load("folder", str(tmp_path / "a"))
    assert dataset.classes == ["cat", "dög 2"] and len(dataset.val) == 4
    pets(tmp_path / "b", ("train", "valid"))
    assert len(data.load("folder", str(tmp_path / "b")).val) == 20
    pets(tmp_path / "c", classes=("train", "bus"))  # the vehicles
    assert data.load("folder", str(tmp_path / "c")).classes == ["bus", "train"]


def test_a_class_of_one_image_is_trained_on(tmp_path):
    pets(tmp_path)
    write_image(tmp_path / "newt" / "1.jpg", 2, 0, (120, 90))
    dataset = data.load("folder", str(tmp_path))
    assert np.bincount(dataset.train.labels).tolist() == [8, 8, 1]


@pytest.mark.parametrize("gzipped", [False, True])
def test_fashion_mnist_is_read_from_its_idx_files(gzipped, tmp_path):
    written = fashion_mnist(tmp_path, gzipped=gzipped)
    dataset = data.load("fashion-mnist", str(tmp_path))
    for split, prefix in ((dataset.train, "train"), (dataset.val, "t10k")):
        assert np.array_equal(split.pixels, written[prefix][0][..., None].repeat(3, -1))
        assert np.array_equal(split.labels, written[prefix][1])
    end = ".gz" if gzipped else ""
    (tmp_path / "FashionMNIST" / "raw" / f"t10k-labels-idx1-ubyte{end}").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1.*broken idx file"):
        data.load("fashion-mnist", str(tmp_path))


def test_folders_without_read_permission_are_skipped(tiny, tmp_path, monkeypatch):
    (tmp_path / "deeper").mkdir()  # the search meets the private folder before the data
    (tmp_path / "deeper" / "tiny-imagenet-200").symlink_to(tiny)
    (tmp_path / "private").mkdir()
    scandir = os.scandir

    def refusing(folder):
        if Path(folder).name == "private":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    assert len(data.load("tiny-imagenet", str(tmp_path)).classes) == 6


def test_tiny_imagenet_official_tests_on_the_official_validation_images(tiny):
    dataset = data.load("tiny-imagenet-official", str(tiny))
    plain = data.load("tiny-imagenet", str(tiny))
    assert dataset.train.files == plain.train.files and dataset.val.files == plain.val.files
    assert [Path(file).name for file in dataset.test.files] == [f"val_{i}.JPEG" for i in range(6)]
    assert dataset.test.labels.tolist() == list(range(6)), "those of val_annotations.txt"


@pytest.mark.parametrize("kaggle", [False, True])
def test_food101_in_torchvision_s_and_in_kaggle_s_layout(kaggle, tmp_path):
    root = trees.food101(tmp_path / "input" / "food-101", kaggle=kaggle)
    dataset = data.load("food101", str(tmp_path))
    assert dataset.classes == ["beignets", "cheese_plate", "cheesecake"]
    assert dataset.test is None
    for split, count in ((dataset.train, 6), (dataset.val, 2)):
        assert np.bincount(split.labels).tolist() == [count] * 3
        for file, label in zip(split.files, split.labels, strict=True):
            assert Path(file).is_file() and Path(file).parent.name == dataset.classes[label]
    if not kaggle:  # torchvision itself reads the same
        for split, part in ((dataset.train, "train"), (dataset.val, "test")):
            theirs = datasets.Food101(root.parent, split=part)
            assert theirs.classes == dataset.classes
            ours = dict(zip(split.files, split.labels, strict=True))
            assert ours == {
                str(f): y for f, y in zip(theirs._image_files, theirs._labels, strict=True)
            }


def test_labels_follow_class_names_in_any_order_of_the_lists(tmp_path):
    """Hugging Face's lists have cheesecake before cheese_plate: labels must follow our class names."""
    trees.food101(tmp_path / "a", ("beignets", "cheese_plate", "cheesecake"))
    trees.food101(tmp_path / "b", ("beignets", "cheesecake", "cheese_plate"))
    for folder in ("a", "b"):
        dataset = data.load("food101", str(tmp_path / folder))
        for file, label in zip(dataset.train.files, dataset.train.labels, strict=True):
            assert Path(file).parent.name == dataset.classes[label]


def test_holdout_validates_on_training_images_and_tests_on_validation_images(tmp_path):
    trees.food101(tmp_path)
    whole = data.load("food101", str(tmp_path))
    chosen = {"classes": ["beignets", "cheesecake"], "limit": 10}
    dataset = data.load("food101", str(tmp_path), holdout=0.4, **chosen)
    assert np.bincount(dataset.train.labels).tolist() == [3, 0, 3]
    assert np.bincount(dataset.val.labels).tolist() == [2, 0, 2]
    assert not set(dataset.train.files) & set(dataset.val.files)
    assert set(dataset.train.files) | set(dataset.val.files) <= set(whole.train.files)
    assert set(dataset.test.files) < set(whole.val.files) and len(dataset.classes) == 3


def test_cifar100_is_read_and_split(tmp_path, monkeypatch):
    trees.cifar100(tmp_path)
    dataset = data.load("cifar100", str(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [100, 100, 50]
    assert dataset.classes[3] == "thing_03" and dataset.train.pixels.shape == (100, 32, 32, 3)
    # The real files have 500 images of each class: 450 and 50.
    rows = data.stratified([str(i) for i in range(50_000)], np.arange(50_000) % 100, [0.9])
    assert [set(np.bincount(r)) for r in (np.arange(50_000)[r] % 100 for r in rows)] == [
        {450},
        {50},
    ]
    # The reference: torchvision's own reader, without the checksums of the real files.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    theirs = datasets.CIFAR100(tmp_path, train=False)
    assert np.array_equal(theirs.data, dataset.test.pixels)
    assert theirs.targets == dataset.test.labels.tolist() and theirs.classes == dataset.classes


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_code_in_a_pickle_of_cifar100_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = trees.cifar100(tmp_path)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": Bomb()}))
    with pytest.raises(ValueError, match=r"meta: not one of CIFAR's files \(it calls .*open"):
        data.load("cifar100", str(tmp_path))
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("kaggle", [False, True])
def test_imagenet_in_class_folders_and_in_kaggle_s_layout(kaggle, tmp_path):
    folder = trees.imagenet(tmp_path / "input" / "imagenet", kaggle)
    dataset = data.load("imagenet", str(tmp_path))
    ids = list(trees.IMAGENET_IDS)
    assert dataset.classes == (["tench", "crane n02012849", "crane n03126707"] if kaggle else ids)
    assert np.bincount(dataset.train.labels).tolist() == [4] * 3
    assert np.bincount(dataset.val.labels).tolist() == [2] * 3
    for file, label in zip(dataset.val.files, dataset.val.labels, strict=True):
        assert Path(file).is_file()
        assert (int(Path(file).stem[-8:]) - 1) // 2 == label
    shutil.rmtree(folder / "train" / ids[0])
    part = data.load("imagenet", str(tmp_path))  # with the validation images of the other classes
    assert part.classes == dataset.classes[1:]
    assert np.bincount(part.val.labels).tolist() == [2] * 2
    if kaggle:
        solution = tmp_path / "input" / "imagenet" / "LOC_val_solution.csv"
        head, *rows = solution.read_text().splitlines(keepends=True)
        solution.write_text(head + "".join(row for row in rows if ids[0] in row))
        with pytest.raises(ValueError, match=r"val split has no images; is the data set complete"):
            data.load("imagenet", str(folder))
        shutil.move(solution, tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=r"LOC_val_solution\.csv, which has its labels"):
            data.load("imagenet", str(folder))


def test_a_thousand_ids_get_torchvision_s_names(tmp_path):
    ids = [f"n{i:08d}" for i in range(1000)]
    names = data.imagenet_names(tmp_path, ids)
    assert names[0] == "tench" and names[999] == "toilet tissue" and len(set(names)) == 1000


def test_tiny_imagenet_is_not_mistaken_for_imagenet(tiny):
    with pytest.raises(FileNotFoundError, match="ImageNet not found"):
        data.load("imagenet", str(tiny.parent))


@pytest.fixture
def web(tmp_path):
    """A folder, and the address of a local server for it."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", ["cifar100", "food101"])
def test_missing_data_is_downloaded_once(name, web, tmp_path, monkeypatch):
    """From torchvision's address, on another host."""
    monkeypatch.chdir(tmp_path)
    folder, address = web
    source = datasets.CIFAR100 if name == "cifar100" else datasets.Food101
    url, md5 = ("url", "tgz_md5") if name == "cifar100" else ("_URL", "_MD5")
    root = tmp_path / "original"
    tree = trees.cifar100(root) if name == "cifar100" else trees.food101(root / "food-101")
    archive = folder / getattr(source, url).rsplit("/", 1)[1]
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
    monkeypatch.setattr(source, url, f"{address}/{archive.name}")
    monkeypatch.setattr(source, md5, "0" * 32)
    with pytest.raises(FileNotFoundError, match="add --download"):
        data.load(name)
    with pytest.raises(ValueError, match=f"--download: {name} arrived incomplete"):
        data.load(name, download=True)
    monkeypatch.setattr(source, md5, hashlib.md5(archive.read_bytes()).hexdigest())
    fetched = data.load(name, download=True)
    assert len(fetched.train) == (100 if name == "cifar100" else 18)
    archive.unlink()
    assert len(data.load(name, download=True).train) == len(fetched.train), "no second download"


def test_a_failed_download_is_one_line(web, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.CIFAR100, "url", f"{web[1]}/nowhere.tar.gz")
    with pytest.raises(OSError, match=r"--download: cifar100 cannot be downloaded into") as error:
        data.load("cifar100", download=True)
    assert "\n" not in str(error.value)
    message = "--download: not possible for tiny-imagenet; expected one of food101"
    with pytest.raises(ValueError, match=message):
        data.load("tiny-imagenet", download=True)


def test_a_folder_of_very_many_folders_is_not_searched(tmp_path):
    for i in range(101):
        (tmp_path / "many" / f"{i}").mkdir(parents=True)
    trees.cifar100(tmp_path / "many" / "0")
    with pytest.raises(FileNotFoundError):
        data.load("cifar100", str(tmp_path))
    shutil.rmtree(tmp_path / "many" / "100")
    assert len(data.load("cifar100", str(tmp_path)).classes) == 100


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("train", "validation", "testing")])
def test_split_folders_in_any_case_and_with_a_test_folder(names, tmp_path):
    pets(tmp_path, names, images=3)
    dataset = data.load("folder", str(tmp_path))
    assert dataset.classes == ["cat", "dög 2"]
    for split, name in zip((dataset.train, dataset.val, dataset.test), names, strict=True):
        assert len(split) == 6 and all(f"/{name}/" in file for file in split.files)


def test_train_and_test_folders_without_val(tmp_path):
    pets(tmp_path, ("train", "test"))
    dataset = data.load("folder", str(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [16, 4, 20]
    shutil.rmtree(tmp_path / "test")
    write_image(tmp_path / "test" / "1.jpg", 0, 0)  # unlabelled
    assert data.load("folder", str(tmp_path)).test is None
    write_image(tmp_path / "val" / "1.jpg", 0, 0)
    with pytest.raises(ValueError, match="val: expected a folder for each class"):
        data.load("folder", str(tmp_path))


def test_folders_named_as_splits_are_not_classes(tmp_path):
    for name in ("training", "testing"):
        write_image(tmp_path / name / "1.jpg", 0, 0)
    with pytest.raises(ValueError, match="found testing and training; see docs"):
        data.load("folder", str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),  # brain tumours
        ("seg_train/seg_train", "seg_test/seg_test"),  # Intel's scenes
        ("archive/photos/train/train", "archive/photos/test"),
        ("train", "test_images"),
    ],
)
def test_folders_around_folders_and_other_names_of_splits(train, test, tmp_path, capsys):
    pets(tmp_path, (train, test))
    write_image(tmp_path / "seg_pred" / "seg_pred" / "1.jpg", 0, 0)
    if train.startswith("archive"):
        shutil.rmtree(tmp_path / "seg_pred")
    dataset = data.load("folder", str(tmp_path))
    assert [len(s) for s in (dataset.train, dataset.val, dataset.test)] == [16, 4, 20]
    assert dataset.classes == ["cat", "dög 2"]
    assert all(f"/{train}/" in file for file in dataset.train.files + dataset.val.files)
    assert all(f"/{test}/" in file for file in dataset.test.files)
    out = capsys.readouterr().out
    assert ("left out, as they belong to no class: 1 (seg_pred)" in out) == (train[0] != "a")


@pytest.mark.parametrize("place", ["test", "test/test", "test/unknown"])
def test_test_images_without_classes_are_left_out_and_named(place, tmp_path, capsys):
    pets(tmp_path, ("train",))
    write_image(tmp_path / place / "1.jpg", 0, 0)
    assert data.load("folder", str(tmp_path)).test is None
    assert "left out, as its images have no class folders" in capsys.readouterr().out


def test_a_class_is_no_split_and_no_wrapping(tmp_path):
    pets(tmp_path / "a", classes=("bus", "freight_train/2020", "car"))
    assert data.load("folder", str(tmp_path / "a")).classes == ["bus", "car", "freight_train"]
    pets(tmp_path / "b", ("train",))
    write_image(tmp_path / "b" / "val" / "cat" / "2020" / "1.jpg", 0, 0)  # a class, not a wrapping
    assert len(data.load("folder", str(tmp_path / "b")).val) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_class_name_that_is_not_utf_8_is_refused(tmp_path):
    for name in ("plain", os.fsdecode(b"caf\xe9")):
        write_image(tmp_path / name / "1.jpg", 0, 0)
    with pytest.raises(ValueError, match=r"expected names in UTF-8, found b'caf\\xe9'; rename it"):
        data.load("folder", str(tmp_path))


def test_held_out_images_do_not_depend_on_classes_or_folder(tmp_path):
    trees.food101(tmp_path / "a", train=20)
    shutil.copytree(tmp_path / "a", tmp_path / "somewhere" / "else")

    def held_out(folder, **settings):
        val = data.load("food101", str(tmp_path / folder), holdout=0.3, **settings).val
        return {Path(file).name for file in val.files if "beignets" in file}

    assert len(held_out("a")) == 6
    assert held_out("a") == held_out("a", classes="beignets") == held_out("somewhere")


@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_holdout_takes_its_part_of_all_training_images(parts, tmp_path):
    """The usual part for validation, one image in five, is not taken away before."""
    pets(tmp_path, parts)
    dataset = data.load("folder", str(tmp_path), holdout=0.1)
    assert len(dataset.train) == 18 and len(dataset.val) == 2
    assert len(dataset.test or ()) == (20 if "test" in parts else 0)


def test_holdout_leaves_a_test_split_alone():
    plain, held = data.load("demo"), data.load("demo", holdout=0.25)
    assert len(held.train) == 3000 and len(held.val) == 1000
    assert np.array_equal(held.test.pixels, plain.test.pixels)


def test_the_split_never_changes():
    names = [f"{c}/{i}.jpg" for c in ("cat", "dög") for i in range(10)]
    _, val = data.stratified(names, np.repeat([0, 1], 10), [0.7])
    assert val.tolist() == [6, 7, 9, 10, 16, 17]
    assert data.relative(["/a/o\u0308/1.jpg", "/a/u/2.jpg"]) == ["ö/1.jpg", "u/2.jpg"]
    assert data.relative(["./a/b/1.jpg", "./a/c/2.jpg"]) == ["b/1.jpg", "c/2.jpg"]
    assert data.relative(["./b/1.jpg", "./c/2.jpg"]) == ["b/1.jpg", "c/2.jpg"]


def test_an_incomplete_data_set_is_refused(tmp_path):
    trees.food101(tmp_path)
    shutil.rmtree(tmp_path / "images" / "cheesecake")
    with pytest.raises(ValueError, match="1 classes are missing, the first is cheesecake"):
        data.load("food101", str(tmp_path))


def test_images_in_unknown_formats_are_counted(tmp_path, capsys):
    pets(tmp_path)
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"whatever")
    data.load("folder", str(tmp_path))
    assert "left out {'.heic': 1}" in capsys.readouterr().out
    (tmp_path / "horse").mkdir()
    with pytest.raises(ValueError, match=r"horse: no images \(\.jpg, "):
        data.load("folder", str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_file_names_that_are_not_utf_8(tmp_path, capsys):
    pets(tmp_path)
    with open(os.fsencode(tmp_path) + b"/loose \xff.jpg", "w"):
        pass
    os.rename(
        os.fsencode(tmp_path / "cat" / "1 ü.jpg"), os.fsencode(tmp_path / "cat") + b"/\xff.jpg"
    )
    dataset = data.load("folder", str(tmp_path))
    assert "left out, as they belong to no class: 1 (loose ?.jpg)" in capsys.readouterr().out
    keep(dataset.train, tmp_path / "cache", cache=True)
    assert len(dataset.train) + len(dataset.val) == 20
