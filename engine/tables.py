"""Tables of labels: CSV files whose first row names the columns, and the images that their rows mean."""

import codecs
import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from engine.files import printable

# Usual names, in any case: of tables, of columns of images, and of columns of labels. The first ones win.
TABLES = "train.csv labels.csv train_labels.csv trainlabels.csv".split()
SAMPLES = "sample_submission.csv samplesubmission.csv".split()
IMAGES = (
    "image_id id image id_code image_name file_name filename name file image_path filepath path img img_path "
    "imageid filenames filepaths"
).split()
LABELS = "label labels class target category category_id class_name class_id diagnosis".split()


class Names:
    """Finds paths by what a table calls them: cat/7.jpg is "7", "7.jpg", "cat/7" and "/elsewhere/cat/7.jpg".

    loose: where no file is called so, letters may differ in their case, and a number may lack zeros in front,
    which Excel drops.
    """

    def __init__(self, paths: list[str], loose: bool = False):
        paths = [unicodedata.normalize("NFC", path.replace(os.sep, "/")) for path in paths]
        self.parts = [path.split("/") for path in paths]
        self.exact, self.loose = {}, {}
        for number, parts in enumerate(self.parts):
            for name in {parts[-1], os.path.splitext(parts[-1])[0]}:
                self.exact.setdefault(name, []).append(number)
                if loose:
                    self.loose.setdefault(loosened(name), []).append(number)

    def __call__(self, name: str) -> list[int]:
        """The numbers of the paths that have this name, and the folders in front of it, as far as they go."""
        *folders, name = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
        folders = [folder for folder in folders if folder not in ("", ".")]
        for found in (self.exact.get(name, []), self.loose.get(loosened(name), [])):
            if same := [number for number in found if agree(folders, self.parts[number][:-1])]:
                return same
        return []


def agree(a: Sequence[str], b: Sequence[str]) -> bool:
    """True if the shorter list of folders is the end of the longer one."""
    n = min(len(a), len(b))
    return a[len(a) - n :] == b[len(b) - n :]


def loosened(name: str) -> str:
    return re.sub(r"^0+(?=\d+(\.\w+)?$)", "", name.lower())


def read(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """(names of the columns, other rows) of a CSV file; a row has as many cells as there are names.

    Blank rows are left out. Its separator is , ; | or a tab; its text is UTF-8 or UTF-16, with or without a
    byte order mark. Raises OSError, or ValueError with the line that is wrong.
    """
    content = Path(path).read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error}); save it as such") from None
    text = re.sub(r"^sep=.\r?\n", "", text)  # Excel's own first line
    first = re.sub(r'"[^"]*"', "", text.lstrip().split("\n", 1)[0])
    separator = max(",;\t|", key=first.count)
    reader, head, rows = csv.reader(io.StringIO(text, ""), delimiter=separator), [], []
    try:
        for row in reader:
            row = [cell.strip() for cell in row]
            if not any(row):
                continue
            if not head:
                head = row
            elif len(row) == len(head):
                rows.append(row)
            else:
                raise ValueError(
                    f"{path}: line {reader.line_num}: expected {len(head)} cells, as in the first row, "
                    f"found {len(row)}; put a cell with a {separator!r} in quotes"
                )
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; save the table again") from None
    return head, rows


def choose(files: list[str], usual: list[str]) -> str | None:
    """Of the files with a usual name, the one that lies least deep; of those, the first by name."""
    names = [os.path.basename(file).lower() for file in files]
    ranked = [
        (file.count(os.sep), usual.index(name), file)
        for file, name in zip(files, names, strict=True)
        if name in usual
    ]
    return min(ranked)[2] if ranked else None


