"""Base class of config sections: typed, frozen, and each mistake is one line with the key and what is allowed.

Owns: these messages, for any pydantic model. Must not know: which keys there are (other files here, site profiles).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ddpm.config.synonyms import SYNONYMS
from ddpm.errors import RequestError, shown


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Ints = Annotated[tuple[int, ...], BeforeValidator(_listed)]
Strs = Annotated[tuple[str, ...], BeforeValidator(_listed)]

MOST = 12
"""Number of keys that a message lists."""
PLAIN = {
    **{"Input should be": "must be", "a valid integer": "a whole number", "a valid number": "a number"},
    **{
        "a valid string": "a word, or a number in quotes",
        "a valid boolean": "true or false",
        "a valid dictionary": "keys and values",
    },
    **{"greater than or equal to": "at least", "less than or equal to": "at most", "greater than": "more than"},
}
"""pydantic's words -> ours."""


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    all_keys: ClassVar[str] = ""
    """For messages: where a person finds all keys."""
    secret: ClassVar[bool] = False
    """Whether its values are secret and must not appear in messages."""


def field_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a config section, e.g. train.lr."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type(BaseModel)):  # to Python 3.10 dict[str, bool] is a `type` as well
            keys += field_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def unknown_key(key: str, known: list[str], where: str = "") -> str:
    """The message for an unknown key, with the keys that may be meant. where: where a person finds all keys."""
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        some = ", ".join(inside[:MOST]) + (f", …; {where}" if inside[MOST:] else "")
        return f"{key!r} is a section; give one of its keys: {some}"
    section, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.startswith(f"{section}.")] or known
    words = [k.rpartition(".")[2] for k in siblings] + [word for word in SYNONYMS if meant(word, siblings)]
    alike = [meant(word, siblings)[0] for word in difflib.get_close_matches(leaf, words, 3, 0.75)]
    if near := meant(key, known) or alike[:1]:
        return f"unknown key {shown(key)}; did you mean {' or '.join(map(repr, near))}?"
    ratio = {k: difflib.SequenceMatcher(None, leaf, k.rpartition(".")[2]).ratio() for k in siblings}
    nearest = sorted(siblings, key=lambda k: -ratio[k])[:3]
    return f"unknown key {shown(key)}; the nearest are {', '.join(nearest)}" + (f"; {where}" if where else "")


def meant(key: str, known: list[str]) -> list[str]:
    """The keys that `key` may mean, the likeliest first: keys of that name in other sections, and keys that other
    projects call so; if the named section has some, only those."""
    section, _, leaf = key.rpartition(".")
    other = [k for k in SYNONYMS.get(leaf, ()) if k in known]
    same = [k for k in known if k.rpartition(".")[2] == leaf]
    found = list(dict.fromkeys([*other, *same]))
    return [k for k in found if k.startswith(f"{section}.")] or found


def build(kind: type[Any], tree: Mapping[str, Any], where: str) -> Any:
    """Validate `tree` as `kind`; one RequestError with a line per problem."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as e:
        told: dict[str, list[Fault]] = {}
        for fault in dict.fromkeys(problem(kind, dict(err)) for err in e.errors()):
            told.setdefault(fault.what, []).append(fault)
        lines = [what + ", or ".join(f.allowed for f in faults) + faults[0].more for what, faults in told.items()]
        raise RequestError(f"{where}: " + "\n  ".join(lines)) from None


class Fault(NamedTuple):
    """What is wrong with a value. Each type of a union (`auto`, true or false) finds its own; one line tells all."""

    what: str
    """`key = value: must be `, or a whole sentence."""
    allowed: str = ""
    more: str = ""


def problem(kind: type[BaseModel], err: dict[str, Any]) -> Fault:
    """One validation error in words."""
    loc = [str(p) for p in err["loc"] if not str(p).startswith(("function-", "literal[", "constrained-"))]
    known, beyond = field_keys(kind), ""
    key = ".".join(loc)
    while loc and ".".join(loc) not in known and err["type"] != "extra_forbidden" and len(loc) > 1:
        beyond = loc.pop()  # union branches, list positions and the keys of a mapping follow the key
        key = ".".join(loc) if ".".join(loc) in known else key
    if err["type"] != "value_error" and (inside := _secret_section(kind, loc)):
        keys = ", ".join(k.removeprefix(f"{inside}.") for k in known if k.startswith(f"{inside}."))
        return Fault(f"{inside}: what is there is none of its keys' values, and not shown here; its keys: {keys}")
    if err["type"] in ("extra_forbidden", "invalid_key"):
        return Fault(unknown_key(key, known, kind.all_keys if issubclass(kind, Section) else ""))
    message = str(err["msg"]).removeprefix("Value error, ")
    for theirs, ours in PLAIN.items() if err["type"] != "value_error" else ():
        message = message.replace(theirs, ours)
    if err["type"] == "value_error":
        is_named = bool(loc) and re.search(rf"\b{re.escape(loc[-1])}\b", message)
        return Fault(message if not loc or is_named else f"{key} = {message}")
    if err["type"] == "model_type":
        keys = ", ".join(k.removeprefix(f"{key}.") for k in known if k.startswith(f"{key}."))
        of = f" ({keys})" if keys else ""
        return Fault(f"{key} = {shown(err['input'])}: expected a section of keys{of}; leave it out for the defaults")
    if err["type"] == "tuple_type":
        message = f"must be a list, such as {'[Male, Smiling]' if 'attributes' in key else '[1, 2]'}"
    if err["type"] == "int_type" and isinstance(err["input"], str):
        message = "must be a whole number, without quotes, colons or zeros before it"
    section: Any = kind
    for part in key.split(".")[:-1]:
        section = section.model_fields[part].annotation if part in section.model_fields else section
    field = section.model_fields.get(key.split(".")[-1]) if hasattr(section, "model_fields") else None
    allowed = ""
    if field is not None:
        allowed = " (or leave it out)" if field.default in (None, ()) else f" (default {field.default!r})"
    if err["type"] == "literal_error" and (near := _near(err["input"], str(err["ctx"]["expected"]))):
        allowed += f"; did you mean {near!r}?"
    if beyond and field is not None and get_origin(field.annotation) is dict:
        key, allowed = f"{key}.{beyond}", ""
    message = message[0].lower() + message[1:]
    must_be = "must be " if message.startswith("must be ") else ""
    return Fault(f"{key} = {shown(err['input'])}: {must_be}", message.removeprefix(must_be), allowed)


def _near(word: object, expected: str) -> str | None:
    """The word of `expected` ("'this', 'that' or 'those'") that `word` may mean; None if there is none."""
    known = re.findall("'([^']+)'", expected)
    if not isinstance(word, str) or len(known) < 2:
        return None
    near = [k for k in known if word and k.startswith(word.lower())] or difflib.get_close_matches(word, known, 1)
    return near[0] if near else None


def _secret_section(kind: type[BaseModel], loc: list[str]) -> str:
    """The secret section that the keys `loc` lead into, or ""."""
    section: Any = kind
    for i, part in enumerate(loc):
        field = getattr(section, "model_fields", {}).get(part)
        section = field.annotation if field is not None else None
        if getattr(section, "secret", False):
            return ".".join(loc[: i + 1])
    return ""
