"""Adapters of Vision Transformers travel: to PEFT and back, and merged into stock torchvision.

    python export.py runs/x/adapter.safetensors --to peft FOLDER          # opens with PeftModel
    python export.py runs/x/adapter.safetensors --to torchvision FILE     # plain torchvision, merged
    python export.py mine.safetensors --from peft FOLDER                  # one that PEFT trained, too

PEFT finds a layer by its name, and transformers 5 has other names for a ViT's layers than older versions. So
a folder holds each tensor under both, and PEFT takes those that it finds. For any other model there are
save_peft and load_peft, of peft_folder.py.
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
from engine.peft_folder import endings, expected, fill, peft_key, trained, write_peft
from engine.peft_vit import (
    LABELS,
    hf_names,
    labels_in,
    names_in,
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

    weights: where the trunk's weights are now, if not where they were in training.
    base: the Hugging Face model, by name or folder, that holds the trunk. By default google's in21k for an
        adapter that was trained on it; any other trunk is written to FOLDER/base.
    Raises OSError or ValueError for a file that cannot be read, or that holds no adapter.
    """
    model, info = vit.load_adapter(path, weights)
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


def to_torchvision(path: str | Path, file: str | Path, weights: str | None = None) -> str:
    """Merge an adapter file into its trunk and write torchvision's state dict: .safetensors, else .pth.

    weights: where the trunk's weights are now, if not where they were in training.
    Returns the Python expression of the model into which the state dict loads with strict=True.
    """
    if Path(file).exists():
        raise ValueError(f"{file}: exists already; name another file or remove it")
    if not Path(file).absolute().parent.is_dir():
        raise FileNotFoundError(f"{Path(file).parent}: no such folder; make it first")
    model, info = vit.load_adapter(path, weights)
    eps, size = model.encoder.ln.eps, info["preprocessing"]["image_size"]
    state = {key: t.detach() for key, t in join_attention(merge(model)).state_dict().items()}
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
    parser = Parser(
        description="Convert adapter files to PEFT folders and torchvision files, and back."
    )
    add = parser.add_argument
    add("adapter", help="the adapter file; with --from, where to write it")
    add("--to", nargs=2, metavar=("KIND", "PATH"), help="peft FOLDER, or torchvision FILE")
    add("--from", nargs=2, metavar=("KIND", "PATH"), dest="source", help="peft FOLDER")
    add("--weights", help="the trunk: a name or a file (default: where it was in training)")
    add("--base", default="", help="to peft: the Hugging Face model that holds the trunk")
    add("--classes", help="from peft: the class names, with commas or as a file of lines")
    given = parser.parse_args(argv)
    if (given.to is None) == (given.source is None):
        parser.error("expected either --to or --from")
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
        parser.error(f"{flag} {kind}: expected {known}")


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
