"""Names, values and paths that nobody would choose: refused, or in a job's script as what they are, and nothing else.

The scripts are run, by bash, with an srun and a Python that only write down what they are told.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.config.section import build
from ddpm.errors import RequestError
from ddpm.run import log
from ddpm.run.paths import RunDir, check_name
from launch import sweep
from launch.cluster import by_submitit, by_template, code, environment
from launch.cluster.job import Job, check_path
from launch.cluster.options import add_options, resolve
from launch.cluster.site import Site
from tests.cli.harness import TINY

PIECES = [
    *("a", "B", "7", "-", "--", ".", "..", "../", "/", "_", "=", ":", ",", "#", "ü", "а", "\u202e", "\u2028", "\x85"),
    *(" ", "\t", "\n", "\r", "\0", "\x1b[31m", "\x7f", "'", '"', "\\", "%j", "%", "*", "~", "!", "&", "|", "(", ")"),
    *("$HOME", "$(touch CANARY)", "`touch CANARY`", ";touch CANARY;", "\ntouch CANARY\n", "' touch CANARY '"),
    *("\n#SBATCH --wrap=x", "#SBATCH --wrap=x", "\udcff", "\ud800", "x" * 300, "{}", "<", ">CANARY"),
]
odd = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
"""Each example is a few processes."""


@dataclass
class Place:
    """A folder with a run in it, and what its jobs' scripts find of commands."""

    path: Path
    run: RunDir

    def told(self, script: str) -> tuple[list[str], list[str]]:
        """What `script` gives srun, and then the supervisor."""
        before = self.files()
        done = subprocess.run(["bash"], input=script, text=True, capture_output=True, cwd=self.path / "cwd",
                              env={"PATH": f"{self.path / 'bin'}:/usr/bin:/bin"}, timeout=60)  # fmt: skip
        assert done.returncode == 0, done.stderr
        # the end of the batch shell, and the `mkdir -p` before it
        assert self.files() - before <= {self.path / "srun", self.path / "python", self.run.logs}
        return _words(self.path / "srun"), _words(self.path / "python")

    def files(self) -> set[Path]:
        return set(self.path.rglob("*"))


def _words(path: Path) -> list[str]:
    words = path.read_bytes().decode().split("\0")[:-1]
    path.unlink()
    return words


@contextmanager
def place(folders: str = "runs", name: str = "tiny") -> Iterator[Place]:
    """`folders`: below a temporary directory. Raises OSError where no file can be called so."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        run = RunDir(path / "root" / folders / name)
        for folder in (path / "bin", path / "cwd", run.path):
            folder.mkdir(parents=True)
        run.config.touch()
        run.run_json.touch()
        for command in ("srun", "python"):
            (path / "bin" / command).write_text(
                f"#!/bin/sh\nprintf '%s\\0' \"$@\" >{shlex.quote(str(path / command))}\n"
            )
            (path / "bin" / command).chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            there = code.home(run)
            there.parent.mkdir(parents=True)
            there.symlink_to(environment.PROJECT)  # as if it had been unpacked
            patch.setattr(sys, "executable", str(path / "bin" / "python"))
            yield Place(path, run)


def resolved(*options: str) -> Site:
    """The site that these options ask for. Raises RequestError."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    return resolve(parser.parse_args(list(options)))


def sbatch_lines(script: str) -> dict[str, str]:
    """The options in a script, as whoever reads them with a shell's rules of quoting would."""
    found = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            (word,) = shlex.split(line.removeprefix("#SBATCH "), comments=False)
            key, _, value = word.removeprefix("--").partition("=")
            assert key not in found
            found[key] = value
    return found


