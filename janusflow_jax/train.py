"""Trains JanusFlow: `python -m janusflow_jax.train --config=configs/emoji.py`.

Run the same command again to go on where it stopped. Ctrl-C and SIGTERM end with a saved
checkpoint. Any field of the config can be set: `--config.optim.lr=3e-4`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from janusflow_jax import cli, config as config_lib
from janusflow_jax.checkpoints import run as run_checkpoints, workdir as workdir_lib
from janusflow_jax.config import (
    TrainConfig,
    checks as config_checks,
    flags as flag_parser,
    parts as parts_lib,
)
from janusflow_jax.config.errors import CheckpointError, DivergedError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.eval import previews
from janusflow_jax.parallel import chips, processes, sharding
from janusflow_jax.training import (
    encode_cache,
    flops,
    guard,
    health,
    heldout,
    init as initialization,
    metrics,
    preempt,
    run_state,
    step as train_step,
)

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon: configs/ablation.py:A,test"
)
_REPLAY = flags.DEFINE_string(
    "replay",
    "",
    "ROW or FIRST:END: print the losses and gradient norms of these rows alone, with the newest "
    "checkpoint, and train nothing (bad_steps.jsonl in the workdir names rows worth a look)",
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    processes.MODES,
    "whether this process is one of several: auto joins the others where it was started by Slurm, "
    "on a TPU pod, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set",
)


@dataclasses.dataclass
class Run:
    """A run, opened: its state is the newest checkpoint's, or the start's."""

    cfg: TrainConfig
    workdir: epath.Path
    mesh: Any
    data: loader.Loader
    chat: Any
    ckpts: run_checkpoints.RunCheckpoints
    state: Any
    saved: dict[str, Any]  # the checkpoint's `run.json`; {}: a new run
    heldout: heldout.Heldout
    apart: bool  # checkpoints leave out what `base/` has
    trouble: Exception | None = None  # the workdir could not be written

    @property
    def step(self) -> int:
        """Where it begins."""
        return int(self.saved.get("step", 0))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around what one process writes alone: an error waits until all processes know of it."""
        try:
            yield
        except OSError as error:
            self.trouble = CheckpointError(workdir_lib.explain(error, self.workdir))


def open_run(cfg: TrainConfig, lock: workdir_lib.Lock | None = None, writes: bool = True) -> Run:
    """Everything that a run needs, from disk onto the devices, with what is wrong said first.

    Args: lock: what holds the workdir, on the first process. writes: False: only looks.
    """
    workdir = workdir_of(cfg)
    with processes.together("opening the run"):
        workdir_lib.check(workdir, cfg)
        begun, resumed = initialization.of_workdir(cfg, workdir)
        initialization.check_needs(begun)
    params, vae_params, hub, origins = initialization.initial_params(begun)
    if resumed:
        origins |= {n: "this run's checkpoint" for n, x in origins.items() if x != begun.start}
    initialization.print_origins(cfg, params, vae_params, origins)
    with processes.together("opening the data"):
        chat = chat_format.ChatFormat.load(hub, num_image_tokens=cfg.model.num_image_tokens)
        chat.check_vocab(cfg.model.llm.vocab_size)
        data = loader.Loader(cfg.data, cfg.model, chat, cfg.batch_rows, bool(cfg.loss.repa_weight))
        if resumed:  # `params` are the checkpoint's only later
            digests = workdir_lib.encoders_of(workdir)
        else:
            digests = encode_cache.digests(cfg, data.rows, params)
        encode_cache.check(cfg, data.rows, digests, vae_params)
    processes.log(data.summary())
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_rows(cfg.batch_rows, cfg.optim.accum_steps, mesh)
    of = f" of {processes.count()} processes" if processes.count() > 1 else ""
    processes.log(
        f"{jax.device_count()} {jax.default_backend()} device(s){of}, mesh {dict(mesh.shape)}"
    )
    if writes:
        kept = run_state.begun_with(cfg, params)
        about = {"made_by": "train", "encoders": digests}
        workdir_lib.create(workdir, cfg, params=kept, vae=vae_params, hub=hub, about=about)
    apart = bool(processes.from_main(workdir_lib.start_of(workdir)))
    with jax.set_mesh(mesh):
        state = run_state.make(cfg, mesh, params, vae_params)
        ckpts = run_checkpoints.RunCheckpoints(
            workdir,
            cfg.keep_checkpoints,
            cfg.keep_every_steps,
            before_commit=lock.check if lock else lambda: None,
            writes=writes,
        )
        state, saved = run_state.restore(ckpts, state, apart)
    with processes.together("opening the held-out data"):
        held = heldout.Heldout(cfg, mesh, chat, saved.get("heldout", {}))
    if cfg.evaluate.sources:
        processes.log(held.summary())
    return Run(cfg, workdir, mesh, data, chat, ckpts, state, saved, held, apart)


