"""A bad step (a non-finite loss or a spike) is skipped and recorded, and the run stops in time."""

from __future__ import annotations

import json
import math
import re
import shutil
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import runs

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import ConfigError, DivergedError
from janusflow_jax.data import loader
from janusflow_jax.parallel import trees
from janusflow_jax.training import health, losses, replay, step as train_step


def spoil(monkeypatch, bad_rows, factor=np.nan) -> None:
    """The flow loss of batches with these rows is multiplied by `factor`."""
    real = losses.loss_sums

    def spoiled(params, vae_params, batch, *args, **kwargs):
        sums, extras = real(params, vae_params, batch, *args, **kwargs)
        hit = jnp.isin(batch["row"], jnp.asarray(bad_rows, jnp.uint32)).any()
        scale = jnp.where(hit, factor, 1.0)
        extras["by_source"]["rf"] *= scale
        return sums | {"rf": sums["rf"] * scale}, extras

    monkeypatch.setattr(losses, "loss_sums", spoiled)


def test_bad_steps_are_recorded_and_reach_the_limit_for_good(tmp_path):
    steps = health.BadSteps(tmp_path, 2)
    oks = [False, True, False, False, True]
    for step, ok in enumerate(oks, start=1):
        rows = loader.Report(first_row=8 * step, next_row=8 * step + 8, bad=[])
        steps.count(step, {"ok": ok, "loss": math.nan}, rows)
        assert steps.limit_reached == (step >= 4)
    lines = [
        json.loads(x)["first_row"]
        for x in (tmp_path / health.BAD_STEPS_FILE).read_text().splitlines()
    ]
    assert lines == [8, 24, 32] and "--replay=32:40" in steps.message()
    never = health.BadSteps(tmp_path / "other", 0)
    (tmp_path / "other").mkdir()
    for step in range(9):
        never.count(step, {"ok": False, "loss": math.nan}, loader.Report(0, 8, []))
    assert not never.limit_reached


@pytest.mark.slow
def test_a_bad_step_is_skipped_and_its_row_is_found(store, monkeypatch, capsys):
    spoil(monkeypatch, [9])
    cfg = runs.tiny_config("run", num_steps=2, keep_checkpoints=9, save_every_steps=1)
    assert cfg.batch_rows == 8
    train.train(cfg)
    metrics = runs.read_metrics("run")
    assert [x["ok"] for x in metrics] == [1, 0] and [x["bad_steps"] for x in metrics] == [0, 1]
    assert metrics[1]["loss"] is None and "loss" in metrics[1]["non_finite"]
    lines = [json.loads(x) for x in Path("run", health.BAD_STEPS_FILE).read_text().splitlines()]
    reason = "non-finite loss or gradient"
    assert lines == [{"step": 2, "first_row": 8, "end_row": 16, "reason": reason}]
    first, second = (
        trees.flatten(model_folder.load_tree(Path("run/checkpoints", str(n), "params").resolve()))
        for n in (1, 2)
    )
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name], err_msg=name)
    capsys.readouterr()
    assert not replay.replay(cfg, "8:11")
    rows = capsys.readouterr().out.split("row ")
    assert len(rows) == 4 and ["NOT FINITE" in x for x in rows[1:]] == [False, True, False]
    assert "loss_rf" in rows[2] and "records" in rows[2]
    assert replay.replay(cfg, "8")


def test_replay_reads_its_options_or_refuses_them(monkeypatch):
    calls = []
    monkeypatch.setattr(train.compile_cache, "enable", lambda: None)
    monkeypatch.setattr(train, "replay", lambda *args: calls.append(args))
    values = {"_CONFIG": "cfg", "_REPLAY": "3", "_ACCEPT_DATA": True, "_DISTRIBUTED": "off"}
    for name, value in (
        values | {"_BRANCH_FROM": "", "_PROFILE": "", "_HLO": False, "_PROFILER_PORT": 0}
    ).items():
        monkeypatch.setattr(train, name, types.SimpleNamespace(value=value))
    with pytest.raises(SystemExit):
        train.main(["train"])
    assert calls == [("cfg", "3", True)]
    train._BRANCH_FROM.value = "run@2"
    train._HLO.value = True
    with pytest.raises(ConfigError, match="--branch-from, --hlo"):
        train.main(["train"])


