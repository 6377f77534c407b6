"""Files: written in one piece or not at all; tensors and JSON read, or refused in one line.

This module imports nothing of the project.
"""

import json
import os
import pickle
import re
import secrets
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It replaces path when the block ends without an error, never before."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, idle: float = 0) -> None:
    """Remove the temporary files that killed processes have left in a folder.

    idle: only those that nobody has written to for so many seconds; others may be writing in the folder.
    """
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):
            ours = re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", temporary.name)  # atomic's
            if ours and time.time() - temporary.stat().st_mtime >= idle:
                temporary.unlink()


def printable(text: str) -> str:
    """The text with ? for bytes of a file name that are not UTF-8: a terminal and matplotlib fail at them."""
    return text.encode("utf-8", "replace").decode()


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError for any other content."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def optional_json(path: Path) -> dict:
    """As read_json; an empty dict if there is no such file."""
    return read_json(path) if path.is_file() else {}


def checksum(data, start: int = 0) -> int:
    """A checksum of a NumPy array of bytes.

    It is the CRC-32 of 4,099 sums of 64-bit words, and of the bytes that remain: one of all bytes takes four
    times as long. 4,099 is a prime number, so swapped rows or pages fall into other sums.
    """
    whole = len(data) // (8 * 4099) * (8 * 4099)
    sums = data[:whole].view("int64").reshape(-1, 4099).sum(0)
    return zlib.crc32(data[whole:], zlib.crc32(sums, start))


def checksums(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """The checksum of the metadata, and of each tensor with its name, type and shape."""
    sums = {"__metadata__": zlib.crc32(json.dumps(sorted(metadata.items())).encode())}
    for name, tensor in sorted(tensors.items()):
        start = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sums[name] = checksum(tensor.reshape(-1).view(torch.uint8).numpy(), start)
    return {name: f"{number:08x}" for name, number in sums.items()}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file, with checksums in its metadata that read_tensors compares."""
    texts = {**metadata, "checksums": " ".join(checksums(tensors, metadata).values())}
    with atomic(path) as temporary:
        temporary.write_bytes(save(tensors, texts))


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a .safetensors, .pth or .bin file by name, and the metadata of a .safetensors file.

    Only tensors are unpickled. Raises FileNotFoundError, or ValueError for another kind of file, or if
    checksums do not fit; most programs write none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    metadata = {}
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}
                metadata = file.metadata() or {}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text would advise to run the file's code
        raise ValueError(
            f"{path}: not a file of tensors alone; save the model's state_dict(), or let the name of a "
            "safetensors file end in .safetensors"
        ) from None
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(f"{path}: not a file of tensors ({first_line(error)})") from None
    if stored := metadata.pop("checksums", "").split():
        found = checksums(state, metadata)
        if stored != [*found.values()]:
            pairs = zip(found.items(), stored, strict=False)
            name = next((name for (name, own), other in pairs if own != other), "checksums")
            raise ValueError(
                f"{path}: {name}: damaged, its checksum does not fit; use another copy; or, if the file "
                "was changed on purpose, remove 'checksums' from its metadata"
            )
    if not isinstance(state, dict):
        raise ValueError(
            f"{path}: expected a state dict (names and tensors), found {type(state).__name__}"
        )
    for key in (
        "model",
        "state_dict",
        "target_encoder",
    ):  # as in Facebook's files and in many others
        state = state[key] if isinstance(state.get(key), dict) else state
    for key, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(
                f"{path}: {key}: expected a tensor, found {type(tensor).__name__}; "
                "save the model's state_dict() alone"
            )
    return state, metadata


def first_line(error: Exception) -> str:
    """An error's type and the first line of its message: torch's messages have many lines."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def first_mismatch(expected: dict, found: dict) -> str | None:
    """A message about the first tensor that is missing, unexpected or of another shape; None if all fit."""
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
