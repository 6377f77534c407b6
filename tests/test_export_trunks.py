"""Adapters of every family of trunks in transformers through PEFT, and back, and in torchvision."""

import json
from pathlib import Path

import peft
import pytest
import torch
import torchvision
import transformers
from adapters import write_adapter
from families import FAMILIES
from safetensors.torch import load_file
from torch import nn

import export
import train
import vit
from engine import checkpoint
from engine.layouts import renamed
from engine.start import read_source

IMAGES = torch.linspace(-2, 2, 2 * 3 * 56 * 56).reshape(2, 3, 56, 56).sin()
CASES = {  # the family of the files: transformers' class that opens the folder
    "timm DeiT": "ViTForImageClassification",
    "timm DeiT III": "Dinov2ForImageClassification",
    "timm DINOv2 registers": "Dinov2WithRegistersForImageClassification",
    "timm CLIP": "CLIPVisionModel",
    "DeiT": "DeiTForImageClassification",
    "DINOv2": "Dinov2ForImageClassification",
    "DINOv2 registers": "Dinov2WithRegistersForImageClassification",
    "I-JEPA": "IJepaForImageClassification",
    "CLIP quick_gelu": "CLIPVisionModel",
}
CLASSES = ["cat", "dog", "cow"]


def adapted(root: Path, family: str, case: str) -> nn.Module:
    """An adapter file root/a.safetensors on a tiny trunk of this family; return its model."""
    FAMILIES[family](root / "trunk", 56)
    return write_adapter(
        root / "a.safetensors", case, str(root / "trunk"), {"num_heads": 4}, CLASSES
    )


def opened(folder: Path) -> tuple[str, nn.Module]:
    """The base model of a folder in transformers, with PEFT around it, and its class's name."""
    base = Path(peft.PeftConfig.from_pretrained(folder).base_model_name_or_path)
    name = json.loads((base / "config.json").read_text())["architectures"][0]
    model, loading = getattr(transformers, name).from_pretrained(base, output_loading_info=True)
    missing = {key for key in loading["missing_keys"] if not key.startswith("classifier")}
    assert not missing and not loading["unexpected_keys"]
    return name, peft.PeftModel.from_pretrained(model, folder).eval()


def logits_of(model: nn.Module, folder: Path) -> torch.Tensor:
    """Their logits. CLIPVisionModel has no head: the folder has it beside."""
    out = model(IMAGES)
    if not (folder / "head.safetensors").exists():
        return out.logits
    head = load_file(folder / "head.safetensors")
    return out.pooler_output @ head["classifier.weight"].T + head["classifier.bias"]


