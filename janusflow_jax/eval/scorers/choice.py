"""MMBench and SEED-Bench: questions that are answered with the letter of an option.

A rule turns an answer into a letter or None (unparsed). A score takes the letters of one rule.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

from janusflow_jax.config.errors import DataError
from janusflow_jax.eval import stats

ROTATION = 1_000_000
"""MMBench: the k-th rotation of question i has the index i + k x ROTATION."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"


def vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's exact matching: a single letter near the end, else the text of one option.

    In order: the only option letter among the words, if its first place is among the last four
    words; "answer is B"; the only option whose text is in the answer, if the answer is at most
    twice as long as all options. With a judge, VLMEvalKit asks it about what is left.

    Args:
      options: letter -> text.
    """
    answer = str(answer)
    if any(refusal in answer for refusal in _REFUSALS):
        return None
    if _FAILED not in answer:
        words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
        letters = [letter for letter in options if letter in words]
        if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
            return letters[0]
        if not letters and "Z" in words:
            return None
        match = re.search(r"answer\s+is\s+\**([ABCD])\**", answer, re.IGNORECASE)
        if match and match[1].upper() in options:
            return match[1].upper()
    text = answer.lower()
    if len(text) > 2 * sum(len(str(option)) for option in options.values()):
        return None
    letters = [letter for letter, option in options.items() if str(option).lower() in text]
    return letters[0] if len(letters) == 1 else None


def whole_answer(answer: str, options: Mapping[str, str]) -> str | None:
    """LLaVA's rule for SEED-Bench: the answer is a letter and nothing else."""
    return answer if answer in options else None


def first_character(answer: str, options: Mapping[str, str]) -> str | None:
    """lmms-eval's rule for SEED-Bench: the first character, in any case."""
    letter = answer.strip()[:1].upper()
    return letter if letter in options else None


def accuracy(
    letters: Sequence[str | None],
    golds: Sequence[str],
    categories: Sequence[str] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, stats.Score]:
    """Accuracy in percent: overall, and of each category.

    Args:
      groups: the image of each question.
    """
    right = [float(a == b) for a, b in zip(letters, golds, strict=True)]
    return stats.by_category(right, categories, groups)


def mmbench(
    letters: Sequence[str | None],
    golds: Sequence[str],
    indices: Sequence[int],
    categories: Sequence[str] | None = None,
) -> dict[str, stats.Score]:
    """Accuracies of MMBench, in percent.

    Args:
      indices: column `index`; the rotations of a question differ by multiples of `ROTATION`.
      categories: column `category`.
    Returns:
      vanilla_all: of all rows, the paper's protocol; vanilla_0: of first rotations only; circular:
      a question is right if all its rotations are; vanilla_all of each category, by its name.
    Raises:
      DataError: a question without its first rotation.
    """
    indices = [int(index) for index in indices]
    questions = [index % ROTATION for index in indices]
    if lost := {*questions} - {*indices}:
        raise DataError(
            f"MMBench: expected the first rotation of every question; got none of {min(lost)} and "
            f"{len(lost) - 1} more: use the whole file"
        )
    right = [a == b for a, b in zip(letters, golds, strict=True)]
    first = [r for r, i, q in zip(right, indices, questions, strict=True) if i == q]
    whole: dict[int, bool] = {}
    for r, question in zip(right, questions, strict=True):
        whole[question] = whole.get(question, True) and r
    rows = accuracy(letters, golds, categories, questions)
    out = {
        "vanilla_all": rows.pop("overall"),
        "vanilla_0": stats.score([100.0 * r for r in first]),
        "circular": stats.score([100.0 * r for r in whole.values()]),
    }
    return out | rows
