"""The shards of a sample set on disk: packed images with signed manifests, and what is missing of them.

Must not know how a sample is computed or what it is scored by. Loads no torch: listing what is missing stays cheap on a
login node.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm.data.bounded import check_members, unread
from ddpm.errors import RequestError, RunBusy
from ddpm.run import files
from ddpm.run.files import DamagedFile
from ddpm.run.log import counted
from ddpm.run.paths import SampleSet
from ddpm.sampling.request import Request, shard_range


class Shard(NamedTuple):
    """A verified shard."""

    images: np.ndarray
    """uint8 (n, H, W, C)"""
    labels: np.ndarray
    """int64 (n,), -1 where the model has no classes"""
    first: int
    """Index of the first sample."""
    manifest: dict[str, Any]


def read_manifest(sample_set: SampleSet, request: Request, index: int) -> dict[str, Any]:
    """A shard's manifest. Raises FileNotFoundError, or DamagedFile if it does not match this request's shard."""
    path = sample_set.shard_manifest(index, request.shards)
    manifest = files.read_signed(path)
    first, num = shard_range(request.num_samples, request.shards, index)
    expected = {"request_digest": request.digest, "shard": index, "first": first, "num": num}
    for key, value in expected.items():
        if manifest.get(key) != value:
            why = ": of another checkpoint, seed or sampler" if key == "request_digest" else ""
            raise DamagedFile(f"{path.name}: its {key} is {manifest.get(key)!r}, this shard's is {value!r}{why}")
    if not sample_set.shard(index, request.shards).exists():
        raise DamagedFile(f"{path.with_suffix('.npz').name}: missing, though its manifest is there")
    return manifest


def missing_shards(sample_set: SampleSet, request: Request) -> list[int]:
    """Shards without a good manifest. Reads manifests only; `verify_shard` hashes the images."""
    missing = []
    for index in range(request.shards):
        try:
            read_manifest(sample_set, request, index)
        except (FileNotFoundError, DamagedFile):
            missing.append(index)
    return missing


def codes(sample_set: SampleSet, request: Request) -> list[str]:
    """Digests of the code by which the set's shards were made, where they say so."""
    found: set[str] = set()
    for index in range(request.shards):
        with contextlib.suppress(FileNotFoundError, DamagedFile):
            found.update(str(read_manifest(sample_set, request, index).get("code", "")).split("+"))
    return sorted(found - {""})


def shards_to_make(sample_set: SampleSet, request: Request) -> list[int]:
    """Missing and damaged shards; every byte of published shards is read."""
    missing = set(missing_shards(sample_set, request))
    for index in set(range(request.shards)) - missing:
        try:
            verify_shard(sample_set, request, index)
        except (FileNotFoundError, DamagedFile):
            missing.add(index)
    return sorted(missing)


def verify_shard(sample_set: SampleSet, request: Request, index: int) -> Shard:
    """A published shard, every byte checked. Raises FileNotFoundError if there is none, DamagedFile with a reason."""
    manifest = read_manifest(sample_set, request, index)
    path = sample_set.shard(index, request.shards)
    data = files.read_bytes(path, files.ARRAYS_BYTES)
    if hashlib.sha256(data).hexdigest() != manifest["sha256"]:
        raise DamagedFile(f"{path.name}: its sha256 is not the one in its manifest")
    arrays = parse_npz(data, path.name)
    images, labels = arrays.get("images"), arrays.get("labels")
    if images is None or labels is None or len(images) != manifest["num"] or len(labels) != manifest["num"]:
        raise DamagedFile(f"{path.name}: does not hold {counted(manifest['num'], 'image')} and labels")
    if int(arrays.get("first", -1)) != manifest["first"]:
        raise DamagedFile(
            f"{path.name}: begins at sample {arrays.get('first')}, not at {manifest['first']}: a copy of another shard"
        )
    return Shard(images, labels, manifest["first"], manifest)


