"""Scores the small-scale runs of the paper's comparisons, and writes docs/small_scale.md's numbers.

    python -m janusflow_jax.train --config=configs/emoji.py:A --config.seed=2 \\
        --config.workdir=runs/small/A-2
    python experiments/small_scale.py --runs runs/small  # scores what is new, then writes all anew
    python experiments/small_scale.py --runs runs/more --add  # beside the runs that the JSON has
    python experiments/small_scale.py --redraw  # tables and plots from the stored numbers

A run is a folder `<letter>-<seed>` that has ended. Every run is scored once with the suite `emoji`;
F is also painted with at other guidance and step counts. What was scored is kept in `--reports` and
scored again only where the model, the data, JAX or a setting changed. The numbers of all go to one
JSON; tables and plots are drawn from that alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import small_scale_tables as tables
from janusflow_jax import cli, evaluate
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import provenance
from janusflow_jax.openmoji import judge

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 9.0)
STEPS = (5, 10, 20, 30, 50)
USUAL = {"cfg": 2.0, "steps": 30}
WHOLE = {"prompts": 96, "captions": 200}
SWEEP_PROMPTS = 48
"""Pictures of a point of a sweep, the sheet's 24 apart."""
SMOOTH = 5
"""Logged steps that a point of a curve is the mean of."""
LOSSES = ("loss_rf", "loss_ar", "loss_repa")
SCORED_WITH = ("software", "data", "judge")
LIKE = ("settings", *SCORED_WITH)
"""What runs must have been scored with alike to stand in one table."""
OF_TASK = {"loss_ar": "D", "loss_rf": "E", "loss_repa": "E"}  # the one single task that has it


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    plots = import_plots()  # before minutes of scoring
    numbers, doc = Path(args.json), Path(args.doc)
    if not args.redraw:
        runs = ended_runs(Path(args.runs))
        for run in runs:
            score(run, report_file(args, run.name), args, **asked(run.name))
        for run in (x for x in runs if x.name[0] == "F"):
            for point in sweep_points():
                score(run, report_file(args, run.name, point), args, **point)
        found = gather(runs, args)
        if args.add and numbers.exists():
            found = added(json.loads(numbers.read_text()), found)
        numbers.write_text(compact(found))
    found = json.loads(numbers.read_text())
    doc.write_text(tables.fill(doc.read_text(), found))
    for file in plots.draw(found, doc.parent):
        print(f"{file}: {file.stat().st_size / 1000:.0f} KB")
    print(f"{numbers} and {doc} are written: {', '.join(found['runs'])}")


