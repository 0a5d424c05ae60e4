"""A guard on held-out losses: what each was when it was first measured, and how far it has risen.

What it knows is saved with every checkpoint: a run that ended because a loss had risen ends again
when it is started again, until its config lets it go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from janusflow_jax.config import EvalConfig

RAW, EMA = "eval", "eval_ema"
"""First parts of the metrics' names."""

Values = Mapping[str, float]


class Guard:
    """The first measurement of every loss, the newest of all, and what they were measured on."""

    def __init__(
        self, limits: EvalConfig, rows: Mapping[str, Mapping[str, Any]], saved: Mapping[str, Any]
    ):
        """Goes on where a run stopped.

        Args:
          limits: `max_rise`.
          rows: source -> what its rows follow from, JSON values: where these are others than then,
            the source's losses are no longer comparable, and begin anew.
          saved: of `to_json`; {}: a new run; losses by name: an older version's, which kept neither
            their step nor what they were measured on.
        """
        kept: dict[str, Any] = dict(saved)
        if kept and "first" not in kept:
            kept = {"first": kept}
        self._limits, self._rows = limits, {n: dict(r) for n, r in rows.items()}
        self.first = _floats(kept.get("first", {}))
        self.steps: dict[str, int] = dict(kept.get("steps", {}))  # where each was first measured
        self.newest = _floats(kept.get("newest", {}))
        self.step = int(kept.get("step", 0))  # of the newest
        self._rows_then: dict[str, dict[str, Any]] = dict(kept.get("rows", {}))
        self._told: set[str] = set()

    def note(self, step: int, values: Values) -> list[str]:
        """Takes a measurement; returns what there is to say of it, of rises too."""
        known = bool(self.first)
        others = {s: d for s in self._rows if (d := self._differs(s))}
        self.first = {n: x for n, x in self.first.items() if source_of(n) not in others}
        self._rows_then |= self._rows
        new = [n for n in values if n not in self.first]
        self.first |= {n: values[n] for n in new}
        self.steps |= dict.fromkeys(new, step)
        self.newest, self.step = dict(values), step
        if not self._limits.max_rise:
            return []
        said = []
        for source in dict.fromkeys(source_of(n) for n in new if known or step):
            why = "was not measured before"
            if source in others:
                why = f"is measured on other rows than before ({others[source]})"
            said.append(f"held-out {source} {why}: its rise counts from step {step}")
        for name in watched(values):
            if not math.isfinite(self.first[name]) and name not in self._told:
                self._told.add(name)
                when = since(self.steps.get(name))
                said.append(
                    f"WARNING: held-out {name}: expected a number to compare with; it was "
                    f"{self.first[name]} {when}, so no rise of it will be told: look at that "
                    "source's data and at what the run starts from"
                )
        if found := self.risen():
            said.append(f"WARNING: step {step}: held-out losses have risen:\n{listed(found)}")
        return said

    def risen(self) -> list[str]:
        """Which losses of the newest measurement have risen too far, by the limits and on the rows
        of now."""
        most = self._limits.max_rise
        here = {s for s in self._rows if not self._differs(s)}
        values = {n: x for n, x in self.newest.items() if source_of(n) in here}
        return rises(values, self.first, most, self.steps) if most else []

    def to_json(self) -> dict[str, Any]:
        """What `saved` takes; numbers that are none are null."""
        numbers = lambda x: {n: v if math.isfinite(v) else None for n, v in x.items()}  # noqa: E731
        return {
            "first": numbers(self.first),
            "steps": {n: s for n, s in self.steps.items() if n in self.first},
            "newest": numbers(self.newest),
            "step": self.step,
            "rows": self._rows_then,
        }

    def _differs(self, source: str) -> str:
        """How the rows of now differ from those that a source's first losses are of."""
        now, then = self._rows[source], self._rows_then.get(source)
        if then is None:  # new, or of an older version: taken as it is
            return ""
        names = [n for n in {**then, **now} if then.get(n) != now.get(n)]
        return ", ".join(f"{n}: {then.get(n)!r} then, {now.get(n)!r} now" for n in names)


def source_of(name: str) -> str:
    """The source of a loss: 'eval_ema/a/loss_rf/t0' is of 'a'."""
    return name.partition("/")[2].rpartition("/loss_")[0]


def since(step: int | None) -> str:
    """When a loss was first measured, in words."""
    return "when first measured" if step is None else f"at step {step}" if step else "at the start"


def watched(values: Values) -> list[str]:
    """The losses that are guarded: no quarters of time; of the average where there is one, because
    that is what comes out of a run, but for a raw loss that is no number."""
    out = []
    for name, value in values.items():
        kind, _, rest = name.partition("/")
        average = values.get(f"{EMA}/{rest}") if kind == RAW else None
        only_raw = average is None or (math.isfinite(average) and not math.isfinite(value))
        if only_raw and not rest.rpartition("/")[2].startswith("t"):
            out.append(name)
    return out


def rises(
    values: Values, first: Values, most: float, steps: Mapping[str, int] | None = None
) -> list[str]:
    """Which losses lie above their first values by more than `most` (a share), or are no number
    now and were one then.

    Args: steps: where each was first measured; None: all at the start.
    """
    out = []
    for name in watched(values):
        value, begun = values[name], first.get(name, math.nan)
        if not math.isfinite(begun):
            continue
        when = since(0 if steps is None else steps.get(name))
        if not math.isfinite(value):
            out.append(f"{name}: {begun:.4f} {when}, now {value}: no number")
        elif value > begun + most * abs(begun):
            share = f"{value / begun - 1:+.0%}; " if begun else ""
            out.append(
                f"{name}: {begun:.4f} {when}, now {value:.4f} ({share}evaluate.max_rise {most:.0%})"
            )
    return out


def listed(lines: list[str]) -> str:
    """Lines as a list."""
    return "\n".join(f"  - {line}" for line in lines)


def _floats(values: Mapping[str, float | None]) -> dict[str, float]:
    return {n: math.nan if x is None else float(x) for n, x in values.items()}
