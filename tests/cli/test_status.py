"""status.py and board.py read runs and change nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import termios

from tests.cli.harness import TINY_SET, Shell, snapshot, wait_for


def test_status_as_json_has_every_field_of_a_finished_run(finished: Shell) -> None:
    before = snapshot(finished.root)
    (row,) = json.loads(finished("status", "--json").stdout)
    known = {k: row[k] for k in ("name", "path", "state", "step", "saved_step", "total_steps", "restarts", "problem")}
    assert known == {
        "name": "tiny",
        "path": str(finished.root / "tiny"),
        "state": "complete",
        "step": 400,
        "saved_step": 400,
        "total_steps": 400,
        "restarts": 0,
        "problem": None,
    }
    assert row["loss"] > 0 and row["images_per_s"] > 0 and row["epoch"] > 1 and 0 < row["goodput"] <= 1
    assert row["heartbeat_age_s"] > 0 and row["host"] == socket.gethostname() and row["jobs"] == {}
    assert row["samples"] == {TINY_SET: "2/2"}
    assert row["sets"] == {TINY_SET: {"step": 400, "told": "step 400, ddim, 4 steps, 25 images"}}
    assert row["scores"][TINY_SET]["num_samples"] == 25 and row["scores"][TINY_SET]["frechet_distance"] > 0
    assert snapshot(finished.root) == before


def test_status_shows_a_table_by_name_or_by_path(finished: Shell) -> None:
    by_name, by_path = finished("status", "tiny"), finished("status", str(finished.root / "tiny") + "/")
    assert by_name.stdout == by_path.stdout and by_name.returncode == 0
    assert "complete" in by_name.stdout and "400/400" in by_name.stdout
    assert "(fewer samples than the 768 dimensions), ddim 4, 25 vs train, pixels features" in by_name.stdout


def test_status_lists_the_events_of_a_life(finished: Shell) -> None:
    lines = finished("status", "tiny", "--events").stdout.splitlines()
    told = [line.split()[4] for line in lines]
    assert told.count("submitted") == 1  # which a quick job may precede
    later = ["stage_began", "stage_done"] * 2
    trained = ["allocated", "started", "checkpoint", "checkpoint", "finished", *later]
    rows = [json.loads(line) for line in finished("status", "--events", "--json").stdout.splitlines()]
    assert [row["event"] for row in rows if row["event"] != "submitted"] == trained
    assert {row["run"] for row in rows} == {"tiny"}
    trained.remove("checkpoint")  # one line for both
    assert [t for t in told if t != "submitted"] == trained
    (saves,) = [line for line in lines if " checkpoint " in line]
    assert "saves=2 step=200..400" in saves and "last_sign" not in "".join(lines)
    assert [line.split("stage=")[1].split()[0] for line in lines if "stage_done" in line] == ["sample", "evaluate"]


def on_a_terminal(
    shell: Shell,
    columns: int,
    *args: str,
    until: str,
    then: int = 0,
    again: str = "",
    keys: dict[str, str] | None = None,
) -> str:
    """What status.py draws on a terminal of so many columns, until it shows `until`; with `then`, resized to so many,
    until `again`; keys: and what each of them shows; and after ctrl-C, or after q."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    argv, options = shell.command("status", *args)
    process = subprocess.Popen(
        argv, stdin=follower, stdout=follower, stderr=follower, start_new_session=True, **options
    )
    os.close(follower)
    shown = b""

    def has(word: str, since: int) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(leader, 65536)
        return word.encode() in shown[since:]

    os.set_blocking(leader, False)
    try:
        wait_for(lambda: has(until, 0), until)
        if then:
            at = len(shown)
            fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 30, then, 0, 0))
            wait_for(lambda: has(again, at), again)
        for key, word in (keys or {}).items():
            at = len(shown)
            os.write(leader, key.encode())
            wait_for(lambda at=at, word=word: has(word, at), word)
        os.write(leader, b"q") if keys else process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # its end
            wait_for(lambda: has("no such word", 0), "the end")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return shown.decode()


def test_keys_show_a_runs_life_and_log_and_ask_before_they_stop_it(finished: Shell) -> None:
    before = snapshot(finished.root)
    keys = {"\r": "stage_done", "l": "scored ", "s": "stop tiny?", "n": "esc back", "\x1b": "choose"}
    shown = on_a_terminal(finished, 80, "--watch", until="q quit", keys=keys)
    assert "\x1b[7mtiny" in shown and "\x1b[?1049l" in shown and snapshot(finished.root) == before


