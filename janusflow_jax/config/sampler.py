"""How the differential equation of an image is solved."""

from janusflow_jax.config.fields import dataclass


@dataclass
class SamplerConfig:
    """The defaults are the paper's: 30 steps of Euler's method, all of them with guidance.

    `sampling.inputs.check_generate` makes it from a request and checks the values.
    """

    steps: int = 30
    order: int = 1  # 1: Euler; 2: Adams-Bashforth, more accurate at the same cost
    shift: float = 1.0  # of the times, as LossConfig.time_shift; above 1: more steps near noise
    # Guidance acts where guide_from <= t < guide_until; elsewhere only the conditional branch runs.
    guide_from: float = 0.0
    guide_until: float = 1.0
