"""ddpm/training/step.py: what one step computes, and from what."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from ddpm.api import load_config
from ddpm.data.batches import Batches
from ddpm.errors import DoNotRetry, NodeUnfit
from ddpm.network import fused
from ddpm.network.device import resolve
from ddpm.run import generations
from ddpm.run.paths import RunDir
from ddpm.training import fitting, replay
from ddpm.training.optimizer import learning_rate
from ddpm.training.progress import Progress
from ddpm.training.ranks import World
from ddpm.training.replay import Exchange
from ddpm.training.step import Step
from ddpm.training.trainer import Trainer
from tests.conftest import PROJECT
from tests.training import (
    Life,
    assert_micro_batches_agree,
    differences,
    first_gradients,
    lines,
    live,
    make_config,
    make_images,
    make_run,
)

TOTAL = 8


def test_gradients_of_ranks_meet_in_one_buffer_and_come_back_as_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where DDP's hooks could not be replayed."""
    layouts = [torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last), torch.randn(5), torch.randn(2, 3)]
    weights = [torch.nn.Parameter(w) for w in layouts]
    for w in weights:
        w.grad = torch.randn_like(w)
    before = [cast(torch.Tensor, w.grad).clone() for w in weights]
    exchange = Exchange(weights, World(0, 4, torch.device("cpu")))
    exchange.gather()
    monkeypatch.setattr(replay.dist, "all_reduce", lambda flat: flat.mul_(8))  # four ranks, each twice this one's
    exchange()
    exchange.scatter()
    for w, grad in zip(weights, before, strict=True):
        assert torch.equal(cast(torch.Tensor, w.grad), 2 * grad) and cast(torch.Tensor, w.grad).stride() == w.stride()


@pytest.mark.parametrize(("here", "elsewhere", "own"), [(True, True, True), (True, False, False), (False, True, False)])
def test_ranks_update_by_own_kernels_together_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool, elsewhere: bool, own: bool
) -> None:
    """Else rounding would let their weights come apart, which are never exchanged."""
    asked = []

    def agree(self: World, values: list[int]) -> list[int]:
        asked.append(values)
        return [max(value, not elsewhere) for value in values]

    monkeypatch.setattr("ddpm.training.step.serves", lambda device: here)
    monkeypatch.setattr("ddpm.training.step.Update", mock.Mock())
    with Life(make_config(), make_run(tmp_path)) as life:
        step = life.trainer.step
        assert step.own is None  # on a CPU
        resolved = replace(step.resolved, kernels="own")
        step = Step(step.config, step.world, step.packed, resolved, step.state)
        step.gpu = True
        monkeypatch.setattr(World, "agree", agree)
        for _ in range(2):
            assert (step.own is not None) is own
            step.begin_attempt()
    assert asked == [[not here]]  # once in a life, in the same place on all ranks


