"""launch/board.py: runs by their names, and nothing of them but what TensorBoard is to read."""

from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks
from ddpm.run.paths import RunDir
from launch import board


def test_runs_are_shown_by_their_names_and_those_of_an_earlier_board_no_more(tmp_path: Path) -> None:
    a, b = (RunDir(tmp_path / "my runs" / name) for name in ("a", "b"))
    (a.tensorboard / "scores").mkdir(parents=True)
    where = tmp_path / "links" / "board-6006"
    board.link([b], where)
    board.link([a], where)
    assert [p.name for p in where.iterdir()] == ["a"] and (where / "a" / "scores").is_dir()
    (where.parent / "board-6007").write_text("")
    with pytest.raises(EnvironmentLacks, match=r"cannot write .*board-6007.*TMPDIR"):
        board.link([a], where.parent / "board-6007")
