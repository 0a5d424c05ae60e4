"""Names and layouts of published tensors: tables of rules that `tensors` reads in both directions.

They cover the released JanusFlow-1.3B, diffusers' AutoencoderKL and AutoencoderKLFlux2, Hugging
Face's Llama, and SigLIP in the naming of timm and of transformers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from janusflow_jax.config import LlamaConfig, ModelConfig, VaeConfig

TOWER = "vision_und_enc_model.vision_tower."
POOL = "attn_pool."
"""SigLIP's attention pooling head. The model never uses it; conversion carries its bytes along."""

HF_POOL = r"(vision_model\.)?head\."
"""The pooling head in transformers' naming."""

HF_BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"
"""Computed from the config, not weights; in some older files."""

SIGLIP_TEXT = (
    r"(text\.|text_model\.|logit_(scale|bias)$|(vision_model\.)?embeddings\.position_ids$)"
)
"""SigLIP's text tower and loss, which JanusFlow has no use for."""

OLD_VAE_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
"""Names of the VAE's attention before diffusers 0.17, which some files still have."""


def current_vae_name(name: str) -> str:
    """A VAE tensor's name in diffusers 0.17 and later."""
    old = "|".join(OLD_VAE_ATTENTION)
    pattern = rf"(mid_block\.attentions\.0)\.({old})\."
    return re.sub(pattern, lambda m: f"{m[1]}.{OLD_VAE_ATTENTION[m[2]]}.", name)


class Layout(NamedTuple):
    """A published array <-> ours."""

    ours: Callable[[Any], Any]
    torch: Callable[[Any], Any]


LAYOUTS = {
    "same": Layout(lambda x: x, lambda x: x),
    "linear": Layout(lambda x: x.T, lambda x: x.T),  # [out, in]
    "conv": Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW
    "pointwise": Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "lead1": Layout(lambda x: x[0], lambda x: x[None]),  # [1, ...]
    "lead3": Layout(lambda x: x[0, 0, 0], lambda x: x[None, None, None]),  # [1, 1, 1, C]
}


class Rule(NamedTuple):
    """One published tensor and the path of our parameter.

    A '{}' in `name` stands for the layer; our parameter then stacks all layers. With several
    `paths`, the tensor is our arrays joined on its first axis (a fused qkv).
    """

    name: str
    paths: tuple[str, ...]
    layout: str = "same"

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    def count(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many published tensors the rule names, from our arrays' shapes by path."""
        return shapes[self.paths[0]][0] if self.stacked else 1


def _affine(name: str, path: str, layout: str = "linear") -> list[Rule]:
    return [
        Rule(f"{name}.weight", (f"{path}/kernel",), layout),
        Rule(f"{name}.bias", (f"{path}/bias",)),
    ]


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (f"{path}/scale",)), Rule(f"{name}.bias", (f"{path}/bias",))]


def llm_rules(
    cfg: LlamaConfig, prefix: str = "", tied: bool = False, fused: bool = False
) -> list[Rule]:
    """transformers' Llama and its relatives. In a JanusFlow the prefix is 'language_model.'.

    Args:
      tied: the head is the embedding table, so no rule reads a head.
      fused: the MLP has Granite 4's names, and gate and up are one tensor.
    """
    post = cfg.norms == "post"
    attn_norm, mlp_norm = (
        ("post_attention_layernorm", "post_feedforward_layernorm")
        if post
        else ("input_layernorm", "post_attention_layernorm")
    )
    block, ours = f"{prefix}model.layers.{{}}", "llm/layers/block"
    rules = [
        Rule(f"{prefix}model.embed_tokens.weight", ("llm/embedding",)),
        Rule(f"{prefix}model.norm.weight", ("llm/norm/scale",)),
        Rule(f"{block}.{attn_norm}.weight", (f"{ours}/attn_norm/scale",)),
        Rule(f"{block}.{mlp_norm}.weight", (f"{ours}/mlp_norm/scale",)),
    ]
    if not tied:
        rules.append(Rule(f"{prefix}lm_head.weight", ("llm/head/kernel",), "linear"))
    for n in "qkvo":
        name, path = f"{block}.self_attn.{n}_proj", f"{ours}/attn/{n}"
        rules += _affine(name, path)[: 1 + (n in cfg.attn_bias)]
    for n in "qk" if cfg.qk_norm else "":
        rules.append(Rule(f"{block}.self_attn.{n}_norm.weight", (f"{ours}/attn/{n}_norm/scale",)))
    mlp, kernels = f"{block}.shared_mlp", [f"{ours}/mlp/{n}/kernel" for n in ("gate", "up", "down")]
    if fused:
        rules.append(Rule(f"{mlp}.input_linear.weight", (kernels[0], kernels[1]), "linear"))
        return [*rules, Rule(f"{mlp}.output_linear.weight", (kernels[2],), "linear")]
    for n in ("gate", "up", "down"):
        rules += _affine(f"{block}.mlp.{n}_proj", f"{ours}/mlp/{n}")[: 1 + cfg.mlp_bias]
    return rules


