"""Vision towers that JanusFlow's is not: SigLIP 2, other sizes, other activations."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import golden
from helpers.parts import TOWERS as FOLDER
from safetensors.numpy import load_file, save_file

from janusflow_jax import config
from janusflow_jax.config import checks
from janusflow_jax.config.errors import ConvertError
from janusflow_jax.hub import assemble_parts, source, tensors as hub_tensors, towers
from janusflow_jax.models import siglip
from janusflow_jax.training import encode_cache

LIMIT = 1e-5


def read(folder, image_size=0):
    """A tower's config and parameters."""
    opened = source.Source(folder)
    cfg, rules, _ = assemble_parts.open_siglip(opened, lambda line: None, image_size)
    module = siglip.Siglip(cfg)
    pixels = jnp.zeros((1, cfg.image_size, cfg.image_size, 3))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), pixels)["params"])
    want = {"und_encoder": shapes}
    hub_tensors.check(opened.tensors, rules, want, opened.folder)
    return cfg, hub_tensors.from_torch(opened.tensors, rules, want)["und_encoder"]


def error(folder, image_size=0):
    expected = load_file(folder / "expected.safetensors")
    cfg, params = read(folder, image_size)
    run = jax.jit(lambda p, x: siglip.Siglip(cfg).apply({"params": p}, x))
    return golden.error(run(params, golden.nhwc(expected["images"])), expected["features"])


def test_a_naflex_tower_of_fixed_size_computes_what_transformers_does():
    assert error(FOLDER / "naflex", 24) < LIMIT
    cfg, _ = read(FOLDER / "naflex")
    assert (cfg.image_size, cfg.num_tokens, cfg.act) == (16, 16, "gelu_tanh")


def test_pixels_beyond_the_last_patch_are_left_out():
    assert error(FOLDER / "patch14") < LIMIT


def test_the_activation_is_the_folders(tmp_path):
    shutil.copytree(FOLDER / "patch14", tmp_path / "tower")
    file = tmp_path / "tower" / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"hidden_act": "gelu"}))
    assert error(tmp_path / "tower") > 10 * LIMIT
    file.write_text(json.dumps(values | {"hidden_act": "quick_gelu"}))
    with pytest.raises(ConvertError, match="hidden_act: expected one of gelu, .*got 'quick_gelu'"):
        read(tmp_path / "tower")


@pytest.mark.parametrize("size", [20, 40])
def test_positions_of_another_size_are_interpolated(size):
    """Linear interpolation keeps a linear function, away from the border."""
    side = size // 5
    rows, columns = np.mgrid[:4, :4].reshape(2, -1, 1).astype(np.float32)
    table = np.concatenate([rows, columns], -1)
    got = towers.resized(table, side).reshape(side, side, 2)
    at = (np.arange(side) + 0.5) * 4 / side - 0.5
    want = np.stack(np.meshgrid(at, at, indexing="ij"), -1)
    inner = slice(1, -1)
    np.testing.assert_allclose(got[inner, inner], want[inner, inner], atol=1e-6)
    cfg, params = read(FOLDER / "patch14", size)
    assert cfg.image_size == size and params["pos_embedding"].shape == (side**2, 16)
    stored = load_file(FOLDER / "patch14" / "model.safetensors")
    stored = stored["embeddings.position_embedding.weight"]
    if side == 4:
        np.testing.assert_array_equal(params["pos_embedding"], stored)
    else:
        np.testing.assert_array_equal(params["pos_embedding"], towers.resized(stored, side))


def test_a_patch_embedding_of_another_shape_is_named(tmp_path):
    shutil.copytree(FOLDER / "naflex", tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    tensors = load_file(file)
    tensors["embeddings.patch_embedding.weight"] = np.zeros((16, 47), np.float32)
    save_file(tensors, file)
    with pytest.raises(ConvertError, match=r"patch_embedding\.weight: expected shape"):
        read(tmp_path / "tower")


def test_a_tower_of_other_tokens_names_the_patch_that_fits():
    cfg = config.model_config("1p3b")
    cfg.und.patch_size = 14  # SO400M at 384 px
    (problem,) = checks.model_problems(cfg)
    assert "expected 576 tokens an image" in problem and "a tower of patch 16" in problem
    assert problem.endswith("got 729")


def test_cached_features_belong_to_an_activation():
    cfg, params = config.model_config("test"), {"kernel": np.ones(3, np.float32)}
    exact = encode_cache.siglip_digest(cfg, params)
    cfg.und.act = "gelu_tanh"
    assert encode_cache.siglip_digest(cfg, params) != exact


@pytest.mark.slow
def test_random_towers_of_transformers_compute_the_same(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "data")
    make_towers = __import__("make_towers")
    torch.manual_seed(1)
    sizes = make_towers.SIZES | {"hidden_size": 48, "num_attention_heads": 3}
    patches = {"patch_size": 8, "num_patches": 25}
    make_towers.save(tmp_path / "larger", make_towers.naflex(sizes | patches, 7), 56)
    assert error(tmp_path / "larger", 56) < LIMIT
    make_towers.save(tmp_path / "smaller", make_towers.naflex(sizes | patches, 3), 24)
    assert error(tmp_path / "smaller", 24) < LIMIT
    make_towers.save(tmp_path / "own", make_towers.naflex(sizes | patches, 5), 40)
    assert error(tmp_path / "own") < LIMIT
    for act in ("gelu", "gelu_pytorch_tanh"):  # 512 px of patch 16 has 32 x 32 tokens too
        tower = make_towers.fixed(sizes | {"image_size": 128, "patch_size": 4, "hidden_act": act})
        make_towers.save(tmp_path / act, tower, 128)
        assert error(tmp_path / act) < LIMIT
