"""Convert a ViT's adapter file to a PEFT folder and back, or merge it into a plain torchvision file.

    python export.py runs/x/adapter.safetensors --to peft FOLDER          # opens with PeftModel
    python export.py runs/x/adapter.safetensors --to torchvision FILE     # merged, for plain torchvision
    python export.py mine.safetensors --from peft FOLDER                  # also a folder that PEFT trained
    python export.py FOLDER --to kohya style.safetensors                  # a UNet's PEFT folder, for ComfyUI
    python export.py FOLDER --to diffusers FOLDER2                        # the same, for load_lora_weights

A PEFT folder is for transformers' class of the trunk's family: ViT, DeiT, DINOv2, I-JEPA or CLIP. PEFT finds
layers by name, and transformers 5 renamed them. So a folder holds each tensor under both names, and PEFT
loads those that it finds. For any other model, call save_peft and load_peft of engine/peft_folder.py.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import vit
from attention import join_attention
from engine import checkpoint
from engine import weights as pretrained
from engine.adapt import ADAPTERS
from engine.config import Parser
from engine.files import atomic, optional_json, write_json, write_tensors
from engine.kohya import to_diffusers, to_kohya
from engine.layouts import BLOCK, LAYOUTS, renamed
from engine.peft_folder import endings, peft_key, trained, write_peft
from engine.peft_vit import FAMILIES, HEAD, LABELS, WITH_MEAN, family_of, hf_names
from engine.start import load_folder
from lora import merge


def to_peft(
    path: str | Path, folder: str | Path, weights: str | None = None, base: str = ""
) -> None:
    """Write an adapter file as a PEFT folder for transformers, with class names and preprocessing.

    weights: the pretrained weights, if they have moved since training.
    base: the Hugging Face model (name or folder) with these weights. By default the name that the adapter was
        trained on; weights from elsewhere, and at another image size, are written to FOLDER/base.
    Raises OSError or ValueError if the file cannot be read or holds no adapter.
    """
    model, info = vit.load_adapter(path, weights)
    folder, family = Path(folder), family_of(model.shape)
    if info["adapter"] not in ADAPTERS:
        raise ValueError(
            f"{path}: adapter: expected one of {', '.join(ADAPTERS)}, found {info['adapter']!r}; for "
            "other kinds, use --to torchvision"
        )
    tensors, adapters = trained(model, "heads.head")
    swiglu = model.shape["activation"] == "swiglu"
    if swiglu and any(name.endswith(("mlp.0", "mlp.3")) for name in adapters):
        raise ValueError(
            f"{path}: the MLP of a SwiGLU has other layers in transformers: adapt query, key, value, out"
        )
    if info["bias"] == "all" and (swiglu or family == "clip_vision_model"):
        raise ValueError(
            f"{path}: --bias all: transformers' class lacks some of these biases; train with --bias adapter"
        )
    base = base or hub_base(info, family, weights)
    head = {key: tensors.pop(key) for key in list(tensors) if key.startswith("heads.head.")}
    if family in WITH_MEAN and model.shape["pool"] == "class":
        W = head["heads.head.weight"]
        # transformers' head also reads the mean of the patches: not ours.
        head["heads.head.weight"] = torch.cat([W, torch.zeros_like(W)], 1)
    apart = family == "clip_vision_model"  # it has no classifier
    wrapped = {*adapters, *(f"{name}.linear" for name in adapters)}
    modules = [name for name, _ in model.named_modules() if name not in wrapped]
    renamed_tensors, targets, others = {}, [], ["vit.pooler.dense"]
    for names in hf_names(family):
        part = tensors if apart else tensors | head
        renamed_tensors |= {renamed(key, names): tensor.clone() for key, tensor in part.items()}
        targets += [renamed(layer, names) for layer in adapters]
        others += filter(None, (renamed(name, names) for name in modules))
    location = base or str((folder / "base").absolute())
    config = hf_config(info, model.shape, family)

    def write_extras() -> None:
        write_json(folder / LABELS, config["id2label"])
        write_json(folder / "preprocessor_config.json", hf_preprocessing(info["preprocessing"]))
        if apart:
            content = {key.replace("heads.head", "classifier"): t for key, t in head.items()}
            write_tensors(folder / HEAD, content, {"format": "pt"})
        if not base:
            (folder / "base").mkdir(exist_ok=True)
            write_json(folder / "base" / "config.json", config)
            file = folder / "base" / "model.safetensors"
            write_tensors(file, hf_trunk(model, family), {"format": "pt"})

    ends, heads = endings(targets, others), [] if apart else ["classifier"]
    write_peft(folder, info, ends, heads, renamed_tensors, location, write_extras)


def hub_base(info: dict, family: str, weights: str | None) -> str:
    """The name on Hugging Face that transformers loads as this trunk; "" if there is none.

    weights: where they are now, if not where that name is found.
    """
    name = pretrained.IN21K if info["weights"] == "in21k" else info["weights"]
    if not pretrained.is_hub_name(name):
        return ""
    config = {"model_type": "vit", "image_size": 224} if name == pretrained.IN21K else {}
    config |= optional_json(pretrained.find(weights or name).with_name("config.json"))
    # At another size, transformers would interpolate the positions in its own way.
    same = config.get("image_size") == info["preprocessing"]["image_size"]
    return name if same and config.get("model_type") == family else ""


def hf_trunk(model: nn.Module, family: str) -> dict[str, torch.Tensor]:
    """The frozen trunk's tensors under the names that the family has in files."""
    prefix, layout = FAMILIES[family][0]
    layout = "dinov2-swiglu" if model.shape["activation"] == "swiglu" else layout
    adapters = {n for n, m in model.named_modules() if hasattr(m, "delta_weight")}
    state = {
        peft_key(name, adapters).replace(".base_layer.", "."): p.detach()
        for name, p in model.named_parameters()
        if name.rpartition(".")[0] not in adapters and not name.startswith("heads.")
    }
    tokens, positions = state.pop("class_token"), state["encoder.pos_embedding"]
    extra = {}
    if family != "ijepa":  # which has no tokens but the patches'
        state["class_token"] = tokens[:, :1]
    if family == "deit":
        state["distillation"] = tokens[:, 1:]
    if family in WITH_MEAN:
        n = tokens.shape[1]
        state["registers"] = tokens[:, 1:] + positions[:, 1:n]
        state["encoder.pos_embedding"] = torch.cat([positions[:, :1], positions[:, n:]], 1)
        extra[f"{prefix}embeddings.mask_token"] = tokens.new_zeros(1, tokens.shape[2])
        for i in range(model.shape["num_layers"]):
            for place in ("dropout.gamma", "mlp.4.gamma"):
                state.setdefault(BLOCK.replace("{}", str(i)) + place, torch.ones_like(tokens[0, 0]))
    if family == "dinov2":
        del state["registers"]
    if family == "clip_vision_model":
        state["class_token"] = tokens.flatten()
        state["encoder.pos_embedding"] = positions[0]
        del state["conv_proj.bias"]  # zeros: CLIP has none
    names = LAYOUTS[layout]
    return {prefix + renamed(k, names): t.contiguous() for k, t in state.items()} | extra


