"""A damaged file is refused in one line, or made anew. Never is it trained on or predicted with."""

import gzip
import json
import os
import random

import numpy as np
import pytest
import torch
from adapters import randomise
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import data
from engine import checkpoint, images, weights
from engine.files import checksum, read_tensors, write_tensors
from engine.peft_folder import read_peft, save_peft
from lora import LoRALinear, mark_trainable, replace_linear


def adapter(tmp_path, monkeypatch):
    file = tmp_path / "adapter.safetensors"
    tensors = {f"{i}.lora_A": torch.randn(4, 30 + i) for i in range(9)}
    texts = dict.fromkeys(checkpoint.TEXTS, "lora")
    info = {**dict.fromkeys(checkpoint.NEEDED, 4), **texts, "classes": ["cat", "dög"]}
    checkpoint.write_adapter(file, tensors, info)
    return [file], lambda: checkpoint.read_adapter(file)


def resume(tmp_path, monkeypatch):
    file, model = tmp_path / "last.pt", nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu")
    model(torch.randn(2, 40)).sum().backward()
    optimizer.step()
    identity = {"classes": [f"class {i}" for i in range(1000)]}  # as large as the rest
    rest = {"config": {"rank": 4, "lr": 0.005}, "identity": identity, "step": 7}
    checkpoint.save_resume(file, model, optimizer, scaler, rest)
    return [file], lambda: checkpoint.read_resume(file)


def resume_without_tensors(tmp_path, monkeypatch):
    (file,), _ = resume(tmp_path, monkeypatch)

    def load():
        content = checkpoint.read_resume(file, mmap=True)
        return {key: content[key] for key in ("config", "identity", "step")}

    return [file], load


def trunk(tmp_path, monkeypatch):
    file = tmp_path / "trunk.safetensors"
    file.write_bytes(weights.EMBEDDED.read_bytes())
    monkeypatch.setattr(weights, "EMBEDDED", file)

    def load():
        pretrained = weights.read("embedded")
        return pretrained.state, pretrained.shape, pretrained.images

    return [file], load


def digits(tmp_path, monkeypatch, limit=60):
    files = []
    for part, start in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((data.ASSETS / f"digits-{part}-ubyte.gz").read_bytes())
        row = (len(content) - start) // 10_000
        head = content[:4] + limit.to_bytes(4, "big") + content[8:start]
        files.append(tmp_path / f"digits-{part}-ubyte.gz")
        files[-1].write_bytes(gzip.compress(head + content[start : start + limit * row]))
    monkeypatch.setattr(data, "ASSETS", tmp_path)

    def load():
        splits, classes = data.demo(None)
        return {key: (split.pixels, split.labels) for key, split in splits.items()}, classes

    return files, load


def all_digits(tmp_path, monkeypatch):
    return digits(tmp_path, monkeypatch, 10_000)


def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and no test of this
    generator, sources = np.random.default_rng(0), [tmp_path / f"{i}.png" for i in range(20)]
    for source in sources:
        Image.fromarray(generator.integers(0, 255, (40, 40, 3), np.uint8)).save(source)
    sources[7].write_bytes(b"no image")

    def load():
        split = images.Split(np.zeros(20), [*map(str, sources)])
        images.keep(split, tmp_path / "cache")
        return np.array(split.pixels), [*split.bad]

    load()
    return sorted((tmp_path / "cache").iterdir()), load


