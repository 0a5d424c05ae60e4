"""What the suite's scores need of model, data and judge: said before minutes of painting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from janusflow_jax import pipeline
from janusflow_jax.config import parts as parts_lib
from janusflow_jax.config.errors import CheckpointError, JanusFlowError
from janusflow_jax.data import sources
from janusflow_jax.openmoji import judge, judged
from janusflow_jax.openmoji.scores import Gallery, Label


def check_captions(
    model: pipeline.JanusFlowPipeline, path: str, splits: Sequence[str], count: int
) -> None:
    """Whether pictures of these splits can be captioned and compared.

    Raises:
      CheckpointError: the model lacks a part that answers.
      JanusFlowError: a split has fewer than two pictures.
    """
    has = {*model.params, *(["vae"] if model.vae else [])}
    if lacking := sorted({*parts_lib.needed_to_understand(model.cfg)} - has):
        raise CheckpointError(
            f"captions: expected a model that reads pictures; {model.source or 'this one'} lacks "
            f"{lacking}: give --captions 0"
        )
    counts = {split: len(sources.open_source(path, split)) for split in splits}
    if min(counts.values()) < 2:
        raise JanusFlowError(
            f"captions: expected two or more pictures in every split of {path}, to caption "
            f"{count}; got {counts}: give --captions 0, or other data"
        )


def check_painting(
    model: pipeline.JanusFlowPipeline,
    sheet: Sequence[Label],
    more: Sequence[Label],
    gallery: Gallery,
    drawn: judged.Drawn,
    referee: judge.LoadedJudge | None,
) -> None:
    """Whether pictures painted for the sheet's pairs and `more` can be scored.

    Raises:
      JanusFlowError: the data lacks drawings, or the judge does not know them (lists all).
    """
    problems, labels, known = [], [*sheet, *more], set(gallery.labels)
    if len(more) < 2:
        problems.append(f"expected two or more trained pairs beside the sheet's; got {len(more)}")
    if lacking := sorted({f"{x.colour} {x.name}" for x in labels if x not in known}):
        problems.append(f"expected a drawing of each prompt; got none of {lacking}")
    counts = Counter(x.colour for x in known)
    if alone := sorted(colour for colour in {x.colour for x in labels} if counts[colour] == 1):
        problems.append(f"expected several drawings in every colour; got one in {alone}")
    if referee:
        try:
            judge.indices(referee.cfg, labels)
        except JanusFlowError as error:
            problems.append(f"{error}: give --judge ''")
        sizes = {x.shape[:2] for views in drawn.views.values() for x in views}
        sizes.add((model.cfg.image_size,) * 2)
        want = (referee.cfg.image.image_size,) * 2
        if sizes != {want}:
            problems.append(
                f"judge: expected a model and data of {want}; got {sorted(sizes)}: give --judge ''"
            )
    if problems:
        listed = "\n".join(f"  - {p}" for p in problems)
        raise JanusFlowError(f"paintings could not be scored (--prompts 0 paints none):\n{listed}")
