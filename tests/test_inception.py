"""FID's network: it agrees with torch-fidelity's, and its folder notices what would change it."""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from janusflow_jax.config.errors import CheckpointError, ConvertError
from janusflow_jax.eval import inception
from janusflow_jax.parallel import trees

TOOLS = str(pathlib.Path(__file__).resolve().parents[1] / "tools")
NORM = 393.30356
EVERY_128TH = [
    2.4967288970947266,
    7.464673042297363,
    0.0,
    0.0,
    0.0,
    0.002448032610118389,
    0.0029742252081632614,
    0.014205553568899632,
    4.247147560119629,
    3.595158100128174,
    13.11044692993164,
    0.08909420669078827,
    0.0,
    0.4549430012702942,
    12.653402328491211,
    0.0,
]
"""What torch-fidelity 0.4.0 computes with `published` for `inception.check_image`."""


def published() -> dict[str, np.ndarray]:
    """A state dict with the names and shapes of the published file, of random numbers."""
    draw, out = np.random.default_rng(0), {}
    shapes = trees.flatten(inception.param_shapes())
    for path, x in sorted(shapes.items()):
        if not path.endswith("/kernel"):
            continue
        name = path.removesuffix("/kernel").replace("/", ".")
        height, width, inputs, outputs = x.shape
        std = (2 / (height * width * inputs)) ** 0.5
        weight = draw.standard_normal((outputs, inputs, height, width), np.float32)
        out[f"{name}.conv.weight"] = weight * np.float32(std)
        for part, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 1.5),
        ):
            out[f"{name}.bn.{part}"] = draw.uniform(low, high, outputs).astype(np.float32)
    return out


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import convert_scorer

    return convert_scorer


@pytest.mark.slow
def test_a_converted_network_agrees_with_torch_fidelity(tool, tmp_path, capsys):
    file, out = tmp_path / "weights.safetensors", tmp_path / "inception"
    safetensors.numpy.save_file(published(), file)
    tool.main([str(file), "--out", str(out)])
    assert "do not compare" in capsys.readouterr().err  # random weights are not the official ones
    with pytest.raises(ConvertError, match="new folder"):
        tool.main([str(file), "--out", str(out)])
    net = inception.load(out)
    got = net.embed(inception.check_image())[0]
    np.testing.assert_allclose(got[::128], EVERY_128TH, atol=1e-4)
    assert np.linalg.norm(got) == pytest.approx(NORM, rel=1e-5) and not net.official

    # Another image beside it does not change an image's features.
    two = np.concatenate([inception.check_image(), 255 - inception.check_image()])
    np.testing.assert_allclose(net.embed(two)[0], got, atol=1e-4)

    about = json.loads((out / inception.FILE).read_text())
    about["check_features"] = (1.01 * np.asarray(about["check_features"])).tolist()
    (out / inception.FILE).write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="stored features"):
        inception.load(out)


@pytest.mark.slow
def test_the_tool_reads_a_state_dict_of_torch(tool, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra `dev`")
    good, bad = (epath.Path(tmp_path) / name for name in ("good.pth", "bad.pth"))
    torch.save({"x.conv.weight": torch.ones(2, 3)}, good)
    assert tool.read(good)["x.conv.weight"].tolist() == [[1, 1, 1]] * 2
    torch.save([1, 2], bad)
    with pytest.raises(ConvertError, match="state dict"):
        tool.read(bad)
    bad.write_bytes(b"no archive")
    with pytest.raises(ConvertError, match="state dict"):
        tool.read(bad)


def test_pooling_is_that_of_the_published_graph():
    """Means do not count what is outside the image; the last block takes maxima."""
    x = jnp.ones((1, 4, 4, 2))
    np.testing.assert_allclose(inception._average_pool(x), x)
    draw = lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32)  # noqa: E731
    x = draw(np.zeros((1, 3, 3, 2)))
    params = jax.tree.map(draw, jax.eval_shape(inception.BlockE().init, jax.random.key(0), x))
    means = inception.BlockE().apply(params, jnp.asarray(x))
    maxima = inception.BlockE(max_pool=True).apply(params, jnp.asarray(x))
    np.testing.assert_array_equal(means[..., :-192], maxima[..., :-192])
    assert np.abs(means[..., -192:] - maxima[..., -192:]).max() > 0.1


def test_what_is_no_inception_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="conv.weight"):
        inception.from_torch({})
    with pytest.raises(CheckpointError, match="convert_scorer"):
        inception.load(tmp_path)
