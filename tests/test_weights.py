"""Pretrained weights of Hugging Face and timm: the logits of their own models, from every kind of file; and
where they are looked for: caches, folders, and a server on this machine that stands in for Hugging Face."""

import json
import math
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest
import timm
import torch
import transformers
from adapters import write_adapter
from conftest import ROOT, wait_until
from hf import hf_vit, randomise_all, refuse_network, timm_vit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTModel

import vit
from attention import split_attention
from engine import checkpoint, weights
from engine.adapt import ADAPT, adapt
from engine.layouts import LAYOUTS, renamed


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    refuse_network(monkeypatch)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images():
    return torch.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28).sin()


def ours(weights, head: nn.Linear, model="vit_mini") -> torch.Tensor:
    """The logits of our model with these weights and the other library's head."""
    model, preprocessing = vit.build(model, str(weights), 3)
    assert preprocessing["mean"] == preprocessing["std"] == [0.5] * 3
    model.heads.head.load_state_dict(head.state_dict())
    with torch.no_grad():
        return model.eval()(images())


def new_names(model):
    return model.state_dict()


def new_names_bare(model):
    """The names of ViTModel, which has a pooler and no prefix."""
    bare = ViTModel(model.config).eval()
    bare.load_state_dict(model.vit.state_dict(), strict=False)
    return bare.state_dict()