def test_the_mean_of_the_gradient_norm():
    state = {"step": jnp.int32(0), "mean_norm": jnp.float32(0)}
    seen = []
    for step in range(150):
        norm = 3.0 + step % 2
        seen.append(norm)
        state["mean_norm"] = train_step.update_mean_norm(state, jnp.float32(norm))
        state["step"] += 1
        if step < 100:
            np.testing.assert_allclose(state["mean_norm"], np.mean(seen), rtol=1e-5)
    np.testing.assert_allclose(state["mean_norm"], 3.5, rtol=0.01)
    old = {"step": jnp.int32(5000), "mean_norm": jnp.float32(0)}
    assert train_step.update_mean_norm(old, jnp.float32(7)) == 7
    optim = c.OptimConfig(max_norm_ratio=4.0)
    assert train_step.largest_norm(optim, old) == np.inf
    np.testing.assert_allclose(train_step.largest_norm(optim, state), 4 * state["mean_norm"])
    assert train_step.largest_norm(c.OptimConfig(), state) == np.inf


@pytest.mark.slow
def test_a_spike_is_skipped_counted_replayed_and_restored(store, monkeypatch, capsys):
    """A finite gradient far above the mean; the run that resumes from step 3 knows the mean."""
    monkeypatch.setattr(train_step, "MEAN_STEPS", 2)
    runs.share_compiled_step(monkeypatch)
    spoil(monkeypatch, range(32, 40), factor=1e6)
    args = {"num_steps": 6, "keep_checkpoints": 9, "save_every_steps": 1}
    cfg = runs.tiny_config("run", **args)
    cfg.optim.max_norm_ratio, cfg.optim.warmup_steps = 20.0, 10
    train.train(cfg)
    metrics = runs.read_metrics("run")
    # The rate rises from step to step, but not after the step that was skipped.
    np.testing.assert_allclose(np.diff([x["lr"] for x in metrics]) / 9e-5, [1, 1, 1, 1, 0], 1e-3)
    assert [x["ok"] for x in metrics] == [1, 1, 1, 1, 0, 1]
    assert [x["bad_steps"] for x in metrics] == [0, 0, 0, 0, 1, 1]
    norms = [x["grad_norm"] for x in metrics]
    assert np.isfinite(norms).all() and norms[4] > 1000 * norms[3]
    assert metrics[5]["mean_grad_norm"] < 20 * max(norms[:4])  # the spike hardly enters it
    line = json.loads(Path("run", health.BAD_STEPS_FILE).read_text())
    assert line["first_row"] == 32 and "spike" in line["reason"]
    capsys.readouterr()
    assert replay.replay(cfg, "28:36")  # finite, but a row that generates stands out
    said = capsys.readouterr().out
    mean = float(re.search(r"mean gradient norm is (\S+)", said)[1])
    of_rows = [float(x) for x in re.findall(r"  gradient (\S+)", said)]
    assert max(of_rows[:4]) < 20 * mean < max(of_rows[4:])
    for step in (4, 5, 6):
        shutil.rmtree(f"run/checkpoints/{step}")
    train.train(cfg)
    assert [x["mean_grad_norm"] for x in runs.read_metrics("run")] == [
        x["mean_grad_norm"] for x in metrics
    ]


@pytest.mark.slow
def test_a_run_with_many_bad_steps_in_a_row_stops_saved(store, monkeypatch):
    spoil(monkeypatch, range(16, 999))
    cfg = runs.tiny_config("run", num_steps=50, max_bad_steps=3, save_every_steps=0)
    with pytest.raises(DivergedError, match=r"3 steps in a row.*--replay=40:48"):
        train.train(cfg)
    step = model_folder.committed_steps("run")[-1]
    assert 5 <= step <= 6  # metrics come a step late
    params = model_folder.load_model("run").params
    assert all(np.isfinite(x).all() for x in trees.flatten(params).values())


@pytest.mark.parametrize("text", ["", "x", "3:", ":3", "5:5", "-1", "3:2", "1:2:3"])
def test_rows_to_replay(text):
    assert replay.parse_rows("7") == (7, 8) and replay.parse_rows("7:9") == (7, 9)
    with pytest.raises(c.ConfigError, match="ROW or FIRST:END"):
        replay.parse_rows(text)
