"""Packs any dataset into one uint8 array.

Any source is decoded once into CACHE/KEY/{images.npy, labels.npy, labels.json, meta.json}; KEY is a digest of the
source, of what was chosen from it and of how it was resized. The directory appears by one rename, so a killed packing
leaves nothing that looks packed. Ranks memory-map it: the page cache of a node holds it once, and training never
decodes an image. So nothing in it is ever written in place: what is damaged is moved aside and packed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.config.data import Data
from ddpm.data import celeba, listing, sources
from ddpm.data.arrays import Item, write_arrays
from ddpm.data.decoding import Decoding
from ddpm.data.listing import readable
from ddpm.data.sources import Source
from ddpm.data.whole import PackedImages, images_digest, open_packed, open_verified
from ddpm.errors import EnvironmentLacks, RequestError, Stopped
from ddpm.run.files import TMP_PREFIX, DamagedFile, fsync_dir, sha256_file, sha256_json, sign, write_json
from ddpm.run.log import counted, say
from ddpm.run.stopping import ShowProgress, StopRequested

PACK_VERSION = 1
ABANDONED_AFTER_S = 86_400
SPOTS = 8
OTHER_PICTURE = 3
"""Mean difference in grey levels above which two pictures are different ones: JPEG decoders differ by less."""


# ---------------------------------------------------------------- sources


def open_source(data: Data) -> Source:
    """The source of the configured data, checked, without writing anything. Raises RequestError for an unusable
    path."""
    what = data.model_dump_json(include={"name", "path", "attributes", "label_attributes"})
    return listing.once(what, lambda: _open_source(data))


def _open_source(data: Data) -> Source:
    if data.name == "digits":
        return sources.digits()
    path = Path(data.path).expanduser() if data.path else None
    if path is not None and not path.exists():
        or_else = {
            "cifar10": ", or torchvision's root for cifar10",
            "celeba": "; for celeba the folder of its lists, or Kaggle's archive.zip",
        }
        raise RequestError(
            f"data.path = {data.path}: does not exist; give a folder or a .zip of images in class "
            f"folders, or an .npz or .npy of them" + or_else.get(data.name, "")
        )
    if data.name == "celeba":
        return celeba.open_source(data)
    if data.name == "cifar10" and (path is None or listing.is_torchvisions(path)):
        return sources.cifar10(path)
    assert path is not None
    return sources.images(path)


def open_images(path: Path) -> Source:
    """The source of a folder, zip or array of images that no config names. Raises as `open_source`."""
    return open_source(Data(name="images", path=str(path)))


# ---------------------------------------------------------------- packing


def key_of(data: Data, source: Source, split: str, cache: Path, tell: Callable[[str], None] = lambda text: None) -> str:
    """The key under which `cache` has the packed data, or will have it. A folder is identified by the names, sizes and
    times of its files, or, if another folder with the same ones is packed there, by the content of its files."""
    key = _key(data, source, split, source.fingerprint(tell))
    if source.kind != "folder" or data.skip_damaged or _alike(cache, key, data, source, split):
        return key
    tell(f"{cache / key} is of another folder with files of these names, sizes and times: this one is packed beside it")
    assert source.path is not None
    names = [name for members in source.members.values() for name in members]
    return _key(data, source, split, sha256_json([[readable(n), sha256_file(source.path / n)] for n in names]))


def _alike(cache: Path, key: str, data: Data, source: Source, split: str) -> bool:
    """Whether a few (SPOTS) of a source's pictures equal those packed under `key`, as far as both can be read."""
    try:
        there = open_packed(cache, key)
    except (DamagedFile, OSError):
        return True
    names = source.members[split]
    for place in np.linspace(0, len(names) - 1, SPOTS).astype(int) if len(names) == len(there) else ():
        one = dataclasses.replace(source, members={split: [names[place]]})
        for pixels, _ in sources.read(one, split, data.image_size, cache, Decoding(data.background, skip_damaged=True)):
            if np.abs(pixels.astype(int) - there.images[place]).mean() > OTHER_PICTURE:
                return False
    return True


