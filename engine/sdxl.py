"""Stable Diffusion XL as diffusers saves it: what is refused, its parts, and what they make of captions,
pictures and noise.

The parts come into memory one after another: the text encoders, then the VAE, then the UNet. What the first
two make is kept on disk (Encoded), so that a run needs them once and not beside the UNet.
"""

import gc
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from engine.checkpoint import ADAPTER_FILE
from engine.files import first_line, read_json, read_tensors, write_tensors
from engine.images import progress, usable
from engine.kohya import save_diffusers_lora, save_kohya
from engine.peft_folder import save_peft
from engine.text_to_image import Picture, few
from engine.weights import is_hub_name

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "toy_sdxl"
WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
TEXTS = (
    "model_index.json",
    "scheduler/*",
    "tokenizer*/*",
    *(f"{part}/config.json" for part in WEIGHTS),
)
CHUNK = 256  # captions or pictures in a file of Encoded
IN_MEMORY = 2**30  # bytes of such files; more are read from the disk in each step


def libraries():
    """(diffusers, transformers), which nothing else in this project needs."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise ValueError(f"{error}; run: pip install -r requirements-sdxl.txt") from None
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return diffusers, transformers


@dataclass
class Base:
    """A base model's folder, and what its configurations say."""

    folder: Path
    name: str  # as --base names it, with an absolute path
    scheduler: dict
    zeros: bool  # a prompt that is left out is zeros; else it is the encoders' ""
    channels: int  # of the latents
    scale: int  # pixels of a latent's side
    velocity: bool  # the UNet predicts v; else the noise
    alpha_bar: (
        torch.Tensor
    )  # (timesteps,) float32: the share of the picture's variance in a noisy picture
    fingerprint: str

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of (height, width) pixels."""
        return self.channels, size[0] // self.scale, size[1] // self.scale


def read_base(name: str) -> Base:
    """Find a base model. Raises OSError, or ValueError, naming file and key, if it is none that we train."""
    folder = find(name)
    index = read_json(must_exist(folder / "model_index.json"))
    files = [f"{part}/config.json" for part in WEIGHTS] + ["scheduler/scheduler_config.json"]
    unet, vae, _, text, scheduler = (read_json(must_exist(folder / file)) for file in files)
    numbers = 6 * (unet.get("addition_time_embed_dim") or 0) + text.get("projection_dim", 0)
    channels = vae.get("latent_channels")
    kind = scheduler.get("_class_name", "")
    given = ("shift_factor", "latents_mean", "latents_std")
    rules = [
        ("model_index.json", "_class_name", index, "StableDiffusionXLPipeline"),
        (files[0], "addition_embed_type", unet, "text_time"),
        (
            files[0],
            "projection_class_embeddings_input_dim",
            unet,
            numbers,
        ),  # the refiner's is smaller
        (files[0], "in_channels", unet, channels),  # more for inpainting
        (files[0], "time_cond_proj_dim", unet, None),  # distilled with guidance
        *((files[1], key, vae, None) for key in given),
        (files[-1], "rescale_betas_zero_snr", scheduler, False),
        (files[-1], "timestep_type", scheduler, "discrete"),
        (files[-1], "trained_betas", scheduler, None),
    ]
    usual = {"rescale_betas_zero_snr": False, "timestep_type": "discrete"}
    for file, key, config, expected in rules:
        found = config.get(key, usual.get(key))
        if found != expected:
            raise ValueError(
                f"{folder / file}: {key}: expected {expected}, found {found}; train_sdxl.py does not train "
                "this variant of Stable Diffusion"
            )
    prediction = scheduler.get("prediction_type", "epsilon")
    if (
        prediction not in ("epsilon", "v_prediction")
        or "beta_start" not in scheduler
        or "EDM" in kind
    ):
        raise ValueError(
            f"{folder / files[-1]}: expected beta_start and prediction_type epsilon or v_prediction, found "
            f"{kind} with prediction_type {prediction}"
        )
    named = name if name == "embedded" or is_hub_name(name) else str(Path(name).absolute())
    diffusers, _ = libraries()
    return Base(
        folder=folder,
        name=named,
        scheduler=scheduler,
        zeros=index.get("force_zeros_for_empty_prompt", True),
        channels=channels,
        scale=2 ** (len(vae["block_out_channels"]) - 1),
        velocity=prediction == "v_prediction",
        alpha_bar=diffusers.DDPMScheduler.from_config(scheduler).alphas_cumprod,
        fingerprint=fingerprint(folder),
    )


def find(name: str) -> Path:
    """The folder of a base model, downloaded to Hugging Face's cache if it is not here."""
    if name == "embedded" or not is_hub_name(name):
        folder = EMBEDDED if name == "embedded" else Path(name)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"--base {name}: no such folder; expected one as diffusers saves it, OWNER/NAME on Hugging "
                "Face, or embedded"
            )
        return folder
    libraries()
    from huggingface_hub import snapshot_download

    for end in (".fp16.safetensors", ".safetensors"):  # half the size, where there is such a file
        patterns = [*TEXTS, *(f"{part}/*{end}" for part in WEIGHTS)]
        try:
            folder = Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # requests', httpx', the hub's own
            raise OSError(
                f"--base {name}: not on this machine, and cannot be downloaded ({first_line(error):.200}); "
                f"run: hf download {name}, or name its folder with --base"
            ) from None
        if all(any((folder / part).glob(f"*{end}")) for part in WEIGHTS):
            break
    return folder


