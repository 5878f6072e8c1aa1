"""ddpm/training/proof.py: which checkpoint without a manifest proves to be the run's own, and which does not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ddpm.errors import RunBusy
from ddpm.run import generations
from ddpm.run.events import EventLog
from ddpm.run.fence import Fence
from ddpm.run.files import DamagedFile, sha256_file
from ddpm.run.paths import RunDir
from ddpm.training.proof import rebuild_manifest
from ddpm.training.state import TrainingState
from tests.saves import flip_bit
from tests.training import ALONE, make_config

CONFIG, STEP = make_config(), 5


def saved(run: RunDir, change: Callable[[dict[str, Any]], Any] = lambda state: None) -> None:
    """A checkpoint of step 5 after one update, changed before it is written."""
    training = TrainingState(CONFIG, ALONE, "off")
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()
    training.at.step = STEP
    state = training.state_dict()
    instead = change(state)
    run.checkpoints.mkdir()
    torch.save(instead if isinstance(instead, list) else state, run.checkpoint(STEP))


def rebuild(run: RunDir, fence: Fence) -> list[str]:
    said: list[str] = []
    rebuild_manifest(run, STEP, CONFIG, fence, said.append)
    return said


def weight(state: dict[str, Any], part: str) -> torch.Tensor:
    return next(iter(state[part].values()))


def of_another_shape(state: dict[str, Any], part: str) -> None:
    name = next(iter(state[part]))
    state[part][name] = state[part][name][..., :1]


def moments(state: dict[str, Any]) -> dict[int, dict[str, torch.Tensor]]:
    return state["optimizer"]["state"]  # type: ignore[no-any-return]


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "of another step": (lambda s: s.update(step=6), "holds step 6 after 20 images"),
    "of another batch": (lambda s: s.update(images=21), "holds step 5 after 21 images"),
    "of another config": (lambda s: s.update(config_digest="ab" * 32), "belongs to other mathematics"),
    "another network": (lambda s: of_another_shape(s, "model"), "its model is not of the config's shapes"),
    "another network's average": (lambda s: of_another_shape(s, "ema"), "its ema is not of the config's shapes"),
    "one weight that is no number": (lambda s: weight(s, "model").view(-1)[0].fill_(torch.nan), "model is not finite"),
    "an infinite average": (lambda s: weight(s, "ema").view(-1)[0].fill_(torch.inf), "its ema is not finite"),
    "too few moments": (lambda s: moments(s).pop(3), "its optimizer is not of the config's shapes"),
    "another's moments": (lambda s: moments(s)[0].update(exp_avg=torch.zeros(7)), "its optimizer is not of"),
    "moments of more": (lambda s: moments(s).update({10_000: moments(s).pop(0)}), "its optimizer is not of"),
    "half of what is small": (lambda s: s["extra"].pop("attempt"), "its extra is not whole"),
    "nothing small": (lambda s: s.pop("extra"), "is no state of training .KeyError"),
    "a list": (lambda s: [s], "is no state of training .TypeError"),
    "no average": (lambda s: s.update(ema=3), "is no state of training .AttributeError"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_is_not_the_runs_gets_no_manifest(run: RunDir, fence: Fence, what: str) -> None:
    change, why = WRONG[what]
    saved(run, change)
    with pytest.raises(DamagedFile, match=why):
        rebuild(run, fence)
    assert not run.manifest(STEP).exists()


@pytest.mark.parametrize("harm", ["cut", "flipped"])
def test_a_checkpoint_that_is_not_whole_gets_no_manifest(run: RunDir, fence: Fence, harm: str) -> None:
    saved(run)
    data = run.checkpoint(STEP).read_bytes()
    if harm == "cut":
        run.checkpoint(STEP).write_bytes(data[:-100])
    else:
        a_weight = torch.load(run.checkpoint(STEP), weights_only=True)["model"]["time_mlp.0.weight"]
        flip_bit(run.checkpoint(STEP), data.index(a_weight.numpy().tobytes()))
    with pytest.raises(DamagedFile, match=r"does not load|checksum"):
        rebuild(run, fence)
    assert not run.manifest(STEP).exists()


@pytest.mark.parametrize("begun", [True, False])
def test_a_checkpoint_that_fits_is_whole_again_and_said_to_be_unproved_without_an_event(
    run: RunDir, fence: Fence, begun: bool
) -> None:
    saved(run, lambda s: None if begun else moments(s).clear())
    EventLog(run, "1", 0, "n1").append("checkpoint", step=STEP - 1, sha256="ab" * 32)
    run.manifest(STEP).write_text("{}")
    assert any("unproved" in line for line in rebuild(run, fence))
    generation = generations.verify(run, STEP)
    assert generation.sha256 == sha256_file(run.checkpoint(STEP))
    assert [path.read_text() for path in (run.checkpoints / "set-aside").iterdir()] == ["{}"]


def test_an_event_proves_a_checkpoint_or_denies_it(run: RunDir, fence: Fence) -> None:
    saved(run)
    events = EventLog(run, "1", 0, "n1")
    events.append("checkpoint", step=STEP, sha256="ab" * 32, world_size=2)
    with pytest.raises(DamagedFile, match="is not what this run saved at step 5"):
        rebuild(run, fence)
    events.append("checkpoint", step=STEP, sha256=sha256_file(run.checkpoint(STEP)), world_size=4)
    assert not any("unproved" in line for line in rebuild(run, fence))
    assert generations.verify(run, STEP).manifest["world_size"] == 4


def test_whoever_has_lost_the_run_meanwhile_sets_nothing_aside(run: RunDir, fence: Fence) -> None:
    saved(run)
    run.manifest(STEP).write_text("{}")
    fence.release()
    other = Fence(run, {"job": "18", "restart": 0, "host": "n2"}, wait_s=0)
    with pytest.raises(RunBusy):
        rebuild(run, fence)
    other.release()
    assert run.manifest(STEP).read_text() == "{}"


def test_a_file_system_that_fails_for_a_moment_is_no_damage(
    run: RunDir, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    saved(run)
    monkeypatch.setattr(generations, "load", fails)
    with pytest.raises(OSError, match="Input/output error"):
        rebuild(run, fence)
