"""Replays single rows: their losses and gradient norms with the newest checkpoint's parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from janusflow_jax.config import TrainConfig
from janusflow_jax.config.errors import ConfigError
from janusflow_jax.data import rows as rows_lib
from janusflow_jax.parallel import processes, sharding
from janusflow_jax.training import step as train_step
from janusflow_jax.training.run import open_run


def replay(cfg: TrainConfig, rows: str) -> bool:
    """Prints every row's losses and gradient norm; trains and writes nothing.

    Args: rows: '1234', or '1024:1536' for the rows of a step.
    Returns: whether all of them are finite.
    """
    first, end = parse_rows(rows)
    run = open_run(cfg, writes=False)
    processes.log(f"rows {first} to {end - 1} with the parameters of step {run.first_step}")
    unsplit = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accum_steps=1))
    step = jax.jit(train_step.make_train_step(unsplit))
    copies = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    all_finite = True
    with jax.set_mesh(run.mesh):
        for number in range(first, end):
            row, bad = run.data.rows.row(number)
            batch = {name: np.stack([x] * copies) for name, x in row.items()}
            _, out = step(run.state, sharding.put_batch(batch, run.mesh, copies))
            values = {k: float(v) for k, v in jax.device_get(out).items()}
            all_finite &= bool(values["ok"])
            processes.log(describe(number, run.data.rows.records(number), values, bad))
    return all_finite


def parse_rows(text: str) -> tuple[int, int]:
    """'12' -> (12, 13), '12:20' -> (12, 20).

    Raises:
      ConfigError: anything else.
    """
    first, colon, end = text.partition(":")
    if first.isdecimal() and (end.isdecimal() if colon else True):
        rows = int(first), int(end) if colon else int(first) + 1
        if rows[0] < rows[1]:
            return rows
    raise ConfigError(f"--replay: expected ROW or FIRST:END, such as 1024:1536; got {text!r}")


def describe(
    row: int,
    records: tuple[str, list[int]],
    values: Mapping[str, float],
    bad: Sequence[rows_lib.BadSample],
) -> str:
    """A row's losses, its records, and which losses and parts' gradients are not finite."""
    source, numbers = records
    losses = [f"{n} {values[f'loss_{n}']:.4f}" for n in ("ar", "rf", "repa")]
    lines = [f"row {row}: {'  '.join(losses)}  gradient {values['grad_norm']:.4g}  {source}"]
    lines.append(f"  records {', '.join(map(str, numbers))}")
    lines += [f"  left out: {sample}" for sample in bad]
    non_finite = [n for n, v in values.items() if not math.isfinite(v)]
    if non_finite:
        lines.append(f"  NOT FINITE: {', '.join(non_finite)}")
    return "\n".join(lines)
