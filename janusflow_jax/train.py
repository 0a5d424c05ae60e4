"""Trains JanusFlow: `python -m janusflow_jax.train --config=configs/emoji.py`.

Run the same command again to go on where it stopped. Ctrl-C and SIGTERM end with a saved
checkpoint. Any field of the config can be set: `--config.optim.lr=3e-4`.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from janusflow_jax import (
    checkpoint,
    config_checks,
    flops,
    guard,
    latents,
    metrics,
    samples,
    sharding,
    starts,
    train_step,
    trees,
)
from janusflow_jax import config as config_lib
from janusflow_jax import workdir as workdir_lib
from janusflow_jax.config import ConfigError, TrainConfig
from janusflow_jax.data import chat_format, latent_cache, lengths, loader, rows, sources

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon: configs/ablation.py:A,test"
)
_REPLAY = flags.DEFINE_string(
    "replay",
    "",
    "ROW or FIRST:END: print the losses and gradient norms of these rows alone, with the newest "
    "checkpoint, and train nothing (bad_steps.jsonl in the workdir names rows worth a look)",
)
_USER_ERRORS = (
    ConfigError,
    guard.DivergedError,
    checkpoint.CheckpointError,
    chat_format.FormatError,
    latent_cache.CacheError,
    lengths.LengthsError,
    loader.BadDataError,
    rows.DataError,
    sources.SourceError,
)


def make_state(cfg: TrainConfig, mesh: Any, params: Any, vae_params: Any) -> Any:
    """The sharded start state."""
    create = lambda p, v: train_step.create_state(cfg, p, v)  # noqa: E731
    shapes = jax.eval_shape(create, params, vae_params)
    where = train_step.state_shardings(shapes, mesh)
    return jax.jit(create, out_shardings=where)(params, vae_params)


def restore(cfg: TrainConfig, ckpts: checkpoint.RunCheckpoints, state: Any) -> tuple[Any, int]:
    """The newest committed checkpoint put into `state`; (state, 0) when there is none."""
    step = ckpts.latest()
    if step is None:
        return state, 0
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {n: state[n] for n in train_step.SAVED},
    )
    got, run = ckpts.restore(step, abstract)
    counters = {n: jnp.int32(run[n]) for n in ("step", "bad_steps")}
    where = {n: state[n].sharding for n in counters}
    return {**state, **got, **jax.device_put(counters, where)}, int(run["next_row"])


class Stop:
    """Remembers SIGTERM and Ctrl-C; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping: saving a checkpoint after this step", flush=True)


@dataclasses.dataclass
class Run:
    """A run, opened: its state is the newest checkpoint's, or the start's."""

    cfg: TrainConfig
    workdir: epath.Path
    mesh: Any
    data: loader.Loader
    chat: Any
    ckpts: checkpoint.RunCheckpoints
    state: Any
    next_row: int

    @property
    def step(self) -> int:
        return int(self.state["step"])


def open_run(cfg: TrainConfig) -> Run:
    """Everything that a run needs, from disk onto the devices, with what is wrong said first."""
    config_lib.raise_problems(f"config {cfg.name!r}", config_checks.train_problems(cfg))
    starts.check_needs(cfg)
    workdir = epath.Path(cfg.workdir or f"runs/{cfg.name}").resolve()
    params, vae_params, hub, origins = starts.initial_params(cfg)
    starts.print_origins(cfg, params, vae_params, origins)
    chat = chat_format.ChatFormat.load(hub, num_image_tokens=cfg.model.num_image_tokens)
    chat.check_vocab(cfg.model.llm.vocab_size)
    data = loader.Loader(cfg.data, cfg.model, chat, cfg.batch_rows, bool(cfg.loss.repa_weight))
    latents.check(cfg, data.rows, params, vae_params)
    _print_data(cfg, data)
    mesh = sharding.make_mesh(cfg.mesh)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.batch_rows % (split * cfg.optim.accum_steps):
        raise ConfigError(
            f"batch_rows: expected a multiple of data x fsdp x accum_steps = {split} x "
            f"{cfg.optim.accum_steps}; got {cfg.batch_rows}"
        )
    print(f"{jax.device_count()} {jax.default_backend()} device(s), mesh {dict(mesh.shape)}")
    workdir_lib.start(workdir, cfg, vae=vae_params, hub=hub)
    with jax.set_mesh(mesh):
        state = make_state(cfg, mesh, params, vae_params)
        ckpts = checkpoint.RunCheckpoints(workdir, keep=cfg.keep_checkpoints)
        state, next_row = restore(cfg, ckpts, state)
    return Run(cfg, workdir, mesh, data, chat, ckpts, state, next_row)


def _print_data(cfg: TrainConfig, data: loader.Loader) -> None:
    for phase, (first_row, _) in enumerate(cfg.data.phases()):
        if first_row:
            print(f"after step {first_row // cfg.batch_rows}:")
        for source in data.describe(phase):
            print(
                "{source} ({task}): {samples} samples of {records} records in {bins} bins, "
                "{fill:.1%} of positions used, {share_of_positions:.1%} of the mixture".format(
                    **source
                )
                + (f"; {source['left_out']} too long, left out" if source["left_out"] else "")
            )


