"""Which .npz files are statistics of images, and which are told from them in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm.errors import RequestError
from ddpm.scoring.statistics_file import StatisticsFile, read_statistics

MU, SIGMA = np.zeros(3), np.eye(3)
IMAGES = np.zeros((5, 4, 4, 3), np.uint8)


def read(where: Path, **arrays: Any) -> StatisticsFile:
    np.savez(where / "r.npz", **arrays)
    return read_statistics(where / "r.npz")


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"sigma": -SIGMA}, "the eigenvalue -1"),
        ({"sigma": np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1.0]])}, "the eigenvalue -1"),
        ({"sigma": np.triu(np.ones((3, 3)))}, "sigma must be symmetric"),
        ({"sigma": SIGMA * 1j}, "sigma is complex128"),
        ({"sigma": SIGMA.astype("datetime64[s]")}, "sigma is datetime64"),
        ({"mu": MU.astype(bool)}, "mu is bool"),
        ({"mu": np.array(["a", "b", "c"])}, "mu is <U1"),
        ({"mu": MU + 1e200}, "beyond all features"),
        ({"sigma": SIGMA * 1e300}, "beyond all features"),
        ({"mu": np.full(3, np.longdouble("1e400"))}, "must be finite"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"must be \(d,\)"),
        ({"num": "many"}, "num = 'many'"),
        ({"num": np.array([1, 2, 3])}, r"num = \[1, 2, 3\]"),
        ({"num": np.nan}, "num = nan"),
        ({"num": 5.5}, "num = 5.5"),
        ({"num": -5}, "num = -5"),
        ({"num": np.zeros((0, 9))}, "num = "),
        ({"features": np.array(["x"]), "extractor_digest": "d"}, "features are <U1"),
        ({"features": np.zeros((4, 2)), "extractor_digest": "d"}, r"features are float64 \(4, 2\)"),
        ({"features": np.full((4, 3), np.nan), "extractor_digest": "d"}, "features must be finite"),
    ],
)
def test_what_no_images_can_have_is_refused_by_name(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=rf"r\.npz: .*{why}"):
        read(tmp_path, **{"mu": MU, "sigma": SIGMA, **arrays})


def test_a_batch_without_pixels_or_with_a_wrong_count_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"holds \['arr_0'\] \(uint8 \(5, 0, 0, 3\)\)"):
        read(tmp_path, arr_0=np.zeros((5, 0, 0, 3), np.uint8))
    with pytest.raises(RequestError, match="num = 'many'"):
        read(tmp_path, arr_0=IMAGES, num="many")


def test_what_rounding_leaves_of_a_covariance_is_one(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 60)).astype(np.float32)
    sigma = np.cov(x, rowvar=False, dtype=np.float32)  # of rank 19, with eigenvalues below zero
    sigma[0, 1] = np.nextafter(sigma[0, 1], np.float32(9))
    assert np.linalg.eigvalsh(sigma).min() < 0 and (sigma != sigma.T).any()
    there = read(tmp_path, mu=x.mean(0), sigma=sigma, num=np.uint16(20))
    assert there.record["num_images"] == 20 and there.arrays["sigma"].dtype == np.float64


def test_a_name_that_json_cannot_take_is_replaced(tmp_path: Path) -> None:
    assert read(tmp_path, mu=MU, sigma=SIGMA, name="a\udcff").record["name"] == "a?"
    assert read(tmp_path, mu=MU, sigma=SIGMA, name=np.array(["a", "b"])).record["name"] == "r"
