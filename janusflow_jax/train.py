"""Trains JanusFlow: `python -m janusflow_jax.train --config=configs/emoji.py`.

Run the same command again to go on where it stopped. Ctrl-C and SIGTERM end with a saved
checkpoint. Any field of the config can be set: `--config.optim.lr=3e-4`.
"""

from __future__ import annotations

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

from janusflow_jax import checkpoint, config_checks, metrics, optim, samples, sharding, train_step
from janusflow_jax import config as config_lib
from janusflow_jax import workdir as workdir_lib
from janusflow_jax.config import ConfigError, TrainConfig
from janusflow_jax.data import chat_format, lengths, loader, rows, sources
from janusflow_jax.models import janusflow, vae

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an argument after a colon: configs/ablation.py:A,test"
)
_USER_ERRORS = (
    ConfigError,
    checkpoint.CheckpointError,
    chat_format.FormatError,
    lengths.LengthsError,
    loader.BadDataError,
    rows.DataError,
    sources.SourceError,
)


def initial_params(cfg: TrainConfig) -> tuple[Any, Any, str, dict[str, str]]:
    """Every part from where `init` or `start` says.

    Returns: params, VAE params, the folder of tokenizer files, part -> origin.
    Raises:
      ConfigError: a part that must have learned something is fresh, or its path lacks it.
    """
    origins: dict[str, str] = dict.fromkeys([*config_lib.STAGE_PARTS, "vae"], "fresh")
    cache: dict[str, checkpoint.LoadedModel] = {}
    if cfg.start:
        cache[cfg.start] = checkpoint.load_model(cfg.start, weights="ema")
        for part in cache[cfg.start].parts:
            origins[part] = cfg.start
    origins.update(cfg.init)
    fresh = [p for p in config_lib.PRETRAINED_PARTS if origins[p] == "fresh"]
    if fresh and not cfg.allow_fresh:
        raise ConfigError(
            f"init: the parts {fresh} would start from random numbers, and training could not "
            "make up for it; expected a path for each (--config.init) or for all "
            "(--config.start), made by tools/train_vae.py, tools/pretrain_tiny.py or "
            "tools/convert_checkpoint.py"
        )
    key = jax.random.key(cfg.seed)
    params = dict(jax.jit(janusflow.init_params, static_argnums=0)(cfg.model, key))
    vae_params = None
    if origins["vae"] == "fresh":
        vae_params = jax.jit(vae.init_params, static_argnums=0)(cfg.model.vae, key)
    problems, hub = [], cfg.tokenizer
    for path in dict.fromkeys(v for v in origins.values() if v != "fresh"):
        parts = [p for p, origin in origins.items() if origin == path]
        loaded = cache.get(path) or checkpoint.load_model(path, weights="ema")
        for part in parts:
            got = loaded.vae if part == "vae" else (loaded.params or {}).get(part)
            if got is None:
                problems.append(f"{path} has no part {part!r}; it has {loaded.parts}")
            elif part == "vae":
                expect = vae.param_shapes(cfg.model.vae)
                problems += checkpoint.compare_trees(expect, got, "vae")
                vae_params = _host(got)
            else:
                problems += checkpoint.compare_trees(params[part], got, part)
                params[part] = _host(got)
        if not hub and "llm" in parts:
            hub = str(loaded.hub)
    config_lib.raise_problems("init", problems)
    if not hub:
        raise ConfigError(
            "tokenizer: expected a folder with tokenizer.json and processor_config.json (a "
            "model folder's hub/); got '' and no `init` of the llm to take it from"
        )
    return params, vae_params, hub, origins


