"""export.py in both directions, checked with the real PEFT, transformers and torchvision."""

import copy
import functools
import json
import shutil

import numpy as np
import peft
import pytest
import torch
import torchvision
from adapters import CASES, CLASSES, write_adapter
from hf import hf_vit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from trees import write_image

import data
import export
import vit
from engine import checkpoint, images
from engine.adapt import adapt
from engine.peft_folder import endings, save_peft
from lora import LoRALinear, mark_trainable, replace_linear

every_case = pytest.mark.parametrize("case", CASES)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 28 * 28).reshape(2, 3, 28, 28).sin()


def opened(folder, base=None):
    """The folder's model, loaded with PEFT and transformers as in their documentation."""
    config = peft.PeftConfig.from_pretrained(folder)
    id2label = json.loads((folder / "id2label.json").read_text("utf-8"))
    model = AutoModelForImageClassification.from_pretrained(
        base or config.base_model_name_or_path,
        id2label={int(i): name for i, name in id2label.items()},
        label2id={name: int(i) for i, name in id2label.items()},
        ignore_mismatched_sizes=True,
    )
    return peft.PeftModel.from_pretrained(model, folder).eval()


def rewrite(folder, tensors=lambda t: None, config=lambda c: None):
    """Change a PEFT folder in place."""
    content = load_file(folder / "adapter_model.safetensors")
    tensors(content)
    save_file(content, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config(settings)
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def drop(part):
    def change(tensors):
        dropped = [key for key in tensors if part in key]
        assert dropped
        for key in dropped:
            del tensors[key]

    return change


@every_case
def test_a_folder_opens_in_peft_with_our_logits(case, tmp_path):
    with torch.no_grad():
        logits = write_adapter(tmp_path / "a.safetensors", case)(IMAGES)
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    theirs = opened(tmp_path / "folder")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES).logits, logits, rtol=0, atol=1e-5)
    assert theirs.config.id2label[1] == "crème brûlée"
    if case != "loha-bias":  # PEFT trains and saves biases only with LoRA
        theirs.save_pretrained(tmp_path / "resaved")
        export.from_peft(tmp_path / "resaved", tmp_path / "b.safetensors", classes="x,y,z")
        a, b = (checkpoint.read_adapter(tmp_path / f"{n}.safetensors")[0] for n in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    # the controls: a wrong alpha, a missing layer
    alpha = "lora_alpha" if "lora" in case else "alpha"
    for n, wrong in enumerate(
        [
            {"config": lambda c: c.update({alpha: 2 * c[alpha]})},
            {"tensors": drop("attention" if "mlp" not in CASES[case]["targets"] else "fc")},
        ]
    ):
        shutil.copytree(tmp_path / "folder", tmp_path / f"wrong{n}")
        rewrite(tmp_path / f"wrong{n}", **wrong)
        with torch.no_grad():
            assert (opened(tmp_path / f"wrong{n}")(IMAGES).logits - logits).abs().max() > 1e-3
    rewrite(tmp_path / "folder", drop("classifier"))
    with pytest.raises(KeyError, match="classifier"):
        opened(tmp_path / "folder")


def test_prediction_as_in_peft_s_documentation(tmp_path):
    preprocessing = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.3, 0.4],
        "crop": 0.875,
        "image_size": 28,
    }
    model = write_adapter(tmp_path / "a.safetensors", "lokr", **preprocessing)
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    write_image(tmp_path / "image.jpg", 3, 1, (60, 84))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    with Image.open(tmp_path / "image.jpg") as image:
        encoding = processor(image.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        theirs = opened(tmp_path / "folder")(**encoding).logits
        ours = model(encoding["pixel_values"])
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    split = images.Split(np.zeros(1, np.int64), [str(tmp_path / "image.jpg")])
    pixels, _ = next(data.batches(split, 1, preprocessing, workers=0))
    difference = (pixels - encoding["pixel_values"]).abs()
    assert difference.mean() < 0.1 < pixels.std() / 5, "the folder prepares images as we do"


def test_pretrained_weights_of_hugging_face_need_no_copy(tmp_path):
    """The folder names their model, whose eps is kept too."""
    hf_vit(CLASSES).save_pretrained(tmp_path / "trunk")
    model = write_adapter(tmp_path / "a.safetensors", "lora", str(tmp_path / "trunk"))
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder", base=str(tmp_path / "trunk"))
    assert not (tmp_path / "folder" / "base").exists()
    with torch.no_grad():
        theirs = opened(tmp_path / "folder")(IMAGES).logits
        torch.testing.assert_close(theirs, model(IMAGES), rtol=0, atol=1e-5)
    export.from_peft(tmp_path / "folder", tmp_path / "back.safetensors")
    back, info = vit.load_adapter(tmp_path / "back.safetensors")
    assert info["shape"]["eps"] == 1e-12 and torch.equal(back(IMAGES), model(IMAGES))


OLD = {
    "layers": "encoder.layer",
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def old_name(name):
    for new, old in OLD.items():
        name = name.replace(new, old)
    return name


def old_tree(model) -> nn.Module:
    """The linear layers of a ViT, in modules with the names of older transformers."""
    tree = nn.Module()
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            *path, last = old_name(name).split(".")
            parent = tree
            for part in path:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, layer)
    return tree


@every_case
def test_older_transformers_find_every_layer_and_no_other(case, tmp_path):
    model = write_adapter(tmp_path / "a.safetensors", case)
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    theirs = peft.PeftModel.from_pretrained(old_tree(hf_vit(CLASSES)), tmp_path / "folder")
    names = export.hf_names("vit")[0]
    adapters = {n: m for n, m in model.named_modules() if hasattr(m, "delta_weight")}
    ours = {export.renamed(n, names): m for n, m in adapters.items()}
    found = {
        name.removeprefix("base_model.model."): m.get_delta_weight("default")
        for name, m in theirs.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    assert set(found) == set(ours)
    for name, layer in ours.items():
        torch.testing.assert_close(found[name], layer.delta_weight(), rtol=1e-5, atol=1e-6)
    head = theirs.base_model.model.classifier.modules_to_save["default"]
    assert torch.equal(head.weight, model.heads.head.weight)
    # the control: the new names alone are not found
    rewrite(tmp_path / "folder", config=lambda c: c.update(target_modules=["q_proj", "fc2"]))
    with pytest.raises(ValueError, match="No modules were targeted"):
        peft.PeftModel.from_pretrained(old_tree(hf_vit(CLASSES)), tmp_path / "folder")


@every_case
def test_a_round_trip_keeps_every_tensor_bit_for_bit(case, tmp_path):
    preprocessing = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "crop": 0.875,
        "image_size": 28,
    }
    write_adapter(tmp_path / "a.safetensors", case, **preprocessing)
    export.to_peft(tmp_path / "a.safetensors", tmp_path / "folder")
    export.from_peft(tmp_path / "folder", tmp_path / "b.safetensors")
    (a, info), (b, info_back) = (
        checkpoint.read_adapter(tmp_path / f"{n}.safetensors") for n in "ab"
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert info_back == {**info, "weights": str(tmp_path / "folder" / "base")}
    (tmp_path / "folder").rename(tmp_path / "moved")
    export.from_peft(tmp_path / "moved", tmp_path / "c.safetensors", classes="one,two,three")
    assert vit.load_adapter(tmp_path / "c.safetensors")[1]["classes"] == [
        "one",
        "two",
        "three",
    ]


CONFIGS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["q_proj", "fc2"]),
    "lora-bias": peft.LoraConfig(r=3, lora_alpha=7, bias="all", target_modules="all-linear"),
    "lora-own": peft.LoraConfig(r=3, lora_alpha=7, bias="lora_only", target_modules=["q_proj"]),
    "loha": peft.LoHaConfig(r=2, alpha=5, module_dropout=0.1, target_modules=r".*\.(q|o)_proj"),
    "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=["fc1", "v_proj"], rank_dropout=0.1),
    "lokr-both": peft.LoKrConfig(
        r=2, alpha=5, target_modules=["fc1"], decompose_both=True, decompose_factor=8
    ),
}


