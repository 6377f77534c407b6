"""Write kaggle.ipynb and paste.ipynb from the modules, so that there is one copy of the code.

    python -m engine.notebooks

kaggle.ipynb writes the modules to files and trains with them: those of the front page by %%writefile, so that
they can be read; those of engine/ packed into one cell. paste.ipynb has lora.py and attention.py as cells, and
nothing else of the project. A test runs this script, and both notebooks.
"""

import base64
import bz2
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

import data
from engine import weights

HERE = Path(__file__).parent.parent
ENGINE = (
    "__init__ files layouts weights images devices adapt checkpoint peft_folder peft_vit pictures "
)
ENGINE += "config run start submission"
PACKED = [f"engine/{name}" for name in ENGINE.split()]
MODULES = "lora loha lokr attention vit data train predict".split()  # in cells, to be read
LARGEST = 1_000_000  # bytes: Kaggle does not save a notebook of more than 1 MB


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": lines(text)}


def code(text: str, hidden: bool = False) -> dict:
    """A code cell. hidden: folded until the reader opens it, on Kaggle and in Jupyter."""
    metadata = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}} if hidden else {}
    outside = {"execution_count": None, "metadata": metadata, "outputs": []}
    return {"cell_type": "code", **outside, "source": lines(text)}


def lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def module(name: str) -> str:
    return (HERE / f"{name}.py").read_text(encoding="utf-8")


