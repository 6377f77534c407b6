"""What a run of train.py starts from: nothing, an adapter (--init-adapter), or last.pt (--resume).

Each file is read once, here, and its content is passed on.
"""

import copy
import os
import time
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import torch
from torch import nn

import data
import vit
from engine import checkpoint, devices
from engine.adapt import ADAPT, adapt, check_rank
from engine.config import LOAD, RECIPES, Config, check, check_sizes, for_adapter, refuse_changes
from engine.files import read_json
from engine.images import keep
from engine.peft_folder import CONFIG, fill
from engine.peft_vit import labels_in, names_in, parameters_of, read_vit, targets_of, weights_of
from engine.run import Run, check_folder, make_folder, read_last, refuse_others
from engine.weights import check_weights, full_name, preprocessing_in

# The settings that an adapter brings along. A flag overrides them.
SETTLED = (*ADAPT, "weights", "image_size")


@dataclass
class Source:
    """An adapter to start from, as its file or PEFT folder holds it."""

    path: str
    settings: dict  # fields of Config, of those in SETTLED
    tensors: dict[str, torch.Tensor]  # by our names, or by PEFT's
    classes: list[str] | None  # None: a PEFT folder without names
    images: dict  # how its images were prepared, as far as that is known
    shape: dict  # what it says of the trunk, see vit.trunk
    layers: list[str] | None = None  # of a PEFT folder: the layers with an adapter, by our names
    info: dict | None = None  # of an adapter file


def prepare(config: Config) -> Run:
    """Check the config, load data and trunk, adapt the trunk, and make the run's folder.

    Raises OSError or ValueError in one line, before the folder is made.
    """
    started = time.monotonic()
    config, last, source = begin(config)
    check_folder(config)
    device = devices.pick_device(devices.join(config.device))
    devices.pick_dtype(config, device)  # refuses --amp fp16 on a CPU, before anything is read
    devices.keep_freed_memory(device)
    checkpoint.seed_generators(config.seed)
    c = config
    with devices.in_turn():
        dataset = load_data(config)
        check_sizes(config, len(dataset.train), dataset.test is not None)
        shape = shape_of(last, config) if last else source.shape if source else {}
        model, preprocessing = vit.build(
            shape or c.model,
            c.weights,
            len(dataset.classes),
            c.image_size,
            c.head_dropout,
            c.seed,
            c.heads,
        )
        model.encoder.layers.recompute = c.recompute
        if source and source.layers and "targets" in config.filled:
            config.targets = targets_of(model, source.layers)
        settings = {key: getattr(config, key) for key in ADAPT}
        dropouts = {"dropout": c.adapter_dropout, "module_dropout": c.module_dropout}
        trainable, total = adapt(model, **settings, **dropouts)
        check_rank(model, config.rank)
        if last:  # images are prepared as before, wherever the weights are now
            preprocessing = last["identity"].get("preprocessing", preprocessing)
        elif source:
            message, images = load_source(source, model, dataset.classes)
            preprocessing |= images
            print(message)
        cache = c.cache_dir or (Path(c.out).parent if c.out else Path("runs")) / "cache"
        for split in (dataset.train, dataset.val, *([dataset.test] if c.test else [])):
            how = {"interpolation": preprocessing.get("interpolation", "bilinear")}
            keep(split, cache, preprocessing["image_size"], c.cache, c.workers, **how)
    trunk = checkpoint.fingerprint(model)
    shared = {"classes": dataset.classes, "trunk": trunk, "preprocessing": preprocessing}
    info = {**settings, "weights": full_name(c.weights), "seed": c.seed}
    info |= {"shape": model.shape, **shared}
    identity = data_identity(c, dataset) | shared
    refuse_others(config, identity, last)
    unreadable = [split.bad for split in (dataset.train, dataset.val)]
    if last:
        for bad, known in zip(unreadable, last["extra"]["unreadable"], strict=True):
            bad.update(known)
    folder, lock = make_folder(config, last)
    return Run(
        config=config,
        dataset=dataset,
        model=model,
        info=info,
        identity=identity,
        trainable=trainable,
        total=total,
        device=device,
        dtype=devices.pick_dtype(config, device, model.hidden_dim),
        folder=folder,
        lock=lock,
        last=last,
        extra={"unreadable": unreadable, "shape": model.shape},
        started=started,
    )