def peft_trained(case, root):
    """Train a model with PEFT and save it to root/folder; return the PeftModel."""
    hf_vit(CLASSES).save_pretrained(root / "trunk")
    base = AutoModelForImageClassification.from_pretrained(root / "trunk")
    config = copy.deepcopy(CONFIGS[case])
    config.modules_to_save = ["classifier"]
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(IMAGES).logits, torch.tensor([0, 2]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "folder")
    return model.eval()


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_that_peft_trained_gives_its_logits_here(case, names, tmp_path):
    theirs = peft_trained(case, tmp_path)
    if names == "old":

        def rename(tensors):
            for key in list(tensors):
                tensors[old_name(key)] = tensors.pop(key)

        rewrite(tmp_path / "folder", rename)
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASSES) + "\n", "utf-8")
    path = tmp_path / "a.safetensors"
    export.from_peft(tmp_path / "folder", path, classes=str(classes))
    ours, info = vit.load_adapter(path)
    assert info["classes"] == CLASSES and info["adapter"] == case.split("-")[0]
    with torch.no_grad():
        logits = theirs(IMAGES).logits
        torch.testing.assert_close(ours(IMAGES), logits, rtol=0, atol=1e-5)
    # the control: with another alpha, the logits differ
    alpha = "lora_alpha" if "lora" in case else "alpha"
    rewrite(tmp_path / "folder", config=lambda c: c.update({alpha: c[alpha] + 20}))
    export.from_peft(tmp_path / "folder", tmp_path / "b.safetensors", classes=str(classes))
    wrong, _ = vit.load_adapter(tmp_path / "b.safetensors")
    assert (wrong(IMAGES) - logits).abs().max() > 1e-4


