"""Adapters: applied equals merged, the base stays, and they come back from a file."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import runs
from helpers.published import to_model
from helpers.runs import config, fresh_params

from janusflow_jax import config as c, hub, pipeline, train
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import checks as config_checks, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.hub import adapters
from janusflow_jax.models import janusflow, lora
from janusflow_jax.parallel import sharding, trees
from janusflow_jax.training import init as initialization
from tools import export_checkpoint

RANK = 4


def adapted(cfg: c.ModelConfig, targets=tuple(c.LORA_TARGETS)):
    """Parameters with adapters that do something."""
    params, _ = jax.device_get(fresh_params(cfg, jax.random.key(0)))
    key = jax.random.key(1)
    llm = lora.add(params["llm"], c.LoraConfig(rank=RANK, alpha=8.0, targets=targets), key)
    names = trees.flatten(llm)
    for i, name in enumerate(sorted(n for n in names if n.endswith("lora_b"))):
        names[name] = 0.05 * jax.random.normal(jax.random.fold_in(key, i), names[name].shape)
    return params, {**params, "llm": trees.unflatten(names)}


@pytest.mark.slow
def test_applied_equals_merged():
    cfg = c.model_config("test")
    plain, params = adapted(cfg)
    model = janusflow.JanusFlow(cfg)
    ids = jax.random.randint(jax.random.key(2), (2, 12), 0, cfg.llm.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(12), ids.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((12, 12), bool)), (2, 12, 12))

    @jax.jit
    def logits(params):
        run = {"params": params}
        x = model.apply(run, ids, method="embed_tokens")
        hidden, _, _ = model.apply(run, x, positions, mask, method="run_llm")
        return model.apply(run, hidden, method="logits")

    merged = lora.merge(params)
    assert trees.flatten(merged).keys() == trees.flatten(plain).keys()
    one, two, base = logits(params), logits(merged), logits(plain)
    np.testing.assert_allclose(one, two, atol=2e-5)
    assert np.abs(np.asarray(one - base)).max() > 0.01
    untrained = lora.add(plain["llm"], c.LoraConfig(rank=RANK), jax.random.key(3))
    np.testing.assert_array_equal(logits({**plain, "llm": untrained}), base)


def lora_config(workdir, **changes) -> c.TrainConfig:
    cfg = config(workdir, train_parts=(), **changes)
    cfg.lora = c.LoraConfig(rank=RANK, alpha=8.0, targets=("q", "v", "down"))
    return cfg


@pytest.mark.slow
def test_the_base_takes_no_memory_of_the_optimizer():
    cfg = lora_config("x", frozen_dtype="bfloat16")
    cfg.optim = dataclasses.replace(cfg.optim, moments_dtype="bfloat16")
    params, vae_params = jax.device_get(fresh_params(cfg.model, jax.random.key(0)))
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = initialization.create_state(cfg, mesh, params, vae_params)
    trained = trees.flatten(state["params"])
    assert set(trained) == {
        f"llm/layers/block/{part}/{leaf}"
        for part in ("attn/q", "attn/v", "mlp/down")
        for leaf in ("lora_a", "lora_b")
    }
    assert parts_lib.trained_parts(cfg) == set()
    moments = [x for x in jax.tree.leaves(state["opt_state"]) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained.values())
    assert {x.dtype for x in moments} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in trained.values()} == {jnp.dtype(jnp.float32)}
    frozen = jax.tree.leaves((state["frozen"], state["vae"]))
    assert {x.dtype for x in frozen} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.slow
def test_a_run_trains_them_alone_and_they_come_back(store, tmp_path, monkeypatch):
    """Trained, resumed bit for bit, loaded merged, saved alone, put onto the base again."""
    train.train(config("base", num_steps=2))
    start = {"start": str(tmp_path / "base"), "allow_fresh": False, "num_steps": 4}
    runs.share_compiled_step(monkeypatch)
    train.train(lora_config("whole", **start))
    train.train(lora_config("parts", **{**start, "num_steps": 2}))
    train.train(lora_config("parts", **start))
    a, b = runs.last_arrays("whole"), runs.last_arrays("parts")
    assert a.keys() == b.keys()
    for name, x in a.items():
        np.testing.assert_array_equal(x, b[name], err_msg=name)

    base = trees.flatten(model_folder.load_model("base").params)
    apart = trees.flatten(model_folder.load_model("whole", merged=False).params)
    merged = trees.flatten(model_folder.load_model("whole").params)
    assert merged.keys() == base.keys()
    for name, x in base.items():
        np.testing.assert_array_equal(apart[name], x, err_msg=name)  # the base has not moved
        moved = name.rpartition("/")[0] in [n.rpartition("/")[0] for n in apart if "lora_a" in n]
        assert np.array_equal(merged[name], x) == (not moved), name

    hub.export("whole", "exported", log=lambda line: None)
    to_model("exported", "exported/vae", "again")
    again = trees.flatten(model_folder.load_model("again").params)
    for name, x in again.items():
        np.testing.assert_array_equal(x, merged[name], err_msg=name)
    assert len(again) > 80

    message = hub.save_adapter("whole", "adapter")
    assert "rank 4" in message
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (RANK, 8.0)
    assert about["target_modules"] == ["q_proj", "v_proj", "down_proj"]
    one, two = pipeline.load("whole"), pipeline.load("base", adapter="adapter")
    args = {"num_steps": 2, "output": "latent", "seed": 5}
    np.testing.assert_allclose(
        one.generate("a red fox", **args), two.generate("a red fox", **args), atol=1e-5
    )
    plain = pipeline.load("base").generate("a red fox", **args)
    assert np.abs(np.asarray(plain - one.generate("a red fox", **args))).max() > 0
    with pytest.raises(ConvertError, match="another base"):
        pipeline.load("whole", adapter="adapter")
    with pytest.raises(CheckpointError, match="exists"):
        hub.save_adapter("whole", "adapter")
    with pytest.raises(ConvertError, match="no adapters"):
        hub.save_adapter("base", "other")
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ConvertError, match="adapter_config.json"):
        pipeline.load("base", adapter="adapter")


def test_adapters_that_do_not_fit_are_all_named(tmp_path, golden_folder):
    pytest.importorskip("safetensors")
    from safetensors.numpy import load_file, save_file

    params = model_folder.load_model(golden_folder).params["llm"]
    cfg = c.LoraConfig(rank=2, targets=("q",))
    llm = lora.add(params, cfg, jax.random.key(0))
    folder = tmp_path / "adapter"
    folder.mkdir()
    node = llm["layers"]["block"]["attn"]["q"]
    tensors = {}
    for i in range(len(node["kernel"])):
        name = f"base_model.model.language_model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = np.asarray(node["lora_a"][i]).T.copy()
        tensors[f"{name}.lora_B.weight"] = np.ones(np.asarray(node["lora_b"][i]).T.shape, "f4")
    about = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file)
    with pytest.warns(UserWarning, match="base_sha256"):
        got = adapters.apply(params, folder)["layers"]["block"]["attn"]["q"]["kernel"]
    want = np.asarray(node["kernel"]) + 2.0 * np.asarray(node["lora_a"]).sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want, atol=1e-5)  # as PEFT adds them: alpha / r x B A

    for change, says in (("{", "expected"), (json.dumps({"r": 2}), "lora_alpha")):
        (folder / "adapter_config.json").write_text(change)
        with pytest.raises((ConvertError, CheckpointError), match=says):
            adapters.apply(params, folder)
    (folder / "adapter_config.json").write_text(json.dumps(about))

    wrong = load_file(file)
    first = next(iter(wrong))
    wrong["what.weight"] = wrong.pop(first)
    second = next(n for n in wrong if n.endswith("lora_B.weight"))
    wrong[second] = wrong[second][:, :1].copy()
    save_file(wrong, file)
    with pytest.raises(ConvertError) as error:
        adapters.apply(params, folder)
    for text in (f"{first}: missing", "what.weight: unknown", f"{second}: expected shape"):
        assert text in str(error.value)
    shutil.rmtree(folder)
    with pytest.raises(ConvertError, match="expected an adapter"):
        adapters.apply(params, folder)


@pytest.mark.parametrize(
    ("ema", "asked", "message"),
    [(0.99, "ema", "ema"), (0.99, "params", "params"), (0.0, "ema", "params")],
)
def test_an_adapter_records_its_weights(tmp_path, monkeypatch, ema, asked, message):
    cfg = lora_config("x")
    cfg.optim.ema = ema
    _, params = adapted(cfg.model, cfg.lora.targets)
    meta = {"config": c.to_dict(cfg), "step": 1}
    loaded = model_folder.LoadedModel(cfg.model, params, None, epath.Path("hub"), "run", meta)
    monkeypatch.setattr(model_folder, "load_model", lambda *args, **how: loaded)
    hub.save_adapter("run", tmp_path / "adapter", weights=asked)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["janusflow_jax"]["weights"] == message
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # our own say which base they are of
        adapters.apply(params["llm"], tmp_path / "adapter")


def test_a_model_folder_has_no_adapters_to_export(tmp_path):
    model = runs.ROOT / "starts" / "emoji_llm"
    with pytest.raises(ConvertError, match="no adapters"):
        export_checkpoint.main(
            ["--model", str(model), "--adapter-only", "--out", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_a_run_tells_what_of_its_adapters_trains(capsys):
    cfg = lora_config("x")
    plain, vae_params = jax.device_get(fresh_params(cfg.model, jax.random.key(0)))
    initialization.print_origins(cfg, plain, vae_params, dict.fromkeys([*plain, "vae"], "fresh"))
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("llm"))
    leaves = trees.flatten({"llm": lora.add(plain["llm"], cfg.lora, jax.random.key(0))})
    whole = sum(x.size for x in leaves.values())
    trained = sum(leaves[name].size for name in parts_lib.lora_paths(cfg.lora))
    assert line.split()[1:3] == [f"{whole:,}", f"{trained:,}"]


def test_what_cannot_be_adapted_is_an_error():
    cfg = lora_config("x")
    assert not config_checks.train_problems(cfg)
    cfg.lora = c.LoraConfig(rank=2, targets=("q", "head"))
    cfg.train_parts, cfg.frozen_dtype = ("llm", "gen_head"), "float16"
    cfg.optim.moments_dtype, cfg.optim.b2 = "bfloat16", 0.999
    message = "\n".join(config_checks.train_problems(cfg))
    for text in ("lora.targets", "['llm']", "frozen_dtype", "moments_dtype"):
        assert text in message
