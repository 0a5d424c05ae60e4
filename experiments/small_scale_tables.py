"""Tables of docs/small_scale.md, from the numbers that experiments/small_scale.py gathers.

A new score of the suite is one more line in SCORES.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from janusflow_jax.config import stages
from janusflow_jax.config.errors import JanusFlowError

LETTERS = stages.ABLATIONS
SEEDS = (1, 2, 3)
PERCENT, RANK, DISTANCE = "{:.1%}", "{:.1f}", "{:.3f}"
Scores = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of the suite's report, and the number that it stands beside."""

    key: str
    words: str
    path: str  # in the report, parts joined by '/': a number, or a comparison with its baseline
    form: str = PERCENT
    less_is_better: bool = False
    baseline: str = ""  # path of the baseline of a number


IMAGES = (
    Score("hue", "generated: hue right", "trained_pairs/hue/within"),
    Score("percentile", "generated: retrieval percentile", "trained_pairs/retrieval/percentile"),
    Score(
        "rank",
        "generated: median rank of 233 (less is better)",
        "trained_pairs/retrieval/median_rank",
        RANK,
        less_is_better=True,
    ),
    Score("sheet_hue", "sheet: hue right", "sheet/hue/within"),
    Score(
        "sheet_rank",
        "sheet: median rank of 233 (less is better)",
        "sheet/retrieval/median_rank",
        RANK,
        less_is_better=True,
    ),
    Score(
        "alignment",
        "generated: judge's alignment (cosine)",
        "trained_pairs/alignment/likeness",
        DISTANCE,
    ),
    Score(
        "in_color",
        "the same; baseline: other classes in the prompt's color",
        "trained_pairs/alignment/in_color",
        DISTANCE,
    ),
    Score(
        "judge_rank",
        "generated: judge's median rank of 233 (less is better)",
        "trained_pairs/alignment/median_rank",
        RANK,
        less_is_better=True,
    ),
    Score(
        "frechet",
        "generated: judge's Frechet distance (less is better)",
        "trained_pairs/frechet/painted",
        DISTANCE,
        less_is_better=True,
        baseline="trained_pairs/frechet/noise",
    ),
)
CAPTIONS = tuple(
    Score(f"{split}_{kind}", f"captions, {where}: {words}", f"captions/{split}/{kind}/constant")
    for split, where in (("heldout_pairs", "unseen pairs"), ("heldout_views", "unseen views"))
    for kind, words in (
        ("exact", "exact"),
        ("name", "class right"),
        ("words", "words (F1)"),
        ("edits", "letters unchanged"),
    )
)
SCORES = (*IMAGES, *CAPTIONS)
BY_KEY = {x.key: x for x in SCORES}
GENERATION = ("percentile", "alignment", "frechet")
UNDERSTANDING = ("heldout_pairs_exact", "heldout_pairs_words")
SWEPT = ("hue", "percentile", "rank", "alignment", "judge_rank", "frechet")


CLAIMS = (
    ("F", "A", "REPA improves generation: FID 17.61 against 19.84", GENERATION),
    (
        "F",
        "A",
        "REPA costs no understanding: POPE 84.73 against 82.40, VQAv2 69.20 against 69.62, "
        "GQA 54.83 against 54.43",
        UNDERSTANDING,
    ),
    (
        "F",
        "B",
        "SigLIP understands better than a shared encoder: POPE 84.73 against 78.13, VQAv2 69.20 "
        "against 53.94, GQA 54.83 against 44.04",
        UNDERSTANDING,
    ),
    ("F", "B", "and generates about as well: FID 17.61 against 18.05", GENERATION),
    (
        "F",
        "C",
        "SigLIP understands better than an encoder of its own: POPE 84.73 against 75.30, VQAv2 "
        "69.20 against 55.41, GQA 54.83 against 44.44",
        UNDERSTANDING,
    ),
    ("F", "C", "and generates about as well: FID 17.61 against 17.53", GENERATION),
    (
        "F",
        "D",
        "both tasks understand about as well as understanding alone: POPE 84.73 against 85.03, "
        "VQAv2 69.20 against 69.10, GQA 54.83 against 54.23",
        UNDERSTANDING,
    ),
    (
        "F",
        "E",
        "both tasks generate nearly as well as generation alone: FID 17.61 against 16.69",
        GENERATION,
    ),
)
"""Two letters, the statement of the paper's table 5, and the scores that would show it."""


# --- numbers


def scores(report: dict[str, Any]) -> Scores:
    """Every score that a report has: key -> {"score": x, "baseline": y if there is one}."""
    out: Scores = {}
    for score in SCORES:
        value = _at(report, score.path)
        if value is None:
            continue
        if not isinstance(value, dict):
            value = {"score": value}
            if score.baseline:
                value["baseline"] = _at(report, score.baseline)
        out[score.key] = {
            name: round(float(value[name]), 5)
            for name in ("score", "baseline")
            if value.get(name) is not None
        }
    return out


def _at(report: Any, path: str) -> Any:
    for part in path.split("/"):
        if not isinstance(report, dict) or part not in report:
            return None
        report = report[part]
    return report


