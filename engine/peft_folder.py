"""Save and load PEFT folders of any PyTorch model with adapters of lora.py, loha.py or lokr.py.

    save_peft(unet, "folder")       # opens with peft.PeftModel.from_pretrained(fresh_unet, "folder")
    load_peft(unet, "folder")       # our layers, from what PEFT or save_peft wrote

A folder holds adapter_config.json (kind, rank, scale and the layers' names) and adapter_model.safetensors,
whose keys are PREFIX plus PEFT's names of the tensors. A variant of the three methods that our layers do not
compute is refused; the error names its key.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from engine.adapt import ADAPTERS
from engine.files import first_mismatch, read_json, read_tensors, write_json, write_tensors
from lokr import factorization
from lora import mark_trainable, replace_linear

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."  # every key of PEFT begins with it
BIASES = {"none": "none", "all": "all", "adapter": "lora_only"}  # our name: PEFT's name

# Keys of adapter_config.json that make no variant: we read them below, they only concern training, or they
# repeat what the tensors show. Any other key with a value makes a variant.
HARMLESS = """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r alpha
    lora_alpha use_rslora rank_pattern alpha_pattern bias target_modules exclude_modules modules_to_save
    layers_to_transform layers_pattern lora_dropout rank_dropout rank_dropout_scale module_dropout
    init_weights init_lora_weights decompose_both decompose_factor use_effective_conv2d megatron_core
    qalora_group_size runtime_config
""".split()
# What a damaged adapter_config.json must not change: metadata of the tensors has a copy, with a checksum.
COPIED = ("peft_type", "r", "lora_alpha", "alpha", "modules_to_save", "bias", "target_modules")
# Values of init_lora_weights that leave the pretrained weights unchanged.
STARTS = (True, False, "gaussian", "orthogonal", "eva", "lycoris")


def save_peft(model: nn.Module, folder: str | Path, head: str = "", base: str = "") -> None:
    """Write a model's adapters, its head and its trainable biases as a PEFT folder.

    head: every parameter and buffer whose name contains it is saved whole (a new classifier); "" for none.
        The same as in replace_linear and mark_trainable.
    base: base_model_name_or_path, which tells readers of the folder where the model comes from.

    Raises ValueError if there is no adapter, if adapters differ in kind, rank or scale, if one is in the
    head, if different layers share one, if PEFT would split LoKr's layers differently, if a PEFT folder has
    no place for a trainable parameter, or if the folder already holds an adapter.
    """
    tensors, adapters = trained(model, head)
    inner = {f"{name}.linear" for name in adapters}
    others = [name for name, _ in model.named_modules() if name not in inner | set(adapters)]
    heads = sorted({key.rpartition(".")[0] for key in tensors if head and head in key})
    # Only the outermost modules: PEFT saves the modules inside with them.
    heads = [name for name in heads if not any(name.startswith(f"{other}.") for other in heads)]
    settings = {**settings_of(adapters), "bias": bias_of(tensors, heads)}
    write_peft(Path(folder), settings, endings(list(adapters), others), heads, tensors, base)


def load_peft(model: nn.Module, folder: str | Path, head: str = "") -> list[str]:
    """Wrap the model's layers that a PEFT folder names, load its tensors and return the layers' names.

    head: as in mark_trainable; the folder must hold the whole head.
    Raises OSError or ValueError, naming file and key, if a part is missing, unsupported or does not fit;
    then no layer is wrapped.
    """
    settings, forms, tensors = read_peft(folder)
    bias, adapter = settings.pop("bias"), ADAPTERS[settings.pop("adapter")]
    modules = dict(model.named_modules(remove_duplicate=False))
    arguments = {modules.get(layer): {**settings, **form} for layer, form in forms.items()}
    others = [name for name, m in modules.items() if m not in arguments]
    targets = endings(list(forms), others)
    wrapped = replace_linear(model, lambda m: adapter(m, **arguments[m]), targets, head)
    mark_trainable(model, head, bias)
    try:
        fill(expected(model) | head_buffers(model, head), tensors, folder)
    except ValueError:
        for name in wrapped:
            model.set_submodule(name, model.get_submodule(name).linear)
        raise
    return list(forms)


def trained(model: nn.Module, head: str) -> tuple[dict[str, torch.Tensor], dict[str, nn.Module]]:
    """The tensors to save, by PEFT's key without PREFIX, and the adapters, by name."""
    adapters = {name: m for name, m in model.named_modules() if hasattr(m, "delta_weight")}
    if not adapters:
        raise ValueError("the model has no adapter: add adapters with replace_linear")
    names = {adapter: name for name, adapter in adapters.items()}
    for name, m in model.named_modules(remove_duplicate=False):
        if m not in names:
            continue
        (parent, _, last), (first, _, first_last) = name.rpartition("."), names[m].rpartition(".")
        # A shared block shares its adapters, in PEFT too.
        if model.get_submodule(parent) is not model.get_submodule(first) or last != first_last:
            raise ValueError(
                f"{names[m]} and {name} share one adapter: a PEFT folder has no place for the second name"
            )
        if head and head in name:
            raise ValueError(
                f"{name} is an adapter in the head, which is saved whole: expected it outside; pass "
                f"head={head!r} to replace_linear too"
            )
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, last = name.rpartition(".")
        is_head = bool(head) and head in name
        if not (is_head or module in adapters or parameter.requires_grad):
            continue
        if not (is_head or module in adapters or last == "bias"):
            raise ValueError(
                f"{name} is trainable, but a PEFT folder has no place for it: expected adapters, head and "
                "biases; pass head=, or call mark_trainable"
            )
        tensors[peft_key(name, adapters)] = parameter
    tensors |= head_buffers(model, head)
    if head and not any(head in key for key in tensors):
        raise ValueError(
            f"head={head!r}: expected a part of a parameter's name, found no such parameter (a shared one "
            "has only its first name)"
        )
    tensors = {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()}
    return tensors, adapters