def labelled(
    path: str | Path,
    images: list[str],
    sample: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[list[int], np.ndarray, list[str]]:
    """(numbers of the images that have a row with a label, their labels, the classes), by a table.

    path: the table.
    images: paths of the images, relative to the folder of all.
    sample: a sample_submission.csv, whose later columns are named like the label column, or like the classes.
    image_column, label_column: the names of the columns; several of labels, separated by commas, are one-hot.
    Prints what was taken for what, and what was left out. Raises OSError or ValueError in one line.
    """
    head, rows = read(path)
    if not rows:
        raise ValueError(f"{path}: expected a row of names and rows below it, found {head}")
    names = Names(images, loose=True)
    column = image_column_of(path, head, rows, names, images, image_column)
    columns = label_columns_of(path, head, rows, column, label_column, sample)
    check_columns(path, head, rows, column, columns, names)
    if len(columns) == 1:
        texts = [row[columns[0]] for row in rows]
        texts, classes = class_names(path, head[columns[0]], texts)
    else:
        texts = one_hot(path, head, rows, column, columns)
        classes = [head[i] for i in columns]
    taken, left_out = match(path, [row[column] for row in rows], texts, classes, images, names)
    if not taken:
        raise ValueError(f"{path}: no row has both an image and a label")
    shown = head[columns[0]] if len(columns) == 1 else f"{len(columns)} columns of 0 and 1"
    found = f"{len(taken):,} images, {len(classes)} classes"
    print(printable(f"{path}: images by {head[column]}, labels by {shown}: {found}"))
    seen = {*taken.values()}
    left_out["images without a label"] = [x for i, x in enumerate(images) if i not in taken]
    left_out["classes without an image"] = [x for i, x in enumerate(classes) if i not in seen]
    for what, which in left_out.items():
        if which:
            listed = ", ".join(which[:3]) + (" ..." if which[3:] else "")
            print(printable(f"{path}: {what}: {len(which):,} ({listed})"))
    order = sorted(taken)
    return order, np.array([taken[i] for i in order], np.int64), classes


def match(path, cells, texts, classes, images, names) -> tuple[dict[int, int], dict[str, list]]:
    """(label of each image's number, names of the rows that are left out, by the reason)."""
    number = {name: label for label, name in enumerate(classes)}
    tests = {i for i, image in enumerate(images) if in_test(image)}
    matches = [names(cell) for cell in cells]
    if any(tests & {*found} and {*found} - tests for found in matches):
        # The competition counts its test images from 1 again: none of them is meant.
        matches = [[i for i in found if i not in tests] for found in matches]
    taken, missing, unlabelled, again = {}, [], [], []
    for cell, text, found in zip(cells, texts, matches, strict=True):
        if not text:
            unlabelled.append(cell)
        elif not found:
            missing.append(cell)
        elif len(found) > 1:
            raise ValueError(
                f"{path}: {cell}: expected one image, found {images[found[0]]} and {images[found[1]]}; write "
                "folder and extension into the table, or name the folder of one of them with --data-dir"
            )
        elif found[0] not in taken:
            taken[found[0]] = number[text]
        elif taken[found[0]] == number[text]:
            again.append(cell)
        else:
            raise ValueError(
                f"{path}: {cell}: expected one label for an image, found {classes[taken[found[0]]]} and "
                f"{text}; remove all rows of it but one"
            )
    return taken, {
        "rows without an image, left out": missing,
        "rows without a label, left out": unlabelled,
        "rows of an image that has one already": again,
    }


def in_test(image: str) -> bool:
    """True if a folder around the image is called test, testing, test_images ..."""
    return any(part.lower().startswith("test") for part in image.split(os.sep)[:-1])


def image_column_of(path, head, rows, names, images, wanted) -> int:
    """The column whose cells are names of images."""
    if wanted is not None:
        columns = [position(path, head, wanted, "--image-column")]
    else:
        columns = range(len(head))
    few = rows[:: -(-len(rows) // 1000)]

    def fitness(i: int) -> tuple:
        """A number, as of a row or an age, may be an image's by accident: an extension is a better sign."""
        found = [row[i] for row in few if names(row[i])]
        name = head[i].lower()
        usual = len(IMAGES) - IMAGES.index(name) if name in IMAGES else 0
        named = any(cell.lower().endswith(IMG_EXTENSIONS) for cell in found)
        return bool(found), named, usual, name != "", len(found)

    best = max(columns, key=fitness)
    if not fitness(best)[0]:
        raise ValueError(
            f"{path}: no row is an image: a row has {', '.join(few[0]):.80}, and an image is {images[0]}; "
            "name the column with --image-column, the folder of the images with --data-dir"
        )
    return best


def label_columns_of(path, head, rows, image, wanted, sample) -> list[int]:
    """The column of labels, or the columns of 0 and 1, one of each class."""
    if wanted is not None:
        names = [wanted] if wanted in head else wanted.split(",")
        return [position(path, head, name.strip(), "--label-column") for name in names]
    asked = read(sample)[0][1:] if sample else []
    others = [i for i in range(len(head)) if i != image]
    if asked and all(name in head for name in asked):
        return [head.index(name) for name in asked]
    if len(asked) > 1:  # a column for each class, whose names are the labels
        for i in others:
            if {row[i] for row in rows} == set(asked):
                return [i]
    lower = [name.lower() for name in head]
    usual = [lower.index(name) for name in LABELS if name in lower]
    if usual := [i for i in usual if i != image]:
        return usual[:1]
    if len(others) == 1:
        return others
    if others and all(bit(row[i]) is not None for row in rows for i in others):
        return others
    raise ValueError(
        f"{path}: which column has the labels? Name it with --label-column; there are {', '.join(head):.200}"
    )


def position(path, head: list[str], name: str, flag: str) -> int:
    if name not in head:
        raise ValueError(f"{flag} {name}: {path} has the columns {', '.join(head):.200}")
    return head.index(name)


def check_columns(path, head, rows, image: int, labels: list[int], names: Names) -> None:
    """Raise ValueError for columns that cannot be meant, and for a table without a row of names."""
    if image in labels:
        raise ValueError(
            f"{path}: {head[image]}: expected another column for labels than for images"
        )
    for i in (image, *labels):
        if head.count(head[i]) > 1:
            raise ValueError(
                f"{path}: {head.count(head[i])} columns are called {head[i]}; rename one"
            )
        if broken := next((row[i] for row in rows if "\n" in row[i]), None):
            raise ValueError(
                f"{path}: {head[i]}: expected no line breaks, found {broken!r:.60}; is a quote not closed?"
            )
    if head[image].lower() not in IMAGES and names(head[image]):
        raise ValueError(
            f"{path}: the first row is the image {head[image]}; add a row above it that names the columns"
        )


def bit(cell: str) -> int | None:
    """0 or 1, as pandas writes them; None for anything else. An empty cell is 0."""
    return {"": 0, "false": 0, "true": 1, "0": 0, "1": 1}.get(re.sub(r"\.0+$", "", cell.lower()))


def one_hot(path, head, rows, image, columns) -> list[str]:
    """For each row the name of the column that has 1; "" where all cells are empty."""
    texts, names = [], ", ".join(head[i] for i in columns)
    for row in rows:
        bits = [bit(row[i]) for i in columns]
        if not any(row[i] for i in columns):
            texts.append("")
        elif None in bits or sum(bits) != 1:
            raise ValueError(
                f"{path}: {row[image]}: expected one 1 and else 0 in {names:.80}; found "
                f"{', '.join(row[i] for i in columns):.80}"
            )
        else:
            texts.append(head[columns[bits.index(1)]])
    return texts


def class_names(path, column: str, texts: list[str]) -> tuple[list[str], list[str]]:
    """(labels, the different ones in order): whole numbers by size, others by letters.

    pandas writes 3 as 3.0 where a column has empty cells.
    """
    names = {text for text in texts if text}
    if names and all(re.fullmatch(r"-?\d+(\.0+)?", name) for name in names):
        texts = [text.split(".")[0] for text in texts]
        names = {name.split(".")[0] for name in names}
        classes = sorted(names, key=int)
    else:
        classes = sorted(names)
        if names and all(re.fullmatch(r"-?\d*\.?\d+(e-?\d+)?", name.lower()) for name in names):
            raise ValueError(
                f"{path}: {column}: expected classes, found fractions as {classes[0]}; name another column "
                "with --label-column"
            )
    if len(classes) < 2:
        raise ValueError(
            f"{path}: {column}: expected two classes or more, found {', '.join(classes) or 'none'}; name "
            "another column with --label-column"
        )
    return texts, classes
