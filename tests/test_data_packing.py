"""The arithmetic of the data position, over many sizes."""

from __future__ import annotations

import numpy as np
import pytest

from janusflow_jax.data import mixture, packing
from janusflow_jax.data.samples import Unit


def samples(lengths: np.ndarray, images: np.ndarray) -> packing.Samples:
    """A sample of each length, of a record of its own."""
    record = np.arange(len(lengths))
    return packing.Samples(record, record * 0, record * 0 + 1, lengths, images)


@pytest.mark.parametrize("slots", [1, 3, 6])
@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_pack_loses_and_overlaps_nothing(slots, count):
    lengths = np.random.default_rng(count).integers(1, 101, count)
    bins = packing.pack(samples(lengths, np.ones(count, int)), 100, slots)
    held = [placed.record for b in range(len(bins)) for placed in bins.bin(b)]
    assert sorted(held) == list(range(count))
    for b in range(len(bins)):
        end = 0
        for placed in bins.bin(b):
            assert placed.length == lengths[placed.record]
            end += placed.length
        assert 1 <= len(bins.bin(b)) <= slots and end <= 100


@pytest.mark.parametrize("most", [1, 5])
def test_pack_is_first_fit_decreasing_in_positions_and_images(most):
    rng = np.random.default_rng(most)
    lengths = rng.integers(1, 100, 500)
    images = np.ones(500, int) if most == 1 else rng.integers(0, most, 500)
    bins = packing.pack(samples(lengths, images), 100, 4)
    plain: list[list[int]] = []
    for i in np.lexsort((-images, -lengths)):
        for b in plain:
            if images[b].sum() + images[i] <= 4 and lengths[b].sum() + lengths[i] <= 100:
                b.append(i)
                break
        else:
            plain.append([i])
    assert [[placed.record for placed in bins.bin(b)] for b in range(len(bins))] == plain


