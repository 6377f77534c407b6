"""Make assets/toy_sdxl, the base model of train_sdxl.py without flags: Stable Diffusion XL at toy size.

    python bench/toy_sdxl.py --data-dir DIR    # DIR/FashionMNIST/raw holds the four idx files
    cp -r runs/toy_sdxl assets/                # runs/toy_sdxl.png shows what it draws

It draws clothes of 24 x 24 grey pixels, as they are and as outlines, turned, narrow, small or in part, and
has never seen a digit. Only the UNet learns. The text encoders keep their random weights: they only have to
give each caption states of its own, and a word that pretraining never used is then as good as any other.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

SIDE, TOKENS, WIDTH = 24, 16, 32  # pixels; tokens of a caption; width of a text encoder
CLOTHES = "tee trousers pullover dress coat sandal shirt sneaker bag boot".split()
DIGITS = "zero one two three four five six seven eight nine".split()
OTHERS = "a the of digit thin thick outline part turned narrow small".split()
SHOWN = [f"a {kind}" for kind in CLOTHES] + [f"the thick outline of a {kind}" for kind in CLOTHES]
SHOWN += ["a turned sneaker", "a small coat", "a narrow bag", "a part of a boot"] * 2


def tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's kind of tokenizer: each of our words is one token, other words are spelt in pieces.
    pad: the token that fills a caption up; SDXL's two tokenizers differ in it."""
    words = CLOTHES + DIGITS + OTHERS
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(words, bpe)
    learnt = json.loads(learner.to_str())["model"]
    letters = [letter + end for letter in "!abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    tokens = [*letters, *sorted(learnt["vocab"]), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    return CLIPTokenizer(vocabulary, merges, pad_token=pad, model_max_length=TOKENS)


def text_encoder(kind, tokens: CLIPTokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    encoder = kind(config).requires_grad_(False).eval()
    # CLIP's first weights are for long training: the words would hardly differ, nor move the pooled text.
    for name, weight in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            weight.normal_(std=0.5)
        elif weight.dim() == 2 and "position" not in name:
            weight.mul_(2)
    return encoder


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16, 32, 96),
        down_block_types=("DownBlock2D",) * 2 + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(1, 1, 2, 6),  # the number of heads, in spite of the name
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        norm_num_groups=4,
    )


@torch.no_grad()
def exact_vae() -> AutoencoderKL:
    """An AutoencoderKL of one latent channel that is an affine map: grey x in [-1, 1] becomes
    11.625 x + 5.8125, and 0.13025 of that has a mean near 0 and a deviation near 1.

    Its residual parts are zero. The last layers are GroupNorm, SiLU and a convolution. The channels that
    reach them are 64 + x, 64 - x, -64 and -64: their mean and, nearly, their deviation do not depend on x,
    and SiLU of about 64 is the identity.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=1,
        block_out_channels=(4,),
        norm_num_groups=1,
        sample_size=SIDE,
        scaling_factor=0.13025,
        mid_block_add_attention=False,
    )
    for weight in vae.parameters():
        weight.zero_()

    def affine(half, into: list[float], out_scale: list[float], out_bias: list[float]) -> None:
        half.conv_in.weight[0, :, 1, 1] = torch.tensor(into)
        half.conv_in.weight[1, :, 1, 1] = -torch.tensor(into)
        half.conv_in.bias.copy_(torch.tensor([64.0, 64.0, -64.0, -64.0]))
        half.conv_norm_out.weight.fill_(64)
        half.conv_out.weight[:, 0, 1, 1] = torch.tensor(out_scale) / 2
        half.conv_out.weight[:, 1, 1, 1] = -torch.tensor(out_scale) / 2
        half.conv_out.bias.copy_(torch.tensor(out_bias))

    affine(vae.encoder, [0.25, 0.5, 0.25], [11.625, 0.0], [5.8125, -30.0])  # mean, log of variance
    affine(vae.decoder, [1 / 11.625], [1.0] * 3, [-0.5] * 3)
    vae.quant_conv.weight[:, :, 0, 0] = torch.eye(2)
    vae.post_quant_conv.weight.fill_(1)
    return vae.eval()


def build() -> StableDiffusionXLPipeline:
    first, second = tokenizer("<|endoftext|>"), tokenizer("!")
    return StableDiffusionXLPipeline(
        vae=exact_vae(),
        text_encoder=text_encoder(CLIPTextModel, first),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, second),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet(),
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
        ),
        add_watermarker=False,
    )


def pictures(images: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Grey (B, 1, 24, 24) in [0, 1] and captions, from clothes (B, 1, 28, 28): two in five as they are."""
    B = len(images)
    plain = torch.rand(B) < 0.4
    part, turned, narrow, outline = (torch.rand(B) < p for p in (0.25, 0.35, 0.3, 0.6))
    small, thick = ~part & (torch.rand(B) < 0.35), torch.rand(B) < 0.6
    for change in (part, turned, narrow, small, outline):
        change &= ~plain
    angle = torch.where(turned, 0.7 + 4.9 * torch.rand(B), 0.4 * torch.rand(B) - 0.2) * ~plain
    zoom = torch.where(part, 1.6 + torch.rand(B), 0.8 + 0.2 * torch.rand(B))
    zoom = torch.where(small, 0.45 + 0.2 * torch.rand(B), zoom).masked_fill(plain, 1.0)
    width = torch.where(narrow, 0.45 + 0.25 * torch.rand(B), torch.ones(B)) * zoom
    shear = (0.6 * torch.rand(B) - 0.3) * ~plain
    shift = (2 * torch.rand(B, 2) - 1) * torch.where(part, 0.5, 0.1)[:, None] * ~plain[:, None]
    cos, sin = angle.cos(), angle.sin()
    # From a place in the picture, -1 .. 1, to the place in the photograph that is shown there.
    rows = torch.stack([cos / width, (shear - sin) / width, sin / zoom, cos / zoom], 1)
    theta = torch.cat([rows.view(B, 2, 2), shift[:, :, None]], 2)
    grid = F.affine_grid(theta, [B, 1, 2 * SIDE, 2 * SIDE], align_corners=False)
    large = F.grid_sample(images, grid, align_corners=False)
    mask = (4 * large - 0.6).clamp(0, 1)
    inner = -F.max_pool2d(-mask, 3, 1, 1)
    thin_line = F.max_pool2d(mask, 3, 1, 1) - inner
    thick_line = F.max_pool2d(mask, 5, 1, 2) + F.max_pool2d(-mask, 5, 1, 2)
    line = torch.where(thick[:, None, None, None], thick_line, thin_line)
    shown = F.avg_pool2d(torch.where(outline[:, None, None, None], line, large), 2)
    captions = []
    for b, kind in enumerate(kinds.tolist()):
        words = ["the thick outline of" if thick[b] else "the thin outline of"] * bool(outline[b])
        words += ["a part of"] * bool(part[b]) + ["a"]
        words += ["turned"] * bool(turned[b]) + ["narrow"] * bool(narrow[b])
        words += ["small"] * bool(small[b]) + [CLOTHES[kind]]
        captions.append(" ".join(words))
    return shown, captions


