# bash slurm/rank.sh COMMAND …: a rank's command, to which a stop signal waits until it listens
# (launch/life/preemption.py).
# Python takes a while to start, longer on a cold file system, and would die of SIGTERM: a crash, where SLURM only
# pre-empted the job. Where env is older than coreutils 8.31 (RHEL 8), that may happen.
env --block-signal=TERM true 2>/dev/null && exec env --block-signal=TERM --block-signal=USR2 "$@"
exec "$@"
