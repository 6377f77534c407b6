"""LoKr (KronA): a frozen linear layer plus the Kronecker product of two small trained matrices.

    y = W x + b + delta W x        s = alpha / rank
    delta W = s kron(W1, W2)       block (i, j) of delta W is s W1[i, j] W2

    W   (out, in)      the weight of the nn.Linear that LoKrLinear wraps; frozen
    W1  (out_l, in_m)  lokr_w1: trained, starts at zero, so training starts from the frozen layer
    W2  (out_k, in_n)  lokr_w2: trained, starts random (kaiming_uniform, a = sqrt 5)
    out = out_l * out_k, in = in_m * in_n: see factorization.
    If rank < max(out_k, in_n) / 2, W2 is a product: lokr_w2_a (out_k, rank) @ lokr_w2_b (rank, in_n).

Edalati et al., KronA, 2022, arXiv 2212.10650; Yeh et al., LyCORIS, 2023, arXiv 2309.14859. The
initialisation is PEFT's.

    from functools import partial
    replace_linear(model, partial(LoKrLinear, rank=8, alpha=8), targets=["query", "value"])
    mark_trainable(model)  # the adapters and heads.head train, the rest is frozen
    ...                    # any training loop
    merge(model)           # plain nn.Linear layers again, with the update added to W
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoKrLinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt; it is kept, not copied. mark_trainable freezes it.
    rank, alpha: W2 has rank `rank` where it is a product; the update is scaled by alpha / rank.
    dropout: in training, the probability that an element of the update's input is set to zero.
    module_dropout: in training, the probability that one forward leaves out the whole update.
    factor: the wanted rows and columns of W1 (of W2, if above the square root): see factorization.
    decompose_both: W1 is a product too, if rank < max(out_l, in_m) / 2.
    Raises ValueError for a rank below 1 or a dropout outside [0, 1).
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank=4,
        alpha=32.0,
        dropout=0.0,
        module_dropout=0.0,
        factor=-1,
        decompose_both=False,
    ):
        super().__init__()
        check_arguments(rank, dropout, module_dropout)
        self.linear, self.rank, self.scale = linear, rank, alpha / rank
        self.dropout, self.module_dropout = dropout, module_dropout
        out_l, out_k = factorization(linear.out_features, factor)
        in_m, in_n = factorization(linear.in_features, factor)
        add_matrix(self, "lokr_w1", out_l, in_m, rank if decompose_both else math.inf, zero=True)
        add_matrix(self, "lokr_w2", out_k, in_n, rank)
        self.train(linear.training)

    def delta_weight(self) -> torch.Tensor:
        """delta W = s kron(W1, W2), shape (out_features, in_features)."""
        return torch.kron(self.scale * matrix(self, "lokr_w1"), matrix(self, "lokr_w2"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = current_scale(self, x)  # self.scale, or 0 if module_dropout leaves out the update
        W1 = s * matrix(self, "lokr_w1")
        if can_fuse(self):  # no dropout, no hook, no subclass: the same numbers, faster
            return fused(LoKrProduct.apply, self.linear, x, W1, *w2_factors(self))
        W1, W2 = W1.to(x.dtype), matrix(self, "lokr_w2").to(x.dtype)
        dropped = F.dropout(x, self.dropout, self.training)  # the frozen layer still gets all of x
        X = dropped.unflatten(-1, (W1.shape[1], W2.shape[1]))  # (..., in) -> (..., in_m, in_n)
        return self.linear(x) + (W1 @ (X @ W2.T)).flatten(-2)  # (..., out_l, out_k) -> (..., out)

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


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Split dimension into (side of W1, side of W2), whose product is dimension.

    If factor > 0 divides dimension: factor and the quotient, the smaller first. Otherwise the first is the
    largest divisor up to the square root, and up to factor (-1: no limit). The rule is LyCORIS':
    factorization(768) == (24, 32).
    factor < -1 is PEFT's rule, which does not sort: factorization(768, -32) == (32, 24).
    """
    side = abs(factor)
    if factor not in (-1, 0) and dimension % side == 0:
        sides = side, dimension // side
        return sides if factor < 0 else (min(sides), max(sides))
    limit = math.isqrt(dimension) if factor == -1 else min(side, math.isqrt(dimension))
    small = next((d for d in range(limit, 1, -1) if dimension % d == 0), 1)
    return small, dimension // small


def add_matrix(layer, name: str, rows: int, columns: int, rank: float, zero: bool = False) -> None:
    """Give the layer the parameter `name` (rows, columns); or, if rank < max(rows, columns) / 2, its two
    factors `name`_a (rows, rank) and `name`_b (rank, columns). zero: the matrix starts at zero.
    rank: math.inf for one matrix in any case."""
    if rank < max(rows, columns) / 2:
        layer.register_parameter(f"{name}_a", new_factor(layer.linear, rows, rank, zero))
        layer.register_parameter(f"{name}_b", new_factor(layer.linear, rank, columns))
    else:
        layer.register_parameter(name, new_factor(layer.linear, rows, columns, zero))


def matrix(layer, name: str) -> torch.Tensor:
    """The matrix that add_matrix made: one parameter, or the product of its two factors."""
    if hasattr(layer, name):
        return getattr(layer, name)
    return getattr(layer, f"{name}_a") @ getattr(layer, f"{name}_b")


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


