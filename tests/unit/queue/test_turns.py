"""launch/queue/turns.py: of several that submit a run at once, one at a time looks and queues."""

import errno
import fcntl
import os
import time
from multiprocessing import Process
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks
from ddpm.run.paths import RunDir
from launch.queue import turns


def add_one(run: RunDir, count: Path, locks: bool) -> None:
    """What loses a count where two do it at once."""
    if not locks:
        take_locks_away()
    for _ in range(5):
        with turns.turn(run):
            there = int(count.read_text())
            time.sleep(0.01)
            count.write_text(str(there + 1))


def take_locks_away() -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = none  # type: ignore[assignment]


@pytest.mark.parametrize("locks", [True, False])
def test_nobody_else_has_a_turn_within_one(tmp_path: Path, locks: bool) -> None:
    run, count = RunDir(tmp_path / "tiny"), tmp_path / "count"
    count.write_text("0")
    others = [Process(target=add_one, args=(run, count, locks)) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(60)
    assert count.read_text() == "15" and not run.path.exists()
    assert not list((tmp_path / ".cache" / "turns").glob("*.claim"))


@pytest.mark.parametrize("locks", [True, False])
def test_who_waits_says_so_once_and_gives_up_with_what_to_do_and_the_turn_stays_whose_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], locks: bool
) -> None:
    monkeypatch.setattr(turns, "PATIENCE_S", 0.1)
    monkeypatch.setattr(turns, "POLL_S", 0.01)
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    if not locks:
        take_locks_away()
    run = RunDir(tmp_path / "tiny")
    with turns.turn(run):
        for _ in range(2):
            with pytest.raises(EnvironmentLacks, match="another submission of tiny"), turns.turn(run):
                pass
            assert capsys.readouterr().err.count("waiting for it") == 1
    with turns.turn(run), turns.turn(RunDir(tmp_path / "other")):
        pass


def test_a_claim_that_was_left_behind_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fcntl.flock)
    take_locks_away()
    claim = tmp_path / ".cache" / "turns" / "tiny.claim"
    claim.mkdir(parents=True)
    os.utime(claim, (1, 1))
    with turns.turn(RunDir(tmp_path / "tiny")):
        assert claim.exists()
    assert not claim.exists()


def test_a_place_in_which_no_turn_can_be_waited_for_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / ".cache").touch()
    with (
        pytest.raises(EnvironmentLacks, match=r"\.cache/turns .*Not a directory.*--root"),
        turns.turn(RunDir(tmp_path / "tiny")),
    ):
        pass
