"""The testbed itself behaves like SLURM: jobs complete, arrays spread, the pre-empted come back."""

from __future__ import annotations

import os
import pwd

from tools.slurm_testbed.harness import SlurmTestbed


def test_a_job_of_an_ordinary_user_completes(testbed: SlurmTestbed) -> None:
    script = f"id -un; pwd; echo gpus=$CUDA_VISIBLE_DEVICES; cd {testbed.project} && {testbed.python} -c 'print(6 * 7)'"
    job = testbed.sbatch("-o", "simple-%j.out", "--gres=gpu:2", command=script)
    assert testbed.wait_state(job) == "COMPLETED"
    log = testbed.workdir / f"simple-{job}.out"
    assert log.read_text().split() == [testbed.user, str(testbed.workdir), "gpus=0,1", "42"]
    assert log.stat().st_uid == pwd.getpwnam(testbed.user).pw_uid != os.getuid()
    assert testbed.restart_count(job) == 0


def test_a_preempted_job_comes_back_under_its_id(testbed: SlurmTestbed) -> None:
    # The first life ignores SIGTERM and waits to be killed, since SLURM does not put back what leaves by itself.
    script = """echo "life ${SLURM_RESTART_COUNT:-0} of $SLURM_JOB_ID"
        [ -n "$SLURM_RESTART_COUNT" ] || srun bash -c 'trap "" TERM; sleep 120'"""
    job = testbed.sbatch("--requeue", "--open-mode=append", "-w", "n1", "-o", "preempted.out", command=script)
    log = testbed.workdir / "preempted.out"
    testbed.wait_for(lambda: log.exists() and "life 0" in log.read_text(), 10, "the first life")
    assert testbed.node_of(job) == "n1"
    testbed.preempt("n1", seconds=1)
    testbed.wait_for(lambda: testbed.restart_count(job) == 1, 30, f"job {job} put back")
    assert testbed.wait_state(job) == "COMPLETED"
    # SLURM 24.11 starts a job that was pre-empted and then completed once more: a third line
    lives = [line for line in log.read_text().splitlines() if line.startswith("life ")]
    assert lives[:2] == [f"life 0 of {job}", f"life 1 of {job}"]


def test_an_array_runs_every_task(testbed: SlurmTestbed) -> None:
    command = "echo $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_JOB_ID"
    job = testbed.sbatch("--array=0-3", "-o", "array-%a.out", command=command)
    assert testbed.wait_state(job) == "COMPLETED"
    assert testbed.job_states(job) == ["COMPLETED"] * 4
    assert testbed.job_state(f"{job}_2") == "COMPLETED"
    for task in range(4):
        assert (testbed.workdir / f"array-{task}.out").read_text() == f"{task} of {job}\n"


def test_cancelled_jobs_are_gone(testbed: SlurmTestbed) -> None:
    job = testbed.sbatch("-o", "/dev/null", command="sleep 120")
    testbed.wait_state(job, "RUNNING", timeout_s=10)
    testbed.cancel(job)
    assert testbed.wait_state(job) == "CANCELLED"
    testbed.end_all_jobs()
    assert testbed.squeue() == ""
