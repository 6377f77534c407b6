"""PEFT folders of LoKr with every factor, of rsLoRA, and with ranks and alphas that differ by layer.

PEFT's rule for LoKr's sides is not ours: it does not sort them.
"""

import copy
import json
from functools import partial

import adapters
import peft
import pytest
import test_export
import torch
from adapters import randomise
from peft.tuners.lokr.layer import factorization as peft_s
from safetensors.torch import load_file
from test_export import IMAGES, opened
from torch import nn

import export
import vit
from engine.peft_folder import load_peft, save_peft
from loha import LoHaLinear
from lokr import LoKrLinear, factorization
from lora import LoRALinear, mark_trainable, replace_linear

FACTORS = range(-1, 65)
# Widths, and the factors for which PEFT has none: with 48, W1's side is 16 for 768 and 48 for 3,072.
WIDTHS = {
    (768,): [],
    (1024,): [],
    (3072,): [],
    (768, 1024): [48, 64],
    (768, 3072): [48, 64],
    (1024, 3072): [64],
}
every_set = pytest.mark.parametrize("widths", WIDTHS, ids=str)


def network(widths):
    """A layer with these widths, or square. It holds one number, so that it takes no memory."""
    layer = nn.utils.skip_init(nn.Linear, widths[0], widths[-1], dtype=torch.float64)
    layer.weight = nn.Parameter(torch.full((1,), 0.01, dtype=torch.float64).expand_as(layer.weight))
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


def ours_with(widths, factor, rank=3, **more):
    """The layer with a LoKr of alpha 7, whose factors are random."""
    model = network(widths)
    wrap = partial(LoKrLinear, rank=rank, alpha=7, factor=factor, **more)
    replace_linear(model, wrap, "all", "")
    mark_trainable(model, "")
    return randomise(model)


def peft_s_with(widths, factor, folder):
    """A folder that PEFT has written for the layer with a random LoKr of alpha 7; its model."""
    torch.manual_seed(0)
    config = peft.LoKrConfig(
        r=3, alpha=7, decompose_factor=factor, target_modules=["0"], init_weights=False
    )
    model = peft.get_peft_model(network(widths), config)
    model.save_pretrained(folder)
    return model.eval()


def assert_same_layer(theirs, ours, folder):
    """PEFT's layer and ours hold the folder's tensors, with the same scale."""
    theirs, tensors = theirs.base_model.model[0], load_file(folder / "adapter_model.safetensors")
    factors = dict(ours[0].named_parameters(recurse=False))
    assert {key.rpartition(".")[2] for key in tensors} == factors.keys()
    for key, tensor in tensors.items():
        name = key.rpartition(".")[2]
        assert torch.equal(factors[name], tensor)
        assert torch.equal(getattr(theirs, name)["default"], tensor)
    assert theirs.scaling["default"] == ours[0].scale == 7 / 3


@torch.no_grad()
def assert_same_output(theirs, ours):
    torch.manual_seed(0)
    x = torch.randn(2, ours[0].in_features, dtype=torch.float64)
    y = ours(x)
    torch.testing.assert_close(theirs(x), y, rtol=0, atol=1e-9)
    assert (y - ours[0].linear(x)).abs().max() > 0.1


@every_set
def test_peft_opens_what_is_written_for_every_factor_or_nothing_is_written(widths, tmp_path):
    refused = []
    for factor in FACTORS:
        folder, ours = tmp_path / str(factor), ours_with(widths, factor)
        sides = [factorization(width, factor) for width in widths]
        try:
            save_peft(ours, folder)
        except ValueError as error:
            assert "lokr_w1: no decompose_factor gives PEFT's Linear these sides" in str(error)
            assert str(folder) in str(error) and "\n" not in str(error)
            assert not folder.exists()
            # an oracle: PEFT's own function with all factors
            assert not any(sides == [peft_s(w, n) for w in widths] for n in range(-1, 3073))
            refused.append(factor)
            continue
        theirs = peft.PeftModel.from_pretrained(network(widths), folder)
        assert_same_layer(theirs, ours, folder)
        if factor in (-1, 5, 32, 40, 64):
            assert_same_output(theirs, ours)
    assert refused == WIDTHS[widths]


@every_set
def test_what_peft_has_written_for_every_factor_is_read_and_written_again(widths, tmp_path):
    for factor in FACTORS:
        folder, ours = tmp_path / str(factor), network(widths)
        theirs = peft_s_with(widths, factor, folder)
        load_peft(ours, folder)
        assert_same_layer(theirs, ours, folder)
        if factor in (-1, 5, 32, 40, 64):
            assert_same_output(theirs, ours)
            save_peft(ours, tmp_path / f"again{factor}")
            again = peft.PeftModel.from_pretrained(network(widths), tmp_path / f"again{factor}")
            assert_same_layer(again, ours, folder)


