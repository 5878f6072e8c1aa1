"""The run directory as submissions make it and later ones change it; and what they recorded, read again."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from ddpm import __version__
from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.config.section import build
from ddpm.config.yaml import load_yaml, read_text
from ddpm.data.labels import labels_changed
from ddpm.errors import RequestError
from ddpm.run.files import DamagedFile, now, publishing_folder, read_json, sign, write_bytes, write_json
from ddpm.run.log import plain
from ddpm.run.paths import SCHEMA, RunDir
from ddpm.run.records import data_of, read_run
from launch.cluster import scheduler
from launch.cluster.container import check_image, lines
from launch.cluster.environment import PROJECT, default_partition
from launch.cluster.site import Notify, Site
from launch.cluster.values import written
from launch.queue import notify, work

NOT_GIVEN: tuple[Any, ...] = (None, "", [])
"""Values of a site that ask for nothing."""


def create_run(
    run: RunDir, config: Config, record: dict[str, Any], *, start: bytes | None = None, told: Notify | None = None
) -> None:
    """Make the run directory. start: content of start.safetensors; told: whom to notify of the run's end."""
    shell = _shell(run, of_record(record["launch"], "launch"), record)
    with publishing_folder(run.path) as folder:
        made = RunDir(folder)
        for part in (made.events, made.checkpoints, made.tensorboard, made.grids, made.logs, made.samples, made.eval):
            part.mkdir()
        write_bytes(made.config, config.to_yaml().encode())
        _write_shell(made, shell)
        notify.keep(made, told or Notify())
        if start is not None:
            write_bytes(made.start, start)
        write_json(made.run_json, sign(record))


