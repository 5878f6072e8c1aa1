"""Where jobs run: the site profile and the resources of a job, checked before anything is queued."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ddpm.config.section import Section, build
from ddpm.config.yaml import load_yaml, read_text
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.log import has_control
from ddpm.run.paths import RunDir
from ddpm.run.records import read_run
from launch.cluster import slurm
from launch.cluster.environment import PROJECT, default_partition
from launch.cluster.partitions import Partition, gpus_of, partitions

PROFILES = PROJECT / "configs" / "cluster"
OURS = {
    "array",
    "time",
    "nodes",
    "ntasks-per-node",
    "gpus-per-node",
    "job-name",
    "signal",
    "partition",
    "dependency",
    "export",
    "output",
    "error",
    "open-mode",
    "parsable",
    "wrap",
    "wait",
    "test-only",
    "chdir",
}
MEMORIES = ("mem", "mem_per_cpu", "mem_per_gpu")
LEAST_WORK_S = 120
UNIT_MIN = {"m": 1, "min": 1, "h": 60, "d": 1440}


def minutes(text: str | int) -> int:
    """A time limit in minutes from 4h, 90m, 2d, 1d12h, minutes, or SLURM's own [D-]HH:MM[:SS]."""
    text = str(text).strip()
    if text.isdigit() and int(text) > 0:
        return int(text)
    if re.fullmatch(r"(?:\d+(?:min|[mhd]))+", text):
        total = sum(int(n) * UNIT_MIN[u] for n, u in re.findall(r"(\d+)(min|[mhd])", text))
    else:
        total = slurm_minutes(text)
    if total < 1:
        raise ValueError(f"time = {text!r}: not a time limit; for example 4h, 90m, 2d, 04:00:00 or 1-12:00:00")
    if (match := re.fullmatch(r"(\d{1,2}):(\d\d)", text)) and int(match[1]) < 24:
        a, b = int(match[1]), int(match[2])
        raise ValueError(
            f"time = {text!r}: {a} minutes and {b} seconds to SLURM, {a} hours and {b} minutes to people; write "
            f"{a * 60 + b}m, or 00:{a:02}:{b:02}"
        )
    return total


def slurm_minutes(text: str) -> int:
    """A time limit as SLURM writes it, in minutes, begun ones too; 0 where it is none. A:B is minutes and seconds."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text)
    if match is None:
        return 0
    days, first, second, third = (int(g) if g else 0 for g in match.groups())
    if match.group(1) is None and match.group(4) is None:
        first, second, third = 0, first, second
    return days * 1440 + first * 60 + second + (third > 0)


def _word(text: Any) -> Any:
    if isinstance(text, int) and not isinstance(text, bool):
        return str(text)  # an account may be called 123
    if isinstance(text, str) and not (re.fullmatch(r"[^\s'\"\\;$`]{1,200}", text) and text.isprintable()):
        raise ValueError(f"{text!r}: no spaces, quotes, shell or control characters here")
    return text


def _gpus(value: Any) -> Any:
    if value is None or (isinstance(value, int) and value >= 0):
        return value
    if isinstance(value, str) and value.isdecimal():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+:[1-9]\d*", value):
        return value
    raise ValueError(f"gpus_per_node = {value!r}: a number of GPUs, or their type and number, as 4 or a100:4")


def _share(mem: str | None, parts: int) -> str | None:
    """One of `parts` equal shares of an amount of memory; None for all that a node has, which has no shares."""
    number, unit = (int(mem[:-1]), mem[-1]) if mem and not mem.isdecimal() else (int(mem or 0), "")
    if parts == 1 or not number:
        return mem if number else None
    if number % parts and unit.upper() not in ("", "M", "K"):
        number, unit = number * 1024 ** ("MGT".index(unit.upper())), "M"
    return f"{-(-number // parts)}{unit}"


def _one_line(text: Any) -> Any:
    if isinstance(text, str) and (has_control(text) or len(text) > 1000):
        raise ValueError(f"{text[:80]!r}: must be one line, of at most 1000 characters")
    return text


def _options(options: Any) -> Any:
    """What becomes lines of a job's script, one for each."""
    for key, value in options.items() if isinstance(options, dict) else ():
        try:
            _one_line(value)
        except ValueError as e:
            raise ValueError(f"sbatch.{key} = {e}") from None
    return options


