"""A plan's report in words."""

from __future__ import annotations

from typing import Any

from janusflow_jax.planning.report import PARTS
from janusflow_jax.planning.topology import GIB

FLOPS = {
    "useful": "useful (flops.py on a typical batch)",
    "padding": "+ padding",
    "pairs": "+ attention across samples and to later positions",
    "idle_slots": "+ image encoders on slots without a picture",
    "head": "+ the head where there is no target",
    "recomputed": "+ recomputation (remat)",
    "analytic": "= all of it, analytic",
    "jaxpr": "counted on the jaxpr (attention by XLA)",
}


def text(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [_head(report), _memory(report)]
    if report["memory"]["fits"] or not report["memory"]["lacks"]:
        parts += [_flops(report), _collectives(report), _time(report)]
    return "\n\n".join(parts)


def _head(r: dict[str, Any]) -> str:
    mesh = " x ".join(f"{n} {s}" for n, s in r["mesh"].items() if n in ("data", "fsdp", "tensor"))
    rows = f"{r['rows']} rows, " if "rows" in r else ""
    if r.get("accum_steps", 1) > 1:
        rows = f"{r['rows']} rows in {r['accum_steps']} parts, "
    return (
        f"{r['config']} on {r['topology']}: {r['chips']} chips, mesh {mesh}, {rows}"
        f"{r['attention']} attention\ncompiled in {r['compile_seconds']:.0f} s here "
        f"({r['cpu_seconds']:.0f} s of CPU in all), {r['peak_rss'] / GIB:.1f} GiB of memory; "
        "nothing was run"
    )


def _memory(r: dict[str, Any]) -> str:
    m = r["memory"]
    lines = ["memory of a device, GiB"]
    lines += [f"  {PARTS[n]:34} {v / GIB:8.3f}" for n, v in m["parts"].items()]
    if "peak" in m:
        rest = m["peak"] - sum(m["parts"].values())
        lines.append(f"  {'activations and temporaries':34} {rest / GIB:8.3f}")
        lines.append(f"  {'peak':34} {m['peak'] / GIB:8.3f}")
    verdict = "fits" if m["fits"] else "does not fit"
    lines.append(f"  {'of':34} {m['limit'] / GIB:8.3f}  {verdict}")
    if m["lacks"]:  # its figure is the peak, whatever it calls it: plan_compile.needed
        lines.append(f"  the compiler: {m['lacks']}")
    if r["advice"]:
        lines.append("what to change, the cheapest first:")
        lines += [f"  {tip}" for tip in r["advice"]]
    return "\n".join(lines)


def _flops(r: dict[str, Any]) -> str:
    f = r["flops"]
    lines = ["operations of a step, all chips, PFLOP"]
    lines += [f"  {what:52} {f[n] / 1e15:9.4g}" for n, what in FLOPS.items() if n in f]
    if "difference" in f:
        lines.append(f"  {'the two differ by':52} {f['difference']:9.2%}")
    lines.append(f"  {'done, with the attention that runs':52} {f['executed'] / 1e15:9.4g}")
    return "\n".join(lines)


def _collectives(r: dict[str, Any]) -> str:
    lines = [
        "collectives of a step and device",
        f"  {'':38} {'times':>8} {'results':>10} {'sent':>10}",
    ]
    for t in r["collectives"]:
        where = ", between slices or hosts" if t["between"] else ""
        lines.append(
            f"  {t['kind'] + where:38} {t['times']:8.0f} {t['bytes'] / 1e6:7.0f} MB "
            f"{t['sent'] / 1e6:7.0f} MB"
        )
    return "\n".join(lines)


def _time(r: dict[str, Any]) -> str:
    t, given = r["time"], r["assumptions"]
    lines = [
        f"{r.get('unit', 'step')} time, seconds (an estimate: nothing was run there)",
        f"  compute at {given['efficiency']:.0%} of peak {t['compute']:.3f}, state through memory "
        f"{t['update']:.3f}, links at {given['link']:.0%} of their rate {t['links']:.3f}",
        f"  {t['best']:.3f} with all sending hidden, {t['worst']:.3f} with none; with "
        f"{given['overlap']:.0%} hidden {t['estimate']:.3f}",
    ]
    if r.get("stages"):
        lines.append(
            f"\n{'stage':14} {'steps':>8} {'s/step':>8} {'days':>8} {'chip-hours':>11} {'MFU':>6}"
        )
    for s in r.get("stages", ()):
        note = "" if s["rows_divide"] else f"  ({s['rows']} rows do not divide over this mesh)"
        lines.append(
            f"{s['name']:14} {s['steps']:8,} {s['step']:8.3f} {s['days']:8.1f} "
            f"{s['chip_hours']:11,.0f} {s['mfu']:6.1%}{note}"
        )
    return "\n".join(lines)
