"""--dataset csv: tables of labels in the shapes of competitions, and what is wrong with a table."""

import csv
import os
import re
from pathlib import Path

import numpy as np
import pytest
from trees import write_image

import data
import train
from engine.tables import read

# For each competition: the table; its columns; for image i (id, file, other cells, label); the columns of
# sample_submission.csv; files without a row; what is taken for the images and for the labels.
ISO = ["akc", "0", "Male", "nevus", "benign"]
SPECIES = ["Acer Opalus", "Quercus Rubra", "Tilia Tomentosa"]
DISEASES = ["healthy", "multiple_diseases", "rust", "scab"]
COMPETITIONS = {
    "aptos2019": dict(
        table="train.csv",
        head=["id_code", "diagnosis"],
        image=lambda i: (f"{i:012x}", f"train_images/{i:012x}.png", [str(i % 5)], str(i % 5)),
        sample=["id_code", "diagnosis"],
        others=["test_images/0a.png"],
        taken=("id_code", "diagnosis"),
    ),
    "dog-breed": dict(
        table="labels.csv",
        head=["id", "breed"],
        image=lambda i: (f"{i:03x}", f"train/{i:03x}.jpg", [SPECIES[i % 3]], SPECIES[i % 3]),
        sample=["id", *sorted(SPECIES)],
        others=["test/fff.jpg"],
        taken=("id", "breed"),
    ),
    "histopathologic": dict(
        table="train_labels.csv",
        head=["id", "label"],
        image=lambda i: (f"{i:040x}", f"train/{i:040x}.tif", [str(i % 2)], str(i % 2)),
        sample=["id", "label"],
        others=["test/0b.tif"],
        taken=("id", "label"),
    ),
    "plant-pathology": dict(
        table="train.csv",
        head=["image_id", *DISEASES],
        image=lambda i: (
            f"Train_{i}",
            f"images/Train_{i}.jpg",
            [str(int(i % 4 == k)) for k in range(4)],
            DISEASES[i % 4],
        ),
        sample=["image_id", *DISEASES],
        others=["images/Test_0.jpg"],
        taken=("image_id", "4 columns of 0 and 1"),
    ),
    "leaf-classification": dict(
        table="train.csv",
        head=["id", "species", "margin1", "margin2"],
        image=lambda i: (str(i), f"images/{i}.jpg", [SPECIES[i % 3], "0.01", "1"], SPECIES[i % 3]),
        sample=["id", *SPECIES],
        others=["images/901.jpg"],
        taken=("id", "species"),
    ),
    "invasive-species": dict(  # the images of both folders are counted from 1
        table="train_labels.csv",
        head=["name", "invasive"],
        image=lambda i: (str(i), f"train/{i}.jpg", [str(i % 2)], str(i % 2)),
        sample=["name", "invasive"],
        others=["test/1.jpg", "test/2.jpg"],
        taken=("name", "invasive"),
    ),
    "siim-isic": dict(
        table="train.csv",
        head=["image_name", "anatomy", "age", "sex", "diagnosis", "benign_malignant", "target"],
        image=lambda i: (f"ISIC_{i}", f"jpeg/train/ISIC_{i}.jpg", [*ISO, str(i % 2)], str(i % 2)),
        sample=["image_name", "target"],
        others=["jpeg/test/ISIC_99.jpg"],
        taken=("image_name", "target"),
    ),
    "cassava": dict(
        table="train.csv",
        head=["image_id", "label"],
        image=lambda i: (f"1000{i}.jpg", f"train_images/1000{i}.jpg", [str(i % 5)], str(i % 5)),
        sample=["image_id", "label"],
        others=["test_images/2216849948.jpg"],
        taken=("image_id", "label"),
    ),
    "aerial-cactus": dict(
        table="train.csv",
        head=["id", "has_cactus"],
        image=lambda i: (f"{i:04x}.jpg", f"train/train/{i:04x}.jpg", [str(i % 2)], str(i % 2)),
        sample=["id", "has_cactus"],
        others=["test/test/ffff.jpg"],
        taken=("id", "has_cactus"),
    ),
    "paddy": dict(
        table="train.csv",
        head=["image_id", "label", "variety", "age"],
        image=lambda i: (
            f"{i}.jpg",
            f"train_images/{DISEASES[i % 4]}/{i}.jpg",
            [DISEASES[i % 4], "ADT45", "45"],
            DISEASES[i % 4],
        ),
        sample=["image_id", "label"],
        others=["test_images/900.jpg"],
        taken=("image_id", "label"),
    ),
    "hotel-id": dict(
        table="train.csv",
        head=["image", "chain", "hotel_id", "timestamp"],
        image=lambda i: (
            f"{i:x}.jpg",
            f"train_images/{i % 2}/{i:x}.jpg",
            [str(i % 2), str(100 * (i % 3)), "2018-04-09 18:25:01"],
            str(100 * (i % 3)),
        ),
        sample=["image", "hotel_id"],
        others=["test_images/fff.jpg"],
        taken=("image", "hotel_id"),
    ),
    "whale": dict(  # the usual name of images is that of the labels here
        table="train.csv",
        head=["Image", "Id"],
        image=lambda i: (f"{i:06x}.jpg", f"train/{i:06x}.jpg", [f"w_{i % 3}"], f"w_{i % 3}"),
        sample=["Image", "Id"],
        others=["test/ffffff.jpg"],
        taken=("Image", "Id"),
    ),
    "iwildcam": dict(
        table="train.csv",
        head=["category_id", "date", "id", "file_name", "rights", "location"],
        image=lambda i: (
            f"5998{i}.jpg",
            f"train_images/5998{i}.jpg",
            None,
            str(i % 3 + 9),
        ),
        sample=["Id", "Predicted"],
        others=["test_images/77.jpg"],
        taken=("file_name", "category_id"),
    ),
}


