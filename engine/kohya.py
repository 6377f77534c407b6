"""Adapters of a Stable Diffusion UNet and its text encoders in files for ComfyUI, Forge, A1111, diffusers.

    save_kohya(unet, "style.safetensors", [text_encoder, text_encoder_2])   # LoRA, LoHa and LoKr
    load_kohya(unet, "style.safetensors", [text_encoder, text_encoder_2])   # also from sd-scripts, LyCORIS
    save_diffusers_lora(unet, "folder", [text_encoder, text_encoder_2])     # pipe.load_lora_weights("folder")

A key of kohya's sd-scripts is a layer's name with underscores, a dot and a factor's name:
lora_unet_mid_block_attentions_0_proj_in.lora_up.weight. Each layer has its own alpha there, and its rank is
read off the shapes. to_kohya and to_diffusers write the same files from PEFT folders, without a model.
"""

import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from engine.adapt import ADAPTERS
from engine.files import read_tensors, write_tensors
from engine.peft_folder import CONFIG, read_peft, settings_of
from lora import mark_trainable

KINDS = {"lora": "lora", "hada": "loha", "lokr": "lokr"}  # by the first part of a factor's name
# Other factors keep their names.
THEIRS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
OURS = {theirs: ours for ours, theirs in THEIRS.items()}
ENCODERS = ("text_encoder", "text_encoder_2")  # diffusers' names
SUBFOLDERS = (("unet",), (ENCODERS[0], "text_encoder_one"), (ENCODERS[1], "text_encoder_two"))
# The layers that those tools have, with linear ones among them.
PLACES = (
    r"(down_blocks|up_blocks)\.\d+\.(attentions|resnets)\.|mid_block\.|(time|add)_embedding\.linear_",
    r"(text_model\.)?encoder\.layers\.",
)
# ss_base_model_version by the width of the text, attn2.to_k's input.
VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
LOKR = ("lokr_w1", "lokr_w2")  # whole; a product has _a and _b instead
FOLDED = "lokr_alpha"  # our key in the header: alpha of layers whose W1 was multiplied by the scale
STABILITY = {  # diffusers' names and Stability's
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "time_emb_proj": "emb_layers.1",
}


class Layer(NamedTuple):
    """One adapter: the update is scaled by alpha / rank; factors by our parameters' names."""

    rank: int
    alpha: float
    factors: dict[str, torch.Tensor]


def save_kohya(unet: nn.Module, path: str | Path, text_encoders: Sequence[nn.Module] = ()) -> None:
    """Write the adapters of a diffusers UNet and its text encoders to one kohya-keyed .safetensors file.

    text_encoders: the pipeline's, in its order, adapted or not. For SDXL, one is taken for the first of two.
    Raises ValueError if there is no adapter, if another parameter of an adapted model trains, if an adapted
    layer has no place in such a file, or if the file exists.
    """
    widths = {name: m.in_features for name, m in unet.named_modules() if hasattr(m, "in_features")}
    write_kohya(path, [layers_in(model) for model in (unet, *text_encoders)], widths)


def save_diffusers_lora(
    unet: nn.Module, folder: str | Path, text_encoders: Sequence[nn.Module] = ()
) -> None:
    """Write LoRA adapters as folder/pytorch_lora_weights.safetensors, for diffusers' load_lora_weights.

    text_encoders, errors: as in save_kohya; also ValueError for LoHa and LoKr.
    """
    write_diffusers(folder, [layers_in(model) for model in (unet, *text_encoders)])


def to_kohya(folder: str | Path, path: str | Path) -> None:
    """As save_kohya, from the PEFT folder of a UNet, or from a folder with unet, text_encoder (or
    text_encoder_one) and text_encoder_2 (or text_encoder_two), as far as they exist."""
    parts = parts_in(Path(folder))
    write_kohya(path, parts, {name: width(layer.factors) for name, layer in parts[0].items()})


