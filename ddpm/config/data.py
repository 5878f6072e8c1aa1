"""The config's `data`: which images, and how they are cut."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ddpm.config.attributes import NAMES, unknown_name
from ddpm.config.section import Section, Strs


def _colour(text: str) -> str:
    if not re.fullmatch(r"white|black|gray|#[0-9a-fA-F]{6}", text):
        raise ValueError(f"{text!r}: use white, black, gray, or a colour as #20c0ff")
    return text


class Data(Section):
    name: Literal["cifar10", "celeba", "images", "digits"] = "cifar10"
    """`cifar10` and `celeba` (torchvision downloads them), `images` (a folder or zip of class folders, or an
    array), `digits` (scikit-learn's)."""
    path: str | None = None
    """Where the data is: for `images` a folder, .zip, .npz or .npy; for `cifar10` torchvision's root, or as for
    `images`; for `celeba` torchvision's root, or the folder that holds the images and their lists."""
    image_size: int = Field(32, ge=4, le=1024)
    """Height and width in pixels; other sizes are centre-cropped to a square and resized (Lanczos, antialiased)."""
    flip: bool = True
    """Mirror each training image with probability 1/2."""
    attributes: dict[str, bool] = {}  # noqa: RUF012 (pydantic copies it)
    """`celeba` alone: keep the images that have (true) or lack (false) each of these, e.g. {Smiling: true}."""
    label_attributes: Strs = ()
    """`celeba` alone: bit i of an image's label says whether it has attribute i of this list; num_classes must be 2 to
    the number of attributes."""
    background: Annotated[str, AfterValidator(_colour)] = "white"
    """Colour behind transparent pictures: white, black, gray or #rrggbb."""
    skip_damaged: bool = False
    """Leave out pictures that cannot be decoded, and list them beside the packed data. false: they are an error, which
    names all of them."""

    @model_validator(mode="after")
    def _images_need_a_path(self) -> Data:
        if self.name == "images" and self.path is None:
            raise ValueError(
                "data.path is needed for data.name=images: a folder or a .zip of images in class folders, an .npz or "
                "an .npy"
            )
        return self

    @model_validator(mode="after")
    def _attributes_are_celebas(self) -> Data:
        labels = list(self.label_attributes)
        for key, value in (("attributes", self.attributes), ("label_attributes", labels)):
            if value and self.name != "celeba":
                raise ValueError(f"data.{key} = {value}: data.name={self.name} has none; leave it out, or use celeba")
        if len(set(labels)) < len(labels):
            raise ValueError(f"data.label_attributes = {labels}: name each attribute once")
        if wrong := unknown_name(self.attributes, labels, NAMES):
            raise ValueError(wrong)
        return self
