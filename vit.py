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
from engine.files import first_line, first_mismatch, optional_json, read_json, read_tensors

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

# How a trunk wants its images: mean and std of each channel, of values in 0..1, and crop, the part of
# the shorter side that evaluation keeps (the centre).
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop": 224 / 256}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "crop": 1.0}
PRETRAINED = {  # name: (torchvision's weights, preprocessing)
    "imagenet1k": (ViT_B_16_Weights.IMAGENET1K_V1, IMAGENET),
    "swag": (ViT_B_16_Weights.IMAGENET1K_SWAG_LINEAR_V1, {**IMAGENET, "crop": 1.0}),
}
EMBEDDED = Path(__file__).parent / "assets" / "vit_mini.safetensors"
NAMES = (*PRETRAINED, "in21k", "embedded", "none")  # of weights; anything else is a file or folder

IN21K = "google/vit-base-patch16-224-in21k"
KAGGLE = Path("/kaggle/input")
FILES = ("model.safetensors", "pytorch_model.bin")  # what Hugging Face calls a folder's tensors
EPS = 1e-6  # of LayerNorm in torchvision and timm
HF_EPS = 1e-12  # in Hugging Face's ViT, unless its config.json says otherwise

# Other libraries' names of our modules: Hugging Face's in files (and in memory before transformers 5),
# in memory since, and timm's, which joins query, key and value as torchvision does.
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
    """A pretrained Vision Transformer with split attention and a fresh head.

    model: "vit_b_16" or "vit_mini", the small embedded one.
    weights: "imagenet1k" or "swag" (torchvision's, downloaded once), "in21k" (Hugging Face's, see
        find_in21k), "embedded" (vit_mini's), "none" (random, drawn from seed) or a .safetensors, .pth
        or .bin file, or a folder with model.safetensors: torchvision's, Hugging Face's or timm's ViT,
        told apart by its keys, or a run of train.py with --adapter full. Its head is left out.
    image_size: pixels of a side, a multiple of the patch; None for the model's own. For another size
        the position embeddings are interpolated.
    eps: of every LayerNorm; None for what the weights were trained with.

    Returns the model and its preprocessing: a dict of image_size, mean, std and crop.
    Raises ValueError for names and tensors that do not fit, OSError for what cannot be read.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r}: expected one of {', '.join(MODELS)}")
    shape = {**MODELS[model], "image_size": image_size or MODELS[model]["image_size"]}
    if shape["image_size"] % shape["patch_size"]:
        raise ValueError(
            f"image size {image_size}: {model} needs a multiple of its patch size, {shape['patch_size']}"
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


def trunk_state(model: str, weights: str) -> tuple[dict | None, dict, float]:
    """The state dict that weights names (None: random), its preprocessing and its LayerNorm's eps."""
    default = HALF if model == "vit_mini" else IMAGENET
    if weights == "none":
        return None, default, EPS
    if weights in (*PRETRAINED, "in21k") and model != "vit_b_16":
        raise ValueError(
            f"weights {weights!r} are vit_b_16's: {model} takes embedded, none or a file"
        )
    if weights in PRETRAINED:
        return *torchvision_state(weights), EPS
    path = find_in21k() if weights == "in21k" else Path(weights)
    path = EMBEDDED if weights == "embedded" else path
    if path.is_dir():
        path = tensors_in(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {str(path)!r}: no such file, and no such name; expected {', '.join(NAMES)}, "
            "a .safetensors, .pth or .bin file, or a folder with one"
        )
    state, metadata = read_tensors(path)
    layout = layout_of(state)
    if layout:
        beside = preprocessing_in(path.parent)
        default = {key: beside.get(key, value) for key, value in HALF.items()}
    eps = json.loads(metadata.get("eps", str(EPS)))  # a run of --adapter full wrote it down
    if layout in ("hf", "hf5"):
        config = path.with_name("config.json")
        eps = (read_json(config) if config.is_file() else {}).get("layer_norm_eps", HF_EPS)
    preprocessing = metadata.get("preprocessing")
    if layout:
        try:
            state = to_ours(state, model, layout)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return state, json.loads(preprocessing) if preprocessing else default, eps


