"""Rectified flow: times, interpolation, guidance and the solver. Independent of the model.

Convention (docs/model.md): t = 0 is noise, t = 1 is data, `z_t = t*x + (1-t)*z0`, and the target
velocity is `x - z0`. States, times and steps are float32, whatever the model computes in.
Source: arXiv 2411.07975 section 3.2.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from janusflow_jax.config import SamplerConfig

Velocity = Callable[[Array, Array, Array, bool], tuple[Array, Array | None]]
"""(z [B,h,w,C], t [], the time r [] that the step ends at, whether it is guided) -> conditional
velocity; unconditional velocity or None. Only a student's depends on r."""

TEACHER_SHARE = 0.25
"""Of an interval, the last part in which the teacher moves (`lagrangian_target`)."""


def sample_time(key: Array, kind: str, shift: float) -> Float[Array, ""]:
    """One training time in (0, 1): logit-normal(0, 1) or uniform, then shifted.

    `shift` s maps t to t / (t + s*(1-t)): s > 1 gives more weight to noise, 1 changes nothing.
    """
    if kind == "uniform":
        t = jax.random.uniform(key, dtype=jnp.float32)
    else:
        t = jax.nn.sigmoid(jax.random.normal(key, dtype=jnp.float32))
    return shifted(t, shift)


