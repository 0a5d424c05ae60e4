"""Products from rounded operands on CPU (models/products.py)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import config

from janusflow_jax import config as c
from janusflow_jax.models import attention, layers, products
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import compile as plan_compile
from janusflow_jax.training import step as train_step

ROUNDED = jax.default_matmul_precision(products.PRECISION)
SHAPES = [
    ((40, 16), (16, 24)),
    ((9, 7), (7, 1)),
    ((1, 7), (7, 9)),
    ((3, 2, 33, 16), (3, 2, 16, 50)),
]


def arrays(*shapes):
    normal = (np.random.default_rng(i).normal(size=s) for i, s in enumerate(shapes))
    return [jnp.asarray(x, jnp.float32) for x in normal]


def rounded(x):
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize(("of_a", "of_b"), SHAPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_value_and_gradients_are_those_of_rounded_operands(of_a, of_b, transposed):
    a, b = arrays(of_a, of_b)
    of_out = (*of_a[:-1], of_b[-1])
    (g,) = arrays(of_out)
    given = np.swapaxes(b, -1, -2) if transposed else b
    product = products.matmul_transposed if transposed else products.matmul
    value, pull = jax.vjp(jax.jit(product), a, given)
    d_a, d_given = pull(g)
    d_b = np.swapaxes(d_given, -1, -2) if transposed else d_given
    a, b, g = rounded(a), rounded(b), rounded(g)
    np.testing.assert_allclose(value, a @ b, atol=1e-4)
    np.testing.assert_allclose(d_a, g @ np.swapaxes(b, -1, -2), atol=1e-4)
    np.testing.assert_allclose(d_b, np.swapaxes(a, -1, -2) @ g, atol=1e-4)


@pytest.mark.parametrize("product", [products.matmul, products.matmul_transposed])
def test_transposes_around_it_reach_no_program_that_xla_refuses(product):
    """Without barriers XLA moved a transpose into the product, and the CPU had no such product."""
    a, b = arrays((16, 48), (16, 32) if product is products.matmul else (32, 16))
    (g,) = arrays((32, 48))
    loss = lambda a, b: jnp.sum(product(a.T, b).T * g)  # noqa: E731
    got = jax.jit(jax.grad(loss, (0, 1)))(a, b)
    want = jax.grad(lambda a, b: jnp.sum((b.T if b.shape[0] == 16 else b) @ a * g), (0, 1))(a, b)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=0.2)


def types_of_products(run, *args):
    """The types that are multiplied in a function's program."""
    text = jax.jit(run).lower(*args).as_text()
    return set(re.findall(r"stablehlo.dot_general .* : \(tensor<[\dx]*x(\w+)>", text))


def test_linear_layers_and_attention_use_it_under_that_precision_only():
    x, rows = arrays((4, 8), (2, 6, 4, 8))
    linear = layers.Linear(5)
    params = linear.init(jax.random.key(0), x)
    mask = attention.segment_mask(jnp.ones((2, 6), jnp.int32))

    def attend(x):
        return attention.dot_product_attention(x, x[:, :, :2], x[:, :, :2], mask)

    for run, arg in ((lambda x: linear.apply(params, x), x), (attend, rows)):
        assert types_of_products(run, arg) == {"f32"}
        want = run(arg)
        with ROUNDED:
            assert types_of_products(run, arg) == {"bf16"}
            np.testing.assert_allclose(run(arg), want, atol=0.05)
            half = jax.tree.map(lambda y: y.astype(jnp.bfloat16), arg)
            assert run(half).dtype == jnp.bfloat16  # a model in bfloat16 is as it was


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["", products.PRECISION])
def test_a_training_step_has_the_precision_of_its_config(precision):
    cfg = config("run", matmul_precision=precision)
    step, state = train_step.make_train_step(cfg), plan_compile.state_shapes(cfg)
    with jax.set_mesh(sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])):
        used = types_of_products(step, state, plan_compile.batch_shapes(cfg))
    assert ("bf16" in used) == bool(precision)
