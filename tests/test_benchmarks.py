"""The benchmark's two sides compute the same: otherwise their times compare nothing."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_ours_and_the_peers_compute_the_same(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "out.json"
    command = "-m benchmarks.run --size test --steps 2 --rounds 1 --new-tokens 16 --max-batch 2"
    cases = "paint,answer,train,vae"
    subprocess.run(
        [sys.executable, *command.split(), "--only", cases, "--scratch", tmp_path, "--json", out],
        cwd=ROOT,
        check=True,
    )
    found = {r["case"]: r for r in json.loads(out.read_text())["results"]}
    notes = {case: r["note"] for case, r in found.items()}
    assert {len(r["ways"]) for r in found.values()} >= {2, 3}
    for case, note in notes.items():
        if case.startswith("paint"):
            assert float(note.removeprefix("largest difference ")) < 1e-5
        elif "tokens behind" in case:
            assert note == "same tokens"
        elif case.startswith("train"):
            mine, theirs = map(float, note.removeprefix("first losses ").split(", "))
            assert mine == pytest.approx(theirs, abs=2e-4)
    assert sum(case.startswith("train") for case in notes) == 3
    assert all(t["runs"][0] > 0 for r in found.values() for t in r["ways"].values())


@pytest.mark.slow
def test_operations_are_those_that_are_counted():
    from benchmarks import operations

    for line in operations.lines("test"):
        assert line.wanted > 0 and abs(line.difference) < 0.03, line.text()
        assert all(x >= 0 for x in line.wasted.values())
