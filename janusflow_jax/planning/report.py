"""A plan's report: memory, operations, collectives, time, and what to change when it does not fit.

Nothing is measured on the machine. Memory and collectives are the compiler's. Times follow from
them by `Assumptions`, which every report prints.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from janusflow_jax.config import TrainConfig
from janusflow_jax.parallel import sharding
from janusflow_jax.parallel.chips import GIB
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
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
    "model": "parameters",
    "batch": "batch",
    "inputs": "inputs",
}
MARGIN = 0.05  # share of the memory that a choice of ours leaves free


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step time rests on beside the compiler's figures. None was measured by us."""

    efficiency: float = 0.5  # share of the peak that matmuls and convolutions reach
    overlap: float = 0.7  # share of the time on links that computation hides
    link: float = 0.8  # share of the link rate that a collective reaches


class Memory(NamedTuple):
    """Bytes of one device."""

    parts: dict[str, int]  # of the arguments
    peak: int | None  # None: the compiler does not say
    limit: int
    fits: bool


class StepTime(NamedTuple):
    """Seconds of one step by what takes them."""

    compute: float  # matmuls and convolutions
    state: float  # parameters and other state, through the device's memory
    links: float  # communication

    def total(self, overlap: float) -> float:
        """Seconds of the step if computation hides this share of the communication."""
        return max(self.links, self.compute + self.state + (1 - overlap) * self.links)


def train_report(run: Compiled, stage_cfgs: Sequence[TrainConfig], assume: Assumptions) -> str:
    """The report on a compiled train step.

    Args: stage_cfgs: stages whose time and cost on this machine are printed too.
    """
    budget = plan_flops.budget(run.cfg, run.mesh)
    executed = plan_flops.executed(run.cfg, budget.counted)
    # The optimizer reads and writes the state once.
    state = (run.arguments.get(part, {}) for part in ("params", "opt_state", "ema"))
    moved = 2 * sum(map(bytes_per_device, state))
    sent = traffic(run, float(plan_flops.head_work(run.cfg, run.mesh)[1]))
    times = step_time(run, executed, moved, sent, assume)
    rows = f"{run.cfg.batch_rows} rows"
    if run.cfg.optim.accum_steps > 1:
        rows += f" in {run.cfg.optim.accum_steps} parts"
    text = report(run, f"{run.cfg.name}, {rows},", budget, executed, sent, times, assume)
    if run.program is None or not stage_cfgs:
        return text
    return f"{text}\n\n{stages(stage_cfgs, run, times, assume)}"


def sampler_reports(
    cfg: TrainConfig, machine: Machine, rows: int, num_steps: int, assume: Assumptions
) -> Iterator[tuple[Compiled, str]]:
    """Compiles the pipeline's programs for a batch of `rows`, and reports on each.

    Args: num_steps: Euler steps.
    Raises:
      ConfigError: the config, the topology or the mesh cannot work.
    """
    cfg = plan_compile.prepare(dataclasses.replace(cfg, attention="xla"), machine)
    mesh = sharding.make_mesh(cfg.mesh, topology.devices(machine))
    for program in sampler.sampler_programs(cfg.model, mesh, rows, num_steps):
        with jax.set_mesh(mesh):
            built = plan_compile.build(program.traced, machine)
        run = Compiled(cfg, machine, mesh, program.arguments, *built)
        budget = program.budget(machine.chip.platform)
        moved = program.passes * sum(bytes_per_device(t) for t in program.arguments.values())
        sent = traffic(run, float(program.passes))
        times = step_time(run, budget.counted, moved, sent, assume)
        yield run, report(run, program.name, budget, budget.counted, sent, times, assume)


def report(
    run: Compiled,
    name: str,
    budget: plan_flops.Budget,
    executed: float,
    sent: Sequence[plan_collectives.Collective],
    times: StepTime,
    assume: Assumptions,
) -> str:
    """What is known about any program.

    Args: executed: operations over all chips with the attention that runs; sent: from `traffic`.
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
        "executed, with the attention that runs": executed,
    }
    lines += [
        "",
        "operations, all chips, PFLOP",
        *(f"  {label:52} {count / 1e15:9.4g}" for label, count in operations.items()),
        "",
        "collectives, per device",
        f"  {'':38} {'times':>8} {'results':>10} {'sent':>10}",
    ]
    for c in plan_collectives.totals(sent):
        kind = c.kind + (", between slices or hosts" if c.between else "")
        result, total = c.bytes / 1e6, c.sent / 1e6
        lines.append(f"  {kind:38} {c.times:8.0f} {result:7.0f} MB {total:7.0f} MB")
    return "\n".join(
        [
            *lines,
            "",
            "time, seconds (an estimate: nothing was run there)",
            f"  computation at {assume.efficiency:.0%} of peak {times.compute:.3f}, state through "
            f"memory {times.state:.3f}, links at {assume.link:.0%} of their rate {times.links:.3f}",
            f"  {times.total(1.0):.3f} with all communication hidden, {times.total(0.0):.3f} with "
            f"none, {times.total(assume.overlap):.3f} with {assume.overlap:.0%}",
        ]
    )


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


def step_time(
    run: Compiled,
    executed: float,
    moved: int,
    sent: Sequence[plan_collectives.Collective],
    assume: Assumptions,
) -> StepTime:
    """Args: executed: operations over all chips; moved: bytes of a device's state that are read or
    written; sent: the program's collectives."""
    chip = run.machine.chip
    peak = run.machine.chips * chip.tflops * 1e12
    inside, across = (sum(c.sent for c in sent if c.between == slow) for slow in (False, True))
    return StepTime(
        executed / (peak * assume.efficiency),
        moved * chip.cores / chip.hbm,
        (inside / chip.link + across / chip.network) * chip.cores / assume.link,
    )


def stages(cfgs: Sequence[TrainConfig], run: Compiled, times: StepTime, assume: Assumptions) -> str:
    """A table: days and chip-hours of each config on the machine.

    Args: times: of the compiled step, whose communication and state all stages are assumed to have.
    """
    header = ("stage", "steps", "s/step", "days", "chip-hours", "MFU")
    lines = ["{:14} {:>8} {:>8} {:>8} {:>11} {:>6}".format(*header)]
    chips = run.machine.chips
    peak = chips * run.machine.chip.tflops * 1e12
    for cfg in cfgs:
        cfg = plan_compile.prepare(cfg, run.machine)
        budget = plan_flops.budget(cfg, run.mesh)
        compute = plan_flops.executed(cfg, budget.counted) / (peak * assume.efficiency)
        step = times._replace(compute=compute).total(assume.overlap)
        hours = step * cfg.num_steps / 3600
        divides = cfg.batch_rows % sharding.row_multiple(run.mesh, cfg.optim.accum_steps) == 0
        lines.append(
            f"{cfg.name:14} {cfg.num_steps:8,} {step:8.3f} {hours / 24:8.1f} "
            f"{hours * chips:11,.0f} {budget.useful / (step * peak):6.1%}"
            + ("" if divides else f"  ({cfg.batch_rows} rows do not divide over this mesh)")
        )
    return "\n".join(lines)
