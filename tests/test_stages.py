"""The paper's stages: their values, their mixtures, and their test twins one after another."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import families, golden, parts, records, runs
from helpers.published import to_model

from janusflow_jax import config as c, hub, pipeline, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import (
    checks as config_checks,
    parts as parts_lib,
    stages as config_stages,
)
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.data import mixture as mixture_lib, sources
from janusflow_jax.models import encode, janusflow, vae
from janusflow_jax.parallel import trees
from janusflow_jax.training import losses, run, step as train_step

ROOT = Path(__file__).parents[1]
STAGES = ("adaptation", "pretrain", "sft")


def config(stage: str, arg: str | None = None) -> c.TrainConfig:
    return runpy.run_path(str(ROOT / "configs" / f"{stage}.py"))["get_config"](arg)


@pytest.mark.parametrize("arg", [None, "256", "512", "7b", "online", "test"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_can_work_and_has_its_name(stage, arg):
    cfg = config(stage, arg)
    assert not config_checks.train_problems(cfg)
    assert cfg.name == (f"{stage}-{arg}" if arg else stage)
    hash(cfg)
    if arg == "test":
        return
    assert not cfg.allow_fresh
    assert cfg.model.image_size == (int(arg) if arg in ("256", "512") else 384)
    assert cfg.model.name == ("7b" if arg == "7b" else "1p3b")
    caches = {s.task for s in cfg.data.sources if s.cache}
    assert caches == (set() if arg == "online" else {"generate"})
    assert cfg.data.row_len >= cfg.data.num_slots * cfg.model.slot_len


def test_a_row_must_hold_an_image():
    cfg = config("pretrain")
    cfg.model.image_size = cfg.model.und.image_size = 1024
    assert any(p.startswith("data.row_len: ") for p in config_checks.train_problems(cfg))
    cfg.data.row_len = 8192
    assert not config_checks.train_problems(cfg)
    with pytest.raises(c.ConfigError, match="one image size"):
        config("pretrain", "256,512")


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A model with a language model and an image size that no config has; runs of it as starts."""
    monkeypatch.chdir(tmp_path)
    model = c.model_config("test", 96)
    model.llm = dataclasses.replace(model.llm, width=96, num_kv_heads=2, rope_theta=5e5)
    for start in ("models/start", "runs/adaptation-own", "runs/pretrain-own", "models/mine"):
        Path(start).mkdir(parents=True)
        run = c.TrainConfig(name="x", model=model)
        Path(start, "config.json").write_text(json.dumps(c.to_dict(run)))
    return model


@pytest.mark.parametrize(
    ("stage", "arg", "start"),
    [
        ("adaptation", "own", "models/start"),
        ("pretrain", "own", "runs/adaptation-own"),
        ("sft", "own", "runs/pretrain-own"),
        ("sft", "start=models/mine", "models/mine"),
        ("finetune", "generate,start=models/mine", "models/mine"),
    ],
)
def test_a_run_takes_the_model_of_its_start(other, stage, arg, start):
    cfg = config(stage, arg)
    assert not config_checks.train_problems(cfg)
    assert (cfg.model, cfg.start, cfg.allow_fresh) == (other, start, False)
    assert cfg.data.row_len >= cfg.data.num_slots * other.slot_len > 0
    assert cfg.name.startswith(f"{stage}-{'mine' if 'mine' in start else 'own'}")
    twin = config(stage, arg.replace("own", f"start={start}") + ",test")
    assert not config_checks.train_problems(twin)
    assert (twin.model, twin.start, twin.allow_fresh) == (other, start, False)
    assert twin.num_steps == 4


def test_an_ablation_takes_the_model_of_its_start(other):
    cfg = config("ablation", "C,start=models/mine")
    assert cfg.model == dataclasses.replace(other, und_encoder="own", repa_target="siglip")


def test_a_start_has_all_sizes_or_none(other):
    for arg in ("own,256", "start=models/mine,7b"):
        with pytest.raises(c.ConfigError, match="expected own, whose start has all sizes, or"):
            config("pretrain", arg)
    for arg in ("start=", "begin=x", "start=a,start=b"):
        with pytest.raises(c.ConfigError, match="expected start=DIR, each once"):
            config("pretrain", arg)
    Path("models/mine/config.json").write_text("{}")
    with pytest.raises(c.ConfigError, match="config.json: expected the config of a model"):
        config("pretrain", "start=models/mine")
    with pytest.raises(c.ConfigError, match="nowhere: expected a model folder or a run"):
        config("pretrain", "start=nowhere")