def old_names(model):
    """The names in the published file."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        for new, old in [
            (".layers.", ".encoder.layer."),
            ("attention.o_proj", "attention.output.dense"),
            ("attention.q_proj", "attention.attention.query"),
            ("attention.k_proj", "attention.attention.key"),
            ("attention.v_proj", "attention.attention.value"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
        ]:
            key = key.replace(new, old)
        renamed[key] = tensor
    return renamed


def old_names_bare(model):
    return {key.removeprefix("vit."): tensor for key, tensor in old_names(model).items()}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("keys", [new_names, new_names_bare, old_names, old_names_bare])
def test_hugging_face_s_logits_from_a_file(keys, suffix, tmp_path):
    model = hf_vit()
    path = tmp_path / f"trunk.{suffix}"
    (torch.save if suffix == "bin" else save_file)(keys(model), path)
    logits = model(images()).logits
    torch.testing.assert_close(ours(path, model.classifier), logits, rtol=0, atol=1e-10)
    # the control: with torchvision's eps, the logits differ
    wrong = ours(path, model.classifier, {"eps": 1e-6, "num_heads": 4})
    assert (wrong - logits).abs().max() > 1e-8


def test_hugging_face_s_logits_from_a_folder_that_it_saved(tmp_path):
    """config.json stores an eps that is not the default."""
    model = hf_vit(layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "folder")
    assert any("encoder.layer.0" in key for key in load_file(tmp_path / "folder/model.safetensors"))
    for path in ("folder", "folder/model.safetensors"):
        logits = ours(tmp_path / path, model.classifier)
        torch.testing.assert_close(logits, model(images()).logits, rtol=0, atol=1e-10)
    (tmp_path / "folder" / "config.json").unlink()
    wrong = ours(tmp_path / "folder", model.classifier)
    assert (wrong - model(images()).logits).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, {}),
        ({"size": 224, "do_resize": True}, {"image_size": 224, "crop": 1.0}),  # google's in21k
        (
            {"size": {"height": 84, "width": 84}, "do_center_crop": False, "crop_size": 70},
            {"image_size": 84, "crop": 1.0},
        ),
        ({"size": 64, "crop_size": 56, "do_center_crop": True}, {"image_size": 56, "crop": 0.875}),
        (
            {
                "size": {"shortest_edge": 64},
                "crop_size": {"height": 56, "width": 56},
                "do_center_crop": True,
                "resample": 3,
            },
            {"image_size": 56, "crop": 0.875, "interpolation": "bicubic"},
        ),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({"resample": 1, "size": 35}, {"image_size": 35, "crop": 1.0, "interpolation": "bicubic"}),
        (  # null: not said
            {"resample": None, "crop_pct": None, "size": {"shortest_edge": None, "height": 35}},
            {"image_size": 35, "crop": 1.0},
        ),
    ],
    ids=str,
)
def test_images_are_prepared_as_the_folder_of_the_weights_says(config, found, tmp_path):
    model = hf_vit()
    model.save_pretrained(tmp_path)
    rule = {**weights.HALF, "crop": 1.0, "interpolation": "bilinear", "image_size": 28}
    assert vit.build("vit_mini", str(tmp_path), 3)[1] == rule
    config = config | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    colours = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    assert weights.preprocessing_in(tmp_path) == found | colours
    built, images = vit.build("vit_mini", str(tmp_path), 3)
    assert images == rule | found | colours
    assert built.encoder.pos_embedding.shape[1] == 1 + (images["image_size"] // 7) ** 2
    images = vit.build("vit_mini", str(tmp_path), 3, image_size=42)[1]  # a flag comes first
    assert images == rule | found | colours | {"image_size": 42}


def test_a_side_that_is_no_multiple_of_the_patch_leaves_the_model_s_own(tmp_path):
    hf_vit().save_pretrained(tmp_path)
    for size, side in [(30, 28), (518, 224), (63, 63)]:  # 518: DINOv2, which is used at 224
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        assert vit.build("vit_mini", str(tmp_path), 3)[1]["image_size"] == side


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"size": {"shortest_edge": 100}, "crop_size": {"height": 112}, "do_center_crop": True},
            r"crop_size: expected at most 100, .* found 112",
        ),
        ({"size": -1}, r"size: expected a number above 0, found -1"),
        ({"size": [224, 224]}, r"size: expected a number above 0, found \[224, 224\]"),
        ({"image_mean": 0.5}, r"image_mean: expected three numbers, found 0\.5"),
        ({"image_std": [1, 2]}, r"image_std: expected three numbers above 0, found \[1, 2\]"),
        ({"image_std": [1, 2, "3"]}, r"image_std: expected three numbers .*, found \[1, 2, '3'\]"),
        ({"image_std": [1, 0, 1]}, r"image_std: expected three numbers above 0, found \[1, 0, 1\]"),
        ({"image_std": [1, 1, True]}, r"image_std: expected three numbers .* found \[1, 1, True\]"),
        (
            {"image_mean": [0, 0, math.inf]},
            r"image_mean: expected three numbers, found \[0, 0, inf",
        ),
        ({"resample": 9}, r"resample: expected bilinear or bicubic"),
        ({"resample": True}, r"resample: expected bilinear or bicubic, found True"),
        ({"size": True}, r"size: expected a number above 0, found True"),
        ({"size": math.nan}, r"size: expected a number above 0, found nan"),
        ({"size": math.inf}, r"size: expected a number above 0, found inf"),
        ({"crop_pct": True}, r"crop_pct: expected a number above 0, found True"),
    ],
    ids=str,
)
def test_a_wrong_preprocessor_config_is_refused_with_the_key(config, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: {message}") as error:
        weights.preprocessing_in(tmp_path)
    assert "\n" not in str(error.value)


def test_what_is_null_beside_the_weights_is_not_said(tmp_path):
    """The rule holds, as if the key were missing."""
    hf_vit().save_pretrained(tmp_path)
    rule = vit.build("vit_mini", str(tmp_path), 3)[1]
    content = {"image_mean": None, "image_std": None, "resample": None, "size": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert vit.build("vit_mini", str(tmp_path), 3)[1] == rule
    config = json.loads((tmp_path / "config.json").read_text())
    for eps, found in ((None, 1e-12), (1e-3, 1e-3)):
        (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": eps}))
        assert vit.build("vit_mini", str(tmp_path), 3)[0].encoder.ln.eps == found
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_norm_eps": True}))
    with pytest.raises(ValueError, match="layer_norm_eps: expected a number above 0, found True"):
        vit.build("vit_mini", str(tmp_path), 3)


def test_each_value_is_of_the_first_file_that_says_it(tmp_path):
    """preprocessor_config.json, then timm's config.json, then the rule."""
    save_file(timm_vit().state_dict(), tmp_path / "model.safetensors")
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_pct": 0.8}
    config = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop": 0.8, "image_size": 28}
    images["interpolation"] = "bicubic"
    assert vit.build("vit_mini", str(tmp_path), 3)[1] == images
    file = tmp_path / "preprocessor_config.json"
    for content, changed in [
        ({"size": 35}, {"image_size": 35}),
        ({"image_std": [2, 2, 2]}, {"std": [2, 2, 2]}),
        ({"size": 35, "do_center_crop": False}, {"image_size": 35, "crop": 1.0}),
        (
            {"size": 56, "do_center_crop": True, "crop_size": 28, "resample": 2},
            {"crop": 0.5, "interpolation": "bilinear"},
        ),
    ]:
        file.write_text(json.dumps(content))
        assert vit.build("vit_mini", str(tmp_path), 3)[1] == images | changed


def test_timm_s_logits(tmp_path):
    model = timm_vit()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    logits = ours(tmp_path / "timm.safetensors", model.head)
    torch.testing.assert_close(logits, model(images()), rtol=0, atol=1e-10)