def torchvision_state(weights: str) -> tuple[dict, dict]:
    """The state dict of one of PRETRAINED, downloaded unless it lies in torch's cache."""
    source, preprocessing = PRETRAINED[weights]
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    try:
        return source.get_state_dict(check_hash=True, weights_only=True), preprocessing
    except OSError as error:
        raise OSError(
            f"weights {weights!r}: {source.url} cannot be downloaded ({error}); fetch it elsewhere "
            f"and put it at {place}, or name it with --weights FILE"
        ) from None
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(
            f"{place}: not a whole file of tensors ({first_line(error)}); remove it, and it is "
            "downloaded again"
        ) from None


def find_in21k(url: str = f"https://huggingface.co/{IN21K}/resolve/main/{FILES[0]}") -> Path:
    """The file of google/vit-base-patch16-224-in21k: out of Hugging Face's cache, the folder
    vit-base-patch16-224-in21k here or below /kaggle/input, else torch's cache, downloaded once (346 MB).

    Raises OSError, which says where it looked, if it is nowhere and cannot be downloaded.
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
            f"weights 'in21k': {IN21K} is not in {hub}, ./{short}, {KAGGLE} or {place}, and {url} "
            f"cannot be downloaded ({error}); run: hf download {IN21K}, or name its file with --weights"
        ) from None
    return place


def folders_below(root: Path, name: str) -> list[Path]:
    """The folders at most six levels below root that have name in their path, sorted. Where there are very
    many, they are the classes of some data set, and not looked into."""
    found = []
    for folder, inside, _ in os.walk(root):
        path = Path(folder).relative_to(root)
        found += [Path(folder)] if name in str(path) else []
        if len(path.parts) == 6 or len(inside) > 100:
            inside.clear()
    return sorted(found)


def tensors_in(folder: Path) -> Path:
    """The file of tensors in a folder of Hugging Face's layout."""
    found = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if found is None:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder}: expected {' or '.join(FILES)}, found {there}")
    return found


def preprocessing_in(folder: Path) -> dict:
    """What Hugging Face's preprocessor_config.json in a folder says of images, in our words: mean, std and,
    if they are cropped, image_size and crop. Nothing if there is none."""
    theirs = optional_json(folder / "preprocessor_config.json")
    keys = {"mean": "image_mean", "std": "image_std"}
    found = {ours: theirs[key] for ours, key in keys.items() if key in theirs}
    if theirs.get("do_center_crop"):
        # Older files have plain numbers: size is the shorter side then, crop_size that of a square.
        edge, crop = theirs.get("size"), theirs.get("crop_size")
        edge = edge.get("shortest_edge") if isinstance(edge, dict) else edge
        crop = crop.get("height") if isinstance(crop, dict) else crop
        if edge and crop:
            if crop > edge:
                raise ValueError(
                    f"{folder / 'preprocessor_config.json'}: crop_size: expected at most {edge}, the "
                    f"size that images are resized to, found {crop}"
                )
            found |= {"image_size": crop, "crop": crop / edge}
    return found


def layout_of(state: dict) -> str | None:
    """Whose names the tensors have: one of LAYOUTS, None for torchvision's and ours."""
    for layout, block in LAYOUTS.items():
        if any(key.removeprefix("vit.").startswith(block.format(0)) for key in state):
            return layout
    return None


def names(model: str, layout: str) -> dict[str, str]:
    """For each module of the trunk that holds parameters, and each parameter of none: its name in layout."""
    column = list(LAYOUTS).index(layout)
    found = {ours: theirs[column] for ours, theirs in OUTSIDE.items()}
    for i in range(MODELS[model]["num_layers"]):
        block = LAYOUTS[layout].format(i)
        for ours, theirs in INSIDE.items():
            if theirs[column]:
                found[f"encoder.layers.encoder_layer_{i}.{ours}"] = block + theirs[column]
    return found


def to_ours(state: dict, model: str, layout: str) -> dict:
    """The state dict of another library under our names, without head and pooler; what has no name in
    ours keeps its own. Raises ValueError for a missing tensor."""
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
    """Load a state dict with joined or split attention into a joined vit, all but the head."""
    state = {key: tensor for key, tensor in state.items() if not key.startswith("heads.")}
    if any(".self_attention.query." in key for key in state):
        split_attention(vit)
    expected = {key: t for key, t in vit.state_dict().items() if not key.startswith("heads.")}
    position = "encoder.pos_embedding"
    if position in state and state[position].shape != expected[position].shape:
        state = interpolate_embeddings(vit.image_size, vit.patch_size, OrderedDict(state))
    if problem := first_mismatch(expected, state):
        raise ValueError(f"weights {source!r}: {problem}")
    vit.load_state_dict(state, strict=False)
