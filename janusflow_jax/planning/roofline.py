"""The time of a compiled step, instruction by instruction, from its operations and its bytes.

An instruction takes as long as its operations at the peak rate or its bytes through the device's
memory, whichever is longer (Williams et al., "Roofline", 2009). A loop's instructions count as
often as they run. libtpu writes its own estimate, in cycles, at most fusions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from janusflow_jax.planning import hlo
from janusflow_jax.planning.hlo import Computation, Instruction, Program

FREE = frozenset(
    "after-all bitcast constant custom-call get-tuple-element optimization-barrier parameter "
    "partition-id replica-id tuple all-gather all-reduce all-to-all collective-permute "
    "reduce-scatter send recv".split()
)
"""Instructions that compute nothing. A custom call counts where it is a kernel or a matmul.

Asynchronous copies between the device's memory and a core's run beside the others: what they read
counts where it is used, what they write does not count.
"""
KERNEL = r'custom_call_target="(tpu_custom_call|__gpu\$xla\.gpu\.triton|mosaic_gpu[^"]*)"'
GEMM = r'custom_call_target="(__cublas\$[^"]*|__cudnn\$conv[^"]*)"'


class Cost(NamedTuple):
    """What the runs of an instruction take in a step on one device."""

    kind: str  # matmul (or convolution) | kernel (of Pallas) | other
    op_name: str  # the JAX operation that it comes from
    times: float
    flops: float  # of a kernel: 0
    bytes: float  # through the device's memory
    cycles: float | None  # by the compiler; None where it does not say, and of matmuls
    shapes: list[hlo.Shape]  # of the operands


def costs(program: Program, while_trips: float = 1.0) -> Iterator[Cost]:
    """The cost of every instruction that takes time, without collectives.

    Args: while_trips: iterations of loops whose number depends on data.
    """
    for computation, op, times in hlo.executed(program, while_trips):
        kernel, gemm = op.attribute(KERNEL), op.attribute(GEMM)
        passive = op.opcode in FREE and not kernel and not gemm
        if passive or op.opcode.endswith(("-start", "-done", "-update")):
            continue
        body = list(_inside(program, computation, op))
        counts = [(matmul_flops(c, i), i.op_name) for c, i in body]
        total = sum(n for n, _ in counts)
        names = [max(counts)[1]] if total else []
        names += [op.op_name, *(n for _, n in counts)]
        cycles = op.attribute(r'"estimated_cycles":"(\d{1,18})"')  # more digits: not known
        if total:  # the tiling is a plan's, which is quicker to find and slower than a run's
            cycles = ""
        yield Cost(
            kind="kernel" if kernel else "matmul" if total else "other",
            op_name=next((n for n in names if "/" in n), ""),
            times=times,
            flops=times * total,
            bytes=times * memory_bytes(program, computation, op),
            cycles=times * int(cycles) if cycles else None,
            shapes=[s for n in op.operands if n in computation for s in computation[n].shapes],
        )


def _inside(
    program: Program, computation: Computation, op: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or those of a fusion, with the computations that they stand in."""
    body = program.called(op)
    if not body:
        yield computation, op
    for inner in body.values():
        yield from _inside(program, body, inner)


def matmul_flops(computation: Computation, op: Instruction) -> float:
    """Operations of a dot, a convolution or a library's matmul, two per multiply-add; else 0."""
    if op.opcode not in ("dot", "convolution") and not op.attribute(GEMM):
        return 0.0
    lhs, rhs = (computation[name].shapes[0].dims for name in op.operands[:2])
    out = op.shapes[0].dims
    if "convBackwardFilter" in op.rest:  # cuDNN names the dimensions of the forward pass
        rhs, out = out, rhs
    elif "convBackwardInput" in op.rest:
        lhs, out = out, lhs
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    if labels is None:
        dims = op.attribute(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)').replace('"', "")
        return 2.0 * math.prod(out) * math.prod(lhs[i] for i in hlo.ints(dims))
    # XLA for TPU writes every matmul as a convolution. Batch dimensions become spatial ones with
    # dilations, so that only products of two elements count, not those with padding.
    x, k, y = labels.groups()
    total = 2.0 * rhs[k.index("i")] * out[y.index("f")] * out[y.index("b")]
    total /= int(op.attribute(r"batch_group_count=(\d+)") or 1)
    for i, d in enumerate(sorted(d for d in k if d.isdigit())):
        window = [
            int(op.attribute(rf"window=\{{[^}}]*\b{name}=(?:[\d_\-]+x){{{i}}}(-?\d+)") or default)
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        ]
        total *= _products(lhs[x.index(d)], rhs[k.index(d)], out[y.index(d)], *window)
    return total


