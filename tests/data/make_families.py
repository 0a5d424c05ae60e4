"""Makes tests/data/families: tiny language models of transformers, and the logits of each.

    python tests/data/make_families.py      # extra `dev`: needs torch and transformers

One file a model: its tensors, `tokens` and `logits`, and config.json in the header. Run by hand;
`tests/test_families.py` reads what it left, and its slow tests make new ones of other sizes.
"""

import json
import pathlib

import torch
import transformers
from make_torch_parts import randomize
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "families"
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # so that waves of all lengths occur in so small a head
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
MODELS = {
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "deepseek_coder": ("Llama", {"rope_parameters": LINEAR}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {"rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"rope_parameters": PLAIN, "head_dim": 10}),
    "olmo2": ("Olmo2", {"rope_parameters": PLAIN}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "granite": ("Granite", {**GRANITE, "tie_word_embeddings": True}),
    "granite4": (
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "layer_types": ["attention"] * 2,
            "num_local_experts": 0,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 40,
            "mamba_n_heads": 4,
            "mamba_d_head": "auto",
        },
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8, "use_bias": True}),
}
"""Name -> the prefix of the classes, and the fields of the config."""


def make(
    name: str, seed: int = 0, **sizes: int
) -> tuple[dict[str, torch.Tensor], dict[str, object], torch.Tensor, torch.Tensor]:
    """A model's tensors, its config.json, tokens and their logits."""
    torch.manual_seed(seed)
    prefix, fields = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(
        **{**SIZES, **fields, **sizes}, attn_implementation="eager", pad_token_id=None
    )
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    randomize(model)
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    tokens = torch.randint(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = model(tokens).logits
    tied = config.tie_word_embeddings
    tensors = {
        n: x.contiguous().clone()
        for n, x in model.state_dict().items()
        if not (tied and n == "lm_head.weight")
    }
    return tensors, json.loads(config.to_json_string(use_diff=False)), tokens, logits


def main() -> None:
    OUT.mkdir(exist_ok=True)
    for name in MODELS:
        tensors, config, tokens, logits = make(name)
        extra = {"tokens": tokens.to(torch.int32), "logits": logits}
        save_file(tensors | extra, OUT / f"{name}.safetensors", {"config": json.dumps(config)})
        print(name, f"{float(logits.std()):.2f}", (OUT / f"{name}.safetensors").stat().st_size)


if __name__ == "__main__":
    main()
