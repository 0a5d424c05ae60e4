"""Properties of the model: what may see what, and that speed changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden

from janusflow_jax import config
from janusflow_jax.config import LossConfig
from janusflow_jax.models import attention, convnext, layers, llama
from janusflow_jax.planning import flops
from janusflow_jax.sampling import image as image_sampling, text as text_sampling
from janusflow_jax.training import flops as training_flops, losses


def close(got, want, tolerance=3e-6):
    assert golden.error(got, np.asarray(want)) < tolerance


def same_gradients(got, want, tolerance):
    """Relative to each array's largest; some are zero but for rounding (a key's bias)."""

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max() + 1e-6)

    jax.tree.map(check, got, want)


def run(method, *args, model=None, **kwargs):
    tiny, params, _ = golden.model()
    return (model or tiny).apply({"params": params}, *args, method=method, **kwargs)


def vectors(length=12, rows=1, seed=0):
    return jax.random.normal(jax.random.key(seed), (rows, length, 64))


def causal(length, rows=1):
    return attention.segment_mask(jnp.ones((rows, length), jnp.int32))


def test_no_position_sees_a_later_one():
    x, at = vectors(), 5
    positions = jnp.arange(12)[None]
    read = lambda x: run("run_llm", x, positions, causal(12))[0][0, at].sum()  # noqa: E731
    grad = np.abs(np.asarray(jax.jit(jax.grad(read))(x)))[0].max(-1)
    assert (grad[: at + 1] > 0).all()
    assert (grad[at + 1 :] == 0).all()


@pytest.mark.slow
def test_a_cached_prefix_changes_nothing():
    x, positions = vectors(rows=2), jnp.broadcast_to(jnp.arange(12), (2, 12))
    whole, _, _ = run("run_llm", x, positions, causal(12, 2))
    mask = causal(12, 2)
    first = run("run_llm", x[:, :7], positions[:, :7], mask[:, :7, :7], keep="kv")[2]
    rest, _, _ = run("run_llm", x[:, 7:], positions[:, 7:], mask[:, 7:], cache=first)
    close(rest, whole[:, 7:])


def test_token_by_token_equals_all_at_once():
    """Greedy tokens of the buffer's decoder against a forward pass over the whole sequence."""
    model, params, _ = golden.model()
    prompt = jnp.asarray([[0, 39, 568, 548, 569, 9]])
    x, lengths = run("embed_tokens", prompt), jnp.asarray([6])
    keys = jax.random.split(jax.random.key(0), 1)
    state = text_sampling.prefill(model, params, x, lengths, keys, 5)
    zero, one = jnp.float32(0), jnp.float32(1)
    _, tokens = text_sampling.decode(model, params, state, zero, one, num_tokens=5, eos_id=-1)
    ids = jnp.concatenate([prompt, tokens], axis=1)
    hidden, _, _ = run("run_llm", run("embed_tokens", ids), jnp.arange(11)[None], causal(11))
    want = jnp.argmax(run("logits", hidden), -1)[:, 5:-1]
    np.testing.assert_array_equal(tokens, want)


@pytest.mark.slow
def test_padding_a_prompt_changes_nothing():
    model, params, _ = golden.model()
    ids, other = [0, 39, 568, 548], [0, 39, 568, 548, 569, 279, 267]
    noise = jax.random.normal(jax.random.key(1), (2, *model.cfg.latent_shape))

    def sample(tokens, lengths, noise):
        return image_sampling.sample(
            model,
            params,
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            noise,
            2.0,
            head=1,
            sampler=config.SamplerConfig(steps=2),
        )

    alone = sample([ids], [4], noise[:1])
    together = sample([ids + [7] * 3, other], [4, 7], noise)
    close(together[:1], alone, 5e-6)


