"""slurm/supervise.sh: what a batch shell does about a node on which the profile's lines, or Python, do not run.

SLURM's commands are played here; that it obeys them as they are given is tests/slurm's.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ddpm.run.events import read_events
from ddpm.run.paths import RunDir
from launch.cluster import by_submitit, by_template, code
from launch.cluster.environment import PROJECT
from launch.cluster.job import Job
from launch.cluster.site import Site
from launch.life import last_words
from launch.life.decision import bad_nodes
from launch.queue import nodes


@dataclass
class Shell:
    """A batch shell of a job, its SLURM, and the run."""

    bin: Path
    run: RunDir
    said: str = ""
    restart: int = 0
    path: str = ""

    def put(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def life(self, command: str, *, setup: str = "", python: str = "/nowhere/python", node: str = "n1",
             alone: bool = False, cwd: Path | None = None, home: str = str(PROJECT),
             **more: str) -> int:  # fmt: skip
        """alone: `command` begins with supervise.sh itself. cwd: where the job was submitted. more: its environment."""
        (self.run.path / "setup.sh").write_text(setup)
        env = {"DDPM_HOME": home, "DDPM_PYTHON": python, "DDPM_RUN": str(self.run.path), "DDPM_STAGE": "train",
               "SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(self.restart), "SLURMD_NODENAME": node,
               "SLURM_JOB_NODELIST": node, "SLURM_JOB_PARTITION": "gpu", "DDPM_LOG": "train-17.out",
               "SLURM_SUBMIT_DIR": str(PROJECT), "PATH": self.path or f"{self.bin}:/usr/bin:/bin", **more}  # fmt: skip
        script = command if alone else f". {PROJECT}/slurm/supervise.sh || exit 2\n{command}"
        done = subprocess.run(["/bin/bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, cwd=cwd)
        self.restart += 1
        log = self.run.logs / "train-17.out"
        self.said = done.stdout + done.stderr + (log.read_text() if log.exists() else "")
        return done.returncode

    def orders(self) -> list[str]:
        path = self.bin / "orders"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    run = RunDir(tmp_path / "tiny")
    for path in (tmp_path / "bin", run.logs, run.events, run.checkpoints):
        path.mkdir(parents=True)
    run.config.touch()
    s = Shell(tmp_path / "bin", run)
    s.put("sinfo", "printf 'n1\\nn2\\nn3\\nn4\\n'")
    s.put("sleep", "")
    shown = (
        "JobId=17 JobState=$(cat {0}/state 2>/dev/null || echo RUNNING) Reason=None "
        "ReqNodeList=(null) ExcNodeList=$(cat {0}/excluded 2>/dev/null || echo '(null)')"
    )
    s.put("scontrol", f'[ "$1" != show ] || {{ echo "{shown.format(s.bin)}"; exit; }}\necho "$*" >> {s.bin}/orders\n'
          f'case "$*" in *exc*) echo "${{3#*=}}" > {s.bin}/excluded ;; esac')  # fmt: skip
    return s


def last(run: RunDir) -> dict[str, Any]:
    return read_events(run)[-1]


def test_a_node_without_python_puts_the_job_back_elsewhere_and_after_four_of_them_it_has_failed(shell: Shell) -> None:
    for node in ("n1", "n2", "n3"):
        assert shell.life('"$DDPM_PYTHON" -m launch.jobs', node=node) == 127
        assert (last(shell.run)["event"], last(shell.run)["bad_node"]) == ("requeued", node)
    assert shell.orders() == [
        "requeue 17", "update jobid=17 excnodelist=n1",
        "requeue 17", "update jobid=17 excnodelist=n1,n2", "update jobid=17 starttime=now+60",
        "requeue 17", "update jobid=17 excnodelist=n1,n2,n3", "update jobid=17 starttime=now+60",
    ]  # fmt: skip
    assert shell.life('"$DDPM_PYTHON" -m launch.jobs', node="n4") == 127 and len(shell.orders()) == 8
    assert (
        last(shell.run)["event"] == "failed" and "/nowhere/python does not run on node n4" in last(shell.run)["reason"]
    )
    assert bad_nodes(read_events(shell.run), "17") == ["n1", "n2", "n3", "n4"]


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", ""])
def test_without_python_too_a_job_that_slurm_ends_is_slurms(shell: Shell, state: str) -> None:
    (shell.bin / "state").write_text(state)
    shell.life("exit 1")
    assert shell.orders() == [] and read_events(shell.run) == []


def test_on_a_node_without_scontrol_it_is_said_what_is_lost(shell: Shell) -> None:
    assert shell.life("exit 0", python="true") == 0 and "no scontrol" not in shell.said
    (shell.bin / "scontrol").unlink()
    (shell.bin / "date").symlink_to("/bin/date")
    for name in ("hostname", "mkdir", "bash", "env", "sed", "cat", "wc", "head", "sort", "rm"):
        (shell.bin / name).symlink_to(f"/bin/{name}")
    shell.path = str(shell.bin)
    assert shell.life("exit 1") != 0 and shell.orders() == []
    assert "no scontrol on node n1" in shell.said and "submit the run again when it has ended" in shell.said


def test_a_partitions_only_node_is_not_excluded(shell: Shell) -> None:
    shell.put("sinfo", "echo n1")
    shell.life("exit 1")
    assert shell.orders() == ["requeue 17"]


def test_a_supervisor_that_is_heard_decides_alone(shell: Shell) -> None:
    shell.put("python", 'echo heard >&$DDPM_HEARD_FD; echo "looked into $*"; exit 9')
    assert shell.life("exit 3", python=str(shell.bin / "python")) == 9
    assert shell.orders() == [] and f"looked into -m launch.life.supervisor {shell.run.path} train 3" in shell.said


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_supervisor_that_slurm_ends_with_its_node_blames_no_python_and_no_node(shell: Shell, state: str) -> None:
    (shell.bin / "state").write_text(state)
    shell.put("python", "kill -TERM $$")
    assert shell.life("exit 3", python=str(shell.bin / "python")) == 143
    assert "does not run" not in shell.said
    if state == "COMPLETING":
        assert shell.orders() == [] and "leaving it to SLURM" in shell.said
    else:
        assert shell.orders() == ["requeue 17"] and "ended by signal 15" in last(shell.run)["reason"]
        assert "bad_node" not in last(shell.run)


@pytest.mark.parametrize("end", [False, True])
def test_a_file_system_that_is_away_for_a_moment_when_the_shell_begins_or_ends_costs_the_job_nothing(
    shell: Shell, tmp_path: Path, end: bool
) -> None:
    there, away, python = tmp_path / "fs", tmp_path / "away", str(shell.bin / "python")
    there.mkdir()
    shell.run = RunDir(shell.run.path.rename(there / "tiny"))
    shell.put("sleep", f"echo >>{tmp_path}/waits; [ $(wc -l <{tmp_path}/waits) != 3 ] || mv {away} {there}")
    shell.put("python", f'[ -d {there} ] || exit 1; echo heard >&$DDPM_HEARD_FD; echo "looked into $5"')
    goes = f"mv {there} {away}"
    begun = f"{goes}; . {PROJECT}/slurm/supervise.sh || exit 2; echo works; exit 3"
    ends = f". {PROJECT}/slurm/supervise.sh || exit 2; echo works; {goes}; exit 3"
    shell.life(ends if end else begun, python=python, alone=True)
    assert "works" in shell.said and "looked into 3" in shell.said and shell.orders() == [], shell.said
    assert "No such file" not in shell.said, "which would be the life's last error"


@pytest.mark.parametrize("typed", ["{0}/tiny", "{0}/tiny/", "tiny"])
def test_a_run_that_is_not_there_beside_others_is_not_waited_for(shell: Shell, tmp_path: Path, typed: str) -> None:
    shell.put("sleep", f"touch {tmp_path}/waited")
    script = f"mv {shell.run.path} {tmp_path}/moved; . {PROJECT}/slurm/supervise.sh || exit 2"
    ended = subprocess.run(["bash", "-c", script], env={"DDPM_HOME": str(PROJECT), "DDPM_RUN": typed.format(tmp_path),
                           "DDPM_STAGE": "train", "SLURM_JOB_ID": "17", "PATH": f"{shell.bin}:/usr/bin:/bin"},
                           capture_output=True, text=True, timeout=60, cwd=tmp_path)  # fmt: skip
    assert ended.returncode == 2 and "is no run directory" in ended.stderr and not (tmp_path / "waited").exists()


@pytest.mark.parametrize("setup", ["", "cd() { true; }\ncd /"])
def test_a_job_runs_the_runs_code_though_it_was_submitted_in_an_edited_checkout(
    shell: Shell, tmp_path: Path, setup: str
) -> None:
    edited = tmp_path / "checkout"
    for name in ("launch/__init__.py", "launch/jobs.py", "launch/life/__init__.py", "launch/life/supervisor.py"):
        (edited / name).parent.mkdir(parents=True, exist_ok=True)
        (edited / name).write_text('print("EDITED")\n')
    shell.life('"$DDPM_PYTHON" -m launch.jobs --help', setup=setup, python=sys.executable, cwd=edited)
    assert "EDITED" not in shell.said and "usage: python -m launch.jobs" in shell.said
    shell.put("python", 'echo heard >&$DDPM_HEARD_FD; echo "looked into it from $PWD"')
    shell.life("true", setup=f"{setup}\nexit 3", python=str(shell.bin / "python"), cwd=edited)
    assert f"looked into it from {PROJECT}\n" in shell.said


def test_a_job_of_a_run_whose_name_another_one_has_by_now_does_nothing_there(shell: Shell) -> None:
    shell.run.run_json.write_text('{"run_id": "of-this-run"}')
    assert shell.life("echo works; false", DDPM_RUN_ID="of-one-that-was-removed") == 2
    assert "works" not in shell.said and "is not the run that this job was queued for" in shell.said
    assert shell.orders() == [] and list(shell.run.events.iterdir()) == list(shell.run.logs.iterdir()) == []


@pytest.mark.parametrize(("there", "told"), [
    ('{"run_id": "own"}', {"DDPM_RUN_ID": "own"}), ('{"run_id": "own"}', {}), ("{}", {"DDPM_RUN_ID": "own"}),
    (None, {"DDPM_RUN_ID": "own"}),
], ids=["its own", "by hand", "a run from before", "without run.json"])  # fmt: skip
def test_a_job_works_where_nothing_says_that_the_run_is_another(
    shell: Shell, there: str | None, told: dict[str, str]
) -> None:
    if there is not None:
        shell.run.run_json.write_text(there)
    shell.life("echo works; exit 0", python="/bin/true", **told)
    assert "works" in shell.said


def test_a_job_that_another_one_queues_by_hand_is_not_taken_for_one_of_the_others_run(shell: Shell) -> None:
    shell.run.run_json.write_text('{"run_id": "own"}')
    told = {"setup": "echo setup has ${DDPM_RUN_ID-none}", "python": "/bin/true", "DDPM_RUN_ID": "own"}
    shell.life("echo a command has ${DDPM_RUN_ID-none}, its successor $DDPM_OF_RUN", **told)
    assert "setup has none" in shell.said and "a command has none, its successor own" in shell.said


def test_a_relative_path_of_the_project_is_one_from_where_the_job_was_submitted(shell: Shell) -> None:
    shell.put("python", 'echo heard >&$DDPM_HEARD_FD; echo "looked into it from $PWD"')
    told = 'ls "$DDPM_HOME/slurm/rank.sh"'
    assert shell.life(told, python=str(shell.bin / "python"), cwd=PROJECT.parent, home=PROJECT.name) == 0
    assert f"{PROJECT}/slurm/rank.sh" in shell.said and f"looked into it from {PROJECT}\n" in shell.said


def test_setup_lines_run_where_the_job_was_submitted(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "mine.sh").write_text("mine=there")
    assert (
        shell.life('echo "mine is $mine"', setup=". ./mine.sh", python="true", cwd=tmp_path) == 0
        and "mine is there" in shell.said
    )


def test_a_job_asks_its_own_cluster_whatever_the_users_shell_or_a_setup_line_named(shell: Shell) -> None:
    say = '"$SLURM_CLUSTERS$SBATCH_CLUSTERS"'
    shell.put("scontrol", f"echo $1 {say} >> {shell.bin}/orders; echo JobId=17 JobState=RUNNING Reason=None")
    named = "export SLURM_CLUSTERS=bravo SBATCH_CLUSTERS=bravo"
    shell.life(f"echo it asks {say}.; {named}; exit 1", setup=f"{named}\n")
    assert "it asks ." in shell.said and {order.strip() for order in shell.orders()} >= {"show", "requeue"}


def test_ranks_write_into_the_jobs_log_whatever_the_user_wants_of_srun(shell: Shell) -> None:
    """Without their words nobody knows why a life died, nor with a number before each line of them."""
    exported = {"SLURM_STDOUTMODE": "none", "SLURM_LABELIO": "1", "SRUN_OUTPUT": "none"}
    shell.life('echo "$SLURM_STDOUTMODE$SRUN_OUTPUT$SLURM_STDERRMODE$SRUN_ERROR$SLURM_LABELIO, as they are"',
               setup="export SLURM_STDERRMODE=none\n", **exported)  # fmt: skip
    assert "\n, as they are" in shell.said


def test_our_supervisor_is_heard(shell: Shell) -> None:
    shell.run.exit_marker("17", 0).write_text("78 crash")
    assert shell.life("exit 78", python=sys.executable) == 78
    assert shell.orders() == [] and last(shell.run)["event"] == "failed", shell.said


def test_work_that_is_done_needs_nobody_to_look_into_it(shell: Shell) -> None:
    shell.life("true")
    assert shell.orders() == [] and read_events(shell.run) == []


@pytest.mark.parametrize("setup", [
    "export A=1\nfalse\necho never >&2\n", "module load cuda/99\n", "export A=1\ncd /nowhere\n",
    "if true; then\nfalse\nfi\n", "if true; then\n", "echo 'open\n", "exit 5\n",
])  # fmt: skip
def test_a_setup_line_that_fails_ends_the_life_named_and_the_job_is_put_back(shell: Shell, setup: str) -> None:
    code = shell.life("echo worked on", setup=setup)
    assert code != 0 and "worked on" not in shell.said and "never\n" not in shell.said
    assert shell.orders()[0] == "requeue 17"
    if "exit" not in setup:
        line = next(line for line in setup.splitlines() if line.split()[0] in ("false", "module", "cd", "if", "echo"))
        assert "setup failed on n1" in shell.said and line in shell.said


@pytest.mark.parametrize(("line", "told"), [
    ("modul load x", "modul: command not found; setup failed on n1 (exit code 127): modul load x"),
    ("ls /nowhere", "ls: cannot access '/nowhere': No such file or directory; setup failed on n1 (exit code 2): ls"),
    ("exit 3", "setup failed on n1: it ended the job's shell (exit code 3), at the line: exit 3"),
])  # fmt: skip
def test_what_a_setup_line_said_before_it_failed_is_part_of_the_error_that_the_supervisor_tells(
    shell: Shell, line: str, told: str
) -> None:
    shell.put("python", "echo heard >&$DDPM_HEARD_FD")
    shell.life("true", setup=f"export LC_ALL=C\n{line}\n", python=str(shell.bin / "python"))
    log = shell.run.logs / "train-17.out"
    words = last_words.read(log, log.read_text(), 0)
    assert words.error.startswith(told) and nodes.setup_line({"error": words.error})[1] == line


@pytest.mark.parametrize("via", ["sbatch", "submitit"])
@pytest.mark.parametrize("line", ["exit 0", "exec true", "return 0", ". /dev/stdin <<<'exit 0'", "return 1"])
def test_a_setup_line_that_ends_the_shell_in_silence_has_failed_too_and_nothing_is_done(
    shell: Shell, via: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "home", lambda run: PROJECT)
    shell.put("srun", "echo worked on")
    job = Job("train", shell.run, Site())
    template = Path(by_template.template(job.home, "train"))
    script = template.read_text() if via == "sbatch" else by_submitit.script_text(job)
    (shell.bin / "job.sh").write_text(script.replace(sys.executable, "/nowhere/python"))
    ended = shell.life(f"exec bash {shell.bin}/job.sh {shell.run.path}", setup=f"export A=1\n{line}\n", alone=True)
    assert ended != 0 and "worked on" not in shell.said
    assert "setup failed on n1" in shell.said and f": {line}" in shell.said
    assert shell.orders()[0] == "requeue 17" and last(shell.run)["exit_code"] != 0


def test_what_setup_makes_of_the_shell_does_not_take_its_end_from_it(shell: Shell) -> None:
    setup = "set -e -u\nexec 8>&1\ntrap 'echo swept' EXIT\ntrap - TERM\necho $(exec echo from a subshell)\n"
    assert shell.life("set -- a b\necho through >&8; false", setup=setup) == 127
    assert all(told in shell.said for told in ("from a subshell", "through", "swept")), shell.said
    assert shell.orders()[0] == "requeue 17" and shell.said.index("requeueing") < shell.said.index("swept")


def test_setup_lines_act_on_the_shell_that_the_work_runs_in(shell: Shell) -> None:
    setup = (
        "export A='1 2'\nif [ -z \"$B\" ]; then\n  export B=3\nfi\nfalse || true\nexport C=4 \\\n  D=5\n"
        "f() {\n  echo from f\n}\nread -r E < <(echo 6)\n# a comment\n\nset -- x\nexport F=7"
    )
    assert shell.life('echo "$A-$B-$C-$D-$E-$F"; f; exit 0', setup=setup, python="true") == 0
    assert "1 2-3-4-5-6-7" in shell.said and "from f" in shell.said


@pytest.mark.skipif(sys.prefix == sys.base_prefix, reason="the tests' Python is of no venv")
def test_what_a_module_sets_for_its_own_python_is_not_there_for_ours(shell: Shell) -> None:
    other, kept = "/apps/lib/python2.7/site-packages", f"/apps/lib/python3.{sys.version_info[1]}/site-packages:/mine"
    setup = f"export PYTHONHOME=/apps\nexport PYTHONPATH={other}:{kept}:$PYTHONPATH\n"
    told = f'echo "home=${{PYTHONHOME-none}} $PYTHONPATH" >"{shell.bin}/told"'
    shell.life(told, setup=setup, python=sys.executable)
    assert (shell.bin / "told").read_text() == f"home=none {kept}:{PROJECT}\n", shell.said
    assert "does not run on node" not in shell.said, shell.said
    shell.life("exit 7", setup=setup + "false\n", python=sys.executable)  # it is Python that looks into this end too
    assert "setup failed on n1" in shell.said and "does not run on node" not in shell.said, shell.said
