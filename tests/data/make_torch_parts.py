"""Makes tests/data/torch_parts: a Llama and a SigLIP of transformers, and what they compute.

    python tests/data/make_torch_parts.py      # extra `dev`: needs torch and transformers

Tiny and random, but of the kinds that the released parts are not: grouped heads, a tied head,
another rope theta and eps. Run by hand; the tests read what it left.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

OUT = pathlib.Path(__file__).parent / "torch_parts"


def randomize(model: torch.nn.Module) -> None:
    """Every parameter random, so that nothing hides behind a zero or a one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            offset = 1.0 if p.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0
            p.copy_(offset + torch.randn_like(p) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5))


def save(model: torch.nn.Module, name: str, config: dict, drop: str = "") -> None:
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.contiguous() for n, x in model.state_dict().items() if n != drop}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 616,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    }
    theta = 5000.0
    llama = LlamaForCausalLM(
        LlamaConfig(
            **sizes,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            attn_implementation="eager",
        )
    ).eval()
    randomize(llama)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": theta}
    save(llama, "llama", config | sizes, drop="lm_head.weight")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, attn_implementation="eager")).eval()
    randomize(siglip)
    save(siglip, "siglip", {"model_type": "siglip_vision_model"} | sizes)
    tokens = torch.randint(0, 616, (2, 12))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = {
            "tokens": tokens,
            "logits": llama(tokens).logits,
            "pixels": pixels,
            "features": siglip(pixels).last_hidden_state,
        }
    save_file({n: x.contiguous() for n, x in expected.items()}, OUT / "expected.safetensors")


if __name__ == "__main__":
    main()
