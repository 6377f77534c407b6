"""Runs of train_sdxl.py: stopped and resumed, killed, shared by two processes; and the demo."""

import csv
import json
import math
import re
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, wait_until
from sdxl import toy_pipeline, write_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import assert_same

import train_sdxl
from engine import checkpoint
from engine.files import read_tensors

FLAGS = "--image-size 32 --epochs 2 --batch-size 3 --grad-accum 2 --sample-steps 1 --lr 0.01 --workers 0"
FLAGS = [*FLAGS.split(), "--caption-dropout", "0.3", "--holdout", "0.2", "--prompts", "cat|a bird"]
SCRIPT = ROOT / "train_sdxl.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    toy_pipeline(root / "base")
    write_pictures(root / "pictures")
    return root


@pytest.fixture
def flags(folder):
    paths = {"base": "base", "data-dir": "pictures", "cache-dir": "cache"}
    return [w for name, part in paths.items() for w in (f"--{name}", str(folder / part))] + FLAGS


def contents(folder):
    """What must not differ between two runs: all that is saved, but for times and the folder's name."""
    last = checkpoint.read_resume(folder / "last.pt")
    for key in ("seconds", "images_per_second"):
        del last["log"][key]
    for row in [*last["log"]["rows"], last["result"]]:
        for key in ("time", "images_per_second", "train/throughput"):
            row.pop(key, None)
    for key in ("out", "resume", "save_minutes", "generators"):
        last.pop(key, None)
        last["config"].pop(key, None)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [
            {k: v for k, v in r.items() if k != "pictures_per_second"} for r in csv.DictReader(file)
        ]
    names = ("adapter.safetensors", "unet/adapter_model.safetensors")
    pictures = [folder / "samples.png", *sorted((folder / "samples").iterdir())]
    return {
        "last": last,
        "metrics": rows,
        "files": [read_tensors(folder / name) for name in names],
        "pictures": {file.name: file.read_bytes() for file in pictures},
    }


def test_a_stopped_run_goes_on_bit_for_bit(flags, tmp_path, monkeypatch, capsys):
    more = ["--adapter-dropout", "0.1", "--module-dropout", "0.2", "--schedule", "linear"]
    flags = [*flags, *more, "--warmup", "0.3"]
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    real, left = train_sdxl.losses, [0]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments)

    # An evaluation has two forwards and a step one or two: stops in the first evaluation, in a step and
    # in the second evaluation.
    monkeypatch.setattr(train_sdxl, "losses", stopping)
    for left[0], where in ((1, 0), (3, 1), (3, 2)):
        assert train_sdxl.main([*flags, "--out", str(tmp_path / "parts"), "--resume"]) == 143
        error = capsys.readouterr().err
        assert f"stopped by SIGTERM after step {where}; last.pt is at step {where}; resume" in error
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert_same(one, other)
    assert one["last"]["step"] == 4 and len(one["metrics"]) == 4 + 3
    events = EventAccumulator(str(tmp_path / "parts"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("samples")] == [0, 2, 4]
    assert [e.step for e in events.Scalars("val/loss")] == [0, 2, 4]
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "parts"), "--resume"]) == 0
    assert "finished already" in capsys.readouterr().out
    for change, message in (
        (["--rank", "4"], "--rank was 8, is now 4"),
        (["--limit", "7"], "--limit was None, is now 7"),
        (["--snr-gamma", "5"], "--snr-gamma was None, is now 5.0"),
        (["--prompts", "a dog"], "--prompts was cat|a bird, is now a dog"),
    ):
        assert train_sdxl.main([*flags, "--out", str(tmp_path / "parts"), "--resume", *change]) == 2
        assert message in capsys.readouterr().err
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "parts")]) == 2
    assert "holds a run already; add --resume" in capsys.readouterr().err


