"""ddpm/training/trainer.py: a run that was stopped anywhere, any number of times, is the run that never was."""

import contextlib
import errno
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.config.reading import load
from ddpm.config.schema import Config
from ddpm.config.unet_shape import Structure
from ddpm.data.packed import pack
from ddpm.errors import DoNotRetry, EnvironmentLacks, RanksLost, RunBusy
from ddpm.network.arithmetic import peak, utilization
from ddpm.network.device import resolve
from ddpm.network.dropout import Dropout
from ddpm.run import unfinished
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from ddpm.training import chronicle, ranks
from ddpm.training.meter import Meter
from ddpm.training.replay import Exchange
from ddpm.training.state import TrainingState
from ddpm.training.trainer import Outcome, Trainer
from tests.conftest import PROJECT
from tests.images import write_zip
from tests.saves import flip_bit
from tests.training import (
    CPU,
    Killed,
    Life,
    assert_same_end,
    differences,
    events,
    lines,
    live,
    live_on_ranks,
    make_config,
    make_run,
    on_ranks,
    poison,
    record,
)

TOTAL = 8
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {"train__amp": "bf16"},
    "accumulation": {"train__micro_batch": 2},
    "dropout-accumulation-classes": {"model__dropout": 0.3, "train__micro_batch": 1, "model__num_classes": 2},
    "cosine-no-clip": {"train__lr_schedule": "cosine", "train__grad_clip": None},
    "adamw-ema-options": {
        "train__optimizer": "adamw",
        "train__weight_decay": 0.1,
        "train__ema_start_step": 3,
        "train__ema_every_steps": 2,
        "train__ema_warmup": True,
    },
    "labels-dropped": {"model__num_classes": 2, "train__label_dropout": 0.5, "train__micro_batch": 2},
    "l1-dns": {"diffusion__loss": "l1", "diffusion__schedule": "dns"},
}


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_by_new_trainers_ends_bit_identical(tmp_path: Path, kind: str) -> None:
    config = make_config(**KINDS[kind])
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    live(config, other, stops=[2, 5])  # before and after the average begins to be one
    assert_same_end(one, other, TOTAL)


