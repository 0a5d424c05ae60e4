"""The arithmetic of the data position, over many sizes."""

from __future__ import annotations

import numpy as np
import pytest

from janusflow_jax.data import mixture, packing


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


def test_row_shares_give_shares_of_positions():
    (shares, filler), fill = mixture.row_shares([3, 7], [0.9, 0.6], [False] * 2), [0.9, 0.6]
    positions = np.array(shares) * fill
    np.testing.assert_allclose(positions / positions.sum(), [0.3, 0.7], atol=1e-5)
    assert filler == 0


@pytest.mark.parametrize("fill", [0.95, 0.6])
@pytest.mark.parametrize("weights", [(14, 80, 6), (30, 50, 20), (1, 0.001, 3)])
def test_text_fills_what_images_leave(weights, fill):
    fills = np.array([fill, fill, 0.98])
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
