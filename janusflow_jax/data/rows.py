"""Row number -> row of the batch. A pure function of (config, data, tokenizer, row).

A row holds the samples of one bin of one source, each in its own segment with positions from 0.
Which bin, caption, crop and dropped prompt follow from the row's number and the seed alone, so the
same row comes out on any host, with any number of threads, after any restart.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np

from janusflow_jax import config as config_lib
from janusflow_jax.config import GENERATE, NONE, UNDERSTAND
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import (
    cache as latent_cache,
    chat_format,
    lengths,
    packing,
    pieces as pieces_lib,
    samples,
    slots as slots_lib,
    sources,
)

_CAPTION, _DROP, _, _FILLER = range(4)  # slots.CROP is the third
_MIN_FILLER = 16  # positions; a shorter tail stays padding
_TASKS = {"generate": GENERATE, "understand": UNDERSTAND, "text": NONE}


@dataclasses.dataclass(frozen=True)
class BadSample:
    """A record that was left out of its row."""

    row: int
    source: str
    record: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}, {self.source} record {self.record}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Source:
    """An open source of the mixture, packed."""

    cfg: config_lib.SourceConfig
    name: str
    records: Any
    pieces: pieces_lib.Pieces  # what the bins hold
    bins: packing.Bins
    key: int
    cache: latent_cache.Cache | None = None

    def sample_range(self, b: int) -> range:
        return range(int(self.bins.starts[b]), int(self.bins.starts[b + 1]))


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of rows with one mixture."""

    first_row: int
    weights: list[float]  # wanted shares of positions, any scale
    shares: list[int]  # of rows, in packing.SHARE_UNITS
    filler: float  # part of the rows with images whose free tail takes text
    before: list[int]  # rows that each source had in earlier phases


