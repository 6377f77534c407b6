"""The pictures and their numbers: counts of confused classes, norms and ranks of delta W."""

import copy
import io
import itertools
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import CASES, write_adapter
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import export
import spectra
import train
import vit
from engine import checkpoint, pictures
from engine.config import Config
from engine.run import Stopped

# Long names, names that mathtext would misread, and letters outside of ASCII.
NAMES = ["a name of sixty characters, of which a picture can show few ", r"$\frac$", "crème brûlée"]
NAMES += ["$5 and $6", "a_b^2", "w" * 60, "Straße", "{", "%", "\\"]
NAMES += [os.fsdecode(b"caf\xe9")]  # a folder's name that is not UTF-8
LONG = "runs/demo-lora-0-20260101-120000/" * 5 + NAMES[-1]


def plain_counts(file, split):
    """The confusion matrix, counted image by image."""
    model, info = vit.load_adapter(file)
    counts = torch.zeros(2 * [len(info["classes"])], dtype=torch.int32)
    for images, labels in data.batches(split, 1, info["preprocessing"], workers=0):
        with torch.no_grad():
            counts[labels.item(), model(images)[0].argmax()] += 1
    return counts


def moved(model):
    """||delta W|| / ||W|| of each adapted layer, from its merged weight."""
    layers = [module for module in model.modules() if hasattr(module, "delta_weight")]
    pairs = [(layer.linear.weight, copy.deepcopy(layer).merge().weight) for layer in layers]
    return [((after - W).norm() / W.norm()).item() for W, after in pairs]


@pytest.fixture
def three_epochs(tmp_path, monkeypatch):
    """(folder, norms after each epoch) of a run whose first epoch is the best; stopped in the second and
    resumed."""
    evaluate, step = train.evaluate, train.train_step
    accuracies, norms, steps = iter([0.9, 0.2, 0.3]), [], []

    def evaluated(model, *arguments):
        loss, _ = evaluate(model, *arguments)
        norms.append(moved(model))
        return loss, next(accuracies)

    def stopped_step(*arguments):
        steps.append(1)
        if len(steps) == 8:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluated)
    monkeypatch.setattr(train, "train_step", stopped_step)
    settings = {"limit": 48, "epochs": 3, "batch_size": 8, "workers": 0, "adapter": "loha"}
    config = Config(out=tmp_path / "run", resume=True, **settings)
    with pytest.raises(Stopped):
        train.train(config)
    assert train.train(config)["best_epoch"] == 1
    return tmp_path / "run", norms


def test_the_confusions_are_those_of_the_best_epoch_after_a_resume(three_epochs):
    folder, _ = three_epochs
    counts = checkpoint.read_resume(folder / "last.pt")["extra"]["confusion"]
    wanted = plain_counts(folder / "adapter.safetensors", data.load("demo", limit=48).val)
    assert torch.equal(counts, wanted)
    assert wanted.sum() == 48 and wanted.diagonal().sum() < 40, "some images are confused"


def test_tensorboard_has_the_norms_of_each_epoch_and_both_pictures(three_epochs):
    folder, norms = three_epochs
    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()  # 0 means all
    histograms = events.Histograms("weights/relative_update")
    assert [event.step for event in histograms] == [6, 12, 18]
    for event, wanted in zip(histograms, norms, strict=True):
        histogram, wanted = event.histogram_value, np.array(wanted)
        assert histogram.num == 36
        assert (histogram.min, histogram.max) == pytest.approx(
            (wanted.min(), wanted.max()), rel=1e-4
        )
        sums = (wanted.sum(), (wanted**2).sum())
        assert (histogram.sum, histogram.sum_squares) == pytest.approx(sums, rel=1e-4)
    assert sum(norms[2]) > sum(norms[0]) > 0, "equal epochs would not show a wrong order"
    for name in ("predictions", "confusion"):
        (event,) = events.Images(f"val/{name}")
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        drawn = 255 * imread(folder / f"{name}.png")
        assert shown.shape == drawn.shape and np.abs(shown - drawn).max() <= 1