def test_stopped_after_every_step_ends_bit_identical(tmp_path: Path) -> None:
    """1: inside the warm-up and a log window; 2: 8 of 10 images; 5: at the border of epoch 2; 6: at a log line."""
    config = make_config(model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    live(config, other, stops=range(1, TOTAL))
    assert_same_end(one, other, TOTAL)
    assert [r["step"] for r in lines(other)] == [3, 6, 8]


def test_train_called_again_after_a_stop_goes_on_bit_identical(tmp_path: Path) -> None:
    config = make_config(model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live(config, one)
    with Life(config, other) as life:
        for step in (2, 3, 7):
            assert life.train(stop_at=[step]) == Outcome(False, step, "preempted", True)
        assert life.train().finished
    assert_same_end(one, other, TOTAL)


def test_killed_without_a_word_resumes_from_the_last_save_bit_identical(tmp_path: Path) -> None:
    config = make_config(checkpoint__every_steps=2, log__every_steps=1)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "killed")
    live(config, one)
    for step in (1, 3, 5):  # before any save; one step past a save; again
        with pytest.raises(Killed), Life(config, other) as life:
            life.train(kill_at=step)
    assert [r["step"] for r in lines(other)] == [1, 2, 3, 4]
    live(config, other)
    assert_same_end(one, other, TOTAL)
    assert [r["step"] for r in lines(other)] == list(range(1, TOTAL + 1))


def test_data_that_is_overwritten_while_it_is_mapped_is_named_and_nothing_made_of_it_is_saved(tmp_path: Path) -> None:
    few = {"data__name": "images", "data__path": str(write_zip(tmp_path / "a.zip", num_images=8, splits=("train",)))}
    config, run = make_config(checkpoint__every_steps=2, log__every_steps=9, **few), make_run(tmp_path / "run")
    key, there = pack(config.data, "train", tmp_path / "cache")
    file = tmp_path / "cache" / key / "images.npy"

    def meddle(step: int) -> None:
        """Touched before step 1, overwritten in place before step 3."""
        if step == 1:
            file.touch()
        elif step == 3:
            with file.open("r+b") as f:
                f.seek(file.stat().st_size // 2)
                f.write(bytes(file.stat().st_size // 2))

    named = pytest.raises(EnvironmentLacks, match=r"images.npy: overwritten while it was mapped.*step 4")
    with named, Life(config, run, images=there) as life:
        take = life.trainer.step.take
        life.trainer.step.take = lambda: (meddle(life.trainer.at.step + 1), take())[1]  # type: ignore[method-assign]
        life.train()
    assert run.steps_saved() == [2]
    key, there = pack(config.data, "train", tmp_path / "cache")
    live(config, run, images=there)
    live(config, make_run(tmp_path / "undisturbed"), images=there)
    assert_same_end(make_run(tmp_path / "undisturbed"), run, TOTAL)


def test_tensorboard_shows_every_logged_step_once_whatever_died_in_between(tmp_path: Path) -> None:

    config, run = make_config(checkpoint__every_steps=3, log__every_steps=1), make_run(tmp_path)
    for step in (2, 5, 7):  # before any save; two steps past a save; one
        with pytest.raises(Killed), Life(config, run) as life:
            try:
                life.train(kill_at=step)
            finally:
                life.trainer.chronicle.telemetry.board.flush()  # type: ignore[attr-defined]  # what was logged got to the disk
    live(config, run)
    board = EventAccumulator(str(run.tensorboard)).Reload()
    shown = [(e.step, e.value) for e in board.Scalars("train/loss")]
    assert shown == [(r["step"], pytest.approx(r["loss"])) for r in lines(run)]
    assert [step for step, _ in shown] == list(range(1, TOTAL + 1))
    assert board.Tags()["tensors"] == ["config/text_summary"]
    hparams = board.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"train.warmup_steps" in hparams and b"log." not in hparams


def test_adam_moments_lie_in_memory_as_their_weights_after_a_resume(tmp_path: Path) -> None:
    config, run = make_config(), make_run(tmp_path)
    with Life(config, run) as life:
        life.train(stop_at=[3])
        before = [{k: v.stride() for k, v in s.items()} for s in life.trainer.state.optimizer.state.values()]
        weights = life.trainer.state.model.parameters()
        assert any(p.stride() != p.contiguous().stride() for p in weights)  # channels-last
    with Life(config, run) as life:
        after = [{k: v.stride() for k, v in s.items()} for s in life.trainer.state.optimizer.state.values()]
    assert after == before


def test_events_tell_the_lives_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    live(make_config(), run, stops=[3])
    assert events(run) == ["started", "stop_requested", "checkpoint", "resumed", "checkpoint", "finished"]
    assert [e["step"] for e in read_events(run)] == [0, 3, 3, 3, 8, 8]
    assert all(e["world_size"] == 1 for e in read_events(run))


def test_a_stop_at_the_last_step_is_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(), run) as life:
        assert life.train(stop_at=[TOTAL]) == Outcome(True, TOTAL, "", True)


def test_fp16_needs_a_gpu_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"train\.amp=fp16 needs a GPU.*--gpus-per-node 1"):
        Life(make_config(train__amp="fp16"), make_run(tmp_path))


def test_more_steps_with_a_constant_rate_continue_the_finished_run(tmp_path: Path) -> None:
    long, short = make_config(log__every_steps=2), make_config(train__total_steps=6, log__every_steps=2)
    one, other = make_run(tmp_path / "at-once"), make_run(tmp_path / "extended")
    live(long, one)
    live(short, other)
    assert short.digest() == long.digest()
    live(long, other)
    assert_same_end(one, other, TOTAL)


@pytest.mark.parametrize("change", ["network", "state"])
def test_a_checkpoint_of_code_with_another_network_or_state_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    config, run = make_config(train__total_steps=2), make_run(tmp_path)
    live(config, run)
    if change == "network":  # an edit of its file, which the config does not show
        built = Structure.embedding.fget  # type: ignore[attr-defined]
        monkeypatch.setattr(Structure, "embedding", property(lambda self: 2 * built(self)))
    else:
        load = TrainingState.load_state_dict
        monkeypatch.setattr(TrainingState, "load_state_dict", lambda self, s: (s["teacher"], load(self, s)))
    why = "embed.weight .*there.*here" if change == "network" else "KeyError: 'teacher'"
    with pytest.raises(
        DoNotRetry, match=rf"step 2 was saved by code of another network .*{why}.* go on with that code"
    ):
        live(make_config(train__total_steps=4), run)


# ---------------------------------------------------------------- what a step computes


def test_a_stop_save_and_resume_change_no_generator_of_the_process(tmp_path: Path) -> None:
    """What follows from (seed, step) must not hang on how often anything was drawn before."""
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    config = make_config(model__dropout=0.3)
    live(config, one)
    torch.manual_seed(12345)
    torch.randn(77)
    live(config, other)
    assert_same_end(one, other, TOTAL)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    live(make_config(), one)
    live(make_config(seed=1), other)
    assert differences(lines(one), lines(other))


# ---------------------------------------------------------------- several ranks


def joined(seen: Path) -> dict[tuple[int, int], Any]:
    out: dict[tuple[int, int], Any] = {}
    for path in sorted(seen.glob("*.pt")):
        part = torch.load(path, weights_only=True)
        assert not set(part) & set(out), "two ranks, or two lives, trained on the same place of a batch"
        out.update(part)
    return out


def test_ranks_that_come_and_go_see_the_samples_of_one_rank(tmp_path: Path) -> None:
    """2, then 1, then 2 ranks: the same images, flips, t and noise, and the same loss to rounding."""
    config = make_config(log__every_steps=2)
    alone, run, seen = make_run(tmp_path / "alone"), make_run(tmp_path / "ranks"), tmp_path / "seen"
    expected: dict[tuple[int, int], Any] = {}
    with Life(config, alone) as life:
        record(life.trainer, expected)
        life.train()
    assert len(expected) == TOTAL * 4

    seen.mkdir()
    live_on_ranks(2, config, run, stop_at=[3], seen=seen)
    part: dict[tuple[int, int], Any] = {}
    with Life(config, run) as life:
        record(life.trainer, part)
        life.train(stop_at=[5])
    torch.save(part, seen / "1-0.pt")
    live_on_ranks(2, config, run, seen=seen)

    assert differences(joined(seen), expected) == []
    assert [r["step"] for r in lines(run)] == [2, 4, 6, 8]
    for ours, theirs in zip(lines(run), lines(alone), strict=True):
        # sums of gradients in another order: 1e-7 a step, which 8 steps of Adam at lr 0.01 carry into the weights
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert {**ours, "loss": 0, "grad_norm": 0} == {**theirs, "loss": 0, "grad_norm": 0}
    assert [e["world_size"] for e in read_events(run) if e["event"] in ("started", "resumed")] == [2, 1, 2]


def begin_apart(world: ranks.World, config: Config, run: RunDir) -> None:
    def meddle(trainer: Trainer) -> None:
        with torch.no_grad():
            for p in (*trainer.state.model.parameters(), *trainer.state.ema.model.parameters()):
                p.add_(world.rank / 1024)

    with Life(config, run, world=world, warm_up=False, before_resume=meddle) as life:
        state = life.trainer.state
        weights = [p.detach().clone() for p in (*state.model.parameters(), *state.ema.model.parameters())]
        for of_rank in world.all_of(weights):
            assert all(torch.equal(a, b) for a, b in zip(weights, of_rank, strict=True))
    drawn = list(TrainingState(config, ranks.World(0, 1, world.device), "off").model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, drawn * 2, strict=True))


def test_ranks_begin_with_the_weights_that_rank_0_draws(tmp_path: Path) -> None:
    """As where nodes have CPUs of several kinds, which draw normals to another last bit."""
    on_ranks(2, begin_apart, make_config(model__num_classes=2), make_run(tmp_path))


def live_by_one_buffer(world: ranks.World, config: Config, run: RunDir) -> None:
    """As ranks with a GPU each do, which exchange gradients between what they replay."""
    with Life(config, run, world=world, warm_up=False) as life:
        step = life.trainer.step
        step.network, step.exchange = step.state.model, Exchange(step.state.model.parameters(), world)
        life.train()


def test_steps_are_the_same_on_any_ranks_and_micro_batches_with_dropout(tmp_path: Path) -> None:
    """The first step has zeros behind its masks, and moves them away from zero."""
    changes = {"train__global_batch": 8, "model__dropout": 0.3, "log__every_steps": 1, "train__total_steps": 3}
    reference = make_run(tmp_path / "whole")
    live(make_config(**changes), reference)
    for num_ranks, micro, ddp in [(1, 4, False), (1, 1, False), (2, None, True), (2, 2, False), (4, None, True)]:
        run = make_run(tmp_path / f"{num_ranks}-{micro}")
        config = make_config(**changes, train__micro_batch=micro)
        if num_ranks == 1:
            live(config, run)
        elif not ddp:
            on_ranks(num_ranks, live_by_one_buffer, config, run)
        else:
            live_on_ranks(num_ranks, config, run)
        for ours, theirs in zip(lines(run), lines(reference), strict=True):
            # sums of eight terms in another order, and what Adam makes of them in two steps; other masks: over 1e-4
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), (num_ranks, micro)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), (num_ranks, micro)


