"""The fast form of each adapter against its plain form: same numbers, less memory, fewer multiplications.

The plain form is what forward does where can_fuse is False: with dropout, hooks or subclasses. Autograd
derives its gradients.
"""

import contextlib
import copy
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from adapters import FORMS, IN, KINDS, OUT, make
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import loha
import lokr
import lora

# Every form of every adapter with every choice that its cost model can make. LoHa's model chooses once for
# forward and once for the factors' gradients; LoRA's and LoKr's choose once for both.
ROUTES = {
    **{f"lora-{a}": ("lora", a) for a in ("built", "apart")},
    **{f"loha-{a}-{b}": ("loha", [a, b]) for a in ("whole", "thin") for b in ("whole", "thin")},
    **{f"{form}-{a}": (form, a) for form in FORMS if "lokr" in form for a in ("built", "apart")},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch):
    """The form of adapter to make. Its cost model makes this route's choice, whatever the sizes."""
    return force(request.param, monkeypatch)


def force(name, monkeypatch):
    form, choice = ROUTES[name]
    monkeypatch.setattr(lora, "lora_form", lambda *_: choice)
    monkeypatch.setattr(loha, "loha_forms", lambda *_: choice)
    monkeypatch.setattr(lokr, "lokr_form", lambda *_: choice)
    return form


def plain(layer, x):
    """layer(x) by the plain form."""
    with exchanged(layer, can_fuse=lambda _: False, fused=None):
        return layer(x)


