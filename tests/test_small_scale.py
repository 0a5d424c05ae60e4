"""docs/small_scale.md shows what docs/small_scale.json holds; the tool gathers what was scored."""

import argparse
import copy
import json
import pathlib
import types

import pytest

from experiments import small_scale, small_scale_plots as plots, small_scale_tables as tables
from janusflow_jax import evaluate
from janusflow_jax.checkpoints import checksums
from janusflow_jax.eval import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
STORED = json.loads((ROOT / "docs" / "small_scale.json").read_text())


def _compared(score, baseline=0.5):
    return {"score": score, "baseline": baseline}


def _report(letter="F", percentile=0.8, exact=0.6):
    """A report of the suite, in the parts that are read."""
    out = {"software": {"jax": "1"}, "data": {"files_sha256": "a"}, "model": {"model.json": "b"}}
    if letter != "D":
        part = {
            "hue": {"within": _compared(0.9, 0.2)},
            "retrieval": {"percentile": _compared(percentile), "median_rank": 25.0},
        }
        out |= {"sheet": part, "trained_pairs": {**part, "frechet": {"painted": 1 - percentile}}}
    if letter != "E":
        kinds = {k: {"constant": _compared(exact, 0.1)} for k in ("exact", "name", "words")}
        out["captions"] = {"heldout_pairs": kinds}
    return out


def _numbers(**runs):
    """Numbers of runs F1=report, ..., as gathered."""
    named = {f"{k[0]}-{k[1:]}": v for k, v in runs.items()}
    training = {"steps": 1200, "batch_rows": 8, "minutes": 5.0}
    return {
        "runs": {k: {"scores": tables.scores(v), "training": training} for k, v in named.items()}
    }


def _run(folder, name, done=True):
    run = folder / name
    run.mkdir(parents=True)
    lines = [{"step": 20 * i, "loss_rf": 10.0 - i, "loss_ar": i, "loss_repa": 0} for i in range(8)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (run / "config.json").write_text(json.dumps({"num_steps": 140, "batch_rows": 8}))
    attempts = [{"began": 100.0, "alive": 160.0}, {"began": 200.0, "alive": 260.0}]
    (run / "attempts.json").write_text(json.dumps(attempts))
    step = run / "checkpoints" / ("140" if done else "100")
    step.mkdir(parents=True)
    (step / checksums.MARKER).write_text("")
    return run


# --- the document


@pytest.mark.parametrize("name", tables.blocks(STORED))
def test_the_document_has_the_stored_numbers(name):
    text = (ROOT / "docs" / "small_scale.md").read_text()
    part = text.split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0]
    assert part == tables.blocks(STORED)[name], "run `python experiments/small_scale.py --redraw`"


def test_a_number_changed_is_a_table_changed():
    other = copy.deepcopy(STORED)
    run = next(iter(other["runs"].values()))
    key = next(iter(run["scores"]))
    run["scores"][key]["score"] += 0.5
    assert tables.letters_table(other) != tables.letters_table(STORED)


def test_the_plots_are_there_and_small():
    files = sorted((ROOT / "docs").glob("small_scale_*.png"))
    assert len(files) == 3 and all(x.stat().st_size < 100_000 for x in files)
    text = (ROOT / "docs" / "small_scale.md").read_text()
    assert all(x.name in text for x in files)


