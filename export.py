"""Convert a ViT's adapter file to a PEFT folder and back, or merge it into a plain torchvision file.

    python export.py runs/x/adapter.safetensors --to peft FOLDER          # opens with PeftModel
    python export.py runs/x/adapter.safetensors --to torchvision FILE     # merged, for plain torchvision
    python export.py mine.safetensors --from peft FOLDER                  # also a folder that PEFT trained

PEFT finds layers by name, and transformers 5 renamed a ViT's layers. So a folder holds each tensor under
both names, and PEFT loads those that it finds. For any other model, call save_peft and load_peft of
engine/peft_folder.py.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

import vit
from attention import join_attention
from engine import checkpoint
from engine.adapt import ADAPTERS, adapt
from engine.config import Parser
from engine.files import atomic, write_json
from engine.peft_folder import endings, fill, peft_key, trained, write_peft
from engine.peft_vit import (
    LABELS,
    hf_names,
    labels_in,
    names_in,
    parameters_of,
    read_vit,
    renamed,
    targets_of,
    weights_of,
)
from lora import merge


def to_peft(
    path: str | Path, folder: str | Path, weights: str | None = None, base: str = ""
) -> None:
    """Write an adapter file as a PEFT folder for Hugging Face's ViT, with class names and preprocessing.

    weights: the pretrained weights, if they have moved since training.
    base: the Hugging Face model (name or folder) with these weights. By default google's in21k for an
        adapter trained on it; any other weights are written to FOLDER/base.
    Raises OSError or ValueError if the file cannot be read or holds no adapter.
    """
    model, info = vit.load_adapter(path, weights)
    folder, name = Path(folder), info["model"]
    if info["adapter"] not in ADAPTERS:
        raise ValueError(
            f"{path}: adapter: expected one of {', '.join(ADAPTERS)}, found {info['adapter']!r}; for "
            "other kinds, use --to torchvision"
        )
    if not base and info["weights"] == "in21k" and info["preprocessing"]["image_size"] == 224:
        base = vit.IN21K
    tensors, adapters = trained(model, "heads.head")
    renamed_tensors, targets, others = {}, [], ["vit.pooler.dense"]
    for layout in ("hf", "hf5"):
        names = hf_names(name, layout)
        renamed_tensors |= {renamed(key, names): tensor.clone() for key, tensor in tensors.items()}
        targets += [names[layer] for layer in adapters]
        others += [theirs for ours, theirs in names.items() if ours not in adapters]
    location = base or str((folder / "base").absolute())
    config = hf_config(info, model.encoder.ln.eps)

    def write_extras() -> None:
        write_json(folder / LABELS, config["id2label"])
        write_json(folder / "preprocessor_config.json", hf_preprocessing(info["preprocessing"]))
        if not base:
            (folder / "base").mkdir(exist_ok=True)
            write_json(folder / "base" / "config.json", config)
            with atomic(folder / "base" / "model.safetensors") as temporary:
                temporary.write_bytes(save(hf_trunk(model, name), {"format": "pt"}))

    ends = endings(targets, others)
    write_peft(folder, info, ends, ["classifier"], renamed_tensors, location, write_extras)


def hf_trunk(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The frozen trunk's tensors under Hugging Face's names."""
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
    """The content of config.json for Hugging Face's ViTForImageClassification."""
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
    """The content of preprocessor_config.json. CLIP's processor crops the centre in every version."""
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
    """Write the adapter of a PEFT folder for Hugging Face's ViT as an adapter file; return its metadata.

    weights: the pretrained weights, a name or a file. By default, base_model_name_or_path names them.
    classes: comma-separated names, or a file with one per line. By default those of
        FOLDER/id2label.json or FOLDER/config.json.
    Raises OSError or ValueError, naming file and key, if a part is missing, unsupported or does not fit.
    """
    check_new(Path(path))
    folder = Path(folder)
    name, layers, settings, tensors = read_vit(folder)
    weights = weights and vit.full_name(weights)
    info = {"model": name, "weights": weights or weights_of(folder), "seed": 0}
    info["classes"] = class_names(folder, classes, len(tensors["classifier.weight"]))
    saved = vit.preprocessing_in(folder)
    size = saved.get("image_size")
    model, preprocessing = vit.build(name, info["weights"], len(info["classes"]), size)
    settings = {"factor": -1, "decompose_both": False, **settings}
    settings["targets"] = targets_of(model, layers)
    adapt(model, **settings)
    fill(parameters_of(model, names_in(tensors, name)), tensors, folder)
    info |= {**settings, "trunk": checkpoint.fingerprint(model), "eps": model.encoder.ln.eps}
    info["preprocessing"] = {**preprocessing, **saved}
    checkpoint.save_adapter(path, model, info)
    return info


