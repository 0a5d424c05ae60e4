"""Settings of the process change neither noise nor types: sampling, answers, training."""

import jax
import numpy as np
import pytest
from helpers.runs import last_arrays, tiny_config

from janusflow_jax import train
from janusflow_jax.config import LossConfig, ModelConfig
from janusflow_jax.hub import assemble_parts
from janusflow_jax.parallel import numerics
from janusflow_jax.planning import compile as plan_compile
from janusflow_jax.training import losses, step as train_step

SETTINGS = {
    "x64": lambda: jax.enable_x64(True),
    "threefry": lambda: jax.threefry_partitionable(False),
    "generator": lambda: jax.default_prng_impl("rbg"),
}
EACH = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


def check_setting_matters(setting):
    draw = lambda: np.asarray(jax.random.normal(jax.random.key(7), (3, 5)))  # noqa: E731
    plain = draw()
    with setting():
        other = draw()
    assert plain.dtype != other.dtype or (plain != other).all()


@EACH
def test_images_and_answers_do_not_change(setting, golden_model):
    check_setting_matters(setting)

    def results():
        options = {"seed": [3, 2**32 - 1], "num_steps": 2, "output": "latent"}
        answers = golden_model.chat("Who?", temperature=1.0, seed=5, max_new_tokens=16)
        return golden_model.generate(["a red fox", "a tree"], **options), answers

    latents, answers = results()
    with setting():
        other, other_answers = results()
    np.testing.assert_array_equal(latents, other)
    assert other.dtype == np.float32 and answers == other_answers


def test_new_parts_of_an_assembled_model_do_not_change(golden_model):
    def parts():
        return dict(assemble_parts.initialize(golden_model.cfg, 3, None, lambda _: None))

    want = parts()
    with SETTINGS["x64"](), SETTINGS["threefry"](), SETTINGS["generator"]():
        got = parts()
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(got))


@EACH
def test_draws_of_training_do_not_change(setting):
    cfg, batch = ModelConfig(image_size=64), {"row": np.arange(3, dtype=np.uint32)}

    @numerics.fixed()
    def draw():
        key = numerics.key(11)
        return jax.jit(lambda b: losses.draw(key, b, cfg, LossConfig(), 2))(batch)

    want = draw()
    with setting():
        got = draw()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_a_run_does_not_change(store):
    train.train(tiny_config("plain"))
    with SETTINGS["x64"](), SETTINGS["threefry"](), SETTINGS["generator"]():
        train.train(tiny_config("other"))
    plain, other = last_arrays("plain"), last_arrays("other")
    assert plain.keys() == other.keys()
    for name, x in plain.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


def test_training_multiplies_as_the_process_says(monkeypatch):
    seen, plain = [], losses.loss_sums

    def loss_sums(*args, **kwargs):
        seen.append(jax.config.jax_default_matmul_precision)
        return plain(*args, **kwargs)

    monkeypatch.setattr(losses, "loss_sums", loss_sums)
    cfg = tiny_config("x")
    state, batch = plan_compile.state_shapes(cfg), plan_compile.batch_shapes(cfg)
    with jax.default_matmul_precision("highest"):
        jax.eval_shape(train_step.make_train_step(cfg), state, batch)
    assert set(seen) == {"highest"}