def test_a_document_without_its_markers_is_refused():
    text = "<!-- runs -->\n<!-- end -->\n<!-- luck -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match=r"expected one marker each of .*claims.*got \['luck', 'r"):
        tables.fill(text, tables.blocks(STORED))


def test_plots_are_drawn_and_small(tmp_path):
    files = plots.draw(STORED, tmp_path)
    stored = sorted(x.name for x in (ROOT / "docs").glob("small_scale_*.png"))
    assert sorted(x.name for x in files) == stored
    assert all(5_000 < x.stat().st_size < 100_000 for x in files)


# --- tables


def test_mean_and_range():
    assert tables.spread([0.1, 0.2, 0.6], "{:.1%}") == "30.0% (10.0% .. 60.0%)"
    assert tables.spread([2.0], "{:.1f}") == "2.0 (one run)"


def test_what_a_letter_was_not_taught_is_left_out():
    numbers = _numbers(D1=_report("D"), E1=_report("E"), F1=_report())
    rows = {x.split(" | ")[0].strip("| "): x for x in tables.letters_table(numbers).splitlines()}
    assert rows["generated: hue right"].split(" | ")[1:] == [
        "20.0%",
        "-",
        "90.0% (one run)",
        "90.0% (one run) |",
    ]
    assert rows["captions, unseen pairs: exact"].split(" | ")[3] == "-"
    assert "generated: judge's alignment (cosine)" not in rows  # no report has it


def test_missing_seeds_are_named():
    row = tables.runs_table(_numbers(F1=_report(), F3=_report())).splitlines()[-1]
    assert row == "| F | all | 1, 3 | 2 | 1,200 | 5.0 (5.0 .. 5.0) |"


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ((0.7, 0.8, 0.9), (0.4, 0.5, 0.6), "every F better than every A"),
        ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "every F worse than every A"),
        ((0.1, 0.5, 0.9), (0.4, 0.5, 0.6), "ranges overlap"),
        ((0.7, 0.8), (0.4,), "every F better than every A (2 and 1 runs)"),
        ((0.7,), (), "not measured"),
    ],
)
def test_verdicts(better, worse, expected):
    runs = {f"F{i}": _report(percentile=x) for i, x in enumerate(better)}
    runs |= {f"A{i}": _report(percentile=x) for i, x in enumerate(worse)}
    numbers = _numbers(**runs)
    assert tables.verdict(numbers, "F", "A", "percentile") == expected
    assert tables.verdict(numbers, "F", "A", "frechet") == expected  # the same, less being better


# --- gathering


def test_only_ended_runs_count(tmp_path, capsys):
    _run(tmp_path, "F-1")
    _run(tmp_path, "C-1", done=False)
    _run(tmp_path, "other")
    runs = small_scale.named_runs(tmp_path, r"[A-F]-\d+")
    assert [x.name for x in runs if small_scale.has_ended(x)] == ["F-1"]
    assert "C-1: skipped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected ended runs"):
        small_scale.main([f"--runs={tmp_path / 'nowhere'}"])


def test_curves_hold_what_was_trained(tmp_path):
    curves = {x: small_scale.curve(_run(tmp_path, f"{x}-1")) for x in "ADEF"}
    assert curves["F"]["step"] == [80, 100, 120, 140]
    assert curves["F"]["loss_rf"] == [8.0, 7.0, 6.0, 5.0]
    assert [set(curves[x]) - {"step"} for x in "ADE"] == [
        {"loss_rf", "loss_ar"},
        {"loss_ar"},
        {"loss_rf", "loss_repa"},
    ]


