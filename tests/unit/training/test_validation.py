"""ddpm/training/validation.py: a number that only the weights can change, and that changes no step."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm.config.schema import Config
from ddpm.errors import RequestError
from ddpm.run import generations
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from ddpm.training import meter, ranks, validation
from ddpm.training.trainer import Outcome
from tests.training import ALONE, Life, assert_same_end, differences, live, make_config, make_images, make_run, on_ranks

TOTAL = 8
HELD_OUT = make_images(20)
OPTIONS: dict[str, Any] = {"log__every_steps": 2, "model__dropout": 0.5, "train__lr": 0.1}
CONFIG = make_config(**OPTIONS, log__validate_every_steps=4)


def validated(run: RunDir) -> dict[int, float]:
    return {r["step"]: r["validation_loss"] for r in read_jsonl(run.metrics) if "validation_loss" in r}


def shown(run: RunDir) -> dict[int, float]:
    found = EventAccumulator(str(run.tensorboard)).Reload().Scalars("loss/validation")
    assert len({e.step for e in found}) == len(found)
    return {e.step: e.value for e in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("undisturbed"))
    live(CONFIG, run, held_out=HELD_OUT)
    return run


def test_validation_changes_no_step_and_stands_in_the_lines_that_are_due(tmp_path: Path, undisturbed: RunDir) -> None:
    plain = make_run(tmp_path)
    live(make_config(**OPTIONS), plain)
    assert differences(generations.load(plain, TOTAL), generations.load(undisturbed, TOTAL)) == []
    assert list(validated(undisturbed)) == [4, TOTAL] and len(set(validated(undisturbed).values())) == 2
    assert shown(undisturbed) == pytest.approx(validated(undisturbed))


def test_a_stop_within_a_validation_is_heard_and_the_next_life_makes_up_for_it(
    tmp_path: Path, undisturbed: RunDir
) -> None:
    run, asked = make_run(tmp_path), 0
    with Life(CONFIG, run, held_out=HELD_OUT) as life:

        def stop_requested() -> str | None:
            nonlocal asked
            asked += life.trainer.at.step == 4  # twice after the step, then in its validation
            return "preempted" if asked == 3 else None

        assert life.trainer.train(stop_requested) == Outcome(False, 4, "preempted", True)
    assert validated(run) == {} and [r["step"] for r in read_jsonl(run.metrics)] == [2, 4]
    live(CONFIG, run, held_out=HELD_OUT)
    assert_same_end(run, undisturbed, TOTAL)
    assert shown(run) == pytest.approx(validated(undisturbed))


def of_an_average_on_ranks(world: ranks.World, config: Config, run: RunDir) -> None:
    validation.BATCH = 6  # of which the last has two: the others are padding
    with Life(config, run, world=world, held_out=HELD_OUT) as life:
        assert life.trainer.held_out is not None
        loss, reason = life.trainer.held_out.loss(life.trainer.state, lambda: None)
        assert loss and not reason
        (run.path / f"{world.world_size}-{world.rank}").write_text(loss.hex())


def test_any_number_of_ranks_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = make_config(train__global_batch=6), make_run(tmp_path)
    monkeypatch.setattr(validation, "BATCH", validation.BATCH)
    of_an_average_on_ranks(ALONE, config, run)
    on_ranks(3, of_an_average_on_ranks, config, run)
    assert len(told := [path.read_text() for path in tmp_path.glob("?-?")]) == 4 and len(set(told)) == 1


def validate_on_a_full_gpu(world: ranks.World, config: Config, run: RunDir, full: int) -> None:
    """Rank `full` has no room at step 4."""
    validation.BATCH, eps_of = 6, validation.eps_of  # so that each rank has some
    with Life(config, run, world=world, held_out=HELD_OUT) as life:

        def lacking(*given: Any) -> Any:
            if world.rank == full and life.trainer.at.step == 4:
                raise RuntimeError("CUDA error: out of memory\nSo many bytes")
            return eps_of(*given)

        validation.eps_of = lacking
        assert life.train() == Outcome(True, TOTAL)


@pytest.mark.parametrize(("world_size", "full"), [(1, 0), (2, 0), (2, 1)])
def test_a_validation_that_does_not_fit_is_left_out_and_the_next_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], world_size: int, full: int
) -> None:
    run = make_run(tmp_path)
    monkeypatch.setattr(validation, "eps_of", validation.eps_of)
    monkeypatch.setattr(validation, "BATCH", validation.BATCH)
    if world_size == 1:
        validate_on_a_full_gpu(ALONE, CONFIG, run, full)
    else:
        on_ranks(2, validate_on_a_full_gpu, CONFIG, run, full)
    assert list(validated(run)) == [TOTAL] and [r["step"] for r in read_jsonl(run.metrics)] == [2, 4, 6, 8]
    line = "no validation: it does not fit beside the steps step=4 error=CUDA error: out of memory\n"
    assert world_size > 1 or line in capfd.readouterr().out


def test_it_is_a_multiple_of_the_steps_between_lines() -> None:
    with pytest.raises(RequestError, match=r"log.validate_every_steps = 5: .* multiple of log.every_steps = 2; 4 is"):
        make_config(log__every_steps=2, log__validate_every_steps=5)


def test_held_out_images_that_are_overwritten_end_validation_and_cost_no_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = make_run(tmp_path / "run"), tmp_path / "images.npy"
    np.save(file, HELD_OUT.images)
    mapped = replace(HELD_OUT, images=np.lib.format.open_memmap(file, mode="r"))
    with Life(make_config(**OPTIONS, log__validate_every_steps=2), run, held_out=mapped) as life:

        def stop_requested() -> None:
            if life.trainer.at.step == 3:
                np.save(file, HELD_OUT.images[::-1])  # in place

        assert life.trainer.train(stop_requested) == Outcome(True, TOTAL)
    assert list(validated(run)) == [2] and run.latest_step() == TOTAL
    assert capsys.readouterr().out.count(f"no validation from here on in this life: {file}: overwritten") == 1


def test_speed_is_that_of_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, validating = make_run(tmp_path), [0.0]
    with Life(CONFIG, run, held_out=HELD_OUT) as life:
        at, of = life.trainer.at, validation.HeldOut.loss

        def loss(*args: Any) -> tuple[float | None, str]:
            validating[0] += 1000
            return of(*args)

        monkeypatch.setattr(validation.HeldOut, "loss", loss)
        monkeypatch.setattr(meter, "time", SimpleNamespace(monotonic=lambda: at.step + validating[0]))
        life.train()
    assert validating == [2000]
    assert {r["images_per_s"] for r in read_jsonl(run.metrics)} == {CONFIG.train.global_batch}
