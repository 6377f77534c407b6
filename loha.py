"""LoHa: a frozen linear layer plus the elementwise product of two trained low-rank matrices.

    y = W x + b + delta W x        s = alpha / rank
    delta W = s (W1a W1b) * (W2a W2b)          * is elementwise

    W         (out, in)    the weight of the nn.Linear that LoHaLinear wraps; frozen
    W1a, W2a  (out, rank)  hada_w1_a, hada_w2_a: trained, start random (kaiming_uniform, a = sqrt 5)
    W1b, W2b  (rank, in)   hada_w1_b: starts random; hada_w2_b: starts at zero, and so does delta W

Hyeon-Woo et al., FedPara, 2021, arXiv 2108.06098; Yeh et al., LyCORIS, 2023, arXiv 2309.14859. The
initialisation is PEFT's. With r = rank, delta W can reach rank r^2, and LoRA of equal size 2 r.

    from functools import partial
    replace_linear(model, partial(LoHaLinear, rank=8, alpha=16), targets=["query", "value"])
    mark_trainable(model)  # the adapters and heads.head train, the rest is frozen
    ...                    # any training loop
    merge(model)           # plain nn.Linear layers again, with the update added to W
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoHaLinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt; it is kept, not copied. mark_trainable freezes it.
    rank, alpha: both products have rank `rank`; the update is scaled by alpha / rank.
    dropout: in training, the probability that an element of the update's input is set to zero.
    module_dropout: in training, the probability that one forward leaves out the whole update.
    Raises ValueError for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(self, linear: nn.Linear, rank=4, alpha=32.0, dropout=0.0, module_dropout=0.0):
        super().__init__()
        check_arguments(rank, dropout, module_dropout)
        self.linear, self.rank, self.scale = linear, rank, alpha / rank
        self.dropout, self.module_dropout = dropout, module_dropout
        self.hada_w1_a = new_factor(linear, linear.out_features, rank)
        self.hada_w1_b = new_factor(linear, rank, linear.in_features)
        self.hada_w2_a = new_factor(linear, linear.out_features, rank)
        self.hada_w2_b = new_factor(linear, rank, linear.in_features, zero=True)
        self.train(linear.training)

    def delta_weight(self) -> torch.Tensor:
        """delta W = s (W1a W1b) * (W2a W2b), shape (out_features, in_features)."""
        return (self.hada_w1_a @ self.hada_w1_b) * (self.scale * self.hada_w2_a @ self.hada_w2_b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = current_scale(self, x)  # self.scale, or 0 if module_dropout leaves out the update
        W1a, W1b, W2a, W2b = self.hada_w1_a, self.hada_w1_b, s * self.hada_w2_a, self.hada_w2_b
        if can_fuse(self):  # no dropout, no hook, no subclass: the same numbers, faster
            return fused(LoHaProduct.apply, self.linear, x, W1a, W1b, W2a, W2b)
        dropped = F.dropout(x, self.dropout, self.training)  # the frozen layer still gets all of x
        return self.linear(x) + F.linear(dropped, ((W1a @ W1b) * (W2a @ W2b)).to(x.dtype))

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


class LoHaProduct(torch.autograd.Function):
    """x (W + delta W)^T + b for rows x (N, in), with its own backward, which keeps x, W, the factors and
    what kept returns.

    There are two forms; loha_forms picks the cheaper one for each layer and number of rows.
    Whole: delta W is built and added to W, and x is multiplied once. That takes 2 * rank multiplications for
    each element of W, however many rows x has; backward builds delta W again, to save memory.
    Thin: the elementwise product of two matrices of rank r is a matrix of rank r^2 or less, B^T A. A
    (rank^2, in) has the products of each row of W1b with each row of W2b, B (rank^2, out) those of the
    columns of W1a and W2a (khatri_rao). x passes through both as in LoRA: rank^2 * (in + out)
    multiplications a row.
    The factors' gradients take twice that in the thin form (17 % of the frozen layer's forward and backward
    for rank 8 on 768 x 768), and about in * out a row in the whole form (50 %).
    """

    # For torch.func.vmap (gradients of single samples). Factors that are batched alone (ensembles) and
    # forward mode (jvp) are not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, W1a, W1b, W2a, W2b):
        if loha_forms(x, W, W1b)[0] == "thin":
            A, B = khatri_rao(W1b, W2b, x.dtype), khatri_rao(W1a.T, W2a.T, x.dtype)
            M = W.to(x.dtype)
            return F.linear(x, M, bias).addmm_(F.linear(x, A), B), kept(M, W)
        M = (W1a @ W1b).mul_(W2a @ W2b).add_(W).to(x.dtype)
        return F.linear(x, M, bias), kept(M, W)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, W, _, *factors = inputs
        save(ctx, outputs[1], x, W, *factors)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:  # as gradcheck tries it
            return (None,) * 7
        M, x, W, *factors = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            gx, gradients = loha_backward(g, x, W, M, *factors, ctx.needs_input_grad[0])
            gW = g.T @ x if ctx.needs_input_grad[1] else None
            return gx, gW, g.sum(0) if ctx.needs_input_grad[2] else None, *gradients


def loha_backward(g, x, W, M, W1a, W1b, W2a, W2b, of_x: bool) -> tuple:
    """The gradient of x (None unless of_x) and of the four factors, from g (N, out)."""
    form, gradients_form = loha_forms(x, W, W1b)
    build = of_x and not usable(M)
    if (of_x and form == "thin") or gradients_form == "thin":
        A, B = khatri_rao(W1b, W2b, x.dtype), khatri_rao(W1a.T, W2a.T, x.dtype)
        v = F.linear(g, B)  # (N, rank^2)
    if (build and form == "whole") or gradients_form == "whole":
        D1, D2 = W1a @ W1b, W2a @ W2b  # delta W = D1 * D2
    if build:
        M = ((D1 * D2).add_(W) if form == "whole" else W).to(x.dtype)
    gx = g @ M if of_x else None
    del M  # if it was built here, what follows can use its memory
    if of_x and form == "thin":
        gx.addmm_(v, A)
    if gradients_form == "thin":
        gW1b, gW2b = khatri_rao_backward(factor_gradient(v, x), W1b, W2b)
        largest = 1.0
        # While W2b is small, A would be below float16's smallest number.
        if x.dtype == torch.float16:
            largest = W2b.detach().abs().amax().clamp(min=1e-30)
            A = khatri_rao(W1b, W2b / largest, x.dtype)
        gW1a, gW2a = khatri_rao_backward(factor_gradient(F.linear(x, A), g), W1a.T, W2a.T)
        return gx, (largest * gW1a.T, gW1b, largest * gW2a.T, gW2b)
    G = (g.T @ x).to(W1a.dtype)  # the gradient of delta W
    of_D1 = G * D2
    gW1a, gW1b = F.linear(of_D1, W1b), factor_gradient(W1a, of_D1)
    del of_D1, D2
    of_D2 = G * D1
    return gx, (gW1a, gW1b, F.linear(of_D2, W2b), factor_gradient(W2a, of_D2))


def khatri_rao(first, second, dtype) -> torch.Tensor:
    """The product of each row of first with each row of second: (rank, n), (rank, n) -> (rank^2, n)."""
    return (first.contiguous()[:, None] * second.contiguous()).flatten(0, 1).to(dtype)


def khatri_rao_backward(g, first, second) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of first and second from g, the gradient of khatri_rao(first, second)."""
    g = g.to(first.dtype).unflatten(0, (len(first), len(second)))  # (rank, rank, n)
    return (g * second).sum(1), (g * first[:, None]).sum(0)


