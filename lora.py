"""LoRA: a frozen linear layer plus a trained update of low rank.

    y = W x + b + s B A x          s = alpha / rank
    delta W = s B A

    W  (out, in)     frozen: the nn.Linear that LoRALinear wraps
    A  (rank, in)    lora_A, trained, kaiming_uniform(a=sqrt 5) at the start
    B  (out, rank)   lora_B, trained, zero at the start: the first forward is the frozen layer's

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685, section 4.1.
Initialisation: the paper's zero B with PEFT's A, which is nn.Linear's own.

Cost: x passes through A and then B, so delta W is never built. That is rank * (in + out) multiplications
for each row of x, beside the in * out that the frozen layer takes: 2 % for rank 8 on 768 x 768, and 4 % of
its backward. Moving the numbers takes time as well, so LoRAProduct adds the update in place, into the
frozen layer's output; for backward it keeps x and x A^T (rank numbers a row). With dropout on, or where
the frozen layer is not a plain one, the two lines of delta run instead, and autograd keeps what they need.

    from functools import partial
    replace_linear(model, partial(LoRALinear, rank=8, alpha=16), targets=["query", "value"])
    mark_trainable(model)                      # adapters and heads.head train, the rest is frozen
    ...                                        # any training loop
    merge(model)                               # plain nn.Linear again, the update added in
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt. It is kept, not copied, and frozen by mark_trainable.
    rank: inner dimension of the update, 1 or more.
    alpha: the update is scaled by alpha / rank.
    dropout: probability, in training, that an element of the adapter's input is zeroed.
    module_dropout: probability, in training, that the whole update is left out of one forward.

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
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **new))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **new))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(linear.training)

    def factors(self, keep=None) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and s B (out, rank): the one place where the scale enters.
        keep: a scalar tensor, 0 for no update, 1 or None for all of it."""
        B = self.scale * self.lora_B
        return self.lora_A, B if keep is None else keep * B

    def delta_weight(self) -> torch.Tensor:
        """delta W = s B A, shape (out_features, in_features)."""
        A, B = self.factors()
        return B @ A

    def delta(self, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """x @ delta_weight().T without building delta_weight: (..., in) -> (..., out)."""
        z = F.linear(x, A.to(x.dtype))  # (..., in) -> (..., rank)
        return F.linear(z, B.to(x.dtype))  # (..., out)

    def product(self, x, W, bias, A, B) -> torch.Tensor:
        """F.linear(x, W, bias) + self.delta(x, A, B) for rows x (N, in): equal up to rounding, faster."""
        return LoRAProduct.apply(x, W, bias, A, B)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = None
        if self.training and self.module_dropout > 0:
            # Times 0 or 1, not skipped: DistributedDataParallel wants a gradient of every parameter.
            keep = torch.rand((), device=x.device) >= self.module_dropout
        factors = self.factors(keep)
        if (self.training and self.dropout > 0) or not is_plain(self.linear):
            return self.linear(x) + self.delta(F.dropout(x, self.dropout, self.training), *factors)
        return fused(self.product, self.linear, x, factors)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A new nn.Linear with weight W + delta_weight, added in float32 or wider and cast back once.

        Raises ValueError where linear has a forward or forward hooks of its own: they would be lost.
        """
        linear = self.linear
        own = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
        if own or linear._forward_hooks:
            raise ValueError(
                f"{linear} has {'a forward' if own else 'forward hooks'} of its own, which a merged layer "
                "would not have: take it off (accelerate's by remove_hook_from_module) or keep the adapter"
            )
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


class LoRAProduct(torch.autograd.Function):
    """x W^T + b + x A^T B^T for rows x (N, in), with a backward of its own, which keeps x and x A^T.

    The two parts of y, and of x's gradient, are added in place.
    """

    # Lets torch.func.vmap through, for gradients sample by sample; forward mode (jvp) is not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, A, B):
        y = F.linear(x, W, bias)
        z = F.linear(x, A.to(x.dtype))  # (N, rank)
        return y.addmm_(z, B.to(x.dtype).T), z

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, W, _, A, B = inputs
        ctx.save_for_backward(x, W, A, B, outputs[1])

    @staticmethod
    def backward(ctx, gy, gz):  # gz is zero, but in a double backward
        x, W, A, B, z = ctx.saved_tensors
        of_x, of_W, of_bias = ctx.needs_input_grad[:3]
        with torch.autocast(gy.device.type, enabled=False):
            # gy B, with B's copy by columns: BLAS is up to 1.6 times as fast with it
            gz = F.linear(gy, B.to(x.dtype).T.contiguous()).add_(gz)  # (N, rank)
            gx = (gy @ W).addmm_(gz, A.to(x.dtype)) if of_x else None
            gW = gy.T @ x if of_W else None
            gbias = gy.sum(0) if of_bias else None
            return gx, gW, gbias, factor_gradient(gz, x), factor_gradient(z, gy).T


# The functions below stand word for word in lora.py, loha.py and lokr.py, so that each file pastes alone.
# They know an adapter of any kind by its delta_weight.


def is_plain(linear: nn.Module) -> bool:
    """True if calling linear is F.linear and nothing else: no subclass, no hook or forward of its own, no
    quantised or meta weight."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)
    hooks += (linear._backward_hooks, linear._backward_pre_hooks)
    usual = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)
    return usual and not (any(hooks) or "forward" in vars(linear) or linear.weight.is_meta)


def fused(product, linear: nn.Linear, x: torch.Tensor, factors: tuple) -> torch.Tensor:
    """product(rows of x, W, b, *factors), in the type that linear(x) would be computed in."""
    device, rows = x.device.type, x.reshape(-1, x.shape[-1])
    W, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        rows, W, bias = (t if t is None else t.to(dtype) for t in (rows, W, bias))
    with torch.autocast(device, enabled=False):
        y = product(rows, W, bias, *factors)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def factor_gradient(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """z^T x, (rank, n), for thin z (N, rank) and wide x (N, n)."""
    # Matrix libraries (BLAS) are faster with z on the right if it has 16 columns or more, and on the left if
    # it has fewer (on two cores of an AMD EPYC).
    return (x.T @ z).T if z.shape[1] >= 16 else z.T @ x


def replace_linear(
    model: nn.Module, wrap, targets: str | list[str] = "all", head: str = "heads.head"
) -> list[str]:
    """Wrap nn.Linear layers of the model in place and return their dotted names.

    wrap: called with each nn.Linear, returns its adapter: partial(LoRALinear, rank=8), or LoHa's, LoKr's.
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
            "because it never calls its layers. Call attention.split_attention(model) first, if the model is "
            "a ViT of torchvision's.",
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
        ends = [end.strip() for end in ends] or [""]
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
