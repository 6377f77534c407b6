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

Cost: a row x, seen as a matrix X (in_m, in_n), gives W1 X W2^T, a matrix (out_l, out_k) whose rows, one
behind the other, are x kron(W1, W2)^T: for rank 8 on 768 x 768, 16,896 multiplications for each row where
the frozen layer takes 589,824. With many rows it costs less still to add kron(W1, W2) to W, one
multiplication for each element: lokr_costs weighs the two. The factors' gradients always go the first way,
and delta W is not kept. With dropout on, or where the frozen layer is not a plain one, delta runs instead,
and autograd keeps what it needs.

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
    dropout: probability, in training, that an element of the adapter's input is zeroed.
    module_dropout: probability, in training, that the whole update is left out of one forward.

    factor: the wanted number of W1's rows and columns, or of W2's if that is the larger; -1 for both near
        the square root (factorization).
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
        self.train(linear.training)

    def factors(self, keep=None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """s W1 (out_l, in_m), W2a (out_k, rank) and W2b (rank, in_n): the one place where the scale enters.
        A whole W2 is W2b, and W2a is None. keep: a scalar tensor, 0 for no update, 1 or None for all of it.
        """
        W1 = self.lokr_w1 if hasattr(self, "lokr_w1") else self.lokr_w1_a @ self.lokr_w1_b
        whole = hasattr(self, "lokr_w2")
        W2a, W2b = (None, self.lokr_w2) if whole else (self.lokr_w2_a, self.lokr_w2_b)
        W1 = self.scale * W1
        return W1 if keep is None else keep * W1, W2a, W2b

    def delta_weight(self) -> torch.Tensor:
        """delta W = s kron(W1, W2), shape (out_features, in_features)."""
        return kron(*self.factors())

    def delta(self, x: torch.Tensor, W1, W2a, W2b) -> torch.Tensor:
        """x @ delta_weight().T without building delta_weight: (..., in) -> (..., out)."""
        W1, W2 = W1.to(x.dtype), (W2b if W2a is None else W2a @ W2b).to(x.dtype)
        X = x.unflatten(-1, (W1.shape[1], W2.shape[1]))  # (..., in_m, in_n)
        return (W1 @ (X @ W2.T)).flatten(-2)  # (..., out_l, out_k) -> (..., out)

    def product(self, x, W, bias, W1, W2a, W2b) -> torch.Tensor:
        """F.linear(x, W, bias) + self.delta(x, ...) for rows x (N, in): equal up to rounding, faster."""
        return LoKrProduct.apply(x, W, bias, W1, W2a, W2b)

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


class LoKrProduct(torch.autograd.Function):
    """x (W + kron(W1, W2))^T + b for rows x (N, in), with a backward of its own, which keeps x alone.

    Built form: kron(W1, W2) is added to W, so that x needs one product; in backward again. Apart: x
    passes through W2b, W1 and W2a. lokr_form says which is cheaper. The factors' gradients never need
    kron. W2 = W2a W2b; a whole W2 is W2b here, and W2a None stands for the identity, of rank out_k.
    """

    # Lets torch.func.vmap through, for gradients sample by sample; forward mode (jvp) is not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, W1, W2a, W2b):
        if lokr_form(x, W, W1, W2b) == "built":
            return F.linear(x, kron(W1, W2a, W2b).to(x.dtype).add_(W), bias)
        W1, W2a, W2b = (None if t is None else t.to(x.dtype) for t in (W1, W2a, W2b))
        N, (out_l, in_m), (rank, in_n) = len(x), W1.shape, W2b.shape
        # W1 mixes blocks: swap puts their axis in front of N, so that this too is a product of flat matrices
        q = swap(F.linear(x.reshape(N, in_m, in_n), W2b))  # (in_m, N, rank)
        u = (W1 @ q.reshape(in_m, N * rank)).reshape(out_l, N, rank)
        u = swap(u).reshape(N * out_l, rank)
        y = F.linear(x, W, bias)
        blocks = y.reshape(N * out_l, y.shape[1] // out_l)
        blocks = blocks.add_(u) if W2a is None else blocks.addmm_(u, W2a.T)
        return blocks.reshape(y.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _, *factors = inputs
        ctx.save_for_backward(x, W, *factors)

    @staticmethod
    def backward(ctx, g):
        x, W, *factors = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            gx, gradients = lokr_backward(g, x, W, *factors, ctx.needs_input_grad[0])
            gW = g.T @ x if ctx.needs_input_grad[1] else None
            return gx, gW, g.sum(0) if ctx.needs_input_grad[2] else None, *gradients


def lokr_backward(g, x, W, W1, W2a, W2b, of_x: bool) -> tuple:
    """The gradient of x, None unless of_x, and those of the three factors, from g (N, out).

    p is g through W2a, q is x through W2b; W1 takes them as in forward, with the blocks' axis in front.
    """
    gx = None
    if built := lokr_form(x, W, W1, W2b) == "built":
        gx = g @ kron(W1, W2a, W2b).to(x.dtype).add_(W) if of_x else None
    W1, W2a, W2b = (None if t is None else t.to(x.dtype) for t in (W1, W2a, W2b))
    N, (out_l, in_m), (rank, in_n) = len(x), W1.shape, W2b.shape
    out_k = g.shape[1] // out_l
    X, G = x.reshape(N * in_m, in_n), g.reshape(N * out_l, out_k)
    # G W2a, (N out_l, rank), with W2a's copy by columns: BLAS is faster with it
    p = G if W2a is None else F.linear(G, W2a.T.contiguous())
    p = swap(p.reshape(N, out_l, rank)).reshape(out_l, N * rank)
    q = swap(F.linear(X, W2b).reshape(N, in_m, rank)).reshape(in_m, N * rank)
    gW1 = p @ q.T
    gW2a = None
    if W2a is not None:
        u = swap((W1 @ q).reshape(out_l, N, rank)).reshape(N * out_l, rank)
        gW2a = factor_gradient(u, G).T
        del u
    del q  # t can have its memory
    t = swap((W1.T @ p).reshape(in_m, N, rank)).reshape(N * in_m, rank)
    if of_x and not built:
        gx = (g @ W).reshape(N * in_m, in_n).addmm_(t, W2b).reshape(x.shape)
    return gx, (gW1, gW2a, factor_gradient(t, X))


def swap(x: torch.Tensor) -> torch.Tensor:
    """(N, m, n) -> (m, N, n), as a copy in that order."""
    return x.transpose(0, 1).contiguous()


def kron(W1, W2a, W2b) -> torch.Tensor:
    """kron(W1, W2a W2b), (out, in). The scale is in W1 already."""
    return torch.kron(W1, W2b if W2a is None else W2a @ W2b)


# To read or write a number in memory takes about as long as so many multiplications within a large product
# (on two cores of an AMD EPYC).
TOUCH = 16


def lokr_costs(N: int, n_out: int, n_in: int, W1_size: int, rank: int, touch: int = TOUCH) -> tuple:
    """Multiplications for N rows, forward and x's gradient together, as (built, apart). The frozen layer's
    own and those for the factors' gradients, alike in both, are left out.

    rank: W2's inner dimension. touch: what one number read or written counts for, 0 to leave memory out.
    """
    built = 2 * n_out * n_in * (1 + touch)
    apart = N * (rank * (2 * n_in + n_out + W1_size) + touch * (2 * n_in + n_out))
    return built, apart


def lokr_form(x, W, W1, W2b) -> str:
    """built or apart, the cheaper. In half precision W + kron would round off what kron adds: apart."""
    built, apart = lokr_costs(len(x), *W.shape, W1.numel(), len(W2b))
    return "built" if built <= apart and torch.finfo(x.dtype).bits >= 32 else "apart"


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
