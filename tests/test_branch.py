"""A run that begins as a branch of another run's checkpoint, and rows that a run leaves out."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from helpers.runs import HUB, last_arrays, read_metrics, share_compiled_step, tiny_config

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import model_folder, workdir
from janusflow_jax.config import checks
from janusflow_jax.config.errors import CheckpointError, ConfigError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.training.run import open_run


@pytest.mark.parametrize(
    ("skipped", "rows"),
    [
        ((), [0, 1, 2, 3, 4, 5]),
        (((0, 2),), [2, 3, 4, 5, 6, 7]),
        (((1, 2), (3, 5)), [0, 2, 5, 6, 7, 8]),
        (((1, 3), (3, 4)), [0, 4, 5, 6, 7, 8]),
        (((100, 200),), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_position_is_a_row(skipped, rows):
    data = c.DataConfig(skip_rows=skipped)
    assert [data.row_at(i) for i in range(6)] == rows
    assert [data.position_of(row) for row in rows] == list(range(6))
    for first, end in skipped:
        assert data.row_at(data.position_of(first)) == data.row_at(data.position_of(end))


@pytest.mark.parametrize(
    "wrong", [((2, 2),), ((3, 1),), ((-1, 2),), ((5, 6), (1, 2)), ((0, 3), (2, 4))]
)
def test_ranges_that_cannot_be_left_out(wrong):
    cfg = tiny_config("x")
    cfg.data = dataclasses.replace(cfg.data, skip_rows=wrong)
    assert any("data.skip_rows" in problem for problem in checks.train_problems(cfg))


def test_rows_that_are_left_out_are_not_read(store):
    cfg = tiny_config("x")
    chat = chat_format.ChatFormat.load(str(HUB))
    data = dataclasses.replace(cfg.data, skip_rows=((3, 5), (9, 10)))
    feed = loader.Loader(data, cfg.model, chat, 4).batches(0)
    got = [next(feed) for _ in range(2)]
    feed.close()
    rows = [[0, 1, 2, 5], [6, 7, 8, 10]]
    whole = loader.Loader(cfg.data, cfg.model, chat, 4).rows
    for (batch, report), numbers in zip(got, rows, strict=True):
        assert batch["row"].tolist() == numbers
        assert (report.first_row, report.next_row) == (numbers[0], numbers[-1] + 1)
        for i, number in enumerate(numbers):
            np.testing.assert_array_equal(batch["tokens"][i], whole.row(number)[0]["tokens"])


@pytest.mark.parametrize(
    ("change", "knows_its_data"),
    [
        (lambda first, *others: (first, *others), True),
        (lambda first, *others: (dataclasses.replace(first, weight=7.0, path="b"), *others), True),
        (lambda first, *others: others, False),
        (lambda first, *others: (*others, first), False),
        (lambda first, *others: (dataclasses.replace(first, name="new"), *others), False),
        (lambda first, *others: (dataclasses.replace(first, split="new"), *others), False),
    ],
)
def test_a_branch_knows_the_data_of_sources_that_it_keeps(tmp_path, change, knows_its_data):
    """The record of a source stands at its place in the mixture."""
    origin, cfg = tmp_path / "run", tiny_config(tmp_path / "branch")
    (origin / "base").mkdir(parents=True)
    (origin / "checkpoints" / "2").mkdir(parents=True)
    (origin / "checkpoints" / "2" / "COMMITTED").touch()
    for name, values in (
        ("config.json", c.to_dict(cfg)),
        ("checkpoints/2/run.json", {"config": c.to_dict(cfg)}),
        ("data.json", [{"name": "a", "records": 1, "content": "x", "cache": ""}] * 2),
    ):
        (origin / name).write_text(json.dumps(values))
    cfg.data = dataclasses.replace(cfg.data, sources=change(*cfg.data.sources))
    workdir.branch(epath.Path(cfg.workdir), cfg, f"{origin}@2")
    assert bool(workdir.recorded_data(epath.Path(cfg.workdir))) == knows_its_data


@pytest.mark.slow
def test_a_branch_with_nothing_changed_equals_the_run(store, monkeypatch):
    share_compiled_step(monkeypatch)
    train.train(tiny_config("whole", num_steps=4, save_every_steps=2, keep_checkpoints=3))
    branch = tiny_config("branch", num_steps=4)
    train.train(branch, branch_from="whole@2")
    train.train(branch, branch_from="whole@2")  # the same command again resumes
    assert model_folder.committed_steps("branch") == [2, 4]
    whole = last_arrays("whole")
    for name, x in last_arrays("branch").items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
    assert [x["step"] for x in read_metrics("branch")] == [3, 4]


def saved_run() -> None:
    """A run with a checkpoint of step 2, without having trained."""
    cfg = tiny_config("run", num_steps=4)
    run = open_run(cfg)
    run.save(2, loader.Report(0, 16, []))
    run.checkpoints.wait()


@pytest.mark.slow
def test_a_branch_has_the_state_and_other_settings(store):
    saved_run()
    cfg = tiny_config("branch", num_steps=9, name="lower")
    cfg.optim = dataclasses.replace(cfg.optim, lr=1e-5, clip_norm=0.5)
    cfg.data = dataclasses.replace(cfg.data, skip_rows=((16, 24),), change_row=32)
    here = epath.Path("branch").resolve()
    workdir.branch(here, cfg, "run@2")
    shutil.rmtree("branch/base")  # as if interrupted
    workdir.branch(here, cfg, "run@2")
    run = open_run(cfg)
    assert run.first_step == 2
    want = last_arrays("run")
    for name, x in last_arrays("branch").items():
        np.testing.assert_array_equal(x, want[name], err_msg=name)
    for change in ({"batch_rows": 16}, {"seed": 7}, {"train_parts": ("llm",)}):
        other = dataclasses.replace(cfg, workdir="other", **change)
        with pytest.raises(CheckpointError, match=next(iter(change))):
            workdir.branch(epath.Path("other").resolve(), other, "run@2")
    trained_on = dataclasses.replace(cfg.data, skip_rows=((8, 12), (16, 24)))
    with pytest.raises(ConfigError, match="data.skip_rows: expected .* before row 16"):
        other = dataclasses.replace(cfg, workdir="other", data=trained_on)
        workdir.branch(epath.Path("other").resolve(), other, "run@2")
    for source, error in (
        ("run", ConfigError),
        ("run@x", ConfigError),
        ("run@3", CheckpointError),
        ("nowhere@2", CheckpointError),
    ):
        with pytest.raises(error, match="--branch-from"):
            workdir.branch(epath.Path("other").resolve(), cfg, source)
    for taken in ("run", "branch"):  # another run, and a branch of another step
        with pytest.raises(CheckpointError, match="not a branch of run@1"):
            workdir.branch(epath.Path(taken).resolve(), cfg, "run@1")
    assert model_folder.committed_steps("run") == model_folder.committed_steps("branch") == [2]
