"""What is saved, how it becomes a verified generation, and which one a new life resumes.

A generation is step-K.pt (with ema-K.safetensors at milestones and the end) and, written last, step-K.json with the
.pt's sha256 and a digest of itself. A .pt without its .json does not exist. A save copies the state into reused host
buffers (training waits for that alone) and a thread writes them; a second save waits for the first. Kill points:
before the .pt's rename, a stale temporary; before the .json's, a .pt that does not exist, removed by the next life and
the next save; after it, a generation.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpm.errors import DoNotRetry, RunBusy
from ddpm.fence import Fence
from ddpm.rundir import (
    TMP_PREFIX,
    DamagedFile,
    RunDir,
    now,
    publishing,
    read_signed,
    sha256_file,
    sign,
    write_json,
)

if TYPE_CHECKING:
    import torch  # loaded where states are: choosing a generation to sample stays cheap on a login node

Log = Callable[[str], None]

SPARE_BYTES = 16 * 2**20
"""Left free by a save, for log lines and events."""


@dataclass(frozen=True)
class Generation:
    """A checkpoint whose size, digest and manifest hold."""

    step: int
    sha256: str
    manifest: dict[str, Any]


def verify(run: RunDir, step: int) -> Generation:
    """Check one generation in full. Raises DamagedFile with the reason, FileNotFoundError where there is none."""
    manifest = read_signed(run.manifest(step))
    path = run.checkpoint(step)
    if manifest["step"] != step or manifest["file"] != path.name:
        raise DamagedFile(f"{run.manifest(step).name}: is the manifest of {manifest['file']}")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DamagedFile(f"{path.name}: missing beside its manifest") from None
    if size != manifest["bytes"]:
        raise DamagedFile(f"{path.name}: {size} bytes instead of {manifest['bytes']}")
    if (sha256 := sha256_file(path)) != manifest["sha256"]:
        raise DamagedFile(f"{path.name}: its sha256 does not match its manifest")
    return Generation(step, sha256, manifest)


def newest_good(run: RunDir, log: Log) -> Generation | None:
    """The newest generation that holds, naming each one that does not; None where none was ever saved.

    Never a silent start at 0: raises DoNotRetry where checkpoints exist and all are damaged, and OSError where none is
    good and some could not be read, which may be otherwise the next time.
    """
    steps = run.steps_saved()
    unread = None
    for step in steps:
        try:
            return _verify_again(run, step)
        except (DamagedFile, OSError, KeyError) as e:
            log(f"checkpoint rejected: step={step} reason={e}")
            if isinstance(e, OSError) and not isinstance(e, FileNotFoundError):
                unread = unread or e
    if unread:
        raise unread
    if steps:
        raise DoNotRetry(
            f"every checkpoint in {run.checkpoints} is damaged ({len(steps)} rejected above). To start this "
            f"run over on purpose, move that directory away: mv {run.checkpoints} {run.checkpoints}.damaged"
        )
    return None


def _verify_again(run: RunDir, step: int) -> Generation:
    """`verify`, tried once more where it could not read: a network file system may lose a file's handle once."""
    try:
        return verify(run, step)
    except OSError:
        return verify(run, step)


def load(run: RunDir, step: int) -> dict[str, Any]:
    """The state saved at `step`, tensors on the CPU. Call `verify` first: one flipped bit loads without a complaint."""
    import torch

    return torch.load(run.checkpoint(step), map_location="cpu", weights_only=True)


def num_bytes(state: Any) -> int:
    """Of all tensors in a state tree."""
    if hasattr(state, "nbytes"):
        return int(state.nbytes)
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(num_bytes, values))


