"""PEFT folders of transformers' Vision Transformers: their layer names, base models and class names.

PEFT finds layers by name. transformers has a class for each family, and transformers 5 renamed the layers of
most: so each family has two tables of names, the older and the newer one.
"""

from pathlib import Path

import torch
from torch import nn

from engine import weights
from engine.files import optional_json, read_json, read_tensors
from engine.layouts import LAYOUTS, renamed
from engine.peft_folder import CONFIG, PREFIX, endings, expected, layers_of, read_peft

LABELS = "id2label.json"  # not config.json, which would make transformers load a whole model
HEAD = "head.safetensors"  # of CLIPVisionModel, which has no place for it
# transformers' model_type: what stands before its names, and their layouts. If names fit several families,
# names_in takes the last.
FAMILIES = {
    "clip_vision_model": [("vision_model.", "clip"), ("", "clip")],
    "vit": [("vit.", "vit"), ("vit.", "vit5")],
    "deit": [("deit.", "vit"), ("deit.", "vit5")],
    "ijepa": [("ijepa.", "vit"), ("ijepa.", "vit5")],
    "dinov2": [("dinov2.", "dinov2"), ("dinov2.", "dinov2-5")],
    "dinov2_with_registers": [
        ("dinov2_with_registers.", "dinov2"),
        ("dinov2_with_registers.", "dinov2-5"),
    ],
}
# Two of them, DINOv2's, give the head the class token and the mean of the patches, one after the other.
WITH_MEAN = ("dinov2", "dinov2_with_registers")


def family_of(shape: dict) -> str:
    """The model_type of transformers' class that computes the same as a trunk with these arguments.

    Raises ValueError if there is none.
    """
    tokens, pool = shape["prefix_tokens"], shape["pool"]
    scaled, swiglu = shape["layer_scale"], shape["activation"] == "swiglu"
    dinov2 = "dinov2_with_registers" if tokens > 1 else "dinov2"
    if shape["pre_norm"]:
        family, fits = "clip_vision_model", tokens == 1 and not scaled and pool == "class"
    elif pool == "mean":
        family, fits = "ijepa", tokens == 0 and not scaled
    elif scaled or pool == "class+mean" or tokens > 2:
        family, fits = dinov2, shape["activation"] in ("gelu", "swiglu")
    else:
        family, fits = ("deit" if tokens == 2 else "vit"), True
    if not fits or (swiglu and family not in WITH_MEAN):
        raise ValueError("transformers has no class for this trunk; try --to torchvision")
    return family


def hf_names(family: str) -> list[dict[str, str]]:
    """From our names to those in a family's class: the older names, and the newer ones.

    {} stands for the number of a block, see layouts.renamed.
    """
    tables = []
    for prefix, layout in FAMILIES[family]:
        names = {ours: prefix + theirs for ours, theirs in LAYOUTS[layout].items()}
        tables.append({**names, "heads.head": "classifier"})
    return tables


def read_vit(folder: Path) -> tuple[list[str], dict, dict[str, torch.Tensor], dict]:
    """A PEFT folder of one of transformers' ViTs: the names of its layers (ours), its settings, its tensors,
    and what it says of the trunk's shape.

    The tensors have the keys of one layout. If the folder holds both, their tensors must be equal.
    """
    settings, forms, tensors = read_peft(folder)
    form, *others = forms.values()
    if any(other != form for other in others):
        raise ValueError(
            f"{folder / CONFIG}: rank_pattern, alpha_pattern: expected one rank and one alpha for all; to "
            "read such a folder into transformers' model, call load_peft of engine/peft_folder.py"
        )
    settings |= form
    if (folder / HEAD).is_file():
        tensors |= read_tensors(folder / HEAD)[0]
    head = tensors.get("classifier.weight")
    if head is None or head.ndim != 2:
        raise ValueError(
            f"{folder}: {PREFIX}classifier.weight: expected the trained head, found no such tensor; "
            'PEFT saves it with modules_to_save=["classifier"]'
        )
    family = family_in(folder, tensors)
    tables = [{theirs: ours for ours, theirs in names.items()} for names in hf_names(family)]
    names = names_in(tensors)
    kept = {}
    for key, tensor in tensors.items():
        ours = next(filter(None, (renamed(key, table) for table in tables)), None)
        if ours is None:
            raise ValueError(
                f"{folder}: {PREFIX}{key}: expected a tensor of a ViT, found an unknown name"
            )
        same = kept.setdefault(renamed(ours, names), tensor)
        if not torch.equal(same, tensor):
            raise ValueError(
                f"{folder}: {PREFIX}{key}: expected the same tensor as under the layer's other name"
            )
    inverse = {theirs: ours for ours, theirs in names.items()}
    layers, shape = [renamed(layer, inverse) for layer in layers_of(kept)], {}
    if family in WITH_MEAN:
        of_class, of_mean = head.chunk(2, 1)
        if of_mean.any():
            shape = {"pool": "class+mean"}
        else:  # as to_peft writes it
            kept["classifier.weight"] = of_class.contiguous()
    return layers, settings, kept, shape


def family_in(folder: Path, tensors: dict) -> str:
    """The family whose names these tensors have."""
    names = names_in(tensors)
    family = next(family for family in FAMILIES if names in hf_names(family))
    if family == "clip_vision_model" and not (folder / HEAD).is_file():
        raise ValueError(
            f"{folder}: CLIPForImageClassification, whose head reads the mean of the patches before the last "
            f"LayerNorm: expected an adapter of CLIPVisionModel with its head in {HEAD}"
        )
    return family


def names_in(tensors: dict) -> dict[str, str]:
    """hf_names for the layout of these tensors; for the newer one if they have both."""
    best, most = {}, -1
    for family in FAMILIES:
        for names in hf_names(family):
            inverse = {theirs: ours for ours, theirs in names.items()}
            fit = sum(renamed(key, inverse) is not None for key in tensors)
            if fit >= most:
                best, most = names, fit
    return best


def parameters_of(model: nn.Module, names: dict[str, str]) -> dict[str, nn.Parameter]:
    """The parameters of our model that train, by their keys in a PEFT folder with these names."""
    return {renamed(key, names): p for key, p in expected(model).items()}


def targets_of(model: nn.Module, layers: list[str]) -> str:
    """The argument targets of adapt that wraps exactly these layers of a ViT."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    others = [name for name, _ in model.named_modules() if name not in layers]
    return "all" if set(layers) == linear - {"heads.head"} else ",".join(endings(layers, others))


def weights_of(folder: Path) -> str:
    """The pretrained weights that a PEFT folder was trained on, as vit.build takes them."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if (folder / "base").is_dir():
        return str((folder / "base").absolute())  # from to_peft; the folder may have moved
    if base == weights.IN21K:
        return "in21k"
    if base and Path(base).exists():
        return str(Path(base).absolute())
    if base and weights.is_hub_name(base):
        return base
    raise ValueError(
        f"{folder / CONFIG}: base_model_name_or_path: expected OWNER/NAME on Hugging Face or a folder that "
        f"exists, found {base!r}; name the pretrained weights with --weights"
    )


def labels_in(folder: Path) -> list[str]:
    """The class names in a folder, in order; [] for a folder that PEFT wrote."""
    labels = optional_json(folder / "config.json").get("id2label") or {}
    labels = optional_json(folder / LABELS) or labels
    if set(labels) != {str(i) for i in range(len(labels))}:
        raise ValueError(
            f"{folder}: id2label: expected names for 0 to {len(labels) - 1}, found {', '.join(labels)}"
        )
    return [labels[key] for key in sorted(labels, key=int)]
