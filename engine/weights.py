"""Pretrained weights: where they lie, and what they and the files beside them say.

    pretrained = read("facebook/dinov2-small")   # Hugging Face's cache, a Kaggle input, or a download
    pretrained = read("vit.safetensors")         # a file or a folder
    pretrained = read("swag", "vit_l_16")        # torchvision's

Tensors do not say how many heads a trunk has, its LayerNorm's eps, its activation, or which images it was
trained on. The config.json beside them does. Where it is missing, rules apply, and `notes` says which.
"""

import json
import math
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

import torch
from safetensors import SafetensorError
from torchvision.models import WeightsEnum, get_model_weights

from engine.files import first_line, optional_json, read_json, read_tensors
from engine.layouts import ELSEWHERE, shape_of, to_ours

TORCHVISION = {"imagenet1k": "IMAGENET1K_V1", "swag": "IMAGENET1K_SWAG_LINEAR_V1"}
TORCHVISION_MODELS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14")
IN21K = "google/vit-base-patch16-224-in21k"
NAMES = (*TORCHVISION, "in21k", "embedded", "none")  # all else is OWNER/NAME, a file or a folder
EMBEDDED = Path(__file__).parent.parent / "assets" / "vit_mini.safetensors"
KAGGLE = Path("/kaggle/input")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar")
FILES = (  # the tensors of a folder, by Hugging Face's and OpenCLIP's names
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
BESIDE = ("config.json", "preprocessor_config.json")  # small files that say what the tensors do not

# mean and std of each channel, for values in 0..1
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
OPENAI = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's
HEADS = {1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}  # by width, of the models that are known
EPS = {"vit": 1e-12, "vit5": 1e-12, "clip": 1e-5, "openclip": 1e-5}  # by layout; all others: 1e-6


@dataclass
class Pretrained:
    """A trunk as its files describe it."""

    state: dict[str, torch.Tensor]  # under our names, without the head
    shape: dict  # the arguments of vit.trunk
    images: dict  # how it wants its images: image_size, mean, std, crop, interpolation
    notes: list[str]  # what no file says: the rule that was taken


def read(weights: str, model: str | None = None, given: dict | None = None) -> Pretrained:
    """Read pretrained weights.

    weights: any of NAMES but "none"; OWNER/NAME on Hugging Face; or a file or folder.
    model: for imagenet1k and swag, which of torchvision's models.
    given: the part of the shape that is known, such as num_heads, which tensors do not say.
    Raises OSError for what cannot be found or read, ValueError for what is no plain ViT or is incomplete.
    """
    if weights in TORCHVISION:
        source = torchvision_source(weights, model or "vit_b_16")
        state, metadata, path = torchvision_state(source, weights), {}, Path(Path(source.url).name)
    else:
        path = find(weights)
        state, metadata = read_tensors(path)
    try:
        return described(state, metadata, path, given or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def described(state: dict, metadata: dict, path: Path, given: dict) -> Pretrained:
    """The tensors of a file under our names, with all that the file and those beside it say."""
    class_token = any(
        key.endswith(("cls_token", "class_token", "class_embedding")) for key in state
    )
    state, layout = to_ours(state)
    shape, notes = shape_of(state), []
    for key in shape:
        if key != "image_size" and shape[key] != given.get(key, shape[key]):
            raise ValueError(
                f"{key}: expected {given[key]}, found {shape[key]}: these are another model's weights"
            )
    if "preprocessing" in metadata:  # the file of a run with --adapter full
        images = json.loads(metadata["preprocessing"])
        eps = json.loads(metadata.get("eps", "1e-6"))
        known = {"eps": eps, **json.loads(metadata.get("shape", "{}"))}
        known.pop("old_positions", None)  # of the run that wrote the file
        if metadata.get("model") == "vit_mini":  # written before files held their shape
            known["num_heads"] = 4
    else:
        config = {} if torchvision_by_file(path) else config_beside(path)
        depth, found = config.get("num_hidden_layers"), shape["num_layers"]
        if depth not in (None, found):
            raise ValueError(
                f"expected {depth} blocks, as the file beside it says, found {found}; download both again"
            )
        known = {
            "pool": pool_of(config, shape, class_token, notes),
            "eps": eps_of(config, layout, shape, notes),
            "activation": activation_of(config, shape),
            "num_heads": config.get("num_attention_heads"),
        }
        images = images_of(config, path, layout, shape, notes)
    wanted, stated = given.get("num_heads"), known.get("num_heads")
    if wanted and stated and wanted != stated:
        place = "its metadata" if "preprocessing" in metadata else "the file beside it"
        raise ValueError(
            f"{place} says {stated} attention heads, and --heads or the adapter says {wanted}; leave --heads "
            "out, or name the adapter's weights"
        )
    heads = wanted or stated or heads_of(path, shape, notes)
    if not isinstance(heads, int) or heads < 1 or shape["hidden_dim"] % heads:
        raise ValueError(
            f"expected a number of heads that divides the width, {shape['hidden_dim']}, found {heads!r}: "
            "give another one with --heads"
        )
    return Pretrained(state, {**known, **shape, "num_heads": heads}, images, notes)


def config_beside(path: Path) -> dict:
    """What config.json beside a file says, in Hugging Face's words. From timm's and OpenCLIP's, too."""
    file, openclip_file = path.with_name("config.json"), path.with_name("open_clip_config.json")
    config, openclip = map(without_nulls, map(optional_json, (file, openclip_file)))
    if path.name.startswith("open_clip") and openclip:
        model = part(openclip, "model_cfg", openclip_file)
        vision = part(model, "vision_cfg", openclip_file)
        images = part(openclip, "preprocess_cfg", openclip_file)
        config = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu"}
        config["images"] = images_in_cfg(images, openclip_file)
        config["num_hidden_layers"] = vision.get("layers")
        if "width" in vision:
            for key in ("width", "head_width"):
                check_number(vision.get(key, 64), key, openclip_file)
            config["num_attention_heads"] = int(vision["width"] // vision.get("head_width", 64))
    elif "architecture" in config or "pretrained_cfg" in config:
        images = part(config, "pretrained_cfg", file) or config
        name = str(config.get("architecture") or images.get("architecture"))
        quick = "quick_gelu" if "quickgelu" in name else "gelu"
        args = part(config, "model_args", file)  # where they are not the architecture's
        config = {"architecture": name, "hidden_act": args.get("act_layer", quick)}
        config["num_attention_heads"] = args.get("num_heads")
        config["num_hidden_layers"] = args.get("depth")
        config["images"] = images_in_cfg(images, file)
    elif str(config.get("model_type")).startswith("clip"):
        # These two are CLIPVisionConfig's defaults, which a file may leave out.
        vision = part(config, "vision_config", file) or config
        config = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **vision}
    heads = config.get("num_attention_heads")
    if heads is not None and (not isinstance(heads, int) or isinstance(heads, bool) or heads < 1):
        raise ValueError(f"{file}: num_attention_heads: expected a number above 0, found {heads!r}")
    of_a_model = config.keys() & {"model_type", "hidden_act"}
    return config if of_a_model else {}


def part(config: dict, key: str, file: Path) -> dict:
    """The object under a key of a JSON file; empty if there is none."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {key}: expected a JSON object, found {found!r}")
    return found


def without_nulls(value):
    """A value from a JSON file without the nulls in it: they stand for what is not said."""
    if not isinstance(value, dict):
        return value
    return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}


def eps_of(config: dict, layout: str, shape: dict, notes: list[str]) -> float:
    """The eps of every LayerNorm."""
    eps = config.get("layer_norm_eps", EPS.get(layout, 1e-5 if shape["pre_norm"] else 1e-6))
    check_number(eps, "layer_norm_eps", Path("config.json"))
    if not config and layout not in ("ours", "torchvision"):
        notes.append(f"LayerNorm eps {eps:g}")
    return eps


def pool_of(config: dict, shape: dict, class_token: bool, notes: list[str]) -> str:
    """What the head reads: the class token, or the mean of the patches if there is none."""
    if "rope" in config.get("architecture", ""):
        raise ValueError(f"this is {config['architecture']}, with rotary positions: {ELSEWHERE}")
    if class_token:
        return "class"
    if shape["prefix_tokens"]:
        raise ValueError(f"registers without a class token: {ELSEWHERE}")
    if "siglip" in config.get("architecture", ""):
        raise ValueError(f"this is SigLIP: {ELSEWHERE}")
    if not config:
        notes.append("no class token: the head reads the mean of the patches")
    return "mean"


def activation_of(config: dict, shape: dict) -> str:
    """The activation in the MLPs: gelu, quick_gelu or swiglu."""
    if "activation" in shape:
        return shape["activation"]
    found = config.get("hidden_act")
    if found is None and shape["pre_norm"]:
        raise ValueError(
            "CLIP's image tower, whose tensors do not say if its activation is gelu or quick_gelu: put its "
            "config.json (or open_clip_config.json) beside it"
        )
    if found not in (None, "gelu", "quick_gelu"):
        key = "act_layer" if "architecture" in config else "hidden_act"
        raise ValueError(f"config.json: {key}: expected gelu or quick_gelu, found {found!r}")
    return found or "gelu"


def heads_of(path: Path, shape: dict, notes: list[str]) -> int:
    """The number of heads by a rule. Raises ValueError where no rule is safe."""
    width = shape["hidden_dim"]
    named = torchvision_by_file(path) or "architecture" in config_beside(path)
    if named and width in HEADS:
        return HEADS[width]
    if 192 <= width <= 1024 and width % 64 == 0 and shape["prefix_tokens"]:
        notes.append(f"{width // 64} heads (width / 64)")
        return width // 64
    known = f"; known models of width {width} have {HEADS[width]}" if width in HEADS else ""
    raise ValueError(
        f"no config.json beside it says the number of attention heads: expected --heads N{known}"
    )


def images_of(config: dict, path: Path, layout: str, shape: dict, notes: list[str]) -> dict:
    """How the images of these weights are prepared: image_size, mean, std, crop and interpolation."""
    # A folder's name, or its snapshot's in Hugging Face's cache, may name the family too.
    words = " ".join([str(config.get("model_type")), *path.parts[-4:]]).lower()
    images, rule = images_by_rule(words, layout, shape)
    if (source := torchvision_by_file(path)) is not None:
        theirs = torchvision_images(source)
    else:
        theirs = preprocessing_in(path.parent, config.get("images"))
    if not {"mean", "std"} <= theirs.keys():
        notes.append(f"images as for {rule}, mean {images['mean']}, std {images['std']}")
    images |= theirs
    # DINOv2's last epochs had 518. Almost everybody uses 224.
    if images["image_size"] == 518 and source is None:
        images["image_size"] = 224
    if images["image_size"] % shape["patch_size"]:
        images["image_size"] = shape["image_size"]
    return images


def images_by_rule(words: str, layout: str, shape: dict) -> tuple[dict, str]:
    """The preparation of images that fits such tensors best, and whose it is.

    words: the file's name and what else may name the family.
    """
    size = shape["image_size"]
    plain = {"image_size": size, "crop": 1.0, "interpolation": "bilinear"}
    bicubic = {"image_size": size, "crop": 0.9 if size < 384 else 1.0, "interpolation": "bicubic"}
    if layout in ("ours", "torchvision"):
        return {**IMAGENET, **plain, "crop": 224 / 256}, "torchvision's IMAGENET1K_V1"
    if shape["pre_norm"]:
        return {**OPENAI, **bicubic, "crop": 1.0}, "OpenAI's CLIP"
    if shape["layer_scale"] and size == 518:
        return {**IMAGENET, **bicubic, "crop": 224 / 256}, "DINOv2"
    if shape["layer_scale"] or shape["prefix_tokens"] == 2:
        return {**IMAGENET, **bicubic}, "DeiT"
    if named := re.search(r"(?<![a-z])(deit|dino|mae|i?jepa)(v?\d+)?(?![a-z])", words):
        return {**IMAGENET, **bicubic}, named[1].upper()
    if not shape["prefix_tokens"]:
        return {**IMAGENET, **bicubic}, "I-JEPA"
    if layout in ("vit", "vit5"):
        return {**HALF, **plain}, "google's ViT"
    return {**HALF, **bicubic}, "timm's augreg"


def preprocessing_in(folder: Path, other: dict | None = None) -> dict:
    """What a folder's preprocessor_config.json (Hugging Face's) says: mean, std, image_size, crop and
    interpolation. Empty if there is no such file.

    other: what another file says, for what this one does not say.
    """
    file = folder / "preprocessor_config.json"
    theirs, found = without_nulls(optional_json(file)), dict(other or {})
    keys = {"mean": "image_mean", "std": "image_std"}
    found |= {ours: triple(theirs[key], key, file) for ours, key in keys.items() if key in theirs}
    if "resample" in theirs:
        number = theirs["resample"]
        known = FILTERS.get(number) if is_number(number) else None
        found["interpolation"] = interpolation(known or number, "resample", file)
    # Older files have plain numbers: size is the shorter side, crop_size the side of a square.
    edge, crop = theirs.get("size"), theirs.get("crop_size")
    edge = edge.get("shortest_edge", edge.get("height")) if isinstance(edge, dict) else edge
    crop = crop.get("height") if isinstance(crop, dict) else crop
    crop = crop if theirs.get("do_center_crop") and crop is not None else edge
    if edge is not None:
        for value, key in ((edge, "size"), (crop, "crop_size")):
            check_number(value, key, file)
        if crop > edge:
            raise ValueError(
                f"{file}: crop_size: expected at most {edge}, the size of the resized images, found {crop}"
            )
        found["image_size"] = int(crop)
        if "do_center_crop" in theirs or "crop" not in found:
            found["crop"] = crop / edge
    if "crop_pct" in theirs:  # sizes in whole pixels round it
        check_number(theirs["crop_pct"], "crop_pct", file)
        found["crop"] = min(1.0, theirs["crop_pct"])
    return found


def images_in_cfg(cfg: dict, file: Path) -> dict:
    """What timm's pretrained_cfg or OpenCLIP's preprocess_cfg say, as preprocessing_in does."""
    found = {}
    for key in ("mean", "std"):
        if key in cfg:
            found[key] = triple(cfg[key], key, file)
    if "crop_pct" in cfg:
        check_number(cfg["crop_pct"], "crop_pct", file)
        found["crop"] = min(1.0, cfg["crop_pct"])
    if "input_size" in cfg:
        found["image_size"] = int(triple(cfg["input_size"], "input_size", file)[-1])
        check_number(found["image_size"], "input_size", file)
    if "interpolation" in cfg:
        found["interpolation"] = interpolation(cfg["interpolation"], "interpolation", file)
    return found


def triple(value, key: str, file: Path) -> list[float]:
    """Three numbers; a deviation's are above 0. Raises ValueError, naming file and key, for anything else."""
    least, above = (0, " above 0") if key.endswith("std") else (-math.inf, "")
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(is_number(number) and least < number for number in value)
    ):
        raise ValueError(f"{file}: {key}: expected three numbers{above}, found {value!r}")
    return value