def test_our_rule_is_not_peft_s(tmp_path):
    """The control of the two tests above: with our factor as decompose_factor, PEFT refuses the folder."""
    save_peft(ours_with((768, 3072), 32), tmp_path / "folder")
    path = tmp_path / "folder" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["decompose_factor"] != 32
    path.write_text(json.dumps({**config, "decompose_factor": 32}))
    with pytest.raises(RuntimeError, match=r"size mismatch.*lokr_w1"):
        peft.PeftModel.from_pretrained(network((768, 3072)), tmp_path / "folder")
    # Ours does not read decompose_factor, but the tensors: also an older folder of ours, with a wrong one.
    loaded = network((768, 3072))
    load_peft(loaded, tmp_path / "folder")
    assert torch.equal(loaded[0].lokr_w1, ours_with((768, 3072), 32)[0].lokr_w1)


@pytest.mark.parametrize("rank", [2, 14])
def test_unsorted_sides_with_w1_as_a_product(rank, tmp_path):
    """W1 is 32 x 32 and W2 24 x 24: with rank 14, W2 is whole."""
    ours = ours_with((768,), -32, rank, decompose_both=True)
    assert ours[0].lokr_w1_a.shape == (32, rank) and hasattr(ours[0], "lokr_w2") == (rank == 14)
    save_peft(ours, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["decompose_factor"] == 32 and config["decompose_both"]
    theirs = peft.PeftModel.from_pretrained(network((768,)), tmp_path / "folder")
    assert_same_output(theirs, ours)
    loaded = network((768,))
    load_peft(loaded, tmp_path / "folder")
    x = torch.randn(2, 768, dtype=torch.float64)
    assert torch.equal(loaded(x), ours(x))


def test_tensors_of_no_factor_or_missing_ones_are_one_line(tmp_path):
    save_peft(ours_with((768,), -1), tmp_path / "folder")
    file = tmp_path / "folder" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.0.lokr_w1"
    for changed, message in (
        ({key: torch.ones(24, 48)}, r"lokr_w1: no decompose_factor .* 24 for 768, 48 for 1536"),
        ({key: torch.ones(24)}, r"lokr_w1: expected shape \(24, 24\), found \(24,\)"),
        ({key: None}, r"lokr_w1: expected shape \(24, 24\), found no such tensor"),
        ({key: torch.ones(12, 24)}, r"lokr_w1: expected shape"),
    ):
        content = {k: t for k, t in {**tensors, **changed}.items() if t is not None}
        torch.save(content, file.with_suffix(".bin"))
        file.unlink(missing_ok=True)
        model = network((768,))
        with pytest.raises(ValueError, match=message) as error:
            load_peft(model, tmp_path / "folder")
        assert "\n" not in str(error.value) and type(model[0]) is nn.Linear


@pytest.mark.parametrize(("factor", "fits"), [(16, True), (32, False), (-32, True)])
def test_an_adapter_file_becomes_a_folder_of_peft_or_none(factor, fits, tmp_path, monkeypatch):
    """The widths of vit_mini are 128 and 256."""
    form = {"rank": 2, "alpha": 5.0, "targets": "all", "factor": factor}
    monkeypatch.setitem(adapters.CASES, "lokr-factor", form)
    model = adapters.write_adapter(tmp_path / "a.safetensors", "lokr-factor")
    if not fits:
        with pytest.raises(ValueError, match="folder: lokr_w1: no decompose_factor"):
            export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        return
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    with torch.no_grad():
        logits = opened(tmp_path / "folder")(IMAGES).logits
        torch.testing.assert_close(logits, model(IMAGES), rtol=0, atol=1e-5)
    export.from_peft(tmp_path / "folder", tmp_path / "b.safetensors")
    back, _ = vit.load_adapter(tmp_path / "b.safetensors")
    assert torch.equal(back(IMAGES), model(IMAGES))


LORA = partial(peft.LoraConfig, r=3, lora_alpha=7, target_modules=["q_proj", "fc1"])
TRAINED = {
    "lokr 32": peft.LoKrConfig(r=2, alpha=5, decompose_factor=32, target_modules=["q_proj", "fc1"]),
    "rslora": LORA(use_rslora=True),
    "equal": LORA(rank_pattern={"_proj": 9, "fc1|q_proj": 4}, alpha_pattern={r".*\d.*": 9}),
    "different": LORA(rank_pattern={"q_proj": 2}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_an_adapter_file_holds_what_peft_trained_if_rank_and_alpha_are_one(
    case, tmp_path, monkeypatch
):
    monkeypatch.setitem(test_export.CONFIGS, case, TRAINED[case])
    theirs, path = test_export.peft_trained(case, tmp_path), tmp_path / "a.safetensors"
    if case == "different":
        with pytest.raises(ValueError, match="rank_pattern, alpha_pattern: expected one rank and"):
            export.from_peft(tmp_path / "folder", path, classes="x,y,z")
        assert not path.exists()
        return
    info = export.from_peft(tmp_path / "folder", path, classes="x,y,z")
    expected = {"lokr 32": (2, 5), "rslora": (3, 7 * 3**0.5), "equal": (4, 9)}[case]
    assert (info["rank"], info["alpha"]) == pytest.approx(expected, rel=1e-15)
    ours, _ = vit.load_adapter(path)
    with torch.no_grad():
        torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, rtol=0, atol=1e-5)


KINDS = {
    "lora": (LoRALinear, peft.LoraConfig, "lora_alpha"),
    "rslora": (LoRALinear, partial(peft.LoraConfig, use_rslora=True), "lora_alpha"),
    "loha": (LoHaLinear, peft.LoHaConfig, "alpha"),
    "lokr": (LoKrLinear, peft.LoKrConfig, "alpha"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.out(self.q(x).tanh())


def blocks():
    """Three blocks and a layer out, whose name is the end of others, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block()).double()
    model.add_module("last", nn.Linear(24, 24).double())
    return model


PATTERNS = {
    "none": ({}, {}),
    "end": ({"q": 5}, {"out": 3}),
    "whole names": ({"0.q": 2, "2.out": 7}, {"0.q": 9, "2.out": 1.5}),
    "expressions": ({r"[01]\.(q|out)": 3}, {r"[02].q": 11, r"^1\.q": 2}),
    # in the order in which PEFT saves them, which it sorts
    "the first of several": ({".*q": 2, "0.q": 7, "ut": 9}, {".*": 3, "q": 7}),
}


@every_kind
@pytest.mark.parametrize("case", PATTERNS)
def test_each_layer_has_the_rank_and_alpha_that_peft_gives_it(kind, case, tmp_path):
    _, config, alpha = KINDS[kind]
    ranks, alphas = PATTERNS[case]
    config = config(
        r=4, **{alpha: 6}, rank_pattern=ranks, alpha_pattern=alphas, target_modules=r".*\b(q|out)"
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(blocks(), config).double().eval()
    for p in theirs.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path / "folder")
    ours = blocks()
    names = load_peft(ours, tmp_path / "folder")
    assert len(names) == 6
    for name in names:
        layer, peft_layer = ours.get_submodule(name), theirs.base_model.model.get_submodule(name)
        assert layer.rank == peft_layer.r["default"], name
        assert layer.scale == pytest.approx(peft_layer.scaling["default"], rel=1e-15), name
    x = torch.randn(5, 24, dtype=torch.float64)
    atol = 1e-6 if kind == "loha" else 1e-12  # PEFT's LoHa rounds its scale to float32
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=atol)
        assert (ours(x) - blocks()(x)).abs().max() > 0.01
    if case == "none":  # written again, with rsLoRA's scale as an alpha
        save_peft(ours, tmp_path / "again")
        again = peft.PeftModel.from_pretrained(blocks(), tmp_path / "again").double()
        with torch.no_grad():
            torch.testing.assert_close(again(x), theirs(x), rtol=0, atol=1e-6)
        loaded = blocks()
        load_peft(loaded, tmp_path / "again")
        a, b = ours.state_dict(), loaded.state_dict()
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    else:
        with pytest.raises(ValueError, match="expected adapters of one kind, rank and scale"):
            save_peft(ours, tmp_path / "again")


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("other", [nn.Conv2d(6, 8, 3), nn.Conv1d(6, 8, 1), nn.Embedding(6, 8)])
def test_other_layers_than_linear_are_one_line(kind, other, tmp_path):
    def model():
        built = nn.Sequential(nn.Linear(6, 8))
        built.add_module("other", copy.deepcopy(other))
        return built

    config = KINDS[kind][1](r=2, target_modules=["0", "other"])
    if isinstance(other, nn.Embedding) and kind != "lora":
        pytest.skip("PEFT has none")
    peft.get_peft_model(model(), config).save_pretrained(tmp_path / "folder")
    loaded = model()
    with pytest.raises(ValueError, match=r"'other' matches no nn\.Linear|lokr_w1: no ") as error:
        load_peft(loaded, tmp_path / "folder")
    assert "\n" not in str(error.value) and type(loaded[0]) is nn.Linear


REFUSED = {  # those that docs/any-model.md names
    "use_dora": True,
    "lora_bias": True,
    "init_lora_weights": "pissa_niter_4",
    "target_parameters": ["q.weight"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "peft_type": "VERA",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({key: value}, f"{key}: ") for key, value in REFUSED.items()),
        ({"rank_pattern": ["q"]}, r"rank_pattern: expected a JSON object, found \['q'\]"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: expected a number above 0, found 0"),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern: expected a number above 0, found 1.5"),
        ({"alpha_pattern": {"q": "2"}}, "alpha_pattern: expected a number above 0, found '2'"),
        ({"alpha_pattern": {"(q": 2}}, "alpha_pattern: expected regular expressions"),
        ({"rank_pattern": {"q": 3}}, r"q\.lora_A\.weight: expected shape \(3, 24\), found \(2, "),
    ],
)
def test_a_wrong_or_unknown_setting_is_one_line(changed, message, tmp_path):
    ours = blocks()
    replace_linear(ours, partial(LoRALinear, rank=2), ["q", "out"], "")
    mark_trainable(ours, "")
    save_peft(ours, tmp_path / "folder")
    path = tmp_path / "folder" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=message) as error:
        load_peft(blocks(), tmp_path / "folder")
    assert str(tmp_path / "folder") in str(error.value) and "\n" not in str(error.value)
