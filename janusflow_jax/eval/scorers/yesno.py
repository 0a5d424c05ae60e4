"""POPE and MME: questions that are answered with yes or no.

A rule turns an answer into 'yes', 'no' or None (unparsed). A score takes the labels of one rule.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from janusflow_jax.config.errors import DataError
from janusflow_jax.eval import stats
from janusflow_jax.eval.scorers import vqa

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


def pope_official(answer: str) -> str:
    """The rule of POPE's own script: a negation in the first sentence is a no, all else a yes.

    So an empty answer and "maybe" are yes. Only 'No', 'no' and 'not' are negations.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & {*words} else "yes"


def whole_word(answer: str) -> str | None:
    """VLMEvalKit's exact matching, for POPE and MME: one of the words yes and no, not both.

    The authors' numbers for Janus come from VLMEvalKit.
    """
    words = {*vqa.punctuation(answer.lower()).split()} & {"yes", "no"}
    return words.pop() if len(words) == 1 else None


def exactly(answer: str) -> str | None:
    """lmms-eval's rule for POPE: the answer without spaces around it. "Yes." is unparsed."""
    word = answer.lower().strip()
    return word if word in ("yes", "no") else None


def mme_official(answer: str) -> str | None:
    """The rule of MME's own tool: yes, else no, in the first four characters.

    So "nope" and "not" are no, and "a yes" is unparsed.
    """
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_lmms_eval(answer: str) -> str | None:
    """lmms-eval's rule for MME: as MME's tool, without periods and outer spaces; y is yes, n no."""
    word = answer.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(word) or mme_official(word)


def pope(
    labels: Sequence[str | None],
    golds: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    unparsed_is_no: bool = True,
) -> dict[str, stats.Score]:
    """Scores of one split of POPE, in percent; yes is positive.

    The paper's column is the F1 of the split `random`. VLMEvalKit's "Overall" is the F1 of the
    three splits joined, LLaVA's the mean of their F1.

    Args:
      labels: by one of the rules above.
      golds: 'yes' or 'no', in any case.
      groups: the image of each question.
      unparsed_is_no: False leaves unparsed answers out of recall and F1, as lmms-eval does.
    Returns:
      f1, accuracy, precision, recall, yes_ratio.
    """
    said = np.asarray([label == "yes" for label in labels], float)
    missed = np.asarray([label == "no" or (label is None and unparsed_is_no) for label in labels])
    gold = np.asarray(_golds(golds)) == "yes"
    right = np.asarray([a == b for a, b in zip(labels, _golds(golds), strict=True)], float)
    hits, false = said * gold, said * ~gold
    positives = hits + (missed & gold)
    score = lambda values, weights=None: stats.score(100 * values, weights, groups)  # noqa: E731
    return {
        "f1": score(2 * hits, hits + false + positives),
        "accuracy": score(right),
        "precision": score(hits, said),
        "recall": score(hits, positives),
        "yes_ratio": score(said),
    }


def mme(
    labels: Sequence[str | None],
    golds: Sequence[str],
    tasks: Sequence[str],
    images: Sequence[Hashable],
) -> dict[str, stats.Score]:
    """Scores of MME, in points: perception (at most 2000), cognition (800) and each task (200).

    A task's score is 100 x accuracy + 100 x share of images with both questions right.

    Args:
      labels: by one of the rules above.
      golds: 'yes' or 'no', in any case.
      tasks: name of each question's task.
      images: each question's image; a task has two questions on each image.
    Returns:
      perception and cognition, if all their tasks are there; each task.
    Raises:
      DataError: an image without exactly two questions.
    """
    pairs: dict[tuple[str, Hashable], list[bool]] = {}
    for label, gold, task, image in zip(labels, _golds(golds), tasks, images, strict=True):
        pairs.setdefault((task, image), []).append(label == gold)
    for (task, image), right in pairs.items():
        if len(right) != 2:
            raise DataError(
                f"MME, {task}, image {image}: expected 2 questions; got {len(right)}: "
                "use the whole task"
            )
    points = {pair: 50.0 * sum(right) + 100.0 * all(right) for pair, right in pairs.items()}

    def total(names: Sequence[str]) -> stats.Score:
        own = [pair for pair in points if pair[0] in names]
        strata = [task for task, _ in own]
        return stats.score([points[p] for p in own], groups=own, strata=strata, total=True)

    present = [*dict.fromkeys(tasks)]
    sums = {"perception": PERCEPTION, "cognition": COGNITION}
    out = {name: total(parts) for name, parts in sums.items() if {*parts} <= {*present}}
    return out | {task: total([task]) for task in present}


def _golds(golds: Sequence[str]) -> list[str]:
    out = [gold.strip().lower() for gold in golds]
    if wrong := {*out} - {"yes", "no"}:
        raise DataError(f"gold answers: expected yes or no; got {sorted(wrong)}: check the file")
    return out
