"""Tables of labels: CSV files whose first row names the columns, and the images that their rows mean."""

import codecs
import csv
import io
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

# Usual names, in any case: of tables, of columns of images, and of columns of labels. The first ones win.
TABLES = "train.csv labels.csv train_labels.csv trainlabels.csv".split()
SAMPLES = "sample_submission.csv samplesubmission.csv".split()
IMAGES = (
    "image_id id image id_code image_name file_name filename name file image_path filepath path"
).split()
LABELS = "label labels class target category category_id class_name class_id diagnosis".split()


class Ends:
    """Finds paths by what a table calls them: cat/7.jpg is "cat/7.jpg", "cat/7", "7.jpg" and "7".

    Where none is called so, letters may differ in their case, and a number may lack zeros in front, which
    Excel drops.
    """

    def __init__(self, paths: list[str]):
        self.exact, self.loose = {}, {}
        for number, path in enumerate(paths):
            parts = Path(unicodedata.normalize("NFC", path)).parts
            for n in range(1, len(parts) + 1):
                name = "/".join(parts[-n:])
                for end in {name, os.path.splitext(name)[0]}:
                    self.exact.setdefault(end, []).append(number)
                    if (other := loosened(end)) != end:
                        self.loose.setdefault(other, []).append(number)

    def __call__(self, name: str) -> list[int]:
        """The numbers of the paths that end in this name, or in its own end, if no path has all of it."""
        name = unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))
        while True:
            other = loosened(name)
            found = self.exact.get(name) or self.exact.get(other) or self.loose.get(other)
            if found or "/" not in name:
                return found or []
            name = name.split("/", 1)[1]


def loosened(name: str) -> str:
    return re.sub(r"^0+(?=\d+(\.\w+)?$)", "", name.lower())


def read(path: str | Path) -> tuple[list[str], list[list[str]]]:
    """(the names of the columns, the other rows) of a CSV file, each as long; blank rows are left out.

    Its separator is , ; | or a tab; its text is UTF-8 or UTF-16, with or without a byte order mark.
    Raises OSError, or ValueError with the line that is wrong.
    """
    content = Path(path).read_bytes()
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8 ({error}); save it as such") from None
    separator = max(",;\t|", key=text.split("\n", 1)[0].count)
    reader, head, rows = csv.reader(io.StringIO(text, ""), delimiter=separator), None, []
    try:
        for row in reader:
            row = [cell.strip() for cell in row]
            if not any(row):
                continue
            if head is None:
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
    if not rows:
        raise ValueError(f"{path}: expected a row of names and rows below it, found {head or []}")
    return head, rows


def choose(files: list[str], usual: list[str]) -> str | None:
    """Of the files with a usual name, the one that lies least deep; of those, the first by name."""
    ranked = [(path.count(os.sep), usual.index(name), path) for path, name in named(files, usual)]
    return min(ranked)[2] if ranked else None


