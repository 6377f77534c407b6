"""The lines of docs/any-model.md, on SDXL's architecture: trained, saved, and opened by PEFT."""

import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sdxl import TOKENS, predicted_noise, toy_sdxl
from test_docs import PYTHON
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from engine.peft_folder import load_peft, save_peft
from lora import LoRALinear, mark_trainable, replace_linear

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
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (style / "unet" / name).read_bytes()


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
