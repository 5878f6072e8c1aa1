import contextlib
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.data.packed import PackedImages, images_digest
from ddpm.errors import DDPMError, RequestError, Stopped
from ddpm.run import files
from ddpm.run.claims import OthersAtWork, Worker
from ddpm.run.paths import RunDir, SampleSet
from ddpm.sampling.request import CheckpointRef, Request
from ddpm.sampling.shards import missing_shards, verify_shard, withdraw_shard
from ddpm.scoring import evaluate, extractors, features, foreign, metrics, reference
from ddpm.scoring.evaluate import BrokenSet
from ddpm.scoring.extractors import Extractor
from ddpm.scoring.kernel_distance import kernel_distance
from ddpm.scoring.manifold import manifold_scores
from ddpm.scoring.record import PROVENANCE, scores_of
from ddpm.scoring.reference import reference_of
from ddpm.scoring.statistics_file import read_statistics
from tests import sampling
from tests.draws import FULL

NUM, SHARDS, BATCH = 60, 5, 8


@dataclass
class Made:
    """A complete set in a run, and an extractor (d = 4) that counts the images it is given."""

    run: RunDir
    sample_set: SampleSet
    request: Request
    extractor: Extractor
    images: list[int]

    def moments(self, **kwargs: Any) -> metrics.Moments:
        return evaluate.gather_set(self.sample_set, self.request, self.extractor, **kwargs).moments

    def evaluate(self, reference: PackedImages | Path, **kwargs: Any) -> dict[str, Any]:
        options: dict[str, Any] = {"extractor": self.extractor, "cache_dir": self.run.path / "cache", "command": ["x"]}
        return evaluate.evaluate_set(self.run, "fid", reference=reference, **{**options, **kwargs})


def tiny_extractor(**changes: Any) -> tuple[Extractor, list[int]]:
    seen: list[int] = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return torch.cat([x.mean((2, 3)), x[:, :1, 0, 0]], 1)

    return dataclasses.replace(Extractor("tiny", 4, None, "none", forward), **changes), seen


def make_shard(sample_set: SampleSet, request: Request, index: int) -> None:
    sampling.make_shard(sample_set, request, index, lambda x_t, t, labels: 0.5 * x_t + 0.2)


def make(path: Path, **changes: Any) -> Made:
    one_step = {"sampler": "ddim", "steps": 1, "seed": 3, "num_samples": NUM, "shards": SHARDS, "batch": BATCH}
    request = sampling.make_request(**{**one_step, **changes})
    run = RunDir(path / "my run")
    sample_set = sampling.make_set(run.path, request)
    for index in range(request.shards):
        make_shard(sample_set, request, index)
    return Made(run, sample_set, request, *tiny_extractor())


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return make(tmp_path)


def packed(n: int = 50, seed: int = 0, name: str = "cifar10") -> PackedImages:
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    return PackedImages(images, np.zeros(n, np.int64), name, "train", images_digest(images))


def set_images(made: Made) -> np.ndarray:
    shards = [verify_shard(made.sample_set, made.request, i) for i in range(made.request.shards)]
    return np.concatenate([s.images for s in shards])


def moments_of(made: Made) -> tuple[np.ndarray, np.ndarray]:
    moments = metrics.from_features(made.extractor(set_images(made)))
    return moments.mean, metrics.covariance(moments)


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------- merging


