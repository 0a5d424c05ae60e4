"""Every field of a config has a type and a range, and a value outside them is one line."""

from __future__ import annotations

import dataclasses
import math
import runpy
import typing
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from janusflow_jax import config as c
from janusflow_jax.config import checks as config_checks
from janusflow_jax.training import optim

ROOT = Path(__file__).parents[1]
EMOJI = runpy.run_path(str(ROOT / "configs" / "emoji.py"))["get_config"]


def fields_of(cfg, where=""):
    """(dotted name, owner of the field, name, type) of each field, nested configs included."""
    for name, kind in typing.get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        yield f"{where}{name}", cfg, name, kind
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, f"{where}{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            yield from fields_of(value[0], f"{where}{name}[0].")


NAMES = {name: kind for name, _, _, kind in fields_of(EMOJI())}


def problems_with(name, value):
    cfg = EMOJI()
    ((owner, field),) = [(o, f) for n, o, f, _ in fields_of(cfg) if n == name]
    setattr(owner, field, value)
    return config_checks.train_problems(cfg)


WRONG = {
    float: (math.nan, math.inf, -math.inf, 1e300, 1e-300, -2.0, 10**40, "1", True, None, (1.0,)),
    int: (2**40, -(2**40), -2, 0.5, 1.0, math.nan, "1", True, None, (1,)),
    bool: (0, 1, "True", None),
    str: (1, None, True, ("a",)),
}


def wrong_values(kind):
    if kind in WRONG:
        return WRONG[kind]
    if dataclasses.is_dataclass(kind):
        return (None, {}, 1)
    item, *_ = typing.get_args(kind)
    if dataclasses.is_dataclass(item) or typing.get_origin(item) is tuple:
        pair = (1, 2) if str in typing.get_args(item) else ("a", "b")
        return (None, "a", 1, [], (1,), (("a",),), (pair,))
    # a mean may be negative
    items = [x for x in WRONG[item] if not (item is float and x == -2)]
    return (None, "a", 1, [], *((x,) for x in items))


@pytest.mark.parametrize("name", NAMES)
def test_a_value_of_another_type_or_size_is_one_line_for_its_field(name):
    for value in wrong_values(NAMES[name]):
        if name == "remat" and value is True:  # as in 0.1
            continue
        problems = problems_with(name, value)
        assert any(p.startswith(f"{name}: ") for p in problems), (value, problems)


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("optim.lr", (1e-5, 1), (0, 0.0)),
        ("optim.clip_norm", (0, 0.0, 0.5), (-1, -1e-3)),
        ("optim.warmup_steps", (0, 5), (-1, -5)),
        ("optim.b1", (0.0, 0.99), (1.0, 1.5)),
        ("optim.b2", (0.0, 0.99), (1.0, 1.5)),
        ("optim.eps", (1e-8,), (0.0,)),
        ("optim.weight_decay", (0.0, 0.1), (-1.0,)),
        ("loss.time_shift", (1, 3.0), (0, 0.0, -1.0)),
        ("loss.repa_weight", (0, 0.5), (-0.5,)),
        ("loss.ce_chunk", (0, 128), (-1,)),
        ("data.max_bad_share", (0, 1, 0.5), (-0.1, 1.1)),
        ("data.row_len", (160, 4096), (0, -1)),
        ("data.sources[0].weight_after", (-1, -1.0, 0, 2), (-0.5,)),
        ("data.seed", (0, 2**32 - 1), (-1, 2**32)),
        ("mesh.data", (-1, 1, 8), (0, -2)),
        ("mesh.fsdp", (-1, 1, 8), (0, -2)),
        ("log_every_steps", (0, 1), (-1,)),
        ("num_steps", (1, 2**32 // 8), (0, 2**32 // 8 + 1, 10**20)),
        ("seed", (0, 2**32 - 1), (-1, 2**32)),
        ("data.skip_rows", ((), ((0, 8), (8, 2**31))), (((8, 2**32 - 1),), ((3, 3),))),
        ("train_parts", (("llm",),), ((1, 2), ("",), "llm")),
        ("model.llm.num_layers", (4, 1000), (0, 10**9)),
        ("model.llm.num_kv_heads", (6, 3), (0, 4)),
        ("model.gen.patch_size", (4,), (0, 3)),
        ("model.vae.channels", ((16, 32, 64),), ((), (0, 32, 64), (16,) * 9)),
        ("model.vae.norm_groups", (4, 8), (0, 5)),
        ("model.und.pixel_std", ((),), ((0.0, 1.0, 1.0), (1.0,))),
        ("dtype", ("float32",), ("bfloat16",)),  # its matmul_precision is of float32
    ],
)
def test_a_field_has_its_range(name, allowed, refused):
    assert name in NAMES
    for value in allowed:
        assert not problems_with(name, value), value
    for value in refused:
        assert problems_with(name, value), value


def test_a_clip_norm_of_0_is_off():
    params, gradients = {"w": jnp.ones(3)}, {"w": jnp.array([3.0, 0.0, 4.0])}
    updates = {}
    for clip_norm in (0.0, 1.0, 1e6):
        cfg = c.OptimConfig(clip_norm=clip_norm, warmup_steps=0, lr=0.1, b1=0.0, b2=0.0, eps=1.0)
        tx = optim.make_optimizer(cfg, 10)
        updates[clip_norm] = np.asarray(tx.update(gradients, tx.init(params), params)[0]["w"])
    np.testing.assert_allclose(updates[0.0], [-0.075, 0, -0.08], atol=1e-6)  # lr g / (|g| + eps)
    np.testing.assert_array_equal(updates[0.0], updates[1e6])
    np.testing.assert_allclose(updates[1.0], [-0.0375, 0, -0.1 * 0.8 / 1.8], atol=1e-6)
