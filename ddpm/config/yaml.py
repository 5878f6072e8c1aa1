"""YAML as people mean it: 1e-4 is a number, `off` and `no` are words, a key stands once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

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
