"""The run directory as submissions write it: made whole, and changed by later ones; what they were, read again."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from ddpm import __version__
from ddpm.config.schema import Config
from ddpm.config.section import build
from ddpm.data.labels import labels_changed
from ddpm.errors import RequestError
from ddpm.run.files import TMP_PREFIX, DamagedFile, fsync_dir, now, read_json, sign, write_bytes, write_json
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
"""Of a site's values: what asks for nothing."""


def create_run(
    run: RunDir,
    config: Config,
    record: dict[str, Any],
    *,
    start: bytes | None = None,
    told: Notify | None = None,
) -> None:
    """Make the run directory whole: built beside its place, then renamed there. start: of start.safetensors; told: who
    is, of its end."""
    tmp = run.path.with_name(f"{TMP_PREFIX}{run.name}.{os.getpid()}")
    shell = _shell(run, of_record(record["launch"], "launch"), record)
    try:
        tmp.mkdir(parents=True)
        for sub in ("events", "checkpoints", "tb", "grids", "logs", "samples", "eval"):
            (tmp / sub).mkdir()
        write_bytes(tmp / "config.yaml", config.to_yaml().encode())
        _write_shell(RunDir(tmp), shell)
        notify.keep(RunDir(tmp), told or Notify())
        if start is not None:
            write_bytes(RunDir(tmp).start, start)
        write_json(tmp / "run.json", sign(record))
        tmp.rename(run.path)
        fsync_dir(run.path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def update_run(run: RunDir, config: Config, record: dict[str, Any], *, told: Notify | None = None) -> None:
    """A later submission: what it may change (length, intervals, resources), never the mathematics."""
    old, before, here = read_run(run), data_of(run).get("digest"), record["data"]["digest"]
    changed = labels_changed(old.get("labels"), record["labels"])
    if before != here:
        raise RequestError(
            f"run {run.name} was trained on other pixels (digest {str(before)[:12]}, now {here[:12]}"
            + (f"; {changed}" if changed else "")
            + "); restore the data, or choose another --name"
        )
    if changed and config.model.num_classes:
        raise RequestError(
            f"run {run.name} was trained on the same images with other labels: {changed}; put them back into the "
            f"class folders that they were in, or choose another --name"
        )
    record = {**record, "data": {**record["data"], **_held_out(run, record["data"])}}
    shell = _shell(run, of_record(record["launch"], "launch"), record)
    write_bytes(run.config, config.to_yaml().encode(), replace=True)
    _write_shell(run, shell)
    notify.keep(run, told or Notify())
    kept = {"created": old.get("created") or record["created"], "resolved": old.get("resolved") or {}}
    kept |= {key: old[key] for key in ("from", "sweep") if key in old}
    own = _id_of(run, old, record["run_id"])
    anonymous = {key: value for key, value in record.items() if key != "run_id"}
    write_json(run.run_json, sign({**anonymous, **kept, **({"run_id": own} if own else {})}), replace=True)


def _held_out(run: RunDir, here: dict[str, Any]) -> dict[str, Any]:
    """`test` of the record's data: that of the first submission that validated, kept by one that does not. Raises
    RequestError where the split is now another: one curve would be of two."""
    before, now = data_of(run).get("test"), here.get("test")
    if before and now and before["digest"] != now["digest"]:
        raise RequestError(
            f"run {run.name} was validated on another test split (digest {before['digest'][:12]}, now "
            f"{now['digest'][:12]}); restore it, leave log.validate_every_steps out (null), or choose another --name"
        )
    found = now or before
    return {"test": found} if found else {}


def _id_of(run: RunDir, old: dict[str, Any], new: str) -> str | None:
    """The run's id. One from before ids gets that which its checkpoints say, as where an old run.json was put back;
    else a new one, and none where they contradict one another: it could be neither's."""
    manifests = (read_json(run.manifest(step)) or {} for step in run.steps_saved())
    said = {str(manifest["run_id"]) for manifest in manifests if manifest.get("run_id")}
    return old.get("run_id") or (new if not said else said.pop() if len(said) == 1 else None)


def use_shell_of(run: RunDir, site: Site) -> None:
    """From now on batch shells of the run begin with what this site says. Raises RequestError, EnvironmentLacks."""
    _write_shell(run, _shell(run, site, read_run(run)))
    if site.notify != Notify():  # else as the run was submitted with
        notify.keep(run, site.notify)


def _shell(run: RunDir, site: Site, record: dict[str, Any]) -> dict[str, list[str]]:
    """Files that every batch shell sources: the profile's lines, and how ranks are started in its container."""
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
    """Where the run was submitted to: later stages go there too unless told otherwise. Raises DamagedFile."""
    return of_record(read_run(run).get("launch") or {}, f"`launch` in {run.run_json}")


def not_taken(run: RunDir, site: Site) -> str:
    """What is asked of a job that is in the queue already, and is not what it was submitted with; "" where nothing."""
    asked, sent = _flat(site), _flat(site_of(run))
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


def _flat(site: Site) -> dict[str, Any]:
    """Its values by dotted keys: sbatch.nice, sample.time."""
    flat: dict[str, Any] = {}
    for key, value in site.model_dump(mode="json").items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _is_default(partition: str) -> bool:
    """Whether jobs that name no partition go there."""
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
    """What a later stage's options go on top of: what the run was submitted with; not that it was made on this machine,
    where they name a partition or a site."""
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
    if base.get("cluster") == "local" and args.cluster is None and (args.partition or args.profile):
        base = {key: value for key, value in base.items() if key not in ("cluster", "gpus_per_node")}
    return base


def of_record(launch: dict[str, Any], where: str) -> Site:
    """What was once written down of a submission. Raises as `build` does."""
    site: Site = build(Site, launch, where)
    return site


def describe(config: Config, site: Site, run: RunDir, inputs: dict[str, Any]) -> dict[str, Any]:
    """The content of run.json; `resolved` is filled in by the first life. inputs: of `prepare_inputs`."""
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
        "git": _git(),
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


def _git() -> str | None:
    """Commit of the project, with `+dirty` where files differ from it."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), "describe", "--always", "--dirty=+dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
