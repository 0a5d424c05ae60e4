"""VQAv2: the accuracy of a short answer against the answers of ten people.

The rule is that of the official evaluation script (GT-Vision-Lab/VQA).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't
mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
""".split()


def _spellings(word: str) -> list[str]:
    """The word with one of its apostrophes left out."""
    return [word[:i] + word[i + 1 :] for i, character in enumerate(word) if character == "'"]


# NOTE(parity): the script's table writes "somebody'd" without its apostrophe.
_CONTRACTIONS = {wrong: word for word in _CONTRACTED for wrong in _spellings(word)} | {
    "somebody'd": "somebodyd"
}


def punctuation(text: str) -> str:
    """The script's step for punctuation.

    A mark that is next to a space somewhere in the text is deleted, as all are if there is a
    number with a comma; other marks become spaces. Then periods before anything but a digit go.

    NOTE(parity): the script means to keep periods after a digit too, but its look-behind is
    mistyped and never matches; and it passes a flag (32) where a count is expected, so at most 32
    periods are deleted.
    """
    out = text
    comma = re.search(r"\d,\d", text)
    for mark in _PUNCTUATION:
        deleted = comma or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if deleted else " ")
    return re.sub(r"\.(?!\d)", "", out, count=32)


def normalized(text: str) -> str:
    """Punctuation removed, lower case, numbers as digits, no articles, apostrophes put back."""
    words = [_DIGITS.get(word, word) for word in punctuation(text).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def official(answer: str, golds: Sequence[str]) -> float:
    """The official accuracy in 0..1 of an answer, given ten people's answers.

    Mean over the ten of min(1, n / 3), where n of the other nine equal the answer. Texts are
    normalized only if the ten differ.

    NOTE(parity): case never matters here. In the script it does if all ten are equal, so that "Yes"
    is wrong where ten people said "yes"; the server that scores the test set lowers every answer.
    """
    answer, golds = _stripped(answer), [_stripped(gold) for gold in golds]
    if len({*golds}) > 1:
        return _agreement(normalized(answer), [normalized(gold) for gold in golds])
    return _agreement(answer.lower(), [gold.lower() for gold in golds])


def lmms_eval(answer: str, golds: Sequence[str]) -> float:
    """lmms-eval's accuracy in 0..1: texts are always normalized."""
    return _agreement(normalized(_stripped(answer)), [normalized(_stripped(g)) for g in golds])


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(answer: str, golds: Sequence[str]) -> float:
    same = [gold == answer for gold in golds]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(golds)
