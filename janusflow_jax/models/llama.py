"""The language model: Llama with RMSNorm, rotary positions, SwiGLU, grouped heads, untied head.

Source: SPEC section 1 (transformers' Llama is the reference). One `nn.scan` over the layers, whose
parameters are stacked; for inference `unstack` gives each layer its own arrays, and the same
blocks run one after another: a scan copies every layer's weights out of the stack before it uses
them, which is half the time of a decoded token. Keys and values go in and come out as values, never
as mutable state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from janusflow_jax.config import LlamaConfig
from janusflow_jax.models import layers, quantize
from janusflow_jax.parallel import sharding

Cache = Any
"""{'k', 'v'}: [L, B, S, K, H], rotary positions already applied to k. Of unstacked layers: a tuple
of {'k', 'v'}: [B, S, K, H], or of what `quantize.keys_values` gives."""


class Attention(nn.Module):
    cfg: LlamaConfig
    impl: str

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Any, index: Any
    ) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        batch, length, _ = x.shape
        project = lambda name, heads: layers.Linear(  # noqa: E731
            heads * cfg.head_dim, use_bias=False, name=name
        )(x).reshape(batch, length, heads, cfg.head_dim)
        q, k, v = (
            sharding.constrain(project(name, heads), "batch", None, "tensor", None)
            for name, heads in (
                ("q", cfg.num_heads),
                ("k", cfg.num_kv_heads),
                ("v", cfg.num_kv_heads),
            )
        )
        q = layers.rope(q, positions, cfg.rope_theta)
        k = layers.rope(k, positions, cfg.rope_theta)
        new = {"k": k, "v": v}
        if cache is not None and "k_scale" in cache:
            new = quantize.keys_values(k, v)
        if cache is not None and index is None:  # a fixed prefix before this call's own positions
            new = {n: jnp.concatenate([cache[n], y], axis=1) for n, y in new.items()}
        elif cache is not None:  # a buffer that this call's positions are written into
            new = {
                n: lax.dynamic_update_slice_in_dim(cache[n], y.astype(cache[n].dtype), index, 1)
                for n, y in new.items()
            }
        scales = (new["k_scale"], new["v_scale"]) if "k_scale" in new else None
        out = layers.attention(q, new["k"], new["v"], mask, self.impl, scales)
        out = out.reshape(batch, length, cfg.num_heads * cfg.head_dim)
        return layers.Linear(x.shape[-1], use_bias=False, name="o")(out), new


class Mlp(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = layers.Linear(self.width, use_bias=False, name="gate")(x)
        up = layers.Linear(self.width, use_bias=False, name="up")(x)
        y = sharding.constrain(jax.nn.silu(gate) * up, "batch", None, "tensor")
        return layers.Linear(x.shape[-1], use_bias=False, name="down")(y)


class Block(nn.Module):
    cfg: LlamaConfig
    impl: str

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Any, index: Any
    ) -> tuple[Array, dict[str, Array]]:
        eps = self.cfg.norm_eps
        h, kv = Attention(self.cfg, self.impl, name="attn")(
            layers.RMSNorm(eps, name="attn_norm")(x), positions, mask, cache, index
        )
        x = sharding.constrain(x + h, "batch", None, None)
        h = Mlp(self.cfg.mlp_width, name="mlp")(layers.RMSNorm(eps, name="mlp_norm")(x))
        return sharding.constrain(x + h, "batch", None, None), kv


class Body(nn.Module):
    """One step of the scan over layers; the carry is (x, what REPA reads or None)."""

    cfg: LlamaConfig
    impl: str
    remat: bool
    capture: int
    keep: str

    @nn.compact
    def __call__(
        self, carry: Any, layer: Any, cache: Any, positions: Array, mask: Array, index: Any
    ) -> tuple[Any, Any]:
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        x, seen = carry
        x, kv = block(self.cfg, self.impl, name="block")(x, positions, mask, cache, index)
        if self.capture:
            seen = jnp.where(layer == self.capture - 1, x, seen)
        out = {"none": None, "kv": kv, "hidden": x}[self.keep]
        return (x, seen), out


class Llama(nn.Module):
    """The language model.

    `embed`, `__call__` (the blocks and the final norm) and `logits` are separate because image
    slots enter between the first two and the head runs only where there are targets.
    """

    cfg: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False
    impl: str = "xla"

    def setup(self) -> None:
        cfg = self.cfg
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.width)
        )
        self.norm = layers.RMSNorm(cfg.norm_eps)
        self.head = make_head(cfg)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings: looked up in float32 and cast after (the gradient adds in float32)."""
        return lookup(self.embedding, tokens, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | Int[Array, "B T"],
        *,
        cache: Cache | None = None,
        index: Int[Array, ""] | int | None = None,
        keep: str = "none",
        capture: int = 0,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Runs the blocks and the final norm.

        Args:
          mask: True where a query may look; S is T, plus the prefix when there is a cache. Of
            `layers.make_mask` for whole rows.
          cache: keys and values computed before; with `index` None they stand before this
            call's positions, else this call's are written into them at `index`.
          keep: 'none', 'kv' (a Cache of the keys and values seen) or 'hidden' (the states after
            each block, before the final norm).
          capture: returns the states after this many blocks (0: nothing).
        Returns:
          hidden states after the final norm, the captured states or None, what `keep` names.
        """
        seen = jnp.zeros_like(x) if capture else None
        blocks = {} if self.is_initializing() else self.variables["params"]["layers"]
        if isinstance(blocks, tuple):
            body = Body(self.cfg, self.impl, self.remat, capture, keep, parent=None)
            outs = []
            for i, block in enumerate(blocks):
                run = {"params": {"block": block}}
                own = None if cache is None else cache[i]
                (x, seen), out = body.apply(run, (x, seen), i, own, positions, mask, index)
                outs.append(out)
            return self.norm(x), seen, (None if keep == "none" else tuple(outs))
        stack = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.cfg.num_layers,
        )(self.cfg, self.impl, self.remat, capture, keep, name="layers")
        (x, seen), kept = stack(
            (x, seen), jnp.arange(self.cfg.num_layers), cache, positions, mask, index
        )
        return self.norm(x), seen, kept

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Float32 next-token logits of normed hidden states."""
        return self.head(x).astype(jnp.float32)


def unstack(llm: dict[str, Any], take: Any = lambda x, i: x[i]) -> dict[str, Any]:
    """The LLM's parameters with a tree for every layer (`layers` a tuple), for inference.

    The stacked arrays are dropped one by one as they are split, so that memory holds one of them
    twice, if the caller keeps none.

    Args: llm: its tree; emptied. take: (stacked array, layer) -> that layer's.
    """
    flat, shape = jax.tree.flatten(llm.pop("layers")["block"])
    split = []
    while flat:
        x = flat.pop()
        split.append([take(x, i) for i in range(x.shape[0])])
        del x
    layers = zip(*reversed(split), strict=True)
    out = {**llm, "layers": tuple(jax.tree.unflatten(shape, own) for own in layers)}
    llm.clear()
    return out


def empty_cache(cfg: LlamaConfig, llm: dict[str, Any], batch: int, size: int, dtype: Any) -> Cache:
    """A buffer of zeros for `size` positions, in the layout of the parameters `llm`; int8 with
    scales where its weights are int8."""
    shape = (batch, size, cfg.num_kv_heads, cfg.head_dim)
    kinds = {"k": (shape, dtype), "v": (shape, dtype)}
    if quantize.is_int8(llm["head"]["kernel"]):
        kinds = dict.fromkeys(kinds, (shape, jnp.int8))
        kinds |= {f"{n}_scale": ((*shape[:-1], 1), jnp.float32) for n in ("k", "v")}
    make = lambda *lead: {  # noqa: E731
        n: jnp.zeros((*lead, *shape), dtype) for n, (shape, dtype) in kinds.items()
    }
    if isinstance(llm["layers"], tuple):
        return tuple(make() for _ in range(cfg.num_layers))
    return make(cfg.num_layers)


def make_head(cfg: LlamaConfig) -> layers.Linear:
    return layers.Linear(cfg.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02))