def to_diffusers(folder: str | Path, target: str | Path) -> None:
    """As save_diffusers_lora, from the same folders as to_kohya."""
    write_diffusers(target, parts_in(Path(folder)))


def load_kohya(
    unet: nn.Module, path: str | Path, text_encoders: Sequence[nn.Module] = ()
) -> list[str]:
    """Wrap the layers that a kohya-keyed file names, load their factors and return the layers' names.

    Layers' names may be diffusers', as in our files, or Stability's, as sd-scripts writes for SDXL. Only the
    adapters train then. Raises OSError or ValueError, naming file and key, if a key belongs to no linear
    layer of these models or to a variant that our layers do not compute, or if a tensor is missing or does
    not fit; then no layer is wrapped.
    """
    tensors, header = read_tensors(Path(path))
    models = (unet, *text_encoders)
    known = {
        key: (part, name)
        for part, model in enumerate(models)
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Linear) or hasattr(m, "delta_weight")
        for key in names_of(part, name, model)
    }
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, factor = key.partition(".")
        if layer not in known:
            raise ValueError(
                f"{path}: {key}: expected a linear layer of the given models, found no such layer; keys that "
                "begin with lora_te need text_encoders=, and convolutions are not supported"
            )
        found.setdefault(known[layer], {})[OURS.get(factor, factor)] = tensor
    if not found:
        raise ValueError(f"{path}: expected factors of an adapter, found none")
    folded = float(header[FOLDED]) if FOLDED in header else None
    wrapped = {
        (part, name): wrap(models[part].get_submodule(name), factors, folded, f"{path}: {name}")
        for (part, name), factors in found.items()
    }
    for (part, name), layer in wrapped.items():
        models[part].set_submodule(name, layer)
    for model in models:
        mark_trainable(model, head="")
    return [name for _, name in wrapped]


def layers_in(model: nn.Module) -> dict[str, Layer]:
    """The adapters of a model, by name. Raises ValueError if another parameter trains with them."""
    # A shared layer has all its names: other tools know nothing of sharing.
    modules = model.named_modules(remove_duplicate=False)
    adapters = {name: m for name, m in modules if hasattr(m, "delta_weight")}
    for name, parameter in model.named_parameters():
        if adapters and parameter.requires_grad and name.rpartition(".")[0] not in adapters:
            raise ValueError(
                f"{name} is trainable, but the file has no place for it: expected adapters alone; call "
                'mark_trainable(model, head="") with bias="none"'
            )
    layers = {}
    for name, layer in adapters.items():
        settings = settings_of({name: layer})
        factors = {key: p.detach() for key, p in layer.named_parameters(recurse=False)}
        layers[name] = Layer(settings["rank"], settings["alpha"], factors)
    return layers


def parts_in(folder: Path) -> list[dict[str, Layer]]:
    """The layers of the UNet and of both text encoders ({} if not adapted) in PEFT folders: see to_kohya."""
    if folder.is_file():
        raise ValueError(
            f"{folder}: expected a PEFT folder of a Stable Diffusion UNet, found a file; image generators do "
            "not read a ViT's adapter file"
        )
    places = [[folder], [], []]
    if not (folder / CONFIG).is_file():
        places = [[folder / name for name in names] for names in SUBFOLDERS]
    folders = [next((f for f in found if (f / CONFIG).is_file()), None) for found in places]
    if not any(folders):
        raise FileNotFoundError(f"{folder}: expected {CONFIG} or unet/{CONFIG}, found no such file")
    return [layers_in_peft(found) if found else {} for found in folders]


def layers_in_peft(folder: Path) -> dict[str, Layer]:
    """The adapters in a PEFT folder, by name. Raises ValueError if it holds anything else."""
    _, forms, tensors = read_peft(folder)
    layers = {name: Layer(form["rank"], form["alpha"], {}) for name, form in forms.items()}
    for key, tensor in tensors.items():
        name, _, factor = key.removesuffix(".weight").rpartition(".")
        if name not in layers:
            raise ValueError(
                f"{folder}: {key}: expected factors of adapters alone, as the new file has no place for "
                "other tensors"
            )
        layers[name].factors[factor] = tensor
    return layers


