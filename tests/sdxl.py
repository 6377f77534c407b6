"""The architecture and file layout of Stable Diffusion XL, at toy size with random weights."""

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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


def predicted_noise(unet, text_encoder, second, noisy, steps, tokens) -> torch.Tensor:
    """The UNet's prediction, as in SDXL's training script."""
    first = text_encoder(tokens, output_hidden_states=True).hidden_states[-2]
    with torch.no_grad():
        pooled = second(tokens, output_hidden_states=True)
    sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).expand(len(noisy), -1)
    conditions = {"text_embeds": pooled.text_embeds, "time_ids": sizes}
    words = torch.cat([first, pooled.hidden_states[-2]], dim=-1)
    return unet(noisy, steps, words, added_cond_kwargs=conditions).sample