def train(cfg: TrainConfig) -> str:
    """Runs the config to its last step, or until told to stop. Returns the workdir."""
    started = time.time()
    run = open_run(cfg)
    stop = Stop()
    with jax.set_mesh(run.mesh):
        if run.step:
            print(f"resumed from step {run.step}")
        writer = metrics.Writer(run.workdir, resume_step=run.step, tensorboard=cfg.tensorboard)
        step = _loop(run, writer, stop)
        run.ckpts.wait()
        if not stop.signal:
            samples.write(cfg, run.workdir, step, run.state, run.chat, writer)
        writer.close()
        run.ckpts.close()
    minutes = (time.time() - started) / 60
    print(f"{'stopped' if stop.signal else 'done'} at step {step} after {minutes:.1f} min")
    print(f"workdir {run.workdir}")
    return str(run.workdir)


def _loop(run: Run, writer: Any, stop: Stop) -> int:
    """Steps until the last one or a signal, logging one step late; always ends saved."""
    cfg, step = run.cfg, run.step
    compiled = None
    late: tuple[int, Any, loader.Report] | None = None
    peak = cfg.peak_tflops or flops.peak_tflops(jax.devices()[0].device_kind)
    progress = metrics.Progress(cfg.num_steps, step, peak * jax.device_count())
    trained = {p.split("/")[0] for p in train_step.trained_paths(cfg)}
    watch = guard.Guard(run.workdir, cfg.max_bad_steps)
    saved = step
    batches = run.data.batches(run.next_row)
    while step < cfg.num_steps and not stop.signal and not watch.tripped:
        waited = time.perf_counter()
        batch, report = next(batches)
        waited = time.perf_counter() - waited
        work = flops.count(batch, cfg.data.gen_slots, cfg.data.und_slots)
        batch = sharding.put_batch(batch, run.mesh, cfg.batch_rows)
        if compiled is None:
            compiled = train_step.jit_train_step(cfg, run.mesh, run.state, batch)
        run.state, out = compiled(run.state, batch)
        step += 1
        progress.count(
            waited,
            images=work.gen_images + work.und_images,
            positions=work.positions,
            tflops=work.flops(cfg.model, trained, bool(cfg.loss.repa_weight)) / 1e12,
            padding=work.padding,
            idle_slots=work.idle_slots,
        )
        if late is not None:
            _log(cfg, writer, progress, watch, *late)
        late = (step, out, report)
        if cfg.save_every_steps and step % cfg.save_every_steps == 0:
            _save(cfg, run.ckpts, run.state, step)
            saved = step
        if cfg.sheet_every_steps and step % cfg.sheet_every_steps == 0 and step < cfg.num_steps:
            samples.write(cfg, run.workdir, step, run.state, run.chat, writer)
    if late is not None:
        _log(cfg, writer, progress, watch, *late)
    if step != saved:
        _save(cfg, run.ckpts, run.state, step)
    batches.close()
    if watch.tripped:
        run.ckpts.wait()
        raise guard.DivergedError(watch.message())
    return step


def _save(cfg: TrainConfig, ckpts: Any, state: Any, step: int) -> None:
    run = {
        "step": step,
        "bad_steps": int(state["bad_steps"]),
        "next_row": step * cfg.batch_rows,
        "config": config_lib.to_dict(cfg),
    }
    ckpts.save(
        step,
        params=trees.merge(state["frozen"], state["params"]),
        ema=state["ema"],
        opt_state=state["opt_state"],
        run=run,
    )


def _log(
    cfg: TrainConfig, writer: Any, progress: Any, watch: guard.Guard, step: int, out: Any,
    report: loader.Report,
) -> None:  # fmt: skip
    """Fetches a past step's metrics; counts steps whose losses are no numbers."""
    watch.count(step, bool(out["ok"]), report)
    if step % cfg.log_every_steps and step not in (1, cfg.num_steps):
        return
    values = {k: float(v) for k, v in jax.device_get(out).items()} | progress.rates()
    values |= {"bad_samples": report.num_bad, "samples": report.num_samples}
    writer.write(step, values)
    print(progress.line(step, values), flush=True)


def replay(cfg: TrainConfig, rows_asked: str) -> bool:
    """Losses and gradients of single rows, with the parameters of the newest checkpoint.

    Args: rows_asked: '1234', or '1024:1536' for a step's rows.
    Returns: whether all of them are finite.
    """
    first, end = guard.parse_rows(rows_asked)
    run = open_run(cfg)
    print(f"rows {first} to {end - 1} with the parameters of step {run.step}")
    alone = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accum_steps=1))
    copies = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    step = jax.jit(train_step.make_train_step(alone))
    fine = True
    with jax.set_mesh(run.mesh):
        for number in range(first, end):
            row, bad = run.data.rows.row(number)
            batch = {name: np.stack([x] * copies) for name, x in row.items()}
            _, out = step(run.state, sharding.put_batch(batch, run.mesh, copies))
            values = {k: float(v) for k, v in jax.device_get(out).items()}
            fine &= bool(values["ok"])
            print(guard.describe(number, run.data.rows.records(number), values, bad), flush=True)
    return fine


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config=FILE[:ARG]")
    try:
        cfg = _CONFIG.value
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error
    if _REPLAY.value:
        sys.exit(0 if replay(cfg, _REPLAY.value) else 1)
    train(cfg)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one line for a field, value or config file that it cannot take."""
    for arg in argv[1:]:
        if arg.startswith("--config."):
            config_lib.check_field(arg.removeprefix("--config.").split("=")[0])
    try:
        return app.parse_flags_with_usage(argv)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--config: {error}") from error


def run() -> None:
    """The command line; errors that the user can mend are one message, not a stack."""
    flags.mark_flag_as_required("config")
    try:
        app.run(main, flags_parser=parse_flags)
    except _USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
