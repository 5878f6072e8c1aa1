"""One step of training: Ho et al. 2020, Algorithm 1, and nothing else.

Everything random follows from (seed, attempt, step) and the index in the global batch, so a life that resumes at step k
computes the same steps k, k+1, … as one that never died, on any number of ranks.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ddpm.config.schema import Config, check_world_size
from ddpm.config.train import divisors
from ddpm.data.batches import Batches, Parts, Ring, sent
from ddpm.data.whole import PackedImages, Watch
from ddpm.diffusion import rng, schedule
from ddpm.diffusion.forward import Diffusion
from ddpm.network.device import Later, Resolved, autocast
from ddpm.network.prepared import Prepared
from ddpm.training.optimizer import learning_rate
from ddpm.training.ranks import World
from ddpm.training.replay import Exchange, Moved, Replay
from ddpm.training.state import TrainingState
from ddpm.training.update import Update, is_adam, serves

LEFT_SHARE = 16
"""Of a GPU's memory this part is left where it is tried out how many images fit."""
MOST_SKIPPED = 100
"""After so many overflows of fp16 gradients in a row, each at half the loss scale before, the scale is not the
cause."""


@dataclass(frozen=True)
class Given:
    """What a step is computed from, beside the state. On a GPU all of it is on the device."""

    step: rng.Step
    lr: float | torch.Tensor
    parts: Parts
    share: torch.Tensor | None = None
    """By how much of its way to the weights their average moves; None on a CPU, where EMA.update knows it."""