def is_number(value) -> bool:
    """False for JSON's true, NaN and Infinity too, which Python takes for numbers."""
    return type(value) in (int, float) and math.isfinite(value)


def check_number(value, key: str, file: Path) -> None:
    if not is_number(value) or value <= 0:
        raise ValueError(f"{file}: {key}: expected a number above 0, found {value!r}")


def interpolation(name: str | None, key: str, file: Path) -> str:
    """bilinear or bicubic. The filters of the others are close to one of them."""
    if name in ("bilinear", "box", "hamming", "nearest"):
        return "bilinear"
    if name in ("bicubic", "lanczos", "random"):
        return "bicubic"
    raise ValueError(f"{file}: {key}: expected bilinear or bicubic, found {name!r}")


def torchvision_source(weights: str, model: str) -> WeightsEnum:
    """torchvision's weights of this name for this model."""
    if model not in TORCHVISION_MODELS:
        raise ValueError(
            f"--model {model}: torchvision has no weights for it; expected one of "
            f"{', '.join(TORCHVISION_MODELS)}"
        )
    members = get_model_weights(model).__members__
    if TORCHVISION[weights] not in members:
        others = ", ".join(name for name, member in TORCHVISION.items() if member in members)
        raise ValueError(
            f"--weights {weights}: torchvision has none of this name for {model}; it has {others}"
        )
    return members[TORCHVISION[weights]]


