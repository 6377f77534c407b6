"""Plain ViTs of every family: their own libraries' logits, PEFT's gradients, and what is refused, and how."""

import json
import re
import shutil

import peft
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from families import FAMILIES, SHAPE
from hf import randomise_all
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

import vit
from engine.adapt import adapt
from engine.layouts import LAYOUTS, renamed, to_ours

SIDE = 56  # four patches of 14 a side
every_family = pytest.mark.parametrize("family", FAMILIES)
transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(side=SIDE):
    return torch.linspace(-2, 2, 2 * 3 * side * side).reshape(2, 3, side, side).sin()


def unsaid(family) -> dict:
    """What no file says: the head of transformers' DINOv2 also reads the mean of the patches."""
    return {"pool": "class+mean"} if family.startswith("DINOv2") else {}


def ours(path, head: nn.Linear, given: dict | None = None, **more) -> nn.Module:
    """Our model with these weights and the other library's head, where that has one."""
    model, _ = vit.build(given or None, str(path), 3, **more)
    if isinstance(head, nn.Linear):
        model.heads.head.load_state_dict(head.state_dict())
    return model.eval()


@torch.no_grad()
def distance(model, theirs, side=SIDE) -> float:
    """The largest difference of two models' logits."""
    a, b = model(images(side)), theirs(images(side))
    assert a.shape == b.shape == (2, 3) and b.abs().max() > 0.1
    return (a - b).abs().max().item()


# Logits


@every_family
def test_logits_are_the_library_s_own(family, tmp_path):
    """config.json says the heads (4, not width / 64), eps and activation."""
    _, head, theirs = FAMILIES[family](tmp_path / "a", SIDE)
    model = ours(tmp_path / "a", head, unsaid(family))
    assert distance(model, theirs) < 1e-12
    assert model.shape["num_heads"] == 4 and model.shape["num_layers"] == 2


@every_family
def test_a_wrong_number_of_heads_and_a_wrong_eps_show_in_the_logits(family, tmp_path):
    """The control of all tests of logits."""
    _, head, theirs = FAMILIES[family](tmp_path / "a", SIDE)
    given = unsaid(family)
    assert distance(ours(tmp_path / "a", head, {**given, "eps": 1e-2}), theirs) > 1e-4
    change(tmp_path / "a" / "config.json", num_attention_heads=2, model_args={"num_heads": 2})
    assert distance(ours(tmp_path / "a", head, given), theirs) > 1e-6


