"""Matrix products of float32 arrays from bfloat16 operands, on CPU.

Under JAX's matmul precision `BF16_BF16_F32` GPUs and TPUs round the operands of a product to
bfloat16 and add in float32. XLA for CPUs ignores that precision, although a CPU with AVX-512 BF16
or AMX multiplies bfloat16 twice as fast (`benchmarks/products.py`). So the operands are rounded
here, those of the gradients too.

XLA multiplies bfloat16 only where the left operand's rows and the result's are contiguous. Anything
else it widens, or refuses when the program runs. It decides that before it moves transposes into
products. So operands and results pass a barrier as flat arrays, which fixes their order, and
transposes are made.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from janusflow_jax.parallel import sharding

PRECISION = "BF16_BF16_F32"


def rounds(x: Array) -> bool:
    """Whether products of this array are to be made by this module: on one CPU device only, because
    a flat array would be gathered on a mesh."""
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    on_cpu = jax.default_backend() == "cpu" and sharding.num_devices() == 1
    return on_cpu and precision == PRECISION and x.dtype == jnp.float32


def matmul(a: Float[Array, "*b M K"], b: Float[Array, "*b K N"]) -> Float[Array, "*b M N"]:
    """`a @ b`, float32."""
    return _rounded(-2, a, b)


def matmul_transposed(
    a: Float[Array, "*b M K"], b: Float[Array, "*b N K"]
) -> Float[Array, "*b M N"]:
    """`a @ b^T`, float32."""
    return _rounded(-1, a, b)


def _settle(x: Array) -> Array:
    return lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)


def _round(x: Array) -> Array:
    return _settle(x.astype(jnp.bfloat16))


def _transpose(x: Array) -> Array:
    return _settle(jnp.swapaxes(x, -1, -2))


def _product(a: Array, b: Array, contracted: int) -> Array:
    """The product over a's last axis and b's `contracted`, from settled operands."""
    batch = tuple(range(a.ndim - 2))
    dimensions = (((a.ndim - 1,), (b.ndim + contracted,)), (batch, batch))
    return _settle(lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32))


def _outer(a: Array, b: Array) -> Array:
    """`a^T @ b`, with the narrower of the two transposed."""
    if a.shape[-1] <= b.shape[-1]:
        return _product(_transpose(a), b, -2)
    return _transpose(_product(_transpose(b), a, -2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounded(contracted: int, a: Array, b: Array) -> Array:
    """The product over a's last axis and b's `contracted`, -1 or -2, from rounded operands."""
    return _forward(contracted, a, b)[0]


def _forward(contracted: int, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    a, b = _round(a), _round(b)
    return _product(a, b, contracted), (a, b)


def _backward(contracted: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    (a, b), g = saved, _round(g)
    if contracted == -1:
        return _product(g, b, -2), _outer(g, a)
    return _product(g, b, -1), _outer(a, g)


_rounded.defvjp(_forward, _backward)
