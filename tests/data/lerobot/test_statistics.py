"""Compare the statistics stored with a dataset with numpy over all values."""

from __future__ import annotations

import numpy as np
import pytest

from imagewam_cli.data.lerobot.statistics import DatasetStatistics, PictureHistogram

RNG = np.random.default_rng(0)
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def histogram(pictures: np.ndarray) -> PictureHistogram:
    counted = PictureHistogram()
    for picture in pictures:
        counted.add(picture)
    return counted


def test_image_statistics_equal_numpy_over_all_pixels() -> None:
    pictures = RNG.integers(10, 201, size=(6, 20, 30, 3), dtype=np.uint8)
    pictures[..., 2] //= 2
    result = histogram(pictures).result()
    values = pictures.reshape(-1, 3) / 255
    for name, expected in {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        **{name: np.quantile(values, q, axis=0, method="inverted_cdf") for name, q in QUANTILES.items()},
    }.items():
        assert np.shape(result[name]) == (3, 1, 1)
        np.testing.assert_allclose(np.ravel(result[name]), expected, atol=1e-12, err_msg=name)
    assert result["count"] == [6]


def test_large_images_are_subsampled() -> None:
    picture = np.zeros((480, 640, 3), np.uint8)
    picture[::4, ::4] = 255
    assert histogram(picture[None]).result()["mean"] == [[[1.0]], [[1.0]], [[1.0]]]


def test_a_constant_image_has_zero_standard_deviation() -> None:
    result = histogram(np.full((2, 4, 4, 3), 51, np.uint8)).result()
    assert result["min"] == result["max"] == result["q01"] == result["q99"] == [[[0.2]]] * 3
    np.testing.assert_allclose(np.ravel(result["std"]), 0, atol=1e-9)


def test_episode_statistics_combine_to_those_of_the_dataset() -> None:
    vectors = RNG.normal(size=(30, 2)).astype(np.float32)
    pictures = RNG.integers(0, 256, size=(30, 4, 4, 3), dtype=np.uint8)
    statistics = DatasetStatistics()
    episodes = [
        statistics.add({"action": vectors[part]}, {"cam": histogram(pictures[part])})
        for part in (slice(0, 10), slice(10, 30))
    ]
    total = statistics.result()
    assert total["cam"] == histogram(pictures).result()
    for result, rows in [(episodes[0], vectors[:10]), (episodes[1], vectors[10:]), (total, vectors)]:
        action = result["action"]
        assert action["count"] == [len(rows)]
        np.testing.assert_array_equal(action["min"], rows.min(axis=0))
        np.testing.assert_array_equal(action["max"], rows.max(axis=0))
        np.testing.assert_allclose(action["mean"], rows.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(action["std"], rows.std(axis=0, dtype=np.float64), rtol=1e-12)
        for name, q in QUANTILES.items():
            np.testing.assert_allclose(action[name], np.quantile(rows.astype(np.float64), q, axis=0), rtol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (2, 300)])
def test_images_of_any_size_are_counted(size: tuple[int, int]) -> None:
    assert histogram(np.zeros((3, *size, 3), np.uint8)).result()["count"] == [3]
