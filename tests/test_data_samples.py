"""Conversations, documents and long text: divided to fit a row, nothing lost or doubled."""

from __future__ import annotations

import collections
import copy
import io
import itertools
import runpy
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers.records import HUB, MODEL, Store, png

from janusflow_jax import config as config_lib
from janusflow_jax.config import UNDERSTAND
from janusflow_jax.data import chat_format, images, packing, rows, samples, sources

WORDS = "a red fox sits in the snow beside a quiet river while it rains".split()


@pytest.fixture(scope="module")
def chat():
    return chat_format.ChatFormat.load(HUB)


def words(rng, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))


def conversation(i: int, tag: str) -> dict:
    """Up to six exchanges with up to three images; some answers are long."""
    rng = np.random.default_rng(i)
    turns, encoded = [], []
    if i % 3 == 0:
        turns.append({"role": "System", "content": "Answer briefly."})
    for n in range(int(rng.integers(1, 7))):
        count = int(rng.integers(0, 3)) if n % 2 == 0 else 0
        encoded += [png(10 * i + n + j, (20, 30)) for j in range(count)]
        turns.append({"role": "user", "content": f"{tag} " * count + words(rng, 1, 9)})
        turns.append({"role": "assistant", "content": words(rng, 1, 90 if i == 5 else 20)})
    return {"id": str(i), "conversation": turns, "images": encoded}


def document(i: int, tag: str) -> dict:
    rng = np.random.default_rng(100 + i)
    parts = [words(rng, 0, 12) for _ in range(int(rng.integers(2, 7)))]
    encoded = [png(1000 + 10 * i + j, (20, 30)) for j in range(len(parts) - 1)]
    return {"id": str(i), "text": f" {tag} ".join(parts), "images": encoded}


@pytest.fixture
def stores(monkeypatch, tmp_path, chat):
    tag = chat.image_tag
    known = {
        "talks": Store(conversation(i, tag) for i in range(30)),
        "docs": Store(document(i, tag) for i in range(20)),
        "long": Store({"id": str(i), "text": " ".join(WORDS * (3 * i + 1))} for i in range(9)),
        "chats": Store(
            {"id": str(i), "conversation": conversation(i, "")["conversation"]} for i in range(20)
        ),
    }
    monkeypatch.setattr(sources, "open_source", lambda path, split: known[Path(path).name])
    monkeypatch.chdir(tmp_path)
    return known


def open_rows(chat, path: str, task: str, row_len: int = 128, slots: int = 3) -> rows.Rows:
    source = config_lib.SourceConfig(path=path, name=path, task=task)
    cfg = config_lib.DataConfig(
        sources=(source,), row_len=row_len, gen_slots=0, und_slots=slots, drop_prompt=0.0
    )
    return rows.Rows(cfg, MODEL, chat)


def epoch(made: rows.Rows):
    """(row, segment's positions) of every sample of the first epoch; no sample may be bad."""
    for r in range(len(made.sources[0].bins)):
        row, bad = made.row(r)
        assert not bad
        ids = row["segment_ids"]
        for segment in np.unique(ids[ids > 0]):
            yield row, np.flatnonzero(ids == segment)


def targets(row: dict, where: np.ndarray) -> list[int]:
    mask = row["target_mask"][where]
    assert not mask[-1]
    return row["tokens"][where[1:]][mask[:-1]].tolist()


@pytest.mark.parametrize("path, task", [("talks", "understand"), ("chats", "text")])
def test_a_conversation_is_split_at_turns_and_every_answer_is_learned_once(
    stores, chat, path, task
):
    made = open_rows(chat, path, task)
    source = made.sources[0]
    assert len(source.bins.order) > len(stores[path])  # some were split
    got = []
    for row, where in epoch(made):
        ids = row["tokens"][where]
        assert ids[0] == chat.bos_id and ids[-1] == chat.eos_id
        answers = targets(row, where)
        assert answers[-1] == chat.eos_id
        ends = np.flatnonzero(np.array(answers) == chat.eos_id)
        got += [chat.decode(a).strip() for a in np.split(answers, ends + 1)[:-1]]
    every = [
        turn["content"]
        for record in stores[path]
        for turn in record["conversation"]
        if turn["role"] == "assistant"
    ]
    lost = len(every) - len(got)
    assert lost == source.left_out > 0
    assert collections.Counter(got) <= collections.Counter(every) and len(got) > 40


