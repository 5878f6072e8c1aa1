"""Ranks in a real container, by the apptainer that tools/slurm_testbed/apptainer.sh brings: pre-empted, killed, scored.

The container mounts nothing by itself, and the runs are reached by a link in a home that is mounted: as ~/runs, which
leads to /scratch. It has none of SLURM's commands.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from launch.cluster.container import lines
from launch.cluster.site import Container
from tests.conftest import PROJECT, requires
from tests.draws import drawn
from tests.images import write_zip
from tests.slurm.test_life import TWO_RANKS, Site
from tools.slurm_testbed.harness import SlurmTestbed

APPTAINER = Path("/var/tmp/ddpm-apptainer")
PROFILE = """\
setup: ['export PATH={apptainer}/usr/bin:$PATH APPTAINER_CONTAIN=1']
container: {{image: {apptainer}/image, mounts: [{mounts}]}}
"""
SHORT = ["train.total_steps=100", "sample.num_samples=64", "sample.shards=2", "sample.steps=2", "--max-parallel", "1"]


def mounts(home: Path) -> tuple[str, ...]:
    """The Python of these tests as the image looks for it, where that lies, and a home."""
    return ("/usr", f"{sys.prefix}:/opt/python:ro", str(home))


@pytest.fixture(scope="module")
def site(testbed: SlurmTestbed) -> Site:
    made = subprocess.run(
        [PROJECT / "tools" / "slurm_testbed" / "apptainer.sh", APPTAINER], capture_output=True, text=True
    )
    lacks = (made.stderr.strip().splitlines() or ["apptainer.sh failed"])[-1]
    requires(made.returncode == 0, lacks, "tools/slurm_testbed/apptainer.sh --help says what it needs")
    images, scratch = write_zip(testbed.workdir / "contained.zip"), testbed.mkdir("scratch")
    images.chmod(0o644)
    home = testbed.mkdir("contained-home")
    (home / "runs").symlink_to(scratch)
    profile = PROFILE.format(apptainer=APPTAINER, mounts=", ".join(mounts(home)))
    (testbed.workdir / "contained.yaml").write_text(profile)
    return Site(testbed, home / "runs", images)


def ranks_inside(run: RunDir) -> list[int]:
    """The processes of the container's own Python that work on the run."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (proc / "cmdline").read_bytes()
            if command.startswith(b"python\0") and os.fsencode(run.path) in command:
                found.append(int(proc.name))
    return found


@pytest.mark.long
@pytest.mark.parametrize("via", drawn("in a container, via", ["submitit", "sbatch"], 1))
def test_ranks_in_a_container_are_pre_empted_and_killed_and_a_score_is_there_in_the_end(site: Site, via: str) -> None:
    name, bed = f"contained-{via}", site.bed
    words = ["--profile", str(bed.workdir / "contained.yaml"), *TWO_RANKS, *SHORT, "--via", via]
    train, *others = site.submit(name, *words, "--then", "sample,evaluate")
    run = site.run_dir(name)
    site.wait_logged(name, 2)
    bed.preempt(bed.node_of(train) or "", 2)
    site.wait_running(train, 1)
    site.wait_logged(name, 2)
    os.kill(ranks_inside(run)[1], signal.SIGKILL)
    for job in (train, *others):
        assert bed.wait_state(job, timeout_s=150) == "COMPLETED", site.log(name)
    events = read_events(run)
    (stop,) = (e for e in events if e["event"] == "stop_requested")
    assert stop["reason"] == "preempted"
    assert next(e for e in events if e["event"] == "resumed")["step"] == stop["step"]
    told = [e["reason"] for e in events if e["event"] == "requeued"]
    assert len(told) == 2 and told[0] == "preempted" and told[1] != "preempted", told
    assert len(list(run.eval.glob("*.json"))) == 1


def test_a_stop_signal_waits_until_a_rank_in_a_container_listens(site: Site) -> None:
    home = site.root.parent
    begin = lines(Container(image=f"{APPTAINER}/image", mounts=mounts(home)), [site.root])
    asked = "import os, signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), os.listdir(os.sys.argv[1]))"
    rank = f'bash "$DDPM_HOME/slurm/rank.sh" "${{ddpm_python[@]}}" -c \'{asked}\' {site.root}'
    env = {"DDPM_HOME": str(PROJECT), "PATH": f"{APPTAINER}/usr/bin:/usr/bin:/bin"}
    there = site.root / "there"
    there.touch()
    done = site.bed.run(["bash", "-c", "\n".join([*begin, rank])], env={**env, "APPTAINER_CONTAIN": "1"})
    assert done.stdout.split(" [")[0] == str([signal.SIGUSR2, signal.SIGTERM]), done.stdout + done.stderr
    assert "'there'" in done.stdout