def write(path: Path, cells: list[dict]) -> None:
    """A notebook of these cells without outputs: the same cells give the same bytes."""
    cells = [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def demo() -> str:
    """600 of the embedded digits and the embedded trunk in three bits a number, as base85.

    The files of assets/ would make a notebook of 8 MB. A matrix keeps each weight w as k * step with k = -3..3,
    where step is the median of |w| in its row, near the best step for a normal distribution. Other tensors are
    float16. An image has eight greys.
    """
    tensors = {}
    for name, weight in load_file(weights.EMBEDDED).items():
        if name.startswith("heads."):
            continue
        if name.endswith("weight") and weight.ndim > 1:
            step = weight.abs().flatten(1).median(1).values.half()
            step = step.view(-1, *[1] * (weight.ndim - 1))  # one for each row
            tensors[f"{name}.step"] = step
            weight = (weight / step.float()).round().clamp(-3, 3).to(torch.int8)
        tensors[name] = weight.half() if weight.is_floating_point() else weight
    for part, limit in (("train", 400), ("val", 200)):
        split = getattr(data.load("demo", limit=limit), part)
        greys = np.rint(split.pixels[..., 0] / 255 * 7).astype(np.uint8)
        tensors[f"{part}.images"] = torch.from_numpy(greys)
        tensors[f"{part}.labels"] = torch.from_numpy(split.labels.astype(np.uint8))
    return packed(save(tensors))


def packed(content: bytes) -> str:
    """Bytes as lines of text. bz2, because different versions of zlib write different bytes."""
    text = base64.b85encode(bz2.compress(content)).decode()
    return "".join(f"{text[i : i + 2000]}\n" for i in range(0, len(text), 2000))


def engine() -> str:
    """The sources of engine/, packed."""
    return packed(json.dumps({name: module(name) for name in PACKED}).encode())


def kaggle() -> list[dict]:
    """The cells of kaggle.ipynb."""
    return [
        markdown(r"""
# LoRA, LoHa and LoKr for Vision Transformers, from scratch

A Vision Transformer that was trained on many images learns yours, while its own weights stay frozen. What
trains is a small *adapter* beside each linear layer. This notebook holds all code that it runs, in plain
PyTorch. To run it from start to finish: **Run All**.

| attach to the notebook (*Add Input*) | what trains |
|---|---|
| nothing | a small trunk (the pretrained model without its head) that knows only clothes learns handwritten digits, in a minute or two, without GPU and internet |
| Tiny ImageNet | torchvision's ViT-B/16 with LoRA on every linear layer; best with *Accelerator: GPU T4 x2* |
| Food 101 | google's ViT-B/16 (in21k) with LoRA on query and value, 5,000 images of seven classes |

The weights of ViT-B/16 are downloaded (*Internet on*), or you attach them: `vit_b_16-c867db91.pth`, or a
folder `vit-base-patch16-224-in21k`. For your own images, with one folder for each class, set `SETTINGS` below
to `{"recipe": "tiny-imagenet-lora", "dataset": "folder", "data_dir": "/kaggle/input/photos"}`; for all of
Food 101 with LoKr, to `{"recipe": "food101-lokr"}`.
"""),
        code("""
INPUT = "/kaggle/input"  # the folder of everything attached
SETTINGS = {}  # flags of train.py, except out and resume: {"adapter": "loha", "rank": 8, "epochs": 2}
COMPARE = ["lokr"]  # more adapters to train, for comparison; [] for none
"""),
        markdown("""
## The code

Each of these cells writes one file into a new folder, so it overwrites nothing of yours. The cells are
folded. Open `lora.py` first: it is the method in one file. After a change, run the cell, restart the session
and *Run All*. What makes a run dependable (`engine/`) is packed into the last of them.
"""),
        code("""
import os
import sys
from pathlib import Path

CODE = Path("vit-adapters")
if Path.cwd().name != CODE.name:  # this cell may be run again
    (CODE / "engine").mkdir(parents=True, exist_ok=True)
    os.chdir(CODE)
sys.path.insert(0, str(Path.cwd()))
"""),
        *(code(f"%%writefile {name}.py\n" + module(name), hidden=True) for name in MODULES),
        code("%%writefile engine.b85\n" + engine(), hidden=True),
        code(
            """
import base64
import bz2
import json

text = Path("engine.b85").read_text().replace("\\n", "")
for name, source in json.loads(bz2.decompress(base64.b85decode(text))).items():
    Path(f"{name}.py").write_bytes(source.encode())
""",
            hidden=True,
        ),
        markdown("""
## The data

The digits and the trunk for a notebook with nothing attached. Kaggle saves notebooks of at most 1 MB, so a
weight has one of seven values and a pixel one of eight greys: three bits each.
"""),
        code("%%writefile demo.b85\n" + demo(), hidden=True),
        code(
            """
import PIL.Image
from safetensors.torch import load, save_file

text = Path("demo.b85").read_text().replace("\\n", "")
packed = load(bz2.decompress(base64.b85decode(text)))

names = "zero one two three four five six seven eight nine".split()
for part in ("train", "val"):
    images, labels = packed.pop(f"{part}.images"), packed.pop(f"{part}.labels")
    greys = (images.float() * 255 / 7).round().byte().numpy()
    for i, (grey, label) in enumerate(zip(greys, labels, strict=True)):
        file = Path("digits", part, names[label], f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(grey).save(file)

steps = {name: packed.pop(name) for name in [*packed] if name.endswith(".step")}
trunk = {name: t.float() * steps.get(f"{name}.step", 1) for name, t in packed.items()}
images = {"image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
metadata = {"preprocessing": json.dumps(images), "shape": json.dumps({"num_heads": 4})}
save_file(trunk, "trunk.safetensors", metadata)
print(f"trunk.safetensors: {sum(t.numel() for t in trunk.values()):,} weights")
print(f"digits: {len(list(Path('digits').glob('*/*/*.png'))):,} images")
""",
            hidden=True,
        ),
        markdown("""
MNIST's digits are by Yann LeCun and Corinna Cortes, [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)
(600 of them, in eight greys). The trunk was trained on [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist),
MIT License, © 2017 Zalando SE.

Now find out what is attached:
"""),
        code("""
import tempfile

import data
import predict
import train
import vit
from engine.adapt import ADAPT, METHODS, adapt
from engine.config import FREE, Config
from engine.start import begin


def attached(*names):
    \"\"\"The first folder below INPUT that holds all these names, or None.\"\"\"

    def holds(folder):
        return all((folder / name).exists() for name in names)

    try:
        return data.find(" and ".join(names), INPUT, holds, "")
    except FileNotFoundError:
        return None


if "recipe" in SETTINGS:
    settings = {}
elif folder := attached("wnids.txt", "train"):
    settings = {"recipe": "tiny-imagenet-lora", "data_dir": str(folder)}
elif folder := attached("images", "meta"):
    settings = {"recipe": "food101-lora", "data_dir": str(folder)}
else:
    settings = {"recipe": "demo", "weights": "trunk.safetensors", "epochs": 20}
    if "dataset" not in SETTINGS:
        settings |= {"dataset": "folder", "data_dir": "digits"}
settings |= SETTINGS
file = "vit_b_16-c867db91.pth"
if begin(Config(**settings))[0].weights == "imagenet1k" and (folder := attached(file)):
    settings["weights"] = str(folder / file)
# Decoded images do not belong into the notebook's output: a later session decodes them again.
settings.setdefault("cache_dir", f"{tempfile.gettempdir()}/cache")
config, _, _ = begin(Config(**settings))  # with the settings of init_adapter, if that is given
print(settings)
"""),
        code("""
dataset = data.load(
    config.dataset,
    config.data_dir,
    config.limit,
    config.classes,
    config.download,
    config.holdout,
)
print(f"{len(dataset.train):,} images train, {len(dataset.val):,} validate")
print(f"{len(dataset.classes)} classes: {', '.join(dataset.classes[:10])}")
"""),
        markdown(r"""
## What trains

A linear layer computes $y = W x + b$. An adapter leaves $W$ frozen and adds a matrix $\Delta W$ made of few
numbers: $y = (W + \Delta W)\,x + b$. With rank $r$, and $s = \alpha / r$:

| | $\Delta W$ | trained numbers for a layer of $768 \times 768$, $r = 8$ |
|---|---|---|
| LoRA | $s\,B A$, a product of two thin matrices | 12,288 |
| LoHa | $s\,(W_{1a} W_{1b}) \odot (W_{2a} W_{2b})$, two of them multiplied elementwise | 24,576 |
| LoKr | $s\,W_1 \otimes W_2$, a Kronecker product: $W_1$ says how much of the block $W_2$ stands at each place | 1,088 |

At the start one factor is zero, so $\Delta W = 0$ and training starts from the pretrained model. The head, the
last layer, which names the classes, trains as well. `head` is the head alone, `full` is everything:
"""),
        code("""
import torch

for adapter in METHODS:
    classes = len(dataset.classes)
    trunk = {"image_size": config.image_size, "heads": config.heads}
    model, _ = vit.build(config.model, config.weights, classes, **trunk)
    arguments = {key: getattr(config, key) for key in ADAPT}
    trainable, total = adapt(model, **(arguments | {"adapter": adapter}))
    print(f"{adapter}: {trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
"""),
        markdown("""
## Training

A run saves itself in its folder, and `resume` continues it: after a stop, run the cell again. In a later
session, attach the output of the earlier one: the run is copied from there. Other `SETTINGS` make another
run. All GPUs of the session share each batch.
"""),
        code("""
import re
import shutil


def folder_of(adapter):
    \"\"\"The folder of a run, named after its settings; copied from an earlier session if that is attached.\"\"\"
    changed = [f"{key}-{SETTINGS[key]}" for key in SETTINGS if key not in ("adapter", *FREE)]
    name = re.sub(r"[^\\w.]+", "-", "-".join([config.recipe, adapter, *changed]))
    folder = Path("runs", name)
    if not folder.exists() and (earlier := attached(f"{name}/last.pt")):
        shutil.copytree(earlier / name, folder)
    return folder


run = folder_of(config.adapter)
result = train.train(Config(**settings, out=run, resume=True))
"""),
        code("""
from IPython.display import Image

Image(run / "curves.png")
"""),
        code("""
Image(run / "predictions.png")
"""),
        markdown("""
The same with other adapters:
"""),
        code("""
results = {config.adapter: result}
for adapter in COMPARE:
    other = settings | {"adapter": adapter, "out": folder_of(adapter), "resume": True}
    results[adapter] = train.train(Config(**other))
for adapter, r in results.items():
    print(f"{adapter}: {r['trainable']:,} trained, validation accuracy {r['val_accuracy']:.1%}")
"""),
        markdown("""
## What is on an image?

The adapter file holds the trained tensors, the class names and the name of its trunk. With it, `predict.py`
classifies images that training has not seen:
"""),
        code("""
some = dataset.val.rows(data.even_rows(dataset.val.labels, 8)).files
some = some or sorted(map(str, Path("digits").glob("val/*/0.png")))  # of data without files
predict.main([str(run / "adapter.safetensors"), *some, "--figure", "sheet.png"])
Image("sheet.png")
"""),
        markdown("""
## Two GPUs through torchrun

The cells above use all GPUs in one process, which copies the model to each GPU in every step. `torchrun`
starts one process for each GPU instead; they share every batch and add up their gradients. This cell trains
two steps; without `short` it is the whole run. On a machine without GPU, two processes share the cores.
"""),
        code("""
import shlex


def flag(name, value):
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


short = {"limit": 2 * config.batch_size * config.grad_accum, "epochs": 1}
flags = " ".join(flag(*pair) for pair in (settings | short).items())
torch.cuda.empty_cache()  # memory that the cells above still hold
n = torch.cuda.device_count() or 2
!{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={n} train.py {flags}
assert _exit_code == 0  # noqa: F821 (IPython's, of the line above)
"""),
        markdown("""
## TensorBoard

The curves of all runs. If the frame stays empty, the browser cannot reach the server in the notebook; each
run's `curves.png` and `metrics.csv` hold the same figures.
"""),
        code("""
%load_ext tensorboard
%tensorboard --logdir runs
"""),
    ]


def paste() -> list[dict]:
    """The cells of paste.ipynb."""
    return [
        markdown(r"""
# LoRA in two cells

Paste `lora.py` and `attention.py` to adapt stock torchvision's ViT-B/16: no package, no script. Beside a
frozen linear layer $W x + b$, LoRA trains two thin matrices, $A$ with $r$ rows and $B$ with $r$ columns:

$$y = W x + b + \frac{\alpha}{r}\,B A x$$

The next two cells are the two files, word for word. The rest is yours to change.
"""),
        code(module("lora")),
        code(module("attention")),
        markdown("""
## A model

Torchvision's model, with its weights from ImageNet. Without network the weights are random: all else works
the same, but an adapter has little to build on.
"""),
        code("""
from functools import partial

import torchvision

IMAGES = None  # "photos", with a folder of images for each class; None draws some

try:
    model = torchvision.models.vit_b_16(weights="IMAGENET1K_V1")
except OSError as error:
    print(f"random weights, as torchvision's cannot be downloaded ({error})")
    model = torchvision.models.vit_b_16(weights=None)
"""),
        markdown("""
## Images

With `IMAGES = None`, the images are circles, squares and rectangles on grey, and the class is their colour.
That is easy on purpose: a few steps show something even with random weights.
"""),
        code("""
from PIL import Image, ImageDraw

prepare = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.transforms()
draw = torch.Generator().manual_seed(0)


def shape(colour):
    \"\"\"A shape of this colour, its kind, place and size at random.\"\"\"
    image = Image.new("RGB", (224, 224), "grey")
    kind, x, y, wide, high = torch.randint(0, 100, (5,), generator=draw).tolist()
    high = wide if kind < 66 else high  # a circle and a square are as high as wide
    box = (x, y, x + 60 + wide, y + 60 + high)
    canvas = ImageDraw.Draw(image)
    (canvas.ellipse if kind < 33 else canvas.rectangle)(box, fill=colour)
    return image


if IMAGES:
    folder = torchvision.datasets.ImageFolder(IMAGES, prepare)
    classes = folder.classes
    some = torch.randperm(len(folder), generator=draw)[:24].tolist()
    pairs = [folder[i] for i in some]
else:
    classes = ["red", "green", "blue"]
    pairs = [(prepare(shape(classes[i % 3])), i % 3) for i in range(24)]
images = torch.stack([image for image, _ in pairs])
labels = torch.tensor([label for _, label in pairs])
print(f"{len(images)} images {tuple(images.shape[1:])} of {len(classes)} classes")
"""),
        markdown("""
## Adapt it

Torchvision's attention holds query, key and value in one raw matrix and calls no layer, so `split_attention`
first turns it into four linear layers with the same numbers. Then `replace_linear` wraps each linear layer,
and `mark_trainable` freezes all but the adapters and the head.
"""),
        code("""
torch.manual_seed(0)
model.heads.head = nn.Linear(768, len(classes))
split_attention(model)
adapted = replace_linear(model, partial(LoRALinear, rank=4, alpha=16))
trainable, total = mark_trainable(model)
print(f"{len(adapted)} layers adapted, the first {adapted[0]}")
print(f"{trainable:,} of {total:,} parameters train ({trainable / total:.2%})")
"""),
        markdown("""
## Train it

Any training loop works. The optimizer gets the parameters that are not frozen; nothing else is special.
"""),
        code("""
device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
losses = []
for step, rows in enumerate(torch.arange(len(images)).split(3)):
    logits = model(images[rows].to(device))
    loss = F.cross_entropy(logits, labels[rows].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    print(f"step {step + 1}: loss {losses[-1]:.3f}")
first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
print(f"mean of the first three {first:.3f}, of the last three {last:.3f}")
"""),
        markdown(r"""
## Merge it

$W + \frac{\alpha}{r} B A$ has the shape of $W$. When it replaces $W$, the adapted model costs what the original
did, and its weights load into stock torchvision with no tensor missing and none left over.
"""),
        code("""
model.cpu().eval()
with torch.inference_mode():
    before = model(images[:4])
join_attention(merge(model))

stock = torchvision.models.vit_b_16(num_classes=len(classes)).eval()
print(stock.load_state_dict(model.state_dict(), strict=True))
with torch.inference_mode():
    after = stock(images[:4])
difference = (before - after).abs().max()
print(f"logits up to {before.abs().max():.2f}, largest difference {difference:.1e}")
"""),
        markdown("""
## Break it on purpose

What if you forget `split_attention`? Then attention is not adapted: `replace_linear` wraps 24 layers instead
of 72, and warns. A naive implementation wraps `out_proj` as well. Torchvision never calls that layer, so its
adapter learns nothing, and no error says so.
"""),
        code("""
careless = torchvision.models.vit_b_16()
adapted = replace_linear(careless, partial(LoRALinear, rank=4, alpha=16))
print(f"{len(adapted)} layers adapted")
"""),
    ]


def main(folder: Path = HERE) -> None:
    for name, cells in (("kaggle", kaggle()), ("paste", paste())):
        path = folder / f"{name}.ipynb"
        write(path, cells)
        print(f"{path.name}: {path.stat().st_size:,} bytes of at most {LARGEST:,}")


if __name__ == "__main__":
    main()
