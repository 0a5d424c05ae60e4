"""Which waiting work begins next: least work first, fair between clients, with aging. No JAX.

Work has one unit for everything that shares a resource: row-steps for images (branches times
steps), tokens for chats. The key of a waiting piece of work is

    work its client began lately + work left of its request - AGING * speed * seconds it has waited

and the smallest begins. New work has a key of at least 0, so a request waits at most
(recent + work) / (AGING * speed) seconds before everything that comes later is behind it: nothing
starves, and a client that sends much waits behind one that sends little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar, runtime_checkable

AGING = 2 / 3
HALF_LIFE = 30.0
"""Seconds in which half of the work that a client began is forgotten."""
_FORGOTTEN = 1e-3


@runtime_checkable
class Waiting(Protocol):
    since: float  # time of its arrival

    @property
    def client(self) -> str: ...

    def work(self) -> int:
        """What is left of the whole request."""
        ...


W = TypeVar("W", bound=Waiting)


class Order:
    """The order of one resource.

    Args: speed: work a second, until it is measured.
    """

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed
        self._recent: dict[str, tuple[float, float]] = {}  # client -> work, time of that

    def measured(self, work: int, seconds: float) -> None:
        """Averages the speed over the last twenty or so measurements."""
        if work > 0 and seconds > 0:
            self.speed += 0.05 * (work / seconds - self.speed)

    def begun(self, client: str, work: int, now: float) -> None:
        self._recent[client] = self.recent(client, now) + work, now
        if len(self._recent) > 1000:
            known = {c: self.recent(c, now) for c in self._recent}
            self._recent = {c: (x, now) for c, x in known.items() if x > _FORGOTTEN}

    def recent(self, client: str, now: float) -> float:
        work, then = self._recent.get(client, (0.0, now))
        return work * 0.5 ** ((now - then) / HALF_LIFE)

    def key(self, waiting: Waiting, now: float) -> float:
        age = now - waiting.since
        return self.recent(waiting.client, now) + waiting.work() - AGING * self.speed * age

    def sorted(self, waiting: Iterable[W], now: float) -> list[W]:
        """What begins first comes first; equal keys keep their order."""
        return sorted(waiting, key=lambda x: self.key(x, now))
