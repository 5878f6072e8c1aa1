"""Which folders of a set of images are splits, which are classes, and which only wrap them; unclear ones are refused.

Must not know: what is in a file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ddpm.errors import RequestError

SPLITS = {
    **{"train": "train", "training": "train"},
    **dict.fromkeys(("test", "testing", "val", "valid", "validation"), "test"),
}
OF_OLD = {"train", "test", "val", "valid"}
"""Names of folders that were splits in the first versions too."""
WORD = re.compile("|".join(sorted(SPLITS, key=len, reverse=True)))
SHOWN = 8
"""Number of folders or duplicates that a message names."""


def split_of(folder: str) -> str | None:
    """The split that a folder's name stands for, in upper or lower case; None if it is no split."""
    return SPLITS.get(folder.lower())


def folder_of(name: str) -> str:
    """The folder of an image, with the / at its end."""
    return name[: name.rfind("/") + 1]


def folders_of(images: Iterable[str]) -> Counter[tuple[str, ...]]:
    """The folders that images lie in, in parts, and how many lie in each: there are a thousand times as many images."""
    found: Counter[tuple[str, ...]] = Counter()
    for folder, num in Counter(map(folder_of, images)).items():
        found[PurePosixPath(folder).parts] += num
    return found


def wrappers(folders: Iterable[tuple[str, ...]]) -> int:
    """The number of outer folders that contain all images, and so mean nothing."""
    depth, folders = 0, [*folders]
    while (
        all(len(f) > depth + 1 for f in folders)
        and len({f[depth] for f in folders}) == 1
        and not split_of(folders[0][depth])
    ):
        depth += 1
    return depth


def refuse_unclear(path: Path, images: Mapping[tuple[str, ...], int], depth: int) -> None:
    """Raise RequestError if some images are in a training split and others beside it, or if splits are inside what
    would be a class: images of a test split would be trained on. images: of `folders_of`; depth: of `wrappers`."""
    folders = [f[depth:] for f in images]
    outer = {split_of(f[0]) if f else None for f in folders}
    inner = [f for f in folders if len(f) > 1 and split_of(f[1]) and not split_of(f[0])]
    tests = any(split_of(f[1]) == "test" for f in inner)
    alike = any(_is_split_by_words({f[place] for f in folders if len(f) > place}) for place in (0, 1))
    if not outer >= {"train", None} and not tests and not alike and not any(len(f) > 2 for f in inner):
        return
    there: Counter[str] = Counter()
    for f, num in zip(folders, images.values(), strict=True):
        there["/".join(f[:2] if inner else f[:1])] += num
    told = [f"{f'{name}/' if name else 'no folder'} ({num})" for name, num in there.items()]
    more = [f"{len(told) - SHOWN} more"] if len(told) > SHOWN else []
    raise RequestError(
        f"data.path = {path}: which images are for training cannot be told; they lie in "
        f"{', '.join([*told[:SHOWN], *more])}; put all into train/CLASS/ and test/CLASS/, move what belongs to "
        f"neither away, and rename a class whose name is nearly a split's ({' '.join(SPLITS)})"
    )


def _is_split_by_words(folders: Iterable[str]) -> bool:
    """Whether names differ only in a split's word: training_set and test_set do, freight train and test tube do not."""
    found: dict[tuple[str, str], set[str]] = {}
    for folder in folders:
        if match := WORD.search(folder.lower()):
            rest = folder.lower()[: match.start()], folder.lower()[match.end() :]
            if any(rest):
                found.setdefault(rest, set()).add(SPLITS[match[0]])
    return any(len(splits) > 1 for splits in found.values())


def refuse_twice(path: Path, images: Sequence[str]) -> None:
    """Raise RequestError if a zip has several images of one name: only the last of them could be read."""
    twice = [f"{name} ({num} times)" for name, num in Counter(images).items() if num > 1]
    if twice:
        more = [f"{len(twice) - SHOWN} more"] if len(twice) > SHOWN else []
        raise RequestError(
            f"data.path = {path}: names that are in this zip more than once: {', '.join([*twice[:SHOWN], *more])}; "
            f"make the zip anew, each image under a name of its own"
        )


def new_splits(folders: Iterable[tuple[str, ...]], depth: int) -> Iterator[str]:
    """Folders that count as splits now and counted as classes in old versions: they change the cache key."""
    found = {f[depth] for f in folders if len(f) > depth}
    return (name for name in sorted(found) if split_of(name) and name not in OF_OLD)