def test_timm_s_act_layer_is_read(tmp_path):
    """config.json has the arguments with which the model differs from its architecture."""
    model = timm_vit()
    for block in model.blocks:
        block.mlp.act = timm.layers.get_act_layer("quick_gelu")()
    logits = model(images())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.5] * 3}}
    config["pretrained_cfg"]["std"] = [0.5] * 3
    for args, equal in [
        ({"act_layer": "quick_gelu"}, True),
        ({"act_layer": "gelu"}, False),
        ({"act_layer": None}, False),
        ({}, False),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": args}))
        difference = (ours(tmp_path, model.head) - logits).abs().max()
        assert (difference < 1e-10) == equal and (difference > 1e-4) != equal, args
    config["model_args"] = {"act_layer": "silu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="act_layer: expected gelu or quick_gelu, found 'silu'"):
        ours(tmp_path, model.head)


def test_a_file_without_its_last_block_is_refused(tmp_path):
    """Its other tensors are a whole model of five blocks. What lies beside it says six."""
    clip = {"model_cfg": {"vision_cfg": {"layers": 6, "width": 128, "head_width": 32}}}
    for model, name, file, config in [
        (hf_vit(), "model.safetensors", "config.json", None),
        (
            timm_vit(),
            "model.safetensors",
            "config.json",
            {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 6, "num_heads": 4}},
        ),
        (timm_vit(), "open_clip_model.safetensors", "open_clip_config.json", clip),
    ]:
        folder = tmp_path / f"{type(model).__name__}-{name}"
        folder.mkdir()
        if config is None:
            model.save_pretrained(folder)
        else:
            save_file(model.state_dict(), folder / name)
            (folder / file).write_text(json.dumps(config))
        assert vit.build(None, str(folder), 3)[0].shape["num_layers"] == 6  # the control
        state = load_file(folder / name)
        last = re.compile(r"\b(layer|blocks)\.5\.")
        save_file({k: t for k, t in state.items() if not last.search(k)}, folder / name)
        with pytest.raises(ValueError, match=r"expected 6 blocks, .*, found 5") as error:
            vit.build(None, str(folder), 3)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)
        (folder / file).unlink()
        assert vit.build(None, str(folder), 3, heads=4)[0].shape["num_layers"] == 5


@pytest.mark.parametrize("before", [False, True])
def test_an_adapter_file_stores_the_eps_of_its_pretrained_weights(before, tmp_path):
    """With --adapter full too, where no pretrained weights are loaded.

    before: as files were before they held the shape, with the model's name and the eps.
    """
    model = hf_vit(layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "trunk")
    for adapter in ("lora", "full"):
        built, preprocessing = vit.build("vit_mini", str(tmp_path / "trunk"), 3)
        adapt(built, adapter)
        info = {key: None for key in ADAPT} | dict(
            adapter=adapter, rank=4, alpha=32.0, targets="all", bias="none", factor=-1
        )
        info |= {"decompose_both": False, "weights": str(tmp_path / "trunk")}
        info |= {"seed": 0, "trunk": checkpoint.fingerprint(built), "classes": ["a", "b", "c"]}
        info |= {"preprocessing": preprocessing}
        if before:
            del preprocessing["interpolation"]
            info |= {"model": "vit_mini", "eps": 1e-3}
        else:
            info |= {"shape": built.shape}
        path = tmp_path / f"{adapter}.safetensors"
        checkpoint.save_adapter(path, built, info)
        loaded, _ = vit.load_adapter(path)
        assert loaded.encoder.layers[2].ln_1.eps == 1e-3
        assert torch.equal(loaded(images()), built.eval()(images()))
        changed = info | ({"eps": 1e-6} if before else {"shape": built.shape | {"eps": 1e-6}})
        checkpoint.save_adapter(tmp_path / "control.safetensors", built, changed)
        control, _ = vit.load_adapter(tmp_path / "control.safetensors")
        assert not torch.equal(control(images()), loaded(images()))
    # the fully trained model as pretrained weights
    trunk, found = vit.build(None, str(path), 3)
    assert trunk.encoder.ln.eps == 1e-3 and trunk.shape["num_heads"] == 4
    assert found == {"interpolation": "bilinear", **preprocessing}


def snapshot(home, name="google/vit-base-patch16-224-in21k"):
    return home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "b4569560a39a"


def published(folder, seed=0):
    """Write a file in the published layout, at full size but in float16; return its tensors."""
    with torch.device("meta"):
        trunk = split_attention(vit.trunk(**vit.named_shape("vit_b_16")))
    generator = torch.Generator().manual_seed(seed)
    tensors = {"pooler.dense.bias": torch.zeros(768, dtype=torch.float16)}
    for name, p in trunk.named_parameters():
        if not name.startswith("heads."):
            values = torch.randn(p.numel() % 97 + 1, generator=generator, dtype=torch.float32)
            values = values.repeat(p.numel() // len(values) + 1)[: p.numel()]
            tensors[renamed(name, LAYOUTS["vit"])] = (0.02 * values).reshape(p.shape).half()
    assert "encoder.layer.11.attention.attention.query.weight" in tensors
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The home of a machine without pretrained weights and without a network."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "KAGGLE", tmp_path / "kaggle" / "input")
    return tmp_path


@pytest.mark.slow
def test_in21k_is_read_from_hugging_face_s_cache(machine):
    tensors = published(snapshot(machine / "home"))
    model, preprocessing = vit.build(None, "in21k", 7)
    key = "encoder.layer.7.attention.attention.value.weight"
    value = model.encoder.layers.encoder_layer_7.self_attention.value.weight
    assert torch.equal(value, tensors[key].float())
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    assert preprocessing == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop": 1.0,
        "interpolation": "bilinear",
        "image_size": 224,
    }
    assert model.shape["num_heads"] == 12
    with pytest.raises(ValueError, match="these are another model's weights"):
        vit.build("vit_mini", "in21k")