def siglip_rules(prefix: str) -> list[Rule]:
    """SigLIP in timm's naming. JanusFlow's prefix is TOWER, open_clip's 'visual.trunk.'."""
    ours = "und_encoder"
    block, our_block = f"{prefix}blocks.{{}}", f"{ours}/layers/block"
    qkv = [f"{our_block}/attn/{n}" for n in "qkv"]
    return [
        Rule(f"{prefix}pos_embed", (f"{ours}/pos_embedding",), "lead1"),
        *_affine(f"{prefix}patch_embed.proj", f"{ours}/patch_embed", "conv"),
        *_norm(f"{block}.norm1", f"{our_block}/norm1"),
        Rule(f"{block}.attn.qkv.weight", tuple(f"{p}/kernel" for p in qkv), "linear"),
        Rule(f"{block}.attn.qkv.bias", tuple(f"{p}/bias" for p in qkv)),
        *_affine(f"{block}.attn.proj", f"{our_block}/attn/o"),
        *_norm(f"{block}.norm2", f"{our_block}/norm2"),
        *_affine(f"{block}.mlp.fc1", f"{our_block}/mlp/fc1"),
        *_affine(f"{block}.mlp.fc2", f"{our_block}/mlp/fc2"),
        *_norm(f"{prefix}norm", f"{ours}/norm"),
    ]


def siglip_hf_rules(prefix: str) -> list[Rule]:
    """SigLIP in transformers' naming. The prefix is 'vision_model.' or ''."""
    ours = "und_encoder"
    block, our_block = f"{prefix}encoder.layers.{{}}", f"{ours}/layers/block"
    rules = [
        Rule(f"{prefix}embeddings.position_embedding.weight", (f"{ours}/pos_embedding",)),
        *_affine(f"{prefix}embeddings.patch_embedding", f"{ours}/patch_embed", "conv"),
        *_norm(f"{prefix}post_layernorm", f"{ours}/norm"),
    ]
    for i in (1, 2):
        rules += _norm(f"{block}.layer_norm{i}", f"{our_block}/norm{i}")
        rules += _affine(f"{block}.mlp.fc{i}", f"{our_block}/mlp/fc{i}")
    for n, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rules += _affine(f"{block}.self_attn.{name}", f"{our_block}/attn/{n}")
    return rules


def _und_rules() -> list[Rule]:
    return [
        Rule("beg_of_und_embed", ("und_begin/embedding",), "lead1"),
        *siglip_rules(TOWER),
        *_affine("vision_und_enc_aligner", "und_aligner"),
    ]


