"""`evaluate.py --images A --reference B`: any two sets of images, here and now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ddpm.data.packed import load_folder
from ddpm.scoring.extractors import build_extractor
from ddpm.scoring.features import extract
from tests.cli.harness import Shell, png, write_zip


def folder(path: Path, seeds: range, size: int = 8) -> Path:
    path.mkdir()
    for seed in seeds:
        (path / f"{seed:03d}.png").write_bytes(png(size, seed))
    return path


def score(shell: Shell, *args: str) -> dict[str, object]:
    done = shell("evaluate", "--extractor", "pixels", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_folder_against_itself_scores_zero_and_the_same_pictures_in_a_zip_score_the_same(shell: Shell) -> None:
    folder(shell.cwd / "a", range(12))
    folder(shell.cwd / "b", range(50, 70))
    write_zip(shell.cwd / "a.zip", {f"{i:03d}.png": png(8, i) for i in range(12)})
    same = score(shell, "--images", "a", "--reference", "a")
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-6) and same["num_samples"] == 12
    by_folder, by_zip = (score(shell, "--images", a, "--reference", "b") for a in ("a", "a.zip"))
    assert by_folder["frechet_distance"] == by_zip["frechet_distance"]
    assert isinstance(by_zip["frechet_distance"], float) and by_zip["frechet_distance"] > 1
    assert by_folder["reference"] == {**by_folder["reference"], "name": "b", "num_images": 20}  # type: ignore[dict-item]
    assert by_folder["extractor"]["name"] == "pixels"  # type: ignore[index]
    assert not shell.root.exists()


def test_statistics_in_a_pytorch_fid_file_stand_for_the_images(shell: Shell) -> None:
    folder(shell.cwd / "a", range(12), size=4)
    folder(shell.cwd / "b", range(50, 70), size=4)
    of_images = score(shell, "--images", "a", "--reference", "b")["frechet_distance"]
    features = extract(build_extractor("pixels", "cpu"), load_folder(shell.cwd / "b").images).astype(np.float64)
    np.savez(shell.cwd / "b.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    assert score(shell, "--images", "a", "--reference", "b.npz")["frechet_distance"] == pytest.approx(of_images)


def test_bad_image_sets_are_refused_by_what_the_user_named(shell: Shell) -> None:
    folder(shell.cwd / "a", range(3))
    (shell.cwd / "empty").mkdir()
    folder(shell.cwd / "mixed", range(2))
    (shell.cwd / "mixed" / "big.png").write_bytes(png(16))
    (shell.cwd / "other.npz").write_bytes(b"no zip")

    def refused(images: str, reference: str) -> str:
        return shell.refused("evaluate", "--images", images, "--reference", reference, "--extractor", "pixels")

    assert "--images nowhere: does not exist" in refused("nowhere", "a")
    assert "--reference nowhere: does not exist" in refused("a", "nowhere")
    message = refused("empty", "a")
    assert message.startswith("error: empty: no images") and "data.path" not in message
    assert "several sizes (8x8, 16x16)" in refused("mixed", "a")
    assert "other.npz cannot be read" in refused("a", "other.npz")


def test_a_command_line_that_says_neither_or_both_is_refused(shell: Shell) -> None:
    assert "give a RUN, or --images" in shell.refused("evaluate")
    assert "give a RUN, or --images" in shell.refused("evaluate", "tiny", "--images", ".")
    assert "--images needs --reference" in shell.refused("evaluate", "--images", ".")
