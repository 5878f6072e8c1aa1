"""What a run was made from: its config beside the recipe's, its code, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.config.reading import as_typed
from ddpm.config.schema import Config
from ddpm.errors import DDPMError
from ddpm.run.files import DamagedFile
from ddpm.run.log import counted
from ddpm.sampling.request import Request, read_request
from launch.cluster import code
from launch.cluster.environment import SHIPPED
from launch.page.facts import Facts
from launch.page.markup import Column, Html, Part, join, note, table, tag
from launch.page.scores import DIGEST, MILESTONE, commands
from launch.page.words import moment

USUAL = "cifar10.yaml"
"""What launch/submit.py takes where no config is named."""
MOST_CLASSES, MOST_SETS = 100, 20


def config(facts: Facts) -> Html:
    """What differs from the recipe, and all of it."""
    lines = [tag("div", line or " ") for line in facts.config_text.split("\n")]
    whole = tag("pre", *lines, class_="config", tabindex=0) if facts.config_text else Html("")
    if facts.config is None:
        return join([note("config.yaml cannot be read as a config."), whole])
    path = recipe_of(facts.record)
    name = "the defaults of the config" if path is None else f"configs/{path.name}, as it is now,"
    try:
        recipe = Config() if path is None else reading.load(path)
    except (DDPMError, DamagedFile, OSError):
        name, recipe = "the defaults of the config", Config()
    rows = [
        [tag("code", key), tag("code", as_typed(own)), tag("code", as_typed(others))]
        for key, own, others in reading.differences(facts.config, recipe)
        if key != "name"
    ]
    differing = (Column("key"), Column("here"), Column("there"))
    parts = [note("It differs from ", name, " in:"), table(differing, rows)]
    return join(
        [*(parts if rows else [note("It does not differ from ", name, " in anything.")]), tag("h3", "All of it"), whole]
    )


def recipe_of(record: Mapping[str, Any]) -> Path | None:
    """The config in configs/ that the run was submitted with, as its command says; None where that names none."""
    words = [str(word) for word in record.get("first_command") or record.get("command") or []][2:]
    if not words:
        return None
    named = [Path(word) for word in words if word.endswith((".yaml", ".yml")) and "=" not in word]
    path = SHIPPED / "configs" / (named[0].name if named else USUAL)
    is_shipped = not named or named[0].parent.name == "configs"
    return path if is_shipped and path.is_file() else None


# ---------------------------------------------------------------- where it came from


def origin(facts: Facts) -> Html:
    """Code, versions, data, machine."""
    record, versions = facts.record, facts.record.get("versions") or {}
    data, resolved = record.get("data") or {}, record.get("resolved") or {}
    began = record.get("from") or {}
    rows: list[tuple[str, Part]] = [
        ("run", _code(record.get("run_id"))),
        ("created, UTC", moment(record.get("created", ""))),
        ("mathematics", _digest("digest", record.get("config_digest"))),
        ("data", _data(facts, data)),
        ("code", _code_of(facts)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
        ("what auto became", ", ".join(f"{k} {as_typed(v)}" for k, v in resolved.items() if k != "torch")),
        ("submitted to", ", ".join(f"{key} {as_typed(value)}" for key, value in (record.get("launch") or {}).items())),
        ("config changed", _changes(record)),
        ("hosts", _hosts(facts)),
        ("began with", _digest(f"{began.get('weights')} of {began.get('source')}", began.get("sha256"))),
        ("weights of", str(record.get("reads") or "")),
    ]  # fmt: skip
    told = [[name, value] for name, value in rows if value]
    return join([table((Column(""), Column("")), told, class_="facts"), _classes(record)])


def _changes(record: Mapping[str, Any]) -> str:
    """What later submissions changed in the config, and from which step on."""
    return "; ".join(
        f"from step {change['step']:,} on {key} {as_typed(now)}, before {as_typed(before)}"
        for change in record.get("changes") or []
        for key, (before, now) in change["keys"].items()
    )


def _code(value: object) -> Part:
    return tag("code", str(value)) if value else ""


def _digest(name: str, sha256: object) -> Part:
    return join([name, " ", tag("code", str(sha256)[:DIGEST], title=sha256)]) if sha256 else ""


def _data(facts: Facts, data: Mapping[str, Any]) -> Part:
    words = [
        facts.config.data.name if facts.config else "",
        f"{counted(data['num_images'], 'image', ',')}" if data.get("num_images") else "",
    ]
    told = ", ".join(filter(None, words))
    return _digest(f"{told}, digest", data["digest"]) if data.get("digest") else told


def _code_of(facts: Facts) -> Part:
    lives = list(dict.fromkeys(str(e["code"]) for e in facts.events if e.get("code")))
    commit = str(facts.record.get("git") or "")
    try:
        kept = code.of_run(facts.run)
        there = f"code.zip {code.digest(kept)}" if kept else "no code.zip"
    except (DamagedFile, OSError):
        there = "code.zip cannot be read"
    parts = [f"commit {commit}" if commit else "", there, f"lives ran {', '.join(lives[-8:])}" if lives else ""]
    return ", ".join(filter(None, parts))


def _hosts(facts: Facts) -> str:
    hosts = list(dict.fromkeys(str(e["host"]) for e in facts.events if e["event"] != "submitted" and e.get("host")))
    more = f" and {len(hosts) - 8} more" if hosts[8:] else ""
    return ", ".join(hosts[:8]) + more


def _classes(record: Mapping[str, Any]) -> Html:
    named = (record.get("labels") or {}).get("classes")
    if not isinstance(named, dict) or len(named) < 2:
        return Html("")
    rows = [[str(i), name, str(num)] for i, (name, num) in enumerate(named.items())]
    more = note(f"{len(rows) - MOST_CLASSES} more in run.json.") if rows[MOST_CLASSES:] else Html("")
    columns = (Column("label", True), Column("class"), Column("images", True))
    return join([tag("h3", "Classes"), table(columns, rows[:MOST_CLASSES], class_="small"), more])


# ---------------------------------------------------------------- to make it again


def again(facts: Facts) -> Html:
    """The commands, as they were typed or as the run's files say."""
    words, first = (list(map(str, facts.record.get(key) or [])) for key in ("command", "first_command"))
    frozen = ["python", "launch/submit.py", str(facts.run.config), "--name", f"{facts.run.name}-again", *_site(facts)]
    unpacked = ["unzip", str(facts.run.code), "-d", f"{facts.run.name}-code"]
    parts = [
        ("Training, as it was submitted first:", [shlex.join(first)] if first not in ([], words) else []),
        ("Training, as it was submitted last:", [shlex.join(words)] if words else []),
        ("The same from what is frozen in the run:", [shlex.join(frozen)]),
        ("The code that its jobs ran:", [shlex.join(unpacked)] if facts.run.code.is_file() else []),
        ("Its milestones' samples and scores:", _milestones(facts)),
        ("Its samples:", _samples(facts)),
        ("Its scores:", commands(facts.scores)[:MOST_SETS]),
        ("This page:", [shlex.join(["python", "launch/report.py", str(facts.run.path)])]),
    ]
    return join(join([note(what), _commands(found)]) for what, found in parts if found)


