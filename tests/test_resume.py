"""A run that is stopped or killed goes on as if nothing had been: the same tensors, to the bit."""

import csv
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import LIMIT, ROOT, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from trees import pets

import train
from engine import checkpoint, devices
from engine.config import Config
from engine.run import Signals, Stopped

KILLS = int(os.environ.get("KILLS", 20))
QUICK = {"limit": 48, "epochs": 2, "batch_size": 8, "workers": 0}  # 6 steps an epoch
FLAGS = (
    "--limit 40 --epochs 2 --batch-size 8 --image-size 14 --workers 0 --adapter-dropout 0.1".split()
)


def contents(folder):
    """What must not differ between two runs: all that is saved, but for times and the folder's name."""
    last = checkpoint.read_resume(folder / "last.pt")
    for key in ("seconds", "images_per_second"):
        del last["log"][key]
    for row in [*last["log"]["rows"], last["result"]]:
        row.pop("time", None)
        for key in ("images_per_second", "train/throughput"):
            row.pop(key, None)
    for key in ("out", "resume", "save_minutes", "max_hours", "workers"):
        del last["config"][key]
    generator = torch.Generator()
    generator.set_state(
        last["generators"]["torch"]
    )  # has bytes that mean nothing: what would it draw?
    last["generators"]["torch"] = torch.rand(9, generator=generator)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("images_per_second")
    events = EventAccumulator(str(folder)).Reload()
    tags = ("train/loss", "train/lr", "val/loss", "val/accuracy")
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    adapter = checkpoint.read_adapter(folder / "adapter.safetensors")
    return {"last": last, "adapter": adapter, "metrics": rows, "curves": curves}


def assert_same(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_clean(folder):
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"grad_accum": 4, "limit": 44, "epochs": 4},  # steps of 32 and 12 images
        {"head_dropout": 0.1, "adapter_dropout": 0.1, "module_dropout": 0.2},
        {"adapter": "full", "lr": 1e-3},
        pytest.param(
            {"amp": "fp16", "adapter": "loha", "image_size": 14, "clip_norm": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"amp": "bf16", "adapter": "lokr", "bias": "all", "seed": 3, "warmup": 0.4},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_a_stopped_run_goes_on_bit_for_bit(settings, tmp_path, stop_after, monkeypatch):
    monkeypatch.setattr(devices, "computes_float16", lambda: True)
    settings = {**QUICK, "epochs": 3, **settings}
    train.train(Config(out=tmp_path / "unbroken", **settings))
    for n in (1, 1, 2, 2):  # in the middle of epochs and at their ends
        stop_after(n)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM after step \d+; last.pt is"):
            train.train(Config(out=tmp_path / "run", resume=True, **settings))
    stop_after(10_000)
    train.train(Config(out=tmp_path / "run", resume=True, **settings))
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))
    assert_clean(tmp_path)


def test_the_clock_stops_a_run_with_status_0_and_it_goes_on_bit_for_bit(
    tmp_path, stop_after, capsys
):
    """After the first step, as that much less than a second has passed by then."""
    whole = train.train(Config(out=tmp_path / "unbroken", max_hours=1, **QUICK))
    assert "stopped" not in whole
    config = {"out": tmp_path / "run", "resume": True, **QUICK}
    for step in (1, 2):
        result = train.train(Config(max_hours=1e-9, **config))
        line = f"stopped by --max-hours 1e-09 after step {step}; last.pt is at step {step}; resume with"
        assert result["stopped"].startswith(line) and result["val_accuracy"] is None
        assert capsys.readouterr().out.endswith(result["stopped"] + "\n")
        assert not (tmp_path / "run" / "adapter.safetensors").exists()
    stop_after(6)  # in the second epoch
    with pytest.raises(Stopped):
        train.train(Config(**config))
    stop_after(10_000)
    result = train.train(Config(max_hours=1e-9, **config))
    assert result["stopped"].startswith("stopped by --max-hours 1e-09 after step 9")
    assert result["val_accuracy"] > 0 and result["run_dir"] == str(tmp_path / "run")
    flags = "--limit 48 --epochs 2 --batch-size 8 --workers 0 --resume --out".split()
    assert train.main([*flags, str(tmp_path / "run"), "--max-hours", "1e-9"]) == 0
    assert "after step 10; last.pt is at step 10;" in capsys.readouterr().out
    assert train.train(Config(**config))["val_accuracy"] == whole["val_accuracy"]
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))


