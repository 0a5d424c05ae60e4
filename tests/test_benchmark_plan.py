"""The plan of a benchmark run, its marks, and the registry."""

import json

import pytest

from janusflow_jax.config.errors import CheckpointError, ConfigError, DataError
from janusflow_jax.eval.benchmarks import plan, registry

SETTINGS = {"benchmark": "geneval", "seed": 0, "model": {"model.json": "abc"}}


def test_every_unit_is_in_one_batch_of_one_shape():
    shapes = [64, 32, 32, 64, 96, 32, 32, 32]
    batches = plan.batches(shapes, 2)
    assert [b.index for b in batches] == list(range(len(batches)))
    assert sorted(u for b in batches for u in b.units) == list(range(len(shapes)))
    assert all(len(b.rows) == 2 for b in batches)
    assert all(len({shapes[u] for u in b.rows}) == 1 for b in batches)
    assert batches[2].rows == (7, 7) and batches[2].units == (7,)
    assert batches == plan.batches(list(shapes), 2)


def test_a_limit_changes_no_complete_batch_of_a_single_shape():
    assert plan.batches([32] * 9, 4)[:2] == plan.batches([32] * 11, 4)[:2]


@pytest.mark.parametrize(
    ("text", "env", "expected"),
    [
        ("", {}, (0, 1)),
        ("2/4", {"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7"}, (2, 4)),
        ("", {"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "7"}, (7, 8)),
        ("", {"SLURM_NTASKS": "3", "SLURM_PROCID": "1"}, (1, 3)),
    ],
)
def test_shard(text, env, expected):
    assert plan.shard(text, env) == expected


@pytest.mark.parametrize(
    ("text", "env"),
    [("4/4", {}), ("1", {}), ("-1/2", {}), ("0/0", {}), ("", {"JAX_NUM_PROCESSES": "2"})],
)
def test_a_wrong_shard_is_refused(text, env):
    with pytest.raises(ConfigError, match="0 <= k < n"):
        plan.shard(text, env)


def test_marks_survive_and_belong_to_their_settings(tmp_path):
    manifest = plan.Manifest(tmp_path / "run", SETTINGS)
    assert manifest.marks() == {}
    manifest.commit(3, {"ids": ["a"]})
    manifest.commit(1, {"ids": ["é"]})
    assert plan.Manifest(tmp_path / "run", dict(SETTINGS)).marks() == {
        1: {"ids": ["é"]},
        3: {"ids": ["a"]},
    }
    names = sorted(x.name for x in (tmp_path / "run").iterdir())
    assert names == ["000001.json", "000003.json", "settings.json"]


def test_other_settings_are_named_and_change_nothing(tmp_path):
    plan.Manifest(tmp_path, SETTINGS).commit(0, {})
    before = {x.name: x.read_bytes() for x in tmp_path.iterdir()}
    other = {**SETTINGS, "seed": 1, "model": {"model.json": "xyz"}}
    with pytest.raises(ConfigError, match=r"model\.model\.json: 'abc' then.*; seed: 0 then, 1 now"):
        plan.Manifest(tmp_path, other)
    assert before == {x.name: x.read_bytes() for x in tmp_path.iterdir()}


def test_a_mark_of_another_run_is_refused(tmp_path):
    plan.Manifest(tmp_path / "a", SETTINGS).commit(5, {})
    manifest = plan.Manifest(tmp_path / "b", {**SETTINGS, "seed": 1})
    (tmp_path / "b" / "000005.json").write_bytes((tmp_path / "a" / "000005.json").read_bytes())
    with pytest.raises(DataError, match="000005"):
        manifest.marks()


def test_a_truncated_mark_is_refused(tmp_path):
    manifest = plan.Manifest(tmp_path, SETTINGS)
    manifest.commit(0, {"ids": ["a"]})
    file = tmp_path / "000000.json"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="000000"):
        manifest.marks()


def test_reading_needs_a_run(tmp_path):
    with pytest.raises(DataError, match="settings"):
        plan.read_marks(tmp_path)


def test_the_registry_is_consistent():
    assert len(registry.BENCHMARKS) == 15
    for name, benchmark in registry.BENCHMARKS.items():
        assert benchmark.name == name and benchmark.files
        assert (benchmark.kind == "generate") == bool(benchmark.prompts and benchmark.layout)
        json.dumps([r.settings for r in benchmark.published + benchmark.third_party])
    assert registry.get("geneval").images == 2212 and registry.get("dpg").images == 4260
    with pytest.raises(ConfigError, match="geneval2"):
        registry.get("geneval3")