def _key(data: Data, source: Source, split: str, fingerprint: Any) -> str:
    """A digest of all that the packed pixels and labels follow from."""
    record = {
        "version": PACK_VERSION,
        "kind": source.kind,
        "source": fingerprint,
        "split": split,
        "image_size": data.image_size,
        **sources.RESIZE,
    }
    if source.selection is not None:
        record["selection"] = source.selection
    if source.path is not None and source.kind in ("zip", "folder"):  # others have nothing to decode
        record |= {"background": data.background} if data.background != "white" else {}
        record |= {"skip_damaged": True} if data.skip_damaged else {}
    return sha256_json(record)[:32]


def pack(
    data: Data,
    split: str,
    cache: Path,
    *,
    progress: ShowProgress | None = None,
    stop_requested: StopRequested = lambda: None,
    or_else: str = "choose another place",
) -> tuple[str, PackedImages]:
    """Pack `split` of the configured data into `cache`, unless it is there and whole; returns its key and the mapped
    arrays.

    or_else: what a user can do where `cache` cannot be written to.
    Raises RequestError (bad path, archive or image, no such split), EnvironmentLacks (no download, no scikit-learn),
    Stopped.
    """
    source = open_source(data)
    if source.kind == "celeba":
        source = celeba.download(data, cache / "celeba")
    if split not in source.members:
        raise RequestError(
            f"{data.name} has no {split!r} split: name one that it has: {', '.join(sorted(source.members))}"
        )
    key = key_of(data, source, split, cache, say)
    labels = [] if data.skip_damaged else [source.labels[name] for name in source.members[split]]

    def there() -> PackedImages:
        packed = open_verified(cache, key, labels=labels, stop_requested=stop_requested)
        _check_source(cache / key, packed, data, source, split)
        return packed

    try:
        return key, there()
    except (DamagedFile, OSError) as e:
        if os.path.lexists(cache / key):
            say(f"the packed data in {cache / key} is damaged: packing it again", reason=_in_words(e))
    if data.name == "celeba" and list(source.members) == ["train"]:
        say(f"data.path={data.path} no {celeba.PARTITION}: every image is for training")
    _tell_left_out(source, f"data.path={data.path}")
    tmp = cache / f"{TMP_PREFIX}{key}.{os.getpid()}-{secrets.token_hex(4)}"
    try:
        tmp.mkdir(parents=True)
        remove_abandoned(cache, ABANDONED_AFTER_S)
    except OSError as e:
        raise EnvironmentLacks(f"cannot write the data cache {cache} ({e.strerror}); {or_else}") from None
    try:
        num, size, how = source.num_images(split), data.image_size, Decoding(data.background, data.skip_damaged)
        items = _watched(sources.read(source, split, size, cache, how), num, progress, stop_requested)
        written = write_arrays(tmp, items, (num, size, size, 3), source.classes)
        record = {"name": data.name, "split": split, "classes": source.classes, "selection": source.selection}
        record |= _tell(how, num)
        write_json(tmp / "meta.json", sign({**record, **sources.RESIZE, **written}))
        _publish(tmp, cache / key, there, or_else)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return key, open_packed(cache, key)


def _tell_left_out(source: Source, where: str) -> None:
    if source.not_taken:
        told = ", ".join(f"{num} {suffix}" for suffix, num in source.not_taken.items())
        say(f"{where} pictures of these kinds are left out: {told}; save them as .png to have them")


def _tell(how: Decoding, num: int, where: str = "") -> dict[str, Any]:
    """Log how pictures were converted and which were left out; returns what meta.json keeps of that."""
    record: dict[str, Any] = {}
    if how.converted:
        record["converted"] = dict(how.converted)
        say(
            f"of {counted(num, 'picture')}{where}: "
            + ", ".join(f"{count} {what}" for what, count in how.converted.items())
        )
    if how.damaged:
        record["skipped"] = how.damaged
        told = sources.told_of_damaged(how.damaged, num, skipped=True)
        say(f"data.skip_damaged=true leaves out what is damaged: {told}")
    return record


def _check_source(where: Path, packed: PackedImages, data: Data, source: Source, split: str) -> None:
    """Raise DamagedFile if packed data is another dataset's, as far as its shape and names show."""
    size, num = data.image_size, len(source.members[split])
    says = [packed.split, list(packed.classes), *packed.images.shape[1:3]]
    alike = says == [split, source.classes, size, size] and (data.skip_damaged or num in (0, len(packed)))
    if not alike or (source.kind in ("digits", "cifar10") and packed.name != source.kind):
        told = (
            f"{packed.name}, {packed.split}, {counted(len(packed), 'image')} of {counted(len(packed.classes), 'class')}"
        )
        raise DamagedFile(f"{where}: is of other data ({told})")