def publish_shard(
    sample_set: SampleSet,
    request: Request,
    index: int,
    images: np.ndarray,
    labels: np.ndarray,
    nfe: int,
    token: str,
    code: str = "",
) -> dict[str, Any]:
    """Publish a computed shard; returns its manifest, or that of another job that published it first. Raises RunBusy if
    that job is not done yet. code: the digest of the code that computed it."""
    first, num = shard_range(request.num_samples, request.shards, index)
    path = sample_set.shard(index, request.shards)
    try:
        with files.publishing(path, token=token) as f:
            f.write(npz_bytes(images=images, labels=labels, first=np.int64(first)))
        # killed here: a .npz without its .json does not exist, and the next life removes it
        manifest = files.sign(
            {
                "shard": index,
                "first": first,
                "num": num,
                "sha256": f.sha256,
                "request_digest": request.digest,
                "nfe": nfe,
                **({"code": code} if code else {}),
            }
        )
        files.write_json(path.with_suffix(".json"), manifest, token=token)
        return manifest
    except FileExistsError:
        try:
            return verify_shard(sample_set, request, index).manifest
        except (FileNotFoundError, DamagedFile) as e:
            raise RunBusy(f"another job is publishing shard {index} of {sample_set.path} ({e})") from None


def withdraw_shard(sample_set: SampleSet, request: Request, index: int) -> None:
    """Unpublish a shard: without its manifest it does not exist, and is computed again."""
    sample_set.shard_manifest(index, request.shards).unlink(missing_ok=True)


def unpack_png(sample_set: SampleSet, request: Request, directory: Path, classes: Sequence[str] = ()) -> Path:
    """Write every sample as `directory`/000007.png, for tools that want files; returns `directory`.

    For a model with classes as `directory`/3-cat/000007.png, with names from `classes` if it has one for each label.

    The directory appears whole: a kill leaves a temporary beside it. Its file .unpacked records its content; a
    directory that already has all samples is left alone. Raises RequestError for a directory with other content,
    FileNotFoundError or DamagedFile for a shard that is missing or damaged.
    """
    from PIL import Image  # so that a login node that unpacks nothing loads no Pillow

    from ddpm.data.packed import ABANDONED_AFTER_S, remove_abandoned

    shas = [read_manifest(sample_set, request, index)["sha256"] for index in range(request.shards)]
    content = files.sha256_json([request.digest, shas]).encode()

    def is_there() -> bool:
        sign = directory / ".unpacked"
        alike = sign.read_bytes() == content if sign.exists() else _begins_alike(sample_set, request, directory)
        return alike and len(list(directory.rglob("*.png"))) == request.num_samples

    if directory.exists():
        if is_there():
            return directory
        raise RequestError(
            f"{directory} exists and does not hold this set's {counted(request.num_samples, 'image')}; remove it, or "
            f"move it away"
        )
    remove_abandoned(directory.parent, ABANDONED_AFTER_S)
    try:
        with files.publishing_folder(directory) as tmp:
            for index in range(request.shards):
                shard = verify_shard(sample_set, request, index)
                for i, (image, label) in enumerate(zip(shard.images, shard.labels, strict=True), start=shard.first):
                    folder = tmp if label < 0 else tmp / _folder(int(label), classes)
                    folder.mkdir(exist_ok=True)
                    Image.fromarray(image).save(folder / f"{i:06d}.png")
            (tmp / ".unpacked").write_bytes(content)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not is_there():  # else another was faster
            raise
    return directory


def _folder(label: int, classes: Sequence[str]) -> str:
    """The folder of a class: its label, and its name with other characters than letters, digits, . _ - replaced."""
    name = classes[label] if label < len(classes) else ""
    word = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:60]
    return f"{label}-{word}" if word and word != str(label) else str(label)


def _begins_alike(sample_set: SampleSet, request: Request, directory: Path) -> bool:
    """Whether the first picture of each shard is in an old directory, which has no .unpacked."""
    from ddpm.run.images import read_png  # loads Pillow

    for index in range(request.shards):
        shard = verify_shard(sample_set, request, index)
        path = directory / f"{shard.first:06d}.png"
        if not path.exists() or not np.array_equal(read_png(path), shard.images[0]):
            return False
    return True


def npz_bytes(**arrays: Any) -> bytes:
    """Arrays as the bytes of an uncompressed .npz; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], bytes]:
    """The arrays of an .npz, and the bytes of the file. Raises as `parse_npz`, and OSError."""
    data = files.read_bytes(path, files.ARRAYS_BYTES)
    return parse_npz(data, path.name), data


def parse_npz(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz, with its zip checksums verified. Raises DamagedFile, also if its headers ask for more
    memory than the file can fill. Never unpickles."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as members:
            check_members(members, len(data))
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as e:  # zipfile and numpy raise a dozen kinds, depending on which bit flipped
        raise DamagedFile(f"{name}: not a readable .npz ({type(e).__name__}: {unread(e)})") from None
