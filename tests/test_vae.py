"""The VAE beside its golden numbers (test_golden.py), and the tool that trains the small one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.starts import train_vae
from janusflow_jax import config
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.models import vae

CFG = config.VaeConfig(channels=(8, 16), layers_per_block=1, norm_groups=4)


def noise(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def params():
    """Fresh parameters with every bias and scale moved off its start."""
    fresh = vae.init_params(CFG, jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    return tree.unflatten([x + 0.1 * noise(i, *x.shape) for i, x in enumerate(leaves)])


def pixels(count, size=16, seed=0):
    shape = (count, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def run(method, p, x, dtype=jnp.float32):
    fn = jax.jit(lambda p, x: vae.Vae(CFG, dtype).apply({"params": p}, x, method=method))
    return fn(p, x)


@pytest.mark.slow
def test_shapes_of_an_image_that_is_not_square():
    mean, logvar = run("encode", params(), noise(1, 2, 16, 24, 3))
    assert mean.shape == logvar.shape == (2, 8, 12, 4)
    assert run("decode", params(), mean).shape == (2, 16, 24, 3)


@pytest.mark.slow
def test_images_of_a_batch_are_independent():
    x = noise(2, 3, 16, 16, 3)
    other = np.concatenate([x[:1], 5 * noise(3, 2, 16, 16, 3)])
    np.testing.assert_array_equal(
        run("__call__", params(), x)[0], run("__call__", params(), other)[0]
    )


def test_stride_two_pads_below_and_right_only():
    module = vae.Conv3x3(1, stride=2)
    p = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
    got = module.apply({"params": p}, jnp.ones((1, 4, 4, 1)))
    np.testing.assert_array_equal(np.asarray(got)[0, :, :, 0], [[9, 6], [6, 4]])


def test_group_norm_keeps_digits_under_a_large_mean():
    x = 50 + 0.1 * noise(4, 2, 8, 8, 8)  # the one-pass variance is 8 % off here
    p = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    got = vae.GroupNorm(2, 1e-6).apply({"params": p}, jnp.asarray(x))
    wide = x.astype(np.float64).reshape(2, 8, 8, 2, 4)
    mean, var = wide.mean((1, 2, 4), keepdims=True), wide.var((1, 2, 4), keepdims=True)
    want = ((wide - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=2e-4)


@pytest.mark.slow
def test_bfloat16_activations_give_float32_results():
    x = noise(5, 1, 16, 16, 3)
    for method, given in (("encode", x), ("decode", noise(6, 1, 8, 8, 4))):
        for half, full in zip(
            jax.tree.leaves(run(method, params(), given, jnp.bfloat16)),
            jax.tree.leaves(run(method, params(), given)),
            strict=True,
        ):
            assert half.dtype == jnp.float32
            error = np.abs(half - full).max() / np.abs(full).max()
            assert 1e-4 < error < 0.05  # at or below 1e-4 nothing ran in bfloat16


def test_logvar_is_clipped():
    p = dict(params())
    p["quant_conv"] = {**p["quant_conv"], "bias": np.array([0] * 4 + [99, 99, -99, -99], "f4")}
    _, logvar = run("encode", p, noise(7, 1, 16, 16, 3))
    np.testing.assert_array_equal(np.asarray(logvar)[..., :2], 20)
    np.testing.assert_array_equal(np.asarray(logvar)[..., 2:], -30)


@pytest.mark.slow
def test_standardized_latents():
    data = pixels(40)
    x = data / np.float32(127.5) - 1
    before, after = params(), train_vae.standardize(params(), CFG, data)
    mean, logvar = map(np.asarray, run("encode", before, x))
    new_mean, new_logvar = map(np.asarray, run("encode", after, x))
    axes = (0, 1, 2)

    # Scaled, a sampled latent has mean 0 and variance 1 in every channel; before, it had not.
    def spread(m, v):
        return CFG.scaling_factor**2 * (m.var(axes) + np.exp(v).mean(axes))

    assert np.abs(spread(mean, logvar) - 1).min() > 0.1
    np.testing.assert_allclose(new_mean.mean(axes), 0, atol=1e-4)
    np.testing.assert_allclose(spread(new_mean, new_logvar), 1, rtol=1e-4)
    # A draw of the posterior decodes to the same image in either basis, the mean does too.
    for eps in (np.float32(0), noise(8, *mean.shape)):
        want = run("decode", before, mean + np.exp(0.5 * logvar) * eps)
        got = run("decode", after, new_mean + np.exp(0.5 * new_logvar) * eps)
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_augmentation_only_mirrors():
    x = noise(9, 16, 4, 4, 3)
    got = np.asarray(train_vae.augment(jax.random.key(1), jnp.asarray(x)))
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(got, x, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(got, x, strict=True)]
    assert all(m != s for m, s in zip(mirrored, same, strict=True))
    assert any(mirrored) and any(same)


@pytest.mark.slow
def test_training_saves_a_start_that_loads(tmp_path, monkeypatch, capsys):
    model = config.model_config("test", image_size=32)
    model.vae = CFG
    monkeypatch.setattr(train_vae.c, "model_config", lambda name: model)
    monkeypatch.setattr(train_vae, "load_split", lambda data, split, size: pixels(32, size))
    out, preview = tmp_path / "start", tmp_path / "preview.png"
    argv = ["--out", str(out), "--preview", str(preview), "--steps", "12"]
    train_vae.main(argv)
    printed = capsys.readouterr().out
    assert "heldout_pairs: PSNR" in printed and "heldout_views: PSNR" in printed
    assert preview.is_file()
    loaded = model_folder.load_model(out)
    assert loaded.params is None and loaded.meta["parts"] == ["vae"]
    assert {x.dtype for x in jax.tree.leaves(loaded.vae)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(CheckpointError, match="--overwrite"):
        train_vae.main(argv)
    # The second run trains the decoder of the first, in place.
    train_vae.main([*argv, "--overwrite", "--decoder-of", str(out), "--noise", "0.5"])
    again = model_folder.load_model(out)
    assert (again.meta["steps"], again.meta["decoder"]["noise"]) == (12, 0.5)
    for name, tree in loaded.vae.items():
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(again.vae[name]), strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
        assert same == (name not in train_vae.DECODER)
    # The third run trains all of it; its README has the three commands.
    options = ["--noise", "0.5", "--half-weight", "0.5"]
    train_vae.main([*argv, "--overwrite", "--start", str(out), *options])
    third = model_folder.load_model(out)
    assert third.meta["decoder"] == again.meta["decoder"]
    assert (third.meta["steps"], third.meta["start"]["half_weight"]) == (12, 0.5)
    notice = (out / "README.md").read_text()
    assert [notice.count(x) for x in (" --decoder-of ", " --start ", "python ")] == [1, 1, 3]
    for name, tree in again.vae.items():
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(third.vae[name]), strict=True)
        assert not all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_a_step_of_training_lowers_the_loss():
    x = jnp.asarray(pixels(4) / np.float32(127.5) - 1)
    loss = jax.jit(lambda p: train_vae.loss_fn(p, x, jax.random.key(0), CFG, 1e-4, 0.0, 0.0)[0])
    value, grads = jax.jit(jax.value_and_grad(loss))(params())
    stepped = jax.tree.map(lambda p, g: p - 1e-3 * g, params(), grads)
    assert loss(stepped) < value


@pytest.mark.slow
def test_the_encoder_learns_from_a_noisy_image_at_half_resolution_only():
    x = jnp.asarray(pixels(3) / np.float32(127.5) - 1)

    def encoder_gradient(images, half_weight):
        grad = jax.jit(jax.grad(lambda p: train_vae.loss_fn(p, images, *args, half_weight)[0]))
        args = (jax.random.key(0), CFG, 0.0, 0.5)  # the first of two images gets noise
        return np.concatenate([g.ravel() for g in jax.tree.leaves(grad(params())["encoder"])])

    for half_weight, is_same in ((0.0, True), (0.5, False)):
        first, second = (encoder_gradient(x[jnp.array([i, 2])], half_weight) for i in (0, 1))
        assert np.abs(first).max() > 1e-3
        assert np.allclose(first, second, rtol=1e-4, atol=1e-6) == is_same