KEY = "base_model.model.vit.layers.1.attention.q_proj.lora_A.weight"


def keep(tensors):
    pass


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (drop(KEY), {}, rf"{KEY}: expected shape \(3, 128\), found no such tensor"),
        (drop("classifier.weight"), {}, r"classifier\.weight: expected the trained head, found no"),
        (drop("classifier.bias"), {}, r"classifier\.bias: expected shape \(3,\), found no such"),
        (drop("lora_"), {}, "expected factors of an adapter"),
        (lambda t: t.update({KEY: torch.ones(3, 64)}), {}, rf"{KEY}: .*, found \(3, 64\)"),
        (lambda t: t.update(x=torch.ones(1)), {}, "x: expected a key that begins with base_model"),
        (
            lambda t: t.update({KEY.replace("vit", "bert"): torch.ones(1)}),
            {},
            r"bert\.layers.*: expected a tensor of a ViT",
        ),
        (
            lambda t: t.update({old_name(KEY): torch.ones(3, 128)}),
            {},
            "expected the same tensor as under the layer's other name",
        ),
        (keep, {"use_dora": True}, "use_dora: expected none, found True"),
        (keep, {"rank_pattern": {"q_proj": 4}}, "rank_pattern, alpha_pattern: expected one rank"),
        (keep, {"alpha_pattern": {"q_proj": 4}}, "rank_pattern, alpha_pattern: expected one rank"),
        (keep, {"lora_bias": True}, "lora_bias: expected none"),
        (keep, {"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes"),
        (keep, {"peft_type": "VERA"}, "peft_type: expected one of LORA, LOHA, LOKR"),
        (keep, {"peft_type": "LOHA", "alpha": 7}, "hada_w1_a: expected shape"),
        (keep, {"r": "3"}, "r: expected a number above 0, found '3'"),
        (keep, {"lora_alpha": None}, "lora_alpha: expected a number above 0, found None"),
        (keep, {"bias": "all"}, "bias: 'all', but adapter_model.safetensors holds no bias"),
        (keep, {"base_model_name_or_path": "nowhere"}, "base_model_name_or_path: .*--weights"),
    ],
)
def test_a_wrong_folder_is_refused_with_key_expected_and_found(tensors, config, message, tmp_path):
    peft_trained("lora", tmp_path)
    path = tmp_path / "a.safetensors"
    export.from_peft(tmp_path / "folder", path, classes="x,y,z")
    path.unlink()
    rewrite(tmp_path / "folder", tensors, lambda c: c.update(config))
    with pytest.raises(ValueError, match=message) as error:
        export.from_peft(tmp_path / "folder", path, classes="x,y,z")
    assert str(tmp_path / "folder") in str(error.value) and "\n" not in str(error.value)
    assert not path.exists()


def test_incomplete_folders_and_missing_names_are_refused(tmp_path):
    peft_trained("lora", tmp_path)
    folder, path = tmp_path / "folder", tmp_path / "a.safetensors"
    with pytest.raises(
        ValueError, match=r"names of its 3 classes, found 0; give them with --classes"
    ):
        export.from_peft(folder, path)
    with pytest.raises(ValueError, match="3 classes, found 2"):
        export.from_peft(folder, path, classes="x,y")
    with pytest.raises(ValueError, match="3 classes, found 101"):  # too long for a file name
        export.from_peft(folder, path, classes=",".join(f"class number {i}" for i in range(101)))
    (folder / "adapter_config.json").rename(tmp_path / "config")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_config\.json"):
        export.from_peft(folder, path, classes="x,y,z")
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(
        ValueError, match=r"adapter_config\.json: expected a JSON object, found list"
    ):
        export.from_peft(folder, path, classes="x,y,z")
    (tmp_path / "config").rename(folder / "adapter_config.json")
    (folder / "adapter_model.safetensors").rename(tmp_path / "tensors")
    with pytest.raises(FileNotFoundError, match=r"expected adapter_model\.safetensors or"):
        export.from_peft(folder, path, classes="x,y,z")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