def head_buffers(model: nn.Module, head: str) -> dict[str, torch.Tensor]:
    """The head's buffers that its state_dict holds, such as BatchNorm's running mean."""
    state = model.state_dict()
    return {n: b for n, b in model.named_buffers() if head and head in n and n in state}


def peft_key(name: str, adapters) -> str:
    """PEFT's key for a parameter of ours, without PREFIX."""
    module, _, last = name.rpartition(".")
    if module in adapters:
        return f"{name}.weight" if last.startswith("lora_") else name  # nn.Linear in PEFT
    owner = module.removesuffix(".linear")
    return f"{owner}.base_layer.{last}" if owner != module and owner in adapters else name


def settings_of(adapters: dict[str, nn.Module]) -> dict:
    """The arguments of adapt that make these adapters."""
    forms = {(type(layer), layer.rank, layer.scale) for layer in adapters.values()}
    if len(forms) > 1:
        texts = sorted(f"{kind.__name__} rank {rank} scale {s:g}" for kind, rank, s in forms)
        raise ValueError(f"expected adapters of one kind, rank and scale, found {', '.join(texts)}")
    kind, rank, scale = forms.pop()
    alpha = round(scale * rank, 6)
    alpha = alpha if alpha / rank == scale else scale * rank
    return {"adapter": {v: k for k, v in ADAPTERS.items()}[kind], "rank": rank, "alpha": alpha}


def bias_of(tensors: dict, heads: list[str]) -> str:
    """mark_trainable's argument bias for the biases among these tensors."""
    biases = [
        key
        for key in tensors
        if key.endswith("bias") and not any(f".{head}." in f".{key}" for head in heads)
    ]
    if not biases:
        return "none"
    return "adapter" if all(key.endswith(".base_layer.bias") for key in biases) else "all"


def endings(chosen: list[str], others: list[str]) -> list[str]:
    """The shortest ends of the chosen names that no other name has, such as ["query", "value"].

    Raises ValueError if another name ends with a whole chosen name.
    """
    taken = {end for name in others for end in ends(name)}
    targets = {}
    for name in chosen:
        free = [end for end in ends(name) if end not in taken]
        if not free:
            raise ValueError(f"{name}: expected a name that is not the end of another layer's name")
        # Not a bare number: for "mlp.0", "0" may be enough, but tells a reader nothing.
        targets[next((end for end in free if not end.split(".")[0].isdigit()), free[0])] = None
    return list(targets)


