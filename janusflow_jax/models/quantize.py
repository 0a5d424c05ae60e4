"""int8 for decoding text: the LLM's weights, and the keys and values it has seen.

A decoded token reads every weight once, so a quarter of the bytes (of float32) is up to four times
the speed where memory is the limit and the hardware widens int8 on the fly. Weights are symmetric,
one scale an output channel; keys and values one scale a position and head. Activations stay as
they are, and each scale is applied after its matmul, so that nothing wide is made of what is
stored. The arrays are qwix's QArrays (extra `int8`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = dict[str, Any]


def llm_weights(llm: Tree) -> Tree:
    """An LLM's tree with its matmuls' kernels, the head's too, as int8; in place, one by one.

    Norms and the embedding (a look-up reads a row of it) stay.

    Args: llm: of `llama.unstack`.
    Raises:
      ImportError: qwix is not installed.
    """
    for tree in [llm["head"], *(m for block in llm["layers"] for m in _linears(block))]:
        tree["kernel"] = _quantize(tree["kernel"], (1,))
    return llm


def _linears(block: Tree) -> list[Tree]:
    return [
        linear
        for part in block.values()
        for linear in part.values()
        if isinstance(linear, dict) and "kernel" in linear
    ]


def is_int8(kernel: Any) -> bool:
    """Whether a kernel is quantized."""
    return hasattr(kernel, "qvalue")


def matmul(x: Float[Array, "*b D"], kernel: Any) -> Float[Array, "*b F"]:
    """`x @ kernel` in x's type; kernel: an array [D, F], or one that is quantized."""
    if is_int8(kernel):
        return (x @ kernel.qvalue.astype(x.dtype)) * kernel.scale[0].astype(x.dtype)
    return x @ kernel.astype(x.dtype)


def keys_values(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> dict[str, Array]:
    """{'k', 'v'}: int8[B, T, K, H]; {'k_scale', 'v_scale'}: float32[B, T, K, 1]."""
    out = {}
    for name, x in (("k", k), ("v", v)):
        small = _quantize(x.astype(jnp.float32), (0, 1, 2))
        out |= {name: small.qvalue, f"{name}_scale": small.scale}
    return out


def _quantize(x: Array, channels: tuple[int, ...]) -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "int8: expected the package qwix; it is not installed: pip install "
            "'janusflow_jax[int8]', or load without int8"
        ) from error
    return _jitted(qwix.quantize)(x, channels)


@functools.cache
def _jitted(quantize: Any) -> Any:
    run = functools.partial(quantize, qtype=jnp.int8, scale_dtype=jnp.float32)
    return jax.jit(lambda x, axes: run(x, channelwise_axes=axes), static_argnums=1)