DINO = "facebook/dinov2-small"
AUGREG = "timm/vit_small_patch16_224.augreg_in21k"
BESIDE = ("config.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A tiny DINOv2 as it lies on Hugging Face. A wrong number of heads, eps, mean or filter shows."""
    folder = tmp_path_factory.mktemp("hub") / "dinov2-small"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "mlp_ratio": 2}
    config = transformers.Dinov2Config(
        **sizes, image_size=28, patch_size=14, layer_norm_eps=1e-3, num_labels=3
    )
    model = randomise_all(transformers.Dinov2Model(config))
    model.float().save_pretrained(folder)
    images = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0], "resample": 3}
    images |= {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    images["do_center_crop"] = True
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def check_dino(repository, name=DINO, file="model.safetensors"):
    """The weights of this name give the features of their own model; returns the file that was read."""
    path = weights.find(name)
    assert path.name == file
    built, found = vit.build(None, name, 3)
    assert found == {
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
        "crop": 0.875,
        "interpolation": "bicubic",
        "image_size": 56,
    }
    assert built.shape["num_heads"] == 8 and built.encoder.ln.eps == 1e-3
    x = torch.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28).sin()
    theirs = transformers.Dinov2Model.from_pretrained(repository).eval()(x).pooler_output
    built, _ = vit.build(None, name, 3, image_size=28)
    built.heads = nn.Identity()
    torch.testing.assert_close(built.eval()(x), theirs, rtol=0, atol=1e-4)
    return path


def put(repository, folder, files=("model.safetensors", *BESIDE)):
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_bytes((repository / file).read_bytes())


@pytest.mark.parametrize(
    "folder",
    [
        "home/hub/models--facebook--dinov2-small/snapshots/ed25f3a31f01",
        "dinov2-small",
        "torch/hub/checkpoints/facebook--dinov2-small",
        "kaggle/input/dinov2-small/x",
        "kaggle/input/dinov2-small",
        "kaggle/input/models/someone/DINOv2_Small/pytorch/1",
    ],
)
def test_a_name_of_hugging_face_is_found_in_the_known_folders(folder, machine, repository):
    with pytest.raises(OSError, match="cannot be downloaded"):  # the control
        weights.find(DINO)
    put(repository, machine / folder)
    assert check_dino(repository).samefile(machine / folder / "model.safetensors")
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find("facebook/dinov2-base")
    for other in ("other--dinov2-small", "facebook--dinov2-small-not"):
        (machine / "torch/hub/checkpoints" / other).mkdir(parents=True)
    assert check_dino(repository).samefile(machine / folder / "model.safetensors")


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_hugging_face_s_cache_has_links_and_may_lie_elsewhere(
    variable, machine, repository, monkeypatch
):
    """A snapshot's files are links to blobs, whose names are hashes."""
    root = machine / "elsewhere" / ("hub" if variable == "HF_HOME" else "")
    blobs = root / "models--facebook--dinov2-small" / "blobs"
    folder = blobs.parent / "snapshots" / "ed25f3a31f01"
    put(repository, blobs)
    folder.mkdir(parents=True)
    for i, file in enumerate(("model.safetensors", *BESIDE)):
        (blobs / file).rename(blobs / (f"{i}" * 40))
        (folder / file).symlink_to(f"../../blobs/{f'{i}' * 40}")
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find(DINO)
    monkeypatch.setenv(variable, str(machine / "elsewhere"))
    assert check_dino(repository).parent == folder
    # a snapshot whose file is gone is none: the cache was cleaned
    (blobs / ("0" * 40)).unlink()
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find(DINO)


def test_of_several_snapshots_main_s_is_taken_and_else_the_newest(machine):
    """Their names are hashes, and folders come in any order."""
    model = machine / "home/hub/models--facebook--dinov2-small"
    names = ["b", "d", "a", "c", "e"]
    for age, name in enumerate(names):
        (model / "snapshots" / name).mkdir(parents=True)
        (model / "snapshots" / name / "model.safetensors").write_bytes(b"")
        os.utime(model / "snapshots" / name, (1e9 - age, 1e9 - age))
    (model / "refs").mkdir()
    for name in names:
        (model / "refs" / "main").write_text(name)
        assert weights.find(DINO).parent.name == name
    (model / "refs" / "main").write_text("f")  # a snapshot that is not here
    assert weights.find(DINO).parent.name == "b"
    (model / "refs" / "main").unlink()
    assert weights.find(DINO).parent.name == "b"
    os.utime(model / "snapshots" / "a", (2e9, 2e9))
    assert weights.find(DINO).parent.name == "a"
    (model / "snapshots/a/model.safetensors").unlink()  # as after a download of config.json alone
    assert weights.find(DINO).parent.name == "b"


