"""Language models of transformers: the same logits, and all that a run does with them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import families as published, golden

from janusflow_jax import config as c
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import families, names, tensors as hub_tensors
from janusflow_jax.models import int8, llama
from janusflow_jax.parallel import sharding


def convert(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[c.LlamaConfig, Any]:
    """What `hub.assemble` makes of a language model: its config and its parameters."""
    llm = families.config_from_hf(config)
    model = dataclasses.replace(c.model_config("test"), llm=llm)
    shapes = {"llm": hub_tensors.published_shapes(model)["llm"]}
    rules = names.llm_rules(llm, tied=families.is_tied(config), fused=families.fused_mlp(config))
    hub_tensors.check(tensors, rules, shapes, Path("file"))
    tree = hub_tensors.from_torch(tensors, rules, shapes)["llm"]
    return llm, with_head(families.fold(tree, config, llm))


def with_head(tree: Any) -> Any:
    return {"head": {"kernel": np.ascontiguousarray(tree["embedding"].T)}, **tree}


def logits(
    cfg: c.LlamaConfig, params: Any, tokens: Any, cut: int = 0, remat: str = "none"
) -> jax.Array:
    """Logits of whole rows; with `cut`, of rows whose first positions were computed before."""
    tokens = jnp.asarray(tokens)
    model = llama.Llama(cfg, remat=remat)
    run = {"params": params}
    length = tokens.shape[1]
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool)), (len(tokens), length, length)
    )
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    x = model.apply(run, tokens, method="embed")
    cache, states = None, []
    for part in (slice(0, cut), slice(cut, length)) if cut else (slice(0, length),):
        seen = mask[:, part, : part.stop]
        state, _, kv = model.apply(
            run, x[:, part], positions[:, part], seen, cache=cache, keep="kv"
        )
        states.append(state)
        cache = kv
    return model.apply(run, jnp.concatenate(states, 1), method="logits")


@pytest.mark.parametrize("name", published.NAMES)
def test_a_family_computes_what_transformers_does(name):
    """Whole rows, rows behind a cache, and layers one by one; 1e-5 of the largest logit."""
    tensors, config, tokens, want = published.read(name)
    cfg, params = convert(tensors, config)
    one_by_one = llama.unstack(jax.tree.map(np.copy, params))
    whole = jax.jit(lambda p: logits(cfg, p, tokens))
    assert golden.error(whole(params), want) < 1e-5
    cached = jax.jit(lambda p: logits(cfg, p, tokens, cut=25))
    assert golden.error(cached(one_by_one), want) < 1e-5


@pytest.mark.parametrize("name", published.NAMES)
def test_a_family_is_written_as_it_was_read(name):
    """config.json and tensors; a folded model is a Llama from then on."""
    tensors, config, _, _ = published.read(name)
    cfg, params = convert(tensors, config)
    written = families.config_to_hf(cfg, config)
    assert families.config_from_hf(written) == cfg
    assert not families.is_tied(written) and written["model_type"] == cfg.family
    out = hub_tensors.to_torch({"llm": params}, names.llm_rules(cfg))
    again, params_again = convert({n: np.asarray(x) for n, x in out.items()}, written)
    assert again == cfg
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    if families.FAMILIES[config["model_type"]].architecture:
        for key, x in tensors.items():
            np.testing.assert_array_equal(np.asarray(out[key]), x, err_msg=key)


def test_the_files_have_what_each_family_adds():
    """So that no golden agrees because nothing of its family is in it."""
    cfgs = {name: families.config_from_hf(published.read(name)[1]) for name in published.NAMES}
    assert (cfgs["llama3"].rope.type, cfgs["deepseek_coder"].rope.type) == ("llama3", "linear")
    assert (cfgs["qwen2"].attn_bias, cfgs["llama_biases"].attn_bias) == ("qkv", "qkvo")
    assert cfgs["llama_biases"].mlp_bias and cfgs["ernie4_5"].mlp_bias
    assert (cfgs["qwen3"].qk_norm, cfgs["qwen3"].head_dim) == ("head", 10)
    assert (cfgs["olmo2"].qk_norm, cfgs["olmo2"].norms) == ("all", "post")
    assert cfgs["smollm3"].no_rope_layers == (1,) and cfgs["smollm3"].rope_theta == 2e6
    assert {cfgs[n].family for n in ("granite", "granite4", "ernie4_5")} == {"llama"}
    of_transformers_5 = published.read("smollm3")[1] | {"rope_parameters": {"rope_theta": 5e6}}
    assert families.config_from_hf(of_transformers_5).rope_theta == 5e6
    assert all(cfg.num_kv_heads < cfg.num_heads for cfg in cfgs.values())


def test_a_product_that_rounds_is_float32():
    tensors, config, _, _ = published.read("granite")
    half = {n: x.astype(np.float16) for n, x in tensors.items()}
    _, params = convert(half, config)
    block = params["layers"]["block"]
    assert block["attn"]["o"]["kernel"].dtype == block["mlp"]["down"]["kernel"].dtype == np.float32
    assert block["mlp"]["up"]["kernel"].dtype == np.float16
    assert params["head"]["kernel"].dtype == np.float16  # divided by 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, "got 'qwen3_moe', which has experts: take for example Qwen3"),
        ({"model_type": "gemma3_text"}, "windows of fewer positions than an image has: take for"),
        ({"model_type": "gpt2"}, "expected one of llama, qwen2, .*; got 'gpt2': take for example"),
        (
            {"rope_parameters": {"rope_type": "yarn"}},
            "one of default, linear, llama3.*got .yarn",
        ),
        ({"rope_parameters": {"full_attention": {}}}, "for all layers; got .*full_attention"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "got 'linear_attention': only"),
        ({"use_sliding_window": True}, "use_sliding_window: got True: windows"),
        ({"num_local_experts": 8}, "num_local_experts: got 8: experts are not"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .*: dequantize the weights"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: got 30.0: caps"),
        ({"attn_output_gate": True}, "attn_output_gate: got True: gates"),
        ({"kv_lora_rank": 512}, "kv_lora_rank: got 512: latent"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu'; got 'gelu'"),
        ({"model_type": "granitemoehybrid"}, "layer_types: got 'mamba'(?s:.*)num_local_experts"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"expected 2 numbers.*got \[1\]"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, message):
    _, config, _, _ = published.read("deepseek_coder")
    with pytest.raises(ConvertError, match=message):
        families.config_from_hf({**config, **change})


def with_vocabulary(name: str) -> tuple[c.LlamaConfig, Any]:
    """A family's model with a table that divides over 8 devices."""
    tensors, config, _, _ = published.read(name)
    cfg, params = convert(tensors, config)
    assert cfg.vocab_size == 48
    return cfg, jax.tree.map(jnp.asarray, params)


