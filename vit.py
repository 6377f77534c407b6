"""The trunk: torchvision's Vision Transformer, with the pretrained weights of any plain ViT and a new head.

    model, preprocessing = build("vit_b_16", weights="imagenet1k", num_classes=200)   # torchvision's
    model, preprocessing = build(weights="facebook/dinov2-small", num_classes=101)    # Hugging Face's

torchvision's class is one for all: what DINOv2, DeiT or CLIP add has a place in it, see trunk.
Dosovitskiy et al., An Image is Worth 16x16 Words, 2020, arXiv 2010.11929.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer

from attention import split_attention
from engine.adapt import ADAPT, adapt
from engine.checkpoint import read_adapter, restore
from engine.files import first_mismatch
from engine.weights import HALF, IMAGENET, TORCHVISION, read

MODELS = {  # the shapes that have a name: side of the images, patch, blocks, heads, width, width of the MLP
    "vit_b_16": (224, 16, 12, 12, 768, 3072),
    "vit_b_32": (224, 32, 12, 12, 768, 3072),
    "vit_l_16": (224, 16, 24, 16, 1024, 4096),
    "vit_l_32": (224, 32, 24, 16, 1024, 4096),
    "vit_h_14": (224, 14, 32, 16, 1280, 5120),
    "vit_mini": (28, 7, 6, 4, 128, 512),  # the embedded trunk, see assets/README.md
}
OLD = {"old_positions": True}  # adapter files without a shape: resized as torchvision does
DEFAULTS = {"prefix_tokens": 1, "layer_scale": False, "pre_norm": False, "activation": "gelu"}
DEFAULTS |= {"pool": "class", "eps": 1e-6}
COLUMNS = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim")


class LayerScale(nn.Module):
    """y = gamma x, with a number for each channel. Touvron et al., 2021, arXiv 2103.17239."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.gamma * x


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SwiGLU(nn.Module):
    """silu(a) b, where x = (a, b): (..., 2 dim) -> (..., dim). Shazeer, 2020, arXiv 2002.05202."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


class PooledNorm(nn.LayerNorm):
    """The last LayerNorm, and then what the head reads: (B, tokens, dim) -> (B, 1, dim or 2 dim).

    pool: "mean" of the patches, or "class+mean": class token and mean, one after the other.
    """

    pool, prefix_tokens = "mean", 0

    def forward(self, x):
        x = super().forward(x)
        mean = x[:, self.prefix_tokens :].mean(1, keepdim=True)
        return mean if self.pool == "mean" else torch.cat([x[:, :1], mean], -1)


class Blocks(nn.Sequential):
    """The blocks. With recompute, backward runs each one again, instead of keeping what is inside it."""

    recompute = False

    def forward(self, x):
        if not (self.recompute and torch.is_grad_enabled()):
            return super().forward(x)
        for block in self:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def trunk(
    image_size: int,
    patch_size: int,
    num_layers: int,
    num_heads: int,
    hidden_dim: int,
    mlp_dim: int,
    prefix_tokens: int = 1,
    layer_scale: bool = False,
    pre_norm: bool = False,
    activation: str = "gelu",
    pool: str = "class",
    eps: float = 1e-6,
) -> VisionTransformer:
    """A ViT with random weights. What a family adds goes where torchvision's class has a place:

    prefix_tokens: class token, distillation token, registers. class_token is (1, tokens, dim).
    layer_scale: LayerScale in place of the two dropouts of a block, whose probability is zero.
    pre_norm: a LayerNorm before the blocks, as the first of them (CLIP).
    activation: "gelu", "quick_gelu" (CLIP), or "swiglu" (DINOv2 giant), whose first layer is twice as wide.
    pool: what the head reads: "class" token, "mean" of the patches, or both, "class+mean".
    eps: of every LayerNorm.
    """
    norm = partial(nn.LayerNorm, eps=eps)
    vit = VisionTransformer(
        image_size, patch_size, num_layers, num_heads, hidden_dim, mlp_dim, norm_layer=norm
    )
    patches = vit.seq_length - 1
    if prefix_tokens != 1:
        vit.seq_length = prefix_tokens + patches
        vit.class_token = nn.Parameter(torch.zeros(1, prefix_tokens, hidden_dim))
        vit.encoder.pos_embedding = nn.Parameter(torch.zeros(1, vit.seq_length, hidden_dim))
    for block in vit.encoder.layers:
        if activation == "quick_gelu":
            block.mlp[1] = QuickGELU()
        if activation == "swiglu":
            block.mlp[0], block.mlp[1] = nn.Linear(hidden_dim, 2 * mlp_dim), SwiGLU()
        if layer_scale:
            block.dropout, block.mlp[4] = LayerScale(hidden_dim), LayerScale(hidden_dim)
    first = {"ln_pre": norm(hidden_dim)} if pre_norm else {}
    vit.encoder.layers = Blocks(OrderedDict(first | dict(vit.encoder.layers.named_children())))
    if pool != "class":
        vit.encoder.ln = PooledNorm(hidden_dim, eps=eps)
        vit.encoder.ln.pool, vit.encoder.ln.prefix_tokens = pool, prefix_tokens
    return vit


def build(
    model: str | dict | None = None,
    weights: str = "imagenet1k",
    num_classes: int = 1000,
    image_size: int | None = None,
    head_dropout: float = 0.0,
    seed: int = 0,
    heads: int | None = None,
) -> tuple[VisionTransformer, dict]:
    """A pretrained Vision Transformer with split attention and a new head, and how it wants its images.

    model: a name of MODELS, for weights imagenet1k, swag and none only (default: vit_b_16): other weights
        hold their own shape. Or arguments of trunk, such as an adapter file's shape.
    weights: "imagenet1k" or "swag" (torchvision's, downloaded once), "in21k" (google's), "embedded"
        (vit_mini's), "none" (random, drawn from seed); OWNER/NAME on Hugging Face; or a file or folder with a
        ViT of torchvision, timm, transformers, Facebook or OpenCLIP, or the adapter file of a run with
        --adapter full. Its head is not loaded.
    image_size: side in pixels, a multiple of the patch size; None for the weights' own. For another size the
        position embeddings are interpolated.
    heads: the number of attention heads, for weights that do not say it.

    Returns the model and its preprocessing: a dict of image_size, mean, std, crop and interpolation.
    model.shape holds all arguments of trunk.
    Raises ValueError for names and tensors that do not fit, OSError for what cannot be read.
    """
    weights = str(weights)
    if model is None and weights in (*TORCHVISION, "none"):
        model = "vit_b_16"
    given = named_shape(model) if isinstance(model, str) else dict(model or {})
    old_positions = given.pop("old_positions", False)
    if heads and given.setdefault("num_heads", heads) != heads:
        raise ValueError(f"--heads {heads}: expected {given['num_heads']}; leave the flag out")
    if weights == "none":
        state, shape = None, given
        colours, crop = (HALF, 1.0) if model == "vit_mini" else (IMAGENET, 224 / 256)
        preprocessing = {**colours, "crop": crop, "image_size": given["image_size"]}
    else:
        pretrained = read(weights, torchvision_name(given), given)
        shape = known(pretrained.shape, f"--weights {weights}") | given
        state, preprocessing = pretrained.state, pretrained.images
        if pretrained.notes and not isinstance(model, dict):
            print(f"--weights {weights}: no file says otherwise, so: {'; '.join(pretrained.notes)}")
    shape = {**DEFAULTS, **shape, "image_size": image_size or preprocessing["image_size"]}
    if shape["image_size"] % shape["patch_size"]:
        raise ValueError(
            f"--image-size {image_size}: expected a multiple of the patch size, {shape['patch_size']}"
        )
    with torch.random.fork_rng(devices=[]):  # a random trunk comes from its seed and nothing else
        torch.manual_seed(seed)
        vit = trunk(**shape)
    vit = split_attention(vit)
    if state is not None:
        load_trunk(vit, state, weights, old_positions)
    width = shape["hidden_dim"] * (2 if shape["pool"] == "class+mean" else 1)
    head = nn.Linear(width, num_classes)
    vit.heads = nn.Sequential(OrderedDict(dropout=nn.Dropout(head_dropout), head=head))
    vit.shape = shape | ({"old_positions": True} if old_positions else {})
    size = {"image_size": shape["image_size"]}
    return vit, {"interpolation": "bilinear", **preprocessing, **size}


def named_shape(name: str) -> dict:
    """The arguments of trunk for a name of MODELS."""
    if name not in MODELS:
        raise ValueError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    return dict(zip(COLUMNS, MODELS[name], strict=True))


def torchvision_name(shape: dict) -> str:
    """The name in MODELS of a shape with this patch size and width."""
    keys = ("patch_size", "hidden_dim")
    same = (n for n in MODELS if all(named_shape(n)[key] == shape.get(key) for key in keys))
    return next(same, "vit_b_16")


def load_trunk(vit: nn.Module, state: dict, weights: str, old_positions: bool = False) -> None:
    """Load a trunk's tensors under our names; the head stays as it is."""
    expected = {key: t for key, t in vit.state_dict().items() if not key.startswith("heads.")}
    key = "encoder.pos_embedding"
    tokens, side = vit.class_token.shape[1], vit.image_size // vit.patch_size
    state = {**state, key: resize_positions(state[key], tokens, side, old_positions)}
    if problem := first_mismatch(expected, state):
        raise ValueError(f"--weights {weights}: {problem}")
    vit.load_state_dict(state, strict=False)


def resize_positions(
    positions: torch.Tensor, tokens: int, side: int, old: bool = False
) -> torch.Tensor:
    """Position embeddings for side x side patches: (1, tokens + patches, dim) -> (1, tokens + side², dim).

    The grid of patches is interpolated as timm does; the prefix tokens' rows stay.
    old: as torchvision does, in adapter files that were written when this was the rule.
    """
    prefix, grid = positions[:, :tokens], positions[:, tokens:]
    before = round(grid.shape[1] ** 0.5)
    if before == side:
        return positions
    how = {"align_corners": True} if old else {"align_corners": False, "antialias": True}
    grid = grid.float().unflatten(1, (before, before))  # (1, before, before, dim)
    grid = grid.permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", **how)
    return torch.cat([prefix, grid.flatten(2).mT.to(prefix.dtype)], 1)


def load_adapter(
    path: str | Path, weights: str | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict]:
    """Rebuild the trained model from its adapter file: (model in eval mode, info).

    path: the file, or the folder of its run.
    weights: where the pretrained weights are now, if not where they were in training.
    info: the metadata: adapter, rank, alpha, targets, shape, weights, classes, preprocessing and more.
    Raises OSError or ValueError, naming the file and the key, for what is missing or does not fit.
    """
    tensors, info = read_adapter(path)
    weights = weights or ("none" if info["adapter"] == "full" else info["weights"])
    shape = shape_in(info, path)
    size, seed = info["preprocessing"]["image_size"], info["seed"]
    try:
        model, _ = build(shape, weights, len(info["classes"]), size, seed=seed)
        adapt(model, **{key: info[key] for key in ADAPT})
    except (ValueError, OSError) as error:
        # Not type(error): a subclass such as JSONDecodeError takes other arguments.
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{path}: {error}") from None
    restore(model, tensors, info, path)
    return model.to(device).eval(), info


def shape_in(info: dict, path: str | Path) -> dict:
    """The arguments of trunk in an adapter file's metadata. Older files have a name in MODELS and the eps."""
    if "shape" in info:
        return known(info["shape"], path)
    if info.get("model") not in MODELS:
        raise ValueError(f"{path}: shape: expected the trunk's shape in the metadata, found none")
    eps = {"eps": info["eps"]} if "eps" in info else {}
    return {**named_shape(info["model"]), **eps, **OLD}


def known(shape: dict, source: str | Path) -> dict:
    """The shape of a file, if this version knows all of its keys. Raises ValueError for any other."""
    for key in shape:
        if key not in (*COLUMNS, *DEFAULTS, *OLD):
            raise ValueError(
                f"{source}: shape: {key}: expected no such key; was the file written by a newer version of "
                "this project? Then update"
            )
    return shape
