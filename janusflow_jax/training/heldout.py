"""Held-out losses during training, and a check that they do not rise.

Every measurement takes the same rows, times and noise: each source is packed alone and its first
rows are read once; times and noise are keyed by (`evaluate.seed`, row, slot) and drawn from the
run's own distribution of times, so that values compare with the training losses. No prompt is
dropped, and latents are the mode of the VAE's posterior. Equal parameters give equal values to the
last digit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from janusflow_jax import config as config_lib
from janusflow_jax.config import SourceConfig, TrainConfig
from janusflow_jax.config.errors import DivergedError
from janusflow_jax.config.fields import differences
from janusflow_jax.data import chat_format, rows as rows_lib
from janusflow_jax.parallel import numerics, processes, sharding, trees
from janusflow_jax.training import losses, metrics, step as train_step

RAW, EMA = "eval", "eval_ema"
"""First parts of the metrics' names: of the parameters, and of their moving average."""
LOSSES = ("loss_ar", "loss_rf")
MIN_IMAGES = 16
"""A loss over fewer images says little; the run warns."""


def metric(weights: str, source: str, loss: str) -> str:
    """Name of a metric, such as 'eval_ema/held_out/loss_rf'."""
    return f"{weights}/{source}/{loss}"


def source_name(source: SourceConfig) -> str:
    """What a source is called in the metrics."""
    return source.name or f"{source.split}-{source.task}"


