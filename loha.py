"""LoHa: a frozen linear layer plus the elementwise product of two trained low-rank updates.

    y = W x + b + delta W x        s = alpha / rank
    delta W = s (W1a W1b) * (W2a W2b)          * is elementwise

    W         (out, in)     frozen: the nn.Linear that LoHaLinear wraps
    W1a, W2a  (out, rank)   hada_w1_a, hada_w2_a, trained
    W1b, W2b  (rank, in)    hada_w1_b, hada_w2_b, trained
    At the start W2b is zero, so that the first forward is the frozen layer's; the other three are
    kaiming_uniform(a=sqrt 5).

Hyeon-Woo et al., FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning,
2021, arXiv 2108.06098, section 2.2; Yeh et al., Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation, 2023, arXiv 2309.14859. Initialisation: PEFT's.

The elementwise product of two matrices of rank r has a rank of up to r^2. LoRA of rank 2 r trains as many
numbers, and its update has a rank of at most 2 r.

Cost: there are two forms. Whole: delta W is built, 2 * rank multiplications for each element of W whatever
the number of rows of x, and added to W; backward builds it once more rather than keep it. Thin: x passes
through two matrices of rank^2, rank^2 (in + out) multiplications for each row. The factors' gradients take
that twice, 17 % of the frozen layer's forward and backward for rank 8 on 768 x 768, or in * out once
(50 %) where that is less. loha_costs weighs the forms for each layer and number of rows. With dropout on,
or where the frozen layer is not a plain one, delta runs instead, and autograd keeps what it needs.

    from functools import partial
    replace_linear(model, partial(LoHaLinear, rank=8, alpha=16), targets=["query", "value"])
    mark_trainable(model)                      # adapters and heads.head train, the rest is frozen
    ...                                        # any training loop
    merge(model)                               # plain nn.Linear again, the update added in
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LoHaLinear(nn.Module):
    """linear(x) + x @ delta_weight().T, for x of shape (..., in_features).

    linear: the nn.Linear to adapt. It is kept, not copied, and frozen by mark_trainable.
    rank: inner dimension of each of the two products, 1 or more.
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
        self.hada_w1_a = nn.Parameter(torch.empty(linear.out_features, rank, **new))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, linear.in_features, **new))
        self.hada_w2_a = nn.Parameter(torch.empty(linear.out_features, rank, **new))
        self.hada_w2_b = nn.Parameter(torch.zeros(rank, linear.in_features, **new))
        for factor in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a):
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
        self.train(linear.training)

    def factors(self, keep=None) -> tuple[torch.Tensor, ...]:
        """W1a (out, rank), W1b (rank, in), s W2a and W2b alike: the one place where the scale enters.
        keep: a scalar tensor, 0 for no update, 1 or None for all of it."""
        W2a = self.scale * self.hada_w2_a
        return self.hada_w1_a, self.hada_w1_b, W2a if keep is None else keep * W2a, self.hada_w2_b

    def delta_weight(self) -> torch.Tensor:
        """delta W = s (W1a W1b) * (W2a W2b), shape (out_features, in_features)."""
        W1a, W1b, W2a, W2b = self.factors()
        return (W1a @ W1b) * (W2a @ W2b)

    def delta(self, x: torch.Tensor, W1a, W1b, W2a, W2b) -> torch.Tensor:
        """x @ delta_weight().T: (..., in) -> (..., out)."""
        return F.linear(x, ((W1a @ W1b) * (W2a @ W2b)).to(x.dtype))

    def product(self, x, W, bias, W1a, W1b, W2a, W2b) -> torch.Tensor:
        """F.linear(x, W, bias) + self.delta(x, ...) for rows x (N, in): equal up to rounding, faster."""
        return LoHaProduct.apply(x, W, bias, W1a, W1b, W2a, W2b)

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


