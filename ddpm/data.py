"""Datasets to one packed uint8 array, and batches addressed by step.

Any source (CIFAR-10 through torchvision, a folder or zip of images, scikit-learn's digits) is decoded once into
CACHE/KEY/{images.npy, labels.npy, meta.json}; KEY is a digest of the source and of how it was resized. The directory
appears by one rename, so a killed packing leaves nothing that looks packed. Ranks memory-map it: the page cache of a
node holds it once, and training never decodes an image. Batches follow from (seed, attempt, step) alone;
this module knows no rank beyond the slice of the global batch that it is asked for.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from ddpm.config import Data
from ddpm.errors import EnvironmentLacks, RequestError, Stopped
from ddpm.rundir import TMP_PREFIX, DamagedFile, fsync_dir, read_signed, sha256_file, sha256_json, sign, write_json

if TYPE_CHECKING:
    import torch

PACK_VERSION = 1
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SPLITS = {"train": "train", "test": "test", "val": "test", "valid": "test"}
Progress = Callable[[int, int], None]
StopRequested = Callable[[], "str | None"]


@dataclass(frozen=True)
class PackedImages:
    """A dataset in memory or mapped: images uint8 (N, H, W, 3), labels int64 (N,) (0 where there are no classes)."""

    images: np.ndarray
    labels: np.ndarray
    name: str
    split: str
    digest: str
    """sha256 over dtype, shape and bytes of `images`."""

    def __len__(self) -> int:
        return len(self.images)


def images_digest(images: np.ndarray) -> str:
    """sha256 over dtype, shape and bytes of an image array (N, H, W, C)."""
    digest = hashlib.sha256(f"{images.dtype} {images.shape}".encode())
    for first in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[first : first + 4096]).data)
    return digest.hexdigest()


# ---------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Where images come from: their names by split, and how to read one. Opening it has checked that it is usable."""

    kind: str  # folder | zip | cifar10 | digits
    path: Path | None
    members: dict[str, list[str]]  # split -> names relative to `path`, sorted
    classes: list[str]

    def fingerprint(self) -> Any:
        """What the cache key covers: content for archives, names, sizes and times for folders."""
        if self.kind == "zip" and self.path is not None:
            return sha256_file(self.path)
        if self.kind == "folder" and self.path is not None:
            stats = ((name, (self.path / name).stat()) for names in self.members.values() for name in names)
            return sha256_json([[name, s.st_size, s.st_mtime_ns] for name, s in stats])
        return self.kind


def open_source(data: Data) -> Source:
    """Check the configured data without writing anything. Raises RequestError for a path that cannot serve."""
    if data.name == "digits":
        return Source("digits", None, {}, [str(i) for i in range(10)])
    path = Path(data.path).expanduser() if data.path else None
    if path is not None and not path.exists():
        raise RequestError(
            f"data.path = {data.path}: does not exist; give a folder or a .zip of images in class "
            f"folders" + (", or torchvision's root for cifar10" if data.name == "cifar10" else "")
        )
    if data.name == "cifar10" and (path is None or (path.is_dir() and any(path.glob("cifar-10-*")))):
        return Source("cifar10", path, {}, CIFAR10_CLASSES)
    assert path is not None
    if path.is_dir():
        return _from_names("folder", path, (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()))
    return _from_names("zip", path, _zip_names(path))


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [i.filename for i in archive.infolist() if not i.is_dir()]
    except (zipfile.BadZipFile, OSError) as e:
        raise RequestError(
            f"data.path = {path}: not a readable zip ({e}); copy it again, or unpack it and give the folder"
        ) from None


def _from_names(kind: str, path: Path, names: Iterator[str] | list[str]) -> Source:
    images = sorted(
        n
        for n in names
        if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(n).parts)
    )
    if not images:
        raise RequestError(
            f"data.path = {path}: no images in this {kind}; expected CLASS/NAME.png, optionally under "
            f"train/ and test/ (suffixes: {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    depth = 0  # folders that wrap the whole archive say nothing
    while (
        len({PurePosixPath(n).parts[depth] for n in images}) == 1
        and all(len(PurePosixPath(n).parts) > depth + 2 for n in images)
        and PurePosixPath(images[0]).parts[depth] not in SPLITS
    ):
        depth += 1
    members: dict[str, list[str]] = {}
    for n in images:
        first = PurePosixPath(n).parts[depth]
        has_split = first in SPLITS and len(PurePosixPath(n).parts) > depth + 1
        members.setdefault(SPLITS[first] if has_split else "train", []).append(n)
    return Source(kind, path, members, sorted({PurePosixPath(n).parent.name for n in images}))


# ---------------------------------------------------------------- decoding


def to_square(image: Any, size: int | None) -> np.ndarray:
    """A PIL image as uint8 (size, size, 3): RGB, centre-cropped to a square, resized with Lanczos; None keeps it."""
    from PIL import Image

    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8)