def test_counts_add_up_over_batches_without_padding():
    logits = torch.eye(3)[[0, 1, 2, 2, 1, 0]]
    labels = torch.tensor([0, 1, 1, 2, -100, -100])  # padding, as in torchrun's processes
    batches = list(zip(logits.split(4), labels.split(4), strict=True))
    counts = torch.full((3, 3), 10, dtype=torch.int32)
    loss = train.evaluate(torch.nn.Identity(), batches, counts)
    assert counts.tolist() == [[11, 10, 10], [10, 11, 11], [10, 10, 11]]
    assert loss == train.evaluate(torch.nn.Identity(), batches)


@pytest.fixture
def drawn(monkeypatch):
    """The list of all figures saved from now on."""
    figures, save = [], Figure.savefig

    def savefig(figure, *arguments, **settings):
        figures.append(figure)
        save(figure, *arguments, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def assert_nothing_is_cut_off(figure):
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert box.x0 >= -0.02 and box.y0 >= -0.02, box
    assert box.x1 <= width + 0.02 and box.y1 <= height + 0.02, (box, width, height)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.mark.parametrize("title", ["demo", LONG], ids=["short", "long"])
@pytest.mark.parametrize("n", [1, 2, 10, 12, 13, 40])
def test_the_text_of_confusions_is_inside_the_picture(n, title, drawn, tmp_path):
    counts = torch.randint(100, (n, n), generator=torch.Generator().manual_seed(n))
    names = [NAMES[i % len(NAMES)] for i in range(n)]
    pictures.plot_confusion(counts, names, tmp_path / "x.png", title)
    assert_nothing_is_cut_off(drawn[0])
    assert (
        pictures.printable(title) in texts(drawn[0]) and (tmp_path / "x.png").stat().st_size > 5000
    )


def test_the_text_of_predictions_and_curves_is_inside_the_picture(drawn, tmp_path):
    for n in (1, len(NAMES)):
        images, logits = torch.rand(n, 3, 8, 8), 9 * torch.eye(len(NAMES))[:n]
        labels = torch.arange(n).roll(1)
        pictures.plot_predictions(images, logits, labels, NAMES, tmp_path / "x.png", LONG)
    (tmp_path / "metrics.csv").write_text(
        "epoch,train_loss,val_loss,val_accuracy\n1,9,8,0.1\n2,7,6,1.0\n"
    )
    pictures.plot_curves(tmp_path / "metrics.csv", tmp_path / "x.png", LONG)
    assert len(drawn) == 3
    for figure in drawn:
        assert_nothing_is_cut_off(figure)


def test_a_matrix_has_the_shares_of_each_row_without_absent_classes(drawn, tmp_path):
    counts = torch.tensor([[7, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2000]])
    counts[3, 0] = 1
    pictures.plot_confusion(counts, list("abcd"), tmp_path / "x.png", "x")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "d"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "d"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "88", (1, 0): "12", (0, 2): "<.1", (2, 2): "100"}