def test_a_report_is_made_once_and_again_when_something_changed(tmp_path, monkeypatch):
    calls, parse = [], evaluate.parse

    def fake(argv):
        options = dict(zip(argv[::2], argv[1::2], strict=True))
        calls.append(options)
        settings = vars(parse(argv))
        report = _report() | {"settings": settings, "model": {"model.json": "b"}} | present
        if options["--judge"]:
            report["judge"] = {"weights_sha256": sha[options["--judge"]]}
        pathlib.Path(options["--out"]).write_text(json.dumps(report))

    present = {"software": {"jax": "1"}, "data": {"files_sha256": "a"}}
    monkeypatch.setattr(small_scale, "data_checksums", lambda path: present["data"])
    monkeypatch.setattr(provenance, "software", lambda: present["software"])
    sha = {"j": "1", "moved": "1", "other": "2"}
    referee = types.SimpleNamespace
    monkeypatch.setattr(small_scale.judge, "load", lambda x: referee(sha256=sha[x]))
    monkeypatch.setattr(evaluate, "main", fake)
    monkeypatch.setattr(provenance, "of", lambda folder: {"model.json": "b"})
    run = _run(tmp_path, "F-1")
    args = argparse.Namespace(data="d", judge="j", reports=str(tmp_path))
    file = small_scale.report_file(args, "F-1")
    for _ in range(2):
        small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
    assert len(calls) == 1 and calls[0]["--captions"] == "200"
    for args.judge, count in (("moved", 1), ("other", 2), ("", 3)):
        small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
        assert len(calls) == count
    monkeypatch.setattr(provenance, "of", lambda folder: {"model.json": "trained on"})
    small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
    assert len(calls) == 4

    monkeypatch.setattr(provenance, "of", lambda folder: {"model.json": "b"})
    for point in small_scale.sweep_points():
        small_scale.score(run, small_scale.report_file(args, "F-1", point), args, **point)
    assert len(calls) == 4 + 11  # both sweeps share the usual point
    small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
    assert len(calls) == 4 + 11
    for changed in ({"software": {"jax": "2"}}, {"data": {"files_sha256": "c"}}):
        before, count = {**present}, len(calls)
        present |= changed
        for _ in range(2):
            small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
        assert len(calls) == count + 1
        (name,) = changed
        with pytest.raises(ValueError, match=rf"-w1-n30.json: .*got {name}\."):
            small_scale.gather([run], args)  # the sweeps are of before
        present |= before
    small_scale.score(run, file, args, **small_scale.run_settings("F-1"))
    numbers = small_scale.gather([run], args)
    assert [x["value"] for x in numbers["sweeps"]["guidance"]] == list(small_scale.GUIDANCE)
    assert sorted(x["value"] for x in numbers["sweeps"]["steps"]) == list(small_scale.STEPS)
    (tmp_path / "F-1-w9-n30.json").unlink()
    cut_short = small_scale.gather([run], args)["sweeps"]
    assert cut_short["guidance"] == [] and cut_short["steps"] == numbers["sweeps"]["steps"]
    assert numbers["runs"]["F-1"]["training"]["minutes"] == 2.0
    assert json.loads(small_scale.compact(numbers)) == numbers


@pytest.mark.parametrize(("name", "untrained"), [("D-1", "prompts"), ("E-2", "captions")])
def test_letters_that_do_not_generate_or_caption(name, untrained):
    settings = small_scale.run_settings(name)
    assert [k for k in ("prompts", "captions") if settings[k] == 0] == [untrained]


def test_runs_are_added_to_stored_ones():
    new = {**STORED, "runs": {}, "curves": {}, "sweeps": {"guidance": [], "steps": []}}
    new["runs"] = {"C-9": STORED["runs"]["C-1"], "F-1": STORED["runs"]["F-2"]}
    new["curves"] = dict.fromkeys(new["runs"], STORED["curves"]["C-1"])
    new["sweeps"]["steps"] = [{"run": "F-1", "value": 5, "scores": {}}]
    numbers = small_scale.add_runs(STORED, new)
    assert list(numbers["runs"]) == sorted([*STORED["runs"], "C-9"])
    assert numbers["runs"]["F-1"] == STORED["runs"]["F-2"]
    assert numbers["runs"]["F-3"] == STORED["runs"]["F-3"]
    assert [x["value"] for x in numbers["sweeps"]["steps"] if x["run"] == "F-1"] == [5]
    assert "F-1" not in {x["run"] for x in numbers["sweeps"]["guidance"]}  # it was generated again
    assert list(numbers["curves"]) == list(numbers["runs"])


@pytest.mark.parametrize("what", ["settings", *small_scale.SCORED_WITH])
def test_runs_scored_otherwise_are_not_added(what):
    with pytest.raises(ValueError, match=rf"{what}\.changed: None then, 1 now"):
        small_scale.add_runs(STORED, {**STORED, what: {"changed": 1}})
