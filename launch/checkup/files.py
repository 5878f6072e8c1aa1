"""Whether there is room for a run, and its data; what is fetched for it, and how else that comes."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from pathlib import Path

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run.files import read_json
from ddpm.run.log import amount, counted
from launch.checkup.finding import Finding, Findings, judged

BYTES_PER_PARAMETER = 16
"""Bytes of a checkpoint for each parameter: weights, their average and Adam's two moments, in float32."""
PROBE_BYTES = 64 << 20
FILES_OF_A_RUN = 2_000
"""Generously: of its sets, shards and logs, and of the data's cache."""
FETCHED = {
    "cifar10": "cifar-10-python.tar.gz",
    "inception": "pt_inception-2015-12-05-6726825d.pth",
    "dinov2": "dinov2_vitl14_pretrain.pth",
}
"""Data and extractors -> the one file that is fetched for them, as it is published."""
BY_HAND = {name: f"bring {file} by hand: python tools/prefetch.py --from {file}" for name, file in FETCHED.items()} | {
    "celeba": "bring img_align_celeba.zip and its lists by hand: data.path=THEIR_FOLDER, here and at submission",
}
BY_HAND["cifar10"] += "; or type data.path=FOLDER_OR_ZIP, here and at submission, for images that lie elsewhere"
"""What to do where they cannot be fetched from here."""


def space_of_a_run(config: Config, num_images: int | None) -> tuple[int, int]:
    """Bytes that a run has in the end, and how many milestones of it are kept for good: its checkpoints, averaged
    weights and samples. num_images: of the data, by which epochs are counted; None: not known, and those count as none.
    """
    if num_images is not None or config.train.total_images:
        config = config.resolve_length(num_images or 0)
    steps, kept, num_parameters = config.train.total_steps or 0, config.checkpoint, config.network.num_parameters
    milestones = steps // kept.milestone_every_steps if kept.milestone_every_steps else 0
    if kept.milestone_every_epochs and num_images:
        milestones += steps * config.train.global_batch // (kept.milestone_every_epochs * num_images)
    checkpoints = (milestones + kept.keep_last) * num_parameters * BYTES_PER_PARAMETER
    averages = (milestones + 1) * num_parameters * 4
    return checkpoints + averages + config.sample.num_samples * config.data.image_size**2 * 3, milestones


def storage(config: Config, root: Path, cache: Path, num_images: int | None) -> Findings:
    """Whether there is room for a run, and whether what it reads is there. cache: of packed data and weights;
    num_images: of the data."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = tempfile.TemporaryFile(dir=root)
    except OSError as e:
        yield Finding("fail", f"{root} cannot be written ({e.strerror})", "choose another place: --root, DDPM_RUNS")
        return
    with probe as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            told = f"{root} has no file locks ({e.strerror}): a run's fence is then its only guard"
            yield Finding("warn", told, "keep runs where there are, if you can")
    need, milestones = space_of_a_run(config, num_images)
    there = os.statvfs(root)
    free = there.f_bavail * there.f_frsize
    told = (
        f"{root}: {amount(free)} free, and a run has about {amount(need)} in the end, {milestones} milestones included"
    )
    yield judged(free > need, told, "remove old runs (launch/remove.py), or choose another --root")
    if there.f_files:
        told = f"{root}: room for {there.f_favail:,} files, and a run has up to {FILES_OF_A_RUN:,}"
        yield judged(there.f_favail > FILES_OF_A_RUN, told, "remove what you do not need, or choose another --root")
    yield from _data(config, cache)
    yield from _weights(config.evaluate.extractor, cache)


def _data(config: Config, cache: Path) -> Findings:
    if config.data.path is not None:  # as a submission looks, which decodes nothing yet
        from ddpm.data.packed import open_source

        try:
            source = open_source(config.data)
        except RequestError as e:
            yield Finding("fail", str(e))
            return
        own = source.kind in ("folder", "zip", "array") and "train" in source.members
        told = f"{counted(source.num_images('train'), 'image', ',')} to train on" if own else "is there"
        yield Finding("pass", f"data.path = {config.data.path}: {told}")
    if config.data.path is not None or config.data.name in ("digits", "images"):
        return
    if is_packed(config.data.name, cache):
        yield Finding("pass", f"{config.data.name} is packed in {cache / 'data'}")
        return
    host = "www.cs.toronto.edu" if config.data.name == "cifar10" else "drive.google.com"
    if why := _unreachable(host):
        yield Finding("fail", f"{config.data.name} is not here, and {why}", BY_HAND[config.data.name])
    else:
        yield Finding("pass", f"{config.data.name} is not here yet: the first submission fetches it from {host}")


def is_packed(name: str, cache: Path) -> bool:
    """Whether data of that name was packed there."""
    return any((read_json(path) or {}).get("name") == name for path in (cache / "data").glob("*/meta.json"))


def _weights(extractor: str, cache: Path) -> Findings:
    """Findings about the weights that scores need; training needs none."""
    if extractor not in FETCHED:
        return
    name, where = extractor.capitalize(), cache / "weights" / FETCHED[extractor]
    cached = Path(os.path.expanduser("~/.cache/torch/hub/checkpoints"))  # noqa: PTH111 - of a user without a home too
    hub = cached / where.name  # whence a submission copies them
    if where.exists() or hub.exists():
        yield Finding("pass", f"{name}'s weights are in {where.parent if where.exists() else hub.parent}")
    elif extractor == "dinov2":  # which prefetch.py alone fetches
        yield Finding("warn", f"{name}'s weights are not in {where.parent}: no score without them", BY_HAND[extractor])
    elif why := _unreachable("github.com"):
        told = f"{name}'s weights are not in {where.parent}, and {why}: no score without them"
        yield Finding("warn", told, BY_HAND[extractor])
    else:
        yield Finding("pass", f"{name}'s weights are not here yet: the first submission that scores fetches them")


def _unreachable(host: str) -> str:
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as e:
        return f"{host} does not answer ({e})"
    return ""


def written_per_s(root: Path) -> float:
    """Bytes a second that reach the disk. Raises OSError."""
    piece = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=root) as f:
        began = time.monotonic()
        for _ in range(PROBE_BYTES >> 20):
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())
        return PROBE_BYTES / (time.monotonic() - began)