def test_a_run_with_other_captions_or_another_base_is_not_resumed(flags, folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--epochs", "1", "--limit", "4", "--resume"]
    assert train_sdxl.main([*flags, *out]) == 0
    capsys.readouterr()
    other = tmp_path / "pictures"
    write_pictures(other)
    text = (other / "metadata.jsonl").read_text()
    (other / "metadata.jsonl").write_text(text.replace("some cat", "some dog"))
    assert train_sdxl.main([*flags, *out, "--data-dir", str(other)]) == 2
    assert "captions was " in capsys.readouterr().err
    again = toy_pipeline(tmp_path / "base")
    weights = next((again / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train_sdxl.main([*flags, *out, "--base", str(again)]) == 2
    assert "base was " in capsys.readouterr().err
    same = toy_pipeline(tmp_path / "v")
    scheduler = same / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps(settings | {"prediction_type": "v_prediction"}))
    assert train_sdxl.main([*flags, *out, "--base", str(same)]) == 2
    assert "base was " in capsys.readouterr().err


@pytest.mark.parametrize("cache", [[], ["--no-cache"]])
def test_a_picture_may_have_several_captions(cache, flags, folder, tmp_path):
    """As in COCO: one file, several rows."""
    rows = [{"file_name": "0.png", "text": text} for text in ("one", "two", "three")]
    pictures = tmp_path / "pictures"
    write_pictures(pictures)
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = [*flags, "--data-dir", str(pictures), "--holdout", "0", "--out", str(tmp_path / "run")]
    assert train_sdxl.main([*flags, *cache, "--epochs", "1", "--flip"]) == 0


def test_tensors_that_are_not_finite_leave_the_earlier_files(flags, tmp_path, monkeypatch, capsys):
    """The last step of the second epoch spoils them."""
    real, out, earlier = train_sdxl.show, tmp_path / "run", {}

    def spoiling(run, draw, epoch):
        if epoch == 2:
            earlier.update({p.name: p.read_bytes() for p in out.glob("*/adapter_model.*")})
            for p in run.model.parameters():
                if p.requires_grad:
                    p.data.fill_(math.nan)
        return real(run, draw, epoch)

    monkeypatch.setattr(train_sdxl, "show", spoiling)
    assert train_sdxl.main([*flags, "--out", str(out)]) == 2
    assert "is not finite at step 4" in capsys.readouterr().err
    assert earlier == {p.name: p.read_bytes() for p in out.glob("*/adapter_model.*")} != {}


def test_the_clock_ends_a_run_and_it_goes_on(flags, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--resume", "--limit", "4"]
    assert train_sdxl.main([*flags, *out, "--max-hours", "1e-9"]) == 0
    assert "stopped by --max-hours 1e-09 after step 0" in capsys.readouterr().out
    assert train_sdxl.main([*flags, *out]) == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(flags, tmp_path, start):
    """Killed once it has saved, between a save and the files, or in a step: as the moment comes."""
    flags = [*flags, "--epochs", "4", "--save-minutes", "0"]
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    out = [*flags, "--out", str(tmp_path / "parts"), "--resume"]
    last, seen = tmp_path / "parts" / "last.pt", 0

    def changed():
        return last.exists() and last.stat().st_mtime_ns != seen

    for kill in range(3):
        process = start([sys.executable, SCRIPT, *out], cwd=tmp_path)
        wait_until(changed, lambda running=process: running.poll() is None, 0.01)
        time.sleep(0.07 * kill)
        process.kill()
        process.communicate()
        seen = last.stat().st_mtime_ns
    assert train_sdxl.main(out) == 0
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "parts"))
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_two_processes_learn_what_one_does(flags, tmp_path, torchrun):
    """Batches of 3, 2 and 1 pictures: at times one process has none."""
    # Gradients that are not tiny; and AdamW makes much of rounding, so steps that are.
    flags = [*flags, "--alpha", "500", "--clip-norm", "0", "--lr", "1e-6"]
    assert train_sdxl.main([*flags, "--out", str(tmp_path / "one")]) == 0
    status, said, error = torchrun(*flags, "--out", "two", script=SCRIPT)
    assert status == 0, error
    assert said.count("lokr: ") == 1, "one process prints"
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert len(one["metrics"]) == len(two["metrics"]) == 7
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        a, b = ({k: float(v) for k, v in row.items() if v} for row in (a, b))
        assert b == pytest.approx(a, abs=1e-5)
    moments = [run["last"]["optimizer"]["state"] for run in (one, two)]
    for i, state in moments[0].items():  # of the gradients
        assert torch.allclose(moments[1][i]["exp_avg"], state["exp_avg"], atol=1e-5), i
    assert max(state["exp_avg"].abs().max() for state in moments[0].values()) > 1e-2


@pytest.mark.slow
def test_the_demo(run_script):
    """As a user starts it. 200 drawings: 95 % is more than any guess reaches."""
    process = run_script("train_sdxl.py", "--out", "run", timeout=1800)
    assert process.returncode == 0, process.stderr
    line = r"Drawn digits that a classifier recognises: (\d+\.\d)% before, (\d+\.\d)% after\n"
    before, after = map(float, re.search(line, process.stdout).groups())
    assert before < 20 and after >= 90
