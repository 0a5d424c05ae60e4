"""Scores the small-scale runs of the paper's ablations and fills docs/small_scale.md.

    python -m janusflow_jax.train --config=configs/emoji.py:A --config.seed=2 \\
        --config.workdir=runs/small/A-2
    python experiments/small_scale.py --runs runs/small        # score new runs, write all numbers
    python experiments/small_scale.py --runs runs/more --add   # add to the runs of the stored JSON
    python experiments/small_scale.py --redraw                 # tables and plots from the JSON only

A run is a folder `<letter>-<seed>` whose training has ended. Every run is scored once with the
suite `emoji`; F also generates with other guidance scales and step counts. Reports go to
`--reports`. A run is scored again only if the model, the data, the software or a setting changed.
All numbers go to one JSON file, from which tables and plots are drawn.
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

from experiments import small_scale_plots as plots, small_scale_tables as tables
from janusflow_jax import cli, evaluate
from janusflow_jax.checkpoints import model_folder
from janusflow_jax.config import fields
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import provenance
from janusflow_jax.openmoji import judge

GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 9.0)
STEPS = (5, 10, 20, 30, 50)
DEFAULT = {"cfg": 2.0, "steps": 30}
FULL = {"prompts": 96, "captions": 200}
SWEEP_PROMPTS = 48
"""Images of one point of a sweep, beside the sheet's 24."""
SMOOTH = 5
"""Logged steps in the running mean of a curve."""
LOSSES = ("loss_rf", "loss_ar", "loss_repa")
SCORED_WITH = ("software", "data", "judge")
"""What runs of one table must have in common, beside the settings."""
SINGLE_TASK = {"loss_ar": "D", "loss_rf": "E", "loss_repa": "E"}
"""Loss -> the letter that trains it without the other task."""


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    file, doc = Path(args.json), Path(args.doc)
    if not args.redraw:
        runs = [x for x in named_runs(args.runs, r"[A-F]-\d+") if has_ended(x)]
        if not runs:
            raise JanusFlowError(
                f"--runs: expected ended runs such as F-1; got none in {args.runs}"
            )
        for run in runs:
            score(run, report_file(args, run.name), args, **run_settings(run.name))
        for run in (x for x in runs if x.name[0] == "F"):
            for point in sweep_points():
                score(run, report_file(args, run.name, point), args, **point)
        numbers = gather(runs, args)
        if args.add and file.exists():
            numbers = add_runs(json.loads(file.read_text()), numbers)
        file.write_text(compact(numbers))
    numbers = json.loads(file.read_text())
    doc.write_text(tables.fill(doc.read_text(), tables.blocks(numbers)))
    for plot in plots.draw(numbers, doc.parent):
        print(f"{plot}: {plot.stat().st_size / 1000:.0f} KB")
    print(f"wrote {file} and {doc}: {', '.join(numbers['runs'])}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", default="runs/small", help="folder of the runs")
    p.add_argument("--reports", default="runs/small_reports", help="folder of the reports")
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--judge", default=judge.START, help="as evaluate's; '': without")
    p.add_argument("--json", default="docs/small_scale.json", help="all numbers")
    p.add_argument("--doc", default="docs/small_scale.md", help="the plots go beside it")
    p.add_argument("--add", action="store_true", help="keep runs of --json that --runs lacks")
    p.add_argument("--redraw", action="store_true", help="score nothing; draw from --json")
    return p.parse_args(argv)


# --- runs and their settings


def named_runs(folder: str, form: str) -> list[Path]:
    """Runs in a folder whose names match a regular expression, sorted."""
    return sorted(x for x in Path(folder).glob("*") if re.fullmatch(form, x.name))


def has_ended(run: Path) -> bool:
    """Whether a run has saved its last step; prints its folder if not."""
    config = run / "config.json"
    steps = model_folder.committed_steps(run)
    ended = config.exists() and json.loads(config.read_text())["num_steps"] in steps
    if not ended:
        print(f"{run}: skipped, its training has not ended", flush=True)
    return ended


def run_settings(name: str) -> dict[str, Any]:
    """Settings of the suite for a run: D does not generate, E does not caption."""
    untrained = {"D": "prompts", "E": "captions"}.get(name[0])
    return {**DEFAULT, **FULL, **({untrained: 0} if untrained else {})}


def sweep_points() -> Iterator[dict[str, Any]]:
    """Settings of both sweeps; the default ones, which are in both, once."""
    points = [(w, DEFAULT["steps"]) for w in GUIDANCE] + [(DEFAULT["cfg"], n) for n in STEPS]
    for w, n in dict.fromkeys(points):
        yield {"cfg": w, "steps": n, "prompts": SWEEP_PROMPTS, "captions": 0}


def report_file(args: argparse.Namespace, name: str, point: dict[str, Any] | None = None) -> Path:
    suffix = f"-w{point['cfg']:g}-n{point['steps']}" if point else ""
    return Path(args.reports) / f"{name}{suffix}.json"


# --- scoring


def score(run: Path, file: Path, args: argparse.Namespace, **settings: Any) -> None:
    """Writes the report of a run, unless `file` holds it already."""
    settings |= {"data": args.data, "judge": args.judge, "seed": 0}
    if is_current(file, run, settings):
        return
    print(f"--- {file}", flush=True)
    names = {key: f"--{key}" for key in settings} | {"cfg": "--guidance-scale"}
    options = [x for key, value in settings.items() for x in (names[key], str(value))]
    evaluate.main(["--model", str(run), "--suite", "emoji", "--out", str(file), *options])


