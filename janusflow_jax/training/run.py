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
from janusflow_jax.checkpoints import run as run_checkpoints, workdir as workdir_lib
from janusflow_jax.config import TrainConfig, checks as config_checks
from janusflow_jax.config.errors import CheckpointError
from janusflow_jax.data import chat_format, loader
from janusflow_jax.parallel import processes, sharding
from janusflow_jax.training import encode_cache, heldout, init as initialization, step as train_step


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
        except OSError as error:
            self.write_error = CheckpointError(workdir_lib.explain(error, self.workdir))

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
                "next_row": step * self.cfg.batch_rows,
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
    return epath.Path(cfg.workdir or f"runs/{cfg.name}").resolve()


def open_run(cfg: TrainConfig, lock: workdir_lib.Lock | None = None, writes: bool = True) -> Run:
    """Reads everything that a run needs onto the devices.

    What can be wrong is checked before anything slow: no run should find after ten minutes that its
    data is missing.

    Args: lock: holds the workdir, on the first process. writes: False: only reads.
    """
    workdir = workdir_of(cfg)
    with processes.together("opening the run"):
        cfg = workdir_lib.check(workdir, cfg)
        started, resumed = initialization.resolve_start(cfg, workdir)
        initialization.check_files(started)
    params, vae_params, hub, origins = initialization.initial_params(started, resumed)
    if resumed:
        origins |= {n: "this run's checkpoint" for n, x in origins.items() if x != started.start}
    initialization.print_origins(cfg, params, vae_params, origins)
    with processes.together("opening the data"):
        chat = chat_format.ChatFormat.load(hub, num_image_tokens=cfg.model.num_image_tokens)
        chat.check_vocab(cfg.model.llm.vocab_size)
        data = loader.Loader(cfg.data, cfg.model, chat, cfg.batch_rows, bool(cfg.loss.repa_weight))
        digests = workdir_lib.base_meta(workdir).get("encoders", {})
        if not resumed:
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
        base = None if resumed else initialization.base_params(cfg, params)
        about = {"made_by": "train", "encoders": digests}
        workdir_lib.create(workdir, cfg, params=base, vae=vae_params, hub=hub, about=about)
    checkpoints = run_checkpoints.RunCheckpoints(
        workdir,
        cfg.keep_checkpoints,
        cfg.keep_every_steps,
        before_commit=lock.check if lock else lambda: None,
        writes=writes,
    )
    with jax.set_mesh(mesh):
        restored = initialization.restore_state(cfg, mesh, params, vae_params, checkpoints)
        if restored is None:
            restored = initialization.create_state(cfg, mesh, params, vae_params), {}
    state, saved = restored
    with processes.together("opening the held-out data"):
        held = heldout.Heldout(cfg, mesh, chat, saved.get("heldout", {}))
    if cfg.evaluate.sources:
        processes.log(held.summary())
    return Run(cfg, workdir, mesh, data, chat, checkpoints, state, saved, held)
