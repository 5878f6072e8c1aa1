"""How a training state becomes a generation, and which generations stay.

A save copies the state into reused host buffers (training waits for that alone) and a thread writes them; a second save
waits for the first. A kill before the .pt's rename leaves a stale temporary; before the .json's rename, a .pt that does
not count, which the next life or save removes because the save's sign marks it; after it, a generation. A .pt without
manifest and sign, and one that was rejected, may be somebody's only copy: it is moved aside.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch

from ddpm.errors import DoNotRetry, RunBusy
from ddpm.run import unfinished
from ddpm.run.fence import Fence
from ddpm.run.files import (
    DamagedFile,
    link_to_nothing,
    now,
    publishing,
    read_bytes,
    read_json,
    read_signed,
    sha256_json,
    sign,
    write_json,
)
from ddpm.run.generations import Generation, Tell, ema_damage, verify_again
from ddpm.run.log import amount
from ddpm.run.paths import Made, RunDir, listed
from ddpm.run.records import identity

SPARE_BYTES = 16 * 2**20
"""Space that a save leaves free, for log lines and events."""
PLAIN = (type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)
"""What a state tree may hold beside tensors, dicts, lists and tuples: weights_only refuses most classes."""


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in a state tree."""
    if hasattr(state, "nbytes"):
        return int(state.nbytes)
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(num_bytes, values))


