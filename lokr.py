"""LoKr (KronA): a frozen linear layer plus the Kronecker product of two small trained matrices.

    y = W x + b + delta W x        s = alpha / rank
    delta W = s kron(W1, W2)       every entry of W1 times the whole of W2: blocks

    W   (out, in)        frozen: the nn.Linear that LoKrLinear wraps
    W1  (out_l, in_m)    lokr_w1, trained, zero at the start: the first forward is the frozen layer's
    W2  (out_k, in_n)    lokr_w2, trained, kaiming_uniform(a=sqrt 5)
    out = out_l * out_k and in = in_m * in_n, the two divisors nearest each other (factorization).

    W2 = W2a W2b, lokr_w2_a (out_k, rank) and lokr_w2_b (rank, in_n), if rank < max(out_k, in_n) / 2.
    W1 = W1a W1b likewise (W1a zero at the start), if decompose_both and rank < max(out_l, in_m) / 2.

Edalati et al., KronA: Parameter Efficient Tuning with Kronecker Adapter, 2022, arXiv 2212.10650; Yeh
et al., Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation, 2023,
arXiv 2309.14859. Initialisation, and alpha / rank also where no factor has a rank: PEFT's.

Cost: a row x, seen as a matrix X (in_m, in_n), gives W1 X W2^T, a matrix (out_l, out_k) that is
x kron(W1, W2)^T as rows. No kron and no delta W: for 768 x 768, 43,008 products for each row where
delta W would take 589,824.

    from functools import partial
    replace_linear(model, partial(LoKrLinear, rank=8, alpha=8), targets=["query", "value"])
    mark_trainable(model)                      # adapters and heads.head train, the rest is frozen
    ...                                        # any training loop
    merge(model)                               # plain nn.Linear again, the update added in
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split dimension into (small, large) with small * large == dimension and small <= large.

    factor > 0 that divides dimension: factor and the rest. Otherwise the pair nearest the square
    root, with small at most factor (-1: no limit). LyCORIS' rule: factorization(768) == (24, 32).
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    limit = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    small = next((d for d in range(limit, 1, -1) if dimension % d == 0), 1)
    return small, dimension // small


class LoKrLinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt. It is kept, not copied, and frozen by mark_trainable.
    rank: inner dimension of W2's two factors, 1 or more; from max(out_k, in_n) / 2 on W2 is whole.
    alpha: the update is scaled by alpha / rank.
    dropout: probability, in training, that an element of the adapter's input is zeroed (the rest grows).
    module_dropout: probability, in training, that the whole update is left out of one forward.

    factor: the wanted number of rows and columns of W1, -1 for near the square root (factorization).
    decompose_both: W1 is a product of two factors too, where rank is small enough.

    The factors are float32 or wider whatever linear's type, as AdamW and fp16 loss scaling need.
    Raises ValueError for a rank below 1 or a probability outside [0, 1).
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int = 4,
        alpha: float = 32.0,
        dropout: float = 0.0,
        module_dropout: float = 0.0,
        factor: int = -1,
        decompose_both: bool = False,
    ):
        super().__init__()
        if rank < 1 or not 0 <= dropout < 1 or not 0 <= module_dropout < 1:
            raise ValueError(
                f"rank={rank}, dropout={dropout}, module_dropout={module_dropout}: "
                "expected rank >= 1 and both dropouts in [0, 1)"
            )
        self.linear = linear
        self.rank = rank
        self.scale = alpha / rank
        self.dropout = dropout
        self.module_dropout = module_dropout
        W = linear.weight
        new = {"dtype": torch.promote_types(W.dtype, torch.float32), "device": W.device}
        out_l, out_k = factorization(linear.out_features, factor)
        in_m, in_n = factorization(linear.in_features, factor)
        if decompose_both and rank < max(out_l, in_m) / 2:
            self.lokr_w1_a = nn.Parameter(torch.zeros(out_l, rank, **new))
            self.lokr_w1_b = nn.Parameter(torch.empty(rank, in_m, **new))
            nn.init.kaiming_uniform_(self.lokr_w1_b, a=math.sqrt(5))
        else:
            self.lokr_w1 = nn.Parameter(torch.zeros(out_l, in_m, **new))
        if rank < max(out_k, in_n) / 2:
            self.lokr_w2_a = nn.Parameter(torch.empty(out_k, rank, **new))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, in_n, **new))
            nn.init.kaiming_uniform_(self.lokr_w2_a, a=math.sqrt(5))
            nn.init.kaiming_uniform_(self.lokr_w2_b, a=math.sqrt(5))
        else:
            self.lokr_w2 = nn.Parameter(torch.empty(out_k, in_n, **new))
            nn.init.kaiming_uniform_(self.lokr_w2, a=math.sqrt(5))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """s W1 (out_l, in_m) and W2 (out_k, in_n): the one place where the scale enters."""
        W1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        W2 = self.lokr_w2 if hasattr(self, "lokr_w2") else self.lokr_w2_a @ self.lokr_w2_b
        return self.scale * W1, W2

    def delta_weight(self) -> torch.Tensor:
        """delta W = s kron(W1, W2), shape (out_features, in_features)."""
        W1, W2 = self.factors()
        return torch.kron(W1, W2)

    def delta(self, x: torch.Tensor) -> torch.Tensor:
        """x @ delta_weight().T without building delta_weight: (..., in) -> (..., out)."""
        W1, W2 = (factor.to(x.dtype) for factor in self.factors())
        X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))  # (..., in_m, in_n)
        return (W1 @ (X @ W2.T)).flatten(-2)  # (..., out_l, out_k) -> (..., out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = self.delta(F.dropout(x, self.dropout, self.training))
        if self.training and self.module_dropout > 0:
            # A 0/1 mask and no if: a skipped adapter would have no gradient, which DDP refuses.
            delta = delta * (torch.rand((), device=x.device) >= self.module_dropout)
        return self.linear(x) + delta

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new nn.Linear with weight W + delta_weight, added in float32 or wider and cast back once."""
        W, bias = self.linear.weight, self.linear.bias
        out_features, in_features = W.shape
        merged = nn.utils.skip_init(
            nn.Linear, in_features, out_features, bias is not None, device=W.device, dtype=W.dtype
        )
        with torch.autocast(W.device.type, enabled=False):
            delta = self.delta_weight()  # float32 or wider, and so is the sum
        merged.weight.copy_(W + delta)
        if bias is not None:
            merged.bias.copy_(bias)
            merged.bias.requires_grad_(bias.requires_grad)
        merged.weight.requires_grad_(W.requires_grad)
        return merged.train(self.training)

    @property
    def weight(self) -> torch.Tensor:
        """W + delta_weight, for code that reads a layer's weight instead of calling the layer, as
        nn.TransformerEncoderLayer does in eval mode."""
        return self.linear.weight + self.delta_weight().to(self.linear.weight.dtype)

    @property
    def bias(self) -> torch.Tensor | None:
        return self.linear.bias

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


