"""The trunk: torchvision's Vision Transformer with every attention projection a real nn.Linear.

torchvision's nn.MultiheadAttention holds the query, key and value matrices in one raw parameter and
reads out_proj.weight without calling out_proj. An adapter wrapped around out_proj is never run, and
nothing says so. split_attention(model) turns each of them into an Attention of four nn.Linear with
the same numbers; join_attention(model) goes back, so that a merged model loads into torchvision's own.

    model, preprocessing = build("vit_b_16", weights="imagenet1k", num_classes=200)
    model = split_attention(torchvision.models.vit_b_16())       # or any ViT of torchvision's

Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv 2010.11929.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torchvision.models import VisionTransformer, ViT_B_16_Weights
from torchvision.models.vision_transformer import interpolate_embeddings

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
HERE = Path(globals().get("__file__", "vit.py")).parent  # a notebook's cell has no __file__
EMBEDDED = HERE / "assets" / "vit_mini.safetensors"
NAMES = (*PRETRAINED, "embedded", "none")  # of weights; anything else is a file


class Attention(nn.Module):
    """Multi-head self-attention with its four projections as nn.Linear: query, key, value, out.

    Called as torchvision's EncoderBlock calls nn.MultiheadAttention with batch_first=True: three
    tensors (batch, tokens, dim), of which it returns (output of the same shape, None).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, bias: bool = True, **factory):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(dim, dim, bias, **factory)
        self.key = nn.Linear(dim, dim, bias, **factory)
        self.value = nn.Linear(dim, dim, bias, **factory)
        self.out = nn.Linear(dim, dim, bias, **factory)

    def forward(self, query, key, value, need_weights=False):
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, dim / heads)
            for project, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).flatten(2)), None  # (B, T, dim)


@torch.no_grad()
def split_attention(model: nn.Module) -> nn.Module:
    """Turn every nn.MultiheadAttention of the model into an Attention, in place; return the model.

    Raises ValueError for one that self-attention of a ViT does not use: batch_first=False, bias_k,
    add_zero_attn, or key and value of another width.
    """
    for name, joined in list(model.named_modules()):
        if not isinstance(joined, nn.MultiheadAttention):
            continue
        plain = joined.batch_first and joined.bias_k is None and not joined.add_zero_attn
        if not plain or joined.in_proj_weight is None:
            raise ValueError(
                f"{name}: split_attention needs batch_first=True, no bias_k, no add_zero_attn "
                f"and query, key, value of one width; found {joined}"
            )
        W, b = joined.in_proj_weight, joined.in_proj_bias  # (3 dim, dim), (3 dim,)
        split = Attention(
            joined.embed_dim,
            joined.num_heads,
            joined.dropout,
            b is not None,
            device=W.device,
            dtype=W.dtype,
        )
        for i, layer in enumerate((split.query, split.key, split.value)):
            layer.weight.copy_(W.chunk(3)[i])
            layer.weight.requires_grad_(W.requires_grad)
            if b is not None:
                layer.bias.copy_(b.chunk(3)[i])
                layer.bias.requires_grad_(b.requires_grad)
        split.out.weight, split.out.bias = joined.out_proj.weight, joined.out_proj.bias
        model.set_submodule(name, split.train(joined.training))
    return model


@torch.no_grad()
def join_attention(model: nn.Module) -> nn.Module:
    """Turn every Attention back into an nn.MultiheadAttention, in place; return the model.

    Raises ValueError for one that still holds an adapter: merge first.
    """
    for name, split in list(model.named_modules()):
        if not isinstance(split, Attention):
            continue
        layers = [split.query, split.key, split.value]
        for child, layer in split.named_children():
            if not isinstance(layer, nn.Linear):
                raise ValueError(
                    f"{name}.{child} is a {type(layer).__name__}: call merge(model) first"
                )
        W, b = split.query.weight, split.query.bias
        joined = nn.MultiheadAttention(
            W.shape[1],
            split.heads,
            split.dropout,
            b is not None,
            batch_first=True,
            device=W.device,
            dtype=W.dtype,
        )
        joined.in_proj_weight.copy_(torch.cat([layer.weight for layer in layers]))
        joined.in_proj_weight.requires_grad_(any(layer.weight.requires_grad for layer in layers))
        if b is not None:
            joined.in_proj_bias.copy_(torch.cat([layer.bias for layer in layers]))
            joined.in_proj_bias.requires_grad_(any(layer.bias.requires_grad for layer in layers))
        joined.out_proj.weight, joined.out_proj.bias = split.out.weight, split.out.bias
        model.set_submodule(name, joined.train(split.training))
    return model


