"""Every golden number, by the modules that the project itself uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, torch_trees

from janusflow_jax.config import UNDERSTAND, LossConfig, SamplerConfig
from janusflow_jax.data import chat_format, images
from janusflow_jax.models import attention, convnext, encode, vae
from janusflow_jax.sampling import image as image_sampling, text as text_sampling
from janusflow_jax.training import losses

SLOT = 17  # positions an image takes in the tiny model


@functools.cache
def chat(folder="janusflow"):
    return chat_format.ChatFormat.load(golden.TINY / folder, num_image_tokens=16)


def picture(name):
    return images.for_understanding(images.decode((golden.TINY / "images" / name).read_bytes()), 64)


def apply(method, *args, **kwargs):
    model, params, _ = golden.model()
    run = jax.jit(lambda p, a: model.apply({"params": p}, *a, method=method, **kwargs))
    return run(params, args)


def test_pictures_are_prepared_as_the_published_processor_does():
    got = np.stack(
        [encode.to_float(jnp.asarray(picture(f"{i}.png")), jnp.float32) for i in range(4)]
    )
    want = golden.nhwc(golden.arrays("expected")["preprocess.pixel_values"])
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("folder", ["janusflow", "tokenizer_bos_by_config"])
def test_token_ids(folder):
    for case in golden.facts("expected")["tokenize"]:
        assert golden.token_ids(chat(folder), case["text"]) == case["ids"], case["text"]


@pytest.mark.parametrize("folder", ["janusflow", "tokenizer_bos_by_config"])
def test_conversations(folder):
    for case in golden.facts("expected")["chat"]:
        got = chat(folder).conversation(case["conversation"], len(case["images"]))
        assert got.ids.tolist() == case["input_ids"]
    for case in golden.facts("expected")["samples"]:
        form = chat(folder)
        assert [*form.generation_ids(case["prompt"]), form.gen_id] == case["input_ids"]


def test_siglip():
    want = golden.arrays("expected")
    pixels = golden.nhwc(want["und.pixel_values"]).reshape(4, 64, 64, 3)
    assert golden.error(apply("siglip", pixels), want["und.siglip"]) < golden.PART


def understanding_prompts():
    """The two conversations right-padded (the golden batch is left-padded)."""
    cases = golden.facts("expected")["chat"]
    pixels = golden.nhwc(golden.arrays("expected")["und.pixel_values"])
    lengths = np.array([len(c["input_ids"]) for c in cases], np.int32)
    tokens = np.zeros((2, lengths.max()), np.int32)
    start, task = np.zeros((2, 2), np.int32), np.zeros((2, 2), np.int32)
    for i, case in enumerate(cases):
        tokens[i, : lengths[i]] = case["input_ids"]
        found = np.flatnonzero(tokens[i] == chat().image_start_id)
        start[i, : len(found)], task[i, : len(found)] = found, UNDERSTAND
    return tuple(jnp.asarray(a) for a in (tokens, lengths, pixels, start, task))


def test_understanding_reads_images_and_text():
    model, params, _ = golden.model()
    want = golden.arrays("expected")
    tokens, lengths, pixels, start, task = understanding_prompts()
    slots = text_sampling.encode_images(
        model, params, pixels.reshape(-1, *pixels.shape[2:]), chunk=2
    )
    slots = slots.reshape(*start.shape, *slots.shape[1:])
    x = text_sampling.embed_prompt(model, params, tokens, slots, start, task)
    size = tokens.shape[1]
    segments = (jnp.arange(size) < lengths[:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(size), tokens.shape)
    mask = attention.segment_mask(segments)
    hidden, _, blocks = apply("run_llm", x, positions, mask, keep="hidden")
    logits = apply("logits", hidden)
    states = [x, *blocks[:-1], hidden]
    assert len(states) == len(want["und.hidden_states"])
    real = np.asarray(segments).astype(bool)
    expected = want["und.attention_mask"].astype(bool)
    assert golden.error(np.asarray(x)[real], want["und.inputs_embeds"][expected]) < golden.PART
    for got, state in zip(states, want["und.hidden_states"], strict=True):
        assert golden.error(np.asarray(got)[real], state[expected]) < golden.PART
    assert golden.error(np.asarray(logits)[real], want["und.logits"][expected]) < golden.PART


@pytest.mark.slow
def test_greedy_answers():
    model, params, _ = golden.model()
    want = golden.arrays("expected")["und.greedy_tokens"]
    tokens, lengths, pixels, start, task = understanding_prompts()
    slots = text_sampling.encode_images(
        model, params, pixels.reshape(-1, *pixels.shape[2:]), chunk=2
    )
    slots = slots.reshape(*start.shape, *slots.shape[1:])
    x = text_sampling.embed_prompt(model, params, tokens, slots, start, task)
    state = text_sampling.prefill(
        model, params, x, lengths, jax.random.split(jax.random.key(0), 2), 24
    )
    eos = chat().eos_id
    zero, one = jnp.float32(0), jnp.float32(1)
    run = jax.jit(
        lambda p, s: text_sampling.decode(model, p, s, zero, one, num_tokens=24, eos_id=eos)
    )
    _, got = run(params, state)
    np.testing.assert_array_equal(got, want)
    texts = [chat().decode(row) for row in np.asarray(got)]
    assert texts == golden.facts("expected")["greedy_text"]


def test_generation_encoder():
    want = golden.arrays("expected")
    z = golden.nhwc(want["enc.z"])
    _, features, t_emb = apply("generation_slot", z, want["enc.timesteps"] / 1000)
    assert golden.error(features, golden.nhwc(want["enc.x_emb"])) < golden.PART
    assert golden.error(t_emb, want["enc.t_emb"]) < golden.PART


def test_generation_decoder():
    model, params, _ = golden.model()
    want = golden.arrays("expected")
    module = convnext.GenDecoder(model.cfg.gen, model.cfg.vae.latent_channels)
    skip = golden.nhwc(want["enc.x_emb"])
    inputs = (golden.nhwc(want["dec.hidden"]), skip, want["enc.t_emb"])
    got = module.apply({"params": params["gen_decoder"]}, *map(jnp.asarray, inputs))
    assert golden.error(got, golden.nhwc(want["dec.v"])) < golden.PART


# The fast suite has the second one, and the answers, through the face (test_pipeline.py).
@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_sampler(index):
    model, params, vae_params = golden.model()
    case, want = golden.facts("expected")["samples"][index], golden.arrays("expected")
    path = golden.nhwc(want[f"sample{index}.trajectory"])
    ids = chat().generation_ids(case["prompt"])
    tokens = np.zeros((case["batch"], len(ids) + 3), np.int32)  # padding must change nothing
    tokens[:, : len(ids)] = ids
    tokens, lengths = jnp.asarray(tokens), jnp.full((case["batch"],), len(ids), jnp.int32)
    noise, weight = jnp.asarray(path[0]), case["cfg_weight"]

    def run(p):
        field = image_sampling.velocity_field(model, p, tokens, lengths, 1)
        states = image_sampling.sample(
            model,
            p,
            tokens,
            lengths,
            noise,
            weight,
            head=1,
            sampler=SamplerConfig(steps=case["steps"], guide_until=float(weight != 1)),
            trajectory=True,
        )
        return jnp.concatenate(field(noise, jnp.float32(0), jnp.float32(0), True)), states

    first, states = jax.jit(run)(params)
    assert golden.error(first, golden.nhwc(want[f"sample{index}.v_first_step"])) < golden.PART
    assert golden.error(states, path) < 5e-6
    assert golden.error(states[-1], path[-1]) < 5e-6
    unscaled = states[-1] / model.cfg.vae.scaling_factor
    pixels = vae.Vae(model.cfg.vae).apply({"params": vae_params}, unscaled, method="decode")
    expected = golden.nhwc(want[f"sample{index}.image"])
    np.testing.assert_allclose(np.clip(pixels, -1, 1), expected, atol=2e-5)


def test_vae():
    model, _, vae_params = golden.model()
    want, module = golden.arrays("expected"), vae.Vae(model.cfg.vae)
    run = lambda method, x: module.apply(  # noqa: E731
        {"params": vae_params}, jnp.asarray(x), method=method
    )
    mean, logvar = run("encode", golden.nhwc(want["vae.pixels"]))
    assert golden.error(mean, golden.nhwc(want["vae.mean"])) < golden.PART
    assert golden.error(logvar, golden.nhwc(want["vae.logvar"])) < golden.PART
    decoded = run("decode", golden.nhwc(want["vae.mean"]))
    assert golden.error(decoded, golden.nhwc(want["vae.decoded_mean"])) < 5e-6


ROWS = pytest.mark.parametrize("in_one_row", [False, True], ids=["a row each", "packed"])


def train_batch():
    """Two understanding rows, then two generation rows, each with one slot."""
    facts, arrays = golden.facts("train"), golden.arrays("train")
    und, gen = facts["understanding"], facts["generation"]
    ids = [e["input_ids"] for e in und["examples"]]
    ids += [e["input_ids"] + [chat().gen_id] * SLOT for e in gen["examples"]]
    size = max(map(len, ids))
    batch = {n: np.zeros((4, size), np.int32) for n in ("tokens", "segment_ids", "positions")}
    batch["target_mask"] = np.zeros((4, size), bool)
    start = []
    for i, row in enumerate(ids):
        batch["tokens"][i, : len(row)] = row
        batch["segment_ids"][i, : len(row)] = 1
        batch["positions"][i, : len(row)] = np.arange(len(row))
        if i < 2:
            labels = np.array(und["examples"][i]["labels"])
            batch["target_mask"][i, : len(row) - 1] = labels[1:] >= 0
        start.append(row.index(chat().image_start_id) if i < 2 else len(row) - SLOT)
    batch["slot_start"] = np.array(start, np.int32)[:, None]
    batch["slot_task"] = np.array([[2], [2], [1], [1]], np.int32)
    batch["images"] = np.stack([picture(n) for n in und["images"] + gen["images"]])[:, None]
    pad = lambda x: np.concatenate([np.zeros_like(x), x])[:, None]  # noqa: E731
    latents, noise = (pad(golden.nhwc(arrays[f"train.{n}"])) for n in ("latents", "noise"))
    draws = {"t": pad(arrays["train.t"]), "noise": noise, "posterior": np.zeros_like(noise)}
    return jax.tree.map(jnp.asarray, (batch, latents, draws))


def packed(batch, latents, draws):
    """The four rows as one packed row of four slots, generation's first."""
    order, at = [2, 3, 0, 1], 0
    size = int(sum((batch["segment_ids"][i] > 0).sum() for i in order)) + 5
    row = {n: np.zeros((1, size), batch[n].dtype) for n in batch if batch[n].shape[1:] != (1,)}
    row.pop("images")
    start = []
    for number, i in enumerate(order, start=1):
        n = int((batch["segment_ids"][i] > 0).sum())
        for name, x in row.items():
            x[0, at : at + n] = batch[name][i, :n]
        row["segment_ids"][0, at : at + n] = number
        start.append(int(batch["slot_start"][i, 0]) + at)
        at += n
    row["slot_start"] = np.array([start], np.int32)
    row["slot_task"] = np.array([[1, 1, 2, 2]], np.int32)
    row["images"] = np.asarray(batch["images"])[order, 0][None]
    first = lambda x: jnp.asarray(x)[None, 2:, 0]  # noqa: E731
    return jax.tree.map(jnp.asarray, row), first(latents), jax.tree.map(first, draws)