@pytest.mark.parametrize("file", weights.FILES)
@pytest.mark.parametrize(
    "folder",
    [
        "home/hub/models--timm--vit_small_patch16_224.augreg_in21k/snapshots/1",
        "vit_small_patch16_224.augreg_in21k",
        "torch/hub/checkpoints/timm--vit_small_patch16_224.augreg_in21k",
        "kaggle/input/vit-small-patch16-224-augreg-in21k",
        "kaggle/input/x/vit_small_patch16_224.augreg_in21k/1",
    ],
)
def test_names_of_timm_have_dots_and_underscores(folder, file, machine):
    with pytest.raises(OSError, match="cannot be downloaded"):  # the control
        weights.find(AUGREG)
    (machine / folder).mkdir(parents=True)
    (machine / folder / file).write_bytes(b"")
    assert weights.find(AUGREG).samefile(machine / folder / file)
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find("timm/vit_small_patch32_224.augreg_in21k")


@pytest.mark.parametrize(
    "folder", ["vit-base-patch16-224-in21k", "kaggle/input/a/b/vit-base-patch16-224-in21k/1"]
)
def test_in21k_is_found_in_the_known_folders(folder, machine):
    (machine / folder).mkdir(parents=True)
    (machine / folder / "pytorch_model.bin").write_bytes(b"")
    assert (machine / folder / "pytorch_model.bin").samefile(weights.find("in21k"))


def test_in21k_is_found_where_earlier_versions_put_it(hub, machine):
    file = machine / "torch/hub/checkpoints/vit-base-patch16-224-in21k.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert weights.find("in21k") == weights.find(weights.IN21K) == file
    with pytest.raises(OSError, match="cannot be downloaded"):  # the control: another owner's
        weights.find("other/vit-base-patch16-224-in21k")
    assert hub.asked


class Hub(ThreadingHTTPServer):
    """Stands in for Hugging Face: files by path, and what goes wrong with them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked, self.wrong = {}, [], {}
        self.stalled, self.go_on = threading.Event(), threading.Event()

    def serve(self, repository, name=DINO, files=("model.safetensors", *BESIDE)):
        self.files = {f"/{name}/resolve/main/{f}": (repository / f).read_bytes() for f in files}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        path = unquote(self.path)
        file = path.rpartition("/")[2]
        wrong = self.server.wrong.get(file)
        self.server.asked.append(file)
        body = self.server.files.get(path)
        if isinstance(wrong, int) or body is None:
            self.send_error(wrong or 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if wrong == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
        elif wrong == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.stalled.set()
            self.server.go_on.wait(60)
        else:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(machine, monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
    thread.join()


def downloads(machine) -> list[str]:
    """What lies in torch's cache."""
    return sorted(p.name for p in machine.glob("torch/hub/checkpoints/*"))


def test_a_name_of_hugging_face_is_downloaded_once_with_what_lies_beside(hub, machine, repository):
    hub.serve(repository)
    path = weights.find(DINO)
    assert path == machine / "torch/hub/checkpoints/facebook--dinov2-small/model.safetensors"
    assert sorted(hub.asked) == sorted([*BESIDE, "model.safetensors"])
    assert downloads(machine) == ["facebook--dinov2-small"]
    for file in (path.name, *BESIDE):
        assert (path.parent / file).read_bytes() == (repository / file).read_bytes()
    assert len(list(path.parent.iterdir())) == 3
    (machine / "mine").mkdir()  # whoever may read other new files may read these
    (machine / "mine" / "file").touch()
    for found, other in ((path.parent, "mine"), (path, "mine/file")):
        assert found.stat().st_mode == (machine / other).stat().st_mode
    hub.files.clear()  # the second time, nothing is asked for
    assert check_dino(repository) == path
    assert len(hub.asked) == 3
    (path.parent / "model.safetensors").unlink()  # the control
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find(DINO)
    assert len(hub.asked) > 3


def test_in21k_is_downloaded_from_google_s(hub, machine, repository):
    hub.serve(repository, weights.IN21K)
    path = weights.find("in21k")
    assert path.parent.name == "google--vit-base-patch16-224-in21k"
    assert weights.find("in21k") == path == weights.find(weights.IN21K)
    assert len(hub.asked) == 3


def test_only_pytorch_model_bin_is_there(hub, machine, repository, capsys):
    hub.serve(repository, files=("pytorch_model.bin", *BESIDE))
    check_dino(repository, file="pytorch_model.bin")
    output = capsys.readouterr().out
    assert f"/{DINO}/resolve/main/ to {machine}" in output and "safetensors" not in output
    assert hub.asked.count("model.safetensors") == hub.asked.count("pytorch_model.bin") == 1
    assert len(hub.asked) == 4
    folder = machine / "torch/hub/checkpoints/facebook--dinov2-small"
    assert {p.name for p in folder.iterdir()} == {"pytorch_model.bin", *BESIDE}


