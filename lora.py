"""LoRA: a frozen linear layer plus a trained update of low rank.

    y = W x + b + s B A x          s = alpha / rank, so delta W = s B A

    W  (out, in)    the weight of the nn.Linear that LoRALinear wraps; frozen
    A  (rank, in)   lora_A: trained, starts random (kaiming_uniform, a = sqrt 5, as in nn.Linear)
    B  (out, rank)  lora_B: trained, starts at zero, so training starts from the frozen layer

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685, section 4.1.
The initialisation is PEFT's.

    from functools import partial
    replace_linear(model, partial(LoRALinear, rank=8, alpha=16), targets=["query", "value"])
    mark_trainable(model)  # the adapters and heads.head train, the rest is frozen
    ...                    # any training loop
    merge(model)           # plain nn.Linear layers again, with the update added to W
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt; it is kept, not copied. mark_trainable freezes it.
    rank, alpha: the update has rank `rank` and is scaled by alpha / rank.
    dropout: in training, the probability that an element of the update's input is set to zero.
    module_dropout: in training, the probability that one forward leaves out the whole update.
    Raises ValueError for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(self, linear: nn.Linear, rank=4, alpha=32.0, dropout=0.0, module_dropout=0.0):
        super().__init__()
        check_arguments(rank, dropout, module_dropout)
        self.linear, self.rank, self.scale = linear, rank, alpha / rank
        self.dropout, self.module_dropout = dropout, module_dropout
        self.lora_A = new_factor(linear, rank, linear.in_features)
        self.lora_B = new_factor(linear, linear.out_features, rank, zero=True)
        self.train(linear.training)

    def delta_weight(self) -> torch.Tensor:
        """delta W = s B A, shape (out_features, in_features)."""
        return (self.scale * self.lora_B) @ self.lora_A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = current_scale(self, x)  # self.scale, or 0 if module_dropout leaves out the update
        A, B = self.lora_A, s * self.lora_B
        if can_fuse(self):  # no dropout, no hook, no subclass: the same numbers, faster
            return fused(LoRAProduct.apply, self.linear, x, A, B)
        dropped = F.dropout(x, self.dropout, self.training)  # the frozen layer still gets all of x
        z = F.linear(dropped, A.to(x.dtype))  # (..., in) -> (..., rank)
        return self.linear(x) + F.linear(z, B.to(x.dtype))  # (..., out)

    def merge(self) -> nn.Linear:
        """A plain nn.Linear with weight W + delta_weight, in W's dtype; the sum is in the factors' dtype."""
        return merged_layer(self)

    # Some code treats this layer as an nn.Linear and reads these: diffusers' pipelines, for example.
    in_features = property(lambda self: self.linear.in_features)
    out_features = property(lambda self: self.linear.out_features)
    weight = property(lambda self: merged_weight(self))
    bias = property(lambda self: self.linear.bias)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


# How to put it into a model. From here to factor_gradient the text is the same in lora.py, loha.py and
# lokr.py, so that each file pastes alone. These functions know an adapter of any kind by its delta_weight.


def replace_linear(
    model: nn.Module, wrap, targets: str | list[str] = "all", head: str = "heads.head"
) -> list[str]:
    """Wrap nn.Linear layers of the model in place and return their dotted names.

    wrap: makes the adapter of an nn.Linear, for example partial(LoRALinear, rank=8).
    targets: "all" for every nn.Linear whose name does not contain head; or the ends of names:
        ["query", "mlp.0"], which is the same as "query,mlp.0".
    head: a part of the head's name: "all" skips the head. "" for a model without a head.

    Raises ValueError, with the model unchanged, if a target matches no layer, or an adapted one.
    Warns about nn.MultiheadAttention, which reads weights and never calls its layers.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    attention = [name for name, m in modules.items() if isinstance(m, nn.MultiheadAttention)]
    adapted = {name for name, m in modules.items() if hasattr(m, "delta_weight")}
    if attention:
        warnings.warn(
            f"{len(attention)} nn.MultiheadAttention (the first is {attention[0]!r}) stay unadapted: they "
            "never call their layers. For torchvision's ViT, call split_attention(model) of attention.py.",
            stacklevel=2,
        )
    # Layers inside an attention or an adapter are skipped. A name of "" is the model itself.
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
            known = ", ".join(names) or "none"
            raise ValueError(f"target {target!r} matches no nn.Linear; the model has: {known}")
    chosen = [name for name in names if any(name in matches for matches in found.values())]
    if again := [name for name in chosen if name in adapted]:
        raise ValueError(
            f"{again[0]!r} is wrapped already ({len(again)} such layers): merge(model) first"
        )
    # A shared layer, which has several names, gets one adapter under all of them.
    wrapped = {linear: wrap(linear) for linear in dict.fromkeys(modules[name] for name in chosen)}
    for name in chosen:
        model.set_submodule(name, wrapped[modules[name]])
    return chosen


