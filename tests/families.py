"""Tiny models of every family of plain ViTs, of timm and transformers, with random weights.

FAMILIES[name](folder, side) writes the folder as the library does, config.json included, and returns the
model, its head, and a function from images to logits. Widths, depths and heads are such that a wrong number
shows.
"""

import timm
import transformers
from hf import randomise_all
from torch import nn

transformers.logging.set_verbosity_error()
TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}  # not width / 64
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "patch_size": 14,
}


def of_timm(name: str, patch: int = 14, **changed):
    """A model of timm, tiny, as save_for_hf writes it."""

    def make(folder, side):
        changes = {**TINY, "img_size": side, "num_classes": 3, "patch_size": patch, **changed}
        model = randomise_all(timm.create_model(name, **changes))
        timm.models.save_for_hf(model, folder, safe_serialization=True)
        if hasattr(model, "head_dist"):  # its forward takes the mean of two heads
            return model, model.head, lambda x: model.head(model.forward_features(x)[:, 0])
        return model, model.head, model

    return make


def of_transformers(kind: str, **changed):
    """A model of transformers for image classification, tiny, as save_pretrained writes it."""

    def make(folder, side):
        config = getattr(transformers, f"{kind}Config")(
            **SHAPE, image_size=side, num_labels=3, **changed
        )
        model = randomise_all(getattr(transformers, f"{kind}ForImageClassification")(config))
        model.save_pretrained(folder)
        return model, model.classifier, lambda images: model(images).logits

    return make


def clip(act: str):
    """CLIP's image tower, which has no classifier: ours reads pooler_output."""

    def make(folder, side):
        config = transformers.CLIPVisionConfig(**SHAPE, image_size=side, hidden_act=act)
        model = randomise_all(transformers.CLIPVisionModel(config))
        head = randomise_all(nn.Linear(64, 3), 1)
        model.save_pretrained(folder)
        return model, head, lambda images: head(model(images).pooler_output)

    return make


FAMILIES = {
    "timm augreg": of_timm("vit_small_patch16_224", patch=7),
    "timm DeiT": of_timm("deit_small_patch16_224"),
    "timm DeiT distilled": of_timm("deit_small_distilled_patch16_224"),
    "timm DeiT III": of_timm("deit3_small_patch16_224", init_values=1.0),
    "timm DINOv2": of_timm("vit_small_patch14_dinov2"),
    "timm DINOv2 registers": of_timm("vit_small_patch14_reg4_dinov2"),
    "timm CLIP": of_timm("vit_base_patch16_clip_224"),
    "timm CLIP quickgelu": of_timm("vit_base_patch16_clip_quickgelu_224"),
    "timm miil": of_timm("vit_base_patch16_224_miil"),
    "timm giant": of_timm("vit_giant_patch14_dinov2", mlp_ratio=2.0),
    "timm mean": of_timm("vit_base_patch16_gap_224"),
    "ViT": of_transformers("ViT"),
    "DeiT": of_transformers("DeiT"),
    "DINOv2": of_transformers("Dinov2", mlp_ratio=2),
    "DINOv2 registers": of_transformers("Dinov2WithRegisters", mlp_ratio=2),
    "DINOv2 giant": of_transformers("Dinov2", mlp_ratio=2, use_swiglu_ffn=True),
    "I-JEPA": of_transformers("IJepa"),
    "CLIP": clip("gelu"),
    "CLIP quick_gelu": clip("quick_gelu"),
}