def test_watch_redraws_what_fits_when_the_terminal_is_resized_and_leaves_what_it_showed_last(finished: Shell) -> None:
    shown = on_a_terminal(finished, 120, "--watch", until="  score", then=60, again="100%")
    first, _, rest = shown.partition("\x1b[H\x1b[2J")[2].partition("\x1b[H\x1b[2J")
    assert "  score" in first and "  score" not in rest
    last = rest.rpartition("\x1b[?1049l")[2]  # the other screen is left
    assert "tiny" in last and "complete" in last and "Traceback" not in shown
    assert all(len(re.sub("\x1b\\[[0-9;]*m", "", line)) <= 60 for line in last.splitlines())


def test_watch_tells_changes_as_plain_lines_in_a_pipe(again: Shell) -> None:
    argv, options = again.command("status", "--watch")
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, **options) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        (again.root / "tiny" / "checkpoints" / "step-000000400.json").unlink()
        changed = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert re.match(r"\S+Z tiny  complete  400/400  100%  ", line) and "score Fréchet distance" in line, line
    assert "tiny  ended  " in changed and "its events tell of a checkpoint at step 400" in changed


def test_a_run_that_was_only_prepared_says_so(shell: Shell) -> None:
    done = shell.submit("--prepare")
    assert f"slurm/train.sbatch {shell.root}/tiny" in done.stdout
    (row,) = json.loads(shell("status", "--json").stdout)
    assert (row["state"], row["step"], row["loss"], row["goodput"]) == ("prepared", 0, None, None)


def test_a_failed_run_says_why(again: Shell) -> None:
    run = again.root / "tiny"
    (run / "checkpoints" / "step-000000400.json").unlink()
    event = {"event": "failed", "time": "2100-01-01T00:00:00.000Z", "job": "9", "restart": 2, "reason": "no [luck]"}
    (run / "events" / "9.2.jsonl").write_text(json.dumps(event) + "\n")
    (row,) = json.loads(again("status", "--json").stdout)
    assert row["state"] == "failed" and row["problem"].startswith("no [luck]; its events tell of a checkpoint at step")
    assert "tiny: no [luck]" in again("status").stdout


