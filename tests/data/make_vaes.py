"""Makes tests/data/vaes: autoencoders of diffusers of FLUX's forms, and what they compute.

    python tests/data/make_vaes.py      # extra `dev`: needs torch and diffusers

Tiny and random. Run by hand; the tests read what it left. The slow tests call `build` with other
sizes.
"""

import json
import pathlib
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "vaes"
SIZES = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False}
FORMS: dict[str, dict[str, Any]] = {
    "flux1": {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **PLAIN},
    "flux2": {"latent_channels": 8, "decoder_block_out_channels": [4, 8]},
    "mean_std": {
        "latent_channels": 4,
        "scaling_factor": 0.5,
        "shift_factor": 9.0,  # the mean replaces it
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 2.0, 1.0],
    },
}
"""Form -> the keys of its config.json beside SIZES."""


def build(form: str, sizes: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    """An autoencoder with random parameters, and its config.json."""
    kind = "AutoencoderKLFlux2" if form == "flux2" else "AutoencoderKL"
    count = len(sizes["block_out_channels"])
    config = {
        **FORMS[form],
        **sizes,
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
    }
    model = getattr(diffusers, kind)(**config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            spread = 0.2 if p.ndim == 1 else p[0].numel() ** -0.5
            p.copy_(offset + torch.randn_like(p) * spread)
        if form == "flux2":
            model.bn.running_mean.normal_()
            model.bn.running_var.uniform_(0.2, 2.0)
            model.bn.num_batches_tracked.fill_(7)
    return model, {"_class_name": kind, **config}


def scaled(model: Any, config: dict[str, Any], latents: torch.Tensor) -> torch.Tensor:
    """Latents as diffusers' pipelines of SDXL, FLUX.1 and FLUX.2 hand them to their models."""
    if "latents_mean" in config:
        mean, std = (torch.tensor(config[f"latents_{n}"])[:, None, None] for n in ("mean", "std"))
        return (latents - mean) * config["scaling_factor"] / std
    if "shift_factor" in config:
        return (latents - config["shift_factor"]) * config["scaling_factor"]
    pipeline = diffusers.Flux2Pipeline
    return pipeline._unpatchify_latents(model.bn(pipeline._patchify_latents(latents)))


def compute(model: Any, config: dict[str, Any], side: int) -> dict[str, torch.Tensor]:
    """Random images, and the posterior, the scaled latents and the decoded mean, NCHW."""
    images = torch.rand(2, 3, side, side) * 2 - 1
    with torch.no_grad():
        posterior = model.encode(images).latent_dist
        return {
            "images": images,
            "mean": posterior.mean,
            "logvar": posterior.logvar,
            "scaled": scaled(model, config, posterior.mean),
            "decoded": model.decode(posterior.mean).sample,
        }


def save(folder: pathlib.Path, model: torch.nn.Module, config: dict[str, Any]) -> None:
    """The folder that diffusers would write."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.contiguous() for n, x in model.state_dict().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    torch.manual_seed(0)
    for form in ("flux1", "flux2"):
        model, config = build(form, SIZES)
        save(OUT / form, model, config)
        expected = {n: x.contiguous() for n, x in compute(model, config, 8).items()}
        save_file(expected, OUT / form / "expected.safetensors")


if __name__ == "__main__":
    main()