@pytest.mark.parametrize("side", [42, 84])
@every_family
def test_logits_at_another_size(family, side, tmp_path):
    """timm: its own checkpoint filter. transformers: a model of that size with timm's position embeddings."""
    model, head, _ = FAMILIES[family](tmp_path / "a", SIDE)
    other, _, theirs = FAMILIES[family](tmp_path / "b", side)
    other.load_state_dict(at_size(model.state_dict(), other, side // 14))
    given = unsaid(family)
    assert distance(ours(tmp_path / "a", head, given, image_size=side), theirs, side) < 1e-12
    # the control: torchvision's interpolation
    old = ours(tmp_path / "a", head, {**given, "old_positions": True}, image_size=side)
    assert distance(old, theirs, side) > 1e-6


def at_size(state: dict, other: nn.Module, patches: int) -> dict:
    """A state dict with the position embeddings of a model of another size."""
    if isinstance(other, timm.models.VisionTransformer):
        return checkpoint_filter_fn(state, other)
    key = next(key for key in state if re.search(r"position_embeddings?(\.weight)?$", key))
    rows, width = state[key].shape[-2:]
    rows = resample_abs_pos_embed(
        state[key].reshape(1, rows, width), (patches, patches), num_prefix_tokens=rows - 16
    )
    return {**state, key: rows.reshape(-1, width) if key.endswith("weight") else rows}


@pytest.mark.parametrize("prefix", ["with prefix", "without"])
@pytest.mark.parametrize("names", ["file", "memory"])
@pytest.mark.parametrize(
    "family", ["ViT", "DeiT", "DINOv2", "DINOv2 registers", "I-JEPA", "CLIP", "DINOv2 giant"]
)
def test_transformers_names_in_files_and_in_memory(family, names, prefix, tmp_path):
    """transformers 5 has other names in memory than in files, for all but CLIP."""
    model, head, theirs = FAMILIES[family](tmp_path / "a", SIDE)
    states = {"memory": model.state_dict(), "file": load_file(tmp_path / "a/model.safetensors")}
    assert (states["memory"].keys() == states["file"].keys()) == (family == "CLIP")
    start = r"^(vit|deit|dinov2|dinov2_with_registers|ijepa|vision_model)\."
    bare = {re.sub(start, "", key): tensor for key, tensor in states[names].items()}
    state = bare
    if prefix != "without":
        known = {"ViT": "vit", "DeiT": "deit", "I-JEPA": "ijepa", "CLIP": "vision_model"}
        known["DINOv2 registers"] = "dinov2_with_registers"
        before = known.get(family, "dinov2") + "."
        state = {k if k.startswith("classifier") else before + k: t for k, t in bare.items()}
        assert family == "CLIP" or state.keys() == states[names].keys(), "what it is in fact"
    torch.save(state, tmp_path / "a" / "trunk.bin")
    model = ours(tmp_path / "a" / "trunk.bin", head, unsaid(family))
    assert distance(model, theirs) < 1e-12


def filtered(model, state: dict, **more) -> nn.Module:
    """timm's model with another project's tensors, which timm renames."""
    model.load_state_dict(checkpoint_filter_fn(dict(state), model, **more))
    return model


def tensors_of(model) -> dict:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def facebook_dinov2(model):
    """dinov2_vits14_pretrain.pth."""
    state = tensors_of(model) | {"mask_token": draw(1, 64)}
    return state, filtered(model, state)


def facebook_dinov2_registers(model):
    """dinov2_vits14_reg4_pretrain.pth: the class token has a position, the registers have none."""
    state = tensors_of(model) | {"mask_token": draw(1, 64)}
    state["register_tokens"] = state.pop("reg_token")
    state["pos_embed"] = torch.cat([draw(1, 1, 64), state["pos_embed"]], 1)
    return state, filtered(model, state)


def facebook_dinov2_giant(model):
    """dinov2_vitg14_pretrain.pth."""
    fb = {"fc1": "w12", "fc2": "w3"}
    state = {
        re.sub(r"mlp\.(fc\d)", lambda m: f"mlp.{fb[m[1]]}", key): tensor
        for key, tensor in tensors_of(model).items()
    }
    state["mask_token"] = draw(1, 64)
    return state, filtered(model, state)


def facebook_deit(model):
    """deit_small_patch16_224-cd65a155.pth."""
    return {"model": model.state_dict()}, model


def facebook_deit3(model):
    """deit_3_small_224_1k.pth."""
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): t for key, t in model.state_dict().items()}
    assert "blocks.1.gamma_2" in state
    return {"model": state}, filtered(model, state, adapt_layer_scale=True)


def facebook_dino(model):
    """dino_deitsmall8_pretrain.pth: the trunk alone."""
    return {k: t for k, t in model.state_dict().items() if not k.startswith("head.")}, model


def facebook_mae(model):
    """mae_visualize_vit_base.pth: with decoder and without head."""
    state, _ = facebook_dino(model)
    shapes = {"mask_token": (1, 1, 32), "decoder_pos_embed": (1, 17, 32)}
    shapes |= {"decoder_embed.weight": (32, 64), "decoder_blocks.0.norm1.weight": (32,)}
    shapes |= {"decoder_blocks.1.attn.qkv.weight": (96, 32), "decoder_norm.bias": (32,)}
    shapes |= {"decoder_pred.weight": (588, 32)}
    return {"model": state | {key: draw(*shape) for key, shape in shapes.items()}}, model


FACEBOOK = {
    facebook_dinov2: "timm DINOv2",
    facebook_dinov2_registers: "timm DINOv2 registers",
    facebook_dinov2_giant: "timm giant",
    facebook_deit: "timm DeiT",
    facebook_deit3: "timm DeiT III",
    facebook_dino: "timm DeiT",
    facebook_mae: "timm DeiT",
}