def torchvision_by_file(path: Path) -> WeightsEnum | None:
    """torchvision's weights that are downloaded as a file of this name."""
    every = (source for model in TORCHVISION_MODELS for source in get_model_weights(model))
    return next((source for source in every if Path(source.url).name == path.name), None)


def torchvision_images(source: WeightsEnum) -> dict:
    images = source.transforms()
    return {
        "image_size": images.crop_size[0],
        "mean": images.mean,
        "std": images.std,
        "crop": images.crop_size[0] / images.resize_size[0],
        "interpolation": images.interpolation.value,
    }


def torchvision_state(source: WeightsEnum, weights: str) -> dict:
    """The state dict of torchvision's weights, from torch's cache or downloaded."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(source.url).name
    try:
        return source.get_state_dict(check_hash=True, weights_only=True)
    except OSError as error:
        raise OSError(
            f"--weights {weights}: {source.url} cannot be downloaded ({error}); download it elsewhere and "
            f"put it at {place}, or name it with --weights FILE"
        ) from None
    except Exception as error:  # torch's unpickler meets wrong bytes with errors of any type
        raise ValueError(
            f"{place}: not a complete file of tensors ({first_line(error)}); remove it, and it is "
            "downloaded again"
        ) from None


def is_hub_name(weights: str) -> bool:
    """True for OWNER/NAME on Hugging Face, if no such file or folder is here."""
    like = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights)
    return bool(like) and not weights.lower().endswith(SUFFIXES) and not Path(weights).exists()


def check_weights(weights: str) -> None:
    """Raise FileNotFoundError if this is no name of weights, no file and no folder."""
    if weights not in NAMES and not is_hub_name(weights) and not Path(weights).exists():
        raise FileNotFoundError(
            f"--weights {weights}: no such file, and no such name; expected {', '.join(NAMES)}, OWNER/NAME "
            "on Hugging Face, a .safetensors, .pth or .bin file, or a folder with one"
        )


def full_name(weights: str) -> str:
    """A name of weights as it is; a file with its absolute path, so that it is found from any folder."""
    named = weights in NAMES or is_hub_name(weights)
    return weights if named else str(Path(weights).absolute())


def find(weights: str) -> Path:
    """The file with these weights, downloaded if it is nowhere."""
    check_weights(weights)
    if weights == "embedded":
        return EMBEDDED
    if weights == "in21k" or is_hub_name(weights):
        return find_hub(IN21K if weights == "in21k" else weights)
    path = Path(weights)
    return tensors_in(path) if path.is_dir() else path


def tensors_in(folder: Path) -> Path:
    """The file of tensors in a folder: one of FILES, or the only one that there is."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    found = found or [p for p in sorted(folder.iterdir()) if p.name.lower().endswith(SUFFIXES)]
    if len(found) == 1 or (found and found[0].name in FILES):
        return found[0]
    content = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"{folder}: expected {' or '.join(FILES[:2])}, or one file of tensors, found {content}"
    )