def test_the_moments_of_a_set_are_those_of_all_its_images(made: Made) -> None:
    progress: list[tuple[int, int]] = []
    got = made.moments(progress=lambda *p: progress.append(p))
    whole = metrics.from_features(made.extractor(set_images(made)))
    assert got.num == NUM and progress == [(i + 1, SHARDS) for i in range(SHARDS)]
    np.testing.assert_allclose(got.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(got.m2, whole.m2, rtol=1e-10, atol=1e-12)


def test_a_score_is_the_same_to_the_last_bit_whoever_computed_features_and_in_whatever_shards(
    tmp_path: Path,
) -> None:
    a, b, c = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", shards=3)
    for index in (4, 0, 2):
        features.shard_features(b.sample_set, b.request, index, b.extractor)
    score = [{k: v for k, v in m.evaluate(packed()).items() if k not in ("created", "self_sha256")} for m in (a, b, c)]
    assert score[0] == score[1] == score[2]


def test_a_stop_keeps_the_features_of_finished_shards(made: Made) -> None:
    polls = iter([None] * 3 + ["SIGTERM"])
    with pytest.raises(Stopped, match="SIGTERM"):
        made.moments(worker=Worker(lambda: next(polls)))
    assert made.images == [12] * 3
    made.moments()
    assert made.images == [12] * SHARDS


# ---------------------------------------------------------------- refusals


def refused(made: Made) -> BrokenSet:
    with pytest.raises(BrokenSet) as e:
        made.evaluate(packed())
    assert not (made.run.eval / "fid.json").exists()
    return e.value


def repaired(made: Made, shards: list[int]) -> None:
    """What whoever repairs does: compute what is missing. The score is then the undamaged one's."""
    assert missing_shards(made.sample_set, made.request) == shards
    for index in shards:
        make_shard(made.sample_set, made.request, index)
    whole = metrics.from_features(made.extractor(set_images(made)))
    np.testing.assert_allclose(made.moments().mean, whole.mean, rtol=1e-12)


def test_gaps_are_named(made: Made) -> None:
    for index in (1, 3):
        withdraw_shard(made.sample_set, made.request, index)
    error = refused(made)
    assert error.shards == [1, 3] and error.exit_code == 1
    assert "shard 1: missing; shard 3: missing" in str(error)
    assert made.images == []  # said before any work
    repaired(made, [1, 3])


def test_a_shard_that_stands_twice_is_refused(made: Made) -> None:
    for path in (made.sample_set.shard(2, SHARDS), made.sample_set.shard_manifest(2, SHARDS)):
        path.with_name(path.name.replace("00002-of", "00003-of")).write_bytes(path.read_bytes())
    error = refused(made)
    assert error.shards == [3] and "its shard is 2, this shard's is 3" in str(error)
    repaired(made, [3])


@pytest.mark.parametrize(("key", "value", "here"), [("first", 6, 12), ("num", 11, 12)])
def test_a_shard_that_overlaps_or_has_too_few_is_refused(made: Made, key: str, value: int, here: int) -> None:
    path = made.sample_set.shard_manifest(1, SHARDS)
    files.write_json(path, files.sign({**files.read_signed(path), key: value}), replace=True)
    error = refused(made)
    assert error.shards == [1] and f"its {key} is {value}, this shard's is {here}" in str(error)
    repaired(made, [1])


@pytest.mark.parametrize("of", [{"checkpoint": CheckpointRef(99, "cd" * 32)}, {"seed": 4}])
def test_a_shard_of_another_request_is_refused(made: Made, tmp_path: Path, of: dict[str, Any]) -> None:
    other = make(tmp_path / "other", **of)
    for name in ("shard", "shard_manifest"):
        source = getattr(other.sample_set, name)(4, SHARDS)
        (made.sample_set.path / source.name).write_bytes(source.read_bytes())
    error = refused(made)
    assert error.shards == [4] and "its request_digest is" in str(error)
    assert "of another checkpoint, seed or sampler" in str(error)
    repaired(made, [4])


def test_shards_of_another_sharding_are_refused(made: Made) -> None:
    path = made.sample_set.shard_manifest(2, SHARDS)
    path.with_name("shard-00002-of-00009.json").write_bytes(path.read_bytes())
    assert "shard-00002-of-00009.json; their samples would count twice" in str(refused(made))


def test_shards_of_different_cost_are_refused(made: Made) -> None:
    path = made.sample_set.shard_manifest(1, SHARDS)
    files.write_json(path, files.sign({**files.read_signed(path), "nfe": 7}), replace=True)
    assert "different numbers of network evaluations ([1, 7])" in str(refused(made))


def test_every_damaged_shard_is_named_and_withdrawn_so_that_it_is_found_missing(made: Made) -> None:
    made.moments()  # features are kept already, and must not hide the damage
    for index in (0, 3):
        flip_last_byte(made.sample_set.shard(index, SHARDS))
    error = refused(made)
    assert error.shards == [0, 3]
    assert "shard 0: shard-00000-of-00005.npz: its sha256 is not" in str(error) and "shard 3: " in str(error)
    repaired(made, [0, 3])


def test_a_set_that_does_not_exist_is_refused(made: Made) -> None:
    with pytest.raises(RequestError, match="no such sample set"):
        evaluate.evaluate_set(
            made.run, "other", reference=packed(), extractor=made.extractor, cache_dir=made.run.path, command=[]
        )
    with pytest.raises(RequestError, match="sample set name"):
        evaluate.evaluate_set(
            made.run, "../x", reference=packed(), extractor=made.extractor, cache_dir=made.run.path, command=[]
        )


# ---------------------------------------------------------------- the score file


def test_the_score_file_has_the_public_form_and_that_it_is_computed_is_said(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    real = packed()
    result = made.evaluate(real, command=["launch/evaluate.py", "my run"])
    assert "computing the scores samples=" in capsys.readouterr().out
    assert files.read_json(made.run.eval / "fid.json") == result
    assert files.sign(result) == result
    distance, created = result.pop("frechet_distance"), result.pop("created")
    del result["self_sha256"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", created)
    x, y = made.extractor(set_images(made)), made.extractor(real.images)
    expected = metrics.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
    assert distance == pytest.approx(expected, rel=1e-4) and distance > 0  # expected's means are float32
    (low, high), limit = result.pop("frechet_distance_interval"), result.pop("frechet_distance_infinity")
    assert low < distance < high and low < limit < high
    kernel = kernel_distance(x, y)
    assert [result.pop(f"kernel_distance{k}") for k in ("", "_std", "_subset_size")] == pytest.approx(kernel, rel=1e-6)
    manifold = result.pop("manifold")
    assert (manifold.pop("num_samples"), manifold.pop("num_reference")) == (NUM, 50)
    assert manifold == manifold_scores(x, y)._asdict()  # type: ignore[union-attr]
    assert result == {
        "dimensions": 4,
        "num_samples": NUM,
        "reference": {"name": "cifar10", "split": "train", "num_images": 50, "digest": real.digest},
        "extractor": {"name": "tiny", "weights_sha256": None, "resize": "none"},
        "checkpoint": {"step": 12, "sha256": "ab" * 32, "weights": "ema"},
        "sampler": {"name": "ddim", "steps": 1, "eta": 0.0, "guidance": None},
        "nfe": 1,
        "seed": 3,
        "precision": "fp32",
        "command": ["launch/evaluate.py", "my run"],
    }


def test_the_score_file_says_the_variance_that_was_asked_for(tmp_path: Path) -> None:
    result = make(tmp_path, sampler="ancestral", variance="fixed_small").evaluate(packed())
    assert result["sampler"] == {
        **{"name": "ancestral", "steps": 1, "eta": 0.0, "guidance": None},
        "variance": "fixed_small",
    }


def test_only_the_published_weights_give_a_fid(made: Made) -> None:
    for sha256, name in (("6726825d" + "0" * 56, "fid"), ("6726825e" + "0" * 56, "frechet_distance")):
        extractor, _ = tiny_extractor(name="inception", weights_sha256=sha256)
        result = made.evaluate(packed(), extractor=extractor)
        assert [k for k in ("fid", "frechet_distance") if k in result] == [name]


def test_kid_and_inception_score_are_called_so_with_the_published_weights_alone(made: Made) -> None:
    published = {"weights_sha256": "6726825d" + "0" * 56, "classifier": np.eye(3, 4) * 8, "name": "inception"}
    extractor, _ = tiny_extractor(**published)
    record = made.evaluate(packed(), extractor=extractor)
    names = {k for k in record if k.startswith(("fid", "kid", "inception_score", "frechet", "kernel"))}
    kid = {"kid", "kid_std", "kid_subset_size"}
    assert names == {"fid", "fid_interval", "fid_infinity", "inception_score", "inception_score_std"} | kid
    assert 1.0 < record["inception_score"] < 3.0
    other, _ = tiny_extractor(**{**published, "weights_sha256": "00" * 32})
    assert not made.evaluate(packed(), extractor=other).keys() & names


def test_the_same_evaluation_returns_what_is_there_and_another_lies_beside_it(made: Made) -> None:
    first = made.evaluate(packed())
    count = len(made.images)
    assert made.evaluate(packed(), command=["again"]) == first and len(made.images) == count
    second, third = made.evaluate(packed(seed=1)), made.evaluate(packed(seed=2))
    assert made.evaluate(packed()) == first and made.evaluate(packed(seed=1), command=["again"]) == second
    there = scores_of(made.run, "fid")
    assert [s.record for s in there] == [first, second, third]
    assert [s.name for s in there[:2]] == ["fid", "fid/train-tiny"] and there[2].name.startswith("fid/train-tiny-")


def test_a_damaged_score_is_computed_again_and_kept_aside(made: Made) -> None:
    first = made.evaluate(packed())
    path = made.run.eval / "fid.json"
    path.write_text("{")
    again = made.evaluate(packed())
    assert again["frechet_distance"] == first["frechet_distance"] and files.read_json(path) == again
    (aside,) = made.run.eval.glob("fid.json.damaged-*")
    assert aside.read_text() == "{" and [s.name for s in scores_of(made.run, "fid")] == ["fid"]


def test_a_score_from_before_they_were_signed_stands_for_the_same_evaluation(made: Made) -> None:
    record = made.evaluate(packed())
    path = made.run.eval / "fid.json"
    old = {k: v for k, v in record.items() if k in ("frechet_distance", *PROVENANCE, "created", "command")}
    files.write_json(path, old, replace=True)
    before = path.read_bytes()
    assert made.evaluate(packed()) == old and path.read_bytes() == before


# ---------------------------------------------------------------- references


def test_reference_statistics_are_kept_by_images_and_extractor(made: Made, tmp_path: Path) -> None:
    a, seen = tiny_extractor()
    b, seen_b = tiny_extractor(weights_sha256="other")
    first = reference_of(packed(), a, tmp_path)
    again = reference_of(packed(), a, tmp_path)
    assert seen == [50]
    np.testing.assert_array_equal(first.sigma, again.sigma)
    np.testing.assert_array_equal(first.mu, again.mu)
    assert first.record == again.record
    reference_of(packed(), b, tmp_path)
    reference_of(packed(seed=1), a, tmp_path)
    assert (seen, seen_b) == ([50, 50], [50]) and len(list(tmp_path.glob("*.npz"))) == 3


def test_a_damaged_reference_is_computed_again_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extractor, seen = tiny_extractor()
    first = reference_of(packed(), extractor, tmp_path)
    path = next(tmp_path.glob("*.npz"))
    data = bytearray(path.read_bytes())
    data[data.index(first.mu.tobytes()) + 3] ^= 1  # inside a number
    path.write_bytes(data)
    again = reference_of(packed(), extractor, tmp_path)
    assert seen == [50] and "not usable" in capsys.readouterr().out  # its features are kept, and verified
    np.testing.assert_array_equal(again.mu, first.mu)
    flip_last_byte(next(tmp_path.glob("*/features-00000.npy")))
    path.unlink()
    np.testing.assert_array_equal(reference_of(packed(), extractor, tmp_path).sigma, first.sigma)
    assert seen == [50, 50] and "its sha256 is not" in capsys.readouterr().out


def _evaluation(made: Made, stay: bool, answers: Any) -> None:
    reference.PART_IMAGES = 7
    torch.set_num_threads(1)
    forward, record = made.extractor.forward, None

    def slow(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return forward(x)

    made.extractor = dataclasses.replace(made.extractor, forward=slow)
    with contextlib.suppress(OthersAtWork):
        record = made.evaluate(packed(), worker=Worker(stay=stay))
    answers.put((sum(made.images), record and record["frechet_distance"]))


def test_evaluations_at_once_share_the_work_and_none_is_done_twice(made: Made, tmp_path: Path) -> None:
    """50 images of the reference in 8 parts and 60 samples in 5 shards, each once over all processes."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    processes = [context.Process(target=_evaluation, args=(made, i < 2, answers)) for i in range(3)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sum(images for images, _ in told) == 50 + NUM, told
    alone = make(tmp_path / "alone")
    assert {value for _, value in told if value} == {alone.evaluate(packed())["frechet_distance"]}
    assert sum(value is not None for _, value in told) >= 2


def test_features_of_images_that_no_run_made_are_kept_where_that_is_asked_for(made: Made, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        np.save(tmp_path / f"{name}.npy", packed(seed=seed).images)
    keep = tmp_path / "keep"
    keep.mkdir()
    images, scores = foreign.load_images(tmp_path / "a.npy"), []
    for where in (None, keep, keep):
        scores.append(foreign.evaluate_images(images, tmp_path / "b.npy", made.extractor, keep=where))
        del scores[-1]["created"]
    assert scores[0] == scores[1] == scores[2] and made.images == [50] * 4
    foreign.save_statistics(images, tmp_path / "a-stats.npz", made.extractor, keep)
    assert made.images == [50] * 4 and read_statistics(tmp_path / "a-stats.npz").arrays["num"] == 50


def test_a_stop_keeps_the_finished_parts_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PART_IMAGES", 20)
    extractor, seen = tiny_extractor()
    polls = iter([None, None, "SIGTERM"])
    with pytest.raises(Stopped, match="SIGTERM"):
        reference_of(packed(), extractor, tmp_path, worker=Worker(lambda: next(polls)))
    assert seen == [20, 20] and not list(tmp_path.glob("*.npz"))
    made = reference_of(packed(), extractor, tmp_path)
    assert seen == [20, 20, 10]
    np.testing.assert_allclose(made.mu, extractor(packed().images).mean(0), rtol=1e-6)
    np.testing.assert_array_equal(made.features, extractor(packed().images))
    assert seen == [20, 20, 10, 50, 50]
    again = reference_of(packed(), extractor, tmp_path)
    np.testing.assert_array_equal(again.features, made.features)


def test_statistics_from_before_features_were_kept_give_way_to_whole_ones(tmp_path: Path) -> None:
    extractor, seen = tiny_extractor()
    first = reference_of(packed(), extractor, tmp_path)
    path = next(tmp_path.glob("*.npz"))
    with np.load(path) as whole:
        old = {k: whole[k] for k in whole.files if k != "features"}
    np.savez(path, **old)
    assert reference_of(packed(), extractor, tmp_path).features is not None and seen == [50]
    np.testing.assert_array_equal(np.load(path)["features"], first.features)


def test_references_and_pytorch_fids_files_are_interchangeable(tmp_path: Path) -> None:
    from pytorch_fid.fid_score import compute_statistics_of_path

    extractor, _ = tiny_extractor()
    ours = reference_of(packed(), extractor, tmp_path)
    mu, sigma = compute_statistics_of_path(str(next(tmp_path.glob("*.npz"))), None, 1, 4, "cpu")
    np.testing.assert_array_equal(mu, ours.mu)
    np.testing.assert_array_equal(sigma, ours.sigma)
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)  # as its --save-stats writes it
    read = read_statistics(tmp_path / "theirs.npz").reference(extractor, None)
    np.testing.assert_array_equal(read.sigma, ours.sigma)
    assert read.record == {
        "name": "theirs",
        "split": None,
        "num_images": None,
        "digest": files.sha256_file(tmp_path / "theirs.npz"),
    }
    assert read_statistics(next(tmp_path.glob("reference-*.npz"))).record["num_images"] == 50


def test_a_reference_file_scores_like_its_images(made: Made, tmp_path: Path) -> None:
    by_images = made.evaluate(packed())
    path = next((made.run.path / "cache").glob("*.npz"))
    by_file = made.evaluate(path)
    assert by_file["frechet_distance"] == by_images["frechet_distance"]
    assert by_file["reference"]["num_images"] == 50 and by_file["reference"] != by_images["reference"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(4)}, r"holds \['mean'\]"),
        ({"mu": np.zeros(4), "sigma": np.zeros((4, 3))}, r"sigma \(4, 3\)"),
        ({"mu": np.zeros(2048), "sigma": np.zeros((2048, 2048))}, r"mu \(2048,\).*--extractor that it was made with"),
        ({"mu": np.full(4, np.nan), "sigma": np.zeros((4, 4))}, "must be finite"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.zeros((4, 4))}, "cannot be read.*Python's objects, and no"),
        ({"mu": np.zeros(4), "sigma": np.eye(4), "extractor_digest": "x"}, "made with another extractor.*--save-stats"),
    ],
)
def test_a_file_that_is_no_reference_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(RequestError, match=message):
        read_statistics(tmp_path / "r.npz").reference(tiny_extractor()[0], None)


def test_a_missing_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_statistics(tmp_path / "r.npz").reference(tiny_extractor()[0], None)


def test_a_batch_of_guided_diffusion_stands_for_its_images_and_lends_its_statistics_to_inception(
    made: Made, tmp_path: Path
) -> None:
    images = packed().images
    np.savez(tmp_path / "images.npz", arr_0=images)
    np.savez(tmp_path / "both.npz", arr_0=images, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(7))
    by_images = made.evaluate(packed())
    inception, _ = tiny_extractor(name="inception")
    for file, extractor in (("images", made.extractor), ("both", made.extractor), ("images", inception)):
        by_file = made.evaluate(tmp_path / f"{file}.npz", extractor=extractor)
        assert by_file["frechet_distance"] == by_images["frechet_distance"]
        assert by_file["manifold"] == by_images["manifold"] and by_file["extractor"]["name"] == extractor.name
    lent = made.evaluate(tmp_path / "both.npz", extractor=inception)
    mu, cov = moments_of(made)
    assert lent["frechet_distance"] == pytest.approx(metrics.frechet_distance(mu, cov, np.zeros(4), np.eye(4)))
    assert lent["kernel_distance"] == by_images["kernel_distance"] and lent["reference"]["num_images"] is None


def test_a_reference_of_another_size_is_refused_by_name(made: Made) -> None:
    with pytest.raises(RequestError, match=r"reference = cifar10: its images are 4x4, the samples 8x8.*--size 8 "):
        made.evaluate(packed(), image_size=8)
    assert scores_of(made.run, "fid") == [] and made.evaluate(packed(), image_size=4)


def test_features_that_are_no_numbers_are_said_to_be(made: Made) -> None:
    broken, _ = tiny_extractor(forward=lambda x: x.flatten(1)[:, :4] / 0)
    with pytest.raises(DDPMError, match="not finite"):
        made.evaluate(packed(), extractor=broken)


def test_statistics_alone_give_the_distance_and_its_interval_alone(made: Made, tmp_path: Path) -> None:
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(4), sigma=np.eye(4))
    scores = made.evaluate(tmp_path / "theirs.npz").keys() - {*PROVENANCE, "created", "command", "self_sha256"}
    names = {"frechet_distance", "frechet_distance_interval", "frechet_distance_infinity", "dimensions"}
    assert scores == names


def test_classes_that_both_sides_have_are_scored_one_by_one(tmp_path: Path) -> None:
    made, real = make(tmp_path), packed()
    labels = np.arange(len(real)) % 3
    labels[labels == 2] = np.where(np.arange((labels == 2).sum()) == 0, 2, 1)  # one image is too few
    conditional = dataclasses.replace(real, labels=labels, classes=["a", "b", "c"])
    by_class = made.evaluate(conditional, num_classes=3)["frechet_distance_per_class"]
    mine, theirs = made.extractor(set_images(made)), made.extractor(real.images)
    assert by_class[2] is None
    for label in (0, 1):
        x, y = mine[np.arange(NUM) % 3 == label].astype(float), theirs[labels == label].astype(float)
        expected = metrics.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T))
        assert by_class[label] == pytest.approx(expected, rel=1e-9)


def test_a_last_class_that_the_reference_has_nothing_of_has_no_score_and_the_others_have(tmp_path: Path) -> None:
    made, real = make(tmp_path), packed()
    conditional = dataclasses.replace(real, labels=np.arange(len(real)) % 2, classes=["a", "b", "c"])
    by_class = made.evaluate(conditional, num_classes=3)["frechet_distance_per_class"]
    assert len(by_class) == 3 and by_class[2] is None and None not in by_class[:2]


def test_more_classes_than_fit_are_told_and_the_references_statistics_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "CLASSES_AT_MOST", 2)
    made, real = make(tmp_path), packed()
    conditional = dataclasses.replace(real, labels=np.arange(len(real)) % 3, classes=["a", "b", "c"])
    reference_of(real, made.extractor, made.run.path / "cache")
    for part in (made.run.path / "cache").glob("*/features-*"):
        part.unlink()
    made.images.clear()
    assert "frechet_distance_per_class" not in made.evaluate(conditional, num_classes=3)
    assert sum(made.images) == NUM, "of the samples alone"
    assert "no scores by class: the model has 3 classes, more than 2" in capsys.readouterr().out


# ---------------------------------------------------------------- against pytorch-fid


def write_folder(path: Path, n: int, seed: int) -> np.ndarray:
    """Smooth random images whose distribution depends on the seed, as PNG."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 1, (n, 4, 4, 3)) ** (1 + seed)
    small = [Image.fromarray((c * 255).astype(np.uint8)) for c in coarse]
    images = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in small])
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:04d}.png")
    return images


@pytest.fixture
def random_weights(tmp_path: Path) -> Iterator[Path]:
    """A TORCH_HOME whose Inception weights are random, in the old serialization and without batch counters."""
    state, _ = extractors.random_weights(seed=1)
    path = tmp_path / "torch" / "hub" / "checkpoints" / extractors.WEIGHTS_FILE
    path.parent.mkdir(parents=True)
    torch.save(
        {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        path,
        _use_new_zipfile_serialization=False,
    )
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "torch" / "hub"))
    yield tmp_path / "torch"
    torch.hub.set_dir(before)


