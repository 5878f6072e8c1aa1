"""Command-line options for where jobs run, which override a site profile: checked before anything is queued."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ddpm.config.section import build
from ddpm.config.yaml import load_yaml, read_text
from ddpm.errors import RequestError
from launch.cluster import asked, environment, sbatch_words, unheeded
from launch.cluster.environment import SHIPPED
from launch.cluster.partitions import gpus_of
from launch.cluster.site import MEMORIES, Site

PROFILES = SHIPPED / "configs" / "cluster"
OURS = {
    *("array", "time", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "job-name", "signal", "partition"),
    *("dependency", "export", "output", "error", "open-mode", "parsable", "wrap", "wait", "test-only", "chdir"),
    *("uid", "gid"),
}
"""Options of sbatch that the launcher sets, and nobody else."""
INSTEAD = {"ntasks-per-node": "--tasks-per-node", "ntasks": "--nodes and --tasks-per-node", "job-name": "--name"}
"""What asks for some of these."""
BARE = {
    *("contiguous", "exclusive", "get-user-env", "hold", "ignore-pbs", "no-kill", "no-requeue", "overcommit"),
    *("oversubscribe", "propagate", "quiet", "reboot", "requeue", "resv-ports", "share", "spread-job", "stepmgr"),
    *("use-min-nodes", "verbose", "disable-stdout-job-summary"),
}
"""Options of sbatch that take no value, or need none."""
WHOLE = {"gpus"}
"""Options of sbatch that begin like one of OURS, and are not it."""
FLAGS: dict[str, dict[str, Any]] = {
    "partition": {},
    "account": {},
    "qos": {},
    "constraint": {},
    "exclude": {"help": "nodes not to use; none: use those too on which lives of the run died"},
    "time": {"metavar": "4h", "help": "time limit of one job (4h, 90m, 2d, 1-12:00:00); the run continues in the next"},
    "nodes": {"type": int},
    "gpus_per_node": {"metavar": "[TYPE:]N", "help": "default: 1 if the partition has GPUs, else 0"},
    "tasks_per_node": {"type": int, "help": "ranks per node (default: one per GPU, else 1)"},
    "cpus_per_task": {"type": int, "help": "per rank (default with --cluster local: all, divided among ranks)"},
    "mem": {"metavar": "32G", "help": "memory per node; none: the site's default"},
    "mem_per_cpu": {"metavar": "4G", "help": "instead of --mem"},
    "mem_per_gpu": {"metavar": "40G", "help": "instead of --mem"},
    "max_parallel": {"type": int, "help": "array tasks that run at a time (default 16)"},
    "tasks": {"metavar": "N", "help": "array tasks that divide the shards of a set, or an evaluation (default auto)"},
    "via": {"choices": ["submitit", "sbatch"], "help": "how jobs reach SLURM (default submitit)"},
    "cluster": {
        "choices": ["auto", "slurm", "local"],
        "help": "auto: SLURM; local: the same jobs as processes on this machine. Another of the site's clusters: "
        "--sbatch clusters=NAME",
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs (defaults come from the site profile)")
    for name, spec in FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), dest=name, default=None, **spec)
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    group.add_argument(
        "--code", type=_code, metavar="{kept,new,DIGEST}",
        help="the code that jobs run: what the run was begun with (kept, default once it has saved a step), this "
             "checkout's, or what it had before, by the DIGEST that its file is called after",
    )  # fmt: skip
    group.add_argument("--profile", metavar="SITE", help=f"a name in {PROFILES.relative_to(SHIPPED)}/, or a path")


def of_jobs(args: argparse.Namespace) -> list[str]:
    """The options given that say where jobs run, and how; not that they are this machine's."""
    given = [name for name in (*FLAGS, "code", "profile") if getattr(args, name) is not None]
    given = [name for name in given if (name, args.cluster) != ("cluster", "local")]
    return [unheeded.flag(name) for name in given] + (["--sbatch"] if args.sbatch else [])


def _code(word: str) -> str:
    """`kept`, `new`, or the digest of kept code, of which its file is named."""
    found = re.fullmatch(r"(?:code-)?([0-9a-f]{16})(?:\.zip)?", Path(word).name)
    if not found and word not in ("kept", "new"):
        raise argparse.ArgumentTypeError(f"{word!r} is not kept, new, or the DIGEST of a run's code-DIGEST.zip")
    return found[1] if found else word


def load_profile(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, 1)
        raise RequestError(
            f"--profile {name}: no such site profile; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        )
    try:
        tree = load_yaml(read_text(path), str(path))
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"--profile {name}: cannot be read ({e}): mend it, or give another") from None
    if tree is not None and not isinstance(tree, dict):
        raise RequestError(
            f"{path}: found a {type(tree).__name__}; expected keys and values, as configs/cluster/example.yaml has them"
        )
    options = (tree or {}).get("sbatch") or {}
    if not isinstance(options, dict):
        raise RequestError(f"{path}: sbatch = {options!r}: expected options and values, e.g. {{nice: 100}}")
    return tree or {}


def of_profile(name: str | None) -> Site:
    """The site that a profile alone describes. Raises RequestError."""
    site: Site = build(Site, load_profile(name), f"profile {name}")
    return site