@functools.cache
def train_numbers(in_one_row=False):
    model, params, _ = golden.model()
    batch, latents, draws = train_batch()
    if in_one_row:
        batch, latents, draws = packed(batch, latents, draws)
    slots = 2 if in_one_row else 1
    loss = LossConfig()
    mean = latents / model.cfg.vae.scaling_factor  # exact latents, as from a cache
    batch |= {"latent_mean": mean, "latent_logvar": jnp.zeros_like(mean)}

    def total(p):
        sums, extras = losses.loss_sums(
            p,
            None,
            batch,
            draws,
            model=model,
            loss=loss,
            num_gen=slots,
            num_und=slots,
        )
        totals = losses.counts(batch, slots)
        scale = losses.weights(loss, totals, jnp.ones(1), [True])
        terms = {n: sums[n] * scale[n][0] for n in losses.TASKS}
        return sum(terms.values()), (terms, extras["velocity"], totals)

    (value, rest), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    torch = torch_trees.janusflow_to_torch(grads, model.cfg)
    torch |= torch_trees.repa_to_torch(grads["repa_head"])
    return value, rest, torch


def test_train_inputs():
    want, (model, _, vae_params) = golden.arrays("train"), golden.model()
    pixels = golden.nhwc(want["train.pixels"])
    assert golden.error(apply("siglip", pixels), want["train.siglip_target"]) < golden.PART
    batch, latents, _ = train_batch()
    got = encode.encode_latents(vae_params, batch["images"][2:], None, model.cfg, jnp.float32)
    # Not the golden pixels but our uint8 ones: the input's own last digit differs.
    assert golden.error(got, np.asarray(latents[2:])) < 5e-6