@pytest.mark.parametrize("case", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_a_folder_opens_in_transformers_and_comes_back(family, case, tmp_path):
    model = adapted(tmp_path, family, case)
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    name, theirs = opened(tmp_path / "folder")
    assert name == CASES[family]
    logits = logits_of(theirs, tmp_path / "folder")
    torch.testing.assert_close(logits, model(IMAGES), rtol=0, atol=2e-5)
    # the control: without the adapter, the logits differ
    with theirs.disable_adapter():
        assert (logits_of(theirs, tmp_path / "folder") - logits).abs().max() > 1e-2
    export.from_peft(tmp_path / "folder", tmp_path / "b.safetensors")
    (a, info), (b, back) = (
        checkpoint.read_adapter(tmp_path / f"{n}.safetensors") for n in ("a", "b")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    info["preprocessing"].setdefault("interpolation", "bilinear")
    assert back == {**info, "weights": str(tmp_path / "folder" / "base")}
    loaded, _ = vit.load_adapter(tmp_path / "b.safetensors")
    assert torch.equal(loaded(IMAGES), model(IMAGES))


TRAINED = {  # the class of transformers: the names of some of its layers
    "Dinov2ForImageClassification": ["q_proj", "fc2"],
    "Dinov2WithRegistersForImageClassification": ["v_proj", "fc1"],
    "DeiTForImageClassification": ["q_proj", "o_proj"],
    "IJepaForImageClassification": ["k_proj", "fc1"],
}


def peft_trained(root: Path, name: str, config: peft.PeftConfig) -> nn.Module:
    """A model of transformers, trained a little with PEFT and saved in root/folder."""
    family = next(family for family, theirs in reversed(CASES.items()) if theirs == name)
    FAMILIES[family](root / "trunk", 56)
    base = getattr(transformers, name).from_pretrained(root / "trunk")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        nn.functional.cross_entropy(model(IMAGES).logits, torch.tensor([0, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "folder")
    return model.eval()


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_folder_that_peft_trained_comes_back(name, kind, tmp_path):
    alpha = {"lora_alpha" if kind == "LoraConfig" else "alpha": 5}
    config = getattr(peft, kind)(
        r=2, **alpha, target_modules=TRAINED[name], modules_to_save=["classifier"]
    )
    theirs = peft_trained(tmp_path, name, config)
    export.from_peft(tmp_path / "folder", tmp_path / "a.safetensors", classes=",".join(CLASSES))
    ours, info = vit.load_adapter(tmp_path / "a.safetensors")
    with torch.no_grad():
        logits = theirs(IMAGES).logits
        torch.testing.assert_close(ours(IMAGES), logits, rtol=0, atol=2e-5)
    wide = "Dinov2" in name  # its head reads class token and mean of the patches
    assert info["shape"]["pool"] == ("class+mean" if wide else ours.shape["pool"])
    if wide:  # the control: the class token alone gives other logits
        ours.heads.head.weight.data[:, 64:] = 0
        assert (ours(IMAGES) - logits).abs().max() > 1e-3
    # and once more into a folder, which PEFT opens with the same logits
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "again")
    with torch.no_grad():
        again = opened(tmp_path / "again")[1](IMAGES).logits
    torch.testing.assert_close(again, logits, rtol=0, atol=2e-5)


def test_a_run_starts_from_a_folder_of_dinov2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted(tmp_path, "DINOv2", "lora")
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    source = read_source("folder")
    assert source.settings["weights"] == str(tmp_path / "folder" / "base")
    flags = "--limit 20 --epochs 1 --batch-size 10 --lr 1e-9 --workers 0 --out run"
    assert train.main(["--init-adapter", "folder", *flags.split()]) == 0
    before, _ = checkpoint.read_adapter("a.safetensors")
    after, info = checkpoint.read_adapter("run")
    assert info["shape"]["layer_scale"] and info["targets"] == "query,value"
    for key in before.keys() - {"heads.head.weight", "heads.head.bias"}:  # digits: other classes
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("family", ["timm DeiT III", "DINOv2", "timm miil"])
def test_stock_torchvision_holds_what_it_can(family, tmp_path):
    """LayerScale is multiplied into the layers before it, after the merge."""
    model = adapted(tmp_path, family, "lokr")
    expression = export.to_torchvision(tmp_path / "a.safetensors", tmp_path / "merged.pth")
    stock = eval(expression, {"torchvision": torchvision}).eval()
    stock.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(stock(IMAGES), model(IMAGES), rtol=0, atol=2e-5)
    if family != "timm miil":  # the control: LayerScale does something
        for block in model.encoder.layers:
            block.dropout.gamma.data.fill_(1)
        assert (model(IMAGES) - stock(IMAGES)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("DINOv2 registers", "prefix_tokens: torchvision's own VisionTransformer expects 1,"),
        ("CLIP", "pre_norm: torchvision's own VisionTransformer expects False,"),
        ("timm CLIP quickgelu", "pre_norm: "),
        ("I-JEPA", "prefix_tokens: "),
        ("DINOv2 giant", "activation: .* this trunk has 'swiglu'"),
    ],
)
def test_what_stock_torchvision_cannot_hold_is_one_line(family, message, tmp_path):
    adapted(tmp_path, family, "lora")
    with pytest.raises(ValueError, match=message) as error:
        export.to_torchvision(tmp_path / "a.safetensors", tmp_path / "merged.pth")
    assert "\n" not in str(error.value) and not (tmp_path / "merged.pth").exists()


def test_what_transformers_has_no_place_for_is_one_line(tmp_path):
    """A SwiGLU's first layer is two layers there; CLIP's classifier reads something else."""
    FAMILIES["DINOv2 giant"](tmp_path / "trunk", 56)
    write_adapter(
        tmp_path / "a.safetensors", "lokr", str(tmp_path / "trunk"), {"num_heads": 4}, CLASSES
    )
    with pytest.raises(ValueError, match="the MLP of a SwiGLU has other layers"):
        export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    trunk = str(tmp_path / "trunk"), {"num_heads": 4}, CLASSES
    for case, message in (
        ("lora-bias", "the MLP of a SwiGLU has other layers"),  # mlp.3
        ("loha-bias", "--bias all: transformers' class lacks some of these biases"),
    ):
        write_adapter(tmp_path / "a.safetensors", case, *trunk)
        with pytest.raises(ValueError, match=message):
            export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    part = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=part, text_config=part, num_labels=3)
    model = transformers.CLIPForImageClassification(config)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="CLIPForImageClassification, whose head reads the mean"):
        export.from_peft(tmp_path / "clip", tmp_path / "b.safetensors", classes="x,y,z")
    part = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1], "num_heads": [2]}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**part, num_labels=3))
    layers = [name for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    lora = peft.LoraConfig(r=2, target_modules=layers[:1], modules_to_save=["classifier"])
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="expected a tensor of a ViT, found an unknown name"):
        export.from_peft(tmp_path / "swin", tmp_path / "b.safetensors", classes="x,y,z")


def test_adapters_of_a_giant_open_in_transformers(tmp_path):
    """Layers of its attention: those of a SwiGLU's MLP are others there."""
    FAMILIES["DINOv2 giant"](tmp_path / "trunk", 56)
    path = tmp_path / "a.safetensors"
    model = write_adapter(path, "lora", str(tmp_path / "trunk"), {"num_heads": 4}, CLASSES)
    export.to_peft(path, tmp_path / "folder")
    name, theirs = opened(tmp_path / "folder")
    with torch.no_grad():
        logits = theirs(IMAGES).logits
        torch.testing.assert_close(logits, model(IMAGES), rtol=0, atol=2e-5)
    assert name == "Dinov2ForImageClassification"
    assert renamed("a.3.b.x", {"a.{}.b": "c.{}.d"}) is None  # a is no name of blocks
