"""The real widths, compiled for GPUs without having one. Needs `jax-cuda13-plugin`."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import jax
import pytest

from janusflow_jax import config as c
from janusflow_jax.planning import compile as plan_compile, topology as plan_topology

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin"),
        reason="needs a compiler: pip install jax-cuda13-plugin jax-cuda13-pjrt",
    ),
]


def test_no_array_of_a_step_grows_with_the_square_of_a_row():
    """Neither attention nor its gradients write scores: the kernels are in the program instead."""
    cfg = runpy.run_path(str(ROOT / "configs" / "pretrain.py"))["get_config"]()
    cfg.model.llm.num_layers, cfg.model.repa.layer, cfg.model.und.num_layers = 2, 1, 1
    cfg.model.und.width, cfg.model.und.num_heads, cfg.model.und.mlp_width = 256, 4, 1024
    cfg.model.gen.num_blocks, cfg.model.gen.width = 1, 128
    cfg.model.vae.channels, cfg.model.vae.layers_per_block = (32, 64, 64, 64), 1
    cfg.mesh, cfg.batch_rows = c.MeshConfig(fsdp=8), 16
    with jax.default_matmul_precision("default"):  # as in a run
        run = plan_compile.train(cfg, plan_topology.parse("h100:8"))
    assert run.cfg.attention == "flash" and run.program is not None
    text = run.program.as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"\w\[([\d,]+)\]", text)}
    length = cfg.data.row_len
    assert any(length in shape for shape in shapes)
    assert not [shape for shape in shapes if shape.count(length) > 1]
    assert {"flash_forward", "flash_queries", "flash_keys"} <= {*re.findall(r"flash_\w+", text)}