@contextlib.contextmanager
def exchanged(layer, **functions):
    """Put other functions into the file that the layer's class comes from."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(sys.modules[type(layer).__module__], name, function)
        yield


def rows(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, IN, generator=generator, dtype=dtype)


def gradients(layer, forward, x):
    """The gradients of the input and of every parameter, with the frozen weight and bias."""
    inputs = [x, *layer.parameters()]
    out = forward(layer, x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((weights * out.square()).sum(), inputs)


def call(layer, x):
    return layer(x)


def test_output_and_all_gradients_are_the_plain_form_s(route):
    layer, x = make(route), rows(2, 7).requires_grad_()
    torch.testing.assert_close(layer(x), plain(layer, x), rtol=0, atol=1e-12)
    equation = layer.linear(x) + x @ layer.delta_weight().T
    torch.testing.assert_close(plain(layer, x), equation, rtol=0, atol=1e-12)
    pairs = zip(gradients(layer, call, x), gradients(layer, plain, x), strict=True)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape and ours.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_first_and_second_derivatives(route):
    """Also with respect to the frozen weight and bias: users unfreeze them."""
    layer, x = make(route), rows(2).requires_grad_()
    names, values = zip(*layer.named_parameters(), strict=True)
    values = [value.detach().requires_grad_() for value in values]

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    # fast_mode: one random direction of each matrix, where the whole has 10^6 entries
    assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(forward, (x, *values), fast_mode=True)


def test_second_derivatives_of_autocast_s_output(route):
    """Backward then makes W + delta W anew: the copy that it has kept has no history."""
    layer, x = make(route, torch.float32), rows(64, dtype=torch.float32).requires_grad_()

    def second(forward, amp):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = forward(layer, x).float()
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), list(layer.parameters()))

    for ours, exact in zip(second(call, True), second(plain, False), strict=True):
        assert (ours - exact).norm() < 0.03 * exact.norm()


SUMS = [name for name in ROUTES if "built" in name or name.startswith("loha-whole")]
APART = [name for name in ROUTES if name not in SUMS]


@pytest.mark.parametrize("name", APART)
def test_what_is_apart_loses_no_update_to_a_large_weight(name, monkeypatch):
    """delta W is 0.001, a quarter of the distance from W, 1 and -1, to the next bfloat16."""
    layer = make(force(name, monkeypatch), torch.bfloat16)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.cat([torch.ones(IN // 2), -torch.ones(IN // 2)]))
        layer.linear.bias.zero_()
        for p in layer.parameters(recurse=False):
            p.fill_(1.0)
        next(layer.parameters(recurse=False)).mul_(1e-3 / layer.delta_weight().max())
    torch.testing.assert_close(layer.delta_weight(), torch.full((OUT, IN), 1e-3))
    assert torch.equal(layer.weight, layer.linear.weight), "the control: in one matrix it is lost"
    x = torch.ones(300, IN, dtype=torch.bfloat16)  # W x is 0
    for y in (layer(x), plain(layer, x)):
        assert y.dtype == torch.bfloat16
        expected = torch.full((300, OUT), 0.001 * IN)
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0)


def share_that_arrives(layer, x, forward):
    """(The part of x delta W^T that autocast's output has more than x W^T, by regression; the output's error
    relative to it, against float64.)"""
    delta, W = layer.delta_weight().double(), layer.linear.weight.double()
    update, frozen = x.double() @ delta.T, F.linear(x.double(), W, layer.linear.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = forward(layer, x).double()
    error = (y - frozen - update).norm() / frozen.norm()
    return ((y - frozen) * update).sum() / update.square().sum(), error


@pytest.mark.parametrize("name", [name for name in ROUTES if "both" not in name])
def test_a_small_update_arrives_in_the_sum_and_gets_lost_beside_it(name, monkeypatch):
    """W is float32, as under autocast. Its low bits let a part of a small delta W through the rounding of
    the sum; what is added to a rounded output has to be half as large as its last bit to be seen."""
    layer = make(force(name, monkeypatch), torch.float32)
    x = rows(4000, dtype=torch.bfloat16)
    scale = layer.linear.weight.norm() / layer.delta_weight().norm()
    arrives, errors = {}, {}
    with torch.no_grad():
        for size in (1e-3, 1e-1):
            layer.scale *= size * scale
            arrives[size], errors[size] = share_that_arrives(layer, x, call)
            layer.scale /= size * scale
    assert errors[1e-3] < 0.004 and errors[1e-1] < 0.004
    assert arrives[1e-1] == pytest.approx(1, abs=0.02)
    if name in SUMS:
        assert arrives[1e-3] == pytest.approx(1, abs=0.2)
    else:
        assert arrives[1e-3] < 0.8


def test_loha_s_whole_form_rounds_delta_weight_once_in_half_precision(monkeypatch):
    layer = make(force("loha-whole-whole", monkeypatch), torch.bfloat16)
    for p in layer.linear.parameters():
        nn.init.zeros_(p)
    delta = layer.delta_weight()
    assert delta.dtype == torch.float32
    for forward in (call, plain):
        y = forward(layer, torch.eye(IN, dtype=torch.bfloat16))
        assert torch.equal(y.T, delta.bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUTES)
def test_autocast_gives_the_float32_gradients_to_half_precision(name, dtype, monkeypatch):
    layer = make(force(name, monkeypatch), torch.float32)
    x = rows(64, dtype=torch.float32).requires_grad_()
    exact = gradients(layer, plain, x)
    # forward by both forms; backward outside of autocast, as it should be, and inside
    for forward, inside in itertools.product((call, plain), (False, True)):
        with torch.autocast("cpu", dtype):
            y = forward(layer, x)
        assert y.dtype == dtype
        weights = torch.linspace(-1, 1, y.numel()).view_as(y)
        with torch.autocast("cpu", dtype, enabled=inside):
            found = torch.autograd.grad(
                (weights * y.float().square()).sum(), [x, *layer.parameters()]
            )
        for ours, theirs in zip(found, exact, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() < (
                0.02 if dtype == torch.bfloat16 else 0.003
            ) * theirs.norm()


@pytest.mark.parametrize("name", ROUTES)
def test_float16_loses_no_gradient_of_a_factor_that_begins_to_learn(name, monkeypatch):
    """After a first step, the factor that began at zero has numbers of the size of the learning rate."""
    layer = make(force(name, monkeypatch), torch.float32)
    (started,) = (
        p
        for n, p in layer.named_parameters()
        if n in ("lora_B", "hada_w2_b", "lokr_w2", "lokr_w2_a")
    )
    nn.init.uniform_(started, -1e-6, 1e-6)
    if hasattr(layer, "hada_w1_b"):
        layer.hada_w1_b.data.mul_(0.01)
    x = rows(64, dtype=torch.float32)
    parameters = [p for n, p in layer.named_parameters() if not n.startswith("linear.")]
    scale = 2**5  # as GradScaler scales a loss
    exact = torch.autograd.grad(scale * plain(layer, x).sum(), parameters)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    found = torch.autograd.grad(scale * y.float().sum(), parameters)
    for ours, wanted in zip(found, exact, strict=True):
        assert (ours - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("name", [name for name in APART if "both" not in name])
def test_autocast_gives_the_output_of_a_half_precision_layer(name, monkeypatch):
    """To the bit: both keep their factors, and the factors' products, in float32."""
    route = force(name, monkeypatch)
    layer, half = make(route, torch.float32), make(route, torch.float32)
    half.linear.bfloat16()
    x = rows(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, half(x.bfloat16()))


