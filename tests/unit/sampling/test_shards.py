"""ddpm/sampling/{shards,parts}.py: what is no shard, and two jobs that publish the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm.errors import RunBusy
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.paths import SampleSet
from ddpm.sampling import parts
from ddpm.sampling.parts import Part, read_part, whole_part, write_part
from ddpm.sampling.shards import codes, missing_shards, npz_bytes, publish_shard, read_npz, shards_to_make, verify_shard
from tests.sampling import make_request, make_set
from tests.saves import flip_bit

REQUEST = make_request(num_samples=6, shards=2, batch=3)
IMAGES, LABELS = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3), np.full(3, -1)


@pytest.fixture
def sample_set(tmp_path: Path) -> SampleSet:
    return make_set(tmp_path / "run", REQUEST)


def forge(sample_set: SampleSet, data: bytes) -> None:
    """Other bytes in shard 0, with a manifest that says so."""
    path = sample_set.shard(0, 2)
    manifest = files.read_signed(path.with_suffix(".json"))
    path.write_bytes(data)
    signed = files.sign({**manifest, "sha256": files.sha256_file(path)})
    files.write_json(path.with_suffix(".json"), signed, replace=True)


@pytest.mark.parametrize(
    "data",
    [
        npz_bytes(images=IMAGES[:2], labels=LABELS[:2], first=0),
        npz_bytes(images=IMAGES, labels=LABELS[:2], first=0),
        npz_bytes(images=IMAGES, first=0),
        npz_bytes(labels=LABELS, first=0),
    ],
    ids=["fewer images", "fewer labels", "no labels", "no images"],
)
def test_a_shard_that_lacks_something_is_damaged_whatever_its_manifest_says(sample_set: SampleSet, data: bytes) -> None:
    publish_shard(sample_set, REQUEST, 0, IMAGES, LABELS, 3, "")
    forge(sample_set, data)
    with pytest.raises(DamagedFile, match="does not hold 3 images and labels"):
        verify_shard(sample_set, REQUEST, 0)


def test_a_set_knows_by_which_code_its_shards_were_made(sample_set: SampleSet) -> None:
    publish_shard(sample_set, REQUEST, 0, IMAGES, LABELS, 3, "", "c0de")
    assert codes(sample_set, REQUEST) == ["c0de"]  # of the one that is there
    publish_shard(sample_set, REQUEST, 1, IMAGES, LABELS, 3, "", "ab12")
    assert codes(sample_set, REQUEST) == ["ab12", "c0de"]
    sample_set.shard_manifest(0, 2).write_text("{")
    assert codes(sample_set, REQUEST) == ["ab12"]


def test_shards_of_before_they_said_so_are_of_no_known_code(sample_set: SampleSet) -> None:
    publish_shard(sample_set, REQUEST, 0, IMAGES, LABELS, 3, "")
    assert codes(sample_set, REQUEST) == []


def test_shards_to_make_are_those_that_are_missing_or_not_as_they_were_published(sample_set: SampleSet) -> None:
    assert shards_to_make(sample_set, REQUEST) == [0, 1]
    for index in range(2):
        publish_shard(sample_set, REQUEST, index, IMAGES, LABELS, 3, "")
    assert shards_to_make(sample_set, REQUEST) == []
    flip_bit(sample_set.shard(1, 2), 400)
    assert shards_to_make(sample_set, REQUEST) == [1] and missing_shards(sample_set, REQUEST) == []


def test_a_twin_half_way_to_its_manifest_keeps_its_shard(sample_set: SampleSet) -> None:
    half = sample_set.shard(0, 2)
    half.write_bytes(b"of a twin")
    with pytest.raises(RunBusy, match="another job is publishing shard 0"):
        publish_shard(sample_set, REQUEST, 0, IMAGES, LABELS, 3, "")
    assert half.read_bytes() == b"of a twin" and not sample_set.shard_manifest(0, 2).exists()


def test_a_twins_finished_batch_is_left_as_it_is(sample_set: SampleSet) -> None:
    for _ in range(2):
        write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    there = read_part(sample_set, REQUEST, 0, 3)
    assert there is not None and there.images.tobytes() == IMAGES.tobytes()
    assert len(list(sample_set.part.iterdir())) == 1


def test_the_folder_of_parts_may_be_removed_by_another_at_the_same_moment(
    sample_set: SampleSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_is_missing(*_: object) -> list[int]:
        sample_set.part.rmdir()
        return []

    monkeypatch.setattr(parts, "missing_shards", none_is_missing)
    write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    parts.remove_parts(sample_set, REQUEST, [(0, 3)])
    assert not sample_set.part.exists()


def test_the_folder_of_parts_stays_while_shards_are_missing(sample_set: SampleSet) -> None:
    """Another task may be about to write there."""
    write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    publish_shard(sample_set, REQUEST, 0, IMAGES, LABELS, 3, "")
    parts.remove_parts(sample_set, REQUEST, [(0, 3)])
    assert list(sample_set.part.iterdir()) == []
    publish_shard(sample_set, REQUEST, 1, IMAGES, LABELS, 3, "")
    parts.remove_parts(sample_set, REQUEST, [(3, 3)])
    assert not sample_set.part.exists()


OTHER = {
    "cut": lambda data, check: data[:-1],
    "other pixels": lambda data, check: npz_bytes(images=IMAGES + 1, nfe=3, check=check),
    "no check": lambda data, check: npz_bytes(images=IMAGES, nfe=3),
    "no number": lambda data, check: npz_bytes(images=IMAGES, nfe="three", check=check),
    "numbers": lambda data, check: npz_bytes(images=IMAGES, nfe=[3, 3], check=check),
}


@pytest.mark.parametrize("how", OTHER)
def test_a_damaged_batch_makes_room_for_the_one_computed_again(sample_set: SampleSet, how: str) -> None:
    write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    path = next(sample_set.part.iterdir())
    arrays, data = read_npz(path)
    path.write_bytes(OTHER[how](data, str(arrays["check"])))
    assert read_part(sample_set, REQUEST, 0, 3) is None
    write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    assert path.read_bytes() == data


def test_a_part_is_whole_for_its_own_request_alone(sample_set: SampleSet) -> None:
    write_part(sample_set, REQUEST, 0, Part(IMAGES, 3), "")
    path = next(sample_set.part.iterdir())
    whole_part(path, REQUEST)
    with pytest.raises(DamagedFile, match="does not match its check"):
        whole_part(path, make_request(num_samples=6, shards=2, batch=3, seed=6))