def w2_factors(layer) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(W2a, W2b); (None, W2) if W2 is one matrix."""
    if hasattr(layer, "lokr_w2"):
        return None, layer.lokr_w2
    return layer.lokr_w2_a, layer.lokr_w2_b


class LoKrProduct(torch.autograd.Function):
    """x (W + kron(W1, W2))^T + b for rows x (N, in), with its own backward, which keeps x, W, the factors
    and what kept returns.

    There are two forms; lokr_form picks the cheaper one for each layer and number of rows.
    Apart: kron(W1, W2) vec(X) = vec(W1 X W2^T) for a row x as a matrix X (in_m, in_n), where vec reads row by
    row. So x passes through W2b, W1 and W2a: for rank 8 on 768 x 768, 16,896 multiplications a row, where the
    frozen layer takes 589,824.
    Built: kron(W1, W2) takes one multiplication an element. It is added to W, and x is multiplied once;
    backward builds it again. With many rows, this is cheaper.
    The factors' gradients never need kron. The scale is in W1. W2 = W2a W2b; if W2 is one matrix, it is W2b
    here, and W2a is None.
    """

    # For torch.func.vmap (gradients of single samples). Factors that are batched alone (ensembles) and
    # forward mode (jvp) are not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, W1, W2a, W2b):
        if lokr_form(x, W, W1, W2b) == "built":
            M = kron(W1, W2a, W2b).add_(W).to(x.dtype)
            return F.linear(x, M, bias), kept(M, W)
        W1, W2a, W2b = (None if t is None else t.to(x.dtype) for t in (W1, W2a, W2b))
        N, (out_l, in_m), (rank, in_n) = len(x), W1.shape, W2b.shape
        # W1 mixes blocks. With their axis first, W1 @ q is one product of two matrices.
        q = swap(F.linear(x.reshape(N, in_m, in_n), W2b))  # (in_m, N, rank)
        u = (W1 @ q.reshape(in_m, N * rank)).reshape(out_l, N, rank)
        u = swap(u).reshape(N * out_l, rank)
        M = W.to(x.dtype)
        y = F.linear(x, M, bias)
        blocks = y.view(N * out_l, y.shape[1] // out_l)  # y itself is returned: views refuse relu_
        blocks.add_(u) if W2a is None else blocks.addmm_(u, W2a.T)
        return y, kept(M, W)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, W, _, *factors = inputs
        save(ctx, outputs[1], x, W, *factors)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:  # as gradcheck tries it
            return (None,) * 6
        M, x, W, *factors = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            gx, gradients = lokr_backward(g, x, W, M, *factors, ctx.needs_input_grad[0])
            gW = g.T @ x if ctx.needs_input_grad[1] else None
            return gx, gW, g.sum(0) if ctx.needs_input_grad[2] else None, *gradients


def lokr_backward(g, x, W, M, W1, W2a, W2b, of_x: bool) -> tuple:
    """The gradient of x (None unless of_x) and of the three factors, from g (N, out).

    p is g W2a and q is x W2b^T, both with the blocks' axis first, as W1 takes them in forward.
    """
    built = lokr_form(x, W, W1, W2b) == "built"
    if of_x and not usable(M):
        M = (kron(W1, W2a, W2b).add_(W) if built else W).to(x.dtype)
    gx = g @ M if of_x else None
    del M  # if it was built here, what follows can use its memory
    W1, W2a, W2b = (None if t is None else t.to(x.dtype) for t in (W1, W2a, W2b))
    N, (out_l, in_m), (rank, in_n) = len(x), W1.shape, W2b.shape
    out_k = g.shape[1] // out_l
    X, G = x.reshape(N * in_m, in_n), g.reshape(N * out_l, out_k)
    # G W2a, (N out_l, rank), with W2a copied column by column: BLAS is faster with it
    p = G if W2a is None else F.linear(G, W2a.T.contiguous())
    p = swap(p.reshape(N, out_l, rank)).reshape(out_l, N * rank)
    q = swap(F.linear(X, W2b).reshape(N, in_m, rank)).reshape(in_m, N * rank)
    gW1 = p @ q.T
    gW2a = None
    if W2a is not None:
        u = swap((W1 @ q).reshape(out_l, N, rank)).reshape(N * out_l, rank)
        gW2a = factor_gradient(u, G).T
        del u
    del q  # t can use its memory
    t = swap((W1.T @ p).reshape(in_m, N, rank)).reshape(N * in_m, rank)
    if of_x and not built:
        gx = gx.reshape(N * in_m, in_n).addmm_(t, W2b).reshape(x.shape)
    return gx, (gW1, gW2a, factor_gradient(t, X))


def swap(x: torch.Tensor) -> torch.Tensor:
    """(N, m, n) -> (m, N, n), copied into that order."""
    return x.transpose(0, 1).contiguous()


def kron(W1, W2a, W2b) -> torch.Tensor:
    """kron(W1, W2a W2b), (out, in)."""
    return torch.kron(W1, W2b if W2a is None else W2a @ W2b)


# One memory access takes as long as TOUCH multiplications of a large matrix product. In half precision such a
# product is faster, and all else, in float32, counts HALF times as much (on two cores of an AMD EPYC).
TOUCH, HALF = 16, 4


def lokr_costs(
    N: int, n_out: int, n_in: int, W1_size: int, rank: int, half: bool, touch: int = TOUCH
) -> tuple:
    """Multiplications for N rows as (built, apart), for forward and x's gradient together. Both forms need
    those of the frozen layer and of the factors' gradients too: they are left out.

    rank: W2's inner dimension. half: whether x is in half precision. touch: how many multiplications one
    memory access counts as; 0 leaves memory out.
    """
    slow = HALF if half else 1
    built = 2 * n_out * n_in * (1 + touch) * slow
    apart = N * (rank * (2 * n_in + n_out + W1_size) + touch * slow * (2 * n_in + n_out))
    return built, apart


def lokr_form(x, W, W1, W2b) -> str:
    """The cheaper form, "built" or "apart"."""
    half = torch.finfo(x.dtype).bits < 32
    built, apart = lokr_costs(len(x), *W.shape, W1.numel(), len(W2b), half)
    return "built" if built <= apart else "apart"
