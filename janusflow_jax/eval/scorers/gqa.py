"""GQA: a short answer is right if it equals the gold answer.

The rules differ in what they do to the texts first.
"""

from __future__ import annotations

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def official(answer: str, gold: str) -> bool:
    """GQA's own script: the texts as they are."""
    return answer == gold


def llava(answer: str, gold: str) -> bool:
    """LLaVA's conversion before GQA's script: lower case, no periods at the end of the answer."""
    return answer.rstrip(".").lower() == gold


def vlmevalkit(answer: str, gold: str) -> bool:
    """Lower case and no spaces around, in both texts."""
    return answer.strip().lower() == gold.strip().lower()


def lmms_eval(answer: str, gold: str) -> bool:
    """Lower case and no punctuation, in both texts. Spaces count."""
    return answer.lower().translate(_NO_PUNCTUATION) == gold.lower().translate(_NO_PUNCTUATION)