def write_kohya(path: str | Path, parts: list[dict[str, Layer]], widths: dict[str, int]) -> None:
    """Write layers (of the UNet, then of each text encoder) to a kohya-keyed file.

    widths: in_features of layers of the UNet, which show the version of Stable Diffusion.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a file name that ends in .safetensors")
    check(path, parts)
    version = version_of(widths)
    tensors, folded = {}, set()
    for part, layers in enumerate(parts):
        for name, layer in layers.items():
            alpha, factors = layer.alpha, dict(layer.factors)
            if factors.keys() >= set(LOKR):
                # If both are whole, other tools ignore alpha: the scale goes into W1.
                factors["lokr_w1"] = layer.alpha / layer.rank * factors["lokr_w1"]
                alpha = layer.rank
                folded.add(layer.alpha)
            prefix = kohya_name(part, name, version)
            for factor, tensor in factors.items():
                tensors[f"{prefix}.{THEIRS.get(factor, factor)}"] = tensor
            tensors[f"{prefix}.alpha"] = torch.tensor(float(alpha), dtype=torch.float32)
    header = header_of(parts, version)
    if len(folded) == 1:
        header[FOLDED] = repr(folded.pop())
    write(path, tensors, header)


def write_diffusers(folder: str | Path, parts: list[dict[str, Layer]]) -> None:
    """Write LoRA layers (of the UNet, then of each text encoder) as diffusers' file."""
    path = Path(folder) / "pytorch_lora_weights.safetensors"
    check(path, parts)
    tensors, config = {}, {}
    for prefix, layers in zip(("unet", *ENCODERS), parts, strict=False):
        for name, layer in layers.items():
            if "lora_A" not in layer.factors:
                raise ValueError(
                    f"{path}: {name}: expected LoRA, which is all that load_lora_weights reads; for LoHa and "
                    "LoKr, call save_peft and open the folder with peft.PeftModel"
                )
            full = name if prefix == "unet" else f"text_model.{name.removeprefix('text_model.')}"
            for factor, tensor in layer.factors.items():
                tensors[f"{prefix}.{full}.{factor}.weight"] = tensor
        config |= {f"{prefix}.{key}": value for key, value in lora_config(layers).items()}
    write(path, tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2)})


def lora_config(layers: dict[str, Layer]) -> dict:
    """The arguments of peft.LoraConfig for these layers. Without them, diffusers takes alpha = rank."""
    if not layers:
        return {}
    # transformers 5 dropped text_model. from names; PEFT matches the ends of names.
    layers = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
    rank, alpha, _ = next(iter(layers.values()))
    config = {"r": rank, "lora_alpha": alpha, "target_modules": list(layers)}
    config["rank_pattern"] = {n: layer.rank for n, layer in layers.items() if layer.rank != rank}
    config["alpha_pattern"] = {
        n: layer.alpha for n, layer in layers.items() if layer.alpha != alpha
    }
    return config


def check(path: Path, parts: list[dict[str, Layer]]) -> None:
    """Raise ValueError if the file exists or if it has no place for the layers."""
    if path.exists():
        raise ValueError(f"{path}: already exists; name another file or remove it")
    if not any(parts):
        raise ValueError("the models have no adapter: add adapters with replace_linear")
    if len(parts) > 3:
        raise ValueError(f"expected at most 2 text encoders, found {len(parts) - 1}")
    for part, layers in enumerate(parts):
        for name, layer in layers.items():
            if not re.match(PLACES[part > 0], name):
                expected = (
                    "text encoder's encoder.layers" if part else "UNet's blocks and embeddings"
                )
                raise ValueError(
                    f"{name}: expected a layer of a Stable Diffusion {expected}; tools that read such files "
                    "know no other layer: leave it out of targets"
                )
            if not layer.alpha > 0:
                raise ValueError(f"{name}: expected alpha above 0, found {layer.alpha}")