def find_hub(name: str) -> Path:
    """The file of tensors of OWNER/NAME on Hugging Face.

    It is looked for in Hugging Face's cache, in a folder NAME here, in torch's cache, and below
    /kaggle/input. If it is nowhere, it is downloaded to torch's cache, with what lies beside it.
    Raises OSError, which names these places, if it cannot be downloaded either.
    """
    short = Path(name).name
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = snapshots_in(hub / f"models--{name.replace('/', '--')}")
    place = Path(torch.hub.get_dir()) / "checkpoints" / name.replace("/", "--")
    for folder in (*snapshots, Path(short), place):
        for file in FILES:
            if (folder / file).is_file():
                return folder / file
    older = place.with_name(f"{short}.safetensors")  # where earlier versions of this project put it
    if name == IN21K and older.is_file():
        return older
    for folder in folders_below(KAGGLE, short):  # last: it may hold a million images
        if any((folder / file).is_file() for file in FILES):
            return tensors_in(folder)
    url = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{url.rstrip('/')}/{name}/resolve/main/"
    try:
        return download(url, place)
    except (OSError, SafetensorError, ValueError, HTTPException) as error:
        raise OSError(
            f"--weights {name}: not in {hub}, ./{short}, {KAGGLE} or {place}, and {url} cannot be downloaded "
            f"({error}); run: hf download {name}, or name a file or folder with --weights"
        ) from None