def test_events_that_one_second_sees_broken_off_and_gone_on_with(tmp_path, stop_after, monkeypatch):
    """TensorBoard tells such files apart by a counter, and sorts them as text: 10 comes before 9."""
    settings = {**QUICK, "adapter": "head"}
    train.train(Config(out=tmp_path / "unbroken", **settings))
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: 1e9))
    stop_after(2)
    with pytest.raises(Stopped):
        train.train(Config(out=tmp_path / "run", **settings))
    foreign = tmp_path / "run" / "events.out.tfevents.1.elsewhere.1.0"
    foreign.touch()
    stop_after(10_000)
    train.train(Config(out=tmp_path / "run", resume=True, **settings))
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))
    assert len(list((tmp_path / "run").glob("*tfevents*.train"))) == 1 and foreign.exists()


def test_files_that_workers_decode_and_one_that_is_broken(tmp_path, stop_after):
    files = sorted(pets(tmp_path / "pets", images=30).rglob("*.jpg"))
    files[3].write_bytes(files[3].read_bytes()[:700])
    settings = {"dataset": "folder", "data_dir": tmp_path / "pets", "batch_size": 8, "epochs": 2}
    train.train(Config(out=tmp_path / "unbroken", workers=0, **settings))
    stop_after(8)
    with pytest.raises(Stopped):
        train.train(Config(out=tmp_path / "run", workers=2, **settings))
    stop_after(10_000)
    train.train(Config(out=tmp_path / "run", workers=1, resume=True, **settings))
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))
    listed = [(tmp_path / name / "unreadable.txt").read_text() for name in ("unbroken", "run")]
    assert listed[0] == listed[1] and str(files[3]) in listed[0]


