"""The solver of the image's differential equation, on a flow whose solution is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact_flow import ExactFlow

from janusflow_jax.config import SamplerConfig
from janusflow_jax.sampling import flow

FLOW, OTHER = ExactFlow(), ExactFlow(mu=-0.5, s=0.8)
NOISE = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))


def exact(z, t, r, guided):
    return FLOW.velocity(z, t), None


def two_flows(z, t, r, guided):
    return FLOW.velocity(z, t), OTHER.velocity(z, t) if guided else None


def error(cfg, velocity=exact, want=None, scale=2.0):
    with jax.enable_x64(True):  # rounding would hide the order of small steps
        z, _ = flow.solve(velocity, NOISE, scale, cfg)
    want = FLOW.move(NOISE, 0.0, 1.0) if want is None else want
    return float(np.abs(z - want).max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("order", "ratio"), [(1, (1.85, 2.1)), (2, (3.5, 6.0))])
def test_half_the_step_divides_the_error_by_two_to_the_order(order, ratio, shift):
    errors = [error(SamplerConfig(steps=n, order=order, shift=shift)) for n in (8, 16, 32)]
    for before, after in zip(errors, errors[1:], strict=False):
        assert ratio[0] < before / after < ratio[1]


def test_fifteen_steps_of_order_two_are_nearer_than_thirty_of_euler():
    assert error(SamplerConfig(steps=15, order=2)) < error(SamplerConfig(steps=30))


def test_euler_has_the_bits_of_the_published_formula():
    """z += v / N at t = k / N."""

    def step(z, k):
        z = z + flow.guide(*two_flows(z, k.astype(jnp.float32) / 30, None, True), 2.0) / 30
        return z, z

    _, want = jax.lax.scan(step, NOISE, jnp.arange(30))
    _, states = flow.solve(two_flows, NOISE, 2.0, SamplerConfig())
    np.testing.assert_array_equal(states, want)


@pytest.mark.parametrize("order", [1, 2])
def test_guidance_acts_in_its_interval_alone(order):
    """As a loop by hand: the second order begins anew where guidance begins and ends."""
    cfg = SamplerConfig(steps=8, order=order, guide_from=0.25, guide_until=0.75)
    assert flow.guided_steps(cfg).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    branches = []

    def velocity(z, t, r, guided):
        branches.append(guided)
        return two_flows(z, t, r, guided)

    z, states = flow.solve(velocity, NOISE, 3.0, cfg)
    assert branches == [False, True, False]  # three programs, one of them with both branches
    want, before = NOISE, 0.0
    for k in range(8):
        v = FLOW.velocity(want, k / 8)
        if 2 <= k < 6:
            v = 3.0 * v - 2.0 * OTHER.velocity(want, k / 8)
        slope = v if order == 1 or k in (0, 2, 6) else 1.5 * v - 0.5 * before
        want, before = want + slope / 8, v
    np.testing.assert_allclose(z, want, atol=2e-6)
    np.testing.assert_array_equal(states[-1], z)


def test_the_second_order_stays_where_guidance_ends():
    def errors(steps):
        reference = SamplerConfig(steps=512, order=2, guide_until=0.5)
        with jax.enable_x64(True):
            want, _ = flow.solve(two_flows, NOISE, 2.0, reference)
        cfg = SamplerConfig(steps=steps, order=2, guide_until=0.5)
        return error(cfg, two_flows, want)

    assert errors(8) / errors(16) > 3.5


def test_no_guidance_is_an_empty_interval():
    cfg = SamplerConfig(steps=4, guide_until=0.0)
    np.testing.assert_array_equal(
        flow.solve(two_flows, NOISE, 2.0, cfg)[0], flow.solve(exact, NOISE, 1.0, cfg)[0]
    )


# --- from a later step on, and with a known region


@pytest.mark.parametrize("order", [1, 2])
def test_a_later_first_step_continues_the_path(order):
    cfg = SamplerConfig(steps=16, order=order)
    begin = FLOW.move(NOISE, 0.0, 0.5)
    z, states = flow.solve(exact, begin, 1.0, cfg, first=8)
    assert len(states) == 8
    np.testing.assert_allclose(z, FLOW.move(NOISE, 0.0, 1.0), atol=[0.1, 0.03][order - 1])


def test_no_step_is_left_at_strength_zero_and_all_at_one():
    cfg = SamplerConfig(steps=30)
    assert [flow.first_step(s, cfg) for s in (0.0, 0.5, 0.6, 1.0)] == [30, 15, 12, 0]
    z, states = flow.solve(exact, NOISE, 1.0, cfg, first=30)
    np.testing.assert_array_equal(z, NOISE)
    assert states.shape == (0, *NOISE.shape)


def test_a_known_region_stays_on_its_path():
    x = jax.random.normal(jax.random.key(1), NOISE.shape)
    known = jnp.arange(4)[:, None, None] < 2

    def project(z, t):
        return jnp.where(known, t * x + (1 - t) * NOISE, z)

    cfg = SamplerConfig(steps=8)
    z, states = flow.solve(exact, NOISE, 1.0, cfg, project=project)
    for k, state in enumerate(states):
        t = (k + 1) / 8
        np.testing.assert_allclose(state[:, :2], (t * x + (1 - t) * NOISE)[:, :2], atol=1e-6)
    np.testing.assert_array_equal(z[:, :2], x[:, :2])
    np.testing.assert_array_equal(z[:, 2:], flow.solve(exact, NOISE, 1.0, cfg)[0][:, 2:])


# --- a student


def average(z, t, r):
    """The exact student's average velocity from t to r."""
    return (FLOW.move(z, t, r) - z) / (r - t)