def rows(pieces, length):
    """A batch of rows from lists of samples ('g' or 'u', prompt length), one image each."""
    cfg = golden.model()[0].cfg
    rng = np.random.default_rng(0)
    num_slots = 2
    shape = (len(pieces), length)
    batch = {n: np.zeros(shape, np.int32) for n in ("tokens", "segment_ids", "positions")}
    batch["target_mask"] = np.zeros(shape, bool)
    batch["images"] = np.zeros((len(pieces), num_slots, 64, 64, 3), np.uint8)
    batch["slot_start"] = np.zeros((len(pieces), num_slots), np.int32)
    batch["slot_task"] = np.zeros((len(pieces), num_slots), np.int32)
    batch["row"] = np.arange(len(pieces), dtype=np.uint32)
    pool = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)  # the picture goes with the task
    for b, row in enumerate(pieces):
        at = 0
        for number, (task, prompt) in enumerate(row, 1):
            size = prompt + cfg.slot_len + (3 if task == "u" else 0)
            span = slice(at, at + size)
            ids = np.random.default_rng(prompt).integers(6, 600, size)
            batch["tokens"][b, span] = ids
            batch["segment_ids"][b, span] = number
            batch["positions"][b, span] = np.arange(size)
            slot = 0 if task == "g" else 1
            batch["slot_start"][b, slot] = at + prompt
            batch["slot_task"][b, slot] = 1 if task == "g" else 2
            batch["images"][b, slot] = pool[slot]
            if task == "u":
                batch["target_mask"][b, at + size - 3 : at + size - 1] = True
            at += size
    return jax.tree.map(jnp.asarray, batch)


def draws_for(num_rows):
    """The same draw in every row, so that rows can be compared in other batches."""
    shape = golden.model()[0].cfg.latent_shape
    keys = jax.random.split(jax.random.key(3), 2)
    one = {
        n: jax.random.normal(k, shape) for n, k in zip(("noise", "posterior"), keys, strict=True)
    }
    draws = {n: jnp.broadcast_to(x, (num_rows, 1, *shape)) for n, x in one.items()}
    return draws | {"t": jnp.full((num_rows, 1), 0.3)}


def sums(params, vae, batch, model=None, **kwargs):
    options = {"loss": LossConfig(), "num_gen": 1, "num_und": 1} | kwargs
    draws = draws_for(len(batch["tokens"]))
    model = model or golden.model()[0]
    return losses.loss_sums(params, vae, batch, draws, model=model, **options)[0]


def total(params, vae, batch, **kwargs):
    return sum(sums(params, vae, batch, **kwargs).values())


SUMS = jax.jit(sums)
GRADIENT = jax.jit(jax.grad(total))  # tests share shapes, so that both compile once


@pytest.mark.slow
def test_packed_samples_equal_rows_of_their_own():
    _, params, vae = golden.model()
    packed = SUMS(params, vae, rows([[("u", 5), ("g", 7)]], 60))
    apart = SUMS(params, vae, rows([[("u", 5)], [("g", 7)]], 60))
    for task in losses.TASKS:
        assert packed[task] != 0
        np.testing.assert_allclose(packed[task], apart[task], rtol=5e-6)


def test_a_packed_sample_sees_no_other():
    batch = rows([[("u", 5), ("g", 7)]], 60)
    x = vectors(60)
    read = lambda x: run(  # noqa: E731
        "run_llm", x, batch["positions"], attention.segment_mask(batch["segment_ids"])
    )[0][0, 30].sum()
    grad = np.abs(np.asarray(jax.grad(read)(x)))[0].max(-1)
    assert batch["segment_ids"][0, 30] == 2
    np.testing.assert_array_equal(grad > 0, (batch["segment_ids"][0] == 2) & (np.arange(60) <= 30))


def test_a_norm_keeps_small_changes_of_its_scale_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (8, 64), jnp.bfloat16)
    norm = layers.RMSNorm()
    got, one = (norm.apply({"params": {"scale": jnp.full(64, s)}}, x) for s in (1.003, 1.0))
    assert got.dtype == jnp.bfloat16 and (got != one).any()


@pytest.mark.parametrize("form", [convnext.grid_matmul, convnext.shifts])
@pytest.mark.parametrize("grid", [(4, 4), (2, 9)])
def test_depthwise_convolution(form, grid):
    """Both forms for CPUs equal XLA's convolution, gradients included."""
    x = jax.random.normal(jax.random.key(0), (2, *grid, 3))
    kernel = jax.random.normal(jax.random.key(1), (convnext.KERNEL, convnext.KERNEL, 1, 3))

    def conv(x, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=3
        )

    want, gradient = jax.vjp(conv, x, kernel)
    got, own = jax.vjp(form, x, kernel)
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    same_gradients((got, own(cotangent)), (want, gradient(cotangent)), 1e-6)


