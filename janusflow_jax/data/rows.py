"""Row number -> row of the batch: a pure function of (config, data, tokenizer, row number).

A *row* is a sequence of `row_len` positions with up to K image *slots*. It holds the samples of one
*bin* of one source (see `packing`), each in a segment of its own with positions from 0. What a
record, a unit and a sample are stands in `samples`.

The bin, the caption, the crop and the dropped prompts follow from the row's number and the seed
alone. So the same row comes out on any host, with any number of threads, after any restart.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable
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
    samples,
    slots as slots_lib,
    sources,
)

_TASKS = {"generate": GENERATE, "understand": UNDERSTAND, "text": NONE}
_MIN_FILLER = 16  # positions; a shorter tail stays padding


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
    samples: packing.SampleTable
    bins: packing.Bins  # of numbers in `samples`
    key: int  # of its permutations
    cache: latent_cache.Cache | None


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
          model: for the image size and the positions of an image.
          chat: the tokenizer.
          repa: whether the loss reads SigLIP's features of generation slots.
        Raises:
          DataError: the tokenizer, the model and the mixture do not fit together (lists all), or a
            data set, its lengths or its cache cannot be used.
        """
        self.cfg, self.model, self.chat = cfg, model, chat
        _raise(_problems(cfg, model, chat))
        self.sources = [self._open(source) for source in cfg.sources]
        _raise(
            f"{s.name}: expected samples that fit data.row_len {cfg.row_len} and the slots of task "
            f"{s.cfg.task}; none of its {len(s.records)} records makes one"
            for s in self.sources
            if not len(s.bins)
        )
        self.slots = self._slots(repa)
        self.fill = [s.bins.used / (len(s.bins) * cfg.row_len) for s in self.sources]
        is_text = [s.cfg.task == "text" for s in self.sources]
        self.mixtures = packing.mixtures(cfg.phases(), self.fill, is_text)

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[BadSample]]:
        """One row, and the records that had to be left out of it.

        Args:
          row: its number, from 0.
        Returns:
          (arrays, bad): row uint32[], tokens int32[T], segment_ids int32[T], positions int32[T],
          target_mask bool[T], slot_start int32[K], slot_task int32[K], and what the slots hold:
          images uint8[K, H, W, 3], or what caches have instead (see `slots`).
        Raises:
          DataError: the store cannot be read.
        """
        cfg = self.cfg
        which, _, b = self.locate(row)
        source = self.sources[which]
        table, task = source.samples, _TASKS[source.cfg.task]
        out, bad = self._empty(row), []
        slot = self.slots.first(task)
        for place, (i, offset) in enumerate(source.bins[b]):  # sample i begins at `offset`
            record = int(table.record[i])
            # The caption, the crop and whether the prompt is dropped are drawn by this key.
            key = (cfg.seed, row, place if task == NONE else slot)
            try:
                sample = self._sample(source, i, key)
                images = self.slots.load(task, source.cache, record, sample.images, key)
            except DataError as e:
                if e.reason == sources.UNREADABLE:
                    raise
                # Its positions and slots stay empty, so that nothing else moves.
                bad.append(BadSample(row, source.name, record, str(e)))
            else:
                drop = task == GENERATE and _bernoulli(key, packing.DROP_PROMPT, cfg.drop_prompt)
                _write(out, sample, offset, place + 1, drop_prompt=drop)
                self.slots.fill(out, task, slot, [offset + x for x in sample.slot_starts], images)
            slot += int(table.images[i])
        filler = packing.mixture_of(self.mixtures, row).filler
        if task != NONE and _bernoulli((cfg.seed, row), packing.FILL_TAIL, filler):
            i, offset = source.bins[b][-1]
            end, place = offset + int(table.length[i]), len(source.bins[b])
            bad += self._fill_tail(out, row, end, place)
        return out, bad

    def locate(self, row: int) -> tuple[int, int, int]:
        """(source, epoch of that source, bin) of a row."""
        mixture = packing.mixture_of(self.mixtures, row)
        which, k = packing.interleave(row - mixture.first_row, mixture.shares)
        source = self.sources[which]
        epoch, place = divmod(mixture.earlier[which] + k, len(source.bins))
        key = (self.cfg.seed, source.key, epoch)
        return which, epoch, packing.permute(place, len(source.bins), key)

    def records(self, row: int) -> tuple[str, list[int]]:
        """Name of a row's source, and the numbers of the records in the row, in order."""
        which, _, b = self.locate(row)
        source = self.sources[which]
        return source.name, [int(source.samples.record[i]) for i, _ in source.bins[b]]

    def shares(self, mixture: packing.Mixture) -> np.ndarray:
        """Share of the mixture's positions that each source has."""
        rows, fill = np.array(mixture.shares) / packing.SHARE_UNITS, np.array(self.fill)
        is_text = np.array([s.cfg.task == "text" for s in self.sources])
        positions = rows * fill
        weights = np.array(mixture.weights) * is_text
        if weights.any():  # text also fills the tails of the other rows
            tails = mixture.filler * float((rows * (1 - fill))[~is_text].sum())
            positions = positions + tails * weights / weights.sum()
        return positions / positions.sum()

    def summary(self, mixture: packing.Mixture) -> str:
        """A line for each source."""
        lines = []
        for s, fill, share in zip(self.sources, self.fill, self.shares(mixture), strict=True):
            left_out = f"; {s.samples.left_out} too long, left out" if s.samples.left_out else ""
            lines.append(
                f"{s.name} ({s.cfg.task}): {len(s.bins.samples)} samples of {len(s.records)} "
                f"records in {len(s.bins)} bins, {fill:.1%} of positions used, {share:.1%} of the "
                f"mixture{left_out}"
            )
        return "\n".join(lines)

    def _open(self, cfg: config_lib.SourceConfig) -> Source:
        records = sources.mapped(sources.open_source(cfg.path, cfg.split), cfg.fields, cfg.task)
        measured = lengths.load_lengths(
            records, cfg.path, cfg.split, cfg.task, cfg.format, self.chat
        )
        slots = {"generate": self.cfg.gen_slots, "understand": self.cfg.und_slots}.get(cfg.task, 0)
        row_len, slot_len = self.cfg.row_len, self.model.slot_len
        table = packing.divide(measured, slot_len, row_len, slots, int(self.chat.add_bos))
        name = cfg.name or f"{cfg.path}:{cfg.split}:{cfg.task}"
        return Source(
            cfg=cfg,
            name=name,
            records=records,
            samples=table,
            bins=packing.pack(table.length, table.images, row_len, slots),
            key=zlib.crc32(f"{name}:{cfg.task}".encode()),
            cache=latent_cache.Cache(cfg.cache) if cfg.cache else None,
        )

    def _slots(self, repa: bool) -> slots_lib.Slots:
        """How slots are filled; every cache must fit its source and the other caches."""
        problems, manifests = [], {}
        for task in ("generate", "understand"):
            caches = []
            for s in self.sources:
                if s.cache is not None and s.cfg.task == task:
                    caches.append(s.cache)
                    problems += slots_lib.cache_problems(
                        s.name, s.cache, s.records, s.cfg.split, task, self.model
                    )
            features = task == "understand" or self.cfg.cached_features
            problems += slots_lib.batch_problems(caches, features)
            manifests[task] = caches[0].manifest if caches else None
        _raise(problems)
        return slots_lib.Slots(
            self.cfg, self.model, manifests["generate"], manifests["understand"], repa
        )

    def _empty(self, row: int) -> dict[str, np.ndarray]:
        """A row of padding."""
        length = self.cfg.row_len
        return {
            "row": np.array(row, np.uint32),
            "tokens": np.full(length, self.chat.pad_id, np.int32),
            "segment_ids": np.zeros(length, np.int32),
            "positions": np.zeros(length, np.int32),
            "target_mask": np.zeros(length, bool),
            **self.slots.empty(),
        }

    def _sample(self, source: Source, i: int, key: tuple[int, ...]) -> samples.Sample:
        """Sample i of a source; raises DataError also where it is larger than was measured."""
        table = source.samples
        record = source.records[int(table.record[i])]
        sample = self._encode(source, record, key, int(table.begin[i]), int(table.end[i]))
        n, length = len(sample.tokens), int(table.length[i])
        if n > length or len(sample.images) != table.images[i]:
            raise DataError(
                f"expected at most {length} positions and {table.images[i]} image(s), as "
                f"measured; got {n} and {len(sample.images)}: measure lengths again"
            )
        return sample

    def _encode(
        self,
        source: Source,
        record: dict[str, Any],
        key: tuple[int, ...],
        begin: int = 0,
        end: int = -1,
    ) -> samples.Sample:
        def choose(n: int) -> int:
            return int(packing.generator(key, packing.CAPTION).integers(n)) if n > 1 else 0

        cfg = source.cfg
        return samples.encode(record, cfg.task, cfg.format, self.chat, choose, begin, end)

    def _fill_tail(
        self, out: dict[str, np.ndarray], row: int, end: int, place: int
    ) -> list[BadSample]:
        """Fills the positions from `end` on with random stretches of text; returns bad records."""
        texts = [i for i, s in enumerate(self.sources) if s.cfg.task == "text"]
        mixture = packing.mixture_of(self.mixtures, row)
        weights = np.array([mixture.weights[i] for i in texts], np.float64)
        draw = packing.generator((self.cfg.seed, row, place), packing.FILL_TAIL)
        head = int(self.chat.add_bos)
        while self.cfg.row_len - end >= _MIN_FILLER:
            source = self.sources[texts[int(draw.choice(len(texts), p=weights / weights.sum()))]]
            number = int(draw.integers(len(source.records)))
            try:
                record = source.records[number]
                sample = self._encode(source, record, (self.cfg.seed, row, place))
            except DataError as e:
                if e.reason == sources.UNREADABLE:
                    raise
                return [BadSample(row, source.name, number, str(e))]
            room = self.cfg.row_len - end
            if len(sample.tokens) > room:
                start = int(draw.integers(len(sample.tokens) - room + 1))
                sample = sample.cut(start, start + room - head, head)
            _write(out, sample, end, place + 1)
            end, place = end + len(sample.tokens), place + 1
        return []