@pytest.mark.parametrize("cfg", [{"steps": 1}, {"steps": 2}, {"steps": 3, "shift": 2.0}])
def test_an_exact_student_needs_one_step_and_loses_nothing_by_more(cfg):
    """Every step goes to the time that the student was told."""
    z, _ = flow.solve(
        lambda z, t, r, guided: (average(z, t, r), None), NOISE, 1.0, SamplerConfig(**cfg)
    )
    np.testing.assert_allclose(z, FLOW.move(NOISE, 0.0, 1.0), atol=2e-5)


def wide(t):
    return t[:, None, None, None]


def target(t, r, **share):
    """For states at t, the target of an exact student of an exact teacher."""
    t, r = (jnp.full(len(NOISE), x) for x in (t, r))
    z = FLOW.move(NOISE, 0.0, wide(t))
    got = flow.lagrangian_target(
        lambda end: average(z, wide(t), wide(end)),
        lambda z, t: FLOW.velocity(z, wide(t)),
        z,
        t,
        r,
        **share,
    )
    return z, got


def test_the_target_of_a_student_is_off_by_the_third_power_of_the_teachers_part():
    """The teacher's part is a step of the midpoint rule."""
    with jax.enable_x64(True):
        errors = []
        for share in (0.4, 0.2, 0.1, 0.05):
            z, got = target(0.2, 0.6, share=share)
            errors.append(float(np.abs(got - average(z, 0.2, 0.6)).max()))
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert all(6.5 < ratio < 8.5 for ratio in ratios), ratios


def test_the_target_of_an_empty_interval_is_the_teachers_velocity():
    z = FLOW.move(NOISE, 0.0, 0.25)
    t = jnp.full(len(NOISE), 0.25)
    student = lambda end: jnp.full_like(z, 7.0)  # noqa: E731 - has no part in it
    teacher = lambda z, t: FLOW.velocity(z, wide(t))  # noqa: E731
    got = flow.lagrangian_target(student, teacher, z, t, t)
    np.testing.assert_array_equal(got, teacher(z, t))


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_the_intervals_of_training_hold_those_of_sampling(kind):
    keys = jax.random.split(jax.random.key(3), 800)
    t, r = map(np.asarray, jax.vmap(lambda key: flow.sample_interval(key, kind, 2.0))(keys))
    assert (t >= 0).all() and (t <= r).all() and (r <= 1).all()
    shares = {
        "one step": (t == 0) & (r == 1),
        "from noise": (t == 0) & (r < 1),
        "to the image": (t > 0) & (r == 1),
        "empty": t == r,
        "inside": (t > 0) & (t < r) & (r < 1),
    }
    want = {"one step": 1, "from noise": 1, "to the image": 1, "empty": 2, "inside": 3}
    for name, eighths in want.items():
        assert abs(shares[name].mean() - eighths / 8) < 0.05, name


# --- FlowEdit


def edited(source, target, scales=(1.0, 1.0), **options):
    """Images of `source`, edited to `target`; both are exact flows."""
    x = source.mu + source.s * NOISE
    steps = SamplerConfig(**({"steps": 10, "guide_until": 0.0} | options))

    def velocity(z, t, r, guided):
        a, b = jnp.split(z, 2)
        v = jnp.concatenate([source.velocity(a, t), target.velocity(b, t)])
        return v, jnp.zeros_like(v) if guided else None

    def noise(k):
        return jax.random.normal(jax.random.fold_in(jax.random.key(2), k), x.shape)

    scales = jnp.repeat(jnp.float32(scales), len(x))
    return x, flow.edit(velocity, x, noise, scales, steps)


@pytest.mark.parametrize("steps", [4, 10, 30])
def test_flow_edit_moves_by_the_difference_of_means(steps):
    """Two flows of the same deviation: whatever the noise and the number of steps."""
    x, y = edited(FLOW, ExactFlow(mu=-0.7), steps=steps)
    np.testing.assert_allclose(y, x - 2.0, atol=1e-5)


def test_flow_edit_with_equal_prompts_and_scales_changes_no_bit():
    x, y = edited(FLOW, FLOW, (3.0, 3.0), guide_until=1.0)
    np.testing.assert_array_equal(x, y)
    x, y = edited(FLOW, FLOW, (1.0, 3.0), guide_until=1.0)
    assert (x != y).all()
