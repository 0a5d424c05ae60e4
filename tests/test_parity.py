"""`tools/check_parity.py` agrees on the golden weights, and not on others."""

import pathlib

import jax
import numpy as np
import pytest
from helpers import golden

from janusflow_jax import config
from janusflow_jax.checkpoints import model_folder

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


def changed(tmp_path, part, name, factor):
    """The golden model as a folder, one array of it times `factor`."""
    _, params, vae = golden.model()
    params = {n: x for n, x in params.items() if n != "repa_head"}
    trees = jax.tree.map(np.asarray, params | {"vae": vae})
    node = trees[part]
    *parents, last = name.split("/")
    for key in parents:
        node = node[key]
    node[last] = node[last] * np.float32(factor)
    model_folder.save_model(
        tmp_path / "model",
        model_cfg=config.model_config("test"),
        vae=trees.pop("vae"),
        params=trees,
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


@pytest.mark.parametrize(
    ("part", "name", "bad", "good"),
    [
        ("llm", "layers/block/mlp/down/kernel", "LLM: block 1", "SigLIP: features"),
        ("vae", "decoder/conv_out/kernel", "VAE: decoded latents", "latents: step 2"),
    ],
)
def test_a_changed_weight_is_found_where_it_is(tool, tmp_path, capsys, part, name, bad, good):
    assert tool.main([*ARGS, *changed(tmp_path, part, name, 1.0005)]) == 1
    verdicts = rows(capsys.readouterr().out)
    assert verdicts[bad] == "FAIL" and verdicts[good] == "ok"