def _host(tree: Any) -> Any:
    """float32 on the host: arrays of one device cannot enter a step on a mesh of several."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def check_needs(cfg: TrainConfig) -> None:
    """Raises ConfigError with everything on disk that the run needs and lacks, and what makes it.

    Nothing is loaded: a run of hours must not find in its tenth minute that data is missing.
    """
    made_by, problems = dict(cfg.made_by), []

    def lacks(path: str, reason: str) -> None:
        command = made_by.get(path, "")
        problems.append(f"{reason}\n      made by: {command}" if command else reason)

    starts = dict.fromkeys([cfg.start, *(p for _, p in cfg.init if p != "fresh")])
    for path in filter(None, starts):
        if not checkpoint.is_model(path):
            lacks(path, f"{path}: expected a model folder or a training run; found none")
    splits = dict.fromkeys((s.path, s.split) for s in (*cfg.data.sources, *cfg.heldout))
    for path, split in splits:
        try:
            sources.open_source(path, split)
        except sources.SourceError as error:
            lacks(path, str(error))
    if cfg.tokenizer and not epath.Path(cfg.tokenizer).exists():
        lacks(cfg.tokenizer, f"{cfg.tokenizer}: expected a tokenizer folder; found none")
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise ConfigError(f"config {cfg.name!r} needs what is not here:\n{listed}")


def print_origins(cfg: TrainConfig, params: Any, vae_params: Any, origins: dict[str, str]) -> None:
    trained = train_step.trained_parts(cfg)
    print(f"{'part':12} {'parameters':>14}  {'':8}  origin")
    for part, tree in [*params.items(), ("vae", vae_params)]:
        state = "trained" if part in trained else "frozen"
        print(f"{part:12} {optim.count_params(tree):>14,}  {state:8}  {origins[part]}")


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


def train(cfg: TrainConfig) -> str:
    """Runs the config to its last step, or until told to stop. Returns the workdir."""
    started = time.time()
    config_lib.raise_problems(f"config {cfg.name!r}", config_checks.train_problems(cfg))
    check_needs(cfg)
    workdir = epath.Path(cfg.workdir or f"runs/{cfg.name}").resolve()
    params, vae_params, hub, origins = initial_params(cfg)
    print_origins(cfg, params, vae_params, origins)
    chat = chat_format.ChatFormat.load(hub, num_image_tokens=cfg.model.num_image_tokens)
    chat.check_vocab(cfg.model.llm.vocab_size)
    data = loader.Loader(cfg.data, cfg.model, chat, cfg.batch_rows)
    for phase, (first_row, _) in enumerate(cfg.data.phases()):
        if first_row:
            print(f"from step {-(-first_row // cfg.batch_rows)} on:")
        for source in data.describe(phase):
            print(
                "{source} ({task}): {samples} samples of {records} records in {bins} bins, "
                "{fill:.1%} of positions used, {share_of_positions:.1%} of the mixture".format(
                    **source
                )
            )
    mesh = sharding.make_mesh(cfg.mesh)
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if cfg.batch_rows % (split * cfg.optim.accum_steps):
        raise ConfigError(
            f"batch_rows: expected a multiple of data x fsdp x accum_steps = {split} x "
            f"{cfg.optim.accum_steps}; got {cfg.batch_rows}"
        )
    print(f"{jax.device_count()} {jax.default_backend()} device(s), mesh {dict(mesh.shape)}")
    workdir_lib.start(workdir, cfg, vae=vae_params, hub=hub)
    stop = Stop()
    with jax.set_mesh(mesh):
        state = make_state(cfg, mesh, params, vae_params)
        del params, vae_params
        ckpts = checkpoint.RunCheckpoints(workdir, keep=cfg.keep_checkpoints)
        state, first_row = restore(cfg, ckpts, state)
        step = int(state["step"])
        if step:
            print(f"resumed from step {step}")
        writer = metrics.Writer(workdir, resume_step=step, tensorboard=cfg.tensorboard)
        state, step = _loop(cfg, mesh, state, step, first_row, data, chat, ckpts, writer, stop)
        ckpts.wait()
        if not stop.signal:
            samples.write(cfg, workdir, step, state, chat, writer)
        writer.close()
        ckpts.close()
    minutes = (time.time() - started) / 60
    print(f"{'stopped' if stop.signal else 'done'} at step {step} after {minutes:.1f} min")
    print(f"workdir {workdir}")
    return str(workdir)


def _loop(
    cfg: TrainConfig, mesh: Any, state: Any, step: int, first_row: int, data: loader.Loader,
    chat: Any, ckpts: Any, writer: Any, stop: Stop,
) -> tuple[Any, int]:  # fmt: skip
    """Steps until the last one or a signal, logging one step late; always ends saved."""
    compiled = None
    late: tuple[int, Any, loader.Report] | None = None
    progress = metrics.Progress(cfg.num_steps, first_step=step)
    saved = step
    batches = data.batches(first_row)
    while step < cfg.num_steps and not stop.signal:
        waited = time.perf_counter()
        batch, report = next(batches)
        waited = time.perf_counter() - waited
        images = int(np.sum(batch["slot_task"] != janusflow.NONE))
        batch = sharding.put_batch(batch, mesh, cfg.batch_rows)
        if compiled is None:
            compiled = train_step.jit_train_step(cfg, mesh, state, batch)
        state, out = compiled(state, batch)
        step += 1
        progress.count(images=images, wait=waited)
        if late is not None:
            _log(cfg, writer, progress, *late)
        late = (step, out, report)
        if cfg.save_every_steps and step % cfg.save_every_steps == 0:
            _save(cfg, ckpts, state, step)
            saved = step
        if cfg.sheet_every_steps and step % cfg.sheet_every_steps == 0 and step < cfg.num_steps:
            samples.write(cfg, epath.Path(ckpts.workdir), step, state, chat, writer)
    if late is not None:
        _log(cfg, writer, progress, *late)
    if step != saved:
        _save(cfg, ckpts, state, step)
    batches.close()
    return state, step


def _save(cfg: TrainConfig, ckpts: Any, state: Any, step: int) -> None:
    run = {
        "step": step,
        "bad_steps": int(state["bad_steps"]),
        "next_row": step * cfg.batch_rows,
        "config": config_lib.to_dict(cfg),
    }
    ckpts.save(
        step,
        params={**state["frozen"], **state["params"]},
        ema=state["ema"],
        opt_state=state["opt_state"],
        run=run,
    )


def _log(
    cfg: TrainConfig, writer: Any, progress: Any, step: int, out: Any, report: loader.Report
) -> None:
    """Fetches a past step's metrics; stops a run whose losses are no longer numbers."""
    if step % cfg.log_every_steps and step not in (1, cfg.num_steps):
        return
    values = {k: float(v) for k, v in jax.device_get(out).items()} | progress.rates()
    values |= {"bad_samples": report.num_bad, "samples": report.num_samples}
    writer.write(step, values)
    print(progress.line(step, values), flush=True)
    if not values["ok"]:
        print(f"step {step}: non-finite loss or gradient, update skipped", flush=True)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; use --config=FILE[:ARG]")
    try:
        cfg = _CONFIG.value
    except OSError as error:
        raise ConfigError(f"--config: {error}") from error
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
