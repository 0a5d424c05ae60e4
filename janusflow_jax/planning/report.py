"""A plan's report: memory, operations, collectives, time, and what to change when it does not fit.

Nothing is measured on the machine. Memory and collectives are the compiler's. Times follow from
them by `Assumptions`, which every report prints.
"""

from __future__ import annotations

import dataclasses
import re
import resource
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from janusflow_jax.config import SamplerConfig, TrainConfig
from janusflow_jax.parallel import sharding
from janusflow_jax.parallel.chips import GIB
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
    hlo,
    roofline,
    sampler,
    topology,
)
from janusflow_jax.planning.compile import Compiled, bytes_per_device
from janusflow_jax.planning.topology import Machine

PARTS = {
    "params": "parameters, trained",
    "frozen": "parameters, frozen",
    "vae": "parameters of the VAE",
    "opt_state": "optimizer",
    "ema": "EMA",
    "teacher": "parameters of the teacher",
    "model": "parameters",
    "batch": "batch",
    "inputs": "inputs",
}
MARGIN = 0.05  # share of the memory that a choice of ours leaves free
MATMUL = {"tpu": 0.8, "gpu": 0.65}  # share of the peak that matmuls are assumed to reach


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step time rests on beside the compiler's figures. None was measured by us."""

    matmul: float | None = None  # share of the peak that matmuls reach; None: of MATMUL
    kernel: float = 0.45  # share of the peak that attention kernels reach
    memory: float = 0.9  # share of the memory's rate
    link: float = 0.8  # share of a link's rate


class Memory(NamedTuple):
    """Bytes of one device."""

    parts: dict[str, int]  # of the arguments
    peak: int | None  # None: the compiler does not say
    limit: int
    fits: bool


class Part(NamedTuple):
    """What a part of the model takes in a step on one chip. Times are in seconds."""

    flops: float
    bytes: float
    roof: float  # at the peak rates
    compiler: float  # the same, but the compiler's estimates where it has one
    estimate: float  # at the assumed rates


PATTERNS = {
    "VAE": r"Vae\.|latents_to_pixels",
    "SigLIP": r"und_encoder|\.siglip",
    "LLM": r"/llm/",
    "generation encoder and decoder": r"generation_slot|\.velocity",
    "head, REPA, aligners, draws": r"jvp\(",
    "optimizer, EMA, guard": r"^jit\(step\)",
}
"""Parts by the JAX operation that an instruction comes from; the first that matches."""


def part(cost: roofline.Cost) -> str:
    """The part of the model that an instruction belongs to."""
    name = next((n for n, p in PATTERNS.items() if re.search(p, cost.op_name)), "other")
    if name != "LLM":
        return name
    if cost.kind == "other":
        return "LLM: " + ("rotary positions, layouts" if "/attn/" in cost.op_name else "the rest")
    again = "recomputed" if "rematted_computation" in cost.op_name else ""
    passes = again or ("backward" if "transpose(" in cost.op_name else "forward")
    return f"LLM: {'attention' if cost.kind == 'kernel' else 'matmuls'}, {passes}"


def train_report(run: Compiled, assume: Assumptions) -> str:
    """The report on a compiled train step."""
    budget = plan_flops.budget(run.cfg, run.mesh)
    trips = float(plan_flops.head_work(run.cfg, run.mesh)[1])
    rows = f"{run.cfg.batch_rows} rows"
    if run.cfg.optim.accum_steps > 1:
        rows += f" in {run.cfg.optim.accum_steps} parts"
    return report(run, f"{run.cfg.name}, {rows},", budget, trips, assume, run.cfg.num_steps)


def sampler_reports(
    cfg: TrainConfig, machine: Machine, rows: int, solver: SamplerConfig, assume: Assumptions
) -> Iterator[tuple[Compiled, str]]:
    """Compiles the pipeline's programs for a batch of `rows`, and reports on each.

    Args: solver: of the images.
    Raises:
      ConfigError: the config, the topology or the mesh cannot work.
    """
    cfg = plan_compile.prepare(dataclasses.replace(cfg, attention="xla"), machine)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(machine))
    for program in sampler.sampler_programs(cfg.model, mesh, rows, solver):
        with jax.set_mesh(mesh):
            built = plan_compile.build(program.traced, machine)
        run = Compiled(cfg, machine, mesh, program.arguments, *built)
        budget = program.budget(machine.chip.platform)
        yield run, report(run, program.name, budget, float(program.passes), assume)


