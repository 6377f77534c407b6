"""The benches run and write their tables. The figures themselves are not tested."""

import csv
import re
import subprocess
import sys

import pytest
from conftest import LIMIT, ROOT
from PIL import Image

BENCHES = {  # flags, and the least number of rows with figures
    "speed": ("--blocks 1 --rounds 1 --ranks 2 --batches 1 --targets query,value", 11),
    "data": ("--rounds 1 --epochs 2 --images 80 --workers 0 --device cpu", 4),
    "end_to_end": ("--kinds lora --rounds 1 --steps 2 --batch 2 --workers 0", 1),
    "attention": ("--rounds 2", 4),
    "recompute": ("--models vit_mini --batch 2 --rounds 1", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_a_bench_writes_a_figure_for_every_row(name, tmp_path):
    flags, rows = BENCHES[name]
    out = tmp_path / f"{name}.md"
    command = [
        sys.executable,
        str(ROOT / "bench" / f"{name}.py"),
        *flags.split(),
        "--out",
        str(out),
    ]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    table = [line for line in out.read_text().splitlines() if re.match(r"\|.*\d", line)]
    figures = [
        [float(cell.replace(",", "")) for cell in re.findall(r"[\d,.]*\d", line)] for line in table
    ]
    assert len([line for line in table if len(line.split("|")) > 4]) >= rows
    assert all(figure > 0 for line in figures for figure in line), table
    if name == "speed":
        assert Image.open(out.with_suffix(".png")).size[0] > 300


def test_rates_says_where_each_plateau_begins_and_ends(tmp_path):
    """Accuracies on straight lines over log(rate): LoRA's falls on both sides, LoKr's does not."""
    rows = [("lora", 2, 0.001, 0.8), ("lora", 2, 0.01, 0.9), ("lora", 2, 0.1, 0.85)]
    rows += [("lora", 2, 1.0, ""), ("lokr", 2, 0.01, 0.7), ("lokr", 2, 0.1, 0.8)]  # "": it diverged
    columns = "method rank lr val_accuracy dropout seed trial".split()
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *((*row, 0, 0, 1) for row in rows), (*rows[0], 0, 1, "")])
    command = [sys.executable, str(ROOT / "bench" / "rates.py"), "rates.png", "here=a.csv"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    # 2 points below 90 % lie 4/5 up from 0.001 to 0.01, and 2/5 down from 0.01 to 0.1.
    low, high = 0.001 * 10**0.8, 0.01 * 10**0.4
    lora = f"| LoRA | 2 | 0.01 | 90.0 | {low:.2g} to {high:.2g} | {high / low:.1f} |"
    lokr = f"| LoKr | 2 | 0.1 | 80.0 | {0.1 * 10**-0.2:.2g} to 0.1 | at least {10**0.2:.1f} |"
    assert process.stdout.splitlines()[-2:] == [lora, lokr]
    with Image.open(tmp_path / "rates.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    found = {colour for _, colour in colours}
    assert {(0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)} <= found and (0xD5, 0x5E, 0x00) not in found
