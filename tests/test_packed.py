"""Training on a packed row is training on its samples one by one; what is dropped is the sampler's
unconditional form. On rows as the loader makes them."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, published, runs
from helpers.records import MIX, MODEL, data_config

from janusflow_jax.config import LossConfig, StudentConfig
from janusflow_jax.data import chat_format, rows, samples
from janusflow_jax.models import attention, encode, janusflow
from janusflow_jax.sampling import flow, image as image_sampling
from janusflow_jax.training import losses

KEY = jax.random.key(5)
LOSS = LossConfig(ce_chunk=64)
GEN, UND = 3, 2


@pytest.fixture(scope="module")
def chat():
    return chat_format.ChatFormat.load(golden.TINY / "janusflow")


@pytest.fixture
def made(stores, chat):
    cfg = data_config(sources=MIX, row_len=192, gen_slots=GEN, und_slots=UND, drop_prompt=0.5)
    return rows.Rows(cfg, MODEL, chat)


def starts(row: dict) -> list[tuple[int, int]]:
    """(first, end) of every sample: where positions begin again, also under a dropped prompt."""
    begins = np.flatnonzero((row["positions"] == 0) & (row["segment_ids"] > 0))
    ends = [*begins[1:], int(np.flatnonzero(row["segment_ids"])[-1]) + 1]
    return list(zip(begins.tolist(), ends, strict=True))


def apart(row: dict) -> dict:
    """One row a sample, moved to the row's start; slots keep their numbers, so draws stay."""
    out = []
    for begin, end in starts(row):
        one = {n: np.zeros_like(x) for n, x in row.items()} | {"row": row["row"]}
        for name in ("tokens", "segment_ids", "positions", "target_mask"):
            one[name][: end - begin] = row[name][begin:end]
        mine = (row["slot_start"] >= begin) & (row["slot_start"] < end) & (row["slot_task"] > 0)
        one["images"] = row["images"]
        one["slot_task"] = np.where(mine, row["slot_task"], 0)
        one["slot_start"] = np.where(mine, row["slot_start"] - begin, 0)
        out.append(one)
    return stack(out)


def stack(many: list[dict]) -> dict:
    return {n: jnp.asarray(np.stack([x[n] for x in many])) for n in many[0]}


def sums(params, vae_params, batch):
    draws = losses.draw(KEY, batch, MODEL, LOSS, GEN)
    return losses.loss_sums(
        params,
        vae_params,
        batch,
        draws,
        model=golden.model()[0],
        loss=LOSS,
        num_gen=GEN,
        num_und=UND,
    )


def find(made: rows.Rows, wanted) -> dict:
    return next(row for r in range(200) if wanted(row := made.row(r)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("task", [1, 2])
def test_a_packed_row_trains_as_its_samples_do(made, task):
    """Loss and gradient of every parameter, with text behind the images and a dropped prompt."""

    def wanted(row):
        mine = int((row["slot_task"] == task).sum())
        dropped = ((row["segment_ids"] == 0) & (row["tokens"] != made.chat.pad_id)).any()
        return mine >= 2 and len(starts(row)) > mine and dropped == (task == 1)

    row = find(made, wanted)
    batches = [stack([row]), apart(row)]
    assert len(batches[1]["tokens"]) >= 3
    _, params, vae_params = golden.model()

    def total(params, batch):
        got, _ = sums(params, vae_params, batch)
        return sum(got.values()), got

    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, together), one = grad(params, batches[0])
    (_, alone), each = grad(params, batches[1])
    for name in losses.TASKS:
        assert (together[name] != 0) == (name == "ar" or task == 1)
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-5)
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(each))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-6 * size), one, each
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", [1, 2])
def test_a_compacted_row_has_the_losses_of_one_with_gaps(stores, chat, monkeypatch, task):
    spread, dense = (
        rows.Rows(
            data_config(
                sources=MIX[:2], row_len=192, gen_slots=GEN, und_slots=UND, packing=packing
            ),
            MODEL,
            chat,
        )
        for packing in (1, 2)
    )
    monkeypatch.setattr(dense, "samples", spread.samples)
    _, params, vae_params = golden.model()
    total = jax.jit(lambda batch: sums(params, vae_params, batch)[0])
    for r in range(40):
        a, b = spread.row(r)[0], dense.row(r)[0]
        if task in a["slot_task"] and (a["slot_start"] != b["slot_start"]).any():
            got, want = total(stack([b])), total(stack([a]))
            for name in losses.TASKS:
                np.testing.assert_allclose(got[name], want[name], rtol=1e-5)
            return
    pytest.fail("no row has a gap")