def test_a_recording_that_fails_after_gradients_were_unscaled_costs_no_bit_of_the_steps_that_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fp16, whose scaler keeps in mind that they are."""
    recording, clip = list[object](), torch.nn.utils.clip_grad_norm_

    @contextlib.contextmanager
    def recorded(graph: object) -> Iterator[None]:
        recording.append(graph)
        yield

    def clipped(*given: Any) -> torch.Tensor:
        if recording:
            raise torch.OutOfMemoryError(f"of {recording.pop()}")
        return clip(*given)

    def on_a_gpu_with_a_scaler(trainer: Trainer) -> None:
        trainer.state.scaler, trainer.step.gpu = torch.amp.GradScaler("cpu"), True

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "a copy")
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setattr(replay, "recorded", recorded)
    monkeypatch.setattr("ddpm.training.step.Ring", lambda: mock.Mock(pinned=lambda parts: parts))
    runs = []
    for replays, told in ((True, pytest.warns(match="steps are not replayed: OutOfMemoryError: of a copy")),
                          (False, contextlib.nullcontext())):  # fmt: skip
        monkeypatch.setattr(Step, "replays", replays)
        runs.append(make_run(tmp_path / str(replays)))
        with told:
            live(make_config(), runs[-1], before_resume=on_a_gpu_with_a_scaler)
    assert differences(*(generations.load(run, TOTAL) for run in runs)) == [] and lines(runs[0]) == lines(runs[1])


def test_accumulation_changes_loss_and_gradients_by_rounding_alone(tmp_path: Path) -> None:
    whole = first_gradients(make_config(), make_run(tmp_path / "whole"))
    parts = first_gradients(make_config(train__micro_batch=1), make_run(tmp_path / "parts"))
    # float32 sums of the same 4 terms in another order: a few units in the last place (6e-8) of the largest term
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    assert len(whole[1]) == len(parts[1]) > 10
    for a, b in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(a.abs().max())))


@pytest.mark.parametrize(("amp", "loss_to", "gradients_to"), [("off", 1e-6, 1e-5), ("bf16", 2e-3, 0.02)])
def test_masks_are_the_same_at_every_micro_batch(tmp_path: Path, amp: str, loss_to: float, gradients_to: float) -> None:
    """To the rounding that tests/gpu explains, which asks the same of a GPU."""
    assert_micro_batches_agree(tmp_path, torch.device("cpu"), amp, loss_to, gradients_to)


def test_labels_are_dropped_as_often_as_asked_and_by_step_and_sample_alone(tmp_path: Path) -> None:
    def labels_seen(name: str, micro: int | None) -> list[list[int]]:
        config = make_config(
            model__num_classes=2, train__label_dropout=0.25, train__global_batch=64, train__micro_batch=micro
        )
        seen: list[list[int]] = []
        with Life(config, make_run(tmp_path / name), images=make_images(64)) as life:
            network = life.trainer.step.network

            def spy(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, places: None) -> torch.Tensor:
                step = life.trainer.at.step
                seen[step:] = [[*(seen[step] if step < len(seen) else []), *labels.tolist()]]
                return network(x_t, t, labels, places)  # type: ignore[no-any-return]

            life.trainer.step.network = spy
            life.train()
        return seen

    whole = labels_seen("whole", None)
    assert labels_seen("parts", 16) == whole
    dropped = [label == 2 for step in whole for label in step]
    assert len(dropped) == 8 * 64 and 90 <= sum(dropped) <= 166  # 128 on average; 4 standard deviations are 39
    assert whole[0] != whole[1] and {label for step in whole for label in step} == {0, 1, 2}


def test_a_batch_on_a_rank_is_its_slice_of_the_global_batch() -> None:
    batches = Batches(make_images(), seed=3, attempt=0, global_batch=6, flip=True)
    cpu = torch.device("cpu")
    for step in range(8):
        x_0, labels = batches.rows(step, 0, 6, cpu)
        parts = [batches.rows(step, first, 2, cpu) for first in (0, 2, 4)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x_0)
        assert torch.equal(torch.cat([p[1] for p in parts]), labels)


def test_the_learning_rate_warms_up_then_stays_or_falls_to_zero() -> None:
    constant = make_config(train__lr=0.5, train__warmup_steps=4, train__total_steps=12)
    assert [learning_rate(constant, k) for k in (0, 1, 3, 4, 11)] == [0.125, 0.25, 0.5, 0.5, 0.5]
    cosine = make_config(train__lr=0.5, train__warmup_steps=4, train__total_steps=12, train__lr_schedule="cosine")
    assert [learning_rate(cosine, k) for k in (0, 3, 4)] == [0.125, 0.5, 0.5]
    assert learning_rate(cosine, 8) == pytest.approx(0.25) and learning_rate(cosine, 12) == pytest.approx(0)


def test_an_average_that_starts_late_is_the_weights_until_then(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    config = make_config(train__ema_start_step=6)
    with Life(config, run) as life:
        life.train(stop_at=[5])
        early = generations.load(run, 5)
        life.train()
    late = generations.load(run, TOTAL)
    assert differences(early["model"], early["ema"]) == [] and differences(late["model"], late["ema"])


# ---------------------------------------------------------------- how many images at a time


LACKS = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")
OF_LIBRARIES = [
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
"""What is no torch.OutOfMemoryError, and says the same."""


def with_room_for(life: Life, most: int, lacks: RuntimeError = LACKS) -> list[int]:
    """The life's device holds `most` images at a time. Returns a list that collects how many it was given."""
    given: list[int] = []
    network = life.trainer.state.model.forward

    def forward(x_t: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        given.append(len(x_t))
        if len(x_t) > most:
            raise lacks
        return network(x_t, *more)  # type: ignore[no-any-return]

    life.trainer.step.network = life.trainer.state.model.forward = forward
    return given


def test_the_most_that_fits_is_found_once_and_changes_no_step(tmp_path: Path) -> None:
    config = make_config(train__micro_batch="auto")
    with Life(config, make_run(tmp_path / "auto")) as life:
        assert life.trainer.fit() == 4  # on a CPU all of the share, tried by nobody
        given = with_room_for(life, 2)
        step = life.trainer.step
        before = [p.clone() for p in life.trainer.state.model.parameters()]
        assert fitting.largest([4, 2, 1], step.try_out, life.trainer.world) == 2
        assert fitting.largest([4], step.try_out, life.trainer.world) is None
        assert given == [4, 2, 4] and all(p.grad is None for p in life.trainer.state.model.parameters())
        assert all(map(torch.equal, before, life.trainer.state.model.parameters()))


def test_what_was_found_is_kept_and_divides_the_share_of_other_ranks(tmp_path: Path) -> None:
    config, cpu = make_config(train__micro_batch="auto", train__global_batch=12), torch.device("cpu")
    assert "micro_batch" not in resolve(config, cpu, 1).as_dict()
    kept = resolve(config, cpu, 1, {"amp": "off", "micro_batch": 4})
    assert kept.as_dict()["micro_batch"] == 4
    assert resolve(make_config(), cpu, 1, kept.as_dict()).micro_batch is None  # no longer asked for
    with Life(config, make_run(tmp_path / "run")) as life:
        trainer = life.trainer
        for world_size, micro in ((1, 4), (2, 3), (3, 4), (12, 1)):
            world = World(0, world_size, cpu)
            with mock.patch("ddpm.training.step.DistributedDataParallel", lambda network, **_: network):
                step = Step(config, world, trainer.step.packed, kept, trainer.state)
            assert step.micro == micro
    # the same losses as of a run that was given it
    live(config, make_run(tmp_path / "a"), before_resume=lambda trainer: setattr(trainer.step, "micro", 3))
    live(make_config(train__micro_batch=3, train__global_batch=12), make_run(tmp_path / "b"))
    assert lines(RunDir(tmp_path / "a")) == lines(RunDir(tmp_path / "b"))


@pytest.mark.parametrize(("room", "told"), [(2, r"2 do: use train\.micro_batch=2, or auto"), (0, "not one image fits")])
def test_a_first_step_without_memory_says_what_fits(tmp_path: Path, room: int, told: str) -> None:
    with Life(make_config(), make_run(tmp_path / "run")) as life:
        with_room_for(life, room)
        with pytest.raises(
            DoNotRetry, match=rf"^there is no room here for 4 images at a time .*Tried to allocate 2 GiB\); {told}"
        ):
            life.train()
        assert life.trainer.at.step == 0


@pytest.mark.parametrize("lacks", OF_LIBRARIES, ids=str)
def test_what_cudas_libraries_say_of_memory_counts_as_torchs_own_word(tmp_path: Path, lacks: RuntimeError) -> None:
    with Life(make_config(), make_run(tmp_path / "run")) as life:
        with_room_for(life, 2, lacks)
        with pytest.raises(DoNotRetry, match=re.escape(str(lacks).partition("\n")[0]) + r"\); 2 do: use "):
            life.train()
        assert fitting.largest([4, 2, 1], life.trainer.step.try_out, life.trainer.world) == 2


def test_another_error_of_a_trial_is_no_lack_of_memory(tmp_path: Path) -> None:
    with Life(make_config(), make_run(tmp_path / "run")) as life:
        with_room_for(life, 2, RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR"))
        with pytest.raises(RuntimeError, match="MAPPING"):
            fitting.largest([4, 2, 1], life.trainer.step.try_out, life.trainer.world)


def test_a_number_that_was_found_where_there_was_more_memory_is_not_said_to_be_found_again(tmp_path: Path) -> None:
    with Life(make_config(train__micro_batch="auto"), make_run(tmp_path / "run")) as life:
        with_room_for(life, 2)
        with pytest.raises(DoNotRetry, match=r"; 2 do: use train\.micro_batch=2, which changes no step$"):
            life.train()


@pytest.mark.parametrize(("of_others", "taken", "raised", "told"), [
    (2, 0, DoNotRetry, r"^there is no room here for 4 images .*: use train\.micro_batch=1, or auto, which"),
    (30, 0, NodeUnfit, r"^other processes have 30\.0 GiB of this GPU's 80\.0 GiB: there is no room here for 4 images"),
    (2, 700, NodeUnfit, r"^there is no room here for 4 images .*\. The run has taken 700 steps: another node may have"),
])  # fmt: skip
def test_where_another_node_may_have_room_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, of_others: int, taken: int, raised: type[Exception], told: str
) -> None:
    """A job before has left a process there; the GPU is smaller than those on which the run was."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((80 - of_others - 40) << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 << 30)

    def fits(num: int) -> None:
        if num > 1:
            raise LACKS

    world, optimizer = World(0, 1, torch.device("cuda")), SimpleNamespace(zero_grad=lambda **_: None)
    state = SimpleNamespace(optimizer=optimizer, at=Progress(taken))
    step: Any = SimpleNamespace(world=world, share=4, micro=4, config=make_config(), try_out=fits, state=state)
    with pytest.raises(raised, match=told):
        fitting.first(step, lambda: fits(4))


def test_where_one_rank_may_find_room_elsewhere_that_is_the_word_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(World):
        def agree(self, values: list[int]) -> list[int]:
            return values

        def all_of(self, value: Any) -> list[Any]:
            return [value, NodeUnfit("other processes have it")]

    def lacking(num: int) -> None:
        raise LACKS

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 << 30)
    state = SimpleNamespace(at=Progress(0))
    step: Any = SimpleNamespace(world=Two(0, 2, torch.device("cuda")), share=4, try_out=lacking, state=state)
    with pytest.raises(NodeUnfit, match="other processes have it"):
        fitting.fit(step)


def test_how_many_fit_is_tried_once_with_the_kernels_that_will_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_own: list[bool] = []
    with Life(make_config(train__micro_batch="auto"), make_run(tmp_path / "run"), warm_up=False) as life:
        trainer: Any = life.trainer
        trainer.step.resolved = replace(trainer.resolved, kernels="own")
        monkeypatch.setattr(fused, "serve", lambda *_: True)
        monkeypatch.setattr(fitting, "fit", lambda step: by_own.append(step.state.model.own_kernels) or 2)
        assert trainer.fit() == 2 and trainer.fit() is None
    assert by_own == [True]


def test_memory_that_is_gone_later_is_a_crash_as_any(tmp_path: Path) -> None:
    with Life(make_config(), make_run(tmp_path / "run")) as life:
        life.train(stop_at=[2])
        with_room_for(life, 0)
        with pytest.raises(torch.OutOfMemoryError):
            life.train()


def test_a_small_network_gets_one_thread_of_a_cpu_and_a_run_goes_on_with_its_own_number() -> None:
    cpu, small = torch.device("cpu"), load_config(PROJECT / "configs" / "quickstart.yaml")
    assert resolve(small, cpu, 8).threads == 1
    assert resolve(small, cpu, 8, {"threads": 2}).threads == 2
    assert resolve(load_config(PROJECT / "configs" / "cifar10.yaml"), cpu, 8).threads == 8


@pytest.mark.parametrize(("hip", "ranks", "fused", "replays"), [
    (None, 2, True, True), ("6.4", 1, True, True), ("6.4", 2, True, False), (None, 1, False, False)
])  # fmt: skip
def test_steps_are_not_recorded_beside_amds_watchdog_and_not_with_an_optimizer_that_masks_nothing(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, ranks: int, fused: bool, replays: bool
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    step: Any = Step.__new__(Step)
    step.gpu, step.resolved, step.world = True, SimpleNamespace(dropout="counted"), SimpleNamespace(world_size=ranks)
    step.state = SimpleNamespace(optimizer=SimpleNamespace(defaults={"fused": fused}))
    assert step.replays == replays
