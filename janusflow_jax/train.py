"""Trains JanusFlow: `python -m janusflow_jax.train --config=configs/emoji.py`.

Run the same command again to resume. Ctrl-C and SIGTERM save a checkpoint and stop; before the
first step they stop at once, because there is nothing to save. Any field of the config can be set:
`--config.optim.lr=3e-4`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from janusflow_jax.config import signals

    signals.end_on_signals()

import contextlib
import faulthandler
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from janusflow_jax import cli, config as config_lib
from janusflow_jax.checkpoints import workdir as workdir_lib
from janusflow_jax.config import TrainConfig, flags as flag_parser, parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, ConfigError, DivergedError
from janusflow_jax.data import loader
from janusflow_jax.eval import previews
from janusflow_jax.parallel import chips, compile_cache, numerics, processes, sharding
from janusflow_jax.training import flops, health, metrics, step as train_step
from janusflow_jax.training.replay import replay
from janusflow_jax.training.run import Run, open_run, workdir_of

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon: configs/ablation.py:A,test"
)
_REPLAY = flags.DEFINE_string(
    "replay",
    "",
    "ROW or FIRST:END: print the losses and gradient norms of single rows with the newest "
    "checkpoint's parameters, and train nothing (bad_steps.jsonl in the workdir lists rows)",
)
_BRANCH_FROM = flags.DEFINE_string(
    "branch-from",
    "",
    "RUN@STEP: begin a new run with the parameters, optimizer state, EMA and data position of this "
    "checkpoint; learning rate, mixture and data.skip_rows may differ (docs/training.md)",
)
_ACCEPT_DATA = flags.DEFINE_bool(
    "accept-data",
    False,
    "resume although the content of a data set has changed; attempts.json records it",
)
_PROFILE = flags.DEFINE_string(
    "profile",
    "",
    "FIRST:LAST: trace these steps into the workdir's `profile`, for xprof or TensorBoard",
)
_PROFILER_PORT = flags.DEFINE_integer(
    "profiler-port",
    0,
    "port where xprof or TensorBoard can trace this process at any time (the processes of a host "
    "take this port and the next ones); 0: none",
    lower_bound=0,
    upper_bound=65_535,
)
_HLO = flags.DEFINE_bool(
    "hlo", False, "write the step as XLA gets it, and as it compiles it, into the workdir's `hlo`"
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    processes.MODES,
    "whether this process is one of several: auto joins the others where it was started by Slurm, "
    "on a TPU pod, or with JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID set",
)


@numerics.fixed()
def train(
    cfg: TrainConfig,
    branch_from: str = "",
    accept_data: bool = False,
    profile: tuple[int, int] | None = None,
    hlo: bool = False,
) -> str:
    """Trains to the config's last step, or until a signal stops it. Returns the workdir.

    Args:
      branch_from: 'RUN@STEP', where a new run takes its state from.
      accept_data: resume although the content of the data has changed.
      profile: the first step that is traced, and the one after the last.
      hlo: write the step's program into the workdir, before and after XLA's optimization.
    """
    clock = health.Clock()
    workdir, lock = workdir_of(cfg), None
    with contextlib.ExitStack() as stack:
        with processes.together("opening the workdir"):
            if processes.is_main():
                lock = stack.enter_context(workdir_lib.reserve(workdir))
                if branch_from:
                    workdir_lib.branch(workdir, cfg, branch_from)
        run = open_run(cfg, lock, accept_data=accept_data)
        stop = stack.enter_context(health.StopSignal())
        watchdog = stack.enter_context(health.Watchdog(cfg.watchdog_s, cfg.watchdog_exit))
        stack.enter_context(jax.set_mesh(run.mesh))
        if run.first_step:
            processes.log(f"resumed from step {run.first_step}")
        if run.first_step > cfg.num_steps:
            processes.log(f"num_steps is {cfg.num_steps}: nothing is left to train")
        with processes.together("opening the workdir"), workdir_lib.explained(workdir):
            last_line = run.first_step if run.saved else -1  # a new run also writes step 0
            writer = metrics.Writer(
                workdir,
                resume_step=last_line,
                tensorboard=cfg.tensorboard,
                wandb=_wandb_options(cfg) if cfg.wandb else None,
            )
            stack.callback(workdir_lib.explained(workdir)(writer.close))
            attempts = health.Attempts(
                workdir, clock, run.first_step, run.saved.get("time"), run.changed_data
            )
        try:
            step = train_steps(run, writer, attempts, clock, stop, watchdog, profile, hlo)
        except Exception:
            if processes.count() == 1:  # in a job the others may be gone
                _wait_for_save(run)
            raise
        stopped = any(processes.gather("stopped" if stop.received else ""))
        done = step == cfg.num_steps and not stopped
        with workdir_lib.explained(workdir):
            if done:
                with clock("samples"):
                    previews.write(cfg, workdir, step, run.state, run.chat, writer)
            attempts.write(step, ended=True)
    # Process 0 may write longer than JAX lets the others wait when they exit.
    processes.barrier("the end")
    processes.log(f"{'done' if done else 'stopped'} at step {step}")
    processes.log(f"{attempts.summary()}\nworkdir {workdir}")
    return str(workdir)


def train_steps(
    run: Run,
    writer: metrics.Writer,
    attempts: health.Attempts,
    clock: health.Clock,
    stop: health.StopSignal,
    watchdog: health.Watchdog,
    profile: tuple[int, int] | None = None,
    hlo: bool = False,
) -> int:
    """The training loop. Returns the last step, which is saved even where this raises.

    All processes of a job run it alike: the order of whatever uses the devices or waits for the
    other processes must not depend on the process.

    Args: profile, hlo: see `train`.
    """
    cfg, step, saved_step = run.cfg, run.first_step, run.first_step
    places = sharding.rows_of_process(run.mesh, cfg.batch_rows)
    counted = run.saved.get("samples", 0), run.saved.get("bad_samples", 0)
    batches = run.data.batches(step * cfg.batch_rows, places, counted)
    with clock("data"):
        feed = loader.Ahead(batches)
    log = StepLog(run, writer, attempts, share=cfg.batch_rows / len(places))
    trace = health.Trace(run.workdir, profile)
    agreement = processes.Agreement(run.mesh)
    compiled_step = None
    report = loader.Report(step * cfg.batch_rows, step * cfg.batch_rows, [], *counted)
    waited = copied = 0.0  # seconds

    def status() -> tuple[int, int]:
        """What this process knows of the step ahead, of which the most severe status counts for
        all, and how long it worked on its own."""
        work = processes.encode_work(waited, copied)
        if feed.error or run.cannot_write:
            return processes.FAILED, work
        return processes.STOP if stop.received else processes.CONTINUE, work

    def may_continue() -> bool:
        agreed_status, work = agreed()
        log.slowest = work
        return agreed_status == processes.CONTINUE

    def every(num_steps: int) -> bool:
        return num_steps > 0 and step % num_steps == 0

    def evaluate() -> None:
        log.flush()
        with clock("evaluation"), watchdog.paused():
            values = run.heldout.measure(run.state)
        with run.deferring_write_errors():
            run.heldout.record(step, values, writer)

    def save() -> None:
        log.flush()  # first: a resumed run never writes the lines before its checkpoint again
        with clock("checkpoint"):
            run.save(step, report)
            with run.deferring_write_errors():
                writer.sync()

    clock.switch("step")
    if not run.saved:
        evaluate()
    agreed = agreement.ask(status)
    while (
        step < cfg.num_steps
        and not log.bad_steps.limit_reached
        and not run.heldout.must_stop
        and may_continue()
    ):
        with clock("data"):
            began = time.perf_counter()
            batch, report = next(feed)
            waited = time.perf_counter() - began
        agreed = agreement.ask(status, run.state)  # about the step after this one
        began = time.perf_counter()
        work = flops.count(batch, cfg.data.gen_slots, cfg.data.und_slots)
        batch = sharding.put_batch(batch, run.mesh, cfg.batch_rows)
        copied = time.perf_counter() - began
        trace.begin_step(step + 1, run.state)
        with clock("step" if compiled_step else "compile"):
            if compiled_step is None:
                processes.log("compiling the step")
                compiled_step = train_step.jit_train_step(cfg, run.mesh, run.state, batch)
                if hlo:
                    with run.deferring_write_errors():
                        compiled_step = _write_hlo(run, compiled_step.lower(run.state, batch))
            run.state, out = compiled_step(run.state, batch)
        step += 1
        stop.listen()
        log.add(step, out, report, work, waited)  # writes the step before: this one still runs
        watchdog.restart()
        if run.heldout.due(step):
            evaluate()
        if every(cfg.save_every_steps):
            save()
            saved_step = step
        if every(cfg.sheet_every_steps) and step < cfg.num_steps:
            with clock("samples"), watchdog.paused(), run.deferring_write_errors():
                previews.write(cfg, run.workdir, step, run.state, run.chat, writer)
    log.flush()
    trace.end(run.state)
    watchdog.stop()
    batches.close()
    with clock("checkpoint"):
        error = _finish_saving(run, save if step != saved_step else None)
    processes.raise_together(error or feed.error, "the run stopped")
    if log.bad_steps.limit_reached:
        raise DivergedError(log.bad_steps.message())
    run.heldout.raise_risen()
    return step


def _wandb_options(cfg: TrainConfig) -> dict[str, Any]:
    return {"project": cfg.wandb, "name": cfg.name, "config": config_lib.to_dict(cfg)}


def _write_hlo(run: Run, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles the step, which writes its two texts on process 0."""
    compiled = lowered.compile()
    if processes.is_main():
        folder = run.workdir / "hlo"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.stablehlo.txt").write_text(lowered.as_text(debug_info=True))
        (folder / "step.optimized.txt").write_text(compiled.as_text() or "")
        processes.log(f"program written to {folder}")
    return compiled


