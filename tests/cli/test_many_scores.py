"""A set has many scores: by reference and extractor, none overwritten, damaged ones told, all of them comparable."""

from __future__ import annotations

import json

from ddpm.run.files import sign
from tests.cli.harness import TINY_SET, Shell, png, read, snapshot, write_zip


def test_a_second_reference_and_a_second_extractor_leave_the_first_score_as_it_is(again: Shell) -> None:
    write_zip(again.cwd / "b.zip", {f"{i}.png": png(8, i) for i in range(50, 60)})
    scores = again.root / "tiny" / "eval"
    first = (scores / f"{TINY_SET}.json").read_bytes()
    done = again("evaluate", "tiny", "--reference", "b.zip")
    assert done.returncode == 0, done.stderr
    further = scores / TINY_SET / "b.zip-pixels.json"
    assert json.loads(done.stdout[done.stdout.index("{\n") :]) == read(further)
    assert read(further)["reference"]["name"] == "b.zip" and "25 vs b.zip, pixels features" in done.stderr
    assert (scores / f"{TINY_SET}.json").read_bytes() == first
    before = snapshot(scores)
    assert again("evaluate", "tiny", "--reference", "b.zip").returncode == 0 and snapshot(scores) == before


def test_scores_are_compared_with_the_interval_of_their_difference(again: Shell) -> None:
    scores = again.root / "tiny" / "eval"
    mine = read(scores / f"{TINY_SET}.json")
    assert "at least two" in again.refused("evaluate", "tiny", "--compare", TINY_SET)
    assert "no score against train by pixels" in again.refused("evaluate", "tiny", "--compare", TINY_SET, "other")
    near = {"frechet_distance_interval": [60.0, 64.0], "frechet_distance_infinity": 50.0}
    for name, changes in (("a", {"frechet_distance": 62.0}), ("b", {"frechet_distance": 66.0}), ("c", {"seed": 1})):
        if name == "c":
            changes |= {"frechet_distance": 62.5, "reference": {**mine["reference"], "digest": "00"}}  # type: ignore[dict-item]
        (scores / f"{name}.json").write_text(json.dumps(sign({**mine, **near, **changes})))
        request = again.root / "tiny" / "samples" / name / "request.json"
        request.parent.mkdir()
        request.write_text(json.dumps(read(again.root / "tiny" / "samples" / TINY_SET / "request.json")))
    before = snapshot(again.root)
    done = again("evaluate", "--compare", "tiny/a", "tiny/b")
    assert done.returncode == 0, done.stderr
    assert "+4 ± 3" in done.stdout and "62" in done.stdout and "fewer samples than the 768 dimensions" in done.stdout
    assert "their reference differs" in again.refused("evaluate", "tiny", "--compare", "a", "c")
    (scores / "b.json").write_text(json.dumps({**read(scores / "b.json"), "frechet_distance": 1.0}))
    assert "self_sha256 does not match" in again.refused("evaluate", "tiny", "--compare", "a", "b")
    assert "of which run?" in again.refused("evaluate", "--compare", "a", "b")
    assert set(snapshot(again.root)) == set(before)
