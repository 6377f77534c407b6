"""Adapters of Vision Transformers travel: to PEFT and back, and merged into stock torchvision.

    python export.py runs/x/adapter.safetensors --to peft FOLDER          # opens with PeftModel
    python export.py runs/x/adapter.safetensors --to torchvision FILE     # plain torchvision, merged
    python export.py mine.safetensors --from peft FOLDER                  # one that PEFT trained, too

PEFT finds a layer by its name, and transformers 5 has other names for a ViT's layers than older versions. So
a folder holds each tensor under both, and PEFT takes those that it finds. For any other model there are
save_peft and load_peft, of peft_folder.py.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import attention
import vit
from engine import checkpoint
from engine.adapt import ADAPT, ADAPTERS, adapt
from engine.files import atomic, optional_json, read_json, write_json
from engine.peft_folder import (
    CONFIG,
    PREFIX,
    endings,
    ends,
    expected,
    fill,
    layers_of,
    load_peft,
    peft_key,
    read_peft,
    save_peft,
    trained,
    write_peft,
)
from lora import merge

__all__ = [
    "from_peft",
    "load_peft",
    "save_peft",
    "start",
    "start_settings",
    "to_peft",
    "to_torchvision",
]

LABELS = "id2label.json"  # not config.json: transformers would take the folder for a whole model


def hf_names(model: str, layout: str) -> dict[str, str]:
    """Our names of a ViT's modules: those in Hugging Face's ViTForImageClassification."""
    names = {ours: f"vit.{theirs}" for ours, theirs in vit.names(model, layout).items()}
    return {**names, "heads.head": "classifier"}


def renamed(key: str, names: dict[str, str]) -> str | None:
    """The key of a tensor with the module that it begins with renamed; None if it has no name there."""
    for end in ("", *ends(key)):
        module = key[: len(key) - len(end)].removesuffix(".")
        if module in names:
            return f"{names[module]}.{end}" if end else names[module]
    return None


def to_peft(
    path: str | Path, folder: str | Path, weights: str | None = None, base: str = ""
) -> None:
    """Write an adapter file as a PEFT folder for Hugging Face's ViT, with class names and preprocessing.

    weights: where the trunk's weights are now, if not where they were in training.
    base: the Hugging Face model, by name or folder, that holds the trunk. By default google's in21k for an
        adapter that was trained on it; any other trunk is written to FOLDER/base.
    Raises OSError or ValueError for a file that cannot be read, or that holds no adapter.
    """
    model, info = checkpoint.load_adapter(path, weights)
    folder, name = Path(folder), info["model"]
    if info["adapter"] not in ADAPTERS:
        raise ValueError(
            f"{path}: adapter: expected one of {', '.join(ADAPTERS)}, found {info['adapter']!r}; PEFT has "
            "no such kind, --to torchvision takes it"
        )
    if not base and info["weights"] == "in21k" and info["preprocessing"]["image_size"] == 224:
        base = vit.IN21K
    tensors, adapters = trained(model, "heads.head")
    both, chosen, others = {}, [], ["vit.pooler.dense"]
    for layout in ("hf", "hf5"):
        names = hf_names(name, layout)
        both |= {renamed(key, names): tensor.clone() for key, tensor in tensors.items()}
        chosen += [names[layer] for layer in adapters]
        others += [theirs for ours, theirs in names.items() if ours not in adapters]
    where = base or str((folder / "base").absolute())
    config = hf_config(info, model.encoder.ln.eps)

    def beside() -> None:
        write_json(folder / LABELS, config["id2label"])
        write_json(folder / "preprocessor_config.json", hf_preprocessing(info["preprocessing"]))
        if not base:
            (folder / "base").mkdir(exist_ok=True)
            write_json(folder / "base" / "config.json", config)
            with atomic(folder / "base" / "model.safetensors") as temporary:
                temporary.write_bytes(save(hf_trunk(model, name), {"format": "pt"}))

    write_peft(folder, info, endings(chosen, others), ["classifier"], both, where, beside)


def hf_trunk(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The frozen trunk under the names of Hugging Face's files."""
    names = hf_names(name, "hf")
    adapters = {n for n, m in model.named_modules() if hasattr(m, "delta_weight")}
    keys = {
        n: peft_key(n, adapters).replace(".base_layer.", ".") for n, _ in model.named_parameters()
    }
    return {
        renamed(keys[n], names): p.detach().contiguous()
        for n, p in model.named_parameters()
        if n.rpartition(".")[0] not in adapters and not n.startswith("heads.")
    }