def test_a_stop_in_an_evaluation_is_before_it(tmp_path, monkeypatch):
    settings = {**QUICK, "test": True}
    train.train(Config(out=tmp_path / "unbroken", **settings))
    whole, calls = train.evaluate, []

    def evaluate(*arguments):
        calls.append(arguments)
        if len(calls) in (1, 4):  # a validation, and the test after the last epoch
            signal.raise_signal(signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(train, "evaluate", evaluate)
    for step in (6, 12):
        with pytest.raises(Stopped, match=f"by SIGINT after step {step}; last.pt is"):
            train.train(Config(out=tmp_path / "run", resume=True, **settings))
    result = train.train(Config(out=tmp_path / "run", resume=True, **settings))
    assert len(calls) == 5 and "test_accuracy" in result
    assert_same(contents(tmp_path / "unbroken"), contents(tmp_path / "run"))


def test_handlers_are_put_back_and_a_second_signal_is_obeyed_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_generators_are_put_back():
    kept = checkpoint.generators()

    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    first = draws()
    assert all(x != y for x, y in zip(first, draws(), strict=True))
    checkpoint.set_generators(kept)
    assert draws() == first


def test_a_finished_run_says_so_and_returns_its_result(tmp_path, capsys):
    config = {"out": tmp_path / "run", "resume": True, **QUICK}
    first = train.train(Config(**config))
    said = capsys.readouterr().out
    assert f"no last.pt in {tmp_path / 'run'}; the run starts from the beginning" in said
    names = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert train.train(Config(**config)) == first
    said = capsys.readouterr().out
    assert f"{tmp_path / 'run'}: finished already, nothing is left to train" in said
    assert said.strip().endswith(f"Validation Accuracy: {first['val_accuracy']:.2%}")
    changed = {path.name for path in names if path.stat().st_mtime_ns != names[path]}
    assert changed <= {"config.json"}
    assert len(names) == len(list((tmp_path / "run").iterdir()))
    tested = train.train(Config(test=True, **config))  # what was not asked for before
    added = {"test_loss", "test_accuracy", "test_balanced_accuracy"}
    assert tested.keys() - first.keys() == added
    assert {key: tested[key] for key in first} == first


def test_what_differs_is_refused_and_what_may_is_not(tmp_path, stop_after, capsys):
    out = ["--out", str(tmp_path / "run")]
    stop_after(2)
    assert train.main([*FLAGS, *out]) == 143
    error = capsys.readouterr().err
    assert error == (
        f"train.py: stopped by SIGTERM after step 2; last.pt is at step 2; resume with the same "
        f"command and --out {tmp_path / 'run'} --resume\n"
    )
    before = (tmp_path / "run" / "last.pt").read_bytes()
    changed = [*FLAGS, *out, "--resume", "--rank", "5", "--lr", "1"]
    assert train.main(changed) == 2
    error = capsys.readouterr().err
    assert "--rank was 4, is now 5; --lr was 0.005, is now 1.0; give the old value" in error
    assert error.count("\n") == 1 and (tmp_path / "run" / "last.pt").read_bytes() == before
    free = "--workers 1 --device cpu --save-minutes 3 --test --cache-dir".split()
    assert train.main([*FLAGS, *out, "--resume", *free, str(tmp_path / "kept")]) == 0


def test_other_data_is_refused(tmp_path, stop_after, capsys):
    flags = ["--dataset", "folder", "--out", str(tmp_path / "run"), "--batch-size", "8"]
    stop_after(2)
    assert train.main([*flags, "--data-dir", str(pets(tmp_path / "a", images=20))]) == 143
    config = (tmp_path / "run" / "config.json").read_bytes()
    assert train.main([*flags, "--resume", "--data-dir", str(pets(tmp_path / "b", images=22))]) == 2
    assert "images was [" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == config


@pytest.mark.parametrize("content", [b"", b"x" * 1000, b"PK\x03\x04", b"\x80\x02."])
def test_a_last_pt_that_is_none_is_one_line(content, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(content)
    assert train.main(["--out", str(tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"train.py: {tmp_path / 'last.pt'}: not a resume file (")
    assert error.count("\n") == 1


def test_last_pt_unpickles_nothing_that_runs(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"config": Evil()}, tmp_path / "last.pt")
    assert train.main(["--out", str(tmp_path), "--resume"]) == 2
    assert not (tmp_path / "evil").exists()


def test_a_run_of_before_shapes_were_saved_goes_on_with_random_weights(tmp_path, stop_after):
    flags = [*FLAGS, "--weights", "none", "--model", "vit_mini", "--out", str(tmp_path / "run")]
    stop_after(4)
    assert train.main(flags) == 143
    last = checkpoint.read_resume(tmp_path / "run" / "last.pt")
    del last["extra"]["shape"]
    torch.save(last, tmp_path / "run" / "last.pt")
    stop_after(10_000)
    assert train.main([*flags, "--resume"]) == 0


def test_resume_needs_a_folder_and_overwrites_no_adapter(tmp_path, capsys):
    assert train.main(["--resume"]) == 2
    assert capsys.readouterr().err.startswith("train.py: --resume: expected --out as well")
    (tmp_path / "adapter.safetensors").write_bytes(b"precious")
    assert train.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "holds an adapter but no last.pt" in capsys.readouterr().err
    assert (tmp_path / "adapter.safetensors").read_bytes() == b"precious"


def come_to(folder):
    """How far the files of a run have come, in whatever state it left them: lines, then pictures."""
    metrics = folder / "metrics.csv"
    lines = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
    return lines + len(list(folder.glob("*.png")))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither SIGKILL nor a forkserver")
def test_killed_at_any_moment_it_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """SIGKILL, which no process can catch, in steps, evaluations, writes and pictures: 20 times, or $KILLS.

    Each run is a process of its own. They are forked from one that has imported train, so that most of
    the time goes into training, and most of the kills fall there: once a run has come so far as was drawn,
    however fast the machine is, and then after up to 50 ms, or as soon as it is writing a file.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])

    @contextmanager
    def started(name):
        flags = [*FLAGS, "--batch-size", "4", "--epochs", "4", "--save-minutes", "0"]  # 40 steps
        flags += ["--resume", "--out", str(tmp_path / name)]
        process = processes.Process(target=train.main, args=(flags,))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()

    def whole(name):
        with started(name) as process:
            process.join(LIMIT)
            assert process.exitcode == 0
        return contents(tmp_path / name)

    def killed(folder, mark, delay, stale):
        """Kill a run that has come to a mark, so many seconds later or, None, while it writes; False if
        the run was quicker. stale: what earlier kills have left half written."""
        with started(folder.name) as process:
            wait_until(lambda: come_to(folder) >= mark or process.exitcode is not None, pause=0.001)
            if delay is None:
                wait_until(lambda: halves(folder) - stale or process.exitcode is not None, pause=0)
            else:
                time.sleep(delay)
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    def halves(folder):
        return {*folder.glob(".*.tmp")}

    unbroken = whole("unbroken")
    marks = come_to(tmp_path / "unbroken")
    assert marks == 1 + 40 + 4 + 3  # a heading, steps, evaluations; pictures
    rng, kills, torn, progress = random.Random(KILLS), 0, 0, set()
    for i in range(2 * KILLS):
        folder = tmp_path / f"run-{i}"
        for mark in sorted(rng.sample(range(marks), 4)):
            stale = halves(folder)
            if not killed(folder, mark, rng.choice([None, rng.uniform(0, 0.05)]), stale):
                break
            kills += 1
            torn += bool(halves(folder) - stale)
            last = folder / "last.pt"
            progress.add(checkpoint.read_resume(last)["step"] if last.exists() else None)
        assert_same(unbroken, whole(folder.name), folder.name)
        assert_clean(folder)
        if kills >= KILLS:
            break
    print(f"{kills} kills, {torn} of them within a write; last.pt stood at {progress}")
    assert kills >= KILLS and len(progress) > KILLS / 5, f"kills at different steps: {progress}"


def test_stale_temporaries_go_when_a_run_goes_on(tmp_path, stop_after):
    stop_after(2)
    with pytest.raises(Stopped):
        train.train(Config(out=tmp_path / "run", **QUICK))
    (tmp_path / "run" / ".last.pt.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "run" / "notes.tmp").write_bytes(b"a user's own")
    stop_after(10_000)
    train.train(Config(out=tmp_path / "run", resume=True, **QUICK))
    assert [path.name for path in (tmp_path / "run").glob("*.tmp")] == ["notes.tmp"]
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["int", "term"]
)
def test_a_signal_to_the_process_ends_it_with_its_status_and_one_line(
    number, status, tmp_path, run_script, start
):
    flags = [*FLAGS, "--epochs", "100000", "--out", "run"]  # to outlast the other's start
    command = [sys.executable, ROOT / "train.py", *flags]
    process = start(command, cwd=tmp_path, stdout=subprocess.DEVNULL)  # a pipe would fill
    wait_until((tmp_path / "run" / "last.pt").exists, lambda: process.poll() is None)
    twice = run_script("train.py", *flags, "--resume")
    assert twice.returncode == 2
    assert twice.stderr == "train.py: --out run: another process trains there; wait for its end\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode == status
    assert error.startswith(f"train.py: stopped by {number.name} after step ")
    assert error.endswith("resume with the same command and --out run --resume\n")
    assert error.count("\n") == 1
    done = checkpoint.read_resume(tmp_path / "run" / "last.pt")["step"]
    assert f"last.pt is at step {done}; " in error