CLASSES = {  # of transformers, for each model_type
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "ijepa": "IJepaForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "dinov2_with_registers": "Dinov2WithRegistersForImageClassification",
    "clip_vision_model": "CLIPVisionModel",
}


def hf_config(info: dict, shape: dict, family: str) -> dict:
    """The content of config.json for a family's class in transformers."""
    classes, activation = info["classes"], shape["activation"]
    config = {
        "model_type": family,
        "architectures": [CLASSES[family]],
        "hidden_size": shape["hidden_dim"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "intermediate_size": shape["mlp_dim"],
        "image_size": info["preprocessing"]["image_size"],
        "patch_size": shape["patch_size"],
        "layer_norm_eps": shape["eps"],
        "hidden_act": "gelu" if activation == "swiglu" else activation,
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    if family in WITH_MEAN:
        width, mlp, swiglu = shape["hidden_dim"], shape["mlp_dim"], activation == "swiglu"
        # With SwiGLU, transformers takes two thirds of the width, rounded up to a multiple of 8.
        widths = {
            n: (n * width * 2 // 3 + 7) // 8 * 8 if swiglu else n * width for n in range(1, 17)
        }
        ratio = next((n for n in widths if widths[n] == mlp), None)
        if ratio is None:
            raise ValueError(f"mlp_dim {mlp}: transformers' DINOv2 has none of this width")
        config |= {"mlp_ratio": ratio, "use_swiglu_ffn": swiglu, "qkv_bias": True}
        config["num_register_tokens"] = shape["prefix_tokens"] - 1
    return config


def hf_preprocessing(preprocessing: dict) -> dict:
    """The content of preprocessor_config.json. CLIP's processor crops the centre in every version."""
    size = preprocessing["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": round(size / preprocessing["crop"])},
        "resample": 3 if preprocessing.get("interpolation") == "bicubic" else 2,  # PIL's numbers
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "crop_pct": preprocessing["crop"],  # exact, where size is rounded
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": preprocessing["mean"],
        "image_std": preprocessing["std"],
    }


def from_peft(
    folder: str | Path, path: str | Path, weights: str | None = None, classes: str | None = None
) -> dict:
    """Write the adapter of a PEFT folder for transformers as an adapter file; return its metadata.

    weights: the pretrained weights, a name or a file. By default, base_model_name_or_path names them.
    classes: comma-separated names, or a file with one per line. By default those of
        FOLDER/id2label.json or FOLDER/config.json.
    Raises OSError or ValueError, naming file and key, if a part is missing, unsupported or does not fit.
    """
    check_new(Path(path))
    model, info = load_folder(folder, weights, classes)
    checkpoint.save_adapter(path, model, info)
    return info


def check_new(file: Path) -> None:
    """Raise ValueError or FileNotFoundError if the file exists already, or its folder does not."""
    if file.exists():
        raise ValueError(f"{file}: already exists; name another file or remove it")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{file.parent}: no such folder; make it first")


def to_torchvision(path: str | Path, file: str | Path, weights: str | None = None) -> str:
    """Write an adapter, merged into its pretrained weights, as a torchvision state dict.

    file: in safetensors' format if its name ends in .safetensors, otherwise in torch.save's.
    weights: the pretrained weights, if they have moved since training.
    Returns a Python expression of the model that loads the file with strict=True.
    Raises ValueError, also for a trunk that torchvision's class as it is cannot hold.
    """
    check_new(Path(file))
    model, info = vit.load_adapter(path, weights)
    shape = model.shape
    for key, plain in PLAIN.items():
        if shape[key] != plain:
            raise ValueError(
                f"{path}: {key}: torchvision's own VisionTransformer expects {plain!r}, this trunk has "
                f"{shape[key]!r}; load it with vit.load_adapter, or use --to peft"
            )
    merged = fold_layer_scale(merge(model))
    state = {key: t.detach() for key, t in join_attention(merged).state_dict().items()}
    if Path(file).suffix == ".safetensors":
        write_tensors(Path(file), state, {"format": "pt"})
    else:
        # Not torch.save(state, path): it would raise RuntimeError where open raises OSError.
        with atomic(Path(file)) as temporary, open(temporary, "wb") as stream:
            torch.save(state, stream)
    size, arguments = info["preprocessing"]["image_size"], [f"num_classes={len(info['classes'])}"]
    if (eps := model.encoder.ln.eps) != 1e-6:  # a state dict does not store it
        arguments.append(f"norm_layer=functools.partial(torch.nn.LayerNorm, eps={eps})")
    columns = {key: shape[key] for key in vit.COLUMNS} | {"image_size": size}
    for name in vit.MODELS:
        if name != "vit_mini" and {**vit.named_shape(name), "image_size": size} == columns:
            arguments += [f"image_size={size}"] if size != 224 else []
            return f"torchvision.models.{name}({', '.join(arguments)})"
    arguments = [f"{key}={value}" for key, value in columns.items()] + arguments
    return f"torchvision.models.VisionTransformer({', '.join(arguments)})"


# What torchvision's own class computes.
PLAIN = {"prefix_tokens": 1, "pre_norm": False, "activation": "gelu", "pool": "class"}


@torch.no_grad()
def fold_layer_scale(model: nn.Module) -> nn.Module:
    """Multiply each LayerScale into the linear layer before it, in place; return the model."""
    for block in model.encoder.layers:
        if isinstance(block.dropout, vit.LayerScale):
            layers = (block.self_attention.out, block.mlp[3])
            for scale, layer in zip((block.dropout, block.mlp[4]), layers, strict=True):
                layer.weight.mul_(scale.gamma[:, None])
                layer.bias.mul_(scale.gamma)
            block.dropout, block.mlp[4] = nn.Identity(), nn.Identity()
    return model


USED = {  # the flags that say something to each direction
    "--to peft": ("weights", "base"),
    "--to torchvision": ("weights",),
    "--to kohya": (),
    "--to diffusers": (),
    "--from peft": ("weights", "classes"),
}


def run(argv: list[str] | None) -> None:
    parser = Parser(
        description="Convert adapter files to PEFT folders and back, or to files for other tools."
    )
    add = parser.add_argument
    add("adapter", help="the adapter file, or a UNet's PEFT folder, to read; with --from, to write")
    kinds = (
        "peft FOLDER, or torchvision FILE; from a UNet's folder: kohya FILE, or diffusers FOLDER"
    )
    add("--to", nargs=2, metavar=("KIND", "PATH"), help=kinds)
    add("--from", nargs=2, metavar=("KIND", "PATH"), dest="source", help="peft FOLDER")
    add("--weights", help="the pretrained weights: a name or a file (default: as in training)")
    add("--base", help="for --to peft: the Hugging Face model with these weights")
    add("--classes", help="for --from peft: comma-separated names, or a file with one per line")
    arguments = parser.parse_args(argv)
    if (arguments.to is None) == (arguments.source is None):
        parser.error("expected either --to or --from")
    flag, (kind, path) = "--to" if arguments.to else "--from", arguments.to or arguments.source
    direction = f"{flag} {kind}"
    if direction not in USED:
        to = "peft or torchvision; from a UNet's PEFT folder, kohya or diffusers"
        parser.error(f"{direction}: expected {to if arguments.to else 'peft'}")
    for name in ("weights", "base", "classes"):
        if getattr(arguments, name) is not None and name not in USED[direction]:
            parser.error(f"--{name}: only for {', '.join(d for d in USED if name in USED[d])}")
    if direction == "--to peft":
        to_peft(arguments.adapter, path, arguments.weights, arguments.base or "")
        print(f"PEFT folder: {path}")
    elif direction == "--to torchvision":
        print(f"{path} loads into {to_torchvision(arguments.adapter, path, arguments.weights)}")
    elif direction == "--to kohya":
        to_kohya(arguments.adapter, path)
        print(f"{path}: for ComfyUI, Forge and A1111")
    elif direction == "--to diffusers":
        to_diffusers(arguments.adapter, path)
        print(f"{path}: for load_lora_weights")
    else:
        info = from_peft(path, arguments.adapter, arguments.weights, arguments.classes)
        summary = {key: info[key] for key in ("rank", "alpha", "targets", "weights")}
        print(f"{arguments.adapter}: {info['adapter']}, {len(info['classes'])} classes, {summary}")


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
