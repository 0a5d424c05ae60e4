"""The Python API at other shapes than the golden model's: grouped heads, other depths, 256 px."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden

from janusflow_jax import config, pipeline
from janusflow_jax.config import UNDERSTAND
from janusflow_jax.data import chat_format
from janusflow_jax.models import attention, encode, janusflow, vae
from janusflow_jax.sampling import text as text_sampling

LONG = "a red fox, a blue whale and a green frog sit in the snow beside a quiet river " * 2


@functools.cache
def variant():
    """Grouped heads, another theta and eps, other depths, 256 px; every parameter random."""
    cfg = config.model_config("test", 256)
    llm = cfg.llm
    llm.num_kv_heads, llm.num_layers, llm.rope_theta, llm.norm_eps = 2, 2, 5e5, 1e-5
    cfg.und.num_layers, cfg.gen.num_blocks = 3, 1
    leaves, tree = jax.tree.flatten(janusflow.param_shapes(cfg))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    draw = lambda k, x: 0.2 * jax.random.normal(k, x.shape) + (len(x.shape) == 1)  # noqa: E731
    params = jax.tree.unflatten(tree, map(draw, keys, leaves))
    text = chat_format.ChatFormat.load(golden.TINY / "janusflow", cfg.num_image_tokens)
    vae_params = jax.jit(vae.init_params, static_argnums=0)(cfg.vae, jax.random.key(1))
    return pipeline.Pipeline(cfg, params, vae_params, text)


@pytest.mark.slow
def test_other_shapes_paint_as_without_a_cache():
    model = variant()
    cfg, run = model.cfg, functools.partial(model.model.apply, {"params": model.params})
    got = model.generate(
        ["a red fox", LONG], seed=2, guidance_scale=3.0, num_steps=1, output="latent"
    )
    noise = jnp.asarray(model.generate("x", seed=2, num_steps=1, output="trajectory")[0])
    ids = jnp.asarray([model.text.generation_ids("a red fox")])
    slot, features, t_emb = run(noise, jnp.zeros((1,)), method="generation_slot")
    x = jnp.concatenate([run(ids, method="embed_tokens"), slot], axis=1)
    size, length = ids.shape[1], x.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    k = jnp.arange(length)
    velocities = []
    for seen in (jnp.ones(length, bool), (k == 0) | (k >= size)):
        mask = (causal & seen) | jnp.eye(length, dtype=bool)
        hidden, _, _ = run(x, k[None], mask, method="run_llm")
        velocities.append(run(hidden[:, size + 1 :], features, t_emb, method="velocity"))
    want = noise + 3.0 * velocities[0] - 2.0 * velocities[1]
    assert golden.error(got[:1], np.asarray(want)) < 1e-5
    assert got.shape == (2, 32, 32, 4) and cfg.num_image_tokens == 256
    assert model.decode_latents(got, "numpy").shape == (2, 256, 256, 3)


@pytest.mark.slow
def test_other_shapes_answer_as_without_a_cache():
    model = variant()
    run = functools.partial(model.model.apply, {"params": model.params})
    picture = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    prompt = model.text.conversation([{"role": "user", "content": "<image_placeholder> Hm?"}], 1)
    pixels = encode.to_float(jnp.asarray(picture), jnp.float32)[None]
    slots = text_sampling.encode_images(model.model, model.params, pixels)[None]
    start, task = jnp.asarray([prompt.slot_starts]), jnp.asarray([[UNDERSTAND]])
    ids, want = jnp.asarray(prompt.ids)[None], []
    x = text_sampling.embed_prompt(model.model, model.params, ids, slots, start, task)
    for _ in range(6):
        mask = attention.segment_mask(jnp.ones((1, x.shape[1]), jnp.int32))
        hidden, _, _ = run(x, jnp.arange(x.shape[1])[None], mask, method="run_llm")
        want.append(int(jnp.argmax(run(hidden[:, -1], method="logits"))))
        x = jnp.concatenate([x, run(jnp.asarray([want[-1:]]), method="embed_tokens")], axis=1)
    until = want.index(model.text.eos_id) if model.text.eos_id in want else 6
    said = model.chat("<image_placeholder> Hm?", [picture], max_new_tokens=6)
    assert said == model.text.decode(want[:until]).strip() and len(set(want)) > 1