class Rows:
    """The mixture as one endless sequence of rows."""

    def __init__(
        self,
        cfg: config_lib.DataConfig,
        model: config_lib.ModelConfig,
        chat: chat_format.ChatFormat,
        repa: bool = True,
    ):
        """Opens, measures (or reads the stored lengths) and packs every source.

        Args:
          cfg: the mixture, the row's length and its slots.
          model: for the picture's size and the positions of an image.
          chat: the tokenizer.
          repa: whether the loss reads SigLIP's features of generation slots.
        Raises:
          DataError: the tokenizer, the model and the mixture do not go together (lists all).
          DataError, DataError, DataError: a data set, or what is
            stored of it, cannot be used.
        """
        self.cfg, self.model, self.chat = cfg, model, chat
        problems = _problems(cfg, model, chat)
        if problems:
            raise DataError("data:\n" + "\n".join(f"  - {p}" for p in problems))
        self.sources = [self._open(source) for source in cfg.sources]
        empty = [
            f"{s.name}: expected samples of at most data.row_len {cfg.row_len} positions; none of "
            f"its {len(s.records)} records makes one"
            for s in self.sources
            if not len(s.bins)
        ]
        if empty:
            raise DataError("data:\n" + "\n".join(f"  - {p}" for p in empty))
        self.slots = self._slots(repa)
        self.fill = [s.bins.used / (len(s.bins) * cfg.row_len) for s in self.sources]
        self.phases = self._phases()

    def phase(self, row: int) -> Phase:
        """The mixture that holds for a row."""
        return next(p for p in reversed(self.phases) if p.first_row <= row)

    def locate(self, row: int) -> tuple[int, int, int]:
        """(source, epoch of that source, bin) of a row."""
        phase = self.phase(row)
        which, k = packing.interleave(row - phase.first_row, phase.shares)
        source = self.sources[which]
        epoch, place = divmod(phase.before[which] + k, len(source.bins))
        return (
            which,
            epoch,
            packing.permute(place, len(source.bins), (self.cfg.seed, source.key, epoch)),
        )

    def records(self, row: int) -> tuple[str, list[int]]:
        """Name of a row's source, and the numbers of the records that stand in it, in order."""
        which, _, b = self.locate(row)
        source = self.sources[which]
        pieces = source.bins.samples[list(source.sample_range(b))]
        return source.name, source.pieces.record[pieces].tolist()

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[BadSample]]:
        """One row and the records that had to be left out of it.

        Args:
          row: its number, from 0.
        Returns:
          (arrays, bad): row uint32[], tokens int32[T], segment_ids int32[T], positions int32[T],
          target_mask bool[T], slot_start int32[K], slot_task int32[K], and what the slots hold:
          images uint8[K, H, W, 3], or what caches have in their place (`slots`).
        Raises:
          DataError: the store cannot be read.
        """
        length = self.cfg.row_len
        out = {
            "row": np.array(row, np.uint32),
            "tokens": np.full(length, self.chat.pad_id, np.int32),
            "segment_ids": np.zeros(length, np.int32),
            "positions": np.zeros(length, np.int32),
            "target_mask": np.zeros(length, bool),
            **self.slots.empty(),
        }
        bad = []
        which, _, b = self.locate(row)
        source = self.sources[which]
        slot = 0
        for place, i in enumerate(source.sample_range(b)):
            piece, offset = int(source.bins.samples[i]), int(source.bins.offsets[i])
            try:
                self._place(out, source, piece, row, place, slot, offset)
            except DataError as e:
                bad.append(BadSample(row, source.name, int(source.pieces.record[piece]), str(e)))
            slot += int(source.pieces.images[piece])
        filler = self.phase(row).filler
        if source.cfg.task != "text" and _rng((self.cfg.seed, row), _FILLER).random() < filler:
            i = int(source.bins.starts[b + 1]) - 1
            end = int(source.bins.offsets[i] + source.pieces.length[source.bins.samples[i]])
            self._fill(out, row, end, place=len(source.sample_range(b)), bad=bad)
        return out, bad

    def describe(self, phase: int = 0) -> list[dict[str, Any]]:
        """Per source: name, task, records, samples, bins, left_out, fill, shares in a phase."""
        now = self.phases[phase]
        rows = np.array(now.shares) / packing.SHARE_UNITS
        fill = np.array(self.fill)
        is_text = np.array([s.cfg.task == "text" for s in self.sources])
        positions = rows * fill
        weights = np.array(now.weights) * is_text
        if weights.any():  # text also stands in the tails of the other rows
            tails = now.filler * float((rows * (1 - fill))[~is_text].sum())
            positions = positions + tails * weights / weights.sum()
        return [
            {
                "source": source.name,
                "task": source.cfg.task,
                "records": len(source.records),
                "samples": len(source.bins.samples),
                "bins": len(source.bins),
                "left_out": source.pieces.left_out,  # units: exchanges of turns, passages
                "fill": float(fill[i]),  # part of a row's positions that are used
                "share_of_rows": float(rows[i]),
                "share_of_positions": float(positions[i] / positions.sum()),
            }
            for i, source in enumerate(self.sources)
        ]

    def _phases(self) -> list[Phase]:
        out: list[Phase] = []
        before = [0] * len(self.sources)
        is_text = [s.cfg.task == "text" for s in self.sources]
        for first_row, weights in self.cfg.phases():
            if out:
                ended = packing.count(first_row - out[-1].first_row, out[-1].shares)
                before = [a + b for a, b in zip(before, ended, strict=True)]
            shares, filler = packing.mixture(weights, self.fill, is_text)
            out.append(Phase(first_row, weights, shares, filler, before))
        return out

    def _open(self, cfg: config_lib.SourceConfig) -> Source:
        records = sources.mapped(sources.open_source(cfg.path, cfg.split), cfg.fields, cfg.task)
        counted = lengths.load_lengths(
            records, cfg.path, cfg.split, cfg.task, cfg.format, self.chat
        )
        slots = {"generate": self.cfg.gen_slots, "understand": self.cfg.und_slots}.get(cfg.task, 0)
        row_len, slot_len = self.cfg.row_len, self.model.slot_len
        pieces = pieces_lib.cut(counted, slot_len, row_len, slots, int(self.chat.add_bos))
        name = cfg.name or f"{cfg.path}:{cfg.split}:{cfg.task}"
        return Source(
            cfg=cfg,
            name=name,
            records=records,
            pieces=pieces,
            bins=packing.pack(pieces.length, pieces.images, row_len, slots),
            key=zlib.crc32(f"{name}:{cfg.task}".encode()),
            cache=latent_cache.Cache(cfg.cache) if cfg.cache else None,
        )

    def _slots(self, repa: bool) -> slots_lib.Slots:
        """How slots are filled, once every cache is known to fit its source and the others."""
        problems, manifests = [], {}
        for task in ("generate", "understand"):
            caches = []
            for s in self.sources:
                if s.cache is not None and s.cfg.task == task:
                    caches.append(s.cache)
                    problems += slots_lib.problems(
                        s.name, s.cache, s.records, s.cfg.split, task, self.model
                    )
            problems += slots_lib.agree(caches, task == "understand" or self.cfg.cached_features)
            manifests[task] = caches[0].manifest if caches else None
        if problems:
            raise DataError("data:\n" + "\n".join(f"  - {p}" for p in problems))
        return slots_lib.Slots(
            self.cfg, self.model, manifests["generate"], manifests["understand"], repa
        )

    def _place(
        self,
        out: dict[str, np.ndarray],
        source: Source,
        piece: int,
        row: int,
        place: int,
        slot: int,
        offset: int,
    ) -> None:
        """Writes one sample into the row; raises before it has written anything.

        Args: place, slot: samples and images that stand before it; offset: its first position.
        """
        task, pieces = _TASKS[source.cfg.task], source.pieces
        of_row = slot  # its number among all of the row's slots
        if task == UNDERSTAND:
            of_row += self.cfg.num_slots - self.cfg.und_slots
        key = (self.cfg.seed, row, place if task == NONE else of_row)
        record = int(pieces.record[piece])
        data = source.records[record]
        sample = self._sample(source, data, key, int(pieces.begin[piece]), int(pieces.end[piece]))
        n, room = len(sample.tokens), int(pieces.length[piece])
        if n > room or len(sample.images) != pieces.images[piece]:
            raise DataError(
                f"expected at most {room} positions and {pieces.images[piece]} image(s), as "
                f"measured; got {n} and {len(sample.images)}: measure lengths again"
            )
        filled = self.slots.load(task, source.cache, record, sample.images, key)
        for i, (start, values) in enumerate(zip(sample.slot_starts, filled, strict=True)):
            self.slots.put(out, task, slot + i, offset + start, values)
        here = slice(offset, offset + n)
        out["tokens"][here] = sample.tokens
        out["positions"][here] = np.arange(n)
        out["target_mask"][here] = sample.target_mask
        out["segment_ids"][here] = place + 1
        if task == GENERATE and _rng(key, _DROP).random() < self.cfg.drop_prompt:
            # the sampler's unconditional form: BOS and the slot stay, positions are kept
            out["segment_ids"][here][sample.prompt_mask] = 0

    def _fill(
        self, out: dict[str, np.ndarray], row: int, end: int, place: int, bad: list[BadSample]
    ) -> None:
        """Puts pieces of text, the last one cut anywhere, behind the row's samples."""
        texts = [i for i, s in enumerate(self.sources) if s.cfg.task == "text"]
        weights = np.array([self.phase(row).weights[i] for i in texts], np.float64)
        rng = _rng((self.cfg.seed, row, place), _FILLER)
        while self.cfg.row_len - end >= _MIN_FILLER:
            source = self.sources[texts[int(rng.choice(len(texts), p=weights / weights.sum()))]]
            record = int(rng.integers(len(source.records)))
            try:
                key = (self.cfg.seed, row, place)
                sample = self._sample(source, source.records[record], key)
            except DataError as e:
                bad.append(BadSample(row, source.name, record, str(e)))
                return
            head, room = int(self.chat.add_bos), self.cfg.row_len - end
            spare = len(sample.tokens) - room
            if spare > 0:  # a piece from anywhere
                start = int(rng.integers(spare + 1))
                sample = sample.cut(start, start + room - head, head)
            n = len(sample.tokens)
            out["tokens"][end : end + n] = sample.tokens
            out["positions"][end : end + n] = np.arange(n)
            out["target_mask"][end : end + n] = sample.target_mask
            out["segment_ids"][end : end + n] = place + 1
            end, place = end + n, place + 1

    def _sample(
        self,
        source: Source,
        data: dict[str, Any],
        key: tuple[int, ...],
        begin: int = 0,
        end: int = -1,
    ) -> samples.Sample:
        choose = lambda n: int(_rng(key, _CAPTION).integers(n)) if n > 1 else 0  # noqa: E731
        cfg = source.cfg
        return samples.make(data, cfg.task, cfg.format, self.chat, choose, begin, end)


