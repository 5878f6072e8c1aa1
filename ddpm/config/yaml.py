"""YAML as people mean it: 1e-4 is a number, `off` and `no` are words, no key occurs twice, and sizes are bounded."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ddpm.errors import RequestError, shown
from ddpm.run.files import DamagedFile, open_file

MAX_CHARS = 1 << 18
"""Most characters of a file or value; our largest config has 3,000."""
MAX_EXPANDED_CHARS = 1 << 20
"""The same with every alias expanded: ten lines, each with ten aliases of the line before, would be 10^10 words."""
MAX_DEPTH = 20
"""Deepest nesting; a config has five levels."""
MAX_DIGITS = 40
"""Most digits of a whole number."""


class _Loader(yaml.SafeLoader):
    """A safe loader with these rules."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._open = 0
        self._has_aliases = "*" in stream
        self._sizes: dict[int, tuple[int, int]] = {}
        """id of a composed node -> its characters and depth, with aliases expanded."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        alias = self.peek_event() if self._has_aliases and self.check_event(yaml.AliasEvent) else None
        self._open += 1
        if self._open > MAX_DEPTH:  # before anything recurses as deep
            raise self._beyond(self.peek_event(), f"more than {MAX_DEPTH} levels deep")
        node: Any = super().compose_node(parent, index)
        self._open -= 1
        if not self._has_aliases:
            return node  # no larger than its text
        if alias is None:
            self._measure(node)
        elif id(node) not in self._sizes:
            raise self._beyond(alias, "an alias of something that it is itself a part of")
        return node

    def _measure(self, node: Any) -> None:
        if isinstance(node, yaml.ScalarNode):
            children, chars = [], len(node.value)
        else:
            children, chars = [c for v in node.value for c in (v if isinstance(v, tuple) else (v,))], 0
        sizes = [self._sizes[id(child)] for child in children]
        chars += 1 + sum(size for size, _ in sizes)
        depth = 1 + max((depth for _, depth in sizes), default=0)
        if chars > MAX_EXPANDED_CHARS or depth > MAX_DEPTH:
            raise self._beyond(node, "more than fits with its aliases written out")
        self._sizes[id(node)] = chars, depth

    def _beyond(self, at: Any, what: str) -> yaml.YAMLError:
        return yaml.composer.ComposerError(None, None, what, at.start_mark)

    def construct_yaml_int(self, node: Any) -> int:
        if len(str(node.value)) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a whole number of {len(node.value)} characters, at most {MAX_DIGITS}", node.start_mark
            )
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: Any) -> float:
        value = float(super().construct_yaml_float(node))
        whole = re.fullmatch(r"[-+]?[0-9][0-9_]*[eE]\+?[0-9]{1,2}", node.value) and abs(value) < 2**53
        return int(value) if whole else value  # 1e6 is a number of steps

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            merge = key_node.tag == "tag:yaml.org,2002:merge"
            key = "<<" if merge else self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{shown(key)} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_FLOAT = (
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.(?:inf|nan))$"
    ),
    [*"-+0123456789."],
)
_Loader.add_implicit_resolver(*_FLOAT)
# as in YAML 1.2: 12:00 and 2026-12-01 are words, and so is 00123, whose zeros may matter
_INT = ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(*_INT)


try:
    from yaml.cyaml import CParser  # type: ignore[attr-defined]
except ImportError:  # PyYAML was built without libyaml
    _Fast: type[_Loader] = _Loader
else:

    class _Fast(_Loader):  # type: ignore[no-redef]
        """The same with libyaml's parser: a status view reads the configs of hundreds of runs."""

        def __init__(self, stream: str) -> None:
            super().__init__("")
            self._has_aliases = "*" in stream
            self._events = CParser(stream)
            for name in ("check_event", "peek_event", "get_event"):
                setattr(self, name, getattr(self._events, name))


class _Dumper(yaml.SafeDumper):
    """Quotes words that a YAML reader would take for something else: a run may be named 1e-4."""


_Dumper.add_implicit_resolver(*_FLOAT)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """`tree` in its order, short lists and sections on one line; `load_yaml` gives the same back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def read_text(path: Path) -> str:
    """The text of a YAML file. Raises RequestError if it is no regular file or too long; OSError,
    UnicodeDecodeError."""
    try:
        with io.TextIOWrapper(open_file(path), encoding="utf-8") as f:
            text = f.read(MAX_CHARS + 1)
    except DamagedFile as e:
        raise RequestError(f"{path.parent / str(e)}: this is no config; name another file") from None
    if len(text) > MAX_CHARS:
        raise RequestError(f"{path}: more than {MAX_CHARS} characters: this is no config; name another file")
    return text


def load_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. RequestError beginning with `where` if it is not valid or exceeds the bounds above."""
    try:
        if len(text) > MAX_CHARS:
            raise ValueError(f"{len(text)} characters, at most {MAX_CHARS}")
        try:
            return yaml.load(text, Loader=_Fast)
        except Exception:  # the other parser says what is wrong with the text, and shows where
            return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise RequestError(f"{where}: not valid YAML: nested too deeply") from None
    except Exception as e:  # its constructors raise what Python does for `2020-13-45` or `!!int word`
        raise RequestError(f"{where}: not valid YAML: {_told(e)}") from None


def _told(e: Exception) -> str:
    """An error of the YAML parser in one line, without the text itself, which may contain a secret."""
    if not isinstance(e, yaml.MarkedYAMLError):
        return " ".join(str(e).split())
    mark = e.problem_mark or e.context_mark
    where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
    return ", ".join(filter(None, [e.context, e.problem])) + where


def written_items(text: str, where: str) -> list[str]:
    """The items of `A,B,[C,D]` as text: commas inside brackets and quotes do not separate.

    Raises RequestError beginning with `where`.
    """
    inside = f"[{text}]"
    try:
        node: Any = yaml.compose(inside, Loader=_Loader)
    except yaml.YAMLError as e:
        if not all(map(str.strip, text.split(","))) and not re.search(r"[][{}'\"]", text):
            raise RequestError(f"{where}: an empty value") from None
        raise RequestError(f"{where}: not valid YAML: {_told(e)}") from None
    if node.end_mark.index != len(inside):
        raise RequestError(f"{where}: not valid YAML: it goes on after a bracket that opens nowhere")
    return [inside[item.start_mark.index : item.end_mark.index] for item in node.value]
