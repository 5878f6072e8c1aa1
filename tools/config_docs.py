"""Writes configs/README.md, which has every key of a config, and the table of recipes in README.md: from the code.

python -m tools.config_docs
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ddpm.config.schema import Config
from ddpm.data.sources import NUM_IMAGES
from ddpm.run.log import counted
from launch.cluster.environment import PROJECT
from launch.terminal import plan, recipes

HEAD = """# Configs

Recipes, and every key that a config may have. `python -m tools.config_docs` writes this file from `ddpm/config/`; a
test checks that it is up to date. Keys on the command line override those of the file:

```
python launch/submit.py configs/cifar10.yaml train.lr=1e-4 'model.channel_mults=[1, 2, 2]' --partition gpu --dry-run
python launch/submit.py --list
python tools/inspect_config.py configs/cifar10.yaml
```

The first prints the resulting config and queues nothing, the second lists the recipes, the third shows layers, memory
and noise schedule of one. A recipe of your own is a YAML file with the keys that differ from the defaults; an unknown
key is refused, and the nearest known one is named. `configs/cluster/example.yaml` explains site profiles
(`configs/cluster/*.yaml`).

Keys that change the mathematics (`seed`, `data`, `model`, `diffusion`, and `train` without its length and resources)
make the config's digest. A run resumes only under the digest that it began with.
"""
NUMBERS = {int: "whole number", float: "number", str: "text", bool: "true, false", type(None): "null"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


# ---------------------------------------------------------------- keys


def keys() -> str:
    """A table for each section."""
    own = [(name, field) for name, field in Config.model_fields.items() if _section(field.annotation) is None]
    parts = ["## At the top\n\n" + _table(own)]
    for name, field in Config.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            parts.append(f"## {name}\n\n{_table(_flat(section, name))}")
    return "\n\n".join(parts)


def _section(kind: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may hold."""
    kinds = [kind, *get_args(kind)]
    return next((k for k in kinds if isinstance(k, type(BaseModel))), None)


def _flat(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        yield f"{prefix}.{name}", field
        if (inner := _section(field.annotation)) is not None:
            yield from _flat(inner, f"{prefix}.{name}")


def _table(fields: Any) -> str:
    lines = ["| key | values | default | what it is |", "|---|---|---|---|"]
    for key, field in fields:
        told = " ".join((field.description or "").split())
        lines.append("| " + " | ".join(map(_cell, (f"`{key}`", _values(field), _default(field), told))) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    """The field's default in YAML."""
    value = field.get_default(call_default_factory=True)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    kind = _kind(field.annotation)
    return kind.replace("number", f"number {bounds}", 1) if bounds else kind


def _bounds(metadata: list[Any]) -> str:
    told = [f"{sign} {_number(getattr(m, name))}" for m in metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return ", ".join(told)


def _number(value: float) -> str:
    power = int(value).bit_length() - 1
    return f"2^{power}" if value >= 2**16 and value == 2**power else f"{value:,}"


def _kind(kind: Any) -> str:
    """In words; pydantic's bounds of what is inside a union are told there."""
    origin, args = get_origin(kind), get_args(kind)
    if kind in NUMBERS:
        return NUMBERS[kind]
    if origin is Annotated:
        inner = [m for extra in args[1:] for m in getattr(extra, "metadata", [])]
        return f"{_kind(args[0])} {_bounds(inner)}".strip()
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, UnionType):
        return ", or ".join(_kind(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_kind(args[0])}s" if args[0] is not str else "a list of words"
    if origin is dict:
        return "`{name: true}`"
    assert _section(kind) is not None, kind
    return "keys as below"


# ---------------------------------------------------------------- recipes


def recipe_table() -> str:
    """What each recipe trains, for how long, and what was reported of it."""
    lines = [
        "| config | data | parameters | steps × batch | GPU hours | FID as published |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((PROJECT / "configs").glob("*.yaml")):
        if path.stem != "quickstart":
            lines.append("| " + " | ".join(_recipe(path)) + " |")
    return "\n".join(lines)


def _recipe(path: Path) -> tuple[str, ...]:
    recipe = recipes.read(path)
    config = recipe.config.resolve_length(NUM_IMAGES[recipe.config.data.name, "train"])
    size, num = config.data.image_size, config.model.num_classes
    hours = plan.gpu_hours(config)
    by = "Ho et al. 2020" if "Ho, Jain, Abbeel" in recipes.header(path.read_text()) else "its project"
    return (
        f"`{path.stem}`",
        f"{config.data.name} {size}×{size}" + (f", {counted(num, 'class')}" if num else ""),
        f"{config.network.num_parameters / 1e6:.1f} M",
        f"{config.train.total_steps:,} × {config.train.global_batch}",
        "not measured" if hours is None else f"{hours:.0f}",
        "none" if recipe.fid in ("", "none") else f"{recipe.fid} ({by})",
    )


# ---------------------------------------------------------------- files


def configs_readme() -> str:
    return f"{HEAD}\n{keys()}\n"


def readme(text: str) -> str:
    """README.md with today's table of recipes in the place of the one that it has."""
    return re.sub(r"^\| config \|.*?(?=\n\n)", lambda _: recipe_table(), text, count=1, flags=re.M | re.S)


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.config_docs", description=__doc__.splitlines()[0]).parse_args()
    (PROJECT / "configs" / "README.md").write_text(configs_readme())
    top = PROJECT / "README.md"
    top.write_text(readme(top.read_text()))


if __name__ == "__main__":
    main()
