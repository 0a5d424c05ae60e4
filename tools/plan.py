"""Plans a run on machines that are not there: memory, operations, collectives, time and cost.

    python tools/plan.py --config=configs/pretrain.py --topology=v5e:16x16

Compiles the real train step of the config for the topology, ahead of time, and reports what it
needs. Any field of the config can be set, as for training: `--config.mesh.fsdp=16`. Topologies:
v5e:AxB, v6e:AxB, v5p:AxBxC, v4:AxBxC, v3:AxB, tpu7x:AxBxC (chips), h100:GPUS, h100:HOSTSxGPUS.
Needs XLA's compiler for them but no device: `pip install 'jax[tpu]'`, or jax-cuda13-plugin.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it compiles for other devices
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from absl import app, flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from janusflow_jax import cli  # noqa: E402
from janusflow_jax.config import SamplerConfig, flags as flag_parser  # noqa: E402
from janusflow_jax.planning import (  # noqa: E402
    compile as plan_compile,
    report as plan_report,
    topology as plan_topology,
)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, as for training")
_TOPOLOGY = flags.DEFINE_string("topology", None, "v5e:16x16, v5p:4x4x4, h100:8x8, ...")
_SLICES = flags.DEFINE_integer("slices", 1, "number of such slices, joined by a slow network")
_SAMPLER = flags.DEFINE_bool("sampler", False, "plan generation and chat instead of training")
_ROWS = flags.DEFINE_integer("rows", 16, "with --sampler: images or answers at a time")
_STEPS = flags.DEFINE_integer(
    "steps", None, "with --sampler: steps of an image; default 30, of a student its own"
)
_GUIDANCE_UNTIL = flags.DEFINE_float(
    "guidance_until", 1.0, "with --sampler: the time from 0 (noise) to 1 at which guidance ends"
)
_EXACT = flags.DEFINE_bool("exact", False, "compile as a run does; much slower, the same report")
_BEST_REMAT = flags.DEFINE_bool(
    "best_remat", False, "try --config.remat=none, names and full, and plan the first that fits"
)
_MATMUL = flags.DEFINE_float(
    "matmul", None, "assumed share of the peak that matmuls reach; default: 0.8 on TPU, 0.65 on GPU"
)
_KERNEL = flags.DEFINE_float("kernel", 0.45, "assumed share of the peak that attention reaches")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    cfg = _CONFIG.value
    machine = plan_topology.parse(_TOPOLOGY.value or "", _SLICES.value)
    assume = plan_report.Assumptions(matmul=_MATMUL.value, kernel=_KERNEL.value)
    if _SAMPLER.value:
        steps, scale = cfg.model.student.defaults
        solver = SamplerConfig(
            steps=_STEPS.value or steps, guide_until=_GUIDANCE_UNTIL.value * (scale != 1)
        )
        runs = plan_report.sampler_reports(cfg, machine, _ROWS.value, solver, assume)
    else:
        compile_step = plan_report.cheapest_remat if _BEST_REMAT.value else plan_compile.train
        run = compile_step(cfg, machine, exact=_EXACT.value)
        runs = [(run, plan_report.train_report(run, assume))]
    fits = True
    for i, (run, text) in enumerate(runs):
        print("\n\n" * (i > 0) + text, flush=True)
        fits &= plan_report.memory(run).fits
    sys.exit(0 if fits else 2)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(lambda: app.run(main, flags_parser=flag_parser.parse))
