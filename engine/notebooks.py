"""Write kaggle.ipynb, paste.ipynb and minimal.ipynb from the modules, so that there is one copy of the code.

    python -m engine.notebooks

kaggle.ipynb writes the modules to files and trains with them: those of the method and its loop by %%writefile,
so that they can be read; the others packed into one cell. paste.ipynb has lora.py and attention.py as cells, and
nothing else of the project; minimal.ipynb has minimal.py as well. A test runs this script and the notebooks.
"""

import base64
import bz2
import json
import re
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
ENGINE += "config run start submission tables"
PACKED = ["data", "predict", *(f"engine/{name}" for name in ENGINE.split())]
MODULES = "lora loha lokr attention vit train".split()  # in cells, to be read
LARGEST = 500_000  # bytes: with its outputs, Kaggle saves no notebook of more than 1 MB
BLOCKS = 3  # of the embedded trunk's six, in kaggle.ipynb


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
    """600 of the embedded digits and half of the embedded trunk, as base85.

    The files of assets/ would make a notebook of 8 MB. The trunk's first BLOCKS blocks stay. Of a matrix, the
    small weights of a row become 0, the others -1 or 1 times their mean: of these thresholds, 0.7 times the mean of
    a row's |w| is near the best for a normal distribution (arXiv:1605.04711, section 2.2). Other tensors are
    float16. An image has eight greys.
    """
    tensors = {}
    for name, weight in load_file(weights.EMBEDDED).items():
        block = re.search(r"encoder_layer_(\d+)", name)
        if name.startswith("heads.") or (block and int(block[1]) >= BLOCKS):
            continue
        if name.endswith("weight") and weight.ndim > 1:
            size = weight.abs().flatten(1)
            large = size > 0.7 * size.mean(1, keepdim=True)
            step = ((size * large).sum(1) / large.sum(1)).half()
            tensors[f"{name}.step"] = step.view(-1, *[1] * (weight.ndim - 1))  # one for each row
            weight = (weight.sign() * large.view_as(weight)).to(torch.int8)
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
    """The sources of PACKED, as base85."""
    return packed(json.dumps({name: module(name) for name in PACKED}).encode())