def report(
    run: Compiled,
    name: str,
    budget: plan_flops.Budget,
    while_trips: float,
    assume: Assumptions,
    num_steps: int = 0,
) -> str:
    """What is known about any program.

    Args:
      while_trips: iterations of loops whose number depends on data.
      num_steps: of a training run.
    """
    mesh = " x ".join(f"{n} {s}" for n, s in run.mesh.shape.items())
    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    m = memory(run)
    sizes = {PARTS[part]: size for part, size in m.parts.items() if size}
    if m.peak is not None:
        sizes |= {"activations and temporaries": m.peak - sum(sizes.values()), "peak": m.peak}
    lines = [
        f"{name} on {run.machine.name}: {run.machine.chips} chips, mesh {mesh}, "
        f"{run.cfg.attention} attention, remat {run.cfg.remat}",
        f"compiled in {run.seconds:.0f} s ({time.process_time():.0f} s of CPU time in all, "
        f"{peak_rss / GIB:.1f} GiB of memory); nothing was run",
        "",
        "memory of a device, GiB",
        *(f"  {label:34} {size / GIB:8.3f}" for label, size in sizes.items()),
        f"  {'of':34} {m.limit / GIB:8.3f}  {'fits' if m.fits else 'does not fit'}",
    ]
    if run.shortage:
        lines.append(f"  the compiler: {run.shortage}")
    if not m.fits:
        lines += ["to make it fit, the cheapest first:", *(f"  {t}" for t in advice(run, m))]
    if run.program is None:  # its collectives and its time are not known
        return "\n".join(lines)
    operations = {
        "useful (training/flops.py)": budget.useful,
        **{f"+ {cause}": count for cause, count in budget.overhead.items()},
        "= total, analytic": budget.total,
        f"counted on the jaxpr ({budget.difference:+.2%})": budget.counted,
    }
    lines += [
        "",
        "operations, all chips, PFLOP",
        *(f"  {label:52} {count / 1e15:9.4g}" for label, count in operations.items()),
        "",
        f"a step by parts, per chip {'':16} TFLOP       GB     roof  compiler  estimate, ms",
    ]
    rows = parts(run, while_trips, assume)
    rows["sum"] = Part(*(sum(x) for x in zip(*rows.values(), strict=True)))
    for label, p in rows.items():
        if p.estimate > 1e-4:
            lines.append(
                f"  {label:40} {p.flops / 1e12:7.2f} {p.bytes / 1e9:8.2f} {p.roof * 1e3:8.1f} "
                f"{p.compiler * 1e3:9.1f} {p.estimate * 1e3:9.1f}"
            )
    lines += [
        "",
        "collectives, per device",
        f"  {'':44} {'times':>8} {'results':>10} {'sent':>10} {'time':>10}",
    ]
    kinds: dict[str, list[plan_collectives.Collective]] = {}
    sent = traffic(run, while_trips)
    for c in sent:
        kind = c.kind + ", exposed" * c.exposed + ", between slices or hosts" * c.between
        kinds.setdefault(kind, []).append(c)
    for kind, cs in kinds.items():
        result = sum(c.times * c.bytes for c in cs) / 1e6
        total = sum(c.sent for c in cs) / 1e6
        ms = 1e3 * sum(link_seconds(run, c, assume) for c in cs)
        times = sum(c.times for c in cs)
        lines.append(f"  {kind:44} {times:8.0f} {result:7.0f} MB {total:7.0f} MB {ms:7.1f} ms")
    exposed, hidden = (
        sum(link_seconds(run, c, assume) for c in sent if c.exposed == waits)
        for waits in (True, False)
    )
    compute, chip = rows["sum"].estimate, run.machine.chip
    total = max(compute, hidden) + exposed
    lines += [
        "",
        "time, seconds (an estimate: nothing was run there)",
        f"  {total:.3f}: computation {compute:.3f} (matmuls at "
        f"{assume.matmul or MATMUL[chip.platform]:.0%} of the peak, attention at "
        f"{assume.kernel:.0%}, memory at {assume.memory:.0%}), communication {hidden:.3f} beside "
        f"it and {exposed:.3f} exposed (links at {assume.link:.0%})",
    ]
    if num_steps:
        used = budget.useful / (total * run.machine.chips * chip.tflops * 1e12)
        hours = total * num_steps / 3600
        lines.append(
            f"  MFU {used:.1%}; {num_steps:,} steps: {hours / 24:.1f} days, "
            f"{hours * run.machine.chips:,.0f} chip-hours"
        )
    return "\n".join(lines)


def memory(run: Compiled) -> Memory:
    """Memory of one device: each part of the arguments, and the peak."""
    parts = {n: bytes_per_device(t) for n, t in run.arguments.items() if n in PARTS}
    limit = run.machine.chip.memory
    if run.program is None:
        return Memory(parts, plan_compile.required_bytes(run.shortage), limit, False)
    m: Any = run.program.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    peak = max(m.peak_memory_in_bytes, held)
    return Memory(parts, peak, limit, peak <= limit)


