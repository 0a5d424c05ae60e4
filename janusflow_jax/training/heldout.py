"""Held-out losses in the loop: the same rows, times and noise at every measurement.

Each source is packed alone and its first rows are read once. Times and noise follow from
(`evaluate.seed`, row, slot) by the run's own distribution of times, so that a value stands beside
training's; no prompt is dropped, latents are the posterior's mode. So a value changes with the
parameters only, and two measurements of the same parameters are equal to the last digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax import config as config_lib
from janusflow_jax.config import SourceConfig, TrainConfig
from janusflow_jax.config.errors import DivergedError
from janusflow_jax.data import chat_format, rows as rows_lib
from janusflow_jax.parallel import processes, sharding, trees
from janusflow_jax.training import heldout_guard, losses, metrics, step as train_step

RAW, EMA = heldout_guard.RAW, heldout_guard.EMA
FEW = 16
"""Pictures; a loss of fewer says little."""


class Heldout:
    """The held-out sources of a run; all processes of a job call all methods alike."""

    def __init__(
        self,
        cfg: TrainConfig,
        mesh: Mesh,
        chat: chat_format.ChatFormat,
        saved: Mapping[str, Any] | None = None,
    ):
        """Reads this process's part of every source's rows.

        Args: saved: of `to_json`, where the run has been under way before.
        Raises:
          DataError, DataError, DataError: a source cannot be read.
        """
        self._cfg, self._mesh = cfg, mesh
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        wanted = min(cfg.evaluate.rows, max(cfg.batch_rows // cfg.optim.accum_steps, 1))
        self._size = -(-wanted // split) * split
        mine = sharding.rows_of_process(mesh, self._size)
        opened = {name_of(s): _Fixed(cfg, s, chat) for s in cfg.evaluate.sources}
        self._summary = [line for name, x in opened.items() for line in x.describe(name)]
        self._batches = {name: x.batches(self._size, mine) for name, x in opened.items()}
        follows_from = {name: x.follows_from() for name, x in opened.items()}
        self._guard = heldout_guard.Guard(cfg.evaluate, follows_from, saved or {})
        self._programs: dict[str, Any] = {}

    def due(self, step: int) -> bool:
        """Whether a run measures after this step."""
        every = self._cfg.evaluate.every_steps
        return step == self._cfg.num_steps or bool(every and step % every == 0)

    def measure(self, state: train_step.State) -> dict[str, float]:
        """`eval/<source>/loss_ar` and `loss_rf` (and by quarter of time: `loss_rf/t0` ...), of the
        parameters; `eval_ema/...` of their average where the run keeps one."""
        kinds = {RAW: state["params"]} | ({EMA: state["ema"]} if state["ema"] else {})
        out: dict[str, float] = {}
        if self._batches:
            jax.block_until_ready(state)  # on CPU two programs at once would mix their messages
        for source in self._cfg.evaluate.sources:
            for kind, params in kinds.items():
                found = self._measure(source, params, state)
                out |= {f"{kind}/{name_of(source)}/{n}": x for n, x in found.items()}
        return out

    def note(self, step: int, values: dict[str, float], writer: metrics.Writer) -> None:
        """Writes and tells what was measured, and whether it has risen since the start."""
        if not values:
            return
        writer.write(step, values)
        processes.log(f"step {step}: {describe(values)}")
        for line in self._guard.note(step, values):
            processes.log(line)

    def summary(self) -> str:
        """A line a source, for people: how much its losses rest on; loud where that is little."""
        return "\n".join(self._summary)

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a resumed run knows what it has to hold."""
        return self._guard.to_json()

    @property
    def ends(self) -> bool:
        """Whether a loss has risen so far that the run must end, now or when it stopped."""
        return self._cfg.evaluate.stop_on_rise and bool(self._guard.risen())

    def check(self) -> None:
        """Raises DivergedError where the run must end."""
        if self.ends:
            start = f" --config.start={self._cfg.start}" if self._cfg.start else ""
            raise DivergedError(
                f"held-out losses have risen too far by step {self._guard.step}; the run is "
                f"saved, and ends here again by the same command:\n"
                f"{heldout_guard.listed(self._guard.risen())}\n"
                "To keep them, lower --config.optim.lr, or give the sources that keep them more "
                "weight (replay). Neither may change in this folder, so begin a new run: "
                f"--config.workdir=NEW{start}\nTo go on with this one all the same: "
                "--config.evaluate.stop_on_rise=False, or a larger --config.evaluate.max_rise"
            )

    def _measure(self, source: SourceConfig, params: Any, state: Any) -> dict[str, float]:
        if source.task not in self._programs:
            self._programs[source.task] = _program(self._cfg, source.task, self._mesh)
        run = self._programs[source.task]
        totals: dict[str, Any] = {}
        for rows in self._batches[name_of(source)]:
            batch = sharding.put_batch(rows, self._mesh, self._size)
            found = jax.device_get(run(params, state["frozen"], state["vae"], batch))
            for name, value in found.items():  # float64 on the host: batches add up exactly
                totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
        return _means(totals)


def name_of(source: SourceConfig) -> str:
    """What a source is called in the metrics."""
    return source.name or f"{source.split}-{source.task}"