def hf_config(info: dict, eps: float) -> dict:
    """config.json of Hugging Face's ViTForImageClassification."""
    shape, classes = vit.MODELS[info["model"]], info["classes"]
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "hidden_size": shape["hidden_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": shape["mlp_dim"],
        "image_size": info["preprocessing"]["image_size"],
        "patch_size": shape["patch_size"],
        "layer_norm_eps": eps,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def hf_preprocessing(preprocessing: dict) -> dict:
    """preprocessor_config.json. CLIP's processor is the one of which every version crops the centre."""
    size = preprocessing["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / preprocessing["crop"])},
        "resample": 2,  # bilinear
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
    }


def from_peft(
    folder: str | Path, path: str | Path, weights: str | None = None, classes: str | None = None
) -> dict:
    """Write the adapter of a PEFT folder for Hugging Face's ViT as an adapter file; return its info.

    weights: the trunk, a name or a file. By default what base_model_name_or_path says.
    classes: names with commas, or a file with one on each line. By default those of FOLDER/id2label.json
        or FOLDER/config.json.
    Raises OSError or ValueError, naming file and key, for what is missing, a variant or does not fit.
    """
    if Path(path).exists():
        raise ValueError(f"{path}: exists already; name another file or remove it")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{Path(path).parent}: no such folder; make it first")
    folder = Path(folder)
    name, layers, settings, tensors = read_vit(folder)
    if weights and weights not in vit.NAMES:
        weights = str(Path(weights).absolute())
    info = {"model": name, "weights": weights or weights_of(folder), "seed": 0}
    info["classes"] = class_names(folder, classes, len(tensors["classifier.weight"]))
    known = vit.preprocessing_in(folder)
    size = known.get("image_size")
    model, preprocessing = vit.build(name, info["weights"], len(info["classes"]), size)
    settings = {"factor": -1, "decompose_both": False, **settings}
    settings["targets"] = targets_of(model, layers)
    adapt(model, **settings)
    names = names_in(tensors, name)
    fill({renamed(key, names): p for key, p in expected(model).items()}, tensors, folder)
    info |= {**settings, "trunk": checkpoint.fingerprint(model), "eps": model.encoder.ln.eps}
    info["preprocessing"] = {**preprocessing, **known}
    checkpoint.save_adapter(path, model, info)
    return info


def targets_of(model: nn.Module, layers: list[str]) -> str:
    """The targets of adapt that mean just these layers of a ViT without adapters."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    others = [name for name, _ in model.named_modules() if name not in layers]
    return "all" if set(layers) == linear - {"heads.head"} else ",".join(endings(layers, others))


def read_vit(folder: Path) -> tuple[str, list[str], dict, dict[str, torch.Tensor]]:
    """A PEFT folder for Hugging Face's ViT: our name of the model and of the layers, settings, tensors.

    The tensors have the keys of one layout: where the folder holds both, they must be equal.
    """
    settings, tensors = read_peft(folder)
    head = tensors.get("classifier.weight")
    if head is None or head.ndim != 2:
        raise ValueError(
            f"{folder}: {PREFIX}classifier.weight: expected the trained head, found no such tensor; "
            'PEFT keeps it with modules_to_save=["classifier"]'
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
            raise ValueError(f"{folder}: {PREFIX}{key}: expected a tensor of a ViT, found this one")
        same = kept.setdefault(renamed(our, names), tensor)
        if not torch.equal(same, tensor):
            raise ValueError(
                f"{folder}: {PREFIX}{key}: expected the tensor that stands under the layer's other name"
            )
    return name, [renamed(layer, ours) for layer in layers_of(kept)], settings, kept


def names_in(tensors: dict, model: str) -> dict[str, str]:
    """hf_names of the layout that these tensors have; of the newer one if they have both."""
    return hf_names(model, "hf5" if any(key.startswith("vit.layers.") for key in tensors) else "hf")


# What the adapter that a run starts from settles, unless a flag does.
SETTLED = (*ADAPT, "model", "weights", "image_size")


def start_settings(path: str | Path) -> dict:
    """What train.Config takes from the adapter file or PEFT folder that a run starts from: see SETTLED."""
    if not is_peft(path):
        _, info = checkpoint.read_adapter(path)
        info["image_size"] = info["preprocessing"]["image_size"]
        return {key: info[key] for key in SETTLED}
    name, layers, settings, _ = read_vit(Path(path))
    with torch.device("meta"):
        bare, _ = vit.build(name, "none")
    settings["targets"] = targets_of(bare, layers)
    try:
        weights = weights_of(Path(path))
    except ValueError:  # a model that is not here: train says so, unless it is given another
        weights = str(read_json(Path(path) / CONFIG).get("base_model_name_or_path"))
    size = vit.preprocessing_in(Path(path)).get("image_size")
    return {**settings, "model": name, "weights": weights, "image_size": size}


def is_peft(path: str | Path) -> bool:
    """Whether this is a PEFT folder; if not, it is an adapter file or the folder of a run."""
    return Path(path).is_dir() and not (Path(path) / checkpoint.ADAPTER_FILE).is_file()


def start(model: nn.Module, path: str | Path, classes: list[str]) -> tuple[str, dict]:
    """Copy an adapter file or PEFT folder into a model that was adapted alike.

    Returns what to say of it, and mean, std and crop of the images that it was trained on, as far as it
    says: the head and what is adapted go with them. The head is copied if it is for these classes (by
    number, where a folder has no names), else left fresh.
    Raises OSError or ValueError, naming file and key, for what does not fit.
    """
    folder = Path(path) if is_peft(path) else None
    if folder:
        name, _, _, tensors = read_vit(folder)
        names, head = names_in(tensors, name), "classifier."
        own = {renamed(key, names): p for key, p in expected(model).items()}
        known = labels_in(folder)
        same = known == classes if known else len(tensors["classifier.weight"]) == len(classes)
        images = vit.preprocessing_in(folder)
    else:
        tensors, info = checkpoint.read_adapter(path)
        own, head = dict(model.named_parameters()), "heads.head."
        same, images = info["classes"] == classes, info["preprocessing"]
    if not same:
        tensors = {k: own.get(k, t) if k.startswith(head) else t for k, t in tensors.items()}
    if folder:
        fill(own, tensors, folder)
    else:
        checkpoint.copy_tensors(model, tensors, info, path)
    said = f"start: {path}, " + ("its head too" if same else "a fresh head: other classes")
    return said, {key: images[key] for key in ("mean", "std", "crop") if key in images}


def weights_of(folder: Path) -> str:
    """The trunk that a PEFT folder was trained on, as vit.build takes it."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if (folder / "base").is_dir():
        return str((folder / "base").absolute())  # what to_peft wrote, wherever the folder is now
    if base == vit.IN21K:
        return "in21k"
    if base and Path(base).exists():
        return str(Path(base).absolute())
    raise ValueError(
        f"{folder / CONFIG}: base_model_name_or_path: expected {vit.IN21K} or a folder that is here, found "
        f"{base!r}; name the trunk's file with --weights"
    )


def class_names(folder: Path, classes: str | None, n: int) -> list[str]:
    """The names of the n classes, as given or out of the folder."""
    if classes is not None:
        text = classes.split(",")
        if os.path.isfile(classes):  # Path.is_file refuses a text that is too long for a name
            text = Path(classes).read_text("utf-8").strip().split("\n")
        names = [name.strip() for name in text]
    else:
        names = labels_in(folder)
    if len(names) != n:
        raise ValueError(
            f"{folder}: expected the names of its {n} classes, found {len(names)}; name them with --classes "
            "(with commas, or a file with one on each line, in the order of training)"
        )
    return names


def labels_in(folder: Path) -> list[str]:
    """The class names that a folder holds, in order; none in one that PEFT wrote."""
    labels = optional_json(folder / "config.json").get("id2label") or {}
    labels = optional_json(folder / LABELS) or labels
    return [labels[key] for key in sorted(labels, key=int)]


def to_torchvision(path: str | Path, file: str | Path, weights: str | None = None) -> str:
    """Merge an adapter file into its trunk and write torchvision's state dict: .safetensors, else .pth.

    weights: where the trunk's weights are now, if not where they were in training.
    Returns the Python expression of the model into which the state dict loads with strict=True.
    """
    if Path(file).exists():
        raise ValueError(f"{file}: exists already; name another file or remove it")
    if not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"{Path(file).parent}: no such folder; make it first")
    model, info = checkpoint.load_adapter(path, weights)
    eps, size = model.encoder.ln.eps, info["preprocessing"]["image_size"]
    state = {
        key: t.detach() for key, t in attention.join_attention(merge(model)).state_dict().items()
    }
    with atomic(Path(file)) as temporary:
        if Path(file).suffix == ".safetensors":
            temporary.write_bytes(save(state, {"format": "pt"}))
        else:
            with open(
                temporary, "wb"
            ) as opened:  # which has OSErrors, where torch has RuntimeErrors
                torch.save(state, opened)
    arguments = [f"num_classes={len(info['classes'])}"]
    if eps != vit.EPS:  # a state dict cannot say it
        arguments.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})")
    if info["model"] == "vit_b_16":
        arguments += [f"image_size={size}"] if size != 224 else []
        return f"torchvision.models.vit_b_16({', '.join(arguments)})"
    shape = {**vit.MODELS[info["model"]], "image_size": size}
    arguments = [f"{key}={value}" for key, value in shape.items()] + arguments
    return f"torchvision.models.VisionTransformer({', '.join(arguments)})"