@pytest.mark.parametrize(
    "stage, lr, warmup, steps, rows, frozen, mixture",
    [
        ("adaptation", 1e-4, 2000, 10_000, 512, {"llm", "und_encoder"}, [[50, 50]]),
        ("pretrain", 1e-4, 2000, 390_000, 512, {"und_encoder"}, [[30, 50, 20], [14, 80, 6]]),
        ("sft", 2e-5, 1000, 26_000, 256, set(), [[21, 70, 9]]),
    ],
)
def test_a_stage_has_the_papers_values(stage, lr, warmup, steps, rows, frozen, mixture):
    cfg = config(stage)
    assert (cfg.optim.lr, cfg.optim.warmup_steps, cfg.num_steps) == (lr, warmup, steps)
    assert (cfg.optim.b1, cfg.optim.b2, cfg.optim.weight_decay) == (0.9, 0.95, 0)
    assert (cfg.optim.clip_norm, cfg.optim.ema, cfg.optim.decay_steps) == (1.0, 0.99, 0)
    assert (cfg.batch_rows, cfg.data.row_len, cfg.data.drop_prompt) == (rows, 4096, 0.1)
    assert set(c.MODEL_PARTS) - set(cfg.train_parts) == frozen
    assert [w for _, w in cfg.data.phases()] == mixture
    assert [s.task for s in cfg.data.sources] == ["understand", "generate", "text"][
        : len(mixture[0])
    ]
    assert (cfg.loss.time, cfg.loss.time_shift, cfg.loss.norm) == ("logit_normal", 1.0, "mixture")
    if stage == "pretrain":
        assert cfg.data.change_row == 10_000 * 512
    assert [(s.name, s.split) for s in cfg.evaluate.sources] == [
        (s.name, "heldout") for s in cfg.data.sources
    ]
    slots = cfg.data.num_slots
    assert slots * cfg.model.slot_len <= cfg.data.row_len < (slots + 2) * cfg.model.slot_len


def test_a_change_of_the_mixture_keeps_every_sources_count():
    change, n = 137, 600
    before, _ = mixture_lib.row_shares([30, 50, 20], [0.9, 0.8, 1.0], [False] * 3)
    after, _ = mixture_lib.row_shares([14, 80, 6], [0.9, 0.8, 1.0], [False] * 3)
    ended = mixture_lib.count(change, before)
    assert sum(ended) == change
    seen = [0, 0, 0]
    for row in range(n):
        shares, first = (before, 0) if row < change else (after, change)
        source, k = mixture_lib.interleave(row - first, shares)
        assert k + (ended[source] if first else 0) == seen[source]
        seen[source] += 1


@pytest.mark.parametrize("shares", [[1, 2, 999_997], [1_000_000, 0, 0], [0, 1_000_000, 0]])
def test_count_is_what_interleave_gives(shares):
    got = np.bincount([mixture_lib.interleave(r, shares)[0] for r in range(300)], minlength=3)
    assert mixture_lib.count(300, shares) == got.tolist()


def test_the_shares_of_the_sources_follow_the_mixture():
    cfg = config("pretrain")
    early, late = (train_step.source_shares(cfg, step) for step in (9_999, 10_000))
    np.testing.assert_allclose([early, late], [[0.3, 0.5, 0.2], [0.14, 0.8, 0.06]], rtol=1e-6)


@pytest.mark.parametrize(
    ("norm", "ar", "rf"),
    [
        ("per_task", [1 / 1000, 1 / 1000, 1 / 1000], [1 / 20, 1 / 20, 1 / 20]),
        ("per_sample", [0.5 / 1000, 0.5 / 1000, 0.5 / 1000], [0.5 / 20, 0.5 / 20, 0.5 / 20]),
        ("mixture", [0.3 / 100, 0.5, 0.2 / 900], [0.3, 0.5 / 20, 0.2]),
    ],
)
def test_what_each_source_weighs(norm, ar, rf):
    """Text has 9 times the targets of captions: only `mixture` gives it its share."""
    totals = {"ar": jnp.array([100.0, 0, 900]), "rf": jnp.array([0, 20.0, 0])}
    totals["repa"] = totals["rf"]
    loss = c.LossConfig(norm=norm, repa_weight=0.5)
    got = losses.weights(loss, totals, jnp.array([0.3, 0.5, 0.2]), [False, True, False])
    np.testing.assert_allclose(got["ar"], ar, rtol=1e-6)
    np.testing.assert_allclose(got["rf"], rf, rtol=1e-6)
    np.testing.assert_allclose(got["repa"], 0.5 * np.array(rf), rtol=1e-6)