def must_exist(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; expected the folder of a StableDiffusionXLPipeline (one .safetensors "
            "file of ComfyUI or A1111: diffusers' from_single_file and save_pretrained make the folder)"
        )
    return file


def fingerprint(folder: Path) -> str:
    """A hash of the settings and tokenizers, and of the weights' sizes, beginnings, middles and ends: reading
    7 GB would take long."""
    digest = hashlib.sha256()
    texts = {
        file for text in TEXTS for file in folder.glob(text) if file.suffix in (".json", ".txt")
    }
    for file in sorted(texts):
        digest.update(f"{file.relative_to(folder)} ".encode() + file.read_bytes())
    for file in sorted(file for part in WEIGHTS for file in weight_files(folder, part)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}".encode())
        with open(file, "rb") as content:
            for start in (0, size // 2, max(0, size - 2**20)):
                content.seek(start)
                digest.update(content.read(2**20))
    return digest.hexdigest()[:16]


def weight_files(folder: Path, part: str) -> list[Path]:
    """The weights of a part: those in half precision if there are any, as find downloads them."""
    files = sorted((folder / part).glob("*.safetensors"))
    return [file for file in files if ".fp16" in file.name] or files


def load(base: Base, part: str, dtype: torch.dtype) -> nn.Module:
    """A part of the base model with its pretrained weights, frozen, in eval mode."""
    diffusers, transformers = libraries()
    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    half = any(".fp16" in file.name for file in weight_files(base.folder, part))
    how = {"variant": "fp16" if half else None, "use_safetensors": True}
    how["dtype" if part.startswith("text") else "torch_dtype"] = dtype
    try:
        model = kinds[part].from_pretrained(base.folder / part, local_files_only=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{base.folder / part}: cannot be loaded ({first_line(error):.300})"
        ) from None
    return model.requires_grad_(False).eval()


def text_encoders(base: Base, device, dtype) -> Callable[[list[str]], list[dict]]:
    """A function from captions to what the UNet reads of each: words (tokens, width) and pooled (width,).

    words: the last hidden states but one of both text encoders, side by side. pooled: the second's.
    """
    _, transformers = libraries()
    models = [load(base, part, dtype).to(device) for part in WEIGHTS[2:]]
    tokenizers = [
        transformers.CLIPTokenizer.from_pretrained(base.folder / name, local_files_only=True)
        for name in ("tokenizer", "tokenizer_2")
    ]

    named = set()  # captions that are too long are named once

    @torch.no_grad()
    def encode(captions: list[str]) -> list[dict[str, torch.Tensor]]:
        found, long = [], {}
        for start in range(0, len(captions), 16):
            some, words = captions[start : start + 16], []
            for tokenizer, model in zip(tokenizers, models, strict=True):
                length = tokenizer.model_max_length
                whole = tokenizer(some).input_ids
                long |= {c: None for c, ids in zip(some, whole, strict=True) if len(ids) > length}
                how = {"padding": "max_length", "max_length": length, "truncation": True}
                tokens = tokenizer(some, return_tensors="pt", **how).input_ids.to(device)
                output = model(tokens, output_hidden_states=True)
                words.append(output.hidden_states[-2])
            pairs = zip(torch.cat(words, -1), output.text_embeds, strict=True)
            found += [{"words": w.cpu().clone(), "pooled": p.cpu().clone()} for w, p in pairs]
        if long := [caption for caption in long if caption not in named]:
            named.update(long)
            cut = [f"{caption[:40]!r}" for caption in long]
            print(
                f"{len(long)} captions are longer than {length} tokens, their ends are cut off: {few(cut)}"
            )
        return found

    return encode


def picture_encoder(
    base: Base, device, dtype, workers: int | None
) -> Callable[[list[tuple[Picture, bool]]], list[dict]]:
    """A function from (picture, flipped) to mean and std (channels, height, width) of its latents, scaled.

    The VAE computes in float32: SDXL's own one overflows in float16, which makes black pictures.
    dtype: of the run; the latents are kept in float32 or float16.
    """
    vae = load(base, "vae", torch.float32).to(device)
    kept = torch.float32 if dtype == torch.float32 else torch.float16

    @torch.no_grad()
    def encode(wanted: list[tuple[Picture, bool]]) -> list[dict[str, torch.Tensor]]:
        found, reasons = [{} for _ in wanted], []
        height, width = max((p.bucket for p, _ in wanted), default=(1, 1))
        size = max(1, min(64, 2**20 // (height * width)))
        order = sorted(range(len(wanted)), key=lambda i: wanted[i][0].bucket)
        with ThreadPoolExecutor(max(1, usable(workers))) as pool:
            for rows in same_bucket(order, wanted, size):
                tasks = [pool.submit(wanted[i][0].pixels, wanted[i][1]) for i in rows]
                reasons += [str(error) for task in tasks if (error := task.exception())]
                if reasons:
                    continue  # read on, to name all broken files at once
                pixels = torch.stack([task.result() for task in tasks])
                latents = vae.encode(pixels.to(device)).latent_dist
                for i, mean, std in zip(rows, latents.mean, latents.std, strict=True):
                    pair = {"mean": mean, "std": std}
                    scaled = {k: vae.config.scaling_factor * t for k, t in pair.items()}
                    found[i] = {k: t.to("cpu", kept).contiguous() for k, t in scaled.items()}
        if reasons:
            raise ValueError(
                f"{len(reasons)} pictures cannot be read; remove them: {'; '.join(reasons[:3])}"
            )
        return found

    return encode


def same_bucket(order: list[int], wanted: list, size: int) -> list[list[int]]:
    """Groups of at most `size` neighbours in order, whose pictures have one bucket."""
    groups: list[list[int]] = []
    for i in order:
        last = groups[-1] if groups else []
        if last and len(last) < size and wanted[last[0]][0].bucket == wanted[i][0].bucket:
            last.append(i)
        else:
            groups.append([i])
    return groups


class Encoded:
    """What an encoder makes of items, kept in files of a folder. Files are checked when they are opened.

    encoded(items) -> a dict of tensors for each item. Of a folder, only files with items of this run are kept
    open; items that it lacks are encoded first, so that a run that was killed does not begin again.
    """

    def __init__(self, folder: Path, pairs: list[tuple[str, object]], load: Callable, what: str):
        """pairs: items with their keys, which say what an item depends on; of several items with one key, one
        is encoded. load: returns the encoder."""
        folder.mkdir(parents=True, exist_ok=True)
        self.keys = {self.hashable(item): key for key, item in pairs}
        items = dict(pairs)
        self.places: dict[str, tuple] = {}  # of a key: how to read its file, its number there
        self.bytes = 0  # of the files
        for file in sorted(folder.glob("*.safetensors")):
            self.open(file, items)
        missing = [key for key in items if key not in self.places]
        encode = load() if missing else None
        for start in progress(range(0, len(missing), CHUNK), desc=what):
            keys = missing[start : start + CHUNK]
            found = encode([items[key] for key in keys])
            tensors = {f"{i} {k}": t for i, part in enumerate(found) for k, t in part.items()}
            name = hashlib.sha256("\n".join(keys).encode("utf-8", "surrogateescape")).hexdigest()[
                :16
            ]
            file = folder / f"{name}.safetensors"
            write_tensors(file, tensors, {"keys": json.dumps(keys)})
            self.open(file, items)
        if encode:
            del encode
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @staticmethod
    def hashable(item) -> object:
        return (id(item[0]), item[1]) if isinstance(item, tuple) else item

    def open(self, file: Path, items: dict) -> None:
        """Note where the file's items are. A damaged file is removed: its items are encoded again."""
        try:
            with safe_open(file, framework="pt") as content:
                keys = json.loads((content.metadata() or {})["keys"])
            if items.keys() & set(keys):
                tensors, _ = read_tensors(file)  # compares the checksums
                self.bytes += file.stat().st_size
                if self.bytes > IN_MEMORY:
                    tensors = safe_open(file, framework="pt")
                get = tensors.__getitem__ if isinstance(tensors, dict) else tensors.get_tensor
                self.places |= {key: (get, i) for i, key in enumerate(keys)}
        except Exception as error:  # wrong bytes are met with errors of any type
            print(f"{file}: damaged ({first_line(error):.100}); its content is encoded again")
            with suppress(OSError):
                file.unlink()

    def __call__(self, items: list) -> list[dict[str, torch.Tensor]]:
        found = []
        for item in items:
            get, i = self.places[self.keys[self.hashable(item)]]
            names = ("words", "pooled") if isinstance(item, str) else ("mean", "std")
            found.append({name: get(f"{i} {name}") for name in names})
        return found


def save_files(unet: nn.Module, folder: Path, adapter: str, base: str) -> None:
    """Write a UNet's adapters into a folder, in place of earlier ones: unet/ for PEFT, ADAPTER_FILE for image
    generators, and LoRA for diffusers too. Raises ValueError for an adapter that a file has no place for."""
    for left in folder.glob(".new-*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
        new = Path(name)
        save_peft(unet, new / "unet", base=base)
        save_kohya(unet, new / ADAPTER_FILE)
        if adapter == "lora":
            save_diffusers_lora(unet, new)
        for path in list(new.iterdir()):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            path.replace(folder / path.name)


class Sampler:
    """Draws pictures with diffusers' pipeline, from noise and what the text encoders made of prompts."""

    def __init__(self, base: Base, unet: nn.Module, device, config):
        """config: with image_size, sample_steps, guidance."""
        diffusers, _ = libraries()
        size = config.image_size
        self.vae = load(base, "vae", torch.float32).to(device)
        self.vae.enable_slicing()
        if size > 512:
            self.vae.enable_tiling()  # decoding 1024 x 1024 at once takes more memory than a step
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(base.scheduler)
        none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        self.pipe = diffusers.StableDiffusionXLPipeline(
            vae=self.vae, unet=unet, scheduler=scheduler, add_watermarker=False, **none
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.settings = {"height": size, "width": size, "output_type": "latent"}
        self.settings |= {
            "num_inference_steps": config.sample_steps,
            "guidance_scale": config.guidance,
        }
        self.each = max(1, min(100, 2**20 // size**2))

    @torch.no_grad()
    def __call__(self, prompts: list[dict], empty: dict, noise: torch.Tensor) -> torch.Tensor:
        """(N, 3, size, size) in 0..1, on the CPU. noise: (N, channels, height, width) of the latents."""
        unet, found = self.pipe.unet, []
        training = unet.training
        unet.eval()
        for start in range(0, len(prompts), self.each):
            some = prompts[start : start + self.each]
            conditions = {}
            for prefix, parts in (("", some), ("negative_", [empty] * len(some))):
                for name, key in (("prompt_embeds", "words"), ("pooled_prompt_embeds", "pooled")):
                    tensors = torch.stack([part[key] for part in parts])
                    conditions[prefix + name] = tensors.to(unet.device, unet.dtype)
            start_noise = noise[start : start + self.each].to(unet.device, unet.dtype)
            latents = self.pipe(latents=start_noise, **conditions, **self.settings).images
            pixels = self.vae.decode(latents.float() / self.vae.config.scaling_factor).sample
            found.append((pixels / 2 + 0.5).clamp(0, 1).cpu())
        unet.train(training)
        return torch.cat(found)
