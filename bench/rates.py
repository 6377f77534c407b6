"""Accuracy against the learning rate, of several comparisons side by side, and how wide each plateau is.

    python bench/rates.py assets/rates.png "the demo: assets/comparison.csv" "clothes: a.csv b.csv"

Each panel has a title and the tables that compare.py wrote. A plateau is the range of rates around the best
one whose accuracy is at most POINTS below it, with straight lines between the rates that were tried; "at
least" where it reaches the last of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine import pictures, report

POINTS = 0.02


def plateau(points: list[tuple[float, float]]) -> tuple[float, float, bool]:
    """(lowest rate, highest rate, whether the accuracy falls on both sides). points: (rate, accuracy)."""
    lrs, accuracies = zip(*points, strict=True)
    best = accuracies.index(max(accuracies))
    least, ends = accuracies[best] - POINTS, []
    for side in (range(best, -1, -1), range(best, len(points))):
        inside = best
        for i in side:
            if accuracies[i] < least:
                part = (accuracies[inside] - least) / (accuracies[inside] - accuracies[i])
                ends.append((lrs[inside] * (lrs[i] / lrs[inside]) ** part, True))
                break
            inside = i
        else:
            ends.append((lrs[inside], False))
    (low, falls), (high, falls_too) = ends
    return low, high, falls and falls_too


def main(picture: str, *panels: str) -> None:
    curves = {}
    for panel in panels:
        title, _, files = panel.rpartition(": ")
        curves[title] = report.trials([row for f in files.split() for row in report.read(Path(f))])
        print(f"\n{title}\n\n| what trains | rank | best rate | accuracy, % | plateau | ratio |")
        print("|---|---|---|---|---|---|")
        for (method, rank), points in curves[title].items():
            lr, accuracy = max(points, key=lambda point: point[1])
            low, high, closed = plateau(points)
            print(
                f"| {pictures.NAMES[method]} | {rank or ''} | {lr:g} | {100 * accuracy:.1f} "
                f"| {low:.2g} to {high:.2g} | {'' if closed else 'at least '}{high / low:.1f} |"
            )
    pictures.plot_rates(curves, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