def of_letter(numbers: dict[str, Any], letter: str, key: str, what: str = "score") -> list[float]:
    """A score of all runs of a letter that have it."""
    runs = (x["scores"] for name, x in numbers["runs"].items() if name[0] == letter)
    return [x[key][what] for x in runs if what in x.get(key, {})]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- tables


def spread(values: Sequence[float], form: str) -> str:
    """'12.0% (11.0% .. 13.0%)': mean and range; '12.0% (one run)' for one value."""
    if len(values) == 1:
        return f"{form.format(values[0])} (one run)"
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(mean(values))} ({low} .. {high})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def runs_table(numbers: dict[str, Any]) -> str:
    """What was trained of every letter, and which seeds are missing."""
    rows = [["", "what", "seeds", "missing", "steps", "minutes each"]]
    for letter, words in LETTERS.items():
        runs = {int(n[2:]): x["training"] for n, x in numbers["runs"].items() if n[0] == letter}
        minutes = [x["minutes"] for x in runs.values()]
        rows.append(
            [
                letter,
                words,
                ", ".join(map(str, sorted(runs))) or "none",
                ", ".join(str(s) for s in SEEDS if s not in runs) or "none",
                ", ".join(f"{x:,}" for x in sorted({x["steps"] for x in runs.values()})),
                spread(minutes, "{:.1f}") if minutes else "",
            ]
        )
    return table(rows)


def letters_table(numbers: dict[str, Any]) -> str:
    """Every score of every letter: mean and range over its runs."""
    counts = {x: sum(name[0] == x for name in numbers["runs"]) for x in LETTERS}
    letters = [x for x in LETTERS if counts[x]]
    rows = [["score", "baseline", *(f"{x} ({counts[x]})" for x in letters)]]
    for score in SCORES:
        cells = [of_letter(numbers, x, score.key) for x in letters]
        if not any(cells):
            continue
        baselines = [y for x in letters for y in of_letter(numbers, x, score.key, "baseline")]
        baseline = score.form.format(mean(baselines)) if baselines else ""
        rows.append([score.words, baseline, *(spread(x, score.form) if x else "-" for x in cells)])
    return table(rows)


def sweep_table(numbers: dict[str, Any], sweep: str, head: str) -> str:
    """Generation scores of F by guidance or steps: mean and range over its runs."""
    points = numbers["sweeps"][sweep]
    keys = [k for k in SWEPT if any(k in x["scores"] for x in points)]
    rows = [[head, "runs", *(BY_KEY[k].words for k in keys)]]
    for value in sorted({x["value"] for x in points}):
        runs = [x["scores"] for x in points if x["value"] == value]
        cells = [spread([x[k]["score"] for x in runs if k in x], BY_KEY[k].form) for k in keys]
        rows.append([f"{value:g}", str(len(runs)), *cells])
    return table(rows)


def verdict(numbers: dict[str, Any], better: str, worse: str, key: str) -> str:
    """Whether all runs of one letter beat all runs of another in a score."""
    a, b = (of_letter(numbers, x, key) for x in (better, worse))
    if not a or not b:
        return "not measured"
    if BY_KEY[key].less_is_better:
        a, b = [-x for x in a], [-x for x in b]
    few = "" if min(len(a), len(b)) >= len(SEEDS) else f" ({len(a)} and {len(b)} runs)"
    if min(a) > max(b):
        return f"every {better} better than every {worse}{few}"
    if max(a) < min(b):
        return f"every {better} worse than every {worse}{few}"
    return f"ranges overlap{few}"


def claims_table(numbers: dict[str, Any]) -> str:
    """The paper's statements beside the results of the runs."""
    rows = [["", "the paper", "our score", "our means", "our runs"]]
    for better, worse, paper, keys in CLAIMS:
        first = [f"{better}, {worse}", paper]
        for key in keys:
            if not any(of_letter(numbers, x, key) for x in LETTERS):
                continue
            runs = [of_letter(numbers, x, key) for x in (better, worse)]
            means = [BY_KEY[key].form.format(mean(x)) if x else "nothing" for x in runs]
            result = verdict(numbers, better, worse, key)
            rows.append([*first, BY_KEY[key].words, " against ".join(means), result])
            first = ["", ""]
    return table(rows)


# --- the document


def blocks(numbers: dict[str, Any]) -> dict[str, str]:
    """Every generated part of docs/small_scale.md, by the name in its marker."""
    return {
        "runs": runs_table(numbers),
        "letters": letters_table(numbers),
        "claims": claims_table(numbers),
        "guidance": sweep_table(numbers, "guidance", "w"),
        "steps": sweep_table(numbers, "steps", "steps"),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """A document with its generated parts between `<!-- name -->` and `<!-- end -->` replaced.

    Raises:
      JanusFlowError: a marker that is missing or unknown (lists all).
    """
    form = re.compile(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->", re.DOTALL)
    marked = form.findall(text)
    if sorted(marked) != sorted(parts):
        raise JanusFlowError(
            f"the document: expected one marker each of {sorted(parts)} (`<!-- name -->`, with "
            f"`<!-- end -->` after the table); got {sorted(marked)}"
        )
    return form.sub(lambda m: f"<!-- {m[1]} -->\n{parts[m[1]]}\n<!-- end -->", text)
