"""What a compiled step sends between chips: read off XLA's optimized program text.

XLA's own figures take the body of a loop once; here every collective counts as often as the loops
around it run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:body|calls|to_apply|branch_computations|called_computations)=(\{.*?\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LAYOUT = re.compile(r"\{[^}]*\}")
_AXIS = r"'(\w+)'(?::\((\d+)\)(\d+))?"
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of one chip's result: (type, dimensions)
    group: int  # chips that take part together
    times: float  # a step
    between: bool
    op_name: str  # the JAX operation that it came from

    @property
    def bytes(self) -> int:
        """Of one chip's result."""
        return sum(BYTES.get(t, 4) * math.prod(dims) for t, dims in self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(dims) for _, dims in self.shapes)

    @property
    def sent(self) -> float:
        """Bytes that one chip sends a step, in rings: what the link's time is made of."""
        n = self.group
        share = (n - 1) / n if n else 0.0
        per_time = {
            "all-gather": self.bytes * share,
            "all-reduce": 2 * self.bytes * share,
            "reduce-scatter": self.bytes * (n - 1),
            "all-to-all": self.bytes * share,
        }.get(self.kind, float(self.bytes))
        return self.times * per_time


def collectives(
    text: str, slices: int = 1, while_trips: float = 1.0, devices: int = 0
) -> list[Collective]:
    """Every collective of a compiled program.

    Args:
      text: of `compiled.as_text()`.
      devices: that it runs on; 0: as it says. For several TPU slices XLA writes one slice's
        program, whose collectives stay inside and whose sends go to the other slices.
      slices: into how many equal runs of devices, joined by a slow network, the devices fall.
      while_trips: passes of loops whose number depends on data.
    """
    bodies = computations(text)
    here = _number(r"num_partitions=(\d+)", text) or _number(r"replica_count=(\d+)", text) or 1
    if devices and slices > 1 and here < devices:
        slices = 1
    devices = here
    found: list[Collective] = []
    seen: set[tuple[str, ...]] = set()

    def walk(name: str, times: float, loop: str) -> None:
        for line in bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            _, result, opcode, rest = match.groups()
            kind = opcode.removesuffix("-start")
            again = False
            if kind in KINDS and name != loop:  # in a fusion: of its start, middle or end
                channel, op = (_first(p, rest) for p in (r"channel_id=(\d+)", _OP_NAME))
                once = (loop, kind, channel, _LAYOUT.sub("", result), op)
                again = once in seen
                seen.add(once)
            if kind in KINDS and not again:
                fused = "all-reduce-scatter" in name  # an all-reduce of which each keeps its part
                found.append(_collective(kind, result, rest, opcode, times, fused, devices, slices))
            if opcode.endswith(("-done", "-update")):
                continue
            inner = times
            if opcode == "while":
                known = trip_count(bodies, name, rest)
                inner = times * (while_trips if known is None else known)
            if kind not in KINDS:  # a reduction's own sum sends nothing
                for called in _called(rest):
                    walk(called, inner, called if opcode == "while" else loop)

    walk(entry(text), 1.0, entry(text))
    return found


def computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of every computation of a program's text."""
    out: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split()[0].lstrip("%").split("(")[0]
            lines = out.setdefault(name, [])
        else:
            lines.append(line)
    return out


