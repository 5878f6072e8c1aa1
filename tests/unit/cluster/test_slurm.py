"""launch/cluster/slurm*.py: what is read from SLURM's answers, given here as SLURM 22.05 and 24.11 print them."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ddpm.errors import EnvironmentLacks
from launch.cluster import scheduler, slurm, slurm_orders
from launch.cluster.partitions import partitions
from launch.cluster.settling import settle
from launch.cluster.site import Site

JOB = "JobId=17 JobName=x QOS={qos} JobState=RUNNING Requeue={requeue} Restarts=2 TimeLimit=01:00:00 Partition=gpu"
CONFIG = """Configuration data as of 2026-01-01T00:00:00
KillWait                = 30 sec
PreemptMode             = {mode}
PreemptType             = preempt/{by}
"""


def answers(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    """By the words of the command."""

    def run(argv: list[str], **_: object) -> str:
        return next(said for words, said in given.items() if words.replace("_", " ") in " ".join(argv))

    monkeypatch.setattr(slurm, "run", run)


@pytest.mark.parametrize(
    ("requeue", "mode", "mercy"),
    [
        ("1", "REQUEUE", scheduler.Mercy(True, 90, 30)),
        ("0", "REQUEUE", scheduler.Mercy(False, 90, 30)),
        ("1", "CANCEL", scheduler.Mercy(False, 90, 30)),
    ],
)
def test_a_partition_says_what_pre_emption_does(
    monkeypatch: pytest.MonkeyPatch, requeue: str, mode: str, mercy: scheduler.Mercy
) -> None:
    answers(
        monkeypatch,
        show_job=JOB.format(qos="normal", requeue=requeue),
        show_config=CONFIG.format(mode="REQUEUE", by="partition_prio"),
        show_partition=f"PartitionName=gpu GraceTime=90 PreemptMode={mode} MaxTime=UNLIMITED",
    )
    assert scheduler.mercy("17") == mercy


@pytest.mark.parametrize(
    ("qos", "cluster", "mercy"),
    [
        ("cancel|00:01:30", "REQUEUE", scheduler.Mercy(False, 90, 30)),
        ("cluster|1-00:00:05", "REQUEUE", scheduler.Mercy(True, 86405, 30)),
        ("cluster|00:00:00", "CANCEL", scheduler.Mercy(False, 0, 30)),
        ("requeue|", "CANCEL", scheduler.Mercy(True, 0, 30)),
    ],
)
def test_a_qos_says_so_where_slurm_pre_empts_by_it(
    monkeypatch: pytest.MonkeyPatch, qos: str, cluster: str, mercy: scheduler.Mercy
) -> None:
    answers(
        monkeypatch,
        show_job=JOB.format(qos="scavenger", requeue="1"),
        show_config=CONFIG.format(mode=cluster, by="qos"),
        show_qos_scavenger=f"{qos}\n",
        show_partition="PartitionName=gpu GraceTime=0 PreemptMode=OFF",
    )
    assert scheduler.mercy("17") == mercy


@pytest.mark.parametrize(("by_qos", "assoc", "mercy"), [
    ({}, "", scheduler.Mercy(False, 0, 30, known=False)),  # the cluster says what pre-emption does
    ({}, "QOS=normal(1)\n    MinTRESPJ=\n    PreemptMode=REQUEUE\n", scheduler.Mercy(True, 0, 30, known=False)),
    ({"qos normal": "requeue|00:02:00", "qos high": "cancel|00:00:01"}, "PreemptMode=CANCEL",
     scheduler.Mercy(True, 120, 30)),
])  # fmt: skip
def test_where_accounting_does_not_answer_what_it_said_at_submission_holds_or_slurmctld_says_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, by_qos: dict[str, str], assoc: str, mercy: scheduler.Mercy
) -> None:
    def run(argv: list[str], **_: object) -> str:
        if argv[0] == "sacctmgr" or ("assoc_mgr" in argv and not assoc):
            raise scheduler.SchedulerError("sacctmgr: not found on this machine")
        if "assoc_mgr" in argv:
            return assoc
        return CONFIG.format(mode="CANCEL", by="qos") if "config" in argv else JOB.format(qos="normal", requeue="1")

    monkeypatch.setattr(slurm, "run", run)
    assert scheduler.mercy("17", by_qos) == mercy


@pytest.mark.parametrize(("by", "asked", "told"), [
    ("qos", "gpu", {"qos normal": "requeue|00:00:10", "qos high": "cluster|00:00:00"}),
    ("partition_prio", "gpu,x", {"partition gpu": "OFF|0"}),
    ("partition_prio", None, {"partition gpu": "OFF|0", "partition cheap": "CANCEL|300"}),
])  # fmt: skip
def test_the_login_node_tells_what_each_qos_or_partition_does(
    monkeypatch: pytest.MonkeyPatch, by: str, asked: str | None, told: dict[str, str]
) -> None:
    answers(monkeypatch, show_config=CONFIG.format(mode="REQUEUE", by=by),
            show_qos="normal|requeue|00:00:10\nhigh|cluster|00:00:00\n",
            show_partition="PartitionName=gpu GraceTime=0 PreemptMode=OFF\n"
                           "PartitionName=cheap GraceTime=300 PreemptMode=CANCEL\n")  # fmt: skip
    cluster = {"PreemptType": f"preempt/{by}", "PreemptMode": "REQUEUE", "KillWait": "30"}
    assert scheduler.preemption(asked) == {**cluster, **told}


@pytest.mark.parametrize(("told", "mercy"), [
    ({"partition gpu": "REQUEUE|300"}, scheduler.Mercy(True, 300, 20)),
    ({"partition gpu": "CANCEL|300"}, scheduler.Mercy(False, 300, 20)),
    ({"partition gpu": "|0"}, scheduler.Mercy(True, 0, 20)),  # as the cluster does
    ({"partition gpu": "REQUEUE|300", "no-requeue": "1"}, scheduler.Mercy(False, 300, 20)),
    ({"PreemptType": "preempt/qos", "qos low": "cluster|00:02:00"}, scheduler.Mercy(True, 120, 20)),
    ({"partition other": "REQUEUE|300"}, scheduler.Mercy(True, 0, 30, known=False)),
    ({}, scheduler.Mercy(True, 0, 30, known=False)),
])  # fmt: skip
def test_in_a_container_without_scontrol_what_was_told_at_submission_holds(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], mercy: scheduler.Mercy
) -> None:
    def run(argv: list[str], **_: object) -> str:
        raise scheduler.SchedulerError("scontrol: not found on this machine")

    monkeypatch.setattr(slurm, "run", run)
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    monkeypatch.setenv("SLURM_JOB_QOS", "low")
    cluster = {"PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE", "KillWait": "20"}
    assert scheduler.mercy("17", {**cluster, **told} if told else {}) == mercy


def test_a_job_is_shown_with_its_life(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, show_job=JOB.format(qos="normal", requeue="0") + " SubmitTime=2026-11-20T09:00:01")
    local = time.mktime((2026, 11, 20, 9, 0, 1, 0, 0, -1))
    utc = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(local))
    assert scheduler.show("17") == scheduler.Shown("RUNNING", 2, False, "gpu", "normal", "01:00:00", utc)


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as m:
        m.setenv("TZ", "Europe/Berlin")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.parametrize("utc", ["2026-10-25T00:30:00", "2026-10-25T01:30:00"])
def test_the_hour_that_clocks_show_twice_is_told_apart(commands: Path, berlin: None, utc: str) -> None:
    date = f'/bin/date -d {utc}Z "+${{SLURM_TIME_FORMAT:-%Y-%m-%dT%H:%M:%S}}"'
    put(commands / "scontrol", f'echo "{JOB.format(qos="normal", requeue="0")} SuspendTime=$({date})"')
    put(commands / "squeue", f'echo "17 17 PENDING $({date}) Priority||"')
    shown = scheduler.show("17")
    assert shown is not None and shown.suspended_at == scheduler.look_up(["17"])["17"].start == f"{utc}.000Z"


@pytest.mark.parametrize("written", ["Today", "2026-11-20 09:00:01", "Unknown", "9" * 30])
def test_a_job_is_shown_though_its_times_are_written_otherwise(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    answers(monkeypatch, show_job=JOB.format(qos="normal", requeue="0") + f" SubmitTime={written}")
    shown = scheduler.show("17")
    assert shown is not None and shown.state == "RUNNING" and shown.queued_at is None


@pytest.mark.parametrize(
    ("state", "preempted", "ended", "by_pre_emption"),
    [
        ("COMPLETING", "2026-11-21T15:27:24", "2026-11-21T15:27:24", True),
        ("COMPLETING", "2026-11-21T15:29:40", "2026-11-21T15:29:42", False),  # cancelled in its grace period
        ("COMPLETING", "None", "2026-11-21T15:27:54", False),  # cancelled
        ("RUNNING", "2026-11-21T15:29:09", "2026-11-21T15:29:15", False),  # in its grace period
    ],
)
def test_a_job_that_pre_emption_ends_is_told_from_one_that_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, state: str, preempted: str, ended: str, by_pre_emption: bool
) -> None:
    job = JOB.format(qos="normal", requeue="0").replace("RUNNING", state)
    answers(monkeypatch, show_job=f"{job} EndTime={ended} PreemptEligibleTime={ended} PreemptTime={preempted}")
    shown = scheduler.show("17")
    assert shown is not None and shown.preempted == by_pre_emption


def test_of_a_jobs_tasks_the_liveliest_counts_and_one_that_is_completing_is_still_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = ["5 5_1 PENDING", "5 5_2 COMPLETING", "6 6_1 COMPLETING", "6 6_2 RUNNING", "6 6_3 PENDING", "8 8 RUNNING"]
    answers(monkeypatch, squeue="\n".join(["7 7 COMPLETING", *tasks]))
    assert scheduler.queued(["5", "6", "7", "9"]) == {"5": "PENDING", "6": "RUNNING", "7": "COMPLETING"}


def test_jobs_of_all_users_are_asked_for_by_their_ids_and_a_strangers_that_has_one_of_before_is_none(
    commands: Path,
) -> None:
    me = os.geteuid()
    put(
        commands / "squeue",
        'case "$*" in *--me*|*-u*) exit 1;; *"-j 5,6,7,8"*) ;; *) exit 2;; esac\n'
        f'echo "5 5 PENDING N/A Priority|{me}|anything"; echo "6 6 RUNNING N/A None|{me + 1}|tiny-train"\n'
        f'echo "7 7 RUNNING N/A None|{me + 1}|gaussian 16"; echo "9 9 RUNNING N/A None|{me}|other"',
    )
    assert scheduler.queued(["5", "6", "7", "7_1", "8"]) == {"5": "PENDING", "6": "RUNNING"}


def test_more_jobs_than_one_word_of_a_command_has_room_for_are_asked_for_in_turn(commands: Path) -> None:
    put(commands / "squeue", 'eval "last=\\${$#}"; echo "${last##*,} ${last##*,} RUNNING N/A None||"')
    ids = [str(10_000_000 + i) for i in range(15_000)]
    assert scheduler.queued(ids) == {ids[9_999]: "RUNNING", ids[-1]: "RUNNING"}


def test_one_id_that_slurm_has_forgotten_is_no_failure(commands: Path) -> None:
    put(commands / "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert scheduler.queued(["5"]) == {}
    put(commands / "squeue", 'echo "slurm_load_jobs error: Access/permission denied" >&2; exit 1')
    with pytest.raises(scheduler.SchedulerError, match="denied"):
        scheduler.queued(["5"])


@pytest.mark.parametrize(("printed", "size"), [("1001", 1001), ("0", 1)])
def test_an_array_has_room_for_one_task_where_arrays_are_disabled(
    monkeypatch: pytest.MonkeyPatch, printed: str, size: int
) -> None:
    answers(monkeypatch, show_config=f"MaxArraySize            = {printed}")
    assert scheduler.max_array_size() == size


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which there is nothing but what a test puts into this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_users_own_filters_and_formats_do_not_reach_slurms_commands(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(commands / "squeue", "/usr/bin/env")
    for name in ("SQUEUE_STATES", "SINFO_PARTITION", "SCANCEL_QOS", "SACCTMGR_X", "SLURM_TIME_FORMAT", "SLURM_CONF"):
        monkeypatch.setenv(name, "x")
    said = slurm.run(["squeue"])
    names = {line.partition("=")[0] for line in said.splitlines()}
    assert "SLURM_CONF" in names and not [n for n in names if n.startswith(slurm.USERS_OWN)]
    assert "SLURM_TIME_FORMAT=x" not in said
    put(commands / "sbatch", '[ "$SLURM_TIME_FORMAT" = x ] && echo 17')
    assert slurm_orders.submit(["sbatch"]) == "17"  # whose job inherits the user's, and none of ours
    assert "SQUEUE_STATES=y" in slurm.run(["squeue"], env={**os.environ, "SQUEUE_STATES": "y"})


def test_words_of_a_site_that_are_no_utf_8_are_told_all_the_same(commands: Path) -> None:
    put(commands / "sbatch", r"printf 'sbatch: error: compte p\351rim\351\n' >&2; exit 1")
    with pytest.raises(scheduler.SchedulerError, match=r"compte p.rim."):
        slurm.run(["sbatch"])


def test_hidden_partitions_are_seen(commands: Path) -> None:
    for command, said in (("squeue", "7 7 RUNNING"), ("sinfo", "secret|gpu:2")):
        put(commands / command, f'[ "$1" = -a ] && echo "{said}" || true')
    assert scheduler.queued(["7"]) == {"7": "RUNNING"} and list(partitions()) == ["secret"]
    put(commands / "squeue", 'echo "$1|afterany:7"')
    assert scheduler.dependents("7") == ["-a"]


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received",
        "scontrol: error: Slurm backup controller in standby mode",
        "sbatch: error: Batch job submission failed: Resource temporarily unavailable",
        "Unexpected message received for job 2",  # scontrol requeue and update, without a slurmctld
    ],
)
def test_a_slurm_that_is_out_of_reach_has_refused_nothing(commands: Path, said: str) -> None:
    put(commands / "sbatch", f'echo "{said}" >&2; exit 1')
    with pytest.raises(scheduler.NoAnswer, match=said.rpartition(": ")[2][:20]):
        slurm.run(["sbatch"])


def test_a_refusal_is_no_lack_of_an_answer_and_a_command_that_hangs_is(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(commands / "sbatch", 'echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2; exit 1')
    with pytest.raises(scheduler.SchedulerError) as refused:
        slurm.run(["sbatch"])
    assert not isinstance(refused.value, scheduler.NoAnswer)

    def hang(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("sbatch", 30)

    monkeypatch.setattr(slurm.subprocess, "run", hang)
    with pytest.raises(scheduler.NoAnswer, match="no answer in 30 s"):
        slurm.run(["sbatch"])


def test_a_sites_own_sbatch_that_asks_takes_no_words_meant_for_others_and_its_question_is_told(
    commands: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    typed = tmp_path_factory.mktemp("typed") / "names"
    typed.write_text("y\n")
    put(commands / "sbatch", 'echo logged >&2; printf "Little budget left. Go on? "; read a && echo 7 || exit 1')
    saved = os.dup(0)
    try:
        with typed.open() as f:
            os.dup2(f.fileno(), 0)
            with pytest.raises(scheduler.SchedulerError, match=r"sbatch: Little budget left. Go on\?\n  logged"):
                slurm_orders.submit(["sbatch"])
    finally:
        os.dup2(saved, 0)
        os.close(saved)
    put(commands / "sbatch", "echo 'Go on?'; exec /bin/sleep 60")  # at a terminal of its own
    with pytest.raises(scheduler.NoAnswer, match=r"no answer in 3 s\n  Go on\?"):
        slurm.run(["sbatch"], timeout_s=3)


def test_a_job_that_slurm_has_forgotten_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> str:
        raise scheduler.SchedulerError("scontrol: slurm_load_jobs error: Invalid job id specified")

    monkeypatch.setattr(slurm, "run", run)
    assert scheduler.show("17") is None


@pytest.mark.parametrize(
    ("default", "exported", "gpus"), [("gpu", "", 1), ("cpu", "", 0), ("gpu", "cpu", 0), ("cpu", "gpu", 1)]
)
def test_where_no_partition_is_asked_for_that_of_the_user_or_the_default_says_whether_it_has_gpus(
    commands: Path, monkeypatch: pytest.MonkeyPatch, default: str, exported: str, gpus: int
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", exported)
    put(commands / "sbatch", "")
    put(commands / "srun", "")
    put(commands / "sinfo", f'echo "gpu|gpu:2\ncpu|(null)\nhidden|(null)" | /bin/sed "s/^{default}|/{default}*|/"')
    assert settle(Site(), dry_run=False).gpus_per_node == gpus


def test_a_site_that_shows_its_partitions_to_no_user_takes_what_is_asked_for(commands: Path) -> None:
    for name in ("sbatch", "srun"):
        put(commands / name, "")
    put(commands / "sinfo", "echo 'slurm_load_partitions: Access/permission denied' >&2; exit 1")
    assert partitions() == {} and settle(Site(partition="gpu"), dry_run=False).gpus_per_node == 1
    put(commands / "sinfo", "echo 'slurm_load_partitions: Socket timed out' >&2; exit 1")
    with pytest.raises(EnvironmentLacks, match="SLURM does not answer"):
        settle(Site(partition="gpu"), dry_run=False)


# ---------------------------------------------------------------- what sbatch says

REFUSED = """\
sbatch: error: lua: ===== the plugin of this site =====
sbatch: error: lua: \x1b[31mGPUs are asked for with their type here\x1b[0m
sbatch: error: lua: for example --gres=gpu:a100:1; see https://docs.site/gpus
sbatch: error: Batch job submission failed: Unspecified error"""


def test_a_refusal_is_all_that_the_command_said_without_its_name_and_control_characters(commands: Path) -> None:
    (commands / "words").write_text(REFUSED + "\n")
    put(commands / "sbatch", f"/bin/cat {commands}/words >&2; exit 1")
    with pytest.raises(scheduler.SchedulerError) as refused:
        slurm_orders.submit(["sbatch"])
    told = str(refused.value).splitlines()
    assert len(told) == 4 and "--gres=gpu:a100:1; see https://docs.site/gpus" in told[2]
    assert told[0].startswith("sbatch: error: lua: =====") and "Unspecified error" in told[3]
    assert "\\x1b[31mGPUs" in told[1] and str(refused.value).count("sbatch: ") == 1


def test_of_a_long_refusal_the_beginning_and_the_end_are_told(commands: Path) -> None:
    put(commands / "sbatch", "/usr/bin/seq 1 500 >&2; exit 1")
    with pytest.raises(scheduler.SchedulerError) as refused:
        slurm.run(["sbatch"])
    told = [line.strip() for line in str(refused.value).splitlines()]
    assert len(told) == 20 and told[0] == "sbatch: 1" and told[-1] == "500" and "481 lines more" in told[9]


def test_a_plugin_that_speaks_of_connections_has_refused_all_the_same(commands: Path) -> None:
    put(
        commands / "sbatch",
        "echo 'Connection refused by policy: ask for a QOS' >&2; echo 'Unspecified error' >&2; exit 1",
    )
    with pytest.raises(scheduler.SchedulerError) as refused:
        slurm.run(["sbatch"])
    assert not isinstance(refused.value, scheduler.NoAnswer)


@pytest.mark.parametrize("said", [
    "17", "17;cluster", "*** maintenance on Monday ***\nquota: 80 % of 5 TB\n17", "Submitted batch job 17",
    "Welcome, 12 jobs\nSubmitted batch job 17 on cluster east\nyour account has 3 hours left", "12\n17;east",
])  # fmt: skip
def test_the_jobs_id_is_found_whatever_a_site_says_around_it(commands: Path, said: str) -> None:
    (commands / "words").write_text(said + "\n")
    put(commands / "sbatch", f"/bin/cat {commands}/words")
    assert slurm_orders.submit(["sbatch"]) == "17"


@pytest.mark.parametrize("said", ["", "job 17 is queued, for all I know"])
def test_a_job_whose_id_is_not_told_is_no_refusal_and_is_not_asked_for_again(commands: Path, said: str) -> None:
    put(commands / "sbatch", f"echo '{said}'; echo x >> {commands}/count")
    with pytest.raises(scheduler.NoJobId, match=said or "nothing"):
        scheduler.patiently(lambda: slurm_orders.submit(["sbatch"]))
    assert (commands / "count").read_text() == "x\n"


LIMIT = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize("words", ["", f"Batch job submission failed: {LIMIT}"])
def test_an_answer_that_is_final_is_not_asked_for_again(commands: Path, words: str) -> None:
    asked: list[str] = []
    if words:
        put(commands / "sbatch", f'echo "{words}" >&2; exit 1')

    def ask() -> str:
        asked.append("once")
        return slurm.run(["sbatch"])

    with pytest.raises(scheduler.SchedulerError, match="violates accounting" if words else "not found on this machine"):
        scheduler.patiently(ask, patience_s=3)
    assert asked == ["once"]


def test_an_sbatch_that_waits_by_itself_is_quoted(commands: Path) -> None:
    waiting = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying"
    put(commands / "sbatch", f"echo '{waiting}' >&2; exec /bin/sleep 60")
    with pytest.raises(scheduler.NoAnswer, match=r"no answer in 3 s\n.*temporarily unable to accept job"):
        slurm.run(["sbatch"], timeout_s=3)


@pytest.mark.parametrize(("order", "argv"), [
    (lambda: slurm_orders.requeue("17_3"), "scontrol requeue 17_3"),  # the bare id would mean the whole array
    (lambda: slurm_orders.exclude("17", "n1,n2"), "scontrol update jobid=17 excnodelist=n1,n2"),
    (lambda: slurm_orders.delay("17", 60), "scontrol update jobid=17 starttime=now+60"),
    (lambda: slurm_orders.mail_at_end("17", "a@b"), "scontrol update jobid=17 mailuser=a@b mailtype=END,FAIL"),
    (lambda: slurm_orders.mail_at_end("17_3", "a@b"),
     "scontrol update jobid=17_3 mailuser=a@b mailtype=END,FAIL,ARRAY_TASKS"),
    (lambda: slurm_orders.make_wait("18", "17"), "scontrol update jobid=18 dependency=afterany:17"),
    (lambda: slurm_orders.cancel_waiting("17"), "scancel --state=PENDING 17"),
    (lambda: slurm_orders.cancel(["17", "18"]), "scancel 17 18"),
])  # fmt: skip
def test_an_order_is_this_line(monkeypatch: pytest.MonkeyPatch, order: Callable[[], None], argv: str) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(slurm, "run", lambda words, **_: given.append(words))
    order()
    assert given == [argv.split()]