def check_update(run: RunDir, config: Config, record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """`record` with the run's test split, and what its batch shells will source. Raises RequestError for other data,
    or as `check_image`."""
    old, before, here = read_run(run), data_of(run).get("digest"), record["data"]["digest"]
    changed = labels_changed(old.get("labels"), record["labels"])
    if before != here:
        raise RequestError(
            f"run {run.name} was begun with other pixels (digest {str(before)[:12]}, now {here[:12]}"
            + (f"; {changed}" if changed else "")
            + "); restore the data, or choose another --name"
        )
    if changed and config.model.num_classes:
        raise RequestError(
            f"run {run.name} was trained on the same images with other labels: {changed}; put them back into the "
            f"class folders that they were in, or choose another --name"
        )
    record = {**record, "data": {**record["data"], **_held_out(run, record["data"])}}
    return record, _shell(run, of_record(record["launch"], "launch"), record)


def update_run(run: RunDir, config: Config, record: dict[str, Any], *, told: Notify | None = None) -> None:
    """Write what a later submission may change (length, intervals, resources). Raises as `check_update`."""
    record, shell = check_update(run, config, record)
    old = read_run(run)
    _write_shell(run, shell)
    notify.keep(run, told or Notify())
    kept = {"created": old.get("created") or record["created"], "resolved": old.get("resolved") or {}}
    kept |= {key: old[key] for key in ("from", "sweep") if key in old}
    changes = old.get("changes", [])
    if keys := {key: both for key, *both in reading.differences(reading.of_run(run), config)}:
        changes = [*changes, {"time": now(), "step": run.latest_step(), "keys": keys}]
    kept |= {"changes": changes} if changes else {}
    if first := old.get("first_command") or old.get("command"):  # names the config, which `submit.py RUN` does not
        kept["first_command"] = first
    own = _id_of(run, old, record["run_id"])
    anonymous = {key: value for key, value in record.items() if key != "run_id"}
    write_json(run.run_json, sign({**anonymous, **kept, **({"run_id": own} if own else {})}), replace=True)
    write_bytes(run.config, text_of(run, config).encode(), replace=True)  # after the record of what changes in it


def write_lost(run: RunDir, config: Config) -> None:
    """Write a run's config.yaml anew if it is lost, and `config` has the mathematics that it began with."""
    if reading.may_be_anew(run, config):
        write_bytes(run.config, config.to_yaml().encode(), replace=True)
        print(f"{run.config} was lost, and is written anew from what is asked for now", file=sys.stderr)


def text_of(run: RunDir, config: Config) -> str:
    """The config.yaml of an existing run that goes on with `config`."""
    return config.to_yaml(like=load_yaml(read_text(run.config), str(run.config)))


def _held_out(run: RunDir, here: dict[str, Any]) -> dict[str, Any]:
    """`test` of run.json's data: the split of the first submission that validated. Raises RequestError if this one's is
    different: one curve would mix two splits."""
    before, now = data_of(run).get("test"), here.get("test")
    if before and now and before["digest"] != now["digest"]:
        raise RequestError(
            f"run {run.name} was validated on another test split (digest {before['digest'][:12]}, now "
            f"{now['digest'][:12]}); restore it, leave log.validate_every_steps out (null), or choose another --name"
        )
    found = now or before
    return {"test": found} if found else {}


def _id_of(run: RunDir, old: dict[str, Any], new: str) -> str | None:
    """The run's id. A run.json without one gets the id in its checkpoints (an old run.json may have been put back),
    else a new one; None if its checkpoints have different ids."""
    manifests = (read_json(run.manifest(step)) or {} for step in run.steps_saved())
    said = {str(manifest["run_id"]) for manifest in manifests if manifest.get("run_id")}
    return old.get("run_id") or (new if not said else said.pop() if len(said) == 1 else None)


def use_shell_of(run: RunDir, site: Site) -> None:
    """Make this site's setup lines and container those of the run's jobs from now on. RequestError,
    EnvironmentLacks."""
    _write_shell(run, _shell(run, site, read_run(run)))
    if site.notify != Notify():  # else as the run was submitted with
        notify.keep(run, site.notify)


def _shell(run: RunDir, site: Site, record: dict[str, Any]) -> dict[str, list[str]]:
    """Content of the files that every batch shell sources: setup.sh, the profile's lines; container.sh, how ranks are
    started in its container."""
    found = {"setup.sh": list(site.setup), "container.sh": []}
    if site.container.image and not site.is_local:
        check_image(site.container)
        needed = [run.path.parent, Path(record["data"]["cache"]).parent]
        if reads := record.get("reads"):
            needed.append(Path(reads).parent)
        found["container.sh"] = lines(site.container, needed)
    return found


def _write_shell(run: RunDir, shell: dict[str, list[str]]) -> None:
    for name, there in shell.items():
        if there:
            write_bytes(run.path / name, ("\n".join(there) + "\n").encode(), replace=True)
        else:
            (run.path / name).unlink(missing_ok=True)


def site_of(run: RunDir) -> Site:
    """Where the run was submitted to, which later stages use too by default. Raises DamagedFile."""
    return of_record(read_run(run).get("launch") or {}, f"`launch` in {run.run_json}")


def not_taken(run: RunDir, site: Site) -> str:
    """For a message: in what this request differs from the job that is already queued; "" if in nothing."""
    asked, sent = (reading.flat(where.model_dump(mode="json")) for where in (site, site_of(run)))
    differ = [key for key in asked if asked[key] not in NOT_GIVEN and asked[key] != sent.get(key)]
    if "partition" in differ and not sent["partition"] and _is_default(asked["partition"]):
        differ.remove("partition")
    told = [f"{key} is {_word(key, sent.get(key))} there and {_word(key, asked[key])} here" for key in differ]
    if not told:
        return ""
    return (
        f"its training is in the queue already, and stays as it was submitted: {'; '.join(told)}. To change that, "
        f"{work.to_end(run)}, and submit again"
    )


def _is_default(partition: str) -> bool:
    """Whether jobs without a partition go to this one."""
    if exported := default_partition():
        return partition == exported
    try:
        there = scheduler.partitions()
    except scheduler.SchedulerError:
        return False
    return partition in there and there[partition].is_default


def _word(key: str, value: Any) -> str:
    if value in NOT_GIVEN:
        return "not given"
    if key.rpartition(".")[2] == "time":
        return written(value)
    return plain("; ".join(map(str, value)) if isinstance(value, list) else str(value))


def base_of(run: RunDir, args: argparse.Namespace) -> dict[str, Any]:
    """The base that a later stage's options override: what the run was submitted with, but not its --cluster local, nor
    how many GPUs this machine had, if they name SLURM, a partition or a profile."""
    base = site_of(run).model_dump(exclude_defaults=True)
    try:
        base |= {"notify": notify.asked_of(run).model_dump(exclude_defaults=True)}
    except PermissionError:  # another's run, whose owner alone can read it
        pass
    except (OSError, DamagedFile, RequestError) as e:
        why = "is not as a submission writes it" if isinstance(e, RequestError) else f"cannot be read ({e})"
        print(
            f"warning: {run.notify} {why}: nobody is told of the run's end, unless the --profile given says whom; "
            f"remove the file if that is meant",
            file=sys.stderr,
        )
    elsewhere = args.cluster != "local" if args.cluster else args.partition or args.profile
    if base.get("cluster") == "local" and elsewhere:
        base = {key: value for key, value in base.items() if key not in ("cluster", "gpus_per_node")}
    return base


def of_record(launch: dict[str, Any], where: str) -> Site:
    """The site in a submission's record. Raises RequestError beginning with `where`."""
    site: Site = build(Site, launch, where)
    return site


def describe(config: Config, site: Site, run: RunDir, inputs: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json, whose `resolved` the first life fills in. inputs: as of `prepare_inputs`."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "schema": SCHEMA,
        "name": run.name,
        "run_id": uuid.uuid4().hex,
        "created": now(),
        "config_digest": config.digest(),
        "git": _git(PROJECT),
        "versions": {
            "ddpm-hpc": __version__,
            "python": sys.version.split()[0],
            **{p: of(p) for p in ("torch", "torchvision", "numpy", "submitit")},
        },
        "command": ["python", *sys.argv],
        "resolved": {},
        **inputs,
        "launch": site.model_dump(mode="json", exclude_defaults=True),
    }


@functools.cache
def _git(project: Path) -> str | None:
    """Commit of the checkout, with `+dirty` where files differ from it; asked, and refused, once for a whole sweep.

    safe.directory: whoever runs another user's checkout trusts it. Before 2.38 git heeds this in its own files alone.
    """
    reads = ["git", "-c", "safe.directory=*", "-C", str(project)]
    try:
        done = subprocess.run(
            [*reads, "describe", "--always", "--dirty=+dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if re.search("dubious ownership|unsafe repository", done.stderr):
        mend = shlex.join(["git", "config", "--global", "--add", "safe.directory", str(project)])
        print(
            f"warning: run.json will not say which commit this is: the checkout is another user's, and git does not "
            f"read it before {mend}",
            file=sys.stderr,
        )
    return done.stdout.strip() or None
