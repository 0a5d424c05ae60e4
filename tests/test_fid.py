"""FID's distance, images and references, on sets with known answers."""

from __future__ import annotations

import decimal
import functools

import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from janusflow_jax.config.errors import CheckpointError, DataError
from janusflow_jax.eval import fid, inception


def normal(n, mean, cov, seed=0):
    return np.random.default_rng(seed).multivariate_normal(mean, cov, n, method="cholesky")


def distance(a, b):
    return fid.frechet_distance(fid.statistics(a), fid.statistics(b))


# --- the distance


def test_distance_of_normals_is_the_formula():
    """For diagonal covariances: |m - n|^2 + sum (s - t)^2 of the standard deviations."""
    a = normal(200_000, [0, 0, 0], np.diag([1.0, 4.0, 9.0]))
    b = normal(200_000, [1, 0, 2], np.diag([4.0, 4.0, 1.0]), seed=1)
    assert distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 4, rel=0.01)


def distance_by_root(a, b):
    """As in the published implementations: by SciPy's square root of the product."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap, root = a.mean(0) - b.mean(0), scipy.linalg.sqrtm(cov_a @ cov_b)
    return gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root.real)


@pytest.mark.parametrize(("count", "width"), [(500, 24), (40, 64)])
def test_distance_equals_that_of_the_matrix_square_root(count, width):
    """More features than their width, and fewer: then the covariances are singular."""
    mix = np.random.default_rng(2).normal(size=(width, width))
    a = np.random.default_rng(0).normal(size=(count, width)) @ mix
    b = np.random.default_rng(1).normal(size=(count + 5, width)) @ mix * 1.1 + 0.3
    assert distance(a, b) == pytest.approx(distance_by_root(a, b), rel=1e-6)


def exact_distance(a, b):
    """That of two sets of three features of integers, to 60 digits.

    With centered features X, tr (C_a C_b)^(1/2) is the sum of the singular values of
    X_a X_b^T / (3 - 1). Of three features there are two, s and t: s^2 + t^2 is the trace of the
    Gram matrix of that product, s t the root of its second invariant. All but the roots is exact.
    """
    a, b = (x.astype(int).astype(object) for x in (a, b))  # Python's integers
    sums, (x, y) = (a.sum(0), b.sum(0)), (3 * z - z.sum(0) for z in (a, b))  # 3 (z - mean)
    gram = x @ y.T @ y @ x.T
    squares = gram.trace()
    with decimal.localcontext(prec=60):
        product = decimal.Decimal((squares**2 - (gram @ gram).trace()) // 2).sqrt()
        cross = (squares + 2 * product).sqrt()
        gap = decimal.Decimal(((sums[0] - sums[1]) ** 2).sum()) / 9
        return float(gap + ((x**2).sum() + (y**2).sum() - 2 * cross) / 18)


@pytest.mark.parametrize("width", [8, 64])
def test_distance_of_few_images_is_exact_where_the_matrix_square_root_is_not(width):
    a, b = np.random.default_rng(4).integers(0, 1000, (2, 3, width)).astype(np.float64)
    want = exact_distance(a, b)
    assert distance(a, b) == pytest.approx(want, rel=1e-13)
    assert abs(distance_by_root(a, b) - want) > 100 * abs(distance(a, b) - want)


def test_distance_does_not_change_with_the_axes_and_the_order():
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(4, 4)))
    a, b = normal(50, np.zeros(4), np.eye(4)), normal(60, np.ones(4), 2 * np.eye(4), seed=1)
    want = distance(a, b)
    assert distance(b, a) == pytest.approx(want, rel=1e-9)
    assert distance(a @ turn, b[::-1] @ turn) == pytest.approx(want, rel=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-9)


def test_statistics_of_parts_merge_to_those_of_the_whole():
    x = normal(50, [100, -3, 0], np.diag([1.0, 4.0, 9.0])).astype(np.float32)
    parts = [fid.statistics(part) for part in np.split(x, [1, 9, 30])]
    merged = functools.reduce(fid.merge, parts)
    np.testing.assert_allclose(merged.mean, x.mean(0, np.float64), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(x, rowvar=False), rtol=1e-9)
    assert merged.count == 50


def test_sets_without_a_distance_are_refused():
    x = np.ones((5, 3), np.float32)
    assert distance(x, x + 1) == pytest.approx(3)  # covariances of 0
    with pytest.raises(DataError, match="two or more"):
        distance(x[:1], x)
    x[2, 1] = np.nan
    with pytest.raises(DataError, match="finite"):
        fid.statistics(x)


# --- images


def waves(height, width, phase=0.0):
    """A color image with fine and coarse detail."""
    y, x, c = np.ogrid[:height, :width, :3]
    return np.uint8(127.5 + 127 * np.sin(phase + x * y / (90 + 40 * c) + c))


CHANNELS = np.array([0, 1, 2, 0, 1])
AT_299 = np.array([0, 3, 150, 200, 298]), np.array([0, 298, 71, 222, 130]), CHANNELS
CLEAN_FID = [127.00104522705078, 91.20091247558594, 42.68512725830078, 137.5709, 41.69914245605469]
"""clean-fid 0.1.35's pixels of `waves(256, 256)`."""
AT_256 = np.array([0, 3, 150, 200, 255]), np.array([0, 255, 71, 222, 130]), CHANNELS
GIGAGAN = {"bicubic": [134, 81, 59, 127, 108], "lanczos": [133, 71, 56, 129, 106]}
"""The pixels of `waves(300, 405)` of GigaGAN's transform, with PIL 13."""


