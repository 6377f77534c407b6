"""The lines of docs/any-model.md, on SDXL's architecture: trained, saved, and opened by PEFT. And what the
page says of timm's and transformers' own models."""

import copy
import json
import warnings
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sdxl import TOKENS, predicted_noise, toy_sdxl
from test_docs import CODE, PYTHON, TEXTS
from torch import nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipForImageClassification,
)

from engine.peft_folder import load_peft, save_peft
from loha import LoHaLinear
from lokr import LoKrLinear
from lora import LoRALinear, mark_trainable, merge, replace_linear

SAVE, LOAD = (block for block in PYTHON if "style/unet" in block)
LOOP = "...  # your loop"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run the first block of docs/any-model.md: both models, the base, the folder and the losses."""
    root = tmp_path_factory.mktemp("sdxl")
    base = toy_sdxl(root / "base")
    snippet = SAVE.replace("stabilityai/stable-diffusion-xl-base-1.0", str(base))
    assert snippet.count(LOOP) == 1
    names = {"train": train, "losses": []}
    snippet = snippet.replace(LOOP, "losses += train(unet, text_encoder, sdxl)  #")
    exec(snippet.replace("style/", f"{root}/style/"), names)
    return names["unet"], names["text_encoder"], base, root / "style", names["losses"]


def train(unet, text_encoder, base, steps: int = 12) -> list[float]:
    """Train with the usual loss between predicted and true noise; return the losses."""
    torch.manual_seed(0)
    second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    parameters = [p for m in (unet, text_encoder) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    latents, tokens = torch.randn(4, 4, 8, 8), torch.randint(2, TOKENS, (4, 7))
    noise, timesteps = torch.randn_like(latents), torch.randint(1000, (4,))
    losses = []
    for _ in range(steps):
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = predicted_noise(unet, text_encoder, second, noisy, timesteps, tokens)
        loss = F.mse_loss(prediction, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def output(unet, text_encoder, base) -> torch.Tensor:
    """The predicted noise for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randint(2, TOKENS, (2, 7), generator=generator)
    second = CLIPTextModelWithProjection.from_pretrained(base, subfolder="text_encoder_2")
    for model in (unet, text_encoder):
        model.eval()
    return predicted_noise(unet, text_encoder, second, noisy, torch.tensor([10, 900]), tokens)


def opened(base, style, unet_folder=None):
    """The base's UNet and text encoder, each with its adapter loaded by PEFT."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    return (
        PeftModel.from_pretrained(unet, unet_folder or style / "unet"),
        PeftModel.from_pretrained(text_encoder, style / "text_encoder_one"),
    )


def test_the_adapters_of_both_models_learn(trained):
    unet, text_encoder, _, _, losses = trained
    assert losses[-1] < 0.9 * losses[0]
    wrapped = [name for name, m in unet.named_modules() if hasattr(m, "delta_weight")]
    assert {name.split(".")[-1] for name in wrapped} == {"to_q", "to_k", "to_v", "0"}
    # SDXL does not use the output of the text encoder's last layer, so this layer learns nothing.
    first, last = text_encoder.encoder.layers
    assert not any(m.delta_weight().any() for m in last.modules() if hasattr(m, "delta_weight"))
    for model, count in ((unet, len(wrapped)), (first, 4)):
        layers = [m for m in model.modules() if hasattr(m, "delta_weight")]
        assert len(layers) == count and all(m.delta_weight().any() for m in layers)
        assert not any(m.linear.weight.requires_grad for m in layers)


def test_peft_opens_both_folders_with_the_same_output(trained, tmp_path):
    unet, text_encoder, base, style, _ = trained
    ours = output(unet, text_encoder, base)
    torch.testing.assert_close(output(*opened(base, style), base), ours, rtol=0, atol=1e-5)
    config = json.loads((style / "unet" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert (config["r"], config["alpha"], config["peft_type"]) == (8, 8, "LOKR")
    # the controls: a wrong alpha, missing tensors
    file = style / "unet" / "adapter_model.safetensors"
    tensors = load_file(file)
    fewer = {key: t for key, t in tensors.items() if "up_blocks.0" not in key}
    assert len(fewer) < len(tensors)
    for n, (content, alpha) in enumerate([(tensors, 16), (fewer, 8)]):
        folder = tmp_path / str(n)
        folder.mkdir()
        save_file(content, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, "alpha": alpha}))
        assert (output(*opened(base, style, folder), base) - ours).abs().max() > 1e-3


def test_load_peft_gives_the_same_output_and_tensors_bit_for_bit(trained, tmp_path):
    unet, text_encoder, base, style, _ = trained
    loaded = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    load_peft(loaded, style / "unet")
    load_peft(text, style / "text_encoder_one")
    assert torch.equal(output(loaded, text, base), output(unet, text_encoder, base))
    save_peft(loaded, tmp_path / "again", base=str(base))
    before, after = style / "unet", tmp_path / "again"
    name = "adapter_config.json"
    assert (after / name).read_bytes() == (before / name).read_bytes()
    before, after = (load_file(path / "adapter_model.safetensors") for path in (before, after))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_head_and_biases_are_saved_and_loaded_with_any_model(tmp_path):
    def model():
        torch.manual_seed(0)
        parts = {"body": nn.Linear(6, 5), "act": nn.Tanh(), "classifier": nn.Linear(5, 3)}
        built = nn.Sequential()
        for name, part in parts.items():
            built.add_module(name, part)
        return built

    ours = model()
    replace_linear(ours, lambda layer: LoRALinear(layer, rank=2, alpha=3), "all", "classifier")
    mark_trainable(ours, "classifier", bias="adapter")
    for p in ours.parameters():
        if p.requires_grad:
            p.data += torch.randn_like(p)
    save_peft(ours, tmp_path / "folder", head="classifier")
    theirs = PeftModel.from_pretrained(model(), tmp_path / "folder").eval()
    x = torch.randn(4, 6)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    loaded = model()
    assert load_peft(loaded, tmp_path / "folder", head="classifier") == ["body"]
    assert torch.equal(loaded(x), ours(x))
    fresh = model()
    with pytest.raises(ValueError, match=r"classifier\.\w+: expected no such tensor"):
        load_peft(fresh, tmp_path / "folder")
    load_peft(fresh, tmp_path / "folder", head="classifier")  # the refused load changed nothing
    assert torch.equal(fresh(x), ours(x))


class Head(nn.Sequential):
    """Several layers with biases and buffers, and a buffer of the head itself."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 3))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, x):
        return super().forward(x) / self.temperature


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5)
        self.classifier = Head()

    def forward(self, x):
        return self.classifier(self.body(x))