def ends(name: str) -> list[str]:
    """All ends of a dotted name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1)]


def write_peft(
    folder: Path,
    settings: dict,
    targets: list[str],
    heads: list[str],
    tensors: dict,
    base: str,
    write_extras: Callable[[], None] = lambda: None,
) -> None:
    """Write a PEFT folder. The configuration comes last: a folder that has one is complete."""
    if (folder / CONFIG).exists():
        raise ValueError(f"{folder}: already holds an adapter; name another folder or remove it")
    alpha = int(settings["alpha"]) if settings["alpha"] % 1 == 0 else settings["alpha"]
    config = {
        "peft_type": settings["adapter"].upper(),
        "base_model_name_or_path": base or None,
        "r": settings["rank"],
        "lora_alpha" if settings["adapter"] == "lora" else "alpha": alpha,
        "target_modules": targets,
        "modules_to_save": heads or None,
        "inference_mode": True,
    }
    if settings["adapter"] == "lora":
        config["bias"] = BIASES[settings["bias"]]
    if settings["adapter"] == "lokr":
        factor, config["decompose_both"] = lokr_split(tensors, folder, signs=(-1,))
        config["decompose_factor"] = -1 if factor == -1 else abs(factor)
    folder.mkdir(parents=True, exist_ok=True)
    content = {PREFIX + key: tensor for key, tensor in tensors.items()}
    copied = {key: config[key] for key in COPIED if key in config}
    write_tensors(folder / FILES[0], content, {"format": "pt", CONFIG: json.dumps(copied)})
    write_extras()
    write_json(folder / CONFIG, config)


def read_peft(folder: str | Path) -> tuple[dict, dict[str, dict], dict[str, torch.Tensor]]:
    """The settings (arguments of adapt) of a PEFT folder, each layer's own (rank and alpha) by its name, and
    the tensors by key, without PREFIX.

    Raises FileNotFoundError for a missing file, ValueError for a variant that our layers do not compute,
    naming its key.
    """
    path = Path(folder) / CONFIG
    file = next((path.with_name(name) for name in FILES if path.with_name(name).is_file()), None)
    for exists, names in ((path.is_file(), CONFIG), (file, " or ".join(FILES))):
        if not exists:
            raise FileNotFoundError(f"{folder}: expected {names}, found no such file")
    config = read_json(path)
    adapter = peft_adapter(config, path)
    tensors, metadata = read_tensors(file)
    for key, value in json.loads(metadata.get(CONFIG, "{}")).items():
        if config.get(key) != value:
            raise ValueError(
                f"{path}: {key}: expected {value!r}, as in {file.name}, found {config.get(key)!r}; "
                "the folder is damaged: use another copy"
            )
    for key in tensors:
        if not key.startswith(PREFIX):
            raise ValueError(f"{file}: {key}: expected a key that begins with {PREFIX}")
    # With bias="all", PEFT also saves the head's initial state, as original_module: left out.
    tensors = {
        key.removeprefix(PREFIX).replace(".modules_to_save.", "."): tensor
        for key, tensor in tensors.items()
        if ".original_module." not in key
    }
    layers = layers_of(tensors)
    if not layers:
        raise ValueError(
            f"{file}: expected factors of an adapter (lora_, hada_, lokr_), found none"
        )
    settings = {"adapter": adapter, "bias": bias_of(tensors, config.get("modules_to_save") or [])}
    if config.get("bias", "none") != "none" and settings["bias"] == "none":
        raise ValueError(
            f"{path}: bias: {config['bias']!r}, but {file.name} holds no bias; the adapter is incomplete"
        )
    if adapter == "lokr":
        settings["factor"], settings["decompose_both"] = lokr_split(tensors, file)
    ranks = numbers(config, "r", "rank_pattern", int, layers, path)
    alpha = "lora_alpha" if adapter == "lora" else "alpha"
    alphas = numbers(config, alpha, "alpha_pattern", int | float, layers, path)
    if adapter == "lora" and config.get("use_rslora"):  # its scale is alpha / sqrt(rank)
        alphas = {layer: alpha * ranks[layer] ** 0.5 for layer, alpha in alphas.items()}
    forms = {layer: {"rank": ranks[layer], "alpha": float(alphas[layer])} for layer in layers}
    return settings, forms, tensors


def peft_adapter(config: dict, path: Path) -> str:
    """The kind of adapter that adapter_config.json describes, a key of ADAPTERS."""
    adapter = str(config.get("peft_type")).lower()
    if adapter not in ADAPTERS:
        kinds = ", ".join(kind.upper() for kind in ADAPTERS)
        raise ValueError(
            f"{path}: peft_type: expected one of {kinds}, found {config.get('peft_type')!r}"
        )
    for key, value in config.items():
        if value and key not in HARMLESS:
            raise ValueError(
                f"{path}: {key}: expected none, found {value!r}; this variant of {adapter} is not supported"
            )
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise ValueError(
            f"{path}: init_lora_weights: {start!r} changes the pretrained weights too; convert it to "
            "plain LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )
    return adapter


def numbers(config: dict, key: str, pattern: str, kinds, layers: list[str], path: Path) -> dict:
    """config[key] for each layer; or the number of the first of config[pattern] that matches its name."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{path}: {pattern}: expected a JSON object, found {patterns!r}")
    for name, number in [(key, config.get(key)), *((pattern, n) for n in patterns.values())]:
        if not isinstance(number, kinds) or number <= 0:
            raise ValueError(f"{path}: {name}: expected a number above 0, found {number!r}")
    try:  # PEFT's rule: get_pattern_key in peft/utils/other.py
        rules = [(re.compile(rf"(.*\.)?({text})$"), n) for text, n in patterns.items()]
    except re.error as error:
        raise ValueError(f"{path}: {pattern}: expected regular expressions ({error})") from None
    return {
        layer: next((n for rule, n in rules if rule.match(layer)), config[key]) for layer in layers
    }


