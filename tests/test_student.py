"""A student of few steps: its model, its loss, its run, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden, runs
from helpers.published import to_model

import janusflow_jax
from janusflow_jax import config as c, hub, pipeline, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import SamplerConfig, checks
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.models import janusflow
from janusflow_jax.parallel import numerics, trees
from janusflow_jax.sampling import flow, image as image_sampling
from janusflow_jax.serve import engine as engine_lib
from janusflow_jax.serve.requests import EngineSettings, Failed, ImageDone, ImageRequest
from janusflow_jax.training import init as initialization, losses, step as train_step

get_config = runpy.run_path(str(runs.ROOT / "configs" / "distill.py"))["get_config"]
STUDENT = c.StudentConfig(steps=2, guidance_scale=3.0)


def student_config(workdir, **fields) -> c.TrainConfig:
    cfg = runs.tiny_config(workdir, start="teacher", tokenizer="", **fields)
    cfg.model.student = STUDENT
    cfg.loss.repa_weight, cfg.data.drop_prompt = 0.0, 0.0
    cfg.train_parts = tuple(p for p in c.MODEL_PARTS if p[:3] in ("llm", "gen"))
    return cfg


def as_student(model: pipeline.Pipeline) -> pipeline.Pipeline:
    """The same parameters."""
    cfg = dataclasses.replace(model.cfg, student=STUDENT)
    out = pipeline.Pipeline(cfg, {}, model.vae, model.text)
    out.params = model.params
    return out


@pytest.fixture(scope="module")
def student(golden_model):
    return as_student(golden_model)


# --- the model


def test_with_equal_times_a_student_has_its_teachers_bits(golden_model, student):
    tokens, lengths = jnp.ones((2, 32), jnp.int32), jnp.asarray([5, 9])
    z = jax.random.normal(jax.random.key(0), (2, *golden_model.cfg.latent_shape))

    @jax.jit
    def fields(params, t, r):
        prompt = (params, tokens, lengths, 1)
        teacher = image_sampling.velocity_field(golden_model.model, *prompt)(z, t, r, False)[0]
        return teacher, image_sampling.velocity_field(student.model, *prompt)(z, t, r, False)[0]

    t = jnp.float32(0.3)
    teacher, same = fields(golden_model.params, t, t)
    np.testing.assert_array_equal(teacher, same)
    again, other = fields(golden_model.params, t, jnp.float32(0.8))
    np.testing.assert_array_equal(teacher, again)
    assert golden.error(other, teacher) > 1e-3


@pytest.mark.slow
def test_a_student_takes_its_own_steps_without_guidance(student):
    args = {"seed": 4, "output": "latent"}
    got = student.generate("a red fox", **args)
    want = student.generate("a red fox", num_steps=2, guidance_scale=1, **args)
    np.testing.assert_array_equal(got, want)
    path = student.generate("a red fox", seed=4, output="trajectory")
    assert len(path) == 3
    # by hand: the decoder is told 0.5, then 1
    tokens, lengths = jnp.asarray(student.prompt_ids(["a red fox"])), None
    lengths = jnp.asarray([tokens.shape[1]])
    field = image_sampling.velocity_field(student.model, student.params, tokens, lengths, 1)
    for k in range(2):
        t, r = jnp.float32(k / 2), jnp.float32((k + 1) / 2)
        step = path[k] + field(jnp.asarray(path[k]), t, r, False)[0] / 2
        assert golden.error(path[k + 1], step) < 1e-5
    states = []
    student.generate("a red fox", on_step=lambda k, t, z: states.append((t, z)), **args)
    assert [t for t, _ in states] == [0.5, 1.0]
    np.testing.assert_allclose(states[1][1], got, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate("a", order=2), "order: expected 1, because a student.*got 2"),
        (lambda m: m.generate("a", guidance_scale=2.0), r"has learned .*teacher \(3\); got 2.0"),
        (lambda m: m.vary(golden_image(), "a", order=2), "order: expected 1"),
        (lambda m: m.edit(golden_image(), "a", sources="b"), "got a student"),
    ],
)
def test_what_a_student_cannot_do_is_one_sentence(student, call, says):
    with pytest.raises(JanusFlowError, match=says) as error:
        call(student)
    assert "\n" not in str(error.value)


def golden_image():
    return str(golden.TINY / "images" / "0.png")


@pytest.mark.slow
def test_the_engine_serves_a_student_with_the_times_of_every_row(student):
    """Requests of one, two and three steps at once are the pipeline's images."""
    engine = engine_lib.Engine(student, EngineSettings(rows=4, lanes=1, context=64))
    requests = [
        ImageRequest(
            id=str(n),
            client=str(n),
            prompt="a red fox",
            seeds=(n,),
            guidance_scale=1.0,
            sampler=SamplerConfig(steps=n),
        )
        for n in (1, 2, 3)
    ]
    events = [[] for _ in requests]
    with numerics.fixed():
        engine.warm_up()
        for request, own in zip(requests, events, strict=True):
            engine.submit(request, own.append)
        while engine.turn():
            pass
    for request, own in zip(requests, events, strict=True):
        (done,) = (e for e in own if isinstance(e, ImageDone))
        assert not any(isinstance(e, Failed) for e in own)
        n = request.sampler.steps
        want = student.generate("a red fox", num_steps=n, seed=n, output="numpy")
        assert np.abs(done.image.astype(int) - want[0]).max() <= 1
    with pytest.raises(JanusFlowError, match="the student has learned"):
        engine.submit(dataclasses.replace(requests[0], guidance_scale=2.0), events[0].append)