def test_backward_of_float32_is_float32_in_autocast_too(route):
    """Some users call backward inside of autocast: our backward must not change its type there."""
    layer, x = make(route, torch.float32), rows(64, dtype=torch.float32).requires_grad_()
    exact, *_ = gradients(layer, plain, x)
    y = layer(x)
    loss = (torch.linspace(-1, 1, y.numel()).view_as(y) * y.square()).sum()
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("N", [3, 700])
@every_kind
def test_autograd_keeps_the_input_and_the_copy_of_w_that_autocast_keeps(kind, N, amp):
    """It keeps the input and the factor that holds the scale. The test counts the bytes of different
    storages, without the parameters'."""
    layer = make(kind, torch.float32)
    layer.linear.requires_grad_(False)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def kept(forward, x):
        found = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=amp):
            y = forward(layer, x)  # while it lives, no storage is used again
        assert y.requires_grad
        return found

    x = rows(N, dtype=torch.bfloat16 if amp else torch.float32).requires_grad_()
    scaled = {"lora": "lora_B", "loha": "hada_w2_a", "lokr": "lokr_w1"}[kind]
    matrix = IN * OUT if amp else 0
    allowed = x.element_size() * (N * IN + matrix) + 4 * getattr(layer, scaled).numel()
    found = kept(call, x)
    assert x.untyped_storage().data_ptr() in found
    assert sum(found.values()) == allowed
    assert sum(kept(lambda layer, x: layer.linear(x), x).values()) == 2 * matrix, "the floor"
    assert sum(kept(plain, x).values()) > allowed, "the control: the plain form"


@every_kind
def test_without_a_gradient_of_x_no_copy_of_w_is_kept(kind):
    layer = make(kind, torch.float32)
    layer.linear.requires_grad_(False)
    x, sizes = rows(300, dtype=torch.bfloat16), []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel()) or t, lambda t: t
    )
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.requires_grad and sizes.count(IN * OUT) == 1, "W itself"


