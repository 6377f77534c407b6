"""The trunk: torchvision's Vision Transformer, with pretrained weights and a fresh head.

    model, preprocessing = build("vit_b_16", weights="imagenet1k", num_classes=200)
    model, preprocessing = build("vit_b_16", weights="in21k", num_classes=101)   # Hugging Face's

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv 2010.11929.
"""

import json
import os
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torchvision.models import VisionTransformer, ViT_B_16_Weights
from torchvision.models.vision_transformer import interpolate_embeddings

from attention import split_attention
from engine import checkpoint
from engine.adapt import ADAPT, adapt
from engine.files import first_line, first_mismatch, optional_json, read_tensors

MODELS = {
    "vit_b_16": {
        "image_size": 224,
        "patch_size": 16,
        "num_layers": 12,
        "num_heads": 12,
        "hidden_dim": 768,
        "mlp_dim": 3072,
    },
    "vit_mini": {  # the embedded trunk, see assets/README.md
        "image_size": 28,
        "patch_size": 7,
        "num_layers": 6,
        "num_heads": 4,
        "hidden_dim": 128,
        "mlp_dim": 512,
    },
}

# How a trunk wants its images: mean and std of each channel, for values in 0..1; and crop, the fraction of
# the shorter side that evaluation keeps (the centre).
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop": 224 / 256}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop": 1.0}
PRETRAINED = {  # name: (torchvision's weights, preprocessing)
    "imagenet1k": (ViT_B_16_Weights.IMAGENET1K_V1, IMAGENET),
    "swag": (ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1, {**IMAGENET, "crop": 1.0}),
}
EMBEDDED = Path(__file__).parent / "assets" / "vit_mini.safetensors"
NAMES = (*PRETRAINED, "in21k", "embedded", "none")  # of weights; all else is a file or a folder

IN21K = "google/vit-base-patch16-224-in21k"
KAGGLE = Path("/kaggle/input")
FILES = (
    "model.safetensors",
    "pytorch_model.bin",
)  # Hugging Face's names for the tensors of a folder
EPS = 1e-6  # of LayerNorm in torchvision and timm
HF_EPS = 1e-12  # in Hugging Face's ViT, unless its config.json says otherwise

# Other libraries' names for our modules: Hugging Face's in files (and in memory before transformers 5),
# Hugging Face's in memory since, and timm's, which joins query, key and value as torchvision does.
OUTSIDE = {
    "class_token": ("embeddings.cls_token", "embeddings.cls_token", "cls_token"),
    "encoder.pos_embedding": (*("embeddings.position_embeddings",) * 2, "pos_embed"),
    "conv_proj": (*("embeddings.patch_embeddings.projection",) * 2, "patch_embed.proj"),
    "encoder.ln": ("layernorm", "layernorm", "norm"),
}
INSIDE = {  # a block
    "ln_1": ("layernorm_before", "layernorm_before", "norm1"),
    "self_attention.query": ("attention.attention.query", "attention.q_proj", None),
    "self_attention.key": ("attention.attention.key", "attention.k_proj", None),
    "self_attention.value": ("attention.attention.value", "attention.v_proj", None),
    "self_attention.out": ("attention.output.dense", "attention.o_proj", None),
    "self_attention.in_proj": (None, None, "attn.qkv"),
    "self_attention.out_proj": (None, None, "attn.proj"),
    "ln_2": ("layernorm_after", "layernorm_after", "norm2"),
    "mlp.0": ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    "mlp.3": ("output.dense", "mlp.fc2", "mlp.fc2"),
}
LAYOUTS = {"hf": "encoder.layer.{}.", "hf5": "layers.{}.", "timm": "blocks.{}."}


