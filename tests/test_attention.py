"""Attention inside segments: the splash kernel (interpreted) against the masked form of XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.models import attention
from janusflow_jax.parallel import sharding

ROWS, LENGTH, HEADS, SIZE = 4, 256, 4, 32


def inputs(kv_heads: int = HEADS):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (ROWS, LENGTH, HEADS, SIZE))
    k, v = (jax.random.normal(x, (ROWS, LENGTH, kv_heads, SIZE)) for x in keys[1:3])
    cuts = np.array([[0, 256, 256], [40, 200, 256], [128, 129, 256], [3, 90, 180]])
    at = np.arange(LENGTH)
    ids = sum((at[None] >= cuts[:, i : i + 1]).astype(np.int32) for i in range(3))
    ids[3] = np.where(at < 180, ids[3] + 1, 0)  # padding at the end
    return q, k, v, jnp.asarray(ids)


def value_and_gradients(impl: str):
    def run(q, k, v, ids):
        out = attention.dot_product_attention(q, k, v, attention.row_mask(ids, impl), impl)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


def check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_equals_the_masked_form(kv_heads):
    args = inputs(kv_heads)
    ((_, want), grads) = value_and_gradients("xla")(*args)
    ((_, got), ours) = value_and_gradients("splash_interpret")(*args)
    check((got, ours), (want, grads))
    together = args[:3] + (jnp.ones_like(args[3]),)
    ((_, other), _) = value_and_gradients("splash_interpret")(*together)
    assert np.abs(np.asarray(other - want)).max() > 0.1  # segments matter


def test_on_a_mesh_it_equals_one_device():
    args = inputs()
    ((_, want), grads) = value_and_gradients("xla")(*args)
    mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, sharding.batch_shardings(args, mesh))
        ((_, got), ours) = value_and_gradients("splash_interpret")(*placed)
    check((got, ours), (want, grads))


def test_rows_that_splash_cannot_take():
    q, k, v, ids = inputs()
    with pytest.raises(ValueError, match="multiple of 128 positions; got 200"):
        attention.dot_product_attention(q[:, :200], k[:, :200], v[:, :200], ids[:, :200], "splash")
    mesh = sharding.make_mesh(c.MeshConfig(data=8))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="divide over 8 devices"):
        attention.dot_product_attention(q, k, v, ids, "splash")


@pytest.mark.parametrize(
    ("name", "platform", "length", "expected"),
    [
        ("auto", "tpu", 4096, "splash"),
        ("auto", "tpu", 128, "splash"),
        ("auto", "tpu", 160, "xla"),
        ("auto", "tpu", 192, "xla"),
        ("auto", "tpu", 1, "xla"),
        ("auto", "gpu", 4096, "xla"),
        ("auto", "cpu", 4096, "xla"),
        ("xla", "tpu", 4096, "xla"),
        ("splash", "tpu", 4096, "splash"),
        ("cudnn", "gpu", 160, "cudnn"),
    ],
)
def test_auto_is_what_takes_the_rows(name, platform, length, expected):
    attention.check_platform(name, platform)
    assert attention.implementation(name, platform, length) == expected


@pytest.mark.parametrize(
    ("name", "platform"), [("splash", "cpu"), ("splash", "gpu"), ("cudnn", "cpu"), ("cudnn", "tpu")]
)
def test_an_implementation_of_another_platform_is_an_error(name, platform):
    with pytest.raises(ConfigError, match=f"{name}.*{platform}"):
        attention.check_platform(name, platform)
