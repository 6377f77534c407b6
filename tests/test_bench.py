"""The benches run and write their tables. The figures themselves are not tested."""

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
