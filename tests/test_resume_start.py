"""What a run begins from: a start of the same config only; and what it goes on with when that has
changed on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from helpers.runs import HUB, config, fresh_params, last_arrays

from janusflow_jax import config as c, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.training import init as initialization


def start(path: str, seed: int = 0, **fields) -> str:
    """A whole model of the test size at a path, of a config with other fields."""
    model = config("x").model
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(model, section), field, value)
    params, vae = jax.device_get(fresh_params(model, jax.random.key(seed)))
    model_folder.save_model(
        path,
        model_cfg=model,
        params=params,
        vae=vae,
        hub_files=epath.Path(HUB),
        extra={},
        overwrite=True,
    )
    return path


def test_a_start_of_another_config_is_refused_field_by_field(tmp_path):
    other = {"vae__scaling_factor": 0.5, "llm__rope_theta": 5e5, "und__norm_eps": 1e-5}
    path = start(str(tmp_path / "other"), **other)
    with pytest.raises(c.ConfigError) as error:
        initialization.initial_params(config("x", start=path, tokenizer=""))
    said = str(error.value)
    for field, value in other.items():
        flag = f"--config.model.{field.replace('__', '.')}={value!r}"
        assert flag in said, said
    assert said.count("was made with") == 3

    cfg = config("x", start=path, tokenizer="")
    cfg.model.vae.scaling_factor, cfg.model.llm.rope_theta = 0.5, 5e5
    cfg.model.und.norm_eps = 1e-5
    params, _, hub, origins = initialization.initial_params(cfg)
    assert set(origins.values()) == {path} and "llm" in params and Path(hub).exists()


def test_only_what_a_start_gives_must_agree(tmp_path):
    """Its language model's fields say nothing where only its VAE is taken."""
    path = start(str(tmp_path / "other"), llm__rope_theta=5e5, gen__norm_eps=1e-5)
    initialization.initial_params(config("x", init=(("vae", path),)))
    with pytest.raises(c.ConfigError, match=r"gen_decoder was made with model.gen.norm_eps"):
        initialization.initial_params(config("x", init=(("vae", path), ("gen_decoder", path))))


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_vae_and_tokenizer(store, capsys):
    """Whatever lies where it began: another model, or nothing."""
    start("models/a")
    settings = {"start": "models/a", "tokenizer": ""}
    train.train(config("whole", **settings))
    train.train(config("changed", num_steps=2, **settings))
    shutil.copytree("changed", "gone")
    start("models/a", seed=1)
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

    start("models/b", seed=1)
    with pytest.raises(CheckpointError, match=r"start: 'models/a' then, 'models/b' now"):
        train.train(config("gone", start="models/b", tokenizer="", num_steps=6))


@pytest.mark.slow
def test_a_run_that_saved_nothing_yet_keeps_its_vae(store):
    """Killed before its first checkpoint: `base/` is there, the other parts come from the start."""
    start("models/a")
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
