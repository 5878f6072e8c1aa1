"""What is to be done after a step: pure functions of the config, the size of the data, the step and the time."""

from __future__ import annotations

from dataclasses import dataclass

from ddpm.config.schema import Config


@dataclass(frozen=True)
class Due:
    """Whether something is due after a step. num_images: of the dataset, by which epochs are counted."""

    config: Config
    num_images: int

    def log(self, step: int) -> bool:
        return step % self.config.log.every_steps == 0

    def grid(self, step: int) -> bool:
        """Whether to draw a grid; not at the last step, where one is always drawn."""
        every = self.config.log.grid_every_steps
        return every is not None and step % every == 0 and 0 < step < self.config.train.total_steps

    def validate(self, step: int) -> bool:
        """Whether a logged line includes the loss on held-out images; always at the last step."""
        every = self.config.log.validate_every_steps
        return every is not None and step > 0 and (step % every == 0 or step >= self.config.train.total_steps)

    def histogram(self, step: int) -> bool:
        """Whether to show histograms of the gradients; not at the last step, after which there are none."""
        every = self.config.log.histogram_every_steps
        return every is not None and step % every == 0 and 0 < step < self.config.train.total_steps

    def milestone(self, step: int) -> bool:
        """Whether the generation of `step` is kept for good."""
        c = self.config.checkpoint
        if step and c.milestone_every_steps and step % c.milestone_every_steps == 0:
            return True
        if step and c.milestone_every_epochs:  # the first step that has seen a whole number of such epochs
            images = c.milestone_every_epochs * self.num_images
            batch = self.config.train.global_batch
            return (step * batch) // images > ((step - 1) * batch) // images
        return False

    def save(self, step: int, since_save_s: float) -> bool:
        """Whether to save. since_save_s: seconds since the last save, by rank 0's clock."""
        c = self.config.checkpoint
        if step >= self.config.train.total_steps:
            return False  # at its end training saves in any case
        by_steps = c.every_steps is not None and step % c.every_steps == 0
        by_time = c.every_min is not None and since_save_s >= c.every_min * 60
        return by_steps or self.milestone(step) or by_time
