"""Tables of docs/small_scale.md from the numbers that experiments/small_scale.py gathers.

A new score of the suite is one line more in SCORES.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from janusflow_jax.config.errors import JanusFlowError

LETTERS = {
    "A": "without REPA",
    "B": "shared VAE + ConvNeXt encoder",
    "C": "VAE + ConvNeXt encoder of its own",
    "D": "understanding only",
    "E": "generation only",
    "F": "all",
}
SEEDS = (1, 2, 3)
Scores = dict[str, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of the suite's report, and the number that it stands beside."""

    key: str
    words: str
    path: str  # in the report, parts joined by '/'
    baseline: str = ""  # the same; '' where there is none
    form: str = "{:.1%}"
    less_is_better: bool = False


def _caption(split: str, words: str, kind: str) -> Score:
    path = f"captions/{split}/{kind}/constant"
    name = {"exact": "exact", "name": "class right", "words": "words (F1)", "edits": "letters kept"}
    key = f"{split}_{kind}"
    return Score(key, f"captions, {words}: {name[kind]}", f"{path}/score", f"{path}/baseline")


PAINTING = (
    Score(
        "hue",
        "painted: hue right",
        "trained_pairs/hue/within/score",
        "trained_pairs/hue/within/baseline",
    ),
    Score(
        "percentile",
        "painted: drawing found, percentile",
        "trained_pairs/retrieval/percentile/score",
        "trained_pairs/retrieval/percentile/baseline",
    ),
    Score(
        "rank",
        "painted: median rank of 233 (less is better)",
        "trained_pairs/retrieval/median_rank",
        form="{:.1f}",
        less_is_better=True,
    ),
    Score("sheet_hue", "sheet: hue right", "sheet/hue/within/score", "sheet/hue/within/baseline"),
    Score(
        "sheet_rank",
        "sheet: median rank of 233 (less is better)",
        "sheet/retrieval/median_rank",
        form="{:.1f}",
        less_is_better=True,
    ),
    Score(
        "alignment",
        "painted: judge's alignment (cosine)",
        "trained_pairs/alignment/likeness/score",
        "trained_pairs/alignment/likeness/baseline",
        form="{:.3f}",
    ),
    Score(
        "in_colour",
        "the same; baseline: other classes in the prompt's colour",
        "trained_pairs/alignment/in_colour/score",
        "trained_pairs/alignment/in_colour/baseline",
        form="{:.3f}",
    ),
    Score(
        "judge_rank",
        "painted: judge's median rank of 233 (less is better)",
        "trained_pairs/alignment/median_rank",
        form="{:.1f}",
        less_is_better=True,
    ),
    Score(
        "frechet",
        "painted: judge's Frechet distance (less is better; not FID)",
        "trained_pairs/frechet/painted",
        "trained_pairs/frechet/noise",
        form="{:.3f}",
        less_is_better=True,
    ),
)
CAPTIONS = tuple(
    _caption(split, words, kind)
    for split, words in (("heldout_pairs", "unseen pairs"), ("heldout_views", "unseen views"))
    for kind in ("exact", "name", "words", "edits")
)
SCORES = (*PAINTING, *CAPTIONS)
BY_KEY = {x.key: x for x in SCORES}
PAINTED = ("percentile", "alignment", "frechet")
DESCRIBED = ("heldout_pairs_exact", "heldout_pairs_words")
SWEPT = ("hue", "percentile", "rank", "alignment", "judge_rank", "frechet")


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper's table 5 says of two letters, and the scores that would show it here."""

    better: str
    worse: str
    paper: str
    keys: tuple[str, ...]


CLAIMS = (
    Claim("F", "A", "REPA paints better: FID 17.61 against 19.84", PAINTED),
    Claim(
        "F",
        "A",
        "REPA takes nothing from understanding: POPE 84.73 against 82.40, VQAv2 69.20 "
        "against 69.62, GQA 54.83 against 54.43",
        DESCRIBED,
    ),
    Claim(
        "F",
        "B",
        "SigLIP understands better than a shared encoder: POPE 84.73 against 78.13, "
        "VQAv2 69.20 against 53.94, GQA 54.83 against 44.04",
        DESCRIBED,
    ),
    Claim(
        "F",
        "B",
        "and paints about as well: FID 17.61 against 18.05",
        PAINTED,
    ),
    Claim(
        "F",
        "C",
        "SigLIP understands better than an encoder of its own: POPE 84.73 against "
        "75.30, VQAv2 69.20 against 55.41, GQA 54.83 against 44.44",
        DESCRIBED,
    ),
    Claim(
        "F",
        "C",
        "and paints about as well: FID 17.61 against 17.53",
        PAINTED,
    ),
    Claim(
        "F",
        "D",
        "both tasks understand about as well as understanding alone: POPE 84.73 against "
        "85.03, VQAv2 69.20 against 69.10, GQA 54.83 against 54.23",
        DESCRIBED,
    ),
    Claim(
        "F",
        "E",
        "both tasks paint nearly as well as painting alone: FID 17.61 against 16.69",
        PAINTED,
    ),
)


# --- numbers of reports


def scores(report: dict[str, Any]) -> Scores:
    """Every score that a report has: key -> {"score": x, "baseline": y where there is one}."""
    out: Scores = {}
    for score in SCORES:
        value = _at(report, score.path)
        if value is None:
            continue
        out[score.key] = {"score": round(value, 5)}
        baseline = _at(report, score.baseline) if score.baseline else None
        if baseline is not None:
            out[score.key]["baseline"] = round(baseline, 5)
    return out