def build(
    model: str = "vit_b_16",
    weights: str = "imagenet1k",
    num_classes: int = 1000,
    image_size: int | None = None,
    head_dropout: float = 0.0,
    seed: int = 0,
    eps: float | None = None,
) -> tuple[VisionTransformer, dict]:
    """A pretrained Vision Transformer with split attention and a new head, and how it wants its images.

    model: "vit_b_16" or "vit_mini", the small embedded one.
    weights: "imagenet1k" or "swag" (torchvision's, downloaded once), "in21k" (Hugging Face's, see
        find_in21k), "embedded" (vit_mini's), "none" (random, drawn from seed); or a .safetensors, .pth or
        .bin file, or a folder with model.safetensors: a ViT of torchvision, Hugging Face or timm, recognised
        by its keys, or the adapter file of a run with --adapter full. Its head is not loaded.
    image_size: side in pixels, a multiple of the patch size; None for the model's own. For another size the
        position embeddings are interpolated.
    eps: of every LayerNorm; None for the one that the weights were trained with.

    Returns the model and its preprocessing: a dict of image_size, mean, std and crop.
    Raises ValueError for names and tensors that do not fit, OSError for what cannot be read.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r}: expected one of {', '.join(MODELS)}")
    shape = {**MODELS[model], "image_size": image_size or MODELS[model]["image_size"]}
    if shape["image_size"] % shape["patch_size"]:
        raise ValueError(
            f"--image-size {image_size}: {model} needs a multiple of its patch size, {shape['patch_size']}"
        )
    state, preprocessing, trained_eps = trunk_state(model, weights)
    norm = partial(nn.LayerNorm, eps=trained_eps if eps is None else eps)
    with torch.random.fork_rng(devices=[]):  # a random trunk comes from its seed and nothing else
        torch.manual_seed(seed)
        vit = VisionTransformer(**shape, norm_layer=norm)
    if state is not None:
        load_trunk(vit, state, source=weights)
    vit = split_attention(vit)
    vit.heads = nn.Sequential(
        OrderedDict(
            dropout=nn.Dropout(head_dropout), head=nn.Linear(shape["hidden_dim"], num_classes)
        )
    )
    return vit, {**preprocessing, "image_size": shape["image_size"]}


def load_adapter(
    path: str | Path, weights: str | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict]:
    """Rebuild the trained model from its adapter file: (model in eval mode, info).

    path: the file, or the folder of its run.
    weights: where the pretrained weights are now, if not where they were in training.
    info: the metadata: adapter, rank, alpha, targets, model, weights, classes, preprocessing and more.
    Raises OSError or ValueError, naming the file and the key, for what is missing or does not fit.
    """
    tensors, info = checkpoint.read_adapter(path)
    weights = weights or ("none" if info["adapter"] == "full" else info["weights"])
    size, seed = info["preprocessing"]["image_size"], info["seed"]
    try:
        # With --adapter full no weights are loaded, which would bring their eps along.
        model, _ = build(
            info["model"], weights, len(info["classes"]), size, seed=seed, eps=info.get("eps")
        )
        adapt(model, **{key: info[key] for key in ADAPT})
    except (ValueError, OSError) as error:
        # Not type(error): a subclass such as JSONDecodeError takes other arguments.
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{path}: {error}") from None
    checkpoint.restore(model, tensors, info, path)
    return model.to(device).eval(), info


def check_weights(weights: str) -> None:
    """Raise FileNotFoundError if this is neither a name of weights nor a file or folder."""
    if weights not in NAMES and not Path(weights).exists():
        raise FileNotFoundError(
            f"--weights {weights}: no such file, and no such name; expected {', '.join(NAMES)}, a "
            ".safetensors, .pth or .bin file, or a folder with one"
        )


def full_name(weights: str) -> str:
    """A name of weights as it is; a file with its absolute path, so that it is found from any folder."""
    return weights if weights in NAMES else str(Path(weights).absolute())


def trunk_state(model: str, weights: str) -> tuple[dict | None, dict, float]:
    """The state dict of these weights (None: random), their preprocessing and their LayerNorm's eps."""
    default = HALF if model == "vit_mini" else IMAGENET
    if weights == "none":
        return None, default, EPS
    if weights in (*PRETRAINED, "in21k") and model != "vit_b_16":
        raise ValueError(
            f"--weights {weights}: these are vit_b_16's; {model} takes embedded, none or a file"
        )
    if weights in PRETRAINED:
        return *torchvision_state(weights), EPS
    check_weights(weights)
    path = find_in21k() if weights == "in21k" else Path(weights)
    path = EMBEDDED if weights == "embedded" else path
    if path.is_dir():
        path = tensors_in(path)
    state, metadata = read_tensors(path)
    layout = layout_of(state)
    if layout:
        beside = preprocessing_in(path.parent)
        default = {key: beside.get(key, value) for key, value in HALF.items()}
    eps = json.loads(metadata.get("eps", str(EPS)))  # a run with --adapter full has written it
    if layout in ("hf", "hf5"):
        eps = optional_json(path.with_name("config.json")).get("layer_norm_eps", HF_EPS)
    preprocessing = metadata.get("preprocessing")
    if layout:
        try:
            state = to_ours(state, model, layout)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return state, json.loads(preprocessing) if preprocessing else default, eps


def torchvision_state(weights: str) -> tuple[dict, dict]:
    """The state dict of one of PRETRAINED, from torch's cache or downloaded."""
    source, preprocessing = PRETRAINED[weights]
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    try:
        return source.get_state_dict(check_hash=True, weights_only=True), preprocessing
    except OSError as error:
        raise OSError(
            f"--weights {weights}: {source.url} cannot be downloaded ({error}); download it elsewhere and "
            f"put it at {place}, or name it with --weights FILE"
        ) from None
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(
            f"{place}: not a complete file of tensors ({first_line(error)}); remove it, and it is "
            "downloaded again"
        ) from None


