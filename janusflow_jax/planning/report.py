"""What a plan says: memory, operations, collectives, time, and what to change when it does not fit.

Nothing here is measured on the machine. Memory and collectives are the compiler's; times follow
from them by the assumptions in `Assumptions`, which every report prints.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from janusflow_jax.config import TrainConfig
from janusflow_jax.planning import (
    collectives as plan_collectives,
    compile as plan_compile,
    flops as plan_flops,
)
from janusflow_jax.planning.compile import Compiled
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


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What a step time rests on beside the compiler's figures. None was measured by us."""

    efficiency: float = 0.5  # of the makers' peak that matmuls and convolutions reach
    overlap: float = 0.7  # of the time on links that computing hides
    link: float = 0.8  # of the makers' link rate that a collective reaches


def memory(run: Compiled) -> Report:
    """Bytes of one device: every part of the arguments, what else the program needs, its peak."""
    parts = {
        name: plan_compile.bytes_of(tree)
        for name, tree in run.arguments.items()
        if name in PARTS and plan_compile.bytes_of(tree)
    }
    out: Report = {"parts": parts, "limit": run.machine.chip.memory}
    if run.program is None:
        needed = plan_compile.needed(run.lacks)
        return out | ({"peak": needed} if needed else {}) | {"fits": False, "lacks": run.lacks}
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


def advice(run: Compiled, found: Report) -> list[str]:
    """What to change so that it fits, as flags, the cheapest first."""
    cfg, shape = run.cfg, run.mesh.shape
    tips = []
    held = sum(found["parts"].values())
    here = shape["fsdp"]
    most = run.machine.chips * run.machine.chip.cores // run.machine.slices // shape["tensor"]
    wide = next((n for n in (2 * here, 4 * here, 8 * here) if n <= most and most % n == 0), 0)
    if held > found["limit"] / 2 and wide:
        tips.append(f"--config.mesh.fsdp={wide} (state over more chips)")
    if not cfg.remat:
        tips.append("--config.remat=True (blocks are computed again instead of kept)")
    per_device = cfg.batch_rows // (shape["data"] * here * cfg.optim.accum_steps)
    if per_device > 1:
        accum = cfg.optim.accum_steps * next(
            n for n in range(2, per_device + 1) if not per_device % n
        )
        tips.append(
            f"--config.optim.accum_steps={accum} ({cfg.batch_rows} rows in {accum} parts; a chip "
            f"holds {cfg.batch_rows // (shape['data'] * here * accum)} at a time)"
        )
    if cfg.loss.ce_chunk == 0 or cfg.loss.ce_chunk > 128:
        tips.append("--config.loss.ce_chunk=128 (the head's logits in smaller pieces)")
    if held <= found["limit"] / 2 and wide:
        tips.append(f"--config.mesh.fsdp={wide} (state over more chips)")
    if cfg.model.llm.num_heads % (2 * shape["tensor"]) == 0 and most % 2 == 0:
        tips.append(
            f"--config.mesh.tensor={2 * shape['tensor']} (a row over more chips; more to send)"
        )
    return [*tips, "a larger topology"]


def traffic(run: Compiled, while_trips: float) -> list[plan_collectives.Collective]:
    """Every collective of the program."""
    if run.program is None:
        return []
    return plan_collectives.collectives(
        run.program.as_text(), run.machine.islands, while_trips, run.mesh.size
    )


def step_time(run: Compiled, flops: float, sent: Sequence[float], given: Assumptions) -> Report:
    """Seconds of one step.

    Args: flops: over all chips; sent: bytes that a device sends on links, and between slices.
    """
    chip, chips = run.machine.chip, run.machine.chips
    compute = flops / chips / (chip.tflops * 1e12 * given.efficiency)
    # The optimizer reads and writes every number of the state once; gradients are read.
    names = ("params", "opt_state", "ema")
    state = sum(plan_compile.bytes_of(run.arguments.get(n, {})) for n in names)
    update = 2 * state * chip.cores / chip.hbm
    links = sent[0] * chip.cores / (chip.link * given.link)
    links += sent[1] * chip.cores / (chip.network * given.link)
    best = max(compute + update, links)
    worst = compute + update + links
    return {
        "compute": compute,
        "update": update,
        "links": links,
        "best": best,
        "worst": worst,
        "estimate": max(best, compute + update + (1 - given.overlap) * links),
    }