def workdir_of(cfg: TrainConfig) -> epath.Path:
    """The run's folder, once the config is known to make sense."""
    config_lib.raise_problems(f"config {cfg.name!r}", config_checks.train_problems(cfg))
    return epath.Path(cfg.workdir or f"runs/{cfg.name}").resolve()


def train(cfg: TrainConfig) -> str:
    """Runs the config to its last step, or until told to stop. Returns the workdir."""
    clock, lock = health.Clock(), None
    workdir = workdir_of(cfg)
    with contextlib.ExitStack() as ends:
        with processes.together("opening the workdir"):
            if processes.is_main():
                lock = ends.enter_context(workdir_lib.Lock(workdir))
        run = open_run(cfg, lock)
        stop = ends.enter_context(preempt.Stop())
        ends.enter_context(jax.set_mesh(run.mesh))
        if run.step:
            processes.log(f"resumed from step {run.step}")
        with processes.together("opening the workdir"), workdir_lib.explained(workdir):
            kept = run.step if run.saved else -1  # a new run measures step 0 itself
            writer = metrics.Writer(workdir, resume_step=kept, tensorboard=cfg.tensorboard)
            ends.callback(workdir_lib.explained(workdir)(writer.close))
            record = health.Record(workdir, clock, run.step, run.saved.get("time"))
        step = _loop(run, writer, clock, record, stop)
        done = step == cfg.num_steps and not any(processes.gather("!" if stop.signal else ""))
        with workdir_lib.explained(workdir):
            if done:
                with clock("samples"):
                    previews.write(cfg, workdir, step, run.state, run.chat, writer)
            record.write(step, ended=True)
    processes.log(f"{'done' if done else 'stopped'} at step {step}")
    processes.log(f"{record.summary()}\nworkdir {workdir}")
    return str(workdir)


def _loop(run: Run, writer: Any, clock: Any, record: Any, stop: preempt.Stop) -> int:
    """Steps until the last one, a signal or an error, logging one step late; always ends saved."""
    cfg, step, saved = run.cfg, run.step, run.step
    mine = sharding.rows_of_process(run.mesh, cfg.batch_rows)
    counted = run.saved.get("samples", 0), run.saved.get("bad_samples", 0)
    batches = run.data.batches(step * cfg.batch_rows, mine, counted)
    peak = cfg.peak_tflops or chips.peak_tflops(jax.devices()[0].device_kind)
    progress = metrics.Progress(cfg.num_steps, step, peak * jax.device_count())
    trained = parts_lib.trained_parts(cfg)
    watch = guard.Guard(run.workdir, cfg.max_bad_steps, step)
    dog = health.Watchdog(cfg.watchdog_s, lambda: clock.phase, end=cfg.watchdog_exit)
    compiled, late = None, []
    with clock("data"):
        feed = loader.Ahead(batches)
    agreement = processes.Agreement(run.mesh)

    def state_of_process() -> int:
        broken = feed.error or run.trouble or run.ckpts.failed
        return processes.FAILED if broken else (processes.STOP if stop.signal else 0)

    def log_late() -> None:
        while late:
            _log(run, writer, progress, record, watch, *late.pop())
            dog.beat(step)

    def evaluate(step: int) -> None:
        log_late()
        with clock("evaluation"):
            values = run.heldout.measure(run.state)
        with run.writing():
            run.heldout.note(step, values, writer)

    clock.switch("step")
    if not run.saved:
        evaluate(step)
    status = agreement.ask(state_of_process)
    while (
        step < cfg.num_steps
        and not (watch.tripped or run.heldout.ends)
        and status() == processes.CONTINUE
    ):
        with clock("data"):
            before = time.perf_counter()
            batch, report = next(feed)
            waited = time.perf_counter() - before
        status = agreement.ask(state_of_process, run.state)  # about the step after this one
        work = flops.count(batch, cfg.data.gen_slots, cfg.data.und_slots)
        batch = sharding.put_batch(batch, run.mesh, cfg.batch_rows)
        with clock("step" if compiled else "compile"):
            compiled = compiled or train_step.jit_train_step(cfg, run.mesh, run.state, batch)
            run.state, out = compiled(run.state, batch)
        step += 1
        share = cfg.batch_rows / len(mine)  # this process's rows stand for all
        progress.count(
            waited,
            images=(work.gen_images + work.und_images) * share,
            positions=work.positions * share,
            tflops=work.flops(cfg.model, trained, bool(cfg.loss.repa_weight)) * share / 1e12,
        )
        log_late()
        late.append((step, out, report, work))
        if run.heldout.due(step):
            evaluate(step)
        if cfg.save_every_steps and step % cfg.save_every_steps == 0:
            log_late()  # first: a line that is missing before a checkpoint would be for ever
            _save(run, writer, clock, step, report)
            saved = step
        if cfg.sheet_every_steps and step % cfg.sheet_every_steps == 0 and step < cfg.num_steps:
            with clock("samples"), run.writing():
                previews.write(cfg, run.workdir, step, run.state, run.chat, writer)
    log_late()
    dog.close()
    batches.close()
    with clock("checkpoint"):
        error = _last_save(run, lambda: step != saved and _save(run, writer, clock, step, report))
    processes.raise_together(error or feed.error, "the run was ended")
    if watch.tripped:
        raise DivergedError(watch.message())
    run.heldout.check()
    return step


