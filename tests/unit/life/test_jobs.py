"""launch/jobs.py and the lives behind it: which exit code a job leaves with, and what its ranks do together."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from ddpm.data import packed, scratch
from ddpm.errors import EXIT_FATAL, DoNotRetry, NodeUnfit, RanksLost, Stopped
from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from ddpm.run.stopping import StopRequested
from ddpm.training.ranks import World
from ddpm.training.trainer import Outcome
from launch import jobs
from launch.cluster import environment
from launch.cluster.environment import PROJECT, JobEnvironment
from launch.life import compiled, devices, inputs, pace, sampling, training
from launch.life.life import Life
from launch.life.preemption import StopFlag
from launch.queue.chain import lift_stop
from tests import forked
from tests.training import ALONE, make_config, make_run, on_ranks


@pytest.fixture
def on_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """One life's compiling there, in a folder of its own: on_a_node(run, work, kind=, anew=)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)

    def life(
        run: RunDir, work: Callable[[Path], Any], *, kind: str = "here", main: bool = True, anew: Any = True
    ) -> Any:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        compiled.choose_folder()
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        asked = anew if callable(anew) else lambda grown: anew
        try:
            check = (lambda: None) if main else None
            with compiled.compiling(run, kind, world=ALONE, may_publish=check, anew=asked):
                return work(folder)
        finally:
            compiled.leave()
            assert not folder.exists()

    return life


def test_what_a_life_compiled_is_one_file_of_the_run_and_half_of_one_is_never_found(
    tmp_path: Path, on_a_node: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")

    def build(folder: Path) -> None:
        (folder / "ab").mkdir()
        (folder / "ab" / "kernel.so").write_bytes(b"whole" * 1000)
        (folder / "ab" / "busy.lock").touch()

    def found(folder: Path) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != ".lock")

    def die(folder: Path) -> None:
        build(folder)
        raise OSError("file too short")

    with pytest.raises(OSError, match="short"):
        on_a_node(run, die)
    on_a_node(run, build, main=False)
    on_a_node(run, build, anew=None)  # a stop came first
    assert not run.compiled.exists()
    on_a_node(run, build)
    assert "compiled code: compiled anew" in capsys.readouterr().out
    assert on_a_node(run, found, anew=False) == ["ab/kernel.so"]
    assert "compiled code: from the run's file" in capsys.readouterr().out
    whole = run.compiled.read_bytes()
    assert on_a_node(run, found, kind="another GPU") == []
    assert "another kind of node" in capsys.readouterr().out
    for harmed in (
        whole[:-100],
        whole[:40],
        whole[:-200] + b"?" + whole[-199:],
        b"",
        whole.replace(b"sha256", b"sha512"),
    ):
        run.compiled.write_bytes(harmed)
        assert on_a_node(run, found) == []
        assert "damaged" in capsys.readouterr().out


