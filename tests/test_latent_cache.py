"""Cached latents and features: equal to online, whole or not there, and refused where stale."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, runs
from helpers.records import MODEL, Store, data_config, png, source, take

from janusflow_jax import config as c
from janusflow_jax.config import checks as config_checks
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import (
    cache as latent_cache,
    chat_format,
    images,
    loader,
    rows,
    sources,
)
from janusflow_jax.training import encode_cache, flops, losses, step as train_step

ROOT = Path(__file__).parents[1]
LOSS = c.LossConfig(ce_chunk=64)
GEN, UND = 3, 2
SHAPES = ((64, 96), (80, 80), (100, 64))


def record(i: int) -> dict:
    return {"id": str(i), "image": png(i, SHAPES[i % 3]), "captions": [f"a fox number {i}"]}


def talk(i: int) -> dict:
    given = [png(100 + i, SHAPES[i % 3]), png(200 + i)]
    turns = [
        {"role": "user", "content": "<image_placeholder> A?"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "<image_placeholder> B?"},
        {"role": "assistant", "content": "blue"},
    ]
    return {"id": str(i), "images": given, "conversation": turns}


@pytest.fixture
def stores(monkeypatch, tmp_path):
    known = {"a": Store(record(i) for i in range(11)), "b": Store(talk(i) for i in range(5))}
    monkeypatch.setattr(sources, "open_source", lambda path, split: known[Path(path).name])
    monkeypatch.chdir(tmp_path)
    return known


@pytest.fixture(scope="module")
def chat():
    return chat_format.ChatFormat.load(golden.TINY / "janusflow")


@pytest.fixture(scope="module")
def encoders():
    _, params, vae_params = golden.model()
    return encode_cache.Encoders(MODEL, vae_params, params["und_encoder"])


@pytest.fixture(scope="module")
def encode(encoders):
    """One compilation for all caches of this file; the dtype is applied afterwards."""
    manifest = plan(range(0), encoders, records=[])
    return encode_cache.make_encode(encoders, manifest, jax.devices()[:2])


def plan(_, encoders, *, records, **changes) -> latent_cache.Manifest:
    given = {
        "task": "generate",
        "split": "train",
        "crops": 3,
        "seed": 4,
        "dtype": "float32",
        "computed_in": "float32",
        "shard_records": 4,
    }
    return encode_cache.plan(records, encoders, **(given | changes))


def build(records, encoders, encode, folder, **changes) -> encode_cache.Report:
    args = {n: changes.pop(n) for n in ("process", "num_processes") if n in changes}
    manifest = plan(None, encoders, records=records, **changes)
    return encode_cache.build(
        records, folder, manifest, encode, batch=4, workers=2, log=lambda _: None, **args
    )


def mixture(**caches: str) -> tuple[c.SourceConfig, ...]:
    """Source 'a' for generation and 'b' for understanding, with the caches of each task."""
    return (
        source("a", name="gen", weight=0.6, cache=caches.get("generate", "")),
        source("b", name="und", task="understand", weight=0.4, cache=caches.get("understand", "")),
    )


def open_rows(chat, sources, **changes) -> rows.Rows:
    repa = changes.pop("repa", True)
    cfg = data_config(
        sources=sources, row_len=192, gen_slots=GEN, und_slots=UND, drop_prompt=0.0, **changes
    )
    return rows.Rows(cfg, MODEL, chat, repa)


def same_crops(made: rows.Rows, plain: rows.Rows, row: int, stores) -> dict:
    """The row online, with the pixels that the cache chose for it."""
    out, _ = plain.row(row)
    name, numbers = made.records(row)
    if name != "gen":
        return out
    for slot, number in enumerate(numbers):
        crop = int(np.random.default_rng((made.cfg.seed, row, slot, 2)).integers(3))
        picture = images.decode(stores["a"][number]["image"])
        out["images"][slot] = images.for_generation(picture, 64, (4, number, crop))
    return out


def stack(many: list[dict]) -> dict:
    return {n: jnp.asarray(np.stack([x[n] for x in many])) for n in many[0]}


def total(params, vae_params, batch):
    draws = losses.draw(jax.random.key(5), batch, MODEL, LOSS, GEN)
    model = golden.model()[0]
    sums, _ = losses.loss_sums(
        params, vae_params, batch, draws, model=model, loss=LOSS, num_gen=GEN, num_und=UND
    )
    return sum(sums.values()), sums


def both_tasks(made: rows.Rows) -> list[int]:
    """A row of each source."""
    names = [made.records(r)[0] for r in range(12)]
    return [names.index("gen"), names.index("und")]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["latents", "all", "no features"])
def test_cached_equals_online(stores, chat, encoders, encode, what):
    """Same crops: the same losses and the same gradient of every parameter, to rounding."""
    build(stores["a"], encoders, encode, "gen")
    caches = {"generate": "gen"}
    if what == "all":
        only = dataclasses.replace(encoders, vae=None)
        run = encode_cache.make_encode(
            only, plan(None, only, records=[], task="understand", crops=1), jax.devices()[:1]
        )
        build(stores["b"], only, run, "und", task="understand", crops=1)
        caches["understand"] = "und"
    made = open_rows(chat, mixture(**caches), cached_features=what != "no features")
    plain = open_rows(chat, mixture())
    chosen = both_tasks(made)
    cached = stack([made.row(r)[0] for r in chosen])
    online = stack([same_crops(made, plain, r, stores) for r in chosen])
    slots = {"latents": UND, "all": 0, "no features": GEN}[what]
    assert cached["images"].shape[1] == slots and ("repa_target" in cached) == (what[0] != "n")
    _, params, vae_params = golden.model()
    grad = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, a), ga = grad(params, vae_params, online)
    (_, b), gb = grad(params, vae_params, cached)
    assert all(float(abs(x)) > 0.1 for x in a.values())
    for name in losses.TASKS:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5)
    ga, gb = ({k: v for k, v in g.items() if k != "und_encoder"} for g in (ga, gb))
    size = max(float(np.abs(x).max()) for x in jax.tree.leaves(ga))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6 * size), ga, gb)


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """Largest distance of bfloat16 values, in units in the last place."""
    bits = (np.ascontiguousarray(x).view(np.int16).astype(int) for x in (a, b))
    a, b = (np.where(x < 0, -(x & 0x7FFF), x) for x in bits)  # sign and magnitude to an order
    return int(np.abs(a - b).max())


def test_what_is_cached_is_what_the_encoders_give(stores, chat, encoders, encode):
    """Every crop of every image; in bfloat16 the same, rounded once.

    The two caches encode in other batches, so float32 may differ in its last bits, and the rounded
    value by one unit in the last place.
    """
    build(stores["a"], encoders, encode, "exact")
    build(stores["a"], encoders, encode, "rounded", dtype="bfloat16", shard_records=5)
    exact, rounded = latent_cache.Cache("exact"), latent_cache.Cache("rounded")
    pixels, got = [], []
    for i in range(len(stores["a"])):
        encoded = stores["a"][i]["image"]
        for crop in range(3):
            where = () if SHAPES[i % 3][0] == SHAPES[i % 3][1] else (4, i, crop)
            pixels.append(images.for_generation(images.decode(encoded), 64, where or None))
            np.testing.assert_array_equal(exact.pixels(i, crop, images.decode(encoded)), pixels[-1])
            latent = np.stack(exact.latents(i, crop, encoded))
            (feature,) = exact.features(i, crop, [encoded])
            got.append((latent, feature))
            near = np.stack(rounded.latents(i, crop, encoded))
            assert ulps(near, latent.astype(jnp.bfloat16)) <= 1
            near = rounded.features(i, crop, [encoded])[0]
            assert ulps(near, feature.astype(jnp.bfloat16)) <= 1
    assert any((got[0][0] != got[k][0]).any() for k in (1, 2)) and (got[3][0] == got[5][0]).all()
    padded = np.zeros((36, 64, 64, 3), np.uint8)
    padded[: len(pixels)] = pixels
    for i in range(0, len(pixels), 4):
        want = encode(padded[i : i + 4])
        for j, (latent, feature) in enumerate(got[i : i + 4]):
            np.testing.assert_allclose(latent, want["latents"][j], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(feature, want["features"][j], rtol=1e-5, atol=1e-5)


def test_crops_follow_the_row_and_all_of_them_come(stores, chat, encoders, encode):
    build(stores["a"], encoders, encode, "gen")
    one, two = (open_rows(chat, mixture(generate="gen")) for _ in range(2))
    cache, seen = latent_cache.Cache("gen"), set()
    for row in range(40):
        a, b = one.row(row)[0], two.row(row)[0]
        assert all(np.array_equal(a[n], b[n]) for n in a)
        name, numbers = one.records(row)
        for slot, number in enumerate(numbers if name == "gen" else ()):
            encoded = stores["a"][number]["image"]
            crops = [cache.latents(number, k, encoded)[0] for k in range(3)]
            here = [k for k, x in enumerate(crops) if np.array_equal(x, a["latent_mean"][slot])]
            assert here, (row, slot)
            seen.add((number, here[0]))
    assert len({k for n, k in seen if n % 3 != 1}) == 3


@pytest.mark.parametrize("cached", ["online", "latents", "all"])
def test_the_step_runs_only_the_encoders_that_no_cache_stands_for(cached):
    """On the step's jaxpr: whether anything but the output reads the VAE's and SigLIP's
    parameters."""
    cfg = runs.config("x")
    abstract = jax.eval_shape(lambda: runs.fresh_params(cfg.model, jax.random.key(0)))
    state = jax.eval_shape(lambda p, v: train_step.create_state(cfg, p, v), *abstract)
    slots, side, m = cfg.data.num_slots, cfg.model.image_size, cfg.model
    gen, und = cfg.data.gen_slots, cfg.data.und_slots
    names = ("tokens", "segment_ids", "positions", "source_ids")
    shapes = dict.fromkeys(names, ((cfg.data.row_len,), np.int32))
    shapes |= {
        "target_mask": ((cfg.data.row_len,), bool),
        "row": ((), np.uint32),
        "slot_start": ((slots,), np.int32),
        "slot_task": ((slots,), np.int32),
        "images": (({"online": slots, "latents": und, "all": 0}[cached], side, side, 3), np.uint8),
    }
    if cached != "online":
        shapes |= dict.fromkeys(
            ("latent_mean", "latent_logvar"), ((gen, *m.latent_shape), jnp.bfloat16)
        )
        shapes["repa_target"] = ((gen, m.und.num_tokens, m.und.width), jnp.bfloat16)
    if cached == "all":
        shapes["und_features"] = ((und, m.und.num_tokens, m.und.width), jnp.bfloat16)
    batch = {n: jax.ShapeDtypeStruct((2, *s), t) for n, (s, t) in shapes.items()}
    jaxpr = jax.make_jaxpr(train_step.make_train_step(cfg))(state, batch).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    inputs = jax.tree.unflatten(jax.tree.structure((state, batch)), jaxpr.invars)[0]
    computed = {
        name: any(id(v) in read for v in jax.tree.leaves(tree))
        for name, tree in (("vae", inputs["vae"]), ("siglip", inputs["frozen"]["und_encoder"]))
    }
    assert computed == {"vae": cached == "online", "siglip": cached != "all"}


def test_a_sample_costs_what_the_spec_says_with_caches():
    full = c.model_config("1p3b")
    trained = set(c.MODEL_PARTS) - {"und_encoder"}
    batch = {
        "segment_ids": np.ones((1, 657), np.int32),
        "target_mask": np.zeros((1, 657), bool),
        "slot_task": np.array([[1]]),
    }
    cached = batch | {n: np.zeros(1) for n in ("latent_mean", "latent_logvar", "repa_target")}
    costs = [flops.count(b, 1, 0).flops(full, trained, True) / 1e12 for b in (batch, cached)]
    np.testing.assert_allclose(costs, [6.2, 5.2], rtol=0.02)


def files(folder: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def test_a_killed_run_goes_on_and_nothing_is_doubled(stores, encoders, encode):
    """By other processes than it began with; the files are those of one run, byte for byte."""
    whole = build(stores["a"], encoders, encode, "whole")
    assert (whole.shards, whole.skipped_shards) == (3, 0)
    square = sum(a == b for a, b in (SHAPES[i % 3] for i in range(11)))
    assert whole.images == 3 * (11 - square) + square
    calls = []

    def dies(pixels):
        calls.append(0)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        build(stores["a"], encoders, dies, "parts")
    assert 0 < len(list(Path("parts").glob("latents-*"))) < 3
    with pytest.raises(DataError, match="missing, such as latents-0000[12]-of-00003"):
        latent_cache.Cache("parts")
    (Path("parts") / ".shard-00002-left").mkdir()
    reports = [
        build(stores["a"], encoders, encode, "parts", process=i, num_processes=2) for i in (1, 0)
    ]
    assert sum(r.shards for r in reports) < 3 == sum(r.shards + r.skipped_shards for r in reports)
    assert files("parts") == files("whole")


def test_a_bad_picture_or_entry_is_a_bad_sample(stores, chat, encoders, encode):
    stores["a"][2]["image"] = stores["a"][2]["image"][:200]
    report = build(stores["a"], encoders, encode, "gen")
    assert len(report.bad) == 1 and "truncated" in report.bad[0]
    cfg = data_config(
        sources=mixture(generate="gen"),
        row_len=192,
        gen_slots=GEN,
        und_slots=UND,
        max_bad_share=1.0,
    )
    stores["a"][5]["image"] = png(99)  # the data set was changed behind the cache's back
    shard = Path("gen/latents-00001-of-00003.array_record")
    data = bytearray(shard.read_bytes())
    place = data.find(latent_cache.Cache("gen").latents(6, 0, stores["a"][6]["image"])[0].tobytes())
    data[place + 99] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(DataError, match="another image"):
        latent_cache.Cache("gen").latents(5, 1, stores["a"][5]["image"])
    with pytest.raises(DataError, match="damaged"):
        latent_cache.Cache("gen").latents(6, 0, stores["a"][6]["image"])
    manifest = dataclasses.replace(
        latent_cache.read_manifest("gen"), pictures=latent_cache.fingerprint(stores["a"])
    )
    Path("gen/manifest.json").unlink()
    latent_cache.create("gen", manifest)
    made = loader.Loader(cfg, MODEL, chat, 4)
    found = [b for _, report in take(made.batches(0), 12) for b in report.bad]
    assert {b.record for b in found} >= {2, 5} and {b.record for b in found} <= {2, 5, 6}
    reasons = " ".join(b.reason for b in found)
    assert "truncated" in reasons and "another image" in reasons
    row = next(r for r in range(48) if 2 in made.rows.records(r)[1] and found[0].source == "gen")
    if made.rows.records(row)[0] == "gen":
        slot = made.rows.records(row)[1].index(2)
        arrays = made.rows.row(row)[0]
        assert arrays["slot_task"][slot] == 0 and not arrays["latent_mean"][slot].any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_neither_stored_nor_read(
    stores, encoders, encode, monkeypatch, value
):
    def broken(pixels):
        return {kind: x * value for kind, x in encode(pixels).items()}

    with pytest.raises(DataError, match="expected finite"):
        build(stores["a"], encoders, broken, "gen")
    monkeypatch.setattr(encode_cache.trees, "non_finite", lambda *_: [])
    build(stores["a"], encoders, broken, "unchecked")
    with pytest.raises(DataError, match="unchecked latents record 3: expected finite"):
        latent_cache.Cache("unchecked").latents(3, 0, stores["a"][3]["image"])


def problems(cfg: c.TrainConfig) -> str:
    return "\n".join(config_checks.train_problems(cfg))


def test_what_cannot_be_cached_is_refused():
    cfg = runs.config("x")
    gen = cfg.data.sources[1]
    one, two = dataclasses.replace(gen, cache="x"), dataclasses.replace(gen, name="other")
    cfg.data = dataclasses.replace(cfg.data, sources=(one, two))
    said = problems(cfg)
    assert "cache: expected one for all sources of task generate" in said
    # Two splits of one data set are two sources.
    splits = (
        dataclasses.replace(one, name="", split="train"),
        dataclasses.replace(gen, name="", split="more"),
    )
    cfg.data = dataclasses.replace(cfg.data, sources=splits)
    assert "cache: expected one for all sources of task generate" in problems(cfg)
    text = dataclasses.replace(cfg.data.sources[0], task="text", format="plain", cache="x")
    cfg.data = dataclasses.replace(cfg.data, sources=(text,))
    assert "cache: expected none for task text" in problems(cfg)
    source = dataclasses.replace(cfg.data.sources[0], task="understand")
    cfg.data = dataclasses.replace(cfg.data, sources=(source,), gen_slots=0)
    assert not problems(cfg)
    cfg.train_parts = c.MODEL_PARTS
    assert "SigLIP trains" in problems(cfg)
    cfg.model = dataclasses.replace(cfg.model, und_encoder="own", repa_target="siglip")
    assert "model.und_encoder is 'own'" in problems(cfg)


def test_a_cache_of_something_else_is_refused(stores, chat, encoders, encode):
    build(stores["a"], encoders, encode, "gen")
    with pytest.raises(DataError, match="crops: 3 then, 2 now"):
        build(stores["a"], encoders, encode, "gen", crops=2)
    with pytest.raises(DataError, match="expected task 'understand'; got 'generate'"):
        open_rows(chat, mixture(understand="gen"))
    with pytest.raises(DataError, match="cache_latents.py makes one"):
        open_rows(chat, mixture(generate="nowhere"))
    stores["a"][0]["image"] = png(77)
    with pytest.raises(DataError, match="images of this data set"):
        open_rows(chat, mixture(generate="gen"))
    stores["a"][0] = record(0)
    model = c.model_config("test", 128)
    cfg = data_config(sources=mixture(generate="gen"), row_len=320, gen_slots=2, und_slots=2)
    big = chat_format.ChatFormat.load(golden.TINY / "janusflow", num_image_tokens=64)
    with pytest.raises(DataError, match="expected image_size 128; got 64"):
        rows.Rows(cfg, model, big)


def test_a_cache_of_other_encoders_is_refused(stores, chat, encoders, encode):
    build(stores["a"], encoders, encode, "gen")
    made = open_rows(chat, mixture(generate="gen"))
    cfg = runs.config("x")
    ours = encode_cache.digests(cfg, made, {"und_encoder": encoders.siglip}.__getitem__)
    assert list(ours) == ["und_encoder"]
    encode_cache.check(cfg, made, ours, encoders.vae)
    other = jax.tree.map(lambda x: x + 1e-3, encoders.vae)
    with pytest.raises(DataError, match="this run's VAE"):
        encode_cache.check(cfg, made, ours, other)
    decoder = {**encoders.vae, "decoder": other["decoder"]}
    encode_cache.check(cfg, made, ours, decoder)
    changed = {"und_encoder": jax.tree.map(lambda x: x + 1e-3, encoders.siglip)}
    other = encode_cache.digests(cfg, made, changed.__getitem__)
    with pytest.raises(DataError, match="this run's SigLIP"):
        encode_cache.check(cfg, made, other, encoders.vae)
    encode_cache.check(cfg, made, {}, encoders.vae)
    cfg.train_parts = c.MODEL_PARTS
    with pytest.raises(DataError, match="data.cached_features=False"):
        encode_cache.check(cfg, made, ours, encoders.vae)
    encode_cache.check(
        cfg, open_rows(chat, mixture(generate="gen"), cached_features=False), other, encoders.vae
    )
    encode_cache.check(
        cfg, open_rows(chat, mixture(generate="gen"), repa=False), other, encoders.vae
    )
    # ablation C trains a VAE encoder of its own for understanding: generation's stays frozen
    own = runpy.run_path(str(ROOT / "configs" / "ablation.py"))["get_config"]("C,test")
    target = encode_cache.digests(own, made, {"repa_target": encoders.siglip}.__getitem__)
    assert list(target) == ["repa_target"]
    encode_cache.check(own, made, target, encoders.vae)