def test_slots_without_a_source_are_a_warning(capsys):
    """Encoders run for nothing, and weight decay changes parts that nothing trains."""
    cfg = config("pretrain")
    run._warn_of_unused_slots(cfg)
    assert not capsys.readouterr().out
    cfg.data.sources = tuple(s for s in cfg.data.sources if s.task != "generate")
    run._warn_of_unused_slots(cfg)
    assert capsys.readouterr().out.startswith("WARNING: data.gen_slots is 6, but no source")


def test_missing_files_are_an_error_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
    with pytest.raises(c.ConfigError, match="needs files that are missing") as error:
        train.train(config("pretrain"))
    message = str(error.value)
    folders = "data/understand", "data/generate", "data/text", "data/generate/latents: expected a"
    for name in (*folders, "runs/adaptation", "tools/prepare_data.py", "cache_latents", "online"):
        assert name in message
    with pytest.raises(c.ConfigError, match="needs files that are missing") as error:
        train.train(config("pretrain", "online"))
    assert "data/generate/latents" not in str(error.value)
    with pytest.raises(c.ConfigError, match="models/start: .*(?s:.*)convert_checkpoint"):
        train.train(config("adaptation"))


@pytest.fixture
def mixture(monkeypatch, tmp_path):
    """Sources by task: captions, conversations with two pictures, text."""

    def talk(i: int) -> dict:
        images = [runs.record(i + j)["image"] for j in range(2)]
        turns = [
            {"role": "user", "content": "<image_placeholder> Which colour?"},
            {"role": "assistant", "content": runs.record(i)["captions"][0]},
            {"role": "user", "content": "<image_placeholder> And this?"},
            {"role": "assistant", "content": runs.record(i + 1)["captions"][0]},
        ]
        return {"id": str(i), "images": images, "conversation": turns}

    both = [runs.record(i) for i in range(20)] + [talk(i) for i in range(20)]
    known = {
        "understand": records.Store(both),
        "generate": records.Store(runs.record(i) for i in range(30)),
        "text": records.Store({"id": str(i), "text": "a fox " * (i + 1)} for i in range(30)),
    }
    monkeypatch.setattr(sources, "open_source", lambda path, split: known[Path(path).name])
    monkeypatch.chdir(tmp_path)


def twin(name: str, arg: str, **changes: object) -> c.TrainConfig:
    cfg = config(name, arg)
    for part in (cfg.data, cfg.evaluate):
        part.sources = tuple(dataclasses.replace(s, path=s.task) for s in part.sources)
    cfg.tokenizer, cfg.prompts = str(runs.HUB), ()
    for field, value in changes.items():
        setattr(cfg, field, value)
    return cfg