@torch.no_grad()
def as_trained(model, x):
    """The model with noise in its trainable parameters and the statistics of x in BatchNorm's buffers."""
    for p in model.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p))
    model.train()(3 * x + 1)
    for name, buffer in model.named_buffers():
        if name.endswith("temperature"):
            buffer.fill_(2.5)
    return model.eval()


def test_a_head_of_several_layers_is_saved_with_its_buffers(tmp_path):
    x = torch.randn(8, 6)
    ours = WithHead()
    replace_linear(ours, lambda layer: LoRALinear(layer, rank=2, alpha=3), "all", "classifier")
    mark_trainable(ours, "classifier")
    save_peft(as_trained(ours, x), tmp_path / "ours", head="classifier")
    theirs = PeftModel.from_pretrained(WithHead(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)

    config = LoraConfig(r=2, target_modules=["body"], modules_to_save=["classifier"])
    theirs = as_trained(get_peft_model(WithHead(), config), x)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = WithHead()
    assert load_peft(loaded, tmp_path / "theirs", head="classifier") == ["body"]
    torch.testing.assert_close(loaded.eval()(x), theirs(x), rtol=0, atol=1e-5)


def test_models_that_a_peft_folder_cannot_hold_are_refused(tmp_path):
    def wrap(layer):
        return LoRALinear(layer, rank=2)

    tied = nn.Sequential()
    tied.add_module("a", nn.Linear(4, 4))
    tied.add_module("b", tied.a)
    replace_linear(tied, wrap)
    with pytest.raises(ValueError, match="a and b share one adapter"):
        save_peft(tied, tmp_path / "folder")
    twice = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Identity()])
    twice[1].first = twice[0][0]
    replace_linear(twice, wrap)
    with pytest.raises(ValueError, match=r"0\.0 and 1\.first share one adapter"):
        save_peft(twice, tmp_path / "folder")
    plain = nn.Sequential(nn.Linear(4, 4))
    replace_linear(plain, wrap)
    mark_trainable(plain, head="")
    with pytest.raises(ValueError, match="head='lm_head': expected a part of a parameter's name"):
        save_peft(plain, tmp_path / "folder", head="lm_head")
    headed = WithHead()
    replace_linear(headed, wrap, head="")
    with pytest.raises(ValueError, match=r"classifier\.1 is an adapter in the head"):
        save_peft(headed, tmp_path / "folder", head="classifier")
    assert not (tmp_path / "folder").exists()


