"""--recompute: the numbers are the same to the bit, and less is kept for the backward pass."""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_resume import assert_same, contents
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models.vision_transformer import EncoderBlock

import train
import vit
from engine.adapt import ADAPTERS, adapt

SIZE, BATCH = 28, 4
TINY = {"image_size": SIZE, "patch_size": 14, "num_layers": 2, "num_heads": 4}
TINY |= {"hidden_dim": 64, "mlp_dim": 128}
TRUNKS = {
    "mini": ("vit_mini", "embedded"),
    "DINOv2": (TINY | {"layer_scale": True, "prefix_tokens": 3, "pool": "class+mean"}, "none"),
    "CLIP": (TINY | {"pre_norm": True, "activation": "quick_gelu"}, "none"),
}
DROPOUTS = {
    "plain": {},
    "adapter dropout": {"dropout": 0.3},
    "module dropout": {"module_dropout": 0.5},
    "head dropout": {"head_dropout": 0.5},
    "all": {"dropout": 0.3, "module_dropout": 0.5, "head_dropout": 0.5},
}
CASES = [(method, dropout) for method in ADAPTERS for dropout in DROPOUTS]
CASES += [("full", "plain"), ("head", "head dropout")]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
FLAGS = "--limit 40 --epochs 2 --batch-size 8 --image-size 14 --workers 0 --head-dropout 0.1"
FLAGS = [*FLAGS.split(), *"--adapter-dropout 0.1 --module-dropout 0.2".split()]
BLOCKS = 6  # of vit_mini; a run with FLAGS has 2 epochs of 5 steps


def make(trunk="mini", method="lora", head_dropout=0.0, **dropouts):
    """A model in which everything is random: zeros or ones could hide a mistake."""
    torch.manual_seed(0)
    model, _ = vit.build(*TRUNKS[trunk], num_classes=5, head_dropout=head_dropout)
    adapt(model, method, targets="all", **dropouts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def loss_of(model, dtype=torch.float32):
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype, dtype != torch.float32):
        return F.cross_entropy(model(images).float(), torch.arange(BATCH))


def step(model, recompute, dtype=torch.float32):
    """Loss, gradients, and what the random generator gives after a step; how often each block ran."""
    model.encoder.layers.recompute = recompute
    blocks = [block for block in model.encoder.layers if isinstance(block, EncoderBlock)]
    runs = dict.fromkeys(blocks, 0)

    def count(block, _):
        runs[block] += 1

    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(model, dtype)
    loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "next": torch.rand(3), **gradients}, [*runs.values()]


def differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize(("method", "dropout"), CASES)
def test_loss_and_gradients_are_the_same_to_the_bit(method, dropout, trunk, dtype, monkeypatch):
    model, dtype = make(trunk, method, **DROPOUTS[dropout]), DTYPES[dtype]
    expected, runs = step(model, False, dtype)
    assert set(runs) == {1}
    found, runs = step(model, True, dtype)
    assert_same(expected, found)
    assert set(runs) == {1 if method == "head" else 2}, "head: backward does not reach the blocks"
    assert all(value.isfinite().all() for value in found.values())
    dropped = [name for name in found if not found[name].any()]
    assert not dropped or ("module_dropout" in DROPOUTS[dropout] and len(dropped) < len(found) - 4)
    if dropout in ("adapter dropout", "module dropout", "all"):  # the control: other random numbers
        other = partial(vit.checkpoint, preserve_rng_state=False)
        monkeypatch.setattr(vit, "checkpoint", other)
        # The loss is of the first pass, and so are the gradients of what comes after the blocks.
        changed = differ(expected, step(model, True, dtype)[0])
        assert any("encoder.layers" in name for name in changed)
        assert "loss" not in changed


class Alive(TorchDispatchMode):
    """The storages that were made inside it and still hold memory, whoever holds them.

    Hooks on saved tensors, as in engine.report.saved_bytes, would miss the inputs of checkpoint.
    """

    def __init__(self, model):
        super().__init__()
        self.made, self.peak = {}, 0
        self.own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        results = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own:  # not a view of a parameter
                    self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(self.sizes()))
        return results

    def sizes(self):
        """The bytes of each storage that is alive."""
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        return [size for _, size in self.made.values()]


def memory(model, recompute):
    """(sizes of the storages alive between forward and backward, most bytes alive in a step).

    Gradients are let go at once: all of them would be more than one block.
    """
    model.encoder.layers.recompute = recompute
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for parameter in own
    ]
    with Alive(model) as alive:
        loss = loss_of(model)
        kept = alive.sizes()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return kept, alive.peak


def whole_trunk(layers, x):
    """A wrong recompute: backward runs all blocks again before it goes through the first of them."""
    return vit.checkpoint(partial(torch.nn.Sequential.forward, layers), x, use_reentrant=False)


