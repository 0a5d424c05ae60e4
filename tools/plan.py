"""Plans a run on machines that are not there: memory, operations, collectives, time and cost.

    python tools/plan.py --config=configs/pretrain.py --topology=v5e:16x16

Compiles the real train step of the config for the topology, ahead of time, and says what it needs.
Any field of the config can be set, as for training: `--config.mesh.fsdp=16`. Topologies: v5e:AxB,
v6e:AxB, v5p:AxBxC, v4:AxBxC, v3:AxB, tpu7x:AxBxC (chips), h100:CARDS, h100:HOSTSxCARDS. Needs
XLA's compiler for them and no device: `pip install 'jax[tpu]'`, or jax-cuda13-plugin.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the program is for elsewhere; before jax is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from janusflow_jax import cli, config as config_lib  # noqa: E402
from janusflow_jax.config import flags as flag_parser  # noqa: E402
from janusflow_jax.planning import (  # noqa: E402
    compile as plan_compile,
    report as plan_report,
    sampler as plan_sampler,
    text as plan_text,
    topology as plan_topology,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as for training")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, h100:8x8, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "that many of the topology, joined by a slow network")
_SAMPLER = flags.DEFINE_bool("sampler", False, "plan painting and answering instead of training")
_ROWS = flags.DEFINE_integer("rows", 16, "with --sampler: pictures or answers at a time")
_STEPS = flags.DEFINE_integer("steps", 30, "with --sampler: Euler steps")
_JSON = flags.DEFINE_bool("json", False, "print the report as JSON")
_HLO = flags.DEFINE_string("hlo", "", "file to write the compiled program's text to")
_EXACT = flags.DEFINE_bool("exact", False, "compile as a run does; much slower, the same report")
_EFFICIENCY = flags.DEFINE_float("efficiency", 0.5, "assumed share of peak that matmuls reach")
_OVERLAP = flags.DEFINE_float("overlap", 0.7, "assumed share of sending that computing hides")
STAGES = ("adaptation", "pretrain", "sft")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    machine = plan_topology.parse(_TOPOLOGY.value or "", _SLICES.value)
    given = plan_report.Assumptions(efficiency=_EFFICIENCY.value, overlap=_OVERLAP.value)
    cfg = _CONFIG.value
    if _SAMPLER.value:
        plan_sampling(cfg, machine, given)
    others = [runpy.run_path(str(ROOT / f"configs/{n}.py"))["get_config"]() for n in STAGES]
    run = plan_compile.train(cfg, machine, exact=_EXACT.value)
    if _HLO.value and run.program is not None:
        Path(_HLO.value).write_text(run.program.as_text())
    stages = [other for other in others if other.model == cfg.model]
    report = plan_report.report(run, stages, given)
    print(json.dumps(report, indent=1) if _JSON.value else plan_text.text(report))
    sys.exit(0 if report["memory"]["fits"] else 2)


def plan_sampling(
    cfg: config_lib.TrainConfig, machine: plan_topology.Machine, given: plan_report.Assumptions
) -> None:
    """Reports on every program of the pipeline."""
    runs = plan_sampler.compile_all(cfg, machine, _ROWS.value, _STEPS.value)
    reports = [
        plan_sampler.report(r, what, jaxpr, useful, given) for what, r, jaxpr, useful in runs
    ]
    if _JSON.value:
        print(json.dumps(reports, indent=1))
    else:
        print("\n\n\n".join(plan_text.text(r) for r in reports))
    sys.exit(0 if all(r["memory"]["fits"] for r in reports) else 2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(lambda: app.run(main, flags_parser=flag_parser.parse))
