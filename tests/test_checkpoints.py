"""What a run leaves on disk: whole or not at all, verified, kept, and readable for ever."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import runs
from jax.sharding import NamedSharding, PartitionSpec as P

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import checksums, model_folder, run as run_checkpoints, workdir
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.parallel import sharding

OLD_RUN = Path(__file__).parent / "data" / "run_format_2"


def trees(step: int, side: int = 64) -> dict:
    """A state of a few numbers that belong to the step."""
    numbers = jnp.arange(float(side * side)).reshape(side, side) + step
    params = {"llm": {"kernel": numbers, "bias": numbers[0] * 2}}
    state = {"params": params, "ema": params, "opt_state": (params, {"count": jnp.int32(step)})}
    return jax.tree.map(jnp.copy, state)


def abstract(step: int = 0) -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trees(step)
    )


def filled(workdir, steps, **options) -> run_checkpoints.RunCheckpoints:
    ckpts = run_checkpoints.RunCheckpoints(workdir, **options)
    for step in steps:
        ckpts.save(step, **trees(step), run={"step": step})
    ckpts.wait()
    return ckpts


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("hub", ["starts/emoji_llm/hub", "~/hub"])
def test_the_tokenizer_of_a_model_is_found_as_every_path_is(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "tokenizer.json").write_text("{}")
    cfg = runs.tiny_config("x").model
    model_folder.save_model("m", model_cfg=cfg, params=None, vae=None, hub_files=hub, extra={})
    assert Path("m/hub/tokenizer.json").exists()


def test_newest_stay_and_every_nth(tmp_path):
    filled(tmp_path, range(1, 9), keep=2, keep_every_steps=3)
    assert model_folder.committed_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "7", "8"]


def test_what_was_saved_comes_back_and_saving_outlives_donation(tmp_path):
    ckpts, state = run_checkpoints.RunCheckpoints(tmp_path), trees(5, side=1024)
    expected = jax.tree.map(np.array, state)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    wreck = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    ckpts.save(5, **state, run={"step": 5})
    state = jax.block_until_ready(wreck(state))  # the buffers are the next step's at once
    ckpts.wait()
    got, run = ckpts.restore_newest(like)
    assert run["step"] == 5 and run["time"] > 1e9
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)


def test_another_mesh_gets_the_same_numbers(tmp_path):
    ckpts = filled(tmp_path, [1])
    for shape in ((2, 2, 2), (1, 8, 1)):
        mesh = sharding.make_mesh(c.MeshConfig(data=shape[0], fsdp=shape[1], tensor=shape[2]))
        where = NamedSharding(mesh, P("fsdp"))
        like = jax.tree.map(
            lambda x, w=where: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=w if x.ndim else NamedSharding(w.mesh, P())
            ),
            abstract(),
        )
        got, _ = ckpts.restore_newest(like)
        assert got["params"]["llm"]["kernel"].sharding == where
        jax.tree.map(np.testing.assert_array_equal, got, trees(1))


@pytest.mark.parametrize("harm", ["flip", "missing", "no sums", "no run"])
@pytest.mark.parametrize("part", ["params", "opt_state"])
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, capsys, harm, part):
    ckpts = filled(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    file = largest(folder / part)
    if harm == "flip":
        flip(file)
    else:
        {"missing": file, "no sums": folder / "checksums.json", "no run": folder / "run.json"}[
            harm
        ].unlink()
    looking = run_checkpoints.RunCheckpoints(tmp_path, writes=False)
    assert looking.restore_newest(abstract())[1]["step"] == 1
    assert ckpts.steps() == [1, 2]
    capsys.readouterr()
    got, run = ckpts.restore_newest(abstract())
    assert run["step"] == 1
    jax.tree.map(np.testing.assert_array_equal, got, trees(1))
    said = capsys.readouterr().out
    name = {
        "flip": file.name,
        "missing": file.name,
        "no sums": "checksums.json",
        "no run": "run.json",
    }[harm]
    assert said.count("WARNING") == 2 and name in said and "checkpoints/2: damaged" in said
    assert ckpts.steps() == [1] and (folder / run_checkpoints.DAMAGED).exists()


def loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


@pytest.mark.parametrize("harm", ["loop", "sums loop", "sums null", "read error"])
@pytest.mark.parametrize("steps", [[2], [1, 2]])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    tmp_path, capsys, monkeypatch, harm, steps
):
    ckpts, files = filled(tmp_path, [1, 2]), []
    for step in steps:
        folder = tmp_path / "checkpoints" / str(step)
        file = folder / "checksums.json" if harm.startswith("sums") else largest(folder / "params")
        files.append(file)
        if harm.endswith("loop"):
            loop(file)
        elif harm == "sums null":
            file.write_text("null")
    if harm == "read error":
        read = checksums.file_sha256

        def failing(path):
            if Path(path) in files:
                raise OSError(5, "Input/output error")
            return read(path)

        monkeypatch.setattr(checksums, "file_sha256", failing)
    if 1 in steps:
        with pytest.raises(CheckpointError, match="no older checkpoint"):
            ckpts.restore_newest(abstract())
        return
    got, run = ckpts.restore_newest(abstract())
    said = capsys.readouterr().out
    assert run["step"] == 1 and said.count("WARNING") == 2 and files[0].name in said
    jax.tree.map(np.testing.assert_array_equal, got, trees(1))


def test_nothing_whole_left_is_an_error_and_not_a_new_run(tmp_path):
    ckpts = filled(tmp_path, [1])
    flip(largest(tmp_path / "checkpoints" / "1"))
    with pytest.raises(CheckpointError, match="no older checkpoint"):
        ckpts.restore_newest(abstract())
    assert run_checkpoints.RunCheckpoints(tmp_path / "new").restore_newest(abstract()) is None


def test_a_run_with_many_checkpoints_resumes(tmp_path, monkeypatch):
    """Their steps do not fit into one message between processes."""
    ckpts = run_checkpoints.RunCheckpoints(tmp_path)
    cut = run_checkpoints.processes.TEXT_BYTES
    monkeypatch.setattr(run_checkpoints.processes, "from_main", lambda text: text[:cut])
    monkeypatch.setattr(ckpts, "steps", lambda: list(range(100_000, 101_000)))
    monkeypatch.setattr(ckpts, "_damage", lambda step: "")
    monkeypatch.setattr(ckpts, "restore", lambda step, abstract: ({}, step))
    assert ckpts.restore_newest({}) == ({}, 100_999)


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    (folder / "base").mkdir()
    (folder / "base" / model_folder.MODEL_FILE).write_text('{"parts": ["vae"]}')
    (folder / "config.json").write_text("old")
    write = type(folder).write_text

    def full(path, text, **options):
        write(path, text[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(folder), "write_text", full)
    with pytest.raises(CheckpointError, match="No space left"):
        workdir.create(folder, runs.config("x"), params=None, vae=None, hub=None, about={}, data=[])
    assert (folder / "config.json").read_text() == "old"


def test_what_a_kill_cut_short_does_not_count_and_is_removed(tmp_path, capsys):
    ckpts = filled(tmp_path, [1, 2])
    (tmp_path / "checkpoints" / "2" / checksums.MARKER).unlink()
    (tmp_path / "checkpoints" / "3" / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    assert ckpts.restore_newest(abstract())[1]["step"] == 1
    assert "unfinished; removed" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1"]


def test_a_save_that_fails_is_told_and_leaves_what_was(tmp_path, monkeypatch):
    ckpts = filled(tmp_path, [1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "merge_shares", full)
    ckpts.save(2, **trees(2), run={"step": 2})
    ckpts.join()
    assert ckpts.failed and ckpts.steps() == [1]
    ckpts.save(3, **trees(3), run={"step": 3})  # nothing is started on a disk that failed
    assert not (tmp_path / "checkpoints" / "3").exists()
    with pytest.raises(CheckpointError, match=r"No space left.*\n.*checkpoints: \[1\]"):
        ckpts.wait()
    assert ckpts.restore_newest(abstract())[1]["step"] == 1


def test_a_run_that_may_not_write_any_more_commits_nothing(tmp_path):
    def taken():
        raise ValueError("taken over")

    ckpts = run_checkpoints.RunCheckpoints(tmp_path, before_commit=taken)
    ckpts.save(1, **trees(1), run={"step": 1})
    with pytest.raises(CheckpointError, match="taken over"):
        ckpts.wait()
    assert not ckpts.steps()


def test_arrays_that_do_not_fit_are_all_named(tmp_path):
    ckpts = filled(tmp_path, [1])
    want = abstract()
    want["params"]["llm"]["bias"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    del want["ema"]["llm"]["kernel"]
    with pytest.raises(CheckpointError, match="is not of this config") as error:
        ckpts.restore_newest(want)
    assert "params/llm/bias: expected shape (3,); got (64,)" in str(error.value)
    assert "ema/llm/kernel: unknown" in str(error.value)


def test_sums_of_several_writers(tmp_path):
    files = ("a", "x/ocdbt.process_0/d/1", "x/ocdbt.process_1/d/2", "x/ocdbt.process_12/d/3")
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [checksums.writer_of(n) for n in files] == [0, 0, 1, 12]
    folder = epath.Path(tmp_path)
    for process in (0, 1):
        checksums.write_share(folder, process)
    with pytest.raises(CheckpointError, match="process_12/d/3.*without a checksum"):
        checksums.merge_shares(folder, 2)
    checksums.write_share(folder, 12)
    checksums.write_share(folder, 2)
    (tmp_path / "checksums.12.json").rename(tmp_path / "checksums.3.json")
    checksums.write_share(folder, 2)
    checksums.merge_shares(folder, 4)
    assert set(json.loads((tmp_path / "checksums.json").read_text())) == set(files)
    assert not list(tmp_path.glob("checksums.*.json"))
    flip(tmp_path / files[2])
    found = [checksums.damage(folder, share=(k, 3)) for k in range(3)]
    assert sum(files[2] in f for f in found) == 1 and found.count("") == 2
    assert checksums.damage(folder, parts=("a",)) == "" and files[2] in checksums.damage(folder)
    (tmp_path / files[3]).unlink()  # what is missing everybody sees
    assert all(files[3] in checksums.damage(folder, share=(k, 3)) for k in range(3))


@pytest.mark.slow
def test_a_model_is_read_without_the_optimizer(tmp_path):
    run = shutil.copytree(OLD_RUN, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "4" / "opt_state")
    assert model_folder.load_model(run).params is not None
    flip(largest(run / "checkpoints" / "4" / "ema"))
    assert model_folder.load_model(run, weights="params").params is not None
    with pytest.raises(CheckpointError, match=r"damaged: .*changed \['ema.*other steps: none"):
        model_folder.load_model(run)


ABSOLUTE_SUMS = {
    "ema": {"llm": 1393.8464112277597, "gen_decoder": 862.6214486262543, "vae": 732.6746108236766},
    "params": {
        "llm": 1394.1012418542832,
        "und_encoder": 852.083157922878,
        "gen_norm": 15.994992911815643,
    },
}
"""Of the stored run's arrays, as they were when it was stored (2026-11-25)."""
LOSSES = {5: (7.357367992401123, 2.330357551574707), 6: (7.300553321838379, 2.310168504714966)}
"""Loss and gradient norm of the steps after it, by the code of that day."""