@pytest.mark.parametrize("file", FACEBOOK, ids=lambda file: file.__name__)
def test_facebook_s_own_files(file, tmp_path):
    """Against timm's model, into which timm loads the same tensors. No config.json lies beside."""
    model, head, _ = FAMILIES[FACEBOOK[file]](tmp_path / "a", SIDE)
    state, theirs = file(model)
    torch.save(state, tmp_path / f"{file.__name__}.pth")
    model = ours(tmp_path / f"{file.__name__}.pth", head, heads=4)
    assert distance(model, theirs) < 1e-12
    if "registers" in file.__name__:  # the control: what a model without the registers says
        with torch.no_grad():
            model.class_token[:, 1:] = 0
        assert distance(model, theirs) > 1e-4
    _, preprocessing = vit.build(None, str(tmp_path / f"{file.__name__}.pth"), 3, heads=4)
    assert preprocessing["mean"] == vit.IMAGENET["mean"]


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_openclip_s_files(file, quick, tmp_path):
    """Against timm's model, into which timm loads the same tensors. The text tower, as wide, is left out."""
    family = "timm CLIP quickgelu" if quick else "timm CLIP"
    model, _, _ = FAMILIES[family](tmp_path / "timm", SIDE)
    state = openclip(model.state_dict())
    theirs = filtered(model, state)
    text = {"positional_embedding": (77, 64), "token_embedding.weight": (9, 64), "logit_scale": ()}
    text |= {"transformer.resblocks.0.ln_1.weight": (64,), "ln_final.weight": (64,)}
    text |= {"transformer.resblocks.0.attn.in_proj_weight": (192, 64), "text_projection": (64, 3)}
    state |= {key: draw(*shape) for key, shape in text.items()}
    folder = write_openclip(tmp_path / "a", state, file, quick_gelu=quick)
    assert distance(ours(folder, theirs.head), theirs) < 1e-12
    assert vit.build(None, str(folder), 3)[1]["mean"] == [0.4, 0.5, 0.6]
    shutil.rmtree(folder)  # the control
    folder = write_openclip(folder, state, file, quick_gelu=not quick)
    assert distance(ours(folder, theirs.head), theirs) > 1e-6


def write_openclip(folder, state, file="open_clip_model.safetensors", **more):
    """A folder as OpenCLIP's push_to_hf_hub writes it."""
    folder.mkdir()
    (torch.save if file.endswith("bin") else save_file)(state, folder / file)
    vision = {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14}
    cfg = {"embed_dim": 3, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 1}, **more}
    images = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bicubic"}
    config = {"model_cfg": cfg, "preprocess_cfg": images}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def openclip(state: dict) -> dict:
    """timm's CLIP under OpenCLIP's names. Its projection is the head; the head's bias is timm's, zeros."""
    names = {"patch_embed.proj": "conv1", "blocks": "transformer.resblocks", "norm_pre": "ln_pre"}
    names |= {"norm1": "ln_1", "norm2": "ln_2", "norm": "ln_post", "qkv": "in_proj"}
    names |= {
        "attn.proj": "attn.out_proj",
        "fc1": "c_fc",
        "fc2": "c_proj",
        "cls_token": "class_embedding",
    }
    names |= {"pos_embed": "positional_embedding"}
    found = {}
    for key, tensor in state.items():
        for theirs, name in names.items():
            key = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.|$)", rf"\1{name}", key)
        key = re.sub(r"in_proj\.", "in_proj_", key)
        if key in ("class_embedding", "positional_embedding"):
            tensor = tensor.reshape(-1, 64).squeeze(0)
        if key == "head.weight":
            key, tensor = "proj", tensor.mT.contiguous()
        found[f"visual.{key}"] = tensor
    del found["visual.head.bias"]
    return found


# Gradients

ADAPTERS = {
    "lora": lambda names: peft.LoraConfig(r=2, lora_alpha=3, target_modules=names),
    "loha": lambda names: peft.LoHaConfig(r=2, alpha=3, target_modules=names),
    "lokr": lambda names: peft.LoKrConfig(r=2, alpha=3, target_modules=names),
}
IN_MEMORY = {
    "ViT": ("vit.", "vit5"),
    "DINOv2": ("dinov2.", "dinov2-5"),
    "DINOv2 registers": ("dinov2_with_registers.", "dinov2-5"),
    "CLIP": ("vision_model.", "clip"),
}