def _at(report: dict[str, Any], path: str) -> float | None:
    found: Any = report
    for part in path.split("/"):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return float(found)


def of_letter(found: dict[str, Any], letter: str, key: str, what: str = "score") -> list[float]:
    """A score of all runs of a letter that have it."""
    runs = (x["scores"] for name, x in found["runs"].items() if name[0] == letter)
    return [x[key][what] for x in runs if what in x.get(key, {})]


# --- tables


def spread(values: Sequence[float], form: str) -> str:
    """'12.0% (11.0% .. 13.0%)': mean and range; one value alone says so."""
    mean = form.format(sum(values) / len(values))
    if len(values) == 1:
        return f"{mean} (one run)"
    return f"{mean} ({form.format(min(values))} .. {form.format(max(values))})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def runs_table(found: dict[str, Any]) -> str:
    """What was trained of every letter, and what is missing."""
    rows = [["", "what", "seeds", "missing", "steps", "minutes each"]]
    for letter, words in LETTERS.items():
        mine = {int(n[2:]): x["training"] for n, x in found["runs"].items() if n[0] == letter}
        lacking = [str(s) for s in SEEDS if s not in mine]
        steps = sorted({x["steps"] for x in mine.values()})
        minutes = [x["minutes"] for x in mine.values()]
        rows.append(
            [
                letter,
                words,
                ", ".join(map(str, sorted(mine))) or "none",
                ", ".join(lacking) or "none",
                ", ".join(f"{x:,}" for x in steps),
                spread(minutes, "{:.1f}") if minutes else "",
            ]
        )
    return table(rows)


def letters_table(found: dict[str, Any]) -> str:
    """Every score of every letter: mean and range over its runs."""
    there = [x for x in LETTERS if any(name[0] == x for name in found["runs"])]
    counts = {x: sum(name[0] == x for name in found["runs"]) for x in there}
    rows = [["score", "baseline", *(f"{x} ({counts[x]})" for x in there)]]
    for score in SCORES:
        cells = [of_letter(found, x, score.key) for x in there]
        if not any(cells):
            continue
        baselines = [y for x in there for y in of_letter(found, x, score.key, "baseline")]
        baseline = score.form.format(sum(baselines) / len(baselines)) if baselines else ""
        shown = [spread(x, score.form) if x else "-" for x in cells]
        rows.append([score.words, baseline, *shown])
    return table(rows)


def sweep_table(found: dict[str, Any], sweep: str, head: str) -> str:
    """Painting scores of F by guidance or steps: mean and range over the runs swept."""
    points = found["sweeps"][sweep]
    keys = [k for k in SWEPT if any(k in x["scores"] for x in points)]
    rows = [[head, "runs", *(BY_KEY[k].words for k in keys)]]
    for value in sorted({x["value"] for x in points}):
        here = [x["scores"] for x in points if x["value"] == value]
        cells = [spread([x[k]["score"] for x in here if k in x], BY_KEY[k].form) for k in keys]
        rows.append([f"{value:g}", str(len(here)), *cells])
    return table(rows)


def verdict(found: dict[str, Any], better: str, worse: str, key: str) -> str:
    """Whether all runs of one letter beat all of another in a score, by words."""
    a, b = (of_letter(found, x, key) for x in (better, worse))
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


def claims_table(found: dict[str, Any]) -> str:
    """The paper's statements beside what the runs give."""
    keys = {k for c in CLAIMS for k in c.keys}
    there = {k for k in keys if any(of_letter(found, x, k) for x in LETTERS)}
    rows = [["", "the paper", "score here", "means here", "here"]]
    for claim in CLAIMS:
        for i, key in enumerate(k for k in claim.keys if k in there):
            score = BY_KEY[key]
            means = [_mean(of_letter(found, x, key), score) for x in (claim.better, claim.worse)]
            rows.append(
                [
                    f"{claim.better}, {claim.worse}" if i == 0 else "",
                    claim.paper if i == 0 else "",
                    score.words,
                    " against ".join(means),
                    verdict(found, claim.better, claim.worse, key),
                ]
            )
    return table(rows)


def _mean(values: Sequence[float], score: Score) -> str:
    return score.form.format(sum(values) / len(values)) if values else "nothing"


# --- the document


def blocks(found: dict[str, Any]) -> dict[str, str]:
    """Every generated part of the document, by the name in its marker."""
    return {
        "runs": runs_table(found),
        "letters": letters_table(found),
        "claims": claims_table(found),
        "guidance": sweep_table(found, "guidance", "w"),
        "steps": sweep_table(found, "steps", "steps"),
    }


def fill(text: str, found: dict[str, Any]) -> str:
    """The document with what stands between `<!-- name -->` and `<!-- end -->` made anew.

    Raises:
      JanusFlowError: a marker that is missing or unknown (lists all).
    """
    made = blocks(found)
    form = re.compile(r"<!-- (?!end)(\w+) -->\n.*?<!-- end -->", re.DOTALL)
    marked = form.findall(text)
    if sorted(marked) != sorted(made):
        raise JanusFlowError(
            f"the document: expected one marker each of {sorted(made)} (`<!-- runs -->`, and "
            f"`<!-- end -->` behind its table); got {sorted(marked)}"
        )
    return form.sub(lambda m: f"<!-- {m[1]} -->\n{made[m[1]]}\n<!-- end -->", text)