def kaggle() -> list[dict]:
    """The cells of kaggle.ipynb."""
    return [
        markdown(r"""
# LoRA, LoHa and LoKr for Vision Transformers, from scratch

A Vision Transformer that was trained on many images learns yours, while its own weights stay frozen. What
trains is a small *adapter* beside each linear layer. This notebook holds all code that it runs, in plain
PyTorch.

You need not know any of it to start. On the right, under *Session options*, choose the *Accelerator* GPU T4 x2
and switch *Internet* on (Kaggle asks for your phone number once). Under *Input*, press *Add Input* and attach
one of these. Then press *Run All*.

| attach | what trains |
|---|---|
| nothing | a tiny pretrained model that knows only clothes learns handwritten digits: a few minutes, also without GPU and internet |
| [Tiny ImageNet](https://www.kaggle.com/datasets/akash2sharma/tiny-imagenet) | ViT-B/16 learns 200 classes, with LoRA on every linear layer |
| [Food 101](https://www.kaggle.com/datasets/dansbecker/food-101) or [food41](https://www.kaggle.com/datasets/kmader/food41) | google's ViT-B/16 (in21k) learns seven dishes from 5,000 photographs, with LoRA on query and value |
| a competition with images and a table of labels, as [cassava](https://www.kaggle.com/competitions/cassava-leaf-disease-classification) or [aptos2019](https://www.kaggle.com/competitions/aptos2019-blindness-detection) | ViT-B/16 learns the labels of its `train.csv`, and `submission.csv` gets the answers |
| your own photographs, in one folder for each class | ViT-B/16 learns the names of the folders; set `SETTINGS` below |

To train while you sleep, press *Save Version* and choose *Save & Run All*: this runs up to twelve hours,
without your browser. After `HOURS` the training saves and stops. What it leaves is in the folder `adapters`,
under *Output*. To continue, attach that output with *Add Input* and run the notebook again.

If there is no internet, attach the weights of ViT-B/16 as well: the file
[vit_b_16-c867db91.pth](https://download.pytorch.org/models/vit_b_16-c867db91.pth) in a data set of your own,
or a folder `vit-base-patch16-224-in21k` for Food 101.

On Colab the same works: choose a GPU under *Runtime, Change runtime type*, upload or mount your images, and
let `SETTINGS` name their folder.
"""),
        code("""
import os
import platform
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

INPUT = "/kaggle/input"  # the folder of everything attached
START = time.time()
gpus = torch.cuda.device_count()
try:
    socket.create_connection(("download.pytorch.org", 443), 5).close()
    internet = True
except OSError:
    internet = False

versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
print(f"Python {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores")
print("GPUs:", ", ".join(map(torch.cuda.get_device_name, range(gpus))) or "none")
print("internet:", "yes" if internet else "no")
if not gpus:
    print(
        "WITHOUT A GPU only the digits train in minutes. On a CPU, ViT-B/16 sees about two images a second: "
        "an epoch of Tiny ImageNet takes half a day. Choose the Accelerator GPU T4 x2."
    )
mounts = "* datasets/*/* competitions/* notebooks/*/* models/*/*/*/*/*".split()
for folder in sorted(path for mount in mounts for path in Path(INPUT).glob(mount)):
    if folder.name not in ("datasets", "competitions", "notebooks", "models"):
        print("attached:", folder)
"""),
        markdown("""
## Settings

As they are, the table above decides. To choose something else, delete the `#` and the space in front of
one of the other lines, and put the path of your images there, as it is printed above.
"""),
        code("""
SETTINGS = {}
# SETTINGS = {"dataset": "folder", "data_dir": "/kaggle/input/photos"}  # a folder for each class
# SETTINGS = {"dataset": "csv", "data_dir": "/kaggle/input/leaves"}  # train.csv, and images anywhere
# SETTINGS = {"recipe": "food101-lokr"}  # all of Food 101
# SETTINGS = {"adapter": "lokr", "lr": 6e-3, "epochs": 2}  # any flag but out, resume, max_hours
# For photographs, take 2.5 times LoRA's lr of 1e-3 for LoHa, 6 times for LoKr. The digits' recipe does so.
COMPARE = None  # more adapters to train: ["lokr", "loha"]; None: lokr, but only on the digits
HOURS = 11.0  # from the first cell on; then training saves and stops
"""),
        markdown("""
## The code

Each of these cells writes one file into a temporary folder, so it overwrites nothing of yours. The cells are
folded. Open `lora.py` first: it is the method in one file. After a change, run the cell, restart the session
and *Run All*. Data, predictions and what makes a run dependable (`engine/`) are packed into the last of them.
"""),
        code("""
CODE = Path(tempfile.gettempdir(), "vit-adapters")
(CODE / "engine").mkdir(parents=True, exist_ok=True)
sys.path.insert(0, str(CODE))
"""),
        *(
            code(f"%%writefile {{CODE}}/{name}.py\n" + module(name), hidden=True)
            for name in MODULES
        ),
        code("%%writefile {CODE}/engine.b85\n" + engine(), hidden=True),
        code(
            """
import base64
import bz2
import json

text = (CODE / "engine.b85").read_text().replace("\\n", "")
for name, source in json.loads(bz2.decompress(base64.b85decode(text))).items():
    (CODE / f"{name}.py").write_bytes(source.encode())
""",
            hidden=True,
        ),
        markdown("""
## The data

The digits and the tiny pretrained model, for a notebook with nothing attached. Kaggle saves notebooks of at
most 1 MB, outputs included. So the model has only the first three of its six blocks, each weight is -1, 0 or 1
times a number of its row, and a pixel has one of eight greys.
"""),
        code("%%writefile {CODE}/demo.b85\n" + demo(), hidden=True),
        code(
            """
import PIL.Image
from safetensors.torch import load, save_file

text = (CODE / "demo.b85").read_text().replace("\\n", "")
packed = load(bz2.decompress(base64.b85decode(text)))

names = "zero one two three four five six seven eight nine".split()
for part in ("train", "val"):
    images, labels = packed.pop(f"{part}.images"), packed.pop(f"{part}.labels")
    greys = (images.float() * 255 / 7).round().byte().numpy()
    for i, (grey, label) in enumerate(zip(greys, labels, strict=True)):
        file = CODE / "digits" / part / names[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(grey).save(file)

steps = {name: packed.pop(name) for name in [*packed] if name.endswith(".step")}
trunk = {name: t.float() * steps.get(f"{name}.step", 1) for name, t in packed.items()}
images = {"image_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3, "crop": 1.0}
metadata = {"preprocessing": json.dumps(images), "shape": json.dumps({"num_heads": 4})}
save_file(trunk, CODE / "trunk.safetensors", metadata)
print(f"trunk.safetensors: {sum(t.numel() for t in trunk.values()):,} weights")
print(f"digits: {len(list(CODE.glob('digits/*/*/*.png'))):,} images")
""",
            hidden=True,
        ),
        markdown("""
MNIST's digits are by Yann LeCun and Corinna Cortes, [CC BY-SA 3.0](https://creativecommons.org/licenses/by-sa/3.0/)
(600 of them, in eight greys). The tiny model was trained on [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist),
MIT License, © 2017 Zalando SE.

Now find out what is attached:
"""),
        code("""
import data
import vit
from engine import checkpoint, pictures
from engine.adapt import ADAPT, METHODS, adapt
from engine.config import FREE, Config
from engine.start import begin, load_data
from engine.tables import SAMPLES, TABLES, choose, in_test


def found(title, fits):
    \"\"\"The first folder below INPUT for which fits is true, or None.\"\"\"
    try:
        return data.find(title, INPUT, fits, "")
    except FileNotFoundError:
        return None


def attached(*names):
    return found(" and ".join(names), lambda folder: all((folder / n).exists() for n in names))


def competition(folder):
    names = {path.name.lower() for path in folder.glob("*.csv")}
    return names & {*TABLES} and names & {*SAMPLES}


# The recipe of Tiny ImageNet, ViT-B/16 with LoRA, suits other photographs too.
settings = {"recipe": SETTINGS.get("recipe", "tiny-imagenet-lora")}
demo = False
if "dataset" in SETTINGS:
    title = Path(SETTINGS.get("data_dir", SETTINGS["dataset"])).name
elif "recipe" in SETTINGS:
    title = SETTINGS["recipe"]
elif folder := attached("wnids.txt", "train"):
    settings["data_dir"], title = str(folder), "tiny-imagenet"
elif folder := attached("images", "meta"):
    settings, title = {"recipe": "food101-lora", "data_dir": str(folder)}, "food101"
elif folder := found("a competition", competition):
    settings |= {"dataset": "csv", "data_dir": str(folder)}
    title = folder.name
else:
    settings = {"recipe": "demo", "weights": str(CODE / "trunk.safetensors"), "epochs": 20}
    settings |= {"dataset": "folder", "data_dir": str(CODE / "digits")}
    title, demo = "digits", True
settings |= SETTINGS
file = "vit_b_16-c867db91.pth"
if begin(Config(**settings))[0].weights == "imagenet1k" and (folder := attached(file)):
    settings["weights"] = str(folder / file)
# Downloaded and decoded images do not belong into the notebook's output.
settings.setdefault("cache_dir", f"{tempfile.gettempdir()}/cache")
if settings.get("download"):
    settings.setdefault("data_dir", f"{tempfile.gettempdir()}/data")
config, _, _ = begin(Config(**settings))  # with the settings of init_adapter, if that is given
print(settings)
"""),
        code("""
dataset = load_data(config)
print(f"{len(dataset.train):,} images train, {len(dataset.val):,} validate")
print(f"{len(dataset.classes)} classes: {', '.join(dataset.classes[:10])}")
if not gpus and not demo:
    hours = len(dataset.train) * config.epochs / 2 / 3600
    print(f"NO GPU: on a CPU this takes about {hours:,.1f} hours; choose the Accelerator GPU T4 x2")
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

A run saves itself in its folder, every ten minutes and after each epoch. After a stop, run the cell again: the
run continues where it was. In a later session, attach the output of the earlier one: the run is copied from
there. Other `SETTINGS` make another run. With two GPUs, `torchrun` starts one process for each; they share
every batch and add up their gradients.

Each line is an epoch, a pass through all training images. *Accuracy* is the share of validation images, which
do not train, that the model names rightly.
"""),
        code("""
import re
import shlex
import shutil
import zlib

KEEP = Path("adapters")  # the output: everything else is in temporary folders
os.environ["TQDM_MININTERVAL"] = "60"  # seconds: the notebook keeps each state of a progress bar


def folder_of(adapter):
    \"\"\"The folder of a run, named after its settings; copied from an earlier session if that is attached.\"\"\"
    known = {"adapter", "dataset", *FREE} - {"model", "recipe", "weights"}
    values = {k: v for k, v in SETTINGS.items() if k not in known and v not in (None, title)}
    if "weights" in values:  # wherever they are attached
        mount = "(competitions/|(datasets|models|notebooks)/[^/]+/)?"
        values["weights"] = re.sub(f"^{re.escape(INPUT)}/{mount}", "", str(values["weights"]))
    parts = [title, adapter, *(f"{key}-{value}" for key, value in values.items())]
    name = re.sub(r"[^\\w.]+", "-", "-".join(parts))
    if len(name.encode()) > 100:  # a file system allows 255 bytes
        name = f"{name[:60]}-{zlib.crc32(name.encode()):08x}"
    folder, earlier = KEEP / name, []
    found(name, lambda place: (place / name / "last.pt").exists() and earlier.append(place / name))
    if earlier and not folder.exists():  # of several sessions, take the one that came furthest
        shutil.copytree(max(earlier, key=progress), folder)
    return folder


def progress(run):
    last = checkpoint.read_resume(run / "last.pt", mmap=True)
    return last["step"], bool(last["result"])


def flag(name, value):
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {shlex.quote(str(value))}"


def launch(processes, settings):
    \"\"\"Run train.py in processes of their own: an error there does not end the notebook.\"\"\"
    flags = " ".join(flag(*pair) for pair in settings.items() if pair[1] is not None)
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}"
    start = f"{sys.executable} {torchrun if processes > 1 else ''}"
    get_ipython().system(f"{start} {CODE}/train.py {flags}")  # as a line that starts with !


def train(adapter):
    \"\"\"Train, or resume; return the run's folder.\"\"\"
    folder = folder_of(adapter)
    hours = max(0.0001, HOURS - (time.time() - START) / 3600)
    more = {"adapter": adapter, "out": folder, "resume": True, "max_hours": f"{hours:.4f}"}
    launch(max(1, gpus), settings | more)
    metrics, curves = folder / "metrics.csv", folder / "curves.png"
    if metrics.exists() and not curves.exists():  # stopped: the end would have drawn them
        pictures.plot_curves(metrics, curves, f"{folder.name}, so far")
    return folder


run = train(config.adapter)
"""),
        code("""
import io

from IPython.display import Image, display


def show(file):
    \"\"\"Show a picture as a JPEG: a PNG of photographs would make the notebook too large to be saved.\"\"\"
    if not file.exists():
        print(f"{file.name}: comes at the end of training")
        return
    picture = PIL.Image.open(file).convert("RGB")
    picture.thumbnail((1000, 1000))
    picture.save(jpeg := io.BytesIO(), "jpeg", quality=85)
    display(Image(jpeg.getvalue(), format="jpeg"))


show(run / "curves.png")
"""),
        code("""
show(run / "predictions.png")
"""),
        markdown("""
Other adapters, if `COMPARE` names some, and how far all runs have come:
"""),
        code("""
if COMPARE is None:
    COMPARE = ["lokr"] if demo else []
for adapter in COMPARE:
    train(adapter)
for file in sorted(KEEP.glob("*/last.pt")):
    last = checkpoint.read_resume(file, mmap=True)
    best = last["best"].get("val_accuracy")
    state = "finished" if last["result"] else f"stopped after step {last['step']}"
    best = f"{best:.1%}" if best else "none yet"
    print(f"{file.parent.name}: {state}, best validation accuracy {best}")
"""),
        markdown("""
## What is on an image?

`adapter.safetensors` holds the trained tensors, the class names and the name of the pretrained model. With it,
`predict.py` names images that training has not seen:
"""),
        code("""
some = dataset.val.rows(data.even_rows(dataset.val.labels, 8)).files
sheet = CODE / "sheet.png"
if (run / "adapter.safetensors").exists() and some:
    files = shlex.join(some)
    !{sys.executable} {CODE}/predict.py {run} {files} --figure {sheet}
    show(sheet)
"""),
        markdown("""
For a competition, `predict.py` names the images that have no label, in the form of the competition's
`sample_submission.csv`. The file `submission.csv` is then under *Output*, ready to be submitted. `--flip` also
looks at mirror images and takes the mean.
"""),
        code("""
if config.dataset == "csv" and (run / "adapter.safetensors").exists():
    images, others = data.images_below(config.data_dir)
    sample = choose(others, SAMPLES)
    labelled = {*dataset.train.files, *dataset.val.files}
    new = [image for image in images if image not in labelled]
    new = [image for image in new if in_test(image)] or new
    if not sample or not new:
        print("no sample_submission.csv, or no image without a label: nothing to submit")
    else:
        names = shlex.quote(os.path.commonpath([os.path.dirname(image) for image in new]))
        sample = shlex.quote(sample)
        !{sys.executable} {CODE}/predict.py {run} {names} --flip --submission {sample}
"""),
        markdown("""
## Two processes through torchrun

With two GPUs, the training above ran like this. With one or none, this cell shows it with the digits, two
steps on the CPU. Each process has half of each batch; together they learn what one would.
"""),
        code("""
if demo and gpus < 2:
    short = {"limit": 2 * config.batch_size, "epochs": 1, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        launch(2, settings | short | {"out": f"{folder}/run"})
"""),
        markdown("""
## TensorBoard

The curves of all runs. Kaggle does not show TensorBoard's page, so there you see each run's `curves.png`
instead; `metrics.csv` beside it has the figures.
"""),
        code("""
if Path("/kaggle").exists():
    for folder in sorted(KEEP.glob("*")):
        if folder != run:  # whose curves are shown above
            show(folder / "curves.png")
else:
    try:
        %load_ext tensorboard
        %tensorboard --logdir {KEEP}
    except Exception as error:
        print(f"TensorBoard does not start ({error}); see curves.png in {KEEP}")
"""),
    ]