def _shell_lines(lines: Any) -> Any:
    """Shell as it was written: an entry of several lines is as good as several entries."""
    if not isinstance(lines, list):
        return lines
    split = [line for entry in lines for line in (entry.splitlines() or [""] if isinstance(entry, str) else [entry])]
    for line in split:
        if isinstance(line, str) and has_control(line.replace("\t", " ")):
            raise ValueError(f"setup = {line!r}: has control characters")
    return tuple(split)


def _mem(text: Any) -> Any:
    if text in (None, "none"):
        return None
    if not re.fullmatch(r"(?:0|[1-9]\d*)[KMGTkmgt]?", str(text)):
        raise ValueError(f"{text!r}: not an amount of memory; for example 32G or 500M, or none for the site's own")
    return str(text)


def _one_of_memories(layer: dict[str, Any], where: str) -> dict[str, Any]:
    """A profile's section or a command line, which may ask for memory in one way, whatever went before it."""
    if len(given := [name for name in MEMORIES if layer.get(name) is not None]) > 1:
        raise RequestError(f"{where}: {' and '.join(given)}: SLURM takes one of them; give one")
    return {**dict.fromkeys(MEMORIES, None), **layer} if given else layer


def _tasks(value: Any) -> Any:
    if value == "auto" or (str(value).isdecimal() and int(value) > 0):
        return value if value == "auto" else int(value)
    raise ValueError(f"tasks = {value!r}: how many tasks make the shards, e.g. 8; or auto")


Word = Annotated[str, BeforeValidator(_word)]
Line = Annotated[str, BeforeValidator(_one_line)]


Options = dict[str, str | int | bool | None]
Memory = Annotated[str | None, BeforeValidator(_mem)]
Gpus = Annotated[int | str | None, BeforeValidator(_gpus)]


class Stage(Section):
    """What differs where one stage runs; what is not given is as in training, for one rank."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    time: Annotated[int, BeforeValidator(minutes)] | None = None
    gpus_per_node: Gpus = None
    """null: one where training has some. A task uses one."""
    cpus_per_task: int | None = Field(None, ge=1)
    mem: Memory = None
    mem_per_cpu: Memory = None
    mem_per_gpu: Memory = None
    sbatch: Annotated[Options, BeforeValidator(_options)] = Field(default_factory=dict)
    """Beside training's; null takes one of those away."""