def check_new(file: Path) -> None:
    """Raise ValueError or FileNotFoundError if the file exists already, or its folder does not."""
    if file.exists():
        raise ValueError(f"{file}: already exists; name another file or remove it")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder; make it first")


def class_names(folder: Path, classes: str | None, n: int) -> list[str]:
    """The names of the n classes: those given, or else the folder's."""
    if classes is not None:
        parts = classes.split(",")
        if os.path.isfile(classes):  # Path.is_file raises OSError for a long text
            parts = Path(classes).read_text("utf-8").strip().split("\n")
        names = [part.strip() for part in parts]
    else:
        names = labels_in(folder)
    if len(names) != n:
        raise ValueError(
            f"{folder}: expected the names of its {n} classes, found {len(names)}; give them with --classes "
            "in the order of training: comma-separated, or a file with one per line"
        )
    return names


def to_torchvision(path: str | Path, file: str | Path, weights: str | None = None) -> str:
    """Write an adapter, merged into its pretrained weights, as a torchvision state dict.

    file: in safetensors' format if its name ends in .safetensors, otherwise in torch.save's.
    weights: the pretrained weights, if they have moved since training.
    Returns a Python expression of the model that loads the file with strict=True.
    """
    check_new(Path(file))
    model, info = vit.load_adapter(path, weights)
    eps, size = model.encoder.ln.eps, info["preprocessing"]["image_size"]
    state = {key: t.detach() for key, t in join_attention(merge(model)).state_dict().items()}
    with atomic(Path(file)) as temporary:
        if Path(file).suffix == ".safetensors":
            temporary.write_bytes(save(state, {"format": "pt"}))
        else:
            # Not torch.save(state, path): it would raise RuntimeError where open raises OSError.
            with open(temporary, "wb") as stream:
                torch.save(state, stream)
    arguments = [f"num_classes={len(info['classes'])}"]
    if eps != vit.EPS:  # a state dict does not store it
        arguments.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})")
    if info["model"] == "vit_b_16":
        arguments += [f"image_size={size}"] if size != 224 else []
        return f"torchvision.models.vit_b_16({', '.join(arguments)})"
    shape = {**vit.MODELS[info["model"]], "image_size": size}
    arguments = [f"{key}={value}" for key, value in shape.items()] + arguments
    return f"torchvision.models.VisionTransformer({', '.join(arguments)})"


def run(argv: list[str] | None) -> None:
    parser = Parser(
        description="Convert adapter files to PEFT folders and back, or to torchvision files."
    )
    add = parser.add_argument
    add("adapter", help="the adapter file to read; with --from, to write")
    add("--to", nargs=2, metavar=("KIND", "PATH"), help="peft FOLDER, or torchvision FILE")
    add("--from", nargs=2, metavar=("KIND", "PATH"), dest="source", help="peft FOLDER")
    add("--weights", help="the pretrained weights: a name or a file (default: as in training)")
    add("--base", default="", help="for --to peft: the Hugging Face model with these weights")
    add("--classes", help="for --from peft: comma-separated names, or a file with one per line")
    arguments = parser.parse_args(argv)
    if (arguments.to is None) == (arguments.source is None):
        parser.error("expected either --to or --from")
    kind, path = arguments.to or arguments.source
    if arguments.to and kind == "peft":
        to_peft(arguments.adapter, path, arguments.weights, arguments.base)
        print(f"PEFT folder: {path}")
    elif arguments.to and kind == "torchvision":
        print(f"{path} loads into {to_torchvision(arguments.adapter, path, arguments.weights)}")
    elif arguments.source and kind == "peft":
        info = from_peft(path, arguments.adapter, arguments.weights, arguments.classes)
        summary = {key: info[key] for key in ("rank", "alpha", "targets", "weights")}
        print(f"{arguments.adapter}: {info['adapter']}, {len(info['classes'])} classes, {summary}")
    else:
        flag, kinds = ("--to", "peft or torchvision") if arguments.to else ("--from", "peft")
        parser.error(f"{flag} {kind}: expected {kinds}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns 0, or 2 after one line on stderr."""
    try:
        run(argv)
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