def adapted(family, adapter, folder):
    """Our model, transformers' with PEFT's adapter, and the pairs of their trained tensors, made equal."""
    theirs, head, logits = FAMILIES[family](folder, SIDE)
    model = ours(folder, head, unsaid(family))
    adapt(model, adapter, rank=2, alpha=3.0, targets="all")
    prefix, layout = IN_MEMORY[family]
    if not any(name.startswith(prefix) for name, _ in theirs.named_modules()):
        prefix = ""
    layers = {
        n: prefix + renamed(n, LAYOUTS[layout])
        for n, m in model.named_modules()
        if hasattr(m, "linear")
    }
    assert len(layers) == 2 * 6
    wrapped = peft.get_peft_model(theirs, ADAPTERS[adapter](list(layers.values()))).eval()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    pairs, generator = {}, torch.Generator().manual_seed(1)
    for name, layer in layers.items():
        for factor, p in model.get_submodule(name).named_parameters(recurse=False):
            start = f"base_model.model.{layer}.{factor}.default"
            q = trained.pop(start, None)
            q = trained.pop(f"{start}.weight") if q is None else q
            q.data.copy_(torch.randn(q.shape, generator=generator) / 4)
            p.data.copy_(q.data)
            pairs[f"{name}.{factor}"] = p, q
    assert not trained
    return model, logits, pairs


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", IN_MEMORY)
def test_gradients_of_all_adapters_are_peft_s_on_the_original_model(family, adapter, tmp_path):
    model, logits, pairs = adapted(family, adapter, tmp_path / "a")
    labels = torch.tensor([2, 0])
    losses = [F.cross_entropy(f(images()), labels) for f in (model, logits)]
    for loss in losses:
        loss.backward()
    assert abs(losses[0] - losses[1]) < 1e-12
    for name, (p, q) in pairs.items():
        assert p.grad.any() and (p.grad - q.grad).norm() < 1e-10 * q.grad.norm(), name
    # the control: without the adapters, and with another gamma, it is another loss
    plain = F.cross_entropy(ours(tmp_path / "a", None, unsaid(family))(images()), labels)
    assert abs(losses[0] - plain) > 1e-3
    for block in model.encoder.layers:
        if isinstance(getattr(block, "dropout", None), vit.LayerScale):
            block.dropout.gamma.data.fill_(1)
            assert abs(F.cross_entropy(model(images()), labels) - losses[1]) > 1e-4


@pytest.mark.parametrize("family", ["timm DeiT III", "DINOv2", "DINOv2 giant"])
def test_layer_scale_is_a_frozen_parameter_that_no_step_changes(family, tmp_path):
    theirs, head, _ = FAMILIES[family](tmp_path / "a", SIDE)
    model = ours(tmp_path / "a", head, unsaid(family))
    adapt(model, "lora", rank=2, alpha=3.0)
    gammas = {name: p for name, p in model.named_parameters() if name.endswith("gamma")}
    original = [p for name, p in theirs.named_parameters() if re.search(r"gamma|lambda1$", name)]
    assert len(gammas) == len(original) == 4 and not any(p.requires_grad for p in gammas.values())
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        F.cross_entropy(model(images()), torch.tensor([2, 0])).backward()
        optimizer.step()
    for (name, gamma), p in zip(gammas.items(), original, strict=True):
        assert torch.equal(gamma, before[name]) and torch.equal(gamma, p), name
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) == 2 * 6 * 2 + 2, "the control: adapters and head"


# Heads


def wide(width, path, **config):
    """A file of a ViT of one block and this width, which holds one number."""
    with torch.device("meta"):
        model = timm.models.VisionTransformer(
            img_size=28, patch_size=14, embed_dim=width, depth=1, num_heads=1, mlp_ratio=0.25
        )
    path.parent.mkdir(exist_ok=True)
    state = {key: torch.ones(1).expand(t.shape) for key, t in model.state_dict().items()}
    torch.save(state, path)
    if config:
        (path.parent / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("width", "heads"), [(1152, 16), (1280, 16), (1408, 16), (1536, 24), (1664, 16), (128, None)]
)
def test_a_width_without_a_rule_asks_for_heads(width, heads, tmp_path):
    weights = wide(width, tmp_path / "trunk.pth")
    with pytest.raises(ValueError, match="--heads") as error:
        vit.build(None, weights, 3)
    message = str(error.value)
    assert "trunk.pth" in message and "\n" not in message
    assert (f"width {width} have {heads}" in message) == bool(heads)
    assert vit.build(None, weights, 3, heads=8)[0].shape["num_heads"] == 8
    if heads:  # timm's config.json names the model
        weights = wide(width, tmp_path / "named" / "trunk.pth", architecture="vit_x")
        assert vit.build(None, weights, 3)[0].shape["num_heads"] == heads


