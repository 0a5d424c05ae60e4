"""MMMU: multiple-choice and open questions of 30 subjects.

A rule turns an answer into 1 (right), 0 (wrong) or None (a choice that cannot be parsed).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from janusflow_jax.eval import stats
from janusflow_jax.eval.scorers import choice

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""With commas, scientific, and plain."""


def official(
    answer: str, gold: str | Sequence[str], options: Mapping[str, str] | None
) -> float | None:
    """The rule of MMMU's own script.

    NOTE(parity): the script draws a random letter for a choice without any; here it is unparsed.

    Args:
      gold: a letter; for an open question one or more answers.
      options: letter -> text; None or empty: an open question.
    """
    if not options:
        return float(_open_is_right(answer, [gold] if isinstance(gold, str) else gold))
    letter = official_letter(answer, options)
    return None if letter is None else float(letter == gold)


def vlmevalkit(
    answer: str, gold: str | Sequence[str], options: Mapping[str, str] | None
) -> float | None:
    """VLMEvalKit's rule: its exact matching of letters.

    An open question gets the options A, its gold answer, and B, "Other Answers"; so an answer that
    contains the gold text is right, as "15" contains "5".
    """
    if not options:
        text = gold if isinstance(gold, str) else str(list(gold))
        options, gold = {"A": text, "B": "Other Answers"}, "A"
    letter = choice.vlmevalkit(answer, options)
    return None if letter is None else float(letter == gold)


def official_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The last "(B)", else the last " B ", else, in more than five words, the last option text."""
    for mark in ",.!?;:'":  # one after the other, not as one set
        answer = answer.strip(mark)
    text = f" {answer} "
    for form in ("({})", " {} "):
        places = {letter: text.rfind(form.format(letter)) for letter in options}
        if max(places.values()) >= 0:
            return max(places, key=places.__getitem__)
    places = {letter: text.lower().rfind(option.lower()) for letter, option in options.items()}
    if len(text.split()) > 5 and max(places.values()) >= 0:
        return max(places, key=places.__getitem__)
    return None


def accuracy(
    outcomes: Sequence[float | None],
    options: Sequence[Mapping[str, str] | None],
    subjects: Sequence[str],
) -> dict[str, stats.Score]:
    """Accuracies in percent.

    Args:
      outcomes: of one of the rules above.
      options: of each question, as above.
    Returns:
      overall: unparsed choices are wrong; with_chance: they count 1 / number of options, the
      expectation of the official script's random letter; overall of each subject, by its name.
    """
    chance = [
        1 / len(own or "?") if outcome is None else outcome
        for outcome, own in zip(outcomes, options, strict=True)
    ]
    out = stats.by_category([outcome or 0.0 for outcome in outcomes], subjects)
    return {
        "overall": out.pop("overall"),
        "with_chance": stats.by_category(chance)["overall"],
    } | out


def _open_is_right(answer: str, golds: Sequence[str]) -> bool:
    """Whether a gold text is contained in a candidate, or a gold number equals one."""
    wanted = [value for gold in golds for value in _values(gold)]
    texts = [value for value in wanted if isinstance(value, str)]
    return any(
        any(text in candidate for text in texts)
        if isinstance(candidate, str)
        else candidate in wanted
        for candidate in _candidates(answer)
    )


def _candidates(answer: str) -> list[str | float]:
    """Texts and numbers of an open answer that may be what was asked for."""
    answer = answer.strip().strip(".").lower()
    tails = []
    lines = answer.split("\n")
    for i, line in enumerate(lines):
        keys = (*_KEYS, "=") if i == len(lines) - 1 else _KEYS
        tail = ""
        for end in (line.split(key)[-1].strip() for key in keys if key in line):
            if not tail or len(end) < len(tail):
                tail = end
        if tail and tail not in tuple(":,.!?;'"):
            tails.append(tail)
    tails = tails or [answer]
    numbers = [n for tail in tails for form in _NUMBERS for n in re.findall(form, tail)]
    return [value for text in (*tails, *numbers) for value in _values(text)]


def _values(text: str) -> list[str | float]:
    """A number, rounded to two decimals, or the text in lower case.

    A single character gets a space before or behind it, so that it is not found inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