def test_the_masks_of_another_step_and_of_another_seed_are_others(tmp_path: Path) -> None:
    def outputs(seed: int) -> list[torch.Tensor]:
        config = make_config(model__dropout=0.5, seed=seed, train__lr=1e-12, train__total_steps=2)
        seen = []
        with Life(config, make_run(tmp_path / str(seed))) as life:
            block = next(m for m in life.trainer.state.model.modules() if isinstance(m, Dropout))
            block.register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
            life.train()
        return seen

    (one, two), (other, _) = outputs(0), outputs(1)
    assert not torch.equal(one, two) and not torch.equal(one, other)


def test_a_run_that_began_before_masks_were_counted_keeps_those_that_it_had(tmp_path: Path) -> None:
    config = make_config(model__dropout=0.3)
    here = resolve(config, CPU, 1)
    before = {k: v for k, v in here.as_dict().items() if k != "dropout"}
    assert here.dropout == "counted" and resolve(config, CPU, 1, before).dropout == "torch"
    assert resolve(config, CPU, 1, here.as_dict()) == here


def test_three_ranks_stopped_and_resumed_end_bit_identical(tmp_path: Path) -> None:
    """Three terms have an order of summation: DDP's buckets must be grouped alike in every life."""
    config = make_config(train__global_batch=6, model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "stopped")
    live_on_ranks(3, config, one)
    live_on_ranks(3, config, other, stop_at=[4])
    live_on_ranks(3, config, other)
    assert_same_end(one, other, TOTAL)


