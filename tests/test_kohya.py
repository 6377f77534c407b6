"""engine/kohya.py, checked with LyCORIS' and diffusers' own loading, on SDXL at toy size in float64.

The alpha is never the rank, and factors are random, so that a forgotten scale fails.
"""

import json
import re
from functools import partial

import pytest
import torch
from adapters import randomise, write_adapter
from conftest import ROOT
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from lycoris import kohya as lycoris_kohya
from lycoris.config import PRESET
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sdxl import TOKENS, toy_sdxl
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import export
from engine.kohya import load_kohya, save_diffusers_lora, save_kohya, stability_name
from engine.peft_folder import load_peft, save_peft
from loha import LoHaLinear
from lokr import LoKrLinear
from lora import LoRALinear, mark_trainable, replace_linear

FORMS = {
    "lora": partial(LoRALinear, rank=2, alpha=3.0),
    "loha": partial(LoHaLinear, rank=2, alpha=3.0),
    "lokr": partial(LoKrLinear, rank=4, alpha=6.0),  # W2 is whole in some layers, and not in others
    "lokr-whole": partial(LoKrLinear, rank=100, alpha=120.0),
    "lokr-both": partial(LoKrLinear, rank=1, alpha=1.5, decompose_both=True),
    "lokr-factor": partial(LoKrLinear, rank=2, alpha=3.0, factor=2),
}
every_form = pytest.mark.parametrize("form", FORMS)
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
LAYERS = 163  # linear layers of the UNet and both text encoders, without text_projection
FOLDERS = ("unet", "text_encoder_one", "text_encoder_two")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return toy_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture
def models(base):
    """models(): a new UNet and both its text encoders, as float64."""
    kinds = (UNet2DConditionModel, CLIPTextModel, CLIPTextModelWithProjection)
    folders = ("unet", "text_encoder", "text_encoder_2")

    def new():
        pairs = zip(kinds, folders, strict=True)
        return [kind.from_pretrained(base, subfolder=name).double().eval() for kind, name in pairs]

    return new


def adapted(models, form, unet_targets="all"):
    """The three models with random adapters in all linear layers that the file has a place for."""
    for model, targets in zip(models, (unet_targets, TEXT, TEXT), strict=True):
        replace_linear(model, FORMS[form], targets, head="")
        mark_trainable(model, head="")
        randomise(model)
    return models


@torch.no_grad()
def output(unet, first, second):
    """The UNet's prediction for fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    tokens = torch.randint(2, TOKENS, (2, 7), generator=generator)
    pooled = second(tokens, output_hidden_states=True)
    words = first(tokens, output_hidden_states=True).hidden_states[-2]
    words = torch.cat([words, pooled.hidden_states[-2]], -1)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(2, -1)
    conditions = {"text_embeds": pooled.text_embeds, "time_ids": sizes}
    return unet(noisy, torch.tensor([10, 900]), words, added_cond_kwargs=conditions).sample


def adapters(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "delta_weight")}


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.fixture
def float64():
    """LyCORIS makes its parameters in torch's default type. Its default preset counts layers twice."""
    lycoris_kohya.LycorisNetworkKohya.apply_preset(PRESET["attn-mlp"])
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def for_lycoris(text_encoder):
    """The text encoder with the names that transformers 4 gave its layers, as LyCORIS expects them."""
    if hasattr(text_encoder, "text_model"):
        return text_encoder
    outer = nn.Module()
    outer.text_model = text_encoder
    return outer


@every_form
def test_lycoris_gives_our_output(form, models, tmp_path, float64):
    ours = adapted(models(), form)
    file = tmp_path / "a.safetensors"
    save_kohya(ours[0], file, ours[1:])
    expected = output(*ours)
    # LyCORIS looks for diffusers' name of this layer, other tools for Stability's.
    tensors = {
        k.replace("label_emb_0_0", "add_embedding_linear_1"): t for k, t in load_file(file).items()
    }
    tensors = {k.replace("label_emb_0_2", "add_embedding_linear_2"): t for k, t in tensors.items()}

    def theirs(tensors):
        unet, *text_encoders = models()
        encoders = [for_lycoris(encoder) for encoder in text_encoders]
        network, _ = lycoris_kohya.create_network_from_weights(
            1.0, None, None, encoders, unet, weights_sd=tensors
        )
        network.apply_to(encoders, unet, apply_text_encoder=True, apply_unet=True)
        assert len(network.loras) == LAYERS
        return output(unet, *text_encoders)

    # On some processors the difference comes to 1.3e-10: a UNet with random weights enlarges rounding errors.
    torch.testing.assert_close(theirs(tensors), expected, rtol=0, atol=1e-9)
    assert (output(*models()) - expected).abs().max() > 0.01
    alphas = {key: t for key, t in tensors.items() if key.endswith(".alpha")}
    doubled = theirs(tensors | {key: 2 * t for key, t in alphas.items()})
    if form == "lokr-whole":  # the trap: LyCORIS ignores alpha
        assert {t.item() for t in alphas.values()} == {100.0}
    else:
        assert (doubled - expected).abs().max() > 0.01