def lokr_split(tensors: dict, path: Path, signs=(1, -1)) -> tuple[int, bool]:
    """The arguments factor and decompose_both of LoKrLinear for layers with these tensors.

    signs: (-1,) for a factor of PEFT's rule. Raises ValueError if no factor fits all layers.
    """
    sides = set()  # (features, rows or columns of W1)
    for layer in layers_of(tensors):
        for axis, end in enumerate("ab"):
            names = [f"{layer}.lokr_{w}" for w in ("w1", "w2")]
            pair = [tensors.get(name, tensors.get(f"{name}_{end}")) for name in names]
            if all(t is not None and t.ndim == 2 for t in pair):  # otherwise fill names the tensor
                side, other = (t.shape[axis] for t in pair)
                sides.add((side * other, side))
    largest = max((features for features, _ in sides), default=1)
    for factor in (-1, 1, *(sign * n for sign in signs for n in range(2, 1 + largest))):
        if all(factorization(features, factor)[0] == side for features, side in sides):
            return factor, any(key.endswith("lokr_w1_a") for key in tensors)
    listed = ", ".join(f"{side} for {features}" for features, side in sorted(sides))
    raise ValueError(
        f"{path}: lokr_w1: no decompose_factor gives PEFT's Linear these sides of W1: {listed} features; "
        "adapt with another factor (-1 always fits), or merge the adapters instead"
    )


def layers_of(tensors: dict) -> list[str]:
    """The names of the layers that these tensors adapt."""
    names = (key.removesuffix(".weight").rpartition(".") for key in tensors)
    return list({m: None for m, _, last in names if last.startswith(("lora_", "hada_", "lokr_"))})


def expected(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters, by PEFT's key without PREFIX."""
    adapters = {name for name, m in model.named_modules() if hasattr(m, "delta_weight")}
    return {peft_key(n, adapters): p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(parameters: dict[str, nn.Parameter], tensors: dict, folder: str | Path) -> None:
    """Copy tensors into the parameters with their keys; if one does not fit, copy none, raise ValueError."""
    if problem := first_mismatch(parameters, tensors):
        raise ValueError(f"{folder}: {PREFIX}{problem}")
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])
