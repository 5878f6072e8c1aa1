#!/bin/bash
# Stops a testbed that start.sh made: its jobs, then its daemons and nothing else. `stop.sh --help` says how.
set -uo pipefail
PATH=$PATH:/usr/sbin:/sbin

usage() {
    cat <<'TEXT'
Usage: tools/slurm_testbed/stop.sh [DIR] [--purge]

Cancels the testbed's jobs and ends its daemons. DIR (default /tmp/ddpm-slurm-testbed) stays, for its logs, and
start.sh can start it again; --purge deletes it.

Exit codes: 0 stopped (also when nothing ran any more), 2 there is no testbed in DIR.
TEXT
}

die() { local rc=$1; shift; echo "stop.sh: $*" >&2; exit "$rc"; }

DIR='' PURGE=no
for arg in "$@"; do
    case $arg in
        -h | --help) usage; exit 0 ;;
        --purge) PURGE=yes ;;
        -*) usage >&2; die 2 "unknown option $arg" ;;
        *) [ -z "$DIR" ] || die 2 "one DIR at most"; DIR=$arg ;;
    esac
done
DIR=$(realpath -m "${DIR:-/tmp/ddpm-slurm-testbed}")
# The first line of slurm.conf is the proof that this directory is ours to delete.
grep -q '^# ddpm-hpc SLURM testbed' "$DIR/slurm.conf" 2>/dev/null || die 2 "no testbed in $DIR"
[ "$(id -u)" = 0 ] || die 3 "must be root"
export SLURM_CONF=$DIR/slurm.conf

# A zombie whose parent does not reap it counts as gone.
alive() { grep -qs '^State:[[:space:]]*[^Z[:space:]]' "/proc/$1/status"; }

# Ends the daemons that the given pid files name, waits, and kills what is left after 10 s.
end_daemons() {
    local file pid pids=() end=$((SECONDS + 10))
    for file in "$@"; do
        # A pid file may outlive its daemon, and its number may be somebody else's by now.
        pid=$(cat "$file" 2>/dev/null)
        [ -n "$pid" ] || continue
        case $(cat "/proc/$pid/comm" 2>/dev/null) in
            slurmd | slurmctld | slurmdbd | mariadbd | munged) kill "$pid" 2>/dev/null && pids+=("$pid") ;;
        esac
    done
    for pid in ${pids[@]+"${pids[@]}"}; do
        while alive "$pid" && [ $SECONDS -lt $end ]; do sleep 0.1; done
        alive "$pid" && { echo "stop.sh: pid $pid did not end in 10 s, killed" >&2; kill -9 "$pid" 2>/dev/null; }
    done
    rm -f "$@"
}

# Processes of jobs whose slurmstepd died survive scancel, and an interrupted start may leave a daemon without a pid
# file. Both are known by the SLURM_CONF that they inherited. The same path in a chroot names another testbed.
end_orphans() {
    local environ pid
    grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | while read -r environ; do
        pid=${environ//[^0-9]/}
        [ "/proc/$pid/root" -ef / ] || continue
        case $(cat "/proc/$pid/comm" 2>/dev/null) in
            slurmstepd | slurmd | slurmctld | slurmdbd | mariadbd | munged) kill -9 "$pid" 2>/dev/null ;;
            *) ! grep -qz '^SLURM_JOB_ID=' "$environ" 2>/dev/null || kill -9 "$pid" 2>/dev/null ;;
        esac
    done
}

if [ -s "$DIR/slurmctld.pid" ] && alive "$(cat "$DIR/slurmctld.pid")"; then
    # Again and again, for those that come back: a job that puts itself back survives scancel.
    for _ in $(seq 60); do
        jobs=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u)
        [ -n "$jobs" ] || break
        echo "$jobs" | xargs scancel 2>/dev/null
        sleep 0.5
    done
fi
end_daemons "$DIR"/slurmd.n*.pid
end_daemons "$DIR/slurmctld.pid"
end_daemons "$DIR/slurmdbd.pid"
end_daemons "$DIR/mariadbd.pid"
end_daemons "$DIR/munge/pid"
end_orphans
rm -f "$DIR/munge/socket" "$DIR/munge/socket.lock"
if [ $PURGE = yes ]; then
    rm -rf "$DIR"
    echo "stopped and deleted $DIR"
else
    echo "stopped $DIR"
fi
