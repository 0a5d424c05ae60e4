"""Scores a model: `python -m janusflow_jax.evaluate --model runs/emoji --out eval.json`.

Suite `emoji`: the quick start's 24 sheet prompts and more trained pairs are painted and scored by
hue, by retrieval of the right drawing, and in the feature space of the project's own judge
(alignment with the prompt, Frechet distance from drawings: neither CLIP score nor FID); pictures of
every split are captioned. Every score stands beside its baseline, with a 95 % interval of the
difference where items can be paired.

Suite `losses`: the held-out losses that a run of `--config` measures on its way, of any model.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from janusflow_jax import cli, config as config_lib, pipeline
from janusflow_jax.config import SourceConfig
from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.data import images, sources
from janusflow_jax.eval import losses as eval_losses, previews, provenance, sheet
from janusflow_jax.openmoji import (
    judge,
    judged,
    prompts as openmoji_prompts,
    ready,
    scores as emoji,
)
from janusflow_jax.sampling import inputs

CAPTION_SPLITS = ("heldout_pairs", "heldout_views", "train")
HUE_WANTED = 16
"""Sheet pictures (of 24) whose hue must be right."""
_MORE_SEED = 1000  # the extra prompts' noise is no sheet prompt's


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.parser(
        "evaluate",
        "Paints and captions with a model, and scores both against baselines.",
        "The same model, data and options give the same report, times apart.",
    )
    p.add_argument("--suite", choices=("emoji", "losses"), default="emoji")
    p.add_argument(
        "--config", default="", help="suite losses: whose held-out sources, as in training"
    )
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--out", default="eval.json", help="the report; the sheet goes beside it (.png)")
    p.add_argument(
        "--judge", default=judge.START, help="from experiments/starts/train_judge.py; '': without"
    )
    p.add_argument(
        "--prompts",
        type=int,
        default=96,
        help="trained pairs to paint, sheet apart; 0: no painting; below 4: no Frechet distance",
    )
    p.add_argument(
        "--captions", type=int, default=200, help="pictures to caption of every split; 0: none"
    )
    p.add_argument("--cfg", type=float, default=2.0, help="guidance weight; 1 is none")
    p.add_argument("--steps", type=int, default=30, help="Euler steps")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    began = time.time()
    out = cli.check_writable(args.out, "--out")
    if args.suite == "losses":
        report = losses(args)
    else:
        report = suite(args, sheet_beside(out) if args.prompts else None)
    report["seconds"] = round(time.time() - began, 1)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(f"{report['seconds']:.0f} s (compilation included); the report: {out}")


def sheet_beside(out: pathlib.Path) -> pathlib.Path:
    """Where the sheet of a report goes.

    Raises:
      JanusFlowError: it would be the report itself, or cannot be written.
    """
    file = out.with_suffix(".png")
    if file == out:
        raise JanusFlowError(
            f"--out: expected the report's file, such as eval.json; got {str(out)!r}, which would "
            "be the sheet's"
        )
    return cli.check_writable(str(file), "--out (the sheet)")


def losses(args: argparse.Namespace) -> dict[str, Any]:
    """The report of suite `losses`."""
    cfg = eval_losses.read_config(args.config)
    folder = provenance.resolve(args.model)
    found = eval_losses.measure(str(folder), cfg, args.weights, args.dtype, args.adapter)
    print("\n".join(f"{name}: {value:.4f}" for name, value in found.items()))
    kept = ("suite", "config", "weights", "dtype", "adapter")
    return {
        "settings": {**{k: getattr(args, k) for k in kept}, "model": str(folder)},
        "evaluate": config_lib.to_dict(cfg.evaluate),
        "model": provenance.of(folder, args.adapter),
        # not the records: they may be terabytes
        "data": {
            s.path: {
                "dataset_info_sha256": provenance.sha256(epath.Path(s.path) / "dataset_info.json")
            }
            for s in cfg.evaluate.sources
        },
        "software": provenance.software(),
        "losses": found,
    }


def suite(args: argparse.Namespace, sheet_file: pathlib.Path | None) -> dict[str, Any]:
    """The report of suite `emoji`; the sheet goes to a file where anything is painted."""
    referee = judge.load(args.judge) if args.judge and args.prompts else None
    folder = provenance.resolve(args.model)
    model = pipeline.load(
        str(folder), dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    report: dict[str, Any] = {
        "settings": {**vars(args), "model": str(folder)},
        "model": provenance.of(folder, args.adapter),
        "data": provenance.of_data(args.data),
        "software": provenance.software(),
    }
    if referee:
        report["judge"] = {"weights_sha256": referee.sha256, "accuracy": referee.about["accuracy"]}
    if args.captions:
        ready.check_captions(model, args.data, CAPTION_SPLITS, args.captions)
    if args.prompts:
        report |= paint(model, args, referee, sheet_file)
    if args.captions:
        report["captions"] = {
            split: captioning(model, args.data, split, args.captions) for split in CAPTION_SPLITS
        }
    report["verdicts"] = verdicts(report)
    print(table(report["verdicts"]))
    return report


def check(args: argparse.Namespace) -> None:
    """Raises JanusFlowError for options that leave nothing to compare, or a seed out of range."""
    if args.suite == "losses":
        if not args.config or args.int8:
            raise JanusFlowError("expected --config with --suite losses, and no --int8")
        return
    if min(args.prompts, args.captions) < 0 or 1 in (args.prompts, args.captions):
        raise JanusFlowError(
            "expected --prompts and --captions of 2 or more (scores compare items with each "
            f"other), or 0; got {args.prompts} and {args.captions}"
        )
    if not (args.prompts or args.captions):
        raise JanusFlowError("expected --prompts or --captions; got 0 of both: nothing to score")
    for first in (args.seed, args.seed + _MORE_SEED):
        inputs.picture_seeds(first, max(args.prompts, len(openmoji_prompts.PROMPTS)), 1)


# --- the parts of the suite


@dataclasses.dataclass(frozen=True)
class References:
    """What painted pictures are held against."""

    gallery: emoji.Gallery  # a drawing of every (class, colour) pair
    trained: list[emoji.Label]  # the pairs that are trained, sorted
    drawn: judged.Drawn


@functools.cache
def references(path: str) -> References:
    """The reference drawings of a prepared data set, read once."""
    pictures, labels = [], []
    views: dict[emoji.Label, list[np.ndarray]] = {}
    trained, unseen = set(), {}
    for split in ("train", "heldout_pairs", "heldout_views"):
        source = sources.open_source(path, split)
        for i in range(len(source)):
            record = source[i]
            label = emoji.Label(record["class"], record["colour"])
            picture = images.decode(record["image"])
            if split == "heldout_views":
                unseen.setdefault(label, picture)
                continue
            pictures.append(picture)
            labels.append(label)
            views.setdefault(label, []).append(picture)
            if split == "train":
                trained.add(label)
    by_name = sorted(trained, key=lambda x: (x.name, x.colour))
    gallery = emoji.make_gallery(pictures, labels)
    return References(gallery, by_name, judged.Drawn(views, unseen))


def paint(
    model: pipeline.JanusFlowPipeline, args: argparse.Namespace, referee: Any, sheet_file: Any
) -> dict[str, Any]:
    """Paints the sheet and more trained pairs, and scores both: `sheet` and `trained_pairs`."""
    refs = references(args.data)
    settings = {"cfg_weight": args.cfg, "num_steps": args.steps, "output": "numpy"}
    sheet_labels = [emoji.Label(name, colour) for colour, name, _ in openmoji_prompts.SHEET]
    more = pick(refs.trained, args.prompts, args.seed, leave_out=sheet_labels)
    ready.check_painting(model, sheet_labels, more, refs.gallery, refs.drawn, referee)
    no_distance = judged.too_few(more, refs.drawn) if referee else ""
    if no_distance:
        print(f"no Frechet distance: {no_distance}", flush=True)
    pictures = model.generate(list(openmoji_prompts.PROMPTS), seed=args.seed, **settings)
    sheet.make_sheet(list(pictures), openmoji_prompts.PROMPTS).save(sheet_file)
    print(f"the sheet: {sheet_file}", flush=True)
    prompts = [openmoji_prompts.caption(x.colour, x.name) for x in more]
    painted = model.generate(prompts, seed=args.seed + _MORE_SEED, **settings)
    out = {
        "sheet": painting(pictures, sheet_labels, refs.gallery),
        "trained_pairs": painting(painted, more, refs.gallery),
    }
    for picture, (colour, name, seen) in zip(
        out["sheet"]["pictures"], openmoji_prompts.SHEET, strict=True
    ):
        picture |= {"prompt": openmoji_prompts.caption(colour, name), "trained": seen}
    for picture, prompt in zip(out["trained_pairs"]["pictures"], prompts, strict=True):
        picture["prompt"] = prompt
    if referee:
        for part, shown, labels in (
            ("sheet", pictures, sheet_labels),
            ("trained_pairs", painted, more),
        ):
            out[part]["alignment"] = judged.alignment(referee, list(shown), labels, refs.drawn)
        out["trained_pairs"] |= (
            {"frechet_left_out": no_distance}
            if no_distance
            else {"frechet": judged.frechet_distance(referee, list(painted), more, refs.drawn)}
        )
    return out


def pick(
    trained: Sequence[emoji.Label], count: int, seed: int, leave_out: Sequence[emoji.Label]
) -> list[emoji.Label]:
    """Trained pairs drawn without repetition, those of the sheet left out."""
    left = [x for x in trained if x not in set(leave_out)]
    order = np.random.default_rng(seed).permutation(len(left))
    return [left[i] for i in order[:count]]


def painting(
    pictures: np.ndarray, labels: Sequence[emoji.Label], gallery: emoji.Gallery
) -> dict[str, Any]:
    """Hue and retrieval of uint8[N, H, W, 3], what is per picture gathered in `pictures`."""
    hue = emoji.score_hues(list(pictures), labels)
    retrieval = emoji.score_retrieval(list(pictures), labels, gallery)
    each = zip(hue.pop("hues"), hue.pop("right_each"), retrieval.pop("ranks"), strict=True)
    rows = [{"hue": h, "hue_right": right, "rank": rank} for h, right, rank in each]
    return {"hue": hue, "retrieval": retrieval, "pictures": rows}


def captioning(
    model: pipeline.JanusFlowPipeline, path: str, split: str, count: int
) -> dict[str, Any]:
    """Captions `count` pictures of a split and scores them; the answers stand in `answers`."""
    source = SourceConfig(name=split, path=path, split=split, task="understand", format="chat")
    said = previews.caption_source(model, source, count)
    scores = emoji.score_captions(
        [x["answer"] for x in said],
        [x["captions"] for x in said],
        [emoji.Label(x["class"], x["colour"]) for x in said],
    )
    return {**scores, "answers": [{"id": x["id"], "answer": x["answer"]} for x in said]}


# --- to read


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a claim: what, result, comparison (where there is one) and whether it holds."""
    lines: list[dict[str, Any]] = []

    def add(what: str, result: str, compared: dict[str, Any]) -> None:
        lines.append({"what": what, "result": result, **compared, "holds": compared["beats"]})

    if "sheet" in report:
        hue = report["sheet"]["hue"]
        unseen = [x["hue_right"] for x in report["sheet"]["pictures"] if not x["trained"]]
        lines.append(
            {
                "what": f"sheet: hue within {emoji.HUE_TOLERANCE:.0f} degrees, {HUE_WANTED} wanted",
                "result": f"{hue['right']}/{hue['of']} (untrained pairs {sum(unseen)}/"
                f"{len(unseen)})",
                "holds": hue["right"] >= HUE_WANTED,
            }
        )
    for part in (x for x in ("sheet", "trained_pairs") if x in report):
        hue, found = report[part]["hue"], report[part]["retrieval"]
        name = part.replace("_", " ")
        add(f"{name}: hue, against shuffled prompts", f"{hue['right']}/{hue['of']}", hue["within"])
        tops = f"top1 {found['top1']}, top5 {found['top5']} of {found['of']}"
        what = f"{name}: drawing among {found['candidates']}, against shuffled, "
        add(what + "reciprocal rank", tops, found["reciprocal_rank"])
        median = f"median rank {found['median_rank']:g}"
        add(what + "percentile", median, found["percentile"])
        if "alignment" in report[part]:
            fits = report[part]["alignment"]
            top = f"top1 {fits['top1']}/{fits['of']} (drawings {fits['drawn_top1']})"
            add(f"{name}: judge's alignment, against shuffled prompts", top, fits["likeness"])
            what = f"{name}: judge's alignment, against other classes in the prompt's colour"
            add(
                what,
                f"median rank {fits['median_rank']:g} of {fits['candidates']}",
                fits["in_colour"],
            )
        if "frechet" in report[part]:
            lines.append(_apart(name, report[part]["frechet"]))
    for split, scores in report.get("captions", {}).items():
        for kind in emoji.KINDS:
            for baseline in ("constant", "shuffled"):
                add(
                    f"captions {split.replace('_', ' ')}: {kind}, against {baseline}",
                    f"{scores[kind]['right']}/{scores['of']}",
                    scores[kind][baseline],
                )
    return lines


def _apart(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Distances have no pairs to compare: painted pictures must be nearer to the drawings of their
    prompts than noise is. Beside it: what an unseen view of the same drawings gets, and drawings of
    other prompts, which nothing painted at this size comes near to."""
    return {
        "what": f"{name}: judge's Frechet distance (not FID), against noise",
        "result": f"{found['painted']:.3f} against {found['noise']:.3f} (drawings "
        f"{found['drawn']:.3f}, of other prompts {found['other_prompts']:.3f})",
        "holds": found["painted"] < found["noise"],
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The verdicts as text: a line each, columns aligned."""
    rows: list[tuple[str, ...]] = [
        ("", "result", "score", "baseline", "difference, 95 % interval", "")
    ]
    for x in lines:
        numbers = ("", "", "")
        if "difference" in x:
            interval = f"{x['difference']:+.3f}  {x['low']:+.3f} .. {x['high']:+.3f}"
            numbers = (f"{x['score']:.3f}", f"{x['baseline']:.3f}", interval)
        rows.append((x["what"], x["result"], *numbers, "yes" if x["holds"] else "NO"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


if __name__ == "__main__":
    cli.run(main)