def is_current(file: Path, run: Path, settings: dict[str, Any]) -> bool:
    """Whether a report holds what these settings would give with the present software.

    Folders may have moved: model, data and judge are identified by their checksums.
    """
    if not file.exists():
        return False
    report = json.loads(file.read_text())
    with_judge = settings["judge"] and settings["prompts"]
    sha256 = judge.load(settings["judge"]).sha256 if with_judge else ""
    rest = {k: v for k, v in settings.items() if k not in ("data", "judge")}
    return (
        report["model"] == provenance.of(provenance.resolve(run))
        and report.get("judge", {}).get("weights_sha256", "") == sha256
        and report.get("data") == data_checksums(settings["data"])
        and report.get("software") == provenance.software()
        and rest.items() <= report["settings"].items()
    )


@functools.cache
def data_checksums(path: str) -> dict[str, str]:
    """`provenance.of_data`, read once."""
    return provenance.of_data(path)


# --- all numbers


def gather(runs: Sequence[Path], args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of tables and plots.

    Raises:
      JanusFlowError: reports of different software, data or judge.
    """
    out: dict[str, Any] = {
        "settings": {**DEFAULT, **FULL, "sweep_prompts": SWEEP_PROMPTS, "smooth": SMOOTH},
        "runs": {},
        "curves": {},
        "sweeps": {"guidance": [], "steps": []},
    }
    for run in runs:
        report = read_report(report_file(args, run.name), out)
        out["runs"][run.name] = {
            "scores": tables.scores(report),
            "model": report["model"],
            "training": training(run),
        }
        out["curves"][run.name] = curve(run)
        if run.name[0] == "F":
            add_sweeps(out, run.name, args)
    return out


def read_report(file: Path, numbers: dict[str, Any]) -> dict[str, Any]:
    """Reads a report. The first one sets in `numbers` what the others must agree with.

    Raises:
      JanusFlowError: scored with other software, data or judge, so its numbers do not compare.
    """
    report = json.loads(file.read_text())
    own = {name: report[name] for name in SCORED_WITH if name in report}
    for name, value in own.items():
        numbers.setdefault(name, value)
    check_alike(str(file), {name: numbers[name] for name in own}, own)
    return report


def check_alike(where: str, others: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises JanusFlowError if runs were not scored in the same way."""
    if lines := fields.differences(others, own):
        raise JanusFlowError(
            f"{where}: expected runs scored in the same way; got {'; '.join(lines)}: score all "
            "runs again, without --add and --redraw"
        )


def add_sweeps(numbers: dict[str, Any], name: str, args: argparse.Namespace) -> None:
    """Adds a run's points to each sweep, if the run has all of them.

    So every point of a sweep is a mean over the same runs.
    """
    for sweep, key, other in (("guidance", "cfg", "steps"), ("steps", "steps", "cfg")):
        points = [x for x in sweep_points() if x[other] == DEFAULT[other]]
        files = [report_file(args, name, x) for x in points]
        if not all(x.exists() for x in files):
            continue
        for point, file in zip(points, files, strict=True):
            scores = tables.scores(read_report(file, numbers))
            numbers["sweeps"][sweep].append({"run": name, "value": point[key], "scores": scores})


def add_runs(stored: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new numbers, and the stored ones of other runs.

    Raises:
      JanusFlowError: they were scored differently, so they do not compare.
    """
    both = [n for n in ("settings", *SCORED_WITH) if n in stored and n in new]
    check_alike("--add", {n: stored[n] for n in both}, {n: new[n] for n in both})
    out = {**stored, **new}
    for part in ("runs", "curves"):
        out[part] = dict(sorted({**stored[part], **new[part]}.items()))
    out["sweeps"] = {}
    for sweep, points in new["sweeps"].items():
        old = [x for x in stored["sweeps"][sweep] if x["run"] not in new["runs"]]
        out["sweeps"][sweep] = sorted(old + points, key=lambda x: x["run"])
    return out


def training(run: Path) -> dict[str, Any]:
    """Steps, and minutes of wall time, all attempts together."""
    attempts = json.loads((run / "attempts.json").read_text())
    seconds = sum(x["alive"] - x["began"] for x in attempts)
    config = json.loads((run / "config.json").read_text())
    return {
        "steps": config["num_steps"],
        "batch_rows": config["batch_rows"],
        "minutes": round(seconds / 60, 1),
    }


def curve(run: Path) -> dict[str, list[float]]:
    """Losses by step, running means over SMOOTH logged steps; only losses that were trained."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [x for x in lines if all(loss in x for loss in LOSSES)]
    letter = run.name[0]
    out = {"step": [x["step"] for x in lines][SMOOTH - 1 :]}
    for loss in LOSSES:
        trained = letter not in "DE" or SINGLE_TASK[loss] == letter
        if not trained or (loss == "loss_repa" and letter == "A"):
            continue
        values = [x[loss] for x in lines]
        windows = [values[i : i + SMOOTH] for i in range(len(values) - SMOOTH + 1)]
        out[loss] = [round(sum(x) / SMOOTH, 4) for x in windows]
    return out


def compact(numbers: dict[str, Any]) -> str:
    """JSON with short lists on one line, so that one more run adds few lines."""
    text = json.dumps(numbers, indent=1, allow_nan=False)
    return re.sub(r"\[[^\[\]{}]*\]", lambda m: re.sub(r"\s+", " ", m[0]), text) + "\n"


if __name__ == "__main__":
    cli.run(main)