# The functions below stand word for word in lora.py, loha.py and lokr.py, so that each file pastes alone.
# They know an adapter of any kind by its delta_weight.


def replace_linear(
    model: nn.Module, wrap, targets: str | list[str] = "all", head: str = "heads.head"
) -> list[str]:
    """Wrap nn.Linear layers of the model in place and return their dotted names.

    wrap: called with each nn.Linear, returns its adapter: partial(LoRALinear, rank=8, alpha=16).
    targets: "all" for every nn.Linear whose name does not contain head, or the last parts of names
        (["query", "mlp.0"]; "query,mlp.0" is the same).
    head: the part of a name that marks the classifier, which "all" leaves alone; "" for a model without.

    Raises ValueError, with the model unchanged, if a target matches nothing or a layer that is wrapped.
    Warns of nn.MultiheadAttention: it reads its weights and calls no layer, so wrapping does nothing there.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = [name for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    adapted = {name for name, m in modules.items() if hasattr(m, "delta_weight")}
    if attention:
        warnings.warn(
            f"{len(attention)} nn.MultiheadAttention in the model, the first {attention[0]!r}: left alone, "
            "because it never calls its layers. Call vit.split_attention(model) first to adapt attention.",
            stacklevel=2,
        )
    inside = tuple(f"{name}." if name else "" for name in [*attention, *adapted])
    names = [
        name
        for name, m in modules.items()
        if name and not name.startswith(inside) and (isinstance(m, nn.Linear) or name in adapted)
    ]
    if targets == "all":
        found = {"all": [name for name in names if not (head and head in name)]}
    else:
        ends = targets.split(",") if isinstance(targets, str) else targets
        ends = [end.strip() for end in ends]
        found = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in ends}
    for target, matches in found.items():
        if not matches:
            there = ", ".join(names) or "none"
            raise ValueError(f"target {target!r} matches no nn.Linear; there are: {there}")
    chosen = [name for name in names if any(name in matches for matches in found.values())]
    if again := [name for name in chosen if name in adapted]:
        raise ValueError(
            f"{again[0]!r} is wrapped already ({len(again)} such layers): merge(model) first"
        )
    # A layer that stands at two places gets one adapter, which then stands at both.
    wrapped = {linear: wrap(linear) for linear in dict.fromkeys(modules[name] for name in chosen)}
    for name in chosen:
        model.set_submodule(name, wrapped[modules[name]])
    return chosen


def mark_trainable(
    model: nn.Module, head: str = "heads.head", bias: str = "none"
) -> tuple[int, int]:
    """Freeze the model but for adapters, head and biases; return (trainable, total) numbers of parameters.

    head: every parameter whose name contains it trains; "" for none.
    bias: "none", "all" (every bias of the model) or "adapter" (those of the wrapped layers).
    Raises ValueError for another bias.
    """
    if bias not in ("none", "all", "adapter"):
        raise ValueError(f"bias={bias!r}: expected none, all or adapter")
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "delta_weight"):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
            if bias == "adapter" and module.linear.bias is not None:
                module.linear.bias.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if (head and head in name) or (bias == "all" and name.endswith("bias")):
            parameter.requires_grad_(True)
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def merge(model: nn.Module) -> nn.Module:
    """Replace every adapter in the model by its merged nn.Linear, in place; return the model."""
    if hasattr(model, "delta_weight"):
        return model.merge()
    modules = dict(model.named_modules(remove_duplicate=False))
    adapters = {name: m for name, m in modules.items() if hasattr(m, "delta_weight")}
    # An adapter that stands at two places becomes one layer, which then stands at both.
    merged = {adapter: adapter.merge() for adapter in dict.fromkeys(adapters.values())}
    for name, adapter in adapters.items():
        model.set_submodule(name, merged[adapter])
    return model
