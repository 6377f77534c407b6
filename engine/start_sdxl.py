"""What a run of train_sdxl.py starts from: the base model, pictures with captions, and last.pt (--resume)."""

import copy
import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engine import checkpoint, demo_sdxl, devices, sdxl, text_to_image
from engine.adapt import ADAPT, adapt, check_rank
from engine.config import refuse_changes
from engine.config_sdxl import FREE, Config, check
from engine.run import Run, check_folder, make_folder, read_last, refuse_others
from engine.text_to_image import Picture


@dataclass
class Material:
    """What a run trains on."""

    base: sdxl.Base
    train: list[Picture]
    held: list[Picture]  # for the held-out loss
    words: Callable[[list[str]], list[dict]]  # captions -> words, pooled: see sdxl.text_encoders
    latents: Callable[[list[tuple[Picture, bool]]], list[dict]]  # -> mean, std: see picture_encoder
    prompts: list[str]  # of the sample pictures

    def empty(self) -> dict[str, torch.Tensor]:
        """What the UNet reads instead of a caption that is left out."""
        (found,) = self.words([""])
        return {k: torch.zeros_like(t) for k, t in found.items()} if self.base.zeros else found

    def batch(self, pictures: list[Picture], flips: list[bool], drops: list[bool], device) -> dict:
        """mean, std (B, channels, height, width), words (B, tokens, width), pooled (B, width) and time_ids
        (B, 6) of some pictures, all float32. drops: without caption."""
        texts = self.words([picture.caption for picture in pictures])
        if any(drops):
            empty = self.empty()
            texts = [empty if drop else text for text, drop in zip(texts, drops, strict=True)]
        pairs = list(zip(pictures, flips, strict=True))
        parts = [text | latent for text, latent in zip(texts, self.latents(pairs), strict=True)]
        found = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        # Not in half precision: bfloat16 would make 833 into 832.
        found["time_ids"] = torch.tensor([picture.time_ids(flip) for picture, flip in pairs])
        return {key: tensor.to(device, torch.float32) for key, tensor in found.items()}


def prepare(config: Config) -> Run:
    """Check the config, read base and pictures, encode them, adapt the UNet, and make the run's folder.

    Raises OSError or ValueError in one line, before the folder is made.
    """
    started = time.monotonic()
    config = copy.copy(config)
    last = read_last(config)
    check(config)
    if last:
        refuse_changes(config, last["config"], FREE)
    check_folder(config)
    sdxl.libraries()
    device = devices.pick_device(devices.join(config.device))
    dtype = devices.pick_dtype(config, device)
    devices.keep_freed_memory(device)
    with devices.in_turn():
        base = sdxl.read_base(config.base)
        material = read_material(config, base, device, dtype)
    unet = sdxl.load(base, "unet", dtype)
    # Only one of several processes has encoded anything, and drawn random numbers for that.
    checkpoint.seed_generators(config.seed)
    settings = {key: getattr(config, key) for key in ADAPT if key != "bias"}
    dropouts = {"dropout": config.adapter_dropout, "module_dropout": config.module_dropout}
    try:
        trainable, total = adapt(unet, **settings, **dropouts)
    except ValueError as error:  # it names all 743 layers
        raise ValueError(f"--targets {config.targets}: {error!s:.300}") from None
    check_rank(unet, config.rank)
    with tempfile.TemporaryDirectory() as trial:  # no training for what the files have no place for
        sdxl.save_files(unet, Path(trial), config.adapter, base.name)
    if config.recompute:
        unet.enable_gradient_checkpointing()
    identity = {
        "pictures": [len(material.train), len(material.held)],
        "captions": digest(material),
        "base": base.fingerprint,
    }
    refuse_others(config, identity, last)
    folder, lock = make_folder(config, last)
    return Run(
        config=config,
        dataset=material,
        model=unet,
        info={},
        identity=identity,
        trainable=trainable,
        total=total,
        device=device,
        dtype=dtype,
        folder=folder,
        lock=lock,
        last=last,
        started=started,
    )


def read_material(config: Config, base: sdxl.Base, device, dtype) -> Material:
    """Read pictures and captions and encode them, or with --no-cache keep the encoders for each step."""
    c = config
    pictures = (
        text_to_image.read_folder(c.data_dir, c.limit)
        if c.data_dir
        else demo_sdxl.pictures(c.limit)
    )
    text_to_image.fit_buckets(pictures, c.image_size)
    train, held = text_to_image.split(pictures, c.holdout, c.seed)
    captions = list(dict.fromkeys(picture.caption for picture in [*held, *train]))
    prompts = [prompt.strip() for prompt in c.prompts.split("|")] if c.prompts else captions[:4]
    texts = list(
        dict.fromkeys(["", *prompts, *captions, *([] if c.data_dir else demo_sdxl.CAPTIONS)])
    )
    if not c.cache:
        latents = sdxl.picture_encoder(base, device, dtype, c.workers)
        return Material(
            base, train, held, sdxl.text_encoders(base, device, dtype), latents, prompts
        )
    root = Path(c.cache_dir or (Path(c.out).parent if c.out else Path("runs")) / "cache")
    kind = f"{base.fingerprint}-{str(dtype)[6:]}"
    words = sdxl.Encoded(
        root / f"captions-{kind}",
        [(text, text) for text in texts],
        lambda: sdxl.text_encoders(base, device, dtype),
        "captions",
    )
    wanted = [(picture, False) for picture in pictures]
    wanted += [(picture, True) for picture in train if c.flip]
    latents = sdxl.Encoded(
        root / f"pictures-{kind}-{c.image_size}",
        [(picture_key(*pair), pair) for pair in wanted],
        lambda: sdxl.picture_encoder(base, device, dtype, c.workers),
        "pictures",
    )
    return Material(base, train, held, words, latents, prompts)


def picture_key(picture: Picture, flipped: bool) -> str:
    """What the latents of a picture depend on, beside the VAE."""
    if isinstance(picture.source, np.ndarray):
        source = hashlib.sha256(picture.source.tobytes()).hexdigest()
    else:
        file = Path(picture.source)
        stat = file.stat()
        source = f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return f"{source} {picture.resized} {picture.bucket} {flipped}"


def digest(material: Material) -> str:
    """A hash of captions and sizes, by which a resumed run knows its pictures."""
    texts = [f"{p.caption} {p.size}" for p in [*material.train, *material.held]]
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]
