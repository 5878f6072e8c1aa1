"""Features on disk, reused while images and extractor are the same; those of shards are samples/SET/features-*.

`kept_array` keeps any array of numbers in this way.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.errors import Stopped
from ddpm.run import files
from ddpm.run.claims import ALONE, Worker, work_through
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.paths import SampleSet, names_in
from ddpm.run.stopping import StopRequested
from ddpm.sampling.request import Request
from ddpm.sampling.shards import verify_shard
from ddpm.scoring.extractors import Extractor


def extract(
    extractor: Extractor, images: np.ndarray, *, batch: int = 64, stop_requested: StopRequested = lambda: None
) -> np.ndarray:
    """Features float32 (n, d) of images uint8 (n, H, W, 3), `batch` at a time. Raises Stopped between batches."""
    features = np.empty((len(images), extractor.dim), dtype=np.float32)
    for first in range(0, len(images), batch):
        if reason := stop_requested():
            raise Stopped(reason)
        features[first : first + batch] = extractor(images[first : first + batch])
    return features


def shard_features(
    sample_set: SampleSet,
    request: Request,
    index: int,
    extractor: Extractor,
    worker: Worker = ALONE,
) -> np.ndarray:
    """Features float32 (n, d) of a published shard: kept ones if shard and extractor are the same, else new ones.

    The shard's images are verified either way. Raises FileNotFoundError or DamagedFile for the shard, Stopped.
    """
    shard = verify_shard(sample_set, request, index)
    path = sample_set.features(extractor.name, index, request.shards)
    expected = expected_features(request, shard.manifest, extractor)
    return kept_features(path, expected, shard.images, extractor, worker)


def expected_features(request: Request, shard: Mapping[str, Any], extractor: Extractor) -> dict[str, Any]:
    """The manifest that a shard's features must have. shard: the shard's manifest."""
    return {
        "shard": shard["shard"],
        "num": shard["num"],
        "request_digest": request.digest,
        "extractor_digest": extractor.digest,
        "shard_sha256": shard["sha256"],
    }


def kept_features(
    path: Path,
    expected: Mapping[str, Any],
    images: np.ndarray,
    extractor: Extractor,
    worker: Worker,
) -> np.ndarray:
    """Features float32 (n, d) of images, by `kept_array`. expected: must contain `num`. Raises Stopped."""

    def compute() -> np.ndarray:
        return extract(extractor, images, stop_requested=worker.stop_requested)

    return kept_array(path, expected, (expected["num"], extractor.dim), compute, worker.token)


def kept_array(
    path: Path,
    expected: Mapping[str, Any],
    shape: tuple[int, ...],
    compute: Callable[[], np.ndarray],
    token: str,
) -> np.ndarray:
    """The array at `path` if its manifest equals `expected`; else a newly computed one, which is kept there."""
    try:
        return _read_array(path, expected, shape)
    except FileNotFoundError:
        pass
    except DamagedFile as e:
        say(f"{path} not usable, computing it again: {e}")
    array = compute()
    manifest_path = path.with_suffix(".json")
    manifest_path.unlink(missing_ok=True)  # first: killed between the next lines, the array does not exist
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    with files.publishing(path, replace=True, token=token) as f:
        f.write(buffer.getvalue())
    files.write_json(manifest_path, files.sign({**expected, "sha256": f.sha256}), replace=True, token=token)
    return array


def is_kept(path: Path, expected: Mapping[str, Any]) -> bool:
    """Whether `kept_array` would find the array, by its manifest alone."""
    try:
        _check_manifest(path, expected)
    except (FileNotFoundError, DamagedFile):
        return False
    return path.exists()


Places = Mapping[int, tuple[Path, Mapping[str, Any]]]
"""Of each part what `is_kept` takes: its path, and the manifest that is expected."""


def keep_all(
    directory: Path, places: Places, make: Callable[[int], object], show: Callable[[set[int]], object], worker: Worker
) -> None:
    """Have all these arrays kept, by this process and others that do the same at once. make: keeps one; show: is told
    after each that is made which are there. Raises as `work_through`, and what `make` raises."""
    made = Progress(places)

    def make_one(part: int) -> None:
        make(part)
        show(made.there())

    work_through(directory, list(places), lambda part: is_kept(*places[part]), make_one, worker)


class Progress:
    """Which of many arrays are kept, asked again after each that is made: the folder is listed, and a manifest read
    once it is there, until it is the one that is expected."""

    def __init__(self, places: Places) -> None:
        self._left, self._there = dict(places), set[int]()

    def there(self) -> set[int]:
        named = {name for folder in {path.parent for path, _ in self._left.values()} for name in names_in(folder)}
        for part, (path, expected) in [*self._left.items()]:
            if path.with_suffix(".json").name in named and is_kept(path, expected):
                self._there.add(part)
                del self._left[part]
        return self._there


def _check_manifest(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    manifest = files.read_signed(path.with_suffix(".json"))
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise DamagedFile(f"{path.name}: made with another {key}")
    return manifest


def _read_array(path: Path, expected: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    manifest = _check_manifest(path, expected)
    data = files.read_bytes(path, files.ARRAYS_BYTES)
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise DamagedFile(f"{path.name}: its sha256 is not the one in its manifest")
    array = np.load(io.BytesIO(data), allow_pickle=False)
    assert array.shape == shape
    return array
