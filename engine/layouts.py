"""The tensors of plain Vision Transformers under other libraries' names, and under ours.

    state, layout = to_ours(theirs)   # a state dict of torchvision, timm, transformers, Facebook, OpenCLIP
    shape = shape_of(state)           # what its tensors say: depth, width, patch, registers, LayerScale

Our names are those of torchvision's VisionTransformer with split attention. What a family adds has a place
there, see vit.trunk: registers and the distillation token follow the class token, LayerScale's gamma is in
dropout and mlp.4 of a block, and CLIP's first LayerNorm is encoder.layers.ln_pre.
"""

import math
import re

import torch

BLOCK = "encoder.layers.encoder_layer_{}."  # {}: its number
NUMBER = re.compile(r"^(.*?(?:encoder_layer_|\blayers?\.|\bblocks\.|\bresblocks\.))(\d+)(?=\.)")

# From our names of modules and single parameters to other libraries': outside of the blocks, inside a block.
MLP = {"mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
HF = {
    "class_token": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "distillation": "embeddings.distillation_token",
    "encoder.pos_embedding": "embeddings.position_embeddings",
    "conv_proj": "embeddings.patch_embeddings.projection",
    "encoder.ln": "layernorm",
}
HF_ATTENTION = {  # in files, and in memory before transformers 5
    "self_attention.query": "attention.attention.query",
    "self_attention.key": "attention.attention.key",
    "self_attention.value": "attention.attention.value",
    "self_attention.out": "attention.output.dense",
}
HF5_ATTENTION = {  # in memory, from transformers 5 on
    "self_attention.query": "attention.q_proj",
    "self_attention.key": "attention.k_proj",
    "self_attention.value": "attention.v_proj",
    "self_attention.out": "attention.o_proj",
}
VIT = {"ln_1": "layernorm_before", "ln_2": "layernorm_after"}
DINOV2 = {
    "ln_1": "norm1",
    "dropout.gamma": "layer_scale1.lambda1",
    "ln_2": "norm2",
    "mlp.4.gamma": "layer_scale2.lambda1",
}
SWIGLU = {"mlp.0": "mlp.weights_in", "mlp.3": "mlp.weights_out"}
CLIP = {
    "class_token": "embeddings.class_embedding",
    "encoder.pos_embedding": "embeddings.position_embedding.weight",
    "conv_proj": "embeddings.patch_embedding",
    "encoder.layers.ln_pre": "pre_layrnorm",  # so spelt
    "encoder.ln": "post_layernorm",
}
CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "self_attention.query": "self_attn.q_proj",
    "self_attention.key": "self_attn.k_proj",
    "self_attention.value": "self_attn.v_proj",
    "self_attention.out": "self_attn.out_proj",
    "ln_2": "layer_norm2",
}
OPENCLIP = {
    "class_token": "class_embedding",
    "encoder.pos_embedding": "positional_embedding",
    "conv_proj": "conv1",
    "encoder.layers.ln_pre": "ln_pre",
    "encoder.ln": "ln_post",
}
OPENCLIP_BLOCK = {
    "ln_1": "ln_1",
    "self_attention.in_proj": "attn.in_proj",
    "self_attention.out": "attn.out_proj",
    "ln_2": "ln_2",
    "mlp.0": "mlp.c_fc",
    "mlp.3": "mlp.c_proj",
}
TIMM = {  # Facebook's files too
    "class_token": "cls_token",
    "registers": "reg_token",
    "distillation": "dist_token",
    "encoder.pos_embedding": "pos_embed",
    "conv_proj": "patch_embed.proj",
    "encoder.layers.ln_pre": "norm_pre",
    "encoder.ln": "norm",
}
TIMM_BLOCK = {
    "ln_1": "norm1",
    "self_attention.in_proj": "attn.qkv",
    "self_attention.out": "attn.proj",
    "dropout.gamma": "ls1.gamma",
    "ln_2": "norm2",
    "mlp.4.gamma": "ls2.gamma",
}
OURS = {name: name for name in ("class_token", "encoder.pos_embedding", "conv_proj", "encoder.ln")}
OURS |= {"encoder.layers.ln_pre": "encoder.layers.ln_pre"}
OURS_BLOCK = "ln_1 ln_2 mlp.0 mlp.3 dropout.gamma mlp.4.gamma".split()
OURS_BLOCK += [f"self_attention.{name}" for name in ("query", "key", "value", "out")]


