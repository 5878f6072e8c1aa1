"""HTML in which all text is escaped: only `Html` values are markup."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ddpm.run.log import plain


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Part = str | Html


def text(words: object) -> Html:
    """Any words as they read."""
    return words if isinstance(words, Html) else Html(html.escape(plain(words)))


def join(parts: Iterable[Part], between: str = "") -> Html:
    return Html(text(between).join(text(part) for part in parts))


def tag(name: str, *inside: Part, **attributes: object) -> Html:
    """An element; an attribute that is None is left out, `class_` is class, and `stroke_width` is stroke-width."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    shown = "".join(f' {key}="{text(value)}"' for key, value in given.items())
    return Html(f"<{name}{shown}>{join(inside)}</{name}>")


class Column(NamedTuple):
    name: Part
    right: bool = False
    wraps: bool = False
    """Whether its text may go on in a further line."""


def table(columns: Sequence[Column], rows: Sequence[Sequence[Part]], class_: str | None = None) -> Html:
    """A table that scrolls inside itself where it is too wide. Columns in which nothing stands are left out."""
    used = [i for i in range(len(columns)) if any(row[i] for row in rows)]

    def cells(kind: str, row: Sequence[Part]) -> Html:
        return tag("tr", *(tag(kind, row[i], class_=_class_of(columns[i])) for i in used))

    body = tag("tbody", *(cells("td", row) for row in rows))
    named = any(column.name for column in columns)
    head = tag("thead", cells("th", [column.name for column in columns])) if named else Html("")
    return tag("div", tag("table", head, body, class_=class_), class_="scroll", tabindex=0)


def _class_of(column: Column) -> str | None:
    return "r" if column.right else "wide" if column.wraps else None


def section(title: str, *inside: Part) -> Html:
    return tag("section", tag("h2", title), *inside)


def note(*inside: Part) -> Html:
    """A sentence of small print."""
    return tag("p", *inside, class_="note")


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
BEGINNING = (
    '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
)
"""The beginning of every page that `document` makes."""


def document(title: str, *inside: Part, style: str) -> str:
    """A whole page, which may load nothing but the pictures in it, whatever stands in it."""
    head = join([
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        Html('<link rel="icon" href="data:,">'),
        tag("title", title),
        tag("style", Html(style)),
    ])  # fmt: skip
    return f"{BEGINNING}{head}</head>\n<body>{tag('main', *inside)}</body>\n</html>\n"