def _publish(tmp: Path, there: Path, look: Callable[[], object], or_else: str) -> None:
    """Rename `tmp` to `there`, unless another job has packed the same meanwhile; a damaged `there` is moved aside.

    look: raises OSError or DamagedFile if `there` is not the same data.
    Raises EnvironmentLacks if moving is not permitted, as for a colleague's data in a shared cache.
    """
    cache = there.parent
    while True:
        try:
            tmp.rename(there)
            fsync_dir(cache)
            return
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        with contextlib.suppress(OSError, DamagedFile):
            look()
            return  # the bytes are the same
        aside = cache / f"{TMP_PREFIX}{there.name}.damaged-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            there.rename(aside)  # who has it mapped, on any node, keeps its bytes
            os.utime(aside)  # and remove_abandoned leaves them for a day
        except FileNotFoundError:
            pass  # another job was first
        except OSError as e:
            raise EnvironmentLacks(
                f"the packed data in {there} is damaged and cannot be moved away ({e.strerror}): have its owner remove "
                f"it, or {or_else}"
            ) from None


def remove_abandoned(where: Path, unchanged_s: float) -> None:
    """Remove what killed packings or copies have left and nobody has written to for `unchanged_s` seconds."""
    for left in where.glob(f"{TMP_PREFIX}*"):
        with contextlib.suppress(OSError):
            if max(p.stat().st_mtime for p in (left, *left.glob("*"))) < time.time() - unchanged_s:
                shutil.rmtree(left)


def _watched(
    items: Iterator[Item], num: int, progress: ShowProgress | None, stop_requested: StopRequested
) -> Iterator[Item]:
    for done, item in enumerate(items, start=1):
        yield item
        if done % 500 == 0 or done == num:
            if progress:
                progress(done, num)
            if reason := stop_requested():
                raise Stopped(reason)


def _in_words(error: Exception) -> str:
    """Why packed data cannot be used."""
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def load_folder(path: Path, size: int | None = None) -> PackedImages:
    """A folder, zip or array of images, without caching, all splits together. Memory holds them once.

    size: crop and resize them to this many pixels; None: keep them, which must all have one size.
    Logs what was left out and converted. Raises RequestError if there are no images, damaged ones, or images of several
    sizes; EnvironmentLacks.
    """
    images, shapes, how = np.empty(0, np.uint8), set[tuple[int, ...]](), Decoding()
    try:
        source = open_images(path)
        if source.array is not None and size is None:
            return as_they_are(source.array.whole(), path)
        _tell_left_out(source, f"{path}:")
        splits = sorted(source.members)
        num = sum(map(source.num_images, splits))
        each = (image for split in splits for image, _ in sources.read(source, split, size, path, how))
        for index, image in enumerate(each):
            if not index:
                images = _room_for(num, image, path)
            shapes.add(image.shape)
            if len(shapes) == 1:
                images[index] = image
    except RequestError as e:
        raise RequestError(str(e).removeprefix("data.path = ").removesuffix(sources.SKIP)) from None
    _tell(how, num, f" of {path}")
    if len(shapes) > 1:
        raise RequestError(
            f"{path}: images of several sizes ({', '.join(f'{h}x{w}' for h, w, _ in sorted(shapes)[:4])}); "
            f"a score needs one size: resize them first, or give --size"
        )
    return as_they_are(images, path)


def _room_for(num: int, first: np.ndarray, path: Path) -> np.ndarray:
    """An array for so many images of the size of the first. Raises EnvironmentLacks."""
    try:
        return np.empty((num, *first.shape), np.uint8)
    except MemoryError:
        height, width, _ = first.shape
        raise EnvironmentLacks(
            f"{path}: {counted(num, 'image')} of {height}x{width}, as its first is, take more memory than there is "
            f"here; crop and resize them with --size, or score them where there is more"
        ) from None


def as_they_are(images: np.ndarray, path: Path) -> PackedImages:
    """Images uint8 (N, H, W, 3) of `path` in the form of packed data."""
    return PackedImages(images, np.zeros(len(images), np.int64), path.name, "all", images_digest(images))