class Heldout:
    """The held-out sources of a run. All processes of a job call every method alike."""

    def __init__(
        self,
        cfg: TrainConfig,
        mesh: Mesh,
        chat: chat_format.ChatFormat,
        saved: Mapping[str, Any] | None = None,
    ):
        """Reads this process's part of every source's rows.

        Args: saved: `to_json()` of the checkpoint that the run resumes from.
        Raises:
          DataError: a source cannot be read.
        """
        self._cfg, self._mesh = cfg, mesh
        self._sources = {source_name(s): _Source(cfg, s, chat, mesh) for s in cfg.evaluate.sources}
        rows = {name: source.identity() for name, source in self._sources.items()}
        self._rises = RiseCheck(cfg.evaluate.max_rise, rows, saved or {})
        self._programs: dict[str, Callable] = {}  # a task's, compiled when it is first measured

    def due(self, step: int) -> bool:
        """Whether a run measures after this step."""
        every = self._cfg.evaluate.every_steps
        return step == self._cfg.num_steps or bool(every and step % every == 0)

    def measure(self, state: train_step.State) -> dict[str, float]:
        """`eval/<source>/loss_ar` and `loss_rf` (and `loss_rf/t0` ... by quarter of time) of the
        parameters; `eval_ema/...` of their average where the run has one."""
        if self._sources:
            jax.block_until_ready(state)  # on CPU, two programs at once would mix their messages
        out: dict[str, float] = {}
        for name, source in self._sources.items():
            for weights, params in ((RAW, state["params"]), (EMA, state["ema"])):
                if params:
                    values = self._measure(source, params, state)
                    out |= {metric(weights, name, loss): x for loss, x in values.items()}
        return out

    def record(self, step: int, values: dict[str, float], writer: metrics.Writer) -> None:
        """Writes a measurement, prints it, and warns of losses that have risen."""
        if not values:
            return
        # Before the writing, which may fail on process 0 alone: all processes stop at one step.
        risen = self._rises.update(step, values)
        writer.write(step, values)
        for line in (f"step {step}: {describe(values, self._sources)}", *risen):
            processes.log(line)

    def summary(self) -> str:
        """A line for every source, and warnings of those with few images."""
        return "\n".join(source.describe(name) for name, source in self._sources.items())

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint stores, so that a resumed run compares with the same first values."""
        return self._rises.to_json()

    @property
    def must_stop(self) -> bool:
        """Whether a loss has risen so far that the run stops, in this attempt or an earlier one."""
        return self._cfg.evaluate.stop_on_rise and bool(self._rises.risen())

    def raise_risen(self) -> None:
        """Raises DivergedError where `must_stop`."""
        if self.must_stop:
            start = f" --config.start={self._cfg.start}" if self._cfg.start else ""
            raise DivergedError(
                f"held-out losses have risen too far by step {self._rises.step}; the run is saved, "
                f"and the same command stops here again:\n{_listed(self._rises.risen())}\n"
                "To prevent it, lower --config.optim.lr, or raise the weight of sources that keep "
                "these abilities (replay). Neither may change in this folder, so begin a new run: "
                f"--config.workdir=NEW{start}\nTo continue this run all the same: "
                "--config.evaluate.stop_on_rise=False, or a larger --config.evaluate.max_rise"
            )

    def _measure(self, source: _Source, params: Any, state: train_step.State) -> dict[str, float]:
        task = source.cfg.task
        if task not in self._programs:
            self._programs[task] = _jit_sums(self._cfg, task, self._mesh)
        totals: dict[str, Any] = {}
        for rows in source.batches:
            batch = sharding.put_batch(rows, self._mesh, source.batch_rows)
            sums = self._programs[task](params, state["frozen"], state["vae"], batch)
            for name, value in jax.device_get(sums).items():  # float64: batches add up exactly
                totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
        return _means(totals)


def slots_of(cfg: TrainConfig, task: str) -> tuple[int, int]:
    """Generation and understanding slots of a task's rows: the run's. Where the run has none of the
    task, as many as of the other, so that the rows are the same whether the run replays it or
    not."""
    fit = max(1, cfg.data.row_len // (cfg.model.slot_len + 40))  # 40: a short text
    gen, und = cfg.data.gen_slots, cfg.data.und_slots
    gen, und = gen or und or fit, und or gen or fit
    return (gen if task == "generate" else 0, und if task == "understand" else 0)


class _Source:
    """A held-out source, and this process's part of the rows that every measurement takes."""

    def __init__(
        self, cfg: TrainConfig, source: SourceConfig, chat: chat_format.ChatFormat, mesh: Mesh
    ):
        self.cfg, self._seed = source, cfg.evaluate.seed
        gen_slots, und_slots = slots_of(cfg, source.task)
        data = dataclasses.replace(
            cfg.data,
            sources=(dataclasses.replace(source, weight=1.0, weight_after=-1.0, cache=""),),
            gen_slots=gen_slots,
            und_slots=und_slots,
            change_row=0,
            drop_prompt=0.0,
            seed=cfg.evaluate.seed,
        )
        rows = rows_lib.Rows(data, cfg.model, chat, repa=False)
        packed = rows.sources[0]
        self._num_rows = min(cfg.evaluate.rows, len(packed.bins))  # with fewer bins: all, once
        self._all_rows = self._num_rows == len(packed.bins)
        bins = [rows.samples(row)[1] for row in range(self._num_rows)]
        self._num_records = len(packed.records)
        self._content = packed.identity()["content"]
        self._num_samples = sum(map(len, bins))
        self._num_images = sum(sample.images for b in bins for sample in b)
        split = mesh.shape["data"] * mesh.shape["fsdp"]
        wanted = min(cfg.evaluate.rows, max(cfg.batch_rows // cfg.optim.accum_steps, 1))
        self.batch_rows = -(-wanted // split) * split
        self.batches = list(self._batches(rows, sharding.rows_of_process(mesh, self.batch_rows)))

    def identity(self) -> dict[str, Any]:
        """What the rows follow from: values of equal identity can be compared."""
        fields = config_lib.to_dict(self.cfg)
        out = {n: fields[n] for n in ("name", "path", "split", "task", "format", "fields")}
        out |= {"seed": self._seed, "rows": self._num_rows, "samples": self._num_samples}
        return out | {"content": self._content}

    def describe(self, name: str) -> str:
        """What the losses of the source rest on, with a warning where that is little."""
        images = self._num_images
        line = (
            f"held-out {name} ({self.cfg.task}), split {self.cfg.split}: records "
            f"{self._num_records}, samples {self._num_samples}, images {images}, rows "
            f"{self._num_rows}"
        )
        if 0 < images < MIN_IMAGES:
            advice = "raise --config.evaluate.rows"
            if self._all_rows:
                advice = "prepare the data with a larger --heldout (tools/prepare_data.py)"
            line += (
                f"\nWARNING: held-out {name}: expected {MIN_IMAGES} or more images; got {images}: "
                f"{advice}"
            )
        return line

    def _batches(self, rows: rows_lib.Rows, mine: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows; the last batch is filled up with empty ones."""
        for first in range(0, self._num_rows, self.batch_rows):
            out = []
            for place in mine:
                row, bad = rows.row(min(first + place, self._num_rows - 1))
                for sample in bad:
                    processes.log(f"held-out, left out: {sample}")
                if first + place >= self._num_rows:
                    row = {n: x if n == "row" else np.zeros_like(x) for n, x in row.items()}
                out.append(row)
            yield {name: np.stack([row[name] for row in out]) for name in out[0]}


def _jit_sums(cfg: TrainConfig, task: str, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """(trained, frozen, VAE parameters, batch) -> sums and counts of a task's losses."""
    loss = dataclasses.replace(cfg.loss, repa_weight=0.0, vae_mode=True)
    num_gen, num_und = slots_of(cfg, task)
    model = train_step.make_model(cfg)

    def sums_and_counts(trained: Any, frozen: Any, vae: Any, batch: losses.Batch) -> dict[str, Any]:
        draws = losses.draw(numerics.key(cfg.evaluate.seed), batch, cfg.model, loss, num_gen)
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
        out |= {f"count_{n}": counts[n][0] for n in ("ar", "rf")}
        return out | {n: x for n, x in extras.items() if n.endswith("_by_t")}

    return jax.jit(sums_and_counts, out_shardings=NamedSharding(mesh, P()))


def _means(totals: Mapping[str, Any]) -> dict[str, float]:
    """The losses that have at least one element."""
    out = {
        f"loss_{n}": float(totals[f"sum_{n}"] / totals[f"count_{n}"])
        for n in ("ar", "rf")
        if totals[f"count_{n}"]
    }
    if "loss_rf" in out:
        for i, count in enumerate(totals["count_by_t"]):
            out |= {f"loss_rf/t{i}": float(totals["rf_by_t"][i] / count)} if count else {}
    return out


def describe(values: Mapping[str, float], sources: Iterable[str]) -> str:
    """The losses in one line, those of the EMA in parentheses."""
    parts = []
    for source in sources:
        for loss in LOSSES:
            raw, ema = (values.get(metric(w, source, loss)) for w in (RAW, EMA))
            if raw is not None:
                average = "" if ema is None else f" ({ema:.4f})"
                parts.append(f"{source} {loss.removeprefix('loss_')} {raw:.4f}{average}")
    averaged = any(name.startswith(f"{EMA}/") for name in values)
    return f"held-out{' (EMA)' if averaged else ''}: {', '.join(parts)}"


class RiseCheck:
    """Compares each held-out loss with its first finite value.

    Its state is saved with every checkpoint: a run that stopped because a loss had risen stops
    again when it is restarted, until its config allows it to continue.
    """

    def __init__(
        self, max_rise: float, rows: Mapping[str, dict[str, Any]], saved: Mapping[str, Any]
    ):
        """
        Args:
          max_rise: the share by which a loss may rise; 0: nothing is checked.
          rows: source -> identity of its rows. A source whose identity has changed since its first
            measurement cannot be compared and begins anew.
          saved: `to_json()`; {}: a new run.
        """
        self._max_rise, self._rows = max_rise, rows
        self._rows_measured: dict[str, dict[str, Any]] = dict(saved.get("rows", {}))
        self._first: dict[str, float] = _without_null(saved.get("first", {}))
        self._first_steps: dict[str, int] = dict(saved.get("steps", {}))
        newest = saved.get("newest", {})
        self._newest: dict[str, float] = dict.fromkeys(newest, math.nan) | _without_null(newest)
        self.step = int(saved.get("step", 0))
        """Of the newest measurement."""

    def to_json(self) -> dict[str, Any]:
        """The state as JSON values; JSON has no NaN or infinity, so null stands for them."""
        return {
            "first": self._first,
            "steps": self._first_steps,
            "newest": {n: x if math.isfinite(x) else None for n, x in self._newest.items()},
            "step": self.step,
            "rows": self._rows_measured,
        }

    def update(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Takes a measurement; returns lines to print."""
        later, messages = bool(self._newest) or step > 0, []
        for source in self._rows:
            of_source = tuple(f"{weights}/{source}/loss_" for weights in (RAW, EMA))
            changes = self._changes(source)
            if changes:
                self._first = {n: x for n, x in self._first.items() if not n.startswith(of_source)}
            finite = {n: x for n, x in values.items() if math.isfinite(x)}
            new = [n for n in finite if n.startswith(of_source) and n not in self._first]
            self._first |= {n: finite[n] for n in new}
            self._first_steps |= dict.fromkeys(new, step)
            if new and later:
                reason = "was not measured before"
                if changes:
                    reason = f"is measured on other rows than before ({', '.join(changes)})"
                messages.append(f"held-out {source} {reason}: its rise counts from step {step}")
        self._rows_measured |= self._rows
        self._newest, self.step = dict(values), step
        if risen := self.risen():
            messages.append(f"WARNING: step {step}: held-out losses have risen:\n{_listed(risen)}")
        return messages if self._max_rise else []

    def risen(self) -> list[str]:
        """A line for every loss of the newest measurement that lies above its first value by more
        than `max_rise`, or that is not finite. Of a loss with an EMA the average counts, because
        that is the run's result; the raw loss counts when it alone is not finite."""
        names = []
        for source in self._rows if self._max_rise else ():
            if self._changes(source):
                continue
            for loss in LOSSES:
                ema, raw = metric(EMA, source, loss), metric(RAW, source, loss)
                if ema in self._newest:
                    names.append(ema)
                if raw in self._newest and (
                    ema not in self._newest
                    or (math.isfinite(self._newest[ema]) and not math.isfinite(self._newest[raw]))
                ):
                    names.append(raw)
        out = []
        for name in names:
            first, newest = self._first.get(name), self._newest[name]
            step = self._first_steps.get(name, 0)
            then = "" if first is None else f"{first:.4f} at step {step}, "
            if not math.isfinite(newest):
                out.append(f"{name}: {then}now {newest}")
            elif first is not None and newest > first + self._max_rise * abs(first):
                limit = f"evaluate.max_rise {self._max_rise:.0%}"
                out.append(f"{name}: {then}now {newest:.4f} ({limit})")
        return out

    def _changes(self, source: str) -> list[str]:
        """How a source's rows differ from those of its first values."""
        now = self._rows[source]
        then = self._rows_measured.get(source, now)
        # Without a name the path seeds the order of the rows. Runs of 0.1 recorded no content.
        ignored = ("path",) if "content" in then and now.get("name") else ()
        older = {n: now.get(n) for n in ("content", "name")}
        return differences(older | then, now, ignored)


def _listed(lines: list[str]) -> str:
    return "\n".join(f"  - {line}" for line in lines)


def _without_null(values: Mapping[str, float | None]) -> dict[str, float]:
    return {n: x for n, x in values.items() if x is not None}
