"""Opens a run: its data, mesh and checkpoints, and its state from the newest checkpoint or from the
start."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from janusflow_jax import config as config_lib
from janusflow_jax.checkpoints import (
    model_folder,
    run as run_checkpoints,
    workdir as workdir_lib,
)
from janusflow_jax.config import DataConfig, TrainConfig, checks as config_checks
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.config.lock import Lock
from janusflow_jax.data import chat_format, loader
from janusflow_jax.models import attention
from janusflow_jax.parallel import processes, sharding
from janusflow_jax.training import (
    encode_cache,
    heldout,
    init as initialization,
    optim,
    step as train_step,
)


@dataclasses.dataclass
class Run:
    """An open run."""

    cfg: TrainConfig
    workdir: epath.Path
    mesh: Mesh
    data: loader.Loader
    chat: chat_format.ChatFormat
    checkpoints: run_checkpoints.RunCheckpoints
    state: train_step.State
    saved: dict[str, Any]  # `run.json` of the checkpoint it resumes from; {}: a new run
    heldout: heldout.Heldout
    changed_data: list[str]  # sources whose content has changed, which the user accepted
    write_error: CheckpointError | None = None  # this process could not write into the workdir

    @property
    def first_step(self) -> int:
        """Steps done before."""
        return int(self.saved.get("step", 0))

    @property
    def cannot_write(self) -> bool:
        """Whether this process failed to write into the workdir."""
        return self.write_error is not None or self.checkpoints.failed

    @contextlib.contextmanager
    def deferring_write_errors(self) -> Iterator[None]:
        """Around what one process writes alone. An error waits in `write_error` until all processes
        know of it: raised at once, it would leave the others waiting for this one."""
        try:
            yield
        except Exception as error:
            if not workdir_lib.is_of_store(error, self.workdir):
                raise
            self.write_error = CheckpointError(workdir_lib.explain(error, self.workdir))
            self.write_error.__cause__ = error

    def save(self, step: int, report: loader.Report) -> None:
        """Starts saving in the background."""
        self.checkpoints.save(
            step,
            params=initialization.params_to_save(self.cfg, self.state),
            ema=self.state["ema"],
            opt_state=self.state["opt_state"],
            run={
                "step": step,
                "bad_steps": int(self.state["bad_steps"]),
                "mean_norm": float(self.state["mean_norm"]),
                "next_row": self.cfg.data.row_at(step * self.cfg.batch_rows),
                "samples": report.num_samples,
                "bad_samples": report.num_bad,
                "config": config_lib.to_dict(self.cfg),
                "heldout": self.heldout.to_json(),
            },
        )


def workdir_of(cfg: TrainConfig) -> epath.Path:
    """The run's folder.

    Raises:
      ConfigError: the config cannot work (every problem in one message).
    """
    config_lib.raise_problems(f"config {cfg.name!r}", config_checks.train_problems(cfg))
    attention.check_here(cfg)
    return model_folder.resolve(cfg.workdir or f"runs/{cfg.name}")


def open_run(
    cfg: TrainConfig, lock: Lock | None = None, writes: bool = True, accept_data: bool = False
) -> Run:
    """Reads everything that a run needs onto the devices.

    What can be wrong is checked before anything slow: no run should find after ten minutes that its
    data is missing.

    Args:
      lock: holds the workdir, on the first process.
      writes: False: only reads.
      accept_data: resume although the content of the data has changed.
    """
    workdir = workdir_of(cfg)
    with processes.together("opening the run"):
        before = workdir_lib.newest_run(workdir)
        may_change = _RATE if before and not _rate_change(before, cfg) else ()
        cfg = workdir_lib.check(workdir, cfg, may_change)
        started, resumed = initialization.resolve_start(cfg, workdir)
        initialization.check_files(started)
    start = initialization.find_start(started, resumed)
    origins = start.origins
    if resumed:
        origins |= {n: "this run's checkpoint" for n, x in origins.items() if x != started.start}
    initialization.print_origins(cfg, start.params, start.vae, origins)
    _warn_of_unused_slots(cfg)
    with processes.together("opening the data"):
        chat = chat_format.ChatFormat.load(start.hub, num_image_tokens=cfg.model.num_image_tokens)
        chat.check_vocab(cfg.model.llm.vocab_size)
        then = workdir_lib.recorded_data(workdir) if resumed else []
        mixture = _with_names(cfg.data, then)
        data = loader.Loader(mixture, cfg.model, chat, cfg.batch_rows, bool(cfg.loss.repa_weight))
        digests = workdir_lib.base_meta(workdir).get("encoders", {})
    if not resumed:
        digests = encode_cache.digests(cfg, data.rows, start.whole)
    with processes.together("checking the data"):
        encode_cache.check(cfg, data.rows, digests, start.vae)
        now = [source.identity() for source in data.rows.sources] if processes.is_main() else []
        changed = workdir_lib.check_data(workdir, then, now, accept_data)
    processes.log(data.summary())
    for line in changed:
        processes.log(f"accepted: {line}")
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.check_rows(cfg.batch_rows, cfg.optim.accum_steps, mesh)
    of = f" of {processes.count()} processes" if processes.count() > 1 else ""
    processes.log(
        f"{jax.device_count()} {jax.default_backend()} device(s){of}, mesh {dict(mesh.shape)}"
    )
    params = {} if resumed else initialization.initial_params(cfg, mesh, start)
    if writes:
        # What the checkpoints do not repeat: what adapters are added to, or the teacher.
        base = params if cfg.lora.rank or cfg.distills else None
        about = {"made_by": "train", "encoders": digests}
        workdir_lib.create(
            workdir, cfg, params=base, vae=start.vae, hub=start.hub, about=about, data=now
        )
    checkpoints = run_checkpoints.RunCheckpoints(
        workdir,
        cfg.keep_checkpoints,
        cfg.keep_every_steps,
        before_commit=lock.check if lock else lambda: None,
        writes=writes,
    )
    with jax.set_mesh(mesh):
        restored = initialization.restore_state(cfg, mesh, start, checkpoints)
        if restored is None:
            restored = initialization.create_state(cfg, mesh, params, start.vae), {}
    state, saved = restored
    with processes.together("opening the held-out data"):
        held = heldout.Heldout(cfg, mesh, chat, saved.get("heldout", {}))
    if cfg.evaluate.sources:
        processes.log(held.summary())
    if saved:
        _warn_of_higher_rate(cfg, saved, checkpoints.steps())
    return Run(cfg, workdir, mesh, data, chat, checkpoints, state, saved, held, changed)


_RATE = ("optim.lr", "optim.decay_steps")
"""Fields that a resumed run may change together if its learning rate stays the same there."""


def _rate_change(saved: dict[str, Any], cfg: TrainConfig) -> float:
    """The relative change of the learning rate at a checkpoint; 0 where it is below 1 %."""
    then, now = optim.rates_at_resume(saved, cfg.optim, cfg.num_steps)
    change = now / then - 1 if then else 0.0
    return change if abs(change) > 0.01 else 0.0


def _warn_of_unused_slots(cfg: TrainConfig) -> None:
    for task, name in (("generate", "gen_slots"), ("understand", "und_slots")):
        slots = getattr(cfg.data, name)
        if slots and not any(source.task == task for source in cfg.data.sources):
            processes.log(
                f"WARNING: data.{name} is {slots}, but no source has task {task}: its encoders run "
                "on empty slots, and its parts are trained by weight decay alone; a new run should "
                f"have data.{name}=0"
            )


def _warn_of_higher_rate(cfg: TrainConfig, saved: dict[str, Any], steps: list[int]) -> None:
    """More steps move the decay to the new last steps: the rate is high again before it."""
    step, old = saved["step"], saved["config"]
    optim_now = config_lib.to_dict(cfg.optim)
    if any(old["optim"][name] != optim_now[name] for name in ("lr", "decay_steps")):
        return  # a branch has the rate that its user chose
    if old["num_steps"] == cfg.num_steps or _rate_change(saved, cfg) <= 0:
        return
    then, now = optim.rates_at_resume(saved, cfg.optim, cfg.num_steps)
    left = cfg.num_steps - step
    began = max(old["num_steps"] - old["optim"]["decay_steps"], old["optim"]["warmup_steps"])
    before_decay = [s for s in steps if s <= began]
    processes.log(
        f"WARNING: at step {step} the learning rate rises from {then:.3g} to {now:.3g}, because "
        f"num_steps is {cfg.num_steps} instead of {old['num_steps']} and the decay moves to the "
        "last steps. To continue at the old rate and let it fall to 0 at the last step, use "
        f"--config.optim.lr={then:.6g} --config.optim.decay_steps={left}"
        + (
            f". To continue from before the decay, remove the checkpoints after {before_decay[-1]}"
            if before_decay
            else f" (no checkpoint from before the decay, which began at step {began}, is left)"
        )
    )


def _with_names(cfg: DataConfig, then: list[dict[str, Any]]) -> DataConfig:
    """The mixture with the recorded names of its sources. Names seed the order of the rows, and a
    source without one is named after its path, which may have changed."""
    if len(then) != len(cfg.sources):  # no record, or one that does not fit
        return cfg
    named = (
        dataclasses.replace(source, name=old["name"])
        for source, old in zip(cfg.sources, then, strict=True)
    )
    return dataclasses.replace(cfg, sources=tuple(named))
