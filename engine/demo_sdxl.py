"""The demo of train_sdxl.py: embedded digits with captions, and how many drawings of them are recognised."""

from pathlib import Path

import torch
import torch.nn.functional as F

import data
import vit
from engine.text_to_image import Picture

JUDGE = Path(__file__).resolve().parent.parent / "assets" / "toy_sdxl_judge.safetensors"
SIDE = 24  # pixels: the middle of a digit's 28
NAMES = "zero one two three four five six seven eight nine".split()
CAPTIONS = [f"the digit {name}" for name in NAMES]
EACH = 20  # drawings of each digit


def pictures(limit: int | None = None) -> list[Picture]:
    """The 4,000 digits of the main demo's test split, on which the judge was not trained."""
    digits = data.load("demo", limit=limit).test
    edge = (28 - SIDE) // 2
    pixels = digits.pixels[:, edge : edge + SIDE, edge : edge + SIDE]
    return [
        Picture(image, CAPTIONS[label], (SIDE, SIDE))
        for image, label in zip(pixels, digits.labels, strict=True)
    ]


def score(draw, words, noise_shape: tuple[int, int, int], seed: int = 1000) -> float:
    """The fraction (0..1) of drawings that the judge takes for the digit asked for.

    The judge is an adapter of the main demo's trunk, trained by train.py on other digits. draw: a function
    from what the UNet reads of prompts, and noise, to pictures (N, 3, SIDE, SIDE) in 0..1.
    """
    model, info = vit.load_adapter(JUDGE)
    labels = torch.arange(10).repeat_interleave(EACH)
    noise = torch.randn(len(labels), *noise_shape, generator=torch.Generator().manual_seed(seed))
    drawn = draw(words([CAPTIONS[label] for label in labels]), noise)
    drawn = F.pad(drawn.mean(1, keepdim=True).expand(-1, 3, -1, -1), [(28 - SIDE) // 2] * 4)
    mean, std = (torch.tensor(info["preprocessing"][key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        return (model((drawn - mean) / std).argmax(-1) == labels).double().mean().item()
