"""XLA's optimized program text: its instructions, and how often each runs in a step.

XLA's own cost analysis counts the body of a loop once and has no collectives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_FAST_MEMORY = re.compile(r"S\([1-9]\)")  # of a TPU core; the default is the device's memory


class Shape(NamedTuple):
    """An array of one device."""

    type: str
    dims: tuple[int, ...]
    local: bool  # in the core's own memory: it costs no traffic of the device's memory

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.type)  # of bf16, f8e4m3fn, ...; pred has none
        size = max(int(bits[0]) // 8, 1) if bits else 1
        return size * math.prod(self.dims)


class Instruction(NamedTuple):
    root: bool  # of its computation
    result: str  # its type
    opcode: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def shapes(self) -> list[Shape]:
        """The arrays of its result."""
        return shapes(self.result)

    @property
    def op_name(self) -> str:
        """The JAX operation that it comes from."""
        return self.attribute(r'op_name="([^"]*)"')

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression; '' where it does not match."""
        match = re.search(pattern, self.rest)
        return match[1] if match else ""


Computation = dict[str, Instruction]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str

    def called(self, op: Instruction) -> Computation:
        """The body of a fusion; empty where there is none."""
        return self.computations.get(op.attribute(r"calls=%?([\w.\-]+)"), {})


def shapes(text: str) -> list[Shape]:
    return [
        Shape(name, tuple(ints(dims)), bool(layout and _FAST_MEMORY.search(layout)))
        for name, dims, layout in _SHAPE.findall(text)
    ]


def ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def parse(text: str) -> Program:
    """Args: text: from `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    body: Computation = {}
    name = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = re.split(r"[ (]", line.removeprefix("ENTRY ").lstrip("%"))[0]
            body = computations.setdefault(name, {})
        elif match := _INSTRUCTION.match(line):
            root, name, *parts = match.groups()
            body[name] = Instruction(bool(root), *parts)
        elif name in body and line != "}":  # metadata of kernels has line breaks
            body[name] = body[name]._replace(rest=body[name].rest + line)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    return Program(computations, entry[1] if entry else "")


def executed(
    program: Program, while_trips: float = 1.0
) -> Iterator[tuple[Computation, Instruction, float]]:
    """The instructions that run one after another: (their computation, the instruction, times).

    Bodies of loops count as often as they run; bodies of fusions are not entered.

    Args: while_trips: iterations of loops whose number depends on data.
    """

    def walk(name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
        computation = program.computations.get(name, {})
        for op in computation.values():
            if op.opcode == "while":
                trips = trip_count(program, op)
                inner = times * (while_trips if trips is None else trips)
                yield from walk(op.attribute(r"body=%?([\w.\-]+)"), inner)
            elif op.opcode == "conditional":
                branches = op.attribute(r"branch_computations=\{(.*?)\}")
                for branch in re.findall(r"[\w.\-]+", branches):
                    yield from walk(branch, times)
            elif op.opcode in ("call", "async-start"):
                yield from walk(op.attribute(r"(?:to_apply|calls)=%?([\w.\-]+)"), times)
            else:
                yield computation, op, times

    yield from walk(program.entry, 1.0)


def trip_count(program: Program, loop: Instruction) -> float | None:
    """Iterations of a while loop; None where they depend on data.

    XLA states the number for CPU and GPU. For TPU it follows from the loop itself:
    `i = 0; while (i < end) i += step`. The loops in which XLA overlaps a matmul with the collective
    of its operand have a step of 2.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
        return float(known)
    condition = program.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = program.computations[loop.attribute(r"body=%?([\w.\-]+)")]
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
