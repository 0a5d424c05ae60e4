"""Row number -> row of the batch: a pure function of (config, data, tokenizer, row number).

A *row* is a sequence of `row_len` positions with up to K image *slots*. It holds the samples of one
*bin* of one source, each in a segment of its own with positions from 0. `Rows.row` makes it:

    source and bin       by arithmetic (`mixture`); bins are packed once, at the start (`packing`)
    samples of the bin   tokens, targets and images (`samples`) of records (`sources`)
    image slots          pixels, or what a cache holds instead (`slots`)
    a free tail          text, where the mixture has some

A caption that is shorter than its record's longest leaves no gap: the next sample follows it.

The bin, the caption, the crop and the dropped prompts follow from the row's number and the seed
alone. So the same row comes out on any host, with any number of threads, after any restart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from typing import Any

import numpy as np

from janusflow_jax import config as config_lib
from janusflow_jax.config import GENERATE, NONE, UNDERSTAND
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import (
    cache as latent_cache,
    chat_format,
    mixture as mixture_lib,
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
    index: int  # in the mixture
    records: Any
    bins: packing.Bins
    marks: packing.Marks
    left_out: int  # units that no row can hold
    cache: latent_cache.Cache | None
    samples_digest: str

    @property
    def name(self) -> str:
        return self.cfg.label

    @property
    def task(self) -> int:
        return _TASKS[self.cfg.task]

    @property
    def key(self) -> int:
        """Seeds the permutations of the source's bins."""
        return zlib.crc32(f"{self.name}:{self.cfg.task}".encode())

    def identity(self) -> dict[str, Any]:
        """JSON values that identify the source's content, wherever it is stored."""
        content = f"{sources.digest(self.records)} {self.samples_digest}"
        cache = json.dumps(dataclasses.asdict(self.cache.manifest)) if self.cache else ""
        return {
            "name": self.name,
            "records": len(self.records),
            "content": hashlib.sha256(content.encode()).hexdigest(),
            "cache": hashlib.sha256(cache.encode()).hexdigest() if cache else "",
        }


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
          DataError: the tokenizer does not fit the model, or a data set, its lengths or its cache
            cannot be used.
        """
        self.cfg, self.model, self.chat = cfg, model, chat
        if chat.num_image_tokens != model.num_image_tokens:
            raise DataError(
                f"tokenizer {chat.folder}: expected {model.num_image_tokens} positions an image "
                f"(the model's); got {chat.num_image_tokens}: load it with "
                "num_image_tokens=cfg.model.num_image_tokens"
            )
        chat.check_vocab(model.llm.vocab_size)
        self.sources = [self._open(i, source) for i, source in enumerate(cfg.sources)]
        gen, und = (
            slots_lib.manifest_of(self.sources, task, model, cfg.cached_features)
            for task in ("generate", "understand")
        )
        self.slots = slots_lib.Slots(cfg, model, gen, und, repa)
        self.fill = [s.bins.num_positions / (len(s.bins) * cfg.row_len) for s in self.sources]
        is_text = [s.task == NONE for s in self.sources]
        self.mixtures = mixture_lib.mixtures(cfg.phases(), self.fill, is_text)

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[BadSample]]:
        """One row, and the records that had to be left out of it.

        Args:
          row: its number, from 0.
        Returns:
          (arrays, bad): row uint32[], tokens int32[T], segment_ids int32[T], positions int32[T],
          target_mask bool[T], source_ids int32[T] (places in the mixture), slot_start int32[K],
          slot_task int32[K], and what the slots hold: images uint8[K, H, W, 3], or what caches have
          instead (see `slots`). For a student also unprompted_ids int32[T]: segment_ids if every
          prompt were dropped.
        Raises:
          DataError: the store cannot be read.
        """
        source, bin_samples = self.samples(row)
        out, bad = self._padding(row), []
        slot = self.slots.first(source.task)
        segment = end = 0
        for segment, placed in enumerate(bin_samples, start=1):
            length = placed.length
            # The caption, the crop and whether the prompt is dropped are drawn by this key.
            key = (self.cfg.seed, row, segment - 1 if source.task == NONE else slot)
            try:
                sample = self._read_sample(source, placed.record, key, placed.begin, placed.end)
                if len(sample.tokens) > placed.length or len(sample.images) != placed.images:
                    raise DataError(
                        f"expected at most {placed.length} positions and {placed.images} image(s), "
                        f"as measured; got {len(sample.tokens)} and {len(sample.images)}: measure "
                        "lengths again"
                    )
                if self.cfg.packing > 1:
                    length = len(sample.tokens)
                starts = [end + start for start in sample.slot_starts]
                self.slots.fill(
                    out, source.task, slot, starts, sample.images, source.cache, placed.record
                )
            except DataError as error:  # its positions and slots stay empty: nothing else moves
                bad.append(_bad_sample(row, source, placed.record, error))
            else:
                drop_prompt = source.task == GENERATE and mixture_lib.bernoulli(
                    key, mixture_lib.DROP_PROMPT, self.cfg.drop_prompt
                )
                _write(out, sample, source.index, end, segment, drop_prompt)
            slot += placed.images
            end += length
        if source.task != NONE:
            bad += self._fill_tail(out, row, end, segment)
        return out, bad

    def locate(self, row: int) -> tuple[int, int, int]:
        """(source, epoch of that source, bin) of a row."""
        mixture = self._mixture(row)
        which, k = mixture_lib.interleave(row - mixture.first_row, mixture.shares)
        source = self.sources[which]
        epoch, place = divmod(mixture.earlier[which] + k, len(source.bins))
        key = (self.cfg.seed, source.key, epoch)
        return which, epoch, mixture_lib.permute(place, len(source.bins), key)

    def samples(self, row: int) -> tuple[Source, list[packing.Placed]]:
        """A row's source, and the samples of its bin, in order."""
        which, epoch, b = self.locate(row)
        source = self.sources[which]
        key = (self.cfg.seed, source.key, epoch) if self.cfg.packing > 1 else ()
        return source, source.bins.bin(b, key)

    def records(self, row: int) -> tuple[str, list[int]]:
        """Name of a row's source, and the numbers of the records in the row, in order."""
        source, bin_samples = self.samples(row)
        return source.name, [placed.record for placed in bin_samples]

    def _mixture(self, row: int) -> mixture_lib.Mixture:
        """The mixture that holds for a row."""
        return next(m for m in reversed(self.mixtures) if m.first_row <= row)

    def _padding(self, row: int) -> dict[str, np.ndarray]:
        """A row without samples."""
        length = self.cfg.row_len
        return {
            "row": np.array(row, np.uint32),
            "tokens": np.full(length, self.chat.pad_id, np.int32),
            "segment_ids": np.zeros(length, np.int32),
            "positions": np.zeros(length, np.int32),
            "target_mask": np.zeros(length, bool),
            "source_ids": np.zeros(length, np.int32),
            **self.slots.empty(),
            **({"unprompted_ids": np.zeros(length, np.int32)} if self.model.student.steps else {}),
        }

    def _read_sample(
        self, source: Source, record: int, key: tuple[int, ...], begin: int, end: int
    ) -> samples.Sample:
        """Units [begin, end) of a record, with a caption drawn by `key`."""

        def choose(n: int) -> int:
            generator = mixture_lib.generator(key, mixture_lib.CAPTION)
            return int(generator.integers(n)) if n > 1 else 0

        cfg = source.cfg
        marks = source.marks.of(record)
        return samples.encode(
            source.records[record], cfg.task, cfg.format, self.chat, choose, begin, end, marks
        )

    def _fill_tail(
        self, out: dict[str, np.ndarray], row: int, end: int, segment: int
    ) -> list[BadSample]:
        """Fills the positions from `end` on with random stretches of text, in the part of the rows
        that the mixture wants; returns bad records. Every token of a source is as likely."""
        mixture = self._mixture(row)
        if not mixture_lib.bernoulli((self.cfg.seed, row), mixture_lib.FILL_TAIL, mixture.filler):
            return []
        texts = [i for i, s in enumerate(self.sources) if s.task == NONE]
        weights = np.array([mixture.weights[i] for i in texts], np.float64)
        draw = mixture_lib.generator((self.cfg.seed, row, segment), mixture_lib.FILL_TAIL)
        while (room := self.cfg.row_len - end) >= _MIN_FILLER:
            source = self.sources[texts[int(draw.choice(len(texts), p=weights / weights.sum()))]]
            placed = source.bins.at_position(int(draw.integers(source.bins.num_positions)))
            try:
                record = source.records[placed.record]
                unit_range = placed.begin, placed.end
                sample = samples.excerpt(record, self.chat, unit_range, room, draw.integers)
            except DataError as error:
                return [_bad_sample(row, source, placed.record, error)]
            segment += 1
            _write(out, sample, source.index, end, segment)
            end += len(sample.tokens)
        return []

    def shares(self, mixture: mixture_lib.Mixture) -> np.ndarray:
        """Share of the mixture's positions that each source has."""
        rows, fill = np.array(mixture.shares) / mixture_lib.SHARE_UNITS, np.array(self.fill)
        is_text = np.array([s.task == NONE for s in self.sources])
        positions = rows * fill
        weights = np.array(mixture.weights) * is_text
        if weights.any():  # text also fills the tails of the other rows
            tails = mixture.filler * float((rows * (1 - fill))[~is_text].sum())
            positions = positions + tails * weights / weights.sum()
        return positions / positions.sum()

    def summary(self, mixture: mixture_lib.Mixture) -> str:
        """A line for each source."""
        lines = []
        for s, fill, share in zip(self.sources, self.fill, self.shares(mixture), strict=True):
            left_out = f"; {s.left_out} too long, left out" if s.left_out else ""
            lines.append(
                f"{s.name} ({s.cfg.task}): {len(s.bins.order)} samples of {len(s.records)} "
                f"records in {len(s.bins)} bins, {fill:.1%} of positions used, {share:.1%} of the "
                f"mixture{left_out}"
            )
        return "\n".join(lines)

    def _open(self, index: int, cfg: config_lib.SourceConfig) -> Source:
        records = sources.mapped(sources.open_source(cfg.path, cfg.split), cfg.fields, cfg.task)
        lengths = packing.load_lengths(
            records, cfg.path, cfg.split, cfg.task, cfg.format, self.chat
        )
        slots = {"generate": self.cfg.gen_slots, "understand": self.cfg.und_slots}.get(cfg.task, 0)
        row_len, slot_len = self.cfg.row_len, self.model.slot_len
        marks = packing.Marks()
        divided, left_out = packing.divide(
            marks.collect(lengths), slot_len, row_len, slots, head=self.chat.head
        )
        if not len(divided.record):
            raise DataError(
                f"{cfg.label}: expected samples that fit data.row_len {row_len} and the slots of "
                f"task {cfg.task}; none of its {len(records)} records makes one"
            )
        many_images = int(divided.images.max()) > int(divided.images.min())
        if self.cfg.packing == 1 and (cfg.task == "text" or many_images):
            raise DataError(
                f"{cfg.label}: expected data.packing 2 for text and for several images in a "
                "sample; got 1, as in runs of older versions: start a new run from its checkpoint "
                "(--config.start=..., another --config.workdir)"
            )
        digest = divided.digest()
        bins = packing.pack(divided, row_len, slots)
        cache = latent_cache.Cache(cfg.cache) if cfg.cache else None
        return Source(cfg, index, records, bins, marks, left_out, cache, digest)


def _bad_sample(row: int, source: Source, record: int, error: DataError) -> BadSample:
    """What is reported of a bad record; raises where the store fails: the record may be good."""
    if error.reason == sources.UNREADABLE:
        raise error
    return BadSample(row, source.name, record, str(error))


def _write(
    out: dict[str, np.ndarray],
    sample: samples.Sample,
    source: int,
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
    out["source_ids"][inside] = source
    out["segment_ids"][inside] = np.where(drop_prompt & sample.prompt_mask, 0, segment)
    if "unprompted_ids" in out:
        out["unprompted_ids"][inside] = np.where(sample.prompt_mask, 0, segment)
