"""assets/toy_sdxl, the base model of train_sdxl.py without flags: Stable Diffusion XL, at toy size."""

import numpy as np
import pytest
import torch

import data

diffusers = pytest.importorskip("diffusers")
FOLDER = data.ASSETS / "toy_sdxl"
DIGITS = [f"the digit {name}" for name in data.load("demo").classes]


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str]) -> np.ndarray:
    """(N, 24, 24), 0 .. 1, from fixed noise."""
    noise = torch.randn(len(prompts), 1, 24, 24, generator=torch.Generator().manual_seed(0))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    drawn = pipe(
        prompts, latents=noise, num_inference_steps=8, guidance_scale=3.0, output_type="np"
    )
    assert drawn.images.shape[1:] == (24, 24, 3)  # the sides come from the folder
    assert np.abs(drawn.images - drawn.images[..., :1]).max() < 1e-3  # grey
    return drawn.images[..., 0]


def test_it_draws_what_it_is_asked_for(pipe):
    """Trousers are darker in the middle column, at their feet, than at both legs; a bag is filled there.
    Random weights draw neither."""
    n = 8
    drawn = draw(pipe, ["a trousers"] * n + ["a bag"] * n)
    low = drawn[:, 14:20].mean(1)  # (2 n, 24): brightness from left to right, below the middle
    middle, legs = low[:, 11:13].mean(1), np.maximum(low[:, 8:11].mean(1), low[:, 13:16].mean(1))
    corners = drawn[:, :3, :3].mean((1, 2))
    assert corners.max() < 0.15  # clothes lie on black
    assert (middle < 0.8 * legs)[:n].mean() > 0.7 and (middle > 0.8 * legs)[n:].mean() > 0.7


@torch.inference_mode()
def test_the_vae_is_affine_and_exact(pipe):
    """Encoding gives 11.625 x + 5.8125 with no variance, and decoding gives x again."""
    vae = pipe.vae.float()
    x = 2 * torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0)) - 1
    latents = vae.encode(x.expand(-1, 3, -1, -1)).latent_dist
    torch.testing.assert_close(latents.mean, 11.625 * x + 5.8125, rtol=0, atol=2e-3)
    assert latents.std.max() < 1e-6
    again = vae.decode(latents.sample()).sample
    torch.testing.assert_close(again, x.expand(-1, 3, -1, -1), rtol=0, atol=5e-4)
    scaled = vae.config.scaling_factor * latents.mean  # about (grey - 0.25) / 0.33
    torch.testing.assert_close(scaled, ((x + 1) / 2 - 0.25) / 0.33, rtol=0, atol=5e-3)


def test_the_tokenizers_know_the_words(pipe):
    """Each word of the digits' captions is one token, and no two digits have the same tokens."""
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        for caption in DIGITS:
            assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
            assert len(tokenizer(caption).input_ids) == 5 <= tokenizer.model_max_length
        assert len({tuple(tokenizer(caption).input_ids) for caption in DIGITS}) == 10
        assert len(tokenizer.tokenize("ninety")) > 1  # a word that it does not know
    tokenizers = pipe.tokenizer, pipe.tokenizer_2
    ends = [each("a coat", padding="max_length").input_ids[-1] for each in tokenizers]
    assert ends == [pipe.tokenizer.eos_token_id, 0]  # SDXL's two ways to fill up


def test_captions_differ_for_the_unet(pipe):
    """The text encoders are random, so nothing but this says that captions reach the UNet: states and pooled
    text of two digits are far apart, compared with their size."""
    words, _, pooled, _ = pipe.encode_prompt(
        DIGITS, device="cpu", do_classifier_free_guidance=False
    )
    for states in (words[:, 4], pooled):
        apart = torch.pdist(states)
        assert apart.min() > 0.2 * states.norm(dim=-1).mean()


def test_the_folder_is_small():
    """At most 6 MB, with the adapter that judges the drawings and the picture."""
    parts = [
        *FOLDER.rglob("*"),
        data.ASSETS / "toy_sdxl_judge.safetensors",
        data.ASSETS / "toy_sdxl.png",
    ]
    assert sum(path.stat().st_size for path in parts if path.is_file()) < 6_000_000
    assert (data.ASSETS / "toy_sdxl.png").stat().st_size < 150_000