def go_on_after_a_stop_while_starting(world: ranks.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world, warm_up=False) as life:
        for asked in ("preempted", None):  # by hand, and nobody came to kill it
            life.trainer.warm_up(lambda asked=asked: asked)
            outcome = life.trainer.train(lambda asked=asked: asked)
        assert outcome.finished


def test_three_ranks_asked_to_stop_while_starting_go_on_bit_identical(tmp_path: Path) -> None:
    config = make_config(train__global_batch=6, model__dropout=0.2)
    one, other = make_run(tmp_path / "undisturbed"), make_run(tmp_path / "asked")
    live_on_ranks(3, config, one)
    on_ranks(3, go_on_after_a_stop_while_starting, config, other)
    assert_same_end(one, other, TOTAL)


def refused_together(world: ranks.World, config: Config, run: RunDir) -> None:
    with pytest.raises(DoNotRetry, match="every checkpoint"), Life(config, run, world=world):
        pass


def test_where_all_checkpoints_are_damaged_no_rank_waits_for_another(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(), run) as life:
        life.train(stop_at=[5])
    flip_bit(run.checkpoint(5), 5000)
    on_ranks(2, refused_together, make_config(), run)


def rolled_back_to_nothing(world: ranks.World, config: Config, run: RunDir) -> None:
    with Life(config, run, world=world) as life:
        poison(life.trainer, lambda t: t.at.step == 4 and t.at.attempt == 0)
        if world.is_main:
            flip_bit(run.checkpoint(3), 5000)
        with pytest.raises(DoNotRetry, match="every checkpoint"):
            life.train()


def test_where_a_rollback_finds_nothing_good_no_rank_waits_for_another(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(make_config(), run) as life:
        life.train(stop_at=[3])
    on_ranks(2, rolled_back_to_nothing, make_config(), run, timeout_s=20)


# ---------------------------------------------------------------- failing disks, other holders


def full_disk(monkeypatch: pytest.MonkeyPatch, full: Any) -> None:
    """Writes of checkpoint data fail with ENOSPC while full() is true: beneath torch.save, where a disk would."""
    from ddpm.run.files import HashingFile

    init = HashingFile.__init__

    class Raw:
        def __init__(self, raw: Any) -> None:
            self.raw = raw

        def write(self, data: Any) -> int:
            if ".pt." in self.raw.name and full() and self.raw.tell() > 4096:  # torch.save has begun its archive
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self.raw.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.raw, name)

    monkeypatch.setattr(HashingFile, "__init__", lambda self, raw: init(self, cast(BinaryIO, Raw(raw))))


