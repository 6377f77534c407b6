"""Pretrained weights of Hugging Face and timm: the logits of their own models, from every kind of file."""

import json

import pytest
import torch
from hf import hf_vit, timm_vit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTModel

import attention
import vit
from engine import checkpoint
from engine.adapt import ADAPT, adapt


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images():
    return torch.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28).sin()


def ours(weights, head: nn.Linear, **more) -> torch.Tensor:
    """The logits of our model with these weights and the other library's head."""
    model, preprocessing = vit.build("vit_mini", str(weights), 3, **more)
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
    wrong = ours(path, model.classifier, eps=1e-6)
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
        ({"size": 224, "do_resize": True}, {}),  # as in google's in21k
        ({"size": {"height": 224, "width": 224}, "do_center_crop": False}, {}),
        (
            {"size": 256, "crop_size": 224, "do_center_crop": True},
            {"image_size": 224, "crop": 0.875},
        ),
        (
            {
                "size": {"shortest_edge": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
            },
            {"image_size": 224, "crop": 0.875},
        ),
    ],
    ids=str,
)
def test_images_are_prepared_as_the_folder_of_the_weights_says(config, found, tmp_path):
    model = hf_vit()
    model.save_pretrained(tmp_path)
    assert vit.build("vit_mini", str(tmp_path), 3)[1] == {**vit.HALF, "image_size": 28}
    config = config | {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    colours = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0]}
    assert vit.preprocessing_in(tmp_path) == found | colours
    expected = {**vit.HALF, **found, **colours, "image_size": 28}  # the model's
    assert vit.build("vit_mini", str(tmp_path), 3)[1] == expected


def test_a_crop_larger_than_the_image_is_refused(tmp_path):
    config = {"size": {"shortest_edge": 100}, "crop_size": {"height": 112}, "do_center_crop": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"crop_size: expected at most 100, .* found 112"):
        vit.preprocessing_in(tmp_path)


def test_timm_s_logits(tmp_path):
    model = timm_vit()
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    logits = ours(tmp_path / "timm.safetensors", model.head)
    torch.testing.assert_close(logits, model(images()), rtol=0, atol=1e-10)


def test_an_adapter_file_stores_the_eps_of_its_pretrained_weights(tmp_path):
    """With --adapter full too, where no pretrained weights are loaded."""
    model = hf_vit(layer_norm_eps=1e-3)
    model.save_pretrained(tmp_path / "trunk")
    for adapter in ("lora", "full"):
        built, preprocessing = vit.build("vit_mini", str(tmp_path / "trunk"), 3)
        adapt(built, adapter)
        info = {key: None for key in ADAPT} | dict(
            adapter=adapter, rank=4, alpha=32.0, targets="all", bias="none", factor=-1
        )
        info |= {"decompose_both": False, "model": "vit_mini", "weights": str(tmp_path / "trunk")}
        info |= {"seed": 0, "trunk": checkpoint.fingerprint(built), "classes": ["a", "b", "c"]}
        info |= {"preprocessing": preprocessing, "eps": built.encoder.ln.eps}
        path = tmp_path / f"{adapter}.safetensors"
        checkpoint.save_adapter(path, built, info)
        loaded, _ = vit.load_adapter(path)
        assert loaded.encoder.layers[2].ln_1.eps == 1e-3
        assert torch.equal(loaded(images()), built.eval()(images()))
    trunk, _ = vit.build("vit_mini", str(path), 3)  # the fully trained model as pretrained weights
    assert trunk.encoder.ln.eps == 1e-3


def snapshot(home):
    return (
        home / "hub" / "models--google--vit-base-patch16-224-in21k" / "snapshots" / "b4569560a39a"
    )


