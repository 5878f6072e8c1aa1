"""launch/queue/directory.py: what a later submission may change of a run's record."""

from pathlib import Path
from typing import Any

import pytest

from ddpm.errors import RequestError
from ddpm.run.paths import RunDir
from ddpm.run.records import data_of
from launch.cluster.site import Site
from launch.queue import directory
from tests.training import make_config


def test_a_run_keeps_its_test_split_and_a_submission_with_another_is_refused(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path / "run"), make_config()
    data = {"cache": str(tmp_path), "digest": "d"}

    def record(**test: str) -> dict[str, Any]:
        inputs = {"data": {**data, **({"test": test} if test else {})}, "labels": {}}
        return directory.describe(config, Site(), run, inputs)

    directory.create_run(run, config, record())
    for given, kept in (
        (record(key="k", digest="t"), "k"),  # from the first that validates on
        (record(), "k"),  # without validation
        (record(key="touched", digest="t"), "touched"),
    ):
        directory.update_run(run, config, given)
        assert data_of(run)["test"] == {"key": kept, "digest": "t"}
    frozen = run.run_json.read_bytes()
    with pytest.raises(RequestError, match=r"run run was validated on another test split \(digest t, now other\)"):
        directory.update_run(run, config, record(key="k2", digest="other"))
    assert run.run_json.read_bytes() == frozen