def minimal() -> list[dict]:
    """The cells of minimal.ipynb."""
    tiny = 'DATA = "/kaggle/input/tiny-imagenet/tiny-imagenet-200"  # a folder with train/<class>/*.jpg'
    text = re.sub("(?m)^DATA = .*$", tiny, module("minimal"))
    return [
        markdown("""
# The whole method in three cells

The first two cells are `lora.py` and `attention.py`, the third is `minimal.py`: torchvision's ViT-B/16 learns
the class folders in `DATA`, with LoRA on every linear layer, and nothing is hidden.

`DATA` is a folder with `train/<class>/*.jpg` and, if you have it, `val/<class>/*.jpg`. On Kaggle, attach
[Tiny ImageNet](https://www.kaggle.com/datasets/akash2sharma/tiny-imagenet) or your own images, choose the
*Accelerator* GPU T4 x2, switch *Internet* on (for the pretrained weights), set `DATA` near the top of the third
cell, and *Run All*. The last line that it prints is the validation accuracy.
"""),
        code(module("lora")),
        code(module("attention")),
        code(text),
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

Any training loop works. The optimizer gets the parameters that are not frozen; nothing else is special. LoHa
and LoKr want a higher learning rate than LoRA: 2.5 times and 6 times.
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
    for name, cells in (("kaggle", kaggle()), ("paste", paste()), ("minimal", minimal())):
        path = folder / f"{name}.ipynb"
        write(path, cells)
        print(f"{path.name}: {path.stat().st_size:,} bytes of at most {LARGEST:,}")


if __name__ == "__main__":
    main()