class Site(Section):
    """A site profile (configs/cluster/NAME.yaml); every field may be given on the command line instead."""

    cluster: Literal["auto", "slurm", "local"] = "auto"
    via: Literal["submitit", "sbatch"] = "submitit"
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    time: Annotated[int, BeforeValidator(minutes)] | None = None
    """Time limit of one job; a run that needs longer comes back. 4h, 90m, 2d or SLURM's own form; kept in minutes."""
    nodes: int = Field(1, ge=1)
    gpus_per_node: Gpus = None
    """A number, or TYPE:NUMBER. null: one where the partition has GPUs, else none."""
    gpu_request: Literal["auto", "gpus-per-node", "gres", "gpus-per-task", "none"] = "auto"
    """The option by which this site wants GPUs asked for. auto: --gpus-per-node, with their type where the partition
    has but one; none: sbatch.gres or another of the options here does."""
    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks per node; one per GPU where there are GPUs."""
    cpus_per_task: int | None = Field(None, ge=1)
    mem: Memory = None
    """Per node. One of these three; none unsets what a profile has."""
    mem_per_cpu: Memory = None
    mem_per_gpu: Memory = None
    sbatch: Annotated[Options, BeforeValidator(_options)] = Field(default_factory=dict)
    """Further sbatch options without their dashes, e.g. {reservation: course}."""
    setup: Annotated[tuple[str, ...], BeforeValidator(_shell_lines)] = ()
    """Shell lines that every job runs first: module load …"""
    scratch: Line | None = None
    """Node-local disk where jobs keep a copy of the packed data, e.g. /scratch/$USER."""
    data_cache: Line | None = None
    """Shared place of packed data; null: .cache beside the runs."""
    network_interface: Word | None = None
    """By which ranks on several nodes reach each other, e.g. ib0; null: the one that leads to the first of them."""
    signal_lead_s: int = Field(120, ge=10)
    """Seconds before the time limit at which a job saves and asks to be put back."""
    rank_timeout_s: int = Field(600, ge=10)
    """A rank that does not answer the others for this long ends the job, which is then tried again. It must exceed what
    a save at a stop takes: all ranks wait for rank 0 to write it."""
    max_parallel: int = Field(16, ge=1)
    """Array tasks that run at a time."""
    tasks: Annotated[int | Literal["auto"], BeforeValidator(_tasks)] = "auto"
    """Tasks of a sample job, each of which makes its share of the shards, one after the other. auto: as many as may run
    at a time; fewer where SLURM takes fewer."""
    sample: Stage = Field(default_factory=Stage)
    """What differs for tasks that sample."""
    evaluate: Stage = Field(default_factory=Stage)
    """What differs for the job that scores."""

    @property
    def is_local(self) -> bool:
        return self.cluster == "local"

    def warnings(self) -> list[str]:
        """What would be queued as it is asked for, and is hardly meant."""
        told = []
        for stage in ("train", "sample", "evaluate"):
            limit = self.at(stage).time
            if limit is not None and limit * 60 < self.signal_lead_s + LEAST_WORK_S:
                told.append(
                    f"time = {limit} minutes leaves {stage} jobs less than {LEAST_WORK_S // 60} minutes of work before "
                    f"they save, {self.signal_lead_s} s before their end (signal_lead_s): ask for more"
                )
        return list(dict.fromkeys(told))[:1]

    @property
    def num_gpus(self) -> int:
        """Per node."""
        return int(str(self.gpus_per_node or 0).rpartition(":")[2])

    @property
    def gpu_type(self) -> str:
        return str(self.gpus_per_node or "").rpartition(":")[0]

    def typed(self, number: int) -> str:
        """So many GPUs, as SLURM's options have them."""
        return f"{self.gpu_type}:{number}" if self.gpu_type else str(number)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.num_gpus or 1

    def at(self, stage: str) -> Site:
        """Where a stage runs: training as it is; the others, of one rank, with a rank's share of its node's memory."""
        if stage == "train":
            return self
        own: Stage = self.sample if stage == "sample" else self.evaluate
        values = own.model_dump(exclude_none=True, exclude={"sbatch"})
        memory: dict[str, Any] = {"mem": _share(self.mem, self.ranks_per_node)}
        if any(name in values for name in MEMORIES):
            memory = dict.fromkeys(MEMORIES, None)
        values = {**memory, **values, "nodes": 1, "tasks_per_node": 1}
        asked = self.model_copy(update=values)
        sbatch = {**self.sbatch, **own.sbatch}
        if total := sbatch.get("gpus"):
            sbatch["gpus"] = ":".join([*str(total).split(":")[:-1], "1"])
        gpus = asked.typed(1) if asked.num_gpus else 0
        return asked.model_copy(update={"gpus_per_node": gpus, "sbatch": sbatch})

    def gpu_options(self) -> dict[str, str]:
        """sbatch's options that ask for the GPUs of this."""
        others = {"gpus", "gpus-per-task", "gpus-per-socket"} & {k for k, v in self.sbatch.items() if v is not None}
        if "gpus-per-task" in others:
            return {"ntasks": str(self.world_size)}
        if not self.num_gpus or self.gpu_request == "none" or others:
            return {}
        if self.gpu_request == "gres":
            rest = self.sbatch.get("gres")
            return {"gres": f"gpu:{self.typed(self.num_gpus)}" + (f",{rest}" if rest else "")}
        if self.gpu_request == "gpus-per-task":  # which SLURM takes beside --ntasks alone
            return {"gpus-per-task": self.typed(1), "ntasks": str(self.world_size)}
        return {"gpus-per-node": self.typed(self.num_gpus)}

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


