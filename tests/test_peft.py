"""Our layers against PEFT's: with equal factors, equal outputs, gradients and training."""

from functools import partial

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loha import LoHaLinear
from lokr import LoKrLinear, factorization
from lora import LoRALinear, mark_trainable, replace_linear

# No scale is 1. All are exact in float32, because PEFT's LoHa rounds its scale to float32. Whether LoKr's W2
# is whole depends on the layer's shape and on rank.
CASES = {
    "lora": (partial(LoRALinear, rank=5, alpha=7.5), peft.LoraConfig(r=5, lora_alpha=7.5)),
    "loha": (partial(LoHaLinear, rank=5, alpha=7.5), peft.LoHaConfig(r=5, alpha=7.5)),
    "lokr": (partial(LoKrLinear, rank=3, alpha=7.5), peft.LoKrConfig(r=3, alpha=7.5)),
    "lokr-whole-w2": (partial(LoKrLinear, rank=6, alpha=7.5), peft.LoKrConfig(r=6, alpha=7.5)),
    "lokr-both": (
        partial(LoKrLinear, rank=2, alpha=7, decompose_both=True),
        peft.LoKrConfig(r=2, alpha=7, decompose_both=True),
    ),
    "lokr-factor": (
        partial(LoKrLinear, rank=5, alpha=7.5, factor=2),
        peft.LoKrConfig(r=5, alpha=7.5, decompose_factor=2),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def network():
    """Two layers, 32 x 40 and 60 x 32, that are not square and not equal, and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(40, 32), nn.Tanh(), nn.Linear(32, 60), nn.Tanh(), nn.Linear(60, 3)
    ).double()


def ours_and_peft_s(case, random_factors):
    """The same network adapted by both, with PEFT's factors in both."""
    wrap, config = CASES[case]
    config.target_modules = ["0", "2"]
    ours, theirs = network(), peft.get_peft_model(network(), config).double()
    replace_linear(ours, wrap, ["0", "2"])
    mark_trainable(ours, head="")
    pairs = []
    for name, p in ours.named_parameters():
        if p.requires_grad:
            layer, factor = name.rsplit(".", 1)
            q = getattr(theirs.get_submodule(f"base_model.model.{layer}"), factor)["default"]
            pairs.append((name, p, q.weight if isinstance(q, nn.Module) else q))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    for _, p, q in pairs:
        assert p.shape == q.shape
        if random_factors:
            q.data.copy_(torch.randn_like(q) / 2)
        p.data.copy_(q.data)
    return ours, theirs, pairs


@every_case
def test_forward_and_all_gradients(case):
    ours, theirs, pairs = ours_and_peft_s(case, random_factors=True)
    x = torch.randn(7, 40, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(batch) for model, batch in zip((ours, theirs), inputs, strict=True)]
    assert (outputs[0] - network()(x)).abs().max() > 0.01
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-12, atol=1e-12)
    for name, p, q in pairs:
        assert p.grad.any(), name
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=name)


@every_case
def test_twenty_steps_of_adamw_from_the_start(case):
    ours, theirs, pairs = ours_and_peft_s(case, random_factors=False)
    x = torch.randn(64, 40, dtype=torch.float64)
    labels = torch.randint(3, (64,))
    curves = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        curves.append([])
        for _ in range(20):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0][-1] < 0.8 * curves[0][0], "it must learn, or equal curves prove nothing"
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    for name, p, q in pairs:
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5, msg=name)


@every_case
def test_initial_factors_have_peft_s_zeros_and_spread(case):
    """The same factors are zero. The others come from the same distribution: their bounds agree."""
    wrap, _ = CASES[case]
    _, _, pairs = ours_and_peft_s(case, random_factors=False)
    fresh = network()
    replace_linear(fresh, wrap, ["0", "2"])
    fresh = dict(fresh.named_parameters())
    for name, _, q in pairs:
        p = fresh[name]
        assert bool(p.any()) == bool(q.any()), name
        if p.any():
            bound = q.shape[1] ** -0.5
            assert p.abs().max() <= bound and q.abs().max() <= bound, name
            assert p.abs().max() > 0.7 * bound and q.abs().max() > 0.7 * bound, name


def test_factorization_is_peft_s_with_the_smaller_first_or_not():
    from peft.tuners.lokr.layer import factorization as reference

    for n in range(1, 400):
        for factor in (-1, 1, 2, 3, 4, 8, 16, 64):
            assert factorization(n, factor) == tuple(sorted(reference(n, factor))), (n, factor)
            if factor > 1:
                assert factorization(n, -factor) == reference(n, factor), (n, factor)
