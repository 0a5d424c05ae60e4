"""The loss of next tokens: where targets are, in any chunks, on any mesh, as the plain form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from janusflow_jax import config as c
from janusflow_jax.parallel import sharding
from janusflow_jax.training import cross_entropy

CFG = c.model_config("test")
ROWS, LENGTH = 8, 24


def inputs(share: float):
    rng = np.random.default_rng(int(share * 100))
    kernel = rng.normal(size=(CFG.llm.width, CFG.llm.vocab_size)).astype(np.float32) / 8
    hidden = rng.normal(size=(ROWS, LENGTH, CFG.llm.width)).astype(np.float32)
    tokens = rng.integers(0, CFG.llm.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    mask = rng.random((ROWS, LENGTH)) < share
    mask[:, -1] = False
    mask[2] = False  # a row without targets
    return {"kernel": jnp.asarray(kernel)}, *map(jnp.asarray, (hidden, tokens, mask))


SOURCES = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 3
WEIGHTS = jnp.array([1.0, 0.25, 3.0])


def plain_losses(head, hidden, tokens, mask):
    logits = hidden @ head["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1, axis=1))
    return jnp.where(mask, losses, 0)


def plain(*args):
    losses = plain_losses(*args)
    return jnp.sum(WEIGHTS[SOURCES[: len(losses)]] * losses)


def by_source(head, hidden, *args, chunk=16):
    rest = (SOURCES[: len(hidden)], WEIGHTS, chunk)
    return cross_entropy.summed(head["kernel"], hidden, *args, *rest)


def ours(chunk: int):
    return lambda *args: by_source(*args, chunk=chunk)[0]


def both(fn, args):
    """Value and gradients of 3 x fn: the factor must reach them."""
    return jax.jit(jax.value_and_grad(lambda *a: 3 * fn(*a), (0, 1)))(*args)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("chunk", [0, 7, 64, 512])
def test_chunks_on_targets_equal_the_plain_form(share, chunk):
    args = inputs(share)
    want, got = both(plain, args), both(ours(chunk), args)
    assert (share == 0) == (float(want[0]) == 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)
    np.testing.assert_allclose(jax.jit(ours(chunk))(*args), plain(*args), rtol=1e-5, atol=1e-5)


def test_bfloat16_states_give_float32_logits():
    """Logits rounded to bfloat16 would be off by up to 0.4 %. The CPU's compiler skips the
    rounding, so this reads the program."""
    head, hidden, *rest = inputs(0.4)
    head, hidden = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (head, hidden))
    program = str(jax.make_jaxpr(lambda *args: both(ours(16), args))(head, hidden, *rest))
    assert program.count("dot_general[") == 3 == program.count("preferred_element_type=float32")


def test_the_sums_of_the_sources():
    args = inputs(0.4)
    losses = plain_losses(*args)
    want = [jnp.sum(jnp.where(SOURCES == i, losses, 0)) for i in range(3)]
    np.testing.assert_allclose(jax.jit(by_source)(*args)[1], want, rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_source_that_is_not_finite_leaves_the_others(value):
    values, ids = jnp.array([[1.0, value], [2.0, 4.0]]), jnp.array([[0, 1], [2, 0]])
    np.testing.assert_array_equal(cross_entropy.sum_by_source(values, ids, 3), [5, value, 2])


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 4, 2)])
def test_a_mesh_changes_nothing(sizes):
    args = inputs(0.4)
    want = both(ours(16), args)
    sums = by_source(*args)[1]
    mesh = sharding.make_mesh(c.MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))
    where = sharding.tree_shardings({"llm": {"head": args[0]}}, mesh)["llm"]["head"]
    head = jax.device_put(args[0], where)
    rows = jax.device_put(args[1:], sharding.batch_shardings(args[1:], mesh))
    with jax.set_mesh(mesh):
        got = both(ours(16), (head, *rows))
        np.testing.assert_allclose(jax.jit(by_source)(head, *rows)[1], sums, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


def test_a_mesh_that_divides_nothing_changes_nothing():
    """6 rows on 4 devices, and a vocabulary that 3 x 2 devices cannot share."""
    args = inputs(0.4)
    args = (args[0], *(x[:6] for x in args[1:]))
    want = both(ours(16), args)
    for sizes in ((4, 1, 1), (1, 3, 2)):
        mesh = sharding.make_mesh(
            c.MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]),
            jax.devices()[: int(np.prod(sizes))],
        )
        with jax.set_mesh(mesh):
            got = both(ours(16), args)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


def counted(monkeypatch, ran):
    logits = cross_entropy._logits

    def count(kernel, x):
        jax.debug.callback(lambda: ran.append((x.shape[0], kernel.shape[1])))
        return logits(kernel, x)

    monkeypatch.setattr(cross_entropy, "_logits", count)


def test_the_head_runs_as_often_as_targets_ask(monkeypatch):
    """Counted at run time: chunks of 16 over 8 x 24 positions are 12; 30 targets ask for 2."""
    ran = []
    counted(monkeypatch, ran)
    head, hidden, tokens, mask = inputs(1.0)
    mask = jnp.zeros_like(mask).at[:3, :10].set(True)
    both(ours(16), (head, hidden, tokens, mask))
    jax.effects_barrier()
    assert ran == [(16, 640)] * 2


def test_a_group_shares_the_targets_of_one(monkeypatch):
    """All 24 targets are in one device's row; four devices take 4 x 4 of them at a time, each
    with its quarter of the vocabulary."""
    ran = []
    counted(monkeypatch, ran)
    head, hidden, tokens, mask = inputs(1.0)
    mask = jnp.zeros_like(mask).at[0].set(True)
    mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        both(ours(4), (head, hidden, tokens, mask))
    jax.effects_barrier()
    assert ran == [(16, 160)] * 2 * 8


def test_a_frozen_head_gets_no_gradient():
    """Its matmul is not there: two dot_generals in the loop instead of three."""
    args = inputs(0.4)
    loss = ours(16)

    def dots(which):
        fn = jax.grad(lambda k, x: loss({"kernel": k}, x, *args[2:]), which)
        return str(jax.make_jaxpr(fn)(args[0]["kernel"], args[1])).count("dot_general[")

    assert dots(1) == 2 and dots((0, 1)) == 3
    got = jax.jit(jax.grad(lambda x: loss(args[0], x, *args[2:])))(args[1])
    want = jax.grad(lambda x: plain(args[0], x, *args[2:]))(args[1])
    np.testing.assert_allclose(got, want, atol=2e-5)
