"""Tells a run's owner of its end: by a command, a webhook, or a mail of the scheduler's; once for each end.

The site profile's `notify` is kept in notify.json of the run and may contain secrets: nothing of it is ever printed or
recorded. A notification that fails is one line in the log, and no failure of the job. Must not know: what counts as an
end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from ddpm.config.section import build
from ddpm.errors import RequestError
from ddpm.run.files import DamagedFile, parse_json, read_bytes, write_json
from ddpm.run.log import plain, say
from ddpm.run.paths import RunDir
from launch.cluster import scheduler
from launch.cluster.environment import JobEnvironment
from launch.cluster.site import Notify

LIMIT_S = 10
HELD = "is held"
MESSAGE_AT_MOST = 1500
"""Characters: chat programs accept little more."""


def keep(run: RunDir, asked: Notify) -> None:
    """Keep `asked` for the run's jobs, until another submission replaces it. Raises OSError."""
    record = asked.model_dump(mode="json", exclude_defaults=True)
    if record:
        write_json(run.notify, record, replace=True, mode=0o600)
    else:
        run.notify.unlink(missing_ok=True)


def asked_of(run: RunDir) -> Notify:
    """What `keep` has kept. Raises OSError, DamagedFile, RequestError."""
    try:
        record = parse_json(read_bytes(run.notify))
    except FileNotFoundError:
        return Notify()
    except ValueError:
        raise DamagedFile("no JSON") from None
    asked: Notify = build(Notify, record if isinstance(record, dict) else {"notify": record}, run.notify.name)
    return asked


def tell(run: RunDir, env: JobEnvironment, what: str, told: str, **fields: Any) -> None:
    """Tell the owner that the run `what` (has finished, has failed, is held), unless that was told of this job before.

    told: the rest of the message, in one line. fields: added to the event.
    """
    try:
        ways = _ways(run, env, plain(f"run {run.name} {what}: {told}")[:MESSAGE_AT_MOST], what)
        if not ways or not _is_first(run, env, what):
            return
    except (OSError, DamagedFile, RequestError) as e:
        kind = "it is not as a submission writes it" if isinstance(e, RequestError) else str(e)
        say(f"nobody is told that the run {what}: {run.notify.name}: {kind}")
        return
    done = [name for name, way in ways.items() if _try(name, way)]
    with contextlib.suppress(OSError):
        step = run.latest_step()
        env.events(run).append("notified", world_size=env.world_size, step=step, what=what, by=done, **fields)


def _ways(run: RunDir, env: JobEnvironment, message: str, what: str) -> dict[str, Callable[[], None]]:
    """The ways to tell it, by name. Raises OSError, DamagedFile, RequestError."""
    asked = asked_of(run)
    address, words, url = asked.mail, asked.command, asked.url
    body = {"text": message, "run": run.name, "what": what, "path": str(run.path), "job": env.job}
    ways: dict[str, Callable[[], None]] = {}
    if address is not None and what != HELD:  # SLURM mails of a job's end
        ways["mail"] = lambda: _mail(env, address)
    if words:
        ways["command"] = lambda: _run(list(words), message)
    if url is not None:
        ways["url"] = lambda: _within_limit(lambda: _post(url, body))
    return ways


def _is_first(run: RunDir, env: JobEnvironment, what: str) -> bool:
    """Whether this process is the first to tell this of the job (for an array: of any of its tasks). Raises OSError."""
    job = env.job.partition("_")[0] + (f"-{env.cluster}" if env.cluster else "")
    job += f".{env.restart}" if what == HELD else ""  # which may be again
    run.logs.mkdir(exist_ok=True)
    try:
        os.close(os.open(run.logs / f".notified-{what.replace(' ', '-')}-{job}", os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        return False
    return True


def _try(name: str, way: Callable[[], None]) -> bool:
    try:
        way()
    except Exception as e:  # whatever a network or another's program does
        say(f"notify.{name} did not work: {_why(e)}")
        return False
    return True


def _why(e: Exception) -> str:
    """The reason of a failure, without parts that could contain a secret, such as the address."""
    if isinstance(e, scheduler.SchedulerError | _Ended):
        return " ".join(str(e).split())
    if isinstance(e, urllib.error.HTTPError):
        return f"it answered {e.code}"
    reason = e.reason if isinstance(e, urllib.error.URLError) else e
    return (isinstance(reason, OSError) and reason.strerror) or type(reason).__name__


class _Ended(Exception):
    """A command or a request that failed."""


def _mail(env: JobEnvironment, address: str) -> None:
    if not env.is_scheduled:
        raise _Ended("it is SLURM that mails, which did not start this: have `command` do it")
    scheduler.mail_at_end(env.job, address)


def _run(words: list[str], message: str) -> None:
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.communicate(message.encode() + b"\n", timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise _Ended(f"it had not ended after {LIMIT_S} s") from None
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise _Ended(f"exit code {process.returncode}")


def _within_limit(work: Callable[[], None]) -> None:
    """Run `work` in a thread for at most LIMIT_S: a request's own time limit starts anew with every byte received."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            work()
        except Exception as e:
            raised.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    if thread.is_alive():
        raise _Ended(f"no answer in {LIMIT_S} s")
    if raised:
        raise raised[0]


def _post(url: str, body: dict[str, str]) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": "ddpm-hpc"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=LIMIT_S) as answer:
        answer.read(1)