class Step:
    """Advances `state` by one step at a time, on this rank's share of the global batch."""

    def __init__(
        self, config: Config, world: World, packed: PackedImages, resolved: Resolved, state: TrainingState
    ) -> None:
        self.config, self.world, self.packed, self.resolved, self.state = config, world, packed, resolved, state
        self.share = config.train.global_batch // world.world_size
        self.micro = self.share // check_world_size(config, world.world_size)
        if resolved.micro_batch is not None:  # found at another number of ranks, perhaps
            self.micro = max(d for d in divisors(self.share) if d <= resolved.micro_batch)
        self.diffusion = Diffusion(schedule.build(config.diffusion)).to(world.device)
        self.gpu = world.device.type == "cuda"
        self.network, self.exchange = self._network()
        self.watch = Watch(packed)
        self.begin_attempt()

    def _network(self) -> tuple[Any, Exchange | None]:
        state, world = self.state, self.world
        if self.resolved.compile:
            network: Any = torch.compile(state.model)
        else:
            network = Prepared(state.model, self.resolved.amp) if self.gpu else state.model
        if world.world_size == 1:
            return network, None
        if self.gpu:  # what is replayed cannot hold DDP's hooks
            exchange = Exchange(state.model.parameters(), world)
            exchange()  # connects the ranks, which takes memory: before it is tried out how many images fit
            return network, exchange
        return DistributedDataParallel(network, gradient_as_bucket_view=True), None

    def begin_attempt(self) -> None:
        """Use the random streams of the state's attempt from here on: called when a life resumes, and after a
        rollback."""
        config, attempt = self.config, self.state.at.attempt
        batch, flip = config.train.global_batch, config.data.flip
        self.batches = Batches(self.packed, seed=config.seed, attempt=attempt, global_batch=batch, flip=flip)
        self.ring = Ring()
        self._skipped_in_a_row = torch.zeros((), dtype=torch.int64, device=self.world.device)
        self._replay: Replay | None = None
        self._own: Update | None = None  # made when first used: an earlier life's compiled kernels are in place then
        self._taken = 0

    def _parts(self) -> Parts:
        """On the host: the images of the state's step and, for a GPU, its number, its learning rate and the average's
        share, in pinned memory."""
        step, device = self.state.at.step, self.world.device
        parts = self.batches.parts(step, self.world.rank * self.share, self.share, device)
        if not self.gpu:
            return parts
        decay = self.state.ema.decay_at(step + 1)
        share = 0.0 if decay is None else 1.0 - decay
        bits = struct.unpack("<2q", struct.pack("<2d", learning_rate(self.config, step), share))
        return self.ring.pinned((*parts, torch.tensor([step, *bits])))

    def given(self) -> Given:
        """The inputs of the state's next step."""
        parts = self._parts()
        if not self.gpu:
            return Given(self.state.at.step, learning_rate(self.config, self.state.at.step), parts)
        on_device = sent(parts, self.world.device)
        self.ring.used()
        return self.unpacked(on_device)

    @staticmethod
    def unpacked(parts: Parts) -> Given:
        """`Given` from the tensors of `_parts`, once they are on the GPU."""
        *images, numbers = parts
        lr, share = numbers[1:].view(torch.float64).float()
        return Given(numbers[0], lr, tuple(images), share)

    def gradients(self, given: Given, *, warm_up: bool = False) -> torch.Tensor:
        """Compute gradients of the mean loss over the global batch; returns this rank's loss, float32 ().

        warm_up: use only the first micro-batch, but exchange gradients between ranks as always.
        """
        at, accumulation = self.state.at, self.share // self.micro
        if self.resolved.dropout == "torch":
            torch.manual_seed(rng.derive_seed(self.config.seed, "dropout", at.attempt, at.step, self.world.rank))
        total = None
        for i in range(1 if warm_up else accumulation):
            last = i == accumulation - 1 or warm_up
            apart = isinstance(self.network, DistributedDataParallel) and not last
            with self.network.no_sync() if apart else nullcontext():
                loss = self._loss(self.network, given, i * self.micro, self.micro)
                loss = loss if accumulation == 1 else loss / accumulation
                self.state.scaler.scale(loss).backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self.exchange is not None:
            self.exchange.gather()
        assert total is not None
        return total

    def try_out(self, num: int) -> None:
        """Forward and backward of `num` images on this rank alone, not compiled, with the optimizer's moments
        allocated, and what is left for a recording's own and for what is computed beside the steps.

        Raises RuntimeError if they do not fit. Leaves no gradient behind.
        """
        weights = () if self.state.optimizer.state else self.state.model.parameters()
        room = [torch.empty_like(p) for p in weights for _ in range(2)]
        if self.gpu:
            left = torch.cuda.mem_get_info(self.world.device)[1] // LEFT_SHARE
            room.append(torch.empty(left, dtype=torch.uint8, device=self.world.device))
        try:
            with self.gradients_alone(num):
                pass
        finally:
            del room

    @contextmanager
    def gradients_alone(self, num: int) -> Iterator[None]:
        """Within: the parameters have the scaled gradients of the first `num` images of this rank's next step, computed
        by this rank alone and not compiled. Afterwards they have none."""
        state = self.state
        try:
            state.scaler.scale(self._loss(state.model, self.given(), 0, num)).backward()
            yield
        finally:
            state.optimizer.zero_grad(set_to_none=True)

    def _loss(self, network: Any, given: Given, first: int, num: int) -> torch.Tensor:
        """The mean loss of images first … first+num-1 of this rank's share (equation 14)."""
        config, device, attempt = self.config, self.world.device, self.state.at.attempt
        begin = self.world.rank * self.share + first
        index = torch.arange(begin, begin + num, device=device)
        x_0, labels = self.batches.images(tuple(p[first : first + num] for p in given.parts), given.step, index)
        t = rng.uniform_int(rng.key(config.seed, "t", attempt), index, given.step, config.diffusion.timesteps)
        eps = rng.normal(rng.key(config.seed, "eps", attempt), index, given.step, tuple(x_0.shape[1:]))
        if config.train.label_dropout:
            key = rng.key(config.seed, "label", attempt)
            without = rng.bernoulli(key, index, given.step, config.train.label_dropout)
            labels = torch.where(without, config.model.num_classes, labels)
        places = None
        if config.model.dropout and self.resolved.dropout == "counted":
            places = rng.places(rng.key(config.seed, "dropout", attempt), index, given.step)

        def eps_model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with autocast(self.resolved.amp, device):
                eps_pred: torch.Tensor = network(x_t, t, labels if config.model.num_classes else None, places)
            return eps_pred

        return self.diffusion.losses(eps_model, x_0, t, eps, config.diffusion.loss).mean()

    def take(self) -> Later:
        """Take one step of Algorithm 1. Returns whether loss and gradient were finite, to be read one step later, so
        that nothing waits for the device.

        On a GPU the second step of an attempt is recorded, and it and all later ones are replayed: hundreds of kernels
        are launched at once.
        """
        state = self.state
        if self._taken == 1 and self.replays:
            self._replay = Replay.of(self, self._parts())
        if self._replay is not None:
            _, _, finite = self._replay(self._parts())
            self.ring.used()
        else:
            _, _, finite = self.compute(self.given())
        if self.own is None:
            state.ema.update(state.model, state.at.step + 1)
        state.window.steps += 1
        state.at.step += 1
        self._taken += 1
        return Later(finite)

    @property
    def _masks(self) -> bool:
        """Whether the optimizer is one of torch's fused ones: only these leave the weights alone where a gradient is
        not finite, and count their steps on the device, as what is replayed must."""
        return bool(self.state.optimizer.defaults.get("fused"))

    @property
    def replays(self) -> bool:
        """Whether steps here can be replayed. Not those of several ranks on AMD's GPUs, where the watchdog of their
        library ends another thread's recording, or the process (https://github.com/pytorch/pytorch/pull/176251)."""
        of_amd = torch.version.hip is not None
        here = self.gpu and not (of_amd and self.world.world_size > 1)
        return here and self.resolved.dropout == "counted" and self._masks

    def compute(self, given: Given) -> Moved:
        """A whole step: gradients, their exchange, and the update."""
        if self._takes_narrow:
            with self.network.narrow_gradients() as narrow:
                return self.move(given, self.gradients(given), narrow)
        loss = self.gradients(given)
        if self.exchange is not None:
            self.exchange()
        return self.move(given, loss)

    @property
    def _takes_narrow(self) -> bool:
        """Whether gradients are used as they are computed, in sixteen bits: where nothing is added to them."""
        alone = self.exchange is None and self.micro == self.share and not self.state.scaler.is_enabled()
        return alone and self.own is not None and self.own.adam and isinstance(self.network, Prepared)

    def move(
        self, given: Given, loss: torch.Tensor, narrow: Mapping[torch.nn.Parameter, torch.Tensor] | None = None
    ) -> Moved:
        """The second half of a step, once all ranks' gradients are there: clip, update, clear.

        narrow: gradients that are not the parameters' own .grad.
        """
        state = self.state
        if self.exchange is not None:
            self.exchange.scatter()
        if self.own is not None and self.own.adam:
            assert isinstance(given.lr, torch.Tensor) and given.share is not None
            norm, finite = self.own(loss, given.lr, given.share, state.window, narrow or {})
        else:
            state.scaler.unscale_(state.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), self._max_norm)
            for group in state.optimizer.param_groups:
                group["lr"] = given.lr if self._masks else learning_rate(self.config, state.at.step)
            finite = self._update(loss, norm)
            if self.own is not None:
                assert given.share is not None
                self.own.average(given.share)
            state.window.add(loss, norm)
        state.optimizer.zero_grad(set_to_none=True)
        return loss, norm, finite

    @property
    def own(self) -> Update | None:
        """What updates here by kernels of this project, where layers have some too: not on a CPU."""
        state = self.state
        if self._own is None and self._all_have_own:
            adam = not state.scaler.is_enabled() and is_adam(state.optimizer, state.model)  # else a scaler decides
            self._own = Update(state.model, state.ema.model, state.optimizer, adam=adam, max_norm=self._max_norm)
        return self._own

    @cached_property
    def _all_have_own(self) -> bool:
        """Whether they serve on all ranks, whose weights would come apart if some took torch's. Called on all ranks."""
        if not self.gpu:
            return False
        serve = self.resolved.kernels == "own" and serves(self.world.device)
        return not self.world.agree([int(not serve)])[0]

    @property
    def _max_norm(self) -> float:
        return self.config.train.grad_clip or math.inf

    def recorded(self) -> None:
        """Called between the recording of a step and its first replay."""
        if self._own is not None:
            self._own.tell()

    def warm_up(self) -> None:
        """Compute gradients of a micro-batch, which are thrown away: all that a step needs is compiled then."""
        self.gradients(self.given(), warm_up=True)
        if self.own is not None:
            self.own.compile()
        self.state.optimizer.zero_grad(set_to_none=True)

    def _update(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Update the weights; if the gradient is not finite the update is masked on the device. Returns bool ():
        whether training is sound."""
        state = self.state
        if state.scaler.is_enabled():
            state.scaler.step(state.optimizer)  # masks and counts an overflow by itself
            state.scaler.update()
            overflow = ~torch.isfinite(norm)
            state.skipped += overflow
            self._skipped_in_a_row.add_(1).mul_(overflow)
            return torch.isfinite(loss) & (self._skipped_in_a_row < MOST_SKIPPED)
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        # the fused kernels take the mask that GradScaler would give them
        state.optimizer.grad_scale, state.optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        state.optimizer.step()
        return finite