@pytest.mark.parametrize("bos", [True, False], ids=["BOS", "no BOS"])
def test_training_drops_what_guidance_masks(tmp_path, bos):
    shutil.copytree(golden.TINY / "janusflow", tmp_path / "hub")
    published.edit(
        tmp_path / "hub" / "tokenizer_config.json", lambda values: values.update(add_bos_token=bos)
    )
    chat = chat_format.ChatFormat.load(tmp_path / "hub")
    sample = samples.encode(runs.record(0), "generate", "chat", chat, lambda n: 0)
    (prompt,), size = sample.slot_starts, len(sample.tokens)
    masks = image_sampling.slot_masks(jnp.asarray([prompt]), prompt, MODEL.slot_len, chat.head)
    for drop, want in zip((False, True), masks, strict=True):
        row = {
            n: np.zeros(size, int)
            for n in ("tokens", "positions", "target_mask", "source_ids", "segment_ids")
        }
        rows._write(row, sample, 0, 0, 1, drop)
        seen = attention.segment_mask(jnp.asarray(row["segment_ids"])[None])[:, prompt:]
        np.testing.assert_array_equal(seen, want)
        assert (np.asarray(want)[:, :, :prompt].sum() == bos * MODEL.slot_len) == drop


@pytest.mark.slow
def test_a_dropped_prompt_in_a_packed_row_is_the_samplers_unconditional_form(made):
    def wanted(row):
        return (row["slot_task"] == 1).sum() >= 2 and any(
            not row["segment_ids"][b + 1] for b, _ in starts(row)
        )

    row = find(made, wanted)
    model, params, vae_params = golden.model()
    batch = stack([row])
    draws = losses.draw(KEY, batch, MODEL, LOSS, GEN)
    _, extras = jax.jit(sums)(params, vae_params, batch)
    latents = encode.encode_latents(
        vae_params, batch["images"][:, :GEN], draws["posterior"], MODEL, jnp.float32
    )
    z = flow.interpolate(latents, draws["noise"], draws["t"])
    seen = set()
    for slot, (begin, _) in enumerate(starts(row)[: int((row["slot_task"] == 1).sum())]):
        length = row["slot_start"][slot] - begin
        tokens = jnp.asarray(row["tokens"][begin : begin + length])[None]
        field = image_sampling.velocity_field(
            model, params, tokens, jnp.asarray([length]), made.chat.head
        )
        t = draws["t"][0, slot]
        conditional, unconditional = field(z[:, slot], t, t, True)
        dropped = bool(row["segment_ids"][begin + 1] == 0)
        seen.add(dropped)
        want, other = conditional, unconditional
        if dropped:
            want, other = unconditional, conditional
        got = extras["velocity"][:, slot]
        assert golden.error(got, want) < 1e-5 < golden.error(got, other)
    assert True in seen


@pytest.mark.slow
def test_a_teacher_in_a_packed_row_is_the_samplers_guided_form(stores, chat):
    """Of every image in the row, whatever stands beside it."""
    model, params, vae_params = golden.model()
    student = dataclasses.replace(MODEL, student=StudentConfig(steps=2, guidance_scale=3.0))
    cfg = data_config(sources=MIX, row_len=192, gen_slots=GEN, und_slots=UND, drop_prompt=0.0)
    made = rows.Rows(cfg, student, chat)
    row = find(made, lambda row: (row["slot_task"] == 1).sum() >= 2)
    batch = stack([row])
    z = jax.random.normal(KEY, (1, GEN, *MODEL.latent_shape))
    t = jnp.linspace(0.1, 0.9, GEN)[None]
    module = janusflow.JanusFlow(student)
    got = jax.jit(lambda p: losses._guided(module, p, batch, z, t))(params)
    for slot, (begin, _) in enumerate(starts(row)[: int((row["slot_task"] == 1).sum())]):
        length = row["slot_start"][slot] - begin
        tokens = jnp.asarray(row["tokens"][begin : begin + length])[None]
        field = image_sampling.velocity_field(
            model, params, tokens, jnp.asarray([length]), made.chat.head
        )
        want = flow.guide(*field(z[:, slot], t[0, slot], t[0, slot], True), 3.0)
        assert golden.error(got[:, slot], want) < 1e-5