def import_plots() -> Any:
    """The module that draws. Raises ImportError where matplotlib is missing."""
    try:
        from experiments import small_scale_plots
    except ImportError as error:
        raise ImportError(f"plots need matplotlib (pip install -e '.[plots]'): {error}") from error
    return small_scale_plots


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a module's docstring as it stands, its first line apart."""
    return argparse.ArgumentParser(
        description=(doc or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser_of(__doc__)
    p.add_argument("--runs", default="runs/small", help="folder of the runs")
    p.add_argument("--reports", default="runs/small_reports", help="what was scored, one JSON each")
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--judge", default=judge.START, help="as evaluate's; '': without")
    p.add_argument("--json", default="docs/small_scale.json")
    p.add_argument("--doc", default="docs/small_scale.md", help="the plots go beside it")
    p.add_argument("--add", action="store_true", help="keep the runs of --json that --runs lacks")
    p.add_argument("--redraw", action="store_true", help="score nothing; draw from --json")
    return p.parse_args(argv)


# --- what is scored


def ended_runs(folder: Path) -> list[Path]:
    """Runs `<letter>-<seed>` that trained to their end, sorted.

    Raises:
      JanusFlowError: there is none.
    """
    named = sorted(x for x in folder.glob("*") if re.fullmatch(r"[A-F]-\d+", x.name))
    ended = [x for x in named if has_ended(x)]
    for run in (x for x in named if x not in ended):
        print(f"{run}: left out, not trained to its end", flush=True)
    if not ended:
        raise JanusFlowError(
            f"{folder}: expected folders such as F-1 of runs that ended; got "
            f"{[x.name for x in named] or 'none'}: train them, or give --runs"
        )
    return ended


def has_ended(run: Path) -> bool:
    """Whether a run has saved its last step."""
    config = run / "config.json"
    steps = model_folder.committed_steps(run)
    return config.exists() and json.loads(config.read_text())["num_steps"] in steps


def asked(name: str) -> dict[str, Any]:
    """What the suite is asked of a run: D was not taught to paint, nor E to describe."""
    untaught = {"D": "prompts", "E": "captions"}.get(name[0])
    return {**USUAL, **WHOLE, **({untaught: 0} if untaught else {})}


def sweep_points() -> Iterator[dict[str, Any]]:
    """Settings of both sweeps; the usual ones, which are in both, once."""
    points = [(w, USUAL["steps"]) for w in GUIDANCE] + [(USUAL["cfg"], n) for n in STEPS]
    for w, n in dict.fromkeys(points):
        yield {"cfg": w, "steps": n, "prompts": SWEEP_PROMPTS, "captions": 0}


def report_file(args: argparse.Namespace, name: str, point: dict[str, Any] | None = None) -> Path:
    suffix = f"-w{point['cfg']:g}-n{point['steps']}" if point else ""
    return Path(args.reports) / f"{name}{suffix}.json"


def score(run: Path, file: Path, args: argparse.Namespace, **settings: Any) -> None:
    """Writes a report, if the one that is there is not of this model, data and software, and these
    settings."""
    settings |= {"data": args.data, "judge": args.judge, "seed": 0}
    referee = judge.load(args.judge).sha256 if args.judge and settings["prompts"] else ""
    if is_current(file, run, settings, referee, data_of(args.data)):
        return
    print(f"--- {file}", flush=True)
    options = [x for key, value in settings.items() for x in (f"--{key}", str(value))]
    evaluate.main(["--model", str(run), "--out", str(file), *options])


@functools.cache
def data_of(path: str) -> dict[str, str]:
    """`provenance.of_data`, read once."""
    return provenance.of_data(path)


def is_current(
    file: Path, run: Path, settings: dict[str, Any], referee: str, data: dict[str, str]
) -> bool:
    """Whether a report holds what these settings would give, by the judge of this checksum, on this
    data and software.

    Folders may have moved: model, data and judge are known by their checksums.
    """
    if not file.exists():
        return False
    report = json.loads(file.read_text())
    same = {k: v for k, v in settings.items() if k not in ("data", "judge")}
    return (
        report["model"] == provenance.of(provenance.resolve(run))
        and report.get("judge", {}).get("weights_sha256", "") == referee
        and report.get("data") == data
        and report.get("software") == provenance.software()
        and same.items() <= report["settings"].items()
    )


# --- all in one


def gather(runs: Sequence[Path], args: argparse.Namespace) -> dict[str, Any]:
    """All numbers that tables and plots show.

    Raises:
      JanusFlowError: a report was scored with another software, data or judge than those before it.
    """
    out: dict[str, Any] = {
        "settings": {**USUAL, **WHOLE, "sweep_prompts": SWEEP_PROMPTS, "smooth": SMOOTH},
        "runs": {},
        "curves": {},
        "sweeps": {"guidance": [], "steps": []},
    }
    for run in runs:
        report = read_alike(out, report_file(args, run.name))
        out["runs"][run.name] = {
            "scores": tables.scores(report),
            "model": report["model"],
            "training": training(run),
        }
        out["curves"][run.name] = curve(run)
        if run.name[0] == "F":
            add_sweeps(out, run.name, args)
    return out


def read_alike(found: dict[str, Any], file: Path) -> dict[str, Any]:
    """A report that was scored as those before it; what it was scored with goes into `found`.

    Raises:
      JanusFlowError: it was scored otherwise, so its numbers do not compare.
    """
    report = json.loads(file.read_text())
    given = {name: report[name] for name in SCORED_WITH if name in report}
    if other := [n for n in given if found.setdefault(n, given[n]) != given[n]]:
        raise JanusFlowError(
            f"{file}: expected a report scored as the others were; got "
            + "; ".join(f"{n} {given[n]}, theirs {found[n]}" for n in other)
            + ": run this again, which scores anew what differs from what is here"
        )
    return report


def add_sweeps(found: dict[str, Any], name: str, args: argparse.Namespace) -> None:
    """Adds a run's points to each sweep; a run that was not painted at all of a sweep's points is
    left out of it, so that its points are means of the same runs."""
    for sweep, key, other in (("guidance", "cfg", "steps"), ("steps", "steps", "cfg")):
        points = [x for x in sweep_points() if x[other] == USUAL[other]]
        files = [report_file(args, name, x) for x in points]
        if not all(x.exists() for x in files):
            continue
        for point, file in zip(points, files, strict=True):
            scores = tables.scores(read_alike(found, file))
            found["sweeps"][sweep].append({"run": name, "value": point[key], "scores": scores})


def added(stored: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """`found`, and of `stored` the runs that it lacks.

    Raises:
      JanusFlowError: they were not scored alike, so their numbers do not compare.
    """
    other = [n for n in LIKE if n in stored and n in found and stored[n] != found[n]]
    if other:
        raise JanusFlowError(
            "--add: expected runs scored as the stored ones were; got "
            + "; ".join(f"{n} {found[n]}, stored {stored[n]}" for n in other)
            + ": score all runs anew, without --add"
        )
    out = {**stored, **found}
    for part in ("runs", "curves"):
        out[part] = dict(sorted({**stored[part], **found[part]}.items()))
    out["sweeps"] = {}
    for sweep, points in found["sweeps"].items():
        kept = [x for x in stored["sweeps"][sweep] if x["run"] not in found["runs"]]
        out["sweeps"][sweep] = sorted(kept + points, key=lambda x: x["run"])
    return out


def training(run: Path) -> dict[str, Any]:
    """Steps, and minutes by the clock from start to end, all attempts together."""
    attempts = json.loads((run / "attempts.json").read_text())
    seconds = sum(x["alive"] - x["began"] for x in attempts)
    config = json.loads((run / "config.json").read_text())
    return {
        "steps": config["num_steps"],
        "batch_rows": config["batch_rows"],
        "minutes": round(seconds / 60, 1),
    }


def curve(run: Path) -> dict[str, list[float]]:
    """Losses by step, running means of SMOOTH logged steps; only those of what was trained."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [x for x in lines if all(loss in x for loss in LOSSES)]
    letter = run.name[0]
    out = {"step": [x["step"] for x in lines][SMOOTH - 1 :]}
    for loss in LOSSES:
        alone = letter not in "DE" or OF_TASK[loss] == letter
        if not alone or (loss == "loss_repa" and letter == "A"):
            continue
        values = [x[loss] for x in lines]
        windows = [values[i : i + SMOOTH] for i in range(len(values) - SMOOTH + 1)]
        out[loss] = [round(sum(x) / SMOOTH, 4) for x in windows]
    return out


def compact(found: dict[str, Any]) -> str:
    """JSON with short lists on one line: small, and a run more is a few lines more."""
    text = json.dumps(found, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


if __name__ == "__main__":
    cli.run(main)