def test_a_shared_block_is_saved_once(tmp_path):
    def model():
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        return nn.Sequential(block, block, block)

    ours = model()
    replace_linear(ours, lambda layer: LoRALinear(layer, rank=2))
    mark_trainable(ours, "")
    nn.init.normal_(ours[0][0].lora_B)
    save_peft(ours, tmp_path / "folder")
    x = torch.randn(3, 4)
    theirs = PeftModel.from_pretrained(model(), tmp_path / "folder").eval()
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    loaded = model()
    load_peft(loaded, tmp_path / "folder")
    assert torch.equal(loaded(x), ours(x))
    save_peft(loaded, tmp_path / "again")


PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
WINDOWS = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
WINDOWS["window_size"] = 4
CALL = {  # timm's models that call each of their layers
    "vit_small_patch16_224": PLAIN,
    "eva02_base_patch14_224": PLAIN,
    "vit_small_patch16_dinov3": PLAIN,
    "vit_base_patch16_siglip_224": PLAIN,
    "swin_tiny_patch4_window7_224": WINDOWS,
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)},
}
READ = {  # those that read qkv.weight instead
    "beit_base_patch16_224": PLAIN,
    "beitv2_base_patch16_224": PLAIN,
    "eva_giant_patch14_224": PLAIN,
    "eva02_tiny_patch14_224": PLAIN,
    "eva02_small_patch14_224": PLAIN,
    "swinv2_tiny_window8_256": WINDOWS,
    "vit_small_patch16_dinov3_qkvb": PLAIN,
}
TIMM = CALL | READ
SIZE = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 48}
SIZE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
LABELS = {"num_labels": 3}
TRANSFORMERS = {
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZE, **LABELS)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZE, pos_embed_rescale=None)),
    "beit": lambda: BeitForImageClassification(BeitConfig(**SIZE, **LABELS, drop_path_rate=0.0)),
    "siglip": lambda: SiglipForImageClassification(SiglipConfig(vision_config=SIZE, **LABELS)),
}
ADAPTERS = (LoRALinear, LoHaLinear, LoKrLinear)


def tiny(name):
    """A small float64 model, in training mode, without dropout. Each call gives the same random weights."""
    torch.manual_seed(0)
    if name in TIMM:
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.0, **TIMM[name])
    else:
        model = TRANSFORMERS[name]()
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # timm starts some LayerScale at 1e-5
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def logits(model):
    """The model's numbers for images()."""
    found = model(images())
    return (
        found
        if isinstance(found, torch.Tensor)
        else found.get("logits", found.get("pooler_output"))
    )


def loss_of(model):
    return F.cross_entropy(logits(model), torch.tensor([0, 1, 2, 0]))


def adapters_of(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "delta_weight")}


def factors_of(model):
    """The adapters' tensors. Those that are zero become random: the other factors get a gradient then."""
    factors = {
        f"{name}.{factor}": parameter
        for name, layer in adapters_of(model).items()
        for factor, parameter in layer.named_parameters(recurse=False)
    }
    for parameter in factors.values():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return factors


def without_gradient(parameters):
    return [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]


