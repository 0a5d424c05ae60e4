"""Makes tests/data/towers: towers of transformers that JanusFlow's is not, and their features.

    python tests/data/make_towers.py      # extra `dev`: needs torch and transformers

`naflex` is a SigLIP 2 that is given an image of 6 x 6 patches, with a table of 4 x 4 positions.
`patch14` stands for SO400M at 384 px: the image is no multiple of the patch. Both have the tanh
GELU, as SigLIP's weights were trained. Run by hand; the tests read what it left.
"""

import json
import pathlib
from typing import Any

import torch
from make_torch_parts import randomize
from safetensors.torch import save_file
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

OUT = pathlib.Path(__file__).parent / "towers"
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def naflex(sizes: dict[str, Any], side: int) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """A SigLIP 2, its config.json, and a function from images NCHW to features."""
    values = {"patch_size": 4, "num_patches": 16, **sizes}
    model = Siglip2VisionModel(
        Siglip2VisionConfig(**values, attn_implementation="eager")
    ).eval()
    randomize(model)
    patch = values["patch_size"]

    def features(images: torch.Tensor) -> torch.Tensor:
        """As the processor of transformers makes patches: columns (row, column, color)."""
        batch = len(images)
        patches = images.reshape(batch, 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1)
        return model(
            pixel_values=patches.reshape(batch, side * side, -1),
            pixel_attention_mask=torch.ones(batch, side * side, dtype=torch.long),
            spatial_shapes=torch.tensor([[side, side]] * batch),
        ).last_hidden_state

    return model, {"model_type": "siglip2_vision_model", **values}, features


def fixed(sizes: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """A SigLIP of a fixed size, as `naflex`."""
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, attn_implementation="eager")).eval()
    randomize(model)
    return (
        model,
        {"model_type": "siglip_vision_model", **sizes},
        lambda images: model(images).last_hidden_state,
    )


def save(folder: pathlib.Path, tower: Any, side: int) -> None:
    """A folder as of transformers, and random images of `side` px with their features."""
    model, config, features = tower
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.contiguous() for n, x in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    images = torch.rand(2, 3, side, side) * 2 - 1
    with torch.no_grad():
        expected = {"images": images, "features": features(images).contiguous()}
    save_file(expected, folder / "expected.safetensors")


def main() -> None:
    torch.manual_seed(0)
    save(OUT / "naflex", naflex(SIZES, 6), 24)
    save(OUT / "patch14", fixed(SIZES | {"image_size": 22, "patch_size": 5}), 22)


if __name__ == "__main__":
    main()