def operations(cfg: TrainConfig, mesh: Any) -> plan_flops.Budget:
    """The operations of a config's train step; its head runs as often as typical rows ask."""
    ran, passes = head_work(cfg, mesh)
    return plan_flops.budget(cfg, plan_compile.trace_counted(cfg, mesh), ran, float(passes))


def head_work(cfg: TrainConfig, mesh: Any) -> tuple[int, int]:
    """Positions of a step that the head runs on, and passes of its loop in one part of the step."""
    parts, length = cfg.optim.accum_steps, cfg.data.row_len
    with jax.set_mesh(mesh):
        ran, passes = cross_entropy.head_positions(
            cfg.model.llm.vocab_size,
            cfg.batch_rows // parts,
            length,
            cfg.loss.ce_chunk,
            plan_flops.typical(cfg).targets // parts,
        )
    return ran * parts, passes


def stages(
    cfgs: Sequence[TrainConfig], run: Compiled, links: float, update: float, given: Assumptions
) -> list[Report]:
    """Days and chip-hours of each config on the machine; links and update of the one compiled."""
    out = []
    chip, chips = run.machine.chip, run.machine.chips
    share = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    for cfg in cfgs:
        cfg = plan_compile.prepare(cfg, run.machine)
        cfg.mesh = run.cfg.mesh
        work = operations(cfg, run.mesh)
        compute = plan_flops.executed(cfg, work) / chips / (chip.tflops * 1e12 * given.efficiency)
        step = max(links, compute + update + (1 - given.overlap) * links)
        out.append(
            {
                "name": cfg.name,
                "steps": cfg.num_steps,
                "rows": cfg.batch_rows,
                "rows_divide": cfg.batch_rows % (share * cfg.optim.accum_steps) == 0,
                "step": step,
                "days": step * cfg.num_steps / 86400,
                "chip_hours": step * cfg.num_steps / 3600 * chips,
                "mfu": work.useful / (step * chips * chip.tflops * 1e12),
            }
        )
    return out


def report(
    run: Compiled, stage_cfgs: Sequence[TrainConfig] = (), given: Assumptions | None = None
) -> Report:
    """Everything about a compiled train step, as JSON values."""
    given = given or Assumptions()
    work = operations(run.cfg, run.mesh)
    found = memory(run)
    sent = traffic(run, float(head_work(run.cfg, run.mesh)[1]))
    on_links = sum((c.sent for c in sent if not c.between), 0.0)
    between = sum((c.sent for c in sent if c.between), 0.0)
    total = plan_flops.executed(run.cfg, work)
    times = step_time(run, total, (on_links, between), given)
    return {
        "config": run.cfg.name,
        "topology": run.machine.name,
        "chips": run.machine.chips,
        "mesh": dict(run.mesh.shape),
        "rows": run.cfg.batch_rows,
        "accum_steps": run.cfg.optim.accum_steps,
        "attention": run.cfg.attention,
        "compile_seconds": run.seconds,
        "cpu_seconds": time.process_time(),
        "peak_rss": plan_compile.peak_rss(),
        "memory": found,
        "advice": [] if found["fits"] else advice(run, found),
        "flops": work._asdict()
        | {"analytic": work.analytic, "difference": work.difference, "executed": total},
        "collectives": [t._asdict() for t in plan_collectives.totals(sent)],
        "assumptions": dataclasses.asdict(given),
        "time": times,
        "stages": stages(stage_cfgs, run, times["links"], times["update"], given),
    }