def linears(model, head):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and head not in n]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", [*TIMM, "dinov2", "dinov3", "beit"])
def test_other_libraries_models_train_and_merge(name, adapter):
    """The head stays frozen here, so the loss falls by the adapters alone."""
    model, head = tiny(name), "head" if name in TIMM else "classifier"
    layers, plain = linears(model, head), logits(model)
    assert torch.equal(logits(model), plain)
    wrap = partial(adapter, rank=2, alpha=3)
    assert replace_linear(model, wrap, "all", head=head) == layers
    mark_trainable(model, head="")
    torch.testing.assert_close(logits(model), plain, rtol=0, atol=1e-12)
    factors = factors_of(model)
    assert len(factors) >= 2 * len(layers)
    first = loss_of(model)
    first.backward()
    assert without_gradient(factors) == []
    optimizer = torch.optim.AdamW(factors.values(), lr=0.02)
    for _ in range(6):
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
    assert loss < 0.97 * first
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 1e-2
    merge(model)
    assert not adapters_of(model) and linears(model, head) == layers
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TIMM)
def test_which_models_read_qkv_s_weight(name):
    model, called = tiny(name), set()
    layers = linears(model, "head")
    for layer in layers:
        hook = partial(lambda layer, *_: called.add(layer), layer)
        model.get_submodule(layer).register_forward_hook(hook)
    logits(model)
    qkv = [layer for layer in layers if layer.endswith("qkv")]
    assert [layer for layer in layers if layer not in called] == (qkv if name in READ else [])
    assert qkv or name not in READ


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", *READ])
def test_peft_gets_no_gradient_where_the_model_reads_the_weight(name, config):
    """Ours does, in the test above. PEFT's does where the model calls the layer."""
    model = tiny(name)
    plain = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(model, config(r=2, target_modules=["qkv"]))
        update = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(key in update or "head" in key)
        for parameter in update.values():
            nn.init.normal_(parameter, std=0.5)
        loss_of(model).backward()
    assert len(update) >= 4
    assert without_gradient(update) == ([*update] if name in READ else [])
    still = (logits(model) - plain).abs().max() < 1e-12
    assert still == (name in READ)
    assert (logits(model.merge_and_unload()) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_opens_the_folder_without_qkv_s_update_until_it_is_merged(adapter, tmp_path):
    name = "beit_base_patch16_224"
    ours = tiny(name)
    replace_linear(ours, partial(adapter, rank=2, alpha=3), ["qkv"], head="head")
    factors_of(ours)
    mark_trainable(ours, head="")
    save_peft(ours, tmp_path / "folder")
    theirs = PeftModel.from_pretrained(tiny(name), tmp_path / "folder").train()
    plain = logits(tiny(name))
    assert (logits(ours) - plain).abs().max() > 1e-5
    torch.testing.assert_close(logits(theirs), plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(ours), rtol=0, atol=1e-8)
    loaded = tiny(name)
    load_peft(loaded, tmp_path / "folder")
    assert torch.equal(logits(loaded), logits(ours))


@pytest.mark.parametrize("settings", [{"dropout": 0.5}, {"module_dropout": 0.5}])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_dropout_has_no_effect_where_the_model_reads_the_weight(adapter, settings):
    for name in ("vit_small_patch16_224", "beit_base_patch16_224"):
        model = tiny(name)
        replace_linear(model, partial(adapter, rank=2, alpha=300, **settings), ["qkv"])
        factors_of(model)
        found = [logits(model) for _ in range(9)]
        same = all(torch.equal(found[0], other) for other in found)
        assert same == (name in READ)


def test_what_rank_r_costs_on_one_layer_and_on_three():
    dim, depth, rank = 24, 2, 8
    wrap = partial(LoRALinear, rank=rank)
    for name, targets, times in (
        ("vit_small_patch16_224", ["attn.qkv"], 4),
        ("dinov2", ["q_proj", "k_proj", "v_proj"], 6),
    ):
        model = tiny(name)
        replace_linear(model, wrap, targets)
        assert mark_trainable(model, head="")[0] == times * rank * dim * depth
        assert f"{times} r dim" in TEXTS["any-model.md"]


def test_the_function_for_timm_s_models(monkeypatch):
    """The lines of docs/any-model.md, with a small model of random weights."""
    (block,) = (block for block in CODE["any-model.md"] if "import timm" in block)
    create, built = timm.create_model, []

    def small(name, pretrained, num_classes):
        assert pretrained and timm.is_model_pretrained(name)
        built.append(create(name, num_classes=num_classes, **TIMM[name]))
        return built[0]

    monkeypatch.setattr(timm, "create_model", small)
    exec(block, names := {})
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    start = {}

    def batches():
        (model,) = built
        start.update(copy.deepcopy(model.state_dict()), loss=F.cross_entropy(model(x), y).item())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == 2 * 8 * (4 + 2 + 5 + 5) * 24 + 24 * 5 + 5  # qkv, proj, fc1, fc2; the head
        yield from [(x, y)] * 20

    model = names["fine_tune"](batches(), classes=5)
    assert F.cross_entropy(model(x), y) < 0.8 * start["loss"]
    fresh = create("vit_small_patch16_224", num_classes=5, **PLAIN)
    fresh.load_state_dict(model.state_dict())  # strict: the names are timm's again
    torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=1e-6)
    linear = "blocks.0.attn.qkv"
    assert not torch.equal(fresh.get_submodule(linear).weight, start[f"{linear}.linear.weight"])
    assert torch.equal(fresh.patch_embed.proj.weight, start["patch_embed.proj.weight"])


def test_what_is_said_of_convnext_and_of_siglip_in_transformers():
    with torch.device("meta"):
        for size in ("atto", "femto", "pico", "nano"):
            convnext = timm.create_model(f"convnext_{size}")
            with pytest.raises(ValueError, match=r"matches no nn\.Linear"):
                replace_linear(convnext, partial(LoRALinear, rank=2), "all", head="head")
    wrap = partial(LoRALinear, rank=2)
    for encoder_alone in (False, True):
        model = tiny("siglip")
        if encoder_alone:
            replace_linear(model.vision_model.encoder, wrap, "all", head="")
        else:
            with pytest.warns(UserWarning, match="MultiheadAttention"):
                replace_linear(model, wrap, "all", head="classifier")
        mark_trainable(model, head="classifier")
        factors = factors_of(model)
        loss_of(model).backward()
        dead = [name for name in factors if name.startswith("vision_model.head.mlp")]
        assert without_gradient(factors) == dead and bool(dead) != encoder_alone
