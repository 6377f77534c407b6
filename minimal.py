"""LoRA on a Vision Transformer, nothing hidden. In a notebook, first paste lora.py and attention.py.

    python minimal.py           # a small ViT trained on clothes learns digits: no download, one minute
    python minimal.py photos    # torchvision's ViT-B/16 learns photos/train/<class>/*.jpg

Validation: photos/val/<class>/*.jpg or, without them, every tenth training image. TensorBoard reads runs/.
"""

import gzip
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter
from torchvision import datasets, models, transforms

if "split_attention" not in globals():  # in a notebook, the cells above define these names
    from attention import split_attention
    from lora import LoRALinear, mark_trainable, replace_linear

DATA = None  # a folder with train/<class>/*.jpg and val/<class>/*.jpg; None: the digits in assets/
SEED, EPOCHS, BATCH, RANK, ALPHA = 0, 5, 64, 4, 32
ASSETS = Path(globals().get("__file__", "minimal.py")).resolve().parent / "assets"
MINI = (28, 7, 6, 4, 128, 512, 0, 0, 10)  # pixels, patch, layers, heads, width, mlp, ..., classes
HALF = {"crop_size": 28, "resize_size": 28, "mean": [0.5] * 3, "std": [0.5] * 3}  # MINI's images


def digits(folder=Path("runs/digits"), train=4000, val=2000):
    """Write handwritten digits as folder/train/<digit>/*.png and folder/val/<digit>/*.png."""
    files = [ASSETS / f"digits-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    images, labels = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
    images = torch.frombuffer(images, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    for i in range(train + val):
        file = folder / ("train" if i < train else "val") / str(labels[8 + i]) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        transforms.functional.to_pil_image(images[i]).save(file)
    return folder


def load(folder, augment, prepare):
    """The training images, the validation images and the class names of a folder."""
    train, val = (datasets.ImageFolder(f"{folder}/train", change) for change in (augment, prepare))
    names = sorted(path.name for path in Path(folder).glob("val/*") if path.is_dir())
    if len(train.classes) < 2 or names not in ([], ["images"], train.classes):
        raise FileNotFoundError(f"{folder}: train/ and val/ need the same two or more classes")
    if names == train.classes:
        return train, datasets.ImageFolder(f"{folder}/val", prepare), names
    print(f"{folder}/val has no class folders: every tenth training image validates")
    rows = range(len(train))  # sorted by class
    return Subset(train, [i for i in rows if i % 10]), Subset(val, rows[::10]), train.classes


def train(model, epochs, val, writer, lr, weight_decay=0.03):
    """Train; return the last val accuracy. lr: LoHa needs 2.5 times, LoKr 6 times as much as LoRA."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    step, steps = 0, sum(map(len, epochs))
    for batches in epochs:  # epochs[i] has the batches of epoch i
        model.train()
        for images, labels in batches:  # (B, 3, H, W), (B,)
            optimizer.param_groups[0]["lr"] = rate = lr * (1 - step / steps)  # linear to zero
            logits = model(images)  # (B, classes)
            loss = torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            writer.add_scalar("train/loss", loss.item(), step)
            writer.add_scalar("lr", rate, step)
        accuracy = evaluate(model, val)
        writer.add_scalar("val/accuracy", accuracy, step)
        print(f"step {step} of {steps}: loss {loss.item():.3f}, validation accuracy {accuracy:.2%}")
    return accuracy


@torch.inference_mode()
def evaluate(model, batches):
    """The fraction of images whose largest logit is that of their class."""
    model.eval()
    hits = [model(images).argmax(1).cpu() == labels for images, labels in batches]  # each (B,)
    return torch.cat(hits).double().mean().item()


def main(data=DATA):
    torch.manual_seed(SEED)
    prepare = models.ViT_B_16_Weights.IMAGENET1K_V1.transforms(**({} if data else HALF))
    change = [transforms.RandomResizedCrop(256), transforms.RandomHorizontalFlip()] if data else []
    images, val, classes = load(data or digits(), transforms.Compose([*change, prepare]), prepare)
    model = models.vit_b_16(weights="IMAGENET1K_V1") if data else models.VisionTransformer(*MINI)
    split_attention(model)  # query, key, value and out of each block become nn.Linear layers
    if not data:
        model.load_state_dict(load_file(ASSETS / "vit_mini.safetensors"))
    model.heads.head = torch.nn.Linear(model.hidden_dim, len(classes))  # for the new classes
    replace_linear(model, lambda linear: LoRALinear(linear, RANK, ALPHA))  # y = W x + b + s B A x
    print("{:,} of {:,} parameters train".format(*mark_trainable(model)))  # A, B and the head
    gpus = torch.nn.DataParallel(model.cuda()) if torch.cuda.is_available() else model
    epochs = [DataLoader(images, BATCH, shuffle=True, num_workers=2 if data else 0)] * EPOCHS
    with SummaryWriter() as writer:
        accuracy = train(gpus, epochs, DataLoader(val, BATCH), writer, 1e-3 if data else 5e-3)
    print(f"Validation Accuracy: {accuracy:.2%}")


if __name__ == "__main__":
    try:
        main(" ".join(sys.argv[1:] if "__file__" in globals() else []) or DATA)
    except OSError as error:
        print(f"minimal.py: {error}; set DATA to a folder with train/<class>/", file=sys.stderr)
        sys.exit(2)