def test_the_rule_for_heads_is_printed(tmp_path, capsys):
    model, _ = vit.build(None, wide(384, tmp_path / "trunk.pth"), 3)
    assert model.shape["num_heads"] == 6
    assert "6 heads (width / 64)" in capsys.readouterr().out
    model, _ = vit.build(None, wide(384, tmp_path / "trunk.pth"), 3, heads=4)
    assert model.shape["num_heads"] == 4
    assert "width / 64" not in capsys.readouterr().out


def test_heads_that_cannot_be_are_refused(tmp_path):
    for family in ("ViT", "timm DeiT"):
        FAMILIES[family](tmp_path / family, SIDE)
        with pytest.raises(ValueError, match=r"says 4 attention heads, and .* says 2") as error:
            vit.build(None, str(tmp_path / family), 3, heads=2)
        assert family in str(error.value) and "\n" not in str(error.value)
        vit.build(None, str(tmp_path / family), 3, heads=4)  # the control
    weights = wide(384, tmp_path / "trunk.pth")
    with pytest.raises(ValueError, match=r"trunk\.pth: .*divides the width, 384, found 5"):
        vit.build(None, weights, 3, heads=5)


# Refusals

TIMM = {
    "vit_small_patch16_dinov3": "DINOv3",
    "eva02_tiny_patch14_224": "EVA-02",
    "eva02_base_patch14_224": "EVA-02",
    "beit_base_patch16_224": "BEiT",
    "vit_base_patch16_siglip_224": "SigLIP",
    "swin_tiny_patch4_window7_224": "Swin",
    "swinv2_tiny_window8_256": "Swin",
    "convnext_atto": "ConvNeXt",
    "vit_base_r50_s16_224": "hybrid",
}


def assert_refused(error, family):
    message = str(error.value)
    assert family in message and "docs/any-model.md" in message and "\n" not in message


def test_clipa_is_refused(tmp_path):
    model, _, _ = FAMILIES["timm CLIP"](tmp_path / "timm", SIDE)
    state = openclip(model.state_dict())
    to_ours(dict(state))  # the control
    for end in ("weight", "bias"):
        del state[f"visual.ln_pre.{end}"]
    with pytest.raises(ValueError) as error:
        to_ours(state)
    assert_refused(error, "CLIPA")


@pytest.mark.parametrize("name", TIMM)
def test_timm_s_other_models_are_refused_by_family(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError) as error:
        to_ours(state)
    assert_refused(error, TIMM[name])