@pytest.mark.parametrize("weights", ["ema", "params"])
def test_a_run_stored_long_ago_loads(weights):
    loaded = model_folder.load_model(OLD_RUN, weights=weights)
    assert loaded.meta["step"] == 4 and loaded.cfg.llm.width == 16
    for part, expected in ABSOLUTE_SUMS[weights].items():
        leaves = jax.tree.leaves(loaded.vae if part == "vae" else loaded.params[part])
        got = sum(np.abs(np.asarray(x, np.float64)).sum() for x in leaves)
        assert got == pytest.approx(expected, rel=1e-12), part


@pytest.mark.slow
def test_a_run_stored_long_ago_goes_on(store, tmp_path):
    shutil.copytree(OLD_RUN, tmp_path / "run")
    cfg = c.from_dict(c.TrainConfig, json.loads((OLD_RUN / "config.json").read_text()))
    cfg.workdir, cfg.num_steps = str(tmp_path / "run"), 6
    (tmp_path / "starts").symlink_to(runs.ROOT / "starts")
    train.train(cfg)
    lines = {x["step"]: (x["loss"], x["grad_norm"]) for x in runs.read_metrics("run")}
    assert list(lines) == [1, 2, 3, 4, 5, 6]
    for step, expected in LOSSES.items():
        np.testing.assert_allclose(lines[step], expected, rtol=1e-5)
