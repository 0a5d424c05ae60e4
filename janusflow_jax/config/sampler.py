"""How the differential equation of an image is solved."""

from janusflow_jax.config.fields import between, dataclass, limited, positive


@dataclass
class SamplerConfig:
    """The defaults are the paper's: 30 steps of Euler's method, all of them with guidance."""

    steps: int = between(30, 1, 10_000)
    # 1: Euler; 2: Adams-Bashforth, which needs fewer steps for the same accuracy, at the same cost
    order: int = limited(1, lambda order: order in (1, 2), "1 or 2")
    shift: float = positive(1.0)  # of the times, as LossConfig.time_shift: > 1: more near noise
    # Guidance acts where guide_from <= t < guide_until; elsewhere only the conditional branch runs.
    guide_from: float = between(0.0, 0, 1)
    guide_until: float = between(1.0, 0, 1)
