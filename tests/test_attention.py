"""Attention inside segments: the kernels (interpreted) against the masked form of XLA."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import runs
from jax.experimental.pallas import tpu as pltpu

from janusflow_jax import config as c
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.models import attention, int8, layers, splash
from janusflow_jax.parallel import sharding

ROWS, LENGTH, HEADS, SIZE = 4, 384, 4, 32
BLOCK = 128  # of rows of this length
CUTS = np.array(
    [
        [384, 384, 384],  # one sample
        [40, 130, 300],  # samples across the borders of blocks
        [128, 129, 256],  # and along them
        [0, 0, 0],  # no sample
    ]
)


def segments() -> np.ndarray:
    at = np.arange(LENGTH)
    ids = np.sum([at >= cut for cut in CUTS.T[:, :, None]], axis=0, dtype=np.int32) + 1
    ids[2, 260:] = 0  # padding
    ids[1, 131:299] = 0  # a dropped prompt, behind its first token
    ids[3] = 0
    return ids


def inputs(kv_heads: int = HEADS, size: int = SIZE):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (ROWS, LENGTH, HEADS, size))
    k, v = (jax.random.normal(x, (ROWS, LENGTH, kv_heads, size)) for x in keys[1:3])
    return q, k, v, jnp.asarray(segments())


def value_and_gradients(impl: str):
    """Nothing reads the outputs of segment 0, so that they may differ."""

    def run(q, k, v, ids):
        out = attention.dot_product_attention(q, k, v, attention.row_mask(ids, impl), impl)
        finite = jnp.isfinite(out).all()
        out = jnp.where(ids[..., None, None] > 0, out, 0)
        weight = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out * weight), (out, finite)

    return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))


def check(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize(
    ("kernel", "kv_heads", "size"),
    [
        ("splash", 4, SIZE),
        ("splash", 2, SIZE),
        ("splash", 2, 192),  # wider than the lanes
        ("flash", 4, SIZE),
        ("flash", 2, 24),  # no power of two
        ("flash", 2, 128),  # of 512 bytes: smaller blocks
    ],
)
def test_it_equals_the_masked_form(kernel, kv_heads, size):
    args = inputs(kv_heads, size)
    ((_, want), grads) = value_and_gradients("xla")(*args)
    ((_, got), ours) = value_and_gradients(f"{kernel}_interpret")(*args)
    check((got, ours), (want, grads))
    together = args[:3] + (jnp.ones_like(args[3]),)
    ((_, other), _) = value_and_gradients("xla")(*together)
    assert np.abs(np.asarray(other[0] - want[0])).max() > 0.1  # segments matter


def test_blocks_of_512():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (1, 1024, 1, SIZE)) for x in keys)
    ids = jnp.repeat(jnp.arange(1, 5), jnp.array([300, 300, 400, 24]))[None]
    assert splash.block_size(ids.shape[1]) == 512
    ((_, want), grads) = value_and_gradients("xla")(q, k, v, ids)
    ((_, got), ours) = value_and_gradients("splash_interpret")(q, k, v, ids)
    check((got, ours), (want, grads))


@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_a_dropped_prompt_longer_than_a_block(kernel):
    """Its positions attend to nothing else: their large scores would overflow in a gradient."""
    q, k, v, ids = inputs()
    ids = jnp.ones_like(ids).at[:, 100:300].set(0)
    ((_, want), grads) = value_and_gradients("xla")(7 * q, 7 * k, v, ids)
    ((_, got), ours) = value_and_gradients(f"{kernel}_interpret")(7 * q, 7 * k, v, ids)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), (got, ours), (want, grads)
    )


def test_skipped_blocks_change_no_bit(monkeypatch):
    args = inputs()
    got = value_and_gradients("splash_interpret")(*args)
    causal = np.tri(LENGTH // BLOCK, dtype=bool)
    monkeypatch.setattr(
        splash, "executed_blocks", lambda ids, _: jnp.broadcast_to(causal, (len(ids), 3, 3))
    )
    want = value_and_gradients("splash_interpret")(*args)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_skipped_blocks_are_not_read():
    q, k, v, ids = inputs()
    v = v.at[1, 256:].set(jnp.nan).at[2, :128].set(jnp.nan)
    got = attention.dot_product_attention(q, k, v, ids, "splash_interpret")
    assert np.isfinite(got[1, :256]).all() and np.isfinite(got[2, 128:]).all()
    q, k, v, ids = inputs()
    _, (_, d_k, d_v) = value_and_gradients("splash_interpret")(
        q.at[2, 128:].set(jnp.nan), k, v, ids
    )
    assert np.isfinite(d_k[2, :128]).all() and np.isfinite(d_v[2, :128]).all()


def test_executed_blocks_are_those_with_pairs():
    ids = segments()
    pairs = np.asarray(attention.segment_mask(jnp.asarray(ids))) & (ids[:, :, None] > 0)
    blocks = LENGTH // BLOCK
    needed = pairs.reshape(ROWS, blocks, BLOCK, blocks, BLOCK).any((2, 4))
    got = splash.executed_blocks(ids, BLOCK)
    np.testing.assert_array_equal(got, needed | np.eye(blocks, dtype=bool))
    assert got.sum((1, 2)).tolist() == [6, 5, 3, 3]
    traced = jax.jit(splash.executed_blocks, static_argnums=1)(ids, BLOCK)
    np.testing.assert_array_equal(got, traced)


def test_keys_and_values_are_not_repeated():
    """No array that has keys' length and size is wider than the keys."""
    rows, queries, heads, keys, kv_heads, size = 1, 3, 6, 5, 2, 7
    q = jnp.ones((rows, queries, heads, size))
    k, v = jnp.ones((2, rows, keys, kv_heads, size))
    narrow = int8.keys_values(k, v)
    scales = narrow["k_scale"], narrow["v_scale"]

    def total(q, k, v, scales=None):
        return attention.dot_product_attention(q, k, v, scales=scales).sum()

    for jaxpr in (
        jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(q, k, v),
        jax.make_jaxpr(total)(q, narrow["k"], narrow["v"], scales),
    ):
        shapes = [[int(x) for x in y.split(",")] for y in re.findall(r"\[([\d,]+)\]", str(jaxpr))]
        wide = [math.prod(x) for x in shapes if {keys, size} <= set(x)]
        assert max(wide) == k.size
    q, k, v, ids = inputs(kv_heads=2)
    loss = lambda q, k, v: jnp.sum(  # noqa: E731
        attention.dot_product_attention(q, k, v, ids, "splash_interpret")
    )
    forward, backward = pallas_calls(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr)
    for call in (forward, backward):
        of_rows = [x.aval.shape for x in call.invars if len(x.aval.shape) == 4]
        assert of_rows[:3] == [(ROWS, heads, LENGTH, SIZE) for heads in (HEADS, 2, 2)]


