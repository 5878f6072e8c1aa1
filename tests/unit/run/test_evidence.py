"""ddpm/run/evidence.py: a run that was saved is not begun again at step 0, whatever of it is missing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm.errors import DoNotRetry, RequestError
from ddpm.run import generations
from ddpm.run.paths import RunDir
from tests.saves import ask_for_samples, killed_before_its_manifest
from tests.training import Killed, Life, assert_same_end, live, make_config, make_run

CONFIG = make_config(checkpoint__every_steps=3, log__every_steps=1)


def files_of(run: RunDir) -> dict[str, bytes]:
    """What a life may not change that is refused; it takes the lock, and a number."""
    held = ("lock", "fence")
    files = (p for p in run.path.rglob("*") if p.is_file() and p.name not in held and ".fence-" not in p.name)
    return {str(p.relative_to(run.path)): p.read_bytes() for p in files}


def no_manifests(run: RunDir) -> None:
    for path in run.checkpoints.glob("*.json"):
        path.unlink()


def no_checkpoints(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)


def links_to_nothing(run: RunDir) -> None:
    """As where an archive is not mounted, and the events were left behind."""
    for path in run.checkpoints.iterdir():
        path.unlink()
        path.symlink_to(f"/not/mounted/{path.name}")
    for path in [*run.events.iterdir(), run.metrics, run.heartbeat]:
        path.unlink()


def ema_alone(run: RunDir) -> None:
    for path in [*run.checkpoints.glob("step-*"), *run.events.iterdir(), run.metrics, run.heartbeat]:
        path.unlink()


def metrics_alone(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(run.events)
    run.heartbeat.unlink()


def events_of_another_life(run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)
    (run.events / "1.99.jsonl").rename(run.events / "17.0.jsonl")
    told = (run.events / "17.0.jsonl").read_text().splitlines()
    (run.events / "17.0.jsonl").write_text(told[0].replace('"job": "1"', '"job": "17"') + "\n")


def heartbeat_alone(run: RunDir) -> None:
    metrics_alone_but = run.heartbeat.read_bytes()
    metrics_alone(run)
    run.metrics.unlink()
    run.heartbeat.write_bytes(metrics_alone_but)


def tensorboard_alone(run: RunDir) -> None:
    metrics_alone(run)
    run.metrics.unlink()


def a_sample_set(run: RunDir) -> None:
    metrics_alone(run)
    run.metrics.unlink()
    ask_for_samples(run, "fid", 8)


PARTIAL: dict[str, tuple[Callable[[RunDir], None], str]] = {
    "without manifests": (no_manifests, r"step-000000008\.pt has no manifest"),
    "with links to nothing": (links_to_nothing, "step-000000008.json is a link to /not/mounted"),
    "without checkpoints": (no_checkpoints, "events/ tells of saved step 8"),
    "with EMA weights alone": (ema_alone, r"ema-000000008\.safetensors has no checkpoint"),
    "with metrics alone": (metrics_alone, "tell of step 8, and no event of the life"),
    "with a heartbeat alone": (heartbeat_alone, "tell of step 8, and no event of the life"),
    "without the events of its last life": (events_of_another_life, "tell of step 8, and no event of the life"),
    "with TensorBoard's files alone": (tensorboard_alone, "tb/ tells of a life"),
    "with a sample set alone": (a_sample_set, r"request\.json is of step 8"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = make_run(tmp_path_factory.mktemp("evidence") / "run")
    live(CONFIG, run)
    return run


def test_what_is_to_be_sampled_is_said_to_be_missing_and_not_to_be_untrained(finished: RunDir, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, run.path)
    no_manifests(run)
    with pytest.raises(RequestError, match=r"step-000000008\.pt has no manifest"):
        generations.choose(run)


@pytest.mark.parametrize("how", PARTIAL)
def test_a_partial_copy_is_not_begun_again_and_nothing_of_it_changes(
    finished: RunDir, tmp_path: Path, how: str
) -> None:
    run = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, run.path)
    damage, said = PARTIAL[how]
    damage(run)
    before = files_of(run)
    with pytest.raises(DoNotRetry, match=said), Life(CONFIG, run):
        pass
    assert files_of(run) == before


def test_lives_killed_before_their_first_save_begin_again_and_end_with_the_same_bits(tmp_path: Path) -> None:
    calm, run = make_run(tmp_path / "calm"), make_run(tmp_path / "killed")
    config = make_config(checkpoint__every_steps=6, log__every_steps=1, log__grid_every_steps=2)
    live(config, calm)
    for restart in range(2):
        with pytest.raises(Killed), Life(config, run, restart=restart) as life:
            life.train(kill_at=4)
    assert run.steps_saved() == [] and run.metrics.stat().st_size and list(run.grids.iterdir())
    live(config, run)
    assert_same_end(run, calm, 8)


def test_a_first_save_that_was_killed_before_its_manifest_is_begun_again(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(Killed), Life(CONFIG, run) as life:
        life.train(kill_at=2)
    killed_before_its_manifest(run, 3)
    live(CONFIG, run)
    assert not (run.checkpoints / "set-aside").exists()


def test_a_life_that_goes_on_from_an_older_step_than_was_saved_says_so_once_and_keeps_the_metrics(
    finished: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, run.path)
    for path in run.checkpoints.glob("*8.*"):
        path.unlink()
    before = run.metrics.read_bytes()
    for restart in (100, 101):
        with pytest.raises(Killed), Life(CONFIG, run, restart=restart) as life:
            life.train(kill_at=8)
    assert capsys.readouterr().out.count("a saved step is missing saved=8 going_on_from=6") == 1
    (kept,) = run.path.glob("metrics.past-000000006.*.jsonl")
    assert kept.read_bytes() == before
    live(CONFIG, run)
    assert_same_end(run, finished, 8)


def test_checkpoints_removed_under_a_life_are_no_rollback_to_step_0(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with Life(CONFIG, run) as life:
        life.train(stop_at=[3])
        shutil.rmtree(run.checkpoints)
        with pytest.raises(DoNotRetry, match="saved step 3"):
            life.trainer.roll_back()