def snapshots_in(folder: Path) -> list[Path]:
    """The snapshots of a model in Hugging Face's cache: the one of main, and then the newest first."""
    ref = folder / "refs" / "main"
    main = ref.read_text().strip() if ref.is_file() else ""
    found = (folder / "snapshots").glob("*")
    return sorted(
        found, key=lambda path: (path.name == main, path.stat().st_mtime, path.name), reverse=True
    )


def download(url: str, place: Path) -> Path:
    """Download the tensors at a URL, and what lies beside them, into a folder: all of it or nothing."""
    part = place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")
    part.mkdir(parents=True)  # not with mkdtemp, whose folders nobody else may read
    try:
        for file in BESIDE:
            if fetched(url + file, part / file):
                read_json(part / file)
        print(f"downloading {url} to {place}", flush=True)
        name = next((file for file in FILES[:2] if fetched(url + file, part / file)), None)
        if name is None:
            raise OSError(f"it has no {' or '.join(FILES[:2])}")
        read_tensors(part / name)  # refuses a file that breaks off
        try:
            part.rename(place)
        except OSError:
            if not place.is_dir():  # otherwise another process has just downloaded it
                raise
        return tensors_in(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fetched(url: str, file: Path) -> bool:
    """Download a URL to a file; False if there is nothing at this URL."""
    try:
        torch.hub.download_url_to_file(url, str(file), progress=file.suffix != ".json")
    except HTTPError as error:
        if error.code == 404:
            return False
        raise
    return True


def folders_below(root: Path, name: str) -> list[Path]:
    """The folders at most six levels below root with a part of their path that is name, sorted.

    Kaggle writes names in small letters, with - for other signs.
    A folder with very many folders is not searched: they are the classes of a data set.
    """
    found = []
    for folder, inside, _ in os.walk(root):
        path = Path(folder).relative_to(root)
        found += [Path(folder)] if slug(name) in slug(str(path)).split("/") else []
        if len(path.parts) == 6 or len(inside) > 100:
            inside.clear()
    return sorted(found)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9/]+", "-", name.lower())
