"""Published checkpoints <-> our trees: the only file that knows torch's names and layouts.

Names: those of the released JanusFlow-1.3B, and of diffusers' AutoencoderKL. One table of rules is
read in both directions, so a round trip is exact. Arrays are numpy and keep their type (also
ml_dtypes' bfloat16); torch is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from janusflow_jax.config import ModelConfig, VaeConfig
from janusflow_jax.models import janusflow, vae

Tensors = Mapping[str, Any]
UNUSED = r"vision_und_enc_model\.vision_tower\.attn_pool\."
"""SigLIP's pooling head: in the published file, used by nothing, kept for export."""

_OLD_VAE_NAMES = {
    "query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0",
}  # fmt: skip
"""Names of the VAE's attention before diffusers 0.17, which some files still have."""


class ConvertError(ValueError):
    """Tensors or config values that do not fit; the message lists every problem."""


class _Layout(NamedTuple):
    """torch's array <-> ours."""

    ours: Callable[[Any], Any]
    torch: Callable[[Any], Any]


_LAYOUTS = {
    "same": _Layout(lambda x: x, lambda x: x),
    "linear": _Layout(lambda x: x.T, lambda x: x.T),  # [out, in]
    "conv": _Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),  # OIHW
    "pointwise": _Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "lead1": _Layout(lambda x: x[0], lambda x: x[None]),  # [1, ...]
    "lead3": _Layout(lambda x: x[0, 0, 0], lambda x: x[None, None, None]),  # [1, 1, 1, C]
}


class Rule(NamedTuple):
    """One published tensor: `name` has '{}' for the layer where ours is stacked over layers.

    Several `paths` mean that the tensor is our arrays joined on its first axis (a fused qkv).
    """

    name: str
    paths: tuple[str, ...]
    layout: str = "same"

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def _affine(name: str, path: str, layout: str = "linear") -> list[Rule]:
    return [
        Rule(f"{name}.weight", (f"{path}/kernel",), layout),
        Rule(f"{name}.bias", (f"{path}/bias",)),
    ]


def _norm(name: str, path: str) -> list[Rule]:
    return [Rule(f"{name}.weight", (f"{path}/scale",)), Rule(f"{name}.bias", (f"{path}/bias",))]


def _llm_rules() -> list[Rule]:
    block, ours = "language_model.model.layers.{}", "llm/layers/block"
    rules = [
        Rule("language_model.model.embed_tokens.weight", ("llm/embedding",)),
        Rule("language_model.model.norm.weight", ("llm/norm/scale",)),
        Rule("language_model.lm_head.weight", ("llm/head/kernel",), "linear"),
        Rule(f"{block}.input_layernorm.weight", (f"{ours}/attn_norm/scale",)),
        Rule(f"{block}.post_attention_layernorm.weight", (f"{ours}/mlp_norm/scale",)),
    ]
    for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for n in names:
            path = f"{ours}/{'attn' if part == 'self_attn' else part}/{n}/kernel"
            rules.append(Rule(f"{block}.{part}.{n}_proj.weight", (path,), "linear"))
    return rules


