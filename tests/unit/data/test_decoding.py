"""ddpm/data/decoding.py: any picture that people have becomes what they see of it, or is refused by its name."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from ddpm.config.data import Data
from ddpm.data import decoding, sources
from ddpm.data.decoding import Decoding
from ddpm.data.packed import load_folder, open_source, pack
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.files import read_signed
from tests.saves import Unreadable

NOISE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def decoded(raw: bytes, size: int | None = None, **how: Any) -> tuple[np.ndarray, dict[str, int]]:
    told = Decoding(**how)
    return told.pixels(raw, size), dict(told.converted)


# ---------------------------------------------------------------- what stays as it is


@pytest.mark.parametrize(
    "raw",
    [
        encoded(Image.fromarray(NOISE)),
        encoded(Image.fromarray(NOISE), "BMP"),
        encoded(Image.fromarray(NOISE), "TIFF"),
        encoded(Image.fromarray(NOISE), "WEBP", lossless=True),
        encoded(Image.fromarray(NOISE).convert("RGBA")),
        encoded(Image.fromarray(NOISE), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        encoded(Image.fromarray(NOISE), icc_profile=b"no profile at all"),
        encoded(Image.fromarray(NOISE), exif=b"Exif\0\0no exif at all"),
    ],
    ids=["png", "bmp", "tiff", "webp", "opaque", "sRGB profile", "broken profile", "broken exif"],
)
def test_eight_bits_of_rgb_stay_as_they_are(raw: bytes) -> None:
    pixels, told = decoded(raw)
    assert np.array_equal(pixels, NOISE) and told == {}


def test_a_jpeg_is_what_pillow_makes_of_it() -> None:
    raw = encoded(Image.fromarray(NOISE), "JPEG")
    assert np.array_equal(decoded(raw)[0], np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours_are_the_same_in_rgb(mode: str) -> None:
    image = Image.fromarray(NOISE).convert(mode)
    pixels, told = decoded(encoded(image))
    assert np.array_equal(pixels, np.asarray(image.convert("RGB"))) and told == {}


# ---------------------------------------------------------------- what is converted


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int) -> None:
    upright = Image.fromarray(NOISE[:, :6])
    lying = upright
    for method in {  # how a camera that was held so lays the picture down
        1: (),
        2: ("FLIP_LEFT_RIGHT",),
        3: ("ROTATE_180",),
        4: ("FLIP_TOP_BOTTOM",),
        5: ("TRANSPOSE",),
        6: ("ROTATE_90",),
        7: ("TRANSVERSE",),
        8: ("ROTATE_270",),
    }[orientation]:
        lying = lying.transpose(Image.Transpose[method])
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, told = decoded(encoded(lying, exif=exif))
    assert np.array_equal(pixels, NOISE[:, :6])
    assert told == ({} if orientation == 1 else {"turned as their EXIF says": 1})


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_tiff_which_pillow_turns_itself_is_turned_once(orientation: int, compression: str | None) -> None:
    upright = Image.fromarray(NOISE[:, :6])
    lying = upright.transpose(Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90)
    raw = encoded(lying, "TIFF", tiffinfo={0x0112: orientation}, compression=compression)
    pixels, told = decoded(raw)
    assert np.array_equal(pixels, NOISE[:, :6]) and told == {"turned as their EXIF says": 1}


def test_what_was_packed_of_tiffs_before_they_were_turned_once_is_not_taken_for_them(tmp_path: Path) -> None:
    data = folder(tmp_path / "f", 2, 0)
    before = open_source(data).selection
    Image.fromarray(NOISE).save(tmp_path / "f" / "a" / "x.tiff")
    assert before is None and open_source(data).selection == {"tiff": 2}


@pytest.mark.parametrize(("background", "colour"), [("white", 255), ("black", 0), ("#808080", 128)])
def test_transparency_lies_upon_the_background(background: str, colour: int) -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 0, 255))
    image.putpixel((0, 0), (200, 100, 0, 0))
    image.putpixel((1, 0), (200, 100, 0, 51))
    pixels, told = decoded(encoded(image), background=background)
    assert pixels[0, 0].tolist() == [colour] * 3 and pixels[3, 3].tolist() == [200, 100, 0]
    assert np.abs(pixels[0, 1] - (0.2 * np.array([200, 100, 0]) + 0.8 * colour)).max() <= 1
    assert told == {f"laid upon {background}": 1}


def test_transparency_of_greys_and_palettes_is_seen_too() -> None:
    grey = Image.new("LA", (2, 1), (50, 255))
    grey.putpixel((0, 0), (50, 0))
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for raw in (encoded(grey), encoded(palette, transparency=0), encoded(Image.new("L", (2, 1), 0), transparency=0)):
        assert decoded(raw)[0][0, 0].tolist() == [255, 255, 255]


LEVELS = np.array([0, 257, 0x12FF, 32768, 65535], np.uint16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled(kind: str) -> None:
    by_hand = b"P5 5 1 65535\n" + LEVELS.astype(">u2").tobytes()  # Pillow 10 does not write it
    pixels, told = decoded(by_hand if kind == "PPM" else encoded(Image.fromarray(LEVELS[None]), kind))
    assert pixels[0, :, 0].tolist() == [0, 1, 19, 128, 255] and told == {"scaled from 16 bits": 1}


def png_of_16_bits(levels: np.ndarray, *, clear: bytes = b"") -> bytes:
    """Of (height, width, channels), which Pillow does not write. clear: of its chunk tRNS."""
    height, width, channels = levels.shape
    colour = {1: 0, 3: 2, 2: 4, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *([(b"tRNS", clear)] if clear else []), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff_of_one_row(data: bytes, width: int, bits: int, *, photometric: int = 1, sample_format: int = 1) -> bytes:
    """Of greys, which Pillow does not write in each of these forms. photometric: 0 if 0 is white."""
    tags = [(256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric)]
    tags += [(273, 4, 1, 200), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, 1, len(data)), (339, 3, 1, sample_format)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + data


def test_a_tiff_of_greys_is_as_bright_as_its_tags_say() -> None:
    twelve = bytes([0x00, 0x08, 0x00, 0xFF, 0xFF, 0xFF])  # 0, 0x800, 0xFFF, 0xFFF
    pixels, told = decoded(tiff_of_one_row(twelve, 4, 12))
    assert pixels[0, :, 0].tolist() == [0, 128, 255, 255] and told == {"scaled from 12 bits": 1}
    for bits, levels in ((8, [0, 16, 255]), (16, [0, 16 * 257, 65535])):
        data = np.array(levels, f"<u{bits // 8}").tobytes()
        for photometric, greys in ((1, [0, 16, 255]), (0, [255, 239, 0])):
            assert decoded(tiff_of_one_row(data, 3, bits, photometric=photometric))[0][0, :, 0].tolist() == greys
        with pytest.raises(ValueError, match="do not say what is white"):
            decoded(tiff_of_one_row(data, 3, bits, sample_format=2))


def tiff_of_16_bits(levels: np.ndarray) -> bytes:
    """The same as a TIFF of RGB."""
    height, width, channels = levels.shape
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200)]
    tags += [(277, 3, 1, channels), (278, 3, 1, height), (279, 4, 1, levels.nbytes)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 20) + struct.pack("<HHH", 16, 16, 16) + bytes(6)
    return (head + struct.pack("<H", len(tags)) + entries + bytes(4)).ljust(200, b"\0") + levels.astype("<u2").tobytes()


OPAQUE = np.full((1, 5, 1), 65535, np.uint16)
RGB_16 = LEVELS[None, :, None].repeat(3, axis=2)


@pytest.mark.parametrize(
    "raw",
    [
        png_of_16_bits(RGB_16),
        png_of_16_bits(np.concatenate([RGB_16, OPAQUE], 2)),
        png_of_16_bits(np.concatenate([LEVELS[None, :, None], OPAQUE], 2)),
        tiff_of_16_bits(RGB_16),
    ],
    ids=["rgb", "rgba", "grey and alpha", "tiff"],
)
def test_sixteen_bits_of_colours_are_their_higher_byte_a_level_below_at_most_and_counted(raw: bytes) -> None:
    """Pillow reads no more of them. Black stays black, white stays white, and nothing is clipped."""
    pixels, told = decoded(raw)
    assert pixels[0].tolist() == [[level] * 3 for level in (0, 1, 18, 128, 255)]
    assert np.abs(pixels[0, :, 0] - LEVELS / 257).max() < 1 and told == {"scaled from 16 bits": 1}


@pytest.mark.parametrize(("channels", "clear"), [(1, struct.pack(">H", 257)), (3, struct.pack(">HHH", 257, 257, 257))])
def test_a_transparent_level_of_sixteen_bits_is_seen_too(channels: int, clear: bytes) -> None:
    pixels, told = decoded(png_of_16_bits(RGB_16[..., :channels], clear=clear))
    assert pixels[0, :2, 0].tolist() == [0, 255] and pixels[0, 4, 0] == 255
    assert told == {"scaled from 16 bits": 1, "laid upon white": 1}


def wide_gamut() -> bytes:
    """A profile whose red and green are swapped against sRGB's: as other as colours can be."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(raw[128:132], "big")):
        tag = 132 + 12 * i
        raw[tag : tag + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(raw[tag : tag + 4]), raw[tag : tag + 4])
    return bytes(raw)


