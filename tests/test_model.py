"""replace_linear, mark_trainable and merge on whole models, among them torchvision's ViT."""

import ast
import importlib
import inspect
import itertools
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from adapters import FORMS, KINDS, randomise
from conftest import ROOT
from torch import nn

import attention
from lora import LoRALinear, mark_trainable, merge, replace_linear

MODULES = {name: importlib.import_module(name) for name in ("lora", "loha", "lokr")}
# The functions that have the same text in lora.py, loha.py and lokr.py, in their order. FAST, below the
# ruler, change no number.
METHOD = ("replace_linear", "mark_trainable", "merge", "check_arguments", "new_factor")
METHOD += ("current_scale", "merged_layer", "merged_weight")
FAST = ("can_fuse", "fused", "factor_gradient")
SHARED = METHOD + FAST
RULER = "# ---- The same numbers up to rounding, faster"
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_vit(num_classes=5):
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(28, 7, 2, 4, 32, 48, num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight)
    return model.double()


def adapted_vit(kind, targets="all"):
    model = attention.split_attention(small_vit())
    replace_linear(model, KINDS[kind], targets)
    return randomise(model)


@pytest.fixture
def images():
    return torch.randn(
        3, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )


@every_kind
def test_train_eval_and_merged_agree_on_a_split_vit(kind, images):
    model = adapted_vit(kind)
    plain = attention.split_attention(small_vit())(images)
    trained = model.train()(images)
    evaluated = model.eval()(images)
    merged = merge(model)
    assert not any(hasattr(m, "delta_weight") for m in merged.modules())
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=1e-11)
    torch.testing.assert_close(merged(images), trained, rtol=0, atol=1e-11)
    assert (trained - plain).abs().max() > 0.1, "the adapters must have changed something"
    # and back into torchvision's own model, strictly
    stock = small_vit()
    stock.load_state_dict(attention.join_attention(merged).state_dict(), strict=True)
    torch.testing.assert_close(stock.eval()(images), trained, rtol=0, atol=1e-11)


@every_kind
def test_attention_is_adapted(kind, images):
    """The trap: on torchvision's own attention an adapter around out_proj changes nothing."""
    before = attention.split_attention(small_vit())(images)
    for target in ("query", "key", "value", "out"):
        assert not torch.allclose(adapted_vit(kind, [target])(images), before), target


