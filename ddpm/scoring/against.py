"""The reference that a user names: train, test, a pytorch-fid .npz, a folder or zip of images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import DamagedFile
from ddpm.run.paths import RunDir
from ddpm.run.records import data_of, read_run
from ddpm.run.stopping import StopRequested
from ddpm.scoring.record import DIMENSIONS, PART_IMAGES

if TYPE_CHECKING:
    from ddpm.data.packed import PackedImages

SPLITS = ("train", "test")
PICKLES = (".pkl", ".pickle", ".pt", ".pth")
"""In these StyleGAN, EDM2 and torch-fidelity keep statistics."""


def open_reference(run: RunDir, config: Config, name: str, stop_requested: StopRequested) -> PackedImages | Path:
    """The reference `name` of a run: its packed training data or test split, images of a folder or zip, or the path of
    a statistics file.

    Raises RequestError, also if the data is no longer what the run was trained on; DamagedFile if run.json does not say
    which data that is; EnvironmentLacks; Stopped.
    """
    from ddpm.data.packed import load_folder, pack

    if name == "train":
        return _trained_on(run, config, stop_requested)
    if name == "test":
        packed = pack(config.data, name, Path(data_of(run)["cache"]), stop_requested=stop_requested)[1]
        _check_classes(run, config, packed)
        return packed
    path = check_file(name)
    return path if path.suffix == ".npz" else load_folder(path)


def _trained_on(run: RunDir, config: Config, stop_requested: StopRequested) -> PackedImages:
    """The packed data that run.json names; packed again if it is gone and the images are still the same."""
    from ddpm.data.packed import open_verified, pack

    data = data_of(run)
    cache = Path(data["cache"])
    if not (data.get("key") and data.get("digest")):  # weights that were trained elsewhere
        return pack(config.data, "train", cache, stop_requested=stop_requested)[1]
    try:
        packed = open_verified(cache, data["key"], stop_requested=stop_requested)
        _check_trained_on(run, config, packed)
        return packed
    except (DamagedFile, OSError, RequestError) as e:
        why = f"damaged ({e})" if os.path.lexists(cache / data["key"]) else "gone"
    try:
        packed = pack(config.data, "train", cache, stop_requested=stop_requested)[1]
    except RequestError as e:
        raise RequestError(
            f"reference = train: the packed data {cache / data['key']} that the run was trained on is {why}, and "
            f"cannot be packed again: {e}. Restore the data, or give another --reference"
        ) from None
    _check_trained_on(run, config, packed)
    return packed


def _check_trained_on(run: RunDir, config: Config, packed: PackedImages) -> None:
    """Raise RequestError if this is not the data that the run was trained on, by run.json's digests."""
    from ddpm.data.labels import labels_changed, labels_record

    record, data = read_run(run), data_of(run)
    labels = record.get("labels") if config.model.num_classes else None
    changed = labels_changed(labels, labels_record(packed))
    if data.get("digest") not in (None, packed.digest):
        changed = f"digest {packed.digest[:12]} now, {data['digest'][:12]} then" + (f"; {changed}" if changed else "")
    if changed:
        raise RequestError(
            f"reference = train: the data is not what run {run.name} was trained on: {changed}. Restore it, or give "
            f"the images to compare with by their path"
        )


def _check_classes(run: RunDir, config: Config, packed: PackedImages) -> None:
    """Raise RequestError if the classes here have other names than the model's: scores by class would be wrong."""
    then = list((read_run(run).get("labels") or {}).get("classes") or {})
    if config.model.num_classes and then and then != list(packed.classes):
        raise RequestError(
            f"reference = {packed.split}: its classes are {', '.join(packed.classes)}, and run {run.name} was trained "
            f"on {', '.join(then)}. Restore the data, or give the images to compare with by their path"
        )


def check_for_run(run: RunDir, config: Config, name: str) -> None:
    """`check_reference` for an existing run, whose packed data may exist while the images are gone."""
    from ddpm.data.packed import open_packed

    data = data_of(run)
    if name != "train" or not data.get("key"):  # weights that were trained elsewhere have no data
        check_reference(config, name)
        return
    try:
        packed = open_packed(Path(data["cache"]), data["key"])
    except (DamagedFile, OSError):
        check_reference(config, name)  # packed again by the job
        return
    if len(packed) < 2:
        raise RequestError(f"reference = {name}: has one image; a score needs at least 2 on each side")


