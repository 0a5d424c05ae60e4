"""Scores of stored answers, and the report of a benchmark: `report.json` and a table.

Every rule that somebody reports numbers with is applied to the same answers. The first one is that
of the benchmark's protocol.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from etils import epath

from janusflow_jax.config import files
from janusflow_jax.eval import stats
from janusflow_jax.eval.benchmarks.read import Question
from janusflow_jax.eval.benchmarks.registry import Benchmark, Reported
from janusflow_jax.eval.scorers import choice, gqa, mmmu, vqa, yesno

REPORT = "report.json"
MOST_UNPARSED = 0.02
"""A larger share of answers without a label is a warning."""

Scores = dict[str, stats.Score]
Values = Mapping[str, stats.Score | float]


@dataclasses.dataclass(frozen=True)
class Scored:
    """Scores of answers by every rule, the protocol's first; `unparsed` is of that rule."""

    rules: dict[str, Scores]
    categories: Scores = dataclasses.field(default_factory=dict)
    unparsed: tuple[int, ...] = ()  # places of answers


def score(name: str, questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    """Scores of a benchmark's answers; none where only others can score (`submission`)."""
    return _SCORERS[name](questions, answers) if name in _SCORERS else Scored({})


def _pope(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    labels: dict[str, list[str | None]] = {
        "vlmevalkit": [yesno.whole_word(a) for a in answers],
        "official": [yesno.pope_official(a) for a in answers],
        "lmms_eval": [yesno.exactly(a) for a in answers],
    }
    members = {
        split: [n for n, q in enumerate(questions) if q.category == split]
        for split in dict.fromkeys(q.category for q in questions)
    }
    if len(members) > 1:
        members["overall"] = list(range(len(questions)))
    rules = {}
    for rule, own in labels.items():
        rules[rule] = {
            f"{score}_{split}": value
            for split, rows in members.items()
            for score, value in yesno.pope(
                [own[n] for n in rows],
                [questions[n].answer for n in rows],
                [questions[n].images for n in rows],
                unparsed_is_no=rule != "lmms_eval",
            ).items()
        }
    return Scored(rules, unparsed=_places(labels["vlmevalkit"]))


def _mme(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    pairs = [(q.category, q.group) for q in questions]
    whole = [n for n, pair in enumerate(pairs) if pairs.count(pair) > 1]  # --limit may cut a pair
    rules: dict[str, Callable[[str], str | None]] = {
        "vlmevalkit": yesno.whole_word,
        "official": yesno.mme_official,
        "lmms_eval": yesno.mme_lmms_eval,
    }
    labels = {rule: [parse(a) for a in answers] for rule, parse in rules.items()}
    scores = {
        rule: yesno.mme(
            [own[n] for n in whole],
            [questions[n].answer for n in whole],
            [questions[n].category for n in whole],
            [questions[n].group for n in whole],
        )
        for rule, own in labels.items()
    }
    sums = ("perception", "cognition")
    main = {rule: {k: v for k, v in own.items() if k in sums} for rule, own in scores.items()}
    tasks = {k: v for k, v in scores["vlmevalkit"].items() if k not in sums}
    return Scored(main, tasks, _places(labels["vlmevalkit"]))


def _letters(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[str | None]]:
    rules = {
        "vlmevalkit": choice.vlmevalkit,
        "llava": choice.whole_answer,
        "lmms_eval": choice.first_character,
    }
    return {
        rule: [parse(a, q.options) for a, q in zip(answers, questions, strict=True)]
        for rule, parse in rules.items()
    }


def _mmbench(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    labels = _letters(questions, answers)
    columns = zip(*((q.answer, int(q.id), q.category) for q in questions), strict=True)
    golds, indices, categories = map(list, columns)
    scores = {x: choice.mmbench(own, golds, indices, categories) for x, own in labels.items()}
    return _with_categories(
        scores, ("vanilla_all", "vanilla_0", "circular"), _places(labels["vlmevalkit"])
    )


def _seed(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    labels = _letters(questions, answers)
    golds, categories, images = _columns(questions)
    scores = {x: choice.accuracy(own, golds, categories, images) for x, own in labels.items()}
    return _with_categories(_named(scores), ("accuracy",), _places(labels["vlmevalkit"]))


def _vqa(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    golds, kinds, images = _columns(questions)
    scores = {
        name: stats.by_category(
            [rule(a, g) for a, g in zip(answers, golds, strict=True)], kinds, images
        )
        for name, rule in (("official", vqa.official), ("lmms_eval", vqa.lmms_eval))
    }
    return _with_categories(_named(scores), ("accuracy",))


def _gqa(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    golds, _, images = _columns(questions)
    rules = {
        "llava": gqa.llava,
        "official": gqa.official,
        "vlmevalkit": gqa.vlmevalkit,
        "lmms_eval": gqa.lmms_eval,
    }
    scores = {}
    for name, rule in rules.items():
        right = [float(rule(a, g)) for a, g in zip(answers, golds, strict=True)]
        scores[name] = stats.by_category(right, groups=images)
    return Scored(_named(scores))


def _mmmu(questions: Sequence[Question], answers: Sequence[str]) -> Scored:
    options = [q.options or None for q in questions]
    subjects = [q.category for q in questions]
    outcomes = {
        name: [rule(a, q.answer, q.options) for a, q in zip(answers, questions, strict=True)]
        for name, rule in (("official", mmmu.official), ("vlmevalkit", mmmu.vlmevalkit))
    }
    scores = {name: mmmu.accuracy(own, options, subjects) for name, own in outcomes.items()}
    return _with_categories(
        _named(scores), ("accuracy", "with_chance"), _places(outcomes["official"])
    )


_SCORERS: dict[str, Callable[[Sequence[Question], Sequence[str]], Scored]] = {
    "pope": _pope,
    "mme": _mme,
    "mmbench-dev-en": _mmbench,
    "seed-image": _seed,
    "vqav2-val": _vqa,
    "gqa": _gqa,
    "mmmu-val": _mmmu,
}


def _columns(questions: Sequence[Question]) -> tuple[list[Any], list[str], list[Hashable]]:
    """Gold answers, categories and images."""
    return (
        [q.answer for q in questions],
        [q.category for q in questions],
        [q.images for q in questions],
    )


def _places(labels: Sequence[Any]) -> tuple[int, ...]:
    return tuple(n for n, label in enumerate(labels) if label is None)


def _named(scores: dict[str, Scores]) -> dict[str, Scores]:
    """'overall' under the name that reports give it."""
    return {
        rule: {"accuracy" if name == "overall" else name: value for name, value in own.items()}
        for rule, own in scores.items()
    }


def _with_categories(
    scores: dict[str, Scores], main: Sequence[str], unparsed: tuple[int, ...] = ()
) -> Scored:
    """Scores of categories are kept of the first rule only."""
    first = next(iter(scores.values()))
    rules = {rule: {name: own[name] for name in main} for rule, own in scores.items()}
    return Scored(rules, {k: v for k, v in first.items() if k not in main}, unparsed)


def unparsed_warnings(scored: Scored, answers: Sequence[str]) -> list[str]:
    """A warning with examples, if too many answers have no label."""
    if len(scored.unparsed) <= MOST_UNPARSED * len(answers):
        return []
    examples = ", ".join(repr(answers[n][:60]) for n in scored.unparsed[:3])
    return [
        f"{len(scored.unparsed)} of {len(answers)} answers cannot be parsed and count as wrong, "
        f"such as {examples}"
    ]


def submission(
    name: str, questions: Sequence[Question], answers: Sequence[str], out: epath.Path
) -> epath.Path | None:
    """Writes the file that an external scorer reads: EvalAI's for VQAv2, MM-Vet's grader's."""
    if name == "vqav2-testdev":
        file, content = (
            out / "evalai.json",
            [
                {"question_id": int(q.id), "answer": a}
                for q, a in zip(questions, answers, strict=True)
            ],
        )
    elif name == "mmvet":
        file = out / "mmvet.json"
        content = {q.id: a for q, a in zip(questions, answers, strict=True)}
    else:
        return None
    with files.replacing(file) as part:
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    return file


# --- the report


def write(
    out: epath.Path,
    benchmark: Benchmark,
    scores: Values,
    *,
    counts: Mapping[str, int],
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    scorer: Mapping[str, Any],
    categories: Values | None = None,
    other_rules: Mapping[str, Values] | None = None,
    warnings: Sequence[str] = (),
) -> str:
    """Writes `report.json`; the table that says the same to people.

    Args:
      scores: by name, the main one first.
      counts: `asked`, and `expected` of a whole run (0: as many as were asked).
      settings: of the run.
      data: `known` is '' for data that are not the benchmark's.
      scorer: its name and version.
      other_rules: the same scores by other rules.
    """
    partial = counts["asked"] < counts.get("expected", 0)
    compared = []
    if data["known"] and not partial:
        compared = [
            _compared(x, scores, {**settings, "data": data["known"]})
            for x in (*benchmark.published, *benchmark.third_party)
            if x.score in scores
        ]
    report = {
        "benchmark": benchmark.name,
        "protocol": settings.get("protocol", benchmark.protocol),
        "partial": partial,
        "scores": {name: _number(x) for name, x in scores.items()},
        "categories": {name: _number(x) for name, x in (categories or {}).items()},
        "other_rules": {
            rule: {name: _value(x) for name, x in own.items()}
            for rule, own in (other_rules or {}).items()
        },
        "counts": dict(counts),
        "settings": dict(settings),
        "data": dict(data),
        "scorer": dict(scorer),
        "compared_with": compared,
        "warnings": list(warnings),
    }
    with files.replacing(out / REPORT) as part:
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")
    return table(report)


def _value(score: stats.Score | float) -> float:
    return score.value if isinstance(score, stats.Score) else float(score)


def _number(score: stats.Score | float) -> dict[str, float]:
    """The value and, of a `Score`, its 95 % interval."""
    if not isinstance(score, stats.Score):
        return {"value": float(score)}
    low, high = score.interval()
    return {"value": score.value, "low": low, "high": high}


def _compared(theirs: Reported, scores: Values, ours: Mapping[str, Any]) -> dict[str, Any]:
    """A reported value beside ours, and every known setting that differs."""
    differs = [
        f"{name} {value!r}, here {ours.get(name, 'none')!r}"
        for name, value in theirs.settings.items()
        if ours.get(name) != value
    ]
    return {
        "model": theirs.model,
        "score": theirs.score,
        "value": theirs.value,
        "here": _value(scores[theirs.score]),
        "source": theirs.source,
        "settings": theirs.settings,
        "differs": differs,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as text."""
    counts = ", ".join(f"{value:,} {name}" for name, value in report["counts"].items() if value)
    lines = [f"{report['benchmark']}, protocol {report['protocol']}: {counts}"]
    if report["partial"]:
        lines.append("PARTIAL: not all of the benchmark; do not compare these numbers")
    if not report["data"]["known"]:
        lines.append(f"{report['data']['file']}: not a known file of {report['benchmark']}")
    rules = report["other_rules"]
    names = [*report["scores"]]
    width = max([len(name) for name in names] + [5])
    lines.append(f"\n{'score':{width}}  {'value':>8}  {'95 % interval':>18}" + _cells([*rules]))
    for name, number in report["scores"].items():
        interval = f"{number['low']:.2f} .. {number['high']:.2f}" if "low" in number else ""
        other = _cells([f"{own[name]:.2f}" if name in own else "" for own in rules.values()])
        lines.append(f"{name:{width}}  {number['value']:8.2f}  {interval:>18}{other}")
    for x in report["compared_with"]:
        reason = "; ".join(x["differs"]) or (
            "same settings, where they are known" if x["settings"] else "its settings are not known"
        )
        lines.append(
            f"{x['model']}, {x['score']}: {x['value']:g}, here {x['here']:.2f} "
            f"({x['source']}): {reason}"
        )
    lines += [f"WARNING: {text}" for text in report["warnings"]]
    return "\n".join(lines)


def _cells(texts: Sequence[str]) -> str:
    return "".join(f"  {text:>12}" for text in texts)