def test_a_malicious_bin_is_refused_and_a_harmless_one_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peft_trained("lora", tmp_path)
    file = tmp_path / "folder" / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "folder" / "adapter_model.bin")
    export.from_peft("folder", "harmless.safetensors", classes="x,y,z")
    torch.save({**tensors, "x": Bomb()}, tmp_path / "folder" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: not a file of tensors"):
        export.from_peft("folder", "malicious.safetensors", classes="x,y,z")
    assert not (tmp_path / "bomb-went-off").exists()
    torch.load("folder/adapter_model.bin", weights_only=False)
    assert (tmp_path / "bomb-went-off").exists(), "the control: unpickling runs its code"


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("case", [*CASES, "head", "full"])
def test_stock_torchvision_loads_the_merged_model_strictly(case, suffix, tmp_path):
    model = write_adapter(tmp_path / "a.safetensors", case)
    file = tmp_path / f"merged.{suffix}"
    expression = export.to_torchvision(tmp_path / "a.safetensors", file)
    stock = eval(expression, {"torchvision": torchvision}).eval()
    fresh = stock(IMAGES)
    read = load_file if suffix == "safetensors" else lambda f: torch.load(f, weights_only=True)
    stock.load_state_dict(read(file), strict=True)
    with torch.no_grad():
        logits = model(IMAGES)
        torch.testing.assert_close(stock(IMAGES), logits, rtol=0, atol=1e-5)
        assert (fresh - logits).abs().max() > 1e-2
    if case in CASES:  # the control: without the adapter, the logits differ
        plain, _ = vit.build("vit_mini", "embedded", 3)
        plain.heads = model.heads
        assert (plain.eval()(IMAGES) - logits).abs().max() > 1e-3


@pytest.mark.slow
def test_vit_b_16_and_its_eps_in_torchvision(tmp_path):
    """At full size. Hugging Face's weights have another eps, which a state dict does not store."""
    trunk, _ = vit.build("vit_b_16", "none", 3)
    adapt(trunk, "full")
    for p in trunk.parameters():
        p.data *= 0.003 if p.ndim > 1 else 1  # eps matters for small activations
    info = {"adapter": "full", "rank": 4, "alpha": 4.0, "targets": "all", "bias": "none"}
    info |= {"factor": -1, "decompose_both": False, "shape": {**trunk.shape, "eps": 1e-12}}
    info |= {"seed": 0, "weights": "none", "classes": CLASSES}
    info["trunk"] = checkpoint.fingerprint(trunk)
    info["preprocessing"] = {**vit.HALF, "crop": 1.0, "image_size": 224}
    checkpoint.save_adapter(tmp_path / "trunk.safetensors", trunk, info)
    model = write_adapter(
        tmp_path / "a.safetensors", "lora", str(tmp_path / "trunk.safetensors"), "vit_b_16"
    )
    assert model.encoder.ln.eps == 1e-12
    expression = export.to_torchvision(tmp_path / "a.safetensors", tmp_path / "merged.pth")
    assert expression.startswith("torchvision.models.vit_b_16(num_classes=3, norm_layer=")
    images = torch.linspace(-2, 2, 3 * 224 * 224).reshape(1, 3, 224, 224).sin()
    stock = eval(expression, {"torchvision": torchvision, "torch": torch, "functools": functools})
    other = torchvision.models.vit_b_16(num_classes=3)
    for loaded in (stock, other):
        loaded.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True), strict=True)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(stock.eval()(images), logits, rtol=0, atol=1e-5)
        assert (other.eval()(images) - logits).abs().max() > 1e-5


def test_endings_are_the_shortest_that_no_other_layer_has():
    blocks = [f"blocks.{i}" for i in range(2)]
    queries = [f"{block}.query" for block in blocks]
    firsts = [f"{block}.mlp.0" for block in blocks]
    assert endings(queries + firsts, ["head", *blocks]) == ["query", "mlp.0"]
    assert endings(queries[:1], [queries[1]]) == ["blocks.0.query"]
    assert endings(["b.out"], ["a.out"]) == ["b.out"]
    with pytest.raises(ValueError, match="out: expected a name that is not the end of another"):
        endings(["out"], ["a.out"])


