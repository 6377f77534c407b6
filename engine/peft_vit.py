"""PEFT folders of Hugging Face's ViT: their layer names, pretrained weights and class names.

PEFT finds layers by name, and transformers 5 renamed a ViT's layers: "hf5" are the new names, "hf" the old.
"""

from pathlib import Path

import torch
from torch import nn

import vit
from engine.files import optional_json, read_json
from engine.peft_folder import CONFIG, PREFIX, endings, ends, expected, layers_of, read_peft

LABELS = "id2label.json"  # not config.json, which would make transformers load a whole model


def hf_names(model: str, layout: str) -> dict[str, str]:
    """From our names of a ViT's modules to those in Hugging Face's ViTForImageClassification."""
    names = {ours: f"vit.{theirs}" for ours, theirs in vit.names(model, layout).items()}
    return {**names, "heads.head": "classifier"}


def renamed(key: str, names: dict[str, str]) -> str | None:
    """A tensor's key with its module renamed; None if the module is not among the names."""
    for end in ("", *ends(key)):
        module = key[: len(key) - len(end)].removesuffix(".")
        if module in names:
            return f"{names[module]}.{end}" if end else names[module]
    return None


def read_vit(folder: Path) -> tuple[str, list[str], dict, dict[str, torch.Tensor]]:
    """Our model name, our layer names, the settings and the tensors of a PEFT folder for Hugging Face's ViT.

    The tensors have the keys of one layout. If the folder holds both, their tensors must be equal.
    """
    settings, tensors = read_peft(folder)
    head = tensors.get("classifier.weight")
    if head is None or head.ndim != 2:
        raise ValueError(
            f"{folder}: {PREFIX}classifier.weight: expected the trained head, found no such tensor; "
            'PEFT saves it with modules_to_save=["classifier"]'
        )
    widths = {shape["hidden_dim"]: name for name, shape in vit.MODELS.items()}
    if head.shape[1] not in widths:
        raise ValueError(
            f"{folder}: {PREFIX}classifier.weight: expected {' or '.join(map(str, widths))} columns, "
            f"found {head.shape[1]}"
        )
    name = widths[head.shape[1]]
    ours = {hf: n for layout in ("hf", "hf5") for n, hf in hf_names(name, layout).items()}
    names = names_in(tensors, name)
    kept = {}
    for key, tensor in tensors.items():
        if (our := renamed(key, ours)) is None:
            raise ValueError(
                f"{folder}: {PREFIX}{key}: expected a tensor of a ViT, found an unknown name"
            )
        same = kept.setdefault(renamed(our, names), tensor)
        if not torch.equal(same, tensor):
            raise ValueError(
                f"{folder}: {PREFIX}{key}: expected the same tensor as under the layer's other name"
            )
    return name, [renamed(layer, ours) for layer in layers_of(kept)], settings, kept


def names_in(tensors: dict, model: str) -> dict[str, str]:
    """hf_names for the layout of these tensors; for the newer one if they have both."""
    return hf_names(model, "hf5" if any(key.startswith("vit.layers.") for key in tensors) else "hf")


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
    if base == vit.IN21K:
        return "in21k"
    if base and Path(base).exists():
        return str(Path(base).absolute())
    raise ValueError(
        f"{folder / CONFIG}: base_model_name_or_path: expected {vit.IN21K} or a folder on this machine, "
        f"found {base!r}; name the pretrained weights with --weights"
    )


def labels_in(folder: Path) -> list[str]:
    """The class names in a folder, in order; [] for a folder that PEFT wrote."""
    labels = optional_json(folder / "config.json").get("id2label") or {}
    labels = optional_json(folder / LABELS) or labels
    return [labels[key] for key in sorted(labels, key=int)]