def _gen_rules(num_blocks: int) -> list[Rule]:
    enc, dec = "vision_gen_enc_model", "vision_gen_dec_model"
    rules = [
        *_affine(f"{enc}.in_conv", "gen_encoder/in_conv", "conv"),
        *_affine(f"{enc}.time_embed.linear_1", "gen_encoder/time_embed/linear_1"),
        *_affine(f"{enc}.time_embed.linear_2", "gen_encoder/time_embed/linear_2"),
        *_affine("vision_gen_enc_aligner", "gen_aligner"),
        Rule("vision_gen_dec_aligner_norm.weight", ("gen_norm/scale",)),
        *_affine("vision_gen_dec_aligner", "gen_head"),
        Rule(f"{dec}.input_norm.weight", ("gen_decoder/input_norm/scale",)),
        Rule(f"{dec}.out_convs.0.norm.weight", ("gen_decoder/out_norm/scale",)),
        *_affine(f"{dec}.out_convs.0.unpatch_conv", "gen_decoder/out_conv", "pointwise"),
    ]
    for module, part in ((enc, "gen_encoder"), (dec, "gen_decoder")):
        for i in range(num_blocks):
            name, path = f"{module}.mid_block.res_blocks.{i}", f"{part}/block_{i}"
            rules += [
                *_affine(f"{name}.depthwise", f"{path}/depthwise", "conv"),
                Rule(f"{name}.norm.weight", (f"{path}/norm/scale",)),
                *_affine(f"{name}.channelwise_linear_1", f"{path}/linear_1"),
                Rule(f"{name}.channelwise_norm.weight", (f"{path}/grn/scale",), "lead3"),
                Rule(f"{name}.channelwise_norm.bias", (f"{path}/grn/bias",), "lead3"),
                *_affine(f"{name}.channelwise_linear_2", f"{path}/linear_2"),
                *_affine(f"{name}.cond_embeds_mapper", f"{path}/film"),
            ]
    return rules


def _resnet_rules(name: str, path: str, shortcut: bool) -> list[Rule]:
    rules = []
    for i in (1, 2):
        rules += _norm(f"{name}.norm{i}", f"{path}/norm{i}")
        rules += _affine(f"{name}.conv{i}", f"{path}/conv{i}", "conv")
    if shortcut:
        rules += _affine(f"{name}.conv_shortcut", f"{path}/shortcut", "pointwise")
    return rules


def vae_rules(cfg: VaeConfig) -> list[Rule]:
    """diffusers' AutoencoderKL, and AutoencoderKLFlux2 without its buffers."""
    last = len(cfg.channels) - 1
    up_channels = (cfg.decoder_channels or cfg.channels)[::-1]
    quant_convs = ("quant_conv", "post_quant_conv") if cfg.quant_convs else ()
    rules = [rule for name in quant_convs for rule in _affine(name, name, "pointwise")]
    sides = (
        ("encoder", "down", "down_blocks", "downsample", cfg.channels, cfg.layers_per_block),
        ("decoder", "up", "up_blocks", "upsample", up_channels, cfg.layers_per_block + 1),
    )
    for side, ours, theirs, resample, channels, layers in sides:
        rules += _affine(f"{side}.conv_in", f"{side}/conv_in", "conv")
        rules += _norm(f"{side}.conv_norm_out", f"{side}/norm_out")
        rules += _affine(f"{side}.conv_out", f"{side}/conv_out", "conv")
        for i in (0, 1):
            name = f"{side}.mid_block.resnets.{i}"
            rules += _resnet_rules(name, f"{side}/mid/resnet_{i}", False)
        attn, our_attn = f"{side}.mid_block.attentions.0", f"{side}/mid/attn"
        rules += _norm(f"{attn}.group_norm", f"{our_attn}/norm")
        for n in ("to_q", "to_k", "to_v", "to_out.0"):
            rules += _affine(f"{attn}.{n}", f"{our_attn}/{n[3]}")
        for i, width in enumerate(channels):
            before = channels[max(i - 1, 0)]
            name, path = f"{side}.{theirs}.{i}", f"{side}/{ours}_{i}"
            for j in range(layers):
                shortcut = j == 0 and before != width
                rules += _resnet_rules(f"{name}.resnets.{j}", f"{path}/resnet_{j}", shortcut)
            if i < last:
                rules += _affine(f"{name}.{resample}rs.0.conv", f"{path}/{resample}", "conv")
    return rules


def own_rules(cfg: ModelConfig) -> list[Rule]:
    """The parts that only a JanusFlow has: neither the language model nor the tower."""
    others = ("llm/", "und_encoder/")
    return [rule for rule in janusflow_rules(cfg) if not rule.paths[0].startswith(others)]


def janusflow_rules(cfg: ModelConfig) -> list[Rule]:
    """The JanusFlow checkpoint, except the unused pooling head."""
    return llm_rules(cfg.llm, "language_model.") + _und_rules() + _gen_rules(cfg.gen.num_blocks)
