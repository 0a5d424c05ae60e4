"""A plan's report: memory, operations, collectives, time, and what to change when it does not fit.

Nothing is measured on the machine. Memory and collectives are the compiler's. Times follow from
them by `Assumptions`, which every report prints.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Sequence
from typing import Any

import jax

from janusflow_jax.config import TrainConfig
from janusflow_jax.parallel import sharding
from janusflow_jax.parallel.chips import GIB
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
)
from janusflow_jax.planning.compile import Compiled, bytes_per_device
from janusflow_jax.training import cross_entropy

Report = dict[str, Any]

PARTS = {
    "params": "parameters, trained",
    "frozen": "parameters, frozen",
    "vae": "parameters of the VAE",
    "opt_state": "optimizer",
    "ema": "EMA",
    "batch": "batch",
    "inputs": "inputs",
}
FLOPS = {
    "useful": "useful (training/flops.py, a typical batch)",
    "padding": "+ padding",
    "pairs": "+ attention across samples and to later positions",
    "idle_slots": "+ image encoders on slots without an image",
    "head": "+ the head where there is no target",
    "recomputed": "+ recomputation (remat)",
    "analytic": "= total, analytic",
    "jaxpr": "counted on the jaxpr (XLA's attention)",
}


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step time rests on beside the compiler's figures. None was measured by us."""

    efficiency: float = 0.5  # share of the peak that matmuls and convolutions reach
    overlap: float = 0.7  # share of the time on links that computation hides
    link: float = 0.8  # share of the link rate that a collective reaches


def report(run: Compiled, stage_cfgs: Sequence[TrainConfig], assume: Assumptions) -> Report:
    """Everything about a compiled train step, as JSON values."""
    cfg = run.cfg
    work = operations(cfg, run.mesh)
    executed = plan_flops.executed(cfg, work)
    sent = traffic(run, float(head_work(cfg, run.mesh)[1]))
    times = step_time(run, executed, sent, assume)
    counts = {"analytic": work.analytic, "difference": work.difference, "executed": executed}
    return {
        **common(run, cfg.name, sent, times, assume),
        "rows": cfg.batch_rows,
        "accum_steps": cfg.optim.accum_steps,
        "flops": work._asdict() | counts,
        "stages": stages(stage_cfgs, run, times["links"], times["update"], assume),
    }


def common(
    run: Compiled,
    name: str,
    sent: Sequence[plan_collectives.Collective],
    times: Report,
    assume: Assumptions,
) -> Report:
    """What the reports of all programs have."""
    use = memory(run)
    return {
        "config": name,
        "topology": run.machine.name,
        "chips": run.machine.chips,
        "mesh": dict(run.mesh.shape),
        "attention": run.cfg.attention,
        "compile_seconds": run.seconds,
        "cpu_seconds": time.process_time(),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "memory": use,
        "advice": [] if use["fits"] else advice(run, use),
        "collectives": [t._asdict() for t in plan_collectives.totals(sent)],
        "assumptions": dataclasses.asdict(assume),
        "time": times,
    }


def memory(run: Compiled) -> Report:
    """Bytes of one device: each part of the arguments, temporaries and the peak."""
    sizes = {n: bytes_per_device(t) for n, t in run.arguments.items() if n in PARTS}
    out: Report = {
        "parts": {n: size for n, size in sizes.items() if size},
        "limit": run.machine.chip.memory,
    }
    if run.program is None:
        peak = plan_compile.required_bytes(run.shortage)
        return out | ({"peak": peak} if peak else {}) | {"fits": False, "lacks": run.shortage}
    m = run.program.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    peak = max(m.peak_memory_in_bytes, held)
    return out | {
        "arguments": m.argument_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "peak": peak,
        "fits": peak <= run.machine.chip.memory,
        "lacks": "",
    }


def advice(run: Compiled, use: Report) -> list[str]:
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
    if not cfg.remat:
        tips.append("--config.remat=True (recompute blocks in the backward pass)")
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
        mostly_state = sum(use["parts"].values()) > use["limit"] / 2
        shard = f"--config.mesh.fsdp={wider} (shard the state over more chips)"
        tips.insert(0 if mostly_state else len(tips), shard)
    if cfg.model.llm.num_heads % (2 * tensor) == 0 and devices % 2 == 0:
        tips.append(f"--config.mesh.tensor={2 * tensor} (split rows over chips; sends more)")
    return [*tips, "a larger topology"]


def traffic(run: Compiled, while_trips: float) -> list[plan_collectives.Collective]:
    """Every collective of the program."""
    if run.program is None:
        return []
    return plan_collectives.collectives(
        run.program.as_text(), run.machine.islands, while_trips, run.mesh.size
    )


def step_time(
    run: Compiled, flops: float, sent: Sequence[plan_collectives.Collective], assume: Assumptions
) -> Report:
    """Seconds of one step.

    Args: flops: over all chips; sent: the program's collectives.
    """
    chip = run.machine.chip
    compute = flops / run.machine.chips / (chip.tflops * 1e12 * assume.efficiency)
    # The optimizer reads and writes the state once.
    state = [bytes_per_device(run.arguments.get(n, {})) for n in ("params", "opt_state", "ema")]
    update = 2 * sum(state) * chip.cores / chip.hbm
    inside, across = (sum(c.sent for c in sent if c.between == slow) for slow in (False, True))
    links = (inside / chip.link + across / chip.network) * chip.cores / assume.link
    return {
        "compute": compute,
        "update": update,
        "links": links,
        "best": max(compute + update, links),
        "worst": compute + update + links,
        "estimate": _estimate(compute, update, links, assume),
    }


def _estimate(compute: float, update: float, links: float, assume: Assumptions) -> float:
    return max(links, compute + update + (1 - assume.overlap) * links)


