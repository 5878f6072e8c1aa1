"""What a run on disk relies on, where two hosts mount one NFS: tools/slurm_testbed/nfs.sh runs this, test_nfs.py that.

DDPM_NFS names a directory as each of the two sees it. A child process works for each host; none loads torch.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm.errors import RunBusy
from ddpm.run.claims import work_through
from ddpm.run.fence import Fence
from ddpm.run.files import read_bytes, write_bytes
from ddpm.run.paths import RunDir
from launch.queue.turns import turn

HOSTS = tuple(Path(path) for path in os.environ["DDPM_NFS"].split(":"))


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A folder of a test's own, as each host sees it."""
    name = f"{request.node.name[:40]}-{os.getpid()}"
    (HOSTS[0] / name / "runs" / "run").mkdir(parents=True)
    return HOSTS[0] / name, HOSTS[1] / name


@pytest.fixture
def children() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def child(children: list[int], work: Callable[[], object]) -> int:
    """A process that does `work`, and then sleeps; returns once it has done it."""
    done, tell = os.pipe()
    if not (pid := os.fork()):
        try:
            os.close(done)
            work()
            os.write(tell, b"1")
            time.sleep(600)
        finally:
            os._exit(1)
    children.append(pid)
    os.close(tell)
    assert os.read(done, 1) == b"1"
    os.close(done)
    return pid


def run_at(host: Path) -> RunDir:
    return RunDir(host / "runs" / "run")


def owner(job: str) -> dict[str, object]:
    return {"job": job, "restart": 0, "host": "n"}


def test_a_second_writer_on_the_other_host_is_refused_until_the_first_is_killed(
    hosts: tuple[Path, Path], children: list[int]
) -> None:
    first = child(children, lambda: Fence(run_at(hosts[0]), owner("1")))
    with pytest.raises(RunBusy, match="held by job 1"):
        Fence(run_at(hosts[1]), owner("2"), wait_s=1)
    os.kill(first, signal.SIGKILL)
    os.waitpid(children.pop(), 0)
    fence = Fence(run_at(hosts[1]), owner("2"), wait_s=5)
    assert fence.token == 2
    fence.check()
    fence.release()


def test_an_orphan_on_the_other_host_is_fenced_out_though_it_has_the_lock(hosts: tuple[Path, Path]) -> None:
    orphan = Fence(run_at(hosts[0]), owner("1"))
    heir = Fence(run_at(hosts[1]), owner("1"), wait_s=1, is_orphan=lambda _: True)
    with pytest.raises(RunBusy, match="taken over by a later job"):
        write_bytes(run_at(hosts[0]).path / "late", b"", may_publish=orphan.check)
    heir.check()
    assert not (run_at(hosts[0]).path / "late").exists()
    orphan.release()
    heir.release()


def test_what_was_published_stays_as_it_is_and_what_is_replaced_is_seen_at_once(hosts: tuple[Path, Path]) -> None:
    mine, theirs = hosts[0] / "a", hosts[1] / "a"
    assert not theirs.exists()  # which that host remembers
    write_bytes(mine, b"first")
    with pytest.raises(FileExistsError):
        write_bytes(theirs, b"second")
    assert read_bytes(theirs) == b"first"
    for number in range(20):
        write_bytes(mine, b"%d" % number, replace=True)
        assert read_bytes(theirs) == b"%d" % number
    assert sorted(path.name for path in hosts[1].iterdir()) == ["a", "runs"]


def test_parts_of_work_are_made_once_though_a_host_remembers_that_they_were_not_there(
    hosts: tuple[Path, Path],
) -> None:
    parts, begin = range(12), time.time() + 2

    def work(host: Path, name: str) -> None:
        def make(part: int) -> None:
            time.sleep(0.3)
            write_bytes(host / f"part-{part}", name.encode())
            write_bytes(host / f"made-{part}-by-{name}", b"")

        time.sleep(max(0.0, begin - time.time()))
        work_through(host, parts, lambda part: (host / f"part-{part}").exists(), make)

    pids = []
    for number, host in enumerate(hosts):
        if not (pid := os.fork()):
            code = 1
            try:
                work(host, f"n{number}")
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    made = sorted(path.name.split("-by-") for path in hosts[0].glob("made-*"))
    assert [name for name, _ in made] == sorted(f"made-{part}" for part in parts)
    assert {by for _, by in made} == {"n0", "n1"}


def test_submissions_of_a_run_take_turns(
    hosts: tuple[Path, Path], children: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [turn(run_at(host)) for host in hosts]
    first = child(children, turns[0].__enter__)
    assert not (hosts[0] / "runs" / ".cache" / "turns" / "run.claim").exists()
    signal.signal(signal.SIGALRM, lambda *_: os.kill(first, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, 2)
    began = time.monotonic()
    with turns[1]:
        assert time.monotonic() - began > 1.5
    assert "another submission of run is at work" in capsys.readouterr().err
