"""Measures what fine-tuning on new drawings forgets, with and without replay, on several seeds.

    for seed in 1 2 3; do
      python -m janusflow_jax.train --config=configs/finetune.py:paint,emoji \\
          --config.start=runs/small/F-$seed --config.seed=$seed \\
          --config.workdir=runs/forgetting/without-$seed
      python -m janusflow_jax.train --config=configs/finetune.py:paint,replay,emoji \\
          --config.start=runs/small/F-$seed --config.seed=$seed \\
          --config.workdir=runs/forgetting/replay-$seed
    done
    python experiments/forgetting.py             # scores what is new, then table, plot and pictures
    python experiments/forgetting.py --redraw    # table and plot from the stored numbers

Captions are the suite `emoji`'s, of the fine-tuned runs and of the runs that they started from;
held-out losses are those that the runs measured on their way. Scored once, as in
experiments/small_scale.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import janusflow_jax
from experiments import small_scale, small_scale_tables as tables
from janusflow_jax import cli
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import sheet
from janusflow_jax.openmoji import judge

KINDS = {"without": "without replay", "replay": "with replay"}
SPLITS = {
    "heldout_pairs": "unseen pairs",
    "heldout_views": "unseen views",
    "train": "training pictures",
}
LOSSES = {  # what a fine-tuned run measures on its way
    "replay_understand/loss_ar": "caption loss, unseen pairs",
    "replay_generate/loss_rf": "flow loss, old drawings",
    "mine_generate/loss_rf": "flow loss, new drawings",
}
CAPTIONS = 200
PROMPTS = (  # six of the new drawings, two that the quick start knew
    "a green owl",
    "a red guitar",
    "a purple teacup",
    "a blue penguin",
    "an orange grapes",
    "a yellow castle",
    "a red umbrella",
    "a green tree",
)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    plots = small_scale.import_plots()
    numbers, doc = Path(args.json), Path(args.doc)
    if not args.redraw:
        gathered = gather(args)
        numbers.write_text(small_scale.compact(gathered))
        seed = min(_seed(Path(name)) for name in gathered["settings"])
        paint(args, seed, numbers.with_name(f"{numbers.stem}_sheet.png"))
    found = json.loads(numbers.read_text())
    doc.write_text(fill(doc.read_text(), found))
    file = numbers.with_suffix(".png")
    plots.save(plots.forgetting(found, KINDS, LOSSES), file)
    print(f"{numbers}, {doc} and {file} are written: {', '.join(found['runs'])}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = small_scale.parser_of(__doc__)
    p.add_argument("--runs", default="runs/forgetting", help="folder of the fine-tuned runs")
    p.add_argument("--bases", default="runs/small", help="folder of F-1, F-2, ...")
    p.add_argument("--reports", default="runs/forgetting_reports", help="what was scored")
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--json", default="docs/forgetting.json", help="the plot goes beside it")
    p.add_argument("--doc", default="docs/finetuning.md")
    p.add_argument("--redraw", action="store_true", help="score nothing; draw from --json")
    args = p.parse_args(argv)
    args.judge = judge.START  # nothing is painted, so it is not asked
    return args


# --- numbers


def gather(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers that table and plot show: per seed the run before, and both kinds after.

    Raises:
      JanusFlowError: no run ended; one that did has none beside it or no base, was started
        elsewhere, or measured nothing (lists all); a report was scored otherwise than the others.
    """
    form = re.compile(rf"({'|'.join(KINDS)})-(\d+)")
    named = sorted(x for x in Path(args.runs).glob("*") if form.fullmatch(x.name))
    ended = [x for x in named if small_scale.has_ended(x)]
    for run in (x for x in named if x not in ended):
        print(f"{run}: left out, not trained to its end", flush=True)
    bases = [Path(args.bases) / f"F-{x}" for x in sorted({_seed(run) for run in ended})]
    problems = [
        f"{x}: not there, or not trained to its end" for x in bases if not small_scale.has_ended(x)
    ]
    for run in ended:
        problems += problems_of(run, {x.name for x in ended})
    if not ended or problems:
        raise JanusFlowError(
            f"{args.runs}: expected pairs of ended runs such as without-1 and replay-1, started "
            f"from F-1 in {args.bases}; got {[x.name for x in ended] or 'none'}"
            + "".join(f"\n  - {x}" for x in problems)
        )
    out: dict[str, Any] = {"settings": {}, "runs": {}}
    for run in (*bases, *ended):
        file = Path(args.reports) / f"{run.name}.json"
        small_scale.score(run, file, args, **small_scale.USUAL, prompts=0, captions=CAPTIONS)
        report = small_scale.read_alike(out, file)
        exact = {s: report["captions"][s]["exact"]["constant"]["score"] for s in SPLITS}
        out["runs"][run.name] = {
            "model": report["model"],
            "training": small_scale.training(run),
            "captions": {s: round(x, 5) for s, x in exact.items()},
        }
    for run in ended:
        config = json.loads((run / "config.json").read_text())
        out["runs"][run.name]["curve"] = curve(run)
        out["settings"][run.name] = {
            "start": Path(config["start"]).name,
            "seed": config["seed"],
            "lr": config["optim"]["lr"],
            "ema": config["optim"]["ema"],
        }
    return out


