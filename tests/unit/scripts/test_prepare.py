"""launch/prepare.py: what a submission packs, where there is no room for it."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks
from ddpm.run.paths import RunDir
from launch import prepare
from launch.cluster.scheduler import SchedulerError
from launch.cluster.site import Site
from tests.training import make_config


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_its_place_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(prepare, "_pack", full)
    with pytest.raises(EnvironmentLacks, match=rf"No space left on device: {tmp_path}/\.cache: make room .* --root"):
        prepare.prepare_inputs(make_config(), Site(cluster="local"), tmp_path, [])


def test_a_run_is_idle_only_where_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jobs would go on with other code than they began with."""

    def unanswered(run: RunDir) -> str:
        raise SchedulerError("squeue: no answer")

    for at_work, idle in ((lambda run: "", True), (lambda run: "job 12 13", False), (unanswered, False)):
        monkeypatch.setattr(prepare, "_at_work", at_work)
        assert prepare.is_idle(RunDir(tmp_path)) is idle
