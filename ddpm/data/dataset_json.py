"""dataset.json, in which the dataset tools of StyleGAN and EDM keep labels, with images in folders of a thousand each.

{"labels": [["00000/img00000000.png", 3], ...]} or {"labels": null}; names are relative to where it lies. Must not know
how it is read. https://github.com/NVlabs/edm/blob/main/dataset_tool.py
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePath, PurePosixPath
from typing import Any

from ddpm.errors import RequestError
from ddpm.run.log import counted

NAME = "dataset.json"
MOST_BYTES = 1 << 30
"""ImageNet's has 50 MB."""


def place(names: Iterable[str], folders: Collection[tuple[str, ...]]) -> str | None:
    """The dataset.json among `names` whose folder contains all images, which lie in `folders`; None if there is
    none."""
    found = sorted((n for n in names if n.rpartition("/")[2] == NAME), key=len)
    tops = ((n, PurePosixPath(n).parent.parts) for n in found)
    return next((n for n, top in tops if all(folder[: len(top)] == top for folder in folders)), None)


def classes(raw: bytes, path: PurePath, where: str, images: Sequence[str]) -> dict[str, str] | None:
    """The class of each image ("" for all if its labels are null); None if the file is something else.

    raw: the file's content; path: the folder or zip; where: the file's place in it.
    Raises RequestError if it is damaged, or lacks a label of an image.
    """
    try:
        said: Any = json.loads(raw)
    except (ValueError, RecursionError) as e:
        raise RequestError(f"data.path = {path}: {where}: not JSON ({e}); copy it again, or remove it") from None
    if not isinstance(said, dict) or "labels" not in said:
        return None
    if said["labels"] is None:
        return dict.fromkeys(images, "")
    top = PurePosixPath(where).parent
    try:
        labels = {str(top / name): label for name, label in said["labels"]}
    except (TypeError, ValueError):
        labels = {"": None}
    if bad := [label for label in labels.values() if not isinstance(label, int) or isinstance(label, bool)]:
        raise RequestError(
            f"data.path = {path}: {where}: a label is {str(bad[0])[:40]}; expected pairs of a name and a whole number, "
            f"as dataset_tool.py writes them; remove the file to have the folders as classes"
        )
    if lost := [name for name in images if name not in labels]:
        raise RequestError(
            f"data.path = {path}: {where}: {len(lost)} of {counted(len(images), 'image')} have no label in it, such as "
            f"{lost[0]}; copy all of it again, or remove the file to have the folders as classes"
        )
    return {name: str(labels[name]) for name in images}
