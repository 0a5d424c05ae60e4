"""`tools/check_parity.py` agrees on the golden weights, and not on others."""

import pathlib

import jax
import numpy as np
import pytest
from helpers import golden

from janusflow_jax import config
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.parallel import trees

TOOLS = str(pathlib.Path(__file__).resolve().parents[1] / "tools")
ARGS = ["--janusflow", str(golden.TINY / "janusflow"), "--vae", str(golden.TINY / "vae")]
pytestmark = pytest.mark.slow


@pytest.fixture
def tool(monkeypatch):
    for name in ("torch", "diffusers"):
        pytest.importorskip(name, reason="needs the extra `dev`")
    precision = jax.config.jax_default_matmul_precision
    monkeypatch.syspath_prepend(TOOLS)
    import check_parity

    yield check_parity
    jax.config.update("jax_default_matmul_precision", precision)


def changed(tmp_path, paths, factor):
    """The golden model as a folder, some arrays of it times `factor`."""
    _, params, vae = golden.model()
    params = {n: x for n, x in params.items() if n != "repa_head"}
    parts = jax.tree.map(np.asarray, params | {"vae": vae})
    leaves = trees.flatten(parts)
    for path in paths:
        leaves[path] = leaves[path] * np.float32(factor)
    parts = trees.unflatten(leaves)
    model_folder.save_model(
        tmp_path / "model",
        model_cfg=config.model_config("test"),
        vae=parts.pop("vae"),
        params=parts,
        hub_files=golden.TINY / "janusflow",
        extra={},
    )
    return ["--model", str(tmp_path / "model"), "--steps", "2"]


def rows(text):
    """Row -> verdict."""
    lines = [line.rsplit(maxsplit=1) for line in text.splitlines()]
    return {head[:34].strip(): last for head, last in lines[1:-1]}


def test_the_golden_weights_agree_in_every_row(tool, capsys):
    assert tool.main(ARGS) == 0
    verdicts = rows(capsys.readouterr().out)
    assert set(verdicts.values()) == {"ok"} and len(verdicts) == 25
    assert {"SigLIP: block 2", "LLM: block 2", "latents: step 30", "answer: text"} <= set(verdicts)


def test_a_changed_weight_fails_in_the_row_of_its_part(tool, tmp_path, capsys):
    paths = ("llm/layers/block/mlp/down/kernel", "vae/decoder/conv_out/kernel")
    assert tool.main([*ARGS, *changed(tmp_path, paths, 1.0005)]) == 1
    verdicts = rows(capsys.readouterr().out)
    for name in ("LLM: block 1", "LLM: block 2", "VAE: decoded latents"):
        assert verdicts[name] == "FAIL"
    for name in ("SigLIP: features", "LLM: input", "generation decoder: velocity"):
        assert verdicts[name] == "ok"