# One memory access takes as long as TOUCH multiplications of a large matrix product. In half precision such a
# product is faster, and all else, in float32, counts HALF times as much (on two cores of an AMD EPYC).
TOUCH, HALF = 16, 4


def loha_costs(N: int, n_out: int, n_in: int, rank: int, half: bool, touch: int = TOUCH) -> tuple:
    """Multiplications for N rows, without the frozen layer's own, as two pairs (whole, thin): one for
    the forward (x's gradient costs the same), one for the factors' gradients.

    half: whether x is in half precision. touch: how many multiplications one memory access counts as; 0
    leaves memory out. Work that both pairs share is counted twice.
    """
    slow = HALF if half else 1
    whole = n_out * n_in * (2 * rank + 4 * touch) * slow  # D1, D2, their product, the sum
    thin = N * (n_out + n_in) * (rank**2 + touch * slow)
    # G; D1, D2 and their gradients; the factors' gradients
    whole_gradients = n_out * n_in * (N + (6 * rank + 8 * touch) * slow)
    return (whole, thin), (whole_gradients, 2 * thin)


def loha_forms(x, W, W1b) -> list[str]:
    """The cheaper form, "whole" or "thin", for the forward and for the factors' gradients."""
    half = torch.finfo(x.dtype).bits < 32
    costs = loha_costs(len(x), *W.shape, len(W1b), half)
    return ["whole" if whole <= thin else "thin" for whole, thin in costs]
