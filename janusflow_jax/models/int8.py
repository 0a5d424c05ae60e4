"""int8 weights, keys and values of the LLM, to decode text with fewer bytes.

Decoding a token reads every weight once, so a quarter of the bytes of float32 gives up to four
times the speed where memory is the limit and the hardware widens int8 on the fly. Weights are
symmetric, with one scale an output channel; keys and values have one scale a position and head.
Activations keep their type. Each scale is applied after its matmul, so that no wide copy of the
weights exists. The arrays are qwix's QArrays (extra `int8`).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from janusflow_jax.models import products

Tree = dict[str, Any]


def quantize_llm(llm: Tree) -> Tree:
    """Quantizes the kernels of the blocks and of the head, in place, one by one.

    Norms and the embedding (a look-up reads single rows) stay as they are.

    Args:
      llm: parameters of `llama.unstack`.
    Raises:
      ImportError: qwix is not installed.
    """
    linears = [
        linear
        for block in llm["layers"]
        for part in block.values()
        for linear in part.values()
        if isinstance(linear, dict) and "kernel" in linear
    ]
    for tree in [llm["head"], *linears]:
        tree["kernel"] = _quantize(tree["kernel"], (1,))
    return llm


def is_int8(kernel: Any) -> bool:
    """Whether a kernel is quantized."""
    return hasattr(kernel, "qvalue")


def matmul(x: Float[Array, "*b D"], kernel: Any) -> Float[Array, "..."]:
    """`x @ kernel` in the type of x.

    Args: kernel: an array [D, F] or [D, N, H], or a quantized one [D, F].
    """
    if is_int8(kernel):
        return (x @ kernel.qvalue.astype(x.dtype)) * kernel.scale[0].astype(x.dtype)
    if x.ndim == kernel.ndim == 2 and products.rounds(x):
        return products.matmul(x, kernel)
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=1)


def keys_values(k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]) -> dict[str, Array]:
    """{'k', 'v'}: int8[B, T, K, H]; {'k_scale', 'v_scale'}: float32[B, T, K, 1]."""
    out = {}
    for name, x in (("k", k), ("v", v)):
        quantized = _quantize(x.astype(jnp.float32), (0, 1, 2))
        out |= {name: quantized.qvalue, f"{name}_scale": quantized.scale}
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