def test_colours_of_another_profile_become_srgbs() -> None:
    raw = encoded(Image.new("RGB", (2, 2), (255, 0, 0)), icc_profile=wide_gamut())
    pixels, told = decoded(raw)
    assert pixels[0, 0, 1] > 250 > 5 > pixels[0, 0, 0] and told == {"converted to sRGB": 1}


def test_cmyk_becomes_rgb() -> None:
    pixels, told = decoded(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 6 and told == {"converted from CMYK": 1}


def test_what_is_cropped_enlarged_or_shrunk_is_counted() -> None:
    assert decoded(encoded(Image.new("RGB", (9, 8))), 8)[1] == {"cropped to their middle": 1}
    assert decoded(encoded(Image.new("RGB", (4, 4))), 8)[1] == {"enlarged": 1}
    assert decoded(encoded(Image.new("RGB", (16, 16))), 8)[1] == {"shrunk to 8x8": 1}
    assert decoded(encoded(Image.new("RGB", (8, 8))), 8)[1] == {}


# ---------------------------------------------------------------- what is refused


FRAMES = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "animated png": (lambda: encoded(FRAMES[0], save_all=True, append_images=FRAMES[1:]), "2 frames or pages"),
    "animated webp": (lambda: encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "2 frames"),
    "pages": (lambda: encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "2 frames or pages"),
    "floats": (lambda: encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), "do not say what is white"),
    "32 bits": (lambda: encoded(Image.fromarray(np.zeros((8, 8), np.int32)), "TIFF"), "do not say what is white"),
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"hello", "no picture in a format"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_one_meaning_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    make, why = REFUSED[case]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(make())
    there = open_source(Data(name="images", path=str(tmp_path)))
    with pytest.raises(RequestError, match=rf"a/x\.png cannot be decoded \(.*{why}"):
        list(sources.read(there, "train", 8, tmp_path))


