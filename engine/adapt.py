"""The adapters by name, and how a model gets one: ADAPTERS, METHODS, adapt."""

from functools import partial

import torch
from torch import nn

from loha import LoHaLinear
from lokr import LoKrLinear
from lora import LoRALinear, mark_trainable, replace_linear

ADAPTERS = {"lora": LoRALinear, "loha": LoHaLinear, "lokr": LoKrLinear}
METHODS = (*ADAPTERS, "head", "full")  # head: a linear probe; full: everything trains
ADAPT = ("adapter", "rank", "alpha", "targets", "bias", "factor", "decompose_both")


def adapt(
    model: nn.Module,
    adapter: str = "lora",
    rank: int = 4,
    alpha: float = 32.0,
    targets: str | list[str] = "all",
    bias: str = "none",
    dropout: float = 0.0,
    module_dropout: float = 0.0,
    factor: int = -1,
    decompose_both: bool = False,
) -> tuple[int, int]:
    """Wrap and mark a model for one of METHODS, in place; return (trainable, total) parameters.

    factor and decompose_both are LoKr's alone. Raises ValueError for what does not fit the model.
    """
    if adapter not in METHODS:
        raise ValueError(f"adapter {adapter!r}: expected one of {', '.join(METHODS)}")
    if adapter in ADAPTERS:
        special = {"factor": factor, "decompose_both": decompose_both} if adapter == "lokr" else {}
        wrap = partial(
            ADAPTERS[adapter],
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            module_dropout=module_dropout,
            **special,
        )
        for name in replace_linear(model, wrap, targets):
            if "heads.head" in name:
                raise ValueError(f"targets: {name} is the head, which trains whole: leave it out")
    if adapter == "full":
        model.requires_grad_(True)
        total = sum(parameter.numel() for parameter in model.parameters())
        return total, total
    return mark_trainable(model, bias=bias)


@torch.no_grad()
def relative_norms(model: nn.Module) -> dict[str, float]:
    """How far each adapter has moved its layer: ||delta W|| / ||W||, Frobenius norms, by name."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "delta_weight")}
    norms = [m.delta_weight().norm() / m.linear.weight.norm() for m in layers.values()]
    return dict(zip(layers, torch.stack(norms).tolist() if norms else [], strict=True))
