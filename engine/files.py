"""Files: written in one piece or not at all; tensors and JSON read, or refused in one line."""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of path once all is written, and never before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, idle: float = 0) -> None:
    """Remove what processes that were killed while they wrote have left in a folder. Where others may be
    writing, idle: only what nobody has written to for so many seconds."""
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):
            ours = re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", temporary.name)  # atomic's
            if ours and time.time() - temporary.stat().st_mtime >= idle:
                temporary.unlink()


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises ValueError for another one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def optional_json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def read_tensors(path: Path) -> tuple[dict, dict]:
    """The tensors of a .safetensors, .pth or .bin file and, from the first, its metadata.

    Nothing is unpickled but tensors. Raises FileNotFoundError, or ValueError for another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected a .safetensors, .pth or .bin file, or a folder with one"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(f"{path}: not a file of tensors ({first_line(error)})") from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: expected a state dict (names and tensors), found {type(state).__name__}"
        )
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path}: {key}: expected a tensor, found {type(tensor).__name__}; "
                "save the model's state_dict() alone"
            )
    return state, {}


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says: torch's run to many."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def first_mismatch(expected: dict, found: dict) -> str | None:
    """What is wrong with the first tensor that is missing, too many or of another shape; else None."""
    for key in [*expected, *found]:
        if key not in found:
            return f"{key}: expected shape {tuple(expected[key].shape)}, found no such tensor"
        if key not in expected:
            return f"{key}: expected no such tensor, found shape {tuple(found[key].shape)}"
        if expected[key].shape != found[key].shape:
            return (
                f"{key}: expected shape {tuple(expected[key].shape)}, "
                f"found {tuple(found[key].shape)}"
            )
    return None
