"""Accuracy against the learning rate, of several comparisons side by side, and how wide each plateau is.

    python bench/rates.py assets/rates.png "the demo=assets/comparison.csv" "clothes=a.csv,b.csv"

Each panel has a title and the tables that compare.py wrote. A plateau is the range of rates whose accuracy is
at most POINTS below the best, with straight lines between the rates that were tried; "at least" where it
reaches the last of them.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine import pictures, report

POINTS = 0.02


def read(files: str) -> list[dict]:
    """The trials in the tables."""
    rows = [row for file in files.split(",") for row in report.read(Path(file))]
    numbers = ("lr", "val_accuracy")
    return [row | {key: float(row[key]) for key in numbers} for row in report.trials(rows)]


def plateau(points: list[tuple[float, float]]) -> tuple[float, float, bool]:
    """(lowest rate, highest rate, whether the accuracy falls on both sides). points: (rate, accuracy)."""
    points = sorted((math.log(lr), accuracy) for lr, accuracy in points)
    least = max(accuracy for _, accuracy in points) - POINTS
    inside = [lr for lr, accuracy in points if accuracy >= least]
    crossings = [
        a[0] + (least - a[1]) / (b[1] - a[1]) * (b[0] - a[0])
        for a, b in pairwise(points)
        if (a[1] < least) != (b[1] < least)
    ]
    ends = [*inside, *crossings]
    closed = points[0][1] < least and points[-1][1] < least
    return math.exp(min(ends)), math.exp(max(ends)), closed


def main(picture: str, *panels: str) -> None:
    panels = {title: read(files) for title, _, files in (panel.partition("=") for panel in panels)}
    for title, trials in panels.items():
        print(f"\n{title}\n\n| what trains | rank | best rate | accuracy, % | plateau | ratio |")
        print("|---|---|---|---|---|---|")
        for method, rank in {(row["method"], row["rank"]): None for row in trials}:
            points = [
                (r["lr"], r["val_accuracy"])
                for r in trials
                if (r["method"], r["rank"]) == (method, rank)
            ]
            best = max(points, key=lambda point: point[1])
            low, high, closed = plateau(points)
            ratio = f"{'' if closed else 'at least '}{high / low:.1f}"
            print(
                f"| {pictures.NAMES[method]} | {rank or ''} | {best[0]:g} | {100 * best[1]:.1f} "
                f"| {low:.2g} to {high:.2g} | {ratio} |"
            )
    pictures.plot_rates(panels, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
