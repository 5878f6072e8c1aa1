"""Finished batches of an unfinished shard (samples/SET/part/): they survive a kill, until the shard is published."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.log import say
from ddpm.run.paths import SampleSet
from ddpm.sampling.request import Request
from ddpm.sampling.shards import missing_shards, npz_bytes, read_npz


class Part(NamedTuple):
    """A finished batch."""

    images: np.ndarray
    """uint8 (n, H, W, C)"""
    nfe: int
    code: str = ""
    """The digest of the code that computed it, if known."""


def part_path(sample_set: SampleSet, first: int, num: int) -> Path:
    """Where the batch of samples first … first+num-1 is kept."""
    return sample_set.part / f"{first:09d}-{num}.npz"


def read_part(sample_set: SampleSet, request: Request, first: int, num: int) -> Part | None:
    """A finished batch that an earlier life left, or None; a damaged one is logged and removed."""
    path = part_path(sample_set, first, num)
    try:
        return whole_part(path, request)
    except FileNotFoundError:
        pass
    except (DamagedFile, KeyError, ValueError, TypeError) as e:
        say(f"part={path} damaged, computing these samples again: {e}")
        path.unlink(missing_ok=True)
    return None


def whole_part(path: Path, request: Request) -> Part:
    """The part in a file. DamagedFile, KeyError, ValueError or TypeError unless it is whole and of this request."""
    arrays, _ = read_npz(path)
    part = Part(arrays["images"], int(arrays["nfe"]), str(arrays.get("code", "")))
    if str(arrays["check"]) != _check(request, int(path.stem.partition("-")[0]), part):
        raise DamagedFile("its content does not match its check")
    return part


def write_part(sample_set: SampleSet, request: Request, first: int, part: Part, token: str) -> None:
    """Keep a finished batch, the samples from `first` on. token: names the writer in temporaries."""
    sample_set.part.mkdir(exist_ok=True)
    data = npz_bytes(images=part.images, nfe=part.nfe, code=part.code, check=_check(request, first, part))
    with contextlib.suppress(FileExistsError):  # a twin of this job, not yet dead, finished the same batch
        files.write_bytes(part_path(sample_set, first, len(part.images)), data, token=token)


def remove_parts(sample_set: SampleSet, request: Request, batches: list[tuple[int, int]]) -> None:
    """Remove a shard's parts, and after the last shard of the set the directory, when no writer can be left."""
    for first, num in batches:
        part_path(sample_set, first, num).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another removes it too, or a file system tells late that it did
        if sample_set.part.exists() and not any(sample_set.part.iterdir()) and not missing_shards(sample_set, request):
            sample_set.part.rmdir()


def _check(request: Request, first: int, part: Part) -> str:
    """A digest that ties a part's pixels to its request and place: another request's part does not pass."""
    of = f"{request.digest} {first} {part.nfe} {part.images.shape} {part.code}".rstrip()  # without code as in old parts
    digest = hashlib.sha256(of.encode())
    digest.update(part.images.tobytes())
    return digest.hexdigest()