def named(files: list[str], usual: list[str]) -> list[tuple[str, str]]:
    pairs = ((file, os.path.basename(file).lower()) for file in files)
    return [(file, name) for file, name in pairs if name in usual]


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
    sample: a sample_submission.csv, whose columns after the first have the label's name, or the classes'.
    image_column, label_column: the names of the columns; several of labels, separated by commas, are one-hot.
    Prints what was taken for what, and what was left out. Raises OSError or ValueError in one line.
    """
    head, rows = read(path)
    asked = read(sample)[0] if sample else []
    ends = Ends(images)
    column = image_column_of(path, head, rows, ends, images, image_column)
    columns = label_columns_of(path, head, rows, column, label_column, asked)
    if ends(head[column]):
        raise ValueError(
            f"{path}: the first row is the image {head[column]}; add a row above it that names the columns"
        )
    if len(columns) == 1:
        texts = [row[columns[0]] for row in rows]
        texts, classes = class_names(path, head[columns[0]], texts)
    else:
        texts = one_hot(path, head, rows, column, columns)
        classes = [head[i] for i in columns]
    number = {name: label for label, name in enumerate(classes)}
    taken, missing, unlabelled, twice = {}, [], [], []
    for row, text in zip(rows, texts, strict=True):
        name = row[column]
        if not text:
            unlabelled.append(name)
            continue
        found = ends(name)
        if len(found) > 1:  # a competition may count its test images from 1 again
            found = [i for i in found if not in_test(images[i])] or found
        if len(found) > 1:
            raise ValueError(
                f"{path}: {name}: expected one image, found {images[found[0]]} and {images[found[1]]}; "
                "name the folder of one of them with --data-dir and the table with --labels"
            )
        if not found:
            missing.append(name)
            continue
        label = taken.setdefault(found[0], number[text])
        if label != number[text]:
            raise ValueError(
                f"{path}: {name}: expected one label for an image, found {classes[label]} and {text}; "
                "remove all rows of it but one"
            )
        twice.append(name)
    if not taken:
        raise ValueError(f"{path}: no row has both an image and a label")
    shown = head[columns[0]] if len(columns) == 1 else f"{len(columns)} columns of 0 and 1"
    print(
        f"{path}: images by {head[column]}, labels by {shown}: {len(taken):,} images, {len(classes)} classes"
    )
    once = Counter(twice)
    for names, what in (
        (missing, "rows without an image, left out"),
        (unlabelled, "rows without a label, left out"),
        ([name for name in once if once[name] > 1], "images with the same row more than once"),
        ([image for i, image in enumerate(images) if i not in taken], "images without a label"),
    ):
        if names:
            listed = ", ".join(names[:3])
            print(f"{path}: {what}: {len(names):,} ({listed}{' ...' if names[3:] else ''})")
    order = sorted(taken)
    return order, np.array([taken[i] for i in order], np.int64), classes


def in_test(image: str) -> bool:
    """True if a folder around the image is called test, testing, test_images ..."""
    return any(part.lower().startswith("test") for part in Path(image).parts[:-1])


def image_column_of(path, head, rows, ends, images, wanted) -> int:
    """The column whose cells are names of images: of the usual ones, that which finds the most."""
    few, lower = rows[:: -(-len(rows) // 1000)], [name.lower() for name in head]
    usual = [lower.index(name) for name in IMAGES if name in lower]
    if wanted is not None:
        usual = every = [position(path, head, wanted, "--image-column")]
    else:
        every = range(len(head))
    for columns in (
        usual,
        every,
    ):  # an age may be an image's number too: the usual names come first
        hits = {i: sum(bool(ends(row[i])) for row in few) for i in columns}
        best = max(columns, key=hits.get, default=0)
        if hits.get(best):
            return best
    raise ValueError(
        f"{path}: no row is an image: a row has {', '.join(few[0]):.80}, and an image is {images[0]}; name "
        "the column with --image-column, the folder of the images with --data-dir"
    )


def label_columns_of(path, head, rows, image, wanted, asked) -> list[int]:
    """The column of labels, or the columns of 0 and 1, one of each class."""
    if wanted is not None:
        names = [wanted] if wanted in head else wanted.split(",")
        return [position(path, head, name.strip(), "--label-column") for name in names]
    others = [i for i in range(len(head)) if i != image]
    if asked[1:] and all(name in head for name in asked[1:]):
        return [head.index(name) for name in asked[1:]]
    if asked[2:]:  # a column for each class, whose names are the labels
        for i in others:
            if {row[i] for row in rows} == set(asked[1:]):
                return [i]
    lower = [name.lower() for name in head]
    if usual := [
        lower.index(name) for name in LABELS if name in lower and lower.index(name) != image
    ]:
        return usual[:1]
    if len(others) == 1:
        return others
    if others and all(is_zero_or_one(row[i]) for row in rows for i in others):
        return others
    raise ValueError(
        f"{path}: which column has the labels? Name it with --label-column; there are {', '.join(head):.200}"
    )


def position(path, head: list[str], name: str, flag: str) -> int:
    if name not in head:
        raise ValueError(f"{flag} {name}: {path} has the columns {', '.join(head):.200}")
    return head.index(name)


def is_zero_or_one(cell: str) -> bool:
    return cell in ("0", "1", "0.0", "1.0")


def one_hot(path, head, rows, image, columns) -> list[str]:
    """For each row the name of the column that has 1."""
    texts, names = [], ", ".join(head[i] for i in columns)
    for row in rows:
        ones = [head[i] for i in columns if row[i] in ("1", "1.0")]
        if len(ones) != 1 or not all(is_zero_or_one(row[i]) for i in columns):
            raise ValueError(
                f"{path}: {row[image]}: expected one 1 and else 0 in {names:.80}; found "
                f"{', '.join(row[i] for i in columns):.80}"
            )
        texts += ones
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