def pallas_calls(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
            continue
        for x in eqn.params.values():
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                yield from pallas_calls(inner)


def test_both_ways_to_swap_halves_are_equal():
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(jax.random.key(0), (2, 3, 8), dtype)
        want = np.concatenate([x[..., 4:], x[..., :4]], axis=-1)
        np.testing.assert_array_equal(layers.swap_halves(x), want)
        np.testing.assert_array_equal(layers.swap_by_matmul(x), want)


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


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("kernel", ["splash", "flash"])
def test_kernels_in_bfloat16_are_as_exact_as_the_masked_form(kernel, kv_heads):
    q, k, v, ids = inputs(kv_heads)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    ((_, (want, _)), grads) = value_and_gradients("xla")(
        *(x.astype(jnp.float32) for x in half), ids
    )

    def error(impl):
        ((_, (got, _)), ours) = value_and_gradients(impl)(*half, ids)
        pairs = zip((got, *ours), (want, *grads), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    assert error(f"{kernel}_interpret") < 1.5 * error("xla")


def test_kernels_visit_only_blocks_that_may_hold_a_sample():
    """Samples of 256 in blocks of 128: each block meets itself and at most one neighbor."""
    ids = np.repeat(np.arange(1, 5, dtype=np.int32), 256)[None]
    for row in (ids, np.where(np.arange(1024) % 64 < 40, ids, 0)):
        first, end = splash.block_ranges(jnp.asarray(row), 128, 128)
        np.testing.assert_array_equal(first[0], [0, 0, 2, 2, 4, 4, 6, 6])
        np.testing.assert_array_equal(end[0], [2, 2, 4, 4, 6, 6, 8, 8])
        first, end = splash.block_ranges(jnp.asarray(row), 128, 64)
        np.testing.assert_array_equal(first[0], [0, 0, 4, 4, 8, 8, 12, 12])
        np.testing.assert_array_equal(end[0], [4, 4, 8, 8, 12, 12, 16, 16])
    first, end = splash.block_ranges(jnp.asarray(0 * ids), 128, 64)
    np.testing.assert_array_equal(first[0], np.arange(0, 16, 2))
    np.testing.assert_array_equal(end[0], np.arange(2, 18, 2))


def test_the_masked_form_multiplies_in_the_type_of_its_inputs():
    """A float32 operand would cost a GPU its matmul rate in bfloat16."""
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
    [("splash", "cpu"), ("splash", "gpu"), ("flash", "tpu")],
)
def test_an_implementation_of_another_platform_is_an_error(name, platform):
    with pytest.raises(ConfigError, match=f"{name}.*{platform}"):
        attention.check_platform(name, platform)


@pytest.mark.parametrize(
    ("mebibytes", "dtype", "longest"),
    [(128, "bfloat16", 42_240), (128, "float32", 21_120), (64, "bfloat16", 20_480)],
)
def test_rows_too_long_for_a_tpu_core_are_an_error(monkeypatch, mebibytes, dtype, longest):
    """Compiled at these lengths for v5e (128 MiB) and v5p (64)."""
    info = SimpleNamespace(vmem_capacity_bytes=mebibytes * 2**20)
    monkeypatch.setattr(pltpu, "get_tpu_info", lambda: info)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    cfg = runs.tiny_config("unused")
    cfg.dtype, cfg.model.llm.head_dim = dtype, 128
    cfg.data.row_len = longest
    attention.check_here(cfg)
    cfg.data.row_len = longest + 128
    with pytest.raises(ConfigError, match=f"at most {longest} .* got {longest + 128}"):
        attention.check_here(cfg)
    cfg.attention = "xla"
    attention.check_here(cfg)