def test_images_are_resized_as_in_the_references():
    image, wide = waves(256, 256), waves(300, 405)
    got = fid.network_input(image)
    np.testing.assert_allclose(got[AT_299], CLEAN_FID, atol=1e-3)
    assert got.shape == (299, 299, 3) and got.min() == 0 and got.max() == 255  # clipped
    for name, want in GIGAGAN.items():
        np.testing.assert_array_equal(fid.resize(image, name), image)
        np.testing.assert_allclose(fid.resize(wide, name)[AT_256].astype(int), want, atol=1)


# --- references and scores


class Means(inception.LoadedInception):
    """In place of the network: colors, their squares and edges at 4 x 4 places."""

    def embed(self, images):
        x = images.reshape(len(images), 299, 299, 3)[:, :296, :296] / 255
        grid = x.reshape(-1, 4, 74, 4, 74, 3)
        detail = np.abs(np.diff(x, axis=2)).mean((1, 2))
        return np.concatenate([grid.mean((2, 4)).reshape(len(x), -1), detail], 1)


@pytest.fixture
def net():
    return Means({}, "0" * 64, official=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Nine images in two categories, read four at a time."""
    monkeypatch.setattr(fid, "_BATCH", 4)
    for i in range(9):
        file = tmp_path / "images" / f"c{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(waves(300, 320, phase=i)).save(file)
    return tmp_path / "images"


NAMES = [f"c{i % 2}/{i}.png" for i in range(9)]


def test_references_are_computed_once(folder, net, tmp_path):
    refs = fid.references(folder, NAMES, net, tmp_path / "cache")
    assert {x.count for x in refs.statistics.values()} == {9}
    assert all(x > 0 for x in refs.halves.values())
    images = [np.asarray(Image.open(folder / name)) for name in NAMES]
    features = fid.extractor(net, None)(np.stack(images))
    for name, x in refs.statistics.items():
        want = fid.statistics(features[f"inception_{name}"])
        np.testing.assert_allclose(x.mean, want.mean, rtol=1e-6)
        np.testing.assert_allclose(x.scatter, want.scatter, atol=1e-6)

    image = (folder / NAMES[3]).read_bytes()
    (folder / NAMES[3]).write_bytes(b"x" * len(image))  # not read again
    again = fid.references(folder, NAMES, net, tmp_path / "cache")
    assert again.halves == refs.halves and again.sha256 == refs.sha256
    assert fid.score(features, again) == fid.score(features, refs)
    for other in (NAMES[::-1], NAMES[:8]):  # another list is not in the cache
        with pytest.raises(DataError, match=NAMES[3]):
            fid.references(folder, other, net, tmp_path / "cache")
    with pytest.raises(DataError, match=NAMES[3]):
        fid.references(folder, NAMES, Means({}, "1" * 64, official=False), tmp_path / "cache")
    with pytest.raises(DataError, match="reference images"):
        fid.references(folder, NAMES[:3], net)
    for content, reason in ((b"x", "cannot identify"), (None, "No such file")):  # another data set
        (folder / NAMES[3]).unlink()
        if content:
            (folder / NAMES[3]).write_bytes(content)
        with pytest.raises(DataError, match=rf"{NAMES[3]}.*{reason}"):
            fid.references(folder, NAMES, net, tmp_path / "cache")
    (folder / NAMES[3]).write_bytes(image)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete"):
        fid.references(folder, NAMES, net, tmp_path / "cache")


def test_each_variant_has_its_filters(folder, net):
    """The references themselves are at distance 0 where both sides have the same filter."""
    refs = fid.references(folder, NAMES, net)
    images = np.stack([np.asarray(Image.open(folder / name)) for name in NAMES])
    scores = fid.score(fid.extractor(net, None)(images), refs)
    assert abs(scores["fid_gigagan"]) < 1e-6 and abs(scores["fid_bicubic"]) < 1e-6
    assert scores["fid_janus"] > 1e-5
    assert scores["count"] == scores["reference_count"] == 9
    darker = fid.score(fid.extractor(net, None)(images // 2), refs)
    assert min(darker[f"fid_{name}"] for name in fid.VARIANTS) > 10 * scores["fid_janus"]
