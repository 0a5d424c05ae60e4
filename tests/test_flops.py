"""Useful operations: known figures of the released size, and XLA's own counts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.config import GENERATE, UNDERSTAND
from janusflow_jax.models import janusflow, vae
from janusflow_jax.parallel import chips
from janusflow_jax.training import flops

FULL = c.model_config("1p3b")
TRAINED = set(c.MODEL_PARTS) - {"und_encoder"}


def sample(positions: int, targets: int, gen: int, und: int) -> flops.Work:
    return flops.Work(positions, positions * (positions + 1) / 2, targets, gen, und, 0.0, 0.0)


def test_operations_of_the_released_size():
    tera = 1e12
    assert flops.siglip(FULL) / tera == pytest.approx(0.38, rel=0.01)
    assert flops.vae_encoder(FULL) / tera == pytest.approx(0.62, rel=0.01)
    assert flops.vae_decoder(FULL) / tera == pytest.approx(1.41, rel=0.01)
    understand = sample(777, 100, 0, 1).flops(FULL, TRAINED, True)
    generate = sample(657, 0, 1, 0).flops(FULL, TRAINED, True)
    assert understand / tera == pytest.approx(6.5, rel=0.02)
    assert generate / tera == pytest.approx(6.2, rel=0.02)
    assert 6 * generate / tera == pytest.approx(37, rel=0.02)  # a packed row
    picture = flops.image_flops(FULL, prompt=40, guided=30) / tera + 1.41
    assert picture == pytest.approx(92.5, rel=0.01)
    half = flops.image_flops(FULL, prompt=40, guided=15, unguided=15)
    assert half / flops.image_flops(FULL, prompt=40, guided=30) == pytest.approx(0.76, abs=0.01)


def test_a_frozen_llm_costs_two_thirds():
    work = sample(657, 0, 1, 0)
    whole = work.flops(FULL, TRAINED, True)
    frozen = work.flops(FULL, TRAINED - {"llm"}, True)
    assert whole - frozen == pytest.approx(2 * flops.llm_kernel(FULL) * 657)


@pytest.mark.parametrize("letter", ["siglip", "shared", "own"])
def test_understanding_encoders_cost_what_they_run(letter):
    target = "und_encoder" if letter == "siglip" else "siglip"
    cfg = dataclasses.replace(FULL, und_encoder=letter, repa_target=target)
    got = sample(0, 0, 0, 1).flops(cfg, TRAINED | {"und_encoder"}, False)
    ours = 3 * flops.aligner(cfg, "understand")
    ours += {
        "siglip": 3 * flops.siglip(cfg),
        "shared": flops.vae_encoder(cfg) + 3 * flops.gen_encoder(cfg),
        "own": 3 * (flops.vae_encoder(cfg) + flops.gen_encoder(cfg)),
    }[letter]
    assert got == pytest.approx(ours)


def xla(fn, *args) -> float:
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


def test_the_count_is_xlas():
    """Of parts without a scan, which XLA counts once; small things (norms) are only in XLA's."""
    cfg = c.model_config("test", 128)
    params = jax.eval_shape(lambda: vae.init_params(cfg.vae, jax.random.key(0)))
    image = jax.ShapeDtypeStruct((1, 128, 128, 3), jnp.float32)
    encode = lambda p, x: vae.Vae(cfg.vae).apply({"params": p}, x, method="encode")  # noqa: E731
    assert xla(encode, params, image) == pytest.approx(flops.vae_encoder(cfg), rel=0.1)
    cfg = dataclasses.replace(FULL, und=dataclasses.replace(FULL.und, num_layers=1))
    params = jax.eval_shape(lambda: janusflow.init_params(cfg, jax.random.key(0)))
    model = janusflow.JanusFlow(cfg)
    image = jax.ShapeDtypeStruct((1, 384, 384, 3), jnp.float32)
    read = lambda p, x: model.apply({"params": p}, x, method="siglip")  # noqa: E731
    assert xla(read, params, image) == pytest.approx(flops.siglip(cfg), rel=0.03)
    hidden = jax.ShapeDtypeStruct((1, 576, 2048), jnp.float32)
    features = jax.ShapeDtypeStruct((1, 24, 24, 768), jnp.float32)
    t_emb = jax.ShapeDtypeStruct((1, 2048), jnp.float32)
    decode = lambda p, *x: model.apply({"params": p}, *x, method="velocity")  # noqa: E731
    assert xla(decode, params, hidden, features, t_emb) == pytest.approx(
        flops.gen_decoder(cfg), rel=0.03
    )


def test_rows_are_counted():
    ids = np.array([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    batch = {
        "segment_ids": ids,
        "target_mask": ids > 1,
        "slot_task": np.array([[GENERATE, 0], [0, UNDERSTAND]]),
    }
    work = flops.count(batch, gen_slots=1, und_slots=2)
    assert work.positions == 13 and work.targets == 2
    assert work.pairs == 6 + 3 + 36
    assert (work.gen_images, work.und_images) == (1, 1)
    assert work.padding == pytest.approx(3 / 16) and work.idle_slots == pytest.approx(1 - 2 / 6)


def test_peaks():
    assert chips.peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert chips.peak_tflops("TPU v5 lite") == 197 and chips.peak_tflops("TPU v5") == 459
    assert chips.peak_tflops("NVIDIA H100 80GB HBM3") == 989 and not chips.peak_tflops("cpu")
    assert chips.peak_tflops("NVIDIA H100 PCIe") == 756 and chips.peak_tflops("NVIDIA H200") == 989
    assert chips.peak_tflops("TPU7x") == chips.CHIPS["tpu7x"].tflops / 2