def table(block: str, outside: dict[str, str], *inside: dict[str, str]) -> dict[str, str]:
    """One table of names; {} stands for the number of a block."""
    inside = {BLOCK + ours: block + name for part in inside for ours, name in part.items()}
    return outside | inside


LAYOUTS = {
    "ours": table(BLOCK, OURS, {name: name for name in OURS_BLOCK}),
    "torchvision": table(
        BLOCK,
        OURS,
        {name: name for name in OURS_BLOCK if "self_attention" not in name},
        {"self_attention.in_proj": "self_attention.in_proj"},
        {"self_attention.out": "self_attention.out_proj"},
    ),
    "vit": table(
        "encoder.layer.{}.",
        HF,
        VIT,
        HF_ATTENTION,
        {"mlp.0": "intermediate.dense", "mlp.3": "output.dense"},
    ),
    "vit5": table("layers.{}.", HF, VIT, HF5_ATTENTION, MLP),
    "dinov2": table("encoder.layer.{}.", HF, DINOV2, HF_ATTENTION, MLP),
    "dinov2-5": table("encoder.layer.{}.", HF, DINOV2, HF5_ATTENTION, MLP),
    "dinov2-swiglu": table("encoder.layer.{}.", HF, DINOV2, HF_ATTENTION, SWIGLU),
    "dinov2-swiglu-5": table("encoder.layer.{}.", HF, DINOV2, HF5_ATTENTION, SWIGLU),
    "clip": table("encoder.layers.{}.", CLIP, CLIP_BLOCK, MLP),
    "openclip": table("transformer.resblocks.{}.", OPENCLIP, OPENCLIP_BLOCK),
    "timm": table("blocks.{}.", TIMM, TIMM_BLOCK, MLP),
}
ALIASES = {  # other names for tensors of timm's layout
    "register_tokens": "reg_token",  # Facebook's DINOv2
    "mlp.w12.": "mlp.fc1.",  # its giant
    "mlp.w3.": "mlp.fc2.",
    ".gamma_1": ".ls1.gamma",  # Facebook's DeiT III
    ".gamma_2": ".ls2.gamma",
    "attn.in_proj_": "attn.in_proj.",
    "self_attention.in_proj_": "self_attention.in_proj.",
}
TOKENS = ("class_token", "registers", "distillation", "encoder.pos_embedding")
OPTIONAL = ("class_token", "registers", "distillation", "encoder.layers.ln_pre", "gamma")
MUST_HAVE_BIAS = ("ln_1", "ln_2", "encoder.ln", "self_attention.out", "mlp.0", "mlp.3")
# Parts of other models' files that no trunk has: heads, poolers, decoders, masks.
LEFT_OUT = re.compile(
    r"(heads?|head_dist|fc|classifier|cls_classifier|distillation_classifier|pooler|pre_logits|decoder\w*)\."
    r"|(embeddings\.)?(mask_token|position_ids)$|(decoder_pos_embed|proj)$"
)
# Families of another class, told apart by their keys.
FOREIGN = {
    "Swin": r"layers\.\d+\.blocks\.\d+\.",
    "ConvNeXt": r"stages\.\d+\..*(conv_dw|dwconv)\.",
    "BEiT": r"(^|\.)beit\.|relative_position_bias|\blambda_1$",
    "SigLIP": r"attn_pool\.|head\.probe$",
    "EVA-02, AIMv2 or another gated ViT": r"\battn\.(q_bias|q_proj\.)|mlp\.(fc1_g|w1)\.|(^|\.)rope\.",
    "a hybrid of convolutions and a ViT": r"patch_embed\.backbone\.",
    "a ViT that takes the mean before its last LayerNorm (fc_norm)": r"(^|\.)fc_norm\.",
}
ELSEWHERE = (
    "not a plain ViT, and torchvision's class cannot hold it; adapt timm's or transformers' own model with "
    "replace_linear: docs/any-model.md, A model of timm or transformers as it is"
)


def renamed(key: str, names: dict[str, str]) -> str | None:
    """A name of a tensor or module by a table; None if the table does not have it.

    What follows the module's name stays: with {"a.{}.b": "c.{}.d"}, x of "a.3.b.x" gives "c.3.d.x".
    """
    number = NUMBER.match(key)
    template = f"{number[1]}{{}}{key[number.end() :]}" if number else key
    module, end = template, ""
    while module:
        if module in names:
            return names[module].replace("{}", number[2] if number else "") + end
        module, dot, last = module.rpartition(".")
        end = dot + last + end
    return None