def test_a_convolutional_network_is_refused_with_its_first_tensors():
    with torch.device("meta"):
        state = timm.create_model("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"expected the tensors of a ViT .* found conv1\.weight"):
        to_ours(state)
    with torch.device("meta"):  # the control
        to_ours(timm.create_model("vit_tiny_patch16_224").state_dict())


HIERARCHY = {
    "image_size": SIDE,
    "patch_size": 7,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
}
OTHERS = {
    "DINOv3ViTModel": ("DINOv3ViT", SHAPE, "DINOv3"),
    "BeitForImageClassification": ("Beit", SHAPE, "BEiT"),
    "SiglipVisionModel": ("SiglipVision", SHAPE, "SigLIP"),
    "SwinForImageClassification": ("Swin", {**HIERARCHY, "window_size": 2}, "Swin"),
    "ConvNextForImageClassification": (
        "ConvNext",
        {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
        "ConvNeXt",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_transformers_other_models_are_refused_by_family(name, tmp_path):
    kind, settings, family = OTHERS[name]
    config = getattr(transformers, f"{kind}Config")(**settings)
    getattr(transformers, name)(config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError) as error:
        vit.build(None, str(tmp_path / "a"), 3)
    assert_refused(error, family)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        # rotary positions beside the usual ones: its tensors have the names of DeiT III's
        "vit_small_patch16_rope_ape_224",
        # registers, no class token, mean of the patches
        "vit_so150m_patch16_reg4_gap_256",
        "vit_medium_patch16_reg4_gap_256",
        "vit_base_patch16_siglip_gap_224",
        "cait_xxs24_224",
        "vit_medium_patch16_gap_240",
        "vit_base_patch16_clip_224",
    ],
)
def test_no_model_of_timm_is_silently_another(name, tmp_path):
    """Our logits are timm's, or the file is refused."""
    theirs = timm.create_model(name, img_size=64, embed_dim=64, depth=2, num_heads=4, num_classes=3)
    timm.models.save_for_hf(randomise_all(theirs), tmp_path / "a", safe_serialization=True)
    try:
        model = ours(tmp_path / "a", theirs.head)
    except ValueError:
        return
    assert distance(model, theirs, 64) < 1e-12


# What lies beside


def change(file, **values):
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | values))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("timm")])
def test_timm_s_images_are_prepared_as_timm_does(family, tmp_path):
    model, _, theirs = FAMILIES[family](tmp_path / "a", SIDE)
    _, preprocessing = vit.build(None, str(tmp_path / "a"), 3)
    data = timm.data.resolve_model_data_config(model)
    expected = {"mean": list(data["mean"]), "std": list(data["std"]), "crop": data["crop_pct"]}
    expected |= {"interpolation": data["interpolation"], "image_size": SIDE}
    assert preprocessing == expected
    if "DeiT" in family:
        assert preprocessing["mean"] == vit.IMAGENET["mean"] and preprocessing["crop"] == 0.9
        assert preprocessing["interpolation"] == "bicubic"
        # the control: another mean moves the logits
        pixels, wrong = images().abs(), {**preprocessing, **vit.HALF}
        with torch.no_grad():
            a, b = theirs(normalised(pixels, preprocessing)), theirs(normalised(pixels, wrong))
        assert (a - b).abs().max() > 0.01


def normalised(pixels, preprocessing):
    mean, std = (torch.tensor(preprocessing[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


# As facebook/dinov2-small has it.
DINOV2 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": {"shortest_edge": 256},
}
DINOV2_IMAGES = {**vit.IMAGENET, "crop": 0.875, "image_size": 224, "interpolation": "bicubic"}


def test_dinov2_s_images(tmp_path):
    """Its position embeddings are of 518 pixels. It trains at 224, with the file beside it and without."""
    FAMILIES["DINOv2"](tmp_path / "a", 518)
    model, without = vit.build(None, str(tmp_path / "a"), 3)
    change(tmp_path / "a" / "preprocessor_config.json", **DINOV2)
    _, beside = vit.build(None, str(tmp_path / "a"), 3)
    assert without == beside == DINOV2_IMAGES
    assert model.encoder.pos_embedding.shape == (1, 1 + 16 * 16, 64)
    whole = {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}}
    change(tmp_path / "a" / "preprocessor_config.json", **whole)
    assert vit.build(None, str(tmp_path / "a"), 3)[1] == {**DINOV2_IMAGES, "crop": 1.0}
    model, preprocessing = vit.build(None, str(tmp_path / "a"), 3, image_size=518)
    assert preprocessing["image_size"] == 518
    assert model.encoder.pos_embedding.shape == (1, 1 + 37 * 37, 64)


def test_a_timm_file_of_518_pixels_trains_at_224(tmp_path):
    FAMILIES["timm DINOv2"](tmp_path / "a", 518)
    _, preprocessing = vit.build(None, str(tmp_path / "a"), 3)
    assert preprocessing == {**DINOV2_IMAGES, "crop": 1.0}


CFG = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "input_size": [3, SIDE, SIDE]}
CFG |= {"interpolation": "bicubic"}
TOWER = {"width": 64, "head_width": 16}
HF, CONFIG, OPENCLIP = "preprocessor_config.json", "config.json", "open_clip_config.json"
WRONG = [  # family, file, what the file says, and the key that the error has to name
    ("ViT", HF, {"image_mean": 3}, "image_mean"),
    ("ViT", HF, {"image_std": [1, "x", 2]}, "image_std"),
    ("ViT", HF, {"resample": 99}, "resample"),
    ("ViT", HF, {"crop_size": "x"}, "crop_size"),
    ("ViT", HF, {"crop_size": {"height": "x"}}, "crop_size"),
    ("ViT", HF, {"size": "x"}, "size"),
    ("ViT", CONFIG, {"hidden_act": "relu"}, "hidden_act"),
    ("ViT", CONFIG, {"layer_norm_eps": "x"}, "layer_norm_eps"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": {**CFG, "mean": 3}}, "mean"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": {**CFG, "crop_pct": "x"}}, "crop_pct"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": {**CFG, "input_size": 3}}, "input_size"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": {**CFG, "interpolation": 3}}, "interpolation"),
    ("ViT", HF, {"resample": [3]}, "resample"),
    ("ViT", CONFIG, {"num_attention_heads": "six"}, "num_attention_heads"),
    ("CLIP", CONFIG, {"vision_config": 3}, "vision_config"),
    ("timm DeiT", CONFIG, {"model_args": 3}, "model_args"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": 3}, "pretrained_cfg"),
    ("timm DeiT", CONFIG, {"pretrained_cfg": {**CFG, "input_size": [3, 0, 0]}}, "input_size"),
    ("OpenCLIP", OPENCLIP, {"model_cfg": 3}, "model_cfg"),
    ("OpenCLIP", OPENCLIP, {"model_cfg": {"vision_cfg": 3}}, "vision_cfg"),
    ("OpenCLIP", OPENCLIP, {"model_cfg": {"vision_cfg": {"width": "x"}}}, "width"),
    ("OpenCLIP", OPENCLIP, {"model_cfg": {"vision_cfg": {**TOWER, "head_width": 0}}}, "head_width"),
    ("OpenCLIP", OPENCLIP, {"preprocess_cfg": 3}, "preprocess_cfg"),
    ("OpenCLIP", OPENCLIP, {"preprocess_cfg": {"mean": 3}}, "mean"),
]


