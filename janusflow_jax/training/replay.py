"""Replays single rows: their losses and gradient norms with the newest checkpoint's parameters."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np

from janusflow_jax.config import TrainConfig
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.parallel import numerics, processes, sharding
from janusflow_jax.training import step as train_step
from janusflow_jax.training.run import open_run


@numerics.fixed()
def replay(cfg: TrainConfig, rows: str, accept_data: bool = False) -> bool:
    """Prints every row's records, losses and gradient norm, and what of these is not finite; trains
    and writes nothing.

    Args:
      rows: '1234', or '1024:1536' for the rows of a step.
      accept_data: replay although the content of the data has changed.
    Returns: whether all of them are finite.
    """
    first, end = parse_rows(rows)
    run = open_run(cfg, writes=False, accept_data=accept_data)
    processes.log(
        f"rows {first} to {end - 1} with the parameters of step {run.first_step}, whose "
        f"mean gradient norm is {run.saved.get('mean_norm', 0.0):.4g}"
    )
    unsplit = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accum_steps=1))
    step = jax.jit(train_step.make_train_step(unsplit))
    copies = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    all_finite = True
    with jax.set_mesh(run.mesh):
        for number in range(first, end):
            row, bad = run.data.rows.row(number)
            batch = {name: np.stack([x] * copies) for name, x in row.items()}
            _, out = step(run.state, sharding.put_batch(batch, run.mesh, copies))
            values = {name: float(x) for name, x in jax.device_get(out).items()}
            source, records = run.data.rows.records(number)
            losses = "  ".join(f"{n} {values[f'loss_{n}']:.4f}" for n in ("ar", "rf", "repa"))
            processes.log(f"row {number}: {losses}  gradient {values['grad_norm']:.4g}  {source}")
            processes.log(f"  records {', '.join(map(str, records))}")
            for sample in bad:
                processes.log(f"  left out: {sample}")
            if non_finite := [name for name, x in values.items() if not math.isfinite(x)]:
                processes.log(f"  NOT FINITE: {', '.join(non_finite)}")
                all_finite = False
    return all_finite


def parse_rows(text: str) -> tuple[int, int]:
    """'12' -> (12, 13), '12:20' -> (12, 20).

    Raises:
      ConfigError: anything else.
    """
    if match := re.fullmatch(r"(\d+)(?::(\d+))?", text):
        first = int(match[1])
        end = int(match[2]) if match[2] else first + 1
        if first < end:
            return first, end
    raise ConfigError(f"--replay: expected ROW or FIRST:END, such as 1024:1536; got {text!r}")
