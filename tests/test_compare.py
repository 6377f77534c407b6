"""compare.py: its table against its rows, its rows against the runs, and how it stops and resumes."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIMIT, ROOT, wait_until
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trees import pets

import compare
import train
from engine import checkpoint, pictures, report
from engine.config import parse
from engine.run import Run
from engine.weights import EMBEDDED

TINY = "--limit 40 --epochs 1 --batch-size 8 --image-size 14 --workers 0 --device cpu".split()
# For the embedded trunk (6 blocks, widths 128 and 512) at rank 2, with the head's 1,290.
TRAINABLE = {
    "head": 1_290,
    "lora": 1_290 + 6 * 2 * (4 * (128 + 128) + 2 * (128 + 512)),
    "loha": 1_290 + 6 * 2 * 2 * (4 * (128 + 128) + 2 * (128 + 512)),
    "lokr": 1_290 + 6 * (4 * (8 * 8 + 2 * (16 + 16)) + 2 * (16 * 8 + 2 * (32 + 16))),
    "full": 1_210_890,
}


def launch(self, flags, log):
    """Comparison.launch in this process: a new one takes seconds to start."""
    with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        return train.main(flags)


def draw_blank(run, *_):
    """pictures.draw_run without its pictures, which take longer than the training."""
    for name in ("confusion", "predictions"):
        Image.new("RGB", (1, 1)).save(run.folder / f"{name}.png")


@pytest.fixture(scope="module", autouse=True)
def in_process():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Comparison, "launch", launch)
        patch.setattr(pictures, "draw_run", draw_blank)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a comparison of all five methods with two seeds and one dropout."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = ["--ranks", "2", "--seeds", "2", "--dropouts", "0.5", "--out", str(out)]
    assert compare.main([*flags, *TINY]) == 0
    return out


def read_rows(out):
    with open(out / "comparison.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_tables(out):
    """The tables of comparison.md: the cells of each line, by the table's heading."""
    tables, heading = {}, ""
    for line in (out / "comparison.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        elif line.startswith("| "):
            tables.setdefault(heading, []).append([cell.strip() for cell in line[1:-1].split("|")])
    return {name: lines[2:] for name, lines in tables.items()}


def assert_is(cell, values):
    """The cell is the mean ± standard deviation of the values, to a tenth of a percent."""
    wanted = [100 * np.mean(values), 100 * np.std(values, ddof=1)]
    assert [float(part) for part in cell.split(" ± ")] == pytest.approx(wanted, abs=0.0501)


def test_a_row_has_the_results_of_its_run(whole):
    rows = read_rows(whole)
    for row in rows:
        folder = whole / row["run"]
        last = checkpoint.read_resume(folder / "last.pt")
        for key in ("val_accuracy", "val_loss", "images_per_second", "trainable", "total"):
            assert float(row[key]) == last["result"][key], (row["run"], key)
        with open(folder / "metrics.csv", newline="") as file:
            values = [line["val_accuracy"] for line in csv.DictReader(file) if line["val_accuracy"]]
        assert float(row["val_accuracy"]) == max(map(float, values))
        _, info = checkpoint.read_adapter(folder)
        assert info["adapter"] == row["method"] and str(info["seed"]) == row["seed"]
        assert last["config"]["lr"] == float(row["lr"])
        assert last["config"]["adapter_dropout"] == float(row["dropout"])
        assert int(row["adapter_bytes"]) == (folder / "adapter.safetensors").stat().st_size
        assert int(row["trainable"]) == TRAINABLE[row["method"]]
        assert info["rank"] == (int(row["rank"]) if row["rank"] else 4)
    runs = {path.parent.name for path in whole.glob("*/last.pt")}
    assert sorted(runs) == sorted(row["run"] for row in rows)  # each run once


def test_only_the_best_on_validation_is_trained_with_all_seeds_and_tested(whole):
    rows = read_rows(whole)
    finals = [row for row in rows if row["final"]]
    for method in TRAINABLE:
        tried = [row for row in rows if row["method"] == method and row["trial"]]
        assert 3 <= len(tried) <= 7 and {row["seed"] for row in tried} == {"0"}
        best = max(tried, key=lambda row: (float(row["val_accuracy"]), -float(row["val_loss"])))
        final = [row for row in finals if row["method"] == method]
        assert {row["lr"] for row in final} == {best["lr"]}
        runs = {(float(row["dropout"]), row["seed"]) for row in final}
        dropouts = (0.0, 0.5) if method in ("lora", "loha", "lokr") else (0.0,)
        assert len(final) == len(runs) == 2 * len(dropouts)
        assert runs == {(dropout, seed) for dropout in dropouts for seed in "01"}
    for row in rows:
        result = checkpoint.read_resume(whole / row["run"] / "last.pt")["result"]
        assert ("test_accuracy" in result) == bool(row["final"]) == bool(row["test_accuracy"])
        if row["final"]:
            assert float(row["test_accuracy"]) == result["test_accuracy"]


def test_the_table_follows_from_the_rows(whole):
    rows, tables = read_rows(whole), read_tables(whole)
    names = {"LoRA": "lora", "LoHa": "loha", "LoKr": "lokr"}
    names |= {"linear probe": "head", "full fine-tuning": "full"}

    def final(name, dropout, key):
        wanted = (names[name], dropout, "1")
        keys = [(row["method"], float(row["dropout"]), row["final"]) for row in rows]
        return [float(row[key]) for row, found in zip(rows, keys, strict=True) if found == wanted]

    assert {line[0] for line in tables["Comparison"]} == set(names)
    edges = 0
    for name, rank, trainable, size, lr, val, test, speed, kept in tables["Comparison"]:
        assert rank == ("2" if name.startswith("Lo") else "")
        assert trainable == f"{TRAINABLE[names[name]]:,}"
        assert size == f"{np.mean(final(name, 0, 'adapter_bytes')) / 1024:,.0f}"
        assert {float(lr.rstrip("\\*"))} == set(final(name, 0, "lr"))
        assert_is(val, final(name, 0, "val_accuracy"))
        assert_is(test, final(name, 0, "test_accuracy"))
        assert speed == f"{np.mean(final(name, 0, 'images_per_second')):,.0f}"
        assert kept == f"{final(name, 0, 'kept_bytes')[0] / 2**20:,.2f}"
        tried = [float(r["lr"]) for r in rows if r["method"] == names[name] and r["trial"]]
        at_edge = float(lr.rstrip("\\*")) in (min(tried), max(tried))
        assert lr.endswith("\\*") == at_edge and (not at_edge or len(tried) == 7)
        edges += at_edge
    text = (whole / "comparison.md").read_text(encoding="utf-8")
    assert ("smallest or largest rate tried was the best" in text) == bool(edges)
    assert len(tables["Dropout of the adapters"]) == 6
    for name, _, dropout, val, test in tables["Dropout of the adapters"]:
        assert_is(val, final(name, float(dropout), "val_accuracy"))
        assert_is(test, final(name, float(dropout), "test_accuracy"))
    assert len(tables["The learning rates that were tried, with seed 0"]) == sum(
        row["trial"] == "1" for row in rows
    )
    assert "40 training, 40 validation, 40 test images of 10 classes" in text
    for name, width in (("comparison.png", 1000), ("rates.png", 900)):
        with Image.open(whole / name) as picture:
            assert picture.size[0] > width and len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_stopped_comparison_resumes(whole, tmp_path, monkeypatch, capsys):
    """After ctrl-C in the third run, the first two are not trained again."""
    flags = ["--methods", "head", "--ranks", "2", "--seeds", "2", "--dropouts", ""]
    flags += ["--out", str(tmp_path / "out"), *TINY]
    started = []

    def stopped(self, flags, log):
        started.append(log.stem)
        if len(started) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: self.stopping)
            return 143
        return launch(self, flags, log)

    monkeypatch.setattr(compare.Comparison, "launch", stopped)
    assert compare.main(flags) == 130
    for number in (signal.SIGINT, signal.SIGTERM):  # the handlers are restored
        assert signal.getsignal(number) is not compare.stop
    (line,) = capsys.readouterr().err.strip().splitlines()
    message = "finished work is saved: resume with the same command"
    assert line == f"compare.py: stopped by SIGINT; {message}"
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/*/last.pt")}
    assert len(done) == 2 and not (tmp_path / "out" / "comparison.csv").exists()
    assert compare.main(flags) == 0
    chosen = {row["run"] for row in read_rows(tmp_path / "out") if row["final"]}
    for path, time in done.items():  # only a chosen run is tested later
        assert (path.stat().st_mtime_ns == time) == (path.parent.name not in chosen), path
    assert set(started[:2]).isdisjoint(set(started[3:]) - chosen)

    def comparable(rows):
        rows = [row for row in rows if row["method"] == "head"]
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]

    assert comparable(read_rows(tmp_path / "out")) == comparable(read_rows(whole))
    monkeypatch.setattr(compare.Comparison, "launch", None)  # no run is left to start
    before = (tmp_path / "out" / "comparison.csv").read_bytes()
    assert compare.main(flags) == 0
    assert (tmp_path / "out" / "comparison.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ctrl_c_reaches_the_runs_and_they_save(tmp_path, start):
    """The command itself, with two parallel runs that would take half an hour."""
    flags = "--methods head,lora --ranks 2 --seeds 1 --jobs 2 --out out --limit 400 --epochs 5000"
    command = [sys.executable, ROOT / "compare.py", *flags.split(), "--image-size", "14"]
    runs = [tmp_path / "out" / f"{name}-seed0" for name in ("head-lr0.04", "lora-rank2-lr0.002")]
    logs = [run.with_name(run.name + ".log") for run in runs]
    process = start(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    wait_until(
        lambda: all(log.exists() and "epoch 2/" in log.read_text() for log in logs),
        lambda: process.poll() is None,
    )
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert re.fullmatch(r"compare.py: stopped by SIGINT; .*resume with the same command\n", error)
    for run, log in zip(runs, logs, strict=True):
        step = checkpoint.read_resume(run / "last.pt")["step"]
        words = f"stopped by SIGTERM after step {step}; last.pt is at step {step}; resume with"
        assert step > 0 and words in log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("accuracies", "tried"),
    [
        ({1: 0.9}, [0.4, 1, 2.5]),  # the centre is best
        ({0.4: 0.9, 0.16: 0.8}, [0.4, 1, 2.5, 0.16]),
        # at most seven
        (
            {0.4: 0.9, 0.16: 0.95, 0.064: 0.97, 0.0256: 0.98, 0.01024: 0.99},
            [0.4, 1, 2.5, 0.16, 0.064, 0.0256, 0.01024],
        ),
        ({2.5: 0.9, 6.25: 0.95, 15.625: 0.9}, [0.4, 1, 2.5, 6.25, 15.625]),
        ({0.4: 0.9, 2.5: 0.9}, [0.4, 1, 2.5, 0.16]),  # the smaller of two equals
    ],
)
def test_the_search_leaves_the_grid_only_at_its_edge(accuracies, tried):
    scores = {}
    while (lr := compare.next_lr(scores, 1.0)) is not None:
        scores[lr] = (accuracies.get(lr, 0.5), -1.0)
    assert list(scores) == tried
    assert compare.best_lr(scores) == max(sorted(accuracies), key=accuracies.get)


def test_rates_png_of_runs_that_recognise_nothing(tmp_path):
    rows = [{"method": "lora", "rank": 2, "lr": 0.1, "trial": 1, "val_accuracy": 0.0}]
    rows += [{"method": "lora", "rank": 2, "lr": 0.01, "trial": 1}, {"method": "head", "final": 1}]
    found = report.trials(rows)
    assert found == {("lora", 2): [(0.01, 0.0), (0.1, 0.0)]}
    for curves in (found, {}):
        pictures.plot_rates({"nothing": curves}, tmp_path / "rates.png")
        assert Image.open(tmp_path / "rates.png").size[0] > 900


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("", "vit_mini, weights embedded"),
        ("--recipe tiny-imagenet-lora --model vit_l_16", "vit_l_16, weights imagenet1k"),
        ("--recipe food101-lora", "vit_b_16, weights in21k"),
        ("--weights some/where/vit_s14", "vit_s14"),
    ],
)
def test_the_trunk_has_a_name(flags, name):
    assert report.trunk(parse(flags.split())) == name


@pytest.mark.parametrize(
    ("accuracy", "loss", "wanted"),
    [
        (1.0, 0.0, (1, 0)),
        ("1.0", "0.0", (1, 0)),
        ("0.5", "2.0", (0.5, -2)),
        (0.9, math.nan, (-1, 0)),
        ("0.1", "inf", (-1, 0)),
        ("", "", (-1, 0)),
    ],
)
def test_only_a_run_without_a_finite_loss_has_diverged(accuracy, loss, wanted):
    assert compare.score({"val_accuracy": accuracy, "val_loss": loss}) == wanted
    assert compare.score({}) == (-1, 0)


def test_the_smaller_loss_decides_between_equal_accuracies():
    assert compare.best_lr({0.1: (0.9, -2.0), 0.2: (0.9, -1.0), 0.3: (0.8, -0.1)}) == 0.2


def test_kept_is_what_autograd_saves():
    def kept(*flags):
        return report.kept(parse([*TINY, *flags]), 10)

    # 8 images of 4 patches and a class token. The head's input is a view of all 5 tokens; cross_entropy
    # keeps log-probabilities, labels and the sum of weights.
    probe = 8 * 5 * 128 * 4 + 8 * 10 * 4 + 8 * 8 + 4
    assert kept("--adapter", "head") == probe
    assert kept("--adapter", "head", "--batch-size", "16") == 2 * probe - 4
    assert kept("--adapter", "head", "--recompute") == probe
    # For one more rank, LoRA keeps one more column of the factor that is multiplied by scale.
    lora = {rank: kept("--adapter", "lora", "--rank", str(rank)) for rank in (2, 8)}
    factors = 6 * (4 * 128 + 128 + 512)
    assert lora[8] - lora[2] == (8 - 2) * factors * 4
    assert kept("--adapter", "lora", "--rank", "2", "--recompute") < lora[2] / 4
    full = kept("--adapter", "full")
    assert 20 * probe < lora[2] < 1.1 * full
    images = 8 * 3 * 14 * 14 * 4  # kept only if the weights of the patches train
    assert full > kept("--adapter", "lokr") + images


def diverge(flags, log):
    """Write config.json and log of a run whose loss is not finite, and return its exit status."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    folder = log.with_suffix("")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(parse(flags))))
    run = SimpleNamespace(optimizer=optimizer, scaler=scaler, saved=None, step=3, folder=folder)
    log.write_text(f"train.py: {Run.diverged(run, 'the loss is nan')}\n")
    return 2


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path, monkeypatch):
    def last_diverges(self, flags, log):
        return diverge(flags, log) if "0.0125" in flags else launch(self, flags, log)

    monkeypatch.setattr(compare.Comparison, "launch", last_diverges)
    flags = ["--methods", "lora", "--ranks", "2", "--seeds", "1", "--dropouts", ""]
    assert compare.main([*flags, "--out", str(tmp_path / "out"), *TINY]) == 0
    rows = {row["lr"]: row for row in read_rows(tmp_path / "out")}
    assert rows["0.0125"]["val_accuracy"] == "" and rows["0.0125"]["trial"] == "1"
    (final,) = [row for row in rows.values() if row["final"]]
    assert final["lr"] != "0.0125"
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "LoRA | 2 | 0.0125 | diverged" in text


def test_divergence_of_every_trial_or_of_a_final_run_ends_the_comparison(
    tmp_path, monkeypatch, capsys
):
    flags = ["--methods", "lora", "--ranks", "2", "--out", str(tmp_path / "out"), *TINY]
    monkeypatch.setattr(compare.Comparison, "launch", lambda self, flags, log: diverge(flags, log))
    assert compare.main(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "compare.py: lora rank 2: diverged at every learning rate; try a smaller --lr"
    assert len(list(tmp_path.glob("out/*.log"))) == compare.TRIALS
    monkeypatch.setattr(compare.Comparison, "launch", None)  # they are not tried again
    assert compare.main(flags) == 2 and capsys.readouterr().err.strip() == line

    def finals_diverge(self, flags, log):
        return diverge(flags, log) if "--test" in flags else launch(self, flags, log)

    monkeypatch.setattr(compare.Comparison, "launch", finals_diverge)
    assert compare.main([*flags, "--out", str(tmp_path / "finals")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"compare.py: lora rank 2 .* seed 0: train.py: the loss is nan at step 3", line)


def test_a_failed_run_ends_the_comparison_with_the_run_s_message(tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--methods", "head", "--ranks", "2", "--seeds", "1", "--dropouts", "", *TINY]
    out.mkdir()
    (out / "head-lr0.1-seed0").write_text("a file, not a folder")
    assert compare.main([*flags, "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(
        f"compare.py: head lr 0.1 seed 0: train.py: --out {out}/head-lr0.1-seed0:"
    )
    assert str(out / "head-lr0.1-seed0.log") in line
    assert checkpoint.read_resume(out / "head-lr0.04-seed0" / "last.pt")["result"]  # it stays
    assert compare.main([*flags, "--out", str(out), "--epochs", "2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--epochs was 1, is now 2" in line


def test_runs_of_another_trunk_or_other_data_are_not_taken_for_this_comparison_s(
    tmp_path, monkeypatch, capsys
):
    photos = tmp_path / "photos"
    pets(photos)
    monkeypatch.chdir(tmp_path)
    flags = "--methods head --seeds 1 --dataset folder --data-dir photos --epochs 1 --out out"
    flags = [*flags.split(), "--image-size", "14", "--workers", "0"]
    assert compare.main(flags) == 0
    assert compare.main([*flags, "--weights", "none"]) == 2
    assert "--weights was embedded, is now none" in capsys.readouterr().err
    first = min(path for path in photos.iterdir() if path.is_dir())
    first.rename(photos / "a new name")
    assert compare.main(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "last.pt: classes was" in line and "a new name" in line


def test_other_weights_under_the_same_name_are_refused(tmp_path, monkeypatch, capsys):
    shutil.copy(EMBEDDED, tmp_path / "trunk.safetensors")
    monkeypatch.chdir(tmp_path)
    flags = ["--methods", "head", "--seeds", "1", "--out", "out", *TINY]
    flags += ["--weights", "trunk.safetensors"]
    assert compare.main(flags) == 0
    tensors = load_file("trunk.safetensors")
    tensors["encoder.ln.weight"] += 1
    with safe_open("trunk.safetensors", "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if k != "checksums"}
    save_file(tensors, "trunk.safetensors", metadata)
    capsys.readouterr()
    assert compare.main(flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "last.pt: trunk was" in line and "give the old data and weights" in line


def test_a_run_that_diverged_with_other_settings_says_nothing_of_these(
    tmp_path, monkeypatch, capsys
):
    def diverges(self, flags, log):  # in its first epoch
        launch(self, flags, log)
        (log.with_suffix("") / "last.pt").unlink()
        return diverge(flags, log)

    flags = ["--methods", "head", "--out", str(tmp_path / "out"), *TINY]
    monkeypatch.setattr(compare.Comparison, "launch", diverges)
    assert compare.main([*flags, "--label-smoothing", "0.5"]) == 2
    assert "diverged at every learning rate" in capsys.readouterr().err
    assert compare.main(flags) == 2
    assert "--label-smoothing was 0.5, is now 0.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--ranks 2,x", "--ranks 2,x: expected whole numbers >= 1"),
        ("--ranks 0", "--ranks 0: expected"),
        ("--ranks 2,300", r"--rank 300: .* expected at most 128"),
        ("--seeds 0", "--seeds 0: expected >= 1"),
        ("--jobs 0", "--jobs 0: expected >= 1"),
        ("--dropouts 0.1,1", r"--dropouts 0.1,1: expected numbers in \[0, 1\)"),
        ("--methods lora,dora", "--methods lora,dora: expected some of head, lora"),
        ("--methods=", "expected at least one"),
        ("--seed 1", "--seed: compare.py sets it for each run"),
        ("--adap lora", "--adapter: compare.py sets it for each run"),
        ("--test", "--test: compare.py sets it for each run"),
        ("--rnaks 2", "unrecognized arguments: --rnaks 2"),
        ("--epochs 0", "--epochs 0: expected >= 1"),
        ("--dataset folder --data-dir nowhere", "nowhere"),
        ("--targets nothing", "target 'nothing' matches no"),
    ],
)
def test_a_mistake_gives_one_line_before_anything_is_trained(
    flags, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert compare.main([*TINY, *flags.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(f"compare.py: .*{words}", line)
    assert not (tmp_path / "runs").exists()


def test_without_a_test_split_the_table_says_so(tmp_path, monkeypatch):
    pets(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    flags = "--methods head --seeds 1 --dataset folder --data-dir photos --epochs 1 --out out"
    flags = [*flags.split(), "--image-size", "14", "--workers", "0", "--best-by", "loss"]
    assert compare.main(flags) == 0
    assert {row["test_accuracy"] for row in read_rows(tmp_path / "out")} == {""}
    text = (tmp_path / "out" / "comparison.md").read_text(encoding="utf-8")
    assert "There is no test split" in text and "its best epoch by validation loss." in text
    (line,) = read_tables(tmp_path / "out")["Comparison"]
    assert line[6] == "" and "±" not in line[5] and float(line[5]) >= 0


def test_jobs_share_the_threads_or_the_gpus(monkeypatch):
    comparison = SimpleNamespace(jobs=2, config=SimpleNamespace(device="auto"))
    share = compare.Comparison.share
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert share(comparison, 1) == {"OMP_NUM_THREADS": "4"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [share(comparison, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [share(comparison, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["3", "5", "3"]
    comparison.config.device = "cpu"
    assert share(comparison, 0) == {"OMP_NUM_THREADS": "4"}
    comparison.jobs = 1
    assert share(comparison, 0) == {}


def test_a_table_is_not_replaced_by_a_smaller_one(whole, tmp_path, capsys):
    before = (whole / "comparison.csv").read_bytes()
    flags = ["--seeds", "2", "--out", str(whole), *TINY]
    assert compare.main(["--methods", "lora", "--ranks", "2", *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"comparison.csv: has head lr \S+ seed 0, which this comparison would", error)
    assert error.count("\n") == 1
    flags = ["--ranks", "2", "--dropouts", "0.5", "--seeds", "1", "--out", str(whole), *TINY]
    assert compare.main(flags) == 2
    assert re.search(r"has head lr \S+ seed 1, which", capsys.readouterr().err)
    flags[flags.index("1")] = "2"
    assert compare.main([*flags, "--lr", "0.004"]) == 2  # all other rates, so none of these rows
    assert re.search(r"has head lr \S+ seed 0, which", capsys.readouterr().err)
    for steps in (-6, -1, 1):  # rates of the same grid: the search would try other ones
        shifted = str(0.005 * 2.5**steps)
        assert compare.main([*flags, "--lr", shifted]) == 2
        assert re.search(
            r"which this comparison .* the --lr it was made with", capsys.readouterr().err
        )
    assert (whole / "comparison.csv").read_bytes() == before
    whole_table = before.decode()
    (tmp_path / "comparison.csv").write_text(whole_table.replace("lora", "dora"))
    assert compare.main([*flags, "--out", str(tmp_path)]) == 2
    assert re.search(r"has dora rank 2 lr \S+ seed 0, which", capsys.readouterr().err)
    for text in ("a,b\n1,2\n", "method,rank,dropout,lr,seed\nhead,,0,0.1,0\n"):
        (tmp_path / "comparison.csv").write_text(text)
        assert compare.main(["--methods", "head", "--out", str(tmp_path), *TINY]) == 2
        assert "comparison.csv: not a table of compare.py" in capsys.readouterr().err