def slots_of(cfg: TrainConfig, task: str) -> tuple[int, int]:
    """Kg and Ku of a task's rows: the run's; where it has none of the task, as many as of the
    other, so that a task's rows are the same whether the run replays it or not."""
    fit = max(1, cfg.data.row_len // (cfg.model.slot_len + 40))  # 40: a short text
    gen, und = cfg.data.gen_slots, cfg.data.und_slots
    gen, und = gen or und or fit, und or gen or fit
    return (gen if task == "generate" else 0, und if task == "understand" else 0)


class _Fixed:
    """The rows of a source that every measurement takes: its first."""

    def __init__(self, cfg: TrainConfig, source: SourceConfig, chat: chat_format.ChatFormat):
        """Opens and packs the source, alone."""
        self._source, self._seed = source, cfg.evaluate.seed
        data = dataclasses.replace(
            cfg.data,
            sources=(dataclasses.replace(source, weight=1.0, weight_after=-1.0, cache=""),),
            gen_slots=slots_of(cfg, source.task)[0],
            und_slots=slots_of(cfg, source.task)[1],
            change_row=0,
            drop_prompt=0.0,
            seed=cfg.evaluate.seed,
        )
        self._rows = rows_lib.Rows(data, cfg.model, chat, repa=False)
        self._packed = self._rows.sources[0]
        self.count = min(cfg.evaluate.rows, len(self._packed.bins))  # with fewer bins: all, once
        chosen = [
            i for row in range(self.count) for i, _ in self._packed.bins[self._rows.locate(row)[2]]
        ]
        self.samples, self.pictures = len(chosen), int(self._packed.samples.images[chosen].sum())

    def follows_from(self) -> dict[str, Any]:
        """What the rows follow from: where it is equal, values can be compared."""
        settings = config_lib.to_dict(self._source)
        own = {n: settings[n] for n in ("path", "split", "task", "format", "fields")}
        return own | {"seed": self._seed, "rows": self.count, "samples": self.samples}

    def describe(self, name: str) -> list[str]:
        """How much there is of it, and a warning where that is little."""
        source = self._source
        many, what = (self.pictures, "picture") if self.pictures else (self.samples, "text")
        found = f"{many} {what}{'' if many == 1 else 's'}"
        said = [
            f"held-out {name} ({source.task}): {found} of {len(self._packed.records)} in split "
            f"{source.split}, in {self.count} row{'' if self.count == 1 else 's'}"
        ]
        if 0 < self.pictures < FEW:
            whole = self.count == len(self._packed.bins)
            advice = (
                "keep more apart: prepare it with a larger --heldout (tools/prepare_data.py)"
                if whole
                else f"raise --config.evaluate.rows ({self.count})"
            )
            said.append(
                f"WARNING: held-out {name}: its losses, and the guard on them, rest on {found}; "
                f"expected {FEW} or more: {advice}"
            )
        return said

    def batches(self, size: int, mine: list[int]) -> list[dict[str, np.ndarray]]:
        """This process's rows, in batches of `size`; what is missing in the last is empty."""
        out = []
        for first in range(0, self.count, size):
            made = []
            for place in mine:
                row, bad = self._rows.row(min(first + place, self.count - 1))
                for sample in bad:
                    processes.log(f"held-out, left out: {sample}")
                made.append(row if first + place < self.count else _empty(row))
            out.append({name: np.stack([row[name] for row in made]) for name in made[0]})
        return out


def _empty(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A row that counts for nothing."""
    return {n: x if n == "row" else np.zeros_like(x) for n, x in row.items()}


def _program(cfg: TrainConfig, task: str, mesh: Mesh) -> Any:
    """(trained, frozen, VAE parameters, batch) -> sums and counts, on a mesh."""
    loss = dataclasses.replace(cfg.loss, repa_weight=0.0, vae_mode=True)
    num_gen, num_und = slots_of(cfg, task)
    model = train_step.make_model(cfg)

    def run(trained: Any, frozen: Any, vae: Any, batch: losses.Batch) -> dict[str, Any]:
        draws = losses.draw(jax.random.key(cfg.evaluate.seed), batch, cfg.model, loss, num_gen)
        sums, extras = losses.loss_sums(
            trees.merge(frozen, trained),
            vae,
            batch,
            draws,
            model=model,
            loss=loss,
            num_gen=num_gen,
            num_und=num_und,
        )
        counts = losses.counts(batch, num_gen)
        out = {f"sum_{n}": sums[n] for n in ("ar", "rf")}
        out |= {f"count_{n}": counts[n] for n in ("ar", "rf")}
        return out | {n: x for n, x in extras.items() if n.endswith("_by_t")}

    return jax.jit(run, out_shardings=NamedSharding(mesh, P()))


def _means(totals: Mapping[str, Any]) -> dict[str, float]:
    """Losses of what there was any of."""
    out = {
        f"loss_{n}": float(totals[f"sum_{n}"] / totals[f"count_{n}"])
        for n in ("ar", "rf")
        if totals.get(f"count_{n}", 0)
    }
    if "loss_rf" in out:
        for i, (total, count) in enumerate(
            zip(totals["rf_by_t"], totals["count_by_t"], strict=True)
        ):
            out |= {f"loss_rf/t{i}": float(total / count)} if count else {}
    return out


def describe(values: Mapping[str, float]) -> str:
    """The losses in a line, EMA in brackets."""
    parts = []
    for name, value in values.items():
        kind, _, rest = name.partition("/")
        if kind == RAW and not rest.rpartition("/")[2].startswith("t"):
            ema = values.get(f"{EMA}/{rest}")
            beside = "" if ema is None else f" ({ema:.4f})"
            parts.append(f"{rest.replace('/loss_', ' ')} {value:.4f}{beside}")
    averaged = any(name.startswith(f"{EMA}/") for name in values)
    return f"held-out{' (EMA)' if averaged else ''}: {', '.join(parts)}"
