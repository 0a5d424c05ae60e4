"""What defines the training step, on a model so small that each test takes seconds: a packed row
trains as its samples alone, and neither remat nor accumulation nor a mesh changes a loss or a
gradient. The slow tests hold the same on the golden model and on rows of the loader."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.config import GENERATE, UNDERSTAND
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import sharding
from janusflow_jax.training import losses, step as train_step

CFG = c.ModelConfig(
    image_size=16,
    llm=c.LlamaConfig(
        vocab_size=32, width=16, mlp_width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8
    ),
    und=c.SiglipConfig(
        image_size=16, patch_size=8, width=16, num_layers=1, num_heads=2, mlp_width=32
    ),
    gen=c.GenConfig(width=8, num_blocks=1, patch_size=4),
    vae=c.VaeConfig(channels=(4, 8), layers_per_block=1, norm_groups=2),
    repa=c.RepaConfig(layer=1, width=16),
)
LENGTH = 24
SAMPLES = {"generate": (GENERATE, 3, 0), "understand": (UNDERSTAND, 2, 3)}
"""Task, tokens before the image, tokens after it (learned)."""


@functools.cache
def parameters():
    def initialize(key, vae_key):
        both = janusflow.init_params(CFG, key), vae.init_params(CFG.vae, vae_key)
        # Some kernels start at zero; with this none does, so that every parameter matters.
        return jax.tree.map(lambda x: x + 0.02, both)

    return jax.jit(initialize)(*jax.random.split(jax.random.key(0), 2))


def batch_of(rows: list[list[str]]) -> dict:
    """Rows of samples by name; the generated image is in slot 0, the understood one in slot 1."""
    shape = (len(rows), LENGTH)
    batch = {n: np.zeros(shape, np.int32) for n in ("tokens", "segment_ids", "positions")}
    batch["target_mask"] = np.zeros(shape, bool)
    batch["slot_start"], batch["slot_task"] = (np.zeros((len(rows), 2), np.int32) for _ in range(2))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    batch["images"] = np.broadcast_to(pixels, (len(rows), *pixels.shape))
    for b, row in enumerate(rows):
        begin = 0
        for number, name in enumerate(row, start=1):
            task, before, after = SAMPLES[name]
            size = before + CFG.slot_len + after
            span = slice(begin, begin + size)
            batch["tokens"][b, span] = 1 + np.arange(size) % 30
            batch["segment_ids"][b, span] = number
            batch["positions"][b, span] = np.arange(size)
            if after:
                batch["target_mask"][b, begin + size - after : begin + size - 1] = True
            slot = int(task == UNDERSTAND)
            batch["slot_start"][b, slot], batch["slot_task"][b, slot] = begin + before, task
            begin += size
    return jax.tree.map(jnp.asarray, batch)


def loss(params, vae_params, batch, model):
    """The same draws in every row, so that a sample may stand in any of them."""
    rows, shape = len(batch["tokens"]), CFG.latent_shape
    keys = jax.random.split(jax.random.key(1), 2)
    noise, posterior = (
        jnp.broadcast_to(jax.random.normal(k, shape), (rows, 1, *shape)) for k in keys
    )
    draws = {"t": jnp.full((rows, 1), 0.3), "noise": noise, "posterior": posterior}
    sums, _ = losses.loss_sums(
        params, vae_params, batch, draws, model=model, loss=c.LossConfig(), num_gen=1, num_und=1
    )
    return sum(sums.values()), sums


def gradient(model):
    return jax.jit(jax.value_and_grad(functools.partial(loss, model=model), has_aux=True))


PLAIN = gradient(janusflow.JanusFlow(CFG))


def close(got, want, tolerance):
    """Sums relative to themselves, gradients to the largest of their array."""
    ((_, sums), grads), ((_, other_sums), other_grads) = got, want
    for task in losses.TASKS:
        assert other_sums[task] != 0
        np.testing.assert_allclose(sums[task], other_sums[task], rtol=tolerance)

    def check(path, a, b):
        size = np.abs(b).max()
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size + 1e-6, err_msg=name)

    jax.tree_util.tree_map_with_path(check, grads, other_grads)


@pytest.fixture(scope="module")
def packed():
    return PLAIN(*parameters(), batch_of([["understand", "generate"], [], [], []]))


def test_a_packed_row_trains_as_its_samples_alone(packed):
    close(packed, PLAIN(*parameters(), batch_of([["understand"], [], ["generate"], []])), 1e-5)


@pytest.mark.parametrize("program", [{"remat": "full"}, {"remat": "names"}, {"scan_layers": False}])
def test_remat_and_separate_layers_change_no_loss_and_no_gradient(packed, program):
    other = gradient(janusflow.JanusFlow(CFG, **program))
    batch = batch_of([["understand", "generate"], [], [], []])
    close(other(*parameters(), batch), packed, 1e-5)


def test_accumulated_gradients_are_those_of_one_batch():
    batch = batch_of([["understand", "generate"], ["generate"], ["understand"], ["generate"]])
    run = functools.partial(loss, model=janusflow.JanusFlow(CFG))

    def accumulated(params, vae_params, batch):
        gradient = jax.value_and_grad(run, has_aux=True)
        return train_step.accumulate(lambda part: gradient(params, vae_params, part), batch, 2)

    close(jax.jit(accumulated)(*parameters(), batch), PLAIN(*parameters(), batch), 1e-5)


def test_a_mesh_changes_no_loss_and_no_gradient():
    batch = batch_of([["understand", "generate"], ["generate"], ["understand"], ["generate"]])
    want = PLAIN(*parameters(), batch)
    mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
    params, vae_params = parameters()
    with jax.set_mesh(mesh):
        params = jax.device_put(params, sharding.tree_shardings(params, mesh))
        batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
        kernel = params["llm"]["layers"]["block"]["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        close(PLAIN(params, vae_params, batch), want, 3e-5)