class HostCopy:
    """A copy of a state tree in host buffers that are allocated once (pinned where the state is on a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, state: Any) -> Any:
        """`state` with every tensor copied; complete when this returns, so training may go on changing it."""
        import torch

        copied = self._copy(state, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, key: str) -> Any:
        import torch

        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[key] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(
            value, dict
        ):  # interned, since pickle tells equal keys from the same: so equal states, equal bytes
            return {sys.intern(k) if isinstance(k, str) else k: self._copy(v, f"{key}/{k}") for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(v, f"{key}/{i}") for i, v in enumerate(value))
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
        log: Log,
        on_saved: Callable[[int], None],
    ) -> None:
        self._run, self._fence, self._log, self._on_saved = run, fence, log, on_saved
        self._keep_last, self._is_milestone, self._world_size = keep_last, is_milestone, world_size
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        run.checkpoints.mkdir(exist_ok=True)
        try:
            self._remove_unfinished()
        except OSError as e:
            log(f"what a failed save left cannot be removed: {e}")

    def save(self, state: dict[str, Any], *, wait: bool = False, final: bool = False) -> None:
        """Save `state` (what `Trainer.state` returns) as the generation of state["step"].

        A failed write is logged, and the next save tries again; with `wait` the outcome is known on return, and an
        OSError is raised. `final`: EMA weights are published beside it, as for a milestone.
        Raises RunBusy when a later job has taken the run over.
        """
        self.wait(raising=False)
        self._fence.check()
        copied = self._copy.take(state)
        self._thread = threading.Thread(target=self._write_guarded, args=(copied, final), name="checkpoint-writer")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self, *, raising: bool = True) -> None:
        """Until the write under way is over. Raises RunBusy; with `raising` also the OSError of a failed write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, RunBusy) or (error is not None and (raising or not isinstance(error, OSError))):
            raise error

    def _write_guarded(self, state: dict[str, Any], final: bool) -> None:
        try:
            self._write(state, final)
        except BaseException as e:
            self._error = e
            if isinstance(e, OSError):
                self._log(
                    f"checkpoint failed: step={state['step']} error={e}; the last good one stays, "
                    f"the next save tries again"
                )
            elif not isinstance(e, RunBusy):  # it ends this life at the next save, which may be far away
                self._log(f"checkpoint failed: step={state['step']} error={e!r}")

    def _write(self, state: dict[str, Any], final: bool) -> None:
        import torch

        run, step, token = self._run, int(state["step"]), str(self._fence.token)
        with_ema, settled = final or self._is_milestone(step), state["extra"].get("early_stopped")
        try:
            # an earlier life was killed between this save and its next step: the bits are the same
            _verify_again(run, step)
        except (DamagedFile, OSError, KeyError):
            self._fence.check()  # what lies there may be a later job's, half way to its manifest
            run.manifest(step).unlink(missing_ok=True)
            self._remove_unfinished()
            self._check_space(num_bytes(state) + (num_bytes(state["ema"]) if with_ema else 0))
            with publishing(run.checkpoint(step), token=token, may_publish=self._fence.check) as f:
                try:
                    torch.save(state, f)  # type: ignore[arg-type]  # it needs write() and flush() alone
                except RuntimeError:
                    if f.failed is None:
                        raise
                    raise f.failed from None
            if with_ema:
                run.ema_weights(step).unlink(missing_ok=True)  # left by a save that never got its manifest
                self._write_ema(state["ema"], step, token)
            write_json(
                run.manifest(step),
                sign(
                    {
                        "step": step,
                        "images": state["images"],
                        "file": run.checkpoint(step).name,
                        "bytes": f.size,
                        "sha256": f.sha256,
                        "config_digest": state["config_digest"],
                        "world_size": self._world_size,
                        "fence": self._fence.token,
                        "created": now(),
                        # only where training ended early, which the step alone would not say: the mean change of the
                        # loss at which it settled
                        **({} if settled is None or settled is False else {"early_stopped": settled}),
                    }
                ),
                token=token,
                may_publish=self._fence.check,
            )
        if with_ema and not run.ema_weights(step).exists():  # the generation was saved before it was to be the last
            self._write_ema(state["ema"], step, token)
        self._on_saved(step)
        try:
            self._retain(step)
        except (OSError, ValueError) as e:
            self._log(f"checkpoint saved: step={step}; older ones cannot be removed now: {e}")

    def _check_space(self, needed: int) -> None:
        """Raise OSError where a save does not fit: a disk that it has filled is full for everybody else too."""
        free = shutil.disk_usage(self._run.checkpoints).free
        if free < needed + SPARE_BYTES:
            where, gib = self._run.checkpoints, 2**30
            raise OSError(errno.ENOSPC, f"{free / gib:.2f} GiB free for a checkpoint of {needed / gib:.2f} GiB", where)

    def _write_ema(self, ema: dict[str, torch.Tensor], step: int, token: str) -> None:
        from safetensors.torch import save

        with publishing(self._run.ema_weights(step), token=token, may_publish=self._fence.check) as f:
            f.write(save({k: v.contiguous() for k, v in ema.items()}, metadata={"step": str(step)}))

    def _retain(self, newest: int) -> None:
        """Remove what nobody needs: the manifest first, so that a kill in between leaves a .pt that does not exist.

        newest: the step just saved. Whatever lies beyond it was rejected when this history began, and must not take
        the place of a good one. Raises OSError or ValueError, with nothing removed, where a request cannot be read.
        """
        steps = self._run.steps_saved()
        good = [s for s in steps if s <= newest]
        keep = {*good[: self._keep_last], *self._named(), *filter(self._is_milestone, good)}
        self._fence.check()
        for step in steps:
            if step not in keep:
                self._run.manifest(step).unlink(missing_ok=True)
                self._run.checkpoint(step).unlink(missing_ok=True)
        self._remove_unfinished()

    def _named(self) -> set[Any]:
        """Steps that sample sets are made of."""
        steps = set()
        for sample_set in self._run.sample_sets():
            try:
                request = json.loads(sample_set.request.read_bytes())
            except FileNotFoundError:
                continue
            except ValueError as e:
                raise ValueError(f"{sample_set.request}: {e}") from None
            if isinstance(request, dict) and isinstance(checkpoint := request.get("checkpoint"), dict):
                steps.add(checkpoint.get("step"))
        return steps

    def _remove_unfinished(self) -> None:
        """Remove what saves that failed or were killed have left: it would take the room of those to come.

        EMA weights go with their .pt alone: what lies there without one, someone may have kept on purpose.
        """
        directory = self._run.checkpoints
        names = {p.name for p in directory.iterdir()}
        self._fence.check()  # after the look around: none of it is a later job's
        for name in sorted(names):
            if name.startswith(TMP_PREFIX):
                (directory / name).unlink(missing_ok=True)
            elif (found := re.fullmatch(r"step-(\d{9,})\.pt", name)) and f"{name[:-3]}.json" not in names:
                self._run.ema_weights(int(found[1])).unlink(missing_ok=True)
                (directory / name).unlink(missing_ok=True)