@pytest.mark.slow
def test_the_stages_run_one_after_another_to_a_published_folder(mixture, tmp_path):
    """From a converted checkpoint through three stages, each from the last one's run, and out
    again; what is frozen stays bit for bit, and what comes out is what was trained."""
    start = str(tmp_path / "start")
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", start)
    params = model_folder.load_model(start).params
    assert params is not None and "repa_head" not in params
    for stage in STAGES:
        cfg = twin(stage, "test", start=start, allow_fresh=False)
        start = train.train(cfg)
        lines = runs.read_metrics(start)
        metrics = [x for x in lines if "loss" in x]
        assert [x["step"] for x in metrics] == [1, 2, 3, 4] and metrics[-1]["ok"] == 1
        held = {name for x in lines for name in x if name.startswith("eval/")}
        assert {
            f"eval/{s.task}/loss_{'rf' if s.task == 'generate' else 'ar'}" for s in cfg.data.sources
        } <= held
        for name in ("loss_ar", "loss_rf", "loss_repa"):
            assert any(x[name] for x in metrics), name  # a step of 8 rows may lack a task
        now = model_folder.load_model(start, weights="params")
        assert now.vae is not None and now.params is not None
        for name, before in trees.flatten(params).items():
            frozen = name.split("/")[0] not in cfg.train_parts
            same = np.array_equal(before, trees.flatten(now.params)[name])
            assert same == frozen, (stage, name)
        params = now.params
    hub.export(start, tmp_path / "published", license="mit", log=lambda _: None)
    to_model(tmp_path / "published", tmp_path / "published" / "vae", tmp_path / "again")
    trained, again = model_folder.load_model(start), model_folder.load_model(tmp_path / "again")
    want = trees.flatten({n: x for n, x in (trained.params or {}).items() if n != "repa_head"})
    got = trees.flatten(again.params)
    assert want.keys() == got.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    model = pipeline.load(str(tmp_path / "again"))
    assert model.generate("a red fox", num_steps=2, output="numpy").shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_a_start_of_open_parts_trains_and_is_published_in_parts(mixture, tmp_path):
    start = parts.open_start(tmp_path / "parts")
    cfg = twin("adaptation", f"start={start},test", tokenizer="")
    run = train.train(cfg)
    metrics = [x for x in runs.read_metrics(run) if "loss" in x]
    assert [x["step"] for x in metrics] == [1, 2, 3, 4] and all(x["ok"] for x in metrics)
    before, trained = (model_folder.load_model(x, weights="params") for x in (start, run))
    assert trained.cfg == before.cfg and len(trained.cfg.vae.std) == 32
    moved = {
        name.split("/")[0]
        for name, x in trees.flatten(trained.params).items()
        if not np.array_equal(x, trees.flatten(before.params)[name])
    }
    assert moved == {*cfg.train_parts} & {*trained.params}
    hub.export(run, tmp_path / "published", weights="params", log=lambda _: None)
    assert (tmp_path / "published" / "llm" / "config.json").is_file()
    to_model(tmp_path / "published", tmp_path / "published" / "vae", tmp_path / "again")
    options = {"num_steps": 2, "output": "numpy"}
    images = [
        pipeline.load(model, weights="params").generate("a red apple", **options)
        for model in (str(run), str(tmp_path / "again"))
    ]
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.FORMS)
def test_a_language_model_of_every_family_trains(mixture, tmp_path, monkeypatch, name):
    """Its folder becomes a start, which trains for two steps in the twin of pre-training, all of it
    and by adapters, generates and answers in int8, and is published and read back bit for bit."""
    tensors, values, _, _ = families.read(name)
    llm = families.write(tmp_path / "llm", tensors, values)
    tower, autoencoder = ROOT / "tests/data/torch_parts/siglip", golden.TINY / "vae"
    start = str(tmp_path / "start")
    hub.assemble(llm, tower, autoencoder, start, gen_width=32, log=lambda _: None)
    begun = trees.flatten(model_folder.load_model(start).params)
    short = {"evaluate": c.EvalConfig(), "num_steps": 2, "tokenizer": ""}
    adapters = {"lora": c.LoraConfig(rank=2), "train_parts": config_stages.ADAPTED}
    workdir = ""
    for changes in ({}, adapters):
        folder = str(tmp_path / f"run-{len(changes)}")
        cfg = twin("pretrain", f"start={start},test", **short, **changes, workdir=folder)
        workdir = train.train(cfg)
        assert [(x["step"], x["ok"]) for x in runs.read_metrics(workdir)] == [(1, 1), (2, 1)]
        now = model_folder.load_model(workdir, weights="params")
        for path, x in trees.flatten(now.params).items():
            adapted = any(path.endswith(f"/{t}/kernel") for t in c.LORA_TARGETS)
            moves = not path.startswith("und_encoder") and (not changes or adapted)
            if path in begun and path.startswith(("llm/layers", "und_encoder")):
                assert np.array_equal(x, begun[path]) != moves, path
    model = pipeline.load(workdir, int8=True)
    assert isinstance(model.chat("What?", [runs.record(0)["image"]], max_new_tokens=3), str)
    assert model.generate("a fox", num_steps=1, output="latent").shape == (1, 4, 4, 4)
    hub.export(workdir, tmp_path / "published", log=lambda _: None)
    to_model(tmp_path / "published", tmp_path / "published" / "vae", tmp_path / "again")
    trained, again = (model_folder.load_model(path) for path in (workdir, tmp_path / "again"))
    assert again.cfg.llm == trained.cfg.llm
    got = trees.flatten(again.params)
    for path, x in trees.flatten(trained.params).items():
        if not path.startswith("repa_head"):
            np.testing.assert_array_equal(got[path], x, err_msg=path)


