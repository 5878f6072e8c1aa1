"""ddpm/training/board.py: what TensorBoard's page of hyperparameters reads."""

from __future__ import annotations

from ddpm.config.data import Data
from ddpm.config.schema import Config
from ddpm.training.board import hparams, scalars


def test_hparams_are_what_decides_what_is_trained_in_words_that_a_table_shows_as_they_are() -> None:
    found = hparams(Config(name="x", seed=3, data=Data(flip=False, attributes={})))
    assert found["seed"] == 3 and found["train.lr"] == 2e-4 and found["model.channel_mults"] == "[1, 2, 2, 2]"
    assert found["data.flip"] == "false" and found["data.name"] == "cifar10"
    assert not {"data.attributes", "data.path", "train.total_epochs"} & found.keys()  # empty, or not given
    assert not [key for key in found if key.startswith(("log.", "checkpoint.", "sample.", "evaluate."))]


def test_a_figure_that_is_added_to_a_line_of_metrics_is_shown_by_its_name() -> None:
    line = {"step": 3, "images": 96, "epoch": 0.1, "time": "2026-11-28T12:00:00.000Z", "loss": 0.5, "mfu": None}
    assert scalars(line | {"weight_norm": 2.0}) == {"train/loss": 0.5, "train/weight_norm": 2.0}
