"""What a compiled step sends between chips, read from XLA's optimized program text.

XLA's own cost analysis counts the body of a loop once. Here a collective counts as often as the
loops around it run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_LAYOUT = re.compile(r"\{[^}]*\}")
_CALLS = re.compile(
    r"\b(?:body|calls|to_apply|branch_computations|called_computations)=(\{.*?\}|%?[\w.\-]+)"
)


class Instruction(NamedTuple):
    root: bool
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
        n = self.group
        share = (n - 1) / n if n else 0.0
        factor = {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": n - 1,
            "all-to-all": share,
        }.get(self.kind, 1.0)
        return self.times * self.bytes * factor


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
    program = parse(text)
    match = re.search(r"num_partitions=(\d+)", text)
    partitions = int(match[1]) if match else 1
    if partitions < devices:
        slices = 1
    out: list[Collective] = []
    seen: set[tuple[str, ...]] = set()

    def walk(computation: str, times: float, loop: str) -> None:
        for op in program.get(computation, {}).values():
            kind = op.opcode.removesuffix("-start")
            if kind in KINDS:
                if computation != loop:
                    # On TPU an asynchronous collective is written into the start, the middle and
                    # the end of a fusion, but it is sent once.
                    result, channel = _LAYOUT.sub("", op.result), op.attribute(r"channel_id=(\d+)")
                    once = (loop, kind, channel, result, op.attribute(r'op_name="([^"]*)"'))
                    if once in seen:
                        continue
                    seen.add(once)
                # An all-reduce of which every chip keeps its part only.
                scatter = "all-reduce-scatter" in computation
                out.append(_collective(kind, op, times, scatter, partitions, slices))
            elif not op.opcode.endswith(("-done", "-update")):
                inner = times
                if op.opcode == "while":
                    trips = trip_count(program, program[computation], op)
                    inner *= while_trips if trips is None else trips
                for call in _CALLS.finditer(op.rest):
                    for called in re.findall(r"[\w.\-]+", call[1]):
                        walk(called, inner, called if op.opcode == "while" else loop)

    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry:
        walk(entry[1], 1.0, entry[1])
    return out


def parse(text: str) -> Program:
    """The instructions of a program's text by computation."""
    program: Program = {}
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%").split("(")[0]
            body = program.setdefault(name, {})
        elif match := _INSTRUCTION.match(line):
            root, name, *parts = match.groups()
            body[name] = Instruction(bool(root), *parts)
    return program


def trip_count(program: Program, caller: dict[str, Instruction], op: Instruction) -> float | None:
    """Iterations of a while loop; None where its bound is not a constant.

    XLA states the number for CPU and GPU. For TPU it follows from the loop itself:
    `i = start; while (i < end) i += step`.

    Args: caller: the computation that holds the loop.
    """
    known = op.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return float(known)
    condition = program[op.attribute(r"condition=%?([\w.\-]+)")]
    body = program[op.attribute(r"body=%?([\w.\-]+)")]
    test = next(i for i in condition.values() if i.root)
    if test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition[n] for n in test.operands)
    end, index = _constant(bound), counter.attribute(r"index=(\d+)")
    if end is None or not index:
        return None

    def element(of: Instruction, inside: dict[str, Instruction]) -> Instruction | None:
        """The counter in a tuple."""
        return inside.get(of.operands[int(index)]) if of.opcode == "tuple" else None

    start = _constant(element(caller[op.operands[0]], caller)) or 0
    update = element(next(i for i in body.values() if i.root), body)
    added = update.operands if update is not None and update.opcode == "add" else []
    step = next((n for n in (_constant(body.get(name)) for name in added) if n), 1)
    return float(max(-(-(end - start) // step), 0))


def _constant(op: Instruction | None) -> int | None:
    value = re.match(r"(-?\d+)\)", op.rest) if op is not None and op.opcode == "constant" else None
    return int(value[1]) if value else None


def _collective(
    kind: str, op: Instruction, times: float, scatter: bool, devices: int, slices: int
) -> Collective:
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
    size = groups.shape[1] if groups.size else devices
    if kind == "all-reduce" and scatter:
        kind = "reduce-scatter"
        shapes = [(t, (math.prod(d) // size,)) for t, d in shapes]
    slice_of = groups // max(devices // slices, 1)
    between = kind == "send" or bool((slice_of != slice_of[:, :1]).any())
    op_name = op.attribute(r'op_name="([^"]*)"')
    return Collective(kind, tuple(shapes), size, times, between, op_name)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """int[groups, size] of an instruction's attributes; one group of all devices by default.

    XLA writes lists `{{0,1},{2,3}}`, an order of all devices `[2,2]<=[2,2]T(1,0)`, or axes of a
    mesh `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}` (a part of an axis: `'b':(1)2`).
    """
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{(.*?)\}",
        attributes,
    )
    if mesh:
        axes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        dims = _ints(mesh[2]) or list(axes.values())
        return _over_axes(_order(dims, _ints(mesh[3])), axes, mesh[4])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        return _order(_ints(iota[2]), _ints(iota[3])).reshape(_ints(iota[1]))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return np.array([_ints(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]


def _ints(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _order(dims: list[int], permutation: list[int]) -> np.ndarray:
    order = np.arange(math.prod(dims)).reshape(dims)
    return order.transpose(permutation) if permutation else order


def _over_axes(order: np.ndarray, axes: dict[str, int], named: str) -> np.ndarray:
    """Groups that differ in the named axes only; an axis named in part is split in three."""
    parts = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named)
    }
    shape: list[int] = []
    inside: list[int] = []
    for name, whole in axes.items():
        before, size = parts.get(name, (whole, 1))
        size = size or whole // before
        if name in parts:
            inside.append(len(shape) + 1)
        shape += [before, size, whole // (before * size)]
    outside = [i for i in range(len(shape)) if i not in inside]
    group = math.prod(shape[i] for i in inside)
    return order.reshape(shape).transpose(outside + inside).reshape(-1, group)


class Total(NamedTuple):
    """All collectives of a kind on one of the two networks."""

    kind: str
    between: bool
    places: int  # in the program
    times: float
    bytes: float  # of results, per step
    sent: float


def totals(items: Iterable[Collective]) -> list[Total]:
    """Sums by kind and network, the largest first."""
    groups: dict[tuple[str, bool], list[Collective]] = {}
    for c in items:
        groups.setdefault((c.kind, c.between), []).append(c)
    out = []
    for (kind, between), cs in groups.items():
        times, sent = sum(c.times for c in cs), sum(c.sent for c in cs)
        result = sum(c.times * c.bytes for c in cs)
        out.append(Total(kind, between, len(cs), times, result, sent))
    return sorted(out, key=lambda t: -t.sent)