@pytest.mark.parametrize("letter", "ABCDEF")
def test_an_ablation_has_the_papers_values(letter):
    cfg = config("ablation", letter)
    assert not config_checks.train_problems(cfg) and cfg.name == f"ablation-{letter}"
    assert cfg.model.image_size == 256 and cfg.loss.norm == "mixture"
    assert (cfg.optim.lr, cfg.optim.warmup_steps, cfg.batch_rows) == (1e-4, 2000, 512)
    steps, change = {"D": (13_000, 5_000), "E": (37_000, 0)}.get(letter, (50_000, 10_000))
    assert (cfg.num_steps, cfg.data.change_row) == (steps, change * 512)
    tasks = {"D": ["understand", "text"], "E": ["generate"]}
    assert [s.task for s in cfg.data.sources] == tasks.get(
        letter, ["understand", "generate", "text"]
    )
    weights = {"D": [[30, 20], [14, 6]], "E": [[1]]}
    assert [w for _, w in cfg.data.phases()] == weights.get(letter, [[30, 50, 20], [14, 80, 6]])
    trained = {p.split("/")[0] for p in parts_lib.trained_paths(cfg)}
    assert ("repa_head" in trained) == (letter not in "AD")
    assert ("und_encoder" in trained) == (letter == "C") and "repa_target" not in trained
    assert ("gen_decoder" in trained) == (letter != "D")
    assert ("und_aligner" in trained) == (letter != "E")
    assert ("llm" in parts_lib.trained_paths(cfg)) == (letter != "E")
    shapes = janusflow.param_shapes(cfg.model)
    assert ("und_encoder" in shapes) == (letter != "B")
    assert ("repa_target" in shapes) == (letter in "BC")
    if letter in "BC":
        assert shapes["und_aligner"]["kernel"].shape == (768, 2048)
    with pytest.raises(c.ConfigError, match="one letter"):
        config("ablation", "A,B")


@pytest.mark.parametrize("letter", "ABCDEF")
def test_the_quick_start_has_the_letters_too(letter):
    for cfg in (config("emoji", letter), config("emoji", f"{letter},test")):
        assert not config_checks.train_problems(cfg)
        paper = {p.split("/")[0] for p in parts_lib.trained_paths(config("ablation", letter))}
        assert {p.split("/")[0] for p in parts_lib.trained_paths(cfg)} == paper
        assert cfg.model.parts == config("ablation", letter).model.parts
    cfg, whole = config("emoji", letter), config("emoji")
    wanted = {"D": ["understand"], "E": ["generate"]}.get(letter, ["understand", "generate"])
    assert [s.task for s in cfg.data.sources] == wanted
    assert (letter in "DE") == (cfg.num_steps < whole.num_steps)
    assert config("emoji", "D").num_steps + config("emoji", "E").num_steps == whole.num_steps


@pytest.mark.slow
@pytest.mark.parametrize("letter", "BCE")  # F is the stages' own; A and D only lack terms of it
def test_an_ablation_trains(mixture, tmp_path, letter):
    """From one start, all by the same code; what it uses moves and what it does not stays."""
    start = str(tmp_path / "start")
    to_model(golden.TINY / "janusflow", golden.TINY / "vae", start)
    changes = {"evaluate": c.EvalConfig(), "num_steps": 3}
    cfg = twin("ablation", f"{letter},test", start=start, allow_fresh=False, **changes)
    workdir = train.train(cfg)
    metrics = runs.read_metrics(workdir)
    assert [(x["step"], x["ok"]) for x in metrics] == [(1, 1), (2, 1), (3, 1)]
    idle = {"E": {"ar"}}.get(letter, set())
    for name in ("ar", "rf", "repa"):
        assert any(x[f"loss_{name}"] for x in metrics) == (name not in idle), name
    begun = model_folder.load_model(start)
    now = model_folder.load_model(workdir, weights="params")
    before = {**(begun.params or {}), "repa_target": (begun.params or {})["und_encoder"]}
    if letter == "C":
        before["und_encoder"] = {"vae": begun.vae}
    after, trained = trees.flatten(now.params), parts_lib.trained_paths(cfg)
    compared = 0
    for name, x in trees.flatten(before).items():
        if name not in after or x.shape != after[name].shape:
            continue  # a part that this letter has not, or has fresh
        same, compared = np.array_equal(x, after[name]), compared + 1
        moves = any(trees.below(name, path) for path in trained)
        assert same != moves, name
    assert compared > 80
    model = pipeline.load(workdir)
    if letter == "E":
        assert model.generate("a fox", num_steps=1, output="latent").shape == (1, 8, 8, 4)
    else:  # other encoders for understanding; generation is that of every model
        answer = model.chat("What?", [runs.record(0)["image"]], max_new_tokens=3)
        assert isinstance(answer, str)
    if letter in "BC":
        with pytest.raises(ConvertError, match="und_encoder"):
            hub.export(workdir, tmp_path / "out")