def trip_count(bodies: dict[str, list[str]], caller: str, rest: str) -> float | None:
    """Passes of a while loop; None where its bound is no constant.

    Args: caller: the computation that holds it; rest: what follows `while(` in its text.
    """
    said = _TRIPS.search(rest)
    if said:
        return float(said[1])
    condition, body = (
        _instructions(bodies[m[1]])
        for m in (re.search(rf"{n}=%?([\w.\-]+)", rest) for n in ("condition", "body"))
        if m
    )
    test = next((r for r in condition.values() if r.root), None)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = (condition.get(n) for n in test.operands()[:2])
    end = _constant(bound)
    if end is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(_number(r"index=(\d+)", counter.rest))
    result = next(r for r in body.values() if r.root)
    step = 1
    if result.opcode == "tuple":
        update = body.get(result.operands()[index])
        if update is not None and update.opcode == "add":
            by = [_constant(body.get(n)) for n in update.operands()]
            step = next((b for b in by if b), 1)
    start = 0
    here = _instructions(bodies[caller])
    given = here.get(_names(rest)[0])
    if given is not None and given.opcode == "tuple":
        start = _constant(here.get(given.operands()[index])) or 0
    return float(max(-(-(end - start) // step), 0))


class _Instruction(NamedTuple):
    root: bool
    opcode: str
    rest: str

    def operands(self) -> list[str]:
        return _names(self.rest.split(")")[0])


def _names(text: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", text)


def _instructions(lines: Iterable[str]) -> dict[str, _Instruction]:
    matches = (_INSTRUCTION.match(line) for line in lines)
    return {m[1]: _Instruction(m[0].lstrip().startswith("ROOT"), m[3], m[4]) for m in matches if m}


def _constant(found: _Instruction | None) -> int | None:
    if found is None or found.opcode != "constant":
        return None
    value = re.match(r"(-?\d+)\)", found.rest)
    return int(value[1]) if value else None


def entry(text: str) -> str:
    found = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return found[1] if found else ""


def _called(rest: str) -> Iterator[str]:
    for match in _CALLS.finditer(rest):
        yield from re.findall(r"[\w.\-]+", match[1].strip("{}").replace("%", ""))


def _first(pattern: str | re.Pattern[str], text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def _collective(
    kind: str,
    result: str,
    rest: str,
    opcode: str,
    times: float,
    fused: bool,
    devices: int,
    slices: int,
) -> Collective:
    shapes = [
        (t, tuple(int(d) for d in dims.split(",") if d)) for t, dims in _SHAPE.findall(result)
    ]
    if opcode.endswith("-start") and kind != "all-reduce":
        shapes = [s for s in shapes if s[1] or s[0] != "u32"]
        shapes = shapes[len(shapes) // 2 :]  # (operands, results)
    if kind == "send":
        shapes = shapes[:1]  # then a context and a token
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        groups = np.array(re.findall(r"\d+", pairs[1]) if pairs else [], int).reshape(-1, 2)
    else:
        groups = replica_groups(rest, devices)
    group = groups.shape[1] if groups.size else devices
    if kind == "all-reduce" and fused:
        kind = "reduce-scatter"
        shapes = [(t, (math.prod(d) // group,)) for t, d in shapes]
    where = groups // max(devices // slices, 1)
    name = _OP_NAME.search(rest)
    return Collective(
        kind,
        tuple(shapes),
        group,
        times,
        kind == "send" or bool(groups.size and (where != where[:, :1]).any()),
        name[1] if name else "",
    )


def replica_groups(rest: str, devices: int) -> np.ndarray:
    """int[groups, size] of an instruction's attributes; one group of all where none are named.

    Written as lists `{{0,1},{2,3}}`, as an order of all `[2,2]<=[2,2]T(1,0)`, or as axes of a mesh
    `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}` (an axis in part: `'b':(1)2`).
    """
    mesh = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{(.*?)\}",
        rest,
    )
    if mesh:
        axes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        dims = _numbers(mesh[2]) or list(axes.values())
        return _over_axes(_order(dims, _numbers(mesh[3])), axes, mesh[4])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        return _order(_numbers(iota[2]), _numbers(iota[3])).reshape(_numbers(iota[1]))
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return np.array([_numbers(g) for g in re.findall(r"\{([\d,]+)\}", listed[1])])
    return np.arange(devices)[None]


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _order(dims: list[int], permutation: list[int]) -> np.ndarray:
    order = np.arange(math.prod(dims)).reshape(dims)
    return order.transpose(permutation) if permutation else order


def _over_axes(order: np.ndarray, axes: dict[str, int], named: str) -> np.ndarray:
    """Groups that differ in the named axes alone; each axis is split where only a part is named."""
    parts = {n: (int(a or 1), int(b or 0)) for n, a, b in re.findall(_AXIS, named)}
    shape: list[int] = []
    inside: list[int] = []
    for name, size in axes.items():
        before, here = parts.get(name, (size, 1))
        here = here or size // before
        if name in parts:
            inside.append(len(shape) + 1)
        shape += [before, here, size // (before * here)]
    outside = [i for i in range(len(shape)) if i not in inside]
    group = math.prod(shape[i] for i in inside)
    return order.reshape(shape).transpose(outside + inside).reshape(-1, group)


class Total(NamedTuple):
    """All collectives of a kind, on one of the two networks."""

    kind: str
    between: bool
    places: int
    times: float
    bytes: float  # of results, a step
    sent: float


def totals(found: Iterable[Collective]) -> list[Total]:
    """By kind and network, the most sent first."""
    groups: dict[tuple[str, bool], list[Collective]] = {}
    for c in found:
        groups.setdefault((c.kind, c.between), []).append(c)
    out = [
        Total(
            kind,
            between,
            len(cs),
            sum(c.times for c in cs),
            sum(c.times * c.bytes for c in cs),
            sum(c.sent for c in cs),
        )
        for (kind, between), cs in groups.items()
    ]
    return sorted(out, key=lambda t: -t.sent)


def gathers_of_activations(
    found: Iterable[Collective], params: Iterable[tuple[int, ...]], limit: int
) -> list[Collective]:
    """All-gathers of more than `limit` elements whose result is no parameter.

    Args:
      params: shapes of all parameters; of stacked layers, one layer's is a parameter too.
      limit: say, the elements of one chip's own activations.
    """
    known = {_squeezed(s) for s in params} | {_squeezed(s[1:]) for s in params if len(s) > 2}
    return [
        c
        for c in found
        if c.kind == "all-gather"
        and any(math.prod(d) > limit and _squeezed(d) not in known for _, d in c.shapes)
    ]


def gathers_of_stacks(
    found: Iterable[Collective], params: Iterable[tuple[int, ...]]
) -> list[Collective]:
    """All-gathers whose result is a parameter of all layers at once."""
    stacks = {_squeezed(s) for s in params if len(s) > 2 and s[0] > 1}
    return [
        c
        for c in found
        if c.kind == "all-gather" and any(_squeezed(d) in stacks for _, d in c.shapes)
    ]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of 1, in any order: XLA moves them about."""
    return tuple(sorted(n for n in shape if n != 1))