class HostCopy:
    """A copy of a state tree in host buffers that are allocated once (pinned where the state is on a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """`state` with every tensor copied to the host; training may change `state` once this returns.

        Raises DoNotRetry for what could not be loaded again.
        """
        copied = self._copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, key: str) -> Any:
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            # interned, since pickle tells equal keys from the same: so equal states, equal bytes
            return {sys.intern(k) if isinstance(k, str) else k: self._copy(v, f"{key}/{k}") for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copy(v, f"{key}/{i}") for i, v in enumerate(value))
        if type(value) not in PLAIN:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise DoNotRetry(
                f"the state to save holds a {kind} at {key.strip('/')}, which a checkpoint cannot keep: nothing is "
                f"saved. Keep tensors, numbers (int or float, not NumPy's), text, lists and dicts in "
                f"TrainingState.state_dict (ddpm/training/state.py), then submit again with --code new"
            )
        return value


class Checkpointer:
    """Writes generations of one run in the background, keeps the newest few, milestones and those that samples name."""

    def __init__(
        self,
        run: RunDir,
        fence: Fence,
        *,
        keep_last: int,
        is_milestone: Callable[[int], bool],
        world_size: int,
        log: Tell,
        on_saved: Callable[[int, str], None],
        on_failed: Callable[[int, str], None] = lambda step, why: None,
    ) -> None:
        self._run, self._fence, self._log, self._on_saved, self._on_failed = run, fence, log, on_saved, on_failed
        self._keep_last, self._is_milestone, self._world_size = keep_last, is_milestone, world_size
        self._identity = identity(run)  # as this life found it, whatever becomes of run.json
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._not_removed = ""
        self._whole: set[str] = set()
        run.checkpoints.mkdir(exist_ok=True)
        self._not_cleared = ""
        self._clear()

    def _clear(self) -> None:
        """Remove what failed saves left. What cannot be removed only blocks a save of its own step: it is logged
        once."""
        try:
            unfinished.clear(self._run, self._fence.check, self._log)
        except OSError as e:
            if str(e) != self._not_cleared:
                self._log(f"what a failed save left cannot be removed: {e}")
            self._not_cleared = str(e)

    def save(self, state: dict[str, Any], *, wait: bool = False, final: bool = False) -> None:
        """Save `state` (see ddpm/training/state.py) as the generation of state["step"].

        A failed write is logged, and the next save tries again; with `wait` the outcome is known on return, and an
        OSError is raised. `final`: EMA weights are published beside it, as for a milestone.
        Raises RunBusy when a later job has taken the run over.
        """
        self.wait(raising=False)
        self._fence.check()
        copied = self._copy.take(state)
        self._error = OSError(errno.EAGAIN, "the thread that writes it did not come to an end")  # replaced when it does
        self._thread = threading.Thread(target=self._write_guarded, args=(copied, final), name="checkpoint-writer")
        try:
            self._thread.start()
        except RuntimeError as e:  # this user has no process left: training waits instead
            self._log(f"checkpoint: step={state['step']} is written by no thread of its own: {e}")
            self._write_guarded(copied, final)
        if wait:
            self.wait()

    def wait(self, *, raising: bool = True) -> None:
        """Wait for the write under way. Raises RunBusy; with `raising` also the OSError of a failed write."""
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, RunBusy) or (error is not None and (raising or not isinstance(error, OSError))):
            raise error

    def join(self, at_most_s: float | None = None) -> None:
        """Wait for the end of the write under way, whatever comes of it."""
        if self._thread is not None and self._thread.ident is not None:  # it has started
            self._thread.join(at_most_s)

    def _write_guarded(self, state: dict[str, Any], final: bool) -> None:
        """`_write`, whose error is kept for `wait`."""
        try:
            self._write(state, final)
            self._error = None
        except BaseException as e:
            self._error = e
            if isinstance(e, OSError):
                self._log(
                    f"checkpoint failed: step={state['step']} error={e}; the last good one stays, "
                    f"the next save tries again"
                )
                self._on_failed(int(state["step"]), e.strerror or str(e))
            elif not isinstance(e, RunBusy):  # it ends this life at the next save, which may be far away
                self._log(f"checkpoint failed: step={state['step']} error={e!r}")

    def _write(self, state: dict[str, Any], final: bool) -> None:
        """Make `state` a generation, unless it is one already; then remove those that nobody needs."""
        run, step = self._run, int(state["step"])
        with_ema = final or self._is_milestone(step)
        try:
            # an earlier life was killed between this save and its next step: the bits are the same
            there = verify_again(run, step)
        except (DamagedFile, OSError, KeyError):
            sha256 = self._publish(state, with_ema)
        else:
            sha256 = there.sha256
            self._complete(there, state, with_ema)
        self._whole.add(f"{step} {sha256}")
        self._on_saved(step, sha256)
        try:
            self._retain(step)
        except (OSError, DamagedFile) as e:
            if str(e) != self._not_removed:  # a damaged request stays so: once is enough
                self._log(f"checkpoint saved: step={step}; older ones cannot be removed now: {e}")
            self._not_removed = str(e)
        else:
            self._not_removed = ""

    def _publish(self, state: dict[str, Any], with_ema: bool) -> str:
        """Write `state` as a generation; returns the sha256 of its .pt."""
        run, step = self._run, int(state["step"])
        self._fence.check()  # a .pt that lies there may be a later job's, not yet with its manifest
        self._clear()
        self._check_space(num_bytes(state) + (num_bytes(state["ema"]) if with_ema else 0))
        rejected = [run.manifest(step), run.checkpoint(step), run.ema_weights(step)]
        unfinished.set_aside(run, rejected, f"step {step} is saved again", self._log)
        begun = unfinished.begin(run, step, self._token, self._fence.check)
        with publishing(run.checkpoint(step), token=self._token, may_publish=self._fence.check) as f:
            try:
                torch.save(state, f)  # type: ignore[arg-type]  # it needs write() and flush() alone
            except RuntimeError:
                if f.failed is None:
                    raise
                raise f.failed from None
        ema = {"ema_sha256": self._write_ema(state["ema"], step)} if with_ema else {}
        by = {"world_size": self._world_size, "fence": self._fence.token, "created": now()}
        manifest = manifest_of(state, run.checkpoint(step).name, f.size, f.sha256, **by, **self._identity, **ema)
        write_json(run.manifest(step), manifest, token=self._token, may_publish=self._fence.check)
        with contextlib.suppress(OSError):  # the next one removes it
            begun.unlink()
        return str(f.sha256)

    def _complete(self, there: Generation, state: dict[str, Any], with_ema: bool) -> None:
        """Add what an existing generation lacks: EMA weights or `early_stopped`, if it was not saved as the last one or
        has lost them."""
        run, step, told = self._run, there.step, settled_in(state)
        damage = ema_damage(run, there)
        if with_ema and (damage or not run.ema_weights(step).exists()):
            unfinished.set_aside(run, [run.ema_weights(step)], str(damage), self._log)
            told = {**told, "ema_sha256": self._write_ema(state["ema"], step)}
        if not told.items() <= there.manifest.items():
            path, manifest = run.manifest(step), sign({**there.manifest, **told})
            write_json(path, manifest, replace=True, token=self._token, may_publish=self._fence.check)

    @property
    def _token(self) -> str:
        return str(self._fence.token)

    def _check_space(self, needed: int) -> None:
        """Raise OSError if a save would not fit: a disk that it fills is full for everybody else too."""
        free = shutil.disk_usage(self._run.checkpoints).free
        if free < needed + SPARE_BYTES:
            told = f"{amount(free)} free for a checkpoint of {amount(needed)} and {amount(SPARE_BYTES)} to spare"
            raise OSError(errno.ENOSPC, told, self._run.checkpoints)

    def _write_ema(self, ema: dict[str, torch.Tensor], step: int) -> str:
        with publishing(self._run.ema_weights(step), token=self._token, may_publish=self._fence.check) as f:
            f.write(ema_bytes(ema, step))
        return f.sha256

    def _retain(self, newest: int) -> None:
        """Remove generations that nobody needs, manifest first, so that a kill in between leaves a .pt that does not
        count.

        newest: the step just saved. Later ones were rejected when this life resumed: they must not take the place of a
        good one, but are moved aside, since one that could not be read may be good. Raises OSError or DamagedFile, with
        nothing removed, if the request of a set cannot be read or is damaged.
        """
        run, steps = self._run, self._run.steps_saved()
        reached = [s for s in steps if s <= newest]
        keep = {*self._named(), *filter(self._is_milestone, reached)}
        last, rejected = self._last_good(reached)
        keep |= last
        rejected |= {s for s in steps if s > newest}
        self._fence.check()
        for step in steps:
            if step in rejected and step not in keep:
                damaged = [run.manifest(step), run.checkpoint(step), run.ema_weights(step)]
                unfinished.set_aside(run, damaged, f"rejected, and step {newest} is saved now", self._log)
            elif step not in keep:
                begun = unfinished.begin(run, step, self._token, self._fence.check)
                for path in (run.manifest(step), run.checkpoint(step), run.ema_weights(step)):  # EMA of a former end
                    path.unlink(missing_ok=True)
                begun.unlink()
        self._clear()

    def _last_good(self, steps: list[int]) -> tuple[set[int], set[int]]:
        """Of `steps`, newest first, until `keep_last` good ones are found: those that are good or cannot be read now,
        and those that are damaged. Each is read whole only once in a life."""
        run, kept, damaged = self._run, set(), set()
        good = 0
        for step in steps:
            if good == self._keep_last:
                break
            try:
                if (known := f"{step} {read_signed(run.manifest(step)).get('sha256')}") not in self._whole:
                    verify_again(run, step)
                    self._whole.add(known)
                good += run.checkpoint(step).exists()
                kept.add(step)
            except (DamagedFile, FileNotFoundError, KeyError):
                damaged.add(step)
            except OSError:
                kept.add(step)
        return kept, damaged

    def _named(self) -> set[Any]:
        """Steps of the checkpoints that sample sets and bounds were made from, and of the best milestone. Raises
        DamagedFile if one of them cannot be known."""
        run = self._run
        steps = set()
        for path in [*listed(run.samples), *listed(run.bounds), run.milestones]:
            if why := link_to_nothing(path):  # it was moved, and may be back tomorrow
                raise DamagedFile(f"{path}: {why}")
        sets: list[Made] = [*run.sample_sets(), *run.bound_sets()]
        for made in sets:
            try:
                read_bytes(made.request)  # a file system that fails for a moment is no damage
            except FileNotFoundError:
                raise DamagedFile(f"{made.request}: missing beside what was made of it") from None
            request = read_json(made.request) or {}
            if request.pop("digest", None) != sha256_json(request):
                raise DamagedFile(f"{made.request}: its digest does not match its content")
            if isinstance(checkpoint := request.get("checkpoint"), dict):
                steps.add(checkpoint.get("step"))
        with contextlib.suppress(FileNotFoundError):
            steps.add((read_signed(run.milestones).get("best") or {}).get("step"))
        return steps


def ema_bytes(ema: Mapping[str, torch.Tensor], step: int, **said: str) -> bytes:
    """The bytes of a file of EMA weights, with its step and `said` as metadata; equal weights give equal bytes."""
    return safetensors.torch.save({k: v.contiguous() for k, v in ema.items()}, metadata={"step": str(step), **said})


def manifest_of(state: dict[str, Any], file: str, size: int, sha256: str, **more: Any) -> dict[str, Any]:
    """The signed manifest of a checkpoint: what of its state is told without loading it, and `more`."""
    of_state = {"step": state["step"], "images": state["images"]}
    of_file = {"file": file, "bytes": size, "sha256": sha256, "config_digest": state["config_digest"]}
    return sign({**of_state, **of_file, **more, **settled_in(state)})


def settled_in(state: dict[str, Any]) -> dict[str, Any]:
    """`early_stopped` for a manifest, if training ended early: the mean change of the loss at which it settled."""
    settled = state["extra"].get("early_stopped")
    return {} if settled is None or settled is False else {"early_stopped": settled}