def _und_rules() -> list[Rule]:
    tower, ours = "vision_und_enc_model.vision_tower", "und_encoder"
    block, our_block = f"{tower}.blocks.{{}}", f"{ours}/layers/block"
    qkv = [f"{our_block}/attn/{n}" for n in "qkv"]
    return [
        Rule("beg_of_und_embed", ("und_begin/embedding",), "lead1"),
        Rule(f"{tower}.pos_embed", (f"{ours}/pos_embedding",), "lead1"),
        *_affine(f"{tower}.patch_embed.proj", f"{ours}/patch_embed", "conv"),
        *_norm(f"{block}.norm1", f"{our_block}/norm1"),
        Rule(f"{block}.attn.qkv.weight", tuple(f"{p}/kernel" for p in qkv), "linear"),
        Rule(f"{block}.attn.qkv.bias", tuple(f"{p}/bias" for p in qkv)),
        *_affine(f"{block}.attn.proj", f"{our_block}/attn/o"),
        *_norm(f"{block}.norm2", f"{our_block}/norm2"),
        *_affine(f"{block}.mlp.fc1", f"{our_block}/mlp/fc1"),
        *_affine(f"{block}.mlp.fc2", f"{our_block}/mlp/fc2"),
        *_norm(f"{tower}.norm", f"{ours}/norm"),
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


def _repa_rules() -> list[Rule]:
    return [r for i in range(3) for r in _affine(f"repa_head.{2 * i}", f"linear_{i}")]


def _resnet_rules(name: str, path: str, shortcut: bool) -> list[Rule]:
    rules = []
    for i in (1, 2):
        rules += _norm(f"{name}.norm{i}", f"{path}/norm{i}")
        rules += _affine(f"{name}.conv{i}", f"{path}/conv{i}", "conv")
    if shortcut:
        rules += _affine(f"{name}.conv_shortcut", f"{path}/shortcut", "pointwise")
    return rules


def _vae_rules(cfg: VaeConfig) -> list[Rule]:
    last = len(cfg.channels) - 1
    rules = [
        *_affine("quant_conv", "quant_conv", "pointwise"),
        *_affine("post_quant_conv", "post_quant_conv", "pointwise"),
    ]
    sides = (
        ("encoder", "down", "down_blocks", "downsample", cfg.channels, cfg.layers_per_block),
        ("decoder", "up", "up_blocks", "upsample", cfg.channels[::-1], cfg.layers_per_block + 1),
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


def janusflow_rules(cfg: ModelConfig) -> list[Rule]:
    """The table for the JanusFlow checkpoint: every name but the unused pooling head's."""
    return _llm_rules() + _und_rules() + _gen_rules(cfg.gen.num_blocks)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A nested dict as ('llm/head/kernel', leaf) pairs."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _torch_shape(rule: Rule, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of one published tensor (one layer of a stack) from our arrays' shapes."""
    shape = shapes[rule.paths[0]][int(rule.stacked) :]
    probe = np.broadcast_to(np.int8(0), shape)
    first, *rest = _LAYOUTS[rule.layout].torch(probe).shape if shape else shape
    return (first * len(rule.paths), *rest)


def torch_shapes(rules: list[Rule], tree: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every published tensor that a tree of arrays (or shapes) stands for."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(tree)}
    out = {}
    for rule in rules:
        shape = _torch_shape(rule, shapes)
        count = shapes[rule.paths[0]][0] if rule.stacked else 1
        out |= {rule.name.format(i): shape for i in range(count)}
    return out


def _raise(what: str, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise ConvertError(f"{what} ({len(problems)} problems):\n{lines}")


def _from_torch(tensors: Tensors, rules: list[Rule], expected: Any, what: str) -> dict[str, Any]:
    wanted = torch_shapes(rules, expected)
    problems = [f"missing: {n} {list(s)}" for n, s in wanted.items() if n not in tensors]
    problems += [f"unknown: {n} {list(x.shape)}" for n, x in tensors.items() if n not in wanted]
    problems += [
        f"shape of {n}: expected {list(s)}; got {list(tensors[n].shape)}"
        for n, s in wanted.items()
        if n in tensors and tuple(tensors[n].shape) != s
    ]
    hint = "compare the config files with the tensors; they must be of the same model"
    _raise(f"{what}: the tensors do not fit the config; {hint}", problems)
    leaves: dict[str, Any] = {}
    counts = {path: leaf.shape[0] for path, leaf in flatten(expected) if leaf.shape}
    for rule in rules:
        layers = counts[rule.paths[0]] if rule.stacked else 1
        arrays = [np.asarray(tensors[rule.name.format(i)]) for i in range(layers)]
        if len({a.dtype for a in arrays}) > 1:
            kinds = sorted({str(a.dtype) for a in arrays})
            problems.append(f"type of {rule.name}: expected one type in all layers; got {kinds}")
            continue
        ours = _LAYOUTS[rule.layout].ours
        parts = [[ours(p) for p in np.split(a, len(rule.paths))] for a in arrays]
        for i, path in enumerate(rule.paths):
            layer = [p[i] for p in parts]
            leaves[path] = np.stack(layer) if rule.stacked else np.ascontiguousarray(layer[0])
    _raise(what, problems)
    return unflatten(leaves)


def _to_torch(tree: Any, rules: list[Rule], expected: Any, what: str) -> dict[str, np.ndarray]:
    leaves = dict(flatten(tree))
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(expected)}
    problems = [f"missing: {p} {list(s)}" for p, s in wanted.items() if p not in leaves]
    problems += [f"unknown: {p} {list(x.shape)}" for p, x in leaves.items() if p not in wanted]
    problems += [
        f"shape of {p}: expected {list(s)}; got {list(leaves[p].shape)}"
        for p, s in wanted.items()
        if p in leaves and tuple(leaves[p].shape) != s
    ]
    _raise(f"{what}: the parameters do not fit the config", problems)
    tensors = {}
    for rule in rules:
        arrays = [np.asarray(leaves[path]) for path in rule.paths]
        torch = _LAYOUTS[rule.layout].torch
        for i in range(len(arrays[0]) if rule.stacked else 1):
            parts = [torch(a[i] if rule.stacked else a) for a in arrays]
            joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
            tensors[rule.name.format(i)] = np.ascontiguousarray(joined)
    return tensors


def _published_shapes(cfg: ModelConfig) -> dict[str, Any]:
    return {n: part for n, part in janusflow.param_shapes(cfg).items() if n != "repa_head"}


def janusflow_from_torch(
    tensors: Tensors, cfg: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The published checkpoint's tensors -> (our tree without `repa_head`, unused tensors).

    Raises:
      ConvertError: every missing, unknown and misshaped tensor.
    """
    unused = {n: np.asarray(x) for n, x in tensors.items() if re.match(UNUSED, n)}
    used = {n: x for n, x in tensors.items() if n not in unused}
    return _from_torch(used, janusflow_rules(cfg), _published_shapes(cfg), "JanusFlow"), unused


def janusflow_to_torch(
    params: Mapping[str, Any], unused: Tensors, cfg: ModelConfig
) -> dict[str, np.ndarray]:
    """Our tree -> published names. `repa_head` (training only) is left out; `unused` comes back.

    Raises:
      ConvertError: every missing, unknown and misshaped parameter.
    """
    params = {n: part for n, part in params.items() if n != "repa_head"}
    tensors = _to_torch(params, janusflow_rules(cfg), _published_shapes(cfg), "JanusFlow")
    return tensors | {n: np.asarray(x) for n, x in unused.items()}


def vae_from_torch(tensors: Tensors, cfg: VaeConfig) -> dict[str, Any]:
    """diffusers' AutoencoderKL -> our tree; also with its attention's names before 0.17.

    Raises:
      ConvertError: every missing, unknown and misshaped tensor.
    """
    old = re.compile(r"(mid_block\.attentions\.0)\.(query|key|value|proj_attn)\.")
    named = {old.sub(lambda m: f"{m[1]}.{_OLD_VAE_NAMES[m[2]]}.", n): x for n, x in tensors.items()}
    return _from_torch(named, _vae_rules(cfg), vae.param_shapes(cfg), "VAE")


def vae_to_torch(params: Mapping[str, Any], cfg: VaeConfig) -> dict[str, np.ndarray]:
    """Our VAE tree -> diffusers' names."""
    return _to_torch(params, _vae_rules(cfg), vae.param_shapes(cfg), "VAE")


def repa_from_torch(tensors: Tensors, cfg: ModelConfig) -> dict[str, Any]:
    """`repa_head.{0,2,4}` -> our `repa_head` tree (the golden numbers' names)."""
    expected = janusflow.param_shapes(cfg)["repa_head"]
    return _from_torch(tensors, _repa_rules(), expected, "REPA head")


def repa_to_torch(params: Mapping[str, Any], cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `repa_from_torch`."""
    return _to_torch(params, _repa_rules(), janusflow.param_shapes(cfg)["repa_head"], "REPA head")