def write_table(path: Path, rows: list[list[str]], above="", encoding="utf-8", **how) -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        file.write(above)
        csv.writer(file, **how).writerows(rows)


def write_competition(root: Path, name: str, count: int = 20) -> dict[str, str]:
    """Write images, table and sample; returns the label of each file by its path within root."""
    shape, labels, rows = COMPETITIONS[name], {}, []
    for i in range(1, count + 1):
        key, file, cells, label = shape["image"](i)
        write_image(root / file, i % 7, i, (16, 12))
        labels[file] = label
        rows.append(
            [key, *cells] if cells else [label, "2011-05-13 23:43:18", f"s{i}", key, "J. E.", "33"]
        )
    for file in shape["others"]:
        write_image(root / file, 0, 0, (16, 12))
    write_table(root / shape["table"], [shape["head"], *rows])
    sample = [Path(file).stem for file in shape["others"]]
    cells = ["0"] * (len(shape["sample"]) - 1)
    write_table(root / "sample_submission.csv", [shape["sample"], *[[s, *cells] for s in sample]])
    return labels


def found(dataset: data.Dataset, root: Path) -> dict[str, str]:
    return {
        Path(os.path.relpath(file, root)).as_posix(): dataset.classes[label]
        for split in (dataset.train, dataset.val)
        for file, label in zip(split.files, split.labels, strict=True)
    }


@pytest.mark.parametrize("name", COMPETITIONS)
def test_the_tables_of_competitions(name, tmp_path, capsys):
    labels = write_competition(tmp_path, name)
    dataset = data.load("csv", str(tmp_path))
    assert found(dataset, tmp_path) == labels
    image, label = COMPETITIONS[name]["taken"]
    out = capsys.readouterr().out
    assert f"images by {image}, labels by {label}: 20 images" in out
    others = len(COMPETITIONS[name]["others"])
    assert f"images without a label: {others} ({COMPETITIONS[name]['others'][0]}" in out
    assert "classes without" not in out


def test_a_table_s_split_is_stratified_by_the_names_alone(tmp_path):
    write_competition(tmp_path / "a", "cassava", 50)
    write_competition(tmp_path / "b" / "c", "cassava", 50)
    rows = (tmp_path / "b" / "c" / "train.csv").read_text().split()
    (tmp_path / "b" / "c" / "train.csv").write_text("\n".join([rows[0], *rows[:0:-1]]))
    a, b = (data.load("csv", str(tmp_path / part)) for part in ("a", "b"))
    assert np.bincount(a.train.labels).tolist() == [8] * 5
    assert np.bincount(a.val.labels).tolist() == [2] * 5
    names = [sorted(Path(file).name for file in dataset.val.files) for dataset in (a, b)]
    assert names[0] == names[1]


def small(root: Path, rows: list[list[str]], names="abcd", **how) -> str:
    """A folder of four images a.jpg to d.jpg with the table train.csv."""
    for i, name in enumerate(names):
        write_image(root / "images" / f"{name}.jpg", i, i, (16, 12))
    write_table(root / "train.csv", rows, **how)
    return str(root)


GOOD = [["image", "label"], ["a", "x"], ["b", "y"], ["c", "x"], ["d", "y"]]
WANTED = {"images/a.jpg": "x", "images/b.jpg": "y", "images/c.jpg": "x", "images/d.jpg": "y"}


