"""Lives of a run without a scheduler: forked to start fast, meddled with from inside, and their ends compared.

A life is what a job runs (`launch.jobs`), in a process of its own. `before` is called in that process before the job
begins; what it patches breaks that life and no other.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ddpm.run.events import read_events
from ddpm.run.files import read_jsonl
from ddpm.run.paths import RunDir
from tools.chaos import checker

TINY = [
    "data.name=digits", "data.image_size=8", "model.base_channels=8", "model.channel_mults=[1,2]",
    "model.blocks_per_level=1", "model.attention_resolutions=[4]", "train.global_batch=8", "train.warmup_steps=10",
    "train.ema_decay=0.9", "log.every_steps=3", "log.grid_every_steps=null", "log.grid_images=1",
    "checkpoint.milestone_every_steps=null",
]  # fmt: skip
LONGEST_LIFE_S = 300
Act = Callable[[Any], object]
"""Done to a Trainer."""


@contextmanager
def new_root() -> Iterator[Path]:
    """A place for runs, whose lines are checked at the end. Raises Unsound."""
    with tempfile.TemporaryDirectory(prefix="ddpm-chaos-", ignore_cleanup_errors=True) as root:
        yield Path(root)
        checker.check(Path(root))


def remove(run: RunDir) -> None:
    """A run that has done its part, its lines checked. Raises Unsound."""
    checker.check(run.path.parent, run.name)
    shutil.rmtree(run.path)


def parse_code() -> None:
    """Read and parse the code that jobs get, once for all submissions that are forked from here."""
    from launch.cluster import code

    code.check(code.of_checkout())


def compile_no_code() -> None:
    """Where the jobs too are forked, and load nothing of what a submission lays out for them."""
    from launch.cluster import unpacker

    unpacker.compileall = types.SimpleNamespace(compile_dir=lambda *_, **__: True)  # type: ignore[assignment]


def prepare(root: Path, name: str, *overrides: str) -> RunDir:
    """A run directory, made by the script that people use."""
    import sklearn.datasets  # noqa: F401 - as the script loads it

    from launch import submit
    from launch.terminal import console

    parse_code()

    def make() -> None:
        compile_no_code()
        sys.argv = ["launch/submit.py", "--cluster", "local", "--prepare", "--root", str(root), "--name", name, *TINY,
                    *overrides]  # fmt: skip
        console.run_script(submit.main)

    with tempfile.TemporaryDirectory(prefix="ddpm-chaos-") as where:
        log = Path(where) / "said"
        code = ended(_forked(make, log))
        assert code == 0, log.read_text()
    return RunDir(root / name)


def log_of(run: RunDir) -> Path:
    return run.logs / "chaos.out"


def life(
    run: RunDir,
    before: Callable[[], object] = lambda: None,
    *,
    env: dict[str, str] | None = None,
    log: Path | None = None,
) -> int:
    """Fork one life of training; returns its pid. This process has loaded everything but started no threads.

    It computes on the CPU with one thread, where sums have one order. env: further variables; log: instead of `log_of`.
    """
    import torch._dynamo  # the optimizer loads it, which takes longer than a short life
    import torch.utils.tensorboard  # noqa: F401

    import ddpm.training.trainer  # noqa: F401
    from launch import jobs

    def work() -> None:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DDPM_CPUS="1", **(env or {}))
        before()
        jobs.main(["train", str(run.path)])  # ends the process

    return _forked(work, log or log_of(run))


def _forked(work: Callable[[], object], log: Path) -> int:
    """The pid of a process that does `work`, which ends it, and says in `log` what it says."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = os.fdopen(out, "w", buffering=1)  # a test runner has put its own in their place
        work()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ranks(run: RunDir, num: int, before: Callable[[], object] = lambda: None) -> list[int]:
    """Fork one life on `num` ranks, started as torchrun starts them; returns their pids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "chaos", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    return [life(run, before, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(num)]


def ended(pid: int) -> int:
    """Exit code of a forked life, negative for a signal. One that hangs is killed."""
    watched = os.pidfd_open(pid)
    try:
        if not select.select([watched], [], [], LONGEST_LIFE_S)[0]:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(watched)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


# ---------------------------------------------------------------- meddling


def at_steps(acts: dict[int, Act]) -> Callable[[], None]:
    """For `before`: each act once, on the Trainer that has just done its `step`-th step, before it asks for stops."""

    def patch() -> None:
        from ddpm.run.stopping import StopRequested
        from ddpm.training.trainer import Outcome, Trainer

        real = Trainer.train

        def train(trainer: Trainer, stop_requested: StopRequested) -> Outcome:
            began = trainer.at.step

            def act_first() -> str | None:
                if trainer.at.step > began and (act := acts.pop(trainer.at.step, None)):
                    act(trainer)
                return stop_requested()

            return real(trainer, act_first)

        Trainer.train = train  # type: ignore[method-assign]

    return patch


def stop(trainer: Any) -> None:
    """SIGTERM, as a user or a machine that shuts down sends it."""
    os.kill(os.getpid(), signal.SIGTERM)


def die(trainer: Any) -> None:
    """SIGKILL, once the save under way is acknowledged."""
    trainer.chronicle.saver.wait()
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------- comparing


def final(run: RunDir) -> dict[str, Any]:
    return torch.load(run.checkpoint(run.latest_step()), weights_only=True)


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, structure included."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def curve(run: RunDir) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_jsonl(run.metrics)]


def same_end(run: RunDir, calm: RunDir) -> bool:
    """Everything that a last checkpoint holds (weights, EMA, optimizer, scaler, counters), and every metrics line."""
    return run.latest_step() > 0 and same(final(run), final(calm)) and curve(run) == curve(calm)


def steps_of(run: RunDir, event: str) -> list[int]:
    return [e["step"] for e in read_events(run) if e["event"] == event]
