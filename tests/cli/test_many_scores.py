"""A set has many scores: by reference and extractor, none overwritten, damaged ones told, all of them comparable."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from ddpm.config import reading
from ddpm.run.files import sign
from ddpm.run.paths import RunDir
from launch.cluster.site import Site
from launch.queue import milestones
from launch.terminal import inspection, overview
from tests.cli.harness import TINY_SET, Shell, png, read, snapshot, write_zip
from tests.saves import save_otherwise


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
    before = snapshot(again.root / "tiny")
    twice = again("evaluate", "tiny", "--reference", "b.zip")
    assert (twice.returncode, json.loads(twice.stdout)) == (0, read(further)) and "is complete" in twice.stderr
    assert snapshot(again.root / "tiny") == before


@pytest.mark.long
def test_what_is_shown_is_the_score_against_the_images_that_lie_there_now(again: Shell) -> None:
    shown = []
    for folder, seed in (("A", 50), ("B", 70), ("A", 90)):
        where = again.cwd / folder / "ref"
        where.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            (where / f"{i}.png").write_bytes(png(8, seed + i))
        done = again("evaluate", "tiny", "--reference", str(where))
        assert done.returncode == 0, done.stderr
        shown.append(json.loads(done.stdout[done.stdout.index("{\n") :]))
    assert len({record["reference"]["digest"] for record in shown}) == 3


def test_a_reference_that_is_none_is_refused_before_and_in_a_job(again: Shell) -> None:
    def npz(name: str, **arrays: Any) -> str:
        np.savez(again.cwd / name, **arrays)
        return str(again.cwd / name)

    no_covariance = npz("negative.npz", mu=np.zeros(768), sigma=-np.eye(768))
    assert "eigenvalue -1" in again.refused("evaluate", "tiny", "--reference", no_covariance)
    of_inception = npz("inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    misfit = again.refused("evaluate", "tiny", "--reference", of_inception)
    assert "must be (768,) and (768, 768) for evaluate.extractor=pixels" in misfit
    assert "must be (2048,)" in again.refused(
        "evaluate",
        "tiny",
        "--extractor",
        "random-inception",
        "--reference",
        npz("pixels.npz", mu=np.zeros(768), sigma=np.eye(768)),
    )
    chain = again.refused("submit", "tiny.yaml", "--name", "other", f"evaluate.reference={of_inception}", "--then",
                          "sample,evaluate", "--cluster", "local")  # fmt: skip
    assert "must be (768,)" in chain and not (again.root / "other").exists()
    many = npz("many.npz", mu=np.zeros(768), sigma=np.eye(768), num="many")
    assert "num = 'many'" in again.refused("evaluate", "tiny", "--reference", many)
    larger = npz("larger.npz", arr_0=np.zeros((3, 64, 64, 3), np.uint8))
    before = snapshot(again.root / "tiny" / "eval")
    for file, why in ((many, "num = 'many'"), (larger, "its images are 64x64, the samples 8x8")):
        job = again("jobs", "evaluate", str(again.root / "tiny"), TINY_SET, "--reference", file)
        assert job.returncode == 78 and why in job.stdout, job.stdout + job.stderr
        assert "Traceback" not in job.stdout + job.stderr
    assert snapshot(again.root / "tiny" / "eval") == before


@pytest.mark.long
def test_a_network_from_a_file_scores_a_run_and_other_words_are_refused(again: Shell) -> None:
    network = torch.export.export(
        torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten()),
        (torch.zeros(2, 3, 8, 8),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    torch.export.save(network, again.cwd / "means.pt2")
    assert "no such file" in again.refused("evaluate", "tiny", "--extractor", "file:none.pt2")
    for word in ("file:", "vgg"):
        assert f"{word!r}: use one of inception" in again.refused("evaluate", "tiny", "--extractor", word)
    done = again("evaluate", "tiny", "--extractor", "file:means.pt2")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert record["dimensions"] == 12 and record["extractor"]["name"].startswith("file-")
    assert read(again.root / "tiny" / "eval" / TINY_SET / f"train-{record['extractor']['name']}.json") == record
    (row,) = json.loads(again("status", "--json").stdout)
    assert len(row["scores_told"]) == 2 and all("25 vs train" in line for line in row["scores_told"].values())


def test_scores_are_compared_with_the_interval_of_their_difference(again: Shell) -> None:
    scores = again.root / "tiny" / "eval"
    mine = read(scores / f"{TINY_SET}.json")
    assert "at least two" in again.refused("evaluate", "tiny", "--compare", TINY_SET)
    told = again.refused("evaluate", "tiny", "--compare", TINY_SET, "tiny/other")
    assert f"tiny/other: no such sample set; run tiny has tiny/{TINY_SET}" in told
    told = again.refused("evaluate", "tiny", "--compare", TINY_SET, "x", "--reference", "test")
    assert told.endswith(f"evaluate.py {again.root}/tiny --set {TINY_SET} --reference test\n")
    near = {"frechet_distance_interval": [60.0, 64.0], "frechet_distance_infinity": 50.0}
    for name, changes in (("a", {"frechet_distance": 62.0}), ("b", {"frechet_distance": 66.0}), ("c", {})):
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
    rows = json.loads(again("evaluate", "tiny", "--compare", "a", "b", "--json").stdout)
    assert [(row["set"], row["score"]["nfe"], row["difference"] and row["difference"]["value"]) for row in rows] == [
        ("a", 4, None), ("b", 4, 4.0)
    ]  # fmt: skip
    other = again.refused("evaluate", "tiny", "--compare", "a", "c")  # of what the run was not trained on
    assert "c: no score against train" in other
    (scores / "b.json").write_text(json.dumps({**read(scores / "b.json"), "frechet_distance": 1.0}))
    assert "self_sha256 does not match" in again.refused("evaluate", "tiny", "--compare", "a", "b")
    assert "of which run?" in again.refused("evaluate", "--compare", "a", "b")
    assert set(snapshot(again.root)) == set(before)


@pytest.mark.long
def test_statistics_of_a_runs_own_images_are_made_by_a_job_and_stand_for_them(again: Shell) -> None:
    run, path = again.root / "tiny", again.cwd / "train.npz"
    assert "train or test; of others: --images b.zip" in again.refused(
        "evaluate", "tiny", "--reference", "b.zip", "--save-stats", "train.npz"
    )
    assert "no such directory" in again.refused("evaluate", "tiny", "--save-stats", "none/train.npz")
    assert "and not of samples" in again.refused("evaluate", "tiny", "--set", "x", "--save-stats", "train.npz")
    scores = snapshot(run / "eval")
    done = again("evaluate", "tiny", "--save-stats", "train.npz")
    assert done.returncode == 0 and done.stdout == f"{path}: statistics of train, pixels features\n", done.stderr
    with np.load(path) as made:
        assert made["mu"].shape == (768,) and made["num"] == read(run / "run.json")["data"]["num_images"]
    assert f"{path}: exists" in again.refused("evaluate", "tiny", "--save-stats", "train.npz")
    words = ["--reference", "train", "--extractor", "pixels", "--save-stats", str(path)]
    before = path.read_bytes()
    job = again("jobs", "evaluate", str(run), "statistics-train-0", *words)  # a life that comes late
    assert job.returncode == 0 and path.read_bytes() == before and snapshot(run / "eval") == scores
    done = again("evaluate", "tiny", "--reference", str(path))
    assert done.returncode == 0, done.stderr
    of_file, of_images = read(run / "eval" / TINY_SET / "digits-pixels.json"), read(run / "eval" / f"{TINY_SET}.json")
    assert of_file["frechet_distance"] == of_images["frechet_distance"]
    np.savez(path, mu=np.zeros(768), sigma=np.eye(768))
    job = again("jobs", "evaluate", str(run), "statistics-train-0", *words)
    assert job.returncode == 78 and "exists, and is left as it is" in job.stdout


@pytest.mark.long
def test_milestones_are_sampled_and_scored_and_the_best_of_them_is_known(again: Shell) -> None:
    run = RunDir(again.root / "tiny")
    run.config.write_text(run.config.read_text().replace("milestones: null", "milestones: {num_samples: 12}"))
    done = again("evaluate", "tiny", "--all-milestones")
    assert done.returncode == 0, done.stdout + done.stderr
    record = read(run.milestones)
    name = "milestone12-ddim4-step400-seed0"
    assert [(p["step"], p["images"], p["set"]) for p in record["curve"]] == [(400, 3200, name)]
    assert record["best"]["frechet_distance"] == read(run.score(name))["frechet_distance"]
    assert read(run.score(name))["num_samples"] == 12 and list((run.tensorboard / "scores").glob("events*"))
    config = reading.of_run(run)
    assert milestones.best_step(run, config) == 400
    given = again("export", "tiny", str(again.root.parent / "best"), "--step", "best")
    assert given.returncode == 0 and "of tiny at step 400" in given.stdout, given.stderr
    assert not milestones.jobs_of(run, config, Site(cluster="local"))
    run.milestones.write_text(json.dumps(sign({**record, "curve": [{"step": 400, "sha256": "a sibling's"}]})))
    (wrong,) = [line.why for line in inspection.look(run) if line.what == "milestones.json"]
    assert wrong == "is of another checkpoint than this run's step 400"
    assert again("evaluate", "tiny", "--all-milestones").returncode == 0 and read(run.milestones) == record
    assert again("evaluate", "tiny").returncode == 0  # the set that was asked for


def test_bits_per_dimension_lie_beside_the_scores_and_their_parts_are_looked_at(again: Shell) -> None:
    told = again.refused("evaluate", "tiny", "--bits-per-dim")
    assert "of the test images, and digits has none here: --reference train" in told
    told = again.refused("evaluate", "tiny", "--bits-per-dim", "--reference", "train", "--step", "best")
    assert "has no scores of milestones yet" in told
    words = ["tiny", "--bits-per-dim", "--reference", "train", "--step", "400", "--num-images"]
    assert "--num-images 0: must be from 1 to" in again.refused("evaluate", *words, "0")
    done = again("evaluate", *words, "20")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(done.stdout[done.stdout.index("{\n") :])
    name = "bits-per-dim-train-20-step400-seed0"
    assert read(again.root / "tiny" / "eval" / f"{name}.json") == record and 0 < record["bits_per_dim"] < 20
    assert "50 evaluations of the network for each of 20 images (seed 0) of train" in done.stderr
    assert "bits/dim, bound of 20 of the" in done.stderr
    run = RunDir(again.root / "tiny")
    row = overview.describe(run, {})
    assert row["scores"][name] == {"bits_per_dim": record["bits_per_dim"], "num_samples": 20}
    assert "bits/dim" in row["scores_told"][name]
    part = run.bound_set(name).part(1)
    part.write_bytes(part.read_bytes()[:-1])
    verdicts = {line.what: line.verdict for line in inspection.look(run) if line.what.startswith("bits-per-dim/")}
    assert verdicts.pop(f"bits-per-dim/{name}/{part.name}") == "damaged"
    assert list(verdicts.values()) == ["holds"] * 3
    save_otherwise(run, 400)
    row = overview.describe(run, {})
    assert name not in row["scores"]
    assert f"{name}.json is of another checkpoint than this run's step 400" in row["problem"]
    whys = {line.what: line.why for line in inspection.look(run)}
    assert whys[f"bits-per-dim/{name}/request.json"] == "is of another checkpoint than this run's step 400"


def test_a_set_and_its_score_that_are_of_another_runs_checkpoint_are_nowhere_taken_for_this_runs(again: Shell) -> None:
    run, of_another = RunDir(again.root / "tiny"), "is of another checkpoint than this run's step 400"
    save_otherwise(run, 400)
    assert f"samples/{TINY_SET} {of_another}" in again.refused("evaluate", "tiny")
    told = again.refused("submit", "tiny.yaml", "--cluster", "local", "--then", "sample,evaluate")
    assert f"samples/{TINY_SET} {of_another}: move it away" in told
    job = again("jobs", "evaluate", str(run.path), TINY_SET)
    assert job.returncode == 78 and of_another in job.stdout, job.stdout + job.stderr
    (shown,) = json.loads(again("status", "tiny", "--json").stdout)
    assert f"samples/{TINY_SET} {of_another}; {TINY_SET}.json {of_another}" in shown["problem"]
    assert shown["scores"] == {}
    whys = {line.what: line.why for line in inspection.look(run) if line.verdict == "damaged"}
    assert whys[f"samples/{TINY_SET}/request.json"] == of_another
    assert whys[f"eval/{TINY_SET}.json"] == f"{TINY_SET}.json {of_another}"