def build(
    model: str = "vit_b_16",
    weights: str = "imagenet1k",
    num_classes: int = 1000,
    image_size: int | None = None,
    head_dropout: float = 0.0,
    seed: int = 0,
) -> tuple[VisionTransformer, dict]:
    """A pretrained Vision Transformer with split attention and a fresh head.

    model: "vit_b_16" or "vit_mini", the small embedded one.
    weights: "imagenet1k" or "swag" (torchvision's, downloaded once), "embedded" (vit_mini's), "none"
        (random, drawn from seed) or a file: torchvision's state dict as .pth, or .safetensors, such as
        the adapter.safetensors of a run of train.py with --adapter full. Its head is left out.
    image_size: pixels of a side, a multiple of the patch; None for the model's own. For another size
        the position embeddings are interpolated.

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
    state, preprocessing = trunk_state(model, weights)
    with torch.random.fork_rng(devices=[]):  # a random trunk comes from its seed and nothing else
        torch.manual_seed(seed)
        vit = VisionTransformer(**shape)
    if state is not None:
        load_trunk(vit, state, source=weights)
    vit = split_attention(vit)
    vit.heads = nn.Sequential(
        OrderedDict(
            dropout=nn.Dropout(head_dropout), head=nn.Linear(shape["hidden_dim"], num_classes)
        )
    )
    return vit, {**preprocessing, "image_size": shape["image_size"]}


def trunk_state(model: str, weights: str) -> tuple[dict | None, dict]:
    """The state dict that weights names (None for random ones) and its preprocessing."""
    default = HALF if model == "vit_mini" else IMAGENET
    if weights == "none":
        return None, default
    if weights in PRETRAINED:
        if model != "vit_b_16":
            raise ValueError(
                f"weights {weights!r} are vit_b_16's: {model} takes embedded, none or a file"
            )
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
    path = EMBEDDED if weights == "embedded" else Path(weights)
    state, metadata = read_weights(path)
    preprocessing = metadata.get("preprocessing")
    return state, json.loads(preprocessing) if preprocessing else default


def read_weights(path: Path) -> tuple[dict, dict]:
    """The tensors of a .safetensors or .pth file and, from the former, its metadata.

    Nothing is unpickled but tensors. Raises FileNotFoundError, or ValueError for another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {str(path)!r}: no such file, and no such name; "
            f"expected {', '.join(NAMES)} or a .safetensors or .pth file"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(f"{path}: not a file of tensors ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: expected a state dict (names and tensors), found {type(state).__name__}"
        )
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path}: {key}: expected a tensor, found {type(tensor).__name__}; "
                "save the model's state_dict() alone"
            )
    return state, {}


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says: torch's run to many."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


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


def first_mismatch(expected: dict, found: dict) -> str | None:
    """What is wrong with the first tensor that is missing, too many or of another shape; else None."""
    for key in [*expected, *found]:
        if key not in found:
            return f"{key}: expected shape {tuple(expected[key].shape)}, found no such tensor"
        if key not in expected:
            return f"{key}: expected no such tensor, found shape {tuple(found[key].shape)}"
        if expected[key].shape != found[key].shape:
            return (
                f"{key}: expected shape {tuple(expected[key].shape)}, "
                f"found {tuple(found[key].shape)}"
            )
    return None
