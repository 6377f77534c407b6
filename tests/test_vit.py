"""The split attention, and pretrained weights from every source."""

import copy

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import vit
from attention import Attention, join_attention, split_attention


@pytest.fixture
def stock():
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(28, 7, 2, 4, 32, 48, num_classes=5)
    for p in model.parameters():  # torchvision starts with zero biases and a zero head
        nn.init.normal_(p, std=0.2)
    return model.double().eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 28, 28, dtype=torch.float64)


def test_split_and_joined_give_the_original_s_logits(stock, images):
    logits = stock(images)
    split = split_attention(copy.deepcopy(stock))
    names = {name.split("self_attention.")[-1] for name, _ in split.named_parameters()}
    assert {"query.weight", "key.bias", "value.weight", "out.weight"} <= names
    assert not any(isinstance(m, nn.MultiheadAttention) for m in split.modules())
    torch.testing.assert_close(split(images), logits, rtol=0, atol=1e-12)
    joined = join_attention(split)
    torch.testing.assert_close(joined(images), logits, rtol=0, atol=1e-12)
    for (name, a), (other, b) in zip(
        joined.state_dict().items(), stock.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b), name


def test_split_keeps_mode_and_frozen_parameters(stock):
    stock.requires_grad_(False)
    split = split_attention(stock)
    assert not any(p.requires_grad for p in split.parameters())
    assert not any(m.training for m in split.modules())
    split.encoder.layers[0].self_attention.value.weight.requires_grad_(True)
    joined = join_attention(split)
    trains = [name for name, p in joined.named_parameters() if p.requires_grad]
    assert trains == ["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]


def test_attention_dropout_is_on_only_in_training(images):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(28, 7, 1, 4, 32, 48, attention_dropout=0.5)
    nn.init.normal_(model.heads.head.weight)
    model = split_attention(model.double())
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


@pytest.mark.parametrize("special", [{"batch_first": False}, {"add_bias_kv": True}, {"kdim": 4}])
def test_attention_that_cannot_be_split_is_refused_by_name(special):
    block = nn.MultiheadAttention(8, 2, **{"batch_first": True, **special})
    with pytest.raises(ValueError, match="block"):
        split_attention(nn.ModuleDict({"block": block}))


def test_the_attention_of_torch_s_own_encoder_is_refused():
    """The encoder layer reads the attention's batch_first and in_proj_weight."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: TransformerEncoderLayer reads"):
        split_attention(encoder)


def test_a_shared_attention_is_split_and_joined_once(stock, images):
    blocks = stock.encoder.layers
    blocks[1].self_attention = blocks[0].self_attention
    before = stock.eval()(images)
    split_attention(stock)
    assert isinstance(blocks[0].self_attention, Attention)
    assert blocks[0].self_attention is blocks[1].self_attention
    torch.testing.assert_close(stock(images), before, rtol=0, atol=1e-5)
    join_attention(stock)
    assert isinstance(blocks[0].self_attention, nn.MultiheadAttention)
    assert blocks[0].self_attention is blocks[1].self_attention
    torch.testing.assert_close(stock(images), before, rtol=0, atol=1e-5)


def test_joining_an_adapted_model_is_refused(stock):
    from lora import LoRALinear, replace_linear

    model = split_attention(stock)
    replace_linear(model, LoRALinear, ["query"])
    with pytest.raises(ValueError, match=r"query is a LoRALinear: call merge"):
        join_attention(model)


def test_vit_b_16_is_torchvision_s():
    with torch.device("meta"):
        ours = torchvision.models.VisionTransformer(**vit.MODELS["vit_b_16"])
        stock = torchvision.models.vit_b_16()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, stock)]
    assert shapes[0] == shapes[1]


def state(model="vit_mini", **changed):
    torch.manual_seed(5)
    built = torchvision.models.VisionTransformer(**{**vit.MODELS[model], **changed})
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    return built.state_dict()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("split", [False, True])
def test_weights_from_a_file_give_the_original_s_features(tmp_path, suffix, split):
    path = tmp_path / f"trunk.{suffix}"
    original = torchvision.models.VisionTransformer(**vit.MODELS["vit_mini"])
    original.load_state_dict(state())
    original.eval()
    if split:
        split_attention(original)
    save = torch.save if suffix == "pth" else save_file
    save(original.state_dict(), path)
    model, preprocessing = vit.build("vit_mini", str(path), num_classes=7, head_dropout=0.3)
    assert preprocessing["image_size"] == 28
    assert model.heads.head.out_features == 7 and model.heads.dropout.p == 0.3
    model.heads = original.heads = nn.Identity()
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.eval()(images), original(images), rtol=0, atol=1e-5)


def test_another_image_size_interpolates_the_positions(tmp_path):
    torch.save(state(), tmp_path / "trunk.pth")
    model, preprocessing = vit.build("vit_mini", str(tmp_path / "trunk.pth"), 3, image_size=35)
    assert preprocessing["image_size"] == 35
    assert model.encoder.pos_embedding.shape == (1, 1 + 25, 128)
    assert model(torch.randn(1, 3, 35, 35)).shape == (1, 3)
    small, _ = vit.build("vit_mini", str(tmp_path / "trunk.pth"), 3)
    cls = slice(0, 1)
    assert torch.equal(model.encoder.pos_embedding[:, cls], small.encoder.pos_embedding[:, cls])


def test_random_weights_depend_only_on_their_seed():
    torch.manual_seed(1)
    a, _ = vit.build("vit_mini", "none", seed=3)
    torch.manual_seed(2)
    b, _ = vit.build("vit_mini", "none", seed=3)
    c, _ = vit.build("vit_mini", "none", seed=4)
    assert torch.equal(a.conv_proj.weight, b.conv_proj.weight)
    assert not torch.equal(a.conv_proj.weight, c.conv_proj.weight)
    assert not torch.equal(a.heads.head.weight, b.heads.head.weight)  # the head ignores seed


def test_wrong_weights_are_refused_with_the_key(tmp_path):
    missing = state()
    del missing["encoder.ln.weight"]
    more = state() | {"extra": torch.zeros(2)}
    wide = state(mlp_dim=500)
    for wrong, message in [
        (missing, r"encoder\.ln\.weight: expected shape \(128,\), found no such tensor"),
        (more, r"extra: expected no such tensor, found shape \(2,\)"),
        (wide, r"mlp\.0\.weight: expected shape \(512, 128\), found \(500, 128\)"),
    ]:
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=message):
            vit.build("vit_mini", str(tmp_path / "wrong.pth"))


def test_files_that_hold_no_tensors_are_refused(tmp_path):
    for name, content in [
        ("text.pth", b"hello"),
        ("empty.pth", b""),
        ("bad.safetensors", b"x" * 99),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            vit.build("vit_mini", str(tmp_path / name))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="found list"):
        vit.build("vit_mini", str(tmp_path / "list.pth"))
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"nested\.pth: model: expected a tensor, found dict"):
        vit.build("vit_mini", str(tmp_path / "nested.pth"))
    with pytest.raises(FileNotFoundError, match="imagenet1k, swag, in21k, embedded, none"):
        vit.build("vit_mini", "imagenet2k")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth"):
        vit.build("vit_mini", "bomb.pth")
    assert not (tmp_path / "bomb-went-off").exists()


def test_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected one of vit_b_16, vit_mini"):
        vit.build("vit_huge")
    with pytest.raises(ValueError, match="multiple of its patch size, 7"):
        vit.build("vit_mini", "none", image_size=30)
    with pytest.raises(ValueError, match="imagenet1k"):
        vit.build("vit_mini", "imagenet1k")


@pytest.mark.parametrize("name", ["imagenet1k", "swag"])
def test_torchvision_s_weights_come_from_its_cache(name, tmp_path, monkeypatch):
    """torch.hub's cache holds a file in the layout that torchvision downloads; this file is loaded."""
    weights, _ = vit.PRETRAINED[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    tensors = {key: torch.randn(t.shape) * 0.02 for key, t in model.state_dict().items()}
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(tensors, cache / weights.url.rsplit("/", 1)[1])
    built, found = vit.build("vit_b_16", name, 10)
    assert torch.equal(built.conv_proj.weight, tensors["conv_proj.weight"])
    query = built.encoder.layers.encoder_layer_3.self_attention.query.weight
    packed = tensors["encoder.layers.encoder_layer_3.self_attention.in_proj_weight"]
    assert torch.equal(query, packed[:768])
    official = weights.transforms()
    assert found["mean"] == official.mean and found["std"] == official.std
    assert found["image_size"] == official.crop_size[0]
    assert found["crop"] == official.crop_size[0] / official.resize_size[0]


@pytest.mark.parametrize("content", [b"", b"half a download", b"PK\x03\x04" + b"x" * 99])
def test_a_broken_file_in_torchvision_s_cache_is_named_in_one_line(content, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "vit_b_16-c867db91.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"vit_b_16-c867db91\.pth: not a complete file") as error:
        vit.build("vit_b_16", "imagenet1k", 10)
    assert "\n" not in str(error.value) and "remove it" in str(error.value)