def test_a_picture_of_more_pixels_than_fit_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = encoded(Image.new("1", (20_000, 10_000)))  # more than Pillow's own limit
    assert decoded(large, 8)[0].shape == (8, 8, 3)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 10**8)
    with pytest.raises(ValueError, match="20000x10000 pixels, more than 100,000,000"):
        decoded(large, 8)


def test_a_picture_for_which_there_is_no_memory_is_named_whatever_is_to_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine can decode it: to leave it out would be another data set there."""
    data = folder(tmp_path / "f", 3, 0).model_copy(update={"skip_damaged": True})

    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Decoding, "pixels", full)
    with pytest.raises(EnvironmentLacks, match=r"a/00\.png: .* takes more memory than .*; make it smaller, remove it"):
        pack(data, "train", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- packing them


def folder(path: Path, num: int, damaged: int) -> Data:
    for i in range(num):
        where = path / "ab"[i % 2] / f"{i:02d}.png"
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(encoded(Image.new("RGB", (8, 8), (i, 0, 0))) if i >= damaged else (b"x" if i else b""))
    return Data(name="images", path=str(path), image_size=8)


def test_all_damaged_files_are_listed_in_one_pass(tmp_path: Path) -> None:
    data = folder(tmp_path / "f", 40, 30)
    with pytest.raises(RequestError, match="30 of 40 images cannot be decoded; replace or remove them") as e:
        pack(data, "train", tmp_path / "cache")
    lines = str(e.value).splitlines()
    assert lines[1] == "  a/00.png (the file is empty)" and lines[-2] == "  and 10 more" and len(lines) == 23
    assert "data.skip_damaged=true" in lines[-1] and list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(RequestError) as e:
        load_folder(tmp_path / "f")
    assert "30 of 40 images" in str(e.value) and "skip_damaged" not in str(e.value)


def test_the_rest_is_packed_on_request_and_the_list_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "f", 12, 3).model_copy(update={"skip_damaged": True})
    key, packed = pack(data, "train", tmp_path / "cache")
    assert packed.images[:, 0, 0, 0].tolist() == [4, 6, 8, 10, 3, 5, 7, 9, 11]  # of a, then of b
    assert packed.labels.tolist() == [0] * 4 + [1] * 5
    meta = read_signed(tmp_path / "cache" / key / "meta.json")
    assert list(meta["skipped"]) == ["a/00.png", "a/02.png", "b/01.png"] and meta["num_images"] == 9
    assert "3 of 12 images cannot be decoded" in capsys.readouterr().out
    np.save(tmp_path / "again.npy", packed.images)
    assert (tmp_path / "cache" / key / "images.npy").read_bytes() == (tmp_path / "again.npy").read_bytes()
    assert pack(data, "train", tmp_path / "cache")[1].digest == packed.digest
    assert capsys.readouterr().out == ""
    with pytest.raises(RequestError, match="3 of 12"):
        pack(data.model_copy(update={"skip_damaged": False}), "train", tmp_path / "cache")


def test_a_file_system_that_fails_for_a_moment_costs_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped for good, it would be a smaller data set under the same key."""
    data = folder(tmp_path / "f", 4, 1).model_copy(update={"skip_damaged": True})
    with monkeypatch.context() as m:
        Unreadable(m, {max((tmp_path / "f").rglob("*.png")): 1})
        with pytest.raises(OSError, match="Input/output error"):
            pack(data, "train", tmp_path / "cache")
    assert len(pack(data, "train", tmp_path / "cache")[1]) == 3


def test_where_nothing_can_be_decoded_nothing_is_packed(tmp_path: Path) -> None:
    data = folder(tmp_path / "f", 3, 3).model_copy(update={"skip_damaged": True})
    with pytest.raises(RequestError, match="not one image can be decoded"):
        pack(data, "train", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_converted_is_said_in_one_line_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "f", 4, 0)
    (tmp_path / "f" / "a" / "alpha.png").write_bytes(encoded(Image.new("RGBA", (9, 8), (1, 2, 3, 0))))
    key, packed = pack(data, "train", tmp_path / "cache")
    assert packed.images[2].min() == 255
    assert "of 5 pictures: 1 laid upon white, 1 cropped to their middle" in capsys.readouterr().out
    kept = read_signed(tmp_path / "cache" / key / "meta.json")["converted"]
    assert kept == {"laid upon white": 1, "cropped to their middle": 1}
    black, dark = pack(data.model_copy(update={"background": "black"}), "train", tmp_path / "cache")
    assert black != key and dark.images[2].max() == 0
