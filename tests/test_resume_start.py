"""What a run begins from: a start of the same config only; and what it goes on with when that has
changed on disk."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers.runs import (
    HUB,
    last_arrays,
    read_metrics,
    save_start,
    share_compiled_step,
    tiny_config as config,
)

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import workdir
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.config.run import MAY_CHANGE
from janusflow_jax.training import init as initialization


@pytest.mark.slow
def test_only_what_a_start_gives_must_agree(tmp_path):
    """Every field in which a start differs is named, if the run takes a part that depends on it."""
    fields = {"vae__scaling_factor": 0.5, "llm__rope_theta": 5e5, "gen__norm_eps": 1e-5}
    path = save_start(str(tmp_path / "other"), seed=0, **fields)
    with pytest.raises(c.ConfigError, match="was made with other values") as error:
        initialization.find_start(config("x", start=path, tokenizer=""))
    named = re.findall(r"its (\w+) was made .*?\(model\.(\S+): (\S+) then", str(error.value))
    assert set(named) == {
        ("vae", "vae.scaling_factor", "0.5"),
        ("llm", "llm.rope_theta", "500000.0"),
        ("gen_encoder", "gen.norm_eps", "1e-05"),
        ("gen_decoder", "gen.norm_eps", "1e-05"),
    }
    cfg = config("x", init=(("vae", path), ("gen_norm", path)))
    cfg.model.vae.scaling_factor = 0.5
    begun = initialization.find_start(cfg)
    from_path = {part for part, origin in begun.origins.items() if origin == path}
    assert from_path == {"vae", "gen_norm"} == set(begun.files)
    assert Path(begun.hub) == HUB


def test_a_start_of_another_shape_is_one_sentence(tmp_path):
    path = save_start(str(tmp_path / "other"), seed=0, llm__width=96, gen__width=48)
    with pytest.raises(c.ConfigError, match="configs/pretrain.py:own") as error:
        initialization.find_start(config("x", start=path, tokenizer=""))
    assert "model.llm.width: 96 then, 16 now" in str(error.value)
    assert len(str(error.value).splitlines()) == 2, "the title and one sentence"


MEMORY = {
    "optim.accum_steps": 2,
    "loss.ce_chunk": 0,
    "remat": "full",
    "frozen_dtype": "bfloat16",
    "optim.moments_dtype": "bfloat16",
}


def changed(cfg: c.TrainConfig, values: dict) -> c.TrainConfig:
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        setattr(getattr(cfg, section) if section else cfg, field, value)
    return cfg


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_fields_that_may_change_exist(name):
    value = c.to_dict(config("x"))
    for part in name.split("."):
        value = value[part]


@pytest.mark.parametrize(
    ("name", "value"),
    [*MEMORY.items(), ("batch_rows", 16), ("optim.b2", 0.9), ("dtype", "bfloat16")],
)
def test_only_what_leaves_the_result_alone_may_change(tmp_path, name, value):
    then, now = config("x"), changed(config("x"), {name: value})
    (tmp_path / "config.json").write_text(json.dumps(c.to_dict(then)))
    if name in MEMORY:
        workdir.check(epath.Path(tmp_path), now)
    else:
        with pytest.raises(CheckpointError, match=f"{name}: .* then, {value!r} now"):
            workdir.check(epath.Path(tmp_path), now)


@pytest.mark.slow
def test_a_run_resumes_with_less_memory_and_with_more_again(store):
    """The same losses up to rounding; stored values are rounded to their new types."""
    settings = {"num_steps": 4, "train_parts": ("llm", "gen_encoder", "gen_decoder")}
    train.train(config("whole", **settings))
    train.train(config("less", **settings | {"num_steps": 2}))
    before = last_arrays("less")
    small = changed(config("less", **settings), MEMORY)
    small.num_steps = 3
    train.train(small)
    now = last_arrays("less")
    assert now["opt_state/1/0/mu/llm/embedding"].dtype == jnp.bfloat16
    frozen = "params/und_aligner/kernel"
    np.testing.assert_array_equal(now[frozen], before[frozen].astype(jnp.bfloat16))
    train.train(config("less", **settings))
    now = last_arrays("less")
    assert now["opt_state/1/0/mu/llm/embedding"].dtype == now[frozen].dtype == np.float32
    for one, two in zip(read_metrics("whole"), read_metrics("less"), strict=True):
        for name in ("loss", "loss_ar", "loss_rf", "grad_norm"):
            np.testing.assert_allclose(two[name], one[name], rtol=2e-2, err_msg=name)


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_vae_and_tokenizer(store, capsys, monkeypatch):
    """Whatever lies where it began: another model, or nothing."""
    share_compiled_step(monkeypatch)
    save_start("models/a")
    settings = {"start": "models/a", "tokenizer": ""}
    train.train(config("whole", **settings))
    train.train(config("changed", num_steps=1, **settings))
    shutil.copytree("changed", "gone")
    save_start("models/a", seed=1)
    capsys.readouterr()
    train.train(config("changed", **settings))
    said = capsys.readouterr().out
    assert "this run's checkpoint" in said and "models/a" not in said
    shutil.rmtree("models/a")
    train.train(config("gone", **settings))
    whole = last_arrays("whole")
    for run in ("changed", "gone"):
        for name, x in last_arrays(run).items():
            np.testing.assert_array_equal(x, whole[name], err_msg=f"{run} {name}")

    save_start("models/b", seed=1)
    with pytest.raises(CheckpointError, match=r"start: 'models/a' then, 'models/b' now"):
        train.train(config("gone", start="models/b", tokenizer="", num_steps=6))


@pytest.mark.slow
def test_a_run_that_saved_nothing_yet_keeps_its_vae(store, monkeypatch):
    """Killed before its first checkpoint: `base/` is there, the other parts come from the start."""
    share_compiled_step(monkeypatch)
    save_start("models/a")
    settings = {"start": "models/a", "tokenizer": ""}
    train.train(config("whole", **settings))
    shutil.copytree("whole", "killed")
    shutil.rmtree("killed/checkpoints")
    begun, resumed = initialization.resolve_start(
        config("killed", **settings), epath.Path("killed").resolve()
    )
    assert not resumed and begun.start == "models/a"
    assert dict(begun.init) == {"vae": str(Path("killed/base").resolve())}
    train.train(config("killed", **settings))
    whole = last_arrays("whole")
    for name, x in last_arrays("killed").items():
        np.testing.assert_array_equal(x, whole[name], err_msg=name)
