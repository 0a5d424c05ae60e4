"""The autoencoders of FLUX.1, SD 3, FLUX.2 and SDXL's relatives, beside diffusers'."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import vaes
from safetensors.numpy import load_file

from janusflow_jax import config
from janusflow_jax.config import checks
from janusflow_jax.hub import configs as hub_configs
from janusflow_jax.models import encode, vae
from janusflow_jax.training import encode_cache

LIMIT = 1e-5


@pytest.mark.parametrize("form", ["flux1", "flux2"])
def test_an_autoencoder_computes_what_diffusers_does(form):
    folder = vaes.FOLDER / form
    errors = vaes.errors(folder, load_file(folder / "expected.safetensors"))
    assert max(errors.values()) < LIMIT, errors


@pytest.mark.slow
@pytest.mark.parametrize("form", ["flux1", "flux2", "mean_std"])
def test_random_autoencoders_of_diffusers_compute_the_same(form, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "data")
    make_vaes = __import__("make_vaes")
    torch.manual_seed(1)
    sizes = {
        "block_out_channels": [16, 24, 32],
        "layers_per_block": 2,
        "norm_num_groups": 8,
        **({"decoder_block_out_channels": [8, 16, 24]} if form == "flux2" else {}),
    }
    model, values = make_vaes.build(form, sizes)
    make_vaes.save(tmp_path, model, values)
    expected = make_vaes.compute(model, values, 24)
    errors = vaes.errors(tmp_path, {name: x.numpy() for name, x in expected.items()})
    assert max(errors.values()) < LIMIT, errors


def test_each_number_of_four_channels_stands_at_its_place_of_the_cell():
    cfg = config.VaeConfig(latent_channels=2, scaling_factor=1.0, shift=tuple(map(float, range(8))))
    got = np.asarray(vae.unscale(cfg, jnp.zeros((1, 4, 4, 2))))[0]
    for channel in range(2):  # FLUX.2: channel * 4 + 2 * y + x
        cell = channel * 4 + np.array([[0, 1], [2, 3]])
        np.testing.assert_array_equal(got[..., channel], np.tile(cell, (2, 2)))


@pytest.mark.parametrize("count", [0, 1, 3, 12])
def test_unscale_is_the_inverse_of_scale(count):
    rng = np.random.default_rng(count)
    shift, std = (tuple(rng.uniform(0.5, 2, count).tolist()) for _ in range(2))
    cfg = config.VaeConfig(latent_channels=3, scaling_factor=0.3, shift=shift, std=std)
    x = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
    z = vae.scale(cfg, x)
    assert np.abs(z - 0.3 * x).max() > 0.1 or not count
    np.testing.assert_allclose(vae.unscale(cfg, z), x, atol=1e-6)


def test_the_released_autoencoder_is_scaled_by_one_product():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 4)), jnp.float32)
    np.testing.assert_array_equal(vae.scale(config.VaeConfig(), x), x * np.float32(0.13025))
    np.testing.assert_array_equal(vae.unscale(config.VaeConfig(), x), x / np.float32(0.13025))


@pytest.mark.parametrize("form", ["flux1", "flux2"])
def test_latents_from_a_cache_are_those_of_the_run(form):
    """A cache holds latents before they are scaled."""
    vae_cfg, params = vaes.read(vaes.FOLDER / form)
    cfg = config.model_config("test", 16)
    cfg.vae = vae_cfg
    encoders = encode_cache.Encoders(cfg, params, None)
    fields = {"task": "generate", "split": "train", "crops": 1, "seed": 0, "shard_records": 1}
    fields |= {"dtype": "float32", "computed_in": "float32"}
    manifest = encode_cache.plan([], encoders, **fields)
    pixels = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8))
    stored = encode_cache.make_encode(encoders, manifest, jax.devices()[:1])(pixels)["latents"]
    assert stored.shape[1:] == (2, *cfg.latent_shape) == (2, 8, 8, vae_cfg.latent_channels)
    noise = jnp.asarray(np.random.default_rng(1).normal(size=stored[:, 0].shape), jnp.float32)
    cached = encode.scaled_latents(stored[:, 0], stored[:, 1], noise, cfg)
    params = jax.tree.map(jnp.asarray, params)
    online = encode.encode_latents(params, pixels[:, None], noise[:, None], cfg, jnp.float32)
    np.testing.assert_allclose(cached, online[:, 0], atol=1e-5)
    np.testing.assert_allclose(
        vae.unscale(vae_cfg, cached) - stored[:, 0], jnp.exp(0.5 * stored[:, 1]) * noise, atol=1e-4
    )


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"shift_factor": 0.0609}, {"shift": (0.0609,)}),
        ({"shift_factor": 0.0}, {}),
        (
            {"shift_factor": 1, "latents_mean": [1, -2, 3, 0], "latents_std": [1, 2, 3, 0.5]},
            {"shift": (1.0, -2.0, 3.0, 0.0), "std": (1.0, 2.0, 3.0, 0.5)},
        ),
        ({"use_quant_conv": False, "use_post_quant_conv": False}, {"quant_convs": False}),
    ],
)
def test_a_config_of_autoencoder_kl_reads_and_writes(values, fields):
    sizes = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    cfg = hub_configs.vae_config_from_hf({**sizes, "scaling_factor": 0.13025, **values})
    assert cfg == dataclasses.replace(config.VaeConfig(), **fields)
    assert hub_configs.vae_config_from_hf(hub_configs.vae_config_to_hf(cfg)) == cfg


def test_flux2_statistics_come_back_bit_for_bit():
    folder = vaes.FOLDER / "flux2"
    cfg, _ = vaes.read(folder)
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    written = hub_configs.vae_config_to_hf(cfg)
    got = hub_configs.flux2_batch_norm(cfg, written)
    for name in ("running_mean", "running_var"):
        assert got[name].tobytes() == tensors[f"bn.{name}"].tobytes()
    assert hub_configs.vae_config_from_hf(written, got) == cfg
    values = json.loads((folder / "config.json").read_text())
    assert written.items() >= {k: x for k, x in values.items() if k in written}.items()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift": (1.0, 2.0)}, r"vae\.shift: expected one of \(0, 1, 4, 16\) numbers; got 2"),
        ({"std": (1.0, 0.0, 1.0, 1.0)}, r"vae\.std: expected all > 0"),
        ({"decoder_channels": (16, 16)}, r"vae\.decoder_channels: expected 0 or 4 numbers"),
        ({"decoder_channels": (12, 16, 16, 16)}, r"vae\.decoder_channels: expected multiples"),
    ],
)
def test_an_autoencoder_that_cannot_be_is_refused(fields, message):
    cfg = config.model_config("test")
    cfg.vae = dataclasses.replace(cfg.vae, **fields)
    assert not checks.model_problems(config.model_config("test"))
    (problem,) = checks.model_problems(cfg)
    assert re.search(message, problem), problem


def test_a_latent_of_odd_size_has_no_cells_of_four_numbers():
    cfg = config.model_config("test", 24)
    cfg.gen.patch_size, cfg.und.patch_size = 1, 8
    cfg.vae.shift = (0.0,) * 16
    (problem,) = checks.model_problems(cfg)
    assert "a latent of even size" in problem and "model.vae.shift" in problem