def resolve(
    args: argparse.Namespace, base: dict[str, Any] | None = None, stage: str = "train", *, also: str | None = None
) -> Site:
    """What this run was submitted with (`base`), then the site profile, then the command line. Raises RequestError.

    stage: what the command line is about; where it is not training, it goes before the profile's section of the stage,
    and of the one that it is `also` about.
    """
    typed = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    options = {key: value for key, _, value in (item.lstrip("-").partition("=") for item in args.sbatch)}
    profile, typed = (_one_of_memories(layer, where) for layer, where in (
        (load_profile(args.profile), f"profile {args.profile}"), (typed, "options")))  # fmt: skip
    tree = {**(base or {}), **profile, **typed}
    extra = dict(tree.get("sbatch") or {})
    for item in args.sbatch:
        key, eq, value = item.lstrip("-").partition("=")
        if not eq and re.fullmatch(r"[a-z][a-z-]*", key) and key not in BARE and key not in OURS:
            near = difflib.get_close_matches(key, BARE, 1)
            raise RequestError(
                f"--sbatch {item}: needs a value, as in --sbatch {key}=VALUE; without one sbatch takes "
                + (f"{near[0]}, and others" if near else f"{', '.join(sorted(BARE)[:4])} and others")
            )
        extra["clusters" if key == "cluster" else key] = value if eq else True
    for key in extra:
        if not re.fullmatch(r"[a-z][a-z-]*", str(key)):
            raise RequestError(
                f"--sbatch {key}: not an sbatch option; write it long and without dashes, "
                f"e.g. --sbatch reservation=course"
            )
        # sbatch takes the beginning of an option's name for it
        if of_ours := sorted(name for name in OURS if name.startswith(key) and key not in WHOLE):
            instead = INSTEAD.get(of_ours[0], f"--{of_ours[0]}" if of_ours[0].replace("-", "_") in FLAGS else "")
            raise RequestError(
                f"--sbatch {key}: {of_ours[0]} is set by the launcher, because restarts depend on it; "
                + (f"give {instead}" if instead else "leave it out")
                + ("" if key in OURS else ", or write another option's name out")
            )
    sbatch_words.take_gres(tree, extra, args.gpus_per_node)
    sbatch_words.take_shared(tree, extra, typed, options)
    tree["sbatch"] = extra
    if stage != "train":
        if len(gpus_of(options.get("gres", ""))) == 1:
            typed = {**typed, "gpus_per_node": tree["gpus_per_node"]}
        for name in filter(None, (stage, also)):
            sbatch_words.put_first(tree, name, typed, options)
    where = f"profile {args.profile} and options" if args.profile else "options"
    site: Site = build(Site, tree, where)
    own = stage == "train" or "tasks_per_node" in typed  # else it was typed for training
    if own and site.num_gpus and site.tasks_per_node and site.tasks_per_node != site.num_gpus:
        raise RequestError(
            f"--tasks-per-node {site.tasks_per_node} with --gpus-per-node {site.gpus_per_node}: one task "
            f"is one rank and takes one GPU; give the same number, or --gpus-per-node 0 for CPUs"
        )
    if site.is_local and not (stage == "train" and getattr(args, "prepare", False)):  # which prints sbatch's line too
        unheeded.check_local(typed, options)
    if stage != "train":
        unheeded.check_stage(typed, site, also or stage)
    _check_command(site)
    _check_setup(site)
    return site if site.is_local else _on_one_cluster(site)


def _on_one_cluster(site: Site) -> Site:
    """The site with the cluster on which its jobs are, if it or the shell names one, which this process then asks.

    Raises RequestError where several are named.
    """
    name, exported = asked.exported()
    named = site.sbatch.get("clusters")
    where, cluster = ("--sbatch clusters", str(named)) if named is not None else (name, exported)
    alone = "the jobs of a run are on one cluster, since they wait for one another"
    for stage in ("sample", "evaluate"):
        other = getattr(site, stage).sbatch.get("clusters", named)
        if other != named:
            raise RequestError(f"{stage}.sbatch: clusters = {other}: {alone}; leave it out, or give it for all of them")
    if named is None and not exported:
        return site
    if not asked.is_one(cluster):
        raise RequestError(f"{where}={cluster}: {alone}; name one of them: --sbatch clusters=NAME")
    if not environment.is_on_node_of(cluster):  # such as training that queues milestones, perhaps without accounting
        asked.ask(cluster)
    return site.model_copy(update={"sbatch": {**site.sbatch, "clusters": cluster}})


def _check_command(site: Site) -> None:
    """Raises RequestError where the program that is to tell of a run's end cannot be run; it is not repeated."""
    program, whole = next(iter(site.notify.command), ""), "give the whole path of a program"
    if "/" in program and not program.startswith("/"):
        raise RequestError(f"notify.command: its path is not a whole one, and jobs run in another folder; {whole}")
    if program and site.is_local and shutil.which(program) is None:
        raise RequestError(f"notify.command: this machine has no such program, or may not run it; {whole}")


def _one_of_memories(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """A profile's section or a command line, which may ask for memory in one way, whatever went before it."""
    if len(given := [name for name in MEMORIES if layer.get(name) not in (None, "none")]) > 1:
        raise RequestError(f"{where}: {' and '.join(given)}: SLURM takes one of them; give one")
    return {**layer, **{name: layer[name] if name in given else None for name in MEMORIES}} if given else layer


def _check_setup(site: Site) -> None:
    """Raises RequestError if bash cannot read the setup lines; none is run. Without a bash here, jobs find it out."""
    if site.setup and (bash := shutil.which("bash")):
        text = "\n".join(site.setup)
        done = subprocess.run([bash, "-n"], input=text, capture_output=True, text=True, errors="surrogateescape")
        if done.returncode:
            why = done.stderr.partition("\n")[0].partition(": ")[2]
            raise RequestError(f"setup: bash cannot read these lines ({why}); mend them in the profile")
