"""Rows and batches: a pure function of the row's number; nothing lost, nothing leaks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.records import HUB, MIX, MODEL, Store, data_config, record, source, take

from janusflow_jax import config as config_lib
from janusflow_jax.config import NONE
from janusflow_jax.config.errors import DataError
from janusflow_jax.data import chat_format, loader, packing, rows, sources


@pytest.fixture(scope="module")
def chat():
    return chat_format.ChatFormat.load(HUB)


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def segments(row: dict) -> list[np.ndarray]:
    """Positions in the row of each segment."""
    ids = row["segment_ids"]
    return [np.flatnonzero(ids == s) for s in np.unique(ids[ids > 0])]


def test_a_row_is_the_same_every_time_and_differs_from_the_next(stores, chat):
    one, two = rows.Rows(data_config(), MODEL, chat), rows.Rows(data_config(), MODEL, chat)
    for r in range(30):
        assert_same(one.row(r)[0], two.row(r)[0])
        assert (one.row(r)[0]["tokens"] != one.row(r + 1)[0]["tokens"]).any()
    other = rows.Rows(data_config(seed=1), MODEL, chat)
    assert any((one.row(r)[0]["tokens"] != other.row(r)[0]["tokens"]).any() for r in range(5))


@pytest.mark.parametrize(("hosts", "threads"), [(1, 0), (2, 1), (3, 4), (16, 4)])
def test_batches_do_not_depend_on_hosts_threads_or_restart(stores, chat, hosts, threads):
    size = 6 if hosts < 16 else 16
    want = rows.Rows(data_config(), MODEL, chat)
    made = loader.Loader(data_config(num_threads=threads), MODEL, chat, batch_rows=size)
    for host in range(hosts):
        mine = range(host * size // hosts, (host + 1) * size // hosts)
        for start in (0, 2 * size) if host < 3 else (size,):
            for n, (batch, report) in enumerate(take(made.batches(start, mine), 3)):
                first = start + size * n
                assert (report.first_row, report.next_row) == (first, first + size)
                assert batch["row"].tolist() == [first + place for place in mine]
                for i, place in enumerate(mine):
                    assert_same({k: v[i] for k, v in batch.items()}, want.row(first + place)[0])


def test_a_restart_with_another_batch_size_continues_with_the_next_row(stores, chat):
    whole = loader.Loader(data_config(), MODEL, chat, batch_rows=4)
    rows_of = [x for batch, _ in take(whole.batches(0), 6) for x in range_rows(batch)]
    first = loader.Loader(data_config(), MODEL, chat, batch_rows=6)
    ((batch, report),) = take(first.batches(0), 1)
    rest = loader.Loader(data_config(), MODEL, chat, batch_rows=3)
    got = [*range_rows(batch)]
    for batch, _ in take(rest.batches(report.next_row), 6):
        got += range_rows(batch)
    for a, b in zip(rows_of, got, strict=True):
        assert_same(a, b)


def range_rows(batch: dict) -> list[dict]:
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["row"]))]


@pytest.mark.parametrize("mix", [MIX[:2], MIX[2:]])
def test_an_epoch_holds_every_sample_once(stores, chat, mix):
    made = rows.Rows(data_config(sources=mix), MODEL, chat)
    done: dict[tuple[int, int], list[int]] = {}
    for r in range(400):
        which, epoch, _ = made.locate(r)
        _, numbers = made.records(r)  # one sample each
        done.setdefault((which, epoch), []).extend(numbers)
    for which, opened in enumerate(made.sources):
        for epoch in range(3):
            assert sorted(done[which, epoch]) == list(range(len(opened.records)))
        assert done[which, 0] != done[which, 1]


def test_shares_are_shares_of_positions(stores, chat):
    made = rows.Rows(data_config(sources=MIX[:2]), MODEL, chat)
    used = np.zeros(2)
    for r in range(300):
        which, _, _ = made.locate(r)
        used[which] += made.fill[which]
    np.testing.assert_allclose(used / used.sum(), [5 / 8, 3 / 8], atol=0.01)
    got = made.shares(made.mixtures[0])
    np.testing.assert_allclose(got, [5 / 8, 3 / 8], atol=1e-5)


def test_samples_are_apart_and_start_at_position_0(stores, chat):
    made = rows.Rows(data_config(drop_prompt=0.0), MODEL, chat)
    for r in range(40):
        row, bad = made.row(r)
        assert not bad
        for where in segments(row):
            np.testing.assert_array_equal(where, where[0] + np.arange(len(where)))
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
            assert row["tokens"][where[0]] == chat.bos_id
            assert not row["target_mask"][where[-1]]  # the next position is another sample
        assert not row["target_mask"][row["segment_ids"] == 0].any()
        assert (row["tokens"][row["segment_ids"] == 0] == chat.pad_id).all()


def test_slots_are_where_slot_start_is(stores, chat):
    made = rows.Rows(data_config(drop_prompt=0.0, sources=MIX[:2]), MODEL, chat)
    seen = set()
    for r in range(40):
        row, _ = made.row(r)
        which, _, _ = made.locate(r)
        task = made.sources[which].cfg.task
        seen.add(task)
        code = {"generate": 1, "understand": 2, "text": 0}[task]
        used = np.flatnonzero(row["slot_task"])
        assert set(row["slot_task"][used]) <= {code}
        count = len(segments(row))
        first = {"generate": 0, "understand": 1, "text": 0}[task]  # K 4: understanding has [-3:]
        assert used.tolist() == (list(range(first, first + count)) if code else [])
        for slot in used:
            start = row["slot_start"][slot]
            assert set(row["source_ids"][start : start + MODEL.slot_len]) == {which}
            held = row["tokens"][start : start + MODEL.slot_len]
            if code == 1:
                assert set(held) == {chat.gen_id}
                assert not row["target_mask"].any()
            else:
                assert held[0] == chat.image_start_id and set(held[1:]) == {chat.image_id}
                assert row["tokens"][start + MODEL.slot_len] == chat.image_end_id
                # neither the slot nor <image_end> is ever a target
                assert not row["target_mask"][start - 1 : start + MODEL.slot_len].any()
            assert row["images"][slot].any()
    assert seen == {"generate", "understand"}


def test_text_follows_the_images_and_moves_nothing(stores, chat):
    mixed = rows.Rows(data_config(), MODEL, chat)
    assert mixed.mixtures[0].filler > 0
    filled = 0
    for r in range(60):
        row, _ = mixed.row(r)
        drawn_from, placed = mixed.samples(r)
        for where in [w for w in segments(row) if row["segment_ids"][w[0]] > len(placed)]:
            filled += 1
            assert drawn_from.cfg.task != "text"
            assert {mixed.sources[i].cfg.task for i in row["source_ids"][where]} == {"text"}
            np.testing.assert_array_equal(where, where[0] + np.arange(len(where)))
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
            assert row["target_mask"][where].tolist() == [True] * (len(where) - 1) + [False]
            assert row["tokens"][where[0]] == chat.bos_id
            assert where[0] > row["slot_start"].max() + MODEL.slot_len - 1
            assert not set(row["tokens"][where]) & {chat.gen_id, chat.image_id}
    assert filled > 5


def test_shares_with_text_come_out_in_the_rows(stores, chat):
    made = rows.Rows(data_config(drop_prompt=0.0), MODEL, chat)
    got = np.zeros(3)
    for r in range(150):
        row, _ = made.row(r)
        which, _, _ = made.locate(r)
        text = row["segment_ids"] > len(made.samples(r)[1])
        got[2] += text.sum()
        got[which] += ((row["segment_ids"] > 0) & ~text).sum()
    want = made.shares(made.mixtures[0])
    np.testing.assert_allclose(want, [0.5, 0.3, 0.2], atol=0.02)
    np.testing.assert_allclose(got / got.sum(), want, atol=0.05)


@pytest.mark.parametrize("mix", [MIX[:1], MIX[1:2], MIX[2:]])
def test_a_short_caption_leaves_no_gap_and_changes_no_sample(stores, chat, mix, monkeypatch):
    made = rows.Rows(data_config(sources=mix, drop_prompt=0.0), MODEL, chat)
    spare = 0
    for r in range(30):
        row, _ = made.row(r)
        source, bin_samples = made.samples(r)
        used = np.flatnonzero(row["segment_ids"])
        np.testing.assert_array_equal(used, np.arange(len(used)))
        spare += sum(placed.length for placed in bin_samples) - len(used)
        for segment, placed in enumerate(bin_samples, start=1):
            where = np.flatnonzero(row["segment_ids"] == segment)
            assert len(where) <= placed.length
            record = source.records[placed.record]
            texts = [record["text"]] if mix == MIX[2:] else record["captions"]
            held = chat.decode(row["tokens"][where])
            assert any(text in held for text in texts)
    assert (spare > 0) == (mix != MIX[2:])


def test_a_run_begun_before_keeps_its_rows(stores, chat):
    """Samples in the order of their records, each at its measured place."""
    made = rows.Rows(data_config(sources=MIX[:1], packing=1), MODEL, chat)
    for r in range(20):
        _, bin_samples = made.samples(r)
        assert bin_samples == made.sources[0].bins.bin(made.locate(r)[2])
        row, _ = made.row(r)
        begins = np.cumsum([0, *(placed.length for placed in bin_samples)])[:-1]
        assert (row["positions"][begins] == 0).all() and row["segment_ids"][begins].all()
    with pytest.raises(DataError, match=r"data\.packing"):
        rows.Rows(data_config(packing=1), MODEL, chat)  # text


@pytest.mark.parametrize("weights", [((30, 50, 20), (14, 80, 6)), ((1, 1, 30), (40, 50, 1))])
def test_text_has_rows_of_its_own_for_half_of_its_share_in_every_phase(stores, chat, weights):
    before, after = weights
    mix = tuple(
        dataclasses.replace(s, weight=float(a), weight_after=float(b))
        for s, a, b in zip((MIX[1], MIX[0], MIX[2]), before, after, strict=True)
    )
    change = 3000
    made = rows.Rows(data_config(sources=mix, change_row=change), MODEL, chat)
    for first, shares in ((0, before), (change, after)):
        which = [made.locate(r)[0] for r in range(first, first + change)]
        positions = np.bincount(which, minlength=3) * made.fill
        assert positions[2] / positions.sum() > 0.49 * shares[2] / sum(shares)


def test_text_behind_images_is_drawn_by_length_and_tokenized_in_part(stores, chat, monkeypatch):
    stores["c"] = Store({"id": str(i), "text": f"{i} is short."} for i in range(10))
    stores["c"].append({"id": "long", "text": "so it rains " * 2000})
    mix = (MIX[0], dataclasses.replace(MIX[2], path="c", weight=0.2))
    made = rows.Rows(data_config(sources=mix), MODEL, chat)
    tokenized, plain_text = [], chat_format.ChatFormat.plain_text

    def spy(self, text):
        tokenized.append(text)
        return plain_text(self, text)

    monkeypatch.setattr(chat_format.ChatFormat, "plain_text", spy)
    ends = []
    for r in range(90):
        source, bin_samples = made.samples(r)
        if source.cfg.task == "text":
            continue
        row, bad = made.row(r)
        assert not bad
        tail = row["tokens"][row["segment_ids"] > len(bin_samples)]
        ends += [chat.eos_id in tail] * bool(len(tail))
    assert max(map(len, tokenized)) < 16 * 256  # a row's tail, not the document
    assert np.mean(["rains" in text for text in tokenized]) > 0.97
    assert len(ends) > 15 and np.mean(ends) < 0.2  # a stretch of a text that goes on has no eos


def test_targets_of_understanding_are_a_caption_and_eos(stores, chat):
    made = rows.Rows(data_config(sources=(source("b", name="u", task="understand"),)), MODEL, chat)
    row, _ = made.row(3)
    for where in segments(row):
        ids = row["tokens"][where[1:]][row["target_mask"][where[:-1]]]
        assert ids[-1] == chat.eos_id
        assert chat.decode(ids).startswith(" A")


def test_a_dropped_prompt_is_the_samplers_unconditional_form(stores, chat):
    whole = rows.Rows(data_config(sources=MIX[:1], drop_prompt=0.0), MODEL, chat)
    some = rows.Rows(data_config(sources=MIX[:1], drop_prompt=0.3), MODEL, chat)
    dropped = total = 0
    for r in range(40):
        full, row = whole.row(r)[0], some.row(r)[0]
        for name in set(full) - {"segment_ids"}:
            np.testing.assert_array_equal(full[name], row[name])
        for number, where in enumerate(segments(full), start=1):
            total += 1
            got = row["segment_ids"][where]
            start = full["slot_start"][number - 1] - where[0]
            if (got == number).all():
                continue
            dropped += 1
            want = np.full(len(where), number)
            want[1:start] = 0
            np.testing.assert_array_equal(got, want)
            np.testing.assert_array_equal(row["positions"][where], np.arange(len(where)))
    assert 0.15 < dropped / total < 0.45


@pytest.mark.parametrize("damage", ["truncated", "no caption"])
def test_a_bad_record_is_named_and_nothing_shifts(stores, chat, damage):
    clean = rows.Rows(data_config(), MODEL, chat)
    want = [clean.row(r)[0] for r in range(60)]
    broken = dict(stores["b"][5])
    if damage == "no caption":
        broken["captions"] = ["", " \n"]
    else:
        broken["image"] = broken["image"][:999]
    stores["b"][5] = broken
    made = rows.Rows(data_config(), MODEL, chat)
    hit = 0
    for r in range(60):
        row, bad = made.row(r)
        if not bad:
            assert_same(row, want[r])
            continue
        hit += 1
        assert len(bad) == 1 and "und record 5" in str(bad[0])
        count = len(made.samples(r)[1])
        gone = set(range(1, count + 1)) - set(np.unique(row["segment_ids"]))
        assert len(gone) == 1
        for segment in set(range(1, count + 1)) - gone:
            for name in ("tokens", "positions", "target_mask"):
                got, wanted = (x[name][x["segment_ids"] == segment] for x in (row, want[r]))
                np.testing.assert_array_equal(got, wanted)
        assert not row["target_mask"][row["segment_ids"] == 0].any()
        slot = np.flatnonzero(row["slot_task"] != want[r]["slot_task"])
        assert len(slot) == 1 and row["slot_task"][slot[0]] == NONE
    assert hit


def test_too_many_bad_records_stop_the_run(stores, chat):
    for i in range(20):
        stores["a"][i] = stores["a"][i] | {"image": b""}
    made = loader.Loader(data_config(sources=MIX[:1]), MODEL, chat, batch_rows=4)
    with pytest.raises(DataError, match=r"(?s)at most 1\.0%.*record.*max_bad_share"):
        take(made.batches(0), 50)
    lenient = loader.Loader(
        data_config(sources=MIX[:1], max_bad_share=0.9), MODEL, chat, batch_rows=4
    )
    reports = [report for _, report in take(lenient.batches(0), 20)]
    assert reports[-1].num_bad == sum(len(r.bad) for r in reports) > 20
    assert 0.3 < reports[-1].num_bad / reports[-1].num_samples < 0.7


def test_io_errors_are_tried_again_then_stop(monkeypatch):
    monkeypatch.setattr(sources, "RETRY_SECONDS", (0.0, 0.0))
    attempts = []

    def read(good_after: int):
        attempts.append(1)
        if len(attempts) <= good_after:
            raise OSError("disk is away")
        return "record"

    assert sources.retry(lambda: read(2), "x") == "record"
    attempts.clear()
    with pytest.raises(DataError, match="x: cannot be read after 3 attempts.*away"):
        sources.retry(lambda: read(9), "x")


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_store_that_cannot_be_read_stops_the_run(stores, chat, monkeypatch, name):
    """It is no bad sample: the record may be good."""
    monkeypatch.setattr(sources, "RETRY_SECONDS", ())

    class Broken(list):
        def __getitem__(self, i):
            def read():
                raise OSError("disk is away")

            return sources.retry(read, "store")

    made = loader.Loader(data_config(), MODEL, chat, batch_rows=4)
    for which, opened in enumerate(made.rows.sources):
        if opened.cfg.path == name:
            broken = dataclasses.replace(opened, records=Broken(opened.records))
            made.rows.sources[which] = broken
    with pytest.raises(DataError, match="store: cannot be read"):
        take(made.batches(0), 20)


def test_a_tokenizer_or_a_row_length_that_does_not_fit_is_an_error(stores, chat):
    with pytest.raises(DataError, match="64 positions"):
        rows.Rows(data_config(), config_lib.model_config("test", image_size=128), chat)
    model = config_lib.model_config("test")
    model.llm.vocab_size = 600
    with pytest.raises(DataError, match="below 600"):
        rows.Rows(data_config(), model, chat)
    with pytest.raises(DataError, match="row_len 20"):
        rows.Rows(data_config(row_len=20, sources=MIX[:1]), MODEL, chat)
    with pytest.raises(DataError, match="slots of task generate"):
        rows.Rows(data_config(gen_slots=0, sources=MIX[:1]), MODEL, chat)


def test_lengths_are_stored_for_one_tokenizer(stores, chat, monkeypatch):
    def load():
        path = ("a", "train", "generate", "chat")
        chunks = packing.load_lengths(stores["a"], *path, chat)
        return packing.join_lengths([(x, np.ones(len(x), bool)) for x in chunks])

    first = load()
    file = packing.lengths_path("a", "train", "generate", "chat", chat)
    assert file.exists()
    monkeypatch.setattr(packing, "measure_lengths", None)  # not measured a second time
    for chunk in (1, 7, packing.CHUNK):
        monkeypatch.setattr(packing, "CHUNK", chunk)
        for name, stored in load()._asdict().items():
            np.testing.assert_array_equal(stored, getattr(first, name), err_msg=name)
    other = chat_format.ChatFormat.load(HUB.parent / "tokenizer_bos_by_config", 16)
    monkeypatch.setattr(packing, "SMALL", 10)
    with pytest.raises(DataError, match=r"too many.*\n  python tools/measure_lengths"):
        list(packing.load_lengths(stores["a"], "a", "train", "generate", "chat", other))
    stores["a"].append(record(99))
    with pytest.raises(DataError, match="made again"):
        load()


def test_a_wrong_path_is_an_error_with_the_command_to_run():
    with pytest.raises(DataError, match=r"does not exist.*prepare_openmoji\.py"):
        sources.TfdsSource("nowhere/at/all", "train")