def operations(cfg: TrainConfig, mesh: Any) -> plan_flops.Budget:
    """Operations of a config's train step; its head runs as often as typical rows need."""
    positions, passes = head_work(cfg, mesh)
    return plan_flops.budget(cfg, plan_compile.trace_counted(cfg, mesh), positions, float(passes))


def head_work(cfg: TrainConfig, mesh: Any) -> tuple[int, int]:
    """Positions of a step that the head runs on; passes of its loop in one accumulation step."""
    accum = cfg.optim.accum_steps
    with jax.set_mesh(mesh):
        positions, passes = cross_entropy.head_positions(
            cfg.model.llm.vocab_size,
            cfg.batch_rows // accum,
            cfg.data.row_len,
            cfg.loss.ce_chunk,
            plan_flops.typical(cfg).targets // accum,
        )
    return positions * accum, passes


def stages(
    cfgs: Sequence[TrainConfig], run: Compiled, links: float, update: float, assume: Assumptions
) -> list[Report]:
    """Days and chip-hours of each config on the machine.

    Args: links, update: seconds of the step that was compiled, used for all.
    """
    out = []
    peak = run.machine.chips * run.machine.chip.tflops * 1e12
    for cfg in cfgs:
        cfg = plan_compile.prepare(cfg, run.machine)
        cfg.mesh = run.cfg.mesh
        work = operations(cfg, run.mesh)
        compute = plan_flops.executed(cfg, work) / (peak * assume.efficiency)
        step = _estimate(compute, update, links, assume)
        multiple = sharding.row_multiple(run.mesh, cfg.optim.accum_steps)
        out.append(
            {
                "name": cfg.name,
                "steps": cfg.num_steps,
                "rows": cfg.batch_rows,
                "rows_divide": cfg.batch_rows % multiple == 0,
                "step": step,
                "days": step * cfg.num_steps / 86400,
                "chip_hours": step * cfg.num_steps / 3600 * run.machine.chips,
                "mfu": work.useful / (step * peak),
            }
        )
    return out


def text(r: Report) -> str:
    """A report for people."""
    mesh = " x ".join(f"{n} {s}" for n, s in r["mesh"].items())
    rows = f"{r['rows']} rows, " if "rows" in r else ""
    if r.get("accum_steps", 1) > 1:
        rows = f"{r['rows']} rows in {r['accum_steps']} parts, "
    m = r["memory"]
    lines = [
        f"{r['config']} on {r['topology']}: {r['chips']} chips, mesh {mesh}, {rows}"
        f"{r['attention']} attention",
        f"compiled in {r['compile_seconds']:.0f} s ({r['cpu_seconds']:.0f} s of CPU time in all, "
        f"{r['peak_rss'] / GIB:.1f} GiB of memory); nothing was run",
        "",
        "memory of a device, GiB",
    ]
    sizes = {PARTS[name]: size for name, size in m["parts"].items()}
    if "peak" in m:
        sizes |= {"activations and temporaries": m["peak"] - sum(sizes.values()), "peak": m["peak"]}
    lines += [f"  {label:34} {size / GIB:8.3f}" for label, size in sizes.items()]
    verdict = "fits" if m["fits"] else "does not fit"
    lines.append(f"  {'of':34} {m['limit'] / GIB:8.3f}  {verdict}")
    if m["lacks"]:
        lines.append(f"  the compiler: {m['lacks']}")
    if r["advice"]:
        lines += ["to make it fit, the cheapest first:", *(f"  {tip}" for tip in r["advice"])]
    if m["lacks"]:  # there is no program: its collectives and its time are not known
        return "\n".join(lines)
    f, t, assume = r["flops"], r["time"], r["assumptions"]
    lines += ["", "operations of a step, all chips, PFLOP"]
    lines += [f"  {label:52} {f[n] / 1e15:9.4g}" for n, label in FLOPS.items() if n in f]
    if "difference" in f:
        lines.append(f"  {'difference of the two totals':52} {f['difference']:9.2%}")
    lines += [
        f"  {'executed, with the attention that runs':52} {f['executed'] / 1e15:9.4g}",
        "",
        "collectives of a step, per device",
        f"  {'':38} {'times':>8} {'results':>10} {'sent':>10}",
    ]
    for c in r["collectives"]:
        name = c["kind"] + (", between slices or hosts" if c["between"] else "")
        result, sent = c["bytes"] / 1e6, c["sent"] / 1e6
        lines.append(f"  {name:38} {c['times']:8.0f} {result:7.0f} MB {sent:7.0f} MB")
    lines += [
        "",
        f"{r.get('unit', 'step')} time, seconds (an estimate: nothing was run there)",
        f"  computation at {assume['efficiency']:.0%} of peak {t['compute']:.3f}, state through "
        f"memory {t['update']:.3f}, links at {assume['link']:.0%} of their rate {t['links']:.3f}",
        f"  {t['best']:.3f} with all communication hidden, {t['worst']:.3f} with none, "
        f"{t['estimate']:.3f} with {assume['overlap']:.0%}",
    ]
    if r.get("stages"):
        header = ("stage", "steps", "s/step", "days", "chip-hours", "MFU")
        lines += ["", "{:14} {:>8} {:>8} {:>8} {:>11} {:>6}".format(*header)]
    for s in r.get("stages", ()):
        note = "" if s["rows_divide"] else f"  ({s['rows']} rows do not divide over this mesh)"
        lines.append(
            f"{s['name']:14} {s['steps']:8,} {s['step']:8.3f} {s['days']:8.1f} "
            f"{s['chip_hours']:11,.0f} {s['mfu']:6.1%}{note}"
        )
    return "\n".join(lines)
