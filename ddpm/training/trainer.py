"""The training loop: steps on any number of ranks, stoppable after each, until a verified checkpoint of the last one.

It asks `stop_requested()` and knows no signals, reads no environment, and writes through its chronicle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ddpm.config.schema import Config
from ddpm.data.packed import PackedImages
from ddpm.errors import DoNotRetry, EnvironmentLacks
from ddpm.network.arithmetic import utilization
from ddpm.network.device import Later, Resolved, name_of
from ddpm.network.start import read_start
from ddpm.network.weights import misfits
from ddpm.run import generations
from ddpm.run.events import read_events_and_damage
from ddpm.run.log import counted, say
from ddpm.run.paths import RunDir
from ddpm.run.stopping import STOP_REASONS, StopRequested
from ddpm.training import fitting, grids, histograms
from ddpm.training.chronicle import Chronicle
from ddpm.training.due import Due
from ddpm.training.meter import Meter
from ddpm.training.progress import Progress
from ddpm.training.ranks import World, stop_code
from ddpm.training.state import TrainingState
from ddpm.training.step import Step
from ddpm.training.validation import HeldOut


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.train` ended: `finished`, or a saved stop with the reason that the ranks agreed on."""

    finished: bool
    step: int
    reason: str = ""
    saved: bool = True