@pytest.mark.parametrize(
    "how",
    [
        {"encoding": "utf-8-sig"},  # Excel's byte order mark
        {"encoding": "utf-16", "delimiter": "\t"},  # Excel's "Unicode text"
        {"delimiter": ";"},
        {"delimiter": "|"},
        {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"},
        {"above": "sep=;\n", "delimiter": ";"},
        {"above": "\n\n", "delimiter": ";"},
    ],
    ids=lambda how: " ".join(map(str, how.values())).strip(),
)
def test_the_dialects_of_tables(how, tmp_path, capsys):
    root = small(tmp_path, GOOD, **how)
    assert found(data.load("csv", root), tmp_path) == WANTED
    assert "images by image, labels by label: 4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        ("abcd", ["images/a.jpg", "images\\b.jpg", "C:\\me\\images\\c.jpg", "/old/place/images/d"]),
        ("abcd", ["A.JPG", "b.jpg", "./images/c.jpg", "D"]),
        (["001", "002", "010", "100"], ["1", "2", "10.jpg", "100"]),  # as Excel writes them
        (["é", "u\u0308", "c", "d"], ["e\u0301", "ü", "c", "d"]),  # macOS has two characters
    ],
    ids=["paths", "case", "zeros", "accents"],
)
def test_what_rows_call_an_image(names, cells, tmp_path):
    rows = [GOOD[0], *([cell, row[1]] for cell, row in zip(cells, GOOD[1:], strict=True))]
    root = small(tmp_path, rows, names)
    wanted = dict(zip((f"images/{name}.jpg" for name in names), "xyxy", strict=True))
    assert found(data.load("csv", root), tmp_path) == wanted


def test_a_row_gets_no_other_image(tmp_path, capsys):
    """Neither a test image of the same number nor one of another class's folder."""
    root = small(tmp_path, [["image", "label"], *([f"{i}", "xy"[i % 2]] for i in range(1, 6))], "")
    for i in range(1, 5):
        write_image(tmp_path / "train" / f"{i}.jpg", 0, i, (16, 12))
    for i in range(1, 6):
        write_image(tmp_path / "test" / f"{i}.jpg", 0, i, (16, 12))
    assert sorted(found(data.load("csv", root), tmp_path)) == [
        f"train/{i}.jpg" for i in range(1, 5)
    ]
    assert "rows without an image, left out: 1 (5)" in capsys.readouterr().out
    rows = [[f"train/{i}.jpg", "xy"[i % 2]] for i in range(1, 6)]
    write_table(tmp_path / "train.csv", [["image", "label"], *rows])
    assert sorted(found(data.load("csv", root), tmp_path)) == [
        f"train/{i}.jpg" for i in range(1, 5)
    ]


@pytest.mark.parametrize("head", [["id", "image"], ["", "photo"], ["age", "Photo"]])
def test_the_number_of_a_row_is_not_its_image(head, tmp_path):
    """Though there is an image of that number."""
    order, names = [3, 1, 0, 2, 4], "01234"
    rows = [[f"{i}", f"{n}.jpg", "xy"[n % 2]] for i, n in enumerate(order)]
    root = small(tmp_path, [[*head, "label"], *rows], names)
    wanted = {f"images/{n}.jpg": "xy"[n % 2] for n in range(5)}
    assert found(data.load("csv", root), tmp_path) == wanted


def test_columns_of_true_and_false_and_empty_rows(tmp_path, capsys):
    rows = [["a", "True", "False"], ["b", "False", "True"], ["c", "1.00", ""], ["d", "0", "1"]]
    root = small(tmp_path, [["image", "x", "y"], *rows, ["e", "", ""]], "abcde")
    assert found(data.load("csv", root), tmp_path) == WANTED
    assert "rows without a label, left out: 1 (e)" in capsys.readouterr().out


def test_hidden_files_and_linked_folders(tmp_path):
    root = small(tmp_path / "data", GOOD)
    os.rename(tmp_path / "data" / "images", tmp_path / "elsewhere")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    write_image(tmp_path / "data" / ".thumbs" / "a.jpg", 0, 0, (16, 12))
    assert found(data.load("csv", root), tmp_path / "data") == WANTED


