"""ddpm/run/log.py: amounts in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm.config.train import LENGTHS
from ddpm.errors import RequestError
from ddpm.run.log import counted
from ddpm.scoring.extractors import build_extractor
from ddpm.scoring.reference import image_features
from tests.training import make_config


@pytest.mark.parametrize(
    ("number", "what", "form", "words"),
    [
        *((0, "image", "", "0 images"), (1, "image", "", "1 image"), (2, "class", "", "2 classes")),
        *((1, "class", "", "1 class"), (50_000, "image", ",", "50,000 images"), (1, "file", ">3,", "  1 file")),
    ],
)
def test_one_thing_is_no_plural(number: int, what: str, form: str, words: str) -> None:
    assert counted(number, what, form) == words


def test_messages_say_one_thing_as_one(tmp_path: Path) -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(RequestError, match=r"^1 image: a score needs at least 2 on each side$"):
        list(image_features(images, build_extractor("pixels", "cpu"), lambda done, total: None))
    only = dict.fromkeys(LENGTHS) | {"total_images": 1}
    config = make_config(train__lr_schedule="cosine", **{f"train__{key}": value for key, value in only.items()})
    with pytest.raises(RequestError, match=r"^a length of 1 image: "):
        config.resolve_length(1)