def num_parts(run: RunDir, config: Config, name: str) -> int:
    """Into how many parts the features of a reference's images fall, which several tasks share. Raises RequestError."""
    from ddpm.data.packed import open_images, open_source
    from ddpm.scoring.statistics_file import read_statistics

    if name == "train" and (packed := data_of(run).get("num_images")):
        num = int(packed)
    elif name in SPLITS:
        num = open_source(config.data).num_images(name)
    elif (path := check_file(name)).suffix == ".npz":
        images = read_statistics(path).images
        num = 0 if images is None else len(images)
    else:
        source = open_images(path)
        num = sum(source.num_images(split) for split in source.members)
    return -(-num // PART_IMAGES)


def check_reference(config: Config, name: str) -> None:
    """Raise RequestError if `name` is a split that the data does not have, a missing file, statistics that do not fit
    the config's extractor, or a single image."""
    from ddpm.data.packed import open_images, open_source
    from ddpm.scoring.statistics_file import read_statistics

    if name in SPLITS:
        members = open_source(config.data).members
        if name not in members:
            have = sorted(members)
            raise RequestError(f"reference = {name}: {config.data.name} has {have} here; or give a file or folder")
        listed = members[name]
    else:
        path = check_file(name)
        if path.suffix == ".npz":
            extractor = config.evaluate.extractor
            read_statistics(path).check_fits(extractor, DIMENSIONS.get(extractor))
            return
        try:
            found = open_images(path).members
        except RequestError as e:
            raise RequestError(f"reference = {str(e).removeprefix('data.path = ')}") from None
        listed = [image for names in found.values() for image in names]
    if len(listed) == 1:  # none are listed where a library reads them
        raise RequestError(f"reference = {name}: has one image; a score needs at least 2 on each side")


def check_file(name: str) -> Path:
    """The file or folder of that name. Raises RequestError."""
    path = Path(name).expanduser()
    if path.exists() and not (path.is_file() or path.is_dir()):  # a device or a pipe has no end
        raise RequestError(
            f"reference = {name}: neither a file nor a folder; give an .npz or .npy, or a folder or zip of images"
        )
    if path.suffix in PICKLES:
        raise RequestError(
            f"reference = {name}: a pickle, which is not read, since it can run code; of statistics in it "
            f"numpy.savez('FILE.npz', mu=MU, sigma=SIGMA) makes a file that is"
        )
    if not path.exists():
        raise RequestError(
            f"reference = {name}: not train, not test, and no such file; a pytorch-fid .npz, or a folder, "
            f"zip, .npz or .npy of images"
        )
    return path


# ---------------------------------------------------------------- which images a reference is


def digest_of_split(run: RunDir, split: str) -> str | None:
    """The digest of the images of `split` for the run; None if it is not known. Reads a few images at most."""
    from ddpm.data.packed import key_of, open_packed, open_source

    try:
        data = data_of(run)
        if split == "train" and data.get("digest"):
            return str(data["digest"])
        config = reading.of_run(run)
        cache = Path(data["cache"])
        return open_packed(cache, key_of(config.data, open_source(config.data), split, cache)).digest
    except (RequestError, DamagedFile, OSError, KeyError):
        return None


def folder_digest(path: Path) -> str:
    """The digest of the images in a folder or zip, as scores record it; "" if they cannot be read. Reads one at a
    time."""
    import numpy as np

    from ddpm.data.packed import open_images
    from ddpm.data.sources import read
    from ddpm.data.whole import digest_head

    digest = None
    try:
        source = open_images(path)
        splits = sorted(source.members)
        num = sum(source.num_images(split) for split in splits)
        for split in splits:
            for image, _ in read(source, split, None, path):
                digest = digest or hashlib.sha256(digest_head(image.dtype, (num, *image.shape)))
                digest.update(np.ascontiguousarray(image).data)
    except RequestError:
        return ""
    return digest.hexdigest() if digest else ""
