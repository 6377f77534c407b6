"""The adapters under test, as layers and as files, with random numbers that reveal mistakes."""

from functools import partial

import torch
from torch import nn

import vit
from engine import checkpoint
from engine.adapt import adapt
from loha import LoHaLinear
from lokr import LoKrLinear
from lora import LoRALinear

# The scale is 1.5, so that a forgotten scale fails. On 24 x 40, LoKr's W1 is 4 x 5 and its W2 6 x 8: rank 3
# factors W2, rank 4 does not; factor 2 makes W1 2 x 2 and W2 12 x 20.
FORMS = {
    "lora": partial(LoRALinear, rank=4, alpha=6.0),
    "loha": partial(LoHaLinear, rank=4, alpha=6.0),
    "lokr": partial(LoKrLinear, rank=3, alpha=4.5),
    "lokr-whole-w2": partial(LoKrLinear, rank=4, alpha=6.0),
    "lokr-both": partial(LoKrLinear, rank=2, alpha=3.0, decompose_both=True),
    "lokr-factor": partial(LoKrLinear, rank=4, alpha=6.0, factor=2),
}
KINDS = {"lora": FORMS["lora"], "loha": FORMS["loha"], "lokr": FORMS["lokr"]}
IN, OUT = 40, 24


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all factors of the adapters: zeros would hide a wrong delta."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "delta_weight"):
            for parameter in module.parameters(recurse=False):
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.copy_(0.5 * values)
    return model


def make(form: str, dtype=torch.float64, bias: bool = True, **more) -> nn.Module:
    """An adapter of this form on a linear layer of 24 x 40, with random factors."""
    torch.manual_seed(1)
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    return randomise(FORMS[form](linear, **more))


CLASSES = ["beignets", "crème brûlée", "a, b"]
CASES = {
    "lora": {"rank": 3, "alpha": 5.0, "targets": "query,value"},
    "lora-bias": {"rank": 4, "alpha": 6.0, "targets": "query,mlp.3", "bias": "adapter"},
    "loha": {"rank": 2, "alpha": 5.0, "targets": "all"},
    "loha-bias": {"rank": 2, "alpha": 5.0, "targets": "out", "bias": "all"},
    "lokr": {"rank": 2, "alpha": 5.0, "targets": "all"},
    "lokr-whole": {"rank": 30, "alpha": 7.0, "targets": "key,mlp.0"},
    "lokr-both": {"rank": 2, "alpha": 5.0, "factor": 8, "decompose_both": True, "targets": "mlp.3"},
}


def write_adapter(path, case, weights="embedded", model="vit_mini", classes=CLASSES, **changed):
    """Write an adapter file with random tensors; return its model. changed: other preprocessing."""
    settings = {"rank": 4, "alpha": 32.0, "targets": "all", "bias": "none", "factor": -1}
    settings |= {"decompose_both": False, "adapter": case.split("-")[0], **CASES.get(case, {})}
    built, preprocessing = vit.build(model, weights, len(classes))
    adapt(built, **settings)
    trunk = checkpoint.fingerprint(built)
    generator = torch.Generator().manual_seed(3)
    for p in built.parameters():
        if p.requires_grad:
            p.data += 0.15 * torch.randn(p.shape, generator=generator)
    info = {**settings, "weights": weights, "seed": 0, "trunk": trunk}
    info |= {"shape": built.shape, "classes": classes}
    info["preprocessing"] = {**preprocessing, **changed}
    checkpoint.save_adapter(path, built, info)
    return built.eval()