def run(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Take adapters to PEFT and torchvision, and back.")
    add = parser.add_argument
    add("adapter", help="the adapter file; with --from, where to write it")
    add("--to", nargs=2, metavar=("KIND", "PATH"), help="peft FOLDER, or torchvision FILE")
    add("--from", nargs=2, metavar=("KIND", "PATH"), dest="source", help="peft FOLDER")
    add("--weights", help="the trunk: a name or a file (default: where it was in training)")
    add("--base", default="", help="to peft: the Hugging Face model that holds the trunk")
    add("--classes", help="from peft: the class names, with commas or as a file of lines")

    def error(message):  # argparse's own prints the usage as well
        raise ValueError(f"{message}; see --help")

    parser.error = error
    given = parser.parse_args(argv)
    if (given.to is None) == (given.source is None):
        error("expected either --to or --from")
    kind, path = given.to or given.source
    if given.to and kind == "peft":
        to_peft(given.adapter, path, given.weights, given.base)
        print(f"PEFT folder: {path}")
    elif given.to and kind == "torchvision":
        print(f"{path} loads into {to_torchvision(given.adapter, path, given.weights)}")
    elif given.source and kind == "peft":
        info = from_peft(path, given.adapter, given.weights, given.classes)
        shown = {key: info[key] for key in ("rank", "alpha", "targets", "weights")}
        print(f"{given.adapter}: {info['adapter']}, {len(info['classes'])} classes, {shown}")
    else:
        flag, known = ("--to", "peft or torchvision") if given.to else ("--from", "peft")
        error(f"{flag} {kind}: expected {known}")


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says; 0, or 2 after one line on stderr for what cannot work."""
    try:
        run(argv)
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