def check_scripts(there: Place, job: Job) -> None:
    """Of both ways: the lines that there should be, the words that there should be, and nothing else done."""
    options = {k: "" if v is True else v for k, v in job.options().items()}
    script = by_submitit.script_text(job)
    usual = by_submitit.script_text(Job(job.stage, RunDir(Path("/runs/tiny")), Site(), job.set_name, job.shards))
    more = len(options) - len(Job(job.stage, job.run, Site()).options())
    assert script.count("\n") == len(script.splitlines()) == len(usual.splitlines()) + more
    listed = sbatch_lines(script)
    assert {k: listed[k] for k in options} == options and listed.keys() - options.keys() <= {"wckey", "array"}
    srun, python = there.told(script)
    assert srun[-3:] == ["-m", "submitit.core._submit", str(job.run.logs / "submitit")]
    assert python == ["-m", "launch.life.supervisor", str(job.run.path), job.stage, "0", job.set_name]
    command = by_template.command(job)
    flags = [word for word in command if word.startswith("--")]
    listed_there = [f for f in flags if f not in ("--parsable", "--shards", "--tasks") and "--array=" not in f]
    assert listed_there == [f"--{k}" + ("" if v is True else f"={v}") for k, v in job.options().items()]
    assert shlex.split(shlex.join(command)) == command
    of_template = command[command.index(str(by_template.template(job.home, job.stage))) + 1 :]
    shards = ["--shards", "0,2-3", "--tasks", "3"] if job.shards else []
    assert of_template == [str(job.run.path), *([job.set_name] if job.set_name else []), *shards]


@few
@given(
    key=st.sampled_from(["partition", "account", "qos", "constraint", "exclude", "mem", "time", "sbatch"]), value=odd
)
def test_a_value_reaches_a_job_as_it_is_or_is_refused(key: str, value: str) -> None:
    option = f"--sbatch=comment={value}" if key == "sbatch" else f"--{key}={value}"
    try:
        site = resolved(option)
    except RequestError as e:
        assert key in str(e) or "time" in str(e)
        assert "CANARY" not in str(e) or "\ntouch" not in str(e)  # nor is its newline one of ours
        return
    with place() as there:
        check_scripts(there, Job("train", there.run, site))


@few
@given(key=odd)
def test_an_option_of_sbatch_that_is_none_is_refused(key: str) -> None:
    try:
        site = resolved(f"--sbatch={key}=1")
    except RequestError:
        return
    assert all(re.fullmatch(r"[a-z][a-z-]*", option) for option in site.sbatch)


@few
@given(name=odd, set_name=odd)
def test_a_name_is_one_or_is_refused(name: str, set_name: str) -> None:
    good = []
    for word, what in ((name, "run name"), (set_name, "sample set name")):
        try:
            good.append(check_name(word, what))
        except RequestError as e:
            assert log.plain(e) == str(e)
    try:
        assert build(Config, {"name": name}, "x").name in good
    except RequestError:
        assert name not in good


@few
@given(folders=odd.filter(lambda text: ".." not in text and not text.startswith("/")), via=st.booleans())
def test_a_run_may_lie_anywhere_where_its_path_can_be_written_in_a_line(folders: str, via: bool) -> None:
    try:
        with place(folders) as there:
            try:
                path = environment.user_path(str(there.run.path), "--root")
                check_path(RunDir(path), Site())
            except RequestError as e:
                assert "--root" in str(e)
                return
            stage = ("train", "", ()) if via else ("sample", "fid", (0, 2, 3))
            check_scripts(there, Job(stage[0], RunDir(path), Site(), stage[1], stage[2]))
    except (OSError, ValueError, UnicodeEncodeError) as e:
        assert isinstance(e, UnicodeEncodeError | OSError) or "null" in str(e)  # no file can be called so


@few
@given(text=odd)
def test_what_is_printed_has_no_control_characters(text: str) -> None:
    shown: Any = log.plain(text)
    assert shown.isprintable() and shown.encode()
    assert [line.isprintable() for line in log.plain_lines(text).split("\n")] == [True] * (text.count("\n") + 1)


@few
@given(values=st.lists(odd, min_size=1, max_size=3), quoted=st.booleans())
def test_a_value_of_a_sweep_is_carried_as_it_is_in_a_run_of_an_allowed_name_or_refused(
    values: list[str], quoted: bool
) -> None:
    typed = ",".join(map(json.dumps, values) if quoted else values)
    try:
        found = sweep.configs([f"data.path={typed}"], [], lambda more: reading.of_text(TINY, Path("tiny.yaml"), more))
    except RequestError as e:
        assert log.plain_lines(e) == str(e) and str(e).count("\n") <= 1
        return
    assert len({config.name for config, _ in found}) == len(found)
    for config, record in found:
        assert check_name(config.name).startswith("tiny-path_")
        assert record == {"name": "tiny-path", "values": {"data.path": config.data.path}}
    if quoted:
        assert [config.data.path for config, _ in found] == values
