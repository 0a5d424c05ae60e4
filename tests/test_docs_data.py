"""The config in docs/data.md works."""

from __future__ import annotations

import pathlib
import re

from janusflow_jax.config import checks as config_checks

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