def sample_interval(
    key: Array, kind: str, shift: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Training times t <= r of a student, each of `sample_time`.

    Of eight, two have r = t, and three begin at 0, end at 1, or both: a single step is from 0 to 1,
    and no time of `sample_time` is exactly there.
    """
    one, two, three = jax.random.split(key, 3)
    a, b = sample_time(one, kind, shift), sample_time(two, kind, shift)
    which = jax.random.randint(three, (), 0, 8)
    t, r = jnp.minimum(a, b), jnp.maximum(a, b)
    t = jnp.where((which == 0) | (which == 1), 0.0, t)
    r = jnp.where((which == 1) | (which == 2), 1.0, r)
    return jnp.where(which > 5, a, t), jnp.where(which > 5, a, r)


def lagrangian_target(
    average: Callable[[Array], Array],
    velocity: Callable[[Array, Array], Array],
    z: Float[Array, "*b h w C"],
    t: Float[Array, "*b"],
    r: Float[Array, "*b"],
    share: float = TEACHER_SHARE,
) -> Float[Array, "*b h w C"]:
    """What a student's average velocity from t to r is trained to be, from states z at t.

    The student moves z through the first part of the interval and the teacher through the rest, by
    the midpoint rule, whose error is of third order in that rest. With r = t it is the teacher's
    velocity. Source: the Lagrangian loss of flow maps (arXiv 2505.18825), without derivatives.

    Args:
      average: end times -> the student's average velocity from t to them.
      velocity: (states, times) -> the teacher's velocity.
      share: of the interval that the teacher moves through.
    """
    share_of = jnp.where(r > t, share, 1.0)
    wide = lambda x: x[..., None, None, None]  # noqa: E731
    rest = share_of * (r - t)
    middle = r - rest / 2
    v = velocity(z + wide(middle - t) * average(middle), middle)
    return wide(1 - share_of) * average(r - rest) + wide(share_of) * v


def shifted(t: Any, shift: float) -> Any:
    """Moves times in [0, 1] toward noise (shift > 1) or data; 0 and 1 stay."""
    return t if shift == 1 else t / (t + shift * (1 - t))


def interpolate(
    x: Float[Array, "*b h w C"], noise: Float[Array, "*b h w C"], t: Float[Array, "*b"]
) -> Float[Array, "*b h w C"]:
    """`t*x + (1-t)*noise`."""
    t = t[..., None, None, None]
    return t * x + (1 - t) * noise


def guide(cond: Array, uncond: Array | None, scale: float | Array) -> Array:
    """Classifier-free guidance (arXiv 2207.12598): `scale*cond - (scale-1)*uncond`."""
    return cond if uncond is None else scale * cond - (scale - 1) * uncond


def solver_times(cfg: SamplerConfig) -> np.ndarray:
    """The times float64[N + 1] of the states of N steps, from 0 to 1."""
    return shifted(np.arange(cfg.steps + 1) / cfg.steps, cfg.shift)


def guided_steps(cfg: SamplerConfig) -> np.ndarray:
    """Which steps have guidance, bool[N]."""
    t = solver_times(cfg)[:-1]
    return (cfg.guide_from <= t) & (t < cfg.guide_until)


def step_times(cfg: SamplerConfig) -> np.ndarray:
    """`solver_times` in float32, by the arithmetic of `solve`."""
    return shifted(np.arange(cfg.steps + 1, dtype=np.float32) / np.float32(cfg.steps), cfg.shift)


def coefficients(cfg: SamplerConfig, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Of every step h and r/2 of `solve`, float32[N] each, if it begins with step `first`.

    r is 0 where a step is Euler's.
    """
    times, guided = solver_times(cfg), guided_steps(cfg)
    h = np.diff(times)
    r = np.append(0.0, h[1:] / h[:-1]) * (cfg.order == 2)
    r[1:][guided[1:] != guided[:-1]] = 0.0
    r[first : first + 1] = 0.0
    return h.astype(np.float32), (r / 2).astype(np.float32)


def advance(z: Array, v: Array, before: Array | None, h: Array, half_r: Array) -> Array:
    """One step of `solve`; `before` is the velocity of the last step, None for Euler's method."""
    slope = v if before is None else (1 + half_r) * v - half_r * before
    return z + slope * h


def first_step(strength: float, cfg: SamplerConfig) -> int:
    """The step at which an image begins to change if `strength` (0 to 1) of its path is new."""
    return round((1 - strength) * cfg.steps)


def solve(
    velocity: Velocity,
    z: Float[Array, "B h w C"],
    guidance_scale: float | Array,
    cfg: SamplerConfig,
    first: int = 0,
    project: Callable[[Array, Array], Array] | None = None,
) -> tuple[Float[Array, "B h w C"], Float[Array, "N B h w C"]]:
    """Follows the velocity from the time of step `first` to 1.

    Order 1 is Euler's method, `z += h v(t)`. Order 2 is the Adams-Bashforth method for steps of
    unequal size, `z += h ((1 + r/2) v(t) - r/2 v_before)` with r = h / h_before; its first step,
    and the first where guidance begins or ends, is Euler's.

    Args:
      z: the state at step `first`; the noise, if that is 0.
      project: (state, t []) -> state, after every step.
    Returns:
      the state at t = 1, and the state after every step.
    """
    guided = guided_steps(cfg)
    nodes = jnp.arange(cfg.steps), *map(jnp.asarray, coefficients(cfg, first))

    def step(
        state: tuple[Array, Array | None], node: tuple[Array, Array, Array], is_guided: bool
    ) -> tuple[tuple[Array, Array | None], Array]:
        z, before = state
        k, h, half_r = node
        v = guide(*velocity(z, _time(k, cfg), _time(k + 1, cfg), is_guided), guidance_scale)
        z = advance(z, v, before, h, half_r)
        if project is not None:
            z = project(z, _time(k + 1, cfg))
        return (z, v if cfg.order == 2 else None), z

    z = z.astype(jnp.float32)
    state = z, jnp.zeros_like(z) if cfg.order == 2 else None
    (z, _), states = _scan(step, state, nodes, guided, first)
    return z, states


def edit(
    velocity: Velocity,
    x: Float[Array, "B h w C"],
    noise: Callable[[Array], Array],
    guidance_scales: Float[Array, " R"],
    cfg: SamplerConfig,
    first: int = 0,
) -> Float[Array, "B h w C"]:
    """FlowEdit (arXiv 2412.08629): moves an image by the difference of two velocities.

    At every time it adds noise to the image, adds the change so far to a copy, and follows the
    velocity of the copy for the target prompt minus that of the image for the source prompt. Equal
    prompts and scales change nothing.

    Args:
      velocity: of 2 B rows, the sources first.
      x: latents of the images.
      noise: step [] -> float32[B, h, w, C], other noise for every step.
      guidance_scales: of the 2 B rows.
      cfg: of order 1.
      first: the first step; later ones keep more of the image.
    """
    scales = guidance_scales[:, None, None, None]
    steps = jnp.arange(cfg.steps), jnp.asarray(np.diff(solver_times(cfg)), jnp.float32)

    def step(change: Array, node: tuple[Array, Array], is_guided: bool) -> tuple[Array, None]:
        k, h = node
        t = _time(k, cfg)
        source = t * x + (1 - t) * noise(k)
        both = jnp.concatenate([source, source + change])
        v = guide(*velocity(both, t, _time(k + 1, cfg), is_guided), scales)
        return change + (v[len(x) :] - v[: len(x)]) * h, None

    change, _ = _scan(step, jnp.zeros_like(x), steps, guided_steps(cfg), first)
    return x + change


def _time(k: Int[Array, ""], cfg: SamplerConfig) -> Float[Array, ""]:
    """The time of a step, by the arithmetic of the first version: stored seeds keep their bits."""
    return shifted(k.astype(jnp.float32) / cfg.steps, cfg.shift)


def _scan(step: Any, state: Any, nodes: Any, guided: np.ndarray, first: int) -> tuple[Any, Any]:
    """Scans the steps from `first` on, one scan for each stretch with or without guidance."""
    stretches = [(on, len(list(same))) for on, same in itertools.groupby(guided[first:])]
    outputs = []
    for is_guided, length in stretches or [(False, 0)]:
        some = jax.tree.map(lambda x: x[first : first + length], nodes)  # noqa: B023
        state, output = lax.scan(functools.partial(step, is_guided=bool(is_guided)), state, some)
        outputs.append(output)
        first += length
    return state, jax.tree.map(lambda *xs: lax.concatenate(xs, 0), *outputs)