def logits(cfg: LlamaConfig, head: Any, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """`Llama.logits` from the head's parameters alone."""
    return make_head(cfg).apply({"params": head}, x).astype(jnp.float32)


def lookup(
    embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """Rows of the embedding table, local to each device's rows.

    Plain indexing all-gathers the whole batch's activations on a mesh with fsdp and tensor
    (PROTOTYPES section 2), so on a mesh the look-up is a small `shard_map`.
    """
    fsdp, tensor = sharding.axis_size("fsdp"), sharding.axis_size("tensor")
    vocab, width = embedding.shape
    splits = tokens.shape[0] % sharding.batch_size() == 0
    if fsdp * tensor == 1 or vocab % tensor or width % fsdp or not splits:
        return embedding[tokens].astype(dtype)

    def local(e: Array, tok: Array) -> Array:
        rows = lax.all_gather(tok, "fsdp", axis=0, tiled=True) - lax.axis_index("tensor") * len(e)
        here = ((rows >= 0) & (rows < len(e)))[..., None]
        x = jnp.where(here, e[jnp.clip(rows, 0, len(e) - 1)], 0).astype(dtype)
        x = lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return lax.psum(x, "tensor")

    return jax.shard_map(
        local,
        in_specs=(P("tensor", "fsdp"), P(sharding.BATCH)),
        out_specs=P(sharding.BATCH),
    )(embedding, tokens)