def test_what_a_killed_life_left_on_a_node_is_removed_and_what_a_living_one_has_is_not(
    tmp_path: Path, on_a_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, flock = tmp_path / "node", fcntl.flock

    def beside_another(lock: Any, how: int) -> None:
        """Another rank looks around in the moment before the lock."""
        if how == fcntl.LOCK_EX:
            compiled._remove_left(node)
        flock(lock, how)

    for name in ("dead", "alive"):
        (node / f"{compiled.PREFIX}{name}").mkdir()
        (node / f"{compiled.PREFIX}{name}" / ".lock").touch()
    with (node / f"{compiled.PREFIX}alive" / ".lock").open("ab") as lock:
        flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", beside_another)
        on_a_node(make_run(tmp_path / "run"), lambda folder: (folder / ".lock").stat(), anew=None)
    assert [p.name for p in node.iterdir()] == [f"{compiled.PREFIX}alive"]


def test_where_the_nodes_own_folder_takes_no_code_or_has_no_room_another_is_taken(
    tmp_path: Path, on_a_node: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, node, other = make_run(tmp_path / "run"), tmp_path / "node", tmp_path / "other"
    other.mkdir()
    noexec, full = {node}, set[Path]()

    def statvfs(path: Path) -> SimpleNamespace:
        return SimpleNamespace(f_flag=os.ST_NOEXEC if path in noexec else 0, f_blocks=9, f_bavail=path not in full)

    monkeypatch.setattr(os, "statvfs", statvfs)

    def place() -> Path:
        found: Path = on_a_node(run, lambda folder: folder.parent, anew=None)
        return found

    monkeypatch.setattr(compiled, "ELSEWHERE", (str(tmp_path / "missing"), str(other)))
    assert place() == other
    noexec.add(other)
    assert place() == node  # there is no better one
    noexec.clear()
    assert place() == node
    monkeypatch.chdir(node)  # what Python takes where all others are full: there lies the run's code
    assert place() == other
    monkeypatch.setattr(compiled, "ELSEWHERE", (str(tmp_path), str(other)))
    full.add(tmp_path)  # as of one disk with it
    assert place() == other


@pytest.mark.parametrize("name", ["norm.cubin", "norm.hsaco"])
def test_kernels_are_known_by_what_is_new_in_the_folder(
    tmp_path: Path, on_a_node: Callable[..., Any], name: str
) -> None:
    run, grown = make_run(tmp_path / "run"), []

    def kernel(folder: Path) -> None:
        (folder / "triton" / "ab").mkdir(parents=True, exist_ok=True)
        (folder / "triton" / "ab" / name).write_text("whole")

    def asked(new: bool) -> bool:
        grown.append(new)
        return new

    for _ in range(2):
        on_a_node(run, kernel, anew=asked)
    assert grown == [True, False]


def compile_for_its_gpu(world: World, run: RunDir, node: Path) -> None:
    """Each rank has code of its own, and says what it found of it."""
    tempfile.tempdir = str(node / str(world.rank))
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch has said where, as it was loaded before
    compiled.choose_folder()
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    code, check = folder / f"cuda-{world.rank}.py", (lambda: None) if world.is_main else None
    before = []
    with compiled.compiling(run, "here", world=world, may_publish=check, anew=lambda grown: not before[0]):
        before.append(code.exists())
        code.write_text("whole")
    (run.path / f"{world.rank}-{'again' if before[0] else 'first'}").touch()
    world.barrier()  # ranks of a node outlive the packing of what they compiled
    compiled.leave()


def test_the_file_holds_what_all_ranks_of_a_node_compiled(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for rank in "01":
        (tmp_path / rank).mkdir()
    for when in ("first", "again"):
        on_ranks(2, compile_for_its_gpu, run, tmp_path)
        assert sorted(p.name for p in run.path.glob("?-*")) == [f"0-{when}", f"1-{when}"]
        for p in run.path.glob("?-*"):
            p.unlink()


HOLDS = SimpleNamespace(held=lambda: StopFlag.held(None))  # type: ignore[arg-type]


def test_no_stop_signal_reaches_what_is_built_to_see_whether_it_can_be(tmp_path: Path) -> None:
    blocked, resolve = [], training.device.resolve

    def noted(*given: Any) -> Any:
        blocked.append(signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return resolve(*given)

    world = SimpleNamespace(is_main=False, device=torch.device("cpu"), broadcast=lambda value: value)
    life = SimpleNamespace(run=make_run(tmp_path), env=SimpleNamespace(cpus=2), stop=HOLDS)
    with mock.patch.object(training.device, "resolve", noted), mock.patch.object(training.device, "apply"):
        training._resolved(life, make_config(), world, None)  # type: ignore[arg-type]
    assert blocked[0] and signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_in_a_runs_first_life_all_ranks_compute_as_rank_0_found(tmp_path: Path) -> None:
    run, of_rank_0 = make_run(tmp_path / "run"), {"amp": "bf16", "deterministic": False, "threads": 7, "kernels": "own"}
    answers = iter([None, of_rank_0])
    world = SimpleNamespace(is_main=False, device=torch.device("cpu"), broadcast=lambda value: next(answers))
    life = SimpleNamespace(run=run, env=SimpleNamespace(cpus=2), stop=HOLDS)
    with mock.patch.object(training.devices, "check_precision"), mock.patch.object(training.device, "apply"):
        found = training._resolved(life, make_config(), world, None)  # type: ignore[arg-type]
    assert {k: getattr(found, k) for k in of_rank_0} == of_rank_0


@pytest.mark.parametrize(("deterministic", "users", "found"), [
    (True, None, "0"), (True, "1", "1"), (False, None, None),
])  # fmt: skip
def test_switches_that_sum_in_any_order_are_left_out_of_a_deterministic_run_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool, users: str | None, found: str | None
) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", users or "")
    if users is None:
        monkeypatch.delenv("NCCL_NVLS_ENABLE")
    life = SimpleNamespace(run=make_run(tmp_path), env=SimpleNamespace(cpus=2), stop=HOLDS)
    config = make_config(train__deterministic=deterministic)
    world = SimpleNamespace(is_main=False, device=torch.device("cpu"), broadcast=lambda value: value)
    with mock.patch.object(training.device, "apply"):
        training._resolved(life, config, world, None)  # type: ignore[arg-type]
    assert os.environ.get("NCCL_NVLS_ENABLE") == found


def test_a_run_that_goes_on_with_another_torch_or_on_another_gpu_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    world = SimpleNamespace(is_main=True, device=torch.device("cpu"), broadcast=lambda value: value)
    life = SimpleNamespace(run=run, env=SimpleNamespace(cpus=2), stop=HOLDS)
    here = {"torch": torch.__version__, "device": "cpu"}
    for first, told in (
        ({}, []),
        (here, []),
        ({"torch": "2.6.0"}, [f"torch {torch.__version__} goes on where 2.6.0 began"]),
        ({**here, "device": "NVIDIA A100"}, ["cpu goes on where NVIDIA A100 began"]),
        ({**here, "cpu": "Z80"}, [f"a CPU with {torch.backends.cpu.get_cpu_capability()} goes on where Z80 began"]),
    ):
        run.run_json.write_text(json.dumps({"resolved": {"amp": "off", "threads": 1, **first}}))
        with mock.patch.object(training.device, "apply"):
            training._resolved(life, make_config(), world, None)  # type: ignore[arg-type]
        said = capsys.readouterr().out
        assert said.count("goes on where") == len(told) and all(words in said for words in told)


def test_the_compiler_itself_finds_what_another_node_compiled(
    tmp_path: Path, on_a_node: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")

    def compile_it(folder: Path) -> torch.Tensor:
        torch.use_deterministic_algorithms(True)  # as lives that compile say it, whatever was said here before
        torch.compiler.reset()
        counters.clear()
        work = torch.compile(lambda x: x @ x, options={"cpp.simdlen": 1})  # which needs no g++
        with mock.patch.object(inductor_config, "compile_threads", 1):
            return work(torch.arange(9.0).view(3, 3))

    first = on_a_node(run, compile_it, anew=lambda grown: training._compiled_anew())
    again = on_a_node(run, compile_it, anew=lambda grown: training._compiled_anew())
    assert torch.equal(first, again) and counters["inductor"]["fxgraph_cache_hit"] == 1
    told = capsys.readouterr().out
    assert told.index("compiled anew") < told.index("from the run's file")


# ---------------------------------------------------------------- data


def work_for(seconds: float, then: Any) -> Callable[..., Any]:
    """Work that asks every fifth of a second whether to stop."""

    def work(*_: Any, stop_requested: StopRequested, **__: Any) -> Any:
        for _ in range(int(seconds * 5)):
            time.sleep(0.2)
            if reason := stop_requested():
                raise Stopped(reason)
        return then

    return work


def leave_though_the_other_has_died(world: World, run: RunDir) -> None:
    if world.rank == 1:
        os._exit(0)
    env = JobEnvironment("slurm", "17", 0, "n1", world.rank, world.world_size, world.rank, "", 0, 1, None, "")
    args = jobs.parse(["train", str(run.path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.os, "_exit", lambda code: None)
        patch.setattr(jobs, "begin", lambda run: Life(run, StopFlag(), env))
        patch.setattr(jobs, "work", lambda life, args: _left(life, world))
        jobs.main([args.stage, str(args.run)])
    assert run.exit_marker("17", 0).read_text() == "75 time_limit"


def _left(life: Life, world: World) -> int:
    with world.heeded():
        return training._leave_together(life, world, 75, "time_limit")


def test_what_rank_0_said_as_it_left_stands_though_another_rank_dies_then(run: RunDir) -> None:
    on_ranks(2, leave_though_the_other_has_died, run, timeout_s=10)


def leave_after_a_failed_save(world: World, run: RunDir) -> None:
    def train(*_: Any) -> Outcome:
        time.sleep(world.is_main)  # as where it ends its page on a server
        return Outcome(False, 3, "preempted", saved=False)

    env = JobEnvironment("slurm", "17", 0, "n1", world.rank, world.world_size, world.rank, "", 0, 1, None, "")
    trainer: Any = SimpleNamespace(warm=True, train=train)
    assert training._until_the_end(Life(run, StopFlag(), env), world, trainer, None) == 1
    assert run.exit_marker("17", 0).read_text() == "1 save_failed"


def test_no_rank_leaves_a_failed_save_before_rank_0_has_said_so(run: RunDir) -> None:
    on_ranks(2, leave_after_a_failed_save, run, timeout_s=10)


def test_a_rank_0_that_lost_another_leaves_it_to_srun_to_say_how_that_one_ended(run: RunDir) -> None:
    """As with 78, do not retry, where the other alone had no room for its images."""
    life = Life(run, StopFlag(), JobEnvironment("slurm", "17", 0, "n1", 0, 2, 0, "n1", 1, 1, None, ""))
    assert jobs.told(life, "train", RanksLost("rank 0 lost its connection to another, and ends: x")) == 1
    assert not run.exit_marker("17", 0).exists()


def life_on(world: World, run: RunDir, stops_after: int) -> Life:
    """One that is told to stop on its second rank, when it has been asked so often."""
    asked = iter(range(1000))

    def stop() -> str | None:
        return "preempted" if world.rank == 1 and next(asked) >= stops_after else None

    where = ("n1", world.rank, world.world_size, world.rank, "", 0, 1, None, "")
    return Life(run, stop, JobEnvironment("local", "1", 0, *where))  # type: ignore[arg-type]


def open_on_rank(world: World, run: RunDir, key: str, stops_after: int) -> None:
    packed.pack = work_for(6, (key, None))  # type: ignore[assignment]
    scratch.copy_to_scratch = work_for(6, None)  # type: ignore[assignment]
    try:
        answer = inputs.packed_data(life_on(world, run, stops_after), make_config(), world).digest
    except Stopped as e:
        answer = e.reason
    (run.path / str(world.rank)).write_text(answer)


def stop_on_a_full_disk(world: World, run: RunDir, key: str) -> None:
    """The copy hears of the stop, and its file cannot be closed: both ranks must take it for a stop all the same."""

    def copy(*_: object, stop_requested: StopRequested, **__: object) -> None:
        while not stop_requested():
            pass
        raise OSError(28, "No space left on device")

    scratch.copy_to_scratch = copy  # type: ignore[assignment]
    try:
        answer = inputs.packed_data(life_on(world, run, 3), make_config(), world).digest
    except Stopped as e:
        answer = str(world.broadcast(e.reason))
    (run.path / str(world.rank)).write_text(answer)


def test_a_copy_that_fails_as_it_is_stopped_leaves_no_rank_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    key, there = packed.pack(make_config().data, "train", tmp_path / "cache")
    data = {"cache": str(tmp_path / "cache"), "key": key, "digest": there.digest, "scratch": str(tmp_path / "scratch")}
    run.run_json.write_text(json.dumps({"data": data}))
    on_ranks(2, stop_on_a_full_disk, run, key, timeout_s=10)
    assert [(run.path / rank).read_text() for rank in "01"] == ["preempted", "preempted"]


@pytest.mark.parametrize("slow", ["packing", "copying to scratch"])
@pytest.mark.parametrize("stops_after", [999, 5])
def test_ranks_wait_for_the_one_that_brings_the_data_longer_than_they_wait_for_any_other(
    tmp_path: Path, slow: str, stops_after: int
) -> None:
    run = make_run(tmp_path / "run")
    key, there = packed.pack(make_config().data, "train", tmp_path / "cache")
    data = {"cache": str(tmp_path / "cache"), "key": key, "digest": there.digest, "scratch": str(tmp_path / "scratch")}
    if slow == "packing":
        data |= {"key": "gone", "scratch": None}
    run.run_json.write_text(json.dumps({"data": data}))
    on_ranks(2, open_on_rank, run, key, stops_after, timeout_s=4)
    answer = there.digest if stops_after == 999 else "preempted"
    assert [(run.path / rank).read_text() for rank in "01"] == [answer, answer]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(("maker", "cuda", "hip", "told"), [
    ("NVIDIA", "13.0", None, "is the driver as new"), ("AMD", None, "6.4", "is the driver as new"),
    ("NVIDIA", None, "6.4", "and they are NVIDIA's"), ("AMD", "13.0", None, "and they are AMD's"),
    ("AMD", None, None, "is its CPU build"),
])  # fmt: skip
def test_a_job_that_was_given_a_gpu_does_not_go_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str, cuda: str | None, hip: str | None, told: str
) -> None:
    monkeypatch.setenv("SLURM_STEP_GPUS", "0")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    env, cpu = environment.current(), torch.device("cpu")
    there = {name: tmp_path / name for name in devices.DRIVERS}
    devices.check(env, cpu, there)  # given by name only, as on a testbed
    (there[maker] / "0000:01:00.0").mkdir(parents=True)
    with pytest.raises(NodeUnfit, match=f"torch cannot use them.*{told}"):
        devices.check(env, cpu, there)
    monkeypatch.delenv("SLURM_STEP_GPUS")
    devices.check(env, cpu, there)  # none was asked for


@pytest.mark.parametrize(("error", "told"), [
    ("CUDA error: no kernel image is available for execution on the device\nFor debugging",
     r"a Tesla V100: .* on the device \(it is sm_70, and this torch for sm_75 sm_80\): README, Installing"),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\n", r"a Tesla V100: .* busy or unavailable$"),
])  # fmt: skip
def test_a_gpu_on_which_torch_computes_nothing_is_told_in_a_sentence_before_anything_else(
    monkeypatch: pytest.MonkeyPatch, error: str, told: str
) -> None:
    def fails(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError(error)

    monkeypatch.setattr(torch, "ones", fails)
    for name, value in {"get_device_name": "Tesla V100", "get_device_capability": (7, 0)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(NodeUnfit, match=told):
        devices.check(environment.current(), torch.device("cuda"))


@pytest.mark.parametrize(("visible", "gpu"), [(4, 2), (1, 0)])
def test_a_rank_computes_on_its_own_gpu_and_what_names_none_is_meant_for_it(
    monkeypatch: pytest.MonkeyPatch, visible: int, gpu: int
) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(devices, "_fault", lambda device: "")
    env = replace(environment.current(), local_rank=2)
    assert [devices.one_device(env)] == chosen == [torch.device("cuda", gpu)]


@pytest.mark.parametrize(("others", "told"), [
    ([("n1", "GPU-b"), ("n2", "GPU-a"), ("n2", "GPU-c")], None),
    ([("n1", "GPU-b"), ("n2", "GPU-a"), ("n2", "GPU-a")], (DoNotRetry, r"ranks 2 and 3 .* one GPU of n2: .*--gpus")),
    ([("n1", ""), ("n2", ""), ("n2", "GPU-c")], (NodeUnfit, r"no GPU on rank 1 \(n1, n2\)")),
    ([("n2", "GPU-0"), ("n3", "GPU-0"), ("n1", "MIG 0 1")], None),  # by where they are
    ([("n1", "MIG 0 1"), ("n2", "MIG 0 2"), ("n1", "MIG 0 1")], (DoNotRetry, r"ranks 1 and 3 .* n1: .*MIG.* whole")),
])  # fmt: skip
def test_ranks_that_share_a_gpu_or_of_which_some_have_none_are_told_of_it_before_they_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, others: list[tuple[str, str]], told: tuple[type[Exception], str] | None
) -> None:
    monkeypatch.setattr(devices, "_identity", lambda device: "GPU-0")
    monkeypatch.setattr(devices, "name_of", lambda device: "H100")
    gpu = torch.device("cuda", 0)
    world = SimpleNamespace(
        world_size=4, device=gpu, is_main=True, all_of=lambda own: [own, *((*other, own[2]) for other in others)]
    )
    with pytest.raises(told[0], match=told[1]) if told else contextlib.nullcontext():
        devices.check_apart(world, "n1")  # type: ignore[arg-type]
    here = SimpleNamespace(world_size=4, device=torch.device("cpu"), is_main=True, all_of=lambda own: [own] * 4)
    devices.check_apart(here, "n1")  # type: ignore[arg-type]


def test_ranks_on_nodes_of_other_kinds_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, one = torch.device("cpu"), devices.kind(torch.device("cpu"))
    for cpus, told in (("AVX2", ""), ("AVX512", "rank 0 on n1: cpu, 2.9, AVX2; rank 1 on n2: cpu, 2.9, AVX512. Ask")):
        kinds = [{**one, "torch": "2.9", "cpu": of} for of in ("AVX2", cpus, cpus)]
        ranks = [(f"n{rank + 1}", "", kind) for rank, kind in enumerate(kinds)]
        world = SimpleNamespace(world_size=3, device=cpu, is_main=True, all_of=lambda own, ranks=ranks: ranks)
        devices.check_apart(world, "n1")  # type: ignore[arg-type]
        said = capsys.readouterr().out
        assert told in said and bool(told) == bool(said)


def test_gpus_that_have_no_uuid_of_their_own_or_several_are_told_apart_by_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [SimpleNamespace(uuid="0", pci_bus_id=bus) for bus in (1, 2, 2)]
    found += [SimpleNamespace(uuid=uuid) for uuid in "12"]  # torch before 2.8 does not say where
    name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    found += [SimpleNamespace(uuid=uuid, name=name, pci_bus_id=bus) for uuid, bus in (("3", 1), ("4", 1), ("5", 2))]
    found += [SimpleNamespace(uuid=uuid, name=name) for uuid in "67"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: found[gpu.index])
    told = [devices._identity(torch.device("cuda", i)) for i in range(10)]
    assert [told.index(one) for one in told] == [0, 1, 1, 3, 4, 5, 5, 7, 8, 9]


def test_a_stale_handle_on_the_stop_file_is_no_stop_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, polled = StopFlag(), []

    def stale(path: Path, **options: Any) -> Any:
        polled.append(path)
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    stop.watch(RunDir(tmp_path))
    with monkeypatch.context() as m:
        m.setattr(os, "lstat", stale)
        assert stop() is None
    assert polled == [tmp_path / "STOP"]


def test_bf16_on_a_cpu_or_a_gpu_without_it_is_refused_in_words_and_elsewhere_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env, cpu, gpu = environment.current(), torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    for device, told in ((cpu, "the CPU of .* has not.*train.amp=off"), (gpu, "the Tesla T4 of .*train.amp=fp16")):
        with pytest.raises(NodeUnfit, match=rf"bf16, which {told}.*--precision fp32"):
            devices.check_precision(env, device, "bf16", has_bf16=False)
        devices.check_precision(env, device, "bf16", has_bf16=True)
        for precision in ("fp32", "off", "fp16"):
            devices.check_precision(env, device, precision, has_bf16=False)


FAULTS = """
import resource
import sys

import torch

{begins}
for round in range(40):
    if round == 20:  # by then what lies between large blocks has its place
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16, 2**20)  # 64 MB: more than glibc keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, file=sys.stderr)
"""
JOB = """
from launch.cluster import environment
from launch.life import devices

devices.one_device(environment.current())
"""
IMAGES = """
from launch import evaluate

sys.argv = ["evaluate.py", "--images", "images", "--save-stats", "stats.npz", "--extractor", "pixels"]
assert evaluate.main() == 0
"""


@pytest.mark.parametrize("begins", [JOB, IMAGES], ids=["a job", "a score of images"])
def test_what_computes_on_a_cpu_does_it_in_memory_that_it_has_already(begins: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "images" / f"{i}.png")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", FAULTS.format(begins=begins)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    faults, blocks = int(done.stderr.split()[-1]), 20 * (64 << 20) // os.sysconf("SC_PAGE_SIZE")
    assert faults < blocks / 4


# ---------------------------------------------------------------- exit codes


def job(run: RunDir, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "DDPM_"))}
    command = [sys.executable, "-m", "launch.jobs", words[0], str(run.path), *words[1:]]
    env = {**kept, "DDPM_CPUS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    if "PYTHONPATH" in variables:  # it is about what is loaded
        return subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, timeout=120)
    return forked.run(command, PROJECT, env, timeout=120)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Prepared, and its cache lies where no directory can be made."""
    run = make_run(tmp_path / "run")
    run.config.write_text(make_config().to_yaml())
    (tmp_path / "file").touch()
    data = {"cache": str(tmp_path / "file" / "cache"), "key": "x", "digest": "x", "scratch": None}
    run.run_json.write_text(json.dumps({"data": data}))
    return run


@pytest.mark.parametrize(("asked", "gloo", "nccl"), [("ib0", "ib0", "ib0"), (None, "lo", None)])
def test_a_profiles_interface_goes_before_the_one_that_leads_to_rank_0_and_a_users_variable_before_both(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, gloo: str, nccl: str | None
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what is set here goes again
        monkeypatch.delenv(name)
    training._choose_network(asked, "127.0.0.1")
    assert (os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")) == (gloo, nccl)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    training._choose_network(asked, "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_what_this_node_lacks_another_life_may_find(run: RunDir) -> None:
    done = job(run, "train", SLURM_JOB_ID="17")
    assert done.returncode == 1 and "cannot write the data cache" in done.stdout and "data_cache" in done.stdout
    assert (
        run.exit_marker("17", 0).read_text().startswith("1 cannot write the data cache")
    )  # the reason, if it stays so


def test_on_this_machine_a_failure_is_told_by_the_job_itself(run: RunDir) -> None:
    assert job(run, "train", DDPM_JOB="local-1").returncode == 1
    run.run_json.unlink()
    assert job(run, "train", DDPM_JOB="local-2").returncode == 78
    failed = [e for e in read_events(run) if e["event"] == "failed"]
    assert [(e["job"], e["exit_code"]) for e in failed] == [("local-1", 1), ("local-2", 78)]


@pytest.mark.long
def test_a_task_says_which_shard_it_makes_before_it_can_fail(run: RunDir) -> None:
    array = {"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    assert job(run, "sample", "fid", "--offset", "1000", **array).returncode == 78  # nothing is trained
    assert (run.logs / ".shard-17_3").read_text() == "1003"
    assert run.exit_marker("17_3", 0).read_text() == "78 crash"
    assert job(run, "sample", "fid", "--shards", "0-5,9-12", "--tasks", "4", **array).returncode == 78
    assert (run.logs / ".shard-17_3").read_text() == "3,10"
    assert job(run, "sample", "fid", "--shard", "4", **array).returncode == 78  # as queued by older code
    assert (run.logs / ".shard-17_3").read_text() == "4"


def test_the_ranks_of_a_sampling_task_share_its_shards_and_answer_for_themselves(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[list[int], bool, int]] = []

    def sample(life: Life, name: str, shards: list[int]) -> int:
        made.append((shards, life.speaks, life.env.local_rank))
        return 0

    monkeypatch.setattr(sampling, "sample", sample)
    args = jobs.parse(["sample", str(run.path), "fid", "--shards", "0-9", "--tasks", "2"])
    for rank in range(3):
        env = JobEnvironment("slurm", "17_1", 0, "n1", rank, 3, rank, "n1", 1, 1, 1, "")
        jobs.work(Life(run, StopFlag(), env), args)
    assert made == [([1, 7], False, 0), ([3, 9], False, 1), ([5], False, 2)]
    assert (run.logs / ".shard-17_1").read_text() == "1,3,5,7,9"


@pytest.mark.parametrize(("code", "reason", "told"), [
    (75, "time_limit", "75 time_limit"), (75, "preempted", None), (0, "", None), (1, "", None)
])  # fmt: skip
def test_of_the_ranks_of_a_sampling_task_any_tells_that_its_time_is_up_and_none_what_else_befell_it(
    run: RunDir, code: int, reason: str, told: str | None
) -> None:
    """srun ends the others then: their deaths are no crash. It says SIGTERM too where another has crashed."""
    life = Life(run, StopFlag(), JobEnvironment("slurm", "17_1", 0, "n1", 1, 3, 1, "n1", 1, 1, 1, "")).alone()
    assert life.leave(code, reason) == code
    marker = run.exit_marker("17_1", 0)
    assert (marker.read_text() if marker.exists() else None) == told


@pytest.mark.parametrize("leads_to", [None, "/nowhere", "STOP"])
def test_a_run_that_is_stopped_for_good_is_left_without_loading_torch(
    run: RunDir, tmp_path: Path, leads_to: str | None
) -> None:
    run.stop_file.symlink_to(leads_to) if leads_to else run.stop_file.touch()
    (tmp_path / "torch.py").write_text("raise ImportError('torch is loaded')")
    done = job(run, "train", SLURM_JOB_ID="17", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "forbids training" in done.stdout, done.stderr
    lift_stop(run)
    assert not os.path.lexists(run.stop_file)


def test_the_pace_is_that_of_the_last_steps_and_says_when_the_end_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 0.2, *range(1, 31)])
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    told, work = [], pace.Pace()
    for done in (1000, 2000, 3000, *range(3010, 3310, 10)):  # what was there comes at once
        told.append(work.told(done, 3300))
    assert told[0] == {} and told[-1] == {"images_per_s": "10"}
    assert told[-2]["images_per_s"] == "10" and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told[-2]["ends"])


@pytest.mark.parametrize(("others", "name"), [(True, "run"), (False, "run"), (True, 300 * "x")])
def test_a_job_ends_for_good_where_its_run_is_gone_and_not_where_the_folder_of_runs_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: bool, name: str
) -> None:
    """A name that is too long stands for what cannot be asked, as behind a stale file handle."""
    gone = RunDir(tmp_path / "runs" / name)
    (gone.path.with_name("other") if others else gone.path.parent).mkdir(parents=True)

    def work(life: Life, args: Any) -> int:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(gone.samples))

    def leave(code: int) -> None:
        raise SystemExit(code)

    env = JobEnvironment("slurm", "17", 0, "n1", 0, 1, 0, "n1", 1, 1, None, "")
    monkeypatch.setattr(jobs, "begin", lambda run: Life(run, StopFlag(), env))
    monkeypatch.setattr(jobs, "work", work)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        jobs.main(["sample", str(gone.path), "fid"])
    assert left.value.code == (EXIT_FATAL if others and name == "run" else 1)