@pytest.mark.parametrize(("rank", "alpha"), [(3, 5.0), (2, 1 / 3), (7, 0.1)])
def test_alpha_is_the_one_that_was_given(rank, alpha, tmp_path):
    """The layer stores only alpha / rank; times rank, this can differ from alpha by a rounding error."""
    model = nn.Sequential(nn.Linear(9, 8))
    replace_linear(model, lambda layer: LoRALinear(layer, rank=rank, alpha=alpha), head="")
    mark_trainable(model, head="")
    save_peft(model, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["lora_alpha"] == pytest.approx(alpha, abs=1e-15)
    assert config["lora_alpha"] / rank == model[0].scale


def test_models_that_peft_cannot_save_are_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no adapter: add adapters"):
        save_peft(model, tmp_path / "folder")
    replace_linear(model, lambda layer: LoRALinear(layer, rank=2, alpha=3), ["0"])
    with pytest.raises(
        ValueError, match=r"0\.linear\.weight is trainable, but a PEFT folder has no place"
    ):
        save_peft(model, tmp_path / "folder")
    replace_linear(model, lambda layer: LoRALinear(layer, rank=2, alpha=5), ["1"])
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"one kind, rank and scale, found LoRALinear rank 2 scale 1\.5"
    ):
        save_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("a.safetensors", "expected either --to or --from; see --help"),
        ("a.safetensors --to onnx x", "--to onnx: expected peft or torchvision"),
        ("b.safetensors --from torchvision x", "--from torchvision: expected peft; see"),
        ("a.safetensors --to peft x --classes a,b", "--classes: only for --from peft"),
        ("a.safetensors --to peft x --classes=", "--classes: only for --from peft"),
        ("a.safetensors --to torchvision x --base a/b", "--base: only for --to peft"),
        ("a.safetensors --to pfet x --base a/b", "--to pfet: expected peft or torchvision"),
        (
            "folder --to kohya x --weights w",
            "--weights: only for --to peft, --to torchvision, --from",
        ),
        ("missing.safetensors --to peft x", "missing.safetensors: no such adapter file"),
        ("a.safetensors --to peft folder", "folder: already holds an adapter"),
        ("a.safetensors --from peft folder", "a.safetensors: already exists"),
        ("a.safetensors --to torchvision a.safetensors", "a.safetensors: already exists"),
        ("a.safetensors --to torchvision no/x.pth", "no: no such folder; make it first"),
        ("b.safetensors --from peft missing", "missing: expected adapter_config.json, found no"),
        ("head.safetensors --to peft x", "adapter: expected one of lora, loha, lokr, found 'head'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_adapter("a.safetensors", "lora")
    write_adapter("head.safetensors", "head")
    export.to_peft("a.safetensors", "folder")
    assert export.main(flags.split()) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("export.py: ") and message in error and "\n" not in error


@pytest.mark.slow
def test_the_command_line_converts_both_ways(run_script, tmp_path):
    write_adapter(tmp_path / "a.safetensors", "lokr")
    for flags in ("a.safetensors --to peft folder", "b.safetensors --from peft folder"):
        process = run_script("export.py", *flags.split())
        assert process.returncode == 0, process.stderr
    assert vit.load_adapter(tmp_path / "b.safetensors")[1]["classes"] == CLASSES
    process = run_script("export.py", "a.safetensors", "--to", "torchvision", "merged.pth")
    assert "merged.pth loads into torchvision.models.VisionTransformer(" in process.stdout


def test_weights_that_have_moved_are_not_looked_up_by_their_old_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    hf_vit(CLASSES).save_pretrained(tmp_path / "trunk")
    trunk = str(tmp_path / "trunk")
    write_adapter(tmp_path / "a.safetensors", "lora", weights=trunk, model=None)
    tensors, info = checkpoint.read_adapter(tmp_path / "a.safetensors")
    info["weights"] = "somebody/trunk-of-before"
    checkpoint.write_adapter(tmp_path / "b.safetensors", tensors, info)
    export.to_peft(tmp_path / "b.safetensors", tmp_path / "folder", weights=trunk)
    config = json.loads((tmp_path / "folder" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/trunk-of-before"
