"""The architecture and file layout of Stable Diffusion XL, at toy size with random weights."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS, WIDTH = 100, 32


def toy_sdxl(folder: Path) -> Path:
    """Write the models to folder and return it.

    There are two text encoders, whose hidden states are concatenated; a UNet, which takes these, the pooled
    text and the image sizes; and the scheduler. The configurations are SDXL's, with smaller numbers.
    """
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=WIDTH + 6 * 4,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    unet.save_pretrained(folder / "unet")
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDPMScheduler(**betas).save_pretrained(folder / "scheduler")
    return folder


def toy_pipeline(folder: Path, **scheduler) -> Path:
    """toy_sdxl with a VAE (a latent is two pixels wide) and tokenizers, which know letters: a whole pipeline.

    scheduler: other values of its configuration.
    """
    toy_sdxl(folder)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025,
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|startoftext|>", "<|endoftext|>", "!", *letters, *(f"{a}</w>" for a in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    first, second = (
        CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)
        for pad in ("<|endoftext|>", "!")
    )
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    models = {name: kind.from_pretrained(folder / name) for name, kind in kinds.items()}
    steps = DDPMScheduler.from_pretrained(folder / "scheduler")
    StableDiffusionXLPipeline(
        vae=vae,
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        tokenizer=first,
        tokenizer_2=second,
        scheduler=DDPMScheduler.from_config(steps.config, **scheduler),
        **models,
    ).save_pretrained(folder)
    return folder


SIZES = [(40, 30), (30, 40), (64, 64), (20, 60), (100, 50), (33, 47), (24, 24), (61, 31), (47, 40)]
TEXTS = ["some cat", "a red bird", 'the "old",\u2028house\nby the sea']


def write_pictures(folder: Path, form: str = "jsonl", count: int = len(SIZES)) -> list[str]:
    """Write pictures of noise, of (width, height) SIZES, with captions as metadata.jsonl, .csv or .txt."""
    folder.mkdir(exist_ok=True)
    random, rows = np.random.default_rng(0), []
    for i, (width, height) in enumerate(SIZES[:count]):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": TEXTS[i % 3]})
    if form == "jsonl":
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / "metadata.jsonl").write_text(lines, "utf-8")
    elif form == "csv":
        with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "file_name"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        for i, row in enumerate(rows):
            (folder / f"{i}.txt").write_text(row["text"], "utf-8")
    return [row["file_name"] for row in rows]


def predicted_noise(unet, text_encoder, second, noisy, steps, tokens) -> torch.Tensor:
    """The UNet's prediction, as in SDXL's training script."""
    first = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    with torch.no_grad():
        pooled = second(tokens, output_hidden_states=True)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(len(noisy), -1)
    conditions = {"text_embeds": pooled.text_embeds, "time_ids": sizes}
    words = torch.cat([first, pooled.hidden_states[-2]], dim=-1)
    return unet(noisy, steps, words, added_cond_kwargs=conditions).sample