def _wait_for_save(run: Run) -> None:
    """Waits for the save that is running; prints what went wrong with it."""
    try:
        run.checkpoints.wait()
    except CheckpointError as error:
        processes.log(f"WARNING: {error}")


def _finish_saving(run: Run, save: Callable[[], None] | None) -> Exception | None:
    """Saves the last step (unless a process cannot write) and waits for it; returns what failed in
    this process."""
    try:
        if not any(processes.gather("failed" if run.cannot_write else "")):
            if save:
                save()
            run.checkpoints.wait()
        elif run.checkpoints.failed:
            run.checkpoints.wait()  # raises the reason
        else:
            run.checkpoints.join()
    except CheckpointError as error:
        return run.write_error or error
    return run.write_error


class StepLog:
    """Logs each step when the next one has been dispatched, so that the devices never wait."""

    def __init__(self, run: Run, writer: metrics.Writer, attempts: health.Attempts, share: float):
        """Args: share: rows of the whole batch for each row of this process."""
        cfg = run.cfg
        self.bad_steps = health.BadSteps(run.workdir, cfg.max_bad_steps, run.first_step)
        self._run, self._writer, self._attempts, self._share = run, writer, attempts, share
        self._trained = parts_lib.trained_parts(cfg)
        peak = cfg.peak_tflops or chips.peak_tflops(jax.devices()[0].device_kind)
        self.slowest = 0  # `processes.encode_work` of the slowest process, before the next step
        self._slowest_logged = 0  # the slowest since the last line
        self._progress = metrics.Progress(cfg.num_steps, run.first_step, peak * jax.device_count())
        self._pending: tuple[Any, ...] | None = None

    def add(
        self,
        step: int,
        out: dict[str, jax.Array],
        report: loader.Report,
        work: flops.Work,
        waited: float,
    ) -> None:
        """Logs the step before; the next call or `flush` logs this one.

        Args: out: metrics, maybe still being computed. waited: seconds for the batch.
        """
        cfg = self._run.cfg
        tflops = work.flops(cfg.model, self._trained, bool(cfg.loss.repa_weight)) / 1e12
        self._progress.count(
            waited,
            images=(work.gen_images + work.und_images) * self._share,
            positions=work.positions * self._share,
            tflops=tflops * self._share,
        )
        self.flush()
        self._pending = (step, out, report, work, self.slowest)

    def flush(self) -> None:
        """Waits for the step that is not logged yet, and logs it."""
        if self._pending is None:
            return
        step, out, report, work, slowest = self._pending
        self._pending = None
        cfg = self._run.cfg
        if step > self._run.first_step + 2:  # the first batch takes long everywhere
            self._slowest_logged = max(self._slowest_logged, slowest)
        with self._run.deferring_write_errors():
            self.bad_steps.count(step, out, report)
            every = cfg.log_every_steps or cfg.num_steps
            if step % every and step not in (1, cfg.num_steps):
                return
            values = {k: float(v) for k, v in jax.device_get(out).items()}
            values |= {"padding": work.padding, "idle_slots": work.idle_slots}
            values |= {"bad_samples": report.num_bad, "samples": report.num_samples}
            values |= self._progress.rates() | self._attempts.values()
            line = self._progress.line(step, values)
            if processes.count() > 1:
                worst = processes.decode_work(self._slowest_logged)
                values |= {
                    "slowest_process": worst.process,
                    "slowest_s": worst.seconds,
                    "slowest_waits_for_data": worst.cause == "data",
                }
                if worst.seconds * values.get("steps_per_s", 0) > 0.25:
                    line += f"  slowest: process {worst.process} ({worst.cause})"
            self._slowest_logged = 0
            self._writer.write(step, values)
            self._attempts.write(step)
            processes.log(line)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # silences Orbax's line for every step of a save
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config=FILE[:ARG]")
    cfg = _CONFIG.value
    profile = steps_to_profile(_PROFILE.value) if _PROFILE.value else None
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    processes.initialize(_DISTRIBUTED.value)
    compile_cache.enable()
    if _PROFILER_PORT.value:
        # Slurm starts several processes on a host.
        jax.profiler.start_server(_PROFILER_PORT.value + int(os.environ.get("SLURM_LOCALID", 0)))
    if _REPLAY.value:
        of_training = {"branch-from": _BRANCH_FROM, "profile": _PROFILE, "hlo": _HLO}
        if unread := [f"--{name}" for name, flag in of_training.items() if flag.value]:
            raise ConfigError(f"{', '.join(unread)}: --replay trains nothing: drop one of them")
        sys.exit(0 if replay(cfg, _REPLAY.value, _ACCEPT_DATA.value) else 1)
    train(cfg, _BRANCH_FROM.value, _ACCEPT_DATA.value, profile, _HLO.value)


def steps_to_profile(text: str) -> tuple[int, int]:
    """'10:13' -> (10, 14): steps 10 to 13."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match and 1 <= int(match[1]) <= int(match[2]):
        return int(match[1]), int(match[2]) + 1
    raise ConfigError(f"--profile: expected FIRST:LAST, such as 10:13; got {text!r}")


def run() -> None:
    """The command line."""
    flags.mark_flag_as_required("config")
    cli.run(
        lambda: app.run(main, flags_parser=flag_parser.parse),
        out_of_memory="split the batch (--config.optim.accum_steps), share rows among more devices "
        "(--config.mesh.fsdp) or set --config.remat=full; tools/plan.py computes what a run "
        "needs, docs/finetuning.md lists smaller ways to train",
    )


if __name__ == "__main__":
    run()