def test_status_survives_files_that_were_torn_or_overwritten(again: Shell) -> None:
    run = again.root / "tiny"
    with (run / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4')
    for name in ("heartbeat.json", f"eval/{TINY_SET}.json", f"samples/{TINY_SET}/request.json"):
        (run / name).write_text('{"half": ')
    (run / "config.yaml").write_text("train: [\n")
    (row,) = json.loads(again("status", "--json").stdout)
    assert row["saved_step"] == 400 and row["total_steps"] == 0 and row["samples"] == {TINY_SET: "2/?"}
    assert row["scores"] == {}
    assert again("status").returncode == 0


def state_with(again: Shell, event: dict[str, object], squeue: str) -> tuple[str, dict[str, str]]:
    """The run's state and jobs, where job 9 last told `event` and squeue prints this line."""
    line = {"time": "2100-01-01T00:00:00.000Z", "job": "9", "restart": 0, **event}
    (again.root / "tiny" / "events" / "9.0.jsonl").write_text(json.dumps(line) + "\n")
    again.put("sbatch", "exit 0")
    again.put("squeue", f'echo "{squeue}"')
    (row,) = json.loads(again("status", "--json").stdout)
    return row["state"], row["jobs"]


def test_a_job_that_slurm_is_ending_is_shown_as_completing_until_it_is_back_or_its_run_complete(again: Shell) -> None:
    submitted = {"event": "submitted", "stage": "train", "via": "sbatch"}
    assert state_with(again, submitted, "9 9 COMPLETING") == ("complete", {"9": "COMPLETING"})
    (again.root / "tiny" / "checkpoints" / "step-000000400.json").unlink()
    told = again.root / "tiny" / "events" / "of-a-life-that-goes-on.jsonl"
    told.write_text(json.dumps({"event": "resumed", "time": "2099-01-01T00:00:00.000Z", "job": "9", "restart": 0}))
    assert state_with(again, submitted, "9 9 COMPLETING") == ("completing", {"9": "COMPLETING"})
    assert state_with(again, submitted, "9 9 PENDING") == ("queued", {"9": "PENDING"})
    assert state_with(again, {"event": "failed", "reason": "x"}, "9 9 COMPLETING")[0] == "failed"


def test_a_job_that_was_submitted_by_hand_is_shown_once_it_had_its_nodes(again: Shell) -> None:
    assert state_with(again, {"event": "allocated"}, "9 9 PENDING") == ("queued", {"9": "PENDING"})


def test_why_a_run_waits_is_told_with_what_to_do(again: Shell) -> None:
    submitted = {"event": "submitted", "stage": "train", "via": "sbatch"}
    (again.root / "tiny" / "checkpoints" / "step-000000400.json").unlink()
    for squeue, state in (
        ("9 9 PENDING N/A JobHeldUser", "held"), ("9 9 SUSPENDED 2026-11-26T20:13:42 None", "suspended"),
        ("9 9 PENDING N/A launch failed requeued held", "held"), ("9 9 PENDING N/A Priority", "queued"),
    ):  # fmt: skip
        assert state_with(again, submitted, squeue)[0] == state
    assert state_with(again, submitted, "9 9 PENDING N/A PartitionTimeLimit")[0] == "queued"
    (row,) = json.loads(again("status", "--json").stdout)
    (wait,) = row["waits"]
    assert (wait["job"], wait["reason"], wait["can_start"]) == ("9", "PartitionTimeLimit", False)
    said = " ".join(again("status").stdout.split())
    assert "tiny: job 9 waits: its time limit is above what the partition allows (PartitionTimeLimit)" in said
    assert "shorter --time" in said


def test_many_long_runs_are_shown_by_one_question_to_slurm_and_without_reading_their_curves(again: Shell) -> None:
    """200 runs of 800,000 steps took 12 s of processor time when each curve was read whole."""
    tiny, calls = again.root / "tiny", again.cwd / "calls"
    kept = json.loads((tiny / "metrics.jsonl").read_text().splitlines()[0])
    (tiny / "metrics.jsonl").write_text(
        "".join(json.dumps({**kept, "step": step}) + "\n" for step in range(20, 160_020, 20))
    )
    again.put("squeue", f"echo squeue >> {calls}")
    for name in ("sbatch", "scontrol", "sinfo", "sacctmgr"):
        again.put(name, f"echo {name} >> {calls}")
    told = {"event": "submitted", "time": "2026-11-20T09:00:00.000Z", "restart": 0, "stage": "train", "via": "sbatch"}
    for i in range(60):
        run = again.root / f"r{i}"
        shutil.copytree(tiny, run, copy_function=os.link, ignore=shutil.ignore_patterns("samples", "tb", "logs"))
        (run / "events" / "submit-9.0.jsonl").write_text(json.dumps({**told, "job": f"{i}", "cluster": "here"}) + "\n")
    conf = again.cwd / "slurm.conf"
    conf.write_text("ClusterName=here\n")
    argv, options = again.command("status", "--json")
    options["env"]["SLURM_CONF"] = str(conf)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, **options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert len(json.loads(done.stdout)) == 61 and calls.read_text().split() == ["squeue"], done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # 4 s once


def test_where_there_are_no_runs_status_says_how_to_start_one(shell: Shell) -> None:
    done = shell("status")
    assert done.returncode == 0 and f"no runs in {shell.root}" in done.stdout and "launch/submit.py" in done.stdout
    assert json.loads(shell("status", "--json").stdout) == []


def test_board_binds_localhost_on_a_free_port_and_prints_the_tunnel(finished: Shell) -> None:
    done = finished("board", "tiny", "--dry-run")
    tunnel, address, watched, command = done.stdout.splitlines()
    port = command.split("--port ")[1].split()[0]
    assert f"ssh -N -L {port}:localhost:{port} " in tunnel and address.endswith(f"http://localhost:{port}")
    assert "--host 127.0.0.1" in command and watched == f"tiny: {finished.root}/tiny/tb"
    with socket.socket() as s:
        s.bind(("127.0.0.1", int(port)))


def test_board_refuses_a_port_that_is_taken_and_a_place_without_runs(finished: Shell, shell: Shell) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        assert f"--port {port}" in finished.refused("board", "--port", port, "--dry-run")
    assert "no runs in" in shell.refused("board", "--dry-run")
