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


def exact(z, t, guided):
    return FLOW.velocity(z, t), None


def two_flows(z, t, guided):
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
        z = z + flow.guide(*two_flows(z, k.astype(jnp.float32) / 30, True), 2.0) / 30
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

    def velocity(z, t, guided):
        branches.append(guided)
        return two_flows(z, t, guided)

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