def load_data(config: Config) -> data.Dataset:
    return data.load(config.dataset, **{key: getattr(config, key) for key in LOAD})


def data_identity(config: Config, dataset: data.Dataset) -> dict:
    """What last.pt holds of the data, for a resumed run to compare."""
    splits = (dataset.train, dataset.val)
    identity = {"images": [len(split) for split in splits], "classes": dataset.classes}
    if config.dataset == "csv":  # a table may change under its name
        identity["labels"] = [crc32(split.labels.tobytes()) for split in splits]
    return identity


def shape_of(last: dict, config: Config) -> dict:
    """The trunk's shape of a run that resumes. An older last.pt lacks it; the weights say it, or the name."""
    named = vit.named_shape(config.model or "vit_b_16") if config.weights == "none" else {}
    return last["extra"].get("shape", named | vit.OLD)


def begin(config: Config) -> tuple[Config, dict | None, Source | None]:
    """The config with the settings of what the run starts from; the content of last.pt; the adapter.

    Raises OSError or ValueError if a file cannot be read, or a setting cannot work.
    """
    last = read_last(config)
    source, settings = None, {}
    config = copy.copy(config)
    if last:
        # A resumed run does not read --init-adapter again, whose file may be gone: last.pt has its settings.
        previous = last["config"]
        if previous.get("init_adapter"):
            config.init_adapter = previous["init_adapter"]
            settings = {key: previous[key] for key in SETTLED}
    elif config.init_adapter:
        source = read_source(config.init_adapter)
        settings = source.settings
        if config.model and "model" not in config.filled:
            check_model(config.model, source)
    for key, value in settings.items():
        if key in config.filled and getattr(config, key) == config.filled[key]:
            setattr(config, key, value)
    # The recipe's rate is that of the adapter, which the settings may have changed.
    if config.filled.get("lr") == config.lr:
        config.lr = for_adapter(RECIPES[config.recipe].get("lr", config.lr), config.adapter)
    check(config)
    check_weights(config.weights)
    if source and source.info:
        check_random(config, source)
    if last:
        refuse_changes(config, previous)
    return config, last, source


def check_random(config: Config, source: Source) -> None:
    """Raise ValueError if the adapter was trained on a random trunk, and this run would have another one."""
    info = source.info
    if info["weights"] == "none" and info["adapter"] != "full":
        if (config.weights, config.seed) != ("none", info["seed"]):
            raise ValueError(
                f"--init-adapter {source.path}: its trunk is random: expected --weights none "
                f"--seed {info['seed']}, found --weights {config.weights} --seed {config.seed}"
            )


def read_source(path: str) -> Source:
    """Read an adapter file (or the folder of its run) or a PEFT folder of one of transformers' ViTs."""
    folder = Path(path)
    if not folder.is_dir() or (folder / checkpoint.ADAPTER_FILE).is_file():
        tensors, info = checkpoint.read_adapter(path)
        settings = info | {"image_size": info["preprocessing"]["image_size"]}
        settings = {key: settings[key] for key in SETTLED}
        images, shape = info["preprocessing"], vit.shape_in(info, path)
        return Source(path, settings, tensors, info["classes"], images, shape, info=info)
    layers, settings, tensors, shape = read_vit(folder)
    try:
        settings["weights"] = weights_of(folder)
    except ValueError:  # not on this machine: check_weights says so, unless --weights is given
        settings["weights"] = str(read_json(folder / CONFIG).get("base_model_name_or_path"))
    images = preprocessing_in(folder)
    settings["image_size"] = images.get("image_size")
    return Source(path, settings, tensors, labels_in(folder) or None, images, shape, layers)


