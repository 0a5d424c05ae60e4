"""Both sides of the benchmark compute the same; otherwise their times would mean nothing."""

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
    cases = "generate,chat,train,vae"
    subprocess.run(
        [sys.executable, *command.split(), "--only", cases, "--scratch", tmp_path, "--json", out],
        cwd=ROOT,
        check=True,
    )
    results = {r["case"]: r for r in json.loads(out.read_text())["results"]}
    notes = {case: r["note"] for case, r in results.items()}
    assert {len(r["ways"]) for r in results.values()} >= {2, 3}
    for case, note in notes.items():
        if case.startswith("image"):
            assert float(note.removeprefix("largest difference ")) < 1e-5
        elif "tokens after" in case:
            assert note == "same tokens"
        elif case.startswith("train"):
            own, theirs = map(float, note.removeprefix("first losses ").split(", "))
            assert own == pytest.approx(theirs, abs=2e-4)
    assert sum(case.startswith("train") for case in notes) == 3
    assert all(t["runs"][0] > 0 for r in results.values() for t in r["ways"].values())


def test_both_counts_of_operations_agree():
    from benchmarks import operations

    for name, budget in operations.budgets("test"):
        assert budget.useful > 0 and abs(budget.difference) < 0.03, (name, budget)
        assert all(x >= 0 for x in budget.overhead.values())