@pytest.mark.parametrize("dropout", ["plain", "adapter dropout"])
@pytest.mark.parametrize("method", [*ADAPTERS, "full"])
def test_only_the_inputs_of_the_blocks_are_kept(method, dropout, monkeypatch):
    model = make("mini", method, **DROPOUTS[dropout])
    one = BATCH * 17 * 128 * 4  # bytes of (images, tokens, dim), such as the input of a block
    blocks = len(model.encoder.layers)
    before, highest = memory(model, False)
    kept, peak = memory(model, True)
    outside = 2 + (method == "full")  # input and output of the last norm; what conv_proj reads
    assert len([size for size in kept if size >= one]) == blocks + outside
    assert sum(kept) < (blocks + outside + 0.2) * one
    inner = (sum(before) - sum(kept)) / blocks
    assert inner > 10 * one, "what is inside a block"
    for_itself = highest - sum(before)  # what a backward makes and needs for a moment
    assert peak < sum(kept) + inner + for_itself + 4 * one, "the inside of one block at a time"
    assert highest > sum(before) > 8 * sum(kept)
    monkeypatch.setattr(vit.Blocks, "forward", whole_trunk)
    kept, peak = memory(model, True)
    assert sum(kept) < (outside + 2) * one, "a control: little is kept"
    assert peak > sum(before), "but then all of it is there at once"


def test_evaluation_is_unchanged_and_runs_each_block_once(monkeypatch):
    model = make("mini", **DROPOUTS["all"]).eval()
    images, runs = torch.randn(BATCH, 3, SIZE, SIZE), []
    for block in model.encoder.layers:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    calls = noted(monkeypatch)

    def logits(recompute, mode):
        model.encoder.layers.recompute = recompute
        runs.clear(), calls.clear()
        with mode():
            return model(images), len(runs), len(calls)

    expected, *counts = logits(False, torch.inference_mode)
    assert counts == [6, 0]
    for mode in (torch.inference_mode, torch.no_grad):
        found, *counts = logits(True, mode)
        assert torch.equal(found, expected) and counts == [6, 0]
    found, *counts = logits(
        True, torch.enable_grad
    )  # the control, and gradients of a model in eval
    assert torch.equal(found, expected) and counts == [6, 6]
    found.sum().backward()
    assert len(runs) == 12


def noted(monkeypatch):
    """A list with an entry for each call of checkpoint from now on."""
    whole, calls = vit.checkpoint, []
    monkeypatch.setattr(vit, "checkpoint", lambda *a, **k: calls.append(1) or whole(*a, **k))
    return calls


def outcome(folder):
    """All that a run has saved, but for its times, its folder's name and the flag itself."""
    saved = contents(folder)
    del saved["last"]["config"]["recompute"]
    return saved


# The flags of a run's parts. All but the last part are stopped in their fourth step, of ten.
ON, OFF = ["--recompute"], []
RUNS = {
    "with": (ON,),
    "stopped": (ON, ON, ON),
    "switched off and on": (ON, OFF, ON),
    "switched on and off": (OFF, ON, ["--no-recompute"]),
}
CASES_OF_RUNS = [("lora", name) for name in RUNS] + [("loha", "stopped"), ("lokr", "stopped")]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """usual(adapter): what a run without the flag saves."""
    folder, saved = tmp_path_factory.mktemp("usual"), {}

    def run(adapter):
        if adapter not in saved:
            out = folder / adapter
            assert train.main([*FLAGS, "--adapter", adapter, "--out", str(out)]) == 0
            saved[adapter] = outcome(out)
        return saved[adapter]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "name"), CASES_OF_RUNS)
def test_a_run_ends_with_the_same_adapter(adapter, name, tmp_path, stop_after, monkeypatch, usual):
    calls = noted(monkeypatch)
    expected = usual(adapter)
    assert not calls, "the control: without the flag, nothing is run again"
    for i, part in enumerate(RUNS[name]):
        last = i == len(RUNS[name]) - 1
        stop_after(10_000 if last else 4)
        command = [*FLAGS, "--adapter", adapter, *part, "--out", str(tmp_path / "run")]
        assert train.main([*command, *["--resume"] * (i > 0)]) == (0 if last else 143)
        steps = 10 if name == "with" else 2 if last else 4
        assert len(calls) == (steps * BLOCKS if part == ON else 0)
        calls.clear()
    assert_same(expected, outcome(tmp_path / "run"))


def test_a_run_that_draws_other_numbers_in_backward_ends_otherwise(tmp_path, monkeypatch, usual):
    """The control of the test above."""
    monkeypatch.setattr(vit, "checkpoint", partial(vit.checkpoint, preserve_rng_state=False))
    assert train.main([*FLAGS, *ON, "--out", str(tmp_path / "run")]) == 0
    wanted, found = (x["adapter"][0] for x in (usual("lora"), outcome(tmp_path / "run")))
    assert len(differ(wanted, found)) > len(wanted) / 2


SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train, vit
whole, calls = vit.checkpoint, []
vit.checkpoint = lambda *a, **k: calls.append(1) or whole(*a, **k)
assert train.main(sys.argv[1:]) == 0
print(f"{{len(calls)}} calls", file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo's torchrun is for Unix")
def test_two_processes_learn_the_same_with_and_without(tmp_path, torchrun):
    """Each step has two backward passes, of which the second sends gradients. The last has one."""
    script = tmp_path / "counts.py"
    script.write_text(SCRIPT)
    flags = [*FLAGS, "--epochs", "1", "--grad-accum", "2"]
    for name, flag, calls in (("off", OFF, 0), ("on", ON, 5 * BLOCKS)):
        status, _, error = torchrun(*flags, *flag, "--out", name, script=script)
        assert status == 0, error
        assert error.count(f"\n{calls} calls") + error.startswith(f"{calls} calls") == 2, error
    assert_same(outcome(tmp_path / "off"), outcome(tmp_path / "on"))