def _site(facts: Facts) -> list[str]:
    """Where it ran, as options."""
    launch = facts.record.get("launch") or {}
    if launch.get("cluster") == "local":
        return ["--cluster", "local"]
    return ["--partition", str(launch["partition"])] if launch.get("partition") else []


def _commands(found: list[str]) -> Html:
    """Each in its line; none is broken inside a word that fits."""
    each = (join((tag("span", word) for word in line.split(" ")), " ") for line in found)
    return tag("pre", *(tag("div", line) for line in each), class_="command", tabindex=0)


def _milestones(facts: Facts) -> list[str]:
    is_there = any(score.name.startswith(MILESTONE) for score in facts.scores)
    return [shlex.join(["python", "launch/evaluate.py", str(facts.run.path), "--all-milestones"])] if is_there else []


def _samples(facts: Facts) -> list[str]:
    found = []
    try:
        sets = [where for where in facts.run.sample_sets() if not where.name.startswith(MILESTONE)]
        for where in sets[:MOST_SETS]:
            found.append(sample_command(facts, where.name, read_request(where)))
    except (OSError, DDPMError, DamagedFile):
        pass  # other parts of the page tell of what cannot be read
    return found


def sample_command(facts: Facts, set_name: str, request: Request) -> str:
    """What makes the set of this request, in a run that has its checkpoint."""
    words = ["python", "launch/sample.py", str(facts.run.path), "--set", set_name]
    words += ["--step", str(request.checkpoint.step)]
    names = [field.name for field in fields(request) if field.name not in ("checkpoint", "class_plan", "clip_x_0")]
    for name in names:
        value = getattr(request, name)
        if value is not None and not (name == "eta" and not value):
            words += [f"--{name.replace('_', '-')}", f"{value!r}" if isinstance(value, float) else str(value)]
    if request.class_plan is not None:
        words += ["--class-plan", ",".join(map(str, request.class_plan))]
    return shlex.join([*words, *(() if request.clip_x_0 else ("--no-clip",))])