class LoHaProduct(torch.autograd.Function):
    """x (W + delta W)^T + b for rows x (N, in), with a backward of its own, which keeps x alone.

    Whole form: delta W is built and added to W, so that x needs one product; in backward again.
    Thin form: an elementwise product of matrices of rank r is a product of rank r^2, delta W = B^T A with
    A (rank^2, in) and B (rank^2, out), so that x passes through both as in LoRA (where B stands the other
    way round). khatri_rao makes them. loha_forms says which form is cheaper.
    """

    # Lets torch.func.vmap through, for gradients sample by sample; forward mode (jvp) is not supported.
    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, bias, W1a, W1b, W2a, W2b):
        if loha_forms(x, W, W1b)[0] == "thin":
            A, B = khatri_rao(W1b, W2b, x.dtype), khatri_rao(W1a.T, W2a.T, x.dtype)
            return F.linear(x, W, bias).addmm_(F.linear(x, A), B)
        delta = (W1a @ W1b).mul_(W2a @ W2b).to(x.dtype)
        if is_half(x):
            return F.linear(x, W, bias).addmm_(x, delta.T)
        return F.linear(x, delta.add_(W), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _, *factors = inputs
        ctx.save_for_backward(x, W, *factors)

    @staticmethod
    def backward(ctx, g):
        x, W, *factors = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            gx, gradients = loha_backward(g, x, W, *factors, ctx.needs_input_grad[0])
            gW = g.T @ x if ctx.needs_input_grad[1] else None
            return gx, gW, g.sum(0) if ctx.needs_input_grad[2] else None, *gradients


def loha_backward(g, x, W, W1a, W1b, W2a, W2b, of_x: bool) -> tuple:
    """The gradient of x, None unless of_x, and those of the four factors, from g (N, out)."""
    form, gradients_form = loha_forms(x, W, W1b)
    needed = {form, gradients_form} if of_x else {gradients_form}
    if "thin" in needed:
        A, B = khatri_rao(W1b, W2b, x.dtype), khatri_rao(W1a.T, W2a.T, x.dtype)
        v = F.linear(g, B)  # (N, rank^2)
    if "whole" in needed:
        D1, D2 = W1a @ W1b, W2a @ W2b  # delta W = D1 * D2
    gx = None
    if of_x and form == "thin":
        gx = (g @ W).addmm_(v, A)
    elif of_x:
        delta = (D1 * D2).to(x.dtype)
        gx = (g @ W).addmm_(g, delta) if is_half(x) else g @ delta.add_(W)
        del delta  # as large as W: what comes next can have its memory
    if gradients_form == "thin":
        gW1b, gW2b = khatri_rao_backward(factor_gradient(v, x), W1b, W2b)
        gW1a, gW2a = khatri_rao_backward(factor_gradient(F.linear(x, A), g), W1a.T, W2a.T)
        return gx, (gW1a.T, gW1b, gW2a.T, gW2b)
    G = (g.T @ x).to(W1a.dtype)  # the gradient of delta W
    of_D1 = G * D2
    gW1a, gW1b = F.linear(of_D1, W1b), factor_gradient(W1a, of_D1)
    del of_D1, D2
    of_D2 = G * D1
    return gx, (gW1a, gW1b, F.linear(of_D2, W2b), factor_gradient(W2a, of_D2))


def khatri_rao(first, second, dtype) -> torch.Tensor:
    """Row i of first times row j of second for each i and j: (rank, n), (rank, n) -> (rank^2, n)."""
    return (first.contiguous()[:, None] * second.contiguous()).flatten(0, 1).to(dtype)


def khatri_rao_backward(g, first, second) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of first and second from g, that of their khatri_rao."""
    g = g.to(first.dtype).unflatten(0, (len(first), len(second)))  # (rank, rank, n)
    return (g * second).sum(1), (g * first[:, None]).sum(0)


def is_half(x: torch.Tensor) -> bool:
    """True for float16 and bfloat16: there W + delta W would round the update away, so they stay apart."""
    return torch.finfo(x.dtype).bits < 32


# To read or write a number in memory takes about as long as so many multiplications within a large product
# (on two cores of an AMD EPYC).
TOUCH = 16


def loha_costs(N: int, n_out: int, n_in: int, rank: int, half: bool, touch: int = TOUCH) -> tuple:
    """Multiplications for N rows, without the frozen layer's own: ((whole, thin) of the forward, and as many
    again for x's gradient; (whole, thin) of the factors' gradients).

    half: whether x is in half precision. touch: what one number read or written counts for, 0 to leave
    memory out. What two parts in one form can share is counted in both.
    """
    whole = n_out * n_in * (2 * rank + 4 * touch + N * half)  # D1, D2, their product, a sum
    thin = N * (n_out + n_in) * (rank**2 + touch)
    # G, D1, D2, the gradients of those, and the factors'
    whole_gradients = n_out * n_in * (N + 6 * rank + 8 * touch)
    return (whole, thin), (whole_gradients, 2 * thin)


def loha_forms(x, W, W1b) -> list[str]:
    """whole or thin, the cheaper, for the forward and for the factors' gradients."""
    costs = loha_costs(len(x), *W.shape, len(W1b), is_half(x))
    return ["whole" if whole <= thin else "thin" for whole, thin in costs]


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