def pipeline(unet, first, second):
    tokenizer = CLIPTokenizer(
        vocab={"a": 0, "b</w>": 1, "ab</w>": 2}, merges=[("a", "b</w>")], pad_token="a"
    )
    return StableDiffusionXLPipeline(
        vae=AutoencoderTiny(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )


def in_diffusers(models, path):
    """The output of new models after load_lora_weights."""
    new = models()
    pipeline(*new).load_lora_weights(str(path))
    return output(*new)


def test_diffusers_gives_our_output_from_both_files(models, tmp_path):
    ours = adapted(models(), "lora")
    expected = output(*ours)
    save_kohya(ours[0], tmp_path / "a.safetensors", ours[1:])
    save_diffusers_lora(ours[0], tmp_path / "folder", ours[1:])
    file = tmp_path / "folder" / "pytorch_lora_weights.safetensors"
    for path in (tmp_path / "a.safetensors", tmp_path / "folder", file):
        torch.testing.assert_close(in_diffusers(models, path), expected, rtol=0, atol=1e-8)
    # transformers 4 has these names, transformers 5 others; diffusers 0.42 would take both
    keys = [key for key in load_file(file) if key.startswith("text_encoder")]
    starts = ("text_encoder.text_model.", "text_encoder_2.text_model.")
    assert len(keys) == 2 * 2 * 12 and all(key.startswith(starts) for key in keys)
    # the controls: no alpha in either file
    tensors = {k: t for k, t in load_file(tmp_path / "a.safetensors").items() if "alpha" not in k}
    save_file(tensors, tmp_path / "a.safetensors")
    save_file(load_file(file), file)
    for path in (tmp_path / "a.safetensors", file):
        assert (in_diffusers(models, path) - expected).abs().max() > 0.01


def test_diffusers_reads_ranks_and_alphas_that_differ_by_layer(models, tmp_path):
    unet, *text_encoders = ours = models()
    for targets, rank, alpha in (("to_q,to_k", 2, 3.0), ("to_v", 3, 3.0), ("ff.net.2", 2, 5.0)):
        replace_linear(unet, partial(LoRALinear, rank=rank, alpha=alpha), targets, head="")
    mark_trainable(unet, head="")
    randomise(unet)
    save_diffusers_lora(unet, tmp_path / "folder", text_encoders)
    assert (output(*models()) - output(*ours)).abs().max() > 0.01
    torch.testing.assert_close(
        in_diffusers(models, tmp_path / "folder"), output(*ours), rtol=0, atol=1e-8
    )
    save_kohya(unet, tmp_path / "a.safetensors")
    assert header(tmp_path / "a.safetensors")["ss_network_dim"] == "Dynamic"
    again = models()
    load_kohya(again[0], tmp_path / "a.safetensors")
    assert torch.equal(output(*again), output(*ours))


@every_form
def test_a_round_trip_keeps_factors_rank_and_scale(form, models, tmp_path):
    ours = adapted(models(), form)
    save_kohya(ours[0], tmp_path / "a.safetensors", ours[1:])
    again = models()
    names = load_kohya(again[0], tmp_path / "a.safetensors", again[1:])
    assert len(names) == LAYERS and set(adapters(again[0])) <= set(names)
    folded = 0
    for first, second in zip(ours, again, strict=True):
        mine, theirs = adapters(first), adapters(second)
        assert mine.keys() == theirs.keys()
        for name, layer in mine.items():
            assert type(layer) is type(theirs[name])
            assert (theirs[name].rank, theirs[name].scale) == (layer.rank, layer.scale)
            whole = hasattr(layer, "lokr_w1") and hasattr(layer, "lokr_w2")
            folded += whole
            found = dict(theirs[name].named_parameters(recurse=False))
            for key, p in layer.named_parameters(recurse=False):
                error = 1e-12 if whole and key == "lokr_w1" else 0
                torch.testing.assert_close(found.pop(key), p, rtol=error, atol=0)
                assert p.requires_grad
            assert not found
        trained = [name for name, p in second.named_parameters() if p.requires_grad]
        assert trained and all(name.rpartition(".")[0] in theirs for name in trained)
    if form in ("lokr", "lokr-whole"):
        assert 0 < folded < LAYERS if form == "lokr" else folded == LAYERS
    else:
        assert folded == 0
    torch.testing.assert_close(output(*again), output(*ours), rtol=0, atol=1e-12)


def test_float32_is_bit_for_bit_with_an_alpha_that_float32_does_not_have(base, tmp_path):
    new = partial(UNet2DConditionModel.from_pretrained, base, subfolder="unet")
    ours = new()
    replace_linear(ours, partial(LoRALinear, rank=3, alpha=0.1), "to_q", head="")
    mark_trainable(ours, head="")
    randomise(ours)
    save_kohya(ours, tmp_path / "a.safetensors")
    half = new().half()
    for unet in (new(), half):
        load_kohya(unet, tmp_path / "a.safetensors")
        for name, layer in adapters(ours).items():
            found = unet.get_submodule(name)
            assert found.scale == layer.scale and found.lora_A.dtype == torch.float32
            assert torch.equal(found.lora_A, layer.lora_A)
            assert torch.equal(found.lora_B, layer.lora_B)


ALGORITHMS = {
    "lora": {"algo": "lora"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "lokr-both": {"algo": "lokr", "decompose_both": True},
    "lokr-factor": {"algo": "lokr", "factor": 2},
    "lokr-full-matrix": {"algo": "lokr", "full_matrix": True},
    "lokr-unbalanced": {"algo": "lokr", "unbalanced_factorization": True, "factor": 2},
}


@pytest.mark.parametrize("case", ALGORITHMS)
def test_files_that_lycoris_wrote_give_its_output(case, models, tmp_path, float64):
    unet, *encoders = models()
    network = lycoris_kohya.create_network(
        1.0, 2, 3.0, None, encoders, unet, preset="attn-mlp", **ALGORITHMS[case]
    )
    network.apply_to(encoders, unet, apply_text_encoder=True, apply_unet=True)
    torch.manual_seed(0)
    for p in network.parameters():
        p.data.copy_(torch.randn_like(p) / 2)
    network.save_weights(str(tmp_path / "a.safetensors"), None, {"ss_network_dim": "2"})
    expected = output(unet, *encoders)
    ours = models()
    names = load_kohya(ours[0], tmp_path / "a.safetensors", ours[1:])
    assert len(names) == len(network.loras) > 100
    torch.testing.assert_close(output(*ours), expected, rtol=0, atol=1e-10)
    assert (output(*models()) - expected).abs().max() > 0.01
    folder = tmp_path / "peft"
    # Whole factors get a rank for which PEFT's are whole too.
    if case in ("lokr-both", "lokr-full-matrix"):
        save_peft(ours[1], folder)
        again = models()
        load_peft(again[1], folder)
        torch.testing.assert_close(output(ours[0], again[1], ours[2]), expected, rtol=0, atol=1e-10)


def test_a_file_of_sd_scripts_with_stability_s_names_is_read(models, tmp_path):
    """diffusers maps these names back by itself."""
    ours = adapted(models(), "lora")
    save_kohya(ours[0], tmp_path / "a.safetensors")
    layers = {
        "lora_unet_" + name.replace(".", "_"): "lora_unet_"
        + stability_name(name, 1).replace(".", "_")
        for name in adapters(ours[0])
    }
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q" in layers.values()
    tensors = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        layer, _, factor = key.partition(".")
        tensors[f"{layers.get(layer, layer)}.{factor}"] = tensor
    assert len([key for key in tensors if "_blocks_" in key and "down" in key.split(".")[0]]) == 0
    save_file(tensors, tmp_path / "b.safetensors")
    expected = output(ours[0], *models()[1:])
    new = models()
    load_kohya(new[0], tmp_path / "b.safetensors")
    assert torch.equal(output(*new), expected)
    torch.testing.assert_close(
        in_diffusers(models, tmp_path / "b.safetensors"), expected, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("form", ["lora", "loha", "lokr"])
def test_peft_folders_are_converted_without_the_model(form, models, tmp_path, capsys):
    ours = adapted(models(), form)
    save_kohya(ours[0], tmp_path / "a.safetensors", ours[1:])
    save_kohya(ours[0], tmp_path / "unet.safetensors")
    for model, name in zip(ours, FOLDERS, strict=True):
        save_peft(model, tmp_path / "style" / name)
    pairs = [("style", "a.safetensors"), ("style/unet", "unet.safetensors")]
    for source, file in pairs:
        new = str(tmp_path / f"new-{file}")
        assert export.main([str(tmp_path / source), "--to", "kohya", new]) == 0
        assert capsys.readouterr().out == f"{new}: for ComfyUI, Forge and A1111\n"
        assert header(new) == header(tmp_path / file)
        first, second = load_file(new), load_file(tmp_path / file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    flags = [str(tmp_path / "style"), "--to", "diffusers", str(tmp_path / "folder")]
    assert export.main(flags) == (0 if form == "lora" else 2)
    said = capsys.readouterr()
    if form == "lora":
        assert said.out == f"{tmp_path / 'folder'}: for load_lora_weights\n"
        torch.testing.assert_close(
            in_diffusers(models, tmp_path / "folder"), output(*ours), rtol=0, atol=1e-8
        )
    else:
        assert said.err.count("\n") == 1 and "expected LoRA" in said.err
        assert not (tmp_path / "folder").exists()


def small_unet(width, **settings):
    """A UNet of Stable Diffusion 1 or 2, whose text has this width."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=width,
        norm_num_groups=2,
        **settings,
    )


VERSIONS = [
    (768, "sd_v1", "False", "lora_te_"),
    (1024, "sd_v2", "True", "lora_te_"),
    (2048, "sdxl_base_v1-0", "False", "lora_te1_"),
    (5, None, None, "lora_te1_"),
]


@pytest.mark.parametrize(("width", "version", "v2", "prefix"), VERSIONS)
def test_the_header_says_which_stable_diffusion_it_is_for(
    width, version, v2, prefix, models, tmp_path
):
    unet, text_encoder, _ = small_unet(width), *models()[1:]
    for model, targets in ((unet, "attn1.to_q"), (text_encoder, "q_proj")):
        replace_linear(model, FORMS["loha"], targets, head="")
        mark_trainable(model, head="")
        randomise(model)
    file = tmp_path / "a.safetensors"
    save_kohya(unet, file, [text_encoder])
    found = header(file)
    assert (found.get("ss_base_model_version"), found.get("ss_v2")) == (version, v2)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"]) == {"algo": "loha"}
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "3.0")
    encoders = [key for key in load_file(file) if not key.startswith("lora_unet_")]
    assert encoders and all(
        key.startswith(f"{prefix}text_model_encoder_layers_") for key in encoders
    )
    new = [small_unet(width), models()[1]]
    load_kohya(new[0], file, new[1:])
    for model, again in zip((unet, text_encoder), new, strict=True):
        for name, layer in adapters(model).items():
            assert torch.equal(layer.delta_weight(), again.get_submodule(name).delta_weight())


def test_the_header_of_sdxl_for_a_part_of_its_layers(models, tmp_path):
    unet = models()[0]
    replace_linear(unet, FORMS["lora"], "down_blocks.1.attentions.0.proj_in", head="")
    mark_trainable(unet, head="")
    save_kohya(unet, tmp_path / "a.safetensors")
    found = header(tmp_path / "a.safetensors")
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["ss_network_module"] == "networks.lora" and "ss_network_args" not in found


def with_conv(unet):
    unet.conv_in.requires_grad_(True)


def with_bias(unet):
    mark_trainable(unet, head="", bias="all")


def with_alpha_0(unet):
    adapters(unet)["mid_block.attentions.0.proj_in"].scale = 0.0


@pytest.mark.parametrize(
    ("change", "file", "message"),
    [
        (with_conv, "a.safetensors", r"conv_in\.weight is trainable, but the file has no place"),
        (with_bias, "a.safetensors", r"\.bias is trainable, but the file has no place for it"),
        (with_alpha_0, "a.safetensors", r"mid_block.*proj_in: expected alpha above 0, found 0"),
        (None, "a.pt", r"a\.pt: expected a file name that ends in \.safetensors"),
        (None, "old.safetensors", r"old\.safetensors: already exists; name another file"),
    ],
)
def test_what_has_no_place_in_the_file_is_refused_and_nothing_written(
    change, file, message, models, tmp_path
):
    unet, *encoders = adapted(models(), "lora")
    (tmp_path / "old.safetensors").write_text("old")
    if change:
        change(unet)
    with pytest.raises(ValueError, match=message) as refused:
        save_kohya(unet, tmp_path / file, encoders)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert (tmp_path / "old.safetensors").read_text() == "old"


def test_models_of_another_kind_are_refused(models, tmp_path):
    unet, first, second = models()
    file = tmp_path / "new" / "a.safetensors"
    with pytest.raises(ValueError, match="the models have no adapter: add adapters with"):
        save_kohya(unet, file, [first, second])
    replace_linear(second, FORMS["lora"], "all", head="")
    mark_trainable(second, head="")
    for save, path in ((save_kohya, file), (save_diffusers_lora, file.parent)):
        with pytest.raises(ValueError, match=r"text_projection: expected a layer of .* text enc"):
            save(unet, path, [first, second])
        with pytest.raises(ValueError, match=r"text_projection: expected a layer .* UNet's blocks"):
            save(nn.ModuleDict({"text_projection": second.text_projection}), path)
        with pytest.raises(ValueError, match="expected at most 2 text encoders, found 3"):
            save(unet, path, [first, second, second])
    replace_linear(unet, FORMS["loha"], "to_q", head="")
    mark_trainable(unet, head="")
    with pytest.raises(ValueError, match=r"to_q: expected LoRA, which is all that load_lora_wei"):
        save_diffusers_lora(unet, file.parent)
    assert not file.parent.exists()


Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def renamed(tensors, old, new):
    tensors[f"{Q}.{new}"] = tensors.pop(f"{Q}.{old}")


def changed(tensors, name, change):
    tensors[f"{Q}.{name}"] = change(tensors[f"{Q}.{name}"]).contiguous()


WRONG = {
    "a convolution": (
        lambda t: t.update({"lora_unet_conv_in.lora_up.weight": torch.ones(4, 2)}),
        r"lora_unet_conv_in\.lora_up\.weight: expected a linear layer",
    ),
    "a text encoder's": (
        lambda t: t.update({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}),
        r"lora_te1_\w+\.alpha: expected a linear .* begin with lora_te need text_encoders=",
    ),
    "nothing": (lambda t: t.clear(), "expected factors of an adapter, found none"),
    "a factor is missing": (
        lambda t: t.pop(f"{Q}.lora_up.weight"),
        r"to_q: lora_up\.weight: found no such tensor; the file is incomplete",
    ),
    "alpha alone": (
        lambda t: [t.pop(f"{Q}.lora_{end}.weight") for end in ("up", "down")],
        r"to_q: lora_down\.weight: found no such tensor",
    ),
    "DoRA": (
        lambda t: t.update({f"{Q}.dora_scale": torch.ones(32, 1)}),
        r"to_q: dora_scale: expected no such tensor; .* variant of lora",
    ),
    "two kinds": (
        lambda t: t.update({f"{Q}.lokr_w1": torch.ones(2, 2)}),
        r"to_q: lokr_w2_a: found no such tensor",
    ),
    "a whole difference": (
        lambda t: t.update({f"{Q}.diff": torch.ones(32, 32)}),
        r"to_q: diff: expected no such tensor; the file is incomplete, or of an unsupported var",
    ),
    "half of LoKr": (
        lambda t: [
            renamed(t, "lora_up.weight", "lokr_w1"),
            renamed(t, "lora_down.weight", "lokr_w2_a"),
        ],
        r"to_q: lokr_w2_b: found no such tensor; .* variant of lokr",
    ),
    "another layer's": (
        lambda t: changed(t, "lora_up.weight", lambda tensor: tensor[:-1]),
        r"to_q: expected factors of a layer of \(32, 32\), found lora_down\.weight \(2, 32\), "
        r"lora_up\.weight \(31, 2\); the file is of another model",
    ),
    "ranks differ": (
        lambda t: changed(t, "lora_up.weight", lambda tensor: tensor[:, :1]),
        r"to_q: expected factors of a layer of \(32, 32\), .* lora_up\.weight \(32, 1\)",
    ),
    "a convolution's factors": (
        lambda t: changed(t, "lora_up.weight", lambda tensor: tensor[:, :, None, None]),
        r"to_q: expected factors .* lora_up\.weight \(32, 2, 1, 1\)",
    ),
    "alpha of two": (
        lambda t: t.update({f"{Q}.alpha": torch.ones(2)}),
        r"to_q: alpha: expected one number above 0, found \[1\.0, 1\.0\]",
    ),
    "alpha of 0": (
        lambda t: t.update({f"{Q}.alpha": torch.zeros(())}),
        r"to_q: alpha: expected one number above 0, found 0\.0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_and_no_layer_is_wrapped(case, models, tmp_path):
    change, message = WRONG[case]
    ours, file = models()[0], tmp_path / "a.safetensors"
    replace_linear(ours, FORMS["lora"], "to_q,to_k", head="")
    mark_trainable(ours, head="")
    save_kohya(ours, file)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    unet = models()[0]
    with pytest.raises(ValueError, match=message) as refused:
        load_kohya(unet, file)
    assert str(refused.value).startswith(f"{file}: ") and "\n" not in str(refused.value)
    assert not adapters(unet) and all(p.requires_grad for p in unet.parameters())


def test_other_wrong_calls_are_refused(models, tmp_path):
    unet, file = models()[0], tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_kohya(unet, file)
    replace_linear(unet, FORMS["lora"], "to_q", head="")
    mark_trainable(unet, head="")
    save_kohya(unet, file)
    before = {name: id(m) for name, m in unet.named_modules()}
    with pytest.raises(ValueError, match=r"to_q: expected a plain layer, found an adapter: merge"):
        load_kohya(unet, file)
    assert {name: id(m) for name, m in unet.named_modules()} == before
    # Without alpha, the scale is 1.
    tensors = {key: t for key, t in load_file(file).items() if not key.endswith(".alpha")}
    save_file(tensors, file)
    new = models()[0]
    load_kohya(new, file)
    assert {layer.scale for layer in adapters(new).values()} == {1.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("a.safetensors --to kohya x.safetensors", "expected a PEFT folder of a Stable Diffusion"),
        ("missing --to kohya x.safetensors", "missing: expected adapter_config.json or unet/adapt"),
        ("vit --to kohya x.safetensors", "classifier.bias: expected factors of adapters alone"),
        ("text --to kohya x.safetensors", ": expected a layer of a Stable Diffusion UNet's blocks"),
        ("bias --to kohya x.safetensors", "base_layer.bias: expected factors of adapters alone"),
        ("style --to kohya x.pt", "x.pt: expected a file name that ends in .safetensors"),
        ("style --to diffusers style", "style/pytorch_lora_weights.safetensors: already exists"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    flags, message, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_adapter("a.safetensors", "lora")
    export.to_peft("a.safetensors", "vit")
    unet, *encoders = adapted(models(), "lora", "to_q")
    save_peft(unet, "style/unet")
    save_peft(encoders[0], "text")
    mark_trainable(encoders[0], head="", bias="adapter")
    save_peft(encoders[0], "bias")
    save_diffusers_lora(unet, "style")
    capsys.readouterr()
    assert export.main(flags.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("export.py: ") and message in error and "\n" not in error
    assert not list(tmp_path.glob("x.*"))


def test_the_page_s_code_saves_and_loads(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, again = adapted(models(), "lora"), models()
    page = (ROOT / "docs" / "other-tools.md").read_text("utf-8")
    save, load = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(save, {"unet": ours[0], "text_encoder": ours[1], "text_encoder_2": ours[2]})
    names = {"unet": again[0], "text_encoder": again[1], "text_encoder_2": again[2]}
    names["pipe"] = pipeline(*(new := models()))
    exec(load, names)
    assert torch.equal(output(*again), output(*ours))
    torch.testing.assert_close(output(*new), output(*ours), rtol=0, atol=1e-8)
