"""launch/cluster/container.py: ranks in a container, by both ways; srun, which would start them, is played here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm.config.section import build
from ddpm.errors import EnvironmentLacks, RequestError
from ddpm.run.paths import RunDir
from launch.cluster import by_submitit, code
from launch.cluster.container import check_image, lent_by_a_process, lines
from launch.cluster.environment import PROJECT
from launch.cluster.job import Job
from launch.cluster.settling import settle
from launch.cluster.site import Container, Site
from launch.queue import directory


def started(run: RunDir, via: str, site: Site) -> list[str]:
    """The words that srun gets in a batch shell of a training job, behind those that say where it writes."""
    script = PROJECT / "slurm" / "train.sbatch"
    if via == "submitit":
        script = run.path / "script.sh"
        script.write_text(by_submitit.script_text(Job("train", run, site)))
    played = run.path / "bin" / "srun"
    played.parent.mkdir(exist_ok=True)
    played.write_text('#!/bin/bash\nprintf \'%s\\n\' "$@" >"$DDPM_RUN/words"\n')
    played.chmod(0o755)
    env = {"PATH": f"{played.parent}:/usr/bin:/bin", "SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(PROJECT)}
    env["DDPM_PYTHON"] = sys.executable
    done = subprocess.run(["bash", str(script), str(run.path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    words = (run.path / "words").read_text().splitlines()[:-1]  # what the entry is told
    begin = next(i for i, word in enumerate(words) if word == "bash" or word.startswith("--container"))
    return words[begin:]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(code, "home", lambda run: PROJECT)
    run = RunDir(tmp_path / "my runs" / "tiny")
    run.logs.mkdir(parents=True)
    run.config.touch()
    run.run_json.write_text(json.dumps({"data": {"cache": str(run.path.parent / ".cache" / "data")}}))
    return run


@pytest.mark.parametrize("via", ["submitit", "sbatch"])
@pytest.mark.parametrize("runtime", ["", "apptainer", "pyxis"])
def test_ranks_start_in_the_container_and_the_batch_shell_outside(run: RunDir, via: str, runtime: str) -> None:
    image = run.path.parent / "torch.sif"
    image.touch()
    profile = {"image": str(image), "runtime": runtime, "mounts": ("/scratch:/s:ro",)}
    site = Site(container=Container(**profile)) if runtime else Site()
    directory.use_shell_of(run, site)
    words = started(run, via, site)
    binds = ",".join([*(f"{place}:{place}" for place in (run.path.parent, PROJECT)), "/scratch:/s:ro"])
    rank = ["bash", str(PROJECT / "slurm" / "rank.sh")]
    enter = ["apptainer", "exec", "--nv", "--bind", binds, str(image), "/bin/sh", rank[1]]
    inside = {"": [sys.executable], "pyxis": ["python"], "apptainer": [*enter, "python"]}[runtime]
    options = [f"--container-image={image}", f"--container-mounts={binds}"] if runtime == "pyxis" else []
    entry = ["-u", "-m", "submitit.core._submit"] if via == "submitit" else ["-m", "launch.jobs", "train"]
    assert words == [*options, *rank, *inside, *entry]
    assert (run.path / "container.sh").exists() == bool(runtime)


def test_a_site_without_one_takes_a_runs_container_away(run: RunDir) -> None:
    for site in (Site(container=Container(image="docker://a/b:1")), Site()):
        directory.use_shell_of(run, site)
        assert (run.path / "container.sh").exists() == (site.container.image is not None)


def on_a_node(container: Container, needed: list[Path]) -> list[str]:
    """What a batch shell makes of the lines."""
    script = "\n".join(["set -eu", *lines(container, needed), 'printf "%s\\n" "${ddpm_python[@]}"'])
    env = {"DDPM_HOME": "/home of code", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_paths_of_the_profile_may_have_variables_and_come_through_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/a b/$(touch x)")
    container = Container(image="$PLACE/x.sif", mounts=("$PLACE:/data", "$PLACE"))
    words = on_a_node(container, [])
    there = "/a b/$(touch x)"
    assert words[4:6] == [f"{PROJECT}:{PROJECT},{there}:/data,{there}:{there}", f"{there}/x.sif"]
    monkeypatch.delenv("PLACE")
    with pytest.raises(EnvironmentLacks, match=r"PLACE.* is not set"):
        lines(container, [])


def test_what_a_link_leads_to_is_mounted_too_and_what_is_gone_is_left_out(tmp_path: Path) -> None:
    real = tmp_path / "scratch" / "my runs"
    real.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "runs").symlink_to(real)
    binds = on_a_node(Container(image="x"), [tmp_path / "home" / "runs", tmp_path / "gone", real])[4].split(",")
    assert sorted(binds) == sorted(f"{place}:{place}" for place in (PROJECT, tmp_path / "home" / "runs", real))


@pytest.mark.parametrize(("profile", "told"), [
    ({"image": "/nowhere/x.sif"}, "no such file.*docker://"),
    ({"image": "x", "mounts": ["/a,/b"]}, "without commas"),
    ({"image": "x", "mounts": ["/a:b"]}, "FROM:TO"),
    ({"image": "x", "runtime": "docker"}, "'apptainer' or 'pyxis'"),
    ({"image": "x\ny"}, "one line"),
    ({"imagee": "x"}, "container.image"),
    ({"image": "x", "mounts": "/a"}, "container.mounts"),
])  # fmt: skip
def test_a_container_that_cannot_be_meant_is_refused(profile: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        check_image(build(Site, {"container": profile}, "profile x").container)


def test_a_path_that_cannot_be_mounted_is_named() -> None:
    with pytest.raises(RequestError, match=r"/runs/a,b: .*another place"):
        lines(Container(image="x"), [Path("/runs/a,b")])


def test_on_this_machine_a_container_is_left_out_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    settle(Site(cluster="local", container=Container(image="/nowhere/x.sif")), dry_run=False)
    assert "container is for SLURM's jobs" in capsys.readouterr().err


MOUNTS = """\
{root} {at} {type} ro,nosuid,nodev,relatime,user_id=65534,group_id=65534,allow_other 0 0
overlay / overlay rw,lowerdir=/a,upperdir=/b,workdir=/c 0 0
"""


@pytest.mark.parametrize(("root", "kind", "warned"), [
    ("squashfuse_ll", "fuse.squashfuse_ll", True), ("fuse-overlayfs", "fuse.fuse-overlayfs", True),
    ("/dev/loop0", "squashfs", False), ("x:/y", "fuse.sshfs", False),
])  # fmt: skip
def test_an_image_that_a_process_of_the_job_mounts_is_warned_of(
    tmp_path: Path, root: str, kind: str, warned: bool
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.format(root=root, at="/var/apptainer/mnt/session/rootfs", type=kind))
    said = lent_by_a_process(tmp_path / "mounts")
    assert (f"come through {root}, which SLURM's stop signals end" in said) == warned == bool(said)
    assert lent_by_a_process(tmp_path / "none") == ""