def test_images_of_a_sample_stand_in_order_where_they_are_marked(stores, chat):
    made = open_rows(chat, "talks", "understand")
    source, several = made.sources[0], 0
    for r in range(len(source.bins)):
        row, _ = made.row(r)
        ids = row["segment_ids"]
        slot = 0
        for place, sample in enumerate(made.samples(r)[1]):
            where = np.flatnonzero(ids == place + 1)
            record = stores["talks"][sample.record]
            _, turns = samples.turns_of(record)
            groups = samples.exchanges(turns)
            before = sum(
                t["content"].count(chat.image_tag) for g in groups[: sample.begin] for t in g
            )
            count = sample.images
            several += count > 1
            held = np.flatnonzero(row["tokens"][where] == chat.image_start_id) + where[0]
            assert held.tolist() == row["slot_start"][slot : slot + count].tolist()
            for j in range(count):
                want = images.for_understanding(
                    images.decode(record["images"][before + j]), MODEL.image_size
                )
                np.testing.assert_array_equal(row["images"][slot + j], want)
                assert row["slot_task"][slot + j] == UNDERSTAND
            slot += count
        assert not row["slot_task"][slot:].any()
    assert several > 3


def test_a_document_learns_all_its_text_and_is_never_cut_inside_an_image(stores, chat):
    made = open_rows(chat, "docs", "understand", row_len=80)
    source = made.sources[0]
    assert len(source.bins.order) > 20 and not source.left_out
    learned = 0
    for row, where in epoch(made):
        ids = row["tokens"][where]
        mask = row["target_mask"][where]
        special = np.isin(ids, [chat.bos_id, chat.image_start_id, chat.image_id, chat.image_end_id])
        np.testing.assert_array_equal(mask[:-1], ~special[1:])
        starts = np.flatnonzero(ids == chat.image_start_id)
        for start in starts:  # whole images only
            assert (ids[start + 1 : start + MODEL.slot_len] == chat.image_id).all()
            assert ids[start + MODEL.slot_len] == chat.image_end_id
        learned += int(mask.sum())
    whole = 0
    for record in stores["docs"]:
        encoded = chat.interleaved(record["text"].strip())
        whole += int(encoded.target_mask.sum())
    assert learned == whole


def test_long_text_is_cut_into_even_pieces_and_every_token_is_learned_once(stores, chat):
    made = open_rows(chat, "long", "text", row_len=64)
    table = made.sources[0].bins.samples
    assert len(table.record) >= 30 and not made.sources[0].left_out
    assert (table.length <= 64).all() and table.length[table.record == 8].min() > 55
    got = {}
    for place in range(len(made.sources[0].bins)):
        row, bad = made.row(place)
        assert not bad
        for segment, sample in enumerate(made.samples(place)[1], start=1):
            where = np.flatnonzero(row["segment_ids"] == segment)
            got[sample.record, sample.begin] = targets(row, where)
            assert row["tokens"][where[0]] == chat.bos_id
    for record in range(9):
        joined = sum((got[key] for key in sorted(got) if key[0] == record), [])
        ids = chat.plain_text(stores["long"][record]["text"]).ids
        assert joined == ids[1:].tolist()


def test_a_piece_of_a_long_document_is_tokenized_alone(stores, chat, monkeypatch):
    """The same rows, and each part of the document is tokenized about once an epoch."""

    def an_epoch():
        made = open_rows(chat, "book", "text", row_len=64)
        return made, [made.row(place)[0] for place in range(len(made.sources[0].bins))]

    words = "A red fox 💧 sits  in the snow,\nnaïve; ".split(" ")
    text = " ".join(words[i * i % len(words)] + "s" * (i % 3) for i in range(600))
    stores["book"] = Store([{"id": "0", "text": "Short."}, {"id": "1", "text": text}])
    _, want = an_epoch()  # without marks, as stored by older versions
    packing.lengths_path("book", "train", "text", "chat", chat).unlink()
    monkeypatch.setattr(samples, "_MARK", 40)
    made, _ = an_epoch()
    counted, plain_text = [], chat_format.ChatFormat.plain_text

    def count(self, text):
        counted.append(len(text))
        return plain_text(self, text)

    monkeypatch.setattr(chat_format.ChatFormat, "plain_text", count)
    got = [made.row(place)[0] for place in range(len(want))]
    assert len(want) > 15 and max(counted) < len(text) / 5
    assert sum(counted) < 3 * len(text)  # whole for each piece: 15 times and more
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    stores["book"][1] = {"id": "1", "text": text[::-1]}
    bad = [b for place in range(len(want)) for b in made.row(place)[1]]
    assert len(bad) > 10 and "between two marks" in bad[0].reason


