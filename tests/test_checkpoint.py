"""The adapter file: the same logits in a new process; files that do not fit are refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapters import randomise
from conftest import LIMIT, ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vit
from engine import checkpoint
from engine.adapt import adapt

SETTINGS = {
    "lora": {"rank": 3, "alpha": 5.0, "targets": "query,mlp.0", "bias": "adapter"},
    "loha": {"rank": 2, "alpha": 5.0},
    "lokr": {"rank": 2, "alpha": 5.0, "factor": 4, "decompose_both": True},
    "head": {},
    "full": {},
}


def adapted(adapter, weights="embedded", seed=7, **changed):
    """An adapted small ViT with random factors, and its info."""
    settings = {**SETTINGS[adapter], **changed}
    model, preprocessing = vit.build("vit_mini", weights, 3, seed=seed)
    adapt(model, adapter, **settings)
    defaults = dict(rank=4, alpha=32.0, targets="all", bias="none", factor=-1, decompose_both=False)
    info = {
        "adapter": adapter,
        **defaults,
        **settings,
        "shape": model.shape,
        "weights": weights,
        "seed": seed,
        "trunk": checkpoint.fingerprint(model),
        "classes": ["cat", "dög", "c, d"],
        "preprocessing": preprocessing,
    }
    return randomise(model).eval(), info


IMAGES = torch.linspace(-1, 1, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28)
LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import vit
model, info = vit.load_adapter(sys.argv[2])
assert not model.training
images = torch.linspace(-1, 1, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28)
torch.save([model(images).detach(), info["classes"]], sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", SETTINGS)
def test_a_new_process_gives_the_same_logits(adapter, tmp_path):
    model, info = adapted(adapter)
    path = tmp_path / "adapter.safetensors"
    checkpoint.save_adapter(path, model, info)
    command = [sys.executable, "-c", LOAD, str(ROOT), str(path), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=LIMIT)
    logits, classes = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.equal(logits, model(IMAGES).detach())
    assert classes == ["cat", "dög", "c, d"]
    # the control: without the file's tensors, the logits differ
    fresh, _ = vit.build("vit_mini", "embedded", 3)
    assert not torch.allclose(logits, fresh.eval()(IMAGES), atol=1e-3)


def test_the_file_holds_the_trained_tensors_and_the_settings(tmp_path):
    model, info = adapted("lora")
    path = tmp_path / "adapter.safetensors"
    checkpoint.save_adapter(path, model, info)
    tensors = load_file(path)
    assert set(tensors) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "encoder.layers.encoder_layer_0.self_attention.query.lora_A" in tensors
    assert {"heads.head.weight", "heads.head.bias"} <= set(tensors)
    assert sum(t.numel() for t in tensors.values()) < 40_000
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["adapter"] == "lora" and json.loads(metadata["shape"])["num_heads"] == 4
    assert float(metadata["alpha"]) == 5 and json.loads(metadata["classes"])[1] == "dög"
    assert checkpoint.read_adapter(path)[1] == info


def rewrite(path, change):
    """Change an adapter file's tensors and metadata in place."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    metadata.pop("checksums", None)  # this is no damage, see test_damage.py
    change(tensors, metadata)
    save_file(tensors, path, metadata)


OTHER = "other.pth"
KEY = "encoder.layers.encoder_layer_0.self_attention.query.lora_A"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop(KEY), rf"{KEY}: expected shape \(3, 128\), found no such tensor"),
        (
            lambda t, m: t.update(more=torch.ones(2)),
            r"more: expected no such tensor, found shape \(2,\)",
        ),
        (lambda t, m: m.update(rank="4"), rf"{KEY}: expected shape \(4, 128\), found \(3, 128\)"),
        (lambda t, m: m.update(adapter="loha"), r"hada_w1_a: expected shape"),
        (lambda t, m: m.update(adapter="dora"), r"'dora': expected one of lora, loha"),
        (lambda t, m: m.update(shape=m["shape"].replace("128", "64")), "hidden_dim: expected 64"),
        (lambda t, m: m.pop("shape"), "shape: expected"),
        (lambda t, m: m.update(trunk="0" * 16), "trunk: expected 0000000000000000"),
        (lambda t, m: m.update(weights=str(OTHER)), "trained on other weights"),
        (lambda t, m: m.pop("classes"), "expected 'classes' in the metadata"),
        (
            lambda t, m: m.update(classes='["cat"]'),
            r"heads\.head\.weight: expected shape \(1, 128\)",
        ),
        (lambda t, m: m.update(rank="three"), "metadata rank: expected JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_key_expected_and_found(
    change, message, tmp_path, monkeypatch
):
    other, _ = vit.build("vit_mini", "none", 3)
    torch.save(other.state_dict(), tmp_path / OTHER)
    monkeypatch.chdir(tmp_path)
    model, info = adapted("lora")
    path = tmp_path / "adapter.safetensors"
    checkpoint.save_adapter(path, model, info)
    vit.load_adapter(path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message) as error:
        vit.load_adapter(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_restore_leaves_the_model_unchanged(tmp_path):
    model, info = adapted("lora")
    checkpoint.save_adapter(tmp_path / "a.safetensors", model, info)
    other, _ = adapted("lora", rank=5)
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=r"expected shape \(5, 128\), found \(3, 128\)"):
        path = tmp_path / "a.safetensors"
        checkpoint.restore(other, *checkpoint.read_adapter(path), path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_other_kinds_of_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        vit.load_adapter(tmp_path / "missing.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign\.safetensors: expected 'adapter'"):
        vit.load_adapter(tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.safetensors"):
        vit.load_adapter(tmp_path / "text.safetensors")


def test_moved_pretrained_weights_can_be_named(tmp_path):
    trunk, info = adapted("full")
    checkpoint.save_adapter(tmp_path / "trunk.safetensors", trunk, info)
    model, info = adapted("lora", weights=str(tmp_path / "trunk.safetensors"))
    checkpoint.save_adapter(tmp_path / "a.safetensors", model, info)
    (tmp_path / "trunk.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: .*trunk\.safetensors"):
        vit.load_adapter(tmp_path / "a.safetensors")
    loaded, _ = vit.load_adapter(tmp_path / "a.safetensors", tmp_path / "moved.safetensors")
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_a_trunk_rounded_differently_by_another_processor_is_accepted(tmp_path, monkeypatch):
    """The last bits of interpolated positions and random weights depend on the processor."""
    path, build = tmp_path / "a.safetensors", vit.build

    def nudged(names):
        def build_nudged(*arguments, **more):
            model, preprocessing = build(*arguments, **more)
            for name, p in model.named_parameters():
                if name in names:
                    p.data *= 1 + 2e-7
            return model, preprocessing

        return build_nudged

    for weights, names, fits in [
        ("embedded", ["encoder.pos_embedding"], True),
        ("embedded", ["encoder.ln.weight"], False),
        ("none", ["encoder.ln.weight"], True),
    ]:
        monkeypatch.setattr(vit, "build", build)
        model, info = adapted("lora", weights=weights)
        checkpoint.save_adapter(path, model, info)
        monkeypatch.setattr(vit, "build", nudged(names))
        if fits:
            loaded, _ = vit.load_adapter(path)
            torch.testing.assert_close(loaded(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-4)
        else:
            with pytest.raises(ValueError, match="trained on other weights"):
                vit.load_adapter(path)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    model, info = adapted("lora")
    path = tmp_path / "adapter.safetensors"
    checkpoint.save_adapter(path, model, info)
    before = path.read_bytes()

    def full_disk(file, content):
        with open(file, "wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_adapter(path, model, info)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]
