"""Decodes one picture, as cameras, scanners and editors write them, to 8-bit sRGB without transparency.

Owns how each kind of picture is converted, and counts the conversions; 8-bit RGB stays as it is. With 16 bits 65535 is
white, with 12 bits 4095: greys are rounded to the nearest level, and for colours Pillow keeps the higher byte, which is
at most one level less. Must not know where pictures come from.
https://pillow.readthedocs.io/en/stable/handbook/concepts.html#modes
"""

from __future__ import annotations

import contextlib
import functools
import io
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_PIXELS = 1 << 30
"""Largest picture that is decoded; it takes four gigabytes of memory."""
LARGE_PIXELS = 1 << 24
_large = threading.Lock()
"""Of pictures with more pixels one is decoded at a time: several threads take no more memory for them than one."""
PHOTOMETRIC, SAMPLE_FORMAT = 262, 339
"""TIFF's tags of whether 0 is white, which Pillow heeds with up to 8 bits, and of whether numbers have a sign."""
ORIENTATION = 0x0112
"""EXIF's tag of which way up a camera was held."""
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF orientation -> the Pillow transposition that turns the picture upright."""


@dataclass
class Decoding:
    """How pictures are decoded, and a count of what was done to them."""

    background: str = "white"
    """Colour behind transparent pixels, in a form that Pillow knows."""
    skip_damaged: bool = False
    """Leave out pictures that cannot be decoded."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Name -> reason, of pictures that could not be decoded."""
    converted: Counter[str] = field(default_factory=Counter)
    """Kind of change -> number of pictures."""

    def pixels(self, raw: bytes, size: int | None) -> np.ndarray:
        """The picture in `raw`, the bytes of its file, as `to_square` returns it. Raises Pillow's errors for a damaged
        picture, and ValueError for one that has no single meaning (several pages, floating-point pixels)."""
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = None  # our own limit follows, and is larger
        with Image.open(io.BytesIO(raw)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than {MOST_PIXELS:,}")
            with _large if image.width * image.height > LARGE_PIXELS else contextlib.nullcontext():
                return self.square(self._rgb(image), size)

    def square(self, rgb: Any, size: int | None) -> np.ndarray:
        """`to_square`, with a count of crops and of other sizes."""
        if size is not None and rgb.width != rgb.height:
            self.converted["cropped to their middle"] += 1
        if size is not None and min(rgb.size) < size:
            self.converted["enlarged"] += 1
        if size is not None and min(rgb.size) > size:
            self.converted[f"shrunk to {size}x{size}"] += 1
        return to_square(rgb, size)

    def _rgb(self, image: Any) -> Any:
        from PIL import Image

        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a camera's, with a preview in it
            raise ValueError(f"it has {image.n_frames} frames or pages; keep one of them as a file of its own")
        tags, bits = getattr(image, "tag_v2", {}), _bits(image)
        is_signed = 2 in np.ravel(tags.get(SAMPLE_FORMAT, 1))
        if is_signed or image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ValueError("its pixels do not say what is white; store them with 8 or 16 bits")
        profile, is_negative = image.info.get("icc_profile"), tags.get(PHOTOMETRIC) == 0
        turned = _orientation(image)
        image.load()
        if turned in UPRIGHT:
            self.converted["turned as their EXIF says"] += 1
        if (turned := _orientation(image)) in UPRIGHT:  # else Pillow has done it, as it does with TIFF
            image = image.transpose(Image.Transpose[UPRIGHT[turned]])
        if bits > 8:
            self.converted[f"scaled from {bits} bits"] += 1
        if image.mode.startswith("I"):
            white, clear = (1 << bits) - 1, image.info.get("transparency")
            levels = np.asarray(image).astype(np.uint32)
            levels = white - levels if is_negative else levels
            image = Image.fromarray(((levels * 255 + white // 2) // white).astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            image = image.convert("RGBA")
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        if image.mode in ("CMYK", "LAB"):
            self.converted[f"converted from {image.mode}"] += 1
        rgb = self._srgb(image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB"), profile)
        if alpha is not None and alpha.getextrema()[0] < 255:
            self.converted[f"laid upon {self.background}"] += 1
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, self.background), alpha)
        return rgb

    def _srgb(self, image: Any, profile: bytes | None) -> Any:
        from PIL import ImageCms

        if profile is not None and (transform := _transform(profile, image.mode)) is not None:
            self.converted["converted to sRGB"] += 1
            return ImageCms.applyTransform(image, transform)
        return image.convert("RGB")


def load_formats() -> None:
    """Load all that Pillow reads, before several threads look for a picture's format: one that looks while another
    loads them may miss its own."""
    from PIL import Image

    Image.preinit()
    Image.init()


def _bits(image: Any) -> int:
    """How many bits a channel has in a picture's file, where they are more than 8, else 8; its mode may have fewer. Ask
    before loading it."""
    args = image.tile[0][3] if image.tile else ""  # by place: before Pillow 11 it has no name
    rawmode = str(args if isinstance(args, str) else next(iter(args or ()), ""))
    if ";12" in rawmode:
        return 12
    return 16 if image.mode.startswith("I") or ";16" in rawmode else 8


def _orientation(image: Any) -> int:
    """EXIF's orientation; 1, upright, if there is none or it is damaged, as viewers do."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # struct's, Pillow's and Python's
        return 1


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """The transformation from a colour profile to sRGB; None if it changes nothing by more than one level, or the
    profile is damaged."""
    from PIL import Image, ImageCms

    try:
        there = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform: Any = ImageCms.buildTransform(there, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 6).astype(np.uint8)
        colours = np.stack(np.meshgrid(*[levels] * 3), -1).reshape(-1, 1, 3)
        sample = Image.fromarray(colours).convert(mode)
        moved = np.asarray(ImageCms.applyTransform(sample, transform)).astype(int) - np.asarray(sample.convert("RGB"))
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return None
    return transform if np.abs(moved).max() > 1 else None


def to_square(image: Any, size: int | None) -> np.ndarray:
    """A PIL image as uint8 (size, size, 3): RGB, centre-cropped to a square and resized with Lanczos; size None: kept
    as it is, (H, W, 3)."""
    from PIL import Image

    image = image.convert("RGB")
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.uint8)
