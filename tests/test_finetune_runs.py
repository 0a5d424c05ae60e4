"""Fine-tuning runs: adapters on a mesh, bfloat16 states through a save, folders by name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import runs
from helpers.published import to_model
from helpers.runs import HUB, ROOT, config, fresh_params

import janusflow_jax
from janusflow_jax import config as c, hub, pipeline, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, loader, sources
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.training import init as initialization, step as train_step


def lora_config(workdir, **changes) -> c.TrainConfig:
    cfg = config(workdir, train_parts=("gen_decoder",), **changes)
    cfg.lora = c.LoraConfig(rank=4, alpha=8.0)
    return cfg


@pytest.mark.slow
def test_adapters_on_a_mesh_are_those_of_one_device(store):
    cfg = runs.tiny_config("x", train_parts=("gen_decoder",))
    cfg.lora = c.LoraConfig(rank=4, alpha=8.0)
    batches = loader.Loader(cfg.data, cfg.model, chat_format.ChatFormat.load(str(HUB)), 8)
    feed = batches.batches(0)
    data = [next(feed)[0] for _ in range(3)]  # b leaves zero in the first, then a moves too
    feed.close()
    params, vae_params = jax.device_get(fresh_params(cfg.model, jax.random.key(0)))
    params = jax.tree.map(lambda x: x + np.float32(0.01), params)
    found, adapters = {}, {}
    for shape in ((1, 1, 1), (2, 2, 2)):
        sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
        mesh = sharding.make_mesh(c.MeshConfig(**sizes), jax.devices()[: int(np.prod(shape))])
        with jax.set_mesh(mesh):
            state, step, found[shape] = (
                initialization.create_state(cfg, mesh, params, vae_params),
                None,
                [],
            )
            for batch in data:
                batch = sharding.put_batch(batch, mesh, 8)
                step = step or train_step.jit_train_step(cfg, mesh, state, batch)
                state, out = step(state, batch)
                found[shape].append([float(out[n]) for n in ("loss", "grad_norm")])
        block = state["params"]["llm"]["layers"]["block"]
        adapters[shape] = jax.device_get(block)
    q, down = block["attn"]["q"], block["mlp"]["down"]
    assert q["lora_a"].sharding.shard_shape(q["lora_a"].shape) == q["lora_a"].shape
    layers, rank, width = q["lora_b"].shape
    assert q["lora_b"].sharding.shard_shape(q["lora_b"].shape) == (layers, rank, width // 2)
    layers, width, rank = down["lora_a"].shape
    assert down["lora_a"].sharding.shard_shape(down["lora_a"].shape) == (layers, width // 2, rank)
    moment = state["opt_state"][1][0].mu["llm"]["layers"]["block"]["mlp"]["down"]["lora_a"]
    assert moment.sharding == down["lora_a"].sharding
    one, many = found.values()
    np.testing.assert_allclose(many, one, rtol=2e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(adapters[(1, 1, 1)]))


@pytest.mark.slow
def test_a_run_in_bfloat16_resumes_bit_for_bit_and_is_exported(store, tmp_path, monkeypatch):
    """Frozen parts and moments of two bytes go through checkpoints, `load` and an export."""
    runs.share_compiled_step(monkeypatch)

    def light(workdir, **changes):
        cfg = lora_config(workdir, frozen_dtype="bfloat16", **changes)
        cfg.optim = dataclasses.replace(cfg.optim, moments_dtype="bfloat16", ema=0.0)
        return cfg

    train.train(light("whole"))
    train.train(light("parts", num_steps=2))
    train.train(light("parts", num_steps=4))
    step = "checkpoints/4"
    arrays = {}
    for run in ("whole", "parts"):
        read = {
            n: model_folder.load_tree(tmp_path / run / step / n) for n in ("params", "opt_state")
        }
        arrays[run] = trees.flatten(jax.device_get(read))
    a, b = arrays["whole"], arrays["parts"]
    assert a.keys() == b.keys() and len(a) > 100
    for name, x in a.items():
        assert x.dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(x), np.asarray(b[name]), err_msg=name)
    kinds = {n: x.dtype for n, x in a.items() if np.ndim(x)}
    base = trees.flatten(model_folder.load_model("whole/base").params)  # what checkpoints leave out
    frozen = {x.dtype for n, x in base.items() if n.startswith("und_encoder")}
    moments = {t for n, t in kinds.items() if n.startswith("opt_state/")}
    assert frozen == moments == {jnp.dtype(jnp.bfloat16)}
    assert kinds["params/gen_decoder/out_conv/kernel"] == jnp.float32
    losses = [x["loss"] for x in runs.read_metrics("whole")]
    assert len(losses) == 4 and np.isfinite(losses).all()

    said = trees.flatten(model_folder.load_model("whole").params)
    hub.export("whole", "out", log=lambda _: None)
    to_model("out", "out/vae", "again")
    again = trees.flatten(model_folder.load_model("again").params)
    assert len(again) > 80
    for name, x in again.items():
        want = np.asarray(said[name], np.float32)
        np.testing.assert_array_equal(np.asarray(x, np.float32), want, err_msg=name)
    args = {"num_steps": 2, "output": "latent", "seed": 5}
    one, two = (
        pipeline.load(x, dtype="float32").generate("a fox", **args) for x in ("whole", "again")
    )
    np.testing.assert_allclose(one, two, atol=1e-5)


def finetune(arg: str) -> c.TrainConfig:
    return runpy.run_path(str(ROOT / "configs" / "finetune.py"))["get_config"](arg)


def test_folders_are_named_in_the_argument():
    cfg = finetune("generate,replay,mine=gs://b/cats/,watch=data/x")
    assert cfg.name == "finetune-cats-x-generate-replay"
    for listed in (cfg.data.sources, cfg.evaluate.sources):  # the guard looks where training does
        assert [s.path for s in listed] == ["gs://b/cats/", "data/x", "data/x"]
    assert finetune("generate,emoji,mine=data/cats").evaluate.sources[0].split == "heldout"
    assert finetune("generate,emoji").evaluate.sources[0].split == "heldout_pairs"
    for wrong in ("generate,min=data/x", "generate,mine="):
        with pytest.raises(c.ConfigError, match="expected mine=DIR or watch=DIR"):
            finetune(wrong)


def test_a_folder_in_the_home_has_its_held_out_split(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "drawings").mkdir()
    info = {"splits": [{"name": "train"}, {"name": "heldout_pairs"}]}
    (tmp_path / "drawings" / "dataset_info.json").write_text(json.dumps(info))
    cfg = finetune("generate,mine=~/drawings")
    assert cfg.evaluate.sources[0].split == "heldout_pairs"


def test_the_words_of_0_1_still_work_and_find_their_run():
    old, new = (
        finetune("paint,read,lora,kept=data/x"),
        finetune("generate,understand,lora,watch=data/x"),
    )
    assert old.name == "finetune-x-lora-paint-read"
    assert dataclasses.replace(old, name=new.name) == new


def test_the_twin_takes_given_folders():
    cfg = finetune("generate,replay,mine=/nope,test")
    for listed in (cfg.data.sources, cfg.evaluate.sources):
        assert [s.path for s in listed] == ["/nope", "data/openmoji", "data/openmoji"]
    with pytest.raises(c.ConfigError, match="/nope: expected a prepared data set"):
        initialization.check_files(finetune("generate,mine=/nope,test"))
    cfg = finetune("understand,watch=data/x,test")
    assert [s.path for s in cfg.evaluate.sources] == ["data/openmoji", "data/x", "data/x"]
    assert [s.split for s in cfg.evaluate.sources] == ["heldout_pairs", "heldout", "heldout"]


def test_sizes_that_exclude_each_other_are_refused():
    with pytest.raises(c.ConfigError, match="expected one of emoji .*, 256 .* got 256 and emoji"):
        finetune("generate,emoji,256")
    assert finetune("generate,256").model.image_size == 256


def test_a_missing_held_out_split_is_told_with_what_makes_it(monkeypatch, tmp_path):
    def opened(path, split):
        if split == "heldout":
            raise DataError(f"{path}: expected split one of ['train']; got 'heldout'")

    monkeypatch.setattr(sources, "open_source", opened)
    with pytest.raises(c.ConfigError, match=r"(?s)got 'heldout'.*--heldout"):
        initialization.check_files(finetune("generate,emoji,mine=data/cats"))
    # the drawings' folders have a split of another name, by whatever argument they are given
    monkeypatch.chdir(tmp_path)
    Path("data/openmoji").mkdir(parents=True)
    info = {"splits": [{"name": "train"}, {"name": "heldout_pairs"}]}
    Path("data/openmoji/dataset_info.json").write_text(json.dumps(info))
    for arg in (
        "generate,mine=data/openmoji",
        "generate,emoji,mine=data/openmoji/",
        "understand,emoji",
    ):
        cfg = finetune(arg)
        split = {s.path: s.split for s in cfg.evaluate.sources}
        assert split[cfg.data.sources[0].path] == "heldout_pairs"


def test_a_source_of_a_list_can_be_set_by_a_flag():
    c.check_field("data.sources[0].path")
    c.check_field("evaluate.sources[2].split")
    with pytest.raises(c.ConfigError, match=r"sources\[0\]: expected one of name, .*'path'"):
        c.check_field("data.sources[0].pat")
    with pytest.raises(c.ConfigError, match="got 'source'; did you mean 'sources'"):
        c.check_field("data.source[0].path")


def test_the_packages_load_takes_what_the_pipelines_does():
    ours, theirs = (inspect.signature(f).parameters for f in (janusflow_jax.load, pipeline.load))
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
