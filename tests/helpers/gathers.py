"""All-gathers that a well sharded program must not have."""

import math
from collections.abc import Iterable

from janusflow_jax.planning.collectives import Collective


def elements(item: Collective) -> int:
    return sum(math.prod(x.dims) for x in item.shapes)


def activation_gathers(
    items: Iterable[Collective], params: Iterable[tuple[int, ...]], limit: int
) -> list[Collective]:
    """All-gathers of more than `limit` elements whose result is not a parameter.

    Args:
      params: shapes of all parameters; one layer of stacked layers is a parameter too.
      limit: for example the elements of one chip's own activations.
    """
    known = {_squeezed(s) for s in params} | {_squeezed(s[1:]) for s in params if len(s) > 2}
    return [
        c
        for c in items
        if c.kind == "all-gather"
        and any(math.prod(x.dims) > limit and _squeezed(x.dims) not in known for x in c.shapes)
    ]


def stack_gathers(
    items: Iterable[Collective], params: Iterable[tuple[int, ...]]
) -> list[Collective]:
    """All-gathers whose result is a parameter of all layers at once."""
    stacks = {_squeezed(s) for s in params if len(s) > 2 and s[0] > 1}
    return [
        c
        for c in items
        if c.kind == "all-gather" and any(_squeezed(x.dims) in stacks for x in c.shapes)
    ]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1, in any order: XLA moves them about."""
    return tuple(sorted(n for n in shape if n != 1))
