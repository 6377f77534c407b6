"""The split attention, and pretrained weights from every source."""

import copy
import math
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from adapters import write_adapter
from hf import refuse_network
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import nn
from torchvision.models import VisionTransformer, get_model_weights
from torchvision.models.vision_transformer import interpolate_embeddings

import vit
from attention import SHORT, Attention, attend, join_attention, split_attention
from engine import checkpoint, weights
from engine.adapt import ADAPT, adapt
from engine.config import parse
from engine.start import begin


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    refuse_network(monkeypatch)


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


def attention_and_input(tokens=17):
    """An Attention whose keys share a large vector, as those of DINOv2, and an input for it, in float64."""
    torch.manual_seed(0)
    layer = Attention(64, 4).double()
    nn.init.constant_(layer.key.bias, 20)
    return layer, torch.randn(3, tokens, 64, dtype=torch.float64)


def test_attend_is_torch_s_attention():
    q, k, v = (torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y = attend(q, k, v)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    g = torch.randn_like(y)
    gradients = (torch.autograd.grad(y, (q, k, v), g) for y in (y, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_attend_in_bfloat16_is_as_exact_as_torch_s_kernel():
    layer, x = attention_and_input()
    q, k, v = (
        project(x).unflatten(-1, (4, -1)).transpose(1, 2) for project in list(layer.children())[:3]
    )
    q, k, v = (part.bfloat16() for part in (q, k, v))
    torch_s = nn.functional.scaled_dot_product_attention
    exact = torch_s(q.double(), k.double(), v.double())
    ours, theirs = ((f(q, k, v) - exact).norm() / exact.norm() for f in (attend, torch_s))
    assert ours < 1.2 * theirs < 0.01


@pytest.mark.parametrize(
    ("dtype", "tokens", "dropout", "fused"),
    [
        (torch.bfloat16, SHORT, 0.0, 0),
        (torch.bfloat16, SHORT + 1, 0.0, 1),  # attend would keep too much memory
        (torch.bfloat16, 8, 0.5, 1),
        (torch.float32, 8, 0.0, 1),
    ],
)
def test_short_bfloat16_attention_on_a_cpu_is_attend(monkeypatch, dtype, tokens, dropout, fused):
    layer, x = attention_and_input(tokens)
    layer.dropout, calls = dropout, []
    torch_s = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(a) or torch_s(*a, **k),
    )
    x = x.to(dtype)
    layer.to(dtype)(x, x, x)
    assert len(calls) == fused


@pytest.mark.parametrize("special", [{"batch_first": False}, {"add_bias_kv": True}, {"kdim": 4}])
def test_attention_that_cannot_be_split_is_refused_by_name(special):
    block = nn.MultiheadAttention(8, 2, **{"batch_first": True, **special})
    with pytest.raises(ValueError, match="block"):
        split_attention(nn.ModuleDict({"block": block}))


def test_attention_with_hooks_or_a_forward_of_its_own_is_refused():
    """The new layers would not run them, and nothing would say so."""

    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)[0], None

    hooked = nn.MultiheadAttention(8, 2, batch_first=True)
    hooked.register_forward_hook(lambda *_: None)
    for block, what in ((Doubled(8, 2, batch_first=True), "Doubled"), (hooked, "hooks")):
        with pytest.raises(ValueError, match=f"block: {what}: expected nn.MultiheadAttention"):
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


def test_a_trunk_draws_the_random_numbers_of_torchvision_s():
    shape = {**vit.named_shape("vit_mini"), "num_layers": 2}
    drawn = []
    for make in (vit.trunk, VisionTransformer):
        torch.manual_seed(3)
        drawn.append((make(**shape).state_dict(), torch.rand(1)))
    (ours, after), (stock, after_stock) = drawn
    assert list(ours) == list(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in ours)
    assert torch.equal(after, after_stock)
    torch.manual_seed(4)
    assert not torch.equal(vit.trunk(**shape).conv_proj.weight, stock["conv_proj.weight"])


@pytest.mark.parametrize("name", vit.MODELS)
def test_the_named_shapes_are_torchvision_s(name):
    """vit_mini is our own: here stand the numbers of heads of torchvision's constructors."""
    shape = vit.named_shape(name)
    assert tuple(shape) == vit.COLUMNS and tuple(shape.values()) == vit.MODELS[name]
    with torch.device("meta"):
        ours = vit.trunk(**shape)
        stock = ours if name == "vit_mini" else getattr(torchvision.models, name)()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, stock)]
    assert shapes[0] == shapes[1]
    blocks = [m.encoder.layers[0].self_attention for m in (ours, stock)]
    assert blocks[0].num_heads == blocks[1].num_heads == shape["num_heads"]
    assert (ours.image_size, ours.patch_size) == (stock.image_size, stock.patch_size)
    assert {m.eps for m in ours.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert vit.torchvision_name(shape) == name
    assert vit.torchvision_name({**shape, "image_size": 384}) == name  # as after --image-size


def state(model="vit_mini", **changed):
    torch.manual_seed(5)
    built = VisionTransformer(**{**vit.named_shape(model), **changed})
    for p in built.parameters():
        nn.init.normal_(p, std=0.1)
    return built.state_dict()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("split", [False, True])
def test_weights_from_a_file_give_the_original_s_features(tmp_path, suffix, split):
    path = tmp_path / f"trunk.{suffix}"
    original = vit.trunk(**vit.named_shape("vit_mini"))
    original.load_state_dict(state())
    original.eval()
    if split:
        split_attention(original)
    save = torch.save if suffix == "pth" else save_file
    save(original.state_dict(), path)
    model, preprocessing = vit.build("vit_mini", str(path), num_classes=7, head_dropout=0.3)
    assert preprocessing == {
        **weights.IMAGENET,
        "image_size": 28,
        "crop": 224 / 256,
        "interpolation": "bilinear",
    }
    assert model.heads.head.out_features == 7 and model.heads.dropout.p == 0.3
    model.heads = original.heads = nn.Identity()
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.eval()(images), original(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_the_state_dict_may_be_an_entry_of_the_file(tmp_path, key):
    torch.save({key: state(), "epoch": 3}, tmp_path / "nested.pth")
    model, _ = vit.build("vit_mini", str(tmp_path / "nested.pth"))
    assert torch.equal(model.conv_proj.weight, state()["conv_proj.weight"])
    torch.save({"teacher": state(), "epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"teacher: expected a tensor, found \w*[dD]ict"):
        vit.build("vit_mini", str(tmp_path / "other.pth"))


def test_another_image_size_interpolates_the_positions(tmp_path):
    torch.save(state(), tmp_path / "trunk.pth")
    model, preprocessing = vit.build("vit_mini", str(tmp_path / "trunk.pth"), 3, image_size=35)
    assert preprocessing["image_size"] == 35
    expected = vit.resize_positions(state()["encoder.pos_embedding"], 1, 5)
    assert expected.shape == (1, 1 + 25, 128)
    assert torch.equal(model.encoder.pos_embedding, expected)
    assert model(torch.randn(1, 3, 35, 35)).shape == (1, 3)
    small, _ = vit.build("vit_mini", str(tmp_path / "trunk.pth"), 3)
    assert torch.equal(small.encoder.pos_embedding, state()["encoder.pos_embedding"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 2, 5])
@pytest.mark.parametrize("sides", [(37, 16), (14, 24), (5, 4), (1, 3), (7, 7)])
def test_positions_are_resized_as_timm_does(sides, tokens, dtype):
    before, side = sides
    torch.manual_seed(0)
    positions = torch.randn(1, tokens + before**2, 8, dtype=dtype)
    found = vit.resize_positions(positions, tokens, side)
    theirs = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=tokens)
    assert found.shape == (1, tokens + side**2, 8) and found.dtype == dtype
    assert torch.equal(found, theirs)
    assert torch.equal(found[:, :tokens], positions[:, :tokens])
    if before not in (side, 1):  # the control: the older rule gives other numbers
        assert not torch.equal(vit.resize_positions(positions, tokens, side, old=True), theirs)


@pytest.mark.parametrize("sides", [(37, 16), (14, 24), (5, 4), (7, 7)])
def test_the_older_rule_for_positions_is_torchvision_s(sides):
    before, side = sides
    positions = torch.randn(1, 1 + before**2, 8)
    stock = OrderedDict({"encoder.pos_embedding": positions})
    theirs = interpolate_embeddings(side * 7, 7, stock)["encoder.pos_embedding"]
    assert torch.equal(vit.resize_positions(positions, 1, side, old=True), theirs)


@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_an_adapter_file_of_before_keeps_torchvision_s_positions(tmp_path, adapter):
    """It has the model's name and the eps, and no shape. Its logits stay, at another image size too."""
    trunk = state()
    torch.save(trunk, tmp_path / "trunk.pth")
    resized = interpolate_embeddings(42, 7, OrderedDict(trunk))
    stock = VisionTransformer(**vit.named_shape("vit_mini") | {"image_size": 42}, num_classes=3)
    stock.load_state_dict(resized | {k: t for k, t in stock.state_dict().items() if "heads" in k})
    nn.init.normal_(stock.heads.head.weight)
    for block in stock.encoder.layers:  # the eps of another library's ViT
        block.ln_1.eps = block.ln_2.eps = 1e-3
    stock.encoder.ln.eps = 1e-3
    trained = split_attention(stock)
    adapt(trained, adapter)
    for name, p in trained.named_parameters():
        if p.requires_grad and "heads" not in name:
            nn.init.normal_(p, std=0.1)
    info = {key: None for key in ADAPT} | {"adapter": adapter, "rank": 4, "alpha": 32.0}
    info |= {"targets": "all", "bias": "none", "factor": -1, "decompose_both": False, "seed": 0}
    info |= {"weights": str(tmp_path / "trunk.pth"), "trunk": checkpoint.fingerprint(trained)}
    images = {**weights.IMAGENET, "crop": 0.875, "image_size": 42}
    info |= {"classes": ["a", "b", "c"], "preprocessing": images}
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    checkpoint.save_adapter(old, trained, info | {"model": "vit_mini", "eps": 1e-3})
    shape = vit.named_shape("vit_mini") | {"image_size": 42, "eps": 1e-3}
    checkpoint.save_adapter(new, trained, info | {"shape": shape})
    x = torch.randn(2, 3, 42, 42)
    logits = trained.eval()(x)
    loaded, _ = vit.load_adapter(old)
    assert loaded.shape["old_positions"] and loaded.encoder.layers[5].ln_2.eps == 1e-3
    torch.testing.assert_close(loaded(x), logits, rtol=0, atol=1e-5)
    assert torch.equal(loaded.encoder.pos_embedding, resized["encoder.pos_embedding"])
    # the control: a file with its shape has timm's rule, and other logits
    later, _ = vit.load_adapter(new)
    assert "old_positions" not in later.shape
    assert (later(x) - logits).abs().max() > 1e-3
    # the old rule stays with the model when its adapter is saved again
    checkpoint.save_adapter(new, trained, info | {"shape": loaded.shape})
    assert torch.equal(vit.load_adapter(new)[0](x), loaded(x))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_key_of_a_newer_version_in_the_shape_is_one_line(tmp_path, adapter):
    """In whatever way the file is read: with its trunk, to start from, and as pretrained weights."""
    path = tmp_path / "a.safetensors"
    readers = [vit.load_adapter, lambda path: begin(parse(["--init-adapter", str(path)]))]
    if adapter == "full":
        readers.append(lambda path: vit.build(None, path))
    write_adapter(path, adapter)
    for read in readers:
        read(path)  # the control
    tensors, info = checkpoint.read_adapter(path)
    info["shape"]["gate"] = 3
    checkpoint.write_adapter(path, tensors, info)
    for read in readers:
        message = r"a\.safetensors: shape: gate: expected no such key; .* newer version"
        with pytest.raises(ValueError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_a_model_beside_an_adapter_must_be_its_trunk(tmp_path):
    path = str(tmp_path / "a.safetensors")
    write_adapter(path, "lora")
    given = ["--init-adapter", path]
    begin(parse(given))
    begin(parse([*given, "--model", "vit_mini"]))  # the control
    begin(parse([*given, "--image-size", "56", "--model", "vit_mini"]))
    for model, expected in (("vit_b_16", 7), ("vit_h_14", 7)):
        patch = vit.named_shape(model)["patch_size"]
        message = (
            rf"--model {model}: patch_size: expected {expected}, as in .*, found {patch}; leave"
        )
        with pytest.raises(ValueError, match=message) as error:
            begin(parse([*given, "--model", model]))
        assert path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("info", [{}, {"model": "vit_huge"}])
def test_an_adapter_file_without_a_shape_is_one_line(info, tmp_path):
    with pytest.raises(ValueError, match=r"^a\.safetensors: shape: expected the trunk's shape"):
        vit.shape_in(info, "a.safetensors")


def test_random_weights_depend_only_on_their_seed():
    torch.manual_seed(1)
    a, _ = vit.build("vit_mini", "none", seed=3)
    torch.manual_seed(2)
    b, _ = vit.build("vit_mini", "none", seed=3)
    c, _ = vit.build("vit_mini", "none", seed=4)
    assert torch.equal(a.conv_proj.weight, b.conv_proj.weight)
    assert not torch.equal(a.conv_proj.weight, c.conv_proj.weight)
    assert not torch.equal(a.heads.head.weight, b.heads.head.weight)  # the head ignores seed
    torch.manual_seed(3)
    stock = split_attention(VisionTransformer(**vit.named_shape("vit_mini"))).state_dict()
    own = {key: t for key, t in a.state_dict().items() if "heads" not in key}
    assert len(own) == len(stock) - 2 and all(torch.equal(t, stock[key]) for key, t in own.items())


def test_wrong_weights_are_refused_with_the_key(tmp_path):
    missing = state()
    del missing["encoder.ln.weight"]
    gap = state()
    del gap["encoder.layers.encoder_layer_3.ln_2.bias"]
    more = state() | {"extra": torch.zeros(2)}
    narrow = state() | {"encoder.layers.encoder_layer_3.mlp.0.weight": torch.zeros(500, 128)}
    for wrong, message in [
        (missing, r"wrong\.pth: encoder\.ln\.weight: expected a tensor, found none"),
        (gap, r"encoder_layer_3\.ln_2\.bias: expected a tensor, found none"),
        (more, r"wrong\.pth: extra: expected no such tensor, found shape \(2,\)"),
        (
            narrow,
            r"encoder_layer_3\.mlp\.0\.weight: expected shape \(512, 128\), found \(500, 128\)",
        ),
        (state(mlp_dim=500), r"wrong\.pth: mlp_dim: expected 512, found 500: .* another model"),
        (state(num_layers=5), r"num_layers: expected 6, found 5: .* another model"),
        (state(patch_size=14), r"patch_size: expected 7, found 14: .* another model"),
        (state(hidden_dim=64), r"hidden_dim: expected 128, found 64: .* another model"),
    ]:
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=message) as error:
            vit.build("vit_mini", str(tmp_path / "wrong.pth"))
        assert "\n" not in str(error.value)


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
    torch.save({"model": {"weight": {"x": torch.ones(1)}}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match=r"nested\.pth: weight: expected a tensor, found dict"):
        vit.build("vit_mini", str(tmp_path / "nested.pth"))
    torch.save({"model": {"weight": torch.ones(1)}}, tmp_path / "nested.pth")
    with pytest.raises(
        ValueError, match=r"nested\.pth: expected the tensors of a ViT .* found weight"
    ):
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
    torch.load("bomb.pth", weights_only=False)
    assert (tmp_path / "bomb-went-off").exists(), "the control: unpickling runs its code"


def test_names_that_do_not_fit_are_refused():
    every = "vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, vit_mini"
    with pytest.raises(ValueError, match=f"vit_huge.*: expected one of {every}$"):
        vit.build("vit_huge")
    with pytest.raises(
        ValueError, match="--image-size 30: expected a multiple of the patch size, 7"
    ):
        vit.build("vit_mini", "none", image_size=30)
    with pytest.raises(ValueError, match="--heads 5: expected 4; leave the flag out"):
        vit.build("vit_mini", "none", heads=5)
    assert vit.build("vit_mini", "none", heads=4)[0].shape["num_heads"] == 4
    for model, name, message in [
        ("vit_mini", "imagenet1k", "^--model vit_mini: .* expected one of vit_b_16, .*, vit_h_14$"),
        ("vit_b_32", "swag", "^--weights swag: .* for vit_b_32; it has imagenet1k$"),
        ("vit_l_32", "swag", "for vit_l_32; it has imagenet1k$"),
        ("vit_h_14", "imagenet1k", "for vit_h_14; it has swag$"),
    ]:
        with pytest.raises(ValueError, match=message):
            vit.build(model, name)


def prepared(source) -> dict:
    """How torchvision prepares the images of its weights."""
    images = source.transforms()
    return {
        "mean": images.mean,
        "std": images.std,
        "image_size": images.crop_size[0],
        "crop": images.crop_size[0] / images.resize_size[0],
        "interpolation": images.interpolation.value,
    }


def fake(name: str) -> dict[str, torch.Tensor]:
    """Tensors of torchvision's model, of which a file holds one number each."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    return {key: torch.full((1,), 0.5).expand(t.shape) for key, t in model.state_dict().items()}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache of downloads, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


META = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
EVERY = [
    (model, name)
    for model in weights.TORCHVISION_MODELS
    for name, member in weights.TORCHVISION.items()
    if member in get_model_weights(model).__members__
]


def test_torchvision_has_seven_of_these_weights_and_their_images_differ():
    """The controls of the next tests: a rule for all of them would be wrong for some."""
    assert len(EVERY) == 7
    found = {pair: prepared(weights.torchvision_source(pair[1], pair[0])) for pair in EVERY}
    assert {(f["image_size"], f["crop"], f["interpolation"]) for f in found.values()} == {
        (224, 224 / 256, "bilinear"),
        (224, 224 / 242, "bilinear"),
        (224, 1.0, "bicubic"),
    }
    assert found["vit_l_16", "imagenet1k"]["crop"] == 224 / 242
    assert all(f["interpolation"] == "bicubic" for (_, name), f in found.items() if name == "swag")


@META
@pytest.mark.parametrize(("model", "name"), EVERY)
def test_torchvision_s_weights_are_prepared_as_torchvision_does(model, name, cache, capsys):
    """On the meta device: the large models have no numbers."""
    source = weights.torchvision_source(name, model)
    assert source is get_model_weights(model)[weights.TORCHVISION[name]]
    torch.save(fake(model), cache / Path(source.url).name)
    with torch.device("meta"):
        built, found = vit.build(model, name, 3)
    assert found == prepared(source)
    shape = vit.named_shape(model)
    assert {key: built.shape[key] for key in shape} == shape
    assert built.encoder.layers[0].self_attention.heads == shape["num_heads"]
    # the same from the metadata of an adapter file
    with torch.device("meta"):
        again, found = vit.build(built.shape, name, 3)
    assert found == prepared(source) and again.shape == built.shape
    assert "no file says otherwise" not in capsys.readouterr().out


@META
@pytest.mark.parametrize("model", weights.TORCHVISION_MODELS)
def test_a_file_of_torchvision_s_is_known_by_its_name(model, tmp_path):
    """--weights FILE with the name under which torchvision's is downloaded, in any folder."""
    tensors = fake(model)
    for source in get_model_weights(model):  # also those for images of 384 and 512 pixels
        path = tmp_path / Path(source.url).name
        side = source.meta["min_size"][0] // vit.named_shape(model)["patch_size"]
        rows = tensors["encoder.pos_embedding"][:, :1].expand(-1, 1 + side**2, -1)
        torch.save(tensors | {"encoder.pos_embedding": rows}, path)
        with torch.device("meta"):
            built, found = vit.build(None, str(path), 3)
        expected = prepared(source)
        assert found == expected, source
        assert built.shape["num_heads"] == vit.named_shape(model)["num_heads"]
        assert built.encoder.pos_embedding.shape[1] == 1 + side**2
        path.rename(tmp_path / "other.pth")
        with torch.device("meta"):  # the control: under another name it is prepared by the rule
            found = vit.build(model, str(tmp_path / "other.pth"), 3)[1]
        assert math.isclose(found["crop"], 224 / 256) and found["interpolation"] == "bilinear"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "name"),
    [("vit_b_16", "imagenet1k"), ("vit_b_16", "swag"), ("vit_b_32", "imagenet1k")],
)
def test_torchvision_s_weights_come_from_its_cache(model, name, cache):
    """torch.hub's cache holds a file in the layout that torchvision downloads; this file is loaded."""
    source = get_model_weights(model)[weights.TORCHVISION[name]]
    torch.manual_seed(0)
    tensors = {key: torch.empty(t.shape).uniform_(-0.1, 0.1) for key, t in fake(model).items()}
    torch.save(tensors, cache / Path(source.url).name)
    built, _ = vit.build(model, name, 10)
    assert torch.equal(built.conv_proj.weight, tensors["conv_proj.weight"])
    query = built.encoder.layers.encoder_layer_3.self_attention.query.weight
    packed = tensors["encoder.layers.encoder_layer_3.self_attention.in_proj_weight"]
    assert torch.equal(query, packed[:768])
    assert torch.equal(built.encoder.pos_embedding, tensors["encoder.pos_embedding"])
    assert {m.eps for m in built.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("content", [b"", b"half a download", b"PK\x03\x04" + b"x" * 99])
def test_a_broken_file_in_torchvision_s_cache_is_named_in_one_line(content, cache):
    (cache / "vit_b_16-c867db91.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"vit_b_16-c867db91\.pth: not a complete file") as error:
        vit.build("vit_b_16", "imagenet1k", 10)
    assert "\n" not in str(error.value) and "remove it" in str(error.value)