@pytest.mark.parametrize("shape", [(5,), (2, 7)])
def test_the_output_can_be_changed_in_place(route, shape):
    """As nn.ReLU(inplace=True) and y += residual do."""
    layer, x = make(route), rows(*shape).requires_grad_()
    found = gradients(layer, lambda layer, x: layer(x).add_(1).relu_(), x)
    expected = gradients(layer, lambda layer, x: (plain(layer, x) + 1).relu(), x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def products(function):
    """(Multiplications of all matrix products in a call, what it returns)."""
    counts = {torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        result = function()
    return counter.get_total_flops() // 2, result


def products_of_step(layer, N, of_x=True):
    """Multiplications of a layer's (forward, backward), without the frozen layer's own."""
    layer.linear.requires_grad_(False)
    x = rows(N).requires_grad_(of_x)
    forward, y = products(lambda: layer(x))
    backward, _ = products(lambda: y.sum().backward())
    return forward - N * IN * OUT, backward - (N * IN * OUT if of_x else 0)


def test_lora_takes_the_products_that_its_docstring_says(monkeypatch):
    N, rank = 50, 4
    once, built = N * rank * (IN + OUT), rank * IN * OUT
    layer = make(force("lora-apart", monkeypatch))
    assert products_of_step(layer, N) == (once, 2 * once + N * rank * IN)
    layer = make(force("lora-built", monkeypatch))
    assert products_of_step(layer, N) == (built, 2 * once + built)


@pytest.mark.parametrize("form", ["whole", "thin"])
@pytest.mark.parametrize("gradients_form", ["whole", "thin"])
def test_loha_costs_are_the_products_that_are_done(form, gradients_form, monkeypatch):
    N, rank = 50, 4
    monkeypatch.setattr(loha, "loha_forms", lambda *_: [form, gradients_form])
    forward, backward = products_of_step(make("loha"), N)
    through, of_factors = loha.loha_costs(N, OUT, IN, rank, half=False, touch=0)
    through = dict(zip(["whole", "thin"], through, strict=True))[form]
    of_factors = dict(zip(["whole", "thin"], of_factors, strict=True))[gradients_form]
    shared = {"thin": N * OUT * rank**2, "whole": OUT * IN * 2 * rank}  # g through B; D1 and D2
    once = shared[form] if form == gradients_form else 0
    assert forward == through
    assert backward == through + of_factors - once


@pytest.mark.parametrize("form", ["lokr", "lokr-factor"])
def test_lokr_costs_are_the_products_that_are_done(form, monkeypatch):
    N, done = 50, {}
    layer = make(form)
    rank, size = len(layer.lokr_w2_b), layer.lokr_w1.numel()
    for choice in ("built", "apart"):
        monkeypatch.setattr(lokr, "lokr_form", lambda *_, choice=choice: choice)
        done[choice] = sum(products_of_step(layer, N))
    small = 2 * layer.lokr_w2_a.numel() * layer.lokr_w2_b.shape[1]  # W2 = W2a W2b, twice
    _, apart = lokr.lokr_costs(N, OUT, IN, size, rank, half=False, touch=0)
    assert done["apart"] - (done["built"] - small) == apart


def test_the_forms_chosen_for_vit_b():
    """The models choose what was measured as faster on a CPU, in float32 and in bfloat16."""

    def loha_s(N, n_out, n_in, rank, half=False):
        costs = loha.loha_costs(N, n_out, n_in, rank, half)
        return ["whole" if a <= b else "thin" for a, b in costs]

    def lokr_s(N, n_out, n_in, half=False):
        built, apart = lokr.lokr_costs(N, n_out, n_in, 24 * 24, 8, half)
        return "built" if built <= apart else "apart"

    assert loha_s(1576, 768, 768, 8) == ["whole", "thin"]
    assert loha_s(1576, 768, 768, 16) == ["whole", "whole"]
    assert loha_s(1576, 3072, 768, 16) == ["whole", "thin"]
    assert loha_s(197, 768, 768, 8)[0] == "thin"
    assert loha_s(1576, 768, 768, 8, half=True) == ["whole", "thin"]
    assert loha_s(1576, 768, 768, 16, half=True) == ["whole", "whole"]
    assert loha_s(12608, 3072, 768, 16, half=True) == ["whole", "thin"]
    assert loha_s(200, 3072, 768, 8, half=True) == ["thin", "thin"]
    assert [lokr_s(N, 768, 768) for N in (300, 400)] == ["apart", "built"]
    assert [lokr_s(N, 768, 768, half=True) for N in (300, 800)] == ["apart", "built"]
    for N, shape, form in (
        (200, (768, 768), "apart"),
        (800, (768, 768), "built"),
        (800, (3072, 768), "apart"),
        (1576, (3072, 768), "built"),
    ):
        assert lora.lora_form(torch.empty(N, shape[1]), torch.empty(shape)) == form


@pytest.mark.parametrize("module", [lora, loha, lokr])
@pytest.mark.parametrize("columns", [1, 15, 16, 40])
def test_a_factor_s_gradient_is_the_same_product_in_either_orientation(module, columns):
    z, x = rows(7)[:, :columns], rows(7, seed=1)[:, :9]
    found = module.factor_gradient(z, x)
    torch.testing.assert_close(found, torch.einsum("nr,ni->ri", z, x), rtol=0, atol=1e-12)


def test_a_frozen_input_costs_no_gradient(route):
    _, backward = products_of_step(make(route), 50)  # less the frozen layer's own for x
    _, without = products_of_step(make(route), 50, of_x=False)
    assert 0 < without <= backward


def test_a_frozen_weight_costs_no_gradient(route):
    layer, x, N = make(route), rows(50).requires_grad_(), 50
    backward = {}
    for trains in (False, True):
        layer.linear.requires_grad_(trains)
        loss = layer(x).sum()
        backward[trains], _ = products(loss.backward)
    assert backward[True] - backward[False] == N * IN * OUT


def test_per_sample_gradients_of_torch_func(route):
    layer = make(route)
    values = {name: p.detach() for name, p in layer.named_parameters()}
    of_sample = grad(lambda values, x: functional_call(layer, values, (x,)).square().sum())
    samples = rows(3, 5)
    found = vmap(of_sample, in_dims=(None, 0))(values, samples)
    for i, sample in enumerate(samples):
        for name, expected in of_sample(values, sample).items():
            torch.testing.assert_close(found[name][i], expected, rtol=1e-10, atol=1e-10)


def test_gradient_checkpointing_and_inference_mode(route):
    layer, x = make(route), rows(2, 7).requires_grad_()
    expected = gradients(layer, call, x)
    found = gradients(layer, lambda layer, x: checkpoint(layer, x, use_reentrant=False), x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    wanted = plain(layer, x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x.detach()), wanted, rtol=0, atol=1e-12)


def test_gradients_reach_the_parameters_through_replicas(route):
    """nn.DataParallel's replica has no parameters, but tensors computed from the layer's parameters."""
    layer, x = make(route), rows(5)
    doubled_replica(layer)(x).square().sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    for p in layer.parameters():
        p.data.mul_(2)
    layer(x).square().sum().backward()
    for ours, p in zip(found, layer.parameters(), strict=True):
        torch.testing.assert_close(ours, 2 * p.grad, rtol=1e-12, atol=1e-12)


def doubled_replica(layer):
    """A replica as nn.DataParallel makes it, with each parameter doubled."""
    replica = layer._replicate_for_data_parallel()
    linear = layer.linear._replicate_for_data_parallel()
    replica._modules["linear"] = linear
    for module, source in ((replica, layer), (linear, layer.linear)):
        for name, p in source.named_parameters(recurse=False):
            setattr(module, name, 2 * p)
    return replica


@every_kind
def test_module_dropout_works_in_a_replica(kind):
    layer, x = make(kind, module_dropout=0.5), rows(5)
    replica = doubled_replica(layer)
    twice = copy.deepcopy(layer)
    for p in twice.parameters():
        p.data.mul_(2)
    torch.manual_seed(0)
    found = [replica(x) for _ in range(20)]
    torch.manual_seed(0)
    assert all(torch.equal(y, twice(x)) for y in found)
    left_out = [torch.equal(y, twice.linear(x)) for y in found]
    assert any(left_out) and not all(left_out)


@pytest.mark.slow
@every_kind
def test_compiled_by_inductor(kind):
    layer, x = make(kind, torch.float32), rows(300, dtype=torch.float32).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    found = gradients(layer, lambda _, x: compiled(x), x)
    for ours, theirs in zip(found, gradients(layer, call, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class DoubledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@every_kind
def test_subclasses_hooks_and_a_patched_forward_of_the_frozen_layer_still_run(kind):
    """accelerate patches forward, for example."""
    x, seen = rows(3), []

    def hooked(linear):
        linear.register_forward_hook(lambda module, arguments, output: seen.append("hook"))

    def before(linear):
        linear.register_forward_pre_hook(lambda module, arguments: seen.append("before"))

    def patched(linear):
        linear.forward = lambda x: seen.append("patched") or nn.Linear.forward(linear, x)

    expected = make(kind)(x)
    for change in (hooked, before, patched):
        layer = make(kind)
        change(layer.linear)
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
        assert seen.pop() and not seen
    layer = make(kind)
    doubled = KINDS[kind](DoubledLinear(IN, OUT, dtype=torch.float64))
    doubled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(doubled(x), expected + layer.linear(x), rtol=0, atol=1e-12)


@every_kind
def test_a_layer_on_meta_gives_shapes(kind):
    layer = make(kind).to("meta")
    assert layer(torch.empty(2, 3, IN, device="meta", dtype=torch.float64)).shape == (2, 3, OUT)


class OtherTensor(torch.Tensor):
    """Quantised weights have such a class."""


def with_subclass(layer):
    layer.linear.__class__ = type("SameLinear", (nn.Linear,), {})


def with_other_tensor(layer):
    layer.linear.weight = nn.Parameter(layer.linear.weight.detach().as_subclass(OtherTensor))


# What keeps a layer off the fast form. None of it changes a number: a dropout of 1e-18 drops nothing, and no
# hook returns anything.
CHANGES = {
    "dropout": lambda layer: setattr(layer, "dropout", 1e-18),
    "subclass": with_subclass,
    "weight of another tensor class": with_other_tensor,
    "forward hook": lambda layer: layer.linear.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.linear.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda layer: layer.linear.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.linear.register_full_backward_pre_hook(
        lambda *_: None
    ),
    "patched forward": lambda layer: setattr(layer.linear, "forward", layer.linear.forward),
}


def call_and_note(layer, x):
    """(layer(x), True if it took the fast form)."""
    fused, notes = sys.modules[type(layer).__module__].fused, []
    with exchanged(layer, fused=lambda *arguments: notes.append(1) or fused(*arguments)):
        return layer(x), bool(notes)


@every_kind
@pytest.mark.parametrize("change", CHANGES)
def test_these_layers_take_the_plain_form_and_give_the_fast_form_s_numbers(kind, change):
    layer, x = make(kind), rows(5).requires_grad_()
    expected, fast = call_and_note(layer, x)
    assert fast, "the control: nothing keeps a new layer off the fast form"
    wanted = gradients(layer, call, x)
    CHANGES[change](layer)
    found, fast = call_and_note(layer, x)
    assert not fast
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients(layer, call, x), wanted, strict=True):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs, rtol=1e-12, atol=1e-12)


@every_kind
def test_dropout_that_is_off_leaves_the_fast_form_on(kind):
    layer = make(kind, dropout=0.5)
    assert not call_and_note(layer, rows(5))[1], "the control: in training it is on"
    evaluated, fast = call_and_note(layer.eval(), rows(5))
    assert fast
    torch.testing.assert_close(evaluated, plain(layer, rows(5)), rtol=0, atol=1e-12)
    assert call_and_note(make(kind, module_dropout=0.5), rows(5))[1]