@pytest.mark.slow
def test_latents_are_encoded_clean_at_t_1():
    """B's understanding slot is what generation makes of the same latent at t = 1."""
    cfg = dataclasses.replace(c.model_config("test"), und_encoder="shared", repa_target="siglip")
    model = janusflow.JanusFlow(cfg)
    params = jax.jit(janusflow.init_params, static_argnums=0)(cfg, jax.random.key(0))
    film = params["gen_encoder"]["block_0"]["film"]
    film["kernel"] = film["kernel"] + 0.1  # fresh, it ignores time
    z = jax.random.normal(jax.random.key(1), (2, *cfg.latent_shape))
    run = lambda method, *args: model.apply({"params": params}, *args, method=method)  # noqa: E731
    slot = run("understanding_slot", z)
    _, at_1, _ = run("generation_slot", z, jnp.ones(2, jnp.float32))
    _, at_0, _ = run("generation_slot", z, jnp.zeros(2, jnp.float32))
    want = at_1.reshape(2, -1, cfg.gen.width) @ params["und_aligner"]["kernel"]
    np.testing.assert_allclose(slot[:, 1:], want, atol=1e-5)
    np.testing.assert_allclose(slot[0, 0], params["und_begin"]["embedding"])
    assert np.abs(np.asarray(at_1 - at_0)).max() > 0.01


@pytest.mark.slow
def test_small_pictures_taken_at_once_train_as_one_by_one(monkeypatch):
    cfg = dataclasses.replace(c.model_config("test"), und_encoder="own", repa_target="siglip")
    model = janusflow.JanusFlow(cfg)
    params = jax.jit(janusflow.init_params, static_argnums=0)(cfg, jax.random.key(0))
    vae_params = vae.init_params(cfg.vae, jax.random.key(1))
    batch = {
        "tokens": jnp.arange(6, 66)[None],
        "positions": jnp.arange(60)[None],
        "segment_ids": jnp.ones((1, 60), jnp.int32),
        "target_mask": jnp.arange(60)[None] > 50,
        "slot_task": jnp.full((1, 2), 2),
        "slot_start": jnp.array([[2, 25]]),
        "images": jax.random.randint(jax.random.key(2), (1, 2, 64, 64, 3), 0, 256).astype("uint8"),
    }

    slots = []
    over_slots = encode.over_slots
    monkeypatch.setattr(
        encode, "over_slots", lambda fn, x, n=1: slots.append(n) or over_slots(fn, x, n)
    )

    def gradient():  # not the VAE's own: one by one that is what is slow
        read = lambda aligner: losses.loss_sums(  # noqa: E731
            {**params, "und_aligner": aligner},
            vae_params,
            batch,
            {},
            model=model,
            loss=c.LossConfig(),
            num_gen=0,
            num_und=2,
        )[0]["ar"]
        return jax.device_get(jax.jit(jax.grad(read))(params["und_aligner"]))

    together = gradient()
    monkeypatch.setattr(encode, "PIXELS_AT_ONCE", 0)
    alone = gradient()
    assert slots == [2, 1]
    assert max(np.abs(x).max() for x in jax.tree.leaves(alone)) > 0
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-7)


def test_slots_at_once_keep_a_device_small():
    assert encode.slots_at_once(8, 2, 16) == 2
    assert encode.slots_at_once(8, 4, 16) == 2
    assert encode.slots_at_once(8, 2, 15) == 1
    assert encode.slots_at_once(1, 6, 0) == 1
    own = encode.PIXELS_AT_ONCE // 384**2  # a VAE at full size: one slot of every row
    assert encode.slots_at_once(1, 6, own) == 1


def test_the_parts_of_adaptation_are_all_but_the_pretrained():
    assert set(config_stages.ADAPTED) == set(c.MODEL_PARTS) - {"llm", "und_encoder"}