def write(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    # cloned, as tensors of shared layers share memory
    content = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, content, header)


def header_of(parts: list[dict[str, Layer]], version: str) -> dict[str, str]:
    """The header by which tools list a file. Without its version, A1111 takes a file for one of SD 1."""
    layers = [layer for part in parts for layer in part.values()]
    kinds = {KINDS[next(iter(layer.factors)).partition("_")[0]] for layer in layers}
    ranks, alphas = {layer.rank for layer in layers}, {float(layer.alpha) for layer in layers}
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora" if kinds == {"lora"} else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if kinds != {"lora"}:
        header["ss_network_args"] = json.dumps({"algo": ",".join(sorted(kinds))})
    if version:
        header |= {"ss_base_model_version": version, "ss_v2": str(version == "sd_v2")}
    return header


def version_of(widths: dict[str, int]) -> str:
    """ss_base_model_version of a UNet by in_features of its layers; "" if they do not show it."""
    # Only SDXL has these. Its middle block is ten transformer blocks deep.
    if any("transformer_blocks.1." in name or "add_embedding" in name for name in widths):
        return VERSIONS[2048]
    ends = ("attn2.to_k", "attn2.to_v")
    return next((VERSIONS.get(n, "") for name, n in widths.items() if name.endswith(ends)), "")


def width(factors: dict[str, torch.Tensor]) -> int:
    """in_features of the layer that these factors adapt."""
    ends = ("lora_A", "hada_w1_b", "lokr_w1", "lokr_w1_b", "lokr_w2", "lokr_w2_b")
    return math.prod(factors[end].shape[-1] for end in ends if end in factors)


def kohya_name(part: int, name: str, version: str) -> str:
    """The key of a layer, without the factor. part: 0 for the UNet, 1 and 2 for the text encoders."""
    if part == 0:
        # diffusers and A1111 read only Stability's name of this one.
        name = stability_name(name, 2) if name.startswith("add_embedding.") else name
        return "lora_unet_" + name.replace(".", "_")
    number = "" if part == 1 and version in ("sd_v1", "sd_v2") else part
    # transformers 5 dropped text_model. from one of SDXL's two encoders: all tools expect it.
    return f"lora_te{number}_text_model_" + name.removeprefix("text_model.").replace(".", "_")


def names_of(part: int, name: str, model: nn.Module) -> set[str]:
    """All keys that a layer may have in files of sd-scripts, LyCORIS and ours, without the factor."""
    plain = name.replace(".", "_")
    if part == 0:
        depth = getattr(getattr(model, "config", None), "layers_per_block", 2)
        names = {plain, stability_name(name, depth).replace(".", "_")}
        return {f"lora_unet_{n}" for n in names} | {kohya_name(0, name, ""), f"lycoris_{plain}"}
    names = {plain, "text_model_" + plain.removeprefix("text_model_")}
    prefixes = {f"lora_te{part}_"} | ({"lora_te_"} if part == 1 else set())
    return {prefix + n for prefix in prefixes for n in names}


def stability_name(name: str, depth: int) -> str:
    """A UNet layer's name in Stability's own code. depth: the UNet's layers_per_block."""

    def block(match: re.Match) -> str:
        side, i, kind, j = match.groups()
        kind = int(kind == "attentions")
        if side == "mid":
            return f"middle_block.{1 if kind else 2 * int(j)}."
        number = int(i) * (depth + 1) + int(j)
        return f"{'output' if side == 'up' else 'input'}_blocks.{number + (side == 'down')}.{kind}."

    name = re.sub(r"^(down|mid|up)_blocks?\.(?:(\d+)\.)?(attentions|resnets)\.(\d+)\.", block, name)
    for ours, theirs in STABILITY.items():
        name = name.replace(ours, theirs)
    return name


