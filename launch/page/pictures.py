"""Grids of samples as pictures inside a page: some of them, side by side by step, none too large."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

from ddpm.run.files import DamagedFile, read_bytes
from ddpm.run.paths import RunDir, listed
from launch.page.markup import Html, join, note, tag

MOST = 6
MOST_PIXELS = 560
"""Along an edge; a larger one is made smaller."""
MOST_BYTES = 32 << 20
"""Largest file that is opened."""
MOST_AREA = 64 << 20
"""Pixels, as the file says before it is unpacked."""


def grids(run: RunDir, most: int = MOST) -> Html:
    """The first and the last, and others evenly between; how many were left out is told."""
    found = _by_step(run)
    if not found:
        return note("There is no grid.")
    steps = spread(sorted(found), most)
    figures, odd = [], []
    for step in steps:
        try:
            figures.append(_figure(step, found[step]))
        except (OSError, DamagedFile) as e:
            odd.append(f"{found[step].name} cannot be shown ({str(e).splitlines()[0] if str(e) else type(e).__name__})")
    words = [f"{len(found) - len(steps)} more of other steps in grids/"] if len(steps) < len(found) else []
    told = note("; ".join([*words, *odd]), ".") if words or odd else Html("")
    return join([tag("div", *figures, class_="pictures"), told])


def last_grid(run: RunDir, name: str) -> Html:
    """The newest one, under a name; "" where there is none that can be shown."""
    found = _by_step(run)
    try:
        return _figure(max(found), found[max(found)], name) if found else Html("")
    except (OSError, DamagedFile):
        return Html("")


def spread(items: list[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _by_step(run: RunDir) -> dict[int, Path]:
    try:
        files = listed(run.grids)
    except OSError:
        return {}
    found = ((re.fullmatch(r"step-([0-9]{9,18})\.png", path.name), path) for path in files)
    return {int(m.group(1)): path for m, path in found if m}


def _figure(step: int, path: Path, name: str = "") -> Html:
    data, width, height = _png(path)
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    words = ", ".join(filter(None, [name, f"step {step:,}"]))
    image = tag("img", src=source, alt=f"a grid of samples, {words}", width=width, height=height)
    return tag("figure", Html(image.removesuffix("</img>")), tag("figcaption", words))


def _png(path: Path) -> tuple[bytes, int, int]:
    """(The bytes of a PNG, made smaller if it is large, its width, its height.) Raises OSError, DamagedFile."""
    from PIL import Image  # not where scripts begin

    data = read_bytes(path, MOST_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MOST_AREA:
                raise DamagedFile(f"{image.width} x {image.height} pixels")
            image.load()
            if max(image.size) > MOST_PIXELS:
                image = image.convert("RGB")
                image.thumbnail((MOST_PIXELS, MOST_PIXELS))
                packed = io.BytesIO()
                image.save(packed, format="PNG", optimize=True)
                data = packed.getvalue()
            return data, *image.size
    except (SyntaxError, ValueError, Image.DecompressionBombError) as e:  # Pillow raises these for some damages
        raise DamagedFile(str(e)) from None