def test_no_config_is_fine_and_rules_apply(hub, machine, capsys):
    """timm's augreg: 6 heads of 64, eps 1e-6, mean 0.5. The rules are printed."""
    folder = machine / "remote"
    folder.mkdir()
    sizes = {"embed_dim": 192, "depth": 1, "num_heads": 3, "img_size": 28, "patch_size": 14}
    model = randomise_all(timm.models.VisionTransformer(**sizes, num_classes=3)).float()
    save_file(model.state_dict(), folder / "model.safetensors")
    hub.serve(folder, AUGREG, ["model.safetensors"])
    built, found = vit.build(None, AUGREG, 3)
    said = capsys.readouterr().out
    assert "3 heads (width / 64)" in said and "eps 1e-06" in said and "timm's augreg" in said
    assert built.shape["num_heads"] == 3 and found["mean"] == [0.5] * 3
    built.heads.head.load_state_dict(model.head.state_dict())
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(built.eval()(x), model(x), rtol=0, atol=1e-4)
    # the control: with its config.json, that decides, and nothing is printed
    path = weights.find(AUGREG)
    config = {"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}
    config["pretrained_cfg"] |= {"std": [1, 2, 3], "crop_pct": 0.8, "interpolation": "bilinear"}
    path.with_name("config.json").write_text(json.dumps(config))
    built, found = vit.build(None, AUGREG, 3)
    assert (found["mean"], found["std"], found["crop"]) == ([0.1, 0.2, 0.3], [1, 2, 3], 0.8)
    assert found["interpolation"] == "bilinear"


def test_a_repository_without_tensors_is_one_line(hub, machine, repository):
    hub.serve(repository, files=BESIDE)
    with pytest.raises(
        OSError, match=r"it has no model\.safetensors or pytorch_model\.bin"
    ) as error:
        vit.build(None, DINO)
    for text in (DINO, "hf download", "kaggle/input", "./dinov2-small", "home/hub", "torch/hub"):
        assert text in str(error.value)
    assert str(hub.server_port) in str(error.value) and "\n" not in str(error.value)
    assert downloads(machine) == []


@pytest.mark.parametrize("wrong", ["cut", 401, 500])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", *BESIDE])
def test_a_download_that_fails_leaves_nothing_and_is_tried_again(
    file, wrong, hub, machine, repository
):
    """cut: the connection breaks off in the middle. An error is not taken for a missing config.json."""
    tensors = file if file not in BESIDE else "model.safetensors"
    hub.serve(repository, files=(tensors, *BESIDE))
    hub.wrong[file] = wrong
    with pytest.raises(
        OSError, match=r"--weights facebook/dinov2-small: .*cannot be downloaded"
    ) as error:
        vit.build(None, DINO)
    assert "\n" not in str(error.value)
    assert file in hub.asked and downloads(machine) == []
    hub.wrong.clear()
    check_dino(repository, file=tensors)
    assert downloads(machine) == ["facebook--dinov2-small"]


@pytest.mark.slow
def test_a_killed_download_is_not_taken_for_whole(hub, machine, repository, start):
    hub.serve(repository)
    hub.wrong["model.safetensors"] = "stall"
    code = f"from engine import weights; weights.find({DINO!r})"
    process = start([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_until(hub.stalled.is_set, lambda: process.poll() is None)
    cache = machine / "torch/hub/checkpoints"
    process.kill()
    process.wait()
    hub.go_on.set()
    # the control: half a download lies there, with a whole config.json
    left = {p.name for p in cache.glob("*/*")}
    assert {*BESIDE} < left and any(".partial" in name for name in left)
    assert not (cache / "facebook--dinov2-small").exists()
    hub.wrong = dict.fromkeys(("model.safetensors", *BESIDE), 503)
    with pytest.raises(OSError, match="503"):
        weights.find(DINO)
    hub.wrong.clear()
    check_dino(repository)


@pytest.mark.parametrize("whole", [True, False])
def test_two_processes_download_the_same_at_once(whole, hub, machine, repository, monkeypatch):
    """whole: while this one downloads, the other one finishes; else its folder has no tensors."""
    place = machine / "torch/hub/checkpoints/facebook--dinov2-small"
    own = weights.read_tensors

    def slow(path):
        if not place.exists():
            put(repository, place, ("model.safetensors", *BESIDE) if whole else BESIDE)
        return own(path)

    hub.serve(repository)
    monkeypatch.setattr(weights, "read_tensors", slow)
    if whole:
        assert check_dino(repository) == place / "model.safetensors"
    else:
        with pytest.raises(OSError, match=r"dinov2-small: expected model\.safetensors .* found"):
            weights.find(DINO)
    assert downloads(machine) == ["facebook--dinov2-small"]
    assert "model.safetensors" in hub.asked


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_malicious_bin_is_refused_and_not_run(hub, machine):
    (machine / "folder").mkdir()
    torch.save({**old_names(hf_vit()), "more": Bomb()}, "folder/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a file of tensors"):
        vit.build("vit_mini", "folder")
    hub.serve(machine / "folder", "some/one", ["pytorch_model.bin"])
    with pytest.raises(OSError, match=r"pytorch_model\.bin: not a file of tensors") as error:
        vit.build(None, "some/one")
    assert "pytorch_model.bin" in hub.asked and "\n" not in str(error.value)
    assert downloads(machine) == []
    assert not (machine / "bomb-went-off").exists()
    torch.load("folder/pytorch_model.bin", weights_only=False)
    assert (machine / "bomb-went-off").exists(), "the control: unpickling runs its code"


@pytest.mark.parametrize(
    "path",
    [
        "runs/x.pth",
        "runs/x.safetensors",
        "x.bin",
        "runs/x.ckpt",
        "x/y.pth.tar",
        "x/y.PTH",
        "a/b/c",
        "./a/b",
        "/a/b",
        "imagenet",
        "a/",
        "a b/c",
    ],
)
def test_a_mistyped_path_is_no_name_and_asks_no_network(path, hub, machine):
    for function in (weights.check_weights, weights.find, lambda path: vit.build(None, path)):
        with pytest.raises(FileNotFoundError, match=r"no such file, and no such name") as error:
            function(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    assert not weights.is_hub_name(path) and hub.asked == []
    weights.check_weights("runs/x")  # the control: this may be a name, and is asked for
    with pytest.raises(OSError, match="cannot be downloaded"):
        weights.find("runs/x")
    assert hub.asked


def test_a_full_name_keeps_names_and_makes_paths_absolute(machine):
    for name in (*weights.NAMES, DINO, AUGREG):
        weights.check_weights(name)
        assert weights.full_name(name) == name
    assert weights.full_name("runs/x.pth") == str(machine / "runs/x.pth")
    (machine / DINO).mkdir(parents=True)  # a folder here comes first
    assert weights.full_name(DINO) == str(machine / DINO)
    assert not weights.is_hub_name(DINO)
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or .* found nothing"):
        weights.find(DINO)


@pytest.mark.parametrize("name", ["x.PTH", "x.pth.tar", "last.ckpt"])
def test_the_only_file_of_tensors_in_a_folder(name, machine):
    (machine / "folder").mkdir()
    (machine / "folder" / name).touch()
    (machine / "folder" / "log.txt").touch()
    assert weights.find("folder").name == name


def test_a_folder_here_is_read_before_a_name_is_asked_for(hub, machine, repository):
    put(repository, machine / DINO)
    check_dino(repository)
    assert hub.asked == []


def test_wrong_files_are_refused_with_the_key(tmp_path):
    state = old_names(hf_vit())
    key = "encoder.layer.3.attention.attention.query.weight"
    for change, message in [
        (lambda s: s.pop("vit." + key), rf"vit\.{key}: expected a tensor, found none"),
        (
            lambda s: s.update({"vit.embeddings.more": torch.ones(1)}),
            r"safetensors: vit\.embeddings\.more: expected no",
        ),
        (
            lambda s: s.update({"vit." + key: torch.ones(2, 2)}),
            rf"vit\.{key} .*: expected shape \(128, 128\), found \(2, 2\)",
        ),
    ]:
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            vit.build("vit_mini", str(tmp_path / "wrong.safetensors"))
        assert "wrong.safetensors" in str(error.value) and "\n" not in str(error.value)
    # a mask token, of masked pretraining, is left out
    save_file({**state, "vit.embeddings.mask_token": torch.ones(1)}, tmp_path / "mask.safetensors")
    vit.build("vit_mini", str(tmp_path / "mask.safetensors"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-12}))
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or .* found config"):
        vit.build("vit_mini", str(tmp_path / "folder"))


SHAPES = {  # by the end of the key: a wrong shape
    "cls_token": (1, 1, 127),
    "pos_embed": (1, 17, 127),
    "patch_embed.proj.weight": (128, 147),
    "patch_embed.proj.bias": (),
    "blocks.4.attn.qkv.weight": (2, 128),
    "blocks.4.attn.qkv.bias": (),
    "blocks.4.attn.proj.weight": (128, 64),
    "blocks.0.mlp.fc1.weight": (512,),
    "blocks.0.mlp.fc2.weight": (128,),
    "blocks.5.norm2.bias": (1, 128),
}


@pytest.mark.parametrize("key", SHAPES)
def test_a_tensor_of_a_wrong_shape_is_named_as_in_the_file(key, tmp_path):
    state = timm_vit().state_dict()
    state = {f"module.{name}": tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "whole.safetensors")
    vit.build("vit_mini", str(tmp_path / "whole.safetensors"), 3)  # the control
    state[f"module.{key}"] = torch.ones(SHAPES[key])
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as error:
        vit.build("vit_mini", str(tmp_path / "wrong.safetensors"), 3)
    message = str(error.value)
    assert f"wrong.safetensors: module.{key} (" in message and "\n" not in message
    assert "expected shape (" in message and f"found {SHAPES[key]}" in message


def test_tokens_that_no_square_of_patches_fits_are_one_line(tmp_path):
    state = timm_vit().state_dict() | {"reg_token": torch.ones(1, 4, 128)}
    for rows in (3, 15):
        state["pos_embed"] = torch.ones(1, rows, 128)
        save_file(state, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=rf"position embedding: .* 5 more, found {rows}$"):
            vit.build(None, str(tmp_path / "wrong.safetensors"), 3, heads=4)


def others() -> list[tuple[nn.Module, str]]:
    """Models that are no plain ViT, and what the error has to name."""
    config = transformers.SiglipVisionConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    headless = transformers.SiglipVisionConfig(**config.to_dict() | {"vision_use_head": False})
    with torch.device("meta"):
        return [
            (transformers.SiglipVisionModel(config), "SigLIP"),
            (transformers.SiglipVisionModel(headless), "SigLIP"),
            (timm.create_model("vit_tiny_patch16_224", global_pool="avg"), "fc_norm"),
            (timm.create_model("beit_base_patch16_224"), "BEiT"),
            (timm.create_model("resnet18"), "ResNet"),
            (timm.create_model("resnet50"), "ResNet"),
            (timm.create_model("mixer_s32_224"), "ViT"),
        ]


def test_other_models_are_refused_by_family(tmp_path):
    for model, family in others():
        state = {key: torch.ones(()).expand(t.shape) for key, t in model.state_dict().items()}
        torch.save(state, tmp_path / "model.bin")
        with pytest.raises(
            ValueError, match=rf"model\.bin: .*{family}.*docs/any-model\.md"
        ) as error:
            vit.build(None, str(tmp_path / "model.bin"), 3)
        assert "\n" not in str(error.value)
    # the control: the mean after the last LayerNorm is supported
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_gap_224", embed_dim=192, depth=1)
    state = {key: torch.ones(()).expand(t.shape) for key, t in model.state_dict().items()}
    torch.save(state, tmp_path / "model.bin")
    assert vit.build(None, str(tmp_path / "model.bin"), 3, heads=3)[0].shape["pool"] == "mean"


def test_facebook_s_file_without_a_class_token(tmp_path):
    """I-JEPA: timm's names after "module.". The file's name does not name the family."""
    model = timm.create_model(
        "vit_base_patch16_gap_224", img_size=28, patch_size=7, embed_dim=64, depth=2, num_heads=4
    )
    model.reset_classifier(3)
    randomise_all(model)
    state = {k: t for k, t in model.state_dict().items() if not k.startswith("head.")}
    file = tmp_path / "IN1K-vit.h.14-300e.pth.tar"
    state = {f"module.{key}": t for key, t in state.items()}
    torch.save({"encoder": {}, "target_encoder": state, "epoch": 300}, file)
    built, found = vit.build(None, str(file), 3, heads=4)
    assert built.shape["pool"] == "mean" and found["mean"] == weights.IMAGENET["mean"]
    built.heads.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(built.eval()(images()), model(images()), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("folder", "mean"),
    [("dinosaurs", 0.5), ("maeve", 0.5), ("vit_mae", 0.485), ("dinov2-x", 0.485), ("deit3", 0.485)],
)
def test_a_folder_s_name_names_a_family_by_whole_words_alone(folder, mean, tmp_path, capsys):
    file = tmp_path / folder / "plain.safetensors"
    file.parent.mkdir()
    save_file(timm_vit().state_dict(), file)
    assert vit.build(None, str(file), 3, heads=4)[1]["mean"][0] == mean
    assert f"mean [{mean}" in capsys.readouterr().out


def test_a_safetensors_file_is_one_by_its_name_in_any_case(tmp_path):
    state = timm_vit().state_dict()
    save_file(state, tmp_path / "MODEL.SAFETENSORS")
    vit.build(None, str(tmp_path / "MODEL.SAFETENSORS"), 3, heads=4)
    save_file(state, tmp_path / "model")
    torch.save(timm_vit(), tmp_path / "whole.pth")
    for name in ("model", "whole.pth"):
        with pytest.raises(
            ValueError, match="not a file of tensors alone; save the model's"
        ) as error:
            vit.build(None, str(tmp_path / name), 3, heads=4)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_a_full_run_s_file_is_weights_for_a_new_run_with_the_rule_of_today(tmp_path):
    write_adapter(tmp_path / "a.safetensors", "full")
    tensors, info = checkpoint.read_adapter(tmp_path / "a.safetensors")
    info["shape"] |= vit.OLD
    checkpoint.write_adapter(tmp_path / "b.safetensors", tensors, info)
    model, _ = vit.build(None, str(tmp_path / "b.safetensors"), 3)
    assert "old_positions" not in model.shape
