"""A run knows its data by what they hold: other content is refused, another path is not."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath
from helpers import records, runs

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import workdir
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.data import chat_format, rows
from janusflow_jax.training import run


def store(changes: dict | None = None, count: int = 40) -> records.Store:
    """Records, some of them changed."""
    changed = [records.record(i) | (changes or {}).get(i, {}) for i in range(count)]
    return records.Store(changed)


def swapped() -> records.Store:
    out = store()
    out[3], out[4] = out[4], out[3]
    return out


HOLDS_THE_SAME = {"a copy": store, "made anew": lambda: records.Store(map(dict, store()))}
HOLDS_ANOTHER = {
    "an image": lambda: store({7: {"image": records.png(99)}}),
    "a caption": lambda: store({7: {"captions": ["A red fox"]}}),
    "a word of the same length": lambda: store({0: {"captions": ["B"] * 3}}),
    "an id": lambda: store({7: {"id": "other"}}),
    "the order": swapped,
    "a record less": lambda: store(count=39),
    "a record more": lambda: store(count=41),
}


def identity(holds: records.Store, monkeypatch) -> dict:
    monkeypatch.setattr(rows.sources, "open_source", lambda path, split: holds)
    monkeypatch.setattr(rows.packing.sources, "write_whole", lambda path, data: None)
    chat = chat_format.ChatFormat.load(records.HUB, records.MODEL.num_image_tokens)
    source = records.source("a", name="gen")
    made = rows.Rows(records.data_config(sources=(source,), und_slots=0), records.MODEL, chat)
    return made.sources[0].identity()


@pytest.mark.parametrize("name", HOLDS_THE_SAME)
def test_the_same_records_have_the_same_identity(name, monkeypatch):
    assert identity(HOLDS_THE_SAME[name](), monkeypatch) == identity(store(), monkeypatch)


@pytest.mark.parametrize("name", HOLDS_ANOTHER)
def test_other_records_have_another(name, monkeypatch):
    then, now = identity(store(), monkeypatch), identity(HOLDS_ANOTHER[name](), monkeypatch)
    assert then["content"] != now["content"]
    with pytest.raises(CheckpointError, match=r"data\.sources\[0\] \(gen\)"):
        workdir.check_data(epath.Path("run"), [then], [now], accept=False)
    assert len(workdir.check_data(epath.Path("run"), [then], [now], accept=True)) == 1


def test_every_length_counts_and_the_bytes_of_the_set():
    """Records that are not read show in these."""
    many = records.Store({"id": str(i)} for i in range(10_000))
    before = rows.sources.digest(many)
    many[77] = {"id": "x"}  # not one of the records that are read
    assert rows.sources.digest(many) == before
    many.num_bytes = 5
    assert rows.sources.digest(many) != before
    ones = np.ones(10_000, np.int32)
    other = np.where(np.arange(10_000) == 77, 2, ones)
    before, changed = (rows.packing.Samples(ones, ones, ones, x, ones) for x in (ones, other))
    assert before.digest() != changed.digest()


def save_config(folder, cfg) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c.to_dict(cfg)))


RECORD = {"name": "a", "records": 1, "content": "x", "cache": ""}


@pytest.mark.parametrize(
    ("recorded", "moves"),
    [([RECORD], True), (None, False), ("", False), ("{}", False), ("[{}]", False), ("[0]", False)],
)
def test_a_path_may_change_where_the_content_is_recorded(recorded, moves, tmp_path):
    """An older run has no record; a damaged one counts as none. Neither blocks a resume."""
    cfg = runs.tiny_config(tmp_path)
    save_config(tmp_path, cfg)
    if recorded is not None:
        text = recorded if isinstance(recorded, str) else json.dumps(recorded)
        (tmp_path / "data.json").write_text(text)
    folder = epath.Path(tmp_path)
    workdir.check(folder, cfg)
    first, *others = cfg.data.sources
    cfg.data.sources = (dataclasses.replace(first, path="elsewhere"), *others)
    if moves:
        workdir.check(folder, cfg)
    else:
        with pytest.raises(CheckpointError, match="elsewhere"):
            workdir.check(folder, cfg)
    cfg.data.sources = (dataclasses.replace(first, path="elsewhere", split="other"), *others)
    with pytest.raises(CheckpointError, match="other"):
        workdir.check(folder, cfg)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_no_source_is_lost_where_the_record_does_not_fit(count):
    cfg = runs.tiny_config("x").data
    named = run._with_names(cfg, [RECORD] * count)
    recorded = ["a", "a"] if count == 2 else [source.name for source in cfg.sources]
    assert [source.name for source in named.sources] == recorded


@pytest.mark.slow
def test_a_run_resumes_with_moved_data_and_refuses_other(stores, monkeypatch):
    """Sources without a name are called by their path, which seeds the order of the rows."""
    runs.share_compiled_step(monkeypatch)
    mix = runs.tiny_config("whole").data

    def config(folder, path, num_steps=2):
        sources = tuple(dataclasses.replace(s, path=path, name="") for s in mix.sources)
        data = dataclasses.replace(mix, sources=sources)
        return runs.tiny_config(folder, data=data, num_steps=num_steps, save_every_steps=1)

    train.train(config("whole", "a"))
    shutil.copytree("whole", "moved")
    shutil.rmtree("moved/checkpoints/2")
    with pytest.raises(CheckpointError, match="--accept-data"):
        train.train(config("moved", "b"))
    train.train(config("moved", "elsewhere/a"))
    whole = runs.last_arrays("whole")
    for name, x in runs.last_arrays("moved").items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
    train.train(config("moved", "b", num_steps=3), accept_data=True)
    attempts = json.loads(open("moved/attempts.json").read())
    assert [len(x.get("changed_data", [])) for x in attempts] == [0, 0, len(mix.sources)]
    train.train(config("moved", "b", num_steps=4))  # what was accepted is what the run knows now


def test_another_cache_is_other_data(monkeypatch):
    then = identity(store(), monkeypatch)
    for cache in ("", "x"):
        now = then | {"cache": cache}
        assert bool(workdir.check_data(epath.Path("r"), [then], [now], True)) == bool(cache)
