"""The judge's scores of painted pictures, each beside what drawings and noise get.

The feature space is that of `judge.py`, trained by this project on these drawings: its Frechet
distance is not FID, its alignment is not CLIP score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from janusflow_jax.config.errors import JanusFlowError
from janusflow_jax.openmoji import frechet, judge as judge_lib, stats
from janusflow_jax.openmoji.judge import LoadedJudge
from janusflow_jax.openmoji.scores import Label

VIEWS = 2
"""Drawings of each prompt that painted pictures are compared with."""
LEAST = 4
"""Pictures that a Frechet distance needs: two in each half."""
_NOISE_SEED = 0


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Real pictures, uint8[H, W, 3]: the data set's by label, and one more view of some pairs."""

    views: dict[Label, list[np.ndarray]]
    unseen: dict[Label, np.ndarray]


def alignment(
    judge: LoadedJudge, pictures: Sequence[np.ndarray], labels: Sequence[Label], drawn: Drawn
) -> dict[str, Any]:
    """Cosine between picture and prompt, against exchanged prompts.

    Returns:
      of; likeness: compared with the mean over the other prompts; in_colour: compared with the mean
      over all other classes in the prompt's colour (so that the right colour gives no help);
      median_rank: of the prompt among these; candidates: how many they are; top1, top5: how many
      pictures' own text is among the nearest of all texts that the judge knows; drawn: the likeness
      of real drawings of the same prompts, drawn_top1: how many of them; noise: noise's likeness.
    """
    texts = judge.texts(labels)
    own = judge.pictures(pictures)
    real = judge.pictures([drawn.views[x][0] for x in labels])
    places, real_places = (_places(judge, x, texts) for x in (own, real))
    hits, others, ranks = _in_colour(judge, own, labels)
    return {
        "of": len(labels),
        "likeness": stats.compare(*stats.against_others(own @ texts.T)),
        "in_colour": stats.compare(hits, others),
        "median_rank": float(np.median(ranks)),
        "candidates": len(judge.cfg.classes),
        "top1": int((places == 1).sum()),
        "top5": int((places <= 5).sum()),
        "drawn": float(_own(real, texts).mean()),
        "drawn_top1": int((real_places == 1).sum()),
        "noise": float(_own(judge.pictures(noise(pictures)), texts).mean()),
    }


def too_few(labels: Sequence[Label], drawn: Drawn) -> str:
    """Why there is no Frechet distance of pictures with these labels; '' where there is one."""
    own = [x for x in labels if x in drawn.unseen]
    if len(own) < LEAST:
        return f"expected {LEAST} or more painted pairs with an unseen view; got {len(own)}"
    if not drawn.unseen.keys() - own:
        return "expected pairs with an unseen view beside the painted ones; got none"
    return ""


def frechet_distance(
    judge: LoadedJudge, pictures: Sequence[np.ndarray], labels: Sequence[Label], drawn: Drawn
) -> dict[str, Any]:
    """Frechet distance between pictures and real drawings (VIEWS of each prompt).

    Only pairs count of which one more real view is there (`drawn.unseen`): that view against the
    same drawings is the floor, which has the bias of the same sample size.

    Returns:
      of; reference: drawings; painted, and at half the sample; drawn (the floor), and at half the
      sample; other_prompts: real drawings of as many other pairs; noise.
    Raises:
      JanusFlowError: fewer pictures than a distance needs (`too_few`).
    """
    if why := too_few(labels, drawn):
        raise JanusFlowError(f"Frechet distance: {why}")
    kept = [i for i, x in enumerate(labels) if x in drawn.unseen]
    own = [labels[i] for i in kept]
    chosen = set(own)
    order = sorted(drawn.unseen, key=lambda x: (x.name, x.colour))
    others = [x for x in order if x not in chosen]
    others = [others[i * len(others) // len(own)] for i in range(len(own))]
    sets = {
        "painted": [pictures[i] for i in kept],
        "drawn": [drawn.unseen[x] for x in own],
        "other_prompts": [drawn.unseen[x] for x in others],
    }
    reference = judge.pictures([p for x in own for p in drawn.views[x][:VIEWS]])
    found = {name: judge.pictures(x) for name, x in sets.items()}
    found["noise"] = judge.pictures(noise(sets["painted"]))
    out: dict[str, Any] = {"of": len(own), "reference": len(reference)}
    for name, features in found.items():
        out[name] = frechet.distance(features, reference)
        if name in ("painted", "drawn"):
            out[f"{name}_half"] = frechet.halves(features, reference)
    return out


def noise(like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As many pictures of uniform noise; always the same."""
    rng = np.random.default_rng(_NOISE_SEED)
    return [rng.integers(0, 256, x.shape, np.uint8) for x in like]


def _in_colour(
    judge: LoadedJudge, features: np.ndarray, labels: Sequence[Label]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likeness to the own prompt, mean likeness to the other classes in its colour, and the own
    one's place among them all; float[N] each."""
    classes, colours = judge_lib.indices(judge.cfg, labels)
    texts = judge.every_text().reshape(len(judge.cfg.classes), len(judge.cfg.colours), -1)
    scores = np.einsum("nd,cnd->nc", features, texts[:, colours])
    own = np.take_along_axis(scores, classes[:, None], axis=1)
    others = (scores.sum(1) - own[:, 0]) / (scores.shape[1] - 1)
    return own[:, 0], others, (scores > own).sum(1) + 1


def _own(features: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return (features * texts).sum(1)


def _places(judge: LoadedJudge, features: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Place of each picture's own text among all texts, 1 for the nearest."""
    return 1 + (features @ judge.every_text().T > _own(features, texts)[:, None] + 1e-6).sum(1)