def test_a_full_disk_costs_one_save_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = make_config(checkpoint__every_steps=2), make_run(tmp_path)
    saved: list[int] = []
    with Life(config, run) as life:
        full_disk(monkeypatch, lambda: 4 <= life.trainer.at.step < 6 and not saved)
        trainer = life.trainer

        def look() -> None:
            if trainer.at.step == 5:
                trainer.chronicle.settle()
                saved.extend(run.steps_saved())  # while full: the one of step 2 alone

        assert trainer.train(look).finished
    assert saved == [2]
    assert run.steps_saved() == [8, 6, 2]
    assert "checkpoint failed: step=4" in capsys.readouterr().out
    (told,) = [e for e in read_events(run) if e["event"] == "save_failed"]
    assert (told["step"], told["at_step"], told["reason"]) == (2, 4, "No space left on device")
    assert not list(run.checkpoints.glob(".tmp-*"))


def test_a_stop_whose_save_failed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = make_config(checkpoint__every_steps=2), make_run(tmp_path)
    with Life(config, run) as life:
        full_disk(monkeypatch, lambda: life.trainer.at.step == 5 and run.latest_step() == 4)
        assert life.train(stop_at=[5]) == Outcome(False, 5, "preempted", False)
        assert run.steps_saved() == [4, 2]
        assert life.train().finished  # nobody killed us, and there is room again


@pytest.mark.parametrize(("code", "patience_s", "saved"), [
    (errno.ESTALE, 60, True), (errno.EIO, 60, True), (errno.EDQUOT, 60, True), (errno.EDQUOT, 0, False),
    (errno.ENOSPC, 60, True), (errno.EROFS, 60, True), (errno.ESHUTDOWN, 60, True), (errno.EACCES, 60, False),
])  # fmt: skip
def test_a_stop_whose_save_meets_a_passing_error_tries_again_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, patience_s: float, saved: bool
) -> None:
    run, tries = make_run(tmp_path), 0
    monkeypatch.setattr(chronicle, "SAVE_AGAIN_S", 0.01)
    begin = unfinished.begin

    def failing(*args: Any) -> Path:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise OSError(code, "of the file system")
        return begin(*args)

    monkeypatch.setattr(unfinished, "begin", failing)
    with Life(make_config(), run) as life:
        monkeypatch.setattr(life.trainer.chronicle, "patience_s", lambda reason: patience_s)
        outcome = life.trainer.train(lambda: "preempted" if life.trainer.at.step == 3 else None)
    assert outcome == Outcome(False, 3, "preempted", saved) and tries == (4 if saved else 1)
    assert run.steps_saved() == ([3] if saved else [])


@pytest.mark.parametrize("hangs", [False, True])
def test_a_save_under_way_where_training_ends_by_an_error_is_given_time_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    run, begin, seen = make_run(tmp_path), unfinished.begin, threading.Event()
    monkeypatch.setattr(chronicle, "END_SAVE_S", 0.1 if hangs else 60)

    def slowly(*args: Any) -> Path:
        if run.steps_saved() == [2]:
            seen.wait(60 if hangs else 0.5)
        return begin(*args)

    def asked() -> None:
        if life.trainer.at.step == 5:
            raise RanksLost("rank 1 is lost")

    monkeypatch.setattr(unfinished, "begin", slowly)
    with Life(make_config(checkpoint__every_steps=2), run) as life:
        with pytest.raises(RanksLost, match="rank 1"):
            life.trainer.train(asked)
        assert run.steps_saved() == ([2] if hangs else [4, 2])  # the process of a job ends here
        seen.set()


def test_who_hangs_is_found_out_before_a_save_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others ask at the same time, and not for long: who does not answer is taken for one that hangs."""
    told: list[str] = []

    @contextlib.contextmanager
    def heeded() -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            told.append("roll")
            raise RanksLost("rank 1 did not answer") from None

    def asked() -> None:
        raise RuntimeError("Timed out waiting 4000ms for recv operation to complete")

    peers: Any = SimpleNamespace(heeded=heeded)
    with Life(make_config(), make_run(tmp_path), world=ranks.World(0, 1, CPU, peers)) as life:
        monkeypatch.setattr(life.trainer.chronicle, "end_save", lambda: told.append("save"))
        with pytest.raises(RanksLost, match="rank 1"):
            life.trainer.train(asked)
    assert told == ["roll", "save"]


def test_a_disk_full_for_everything_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeat, events and grids meet ENOSPC as checkpoints do."""
    from ddpm.run import events as run_events
    from ddpm.training import telemetry

    config, run = make_config(), make_run(tmp_path)
    monkeypatch.setattr(telemetry, "HEARTBEAT_EVERY_S", 0)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Life(config, run) as life:
        with monkeypatch.context() as m:
            m.setattr(telemetry, "write_json", refuse)
            m.setattr(run_events.EventLog, "append", refuse)
            m.setattr(telemetry, "write_png", refuse)
            life.train(stop_at=[4])
        assert life.train().finished


