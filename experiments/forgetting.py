"""Measures what fine-tuning on new drawings forgets, with and without replay, on several seeds.

    for seed in 1 2 3; do
      python -m janusflow_jax.train --config=configs/finetune.py:generate,emoji \\
          --config.start=runs/small/F-$seed --config.seed=$seed \\
          --config.workdir=runs/forgetting/without-$seed
      python -m janusflow_jax.train --config=configs/finetune.py:generate,replay,emoji \\
          --config.start=runs/small/F-$seed --config.seed=$seed \\
          --config.workdir=runs/forgetting/replay-$seed
    done
    python experiments/forgetting.py             # score new runs, write numbers, plot and images
    python experiments/forgetting.py --redraw    # table and plot from the stored numbers only

Captions are those of the suite `emoji`, for the fine-tuned runs and the runs that they started
from. Held-out losses are those that the runs measured. A run is scored once, as in
experiments/small_scale.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import janusflow_jax
from experiments import small_scale, small_scale_plots as plots, small_scale_tables as tables
from janusflow_jax import cli
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.eval import sheet
from janusflow_jax.openmoji import judge

KINDS = {"without": "without replay", "replay": "with replay"}
SPLITS = {
    "heldout_pairs": "unseen pairs",
    "heldout_views": "unseen views",
    "train": "training images",
}
LOSSES = {  # metric of a fine-tuning run -> its name in table and plot
    "replay_understand/loss_ar": "caption loss, unseen pairs",
    "replay_generate/loss_rf": "flow loss, old drawings",
    "mine_generate/loss_rf": "flow loss, new drawings",
}
CAPTIONS = 200
PROMPTS = (  # six of the new drawings, two of the quick start's
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
    file, doc = Path(args.json), Path(args.doc)
    if not args.redraw:
        numbers = gather(args)
        file.write_text(small_scale.compact(numbers))
        seed = min(name.rpartition("-")[2] for name in numbers["settings"])
        draw_sheet(args, seed, file.with_name(f"{file.stem}_sheet.png"))
    numbers = json.loads(file.read_text())
    doc.write_text(tables.fill(doc.read_text(), {"forgetting": table(numbers)}))
    plot = file.with_suffix(".png")
    plots.save(plots.forgetting(numbers, KINDS, LOSSES), plot)
    print(f"wrote {file}, {doc} and {plot}: {', '.join(numbers['runs'])}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--runs", default="runs/forgetting", help="folder of the fine-tuned runs")
    p.add_argument("--bases", default="runs/small", help="folder of F-1, F-2, ...")
    p.add_argument("--reports", default="runs/forgetting_reports", help="folder of the reports")
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--json", default="docs/forgetting.json", help="all numbers; plot beside it")
    p.add_argument("--doc", default="docs/finetuning.md")
    p.add_argument("--redraw", action="store_true", help="score nothing; draw from --json")
    args = p.parse_args(argv)
    args.judge = judge.START  # not used: nothing is generated
    return args


# --- numbers


def gather(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers of table and plot: for every seed the run before and both kinds after.

    Raises:
      JanusFlowError: no seed whose three runs have ended; a run that started elsewhere; reports
        that do not compare.
    """
    runs = small_scale.named_runs(args.runs, rf"({'|'.join(KINDS)})-(\d+)")
    groups = {
        seed: [Path(args.bases) / f"F-{seed}", *(Path(args.runs) / f"{k}-{seed}" for k in KINDS)]
        for seed in sorted({x.name.rpartition("-")[2] for x in runs})
    }
    groups = {s: group for s, group in groups.items() if all(map(small_scale.has_ended, group))}
    if not groups:
        raise JanusFlowError(
            f"--runs, --bases: expected ended runs such as without-1, replay-1 and F-1; got no "
            f"seed with all three in {args.runs} and {args.bases}"
        )
    out: dict[str, Any] = {"settings": {}, "runs": {}}
    for base, *tuned in groups.values():
        for run in tuned:
            config = json.loads((run / "config.json").read_text())
            if base.name not in Path(config["start"]).parts:
                raise JanusFlowError(f"{run}: expected start {base}; got {config['start']!r}")
            if not curve(run)["step"]:
                raise JanusFlowError(f"{run}: expected held-out losses in metrics.jsonl; got none")
            out["settings"][run.name] = {
                "start": base.name,
                "seed": config["seed"],
                "lr": config["optim"]["lr"],
                "ema": config["optim"]["ema"],
            }
    for run in sorted((x for group in groups.values() for x in group), key=lambda x: x.name):
        file = Path(args.reports) / f"{run.name}.json"
        settings = {**small_scale.DEFAULT, "prompts": 0, "captions": CAPTIONS}
        small_scale.score(run, file, args, **settings)
        report = small_scale.read_report(file, out)
        exact = {s: report["captions"][s]["exact"]["constant"]["score"] for s in SPLITS}
        out["runs"][run.name] = {
            "model": report["model"],
            "training": small_scale.training(run),
            "captions": {s: round(x, 5) for s, x in exact.items()},
        }
        if run.name in out["settings"]:
            out["runs"][run.name]["curve"] = curve(run)
    return out


def curve(run: Path) -> dict[str, list[float]]:
    """Held-out losses by step, of the EMA if the run has one."""
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    out: dict[str, list[float]] = {"step": []}
    for line in (x for x in lines if all(f"eval/{loss}" in x for loss in LOSSES)):
        out["step"].append(line["step"])
        for loss in LOSSES:
            value = line.get(f"eval_ema/{loss}", line[f"eval/{loss}"])
            out.setdefault(loss, []).append(round(value, 4))
    return out


def draw_sheet(args: argparse.Namespace, seed: str, file: Path, num_steps: int = 30) -> None:
    """Generates PROMPTS with the runs of a seed: before, without and with replay; same noise."""
    runs = {"before": Path(args.bases) / f"F-{seed}"}
    runs |= {words: Path(args.runs) / f"{kind}-{seed}" for kind, words in KINDS.items()}
    images, labels = [], []
    for words, run in runs.items():
        model = janusflow_jax.load(run)
        images += list(model.generate(PROMPTS, guidance_scale=2.0, num_steps=num_steps, seed=0))
        labels += [f"{words}: {prompt}" for prompt in PROMPTS]
    sheet.image_grid(images, labels, columns=len(PROMPTS)).save(file, optimize=True)


def table(numbers: dict[str, Any]) -> str:
    """Mean and range over seeds, before and after each kind of run."""
    rows = [["", "runs", *(f"captions exact, {x}" for x in SPLITS.values()), *LOSSES.values()]]
    for kind, words in {"F": "before", **KINDS}.items():
        runs = [x for name, x in numbers["runs"].items() if name.startswith(f"{kind}-")]
        cells = [tables.spread([x["captions"][s] for x in runs], "{:.1%}") for s in SPLITS]
        # the losses before are those that the fine-tuned runs measured at their first step
        measured, at = (numbers["runs"].values(), 0) if kind == "F" else (runs, -1)
        curves = [x["curve"] for x in measured if "curve" in x]
        cells += [tables.spread([x[loss][at] for x in curves], "{:.3f}") for loss in LOSSES]
        rows.append([words, str(len(runs)), *cells])
    return tables.table(rows)


if __name__ == "__main__":
    cli.run(main)
