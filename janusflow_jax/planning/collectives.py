"""What a compiled step sends between chips, and whether computation can hide it.

A collective counts as often as the loops around it run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

from janusflow_jax.planning import hlo
from janusflow_jax.planning.hlo import Instruction, Program, Shape

_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "send": lambda n: 1,
}
"""Bytes that one of n chips sends in a ring, per byte of its result."""


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    shapes: tuple[Shape, ...]  # of one chip's result
    members: tuple[int, ...]  # devices of the first group that takes part together
    times: float  # per step
    between: bool  # whether it crosses the slow network
    exposed: bool  # whether the chip waits for it; computation runs beside the others
    op_name: str  # the JAX operation that it comes from

    @property
    def group(self) -> int:
        """Chips that take part together."""
        return len(self.members)

    @property
    def bytes(self) -> int:
        """Of one chip's result."""
        return sum(shape.bytes for shape in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that one chip sends per step if every collective runs as a ring."""
        return self.times * self.bytes * _FACTORS[self.kind](self.group)


def collectives(
    text: str, slices: int = 1, while_trips: float = 1.0, devices: int = 0
) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: from `compiled.as_text()`.
      slices: number of equal groups of devices that the slow network connects.
      while_trips: iterations of loops whose number depends on data.
      devices: on which the program runs; 0: as the text says. For several TPU slices XLA writes
        the program of one slice: its collectives stay inside and its sends go to other slices.
    """
    program = hlo.parse(text)
    match = re.search(r"num_partitions=(\d+)", text)
    partitions = int(match[1]) if match else 1
    per_slice = partitions if partitions < devices else max(partitions // slices, 1)
    return [
        _collective(inner, times, scatter, waits, partitions, per_slice)
        for _, op, times in hlo.executed(program, while_trips)
        for inner, scatter, waits in _inside(program, op)
    ]


def _inside(
    program: Program, op: Instruction, scatter: bool = False, waits: bool = True
) -> Iterator[tuple[Instruction, bool, bool]]:
    """The collectives of an instruction: (collective, whether every chip keeps its part only of
    the result, whether the chip waits)."""
    if op.opcode.removesuffix("-start") in _FACTORS:
        starts = op.opcode.endswith("-start") or op.opcode == "send"
        yield op, scatter, waits and (not starts or '"is_sync":true' in op.rest)
    name = op.attribute(r"calls=%?([\w.\-]+)")
    body = program.called(op).values()
    # On TPU an asynchronous collective is sent once, but written into the fusion that starts it,
    # those that overlap it and the one that ends it.
    ends = any("AsyncCollectiveDone" in i.rest for i in body)
    if name.startswith("async_collective_fusion") or ends:
        return
    waits = waits and not any("AsyncCollectiveStart" in i.rest for i in body)
    for inner in body:
        yield from _inside(program, inner, scatter or "all-reduce-scatter" in name, waits)


def _collective(
    op: Instruction, times: float, scatter: bool, waits: bool, devices: int, per_slice: int
) -> Collective:
    kind = op.opcode.removesuffix("-start")
    shapes = op.shapes
    if op.opcode.endswith("-start") and kind != "all-reduce":
        shapes = [s for s in shapes if s.dims or s.type != "u32"]
        shapes = shapes[len(shapes) // 2 :]  # (operands, results)
    if kind == "send":
        shapes = shapes[:1]  # then a context and a token
    if kind == "collective-permute":
        pairs = op.attribute(r"source_target_pairs=\{(.*?)\}\}")
        groups = np.array(re.findall(r"\d+", pairs), int).reshape(-1, 2)
    else:
        groups = replica_groups(op.rest, devices)
    size = groups.shape[1]
    if scatter:
        kind = "reduce-scatter"
        shapes = [s._replace(dims=(math.prod(s.dims) // size,)) for s in shapes]
    slice_of = groups // per_slice
    between = kind == "send" or bool((slice_of != slice_of[:, :1]).any())
    members = tuple(groups[0].tolist())
    return Collective(kind, tuple(shapes), members, times, between, waits, op.op_name)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """int[groups, size] of an instruction's attributes; one group of all devices by default.

    XLA writes lists `{{0,1},{2,3}}`, an order of all devices `[2,2]<=[2,2]T(1,0)`, or axes of a
    mesh `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}` (a part of an axis: `'b':(1)2`).
    """
    match = re.search(r"replica_groups=(mesh.*?\{.*?\}|\{\{.*?\}\}|\[[^ ]*)", attributes)
    if match is None:
        return np.arange(devices)[None]
    text = match[1]
    order = re.search(r"(?:<=|device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    ids = np.arange(devices)
    if order:
        ids = ids.reshape(hlo.ints(order[1]))
        ids = ids.transpose(hlo.ints(order[2])) if order[2] else ids
    if text.startswith("["):
        return ids.reshape(hlo.ints(text[1 : text.index("]")]))
    if text.startswith("{"):
        return np.array([hlo.ints(group) for group in re.findall(r"\{([\d,]+)\}", text)])
    named = text[text.rindex("{") :]
    shape: list[int] = []
    inside: list[int] = []  # dimensions that vary within a group
    for name, size in re.findall(r"'(\w+)'=(\d+)", text):
        before, part = int(size), 1
        if grouped := re.search(rf"'{name}'(?::\((\d+)\)(\d+))?", named):
            before, part = int(grouped[1] or 1), int(grouped[2] or size)
            inside.append(len(shape) + 1)
        shape += [before, part, int(size) // (before * part)]
    last = range(-len(inside), 0)
    return np.moveaxis(ids.reshape(shape), inside, last).reshape(
        -1, math.prod(shape[i] for i in inside)
    )
