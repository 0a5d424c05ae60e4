"""Held-out losses in training: equal for equal parameters, on any mesh; and the check of rises."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import (
    HUB,
    fresh_params,
    read_metrics,
    record,
    share_compiled_step,
    tiny_config as config,
)

from janusflow_jax import config as c, evaluate, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import checks as config_checks, flags as config_flags
from janusflow_jax.config.errors import DivergedError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.eval import losses as eval_losses
from janusflow_jax.parallel import sharding
from janusflow_jax.training import (
    heldout,
    init as initialization,
    losses,
    metrics,
    step as train_step,
)


def evaluated(workdir="x", **changes) -> c.TrainConfig:
    cfg = config(workdir, num_steps=4)
    held = tuple(dataclasses.replace(s, name=f"held_{s.task}") for s in cfg.data.sources)
    cfg.evaluate = dataclasses.replace(c.EvalConfig(sources=held, rows=5, seed=3), **changes)
    return cfg


def state_of(cfg, mesh, shift=0.0):
    params, vae_params = jax.device_get(fresh_params(cfg.model, jax.random.key(0)))
    params = jax.tree.map(lambda x: x + np.float32(0.01), params)
    state = initialization.create_state(cfg, mesh, params, vae_params)
    return {**state, "ema": jax.tree.map(lambda x: x + np.float32(shift), state["ema"])}


def measure(cfg, devices=1, shift=0.01):
    mesh = sharding.make_mesh(c.MeshConfig(fsdp=2 if devices > 1 else 1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        held = heldout.Heldout(cfg, mesh, chat_format.ChatFormat.load(str(HUB)))
        return held.measure(state_of(cfg, mesh, shift))


@pytest.mark.slow
def test_the_same_parameters_give_the_same_numbers(store):
    cfg = evaluated()
    one = measure(cfg)
    assert one == measure(cfg) and {n.split("/")[0] for n in one} == {"eval", "eval_ema"}
    assert {n for n in one if n.startswith("eval/") and n.count("/") == 2} == {
        "eval/held_understand/loss_ar",
        "eval/held_generate/loss_rf",
    }
    for name in ("held_understand/loss_ar", "held_generate/loss_rf"):
        assert one[f"eval/{name}"] != one[f"eval_ema/{name}"]
    still = measure(cfg, shift=0.0)
    assert all(still[f"eval_ema/{n[5:]}"] == x for n, x in still.items() if n.startswith("eval/"))
    # other rows and noise are other numbers; the run's own seed is none of its business
    assert measure(dataclasses.replace(cfg, seed=9)) == one
    other = dataclasses.replace(cfg, evaluate=dataclasses.replace(cfg.evaluate, seed=4))
    assert measure(other) != one
    # 5 rows on 8 devices: three of the batch are empty and count for nothing
    many = measure(cfg, devices=8)
    assert many.keys() == one.keys()
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=2e-5, err_msg=name)


def test_all_processes_stop_although_one_cannot_write():
    """The first process writes; the others must not see a rise that it has missed."""

    class FullDisk(metrics.Writer):
        def __init__(self):
            pass

        def write(self, *_):
            raise OSError(28, "No space left on device")

    cfg = evaluated(rows=8)
    cfg.evaluate.stop_on_rise, cfg.evaluate.max_rise = True, 0.1
    held = object.__new__(heldout.Heldout)
    held._cfg, held._sources = cfg, {}
    held._rises = heldout.RiseCheck(0.1, {"a": {"name": "a"}}, {})
    for step, loss in ((0, 1.0), (5, 2.0)):
        with pytest.raises(OSError, match="No space left"):
            held.record(step, {"eval/a/loss_ar": loss}, FullDisk())
    assert held.must_stop


@pytest.mark.slow
def test_it_is_the_training_loss_of_those_rows(store):
    """Against `loss_sums` on rows of the training loader, made to hold the same."""
    cfg = evaluated(rows=8)
    source = dataclasses.replace(cfg.evaluate.sources[1], weight=1.0)
    assert source.task == "generate"
    data = dataclasses.replace(cfg.data, sources=(source,), und_slots=0, drop_prompt=0.0, seed=3)
    chat = chat_format.ChatFormat.load(str(HUB))
    batches = loader.Loader(data, cfg.model, chat, 6, repa=False).batches(0)
    batch = jax.tree.map(jnp.asarray, next(batches)[0])
    batches.close()
    bins = len(loader.Loader(data, cfg.model, chat, 6, repa=False).rows.sources[0].bins)
    assert bins == 6 or bins > 8, "the test wants whole batches"
    if bins > 8:
        cfg.evaluate.rows = 6
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = state_of(cfg, mesh)
        loss = dataclasses.replace(cfg.loss, repa_weight=0.0, vae_mode=True)
        draws = losses.draw(jax.random.key(3), batch, cfg.model, loss, data.gen_slots)
        sums, _ = losses.loss_sums(
            {**state["frozen"], **state["params"]},
            state["vae"],
            batch,
            draws,
            model=train_step.make_model(cfg),
            loss=loss,
            num_gen=data.gen_slots,
            num_und=0,
        )
        want = float(sums["rf"] / losses.counts(batch, data.gen_slots)["rf"][0])
    np.testing.assert_allclose(measure(cfg)["eval/held_generate/loss_rf"], want, rtol=1e-5)


@pytest.mark.slow
def test_a_run_measures_at_its_start_on_schedule_and_at_its_end(store, capsys, monkeypatch):
    share_compiled_step(monkeypatch)
    cfg = evaluated("whole", every_steps=2)
    train.train(cfg)
    held = [x for x in read_metrics("whole") if "eval/held_generate/loss_rf" in x]
    assert [x["step"] for x in held] == [0, 2, 4]
    assert held[0]["eval/held_understand/loss_ar"] == held[0]["eval_ema/held_understand/loss_ar"]
    assert held[-1]["eval/held_understand/loss_ar"] < held[0]["eval/held_understand/loss_ar"]
    assert "step 4: held-out (EMA): held_understand ar" in capsys.readouterr().out
    # in two parts: nothing is measured twice, nothing is missing, all numbers are the same
    parts = evaluated("parts", every_steps=2)
    parts.num_steps = 2
    train.train(parts)
    train.train(evaluated("parts", every_steps=2))
    again = [x for x in read_metrics("parts") if "eval/held_generate/loss_rf" in x]
    strip = lambda found: [{k: v for k, v in x.items() if k != "time"} for x in found]  # noqa: E731
    assert strip(again) == strip(held)


@pytest.mark.slow
def test_a_model_measured_afterwards_has_the_runs_last_losses(store, tmp_path, monkeypatch):
    cfg = evaluated("whole")
    train.train(cfg)
    last = [
        x for x in read_metrics("whole") if x["step"] == 4 and "eval/held_generate/loss_rf" in x
    ][-1]
    for weights, kind in (("params", "eval"), ("ema", "eval_ema")):
        found = eval_losses.measure("whole", cfg, weights)
        assert {f"{kind}/{n}" for n in found} == {n for n in last if n.startswith(f"{kind}/")}
        for name, value in found.items():
            assert value == pytest.approx(last[f"{kind}/{name}"], rel=1e-5), name
    # as a command, and the same again to the last digit
    monkeypatch.setattr(evaluate.config_flags, "read_config", lambda path: cfg)
    evaluate.main("--model whole --suite losses --config x.py --out losses.json".split())
    assert json.loads(open("losses.json").read())["losses"] == found


def test_a_config_without_sources_and_one_that_is_none(monkeypatch):
    # ml_collections executes every config file in one module: names of the last one remain.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    with pytest.raises(c.ConfigError, match=r"evaluate\.sources"):
        eval_losses.measure("x", config("x"))
    for wrong in ("nothing.py", __file__):
        with pytest.raises(c.ConfigError, match="expected a file such as"):
            config_flags.read_config(wrong)
    with pytest.raises(ValueError, match="expected --config"):
        evaluate.main("--model x --suite losses".split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import os\ndef get_config(:\n", "SyntaxError: .*line 2"),
        ("x = 1\ny = nothing\n", r"\(line 2: NameError"),
        ("def get_config(arg):\n    return {}[arg]\n", r"\(line 2: KeyError: 'F'"),
        ("def get_config():\n    return 1\n", "TypeError"),
        ("get_config = lambda arg: None\n", "a TrainConfig; got NoneType"),
        (
            "from janusflow_jax.config import ConfigError\n"
            "def get_config(arg):\n    raise ConfigError('own words')\n",
            "^own words$",
        ),
    ],
)
def test_a_config_file_that_raises_is_one_message(text, says, tmp_path):
    file = tmp_path / "x.py"
    file.write_text(text)
    with pytest.raises(c.ConfigError, match=says):
        config_flags.read_config(f"{file}:F")


@pytest.mark.slow
def test_a_rise_stops_the_run_until_its_config_allows_it(store, capsys, monkeypatch):
    share_compiled_step(monkeypatch)

    def hurt(**changes):
        cfg = evaluated("hurt", every_steps=1, max_rise=1e-6, **changes)
        # far too fast
        cfg.optim.lr, cfg.optim.warmup_steps, cfg.optim.ema, cfg.num_steps = 0.1, 1, 0.0, 50
        return cfg

    with pytest.raises(DivergedError, match=r"held_generate/loss_rf: \d") as ended:
        train.train(hurt(stop_on_rise=True))
    out = capsys.readouterr().out
    assert "WARNING: step" in out and "held-out losses have risen" in out
    assert re.search(r"held_generate \(generate\), split train: records 30, .* rows 5\n", out)
    step = read_metrics("hurt")[-1]["step"]
    assert model_folder.committed_steps("hurt")[-1] == step < 48  # saved
    # the same command: the same end, at once
    with pytest.raises(DivergedError, match="risen too far") as again:
        train.train(hurt(stop_on_rise=True))
    assert "so begin a new run: --config.workdir=NEW\n" in str(ended.value)
    assert str(again.value) == str(ended.value) and read_metrics("hurt")[-1]["step"] == step
    # what the message says lets it go on
    for number, lets in ((1, {"stop_on_rise": False}), (2, {"stop_on_rise": True})):
        cfg = dataclasses.replace(hurt(**lets), num_steps=step + number)
        if number == 2:
            cfg.evaluate.max_rise = 1e9
        train.train(cfg)
        assert read_metrics("hurt")[-1]["step"] == step + number


@pytest.mark.slow
def test_a_source_added_late_counts_from_its_first_measurement(store, capsys, monkeypatch):
    share_compiled_step(monkeypatch)
    plain = config("late", num_steps=2)
    train.train(plain)
    cfg = evaluated("late", every_steps=1, max_rise=0.5)
    cfg.num_steps = 3
    train.train(cfg)
    assert "held-out held_generate was not measured before: its rise counts from step 3" in (
        capsys.readouterr().out
    )
    cfg = evaluated("late", every_steps=1, max_rise=0.5)
    cfg.evaluate.rows = 4
    train.train(cfg)
    text = capsys.readouterr().out
    assert "is measured on other rows than before (rows: 5 then, 4 now" in text
    saved = json.loads(Path("late/checkpoints/4/run.json").read_text())["heldout"]
    assert set(saved["steps"].values()) == {4} and saved["rows"]["held_generate"]["rows"] == 4


def test_rows_of_a_task_do_not_depend_on_whether_it_is_replayed():
    cfg = evaluated()
    for gen, und in ((5, 0), (0, 5), (5, 5)):
        cfg.data.gen_slots, cfg.data.und_slots = gen, und
        assert heldout.slots_of(cfg, "generate") == (5, 0)
        assert heldout.slots_of(cfg, "understand") == (0, 5)
    cfg.data.gen_slots, cfg.data.und_slots = 5, 2
    assert heldout.slots_of(cfg, "understand") == (0, 2)


def test_a_source_with_few_images_gets_a_warning(store):
    del store[9:]
    cfg = evaluated(rows=1)
    cfg.evaluate.sources = tuple(s for s in cfg.evaluate.sources if s.task == "generate")
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    chat = chat_format.ChatFormat.load(str(HUB))
    text = heldout.Heldout(cfg, mesh, chat).summary()
    slots = cfg.data.gen_slots
    assert f"split train: records 9, samples {slots}, images {slots}, rows 1" in text
    assert f"expected 16 or more images; got {slots}: raise --config.evaluate.rows" in text
    cfg.evaluate.rows = 99
    text = heldout.Heldout(cfg, mesh, chat).summary()
    assert "got 9: prepare the data with a larger --heldout" in text
    store.extend(record(i) for i in range(9, 16))
    cfg.evaluate.sources = (dataclasses.replace(cfg.evaluate.sources[0], path="other"),)
    assert "WARNING" not in heldout.Heldout(cfg, mesh, chat).summary()


def test_problems_of_the_evaluate_config_are_listed():
    cfg = evaluated()
    assert not config_checks.train_problems(cfg)
    same = cfg.evaluate.sources[0]
    cfg.evaluate = c.EvalConfig(sources=(same, same), rows=0, every_steps=-1, max_rise=-0.5)
    text = "\n".join(config_checks.train_problems(cfg))
    for problem in (
        "evaluate.rows",
        "evaluate.every_steps",
        "evaluate.max_rise",
        "different names",
    ):
        assert problem in text


# The check that losses do not rise

ROWS = {"a": {"path": "data/a", "rows": 4}, "b": {"path": "data/b", "rows": 4}}
A, B = "eval/a/loss_ar", "eval/b/loss_rf"
NAN = math.nan


def rise_check(rows=ROWS, saved=None, max_rise=0.1) -> heldout.RiseCheck:
    return heldout.RiseCheck(max_rise, rows, saved or {})


def resumed(old: heldout.RiseCheck, rows=ROWS, max_rise=0.1) -> heldout.RiseCheck:
    """Through a file of strict JSON."""
    return rise_check(rows, json.loads(json.dumps(old.to_json(), allow_nan=False)), max_rise)


def risen(first, newest, max_rise=0.1, step=0) -> list[str]:
    check = rise_check(max_rise=max_rise)
    check.update(step, first)
    check.update(step + 1, newest)
    return check.risen()


def test_rises():
    first = {"eval/a/loss_ar": 1.0, "eval_ema/a/loss_ar": 1.0, "eval/b/loss_rf": 2.0}
    newest = {"eval/a/loss_ar": 9.0, "eval_ema/a/loss_ar": 1.05, "eval/b/loss_rf": 2.5}
    assert risen(first, newest, 0.3) == []
    assert risen(first, newest, 0.1) == [
        "eval/b/loss_rf: 2.0000 at step 0, now 2.5000 (evaluate.max_rise 10%)"
    ]
    assert len(risen(first, newest, 0.01)) == 2  # of the average, not of the raw loss beside it
    assert risen({"eval/b/loss_rf/t0": 1.0}, {"eval/b/loss_rf/t0": 5.0}) == []
    (line,) = risen({A: 1.0}, {A: 2.0}, step=4)
    assert "1.0000 at step 4, now 2.0000" in line
    (line,) = risen({A: 0.0}, {A: 2.0})
    assert "0.0000 at step 0, now 2.0000" in line


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_non_finite_loss_has_risen(value):
    assert risen({A: 1.0}, {A: value}) == [f"{A}: 1.0000 at step 0, now {value}"]
    ema = A.replace("eval/", "eval_ema/")
    assert len(risen({A: 1.0, ema: 1.0}, {A: value, ema: value})) == 1
    # An average follows later: until then the raw loss shows it.
    assert len(risen({A: 1.0, ema: 1.0}, {A: value, ema: 1.0})) == 1
    check = rise_check()
    (line,) = check.update(0, {A: value, B: 1.0})  # also in the first measurement
    assert f"{A}: now {value}" in line
    check = resumed(check)  # it is compared with its first finite value
    (line,) = check.update(1, {A: 2.0, B: 1.0})
    assert "its rise counts from step 1" in line and check.risen() == []
    assert "2.0000 at step 1, now 9.0000" in check.update(2, {A: 9.0, B: 1.0})[0]


def test_a_loss_counts_from_its_first_measurement():
    check = rise_check({"a": ROWS["a"]})
    assert check.update(0, {A: 1.0}) == []
    check = resumed(check)  # b is added
    (line,) = check.update(4, {A: 1.0, B: 1.0})
    assert "held-out b was not measured before" in line and "step 4" in line
    (line,) = check.update(5, {A: 1.05, B: 2.0})
    assert "eval/b/loss_rf: 1.0000 at step 4, now 2.0000" in line and "eval/a" not in line
    late = rise_check()
    assert len(late.update(4, {A: 1.0, B: 1.0})) == 2  # the whole run began without
    assert "at step 4" in late.update(5, {A: 1.0, B: 2.0})[0]


def test_other_rows_begin_anew():
    check = rise_check()
    check.update(0, {A: 1.0, B: 1.0})
    check.update(1, {A: 2.0, B: 1.0})
    assert check.risen()
    changed = {**ROWS, "a": {**ROWS["a"], "rows": 8}}
    other = resumed(check, changed)
    assert other.risen() == []
    assert resumed(other).risen()  # saved before a measurement, and changed back: as before
    (line,) = other.update(2, {A: 3.0, B: 1.0})
    assert "held-out a" in line and "(rows: 4 then, 8 now)" in line and "step 2" in line
    assert "3.0000 at step 2, now 4.0000" in other.update(3, {A: 4.0, B: 1.0})[0]


def test_other_content_at_the_same_path_begins_anew():
    recorded = {n: {**rows, "content": "x"} for n, rows in ROWS.items()}
    check = rise_check()  # of a run that did not record it
    check.update(0, {A: 1.0, B: 1.0})
    again = resumed(check, recorded)
    assert len(again.update(1, {A: 2.0, B: 2.0})) == 1 and len(again.risen()) == 2
    other = resumed(again, {**recorded, "a": {**recorded["a"], "content": "y"}})
    assert len(other.risen()) == 1
    assert "content: 'x' then, 'y' now" in other.update(2, {A: 3.0, B: 1.0})[0]


@pytest.mark.parametrize(
    ("then", "name", "begins_anew"),
    [
        ({"content": "x", "name": "a"}, "a", False),
        ({"content": "x", "name": ""}, "", True),  # its path seeds the order of its rows
        ({}, "a", True),  # of a run that did not record the content
    ],
)
def test_the_same_content_at_another_path_is_the_same(then, name, begins_anew):
    check = heldout.RiseCheck(0.1, {"a": {"path": "data/a", **then}}, {})
    check.update(0, {A: 1.0})
    moved = resumed(check, {"a": {"path": "data/moved", "content": "x", "name": name}})
    moved.update(1, {A: 2.0})
    assert bool(moved.risen()) != begins_anew


def test_what_had_risen_is_known_after_a_restart():
    check = rise_check()
    check.update(0, {A: 1.0, B: 1.0})
    assert "WARNING: step 3" in check.update(3, {A: NAN, B: 2.0})[0]
    again = resumed(check)
    assert again.risen() == check.risen() and len(again.risen()) == 2 and again.step == 3
    # by the limit and for the sources of now
    assert len(resumed(check, max_rise=1.5).risen()) == 1
    assert resumed(check, max_rise=0.0).risen() == []
    assert len(resumed(check, {"b": ROWS["b"]}).risen()) == 1
    again.update(4, {A: 1.0, B: 1.0})
    assert again.risen() == []


def test_without_a_limit_everything_is_stored_and_nothing_reported():
    check = rise_check(max_rise=0.0)
    assert check.update(0, {A: 1.0}) == check.update(1, {A: NAN, B: 9.0}) == check.risen() == []
    assert len(resumed(check).risen()) == 1