def problems_of(run: Path, ended: set[str]) -> list[str]:
    """Why a run cannot stand in the table."""
    seed, config = _seed(run), json.loads((run / "config.json").read_text())
    others = {f"{kind}-{seed}" for kind in KINDS} - ended
    out = [f"{run.name}: {x} is missing beside it" for x in sorted(others)]
    if f"F-{seed}" not in Path(config["start"]).parts:
        out.append(f"{run.name}: started from {config['start']!r}, not from F-{seed}")
    missing = sorted(set(LOSSES) - set(curve(run)))
    return out + ([f"{run.name}: held-out losses {missing} were not measured"] if missing else [])


def _seed(run: Path) -> str:
    return run.name.rpartition("-")[2]


def curve(run: Path) -> dict[str, list[float]]:
    """Held-out losses by step, of the EMA where the run has one."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    out: dict[str, list[float]] = {"step": []}
    for line in (x for x in lines if all(f"eval/{loss}" in x for loss in LOSSES)):
        out["step"].append(line["step"])
        for loss in LOSSES:
            value = line.get(f"eval_ema/{loss}", line[f"eval/{loss}"])
            out.setdefault(loss, []).append(round(value, 4))
    return out


def paint(args: argparse.Namespace, seed: str, file: Path, num_steps: int = 30) -> None:
    """PROMPTS as a seed's runs paint them: before, without and with replay; the same noise."""
    shown = {"before": Path(args.bases) / f"F-{seed}"}
    shown |= {words: Path(args.runs) / f"{kind}-{seed}" for kind, words in KINDS.items()}
    pictures, labels = [], []
    for words, run in shown.items():
        model = janusflow_jax.load(run)
        pictures += list(model.generate(PROMPTS, guidance_scale=2.0, num_steps=num_steps, seed=0))
        labels += [f"{words}: {prompt}" for prompt in PROMPTS]
    sheet.make_sheet(pictures, labels, columns=len(PROMPTS)).save(file, optimize=True)


# --- the document


def table(found: dict[str, Any]) -> str:
    """Mean and range over seeds, before and after each kind of run."""
    runs = found["runs"]
    rows = [["", "runs", *(f"captions exact, {x}" for x in SPLITS.values()), *LOSSES.values()]]
    for kind, words in {"F": "before", **KINDS}.items():
        here = [x for name, x in runs.items() if name.startswith(f"{kind}-")]
        cells = [tables.spread([x["captions"][s] for x in here], "{:.1%}") for s in SPLITS]
        # what was before is what the runs measured at their first step
        measured = [x["curve"] for x in (runs.values() if kind == "F" else here) if "curve" in x]
        at = 0 if kind == "F" else -1
        cells += [tables.spread([x[loss][at] for x in measured], "{:.3f}") for loss in LOSSES]
        rows.append([words, str(len(here)), *cells])
    return tables.table(rows)


def fill(text: str, found: dict[str, Any]) -> str:
    """The document with its table made anew, between `<!-- forgetting -->` and `<!-- end -->`.

    Raises:
      JanusFlowError: the marker is missing, or there twice.
    """
    made = f"<!-- forgetting -->\n{table(found)}\n<!-- end -->"
    text, count = re.subn(
        r"<!-- forgetting -->\n.*?<!-- end -->", lambda _: made, text, flags=re.DOTALL
    )
    if count != 1:
        raise JanusFlowError(
            "the document: expected one `<!-- forgetting -->` with `<!-- end -->` below it; got "
            f"{count}"
        )
    return text


if __name__ == "__main__":
    cli.run(main)