def test_dead_channels_have_a_finite_gradient():
    module = convnext.GlobalResponseNorm()
    x = jnp.ones((1, 4, 4, 3)).at[..., 1].set(0.0)
    params = module.init(jax.random.key(0), x)
    read = lambda p, x: jnp.sum(module.apply(p, x) ** 2)  # noqa: E731
    for dead in (x, jnp.zeros_like(x)):
        grads = jax.grad(read, argnums=(0, 1))(params, dead)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("side", [0, 1])
def test_cosine_with_zeros_has_a_finite_gradient(side):
    pair = [jnp.ones((2, 4)), jnp.ones((2, 4))]
    pair[side] = pair[side].at[0].set(0.0)
    read = lambda a, b: losses.cosine(a, b).sum()  # noqa: E731
    grads = jax.grad(read, argnums=(0, 1))(*pair)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.slow
def test_a_batch_without_images_has_a_finite_gradient():
    _, params, vae = golden.model()
    grads = GRADIENT(params, vae, rows([[]], 60))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_empty_slots_change_nothing():
    _, params, vae = golden.model()
    batch = rows([[("u", 5)]], 60)
    noisy = batch | {"images": batch["images"].at[:, 0].set(200)}
    got, want = SUMS(params, vae, noisy), SUMS(params, vae, batch)
    for task in losses.TASKS:
        np.testing.assert_allclose(got[task], want[task], rtol=5e-6)


@pytest.mark.slow
def test_one_siglip_pass_serves_both_tasks(monkeypatch):
    """The slots that both tasks may use are encoded once, with equal gradients."""
    model, params, vae = golden.model()
    batch = rows([[("u", 5), ("g", 7)]], 60)

    def gradients():
        traced = jax.jit(jax.grad(lambda *args: total(*args, num_und=2))).trace(params, vae, batch)
        return flops.count(traced.jaxpr), traced.lower().compile()(params, vae, batch)

    operations, got = gradients()
    target = losses._repa_target
    monkeypatch.setattr(losses, "_repa_target", lambda *args: target(*args[:3], None, args[4]))
    more, want = gradients()
    assert more - operations == training_flops.siglip(model.cfg)
    same_gradients(got, want, 1e-5)


def test_grouped_heads_equal_repeated_ones():
    cfg = config.model_config("test").llm
    assert cfg.num_heads == cfg.num_kv_heads == 4
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 5, n, 8)) for i, n in enumerate((4, 2, 2)))
    wide = [jnp.repeat(y, 2, axis=2) for y in (k, v)]
    mask = causal(5)
    close(
        attention.dot_product_attention(q, k, v, mask),
        attention.dot_product_attention(q, *wide, mask),
    )


def test_each_row_writes_its_keys_at_its_own_position():
    buffer, x = np.zeros((3, 8, 2, 4), np.float32), np.asarray(vectors(2, 3)[..., :8])
    x = x.reshape(3, 2, 2, 4)
    got = llama.write(jnp.asarray(buffer), jnp.asarray(x), jnp.asarray([0, 5, 2]))
    for row, index in enumerate((0, 5, 2)):
        want = llama.write(jnp.asarray(buffer), jnp.asarray(x), index)[row]
        np.testing.assert_array_equal(got[row], want)


def test_each_row_samples_with_its_own_options():
    logits = 3 * vectors(1, 4)[:, 0]
    keys = jax.random.split(jax.random.key(1), 4)
    temperature, top_p = jnp.asarray([0.0, 1.0, 0.5, 2.0]), jnp.asarray([1.0, 1.0, 0.7, 0.9])
    together = text_sampling.sample_token(logits, keys, temperature, top_p)
    alone = [
        text_sampling.sample_token(*(x[i : i + 1] for x in (logits, keys, temperature, top_p)))
        for i in range(4)
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert together[0] == logits[0].argmax()


def test_a_prompt_in_pieces_is_the_prompt_at_once():
    tiny, params, _ = golden.model()
    x, lengths = vectors(12, 2), jnp.asarray([11, 6])
    cache = llama.empty_cache(tiny.cfg.llm, params["llm"], 2, 16, x.dtype)
    want, logits = text_sampling.extend(tiny, params, x, cache, 0, lengths)
    parts = [None, None]
    for i, begin in enumerate((0, 6)):
        piece = x[:, begin : begin + 6]
        cache, parts[i] = text_sampling.extend(tiny, params, piece, cache, begin, lengths)
    close(cache["k"][:, :, :12], want["k"][:, :, :12])
    close(parts[1][0], logits[0])
    close(parts[0][1], logits[1])