def _save(run: Run, writer: Any, clock: Any, step: int, report: loader.Report) -> None:
    """Starts saving a step."""
    with clock("checkpoint"):
        run.ckpts.save(
            step,
            params=run_state.to_save(run.state, run.apart),
            ema=run.state["ema"],
            opt_state=run.state["opt_state"],
            run={
                "step": step,
                "bad_steps": int(run.state["bad_steps"]),
                "next_row": step * run.cfg.batch_rows,
                "samples": report.num_samples,
                "bad_samples": report.num_bad,
                "config": config_lib.to_dict(run.cfg),
                "heldout": run.heldout.to_json(),
            },
        )
        writer.sync()


def _last_save(run: Run, save: Callable[[], Any]) -> Exception | None:
    """Saves what is not saved yet, unless a process cannot write; returns its own reason."""
    unable = run.trouble is not None or run.ckpts.failed
    try:
        if not any(processes.gather("!" if unable else "")):
            save()
            run.ckpts.wait()
        elif run.ckpts.failed:
            run.ckpts.wait()
    except CheckpointError as error:
        return run.trouble or error
    return run.trouble


def _log(
    run: Run,
    writer: Any,
    progress: Any,
    record: Any,
    watch: guard.Guard,
    step: int,
    out: Any,
    report: loader.Report,
    work: Any,
) -> None:
    """Fetches a past step's metrics; counts steps whose losses are no numbers."""
    cfg, ok = run.cfg, bool(out["ok"])
    with run.writing():
        watch.count(step, ok, report)
        if step % cfg.log_every_steps and step not in (1, cfg.num_steps):
            return
        values = {k: float(v) for k, v in jax.device_get(out).items()}
        values |= {"padding": work.padding, "idle_slots": work.idle_slots}
        values |= {"bad_samples": report.num_bad, "samples": report.num_samples}
        values |= progress.rates() | record.values()
        writer.write(step, values)
        record.write(step)
        processes.log(progress.line(step, values))


def replay(cfg: TrainConfig, rows_asked: str) -> bool:
    """Losses and gradients of single rows, with the parameters of the newest checkpoint.

    Args: rows_asked: '1234', or '1024:1536' for a step's rows.
    Returns: whether all of them are finite.
    """
    first, end = guard.parse_rows(rows_asked)
    run = open_run(cfg, writes=False)
    processes.log(f"rows {first} to {end - 1} with the parameters of step {run.step}")
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
            processes.log(guard.describe(number, run.data.rows.records(number), values, bad))
    return fine


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config=FILE[:ARG]")
    cfg = _CONFIG.value
    processes.initialize(_DISTRIBUTED.value)
    if _REPLAY.value:
        sys.exit(0 if replay(cfg, _REPLAY.value) else 1)
    train(cfg)


def run() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    cli.run(
        lambda: app.run(main, flags_parser=flag_parser.parse),
        out_of_memory="split the batch (--config.optim.accum_steps), share rows among more devices "
        "(--config.mesh.fsdp) or set --config.remat=True; tools/plan.py computes what a run "
        "needs, docs/finetuning.md lists smaller ways to train",
    )


if __name__ == "__main__":
    run()
