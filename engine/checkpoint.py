"""The adapter file, which rebuilds a trained model, and last.pt, which resumes a run.

adapter.safetensors holds the trained tensors (adapter, head, biases; with --adapter full the whole model)
under their names in the model. Its metadata holds what rebuilds the model around them: adapter, rank, alpha,
targets and the other arguments of adapt; shape and weights, the arguments of vit.build; trunk, a hash of the
frozen tensors; classes; preprocessing. Metadata is text: every value except TEXTS is written as JSON.

last.pt holds a run between two steps: trained tensors, optimizer, loss scaler, random generators, and what
the run adds. It is read without unpickling objects.
"""

import hashlib
import io
import json
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.adapt import ADAPT
from engine.devices import out_of_memory
from engine.files import atomic, first_line, first_mismatch, read_tensors, write_tensors

FOREIGN = {  # the first letters of other tools' tensors, and what they are
    "lora_": "a file for image generators, see docs/other-tools.md",
    "lycoris_": "a file for image generators, see docs/other-tools.md",
    "base_model.model.": "the tensors of a PEFT folder; name the folder, with its adapter_config.json",
}
ADAPTER_FILE = "adapter.safetensors"  # in a run's folder
TEXTS = ("adapter", "bias", "model", "weights", "trunk")
NEEDED = (*ADAPT, "weights", "seed", "trunk", "classes", "preprocessing")


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and values of the frozen parameters: it identifies the trunk of an adapter.

    It leaves out the position embedding. That is interpolated for another image size, and processors round
    differently.
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
    """Give the trainable tensors of the model these values: the opposite of trained."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tensors[name])


def save_adapter(path: str | Path, model: nn.Module, info: dict) -> None:
    """Write the trainable tensors of the model with info as metadata, in one piece or not at all."""
    write_adapter(path, trained(model), info)


def write_adapter(path: str | Path, tensors: dict[str, torch.Tensor], info: dict) -> None:
    """As save_adapter, for the tensors that trained returned."""
    metadata = {key: value if key in TEXTS else json.dumps(value) for key, value in info.items()}
    write_tensors(Path(path), tensors, metadata)


def read_adapter(path: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the info of an adapter file; path may be the folder of its run.

    Raises FileNotFoundError, or ValueError if it is damaged, of another kind or lacks a part of its info.
    """
    path = Path(path)
    path = path / ADAPTER_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such adapter file")
    tensors, metadata = read_tensors(path)
    for start, advice in FOREIGN.items():
        if next(iter(tensors), "").startswith(start):
            raise ValueError(f"{path}: expected an adapter file, found {advice}")
    for key in NEEDED:
        if key not in metadata:
            raise ValueError(f"{path}: expected {key!r} in the metadata, found {sorted(metadata)}")
    info = {}
    for key, value in metadata.items():
        try:
            info[key] = value if key in TEXTS else json.loads(value)
        except ValueError:
            raise ValueError(f"{path}: metadata {key}: expected JSON, found {value!r}") from None
    return tensors, info


def restore(model: nn.Module, tensors: dict, info: dict, path: str | Path) -> None:
    """Put the tensors of an adapter file into a model that was adapted the same way.

    Raises ValueError, with the model unchanged, if a tensor or the trunk does not fit.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if problem := first_mismatch(trainable, tensors):
        raise ValueError(f"{path}: {problem}")
    # A random trunk is drawn from its seed, and processors round it differently: not compared.
    if info["weights"] != "none" and (found := fingerprint(model)) != info["trunk"]:
        raise ValueError(
            f"{path}: trunk: expected {info['trunk']} (weights {info['weights']!r}), found {found}; "
            "the adapter was trained on other weights"
        )
    put(model, tensors)


def seed_generators(seed: int) -> None:
    """Start every random generator that a library may draw from. seed: 0..2**32 - 1."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def generators() -> dict:
    """The states of the random generators, as types that torch.load reads without unpickling objects."""
    name, words, *rest = np.random.get_state()  # noqa: NPY002 (what libraries draw from)
    return {
        "python": random.getstate(),
        "numpy": (name, words.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_generators(states: dict) -> None:
    """Restore the random generators; those of GPUs only if the number of GPUs is the same."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def save_resume(path: Path, model: nn.Module, optimizer, scaler, rest: dict) -> None:
    """Write the resume file, in one piece or not at all: all that a step changes, and rest.

    Raises OSError if it cannot be written. Raises FloatingPointError, with the file unchanged, if a trained
    tensor is not finite: nobody wants to resume from there.
    """
    tensors = trained(model)
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise FloatingPointError(f"{bad[0]} is not finite")
    state = {
        "tensors": tensors,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "generators": generators(),
    }
    content = io.BytesIO()  # if the disk is full, torch.save to a file only says that it failed
    torch.save(state | rest, content)
    with atomic(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def read_resume(path: Path, mmap: bool = False) -> dict:
    """The content of a resume file, on the CPU. Raises ValueError if it is another kind of file, or damaged.

    mmap: leave the tensors on disk, unchecked, when only the metadata is needed.
    """
    try:
        with ThreadPoolExecutor(1) as pool:  # meanwhile, or it would take half as long again
            intact = pool.submit(check_archive, path, not mmap)
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            finally:
                intact.result()
        missing = {"config", "identity", "step", "tensors"} - content.keys()
    except Exception as error:  # wrong bytes are met with errors of any type
        if out_of_memory(error) or getattr(error, "filename", None):
            raise
        raise ValueError(
            f"{path}: not a resume file ({first_line(error)}), or damaged; use another copy of it, or remove "
            "it and start again"
        ) from None
    if "done" in content and "step" in missing:
        raise ValueError(
            f"{path}: an earlier version of this project wrote it; finish the run with that version, or name "
            "another --out"
        )
    if missing:
        raise ValueError(f"{path}: not a resume file (it has no {', '.join(sorted(missing))})")
    return content


def check_archive(path: Path, tensors: bool) -> None:
    """Compare the CRC-32 of each member of torch.save's zip archive, which torch.load does not.

    Raises an error that names the first damaged member. tensors: compare those of the tensors too.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if tensors or "/data/" not in member.filename:
                archive.read(member)
            if member.external_attr:  # torch.load leaves the tensor of a "folder" uninitialised
                raise zipfile.BadZipFile(f"Bad attributes for file {member.filename!r}")


def restore_resume(content: dict, model: nn.Module, optimizer, scaler) -> None:
    """Restore what save_resume was given, bit for bit."""
    put(model, content["tensors"])
    optimizer.load_state_dict(content["optimizer"])
    if content["scaler"] and scaler.is_enabled():  # empty without fp16
        scaler.load_state_dict(content["scaler"])
    set_generators(content["generators"])
