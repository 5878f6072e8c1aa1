"""The step and the loop: Ho et al. 2020, Algorithm 1, on any number of ranks, stoppable at every step.

Asks `stop_requested()` and knows no signal; reads no environment; prints through telemetry. Everything random follows
from (seed, attempt, step), so a life that resumes at step k computes the same steps k, k+1, … as one that never died.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ddpm import checkpoint, grids, optimizer, rng, runtime, schedule
from ddpm.config import Config, check_world_size
from ddpm.data.batches import Batches
from ddpm.data.packed import PackedImages
from ddpm.diffusion import Diffusion
from ddpm.distributed import World
from ddpm.ema import EMA
from ddpm.errors import DoNotRetry, Stopped
from ddpm.fence import Fence
from ddpm.optimizer import learning_rate
from ddpm.progress import Progress, Window
from ddpm.run.log import say
from ddpm.run.stopping import STOP_REASONS, StopRequested
from ddpm.rundir import EventLog, RunDir, read_events
from ddpm.telemetry import Telemetry


def _mtime(path: Path) -> int:
    return path.stat().st_mtime_ns


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.train` ended: `finished`, or a saved stop with the reason that the ranks agreed on."""

    finished: bool
    step: int
    reason: str = ""
    saved: bool = True


class Trainer:
    """One life of one run on one rank. `fence`, `events` are rank 0's alone."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        packed: PackedImages,
        resolved: runtime.Resolved,
        *,
        fence: Fence | None,
        events: EventLog | None,
        owner: dict[str, Any],
    ) -> None:
        self.config, self.run, self.world, self.packed, self.resolved = config, run, world, packed, resolved
        self.fence, self.events, self.owner = fence, events, owner
        device = world.device
        self.accumulation = check_world_size(config, world.world_size)
        self.share = config.train.global_batch // world.world_size
        self.schedule = schedule.build(config.diffusion)
        self.diffusion = Diffusion(self.schedule).to(device)
        self.model = runtime.build_model(config, device, resolved.amp)
        self.ema = EMA(
            self.model,
            config.train.ema_decay,
            start_step=config.train.ema_start_step,
            every_steps=config.train.ema_every_steps,
            warmup=config.train.ema_warmup,
        )
        self.optimizer = optimizer.build(config, self.model.parameters())
        self.scaler = self._new_scaler()
        self.at = Progress()
        self.window = Window.empty(device)
        self._finite: runtime.Later | None = None  # of the last step, read one step late
        self._pending: runtime.Later | None = None
        self._latest: dict[str, Any] = {}
        self._beginning = "started"
        self.warm = False
        self._saved_at = time.monotonic()
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        network: Any = torch.compile(self.model) if resolved.compile else self.model
        if world.world_size > 1:
            network = DistributedDataParallel(
                network, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.network = network
        self.saver: checkpoint.Checkpointer | None = None
        self.telemetry: Telemetry | None = None

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.world.device.type, enabled=self.resolved.amp == "fp16")

    # ------------------------------------------------------------ resuming

    def resume(self) -> None:
        """Take up the newest good generation, as rank 0 finds it. Raises DoNotRetry where all are damaged."""
        failure, step, lived = None, None, 0
        if self.world.is_main:
            # a life may have been killed after a rollback and before its next save: its attempt counts all the same
            told = (e.get("attempt", 0) for e in read_events(self.run) if e["event"] == "rollback")
            lived = max(told, default=0)  # no sum: an orphan may have told of the same one
            try:
                found = checkpoint.newest_good(self.run, say)
                step = found.step if found else None
            except DoNotRetry as e:
                failure = str(e)
        failure, step, lived = self.world.share((failure, step, lived))
        if failure:
            raise DoNotRetry(failure)
        if step is None:
            if self.world.is_main:
                say("no checkpoint: starting at step 0")
        else:
            self._restore(checkpoint.load(self.run, step))
        self.at.rollbacks, self.at.attempt = max(self.at.rollbacks, lived), max(self.at.attempt, lived)
        self._open_outputs()
        self.batches = self._batches()
        self._beginning = "started" if step is None else "resumed"
        if self.world.is_main and step is not None:
            say("resumed", step=step, world_size=self.world.world_size)

    def _batches(self) -> Batches:
        return Batches(
            self.packed,
            seed=self.config.seed,
            attempt=self.at.attempt,
            flip=self.config.data.flip,
            global_batch=self.config.train.global_batch,
        )

    def _open_outputs(self) -> None:
        if self.fence is None:
            return
        if self.telemetry is not None:
            self.telemetry.close()
        self.telemetry = Telemetry(
            self.run,
            step=self.at.step,
            total_steps=self.config.train.total_steps,
            owner=self.owner,
            may_publish=self.fence.check,
        )
        if self.saver is None:
            self.saver = checkpoint.Checkpointer(
                self.run,
                self.fence,
                keep_last=self.config.checkpoint.keep_last,
                is_milestone=self._is_milestone,
                world_size=self.world.world_size,
                log=say,
                on_saved=self._saved,
            )

    def _saved(self, step: int) -> None:
        self._event("checkpoint", step)

    def _event(self, event: str, step: int, **fields: Any) -> None:
        if self.events:
            try:
                self.events.append(event, world_size=self.world.world_size, step=step, **fields)
            except OSError as e:  # a full disk ends no training
                say("event not written", event=event, step=step, error=e)

    def warm_up(self, stop_requested: StopRequested) -> None:
        """One forward and backward whose gradients are thrown away; not where a stop was asked for before.

        Here the network is compiled. And DDP regroups its buckets after its first backward, in the order in which
        gradients arrived; with more than two ranks the order of summation follows. Doing it before the first step
        gives every life the same one. To be called before each `train`, as a life may go on after a stop; once is
        enough, and all that is done.
        """
        wanted = not self.warm and (self.world.world_size > 1 or self.resolved.compile)
        if not wanted or self._at_the_end() or self._agreed_stop(stop_requested):
            return
        self._forward_backward(self.at.step, warm_up=True)
        self.optimizer.zero_grad(set_to_none=True)
        self.warm = True

    def _restore(self, state: dict[str, Any]) -> None:
        if state["config_digest"] != self.config.digest():
            raise DoNotRetry(
                f"the checkpoint of step {state['step']} belongs to other mathematics (config digest "
                f"{state['config_digest'][:12]}, now {self.config.digest()[:12]}): restore {self.run.config}"
            )
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            for key, value in moments.items():  # the fused kernels walk memory: moments must lie as their weights do
                if value.shape == parameter.shape:
                    moments[key] = torch.empty_like(parameter).copy_(value)
        self.scaler.load_state_dict(state["scaler"])
        extra = state["extra"]
        self.at = Progress(state["step"], extra["attempt"], extra["rollbacks"], extra.get("early_stop_losses", []))
        self.window = Window.restored(extra["window"], self.world)
        self.skipped.fill_(extra["skipped_steps"])
        self._finite = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: plain tensors and numbers, loadable with weights_only=True.

        Called on all ranks.
        """
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.at.step,
            "images": self.at.step * self.config.train.global_batch,
            "config_digest": self.config.digest(),
            "extra": {
                "attempt": self.at.attempt,
                "rollbacks": self.at.rollbacks,
                "skipped_steps": int(self.skipped),
                "early_stop_losses": self.at.early_stop_losses,
                "early_stopped": self._settled(),
                "window": self.window.state_dict(self.world),
            },
        }

    # ------------------------------------------------------------ one step

    def _forward_backward(self, step: int, *, warm_up: bool = False) -> torch.Tensor:
        """Gradients of step `step`'s mean loss over the global batch; returns this rank's loss, a float32 scalar."""
        config, device, at = self.config, self.world.device, self.at
        torch.manual_seed(rng.derive_seed(config.seed, "dropout", at.attempt, step, self.world.rank))
        t_key = rng.key(config.seed, "t", at.attempt)
        eps_key = rng.key(config.seed, "eps", at.attempt)
        label_key = rng.key(config.seed, "label", at.attempt)
        micro = self.share // self.accumulation
        total = torch.zeros((), device=device)
        for i in range(self.accumulation):
            first = self.world.rank * self.share + i * micro
            x_0, labels = self.batches.rows(step, first, micro, device)
            index = torch.arange(first, first + micro, device=device)
            t = rng.uniform_int(t_key, index, step, config.diffusion.timesteps)
            eps = rng.normal(eps_key, index, step, tuple(x_0.shape[1:]))
            x_t = self.diffusion.q_sample(x_0, t, eps)
            if config.train.label_dropout:
                without = rng.bernoulli(label_key, index, step, config.train.label_dropout)
                labels = torch.where(without, config.model.num_classes, labels)
            last = i == self.accumulation - 1 or warm_up
            with self.network.no_sync() if self.world.world_size > 1 and not last else runtime.nullcontext():
                with runtime.autocast(self.resolved.amp, device):
                    eps_pred = self.network(x_t, t, labels if config.model.num_classes else None)
                loss = self.diffusion.loss(eps_pred.float(), eps, config.diffusion.loss).mean() / self.accumulation
                self.scaler.scale(loss).backward()
            total += loss.detach()
            if warm_up:
                break
        return total

    def _step(self) -> None:
        """Algorithm 1 once. A non-finite gradient never reaches the weights: the update is masked on the device."""
        config, step = self.config, self.at.step
        loss = self._forward_backward(step)
        self.scaler.unscale_(self.optimizer)
        clip = config.train.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # masks and counts an overflow by itself
            self.scaler.update()
            self.skipped += ~torch.isfinite(norm)
            finite = torch.isfinite(loss)
        else:
            finite = torch.isfinite(loss) & torch.isfinite(norm)
            # the fused kernels take the mask that GradScaler would give them
            self.optimizer.grad_scale, self.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model, step + 1)
        self.window.loss += loss
        self.window.grad_norm += torch.where(torch.isfinite(norm), norm, 0)
        self.window.steps += 1
        self.at.step += 1
        self._pending, self._finite = self._finite, runtime.Later(finite)

    def _bad(self, finite: runtime.Later | None) -> int:
        return int(finite is not None and not finite)

    # ------------------------------------------------------------ the loop

    def train(self, stop_requested: StopRequested) -> Outcome:
        """Steps until the end or an agreed stop; both leave a verified checkpoint.

        Raises DoNotRetry (rollbacks used up, damaged checkpoints), RunBusy (fenced out). A stop whose save failed is
        reported as `saved=False`.
        """
        total = self.config.train.total_steps
        if not self._at_the_end() and (reason := self._agreed_stop(stop_requested)):
            return self._stop(reason)  # asked for while starting up
        self._event(self._beginning, self.at.step)
        self._beginning = "resumed"
        # of the last life's last step, where a stop came before it was drawn
        if self._grid_due() and (reason := self._grid(stop_requested)):
            return self._stop(reason)
        self._mark_time()
        while not self._at_the_end():
            self._step()
            # device values are read one step late, so that a GPU never waits for this; at the end there is no later
            bad = self._bad(self._pending) or (self._bad(self._finite) if self.at.step == total else 0)
            code, bad, save_due = self.world.agree([self._reason_code(stop_requested), bad, self._save_due()])
            log_due = self.at.step % self.config.log.every_steps == 0
            if (code or save_due or log_due or self._grid_due()) and not bad:
                bad = self.world.agree([self._bad(self._finite)])[0]  # nothing is kept of a step not known to be good
            if bad:
                self._roll_back()
                continue
            if log_due:
                self._log()
                if self._settled() is not None:
                    break
            self.alive()
            if code and self.at.step < total:  # the last step is followed by its save in any case
                return self._stop(STOP_REASONS[code])
            if save_due:
                self._save()
            if self._grid_due() and (reason := self._grid(stop_requested)):
                return self._stop(reason)
        return self._finish(stop_requested)

    def _at_the_end(self) -> bool:
        return self.at.step >= self.config.train.total_steps or self._settled() is not None

    def _agreed_stop(self, stop_requested: StopRequested) -> str:
        """Why all ranks stop here, or ""."""
        return STOP_REASONS[self.world.agree([self._reason_code(stop_requested)])[0]]

    @staticmethod
    def _reason_code(stop_requested: StopRequested) -> int:
        reason = stop_requested()
        return STOP_REASONS.index(reason) if reason else 0

    def alive(self) -> None:
        """A sign of life for the status view, where steps give none."""
        if self.telemetry:
            self.telemetry.heartbeat(self.at.step, self._latest)

    def _settled(self) -> float | None:
        """By how much the last logged losses changed where that is so little that training ends early, else None.

        The same on every rank.
        """
        train, losses = self.config.train, self.at.early_stop_losses
        if train.early_stop_below is None or len(losses) < train.early_stop_window:
            return None
        changes = [abs(b - a) for a, b in pairwise(losses)]
        mean = sum(changes) / len(changes)
        return mean if mean < train.early_stop_below else None

    def _log(self) -> None:
        """The window's means over all ranks, as one metrics record."""
        sums = self.world.mean(torch.stack([self.window.loss, self.window.grad_norm])) / max(1, self.window.steps)
        loss, grad_norm = sums.tolist()
        seconds = time.monotonic() - self._window_began
        step, batch, device = self.at.step, self.config.train.global_batch, self.world.device
        self._latest = {
            "step": step,
            "images": step * batch,
            "epoch": step * batch / len(self.packed),
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(self.config, step - 1),
            "images_per_s": (step - self._window_first) * batch / max(seconds, 1e-9),
            "gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        }
        self.window = Window.empty(device)
        self.at.early_stop_losses = [*self.at.early_stop_losses, loss][-self.config.train.early_stop_window :]
        self._mark_time()
        if self.telemetry:
            self.telemetry.log(self._latest)

    def _mark_time(self) -> None:
        self._window_began, self._window_first = time.monotonic(), self.at.step

    # ------------------------------------------------------------ saving, stopping, rolling back

    def _is_milestone(self, step: int) -> bool:
        c, n = self.config.checkpoint, len(self.packed)
        if step and c.milestone_every_steps and step % c.milestone_every_steps == 0:
            return True
        if step and c.milestone_every_epochs:  # the first step that has seen a whole number of such epochs
            images = c.milestone_every_epochs * n
            batch = self.config.train.global_batch
            return (step * batch) // images > ((step - 1) * batch) // images
        return False

    def _save_due(self) -> int:
        c, step = self.config.checkpoint, self.at.step
        if step >= self.config.train.total_steps:
            return 0  # the end saves by itself
        by_steps = c.every_steps is not None and step % c.every_steps == 0
        by_time = c.every_min is not None and time.monotonic() - self._saved_at >= c.every_min * 60
        return int(by_steps or self._is_milestone(step) or (by_time and self.world.is_main))

    def _save(self, *, wait: bool = False, final: bool = False) -> bool:
        """On all ranks; rank 0 starts a save and with `wait` sees it through. False: it is known to have failed."""
        self._saved_at = time.monotonic()
        state = self.state()
        if self.saver is None or self.telemetry is None:
            return True
        try:
            self.telemetry.sync()
            self.saver.save(state, wait=wait, final=final)
        except OSError as e:
            say("checkpoint failed", step=self.at.step, error=e)
            return False
        return True

    def _stop(self, reason: str) -> Outcome:
        self._event("stop_requested", self.at.step, reason=reason)
        saved = self.world.share(self._save(wait=True))
        if self.telemetry:
            self.telemetry.heartbeat(self.at.step, self._latest, force=True)
            say("stopped", reason=reason, step=self.at.step, saved=saved)
        return Outcome(False, self.at.step, reason, saved)

    def _finish(self, stop_requested: StopRequested) -> Outcome:
        if self.window.steps:
            self._log()
        self._grid(stop_requested)
        if self.telemetry and (change := self._settled()) is not None:
            below, window = self.config.train.early_stop_below, self.config.train.early_stop_window
            told = {"mean_change": f"{change:.3g}", "early_stop_below": below, "over_lines": window}
            say("the loss has settled: ending early", step=self.at.step, **told)
        saved = self.world.share(self._save(wait=True, final=True))  # the last manifest says that all is there
        if self.telemetry:
            self.telemetry.heartbeat(self.at.step, self._latest, force=True)
            self.telemetry.close()
        if saved:
            self._event("finished", self.at.step)
        return Outcome(True, self.at.step, saved=saved)

    def _roll_back(self) -> None:
        """Back to the last good generation under a new attempt number, so that the same poison is not drawn again."""
        at, most = self.at.step, self.config.train.max_rollbacks
        rollbacks, attempt = self.at.rollbacks + 1, self.at.attempt + 1
        if self.saver is not None:
            self.saver.wait(raising=False)
        self.world.barrier()
        if self.world.is_main:
            say("non-finite loss or gradient", near_step=at, rollback=f"{rollbacks}/{most}")
        if rollbacks > most:
            raise DoNotRetry(
                f"the loss was non-finite {rollbacks} times (last near step {at}), more than "
                f"train.max_rollbacks = {most}; the last good checkpoint stays. Lower train.lr, set "
                f"train.grad_clip, or use train.amp=off in a new run"
            )
        self._event("rollback", at, attempt=attempt)
        found = self.world.share(
            (g.step if (g := checkpoint.newest_good(self.run, say)) else None) if self.world.is_main else None
        )
        if found is None:
            self._start_over()
        else:
            self._restore(checkpoint.load(self.run, found))
        self.at.rollbacks, self.at.attempt = rollbacks, attempt
        self._open_outputs()
        self.batches = self._batches()
        self._mark_time()

    def _start_over(self) -> None:
        fresh = runtime.build_model(self.config, self.world.device, self.resolved.amp)
        self.model.load_state_dict(fresh.state_dict())
        self.ema.load_state_dict(fresh.state_dict())
        self.optimizer.state.clear()
        self.scaler = self._new_scaler()
        self.skipped.zero_()
        self.at, self.window, self._finite = Progress(), Window.empty(self.world.device), None

    # ------------------------------------------------------------ grids

    def _grid_due(self) -> bool:
        every = self.config.log.grid_every_steps
        return every is not None and self.at.step % every == 0 and 0 < self.at.step < self.config.train.total_steps

    def _grid_is_drawn(self) -> bool:
        """Whether the step's PNG is of these weights; after a rollback it may be of weights that were given up."""
        drawn = self.run.grid(self.at.step)
        try:
            return drawn.exists() and (self.at.attempt == 0 or _mtime(drawn) >= _mtime(self.run.manifest(self.at.step)))
        except FileNotFoundError:
            return False

    def _grid(self, stop_requested: StopRequested) -> str:
        """Rank 0 draws log.grid_images samples by the weights of `sample.weights`, from the same noise each time.

        All ranks agree at each step of the sampler on whether to go on: a stop may be asked of any of them, and none
        waits for another for as long as a grid takes. Returns why it is left undrawn, or "".
        """
        if self.world.share(self.world.is_main and self._grid_is_drawn()):
            if self.telemetry is not None:
                self.telemetry.grid_again(self.at.step)
            return ""
        model = self.model if self.config.sample.weights == "model" else self.ema.model
        model.eval()

        def poll() -> str | None:
            return self._agreed_stop(stop_requested) or None

        try:
            if self.telemetry is None:
                grids.wait(self.config, poll)
            else:
                self.telemetry.grid(
                    self.at.step, grids.draw(self.config, model, self.schedule, self.resolved.amp, poll)
                )
        except Stopped as e:
            if self.telemetry is not None:
                say("grid not drawn: a stop was requested", step=self.at.step)
            return e.reason
        finally:
            self.model.train()
        return ""