FLAGS: dict[str, dict[str, Any]] = {
    "partition": {},
    "account": {},
    "qos": {},
    "constraint": {},
    "exclude": {},
    "time": {"metavar": "4h", "help": "time limit of one job (4h, 90m, 2d, 1-12:00:00); the run continues in the next"},
    "nodes": {"type": int},
    "gpus_per_node": {"metavar": "[TYPE:]N", "help": "default: 1 where the partition has GPUs, else 0"},
    "tasks_per_node": {"type": int, "help": "ranks per node (default: one per GPU, else 1)"},
    "cpus_per_task": {"type": int, "help": "per rank; with --cluster local too (default there: all, divided)"},
    "mem": {"metavar": "32G", "help": "memory per node; none: the site's own"},
    "mem_per_cpu": {"metavar": "4G", "help": "instead of --mem"},
    "mem_per_gpu": {"metavar": "40G", "help": "instead of --mem"},
    "max_parallel": {"type": int, "help": "array tasks at a time (default 16)"},
    "tasks": {"metavar": "N", "help": "tasks of a sample job; each makes its share of the shards (default auto)"},
    "via": {"choices": ["submitit", "sbatch"], "help": "how jobs reach SLURM (default submitit)"},
    "cluster": {
        "choices": ["auto", "slurm", "local"],
        "help": "auto is SLURM; local runs the same jobs as processes on this machine",
    },
}


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it runs (defaults come from the site profile)")
    for name, spec in FLAGS.items():
        group.add_argument("--" + name.replace("_", "-"), dest=name, default=None, **spec)
    group.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other sbatch option")
    group.add_argument("--profile", metavar="SITE", help=f"a file of {PROFILES.relative_to(PROJECT)}/, or a path")


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
        raise RequestError(f"--profile {name}: cannot be read: {e}") from None
    if tree is not None and not isinstance(tree, dict):
        raise RequestError(f"{path}: expected keys and values")
    options = (tree or {}).get("sbatch") or {}
    if not isinstance(options, dict):
        raise RequestError(f"{path}: sbatch = {options!r}: expected options and values, e.g. {{nice: 100}}")
    return tree or {}


def site_of(run: RunDir) -> Site:
    """Where the run was submitted to: later stages go there too unless told otherwise. Raises DamagedFile."""
    return of_record(read_run(run).get("launch") or {}, f"`launch` in {run.run_json}")


def of_record(launch: dict[str, Any], where: str) -> Site:
    """What was once written down of a submission. Raises as `build` does."""
    site: Site = build(Site, launch, where)
    return site


def resolve(args: argparse.Namespace, base: dict[str, Any] | None = None, stage: str = "train") -> Site:
    """What this run was submitted with (`base`), then the site profile, then the command line. Raises RequestError.

    stage: what the command line is about; where it is not training, it goes before the profile's section of the stage.
    """
    typed = {name: getattr(args, name) for name in FLAGS if getattr(args, name) is not None}
    profile, typed = (_one_of_memories(layer, where) for layer, where in (
        (load_profile(args.profile), f"profile {args.profile}"), (typed, "options")))  # fmt: skip
    tree = {**(base or {}), **profile, **typed}
    if stage != "train" and isinstance(tree.get(stage, {}), dict):
        tree[stage] = {**tree.get(stage, {}), **{k: v for k, v in typed.items() if k in Stage.model_fields}}
    extra = dict(tree.get("sbatch") or {})
    for item in args.sbatch:
        key, eq, value = item.lstrip("-").partition("=")
        extra[key] = value if eq else True
    for key in extra:
        if not re.fullmatch(r"[a-z][a-z-]*", str(key)):
            raise RequestError(
                f"--sbatch {key}: not an sbatch option; write it long and without dashes, "
                f"e.g. --sbatch reservation=course"
            )
        if key in OURS:
            raise RequestError(f"--sbatch {key}: this option is set by the launcher, because restarts depend on it")
    _take_gres(tree, extra, args.gpus_per_node)
    tree["sbatch"] = extra
    where = f"profile {args.profile} and options" if args.profile else "options"
    site: Site = build(Site, tree, where)
    if site.num_gpus and site.tasks_per_node and site.tasks_per_node != site.num_gpus:
        raise RequestError(
            f"--tasks-per-node {site.tasks_per_node} with --gpus-per-node {site.gpus_per_node}: one task "
            f"is one rank and takes one GPU; give the same number, or --gpus-per-node 0 for CPUs"
        )
    return site