def to_ours(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str]:
    """A trunk's state dict under our names, without its head, and the name of its layout.

    Raises ValueError for a model that is not a plain ViT, and, with the file's name for it, for a tensor that
    is missing, unknown or of the wrong shape.
    """
    state = with_joined_gates(state)
    layout, prefix = layout_of(state)
    names = {theirs: ours for ours, theirs in LAYOUTS[layout].items()}
    found, keys = {}, {}
    for key, tensor in state.items():
        short = key.removeprefix(prefix)
        if key.startswith(prefix) and not LEFT_OUT.match(short):
            ours = renamed(short, names) or renamed(plain(short), names)
            if ours is None:
                raise ValueError(
                    f"{key}: expected no such tensor, found shape {tuple(tensor.shape)}: {ELSEWHERE}"
                )
            found[ours], keys[ours] = tensor, key
    check_complete(found, layout, prefix)
    check_shapes(found, keys)
    for key in [key for key in found if ".in_proj." in key]:
        for name, part in zip(("query", "key", "value"), found.pop(key).chunk(3), strict=True):
            found[key.replace("in_proj", name)] = part
    return with_tokens(with_biases(found)), layout


def plain(key: str) -> str:
    """A key without the spelling that some files of its layout have."""
    for alias, name in ALIASES.items():
        key = key.replace(alias, name)
    return key