class Trainer:
    """One life of one run on one rank.

    chronicle: on rank 0 a `MainChronicle`. start: `from` of run.json, the weights that the run starts from; None:
    random ones. held_out: images to validate on; None: no validation.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        packed: PackedImages,
        resolved: Resolved,
        chronicle: Chronicle,
        *,
        start: dict[str, Any] | None = None,
        held_out: PackedImages | None = None,
    ) -> None:
        self.config, self.run, self.world, self.chronicle = config, run, world, chronicle
        self._start = start
        self.state = TrainingState(config, world, resolved.amp)
        self.step = Step(config, world, packed, resolved, self.state)
        self.held_out = HeldOut(config, held_out, self.step.diffusion) if held_out is not None else None
        share = utilization(config, name_of(world.device), resolved.amp)
        self.due, self.meter = Due(config, len(packed)), Meter(len(packed), share)
        self.warm = self._stepped = False
        self._beginning = "started"
        # whether loss and gradient of the last step were finite, and of the one before it: read one step late
        self._finite: Later | None = None
        self._finite_before: Later | None = None
        self._asked: Callable[[], list[int]] | None = None
        self._saved_at = time.monotonic()

    @property
    def at(self) -> Progress:
        return self.state.at

    @property
    def resolved(self) -> Resolved:
        return self.step.resolved

    # ------------------------------------------------------------ resuming

    def resume(self) -> None:
        """Load the newest good generation that rank 0 finds, or start at step 0. Raises DoNotRetry if all are
        damaged."""
        # a life may have been killed after a rollback and before its next save: its attempt counts all the same
        lived = self.world.of_main(self._attempts_told)
        step = self._newest()
        self.chronicle.miss(step or 0)
        if step is None:
            came = {"weights_of": self._start["source"], "step": self._start["step"]} if self._start else {}
            self.chronicle.say("no checkpoint: starting at step 0", **came)
            self._begin_with_start()
        else:
            self._restore(step)
        self.at.rollbacks, self.at.attempt = max(self.at.rollbacks, lived), max(self.at.attempt, lived)
        self._begin()
        if step is not None:
            self._beginning = "resumed"
            self.chronicle.say("resumed", step=step, world_size=self.world.world_size)

    def _attempts_told(self) -> int:
        """On rank 0: the last attempt that the run's events tell of."""
        events, damage = read_events_and_damage(self.run)
        for what in damage:
            self.chronicle.say(f"{what}: left out")
        told = (e.get("attempt", 0) for e in events if e["event"] == "rollback")
        return max(told, default=0)  # no sum: two lives may have told of the same rollback

    def _newest(self) -> int | None:
        """The step of the newest good generation, as rank 0 finds it; None if nothing was ever saved."""
        return self.world.of_main(lambda: found.step if (found := generations.newest_good(self.run, say)) else None)

    def _restore(self, step: int) -> None:
        """Load the generation of `step`. Raises DoNotRetry if this config or this code cannot go on with it."""
        saved = generations.load(self.run, step, mapped=self.world.is_main)
        if saved["config_digest"] != self.config.digest():
            raise DoNotRetry(
                f"the checkpoint of step {saved['step']} belongs to other mathematics (config digest "
                f"{saved['config_digest'][:12]}, now {self.config.digest()[:12]}): restore {self.run.config}"
            )
        wrong = misfits(self.state.model.state_dict(), saved["model"])[:1]
        if not wrong:
            try:
                self.state.load_state_dict(saved)
            except (KeyError, ValueError) as e:  # what this code keeps beside the weights, and that code did not
                wrong = [f"{type(e).__name__}: {e}"]
        if wrong:
            raise DoNotRetry(
                f"the checkpoint of step {saved['step']} was saved by code of another network or optimizer "
                f"({wrong[0]}): go on with that code (--code DIGEST, where the run has it as code-DIGEST.zip), or "
                f"train another run"
            )

    def _begin_with_start(self) -> None:
        if self._start is not None:
            self.state.begin_with(read_start(self.run, self._start))
        else:
            self.state.begin_as_rank_0()

    def _begin(self) -> None:
        """Reset all that depends on earlier steps, after the state was loaded or rolled back."""
        self._finite = self._finite_before = self._asked = None
        self.step.begin_attempt()
        self.chronicle.begin(self.at.step, self.at.step - self.state.window.steps)

    def fit(self) -> int | None:
        """Find train.micro_batch=auto, if it was not found before; returns it, else None. Called on all ranks, where
        kernels may be compiled: by torch's an image takes twice the memory.

        Raises as `fitting.fit`.
        """
        if self.config.train.micro_batch != "auto" or self.resolved.micro_batch is not None:
            return None
        self.step.choose_kernels()
        found = fitting.fit(self.step)
        self.step.resolved = replace(self.resolved, micro_batch=found)
        self.chronicle.say("train.micro_batch=auto", images_at_a_time=found, of=self.step.share)
        return found

    def warm_up(self, stop_requested: StopRequested) -> None:
        """One forward and backward whose gradients are thrown away; skipped if a stop was requested before.

        This compiles the network. Also, DDP regroups its buckets after its first backward in the order in which
        gradients arrived, and with more than two ranks the order of summation depends on that: doing it before the
        first step gives every life the same order. Call it before each `train`, since a life may go on after a stop;
        only the first call does anything.
        """
        wanted = not self.warm and (self.world.world_size > 1 or self.resolved.compiles)
        if not wanted or self.state.is_last or self.world.agreed_stop(stop_requested):
            return
        self.step.choose_kernels()
        fitting.first(self.step, self.step.warm_up)
        self.warm = True

    # ------------------------------------------------------------ the loop

    def train(self, stop_requested: StopRequested) -> Outcome:
        """Take steps until the end or an agreed stop; both leave a verified checkpoint.

        Raises DoNotRetry (rollbacks used up, damaged checkpoints), RunBusy (fenced out), EnvironmentLacks (the data was
        overwritten while it was mapped). A stop whose save failed is reported as `saved=False`.
        """
        try:
            with self.world.heeded():  # first: the others wait for its answer for some seconds alone
                return self._train(stop_requested)
        except Exception:
            self.chronicle.end_save()  # of an earlier step, which was good
            raise

    def _train(self, stop_requested: StopRequested) -> Outcome:
        self.step.choose_kernels()
        if not self.state.is_last and (reason := self.world.agreed_stop(stop_requested)):
            return self._stop(reason)  # asked for while starting up
        self.chronicle.event(self._beginning, self.at.step)
        self._beginning = "resumed"
        # if a stop ended the last life before its last step was validated or drawn
        if reason := self._validate_late(stop_requested):
            return self._stop(reason)
        if self.due.grid(self.at.step) and (reason := self._grid(stop_requested)):
            return self._stop(reason)
        self.meter.restart(self.at.step)
        while not self.state.is_last:
            taken = self.step.take() if self._stepped else fitting.first(self.step, self.step.take)
            self._finite_before, self._finite, self._stepped = self._finite, taken, True
            at_total = self.at.step >= self.config.train.total_steps
            reason, bad, save_due = self._agree(stop_requested, at_total)
            if bad:
                self.roll_back()
                continue
            if self.due.log(self.at.step):
                reason = self._log(stop_requested) or reason
                if self.state.settled is not None:
                    break
            self.alive()
            if reason and not at_total:  # the last step is followed by its save in any case
                return self._stop(reason)
            if save_due:
                self.save()
            if self.due.histogram(self.at.step):
                if self.world.is_main:
                    histograms.show(self.step, self.chronicle)
                self.meter.restart(self.at.step)
            if self.due.grid(self.at.step) and (reason := self._grid(stop_requested)):
                return self._stop(reason)
        return self._finish(stop_requested)

    def _agree(self, stop_requested: StopRequested, at_total: bool) -> tuple[str, bool, bool]:
        """Called on all ranks after a step; returns what they agree on: (why to stop, or ""; whether to roll back;
        whether to save)."""
        step, world = self.at.step, self.world
        # what other ranks have asked for is heard one step late, so that no step waits for them. It is heard before
        # this rank waits for its device, which would never answer if a rank hangs
        code, any_bad, any_save = self._asked() if self._asked else (0, 0, 0)
        # device values are read one step late too, so that a GPU never idles; after the last step there is no later
        bad = _is_bad(self._finite_before) or (at_total and _is_bad(self._finite))
        by_clock = self.due.save(step, time.monotonic() - self._saved_at if world.is_main else 0)
        asked = world.agree_later([stop_code(stop_requested), int(bad), int(by_clock)])
        if world.world_size == 1:
            code, any_bad, any_save = asked()
        else:
            self._asked = asked
        save_due = bool(any_save) or self.due.save(step, 0)
        if (code or save_due or at_total or self.due.log(step) or self.due.grid(step)) and not any_bad:
            # what follows keeps or shows this step, so it must be known to be good
            self._asked = None
            damage = self.step.watch.damage()
            bad = _is_bad(self._finite_before) or _is_bad(self._finite)
            any_bad, damaged, code_now = world.agree([int(bad), int(bool(damage)), stop_code(stop_requested)])
            code = code or code_now
            if damaged:
                raise EnvironmentLacks(
                    f"{damage or 'what another rank reads was overwritten while it was mapped'}: nothing is saved of "
                    f"step {step}, whose images may have been others. The next life packs the data again, and goes on "
                    f"from the checkpoint before"
                )
        return STOP_REASONS[code], bool(any_bad), save_due

    def alive(self) -> None:
        """A sign of life for the status view, where steps give none."""
        self.chronicle.alive(self.at.step)

    def _log(self, stop_requested: StopRequested) -> str:
        """Write a line of metrics; returns the reason of a stop that cut its validation short, or ""."""
        record, reason = self.meter.read(self.state), ""
        if self.held_out is not None and self.due.validate(self.at.step):
            loss, reason = self._validate(self.held_out, stop_requested)
            record |= {} if loss is None else {"validation_loss": loss}
        self.chronicle.log(record)
        return reason

    def _validate(self, held_out: HeldOut, stop_requested: StopRequested) -> tuple[float | None, str]:
        """As `HeldOut.validate`; the time that it takes does not count in the measured speed."""
        found = held_out.validate(self.state, self.chronicle, stop_requested)
        self.meter.restart(self.at.step)
        return found

    def _validate_late(self, stop_requested: StopRequested) -> str:
        """Add the loss on held-out images to this step's line if an earlier life wrote it without; returns the reason
        of a stop that came before, or ""."""
        step = self.at.step
        if self.held_out is None or not self.due.validate(step):
            return ""
        if not self.world.broadcast(self.chronicle.lacks_validation(step)):
            return ""
        loss, reason = self._validate(self.held_out, stop_requested)
        if loss is not None:
            self.chronicle.validated(step, loss)
        return reason

    # ------------------------------------------------------------ saving, stopping, rolling back

    def save(self, *, wait: bool = False, final: bool = False, stop_reason: str = "") -> bool:
        """As `Chronicle.save`; called on all ranks."""
        self._saved_at = time.monotonic()
        return self.chronicle.save(self.state.state_dict(), wait=wait, final=final, stop_reason=stop_reason)

    def _stop(self, reason: str) -> Outcome:
        step = self.at.step
        self.chronicle.event("stop_requested", step, reason=reason)
        saved = self.world.broadcast(self.save(wait=True, stop_reason=reason))
        self.chronicle.alive(step, force=True)
        self.chronicle.rest()
        self.chronicle.say("stopped", reason=reason, step=step, saved=saved)
        return Outcome(False, step, reason, saved)

    def _finish(self, stop_requested: StopRequested) -> Outcome:
        step, train = self.at.step, self.config.train
        if self.state.window.steps:
            self._log(stop_requested)
        self._grid(stop_requested)
        if (change := self.state.settled) is not None:
            told = {"early_stop_below": train.early_stop_below, "over_lines": train.early_stop_window}
            self.chronicle.say("the loss has settled: ending early", step=step, mean_change=f"{change:.3g}", **told)
        saved = self.world.broadcast(self.save(wait=True, final=True))  # the last manifest says that all is there
        self.chronicle.close(step)
        if saved:
            self.chronicle.event("finished", step)
        return Outcome(True, step, saved=saved)

    def roll_back(self) -> None:
        """Go back to the last good generation under a new attempt number, so that other random numbers are drawn."""
        at, most = self.at.step, self.config.train.max_rollbacks
        rollbacks, attempt = self.at.rollbacks + 1, self.at.attempt + 1
        self.chronicle.settle()
        self.world.barrier()
        self.chronicle.say("non-finite loss or gradient", near_step=at, rollback=f"{rollbacks}/{most}")
        if rollbacks > most:
            raise DoNotRetry(
                f"loss or gradients were non-finite {counted(rollbacks, 'time')} (last near step {at}), more than "
                f"train.max_rollbacks = {most}; {self._what_stays()}. Lower train.lr, set train.grad_clip, or use "
                f"train.amp=off in a new run"
            )
        self.chronicle.event("rollback", at, attempt=attempt)
        step = self._newest()
        if step is None:
            self.state.start_over()
            self._begin_with_start()
        else:
            self._restore(step)
        self.at.rollbacks, self.at.attempt = rollbacks, attempt
        self._begin()
        self.meter.restart(self.at.step)

    def _what_stays(self) -> str:
        try:
            step = self._newest()
        except DoNotRetry as e:
            return str(e)
        return "nothing was ever saved" if step is None else f"the checkpoint of step {step} is good, and stays"

    def _grid(self, stop_requested: StopRequested) -> str:
        """Draw a grid; returns the reason of a stop that prevented it, or ""."""
        return grids.draw_and_publish(self.state, self.chronicle, stop_requested)


def _is_bad(finite: Later | None) -> bool:
    return finite is not None and not finite