def test_what_is_left_out_is_named(tmp_path, capsys):
    rows = [*GOOD, ["gone", "z"], ["b", "y"], ["d", ""], [" ", ""], ["c.jpg", "x"]]
    root = small(tmp_path, rows, "abcde")
    write_image(tmp_path / "more" / "f.jpg", 0, 0, (16, 12))
    assert found(data.load("csv", root), tmp_path) == WANTED
    out = capsys.readouterr().out
    for line in (
        "rows without an image, left out: 1 (gone)",
        "rows without a label, left out: 1 (d)",
        "rows of an image that has one already: 2 (b, c.jpg)",
        "classes without an image: 1 (z)",
        "images without a label: 2 (images/e.jpg, more/f.jpg)",
    ):
        assert f"{line}\n" in out


def test_numbers_are_sorted_by_size_and_written_as_whole_ones(tmp_path):
    labels = ["10", "9", "10.0", "9.0"]
    rows = [GOOD[0], *([name, label] for name, label in zip("abcd", labels, strict=True))]
    assert data.load("csv", small(tmp_path, rows)).classes == ["9", "10"]


def test_columns_and_table_by_flags(tmp_path):
    rows = [
        ["photo", "label", "kind"],
        *([row[0], f"{i}", row[1]] for i, row in enumerate(GOOD[1:])),
    ]
    root = small(tmp_path, rows)
    os.rename(tmp_path / "train.csv", tmp_path / "list.txt")
    settings = {"labels": f"{root}/list.txt", "label_column": "kind"}
    assert found(data.load("csv", root, **settings), tmp_path) == WANTED
    settings["image_column"] = "photo"
    assert found(data.load("csv", root, **settings), tmp_path) == WANTED
    hot = [
        ["photo", "x", "y", "age"],
        *([r[0], f"{r[1] == 'x':d}", f"{r[1] == 'y':d}", "7"] for r in GOOD[1:]),
    ]
    write_table(tmp_path / "list.txt", hot)
    settings["label_column"] = "x,y"
    assert found(data.load("csv", root, **settings), tmp_path) == WANTED


