"""The adapters by name, and how a model of train.py gets one: ADAPTERS, METHODS, adapt."""

from functools import partial

import torch
from torch import nn

from loha import LoHaLinear
from lokr import LoKrLinear
from lora import LoRALinear, mark_trainable, replace_linear

ADAPTERS = {"lora": LoRALinear, "loha": LoHaLinear, "lokr": LoKrLinear}
METHODS = (*ADAPTERS, "head", "full")  # head: a linear probe; full: everything trains
# The arguments of adapt that an adapter file keeps.
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
    """Prepare a model for one of METHODS, in place; return (trainable, total) parameter counts.

    factor and decompose_both matter for LoKr only. Raises ValueError if something does not fit the model.
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
                raise ValueError(
                    f"targets: {name} is the head, which trains as a whole: leave it out"
                )
    if adapter == "full":
        model.requires_grad_(True)
        total = sum(parameter.numel() for parameter in model.parameters())
        return total, total
    return mark_trainable(model, bias=bias)


def check_rank(model: nn.Module, rank: int) -> None:
    """Raise ValueError if an adapted layer is too small for the rank."""
    for name, module in model.named_modules():
        if hasattr(module, "delta_weight") and rank > min(module.linear.weight.shape):
            raise ValueError(
                f"--rank {rank}: {name} is {tuple(module.linear.weight.shape)}; "
                f"expected at most {min(module.linear.weight.shape)}"
            )


@torch.no_grad()
def relative_norms(model: nn.Module) -> dict[str, float]:
    """||delta W|| / ||W|| of each adapter (Frobenius norms) by its name: how far it has moved its layer."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "delta_weight")}
    norms = [m.delta_weight().norm() / m.linear.weight.norm() for m in layers.values()]
    return dict(zip(layers, torch.stack(norms).tolist() if norms else [], strict=True))