def cheapest_remat(cfg: TrainConfig, machine: Machine, exact: bool = False) -> Compiled:
    """Compiles with `remat` none, names and full until one leaves MARGIN of the memory free.

    Returns: that program, or the one with full, which needs the least memory.
    """
    run = None
    for remat in ("none", "names", "full"):
        run = plan_compile.train(dataclasses.replace(cfg, remat=remat), machine, exact)
        use = memory(run)
        if use.fits and use.peak is not None and use.peak <= (1 - MARGIN) * use.limit:
            break
    assert run is not None
    return run


def advice(run: Compiled, use: Memory) -> list[str]:
    """Flags that make it fit, the cheapest first.

    Args: use: from `memory`.
    """
    if "batch" not in run.arguments:  # a program of the sampler
        return ["fewer rows at a time", "--config.mesh.fsdp=2"]
    cfg, shape = run.cfg, run.mesh.shape
    fsdp, tensor, accum = shape["fsdp"], shape["tensor"], cfg.optim.accum_steps
    devices = run.machine.chips * run.machine.chip.cores // run.machine.slices // tensor
    wider = next((n for n in (2 * fsdp, 4 * fsdp, 8 * fsdp) if devices % n == 0), 0)
    tips = []
    if cfg.remat == "none":
        tips.append("--config.remat=names (recompute all but matmuls in the backward pass)")
    if cfg.remat != "full":
        tips.append("--config.remat=full (recompute whole blocks in the backward pass)")
    rows = cfg.batch_rows // (shape["data"] * fsdp * accum)
    if rows > 1:
        split = next(n for n in range(2, rows + 1) if rows % n == 0)
        tips.append(
            f"--config.optim.accum_steps={accum * split} ({cfg.batch_rows} rows in {accum * split} "
            f"parts; {rows // split} per chip at a time)"
        )
    if cfg.loss.ce_chunk == 0 or cfg.loss.ce_chunk > 128:
        tips.append("--config.loss.ce_chunk=128 (smaller chunks of logits)")
    if wider:
        mostly_state = sum(use.parts.values()) > use.limit / 2
        shard = f"--config.mesh.fsdp={wider} (shard the state over more chips)"
        tips.insert(0 if mostly_state else len(tips), shard)
    if cfg.model.llm.num_heads % (2 * tensor) == 0 and devices % 2 == 0:
        tips.append(f"--config.mesh.tensor={2 * tensor} (split rows over chips; sends more)")
    return [*tips, "a larger topology"]


def traffic(run: Compiled, while_trips: float) -> list[plan_collectives.Collective]:
    """Every collective of the program."""
    if run.program is None:
        return []
    text = run.program.as_text()
    assert text is not None  # the type allows programs without text
    return plan_collectives.collectives(text, run.machine.islands, while_trips, run.mesh.size)


def parts(run: Compiled, while_trips: float, assume: Assumptions) -> dict[str, Part]:
    """The step by parts of the model, the slowest first."""
    assert run.program is not None
    text, chip = run.program.as_text(), run.machine.chip
    assert text is not None  # the type allows programs without text
    peak, rate = chip.tflops * 1e12 / chip.cores, assume.memory * chip.hbm / chip.cores
    groups = run.mesh.size // run.mesh.shape["tensor"]
    rows = max(run.cfg.batch_rows // (groups * run.cfg.optim.accum_steps), 1)
    share = plan_flops.attention_share(run.cfg, rows, groups)
    out: dict[str, Part] = {}
    for cost in roofline.costs(hlo.parse(text), while_trips):
        reached = assume.matmul or MATMUL[chip.platform]
        if cost.kind == "kernel":
            length = run.cfg.data.row_len
            one_run = plan_flops.attention_kernel(cost.op_name, cost.shapes, length, share)
            cost, reached = cost._replace(flops=cost.times * one_run), assume.kernel
        roof = max(cost.flops / peak, cost.bytes * chip.cores / chip.hbm)
        compiler = cost.cycles / (chip.ghz * 1e9) if cost.cycles and chip.ghz else roof
        estimate = max(cost.flops / (peak * reached), cost.bytes / rate)
        if cost.cycles and chip.ghz:
            estimate = max(estimate, compiler)
        label = part(cost)
        one = Part(cost.flops, cost.bytes, roof, compiler, estimate)
        out[label] = Part(*map(sum, zip(out.get(label, (0.0,) * 5), one, strict=True)))
    return dict(sorted(out.items(), key=lambda item: -item[1].estimate))


def link_seconds(run: Compiled, c: plan_collectives.Collective, assume: Assumptions) -> float:
    """Seconds that a collective's links are busy in a step. An open line has half a ring's rate."""
    chip = run.machine.chip
    if c.between:
        return c.sent * chip.cores / (chip.network * assume.link)
    devices = run.mesh.devices.ravel()
    coords = [getattr(devices[i], "coords", None) or () for i in c.members]
    share = 1.0 if topology.is_ring(run.machine, coords) else 0.5
    return c.sent * chip.cores / (chip.link * share * assume.link)
