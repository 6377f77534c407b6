"""The adapter file, what training changed and all that is needed to rebuild the model around it; and the
resume file, all that is needed to go on training beside images and trunk.

adapter.safetensors holds the tensors that were trained (adapter, head, biases; with --adapter full
the whole model) under their names in the model. Its metadata, all strings, say the rest: adapter,
rank, alpha, targets and the other arguments of adapt; model and weights, the arguments of vit.build;
trunk, a hash of the frozen tensors; eps, of its LayerNorms; classes and preprocessing. All but TEXTS are
written as JSON.

    model, info = load_adapter("runs/x/adapter.safetensors")      # in eval mode

last.pt, the resume file, holds a run between two steps: the trained tensors, optimizer, loss scaler and
random generators, and what train.py adds of its own. It is read without unpickling objects.
"""

import hashlib
import io
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

import vit
from engine.adapt import ADAPT, adapt
from engine.devices import out_of_memory
from engine.files import atomic, first_mismatch, read_tensors

ADAPTER_FILE = "adapter.safetensors"  # in a run's folder
TEXTS = ("adapter", "bias", "model", "weights", "trunk")  # stand in the metadata as they are


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and values of the frozen parameters: which trunk an adapter belongs to.

    The position embedding is left out: for another image size it is interpolated, and processors
    differ in how they round that.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and name != "encoder.pos_embedding":
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trainable tensors of the model by name, copied to the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True).contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def put(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The opposite of trained: give the trainable tensors of the model these values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])


def save_adapter(path: str | Path, model: nn.Module, info: dict) -> None:
    """Write the trainable tensors of the model, with info as metadata, in one piece or not at all."""
    write_adapter(path, trained(model), info)


def write_adapter(path: str | Path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """As save_adapter, for tensors that trained returned."""
    metadata = {key: value if key in TEXTS else json.dumps(value) for key, value in info.items()}
    with atomic(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def read_adapter(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the info of an adapter file, or of the one in a run's folder.

    Raises FileNotFoundError, or ValueError if it is another kind of file or lacks part of its info.
    """
    path = Path(path)
    path = path / ADAPTER_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    tensors, metadata = read_tensors(path)
    needed = (*ADAPT, "model", "weights", "seed", "trunk", "classes", "preprocessing")
    for key in needed:
        if key not in metadata:
            raise ValueError(f"{path}: expected {key!r} in the metadata, found {sorted(metadata)}")
    info = {}
    for key, value in metadata.items():
        try:
            info[key] = value if key in TEXTS else json.loads(value)
        except ValueError:
            raise ValueError(f"{path}: metadata {key}: expected JSON, found {value!r}") from None
    return tensors, info


def restore(model: nn.Module, path: str | Path) -> dict:
    """Load an adapter file into a model that was adapted the same way; return its info.

    Raises ValueError, with the model unchanged, if a tensor or the trunk does not fit.
    """
    tensors, info = read_adapter(path)
    copy_tensors(model, tensors, info, path)
    return info


def copy_tensors(model: nn.Module, tensors: dict, info: dict, path: str | Path) -> None:
    """Put the tensors of an adapter file where they belong, or raise ValueError: see restore."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if problem := first_mismatch(trainable, tensors):
        raise ValueError(f"{path}: {problem}")
    # A random trunk comes from its seed, and processors differ in how they round that: not compared.
    if info["weights"] != "none" and (found := fingerprint(model)) != info["trunk"]:
        raise ValueError(
            f"{path}: trunk: expected {info['trunk']} (weights {info['weights']!r}), found {found}; "
            "the adapter was trained on other weights"
        )
    put(model, tensors)


def load_adapter(
    path: str | Path, weights: str | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict]:
    """Rebuild the trained model from its adapter file: (model in eval mode, info).

    weights: where the trunk's weights are now, if not where they were in training.
    info: adapter, rank, alpha, targets, model, weights, classes, preprocessing and what else adapt needs.
    Raises OSError or ValueError, naming the file and the key, for what is missing or does not fit.
    """
    tensors, info = read_adapter(path)
    weights = weights or ("none" if info["adapter"] == "full" else info["weights"])
    size, seed = info["preprocessing"]["image_size"], info["seed"]
    try:
        # eps is the trunk's, but with --adapter full there is none to say so
        model, _ = vit.build(
            info["model"], weights, len(info["classes"]), size, seed=seed, eps=info.get("eps")
        )
        adapt(model, **{key: info[key] for key in ADAPT})
    except (ValueError, OSError) as error:
        # Not type(error): a subclass such as JSONDecodeError takes other arguments.
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        raise kind(f"{path}: {error}") from None
    copy_tensors(model, tensors, info, path)
    return model.to(device).eval(), info


def seed_generators(seed: int) -> None:
    """Start every random generator that a library may draw from. seed: 0..2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def generators() -> dict:
    """The states of the random generators, of kinds that torch.load reads without unpickling objects."""
    name, words, *rest = np.random.get_state()  # noqa: NPY002 (what libraries draw from)
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict) -> None:
    """Put the random generators back; those of GPUs only where there are as many."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_resume(path: Path, model: nn.Module, optimizer, scaler, rest: dict) -> None:
    """Write the resume file, in one piece or not at all: rest, and all else that a step changes.

    Raises OSError if it cannot be written, FloatingPointError, with the file as it was, if a trained
    tensor is not finite: nobody wants to go on from there.
    """
    tensors = trained(model)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} is not finite")
    parts = {
        "tensors": tensors,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "generators": generators(),
    }
    content = io.BytesIO()  # straight to a file, torch.save says of a full disk only that it failed
    torch.save(parts | rest, content)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_resume(path: Path, mmap: bool = False) -> dict:
    """The content of a resume file, on the CPU. Raises ValueError if it is another kind of file.

    mmap: leave the tensors on the disk, for who wants to know only what the file is of.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if missing := {"config", "identity", "tensors"} - content.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        return content
    except OSError:
        raise
    except Exception as error:  # wrong bytes are met with errors of any type
        if out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{path}: not a resume file ({reason})") from None


def restore_resume(content: dict, model: nn.Module, optimizer, scaler) -> None:
    """Put what save_resume was given back, as it was to the bit."""
    put(model, content["tensors"])
    optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] and scaler.is_enabled():  # without fp16 there is nothing in it
        scaler.load_state_dict(content["scaler"])
    set_generators(content["generators"])