def _products(
    size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, step: int
) -> int:
    """Pairs (output, element of the kernel) of a dimension that meet an element of the input."""
    at = [i * stride - pad + k * step for k in range(kernel) for i in range(out)]
    return sum(0 <= a <= (size - 1) * dilation and a % dilation == 0 for a in at)


def memory_bytes(program: Program, computation: Computation, op: Instruction) -> int:
    """Bytes that one run reads from and writes to the device's memory.

    A slice counts as what it takes, an update in place as what it changes.
    """
    body, operands = program.called(op), op.operands
    if not body:  # as a fusion of one instruction
        arguments = {n: computation[n] for n in operands if n in computation}
        body = {n: i._replace(opcode="parameter", root=False) for n, i in arguments.items()}
        parameters = {n: n for n in arguments}
        body[""] = op._replace(root=True)
    else:
        parameters = {
            n: operands[int(i.rest.split(")")[0])]
            for n, i in body.items()
            if i.opcode == "parameter"
        }
    total = sum(
        _read(program, body, n)
        for n, argument in parameters.items()
        if argument in computation and _stored(computation, argument)
    )
    root = next(n for n, i in body.items() if i.root)
    parts, results = body[root].operands if body[root].opcode == "tuple" else [root], op.shapes
    if len(parts) != len(results):
        return total + sum(s.bytes for s in results if not s.local)
    return total + sum(
        _written(program, body, n) for n, s in zip(parts, results, strict=True) if not s.local
    )


def _stored(computation: Computation, name: str) -> bool:
    """Whether a value comes from the device's memory, directly or by an asynchronous copy."""
    op = computation[name]
    if op.opcode in ("copy-done", "slice-done"):
        name = computation[op.operands[0]].operands[0]
        return name in computation and _stored(computation, name)
    return not any(s.local for s in op.shapes)


def _read(program: Program, body: Computation, name: str) -> int:
    """Bytes that the instructions of a fusion read of a value."""
    size, total = sum(s.bytes for s in body[name].shapes), 0
    for user_name, user in body.items():
        for i, operand in enumerate(user.operands):
            if operand != name or user.opcode == "tuple" or "AsyncCollective" in user.rest:
                continue
            if user.opcode == "fusion":
                inner = program.called(user)
                argument = next(
                    n
                    for n, p in inner.items()
                    if p.opcode == "parameter" and p.rest.startswith(f"{i})")
                )
                total += _read(program, inner, argument)
            elif user.opcode == "bitcast":
                total += _read(program, body, user_name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and i == 0:
                total += sum(s.bytes for s in user.shapes)
            elif user.opcode not in ("dynamic-update-slice", "scatter") or i > 0:
                total += size
    return min(total, size)


def _written(program: Program, body: Computation, name: str) -> int:
    """Bytes of a fusion's result that it writes itself."""
    op = body[name]
    if op.opcode == "parameter":
        return 0
    if op.opcode == "bitcast":
        return _written(program, body, op.operands[0])
    if op.opcode == "fusion" and len(op.shapes) == 1:
        inner = program.called(op)
        return _written(program, inner, next(n for n, i in inner.items() if i.root))
    if op.opcode in ("dynamic-update-slice", "scatter"):
        op = body[op.operands[1 if op.opcode == "dynamic-update-slice" else -1]]
    return sum(s.bytes for s in op.shapes)