@ROWS
def test_losses(in_one_row):
    facts, want = golden.facts("train"), golden.arrays("train")
    value, (terms, velocity, totals), _ = train_numbers(in_one_row)
    velocity = velocity[0] if in_one_row else velocity[2:, 0]
    assert totals["ar"] == sum(e["loss_tokens"] for e in facts["understanding"]["examples"])
    np.testing.assert_allclose(terms["ar"], facts["understanding"]["loss_ar"], rtol=1e-5)
    np.testing.assert_allclose(terms["rf"], facts["generation"]["loss_rf"], rtol=1e-5)
    np.testing.assert_allclose(terms["repa"], facts["generation"]["loss_repa"], rtol=1e-5)
    np.testing.assert_allclose(value, facts["loss_total"], rtol=1e-5)
    assert golden.error(velocity, golden.nhwc(want["train.velocity"])) < golden.GRAD


def test_ar_loss_of_each_example():
    model, params, _ = golden.model()
    batch, _, draws = train_batch()
    for i, case in enumerate(golden.facts("train")["understanding"]["examples"]):
        row = {n: x[i : i + 1] for n, x in batch.items()}
        sums, _ = losses.loss_sums(
            params, None, row, draws, model=model, loss=LossConfig(), num_gen=0, num_und=1
        )
        np.testing.assert_allclose(sums["ar"], case["loss_sum"], rtol=1e-5)


@ROWS
def test_gradient_norm_of_every_parameter(in_one_row):
    _, _, grads = train_numbers(in_one_row)
    wanted = golden.facts("train")["grad_norm"]
    unused = {n for n in wanted if ".attn_pool." in n}
    assert all(not wanted[n] for n in unused)
    assert set(grads) == set(wanted) - unused
    bad = {}
    for name, x in grads.items():
        norm = float(np.linalg.norm(x.astype(np.float64)))
        if not abs(norm - wanted[name]) <= golden.GRAD * wanted[name]:
            bad[name] = (norm, wanted[name])
    assert not bad


@ROWS
def test_whole_gradients(in_one_row):
    _, _, grads = train_numbers(in_one_row)
    for name, want in golden.arrays("train").items():
        if name.startswith("grad."):
            assert golden.error(grads[name[5:]], want) < golden.GRAD, name