def _bernoulli(key: tuple[int, ...], purpose: int, probability: float) -> bool:
    return packing.generator(key, purpose).random() < probability


def _write(
    out: dict[str, np.ndarray],
    sample: samples.Sample,
    offset: int,
    segment: int,
    drop_prompt: bool = False,
) -> None:
    """Writes a sample's tokens into a row, as a segment from `offset` on.

    A dropped prompt is padding, as in the unconditional branch of sampling: BOS and the image stay,
    and keep their positions.
    """
    inside = slice(offset, offset + len(sample.tokens))
    out["tokens"][inside] = sample.tokens
    out["positions"][inside] = np.arange(len(sample.tokens))
    out["target_mask"][inside] = sample.target_mask
    out["segment_ids"][inside] = np.where(drop_prompt & sample.prompt_mask, 0, segment)


def _raise(problems: Iterable[str]) -> None:
    listed = [f"  - {problem}" for problem in problems]
    if listed:
        raise DataError("\n".join(["data:", *listed]))


def _problems(
    cfg: config_lib.DataConfig, model: config_lib.ModelConfig, chat: chat_format.ChatFormat
) -> list[str]:
    """What `config.checks` cannot know."""
    bad = []
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
    names = [(s.name or s.path, s.split, s.task) for s in cfg.sources]
    if len(set(names)) < len(names):
        bad.append("sources: expected different names; got two alike: set data.sources[i].name")
    return bad