def find_in21k(url: str = f"https://huggingface.co/{IN21K}/resolve/main/{FILES[0]}") -> Path:
    """The file of google/vit-base-patch16-224-in21k.

    It is looked for in Hugging Face's cache, in a folder vit-base-patch16-224-in21k here, in torch's cache,
    and below /kaggle/input. If it is nowhere, it is downloaded to torch's cache (346 MB).
    Raises OSError, which names these places, if it cannot be downloaded either.
    """
    short = Path(IN21K).name
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = hub / f"models--{IN21K.replace('/', '--')}" / "snapshots"
    place = Path(torch.hub.get_dir()) / "checkpoints" / f"{short}.safetensors"
    near = [folder / name for folder in [*snapshots.glob("*"), Path(short)] for name in FILES]
    for file in (*near, place):
        if file.is_file():
            return file
    for folder in folders_below(KAGGLE, short):  # last: it may hold a million images
        for name in FILES:
            if (folder / name).is_file():
                return folder / name
    part = place.with_suffix(".part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        with safe_open(part, framework="pt"):  # refuses a file that breaks off
            part.rename(place)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"--weights in21k: {IN21K} is not in {hub}, ./{short}, {KAGGLE} or {place}, and {url} "
            f"cannot be downloaded ({error}); run: hf download {IN21K}, or name its file with --weights"
        ) from None
    return place


def folders_below(root: Path, name: str) -> list[Path]:
    """The folders at most six levels below root that have name in their path, sorted.

    A folder with very many folders is not searched: they are the classes of a data set.
    """
    found = []
    for folder, inside, _ in os.walk(root):
        path = Path(folder).relative_to(root)
        found += [Path(folder)] if name in str(path) else []
        if len(path.parts) == 6 or len(inside) > 100:
            inside.clear()
    return sorted(found)


def tensors_in(folder: Path) -> Path:
    """The file of tensors in a folder with Hugging Face's layout."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder}: expected {' or '.join(FILES)}, found {content}")
    return found


def preprocessing_in(folder: Path) -> dict:
    """The mean and std in a folder's preprocessor_config.json (Hugging Face's); if it crops images, their
    image_size and crop too. Empty if there is no such file."""
    theirs = optional_json(folder / "preprocessor_config.json")
    keys = {"mean": "image_mean", "std": "image_std"}
    found = {ours: theirs[key] for ours, key in keys.items() if key in theirs}
    if theirs.get("do_center_crop"):
        # Older files have plain numbers: size is the shorter side, crop_size the side of a square.
        edge, crop = theirs.get("size"), theirs.get("crop_size")
        edge = edge.get("shortest_edge") if isinstance(edge, dict) else edge
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if edge and crop:
            if crop > edge:
                raise ValueError(
                    f"{folder / 'preprocessor_config.json'}: crop_size: expected at most {edge}, the "
                    f"size of the resized images, found {crop}"
                )
            found |= {"image_size": crop, "crop": crop / edge}
    return found


def layout_of(state: dict) -> str | None:
    """The layout of the tensors' names: one of LAYOUTS; None for torchvision's and ours."""
    for layout, block in LAYOUTS.items():
        if any(key.removeprefix("vit.").startswith(block.format(0)) for key in state):
            return layout
    return None


def names(model: str, layout: str) -> dict[str, str]:
    """The name in a layout of each module that holds parameters, and of each parameter outside of modules."""
    column = list(LAYOUTS).index(layout)
    found = {ours: theirs[column] for ours, theirs in OUTSIDE.items()}
    for i in range(MODELS[model]["num_layers"]):
        block = LAYOUTS[layout].format(i)
        for ours, theirs in INSIDE.items():
            if theirs[column]:
                found[f"encoder.layers.encoder_layer_{i}.{ours}"] = block + theirs[column]
    return found


def to_ours(state: dict, model: str, layout: str) -> dict:
    """The state dict of another library under our names, without head and pooler. A tensor that we have no
    name for keeps its own. Raises ValueError for a missing tensor."""
    state = {key.removeprefix("vit."): tensor for key, tensor in state.items()}
    ours = {}
    for name, theirs in names(model, layout).items():
        bare = name in ("class_token", "encoder.pos_embedding")
        for end in ("",) if bare else (".weight", ".bias"):
            ours[theirs + end] = (name + end).replace(".in_proj.", ".in_proj_")
    if missing := [key for key in ours if key not in state]:
        raise ValueError(f"{missing[0]}: expected a tensor, found none ({len(missing)} such)")
    heads = ("classifier.", "pooler.", "head.")
    return {ours.get(key, key): t for key, t in state.items() if not key.startswith(heads)}


def load_trunk(vit: VisionTransformer, state: dict, source: str) -> None:
    """Load a state dict, with joined or split attention, into a vit with joined attention; not the head."""
    state = {key: tensor for key, tensor in state.items() if not key.startswith("heads.")}
    if any(".self_attention.query." in key for key in state):
        split_attention(vit)
    expected = {key: t for key, t in vit.state_dict().items() if not key.startswith("heads.")}
    position = "encoder.pos_embedding"
    if position in state and state[position].shape != expected[position].shape:
        state = interpolate_embeddings(vit.image_size, vit.patch_size, OrderedDict(state))
    if problem := first_mismatch(expected, state):
        raise ValueError(f"--weights {source}: {problem}")
    vit.load_state_dict(state, strict=False)