@pytest.mark.slow
@pytest.mark.parametrize("name", published.FORMS)
def test_a_family_computes_the_same_on_eight_devices(name):
    """Loss and gradients, parameters over fsdp and tensor; two key heads, one a device."""
    cfg, params = with_vocabulary(name)
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 0, cfg.vocab_size)

    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(logits(cfg, params, tokens)))

    run = jax.jit(jax.value_and_grad(loss))
    want, want_grads = jax.device_get(run(params))
    mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=4, tensor=2), jax.devices()[:8])
    placed = jax.device_put(params, sharding.tree_shardings({"llm": params}, mesh)["llm"])
    if cfg.attn_bias:
        bias = placed["layers"]["block"]["attn"]["q"]["bias"]
        assert not bias.is_fully_replicated
    with jax.set_mesh(mesh):
        got, grads = jax.device_get(run(placed))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(want_grads))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size),
        grads,
        want_grads,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", published.FORMS)
def test_what_the_backward_pass_computes_again_changes_nothing(name):
    cfg, params = with_vocabulary(name)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, cfg.vocab_size)

    def gradients(remat: str) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.square(logits(cfg, params, tokens, remat=remat)))

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    want = gradients("none")
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(want))
    for remat in ("full", "names"):
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * size)
        jax.tree.map(close, gradients(remat), want)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_int8_keys_where_no_bias_makes_some_of_them_large(name):
    pytest.importorskip("qwix")
    cfg, params = with_vocabulary(name)
    wide = llama.unstack(params)
    narrow = int8.quantize_llm(jax.tree.map(lambda x: x, wide))
    cache = llama.empty_cache(cfg, narrow, 1, 4, jnp.float32)[0]
    assert (cache["k"].dtype == jnp.int8) == ("k_scale" in cache) == (not cfg.attn_bias)
    assert int8.is_int8(narrow["layers"][0]["attn"]["k"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("name", published.NAMES)
def test_a_family_computes_what_transformers_does_now(name, monkeypatch):
    """Against transformers itself, at other sizes and with other weights."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parent / "data")
    make = __import__("make_families").make
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 56}
    if name == "granite4":
        sizes["layer_types"] = ["attention"] * 3
    tensors, config, tokens, want = make(name, seed=1, **sizes)
    cfg, params = convert({n: x.numpy() for n, x in tensors.items()}, config)
    got = jax.jit(lambda p: logits(cfg, p, jnp.asarray(tokens.numpy())))(params)
    assert golden.error(got, want.numpy()) < 1e-5