ONE_HOT = [["image", "x", "y"], ["a", "1", "0"], ["b", "1", "1"], ["c", "0", "1"], ["d", "0", "1"]]
WRONG = {
    "two labels": (
        [*GOOD, ["a.jpg", "y"]],
        {},
        "a.jpg: expected one label for an image, found x and y",
    ),
    "ragged": (
        [*GOOD, ["e", "x", "y"]],
        {},
        "line 6: expected 2 cells, as in the first row, found 3",
    ),
    "no header": (
        GOOD[1:],
        {"image_column": "a"},
        "the first row is the image a; add a row above it",
    ),
    "no images": (
        [GOOD[0], ["k", "x"], ["l", "y"]],
        {},
        "no row is an image: a row has k, x, and an image is",
    ),
    "one class": (
        [GOOD[0], ["a", "x"], ["b", "x"]],
        {},
        "label: expected two classes or more, found x",
    ),
    "no label": (
        [GOOD[0], ["a", ""], ["b", ""]],
        {},
        "label: expected two classes or more, found none",
    ),
    "fractions": (
        [GOOD[0], ["a", "0.5"], ["b", "1.5"]],
        {},
        "label: expected classes, found fractions as 0.5",
    ),
    "same column": (
        GOOD,
        {"label_column": "image"},
        "expected another column for labels than for images",
    ),
    "two columns": (
        [["image", "label", "label"], *([*row, "x"] for row in GOOD[1:])],
        {},
        "2 columns are called label; rename one",
    ),
    "open quote": (
        [*GOOD[:3], ["c", "x\nd,y"]],
        {},
        r"label: expected no line breaks, found .*is a quote not closed",
    ),
    "two ones": (ONE_HOT, {}, "b: expected one 1 and else 0 in x, y; found 1, 1"),
    "columns": (
        [["image", "x", "y"], ["a", "1", "7"], ["b", "k", "8"]],
        {},
        "which column has the labels",
    ),
    "column": (
        GOOD,
        {"label_column": "kind"},
        "--label-column kind: .*has the columns image, label",
    ),
    "image column": (
        GOOD,
        {"image_column": "id"},
        "--image-column id: .*has the columns image, label",
    ),
    "empty": ([GOOD[0]], {}, "expected a row of names and rows below it"),
    "table": (GOOD, {"labels": "nowhere.csv"}, "--labels nowhere.csv: no such file, here or in "),
    "few": (GOOD, {"folds": 5, "fold": 4}, "the val split has no images; use fewer --folds"),
    "folds": (
        GOOD,
        {"folds": 2, "fold": 2},
        "--fold 2 --folds 2: expected folds >= 2, fold in 0..folds-1",
    ),
    "fold alone": (GOOD, {"fold": 1}, "--fold 1 --folds None: expected folds >= 2"),
    "both": (GOOD, {"folds": 2, "holdout": 0.5}, "--folds 2 and --holdout 0.5: expected only one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_is_refused_in_one_line(name, tmp_path):
    rows, settings, message = WRONG[name]
    root = small(tmp_path, rows)
    with pytest.raises((ValueError, OSError), match=message) as error:
        data.load("csv", root, **settings)
    assert "\n" not in str(error.value)


def test_tables_that_cannot_be_told_apart(tmp_path):
    root = small(tmp_path, GOOD)
    write_image(tmp_path / "again" / "a.jpg", 0, 0, (16, 12))
    with pytest.raises(
        ValueError, match=r"a: expected one image, found again/a\.jpg and images/a\.jpg"
    ):
        data.load("csv", root)
    os.remove(tmp_path / "again" / "a.jpg")
    os.rename(tmp_path / "train.csv", tmp_path / "mine.csv")  # the only table, under any name
    assert found(data.load("csv", root), tmp_path) == WANTED
    (tmp_path / "sample_submission.csv").write_text("image,label\n")
    assert found(data.load("csv", root), tmp_path) == WANTED
    assert found(data.load("csv", root, labels="mine.csv"), tmp_path) == WANTED
    (tmp_path / "yours.csv").write_text("image,label\n")
    with pytest.raises(
        FileNotFoundError, match=r"found .*mine.csv, .*yours.csv; name it with --labels"
    ):
        data.load("csv", root)
    with pytest.raises(ValueError, match=r"--labels mine\.csv: only for --dataset csv, not folder"):
        data.load("folder", root, labels="mine.csv")
    with pytest.raises(ValueError, match="expected text in UTF-8"):
        (tmp_path / "mine.csv").write_bytes("image,label\na,\xe9".encode("latin1"))
        read(tmp_path / "mine.csv")


def test_folds_share_the_images_among_them(tmp_path):
    write_competition(tmp_path, "plant-pathology", 42)
    write_image(tmp_path / "images" / "Train_99.jpg", 0, 0, (16, 12))
    with open(tmp_path / "train.csv", "a") as file:
        file.write("Train_99,0,1,0,0\n")
    folds = [data.load("csv", str(tmp_path), folds=4, fold=k) for k in range(4)]
    vals = [{*dataset.val.files} for dataset in folds]
    assert sum(map(len, vals)) == len(set.union(*vals)) == 43
    for dataset, val in zip(folds, vals, strict=True):
        assert not val & {*dataset.train.files} and len(val | {*dataset.train.files}) == 43
        assert dataset.test is None
        counts = np.bincount(dataset.val.labels)
        assert counts.max() - counts.min() <= 1
    sizes = [*map(len, vals)]
    assert max(sizes) - min(sizes) <= 2, "small classes do not all fill the first parts"


def test_folds_of_a_data_set_with_its_own_validation():
    folds = [data.load("demo", folds=3, fold=k) for k in range(3)]
    assert [len(dataset.val) for dataset in folds] == [1334, 1333, 1333]
    images = [{image.tobytes() for image in dataset.val.pixels} for dataset in folds]
    assert len(set.union(*images)) == 4000
    assert np.array_equal(folds[0].test.pixels, data.load("demo").test.pixels)


def test_a_class_s_only_image_is_in_no_fold(tmp_path):
    rows = [*GOOD, ["e", "rare"]]
    root = small(tmp_path, rows, "abcde")
    for k in range(2):
        dataset = data.load("csv", root, folds=2, fold=k)
        assert dataset.classes[dataset.train.labels.min()] == "rare"
        assert re.search(r"/[abcd]\.jpg$", dataset.val.files[0])


def test_a_run_whose_labels_have_changed_is_not_resumed(tmp_path, capsys):
    write_competition(tmp_path / "data", "cassava")
    flags = [
        "--dataset",
        "csv",
        "--data-dir",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
    ]
    flags += "--epochs 1 --batch-size 8 --image-size 28 --workers 0 --resume".split()
    assert train.main(flags) == 0 == train.main(flags)
    table = tmp_path / "data" / "train.csv"
    head, *rows = [line.split(",") for line in table.read_text().split()]
    cells = [row[1] for row in rows]
    rows = [[row[0], cell] for row, cell in zip(rows, cells[1:] + cells[:1], strict=True)]
    write_table(table, [head, *rows])
    capsys.readouterr()
    assert train.main(flags) == 2
    assert "last.pt: labels was [" in capsys.readouterr().err