def published(folder, seed=0):
    """Write a file in the published layout, at full size but in float16; return its tensors."""
    with torch.device("meta"):
        trunk = vit.VisionTransformer(**vit.MODELS["vit_b_16"])
        trunk = attention.split_attention(trunk)
    theirs = vit.names("vit_b_16", "hf")
    generator = torch.Generator().manual_seed(seed)
    tensors = {"pooler.dense.bias": torch.zeros(768, dtype=torch.float16)}
    for name, p in trunk.named_parameters():
        module, _, last = name.rpartition(".")
        key = theirs.get(name) or f"{theirs.get(module)}.{last}"
        if not name.startswith("heads."):
            values = torch.randn(p.numel() % 97 + 1, generator=generator, dtype=torch.float32)
            values = values.repeat(p.numel() // len(values) + 1)[: p.numel()]
            tensors[key] = (0.02 * values).reshape(p.shape).half()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The home of a machine without pretrained weights."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(vit, "KAGGLE", tmp_path / "kaggle")
    return tmp_path


def test_in21k_is_read_from_hugging_face_s_cache(machine):
    tensors = published(snapshot(machine / "home"))
    model, preprocessing = vit.build("vit_b_16", "in21k", 7)
    key = "encoder.layer.7.attention.attention.value.weight"
    value = model.encoder.layers.encoder_layer_7.self_attention.value.weight
    assert torch.equal(value, tensors[key].float())
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    assert preprocessing == {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop": 1.0,
        "image_size": 224,
    }


@pytest.mark.parametrize(
    "folder", ["vit-base-patch16-224-in21k", "kaggle/a/b/vit-base-patch16-224-in21k/1"]
)
def test_in21k_is_found_in_the_known_folders(folder, machine):
    (machine / folder).mkdir(parents=True)
    (machine / folder / "pytorch_model.bin").write_bytes(b"")
    assert (machine / folder / "pytorch_model.bin").samefile(vit.find_in21k())


def test_in21k_is_downloaded_once_and_a_failure_is_one_line(machine):
    (machine / "remote").mkdir()
    save_file({"x": torch.ones(1)}, machine / "remote" / "model.safetensors")
    url = (machine / "remote" / "model.safetensors").as_uri()
    with pytest.raises(OSError, match=r"hf download google/vit-base") as error:
        vit.find_in21k(url + "-not")
    assert str(machine / "home") in str(error.value) and "\n" not in str(error.value)
    broken = machine / "remote" / "broken"
    broken.write_bytes((machine / "remote" / "model.safetensors").read_bytes()[:-2])
    with pytest.raises(OSError, match=r"cannot be downloaded \(.*ncomplete"):
        vit.find_in21k(broken.as_uri())
    file = vit.find_in21k(url)
    assert file.read_bytes() == (machine / "remote" / "model.safetensors").read_bytes()
    assert vit.find_in21k("file:///nowhere") == file


def test_wrong_files_are_refused_with_the_key(tmp_path):
    state = old_names(hf_vit())
    key = "encoder.layer.3.attention.attention.query.weight"
    for change, message in [
        (lambda s: s.pop("vit." + key), rf"{key}: expected a tensor, found none"),
        (
            lambda s: s.update({"vit.embeddings.mask_token": torch.ones(1)}),
            "mask_token: expected no",
        ),
        (lambda s: s.update({"vit." + key: torch.ones(2, 2)}), r"\(128, 128\), found \(2, 2\)"),
    ]:
        changed = dict(state)
        change(changed)
        save_file(changed, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            vit.build("vit_mini", str(tmp_path / "wrong.safetensors"))
        assert "wrong.safetensors" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"layer_norm_eps": 1e-12}))
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or .* found config"):
        vit.build("vit_mini", str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="--weights in21k: these are vit_b_16's"):
        vit.build("vit_mini", "in21k")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_malicious_bin_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    torch.save({**old_names(hf_vit()), "more": Bomb()}, "folder/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a file of tensors"):
        vit.build("vit_mini", "folder")
    assert not (tmp_path / "bomb-went-off").exists()
    torch.load("folder/pytorch_model.bin", weights_only=False)
    assert (tmp_path / "bomb-went-off").exists(), "the control: unpickling runs its code"