def test_unsplit_attention_is_left_alone_with_a_warning(images):
    model = small_vit()
    with pytest.warns(UserWarning, match="split_attention"):
        names = replace_linear(model, FORMS["lora"])
    assert sorted(name.split(".")[-1] for name in names) == ["0", "0", "3", "3"]  # the two mlps
    assert not any("self_attention" in name for name in names)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"out_proj.*mlp\.0"):
        replace_linear(small_vit(), FORMS["lora"], ["out_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(attention.split_attention(small_vit()), FORMS["lora"])


@every_kind
def test_every_trainable_tensor_gets_a_gradient_and_no_frozen_one_changes(kind, images):
    model = attention.split_attention(small_vit())
    names = replace_linear(model, KINDS[kind])
    assert len(names) == 2 * 6
    trainable, total = mark_trainable(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    randomise(model)  # at the start, the zero factor keeps the others' gradients at zero
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
    optimizer.step()
    for name, p in model.named_parameters():
        trains = "lora_" in name or "hada_" in name or "lokr_" in name or "heads.head" in name
        assert torch.equal(p, before[name]) != trains, name


@pytest.mark.parametrize(
    ("kind", "count"), [("lora", 667_493), ("loha", 1_257_317), ("lokr", 116_069)]
)
def test_trainable_counts_of_vit_b_16(kind, count):
    """Query and value, rank 16, 101 classes: the figures that PEFT prints for the same."""
    with torch.device("meta"):
        model = torchvision.models.vit_b_16(num_classes=101)
    attention.split_attention(model)
    layer = KINDS[kind].func
    names = replace_linear(model, partial(layer, rank=16, alpha=16), ["query", "value"])
    assert len(names) == 24
    assert mark_trainable(model)[0] == count


def nested():
    return nn.ModuleDict(
        {
            "query": nn.Linear(8, 8),
            "subquery": nn.Linear(8, 8),
            "mlp": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
            "heads": nn.ModuleDict({"head": nn.Linear(8, 3)}),
        }
    )


def test_targets_are_whole_last_parts_of_names():
    assert replace_linear(nested(), FORMS["lora"], ["query"]) == ["query"]
    assert replace_linear(nested(), FORMS["lora"], "query,mlp.2") == ["query", "mlp.2"]
    assert replace_linear(nested(), FORMS["lora"]) == ["query", "subquery", "mlp.0", "mlp.2"]
    assert len(replace_linear(nested(), FORMS["lora"], head="")) == 5
    assert len(replace_linear(nested(), FORMS["lora"], head="mlp")) == 3


def test_targets_that_match_nothing_are_refused_with_the_names_there_are():
    model = nested()
    with pytest.raises(
        ValueError, match=r"'nothing'.*query, subquery, mlp\.0, mlp\.2, heads\.head"
    ):
        replace_linear(model, FORMS["lora"], ["nothing"])
    with pytest.raises(ValueError, match="none"):
        replace_linear(nn.Sequential(nn.ReLU()), FORMS["lora"])
    with pytest.raises(ValueError, match="'vlaue' matches no"):
        replace_linear(model, FORMS["lora"], "query, vlaue")  # one that matches excuses no other
    assert not any(hasattr(m, "delta_weight") for m in model.modules())


def test_wrapping_twice_is_refused_and_changes_nothing():
    model = nested()
    replace_linear(model, FORMS["lora"], ["query"])
    for targets in ("all", ["query"]):
        with pytest.raises(ValueError, match="'query' is wrapped already"):
            replace_linear(model, FORMS["loha"], targets)
    assert type(model["mlp"][0]) is nn.Linear
    replace_linear(model, FORMS["loha"], ["mlp.0"])  # another kind beside it is fine
    assert [type(m).__name__ for m in (model["query"], model["mlp"][0])] == [
        "LoRALinear",
        "LoHaLinear",
    ]


def test_a_wrap_that_fails_leaves_the_model_as_it_was():
    model = nested()

    def refuse_wide(linear):
        if linear.in_features == 16:
            raise ValueError("too wide")
        return FORMS["lora"](linear)

    with pytest.raises(ValueError, match="too wide"):
        replace_linear(model, refuse_wide)
    assert not any(hasattr(m, "delta_weight") for m in model.modules())


def test_a_shared_layer_gets_one_adapter_under_all_its_names():
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "second": shared})
    assert replace_linear(model, FORMS["lora"]) == ["first", "second"]
    assert model["first"] is model["second"]
    merge(model)
    assert type(model["first"]) is nn.Linear
    assert model["first"] is model["second"], "a shared layer stays shared"


def test_merged_layers_are_as_frozen_as_the_layers_they_come_from():
    model = nested()
    replace_linear(model, FORMS["lora"], ["query", "subquery"])
    mark_trainable(model, head="")
    model["subquery"].linear.bias.requires_grad_(True)
    merge(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["subquery.bias"]


def test_mark_trainable_biases_and_head():
    def trainable(**arguments):
        model = nested()
        replace_linear(model, FORMS["lora"], ["query"])
        mark_trainable(model, **arguments)
        return {name for name, p in model.named_parameters() if p.requires_grad}

    factors, head = {"query.lora_A", "query.lora_B"}, {"heads.head.weight", "heads.head.bias"}
    assert trainable() == factors | head
    assert trainable(head="") == factors
    assert trainable(bias="adapter") == factors | head | {"query.linear.bias"}
    assert trainable(bias="all", head="") == factors | {
        "query.linear.bias",
        "subquery.bias",
        "mlp.0.bias",
        "mlp.2.bias",
        "heads.head.bias",
    }
    with pytest.raises(ValueError, match="bias='some'"):
        mark_trainable(nested(), bias="some")


@pytest.mark.parametrize("name", SHARED)
def test_shared_functions_are_the_same_text(name):
    texts = {inspect.getsource(getattr(module, name)) for module in MODULES.values()}
    assert len(texts) == 1
    calls = {node.id for node in ast.walk(ast.parse(texts.pop())) if isinstance(node, ast.Name)}
    assert not calls & {"LoRALinear", "LoHaLinear", "LoKrLinear"}, "helpers know delta_weight alone"


def parts(name):
    """(source, {top-level function or class: its node}) of an adapter file, in the file's order."""
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    nodes = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return source, {node.name: node for node in nodes}


def ruler(source):
    """The number of the line below which a reader may stop."""
    (number,) = [i for i, line in enumerate(source.splitlines(), 1) if line.startswith(RULER)]
    return number


def test_the_shared_part_of_the_files_is_the_same_text():
    """Comments and blank lines too, from the comment above replace_linear to the end of factor_gradient."""
    texts = set()
    for name in MODULES:
        source, nodes = parts(name)
        lines = source.splitlines()
        starts = [i for i, s in enumerate(lines) if s.startswith("# How to put it into a model")]
        assert len(starts) == 1
        end = nodes["factor_gradient"].end_lineno
        texts.add("\n".join(lines[starts[0] : end]))
        inside = [n for n, node in nodes.items() if starts[0] < node.lineno <= end]
        assert inside == list(SHARED)
    assert len(texts) == 1


@pytest.mark.parametrize("name", MODULES)
def test_each_file_has_its_parts_in_the_same_order(name):
    """The method comes first, then what puts it into a model, then the ruler, then the fast form."""
    source, nodes = parts(name)
    order, line = list(nodes), {n: node.lineno for n, node in nodes.items()}
    layer = KINDS[name].func.__name__
    (function,) = [n for n in order if "Function" in ast.unparse(nodes[n]).splitlines()[0]]
    assert order[0] == layer
    wanted = [layer, *METHOD, *FAST, function]
    assert sorted(wanted, key=order.index) == wanted
    assert line["merged_weight"] < ruler(source) < line["can_fuse"]


@pytest.mark.parametrize(("name", "last"), [("lora", 60), ("loha", 60), ("lokr", 80)])
def test_a_reader_has_seen_the_whole_method_by_this_line(name, last):
    _, nodes = parts(name)
    layer = nodes[KINDS[name].func.__name__]
    (forward,) = [n for n in layer.body if getattr(n, "name", "") == "forward"]
    assert forward.end_lineno <= last


class PlainForm(ast.NodeTransformer):
    """Take out each `if can_fuse(self): ...`."""

    def visit_If(self, node):
        return None if ast.unparse(node.test) == "can_fuse(self)" else self.generic_visit(node)


@pytest.mark.parametrize("name", MODULES)
def test_the_method_needs_nothing_from_below_the_ruler(name):
    """The whole file up to the ruler works alone, once the fast form is taken out of forward."""
    source, nodes = parts(name)
    number = ruler(source)
    above = "\n".join(source.splitlines()[:number])
    below = {n for n, node in nodes.items() if node.lineno > number}

    def uses(tree):
        return below & {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

    assert uses(ast.parse(above)) >= {"can_fuse", "fused"}, "the control: the fast form is used"
    method = ast.unparse(ast.fix_missing_locations(PlainForm().visit(ast.parse(above))))
    assert not uses(ast.parse(method))
    use_pasted([method], [name])


MEMBERS = ("merge", "in_features", "out_features", "weight", "bias", "extra_repr")


@pytest.mark.parametrize("name", MEMBERS)
def test_shared_methods_are_the_same_text(name):
    members = [vars(kind.func)[name] for kind in KINDS.values()]
    functions = [m.fget if isinstance(m, property) else m for m in members]
    assert len({inspect.getsource(inspect.unwrap(f)) for f in functions}) == 1


@pytest.mark.parametrize("name", MODULES)
def test_file_pastes_alone(name):
    source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported <= {"torch", "math", "warnings"}
    use_pasted([source], [name])


@pytest.mark.parametrize("order", list(itertools.permutations(MODULES)))
def test_files_paste_in_every_order(order):
    use_pasted([(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in order], order)


def use_pasted(sources, names):
    cell = {}
    for source in sources:
        exec(source, cell)
    for name in names:
        layer = cell[{"lora": "LoRALinear", "loha": "LoHaLinear", "lokr": "LoKrLinear"}[name]]
        model = nested()
        assert len(cell["replace_linear"](model, partial(layer, rank=2, alpha=3))) == 4
        assert cell["mark_trainable"](model)[0] < cell["mark_trainable"](model)[1]
        randomise(model)
        x = torch.randn(2, 8)
        before = model["query"](x)
        torch.testing.assert_close(cell["merge"](model)["query"](x), before)


def test_adapters_of_every_kind_know_each_other():
    model = nested()
    replace_linear(model, KINDS["loha"], ["query"])
    mark_trainable(model)
    assert model["query"].hada_w1_a.requires_grad and not model["subquery"].weight.requires_grad
    assert type(merge(model)["query"]) is nn.Linear
    assert type(merge(LoRALinear(nn.Linear(3, 3)))) is nn.Linear
