"""Reads a config from a YAML file and `key=value`; each mistake is reported once, with the nearest match."""

from __future__ import annotations

import copy
import difflib
import os
import shlex
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddpm.config.schema import FIRST, Config
from ddpm.config.section import build, field_keys, unknown_key
from ddpm.config.train import LENGTHS
from ddpm.config.yaml import load_yaml, read_text
from ddpm.errors import RequestError, shown
from ddpm.run.files import link_to_nothing, read_bytes, sha256_json
from ddpm.run.paths import RunDir
from ddpm.run.records import has_foreign_weights, read_run


def load(path: Path, overrides: Iterable[str] = (), *, shelf: Path | None = None) -> Config:
    """The config in YAML file `path` with `key=value` overrides. RequestError names key, value and what is allowed.

    shelf: a folder whose files are suggested too if `path` does not exist.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        if why := link_to_nothing(path):
            raise RequestError(f"config file {path} is {why}: bring that back, or restore the file") from None
        known = {p.stem: p for d in (shelf, path.parent) if d is not None for p in sorted(d.glob("*.yaml"))}
        near = difflib.get_close_matches(path.stem, known, 1, 0.5)
        places = dict.fromkeys(p.parent for p in known.values())
        there = "; ".join(f"in {d}: {', '.join(p.name for p in known.values() if p.parent == d)}" for d in places)
        hint = f"did you mean {known[near[0]]}?" if near else f"there are, {there}"
        if not known:
            folder = path.parent.absolute()
            hint = f"{folder} has no .yaml file" if folder.is_dir() else f"there is no folder {folder}"
        raise RequestError(f"config file {path} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"config file {path} cannot be read: {e}") from None
    try:
        return of_text(text, path, overrides)
    except RequestError as e:
        run = RunDir(path.parent)
        if not (path == run.config and run.code.is_file() and str(e).startswith(f"{path}: ")):
            raise
        raise RequestError(
            f"{e}. If other code wrote it, work on the run from that checkout, or from what {run.code} unpacks to"
        ) from None


def of_text(text: str, path: Path, overrides: Iterable[str] = ()) -> Config:
    """The config in `text`, the content of `path`. Raises RequestError."""
    tree = load_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise RequestError(f"{path}: expected keys and values at the top level, found {type(tree).__name__}")
    tree.setdefault("name", path.stem)
    changes = list(overrides)
    own = copy.deepcopy(tree) if changes else tree
    for override in changes:
        apply_override(tree, override)
    try:
        return build(Config, tree, str(path))
    except RequestError:
        if own == tree:
            raise
        build(Config, own, str(path))  # the file's own fault is told as that
        return build(Config, tree, "command line")


def of_run(run: RunDir, overrides: Iterable[str] = ()) -> Config:
    """The config of a run; its digest must be the one that the run began with. Raises RequestError, DamagedFile.

    overrides: of keys that the digest does not cover. An old run.json may have no digest, which passes.
    """
    record = read_run(run) if run.run_json.exists() else {}
    if (how := _lost(run)) is not None:
        raise RequestError(f"{run.config} is {how}: restore it{_or_anew(run, record)}")
    try:
        config = load(run.config, overrides)
    except RequestError as e:
        if not str(e).startswith(f"{run.config}: "):
            raise
        raise RequestError(f"{e}. If it is damaged, restore it{_or_anew(run, record, aside=True)}") from None
    if (digest := record.get("config_digest")) not in (None, config.digest()):
        changed = "was changed"
        if key := _of_another_default(config, digest):
            changed = f"was changed, or the default of {key} was in ddpm/config, where it then needs its old one back"
        raise RequestError(
            f"{run.config} {changed}: its mathematics has the digest {config.digest()[:12]}, and the run was begun "
            f"with {digest[:12]}. To train that, give it another --name; else restore the file"
            f"{_or_anew(run, record, aside=True)}"
        )
    return config


def _of_another_default(config: Config, digest: str) -> str | None:
    """The key that alone makes the config's digest another than `digest`, by having its default in one of them: such
    keys are left out."""
    now, tree = config.mathematics(), config.model_dump(mode="json")
    for section, first in FIRST.items():
        for key in tree[section].keys() - set(first):
            its = {**now[section], key: tree[section][key]}
            if key in now[section]:
                del its[key]
            if sha256_json({**now, section: its}) == digest:
                return f"{section}.{key}"
    return None


def _lost(run: RunDir) -> str | None:
    """For a message: that a run has no config, or nothing in it; None if it has one, or a link to one."""
    if not os.path.lexists(run.config):
        return "missing"
    return "empty" if run.config.is_file() and not read_bytes(run.config).strip() else None


def _or_anew(run: RunDir, record: dict[str, Any], *, aside: bool = False) -> str:
    """For a message: how else a run gets its config back. record: its run.json. aside: another is in its place."""
    if record.get("reads"):
        return f" (cp {shlex.quote(record['reads'])}/{run.config.name} {run.quoted}/)"
    if not record.get("config_digest") or has_foreign_weights(record):
        return " from a copy of the run"
    words = [str(word) for word in record.get("first_command") or record.get("command") or []]
    again = any(Path(word).name == run.name and before != "--name" for before, word in pairwise(words))
    move = f"move it away (mv {run.quoted}/{run.config.name} {run.quoted}/{run.config.name}.old), and " if aside else ""
    if not words or again or record.get("name", run.name) != run.name:
        return f", or {move}submit the config that it had with --name {run.name}, which writes it anew"
    return f", or {move}submit the run as it was begun, which writes it anew: {shlex.join(words)}"


def may_be_anew(run: RunDir, config: Config) -> bool:
    """Whether the run has lost its config, and `config` has the mathematics that it began with: it may be written anew.
    Raises DamagedFile."""
    return _lost(run) is not None and read_run(run).get("config_digest") == config.digest()


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into `tree`, reading the value as YAML; a length of training replaces another one."""
    key, eq, text = str(override).partition("=")
    if not eq or not key:
        raise RequestError(f"{shown(override)} is not key=value; for example train.lr=1e-4")
    if (whole := key.rpartition(".")[0]) in field_keys(Config):
        raise RequestError(f"unknown key {shown(key)}: {whole} is given as a whole, as {whole}='{{key: value}}'")
    if key not in field_keys(Config):
        raise RequestError(unknown_key(key, field_keys(Config), Config.all_keys))
    node = tree
    *sections, leaf = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise RequestError(f"{section}: expected a section of keys, found {shown(node)}")
    value = load_yaml(text, override if len(override) <= 200 else f"{override[:200]}…")
    if sections == ["train"] and leaf in LENGTHS and value is not None:
        for length in LENGTHS:
            node.pop(length, None)
    node[leaf] = value


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, with both values, in the order of the config."""
    trees = [config.model_dump(mode="json") for config in (a, b)]
    found = ((key, *(value_at(tree, key) for tree in trees)) for key in field_keys(Config))
    return [(key, ours, theirs) for key, ours, theirs in found if ours != theirs]


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree's values by dotted keys: those of its sections as section.key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value of `section.key` in a config's tree, or None."""
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def as_typed(value: Any) -> str:
    """The value as one would type it after `key=`."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {as_typed(v)}' for key, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
