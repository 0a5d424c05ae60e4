"""Attention inside segments: the kernels (interpreted) against the masked form of XLA."""

from __future__ import annotations

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.models import attention, flash
from janusflow_jax.parallel import sharding

ROWS, LENGTH, HEADS, SIZE = 4, 256, 4, 32


def inputs(kv_heads: int = HEADS, size: int = SIZE):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (ROWS, LENGTH, HEADS, size))
    k, v = (jax.random.normal(x, (ROWS, LENGTH, kv_heads, size)) for x in keys[1:3])
    cuts = np.array([[0, 256, 256], [40, 200, 256], [128, 129, 256], [3, 90, 180]])
    at = np.arange(LENGTH)
    ids = sum((at[None] >= cuts[:, i : i + 1]).astype(np.int32) for i in range(3))
    ids[3] = np.where(at < 180, ids[3] + 1, 0)  # padding at the end
    ids[1, 50:70] = 0  # a dropped prompt
    return q, k, v, jnp.asarray(ids)


def value_and_gradients(impl: str):
    """Of a weighted sum of the outputs that are not padding."""

    def run(q, k, v, ids):
        out = attention.dot_product_attention(q, k, v, attention.row_mask(ids, impl), impl)
        out = jnp.where(ids[..., None, None] > 0, out, 0)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


def check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize("kernel", ["splash", "flash"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_it_equals_the_masked_form(kernel, kv_heads):
    args = inputs(kv_heads)
    ((_, want), grads) = value_and_gradients("xla")(*args)
    ((_, got), ours) = value_and_gradients(f"{kernel}_interpret")(*args)
    check((got, ours), (want, grads))
    together = args[:3] + (jnp.ones_like(args[3]),)
    ((_, other), _) = value_and_gradients(f"{kernel}_interpret")(*together)
    assert np.abs(np.asarray(other - want)).max() > 0.1  # segments matter


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_on_a_mesh_it_equals_one_device(kernel):
    args = inputs()
    ((_, want), grads) = value_and_gradients("xla")(*args)
    mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, sharding.batch_shardings(args, mesh))
        ((_, got), ours) = value_and_gradients(f"{kernel}_interpret")(*placed)
    check((got, ours), (want, grads))


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_rows_that_a_kernel_cannot_take(kernel):
    q, k, v, ids = inputs()
    with pytest.raises(ValueError, match="multiple of 128 positions; got 200"):
        attention.dot_product_attention(q[:, :200], k[:, :200], v[:, :200], ids[:, :200], kernel)
    mesh = sharding.make_mesh(c.MeshConfig(data=8))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="divide over 8 devices"):
        attention.dot_product_attention(q, k, v, ids, kernel)


@pytest.mark.parametrize("size", [128, 24])  # of 512 bytes: smaller blocks; no power of two
def test_flash_with_heads_of_other_sizes(size):
    args = inputs(2, size)
    ((_, want), grads) = value_and_gradients("xla")(*args)
    ((_, got), ours) = value_and_gradients("flash_interpret")(*args)
    check((got, ours), (want, grads))


def test_flash_in_bfloat16_is_as_exact_as_the_masked_form():
    q, k, v, ids = inputs()
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    ((_, want), grads) = value_and_gradients("xla")(*(x.astype(jnp.float32) for x in half), ids)

    def error(impl):
        ((_, got), ours) = value_and_gradients(impl)(*half, ids)
        pairs = zip((got, *ours), (want, *grads), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    assert error("flash_interpret") < 1.5 * error("xla")


def test_flash_visits_only_blocks_that_may_hold_a_sample():
    """Of 8 blocks of 128 with samples of 256, each meets itself and at most one neighbor."""
    ranges = jax.jit(flash.block_ranges, static_argnums=(1, 2))
    ids = np.repeat(np.arange(1, 5), 256)[None]
    padding = -1 - np.arange(1024)[None]
    for row in (ids, np.where(np.arange(1024) % 300 < 200, ids, padding)):
        first, last = ranges(row, 128, 128)
        np.testing.assert_array_equal(first[0], [0, 0, 2, 2, 4, 4, 6, 6])
        np.testing.assert_array_equal(last[0], [2, 2, 4, 4, 6, 6, 8, 8])
    first, last = ranges(padding, 128, 64)
    np.testing.assert_array_equal(first[0], np.arange(0, 16, 2))
    np.testing.assert_array_equal(last[0], np.arange(16) // 2 + 1)


def test_the_masked_form_multiplies_in_the_type_of_its_inputs():
    """A float32 operand would take a GPU eight times as long as one in bfloat16."""
    q, k, v, ids = (x.astype(jnp.bfloat16) if x.ndim == 4 else x for x in inputs())
    text = str(jax.make_jaxpr(value_and_gradients("xla"))(q, k, v, ids))
    products = re.findall(r"= dot_general\[.*?\] (\w+) (\w+)", text, re.DOTALL)
    types = dict(re.findall(r"(\w+):(\w+)\[", text))
    assert len(products) == 6
    assert {types[name] for pair in products for name in pair} == {"bf16"}


@pytest.mark.parametrize(
    ("name", "platform", "length", "expected"),
    [
        ("auto", "tpu", 4096, "splash"),
        ("auto", "tpu", 128, "splash"),
        ("auto", "tpu", 160, "xla"),
        ("auto", "tpu", 192, "xla"),
        ("auto", "tpu", 1, "xla"),
        ("auto", "gpu", 4096, "flash"),
        ("auto", "gpu", 160, "xla"),
        ("auto", "cpu", 4096, "xla"),
        ("xla", "tpu", 4096, "xla"),
        ("splash", "tpu", 4096, "splash"),
        ("cudnn", "gpu", 160, "cudnn"),
        ("xla", "gpu", 4096, "xla"),
    ],
)
def test_auto_is_what_takes_the_rows(name, platform, length, expected):
    attention.check_platform(name, platform)
    assert attention.implementation(name, platform, length) == expected


def test_auto_on_a_gpu_that_is_too_old(monkeypatch):
    for capability, expected in (("7.5", "xla"), ("8.0", "flash"), ("10.0", "flash")):
        device = SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda d=device: [d])
        assert attention.implementation("auto", "gpu", 4096) == expected


@pytest.mark.parametrize(
    ("name", "platform"),
    [("splash", "cpu"), ("splash", "gpu"), ("cudnn", "cpu"), ("cudnn", "tpu"), ("flash", "tpu")],
)
def test_an_implementation_of_another_platform_is_an_error(name, platform):
    with pytest.raises(ConfigError, match=f"{name}.*{platform}"):
        attention.check_platform(name, platform)
