"""How the files divide the work: who imports whom, and that another training script can use the engine."""

import ast
import builtins
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from adapters import write_adapter
from conftest import ROOT
from torch import nn

import data
import train
import vit
from engine import checkpoint, config, run, start
from engine.config import Config, check, parse
from engine.run import Run, Stopped

STANDARD = set(sys.stdlib_module_names)
FRONT = {path.stem: path for path in ROOT.glob("*.py")}
ENGINE = {f"engine.{path.stem}": path for path in (ROOT / "engine").glob("*.py")}
OURS = FRONT | ENGINE
COMMANDS = {"train", "train_sdxl", "minimal", "predict", "export", "compare", "spectra"}


def trees():
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in OURS.items()}


def imported(tree):
    """(module, name) of each import; name is None where the module itself is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}" in OURS
                yield (f"{node.module}.{alias.name}", None) if whole else (node.module, alias.name)


def defined(tree):
    """The names that a module gives a value of its own at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            parts = [part for target in node.targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


IMPORTS = {name: list(imported(tree)) for name, tree in trees().items()}


def reached(name):
    """All modules of the project that importing this one imports."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {m for n in new for m, _ in IMPORTS[n] if m in OURS} - found
    return found - {name}


def test_the_front_page_is_what_a_person_reads_or_runs():
    assert set(FRONT) == {*COMMANDS, "lora", "loha", "lokr", "attention", "vit", "data"}


def test_no_module_passes_on_another_s_names():
    own = {name: defined(tree) for name, tree in trees().items()}
    for name, modules in IMPORTS.items():
        for module, part in modules:
            assert module not in OURS or part is None or part in own[module], (name, module, part)


def test_commands_are_imported_by_commands_alone():
    for name, modules in IMPORTS.items():
        commands = {module for module, _ in modules if module in COMMANDS}
        assert not commands, name


@pytest.mark.parametrize("name", ["lora", "loha", "lokr", "attention", "engine.files"])
def test_leaves_import_nothing_of_the_project(name):
    packages = {module.split(".")[0] for module, _ in IMPORTS[name]}
    assert packages <= STANDARD | {"torch", *(["safetensors"] if name == "engine.files" else [])}


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("engine.config", {"engine.adapt", "lora", "loha", "lokr"}),
        ("engine.images", {"engine.files"}),
        ("engine.text_to_image", {"engine.images", "engine.files"}),
        ("engine.config_sdxl", {"engine.config", "engine.adapt", "lora", "loha", "lokr"}),
        ("data", {"engine.images", "engine.files", "engine.tables"}),
        ("engine.devices", set()),
        ("minimal", {"lora", "attention"}),
    ],
)
def test_a_module_reaches_no_more_than_it_needs(name, allowed):
    assert reached(name) == allowed


def test_what_every_training_script_shares_knows_no_trunk_and_no_data_set():
    shared = reached("engine.run")
    assert not shared & {"vit", "data", "train", "engine.config", "engine.start", "engine.images"}
    text = ENGINE["engine.run"].read_text(encoding="utf-8")
    assert not re.findall(r"(?<![a-z])(accuracy|classes|confusion|split)(?![a-z(])", text)


def test_config_names_the_data_sets_and_trunks_that_there_are():
    assert config.DATASETS == list(data.SOURCES) and list(config.MODELS) == list(vit.MODELS)


def test_config_opens_no_file(tmp_path, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError(f"opened: {arguments}")

    (tmp_path / "last.pt").write_bytes(b"nothing")
    flags = [
        "--out",
        str(tmp_path),
        "--resume",
        "--init-adapter",
        "nowhere",
        "--weights",
        "nowhere",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", refuse)
        patch.setattr(torch, "load", refuse)
        for name in ("open", "exists", "is_file", "is_dir"):
            patch.setattr(Path, name, refuse)
        found = parse(flags)
        check(found)
    assert found.init_adapter == "nowhere" and found.resume


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_reads_what_it_starts_from_once(begun, tmp_path, monkeypatch, stop_after):
    """With --init-adapter the adapter file; with --resume last.pt, and the adapter file no more."""
    file = tmp_path / "a.safetensors"
    write_adapter(file, "lora", classes="zero one two three four five six seven eight nine".split())
    flags = ["--init-adapter", str(file), "--limit", "40", "--batch-size", "8", "--epochs", "2"]
    flags += ["--workers", "0", "--out", str(tmp_path / "run")]
    if begun:
        stop_after(3)
        assert train.main(flags) == 143
        flags.append("--resume")
        stop_after(10_000)
    reads = []

    def counted(function, name):
        def read(path, *arguments, **settings):
            reads.append((name, str(path)))
            return function(path, *arguments, **settings)

        return read

    for module, name in ((checkpoint, "read_adapter"), (checkpoint, "read_resume")):
        monkeypatch.setattr(module, name, counted(getattr(module, name), name))
    assert train.main(flags) == 0
    last = ("read_resume", str(tmp_path / "run" / "last.pt"))
    assert reads == [last if begun else ("read_adapter", str(file))]


@pytest.mark.parametrize("moment", ["read", "data", "lock"])
def test_a_last_pt_that_changes_while_a_run_starts_is_not_resumed(
    moment, tmp_path, monkeypatch, capsys
):
    """Another process has trained in the folder until just now: its result must not be lost."""
    flags = ["--limit", "40", "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    last = tmp_path / "run" / "last.pt"
    before = last.read_bytes()
    module, name = {
        "read": (checkpoint, "read_resume"),
        "data": (data, "load"),
        "lock": (run, "lock"),
    }[moment]
    whole = getattr(module, name)

    def late(*arguments, **named):
        found = whole(*arguments) if moment == "read" else None  # replaced once it has been read
        os.utime(last, ns=(1, 1))
        return found or whole(*arguments, **named)

    monkeypatch.setattr(module, name, late)
    assert train.main([*flags, "--resume", "--test"]) == 2
    assert "another process trains there" in capsys.readouterr().err
    assert last.read_bytes() == before


COLUMNS = {"fit/error": "error", "fit/held_out": "held_out"}


class Regression:
    """A training script that is not train.py: it fits a line, and knows no classes and no accuracy."""

    STEPS, EPOCHS = 5, 4

    def __init__(self, out, resume=False):
        self.config = Config(out=str(out), resume=resume, save_minutes=0)
        self.config.epochs = self.EPOCHS
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        last = run.read_last(self.config)
        identity = {"points": 7}
        run.refuse_others(self.config, identity, last)
        folder, lock = run.make_folder(self.config, last)
        self.run = Run(
            config=self.config,
            dataset=torch.randn(7, 3, generator=torch.Generator().manual_seed(1)),
            model=model,
            info={"what": "a line"},
            identity=identity,
            trainable=4,
            total=4,
            device=torch.device("cpu"),
            dtype=torch.float32,
            folder=folder,
            lock=lock,
            last=last,
            extra={"resumed": resume},
        )

    def fit(self, stop=None):
        """Train; stop: the step in which a signal comes."""
        run, model = self.run, self.run.model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        with run.training(optimizer, scaler, self.STEPS, COLUMNS):
            while run.epoch < self.EPOCHS:
                while run.step < (run.epoch + 1) * self.STEPS:
                    x = run.dataset + 0.1 * torch.randn(7, 3)
                    loss = (model(x).squeeze(1) - run.dataset.sum(1)).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    run.step += 1
                    if run.step == stop:
                        signal.raise_signal(signal.SIGTERM)
                    if run.meter.add(loss.detach(), 7):
                        run.log.write({"fit/error": run.meter.loss})
                    run.after_step()
                run.epoch += 1
                run.log.write({"fit/held_out": (model.weight - 1).square().sum().item()})
                run.meter.start()
                run.extra["epochs"] = [*run.extra.get("epochs", ()), run.epoch]
                run.best, run.best_tensors = {"epoch": run.epoch}, checkpoint.trained(model)
                run.save()
                run.save_adapter()
            run.result = {"weight": model.weight.detach().clone(), "extra": run.extra}
            run.save()
            run.log.close({"lr": 0.1}, {"fit/held_out": 0.0}, {})
            return run.result


def test_another_training_script_uses_folder_log_resume_and_signals(tmp_path):
    whole = Regression(tmp_path / "whole").fit()
    for resume, stop in ((False, 7), (True, 8), (True, 16)):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {stop}; last.pt is at"):
            Regression(tmp_path / "parts", resume).fit(stop)
    parts = Regression(tmp_path / "parts", resume=True).fit()
    assert torch.equal(parts["weight"], whole["weight"])
    assert whole["extra"] == {"resumed": False, "epochs": [1, 2, 3, 4]}
    assert parts["extra"] == {"resumed": True, "epochs": [1, 2, 3, 4]}
    tables = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1] and tables[0].startswith("epoch,step,error,held_out\n0.2,1,")
    assert len(tables[0].splitlines()) == 1 + 20 + 4
    with pytest.raises(ValueError, match="holds a run already"):
        run.check_folder(Config(out=str(tmp_path / "parts")))


def test_a_last_pt_of_another_training_script_is_refused(tmp_path, capsys):
    Regression(tmp_path / "line").fit()
    assert train.main(["--resume", "--out", str(tmp_path / "line"), "--limit", "20"]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and error.count("\n") == 1
    flags = ["--limit", "40", "--epochs", "1", "--workers", "0", "--out", str(tmp_path / "digits")]
    assert train.main(flags) == 0
    with pytest.raises(ValueError, match="points was None, is now 7"):
        Regression(tmp_path / "digits", resume=True)


def test_a_last_pt_of_an_earlier_version_says_so(tmp_path, capsys):
    old = {"config": {}, "identity": {}, "tensors": {}, "done": 3}
    torch.save(old, tmp_path / "last.pt")
    assert train.main(["--resume", "--out", str(tmp_path)]) == 2
    assert "an earlier version of this project wrote it" in capsys.readouterr().err


def test_settings_changed_after_construction_win_over_the_adapter(tmp_path):
    file = tmp_path / "a.safetensors"
    write_adapter(file, "loha")
    changed = Config(init_adapter=str(file))
    changed.targets = "query"
    found, _, source = start.begin(changed)
    assert (found.adapter, found.rank, found.targets) == ("loha", 2, "query")
    assert source.settings["targets"] == "all" and changed.adapter == "lora"
