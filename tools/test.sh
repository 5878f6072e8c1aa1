#!/bin/bash
# One command equals CI: style, types, tests. `tools/test.sh --help` says how.
set -uo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 3
exec </dev/null # nothing here may wait for an answer

case ${1:-} in
    -h | --help)
        cat <<'TEXT'
Usage: tools/test.sh [PYTEST ARGUMENTS]      e.g. tools/test.sh tests/unit -k philox

Makes or updates .venv (tools/env.sh), then runs ruff, mypy and pytest over tests/, or over the paths given. As root
on Debian it installs the SLURM packages where they are missing, for the tests that run a small cluster on this host.
The last section lists what could not run on this machine and how to enable it. Of some families of cases that take
long a few are drawn: DDPM_TEST_SEED=N draws again what that seed drew, DDPM_TEST_FULL=1 runs all.

Exit code: 0 if all passed, else that of the first of the three that failed; 3 if the environment cannot be made.
TEXT
        exit 0
        ;;
esac

tools/env.sh test,dev || exit 3
python=$PWD/.venv/bin/python

# Without them the SLURM tests skip, and say so at the end.
if [ "$(id -u)" = 0 ] && [ -e /etc/debian_version ]; then
    tools/slurm_testbed/start.sh --install || echo "test.sh: no SLURM packages, see above" >&2
fi

rc=0
step() {
    local failed=0
    echo "== $1"
    shift
    "$@" || failed=$?
    [ $rc != 0 ] || rc=$failed
}

pytest_line() { # Nth of `lines`
    local words with=()
    read -ra words <<<"${lines[$1]}"
    [ "${words[0]}" != "${covered[0]}" ] || with=(coverage run -m)
    "$python" -m ${with[@]+"${with[@]}"} pytest -ra --durations=10 "${words[@]}" >"$logs/$1" 2>&1 &
    trap "kill $!" TERM
    wait $! || wait $! # the second time where the first ended by a signal
    echo $? >"$logs/$1.code"
    echo "== pytest ${lines[$1]%% --*}"
    cat "$logs/$1"
}

types() {
    cat "$logs/types"
    return "$(cat "$logs/types.code")"
}

step ruff "$python" -m ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # what runs side by side must not fight for cores
if [ $# != 0 ]; then
    step mypy "$python" -m mypy
    paths=(tests) # which a path among the arguments replaces
    for arg in "$@"; do
        case $arg in
            -*) ;;
            *) [ ! -e "${arg%%::*}" ] || paths=() ;;
        esac
    done
    step pytest "$python" -m pytest -ra --durations=10 "$@" ${paths[@]+"${paths[@]}"}
else
    export DDPM_TEST_SEED=${DDPM_TEST_SEED:-$RANDOM} # one for all: what a failure needs to be seen again
    logs=$(mktemp -d)
    trap 'kill $(jobs -p) 2>/dev/null; wait; rm -rf "$logs"' EXIT
    echo "== mypy, and pytest in seven parts, three at a time; what each said when it is over"
    # The longest first: the tests on SLURM mostly wait, for grace periods and time limits.
    covered=(tests/unit/run tests/unit/sampling) # of the rooms that save, fence and publish: every branch
    computed=(tests/recipes tests/unit/network tests/unit/training)
    rooms=(tests/unit/{api,cluster,data,diffusion,life,queue,scoring,scripts})
    elsewhere=(tests/slurm tests/compat tests/cli tests/chaos "${computed[@]}" "${rooms[@]}" "${covered[@]}")
    lines=("tests/slurm tests/compat" tests/cli "${computed[*]}" "${rooms[*]}" tests/chaos
        "tests ${elsewhere[*]/#/--ignore=}" "${covered[*]}")
    { "$python" -m mypy >"$logs/types" 2>&1; echo $? >"$logs/types.code"; } &
    for i in "${!lines[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge 3 ]; do wait -n; done
        pytest_line "$i" &
    done
    wait
    step mypy types
    for i in "${!lines[@]}"; do [ "$rc" != 0 ] || rc=$(cat "$logs/$i.code" 2>/dev/null || echo 1); done
    step coverage "$python" -m coverage report
fi
exit "$rc"
