"""On a GPU too, how many images are computed at a time changes no mask of dropout: losses and gradients agree to
rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm.network.unet import UNet
from ddpm.training.trainer import Trainer
from tests.training import assert_micro_batches_agree


@pytest.mark.parametrize(("amp", "loss_to", "gradients_to"), [("off", 1e-5, 1e-4), ("bf16", 2e-3, 0.02)])
def test_masks_are_the_same_at_every_micro_batch(
    device: torch.device, tmp_path: Path, amp: str, loss_to: float, gradients_to: float
) -> None:
    """By this project's kernels.

    In fp32, without TF32, what differs is the order of sums and the algorithm of a convolution: 2e-7 on a CPU, and up
    to 1e-5 where cuDNN takes Winograd's. In bf16 each part's gradient is rounded to 8 bits before they are added, by up
    to 2**-9 = 0.002, which is what a CPU shows; ten times that leaves room for activations that round the other way.
    The masks themselves make more than a half of the gradient.
    """

    def in_whole_floats_by_own_kernels(trainer: Trainer) -> None:
        assert isinstance(trainer.state.model, UNet) and trainer.state.model.own_kernels
        torch.backends.cudnn.allow_tf32 = False  # until the next trainer says otherwise
        torch.set_float32_matmul_precision("highest")

    assert_micro_batches_agree(tmp_path, device, amp, loss_to, gradients_to, in_whole_floats_by_own_kernels)
