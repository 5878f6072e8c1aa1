"""YAML as people mean it, and a validation error as one line that names the key, the value and what is allowed.

Owns: the reading, for any pydantic model. Must not know: which keys there are (config.py, launch/cluster.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ddpm.errors import RequestError


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, `off` and `no` are words, a key stands once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (list, dict)):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is no key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
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


class _Dumper(yaml.SafeDumper):
    """Quotes what other readers of YAML, or ours, would not take for a word: a run may be named 1e-4."""


_Dumper.add_implicit_resolver(*_FLOAT)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """`tree` in its order, short lists and sections on one line; `load_yaml` gives the same back."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        raise RequestError(f"{where}: not valid YAML: {' '.join(str(e).split())}") from None


def field_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a config section, e.g. train.lr."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += field_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def unknown_key(key: str, known: list[str]) -> str:
    leaf = key.split(".")[-1]
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if elsewhere := [k for k in known if k.split(".")[-1] == leaf]:
        near = list(dict.fromkeys([*elsewhere, *(k for k in near if leaf in k)]))
    section = key.rsplit(".", 1)[0] + "." if "." in key else ""
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key!r} is a section; give one of its keys: {', '.join(inside)}"
    if near:
        return f"unknown key {key!r}; did you mean {' or '.join(map(repr, near))}?"
    siblings = [k for k in known if k.startswith(section)] if section else []
    return f"unknown key {key!r}; known: {', '.join(siblings or known)}"


def build(kind: type[Any], tree: Mapping[str, Any], where: str) -> Any:
    """Validate `tree` as `kind`; one RequestError with a line per problem."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as e:
        lines = {problem(kind, dict(err)): None for err in e.errors()}
        raise RequestError(f"{where}: " + "\n  ".join(lines)) from None


def problem(kind: type[BaseModel], err: dict[str, Any]) -> str:
    """One validation error as `key = value: what is allowed`."""
    loc = [str(p) for p in err["loc"] if not str(p).startswith(("function-", "literal[", "constrained-"))]
    known, beyond = field_keys(kind), ""
    key = ".".join(loc)
    while loc and ".".join(loc) not in known and err["type"] != "extra_forbidden" and len(loc) > 1:
        beyond = loc.pop()  # union branches, list positions and the keys of a mapping follow the key
        key = ".".join(loc) if ".".join(loc) in known else key
    if err["type"] in ("extra_forbidden", "invalid_key"):
        return unknown_key(key, known)
    message = str(err["msg"]).removeprefix("Value error, ")
    if err["type"] == "value_error":
        return message if not loc or loc[-1] in message else f"{key} = {message}"
    if err["type"] == "model_type":
        return f"{key} = {err['input']!r}: expected a section of keys; leave it out for the defaults"
    if err["type"] == "tuple_type":
        message = f"input should be a list, such as {'[Male, Smiling]' if 'attributes' in key else '[1, 2]'}"
    if err["type"] == "bool_type":
        message += ", true or false"
    section: Any = kind
    for part in key.split(".")[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else section
    field = section.model_fields.get(key.split(".")[-1]) if hasattr(section, "model_fields") else None
    allowed = f" (default {field.default!r})" if field is not None else ""
    if beyond and field is not None and get_origin(field.annotation) is dict:
        key, allowed = f"{key}.{beyond}", ""
    return f"{key} = {err['input']!r}: {message[0].lower()}{message[1:]}{allowed}"
