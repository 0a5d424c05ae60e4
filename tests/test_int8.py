"""int8 weights and keys and values: a quarter of the bytes, nearly the same answers."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import janusflow_jax
from janusflow_jax.models import attention, int8
from janusflow_jax.sampling import text as text_sampling


@pytest.fixture(scope="module")
def small(golden_folder):
    return janusflow_jax.load(golden_folder, dtype="float32", int8=True)


def test_weights_take_a_byte_and_are_close(small, golden_model):
    narrow, wide = (jax.tree.leaves(m.params["llm"]["layers"]) for m in (small, golden_model))
    size = lambda many: sum(x.nbytes for x in many)  # noqa: E731
    assert size(narrow) < 0.3 * size(wide)
    kernel = golden_model.params["llm"]["layers"][0]["mlp"]["gate"]["kernel"]
    x = jax.random.normal(jax.random.key(0), (5, kernel.shape[0]))
    got = int8.matmul(x, small.params["llm"]["layers"][0]["mlp"]["gate"]["kernel"])
    want = x @ kernel
    error = np.abs(np.asarray(got - want)).max() / np.abs(np.asarray(want)).max()
    assert 1e-5 < error < 0.02  # rounded, and to 8 bits
    assert small.params["llm"]["embedding"].dtype == jnp.float32


def test_scales_after_the_matmuls_equal_widened_keys_and_values():
    key = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(key[0], (2, 3, 4, 16))
    k, v = (jax.random.normal(k, (2, 7, 2, 16)) for k in key[1:])
    new = int8.keys_values(k, v)
    assert new["k"].dtype == jnp.int8 and new["k_scale"].shape == (2, 7, 2, 1)
    scales = (new["k_scale"], new["v_scale"])
    mask = jnp.tril(jnp.ones((3, 7), bool), 4)[None].repeat(2, 0)
    got = attention.dot_product_attention(q, new["k"], new["v"], mask, scales=scales)
    wide = [new[n] * s for n, s in zip("kv", scales, strict=True)]
    np.testing.assert_allclose(got, attention.dot_product_attention(q, *wide, mask), atol=1e-5)
    np.testing.assert_allclose(got, attention.dot_product_attention(q, k, v, mask), atol=0.05)


@pytest.mark.slow
def test_decoding_keeps_int8_and_follows_the_wide_model(small, golden_model):
    """Logits behind the same tokens, prompt and eight more: the buffer's keys and values count."""
    ids = jax.random.randint(jax.random.key(0), (1, 12), 5, 500)

    def run(model):
        x = text_sampling.embed_prompt(model.model, model.params, ids, None, ids[:, :0], ids[:, :0])
        keys = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
        state = text_sampling.prefill(model.model, model.params, x, jnp.array([12]), keys, 8)
        zero = jnp.float32(0)
        state, _ = text_sampling.decode(
            model.model, model.params, state, zero, zero, num_tokens=8, eos_id=-1
        )
        return state

    narrow, wide = run(small), run(golden_model)
    cache = narrow["cache"][0]
    assert cache["k"].dtype == jnp.int8 and set(cache) == {"k", "v", "k_scale", "v_scale"}
    assert np.asarray(cache["k_scale"]).all()  # every position was written
    a, b = np.asarray(narrow["logits"]), np.asarray(wide["logits"])
    assert 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max()


@pytest.mark.slow
def test_it_answers_and_paints(small, golden_model):
    assert isinstance(small.chat("What is it?", max_new_tokens=4), str)
    options = {"num_steps": 2, "output": "latent"}
    got, want = (m.generate("a red apple", **options) for m in (small, golden_model))
    assert 0 < np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_without_qwix_it_says_what_to_install(golden_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match="janusflow_jax\\[int8\\]"):
        janusflow_jax.load(golden_folder, int8=True)
