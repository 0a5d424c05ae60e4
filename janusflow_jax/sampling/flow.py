"""Rectified flow: times, interpolation, guidance and the Euler sampler. Independent of the model.

Convention (docs/model.md): t = 0 is noise, t = 1 is data, `z_t = t*x + (1-t)*z0`, and the target
velocity is `x - z0`. States, times and steps are float32, whatever the model computes in.
Source: arXiv 2411.07975 section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], tuple[Array, Array | None]]
"""(z [B,h,w,C], t []) -> conditional velocity; unconditional velocity or None."""


def sample_time(key: Array, kind: str = "logit_normal", shift: float = 1.0) -> Float[Array, ""]:
    """One training time in (0, 1): logit-normal(0, 1) or uniform, then shifted.

    `shift` s maps t to t / (t + s*(1-t)): s > 1 gives more weight to noise, 1 changes nothing.
    """
    if kind == "uniform":
        t = jax.random.uniform(key, dtype=jnp.float32)
    elif kind == "logit_normal":
        t = jax.nn.sigmoid(jax.random.normal(key, dtype=jnp.float32))
    else:
        raise ValueError(f"time: expected logit_normal or uniform; got {kind!r}")
    return t / (t + shift * (1 - t))


def interpolate(
    x: Float[Array, "*b h w C"], noise: Float[Array, "*b h w C"], t: Float[Array, "*b"]
) -> Float[Array, "*b h w C"]:
    """`t*x + (1-t)*noise`."""
    t = t[..., None, None, None]
    return t * x + (1 - t) * noise


def guide(cond: Array, uncond: Array | None, scale: float | Array) -> Array:
    """Classifier-free guidance (arXiv 2207.12598): `scale*cond - (scale-1)*uncond`."""
    return cond if uncond is None else scale * cond - (scale - 1) * uncond


def euler(
    velocity: Velocity,
    noise: Float[Array, "B h w C"],
    num_steps: int,
    guidance_scale: float | Array,
) -> tuple[Float[Array, "B h w C"], Float[Array, "N B h w C"]]:
    """Euler's method from t = 0 to 1: `z += v/N` at `t = k/N`.

    Returns:
      the state at t = 1, and the state after every step.
    """

    def step(z: Array, k: Array) -> tuple[Array, Array]:
        cond, uncond = velocity(z, k.astype(jnp.float32) / num_steps)
        z = z + guide(cond, uncond, guidance_scale) / num_steps
        return z, z

    return lax.scan(step, noise.astype(jnp.float32), jnp.arange(num_steps))