def _take_gres(tree: dict[str, Any], extra: dict[str, Any], typed: str | None) -> None:
    """GPUs that are asked for by sbatch's gres count as --gpus-per-node, so that a stage which needs fewer can say so.

    typed: --gpus-per-node of the command line.
    """
    gres = str(extra.get("gres") or "")
    gpus = gpus_of(gres)
    if len(gpus) != 1:
        return
    ((kind, number),) = gpus
    if typed is not None and str(typed).rpartition(":")[2] not in ("0", str(number)):
        raise RequestError(f"--gpus-per-node {typed} with --sbatch gres={gres}: they differ; give one of them")
    if ":" in kind:  # of a form that --gpus-per-node has not: as it is, for every stage
        tree["gpu_request"], tree["gpus_per_node"] = "none", number
        return
    rest = ",".join(entry for entry in gres.split(",") if not gpus_of(entry))
    extra.pop("gres")
    if rest:
        extra["gres"] = rest
    tree["gpus_per_node"], tree["gpu_request"] = f"{kind}:{number}" if kind else number, "gres"


def settle(site: Site, *, dry_run: bool) -> Site:
    """Fill in what only the scheduler knows, and check the partition against it.

    Raises EnvironmentLacks where there is no SLURM, RequestError for a partition that does not exist. A dry run does
    without a scheduler and then assumes a GPU per node.
    """
    if site.is_local:
        return site.model_copy(update={"gpus_per_node": 0 if site.gpus_per_node is None else site.gpus_per_node})
    known: dict[str, Partition] = {}
    if not slurm.available():
        if not dry_run:
            raise EnvironmentLacks(
                "sbatch is not on this machine: log in to the cluster's login node, load its slurm "
                "module, or run here with --cluster local"
            )
    else:
        if site.via == "submitit" and not dry_run and not slurm.available("srun"):
            raise EnvironmentLacks("srun is not on this machine, and submitit needs it: use --via sbatch")
        try:
            known = partitions()
        except slurm.SlurmError as e:
            if not dry_run:
                raise EnvironmentLacks(
                    f"SLURM does not answer ({e}); try again later, or run here with --cluster local"
                ) from None
    for where in (site, site.sample, site.evaluate) if known else ():
        _check_partition(where, known)
    if site.gpus_per_node is None:
        gpus = site.tasks_per_node or 1
        has_gpu = all(p.gpus_per_node for p in _meant(site.partition, known)) if known else True
        site = site.model_copy(update={"gpus_per_node": gpus if has_gpu else 0})
    return _with_types(site, known) if known else site


def _meant(names: str | None, known: dict[str, Partition]) -> list[Partition]:
    """The partitions that are asked for, or the one that SLURM takes."""
    asked = names or default_partition()
    found = [known[name] for name in asked.split(",") if name in known] if asked else []
    return found or [p for p in known.values() if p.is_default] or list(known.values())


def _check_partition(asked: Site | Stage, known: dict[str, Partition]) -> None:
    """Raises RequestError for one that there is not, and for a time limit that none of those asked for allows."""
    for name in (asked.partition or "").split(","):
        if name and name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise RequestError(
                f"--partition {name}: this cluster has no such partition; "
                + (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}")
            )
    if asked.time is None or asked.qos is not None:  # a QOS may allow more
        return
    there = _meant(asked.partition, known)
    limits = [slurm_minutes(p.time_limit) for p in there if p.time_limit]
    if len(limits) == len(there) and asked.time > max(limits):
        which = "; ".join(f"partition {p.name} allows {p.time_limit}" for p in there)
        raise RequestError(
            f"--time: {asked.time} minutes are more than any job may have here ({which}), so it would wait for ever; "
            f"ask for less: the run continues in the next job"
        )


def _with_types(site: Site, known: dict[str, Partition]) -> Site:
    """With the type of the GPUs where there is but one, and a stage whose own partition has none without."""

    def types(names: str | None) -> set[str]:
        return {kind for p in _meant(names, known) for kind in p.gpu_types}

    update: dict[str, Any] = {}
    (only,) = types(site.partition) if len(types(site.partition)) == 1 else ("",)
    if site.num_gpus and not site.gpu_type and site.gpu_request == "auto" and re.fullmatch(r"[\w.-]+", only):
        update["gpus_per_node"] = f"{only}:{site.num_gpus}"
    for name in ("sample", "evaluate"):
        stage: Stage = getattr(site, name)
        if stage.partition and stage.gpus_per_node is None and types(stage.partition) != types(site.partition):
            has_gpu = all(p.gpus_per_node for p in _meant(stage.partition, known))
            update[name] = stage.model_copy(update={"gpus_per_node": 1 if has_gpu and site.num_gpus else 0})
    return site.model_copy(update=update)
