"""Each adapter layer against its own equation, and against torch.autograd.gradcheck."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapters import FORMS, IN, KINDS, OUT, make, randomise
from torch import nn

from lokr import LoKrLinear, factorization

every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def parameters(layer):
    return dict(layer.named_parameters(recurse=False))


@every_form
def test_new_adapter_is_the_frozen_layer(form):
    linear = nn.Linear(IN, OUT)
    layer = FORMS[form](linear)
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), linear(x))
    assert layer.linear is linear
    zero = [name for name, p in parameters(layer).items() if not p.any()]
    first = {"lora": "lora_B", "loha": "hada_w2_b", "lokr-both": "lokr_w1_a"}.get(form, "lokr_w1")
    assert zero == [first], "with two zero factors, no factor would have a gradient"


@every_kind
def test_other_factors_start_as_nn_linear_does(kind):
    layer = KINDS[kind](nn.Linear(4096, 4096, device="cpu"))
    for name, p in parameters(layer).items():
        if p.any():
            bound = 1 / math.sqrt(p.shape[1])  # kaiming_uniform(a=sqrt 5)
            assert p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


@every_form
def test_names_and_shapes_are_those_of_other_libraries(form):
    shapes = {name: tuple(p.shape) for name, p in parameters(make(form)).items()}
    assert (
        shapes
        == {
            "lora": {"lora_A": (4, 40), "lora_B": (24, 4)},
            "loha": {
                "hada_w1_a": (24, 4),
                "hada_w1_b": (4, 40),
                "hada_w2_a": (24, 4),
                "hada_w2_b": (4, 40),
            },
            "lokr": {"lokr_w1": (4, 5), "lokr_w2_a": (6, 3), "lokr_w2_b": (3, 8)},
            "lokr-whole-w2": {"lokr_w1": (4, 5), "lokr_w2": (6, 8)},
            "lokr-both": {
                "lokr_w1_a": (4, 2),
                "lokr_w1_b": (2, 5),
                "lokr_w2_a": (6, 2),
                "lokr_w2_b": (2, 8),
            },
            "lokr-factor": {"lokr_w1": (2, 2), "lokr_w2_a": (12, 4), "lokr_w2_b": (4, 20)},
        }[form]
    )


@every_form
@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (0, IN)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_linear_plus_delta_weight(form, shape, bias):
    layer = make(form, bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    delta = x @ layer.delta_weight().T
    torch.testing.assert_close(layer(x), layer.linear(x) + delta, rtol=0, atol=1e-12)
    assert not delta.numel() or delta.abs().max() > 0.1, "a delta of nothing proves nothing"


def test_delta_weight_is_the_equation_entry_by_entry():
    s = 1.5
    lora, loha, lokr = (make(form) for form in KINDS)
    A, B = lora.lora_A, lora.lora_B
    a1, b1, a2, b2 = (parameters(loha)[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    W1, W2 = lokr.lokr_w1, lokr.lokr_w2_a @ lokr.lokr_w2_b
    for o, i in [(0, 0), (23, 39), (7, 12)]:
        torch.testing.assert_close(lora.delta_weight()[o, i], s * sum(B[o] * A[:, i]))
        hadamard = s * sum(a1[o] * b1[:, i]) * sum(a2[o] * b2[:, i])
        torch.testing.assert_close(loha.delta_weight()[o, i], hadamard)
        kronecker = s * W1[o // 6, i // 8] * W2[o % 6, i % 8]
        torch.testing.assert_close(lokr.delta_weight()[o, i], kronecker)


@every_form
def test_gradients(form):
    layer = make(form)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    names, factors = zip(*parameters(layer).items(), strict=True)

    def forward(x, *factors):
        return torch.func.functional_call(layer, dict(zip(names, factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *factors))
    assert torch.autograd.gradgradcheck(forward, (x, *factors))


@every_form
@pytest.mark.parametrize("bias", [True, False])
def test_merged_layer_is_a_plain_linear_with_the_same_output(form, bias):
    layer = make(form, bias=bias)
    before = layer.linear.weight.clone()
    merged = layer.merge()
    x = torch.randn(5, IN, dtype=torch.float64)
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.merge()(x), layer(x), rtol=0, atol=1e-12)
    assert torch.equal(layer.linear.weight, before), "merging must not touch the frozen weight"
    assert merged.weight.data_ptr() != layer.linear.weight.data_ptr()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layer_keeps_float32_factors_and_rounds_once(kind, dtype):
    layer = make(kind, dtype)
    assert {p.dtype for p in parameters(layer).values()} == {torch.float32}
    x = torch.randn(5, IN, dtype=dtype)
    assert layer(x).dtype == dtype
    merged = layer.merge()
    exact = layer.linear.weight.float() + layer.delta_weight()
    assert torch.equal(merged.weight, exact.to(dtype))
    # the control: adding in half precision rounds twice and differs
    assert not torch.equal(merged.weight, layer.linear.weight + layer.delta_weight().to(dtype))


@every_form
def test_autocast_gives_the_float32_result_to_half_precision(form):
    layer = make(form, torch.float32)
    x = torch.randn(64, IN)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.grad.dtype for p in parameters(layer).values()} == {torch.float32}
    exact = layer(x)
    assert (out.float() - exact).abs().max() < 0.02 * exact.abs().max()


@every_kind
def test_dropout_falls_on_the_adapter_s_input_alone(kind):
    layer = make(kind, dropout=0.5)
    x = torch.randn(6, IN, dtype=torch.float64)
    torch.manual_seed(3)
    out = layer(x)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.5)
    expected = layer.linear(x) + dropped @ layer.delta_weight().T
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    both = layer.linear(dropped) + dropped @ layer.delta_weight().T
    assert not torch.allclose(out, both), "the control: the frozen layer gets all of x"
    layer.eval()
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=0, atol=1e-12)


@every_kind
def test_module_dropout_leaves_the_whole_update_out_but_keeps_its_gradient(kind):
    layer = make(kind, module_dropout=0.25, alpha=0.7)  # a scale that float32 would round
    x = torch.randn(2, IN, dtype=torch.float64)
    exact = layer.eval()(x)
    layer.train()
    plain, full = layer.linear(x), layer.linear(x) + x @ layer.delta_weight().T
    torch.manual_seed(0)
    left_out = 0
    for _ in range(400):
        out = layer(x)
        if torch.equal(out, plain):
            left_out += 1
            layer.zero_grad()
            out.sum().backward()
            assert all(p.grad is not None and not p.grad.any() for p in parameters(layer).values())
        else:
            torch.testing.assert_close(out, full, rtol=0, atol=1e-12)
            assert torch.equal(out, exact), "where the update stays, its scale is exact"
    assert 70 < left_out < 130  # 100 +- 8.7 expected
    layer.eval()
    for _ in range(40):
        torch.testing.assert_close(layer(x), full, rtol=0, atol=1e-12)


@every_kind
def test_both_dropouts_together(kind):
    """module_dropout draws its number first; then dropout draws those of x."""
    layer = make(kind, dropout=0.5, module_dropout=0.4, alpha=0.7)
    x = torch.randn(6, IN, dtype=torch.float64)
    update = layer.delta_weight().T
    kept = []
    for seed in range(20):
        torch.manual_seed(seed)
        out = layer(x)
        torch.manual_seed(seed)
        kept.append(bool(torch.rand(()) >= 0.4))
        expected = layer.linear(x) + kept[-1] * (F.dropout(x, 0.5) @ update)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        layer.zero_grad()
        out.sum().backward()
        for p in parameters(layer).values():
            assert p.grad is not None and bool(p.grad.any()) == kept[-1]
    assert any(kept) and not all(kept)


@every_kind
@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}, {"module_dropout": -0.1}])
def test_arguments_that_cannot_work_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        KINDS[kind](nn.Linear(8, 8), **wrong)


@every_kind
def test_state_is_in_parameters_alone_so_that_replicas_and_pickle_work(kind):
    layer = make(kind, torch.float32)
    own = {k: v for k, v in vars(layer).items() if not k.startswith("_") and k != "training"}
    assert all(isinstance(value, int | float) for value in own.values()), own
    x = torch.randn(2, IN)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), layer(x))
    # what nn.DataParallel does: a shallow replica whose parameters are tensors put in their place
    replica = layer._replicate_for_data_parallel()
    linear = layer.linear._replicate_for_data_parallel()
    replica._modules["linear"] = linear
    for module, source in ((replica, layer), (linear, layer.linear)):
        for name, p in source.named_parameters(recurse=False):
            setattr(module, name, torch.zeros_like(p))
    assert torch.equal(replica(x), torch.zeros(2, OUT))


@every_kind
def test_code_that_reads_the_weight_gets_the_adapted_one(kind):
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(IN, 4, OUT, dropout=0.0, batch_first=True).double()
    block.linear1 = make(kind)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    slow = block.train()(x)
    with torch.inference_mode():  # the fast path reads linear1.weight and never calls linear1
        fast = block.eval()(x)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)


class PackedLinear(nn.Linear):
    """As quantised layers are: bytes of another shape for a weight, and a forward that unpacks them."""

    def __init__(self):
        super().__init__(IN, OUT, dtype=torch.float64)
        values = torch.randint(0, 256, (OUT * IN // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(values, requires_grad=False)

    def unpacked(self):
        pairs = torch.cat([self.weight // 16, self.weight % 16], dim=1)
        return pairs.reshape(OUT, IN).double() / 8 - 1

    def forward(self, x):
        return F.linear(x, self.unpacked(), self.bias)


@every_kind
@pytest.mark.parametrize("packed", [False, True])
def test_an_adapter_has_the_sizes_of_its_layer(kind, packed):
    """A packed weight has another shape."""
    linear = PackedLinear() if packed else nn.Linear(IN, OUT)
    layer = KINDS[kind](linear)
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    assert (linear.in_features, linear.out_features) == (IN, OUT)


@every_kind
def test_a_quantised_layer_is_adapted_and_not_merged(kind):
    packed = PackedLinear()
    layer = randomise(KINDS[kind](packed))
    x = torch.randn(3, IN, dtype=torch.float64)
    W = packed.unpacked() + layer.delta_weight()
    torch.testing.assert_close(layer(x), F.linear(x, W, packed.bias), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"PackedLinear.* has a forward of its own"):
        layer.merge()


@every_kind
def test_a_layer_with_another_forward_in_its_place_is_not_merged(kind):
    layer = make(kind)
    layer.linear.forward = lambda x: 2 * nn.Linear.forward(layer.linear, x)
    with pytest.raises(ValueError, match="has a forward of its own"):
        layer.merge()
    layer = make(kind)
    layer.linear.register_forward_hook(lambda module, arguments, output: 2 * output)
    with pytest.raises(ValueError, match="has forward hooks of its own"):
        layer.merge()
    layer = make(kind)
    layer.linear.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    with pytest.raises(ValueError, match="has forward hooks of its own"):
        layer.merge()


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_an_adapter_is_in_its_layer_s_mode(kind, training):
    linear = nn.Linear(IN, OUT).train(training)
    assert KINDS[kind](linear, dropout=0.5).training == linear.training == training


def test_factorization():
    assert factorization(768) == (24, 32)
    assert factorization(3072) == (48, 64)
    assert factorization(8, 4) == (2, 4)  # small first
    assert factorization(127) == (1, 127)  # a prime
    assert factorization(250, 16) == (10, 25)  # 16 does not divide: the nearest below
    for n in range(1, 300):
        for factor in (-1, 1, 2, 4, 7, 8, 16, 1000):
            small, large = factorization(n, factor)
            assert small * large == n and small <= large


def test_lokr_at_full_size_is_as_small_as_it_should_be():
    layer = LoKrLinear(nn.Linear(768, 3072), rank=8)
    assert sum(p.numel() for p in layer.parameters(recurse=False)) == 1920


@every_form
def test_torch_compile_takes_a_layer_whole(form):
    """Without a break in the graph, and with the same numbers; aot_eager needs no compiler of C++."""
    layer = make(form)
    x = torch.randn(4, 5, IN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters(recurse=False)]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = [
        torch.autograd.grad(forward(x).square().sum(), inputs) for forward in (layer, compiled)
    ]
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-12, atol=1e-12)
