"""Attention made of four nn.Linear layers, so that an adapter can wrap each of them.

torchvision's Vision Transformer uses nn.MultiheadAttention. That module keeps the query, key and value
matrices in one raw parameter, and it reads out_proj.weight without calling out_proj. So an adapter around
out_proj never runs, and no error says so.

    split_attention(model)     # each nn.MultiheadAttention becomes an Attention with the same numbers
    ...                        # replace_linear, training, merge
    join_attention(model)      # torchvision's module again: a stock model loads the weights
"""

import torch
import torch.nn.functional as F
from torch import nn

SHORT = 256  # tokens; the memory that attend keeps grows with their square


class Attention(nn.Module):
    """Multi-head self-attention with four nn.Linear: query, key, value, out.

    It takes three tensors (batch, tokens, dim) and returns (output of that shape, None), as
    nn.MultiheadAttention does for torchvision's EncoderBlock.
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
        bfloat16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if bfloat16_on_cpu and q.shape[2] <= SHORT and not dropout:  # torch's kernel is slow there
            attended = attend(q, k, v)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).flatten(2)), None  # (B, T, dim)


def attend(q, k, v):
    """softmax(q kᵀ / sqrt(dim / heads)) v, for (B, heads, T, dim / heads), as plain products.

    In bfloat16 on a CPU that multiplies it natively, this takes a third (197 tokens) to a fifth (65) of the
    time of torch's kernel, forward and backward together. Subtracting the mean key shifts all scores of a
    query by the same number, which does not change the softmax, and the scores become smaller (Zhang et al.,
    SageAttention, 2024, arXiv 2410.02367). That matters because they are rounded to bfloat16; torch's kernel
    has them in float32. bench/attention.py measures time and error. Autograd keeps the probabilities,
    (B, heads, T, T), which torch's kernel does not.
    """
    k = k - k.mean(2, keepdim=True)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    return scores.softmax(-1) @ v


@torch.no_grad()
def split_attention(model: nn.Module) -> nn.Module:
    """Turn every nn.MultiheadAttention of the model into an Attention, in place; return the model.

    The model must call its attention as torchvision's ViT does: without masks, and using only the output.
    Raises ValueError for an attention that such a ViT does not have: batch_first=False, bias_k,
    add_zero_attn, key and value of another width, hooks, a subclass, or use in nn.TransformerEncoder and
    similar modules.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    done = {}  # a shared attention is split once
    for name, joined in modules.items():
        if not isinstance(joined, nn.MultiheadAttention):
            continue
        if joined in done:
            model.set_submodule(name, done[joined])
            continue
        owner = modules.get(name.rpartition(".")[0])
        if isinstance(owner, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            raise ValueError(
                f"{name}: {type(owner).__name__} reads its attention's weights and passes masks; "
                "expected a ViT of torchvision's"
            )
        plain = joined.batch_first and joined.bias_k is None and not joined.add_zero_attn
        if not plain or joined.in_proj_weight is None:
            raise ValueError(
                f"{name}: split_attention needs batch_first=True, no bias_k, no add_zero_attn "
                f"and query, key, value of one width; found {joined}"
            )
        hooks = joined._forward_hooks or joined._forward_pre_hooks
        if hooks or type(joined) is not nn.MultiheadAttention:
            raise ValueError(
                f"{name}: {'hooks' if hooks else type(joined).__name__}: expected nn.MultiheadAttention "
                "itself, without hooks, which the new layers would lose; remove them first"
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
        done[joined] = split.train(joined.training)
        model.set_submodule(name, split)
    return model


@torch.no_grad()
def join_attention(model: nn.Module) -> nn.Module:
    """Turn every Attention back into an nn.MultiheadAttention, in place; return the model.

    Raises ValueError if one still holds an adapter: merge first.
    """
    done = {}
    for name, split in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(split, Attention):
            continue
        if split in done:
            model.set_submodule(name, done[split])
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
        done[split] = joined.train(split.training)
        model.set_submodule(name, joined)
    return model