def wrap(
    linear: nn.Module, found: dict[str, torch.Tensor], folded: float | None, where: str
) -> nn.Module:
    """The adapter of a layer with these tensors of a file: its factors by our names, and alpha.

    folded: alpha, if lokr_w1 was multiplied by alpha / rank. where: begins error messages.
    """
    if hasattr(linear, "delta_weight"):
        raise ValueError(f"{where}: expected a plain layer, found an adapter: merge(model) first")
    factors = {name: tensor for name, tensor in found.items() if name != "alpha"}
    kind = next((KINDS[p] for name in factors if (p := name.partition("_")[0]) in KINDS), "lora")
    names = factor_names(kind, factors)
    for name in [*names, *factors]:
        if name not in names or name not in factors:
            text = "expected no such tensor" if name in factors else "found no such tensor"
            raise ValueError(
                f"{where}: {THEIRS.get(name, name)}: {text}; the file is incomplete, or of an unsupported "
                f"variant of {kind}"
            )
    shapes = {THEIRS.get(name, name): tuple(t.shape) for name, t in factors.items()}
    shape, rank, alpha = None, 0, read_alpha(found, where)
    if all(len(sides) == 2 for sides in shapes.values()):
        inner = ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        rank = next((len(factors[name]) for name in inner if name in factors), 0)
        if factors.keys() >= set(LOKR):
            # Others ignore alpha and write the rank there. Our W2 is whole from half its longer side on.
            rank = max(int(alpha or 1), -(-max(shapes["lokr_w2"]) // 2))
            alpha = folded or rank
            factors["lokr_w1"] = factors["lokr_w1"] / (alpha / rank)
        alpha = rank if alpha is None else alpha
        plain = nn.Linear(linear.in_features, linear.out_features, device="meta")
        with suppress(RuntimeError):  # factors that do not fit each other
            shape = with_factors(kind, plain, rank, alpha, factors).delta_weight().shape
    if shape != linear.weight.shape:
        raise ValueError(
            f"{where}: expected factors of a layer of {tuple(linear.weight.shape)}, found "
            f"{', '.join(f'{name} {sides}' for name, sides in shapes.items())}; the file is of another model"
        )
    return with_factors(kind, linear, rank, alpha, factors)


def factor_names(kind: str, found: dict) -> list[str]:
    """The factors that a layer must have, by our names. found: shows which of LoKr's are whole."""
    if kind == "lokr":
        pairs = {name: [name] if name in found else [f"{name}_a", f"{name}_b"] for name in LOKR}
        return [name for pair in pairs.values() for name in pair]
    return {
        "lora": list(THEIRS),
        "loha": [f"hada_{end}" for end in ("w1_a", "w1_b", "w2_a", "w2_b")],
    }[kind]


def read_alpha(found: dict[str, torch.Tensor], where: str) -> float | None:
    """alpha of a layer in a file, in decimal digits as it was given; None if there is none."""
    if "alpha" not in found:
        return None
    tensor = found["alpha"]
    if tensor.numel() != 1 or not tensor > 0:
        raise ValueError(f"{where}: alpha: expected one number above 0, found {tensor.tolist()}")
    short = round(tensor.item(), 6)  # float32 has 0.1 as 0.10000000149
    return short if tensor.new_tensor(short) == tensor else tensor.item()


def with_factors(kind: str, linear: nn.Linear, rank: int, alpha: float, factors: dict) -> nn.Module:
    """An adapter with these factors, which also says how LoKr splits the layer."""
    layer = ADAPTERS[kind](linear, rank=rank, alpha=alpha)
    first, *_ = layer.parameters(recurse=False)
    for name in list(layer._parameters):
        delattr(layer, name)
    for name, tensor in factors.items():
        layer.register_parameter(name, nn.Parameter(tensor.to(first)))
    return layer