def check_model(model: str, source: Source) -> None:
    """Raise ValueError if a trunk of this name is not the adapter's."""
    named = vit.named_shape(model)
    for key, value in named.items():
        expected = source.shape.get(key, value)
        if key != "image_size" and value != expected:
            raise ValueError(
                f"--model {model}: {key}: expected {expected}, as in {source.path}, found {value}; leave the "
                "flag out"
            )


def load_source(source: Source, model: nn.Module, classes: list[str]) -> tuple[str, dict]:
    """Copy an adapter into a model that was adapted the same way.

    The head is copied if it has these classes (or as many, if the folder has no names); else it stays new.
    Returns a message, and how the adapter wants its images, but for their size.
    Raises ValueError, naming file and key, if a tensor does not fit.
    """
    if source.info:
        own, head = dict(model.named_parameters()), "heads.head."
    else:
        names, head = names_in(source.tensors), "classifier."
        own = parameters_of(model, names)
    same = source.classes == classes
    if source.classes is None:
        same = len(source.tensors["classifier.weight"]) == len(classes)
    tensors = source.tensors
    if not same:
        tensors = {k: own.get(k, t) if k.startswith(head) else t for k, t in tensors.items()}
    if source.info:
        checkpoint.restore(model, tensors, source.info, source.path)
    else:
        fill(own, tensors, source.path)
    message = f"start: {source.path}, " + ("its head too" if same else "a new head: other classes")
    images = {key: value for key, value in source.images.items() if key != "image_size"}
    return message, ({"interpolation": "bilinear"} if source.info else {}) | images


def load(
    path: str, weights: str | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict]:
    """As vit.load_adapter, for a PEFT folder too. Classes that it does not name are LABEL_0, LABEL_1 ..., as
    in transformers."""
    if (Path(path) / CONFIG).is_file():
        model, info = load_folder(path, weights, named=False)
        return model.to(device).eval(), info
    return vit.load_adapter(path, weights, device)


def load_folder(
    folder: str | Path,
    weights: str | None = None,
    classes: str | None = None,
    named: bool = True,
) -> tuple[nn.Module, dict]:
    """(model, metadata as in an adapter file) of a PEFT folder.

    weights: the pretrained weights, a name or a file. By default, base_model_name_or_path names them.
    classes: comma-separated names, or a file with one per line. By default those of
        FOLDER/id2label.json or FOLDER/config.json.
    named: the names must be there. Otherwise they may be LABEL_0, LABEL_1 ...
    Raises OSError or ValueError, naming file and key, if a part is missing, unsupported or does not fit.
    """
    folder = Path(folder)
    layers, settings, tensors, shape = read_vit(folder)
    info = {"weights": full_name(weights) if weights else weights_of(folder)}
    info["seed"], n = 0, len(tensors["classifier.weight"])
    if not named and not labels_in(folder):
        classes = ",".join(f"LABEL_{i}" for i in range(n))
    info["classes"] = class_names(folder, classes, n)
    images = preprocessing_in(folder)
    size = images.get("image_size")
    model, preprocessing = vit.build(shape, info["weights"], len(info["classes"]), size)
    settings = {"factor": -1, "decompose_both": False, **settings}
    settings["targets"] = targets_of(model, layers)
    adapt(model, **settings)
    fill(parameters_of(model, names_in(tensors)), tensors, folder)
    info |= {**settings, "trunk": checkpoint.fingerprint(model), "shape": model.shape}
    return model, info | {"preprocessing": {**preprocessing, **images}}


def class_names(folder: Path, classes: str | None, n: int) -> list[str]:
    """The names of the n classes: those given, or else the folder's."""
    if classes is not None:
        parts = classes.split(",")
        if os.path.isfile(classes):  # Path.is_file raises OSError for a long text
            parts = Path(classes).read_text("utf-8").strip().split("\n")
        names = [part.strip() for part in parts]
    else:
        names = labels_in(folder)
    if len(names) != n:
        raise ValueError(
            f"{folder}: expected the names of its {n} classes, found {len(names)}; give them with --classes "
            "in the order of training: comma-separated, or a file with one per line"
        )
    return names
