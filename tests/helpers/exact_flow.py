"""A flow with known velocity: every number of an image is normal with mean `mu` and deviation `s`.

At time t the states are normal with mean t mu and deviation S(t) = sqrt(t^2 s^2 + (1 - t)^2).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExactFlow:
    mu: float = 1.3
    s: float = 0.4

    def deviation(self, t):
        return (t**2 * self.s**2 + (1 - t) ** 2) ** 0.5

    def velocity(self, z, t):
        factor = (t * self.s**2 - (1 - t)) / self.deviation(t) ** 2
        return self.mu + factor * (z - t * self.mu)

    def move(self, z, t, r):
        """The state at time r of what is at z at time t."""
        return r * self.mu + self.deviation(r) / self.deviation(t) * (z - t * self.mu)