def layout_of(state: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The layout of a state dict and what stands before all its names, as "vit." does."""
    for family, pattern in FOREIGN.items():
        if any(re.search(pattern, key) for key in state):
            raise ValueError(f"this is {family}: {ELSEWHERE}")
    keys = {*state, *map(plain, state)}
    for layout, names in LAYOUTS.items():
        marks = ("conv_proj", f"{BLOCK}ln_1", f"{BLOCK}self_attention.out", f"{BLOCK}mlp.0")
        marks = [names[mark].replace("{}", "0") + ".weight" for mark in marks]
        for key in state:
            prefix = key.removesuffix(marks[0])
            if key.endswith(marks[0]) and all(prefix + mark in keys for mark in marks):
                positions = prefix + names["encoder.pos_embedding"]
                if positions not in state:
                    raise ValueError(
                        f"no {positions}, so positions are rotary or relative, as in DINOv3: {ELSEWHERE}"
                    )
                if layout == "clip" and f"{prefix}pre_layrnorm.weight" not in keys:
                    raise ValueError(f"this is SigLIP: {ELSEWHERE}")
                if layout == "openclip" and f"{prefix}ln_pre.weight" not in keys:
                    raise ValueError(
                        f"this is CLIPA, whose head reads the mean before the last LayerNorm: {ELSEWHERE}"
                    )
                return layout, prefix
    if any(key.startswith("layer.0.attention.") for key in state):
        raise ValueError(f"this is DINOv3: {ELSEWHERE}")
    resnet = " of a ResNet" if any("layer1.0.conv1." in key for key in state) else ""
    raise ValueError(
        f"expected the tensors of a ViT of torchvision, timm, transformers, Facebook or OpenCLIP, found "
        f"{', '.join(list(state)[:4])}{resnet}: {ELSEWHERE}"
    )


def check_complete(found: dict, layout: str, prefix: str) -> None:
    """Raise ValueError, with the file's name for it, for a tensor that is missing, in one block or in all."""
    for ours, theirs in LAYOUTS[layout].items():
        ends = {t.removeprefix(ours) for key in found if (t := templated(key)).startswith(ours)}
        if not ours.endswith(OPTIONAL):
            ends |= {""} if ours == "encoder.pos_embedding" else {".weight"}
            ends |= {".bias"} if ours.endswith(MUST_HAVE_BIAS) else set()
        for end in sorted(ends):
            for number in block_numbers(found) if "{}" in ours else [0]:
                if ours.replace("{}", str(number)) + end not in found:
                    name = prefix + theirs.replace("{}", str(number)) + end
                    raise ValueError(f"{name}: expected a tensor, found none")


def check_shapes(found: dict, keys: dict[str, str]) -> None:
    """Raise ValueError, with the file's name for it, for a tensor whose shape does not fit the others'.

    keys: from our names to the file's.
    """
    first = BLOCK.replace("{}", "0")
    dim, inner = found["encoder.ln.bias"].numel(), found[f"{first}mlp.0.bias"].numel()
    patch = found["conv_proj.weight"].shape[-1:]
    swiglu = found[f"{first}mlp.3.weight"].shape[-1:] == (inner // 2,)
    shapes = {
        "conv_proj.weight": (dim, 3, *patch, *patch),
        "in_proj.weight": (3 * dim, dim),
        "in_proj.bias": (3 * dim,),
        "mlp.0.weight": (inner, dim),
        "mlp.0.bias": (inner,),
        "mlp.3.weight": (dim, inner // 2 if swiglu else inner),
        **{f"{name}.weight": (dim, dim) for name in ("query", "key", "value", "attention.out")},
    }
    for ours, tensor in found.items():
        shape = next((shape for end, shape in shapes.items() if ours.endswith(end)), (dim,))
        if ours in TOKENS:
            shape = (*tensor.shape[:-1], dim)
        if tensor.shape != shape:
            name = keys[ours] if keys[ours] == ours else f"{keys[ours]} ({ours})"
            raise ValueError(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")


def templated(key: str) -> str:
    """A name with {} in place of the block's number."""
    return NUMBER.sub(lambda found: found[1] + "{}", key)


def block_numbers(state: dict) -> range:
    """The numbers of the blocks: 0 up to the largest that a name has."""
    numbers = [int(found[2]) for key in state if (found := NUMBER.match(key))]
    return range(max(numbers, default=-1) + 1)


def with_joined_gates(state: dict) -> dict:
    """The state with a SwiGLU's gate and up, which transformers 5 has apart in memory, as one layer."""
    state = {key.replace("mlp.down_proj.", "mlp.weights_out."): t for key, t in state.items()}
    for key in [key for key in state if ".mlp.gate_proj." in key]:
        up = state.pop(key.replace("gate_proj", "up_proj"), None)
        if up is None:
            raise ValueError(f"{key}: expected {key.replace('gate_proj', 'up_proj')} as well")
        state[key.replace("gate_proj", "weights_in")] = torch.cat([state.pop(key), up])
    return state


def with_biases(state: dict) -> dict:
    """The state with zeros for the biases that a family does without."""
    ends = tuple(f"{name}.weight" for name in ("conv_proj", "query", "key", "value"))
    weights = {key.removesuffix(".weight"): t for key, t in state.items() if key.endswith(ends)}
    return {f"{name}.bias": t.new_zeros(len(t)) for name, t in weights.items()} | state


def with_tokens(state: dict) -> dict:
    """The state with all prefix tokens (class, distillation, registers) in class_token, (1, tokens, width),
    and a row for each of them in encoder.pos_embedding, (1, tokens + patches, width)."""
    width = len(state["conv_proj.weight"])
    tokens = [state.pop(name, None) for name in ("class_token", "distillation", "registers")]
    first = tokens[0] is not None
    tokens = [token.reshape(1, -1, width) for token in tokens if token is not None]
    tokens = torch.cat(tokens, 1) if tokens else state["conv_proj.weight"].new_zeros(1, 0, width)
    positions = state.pop("encoder.pos_embedding").reshape(1, -1, width)
    # How many of the tokens have a position: all, the class token, or none. Patches make a square.
    for own in (tokens.shape[1], int(first), 0):
        patches = max(0, positions.shape[1] - own)
        if patches and math.isqrt(patches) ** 2 == patches:
            break
    else:
        raise ValueError(
            f"position embedding: expected a square of patches and {tokens.shape[1]} more, found "
            f"{positions.shape[1]}"
        )
    zeros = positions.new_zeros(1, tokens.shape[1] - own, width)
    positions = torch.cat([positions[:, :own], zeros, positions[:, own:]], 1)
    return state | {"class_token": tokens, "encoder.pos_embedding": positions}


def shape_of(state: dict[str, torch.Tensor]) -> dict:
    """What the tensors of a trunk, under our names, say of its shape, in the words of vit.trunk."""
    first = BLOCK.replace("{}", "0")
    W_in = state[f"{first}mlp.0.weight"]  # (mlp, dim); (2 mlp, dim) before a SwiGLU
    W_out = state[f"{first}mlp.3.weight"]  # (dim, mlp)
    width, _, patch, _ = state["conv_proj.weight"].shape
    tokens = state["class_token"].shape[1]
    patches = state["encoder.pos_embedding"].shape[1] - tokens
    return {
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "num_layers": len(block_numbers(state)),
        "hidden_dim": width,
        "mlp_dim": W_out.shape[1],
        "prefix_tokens": tokens,
        "layer_scale": f"{first}dropout.gamma" in state,
        "pre_norm": "encoder.layers.ln_pre.weight" in state,
        **({"activation": "swiglu"} if len(W_in) == 2 * W_out.shape[1] else {}),
    }
