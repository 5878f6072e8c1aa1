"""`evaluate.py --images A --reference B`: any two sets of images, here and now."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def test_arrays_score_like_the_pictures_they_hold_and_their_statistics_like_them(shell: Shell) -> None:
    folder(shell.cwd / "a", range(12), size=4)
    folder(shell.cwd / "b", range(50, 70), size=4)
    of_images = score(shell, "--images", "a", "--reference", "b")
    images = load_folder(shell.cwd / "a").images
    np.save(shell.cwd / "a.npy", images)
    np.savez(shell.cwd / "a.npz", images=images)
    np.savez(shell.cwd / "batch.npz", arr_0=load_folder(shell.cwd / "b").images)
    done = shell("evaluate", "--images", "b", "--extractor", "pixels", "--save-stats", "b.npz")
    assert done.returncode == 0 and "statistics of 20 images" in done.stdout, done.stderr
    for pair in (("a.npy", "batch.npz"), ("a.npz", "b.npz")):
        found = score(shell, "--images", pair[0], "--reference", pair[1])
        assert {k: found[k] for k in ("frechet_distance", "kernel_distance", "manifold")} == {
            k: of_images[k] for k in ("frechet_distance", "kernel_distance", "manifold")
        }
    assert "b.npz: exists" in shell.refused(
        "evaluate", "--images", "a", "--extractor", "pixels", "--save-stats", "b.npz"
    )


def test_pictures_of_several_sizes_are_brought_to_one_and_the_score_says_how(shell: Shell) -> None:
    folder(shell.cwd / "a", range(6), size=8)
    for seed in range(6, 12):
        (shell.cwd / "a" / f"{seed:03d}.png").write_bytes(png(16, seed))
    folder(shell.cwd / "b", range(50, 60), size=12)
    found = score(shell, "--images", "a", "--reference", "b", "--size", "8")
    assert found["resized"] == {"size": 8, "crop": "centre square", "filter": "lanczos"}
    assert found["num_samples"] == 12 and found["reference"]["num_images"] == 10  # type: ignore[index]


def test_what_is_left_out_of_a_folder_or_converted_is_told_beside_the_score(shell: Shell) -> None:
    for name in ("a", "b"):
        folder(shell.cwd / name, range(4))
        Image.new("RGBA", (8, 8), (1, 2, 3, 0)).save(shell.cwd / name / "clear.png")
        (shell.cwd / name / "x.gif").touch()
    done = shell("evaluate", "--images", "a", "--reference", "b", "--extractor", "pixels")
    assert json.loads(done.stdout)["num_samples"] == 5
    for name in ("a", "b"):
        assert f" {name}: pictures of these kinds are left out: 1 .gif; save them as .png" in done.stderr
        assert f"of 5 pictures of {name}: 1 laid upon white\n" in done.stderr


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
    folder(shell.cwd / "large", range(3), size=12)
    assert "a holds images of 8x8, large of 12x12; give --size" in refused("a", "large")
    message = refused("mixed", "a")
    assert "several sizes (8x8, 16x16)" in message and "--size" in message
    folder(shell.cwd / "hurt", range(3))
    (shell.cwd / "hurt" / "bad.png").write_bytes(b"no picture")
    message = refused("hurt", "a")
    assert "bad.png cannot be decoded" in message and "to score the others alone, move these out of it" in message
    np.save(shell.cwd / "grey.npy", np.zeros((3, 8, 8), np.uint8))
    assert "grey.npy: its images are uint8 (3, 8, 8)" in refused("grey.npy", "a")
    (shell.cwd / "torn.npy").write_bytes(b"\x93NUMPY")
    assert "torn.npy cannot be read" in refused("torn.npy", "a")
    assert "other.npz cannot be read" in refused("a", "other.npz")
    (shell.cwd / "edm2.pkl").touch()
    assert "edm2.pkl: a pickle, which is not read" in refused("a", "edm2.pkl")


def test_a_command_line_that_says_neither_or_both_is_refused(shell: Shell) -> None:
    assert "give a RUN, or --images" in shell.refused("evaluate")
    assert "give a RUN, or --images" in shell.refused("evaluate", "tiny", "--images", ".")
    assert "--images needs --reference" in shell.refused("evaluate", "--images", ".")
    assert "go with --images" in shell.refused("evaluate", "tiny", "--size", "8")
    assert "--size 0: must be" in shell.refused("evaluate", "--images", ".", "--reference", ".", "--size", "0")
    two = ["--images", ".", "--reference", "."]
    assert "--set is of a RUN" in shell.refused("evaluate", *two, "--set", "x")
    assert "--compare names its sets" in shell.refused("evaluate", *two, "--compare", "a", "b")
    asked = ["--partition", "gpu", "--tasks", "4", "--sbatch", "nice=1"]
    for words in (two, ["--compare", "x/a", "x/b"]):
        told = shell.refused("evaluate", *words, *asked)
        assert f"--partition, --tasks, --sbatch: {words[0]} is here and now, and no job's" in told
    assert "--json is of a score" in shell.refused("evaluate", *two[:2], "--save-stats", "x.npz", "--json")
    assert "name an .npz" in shell.refused("evaluate", "--images", ".", "--save-stats", "x.npy")
