"""What a compiled step sends between chips, read from XLA's optimized program text.

XLA's own cost analysis has no collectives and counts the body of a loop once. Here a collective
counts as often as the loops around it run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_FACTORS = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "send": lambda n: 1,
}
"""Bytes that one of n chips sends in a ring, per byte of its result."""

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:body|calls|to_apply|branch_computations|called_computations)=(\{.*?\}|%?[\w.\-]+)"
)


class Instruction(NamedTuple):
    root: bool  # of its computation
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression; '' where it does not match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


Program = dict[str, dict[str, Instruction]]
"""Computation -> name -> instruction."""


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of one chip's result: (type, dimensions)
    group: int  # chips that take part together
    times: float  # per step
    between: bool  # whether it crosses the slow network
    op_name: str  # the JAX operation that it comes from

    @property
    def bytes(self) -> int:
        """Of one chip's result."""
        return sum(_type_bytes(t) * math.prod(dims) for t, dims in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that one chip sends per step if every collective runs as a ring."""
        return self.times * self.bytes * _FACTORS[self.kind](self.group)


def _type_bytes(name: str) -> int:
    bits = re.search(r"\d+", name)  # of bf16, f8e4m3fn, ...; pred has none
    return max(int(bits[0]) // 8, 1) if bits else 1


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
    program = _parse(text)
    match = re.search(r"num_partitions=(\d+)", text)
    partitions = int(match[1]) if match else 1
    per_slice = partitions if partitions < devices else max(partitions // slices, 1)
    out: list[Collective] = []

    def walk(computation: str, times: float) -> None:
        for op in program[computation].values():
            if op.opcode.removesuffix("-start") in _FACTORS:
                scatter = "all-reduce-scatter" in computation
                out.append(_collective(op, times, scatter, partitions, per_slice))
            elif op.opcode == "while":
                trips = _trip_count(program, op)
                inner = times * (while_trips if trips is None else trips)
                walk(op.attribute(r"body=%?([\w.\-]+)"), inner)
            elif not op.opcode.endswith(("-done", "-update")):
                for call in _CALLS.finditer(op.rest):
                    for called in re.findall(r"[\w.\-]+", call[1]):
                        if called not in program:
                            continue
                        # On TPU an asynchronous collective is sent once, but written into the
                        # fusion that starts it, those that overlap it and the one that ends it.
                        ends = any(
                            "AsyncCollectiveDone" in i.rest for i in program[called].values()
                        )
                        if not called.startswith("async_collective_fusion") and not ends:
                            walk(called, times)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry:
        walk(entry[1], 1.0)
    return out


def _parse(text: str) -> Program:
    program: Program = {}
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"))[0]
            body = program.setdefault(name, {})
        elif match := _INSTRUCTION.match(line):
            root, name, *parts = match.groups()
            body[name] = Instruction(bool(root), *parts)
    return program


def _trip_count(program: Program, loop: Instruction) -> float | None:
    """Iterations of a while loop; None where they depend on data.

    XLA states the number for CPU and GPU. For TPU it follows from the loop itself:
    `i = 0; while (i < end) i += step`. The loops in which XLA overlaps a matmul with the collective
    of its operand have a step of 2.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return float(known)
    condition = program[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = program[loop.attribute(r"body=%?([\w.\-]+)")]
    test = next(op for op in condition.values() if op.root)
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition[name] for name in test.operands)
    index = counter.attribute(r"index=(\d+)")
    result = next(op for op in body.values() if op.root)
    if bound.opcode != "constant" or not index or result.opcode != "tuple":
        return None
    update = body[result.operands[int(index)]]
    constants = (body[name] for name in update.operands if body[name].opcode == "constant")
    step = next((_value(op) for op in constants), 1)
    return float(math.ceil(_value(bound) / step)) if step > 0 else None


def _value(constant: Instruction) -> int:
    return int(constant.rest.split(")")[0])


def _collective(
    op: Instruction, times: float, scatter: bool, devices: int, per_slice: int
) -> Collective:
    """Args: scatter: whether it is an all-reduce of which every chip keeps its part only."""
    kind = op.opcode.removesuffix("-start")
    shapes = [(t, tuple(_ints(dims))) for t, dims in _SHAPE.findall(op.result)]
    if op.opcode.endswith("-start") and kind != "all-reduce":
        shapes = [s for s in shapes if s[1] or s[0] != "u32"]
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
        shapes = [(t, (math.prod(dims) // size,)) for t, dims in shapes]
    slice_of = groups // per_slice
    between = kind == "send" or bool((slice_of != slice_of[:, :1]).any())
    op_name = op.attribute(r'op_name="([^"]*)"')
    return Collective(kind, tuple(shapes), size, times, between, op_name)


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
        ids = ids.reshape(_ints(order[1]))
        ids = ids.transpose(_ints(order[2])) if order[2] else ids
    if text.startswith("["):
        return ids.reshape(_ints(text[1 : text.index("]")]))
    if text.startswith("{"):
        return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)])
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


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


class Total(NamedTuple):
    """All collectives of a kind on one of the two networks."""

    kind: str
    between: bool
    times: float
    bytes: float  # of results, per step
    sent: float


def totals(items: Iterable[Collective]) -> list[Total]:
    """Sums by kind and network, the largest first."""
    groups: dict[tuple[str, bool], list[Collective]] = {}
    for c in items:
        groups.setdefault((c.kind, c.between), []).append(c)
    out = [
        Total(
            *key,
            sum(c.times for c in cs),
            sum(c.times * c.bytes for c in cs),
            sum(c.sent for c in cs),
        )
        for key, cs in groups.items()
    ]
    return sorted(out, key=lambda t: -t.sent)