def peft(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    replace_linear(model, lambda linear: LoRALinear(linear, rank=3, alpha=8.0), head="2")
    mark_trainable(model, "2")
    save_peft(randomise(model), tmp_path / "peft", head="2", base="google/vit")
    return sorted((tmp_path / "peft").iterdir()), lambda: read_peft(tmp_path / "peft")


def same(a, b):
    """True if two nested values are equal, their tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = (t.reshape(-1).view(torch.uint8).numpy() for t in (a, b))
    if isinstance(a, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def damaged(content, draw):
    """The content with one bit flipped, nine times in ten, or cut off. Every other flip is near an end, where
    formats keep their headers."""
    place = draw.randrange(len(content))
    if draw.random() < 0.1:
        return content[:place]
    if draw.random() < 0.5:
        place = draw.choice([place % 2000, -1 - place % 2000]) % len(content)
    flipped = bytearray(content)
    flipped[place] ^= 1 << draw.randrange(8)
    return bytes(flipped)


KINDS = [adapter, resume, resume_without_tensors, trunk, digits, cache, peft]


@pytest.mark.parametrize("kind", [*KINDS, pytest.param(all_digits, marks=pytest.mark.slow)])
def test_damage_is_refused_in_one_line_or_harmless(kind, tmp_path, monkeypatch, capsys):
    files, load = kind(tmp_path, monkeypatch)
    for file in files:
        content, whole, draw, refused = file.read_bytes(), load(), random.Random(16), 0
        for attempt in range(200):
            file.write_bytes(damaged(content, draw))
            try:
                found = load()
            except (ValueError, OSError) as error:
                refused += 1
                assert file.name in str(error) and "\n" not in str(error), (attempt, error)
            else:
                assert same(found, whole), attempt
        file.write_bytes(content)
        if kind is not cache:
            assert same(load(), whole) and refused > 50, refused
            continue
        assert refused == 0, "a damaged cache is made anew"
        said = capsys.readouterr().out
        assert "damaged, it is made anew" in said or file.suffix != ".pixels"


@pytest.mark.parametrize("tensor", [True, False])
def test_the_line_names_file_tensor_and_what_to_do(tensor, tmp_path, monkeypatch):
    (file,), load = adapter(tmp_path, monkeypatch)
    content = file.read_bytes()
    old, new = (b'"rank":"4"', b'"rank":"5"') if not tensor else (content[-5:], b"12345")
    file.write_bytes(content.replace(old, new))
    with pytest.raises(
        ValueError, match="damaged, its checksum does not fit; use another copy"
    ) as e:
        load()
    assert str(e.value).startswith(f"{file}: {'8.lora_A' if tensor else '__metadata__'}: damaged")
    (file,), load = resume(tmp_path, monkeypatch)
    content = file.read_bytes()
    bits = np.asarray(torch.load(file, weights_only=True)["tensors"]["1.weight"]).tobytes()
    assert bits in content
    file.write_bytes(content.replace(bits, bits[::-1]))
    with pytest.raises(
        ValueError, match=r"last\.pt: .*Bad CRC-32 for file 'archive/data/\d+'.* use"
    ):
        load()


def test_a_tensor_marked_as_a_folder_is_refused(tmp_path, monkeypatch):
    """One bit, with which torch.load returns what was in memory, although the tensor's bytes are intact."""
    (file,), load = resume(tmp_path, monkeypatch)
    content = bytearray(file.read_bytes())
    content[content.rindex(b"archive/data/0") - 46 + 38] ^= 0x10
    file.write_bytes(content)
    torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match=r"Bad attributes for file 'archive/data/0'"):
        load()


def test_files_without_checksums_load(tmp_path, monkeypatch):
    (file,), load = adapter(tmp_path, monkeypatch)
    tensors, info = load()
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    del metadata["checksums"]
    save_file(tensors := {key: t.clone() for key, t in tensors.items()}, file, metadata)
    assert same(load(), (tensors, info)) and "checksums" not in info
    (index, _), load = cache(tmp_path, monkeypatch)
    content = json.loads(index.read_text())
    del content["checksum"]
    index.write_text(json.dumps(content))
    before = index.stat().st_mtime_ns
    load()
    assert index.stat().st_mtime_ns == before


@pytest.mark.parametrize("rows", [3, 3000])  # below and above the number of sums
def test_the_checksum_depends_on_each_bit_and_place(rows):
    draw, content = random.Random(0), np.random.default_rng(0).integers(0, 255, (rows, 64), "u1")
    contents = {content.tobytes()}
    for n in range(200):
        changed = content.copy()
        if n % 2:
            changed[draw.randrange(rows), draw.randrange(64)] ^= 1 << draw.randrange(8)
        else:
            pair = draw.sample(range(rows), 2)
            changed[pair] = content[pair[::-1]]
        contents.add(changed.tobytes())
    sums = {checksum(np.frombuffer(changed, np.uint8)) for changed in contents}
    assert len(sums) == len(contents) > 90


def test_tensors_of_every_type_and_shape_have_checksums(tmp_path):
    types = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(t): torch.randn(9000, 3).to(t) for t in types}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "odd": torch.randn(1)}
    write_tensors(tmp_path / "t.safetensors", tensors, {})
    assert same(read_tensors(tmp_path / "t.safetensors")[0], tensors)
