"""The loss on images that training never sees: the same images at the same timesteps and noise each time.

So it changes with the weights alone, and can be compared between steps, lives and runs. Must not know: when it is due,
and into which line of metrics it goes.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ddpm.config.schema import Config
from ddpm.data.packed import PackedImages
from ddpm.data.whole import Watch
from ddpm.diffusion import rng
from ddpm.diffusion.forward import Diffusion
from ddpm.errors import lacks_gpu_memory
from ddpm.run.stopping import StopRequested
from ddpm.sampling.denoiser import LabelledEpsModel, eps_of
from ddpm.training import fitting
from ddpm.training.chronicle import Chronicle
from ddpm.training.state import TrainingState

NUM_IMAGES = 1024
"""Number of images that are used, or all of a smaller split: their loss costs about as much as five steps of 128."""
BATCH = 64
"""Images per network call, the last call padded: a network's output for an image may depend on the batch size."""
SEED = 0
"""Not the run's seed, so that runs with different seeds are compared at the same noise."""


class HeldOut:
    """packed: the test split. The images used are spread evenly over it, since folders are listed by class; for a model
    with classes only images with a label are used."""

    def __init__(self, config: Config, packed: PackedImages, diffusion: Diffusion) -> None:
        self._config, self._packed, self._diffusion = config, packed, diffusion
        self._watch, self._overwritten = Watch(packed), False
        usable = np.flatnonzero(packed.labels >= 0) if config.model.num_classes else np.arange(len(packed))
        self._num = min(NUM_IMAGES, len(usable))
        self._chosen = usable[np.arange(self._num) * len(usable) // max(1, self._num)]

    def validate(
        self, state: TrainingState, chronicle: Chronicle, stop_requested: StopRequested
    ) -> tuple[float | None, str]:
        """`loss`, where it can be had: (None, "") if it does not fit beside the steps, and from then on if the images
        were overwritten. The chronicle is told of either."""
        if self._overwritten:
            return None, ""
        loss, reason, lacked = None, "", ""
        try:
            loss, reason = self.loss(state, stop_requested)
        except torch.OutOfMemoryError as e:
            lacked = str(e)
        if lacked:
            chronicle.say("no validation: it does not fit beside the steps", step=state.at.step, error=lacked)
            fitting.free(state.world.device)
        damage = "" if loss is None else self._watch.damage()
        if state.world.agree([int(bool(damage))])[0]:
            why = damage or "what another rank reads was overwritten while it was mapped"
            chronicle.say(f"no validation from here on in this life: {why}", step=state.at.step)
            self._overwritten, loss = True, None
        return loss, reason

    def loss(self, state: TrainingState, stop_requested: StopRequested) -> tuple[float | None, str]:
        """(mean loss, "") with the weights of `sample.weights`, in eval mode; called on all ranks, which share the
        work.

        It has the same bits on any number of ranks with the same kind of hardware. (None, reason) if the ranks agree to
        stop before it is known; (None, "") if no image can be used. Raises torch.OutOfMemoryError on all ranks if a
        batch does not fit on one of them.
        """
        world, config = state.world, self._config
        model = state.model if config.sample.weights == "model" else state.ema.model
        batches = -(-self._num // BATCH)
        losses, lacked = torch.zeros(batches * BATCH, device=world.device), ""
        model.eval()
        try:
            for first in range(0, batches, world.world_size):
                if reason := world.agreed_stop(stop_requested):
                    return None, reason
                if (batch := first + world.rank) < batches and not lacked:
                    try:
                        losses[batch * BATCH :][:BATCH] = self._of(batch, eps_of(model, state.amp), world.device)
                    except RuntimeError as e:
                        if not lacks_gpu_memory(e):
                            raise
                        lacked = str(e).partition("\n")[0] or "here"
        finally:
            state.model.train()
        if world.agree([int(bool(lacked))])[0]:
            raise torch.OutOfMemoryError(lacked or "on another rank")
        found = world.sum(losses)[: self._num].tolist()
        return (math.fsum(found) / self._num if found else None), ""

    def _of(self, batch: int, eps_pred: LabelledEpsModel, device: torch.device) -> torch.Tensor:
        """The losses of one batch, float32 (BATCH,)."""
        index = torch.arange(batch * BATCH, (batch + 1) * BATCH).clamp(max=self._num - 1)
        ids = self._chosen[index.numpy()]
        x_0 = torch.from_numpy(self._packed.images[ids]).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
        labels = torch.from_numpy(self._packed.labels[ids]).to(device) if self._config.model.num_classes else None
        index = index.to(device)
        t = rng.uniform_int(rng.key(SEED, "validation_t"), index, 0, self._config.diffusion.timesteps)
        eps = rng.normal(rng.key(SEED, "validation_eps"), index, 0, tuple(x_0.shape[1:]))
        kind = self._config.diffusion.loss
        return self._diffusion.losses(lambda x_t, t: eps_pred(x_t, t, labels), x_0, t, eps, kind)
