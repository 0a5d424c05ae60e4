"""Scores a model: `python -m janusflow_jax.evaluate --model runs/emoji --out eval.json`.

Suite `emoji`: the quick start's 24 sheet prompts and more trained pairs are painted and scored by
hue and by retrieval of the right drawing; pictures of every split are captioned. Every score stands
beside its baseline, with a 95 % interval of the difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from janusflow_jax import checkpoint, checksums, command_line, pipeline, samples
from janusflow_jax.config import SourceConfig
from janusflow_jax.data import images, openmoji_sheet, sources
from janusflow_jax.eval import emoji, sheet

CAPTION_SPLITS = ("heldout_pairs", "heldout_views", "train")
HUE_WANTED = 16
"""Sheet pictures (of 24) whose hue must be right."""
_MORE_SEED = 1000  # the extra prompts' noise is no sheet prompt's


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = command_line.parser(
        "evaluate",
        "Paints and captions with a model, and scores both against baselines.",
        "The same model, data and options give the same report, times apart.",
    )
    p.add_argument("--suite", choices=("emoji",), default="emoji")
    p.add_argument("--data", default="data/openmoji", help="from tools/prepare_openmoji.py")
    p.add_argument("--out", default="eval.json", help="the report; the sheet goes beside it (.png)")
    p.add_argument("--prompts", type=int, default=96, help="trained pairs to paint, sheet apart")
    p.add_argument("--captions", type=int, default=200, help="pictures to caption of every split")
    p.add_argument("--cfg", type=float, default=2.0, help="guidance weight; 1 is none")
    p.add_argument("--steps", type=int, default=30, help="Euler steps")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.prompts < 2 or args.captions < 2:
        raise ValueError(
            "expected --prompts and --captions of 2 or more (scores compare items with each "
            f"other); got {args.prompts} and {args.captions}"
        )
    began = time.time()
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    gallery, trained = references(args.data)
    folder = resolve(args.model)
    model = pipeline.load(
        str(folder), dtype=args.dtype, weights=args.weights, int8=args.int8, adapter=args.adapter
    )
    paint = {"cfg_weight": args.cfg, "num_steps": args.steps, "output": "numpy"}

    sheet_labels = [emoji.Label(name, colour) for colour, name, _ in openmoji_sheet.SHEET]
    pictures = model.generate(list(openmoji_sheet.PROMPTS), seed=args.seed, **paint)
    sheet_file = out.with_suffix(".png")
    sheet.make_sheet(list(pictures), openmoji_sheet.PROMPTS).save(sheet_file)
    print(f"the sheet: {sheet_file}", flush=True)
    report: dict[str, Any] = {
        "settings": {**vars(args), "model": str(folder)},
        "model": identity(folder),
        "data": {"files_sha256": hash_files(epath.Path(args.data))},
        "software": {"jax": jax.__version__, "backend": jax.default_backend()},
        "sheet": painting(pictures, sheet_labels, gallery),
    }
    for picture, (colour, name, seen) in zip(
        report["sheet"]["pictures"], openmoji_sheet.SHEET, strict=True
    ):
        picture |= {"prompt": openmoji_sheet.caption(colour, name), "trained": seen}

    more = pick(trained, args.prompts, args.seed, leave_out=sheet_labels)
    prompts = [openmoji_sheet.caption(x.colour, x.name) for x in more]
    seed = args.seed + _MORE_SEED
    report["trained_pairs"] = painting(model.generate(prompts, seed=seed, **paint), more, gallery)
    for picture, prompt in zip(report["trained_pairs"]["pictures"], prompts, strict=True):
        picture["prompt"] = prompt
    report["captions"] = {
        split: captioning(model, args.data, split, args.captions) for split in CAPTION_SPLITS
    }
    report["verdicts"] = verdicts(report)
    report["seconds"] = round(time.time() - began, 1)
    out.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print(table(report["verdicts"]))
    print(f"{report['seconds']:.0f} s (compilation included); the report: {out}")


# --- the parts of the suite


def references(path: str) -> tuple[emoji.Gallery, list[emoji.Label]]:
    """Reference drawings of every (class, colour) pair, and the trained pairs, sorted."""
    pictures, labels, trained = [], [], set()
    for split in ("train", "heldout_pairs"):
        source = sources.open_source(path, split)
        for i in range(len(source)):
            record = source[i]
            label = emoji.Label(record["class"], record["colour"])
            pictures.append(images.decode(record["image"]))
            labels.append(label)
            if split == "train":
                trained.add(label)
    by_name = sorted(trained, key=lambda x: (x.name, x.colour))
    return emoji.make_gallery(pictures, labels), by_name


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
    said = samples.caption_source(model, source, count)
    scores = emoji.score_captions(
        [x["answer"] for x in said],
        [x["captions"] for x in said],
        [emoji.Label(x["class"], x["colour"]) for x in said],
    )
    return {**scores, "answers": [{"id": x["id"], "answer": x["answer"]} for x in said]}


# --- what was measured


def resolve(path: str) -> epath.Path:
    """The one folder that will be loaded: a run that trains on must not change it under us."""
    folder = epath.Path(path)
    if (folder / checkpoint.MODEL_FILE).exists() or not (folder / "checkpoints").exists():
        return folder
    steps = checkpoint.committed_steps(folder)
    return folder / "checkpoints" / str(steps[-1]) if steps else folder


def identity(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of the checksums of a model or checkpoint (they cover its arrays), and its config."""
    out = {}
    for name in (checksums.SUMS_FILE, checkpoint.MODEL_FILE, "run.json"):
        if (folder / name).exists():
            out[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return out


def hash_files(folder: epath.Path) -> str:
    """SHA-256 over the names and contents of a folder's files."""
    total = hashlib.sha256()
    for file in sorted((x for x in folder.iterdir() if x.is_file()), key=lambda x: x.name):
        total.update(file.name.encode() + b"\0")
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


# --- to read


def verdicts(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One line a claim: what, result, comparison (where there is one) and whether it holds."""
    lines: list[dict[str, Any]] = []

    def add(what: str, result: str, compared: dict[str, Any]) -> None:
        lines.append({"what": what, "result": result, **compared, "holds": compared["beats"]})

    hue = report["sheet"]["hue"]
    unseen = [x["hue_right"] for x in report["sheet"]["pictures"] if not x["trained"]]
    lines.append(
        {
            "what": f"sheet: hue within {emoji.HUE_TOLERANCE:.0f} degrees, {HUE_WANTED} wanted",
            "result": f"{hue['right']}/{hue['of']} (untrained pairs {sum(unseen)}/{len(unseen)})",
            "holds": hue["right"] >= HUE_WANTED,
        }
    )
    for part in ("sheet", "trained_pairs"):
        hue, found = report[part]["hue"], report[part]["retrieval"]
        name = part.replace("_", " ")
        add(f"{name}: hue, against shuffled prompts", f"{hue['right']}/{hue['of']}", hue["within"])
        tops = f"top1 {found['top1']}, top5 {found['top5']} of {found['of']}"
        what = f"{name}: drawing among {found['candidates']}, against shuffled, "
        add(what + "reciprocal rank", tops, found["reciprocal_rank"])
        median = f"median rank {found['median_rank']:g}"
        add(what + "percentile", median, found["percentile"])
    for split, scores in report["captions"].items():
        for kind in ("exact", "colour", "name"):
            for baseline in ("constant", "shuffled"):
                add(
                    f"captions {split.replace('_', ' ')}: {kind}, against {baseline}",
                    f"{scores[kind]['right']}/{scores['of']}",
                    scores[kind][baseline],
                )
    return lines


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
    command_line.run(main)
