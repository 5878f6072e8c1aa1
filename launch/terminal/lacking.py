"""What of a run cannot be read, or one file tells of and another lacks: in words beside what is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

from ddpm.config import reading
from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import evidence
from ddpm.run.files import DamagedFile, open_file, read_json, settled_marks
from ddpm.run.generations import of_another, read_manifest
from ddpm.run.paths import Made, RunDir, listed
from ddpm.run.records import has_foreign_weights, lost_signature, read_run
from launch.terminal import faults

T = TypeVar("T")


class Damage:
    """What of a run cannot be read, in words; the rest of it is shown all the same."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, what: str) -> None:
        if what and what not in self.told:
            self.told.append(what)

    def read(self, ask: Callable[[], T]) -> T | None:
        """What `ask` says; None where its files are not to be had, which is told unless they do not exist."""
        try:
            return ask()
        except FileNotFoundError:
            return None
        except (OSError, DamagedFile) as e:
            self.tell(faults.words(e) or str(e))
            return None

    def config(self, run: RunDir) -> Config | None:
        """The run's config; None where it cannot be read, as one that is torn, or another version's."""
        seen = settled_marks(run.config, run.run_json)
        try:
            return _config_at(run, seen) if seen else reading.of_run(run)
        except (RequestError, DamagedFile, OSError) as e:
            self.tell(str(e).splitlines()[0])
            return None


@lru_cache(maxsize=4096)
def _config_at(run: RunDir, seen: tuple[int, ...]) -> Config:
    """A view that is kept up to date reads the configs of all runs again and again, which takes most of its time."""
    return reading.of_run(run)


def tell(run: RunDir, events: list[dict[str, Any]], saved: int, damage: Damage) -> bool:
    """What one file tells of and another lacks. Returns whether it was trained, and no event tells of a life."""
    record = damage.read(lambda: read_run(run)) or {}
    damage.read(lambda: _check_newest(run, saved))
    if lost_signature(record):
        damage.tell("run.json is signed no more, as where it was edited by hand")
    if record.get("reads"):
        events = []  # they are told where its checkpoints are made
    told_of = max((e.get("step") or 0 for e in events if e["event"] == "checkpoint"), default=0)
    if told_of > saved and damage.read(lambda: listed(run.checkpoints)) is not None:
        damage.tell(f"its events tell of a checkpoint at step {told_of}, and checkpoints/ has none after step {saved}")
    lived = any(e["event"] in ("started", "resumed") for e in events)
    if lived or record.get("reads") or has_foreign_weights(record):
        return False
    if saved:
        damage.tell(f"events/ tells {'of no life' if events else 'nothing'}, and checkpoints/ has step {saved}")
        return True
    try:
        damage.read(lambda: evidence.refuse_start(run))
    except evidence.Incomplete as e:
        damage.tell(str(e))
        return True
    return False


def _check_newest(run: RunDir, saved: int) -> None:
    """Raises DamagedFile where the newest checkpoint cannot be whole; its content is not read."""
    if saved:
        manifest, file = read_manifest(run, saved), run.checkpoint(saved)
        if not file.exists():
            raise DamagedFile(f"{file.name} is missing beside its manifest")
        if not file.is_file() or file.stat().st_size != manifest.get("bytes"):
            open_file(file).close()  # which may know why
            raise DamagedFile(f"{file.name} is not whole: {manifest.get('bytes')} bytes were saved")


def check_sets(run: RunDir, damage: Damage) -> None:
    """Those that were made of another run's checkpoint."""
    made: list[Made] = [*run.sample_sets(), *run.bound_sets()]
    for where in made:
        at = (read_json(where.request) or {}).get("checkpoint")
        if isinstance(at, dict) and (why := of_another(run, at.get("step"), at.get("sha256"))):
            damage.tell(f"{where.path.relative_to(run.path)} {why}")