# --- its loss


@pytest.fixture
def batch(store):
    """A model, parameters, and a batch of rows with images to generate."""
    runs.save_start("teacher")
    cfg = student_config("x")
    hub_files = str(runs.HUB)
    data = loader.Loader(cfg.data, cfg.model, chat_format.ChatFormat.load(hub_files), 8, False)
    feed = data.batches(0)
    out = next(feed)[0]
    feed.close()
    return cfg, {n: jnp.asarray(x) for n, x in out.items()}


def rf_loss(cfg, batch):
    model = janusflow.JanusFlow(cfg.model)
    draws = losses.draw(numerics.key(1), batch, cfg.model, cfg.loss, cfg.data.gen_slots)
    sizes = {"num_gen": cfg.data.gen_slots, "num_und": cfg.data.und_slots}

    def loss(params, teacher, vae):
        options = {"model": model, "loss": cfg.loss, "teacher": teacher, **sizes}
        return losses.loss_sums(params, vae, batch, draws, **options)[0]["rf"]

    return loss


@pytest.mark.slow
def test_the_gradient_goes_through_the_students_prediction_alone(batch, monkeypatch):
    cfg, rows = batch
    vae = model_folder.load_model("teacher").vae
    params = model_folder.load_model("teacher").params
    teacher = jax.tree.map(lambda x: 1.1 * x, params)
    loss, targets, real = rf_loss(cfg, rows), [], flow.lagrangian_target

    def recorded(*args):
        targets.append(real(*args))
        return targets[-1]

    def value_and_target(*args):
        value = loss(*args)
        return value, targets.pop()

    monkeypatch.setattr(flow, "lagrangian_target", recorded)
    (value, target), (to_student, to_teacher) = jax.jit(
        jax.value_and_grad(value_and_target, argnums=(0, 1), has_aux=True)
    )(params, teacher, vae)
    monkeypatch.setattr(flow, "lagrangian_target", lambda *args: target)
    fixed, want = jax.jit(jax.value_and_grad(loss))(params, teacher, vae)
    assert value == pytest.approx(float(fixed), rel=1e-5) and value > 0
    assert max(float(np.abs(x).max()) for x in jax.tree.leaves(want["gen_decoder"])) > 1e-4
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), to_student, want
    )
    assert not any(np.abs(x).max() for x in jax.tree.leaves(to_teacher))


# --- its run


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_resumes_bit_for_bit_with_the_teacher_that_it_began_with(store, monkeypatch, rank):
    """Also when the teacher's folder has changed; with adapters the base is the teacher."""
    runs.share_compiled_step(monkeypatch)

    def cfg(workdir, num_steps):
        out = student_config(workdir, num_steps=num_steps)
        if rank:
            out.lora = c.LoraConfig(rank=rank, alpha=8.0)
            out.train_parts = tuple(p for p in out.train_parts if p != "llm")
        return out

    runs.save_start("teacher")
    first = trees.flatten(model_folder.load_model("teacher").params)
    train.train(cfg("whole", 4))
    train.train(cfg("parts", 2))
    shutil.rmtree("teacher")
    runs.save_start("teacher", seed=1)
    train.train(cfg("parts", 4))
    whole, parts = runs.last_arrays("whole"), runs.last_arrays("parts")
    assert whole.keys() == parts.keys()
    for name, x in whole.items():
        np.testing.assert_array_equal(x, parts[name], err_msg=name)
    base = model_folder.load_model("whole/base")
    assert not base.cfg.student.steps
    for name, x in trees.flatten(base.params).items():
        np.testing.assert_array_equal(x, first[name], err_msg=name)
    moved = trees.flatten(model_folder.load_model("whole").params)
    assert (moved["gen_decoder/out_conv/kernel"] != first["gen_decoder/out_conv/kernel"]).any()


