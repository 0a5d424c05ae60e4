"""The guard on held-out losses: what is compared with what, what is said, what a save keeps."""

from __future__ import annotations

import json
import math

import pytest

from janusflow_jax import config as c
from janusflow_jax.training import heldout_guard

LIMITS = c.EvalConfig(max_rise=0.1)
ROWS = {"a": {"path": "data/a", "rows": 4}, "b": {"path": "data/b", "rows": 4}}
A, B = "eval/a/loss_ar", "eval/b/loss_rf"
NAN = math.nan


def guard(rows=None, saved=None, limits=LIMITS) -> heldout_guard.Guard:
    return heldout_guard.Guard(limits, ROWS if rows is None else rows, saved or {})


def resumed(old: heldout_guard.Guard, rows=None, limits=LIMITS) -> heldout_guard.Guard:
    """Through a file, of strict JSON."""
    return guard(rows, json.loads(json.dumps(old.to_json(), allow_nan=False)), limits)


def test_rises():
    first = {"eval/a/loss_ar": 1.0, "eval_ema/a/loss_ar": 1.0, "eval/b/loss_rf": 2.0}
    now = {"eval/a/loss_ar": 9.0, "eval_ema/a/loss_ar": 1.05, "eval/b/loss_rf": 2.5}
    assert heldout_guard.rises(now, first, 0.3) == []
    assert heldout_guard.rises(now, first, 0.1) == [
        "eval/b/loss_rf: 2.0000 at the start, now 2.5000 (+25%; evaluate.max_rise 10%)"
    ]
    assert len(heldout_guard.rises(now, first, 0.01)) == 2  # of the average, not the raw beside it
    quarters = {"eval/b/loss_rf/t0": 5.0}
    assert heldout_guard.rises(quarters, {"eval/b/loss_rf/t0": 1.0}, 0.1) == []
    (said,) = heldout_guard.rises({A: 2.0}, {A: 1.0}, 0.1, {A: 4})
    assert "1.0000 at step 4, now 2.0000" in said
    (said,) = heldout_guard.rises({A: 2.0}, {A: 1.0}, 0.1, {})
    assert "1.0000 when first measured" in said
    (said,) = heldout_guard.rises({A: 2.0}, {A: 0.0}, 0.1)
    assert "0.0000 at the start, now 2.0000 (evaluate.max_rise 10%)" in said


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_loss_that_is_no_number_has_risen(value):
    (said,) = heldout_guard.rises({A: value}, {A: 1.0}, 0.1)
    assert said == f"{A}: 1.0000 at the start, now {value}: no number"
    # of the average, or of the raw loss alone; not both
    ema = A.replace("eval/", "eval_ema/")
    first = {A: 1.0, ema: 1.0}
    assert len(heldout_guard.rises({A: value, ema: value}, first, 0.1)) == 1
    assert len(heldout_guard.rises({A: value, ema: 1.0}, first, 0.1)) == 1
    assert heldout_guard.rises({A: 1.0}, {A: value}, 0.1) == []  # nothing to compare with


def test_no_number_at_the_start_is_said_once():
    watch = guard()
    (said,) = watch.note(0, {A: NAN, B: 1.0})
    assert "WARNING: held-out eval/a/loss_ar: expected a number" in said and "at the start" in said
    assert watch.note(1, {A: 9.0, B: 1.0}) == [] and watch.risen() == []
    (said,) = resumed(watch).note(2, {A: 9.0, B: 1.0})  # once a command
    assert "it was nan at the start" in said


def test_a_loss_counts_from_where_it_was_first_measured():
    watch = guard({"a": ROWS["a"]})
    assert watch.note(0, {A: 1.0}) == []
    watch = resumed(watch)  # b is added
    assert watch.note(4, {A: 1.0, B: 1.0}) == [
        "held-out b was not measured before: its rise counts from step 4"
    ]
    (said,) = watch.note(5, {A: 1.05, B: 2.0})
    assert "eval/b/loss_rf: 1.0000 at step 4, now 2.0000" in said and "eval/a" not in said
    late = guard()
    assert len(late.note(4, {A: 1.0, B: 1.0})) == 2  # the whole run began without
    assert "at step 4" in late.note(5, {A: 1.0, B: 2.0})[0]


def test_other_rows_begin_anew():
    watch = guard()
    watch.note(0, {A: 1.0, B: 1.0})
    watch.note(1, {A: 2.0, B: 1.0})
    assert watch.risen()
    changed = {**ROWS, "a": {**ROWS["a"], "rows": 8}}
    other = resumed(watch, changed)
    assert other.risen() == []
    assert resumed(other).risen()  # saved before it was measured, and taken back: as before
    assert other.note(2, {A: 3.0, B: 1.0}) == [
        "held-out a is measured on other rows than before (rows: 4 then, 8 now): "
        "its rise counts from step 2"
    ]
    assert "3.0000 at step 2, now 4.0000" in other.note(3, {A: 4.0, B: 1.0})[0]


def test_what_had_risen_is_known_after_a_restart():
    watch = guard()
    watch.note(0, {A: 1.0, B: 1.0})
    assert "WARNING: step 3" in watch.note(3, {A: NAN, B: 2.0})[0]
    again = resumed(watch)
    assert again.risen() == watch.risen() and len(again.risen()) == 2 and again.step == 3
    # by the limits, and of the sources, of now
    assert len(resumed(watch, limits=c.EvalConfig(max_rise=1.5)).risen()) == 1
    assert resumed(watch, limits=c.EvalConfig()).risen() == []
    assert len(resumed(watch, {"b": ROWS["b"]}).risen()) == 1
    again.note(4, {A: 1.0, B: 1.0})
    assert again.risen() == []


def test_what_an_older_version_saved_is_compared_with():
    watch = guard(saved={A: 1.0, B: 1.0})
    assert watch.risen() == []
    (said,) = watch.note(7, {A: 2.0, B: 1.0})
    assert "1.0000 when first measured, now 2.0000" in said
    assert resumed(watch).risen() == watch.risen() != []


def test_without_a_limit_nothing_is_said():
    watch = guard(limits=c.EvalConfig())
    assert watch.note(0, {A: 1.0}) == watch.note(1, {A: NAN, B: 9.0}) == watch.risen() == []
    assert len(resumed(watch).risen()) == 1  # but all is kept