def captions(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of 577 positions, with captions of a long tail."""
    return 580 + rng.lognormal(4, 0.7, n).clip(1, 3000).astype(int), np.ones(n, int)


def conversations(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    images = rng.integers(0, 5, n)
    return images * 577 + rng.integers(20, 1000, n), images


def pieces(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Text: some short, many as long as a row."""
    return rng.lognormal(6.5, 1.2, n).clip(5, 4096).astype(int), np.zeros(n, int)


@pytest.mark.parametrize("draw", [captions, conversations, pieces])
def test_pack_needs_the_bins_of_first_fit_decreasing(draw):
    lengths, images = draw(np.random.default_rng(0), 1200)
    bins = packing.pack(samples(lengths, images), 4096, 6)
    room, free = np.zeros((2, 0), int)
    for i in np.argsort(-lengths, kind="stable"):
        fits = np.flatnonzero((room >= lengths[i]) & (free >= images[i]))
        if not len(fits):
            room, free, fits = np.append(room, 4096), np.append(free, 6), [len(room)]
        room[fits[0]] -= lengths[i]
        free[fits[0]] -= images[i]
    # Ties of samples with other numbers of images come in another order.
    assert abs(len(bins) - len(room)) <= (2 if draw is conversations else 0)
    assert bins.num_positions == lengths.sum()


@pytest.mark.parametrize("draw", [captions, conversations, pieces])
def test_companions_are_drawn_from_all_records_and_anew_in_each_epoch(draw):
    count = 2000
    lengths, images = draw(np.random.default_rng(1), count)
    lengths = -(-lengths // 128) * 128  # so that lengths repeat, as they do in large data
    bins = packing.pack(samples(lengths, images), 4096, 6)
    epochs = []
    for epoch in range(2):
        of_bins = [[p.record for p in bins.bin(b, (0, 5, epoch))] for b in range(len(bins))]
        assert sorted(r for records in of_bins for r in records) == list(range(count))
        epochs.append({frozenset(pair) for x in of_bins for pair in zip(x, x[1:], strict=False)})
    apart = np.median([abs(a - b) for a, b in map(tuple, epochs[0])])
    assert count / 15 < apart < count / 2  # companions that follow the records: a few
    assert len(epochs[0] & epochs[1]) < 0.1 * len(epochs[0])


@pytest.mark.parametrize("draw", [captions, conversations, pieces])
def test_a_sample_has_as_many_positions_as_it_is_long(draw):
    lengths, images = draw(np.random.default_rng(2), 40)
    bins = packing.pack(samples(lengths // 40 + 1, images), 110, 6)
    records = [bins.at_position(i).record for i in range(bins.num_positions)]
    np.testing.assert_array_equal(np.bincount(records), lengths // 40 + 1)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("most", [1, 2, 9])
def test_divide_takes_as_many_units_as_fit(monkeypatch, most, chunk):
    """Against a loop over units."""
    rng = np.random.default_rng(most)
    counts = rng.integers(1, most + 1, 40)
    units = [
        [Unit(int(a), max(int(a) - 1, 0), int(k)) for a, k in rng.integers(0, (80, 3), (count, 2))]
        for count in counts
    ]
    want, lost = [], 0
    for record, mine in enumerate(units):
        open_sample = None  # (begin, length, images)
        for i, (first, more, images) in enumerate(mine):
            if open_sample:
                begin, length, held = open_sample
                if length + more + 17 * images <= 100 and held + images <= 3:
                    open_sample = begin, length + more + 17 * images, held + images
                    continue
                want.append((record, begin, i, length, held))
            open_sample = i, max(first + 17 * images, 1), images
            if open_sample[1] > 100:
                open_sample, lost = None, lost + 1
        if open_sample:
            begin, length, held = open_sample
            want.append((record, begin, len(mine), length, held))
    chunks = [
        packing.lengths_of_units(units[i : i + chunk], np.zeros(len(units[i : i + chunk]), bool))
        for i in range(0, len(units), chunk)
    ]
    table, left_out = packing.divide(chunks, slot_len=17, row_len=100, slots=3, head=1)
    assert left_out == lost and (lost or most < 9)
    got = zip(*(column.tolist() for column in table), strict=True)
    assert sorted(got) == want


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_permute_is_a_permutation_that_the_key_changes(size):
    got = [mixture.permute(i, size, (0, 1, 2)) for i in range(size)]
    assert sorted(got) == list(range(size))
    if size >= 16:
        assert got != [mixture.permute(i, size, (0, 1, 3)) for i in range(size)]
        assert got != list(range(size))


def test_permute_mixes():
    got = np.array([mixture.permute(i, 2000, (7,)) for i in range(2000)])
    assert abs(np.corrcoef(got, np.arange(2000))[0, 1]) < 0.05
    assert abs(np.corrcoef(got[1:], got[:-1])[0, 1]) < 0.05


@pytest.mark.parametrize("weights", [[1.0], [30, 50, 20], [14, 80, 6], [1e-9, 1], [1, 1, 1, 1]])
def test_interleave_numbers_every_source_without_gaps(weights):
    shares, _ = mixture.row_shares(weights, [1.0] * len(weights), [False] * len(weights))
    assert sum(shares) == mixture.SHARE_UNITS
    seen = [0] * len(weights)
    n = 5000
    for row in range(n):
        source, k = mixture.interleave(row, shares)
        assert k == seen[source]
        seen[source] += 1
    want = np.array(weights) / np.sum(weights) * n
    assert np.abs(np.array(seen) - want).max() <= len(weights)


def test_interleave_is_the_same_far_out():
    shares, _ = mixture.row_shares([14, 80, 6], [0.9, 0.7, 1.0], [False] * 3)
    row = 10**12
    counts = [0, 0, 0]
    first = {}
    for r in range(row, row + 1000):
        source, k = mixture.interleave(r, shares)
        first.setdefault(source, k)
        assert k == first[source] + counts[source]
        counts[source] += 1
    np.testing.assert_allclose(counts, np.array(shares) / 1000, atol=3)


@pytest.mark.parametrize("weights", [(14, 80, 6), (30, 50, 20), (21, 70, 9)])
def test_the_rows_of_a_chip_differ_by_one_row_of_text(weights):
    """All chips wait for the one with the most rows of text; the planner counts on this."""
    shares, _ = mixture.row_shares(weights, [0.93, 0.93, 1.0], [False, False, True])
    is_text = np.array([mixture.interleave(r, shares)[0] == 2 for r in range(4096)])
    for rows in (1, 2, 4, 8):
        of_chips = is_text.reshape(-1, rows).sum(1)
        assert of_chips.max() == -(-rows * shares[2] // mixture.SHARE_UNITS)


def test_row_shares_give_shares_of_positions():
    (shares, filler), fill = mixture.row_shares([3, 7], [0.9, 0.6], [False] * 2), [0.9, 0.6]
    positions = np.array(shares) * fill
    np.testing.assert_allclose(positions / positions.sum(), [0.3, 0.7], atol=1e-5)
    assert filler == 0


@pytest.mark.parametrize("fill", [0.95, 0.6])
@pytest.mark.parametrize("weights", [(14, 80, 6), (30, 50, 20), (1, 0.001, 3)])
def test_text_fills_what_images_leave(weights, fill):
    fills = [fill, fill, 0.98]
    shares, filler = mixture.row_shares(weights, fills, [False, False, True])
    rows = np.array(shares) / mixture.SHARE_UNITS
    assert abs(rows.sum() - 1) < 1e-9 and 0 < filler <= 1
    own, tails = rows * fills, filler * (rows[:2] * (1 - fill)).sum()
    positions = own + [0, 0, tails]
    want = np.array(weights) / np.sum(weights)
    np.testing.assert_allclose(positions / positions.sum(), want, atol=1e-5)
    assert own[2] > tails - 1e-5  # at least half of the text in rows of its own
    assert filler == 1 or abs(own[2] - tails) < 1e-5  # and no tail is free without need
    counts = np.bincount([mixture.interleave(r, shares)[0] for r in range(2000)], minlength=3)
    np.testing.assert_allclose(counts / 2000, rows, atol=2e-3)
