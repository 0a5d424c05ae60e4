"""docs/data.md: its config works, and the code gives the sizes that it states."""

from __future__ import annotations

import pathlib
import re

import numpy as np

from janusflow_jax import config as c
from janusflow_jax.config import checks as config_checks
from janusflow_jax.training import flops

TEXT = (pathlib.Path(__file__).parents[1] / "docs" / "data.md").read_text()


def test_the_config_of_several_sources_works():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    space: dict = {}
    exec(code, space)
    cfg = space["get_config"]()
    assert not config_checks.train_problems(cfg)
    for (_, weights), want in zip(
        cfg.data.phases(),
        ({"generate": 50, "understand": 30, "text": 20}, {"generate": 80, "understand": 14}),
        strict=True,
    ):
        for task, share in want.items():
            mine = [w for w, s in zip(weights, cfg.data.sources, strict=True) if s.task == task]
            assert sum(mine) == share and sum(weights) == 100
    assert cfg.data.change_row == 10_000 * 512


def test_the_sizes_of_caches_are_right():
    for size, latents, features in ((384, 36, 1152), (256, 16, 512)):
        model = c.model_config("1p3b", size)
        assert np.prod(model.latent_shape) * 2 * 2 == latents * 1024
        assert model.und.num_tokens * model.und.width * 2 == features * 1024
    full = c.model_config("1p3b")
    saved = flops.vae_encoder(full) / 1e12, flops.siglip(full) / 1e12
    np.testing.assert_allclose(saved, (0.62, 0.38), rtol=0.01)
