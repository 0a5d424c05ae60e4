"""The whole loop at test size: train, resume, shard, refuse, and use what it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from helpers.runs import (
    HUB,
    ROOT,
    config,
    fresh_params,
    last_arrays,
    read_metrics,
    record,
    share_compiled_step,
    tiny_config,
)
from ml_collections import config_flags

from experiments import small_scale
from janusflow_jax import config as c, pipeline, train
from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, DataError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.planning import compile as plan_compile
from janusflow_jax.training import init as initialization, step as train_step


def check_resumed_equals_whole(num_steps: int) -> None:
    """Of the runs "whole" and "resumed"."""
    a, b = last_arrays("whole"), last_arrays("resumed")
    assert a.keys() == b.keys() and len(a) > 100
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    whole, resumed = read_metrics("whole"), read_metrics("resumed")
    assert [x["step"] for x in resumed] == [*range(1, num_steps + 1)]
    assert [x["loss"] for x in whole] == [x["loss"] for x in resumed]


def test_a_tiny_run_resumes_bit_for_bit(store, monkeypatch):
    """On a mesh of two devices. Both runs use one compiled step and share nothing else."""
    share_compiled_step(monkeypatch)
    saves = {"save_every_steps": 1, "mesh": c.MeshConfig(fsdp=2)}
    train.train(tiny_config("whole", **saves))
    shutil.copytree("whole", "resumed")
    shutil.rmtree("resumed/checkpoints/2")
    train.train(tiny_config("resumed", **saves))
    check_resumed_equals_whole(2)


@pytest.mark.slow
def test_a_run_shows_itself_and_is_used_like_any_model(store, tmp_path):
    cfg = tiny_config("whole")
    cfg.prompts, cfg.heldout = ("a red fox", "a blue fox"), cfg.data.sources[:1]
    train.train(cfg)
    assert small_scale.has_ended(Path("whole"))
    assert sorted(p.name for p in Path("whole/samples").iterdir()) == [
        "captions_000002.jsonl",
        "captions_000002.png",
        "sheet_000002.png",
    ]
    model = pipeline.load("whole")
    args = {"num_steps": 2, "output": "latent"}
    both = model.generate(["a red fox", "a very blue fox in the snow"], seed=3, **args)
    alone = model.generate("a very blue fox in the snow", seed=4, **args)
    np.testing.assert_allclose(both[1:], alone, atol=1e-5)
    assert isinstance(model.chat("What is this?", [record(0)["image"]], max_new_tokens=4), str)


@pytest.mark.slow
def test_steps_are_traced(store):
    train.train(tiny_config("run", num_steps=3), profile=(2, 3))
    assert list(Path("run/profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(("text", "steps"), [("10:13", (10, 14)), ("1:1", (1, 2))])
def test_the_steps_of_a_profile(text, steps):
    assert train.steps_to_profile(text) == steps
    for wrong in ("", "5", "0:3", "4:3", "a:b", "1:2:3"):
        with pytest.raises(c.ConfigError, match="FIRST:LAST"):
            train.steps_to_profile(wrong)


@pytest.mark.slow
def test_the_loss_is_the_mixture_of_the_sources(store):
    """With two accumulated parts, which must not change what the means are over."""
    cfg = tiny_config("run", loss=c.LossConfig(norm="mixture"))
    cfg.optim.accum_steps = 2
    train.train(cfg)
    (_, weights), *_ = cfg.data.phases()
    shares = {s.label: w / sum(weights) for s, w in zip(cfg.data.sources, weights, strict=True)}
    generate = sum(shares[s.label] for s in cfg.data.sources if s.task == "generate")
    for line in read_metrics("run"):
        losses = {
            name.split("/")[1]: line[name]
            for name in line
            if name.startswith(("loss_ar/", "loss_rf/")) and name.split("/")[1] in shares
        }
        want = sum(shares[name] * loss for name, loss in losses.items())
        want += generate * line["loss_repa"]
        assert losses.keys() == shares.keys() and all(losses.values())
        np.testing.assert_allclose(line["loss"], want, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("accum", "slices", "norm"), [(1, 2, "mixture"), (2, 1, "per_sample")])
def test_sharded_step_equals_single_device(store, accum, slices, norm):
    cfg = tiny_config("x", loss=c.LossConfig(norm=norm))
    cfg.optim.accum_steps = accum
    chat = chat_format.ChatFormat.load(str(HUB))
    batches = loader.Loader(cfg.data, cfg.model, chat, 8 * accum).batches(0)
    data = [next(batches)[0] for _ in range(2)]
    batches.close()
    key = jax.random.key(0)
    params, vae_params = jax.device_get(fresh_params(cfg.model, key))
    # The last kernels start at zero; these do not, so that every part matters.
    params = jax.tree.map(lambda x: x + np.float32(0.01), params)
    losses, sharded = {}, (2, 2, 2, slices)
    for shape in ((1, 1, 1, 1), sharded):
        sizes = dict(zip(("data", "fsdp", "tensor", "slices"), shape, strict=True))
        devices = jax.devices()[: int(np.prod(shape[:3]))]
        mesh = sharding.make_mesh(c.MeshConfig(**sizes), devices)
        with jax.set_mesh(mesh):
            state = initialization.create_state(cfg, mesh, params, vae_params)
            step = None
            losses[shape] = []
            for batch in data:
                batch = sharding.put_batch(batch, mesh, 8 * accum)
                step = step or train_step.jit_train_step(cfg, mesh, state, batch)
                state, out = step(state, batch)
                losses[shape].append([float(out[n]) for n in ("loss", "loss_rf", "grad_norm")])
        if shape == sharded:
            kernel = state["params"]["llm"]["layers"]["block"]["mlp"]["up"]["kernel"]
            moment = state["opt_state"][1][0].mu["llm"]["layers"]["block"]["mlp"]["up"]["kernel"]
            layers, width, out = kernel.shape
            assert kernel.sharding.shard_shape(kernel.shape) == (layers, width // 2, out // 2)
            assert moment.sharding == kernel.sharding
    np.testing.assert_allclose(losses[sharded], losses[(1, 1, 1, 1)], rtol=2e-5)


def compile_step(cfg: c.TrainConfig) -> tuple:
    """The step of a config compiled for one device, and its parameter and batch shapes."""
    params, vae_params = jax.eval_shape(lambda: fresh_params(cfg.model, jax.random.key(0)))
    state, batch = plan_compile.state_shapes(cfg), plan_compile.batch_shapes(cfg)
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        lowered = train_step.jit_train_step(cfg, mesh, state, batch).lower(state, batch)
        return lowered.compile(), params, (vae_params, batch)


@pytest.mark.slow
def test_the_compiled_step_holds_nothing_for_what_is_frozen():
    """Its arguments are what is trained four times (with both moments and the EMA) and the rest
    once; without the LLM's weight gradients it computes a quarter less."""
    size = lambda t: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t))  # noqa: E731
    flops = []
    for train_parts in (c.MODEL_PARTS, ("gen_decoder", "llm/norm")):
        cfg = config("x", train_parts=train_parts, remat="none")
        compiled, params, rest = compile_step(cfg)
        trained, frozen = trees.split(params, parts_lib.trained_paths(cfg))
        expected = 4 * size(trained) + size(frozen) + size(rest)
        got = compiled.memory_analysis().argument_size_in_bytes
        assert expected <= got < expected + 1024  # counters and alignment
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 0.8 * flops[0]