def _decode(source: Source, split: str, size: int | None) -> Iterator[tuple[np.ndarray, int]]:
    from PIL import Image

    assert source.path is not None
    archive = zipfile.ZipFile(source.path) if source.kind == "zip" else None
    label_of = {name: i for i, name in enumerate(source.classes)}
    try:
        for name in source.members[split]:
            try:
                raw = archive.read(name) if archive else (source.path / name).read_bytes()
                with Image.open(io.BytesIO(raw)) as image:
                    yield to_square(image, size), label_of[PurePosixPath(name).parent.name]
            except Exception as e:  # Pillow, zlib and zipfile raise some ten kinds for broken bytes
                raise RequestError(
                    f"data.path = {source.path}: {name} cannot be decoded ({e}); replace or remove it"
                ) from None
    finally:
        if archive:
            archive.close()


def _digits(size: int) -> Iterator[tuple[np.ndarray, int]]:
    """scikit-learn's 1,797 handwritten digits, 8x8 with 17 grey levels, as RGB."""
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise EnvironmentLacks("data.name=digits needs scikit-learn: pip install 'ddpm-hpc[digits]'") from None
    bunch = load_digits()
    for image, label in zip(bunch.images, bunch.target, strict=True):
        yield to_square(Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)), size), int(label)


def _cifar10(root: Path, split: str, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The original CIFAR-10 (Krizhevsky 2009), downloaded and MD5-checked by torchvision."""
    from PIL import Image
    from torchvision.datasets import CIFAR10

    try:
        root.mkdir(parents=True, exist_ok=True)
        dataset = CIFAR10(str(root), train=split == "train", download=True)
    except (OSError, RuntimeError) as e:
        raise EnvironmentLacks(
            f"CIFAR-10 could not be had from {CIFAR10.url} ({e}); on a machine with a network put {CIFAR10.filename} "
            f"into {root}, or give another copy: data.path=FOLDER_OR_ZIP_OF_IMAGES"
        ) from None
    for image, label in zip(dataset.data, dataset.targets, strict=True):
        yield to_square(Image.fromarray(image), size), int(label)


# ---------------------------------------------------------------- packing


def cache_key(data: Data, source: Source, split: str) -> str:
    return sha256_json(
        {
            "version": PACK_VERSION,
            "kind": source.kind,
            "source": source.fingerprint(),
            "split": split,
            "image_size": data.image_size,
            "filter": "lanczos",
        }
    )[:32]


def pack(
    data: Data,
    split: str,
    cache: Path,
    *,
    progress: Progress | None = None,
    stop_requested: StopRequested = lambda: None,
) -> tuple[str, PackedImages]:
    """Unpack `split` of the configured data into `cache` unless it is there; returns its key and the mapped arrays.

    Raises RequestError (bad path, archive or image, no such split), EnvironmentLacks (no download, no scikit-learn),
    Stopped.
    """
    source = open_source(data)
    if split not in (source.members or ("train", "test")) or (source.kind == "digits" and split != "train"):
        raise RequestError(f"{data.name} has no {split!r} split; it has {sorted(source.members) or ['train']}")
    key = cache_key(data, source, split)
    if (cache / key / "meta.json").exists():
        return key, open_packed(cache, key)
    tmp = cache / f"{TMP_PREFIX}{key}.{os.getpid()}"
    try:
        tmp.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentLacks(
            f"cannot write the data cache {cache} ({e.strerror}); choose another place with --root "
            f"or DDPM_RUNS, or data_cache in the site profile"
        ) from None
    try:
        items = {
            "digits": lambda: _digits(data.image_size),
            "cifar10": lambda: _cifar10(source.path or cache / "cifar10", split, data.image_size),
        }.get(source.kind, lambda: _decode(source, split, data.image_size))()
        total = len(source.members.get(split, ())) or {"digits": 1797, "cifar10": 50_000}[source.kind]
        images, labels = [], []
        for image, label in items:
            images.append(image)
            labels.append(label)
            if len(images) % 500 == 0:
                if progress:
                    progress(len(images), total)
                if reason := stop_requested():
                    raise Stopped(reason)
        _write_packed(tmp, data.name, split, np.stack(images), np.asarray(labels, dtype=np.int64), source.classes)
        try:
            tmp.rename(cache / key)
            fsync_dir(cache)
        except OSError:
            if not (cache / key / "meta.json").exists():
                raise
            # another job packed the same data meanwhile: the bytes are the same
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return key, open_packed(cache, key)


def _write_packed(
    where: Path, name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: list[str]
) -> None:
    for file, array in (("images.npy", images), ("labels.npy", labels)):
        with (where / file).open("wb") as f:
            np.save(f, array)
            f.flush()
            os.fsync(f.fileno())
    write_json(
        where / "meta.json",
        sign(
            {
                "name": name,
                "split": split,
                "num_images": len(images),
                "shape": list(images.shape),
                "classes": classes,
                "digest": images_digest(images),
                "bytes": (where / "images.npy").stat().st_size,
            }
        ),
    )


def open_packed(cache: Path, key: str) -> PackedImages:
    """Map a packed dataset. Raises FileNotFoundError where it is not there, DamagedFile where it is not whole."""
    where = cache / key
    meta = read_signed(where / "meta.json")
    if (where / "images.npy").stat().st_size != meta["bytes"]:
        raise DamagedFile(f"{where / 'images.npy'}: not the size that was packed; remove {where} and submit again")
    return PackedImages(
        np.load(where / "images.npy", mmap_mode="r"),
        np.load(where / "labels.npy"),
        meta["name"],
        meta["split"],
        meta["digest"],
    )


def copy_to_scratch(cache: Path, key: str, scratch: Path) -> None:
    """Copy a packed dataset to node-local `scratch`, whole or not at all. Raises OSError (no room, no such disk)."""
    if (scratch / key / "meta.json").exists():
        return
    tmp = scratch / f"{TMP_PREFIX}{key}.{os.getpid()}"
    try:
        shutil.copytree(cache / key, tmp)
        try:
            tmp.rename(scratch / key)
        except OSError:
            if not (scratch / key / "meta.json").exists():
                raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def load_folder(path: Path) -> PackedImages:
    """A folder or zip of equally sized images as it is: nothing resized, nothing cached, all splits together.

    Raises RequestError for no images, damaged ones, or images of several sizes.
    """
    try:
        source = open_source(Data(name="images", path=str(path)))
        images = [image for split in sorted(source.members) for image, _ in _decode(source, split, None)]
    except RequestError as e:
        raise RequestError(str(e).removeprefix("data.path = ")) from None
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise RequestError(
            f"{path}: images of several sizes ({', '.join(f'{h}x{w}' for h, w, _ in sorted(shapes)[:4])}); "
            f"a score needs one size: resize them first"
        )
    array = np.stack(images)
    return PackedImages(array, np.zeros(len(array), np.int64), path.name, "all", images_digest(array))


# ---------------------------------------------------------------- batches


class Batches:
    """The batch of step k as a function of (seed, attempt, k), whatever the ranks, accumulation or restarts.

    The data order is one stream, a keyed permutation per epoch, concatenated; step k takes positions kB … (k+1)B-1.
    """

    def __init__(self, packed: PackedImages, *, seed: int, attempt: int, global_batch: int, flip: bool) -> None:
        from ddpm import rng

        self.packed = packed
        self.global_batch = global_batch
        self.flip = flip
        self._order = rng.key(seed, "order", attempt)
        self._flip = rng.key(seed, "flip", attempt)
        self._permutations: dict[int, np.ndarray] = {}

    def sample_ids(self, step: int, first: int, num: int) -> np.ndarray:
        """Dataset indices, int64 (num,), of rows first … first+num-1 of step `step`'s global batch."""
        from ddpm import rng

        n = len(self.packed)
        positions = step * self.global_batch + np.arange(first, first + num, dtype=np.int64)
        epochs = positions // n
        self._permutations = {e: order for e, order in self._permutations.items() if e >= epochs[0]}
        for epoch in range(epochs[0], epochs[-1] + 1):  # more than two where a batch is larger than the data
            if epoch not in self._permutations:
                self._permutations[epoch] = rng.permutation(self._order, epoch, n).numpy()
        return np.array([self._permutations[int(e)][p] for e, p in zip(epochs, positions % n, strict=True)], np.int64)

    def rows(self, step: int, first: int, num: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """x_0 float32 (num, 3, H, W) in [-1, 1], flipped, and labels int64 (num,), both on `device`."""
        import torch

        from ddpm import rng

        ids = self.sample_ids(step, first, num)
        raw = torch.from_numpy(self.packed.images[ids])
        if device.type == "cuda":
            raw = raw.pin_memory()
        x = raw.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        if self.flip:
            index = torch.arange(first, first + num, device=device)
            x = torch.where(rng.coin(self._flip, index, step)[:, None, None, None], x.flip(3), x)
        return x.contiguous(), torch.from_numpy(self.packed.labels[ids]).to(device, non_blocking=True)