def mark_trainable(
    model: nn.Module, head: str = "heads.head", bias: str = "none"
) -> tuple[int, int]:
    """Let adapters, head and biases train and freeze the rest; return (trainable, total) parameter counts.

    head: parameters with this in their name train; "" for none.
    bias: "none", "all" (every bias of the model) or "adapter" (the biases of wrapped layers).
    Raises ValueError for other values of bias.
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
    # A shared adapter becomes one shared layer.
    merged = {adapter: adapter.merge() for adapter in dict.fromkeys(adapters.values())}
    for name, adapter in adapters.items():
        model.set_submodule(name, merged[adapter])
    return model


def check_arguments(rank: int, dropout: float, module_dropout: float) -> None:
    """Raise ValueError for arguments that no adapter can have."""
    if rank < 1 or not 0 <= dropout < 1 or not 0 <= module_dropout < 1:
        raise ValueError(
            f"rank={rank}, dropout={dropout}, module_dropout={module_dropout}: "
            "expected rank >= 1 and both dropouts in [0, 1)"
        )


def new_factor(linear: nn.Linear, rows: int, columns: int, zero: bool = False) -> nn.Parameter:
    """A trained matrix (rows, columns) on linear's device: zero, or kaiming_uniform(a=sqrt 5).

    Its dtype is float32 or wider: AdamW and fp16 loss scaling need that, whatever linear's dtype is.
    """
    W = linear.weight
    dtype = torch.promote_types(W.dtype, torch.float32)
    factor = nn.Parameter(torch.zeros(rows, columns, dtype=dtype, device=W.device))
    return factor if zero else nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def current_scale(layer, x: torch.Tensor):
    """layer.scale; in training with module_dropout a tensor, which is 0 with that probability."""
    if not layer.training or layer.module_dropout == 0:
        return layer.scale
    # The update is multiplied by 0, not skipped: DistributedDataParallel expects every gradient.
    keep = torch.rand((), device=x.device) >= layer.module_dropout
    return layer.scale * keep.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def merged_layer(layer) -> nn.Linear:
    """The adapter as a plain nn.Linear: see its merge.

    Raises ValueError if the wrapped layer has a forward of its own or hooks on its forward: a merged layer
    would lose them.
    """
    linear = layer.linear
    own = type(linear).forward is not nn.Linear.forward or "forward" in vars(linear)
    if own or linear._forward_hooks or linear._forward_pre_hooks:
        raise ValueError(
            f"{linear} has {'a forward' if own else 'forward hooks'} of its own, which a merged layer "
            "would lose: remove that (for accelerate's: remove_hook_from_module), or do not merge"
        )
    W, bias = linear.weight, linear.bias
    out_features, in_features = W.shape
    merged = nn.utils.skip_init(
        nn.Linear, in_features, out_features, bias is not None, device=W.device, dtype=W.dtype
    )
    merged.weight.copy_(merged_weight(layer))
    if bias is not None:
        merged.bias.copy_(bias)
        merged.bias.requires_grad_(bias.requires_grad)
    merged.weight.requires_grad_(W.requires_grad)
    return merged.train(layer.training)


def merged_weight(layer) -> torch.Tensor:
    """W + delta_weight, in W's dtype. Also for code that reads a layer's weight instead of calling the layer,
    as nn.TransformerEncoderLayer does in eval mode."""
    W = layer.linear.weight
    with torch.autocast(W.device.type, enabled=False):
        return (W + layer.delta_weight()).to(W.dtype)  # summed in the factors' dtype, rounded once


# ---- The same numbers up to rounding, faster. Nothing below changes the method: you may stop here. ----


def can_fuse(layer) -> bool:
    """True if dropout is off and layer.linear does F.linear and nothing else: no subclass, no hook, no
    forward of its own, no quantised or meta weight."""
    if layer.training and layer.dropout > 0:
        return False
    linear = layer.linear
    hooks = (linear._forward_hooks, linear._forward_pre_hooks)
    hooks += (linear._backward_hooks, linear._backward_pre_hooks)
    usual = type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor)
    return usual and not (any(hooks) or "forward" in vars(linear) or linear.weight.is_meta)


def fused(product, linear: nn.Linear, x: torch.Tensor, *factors) -> torch.Tensor:
    """product(rows of x, W, b, *factors), in the type that linear(x) would be computed in.

    Rows and b come in that type, W in its own, so that W + delta W is rounded once.
    """
    device, rows = x.device.type, x.reshape(-1, x.shape[-1])
    W, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        rows, bias = (t if t is None else t.to(dtype) for t in (rows, bias))
    with torch.autocast(device, enabled=False):
        y, _ = product(rows, W, bias, *factors)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def factor_gradient(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """z^T x, (rank, n), for thin z (N, rank) and wide x (N, n)."""
    # In float32, BLAS is faster with z on the right if z has 16 columns or more (two cores of an AMD EPYC).
    return (x.T @ z).T if z.shape[1] >= 16 and z.element_size() >= 4 else z.T @ x


def kept(M, W) -> torch.Tensor:
    """M, the matrix that x is multiplied by, if its dtype is not W's (mixed precision): the frozen layer
    under autocast keeps such a copy too. Else an empty tensor: backward makes M again."""
    return M.new_empty(0) if M.dtype == W.dtype else M


def save(ctx, M, *tensors) -> None:
    """Keep M (the result of kept), if the gradient of x needs it, and the tensors for backward."""
    ctx.mark_non_differentiable(M)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(M if ctx.needs_input_grad[0] else M.new_empty(0), *tensors)


def usable(M) -> bool:
    """False if nothing was kept, or if the gradient is to be differentiated: M has no history."""
    return M.numel() > 0 and not torch.is_grad_enabled()


class LoRAProduct(torch.autograd.Function):
    """x W^T + b + x A^T B^T for rows x (N, in), with its own backward, which keeps x, W, the factors and
    what kept returns.

    There are two forms; lora_form picks the cheaper one for each layer and number of rows.
    Apart: x passes through A and then B. Beside the frozen layer's in * out multiplications, a row takes
    rank * (in + out): for rank 8 on 768 x 768, 2 % more. The result is added to y in place.
    Built: B A is added to W, and x is multiplied once; backward builds it again. With many rows, this is
    cheaper.
    The factors' gradients never need a matrix of W's size. The scale is in B.
    """

    # For torch.func.vmap (gradients of single samples). Factors that are batched alone (ensembles) and
    # forward mode (jvp) are not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, A, B):
        if lora_form(x, W) == "built":
            M = torch.addmm(W.to(A.dtype), B, A).to(x.dtype)
            return F.linear(x, M, bias), kept(M, W)
        M = W.to(x.dtype)
        z = F.linear(x, A.to(x.dtype))  # (N, rank)
        return F.linear(x, M, bias).addmm_(z, B.to(x.dtype).T), kept(M, W)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, W, _, A, B = inputs
        save(ctx, outputs[1], x, W, A, B)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:  # as gradcheck tries it
            return (None,) * 5
        M, x, W, A, B = ctx.saved_tensors
        of_x, of_W, of_bias = ctx.needs_input_grad[:3]
        with torch.autocast(g.device.type, enabled=False):
            # A copy of B in column order makes BLAS up to 1.6 times as fast.
            v = F.linear(g, B.to(x.dtype).T.contiguous())  # g B, (N, rank)
            gx = None
            if of_x:
                built = lora_form(x, W) == "built"
                if not usable(M):
                    M = (torch.addmm(W.to(A.dtype), B, A) if built else W).to(x.dtype)
                gx = g @ M if built else (g @ M).addmm_(v, A.to(x.dtype))
            z = F.linear(x, A.to(x.dtype))
            gW = g.T @ x if of_W else None
            gbias = g.sum(0) if of_bias else None
            return gx, gW, gbias, factor_gradient(v, x), factor_gradient(z, g).T


def lora_form(x, W) -> str:
    """The form with fewer memory accesses: "built" reads and writes matrices of W's size, "apart" passes once
    more over y and over x's gradient."""
    n_out, n_in = W.shape
    return "built" if 2 * n_out * n_in <= len(x) * (n_out + n_in) else "apart"