@torch.no_grad()
def text_states(pipe, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, TOKENS, 2 WIDTH) and pooled (B, WIDTH), as SDXL's pipeline makes them."""
    states = []
    for tokens, encoder in (
        (pipe.tokenizer, pipe.text_encoder),
        (pipe.tokenizer_2, pipe.text_encoder_2),
    ):
        numbers = tokens(captions, padding="max_length", truncation=True, return_tensors="pt")
        output = encoder(numbers.input_ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    return torch.cat(states, -1), output.text_embeds


@torch.no_grad()
def draw(pipe, prompts: list[str], guidance: float, steps: int = 16) -> torch.Tensor:
    """(B, 24, 24) in 0 .. 255, from the same noise in each call."""
    sampler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe = StableDiffusionXLPipeline(**{**pipe.components, "scheduler": sampler})
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(len(prompts), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    shown = pipe(
        prompts,
        height=SIDE,
        width=SIDE,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    return (255 * shown[:, 0]).round().byte()


def save(pipe, model: UNet2DConditionModel, folder: Path) -> None:
    """Write the pipeline with this UNet. UNet and VAE are in half precision; the text encoders are small, and
    transformers would open half precision as such, where diffusers opens float32."""
    parts = {"unet": copy.deepcopy(model).half(), "vae": copy.deepcopy(pipe.vae).half()}
    StableDiffusionXLPipeline(**{**pipe.components, **parts}).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/toy_sdxl"))
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clothes = data.load("fashion-mnist", args.data_dir).train
    images = torch.from_numpy(clothes.pixels[:, None, :, :, 0])
    kinds = torch.from_numpy(clothes.labels)
    torch.manual_seed(args.seed)
    pipe = build()
    model = pipe.unet.train()
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    signal = pipe.scheduler.alphas_cumprod.sqrt()[:, None, None, None]
    noisiness = (1 - pipe.scheduler.alphas_cumprod).sqrt()[:, None, None, None]
    sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).expand(args.batch_size, -1).float()
    start, losses = time.time(), []
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(images), (args.batch_size,))
        shown, captions = pictures(images[rows].float() / 255, kinds[rows])
        latents = 0.13025 * 11.625 * (2 * shown - 1 + 0.5)
        words, pooled = text_states(pipe, captions)
        # One in ten learns to draw without a caption.
        told = (torch.rand(args.batch_size) >= 0.1).float()
        condition = {"text_embeds": pooled * told[:, None], "time_ids": sizes}
        # Early steps decide what is drawn: they come more often.
        t = (1000 * torch.rand(args.batch_size).sqrt()).long()
        noise = torch.randn_like(latents)
        noisy = signal[t] * latents + noisiness[t] * noise
        guess = model(noisy, t, words * told[:, None, None], added_cond_kwargs=condition).sample
        loss = F.mse_loss(guess, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        mean.update_parameters(model)
        losses.append(loss.item())
        if step % 50 == 0:
            loss = sum(losses[-50:]) / 50
            print(f"step {step}, loss {loss:.4f}, {time.time() - start:.0f} s", flush=True)
        if step % 250 == 0 or step == args.steps:
            save(pipe, mean.module, args.out)
            trained = StableDiffusionXLPipeline.from_pretrained(args.out)
            drawn = draw(trained, SHOWN, 3.0)
            sheet = torch.cat([torch.cat([*row], 1) for row in drawn.split(7)]).numpy()
            Image.fromarray(sheet).save(args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