def test_bars_show_the_most_confused_pairs_in_order(drawn, tmp_path):
    counts = 50 * torch.eye(20, dtype=torch.int32)
    for i in range(19):
        counts[i, i + 1] = i + 1
    counts[0, 5] = 60
    names = [f"n{i}" for i in range(20)]
    pictures.plot_confusion(counts, names, tmp_path / "x.png", "x")
    axes = drawn[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    wanted = ["n0 → n5", *(f"n{i} → n{i + 1}" for i in range(18, 4, -1))]
    assert labels == wanted
    assert [bar.get_width() for bar in axes.patches] == [60, *range(19, 5, -1)]
    assert axes.texts[0].get_text() == "60 of 111, 54 %"
    assert axes.yaxis.get_inverted(), "the most confused pair is on top"
    pictures.plot_confusion(counts.diag().diag(), names, tmp_path / "x.png", "x")
    assert "no confusions" in texts(drawn[1])


# For a layer of 128 x 128, LoKr's W1 is 8 x 8 and W2 16 x 16, and rank 2 factors W2. With factor 4 they are
# 4 x 4 and 32 x 32, and rank 30 leaves W2 whole.
WANTED = {
    "lora": ("LoRA rank 3", 2 * 3 * 128, 3),
    "loha": ("LoHa rank 2", 4 * 2 * 128, 2 * 2),
    "lokr": ("LoKr rank 2, 8 x 8 blocks", 8 * 8 + 2 * 2 * 16, 8 * 2),
    "lokr-whole": ("LoKr rank 30, 4 x 4 blocks", 4 * 4 + 32 * 32, 4 * 32),
    "lokr-both": ("LoKr rank 3, 8 x 8 blocks", 2 * 3 * 8 + 2 * 3 * 16, 3 * 3),
}
LAYER = "encoder.layers.encoder_layer_1.self_attention.query"


def test_ranks_and_parameters_of_delta_w_are_the_theory_s(drawn, tmp_path, monkeypatch, capsys):
    files, norms = [], []
    for case in WANTED:
        changes = {"lokr-whole": {"factor": 4}, "lokr-both": {"rank": 3}}.get(case, {})
        monkeypatch.setitem(CASES, case, CASES[case] | {"targets": "query"} | changes)
        files.append(str(tmp_path / f"{case}.safetensors"))
        model = write_adapter(files[-1], case)
        norms.append(moved(model)[1])
    out = tmp_path / "delta.png"
    assert spectra.main([*files, "--layer", LAYER, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, file, norm, (label, numbers, rank) in zip(
        lines, files, norms, WANTED.values(), strict=True
    ):
        assert line == (
            f"{file}: {label}, {LAYER}: {numbers:,} numbers, rank of delta W {rank}, "
            f"||delta W|| / ||W|| {norm:.3f}"
        )
        assert f"{label}\n{numbers:,} numbers, rank of delta W {rank}" in texts(drawn[0])
        assert f"rank {rank}" in texts(drawn[0])
    assert_nothing_is_cut_off(drawn[0])
    titles = [axes.title.get_window_extent() for axes in drawn[0].axes[:5]]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(titles))
    curves = [line.get_ydata() for line in drawn[0].axes[-1].lines]
    for values, (_, _, rank) in zip(curves, WANTED.values(), strict=True):
        assert len(values) == rank and values[0] == 1 and list(values) == sorted(values)[::-1]


def test_blocks_are_multiples_of_the_strongest_one():
    W1, W2 = torch.tensor([[1.0, -4.0, 0.0], [2.0, 3.0, 1.0]]), torch.randn(4, 5)
    multiples = spectra.multiples(torch.kron(W1, W2), (2, 3))
    torch.testing.assert_close(multiples, W1 / -4.0)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(figure, file, **_):
        Path(file).write_bytes(b"half of a picture")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        pictures.plot_confusion(torch.eye(2), ["a", "b"], path, "title")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_most_changed_layer_is_drawn_and_equal_labels_get_file_names(drawn, tmp_path, capsys):
    write_adapter(tmp_path / "b.safetensors", "loha")  # with other numbers
    model = write_adapter(tmp_path / "a.safetensors", "loha")
    names = [name for name, module in model.named_modules() if hasattr(module, "delta_weight")]
    layer = names[int(np.argmax(moved(model)))]
    files = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert spectra.main([*files, "--out", str(tmp_path / "x.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [f"LoHa rank 2, {layer}:" in line for line in lines] == [True, True], lines
    assert f"delta W of {layer}" in texts(drawn[0])
    assert {text[:15] for text in texts(drawn[0])} >= {"a: LoHa rank 2\n", "b: LoHa rank 2\n"}
    for name, file in zip(("lr0.1-seed0", "lr0.1-seed1"), files, strict=True):  # runs of compare.py
        (tmp_path / name).mkdir()
        os.rename(file, tmp_path / name / "adapter.safetensors")
    runs = [str(tmp_path / "lr0.1-seed0"), str(tmp_path / "lr0.1-seed1")]
    assert spectra.main([*runs, "--out", str(tmp_path / "x.png")]) == 0
    labels = {text.split(":")[0] for text in texts(drawn[-1])}
    assert labels >= {"lr0.1-seed0", "lr0.1-seed1"}


def test_a_peft_folder_has_the_spectrum_of_its_adapter_file(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_adapter("a.safetensors", "lokr")
    export.to_peft("a.safetensors", "folder")
    assert spectra.main(["a.safetensors", "folder"]) == 0
    ours, theirs = capsys.readouterr().out.splitlines()[-2:]
    assert ours.replace("a.safetensors", "folder") == theirs


@pytest.mark.filterwarnings("error::RuntimeWarning")  # as for a division by zero
def test_an_adapter_that_has_learnt_nothing_is_drawn(drawn, tmp_path, capsys):
    train.main(
        f"--limit 10 --epochs 1 --lr 1e-30 --workers 0 --weight-decay 0 --out {tmp_path}/run".split()
    )
    tensors, info = checkpoint.read_adapter(tmp_path / "run")
    tensors = {name: t * 0 if name.endswith("lora_B") else t for name, t in tensors.items()}
    checkpoint.write_adapter(tmp_path / "zero.safetensors", tensors, info)
    zero = str(tmp_path / "zero.safetensors")
    assert spectra.main([zero, "--out", str(tmp_path / "x.png")]) == 0
    assert "rank of delta W 0, ||delta W|| / ||W|| 0.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("head.safetensors", "adapter: expected one of lora, loha, lokr, found 'head'"),
        ("lora.safetensors head.safetensors", "head.safetensors: adapter: expected one of lora"),
        (
            "lora.safetensors --layer query",
            f"--layer query: not adapted in lora.safetensors; expected one of: .*, {LAYER}, ",
        ),
        (f"lora.safetensors lokr.safetensors --layer {LAYER}", "not adapted in lokr.safetensors; "),
        ("nothing", "nothing: no such adapter file"),
        ("notes.txt", "notes.txt: not a file of tensors"),
        ("lora.safetensors --out x.doc", "--out x.doc: expected a name that ends in"),
        ("lora.safetensors --out no/x.png", "--out no/x.png: no is not a folder"),
        ("lora.safetensors --norms no/x.png", "--norms no/x.png: no is not a folder"),
        ("lora.safetensors --norms ./delta.png", "--norms ./delta.png: --out is the same file"),
        ("lora.safetensors --weights no.pth", "no.pth"),
        ("", "required: adapters; see --help"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CASES["lokr"], "targets", "mlp.0")
    for case in ("lora", "lokr", "head"):
        write_adapter(f"{case}.safetensors", case)
    (tmp_path / "notes.txt").write_text("not an adapter")
    assert spectra.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("spectra.py: ") and re.search(message, error)
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_norms_of_every_layer_are_drawn(drawn, tmp_path, capsys):
    files, wanted = [], []
    for case in ("lora", "lokr"):
        files.append(str(tmp_path / f"{case}.safetensors"))
        model = write_adapter(files[-1], case)
        names = [name for name, module in model.named_modules() if hasattr(module, "delta_weight")]
        wanted.append(dict(zip(names, moved(model), strict=True)))
    flags = ["--out", str(tmp_path / "x.png"), "--norms", str(tmp_path / "norms.png")]
    assert spectra.main([*files, *flags]) == 0
    figure = drawn[-1]
    assert [axes.get_title() for axes in figure.axes] == ["LoRA rank 3", "LoKr rank 2"]
    for axes, norms in zip(figure.axes, wanted, strict=True):
        ends = {"query": "self_attention.query", "key": "self_attention.key"}
        ends |= {"value": "self_attention.value", "out": "self_attention.out"}
        ends |= {"MLP, first": "mlp.0", "MLP, second": "mlp.3"}
        found = {
            f"encoder.layers.encoder_layer_{round(block) - 1}.{ends[line.get_label()]}": norm
            for line in axes.lines
            for block, norm in line.get_xydata()
        }
        assert found == pytest.approx(norms)
    assert_nothing_is_cut_off(figure)


def test_spectra_as_a_user_runs_it(run_script, tmp_path):
    write_adapter(tmp_path / "a.safetensors", "lokr")
    process = run_script("spectra.py", "a.safetensors")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("a.safetensors: LoKr rank 2, ") and process.stderr == ""
    assert min(Image.open(tmp_path / "delta.png").size) > 600
