"""What a submission checks, packs and fetches before anything is queued."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ddpm.config import reading
from ddpm.config.sample import WITHOUT_WEIGHTS
from ddpm.config.schema import OF_BITS, Config
from ddpm.config.train import LENGTHS
from ddpm.data.labels import labels_record, told_of_classes
from ddpm.errors import DDPMError, EnvironmentLacks, RequestError
from ddpm.run import generations
from ddpm.run.events import read_events
from ddpm.run.evidence import Incomplete
from ddpm.run.files import FULL, DamagedFile
from ddpm.run.log import counted, plain
from ddpm.run.paths import RunDir
from ddpm.run.records import data_of, read_run
from ddpm.scoring.against import check_reference
from launch.cluster import code, environment
from launch.cluster.scheduler import SchedulerError
from launch.cluster.site import Site
from launch.queue import local, work
from launch.queue.chain import ways_on
from launch.queue.directory import text_of
from launch.queue.waiting import in_queue, jobs_in_queue, on_other_clusters, slurm_jobs
from launch.terminal import console, faults


def num_images(config: Config, run: RunDir) -> int | None:
    """Training images, without packing any: an existing run's record says, else the data. None: not known yet.

    Raises RequestError for a data.path that cannot serve.
    """
    if run.run_json.exists() and (known := data_of(run).get("num_images")):
        return int(known)
    from ddpm.data.packed import open_source

    source = open_source(config.data)
    if source.kind == "celeba" and config.data.attributes:  # not downloaded: how many have them is not known
        return None
    return source.num_images("train") if "train" in source.members else None


def resolve_length(config: Config, run: RunDir) -> Config:
    """The config with its length in steps, if that can be known before the data is packed; else as it is."""
    train = config.train
    if train.total_steps is not None:
        return config
    num = 0 if train.total_images else num_images(config, run)  # total_images mean the same with any data
    return config if num is None else config.resolve_length(num)


def check_data(config: Config, stages: list[str]) -> None:
    """Paths, classes and splits that the chain will read, before anything is written. Raises RequestError."""
    from ddpm.data.packed import open_source

    source = open_source(config.data)
    if config.model.num_classes not in (0, len(source.classes)):
        raise RequestError(f"model.num_classes = {config.model.num_classes}: {_classes_there_are(source.classes)}")
    if config.log.validate_every_steps is not None and "test" not in source.members:
        raise RequestError(
            f"log.validate_every_steps = {config.log.validate_every_steps}: the data has no test split, and so no "
            f"images that training does not see: leave it out (null), or lay some apart in test/, beside train/ "
            f"(data.name=images data.path=FOLDER_OR_ZIP)"
        )
    if _scores(config, stages):
        check_reference(config, config.evaluate.reference)


def _scores(config: Config, stages: list[str]) -> bool:
    """Whether jobs will score: at the end, or milestones meanwhile."""
    return "evaluate" in stages or config.evaluate.milestones is not None


def _classes_there_are(have: list[str]) -> str:
    """What model.num_classes may be with this data, and why."""
    if len(have) > 1:
        some = ", ".join(map(plain, have[:12])) + (", …" if len(have) > 12 else "")
        return f"the data has {len(have)} classes ({some}); use {len(have)}, or 0 for a model without classes"
    return "the data has no classes, or one: sort pictures into CLASS/NAME.png, give an array labels, or use 0"


def check_existing(run: RunDir, config: Config) -> bool:
    """Whether the run exists and may go on with this config.

    Raises RequestError where its mathematics is another, or where what was saved is not there.
    """
    if not run.path.exists():
        return False
    if not (run.run_json.exists() or run.config.exists()):
        raise RequestError(f"{run.path} exists and is no run: choose another --name, or move it away")
    read_run(run)
    there = config if reading.may_be_anew(run, config) else reading.of_run(run)
    if there.digest() != config.digest():
        raise RequestError(
            f"run {run.name} exists with other mathematics: {config_differences(run, config, mathematics=True)}. "
            f"{_why_fixed(there, config)}Choose another --name, or submit it with what it has"
        )
    if config.train.total_steps < run.latest_step():
        raise RequestError(
            f"train.total_steps = {config.train.total_steps}: run {run.name} is already at step "
            f"{run.latest_step()}; ask for more, or choose another --name"
        )
    try:
        generations.check_there(run)
    except Incomplete as e:
        raise RequestError(f"{e}. {ways_on(run)}") from None
    return True


def goes_on_from(run: RunDir) -> int:
    """The step of the newest checkpoint that holds, all of it read, with a line for each that does not; 0 where none
    was ever saved. Raises RequestError where none holds: a job would end at once."""
    try:
        found = generations.newest_good(run, console.warn)
    except Incomplete as e:
        raise RequestError(f"{e}. {ways_on(run)}") from None
    return 0 if found is None else found.step


def _why_fixed(there: Config, asked: Config) -> str:
    """For a message: why the length may not change, if nothing else differs; else ""."""
    old, new = there.mathematics(), asked.mathematics()
    for tree in (old, new):
        for key in LENGTHS:
            tree["train"].pop(key, None)
    if old != new:
        return ""
    return (
        f"With train.lr_schedule={asked.train.lr_schedule} the learning rate of every step follows from the length, so "
        f"that a run cannot be made longer. "
    )


def is_at_work(run: RunDir, config: Config, site: Site) -> bool:
    """Whether SLURM has the run's training already.

    Raises RequestError where that goes by another config, or where a process on this machine has the run: it must not
    change under either.
    """
    if (pid := local.running(run)) is not None:
        raise RequestError(
            f"run {run.name} is at work on this machine already, as pid {pid}: python launch/status.py {run.quoted} "
            f"shows how it gets on. Wait for it, or end it ({work.to_end(run)}; nothing is lost), then submit again"
        )
    jobs = [] if site.is_local else jobs_in_queue(run, "train")
    if elsewhere := {} if site.is_local else on_other_clusters(run, "train"):
        job, _, cluster = next(iter(elsewhere)).partition(";")
        raise RequestError(
            f"run {run.name} is in the queue of cluster {cluster} as job {job}: submit there (--sbatch "
            f"clusters={cluster}), or end it first ({work.to_end(run)}; nothing is lost)"
        )
    if jobs and reading.of_run(run) != config:
        raise RequestError(
            f"run {run.name} is in the queue as job {' '.join(jobs)} with another config: "
            f"{config_differences(run, config)}. "
            f"Wait for it, or end it ({work.to_end(run)}; nothing is lost), then submit again"
        )
    return bool(jobs)


def settle_code(run: RunDir, take: str | None, config: Config | None = None) -> None:
    """Decide which code the run's jobs run, and unpack it. That is the run's own, with a line if this checkout has
    another; this checkout's, if the run has none or with `--code new`; with `--code DIGEST` what it had before. Raises
    RequestError where what it had is gone or does not know all of `config` (None: the run's own), or where jobs are at
    work by it.

    take: what --code asks for.
    """
    here, new = code.of_checkout(), take not in (None, "kept")
    had, last = None, code.last_run(run)
    try:
        had = code.of_run(run)
    except DamagedFile:
        if not new:
            raise
    if new and take != "new":
        here = code.kept_before(run, str(take))
    known = last if had is None else code.digest(had)
    runs = here if new else had
    if runs is not None and (runs != had or config not in (None, reading.of_run(run))):
        _check_read(run, runs, config or reading.of_run(run))
    if known is None or known == code.digest(here):
        if had is None:
            code.check(here)
            code.keep(run, here)
    elif new:
        told = code.differences(had, here) if had is not None else "what it had before is gone"
        if jobs := _at_work(run):
            raise RequestError(
                f"--code {take}: {jobs} of run {run.name} would go on with the code it was begun with. Wait for it, or "
                f"end it ({work.to_end(run)}; nothing is lost), then submit again"
            )
        code.check(here)
        code.keep(run, here)
        whose = "that of this checkout" if take == "new" else "what it had before"
        print(f"code: from now on {whose}, {code.digest(here)} ({told})")
    elif had is None or last not in (None, known):
        what = "is not there" if had is None else f"holds {known}"
        stay = f"go on with what it holds, --code {known}, " if known and run.earlier_code(known).exists() else ""
        raise RequestError(
            f"{run.code} {what}, and jobs of the run were last sent with {last}: bring that back, {stay}or take this "
            f"checkout's code, {code.digest(here)}, with --code new"
        )
    else:
        told = f"{known}; this checkout has {code.differences(had, here)}"
        print(f"code: run {run.name} keeps its own, {told}. --code new takes it", file=sys.stderr)
    code.unpack(run)


def _check_read(run: RunDir, runs: code.Code, config: Config) -> None:
    """Raise RequestError where the code that jobs will run does not take the config: each would fail on its node."""
    if (named := code.digest(runs)) == code.digest(code.of_checkout()):
        return
    if why := code.refusal(run, runs, text_of(run, config)):
        raise RequestError(
            f"jobs of run {run.name} would have its code {named}, which does not know all of this config: {why}. Leave "
            f"that out, of {run.config} too if it is there, or take this checkout's code with --code new"
        )


def _at_work(run: RunDir) -> str:
    """What of the run is running or queued, in words; "" where nothing is. Raises SchedulerError."""
    if (pid := local.running(run)) is not None:
        return f"pid {pid}"
    jobs = [*in_queue(slurm_jobs(run, read_events(run))), *map(work.named, on_other_clusters(run))]
    return f"job {' '.join(jobs)}" if jobs else ""


def is_idle(run: RunDir) -> bool:
    """Whether nothing of the run is running or queued, as far as it can be asked."""
    with contextlib.suppress(SchedulerError):
        return not _at_work(run)
    return False


def config_differences(run: RunDir, asked: Config, *, mathematics: bool = False) -> str:
    """The keys that differ between the run's config and `asked`; `mathematics`: only those that its digest covers."""
    there = reading.of_run(run)
    found = reading.differences(there, asked)
    if mathematics:
        covered = there.mathematics(), asked.mathematics()
        found = [one for one in found if any(reading.value_at(tree, one[0]) is not None for tree in covered)]
    return "; ".join(
        f"{key} is {reading.as_typed(old)} there and {reading.as_typed(new)} here" for key, old, new in found
    )


def told_of_changes(run: RunDir, config: Config) -> list[str]:
    """Lines on what of an existing run's config a submission with `config` changes."""
    if reading.may_be_anew(run, config):
        return [f"{run.config.name} is lost, and is written anew"]
    changed, step = reading.differences(reading.of_run(run), config), run.latest_step()
    told = [f"{key}={reading.as_typed(now)} (it was {reading.as_typed(old)})" for key, old, now in changed]
    lines = [f"its config changes: {', '.join(told)}"] if told else []
    if step and (of_bits := [key for key, *_ in changed if key in OF_BITS]):
        lines.append(
            f"with another {' and '.join(of_bits)} the bits after step {step} are not those of a run that kept it"
        )
    return lines


def cache_of(site: Site, root: Path) -> Path:
    """Where packed data and statistics are kept: absolute, because jobs run in the project's directory."""
    return environment.expand(site.data_cache).absolute() if site.data_cache else root / ".cache"


def prepare_inputs(config: Config, site: Site, root: Path, stages: list[str]) -> dict[str, Any]:
    """What needs a network or a decoder, done here: data packed, weights fetched. Returns `data` and `labels` of
    run.json."""
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise EnvironmentLacks(
            f"log.wandb = {config.log.wandb}: wandb is not installed: pip install 'ddpm-hpc[wandb]', or leave it out"
        )
    cache = cache_of(site, root)
    made = [p for p in (cache / "data", *(cache / "data").parents) if not p.exists()]
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise EnvironmentLacks(
            f"cannot write {cache} ({e.strerror}): choose another place with --root or DDPM_RUNS"
        ) from None
    try:
        return _pack(config, site, cache, stages)
    except KeyboardInterrupt:
        print("nothing was queued; the same command packs anew, and keeps what is packed whole", file=sys.stderr)
        raise
    except OSError as e:
        if e.errno not in FULL:
            raise
        raise EnvironmentLacks(
            f"{faults.words(e, cache)}. Or choose another place: --root, DDPM_RUNS, or data_cache in the profile"
        ) from None
    except DDPMError:
        for path in made:  # a refused request leaves nothing behind
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def ensure_weights(extractor: str, cache: Path) -> None:
    """What an extractor needs lies beside the folder of packed data, where jobs see it, downloaded if need be. Loads
    torch where it needs anything."""
    if extractor not in WITHOUT_WEIGHTS:
        from ddpm.scoring import extractors

        extractors.ensure_weights(extractor, extractors.beside(cache))


def warn_of_batch(config: Config, num_images: int | None) -> None:
    """Epochs run across batches, so that training works."""
    if num_images is not None and (batch := config.train.global_batch) > num_images:
        print(
            f"warning: train.global_batch = {batch}: the data has {counted(num_images, 'image')}, so that every step "
            f"shows some of them more than once; a batch is usually a small part of the data",
            file=sys.stderr,
        )


def _pack(config: Config, site: Site, cache: Path, stages: list[str]) -> dict[str, Any]:
    from ddpm.data import packed as data

    if _scores(config, stages):
        ensure_weights(config.evaluate.extractor, cache / "data")
    bar = console.show_progress("packing")
    key, packed = data.pack(config.data, "train", cache / "data", progress=bar, or_else=environment.OTHER_CACHE)
    held_out = {}
    if config.log.validate_every_steps or (_scores(config, stages) and config.evaluate.reference == "test"):
        at, test = data.pack(config.data, "test", cache / "data", progress=bar, or_else=environment.OTHER_CACHE)
        held_out = {"test": {"key": at, "digest": test.digest}} if config.log.validate_every_steps else {}
    print(
        f"data: {config.data.name} {config.data.image_size}x{config.data.image_size}, {counted(len(packed), 'image')}, "
        f"digest {packed.digest[:12]}",
        flush=True,
    )
    labels = labels_record(packed)
    if told := told_of_classes(labels):
        print(told, flush=True)
        if not config.model.num_classes:
            print(f"the model does not use them; with model.num_classes={len(labels['classes'])} it does", flush=True)
    warn_of_batch(config, len(packed))
    record = {"cache": str(cache / "data"), "key": key, "digest": packed.digest, "num_images": len(packed)}
    return {"data": {**record, "scratch": site.scratch, **held_out}, "labels": labels}
