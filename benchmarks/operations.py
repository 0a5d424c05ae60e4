"""Operations of image generation, chat and training: useful ones, others by cause, and a count.

    python -m benchmarks.operations              # 1.3B, a minute on a CPU; nothing is computed
    python -m benchmarks.operations --size small

Every program is traced and the operations of its jaxpr are counted (`planning/flops.py`). The
useful operations are those of `training/flops.py`. `difference` compares both totals.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator
from pathlib import Path

import jax

from janusflow_jax import config as c
from janusflow_jax.parallel import sharding
from janusflow_jax.planning import flops as plan_flops, sampler

ROOT = Path(__file__).parents[1]
STAGES = ("adaptation", "pretrain", "sft")


def budgets(size: str) -> Iterator[tuple[str, plan_flops.Budget]]:
    """Programs by name, for one image or question; the stages' training steps for 1p3b."""
    mesh = sharding.make_mesh(c.MeshConfig(), jax.devices()[:1])
    for program in sampler.sampler_programs(
        c.model_config(size), mesh, rows=1, cfg=c.SamplerConfig()
    ):
        yield program.name, program.budget("cpu")
    for name in STAGES if size == "1p3b" else ():
        cfg = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
        yield f"training step, `{name}`", plan_flops.budget(cfg, mesh)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--size", default="1p3b", help="test | emoji | small | 1p3b")
    print("| program | useful, TFLOP | share | overhead | counted, TFLOP | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, b in budgets(p.parse_args().size):
        causes = ", ".join(f"{n} {x / b.total:.1%}" for n, x in b.overhead.items() if x)
        print(
            f"| {name} | {b.useful / 1e12:.4g} | {b.useful / b.total:.1%} "
            f"| {causes} | {b.counted / 1e12:.4g} | {b.difference:+.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
