"""A submission to a competition: the answers for its images, in the form of its sample_submission.csv."""

from pathlib import Path

import torch

from engine.pictures import shorten
from engine.tables import Names, read


def submission(
    sample: str,
    found: dict[str, torch.Tensor],
    classes: list[str],
    probabilities: bool = False,
) -> tuple[list[list], list[str]]:
    """(rows of a submission like the sample, ids without an answer, whose rows stay as they are).

    The first column has the ids: names of files, with or without extension, or paths that end so. The others
    ask for probabilities if they are names of classes, or one column of numbers with a point, else for the
    class: for as many classes as a cell of the sample has, separated by spaces.

    found: the probabilities (classes,) of each file.
    probabilities: a single column asks for one, whatever its cells are.
    Raises ValueError if no id is a file, if an id is two files, or if columns cannot be filled.
    """
    if not found:
        raise ValueError(f"{sample}: no image could be read, so there is nothing to write")
    head, rows = read(sample)
    if len(head) < 2 or not rows:
        raise ValueError(f"{sample}: expected rows of ids and of answers, found {head}")
    files, names = [*found], Names([*found])
    fill, missing = filler(sample, head, rows, classes, probabilities), []
    for row in rows:
        named = [files[i] for i in names(row[0])]
        if len(named) > 1:
            raise ValueError(
                f"{sample}: {row[0]}: expected one image, found {', '.join(named[:3])}"
            )
        if named:
            row[1:] = fill(found[named[0]])
        else:
            missing.append(row[0])
    if len(missing) == len(rows):
        raise ValueError(
            f"{sample}: expected ids of the images, as {Path(files[0]).name}; found {missing[0]}"
        )
    return [head, *rows], missing


def filler(
    sample: str, head: list[str], rows: list[list[str]], classes: list[str], probabilities: bool
):
    """A function from probabilities (classes,) to the cells after the id."""
    if len(head) > 2:
        if sorted(head[1:]) != sorted(classes):
            raise ValueError(
                f"{sample}: expected a column for each class ({shorten(', '.join(classes), 60)}), found "
                f"{shorten(', '.join(head[1:]), 60)}"
            )
        order = [classes.index(name) for name in head[1:]]
        return lambda p: [f"{p[i]:.6f}" for i in order]
    if probabilities or all(is_number(row[1]) and "." in row[1] for row in rows):
        names = [head[1], "1", "True", "true", "yes"]
        if len(classes) != 2 and head[1] not in classes:
            raise ValueError(
                f"{sample}: {head[1]}: asks for one probability, which {len(classes)} classes do not have"
            )
        positive = next((classes.index(name) for name in names if name in classes), 1)
        print(f"{sample}: {head[1]}: the probability of {classes[positive]}")
        return lambda p: [f"{p[positive]:.6f}"]
    most = max(1, min(len(classes), max(len(row[1].split()) for row in rows)))
    one = most == 1 or any(" " in name for name in classes)
    return lambda p: [" ".join(classes[i] for i in p.topk(1 if one else most).indices)]


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
