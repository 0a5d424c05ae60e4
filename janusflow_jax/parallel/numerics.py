"""The random generator, and the settings of JAX that results depend on.

A process may have other settings of its own (`JAX_ENABLE_X64`, `JAX_DEFAULT_PRNG_IMPL`,
`JAX_THREEFRY_PARTITIONABLE`). They change no noise and no type here. The precision of matrix
products (`JAX_DEFAULT_MATMUL_PRECISION`) stays the process's own choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array

GENERATOR = "threefry2x32"


def key(seed: Any) -> Array:
    """The random key of a seed, an int or uint32[]."""
    return jax.random.key(seed, impl=GENERATOR)


@contextlib.contextmanager
def fixed() -> Iterator[None]:
    """A context, or a decorator, in which programs are traced and run with our settings.

    Never yield to a caller inside: the settings would be the caller's.
    """
    with (
        jax.enable_x64(False),
        jax.threefry_partitionable(True),
        jax.default_prng_impl(GENERATOR),
    ):
        yield


def described() -> dict[str, str]:
    """The generator and the precision of matrix products, for reports."""
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    return {"random_generator": GENERATOR, "matmul_precision": str(precision or "default")}