@pytest.mark.slow
def test_a_student_is_a_model_as_any_other(store):
    """It loads, is exported and read again, and is still a student."""
    runs.save_start("teacher")
    train.train(student_config("run"))
    model = janusflow_jax.load("run", dtype="float32")
    assert model.cfg.student == STUDENT
    want = model.generate("a fox", seed=5, output="latent")
    hub.export("run", "out", log=lambda _: None)
    assert "generates in 2 steps" in Path("out/README.md").read_text()
    to_model("out", "out/vae", "again")
    assert json.loads(Path("again/model.json").read_text())["config"]["student"]["steps"] == 2
    again = janusflow_jax.load("again", dtype="float32")
    assert again.cfg.student == STUDENT
    np.testing.assert_array_equal(again.generate("a fox", seed=5, output="latent"), want)


@pytest.mark.slow
def test_a_teacher_is_no_student_and_a_student_no_start_of_a_flow(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = student_config("x").model
    runs.save_start("teacher", model=model)
    with pytest.raises(c.ConfigError, match="expected a teacher; got a student of 2 steps"):
        initialization.find_start(student_config("x"))
    with pytest.raises(c.ConfigError, match="model.student.steps: 2 then, 0 now"):
        initialization.find_start(runs.tiny_config("x", start="teacher", tokenizer=""))
    reads = student_config("x")  # reading images changes no step
    reads.data.sources, reads.data.gen_slots = reads.data.sources[:1], 0
    assert reads.data.sources[0].task == "understand"
    assert initialization.find_start(reads).files.keys() >= {"gen_decoder"}


def test_a_run_without_a_student_has_no_teacher():
    cfg = runs.tiny_config("x")
    shapes = janusflow.param_shapes(cfg.model)
    create = lambda cfg: jax.eval_shape(lambda p: train_step.create_state(cfg, p, {}), shapes)  # noqa: E731
    assert "teacher" not in create(cfg)
    state = create(student_config("x"))
    assert trees.flatten(state["teacher"]).keys() == trees.flatten(state["params"]).keys()


@pytest.mark.parametrize("arg", ["", "all", "lora", "256", "emoji", "emoji,all,test", "test"])
def test_the_configs_can_work(arg):
    """What trains the language model also reads images, and watches that."""
    cfg = get_config(arg)
    assert cfg.distills and not checks.train_problems(cfg)
    assert cfg.model.student == c.StudentConfig(steps=2, guidance_scale=2.0)
    replayed = ["understand"] if "all" in arg or "lora" in arg else []
    assert [s.task for s in cfg.data.sources] == ["generate", *replayed]
    assert [s.task for s in cfg.evaluate.sources] == replayed
    assert bool(replayed) == ("llm" in cfg.train_parts or cfg.lora.rank > 0)


@pytest.mark.parametrize(
    ("arg", "says"),
    [("256,emoji", "expected 256 .*or emoji; got both"), ("all,lora", "expected all or lora")],
)
def test_arguments_that_exclude_each_other(arg, says):
    with pytest.raises(c.ConfigError, match=says):
        get_config(arg)


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["test", "lora,test"])
def test_the_test_twin_trains(store, arg):
    cfg = get_config(arg)
    cfg.workdir, cfg.tokenizer, cfg.prompts = "run", str(runs.HUB), cfg.prompts[:1]
    train.train(cfg)
    values = runs.read_metrics("run")
    assert values[-1]["step"] == 4 and all(np.isfinite(x["loss"]) for x in values if "loss" in x)
    assert list(Path("run/samples").glob("sheet_*.png"))


def test_what_no_student_can_be_trained_with():
    cfg = student_config("x")
    assert not checks.train_problems(cfg)
    cfg.loss.repa_weight = 1.0
    cfg.evaluate.sources = (dataclasses.replace(cfg.data.sources[1], name="held"),)
    assert cfg.evaluate.sources[0].task == "generate"
    problems = "\n".join(checks.train_problems(cfg))
    assert "loss.repa_weight: expected 0 because the run trains a student" in problems
    assert "evaluate.sources: expected no task generate because" in problems