def _rng(key: tuple[int, ...], purpose: int) -> np.random.Generator:
    return np.random.default_rng((*key, purpose))


def _problems(
    cfg: config_lib.DataConfig, model: config_lib.ModelConfig, chat: chat_format.ChatFormat
) -> list[str]:
    bad = []
    if not cfg.sources:
        bad.append("sources: expected at least one; got none")
    if chat.num_image_tokens != model.num_image_tokens:
        bad.append(
            f"tokenizer {chat.folder}: expected {model.num_image_tokens} positions an image (the "
            f"model's); got {chat.num_image_tokens}: load it with "
            "num_image_tokens=cfg.model.num_image_tokens"
        )
    try:
        chat.check_vocab(model.llm.vocab_size)
    except DataError as e:
        bad.append(str(e))
    for source in cfg.sources:
        slots = {"generate": cfg.gen_slots, "understand": cfg.und_slots}.get(source.task)
        if source.task not in _TASKS:
            bad.append(f"source {source.name!r} task: expected {list(_TASKS)}; got {source.task!r}")
        elif slots == 0:
            bad.append(f"source {source.name!r} ({source.task}): expected slots for it; got 0")
    names = [(s.name or s.path, s.split, s.task) for s in cfg.sources]
    if len(set(names)) < len(names):
        bad.append("sources: expected different names; got two alike: set data.sources[i].name")
    return bad
