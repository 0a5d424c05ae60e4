"""A non-finite loss: its update is skipped, its rows are recorded, and the run stops in time."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import runs

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import DivergedError
from janusflow_jax.data import loader
from janusflow_jax.parallel import trees
from janusflow_jax.training import health, losses, replay


def spoil(monkeypatch, bad_rows) -> None:
    """The flow loss of these rows is NaN."""
    real = losses.loss_sums

    def spoiled(params, vae_params, batch, *args, **kwargs):
        sums, extras = real(params, vae_params, batch, *args, **kwargs)
        hit = jnp.isin(batch["row"], jnp.asarray(bad_rows, jnp.uint32)).any()
        return sums | {"rf": jnp.where(hit, jnp.nan, sums["rf"])}, extras

    monkeypatch.setattr(losses, "loss_sums", spoiled)


def test_bad_steps_are_recorded_and_reach_the_limit_for_good(tmp_path):
    steps = health.BadSteps(tmp_path, 2)
    oks = [False, True, False, False, True]
    for step, ok in enumerate(oks, start=1):
        rows = loader.Report(first_row=8 * step, next_row=8 * step + 8, bad=[])
        steps.count(step, ok, rows)
        assert steps.limit_reached == (step >= 4)
    lines = [
        json.loads(x)["first_row"]
        for x in (tmp_path / health.BAD_STEPS_FILE).read_text().splitlines()
    ]
    assert lines == [8, 24, 32] and "--replay=32:40" in steps.message()
    never = health.BadSteps(tmp_path / "other", 0)
    (tmp_path / "other").mkdir()
    for step in range(9):
        never.count(step, False, loader.Report(0, 8, []))
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
    assert lines == [{"step": 2, "first_row": 8, "end_row": 16}]
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