def test_a_run_taken_over_stops_and_publishes_nothing(tmp_path: Path) -> None:
    config, run = make_config(checkpoint__every_steps=3), make_run(tmp_path)
    with Life(config, run) as life:
        life.train(stop_at=[3])
        run.fence.write_text("99\n")
        with pytest.raises(RunBusy, match="taken over by a later job"):
            life.train(stop_at=[5])
    assert run.steps_saved() == [3]


# ---------------------------------------------------------------- what it reports


def test_a_metrics_line_holds_the_public_keys_and_the_mean_of_its_window(tmp_path: Path) -> None:
    config, run, every = make_config(log__every_steps=4), make_run(tmp_path / "4"), make_run(tmp_path / "1")
    live(config, run)
    live(make_config(log__every_steps=1), every)
    first = json.loads(run.metrics.read_text().splitlines()[0])
    assert list(first) == [
        *("step", "images", "epoch", "loss", "grad_norm", "lr", "images_per_s", "gpu_memory_gib", "time")
    ]
    assert (first["step"], first["images"], first["epoch"]) == (4, 16, 1.6)
    # the same four float32 losses, summed in float32 here and in float64 there
    assert first["loss"] == pytest.approx(sum(r["loss"] for r in lines(every)[:4]) / 4, rel=1e-6)


def test_the_share_of_a_gpus_arithmetic_is_in_the_metrics_where_the_gpu_is_known(tmp_path: Path) -> None:
    ho, most = load(PROJECT / "configs" / "cifar10.yaml"), 989e12
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert utilization(ho, name, "bf16") == pytest.approx(37.32e9 / most, rel=1e-3)  # by hand: 3 x 12.44 GFLOP
    assert [peak(n, "bf16") for n in ("NVIDIA A10", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "cpu", "Radeon")] == [
        *(125e12, 312e12, 756e12, None, None)
    ]
    assert peak("Tesla V100-SXM2-16GB", "off") == 15.7e12
    assert (peak("Tesla V100-PCIE-32GB", "off"), peak("NVIDIA H200 NVL", "bf16")) == (14e12, 835e12)
    for other in (
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ):
        assert peak(other, "bf16") is None

    run = make_run(tmp_path / "run")
    with Life(make_config(), run) as life:
        life.trainer.meter = Meter(10, 1e-3)
        life.train()
    for line in map(json.loads, run.metrics.read_text().splitlines()):
        assert line["mfu"] == pytest.approx(line["images_per_s"] * 1e-3)


def test_milestones_by_epoch_are_the_first_steps_past_each(tmp_path: Path) -> None:
    config = make_config(checkpoint__milestone_every_epochs=1, checkpoint__keep_last=1)
    run = make_run(tmp_path)
    live(config, run)  # 10 images, 4 a step: epochs end inside steps 3, 5 (exactly), 8
    assert run.steps_saved() == [8, 5, 3]
    assert sorted(p.name for p in run.checkpoints.glob("ema-*")) == [
        *("ema-000000003.safetensors", "ema-000000005.safetensors", "ema-000000008.safetensors")
    ]


@pytest.mark.long
def test_lives_that_compile_nothing_load_no_compiler(tmp_path: Path) -> None:
    """Which takes torch as long as all the rest of it."""
    code = """
        import sys
        from pathlib import Path
        from tests.training import live, make_config, make_run

        config = make_config(model__dropout=0.1, train__optimizer=sys.argv[1])
        live(config, make_run(Path(sys.argv[2])), stops=[5])
        print({"torch._dynamo", "torch._inductor", "sympy"} & sys.modules.keys())
    """
    for optimizer in ("adam", "adamw"):
        command = [sys.executable, "-c", textwrap.dedent(code), optimizer, str(tmp_path / optimizer)]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
        assert done.stdout.splitlines()[-1:] == ["set()"], done.stdout + done.stderr