@pytest.mark.slow
def test_one_bad_record_does_not_end_a_run_and_many_do(store):
    store[3]["image"] = store[3]["image"][:200]
    store[4]["captions"] = [""]
    train.train(tiny_config("some", num_steps=3))
    assert read_metrics("some")[-1]["bad_samples"] > 0
    for r in store:
        r["image"] = b"not a picture"
    with pytest.raises(DataError, match="at most"):
        train.train(tiny_config("many", num_steps=50))


def test_refuses_what_cannot_work(store, tmp_path):
    with pytest.raises(c.ConfigError, match="would start from random values"):
        train.train(tiny_config("a", allow_fresh=False))
    with pytest.raises(c.ConfigError, match="data.sources"):
        train.train(tiny_config("a", data=c.DataConfig()))
    with pytest.raises(c.ConfigError, match="nowhere: expected a model folder"):
        train.train(tiny_config("a", init=(("llm", "nowhere"),)))
    other = tiny_config("a", train_parts=("gen_head", "llm/layer"))
    other.init = (("llm", str(ROOT / "starts" / "emoji_llm")),)
    with pytest.raises(c.ConfigError, match="'llm/layer' is no path(?s:.*)kernel: expected shape"):
        initialization.find_start(other)
    Path("b").mkdir()
    Path("b/config.json").write_text(json.dumps(c.to_dict(tiny_config("b"))))
    with pytest.raises(CheckpointError, match="seed: 1 then, 2 now"):
        train.train(tiny_config("b", num_steps=3, seed=2))


def test_out_of_memory_says_what_to_do(monkeypatch, capsys):
    def fails(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of 24G, 30G\nallocations: ...")

    monkeypatch.setattr(train.app, "run", fails)
    monkeypatch.setattr(train.flags, "mark_flag_as_required", lambda _: None)
    with pytest.raises(SystemExit, match="1"):
        train.run()
    advice, error = capsys.readouterr().err.splitlines()
    assert "accum_steps" in advice and error == "RESOURCE_EXHAUSTED: of 24G, 30G"


def test_flags_change_fields_and_a_typo_is_named():
    values = flags.FlagValues()
    argv = ["train", f"--config={ROOT / 'configs' / 'emoji.py'}:test", "--config.optim.lr=0.5"]
    argv += ["--config.workdir=there", "--config.mesh.fsdp=2", "--config.tensorboard"]
    argv += ["--config.remat=True"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    cfg = values.config
    assert (cfg.optim.lr, cfg.workdir, cfg.mesh.fsdp, cfg.tensorboard) == (0.5, "there", 2, True)
    assert cfg.remat == "full"  # in 0.1 it was True or False
    c.check_field("optim.lr")
    with pytest.raises(c.ConfigError, match="config: .*got 'num_step'; did you mean 'num_steps'"):
        c.check_field("num_step")
    with pytest.raises(c.ConfigError, match="config.optim: expected one of name, lr.*got 'rate'"):
        c.check_field("optim.rate")
    with pytest.raises(c.ConfigError, match="optim.name: expected one of adamw, muon; got 'sgd'"):
        train.train(config("x", optim=c.OptimConfig(name="sgd")))


def test_empty_data_is_an_error(store):
    store.clear()
    with pytest.raises(DataError, match="none of its 0 records"):
        train.train(tiny_config("none"))
