"""Labels and classes of the data: their digest, what a run keeps of them, and how they have changed.

The digest of the pixels (whole.py) covers which images there are, and their order. Labels and names of classes do not
affect a model without classes, so they are compared only if `model.num_classes` is set.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

from ddpm.data.listing import readable
from ddpm.errors import RequestError
from ddpm.run.files import sha256_json
from ddpm.run.log import counted, plain

if TYPE_CHECKING:
    import numpy as np

    from ddpm.config.schema import Config
    from ddpm.data.whole import PackedImages

SHOWN = 4
"""Number of changed classes that a message names."""
TOLD = 40
"""Number of classes that a message lists."""


def labels_digest(labels: np.ndarray, classes: Sequence[str]) -> str:
    """sha256 over the label of every image, and over the names of the classes in their order."""
    import numpy as np  # here, so that scripts start without it

    indices = hashlib.sha256(np.ascontiguousarray(labels, dtype="<i8").tobytes()).hexdigest()
    return sha256_json({"classes": list(classes), "labels": indices})


def labels_record(packed: PackedImages) -> dict[str, Any]:
    """`labels` of run.json: {"digest", "classes": name -> number of images, in the order of their indices}."""
    import numpy as np

    counts = np.bincount(packed.labels[packed.labels >= 0], minlength=len(packed.classes)).tolist()
    named = dict(zip(packed.classes, counts, strict=False))
    return {"digest": labels_digest(packed.labels, packed.classes), "classes": named}


def class_names(config: Config, record: Mapping[str, Any]) -> list[str]:
    """Class names by label; [] if the model has no classes, or run.json (`record`) does not name them."""
    named = (record.get("labels") or {}).get("classes") or {}
    return [str(name) for name in named] if config.model.num_classes == len(named) else []


def class_index(word: str, names: Sequence[str], what: str) -> int:
    """The label of the class that `word` names, or whose number it is if no class has that name. names: by label.

    An umlaut in a folder's name may be two characters, as macOS writes it, and one as it is typed; what cannot be
    printed may be given as messages write it. Raises RequestError, which begins with `what`, if there is no such class.
    """
    word = readable(word)
    if word in names:
        return names.index(word)
    word, composed = normalize("NFC", word), [normalize("NFC", name) for name in names]
    for known in (composed, [plain(name) for name in composed], [str(label) for label in range(len(names))]):
        if word in known:
            return known.index(word)
    more = f", and {len(names) - TOLD} more" if len(names) > TOLD else ""
    lower = {name.lower(): name for name in composed}
    near = difflib.get_close_matches(word.lower(), lower, 1, 0.7)
    meant = f"; did you mean {lower[near[0]]!r}?" if near else ""
    raise RequestError(f"{what}: no class {word!r}; there are {', '.join(map(plain, names[:TOLD]))}{more}{meant}")


def told_of_classes(record: dict[str, Any]) -> str:
    """One line with the classes of a `labels_record`, their indices and numbers of images; "" for a single class."""
    each = [f"{i} = {plain(name) or 'no folder'} ({num:,})" for i, (name, num) in enumerate(record["classes"].items())]
    more = f", and {len(each) - TOLD} more" if len(each) > TOLD else ""
    return f"classes: {', '.join(each[:TOLD])}{more}" if len(each) > 1 else ""


def labels_changed(kept: dict[str, Any] | None, here: dict[str, Any]) -> str | None:
    """For a message: how the labels of the data differ from those that a run keeps (both as of `labels_record`). None
    if they do not, or the run keeps none, as old runs."""
    if not kept or here["digest"] == kept.get("digest"):
        return None
    old, new = kept.get("classes") or {}, here["classes"]
    if list(old) != list(new):
        moved = [(i, a, b) for i, (a, b) in enumerate(zip_longest(old, new)) if a != b]
        told = [f"class {i} was {_word(a)} and is {_word(b)} now" for i, a, b in moved[:SHOWN]]
        return "its classes changed: " + ", ".join(told) + _more(len(moved))
    counts = [
        f"{name!r} had {counted(old[name], 'image')} and has {new[name]}" for name in old if old[name] != new[name]
    ]
    if counts:
        return "images changed their class: " + ", ".join(counts[:SHOWN]) + _more(len(counts))
    return "images changed their class, and no class its number of images"


def _word(name: str | None) -> str:
    return "none" if name is None else repr(name)


def _more(num: int) -> str:
    return f" (and {num - SHOWN} more)" if num > SHOWN else ""
