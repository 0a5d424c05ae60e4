"""The language model: Llama with RMSNorm, rotary positions, SwiGLU, grouped heads, untied head.

Source: Llama, arXiv 2302.13971; the reference is transformers' Llama. Its relatives (Qwen, OLMo 2,
SmolLM 3 and others) differ by fields of `LlamaConfig`. Training runs one `nn.scan`
over layers with stacked parameters. For inference `unstack` gives each layer its own arrays, and
the same blocks run one after another: a scan copies the weights of a layer out of the stack before
it uses them, which is half the time of a decoded token. Keys and values go in and come out as
values, never as mutable state.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int8

from janusflow_jax.config import LlamaConfig
from janusflow_jax.models import int8, layers
from janusflow_jax.models.attention import SAVED_NAMES, dot_product_attention
from janusflow_jax.parallel import sharding

Cache = Any
"""{'k', 'v'}: [L, B, S, K, H], with rotary positions applied to k. Of unstacked layers: a tuple of
{'k', 'v'}: [B, S, K, H], or of the result of `int8.keys_values`."""


class Attention(nn.Module):
    cfg: LlamaConfig
    impl: str

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Any, index: Any
    ) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        batch, length, _ = x.shape
        # Heads before positions, as the TPU kernel wants them: so the projections write them
        # there, and no copy is made.
        project = lambda name, heads: layers.Linear(  # noqa: E731
            heads * cfg.head_dim, use_bias=name in cfg.attn_bias, heads=heads, name=name
        )(x).swapaxes(1, 2)
        q, k, v = (
            sharding.constrain(project(name, heads), "batch", "tensor", None, None)
            for name, heads in (
                ("q", cfg.num_heads),
                ("k", cfg.num_kv_heads),
                ("v", cfg.num_kv_heads),
            )
        )
        if cfg.qk_norm:
            # Kept before the norms, because their gradients need it.
            q, k = (self._qk_norm(checkpoint_name(x, n), n) for x, n in ((q, "q"), (k, "k")))
        freq = layers.rope_frequencies(cfg.head_dim // 2, cfg.rope_theta, cfg.rope)
        q, k = (layers.rope(x, positions, freq) for x in (q, k))
        if not cfg.qk_norm:
            q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, checkpoint_name(v, "v")))
        new = {"k": k, "v": v}
        if cache is not None and "k_scale" in cache:
            new = int8.keys_values(k, v)
        if cache is not None and index is None:  # a fixed prefix before this call's own positions
            new = {n: jnp.concatenate([cache[n], y], axis=1) for n, y in new.items()}
        elif cache is not None:  # a buffer that this call's positions are written into
            new = {n: write(cache[n], y.astype(cache[n].dtype), index) for n, y in new.items()}
        scales = (new["k_scale"], new["v_scale"]) if "k_scale" in new else None
        out = dot_product_attention(q, new["k"], new["v"], mask, self.impl, scales)
        out = out.reshape(batch, length, cfg.num_heads * cfg.head_dim)
        proj = layers.Linear(x.shape[-1], use_bias="o" in cfg.attn_bias, name="o")(out)
        return checkpoint_name(proj, "proj"), new

    def _qk_norm(self, x: Array, name: str) -> Array:
        """RMSNorm of queries or keys [B, N, T, H], of each head or of all together."""
        norm = layers.RMSNorm(self.cfg.norm_eps, name=f"{name}_norm")
        if self.cfg.qk_norm == "head":
            return norm(x)
        batch, heads, length, size = x.shape
        x = norm(x.swapaxes(1, 2).reshape(batch, length, heads * size))
        return x.reshape(batch, length, heads, size).swapaxes(1, 2)


class Mlp(nn.Module):
    width: int
    use_bias: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate = layers.Linear(self.width, use_bias=self.use_bias, name="gate")(x)
        up = layers.Linear(self.width, use_bias=self.use_bias, name="up")(x)
        gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
        y = sharding.constrain(jax.nn.silu(gate) * up, "batch", None, "tensor")
        return layers.Linear(x.shape[-1], use_bias=self.use_bias, name="down")(y)


class Block(nn.Module):
    cfg: LlamaConfig
    impl: str

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Any, index: Any
    ) -> tuple[Array, dict[str, Array]]:
        cfg = self.cfg
        before, after = (lambda norm, x: norm(x)), (lambda norm, x: x)
        if cfg.norms == "post":
            before, after = after, before
        norm = layers.RMSNorm(cfg.norm_eps, name="attn_norm")
        attention = Attention(cfg, self.impl, name="attn")
        h, kv = attention(before(norm, x), positions, mask, cache, index)
        x = sharding.constrain(x + after(norm, h), "batch", None, None)
        norm = layers.RMSNorm(cfg.norm_eps, name="mlp_norm")
        h = Mlp(cfg.mlp_width, cfg.mlp_bias, name="mlp")(before(norm, x))
        return sharding.constrain(x + after(norm, h), "batch", None, None), kv


class Body(nn.Module):
    """One step of the scan over layers; the carry is (x, the captured states or None)."""

    cfg: LlamaConfig
    impl: str
    remat: str
    capture: int
    keep: str

    @nn.compact
    def __call__(
        self, carry: Any, layer: Any, cache: Any, positions: Array, mask: Array, index: Any
    ) -> tuple[Any, Any]:
        block = Block
        if self.remat != "none":
            # "names" keeps the results of all matmuls but the last, which no gradient needs.
            keep = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
            policy = keep if self.remat == "names" else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        x, captured = carry
        if self.cfg.no_rope_layers:  # at position 0 nothing is rotated
            positions = positions * ~jnp.isin(layer, jnp.array(self.cfg.no_rope_layers))
        x, kv = block(self.cfg, self.impl, name="block")(x, positions, mask, cache, index)
        if self.capture:
            captured = jnp.where(layer == self.capture - 1, x, captured)
        out = {"none": None, "kv": kv, "hidden": x}[self.keep]
        return (x, captured), out


class Llama(nn.Module):
    """The language model.

    `embed`, `__call__` (the blocks and the final norm) and `logits` are separate: image slots enter
    between the first two, and the head runs only where there are targets.
    """

    cfg: LlamaConfig
    dtype: Any = jnp.float32
    remat: str = "none"  # full | names | none
    impl: str = "xla"
    scan_layers: bool = True

    def setup(self) -> None:
        cfg = self.cfg
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (cfg.vocab_size, cfg.width)
        )
        self.norm = layers.RMSNorm(cfg.norm_eps)
        self.head = layers.Linear(
            cfg.vocab_size, use_bias=False, kernel_init=nn.initializers.normal(0.02)
        )

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings. The cast comes after the look-up, so gradients add in float32."""
        return lookup(self.embedding, tokens, self.dtype)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T S"] | Int[Array, "B T"],
        *,
        cache: Cache | None = None,
        index: Int[Array, "*b"] | int | None = None,
        keep: str = "none",
        capture: int = 0,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """Runs the blocks and the final norm.

        Args:
          mask: True where a query attends; S is T, plus the prefix if there is a cache. For whole
            rows: of `attention.row_mask`.
          cache: keys and values computed before. Without `index` they precede the positions of this
            call; with it, those of this call are written into the cache at `index`, one for
            all rows or one a row.
          keep: 'none', 'kv' (a Cache of all keys and values) or 'hidden' (the states after each
            block, before the final norm).
          capture: number of blocks after which states are returned as well; 0: none.
        Returns:
          hidden states after the final norm; the captured states or None; what `keep` names.
        """
        captured = jnp.zeros_like(x) if capture else None
        blocks = {} if self.is_initializing() else self.variables["params"]["layers"]
        if isinstance(blocks, tuple):
            body = Body(self.cfg, self.impl, self.remat, capture, keep, parent=None)
            outs = []
            for i, block in enumerate(blocks):
                carry, own = (x, captured), None if cache is None else cache[i]
                (x, captured), out = body.apply(
                    {"params": {"block": block}}, carry, i, own, positions, mask, index
                )
                outs.append(out)
            return self.norm(x), captured, (None if keep == "none" else tuple(outs))
        stack = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.cfg.num_layers,
            unroll=1 if self.scan_layers else self.cfg.num_layers,
        )(self.cfg, self.impl, self.remat, capture, keep, name="layers")
        (x, captured), outs = stack(
            (x, captured), jnp.arange(self.cfg.num_layers), cache, positions, mask, index
        )
        return self.norm(x), captured, outs

    def logits(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits, float32, of hidden states after the final norm."""
        return self.head(x).astype(jnp.float32)


def unstack(llm: dict[str, Any], index: Any = lambda x, i: x[i]) -> dict[str, Any]:
    """The LLM's parameters with one tree a layer (`layers` is a tuple), for inference.

    Drops each stacked array once it is split, so memory holds one of them twice at most.

    Args:
      llm: its parameters; emptied.
      index: (stacked array, layer) -> the layer's array.
    """
    stacked, structure = jax.tree.flatten(llm.pop("layers")["block"])
    split = []
    while stacked:
        x = stacked.pop()
        split.append([index(x, i) for i in range(x.shape[0])])
        del x
    layers = zip(*reversed(split), strict=True)
    out = {**llm, "layers": tuple(jax.tree.unflatten(structure, leaves) for leaves in layers)}
    llm.clear()
    return out


def empty_cache(cfg: LlamaConfig, llm: dict[str, Any], batch: int, size: int, dtype: Any) -> Cache:
    """Zeros for `size` positions, in the layout and number format of the parameters `llm`."""
    shape = (batch, size, cfg.num_kv_heads, cfg.head_dim)
    arrays = {"k": (shape, dtype), "v": (shape, dtype)}
    # Biases make some key channels so large that int8 loses the others (docs/decisions.md).
    if int8.is_int8(llm["head"]["kernel"]) and not cfg.attn_bias:
        arrays = dict.fromkeys(("k", "v"), (shape, jnp.int8))
        arrays |= {f"{n}_scale": ((*shape[:-1], 1), jnp.float32) for n in ("k", "v")}
    zeros = lambda *lead: {  # noqa: E731
        n: jnp.zeros((*lead, *shape), dtype) for n, (shape, dtype) in arrays.items()
    }
    if isinstance(llm["layers"], tuple):
        return tuple(zeros() for _ in range(cfg.num_layers))
    return zeros(cfg.num_layers)


def write(
    buffer: Float[Array, "B S K H"] | Int8[Array, "B S K H"],
    x: Float[Array, "B T K H"] | Int8[Array, "B T K H"],
    index: Any,
) -> Array:
    """The buffer with `x` at positions `index`.. of every row; `index` is [] or [B]."""
    if jnp.ndim(index) == 0:
        return lax.dynamic_update_slice_in_dim(buffer, x, index, 1)
    return jax.vmap(lambda b, y, i: lax.dynamic_update_slice_in_dim(b, y, i, 0))(buffer, x, index)


def lookup(
    embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any
) -> Float[Array, "B T D"]:
    """Rows of the embedding table.

    On a mesh with fsdp and tensor, plain indexing all-gathers the activations of the whole batch.
    There each device looks up its part of the table, in a `shard_map`.
    """
    fsdp, tensor = sharding.axis_size("fsdp"), sharding.axis_size("tensor")
    vocab, width = embedding.shape
    splits = tokens.shape[0] % sharding.batch_size() == 0
    if fsdp * tensor == 1 or vocab % tensor or width % fsdp or not splits:
        return embedding[tokens].astype(dtype)

    def look_up(e: Array, tok: Array) -> Array:
        rows = lax.all_gather(tok, "fsdp", axis=0, tiled=True) - lax.axis_index("tensor") * len(e)
        local = ((rows >= 0) & (rows < len(e)))[..., None]
        x = jnp.where(local, e[jnp.clip(rows, 0, len(e) - 1)], 0).astype(dtype)
        x = lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return lax.psum(x, "tensor")

    return jax.shard_map(
        look_up,
        in_specs=(P("tensor", "fsdp"), P(sharding.BATCH)),
        out_specs=P(sharding.BATCH),
    )(embedding, tokens)