class Fours:
    """A tokenizer of four letters a token, whose id also depends on the character behind them."""

    def __init__(self, needs_all: bool):
        self.needs_all = needs_all  # the id depends on the whole text

    def encode(self, text, add_special_tokens):
        places = range(0, len(text), 4)
        behind = [f"{text[i + 4 : i + 5]} {len(text) * self.needs_all}" for i in places]
        ids = [
            zlib.crc32(f"{text[i : i + 4]}{x.lstrip()}".encode()) >> 1
            for i, x in zip(places, behind, strict=True)
        ]
        offsets = [(i, min(i + 4, len(text))) for i in places]
        return SimpleNamespace(ids=ids, offsets=offsets, tokens=[""] * len(ids))


@pytest.mark.parametrize(
    ("needs_all", "text"), [(True, "abc d" * 100), (False, "abc d" * 100), (False, "")]
)
def test_marks_stand_only_where_the_parts_give_the_tokens_of_the_whole(
    chat, monkeypatch, needs_all, text
):
    monkeypatch.setattr(samples, "_MARK", 10)
    chat = copy.copy(chat)
    object.__setattr__(chat, "text_tokenizer", Fours(needs_all))
    marks = samples.text_marks(text, chat)
    assert len(marks) == (0 if needs_all or not text else 11)
    places = [samples.Mark(0, 0), *marks, samples.Mark(-(-len(text) // 4), len(text))]
    encode = lambda part: chat.plain_text(part).ids[chat.head : -1].tolist()  # noqa: E731
    parts = [encode(text[a.character : b.character]) for a, b in itertools.pairwise(places)]
    assert sum(parts, []) == encode(text)
    assert all(text[mark.character] == " " for mark in marks)


def test_what_no_row_can_hold_is_left_out_and_counted():
    units = packing.Lengths(
        offsets=np.array([0, 3, 4]),
        text=np.zeros(2, bool),
        first=np.array([30, 95, 20, 10], np.int32),
        more=np.array([25, 90, 15, 5], np.int32),
        images=np.array([1, 1, 0, 4], np.int32),
    )
    table, left_out = packing.divide([units], slot_len=17, row_len=100, slots=3, head=1)
    assert left_out == 2  # an exchange of 112 positions, and one with four images
    assert table.record.tolist() == [0, 0] and table.begin.tolist() == [0, 2]
    assert table.length.tolist() == [47, 20] and table.images.tolist() == [1, 0]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"images": []}, "tag for each of the 0"),
        ({"conversation": [{"role": "user", "content": "hi"}]}, "expected an answer"),
        ({"conversation": [{"role": "tool", "content": "x"}]}, "roles user and assistant"),
        ({"conversation": [{"from": "human"}]}, "role and content"),
    ],
)
def test_a_bad_conversation_is_counted_and_named(stores, chat, change, reason):
    tag = chat.image_tag
    record = {
        "conversation": [
            {"role": "user", "content": f"{tag} what?"},
            {"role": "assistant", "content": "a fox"},
        ],
        "images": [png(1)],
    }
    stores["talks"][:] = [record, record | change]
    made = open_rows(chat, "talks", "understand")
    bad = [b for r in range(2) for b in made.row(r)[1]]
    assert {b.record for b in bad} == {1} and reason in bad[0].reason


def test_several_images_and_turns_come_through_tfds(tmp_path, chat):
    class Talks(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Two conversations."""

        VERSION = tfds.core.Version("1.0.0")
        url_infos = {}  # noqa: RUF012

        def _info(self):
            turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "images": tfds.features.Sequence(tfds.features.Image()),
                        "conversation": tfds.features.Sequence(turn),
                    }
                ),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in (4, 7):
                record = conversation(i, chat.image_tag)
                encoded = [io.BytesIO(x) for x in record["images"]]
                yield i, {"images": encoded, "conversation": record["conversation"]}

    builder = Talks(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = sources.TfdsSource(builder.data_dir, "train")
    got = {samples.turns_of(source[i])[1][0]["content"]: source[i] for i in range(2)}
    for i in (4, 7):
        want = conversation(i, chat.image_tag)
        have = got[want["conversation"][0]["content"].strip()]
        assert samples.turns_of(have) == samples.turns_of(want)
        assert have["images"] == want["images"]


def test_the_papers_mixture_fills_96_percent(monkeypatch, tmp_path):
    """14:80:6 at 4,096 positions and 384 px; `benchmarks/packing.py` prints the lengths."""
    monkeypatch.setattr(sources, "open_source", sources.open_source)  # put back at the end
    script = Path(__file__).parents[1] / "benchmarks" / "packing.py"
    bench = runpy.run_path(str(script))
    made = bench["open_rows"](500, str(tmp_path))
    assert made.cfg.row_len == 4096 and made.model.slot_len == 577
    got = made.shares(made.mixtures[0])
    np.testing.assert_allclose(got, [0.14, 0.80, 0.06], atol=0.01)
    assert bench["used_share"](made, 80) >= 0.955