def of_their_command(a: Path, b: Path) -> float:
    """Half a minute for the root of a matrix of 2048 x 2048."""
    argv = [sys.executable, "-m", "pytorch_fid", a, b, "--device", "cpu", "--batch-size", "24", "--num-workers", "0"]
    # one BLAS thread: sqrtm's would spin for minutes on cores that are shared
    env = {**os.environ, "TORCH_HOME": torch.hub.get_dir().removesuffix("/hub"), "OPENBLAS_NUM_THREADS": "1"}
    theirs = subprocess.run(argv, env=env, capture_output=True, text=True, check=True, timeout=300)
    match = re.search(r"FID: +([-\d.e]+)", theirs.stdout)
    assert match is not None, theirs.stdout + theirs.stderr
    return float(match[1])


def of_their_features(a: Path, b: Path) -> float:
    """The trace of the root of a product of covariances is the sum of the singular values of what spans them."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    network = InceptionV3().eval()
    one, other = (get_activations(sorted(p.iterdir()), network, 24, 2048, "cpu", 0) for p in (a, b))
    mean = ((one.mean(0) - other.mean(0)) ** 2).sum()
    one, other = ((x - x.mean(0)).astype(np.float64) / np.sqrt(len(x) - 1) for x in (one, other))
    return float(mean + (one**2).sum() + (other**2).sum() - 2 * np.linalg.svd(one @ other.T, compute_uv=False).sum())


@pytest.mark.long
@pytest.mark.parametrize(("by", "num"), [(of_their_features, 8), *([(of_their_command, 24)] if FULL else [])])
def test_the_distance_of_two_folders_is_pytorch_fids(random_weights: Path, tmp_path: Path, by: Any, num: int) -> None:
    a = write_folder(tmp_path / "a", num, 0)
    write_folder(tmp_path / "b", num, 1)
    extractor = extractors.build_extractor("inception", "cpu")
    result = foreign.evaluate_images(foreign.load_images(tmp_path / "a"), tmp_path / "b", extractor)
    assert "fid" not in result  # these weights are not the published ones
    assert result["num_samples"] == num
    assert result["reference"] | {"digest": ""} == {"name": "b", "split": "all", "num_images": num, "digest": ""}
    assert result["extractor"]["weights_sha256"] == files.sha256_file(extractors.hub_path(extractors.WEIGHTS_FILE))
    assert result["frechet_distance"] == pytest.approx(by(tmp_path / "a", tmp_path / "b"), rel=1e-4)

    # the network itself, image by image and without their preprocessing's detour through files
    from pytorch_fid.inception import InceptionV3

    with torch.no_grad():
        expected = InceptionV3().eval()(torch.from_numpy(a[:4]).permute(0, 3, 1, 2) / 255)[0].flatten(1).numpy()
    assert np.linalg.norm(extractor(a[:4]) - expected) <= 2e-6 * np.linalg.norm(expected)
