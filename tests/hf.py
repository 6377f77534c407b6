"""ViTs of Hugging Face and timm with the shape of vit_mini and random weights that reveal mistakes."""

import socket

import timm
import torch
import transformers
from torch import nn

import vit

SHAPE = vit.named_shape("vit_mini")
transformers.logging.set_verbosity_error()


def randomise_all(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, because the ones and zeros of a new LayerNorm or bias hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(0.1 * values + (parameter.ndim == 1) * 0.5)
    return model.eval()


def refuse_network(monkeypatch) -> None:
    """Fail if anything but this machine is asked."""

    def of_this_machine(host, *more, **settings):
        assert host == "127.0.0.1", f"a test asks the network for {host}"
        return own(host, *more, **settings)

    own = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", of_this_machine)
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)


def hf_vit(classes=("cat", "dog", "cow"), **changed) -> transformers.ViTForImageClassification:
    names = dict(enumerate(classes))
    config = transformers.ViTConfig(
        hidden_size=SHAPE["hidden_dim"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        intermediate_size=SHAPE["mlp_dim"],
        image_size=SHAPE["image_size"],
        patch_size=SHAPE["patch_size"],
        id2label=names,
        label2id={name: i for i, name in names.items()},
        **changed,
    )
    return randomise_all(transformers.ViTForImageClassification(config))


def timm_vit(classes: int = 3) -> timm.models.VisionTransformer:
    model = timm.models.VisionTransformer(
        img_size=SHAPE["image_size"],
        patch_size=SHAPE["patch_size"],
        embed_dim=SHAPE["hidden_dim"],
        depth=SHAPE["num_layers"],
        num_heads=SHAPE["num_heads"],
        mlp_ratio=SHAPE["mlp_dim"] / SHAPE["hidden_dim"],
        num_classes=classes,
    )
    return randomise_all(model)