@pytest.mark.parametrize(
    ("family", "file", "content", "key"),
    WRONG,
    ids=[f"{file}-{key}" for _, file, _, key in WRONG],
)
def test_a_wrong_value_beside_is_one_line_with_file_and_key(family, file, content, key, tmp_path):
    if family == "OpenCLIP":
        model, _, _ = FAMILIES["timm CLIP"](tmp_path / "timm", SIDE)
        folder = write_openclip(tmp_path / "a", openclip(model.state_dict()))
    else:
        folder = tmp_path / "a"
        FAMILIES[family](folder, SIDE)
    change(folder / file, **(DINOV2 if file == HF else {}))
    vit.build(None, str(folder), 3)  # the control
    change(folder / file, **content)
    with pytest.raises(ValueError) as error:
        vit.build(None, str(folder), 3)
    message = str(error.value)
    assert f"/{file}: " in message or f" {file}: " in message
    assert f"{key}: " in message and "\n" not in message


# Tensors


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("timm DeiT", "blocks.1.mlp.fc2.bias"),
        ("timm DeiT", "blocks.1.attn.qkv.weight"),
        ("timm DeiT III", "blocks.0.ls2.gamma"),
        ("ViT", "vit.encoder.layer.1.attention.attention.key.weight"),
        ("DINOv2", "dinov2.encoder.layer.1.layer_scale1.lambda1"),
        ("CLIP", "encoder.layers.0.layer_norm2.bias"),
    ],
)
def test_a_missing_an_unknown_and_a_wrong_tensor_are_named(family, missing, tmp_path):
    FAMILIES[family](tmp_path / "a", SIDE)
    file = tmp_path / "a" / "model.safetensors"
    state = load_file(file)
    missing = next(key for key in state if key.endswith(missing))
    block = re.match(r".*?\.\d\.", missing)[0]
    for changed, named in [
        ({k: t for k, t in state.items() if k != missing}, re.escape(missing)),
        (state | {f"{block}more": draw(3)}, r"more: expected no such tensor, found shape \(3,\)"),
        (state | {missing: draw(*state[missing].shape[:-1], 66)}, r"_\d\.\S+: expected shape .*66"),
    ]:
        save_file(changed, file)
        with pytest.raises(ValueError, match=named) as error:
            vit.build(unsaid(family), str(tmp_path / "a"), 3)
        assert str(tmp_path / "a") in str(error.value) and "\n" not in str(error.value)
    save_file(state, file)
    vit.build(unsaid(family), str(tmp_path / "a"), 3)  # the control
