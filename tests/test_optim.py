"""The optimizer: which parameters Muon takes, what it does to them, schedule and EMA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config
from janusflow_jax.models import janusflow
from janusflow_jax.parallel import trees
from janusflow_jax.training import optim


def test_muon_takes_the_kernels_inside_the_parts():
    shapes = janusflow.param_shapes(config.model_config("test"))
    found = {}
    jax.tree_util.tree_map_with_path(
        lambda path, x, d: found.update({trees.path_name(path): d}),
        shapes,
        optim.muon_dimensions(shapes),
        is_leaf=lambda x: x is None,
    )
    axes = {n: (d.reduction_axis, d.output_axis) for n, d in found.items() if d is not None}
    assert axes["llm/layers/block/mlp/up/kernel"] == (1, 2)  # layers are stacked on axis 0
    assert axes["und_encoder/patch_embed/kernel"] == ((0, 1, 2), 3)
    assert axes["gen_aligner/kernel"] == (0, 1)
    left = found.keys() - axes
    for name in ("llm/embedding", "llm/head/kernel", "gen_encoder/block_0/depthwise/kernel"):
        assert name in left
    assert all(n.endswith("kernel") for n in axes)


@pytest.mark.parametrize("name", ("adamw", "muon"))
def test_update_of_a_kernel_and_of_an_embedding(name):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "llm": {
            "embedding": jax.random.normal(keys[0], (8, 4)),
            "up": {"kernel": jax.random.normal(keys[1], (2, 16, 24))},
        }
    }
    grads = jax.tree.map(lambda x: x + 0.1, params)
    cfg = config.OptimConfig(name=name, lr=0.1, warmup_steps=1, clip_norm=1e9)
    tx = optim.make_optimizer(cfg, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    got = trees.flatten(jax.device_get(updates))
    # Adam's first step is the sign of the gradient, whatever its size; Muon's Adam is Nesterov's,
    # which adds b1 (1 - b1) / (1 - b1^2) to it.
    size = 0.1 * (1 + 0.9 * 0.1 / (1 - 0.9**2) if name == "muon" else 1)
    want = -size * np.sign(grads["llm"]["embedding"])
    np.testing.assert_allclose(got["llm/embedding"], want, rtol=1e-4)
    kernel = got["llm/up/kernel"]
    values = np.linalg.svd(kernel, compute_uv=False)
    if name == "muon":  # every layer's update is near orthogonal, with the size of Adam's
        assert (values.max(1) / values.min(1) < 2.5).all()
        np.testing.assert_allclose(np.sqrt((kernel**2).mean()), 0.1, rtol=0.2)
    else:
        assert (values.max(1) / values.min(1) > 2.5).all()


def test_schedule_warms_up_stays_and_decays():
    rate = optim.schedule(config.OptimConfig(lr=1.0, warmup_steps=4, decay_steps=5), 20)
    np.testing.assert_allclose([float(rate(n)) for n in (0, 4, 14)], [0.25, 1, 1])
    np.testing.assert_allclose([float(rate(n)) for n in (17, 20)], [0.6, 0], atol=1e-6)
    constant = optim.schedule(config.OptimConfig(lr=1.0, warmup_steps=4), 20)
    assert float(constant(100)) == 1
    short = optim.schedule(config.OptimConfig(lr=1.0, warmup_steps=4, decay_steps=50), 20)
    np.testing.assert_allclose([float(short(n)) for n in (4, 12, 20)], [1, 0.5, 0], atol=1e-6)


def test_ema_starts_as_an_average_and_ends_at_its_decay():
    ema = optim.update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.99, jnp.int32(0))
    np.testing.assert_allclose(ema["a"], 0.9, rtol=1e-6)
    ema = optim.update_ema({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0.99, jnp.int32(10**6))
    np.testing.assert_allclose(ema["a"], 0.01, rtol=1e-5)
